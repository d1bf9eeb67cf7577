"""The store: everything that the broker keeps, behind one object.

    committer    writes audit records and changes, together and durably
    snapshot     policies, reference values and tokens of one generation
    resource     a secret, unsealed
    sessions, policies, references, tokens, resources   their tables

Several processes may open one store. `generation` counts administrative changes; whoever decides says which one it decided under
(Job.generation), and the record is written only while that holds.

Thread-safety: all methods. Those that change something wait until it is durable, those that read may wait for the database: event
loops call them through a thread, but for `generation`, `cached_resource` and `committer.commit`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import insert, select

from csvfast.broker.store import schema
from csvfast.broker.store.audit import (
    AuditEntry,
    AuditRecord,
    AuditVerification,
    first_hash,
    iterate_audit,
    sign_head,
    verify_audit,
)
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.database import Database
from csvfast.broker.store.policies import Policies
from csvfast.broker.store.references import References
from csvfast.broker.store.resources import Resources
from csvfast.broker.store.rows import PolicyRow, ReferenceRow, Resource, ResourceRow, Snapshot, TokenRow
from csvfast.broker.store.rules import initial_seal, read_snapshot
from csvfast.broker.store.sessions import Sessions
from csvfast.broker.store.tokens import Tokens
from csvfast.broker.store.vault import Vault
from csvfast.crypto import Secret, SM2PrivateKey, SM2PublicKey
from csvfast.errors import StateError, UnavailableError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from typing_extensions import Buffer

    from csvfast.broker.master import MasterKey
    from csvfast.broker.model import ResourcePath
    from csvfast.broker.sealing import KeyRing

__all__ = ["Store"]

_AUDIT_KEY: Final = "audit"
_RULES_KEY: Final = "rules"
_GENERATION: Final = select(schema.chain.c.generation).where(schema.chain.c.id == 1)


class Store:
    """Made by `open`.

    generation         the number of administrative changes, as seen last
    identity           16 bytes, random, of this store and its copies
    audit_public_key   checks the heads of the audit log
    """

    def __init__(
        self, database: Database, identity: bytes, vault: Vault, audit_key: SM2PrivateKey, rules_key: Secret,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database = database
        self._vault = vault
        self._rules_key = rules_key
        self._generation_lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self.generation = -1
        self.identity: Final = identity
        self.audit_public_key: Final[SM2PublicKey] = audit_key.public_key
        self.committer: Final = Committer(database, identity, audit_key, self._observe)
        self.resources: Final = Resources(database, self.committer, vault, self._observe, lambda: self.generation, clock)
        self.policies: Final = Policies(database, self.committer, rules_key, clock)
        self.references: Final = References(database, self.committer, rules_key, clock)
        self.tokens: Final = Tokens(self.committer, rules_key, self._fresh_snapshot, clock)
        self.sessions: Final = Sessions(database, self.committer, clock)
        self.committer.start()

    @classmethod
    def open(
        cls, url: str, master: MasterKey, *, create: bool = False, clock: Callable[[], float] = time.time
    ) -> Store:
        """Opens a store.

        In: url      "sqlite:////absolute/path" or "postgresql://user@host/name"
            master   wraps the store's key-encryption keys
            create   make the store when there is none
        AuthenticationError: another master key. StateError: no store, of another version, damaged, or open to other users.
        UnavailableError: the database cannot be reached. ArgumentError: no such kind of database.
        """
        database = Database(url, initialise=(lambda connection: _initialise(connection, master)) if create else None)
        try:
            identity, vault, audit_key, rules_key = database.read(lambda connection: _load(connection, master))
            store = cls(database, identity, vault, audit_key, rules_key, clock)
        except BaseException:
            database.close()
            raise
        try:
            # An empty job: the head of the audit log is there and signed, the database can be written.
            store.committer.run(Job())
            store.snapshot()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Commits what is queued, then closes. Idempotent."""
        self.committer.close()
        self.resources.forget()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- Generations

    @property
    def is_local(self) -> bool:
        """True when the database is a file: reading it takes microseconds, not a network."""
        return self._database.is_sqlite

    def _observe(self, generation: int) -> None:
        if generation > self.generation:
            with self._generation_lock:
                self.generation = max(generation, self.generation)
            self.resources.forget()

    def look(self) -> int:
        """Asks the database for its generation. UnavailableError."""
        found = self._database.read(lambda connection: connection.scalar(_GENERATION))
        if found is None:
            raise UnavailableError(f"{self._database.name}: the chain's row is missing")
        self._observe(found)
        return self.generation

    def snapshot(self) -> Snapshot:
        """Policies, references and tokens of the generation seen last, or a newer one. UnavailableError."""
        found = self._snapshot
        if found is None or found.generation != self.generation:
            found = self._database.read(lambda connection: read_snapshot(connection, self._rules_key))
            self._observe(found.generation)
            self._snapshot = found
        return found

    def _fresh_snapshot(self) -> Snapshot:
        self.look()
        return self.snapshot()

    # ---- Resources

    def cached_resource(self, path: ResourcePath, version: int | None = None) -> Resource | None:
        """As `resource`, if that is known without asking the database. HOT."""
        return self.resources.cached(path, version)

    def resource(self, path: ResourcePath, version: int | None = None, *, retired: bool = False) -> Resource | None:
        """A version, or the newest that is active; None when there is none, or it is retired or deleted.

        In: retired   give a retired version, too, when it is asked for by number
        """
        return self.resources.get(path, version, retired=retired)

    def put_resource(self, path: ResourcePath, content: Buffer, record: AuditRecord) -> int:
        """A new version. Out: its number."""
        return self.resources.put(path, content, record)

    def rotate_resource(self, path: ResourcePath, record: AuditRecord, length: int | None = None) -> int:
        """A new version of random bytes, as many as the newest has unless told. Out: its number. UnknownError."""
        return self.resources.rotate(path, record, length)

    def retire_resource(self, path: ResourcePath, version: int, record: AuditRecord) -> None:
        """A version is not released any more, but kept. UnknownError."""
        self.resources.retire(path, version, record)

    def delete_resource(self, path: ResourcePath, record: AuditRecord, version: int | None = None) -> int:
        """Destroys a version, or all. Out: how many. UnknownError."""
        return self.resources.delete(path, record, version)

    def list_resources(self, repository: str | None = None) -> list[ResourceRow]:
        """Every version, deleted ones too, without contents."""
        return self.resources.list(repository)

    # ---- Rules

    def put_policy(self, kind: str, name: str, engine: str, text: str, record: AuditRecord) -> int:
        """A new version of a policy, which counts from now on. Out: its number."""
        return self.policies.put(kind, name, engine, text, record)

    def get_policy(self, kind: str, name: str, version: int | None = None) -> PolicyRow | None:
        """A version, or the one that counts."""
        return self.policies.get(kind, name, version)

    def list_policies(self) -> list[PolicyRow]:
        """Every version of every policy that is not deleted."""
        return self.policies.list()

    def delete_policy(self, kind: str, name: str, record: AuditRecord) -> None:
        """From now on there is none of that name. UnknownError."""
        self.policies.delete(kind, name, record)

    def put_reference(self, name: str, values: Sequence[Any], expires: float | None, record: AuditRecord) -> None:
        """Sets the values of a reference."""
        self.references.put(name, values, expires, record)

    def get_reference(self, name: str) -> ReferenceRow | None:
        """One reference, expired or not."""
        return self.references.get(name)

    def list_references(self) -> list[ReferenceRow]:
        """All references."""
        return self.references.list()

    def delete_reference(self, name: str, record: AuditRecord) -> None:
        """Withdraws a reference. UnknownError."""
        self.references.delete(name, record)

    def create_token(
        self, name: str, roles: Sequence[str], scope: str, expires: float | None, record: AuditRecord
    ) -> Secret:
        """A new token's text, in ASCII. ConflictError."""
        return self.tokens.create(name, roles, scope, expires, record)

    def find_token(self, token: str) -> TokenRow | None:
        """Whose token it is; None: nobody's, or expired."""
        return self.tokens.find(token)

    def list_tokens(self) -> list[TokenRow]:
        """All tokens, without their texts."""
        return self.tokens.list()

    def delete_token(self, name: str, record: AuditRecord) -> None:
        """Revokes a token. UnknownError."""
        self.tokens.delete(name, record)

    # ---- Keys of the broker's own

    def internal_key(self, name: str, make: Callable[[], Secret]) -> Secret:
        """A key that all brokers on this store share, e.g. the one that signs tokens: stored sealed, made by `make` at first."""

        def apply(connection: Connection) -> Secret:
            found = self._vault.internal(connection, name)
            if found is None:
                found = make()
                self._vault.put_internal(connection, name, found)
            return found

        found = self._database.read(lambda connection: self._vault.internal(connection, name))
        return found if found is not None else self.committer.run(Job(apply=apply))

    def rotate_master(self, master: MasterKey, record: AuditRecord) -> None:
        """Puts everything under a new key-encryption key, and that under `master`; it may be the same as before.

        Other brokers on this store cannot unseal anything more until they are started with the new master key.
        UnavailableError: nothing was changed; when it says that old bytes may remain: `erase`.
        """

        def apply(connection: Connection) -> KeyRing:
            return self._vault.rotate(connection, master)

        ring = self.committer.run(Job((record,), apply=apply, administrative=True))
        self._vault.adopt(ring, master)
        self.erase()

    def erase(self) -> None:
        """Overwrites what has been deleted, as far as the database can. UnavailableError."""
        self._database.erase()

    # ---- Audit

    def iterate_audit(self, *, after: int = 0, limit: int | None = None, **filters: str) -> Iterator[AuditEntry]:
        """Records in their order. In: filters   members of AuditRecord, its subject or policy that must equal a text."""
        return iterate_audit(self._database, after=after, limit=limit, filters=filters)

    def verify_audit(self, progress: Callable[[int], None] | None = None) -> AuditVerification:
        """Recomputes the log's hashes from the first record on and checks every signed head. UnavailableError."""
        return verify_audit(self._database, self.audit_public_key, self.identity, progress)


def _initialise(connection: Connection, master: MasterKey) -> None:
    identity = secrets.token_bytes(16)
    vault = Vault.create(connection, master)
    audit_key, rules_key = SM2PrivateKey.generate(), Secret.random(32)
    vault.put_internal(connection, _AUDIT_KEY, audit_key.secret())
    vault.put_internal(connection, _RULES_KEY, rules_key)
    names = {"identity": identity.hex(), "audit_key": audit_key.public_key.point.hex()}
    connection.execute(insert(schema.meta), [{"name": name, "value": value} for name, value in names.items()])
    digest, now = first_hash(identity), time.time_ns() // 1000
    row = {
        "id": 1, "generation": 0, "sequence": 0, "hash": digest, "time": now,
        "signature": sign_head(audit_key, identity, 0, now, digest), "headed_sequence": 0, "headed_time": now,
        "rules_version": 0, "rules_seal": initial_seal(rules_key),
    }  # fmt: skip
    connection.execute(insert(schema.chain), row)


def _load(connection: Connection, master: MasterKey) -> tuple[bytes, Vault, SM2PrivateKey, Secret]:
    text = connection.scalar(select(schema.meta.c.value).where(schema.meta.c.name == "identity"))
    try:
        identity = bytes.fromhex(text or "")
    except ValueError:
        identity = b""
    if len(identity) != 16:
        raise StateError("the store's identity is damaged")
    vault = Vault.open(connection, master)
    audit_key, rules_key = vault.internal(connection, _AUDIT_KEY), vault.internal(connection, _RULES_KEY)
    if audit_key is None or rules_key is None:
        raise StateError("the store's own keys are missing")
    return identity, vault, SM2PrivateKey(audit_key), rules_key
