"""Verification: what is genuine passes under its own root only, each wrong thing and every flipped bit is refused at its step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, MNONCE, REPORT_DATA, RTMRS, SEALING_KEY, Platform
from report.published_event_log import EVENTS, REGISTERS, build_log

from csvfast.attest import Verified, claims, verify
from csvfast.certs import CaCertificate, CertificateStore, CsvCertificate, KeyUsage, fingerprint, hygon_root
from csvfast.certs.chain import USER_IDS
from csvfast.certs.factory import altered
from csvfast.crypto import SM2PrivateKey, hmac_sm3
from csvfast.errors import BufferTypeError, FormatError, LengthError, VerificationError
from csvfast.report import Evidence, Report, masked, read_evidence


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


def refused(step: str, *arguments: Any, **keywords: Any) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verify(*arguments, **keywords)
    assert caught.value.step == step, caught.value
    return caught.value


CHAIN = ("HRK", "HSK", "CEK", "PEK", "report signature", "report fields")


@pytest.mark.parametrize("version", [1, 2])
def test_complete_evidence(platform: Platform, version: int) -> None:
    evidence = platform.evidence(version)
    verified = verify(evidence, roots=platform.roots, report_data=REPORT_DATA.rstrip(b"\0"), mnonce=MNONCE)
    assert verified.complete
    assert verified.checks == (*CHAIN, "report data", "mnonce", "MAC")
    assert [one.name for one in verified.unchecked] == ["chip id"]
    assert verified.root == platform.line.root
    assert verified.root_fingerprint == fingerprint(platform.line.root)
    assert verified.chain is not None
    assert (verified.chain.cek, verified.chain.pek) == (platform.chip.cek, platform.pek)
    assert verified.report is evidence.report


WRITERS: dict[str, Callable[[Evidence], bytes]] = {
    "json": Evidence.to_json,
    "rats-tls": Evidence.to_rats_tls,
    "librats": Evidence.to_librats,
}


@pytest.mark.parametrize("encoding", WRITERS)
def test_every_encoding_with_certificates(platform: Platform, encoding: str) -> None:
    verified = verify(WRITERS[encoding](platform.evidence()), roots=platform.roots)
    assert verified.complete
    assert verified.checks == (*CHAIN, *(["evidence"] if encoding == "json" else []))
    assert [one.name for one in verified.unchecked] == ["mask", "MAC", "chip id"]
    assert claims(verified)["measure"] == MEASURE.hex()


def test_simulated_chips_are_not_hygons(platform: Platform) -> None:
    refused("HSK", platform.evidence())
    refused("HSK", platform.evidence(), strict=False)
    refused("HSK", platform.evidence(), roots=[hygon_root(), Platform().line.root])
    assert verify(platform.evidence(), roots=[hygon_root(), *platform.roots]).root == platform.line.root


def test_no_roots(platform: Platform) -> None:
    refused("HRK", platform.evidence(), roots=[])


@pytest.mark.parametrize("roots", [[b"root"], b"root", [None]])
def test_roots_of_another_type(platform: Platform, roots: Any) -> None:
    with pytest.raises(BufferTypeError, match="roots"):
        verify(platform.evidence(), roots=roots)


def test_roots_that_are_no_roots(platform: Platform) -> None:
    root, other = platform.line.root, Platform().line.root
    refused("HSK", platform.evidence(), roots=[platform.line.hsk])
    for at in (36, 90, 580, 660):  # usage, point, numbers of the signature over itself
        damaged = bytearray(root.encoded)
        damaged[at] ^= 1
        refused("HRK", platform.evidence(), roots=[CaCertificate.parse(damaged)])
        refused("HRK", platform.page_v1(), roots=[CaCertificate.parse(damaged)], allow_partial=True)
    # A stranger's root under the key id of a trusted one, before and behind it; and alone.
    double = CaCertificate.parse(altered(other.encoded, key_id=root.key_id, certifying_id=root.key_id))
    for roots in ([double, root], [root, double]):
        assert verify(platform.evidence(), roots=roots).root == root
    refused("HRK", platform.evidence(), roots=[double])
    other_hsk = Platform().line.hsk.encoded
    forged = altered(other_hsk, key_id=platform.line.hsk.key_id, certifying_id=root.key_id)
    refused("HSK", platform.evidence().with_certificates(forged + platform.chip.cek.encoded), roots=[root])


def test_what_was_not_checked_is_said(platform: Platform) -> None:
    def names(version: int = 1, **keywords: Any) -> list[str]:
        return [one.name for one in verify(platform.evidence(version), roots=platform.roots, **keywords).unchecked]

    assert names() == ["mask", "mnonce", "chip id"]
    assert names(report_data=REPORT_DATA) == ["mnonce", "chip id"]
    assert names(mnonce=MNONCE) == ["chip id"]
    assert names(2) == ["mnonce", "chip id"]
    assert names(2, mnonce=MNONCE, strict=False) == ["strict rules", "chip id"]


def test_certificates_from_a_store(platform: Platform, tmp_path: Path) -> None:
    bare = platform.page_v1()
    assert "chain incomplete" in str(refused("HSK", bare, roots=platform.roots))
    empty = CertificateStore([], tmp_path / "empty")
    refused("HSK", bare, roots=platform.roots, store=empty)
    verified = verify(bare, roots=platform.roots, store=platform.store(tmp_path), mnonce=MNONCE)
    assert verified.complete
    assert verified.unchecked == ()  # looked up under the chip id, so the CEK is that chip's
    # Certificates that came along win over the store's, and then nothing binds the chip id.
    along = verify(platform.evidence(), roots=platform.roots, store=platform.store(tmp_path), mnonce=MNONCE)
    assert [one.name for one in along.unchecked] == ["chip id"]
    # Another chip's certificates under this chip's name.
    other = Platform(platform.line)
    wrong = CertificateStore([], tmp_path / "wrong")
    wrong.add(platform.chip.chip_id, platform.line.hsk, other.chip.cek)
    refused("PEK", bare, roots=platform.roots, store=wrong)


@pytest.mark.parametrize("name", ["../../etc", "", "A/B"])
def test_hostile_chip_ids_reach_no_file(platform: Platform, tmp_path: Path, name: str) -> None:
    page = bytearray(platform.page_v2())
    page[0xCB4:0xCF4] = name.encode().ljust(64, b"\0")
    with pytest.raises((VerificationError, FormatError)):
        verify(page, roots=platform.roots, store=platform.store(tmp_path))


def test_partial(platform: Platform) -> None:
    verified = verify(platform.page_v1(), roots=platform.roots, allow_partial=True)
    assert not verified.complete
    assert (verified.chain, verified.root, verified.root_fingerprint) == (None, None, None)
    assert verified.checks == ("HRK", "report signature", "report fields", "MAC")
    assert [one.name for one in verified.unchecked] == ["HSK", "CEK", "PEK", "mask", "mnonce", "chip id"]
    assert "PARTIAL" in repr(verified)
    # With a complete chain there is nothing partial about it, and nothing is let through.
    assert verify(platform.evidence(), roots=platform.roots, allow_partial=True).complete
    refused("HSK", platform.evidence(), allow_partial=True)
    tampered = bytearray(platform.page_v1())
    tampered[0] ^= 1
    refused("report signature", tampered, roots=platform.roots, allow_partial=True)
    for usage, user_id in ((KeyUsage.PEK, b"HYGON-SSD-CEK"), (KeyUsage.PDH, USER_IDS[KeyUsage.PEK])):
        pek = CsvCertificate.build(usage=usage, algorithm=4, point=platform.pek.point, user_id=user_id)
        refused("PEK", platform.page_v2(pek=pek), roots=platform.roots, allow_partial=True)


def test_real_evidence(real_evidence: bytes) -> None:
    refused("HSK", real_evidence)
    verified = verify(real_evidence, allow_partial=True)
    assert not verified.complete
    assert verified.checks == ("HRK", "report signature", "report fields", "evidence")
    assert [one.name for one in verified.unchecked] == ["HSK", "CEK", "PEK", "mask", "MAC", "chip id", "event log"]
    # Valid over the masked bytes, not over the plain ones.
    report = verified.report
    report.pek.public_key.verify(report.signature, report.emitted[:0xB4], user_id=b"HYGON-SSD-PEK")
    with pytest.raises(Exception, match=r".") as caught:
        report.pek.public_key.verify(report.signature, report.info[:0xB4], user_id=b"HYGON-SSD-PEK")
    assert type(caught.value).__name__ == "SignatureError"
    verify(real_evidence, allow_partial=True, report_data=b"")
    refused("report data", real_evidence, allow_partial=True, report_data=b"x")


def test_real_values(real_evidence: bytes) -> None:
    report = read_evidence(real_evidence).report
    assert report.anonce.hex() == "26d7c75d"
    assert report.policy.to_bytes().hex() == "45000000"
    assert report.policy.flags == ("nodbg", "es", "csv3")
    assert (report.sig_usage, report.sig_algo) == (0x1002, 4)
    assert report.mnonce.hex() == "ad998a845c45cf30944d1c285629e768"
    assert report.measure.hex() == "ae2a2cf1f41a485fa37bf9ae92f678783c59fbc79de7b5d237743d58f5538034"
    assert not any(report.user_pubkey_digest + report.vm_id + report.vm_version + report.report_data)
    assert report.mac.hex() == "097e3d681ac92493da726f229b2fbd36eec5c06c30e0f29586295a2fedfd6975"
    assert (report.pek.version, report.pek.api_major, report.pek.api_minor) == (1, 1, 3)
    assert report.pek.user_id == b"HYGON-SSD-PEK"
    assert [slot.usage for slot in report.pek.slots] == [0x1004, 0x1001]
    assert not report.sealing_key_is_present
    assert not report.pek_is_masked


# Expectations of the caller.


def test_report_data(platform: Platform) -> None:
    evidence = platform.evidence()
    for data in (REPORT_DATA, REPORT_DATA.rstrip(b"\0"), REPORT_DATA + b"beyond 64 bytes"):
        assert "report data" in verify(evidence, roots=platform.roots, report_data=data).checks
    for data in (b"", REPORT_DATA[1:], REPORT_DATA.rstrip(b"\0") + b"\x01"):
        refused("report data", evidence, roots=platform.roots, report_data=data)


def test_mnonce(platform: Platform) -> None:
    refused("mnonce", platform.evidence(), roots=platform.roots, mnonce=bytes(16))
    with pytest.raises(LengthError):
        verify(platform.evidence(), roots=platform.roots, mnonce=bytes(15))
    verified = verify(platform.evidence(), roots=platform.roots)
    assert [one.name for one in verified.unchecked] == ["mask", "mnonce", "chip id"]
    assert "MAC" in verified.checks


# The MAC.


def with_page(platform: Platform, page: bytes, encoding: Any = "page") -> Evidence:
    return Evidence(Report.parse(page), hsk_cek=platform.hsk_cek, encoding=encoding)


def test_wrong_mac_with_a_sealing_key(platform: Platform) -> None:
    for page, last in ((platform.page_v1(), 2547), (platform.page_v2(), 3379)):
        wrong = bytearray(page)
        wrong[last] ^= 1
        refused("MAC", with_page(platform, bytes(wrong)), roots=platform.roots)


def test_zeroed_field(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    page[0x9B4:0x9D4] = bytes(32)
    # As emitted by the firmware nothing has been zeroed, so the MAC has to fit.
    refused("MAC", with_page(platform, bytes(page)), roots=platform.roots)
    refused("MAC", with_page(platform, bytes(page[:2548]), "raw"), roots=platform.roots)
    fitting = platform.page_v1(sealing_key=bytes(32))
    assert "MAC" in verify(with_page(platform, fitting[:2548], "raw"), roots=platform.roots).checks
    # rats-tls keeps the mask and zeroes the field.
    verified = verify(with_page(platform, bytes(page), "rats-tls"), roots=platform.roots)
    assert [one.name for one in verified.unchecked] == ["mask", "MAC", "chip id"]


def test_client_with_sealing_key_is_checked(platform: Platform) -> None:
    evidence = read_evidence(platform.evidence().to_csv_rs()).with_certificates(platform.hsk_cek)
    page = bytearray(evidence.report.page())
    page[0x9B4:0x9D4] = SEALING_KEY
    assert "MAC" in verify(with_page(platform, bytes(page), "csv-rs"), roots=platform.roots).checks
    page[0x9B4] ^= 1
    refused("MAC", with_page(platform, bytes(page), "csv-rs"), roots=platform.roots)


# Fields and what lies beside the report.


def test_signature_words(platform: Platform) -> None:
    for at in (0xB4, 0xB5, 0xB8, 0xBB):
        page = bytearray(platform.page_v1())
        page[at] ^= 0x10
        refused("report fields", with_page(platform, bytes(page)), roots=platform.roots)
        refused("report fields", with_page(platform, bytes(page)), roots=platform.roots, strict=False)


def test_padding_is_zero_in_strict_mode(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    page[4095] = 1
    refused("report fields", with_page(platform, bytes(page)), roots=platform.roots)
    assert verify(with_page(platform, bytes(page)), roots=platform.roots, strict=False).complete


def resigned_v2(platform: Platform, change: Callable[[bytearray], None]) -> bytes:
    page = bytearray(platform.page_v2())
    change(page)
    signature = platform.pek_key.sign(bytes(page[:0x400]), user_id=b"HYGON-SSD-PEK")
    page[0x400:0x420], page[0x448:0x468] = signature[31::-1], signature[:31:-1]
    return bytes(page)


def test_reserved_and_rtmr0_of_v2(platform: Platform) -> None:
    for at in (0xC2, 0x170, 0x3FF, 0xD0):
        def change(page: bytearray, at: int = at) -> None:
            page[at] ^= 0x80

        page = resigned_v2(platform, change)
        refused("report fields", with_page(platform, page), roots=platform.roots)
        assert verify(with_page(platform, page), roots=platform.roots, strict=False).complete


def json_evidence(platform: Platform, **changes: Any) -> Evidence:
    report = Report.parse(platform.page_v1())
    beside = {"pek_beside": platform.pek.encoded, "serial_beside": report.serial_number}
    return Evidence(report, hsk_cek=platform.hsk_cek, encoding="json", **(beside | changes))


def test_what_lies_beside_the_report(platform: Platform) -> None:
    assert "evidence" in verify(json_evidence(platform), roots=platform.roots).checks
    refused("evidence", json_evidence(platform, serial_beside=b"SIM1".ljust(64, b"\0")), roots=platform.roots)
    # Another PEK of the same chip, with another second slot: genuine by itself, not the report's.
    other = platform.pek.with_signature(2, SM2PrivateKey.generate(), KeyUsage.OCA, USER_IDS[KeyUsage.OCA])
    refused("evidence", json_evidence(platform, pek_beside=other.encoded), roots=platform.roots)
    refused("PEK", json_evidence(platform, pek_beside=Platform(platform.line).pek.encoded), roots=platform.roots)
    # One of the two alone is compared as well.
    for one in ("pek_beside", "serial_beside"):
        assert "evidence" in verify(json_evidence(platform, **{one: None}), roots=platform.roots).checks
    refused("evidence", json_evidence(platform, pek_beside=other.encoded, serial_beside=None), roots=platform.roots)


def test_the_chip_id_is_bound_by_the_mac_only(platform: Platform) -> None:
    page = bytearray(platform.page_v2())
    page[0xCB4:0xCF4] = b"KPA64911240507".ljust(64, b"\0")
    refused("MAC", with_page(platform, bytes(page)), roots=platform.roots)
    page[0xCF4:0xD14] = bytes(32)  # what any client does: the MAC cannot be checked any more, and this is said
    verified = verify(with_page(platform, bytes(page), "csv-rs"), roots=platform.roots)
    assert "chip id is only what the evidence says" in verified.unchecked[0].reason


def test_a_report_by_another_pek(platform: Platform) -> None:
    page = platform.page_v1(pek_key=SM2PrivateKey.generate())
    refused("report signature", with_page(platform, page), roots=platform.roots)


def test_a_report_signed_over_plain_bytes(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    signature = platform.pek_key.sign(masked(bytes(page[:0xB4]), bytes(page[0xBC:0xC0])), user_id=b"HYGON-SSD-PEK")
    page[0xC0:0xE0], page[0x108:0x128] = signature[31::-1], signature[:31:-1]
    refused("report signature", with_page(platform, bytes(page)), roots=platform.roots)


def test_a_report_signed_with_another_user_id(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    signature = platform.pek_key.sign(bytes(page[:0xB4]))
    page[0xC0:0xE0], page[0x108:0x128] = signature[31::-1], signature[:31:-1]
    refused("report signature", with_page(platform, bytes(page)), roots=platform.roots)


# Event log.


def test_event_log(platform: Platform) -> None:
    rtmrs = [MEASURE, REGISTERS[1], REGISTERS[2], REGISTERS[3], bytes(32)]
    log = build_log([(register, 0x0D, digest, b"event") for register, digest in EVENTS])
    report = Report.parse(platform.page_v2(rtmrs=rtmrs))

    def evidence(log: bytes, report: Report = report) -> Evidence:
        return Evidence(report, hsk_cek=platform.hsk_cek, event_log=log, encoding="json")

    verified = verify(evidence(log), roots=platform.roots)
    assert "event log" in verified.checks
    assert len(claims(verified)["uefi_event_logs"]) == 82
    shorter = build_log([(register, 0x0D, digest, b"event") for register, digest in EVENTS[:-1]])
    refused("event log", evidence(shorter), roots=platform.roots)
    refused("event log", evidence(log[:-20]), roots=platform.roots)
    refused("event log", evidence(b""), roots=platform.roots)
    for register in (0, 5, 0xFFFF):
        foreign = build_log([*((register, 0x0D, digest, b"event") for register, digest in EVENTS), (register, 4, bytes(32), b"")])
        refused("event log", evidence(foreign), roots=platform.roots)
    refused("event log", evidence(log, Report.parse(platform.page_v2(rtmrs=RTMRS))), roots=platform.roots)
    for index in range(1, 5):  # each register, also one that no event extends
        wrong = [bytes(32) if number == index and number < 4 else value for number, value in enumerate(rtmrs)]
        wrong[4] = bytes(32) if index < 4 else b"\x01" * 32
        other = evidence(log, Report.parse(platform.page_v2(rtmrs=wrong)))
        refused("event log", other, roots=platform.roots)
        assert "uefi_event_logs" not in claims(other)
    v1 = Evidence(Report.parse(platform.page_v1()), hsk_cek=platform.hsk_cek, event_log=log, encoding="json")
    assert verify(v1, roots=platform.roots).unchecked[-1].name == "event log"


# Every bit.


def flips(length: int, areas: list[tuple[int, int]]) -> list[int]:
    return [bit for start, stop in areas for bit in range(8 * start, 8 * min(stop, length))]


def survivors(platform: Platform, page: bytes, hsk_cek: bytes, bits_of_page: list[int], bits_of_certs: list[int]) -> list[str]:
    """The flipped bits that verify() did not refuse. Keys are prepared and the chain is cached: only bytes that differ cost."""
    from csvfast.attest import ChainCache

    cache = ChainCache(4)
    for _ in range(3):
        verify(Evidence(Report.parse(page), hsk_cek=hsk_cek, encoding="page"), roots=platform.roots, mnonce=MNONCE, cache=cache)
    passed = []

    def genuine(page: bytes, certs: bytes) -> bool:
        try:
            evidence = Evidence(Report.parse(page), hsk_cek=certs, encoding="page")
            return isinstance(verify(evidence, roots=platform.roots, mnonce=MNONCE, cache=cache), Verified)
        except VerificationError:
            return False

    for bit in bits_of_page:
        flipped = bytearray(page)
        flipped[bit // 8] ^= 1 << bit % 8
        if genuine(bytes(flipped), hsk_cek):
            passed.append(f"page byte {bit // 8:#x} bit {bit % 8}")
    for bit in bits_of_certs:
        flipped = bytearray(hsk_cek)
        flipped[bit // 8] ^= 1 << bit % 8
        if genuine(page, bytes(flipped)):
            passed.append(f"certificates byte {bit // 8:#x} bit {bit % 8}")
    return passed


@pytest.mark.parametrize("version", [1, 2])
def test_every_flipped_bit_of_the_page_is_refused(platform: Platform, version: int) -> None:
    page = platform.page_v1() if version == 1 else platform.page_v2()
    used = 2548 if version == 1 else 3380
    assert survivors(platform, page, platform.hsk_cek, flips(4096, [(0, used)]), []) == []


def test_every_flipped_bit_of_the_certificates_is_refused(platform: Platform) -> None:
    # Of the CEK's second slot only its words are specified: it is empty, and its numbers mean nothing.
    areas = [(0, 832 + 1572), (832 + 1716, 2916)]
    assert survivors(platform, platform.page_v1(), platform.hsk_cek, [], flips(2916, areas)) == []


def test_the_mask_is_bound_by_the_mac(platform: Platform) -> None:
    """A changed mask changes every field under a valid signature; with the request's mnonce it is noticed."""
    page, delta = platform.page_v1(), b"\x01\0\0\0"
    changed = bytearray(page)
    changed[0xBC:0xC0] = masked(page[0xBC:0xC0], delta)
    changed[0xB4:0xBC] = masked(page[0xB4:0xBC], delta)
    changed[0x150:0x9B4] = masked(page[0x150:0x9B4], delta)
    refused("MAC", with_page(platform, bytes(changed)), roots=platform.roots)
    # Whoever can read the report can also make a MAC that fits; the mnonce is another one then.
    key = Report.parse(bytes(changed)).mnonce
    changed[0x9D4:0x9F4] = hmac_sm3(key, bytes(changed[0x150:0x9D4])).digest()
    refused("mnonce", with_page(platform, bytes(changed)), roots=platform.roots, mnonce=MNONCE)
    refused("report data", with_page(platform, bytes(changed)), roots=platform.roots, report_data=REPORT_DATA)
    assert verify(with_page(platform, bytes(changed)), roots=platform.roots).report.measure != MEASURE
