"""The machine around the encrypted memory: memory traces of real programs through the caches of a modelled core."""

from __future__ import annotations

from csvfast.machine.trace import Trace, TraceResult, draw_sweep, read_trace, run_trace, sweep

__all__ = ["Trace", "TraceResult", "draw_sweep", "read_trace", "run_trace", "sweep"]
