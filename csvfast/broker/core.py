"""The broker itself, whatever the door: who is asking, may he have it, and is that on record before he has it.

    guest's evidence ──verify──> genuine ──appraise──> attestation ──release──> resource policy, limits,
                                                                               audit record durable, then the secret

Decisions rest on the policies and references of one generation of the store (`grounds`). A decision's audit record is written
only while that generation holds, in the transaction that locks it; when an administrator was quicker, the decision is made again.
So a key that has been revoked, or a reference value that has been withdrawn, is not released by any broker on the same store from
the moment on at which the administrator's command has returned.

Thread-safety: one event loop; `record_refusal` and the judges may be used from its worker threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from csvfast.broker.attestation import (
    Attestation,
    JudgedAppraisal,
    Trust,
    appraise_again,
    appraise_guest,
    digest_of,
    judged,
    verify_guest,
)
from csvfast.broker.grounds import Compiled, Grounds
from csvfast.broker.logs import event, new_correlation
from csvfast.broker.policy import Decision, resource_document
from csvfast.broker.store import AuditRecord, Job
from csvfast.errors import (
    CsvfastError,
    DeniedError,
    LimitedError,
    RequestError,
    StaleGenerationError,
    UnavailableError,
    VerificationError,
)
from csvfast.ratstls.claims import report_data_of
from csvfast.ratstls.recent import Recent

if TYPE_CHECKING:
    from csvfast.attest import Verified
    from csvfast.broker.limits import Limits
    from csvfast.broker.model import ResourcePath
    from csvfast.broker.store import Resource, Store
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.peer import Peer
    from csvfast.report import Evidence

__all__ = ["Broker", "GuestJudge"]

_log: Final = logging.getLogger(__name__)
_NO_QUERY: Final[Mapping[str, str]] = MappingProxyType({})
_TRIES: Final = 8  # generations that may pass by while one decision is made
_REASON_LIMIT: Final = 1000
_JUDGES: Final = 8  # threads for verifying that may wait
_JUDGING: Final = 128  # guests in them and before them


class _Case(NamedTuple):
    """One request, for its records."""

    action: str
    path: ResourcePath | None
    door: str
    address: str
    correlation: str


class GuestJudge:
    """Verifies and appraises guests during a TLS handshake, by the broker's roots and policies. See csvfast.ratstls.Judge."""

    def __init__(self, broker: Broker, door: str) -> None:
        self._broker = broker
        self.door: Final = door
        # What guests that were allowed have proved: it holds for the same bytes. What it is worth is decided anew as soon as
        # anything has changed that an appraisal rests on.
        self._known: Recent[tuple[Verified, Attestation]] = Recent()

    @property
    def blocking(self) -> bool:
        """True when judging may wait: for a policy in a worker process, a database elsewhere."""
        return self._broker.grounds_block

    def verify(self, certificate: AttestedCertificate) -> Verified:
        """Is it genuine, and about this certificate's claims?"""
        buffer, evidence = certificate.buffer, certificate.evidence
        if buffer is None or evidence is None:
            raise VerificationError("evidence", "the certificate carries none")
        known = self._known.find(_proof(certificate))
        if known is not None:
            return known[0]
        return verify_guest(self._broker.trust, evidence, report_data_of(buffer.claims))

    def appraise(self, verified: Verified, certificate: AttestedCertificate) -> JudgedAppraisal:
        """Is it allowed, by the appraisal policy?"""
        broker, buffer = self._broker, certificate.buffer
        assert buffer is not None
        proof = _proof(certificate)
        known = self._known.find(proof)
        if known is not None and known[0] is verified and broker.holds(known[1]):
            return judged(known[1])
        custom = {} if certificate.claims is None else {name: value.hex() for name, value in certificate.claims.custom.items()}

        def judge(grounds: Grounds) -> Attestation:
            return appraise_guest(
                verified,
                grounds,
                evidence_digest=digest_of(buffer.raw),
                key=certificate.spki_sha256.hex(),
                custom=custom,
                now=broker.clock(),
            )

        attestation = judge(broker.grounds())
        if not attestation.allowed:
            # Perhaps another process has allowed it meanwhile; a refusal is worth a look at the database.
            grounds = broker.grounds(look=True)
            if grounds.generation != attestation.generation:
                attestation = judge(grounds)
        if attestation.allowed:
            self._known.keep(proof, (verified, attestation))
        return judged(attestation)


def _proof(certificate: AttestedCertificate) -> bytes:
    """All that a judgement rests on: key, claims, evidence. Not the certificate: fresh evidence comes without a new one."""
    buffer = certificate.buffer
    assert buffer is not None
    return b"".join((certificate.spki_sha256, hashlib.sha256(buffer.claims).digest(), buffer.raw))


class Broker:
    """Attests guests and releases resources. The doors translate their protocols into calls of this class.

    In: store     where keys, policies and the audit log are; open
        trust     from where evidence must come
        limits    rates, lock-outs, quotas
        clock     seconds since the epoch
    """

    def __init__(self, store: Store, trust: Trust, limits: Limits, *, clock: Callable[[], float] = time.time) -> None:
        if not trust.roots:
            raise VerificationError("HRK", "no trusted root was given, so no guest can be genuine")
        self.store: Final = store
        self.trust: Final = trust
        self.limits: Final = limits
        self.clock: Final = clock
        self._grounds = Grounds(store.snapshot())
        self._remote_store = not store.is_local
        self._judges: Final = ThreadPoolExecutor(_JUDGES, "csvfast-judge")
        self._judging: Final = threading.BoundedSemaphore(_JUDGING)

    # ---- What decisions rest on

    def grounds(self, *, look: bool = False) -> Grounds:
        """Policies and references of the generation seen last. Reads the database only when that has changed.

        In: look   ask the database whether it has changed
        UnavailableError, FormatError.
        """
        if look:
            self.store.look()
        if self._grounds.generation != self.store.generation:
            self._grounds = Grounds(self.store.snapshot(), self._grounds)
        return self._grounds

    @property
    def grounds_block(self) -> bool:
        """True when `grounds` or a policy may wait for something outside this process."""
        return self._remote_store or self._grounds.blocking

    async def _current_grounds(self) -> Grounds:
        if self._grounds.generation == self.store.generation:
            return self._grounds
        return await asyncio.to_thread(self.grounds)

    # ---- Guests

    def judge(self, door: str) -> GuestJudge:
        """For the TLS layer of a door."""
        return GuestJudge(self, door)

    def attestation_of(self, peer: Peer) -> Attestation:
        """What our judge found out about a TLS peer. RequestError when the peer was accepted without evidence."""
        if not isinstance(peer.appraisal, JudgedAppraisal):
            raise RequestError("this connection's peer has not been attested")
        return peer.appraisal.attestation

    async def attest(
        self,
        evidence: Evidence | bytes,
        report_data: bytes,
        *,
        encoded: bytes,
        door: str,
        address: str,
        correlation: str,
        tee: str = "csv",
        key: str = "",
        custom: Mapping[str, str] | None = None,
        init_data: Mapping[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
    ) -> Attestation:
        """Verifies and appraises evidence that came in a message, and puts the outcome on record.

        In: report_data   64 bytes that the report must carry
            encoded       the evidence as it came, for its digest
            key           which key it is bound to, hexadecimal
        DeniedError when it is not genuine or not allowed, LimitedError, UnavailableError.
        """
        case = _Case("attest", None, door, address, correlation)
        subject: Mapping[str, str] = {"tee": tee, "evidence": digest_of(encoded), "key": key}
        self.limits.check_request(address)
        for _ in range(_TRIES):
            grounds = await self._current_grounds()

            def judge(grounds: Grounds = grounds) -> Attestation:
                verified = verify_guest(self.trust, evidence, report_data)
                return appraise_guest(
                    verified,
                    grounds,
                    evidence_digest=subject["evidence"],
                    key=key,
                    tee=tee,
                    custom=custom,
                    init_data=init_data,
                    runtime=runtime,
                    now=self.clock(),
                )

            try:
                if self.trust.blocking or grounds.blocking:
                    attestation = await self._elsewhere(judge)
                else:
                    attestation = judge()
            except LimitedError:
                raise
            except CsvfastError as error:
                await self._deny(case, f"evidence not genuine: {error}", subject, {}, None)
            try:
                await self._require_allowed(case, attestation)
                record = self._record(case, "allowed", "", attestation.subject(), attestation.policy)
                await self.store.committer.commit(Job((record,), grounds.generation))
            except StaleGenerationError:
                continue
            return attestation
        raise UnavailableError("policies change faster than one decision can be made")

    async def _elsewhere(self, judge: Callable[[], Attestation]) -> Attestation:
        """Judges in a thread. LimitedError: too many guests wait for theirs.

        The threads are not those of asyncio.to_thread: strangers can make them wait for a key server, and nobody else with them.
        """
        if not self._judging.acquire(blocking=False):
            raise LimitedError(f"{_JUDGING} guests wait to be verified", 1.0)
        judgement = self._judges.submit(judge)
        judgement.add_done_callback(lambda _done: self._judging.release())  # not when the guest has gone: the thread is busy
        return await asyncio.wrap_future(judgement)

    # ---- Resources

    async def release(
        self,
        attestation: Attestation,
        path: ResourcePath,
        *,
        door: str,
        address: str,
        correlation: str,
        plugin: str = "resource",
        query: Mapping[str, str] = _NO_QUERY,
        action: str = "release",
    ) -> Resource:
        """A resource for an attested guest. When this returns, its record is on disk; before, nobody has seen the content.

        In: query    of the request; "version": an older version that is not retired
            action   "release", or "unwrap" when the key is used here and does not leave
        DeniedError: not allowed, or there is none (the peer is not told which). LimitedError, UnavailableError.
        """
        case = _Case(action, path, door, address, correlation)
        version = _version(query)
        for _ in range(_TRIES):
            grounds = await self._current_grounds()
            try:
                attestation = await self._still(case, attestation, grounds)
                subject = attestation.subject()
                await self._require_allowed(case, attestation)
                try:
                    self.limits.check_release(attestation.key or attestation.evidence_digest, str(path))
                except LimitedError as error:
                    await self._note(case, f"limit: {error}", subject)
                    raise
                compiled = grounds.resource(path.repository)
                policy = self._both(attestation, compiled)
                document = resource_document(path, plugin, query, attestation.token_claims())
                decision = await self._evaluate(compiled, document, grounds)
                if not decision.allowed:
                    await self._deny(case, _explained("resource policy", decision), subject, policy, grounds.generation)
                resource = await self._resource(path, version)
                if resource is None:
                    reason = "there is no such resource, or it is retired"
                    await self._deny(case, reason, subject, policy, grounds.generation)
                record = self._record(case, "allowed", "", subject, policy, resource.version)
                await self.store.committer.commit(Job((record,), grounds.generation))
            except StaleGenerationError:
                continue
            return resource
        raise UnavailableError("policies change faster than one decision can be made")

    async def _require_allowed(self, case: _Case, attestation: Attestation) -> None:
        if not attestation.allowed:
            reason = _explained("appraisal", attestation.decision)
            # A guest known by another issuer's token alone was judged under no generation of ours.
            generation = attestation.generation if attestation.document else None
            await self._deny(case, reason, attestation.subject(), attestation.policy, generation)

    def holds(self, attestation: Attestation) -> bool:
        """Whether an appraisal is still what it would be now, as far as this process knows: `release` finds out for certain."""
        until = attestation.valid_until
        return attestation.generation == self.grounds().generation and (until is None or self.clock() < until)

    async def _still(self, case: _Case, attestation: Attestation, grounds: Grounds) -> Attestation:
        """The attestation as the grounds of now see it."""
        until = attestation.valid_until
        if attestation.generation == grounds.generation and (until is None or self.clock() < until):
            return attestation
        if not attestation.document:  # known by a token alone: what it says holds until it expires
            if until is not None and self.clock() >= until:
                await self._deny(case, "the token has expired", attestation.subject(), attestation.policy, None)
            return attestation
        if grounds.blocking:
            return await asyncio.to_thread(appraise_again, attestation, grounds, self.clock())
        return appraise_again(attestation, grounds, self.clock())

    async def _evaluate(self, compiled: Compiled, document: Mapping[str, Any], grounds: Grounds) -> Decision:
        if compiled.policy.blocking:
            return await asyncio.to_thread(compiled.policy.evaluate, document, grounds.references, self.clock())
        return compiled.policy.evaluate(document, grounds.references, self.clock())

    async def _resource(self, path: ResourcePath, version: int | None) -> Resource | None:
        found = self.store.cached_resource(path, version)
        return found if found is not None else await asyncio.to_thread(self.store.resource, path, version)

    @staticmethod
    def _both(attestation: Attestation, compiled: Compiled) -> Mapping[str, Any]:
        return {
            **attestation.policy,
            "resource": compiled.id,
            "resource_version": compiled.version,
            "resource_digest": compiled.policy.digest,
        }

    # ---- On record

    def record_refusal(
        self, *, door: str, address: str, reason: str, correlation: str = "", subject: Mapping[str, str] | None = None
    ) -> None:
        """A peer that was refused before it could ask: on record, but not waited for. Never raises."""
        correlation = correlation or new_correlation()
        event(_log, logging.WARNING, "refused", door=door, address=address, correlation=correlation, reason=reason)
        self.limits.note_failure(address)
        record = self._record(_Case("attest", None, door, address, correlation), "denied", reason, subject or {}, {})
        try:
            self.store.committer.submit(Job((record,), expendable=True))
        except CsvfastError as error:
            event(_log, logging.ERROR, "refusal not on record", correlation=correlation, error=str(error))

    async def _deny(
        self, case: _Case, reason: str, subject: Mapping[str, str], policy: Mapping[str, Any], generation: int | None
    ) -> NoReturn:
        """Puts a refusal on record and raises it. StaleGenerationError: it may be allowed by now."""
        if generation is not None:
            # Somebody may have allowed it in another process, of which nothing was heard yet.
            await asyncio.to_thread(self.store.look)
        try:
            await self.store.committer.commit(Job((self._record(case, "denied", reason, subject, policy),), generation))
        except UnavailableError as error:
            event(_log, logging.ERROR, "denial not on record", correlation=case.correlation, error=str(error))
        self.limits.note_failure(case.address)
        self._tell("denied", case, reason)
        raise DeniedError(reason, case.correlation)

    async def _note(self, case: _Case, reason: str, subject: Mapping[str, str]) -> None:
        self._tell("limited", case, reason)
        # One guest asking as fast as it can: others' records go first.
        await self.store.committer.commit(Job((self._record(case, "denied", reason, subject, {}),), expendable=True))

    @staticmethod
    def _tell(what: str, case: _Case, reason: str) -> None:
        event(_log, logging.WARNING, what, reason=reason, **{k: v for k, v in case._asdict().items() if v is not None})

    def _record(
        self,
        case: _Case,
        outcome: str,
        reason: str,
        subject: Mapping[str, str],
        policy: Mapping[str, Any],
        version: int | None = None,
    ) -> AuditRecord:
        return AuditRecord(
            time=int(self.clock() * 1e6),
            correlation=case.correlation,
            door=case.door,
            action=case.action,
            outcome=outcome,
            actor="guest",
            address=case.address,
            subject=subject,
            resource="" if case.path is None else str(case.path),
            resource_version=version,
            policy=policy,
            reason=reason[:_REASON_LIMIT],
        )


def _explained(what: str, decision: Decision) -> str:
    return f"{what}: {decision.rule}: found {decision.observed}; expected {decision.expected}"


def _version(query: Mapping[str, str]) -> int | None:
    text = query.get("version")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 9):
        raise RequestError("version: expected a decimal number")
    return int(text)
