"""dm-verity with SM3, byte for byte what `veritysetup format --hash=sm3` and `veritysetup verify` do.

`format_verity` builds the hash area of a data file and writes it, with a superblock, to a hash file or behind the
data in the same file; without a target it only computes the root hash. `verify_verity` computes the tree again and
compares all of it. As in veritysetup, whole data blocks are covered and a partial block at the end of the file is not
(a device made from it does not show it either); the record says how many bytes that were.

Nothing half-written remains: a hash file appears by rename when it is complete, and an area appended to an existing
file is cut off again when writing it fails (an area made earlier that was being overwritten is then gone).
"""

from __future__ import annotations

import hmac
import os
import secrets
import shutil
import stat
import tempfile
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from csvfast._files import final_target, temporary_beside
from csvfast.measure.errors import ParameterError, SourceTruncatedError, SuperblockError, TargetError
from csvfast.measure.source import STDIN, AnyPath, Progress, Source
from csvfast.measure.superblock import SUPERBLOCK_BYTES, VerityParameters, pack_superblock, parse_superblock
from csvfast.measure.tree import DIGEST_BYTES, BlockHash, TreeBuilder, check_block_bytes, hash_tree

__all__ = ["VerityCheck", "VerityRecord", "format_verity", "read_superblock", "verify_verity"]

DEFAULT_SALT_BYTES = 32
SPOOL_MEMORY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class VerityRecord:
    """A formatted data file. `uncovered_bytes`: a partial block at the end (or what data_blocks left out)."""

    path: str
    root_hash: bytes
    parameters: VerityParameters
    uncovered_bytes: int
    hash_path: str | None
    hash_offset: int
    superblock: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in veritysetup's terms."""
        parameters = self.parameters
        return {
            "path": self.path,
            "root_hash": self.root_hash.hex(),
            "hash_algorithm": "sm3",
            "salt": parameters.salt.hex(),
            "uuid": str(parameters.uuid) if self.superblock else None,
            "hash_type": parameters.hash_type,
            "data_blocks": parameters.data_blocks,
            "data_block_size": parameters.data_block_bytes,
            "hash_blocks": sum(parameters.level_blocks),
            "hash_block_size": parameters.hash_block_bytes,
            "uncovered_bytes": self.uncovered_bytes,
            "hash_file": self.hash_path,
            "hash_offset": self.hash_offset,
            "bytes": parameters.data_bytes,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(parameters.data_bytes / self.seconds) if self.seconds else 0,
        }


@dataclass(frozen=True, slots=True)
class VerityCheck:
    """The outcome of `verify_verity`. `problems` is empty exactly when everything agrees."""

    path: str
    root_hash: bytes
    parameters: VerityParameters
    bad_data_blocks: int
    problems: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True when data, hash area and expected root hash agree."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON. `root_hash` is the one computed from the data."""
        return {
            "path": self.path,
            "ok": self.ok,
            "root_hash": self.root_hash.hex(),
            "problems": list(self.problems),
            "bad_data_blocks": self.bad_data_blocks,
            "data_blocks": self.parameters.data_blocks,
            "bytes": self.parameters.data_bytes,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(self.parameters.data_bytes / self.seconds) if self.seconds else 0,
        }


def format_verity(
    data: AnyPath,
    hash_file: AnyPath | None = None,
    *,
    salt: bytes | None = None,
    uuid: uuids.UUID | None = None,
    data_block_bytes: int = 4096,
    hash_block_bytes: int = 4096,
    data_blocks: int | None = None,
    hash_offset: int = 0,
    superblock: bool = True,
    hash_type: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerityRecord:
    """Builds the hash tree of a data file or device and, with hash_file, writes the hash area.

    Args: data: file, block device, pipe or "-". hash_file: target; replaced when it exists, except that when it is
        the data file itself the area goes behind the data at hash_offset. salt: 0 to 256 bytes, None = 32 random
        ones. uuid: None = a random one. data_blocks: None = all whole blocks (those before hash_offset, when
        hash_file is the data file). superblock: False leaves it out, and hash_offset must then be a multiple of the
        hash block size. hash_type: 1, or 0 for Chromium OS. threads, progress: as in `measure_image`.
    Raises: SourceError, EmptySourceError, ParameterError, TargetError.
    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    start = time.perf_counter()
    salt = secrets.token_bytes(DEFAULT_SALT_BYTES) if salt is None else bytes(memoryview(salt))
    block_hash = BlockHash(salt, hash_type)
    check_block_bytes("data block size", data_block_bytes)
    # All but the number of blocks is known; the smallest number makes every other parameter be checked before the work.
    parameters = VerityParameters(1, salt, data_block_bytes, hash_block_bytes, hash_type, uuid or uuids.uuid4())
    area_offset = parameters.area_offset(hash_offset, superblock)
    with ExitStack() as stack:
        source = stack.enter_context(Source(data))
        target = None
        if hash_file is not None:
            appended = source.same_file(hash_file)
            if appended and data_blocks is None:
                data_blocks = min(source.size or 0, hash_offset) // data_block_bytes
            if appended and (data_blocks or 0) * data_block_bytes > hash_offset:
                raise ParameterError(
                    f"hash offset is {hash_offset}; expected {(data_blocks or 0) * data_block_bytes} or more, "
                    f"behind the data blocks of the same file"
                )
            if appended:
                _refuse_overwriting(source, hash_offset)
            target = _Target(hash_file, in_place=appended)
        spool = stack.enter_context(_LevelSpool(target.directory)) if target is not None else None
        builder = TreeBuilder(block_hash, hash_block_bytes, spool)
        root, count, _ = hash_tree(
            source,
            builder,
            block_hash,
            data_block_bytes,
            blocks=data_blocks,
            threads=threads,
            progress=progress,
        )
        source.check_unchanged()
        parameters = parameters.replace_blocks(count)
        uncovered = 0 if source.size is None else source.size - parameters.data_bytes
        if target is not None and spool is not None:
            with target.open() as file:
                if superblock:
                    file.seek(hash_offset)
                    file.write(pack_superblock(parameters))
                file.seek(area_offset)
                spool.copy_to(file)
                _fill_last_block(file, parameters, hash_offset, superblock)
    hash_path = None if hash_file is None else os.fspath(hash_file)
    seconds = time.perf_counter() - start
    return VerityRecord(source.path, root, parameters, uncovered, hash_path, hash_offset, superblock, seconds)


def read_superblock(hash_file: AnyPath, hash_offset: int = 0) -> VerityParameters:
    """The parameters in the superblock of a hash file.

    Raises: SourceError, SuperblockError.
    Thread-safety: safe from any thread.
    """
    with Source(hash_file) as source:
        return _superblock_of(source, hash_offset)


def verify_verity(
    data: AnyPath,
    hash_file: AnyPath,
    root_hash: bytes,
    *,
    hash_offset: int = 0,
    parameters: VerityParameters | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerityCheck:
    """Checks a whole data file against its hash area and a trusted root hash.

    Args: parameters: None = read them from the superblock; give them for an area without one. root_hash: 32 bytes
        from a place you trust; nothing in the hash file can stand in for it.
    Returns: a `VerityCheck`; disagreement is its content, not an exception.
    Raises: SourceError, SuperblockError, ParameterError (root_hash is not 32 bytes).
    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    root_hash = bytes(memoryview(root_hash))  # a text would be found out only after all the work
    if len(root_hash) != DIGEST_BYTES:
        raise ParameterError(f"root hash has {len(root_hash)} bytes; expected {DIGEST_BYTES}")
    start = time.perf_counter()
    with Source(data) as source, Source(hash_file) as area:
        if not area.seekable:
            raise ParameterError(f"{area.path}: is a stream; expected a file or device that holds a hash area")
        superblock = parameters is None
        if parameters is None:
            parameters = _superblock_of(area, hash_offset)
        area_offset = parameters.area_offset(hash_offset, superblock)
        end = parameters.area_end(area_offset)
        assert area.size is not None
        if parameters.level_blocks and area.size < end:
            raise SourceTruncatedError(f"{area.path}: has {area.size} bytes; expected {end} for the hash area")
        if source.size is not None and source.size < parameters.data_bytes:
            raise SourceTruncatedError(
                f"{source.path}: has {source.size} bytes; expected {parameters.data_bytes} for its data blocks"
            )
        comparison = _AreaComparison(area, parameters, area_offset)
        block_hash = BlockHash(parameters.salt, parameters.hash_type)
        builder = TreeBuilder(block_hash, parameters.hash_block_bytes, comparison)
        computed, _, _ = hash_tree(
            source,
            builder,
            block_hash,
            parameters.data_block_bytes,
            blocks=parameters.data_blocks,
            threads=threads,
            progress=progress,
        )
        source.check_unchanged()
        area.check_unchanged()
    problems = comparison.problems()
    if not hmac.compare_digest(computed, root_hash):
        problems.append(f"the root hash is {computed.hex()}; expected {root_hash.hex()}")
    seconds = time.perf_counter() - start
    return VerityCheck(source.path, computed, parameters, comparison.bad_data_blocks, tuple(problems), seconds)


def _superblock_of(source: Source, hash_offset: int) -> VerityParameters:
    if source.size is None or hash_offset < 0 or source.size < hash_offset + SUPERBLOCK_BYTES:
        raise SuperblockError(
            f"{source.path}: has no room for a superblock of {SUPERBLOCK_BYTES} bytes at offset {hash_offset}"
        )
    data = bytearray(SUPERBLOCK_BYTES)
    with memoryview(data) as view:
        source.read_at(view, hash_offset)
    try:
        return parse_superblock(bytes(data))
    except SuperblockError as error:
        raise SuperblockError(f"{source.path}: {error}") from error


def _refuse_overwriting(source: Source, hash_offset: int) -> None:
    """Behind the data of a file there may be nothing, or a hash area made earlier."""
    if source.size is None or source.size <= hash_offset:
        return
    try:
        _superblock_of(source, hash_offset)
    except SuperblockError as error:
        raise ParameterError(
            f"{source.path}: has {source.size} bytes; expected no more than the hash offset {hash_offset}, "
            f"or an earlier dm-verity superblock there"
        ) from error


def _fill_last_block(file: IO[bytes], parameters: VerityParameters, hash_offset: int, superblock: bool) -> None:
    """A single data block has no hash blocks; veritysetup then writes the superblock with the rest of its device
    block."""
    if superblock and not parameters.level_blocks:
        step = min(parameters.hash_block_bytes, 4096)
        end = file.seek(0, os.SEEK_END)
        if end == hash_offset + SUPERBLOCK_BYTES:
            file.write(bytes(-end % step))


class _LevelSpool:
    """Keeps hash blocks until the size of every level, and with it the place of each, is known. Small levels stay in
    memory, large ones in unnamed temporary files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> _LevelSpool:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def write(self, level: int, blocks: bytes | bytearray) -> None:
        while level >= len(self._files):
            self._files.append(tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES, dir=str(self._directory)))  # noqa: SIM115
        try:
            self._files[level].write(blocks)
        except OSError as error:
            raise TargetError(f"temporary hash blocks cannot be written: {error.strerror or error}") from error

    def copy_to(self, file: IO[bytes]) -> None:
        for level in reversed(self._files):
            level.seek(0)
            shutil.copyfileobj(level, file, 1 << 20)


class _AreaComparison:
    """A sink that compares computed hash blocks with the ones in a file."""

    def __init__(self, area: Source, parameters: VerityParameters, area_offset: int) -> None:
        self._area = area
        self._positions = parameters.level_offsets(area_offset)
        self._block_bytes = parameters.hash_block_bytes
        self._data_block_bytes = parameters.data_block_bytes
        self._data_blocks = parameters.data_blocks
        self._entries = 0
        self._first_bad_data: int | None = None
        self._first_bad_hash: int | None = None
        self.bad_data_blocks = 0

    def write(self, level: int, blocks: bytes | bytearray) -> None:
        there = bytearray(len(blocks))
        position = self._positions[level]
        with memoryview(there) as view:
            self._area.read_at(view, position)
        self._positions[level] += len(blocks)
        entries = self._entries
        if level == 0:
            self._entries += len(blocks) // DIGEST_BYTES
        if there == blocks:
            return
        for start in range(0, len(blocks), DIGEST_BYTES):
            if there[start : start + DIGEST_BYTES] == blocks[start : start + DIGEST_BYTES]:
                continue
            index = entries + start // DIGEST_BYTES
            if level == 0 and index < self._data_blocks:
                self.bad_data_blocks += 1
                if self._first_bad_data is None:
                    self._first_bad_data = index
            elif self._first_bad_hash is None:
                self._first_bad_hash = (position + start) // self._block_bytes * self._block_bytes

    def problems(self) -> list[str]:
        found = []
        if self._first_bad_data is not None:
            found.append(
                f"{self.bad_data_blocks} of {self._data_blocks} data blocks do not match their hashes, "
                f"the first is block {self._first_bad_data} at byte {self._first_bad_data * self._data_block_bytes}"
            )
        elif self._first_bad_hash is not None:  # (wrong data makes every hash block above it wrong too)
            found.append(
                f"the hash block at byte {self._first_bad_hash} of the hash area's file does not match the data"
            )
        return found


class _Target:
    """The file a hash area goes to; checked before the work, written after it."""

    def __init__(self, path: AnyPath, *, in_place: bool) -> None:
        if os.fspath(path) == STDIN:
            raise ParameterError("hash file is '-'; expected a path, a hash area is not written to a stream")
        self._path = Path(path)
        self._in_place = in_place
        try:
            self._path = final_target(self._path)
            mode = self._path.stat().st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        except OSError as error:
            raise self._error(error) from error
        except ValueError as error:
            raise ParameterError(f"hash file {os.fspath(path)!r} cannot be a path: {error}") from error
        self.directory = self._path.parent
        if stat.S_ISBLK(mode):
            self._in_place = True
        elif not stat.S_ISREG(mode):
            raise TargetError(f"{self._path}: is not a regular file or block device; no hash area can be written to it")
        writable = self._path if self._in_place else self.directory
        if not os.access(writable, os.W_OK):
            raise TargetError(f"{self._path}: cannot be written: no permission, or no such directory")

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """A file to write the area into; complete and on disk when the block ends, untouched when it raises."""
        try:
            with self._existing() if self._in_place else self._replacement() as file:
                yield file
        except OSError as error:
            if isinstance(error, TargetError):
                raise
            raise self._error(error) from error

    @contextmanager
    def _existing(self) -> Iterator[IO[bytes]]:
        file = self._path.open("r+b")
        before = os.fstat(file.fileno())
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
        except BaseException:
            with suppress(OSError):
                file.close()
            if stat.S_ISREG(before.st_mode):
                os.truncate(self._path, before.st_size)
            raise

    @contextmanager
    def _replacement(self) -> Iterator[IO[bytes]]:
        temporary = temporary_beside(self._path)
        with temporary.open("xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                with suppress(FileNotFoundError):
                    temporary.chmod(stat.S_IMODE(self._path.stat().st_mode))
                temporary.replace(self._path)
            except BaseException:
                with suppress(FileNotFoundError):
                    temporary.unlink()
                raise

    def _error(self, error: OSError) -> TargetError:
        return TargetError(f"{self._path}: the hash area cannot be written: {error.strerror or error}")
