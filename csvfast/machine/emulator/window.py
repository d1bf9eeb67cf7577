"""The window: the few pages of a process that stand decrypted, as in a core's caches; all others are ciphertext in the DRAM.

Unicorn's softmmu asks once per page and TLB entry (UC_HOOK_TLB_FILL with the virtual TLB, unicorn/unicorn.h): a fill
decrypts the page's frame into a slot of the window and answers with the slot. Nothing is called per access. Evicting takes
the pages that no fill has asked for since the last flush, encrypts the changed ones and flushes the TLB.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from unicorn import UcError  # type: ignore[attr-defined]
from unicorn import unicorn_const as constants

from csvfast import errors

if TYPE_CHECKING:
    from csvfast.machine.emulator.files import Files
    from csvfast.machine.emulator.frames import Frames
    from csvfast.memory import EncryptedMemory

__all__ = ["EXECUTE", "PAGE", "READ", "WRITE", "AddressSpace", "Area"]

PAGE: Final = 4096
READ: Final = 1
WRITE: Final = 2
EXECUTE: Final = 4
TOP: Final = 0x7FFF_FFFF_F000  # end of a process's addresses
_MMAP_TOP: Final = 0x7FFF_F000_0000
_PERMISSIONS: Final = [
    (constants.UC_PROT_READ if rights else 0)  # whatever x86 lets write or execute it lets read, too
    | (constants.UC_PROT_WRITE if rights & WRITE else 0)
    | (constants.UC_PROT_EXEC if rights & EXECUTE else 0)
    for rights in range(8)
]
_FETCH: Final = constants.UC_MEM_FETCH
_WRITE: Final = constants.UC_MEM_WRITE


class Area:
    """A range of addresses with one protection; `file` is a descriptor that untouched pages are read from, -1 = zeros."""

    __slots__ = ("end", "file", "limit", "offset", "rights", "start")

    def __init__(self, start: int, end: int, rights: int, file: int = -1, offset: int = 0, limit: int = 0) -> None:
        self.start, self.end, self.rights = start, end, rights
        self.file, self.offset, self.limit = file, offset, limit  # limit: bytes of the file from start; zeros after it

    def part(self, start: int, end: int) -> Area:
        """A piece of this area."""
        gone = start - self.start
        return Area(start, end, self.rights, self.file, self.offset + gone, max(self.limit - gone, 0))


class _Page:
    __slots__ = ("code", "dirty", "frame", "number", "rights", "slot")

    def __init__(self, number: int, rights: int) -> None:
        self.number, self.rights = number, rights
        self.frame = self.slot = -1
        self.dirty = self.code = False


class AddressSpace:
    """One process's memory: areas, pages, and the window above the DRAM.

    In: memory   the DRAM; `asid` has a key in it
        frames   allocator of its frames
        window   bytes of the window, a multiple of 4096, at least 64 KiB
        files    what areas of files are read through

    Raises: ArgumentError. PageFault of a guest is told by fault() returning no slot. One thread.
    """

    def __init__(self, memory: EncryptedMemory, asid: int, frames: Frames, window: int, files: Files) -> None:
        if window % PAGE or window < 16 * PAGE:
            raise errors.ArgumentError(f"window has {window} bytes; expected a multiple of 4096, at least 65536")
        self.memory, self.asid, self.frames, self.files = memory, asid, frames, files
        self._first = memory.base_address // PAGE
        self._slots = window // PAGE
        self._buffer = mmap.mmap(-1, window, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            self._buffer.madvise(mmap.MADV_DONTDUMP)
        whole = memoryview(self._buffer)
        self._views = [whole[slot * PAGE : (slot + 1) * PAGE] for slot in range(self._slots)]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self.uc: Any = None
        self.failure: BaseException | None = None  # what went wrong inside of a fill
        self.clear()
        self.fills = self.decrypted = self.encrypted = self.flushes = 0

    def clear(self) -> None:
        """Forgets every area and page: for a new program. Frames are used again."""
        if hasattr(self, "pages"):
            self.frames.give([page.frame for page in self.pages.values() if page.frame >= 0])
            for file in {area.file for area in self.areas if area.file >= 0}:
                self.files.close_host(file)
        self.areas: list[Area] = []
        self._starts: list[int] = []
        self.pages: dict[int, _Page] = {}
        self._holders: list[_Page | None] = [None] * self._slots
        self._free = list(range(self._slots))
        self._recent: set[int] = set()
        self._last = [-1] * 4
        self.brk = self.brk_start = 0
        self.touched = 0  # the address of the last refused access

    def attach(self, uc: Any) -> None:
        """Gives the window to a Unicorn instance as its physical memory, and answers its TLB."""
        self.uc = uc
        uc.mem_map_ptr(0, self._slots * PAGE, constants.UC_PROT_ALL, self._address)
        uc.ctl_set_tlb_mode(constants.UC_TLB_VIRTUAL)
        uc.hook_add(constants.UC_HOOK_TLB_FILL, self._fill)

    # ---- Faults

    def _fill(self, uc: Any, address: int, access: int, entry: Any, _data: Any) -> bool:
        try:
            return self._answer(address, access, entry)
        except BaseException as problem:  # Unicorn would swallow it
            self.failure = problem
            uc.emu_stop()
            return False

    def _answer(self, address: int, access: int, entry: Any) -> bool:
        page = self._page(address >> 12)
        write = access == _WRITE
        if page is None or (write and not page.rights & WRITE) or (access == _FETCH and not page.rights & EXECUTE):
            self.touched = address
            return False
        if not page.rights:
            self.touched = address
            return False
        self.fills += 1
        if page.slot < 0:
            self._bring(page)
        if write:
            page.dirty = True
        if access == _FETCH:
            page.code = True
        self._recent.add(page.slot)
        entry.paddr = page.slot << 12
        permissions = _PERMISSIONS[page.rights]
        entry.perms = permissions if page.dirty else permissions & ~constants.UC_PROT_WRITE  # so that a write asks again
        return True

    def _page(self, number: int) -> _Page | None:
        page = self.pages.get(number)
        if page is None:
            area = self.area(number << 12)
            if area is None:
                return None
            page = self.pages[number] = _Page(number, area.rights)
        return page

    def area(self, address: int) -> Area | None:
        """The area that holds an address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.areas[index].end:
            return self.areas[index]
        return None

    def _bring(self, page: _Page) -> None:
        if not self._free:
            self._evict()
        slot = self._free.pop()
        view = self._views[slot]
        if page.frame >= 0:
            self.memory.read_pages(self._first + page.frame, 1, self.asid, out=view)
            self.decrypted += 1
            page.dirty = False
        else:
            view[:] = bytes(PAGE)
            area = self.area(page.number << 12)
            if area is not None and area.file >= 0:
                gone = (page.number << 12) - area.start
                length = min(PAGE, area.limit - gone)
                if length > 0:
                    data = self.files.pread(area.file, length, area.offset + gone)
                    view[: len(data)] = data
            page.dirty = True
        page.slot = slot
        self._holders[slot] = page
        self._recent.add(slot)
        self._last = [*self._last[1:], slot]

    def _evict(self) -> None:
        # A slot is taken when no fill has asked for it since the last flush: that is the reference bit of NRU.
        wanted = max(self._slots // 8, 1)
        keep = set(self._last)
        victims = [slot for slot in range(self._slots) if slot not in self._recent and slot not in keep][: wanted * 2]
        if len(victims) < wanted:
            rest = [slot for slot in self._recent if slot not in keep]
            step = self.flushes % 7
            victims += [slot for index, slot in enumerate(rest) if index % 7 == step][: wanted - len(victims)]
            if not victims:
                victims = rest[:wanted]
        self._write_back(victims, leave=True)

    def _write_back(self, slots: list[int], *, leave: bool) -> None:
        for slot in slots:
            page = self._holders[slot]
            if page is None:
                continue
            if leave and page.code:
                self.forget_code(page.number)
            if page.dirty:
                if page.frame < 0:
                    page.frame = self.frames.take()
                self.memory.write_pages(self._first + page.frame, self._views[slot], self.asid)
                self.encrypted += 1
                page.dirty = False
            if leave:
                page.slot = -1
                page.code = False
                self._holders[slot] = None
                self._free.append(slot)
        self.flush()

    def forget_code(self, number: int) -> None:
        """Drops what was translated from a page."""
        if self.uc is not None:
            with suppress(UcError):
                self.uc.ctl_remove_cache(number << 12, (number + 1) << 12)

    def flush(self) -> None:
        """Empties the TLB: the next access to each page asks again."""
        self.flushes += 1
        self._recent.clear()
        if self.uc is not None:
            self.uc.ctl(constants.UC_CTL_TLB_FLUSH, constants.UC_CTL_IO_WRITE)

    def sync(self) -> None:
        """Encrypts every changed page of the window into the DRAM; the pages stay."""
        self._write_back([slot for slot, page in enumerate(self._holders) if page is not None], leave=False)

    def forked(self) -> None:
        """In a forked child: its pages move to frames of its own, through a page's plaintext at a time."""
        self.frames.forked()
        plain = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(plain)
        for page in self.pages.values():
            if page.frame < 0:
                continue
            old, page.frame = page.frame, self.frames.take()
            if page.slot >= 0 and page.dirty:
                continue  # the window's copy is the newer one
            self.memory.read_pages(self._first + old, 1, self.asid, out=view)
            self.memory.write_pages(self._first + page.frame, view, self.asid)
        view[:] = bytes(PAGE)
        view.release()
        plain.close()

    # ---- Areas

    def map(self, area: Area) -> None:
        """Adds an area, in place of whatever was there."""
        self.unmap(area.start, area.end)
        index = bisect_right(self._starts, area.start)
        self.areas.insert(index, area)
        self._starts.insert(index, area.start)

    def unmap(self, start: int, end: int) -> None:
        """Removes what lies in [start, end)."""
        gone = []
        kept: list[Area] = []
        for area in self.areas:
            if area.end <= start or area.start >= end:
                kept.append(area)
                continue
            gone.append(area)
            if area.start < start:
                kept.append(area.part(area.start, start))
            if area.end > end:
                kept.append(area.part(end, area.end))
        if not gone:
            return
        self._set_areas(kept)
        for area in gone:
            self._close(area, kept)
        frames = []
        for page in self._pages_in(start, end):
            if page.slot >= 0:
                if page.code:
                    self.forget_code(page.number)
                self._holders[page.slot] = None
                self._views[page.slot][:] = bytes(PAGE)
                self._free.append(page.slot)
            if page.frame >= 0:
                frames.append(page.frame)
            del self.pages[page.number]
        self.frames.give(frames)
        self.flush()

    def protect(self, start: int, end: int, rights: int) -> None:
        """Changes the protection of [start, end). Raises OSError ENOMEM where nothing is mapped."""
        place = start
        while place < end:
            area = self.area(place)
            if area is None:
                raise OSError(errno.ENOMEM, "not mapped")
            place = area.end
        areas: list[Area] = []
        for area in self.areas:
            if area.end <= start or area.start >= end:
                areas.append(area)
                continue
            low, high = max(area.start, start), min(area.end, end)
            if area.start < low:
                areas.append(area.part(area.start, low))
            middle = area.part(low, high)
            middle.rights = rights
            areas.append(middle)
            if high < area.end:
                areas.append(area.part(high, area.end))
        self._set_areas(areas)
        for page in self._pages_in(start, end):
            page.rights = rights
        self.flush()

    def find_room(self, length: int) -> int:
        """The highest free range of `length` bytes below the stack. Raises OSError ENOMEM."""
        top = _MMAP_TOP
        for area in reversed(self.areas):
            if area.start >= top:
                continue
            if area.end <= top - length:
                break
            top = area.start
        if top - length < 0x10000:
            raise OSError(errno.ENOMEM, "no room")
        return top - length

    def _set_areas(self, areas: list[Area]) -> None:
        self.areas = areas
        self._starts = [area.start for area in areas]

    def _pages_in(self, start: int, end: int) -> list[_Page]:
        first, last = start >> 12, (end + PAGE - 1) >> 12
        if last - first > len(self.pages):
            return [page for number, page in self.pages.items() if first <= number < last]
        return [self.pages[number] for number in range(first, last) if number in self.pages]

    def _close(self, area: Area, kept: list[Area]) -> None:
        if area.file >= 0 and all(other.file != area.file for other in kept):
            with suppress(OSError):
                self.files.close_host(area.file)

    # ---- The kernel's own accesses

    def _resident(self, number: int, need: int) -> _Page:
        page = self._page(number)
        if page is None or not page.rights or (need == WRITE and not page.rights & WRITE):
            raise OSError(errno.EFAULT, "bad address")
        if page.slot < 0:
            self._bring(page)
        self._recent.add(page.slot)
        return page

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the process. Raises OSError EFAULT."""
        if length <= 0:
            return b""
        self._check(address, length)
        first, inside = address >> 12, address & 0xFFF
        if inside + length <= PAGE:
            return bytes(self._views[self._resident(first, READ).slot][inside : inside + length])
        out = bytearray()
        while length:
            take = min(PAGE - inside, length)
            out += self._views[self._resident(first, READ).slot][inside : inside + take]
            first, inside, length = first + 1, 0, length - take
        return bytes(out)

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Writes bytes of the process. Raises OSError EFAULT."""
        place, length = 0, len(data)
        self._check(address, length)
        number, inside = address >> 12, address & 0xFFF
        while place < length:
            take = min(PAGE - inside, length - place)
            page = self._resident(number, WRITE)
            if page.code:
                self.forget_code(number)
            page.dirty = True
            self._views[page.slot][inside : inside + take] = data[place : place + take]
            number, inside, place = number + 1, 0, place + take

    def text(self, address: int, limit: int = 4096) -> bytes:
        """A NUL-terminated string. Raises OSError EFAULT, ENAMETOOLONG."""
        out = b""
        while len(out) < limit:
            part = self.read(address + len(out), PAGE - (address + len(out)) % PAGE)
            end = part.find(0)
            if end >= 0:
                return out + part[:end]
            out += part
        raise OSError(errno.ENAMETOOLONG, "text too long")

    @staticmethod
    def _check(address: int, length: int) -> None:
        if not 0 <= address <= TOP - length:
            raise OSError(errno.EFAULT, "bad address")
