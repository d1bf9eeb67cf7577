"""CSV3: secure memory, launch by guest address, nested page tables, debugging; and that the host cannot get in."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.csv3_guest import (
    BLOCKS,
    FIRMWARE_GPA,
    MIB,
    PAGE,
    POLICY,
    SHADOW,
    SHARED,
    SMCR,
    SMR,
    SMR_ENTRY,
    SOURCE,
    VMSA,
    GuestView,
    SecureCalls,
    data_block,
    firmware,
    launch,
    platform,
    vmsa,
)

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.errors import FirmwareError, LengthError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import PROFILE_1_3_2011, Processor, make_session
from csvfast.processor.npt import ATTRIBUTE_MMIO, ATTRIBUTE_WRITABLE, FramePool, NestedPageFault, RangeSet
from csvfast.processor.packet import KIND_SECRET, seal_packet
from csvfast.processor.profile import Profile
from csvfast.report import GuestPolicy

Refused = Callable[..., FirmwareError]
OLD_BUILD = Profile(1, 3, 2100, csv3=True)


@pytest.fixture
def secure(chip: ChipIdentity) -> Iterator[Processor]:
    with platform(chip) as processor:
        yield processor


# ---- Secure memory --------------------------------------------------------------------------------------------------


def bare(chip: ChipIdentity, **named: object) -> Processor:
    processor = Processor(chip, csvfast.EncryptedMemory(512 * MIB, asid_max=16), **named)  # type: ignore[arg-type]
    processor.init(es=True, tmr_address=MIB, tmr_length=MIB)
    return processor


def test_set_smr_and_smcr(chip: ChipIdentity, refused: Refused) -> None:
    processor = bare(chip)
    for entry in (0, 1, SMR_ENTRY - 1, SMR_ENTRY // 2, 3 * SMR_ENTRY):
        refused(S.INVALID_PARAM, processor.set_smr, entry, [SMR])
    refused(S.INVALID_PARAM, processor.set_smr, SMR_ENTRY, [])
    refused(S.INVALID_PARAM, processor.set_smr, SMR_ENTRY, [SMR] * 8193)
    refused(S.INVALID_LENGTH, processor.set_smr, SMR_ENTRY, [(SMR[0], SMR_ENTRY + PAGE)])
    refused(S.INVALID_LENGTH, processor.set_smr, SMR_ENTRY, [(SMR[0], 0)])
    refused(S.INVALID_ADDRESS, processor.set_smr, SMR_ENTRY, [(SMR[0] + PAGE, SMR_ENTRY)])
    refused(S.INVALID_ADDRESS, processor.set_smr, SMR_ENTRY, [(512 * MIB, SMR_ENTRY)])
    refused(S.INVALID_ADDRESS, processor.set_smr, SMR_ENTRY, [SMR, (SMR[0] + SMR_ENTRY, SMR_ENTRY)])
    refused(S.INVALID_ADDRESS, processor.set_smr, SMR_ENTRY, [(0, SMR_ENTRY)])  # the firmware's own memory lies there
    processor.set_smr(SMR_ENTRY, [SMR])
    refused(S.INVALID_CONFIG, processor.set_smr, SMR_ENTRY, [SMR])
    for size in (0, SMCR[1] - PAGE, SMCR[1] + PAGE):
        assert refused(S.INVALID_LENGTH, processor.set_smcr, SMCR[0], size).needed == {"size": 256 * MIB}
    refused(S.INVALID_ADDRESS, processor.set_smcr, SMCR[0] + PAGE, SMCR[1])
    refused(S.INVALID_ADDRESS, processor.set_smcr, SMR[0], SMCR[1])
    processor.set_smcr(*SMCR)
    refused(S.INVALID_CONFIG, processor.set_smcr, *SMCR)
    processor.shutdown()
    refused(S.INVALID_PLATFORM_STATE, processor.set_smr, SMR_ENTRY, [SMR])
    processor.init(es=True, tmr_address=MIB, tmr_length=MIB)
    processor.set_smcr(*SMCR)
    refused(S.INVALID_ADDRESS, processor.set_smr, SMR_ENTRY, [SMCR])
    processor.set_smr(SMR_ENTRY, [SMR])
    processor.launch_start(POLICY)
    refused(S.INVALID_PLATFORM_STATE, processor.set_smr, SMR_ENTRY, [SMR])


def test_part_without_csv3(chip: ChipIdentity, refused: Refused) -> None:
    processor = bare(chip, profile=PROFILE_1_3_2011)
    refused(S.UNSUPPORTED, processor.set_smr, SMR_ENTRY, [SMR])
    refused(S.UNSUPPORTED, processor.set_smcr, *SMCR)
    refused(S.POLICY_FAILURE, processor.launch_start, POLICY)


def test_private_memory(chip: ChipIdentity, secure: Processor, refused: Refused) -> None:
    handle = secure.launch_start(POLICY)
    give = secure.set_guest_private_memory
    refused(S.INVALID_PARAM, give, handle, [])
    refused(S.INVALID_PARAM, give, handle, [SMR] * 257)
    refused(S.INVALID_LENGTH, give, handle, [(SMR[0], PAGE)])
    refused(S.INVALID_ADDRESS, give, handle, [(SMR[0] + PAGE, SMR_ENTRY)])
    refused(S.INVALID_ADDRESS, give, handle, [(SMR[0] - SMR_ENTRY, 2 * SMR_ENTRY)])
    refused(S.INVALID_ADDRESS, give, handle, [(SMR[0], SMR[1] + SMR_ENTRY)])
    refused(S.INVALID_PAGE_OWNER, give, handle, [(SMR[0], SMR_ENTRY), (SMR[0], SMR_ENTRY)])
    give(handle, [(SMR[0], SMR_ENTRY)])
    refused(S.INVALID_PAGE_OWNER, give, handle, [(SMR[0], SMR_ENTRY)])
    other = secure.launch_start(POLICY)
    refused(S.INVALID_PAGE_OWNER, give, other, [(SMR[0], 2 * SMR_ENTRY)])
    assert not secure.csv3_record(secure.guests[other]).pool.free
    give(other, [(SMR[0] + SMR_ENTRY, SMR_ENTRY)])
    secure.decommission(handle)
    give(other, [(SMR[0], SMR_ENTRY)])  # free again
    plain = secure.launch_start(GuestPolicy.of(es=True))
    refused(S.UNSUPPORTED, give, plain, [(SMR[0] + 2 * SMR_ENTRY, SMR_ENTRY)])
    processor = bare(chip)
    handle = processor.launch_start(POLICY)
    refused(S.INVALID_CONFIG, processor.set_guest_private_memory, handle, [(SMR[0], SMR_ENTRY)])


# ---- Launch ---------------------------------------------------------------------------------------------------------


def expected_digest(*items: tuple[int, int, int, bytes]) -> bytes:
    whole = b"".join(struct.pack("<IIQI", command, vcpu, gpa, len(data)) + data for command, vcpu, gpa, data in items)
    return csvfast.sm3(whole).digest()


def test_launch_digest(secure: Processor) -> None:
    handle = launch(secure, vcpus=2)
    items = [(0x201, 0, FIRMWARE_GPA, firmware()), (0x202, 0, 0, vmsa(0)), (0x202, 1, 0, vmsa(1))]
    assert secure.guests[handle].measure == expected_digest(*items)
    view = GuestView(secure, handle)
    assert view.read(FIRMWARE_GPA, 4 * PAGE) == firmware()
    assert not view.faults


def test_data_in_pieces(secure: Processor) -> None:
    """Pages scattered over host memory, several entries and blocks, arrive in order."""
    handle = secure.launch_start(POLICY)
    secure.activate(handle, 1)
    secure.set_guest_private_memory(handle, [(SMR[0], SMR_ENTRY)])
    pages = [bytes([number]) * PAGE for number in range(7)]
    for number, page in enumerate(pages):
        secure.memory.write(SOURCE + 2 * PAGE * (6 - number), page, 0)
    c_bit = 1 << 47 - 12  # the kernel marks frames of its encrypted memory so
    frames = [(SOURCE // PAGE + 2 * (6 - number)) for number in range(7)]
    secure.memory.write(
        BLOCKS, struct.pack("<4Q", *(1 | (frame | c_bit) << 12 for frame in frames[:4])).ljust(PAGE, b"\0"), 0
    )
    secure.memory.write(
        BLOCKS + PAGE, struct.pack("<3Q", *(1 | frame << 12 for frame in frames[4:])).ljust(PAGE, b"\0"), 0
    )
    with pytest.raises(FirmwareError, match="INVALID_PARAM"):  # the first block ends early
        secure.launch_encrypt_data(handle, 0x100000, 7 * PAGE, [BLOCKS, BLOCKS + PAGE])
    whole = [struct.pack("<Q", 1 | frames[number % 7] << 12) for number in range(512 + 3)]
    secure.memory.write(BLOCKS, b"".join(whole[:512]), 0)
    secure.memory.write(BLOCKS + PAGE, b"".join(whole[512:]).ljust(PAGE, b"\0"), 0)
    secure.launch_encrypt_data(handle, 0x100000, 515 * PAGE, [BLOCKS, BLOCKS + PAGE])
    data = b"".join(pages[number % 7] for number in range(515))
    secure.launch_measure(handle)
    secure.launch_finish(handle)
    assert secure.guests[handle].measure == expected_digest((0x201, 0, 0x100000, data))
    assert secure.guest_read(handle, 0x100000, len(data)) == data


def test_launch_encrypt_data_refusals(secure: Processor, refused: Refused) -> None:
    handle = secure.launch_start(POLICY)
    encrypt = secure.launch_encrypt_data
    image = firmware()
    blocks = data_block(secure, image)
    refused(S.INVALID_GUEST, encrypt, 99, 0, len(image), blocks)
    refused(S.INACTIVE, encrypt, handle, 0, len(image), blocks)
    secure.activate(handle, 1)
    refused(S.RESOURCE_LIMIT, encrypt, handle, 0, len(image), blocks)
    secure.set_guest_private_memory(handle, [(SMR[0], SMR_ENTRY)])
    for length in (0, -PAGE, PAGE - 1, 1 << 32):
        refused(S.INVALID_LENGTH, encrypt, handle, 0, length, blocks)
    for length in (PAGE, 5 * PAGE):  # fewer and more than the blocks name
        refused(S.INVALID_LENGTH if length < len(image) else S.INVALID_PARAM, encrypt, handle, 0, length, blocks)
    refused(S.INVALID_LENGTH, encrypt, handle, 0, len(image), [])
    refused(S.INVALID_LENGTH, encrypt, handle, 0, len(image), blocks * 9)
    for gpa in (-PAGE, 16, 1 << 47, (1 << 47) - PAGE):
        refused(S.INVALID_ADDRESS, encrypt, handle, gpa, len(image), blocks)
    for block in (BLOCKS + 8, 512 * MIB, (1 << 64) - PAGE):
        refused(S.INVALID_ADDRESS, encrypt, handle, 0, len(image), [block])
    refused(S.INVALID_PAGE_OWNER, encrypt, handle, 0, len(image), [SMR[0]])
    for word, status in (
        (4 | (512 * MIB // PAGE) << 12, S.INVALID_ADDRESS), (4 | (SMR[0] // PAGE) << 12, S.INVALID_PAGE_OWNER),
        (4 | (SMCR[0] // PAGE) << 12, S.INVALID_PAGE_OWNER), (0, S.INVALID_PARAM), ((1 << 64) - 1, S.INVALID_LENGTH),
    ):  # fmt: skip
        secure.memory.write(BLOCKS, struct.pack("<Q", word), 0)
        refused(status, encrypt, handle, 0, len(image), blocks)
    assert secure.guests[handle].digest.digest() == csvfast.sm3().digest()
    assert not secure.csv3_record(secure.guests[handle]).table.entries
    refused(S.UNSUPPORTED, secure.launch_update_data, handle, SOURCE, PAGE)
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.activate(plain, 2)
    refused(S.UNSUPPORTED, encrypt, plain, 0, len(image), blocks)
    secure.launch_measure(handle)
    refused(S.INVALID_GUEST_STATE, encrypt, handle, 0, len(image), blocks)


def test_old_builds(chip: ChipIdentity, refused: Refused) -> None:
    with platform(chip, profile=OLD_BUILD) as processor:
        handle = launch(processor, finish=False)
        refused(S.UNSUPPORTED, processor.launch_encrypt_data, handle, 0, PAGE, data_block(processor, bytes(PAGE)))
        processor.launch_measure(handle)
        refused(S.UNSUPPORTED, processor.launch_secret, handle, bytes(52), FIRMWARE_GPA, 16, bytes(16))


def test_vmcb(secure: Processor, refused: Refused) -> None:
    handle = launch(secure, vcpus=0, finish=False)
    encrypt = secure.launch_encrypt_vmcb
    secure.memory.write(VMSA, vmsa(0), 0)
    secure.memory.write(SHADOW, b"\x5a" * PAGE, 0)
    refused(S.INVALID_LENGTH, encrypt, handle, 0, VMSA, PAGE - 1, SHADOW, PAGE)
    refused(S.INVALID_LENGTH, encrypt, handle, 0, VMSA, PAGE, SHADOW, 2 * PAGE)
    refused(S.INVALID_ADDRESS, encrypt, handle, 0, VMSA + 16, PAGE, SHADOW, PAGE)
    refused(S.INVALID_PAGE_OWNER, encrypt, handle, 0, VMSA, PAGE, SMR[0], PAGE)
    refused(S.INVALID_PARAM, encrypt, handle, 1 << 32, VMSA, PAGE, SHADOW, PAGE)
    address, length = encrypt(handle, 0, VMSA, PAGE, SHADOW, PAGE)
    assert length == PAGE
    assert SMR[0] <= address < SMR[0] + SMR_ENTRY
    assert secure.memory.read(address, PAGE, 1) == vmsa(0)
    assert secure.memory.read(SHADOW, PAGE, 0) == b"\x5a" * 0x400 + bytes(PAGE - 0x400)
    refused(S.INVALID_PARAM, encrypt, handle, 0, VMSA, PAGE, SHADOW, PAGE)
    secure.launch_measure(handle)
    secure.launch_finish(handle)
    refused(S.INVALID_GUEST_STATE, encrypt, handle, 1, VMSA, PAGE, SHADOW, PAGE)


def test_owner_session_and_secret(secure: Processor, refused: Refused) -> None:
    """vm_digest is compared with the CSV3 digest; a secret goes to a guest address."""
    pdh = CsvCertificate.parse(secure.pdh_cert_export()[0])
    digest = expected_digest((0x201, 0, FIRMWARE_GPA, firmware()), (0x202, 0, 0, vmsa(0)))
    owner = make_session(pdh, POLICY, vm_digest=digest)
    handle = launch(secure, finish=False, dh=owner.certificate.encoded, session=owner.blob)
    blob = secure.launch_measure(handle)
    header, sealed = seal_packet(
        KIND_SECRET, owner.tek, owner.tik, b"disk password   ", iv=bytes(16), measure=blob[:32]
    )
    for gpa in (FIRMWARE_GPA + 8, -16):
        refused(S.INVALID_ADDRESS, secure.launch_secret, handle, header, gpa, 16, sealed)
    for gpa in (0x1000, SMR[0], 1 << 47):  # no page there: host addresses mean nothing here
        refused(S.INVALID_ADDRESS, secure.launch_secret, handle, header, gpa, 16, sealed)
    secure.launch_secret(handle, header, FIRMWARE_GPA + 0x100, 16, sealed)
    secure.launch_finish(handle)
    assert secure.guest_read(handle, FIRMWARE_GPA + 0x100, 16) == b"disk password   "
    wrong = make_session(pdh, POLICY, vm_digest=bytes(31) + b"\x01")
    other = launch(secure, asid=2, entry=1, finish=False, dh=wrong.certificate.encoded, session=wrong.blob)
    refused(S.BAD_MEASUREMENT, secure.launch_measure, other)
    refused(S.BAD_MEASUREMENT, secure.launch_encrypt_data, other, 0, PAGE, data_block(secure, bytes(PAGE)))
    refused(S.BAD_MEASUREMENT, secure.launch_encrypt_vmcb, other, 9, VMSA, PAGE, SHADOW, PAGE)
    refused(S.INVALID_GUEST_STATE, secure.launch_finish_ex, other, bytes(64))


def test_finish_ex(secure: Processor, refused: Refused) -> None:
    handle = launch(secure, finish=False)
    refused(S.INVALID_GUEST_STATE, secure.launch_finish_ex, handle, bytes(64))
    secure.launch_measure(handle)
    refused(S.INVALID_LENGTH, secure.launch_finish_ex, handle, bytes(63))
    secure.launch_finish_ex(handle, b"h" * 64)
    assert secure.csv3_record(secure.guests[handle]).host_data == b"h" * 64
    refused(S.INVALID_GUEST_STATE, secure.launch_finish_ex, handle, bytes(64))
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.launch_measure(plain)
    refused(S.UNSUPPORTED, secure.launch_finish_ex, plain, bytes(64))


# ---- Nested paging --------------------------------------------------------------------------------------------------


def test_private_by_default(secure: Processor) -> None:
    handle = launch(secure)
    view = GuestView(secure, handle)
    with pytest.raises(NestedPageFault) as caught:
        secure.guest_write(handle, 0x5008, b"data")
    assert (caught.value.gpa, caught.value.error_code) == (0x5000, 6)
    view.write(0x5008, b"data of the guest")
    assert view.read(0x5000, 32) == bytes(8) + b"data of the guest" + bytes(7)
    assert b"data of the guest" not in bytes(secure.memory.raw[SMR[0] : SMR[0] + SMR_ENTRY])
    assert secure.memory.read(SHARED, PAGE, 0) == bytes(PAGE)  # the address the host offered was not used
    # A second fault of another vCPU changes nothing.
    assert secure.update_npt(handle, 6, 0x5000, SHARED, 1) == 1
    assert view.read(0x5008, 4) == b"data"


def test_shared_pages(secure: Processor, refused: Refused) -> None:
    handle = launch(secure)
    view = GuestView(secure, handle, {0x10: SHARED, 0x11: SHARED + 4 * PAGE})
    view.write(0x10000, b"secret")
    calls = SecureCalls(view)
    assert calls(2, [(0x10000, 2 * PAGE)])[0] == 0x6B
    assert view.read(0x10000, 6) == bytes(6)
    view.write(0x10FFC, b"over the border")
    assert secure.memory.read(SHARED + PAGE - 4, 4, 0) == b"over"
    assert secure.memory.read(SHARED + 4 * PAGE, 11, 0) == b" the border"
    secure.memory.write(SHARED, b"from the host", 0)
    assert view.read(0x10000, 13) == b"from the host"
    for spa, status in (
        (SMR[0], S.INVALID_PAGE_OWNER),
        (SMCR[0], S.INVALID_PAGE_OWNER),
        (MIB, S.INVALID_ADDRESS),
        (512 * MIB, S.INVALID_ADDRESS),
    ):
        refused(status, secure.update_npt, handle, 4, 0x10000, spa, 1)
    secure.update_npt(handle, 4, 0x10000, SHARED, 1, 0, ATTRIBUTE_WRITABLE)
    with pytest.raises(NestedPageFault) as caught:
        secure.guest_write(handle, 0x10000, b"x")
    assert caught.value.error_code == 7
    assert secure.update_npt(handle, 7, 0x10000, SMR[0], 1) == 1  # only the rights: the address is not looked at
    view.write(0x10000, b"F")
    assert secure.memory.read(SHARED, 4, 0) == b"From"
    assert calls(1, [(0x10000, PAGE)])[0] == 0x6B
    assert view.read(0x10000, 6) == bytes(6)  # private again, and empty
    assert view.read(0x11000, 3) == b" th"[:3]
    assert calls(3, [(0, 0)])[0] == 0x6B
    assert view.read(0x11000, 3) == bytes(3)


def test_large_shared_pages(secure: Processor) -> None:
    handle = launch(secure)
    view = GuestView(secure, handle)
    two = 2 * MIB
    assert SecureCalls(view)(2, [(two, 2 * two)])[0] == 0x6B
    base = 32 * MIB
    assert secure.update_npt(handle, 4, two + 5 * PAGE, base + 5 * PAGE, 2) == 512
    secure.memory.write(base + 100 * PAGE, b"large", 0)
    assert secure.guest_read(handle, two + 100 * PAGE, 5) == b"large"
    assert secure.update_npt(handle, 4, 2 * two, base + 3 * PAGE, 2) == 1  # not on a 2 MiB boundary: one page
    with pytest.raises(NestedPageFault):
        secure.guest_read(handle, 2 * two + PAGE, 1)
    # Half of the 2 MiB are private: one page only.
    assert SecureCalls(view, write_first=False)(1, [(2 * two + 8 * PAGE, PAGE)])[0] == 0x6B
    assert secure.update_npt(handle, 4, 2 * two, base + two, 2) == 1


def test_update_npt_refusals(secure: Processor, refused: Refused) -> None:
    handle = launch(secure, finish=False)
    refused(S.INVALID_GUEST_STATE, secure.update_npt, handle, 4, 0x1000, SHARED, 1)
    secure.launch_measure(handle)
    secure.launch_finish(handle)
    for level in (0, 3):
        refused(S.INVALID_PARAM, secure.update_npt, handle, 4, 0x1000, SHARED, level)
    refused(S.INVALID_PARAM, secure.update_npt, handle, 4, 0x1000, SHARED, 1, 0, 4)
    for gpa in (0x1001, -PAGE, 1 << 47):
        refused(S.INVALID_ADDRESS, secure.update_npt, handle, 4, gpa, SHARED, 1)
    refused(S.INVALID_PAGE_OWNER, secure.update_npt, handle, 4, FIRMWARE_GPA, SHARED, 1, 0, ATTRIBUTE_WRITABLE)
    refused(S.INVALID_PAGE_OWNER, secure.update_npt, handle, 4, FIRMWARE_GPA, 0, 1, ATTRIBUTE_MMIO, ATTRIBUTE_MMIO)
    refused(S.INVALID_PAGE_OWNER, secure.update_npt, handle, 4, 0x7000, 0, 1, ATTRIBUTE_WRITABLE, ATTRIBUTE_WRITABLE)
    assert secure.update_npt(handle, 4, 0xFEC00000, 0, 1, ATTRIBUTE_MMIO, ATTRIBUTE_MMIO) == 1
    with pytest.raises(NestedPageFault):
        secure.guest_read(handle, 0xFEC00000, 4)
    assert secure.update_npt(handle, 4, 0xFEC00000, 0, 1, 0, ATTRIBUTE_MMIO) == 1
    assert GuestView(secure, handle).read(0xFEC00000, 4) == bytes(4)
    record = secure.csv3_record(secure.guests[handle])
    pages = record.pool.free
    for number in range(pages):
        secure.update_npt(handle, 6, 0x1000000 + number * PAGE, 0, 1)
    refused(S.RESOURCE_LIMIT, secure.update_npt, handle, 6, 0x9000000, 0, 1)
    # 9 bytes for each page of the entry stay with the firmware, and one frame each for firmware, calls and vCPU.
    assert len({entry.frame for entry in record.table.entries.values() if entry.private}) == 2048 - 5 - 1
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.activate(plain, 2)
    secure.launch_measure(plain)
    secure.launch_finish(plain)
    refused(S.UNSUPPORTED, secure.update_npt, plain, 4, 0, SHARED, 1)
    with pytest.raises(LengthError):
        secure.guest_read(handle, (1 << 47) - 4, 8)
    secure.deactivate(handle)
    refused(S.INACTIVE, secure.update_npt, handle, 4, 0x1000, SHARED, 1)


def test_the_host_cannot_name_private_frames(secure: Processor, refused: Refused) -> None:
    """No command reads or writes secure memory for the host, for whichever guest he asks."""
    handle = launch(secure, policy=GuestPolicy.of(es=True, csv3=True))
    spy = secure.launch_start(GuestPolicy.of(es=True))
    secure.activate(spy, 2)
    refused(S.INVALID_PAGE_OWNER, secure.launch_update_data, spy, SMR[0], PAGE)
    refused(S.INVALID_PAGE_OWNER, secure.launch_update_vmsa, spy, SMR[0], PAGE)
    refused(S.INVALID_PAGE_OWNER, secure.launch_update_data, spy, SMCR[0], PAGE)
    refused(S.INVALID_PAGE_OWNER, secure.launch_update_data, spy, SMR[0] - 16, 32)
    secure.launch_measure(spy)
    secure.launch_finish(spy)
    for who in (handle, spy):
        for command in (secure.dbg_decrypt, secure.dbg_encrypt, secure.copy):
            refused(S.INVALID_PAGE_OWNER, command, who, SMR[0], SHARED, PAGE)
            refused(S.INVALID_PAGE_OWNER, command, who, SHARED, SMR[0], PAGE)
            refused(S.INVALID_PAGE_OWNER, command, who, SHARED, SMCR[0] + SMCR[1] - 16, 16)
    refused(S.INVALID_PAGE_OWNER, secure.dbg_read_mem, handle, FIRMWARE_GPA, SMR[0], 16)
    # Entries that no guest owns are the host's to use.
    secure.memory.write(SHARED, b"plain", 0)
    secure.dbg_encrypt(spy, SHARED, SMR[0] + 2 * SMR_ENTRY, 16)
    secure.deactivate(handle)
    secure.decommission(handle)
    secure.dbg_encrypt(spy, SHARED, SMR[0], 16)


def test_two_guests_apart(secure: Processor) -> None:
    first, second = launch(secure), launch(secure, asid=2, entry=1)
    one, two = GuestView(secure, first), GuestView(secure, second)
    one.write(0x5000, b"first")
    two.write(0x5000, b"other")
    assert one.read(0x5000, 5) == b"first"
    assert two.read(0x5000, 5) == b"other"
    frames = [
        {entry.frame for entry in secure.csv3_record(secure.guests[handle]).table.entries.values() if entry.private}
        for handle in (first, second)
    ]
    assert not frames[0] & frames[1]


def test_freed_frames_come_back_empty(secure: Processor) -> None:
    handle = launch(secure)
    view = GuestView(secure, handle)
    view.write(0x5000, b"\xff" * PAGE)
    calls = SecureCalls(view)
    calls(2, [(0x5000, PAGE)])
    record = secure.csv3_record(secure.guests[handle])
    while record.pool.free > 1:
        record.pool.take(1)
    assert view.read(0x6000, PAGE) == bytes(PAGE)


# ---- Debugging ------------------------------------------------------------------------------------------------------


def test_debugging(secure: Processor, refused: Refused) -> None:
    handle = launch(secure, policy=GuestPolicy.of(es=True, csv3=True), vcpus=2)
    secure.dbg_read_vmsa(handle, SHARED, PAGE, 1)
    assert secure.memory.read(SHARED, PAGE, 0) == vmsa(1)
    secure.dbg_read_mem(handle, FIRMWARE_GPA + 100, SHARED, 5000)
    assert secure.memory.read(SHARED, 5000, 0) == firmware()[100:5100]
    refused(S.INVALID_PARAM, secure.dbg_read_vmsa, handle, SHARED, PAGE, 2)
    refused(S.INVALID_LENGTH, secure.dbg_read_vmsa, handle, SHARED, PAGE - 1, 0)
    refused(S.INVALID_LENGTH, secure.dbg_read_mem, handle, FIRMWARE_GPA, SHARED, 0)
    refused(S.INVALID_ADDRESS, secure.dbg_read_mem, handle, FIRMWARE_GPA + 3 * PAGE, SHARED, 2 * PAGE)
    refused(S.INVALID_ADDRESS, secure.dbg_read_mem, handle, FIRMWARE_GPA, 512 * MIB - 8, 16)
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.launch_measure(plain)
    refused(S.INVALID_GUEST_STATE, secure.dbg_read_vmsa, plain, SHARED, PAGE, 0)
    secure.launch_finish(plain)
    refused(S.UNSUPPORTED, secure.dbg_read_vmsa, plain, SHARED, PAGE, 0)
    shy = launch(secure, asid=3, entry=1)
    refused(S.POLICY_FAILURE, secure.dbg_read_vmsa, shy, SHARED, PAGE, 0)
    refused(S.POLICY_FAILURE, secure.dbg_read_mem, shy, FIRMWARE_GPA, SHARED, 16)


# ---- The structures below -------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 20)), max_size=30),
    st.integers(0, 80),
    st.integers(0, 20),
)
def test_range_set_against_a_set(steps: list[tuple[bool, int, int]], start: int, length: int) -> None:
    ranges, numbers = RangeSet(), set()
    for add, first, count in steps:
        span = range(first, first + count)
        (ranges.add if add else ranges.remove)(first, first + count)
        (numbers.update if add else numbers.difference_update)(span)
    assert [number for number in range(90) if number in ranges] == sorted(numbers)
    found = list(ranges)
    assert all(low < high for low, high in found)
    assert all(before[1] < after[0] for before, after in pairwise(found))
    wanted = set(range(start, start + length))
    assert ranges.overlaps(start, start + length) == bool(wanted & numbers)
    assert ranges.covers(start, start + length) == (wanted <= numbers)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.lists(st.integers(1, 500), max_size=20))
def test_frame_pool(regions: list[int], wanted: list[int]) -> None:
    pool, allowed, first = FramePool(), set(), 100
    for count in regions:
        pool.add(first, count)
        allowed.update(range(first, first + count))
        first += count + 7
    total = pool.free
    assert total <= len(allowed)
    taken: list[int] = []
    for count in wanted:
        if count > pool.free:
            with pytest.raises(ValueError, match="are free"):
                pool.take(count)
            continue
        frames = [frame for start, run in pool.take(count) for frame in range(start, start + run)]
        assert len(frames) == count
        taken += frames
        if count % 3 == 0:
            pool.give_back(taken.pop())
    assert len(set(taken)) == len(taken)
    assert set(taken) <= allowed
    assert pool.free == total - len(taken)


def test_pages_get_the_frames_at_their_places() -> None:
    pool = FramePool()
    pool.add(1000, 100)
    pool.add(5000, 100)
    usable = pool.free // 2
    assert [pool.place_of(gfn) for gfn in (0, usable - 1, usable, 2 * usable)] == [1000, 999 + usable, 5000, None]
    assert pool.take(2) == [(4998 + usable, 2)], "what has no place comes from the end"
    assert pool.take_for(7) == 1007
    assert pool.take_for(7) == 4997 + usable, "its place is taken"
    pool.give_back(1007)
    assert pool.take_for(7) == 1007
    free = pool.free
    pool.withdraw(1000, 50)
    assert pool.free == free - 49
    assert pool.take_for(8) == 4996 + usable
    assert pool.owns(1000, usable)
    assert not pool.owns(1000, usable + 1)
    assert not pool.owns(999, 2)
