"""Merkle trees over fixed-size blocks, in the layout of dm-verity: streaming, in bounded memory.

The leaves are the SM3 digests of the data blocks. A hash block holds hash_block_bytes / 32 digests one after the other,
zero padded; the digests of one level's hash blocks are the entries of the level above, until one digest remains: the
root. A single data block has no hash block at all; its digest is the root.

Source: Linux Documentation/admin-guide/device-mapper/verity.rst and cryptsetup lib/verity/verity_hash.c (layout only).
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from csvfast import _core
from csvfast.measure.errors import EmptySourceError, ParameterError
from csvfast.measure.source import Progress, Source, default_threads

__all__ = ["DIGEST_BYTES", "BlockHash", "LevelSink", "TreeBuilder", "hash_tree"]

DIGEST_BYTES = 32
SALT_MAX_BYTES = 256
BLOCK_MIN_BYTES = 512
BLOCK_MAX_BYTES = 512 << 10

# A worker reads and hashes in steps that stay in its level-2 cache, and hands back one task's worth of leaves.
STEP_BYTES = 512 << 10
TASK_BYTES = 8 << 20
BATCH_BYTES = 128 << 10


class LevelSink(Protocol):
    """Receives every hash block of a tree, level by level in order; level 0 holds the digests of the data blocks."""

    def write(self, level: int, blocks: bytes | bytearray) -> None:
        """Takes the next whole hash blocks of a level."""


@dataclass(frozen=True, slots=True)
class BlockHash:
    """How a block becomes a digest.

    Args: salt: 0 to 256 bytes. hash_type: 1 = SM3(salt ‖ block) as dm-verity has it today, 0 = SM3(block ‖ salt) as
    in the original Chromium OS format.
    Thread-safety: safe from any thread.
    """

    salt: bytes = b""
    hash_type: int = 1

    def __post_init__(self) -> None:
        if len(self.salt) > SALT_MAX_BYTES:
            raise ParameterError(f"salt has {len(self.salt)} bytes; expected at most {SALT_MAX_BYTES}")
        if self.hash_type not in (0, 1):
            raise ParameterError(f"hash type is {self.hash_type}; expected 0 or 1")

    def digests(self, data: memoryview | bytes | bytearray, block_bytes: int) -> bytes:
        """One digest after the other for the blocks of data, whose length is a multiple of block_bytes."""
        if self.hash_type == 1 or not self.salt:
            return _core.sm3_blocks(data, block_bytes, prefix=self.salt)
        with memoryview(data) as view:
            salted = b"".join(
                part
                for start in range(0, len(view), block_bytes)
                for part in (view[start : start + block_bytes], self.salt)
            )
        return _core.sm3_blocks(salted, block_bytes + len(self.salt))


class TreeBuilder:
    """Turns leaf digests, given in order, into a root; hands hash blocks to a sink as they fill.

    Memory: at most BATCH_BYTES of hash blocks per level, or one, beyond what one `add` brings: they are hashed side by side.
    Thread-safety: one thread.
    """

    def __init__(self, block_hash: BlockHash, hash_block_bytes: int, sink: LevelSink | None = None) -> None:
        check_block_bytes("hash block size", hash_block_bytes)
        self._hash = block_hash
        self._block_bytes = hash_block_bytes
        self._sink = sink
        self._pending: list[bytearray] = []
        self._counts: list[int] = []

    def add(self, digests: bytes, level: int = 0) -> None:
        """Appends whole digests to a level."""
        if level == len(self._pending):
            self._pending.append(bytearray())
            self._counts.append(0)
        pending = self._pending[level]
        pending += digests
        self._counts[level] += len(digests) // DIGEST_BYTES
        ready = len(pending) // self._block_bytes * self._block_bytes
        if ready >= BATCH_BYTES:
            blocks = bytes(pending[:ready])
            del pending[:ready]
            self._emit(level, blocks)

    def add_blocks(self, digests: bytes, level: int) -> None:
        """Appends digests of whole hash blocks of the level below, level - 1, which were hashed elsewhere; a sink misses those.

        What that level holds so far must be whole blocks, too.
        """
        self.add(b"", level - 1)
        below = self._pending[level - 1]
        if len(below) % self._block_bytes:
            raise ParameterError(f"level {level - 1} ends within a hash block; expected whole ones before others are added")
        if below:
            self._emit(level - 1, bytes(below))
            below.clear()
        self._counts[level - 1] += len(digests) // DIGEST_BYTES * (self._block_bytes // DIGEST_BYTES)
        self.add(digests, level)

    def finish(self) -> bytes:
        """Pads and closes every level. Returns the root digest. The builder is used up."""
        if not self._counts:
            raise EmptySourceError("there are no data blocks; a tree needs at least one")
        level = 0
        while self._counts[level] > 1:
            pending = self._pending[level]
            if pending:
                self._emit(level, bytes(pending).ljust(-(-len(pending) // self._block_bytes) * self._block_bytes, b"\0"))
            level += 1
        return bytes(self._pending[level])

    def _emit(self, level: int, blocks: bytes) -> None:
        if self._sink is not None:
            self._sink.write(level, blocks)
        self.add(self._hash.digests(blocks, self._block_bytes), level + 1)


def hash_tree(
    source: Source,
    builder: TreeBuilder,
    block_hash: BlockHash,
    block_bytes: int,
    *,
    blocks: int | None = None,
    pad: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[bytes, int, int]:
    """Hashes a source into a builder.

    Args: blocks: how many data blocks to cover, None = all of the source. pad: zero pad a last partial block instead
        of leaving it out. threads: workers that read and hash ranges of a seekable source in parallel, None = one per
        processor.
    Returns: (root, number of data blocks, bytes of the source that were read).
    Raises: EmptySourceError, ParameterError, SourceError.
    """
    check_block_bytes("data block size", block_bytes)
    workers = default_threads() if threads is None else threads
    if workers < 1:
        raise ParameterError(f"threads is {workers}; expected 1 or more")
    if blocks is not None and blocks < 1:
        raise ParameterError(f"data blocks is {blocks}; expected 1 or more")
    if source.size is None or source.access == "mmap":
        runs = _stream_runs(source, block_hash, block_bytes, blocks, pad)
    else:
        runs = _range_runs(source, block_hash, block_bytes, blocks, pad, workers)
    total = source.size if blocks is None else blocks * block_bytes
    done = count = 0
    for digests, length in runs:
        builder.add(digests)
        count += len(digests) // DIGEST_BYTES
        done += length
        if progress is not None:
            progress(done, total)
    if count == 0:
        raise EmptySourceError(f"{source.path}: holds no whole block of {block_bytes} bytes; a tree needs at least one")
    if blocks is not None and count != blocks:
        raise EmptySourceError(
            f"{source.path}: holds {count} blocks of {block_bytes} bytes; expected at least {blocks}"
        )
    return builder.finish(), count, done


def check_block_bytes(name: str, value: int) -> None:
    """Refuses a block size veritysetup would refuse."""
    if not BLOCK_MIN_BYTES <= value <= BLOCK_MAX_BYTES or value & (value - 1):
        raise ParameterError(f"{name} is {value}; expected a power of two from {BLOCK_MIN_BYTES} to {BLOCK_MAX_BYTES}")


def _range_runs(
    source: Source, block_hash: BlockHash, block_bytes: int, blocks: int | None, pad: bool, workers: int
) -> Iterator[tuple[bytes, int]]:
    """Leaves of a seekable source: each worker reads a range into its own small buffer and hashes it while it is in
    cache."""
    assert source.size is not None
    whole = source.size // block_bytes if blocks is None else blocks
    tail = source.size - whole * block_bytes if pad and blocks is None else 0
    if whole * block_bytes > source.size:
        raise EmptySourceError(
            f"{source.path}: holds {source.size // block_bytes} blocks of {block_bytes} bytes; "
            f"expected at least {blocks}"
        )
    end = whole * block_bytes
    buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    workers = max(1, min(workers, -(-end // TASK_BYTES)))
    for _ in range(workers):
        buffers.put(bytearray(min(STEP_BYTES, max(end, 1))))

    def run(start: int) -> tuple[bytes, int]:
        stop = min(start + TASK_BYTES, end)
        buffer = buffers.get()
        try:
            parts = []
            with memoryview(buffer) as view:
                for offset in range(start, stop, STEP_BYTES):
                    with view[: min(STEP_BYTES, stop - offset)] as piece:
                        source.read_at(piece, offset)
                        parts.append(block_hash.digests(piece, block_bytes))
            return b"".join(parts), stop - start
        finally:
            buffers.put(buffer)

    starts = range(0, end, TASK_BYTES)
    if workers == 1:
        yield from map(run, starts)
    else:
        yield from _in_order(run, starts, workers)
    if tail:
        last = bytearray(block_bytes)
        with memoryview(last)[:tail] as piece:
            source.read_at(piece, end)
        yield block_hash.digests(last, block_bytes), tail


class _Run(Protocol):
    def __call__(self, start: int, /) -> tuple[bytes, int]: ...


def _in_order(run: _Run, starts: range, workers: int) -> Iterator[tuple[bytes, int]]:
    waiting: deque[Future[tuple[bytes, int]]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="csvfast-tree")
    try:
        for start in starts:
            # A bounded window: results are 1/128 of the data, and an early error stops the rest.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
            waiting.append(executor.submit(run, start))
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _stream_runs(
    source: Source, block_hash: BlockHash, block_bytes: int, blocks: int | None, pad: bool
) -> Iterator[tuple[bytes, int]]:
    """Leaves of a pipe or of a mapping, one chunk after the other."""
    left = None if blocks is None else blocks * block_bytes
    for chunk in source.chunks(max(STEP_BYTES, block_bytes)):
        take = len(chunk) if left is None else min(len(chunk), left)
        whole = take // block_bytes * block_bytes
        if whole:
            yield block_hash.digests(chunk[:whole], block_bytes), whole
        if pad and left is None and whole != take:
            last = bytes(chunk[whole:]).ljust(block_bytes, b"\0")
            yield block_hash.digests(last, block_bytes), take - whole
        if left is not None:
            left -= whole
            if left == 0:
                return
