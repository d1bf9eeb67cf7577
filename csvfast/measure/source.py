"""Where measured bytes come from: files, block devices, pipes and standard input, in bounded memory.

A `Source` hands out a file's bytes in order (`chunks`) with a reader thread running ahead into a few reused buffers,
or by position (`read_at`) for callers that hash ranges in parallel. It notices when the file is not the same at the
end as it was at the start. Plain reads are the default: their memory is the buffers and nothing else, and a file that
shrinks is an error instead of a SIGBUS. With access="mmap" the file is mapped window by window (no copy, no reader
thread); use that only for files nobody truncates meanwhile.

A change is seen by size, mtime, ctime and inode, so with the clock of the file system: a write within the same tick
(about 4 ms on Linux) as the opening of the file, or through a mapping whose pages are already dirty, can escape.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import queue
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from csvfast.measure.errors import (
    ParameterError,
    SourceChangedError,
    SourceError,
    SourceKindError,
    SourceNotFoundError,
    SourceTruncatedError,
    SourceUnreadableError,
)

__all__ = ["CHUNK_BYTES", "STDIN", "Access", "AnyPath", "Progress", "Source", "default_threads", "total_size"]

AnyPath = str | os.PathLike[str]
Access = Literal["read", "mmap"]
Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all, or None when that is unknown), often, from the calling thread."""

STDIN = "-"
CHUNK_BYTES = 1 << 20
READ_AHEAD_BUFFERS = 4
MAP_WINDOW_BYTES = 8 << 20
STREAM_POLL_MILLISECONDS = 100

_Fill = Callable[[memoryview, int, threading.Event], int]
_Identity = tuple[int, int, int, int, int]


class Source:
    """One open thing to measure. Use as a context manager.

    Args: path: a file, block device or pipe, or "-" for standard input. access: "read" or "mmap" (regular files only).
        streams: False refuses what has no size (pipes, terminals, /dev/zero) without waiting for it.
    Attributes: path: as shown to people. access: as given. size: bytes, or None for a stream. status: of the file as it was
        opened.
    Raises: SourceNotFoundError, SourceUnreadableError, SourceKindError.
    Thread-safety: `read_at` may be called from many threads at once; everything else from one.
    """

    path: str
    access: Access
    size: int | None

    def __init__(self, path: AnyPath, *, access: Access = "read", streams: bool = True) -> None:
        if access not in ("read", "mmap"):
            raise ParameterError(f"access is {access!r}; expected 'read' or 'mmap'")
        self.path = os.fspath(path)
        self.access = access
        self._is_stdin = self.path == STDIN
        self._fd = _open(self.path, 0 if streams else os.O_NONBLOCK)
        try:
            self._before = os.fstat(self._fd)
            self.size = self._find_size()
            if self.size is None and not streams:
                raise SourceKindError(f"{self.path}: has no end that is known; expected a file or a block device")
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the descriptor; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def seekable(self) -> bool:
        """True when `read_at` works and `size` is known."""
        return self.size is not None

    @property
    def status(self) -> os.stat_result:
        """Of the file as it was opened."""
        return self._before

    def map(self, offset: int, length: int) -> mmap.mmap:
        """A part of a regular file, mapped and faulted in. offset: a multiple of the page size.

        A file that is truncated while the mapping is used ends the process with SIGBUS.
        Raises: SourceTruncatedError, SourceUnreadableError.
        """
        if os.fstat(self._fd).st_size < offset + length and stat.S_ISREG(self._before.st_mode):
            raise SourceTruncatedError(
                f"{self.path}: is shorter than its {self.size} bytes: it shrank while it was measured"
            )
        try:
            return mmap.mmap(
                self._fd, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ, offset=offset
            )
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def will_need(self, offset: int, length: int) -> None:
        """Lets the kernel begin to read a part of the file."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def same_file(self, path: AnyPath) -> bool:
        """True when path names the file this source reads."""
        try:
            other = Path(path).stat()
        except (OSError, ValueError):
            return False
        return (other.st_dev, other.st_ino) == (self._before.st_dev, self._before.st_ino)

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fills the whole buffer from a byte offset.

        Raises: SourceTruncatedError when the file ends first, SourceUnreadableError.
        """
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if count == 0:
                raise SourceTruncatedError(
                    f"{self.path}: ends at byte {offset + done}, expected {self.size} bytes: "
                    f"it shrank while it was measured"
                )
            done += count

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes in order, in pieces of chunk_bytes except the last. A piece is valid until the next one is asked
        for.

        Does not call `check_unchanged`; do so after the last piece.
        """
        if self.size is None:
            yield from _read_ahead(self._fill_from_stream, chunk_bytes)
            return
        if self.access == "mmap":
            yield from self._mapped_windows(chunk_bytes)
            return
        if self.size <= chunk_bytes:
            with memoryview(bytearray(self.size)) as view:
                self.read_at(view, 0)
                if self.size:
                    yield view
            return
        yield from _read_ahead(self._fill_at, chunk_bytes)

    def check_unchanged(self) -> None:
        """Compares the file with what it was when opened. Streams always pass.

        Raises: SourceNotFoundError (it vanished), SourceChangedError (which attribute changed and from what to what).
        """
        if self.size is None:
            return
        if not self._is_stdin:
            self._check_path()
        after = os.fstat(self._fd)
        if self._find_size() != self.size:
            raise SourceChangedError(
                f"{self.path}: changed while it was measured: size was {self.size}, is {after.st_size}"
            )
        if stat.S_ISBLK(after.st_mode):
            return
        if self._read_some(memoryview(bytearray(1)), self.size) != 0:
            raise SourceChangedError(f"{self.path}: holds more than the {self.size} bytes it says it has")
        for name, was, now in zip(
            ("device", "inode", "size", "mtime_ns", "ctime_ns"), _identity(self._before), _identity(after), strict=True
        ):
            if was != now:
                raise SourceChangedError(f"{self.path}: changed while it was measured: {name} was {was}, is {now}")

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _check_path(self) -> None:
        try:
            there = Path(self.path).stat()
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{self.path}: vanished while it was measured") from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if (there.st_dev, there.st_ino) != (self._before.st_dev, self._before.st_ino):
            raise SourceChangedError(f"{self.path}: was replaced by another file while it was measured")

    def _find_size(self) -> int | None:
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISDIR(mode):
            raise SourceKindError(f"{self.path}: is a directory; expected a file, a block device, a pipe or '-'")
        if stat.S_ISSOCK(mode):
            raise SourceKindError(f"{self.path}: is a socket; expected a file, a block device, a pipe or '-'")
        if stat.S_ISREG(mode):
            if self._is_stdin and os.lseek(self._fd, 0, os.SEEK_CUR) != 0:
                return None  # somebody read the beginning already: what is left is a stream
            return os.fstat(self._fd).st_size
        if stat.S_ISBLK(mode):
            return os.lseek(self._fd, 0, os.SEEK_END)
        return None

    def _fill_at(self, buffer: memoryview, offset: int, _stop: threading.Event) -> int:
        assert self.size is not None
        count = min(len(buffer), self.size - offset)
        self.read_at(buffer[:count], offset)
        return count

    def _fill_from_stream(self, buffer: memoryview, _offset: int, stop: threading.Event) -> int:
        # Polled, so that a reader of a silent pipe can be told to stop.
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        done = 0
        while done < len(buffer) and not stop.is_set():
            try:
                if not poll.poll(STREAM_POLL_MILLISECONDS):
                    continue
                count = os.readv(self._fd, [buffer[done:]])
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if count == 0:
                break
            done += count
        return done

    def _mapped_windows(self, chunk_bytes: int) -> Iterator[memoryview]:
        assert self.size is not None
        step = math.lcm(chunk_bytes, mmap.ALLOCATIONGRANULARITY)
        window = max(MAP_WINDOW_BYTES // step, 1) * step
        for offset in range(0, self.size, window):
            count = min(window, self.size - offset)
            with self.map(offset, count) as mapping, memoryview(mapping) as view:
                for start in range(0, count, chunk_bytes):
                    with view[start : start + chunk_bytes] as piece:
                        yield piece


def default_threads() -> int:
    """The processors this process may run on, at most 16."""
    return min(len(os.sched_getaffinity(0)), 16)


def total_size(paths: Iterable[AnyPath]) -> int | None:
    """Bytes of several files together, for a progress bar; None when one of them is no regular file. Opens nothing: a
    pipe's writer would notice."""
    total = 0
    for path in paths:
        try:
            status = os.fstat(0) if path == STDIN else Path(path).stat()
        except (OSError, ValueError):  # opening it will say what is wrong
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        total += status.st_size
    return total


def _open(path: str, flags: int) -> int:
    if path == STDIN and sys.__stdin__ is None:  # closed when the program began: number 0 may be any file opened since
        raise SourceUnreadableError("-: cannot be read: standard input is closed")
    try:
        if path == STDIN:
            return os.dup(0)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | flags)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise SourceKindError(f"{path}: is a socket or a device without a driver; expected a file") from error
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ParameterError(f"path {path!r} cannot be a path: {error}") from error
    # Doubles the kernel's own read-ahead; refused for pipes, which need none.
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _unreadable(path: str, error: OSError) -> SourceError:
    return SourceUnreadableError(f"{path}: cannot be read: {error.strerror or error}")


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read_ahead(fill: _Fill, chunk_bytes: int) -> Iterator[memoryview]:
    """Runs `fill` in a thread over a ring of buffers and yields what it filled, in order."""
    free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
    full: queue.SimpleQueue[tuple[bytearray, int] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def read() -> None:
        offset = 0
        try:
            while (buffer := free.get()) is not None and not stop.is_set():
                count = fill(memoryview(buffer), offset, stop)
                if count == 0:
                    break
                full.put((buffer, count))
                offset += count
            full.put(None)
        except BaseException as error:
            full.put(error)

    for _ in range(READ_AHEAD_BUFFERS):
        free.put(bytearray(chunk_bytes))
    reader = threading.Thread(target=read, name="csvfast-reader", daemon=True)
    reader.start()
    try:
        while (item := full.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, count = item
            with memoryview(buffer) as whole, whole[:count] as view:
                yield view
            free.put(buffer)
    finally:
        stop.set()
        free.put(None)
        reader.join()
