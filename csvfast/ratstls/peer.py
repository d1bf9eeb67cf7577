"""Whom we talk to, and what we require of him.

    Requirement   of an endpoint: attested by a judge, one of some pinned keys, or (said out loud) nothing
    Judge         verify: is his evidence genuine? appraise: do I allow what it says? Two questions, never one function
    PolicyJudge   the judge that needs nothing but csvfast.attest: roots and an appraisal policy
    Peer          what is known about him once a connection is open

Source of what there is to be checked: sections 6 and 10 of Interoperable RA-TLS as inclavare-containers/rats-tls implements it
(src/tls_wrappers/api/tls_wrapper_verify_certificate_extension.c), without its ways of accepting a peer that has proved nothing.

Thread-safety: immutable objects; judges are called from several threads.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from csvfast.attest import Appraisal, ChainCache, Verified, appraise, verify
from csvfast.errors import ArgumentError, AttestedTlsError, CsvfastError, LengthError, VerificationError
from csvfast.ratstls.claims import report_data_of

if TYPE_CHECKING:
    from csvfast.attest import AppraisalPolicy
    from csvfast.certs import CaCertificate, CertificateStore
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.freshness import SeenReports

__all__ = ["Judge", "Judgement", "Peer", "PolicyJudge", "Requirement"]

_NO_CLAIMS: Final[Mapping[str, bytes]] = MappingProxyType({})
_SHA256_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of an open connection.

    certificate   what he showed; None when none was asked for (Requirement.unattested)
    verified      his evidence, found genuine; None unless he had to be attested
    appraisal     what the policy says to it, `allowed` always; None likewise
    spki_sha256   SHA-256 of his SubjectPublicKeyInfo, 32 bytes; empty without a certificate
    exporter      RFC 9266 tls-exporter of this connection, 32 bytes, equal on both ends. Not secret
    tls_version   "TLSv1.3" or "TLSv1.2"
    cipher        name of the cipher suite
    address       where he is, for logs
    """

    certificate: AttestedCertificate | None
    verified: Verified | None
    appraisal: Appraisal | None
    spki_sha256: bytes
    exporter: bytes
    tls_version: str
    cipher: str
    address: str

    @property
    def custom_claims(self) -> Mapping[str, bytes]:
        """Claims beside pubkey-hash. Nobody vouches for them unless the peer was attested; then the report's signature does."""
        claims = None if self.certificate is None else self.certificate.claims
        return _NO_CLAIMS if claims is None else claims.custom


class Judge(Protocol):
    """Decides about evidence. Each method raises a CsvfastError when the answer cannot be found."""

    @property
    def blocking(self) -> bool:
        """True when judging may wait for a disk or a network: servers then ask in a worker thread."""
        ...

    def verify(self, certificate: AttestedCertificate) -> Verified:
        """Is the evidence genuine, and about this certificate's claims? VerificationError. The certificate has some."""
        ...

    def appraise(self, verified: Verified, certificate: AttestedCertificate) -> Appraisal:
        """Is what it says allowed?"""
        ...


class PolicyJudge:
    """Judges by csvfast.attest alone.

    In: roots    trusted root certificates; VerificationError when there is none
        policy   what is allowed
        store    where HSK and CEK are looked for when evidence comes without them; None: nowhere, such evidence is refused
        cache    chains verified before; None: one of its own
        seen     reports seen before, each of which may come with one key only; None: not remembered
    """

    def __init__(
        self,
        roots: Sequence[CaCertificate],
        policy: AppraisalPolicy,
        store: CertificateStore | None = None,
        cache: ChainCache | None = None,
        seen: SeenReports | None = None,
    ) -> None:
        if not roots:
            raise VerificationError("HRK", "no trusted root was given, so no peer can be genuine")
        self._roots: Final = tuple(roots)
        self._policy: Final = policy
        self._store: Final = store
        self._cache: Final = ChainCache() if cache is None else cache
        self._seen: Final = seen

    @property
    def blocking(self) -> bool:
        """True with a store, which reads directories and may ask a key server."""
        return self._store is not None

    def verify(self, certificate: AttestedCertificate) -> Verified:
        """See Judge."""
        if certificate.buffer is None or certificate.evidence is None:
            raise VerificationError("evidence", "the certificate carries none")
        return verify(
            certificate.evidence,
            roots=self._roots,
            store=self._store,
            report_data=report_data_of(certificate.buffer.claims),
            cache=self._cache,
        )

    def appraise(self, verified: Verified, certificate: AttestedCertificate) -> Appraisal:
        """See Judge."""
        appraisal = appraise(verified, self._policy)
        if self._seen is not None and appraisal.allowed:
            self._seen.check(verified, certificate.spki_sha256)
        return appraisal


class Judgement(NamedTuple):
    """What a judge found out: both None when nothing had to be judged."""

    verified: Verified | None
    appraisal: Appraisal | None


_NOTHING_TO_JUDGE: Final = Judgement(None, None)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an endpoint requires of its peer. Made by `attested`, `pinned` or `unattested`; there is no default.

    judge             decides about the evidence, which must be there; None: no evidence is needed
    pins              SHA-256 of the keys that are accepted, 32 bytes each; empty: any
    asks_certificate  False: a server does not ask for one
    """

    judge: Judge | None
    pins: frozenset[bytes]
    asks_certificate: bool

    def __post_init__(self) -> None:
        if self.judge is not None and self.pins:
            raise ArgumentError("requirement: a judge and pinned keys; expected one of them")
        if not self.asks_certificate and (self.judge is not None or self.pins):
            raise ArgumentError("requirement: a judge or pinned keys, but no certificate is asked for")

    @classmethod
    def attested(cls, judge: Judge) -> Requirement:
        """The peer shows evidence, the judge finds it genuine, and allows it."""
        return cls(judge, frozenset(), True)

    @classmethod
    def pinned(cls, keys: Iterable[bytes]) -> Requirement:
        """The peer has one of these keys. Evidence in his certificate must be well-formed, and is not judged.

        In: keys   SHA-256 of each key's SubjectPublicKeyInfo: LengthError unless 32 bytes, ArgumentError when there is none
        """
        pins = frozenset(bytes(key) for key in keys)
        if not pins:
            raise ArgumentError("pinned keys: none; expected at least one")
        for pin in pins:
            if len(pin) != _SHA256_BYTES:
                raise LengthError(f"pinned key: {len(pin)} bytes; expected {_SHA256_BYTES}, SHA-256 of a SubjectPublicKeyInfo")
        return cls(None, pins, True)

    @classmethod
    def unattested(cls, *, certificate: bool = True) -> Requirement:
        """Anybody is accepted: encrypted, but nobody knows with whom. Every context made with it logs a warning.

        In: certificate   False: a server does not even ask for one (a server always shows one, so it means nothing to clients)
        """
        return cls(None, frozenset(), certificate)

    @property
    def is_open(self) -> bool:
        """True when anybody is accepted."""
        return self.judge is None and not self.pins

    @property
    def blocking(self) -> bool:
        """True when `judge_certificate` may wait for a disk or a network."""
        return self.judge is not None and self.judge.blocking

    def check_shown(self, certificate: AttestedCertificate) -> None:
        """What can be seen without judging, before the peer has proved that the key is his: AttestedTlsError."""
        if self.judge is not None and (certificate.evidence is None or certificate.buffer is None):
            raise AttestedTlsError("certificate", "it carries no evidence; expected the evidence of a CSV guest")
        if self.pins and not any(hmac.compare_digest(certificate.spki_sha256, pin) for pin in self.pins):
            raise AttestedTlsError("binding", f"key {certificate.spki_sha256.hex()} is not one of the {len(self.pins)} pinned")

    def judge_certificate(self, certificate: AttestedCertificate | None) -> Judgement:
        """Verifies, then appraises. AttestedTlsError with stage "verify" or "appraise" unless both say yes.

        In: certificate   whose binding to its key and its claims has been checked
        Whatever else a judge raises is a refusal, too. Thread-safe when the judge is.
        """
        judge = self.judge
        if judge is None:
            return _NOTHING_TO_JUDGE
        if certificate is None:
            raise AttestedTlsError("certificate", "the peer has shown none")
        self.check_shown(certificate)
        try:
            verified = judge.verify(certificate)
        except Exception as error:
            raise AttestedTlsError("verify", _reason(error)) from error
        if not isinstance(verified, Verified):
            raise AttestedTlsError("verify", f"the judge returned {type(verified).__name__}; expected what verify() returns")
        try:
            appraisal = judge.appraise(verified, certificate)
        except AttestedTlsError:
            raise
        except Exception as error:
            raise AttestedTlsError("appraise", _reason(error)) from error
        if not isinstance(appraisal, Appraisal):
            raise AttestedTlsError("appraise", f"the judge returned {type(appraisal).__name__}; expected an Appraisal")
        if not appraisal.allowed:
            violations = "; ".join(str(violation) for violation in appraisal.violations)
            raise AttestedTlsError("appraise", violations or "not allowed")
        return Judgement(verified, appraisal)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CsvfastError) else f"{type(error).__name__}: {error}"
