"""A /dev/csv-guest for programs that know only that: a character device made in user space, answered over the channel.

Where the kernel offers CUSE (module cuse) the device is real: the ioctls of the kernel's driver, with the addresses of the
caller's buffers in them, which the kernel hands over on demand. Where it does not, the same structures go over a Unix socket:
    request   i32 ioctl number, u32 length of the argument, u32 length of the buffer; argument; buffer
    answer    i32 0 or a negative errno, u32, u32; argument; buffer (none when refused)

Sources: torvalds/linux include/uapi/linux/fuse.h, fs/fuse/cuse.c, fs/fuse/ioctl.c (protocol 7.31);
anolis-cloud-kernel drivers/virt/coco/csv-guest/csv-guest.c. Thread-safety: serve() belongs to one thread; close() to any.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from csvfast.errors import CsvfastError, FirmwareError, FormatError
from csvfast.machine.guest.page import PAGE, RequestPage
from csvfast.machine.guest.transport import SOCKET_HEADER, Transport
from csvfast.processor.ioctl import CSV_GUEST_GET_REPORT, CSV_GUEST_RTMR_REQUEST, ReportArgument, RtmrArgument

__all__ = ["CUSE", "CuseDevice", "DeviceRequests", "SocketDevice"]

CUSE: Final = "/dev/cuse"
NAME: Final = "csv-guest"

_IN: Final = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
_OUT: Final = struct.Struct("<IiQ")  # length, error, unique
_INIT_IN: Final = struct.Struct("<IIII")  # major, minor, unused, flags
_INIT_OUT: Final = struct.Struct("<IIIIIIII40x")  # major, minor, unused, flags, max read, max write, device's major and minor
_OPEN_OUT: Final = struct.Struct("<QII")
_IOCTL_IN: Final = struct.Struct("<QIIQII")  # handle, flags, command, argument, size in, size out
_IOCTL_OUT: Final = struct.Struct("<iIII")  # result, flags, ranges in, ranges out
_RANGE: Final = struct.Struct("<QQ")

_OPEN, _RELEASE, _FSYNC, _FLUSH, _INTERRUPT, _DESTROY, _IOCTL, _CUSE_INIT = 14, 18, 20, 25, 36, 38, 39, 4096
_UNRESTRICTED: Final = 1  # CUSE_UNRESTRICTED_IOCTL
_COMPAT: Final = 1  # FUSE_IOCTL_COMPAT: a 32-bit caller
_RETRY: Final = 4  # FUSE_IOCTL_RETRY
_MAJOR, _MINOR = 7, 31
_WRITE_MAX: Final = 4096
_BUFFER: Final = 1 << 17
_REPORT_LEAST: Final = 112
_RTMR_LEAST: Final = 8

_ARGUMENTS: Final[dict[int, type[ReportArgument] | type[RtmrArgument]]] = {
    CSV_GUEST_GET_REPORT: ReportArgument,
    CSV_GUEST_RTMR_REQUEST: RtmrArgument,
}


class DeviceRequests:
    """What the device does with an ioctl, wherever it came from."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    @staticmethod
    def argument_size(command: int) -> int | None:
        """Bytes of the ioctl's argument; None: no such ioctl."""
        return {CSV_GUEST_GET_REPORT: 16, CSV_GUEST_RTMR_REQUEST: 24}.get(command)

    @staticmethod
    def buffer_of(command: int, argument: bytes) -> tuple[int, int] | None:
        """Address and length of the caller's buffer; None: a length that the device does not take."""
        found = _ARGUMENTS[command].unpack(argument)
        least = _REPORT_LEAST if command == CSV_GUEST_GET_REPORT else _RTMR_LEAST
        return (found.address, found.length) if least <= found.length <= PAGE else None

    def answer(self, command: int, argument: bytes, buffer: bytes | memoryview) -> tuple[int, bytes, bytearray]:
        """Has the request in the buffer answered. Out: 0 or a negative errno, the argument, the buffer."""
        with RequestPage() as page:
            page.write(bytes(buffer))
            result = 0
            try:
                if command == CSV_GUEST_GET_REPORT:
                    self.transport.attestation(page)
                else:
                    self.transport.rtmr(page, RtmrArgument.unpack(argument).subcommand, len(buffer))
            except FirmwareError as refusal:
                result = -errno.EIO
                if command == CSV_GUEST_RTMR_REQUEST:
                    argument = RtmrArgument.unpack(argument)._replace(error=int(refusal.status)).pack()
            except OSError as problem:
                result = -(problem.errno or errno.EIO)
            except CsvfastError:
                result = -errno.EIO
            return result, argument, bytearray(memoryview(page.memory)[: len(buffer)])


class CuseDevice:
    """/dev/csv-guest as long as serve() runs.

    In: requests  answers the ioctls
        ready     called once when the device is there
    Raises: FileNotFoundError: the kernel has no CUSE, or its module is not loaded; PermissionError.
    """

    def __init__(
        self, requests: DeviceRequests, *, name: str = NAME, path: str = CUSE, ready: Callable[[], None] = lambda: None
    ) -> None:
        self.requests = requests
        self.name = name
        self._ready = ready
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._stop, self._stopped = os.pipe2(os.O_CLOEXEC)

    def serve(self) -> None:
        """Answers until close(). Raises OSError: the kernel has ended the device."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._stop in events:
                return
            if events.get(self._descriptor, 0) & (select.POLLERR | select.POLLHUP):
                raise ConnectionResetError(errno.ECONNRESET, "the kernel has ended the device", f"/dev/{self.name}")
            try:
                message = os.read(self._descriptor, _BUFFER)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as problem:
                if problem.errno == errno.ENOENT:  # taken back before it was read
                    continue
                raise
            answer = self.respond(message)
            if answer is not None:
                try:
                    os.write(self._descriptor, answer)
                except OSError as problem:
                    if problem.errno != errno.ENOENT:  # its caller has died meanwhile
                        raise
                answer[:] = bytes(len(answer))  # it may hold a sealing key
                if message[4:8] == _CUSE_INIT.to_bytes(4, "little"):
                    self._ready()

    def respond(self, message: bytes) -> bytearray | None:
        """The answer to one message of the kernel's; None: there is none. FormatError: a torn message, an unknown protocol."""
        if len(message) < _IN.size:
            raise FormatError("CUSE message", "length", None, f"{len(message)} bytes", f"at least {_IN.size}")
        length, opcode, unique, *_ = _IN.unpack_from(message)
        body = message[_IN.size : length]
        if length != len(message):
            raise FormatError("CUSE message", "length", 0, f"{length} of {len(message)} bytes", "the whole message")
        if opcode == _CUSE_INIT:
            return self._init(unique, body)
        if opcode == _OPEN:
            return _reply(unique, _OPEN_OUT.pack(0, 0, 0))
        if opcode == _IOCTL:
            return self._ioctl(unique, body)
        if opcode in (_RELEASE, _FLUSH, _FSYNC, _DESTROY):
            return _reply(unique, b"")
        if opcode == _INTERRUPT:
            return None  # a request takes milliseconds
        return _failure(unique, errno.ENOSYS)

    def close(self) -> None:
        """Ends serve(), and the device with it. Idempotent; the descriptors go with the object."""
        if self._stopped >= 0:
            os.close(self._stopped)  # the other end becomes readable
            self._stopped = -1

    def _init(self, unique: int, body: bytes) -> bytearray:
        major, minor, *_ = _INIT_IN.unpack_from(body)
        if (major, minor) < (_MAJOR, 16):
            raise FormatError("CUSE", "protocol", 40, f"{major}.{minor}", f"{_MAJOR}.16 or newer")
        fixed = _INIT_OUT.pack(_MAJOR, min(minor, _MINOR), 0, _UNRESTRICTED, PAGE, _WRITE_MAX, 0, 0)
        return _reply(unique, fixed, f"DEVNAME={self.name}\0".encode())

    def _ioctl(self, unique: int, body: bytes) -> bytearray:
        _, flags, command, place, size_in, size_out = _IOCTL_IN.unpack_from(body)
        data = body[_IOCTL_IN.size :]
        size = self.requests.argument_size(command)
        if size is None or flags & _COMPAT:
            return _failure(unique, errno.ENOTTY)
        if size_in < size:  # first the argument is wanted
            return _retry(unique, [(place, size)], [])
        argument = data[:size]
        buffer = self.requests.buffer_of(command, argument)
        if buffer is None:
            return _failure(unique, errno.EINVAL)
        ranges = [(place, size), buffer]
        length = buffer[1]
        if size_in != size + length or size_out != size + length:  # then what it points to
            return _retry(unique, ranges, ranges)
        result, argument, answered = self.requests.answer(command, argument, data[size : size + length])
        out = _reply(unique, _IOCTL_OUT.pack(result, 0, 0, 0), argument, answered)
        answered[:] = bytes(length)
        return out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        for descriptor in (getattr(self, "_descriptor", -1), getattr(self, "_stop", -1), getattr(self, "_stopped", -1)):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._stop = self._stopped = -1


class SocketDevice:
    """The device's structures on a Unix socket, mode 0600. One caller after another.

    In: path  of the socket; a stale one is replaced
    """

    def __init__(
        self, requests: DeviceRequests, path: str | os.PathLike[str], *, ready: Callable[[], None] = lambda: None
    ) -> None:
        self.requests = requests
        self.path = Path(path)
        self._ready = ready
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stop, self._stopped = os.pipe2(os.O_CLOEXEC)
        try:
            if self.path.is_socket():
                self.path.unlink()
            old = os.umask(0o177)
            try:
                self._listener.bind(os.fspath(self.path))
            finally:
                os.umask(old)
            self._listener.listen(8)
        except OSError:
            self._listener.close()
            raise

    def serve(self) -> None:
        """Answers until close()."""
        self._ready()
        try:
            while self._may_read(self._listener):
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(10)  # of silence in the middle of a request
                    try:
                        while self._may_read(connection) and self._answer(connection):
                            pass
                    except (OSError, FormatError):
                        continue  # that caller's own affair
        finally:
            self._listener.close()
            self.path.unlink(missing_ok=True)

    def _may_read(self, endpoint: socket.socket) -> bool:
        """Waits. False: close() was called."""
        poll = select.poll()
        poll.register(endpoint, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        return self._stop not in dict(poll.poll())

    def _answer(self, connection: socket.socket) -> bool:
        head = _exactly(connection, SOCKET_HEADER.size)
        if not head:
            return False
        number, argument_length, length = SOCKET_HEADER.unpack(head)
        command = number & 0xFFFFFFFF
        size = self.requests.argument_size(command)
        if size is None:
            connection.sendall(SOCKET_HEADER.pack(-errno.ENOTTY, 0, 0))
            return False  # how long the rest is, nobody knows
        if argument_length != size or length > PAGE:
            connection.sendall(SOCKET_HEADER.pack(-errno.EINVAL, 0, 0))
            return False
        argument = _exactly(connection, size)
        buffer = _exactly(connection, length)
        wanted = self.requests.buffer_of(command, argument) if len(argument) == size else None
        if len(buffer) != length or wanted is None or wanted[1] != length:
            connection.sendall(SOCKET_HEADER.pack(-errno.EINVAL, size, 0) + argument)
            return False
        result, argument, answered = self.requests.answer(command, argument, buffer)
        connection.sendall(SOCKET_HEADER.pack(result, size, 0 if result else length) + argument)
        if not result:
            connection.sendall(answered)
        answered[:] = bytes(length)
        return True

    def close(self) -> None:
        """Ends serve(), and removes the socket with it. Idempotent."""
        if self._stopped >= 0:
            os.close(self._stopped)
            self._stopped = -1

    def __del__(self) -> None:
        if hasattr(self, "_listener"):
            self._listener.close()
        for descriptor in (getattr(self, "_stop", -1), getattr(self, "_stopped", -1)):
            if descriptor >= 0:
                os.close(descriptor)
        self._stop = self._stopped = -1


def _exactly(connection: socket.socket, length: int) -> bytes:
    """Empty or short: the caller has gone."""
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            return data if len(data) == length else b""
        data += more
    return data


def _reply(unique: int, *parts: bytes | bytearray) -> bytearray:
    size = _OUT.size + sum(map(len, parts))
    return bytearray().join((_OUT.pack(size, 0, unique), *parts))


def _failure(unique: int, number: int) -> bytearray:
    return bytearray(_OUT.pack(_OUT.size, -number, unique))


def _retry(unique: int, ranges_in: list[tuple[int, int]], ranges_out: list[tuple[int, int]]) -> bytearray:
    ranges = b"".join(_RANGE.pack(*item) for item in (*ranges_in, *ranges_out))
    return _reply(unique, _IOCTL_OUT.pack(0, _RETRY, len(ranges_in), len(ranges_out)), ranges)
