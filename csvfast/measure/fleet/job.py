"""A job from beginning to end: find, leave out what the ledger knows, measure the rest, keep the ledger, give back rows.

    for row in csvfast.measure.batch(["images"], mode="tree"):
        print(row.digest, row.name)

    with Job(["images"], ledger="images.jsonl") as job:
        for row in job:
            ...
        job.table      # all rows, in the order in which the sources were found
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from csvfast.measure.errors import ParameterError
from csvfast.measure.fleet.discover import Selection, discover, read_manifest
from csvfast.measure.fleet.executors import Executor, ThreadExecutor
from csvfast.measure.fleet.ledger import Ledger
from csvfast.measure.fleet.rows import Content, Item, Key, Mode, Options, Row
from csvfast.measure.fleet.schedule import plan, range_bytes_of, run
from csvfast.measure.source import Access, AnyPath

__all__ = ["Job", "JobProgress", "batch"]

REPORT_SECONDS = 0.1


@dataclass
class JobProgress:
    """How far a job is.

    sources, bytes: to be measured by this run, as far as they have been found. kept: rows that the ledger had already. done: the
    others that are there; failed of these. measured_bytes may run ahead of the rows.
    Thread-safety: read by anybody, written by the job.
    """

    sources: int = 0
    bytes: int = 0
    kept: int = 0
    done: int = 0
    failed: int = 0
    measured_bytes: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the measuring began."""
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Bytes a second, on average."""
        return self.measured_bytes / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the average rate so far; None when nothing can be said yet."""
        if self.measured_bytes <= 0 or self.seconds < 1:
            return None
        return max(self.bytes - self.measured_bytes, 0) / self.rate


class Job:
    """One job. Use as a context manager, iterate it once: rows come as they are done (those that the ledger knew first).

    Args:
        sources: paths, directories, URLs, items.
        selection: mode, content, patterns.
        manifest: a file that names further sources.
        executor: None = threads, one for each of `jobs` (None = processors); another one belongs to the caller, who closes it.
        ledger: where rows are kept; what it holds already and has not changed is not measured again. fresh: forget that.
        retries: of a task whose worker was lost. access: "mmap" or "read", of local files.
        progress: called with a JobProgress, about ten times a second, from any thread, one at a time.
    Attributes: progress, table (complete when the iterator has ended), repaired (bytes of a ledger's torn last line).
    Raises: ParameterError, RecipeError, SourceError (of the manifest), TargetError (of the ledger), ExecutorError. A source that
        cannot be measured raises nothing: its row has an error.
    Thread-safety: one thread.
    """

    def __init__(
        self,
        sources: Iterable[AnyPath | Item] = (),
        selection: Selection | None = None,
        *,
        manifest: AnyPath | None = None,
        executor: Executor | None = None,
        jobs: int | None = None,
        ledger: AnyPath | None = None,
        fresh: bool = False,
        retries: int = 3,
        access: Access = "mmap",
        progress: Callable[[JobProgress], None] | None = None,
    ) -> None:
        if access not in ("read", "mmap"):
            raise ParameterError(f"access is {access!r}; expected 'read' or 'mmap'")
        self.progress = JobProgress()
        self._selection = selection or Selection()
        self._sources = list(sources)
        if manifest is not None:
            self._sources += read_manifest(manifest, self._selection)
        self._retries = retries
        self._access = access
        self._report = progress
        self._lock = threading.Lock()
        self._reported = 0.0
        self._rows: dict[Key, Row | None] = {}  # in the order in which they are found
        self._stack = ExitStack()
        self._ledger = None if ledger is None else self._stack.enter_context(Ledger(ledger, fresh=fresh))
        self.repaired = 0 if self._ledger is None else self._ledger.repaired
        try:
            self._own = ThreadExecutor(jobs) if executor is None else None
            self._executor: Executor = self._stack.enter_context(self._own) if self._own is not None else executor  # type: ignore[assignment]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def table(self) -> list[Row]:
        """The rows that are there, in the order in which their sources were found: the same however they were measured."""
        return [row for row in self._rows.values() if row is not None]

    def __iter__(self) -> Iterator[Row]:
        aside: list[tuple[Row, bool]] = []
        tasks = plan(self._items(aside), self._executor.slots, self._access, range_bytes_of(self._executor))
        try:
            for rows in run(tasks, self._executor, retries=self._retries, step=self._step):
                yield from self._set_aside(aside)
                yield from self._take(rows)
            yield from self._set_aside(aside)
        except GeneratorExit:
            if self._own is not None:
                self._own.close(cancel=True)
            raise
        finally:
            self._show(force=True)

    def _items(self, aside: list[tuple[Row, bool]]) -> Iterator[Item]:
        """What is to be measured, while it is being found. Other rows go aside: (row, whether the ledger has it)."""
        progress = self.progress
        for found in discover(self._sources, self._selection):
            if self._ledger is not None and isinstance(found, Item) and self._ledger.is_file(found.identity):
                continue
            self._rows[found.key] = None
            if isinstance(found, Row):
                progress.sources += 1
                aside.append((replace(found, started=time.time()), False))
                continue
            row = None if self._ledger is None else self._ledger.current(found)
            if row is None:
                progress.sources += 1
                progress.bytes += found.size or 0
                yield found
                continue
            progress.kept += 1
            if row.expect != found.expect and found.mode != "launch":
                row = replace(row, expect=found.expect)
            aside.append((row, True))
        if self._ledger is not None:
            self._ledger.rows.clear()  # those that hold are in this object's table

    def _set_aside(self, aside: list[tuple[Row, bool]]) -> Iterator[Row]:
        if not aside:
            return
        rows = aside[:]
        aside.clear()
        for row, kept in rows:
            if kept:
                self._rows[row.key] = row
                yield row
        yield from self._take([row for row, kept in rows if not kept])

    def _take(self, rows: Sequence[Row]) -> Iterator[Row]:
        if self._ledger is not None and rows:
            self._ledger.add(rows)
        for row in rows:
            self._rows[row.key] = row
        self.progress.done += len(rows)
        self.progress.failed += sum([not row.ok for row in rows])
        self._show()
        yield from rows

    def _step(self, count: int) -> None:
        with self._lock:
            self.progress.measured_bytes += count
        self._show()

    def _show(self, *, force: bool = False) -> None:
        if self._report is None:
            return
        now = time.monotonic()
        if (force or now - self._reported >= REPORT_SECONDS) and self._lock.acquire(blocking=force):
            try:
                self._reported = now
                self._report(self.progress)
            finally:
                self._lock.release()


def batch(
    sources: Iterable[AnyPath | Item],
    executor: Executor | None = None,
    *,
    mode: Mode = "linear",
    content: Content = "file",
    salt: bytes = b"",
    block_bytes: int = 4096,
    patterns: Sequence[str] = (),
    jobs: int | None = None,
    ledger: AnyPath | None = None,
) -> Iterator[Row]:
    """Measures many sources; rows come as they are done. See `Job`, which can do more.

    Raises: as Job; at the first row that is asked for.
    """
    selection = Selection(mode, content, Options(salt.hex(), block_bytes), tuple(patterns))
    with Job(sources, selection, executor=executor, jobs=jobs, ledger=ledger) as job:
        yield from job
