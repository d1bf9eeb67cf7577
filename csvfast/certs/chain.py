"""From a root that the caller trusts down to the keys of one chip: HRK -> HSK -> CEK -> PEK -> PDH, OCA -> PEK.

Order of the checks (csv-rs src/certs/chain.rs, {ca,csv}/chain.rs): root, HSK, CEK, then OCA, PEK by OCA, PEK by CEK, PDH. Every
failure is a VerificationError whose ``step`` is the certificate at fault: "HRK", "HSK", "CEK", "OCA", "PEK" or "PDH".

strict (the default) demands of each certificate what genuine ones show and Hygon's devkit checks (csv-attestation.py,
rats-tls src/verifiers/csv): version, usage, algorithm, curve, user id, the issuer's key id (HSK and CEK; zero in PEK, OCA and
PDH), zero in every reserved area, the issuer's signature in its own slot and the other slot as it must be:

    certificate  version  user id         algorithm  slot 1       slot 2
    HRK, HSK     1        HYGON-SSD-...   -          -            -
    CEK          1, 2     HYGON-SSD-CEK   SM2_SA     HSK          empty
    PEK          1, 2     HYGON-SSD-PEK   SM2_SA     CEK          OCA or empty
    OCA          1, 2     HYGON-SSD-OCA   SM2_SA     OCA itself   empty          (slot inferred)
    PDH          1, 2     HYGON-SSD-PDH   SM2_DH     PEK          empty          (slot inferred)

tolerant (strict=False) is csv-rs's rule: usages and curve must be right, and any slot that names the issuer's usage with an SM2
algorithm may hold the signature. In both modes the signer's own user id is used, as the standard asks (GB/T 32918.2).

A chain without a PEK or with a PEK without its OCA is verified as far as it goes; what is there must be right.
Thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.certs.fields import shown
from csvfast.certs.layout import (
    CURVE_SM2,
    CaCertificate,
    CsvCertificate,
    KeyAlgorithm,
    KeyUsage,
    algorithm_name,
    usage_name,
)
from csvfast.certs.roots import fingerprint, hygon_root
from csvfast.errors import ArgumentError, BufferTypeError, FormatError, SignatureError, VerificationError

if TYPE_CHECKING:
    from csvfast.crypto import SM2PublicKey

__all__ = [
    "USER_IDS",
    "CertificateChain",
    "SignatureCheck",
    "certificate_check",
    "chain_checks",
    "verify_certificate",
    "verify_chain",
    "verify_root",
]

Certificate = CaCertificate | CsvCertificate

USER_IDS: Final[dict[KeyUsage, bytes]] = {
    usage: b"HYGON-SSD-" + usage.name.encode() for usage in KeyUsage if usage is not KeyUsage.INVALID
}
"""The user id that a key of each usage carries and signs with."""

_ROLES: Final = {int(usage): usage.name for usage in USER_IDS}
# By role, and as plain numbers: looking up members of an enumeration costs as much as a comparison of a whole certificate.
_USAGES: Final = {usage.name: int(usage) for usage in USER_IDS}
_USER_IDS: Final = {usage.name: user_id for usage, user_id in USER_IDS.items()}
_EMPTY_SLOT: Final = (int(KeyUsage.INVALID), int(KeyAlgorithm.NONE))
_SM2: Final = (KeyAlgorithm.SM2_SA, KeyAlgorithm.SM2_DH)
_ZERO_ID: Final = bytes(16)
_ZEROS: Final = {
    stop - start: bytes(stop - start)
    for kind in (CaCertificate, CsvCertificate)
    for start, stop, _ in kind.RESERVED
}


@dataclass(frozen=True, slots=True)
class CertificateChain:
    """The certificates of one chip and platform. `hrk` None: the root is taken from those the caller trusts."""

    hsk: CaCertificate
    cek: CsvCertificate
    pek: CsvCertificate | None = None
    oca: CsvCertificate | None = None
    pdh: CsvCertificate | None = None
    hrk: CaCertificate | None = None


class SignatureCheck(NamedTuple):
    """One signature that must be valid, for a caller that checks many at once (csvfast.crypto.sm2_verify_many).

    step        certificate at fault when it is not
    issuer      name of the signer, for the message
    key, user_id, message   what it is checked with
    signatures  64 bytes each; valid when any of them is (one in strict mode)
    """

    step: str
    issuer: str
    key: SM2PublicKey
    user_id: bytes
    message: bytes
    signatures: tuple[bytes, ...]

    def run(self) -> None:
        """Raises VerificationError when no signature is valid."""
        for signature in self.signatures:
            try:
                self.key.verify(signature, self.message, user_id=self.user_id)
            except SignatureError:
                continue
            return
        raise self.failure()

    def failure(self) -> VerificationError:
        """The error that :meth:`run` raises."""
        return VerificationError(self.step, f"the signature by {self.issuer} is not valid")


def verify_chain(
    chain: CertificateChain, roots: Sequence[CaCertificate] | None = None, *, strict: bool = True
) -> CaCertificate:
    """Verifies every signature and rule of a chain.

    In:  roots    the certificates the caller trusts; None = Hygon's root alone
         strict   see the module
    Out: the root that the chain hangs from
    Raises VerificationError; also for an empty `roots`, because nothing can hang from nothing.

    The roots' own signatures are checked once per process, and their keys prepared then.
    """
    root, checks = chain_checks(chain, roots, strict=strict)
    for check in checks:
        check.run()
    return root


def chain_checks(
    chain: CertificateChain, roots: Sequence[CaCertificate] | None = None, *, strict: bool = True
) -> tuple[CaCertificate, list[SignatureCheck]]:
    """Everything verify_chain does except the signatures, which are handed back: the chain is genuine when all are valid.

    Raises VerificationError.
    """
    root = _root_of(chain, (hygon_root(),) if roots is None else roots, strict)
    checks = [
        certificate_check(chain.hsk, root, strict=strict, step="HSK"),
        certificate_check(chain.cek, chain.hsk, strict=strict, step="CEK"),
    ]
    if chain.pek is None:
        if chain.oca is not None or chain.pdh is not None:
            raise VerificationError("PEK", "the certificate is missing between CEK and OCA or PDH")
        return root, checks
    if chain.oca is not None:
        checks.append(certificate_check(chain.oca, chain.oca, strict=strict, step="OCA"))
        checks.append(certificate_check(chain.pek, chain.oca, strict=strict, step="PEK"))
    checks.append(certificate_check(chain.pek, chain.cek, strict=strict, step="PEK"))
    if chain.pdh is not None:
        checks.append(certificate_check(chain.pdh, chain.pek, strict=strict, step="PDH"))
    return root, checks


def verify_certificate(
    subject: Certificate, issuer: Certificate, *, strict: bool = True, step: str | None = None
) -> None:
    """Verifies that `issuer` certified `subject` (the same object twice: a self-signature). The issuer itself is not judged.

    In: step   the subject's role ("CEK"); None = what its usage says
    Raises VerificationError; ArgumentError for a step that is no role.
    """
    certificate_check(subject, issuer, strict=strict, step=step).run()


def certificate_check(
    subject: Certificate, issuer: Certificate, *, strict: bool = True, step: str | None = None
) -> SignatureCheck:
    """Like verify_certificate, with the signature handed back instead of checked. Raises VerificationError."""
    role = step or _ROLES.get(subject.usage)
    if role is None:
        raise VerificationError("usage", f"{usage_name(subject.usage)} is no key of the platform")
    if role not in _USAGES:
        raise ArgumentError(f"step {role!r}: expected one of {', '.join(_USAGES)}")
    _check_usage(subject, role)
    _check_signer(subject, issuer, role)
    if strict:
        _check_strictly(subject, role)
        _check_issuer_id(subject, issuer, role)
    key = _key(issuer, role if issuer is subject else _ROLES[issuer.usage])
    if issuer is not subject:
        _key(subject, role)  # a point off the curve is the subject's fault, whoever signed it
    issuer_name = "itself" if issuer is subject else "the " + _ROLES[issuer.usage]
    return SignatureCheck(role, issuer_name, key, issuer.user_id, subject.body, _signatures(subject, issuer, role, strict))


def verify_root(root: CaCertificate, *, strict: bool = True) -> None:
    """Verifies a root's form and its signature over itself. Raises VerificationError("HRK", ...).

    This says nothing about whether to trust it: anybody can make a root.
    """
    _verified_root(root, strict)


@lru_cache(maxsize=64)
def _verified_root(root: CaCertificate, strict: bool) -> CaCertificate:
    """The root once verified, as the object whose key has its table (equal bytes give the same object)."""
    if not isinstance(root, CaCertificate):
        raise BufferTypeError(f"root: {type(root).__name__}; expected a CaCertificate")
    verify_certificate(root, root, strict=strict, step="HRK")
    root.public_key.prepare()
    return root


def _root_of(chain: CertificateChain, roots: Sequence[CaCertificate], strict: bool) -> CaCertificate:
    if not roots:
        raise VerificationError("HRK", "no trusted root was given, so nothing can be genuine")
    wanted = chain.hrk
    if wanted is not None:
        if wanted not in roots:
            raise VerificationError(
                "HRK", f"the root with fingerprint {fingerprint(wanted)} is not trusted; trusted: {_fingerprints(roots)}"
            )
        return _verified_root(wanted, strict)
    found = [root for root in roots if root.key_id == chain.hsk.certifying_id]
    if not strict:
        found = list(roots)  # csv-rs does not look at key ids
    if not found:
        raise VerificationError(
            "HSK",
            f"certified by key {chain.hsk.certifying_id.hex()}, which is not a trusted root; "
            f"trusted: {', '.join(root.key_id.hex() for root in roots)}",
        )
    return _verified_root(_first_that_signed(chain.hsk, found), strict)


def _first_that_signed(hsk: CaCertificate, roots: Sequence[CaCertificate]) -> CaCertificate:
    """Key ids are chosen by whoever makes a root: where two trusted ones carry the same, the signature decides."""
    for root in roots[:-1]:
        try:
            root.public_key.verify(hsk.signature, hsk.body, user_id=root.user_id)
        except (SignatureError, FormatError):
            continue
        return root
    return roots[-1]


def _fingerprints(roots: Iterable[CaCertificate]) -> str:
    return ", ".join(fingerprint(root) for root in roots)


# ---- Rules ----------------------------------------------------------------------------------------------------------


_SIGNER_OF: Final = {
    "HRK": ("HRK",),
    "HSK": ("HRK",),
    "CEK": ("HSK",),
    "PEK": ("CEK", "OCA"),
    "OCA": ("OCA",),
    "PDH": ("PEK",),
}
_CA_ROLES: Final = ("HRK", "HSK")


def _check_usage(subject: Certificate, role: str) -> None:
    expected = _USAGES[role]
    is_ca = role in _CA_ROLES
    if isinstance(subject, CaCertificate) != is_ca:
        raise VerificationError(role, f"{subject.KIND}; expected a {'CA' if is_ca else 'CSV'} certificate")
    if subject.usage != expected:
        raise VerificationError(role, f"usage {usage_name(subject.usage)}; expected {role} ({expected:#06x})")
    if subject.curve_id != CURVE_SM2:
        raise VerificationError(role, f"curve id {subject.curve_id}; expected {CURVE_SM2} (SM2)")


def _check_signer(subject: Certificate, issuer: Certificate, role: str) -> None:
    signer = _ROLES.get(issuer.usage)
    if signer not in _SIGNER_OF[role] or isinstance(issuer, CaCertificate) != (signer in _CA_ROLES):
        names = " or ".join(_SIGNER_OF[role])
        raise VerificationError(role, f"the issuer is a {issuer.KIND} of usage {usage_name(issuer.usage)}; expected {names}")
    if role in ("HRK", "OCA") and subject != issuer:
        raise VerificationError(role, "not signed by itself")


def _check_strictly(subject: Certificate, role: str) -> None:
    if subject.user_id != _USER_IDS[role]:
        raise VerificationError(role, f"user id {shown(subject.user_id)}; expected {shown(_USER_IDS[role])}")
    if subject.user_id_padding.strip(b"\0"):
        raise VerificationError(role, "the user id is not padded with zeros")
    for start, stop, name in subject.RESERVED:
        content = subject.encoded[start:stop]
        if content != _ZEROS[stop - start]:
            place = next(index for index, byte in enumerate(content) if byte)
            raise VerificationError(role, f"{name}: byte {content[place]:#04x} at offset {start + place}; expected zero")
    if isinstance(subject, CaCertificate):
        if subject.version != 1:
            raise VerificationError(role, f"version {subject.version}; expected 1")
        return
    if subject.version not in (1, 2):
        raise VerificationError(role, f"version {subject.version}; expected 1 or 2")
    algorithm = KeyAlgorithm.SM2_DH if role == "PDH" else KeyAlgorithm.SM2_SA
    if subject.algorithm != algorithm:
        raise VerificationError(
            role, f"key algorithm {algorithm_name(subject.algorithm)}; expected {algorithm.name} ({algorithm})"
        )
    _check_slots(subject, role)


def _check_slots(subject: CsvCertificate, role: str) -> None:
    first, second = subject.slots
    signer = _SIGNER_OF[role][0]
    if first[:2] != (_USAGES[signer], KeyAlgorithm.SM2_SA):
        raise VerificationError(role, f"slot 1 {_slot_words(first)}; expected {signer} with SM2_SA")
    if second[:2] == _EMPTY_SLOT:
        return  # its numbers mean nothing, are not signed and not specified
    if role != "PEK":
        raise VerificationError(role, f"slot 2 {_slot_words(second)}; expected INVALID with NONE")
    if second[:2] != (KeyUsage.OCA, KeyAlgorithm.SM2_SA):
        raise VerificationError(role, f"slot 2 {_slot_words(second)}; expected OCA with SM2_SA, or INVALID with NONE")


def _slot_words(slot: tuple[int, int, bytes]) -> str:
    return f"is {usage_name(slot[0])} with {algorithm_name(slot[1])}"


def _check_issuer_id(subject: Certificate, issuer: Certificate, role: str) -> None:
    if isinstance(subject, CaCertificate):
        found, name = subject.certifying_id, "certifying_id"
    else:
        found, name = subject.issuer_id, "sid"
    expected = issuer.key_id if isinstance(issuer, CaCertificate) else _ZERO_ID
    if found != expected:
        raise VerificationError(role, f"{name} {found.hex()}; expected {expected.hex()}")


def _key(certificate: Certificate, role: str) -> SM2PublicKey:
    try:
        return certificate.public_key
    except FormatError as error:
        raise VerificationError(role, str(error)) from None


def _signatures(subject: Certificate, issuer: Certificate, role: str, strict: bool) -> tuple[bytes, ...]:
    if isinstance(subject, CaCertificate):
        return (subject.signature,)
    if strict:
        slot = subject.slots[1 if role == "PEK" and issuer.usage == KeyUsage.OCA else 0]
        if slot.usage != issuer.usage:
            raise VerificationError(role, f"slot {_slot_words(slot)}; expected {usage_name(issuer.usage)} with SM2_SA")
        return (slot.signature,)
    found = tuple(slot.signature for slot in subject.slots if slot.usage == issuer.usage and slot.algorithm in _SM2)
    if not found:
        raise VerificationError(role, f"no slot holds a signature by {usage_name(issuer.usage)}")
    return found
