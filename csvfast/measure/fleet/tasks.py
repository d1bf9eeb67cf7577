"""The units of work of a job, and the one function that does them.

A task is what executors carry: it can be pickled, knows everything it needs, changes nothing, and may be done twice (a worker was
lost) without harm. `perform(task)` is all that a worker has to call, in whatever process or machine it runs; it returns an
outcome, which can be pickled too, and raises nothing for a source that cannot be measured: such an outcome holds the error.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from csvfast.measure.fleet.rows import Identity, Item, Row
from csvfast.measure.source import Access

__all__ = [
    "RANGE_BYTES",
    "Outcome",
    "RangeOutcome",
    "RangeTask",
    "Step",
    "StoppedError",
    "Task",
    "WholeOutcome",
    "WholeTask",
    "perform",
    "worker_name",
]

RANGE_BYTES: Final = 64 << 20
"""Bytes of a range of a large image: a multiple of every block size."""

Step = Callable[[int], None]
"""Called with bytes that were measured since the last call, from the thread that measures; what it raises ends the task."""


class StoppedError(Exception):
    """Raised by a step to end a task that nobody wants any more. It passes through `perform`."""


@dataclass(frozen=True, slots=True)
class WholeTask:
    """Items to be measured from beginning to end in one place, side by side where that is possible.

    number: unique within the job. access: "read" or "mmap".
    """

    number: int
    items: tuple[Item, ...]
    access: Access = "mmap"

    @property
    def size(self) -> int:
        """Bytes to be measured, as far as they are known."""
        return sum(item.size or 0 for item in self.items)


@dataclass(frozen=True, slots=True)
class RangeTask:
    """Leaves of the tree over a part of one large item (modes "tree" and "verity"): bytes start to stop.

    start is a multiple of RANGE_BYTES, stop one of the block size, or the end of the source. access: as of WholeTask.
    """

    number: int
    item: Item
    start: int
    stop: int
    access: Access = "mmap"

    @property
    def size(self) -> int:
        """Bytes to be measured."""
        return self.stop - self.start


Task = WholeTask | RangeTask


@dataclass(frozen=True, slots=True)
class WholeOutcome:
    """One row for each item of the task, in their order."""

    number: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RangeOutcome:
    """Leaves: 32 bytes for each block. identity: of the source as this worker saw it, before and after.

    row: the item's row with an error when the range could not be measured; leaves are empty then. level: 0, or of the digests of
    whole hash blocks that stand in the place of the leaves.
    """

    number: int
    leaves: bytes
    identity: Identity
    started: float
    seconds: float
    worker: str
    row: Row | None = None
    level: int = 0


Outcome = WholeOutcome | RangeOutcome


def perform(task: Task, step: Step | None = None) -> Outcome:
    """Does a task. Errors of sources become rows; only what `step` raises comes out (and defects of the program).

    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    from csvfast.measure.fleet.measuring import measure_range, measure_whole

    if isinstance(task, RangeTask):
        return measure_range(task, step, worker_name())
    return WholeOutcome(task.number, tuple(measure_whole(task, step, worker_name())))


def worker_name() -> str:
    """Host, process and thread of the caller, for reports."""
    return f"{socket.gethostname()}/{os.getpid()}/{threading.get_native_id()}"
