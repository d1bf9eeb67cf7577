"""A simulated platform made from certificates alone: reports and evidence for the tests of report, attest and the command."""

from __future__ import annotations

from typing import Any

from csvfast.certs import CertificateStore, CsvCertificate, KeyAlgorithm, KeyUsage, ManufacturingLine
from csvfast.certs.chain import USER_IDS
from csvfast.crypto import SM2PrivateKey
from csvfast.report import Evidence, GuestPolicy, Report, build_report_v1, build_report_v2

MNONCE = bytes(range(0xA0, 0xB0))
REPORT_DATA = b"public key of the guest".ljust(64, b"\0")
MEASURE = bytes(range(32))
SEALING_KEY = bytes(range(0x40, 0x60))
ANONCE = bytes.fromhex("26d7c75d")
POLICY = GuestPolicy.of(nodbg=True, es=True, csv3=True, api_major=1, api_minor=3, hsk_version=2, cek_version=1)
RTMRS = [MEASURE, *(bytes([index]) * 32 for index in range(1, 5))]


class Platform:
    """Line, chip and PEK (signed by CEK and OCA, as firmware that owns itself does)."""

    def __init__(self, line: ManufacturingLine | None = None) -> None:
        self.line = line or ManufacturingLine.create()
        self.chip = self.line.make_chip()
        self.pek_key = SM2PrivateKey.generate()
        self.oca_key = SM2PrivateKey.generate()
        self.pek = (
            CsvCertificate.build(
                usage=KeyUsage.PEK,
                algorithm=KeyAlgorithm.SM2_SA,
                point=self.pek_key.public_key.point,
                user_id=USER_IDS[KeyUsage.PEK],
            )
            .with_signature(1, self.chip.cek_key, KeyUsage.CEK, USER_IDS[KeyUsage.CEK])
            .with_signature(2, self.oca_key, KeyUsage.OCA, USER_IDS[KeyUsage.OCA])
        )

    @property
    def hsk_cek(self) -> bytes:
        return self.line.hsk.encoded + self.chip.cek.encoded

    @property
    def roots(self) -> list[Any]:
        return [self.line.root]

    def fields(self, **changes: Any) -> dict[str, Any]:
        fields = {
            "user_pubkey_digest": bytes(range(100, 132)),
            "vm_id": b"vm-identity-0001",
            "vm_version": b"version-00000001",
            "report_data": REPORT_DATA,
            "mnonce": MNONCE,
            "measure": MEASURE,
            "policy": POLICY,
            "pek_key": self.pek_key,
            "pek": self.pek,
            "chip_id": self.chip.chip_id,
            "sealing_key": SEALING_KEY,
        }
        return fields | changes

    def page_v1(self, **changes: Any) -> bytes:
        return bytes(build_report_v1(**self.fields(**({"anonce": ANONCE} | changes))))

    def page_v2(self, **changes: Any) -> bytes:
        defaults = {"build": 2337, "rtmr_version": 1, "rtmrs": RTMRS}
        return bytes(build_report_v2(**self.fields(**(defaults | changes))))

    def evidence(self, version: int = 1, **changes: Any) -> Evidence:
        """As emitted: masked, with the sealing key, HSK and CEK beside it."""
        page = self.page_v1(**changes) if version == 1 else self.page_v2(**changes)
        return Evidence(Report.parse(page), hsk_cek=self.hsk_cek, encoding="page")

    def store(self, directory: Any) -> CertificateStore:
        store = CertificateStore([], directory / "cache")
        store.add(self.chip.chip_id, self.line.hsk, self.chip.cek)
        return store
