"""CSV3 guests that move: pages by guest frame, numbered packets, the context; and what a host in between achieves: nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from reference.csv3_guest import (
    CALL_A,
    CALL_B,
    FIRMWARE_GPA,
    PAGE,
    POLICY,
    SHADOW,
    SHARED,
    SMR,
    SMR_ENTRY,
    GuestView,
    SecureCalls,
    firmware,
    launch,
    platform,
    vmsa,
)

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import sm3
from csvfast.errors import FirmwareError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import Processor
from csvfast.processor.csv3_migration import MIGRATE_PAGES, SET_READ_ONLY
from csvfast.processor.npt import NestedPageFault
from csvfast.processor.states import GuestState
from csvfast.report import GuestPolicy, Report, ReportRequest

Refused = Callable[..., FirmwareError]


@pytest.fixture
def secure(chip: ChipIdentity) -> Iterator[Processor]:
    with platform(chip) as processor:
        yield processor


@pytest.fixture
def target(line: ManufacturingLine) -> Iterator[Processor]:
    with platform(line.make_chip("SIMTEST00002")) as processor:
        yield processor


def block(gfns: list[int]) -> bytes:
    return struct.pack(f"<{len(gfns)}Q", *(gfn << 12 for gfn in gfns))


def begin(source: Processor, handle: int, target: Processor, *, asid: int = 5, entry: int = 0) -> int:
    pdh, chain = target.pdh_cert_export()
    vendor = target.chip.hsk.encoded + target.chip.root.encoded
    policy, session = source.send_start(handle, pdh, chain, vendor)
    own, own_chain = source.pdh_cert_export()
    arrived = target.receive_start(policy, own + own_chain + vendor, session)
    target.activate(arrived, asid)
    target.set_guest_private_memory(arrived, [(SMR[0] + entry * SMR_ENTRY, SMR_ENTRY)])
    return arrived


class Packet(NamedTuple):
    header: bytes
    block: bytes
    transport: bytes


def send(source: Processor, handle: int, gfns: list[int]) -> Packet:
    """Read-only first, then the pages, as KVM does."""
    assert source.send_encrypt_data(handle, block(gfns), SET_READ_ONLY)[::2] == (b"", b"")
    return Packet(*source.send_encrypt_data(handle, block(gfns), MIGRATE_PAGES))


def pages_of(source: Processor, handle: int) -> list[int]:
    return source.csv3_record(source.guests[handle]).table.private_gfns()


def finish(source: Processor, handle: int, target: Processor, arrived: int, vcpus: int = 1) -> list[int]:
    header, transport = source.send_encrypt_context(handle)
    addresses = target.receive_encrypt_context(
        arrived, header, transport, [SHADOW + number * PAGE for number in range(vcpus)]
    )
    source.send_finish(handle)
    target.receive_finish(arrived)
    return addresses


def test_a_guest_moves_with_everything_it_has(secure: Processor, target: Processor) -> None:
    handle = launch(secure, vcpus=3, finish=False)
    secure.launch_measure(handle)
    secure.launch_finish_ex(handle, b"h" * 64)
    view = GuestView(secure, handle)
    view.write(0x5000, b"memory of the guest")
    view.write(0x50000, bytes(2 * PAGE))
    calls = SecureCalls(view)
    assert calls(2, [(0x10000, 2 * PAGE)])[0] == 0x6B
    assert calls(4, [(0x50000, 2 * PAGE)])[0] == 0x6B
    cpu = SecureCalls(view, 0x50000, write_first=False)
    assert cpu(2, [(0x30000, PAGE)])[0] == 0x6B
    view.write(0x10000, b"shared")
    for request in (
        struct.pack("<HHIH22x", 2, 32, 0, 1),
        struct.pack("<HHIBBH20x32s", 4, 64, 0, 3, 0, 32, sm3(b"event").digest()),
    ):
        assert cpu(8, body=request)[1][4:8] == bytes(4)
    before = secure.guests[handle]
    arrived = begin(secure, handle, target)
    gfns = [0x10, 0x11, *pages_of(secure, handle)]
    packet = send(secure, handle, gfns)
    words = struct.unpack(f"<{len(gfns)}Q", packet.block)
    assert [word & 1 for word in words] == [1, 1] + [0] * (len(gfns) - 2)
    assert len(packet.transport) == PAGE * len(gfns)
    assert b"memory of the guest" not in packet.transport
    target.receive_encrypt_data(arrived, *packet)
    addresses = finish(secure, handle, target, arrived, vcpus=3)
    assert (secure.guests[handle].state, target.guests[arrived].state) == (GuestState.SENT, GuestState.RUNNING)
    assert [target.memory.read(address, PAGE, 5) for address in addresses] == [vmsa(0), vmsa(1), vmsa(2)]
    after = target.guests[arrived]
    assert (after.measure, after.rtmrs, after.rtmr_state) == (before.measure, before.rtmrs, 2)
    assert any(after.rtmrs[3])
    assert target.csv3_record(after).host_data == b"h" * 64
    there = GuestView(target, arrived)
    assert there.read(FIRMWARE_GPA, 4 * PAGE) == firmware()
    assert there.read(0x5000, 19) == b"memory of the guest"
    assert not there.faults
    # Shared pages stay shared: the target's host maps its own.
    target.memory.write(SHARED, b"host", 0)
    assert there.read(0x10000, 4) == b"host"
    assert there.read(0x30000, 4) == b"host"
    # Secure calls go on where they were.
    for first, write_first in ((CALL_A, True), (0x50000, False)):
        assert SecureCalls(there, first, write_first=write_first)(1, [(0x10000, PAGE)])[0] == 0x6B
    assert there.read(0x10000, 4) == bytes(4)
    target.memory.write(SHARED + PAGE, ReportRequest.build(b"x", bytes(16), extended=True), 5)
    target.attestation(arrived, SHARED + PAGE, PAGE)
    report = Report.parse(target.memory.read(SHARED + PAGE, PAGE, 5))
    assert report.version == 2
    assert report.rtmrs == tuple(before.rtmrs)
    assert report.chip_id == "SIMTEST00002"


def test_live_migration(secure: Processor, target: Processor, refused: Refused) -> None:
    """The guest runs on while it is sent; a page written meanwhile must go again before the context does."""
    handle = launch(secure)
    view = GuestView(secure, handle)
    view.write(0x5000, b"first")
    arrived = begin(secure, handle, target)
    target.receive_encrypt_data(arrived, *send(secure, handle, pages_of(secure, handle)))
    with pytest.raises(NestedPageFault) as caught:
        secure.guest_write(handle, 0x5000, b"later")
    assert caught.value.error_code == 7
    view.write(0x5000, b"later")
    view.write(0x6000, b"a new page")
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)
    target.receive_encrypt_data(arrived, *send(secure, handle, [5]))
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)  # page 6 has never been sent
    packet = Packet(*secure.send_encrypt_data(handle, block([6]), MIGRATE_PAGES))
    target.receive_encrypt_data(arrived, *packet)
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)  # it was not read-only when it was sent
    target.receive_encrypt_data(arrived, *send(secure, handle, [6]))
    # A secure call writes its page, and so does the answer to one.
    calls = SecureCalls(view)
    assert calls(2, [(0x30000, PAGE)])[0] == 0x6B
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)
    target.receive_encrypt_data(arrived, *send(secure, handle, [CALL_B // PAGE]))
    # Written through one page of the pair, sent as the other: it does not count while the first is writable.
    shown = next(
        gpa for gpa in (CALL_A, CALL_B) if secure.csv3_record(secure.guests[handle]).table.entries[gpa // PAGE].present
    )
    view.write(shown + 0x800, b"latest")
    other = CALL_A + CALL_B - shown
    target.receive_encrypt_data(arrived, *secure.send_encrypt_data(handle, block([other // PAGE]), MIGRATE_PAGES))
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)
    target.receive_encrypt_data(arrived, *send(secure, handle, [other // PAGE]))
    finish(secure, handle, target, arrived)
    there = GuestView(target, arrived)
    assert there.read(shown + 0x800, 6) == b"latest"
    assert there.read(0x5000, 5) == b"later"
    assert there.read(0x6000, 10) == b"a new page"
    calls.guest = there
    assert calls(1, [(0x30000, PAGE)])[0] == 0x6B


def test_packets_are_numbered_and_placed(secure: Processor, target: Processor, refused: Refused) -> None:
    handle = launch(secure)
    view = GuestView(secure, handle)
    for number in range(4):
        view.write(0x5000 + number * PAGE, b"page %d" % number)
    arrived = begin(secure, handle, target)
    gfns = pages_of(secure, handle)
    rest = [gfn for gfn in gfns if gfn not in (5, 6, 7, 8)]
    packets = [send(secure, handle, [5, 6]), send(secure, handle, [7, 8]), send(secure, handle, rest)]
    receive = target.receive_encrypt_data
    refused(S.BAD_MEASUREMENT, receive, arrived, *packets[1])  # out of order
    receive(arrived, *packets[0])
    refused(S.BAD_MEASUREMENT, receive, arrived, *packets[0])  # again
    refused(S.BAD_MEASUREMENT, receive, arrived, *packets[2])  # one dropped
    renumbered = packets[2]._replace(header=packets[2].header[:52] + packets[1].header[52:])
    refused(S.BAD_MEASUREMENT, receive, arrived, *renumbered)  # the number is under the MAC
    swapped = packets[1]._replace(block=packets[1].block[8:] + packets[1].block[:8])
    refused(S.BAD_MEASUREMENT, receive, arrived, *swapped)  # pages exchanged
    elsewhere = packets[1]._replace(block=block([0x17, 0x18]))
    refused(S.BAD_MEASUREMENT, receive, arrived, *elsewhere)
    shared = packets[1]._replace(block=struct.pack("<2Q", 7 << 12 | 1, 8 << 12))
    refused(S.BAD_MEASUREMENT, receive, arrived, *shared)
    context = secure.send_encrypt_context(handle)
    # From here on the guest stands still: what it did now would be missing there.
    refused(S.INVALID_GUEST_STATE, secure.update_npt, handle, 7, 0x5000, 0, 1)
    refused(S.INVALID_GUEST_STATE, secure.guest_read, handle, 0x5000, 4)
    refused(S.INVALID_GUEST_STATE, secure.guest_write, handle, 0x5000, b"late")
    refused(S.INVALID_GUEST_STATE, secure.rtmr_request, handle, bytes(32))
    refused(S.BAD_MEASUREMENT, target.receive_encrypt_context, arrived, *context, [SHADOW])  # packets are missing
    refused(S.BAD_MEASUREMENT, receive, arrived, context[0], block([9, 10]), context[1][: 2 * PAGE])  # another kind
    refused(S.INVALID_GUEST_STATE, target.receive_finish, arrived)
    receive(arrived, *packets[1])
    receive(arrived, *packets[2])
    target.receive_encrypt_context(arrived, *context, [SHADOW])
    refused(S.INVALID_GUEST_STATE, receive, arrived, *packets[2])
    refused(S.INVALID_GUEST_STATE, secure.send_encrypt_data, handle, block([5]), MIGRATE_PAGES)
    target.receive_finish(arrived)
    assert GuestView(target, arrived).read(0x7000, 6) == b"page 2"


def test_every_bit_counts(secure: Processor, target: Processor) -> None:
    handle = launch(secure)
    arrived = begin(secure, handle, target)
    gfns = pages_of(secure, handle)
    packet = send(secure, handle, gfns)
    free = target.csv3_record(target.guests[arrived]).pool.free
    for part in range(3):
        for bit in [*range(min(8 * 64, 8 * len(packet[part]))), 8 * len(packet[part]) - 1]:
            changed = bytearray(packet[part])
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FirmwareError) as caught:
                target.receive_encrypt_data(arrived, *packet[:part], changed, *packet[part + 1 :])
            assert caught.value.status in (S.BAD_MEASUREMENT, S.INVALID_PARAM)
    assert target.csv3_record(target.guests[arrived]).pool.free == free
    target.receive_encrypt_data(arrived, *packet)
    header, transport = secure.send_encrypt_context(handle)
    for bit in [*range(8 * 60), 8 * 60 + 5, 8 * (60 + len(transport)) - 1]:
        changed = bytearray(header + transport)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FirmwareError) as caught:
            target.receive_encrypt_context(arrived, changed[:60], changed[60:], [SHADOW])
        assert caught.value.status in (S.BAD_MEASUREMENT, S.INVALID_PARAM)
    target.receive_encrypt_context(arrived, header, transport, [SHADOW])


def test_packets_of_another_migration(secure: Processor, target: Processor, refused: Refused) -> None:
    handle = launch(secure)
    first = begin(secure, handle, target)
    packet = send(secure, handle, pages_of(secure, handle))
    secure.send_encrypt_context(handle)
    secure.send_cancel(handle)
    assert GuestView(secure, handle).read(FIRMWARE_GPA, 4) == firmware()[:4]
    secure.guest_write(handle, FIRMWARE_GPA, b"x")  # writable again
    second = begin(secure, handle, target, asid=6, entry=1)
    refused(S.BAD_MEASUREMENT, target.receive_encrypt_data, second, *packet)
    refused(S.INVALID_PAGE_STATE, secure.send_encrypt_context, handle)  # the pages sent before do not count
    target.receive_encrypt_data(first, *packet)
    refused(S.INVALID_GUEST_STATE, target.receive_finish, first)  # and the first never gets a context


def test_send_refusals(secure: Processor, target: Processor, refused: Refused) -> None:
    handle = launch(secure)
    send_data = secure.send_encrypt_data
    refused(S.INVALID_GUEST_STATE, send_data, handle, block([5]), MIGRATE_PAGES)
    refused(S.INVALID_GUEST_STATE, secure.send_encrypt_context, handle)
    begin(secure, handle, target)
    refused(S.UNSUPPORTED, secure.send_update_data, handle, SHARED, PAGE)
    page = FIRMWARE_GPA // PAGE
    query = refused(S.INVALID_LENGTH, send_data, handle, b"", MIGRATE_PAGES, header_length=0, transport_length=0)
    assert query.needed == {"header_length": 60, "transport_length": 512 * PAGE}
    room = refused(
        S.INVALID_LENGTH, send_data, handle, block([page]), MIGRATE_PAGES, header_length=60, transport_length=PAGE - 1
    )
    assert room.needed == {"header_length": 60, "transport_length": PAGE}
    query = refused(S.INVALID_LENGTH, secure.send_encrypt_context, handle, header_length=60, transport_length=0)
    assert query.needed == {"header_length": 60, "transport_length": 2 * PAGE}
    for wrong in (b"", bytes(7), bytes(8 * 513)):
        refused(S.INVALID_LENGTH, send_data, handle, wrong, MIGRATE_PAGES)
    refused(S.INVALID_PARAM, send_data, handle, block([page]), 2)
    refused(S.INVALID_PARAM, send_data, handle, block([page, page]), MIGRATE_PAGES)
    refused(S.INVALID_PARAM, send_data, handle, struct.pack("<Q", page << 12 | 2), MIGRATE_PAGES)
    refused(S.INVALID_ADDRESS, send_data, handle, block([page, 0x77]), MIGRATE_PAGES)
    refused(S.INVALID_ADDRESS, send_data, handle, block([1 << 40]), MIGRATE_PAGES)
    refused(S.INVALID_GUEST_STATE, secure.send_finish, handle)  # without its context
    secure.deactivate(handle)
    refused(S.INACTIVE, send_data, handle, block([page]), MIGRATE_PAGES)
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.activate(plain, 2)
    secure.launch_measure(plain)
    secure.launch_finish(plain)
    pdh, chain = target.pdh_cert_export()
    secure.send_start(plain, pdh, chain, target.chip.hsk.encoded + target.chip.root.encoded)
    refused(S.UNSUPPORTED, send_data, plain, block([page]), MIGRATE_PAGES)
    secure.send_finish(plain)


def test_receive_refusals(secure: Processor, target: Processor, refused: Refused) -> None:
    handle = launch(secure, vcpus=2)
    arrived = begin(secure, handle, target)
    packet = send(secure, handle, pages_of(secure, handle))
    receive = target.receive_encrypt_data
    refused(S.UNSUPPORTED, target.receive_update_data, arrived, bytes(52), SHARED, PAGE, bytes(PAGE))
    refused(S.INVALID_LENGTH, receive, arrived, packet.header[:-1], packet.block, packet.transport)
    refused(S.INVALID_LENGTH, receive, arrived, packet.header, packet.block[:-8], packet.transport)
    refused(S.INVALID_LENGTH, receive, arrived, packet.header, packet.block, packet.transport[:-PAGE])
    refused(S.INVALID_PARAM, receive, arrived, packet.header, block([1 << 40]), bytes(PAGE))
    context = target.receive_encrypt_context
    for wrong in (b"", bytes(PAGE - 1), bytes(513 * PAGE)):
        refused(S.INVALID_LENGTH, context, arrived, bytes(60), wrong, [SHADOW])
    pool = target.csv3_record(target.guests[arrived]).pool
    taken = pool.take(pool.free - 3)
    refused(S.RESOURCE_LIMIT, receive, arrived, *packet)
    for first, count in taken:
        for frame in range(first, first + count):
            pool.give_back(frame)
    receive(arrived, *packet)
    state = secure.send_encrypt_context(handle)
    refused(S.INVALID_LENGTH, context, arrived, *state, [SHADOW])
    refused(S.INVALID_PAGE_OWNER, context, arrived, *state, [SHADOW, SMR[0]])
    refused(S.INVALID_ADDRESS, context, arrived, *state, [SHADOW, SHADOW + 16])
    assert not target.csv3_record(target.guests[arrived]).vcpus
    assert len(context(arrived, *state, [SHADOW, SHADOW + PAGE])) == 2
    target.receive_finish(arrived)


def test_csv3_policy_at_the_target(secure: Processor, line: ManufacturingLine, refused: Refused) -> None:
    from csvfast.processor import PROFILE_1_3_2011

    handle = launch(secure)
    with Processor(line.make_chip(), csvfast.EncryptedMemory(4 << 20, asid_max=4), profile=PROFILE_1_3_2011) as old:
        old.init(es=True, tmr_address=1 << 20, tmr_length=1 << 20)
        pdh, chain = old.pdh_cert_export()
        vendor = old.chip.hsk.encoded + old.chip.root.encoded
        policy, session = secure.send_start(
            handle, pdh, chain, vendor
        )  # its certificates do not say that it has no CSV3
        assert policy == POLICY.value
        own, own_chain = secure.pdh_cert_export()
        refused(S.POLICY_FAILURE, old.receive_start, policy, own + own_chain + vendor, session)
