"""EncryptedMemory: DRAM that holds ciphertext, and guests that see plaintext through their ASID's key."""

from __future__ import annotations

import operator
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from csvfast import _core, errors
from csvfast.memory import snapshot

if TYPE_CHECKING:
    from types import TracebackType

    import numpy
    from numpy.typing import NDArray

    from csvfast._core import BytesLike

__all__ = ["EncryptedMemory"]

_FILE_MAX = 1 << 62  # the sum of two such numbers still fits the system's file offsets


class EncryptedMemory(_core.Engine):
    """DRAM encrypted with SM4-XTS under one 32-byte key per ASID.

    The data unit is the 4096-byte page and its number the page frame number (address // 4096). ASID 0 is the host: it
    reads and writes the DRAM as it is. Reading under another ASID's key gives noise, never an error, as on the hardware.

        with EncryptedMemory(1 << 30) as memory:
            memory.install(1)                      # a random key nobody learns
            memory.write(0x1234, b"data", asid=1)
            memory.read(0x1234, 4, asid=1)         # b"data"
            memory.raw[0x1234:0x1238]              # what the host sees

    Args:
        size: bytes of DRAM, a multiple of 4096. May be left out when `buffer` or an existing `path` gives it.
        standard: "gb" (GB/T 17964-2021) or "ieee" (IEEE 1619-2018).
        tweak_model: "xts", or "line" for one tweak per 64-byte line: the leak published for real parts.
        base_address: system physical address of the first byte, a multiple of 4096.
        asid_max: highest ASID, 1 .. 65535.
        threads: threads of bulk calls, the caller counted.
        buffer: writable, C-contiguous memory of the caller's to stand on, on a 64-byte boundary; kept until close().
        path: file to stand on (shared mapping). Made with `size` bytes if missing; an existing file must be long enough.
        file_offset: where in the file the memory begins, a multiple of 4096.

    Raises: LengthError, AlignmentError, AddressError, AsidError, ArgumentError, ReadOnlyBufferError,
        NonContiguousBufferError, AllocationError, SystemCallError, OSError.

    Thread-safety: any number of threads may use one memory at once; accesses to different bytes never disturb each other.
    close() is refused while calls run or views exist. Not for use in a forked child when `threads` > 1.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        standard: Literal["gb", "ieee"] = "gb",
        tweak_model: Literal["xts", "line"] = "xts",
        base_address: int = 0,
        asid_max: int = 509,
        threads: int = 1,
        buffer: BytesLike | None = None,
        path: str | os.PathLike[str] | None = None,
        file_offset: int = 0,
    ) -> None:
        options: dict[str, Any] = {
            "standard": standard,
            "tweak_model": tweak_model,
            "base_address": base_address,
            "asid_max": asid_max,
            "threads": threads,
        }
        if path is not None:
            if buffer is not None:
                raise errors.ArgumentError("the memory can stand on a buffer or on a file, not on both")
            self._init_on_file(size, Path(path), file_offset, options)
            return
        if file_offset:
            raise errors.ArgumentError(f"file_offset is {file_offset}, but no path is given")
        if size is None:
            if buffer is None:
                raise errors.ArgumentError("size is missing; only buffer= or path= can stand in for it")
            try:
                size = memoryview(cast("Any", buffer)).nbytes
            except (TypeError, ValueError, BufferError) as problem:
                raise errors.BufferTypeError(
                    f"buffer must be a bytes-like object, not {type(buffer).__name__} ({problem})"
                ) from None
        super().__init__(size, buffer=buffer, **options)

    def _init_on_file(self, size: int | None, path: Path, offset: int, options: dict[str, Any]) -> None:
        size = None if size is None else operator.index(size)
        offset = operator.index(offset)
        for name, number in (("size", size), ("file_offset", offset)):
            if number is not None and not 0 <= number < _FILE_MAX:
                shown = f"{number}" if number.bit_length() <= 256 else f"of {number.bit_length()} bits"
                raise errors.LengthError(f"{name} is {shown}; expected 0 .. {_FILE_MAX - 1}")
        flags = os.O_RDWR | os.O_CLOEXEC
        made = False
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            if size is None:
                raise
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            made = True
        try:
            if made:
                if not size:
                    raise errors.LengthError(f"size is {size}; expected a positive multiple of 4096")
                # Real blocks, not a hole: a full disk must show here, not as SIGBUS in the middle of a write.
                try:
                    os.posix_fallocate(descriptor, 0, offset + size)
                except OSError as error:
                    free = os.fstatvfs(descriptor)
                    room = f"{offset + size} bytes are needed, {free.f_bavail * free.f_frsize} are free"
                    raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: {room}", os.fspath(path)) from None
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise errors.ArgumentError(f"{path} is not a regular file")
            if size is None:
                size = status.st_size - offset
            if size <= 0 or status.st_size < offset + size:
                raise errors.LengthError(
                    f"{path} has {status.st_size} bytes; expected at least {offset + max(size, 4096)}: "
                    f"the memory's size and file_offset {offset}"
                )
            super().__init__(size, fd=descriptor, file_offset=offset, **options)
        except BaseException:
            if made:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    @property
    def raw(self) -> NDArray[numpy.uint8]:
        """The DRAM as the host sees it: a NumPy uint8 view, index 0 being base_address. Writable, as a host's DRAM is.

        A view keeps the memory alive and keeps close() from working until it is gone.
        """
        import numpy as np  # on first use: importing csvfast must stay quick

        return np.asarray(memoryview(self))

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.size // 4096

    def save(self, path: str | os.PathLike[str]) -> snapshot.SnapshotInfo:
        """Writes a snapshot: the DRAM's ciphertext and the memory's shape, never a key. Replaces `path` atomically.

        Raises: OSError; nothing is left behind then. Other threads should not write meanwhile: a snapshot holds each page as
        it was when its turn came.
        """
        return snapshot.save(self, Path(path))

    def restore(self, path: str | os.PathLike[str]) -> snapshot.SnapshotInfo:
        """Puts a snapshot's ciphertext back. The snapshot is verified in full before the first byte is changed.

        Keys stay as they are: a guest reads its data again only under the key it had.

        Raises: SnapshotError (damaged, or of another shape), OSError.
        """
        return snapshot.restore(self, Path(path))

    @classmethod
    def from_snapshot(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """A new memory of a snapshot's shape with its ciphertext; `options` are those of the constructor besides."""
        shape = snapshot.inspect(path)
        memory = cls(
            shape.size,
            standard=shape.standard,
            tweak_model=shape.tweak_model,
            base_address=shape.base_address,
            **options,
        )
        try:
            memory.restore(path)
        except BaseException:
            memory.close()
            raise
        return memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if problem is not None and not self.closed:
            # The traceback of what went wrong may hold views. Do not hide it behind a refusal: take the keys away now; the
            # memory itself goes with its last view.
            try:
                self.close()
            except errors.MemoryInUseError:
                for asid in self.asids():
                    self.remove(asid)
            return
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<EncryptedMemory closed>"
        return (
            f"<EncryptedMemory {self.size} bytes at {self.base_address:#x}, standard={self.standard!r}, "
            f"tweak_model={self.tweak_model!r}, {self.stats()['asids_active']} ASIDs with a key>"
        )
