"""Guests for the tests of attested TLS: an attester of a platform made from certificates, and certificates nobody should make."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from attest.simulated_evidence import Platform
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from csvfast.ratstls.certificate import EVIDENCE_OID
from csvfast.ratstls.claims import encode_claims, encode_evidence_buffer, report_data_of
from csvfast.ratstls.keys import TlsKey
from csvfast.report import Evidence

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
NAME = x509.Name(
    [
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Inclavare Containers"),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "RATS-TLS"),
    ]
)


class PlatformAttester:
    """Evidence of a `Platform`, HSK and CEK beside it. `changes` are fields of the report; `asked` is what was asked for."""

    def __init__(self, platform: Platform, **changes: Any) -> None:
        self.platform = platform
        self.changes = changes
        self.asked: list[bytes] = []

    def evidence(self, report_data: bytes) -> Evidence:
        self.asked.append(report_data)
        return self.platform.evidence(**({"report_data": report_data} | self.changes))


def buffer_for(
    platform: Platform, key: TlsKey, *, claims: bytes | None = None, layout: str = "rats-tls", **changes: Any
) -> bytes:
    """An evidence buffer; `changes` are fields of the report, which otherwise says what it should."""
    encoded = encode_claims(key.spki) if claims is None else claims
    evidence = platform.evidence(**({"report_data": report_data_of(encoded)} | changes))
    return encode_evidence_buffer(evidence.to_rats_tls() if layout == "rats-tls" else evidence.to_librats(), encoded)


def odd_certificate(
    key: Any,
    extensions: Sequence[tuple[str, bytes, bool]],
    *,
    subject: x509.Name = NAME,
    issuer: x509.Name = NAME,
    hash_algorithm: Any = None,
    serial: int = 1,
) -> bytes:
    """A certificate as cryptography makes it: any key it knows, any extensions (oid, content, critical)."""
    begin, end = NOW - timedelta(hours=1), NOW + timedelta(days=365)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial, begin, end)
    for oid, content, critical in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), content), critical)
    return builder.sign(key, hash_algorithm or hashes.SHA256()).public_bytes(Encoding.DER)


def evidence_extension(buffer: bytes, *, critical: bool = False) -> tuple[str, bytes, bool]:
    return EVIDENCE_OID, buffer, critical
