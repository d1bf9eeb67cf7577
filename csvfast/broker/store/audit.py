"""The audit log: one record a decision, each hash over all before it, the last hash signed.

    hash(0) = SM3("csvfast audit log 1" || identity of the store)
    hash(n) = SM3(hash(n - 1) || record(n))          record(n): canonical JSON, UTF-8
    head    = SM2 signature by the store's audit key of "csvfast audit head 1" || identity || n || time || hash(n)

Canonical JSON: members sorted, no blanks, nothing escaped but what JSON demands. n and time (microseconds since the epoch) are 8
bytes, big-endian; the identity is 16 bytes. Signed heads are kept every HEAD_RECORDS records, and HEAD_SECONDS at the latest:
between two of them nothing can be changed without the audit key, not even by whoever computes all hashes anew.

No record holds key material. Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, select

from csvfast.broker.store import schema
from csvfast.crypto import SM2PrivateKey, SM2PublicKey, sm3
from csvfast.errors import RequestError, SignatureError, StateError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from csvfast.broker.store.database import Database

__all__ = [
    "HEAD_RECORDS",
    "HEAD_SECONDS",
    "AuditEntry",
    "AuditRecord",
    "AuditVerification",
    "canonical",
    "first_hash",
    "iterate_audit",
    "sign_head",
    "verify_audit",
    "verify_head",
]

HEAD_RECORDS: Final = 1000
HEAD_SECONDS: Final = 60

_TEXT_LIMIT: Final = 1 << 14  # characters of a record that are taken as they come
_MEMBER_LIMIT: Final = 1000  # characters of one member of a longer one
_PAGE: Final = 2000  # records read in one transaction


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """Who asked for what, on which grounds, and what came of it.

    time               microseconds since the epoch, by the clock of the broker that decided
    correlation        what the peer was told
    door, action       e.g. "kbs", "release"
    outcome            "allowed", "denied" or "failed"
    actor, address     "guest" or an administrator's name; where from
    subject            of a guest: chip_id, cek, measure, evidence (digest), key, tee
    resource, resource_version
    policy             ids, versions and digests of the policies that decided
    reason             for operators
    """

    time: int
    correlation: str
    door: str
    action: str
    outcome: str
    actor: str = ""
    address: str = ""
    subject: Mapping[str, str] = field(default_factory=dict)
    resource: str = ""
    resource_version: int | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


    def to_dict(self) -> dict[str, Any]:
        """All members as JSON values."""
        return {
            "action": self.action,
            "actor": self.actor,
            "address": self.address,
            "correlation": self.correlation,
            "door": self.door,
            "outcome": self.outcome,
            "policy": self.policy if type(self.policy) is dict else dict(self.policy),
            "reason": self.reason,
            "resource": self.resource,
            "resource_version": self.resource_version,
            "subject": self.subject if type(self.subject) is dict else dict(self.subject),
            "time": self.time,
        }


class AuditEntry(NamedTuple):
    """A record and its number, 1 for the first."""

    sequence: int
    record: AuditRecord


@dataclass(frozen=True, slots=True)
class AuditVerification:
    """What became of a verification.

    count       records that follow one from another, from the first on
    bad         number of the first record that does not, else None
    problem     what is wrong, in words; "" when nothing is
    head        True when the last hash is signed by the store's audit key
    """

    count: int
    bad: int | None
    problem: str
    head: bool

    @property
    def intact(self) -> bool:
        """True when every record and the head are as they were written."""
        return self.head and not self.problem


_encode: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False, allow_nan=False
).encode


def canonical(record: AuditRecord) -> bytes:
    """The bytes that are hashed. HOT.

    Text that a peer chose may be anything: what UTF-8 cannot hold is replaced, members of a record too long are cut.
    """
    members = record.to_dict()
    text = _encode(members)
    if len(text) > _TEXT_LIMIT:
        text = _encode({name: _cut(value) for name, value in members.items()})
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return text.encode(errors="replace")


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name)[:64]: _cut(item) for name, item in list(value.items())[:12]}
    return value if value is None or isinstance(value, int) else str(value)[:_MEMBER_LIMIT]


def first_hash(identity: bytes) -> bytes:
    """What the first record follows."""
    return sm3(b"csvfast audit log 1" + identity).digest()


def _head(identity: bytes, sequence: int, time: int, digest: bytes) -> bytes:
    return b"csvfast audit head 1" + identity + sequence.to_bytes(8, "big") + time.to_bytes(8, "big") + digest


def sign_head(key: SM2PrivateKey, identity: bytes, sequence: int, time: int, digest: bytes) -> bytes:
    """Signature of a head, 64 bytes."""
    return key.sign(_head(identity, sequence, time, digest))


def verify_head(key: SM2PublicKey, identity: bytes, sequence: Any, time: Any, digest: Any, signature: Any) -> bool:
    """True when the audit key has signed that head. What comes out of a database may be of any type."""
    if not (type(sequence) is int and type(time) is int and type(digest) is bytes and type(signature) is bytes):
        return False
    if not (0 <= sequence < 1 << 63 and 0 <= time < 1 << 63 and len(digest) == 32 and len(signature) == 64):
        return False
    try:
        key.verify(signature, _head(identity, sequence, time, digest))
    except SignatureError:
        return False
    return True


# ---- Reading


def iterate_audit(
    database: Database, *, after: int = 0, limit: int | None = None, filters: Mapping[str, str] | None = None
) -> Iterator[AuditEntry]:
    """Records after a number, in their order, a page a transaction.

    In: filters   member of AuditRecord, of its subject or of its policy -> text that it must equal
    RequestError: no such member. StateError: a record that is none. UnavailableError.
    """
    wanted = dict(filters or {})
    for name in wanted:
        if name not in _FILTERS:
            raise RequestError(f"filter {ascii(name)[:40]}: expected one of {', '.join(sorted(_FILTERS))}")
    table = schema.audit
    query = select(table.c.sequence, table.c.record).order_by(table.c.sequence)
    for value in wanted.values():
        # The value as it stands in the record's text; which member it belongs to is looked at below.
        query = query.where(table.c.record.contains(_encode(str(value))[1:-1], autoescape=True))
    return _entries(database, query, wanted, after, limit)


_FILTERS: Final = {one.name for one in fields(AuditRecord)} - {"subject", "policy"} | {
    "chip_id", "cek", "measure", "vm_id", "evidence", "key", "tee", "appraisal", "appraisal_digest", "resource_digest",
}  # fmt: skip


def _entries(database: Database, query: Any, wanted: Mapping[str, str], after: int, limit: int | None) -> Iterator[AuditEntry]:
    left = limit
    while left is None or left > 0:
        page = query.where(schema.audit.c.sequence > after).limit(_PAGE)
        rows = database.read(lambda connection, page=page: connection.execute(page).all())  # type: ignore[misc]
        for sequence, text in rows:
            try:
                record = AuditRecord(**json.loads(text))
            except (TypeError, ValueError):
                raise StateError(f"audit record {sequence} has been changed and cannot be read; verify the log") from None
            if all(_matches(record, name, str(value)) for name, value in wanted.items()):
                yield AuditEntry(sequence, record)
                if left is not None:
                    left -= 1
                    if left == 0:
                        return
        if len(rows) < _PAGE:
            return
        after = rows[-1][0]


def _matches(record: AuditRecord, name: str, value: str) -> bool:
    found = getattr(record, name, None)
    if found is None:
        found = record.subject.get(name, record.policy.get(name))
    return found is not None and str(found) == value


# ---- Verifying


def verify_audit(
    database: Database, key: SM2PublicKey, identity: bytes, progress: Callable[[int], None] | None = None
) -> AuditVerification:
    """Recomputes every hash from the first record on and checks every signed head on the way.

    Records that are written meanwhile may or may not be looked at. A page of records is in memory at a time.
    In: progress   is told, page by page, how many more records are done
    UnavailableError.
    """
    last = database.read(_chain_head)
    signed = last is not None and verify_head(key, identity, *last)
    walk = _Walk(key, identity, last if signed else None)
    try:
        while page := database.read(lambda connection: _page(connection, walk.sequence)):
            before = walk.sequence
            walk.follow(*page)
            if progress is not None:
                progress(walk.sequence - before)
        walk.end(*database.read(lambda connection: (_chain_head(connection), _last_mark(connection))))
    except _BrokenError as broken:
        return AuditVerification(walk.sequence, broken.sequence, str(broken), signed)
    problem = "" if signed else "the head of the log is missing, or not signed by the audit key"
    return AuditVerification(walk.sequence, None, problem, signed)


class _BrokenError(Exception):
    """What is wrong, and the first record that is."""

    def __init__(self, sequence: int | None, problem: str) -> None:
        super().__init__(problem)
        self.sequence = sequence


class _Walk:
    """Along the chain: the last record that followed, and its hash.

    In: last   number, time, hash and signature of the log's head when the walk begins; None: not known
    """

    def __init__(self, key: SM2PublicKey, identity: bytes, last: Any) -> None:
        self.key, self.identity = key, identity
        self.sequence, self.digest = 0, first_hash(identity)
        self.last: int = 0 if last is None else last[0]
        self.last_hash: bytes = b"" if last is None else last[2]

    def follow(self, records: Sequence[Any], marks: Mapping[int, Any]) -> None:
        """A page of (sequence, text, hash), and the signed heads among them by number."""
        for sequence, text, stored in records:
            if sequence != self.sequence + 1:
                raise _BrokenError(self.sequence + 1, f"is missing; the next is record {sequence}")
            try:
                digest = sm3(self.digest + text.encode()).digest()
            except (AttributeError, UnicodeEncodeError):  # SQLite takes any type anywhere
                raise _BrokenError(sequence, "its text is none") from None
            if stored != digest:
                raise _BrokenError(sequence, "its text or its hash has been changed, or it stands in another's place")
            if sequence in marks:
                self._mark(marks[sequence], digest)
            if sequence == self.last and self.last_hash != digest:
                raise _BrokenError(sequence, "is not the record whose hash is the log's signed head")
            self.sequence, self.digest = sequence, digest

    def _mark(self, mark: Any, digest: bytes) -> None:
        if not verify_head(self.key, self.identity, *mark):
            raise _BrokenError(mark[0], "the signed head kept for it is not signed by the audit key")
        if mark[2] != digest:
            raise _BrokenError(mark[0], "records up to it follow one another, but the signed head kept for it says others did")

    def end(self, last: Any, mark: int) -> None:
        """After the last record. In: the log's head as it is now, and the number of the last signed head that was kept."""
        if self.sequence < self.last:
            raise _BrokenError(self.sequence + 1, f"is missing, as all that follow; the log had {self.last}")
        if last is None or not verify_head(self.key, self.identity, *last):
            return  # said already
        if last[0] < self.sequence:
            raise _BrokenError(last[0] + 1, f"was not written by the broker: the log's signed head is record {last[0]}")
        if last[0] < mark:
            raise _BrokenError(last[0] + 1, f"is missing, as all that follow; there is a signed head of record {mark}")


def _chain_head(connection: Connection) -> Any:
    chain = schema.chain
    query = select(chain.c.sequence, chain.c.time, chain.c.hash, chain.c.signature).where(chain.c.id == 1)
    return connection.execute(query).one_or_none()


def _last_mark(connection: Connection) -> int:
    found = connection.scalar(select(func.max(schema.audit_heads.c.sequence)))
    return found if type(found) is int else 0


def _page(connection: Connection, after: int) -> tuple[list[Any], dict[int, Any]] | None:
    table, heads = schema.audit, schema.audit_heads
    query = select(table.c.sequence, table.c.record, table.c.hash).where(table.c.sequence > after)
    records = list(connection.execute(query.order_by(table.c.sequence).limit(_PAGE)).all())
    if not records:
        return None
    marks = select(heads.c.sequence, heads.c.time, heads.c.hash, heads.c.signature).where(
        heads.c.sequence > after, heads.c.sequence <= records[-1][0]
    )
    return records, {mark[0]: mark for mark in connection.execute(marks)}
