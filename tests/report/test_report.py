"""Reports: layouts at their offsets, masking, what is signed and what is MACed, from an independent look at the bytes."""

from __future__ import annotations

import struct

import pytest
from attest.simulated_evidence import (
    ANONCE,
    MEASURE,
    MNONCE,
    POLICY,
    REPORT_DATA,
    RTMRS,
    SEALING_KEY,
    Platform,
)
from hypothesis import given
from hypothesis import strategies as st

from csvfast.crypto import hmac_sm3
from csvfast.errors import ArgumentError, FormatError, LengthError
from csvfast.report import Report, client_report, masked

BYTES4 = st.binary(min_size=4, max_size=4)


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


def xor(data: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


def test_mask_vector() -> None:
    text = masked(b"user data".ljust(64, b"\0"), ANONCE)
    assert text.hex().startswith("53a4a22f06b3a62947d7c75d26d7c75d")


@given(st.binary(max_size=300), BYTES4)
def test_mask_is_a_byte_wise_xor(data: bytes, mask: bytes) -> None:
    assert masked(data, mask) == xor(data, mask)
    assert masked(masked(data, mask), mask) == data


def test_v1_bytes(platform: Platform) -> None:
    page = platform.page_v1()
    fields = platform.fields()
    plain = xor(page[:0xBC], ANONCE)
    assert plain == b"".join(
        (
            fields["user_pubkey_digest"], fields["vm_id"], fields["vm_version"], REPORT_DATA, MNONCE, MEASURE,
            struct.pack("<III", POLICY.value, 0x1002, 4),
        )
    )  # fmt: skip
    assert page[0xBC:0xC0] == ANONCE
    for at in (0xC0, 0x108):
        assert page[at + 32 : at + 72] == bytes(40)
    signature = page[0xC0:0xE0][::-1] + page[0x108:0x128][::-1]
    platform.pek_key.public_key.verify(signature, page[:0xB4], user_id=b"HYGON-SSD-PEK")
    assert xor(page[0x150:0x974], ANONCE) == platform.pek.encoded
    assert xor(page[0x974:0x9B4], ANONCE) == platform.chip.chip_id.encode().ljust(64, b"\0")
    assert page[0x9B4:0x9D4] == SEALING_KEY
    assert page[0x9D4:0x9F4] == hmac_sm3(MNONCE, page[0x150:0x9D4]).digest()
    assert page[0x9F4:] == bytes(1548)


def test_v2_bytes(platform: Platform) -> None:
    page = platform.page_v2()
    assert page[0x80:0x90] == MNONCE
    assert struct.unpack_from("<IIIIH", page, 0xB0) == (POLICY.value, 0x1002, 4, 2337, 1)
    assert page[0xC2:0xD0] == bytes(14)
    assert page[0xD0:0x170] == b"".join(RTMRS)
    assert page[0x170:0x400] == bytes(656)
    signature = page[0x400:0x420][::-1] + page[0x448:0x468][::-1]
    platform.pek_key.public_key.verify(signature, page[:0x400], user_id=b"HYGON-SSD-PEK")
    assert page[0x490:0xCB4] == platform.pek.encoded
    assert page[0xCB4:0xCF4] == platform.chip.chip_id.encode().ljust(64, b"\0")
    assert page[0xCF4:0xD14] == SEALING_KEY
    assert page[0xD14:0xD34] == hmac_sm3(MNONCE, page[0x490:0xD14]).digest()
    assert page[0xD34:] == bytes(716)


@pytest.mark.parametrize("version", [1, 2])
def test_parse_gives_back_what_was_built(platform: Platform, version: int) -> None:
    page = platform.page_v1() if version == 1 else platform.page_v2()
    raw = page[: 2548 if version == 1 else 3380]
    for data in (page, raw, bytearray(page), memoryview(raw)):
        report = Report.parse(data)
        fields = platform.fields()
        for name in ("user_pubkey_digest", "vm_id", "vm_version", "report_data", "mnonce", "measure", "policy", "pek", "chip_id"):
            assert getattr(report, name) == fields[name], name
        assert (report.version, report.sig_usage, report.sig_algo) == (version, 0x1002, 4)
        assert report.sealing_key == SEALING_KEY
        assert report.sealing_key_is_present
        assert report.pek_is_masked == (version == 1)
        assert report.mac_is_valid()
        assert report.mac_is_valid(MNONCE)
        assert not report.mac_is_valid(bytes(16))
        assert report.page() == page
        assert report.emitted == raw
    if version == 1:
        assert (report.anonce, report.build, report.rtmr_version, report.rtmrs) == (ANONCE, None, None, ())
    else:
        assert (report.anonce, report.build, report.rtmr_version, list(report.rtmrs)) == (bytes(4), 2337, 1, RTMRS)
    assert Report.parse(page) == report
    assert hash(Report.parse(page)) == hash(report)


@given(anonce=BYTES4.filter(any))
def test_any_mask(anonce: bytes) -> None:
    report = Report.parse(PLATFORM.page_v1(anonce=anonce))
    assert (report.version, report.anonce, report.measure) == (1, anonce, MEASURE)
    assert report.pek == PLATFORM.pek
    assert report.mac_is_valid()


PLATFORM = Platform()


@pytest.mark.parametrize("version", [1, 2])
def test_client_report(platform: Platform, version: int) -> None:
    page = platform.page_v1() if version == 1 else platform.page_v2()
    left = client_report(page)
    report, emitted = Report.parse(left), Report.parse(page)
    assert len(left) == 4096
    assert report.pek_bytes == platform.pek.encoded
    assert left[report.pek_offset : report.pek_offset + 2084] == platform.pek.encoded
    assert not report.pek_is_masked
    assert not report.sealing_key_is_present
    assert (report.chip_id, report.mac, report.signed_bytes) == (emitted.chip_id, emitted.mac, emitted.signed_bytes)
    assert client_report(left) == left
    # With the key put back in its place, the MAC can be checked again: it is over the masked bytes.
    restored = bytearray(left)
    restored[len(report.emitted) - 64 : len(report.emitted) - 32] = SEALING_KEY
    assert Report.parse(restored).mac_is_valid()


def test_secrets_are_not_shown(platform: Platform) -> None:
    assert SEALING_KEY.hex() not in repr(Report.parse(platform.page_v1()))


@pytest.mark.parametrize("length", [0, 1, 2547, 2549, 3379, 3381, 4095, 4097])
def test_lengths(length: int) -> None:
    with pytest.raises(FormatError, match="length"):
        Report.parse(bytes(length))


@pytest.mark.parametrize("build", [0x1002, 0x1003, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("fourth", [bytes(32), bytes(8) + b"\x02\x10\0\0" + bytes(20)])
def test_a_page_of_v2_whose_words_look_like_a_v1_pek(platform: Platform, build: int, fourth: bytes) -> None:
    """Where V1 has PEK usage and mask, V2 has rtmr4 and build: zero and 0x1002 are not a masked PEK."""
    page = platform.page_v2(build=build, rtmrs=[*RTMRS[:4], fourth])
    for one in (page, client_report(page, 2)):
        assert (Report.parse(one).version, Report.parse(one).build) == (2, build)


@pytest.mark.parametrize("version", [1, 2])
def test_a_sealing_key_is_noticed_in_every_byte(platform: Platform, version: int) -> None:
    page = platform.page_v1() if version == 1 else platform.page_v2()
    at = 0x9B4 if version == 1 else 0xCF4
    for place in range(32):
        changed = bytearray(page)
        changed[at : at + 32] = bytes(32)
        assert not Report.parse(changed, version).sealing_key_is_present  # type: ignore[arg-type]
        changed[at + place] = 1
        assert Report.parse(changed, version).sealing_key_is_present  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [b"A B", b"A\x7f", b"\xff", b"\0A", b"A\0B", b""])
def test_chip_ids_that_are_none(platform: Platform, name: bytes) -> None:
    page = bytearray(platform.page_v2())
    page[0xCB4:0xCF4] = name.ljust(64, b"\0")
    with pytest.raises(FormatError, match="sn"):
        Report.parse(page, 2).chip_id  # noqa: B018


def test_without_a_mask_nothing_is_masked(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    page[0xBC:0xC0] = bytes(4)
    assert not Report.parse(page, 1).pek_is_masked
    assert Report.parse(page, 1).pek_bytes == page[0x150:0x974]


def test_length_against_version(platform: Platform) -> None:
    page = platform.page_v1()
    for data, version in ((page[:2548], 2), (platform.page_v2()[:3380], 1)):
        with pytest.raises(FormatError, match="length"):
            Report.parse(data, version)
    assert Report.parse(page, 2).version == 2  # a wrapper's word counts


def test_unreadable_fields_name_their_place(platform: Platform) -> None:
    page = bytearray(platform.page_v1())
    page[0xC0 + 40] = 1
    with pytest.raises(FormatError) as caught:
        _ = Report.parse(page).signature
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("report V1", "sig r", 0xC0 + 40)
    page = bytearray(platform.page_v2())
    page[0xCB4] = 0x80
    with pytest.raises(FormatError) as caught:
        _ = Report.parse(page).chip_id
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("report V2", "sn", 0xCB4)
    for serial in (bytes(64), b"A B".ljust(64, b"\0"), b"A\0B".ljust(64, b"\0"), b"\0A".ljust(64, b"\0")):
        page[0xCB4:0xCF4] = serial
        with pytest.raises(FormatError):
            _ = Report.parse(page).chip_id


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"anonce": bytes(4)}, ArgumentError),
        ({"anonce": bytes(3)}, LengthError),
        ({"vm_id": bytes(15)}, LengthError),
        ({"measure": bytes(33)}, LengthError),
        ({"report_data": b"short"}, LengthError),
        ({"sealing_key": bytes(31)}, LengthError),
        ({"chip_id": ""}, ArgumentError),
        ({"chip_id": "SIM\n"}, ArgumentError),
        ({"chip_id": "S" * 65}, ArgumentError),
    ],
)
def test_build_v1_refusals(platform: Platform, changes: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        platform.page_v1(**changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rtmrs": RTMRS[:4]}, LengthError),
        ({"rtmrs": [bytes(32)] * 5}, ArgumentError),
        ({"rtmrs": [MEASURE, b"", b"", b"", b""]}, LengthError),
        ({"build": -1}, ArgumentError),
        ({"rtmr_version": 1 << 16}, ArgumentError),
    ],
)
def test_build_v2_refusals(platform: Platform, changes: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        platform.page_v2(**changes)
