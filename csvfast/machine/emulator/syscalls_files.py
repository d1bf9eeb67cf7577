"""System calls about open files: reading, writing, pipes, descriptors, terminals, polling."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS", "LIBC", "number_of", "signed"]

LIBC: Final = ctypes.CDLL(None, use_errno=True)
LIBC.read.restype = LIBC.write.restype = ctypes.c_ssize_t
LIBC.read.argtypes = LIBC.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_BULK: Final = 1 << 17  # bytes of one call: a program is told what was done and goes on
_CLOEXEC: Final = 0o2000000


def signed(value: int, bits: int = 64) -> int:
    """A register's value as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def number_of(value: int) -> int:
    """A register as an int."""
    return signed(value, 32)


def _take(process: Process, host: int, length: int) -> bytes:
    if host in process.files.contents:
        return process.files.read(host, min(length, _BULK))
    process.ready(host, select.POLLIN)
    buffer = bytearray(min(length, _BULK))
    done = process.waiting(LIBC.read, host, (ctypes.c_char * len(buffer)).from_buffer(buffer), len(buffer))
    return bytes(memoryview(buffer)[:done])


def _put(process: Process, host: int, data: bytes) -> int:
    if host in process.files.contents:
        return process.files.write(host, data)
    process.ready(host, select.POLLOUT)
    return process.waiting(LIBC.write, host, data, len(data))


def _read(process: Process, number: int, address: int, length: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    data = _take(process, host, length)
    process.space.write(address, data)
    return len(data)


def _write(process: Process, number: int, address: int, length: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    data = process.space.read(address, min(length, _BULK))
    return _put(process, host, bytes(data))


def _pread(process: Process, number: int, address: int, length: int, offset: int, *_: int) -> int:
    data = process.files.pread(process.files.host(number_of(number)), min(length, _BULK), signed(offset))
    process.space.write(address, data)
    return len(data)


def _pwrite(process: Process, number: int, address: int, length: int, offset: int, *_: int) -> int:
    data = process.space.read(address, min(length, _BULK))
    return process.files.pwrite(process.files.host(number_of(number)), bytes(data), signed(offset))


def _vectors(process: Process, address: int, count: int) -> list[tuple[int, int]]:
    if not 0 <= count <= 1024:
        raise OSError(errno.EINVAL, "vectors")
    words = struct.unpack(f"<{2 * count}Q", process.space.read(address, 16 * count))
    return list(zip(words[::2], words[1::2], strict=True))


def _readv(process: Process, number: int, address: int, count: int, *_: int) -> int:
    vectors = _vectors(process, address, count)
    host = process.files.host(number_of(number))
    data = _take(process, host, sum(length for _, length in vectors))
    place = 0
    for start, length in vectors:
        part = data[place : place + length]
        process.space.write(start, part)
        place += len(part)
    return place


def _writev(process: Process, number: int, address: int, count: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    data = bytearray()
    for start, length in _vectors(process, address, count):
        data += process.space.read(start, min(length, _BULK - len(data)))
    return _put(process, host, bytes(data))


def _close(process: Process, number: int, *_: int) -> int:
    process.files.close(number_of(number))
    return 0


def _lseek(process: Process, number: int, offset: int, whence: int, *_: int) -> int:
    return process.files.seek(process.files.host(number_of(number)), signed(offset), whence & 0xFFFFFFFF)


def _dup(process: Process, number: int, *_: int) -> int:
    return process.files.add(process.files.duplicate_host(process.files.host(number_of(number))))


def _dup2(process: Process, old: int, new: int, *_: int) -> int:
    if old == new:
        process.files.host(number_of(old))
        return new
    return _dup3(process, old, new, 0)


def _dup3(process: Process, old: int, new: int, flags: int, *_: int) -> int:
    if old == new or flags & ~_CLOEXEC:
        raise OSError(errno.EINVAL, "dup3")
    if not 0 <= number_of(new) < 1024:
        raise OSError(errno.EBADF, "dup3")
    return process.files.duplicate(number_of(old), number_of(new), close_on_exec=bool(flags & _CLOEXEC))


def _pipe(process: Process, address: int, flags: int = 0, *_: int) -> int:
    ends = os.pipe2((flags & (os.O_NONBLOCK | _CLOEXEC)) | os.O_CLOEXEC)
    numbers = [process.files.add(host, close_on_exec=bool(flags & _CLOEXEC)) for host in ends]
    process.space.write(address, struct.pack("<ii", *numbers))
    return 0


def _pipe_plain(process: Process, address: int, *_: int) -> int:
    return _pipe(process, address)


def _fcntl(process: Process, number: int, command: int, argument: int, *_: int) -> int:
    files, number = process.files, number_of(number)
    host = files.host(number)
    if command in (0, 1030):  # F_DUPFD, F_DUPFD_CLOEXEC
        if not 0 <= signed(argument) < 1024:
            raise OSError(errno.EINVAL, "fcntl")
        return files.add(files.duplicate_host(host), least=argument, close_on_exec=command == 1030)
    if command == 1:
        return int(number in files.close_on_exec)
    if command == 2:
        (files.close_on_exec.add if argument & 1 else files.close_on_exec.discard)(number)
        return 0
    opened = files.contents.get(host)
    if command == 3:
        flags = fcntl.fcntl(host, fcntl.F_GETFL)
        return flags if opened is None else flags & ~os.O_ACCMODE | opened.access | (os.O_APPEND if opened.append else 0)
    if command == 4:
        if opened is not None:
            opened.append = bool(argument & os.O_APPEND)
            return 0
        return fcntl.fcntl(host, fcntl.F_SETFL, argument & (os.O_NONBLOCK | os.O_APPEND))
    if command in (5, 6, 7):  # locks
        answer = fcntl.fcntl(host, command, process.space.read(argument, 32))
        if command == 5:
            process.space.write(argument, answer)
        return 0
    raise OSError(errno.EINVAL, "fcntl")


def _ioctl(process: Process, number: int, request: int, address: int, *_: int) -> int:
    host = process.files.host(number_of(number))
    request &= 0xFFFFFFFF
    sizes = {0x5401: 36, 0x5413: 8, 0x540F: 4, 0x541B: 4}  # TCGETS, TIOCGWINSZ, TIOCGPGRP, FIONREAD
    writes = {0x5402: 36, 0x5403: 36, 0x5404: 36, 0x5410: 4, 0x5414: 8}  # TCSETS*, TIOCSPGRP, TIOCSWINSZ
    if request in sizes:
        process.space.write(address, fcntl.ioctl(host, request, bytes(sizes[request])))
        return 0
    if request in writes:
        fcntl.ioctl(host, request, process.space.read(address, writes[request]))
        return 0
    raise OSError(errno.ENOTTY, "ioctl")


def _ftruncate(process: Process, number: int, length: int, *_: int) -> int:
    process.files.truncate(process.files.host(number_of(number)), signed(length))
    return 0


def _fsync(process: Process, number: int, *_: int) -> int:
    os.fsync(process.files.host(number_of(number)))
    return 0


def _flock(process: Process, number: int, operation: int, *_: int) -> int:
    fcntl.flock(process.files.host(number_of(number)), operation & 0xF)
    return 0


def _sendfile(process: Process, out: int, source: int, offset: int, length: int, *_: int) -> int:
    files = process.files
    host, target = files.host(number_of(source)), files.host(number_of(out))
    if not stat.S_ISREG(os.fstat(host).st_mode):
        raise OSError(errno.EINVAL, "sendfile")
    if offset:
        (place,) = struct.unpack("<q", process.space.read(offset, 8))
        done = _put(process, target, files.pread(host, min(length, _BULK), place))
        process.space.write(offset, struct.pack("<q", place + done))
        return done
    data = _take(process, host, length)
    done = 0
    while done < len(data):
        done += _put(process, target, data[done:])
    return done


def _fadvise(_process: Process, *_: int) -> int:
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    0: _read, 1: _write, 3: _close, 8: _lseek, 16: _ioctl, 17: _pread, 18: _pwrite, 19: _readv, 20: _writev,
    22: _pipe_plain, 32: _dup, 33: _dup2, 40: _sendfile, 72: _fcntl, 73: _flock, 74: _fsync, 75: _fsync,
    77: _ftruncate, 221: _fadvise, 292: _dup3, 293: _pipe,
}  # fmt: skip
