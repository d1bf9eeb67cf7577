"""A CSV3 platform in 512 MiB, a firmware image with a secure call entry, and a guest's view of its memory, for tests."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.processor import Processor
from csvfast.processor.npt import NestedPageFault
from csvfast.report import GuestPolicy

MIB = 1 << 20
PAGE = 4096
SMR_ENTRY = 8 * MIB
SMR = 64 * MIB, 64 * MIB
SMCR = 256 * MIB, 256 * MIB
BLOCKS, SOURCE, VMSA, SHADOW, SHARED = 2 * MIB, 4 * MIB, 12 * MIB, 13 * MIB, 20 * MIB
FIRMWARE_GPA = (1 << 32) - 4 * PAGE
CALL_A, CALL_B = 0x80F000, 0x810000
POLICY = GuestPolicy.of(nodbg=True, es=True, csv3=True)
CALL_GUID = UUID("9a5d926f-2fa5-ceba-ab21-6b275d5556a5").bytes_le
FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le


def table_entry(guid: bytes, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + guid


def firmware(base: int = CALL_A, size: int = 0x2000, pages: int = 4) -> bytes:
    """An image whose GUID table has an unknown entry and that of the secure call pages."""
    entries = table_entry(UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le, struct.pack("<I", 0x80B004))
    entries += table_entry(CALL_GUID, struct.pack("<II", size, base))
    table = entries + struct.pack("<H", len(entries) + 18) + FOOTER_GUID
    body = bytes((7 * index) & 0xFF for index in range(PAGE)) * pages
    return body[: len(body) - 32 - len(table)] + table + body[-32:]


def platform(chip: ChipIdentity, **named: Any) -> Processor:
    """Initialised, with SMRs and SMCR."""
    processor = Processor(chip, csvfast.EncryptedMemory(512 * MIB, asid_max=16), **named)
    processor.init(es=True, tmr_address=MIB, tmr_length=MIB)
    processor.set_smr(SMR_ENTRY, [SMR])
    processor.set_smcr(*SMCR)
    return processor


def data_block(processor: Processor, data: bytes, *, source: int = SOURCE, block: int = BLOCKS) -> list[int]:
    """Puts plaintext into host memory and describes it in a block page."""
    pages = len(data) // PAGE
    processor.memory.write(source, data, 0)
    entries, frame = [], source // PAGE
    while pages:
        count = min(pages, 4095)
        entries.append(count | frame << 12)
        pages, frame = pages - count, frame + count
    processor.memory.write(block, struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE, b"\0"), 0)
    return [block]


def launch(
    processor: Processor,
    *,
    asid: int = 1,
    entry: int = 0,
    policy: GuestPolicy = POLICY,
    vcpus: int = 1,
    finish: bool = True,
    **start: Any,
) -> int:
    """A guest with the SMR entry of that number, the firmware and its vCPUs."""
    handle = processor.launch_start(policy, **start)
    processor.activate(handle, asid)
    processor.set_guest_private_memory(handle, [(SMR[0] + entry * SMR_ENTRY, SMR_ENTRY)])
    image = firmware()
    processor.launch_encrypt_data(handle, FIRMWARE_GPA, len(image), data_block(processor, image))
    for number in range(vcpus):
        processor.memory.write(VMSA, vmsa(number), 0)
        processor.launch_encrypt_vmcb(handle, number, VMSA, PAGE, SHADOW + number * PAGE, PAGE)
    if finish:
        processor.launch_measure(handle)
        processor.launch_finish(handle)
    return handle


def vmsa(number: int) -> bytes:
    return bytes((number + 3 * index) & 0xFF for index in range(PAGE))


class GuestView:
    """A vCPU and the host that answers its faults: reads and writes go on after UPDATE_NPT, as under KVM.

    shared: guest frame to host address, for pages the guest shares.
    """

    def __init__(self, processor: Processor, handle: int, shared: dict[int, int] | None = None) -> None:
        self.processor = processor
        self.handle = handle
        self.shared = shared or {}
        self.faults: list[NestedPageFault] = []

    def _resolve(self, fault: NestedPageFault) -> None:
        self.faults.append(fault)
        spa = self.shared.get(fault.gpa // PAGE, SHARED)
        self.processor.update_npt(self.handle, fault.error_code, fault.gpa, spa | 1 << 47, 1)

    def read(self, gpa: int, length: int) -> bytes:
        for _ in range(16):
            try:
                return self.processor.guest_read(self.handle, gpa, length)
            except NestedPageFault as fault:
                self._resolve(fault)
        raise AssertionError("the fault does not go away")

    def write(self, gpa: int, data: bytes) -> None:
        for _ in range(16):
            try:
                self.processor.guest_write(self.handle, gpa, data)
            except NestedPageFault as fault:
                self._resolve(fault)
            else:
                return
        raise AssertionError("the fault does not go away")


class SecureCalls:
    """The kernel's side of a pair: writes through one page, reads through the other, then they change roles."""

    def __init__(self, guest: GuestView, first: int = CALL_A, *, write_first: bool = True) -> None:
        self.guest = guest
        pages = (first, first + PAGE)
        self.writer, self.reader = pages if write_first else pages[::-1]

    def __call__(
        self, request: int, entries: list[tuple[int, int]] | None = None, body: bytes = b""
    ) -> tuple[int, bytes]:
        """Answer word and the body that came back."""
        entries = entries or []
        if entries:
            body = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        self.guest.write(self.writer + 16, struct.pack("<IIQ", request, max(1, len(entries)), 0) + body)
        answer = struct.unpack("<I", self.guest.read(self.reader + 16, 4))[0]
        reply = self.guest.read(self.reader + 32, len(body))
        self.writer, self.reader = self.reader, self.writer
        return answer, reply
