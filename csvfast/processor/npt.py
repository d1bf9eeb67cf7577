"""CSV3 memory: which frames are secure, whose they are, and each guest's nested page table.

The secure processor owns a CSV3 guest's nested page table as a whole. A guest page is private by default: a frame out
of the regions that SET_GUEST_PRIVATE_MEMORY gave the guest, encrypted with the guest's key, out of reach of the host.
Ranges the guest declared shared (secure call DEC) are mapped to frames that the host names with UPDATE_NPT, in
plaintext.

Data structures only; the commands stand in csv3.py and secure_call.py. Unit of all tables: 4096-byte pages (gfn = guest
frame number, frame = system physical frame number).

Sources: openeuler-mirror/kernel and anolis-cloud-kernel arch/x86/kvm/svm/csv.c (page attributes, levels, fault flow),
arch/x86/kernel/csv-shared.c (private by default, ENC, DEC, RESET). Not public and therefore chosen here (inferred):
lazy allocation, which frame a page gets, zeroed frames, the place of the firmware's own tables.
Thread-safety: guarded by the processor's lock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final, NamedTuple

from csvfast.errors import CsvfastError

__all__ = [
    "ATTRIBUTE_MMIO",
    "ATTRIBUTE_WRITABLE",
    "FAULT_PRESENT",
    "FAULT_WRITE",
    "FramePool",
    "Mapping",
    "NestedPageFault",
    "NestedPageTable",
    "RangeSet",
    "SecureMemory",
]

PAGE: Final = 4096
ATTRIBUTE_WRITABLE: Final = 1 << 1  # union csv3_page_attr of csv.c
ATTRIBUTE_MMIO: Final = 1 << 51
FAULT_PRESENT: Final = 1 << 0  # error code of a nested page fault, AMD64 APM volume 2, 15.25.6
FAULT_WRITE: Final = 1 << 1
FAULT_USER: Final = 1 << 2
# Nested page table of n pages: at most 9 n bytes (csv.c, csv3_set_guest_private_memory).
_TABLE_BYTES_PER_PAGE: Final = 9
_PLACES_END: Final = (3 << 30) // PAGE


class NestedPageFault(CsvfastError):  # noqa: N818  (the manual's word for what the hardware raises)
    """The guest's access left its nested page table; the host has to call UPDATE_NPT.

    Attributes: gpa: the page's guest physical address. error_code: as the VMCB's EXITINFO1 would hold it, low 32 bits.
    """

    def __init__(self, gpa: int, error_code: int) -> None:
        super().__init__(f"nested page fault at {gpa:#x}, error code {error_code:#x}")
        self.gpa = gpa
        self.error_code = error_code


class RangeSet:
    """Disjoint half-open ranges of whole numbers, merged where they touch."""

    __slots__ = ("_starts", "_stops")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> zip[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self._starts, number) - 1
        return place >= 0 and number < self._stops[place]

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any number of start .. stop - 1 is in the set."""
        place = bisect_left(self._starts, stop) - 1
        return start < stop and place >= 0 and self._stops[place] > start

    def covers(self, start: int, stop: int) -> bool:
        """Whether every number of start .. stop - 1 is in the set."""
        place = bisect_right(self._starts, start) - 1
        return start >= stop or (place >= 0 and self._stops[place] >= stop)

    def add(self, start: int, stop: int) -> None:
        """Adds start .. stop - 1."""
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Removes start .. stop - 1."""
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        kept: list[tuple[int, int]] = []
        if self._starts[first] < start:
            kept.append((self._starts[first], start))
        if self._stops[last - 1] > stop:
            kept.append((stop, self._stops[last - 1]))
        self._starts[first:last] = [low for low, _ in kept]
        self._stops[first:last] = [high for _, high in kept]

    def clear(self) -> None:
        """Empties the set."""
        self._starts.clear()
        self._stops.clear()

    def last(self) -> tuple[int, int]:
        """The highest range. The caller has made sure that there is one."""
        return self._starts[-1], self._stops[-1]


class FramePool:
    """Frames of one guest's private memory that are not in use.

    A page of the guest gets the frame at its own place in that memory, if it is free: neighbours stay neighbours, as large
    mappings need it. All else (a firmware image below 4 GiB, save areas) comes from the end.
    """

    __slots__ = ("_free", "_regions", "free")

    def __init__(self) -> None:
        self._regions: list[tuple[int, int]] = []  # (first frame, frames)
        self._free = RangeSet()
        self.free = 0

    def add(self, first: int, count: int) -> None:
        """Takes a region in. Its last frames stay with the firmware for the nested page table: 9 bytes per page (inferred:
        the host allocates that much more than the guest's memory, where the tables lie is not public)."""
        usable = count - -(-_TABLE_BYTES_PER_PAGE * count // PAGE)
        if usable > 0:
            self._regions.append((first, usable))
            self._free.add(first, first + usable)
            self.free += usable

    def place_of(self, gfn: int) -> int | None:
        """The frame at a guest page's own place; None beyond the private memory, and where PCs have devices and firmware."""
        if gfn >= _PLACES_END:
            return None
        for first, count in self._regions:
            if gfn < count:
                return first + gfn
            gfn -= count
        return None

    def owns(self, first: int, count: int) -> bool:
        """Whether all of these frames belong to the guest's private memory, in use or not."""
        return any(start <= first and first + count <= start + size for start, size in self._regions)

    def take_for(self, gfn: int) -> int:
        """A frame for a guest page: the one at its place, or another. The caller has made sure that one is free."""
        place = self.place_of(gfn)
        if place is not None and self._free.covers(place, place + 1):
            self._free.remove(place, place + 1)
            self.free -= 1
            return place
        ((frame, _),) = self.take(1)
        return frame

    def take(self, count: int) -> list[tuple[int, int]]:
        """`count` frames from the end, as runs (first frame, frames). The caller has compared `count` with `free`."""
        if count > self.free:
            raise ValueError(f"{count} frames asked for, {self.free} are free")
        self.free -= count
        runs: list[tuple[int, int]] = []
        while count:
            start, stop = self._free.last()
            first = max(start, stop - count)
            self._free.remove(first, stop)
            runs.append((first, stop - first))
            count -= stop - first
        return runs

    def withdraw(self, first: int, count: int) -> None:
        """Those of these frames that are free are not given out any more."""
        for start, stop in [found for found in self._free if found[0] < first + count and first < found[1]]:
            low, high = max(start, first), min(stop, first + count)
            self._free.remove(low, high)
            self.free -= high - low

    def give_back(self, frame: int) -> None:
        """A frame is free again."""
        self._free.add(frame, frame + 1)
        self.free += 1


class Mapping(NamedTuple):
    """One entry of a nested page table.

    frame: system physical frame; 0 for MMIO, which the host emulates. private: under the guest's key. present: False
    for the hidden one of two secure call pages.
    """

    frame: int
    private: bool
    writable: bool = True
    present: bool = True
    mmio: bool = False


class NestedPageTable:
    """Guest frame number to mapping, and what the guest declared shared."""

    __slots__ = ("entries", "shared")

    def __init__(self) -> None:
        self.entries: dict[int, Mapping] = {}
        self.shared = RangeSet()

    def walk(self, gfn: int, *, write: bool) -> Mapping:
        """The mapping that a guest access finds. Raises NestedPageFault."""
        entry = self.entries.get(gfn)
        if entry is not None and entry.present and not entry.mmio and (entry.writable or not write):
            return entry
        code = FAULT_USER | (FAULT_WRITE if write else 0)
        if entry is not None and entry.present and not entry.mmio:
            code |= FAULT_PRESENT
        raise NestedPageFault(gfn * PAGE, code)

    def map_private(self, gfn: int, runs: list[tuple[int, int]]) -> None:
        """Maps private frames one after the other from `gfn` on."""
        entries = self.entries
        for first, count in runs:
            for frame in range(first, first + count):
                entries[gfn] = Mapping(frame, True)
                gfn += 1

    def private_gfns(self) -> list[int]:
        """Guest frames with a private frame behind them, ascending; the two secure call pages count once, as the lower."""
        seen: set[int] = set()
        found: list[int] = []
        for gfn in sorted(gfn for gfn, entry in self.entries.items() if entry.private):
            frame = self.entries[gfn].frame
            if frame not in seen:
                seen.add(frame)
                found.append(gfn)
        return found


class SecureMemory:
    """The platform's secure memory regions (SMR), control region (SMCR), and which guest owns which SMR entry.

    Attributes: entry_size: bytes of one SMR entry, 0 before SET_SMR. regions: byte addresses in SMRs. control: (base,
    size) of the SMCR or None. owners: entry number (address // entry_size) to guest handle.
    """

    __slots__ = ("control", "entry_size", "owners", "regions")

    def __init__(self) -> None:
        self.entry_size = 0
        self.regions = RangeSet()
        self.control: tuple[int, int] | None = None
        self.owners: dict[int, int] = {}

    def is_protected(self, address: int, length: int) -> bool:
        """Whether a byte of the range belongs to the SMCR or to a guest. SMR entries nobody owns are the host's to use: the
        kernel keeps them as movable memory until a guest needs them."""
        if length <= 0:
            return False
        if self.control is not None:
            base, size = self.control
            if address < base + size and base < address + length:
                return True
        if not self.owners or not self.regions.overlaps(address, address + length):
            return False
        size = self.entry_size
        return any(entry in self.owners for entry in range(address // size, (address + length - 1) // size + 1))

    def release(self, handle: int) -> None:
        """Takes every entry of a guest back."""
        for entry in [entry for entry, owner in self.owners.items() if owner == handle]:
            del self.owners[entry]
