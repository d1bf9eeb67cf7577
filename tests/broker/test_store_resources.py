"""Resources: versions, retirement, real deletion, rows that do not belong where they stand, rotation of the master key."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from broker.stores import PATH, record

from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import Store
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError, UnavailableError, UnknownError

OTHER = ResourcePath("default", "key", "other")


def content(store: Store, path: ResourcePath = PATH, version: int | None = None) -> bytes | None:
    found = store.resource(path, version)
    return None if found is None else bytes(found.content)


def execute(url: str, statement: str, **parameters: object) -> None:
    """What somebody does who can write to the database and is not the broker."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.text(statement), parameters).rowcount > 0
    engine.dispose()


def test_versions(store: Store) -> None:
    assert store.resource(PATH) is None
    assert store.put_resource(PATH, b"first", record()) == 1
    assert store.put_resource(PATH, Secret(b"second"), record()) == 2
    assert content(store) == b"second"
    assert content(store, version=1) == b"first"
    assert content(store, version=3) is None
    assert content(store, OTHER) is None
    found = store.resource(PATH)
    assert found is not None
    assert (found.path, found.version, found.state) == (PATH, 2, "active")
    assert "second" not in repr(found)


def test_audit_records_of_changes_name_the_version(store: Store) -> None:
    store.put_resource(PATH, b"first", record(action="put resource", resource="", resource_version=None))
    store.put_resource(PATH, b"second", record(action="put resource", resource="", resource_version=None))
    store.retire_resource(PATH, 1, record(action="retire resource"))
    found = [(one.record.action, one.record.resource, one.record.resource_version) for one in store.iterate_audit()]
    assert found == [("put resource", str(PATH), 1), ("put resource", str(PATH), 2), ("retire resource", str(PATH), 1)]


def test_rotate(store: Store) -> None:
    with pytest.raises(UnknownError):
        store.rotate_resource(PATH, record())
    store.put_resource(PATH, b"x" * 48, record())
    assert store.rotate_resource(PATH, record()) == 2
    rotated = content(store)
    assert rotated is not None
    assert len(rotated) == 48
    assert rotated != b"x" * 48
    assert content(store, version=1) == b"x" * 48
    store.rotate_resource(PATH, record(), length=16)
    assert len(content(store) or b"") == 16


def test_retired_versions_are_kept_but_not_given(store: Store) -> None:
    store.put_resource(PATH, b"first", record())
    store.put_resource(PATH, b"second", record())
    store.retire_resource(PATH, 1, record())
    store.retire_resource(PATH, 1, record())
    assert content(store, version=1) is None
    kept = store.resource(PATH, 1, retired=True)
    assert kept is not None
    assert (bytes(kept.content), kept.state) == (b"first", "retired")
    assert content(store, version=1) is None  # asking for it has not put it into the cache
    assert content(store) == b"second"
    store.retire_resource(PATH, 2, record())
    assert content(store) is None
    for version in (3, 0):
        with pytest.raises(UnknownError):
            store.retire_resource(PATH, version, record())


def test_deleted_versions_leave_a_tombstone(store: Store) -> None:
    for text in (b"first", b"second", b"third"):
        store.put_resource(PATH, text, record())
    assert store.delete_resource(PATH, record(), version=2) == 1
    assert content(store, version=2) is None
    assert store.resource(PATH, 2, retired=True) is None
    assert content(store) == b"third"
    assert store.delete_resource(PATH, record()) == 2
    assert content(store) is None
    assert [(row.version, row.state) for row in store.list_resources()] == [(1, "deleted"), (2, "deleted"), (3, "deleted")]
    with pytest.raises(UnknownError):
        store.delete_resource(PATH, record())
    with pytest.raises(UnknownError):
        store.retire_resource(PATH, 1, record())
    assert store.put_resource(PATH, b"fourth", record()) == 4


def test_list_is_sorted_and_by_repository(store: Store) -> None:
    for name in ("b/t/2", "b/t/1", "a/t/1", "B/t/1"):
        store.put_resource(ResourcePath.parse(name), b"x", record())
    assert [str(row.path) for row in store.list_resources()] == ["B/t/1", "a/t/1", "b/t/1", "b/t/2"]
    assert [str(row.path) for row in store.list_resources("b")] == ["b/t/1", "b/t/2"]
    assert store.list_resources("b%") == []


def test_paths_are_checked_whatever_made_them(store: Store) -> None:
    for path in (ResourcePath("..", "key", "one"), ResourcePath("a/b", "c", "d"), ResourcePath("", "", "")):
        with pytest.raises(RequestError):
            store.put_resource(path, b"x", record())


def test_empty_content_is_refused_and_harms_nobody(store: Store) -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        store.put_resource(PATH, b"", record())
    assert store.put_resource(PATH, b"x", record()) == 1
    assert len(list(store.iterate_audit())) == 1


def test_cache_lasts_as_long_as_the_generation(store: Store) -> None:
    store.put_resource(PATH, b"first", record())
    assert store.cached_resource(PATH) is None
    found = store.resource(PATH)
    assert store.cached_resource(PATH) is found
    assert store.resource(PATH) is found
    store.put_reference("any", [1], None, record())
    assert store.cached_resource(PATH) is None
    assert content(store) == b"first"
    store.delete_resource(PATH, record())
    assert store.cached_resource(PATH) is None
    assert store.resource(PATH) is None


def test_cache_is_bounded(sqlite_url: str, master_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csvfast.broker.store.resources._CACHED_BYTES", 10_000)
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        paths = [ResourcePath("default", "key", str(number)) for number in range(20)]
        for path in paths:
            store.put_resource(path, b"x" * 1000, record())
        for path in paths:
            assert content(store, path) == b"x" * 1000
        assert 0 < sum(store.cached_resource(path) is not None for path in paths) <= 10


def test_large_content(store: Store) -> None:
    large = bytes(range(256)) * 8192  # 2 MiB, CoCo's limit
    store.put_resource(PATH, large, record())
    assert content(store) == large


# ---- Two brokers on one store


@pytest.fixture
def second(store: Store, store_url: str, master_file: Path) -> Iterator[Store]:
    with Store.open(store_url, FileMaster(master_file)) as opened:
        yield opened


def test_another_broker_sees_changes(store: Store, second: Store) -> None:
    store.put_resource(PATH, b"first", record())
    assert content(second) == b"first"
    store.delete_resource(PATH, record())
    assert second.cached_resource(PATH) is not None  # it has not heard of it yet
    second.look()
    assert second.cached_resource(PATH) is None
    assert content(second) is None


def test_rotate_master(store: Store, second: Store, store_url: str, master_file: Path) -> None:
    for number in range(20):
        store.put_resource(ResourcePath("default", "key", str(number)), b"%d" % number, record())
    store.put_resource(PATH, b"gone", record())
    store.delete_resource(PATH, record())
    token = store.internal_key("token", lambda: Secret(b"t" * 32))
    new_file = master_file.with_name("new.key")
    new = FileMaster.create(new_file)
    store.rotate_master(new, record(action="rotate master"))
    for number in range(20):
        assert content(store, ResourcePath("default", "key", str(number))) == b"%d" % number
    store.put_resource(PATH, b"again", record())
    assert store.verify_audit().intact
    # A broker with the old master key reads nothing more, and cannot write anything that would be lost.
    second.look()
    with pytest.raises(UnavailableError, match="another master key"):
        second.resource(OTHER._replace(tag="1"))
    with pytest.raises(UnavailableError, match="another master key"):
        second.put_resource(PATH, b"lost", record())
    with pytest.raises(AuthenticationError):
        Store.open(store_url, FileMaster(master_file))
    with Store.open(store_url, FileMaster(new_file)) as opened:
        assert content(opened) == b"again"
        assert opened.internal_key("token", lambda: Secret(b"never")).equals(token)
        assert opened.audit_public_key.point == store.audit_public_key.point


def test_rotate_under_the_same_master(store: Store, second: Store, master_file: Path) -> None:
    store.put_resource(PATH, b"first", record())
    store.rotate_master(FileMaster(master_file), record())
    # The other broker finds the new key-encryption key by itself, for reading and for writing.
    assert content(second) == b"first"
    store.rotate_master(FileMaster(master_file), record())
    assert second.put_resource(PATH, b"second", record()) == 2
    assert content(store) == b"second"


def test_rotation_stops_at_a_row_that_does_not_unseal(store: Store, store_url: str, master_file: Path) -> None:
    store.put_resource(PATH, b"first", record())
    store.put_resource(OTHER, b"other", record())
    execute(store_url, "UPDATE resources SET version = 7 WHERE path = :path", path=str(OTHER))
    with pytest.raises(UnavailableError, match="nothing was rotated"):
        store.rotate_master(FileMaster.create(master_file.with_name("new.key")), record())
    assert content(store) == b"first"
    with Store.open(store_url, FileMaster(master_file)) as opened:
        assert content(opened) == b"first"


def test_internal_key_is_made_once(store: Store, second: Store) -> None:
    first = store.internal_key("token", lambda: Secret.random(32))
    assert second.internal_key("token", lambda: Secret.random(32)).equals(first)
    assert not second.internal_key("other", lambda: Secret.random(32)).equals(first)


# ---- Rows that somebody else has written


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE resources SET ciphertext = (SELECT ciphertext FROM resources WHERE path = 'default/key/other') "
        "WHERE path = 'default/key/one'",
        "UPDATE resources SET wrapped_key = (SELECT wrapped_key FROM resources WHERE path = 'default/key/other'), "
        "ciphertext = (SELECT ciphertext FROM resources WHERE path = 'default/key/other') WHERE path = 'default/key/one'",
        "UPDATE resources SET version = 2 WHERE path = 'default/key/one'",
        "UPDATE resources SET path = 'default/key/two' WHERE path = 'default/key/one'",
        "UPDATE resources SET kek = 'none' WHERE path = 'default/key/one'",
        "UPDATE resources SET ciphertext = wrapped_key WHERE path = 'default/key/one'",
    ],
)
def test_exchanged_rows_are_not_released(store: Store, store_url: str, change: str) -> None:
    store.put_resource(PATH, b"one", record())
    store.put_resource(OTHER, b"other", record())
    execute(store_url, change)
    for path in (PATH, PATH._replace(tag="two")):
        try:
            assert store.resource(path) is None
        except UnavailableError:
            continue
    assert content(store, OTHER) == b"other"


def test_a_deleted_resource_cannot_be_made_active(store: Store, store_url: str) -> None:
    store.put_resource(PATH, b"one", record())
    store.delete_resource(PATH, record())
    execute(store_url, "UPDATE resources SET state = 'active'")
    with pytest.raises(UnavailableError):
        store.resource(PATH)


# ---- Real deletion


def test_deletion_leaves_no_bytes(sqlite_url: str, master_file: Path, tmp_path: Path) -> None:
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        for number in range(50):  # neighbours in the same pages
            store.put_resource(ResourcePath("default", "key", f"n{number}"), b"n" * 32, record())
        path = tmp_path / "store" / "broker.db"
        for size in (32, 20_000):  # in a page, and on overflow pages
            store.put_resource(PATH, Secret.random(size), record())
        with sqlite3.connect(path) as connection:
            rows = connection.execute("SELECT wrapped_key, ciphertext FROM resources WHERE path = ?", (str(PATH),)).fetchall()
            keys = connection.execute("SELECT wrapped FROM wrapping_keys").fetchall()
        connection.close()
        pieces = [row[0] for row in rows] + [row[1][at : at + 24] for row in rows for at in range(0, len(row[1]) - 24, 500)]
        pieces += [bytes(piece[17:41]) for piece in pieces[:2]]
        assert len(pieces) > 40

        def left(wanted: list[bytes]) -> int:
            files = [file.read_bytes() for file in path.parent.iterdir()]
            return sum(any(piece in file for file in files) for piece in wanted)

        assert left(pieces) == len(pieces)
        for number in range(5):  # let some pages move
            store.put_resource(ResourcePath("default", "key", f"m{number}"), b"n" * 3000, record())
        store.delete_resource(PATH, record())
        assert {file.name for file in path.parent.iterdir()} == {"broker.db", "broker.db-wal", "broker.db-shm"}
        assert left(pieces) == 0
        assert left([row[0] for row in keys]) == 1
        store.rotate_master(FileMaster(master_file), record())
        assert left([row[0] for row in keys]) == 0
        assert content(store, ResourcePath("default", "key", "n7")) == b"n" * 32
    assert left(pieces) == 0


def test_deletion_waits_for_readers_and_says_when_it_cannot(
    sqlite_url: str, master_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfast.broker.store.database._ERASE_SECONDS", 0.5)
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())
        reader = sqlite3.connect(tmp_path / "store" / "broker.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM resources").fetchall()
        with pytest.raises(UnavailableError, match="delete again"):
            store.delete_resource(PATH, record())
        assert store.resource(PATH) is None
        store.put_resource(OTHER, b"other", record())  # nobody else waits
        reader.close()
        with pytest.raises(UnknownError):
            store.delete_resource(PATH, record())
        assert (tmp_path / "store" / "broker.db-wal").stat().st_size == 0


def test_deletion_on_postgres_leaves_no_row(postgres_url: str, master_file: Path) -> None:
    with Store.open(postgres_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())
        store.delete_resource(PATH, record())
        engine = sqlalchemy.create_engine(postgres_url)
        with engine.connect() as connection:
            row = connection.execute(sqlalchemy.text("SELECT kek, wrapped_key, ciphertext FROM resources")).one()
            dead = connection.scalar(
                sqlalchemy.text("SELECT pg_stat_get_dead_tuples('resources'::regclass)")
            )
        engine.dispose()
        assert tuple(row) == (None, None, None)
        assert dead == 0
