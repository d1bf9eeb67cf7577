"""CSV3 guests that run: nested page faults, what a vCPU reads and writes, debugging.

Sources, and what is inferred: csv3.py.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from csvfast.errors import FirmwareStatus, LengthError
from csvfast.processor.core import PAGE
from csvfast.processor.csv3 import Csv3Commands, Csv3Guest
from csvfast.processor.derivation import wipe
from csvfast.processor.npt import ATTRIBUTE_MMIO, ATTRIBUTE_WRITABLE, FAULT_PRESENT, FAULT_WRITE, Mapping
from csvfast.processor.secure_call import GPA_BITS

__all__ = ["LEVEL_2M", "LEVEL_4K", "Csv3FaultCommands"]

LEVEL_4K: Final = 1
LEVEL_2M: Final = 2

_PAGES_2M: Final = 512
_HOST: Final = 0


class Csv3FaultCommands(Csv3Commands):
    """UPDATE_NPT, DBG_READ_*, and the vCPU's side of nested paging."""

    def update_npt(
        self,
        handle: int,
        error_code: int,
        gpa: int,
        spa: int,
        level: int,
        page_attr: int = 0,
        page_attr_mask: int = 0,
        npages: int = 0,
    ) -> int:
        """UPDATE_NPT: the guest's access to `gpa` faulted; do what the page needs.

            a secure call's hidden page   the request is worked off, the pair swapped
            a private page                a zeroed private frame if it has none; writable again if migration had
                                          made it read-only
            a page declared shared        mapped to the host's `spa` (level 2: the whole 2 MiB where everything fits); its
                                          rights changed if it is mapped (error code with PRESENT)
            mask with MMIO                the page has no memory, or has again; not for pages that have some

        Args: error_code: of the fault. page_attr, page_attr_mask: bits ATTRIBUTE_WRITABLE (shared pages only),
            ATTRIBUTE_MMIO.
            npages: as the host gives it; not looked at.
        Returns: pages dealt with from `gpa` on, or in its 2 MiB.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUNNING or SUPDATE needed), INACTIVE,
            UNSUPPORTED, INVALID_ADDRESS, INVALID_PARAM (level, attributes), INVALID_PAGE_OWNER (spa in secure memory;
            an attribute on a private page), RESOURCE_LIMIT.
        """
        del npages
        with self.lock:
            guest = self.guest(handle)
            self.require_running(guest)
            record = self.csv3_record(guest)
            self.active_asid(guest)
            if gpa < 0 or gpa % PAGE or gpa >= 1 << GPA_BITS:
                self.refuse(
                    FirmwareStatus.INVALID_ADDRESS, f"guest address {gpa:#x}: expected a page below 2^{GPA_BITS}"
                )
            if level not in (LEVEL_4K, LEVEL_2M) or page_attr_mask & ~(ATTRIBUTE_WRITABLE | ATTRIBUTE_MMIO):
                self.refuse(
                    FirmwareStatus.INVALID_PARAM, f"level {level}, attribute mask {page_attr_mask:#x}: not known"
                )
            gfn = gpa // PAGE
            entry = record.table.entries.get(gfn)
            shared = gfn in record.table.shared
            if page_attr_mask and (
                (entry is not None and entry.private) or not (shared or page_attr_mask & ATTRIBUTE_MMIO)
            ):
                self.refuse(
                    FirmwareStatus.INVALID_PAGE_OWNER, f"guest address {gpa:#x} is private: the host sets nothing"
                )
            if page_attr_mask & ATTRIBUTE_MMIO:
                return self._set_mmio(record, gfn, bool(page_attr & ATTRIBUTE_MMIO))
            if shared:
                writable = bool(page_attr & ATTRIBUTE_WRITABLE) or not page_attr_mask & ATTRIBUTE_WRITABLE
                if entry is not None and not entry.mmio and error_code & FAULT_PRESENT:
                    # Only its rights are in question; KVM gives no frame then (csv.c, csv3_page_fault).
                    record.table.entries[gfn] = entry._replace(writable=writable)
                    return 1
                return self._map_shared(record, gfn, spa, level, writable)
            if gfn in record.pairs and entry is not None and not entry.present:
                self.swap_pair(guest, record, gfn)
            elif entry is None or entry.mmio:
                record.table.entries[gfn] = Mapping(self.private_frame(guest, record, gfn), True)
            elif not entry.writable and error_code & FAULT_WRITE:
                self.touch_private(record, gfn)
            return 1

    def guest_read(self, handle: int, gpa: int, length: int) -> bytes:
        """What a running guest's vCPU reads at a guest physical address. Raises NestedPageFault; refuses as UPDATE_NPT."""
        with self.lock:
            parts = [
                self.memory.read(place, size, asid)
                for place, size, asid in self._walk(handle, gpa, length, write=False)
            ]
            return b"".join(parts)

    def guest_write(self, handle: int, gpa: int, data: bytes) -> None:
        """What a running guest's vCPU writes; nothing is written when a page faults. Raises NestedPageFault."""
        with self.lock:
            done = 0
            for place, size, asid in list(self._walk(handle, gpa, len(data), write=True)):
                self.memory.write(place, data[done : done + size], asid)
                done += size

    # ---- Debugging

    def dbg_read_vmsa(self, handle: int, spa: int, length: int, vcpu_id: int) -> None:
        """DBG_READ_VMSA: a vCPU's state as plaintext to host memory, 4096 bytes.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUNNING needed), POLICY_FAILURE (NODBG),
            UNSUPPORTED, INVALID_LENGTH, INVALID_ADDRESS, INVALID_PARAM (no such vCPU), INACTIVE.
        """
        with self.lock:
            guest = self._debugged(handle)
            record = self.csv3_record(guest)
            if length != PAGE:
                self.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected {PAGE}", {"length": PAGE})
            target = self.physical(spa, PAGE)
            if vcpu_id not in record.vcpus:
                self.refuse(FirmwareStatus.INVALID_PARAM, f"guest {handle} has no vCPU {vcpu_id}")
            self._reveal([(record.vcpus[vcpu_id][0] * PAGE, PAGE)], self.active_asid(guest), target)

    def dbg_read_mem(self, handle: int, gpa: int, spa: int, length: int) -> None:
        """DBG_READ_MEM: private memory as plaintext to host memory. Refuses: as DBG_READ_VMSA; INVALID_ADDRESS (not private)."""
        with self.lock:
            guest = self._debugged(handle)
            self.csv3_record(guest)
            if not 0 < length <= self.memory.size:
                self.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected 1 to the memory's size")
            target = self.physical(spa, length)
            self._reveal(self.private_spans(guest, gpa, length), self.active_asid(guest), target)

    # ---- Behind the commands

    def _set_mmio(self, record: Csv3Guest, gfn: int, is_mmio: bool) -> int:
        entry = record.table.entries.get(gfn)
        if is_mmio:
            record.table.entries[gfn] = Mapping(0, False, mmio=True)
        elif entry is not None and entry.mmio:
            del record.table.entries[gfn]
        return 1

    def _map_shared(self, record: Csv3Guest, gfn: int, spa: int, level: int, writable: bool) -> int:
        count, place = 1, self.physical(spa, PAGE, PAGE)
        start, base = gfn & ~(_PAGES_2M - 1), place - (gfn % _PAGES_2M) * PAGE
        if (
            level == LEVEL_2M
            and base >= self.memory.base_address
            and base % (_PAGES_2M * PAGE) == 0
            and record.table.shared.covers(start, start + _PAGES_2M)
        ):
            gfn, place, count = start, self.physical(base, _PAGES_2M * PAGE, PAGE), _PAGES_2M
        frame = place // PAGE
        for offset in range(count):
            record.table.entries[gfn + offset] = Mapping(frame + offset, False, writable)
        return count

    def _walk(self, handle: int, gpa: int, length: int, *, write: bool) -> Iterator[tuple[int, int, int]]:
        guest = self.guest(handle)
        self.require_running(guest)
        record = self.csv3_record(guest)
        asid = self.active_asid(guest)
        if gpa < 0 or length < 0 or gpa + length > 1 << GPA_BITS:
            raise LengthError(f"{length} bytes at {gpa:#x} leave the guest's address space of {GPA_BITS} bits")
        while length:
            entry = record.table.walk(gpa // PAGE, write=write)
            size = min(length, PAGE - gpa % PAGE)
            yield entry.frame * PAGE + gpa % PAGE, size, asid if entry.private else _HOST
            gpa += size
            length -= size

    def _reveal(self, spans: list[tuple[int, int]], asid: int, target: int) -> None:
        window = bytearray(PAGE)
        try:
            with memoryview(window) as view:
                for place, size in spans:
                    self.memory.read_into(place, view[:size], asid)
                    self.memory.write(target, view[:size], _HOST)
                    target += size
        finally:
            wipe(window)
