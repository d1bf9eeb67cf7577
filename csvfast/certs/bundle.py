"""Files that hold several certificates one after the other, recognised by their content.

    HSK||CEK                          hsk_cek.cert, what Hygon's key server answers            2916 bytes
    PEK||OCA||CEK                     what PDH_CERT_EXPORT writes beside the PDH               6252
    PDH||PEK||OCA||CEK                csv-rs's csv chain                                       8336
    PDH||PEK||OCA||CEK||HSK||HRK      csv-rs's full chain (its chain cache)                   10000

and any other order or choice, each role at most once (csv-rs src/certs/{chain,ca/chain,csv/chain}.rs). A certificate's role is
its usage word.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from csvfast.certs.chain import CertificateChain
from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CURVE_SM2, CaCertificate, CsvCertificate, KeyUsage, usage_name
from csvfast.errors import BufferTypeError, FormatError, VerificationError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BUNDLE_LIMIT", "CertificateBundle", "parse_bundle"]

BUNDLE_LIMIT: Final = 4 * CSV_BYTES + 2 * CA_BYTES
"""No bundle is longer: each of the six roles once."""

_STRUCTURE: Final = "certificates"
_CA_ROLES: Final = (KeyUsage.HRK, KeyUsage.HSK)
_CSV_ROLES: Final = (KeyUsage.OCA, KeyUsage.PEK, KeyUsage.PDH, KeyUsage.CEK)


@dataclass(frozen=True, slots=True)
class CertificateBundle:
    """The certificates that were found, None where there was none. Nothing is verified."""

    hrk: CaCertificate | None = None
    hsk: CaCertificate | None = None
    cek: CsvCertificate | None = None
    oca: CsvCertificate | None = None
    pek: CsvCertificate | None = None
    pdh: CsvCertificate | None = None

    def certificates(self) -> dict[str, CaCertificate | CsvCertificate]:
        """Those that are there by role ("HSK"), in the order of a chain."""
        found = ((field.name.upper(), getattr(self, field.name)) for field in fields(self))
        return {role: certificate for role, certificate in found if certificate is not None}

    def merged(self, other: CertificateBundle) -> CertificateBundle:
        """Both together. Raises FormatError when they hold different certificates for one role."""
        mine, theirs = self.certificates(), other.certificates()
        for role, certificate in theirs.items():
            if mine.get(role, certificate) != certificate:
                raise FormatError(_STRUCTURE, role, None, "two different ones", "one")
        return CertificateBundle(**{role.lower(): one for role, one in (mine | theirs).items()})  # type: ignore[arg-type]

    def chain(self) -> CertificateChain:
        """As a chain. Raises VerificationError naming the certificate that is missing: HSK or CEK."""
        if self.hsk is None or self.cek is None:
            missing = "HSK" if self.hsk is None else "CEK"
            raise VerificationError(missing, "the certificate is missing")
        return CertificateChain(hsk=self.hsk, cek=self.cek, pek=self.pek, oca=self.oca, pdh=self.pdh, hrk=self.hrk)


def parse_bundle(data: Buffer) -> CertificateBundle:
    """Reads one certificate or several. Raises FormatError (offsets inside a certificate are counted from its start).

    Parsing is all that is done: see :meth:`CertificateBundle.chain` and verify_chain.
    """
    try:
        encoded = bytes(memoryview(data))
    except TypeError:
        raise BufferTypeError(f"{_STRUCTURE}: {type(data).__name__}; expected a bytes-like object") from None
    if not encoded or len(encoded) > BUNDLE_LIMIT:
        raise FormatError(_STRUCTURE, "length", None, f"{len(encoded)} bytes", f"{CA_BYTES} to {BUNDLE_LIMIT} bytes")
    found: dict[str, CaCertificate | CsvCertificate] = {}
    offset = 0
    while offset < len(encoded):
        certificate = _next(encoded, offset)
        role = usage_name(certificate.usage)
        if role in found:
            raise FormatError(_STRUCTURE, role, offset, "a second one", "each role at most once")
        found[role] = certificate
        offset += certificate.BYTES
    return CertificateBundle(**{role.lower(): certificate for role, certificate in found.items()})  # type: ignore[arg-type]


def _next(data: bytes, offset: int) -> CaCertificate | CsvCertificate:
    rest = len(data) - offset
    is_ca = _looks_like_ca(data[offset:])
    need = CA_BYTES if is_ca else CSV_BYTES
    if rest < need:
        raise FormatError(
            _STRUCTURE, "CA certificate" if is_ca else "certificate", offset, f"{rest} bytes that are left",
            f"{CA_BYTES} for HRK or HSK, {CSV_BYTES} for the others",
        )  # fmt: skip
    part = data[offset : offset + need]
    if is_ca:
        return CaCertificate.parse(part)
    usage = int.from_bytes(part[8:12], "little")
    if usage not in _CSV_ROLES:
        names = ", ".join(f"{role.name} {role:#06x}" for role in _CSV_ROLES)
        raise FormatError(_STRUCTURE, "usage", offset + 8, f"{usage:#010x}", names)
    return CsvCertificate.parse(part)


def _looks_like_ca(data: bytes) -> bool:
    # Where a CA certificate has its curve id, a CSV certificate has the zeros above Qx's 32 bytes.
    return int.from_bytes(data[64:68], "little") == CURVE_SM2 and int.from_bytes(data[36:40], "little") in _CA_ROLES
