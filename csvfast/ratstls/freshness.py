"""Evidence of now, on a connection that is open: what a certificate alone cannot show.

A certificate proves that a guest with this measurement once asked its chip to sign the hash of this key. Two things help:

    challenge     C -> S {"command":"Challenge"}
                  S -> C {"status":"OK","nonce":b64(32 bytes),"ttl":60}
                  C -> S {"command":"Attest","evidence":b64(tag(0x1a7506)([report-evidence, claims]))}
                  S -> C {"status":"OK","valid_for":N}
                  claims = {"pubkey-hash": as in the certificate, "nonce": nonce, "tls-exporter": RFC 9266 value, ...}
    SeenReports   a report that came with one key before is refused with another

The nonce is used once, belongs to one connection and expires. The exporter binds the evidence to this connection, so nobody can
have another guest answer for him. Peers that know neither command are not disturbed by them.

Source: RFC 9334 (freshness by nonce), RFC 9266 (tls-exporter; needs TLS 1.3 here, because in 1.2 it is unique only with an
extension that cannot be asked about); the exchange is csvfast's.
Thread-safety: SeenReports has a lock; a checker is for one task.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from csvfast.crypto import sm3
from csvfast.errors import ArgumentError, AttestedTlsError, CsvfastError, RequestError, VerificationError
from csvfast.ratstls.certificate import check_binding, raw_evidence, read_raw_evidence
from csvfast.ratstls.claims import (
    CSV_TAG,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
)

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.attest import Verified
    from csvfast.ratstls.attester import Attester
    from csvfast.ratstls.certificate import AttestedCertificate, Layout
    from csvfast.ratstls.context import Identity
    from csvfast.ratstls.peer import Peer, Requirement

__all__ = ["CHALLENGE", "FreshnessChecker", "SeenReports", "answer_challenge"]

CHALLENGE: Final[Mapping[str, str]] = {"command": "Challenge"}
"""What a client sends to be challenged."""

_NONCE_BYTES: Final = 32
_EVIDENCE_LIMIT: Final = 32768  # characters of base64; 7100 bytes make 9500
_NONCE: Final = "nonce"
_EXPORTER: Final = "tls-exporter"


class FreshnessChecker:
    """The server's side of the exchange, for one connection.

    In: peer          of the connection; AttestedTlsError unless attested, over TLS 1.3
        requirement   of the connection: its judge judges the new evidence, too
        ttl           seconds in which a nonce must be answered
        valid_for     seconds for which an answer counts
        clock         monotonic seconds
    """

    def __init__(
        self,
        peer: Peer,
        requirement: Requirement,
        *,
        ttl: float = 60.0,
        valid_for: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if requirement.judge is None or peer.certificate is None or peer.verified is None:
            raise AttestedTlsError("binding", "no fresh evidence can be had from a peer that is not attested")
        _need_exporter(peer)
        if not (ttl >= 1 and valid_for >= 1):
            raise ArgumentError(f"ttl {ttl}, valid_for {valid_for}: expected 1 second or more")
        self.ttl: Final = ttl
        self.valid_for: Final = valid_for
        self._certificate: Final[AttestedCertificate] = peer.certificate
        self._requirement: Final = requirement
        self._clock: Final = clock
        self._nonce: bytes | None = None
        self._nonce_until = 0.0
        self._fresh_until = 0.0
        self._peer = peer

    @property
    def peer(self) -> Peer:
        """The peer as judged last: by the newest evidence that was accepted."""
        return self._peer

    @property
    def is_fresh(self) -> bool:
        """True while an answer counts."""
        return self._clock() < self._fresh_until

    @property
    def blocking(self) -> bool:
        """True when `attest` may wait for a disk or a network."""
        return self._requirement.blocking

    def challenge(self) -> dict[str, Any]:
        """The answer to Challenge: a new nonce. One given out before is worth nothing from now on."""
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonce_until = self._clock() + self.ttl
        return {"status": "OK", "nonce": base64.b64encode(self._nonce).decode(), "ttl": int(self.ttl)}

    def attest(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to Attest. Whatever comes of it, the nonce has been used.

        RequestError: not in form. AttestedTlsError: no nonce is waiting or it has expired (stage "deadline"), other key, nonce or
        connection ("binding"), not genuine ("verify"), not allowed ("appraise"). After an error what was fresh is so no more.
        """
        nonce, self._nonce = self._nonce, None
        self._fresh_until = 0.0
        encoded = _decoded(request)
        now = self._clock()
        if nonce is None:
            raise AttestedTlsError("deadline", "no challenge is waiting for an answer; expected Challenge first")
        if now >= self._nonce_until:
            raise AttestedTlsError("deadline", f"the challenge was not answered within {self.ttl:g} seconds")
        certificate = self._read(encoded)
        assert certificate.claims is not None
        for name, expected in ((_NONCE, nonce), (_EXPORTER, self._peer.exporter)):
            found = certificate.claims.custom.get(name)
            if found is None or not hmac.compare_digest(found, expected):
                what = "missing" if found is None else "not that of this exchange"
                raise AttestedTlsError("binding", f"claim {name!r} is {what}")
        check_binding(certificate)
        judgement = self._requirement.judge_certificate(certificate)
        self._peer = replace(self._peer, certificate=certificate, verified=judgement.verified, appraisal=judgement.appraisal)
        self._fresh_until = self._clock() + self.valid_for
        return {"status": "OK", "valid_for": int(self.valid_for)}

    def _read(self, encoded: bytes) -> AttestedCertificate:
        """The connection's certificate with the new evidence in the old one's place: key and checks stay the same."""
        try:
            buffer = decode_evidence_buffer(encoded)
            if buffer.tag != CSV_TAG:
                raise RequestError(f"evidence of tag {buffer.tag}: expected {CSV_TAG} (Hygon CSV)")
            claims = decode_claims(buffer.claims)
            return replace(self._certificate, buffer=buffer, claims=claims, evidence=read_raw_evidence(buffer.raw))
        except RequestError:
            raise
        except CsvfastError as error:
            raise RequestError(f"evidence: {error}") from error


def answer_challenge(
    reply: Mapping[str, Any],
    peer: Peer,
    identity: Identity,
    attester: Attester,
    *,
    custom: Mapping[str, BytesLike] | None = None,
    layout: Layout = "rats-tls",
) -> dict[str, Any]:
    """The client's side: the Attest request for the server's reply to CHALLENGE.

    In: peer       of this connection
        identity   that this connection was made with
        attester   asked once
        custom     more claims, those of the certificate among them if the server looks at them
    RequestError: the reply is no challenge. AttestedTlsError: TLS 1.2. VerificationError: the report is about other data.
    """
    _need_exporter(peer)
    nonce = reply.get(_NONCE)
    if reply.get("status") != "OK" or not isinstance(nonce, str):
        raise RequestError("the server did not answer with a challenge; expected status OK and a nonce")
    try:
        raw = base64.b64decode(nonce, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("nonce: no base64") from None
    if len(raw) != _NONCE_BYTES:
        raise RequestError(f"nonce: {len(raw)} bytes; expected {_NONCE_BYTES}")
    more = dict(custom or {})
    for name in (_NONCE, _EXPORTER):
        if name in more:
            raise ArgumentError(f"claim {name!r}: expected claims of other names")
    claims = encode_claims(identity.key.spki, {_NONCE: raw, _EXPORTER: peer.exporter, **more})
    report_data = report_data_of(claims)
    evidence = attester.evidence(report_data)
    if evidence.report.report_data != report_data:
        raise VerificationError("report data", "the attester's report is about other data")
    buffer = encode_evidence_buffer(raw_evidence(evidence, layout), claims)
    return {"command": "Attest", "evidence": base64.b64encode(buffer).decode()}


class SeenReports:
    """Reports that were accepted, by chip and mnonce, each with the key it came with: the same report is refused with another.

    In: capacity   1 or more (ArgumentError); the longest unused is forgotten. An entry takes some 300 bytes
    The chip is known by its CEK, which the chain binds; the chip id in the report is not signed.
    """

    def __init__(self, capacity: int = 65536) -> None:
        if capacity < 1:
            raise ArgumentError(f"capacity {capacity}: expected 1 or more")
        self.capacity: Final = capacity
        self._keys: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, verified: Verified, spki_sha256: bytes) -> None:
        """Remembers a report that was verified and allowed, and its key. AttestedTlsError ("verify"): it came with another."""
        report = verified.report
        chip = report.chip_id.encode() if verified.chain is None else sm3(verified.chain.cek.encoded).digest()
        name = (chip, report.mnonce)
        with self._lock:
            known = self._keys.setdefault(name, spki_sha256)
            self._keys.move_to_end(name)
            if len(self._keys) > self.capacity:
                self._keys.popitem(last=False)
        if not hmac.compare_digest(known, spki_sha256):
            raise AttestedTlsError("verify", "this report was shown with another key before")

    def __len__(self) -> int:
        with self._lock:
            return len(self._keys)


def _need_exporter(peer: Peer) -> None:
    if peer.tls_version != "TLSv1.3":
        raise AttestedTlsError("binding", f"{peer.tls_version}: expected TLS 1.3, whose exporter names one connection")


def _decoded(request: Mapping[str, Any]) -> bytes:
    text = request.get("evidence")
    if request.get("command") != "Attest" or not isinstance(text, str):
        raise RequestError("expected command Attest with evidence in base64")
    if len(text) > _EVIDENCE_LIMIT:
        raise RequestError(f"evidence: {len(text)} characters; expected at most {_EVIDENCE_LIMIT}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("evidence: no base64") from None
