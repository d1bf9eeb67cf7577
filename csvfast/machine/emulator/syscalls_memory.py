"""System calls about memory: brk, mmap and what belongs to it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator.window import PAGE, READ, TOP, WRITE, Area

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS"]

_SHARED, _FIXED, _ANONYMOUS, _NO_REPLACE = 1, 0x10, 0x20, 0x100000
_MAY_MOVE: Final = 1


def _round(length: int) -> int:
    if not 0 < length <= TOP:
        raise OSError(errno.EINVAL, "length")
    return (length + PAGE - 1) & -PAGE


def _range(address: int, length: int) -> int:
    if address % PAGE:
        raise OSError(errno.EINVAL, "address")
    end = address + _round(length)
    if end > TOP:
        raise OSError(errno.ENOMEM, "address")
    return end


def _brk(process: Process, address: int, *_: int) -> int:
    space = process.space
    if space.brk_start <= address < space.brk_start + (1 << 40):
        old, new = (space.brk + PAGE - 1) & -PAGE, (address + PAGE - 1) & -PAGE
        if new > old:
            if any(area.start < new and area.end > old for area in space.areas):
                return space.brk
            last = space.area(old - 1) if old > space.brk_start else None
            if last is not None and last.end == old and last.rights == READ | WRITE and last.file < 0:
                last.end = new
            else:
                space.map(Area(old, new, READ | WRITE))
        elif new < old:
            space.unmap(new, old)
        space.brk = address
    return space.brk


def _mmap(process: Process, address: int, length: int, rights: int, flags: int, number: int, offset: int) -> int:
    space = process.space
    size = _round(length)
    rights &= 7
    file, limit = -1, 0
    if not flags & _ANONYMOUS:
        if offset % PAGE:
            raise OSError(errno.EINVAL, "offset")
        if flags & _SHARED and rights & WRITE:
            raise OSError(errno.ENODEV, "shared writable mappings of files are not supported")
        host = process.files.host(number & 0xFFFFFFFF)
        limit = max(min(length, process.files.file_size(host) - offset), 0)
        file = process.files.duplicate_host(host)
    if flags & (_FIXED | _NO_REPLACE):
        end = _range(address, length)
        if flags & _NO_REPLACE and any(area.start < end and area.end > address for area in space.areas):
            raise OSError(errno.EEXIST, "already mapped")
        if address < 0x10000:
            raise OSError(errno.EPERM, "address")
    else:
        address &= -PAGE
        taken = any(area.start < address + size and area.end > address for area in space.areas)
        if address < 0x10000 or taken or address + size > TOP:
            address = space.find_room(size)
    space.map(Area(address, address + size, rights, file, offset, limit))
    return address


def _munmap(process: Process, address: int, length: int, *_: int) -> int:
    process.space.unmap(address, _range(address, length))
    return 0


def _mprotect(process: Process, address: int, length: int, rights: int, *_: int) -> int:
    if length:
        process.space.protect(address, _range(address, length), rights & 7)
    return 0


def _mremap(process: Process, address: int, old: int, new: int, flags: int, *_: int) -> int:
    space = process.space
    end, size = _range(address, old), _round(new)
    area = space.area(address)
    if area is None or area.end < end:
        raise OSError(errno.EFAULT, "not mapped")
    if flags & ~_MAY_MOVE or area.file >= 0:
        raise OSError(errno.EINVAL, "flags")
    if address + size <= end:
        if address + size < end:
            space.unmap(address + size, end)
        return address
    if not any(other.start < address + size and other.end > end for other in space.areas):
        space.map(Area(end, address + size, area.rights))
        return address
    if not flags & _MAY_MOVE:
        raise OSError(errno.ENOMEM, "no room")
    place = space.find_room(size)
    space.map(Area(place, place + size, area.rights | READ | WRITE))
    for step in range(0, end - address, PAGE):
        if (address + step) >> 12 in space.pages:
            space.write(place + step, space.read(address + step, PAGE))
    space.unmap(address, end)
    return place


def _madvise(process: Process, address: int, length: int, advice: int, *_: int) -> int:
    if advice in (4, 8) and length:  # MADV_DONTNEED, MADV_FREE: anonymous pages read as zeros afterwards
        end = _range(address, length)
        space = process.space
        for area in list(space.areas):
            low, high = max(area.start, address), min(area.end, end)
            if low < high and area.file < 0:
                space.map(area.part(low, high))
    return 0


def _nothing(_process: Process, *_: int) -> int:
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    9: _mmap, 10: _mprotect, 11: _munmap, 12: _brk, 25: _mremap, 26: _nothing, 28: _madvise,
    149: _nothing, 150: _nothing,
}  # fmt: skip
