"""System calls about names of files: opening, status, directories, links."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator import kernel_files
from csvfast.machine.emulator.files import AT_FDCWD
from csvfast.machine.emulator.syscalls_files import number_of, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS"]

_NOFOLLOW, _REMOVEDIR, _EMPTY = 0x100, 0x200, 0x1000
_CLOEXEC: Final = 0o2000000
_TYPES: Final = {0o04: 4, 0o10: 8, 0o12: 10, 0o02: 2, 0o06: 6, 0o01: 1, 0o14: 12}


def _path(process: Process, directory: int, address: int) -> bytes:
    return process.files.absolute(number_of(directory), process.space.text(address))


def _openat(process: Process, directory: int, address: int, flags: int, mode: int, *_: int) -> int:
    host = process.files.open(_path(process, directory, address), flags & 0x7FFFFF, mode)
    return process.files.add(host, close_on_exec=bool(flags & _CLOEXEC))


def _open(process: Process, address: int, flags: int, mode: int, *_: int) -> int:
    return _openat(process, AT_FDCWD, address, flags, mode)


def _creat(process: Process, address: int, mode: int, *_: int) -> int:
    return _openat(process, AT_FDCWD, address, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)


def _put_status(process: Process, address: int, host: int, status: os.stat_result) -> int:
    user, group = process.identity.shown(status.st_uid, status.st_gid)
    size = process.files.size(host, status)
    times: list[int] = []
    for value in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns):
        times += divmod(value, 10**9)
    process.space.write(address, struct.pack(
        "<QQQIIIIQqqq6q24x", status.st_dev, status.st_ino, status.st_nlink, status.st_mode, user, group,
        0, status.st_rdev, size, status.st_blksize, status.st_blocks, *times,
    ))  # fmt: skip
    return 0


def _status(process: Process, address: int, path: bytes, *, follow: bool) -> int:
    with process.files.at(path, follow=follow) as host:
        return _put_status(process, address, host, os.fstat(host))


def _stat(process: Process, path: int, address: int, *_: int) -> int:
    return _status(process, address, _path(process, AT_FDCWD, path), follow=True)


def _lstat(process: Process, path: int, address: int, *_: int) -> int:
    return _status(process, address, _path(process, AT_FDCWD, path), follow=False)


def _fstat(process: Process, number: int, address: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    return _put_status(process, address, host, os.fstat(host))


def _fstatat(process: Process, directory: int, path: int, address: int, flags: int, *_: int) -> int:
    if flags & _EMPTY and not process.space.text(path):
        if number_of(directory) != AT_FDCWD:
            return _fstat(process, directory, address)
        return _status(process, address, process.files.cwd, follow=True)
    return _status(process, address, _path(process, directory, path), follow=not flags & _NOFOLLOW)


def _accessat(process: Process, directory: int, path: int, mode: int, *_: int) -> int:
    where = _path(process, directory, path)
    with process.files.at(where, follow=True) as host:
        if not os.access(f"/proc/self/fd/{host}", mode & 7):
            raise OSError(errno.EACCES, "access")
    return 0


def _access(process: Process, path: int, mode: int, *_: int) -> int:
    return _accessat(process, AT_FDCWD, path, mode)


def _readlinkat(process: Process, directory: int, path: int, address: int, length: int, *_: int) -> int:
    where = _path(process, directory, path)
    made = kernel_files.link(process, where)
    if made is not None:
        target = made
    else:
        with process.files.parent(where) as (host, name):
            target = os.readlink(name, dir_fd=host)
    target = target[:length]
    process.space.write(address, target)
    return len(target)


def _readlink(process: Process, path: int, address: int, length: int, *_: int) -> int:
    return _readlinkat(process, AT_FDCWD, path, address, length)


def _getdents(process: Process, number: int, address: int, length: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    # The descriptor's own position counts entries: reading goes on after lseek(0) and in forked children alike.
    start = os.lseek(host, 0, os.SEEK_CUR)
    names = [b".", b"..", *sorted(os.fsencode(name) for name in os.listdir(host))]  # noqa: PTH208
    out = b""
    place = start
    for name in names[start:]:
        try:
            status = os.stat(name, dir_fd=host, follow_symlinks=False)
        except FileNotFoundError:
            place += 1
            continue
        size = (19 + len(name) + 1 + 7) & -8
        if len(out) + size > length:
            if not out:
                raise OSError(errno.EINVAL, "buffer too small")
            break
        place += 1
        entry = struct.pack("<QqHB", status.st_ino, place, size, _TYPES.get(status.st_mode >> 12, 0)) + name
        out += entry.ljust(size, b"\0")
    os.lseek(host, place, os.SEEK_SET)
    process.space.write(address, out)
    return len(out)


def _getcwd(process: Process, address: int, length: int, *_: int) -> int:
    text = process.files.cwd + b"\0"
    if len(text) > length:
        raise OSError(errno.ERANGE, "getcwd")
    process.space.write(address, text)
    return len(text)


def _chdir(process: Process, path: int, *_: int) -> int:
    process.files.change(_path(process, AT_FDCWD, path))
    return 0


def _fchdir(process: Process, number: int, *_: int) -> int:
    process.files.cwd = process.files.path_of(process.files.host(number_of(number)))
    return 0


def _mkdirat(process: Process, directory: int, path: int, mode: int, *_: int) -> int:
    with process.files.parent(_path(process, directory, path)) as (host, name):
        os.mkdir(name, mode & 0o7777, dir_fd=host)
    return 0


def _mkdir(process: Process, path: int, mode: int, *_: int) -> int:
    return _mkdirat(process, AT_FDCWD, path, mode)


def _unlinkat(process: Process, directory: int, path: int, flags: int, *_: int) -> int:
    with process.files.parent(_path(process, directory, path)) as (host, name):
        (os.rmdir if flags & _REMOVEDIR else os.unlink)(name, dir_fd=host)
    return 0


def _unlink(process: Process, path: int, *_: int) -> int:
    return _unlinkat(process, AT_FDCWD, path, 0)


def _rmdir(process: Process, path: int, *_: int) -> int:
    return _unlinkat(process, AT_FDCWD, path, _REMOVEDIR)


def _renameat(process: Process, old_at: int, old: int, new_at: int, new: int, *_: int) -> int:
    with (
        process.files.parent(_path(process, old_at, old)) as (source, name),
        process.files.parent(_path(process, new_at, new)) as (target, other),
    ):
        os.replace(name, other, src_dir_fd=source, dst_dir_fd=target)
    return 0


def _rename(process: Process, old: int, new: int, *_: int) -> int:
    return _renameat(process, AT_FDCWD, old, AT_FDCWD, new)


def _linkat(process: Process, old_at: int, old: int, new_at: int, new: int, *_: int) -> int:
    with (
        process.files.parent(_path(process, old_at, old)) as (source, name),
        process.files.parent(_path(process, new_at, new)) as (target, other),
    ):
        os.link(name, other, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    return 0


def _link(process: Process, old: int, new: int, *_: int) -> int:
    return _linkat(process, AT_FDCWD, old, AT_FDCWD, new)


def _symlinkat(process: Process, target: int, directory: int, path: int, *_: int) -> int:
    text = process.space.text(target)
    with process.files.parent(_path(process, directory, path)) as (host, name):
        os.symlink(text, name, dir_fd=host)
    return 0


def _symlink(process: Process, target: int, path: int, *_: int) -> int:
    return _symlinkat(process, target, AT_FDCWD, path)


def _chmodat(process: Process, directory: int, path: int, mode: int, *_: int) -> int:
    with process.files.at(_path(process, directory, path), follow=True) as host:
        os.chmod(f"/proc/self/fd/{host}", mode & 0o7777)
    return 0


def _chmod(process: Process, path: int, mode: int, *_: int) -> int:
    return _chmodat(process, AT_FDCWD, path, mode)


def _fchmod(process: Process, number: int, mode: int, *_: int) -> int:
    os.fchmod(process.files.host(number_of(number)), mode & 0o7777)
    return 0


def _chownat(process: Process, directory: int, path: int, user: int, group: int, flags: int, *_: int) -> int:
    with process.files.at(_path(process, directory, path), follow=not flags & _NOFOLLOW) as host:
        os.chown(f"/proc/self/fd/{host}", *process.identity.meant(signed(user, 32), signed(group, 32)))
    return 0


def _chown(process: Process, path: int, user: int, group: int, *_: int) -> int:
    return _chownat(process, AT_FDCWD, path, user, group, 0)


def _fchown(process: Process, number: int, user: int, group: int, *_: int) -> int:
    os.fchown(process.files.host(number_of(number)), *process.identity.meant(signed(user, 32), signed(group, 32)))
    return 0


def _truncate(process: Process, path: int, length: int, *_: int) -> int:
    host = process.files.open(_path(process, AT_FDCWD, path), os.O_WRONLY)
    try:
        process.files.truncate(host, signed(length))
    finally:
        process.files.close_host(host)
    return 0


def _utimensat(process: Process, directory: int, path: int, times: int, flags: int, *_: int) -> int:
    if path:
        with process.files.at(_path(process, directory, path), follow=not flags & _NOFOLLOW) as host:
            return _set_times(process, f"/proc/self/fd/{host}", times)
    return _set_times(process, process.files.host(number_of(directory)), times)


def _set_times(process: Process, where: str | int, times: int) -> int:
    if not times:
        os.utime(where)
        return 0
    status = os.stat(where)  # noqa: PTH116 - or a descriptor
    values = struct.unpack("<4q", process.space.read(times, 32))
    stamps = []
    for seconds, nanoseconds, old in (
        (*values[:2], status.st_atime_ns), (*values[2:], status.st_mtime_ns),
    ):  # fmt: skip
        if nanoseconds == 0x3FFFFFFF:  # UTIME_NOW
            import time

            stamps.append(time.time_ns())
        else:
            stamps.append(old if nanoseconds == 0x3FFFFFFE else seconds * 10**9 + nanoseconds)
    os.utime(where, ns=(stamps[0], stamps[1]))
    return 0


def _put_filesystem(process: Process, address: int, found: os.statvfs_result) -> int:
    process.space.write(address, struct.pack(
        "<qq5qiiqqq4q", 0xEF53, found.f_bsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree,
        0, 0, found.f_namemax, found.f_frsize, found.f_flag, 0, 0, 0, 0,
    ))  # fmt: skip
    return 0


def _statfs(process: Process, path: int, address: int, *_: int) -> int:
    with process.files.at(_path(process, AT_FDCWD, path), follow=True) as host:
        return _put_filesystem(process, address, os.fstatvfs(host))


def _fstatfs(process: Process, number: int, address: int, *_: int) -> int:
    return _put_filesystem(process, address, os.fstatvfs(process.files.host(number_of(number))))


def _umask(_process: Process, mask: int, *_: int) -> int:
    return os.umask(mask & 0o777)


CALLS: Final[dict[int, Callable[..., Any]]] = {
    2: _open, 4: _stat, 5: _fstat, 6: _lstat, 21: _access, 76: _truncate, 79: _getcwd, 80: _chdir, 81: _fchdir,
    82: _rename, 83: _mkdir, 84: _rmdir, 85: _creat, 86: _link, 87: _unlink, 88: _symlink, 89: _readlink, 90: _chmod,
    91: _fchmod, 92: _chown, 93: _fchown, 95: _umask, 137: _statfs, 138: _fstatfs, 217: _getdents, 257: _openat,
    258: _mkdirat, 260: _chownat, 262: _fstatat, 263: _unlinkat, 264: _renameat, 265: _linkat, 266: _symlinkat,
    267: _readlinkat, 268: _chmodat, 269: _accessat, 280: _utimensat, 316: _renameat,
}  # fmt: skip
