"""System calls about sockets. Unix sockets lie below the root; others are the host's, and only where the run has a network."""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator.syscalls_files import LIBC, number_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS"]

_CLOEXEC: Final = 0o2000000
_BULK: Final = 1 << 17
LIBC.sendto.restype = LIBC.recvfrom.restype = ctypes.c_ssize_t
LIBC.sendto.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
LIBC.recvfrom.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def _check(process: Process, family: int) -> None:
    if family == socket.AF_UNIX or (process.network and family in (socket.AF_INET, socket.AF_INET6)):
        return
    raise OSError(errno.EAFNOSUPPORT, "this run has no such network")


def _socket(process: Process, family: int, kind: int, protocol: int, *_: int) -> int:
    _check(process, number_of(family))
    if number_of(kind) & 0xF not in (1, 2, 5):  # stream, datagram, sequenced packets
        raise OSError(errno.EPROTONOSUPPORT, "socket")
    host = LIBC.socket(number_of(family), number_of(kind) | _CLOEXEC, number_of(protocol))
    return _added(process, host, number_of(kind))


def _added(process: Process, host: int, kind: int) -> int:
    if host < 0:
        raise OSError(ctypes.get_errno(), "socket")
    return process.files.add(host, close_on_exec=bool(kind & _CLOEXEC))


def _socketpair(process: Process, family: int, kind: int, protocol: int, address: int, *_: int) -> int:
    if number_of(family) != socket.AF_UNIX:
        raise OSError(errno.EOPNOTSUPP, "socketpair")
    pair = (ctypes.c_int * 2)()
    if LIBC.socketpair(number_of(family), number_of(kind) | _CLOEXEC, number_of(protocol), pair) < 0:
        raise OSError(ctypes.get_errno(), "socketpair")
    numbers = [_added(process, host, number_of(kind)) for host in pair]
    process.space.write(address, struct.pack("<ii", *numbers))
    return 0


def _host(process: Process, number: int) -> int:
    return process.files.host(number_of(number))


def _address(process: Process, stack: ExitStack, address: int, length: int, *, make: bool = False) -> bytes:
    """The host's form of a guest's address: a Unix socket's path is looked up below the root."""
    if not 2 <= number_of(length) <= 128:
        raise OSError(errno.EINVAL, "address")
    data = process.space.read(address, number_of(length))
    family = int.from_bytes(data[:2], "little")
    _check(process, family)
    if family != socket.AF_UNIX or len(data) == 2:
        return data
    path = data[2:].split(b"\0")[0]
    if not path:
        raise OSError(errno.EACCES, "names without a file are not the machine's")
    where = process.files.absolute(-100, path)
    if make:
        folder, name = stack.enter_context(process.files.parent(where))
        return data[:2] + b"/proc/self/fd/%d/%s\0" % (folder, name)
    return data[:2] + b"/proc/self/fd/%d\0" % stack.enter_context(process.files.at(where, follow=True))


def _bind(process: Process, number: int, address: int, length: int, *_: int) -> int:
    with ExitStack() as stack:
        name = _address(process, stack, address, length, make=True)
        if LIBC.bind(_host(process, number), name, len(name)) < 0:
            raise OSError(ctypes.get_errno(), "bind")
    return 0


def _connect(process: Process, number: int, address: int, length: int, *_: int) -> int:
    with ExitStack() as stack:
        name = _address(process, stack, address, length)
        return process.waiting(LIBC.connect, _host(process, number), name, len(name))


def _listen(process: Process, number: int, backlog: int, *_: int) -> int:
    if LIBC.listen(_host(process, number), number_of(backlog)) < 0:
        raise OSError(ctypes.get_errno(), "listen")
    return 0


def _put_address(process: Process, name: bytes, address: int, length: int) -> None:
    """Tells the guest an address; a Unix socket's is only its family, for the host's path says nothing inside."""
    if not address or not length:
        return
    if name[:2] == b"\1\0":
        name = name[:2]
    (room,) = struct.unpack("<i", process.space.read(length, 4))
    process.space.write(address, name[: max(room, 0)])
    process.space.write(length, struct.pack("<i", len(name)))


def _accept(process: Process, number: int, address: int, length: int, flags: int = 0, *_: int) -> int:
    host = _host(process, number)
    process.ready(host, select.POLLIN)
    name, size = ctypes.create_string_buffer(128), ctypes.c_uint(128)
    found = process.waiting(LIBC.accept4, host, name, ctypes.byref(size), number_of(flags) | _CLOEXEC)
    result = _added(process, found, number_of(flags))
    _put_address(process, name.raw[: size.value], address, length)
    return result


def _accept_old(process: Process, number: int, address: int, length: int, *_: int) -> int:
    return _accept(process, number, address, length, 0)


def _name(call: Any) -> Callable[..., int]:
    def get(process: Process, number: int, address: int, length: int, *_: int) -> int:
        name, size = ctypes.create_string_buffer(128), ctypes.c_uint(128)
        if call(_host(process, number), name, ctypes.byref(size)) < 0:
            raise OSError(ctypes.get_errno(), "name")
        _put_address(process, name.raw[: size.value], address, length)
        return 0

    return get


def _send(process: Process, number: int, data: bytes, flags: int, address: int, length: int) -> int:
    host = _host(process, number)
    if not number_of(flags) & socket.MSG_DONTWAIT:
        process.ready(host, select.POLLOUT)
    with ExitStack() as stack:
        name = _address(process, stack, address, length) if address else None
        return process.waiting(LIBC.sendto, host, data, len(data), number_of(flags), name, len(name or b""))


def _sendto(process: Process, number: int, data: int, size: int, flags: int, address: int, length: int) -> int:
    return _send(process, number, process.space.read(data, min(size, _BULK)), flags, address, length)


def _receive(process: Process, number: int, size: int, flags: int) -> tuple[bytes, bytes]:
    host = _host(process, number)
    if not number_of(flags) & socket.MSG_DONTWAIT:
        process.ready(host, select.POLLIN)
    buffer = ctypes.create_string_buffer(max(min(size, _BULK), 1))
    name, length = ctypes.create_string_buffer(128), ctypes.c_uint(128)
    done = process.waiting(
        LIBC.recvfrom, host, buffer, min(size, _BULK), number_of(flags), ctypes.addressof(name), ctypes.addressof(length)
    )
    return buffer.raw[: min(done, size)], name.raw[: length.value]


def _recvfrom(process: Process, number: int, data: int, size: int, flags: int, address: int, length: int) -> int:
    found, name = _receive(process, number, size, flags)
    process.space.write(data, found)
    _put_address(process, name, address, length)
    return len(found)


def _message(process: Process, address: int) -> tuple[int, int, list[tuple[int, int]], int]:
    name, length, vectors, count, control, size = struct.unpack("<QIxxxxQQQQ", process.space.read(address, 48))
    if count > 1024:
        raise OSError(errno.EMSGSIZE, "vectors")
    words = struct.unpack(f"<{2 * count}Q", process.space.read(vectors, 16 * count))
    return name, length, list(zip(words[::2], words[1::2], strict=True)), size if control else 0


def _sendmsg(process: Process, number: int, address: int, flags: int, *_: int) -> int:
    name, length, vectors, control = _message(process, address)
    if control:
        raise OSError(errno.EOPNOTSUPP, "no descriptors travel")
    data = bytearray()
    for start, size in vectors:
        data += process.space.read(start, min(size, _BULK - len(data)))
    return _send(process, number, bytes(data), flags, name, length)


def _recvmsg(process: Process, number: int, address: int, flags: int, *_: int) -> int:
    name, _length, vectors, _control = _message(process, address)
    found, source = _receive(process, number, sum(size for _, size in vectors), flags)
    place = 0
    for start, wanted in vectors:
        part = found[place : place + wanted]
        process.space.write(start, part)
        place += len(part)
    _put_address(process, source, name, address + 8)
    process.space.write(address + 40, struct.pack("<Qi", 0, 0))  # no control data, no flags
    return len(found)


def _shutdown(process: Process, number: int, how: int, *_: int) -> int:
    if LIBC.shutdown(_host(process, number), number_of(how)) < 0:
        raise OSError(ctypes.get_errno(), "shutdown")
    return 0


def _setsockopt(process: Process, number: int, level: int, name: int, address: int, length: int, *_: int) -> int:
    value = process.space.read(address, min(number_of(length), 1024))
    if LIBC.setsockopt(_host(process, number), number_of(level), number_of(name), value, len(value)) < 0:
        raise OSError(ctypes.get_errno(), "setsockopt")
    return 0


def _getsockopt(process: Process, number: int, level: int, name: int, address: int, length: int, *_: int) -> int:
    (room,) = struct.unpack("<i", process.space.read(length, 4))
    value, size = ctypes.create_string_buffer(1024), ctypes.c_uint(max(min(room, 1024), 0))
    if LIBC.getsockopt(_host(process, number), number_of(level), number_of(name), value, ctypes.byref(size)) < 0:
        raise OSError(ctypes.get_errno(), "getsockopt")
    process.space.write(address, value.raw[: size.value])
    process.space.write(length, struct.pack("<i", size.value))
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    41: _socket, 42: _connect, 43: _accept_old, 44: _sendto, 45: _recvfrom, 46: _sendmsg, 47: _recvmsg, 48: _shutdown, 49: _bind,
    50: _listen, 51: _name(LIBC.getsockname), 52: _name(LIBC.getpeername), 53: _socketpair, 54: _setsockopt, 55: _getsockopt,
    288: _accept,
}  # fmt: skip
