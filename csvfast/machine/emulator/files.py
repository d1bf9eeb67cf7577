"""Files of a guest process: descriptors, and paths that never leave the machine's root (openat2, RESOLVE_IN_ROOT)."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AT_FDCWD", "Files"]

AT_FDCWD: Final = -100
_OPENAT2: Final = 437
_IN_ROOT: Final = 0x10 | 0x02  # RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS (linux/openat2.h)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_DEVICES: Final = {b"/dev/null", b"/dev/zero", b"/dev/urandom", b"/dev/random", b"/dev/tty"}


class Files:
    """Descriptors of one process and its working directory.

    In: root   directory that is the guest's "/"
    The devices null, zero, random, urandom and tty are the host's wherever the root has none.
    """

    def __init__(self, root: str) -> None:
        self.root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
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
            os.close(host)
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
            os.close(host)

    def duplicate(self, old: int, new: int, *, close_on_exec: bool = False) -> int:
        """dup3."""
        host = os.dup(self.host(old))
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
        if not flags & (os.O_CREAT | os.O_TMPFILE):
            mode = 0
        flags |= os.O_CLOEXEC
        if flags & os.O_PATH:
            flags &= os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
        else:
            flags |= os.O_NOCTTY
        how = struct.pack("<QQQ", flags & 0x7FFFFF, mode & 0o7777, _IN_ROOT)
        found = _LIBC.syscall(_OPENAT2, self.root, path, how, len(how))
        if found >= 0:
            return int(found)
        number = ctypes.get_errno()
        if number == errno.ENOENT and path in _DEVICES:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)
        raise OSError(number, os.strerror(number))

    @contextmanager
    def at(self, path: bytes, *, follow: bool) -> Iterator[int]:
        """A descriptor that only names the file (O_PATH)."""
        host = self.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        try:
            yield host
        finally:
            os.close(host)

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
