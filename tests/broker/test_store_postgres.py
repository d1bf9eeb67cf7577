"""PostgreSQL stopped, killed, started again under load: errors while it is down, nothing acknowledged is lost, we stay up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from broker.services import PostgresCluster
from broker.stores import PATH, record

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store
from csvfast.errors import StateError, UnavailableError


@pytest.fixture
def remote(postgres_url: str, master_file: Path) -> Iterator[Store]:
    with Store.open(postgres_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())
        yield store


class Load:
    """Commits from an event loop with 16 tasks until stopped."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.acknowledged: list[str] = []
        self.errors: list[str] = []
        self._going = True
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()

    async def _main(self) -> None:
        await asyncio.gather(*[self._task(number) for number in range(16)])

    async def _task(self, name: int) -> None:
        number = 0
        while self._going:
            number += 1
            reason = f"{name}.{number}"
            try:
                await self.store.committer.commit(Job((record(reason=reason),), self.store.generation))
                self.acknowledged.append(reason)
            except UnavailableError as error:
                self.errors.append(str(error))
                await asyncio.sleep(0.01)

    def wait_for_more(self) -> None:
        count, deadline = len(self.acknowledged), time.monotonic() + 30
        while len(self.acknowledged) < count + 50:
            assert time.monotonic() < deadline, self.errors[-3:]
            time.sleep(0.01)

    def stop(self) -> None:
        self._going = False
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_restart_under_load(remote: Store, postgres: PostgresCluster, mode: str) -> None:
    load = Load(remote)
    try:
        for _ in range(2):
            load.wait_for_more()
            if mode == "kill":
                postgres.kill()
            else:
                postgres.stop(mode)
            time.sleep(0.3)
            with pytest.raises(UnavailableError):
                remote.resource(PATH._replace(tag="two"))
            with pytest.raises(UnavailableError):
                remote.look()
            postgres.start()
            load.wait_for_more()
    finally:
        postgres.start()
        load.stop()
    assert load.errors
    found = remote.verify_audit()
    assert found.intact
    reasons = [one.record.reason for one in remote.iterate_audit()]
    assert len(reasons) == len(set(reasons))
    assert set(load.acknowledged) <= set(reasons)
    assert remote.resource(PATH) is not None
    for text in load.errors:
        assert postgres.password not in text


def test_an_idle_broker_does_not_notice_a_restart(remote: Store, postgres: PostgresCluster) -> None:
    remote.look()
    postgres.restart("fast")
    remote.look()
    assert remote.resource(PATH) is not None
    remote.committer.run(Job((record(),)))
    postgres.restart("kill")
    remote.committer.run(Job((record(),)))
    assert remote.verify_audit().intact


def test_a_connection_lost_during_a_batch_fails_it(remote: Store, postgres: PostgresCluster) -> None:
    def cut(connection: sqlalchemy.Connection) -> None:
        backend = connection.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
        postgres.execute(f"SELECT pg_terminate_backend({backend})")
        time.sleep(0.1)

    with pytest.raises(UnavailableError):
        remote.committer.run(Job((record(reason="lost"),), apply=cut))
    remote.committer.run(Job((record(reason="kept"),)))
    assert [one.record.reason for one in remote.iterate_audit()] == ["", "kept"]


def test_a_lock_that_somebody_holds_is_not_waited_for_for_ever(
    postgres_url: str, master_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfast.broker.store.database._LOCK_MILLISECONDS", 300)
    with Store.open(postgres_url, FileMaster(master_file), create=True) as store:
        engine = sqlalchemy.create_engine(postgres_url)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT * FROM chain FOR UPDATE"))
            begun = time.monotonic()
            with pytest.raises(UnavailableError, match="lock"):
                store.committer.run(Job((record(),)))
            assert time.monotonic() - begun < 5
            assert store.look() == 0  # readers do not wait
        engine.dispose()
        store.committer.run(Job((record(),)))


def test_settings(remote: Store) -> None:
    def setting(name: str) -> str:
        return str(remote.committer.run(Job(apply=lambda connection: connection.exec_driver_sql(f"SHOW {name}").scalar())))

    assert setting("synchronous_commit") == "on"
    assert setting("lock_timeout") == "10s"
    assert setting("transaction_isolation") == "read committed"
    read = remote._database.read
    assert read(lambda connection: connection.exec_driver_sql("SHOW transaction_read_only").scalar()) == "on"
    assert read(lambda connection: connection.exec_driver_sql("SHOW transaction_isolation").scalar()) == "repeatable read"


def test_asynchronous_commit_is_switched_off(postgres: PostgresCluster, postgres_url: str, master_file: Path) -> None:
    name = postgres_url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with Store.open(postgres_url, FileMaster(master_file), create=True) as store:
        show = Job(apply=lambda connection: connection.exec_driver_sql("SHOW synchronous_commit").scalar())
        assert store.committer.run(show) == "on"


def test_a_server_that_does_not_sync_is_refused(master_file: Path) -> None:
    cluster = PostgresCluster({"fsync": "off"})
    try:
        with pytest.raises(StateError, match="fsync"):
            Store.open(cluster.url(cluster.create_database()), FileMaster(master_file), create=True)
    finally:
        cluster.close()


def test_a_server_that_is_not_there(postgres: PostgresCluster, postgres_url: str, master_file: Path) -> None:
    postgres.stop()
    with pytest.raises(UnavailableError) as caught:
        Store.open(postgres_url, FileMaster(master_file), create=True)
    postgres.start()
    assert postgres.password not in str(caught.value)
    assert caught.value.__cause__ is None
    wrong = postgres_url.replace(postgres.password, "notthis")
    with pytest.raises(UnavailableError) as caught:
        Store.open(wrong, FileMaster(master_file), create=True)
    assert "notthis" not in str(caught.value)
    with pytest.raises(StateError, match="no store"):
        Store.open(postgres_url, FileMaster(master_file))
