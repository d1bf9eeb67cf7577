"""Opening a store: what is refused, and in which words."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest
import sqlalchemy
from broker.stores import PATH, record

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store
from csvfast.errors import ArgumentError, AuthenticationError, InternalError, StateError


def test_opened_again(store_url: str, master_file: Path) -> None:
    with Store.open(store_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())
        identity, key = store.identity, store.audit_public_key.point
    for create in (False, True):
        with Store.open(store_url, FileMaster(master_file), create=create) as store:
            found = store.resource(PATH)
            assert found is not None
            assert bytes(found.content) == b"one"
            assert (store.identity, store.audit_public_key.point, store.generation) == (identity, key, 1)


def test_another_master_key(store_url: str, master_file: Path) -> None:
    Store.open(store_url, FileMaster(master_file), create=True).close()
    with pytest.raises(AuthenticationError, match="master key"):
        Store.open(store_url, FileMaster.create(master_file.with_name("other.key")), create=True)


def test_no_store(store_url: str, master_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError):
        Store.open(store_url, FileMaster(master_file))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(84), b"something else entirely" * 100])
def test_a_file_that_is_no_store(sqlite_url: str, master_file: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store" / "broker.db"
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError):
        Store.open(sqlite_url, FileMaster(master_file))
    assert path.read_bytes()[: len(content)] == content or not content


def test_another_schema(store_url: str, master_file: Path) -> None:
    Store.open(store_url, FileMaster(master_file), create=True).close()
    engine = sqlalchemy.create_engine(store_url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE meta SET value = '2' WHERE name = 'schema'"))
    engine.dispose()
    with pytest.raises(StateError, match="'2'"):
        Store.open(store_url, FileMaster(master_file), create=True)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("UPDATE meta SET value = 'zz' WHERE name = 'identity'", StateError),
        ("DELETE FROM meta WHERE name = 'identity'", StateError),
        ("DELETE FROM internal_keys", StateError),
        ("DELETE FROM wrapping_keys", StateError),
        ("UPDATE wrapping_keys SET wrapped = x'00'", AuthenticationError),
        ("UPDATE wrapping_keys SET created = created + 1", AuthenticationError),
    ],
)
def test_damaged(sqlite_url: str, master_file: Path, tmp_path: Path, statement: str, error: type[Exception]) -> None:
    Store.open(sqlite_url, FileMaster(master_file), create=True).close()
    connection = sqlite3.connect(tmp_path / "store" / "broker.db", isolation_level=None)
    connection.execute(statement)
    connection.close()
    with pytest.raises(error):
        Store.open(sqlite_url, FileMaster(master_file), create=True)


def test_files_are_closed_to_others(sqlite_url: str, master_file: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
            store.committer.run(Job((record(),)))
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "store").iterdir()}
    finally:
        os.umask(before)
    assert modes == {"broker.db": 0o600, "broker.db-wal": 0o600, "broker.db-shm": 0o600}
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    (tmp_path / "store" / "broker.db").chmod(0o640)
    with pytest.raises(StateError, match="0640"):
        Store.open(sqlite_url, FileMaster(master_file))


def test_strange_names_of_files(master_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a b#c&d=e" / "b%41roker.db"
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    with Store.open(url, FileMaster(master_file), create=True) as store:
        store.committer.run(Job((record(),)))
    assert path.exists()


@pytest.mark.parametrize("url", ["mysql://user:hidden@host/name", "hidden", "sqlite://", "sqlite:///:memory:", "http://x"])
def test_other_databases_are_refused(url: str, master_file: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        Store.open(url, FileMaster(master_file), create=True)
    assert "hidden" not in str(caught.value)


def test_a_job_cannot_wait_for_a_job(store: Store) -> None:
    with pytest.raises(InternalError):
        store.committer.run(Job(apply=lambda _connection: store.committer.run(Job())))
