"""The guest policy word (3.4) and the report request (3.1, vector A.7)."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.crypto import sm3
from csvfast.errors import ArgumentError, BufferTypeError, FormatError, LengthError
from csvfast.report import EXTENDED_MAGIC, REPORT_PAGE, GuestPolicy, ReportRequest

DATA = bytes.fromhex(
    "67c6697351ff4aec29cdbaabf2fbe3467cc254f81be8e78d765a2e63339fc99a66320db73158a35a255d051758e95ed4abb2cdc69bb454110e827441213ddc87"
)
MNONCE = bytes.fromhex("70e93ea141e1fc673e017e97eadc6b96")
HASH = bytes.fromhex("134c086221f6f79b1c15f5b9764aa280520fa0e9d4826ab1590677f382150399")


def test_policy_bits() -> None:
    policy = GuestPolicy(0x45)
    assert policy.flags == ("nodbg", "es", "csv3")
    assert (policy.nodbg, policy.noks, policy.es, policy.nosend, policy.domain) == (True, False, True, False, False)
    assert (policy.csv, policy.csv3, policy.asid_reuse) == (False, True, False)
    assert GuestPolicy(0x04031280).to_dict() == {
        "nodbg": 0, "noks": 0, "es": 0, "nosend": 0, "domain": 0, "csv": 0, "csv3": 0, "asid_reuse": 1,
        "hsk_version": 2, "cek_version": 1, "api_major": 3, "api_minor": 4,
    }  # fmt: skip


@given(st.integers(0, 0xFFFFFFFF))
def test_policy_round_trip(value: int) -> None:
    policy = GuestPolicy(value)
    fields = policy.to_dict()
    again = GuestPolicy.of(**fields)  # type: ignore[arg-type]
    assert again == policy == GuestPolicy.from_bytes(policy.to_bytes()) == pickle.loads(pickle.dumps(policy))
    assert {name: int(getattr(policy, name)) for name in fields} == fields
    assert int(policy) == value
    assert hash(again) == hash(policy)


def test_policy_is_immutable_and_in_range() -> None:
    policy = GuestPolicy(1)
    with pytest.raises(AttributeError):
        policy.value = 2
    for wrong in (-1, 1 << 32):
        with pytest.raises(ArgumentError):
            GuestPolicy(wrong)
    for field, limit in {"hsk_version": 16, "cek_version": 16, "api_major": 256, "api_minor": 256}.items():
        with pytest.raises(ArgumentError, match=field):
            GuestPolicy.of(**{field: limit})
    with pytest.raises(FormatError):
        GuestPolicy.from_bytes(b"123")
    assert GuestPolicy(1) != 1


def test_request_vector() -> None:
    page = ReportRequest.build(DATA, MNONCE)
    assert page == DATA + MNONCE + HASH + bytes(REPORT_PAGE - 112)
    request = ReportRequest.parse(page)
    assert request == (DATA, MNONCE, False, HASH)
    assert request.hash_is_valid


def test_extended_request() -> None:
    page = ReportRequest.build(b"short", MNONCE, extended=True)
    assert page[:64] == b"short".ljust(64, b"\0")
    assert page[80:112] == sm3(page[:80]).digest()
    assert page[112:132] == EXTENDED_MAGIC + b"\x01\0\0\0"
    assert not any(page[132:])
    assert ReportRequest.parse(page).extended
    assert ReportRequest.parse(page[:132]) == ReportRequest.parse(bytearray(page))
    assert not ReportRequest.parse(page[:128] + bytes(REPORT_PAGE - 128)).extended


def test_random_mnonce_and_wrong_hash() -> None:
    one, two = ReportRequest.make(b""), ReportRequest.make(b"")
    assert one.mnonce != two.mnonce
    for bit in range(80 * 8, 112 * 8):
        page = bytearray(ReportRequest.build(DATA, MNONCE))
        page[bit // 8] ^= 1 << bit % 8
        assert not ReportRequest.parse(page).hash_is_valid
    wrong = ReportRequest.parse(page)
    assert wrong.encode() == page  # a wrong hash is written back as it stands


def test_legacy_request_leaves_the_rest_of_its_page() -> None:
    page = ReportRequest.build(DATA, MNONCE)[:112] + b"\xaa" * (REPORT_PAGE - 112)
    assert ReportRequest.parse(page) == (DATA, MNONCE, False, HASH)


def test_request_refusals() -> None:
    with pytest.raises(LengthError, match="65"):
        ReportRequest.build(bytes(65))
    with pytest.raises(LengthError, match="mnonce of 15"):
        ReportRequest.build(b"", bytes(15))
    with pytest.raises(BufferTypeError):
        ReportRequest.build("text")  # type: ignore[arg-type]
    for length in (0, 111, 113, 4095, 4097):
        with pytest.raises(FormatError, match="length"):
            ReportRequest.parse(bytes(length))
    page = bytearray(ReportRequest.build(b"", MNONCE, extended=True))
    page[128] = 3
    with pytest.raises(FormatError) as caught:
        ReportRequest.parse(page)
    assert (caught.value.field, caught.value.offset) == ("flags", 128)
