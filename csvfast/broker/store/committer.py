"""The one thread that writes: takes what is queued, commits it together, tells everybody, and begins again.

A batch is one transaction: lock the chain's row (which serialises all brokers on one database), let each job do its part, append
the records, sign the new head, commit durably. Only then do futures complete. Batches grow with the load, because jobs queue up
while a commit waits for the disk. A transaction costs as much processor time as some ten records, and disks can be so fast that
hardly anybody queues up: when jobs come from several sides at once, transactions are therefore PACE seconds apart or more.
Whoever writes alone, one job after the other, never waits for that.

When a batch fails (disk full, server gone), every job in it fails with UnavailableError, nothing of it is kept, and the next
batch starts on a new connection. A connection lost during COMMIT leaves open whether it happened; that counts as failed. So there
can be a record of a release that did not take place, never a release without its record.

Thread-safety: `submit`, `run`, `commit`, `close` from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from sqlalchemy import Connection, insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from csvfast.broker.logs import event
from csvfast.broker.store import schema
from csvfast.broker.store.audit import HEAD_RECORDS, HEAD_SECONDS, AuditRecord, canonical, sign_head, verify_head
from csvfast.broker.store.database import Database, describe
from csvfast.crypto import SM2PrivateKey, sm3
from csvfast.errors import ConflictError, InternalError, LimitedError, StaleGenerationError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BATCH_LIMIT", "QUEUE_LIMIT", "Committer", "Job"]

T = TypeVar("T")

QUEUE_LIMIT: Final = 10_000
"""Jobs that may wait; expendable ones get half of it."""
BATCH_LIMIT: Final = 512
"""Jobs in one transaction."""

PACE: Final = 0.008
"""Seconds from the start of one transaction to that of the next while several callers write."""

_ROWS: Final = 128  # records in one INSERT: SQLite lets other threads run, and waits for them, once a statement
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """What is to be written in one transaction, or not at all.

    records          of the audit log; or a function that makes them from what `apply` returned
    generation       on which the decision rests: StaleGenerationError when it is no longer the store's
    apply            changes in the database, in a savepoint; its exception fails this job alone
    administrative   policies, references, resources or tokens change: the generation grows by one
    expendable       refused first when the queue is long: what strangers can cause without limit
    """

    records: Sequence[AuditRecord] | Callable[[T], Sequence[AuditRecord]] = ()
    generation: int | None = None
    apply: Callable[[Connection], T] | None = None
    administrative: bool = False
    expendable: bool = False


class _DeadConnectionError(UnavailableError):
    """The connection was lost before anything was done on it."""


class _Waiter:
    """A job in the queue, and where its outcome goes."""

    __slots__ = ("error", "future", "job", "loop", "texts", "value")

    def __init__(self, job: Job[Any], future: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.job = job
        self.future = future
        self.loop = loop
        self.texts: list[bytes] = []
        self.value: Any = None
        self.error: BaseException | None = None


class Committer:
    """Writes for everybody.

    In: database   open
        identity   of the store, 16 bytes
        key        signs heads
        observe    called with the generation whenever one is seen, before anybody hears of it
    """

    def __init__(
        self, database: Database, identity: bytes, key: SM2PrivateKey, observe: Callable[[int], None]
    ) -> None:
        self._database = database
        # SQLite has locked the whole database by BEGIN IMMEDIATE.
        self._lock_statement = _LOCK if database.is_sqlite else f"{_LOCK} FOR UPDATE"
        self._identity = identity
        self._key = key
        self._public = key.public_key
        self._public.prepare()
        self._observe = observe
        self._condition = threading.Condition()
        self._queue: deque[_Waiter] = deque()
        self._idle = False
        self._closing = False
        self._began = 0.0  # when the last batch was taken
        self._crowded = False  # several callers wrote then
        self._connection: Connection | None = None
        self._log_identity: tuple[int, int] | None = None
        # The head as this thread has seen it last; a database that knows less has lost records.
        self._generation = -1
        self._sequence = -1
        self._digest = b""
        self._unheaded = False
        self._thread = threading.Thread(target=self._work, name="csvfast-committer", daemon=True)

    def start(self) -> None:
        """Begins to write. Once."""
        self._thread.start()

    # ---- For everybody

    def submit(self, job: Job[T]) -> Future[T]:
        """Queues a job. The future completes when it is durable, or fails. LimitedError: the queue is full. UnavailableError."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self._put(_Waiter(job, future, None))
        return future

    def run(self, job: Job[T]) -> T:
        """Queues a job and waits for it. Raises what it fails with. Not for event loops, nor from within a job."""
        if threading.current_thread() is self._thread:
            raise InternalError("a job waits for another job of the same thread")
        return self.submit(job).result()

    async def commit(self, job: Job[T]) -> T:
        """Queues a job and waits for it in an event loop. HOT."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Waiter(job, future, loop))
        return await future

    @property
    def waiting(self) -> int:
        """Jobs in the queue, for metrics."""
        return len(self._queue)

    def close(self) -> None:
        """Commits what is queued, then ends the thread. Jobs submitted later fail with UnavailableError. Idempotent."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, waiter: _Waiter) -> None:
        with self._condition:
            if self._closing:
                raise UnavailableError("the store is closed")
            length = len(self._queue)
            if length >= QUEUE_LIMIT or (waiter.job.expendable and length >= QUEUE_LIMIT // 2):
                raise LimitedError(f"{length} records wait to be written", 1.0)
            self._queue.append(waiter)
            if self._idle:
                self._idle = False
                self._condition.notify()

    # ---- The thread

    def _work(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._do(batch)
                # Who wrote alone has not heard of it yet when another has come meanwhile.
                self._crowded = self._crowded or bool(self._queue)
        finally:
            self._drop()
            with self._condition:
                self._closing = True
                left = list(self._queue)
                self._queue.clear()
            for waiter in left:
                waiter.error = UnavailableError("the store is closed")
            _tell(left)

    def _take(self) -> list[_Waiter] | None:
        """The next batch; an empty one when a head is due; None at the end."""
        with self._condition:
            while not self._queue:
                if self._closing:
                    return None
                self._idle = True
                if not self._condition.wait(HEAD_SECONDS if self._unheaded else None):
                    self._idle = False
                    if not self._queue:
                        return []
            self._idle = False
        self._keep_pace()
        with self._condition:
            queue = self._queue
            if len(queue) <= BATCH_LIMIT:
                batch = list(queue)
                queue.clear()
            else:
                batch = [queue.popleft() for _ in range(BATCH_LIMIT)]
            self._crowded = len(batch) > 1
            return batch

    def _keep_pace(self) -> None:
        if self._crowded and not self._closing:
            wait = self._began + PACE - time.monotonic()
            if wait > 0:
                time.sleep(wait)
        self._began = time.monotonic()

    def _do(self, batch: list[_Waiter]) -> None:
        for waiter in batch:
            if not callable(waiter.job.records):
                try:
                    waiter.texts = [canonical(record) for record in waiter.job.records]
                except Exception as error:  # whatever a record holds, the thread lives on
                    waiter.error = error
        try:
            self._write(batch)
        except BaseException as error:
            # Nothing was kept, and nobody may believe otherwise, whatever has happened.
            self._drop()
            text = str(error) if isinstance(error, UnavailableError) else f"{self._database.name}: {describe(error)}"
            event(_log, logging.ERROR, "nothing written", jobs=len(batch), error=text)
            for waiter in batch:
                # What a job did before may have come from what is now rolled back.
                waiter.error = UnavailableError(text)
        _tell(batch)

    def _write(self, batch: list[_Waiter]) -> None:
        database = self._database
        database.check_file()
        fresh = self._connection is None
        try:
            self._transact(self._connected(), batch)
        except _DeadConnectionError:
            # The server was restarted since the last batch, and nothing of this one has been sent.
            self._drop()
            if fresh:
                raise
            self._transact(self._connected(), batch)
        # A file removed during the commit has taken the records with it.
        database.check_file()

    def _transact(self, connection: Connection, batch: list[_Waiter]) -> None:
        with connection.begin():
            head = self._lock(connection)
            generation, sequence, digest = head.generation, head.sequence, head.hash
            self._observe(generation)
            rows: list[Any] = []
            changed = False
            for waiter in batch:
                job = waiter.job
                if waiter.error is not None:
                    continue
                if job.generation is not None and job.generation != generation:
                    waiter.error = StaleGenerationError(
                        f"decided under generation {job.generation}; the store is at {generation} now"
                    )
                    continue
                if job.apply is not None:
                    if not _applied(connection, waiter):
                        continue
                    changed = True
                if job.administrative:
                    generation += 1
                    changed = True
                for text in waiter.texts:
                    sequence += 1
                    digest = sm3(digest + text).digest()
                    rows += (sequence, text.decode(), digest)
            due = sequence > head.headed_sequence
            if rows or changed or (due and not batch):
                due = self._finish(connection, head, generation, sequence, digest, rows)
        self._generation, self._sequence, self._digest, self._unheaded = generation, sequence, digest, due
        self._observe(generation)

    def _finish(
        self, connection: Connection, head: Any, generation: int, sequence: int, digest: bytes, rows: list[Any]
    ) -> bool:
        """Appends the records and moves the head. Out: whether a signed head of the last record is still to be kept."""
        now = max(time.time_ns() // 1000, head.time)  # clocks of brokers differ, and go backwards
        signature = head.signature
        signed = head.time
        if rows:
            for statement, part in self._inserts(rows):
                connection.exec_driver_sql(statement, part)
            signature, signed = sign_head(self._key, self._identity, sequence, now, digest), now
        headed_sequence, headed_time = head.headed_sequence, head.headed_time
        due = sequence - head.headed_sequence
        old = not rows or abs(now - head.headed_time) >= HEAD_SECONDS * 1_000_000
        if due >= HEAD_RECORDS or (due and old):
            headed_sequence, headed_time = sequence, signed
            mark = {"sequence": sequence, "hash": digest, "time": signed, "signature": signature}
            connection.execute(insert(schema.audit_heads), mark)
            due = 0
        # Text, not expressions: this is done for every transaction, and their compilation would be half of its cost.
        values = (generation, sequence, digest, signed, signature, headed_sequence, headed_time)
        connection.exec_driver_sql(_ADVANCE.replace("?", self._database.placeholder), values)
        return bool(due > 0)

    def _inserts(self, rows: list[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        mark = self._database.placeholder
        for start in range(0, len(rows), 3 * _ROWS):
            part = tuple(rows[start : start + 3 * _ROWS])
            places = ",".join([f"({mark},{mark},{mark})"] * (len(part) // 3))
            yield f"INSERT INTO audit (sequence, record, hash) VALUES {places}", part  # noqa: S608  # of placeholders

    def _lock(self, connection: Connection) -> Any:
        try:
            head = connection.exec_driver_sql(self._lock_statement).one_or_none()
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _DeadConnectionError(f"{self._database.name}: {describe(error)}") from None
            raise
        if head is None:
            raise UnavailableError(f"{self._database.name}: the chain's row is missing")
        if head.generation < self._generation:
            raise UnavailableError(
                f"{self._database.name}: is at generation {head.generation}; {self._generation} had been written"
            )
        if head.sequence != self._sequence:
            if head.sequence < self._sequence:
                raise UnavailableError(
                    f"{self._database.name}: the audit log ends at record {head.sequence}; {self._sequence} had been written"
                )
            if not verify_head(self._public, self._identity, head.sequence, head.time, head.hash, head.signature):
                raise UnavailableError(f"{self._database.name}: the audit log's head is not signed by the store's key")
        elif head.hash != self._digest:
            raise UnavailableError(f"{self._database.name}: the audit log's head is not the one that was written")
        return head

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._database.connect_writer()
            try:
                # The first transaction opens the log.
                with connection.begin():
                    connection.exec_driver_sql(self._lock_statement)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._log_identity = self._database.log_identity()
        elif self._log_identity != self._database.log_identity():
            raise UnavailableError(f"{self._database.name}: the write-ahead log has been removed or replaced")
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception as error:  # it is given up anyway
                _log.debug("closing a broken connection: %s", describe(error))


_COLUMNS: Final = ("generation", "sequence", "hash", "time", "signature", "headed_sequence", "headed_time")
_LOCK: Final = f"SELECT {', '.join(_COLUMNS)} FROM chain WHERE id = 1"  # noqa: S608  # of the names above
_ADVANCE: Final = f"UPDATE chain SET {', '.join(f'{name} = ?' for name in _COLUMNS)} WHERE id = 1"  # noqa: S608  # likewise


def _applied(connection: Connection, waiter: _Waiter) -> bool:
    """Runs a job's part. False, with the error in its place, when they fail without harm to others."""
    job = waiter.job
    connection.exec_driver_sql("SAVEPOINT job")
    try:
        waiter.value = job.apply(connection)  # type: ignore[misc]
        if callable(job.records):
            waiter.texts = [canonical(record) for record in job.records(waiter.value)]
    except Exception as error:
        if isinstance(error, DBAPIError) and not isinstance(error, (IntegrityError, DataError)):
            raise  # the disk or the connection: nothing more can be written
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT job")
        connection.exec_driver_sql("RELEASE SAVEPOINT job")
        waiter.value = None
        waiter.error = ConflictError(f"the database refuses it: {describe(error)}") if isinstance(error, DBAPIError) else error
        return False
    connection.exec_driver_sql("RELEASE SAVEPOINT job")
    return True


def _tell(batch: list[_Waiter]) -> None:
    """Completes the futures; those of one event loop by one call."""
    loops: dict[asyncio.AbstractEventLoop, list[_Waiter]] = {}
    for waiter in batch:
        if waiter.loop is not None:
            loops.setdefault(waiter.loop, []).append(waiter)
        elif waiter.error is not None:
            waiter.future.set_exception(waiter.error)
        else:
            waiter.future.set_result(waiter.value)
    for loop, waiters in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, waiters)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _log.debug("%d jobs done for an event loop that is closed", len(waiters))


def _resolve(waiters: list[_Waiter]) -> None:
    for waiter in waiters:
        future = waiter.future
        if future.done():  # cancelled meanwhile
            continue
        if waiter.error is not None:
            future.set_exception(waiter.error)
        else:
            future.set_result(waiter.value)
