"""The machine around the encrypted memory: memory traces of real programs through the caches of a modelled core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast._lazy import lazy

if TYPE_CHECKING:
    from csvfast.machine.trace import Trace, TraceResult, draw_sweep, read_trace, run_trace, sweep

__all__ = ["Trace", "TraceResult", "draw_sweep", "read_trace", "run_trace", "sweep"]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "Trace": "trace", "TraceResult": "trace", "draw_sweep": "trace", "read_trace": "trace", "run_trace": "trace",
            "sweep": "trace",
        },
    )  # fmt: skip
