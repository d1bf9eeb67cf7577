"""What administrators may do, through whichever door or command line, with a record of each change.

    keys     resources: put, rotate, retire, delete, list; read a content only to export it
    policy   policies, reference values, dry runs
    audit    read and verify the audit log

Roles are separate on purpose: whoever manages keys cannot decide who gets them. An administrator is known by a token, of which
the store keeps the hash alone, or by the certificate of his TLS connection.

`scope` is a glob over resource paths, "*" for everything; like a shell's, but its stars go beyond slashes. Who has less than
everything changes only policies of repositories that lie wholly within it; reference values and the policies that judge every
guest are not his. Of audit records and tokens he sees those of his scope.

Thread-safety: every method may be called from any thread, and waits for the store: event loops call them through a thread.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

from csvfast.broker.grounds import RESOURCE_POLICY, Grounds
from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import Door, ResourcePath
from csvfast.broker.policy import Decision, compile_policy
from csvfast.broker.policy import dry_run as explain
from csvfast.broker.store import AuditRecord, Job
from csvfast.crypto import Secret, SM2PublicKey
from csvfast.errors import (
    BrokerError,
    DeniedError,
    FormatError,
    LengthError,
    RequestError,
    StaleGenerationError,
    UnavailableError,
    UnknownError,
)

if TYPE_CHECKING:
    from csvfast.broker.limits import Limits
    from csvfast.broker.master import MasterKey
    from csvfast.broker.store import AuditVerification, PolicyRow, ReferenceRow, Resource, ResourceRow, Store, TokenRow

__all__ = ["CONTENT_LIMIT", "LOCAL", "ROLES", "Administration", "Administrator"]

ROLES: Final = frozenset(("keys", "policy", "audit"))
CONTENT_LIMIT: Final = 2 << 20
"""Bytes of one resource, CoCo's limit."""

_POLICY_LIMIT: Final = 1 << 20
_REFERENCES_LIMIT: Final = 10_000
_KEY_BYTES: Final = 32
_TRIES: Final = 8  # generations that may pass by while one resource is read
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Administrator:
    """Who asks: a name for the records, roles, and a glob that resource paths must match; until when, None: for ever."""

    name: str
    roles: frozenset[str]
    scope: str = "*"
    address: str = ""
    door: str = Door.ADMINISTRATION
    expires: float | None = None


_RESERVED: Final = ("guest", "local", "nobody")  # names of others in records

LOCAL: Final = Administrator("local", ROLES)
"""Whoever can open the store and its master key on this machine."""


class Administration:
    """Administrative calls over a store.

    In: store          open
        limits         counts failed authentications; None: none are expected (command line)
        certificates   SHA-256 of a client certificate's DER, hexadecimal -> administrator
        clock          seconds since the epoch
    """

    def __init__(
        self,
        store: Store,
        *,
        limits: Limits | None = None,
        certificates: Mapping[str, Administrator] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._limits = limits
        self._certificates = dict(certificates or {})
        self._clock = clock

    # ---- Who is it?

    def authenticate(
        self, token: str | None, certificate: str | None = None, *, address: str = "", door: str = Door.ADMINISTRATION
    ) -> Administrator:
        """The administrator behind a token, else behind a certificate's SHA-256 (hexadecimal).

        DeniedError for nobody, on record; LimitedError while the address is locked out.
        """
        if self._limits is not None:
            self._limits.check_request(address)
        if token is not None:
            found = self._store.find_token(token)
            if found is not None:
                return Administrator(found.name, frozenset(found.roles), found.scope, address, door, found.expires)
        elif certificate is not None and (known := self._certificates.get(certificate.lower())) is not None:
            return Administrator(known.name, known.roles, known.scope, address, door)
        if self._limits is not None:
            self._limits.note_failure(address)
        nobody = Administrator("nobody", frozenset(), "", address, door)
        what = "an unknown or expired token" if token is not None else "no token and no known certificate"
        raise self._refused(nobody, "authenticate", what)

    # ---- keys

    def put_resource(self, who: Administrator, path: ResourcePath, content: bytes | Secret) -> int:
        """A new version, which becomes the one that is released; older ones stay readable by number until retired.

        Out: its number. LengthError: empty, or more than CONTENT_LIMIT bytes.
        """
        self._require(who, "keys", "put resource", path)
        if not 0 < len(content) <= CONTENT_LIMIT:
            raise LengthError(f"resource {path}: {len(content)} bytes; expected 1 to {CONTENT_LIMIT}")
        return self._store.put_resource(path, content, self._record(who, "put resource", path))

    def rotate_resource(self, who: Administrator, path: ResourcePath) -> int:
        """A new version of random bytes, as many as the newest has. UnknownError. Out: its number."""
        self._require(who, "keys", "rotate resource", path)
        return self._store.rotate_resource(path, self._record(who, "rotate resource", path))

    def create_key(self, who: Administrator, path: ResourcePath) -> int:
        """A new random key of 32 bytes. Out: the version."""
        return self.put_resource(who, path, Secret.random(_KEY_BYTES))

    def read_resource(self, who: Administrator, path: ResourcePath, version: int | None = None) -> Resource:
        """A resource's content, for an administrator: on record before it is returned. UnknownError."""
        self._require(who, "keys", "read resource", path)
        for _ in range(_TRIES):
            generation = self._store.generation
            found = self._store.resource(path, version)
            if found is None:
                raise UnknownError(f"there is no resource {path}" + ("" if version is None else f" version {version}"))
            record = self._record(who, "read resource", path, resource_version=found.version)
            with suppress(StaleGenerationError):  # another process may have deleted what is remembered here
                self._store.committer.run(Job((record,), generation))
                return found
        raise UnavailableError("resources change faster than one can be read")

    def retire_resource(self, who: Administrator, path: ResourcePath, version: int) -> None:
        """A version is not released any more, but kept. UnknownError."""
        self._require(who, "keys", "retire resource", path)
        self._store.retire_resource(path, version, self._record(who, "retire resource", path, resource_version=version))

    def delete_resource(self, who: Administrator, path: ResourcePath) -> None:
        """All versions are destroyed, for good. UnknownError."""
        self._require(who, "keys", "delete resource", path)
        self._store.delete_resource(path, self._record(who, "delete resource", path))

    def list_resources(self, who: Administrator) -> list[ResourceRow]:
        """Paths, versions and states within the administrator's scope, without contents."""
        self._require(who, "keys", "list resources", None)
        return [row for row in self._store.list_resources() if fnmatchcase(str(row.path), who.scope)]

    def rotate_master(self, who: Administrator, master: MasterKey) -> None:
        """New key-encryption keys under another master key; every data key is wrapped anew, in one transaction."""
        self._require_everything(who, "keys", "rotate master")
        self._store.rotate_master(master, self._record(who, "rotate master", None, reason=master.identity))

    # ---- policy

    def put_policy(
        self,
        who: Administrator,
        kind: Literal["appraisal", "resource"],
        name: str,
        text: str,
        engine: Literal["rules", "rego"] = "rules",
    ) -> int:
        """Stores a policy after compiling it. FormatError says what is wrong with it. Out: its version."""
        self._require_policy(who, "put policy", kind, name)
        _check_name("policy id", name)
        if len(text.encode()) > _POLICY_LIMIT:
            raise FormatError("policy", "length", None, f"more than {_POLICY_LIMIT} bytes", f"at most {_POLICY_LIMIT}")
        compile_policy(kind, engine, text)
        record = self._record(who, "put policy", None, reason=f"{kind} {name} ({engine})")
        return self._store.put_policy(kind, name, engine, text, record)

    def get_policy(self, who: Administrator, kind: str, name: str, version: int | None = None) -> PolicyRow:
        """A stored policy, the newest unless told. UnknownError."""
        self._require(who, "policy", "get policy", None)
        found = self._store.get_policy(kind, name, version)
        if found is None:
            raise UnknownError(f"there is no {kind} policy {name!r}" + ("" if version is None else f" version {version}"))
        return found

    def list_policies(self, who: Administrator) -> list[PolicyRow]:
        """Every version of every stored policy."""
        self._require(who, "policy", "list policies", None)
        return self._store.list_policies()

    def delete_policy(self, who: Administrator, kind: str, name: str) -> None:
        """Back to the policy that csvfast ships, or to none. UnknownError."""
        self._require_policy(who, "delete policy", kind, name)
        self._store.delete_policy(kind, name, self._record(who, "delete policy", None, reason=f"{kind} {name}"))

    def dry_run(
        self,
        who: Administrator,
        kind: Literal["appraisal", "resource"],
        document: Mapping[str, Any],
        *,
        name: str | None = None,
        text: str | None = None,
        engine: Literal["rules", "rego"] = "rules",
    ) -> tuple[Decision, str]:
        """What a stored policy (`name`) or a new one (`text`) says of a document, and why: the first rule that fails."""
        self._require(who, "policy", "dry run", None)
        grounds = Grounds(self._store.snapshot())
        if text is not None:
            policy = compile_policy(kind, engine, text)
        elif name is not None:
            policy = (grounds.appraisal(name) if kind == "appraisal" else grounds.resource(name)).policy
        else:
            raise RequestError("dry run: expected the id of a policy, or its text")
        decision = policy.evaluate(document, grounds.references, self._clock())
        return decision, explain(policy, document, grounds.references, self._clock())

    def put_reference(self, who: Administrator, name: str, values: Sequence[Any], expires: float | None) -> None:
        """Sets the values of a reference. In: expires, seconds since the epoch; None: never."""
        self._require_everything(who, "policy", "put reference")
        _check_name("reference", name)
        if not 0 < len(values) <= _REFERENCES_LIMIT:
            raise LengthError(f"reference {name}: {len(values)} values; expected 1 to {_REFERENCES_LIMIT}")
        record = self._record(who, "put reference", None, reason=f"{name}: {len(values)} values")
        self._store.put_reference(name, list(values), expires, record)

    def get_reference(self, who: Administrator, name: str) -> ReferenceRow:
        """UnknownError."""
        self._require(who, "policy", "get reference", None)
        found = self._store.get_reference(name)
        if found is None:
            raise UnknownError(f"there is no reference value {name!r}")
        return found

    def list_references(self, who: Administrator) -> list[ReferenceRow]:
        """All of them, expired ones too."""
        self._require(who, "policy", "list references", None)
        return self._store.list_references()

    def delete_reference(self, who: Administrator, name: str) -> None:
        """UnknownError."""
        self._require_everything(who, "policy", "delete reference")
        self._store.delete_reference(name, self._record(who, "delete reference", None, reason=name))

    # ---- tokens

    def create_token(
        self, who: Administrator, name: str, roles: Sequence[str], *, scope: str = "*", expires: float | None = None
    ) -> Secret:
        """A new token's text, which exists only here; the store keeps its hash.

        An administrator gives no role, no scope and no time that he has not himself. Revoking his token leaves those he gave.
        """
        _check_name("token", name)
        if name in _RESERVED:
            raise RequestError(f"token {name!r}: expected another name, records use this one")
        wanted = frozenset(roles)
        if not wanted or not wanted <= ROLES:
            raise RequestError(f"roles {', '.join(sorted(wanted)) or 'none'}: expected some of {', '.join(sorted(ROLES))}")
        for role in wanted:
            self._require(who, role, "create token", None)
        if who.scope not in ("*", scope):
            raise self._refused(who, "create token", f"scope {scope!r} is not his own, {who.scope!r}")
        if who.expires is not None:
            expires = who.expires if expires is None else min(expires, who.expires)
        record = self._record(who, "create token", None, reason=f"{name}: {', '.join(sorted(wanted))}; scope {scope}")
        return self._store.create_token(name, sorted(wanted), scope, expires, record)

    def revoke_token(self, who: Administrator, name: str) -> None:
        """UnknownError. Needs every role the token has, and its scope or everything."""
        found = {row.name: row for row in self._store.list_tokens()}.get(name)
        if found is None:
            raise UnknownError(f"there is no token {name!r}")
        for role in found.roles:
            self._require(who, role, "revoke token", None)
        if who.scope not in ("*", found.scope):
            raise self._refused(who, "revoke token", f"scope {found.scope!r} is not his own, {who.scope!r}")
        self._store.delete_token(name, self._record(who, "revoke token", None, reason=name))

    def list_tokens(self, who: Administrator) -> list[TokenRow]:
        """Names, roles, scopes and times; no secrets. Those of the administrator's scope."""
        if not who.roles:
            raise self._refused(who, "list tokens", "has no role")
        return [row for row in self._store.list_tokens() if who.scope in ("*", row.scope)]

    # ---- audit

    def audit_records(self, who: Administrator, *, after: int = 0, limit: int = 100, **filters: str) -> Iterator[Any]:
        """Records in their order, each with its number. In: filters   members of AuditRecord that must be equal.

        An administrator of less than everything sees records of resources within his scope.
        """
        self._require(who, "audit", "read audit", None)
        if who.scope == "*":
            return self._store.iterate_audit(after=after, limit=limit, **filters)
        found = self._store.iterate_audit(after=after, limit=None, **filters)
        return islice((one for one in found if fnmatchcase(one.record.resource, who.scope)), limit)

    def verify_audit(self, who: Administrator, progress: Callable[[int], None] | None = None) -> AuditVerification:
        """Recomputes the chain from its first record and checks the signed heads."""
        self._require(who, "audit", "verify audit", None)
        return self._store.verify_audit(progress)

    def audit_public_key(self) -> SM2PublicKey:
        """The key that signs the heads; public, so no role is asked for."""
        return self._store.audit_public_key

    # ---- Behind it

    def _require(self, who: Administrator, role: str, action: str, path: ResourcePath | None) -> None:
        if role not in who.roles:
            raise self._refused(who, action, f"has not the role {role!r}", path)
        if path is not None and not fnmatchcase(str(path), who.scope):
            raise self._refused(who, action, f"{path} is outside the scope {who.scope!r}", path)

    def _require_everything(self, who: Administrator, role: str, action: str) -> None:
        self._require(who, role, action, None)
        if who.scope != "*":
            raise self._refused(who, action, f"scope {who.scope!r} is not everything")

    def _require_policy(self, who: Administrator, action: str, kind: str, name: str) -> None:
        """Everything, but for the resource policy of a repository that lies wholly within the scope."""
        repository = who.scope.removesuffix("/*").removesuffix("/*")
        if kind == "resource" and name != RESOURCE_POLICY and "/" not in repository and repository != who.scope:
            self._require(who, "policy", action, None)
            if fnmatchcase(name, repository):
                return
        self._require_everything(who, "policy", action)

    def _refused(self, who: Administrator, action: str, why: str, path: ResourcePath | None = None) -> DeniedError:
        record = self._record(who, action, path, outcome="denied", reason=f"{who.name}: {why}")
        event(_log, logging.WARNING, "denied", actor=who.name, action=action, reason=why, correlation=record.correlation)
        try:
            self._store.committer.submit(Job((record,), expendable=True))
        except BrokerError as error:
            event(_log, logging.ERROR, "denial not on record", correlation=record.correlation, error=str(error))
        return DeniedError(f"{who.name}: {action}: {why}", record.correlation)

    def _record(
        self,
        who: Administrator,
        action: str,
        path: ResourcePath | None,
        *,
        outcome: str = "allowed",
        reason: str = "",
        resource_version: int | None = None,
    ) -> AuditRecord:
        return AuditRecord(
            time=int(self._clock() * 1e6),
            correlation=new_correlation(),
            door=who.door,
            action=action,
            outcome=outcome,
            actor=who.name,
            address=who.address,
            subject={},
            resource="" if path is None else str(path),
            resource_version=resource_version,
            policy={},
            reason=reason[:1000],
        )


def _check_name(what: str, name: str) -> None:
    if not 0 < len(name) <= 128 or not all(ch.isascii() and (ch.isalnum() or ch in "._-") for ch in name):
        raise RequestError(f"{what} {ascii(name)[:80]}: expected 1 to 128 letters, digits, '.', '_', '-'")


def certificate_fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate's DER, hexadecimal: what Administration's `certificates` are named by."""
    return hashlib.sha256(der).hexdigest()

