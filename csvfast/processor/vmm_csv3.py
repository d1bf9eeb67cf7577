"""A CSV3 guest's launch, as a VMM does it: secure memory set aside, the guest's private memory, its measured pages, its vCPUs.

    SET_SMCR, SET_SMR            once, before the platform's first guest
    SET_GUEST_PRIVATE_MEMORY     RAM and what the firmware keeps beside it, in one piece
    LAUNCH_ENCRYPT_DATA          the firmware; the page with the hash table; the page that names the secure call pages
    LAUNCH_ENCRYPT_VMCB          each vCPU

The rest of the RAM is not measured, and is zeros at the guest's first touch: launching costs the same for any size of RAM.

Works on a machine in this process: which secure memory is free only its processor's owner knows.
Sources: Avenger-285714/qemu-deepin target/i386/csv.c (order), openeuler-mirror/kernel arch/x86/kvm/svm/csv.c.
Thread-safety: one thread.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from csvfast.errors import AddressError, AllocationError, ArgumentError, FirmwareError, FirmwareStatus
from csvfast.measure.launch import FORCED_TABLE_ADDRESS, hash_table, hash_table_pages, secure_call_page
from csvfast.measure.ovmf import GuidTable
from csvfast.measure.source import Source
from csvfast.measure.vmsa import BSP_ADDRESS, vmsa_page
from csvfast.processor.commands import Command
from csvfast.processor.core import PAGE
from csvfast.processor.machine import LocalMachine
from csvfast.processor.secure_call import boot_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.measure.launch import LaunchDigest
    from csvfast.processor.vmm import GuestPlan, Host

__all__ = ["SMR_ENTRY_BYTES", "Csv3Launch", "private_bytes", "set_secure_memory"]

SMR_ENTRY_BYTES: Final = 8 << 20
SMCR_BYTES: Final = 256 << 20
FOUR_GIB: Final = 1 << 32
_REGION: Final = struct.Struct("<QQ")
_ENTRY_PAGES_MAX: Final = 0xFFF
_TAIL_BYTES: Final = 1 << 16
_SLACK_BYTES: Final = 1 << 20
_SHADOWS: Final = 1 << 46  # shadow VMCBs are no guest memory; they get numbers above it so that they are freed with the guest


def private_bytes(plan: GuestPlan, firmware_size: int) -> int:
    """Secure memory that the guest needs: RAM, firmware, save areas, and 9 bytes per page for the nested page table; whole SMR
    entries."""
    size = plan.memory_size + firmware_size + (plan.vcpus + 1) * PAGE + _SLACK_BYTES
    size += 9 * (size // PAGE + 1)
    return -(-size // SMR_ENTRY_BYTES) * SMR_ENTRY_BYTES


def set_secure_memory(host: Host, size: int) -> None:
    """Sets the SMCR and one SMR of `size` bytes (rounded up to entries) aside, unless the platform has them. For several guests
    on one platform: the first guest's launch would set aside what that guest needs, and nothing more can be set later.

    Raises: FirmwareError: there are guests already, or the firmware has no CSV3; AllocationError; ArgumentError.
    """
    machine = _local(host)
    with machine.processor.lock:
        secure = machine.processor.secure_memory
        if secure.entry_size and secure.control is not None:
            return
        size = -(-size // SMR_ENTRY_BYTES) * SMR_ENTRY_BYTES
        if secure.control is None:
            control = machine.allocate(SMCR_BYTES)
            try:
                host.run(Command.SET_SMCR, base=control, size=SMCR_BYTES)
            except BaseException:
                machine.free(control)
                raise
        region = machine.allocate(size, SMR_ENTRY_BYTES)
        try:
            _with_data(
                host,
                _REGION.pack(region, size),
                lambda place: host.run(
                    Command.SET_SMR, entry_size=SMR_ENTRY_BYTES, regions_address=place, region_count=1
                ),
            )
        except BaseException:
            machine.free(region)
            raise


class Csv3Launch:
    """What launch() does for a CSV3 guest between ACTIVATE and LAUNCH_MEASURE. Made before LAUNCH_START.

    Raises: FirmwareError, AllocationError: secure memory; ArgumentError: a machine elsewhere; FirmwareTableError.
    """

    def __init__(self, host: Host, plan: GuestPlan, predicted: LaunchDigest) -> None:
        self._host, self._plan, self._predicted = host, plan, predicted
        self._machine = _local(host)
        with Source(plan.firmware) as source:
            size = source.size or 0
            self._firmware = bytearray(size)
            with memoryview(self._firmware) as view:
                source.read_at(view, 0)
            self._table = GuidTable.read(source) if plan.kernel is not None and not plan.force_hash_table else None
            self._other = GuidTable.read(source).reset_address() if plan.vcpus > 1 else BSP_ADDRESS
        self._pair = boot_pages(bytes(self._firmware[-_TAIL_BYTES:]))
        if plan.secure_calls is not None:
            if self._pair is not None:
                raise ArgumentError(f"the firmware names secure call pages at {self._pair:#x} itself; expected no secure_calls")
            self._pair = plan.secure_calls + PAGE
        if self._pair is not None and self._pair + 2 * PAGE > plan.memory_size:
            raise AddressError(f"the secure call pages at {self._pair:#x} lie outside the RAM of {plan.memory_size} bytes")
        self._size = private_bytes(plan, size)
        set_secure_memory(host, self._size)

    def load(self, handle: int) -> tuple[int, int | None]:
        """Returns: system address of the RAM; guest address of the secure call pages, None for a guest without."""
        plan = self._plan
        ram = self._take_private_memory(handle)
        self._encrypt(handle, FOUR_GIB - len(self._firmware), self._firmware)
        if plan.kernel is not None:
            base = FORCED_TABLE_ADDRESS if self._table is None else self._table.hash_table_area().base
            page, pages = hash_table_pages(base, hash_table(*(item.sha256 for item in self._predicted.inputs)))
            if page + len(pages) > plan.memory_size:
                raise AddressError(f"the hash table at {base:#x} lies outside the guest's RAM of {plan.memory_size} bytes")
            self._encrypt(handle, page, pages)
        if plan.secure_calls is not None:
            self._encrypt(handle, plan.secure_calls, secure_call_page(plan.secure_calls + PAGE))
        for index in range(plan.vcpus):
            self._add_vcpu(handle, index, vmsa_page(BSP_ADDRESS if index == 0 else self._other, plan.cpu_signature))
        return ram, self._pair

    def _take_private_memory(self, handle: int) -> int:
        secure = self._machine.processor.secure_memory
        entries = self._size // SMR_ENTRY_BYTES
        if secure.entry_size != SMR_ENTRY_BYTES:
            raise ArgumentError(f"SMR entries have {secure.entry_size:#x} bytes; expected {SMR_ENTRY_BYTES:#x}")
        for start, stop in secure.regions:
            first, end = start // SMR_ENTRY_BYTES, stop // SMR_ENTRY_BYTES
            while first + entries <= end:
                taken = [entry for entry in range(first, first + entries) if entry in secure.owners]
                if taken:
                    first = taken[-1] + 1
                    continue
                try:
                    self._set_private_memory(handle, first * SMR_ENTRY_BYTES)
                except FirmwareError as refusal:  # another launch was faster
                    if refusal.status is not FirmwareStatus.INVALID_PAGE_OWNER:
                        raise
                else:
                    return first * SMR_ENTRY_BYTES
        raise AllocationError(f"the platform's secure memory has no {self._size} free bytes in a row for a CSV3 guest")

    def _set_private_memory(self, handle: int, base: int) -> None:
        _with_data(
            self._host,
            _REGION.pack(base, self._size),
            lambda place: self._host.run(
                Command.SET_GUEST_PRIVATE_MEMORY, handle=handle, regions_address=place, region_count=1
            ),
        )

    def _encrypt(self, handle: int, gpa: int, data: bytes | bytearray) -> None:
        """One LAUNCH_ENCRYPT_DATA: the data in host memory, described by a block of {pages, frame}."""

        def send(place: int) -> None:
            frame, pages = place // PAGE, len(data) // PAGE
            words = []
            while pages:
                count = min(pages, _ENTRY_PAGES_MAX)
                words.append(count | frame << 12)
                frame, pages = frame + count, pages - count
            _with_data(
                self._host,
                struct.pack(f"<{len(words)}Q", *words).ljust(PAGE, b"\0"),
                lambda block: self._host.run(
                    Command.LAUNCH_ENCRYPT_DATA,
                    handle=handle,
                    gpa=gpa,
                    length=len(data),
                    data_blocks=block.to_bytes(8, "little").ljust(64, b"\0"),
                ),
            )

        _with_data(self._host, data, send)

    def _add_vcpu(self, handle: int, index: int, state: bytes) -> None:
        shadow = self._host.give(handle, PAGE, _SHADOWS + index * PAGE)
        _with_data(
            self._host,
            state,
            lambda place: self._host.run(
                Command.LAUNCH_ENCRYPT_VMCB,
                handle=handle,
                vcpu_id=index,
                vmsa_address=place,
                vmsa_length=PAGE,
                shadow_vmcb_address=shadow,
                shadow_vmcb_length=PAGE,
            ),
        )


def _with_data(host: Host, data: bytes | bytearray, use: Callable[[int], object]) -> None:
    """Runs `use` with the address of host memory that holds the data."""
    place = host.machine.allocate(len(data))
    try:
        host.machine.write(place, data)
        use(place)
    finally:
        host.machine.free(place)


def _local(host: Host) -> LocalMachine:
    if not isinstance(host.machine, LocalMachine):
        raise ArgumentError("a CSV3 guest is launched on a machine in this process; expected a LocalMachine")
    return host.machine
