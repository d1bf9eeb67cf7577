"""Attested TLS: certificates with evidence inside, and connections whose peer has proved what it is before the first byte."""

from __future__ import annotations

from csvfast._extras import need

need("ratstls", "OpenSSL", "cbor2")

# Evidence side: claims, keys, certificates, and where evidence comes from. E402: their packages were checked for above.
from csvfast.ratstls.attester import Attester, DeviceAttester, SocketAttester  # noqa: E402
from csvfast.ratstls.certificate import (  # noqa: E402
    AttestedCertificate,
    attest_certificate,
    check_binding,
    make_certificate,
    read_certificate,
)
from csvfast.ratstls.claims import (  # noqa: E402
    CSV_TAG,
    Claims,
    EvidenceBuffer,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
)
from csvfast.ratstls.keys import TlsKey  # noqa: E402

__all__ = [
    "CSV_TAG",
    "AttestedCertificate",
    "Attester",
    "Claims",
    "DeviceAttester",
    "EvidenceBuffer",
    "SocketAttester",
    "TlsKey",
    "attest_certificate",
    "check_binding",
    "decode_claims",
    "decode_evidence_buffer",
    "encode_claims",
    "encode_evidence_buffer",
    "make_certificate",
    "read_certificate",
    "report_data_of",
]
