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
    range_bytes          may be there: bytes of a large image for one task, a multiple of 64 MiB; else tasks.RANGE_BYTES
    close(cancel)        returns when nothing runs any more. cancel=True: tasks under way are ended as early as possible, and
                         their futures are cancelled or end with an exception
    ExecutorError        raised by submit() or the constructor, or what a future ends with: the executor as a whole is not
                         there (any more); it ends the job, whose finished rows are kept

Callbacks of futures may run in any thread; the scheduler's do nothing but put the future into a queue.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
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
    """Other processes of this machine. A process that dies takes its task with it: it ends with WorkerLostError, and a new
    process takes the place.

    Each process has a connection of its own: whatever moment it is killed at, its end is noticed, and nobody else's.

    Args: processes: None = one for each processor this process may use.
    """

    name = "processes"
    local = False

    def __init__(self, processes: int | None = None) -> None:
        self._slots = _checked(processes)
        self._lock = threading.Lock()
        self._closed = False
        self._cancelled = False
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Outcome]] | None] = queue.SimpleQueue()
        self._processes: set[Any] = set()
        self._threads: list[threading.Thread] = []

    @property
    def slots(self) -> int:
        """Processes."""
        return self._slots

    def submit(self, task: Task, step: Step | None = None) -> Future[Outcome]:  # noqa: ARG002
        """Begins a task in a free process; `step` is ignored."""
        future: Future[Outcome] = Future()
        with self._lock:
            if self._closed:
                raise ExecutorError("processes: the executor is closed")
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._serve, name="csvfast-fleet-process", daemon=True) for _ in range(self._slots)
                ]
                for thread in self._threads:
                    thread.start()
            self._tasks.put((task, future))
        return future

    def close(self, *, cancel: bool = False) -> None:
        """cancel=True kills the processes: they change nothing."""
        with self._lock:
            self._closed = True
            if cancel:
                self._cancelled = True
                for process in self._processes:
                    process.kill()
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """Feeds one process after the other; what starts it must live as long as it does (PR_SET_PDEATHSIG)."""
        running: tuple[Any, Connection] | None = None
        while (job := self._tasks.get()) is not None:
            task, future = job
            if self._cancelled:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if running is None:
                    running = self._start()
                running[1].send(task)
                outcome = running[1].recv()
            except (EOFError, ConnectionError):
                self._end(running)
                running = None
                future.set_exception(WorkerLostError("a worker process ended before its task was done"))
            except OSError as error:
                future.set_exception(ExecutorError(f"processes: cannot be started: {error.strerror or error}"))
            except Exception as error:  # what cannot be pickled
                future.set_exception(error)
            else:
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._end(running)

    def _start(self) -> tuple[Any, Connection]:
        # Not forked: this process has threads.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        try:
            process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        with self._lock:
            self._processes.add(process)
            if self._cancelled:
                process.kill()
        return process, ours

    def _end(self, running: tuple[Any, Connection] | None) -> None:
        if running is not None:
            process, connection = running
            connection.close()  # it reads the end of its tasks
            process.join()
            with self._lock:
                self._processes.discard(process)


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


def _work(connection: Connection, parent: int) -> None:
    """What a worker process does."""
    _begin_worker(parent)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        outcome: Outcome | Exception
        try:
            outcome = perform(task)
        except Exception as error:
            outcome = error
        try:
            connection.send(outcome)
        except ConnectionError:
            return


def _begin_worker(parent: int) -> None:
    """Ctrl-C is the parent's affair; the parent's death ends this process."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        os._exit(1)
