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

from typing import TYPE_CHECKING

from csvfast._lazy import lazy

if TYPE_CHECKING:
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
    from csvfast.certs.key_server import KeyServerClient, KeyServerError
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

if not TYPE_CHECKING:
    # Chains are verified where no chip is ever made, and in guests, which pay for every module.
    __getattr__ = lazy(
        __name__,
        {
            "CA_BYTES": "layout", "CSV_BYTES": "layout", "CURVE_SM2": "layout", "CaCertificate": "layout",
            "CertificateBundle": "bundle", "CertificateChain": "chain", "CertificateStore": "store",
            "ChipIdentity": "chip", "CsvCertificate": "layout", "HYGON_ROOT_FINGERPRINT": "roots",
            "KeyAlgorithm": "layout", "KeyServerClient": "key_server", "KeyServerError": "key_server",
            "KeyUsage": "layout", "ManufacturingLine": "manufacturing", "SignatureCheck": "chain",
            "SignatureSlot": "layout", "USER_IDS": "chain", "chain_checks": "chain", "checked_chip_id": "chip_id",
            "fingerprint": "roots", "hygon_root": "roots", "parse_bundle": "bundle", "verify_certificate": "chain",
            "verify_chain": "chain", "verify_root": "chain",
        },
    )  # fmt: skip
