"""Policies, reference values, tokens and sessions; and what somebody changes who can write to the database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from broker.stores import record

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store
from csvfast.broker.store.tokens import token_digest
from csvfast.errors import (
    ConflictError,
    RequestError,
    StaleGenerationError,
    UnavailableError,
    UnknownError,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(store_url: str, master_file: Path, clock: Clock) -> Iterator[Store]:
    with Store.open(store_url, FileMaster(master_file), create=True, clock=clock) as opened:
        yield opened


@pytest.fixture
def second(store: Store, store_url: str, master_file: Path, clock: Clock) -> Iterator[Store]:
    with Store.open(store_url, FileMaster(master_file), clock=clock) as opened:
        yield opened


def execute(url: str, statement: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement))
    engine.dispose()


# ---- Policies


def test_policies(store: Store) -> None:
    assert store.snapshot().policies == {}
    assert store.put_policy("resource", "default", "rules", "one", record()) == 1
    assert store.put_policy("resource", "default", "rules", "two", record()) == 2
    assert store.put_policy("appraisal", "default", "rego", "three", record()) == 1
    newest = store.get_policy("resource", "default")
    assert newest is not None
    assert (newest.version, newest.engine, newest.text, newest.kind, newest.id) == (2, "rules", "two", "resource", "default")
    first = store.get_policy("resource", "default", 1)
    assert first is not None
    assert first.text == "one"
    assert store.get_policy("resource", "default", 3) is None
    assert store.get_policy("resource", "other") is None
    assert set(store.snapshot().policies) == {("resource", "default"), ("appraisal", "default")}
    assert store.snapshot().policies["resource", "default"] == newest
    assert [(row.kind, row.version) for row in store.list_policies()] == [("appraisal", 1), ("resource", 1), ("resource", 2)]


def test_deleted_policies_keep_their_versions(store: Store) -> None:
    with pytest.raises(UnknownError):
        store.delete_policy("resource", "default", record())
    store.put_policy("resource", "default", "rules", "one", record())
    store.delete_policy("resource", "default", record())
    assert store.get_policy("resource", "default") is None
    assert store.snapshot().policies == {}
    assert store.list_policies() == []
    with pytest.raises(UnknownError):
        store.delete_policy("resource", "default", record())
    assert store.put_policy("resource", "default", "rules", "three", record()) == 3
    assert [(row.version, row.deleted) for row in store.policies.history("resource", "default")] == [
        (1, False), (2, True), (3, False),
    ]  # fmt: skip
    assert store.get_policy("resource", "default", 2) is None


def test_policy_with_nul_is_refused(store: Store) -> None:
    with pytest.raises(RequestError):
        store.put_policy("resource", "default", "rules", "a\0b", record())


# ---- References


def test_references(store: Store, clock: Clock) -> None:
    store.put_reference("csv_measure", ["5e" * 32, 1, {"a": [None, True, 1.5]}], clock.now + 60, record())
    store.put_reference("forever", [], None, record())
    found = store.get_reference("csv_measure")
    assert found is not None
    assert found.values == ("5e" * 32, 1, {"a": [None, True, 1.5]})
    assert (found.expires, found.created) == (clock.now + 60, clock.now)
    assert store.snapshot().references["csv_measure"] == found
    assert [row.name for row in store.list_references()] == ["csv_measure", "forever"]
    store.put_reference("csv_measure", ["aa"], None, record())
    assert store.snapshot().references["csv_measure"].values == ("aa",)
    assert store.get_reference("other") is None


def test_a_withdrawn_reference_fails_rather_than_being_unknown(store: Store, clock: Clock) -> None:
    with pytest.raises(UnknownError):
        store.delete_reference("csv_measure", record())
    store.put_reference("csv_measure", ["aa"], None, record())
    store.delete_reference("csv_measure", record())
    assert store.get_reference("csv_measure") is None
    assert store.list_references() == []
    with pytest.raises(UnknownError):
        store.delete_reference("csv_measure", record())
    withdrawn = store.snapshot().references["csv_measure"]
    assert (withdrawn.values, withdrawn.deleted) == ((), True)
    assert withdrawn.expires is not None
    assert withdrawn.expires < clock.now
    store.put_reference("csv_measure", ["bb"], None, record())
    assert store.snapshot().references["csv_measure"].values == ("bb",)


@pytest.mark.parametrize("values", [[b"bytes"], [float("nan")], [{1, 2}]])
def test_references_are_json(store: Store, values: list[Any]) -> None:
    with pytest.raises(RequestError):
        store.put_reference("csv_measure", values, None, record())
    assert store.generation == 0


# ---- Tokens


def test_tokens(store: Store, clock: Clock) -> None:
    secret = store.create_token("alice", ["keys", "policy"], "default/*", clock.now + 100, record())
    text = bytes(secret).decode()
    assert text.startswith("csvt_")
    assert len(text) >= 48
    found = store.find_token(text)
    assert found is not None
    assert (found.name, found.roles, found.scope, found.expires) == ("alice", ("keys", "policy"), "default/*", clock.now + 100)
    assert store.list_tokens() == [found]
    for wrong in (text[:-1], text + "x", "csvt_", "", text.upper(), "csvt_" + "é" * 40, token_digest(text) or "", text * 9):
        assert store.find_token(wrong) is None
    with pytest.raises(ConflictError):
        store.create_token("alice", ["keys"], "*", None, record())
    clock.now += 100
    assert store.find_token(text) is None
    with pytest.raises(UnknownError):
        store.delete_token("bob", record())


def test_no_text_of_a_token_is_kept(sqlite_url: str, master_file: Path, tmp_path: Path) -> None:
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        secret = bytes(store.create_token("alice", ["keys"], "*", None, record()))
        for file in (tmp_path / "store").iterdir():
            assert secret not in file.read_bytes()
            assert secret[5:] not in file.read_bytes()


def test_a_revocation_holds_at_once_for_every_broker(store: Store, second: Store) -> None:
    text = bytes(store.create_token("alice", ["keys"], "*", None, record())).decode()
    assert second.find_token(text) is not None
    store.delete_token("alice", record())
    assert second.find_token(text) is None
    assert bytes(store.create_token("alice", ["keys"], "*", None, record())).decode() != text


@pytest.mark.parametrize("roles", [[], [""], ["keys,policy"], ["a b"]])
def test_roles_are_words(store: Store, roles: list[str]) -> None:
    with pytest.raises(RequestError):
        store.create_token("alice", roles, "*", None, record())


# ---- Generations


def test_every_change_is_a_generation(store: Store, second: Store) -> None:
    assert store.generation == second.generation == 0
    store.put_policy("resource", "default", "rules", "one", record())
    store.put_reference("a", [1], None, record())
    store.create_token("alice", ["keys"], "*", None, record())
    assert store.generation == 3
    assert second.generation == 0
    assert second.snapshot().generation == 0  # nothing has been heard of it
    assert second.look() == 3
    assert second.snapshot() == store.snapshot()
    store.committer.run(Job((record(),)))
    store.sessions.create("s", "n", "csv", 2e9)
    assert store.look() == 3


def test_decisions_of_an_old_generation_are_not_recorded(store: Store, second: Store) -> None:
    second.committer.run(Job((record(),), second.generation))
    store.put_policy("resource", "default", "rules", "one", record())
    with pytest.raises(StaleGenerationError):
        second.committer.run(Job((record(reason="old"),), second.snapshot().generation))
    # Now it has heard, and the next decision rests on what holds.
    assert second.snapshot().policies
    second.committer.run(Job((record(reason="new"),), second.snapshot().generation))
    assert [one.record.reason for one in second.iterate_audit()] == ["", "", "new"]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE policies SET text = 'everybody'",
        "UPDATE policies SET engine = 'rego'",
        "UPDATE policies SET id = 'other'",
        "UPDATE policies SET version = 7",
        "UPDATE policies SET created = 1",
        "DELETE FROM policies",
        "INSERT INTO policies SELECT kind, 'new', version, engine, text, created, deleted FROM policies",
        "INSERT INTO policies SELECT kind, id, version + 1, engine, 'everybody', created, deleted FROM policies",
        "UPDATE reference_values SET items = '[\"bad\"]'",
        "UPDATE reference_values SET expires = 9e9",
        "UPDATE reference_values SET expires = NULL",
        "UPDATE reference_values SET deleted = (1 = 1)",
        "DELETE FROM reference_values",
        "UPDATE tokens SET roles = 'keys,policy,audit'",
        "UPDATE tokens SET scope = '*'",
        "UPDATE tokens SET digest = 'aa'",
        "UPDATE tokens SET expires = NULL",
        "DELETE FROM tokens",
        "INSERT INTO tokens SELECT 'mallory', 'bb', roles, scope, created, expires FROM tokens",
        "UPDATE chain SET rules_version = rules_version + 1",
        "UPDATE chain SET rules_version = rules_version - 1",
        "UPDATE chain SET rules_seal = hash",
    ],
)
def test_rules_that_somebody_else_wrote_are_refused(store: Store, store_url: str, master_file: Path, change: str) -> None:
    store.put_policy("resource", "default", "rules", "nobody", record())
    store.put_reference("csv_measure", ["good"], 1.9e9, record())
    text = bytes(store.create_token("alice", ["audit"], "default/*", 1.9e9, record())).decode()
    execute(store_url, change)
    execute(store_url, "UPDATE chain SET generation = generation + 1")  # so that it is looked at
    with pytest.raises(UnavailableError, match="changed by somebody else"):
        store.find_token(text)
    with pytest.raises(UnavailableError, match="changed by somebody else"):
        store.snapshot()
    # No change by an administrator gives the forgery a seal.
    for action in (
        lambda: store.put_policy("appraisal", "new", "rules", "x", record()),
        lambda: store.put_reference("new", [1], None, record()),
        lambda: store.create_token("new", ["keys"], "*", None, record()),
        lambda: store.delete_token("alice", record()),
    ):
        with pytest.raises(UnavailableError, match="changed by somebody else"):
            action()
    with pytest.raises(UnavailableError, match="changed by somebody else"):
        Store.open(store_url, FileMaster(master_file))
    # The audit log goes on: it is about what is refused, too.
    store.committer.run(Job((record(),)))


# ---- Sessions


def test_sessions(store: Store, second: Store, clock: Clock) -> None:
    store.sessions.create("one", "nonce", "csv", clock.now + 300)
    for opened in (store, second):
        found = opened.sessions.get("one")
        assert found is not None
        assert (found.nonce, found.tee, found.attested, found.record) == ("nonce", "csv", None, None)
        assert (found.created, found.expires) == (clock.now, clock.now + 300)
    with pytest.raises(ConflictError):
        second.sessions.create("one", "another nonce", "csv", clock.now + 300)
    clock.now += 10
    second.sessions.attest("one", "what came of it")
    found = store.sessions.get("one")
    assert found is not None
    assert (found.nonce, found.attested, found.record) == ("nonce", clock.now, "what came of it")
    with pytest.raises(ConflictError):
        store.sessions.attest("one", "something else")
    assert store.sessions.get("one") == found
    assert store.sessions.get("two") is None
    with pytest.raises(UnknownError):
        store.sessions.attest("two", "x")


def test_sessions_expire(store: Store, clock: Clock) -> None:
    store.sessions.create("one", "nonce", "csv", clock.now + 300)
    store.sessions.create("two", "nonce", "csv", clock.now + 400)
    assert store.sessions.purge_expired() == 0
    clock.now += 300
    assert store.sessions.get("one") is None
    with pytest.raises(UnknownError):
        store.sessions.attest("one", "x")
    assert store.sessions.purge_expired() == 1
    assert store.sessions.get("two") is not None


def test_a_nonce_is_used_once_over_all_brokers(store: Store, second: Store, clock: Clock) -> None:
    won: list[int] = []
    for turn in range(10):
        name = f"session {turn}"
        store.sessions.create(name, "nonce", "csv", clock.now + 300)
        barrier = threading.Barrier(8)

        def attest(number: int, name: str = name, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            try:
                (store, second)[number % 2].sessions.attest(name, str(number))
            except ConflictError:
                return
            won.append(number)

        threads = [threading.Thread(target=attest, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(won) == turn + 1
        found = second.sessions.get(name)
        assert found is not None
        assert found.record == str(won[-1])


def test_attestation_is_stored_with_its_audit_record_or_not_at_all(store: Store, clock: Clock) -> None:
    store.sessions.create("one", "nonce", "csv", clock.now + 300)
    with pytest.raises(StaleGenerationError):
        store.committer.run(store.sessions.attest_job("one", "x", (record(),), store.generation + 1))
    found = store.sessions.get("one")
    assert found is not None
    assert found.record is None
    store.committer.run(store.sessions.attest_job("one", "x", (record(),), store.generation))
    with pytest.raises(ConflictError):
        store.committer.run(store.sessions.attest_job("one", "y", (record(),), store.generation))
    assert len(list(store.iterate_audit())) == 1
