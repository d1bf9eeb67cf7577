"""Secure calls: how a CSV3 guest speaks to the secure processor without the host in between.

Two guest pages, A and B, lead to one private page; at any moment one of them is present. The guest writes a request
through
one and reads the answer through the other: that read faults, the host calls UPDATE_NPT with the faulting address, the
secure processor works the request off and swaps the present bits. The host sees no byte of it.

    offset 0   guid 16 (LE64 0xceba2fa59a5d926f, 0xa556555d276b21ab)
          16   u32 request, replaced by the answer      20   u32 number of entries      24   u64 unused
          32   up to 254 entries {u64 guest address, u64 bytes}, or the body of an RTMR request

    requests   1 ENC  2 DEC  3 RESET  4 UPDATE_TABLE  7 REQ_REPORT  8 RTMR
    answers    0x6B ACK  0x6C internal  0x6D invalid command  0x6E parameter  0x6F address  0x70 length

REQ_REPORT names a 56-byte block in private memory: u32 handle (out), u32 flags, u64 response address, 16 reserved, u32
response length (in/out), u32 reserved, u64 request address, u32 request length (in/out), u32 firmware error (out).
With both lengths too short the firmware writes the lengths it needs and INVALID_LENGTH.

The boot pages stand in the firmware image's GUID table: entry 9a5d926f-2fa5-ceba-ab21-6b275d5556a5 with the words size
(0x2000) and base; UPDATE_TABLE gives each CPU a pair of its own.

Sources: anolis-cloud-kernel arch/x86/kernel/csv.c, csv-shared.c, include/linux/psp-hygon.h,
drivers/virt/coco/csv-guest/csv-guest.c; the table entry: pw0rld/CSV-CipherShadow's OVMF_CODE.fd; tianocore/edk2
OvmfPkg/ResetVector (footer table). Not public and therefore chosen here (inferred): which of the two pages is present
first (A of the boot pair, B of a CPU's pair: the order in which the kernel uses them; the kernel's loop copes with
either), that a page without a pending request (zero, or an answer) is only swapped, that UPDATE_TABLE keeps the boot
pair, lengths of 112 or 132 and 4096 for REQ_REPORT.

Thread-safety: the processor's lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor.attestation import AttestationCommands
from csvfast.processor.derivation import wipe
from csvfast.processor.npt import PAGE, Mapping
from csvfast.processor.rtmr import RtmrCommands, answer

if TYPE_CHECKING:
    from csvfast.processor.csv3 import Csv3Guest
    from csvfast.processor.guest import Guest

__all__ = ["ENTRIES_MAX", "PAGE_GUID", "SecureCallAnswer", "SecureCallCommands", "SecureCallRequest", "boot_pages"]

PAGE_GUID: Final = UUID("9a5d926f-2fa5-ceba-ab21-6b275d5556a5").bytes_le
ENTRIES_MAX: Final = 254
BOOT_BYTES: Final = 2 * PAGE
REPORT_BLOCK_BYTES: Final = 56
REQUEST_BYTES: Final = 112
EXTENDED_REQUEST_BYTES: Final = 132
GPA_BITS: Final = 47  # below the C-bit

_HEADER: Final = Struct("<16sIIQ")
_ENTRY: Final = Struct("<QQ")
_REPORT_BLOCK: Final = Struct("<IIQ16sIIQII")
_FOOTER_GUID: Final = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_FOOTER_END: Final = 32  # bytes between the footer entry's end and the image's end
_TABLE_MAX: Final = 0xFFFF


class SecureCallRequest(IntEnum):
    """What a guest asks for."""

    ENC = 1
    DEC = 2
    RESET = 3
    UPDATE_TABLE = 4
    REQ_REPORT = 7
    RTMR = 8


class SecureCallAnswer(IntEnum):
    """What the firmware answers."""

    ACK = 0x6B
    INTERNAL = 0x6C
    INVALID_COMMAND = 0x6D
    INVALID_PARAM = 0x6E
    INVALID_ADDRESS = 0x6F
    INVALID_LENGTH = 0x70


_KNOWN: Final = frozenset(SecureCallRequest)


class Range(NamedTuple):
    """A range of guest pages: first .. stop - 1."""

    first: int
    stop: int


class _RefusedError(Exception):
    def __init__(self, code: SecureCallAnswer) -> None:
        self.code = code


def boot_pages(tail: bytes) -> int | None:
    """Guest physical address of the boot pair from the end of a firmware image, or None.

    In: tail   the image's last bytes, 64 KiB or all of it
    A table that is damaged, or an entry of another size, is as good as none: then the guest has no secure calls.
    """
    end = len(tail) - _FOOTER_END
    if end < 18 or tail[end - 16 : end] != _FOOTER_GUID:
        return None
    total = int.from_bytes(tail[end - 18 : end - 16], "little")
    low = end - total
    place = end - 18
    if total < 18 or low < 0:
        return None
    while place - 18 >= low:
        guid = tail[place - 16 : place]
        length = int.from_bytes(tail[place - 18 : place - 16], "little")
        if length < 18 or place - length < low:
            return None
        if guid == PAGE_GUID and length == 26:
            size = int.from_bytes(tail[place - 26 : place - 22], "little")
            base = int.from_bytes(tail[place - 22 : place - 18], "little")
            return base if size == BOOT_BYTES and base and base % PAGE == 0 else None
        place -= length
    return None


class SecureCallCommands(RtmrCommands, AttestationCommands):
    """What the firmware does when a guest's access to the hidden page of a pair faults."""

    def pair_pages(self, guest: Guest, record: Csv3Guest, first: int, *, boot: bool) -> None:
        """Makes guest frames first and first + 1 a pair on one private frame. The caller has checked them.

        Takes a frame of the pool if `first` has none yet; needs an active guest then.
        """
        second = first + 1
        table = record.table
        record.sent -= {first, second}  # their mappings are made anew, writable
        entry = table.entries.get(first)
        if entry is None:
            frame = self.private_frame(guest, record, first)
            if boot:
                self.memory.write(frame * PAGE, PAGE_GUID, self.active_asid(guest))
        else:
            frame = entry.frame
        old = table.entries.get(second)
        if old is not None and old.private and old.frame != frame and record.placed_frame(second) is None:
            record.pool.give_back(old.frame)
        table.entries[first] = Mapping(frame, True, present=boot)
        table.entries[second] = Mapping(frame, True, present=not boot)
        record.pairs[first] = second
        record.pairs[second] = first

    def private_frame(self, guest: Guest, record: Csv3Guest, gfn: int) -> int:
        """The frame of a guest page that has none yet: of the guest's pool, zero under its key; RESOURCE_LIMIT when there is
        none. Or the one that a memory controller has for it, which gives the page its zeros itself."""
        placed = record.placed_frame(gfn)
        if placed is not None:
            return placed
        if record.pool.free < 1:
            self.refuse(FirmwareStatus.RESOURCE_LIMIT, f"guest {guest.handle} has no free private frame")
        asid = self.active_asid(guest)
        frame = record.pool.take_for(gfn)
        self.memory.write(frame * PAGE, bytes(PAGE), asid)
        return frame

    def swap_pair(self, guest: Guest, record: Csv3Guest, gfn: int) -> None:
        """UPDATE_NPT on the hidden page of a pair: work the request off, then let the guest see the page."""
        hidden = record.table.entries[gfn]
        partner = record.pairs[gfn]
        asid = self.active_asid(guest)
        address = hidden.frame * PAGE
        page = self.memory.read(address, PAGE, asid)
        _, request, _, _ = _HEADER.unpack_from(page)
        if 0 < request < SecureCallAnswer.ACK:
            body = b""
            record.moved(gfn)
            try:
                if request == SecureCallRequest.UPDATE_TABLE and gfn in record.cpu_pairs:
                    raise _RefusedError(SecureCallAnswer.INVALID_PARAM)  # it would replace the pair it comes through
                body = self._work_off(guest, record, request, page)
                code = SecureCallAnswer.ACK
            except _RefusedError as refusal:
                code = refusal.code
            except FirmwareError as refusal:
                resources = refusal.status is FirmwareStatus.RESOURCE_LIMIT
                code = SecureCallAnswer.INTERNAL if resources else SecureCallAnswer.INVALID_PARAM
            self.memory.write(address + 16, int(code).to_bytes(4, "little"), asid)
            if body:
                self.memory.write(address + _HEADER.size, body, asid)
        # A new lookup: UPDATE_TABLE may have changed the table, never this pair.
        shown = record.table.entries[gfn]
        record.table.entries[gfn] = shown._replace(present=True)
        record.table.entries[partner] = record.table.entries[partner]._replace(present=False)

    def _work_off(self, guest: Guest, record: Csv3Guest, request: int, page: bytes) -> bytes:
        if request == SecureCallRequest.RTMR:
            if not self.profile.extended_report:
                raise _RefusedError(SecureCallAnswer.INVALID_COMMAND)
            return answer(guest, page[_HEADER.size :])
        if request not in _KNOWN:
            raise _RefusedError(SecureCallAnswer.INVALID_COMMAND)
        if request == SecureCallRequest.RESET:
            self._reset(record)
            return b""
        count = int.from_bytes(page[20:24], "little")
        if not 1 <= count <= ENTRIES_MAX:
            raise _RefusedError(SecureCallAnswer.INVALID_PARAM)
        entries = [_ENTRY.unpack_from(page, _HEADER.size + _ENTRY.size * index) for index in range(count)]
        if request == SecureCallRequest.REQ_REPORT:
            self._report(guest, record, *entries[0])
        elif request == SecureCallRequest.UPDATE_TABLE:
            boot = record.pairs.keys() - record.cpu_pairs
            self._update_table(guest, record, [self._range(boot, *entry) for entry in entries])
        else:
            ranges = [self._range(record.pairs, *entry) for entry in entries]
            for pages in ranges:
                self._set_shared(record, pages, shared=request == SecureCallRequest.DEC)
        return b""

    def _range(self, forbidden: Iterable[int], base: int, size: int) -> Range:
        if base % PAGE or base >= 1 << GPA_BITS:
            raise _RefusedError(SecureCallAnswer.INVALID_ADDRESS)
        if size == 0 or size % PAGE or size > (1 << GPA_BITS) - base:
            raise _RefusedError(SecureCallAnswer.INVALID_LENGTH)
        pages = Range(base // PAGE, (base + size) // PAGE)
        if any(pages.first <= gfn < pages.stop for gfn in forbidden):
            raise _RefusedError(SecureCallAnswer.INVALID_ADDRESS)
        return pages

    def _set_shared(self, record: Csv3Guest, pages: Range, *, shared: bool) -> None:
        """Moves a range to the other side. What was there is unmapped: its content is gone, as on the hardware, where the
        guest has to expect that."""
        table = record.table
        if shared and record.placed:
            raise _RefusedError(SecureCallAnswer.INTERNAL)  # that memory controller has all of the RAM under the guest's key
        if pages.stop - pages.first > len(table.entries):
            mapped = [gfn for gfn in table.entries if pages.first <= gfn < pages.stop]
        else:
            mapped = [gfn for gfn in range(pages.first, pages.stop) if gfn in table.entries]
        for gfn in mapped:
            entry = table.entries[gfn]
            if entry.private != shared:
                continue
            if entry.private:
                record.pool.give_back(entry.frame)
                record.moved(gfn)
            del table.entries[gfn]
        if shared:
            table.shared.add(pages.first, pages.stop)
        else:
            table.shared.remove(pages.first, pages.stop)

    def _reset(self, record: Csv3Guest) -> None:
        for first, stop in list(record.table.shared):
            self._set_shared(record, Range(first, stop), shared=False)

    def _update_table(self, guest: Guest, record: Csv3Guest, ranges: list[Range]) -> None:
        taken: set[int] = set()
        for pages in ranges:
            if pages.stop - pages.first != 2:
                raise _RefusedError(SecureCallAnswer.INVALID_LENGTH)
            # A shared page would put the calls into the host's hands; an entry given twice would tangle two CPUs.
            if record.table.shared.overlaps(*pages) or pages.first in taken or pages.first + 1 in taken:
                raise _RefusedError(SecureCallAnswer.INVALID_ADDRESS)
            entries = [record.table.entries.get(gfn) for gfn in (pages.first, pages.first + 1)]
            if any(entry is not None and entry.mmio for entry in entries):
                raise _RefusedError(SecureCallAnswer.INVALID_ADDRESS)
            taken.update((pages.first, pages.first + 1))
        dropped = {gfn for gfn in record.cpu_pairs if record.pairs[gfn] < gfn}
        missing = sum(pages.first not in record.table.entries or pages.first in dropped for pages in ranges)
        if missing > record.pool.free:
            raise _RefusedError(SecureCallAnswer.INTERNAL)
        for gfn in record.cpu_pairs:
            # Pages of the table before this one are ordinary private memory again: the first keeps the frame.
            del record.pairs[gfn]
            if gfn in dropped:
                del record.table.entries[gfn]
            else:
                record.table.entries[gfn] = record.table.entries[gfn]._replace(present=True)
        record.cpu_pairs.clear()
        for pages in ranges:
            self.pair_pages(guest, record, pages.first, boot=False)
            record.cpu_pairs.update((pages.first, pages.first + 1))

    def _private_span(self, record: Csv3Guest, gpa: int, length: int, *, write: bool) -> int:
        """The system address behind guest bytes that lie in one private page; INVALID_ADDRESS otherwise."""
        entry = record.table.entries.get(gpa // PAGE) if gpa < 1 << GPA_BITS else None
        placed = record.placed_frame(gpa // PAGE)
        if entry is None and placed is not None:
            entry = record.table.entries[gpa // PAGE] = Mapping(placed, True)
        if entry is None or not entry.private or gpa % PAGE + length > PAGE or gpa // PAGE in record.pairs:
            raise _RefusedError(SecureCallAnswer.INVALID_ADDRESS)
        if write:
            self.touch_private(record, gpa // PAGE)
        return entry.frame * PAGE + gpa % PAGE

    def touch_private(self, record: Csv3Guest, gfn: int) -> None:
        """The firmware is about to write a private page: a copy sent before is no longer the latest."""
        entry = record.table.entries[gfn]
        if not entry.writable:
            record.table.entries[gfn] = entry._replace(writable=True)
        record.moved(gfn)

    def _report(self, guest: Guest, record: Csv3Guest, base: int, size: int) -> None:
        if size < REPORT_BLOCK_BYTES:
            raise _RefusedError(SecureCallAnswer.INVALID_LENGTH)
        asid = self.active_asid(guest)
        place = self._private_span(record, base, REPORT_BLOCK_BYTES, write=True)
        block = _REPORT_BLOCK.unpack(self.memory.read(place, REPORT_BLOCK_BYTES, asid))
        _, flags, response_gpa, _, response_length, _, request_gpa, request_length, _ = block
        wanted = EXTENDED_REQUEST_BYTES if flags & 1 else REQUEST_BYTES
        if response_length < PAGE or request_length < wanted:
            status = FirmwareStatus.INVALID_LENGTH
            response_length, request_length = PAGE, wanted
        else:
            request_place = self._private_span(record, request_gpa, wanted, write=False)
            response_place = self._private_span(record, response_gpa, PAGE, write=True)
            status = FirmwareStatus.SUCCESS
            response_length = PAGE
            try:
                page = self.report_page(guest, self.memory.read(request_place, wanted, asid))
            except FirmwareError as refusal:
                status = refusal.status
            else:
                try:
                    self.memory.write(response_place, page, asid)
                finally:
                    wipe(page)
        reply = _REPORT_BLOCK.pack(
            guest.handle, flags, response_gpa, bytes(16), response_length, 0, request_gpa, request_length, status
        )
        self.memory.write(place, reply, asid)
