"""CSV3: guests whose memory the host cannot reach, not even as ciphertext.

The host sets secure memory regions aside (SET_SMR, SET_SMCR), gives some to a guest (SET_GUEST_PRIVATE_MEMORY), and
from then on neither a command nor the processor's DMA touches them on the host's behalf. The firmware places data
there by guest physical address (LAUNCH_ENCRYPT_DATA), makes the vCPUs' state (LAUNCH_ENCRYPT_VMCB), and keeps the
nested page table (npt.py; UPDATE_NPT: csv3_faults.py).

    launch digest    SM3 over the items in call order: LE32 command || LE32 vCPU or 0 || LE64 gpa || LE32 length || data

Sources: anolis-cloud-kernel include/linux/psp-hygon.h (parameters), openeuler-mirror/kernel arch/x86/kvm/svm/csv.c
(use), Avenger-285714/qemu-deepin target/i386/csv.c. Not public and therefore chosen here (inferred, not
interoperable): the digest's serialisation; every status code; that a second SET_SMR or SET_SMCR before SHUTDOWN is
INVALID_CONFIG; that the secure VMCB is the VMSA image in a private frame and the shadow VMCB loses its save area;
when a private frame is allocated.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from csvfast.errors import FirmwareStatus, InternalError
from csvfast.processor.core import C_BIT, PAGE
from csvfast.processor.guest import Guest
from csvfast.processor.launch import LaunchCommands
from csvfast.processor.npt import FramePool, Mapping, NestedPageTable, SecureMemory
from csvfast.processor.platform import PlatformCommands
from csvfast.processor.secure_call import BOOT_BYTES, GPA_BITS, SecureCallCommands, boot_pages
from csvfast.processor.states import GuestState, PlatformState

__all__ = ["Csv3Commands", "Csv3Guest"]

SMR_ENTRIES_MAX: Final = 8192
SMR_ENTRY_BYTES_MIN: Final = 1 << 23
SMCR_BYTES: Final = 256 << 20
REGIONS_PER_COMMAND: Final = 256  # one page of {base, size}
DATA_BLOCKS: Final = 8
BLOCK_ENTRIES: Final = 512
HOST_DATA_BYTES: Final = 64

_COMMAND_DATA: Final = 0x201
_COMMAND_VMCB: Final = 0x202
_ITEM: Final = struct.Struct("<IIQI")
_VMCB_SAVE: Final = 0x400  # where a VMCB's state save area begins (AMD64 APM volume 2, appendix B)
_CHUNK_PAGES: Final = 256
_HOST: Final = 0
_TAIL_BYTES: Final = 1 << 16


class Csv3Guest:
    """What the firmware keeps of a CSV3 guest besides Guest.

    Attributes:
        table, pool: nested page table and free private frames. vcpus: vCPU number to (frame of its secure VMCB,
        address of the host's shadow VMCB). pairs: page of a secure call pair to its partner, both ways. cpu_pairs:
        those UPDATE_TABLE made.
        updates: LAUNCH_ENCRYPT_DATA so far. frozen: True once the context has been sent: what would change here now, the
        target would not have. host_data: of LAUNCH_FINISH_EX. sent: pages sent away and unchanged since.
        sent_as: for the pages of a pair, the number under which they were sent last.
        placed: (first guest page, first frame, pages) of the RAM that a memory controller in another process maps and gives its
            zeros to, on the guest's first touch; empty: the firmware does that, on UPDATE_NPT.
    """

    __slots__ = (
        "cpu_pairs",
        "frozen",
        "host_data",
        "pairs",
        "placed",
        "pool",
        "sent",
        "sent_as",
        "table",
        "updates",
        "vcpus",
    )

    def __init__(self) -> None:
        self.table = NestedPageTable()
        self.pool = FramePool()
        self.vcpus: dict[int, tuple[int, int]] = {}
        self.pairs: dict[int, int] = {}
        self.cpu_pairs: set[int] = set()
        self.updates = 0
        self.frozen = False
        self.host_data = bytes(HOST_DATA_BYTES)
        self.sent: set[int] = set()
        self.sent_as: dict[int, int] = {}
        self.placed: tuple[tuple[int, int, int], ...] = ()

    def canonical(self, gfn: int) -> int:
        """The one number of a page: of a secure call pair, the lower."""
        return min(gfn, self.pairs.get(gfn, gfn))

    def placed_frame(self, gfn: int) -> int | None:
        """The frame of a page of RAM that a memory controller maps; None for all other pages."""
        for first, frame, count in self.placed:
            if first <= gfn < first + count:
                return frame + gfn - first
        return None

    def moved(self, gfn: int) -> None:
        """The page is no longer what was sent of it."""
        self.sent.discard(self.canonical(gfn))


class Csv3Commands(SecureCallCommands, PlatformCommands, LaunchCommands):
    """The CSV3 commands of set-up and launch, with everything a CSV guest has."""

    _secure: SecureMemory | None = None

    @property
    def secure_memory(self) -> SecureMemory:
        """SMRs, SMCR and their owners; empty again after SHUTDOWN."""
        if self._secure is None:
            self._secure = SecureMemory()
        return self._secure

    # ---- Hooks of the commands below

    def reject_private(self, address: int, length: int) -> None:
        """INVALID_PAGE_OWNER for ranges that touch the SMCR or a guest's private frames."""
        super().reject_private(address, length)
        if self._secure is not None and self._secure.is_protected(address, length):
            self.refuse(
                FirmwareStatus.INVALID_PAGE_OWNER,
                f"{length} bytes at {address:#x} touch secure memory, which the host cannot name",
            )

    def forget_guest(self, guest: Guest) -> None:
        """The guest's SMR entries are free; what they hold is ciphertext of a key that is being erased."""
        super().forget_guest(guest)
        if self._secure is not None:
            self._secure.release(guest.handle)
        guest.csv3 = None

    def shutdown(self) -> None:
        """SHUTDOWN: as for every part; the secure memory set-up is gone too."""
        with self.lock:
            super().shutdown()
            self._secure = None

    def secret_spans(self, guest: Guest, address: int, length: int) -> list[tuple[int, int]]:
        """Where a launch secret goes: for a CSV3 guest `address` is a guest's (qemu-deepin target/i386/csv.c), in private
        memory, and the firmware must have build 2200 (UNSUPPORTED)."""
        if not guest.policy.csv3:
            return super().secret_spans(guest, address, length)
        if not self.profile.csv3_many_updates:
            self.refuse(FirmwareStatus.UNSUPPORTED, "secrets for CSV3 guests need build 2200")
        if address < 0 or address % 16:
            self.refuse(FirmwareStatus.INVALID_ADDRESS, f"guest address {address:#x} is not a multiple of 16")
        return self.private_spans(guest, address, length)

    def require_running(self, guest: Guest) -> None:
        """As for every guest; a CSV3 guest whose context has been sent does not run on (INVALID_GUEST_STATE)."""
        super().require_running(guest)
        if isinstance(guest.csv3, Csv3Guest) and guest.csv3.frozen:
            self.refuse(
                FirmwareStatus.INVALID_GUEST_STATE,
                f"the context of guest {guest.handle} has been sent: it runs elsewhere",
            )

    def csv3_record(self, guest: Guest) -> Csv3Guest:
        """The guest's CSV3 side; UNSUPPORTED for any other guest."""
        if not guest.policy.csv3:
            self.refuse(FirmwareStatus.UNSUPPORTED, f"guest {guest.handle} is a {guest.generation} guest, not CSV3")
        if guest.csv3 is None:
            guest.csv3 = Csv3Guest()
        record = guest.csv3
        if not isinstance(record, Csv3Guest):
            raise InternalError(f"the CSV3 record of guest {guest.handle} is a {type(record).__name__}")
        return record

    def private_spans(self, guest: Guest, gpa: int, length: int) -> list[tuple[int, int]]:
        """System addresses and lengths behind a range of private guest memory; INVALID_ADDRESS where there is none."""
        entries = self.csv3_record(guest).table.entries
        spans: list[tuple[int, int]] = []
        gpa &= ~C_BIT
        if gpa < 0 or gpa + length > 1 << GPA_BITS:
            self.refuse(FirmwareStatus.INVALID_ADDRESS, f"{length} bytes at {gpa:#x} leave the guest's address space")
        while length > 0:
            entry = entries.get(gpa // PAGE)
            if entry is None or not entry.private:
                self.refuse(
                    FirmwareStatus.INVALID_ADDRESS, f"guest address {gpa:#x} is not private memory of the guest"
                )
            count = min(length, PAGE - gpa % PAGE)
            spans.append((entry.frame * PAGE + gpa % PAGE, count))
            gpa += count
            length -= count
        return spans

    # ---- Secure memory

    def set_smr(self, entry_size: int, regions: Sequence[tuple[int, int]]) -> None:
        """SET_SMR: memory from which guests' private memory may come.

        Args: entry_size: bytes of an entry, a power of two of at least 2^23. regions: (base, size), multiples of
            entry_size, at most 8192 entries in all, not overlapping.
        Refuses: INVALID_PLATFORM_STATE (INIT needed), UNSUPPORTED (no CSV3), INVALID_CONFIG (set already),
            INVALID_PARAM (entry_size, number of regions), INVALID_LENGTH, INVALID_ADDRESS.
        """
        with self.lock:
            self._require_csv3_platform()
            if self.secure_memory.entry_size:
                self.refuse(FirmwareStatus.INVALID_CONFIG, "the SMRs have been set already")
            if entry_size < SMR_ENTRY_BYTES_MIN or entry_size & (entry_size - 1):
                self.refuse(
                    FirmwareStatus.INVALID_PARAM, f"entry size {entry_size:#x}; expected a power of two from 2^23 on"
                )
            if not 1 <= len(regions) <= SMR_ENTRIES_MAX:
                self.refuse(FirmwareStatus.INVALID_PARAM, f"{len(regions)} regions; expected 1 to {SMR_ENTRIES_MAX}")
            taken = SecureMemory()
            entries = 0
            for base, size in regions:
                place = self._region(base, size, entry_size, private=True)
                if taken.regions.overlaps(place, place + size) or self._overlaps_control(place, size):
                    self.refuse(FirmwareStatus.INVALID_ADDRESS, f"region {place:#x} overlaps another")
                entries += size // entry_size
                taken.regions.add(place, place + size)
            if entries > SMR_ENTRIES_MAX:
                self.refuse(FirmwareStatus.INVALID_LENGTH, f"{entries} entries; expected at most {SMR_ENTRIES_MAX}")
            self.secure_memory.entry_size = entry_size
            self.secure_memory.regions = taken.regions

    def set_smcr(self, base: int, size: int) -> None:
        """SET_SMCR: 256 MiB for the firmware's own tables.

        Refuses: INVALID_PLATFORM_STATE, UNSUPPORTED, INVALID_CONFIG (set already), INVALID_LENGTH, INVALID_ADDRESS.
        """
        with self.lock:
            self._require_csv3_platform()
            if self.secure_memory.control is not None:
                self.refuse(FirmwareStatus.INVALID_CONFIG, "the SMCR has been set already")
            if size != SMCR_BYTES:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH, f"size is {size:#x}; expected {SMCR_BYTES:#x}", {"size": SMCR_BYTES}
                )
            place = self.physical(base, size, PAGE)
            if self.secure_memory.regions.overlaps(place, place + size):
                self.refuse(FirmwareStatus.INVALID_ADDRESS, f"the SMCR at {place:#x} overlaps an SMR")
            self.secure_memory.control = place, size

    def set_guest_private_memory(self, handle: int, regions: Sequence[tuple[int, int]]) -> None:
        """SET_GUEST_PRIVATE_MEMORY: whole SMR entries become the guest's. May be repeated until the guest runs.

        Args: regions: (base, size), multiples of the SMR entry size within the SMRs, nobody else's; 1 to 256.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (LUPDATE or RUPDATE needed), UNSUPPORTED,
            INVALID_CONFIG (no SMR or SMCR set), INVALID_PARAM, INVALID_LENGTH, INVALID_ADDRESS (not in an SMR),
            INVALID_PAGE_OWNER (taken).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LUPDATE, GuestState.RUPDATE)
            record = self.csv3_record(guest)
            secure = self.secure_memory
            if not secure.entry_size or secure.control is None:
                self.refuse(FirmwareStatus.INVALID_CONFIG, "SET_SMR and SET_SMCR come first")
            if not 1 <= len(regions) <= REGIONS_PER_COMMAND:
                self.refuse(
                    FirmwareStatus.INVALID_PARAM, f"{len(regions)} regions; expected 1 to {REGIONS_PER_COMMAND}"
                )
            owned: set[int] = set()
            places: list[tuple[int, int]] = []
            for base, size in regions:
                place = self._region(base, size, secure.entry_size, private=True)
                if not secure.regions.covers(place, place + size):
                    self.refuse(FirmwareStatus.INVALID_ADDRESS, f"{size:#x} bytes at {place:#x} are not in the SMRs")
                entries = range(place // secure.entry_size, (place + size) // secure.entry_size)
                if any(entry in secure.owners or entry in owned for entry in entries):
                    self.refuse(FirmwareStatus.INVALID_PAGE_OWNER, f"part of {place:#x} belongs to a guest already")
                owned.update(entries)
                places.append((place, size))
            secure.owners.update(dict.fromkeys(owned, handle))
            for place, size in places:
                record.pool.add(place // PAGE, size // PAGE)

    # ---- Launch

    def launch_encrypt_data(self, handle: int, gpa: int, length: int, data_blocks: Sequence[int]) -> None:
        """LAUNCH_ENCRYPT_DATA: plaintext of the host becomes measured private memory from `gpa` on.

        Args:
            gpa, length: multiples of 4096.
            data_blocks: up to 8 addresses of pages, each with 512 entries {pages: 12 bits, page frame: 52 bits}
                that name the plaintext piece by piece. The firmware reads each byte once, so measures what it encrypts.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (LUPDATE needed), BAD_MEASUREMENT (the
            guest may not run), INACTIVE, UNSUPPORTED (not CSV3; a second call before build 2200), INVALID_LENGTH,
            INVALID_ADDRESS, INVALID_PARAM (an entry without pages), INVALID_PAGE_OWNER (plaintext out of secure
            memory), RESOURCE_LIMIT (private memory used up).
        """
        with self.lock:
            guest, record, asid = self._launching(handle)
            if record.updates and not self.profile.csv3_many_updates:
                self.refuse(FirmwareStatus.UNSUPPORTED, "a second LAUNCH_ENCRYPT_DATA needs build 2200")
            if length <= 0 or length % PAGE or length > 0xFFFFFFFF:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected a positive multiple of {PAGE}"
                )
            if gpa < 0 or gpa % PAGE or gpa + length > 1 << GPA_BITS:
                self.refuse(
                    FirmwareStatus.INVALID_ADDRESS, f"guest address {gpa:#x}: expected whole pages below 2^{GPA_BITS}"
                )
            sources = self._source_runs(data_blocks, length // PAGE)
            first, count = gpa // PAGE, length // PAGE
            entries = record.table.entries
            missing = [gfn for gfn in range(first, first + count) if gfn not in entries]
            if len(missing) > record.pool.free:
                self.refuse(
                    FirmwareStatus.RESOURCE_LIMIT, f"{len(missing)} private frames needed, {record.pool.free} are free"
                )
            self._map_missing(record, missing)
            guest.digest.update(_ITEM.pack(_COMMAND_DATA, 0, gpa, length))
            gfn = first
            for source, pages in sources:
                data = self.memory.read(source, pages * PAGE, _HOST)
                guest.digest.update(data)
                with memoryview(data) as view:
                    for place, start, stop in _frames_of(entries, gfn, pages):
                        self.memory.write(place, view[start:stop], asid)
                gfn += pages
            guest.encrypted = True
            record.updates += 1
            if not record.pairs:
                self._find_boot_pages(guest, record, gpa, length)

    def launch_encrypt_vmcb(
        self, handle: int, vcpu_id: int, vmsa: int, vmsa_length: int, shadow_vmcb: int, shadow_vmcb_length: int
    ) -> tuple[int, int]:
        """LAUNCH_ENCRYPT_VMCB: a vCPU's first state, measured and out of the host's reach.

        Args: vmsa: page with the save area the vCPU starts with. shadow_vmcb: the host's page with the VMCB's control
            area; its save area is cleared. Both 4096 bytes on a page boundary.
        Returns: address and length of the secure VMCB.
        Refuses: as LAUNCH_ENCRYPT_DATA; INVALID_PARAM when the vCPU has been given already.
        """
        with self.lock:
            guest, record, asid = self._launching(handle)
            for name, size in (("VMSA", vmsa_length), ("shadow VMCB", shadow_vmcb_length)):
                if size != PAGE:
                    self.refuse(
                        FirmwareStatus.INVALID_LENGTH, f"the {name} has {size} bytes; expected {PAGE}", {"length": PAGE}
                    )
            state = self.physical(vmsa, PAGE, PAGE)
            shadow = self.physical(shadow_vmcb, PAGE, PAGE)
            if not 0 <= vcpu_id <= 0xFFFFFFFF or vcpu_id in record.vcpus:
                self.refuse(
                    FirmwareStatus.INVALID_PARAM, f"vCPU {vcpu_id} has its state already, or is no 32-bit number"
                )
            if record.pool.free < 1:
                self.refuse(FirmwareStatus.RESOURCE_LIMIT, f"guest {handle} has no free private frame")
            image = self.memory.read(state, PAGE, _HOST)
            guest.digest.update(_ITEM.pack(_COMMAND_VMCB, vcpu_id, 0, PAGE) + image)
            address = self.add_vcpu(record, asid, vcpu_id, image, shadow)
            guest.encrypted = True
            return address, PAGE

    def add_vcpu(self, record: Csv3Guest, asid: int, vcpu_id: int, image: bytes, shadow: int) -> int:
        """Puts a vCPU's state into a private frame and clears the shadow's save area; everything has been checked."""
        ((frame, _),) = record.pool.take(1)
        self.memory.write(frame * PAGE, image, asid)
        self.memory.write(shadow + _VMCB_SAVE, bytes(PAGE - _VMCB_SAVE), _HOST)
        record.vcpus[vcpu_id] = frame, shadow
        return frame * PAGE

    def launch_finish_ex(self, handle: int, host_data: bytes) -> None:
        """LAUNCH_FINISH_EX: LAUNCH_FINISH of a CSV3 guest, with 64 bytes of the host's that stay with the guest.

        They are not measured and stand in no report this project knows of (inferred).
        Refuses: as LAUNCH_FINISH; UNSUPPORTED (not CSV3); INVALID_LENGTH.
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LSECRET)
            record = self.csv3_record(guest)
            if len(host_data) != HOST_DATA_BYTES:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH, f"host data of {len(host_data)} bytes; expected {HOST_DATA_BYTES}"
                )
            self.launch_finish(handle)
            record.host_data = bytes(host_data)

    # ---- Behind the commands

    def _require_csv3_platform(self) -> None:
        self.require_platform(PlatformState.INIT)
        if not self.profile.csv3:
            self.refuse(FirmwareStatus.UNSUPPORTED, f"profile {self.profile.name} has no CSV3")

    def _region(self, base: int, size: int, unit: int, *, private: bool = False) -> int:
        if size <= 0 or size % unit:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"region of {size:#x} bytes; expected a multiple of {unit:#x}")
        return self.physical(base, size, unit, private=private)

    def _overlaps_control(self, place: int, size: int) -> bool:
        control = self.secure_memory.control
        return control is not None and place < control[0] + control[1] and control[0] < place + size

    def _launching(self, handle: int) -> tuple[Guest, Csv3Guest, int]:
        guest = self.guest(handle)
        self.require_state(guest, GuestState.LUPDATE)
        self._not_refused(guest)
        record = self.csv3_record(guest)
        return guest, record, self.active_asid(guest)

    def _source_runs(self, blocks: Sequence[int], pages: int) -> list[tuple[int, int]]:
        """(system address, pages) of the plaintext, in order; exactly `pages` pages."""
        if len(blocks) > DATA_BLOCKS:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"{len(blocks)} data blocks; expected at most {DATA_BLOCKS}")
        runs: list[tuple[int, int]] = []
        for address in blocks:
            if pages == 0:
                break
            place = self.physical(address, PAGE, PAGE)
            for (word,) in struct.iter_unpack("<Q", self.memory.read(place, PAGE, _HOST)):
                if pages == 0:
                    break
                count, frame = word & 0xFFF, word >> 12
                if count == 0:
                    self.refuse(
                        FirmwareStatus.INVALID_PARAM, f"an entry of the data block at {place:#x} names no pages"
                    )
                if count > pages:
                    self.refuse(FirmwareStatus.INVALID_LENGTH, "the data blocks name more pages than `length` has")
                source = self.physical(frame * PAGE, count * PAGE, PAGE)
                runs += [
                    (source + done * PAGE, min(_CHUNK_PAGES, count - done)) for done in range(0, count, _CHUNK_PAGES)
                ]
                pages -= count
        if pages:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"the data blocks name {pages} pages fewer than `length` has")
        return runs

    def _map_missing(self, record: Csv3Guest, missing: list[int]) -> None:
        """Frames at the pages' own places as far as these are free, the others in a row from the end; the caller has compared
        the number with what is free."""
        entries = record.table.entries
        pool = record.pool
        beyond: list[int] = []
        for gfn in missing:
            if pool.place_of(gfn) is None:
                beyond.append(gfn)
            else:
                entries[gfn] = Mapping(pool.take_for(gfn), True)
        numbers = iter(beyond)
        for first, count in pool.take(len(beyond)):
            for frame in range(first, first + count):
                entries[next(numbers)] = Mapping(frame, True)

    def _find_boot_pages(self, guest: Guest, record: Csv3Guest, gpa: int, length: int) -> None:
        size = min(length, _TAIL_BYTES)
        asid = self.active_asid(guest)
        spans = self.private_spans(guest, gpa + length - size, size)
        base = boot_pages(b"".join(self.memory.read(place, count, asid) for place, count in spans))
        # Without a frame for it the guest has no secure calls: its memory is too small to run in any case.
        if base is None or base + BOOT_BYTES > 1 << GPA_BITS or record.pool.free < 1:
            return
        self.pair_pages(guest, record, base // PAGE, boot=True)


def _frames_of(entries: dict[int, Mapping], gfn: int, pages: int) -> Iterator[tuple[int, int, int]]:
    """System address, start and stop (bytes) of runs of frames that lie one behind the other."""
    done = 0
    while done < pages:
        frame = entries[gfn + done].frame
        count = 1
        while done + count < pages and entries[gfn + done + count].frame == frame + count:
            count += 1
        yield frame * PAGE, done * PAGE, (done + count) * PAGE
        done += count
