"""Which tasks a job consists of, and how they go through an executor: bounded, in any order, again when a worker was lost.

Small files share a task; large linear ones share a task by as many as there are lanes; large images of modes "tree" and "verity"
are cut into ranges, whose leaves are joined in order here, one tree for each image. At most slots + SPARE tasks are submitted,
and ranges that arrive early are at most AHEAD before the one that is missing, so memory does not depend on the size of the job.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

from csvfast.measure.errors import ParameterError
from csvfast.measure.fleet.executors import Executor, ExecutorError, Pending, WorkerLostError
from csvfast.measure.fleet.lanes import LANES, SMALL_BYTES
from csvfast.measure.fleet.measuring import block_hash_of, covered, tree_row
from csvfast.measure.fleet.rows import Identity, Item, Row
from csvfast.measure.fleet.tasks import RANGE_BYTES, RangeOutcome, RangeTask, Step, Task, WholeOutcome, WholeTask
from csvfast.measure.source import Access
from csvfast.measure.tree import TreeBuilder

__all__ = ["plan", "range_bytes_of", "run"]

SPARE: Final = 2
AHEAD: Final = 64
TASK_BYTES: Final = 32 << 20
TASK_FILES: Final = 512


def range_bytes_of(executor: Executor) -> int:
    """Bytes of a large image that one of its tasks measures: its own choice, where a task costs more than elsewhere."""
    return getattr(executor, "range_bytes", None) or RANGE_BYTES


def plan(
    items: Iterable[Item], slots: int, access: Access = "mmap", range_bytes: int | None = None
) -> Iterator[Task]:
    """The tasks that measure all items: small ones while they are being found, then large ones, the largest first.

    Args: range_bytes: as range_bytes_of() gives it; None = RANGE_BYTES.
    """
    length = range_bytes or RANGE_BYTES
    numbers = count()
    large: list[Item] = []
    streams: list[Item] = []
    group: list[Item] = []
    size = 0
    for item in items:
        if _is_split(item, length):
            large.append(item)
        elif item.mode == "linear" and (item.size is None or item.size > SMALL_BYTES):
            streams.append(item)
        else:
            if group and (size + (item.size or 0) > TASK_BYTES or len(group) >= TASK_FILES):
                yield WholeTask(next(numbers), tuple(group), access)
                group, size = [], 0
            group.append(item)
            size += item.size or 0
    if group:
        yield WholeTask(next(numbers), tuple(group), access)
    large.sort(key=lambda item: -(item.size or 0))
    for item in large:
        end = covered(item, item.size or 0)
        for start in range(0, end, length):
            yield RangeTask(next(numbers), item, start, min(start + length, end), access)
    streams.sort(key=lambda item: -(item.size or 0))
    each = max(1, min(LANES, -(-len(streams) // max(slots, 1))))
    for at in range(0, len(streams), each):
        yield WholeTask(next(numbers), tuple(streams[at : at + each]), access)


def run(
    tasks: Iterator[Task], executor: Executor, *, retries: int = 3, step: Step | None = None
) -> Iterator[list[Row]]:
    """Rows as they are done, a list for each task that gave any.

    Args: retries: how often a task is submitted again after its worker was lost. step: called with bytes as they are measured,
        from several threads.
    Raises: ExecutorError. Whatever ends this iterator early drops the tasks that have not begun; those under way go on until the
        executor is closed with cancel=True.
    """
    if retries < 0:
        raise ParameterError(f"retries is {retries}; expected 0 or more")
    ended: queue.SimpleQueue[tuple[int, Pending]] = queue.SimpleQueue()
    waiting: deque[Task] = deque()
    flying: dict[int, _Flight] = {}
    joins: dict[int, _Join] = {}  # by the number of an item's first range
    more = True
    length = range_bytes_of(executor)

    def begin(task: Task, tries: int) -> None:
        counter = _Counter(step) if step is not None else None
        future = executor.submit(task, None if counter is None else counter.add)
        flying[task.number] = _Flight(task, tries, counter, future)
        future.add_done_callback(lambda done: ended.put((task.number, done)))

    try:
        while True:
            while len(flying) < executor.slots + SPARE:
                if not waiting and more:
                    task = next(tasks, None)
                    if task is None:
                        more = False
                    else:
                        waiting.append(task)
                if not waiting:
                    break
                task = waiting[0]
                if isinstance(task, RangeTask):
                    join = joins.setdefault(_first(task, length), _Join(task.item, length))
                    if join.is_over or (task.start - join.next) // length > AHEAD:
                        if not join.is_over:
                            break
                        waiting.popleft()
                        continue
                waiting.popleft()
                begin(task, 0)
            if not flying:
                return
            number, future = ended.get()
            flight = flying.pop(number)
            try:
                outcome = future.result()
            except WorkerLostError as error:
                if flight.tries < retries:
                    if flight.counter is not None:
                        flight.counter.undo()
                    begin(flight.task, flight.tries + 1)
                    continue
                outcome = _lost(flight, "lost", f"given up after {flight.tries + 1} workers: {error}")
            except ExecutorError:
                raise
            except Exception as error:
                outcome = _lost(flight, "internal", f"{type(error).__name__}: {error}")
            if flight.counter is not None:
                flight.counter.finish(flight.task.size)
            if isinstance(outcome, WholeOutcome):
                yield list(outcome.rows)
            else:
                assert isinstance(flight.task, RangeTask)
                row = joins[_first(flight.task, length)].add(flight.task, outcome)
                if row is not None:
                    yield [row]
    finally:
        for flight in flying.values():
            flight.future.cancel()


def _is_split(item: Item, length: int) -> bool:
    # A virtual disk's size is not known before it is opened.
    return item.mode in ("tree", "verity") and item.content == "file" and (item.size or 0) > length


@dataclass(slots=True)
class _Flight:
    """A task that is submitted."""

    task: Task
    tries: int
    counter: _Counter | None
    future: Pending


class _Counter:
    """What a task has reported so far, so that it counts once whatever happens to it."""

    def __init__(self, step: Step) -> None:
        self._step: Callable[[int], Any] = step
        self._done = 0

    def add(self, more: int) -> None:
        self._done += more
        self._step(more)

    def undo(self) -> None:
        self._step(-self._done)

    def finish(self, size: int) -> None:
        """A task that reported less, because it ran elsewhere or failed, counts as a whole."""
        self._step(size - self._done)


class _Join:
    """The tree of a large image, whose ranges arrive in any order."""

    def __init__(self, item: Item, length: int) -> None:
        self.next = 0
        self._length = length
        self.is_over = False
        self._item = item
        self._size = item.size or 0
        block_hash, block_bytes = block_hash_of(item)
        self._builder = TreeBuilder(block_hash, block_bytes)
        self._early: dict[int, tuple[bytes, int]] = {}
        self._identity: Identity | None = None
        self._started = time.time()
        self._seconds = 0.0
        self._workers: set[str] = set()

    def add(self, task: RangeTask, outcome: RangeOutcome) -> Row | None:
        """The image's row when this was the last range, or the first that failed."""
        if self.is_over:
            return None
        if outcome.row is not None:
            self._end()
            return outcome.row
        expected = self._item.identity or Identity()
        if _elsewhere(outcome.identity) != _elsewhere(expected):
            self._end()
            message = f"{self._item.name}: changed since it was found: was {expected.to_json()}, is {outcome.identity.to_json()}"
            return Row.failed(self._item, "changed", message, started=self._started, worker=outcome.worker)
        self._identity = outcome.identity
        self._started = min(self._started, outcome.started)
        self._seconds += outcome.seconds
        self._workers.add(outcome.worker)
        self._early[task.start] = (outcome.leaves, outcome.level)
        while (ready := self._early.pop(self.next, None)) is not None:
            leaves, level = ready
            if level:
                self._builder.add_blocks(leaves, level)
            else:
                self._builder.add(leaves)
            self.next += self._length
        if self.next < covered(self._item, self._size):
            return None
        self._end()
        worker = self._workers.pop() if len(self._workers) == 1 else f"{len(self._workers)} workers"
        return tree_row(self._item, self._builder, self._size, self._identity, self._started, self._seconds, worker)

    def _end(self) -> None:
        self.is_over = True
        self._early.clear()


def _first(task: RangeTask, length: int) -> int:
    return task.number - task.start // length


def _elsewhere(identity: Identity) -> Identity:
    """The same file has another device number on another machine."""
    return replace(identity, device=None)


def _lost(flight: _Flight, kind: str, message: str) -> WholeOutcome | RangeOutcome:
    task = flight.task
    now = time.time()
    if isinstance(task, WholeTask):
        rows = [Row.failed(item, kind, f"{item.name}: {message}", started=now) for item in task.items]
        return WholeOutcome(task.number, tuple(rows))
    row = Row.failed(task.item, kind, f"{task.item.name}: {message}", started=now)
    return RangeOutcome(task.number, b"", Identity(), now, 0.0, "", row)
