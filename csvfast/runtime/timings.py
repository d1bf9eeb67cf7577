"""How long each step of a container's life took, on the host's clock; the agent's own steps on its clock, beside.

    timings = Timings()
    with timings.step("launch"):
        ...
    timings.mark("first output")
    print(timings.table())

A guest's clock is not the host's: an agent's steps are durations only, listed below the host's step in which they happened.
Thread-safety: any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

__all__ = ["Step", "Timings"]

_STEPS_MAX: Final = 1000  # of the agent's, which is not ours to trust


class Step(NamedTuple):
    """What was done, when it began (seconds after the beginning; None: on another clock), how long it took."""

    name: str
    begin: float | None
    seconds: float


class Timings:
    """A stopwatch with steps. In: begin   of time.monotonic(); None = now"""

    def __init__(self, begin: float | None = None) -> None:
        self._begin = time.monotonic() if begin is None else begin
        self._steps: list[Step] = []
        self._guest: list[Step] = []
        self._marks: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times the block, also when it fails."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, begin, time.monotonic() - begin)

    def add(self, name: str, begin: float, seconds: float) -> None:
        """A step that was timed elsewhere. In: begin   of time.monotonic()"""
        with self._lock:
            self._steps.append(Step(name, begin - self._begin, seconds))

    def mark(self, name: str) -> bool:
        """Now is the first time that this happens. False: it was before."""
        with self._lock:
            if name in self._marks:
                return False
            self._marks[name] = time.monotonic() - self._begin
            return True

    def guest(self, steps: Iterable[object]) -> None:
        """The agent's steps, as pairs of a name and seconds, or objects with "step" and "seconds"; anything else is left out."""
        found: list[Step] = []
        for entry in steps:
            if isinstance(entry, Mapping):
                name, seconds = entry.get("step", entry.get("name")), entry.get("seconds")
            elif isinstance(entry, (list, tuple)) and len(entry) == 2:
                name, seconds = entry
            else:
                continue
            if isinstance(name, str) and isinstance(seconds, (int, float)) and len(found) < _STEPS_MAX:
                found.append(Step("".join(one if one.isprintable() else "?" for one in name[:80]), None, float(seconds)))
        with self._lock:
            self._guest = found

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begin

    def at(self, name: str) -> float | None:
        """When a mark was set, in seconds after the beginning."""
        return self._marks.get(name)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        with self._lock:
            return {
                "steps": [
                    {"step": step.name, "begin": round(step.begin or 0.0, 4), "seconds": round(step.seconds, 4)}
                    for step in sorted(self._steps, key=lambda step: step.begin or 0.0)
                ],
                "agent": [{"step": step.name, "seconds": round(step.seconds, 4)} for step in self._guest],
                "marks": {name: round(seconds, 4) for name, seconds in self._marks.items()},
            }

    def table(self) -> str:
        """Lines for people: begin and duration in milliseconds."""
        record = self.record()
        lines = [f"{'begin ms':>10} {'took ms':>10}  step"]
        lines += [f"{row['begin'] * 1e3:10.1f} {row['seconds'] * 1e3:10.1f}  {row['step']}" for row in record["steps"]]
        lines += [f"{'':>10} {row['seconds'] * 1e3:10.1f}    agent: {row['step']}" for row in record["agent"]]
        lines += [f"{seconds * 1e3:10.1f} {'':>10}  {name}" for name, seconds in record["marks"].items()]
        return "\n".join(lines)
