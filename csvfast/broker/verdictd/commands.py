"""What Verdictd's commands do: each asks the broker, and words the reply.

A list of keys or blobs is answered as a whole: when one is refused, the reply has none of them, though the records of those that
were allowed stand. Refused guests are told "not allowed" and a correlation id, under which the audit log has the reason.

    freshness = "certificate"   evidence of the handshake is enough
    freshness = "challenge"     commands that touch resources fail with "fresh attestation required" until Challenge and Attest
                                have succeeded on this connection, and again when that has expired. Verdictd's own clients know
                                neither

Fresh evidence that is not genuine, not allowed or not about this connection ends the connection, whatever came before it.

Source: csvfast.broker.verdictd.protocol. Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import Door, ResourcePath, for_kid
from csvfast.broker.verdictd.protocol import (
    BLOB_LIMIT,
    FRESH_REQUIRED,
    KEY_BYTES,
    KID_LIMIT,
    LIMITED,
    UNAVAILABLE,
    Attest,
    Blob,
    Challenge,
    Decrypt,
    Echo,
    GetKek,
    GetResource,
    GetResourceInfo,
    OpenedBlob,
    Request,
    Version,
    base64_reply,
    base64_size,
    check_blob,
    data_failure,
    ends_unseen,
    failure,
    json_reply,
    open_blob,
    resource_path,
)
from csvfast.errors import (
    AttestedTlsError,
    AuthenticationError,
    CsvfastError,
    DeniedError,
    LimitedError,
    RequestError,
    UnavailableError,
)
from csvfast.ratstls.freshness import FreshnessChecker

if TYPE_CHECKING:
    from csvfast.broker.attestation import Attestation
    from csvfast.broker.core import Broker
    from csvfast.broker.store import Resource
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.peer import Peer, Requirement

__all__ = ["Commands", "Guest"]

_log: Final = logging.getLogger(__name__)
_OLDER_VERSIONS: Final = 7  # of a key that are tried for a blob
_PATIENCE: Final = 1.0  # seconds that a reply waits when there were too many requests


class Guest:
    """One connection, from the first command on."""

    __slots__ = ("address", "attestation", "checker", "correlation", "is_over", "knows_sizes", "peer")

    def __init__(self, peer: Peer, attestation: Attestation) -> None:
        self.peer: Final = peer
        self.address: Final = peer.address
        self.attestation = attestation
        self.checker: FreshnessChecker | None = None
        self.knows_sizes = False  # has asked for the size of a resource
        self.correlation = ""  # of the request at hand
        self.is_over = False  # no further request is answered


class Commands:
    """Answers requests.

    In: broker, requirement   of the door's connections
        freshness, challenge_seconds, fresh_seconds, pad_replies   see VerdictdDoor
    """

    def __init__(
        self,
        broker: Broker,
        requirement: Requirement,
        *,
        freshness: Literal["certificate", "challenge"],
        challenge_seconds: float,
        fresh_seconds: float,
        pad_replies: bool,
    ) -> None:
        self._broker: Final = broker
        self._requirement: Final = requirement
        self._freshness: Final = freshness
        self._challenge_seconds: Final = challenge_seconds
        self._fresh_seconds: Final = fresh_seconds
        self._pad: Final = pad_replies
        self._answers: Final[Mapping[type, Callable[[Guest, Any], Awaitable[bytes]]]] = {
            Version: self._version,
            Echo: self._echo,
            GetKek: self._get_kek,
            Decrypt: self._decrypt,
            GetResource: self._get_resource,
            GetResourceInfo: self._get_resource_info,
            Challenge: self._challenge,
            Attest: self._attest,
        }
        self.requests = 0
        self.failures = 0

    async def answer(self, guest: Guest, request: Request) -> bytes:
        """The reply; `guest.is_over` then says whether it is the last. HOT."""
        self.requests += 1
        guest.correlation = correlation = new_correlation()
        kind = type(request)
        patience = 0.0
        try:
            self._broker.limits.check_request(guest.address)
            reply = await self._answers[kind](guest, request)
        except DeniedError:
            reply = self._failure(kind, f"not allowed ({correlation})")
        except LimitedError as error:
            self._tell(logging.INFO, "limited", guest, error)
            reply = self._failure(kind, f"{LIMITED} ({correlation})")
            patience = min(error.retry_after, _PATIENCE)
        except RequestError as error:
            reply = self._failure(kind, str(error))
        except CsvfastError as error:
            # The store, or rules that cannot be evaluated: nothing is released until an operator has looked.
            self._tell(logging.ERROR, "unavailable", guest, error)
            reply = self._failure(kind, f"{UNAVAILABLE} ({correlation})")
        if patience:
            await asyncio.sleep(patience)
        if kind is GetResource and ends_unseen(reply) and not guest.knows_sizes:
            guest.is_over = True
        return reply

    @staticmethod
    def _tell(level: int, what: str, guest: Guest, error: CsvfastError) -> None:
        event(
            _log, level, what, door=Door.VERDICTD, address=guest.address, correlation=guest.correlation,
            reason=f"{type(error).__name__}: {error}",
        )  # fmt: skip

    def _failure(self, kind: type, text: str) -> bytes:
        """The reply to a request of that type that says it failed."""
        self.failures += 1
        if kind is GetKek or kind is Decrypt:
            return json_reply(data_failure(text), pad=self._pad)
        reply = json_reply(failure(text), pad=self._pad)
        return base64_reply(reply) if kind is GetResource else reply

    # ---- Commands

    async def _version(self, _guest: Guest, _request: Version) -> bytes:
        return json_reply({"status": "OK", "version": "v1"}, pad=self._pad)

    async def _echo(self, guest: Guest, request: Echo) -> bytes:
        guest.is_over = True
        return request.data.encode()

    async def _get_kek(self, guest: Guest, request: GetKek) -> bytes:
        self._need_fresh(guest)
        _check_count("kids", request.kids, KID_LIMIT)
        paths = {kid: for_kid(kid) for kid in request.kids}
        found = await self._release(guest, paths.values(), "release")
        data = {}
        for kid, path in paths.items():
            resource = found[path]
            if isinstance(resource, DeniedError):
                raise resource
            if len(resource.content) > KEY_BYTES:
                raise RequestError(f"{kid}: is no key but {len(resource.content)} bytes; expected Get Resource")
            data[kid] = base64_reply(resource.content).decode("ascii")
        return json_reply({"status": "OK", "data": data}, pad=self._pad)

    async def _decrypt(self, guest: Guest, request: Decrypt) -> bytes:
        self._need_fresh(guest)
        _check_count("blobs", request.blobs, BLOB_LIMIT)
        checked: dict[int, OpenedBlob] = {}
        problems: dict[int, str] = {}
        seen: dict[str, Blob] = {}
        for index, blob in enumerate(request.blobs):
            try:
                if seen.setdefault(blob.encrypted_data, blob) != blob:
                    raise RequestError("encrypted_data: that of another blob, by which the reply could not tell them apart")
                checked[index] = check_blob(blob)
            except RequestError as error:
                problems[index] = str(error)
        keys = await self._release(guest, (blob.path for blob in checked.values()), "unwrap")
        older: dict[tuple[ResourcePath, int], Resource | None] = {}
        data = {}
        for index, opened in checked.items():
            key = keys[opened.path]
            try:
                if isinstance(key, DeniedError):
                    raise key
                plaintext = await self._open(guest, opened, key, older)
            except DeniedError:
                problems[index] = f"not allowed ({guest.correlation})"
            except (AuthenticationError, RequestError) as error:
                problems[index] = str(error)
            else:
                data[request.blobs[index].encrypted_data] = base64_reply(plaintext).decode("ascii")
        if problems:
            if len(request.blobs) == 1:
                return self._failure(Decrypt, problems[0])
            return self._failure(Decrypt, "; ".join(f"blob {index}: {problems[index]}" for index in sorted(problems)))
        return json_reply({"status": "OK", "data": data}, pad=self._pad)

    async def _open(
        self, guest: Guest, blob: OpenedBlob, key: Resource, older: dict[tuple[ResourcePath, int], Resource | None]
    ) -> bytes:
        """With the newest version of the key; blobs do not say which one made them, so then with older ones that still count."""
        try:
            return open_blob(blob, key.content)
        except AuthenticationError:
            for version in range(key.version - 1, max(0, key.version - 1 - _OLDER_VERSIONS), -1):
                name = blob.path, version
                if name not in older:
                    try:
                        older[name] = await self._release_one(guest, blob.path, "unwrap", {"version": str(version)})
                    except DeniedError:  # each of these counts as a failure of the guest: one is enough
                        older[name] = None
                found = older[name]
                if found is None:
                    break
                try:
                    return open_blob(blob, found.content)
                except (AuthenticationError, RequestError):
                    continue
            raise

    async def _get_resource(self, guest: Guest, request: GetResource) -> bytes:
        self._need_fresh(guest)
        resource = await self._release_one(guest, resource_path(request.path), "release")
        return base64_reply(resource.content)

    async def _get_resource_info(self, guest: Guest, request: GetResourceInfo) -> bytes:
        self._need_fresh(guest)
        resource = await self._release_one(guest, resource_path(request.path), "inspect")
        guest.knows_sizes = True
        size = base64_size(len(resource.content))
        return json_reply({"status": "OK", "data": {"base64size": str(size)}}, pad=self._pad)

    # ---- Freshness

    def _need_fresh(self, guest: Guest) -> None:
        if self._freshness == "challenge" and (guest.checker is None or not guest.checker.is_fresh):
            raise RequestError(FRESH_REQUIRED)

    async def _challenge(self, guest: Guest, _request: Challenge) -> bytes:
        if guest.checker is None:
            try:
                guest.checker = FreshnessChecker(
                    guest.peer, self._requirement, ttl=self._challenge_seconds, valid_for=self._fresh_seconds
                )
            except AttestedTlsError as error:  # TLS 1.2
                raise RequestError(str(error)) from None
        return json_reply(guest.checker.challenge(), pad=self._pad)

    async def _attest(self, guest: Guest, request: Attest) -> bytes:
        checker = guest.checker
        if checker is None:
            raise RequestError("no challenge is waiting for an answer; expected Challenge first")
        try:
            if checker.blocking:
                answer = await asyncio.to_thread(checker.attest, request.document)
            else:
                answer = checker.attest(request.document)
        except AttestedTlsError as error:
            if error.stage == "deadline":
                raise RequestError(str(error)) from None
            guest.is_over = True
            if isinstance(error.__cause__, UnavailableError):
                raise error.__cause__ from None
            self.record(guest.address, error, guest.peer.certificate, guest.correlation)
            raise DeniedError(str(error), guest.correlation) from None
        guest.attestation = self._broker.attestation_of(checker.peer)
        return json_reply(answer, pad=self._pad)

    # ---- The broker

    async def _release_one(
        self, guest: Guest, path: ResourcePath, action: str, query: Mapping[str, str] | None = None
    ) -> Resource:
        return await self._broker.release(
            guest.attestation, path, door=Door.VERDICTD, address=guest.address, correlation=guest.correlation,
            query=query or {}, action=action,
        )  # fmt: skip

    async def _release(
        self, guest: Guest, paths: Iterable[ResourcePath], action: str
    ) -> Mapping[ResourcePath, Resource | DeniedError]:
        """Several resources, whose records are committed together; each is asked for once. LimitedError and others for all."""
        wanted = tuple(dict.fromkeys(paths))
        if len(wanted) == 1:
            try:
                return {wanted[0]: await self._release_one(guest, wanted[0], action)}
            except DeniedError as error:
                return {wanted[0]: error}
        outcomes = await asyncio.gather(*(self._release_one(guest, path, action) for path in wanted), return_exceptions=True)
        found: dict[ResourcePath, Resource | DeniedError] = {}
        for path, outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, DeniedError):
                raise outcome
            found[path] = outcome
        return found

    def record(self, address: str, error: AttestedTlsError, certificate: AttestedCertificate | None, correlation: str) -> None:
        """Puts a refused guest on record."""
        if isinstance(error.__cause__, UnavailableError):
            # Nothing is known about the guest, so nothing is held against it.
            fields = {"door": Door.VERDICTD, "address": address, "correlation": correlation, "reason": str(error)}
            event(_log, logging.ERROR, "unavailable", **fields)
            return
        self._broker.record_refusal(
            door=Door.VERDICTD, address=address, reason=str(error), correlation=correlation, subject=_subject(error, certificate)
        )


def _subject(error: AttestedTlsError, certificate: AttestedCertificate | None) -> dict[str, str]:
    """Of a refused guest; what its report says is put down only once it has been found genuine."""
    if certificate is None:
        return {}
    subject = {"key": certificate.spki_sha256.hex()}
    if error.stage == "appraise" and certificate.evidence is not None:
        report = certificate.evidence.report
        subject |= {"tee": "csv", "chip_id": report.chip_id, "measure": report.measure.hex()}
    return subject


def _check_count(what: str, given: Sequence[object], limit: int) -> None:
    if len(given) > limit:
        raise RequestError(f"{what}: {len(given)}; expected at most {limit}")
