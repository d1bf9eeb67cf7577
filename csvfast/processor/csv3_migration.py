"""Migration of CSV3 guests: blocks of pages, and one context packet at the end.

    SEND_ENCRYPT_DATA      up to 512 guest pages, named by {share: 1 bit, 11 reserved, guest frame: 52 bits} each
    SEND_ENCRYPT_CONTEXT   everything else the firmware keeps of the guest
    RECEIVE_ENCRYPT_*      mirror

Neither format is public: both are this project's (not interoperable). A header has 60 bytes:

     0   4 flags, zero      4  16 iv      20  32 mac      52   8 number of the packet, from 0 on
    mac      HMAC-SM3(TIK; kind || flags || iv || number || LE32(block length) || LE32(transport length) || block || ciphertext)
    kind     4 data, 5 context (no block)
    payload  SM4-CTR(TEK, iv); data: 4096 bytes per entry of the block, zeros for one marked shared

Packets are numbered, so that one dropped, repeated or out of order is refused (BAD_MEASUREMENT), and the guest frame
numbers are under the MAC, so that a page cannot be put elsewhere. The source makes the context packet only when each
private page has been sent and not been written since, so that the target never runs with an old page.

    context   0 magic "CSVFAST-CONTEXT1" | 16 five RTMRs of 32 | 176 u8 RTMR state, u8 zero, u16 RTMR version | 180 host data 64 |
              244 u32 shared ranges, u32 ranges sent and gone since, u32 secure call pairs, u32 vCPUs |
              260 ranges {u64 first, u64 stop}, first the shared, then the gone; pairs {u64 first,
              u32 flags: 1 second page present, 2 a CPU's pair, 4 last sent as second}, vCPUs {u32 number, 4096 VMSA}, zeros

Which commands run, their parameters and their order: openeuler-mirror/kernel arch/x86/kvm/svm/csv.c. The context
packet comes last; the shared pages are the host's to copy.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from csvfast.crypto import SM4CTR, hmac_sm3
from csvfast.errors import AuthenticationError, FirmwareStatus
from csvfast.processor.buffers import copy_of
from csvfast.processor.core import PAGE
from csvfast.processor.csv3 import HOST_DATA_BYTES, Csv3Guest
from csvfast.processor.csv3_faults import Csv3FaultCommands
from csvfast.processor.derivation import wipe
from csvfast.processor.guest import RTMR_COUNT, Guest
from csvfast.processor.migration import MigrationCommands
from csvfast.processor.npt import Mapping, RangeSet
from csvfast.processor.secure_call import GPA_BITS
from csvfast.processor.states import GuestState

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["ENCRYPT_HEADER_BYTES", "MIGRATE_PAGES", "SET_READ_ONLY", "Csv3MigrationCommands"]

ENCRYPT_HEADER_BYTES: Final = 60
MIGRATE_PAGES: Final = 0
SET_READ_ONLY: Final = 1
GUEST_ENTRIES_MAX: Final = 512
SHARE: Final = 1

_KIND_DATA: Final = 4
_KIND_CONTEXT: Final = 5
_HEADER: Final = struct.Struct("<I16s32sQ")
_LENGTHS: Final = struct.Struct("<II")
_ENTRY: Final = struct.Struct("<Q")
_MAGIC: Final = b"CSVFAST-CONTEXT1"
_CONTEXT: Final = struct.Struct(f"<16s{32 * RTMR_COUNT}sBBH{HOST_DATA_BYTES}sIIII")
_RANGE: Final = struct.Struct("<QQ")
_PAIR: Final = struct.Struct("<QI")
_VCPU: Final = struct.Struct("<I")
_CONTEXT_MAX: Final = GUEST_ENTRIES_MAX * PAGE  # one block of transport pages
_VCPUS_MAX: Final = 512
_GFN_MAX: Final = 1 << (GPA_BITS - 12)
_SECOND_PRESENT: Final = 1
_CPU_PAIR: Final = 2
_SENT_AS_SECOND: Final = 4


class _Journey:
    """Guest.migration of a CSV3 guest: number of the next packet, whether the context has been sent or has arrived, and the
    guest frames that packets have named."""

    __slots__ = ("context", "named", "number")

    def __init__(self) -> None:
        self.number = 0
        self.named: set[int] = set()
        self.context = False


class Csv3MigrationCommands(Csv3FaultCommands, MigrationCommands):
    """SEND_ENCRYPT_* and RECEIVE_ENCRYPT_*."""

    # ---- Source

    def send_encrypt_data(
        self,
        handle: int,
        guest_block: BytesLike,
        flag: int,
        *,
        header_length: int | None = None,
        transport_length: int | None = None,
    ) -> tuple[bytes, bytes, bytes]:
        """SEND_ENCRYPT_DATA.

        Args:
            guest_block: 1 to 512 entries of 8 bytes.
            flag: 1 = make the pages read-only, so that a later write faults and is noticed; 0 = send them.
            header_length, transport_length: room for the answer, None = enough.
        Returns: header; the block with the share bit set for pages the guest shares with the host; ciphertext, 4096
            bytes per entry. With flag 1 header and ciphertext are empty.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (SUPDATE needed; the context has been
            sent), UNSUPPORTED, INACTIVE, INVALID_LENGTH (with the lengths needed), INVALID_PARAM (flag, reserved
            bits, a page twice), INVALID_ADDRESS (a page the guest has not).
        """
        with self.lock:
            guest, record, journey, asid = self._travelling(handle, GuestState.SUPDATE)
            block = copy_of(guest_block)
            if flag != SET_READ_ONLY:
                self._check_answer_room(header_length, transport_length, len(block) // 8 * PAGE or _CONTEXT_MAX)
            gfns = self._guest_frames(block)
            if flag not in (MIGRATE_PAGES, SET_READ_ONLY):
                self.refuse(FirmwareStatus.INVALID_PARAM, f"flag is {flag}; expected 0 or 1")
            entries = record.table.entries
            for gfn in gfns:
                entry = entries.get(gfn)
                if gfn not in record.table.shared and (entry is None or not entry.private):
                    self.refuse(FirmwareStatus.INVALID_ADDRESS, f"the guest has no page at {gfn * PAGE:#x}")
            marked = b"".join(_ENTRY.pack(gfn << 12 | (SHARE if gfn in record.table.shared else 0)) for gfn in gfns)
            private = [(index, gfn) for index, gfn in enumerate(gfns) if gfn not in record.table.shared]
            if flag == SET_READ_ONLY:
                for gfn in gfns:
                    for page in {gfn, record.pairs.get(gfn, gfn)} & entries.keys():
                        entries[page] = entries[page]._replace(writable=False)
                return b"", marked, b""
            plaintext = bytearray(PAGE * len(gfns))
            try:
                with memoryview(plaintext) as view:
                    for index, gfn in private:
                        self.memory.read_into(entries[gfn].frame * PAGE, view[index * PAGE : (index + 1) * PAGE], asid)
                header, ciphertext = self._seal(_KIND_DATA, guest, journey, marked, plaintext)
            finally:
                wipe(plaintext)
            for _, gfn in private:
                journey.named.add(gfn)
                page, partner = record.canonical(gfn), record.pairs.get(gfn, gfn)
                if gfn != partner:
                    record.sent_as[page] = gfn
                if not entries[gfn].writable and not entries[partner].writable:
                    record.sent.add(page)
            return header, marked, ciphertext

    def send_encrypt_context(
        self, handle: int, *, header_length: int | None = None, transport_length: int | None = None
    ) -> tuple[bytes, bytes]:
        """SEND_ENCRYPT_CONTEXT: the guest's state, after all its pages.

        Returns: header and ciphertext, a multiple of 4096 bytes.
        Refuses: as SEND_ENCRYPT_DATA; INVALID_PAGE_STATE while a private page has not been sent read-only, or was
            written since.
        """
        with self.lock:
            guest, record, journey, asid = self._travelling(handle, GuestState.SUPDATE)
            gone = self._gone(record, journey)
            length = self._context_length(record, gone)
            self._check_answer_room(header_length, transport_length, length)
            if length > _CONTEXT_MAX:
                self.refuse(
                    FirmwareStatus.RESOURCE_LIMIT, f"the context has {length} bytes; {_CONTEXT_MAX} fit a block"
                )
            waiting = [gfn for gfn in record.table.private_gfns() if gfn not in record.sent]
            if waiting:
                self.refuse(
                    FirmwareStatus.INVALID_PAGE_STATE,
                    f"{len(waiting)} private pages have not been sent as they are now, the first at {waiting[0] * PAGE:#x}",
                )
            plaintext = bytearray(length)
            try:
                self._write_context(guest, record, gone, asid, plaintext)
                packet = self._seal(_KIND_CONTEXT, guest, journey, b"", plaintext)
            finally:
                wipe(plaintext)
            journey.context = True
            record.frozen = True
            return packet

    def send_finish(self, handle: int) -> None:
        """SEND_FINISH: as for every guest; a CSV3 guest's context must have been sent (INVALID_GUEST_STATE)."""
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.SUPDATE)
            if guest.policy.csv3 and not (isinstance(guest.migration, _Journey) and guest.migration.context):
                self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"the context of guest {handle} has not been sent")
            super().send_finish(handle)

    def send_cancel(self, handle: int) -> None:
        """SEND_CANCEL: as for every guest; pages made read-only are writable again."""
        with self.lock:
            super().send_cancel(handle)
            guest = self.guest(handle)
            if guest.policy.csv3:
                record = self.csv3_record(guest)
                record.sent.clear()
                record.frozen = False
                entries = record.table.entries
                for gfn, entry in entries.items():
                    if not entry.writable:
                        entries[gfn] = entry._replace(writable=True)

    # ---- Target

    def receive_encrypt_data(
        self, handle: int, header: BytesLike, guest_block: BytesLike, transport: BytesLike
    ) -> None:
        """RECEIVE_ENCRYPT_DATA: pages go to where the guest had them; a page that comes again replaces the first.

        Args: header: 60 bytes. guest_block: as SEND_ENCRYPT_DATA returned it. transport: 4096 bytes per entry.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUPDATE needed; the context has arrived),
            UNSUPPORTED, INACTIVE, INVALID_LENGTH, INVALID_PARAM, RESOURCE_LIMIT (private memory), BAD_MEASUREMENT
            (MAC, or not the next packet).
        """
        with self.lock:
            guest, record, journey, asid = self._travelling(handle, GuestState.RUPDATE)
            block, ciphertext = copy_of(guest_block), copy_of(transport)
            gfns = self._guest_frames(block, shared_allowed=True)
            if len(ciphertext) != PAGE * len(gfns):
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"{len(ciphertext)} bytes of transport for {len(gfns)} pages; expected {PAGE * len(gfns)}",
                    {"transport_length": PAGE * len(gfns)},
                )
            private = [(index, gfn) for index, gfn in enumerate(gfns) if not block[8 * index] & SHARE]
            entries = record.table.entries
            missing = [gfn for _, gfn in private if gfn not in entries]
            if len(missing) > record.pool.free:
                self.refuse(
                    FirmwareStatus.RESOURCE_LIMIT, f"{len(missing)} private frames needed, {record.pool.free} are free"
                )
            plaintext = self._open(_KIND_DATA, guest, journey, header, block, ciphertext)
            try:
                self._map_missing(record, missing)
                with memoryview(plaintext) as view:
                    for index, gfn in private:
                        self.memory.write(entries[gfn].frame * PAGE, view[index * PAGE : (index + 1) * PAGE], asid)
            finally:
                wipe(plaintext)
            guest.encrypted = True

    def receive_encrypt_context(
        self, handle: int, header: BytesLike, transport: BytesLike, shadow_vmcbs: Sequence[int]
    ) -> list[int]:
        """RECEIVE_ENCRYPT_CONTEXT: the guest's state, as the last packet.

        Args: shadow_vmcbs: addresses of the host's VMCB pages, one per vCPU, in the order of the vCPUs' numbers.
        Returns: addresses of the secure VMCBs.
        Refuses: as RECEIVE_ENCRYPT_DATA; INVALID_ADDRESS; INVALID_LENGTH when there are not as many VMCBs as vCPUs.
        """
        with self.lock:
            guest, record, journey, asid = self._travelling(handle, GuestState.RUPDATE)
            ciphertext = copy_of(transport)
            if not 0 < len(ciphertext) <= _CONTEXT_MAX or len(ciphertext) % PAGE:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"{len(ciphertext)} bytes of transport; expected a positive multiple of {PAGE} up to {_CONTEXT_MAX}",
                )
            if len(shadow_vmcbs) > _VCPUS_MAX:
                self.refuse(FirmwareStatus.INVALID_LENGTH, f"{len(shadow_vmcbs)} VMCBs; expected at most {_VCPUS_MAX}")
            places = [self.physical(address, PAGE, PAGE) for address in shadow_vmcbs]
            number = journey.number
            plaintext = self._open(_KIND_CONTEXT, guest, journey, header, b"", ciphertext)
            try:
                addresses = self._read_context(guest, record, asid, plaintext, places)
            except BaseException:
                journey.number = number  # refused: the host may try again with what was missing
                raise
            finally:
                wipe(plaintext)
            journey.context = True
            guest.encrypted = True
            return addresses

    def check_arrival(self, guest: Guest) -> None:
        """A CSV3 guest without its context does not run (INVALID_GUEST_STATE)."""
        super().check_arrival(guest)
        if guest.policy.csv3 and not (isinstance(guest.migration, _Journey) and guest.migration.context):
            self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"the context of guest {guest.handle} has not arrived")

    # ---- Behind the commands

    def _travelling(self, handle: int, state: GuestState) -> tuple[Guest, Csv3Guest, _Journey, int]:
        guest = self.guest(handle)
        self.require_state(guest, state)
        record = self.csv3_record(guest)
        journey = guest.migration
        if not isinstance(journey, _Journey):
            journey = _Journey()
            record.sent.clear()
        if journey.context:
            self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"the context of guest {handle} was the last packet")
        asid = self.active_asid(guest)
        guest.migration = journey
        return guest, record, journey, asid

    def _check_answer_room(self, header_length: int | None, transport_length: int | None, needed: int) -> None:
        if (header_length is not None and header_length < ENCRYPT_HEADER_BYTES) or (
            transport_length is not None and transport_length < needed
        ):
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"header and transport buffers have {header_length} and {transport_length} bytes; "
                f"expected {ENCRYPT_HEADER_BYTES} and {needed}",
                {"header_length": ENCRYPT_HEADER_BYTES, "transport_length": needed},
            )

    def _guest_frames(self, block: bytes, *, shared_allowed: bool = False) -> list[int]:
        if not 0 < len(block) <= 8 * GUEST_ENTRIES_MAX or len(block) % 8:
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"guest block of {len(block)} bytes; expected 1 to {GUEST_ENTRIES_MAX} entries of 8",
            )
        words = [word for (word,) in _ENTRY.iter_unpack(block)]
        # A block that comes back from SEND carries share bits; sending again sets them anew.
        if any(word & 0xFFE for word in words):
            self.refuse(FirmwareStatus.INVALID_PARAM, "a guest block entry has reserved bits set")
        gfns = [word >> 12 for word in words]
        if len(set(gfns)) != len(gfns):
            self.refuse(FirmwareStatus.INVALID_PARAM, "a guest block names a page twice")
        if max(gfns) >= _GFN_MAX:
            self.refuse(
                FirmwareStatus.INVALID_PARAM if shared_allowed else FirmwareStatus.INVALID_ADDRESS,
                f"guest frame {max(gfns):#x} leaves the guest's address space",
            )
        return gfns

    def _mac(self, kind: int, guest: Guest, iv: bytes, number: int, block: bytes, ciphertext: bytes) -> hmac_sm3:
        _, tik = self.migration_keys(guest)
        head = bytes((kind,)) + bytes(4) + iv + _ENTRY.pack(number) + _LENGTHS.pack(len(block), len(ciphertext))
        mac = hmac_sm3(tik, head + block)
        mac.update(ciphertext)
        return mac

    def _seal(
        self, kind: int, guest: Guest, journey: _Journey, block: bytes, plaintext: bytearray
    ) -> tuple[bytes, bytes]:
        tek, _ = self.migration_keys(guest)
        iv = bytes(self.random(16))
        ciphertext = SM4CTR(tek, iv).encrypt(plaintext)
        mac = self._mac(kind, guest, iv, journey.number, block, ciphertext).digest()
        header = _HEADER.pack(0, iv, mac, journey.number)
        journey.number += 1
        return header, ciphertext

    def _open(
        self, kind: int, guest: Guest, journey: _Journey, header: BytesLike, block: bytes, ciphertext: bytes
    ) -> bytearray:
        raw = copy_of(header)
        if len(raw) != ENCRYPT_HEADER_BYTES:
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"the header has {len(raw)} bytes; expected {ENCRYPT_HEADER_BYTES}",
                {"header_length": ENCRYPT_HEADER_BYTES},
            )
        flags, iv, mac, number = _HEADER.unpack(raw)
        if flags:
            self.refuse(FirmwareStatus.INVALID_PARAM, f"packet flags are {flags:#x}; expected 0")
        try:
            self._mac(kind, guest, iv, number, block, ciphertext).verify(mac)
        except AuthenticationError:
            self.refuse(FirmwareStatus.BAD_MEASUREMENT, "the packet's MAC does not match this migration")
        if number != journey.number:
            self.refuse(FirmwareStatus.BAD_MEASUREMENT, f"this is packet {number}; expected packet {journey.number}")
        tek, _ = self.migration_keys(guest)
        plaintext = SM4CTR(tek, iv).decrypt(ciphertext, out=bytearray(len(ciphertext)))
        journey.number += 1
        return plaintext

    # ---- The context

    def _gone(self, record: Csv3Guest, journey: _Journey) -> RangeSet:
        """Pages that have been sent and are private memory no more: the target must forget them."""
        gone = RangeSet()
        for gfn in journey.named:
            entry = record.table.entries.get(gfn)
            if entry is None or not entry.private:
                gone.add(gfn, gfn + 1)
        return gone

    def _context_length(self, record: Csv3Guest, gone: RangeSet) -> int:
        length = (
            _CONTEXT.size
            + _RANGE.size * (len(record.table.shared) + len(gone))
            + _PAIR.size * (len(record.pairs) // 2)
            + (_VCPU.size + PAGE) * len(record.vcpus)
        )
        return -(-length // PAGE) * PAGE

    def _write_context(self, guest: Guest, record: Csv3Guest, gone: RangeSet, asid: int, out: bytearray) -> None:
        pairs = sorted(gfn for gfn, partner in record.pairs.items() if gfn < partner)
        registers = b"".join(guest.rtmrs)
        _CONTEXT.pack_into(
            out, 0, _MAGIC, registers, guest.rtmr_state, 0, guest.rtmr_version, record.host_data,
            len(record.table.shared), len(gone), len(pairs), len(record.vcpus),
        )  # fmt: skip
        place = _CONTEXT.size
        for first, stop in (*record.table.shared, *gone):
            _RANGE.pack_into(out, place, first, stop)
            place += _RANGE.size
        for gfn in pairs:
            flags = _SECOND_PRESENT if record.table.entries[gfn + 1].present else 0
            flags |= _CPU_PAIR if gfn in record.cpu_pairs else 0
            flags |= _SENT_AS_SECOND if record.sent_as.get(gfn) == gfn + 1 else 0
            _PAIR.pack_into(out, place, gfn, flags)
            place += _PAIR.size
        with memoryview(out) as view:
            for number in sorted(record.vcpus):
                _VCPU.pack_into(out, place, number)
                place += _VCPU.size
                self.memory.read_into(record.vcpus[number][0] * PAGE, view[place : place + PAGE], asid)
                place += PAGE

    def _read_context(
        self, guest: Guest, record: Csv3Guest, asid: int, data: bytearray, shadows: list[int]
    ) -> list[int]:
        """Takes the state over. The MAC has vouched for the bytes; they are checked all the same before anything changes."""
        fields = _CONTEXT.unpack_from(data)
        magic, registers, rtmr_state, _, rtmr_version, host_data, ranges, lost, pairs, vcpus = fields
        place = _CONTEXT.size
        needed = place + (ranges + lost) * _RANGE.size + pairs * _PAIR.size + vcpus * (_VCPU.size + PAGE)
        if magic != _MAGIC or needed > len(data) or rtmr_state > 2:
            self.refuse(FirmwareStatus.BAD_MEASUREMENT, "the packet holds no context of this format")
        if len(shadows) != vcpus:
            self.refuse(
                FirmwareStatus.INVALID_LENGTH, f"{len(shadows)} VMCBs for {vcpus} vCPUs", {"block_length": 8 * vcpus}
            )
        shared = [_RANGE.unpack_from(data, place + index * _RANGE.size) for index in range(ranges)]
        place += ranges * _RANGE.size
        gone = [_RANGE.unpack_from(data, place + index * _RANGE.size) for index in range(lost)]
        place += lost * _RANGE.size
        couples = [_PAIR.unpack_from(data, place + index * _PAIR.size) for index in range(pairs)]
        place += pairs * _PAIR.size
        entries = record.table.entries
        sources = [gfn + 1 if flags & _SENT_AS_SECOND else gfn for gfn, flags in couples]
        if any(gfn not in entries for gfn in sources) or any(
            not first < stop <= _GFN_MAX for first, stop in (*shared, *gone)
        ):
            self.refuse(FirmwareStatus.BAD_MEASUREMENT, "the context names pages that have not arrived")
        if vcpus > record.pool.free:
            self.refuse(FirmwareStatus.RESOURCE_LIMIT, f"{vcpus} private frames needed, {record.pool.free} are free")
        left = RangeSet()
        for first, stop in gone:
            left.add(first, stop)
        for gfn in [gfn for gfn in entries if gfn in left]:
            record.pool.give_back(entries.pop(gfn).frame)
        for first, stop in shared:
            record.table.shared.add(first, stop)
        for (gfn, flags), source in zip(couples, sources, strict=True):
            other = entries.get(2 * gfn + 1 - source)
            if other is not None:
                record.pool.give_back(other.frame)
            frame = entries[source].frame
            later = bool(flags & _SECOND_PRESENT)
            entries[gfn] = Mapping(frame, True, present=not later)
            entries[gfn + 1] = Mapping(frame, True, present=later)
            record.pairs[gfn], record.pairs[gfn + 1] = gfn + 1, gfn
            if flags & _CPU_PAIR:
                record.cpu_pairs.update((gfn, gfn + 1))
        addresses = []
        with memoryview(data) as view:
            for shadow in shadows:
                (number,) = _VCPU.unpack_from(data, place)
                place += _VCPU.size
                addresses.append(self.add_vcpu(record, asid, number, bytes(view[place : place + PAGE]), shadow))
                place += PAGE
        guest.rtmrs = [registers[32 * index : 32 * index + 32] for index in range(RTMR_COUNT)]
        guest.rtmrs[0] = guest.measure or bytes(32)
        guest.rtmr_state = rtmr_state
        guest.rtmr_version = rtmr_version
        record.host_data = host_data
        return addresses
