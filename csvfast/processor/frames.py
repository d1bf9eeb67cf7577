"""Which frames of the DRAM are in use: the page allocator a host's operating system would be.

Several programs may drive one processor; each needs pages for parameter blocks and guests that nobody else touches. Frames
belong to a holder (a connection, say) until they are freed or assigned to a guest; a guest's go when it is decommissioned.
The security processor itself knows nothing of this.

Thread-safety: none of its own; Machine guards it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from csvfast.errors import AlignmentError, AllocationError, ArgumentError, LengthError

__all__ = ["PAGE", "Frames", "GuestRange"]

PAGE: Final = 4096


class GuestRange(NamedTuple):
    """Part of a guest's memory: guest physical address, system physical address, bytes."""

    guest_physical: int
    address: int
    size: int


class _Span:
    __slots__ = ("address", "guest", "guest_physical", "holder", "size")

    def __init__(self, address: int, size: int, holder: object) -> None:
        self.address = address
        self.size = size
        self.holder = holder
        self.guest: int | None = None
        self.guest_physical = 0


class Frames:
    """Allocator over `size` bytes at `base`. The first page is never given out: address 0 would look like none."""

    def __init__(self, base: int, size: int) -> None:
        self._first = base + PAGE
        self._end = base + size
        self._spans: list[_Span] = []  # by address

    def allocate(self, size: int, alignment: int, holder: object) -> int:
        """The lowest free place for `size` bytes, rounded up to pages.

        Raises: LengthError, AlignmentError (not a power of two, or above 1 GiB), AllocationError (no such place).
        """
        if size < 1:
            raise LengthError(f"size is {size}; expected at least 1 byte")
        if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 30:
            raise AlignmentError(f"alignment is {alignment}; expected a power of two up to {1 << 30}")
        alignment = max(alignment, PAGE)
        size = -(-size // PAGE) * PAGE
        place = self._first
        for index in range(len(self._spans) + 1):
            start = -(-place // alignment) * alignment
            limit = self._spans[index].address if index < len(self._spans) else self._end
            if start + size <= limit:
                self._spans.insert(index, _Span(start, size, holder))
                return start
            if index < len(self._spans):
                place = self._spans[index].address + self._spans[index].size
        raise AllocationError(f"the DRAM has no {size} free bytes on a boundary of {alignment}")

    def free(self, address: int, holder: object) -> None:
        """Gives a span back. Raises ArgumentError unless it begins at `address` and belongs to the holder."""
        self._spans.remove(self._held(address, holder))

    def assign(self, address: int, handle: int, guest_physical: int, holder: object) -> None:
        """The span is a guest's from now on, and outlives its holder. Raises ArgumentError as free() does."""
        span = self._held(address, holder)
        span.guest, span.guest_physical, span.holder = handle, guest_physical, None

    def reserve(self, address: int, size: int, holder: object) -> None:
        """The range (whole pages) is the holder's from now on: spans that touch it change hands, whoever allocated them, and what
        nobody had is no longer given out."""
        end = address + size
        place = max(address, self._first)
        spans: list[_Span] = []
        for span in self._spans:
            if span.address < end and address < span.address + span.size:
                if span.guest is None:
                    span.holder = holder
                if place < span.address:
                    spans.append(_Span(place, span.address - place, holder))
                place = span.address + span.size
            spans.append(span)
        if place < min(end, self._end):
            spans.append(_Span(place, min(end, self._end) - place, holder))
        self._spans = sorted(spans, key=lambda span: span.address)

    def guest_ranges(self, handle: int) -> list[GuestRange]:
        """A guest's memory, by guest physical address."""
        found = [GuestRange(s.guest_physical, s.address, s.size) for s in self._spans if s.guest == handle]
        return sorted(found)

    def release_guest(self, handle: int) -> None:
        """The frames of a guest are free."""
        self._spans = [span for span in self._spans if span.guest != handle]

    def release_holder(self, holder: object) -> None:
        """What a holder did not free or assign is free."""
        self._spans = [s for s in self._spans if s.guest is not None or s.holder is not holder]

    def _held(self, address: int, holder: object) -> _Span:
        for span in self._spans:
            if span.address == address and span.guest is None and span.holder is holder:
                return span
        raise ArgumentError(f"no allocation of this connection begins at {address:#x}")
