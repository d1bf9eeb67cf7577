"""Fuzz targets of attested TLS: certificates, claims buffers, evidence buffers. What is accepted says what was signed."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from datetime import datetime

from csvfast.errors import CsvfastError, FormatError
from csvfast.ratstls.certificate import check_binding, make_certificate, read_certificate, read_raw_evidence
from csvfast.ratstls.claims import (
    CSV_TAG,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
)
from csvfast.ratstls.keys import TlsKey
from csvfast.report import GuestPolicy
from csvfast.report.build import build_report_v1
from csvfast.report.evidence import Evidence
from csvfast.report.layout import Report
from fuzz.target import CHIP, MIB, Target, platform

__all__ = ["RatsTlsCertificateTarget", "RatsTlsClaimsTarget", "RatsTlsEvidenceTarget"]

_CUSTOM = {"key_0": b"value_0\0", "nonce": bytes(32)}


def _evidence(report_data: bytes) -> Evidence:
    memory, processor = platform(4 * MIB)
    identity = processor.identity
    assert identity is not None
    page = build_report_v1(
        user_pubkey_digest=bytes(32), vm_id=bytes(16), vm_version=bytes(16), report_data=report_data, mnonce=bytes(range(16)),
        measure=bytes(range(32)), policy=GuestPolicy(5), anonce=b"\x26\xd7\xc7\x5d", pek_key=identity.pek_key, pek=identity.pek,
        chip_id=CHIP.chip_id, sealing_key=bytes(32),
    )  # fmt: skip
    memory.close()
    return Evidence(Report.parse(page), hsk_cek=CHIP.hsk_cek)


def _buffers(key: TlsKey) -> list[bytes]:
    claims = encode_claims(key.spki, _CUSTOM)
    evidence = _evidence(report_data_of(claims))
    return [encode_evidence_buffer(raw, claims) for raw in (evidence.to_rats_tls(), evidence.to_librats())]


class RatsTlsCertificateTarget(Target):
    """Certificates read and held against their keys: what passes is what the key signed, byte for byte."""

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime.now().astimezone()
        self.genuine = set()
        for kind in ("p256", "sm2", "rsa3072"):
            key = TlsKey.generate(kind)
            small, *large = make_certificate(key, None), *(make_certificate(key, buffer) for buffer in _buffers(key))
            # Most mutations of a large one hit the report. The small ones are all fields.
            self.seeds += [small] * 8 + large
            self.genuine |= {read_certificate(one).signed for one in (small, *large)}

    def handle(self, data: bytes) -> Hashable:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = read_certificate(data)
            except FormatError as error:
                return error.structure  # not the field: object identifiers have any number
        assert (found.claims is None) == (found.evidence is None) == (found.buffer is None)
        check_binding(found, now=self.now)
        assert found.signed in self.genuine, "a changed certificate passed"
        return found.key_kind, found.evidence is None


class RatsTlsClaimsTarget(Target):
    """Claims buffers: what is read is written just so."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [encode_claims(b"spki", custom, hash_id=one) for one in (1, 7, 8) for custom in ({}, _CUSTOM)]
        # Things CBOR has and claims have not: indefinite lengths, tags, numbers, nesting.
        pieces = ["bf616101ff", "a1617801", "c1a0", "81" * 9, "a16161d8238161", "a161615f4161ff", "c2410f", "d9010280", "f97e00"]
        self.seeds += [bytes.fromhex(piece) for piece in pieces]

    def handle(self, data: bytes) -> Hashable:
        try:
            found = decode_claims(data)
        except FormatError as error:
            return error.structure, error.field if error.field.isidentifier() else "claim"
        again = decode_claims(bytes(found.encoded))
        assert again == found
        assert found.encoded == data
        assert "pubkey-hash" not in found.custom
        return found.hash_id, len(found.custom)


class RatsTlsEvidenceTarget(Target):
    """Evidence buffers and the raw evidence in them: what is read is written just so, in the layout that was recognised."""

    def __init__(self) -> None:
        super().__init__()
        whole = _buffers(TlsKey.generate())
        small = [encode_evidence_buffer(b"raw", b"claims", tag) for tag in (60000, 60001, 60002, 0x1A7504, 0x1A7505, CSV_TAG)]
        self.seeds = [*whole, *small, b"\xda\x00\x1a\x75\x06\x9f\x41a\x41b\xff"]

    def handle(self, data: bytes) -> Hashable:
        buffer = decode_evidence_buffer(data)
        assert encode_evidence_buffer(buffer.raw, buffer.claims, buffer.tag) == data
        try:
            evidence = read_raw_evidence(buffer.raw)
        except CsvfastError as error:
            return buffer.tag, type(error).__name__
        assert evidence.hsk_cek is not None
        assert evidence.hsk_cek in buffer.raw
        assert evidence.report.page() == buffer.raw[:4096]
        return buffer.tag, evidence.encoding
