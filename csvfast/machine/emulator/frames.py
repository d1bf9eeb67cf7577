"""Which frame of the DRAM belongs to which process of the emulated machine; shared by all of its processes."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from csvfast import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Frames"]

_ENTRY = 4  # bytes: the owner's process number, 0 = free


class Frames:
    """Allocator of page frames in memory that every forked process shares, under a lock of the file behind it.

    In: count   frames of the DRAM
    Frames of a process that has ended are freed by whoever waits for it. One thread per process.
    """

    def __init__(self, count: int) -> None:
        self._descriptor = os.memfd_create("csvfast-frames", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, count * _ENTRY)
        self._map = mmap.mmap(self._descriptor, count * _ENTRY)
        self._owners = memoryview(self._map).cast("I")
        self._pool: list[int] = []
        self.count = count

    def take(self) -> int:
        """A free frame's number, counted from the DRAM's begin. Raises AllocationError when the DRAM is full."""
        if not self._pool:
            self._refill()
        return self._pool.pop()

    def give(self, frames: list[int]) -> None:
        """Takes frames back; this process uses them again before it asks for others."""
        self._pool.extend(frames)

    def forked(self) -> None:
        """To be called in a forked child first: the parent's spare frames are not the child's."""
        self._pool = []

    def release(self, process: int) -> None:
        """Frees whatever an ended process had."""
        with self._lock():
            for frame, owner in enumerate(self._owners):
                if owner == process:
                    self._owners[frame] = 0

    def used(self) -> int:
        """Frames that belong to some process."""
        return self.count - self._owners.tolist().count(0)

    def processes(self) -> set[int]:
        """Numbers of the processes that own memory."""
        return set(self._owners.tolist()) - {0}

    def close(self) -> None:
        """Gives the shared memory back to the system."""
        self._owners.release()
        self._map.close()
        os.close(self._descriptor)

    def _refill(self) -> None:
        own = os.getpid()
        with self._lock():
            owners = bytes(self._map)
            place = -1
            empty = bytes(_ENTRY)
            while len(self._pool) < 64:
                place = owners.find(empty, place + 1)
                if place < 0:
                    break
                if place % _ENTRY:
                    continue
                self._owners[place // _ENTRY] = own
                self._pool.append(place // _ENTRY)
                place += _ENTRY - 1
        if not self._pool:
            raise errors.AllocationError(f"the emulated machine's DRAM is full: {self.count * 4096} bytes")
        self._pool.reverse()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
