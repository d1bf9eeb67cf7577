"""The audit log: one record a decision, each hash over all before it, the last hash signed.

    hash(0) = SM3("csvfast audit log 1" || identity of the store)
    hash(n) = SM3(hash(n - 1) || record(n))          record(n): canonical JSON, UTF-8
    head    = SM2 signature by the store's audit key over "csvfast audit head 1" || identity || n || time || hash(n)

Canonical JSON: members sorted, no blanks, nothing escaped but what JSON demands. n and time (microseconds since the epoch) are 8 bytes,
big-endian; the identity is 16 bytes. Signed heads are kept every HEAD_RECORDS records, and after HEAD_SECONDS at the latest, so that
whoever holds one (or the public key) can show later what has been changed since.

No record holds key material. Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, select

from csvfast.broker.store import schema
from csvfast.crypto import SM2PrivateKey, SM2PublicKey, sm3
from csvfast.errors import RequestError, SignatureError

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
    members = {
        "action": record.action,
        "actor": record.actor,
        "address": record.address,
        "correlation": record.correlation,
        "door": record.door,
        "outcome": record.outcome,
        "policy": record.policy if type(record.policy) is dict else dict(record.policy),
        "reason": record.reason,
        "resource": record.resource,
        "resource_version": record.resource_version,
        "subject": record.subject if type(record.subject) is dict else dict(record.subject),
        "time": record.time,
    }
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


def record_of(text: str) -> AuditRecord:
    """A record from its canonical text. ValueError, TypeError when it is none."""
    return AuditRecord(**json.loads(text))


def first_hash(identity: bytes) -> bytes:
    """What the first record follows."""
    return sm3(b"csvfast audit log 1" + identity).digest()


def _head(identity: bytes, sequence: int, time: int, digest: bytes) -> bytes:
    return b"csvfast audit head 1" + identity + sequence.to_bytes(8, "big") + time.to_bytes(8, "big") + digest


def sign_head(key: SM2PrivateKey, identity: bytes, sequence: int, time: int, digest: bytes) -> bytes:
    """Signature of a head, 64 bytes."""
    return key.sign(_head(identity, sequence, time, digest))


def verify_head(key: SM2PublicKey, identity: bytes, sequence: int, time: int, digest: bytes, signature: bytes) -> bool:
    """True when the audit key has signed that head."""
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
    RequestError: no such member. UnavailableError.
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
            record = record_of(text)
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

    A page of records is in memory at a time. In: progress   is told how many records are done.
    UnavailableError.
    """
    chain, heads = schema.chain, schema.audit_heads
    row = select(chain.c.sequence, chain.c.time, chain.c.hash, chain.c.signature).where(chain.c.id == 1)
    last = database.read(lambda connection: connection.execute(row).one_or_none())
    if last is None:
        return AuditVerification(0, None, "the chain's own row is missing", False)
    head_good = verify_head(key, identity, *last)
    digest, done = first_hash(identity), 0
    while True:
        page = database.read(lambda connection, after=done: _page(connection, after))  # type: ignore[misc]
        if not page:
            break
        signed = database.read(
            lambda connection, low=done, high=page[-1][0]: connection.execute(  # type: ignore[misc]
                select(heads.c.sequence, heads.c.time, heads.c.hash, heads.c.signature)
                .where(heads.c.sequence > low, heads.c.sequence <= high)
            ).all()
        )  # fmt: skip
        marks = {one[0]: one for one in signed}
        for sequence, record, stored in page:
            if sequence != done + 1:
                return AuditVerification(done, done + 1, f"record {done + 1} is missing; the next is {sequence}", head_good)
            expected = sm3(digest + record.encode(errors="surrogatepass")).digest()
            if stored != expected:
                return AuditVerification(
                    done, sequence, f"record {sequence} is not what was hashed: its text or hash was changed", head_good
                )
            digest, done = expected, sequence
            mark = marks.get(sequence)
            if mark is not None:
                if not verify_head(key, identity, *mark):
                    problem = f"the signed head at record {sequence} is not signed by the audit key"
                    return AuditVerification(done, sequence, problem, head_good)
                if mark[2] != digest:
                    problem = f"records up to {sequence} follow one another, but are not those whose head was signed"
                    return AuditVerification(done, sequence, problem, head_good)
            if sequence == last[0] and last[2] != digest:
                problem = f"the chain's head at record {sequence} has another hash than the record"
                return AuditVerification(done, sequence, problem, head_good)
        if progress is not None:
            progress(done)
    if done == 0 and last[0] == 0 and last[2] != digest:
        return AuditVerification(0, None, "the empty log's hash is wrong", head_good)
    final, strays = database.read(
        lambda connection: (
            connection.execute(row).one_or_none(),
            connection.scalar(select(func.count()).select_from(heads).where(heads.c.sequence > done)),
        )
    )
    if done < last[0] or final is None:
        problem = f"the log ends at record {done}, but {last[0]} were written"
        return AuditVerification(done, done + 1, problem, head_good)
    if final[0] < done:
        problem = f"record {final[0] + 1} and later ones were not written by the broker: its head is {final[0]}"
        return AuditVerification(done, final[0] + 1, problem, head_good)
    if strays and final[0] == done:
        return AuditVerification(done, done + 1, "there are signed heads of records that are missing", head_good)
    if not head_good:
        return AuditVerification(done, None, "the chain's head is not signed by the audit key", False)
    return AuditVerification(done, None, "", True)


def _page(connection: Connection, after: int) -> list[Any]:
    table = schema.audit
    query = select(table.c.sequence, table.c.record, table.c.hash).where(table.c.sequence > after)
    return list(connection.execute(query.order_by(table.c.sequence).limit(_PAGE)).all())
