"""The committer: what is told after what, who fails with whom, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from broker.stores import PATH, record
from sqlalchemy import Connection

from csvfast.broker.master import FileMaster
from csvfast.broker.store import AuditRecord, Job, Store, committer
from csvfast.errors import ConflictError, LimitedError, StaleGenerationError, UnavailableError

ALL_TABLES = ("audit", "audit_heads", "chain", "internal_keys", "meta", "policies", "reference_values", "resources", "tokens")


def reasons(store: Store) -> list[str]:
    return [one.record.reason for one in store.iterate_audit()]


def insert_session(connection: Connection, name: str = "x") -> str:
    connection.execute(
        sqlalchemy.text("INSERT INTO sessions (id, nonce, tee, created, expires) VALUES (:id, 'n', 'csv', 0, 2e9)"), {"id": name}
    )
    return name


class Held:
    """Keeps the committer busy until released, so that what is submitted meanwhile becomes one batch."""

    def __init__(self, store: Store) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.future = store.committer.submit(Job(apply=self._wait))
        assert self.begun.wait(10)

    def _wait(self, _connection: Connection) -> None:
        self.begun.set()
        assert self.go.wait(30)

    def release(self) -> None:
        self.go.set()
        self.future.result(10)


# ---- One job, and many


def test_a_future_completes_after_the_commit(store: Store, store_url: str) -> None:
    engine = sqlalchemy.create_engine(store_url)
    for number in range(1, 20):
        store.committer.submit(Job((record(),))).result(10)
        with engine.connect() as connection:  # somebody else's connection
            assert connection.scalar(sqlalchemy.text("SELECT count(*) FROM audit")) == number
    engine.dispose()


def test_nothing_is_told_before_the_commit(store: Store) -> None:
    held = Held(store)
    futures = [store.committer.submit(Job((record(),))) for _ in range(10)]
    time.sleep(0.05)
    assert not any(future.done() for future in futures)
    assert list(store.iterate_audit()) == []
    held.release()
    for future in futures:
        future.result(10)
    assert len(list(store.iterate_audit())) == 10


def test_order_and_several_records_of_one_job(store: Store) -> None:
    held = Held(store)
    futures = [
        store.committer.submit(Job([record(reason=f"{number}{part}") for part in "abc"[: number % 4]])) for number in range(1500)
    ]
    held.release()
    for future in futures:
        future.result(60)
    assert reasons(store) == [f"{number}{part}" for number in range(1500) for part in "abc"[: number % 4]]
    assert store.verify_audit().intact


def test_event_loop(store: Store) -> None:
    async def main() -> list[int]:
        async def one(number: int) -> int:
            return await store.committer.commit(Job((record(reason=str(number)),), apply=lambda _connection: number))

        return await asyncio.gather(*[one(number) for number in range(200)])

    assert asyncio.run(main()) == list(range(200))
    assert sorted(reasons(store), key=int) == [str(number) for number in range(200)]


def test_event_loops_and_threads_at_once(store: Store) -> None:
    def loop(name: int) -> None:
        async def main() -> None:
            await asyncio.gather(*[store.committer.commit(Job((record(reason=f"{name}.{n}"),))) for n in range(50)])

        asyncio.run(main())

    def plain(name: int) -> None:
        for number in range(20):
            store.committer.run(Job((record(reason=f"{name}.{number}"),)))

    threads = [threading.Thread(target=target, args=(name,)) for name, target in enumerate([loop, loop, plain, plain])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = reasons(store)
    assert len(found) == len(set(found)) == 140
    assert store.verify_audit().intact


def test_a_cancelled_task_disturbs_nobody(store: Store) -> None:
    async def main() -> None:
        held = await asyncio.to_thread(Held, store)
        tasks = [asyncio.create_task(store.committer.commit(Job((record(reason=str(n)),)))) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        held.go.set()
        await tasks[0]
        await tasks[2]
        assert tasks[1].cancelled()

    asyncio.run(main())
    assert {"0", "2"} <= set(reasons(store))


def test_a_loop_that_has_ended_disturbs_nobody(store: Store) -> None:
    held: list[Held] = []

    async def main() -> None:
        held.append(await asyncio.to_thread(Held, store))
        task = asyncio.create_task(store.committer.commit(Job((record(),))))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())
    held[0].release()
    store.committer.run(Job((record(),)))
    assert len(reasons(store)) == 2


# ---- Jobs that fail alone


def test_apply_and_its_value(store: Store) -> None:
    assert store.committer.run(Job((record(),), apply=insert_session)) == "x"
    assert store.sessions.get("x") is not None


def test_records_made_from_what_apply_found(store: Store) -> None:
    def records(value: str) -> list[AuditRecord]:
        return [record(reason=value), record(reason=value * 2)]

    store.committer.run(Job(records, apply=insert_session))
    assert reasons(store) == ["x", "xx"]


def test_a_job_that_raises_fails_alone(store: Store) -> None:
    def bad(connection: Connection) -> None:
        insert_session(connection, "bad")
        raise ConflictError("no")

    def worse(connection: Connection) -> None:
        insert_session(connection, "worse")
        insert_session(connection, "worse")

    def bug(connection: Connection) -> None:
        insert_session(connection, "bug")
        raise ZeroDivisionError

    held = Held(store)
    jobs: list[Job[Any]] = [
        Job((record(reason="1"),), apply=lambda connection: insert_session(connection, "1")),
        Job((record(reason="bad"),), apply=bad, administrative=True),
        Job((record(reason="worse"),), apply=worse, administrative=True),
        Job((record(reason="bug"),), apply=bug),
        Job((record(reason="2"),), apply=lambda connection: insert_session(connection, "2")),
        Job(lambda value: [record(reason=value / 0)], apply=lambda connection: insert_session(connection, "records")),
        Job((record(reason=b"bytes"),)),  # type: ignore[arg-type]
        Job((record(reason="3"),)),
    ]
    futures = [store.committer.submit(job) for job in jobs]
    held.release()
    errors = [type(future.exception(10)) for future in futures]
    none = type(None)
    assert errors == [none, ConflictError, ConflictError, ZeroDivisionError, none, TypeError, TypeError, none]
    assert reasons(store) == ["1", "2", "3"]
    assert [name for name in ("1", "bad", "worse", "bug", "2", "records") if store.sessions.get(name)] == ["1", "2"]
    assert store.look() == 0
    assert store.verify_audit().intact


def test_text_that_no_database_takes(store: Store) -> None:
    def apply(connection: Connection) -> None:
        insert_session(connection, "nul\0" if not store.is_local else "x" * 10 + "\ud800")

    with pytest.raises((ConflictError, UnicodeEncodeError)):
        store.committer.run(Job((record(),), apply=apply))
    strange = "\0 \ud800 \udfff \u2028 \x7f \U0001f511 '\"\\ %s :x ?"
    store.committer.run(Job((record(reason=strange, actor="\ud83d"),)))
    found = next(store.iterate_audit()).record
    assert found.reason == strange.replace("\ud800", "?").replace("\udfff", "?")
    assert found.actor == "?"
    assert store.verify_audit().intact


def test_generations_within_a_batch(store: Store) -> None:
    held = Held(store)
    futures = [
        store.committer.submit(job)
        for job in (
            Job((record(reason="before"),), 0),
            Job((record(reason="change"),), administrative=True),
            Job((record(reason="after"),), 0),
            Job((record(reason="whatever"),)),
            Job((record(reason="new"),), 1),
            Job((record(reason="future"),), 2),
            Job((record(reason="stale change"),), 0, administrative=True),
        )
    ]
    held.release()
    errors = [type(future.exception(10)) for future in futures]
    none, stale = type(None), StaleGenerationError
    assert errors == [none, none, stale, none, none, stale, stale]
    assert reasons(store) == ["before", "change", "whatever", "new"]
    assert store.generation == store.look() == 1


def test_generation_is_known_before_anybody_hears_of_it(store: Store, store_url: str, master_file: Path) -> None:
    with Store.open(store_url, FileMaster(master_file)) as second:
        store.put_reference("a", [1], None, record())
        seen: list[int] = []
        future = second.committer.submit(Job((record(),), 0))
        future.add_done_callback(lambda _future: seen.append(second.generation))
        assert isinstance(future.exception(10), StaleGenerationError)
        assert seen == [1]


# ---- Limits and the end


def test_back_pressure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "QUEUE_LIMIT", 100)
    held = Held(store)
    futures = [store.committer.submit(Job((record(),), expendable=True)) for _ in range(50)]
    with pytest.raises(LimitedError) as caught:
        store.committer.submit(Job((record(),), expendable=True))
    assert caught.value.retry_after > 0
    futures += [store.committer.submit(Job((record(),))) for _ in range(50)]
    with pytest.raises(LimitedError):
        store.committer.run(Job((record(),)))

    async def main() -> None:
        with pytest.raises(LimitedError):
            await store.committer.commit(Job((record(),)))

    asyncio.run(main())
    assert store.committer.waiting == 100
    held.release()
    for future in futures:
        future.result(10)
    assert store.committer.waiting == 0
    assert len(reasons(store)) == 100


def test_close_completes_what_is_queued(store_url: str, master_file: Path) -> None:
    store = Store.open(store_url, FileMaster(master_file), create=True)
    held = Held(store)
    futures = [store.committer.submit(Job((record(),))) for _ in range(1000)]
    closing = threading.Thread(target=store.close)
    closing.start()
    held.release()
    closing.join(30)
    assert not closing.is_alive()
    for future in futures:
        future.result(0)
    with pytest.raises(UnavailableError, match="closed"):
        store.committer.submit(Job((record(),)))
    store.close()
    with Store.open(store_url, FileMaster(master_file)) as opened:
        assert len(reasons(opened)) == 1000


def test_close_from_a_callback_does_not_wait_for_itself(store: Store) -> None:
    future = store.committer.submit(Job((record(),)))
    future.add_done_callback(lambda _future: store.committer.close())
    future.result(10)
    store.close()


def test_clock_goes_backwards(store: Store, monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    def times() -> list[int]:
        engine = sqlalchemy.create_engine(store_url)
        with engine.connect() as connection:
            found = [row[0] for row in connection.execute(sqlalchemy.text("SELECT time FROM chain"))]
        engine.dispose()
        return found

    store.committer.run(Job((record(),)))
    before = times()
    monkeypatch.setattr(committer.time, "time_ns", lambda: 1_000)
    store.committer.run(Job((record(time=-5),)))
    assert times() == before
    monkeypatch.undo()
    store.committer.run(Job((record(),)))
    assert times() > before
    assert store.verify_audit().intact


def test_signed_heads_are_kept(store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def heads() -> list[int]:
        engine = sqlalchemy.create_engine(store_url)
        with engine.connect() as connection:
            found = [row[0] for row in connection.execute(sqlalchemy.text("SELECT sequence FROM audit_heads ORDER BY 1"))]
        engine.dispose()
        return found

    store.committer.run(Job([record()] * 999))
    assert heads() == []
    store.committer.run(Job([record()] * 3))
    assert heads() == [1002]
    store.committer.run(Job([record()] * 2500))
    assert heads() == [1002, 3502]
    # An idle committer signs what was written since, after a while.
    monkeypatch.setattr(committer, "HEAD_SECONDS", 0.1)
    store.committer.run(Job([record()] * 2))
    deadline = time.monotonic() + 10
    while heads()[-1] < 3504 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert heads()[-1] == 3504
    assert store.verify_audit().intact


# ---- The file underneath


@pytest.fixture
def local(sqlite_url: str, master_file: Path) -> Iterator[Store]:
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())
        yield store


def refuses(store: Store, what: str) -> None:
    with pytest.raises(UnavailableError, match=what):
        store.committer.run(Job((record(),)))


def test_removed_file_is_refused(local: Store, tmp_path: Path) -> None:
    path = tmp_path / "store" / "broker.db"
    path.rename(tmp_path / "away")
    refuses(local, "removed")
    for read in (lambda: local.resource(PATH), local.look, local.list_resources, lambda: next(local.iterate_audit())):
        with pytest.raises(UnavailableError, match="removed"):
            read()
    (tmp_path / "away").rename(path)
    local.committer.run(Job((record(),)))
    assert local.verify_audit().intact


def test_replaced_file_is_refused(local: Store, tmp_path: Path) -> None:
    path = tmp_path / "store" / "broker.db"
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    refuses(local, "another file")
    with pytest.raises(UnavailableError, match="another file"):
        local.resource(PATH)
    refuses(local, "another file")


def test_removed_log_is_refused(local: Store, tmp_path: Path) -> None:
    log = tmp_path / "store" / "broker.db-wal"
    log.unlink()
    refuses(local, "write-ahead log")


def test_a_file_removed_during_the_commit_counts_as_failed(local: Store, tmp_path: Path) -> None:
    def apply(_connection: Connection) -> None:
        (tmp_path / "store" / "broker.db").rename(tmp_path / "away")

    with pytest.raises(UnavailableError, match="removed"):
        local.committer.run(Job((record(),), apply=apply))


def test_a_database_brought_back_from_a_backup_is_refused(local: Store, tmp_path: Path) -> None:
    path = tmp_path / "store" / "broker.db"
    backup = sqlite3.connect(tmp_path / "backup")
    source = sqlite3.connect(path)
    source.backup(backup)
    local.committer.run(Job((record(),)))
    # As an operator would restore it into a running database.
    backup.backup(source)
    backup.close()
    source.close()
    refuses(local, "ends at record 1; 2 had been written")
    refuses(local, "ends at record 1; 2 had been written")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE chain SET hash = x'00' || substr(hash, 2)",
        "UPDATE chain SET sequence = sequence + 1",
        "UPDATE chain SET sequence = 0",
        "UPDATE chain SET sequence = 'many'",
        "UPDATE chain SET generation = 0",
        "DELETE FROM chain",
        "DROP TABLE chain",
        "DROP TABLE audit",
    ],
)
def test_a_chain_that_somebody_else_has_moved_is_refused(local: Store, tmp_path: Path, change: str) -> None:
    connection = sqlite3.connect(tmp_path / "store" / "broker.db", isolation_level=None)
    connection.execute(change)
    connection.close()
    refuses(local, "broker.db")
    refuses(local, "broker.db")


def test_readers_wait_for_no_writer(local: Store) -> None:
    held = Held(local)
    begun = time.monotonic()
    assert local.resource(PATH) is not None
    assert local.snapshot().generation == 1
    assert len(list(local.iterate_audit())) == 1
    assert time.monotonic() - begun < 2
    held.release()


def test_a_writer_elsewhere_is_waited_for_but_not_for_ever(
    sqlite_url: str, master_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfast.broker.store.database._BUSY_SECONDS", 0.5)
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        other = sqlite3.connect(tmp_path / "store" / "broker.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        refuses(store, "locked")
        future = store.committer.submit(Job((record(),)))
        time.sleep(0.1)
        other.execute("ROLLBACK")
        other.close()
        future.result(10)


def test_durable_settings(local: Store) -> None:
    def settings(connection: Connection) -> dict[str, Any]:
        names = ("journal_mode", "synchronous", "secure_delete")
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}

    assert local.committer.run(Job(apply=settings)) == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
    database = local._database
    assert database.read(lambda connection: connection.exec_driver_sql("PRAGMA query_only").scalar()) == 1
    with pytest.raises(UnavailableError, match="readonly"):
        database.read(insert_session)


def test_errors_tell_nothing_secret(local: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    connection = sqlite3.connect(tmp_path / "store" / "broker.db", isolation_level=None)
    connection.execute("DROP TABLE resources")
    connection.close()
    with caplog.at_level(logging.DEBUG), pytest.raises(UnavailableError) as caught:
        local.put_resource(PATH, b"very secret content", replace(record(), reason="of interest to nobody"))
    assert caught.value.__cause__ is None
    logged = " ".join(str(vars(entry)) for entry in caplog.records)
    for text in (str(caught.value), logged):
        assert "no such table" in text
        assert "secret" not in text
        assert "INSERT" not in text
