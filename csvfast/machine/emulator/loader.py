"""ELF64 programs (System V ABI, AMD64 supplement, 3.4): static and static-pie, and the stack they start with."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from csvfast import errors
from csvfast.machine.emulator.window import EXECUTE, PAGE, READ, WRITE, Area

if TYPE_CHECKING:
    from collections.abc import Sequence

    from csvfast.machine.emulator.identity import Identity
    from csvfast.machine.emulator.window import AddressSpace

__all__ = ["ProgramError", "load"]

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_LOAD, _INTERPRETER, _STACK_BYTES = 1, 3, 8 << 20
_PIE_BASE: Final = 0x5555_5555_4000
_STACK_TOP: Final = 0x7FFF_FFFF_0000
_LIMIT: Final = 0x7FFF_0000_0000


class ProgramError(errors.ArgumentError):
    """The file is no program that the machine can run."""


def load(
    space: AddressSpace, file: int, name: str, arguments: Sequence[bytes], environment: Sequence[bytes],
    identity: Identity,
) -> tuple[int, int]:  # fmt: skip
    """Loads a program into an empty address space.

    In: file   descriptor of the program; the space keeps copies of it
        name   what errors call it
    Out: the entry's address and the stack pointer.
    Raises: ProgramError in one line for anything that is not such a program.
    """
    files = space.files
    head = files.pread(file, _HEADER.size, 0)
    size = files.file_size(file)
    if len(head) < _HEADER.size or head[:4] != b"\x7fELF":
        raise ProgramError(f"{name}: no ELF file")
    marks, kind, machine, _, entry, table, _, _, _, step, count, *_ = _HEADER.unpack(head)
    if marks[4] != 2 or marks[5] != 1 or machine != 62:
        raise ProgramError(f"{name}: machine {machine}, class {marks[4]}; expected ELF64 for x86-64")
    if kind not in (2, 3):
        raise ProgramError(f"{name}: ELF type {kind}; expected an executable (2 or 3)")
    if step != _SEGMENT.size or not 0 < count <= 128 or table + count * step > size:
        raise ProgramError(f"{name}: program headers ({count} of {step} bytes at {table:#x}) reach past the file")
    segments = [_SEGMENT.unpack(files.pread(file, step, table + index * step)) for index in range(count)]
    if any(segment[0] == _INTERPRETER for segment in segments):
        raise ProgramError(f"{name}: dynamically linked; expected a static program")
    loads = [segment for segment in segments if segment[0] == _LOAD]
    if not loads:
        raise ProgramError(f"{name}: nothing to load")
    base = _PIE_BASE if kind == 3 else 0
    end = 0
    for _, flags, offset, address, _, in_file, in_memory, _ in loads:
        address += base
        if in_file > in_memory or offset + in_file > size or (offset - address) % PAGE or not (
            address >= PAGE and address + in_memory <= _LIMIT and in_memory
        ):
            raise ProgramError(f"{name}: segment at {address:#x} ({in_memory} bytes) does not fit file or memory")
        rights = (READ if flags & 4 else 0) | (WRITE if flags & 2 else 0) | (EXECUTE if flags & 1 else 0)
        start = address & -PAGE
        stop = (address + in_memory + PAGE - 1) & -PAGE
        if start < end:
            raise ProgramError(f"{name}: segments overlap or are not in order at {start:#x}")
        space.map(Area(start, stop, rights, files.duplicate_host(file), offset & -PAGE, address - start + in_file))
        end = stop
    space.brk = space.brk_start = end + (PAGE << 4)
    if space.area(base + entry) is None:
        raise ProgramError(f"{name}: entry {entry:#x} lies in no segment")
    headers = next((base + s[3] + table - s[2] for s in loads if s[2] <= table < s[2] + s[5]), 0)
    return base + entry, _stack(space, name, arguments, environment, (base + entry, headers, count), identity)


def _stack(
    space: AddressSpace, name: str, arguments: Sequence[bytes], environment: Sequence[bytes], image: tuple[int, int, int],
    identity: Identity,
) -> int:
    space.map(Area(_STACK_TOP - _STACK_BYTES, _STACK_TOP, READ | WRITE))
    place = _STACK_TOP - 16

    def put(data: bytes) -> int:
        nonlocal place
        place -= len(data)
        if place < _STACK_TOP - _STACK_BYTES // 4:
            raise ProgramError(f"{name}: arguments and environment are too long")
        space.write(place, data)
        return place

    run = put(os.fsencode(name) + b"\0")
    arguments_at = [put(text + b"\0") for text in arguments]
    environment_at = [put(text + b"\0") for text in environment]
    platform = put(b"x86_64\0")
    random = put(os.urandom(16))
    entry, headers, count = image
    auxiliary = [
        3, headers, 4, _SEGMENT.size, 5, count, 6, PAGE, 7, 0, 8, 0, 9, entry,
        11, identity.users[0], 12, identity.users[1], 13, identity.members[0], 14, identity.members[1], 15, platform,
        16, 0x178BFBFF, 17, 100, 23, 0, 25, random, 26, 0, 31, run, 0, 0,
    ]  # fmt: skip
    words = [len(arguments), *arguments_at, 0, *environment_at, 0, *auxiliary]
    place = (place & -16) - (len(words) * 8 + 15 & -16)
    space.write(place, struct.pack(f"<{len(words)}Q", *words))
    return place
