"""Tasks on a Dask cluster that is there already: on this machine, under Slurm, in Kubernetes (extra "dask").

    with DaskExecutor("tcp://scheduler:8786") as executor:
        for row in csvfast.measure.batch(["/shared/images"], executor, mode="tree"):
            ...

Workers need the same version of csvfast, and see the same paths (a shared file system) or URLs (with credentials of their own).
A worker that is lost has its tasks done by others, by Dask first and by the job's retries after that; a task that is done twice
gives one outcome. Cancelling reaches tasks under way: a worker asks at each step whether anybody still wants its task, so a job
that is killed stops its workers, too.

Source: distributed.dask.org (client, worker state machine). One event loop in a thread of its own carries everything.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, TypeVar

import csvfast
from csvfast._extras import need
from csvfast.measure.fleet.executors import ExecutorError, WorkerLostError, _Closing
from csvfast.measure.fleet.measuring import block_hash_of
from csvfast.measure.fleet.rows import Item, Row
from csvfast.measure.fleet.tasks import (
    Outcome,
    RangeOutcome,
    RangeTask,
    Step,
    StoppedError,
    Task,
    WholeOutcome,
    WholeTask,
    perform,
)
from csvfast.measure.tree import DIGEST_BYTES

__all__ = ["DaskExecutor", "perform_remotely"]

TASKS_PER_THREAD: Final = 2
"""One that is done, and one that waits beside it, so that a worker need not ask the scheduler before it goes on."""
POLL_SECONDS: Final = 1.0

_Result = TypeVar("_Result")


class DaskExecutor(_Closing):
    """An executor whose places are the threads of a cluster's workers, which may come and go.

    Args:
        cluster: address of the scheduler ("tcp://host:8786", "tls://..." with certificates from Dask's configuration), path of a
            scheduler file ("....json"), or any of Dask's cluster objects.
        timeout: seconds in which the scheduler must answer. patience: seconds for which the cluster may have no worker at all,
            at the beginning or later.
    Raises: MissingExtraError; ExecutorError: nothing answers there.
    Thread-safety: safe from any thread.
    """

    name = "dask"
    local = False
    range_bytes = 256 << 20  # a task costs scheduler and client some milliseconds: four times as much work for each

    def __init__(self, cluster: Any, *, timeout: float = 10.0, patience: float = 60.0) -> None:
        need("dask", "distributed")
        self.address: Final = str(getattr(cluster, "scheduler_address", cluster))
        self._timeout = timeout
        self._patience = patience
        self._broken: str | None = None
        self._threads = 0
        self._seen = time.monotonic()
        self._numbers = itertools.count()
        self._prefix = f"csvfast-measure-{uuid.uuid4().hex}"
        self._perform = functools.partial(perform_remotely, csvfast.__version__, os.getcwd())  # noqa: PTH109
        self._running: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="csvfast-dask", daemon=True)
        self._thread.start()
        try:
            self._wait(self._connect())
        except BaseException:
            self._end_loop()
            raise

    @property
    def slots(self) -> int:
        """Tasks that are worth submitting now: a few more than there are threads."""
        return max(1, self._threads * TASKS_PER_THREAD)

    @property
    def threads(self) -> int:
        """Threads of all workers, as of a second ago."""
        return self._threads

    def submit(self, task: Task, step: Step | None = None) -> Future[Outcome]:  # noqa: ARG002
        """Begins a task on some worker; `step` is ignored. Raises ExecutorError."""
        if self._broken is not None:
            raise ExecutorError(f"cluster {self.address}: {self._broken}")
        return asyncio.run_coroutine_threadsafe(self._do(task), self._loop)

    def close(self, *, cancel: bool = False) -> None:
        """cancel=True ends tasks under way at their next step. The cluster goes on."""
        if self._loop.is_closed():
            return
        self._broken = "the executor is closed"
        self._wait(self._disconnect(cancel))
        self._end_loop()

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _connect(self) -> None:
        from distributed import Client

        place = {"scheduler_file": self.address} if self.address.endswith(".json") else {"address": self.address}
        client: Any = None
        try:
            if "scheduler_file" in place and not os.path.exists(self.address):  # noqa: PTH110
                raise FileNotFoundError("no such scheduler file")
            client = Client(**place, asynchronous=True, set_as_default=False, timeout=self._timeout)  # type: ignore[no-untyped-call]
            self._client = await asyncio.wait_for(client, self._timeout + 1)
            await self._count()
        except (OSError, TimeoutError, ValueError) as error:
            if client is not None:
                await _close(client)
            why = f"nothing answers within {self._timeout:g} s" if isinstance(error, TimeoutError) else _one_line(error)
            raise ExecutorError(f"cluster {self.address}: {why}; expected the address of a Dask scheduler") from error
        self._watcher = self._loop.create_task(self._watch())

    async def _count(self) -> None:
        found = await asyncio.wait_for(self._client.nthreads(), self._timeout)
        self._threads = sum(found.values())
        if self._threads:
            self._seen = time.monotonic()

    async def _watch(self) -> None:
        """Keeps the number of threads, and gives up when nobody is there for too long."""
        while self._broken is None:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if self._client.status == "running":
                    await self._count()
            except (OSError, TimeoutError):
                self._threads = 0
            idle = time.monotonic() - self._seen
            if self._client.status == "closed":
                self._give_up("the scheduler is gone")
            elif idle > self._patience:
                self._give_up(f"no worker for {idle:.0f} s")

    def _give_up(self, why: str) -> None:
        self._broken = self._broken or why
        for running in self._running:
            running.cancel()

    async def _disconnect(self, cancel: bool) -> None:
        running = list(self._running)
        if cancel:
            for one in running:
                one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        if cancel and running and self._client.status == "running":
            await self._idle()
        await _close(self._client)

    async def _idle(self) -> None:
        """Waits until no worker does any of the cancelled tasks, for a few steps' time."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            try:
                under_way = await asyncio.wait_for(self._client.run(_under_way, self._prefix), self._timeout)
            except Exception:  # workers that are gone do nothing
                return
            if not any(under_way.values()):
                return
            await asyncio.sleep(0.02)

    async def _do(self, task: Task) -> Outcome:
        me = asyncio.current_task()
        assert me is not None
        self._running.add(me)
        try:
            return await self._done(task)
        except (asyncio.CancelledError, CancelledError):
            if self._broken is None and me.cancelling():
                raise
            raise WorkerLostError(self._broken or "the cluster forgot the task") from None
        finally:
            self._running.discard(me)

    async def _done(self, task: Task) -> Outcome:
        from distributed import KilledWorker

        while self._client.status == "connecting":
            await asyncio.sleep(0.05)
        if self._client.status != "running":
            self._broken = self._broken or "the scheduler is gone"
            raise WorkerLostError(self._broken)
        key = f"{self._prefix}-{next(self._numbers)}"
        future = self._client.submit(self._perform, task, key=key, pure=False)
        try:
            outcome: Outcome = await future
        except KilledWorker as error:
            raise WorkerLostError("workers died whenever they did it") from error
        except ExecutorError as error:
            self._give_up(str(error))
            raise WorkerLostError(str(error)) from error
        except ImportError as error:
            self._give_up(f"a worker cannot import {error.name}; expected csvfast {csvfast.__version__} on every worker")
            raise WorkerLostError(str(error)) from error
        finally:
            if not future.done():
                await future.cancel()
            future.release()
        return outcome


def perform_remotely(version: str, folder: str, task: Task) -> Outcome:
    """`perform` in a worker of a cluster, for a job whose paths are relative to `folder`. What it returns speaks of the job's own
    paths, so that rows are those of a local run; a file of another size or time than the job found is no such file: "changed".

    Raises: ExecutorError: this worker has another version.
    """
    if version != csvfast.__version__:
        raise ExecutorError(f"a worker has csvfast {csvfast.__version__}; expected {version}, as here")
    items = task.items if isinstance(task, WholeTask) else (task.item,)
    placed = tuple(_placed(item, folder) for item in items)
    if isinstance(task, WholeTask):
        outcome = perform(replace(task, items=placed), _wanted())
        assert isinstance(outcome, WholeOutcome)
        rows = tuple(_brought_home(row, *pair) for row, *pair in zip(outcome.rows, items, placed, strict=True))
        return WholeOutcome(outcome.number, rows)
    outcome = perform(replace(task, item=placed[0]), _wanted())
    assert isinstance(outcome, RangeOutcome)
    if outcome.row is not None:
        return replace(outcome, row=_brought_home(outcome.row, items[0], placed[0]))
    return _hashed_once_more(task, outcome)


def _placed(item: Item, folder: str) -> Item:
    return item if item.provider else replace(item, location=os.path.join(folder, item.location))  # noqa: PTH118


def _brought_home(row: Row, item: Item, placed: Item) -> Row:
    message = row.message and row.message.replace(placed.location, item.location)
    row = replace(row, location=item.row_location, message=message)
    found, here = item.identity, row.identity
    if row.digest is None or found is None or item.mode == "launch":
        return row
    if (found.mtime_ns, found.size, found.etag) == (here.mtime_ns, here.size, here.etag):
        return row
    problem = f"{item.name}: changed since it was found, or is another file on {row.worker}: "
    problem += f"was {found.to_json()}, is {here.to_json()}"
    return Row.failed(item, "changed", problem, started=row.started, worker=row.worker)


def _hashed_once_more(task: RangeTask, outcome: RangeOutcome) -> RangeOutcome:
    """Whole hash blocks of leaves become their digests here, so that 128 times less goes through the network."""
    block_hash, block_bytes = block_hash_of(task.item)
    before = task.start // block_bytes * DIGEST_BYTES
    if not outcome.leaves or before % block_bytes or len(outcome.leaves) % block_bytes:
        return outcome
    return replace(outcome, leaves=block_hash.digests(outcome.leaves, block_bytes), level=1)


def _wanted() -> Step | None:
    """A step that ends a task which nobody wants any more."""
    from distributed import get_worker

    try:
        worker = get_worker()
        key = worker.get_current_task()
        tasks = worker.state.tasks
    except (ValueError, KeyError, AttributeError):  # not in a worker, or in one that tells nothing of its tasks
        return None

    def step(_count: int) -> None:
        task = tasks.get(key)
        if task is None or task.state == "cancelled":
            raise StoppedError

    return step


def _under_way(prefix: str, dask_worker: Any = None) -> bool:
    return any(str(key).startswith(prefix) for key in list(dask_worker.active_keys))


async def _close(client: Any) -> None:
    with suppress(Exception):  # of connections that are gone already
        await client.close()
    client.status = "closed"  # one that lost its scheduler never gets there, and would try again when it is collected


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__).rstrip(".")[:200]
