"""EncryptedTree: a directory tree of the host's whose files hold ciphertext: names and modes are real, contents are not readable.

A file is 16 bytes of header (_MAGIC, and the file's own random number of its first data unit), its content as whole pages of
4096 bytes, each SM4-XTS under the tree's key with the unit's number as tweak, and as many bytes of filler, a hole, as the
content's last page has of it: so the length tells the content's size, and changes in one step with it. A page of zero bytes
is a hole and reads as zeros. The key stands in the memory of the processes that were given it, nowhere else.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, cast

from csvfast import errors
from csvfast.crypto import SM4XTS, Secret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from csvfast._core import BytesLike

__all__ = ["EncryptedTree", "TreeWriter", "content_size", "file_size"]

_PAGE: Final = 4096
_HEADER: Final = 16
_MAGIC: Final = b"csvtree1"
_ZEROS: Final = bytes(_PAGE)
_RUN: Final = 1 << 20  # bytes that a writer encrypts at once


def file_size(content: int) -> int:
    """Length of the host's file whose content has `content` bytes."""
    return _HEADER + (content + _PAGE - 1) // _PAGE * _PAGE + content % _PAGE if content else 0


def content_size(file: int) -> int:
    """Bytes of content in a host's file of `file` bytes."""
    pages, rest = divmod(max(file - _HEADER, 0), _PAGE)
    return (pages - 1) * _PAGE + rest if rest and pages else pages * _PAGE


class EncryptedTree:
    """Files below a directory, encrypted under one key; a content store for unpacked layers and the root of emulated programs.

        with EncryptedTree(directory) as tree:              # a random key nobody learns
            writer = tree.create(parent, b"name", 0o755)    # parent: descriptor of a directory below `directory`
            writer.write(data)
            writer.close()
            run_program("/name", root=tree)

    In: directory  an existing directory; hidden from nobody: names, sizes, links, modes, owners and times are in the clear
        key        32 bytes; None = random

    What a changed byte of the host's file does: its block of 16 bytes reads as noise (a page of zeros: as zeros). Nothing tells
    of it: the tree is for encryption against whoever reads, as DRAM is.
    Thread-safety: any number of threads and processes (those that EmulatedProcess starts) may read and write; one file's writes
    exclude each other. Raises OSError, LengthError (key).
    """

    def __init__(self, directory: str | os.PathLike[str], *, key: Secret | None = None, _lock: int = -1) -> None:
        key = Secret.random(32) if key is None else key
        if len(key) != 32:
            raise errors.LengthError(f"the tree's key has {len(key)} bytes; expected 32")
        self.directory = os.fspath(directory)
        self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.key = key
        self.lock_descriptor = os.memfd_create("csvfast-tree", os.MFD_CLOEXEC) if _lock < 0 else _lock
        self._cipher = SM4XTS(key)
        self._threads = threading.Lock()

    def close(self) -> None:
        """Forgets the key; the files stay, as noise."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            os.close(self.lock_descriptor)
            self.descriptor = self.lock_descriptor = -1
            del self._cipher
            self.key.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EncryptedTree({self.directory!r})"

    # ---- Whole files

    def create(self, parent_fd: int, name: str | bytes, mode: int) -> TreeWriter:
        """A new file, in order from its begin. Raises OSError (FileExistsError when the name is taken, by whatever)."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=parent_fd)
        try:
            os.fchmod(descriptor, mode & 0o7777)
        except BaseException:
            os.close(descriptor)
            raise
        return TreeWriter(self, descriptor)

    def read_bytes(self, path: str | bytes, limit: int = 1 << 24) -> bytes:
        """Content of a file by its path from the tree's root, which no link leaves. Raises OSError, LimitError."""
        from csvfast.machine.emulator.files import open_in_root

        descriptor = open_in_root(self.descriptor, os.fsencode(path), os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise errors.ArgumentError(f"{os.fsdecode(path)}: no regular file")
            size = content_size(status.st_size)
            if size > limit:
                raise errors.LimitError(f"{os.fsdecode(path)} has {size} bytes; allowed are {limit}")
            return self.pread(descriptor, size, 0)
        finally:
            os.close(descriptor)

    def write_bytes(self, path: str | bytes, data: BytesLike, mode: int = 0o644) -> None:
        """Makes a file, or replaces its content, by its path from the tree's root, which no link leaves. Raises OSError."""
        from csvfast.machine.emulator.files import open_in_root

        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        descriptor = open_in_root(self.descriptor, os.fsencode(path), flags, mode)
        try:
            self.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)

    # ---- Parts of open files: descriptors of the host's, opened for reading, or for reading and writing

    def size(self, descriptor: int) -> int:
        """Bytes of content."""
        return content_size(os.fstat(descriptor).st_size)

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes of content from `offset` on; fewer only at the end."""
        end = min(offset + length, self.size(descriptor))
        if offset >= end or offset < 0:
            return b""
        first, last = offset // _PAGE, (end + _PAGE - 1) // _PAGE
        plain = self._pages(descriptor, first, last, self._base(descriptor))
        return bytes(memoryview(plain)[offset - first * _PAGE : end - first * _PAGE])

    def pwrite(self, descriptor: int, data: BytesLike, offset: int | None) -> int:
        """Writes all of `data` at `offset`, None = at the end. Out: the place after it.

        Raises OSError; the size is then the old one.
        """
        view = memoryview(cast("Any", data)).cast("B")
        with self._locked(descriptor):
            size = self.size(descriptor)
            if offset is None:
                offset = size
            end = offset + len(view)
            if not len(view):
                return offset
            base = self._base(descriptor, make=True)
            first, last = offset // _PAGE, (end + _PAGE - 1) // _PAGE
            start = first * _PAGE
            plain = bytearray((last - first) * _PAGE)
            if offset > start and start < size:
                plain[:_PAGE] = self._pages(descriptor, first, first + 1, base)
            if end % _PAGE and end < size and (last - 1 > first or offset == start):
                plain[-_PAGE:] = self._pages(descriptor, last - 1, last, base)
            plain[offset - start : end - start] = view
            self._cipher.encrypt(plain, base + first, out=plain)
            if end > size:
                os.ftruncate(descriptor, file_size(end))
            try:
                _write_all(descriptor, plain, _HEADER + start)
            except BaseException:
                if end > size:
                    os.ftruncate(descriptor, file_size(size))
                raise
        return end

    def truncate(self, descriptor: int, length: int) -> None:
        """Sets the content's size; what is new are zeros."""
        if length < 0:
            raise OSError(22, "negative length")
        with self._locked(descriptor):
            size = self.size(descriptor)
            if length:
                base = self._base(descriptor, make=True)
            if length < size and length % _PAGE:  # so that growing again shows zeros
                page = length // _PAGE
                plain = self._pages(descriptor, page, page + 1, base)
                plain[length % _PAGE :] = bytes(_PAGE - length % _PAGE)
                self._cipher.encrypt(plain, base + page, out=plain)
                _write_all(descriptor, plain, _HEADER + page * _PAGE)
            if length < size and length % _PAGE:  # the filler is a hole, where a page lay before
                filler = file_size(length) - length % _PAGE
                _write_all(descriptor, bytes(max(min(length % _PAGE, file_size(size) - filler), 0)), filler)
            os.ftruncate(descriptor, file_size(length))

    def _base(self, descriptor: int, *, make: bool = False) -> int:
        header = os.pread(descriptor, _HEADER, 0)
        if len(header) < _HEADER:
            if not make:
                return 0
            header = new_header()
            _write_all(descriptor, header, 0)
        return int(struct.unpack("<8xQ", header)[0]) & ~(1 << 63)

    def _pages(self, descriptor: int, first: int, last: int, base: int) -> bytearray:
        held = os.pread(descriptor, (last - first) * _PAGE, _HEADER + first * _PAGE)
        if len(held) < (last - first) * _PAGE:  # filler, or nothing yet
            held = held[: len(held) // _PAGE * _PAGE]
        plain = bytearray((last - first) * _PAGE)
        if held:
            self._cipher.decrypt(held, base + first, out=memoryview(plain)[: len(held)])
        for place in range(0, len(held), _PAGE):
            if held.startswith(_ZEROS[:16], place) and held.startswith(_ZEROS, place):
                plain[place : place + _PAGE] = _ZEROS
        return plain

    @contextmanager
    def _locked(self, descriptor: int) -> Iterator[None]:
        place = os.fstat(descriptor).st_ino & (1 << 62) - 1
        with self._threads:
            fcntl.lockf(self.lock_descriptor, fcntl.LOCK_EX, 1, place)
            try:
                yield
            finally:
                fcntl.lockf(self.lock_descriptor, fcntl.LOCK_UN, 1, place)


class TreeWriter:
    """Writes one new file of a tree from its begin to its end. One thread."""

    def __init__(self, tree: EncryptedTree, descriptor: int) -> None:
        self._tree, self._descriptor = tree, descriptor
        self._waiting = bytearray()
        self._done = 0  # bytes that lie encrypted in the file
        header = new_header()
        self._base = int(struct.unpack("<8xQ", header)[0]) & ~(1 << 63)
        self._header = header

    def fileno(self) -> int:
        """The host's descriptor: for owner, mode and attributes. Raises ValueError after close()."""
        if self._descriptor < 0:
            raise ValueError("the file is closed")
        return self._descriptor

    def write(self, data: BytesLike) -> int:
        """Takes all of `data`. Out: its length. Raises OSError."""
        view = memoryview(cast("Any", data)).cast("B")
        self.fileno()
        self._waiting += view
        if len(self._waiting) >= _RUN:
            self._put(len(self._waiting) // _PAGE * _PAGE)
        return len(view)

    def close(self) -> None:
        """Writes what waits and closes the file; a second call does nothing. Raises OSError."""
        if self._descriptor < 0:
            return
        try:
            size = self._done + len(self._waiting)
            if self._waiting:
                self._waiting += bytes(-len(self._waiting) % _PAGE)
                self._put(len(self._waiting))
            os.ftruncate(self._descriptor, file_size(size))
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            self._waiting[:] = bytes(len(self._waiting))
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):
                self.close()

    def _put(self, length: int) -> None:
        if not self._done:
            _write_all(self._descriptor, self._header, 0)
        page = self._done // _PAGE
        with memoryview(self._waiting)[:length] as run:
            self._tree._cipher.encrypt(run, self._base + page, out=run)
            _write_all(self._descriptor, run, _HEADER + self._done)
        self._done += length
        del self._waiting[:length]


def new_header() -> bytes:
    """A new file's header: the number of its first data unit is random, so no two files share a tweak."""
    return _MAGIC + os.urandom(8)


def _write_all(descriptor: int, data: BytesLike, offset: int) -> None:
    view = memoryview(cast("Any", data)).cast("B")
    while len(view):
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
