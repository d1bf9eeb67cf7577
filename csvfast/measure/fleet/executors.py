"""Where tasks are done: threads of this process (the default), other processes, or whatever follows the same protocol.

An executor takes tasks and gives back futures. It knows nothing of files, rows or digests: for each task it arranges that
`tasks.perform(task)` runs somewhere, once or (after a loss) more than once, and that the future ends with what it returned.

    submit(task, step)   begins a task soon; returns at once. The scheduler keeps at most `slots + spare` tasks submitted.
    the future           result(), exception(), cancel(), add_done_callback(function of the future): as concurrent.futures'.
                         It ends with an Outcome; with WorkerLostError when the place where the task was done is gone: the
                         scheduler submits such a task again, up to its number of retries; with any other exception: the
                         rows of the task say "internal".
    slots                how many tasks run at the same time now; asked again and again, so that a cluster may grow and shrink
    local                True: tasks run in this process, and `step` is called while they run. False: `step` is ignored
    close(cancel)        returns when nothing runs any more. cancel=True: tasks under way are ended as early as possible, and
                         their futures are cancelled or end with an exception
    ExecutorError        raised by submit(), or by the constructor: the executor as a whole is not there (any more); it
                         ends the job, whose finished rows are kept

Callbacks of futures may run in any thread; the scheduler's do nothing but put the future into a queue.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from csvfast.measure.errors import MeasureError, ParameterError
from csvfast.measure.fleet.tasks import Outcome, Step, StoppedError, Task, perform
from csvfast.measure.source import default_threads

__all__ = ["Executor", "ExecutorError", "Pending", "ProcessExecutor", "ThreadExecutor", "WorkerLostError", "make_executor"]


class ExecutorError(MeasureError, ConnectionError):
    """No task can be done any more: a cluster that is not there, workers that cannot be started."""


class WorkerLostError(MeasureError):
    """The place where a task was done is gone; the task may be submitted again."""


class Pending(Protocol):
    """The part of concurrent.futures.Future that is used; distributed.Future has it, too."""

    def result(self) -> Outcome:
        """The outcome, or what went wrong is raised."""

    def cancel(self) -> Any:
        """Drops the task if it has not begun."""

    def add_done_callback(self, fn: Callable[[Any], Any], /) -> Any:
        """Calls fn(future) when it has ended or is cancelled, in any thread; at once when it has already."""


@runtime_checkable
class Executor(Protocol):
    """See the module's description."""

    name: str
    local: bool

    @property
    def slots(self) -> int:
        """Tasks that run at the same time, at least 1."""

    def submit(self, task: Task, step: Step | None = None) -> Pending:
        """Begins a task. Raises ExecutorError."""

    def close(self, *, cancel: bool = False) -> None:
        """Ends the executor; harmless when repeated."""


class _Closing:
    """`with` for executors: an exception cancels what is under way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def close(self, *, cancel: bool = False) -> None:
        raise NotImplementedError


class ThreadExecutor(_Closing):
    """Threads of this process: the GIL is released while bytes are read and hashed.

    Args: threads: None = one for each processor this process may use.
    """

    name = "threads"
    local = True

    def __init__(self, threads: int | None = None) -> None:
        self._slots = _checked(threads)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(self._slots, thread_name_prefix="csvfast-fleet")

    @property
    def slots(self) -> int:
        """Threads."""
        return self._slots

    def submit(self, task: Task, step: Step | None = None) -> Future[Outcome]:
        """Begins a task in a free thread."""
        try:
            return self._pool.submit(perform, task, self._watched(step))
        except RuntimeError as error:
            raise ExecutorError(f"threads: {error}") from error

    def close(self, *, cancel: bool = False) -> None:
        """cancel=True ends tasks at their next step."""
        if cancel:
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=cancel)

    def _watched(self, step: Step | None) -> Step:
        stop = self._stop

        def watched(count: int) -> None:
            if stop.is_set():
                raise StoppedError
            if step is not None:
                step(count)

        return watched


class ProcessExecutor(_Closing):
    """Other processes of this machine. A process that dies takes its tasks with it: they end with WorkerLostError, and new
    processes take its place.

    Args: processes: None = one for each processor this process may use.
    """

    name = "processes"
    local = False

    def __init__(self, processes: int | None = None) -> None:
        self._slots = _checked(processes)
        self._lock = threading.Lock()
        self._closed = False
        self._pool: ProcessPoolExecutor | None = None

    @property
    def slots(self) -> int:
        """Processes."""
        return self._slots

    def submit(self, task: Task, step: Step | None = None) -> Future[Outcome]:  # noqa: ARG002
        """Begins a task in a free process; `step` is ignored."""
        with self._lock:
            if self._closed:
                raise ExecutorError("processes: the executor is closed")
            try:
                inner = self._running().submit(perform, task)
            except BrokenProcessPool:
                self._pool = None
                inner = self._running().submit(perform, task)
            except OSError as error:
                raise ExecutorError(f"processes: cannot be started: {error.strerror or error}") from error
        outer: Future[Outcome] = Future()
        inner.add_done_callback(lambda done: _copy(done, outer))
        outer.add_done_callback(lambda done: done.cancelled() and inner.cancel())
        return outer

    def close(self, *, cancel: bool = False) -> None:
        """cancel=True ends the processes."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is None:
            return
        if cancel:
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=cancel)

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: this process has threads. The workers end with this process, however it ends.
            self._pool = ProcessPoolExecutor(
                self._slots,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(os.getpid(),),
            )
        return self._pool


def make_executor(name: str, jobs: int | None = None) -> ThreadExecutor | ProcessExecutor:
    """ "threads" or "processes". Raises ParameterError."""
    if name == "threads":
        return ThreadExecutor(jobs)
    if name == "processes":
        return ProcessExecutor(jobs)
    raise ParameterError(f"executor is {name!r}; expected 'threads' or 'processes'")


def _checked(count: int | None) -> int:
    wanted = default_threads() if count is None else count
    if not 1 <= wanted <= 1024:
        raise ParameterError(f"jobs is {wanted}; expected 1 to 1024")
    return wanted


def _copy(inner: Future[Outcome], outer: Future[Outcome]) -> None:
    if inner.cancelled():
        outer.cancel()
        outer.set_running_or_notify_cancel()
        return
    if not outer.set_running_or_notify_cancel():
        return
    error = inner.exception()
    if isinstance(error, BrokenProcessPool):
        outer.set_exception(WorkerLostError("a worker process ended before its task was done"))
    elif error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(inner.result())


def _begin_worker(parent: int) -> None:
    """Ctrl-C is the parent's affair; the parent's death ends this process."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        os._exit(1)
