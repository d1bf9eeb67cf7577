"""Attested TLS: certificates with evidence inside, and connections whose peer has proved what it is before the first byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast._extras import need
from csvfast._lazy import lazy

need("ratstls", "OpenSSL", "cbor2")

# Claims, keys, certificates, and where evidence comes from; peers, contexts, connections. E402: their packages were checked for.
if TYPE_CHECKING:
    from csvfast.ratstls.asynchronous import AttestedServer, ConnectionLimits, open_connection
    from csvfast.ratstls.stream import Stream

from csvfast.ratstls.attester import Attester, DeviceAttester, SocketAttester  # noqa: E402
from csvfast.ratstls.blocking import BlockingServer, BlockingStream, connect  # noqa: E402
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
from csvfast.ratstls.connection import AttestedConnection  # noqa: E402
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions, sm_is_available  # noqa: E402
from csvfast.ratstls.freshness import CHALLENGE, FreshnessChecker, SeenReports, answer_challenge  # noqa: E402
from csvfast.ratstls.keys import TlsKey  # noqa: E402
from csvfast.ratstls.peer import Judge, Peer, PolicyJudge, Requirement  # noqa: E402

__all__ = [
    "CHALLENGE",
    "CSV_TAG",
    "AttestedCertificate",
    "AttestedConnection",
    "AttestedServer",
    "Attester",
    "BlockingServer",
    "BlockingStream",
    "Claims",
    "ConnectionLimits",
    "DeviceAttester",
    "EndpointContext",
    "EvidenceBuffer",
    "FreshnessChecker",
    "Identity",
    "Judge",
    "Peer",
    "PolicyJudge",
    "Requirement",
    "SeenReports",
    "SocketAttester",
    "Stream",
    "TlsKey",
    "TlsOptions",
    "answer_challenge",
    "attest_certificate",
    "check_binding",
    "connect",
    "decode_claims",
    "decode_evidence_buffer",
    "encode_claims",
    "encode_evidence_buffer",
    "make_certificate",
    "open_connection",
    "read_certificate",
    "report_data_of",
    "sm_is_available",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "AttestedServer": "asynchronous", "ConnectionLimits": "asynchronous", "open_connection": "asynchronous",
            "Stream": "stream",
        },
    )  # fmt: skip
