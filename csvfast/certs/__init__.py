"""Certificates of the platform: read, built, chained to a root, stored, fetched, and made for simulated chips.

    CaCertificate, CsvCertificate            the two formats, 832 and 2084 bytes
    CertificateChain, verify_chain           is it genuine? from a root the caller trusts, Hygon's by default
    parse_bundle                             files that hold several certificates, recognised by content
    hygon_root                               the trust anchor of real chips
    CertificateStore, KeyServerClient        where HSK and CEK of a chip come from: local directories, cache, key server
    ManufacturingLine, ChipIdentity          simulated chips under a root of their own; never genuine to a real verifier

The factory that makes certificates wrong on purpose, for tests of verifiers, is csvfast.certs.factory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csvfast.certs.bundle import CertificateBundle, parse_bundle
from csvfast.certs.chain import (
    USER_IDS,
    CertificateChain,
    SignatureCheck,
    chain_checks,
    verify_certificate,
    verify_chain,
    verify_root,
)
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.chip_id import checked_chip_id
from csvfast.certs.layout import (
    CA_BYTES,
    CSV_BYTES,
    CURVE_SM2,
    CaCertificate,
    CsvCertificate,
    KeyAlgorithm,
    KeyUsage,
    SignatureSlot,
)
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.certs.roots import HYGON_ROOT_FINGERPRINT, fingerprint, hygon_root
from csvfast.certs.store import CertificateStore

if TYPE_CHECKING:
    from csvfast.certs.key_server import KeyServerClient, KeyServerError

__all__ = [
    "CA_BYTES",
    "CSV_BYTES",
    "CURVE_SM2",
    "HYGON_ROOT_FINGERPRINT",
    "USER_IDS",
    "CaCertificate",
    "CertificateBundle",
    "CertificateChain",
    "CertificateStore",
    "ChipIdentity",
    "CsvCertificate",
    "KeyAlgorithm",
    "KeyServerClient",
    "KeyServerError",
    "KeyUsage",
    "ManufacturingLine",
    "SignatureCheck",
    "SignatureSlot",
    "chain_checks",
    "checked_chip_id",
    "fingerprint",
    "hygon_root",
    "parse_bundle",
    "verify_certificate",
    "verify_chain",
    "verify_root",
]


def __getattr__(name: str) -> Any:
    """The key server's client, imported when first asked for: HTTP and TLS take longer to load than a chain to verify."""
    if name not in ("KeyServerClient", "KeyServerError"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from csvfast.certs import key_server

    return getattr(key_server, name)
