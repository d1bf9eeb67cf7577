"""The many small system calls: limits, scheduling, capabilities, attributes, timers; and those that programs do without."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import stat
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator.events import wait_for
from csvfast.machine.emulator.files import AT_FDCWD
from csvfast.machine.emulator.syscalls_files import LIBC, number_of, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS"]

_CLOEXEC: Final = 0o2000000
_WORD: Final = (1 << 64) - 1
_WITHOUT: Final = (  # the C libraries and Go do without them
    27, 247, 253, 254, 255, 294, 319, 322, 324, 326, 332, 333, 334, 424, 425, 426, 427, 434, 435, 436, 437, 439, 440, 441, 447,
    449, 451, 453,
)  # fmt: skip


def _missing(_process: Process, *_: int) -> int:
    raise OSError(errno.ENOSYS, "not there")


def _nothing(_process: Process, *_: int) -> int:
    return 0


def _refused(number: int) -> Callable[..., int]:
    def call(_process: Process, *_: int) -> int:
        raise OSError(number, os.strerror(number))

    return call


def _limit(process: Process, which: int) -> tuple[int, int]:
    stack = (8 << 20, _WORD)
    known = {resource.RLIMIT_STACK: stack, resource.RLIMIT_NOFILE: (1024, 1024), resource.RLIMIT_CORE: (0, 0)}
    return process.limits.get(which, known.get(which, (_WORD, _WORD)))


def _prlimit(process: Process, number: int, which: int, new: int, old: int, *_: int) -> int:
    if number_of(number) not in (0, os.getpid()) or not 0 <= which < 16:
        raise OSError(errno.EINVAL, "prlimit")
    before = _limit(process, which)
    if new:
        wanted = struct.unpack("<2Q", process.space.read(new, 16))
        if wanted[0] > wanted[1]:
            raise OSError(errno.EINVAL, "prlimit")
        if wanted[1] > before[1]:
            raise OSError(errno.EPERM, "prlimit")
        process.limits[which] = wanted
    if old:
        process.space.write(old, struct.pack("<2Q", *before))
    return 0


def _getrlimit(process: Process, which: int, address: int, *_: int) -> int:
    return _prlimit(process, 0, which, 0, address)


def _setrlimit(process: Process, which: int, address: int, *_: int) -> int:
    return _prlimit(process, 0, which, address, 0)


def _capget(process: Process, header: int, data: int, *_: int) -> int:
    process.space.write(header, struct.pack("<I", 0x20080522))
    if data:
        process.space.write(data, bytes(24))
    return 0


def _pending(process: Process, address: int, *_: int) -> int:
    process.space.write(address, struct.pack("<Q", sum(1 << (number - 1) for number in process.pending)))
    return 0


def _schedule(process: Process, _number: int, address: int, *_: int) -> int:
    process.space.write(address, struct.pack("<i", 0))
    return 0


def _getcpu(process: Process, cpu: int, node: int, *_: int) -> int:
    for address in (cpu, node):
        if address:
            process.space.write(address, bytes(4))
    return 0


def _getitimer(process: Process, which: int, address: int, *_: int) -> int:
    import signal

    words = []
    for value in reversed(signal.getitimer(number_of(which))):
        words += [int(value), int(value % 1 * 1e6)]
    process.space.write(address, struct.pack("<4q", *words))
    return 0


# ---- Files


def _fallocate(process: Process, number: int, mode: int, offset: int, length: int, *_: int) -> int:
    if mode:
        raise OSError(errno.EOPNOTSUPP, "fallocate")
    host, end = process.files.host(number_of(number)), signed(offset) + signed(length)
    if signed(offset) < 0 or signed(length) <= 0:
        raise OSError(errno.EINVAL, "fallocate")
    if end > process.files.file_size(host):
        process.files.truncate(host, end)
    return 0


def _mknodat(process: Process, directory: int, path: int, mode: int, _device: int, *_: int) -> int:
    where = process.files.absolute(number_of(directory), process.space.text(path))
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind == stat.S_IFREG:
        process.files.close_host(process.files.open(where, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o7777))
        return 0
    if kind != stat.S_IFIFO:
        raise OSError(errno.EPERM, "no devices")
    with process.files.parent(where) as (host, name):
        os.mkfifo(name, mode & 0o7777, dir_fd=host)
    return 0


def _mknod(process: Process, path: int, mode: int, device: int, *_: int) -> int:
    return _mknodat(process, AT_FDCWD, path, mode, device)


def _utimes(process: Process, directory: int, path: int, times: int, *_: int) -> int:
    with process.files.at(process.files.absolute(number_of(directory), process.space.text(path)), follow=True) as host:
        if times:
            words = struct.unpack("<4q", process.space.read(times, 32))
            stamps = (words[0] * 10**9 + words[1] * 1000, words[2] * 10**9 + words[3] * 1000)
            os.utime(f"/proc/self/fd/{host}", ns=stamps)
        else:
            os.utime(f"/proc/self/fd/{host}")
    return 0


def _utime(process: Process, path: int, times: int, *_: int) -> int:
    with process.files.at(process.files.absolute(AT_FDCWD, process.space.text(path)), follow=True) as host:
        os.utime(f"/proc/self/fd/{host}", struct.unpack("<2q", process.space.read(times, 16)) if times else None)
    return 0


# ---- Waiting


def _select(process: Process, count: int, reads: int, writes: int, others: int, timeout: int, *_: int) -> int:
    end = None
    if timeout:
        seconds, microseconds = struct.unpack("<qq", process.space.read(timeout, 16))
        end = time.monotonic() + seconds + microseconds / 1e6
    return _select_until(process, number_of(count), (reads, writes, others), end)


def _pselect(process: Process, count: int, reads: int, writes: int, others: int, timeout: int, *_: int) -> int:
    end = None
    if timeout:
        seconds, nanoseconds = struct.unpack("<qq", process.space.read(timeout, 16))
        end = time.monotonic() + seconds + nanoseconds / 1e9
    return _select_until(process, number_of(count), (reads, writes, others), end)


def _select_until(process: Process, count: int, sets: tuple[int, ...], end: float | None) -> int:
    if not 0 <= count <= 1024:
        raise OSError(errno.EINVAL, "select")
    size = (count + 63) // 64 * 8
    wanted: dict[int, int] = {}
    asked = []
    for address, events in zip(sets, (select.POLLIN, select.POLLOUT, select.POLLPRI), strict=True):
        bits = int.from_bytes(process.space.read(address, size), "little") if address and size else 0
        numbers = [number for number in range(count) if bits >> number & 1]
        asked.append(numbers)
        for number in numbers:
            host = process.files.host(number)
            wanted[host] = wanted.get(host, 0) | events
    found = wait_for(process, wanted, end, lambda: _select_until(process, count, sets, end))
    total = 0
    meant = (select.POLLIN | select.POLLHUP | select.POLLERR, select.POLLOUT | select.POLLERR, select.POLLPRI)
    for address, numbers, events in zip(sets, asked, meant, strict=True):
        ready = [number for number in numbers if found.get(process.files.host(number), 0) & events]
        total += len(ready)
        if address and size:
            process.space.write(address, sum(1 << number for number in ready).to_bytes(size, "little"))
    return total


def _timerfd(process: Process, clock: int, flags: int, *_: int) -> int:
    host = LIBC.timerfd_create(number_of(clock), number_of(flags) | _CLOEXEC)
    if host < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return process.files.add(host, close_on_exec=bool(flags & _CLOEXEC))


def _timerfd_set(process: Process, number: int, flags: int, new: int, old: int, *_: int) -> int:
    before = ctypes.create_string_buffer(32)
    if LIBC.timerfd_settime(process.files.host(number_of(number)), number_of(flags), process.space.read(new, 32), before) < 0:
        raise OSError(ctypes.get_errno(), "timerfd_settime")
    if old:
        process.space.write(old, before.raw)
    return 0


def _timerfd_get(process: Process, number: int, address: int, *_: int) -> int:
    value = ctypes.create_string_buffer(32)
    if LIBC.timerfd_gettime(process.files.host(number_of(number)), value) < 0:
        raise OSError(ctypes.get_errno(), "timerfd_gettime")
    process.space.write(address, value.raw)
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    **dict.fromkeys(_WITHOUT, _missing),
    **dict.fromkeys((135, 141, 142, 144, 145, 146, 147, 151, 152, 162, 187, 194, 195, 196, 203, 306), _nothing),
    **dict.fromkeys((188, 189, 190, 191, 192, 193, 197, 198, 199), _refused(errno.ENOTSUP)),
    126: _refused(errno.EPERM), 227: _refused(errno.EPERM),
    23: _select, 36: _getitimer, 97: _getrlimit, 125: _capget, 127: _pending, 132: _utime, 133: _mknod,
    140: lambda _process, *_: 20, 143: _schedule, 160: _setrlimit,
    235: lambda process, path, times, *_: _utimes(process, AT_FDCWD, path, times),
    259: _mknodat, 261: _utimes, 270: _pselect, 283: _timerfd, 285: _fallocate, 286: _timerfd_set, 287: _timerfd_get,
    302: _prlimit, 309: _getcpu,
}  # fmt: skip
