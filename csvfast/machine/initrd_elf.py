"""Programs for an initrd: which loader and libraries they need, and their bytes without what only debuggers read.

Libraries are found as the dynamic loader finds them (`ldd`), so that a program runs in the guest with what it runs with here.

Source: System V ABI, chapters 4 and 5 (ELF header, program header). Thread-safety: functions without state.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from csvfast.errors import ArgumentError, FormatError

__all__ = ["is_elf", "libraries", "stripped"]

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_X86_64: Final = 62
_LOAD: Final = 1
_INTERPRETER: Final = 3
_LINE: Final = re.compile(r"^\t(?:(?P<name>\S+) => )?(?P<path>/\S+|not found)(?: \(0x[0-9a-f]+\))?$")


class _Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_size: int
    memory_size: int
    alignment: int


def is_elf(data: bytes) -> bool:
    """True for an ELF file of any kind."""
    return data[:4] == b"\x7fELF"


def _segments(data: bytes, name: str) -> list[_Segment]:
    if len(data) < _HEADER.size or not is_elf(data) or data[4:6] != b"\x02\x01":
        raise FormatError(name, "header", 0, data[:6].hex() or "nothing", "a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    machine, place, size, number = header[2], header[5], header[9], header[10]
    if machine != _X86_64:
        raise FormatError(name, "machine", 18, f"{machine}", f"{_X86_64} (x86-64)")
    if size != _PROGRAM.size or not number or place + size * number > len(data):
        raise FormatError(name, "program header", 32, f"{number} entries of {size} bytes at {place:#x}", "a table in the file")
    found = [_Segment(*_PROGRAM.unpack_from(data, place + index * size)) for index in range(number)]
    for segment in found:
        if segment.offset + segment.file_size > len(data):
            raise FormatError(name, "segment", segment.offset, f"{segment.file_size} bytes", "a segment inside the file")
    return found


def stripped(data: bytes, name: str = "program") -> bytes:
    """The file up to the end of its last segment: symbols for debuggers and the section table are gone, what runs is unchanged.

    FormatError: no x86-64 ELF program or shared library.
    """
    header = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else ()
    segments = _segments(data, name)
    end = max(header[5] + header[9] * header[10], *(segment.offset + segment.file_size for segment in segments))
    out = bytearray(data[:end])
    # e_shoff; e_shentsize, e_shnum and e_shstrndx.
    out[40:48] = bytes(8)
    out[58:64] = bytes(6)
    return bytes(out)


def libraries(path: Path) -> tuple[str | None, dict[str, Path]]:
    """What a program or shared library needs besides itself.

    Out: the loader's path as it stands in the program (None: static, or a library), and every library by its name.
    Raises: ArgumentError: one of them is not installed; FormatError: not x86-64 ELF; OSError: unreadable, or no `ldd`.
    """
    data = path.read_bytes()
    loader = None
    dynamic = False
    for segment in _segments(data, os.fspath(path)):
        if segment.kind == _INTERPRETER:
            loader = data[segment.offset : segment.offset + segment.file_size].rstrip(b"\0").decode()
        dynamic = dynamic or segment.kind == 2
    if not dynamic:
        return None, {}
    environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
    done = subprocess.run(["ldd", os.fspath(path)], capture_output=True, text=True, check=False, env=environment)
    if "statically linked" in done.stdout + done.stderr:
        return None, {}
    if done.returncode:
        raise ArgumentError(f"{path}: ldd says {(done.stderr or done.stdout).strip() or 'nothing'}")
    found = {}
    for line in done.stdout.splitlines():
        match = _LINE.match(line)
        if match is None:  # linux-vdso.so.1, which the kernel brings
            continue
        if match["path"] == "not found":
            raise ArgumentError(f"{path} needs {match['name']}, which is not installed")
        if match["name"] is None:
            continue  # the loader itself
        found[Path(match["name"]).name] = Path(match["path"])
    return loader, found
