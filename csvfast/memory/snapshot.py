"""Snapshots of an encrypted memory: its ciphertext and shape in one file, never a key.

Layout (little-endian)
    0     16   "CSVFAST SNAPSHOT"
    16    4    version, 1
    20    4    zero
    24    8    length of the JSON text
    32    32   SM3( bytes 0..31 || the rest of the header from 64 on || SM3 of each page in order )
    64    ..   JSON: size, base_address, standard, tweak_model, generations; zeros up to a multiple of 4096
    ..    size the DRAM

The page digests make the check as fast as the SM3 lanes, and a damaged file is refused before any byte of it is used. The
digest tells damage, not forgery: ciphertext in DRAM has no authenticity, here as on the hardware.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

from csvfast._core import sm3, sm3_blocks
from csvfast._files import final_target, temporary_beside
from csvfast.errors import SnapshotError

if TYPE_CHECKING:
    from csvfast.memory.encrypted import EncryptedMemory

__all__ = ["SnapshotInfo", "inspect", "restore", "save"]

_MAGIC = b"CSVFAST SNAPSHOT"
_VERSION = 1
_PREFIX = struct.Struct("<16sIIQ")
_TEXT_AT = 64
_TEXT_MAX = 8 << 20
_PAGE = 4096
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """Shape of the memory a snapshot was taken of.

    `generations` says for each ASID that had a key how many keys it had had: a guest's data can be read again only under the
    key of that generation.
    """

    size: int
    base_address: int
    standard: Literal["gb", "ieee"]
    tweak_model: Literal["xts", "line"]
    generations: dict[int, int] = field(default_factory=dict)


def _header(shape: SnapshotInfo) -> bytearray:
    """The header with its digest still zero."""
    text = json.dumps(asdict(shape), separators=(",", ":")).encode()
    header = bytearray(-(-(_TEXT_AT + len(text)) // _PAGE) * _PAGE)
    _PREFIX.pack_into(header, 0, _MAGIC, _VERSION, 0, len(text))
    header[_TEXT_AT : _TEXT_AT + len(text)] = text
    return header


def _start_digest(header: bytes | bytearray) -> sm3:
    digest = sm3(header[: _PREFIX.size])
    digest.update(header[_TEXT_AT:])
    return digest


def save(memory: EncryptedMemory, path: Path) -> SnapshotInfo:
    """See EncryptedMemory.save()."""
    shape = SnapshotInfo(
        size=memory.size,
        base_address=memory.base_address,
        standard=memory.standard,
        tweak_model=memory.tweak_model,
        generations={asid: memory.generation(asid) for asid in memory.asids()},
    )
    header = _header(shape)
    digest = _start_digest(header)
    path = final_target(path)
    if path.exists() and not path.is_file():
        raise SnapshotError(f"{path} is not a regular file; expected one, or a name that is free")
    temporary = temporary_beside(path)
    # Ciphertext, but of somebody's guest: for the owner alone.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream, memoryview(memory) as dram:
            stream.seek(len(header))
            for start in range(0, shape.size, _CHUNK):
                # A copy of our own: what is hashed is what is written, whatever other threads do.
                chunk = bytes(dram[start : start + _CHUNK])
                digest.update(sm3_blocks(chunk, _PAGE))
                stream.write(chunk)
            header[_PREFIX.size : _TEXT_AT] = digest.digest()
            stream.seek(0)
            stream.write(header)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)
    return shape


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shape_of(path: Path, text: bytes) -> SnapshotInfo:
    try:
        fields = json.loads(text)
        shape = SnapshotInfo(
            size=fields["size"],
            base_address=fields["base_address"],
            standard=fields["standard"],
            tweak_model=fields["tweak_model"],
            generations={int(asid): int(count) for asid, count in fields["generations"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise SnapshotError(f"{path}: the snapshot's header cannot be read ({type(problem).__name__})") from None
    numbers = (shape.size, shape.base_address)
    if (
        not all(type(number) is int and 0 <= number < 1 << 64 and number % _PAGE == 0 for number in numbers)
        or not shape.size
    ):
        raise SnapshotError(f"{path}: size and base address are {numbers}; expected multiples of {_PAGE}")
    if shape.standard not in ("gb", "ieee") or shape.tweak_model not in ("xts", "line"):
        raise SnapshotError(f"{path}: unknown standard {shape.standard!r} or tweak model {shape.tweak_model!r}")
    return shape


def _read_header(path: Path, stream: IO[bytes]) -> tuple[SnapshotInfo, bytes]:
    """The shape and the whole header; the stream then stands at the DRAM's first byte."""
    prefix = stream.read(_TEXT_AT)
    if len(prefix) < _TEXT_AT:
        raise SnapshotError(f"{path} has {len(prefix)} bytes; expected a snapshot")
    magic, version, reserved, length = _PREFIX.unpack_from(prefix)
    if magic != _MAGIC:
        raise SnapshotError(f"{path} is not a snapshot: it does not begin with {_MAGIC.decode()!r}")
    if version != _VERSION or reserved != 0:
        raise SnapshotError(f"{path} is a snapshot of version {version}; expected {_VERSION}")
    if length > _TEXT_MAX:
        raise SnapshotError(f"{path}: the header claims {length} bytes; expected at most {_TEXT_MAX}")
    rest = stream.read(-(-(_TEXT_AT + length) // _PAGE) * _PAGE - _TEXT_AT)
    shape = _shape_of(path, rest[:length])
    expected = _TEXT_AT + len(rest) + shape.size
    present = os.fstat(stream.fileno()).st_size
    if present != expected:
        raise SnapshotError(f"{path} has {present} bytes; expected {expected}")
    return shape, prefix + rest


def inspect(path: str | os.PathLike[str]) -> SnapshotInfo:
    """The shape a snapshot's header tells, without checking its pages. Raises: SnapshotError, OSError."""
    with Path(path).open("rb") as stream:
        return _read_header(Path(path), stream)[0]


def restore(memory: EncryptedMemory, path: Path) -> SnapshotInfo:
    """See EncryptedMemory.restore(). Needs memory of the snapshot's size besides the engine's."""
    with path.open("rb", buffering=0) as stream:
        shape, header = _read_header(path, cast("IO[bytes]", stream))
        for name in ("size", "base_address", "standard", "tweak_model"):
            if getattr(shape, name) != getattr(memory, name):
                raise SnapshotError(
                    f"{path} was taken of a memory with {name} {getattr(shape, name)!r}; this one has "
                    f"{getattr(memory, name)!r}"
                )
        digest = _start_digest(header)
        # Nothing may reach the DRAM before all of it is verified, so the content waits in memory of its own.
        with mmap.mmap(-1, shape.size) as content, memoryview(content) as window, memoryview(memory) as dram:
            place = 0
            while place < shape.size:
                count = stream.readinto(window[place : place + _CHUNK])
                if not count:
                    raise SnapshotError(f"{path} ended after {len(header) + place} bytes while it was read")
                place += count
            for start in range(0, shape.size, _CHUNK):
                digest.update(sm3_blocks(window[start : start + _CHUNK], _PAGE))
            if digest.digest() != header[_PREFIX.size : _TEXT_AT]:
                raise SnapshotError(f"{path} is damaged: its digest does not match its content")
            dram[:] = window
    return shape
