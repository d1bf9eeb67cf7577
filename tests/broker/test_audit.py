"""The audit log: what is hashed, what is signed, and which change is found where."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from broker.stores import SUBJECT, record
from cryptography.hazmat.primitives.hashes import SM3, Hash
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.master import FileMaster
from csvfast.broker.store import AuditRecord, AuditVerification, Job, Store
from csvfast.broker.store.audit import canonical, first_hash, verify_head
from csvfast.errors import RequestError, StateError

COUNT = 2500


def sm3(data: bytes) -> bytes:
    """By another library."""
    hashed = Hash(SM3())
    hashed.update(data)
    return hashed.finalize()


def known() -> AuditRecord:
    return AuditRecord(
        time=1_700_000_000_123_456,
        correlation="0123456789abcdef",
        door="kbs",
        action="release",
        outcome="denied",
        actor="guest",
        address="192.0.2.1:40000",
        subject={"tee": "csv", "chip_id": "HYGN\u00e9", "measure": "5e"},
        resource="default/key/one",
        resource_version=None,
        policy={"resource": "default", "resource_version": 2},
        reason='line\nand "quote"',
    )


# ---- What is hashed


def test_canonical_text() -> None:
    assert canonical(known()).decode() == (
        '{"action":"release","actor":"guest","address":"192.0.2.1:40000","correlation":"0123456789abcdef","door":"kbs",'
        '"outcome":"denied","policy":{"resource":"default","resource_version":2},"reason":"line\\nand \\"quote\\"",'
        '"resource":"default/key/one","resource_version":null,'
        '"subject":{"chip_id":"HYGN\u00e9","measure":"5e","tee":"csv"},"time":1700000000123456}'
    )


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(_TEXT, st.dictionaries(_TEXT, _TEXT, max_size=4), st.integers(-(2**63), 2**63 - 1), st.none() | st.integers(0, 2**31))
def test_canonical_is_read_back(reason: str, subject: dict[str, str], time: int, version: int | None) -> None:
    given = record(reason=reason, subject=subject, time=time, resource_version=version)
    text = canonical(given)
    assert b"\0" not in text
    assert b"\n" not in text
    assert AuditRecord(**json.loads(text)) == given


@given(st.text(st.characters(categories=["Cs", "Lu", "Cc"]), max_size=40))
def test_canonical_takes_any_text(reason: str) -> None:
    assert len(json.loads(canonical(record(reason=reason)))["reason"]) == len(reason)


def test_long_members_are_cut() -> None:
    long = record(reason="r" * 1_000_000, actor="a" * 50_000, subject={f"{number}" * 500: "v" * 5000 for number in range(5000)})
    found = json.loads(canonical(long))
    assert found["reason"] == "r" * 1000
    assert len(canonical(long)) < 20_000
    assert found["time"] == long.time
    assert len(found["subject"]) <= 12


def test_chain_by_hand(store: Store, store_url: str) -> None:
    store.committer.run(Job([record(reason=str(number)) for number in range(3)]))
    engine = sqlalchemy.create_engine(store_url)
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.text("SELECT sequence, record, hash FROM audit ORDER BY sequence")).all()
        head = connection.execute(sqlalchemy.text("SELECT sequence, hash, time, signature FROM chain")).one()
    engine.dispose()
    digest = sm3(b"csvfast audit log 1" + store.identity)
    assert digest == first_hash(store.identity)
    for number, (sequence, text, stored) in enumerate(rows):
        digest = sm3(digest + text.encode())
        assert (sequence, stored) == (number + 1, digest)
        assert json.loads(text)["reason"] == str(number)
    assert (head.sequence, head.hash) == (3, digest)
    signed = b"csvfast audit head 1" + store.identity + (3).to_bytes(8, "big") + head.time.to_bytes(8, "big") + digest
    store.audit_public_key.verify(head.signature, signed)


@pytest.mark.parametrize("member", range(4))
def test_head_signature_covers_everything(store: Store, member: int) -> None:
    store.committer.run(Job((record(),)))
    query = sqlalchemy.text("SELECT sequence, time, hash, signature FROM chain")
    head: list[Any] = list(store._database.read(lambda connection: connection.execute(query).one()))
    assert verify_head(store.audit_public_key, store.identity, *head)
    assert not verify_head(store.audit_public_key, bytes(16), *head)
    value = head[member]
    numbers, texts = [1 << 64, -1, "1", None], [b"", "x", None]
    for other in [value + 1, value - 1, *numbers] if isinstance(value, int) else [bytes(len(value)), *texts]:
        head[member] = other
        assert not verify_head(store.audit_public_key, store.identity, *head)


# ---- Reading


def test_iterate(store: Store) -> None:
    store.committer.run(Job([record(reason=str(number), outcome=("allowed", "denied")[number % 2]) for number in range(50)]))
    assert [one.sequence for one in store.iterate_audit()] == list(range(1, 51))
    assert [one.sequence for one in store.iterate_audit(after=48)] == [49, 50]
    assert [one.sequence for one in store.iterate_audit(after=10, limit=3)] == [11, 12, 13]
    assert list(store.iterate_audit(limit=0)) == []
    assert [one.record.reason for one in store.iterate_audit(outcome="denied", limit=2)] == ["1", "3"]
    assert [one.sequence for one in store.iterate_audit(reason="7")] == [8]
    assert len(list(store.iterate_audit(chip_id=SUBJECT["chip_id"], appraisal="default_cpu", door="kbs"))) == 50
    assert list(store.iterate_audit(chip_id="default_cpu")) == []
    assert [one.sequence for one in store.iterate_audit(resource_version="1", limit=1)] == [1]
    with pytest.raises(RequestError, match="filter"):
        store.iterate_audit(subject="x")
    with pytest.raises(RequestError, match="filter"):
        store.iterate_audit(**{"reason; DROP TABLE audit": "x"})


def test_filters_take_any_text(store: Store) -> None:
    strange = ["%", "_", "/", "a%b", '"', "\\", "\n", "é", "'; --", ""]
    store.committer.run(Job([record(reason=text) for text in strange]))
    for number, text in enumerate(strange):
        assert [one.sequence for one in store.iterate_audit(reason=text)] == [number + 1]


def test_iterate_over_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csvfast.broker.store.audit._PAGE", 7)
    store.committer.run(Job([record(reason=str(number)) for number in range(50)]))
    assert [one.record.reason for one in store.iterate_audit()] == [str(number) for number in range(50)]
    assert [one.record.reason for one in store.iterate_audit(reason="33")] == ["33"]
    done: list[int] = []
    assert store.verify_audit(done.append) == AuditVerification(50, None, "", True)
    assert done == [7] * 7 + [1]


# ---- Verifying


def test_an_empty_log_is_intact(store: Store) -> None:
    assert store.verify_audit() == AuditVerification(0, None, "", True)


def test_records_written_meanwhile_disturb_nothing(store: Store) -> None:
    store.committer.run(Job([record()] * 3000))

    def more(_count: int) -> None:
        store.committer.run(Job([record()] * 500))

    found = []

    def limited(count: int) -> None:
        if len(found) < 5:
            found.append(count)
            more(count)

    assert store.verify_audit(limited).intact


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with signed heads at 1000, 2000 and none at its end, 2500."""
    folder = tmp_path_factory.mktemp("audit")
    folder.chmod(0o700)
    master = FileMaster.create(folder / "master.key")
    with Store.open(f"sqlite:///{folder / 'broker.db'}", master, create=True) as store:
        for start in range(0, COUNT, 500):
            store.committer.run(Job([record(reason=str(start + number + 1)) for number in range(500)]))
    return folder


def rechain(connection: sqlite3.Connection, first: int) -> None:
    digest = connection.execute("SELECT hash FROM audit WHERE sequence = ?", (first - 1,)).fetchone()[0]
    connection.execute("BEGIN")
    query = "SELECT sequence, record FROM audit WHERE sequence >= ? ORDER BY sequence"
    for sequence, text in connection.execute(query, (first,)).fetchall():
        digest = sm3(digest + text.encode())
        connection.execute("UPDATE audit SET hash = ? WHERE sequence = ?", (digest, sequence))
    connection.execute("COMMIT")


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Callable[..., Store]:
    """Opens a copy of the log, which somebody changes while it is open."""
    opened: list[Store] = []
    for name in ("broker.db", "master.key"):
        (tmp_path / name).write_bytes((template / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    store = Store.open(f"sqlite:///{tmp_path / 'broker.db'}", FileMaster(tmp_path / "master.key"))

    def change(*statements: str) -> Store:
        connection = sqlite3.connect(tmp_path / "broker.db", isolation_level=None)
        connection.create_function("follow", 2, lambda before, text: sm3(before + text.encode()))
        for statement in statements:
            if statement.startswith(_RECHAIN):
                rechain(connection, int(statement.removeprefix(_RECHAIN)))
            else:
                assert connection.execute(statement).rowcount > 0, statement
        connection.close()
        return store

    opened.append(store)
    yield change  # type: ignore[misc]
    store.close()


def test_the_template_is_intact(copy: Callable[..., Store]) -> None:
    assert copy().verify_audit() == AuditVerification(COUNT, None, "", True)


_FORGED = '\'{"action":"release"}\''
_RECHAIN = "rechain "  # everything from there on hashed anew, as somebody does who knows how, but has not the key


@pytest.mark.parametrize(
    ("statements", "count", "bad", "problem", "head"),
    [
        (["UPDATE audit SET record = replace(record, 'allowed', 'denied') WHERE sequence = 700"], 699, 700, "changed", True),
        (["UPDATE audit SET record = record || ' ' WHERE sequence = 1"], 0, 1, "changed", True),
        (["UPDATE audit SET record = '' WHERE sequence = 2500"], 2499, 2500, "changed", True),
        (["UPDATE audit SET record = x'00' WHERE sequence = 5"], 4, 5, "text is none", True),
        (["UPDATE audit SET hash = x'00' || substr(hash, 2) WHERE sequence = 700"], 699, 700, "changed", True),
        (["UPDATE audit SET hash = '' WHERE sequence = 700"], 699, 700, "changed", True),
        (["DELETE FROM audit WHERE sequence = 700"], 699, 700, "is missing; the next is record 701", True),
        (["DELETE FROM audit WHERE sequence = 1"], 0, 1, "is missing", True),
        (["DELETE FROM audit WHERE sequence = 2500"], 2499, 2500, "the log had 2500", True),
        (["DELETE FROM audit WHERE sequence > 0"], 0, 1, "the log had 2500", True),
        (["UPDATE audit SET sequence = 9999 WHERE sequence = 700"], 699, 700, "is missing", True),
        (["UPDATE audit SET sequence = -1 WHERE sequence = 1"], 0, 1, "is missing", True),
        # Two records exchanged
        (
            [
                "UPDATE audit SET sequence = 0 WHERE sequence = 10",
                "UPDATE audit SET sequence = 10 WHERE sequence = 20",
                "UPDATE audit SET sequence = 20 WHERE sequence = 0",
            ],
            9, 10, "another's place", True,
        ),
        # Records added
        ([f"INSERT INTO audit VALUES (2501, {_FORGED}, x'00')"], 2500, 2501, "changed", True),
        (
            [
                f"INSERT INTO audit SELECT 2501, {_FORGED}, follow(hash, {_FORGED}) FROM audit WHERE sequence = 2500"
            ],
            2501, 2501, "not written by the broker", True,
        ),
        # All hashes computed anew: found at the next signed head
        (
            [f"UPDATE audit SET record = {_FORGED} WHERE sequence = 700", _RECHAIN + "700"],
            999, 1000, "signed head kept for it says others did", True,
        ),
        (
            [f"UPDATE audit SET record = {_FORGED} WHERE sequence = 2400", _RECHAIN + "2400"],
            2499, 2500, "not the record whose hash is the log's signed head", True,
        ),
        (
            [
                f"UPDATE audit SET record = {_FORGED} WHERE sequence = 2400",
                _RECHAIN + "2400",
                "UPDATE chain SET hash = (SELECT hash FROM audit WHERE sequence = 2500)",
            ],
            2500, None, "not signed", False,
        ),
        # The log cut off at a head whose signature is known
        (
            [
                "DELETE FROM audit WHERE sequence > 1000",
                "UPDATE chain SET (sequence, hash, time, signature) = "
                "(SELECT sequence, hash, time, signature FROM audit_heads WHERE sequence = 1000)",
            ],
            1000, 1001, "signed head of record 2000", True,
        ),
        # The head itself
        (["UPDATE chain SET hash = x'00' || substr(hash, 2)"], 2500, None, "not signed", False),
        (["UPDATE chain SET signature = zeroblob(64)"], 2500, None, "not signed", False),
        (["UPDATE chain SET signature = 'none'"], 2500, None, "not signed", False),
        (["UPDATE chain SET sequence = 2501"], 2500, None, "not signed", False),
        (["UPDATE chain SET sequence = 2499"], 2500, None, "not signed", False),
        (["UPDATE chain SET sequence = 'x'"], 2500, None, "not signed", False),
        (["UPDATE chain SET time = time + 1"], 2500, None, "not signed", False),
        (["DELETE FROM chain"], 2500, None, "missing", False),
        # Kept heads
        (["UPDATE audit_heads SET hash = zeroblob(32) WHERE sequence = 1000"], 999, 1000, "not signed", True),
        (["UPDATE audit_heads SET time = time + 1 WHERE sequence = 2000"], 1999, 2000, "not signed", True),
        (["UPDATE audit_heads SET signature = zeroblob(64) WHERE sequence = 2000"], 1999, 2000, "not signed", True),
        (["UPDATE audit_heads SET sequence = 1001 WHERE sequence = 1000"], 1000, 1001, "not signed", True),
        (["UPDATE audit_heads SET sequence = 3000 WHERE sequence = 1000"], 2500, 2501, "signed head of record 3000", True),
    ],
)  # fmt: skip
def test_changes_are_found(
    copy: Callable[..., Store], statements: list[str], count: int, bad: int | None, problem: str, head: bool
) -> None:
    found = copy(*statements).verify_audit()
    assert not found.intact
    assert (found.count, found.bad, found.head) == (count, bad, head)
    assert problem in found.problem


def test_a_record_that_is_none_stops_reading_in_words(copy: Callable[..., Store]) -> None:
    store = copy("UPDATE audit SET record = '{' WHERE sequence = 3")
    entries = store.iterate_audit()
    assert [next(entries).sequence, next(entries).sequence] == [1, 2]
    with pytest.raises(StateError, match="record 3"):
        next(entries)


def test_records_are_anothers_under_another_identity(copy: Callable[..., Store]) -> None:
    store = copy()
    store.identity = bytes(16)  # type: ignore[misc]
    found = store.verify_audit()
    assert (found.bad, found.head) == (1, False)
