"""Files of a guest process: descriptors, and paths that never leave the machine's root (openat2, RESOLVE_IN_ROOT)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from csvfast.machine.emulator.tree import EncryptedTree, content_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["AT_FDCWD", "Files", "open_in_root"]

AT_FDCWD: Final = -100
_OPENAT2: Final = 437
_IN_ROOT: Final = 0x10 | 0x02  # RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS (linux/openat2.h)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_DEVICES: Final = {b"/dev/null", b"/dev/zero", b"/dev/urandom", b"/dev/random", b"/dev/tty"}


def open_in_root(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Opens a path below a directory, which no link and no ".." leaves. Out: a descriptor. Raises OSError."""
    if not flags & (os.O_CREAT | os.O_TMPFILE):
        mode = 0
    flags |= os.O_CLOEXEC
    if flags & os.O_PATH:
        flags &= os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
    else:
        flags |= os.O_NOCTTY
    how = struct.pack("<QQQ", flags & 0x7FFFFF, mode & 0o7777, _IN_ROOT)
    found = _LIBC.syscall(_OPENAT2, root, path, how, len(how))
    if found >= 0:
        return int(found)
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


class Opened:
    """How the guest opened a file of the encrypted tree; the host's descriptor may always be read."""

    __slots__ = ("access", "append")

    def __init__(self, flags: int) -> None:
        self.access = flags & os.O_ACCMODE
        self.append = bool(flags & os.O_APPEND)


class Files:
    """Descriptors of one process and its working directory.

    In: root   directory that is the guest's "/", or an encrypted tree: then its regular files are read and written through it
    The devices null, zero, random, urandom and tty are the host's wherever the root has none.
    """

    def __init__(self, root: str | EncryptedTree) -> None:
        self.tree = root if isinstance(root, EncryptedTree) else None
        place = f"/proc/self/fd/{root.descriptor}" if isinstance(root, EncryptedTree) else root
        self.root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.kernel: Callable[[bytes], int | None] = lambda _path: None  # opens what the kernel itself serves
        self.made: set[int] = set()  # the host's descriptors of such files
        self.contents: dict[int, Opened] = {}  # by the host's descriptor: files of the encrypted tree
        self.cwd = b"/"
        self.open_files: dict[int, int] = {0: 0, 1: 1, 2: 2}
        self.close_on_exec: set[int] = set()

    # ---- Descriptors

    def host(self, number: int) -> int:
        """The host's descriptor. Raises OSError EBADF."""
        try:
            return self.open_files[number]
        except KeyError:
            raise OSError(errno.EBADF, "bad descriptor") from None

    def add(self, host: int, *, least: int = 0, close_on_exec: bool = False) -> int:
        """Gives a host's descriptor the lowest free number."""
        number = least
        while number in self.open_files:
            number += 1
        if number >= 1024:
            self.close_host(host)
            raise OSError(errno.EMFILE, "too many files")
        self.open_files[number] = host
        if close_on_exec:
            self.close_on_exec.add(number)
        return number

    def close(self, number: int) -> None:
        """Raises OSError EBADF."""
        host = self.host(number)
        del self.open_files[number]
        self.close_on_exec.discard(number)
        if host > 2:
            self.close_host(host)

    def duplicate(self, old: int, new: int, *, close_on_exec: bool = False) -> int:
        """dup3."""
        host = self.duplicate_host(self.host(old))
        if new in self.open_files:
            self.close(new)
        self.open_files[new] = host
        if close_on_exec:
            self.close_on_exec.add(new)
        return new

    def executed(self) -> None:
        """Closes what a new program shall not see."""
        for number in list(self.close_on_exec):
            self.close(number)

    # ---- Paths

    def absolute(self, directory: int, path: bytes) -> bytes:
        """The path from the root: with a directory's descriptor, from where that descriptor leads."""
        if not path:
            raise OSError(errno.ENOENT, "empty path")
        if path.startswith(b"/"):
            return path
        if directory == AT_FDCWD:
            return self.cwd.rstrip(b"/") + b"/" + path
        return self.path_of(self.host(directory)).rstrip(b"/") + b"/" + path

    def path_of(self, host: int) -> bytes:
        """Where a host's descriptor lies below the root. Raises OSError ENOTDIR."""
        top = os.readlink(b"/proc/self/fd/%d" % self.root).rstrip(b"/")  # noqa: PTH115 - bytes
        place = os.readlink(b"/proc/self/fd/%d" % host)  # noqa: PTH115 - bytes
        if not stat.S_ISDIR(os.fstat(host).st_mode) or not (place + b"/").startswith(top + b"/"):
            raise OSError(errno.ENOTDIR, "no directory of the root")
        return place[len(top) :] or b"/"

    def open(self, path: bytes, flags: int, mode: int = 0) -> int:
        """Opens a path from the root. Out: a host's descriptor. Raises OSError."""
        wanted = flags
        if path.startswith((b"/proc/", b"/dev/", b"/sys/")):
            made = self.kernel(path)
            if made is not None:
                self.made.add(made)
                return made
        if path in _DEVICES:
            flags &= ~(os.O_CREAT | os.O_EXCL)
        if self.tree is not None and not flags & os.O_PATH:
            flags &= ~os.O_APPEND  # the place is the tree's matter
            if flags & os.O_ACCMODE == os.O_WRONLY and self._is_plain(path, flags):
                flags += os.O_RDWR - os.O_WRONLY
        try:
            host = open_in_root(self.root, path, flags, mode)
        except FileNotFoundError:
            if path not in _DEVICES:
                raise
            return os.open(path, wanted & ~(os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC | os.O_NOCTTY)
        if self.tree is not None and not flags & os.O_PATH:
            if stat.S_ISREG(os.fstat(host).st_mode):
                self.contents[host] = Opened(wanted)
            elif wanted & os.O_APPEND:
                fcntl.fcntl(host, fcntl.F_SETFL, fcntl.fcntl(host, fcntl.F_GETFL) | os.O_APPEND)
        return host

    def _is_plain(self, path: bytes, flags: int) -> bool:
        """False for a pipe or a device: those are opened as the guest says."""
        try:
            with self.at(path, follow=not flags & os.O_NOFOLLOW) as host:
                mode = os.fstat(host).st_mode
                return not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode))
        except OSError:
            return True

    # ---- The host's descriptors: files of the encrypted tree are read and written through it

    def duplicate_host(self, host: int) -> int:
        """dup."""
        found = os.dup(host)
        if host in self.contents:
            self.contents[found] = self.contents[host]
        if host in self.made:
            self.made.add(found)
        return found

    def close_host(self, host: int) -> None:
        """close."""
        self.contents.pop(host, None)
        self.made.discard(host)
        os.close(host)

    def size(self, host: int, status: os.stat_result) -> int:
        """The size that the guest sees of an open file, which may be open for its name only."""
        below = host in self.contents or (host not in self.made and fcntl.fcntl(host, fcntl.F_GETFL) & os.O_PATH)
        if self.tree is not None and below and stat.S_ISREG(status.st_mode):
            return content_size(status.st_size)
        return status.st_size

    def file_size(self, host: int) -> int:
        """Bytes of an open file."""
        size = os.fstat(host).st_size
        return content_size(size) if host in self.contents else size

    def pread(self, host: int, length: int, offset: int) -> bytes:
        """pread."""
        if host not in self.contents:
            return os.pread(host, length, offset)
        if offset < 0:
            raise OSError(errno.EINVAL, "offset")
        return self._tree_of(host, os.O_WRONLY).pread(host, length, offset)

    def pwrite(self, host: int, data: bytes, offset: int) -> int:
        """pwrite."""
        if host not in self.contents:
            return os.pwrite(host, data, offset)
        if offset < 0:
            raise OSError(errno.EINVAL, "offset")
        self._tree_of(host, os.O_RDONLY).pwrite(host, data, None if self.contents[host].append else offset)
        return len(data)

    def read(self, host: int, length: int) -> bytes:
        """read of a file of the tree."""
        tree = self._tree_of(host, os.O_WRONLY)
        place = os.lseek(host, 0, os.SEEK_CUR)
        data = tree.pread(host, length, place)
        os.lseek(host, place + len(data), os.SEEK_SET)
        return data

    def write(self, host: int, data: bytes) -> int:
        """write to a file of the tree."""
        tree = self._tree_of(host, os.O_RDONLY)
        place = None if self.contents[host].append else os.lseek(host, 0, os.SEEK_CUR)
        os.lseek(host, tree.pwrite(host, data, place), os.SEEK_SET)
        return len(data)

    def seek(self, host: int, offset: int, whence: int) -> int:
        """lseek; no file of the tree has holes."""
        if host not in self.contents:
            return os.lseek(host, offset, whence)
        if whence == os.SEEK_END:
            offset, whence = offset + self.file_size(host), os.SEEK_SET
        elif whence in (os.SEEK_DATA, os.SEEK_HOLE):
            size = self.file_size(host)
            if not 0 <= offset < size:
                raise OSError(errno.ENXIO, "offset")
            offset, whence = (offset if whence == os.SEEK_DATA else size), os.SEEK_SET
        return os.lseek(host, offset, whence)

    def truncate(self, host: int, length: int) -> None:
        """ftruncate."""
        if host not in self.contents:
            os.ftruncate(host, length)
            return
        if self.contents[host].access == os.O_RDONLY:
            raise OSError(errno.EINVAL, "opened for reading")
        self._tree_of(host, os.O_RDONLY).truncate(host, length)

    def _tree_of(self, host: int, refused: int) -> EncryptedTree:
        if self.tree is None or self.contents[host].access == refused:
            raise OSError(errno.EBADF, "not opened for this")
        return self.tree

    @contextmanager
    def at(self, path: bytes, *, follow: bool) -> Iterator[int]:
        """A descriptor that only names the file (O_PATH)."""
        host = self.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        try:
            yield host
        finally:
            self.close_host(host)

    @contextmanager
    def parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The directory that a path's last part lies in, and that part: for calls that make or remove names."""
        head, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b"", b".", b".."):
            raise OSError(errno.EINVAL, "no name")
        host = self.open(head or b"/", os.O_PATH | os.O_DIRECTORY)
        try:
            yield host, name
        finally:
            os.close(host)

    def change(self, path: bytes) -> None:
        """chdir."""
        with self.at(path, follow=True) as host:
            self.cwd = self.path_of(host)
