"""Secure calls: the protocol as the guest's kernel speaks it, reports and registers through it, and malformed requests."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.csv3_guest import (
    CALL_A,
    CALL_B,
    CALL_GUID,
    FIRMWARE_GPA,
    PAGE,
    SHARED,
    SMR,
    GuestView,
    SecureCalls,
    firmware,
    launch,
    platform,
)

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.errors import FirmwareError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import Processor
from csvfast.processor.npt import NestedPageFault
from csvfast.processor.profile import Profile
from csvfast.processor.secure_call import boot_pages
from csvfast.report import Report, ReportRequest

Refused = Callable[..., FirmwareError]
ENC, DEC, RESET, UPDATE_TABLE, REQ_REPORT, RTMR = 1, 2, 3, 4, 7, 8
ACK, INTERNAL, COMMAND, PARAM, ADDRESS, LENGTH = range(0x6B, 0x71)
BLOCK, REQUEST, RESPONSE = 0x20000, 0x21000, 0x22000


@pytest.fixture
def secure(chip: ChipIdentity) -> Iterator[Processor]:
    with platform(chip) as processor:
        yield processor


@pytest.fixture
def view(secure: Processor) -> GuestView:
    return GuestView(secure, launch(secure))


def test_boot_pages_from_the_firmware(secure: Processor, view: GuestView) -> None:
    assert view.read(CALL_A, 16) == CALL_GUID
    with pytest.raises(NestedPageFault) as caught:
        secure.guest_read(view.handle, CALL_B, 16)
    assert caught.value.error_code == 4
    assert view.read(CALL_B, 16) == CALL_GUID  # the fault swapped the two
    with pytest.raises(NestedPageFault):
        secure.guest_read(view.handle, CALL_A, 16)
    entries = secure.csv3_record(secure.guests[view.handle]).table.entries
    assert entries[CALL_A // PAGE].frame == entries[CALL_B // PAGE].frame


@pytest.mark.parametrize("write_first", [True, False])
def test_either_page_may_be_written_first(view: GuestView, write_first: bool) -> None:
    """The kernel does not know which page is present; a write that faults only swaps the pair."""
    calls = SecureCalls(view, write_first=write_first)
    for _ in range(4):
        assert calls(DEC, [(0x30000, PAGE)])[0] == ACK
        assert calls(ENC, [(0x30000, PAGE)])[0] == ACK


def test_answers_to_malformed_requests(view: GuestView) -> None:
    calls = SecureCalls(view)
    for request in (5, 6, 9, 0x6A):
        assert calls(request, [(0x30000, PAGE)])[0] == COMMAND
    for entry, answer in (
        ((0x30001, PAGE), ADDRESS), ((1 << 47, PAGE), ADDRESS), (((1 << 64) - PAGE, PAGE), ADDRESS), ((0x30000, 0), LENGTH),
        ((0x30000, PAGE + 1), LENGTH), ((0x30000, 1 << 47), LENGTH), ((0x30000, (1 << 64) - PAGE), LENGTH),
        ((CALL_A, PAGE), ADDRESS), ((CALL_B, PAGE), ADDRESS), ((0, 1 << 40), ADDRESS),
    ):  # fmt: skip
        for request in (ENC, DEC):
            assert calls(request, [(0x40000, PAGE), entry])[0] == answer
    table = view.processor.csv3_record(view.processor.guests[view.handle]).table
    assert not list(table.shared)  # not even the entry that was right
    for count in (0, 255, 0xFFFFFFFF):
        view.write(calls.writer + 16, struct.pack("<IIQ", DEC, count, 0))
        assert struct.unpack("<I", view.read(calls.reader + 16, 4))[0] == PARAM
        calls.writer, calls.reader = calls.reader, calls.writer
    many = [(0x100000 + 2 * PAGE * number, PAGE) for number in range(254)]
    assert calls(DEC, many)[0] == ACK
    assert len(table.shared) == 254


def test_update_table(secure: Processor, view: GuestView) -> None:
    """Each CPU gets a pair; the pages of an older table become ordinary memory."""
    view.write(0x50000, b"\x11" * 0x4000)
    calls = SecureCalls(view)
    pool = secure.csv3_record(secure.guests[view.handle]).pool
    free = pool.free
    assert calls(UPDATE_TABLE, [(0x50000, 2 * PAGE), (0x52000, 2 * PAGE)])[0] == ACK
    assert pool.free == free + 2  # two pages lead to one frame
    for first in (0x50000, 0x52000):
        # csv.c: page index 0 writes B and reads A
        cpu = SecureCalls(view, first, write_first=False)
        for _ in range(3):
            assert cpu(DEC, [(0x60000, PAGE)])[0] == ACK
        assert cpu(UPDATE_TABLE, [(0x70000, 2 * PAGE)])[0] == PARAM  # only through the boot pair
    for entries, answer in (
        ([(0x54000, PAGE)], LENGTH), ([(0x54000, 3 * PAGE)], LENGTH), ([(0x60000, 2 * PAGE)], ADDRESS),
        ([(0x54000, 2 * PAGE), (0x55000, 2 * PAGE)], ADDRESS), ([(CALL_A, 2 * PAGE)], ADDRESS),
        ([(CALL_B, 2 * PAGE)], ADDRESS),
    ):  # fmt: skip
        assert calls(UPDATE_TABLE, entries)[0] == answer
    assert calls(UPDATE_TABLE, [(0x51000, 2 * PAGE), (0x56000, 2 * PAGE)])[0] == ACK
    record = secure.csv3_record(secure.guests[view.handle])
    assert set(record.pairs) == {page // PAGE for page in (CALL_A, CALL_B, 0x51000, 0x52000, 0x56000, 0x57000)}
    assert view.read(0x50000, 16)[8:] == b"\x11" * 8  # what stood there when the pair was made
    view.write(0x50000, b"again ordinary")
    assert view.read(0x53000, 4) == bytes(4)
    assert SecureCalls(view, 0x56000, write_first=False)(ENC, [(0x60000, PAGE)])[0] == ACK
    frames = [
        entry.frame for gfn, entry in record.table.entries.items() if entry.private and record.canonical(gfn) == gfn
    ]
    assert len(set(frames)) == len(frames)


def test_calls_need_no_host_data(secure: Processor, view: GuestView) -> None:
    """What the guest asks and is told never stands in memory as plaintext."""
    calls = SecureCalls(view)
    marker = b"body the host must not see......"
    calls(RTMR, body=struct.pack("<HHIBBH20x32s", 4, 64, 0, 3, 0, 32, marker))
    raw = bytes(secure.memory.raw[: 128 << 20])
    assert marker not in raw


def report_block(
    flags: int = 0, response: int = RESPONSE, room: int = 0, request: int = REQUEST, size: int = 0
) -> bytes:
    return struct.pack("<IIQ16xIIQII", 0, flags, response, room, 0, request, size, 0)


def parsed(block: bytes) -> tuple[int, int, int, int]:
    """handle, response length, request length, firmware error"""
    handle, _, _, room, _, _, size, error = struct.unpack("<IIQ16xIIQII", block)
    return handle, room, size, error


@pytest.mark.parametrize("extended", [False, True])
def test_report(secure: Processor, view: GuestView, extended: bool) -> None:
    """As csv3_get_report() of the kernel's csv-guest driver: ask for the lengths, then for the report."""
    request = ReportRequest.build(b"data of the verifier", b"sixteen bytes...", extended=extended)
    for page in (BLOCK, REQUEST, RESPONSE):
        view.write(page, bytes(PAGE))
    calls = SecureCalls(view)
    view.write(BLOCK, report_block(int(extended)))
    assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ACK
    handle, room, size, error = parsed(view.read(BLOCK, 56))
    assert (handle, room, size, error) == (view.handle, PAGE, 132 if extended else 112, S.INVALID_LENGTH)
    view.write(REQUEST, request[:size])
    view.write(BLOCK, report_block(int(extended), room=room, size=size))
    assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ACK
    assert parsed(view.read(BLOCK, 56)) == (view.handle, PAGE, size, 0)
    report = Report.parse(view.read(RESPONSE, PAGE))
    assert report.version == (2 if extended else 1)
    assert report.mac_is_valid(b"sixteen bytes...")
    assert report.report_data.rstrip(b"\0") == b"data of the verifier"
    assert report.measure == secure.guests[view.handle].measure
    assert secure.identity is not None
    secure.identity.pek.public_key.verify(report.signature, report.signed_bytes, user_id=b"HYGON-SSD-PEK")
    if extended:
        assert report.build == 2337
        assert report.rtmr_version == 1
        assert report.rtmrs[0] == report.measure
        assert not any(b"".join(report.rtmrs[1:]))


def test_report_refusals(view: GuestView) -> None:
    calls = SecureCalls(view)
    request = bytearray(ReportRequest.build(b"data", bytes(16)))
    for page in (BLOCK, REQUEST, RESPONSE, 0x30000):
        view.write(page, bytes(PAGE))
    assert calls(REQ_REPORT, [(BLOCK, 55)])[0] == LENGTH
    for place in (0x90000, BLOCK + PAGE - 55, CALL_A, 1 << 47, (1 << 64) - 56):
        assert calls(REQ_REPORT, [(place, 56)])[0] == ADDRESS
    view.write(REQUEST, bytes(request[:112]))
    for fields in (
        {"response": 0x90000}, {"response": RESPONSE + 16}, {"response": CALL_A}, {"request": 0x90000},
        {"request": REQUEST + PAGE - 111}, {"request": (1 << 64) - 112},
    ):  # fmt: skip
        view.write(BLOCK, report_block(room=PAGE, size=112, **fields))
        assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ADDRESS
    request[80] ^= 1
    view.write(REQUEST, bytes(request[:112]))
    view.write(BLOCK, report_block(room=PAGE, size=112))
    assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ACK
    assert parsed(view.read(BLOCK, 56))[3] == S.SECURE_DATA_INVALID
    assert view.read(RESPONSE, PAGE) == bytes(PAGE)
    assert calls(DEC, [(0x30000, PAGE)])[0] == ACK
    view.write(0x30000, b"shared now")
    assert view.processor.memory.read(SHARED, 10, 0) == b"shared now"
    view.write(BLOCK, report_block(room=PAGE, size=112, response=0x30000))
    assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ADDRESS  # no report into shared memory: it holds the sealing key


def test_rtmr_through_the_page(secure: Processor, view: GuestView) -> None:
    calls = SecureCalls(view)
    answer, reply = calls(RTMR, body=struct.pack("<HHIHB21x", 1, 32, 0xFFFFFFFF, 0, 0))
    assert (answer, struct.unpack("<HHIHB21x", reply)) == (ACK, (1, 32, 0, 1, 1))
    answer, reply = calls(RTMR, body=struct.pack("<HHIH22x", 2, 32, 0, 1))
    assert (answer, reply[4:8]) == (ACK, bytes(4))
    data = csvfast.sm3(b"event").digest()
    answer, reply = calls(RTMR, body=struct.pack("<HHIBBH20x32s", 4, 64, 0, 3, 0, 32, data))
    assert (answer, reply[4:8]) == (ACK, bytes(4))
    answer, reply = calls(RTMR, body=struct.pack("<HHII20x160x", 3, 32 + 160, 0, 31))
    registers = [reply[32 + 32 * number : 64 + 32 * number] for number in range(5)]
    assert registers[0] == secure.guests[view.handle].measure
    assert registers[3].hex() == "a1321a75cd9a5275dc94ebb4d12ff3a3ac64e7bc22511fa31a32d844711f11f0"


def test_old_firmware_has_no_rtmr(chip: ChipIdentity) -> None:
    with platform(chip, profile=Profile(1, 3, 2300, csv3=True)) as processor:
        guest = GuestView(processor, launch(processor))
        assert SecureCalls(guest)(RTMR, body=struct.pack("<HHIHB21x", 1, 32, 0, 0, 0))[0] == COMMAND


def test_boot_table_parser() -> None:
    image = firmware()
    assert boot_pages(image) == CALL_A
    assert boot_pages(firmware(base=CALL_A + 1)) is None
    assert boot_pages(firmware(base=0)) is None
    assert boot_pages(firmware(size=0x1000)) is None
    assert boot_pages(b"") is None
    assert boot_pages(image[-40:]) is None
    assert boot_pages(image[:-1]) is None
    for place in range(len(image) - 110, len(image)):
        for bit in range(8):
            changed = bytearray(image)
            changed[place] ^= 1 << bit
            base = boot_pages(bytes(changed))
            assert base is None or base % PAGE == 0


@given(st.binary(max_size=400), st.integers(0, 65535))
def test_boot_table_parser_takes_anything(junk: bytes, total: int) -> None:
    tail = junk + struct.pack("<H", total) + firmware()[-48:]
    assert boot_pages(tail) is None or len(junk) > 25


@given(st.binary(min_size=16, max_size=200))
def test_any_request_is_answered(request_bytes: bytes) -> None:
    view = _SHARED_VIEW()
    calls = SecureCalls(view)
    view.write(calls.writer + 16, request_bytes)
    answer = struct.unpack("<I", view.read(calls.reader + 16, 4))[0]
    sent = struct.unpack_from("<I", request_bytes)[0]
    assert ACK <= answer <= LENGTH if 0 < sent < ACK else answer == sent
    view.read(calls.writer + 16, 4)  # swap back, so that the next request is written first again


class _SharedView:
    """One guest for all examples: a launch each would cost more than the test."""

    def __init__(self) -> None:
        self.view: GuestView | None = None

    def __call__(self) -> GuestView:
        if self.view is None:
            from csvfast.certs.manufacturing import ManufacturingLine

            processor = platform(ManufacturingLine.create().make_chip())
            self.view = GuestView(processor, launch(processor))
        return self.view


_SHARED_VIEW = _SharedView()


def test_firmware_lies_where_expected(view: GuestView) -> None:
    assert view.read(FIRMWARE_GPA, PAGE) == firmware()[:PAGE]
    assert SHARED % PAGE == 0


def test_ram_of_a_memory_controller_elsewhere(secure: Processor, view: GuestView) -> None:
    """It has mapped pages on their first touch, and written them: the firmware finds them there, and zeroes none of them."""
    base, size, asid = SMR[0], 4 << 20, 1
    out, into = os.pipe()
    try:
        for ram, status in (
            ((0, base + PAGE, 8 << 20), S.INVALID_PAGE_OWNER),
            ((0, base - PAGE, size), S.INVALID_PAGE_OWNER),
            ((FIRMWARE_GPA, base, size), S.INVALID_PAGE_OWNER),  # these pages have other frames
            ((0, base, 6 << 20 | 1), S.INVALID_ADDRESS),
            ((0, base, 0), S.INVALID_ADDRESS),
            ((1 << 47, base, PAGE), S.INVALID_ADDRESS),
        ):
            with pytest.raises(FirmwareError) as caught:
                secure.key_memory_controller(view.handle, into, [ram])
            assert caught.value.status is status
        secure.key_memory_controller(view.handle, into, [(0, base, size)])
        assert os.read(out, 64) == bytes(secure.guests[view.handle].vek), "only once, after the refusals"
    finally:
        os.close(out)
        os.close(into)

    def touch(gpa: int, data: bytes) -> None:
        secure.memory.write(base + gpa, data, asid)

    touch(BLOCK, struct.pack("<IIQ16sIIQII", 0, 1, RESPONSE, bytes(16), PAGE, 0, REQUEST, 132, 0xFFFFFFFF).ljust(PAGE, b"\0"))
    touch(REQUEST, ReportRequest.build(b"data", extended=True))
    calls = SecureCalls(view)
    assert calls(REQ_REPORT, [(BLOCK, 56)])[0] == ACK
    assert struct.unpack("<I", secure.memory.read(base + BLOCK + 52, 4, asid))[0] == 0
    report = Report.parse(secure.memory.read(base + RESPONSE, PAGE, asid))
    assert report.report_data.startswith(b"data")
    assert report.version == 2

    touch(0x30000, b"the guest's".ljust(PAGE, b"!"))
    secure.update_npt(view.handle, 4, 0x30000, SHARED, 1)
    assert view.read(0x30000, 11) == b"the guest's"
    assert view.read(size, 16) == bytes(16)  # beyond that RAM a page is the firmware's to give, and zero
    assert calls(DEC, [(0x30000, PAGE)])[0] == INTERNAL, "that controller has nothing that is shared"
    assert calls(ENC, [(0x30000, PAGE)])[0] == ACK
    touch(0x50000, b"\x11" * PAGE)
    assert calls(UPDATE_TABLE, [(0x50000, 2 * PAGE)])[0] == ACK
    assert view.read(0x50000, 16)[8:] == b"\x11" * 8
    assert calls(UPDATE_TABLE, [(0x52000, 2 * PAGE)])[0] == ACK
    record = secure.csv3_record(secure.guests[view.handle])
    taken = record.pool.take(record.pool.free)
    assert not [first for first, count in taken if first < (base + size) // PAGE and base // PAGE < first + count]
