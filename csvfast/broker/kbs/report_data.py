"""What a guest's report must carry: the digest of nonce, key and additional evidence.

    D = SHA-384(JCS({"additional-evidence": text, "nonce": text, "tee-pubkey": JWK}));  report_data = D || 16 zero bytes

The key is hashed as it was sent, unknown members included.

Source: RFC 8785; confidential-containers/trustee kbs/docs/kbs_attestation_protocol.md, attestation-service/src/lib.rs;
guest-components attestation-agent/kbs_protocol/src/client/rcar_client.rs, attester/src/csv/mod.rs.
Thread-safety: functions without state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

from csvfast.errors import RequestError

__all__ = ["REPORT_DATA_BYTES", "canonical_digest", "report_data"]

REPORT_DATA_BYTES: Final = 64


def canonical_digest(document: Any) -> bytes:
    """SHA-384 of the document in canonical form, 48 bytes. RequestError for what has no canonical form."""
    try:
        return hashlib.sha384(rfc8785.dumps(document)).digest()
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError):
        raise RequestError("runtime-data: has no canonical form; expected JSON with numbers within 2**53") from None


def report_data(nonce: str, key: Mapping[str, Any], additional_evidence: str = "") -> bytes:
    """The 64 bytes that a CSV report about this nonce and key carries.

    In: nonce                 as it was sent, base64 text
        key                   the JWK as it was sent
        additional_evidence   of further devices, as it was sent: a string
    """
    document = {"additional-evidence": additional_evidence, "nonce": nonce, "tee-pubkey": key}
    return canonical_digest(document).ljust(REPORT_DATA_BYTES, b"\0")
