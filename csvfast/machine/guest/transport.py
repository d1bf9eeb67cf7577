"""Ways for a request page to the processor: the channel itself, a /dev/csv-guest, or our helper's socket. A CSV3 guest has
another one, in secure_call.py.

Sources: anolis-cloud-kernel drivers/virt/coco/csv-guest/csv-guest.c; csvfast.processor.ioctl.
Thread-safety: one request at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from struct import Struct
from typing import Final, Protocol

from csvfast.errors import FirmwareError, FirmwareStatus, FormatError, StateError
from csvfast.machine.guest.channel import ChannelOperation, ProcessorChannel
from csvfast.machine.guest.page import PAGE, RequestPage
from csvfast.processor.ioctl import CSV_GUEST_GET_REPORT, CSV_GUEST_RTMR_REQUEST, ReportArgument, RtmrArgument

__all__ = ["DEVICE", "SOCKET", "ChannelTransport", "DeviceTransport", "SocketTransport", "Transport"]

DEVICE: Final = "/dev/csv-guest"
SOCKET: Final = "/run/csv-guest.sock"
# A helper's message: ioctl number or result, length of the argument, length of the buffer; then both.
SOCKET_HEADER: Final = Struct("<iII")

_MOVES: Final = 4  # tries with a page that the kernel moves


class Transport(Protocol):
    """Has the request in a page answered in place."""

    def attestation(self, page: RequestPage) -> None:
        """A report request. FirmwareError: refused; OSError: nobody there."""
        ...

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        """An RTMR request of `length` bytes. FirmwareError: refused as a whole; else the page holds the firmware's answer."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class ChannelTransport:
    """Straight to the host's end of the channel, for CSV and CSV2 guests. Needs root, for the page's physical address."""

    def __init__(self, channel: ProcessorChannel) -> None:
        self.channel = channel

    def attestation(self, page: RequestPage) -> None:
        """See Transport. StateError: the kernel moved the page each time."""
        self._call(ChannelOperation.ATTESTATION, page, PAGE)

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        """See Transport: refused, since registers are reached by secure calls (secure_call.py) of CSV3 guests alone."""
        del subcommand
        self._call(ChannelOperation.SECURE_CALL, page, length)

    def close(self) -> None:
        """See Transport."""
        self.channel.close()

    def _call(self, operation: ChannelOperation, page: RequestPage, length: int) -> None:
        request = page.memory[:]
        for _ in range(_MOVES):
            address = page.address
            try:
                self.channel.call(operation, address, length)
            except FirmwareError:
                if page.address == address:
                    raise
                continue  # the firmware was shown another page
            # Moved with the answer in it, or before: then another page was answered, and this one still holds the request.
            if page.address == address or page.memory[:] != request:
                return
        raise StateError("the kernel moves the request page; expected vm.compact_unevictable_allowed = 0")


class DeviceTransport:
    """Through a device: the kernel's own, or one of csvfast.machine.guest.device."""

    def __init__(self, path: str | os.PathLike[str] = DEVICE) -> None:
        self.path = os.fspath(path)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def attestation(self, page: RequestPage) -> None:
        """See Transport. What the firmware says is lost here: a device gives a plain OSError."""
        self._ioctl(CSV_GUEST_GET_REPORT, bytearray(ReportArgument(page.virtual_address, PAGE).pack()))

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        """See Transport."""
        argument = bytearray(RtmrArgument(page.virtual_address, length, subcommand).pack())
        try:
            self._ioctl(CSV_GUEST_RTMR_REQUEST, argument)
        except OSError:
            _refused(argument)
            raise
        _refused(argument)

    def close(self) -> None:
        """See Transport."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _ioctl(self, number: int, argument: bytearray) -> None:
        try:
            fcntl.ioctl(self._descriptor, number, argument)
        except OSError as problem:  # Python's names no file
            raise type(problem)(problem.errno or errno.EIO, problem.strerror or str(problem), self.path) from None


class SocketTransport:
    """Through the helper's socket, which takes the same structures where no device can be made. See docs/guest.md."""

    def __init__(self, path: str | os.PathLike[str] = SOCKET, *, timeout: float = 60.0) -> None:
        self.path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(self.path)
        except OSError as problem:
            self._socket.close()
            raise type(problem)(problem.errno or errno.EIO, problem.strerror or str(problem), self.path) from None

    def attestation(self, page: RequestPage) -> None:
        """See Transport."""
        self._call(CSV_GUEST_GET_REPORT, ReportArgument(0, PAGE).pack(), page, PAGE)

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        """See Transport."""
        self._call(CSV_GUEST_RTMR_REQUEST, RtmrArgument(0, length, subcommand).pack(), page, length)

    def close(self) -> None:
        """See Transport."""
        self._socket.close()

    def _call(self, number: int, argument: bytes, page: RequestPage, length: int) -> None:
        header = SOCKET_HEADER.pack(number - (1 << 32) if number >= 1 << 31 else number, len(argument), length)
        self._socket.sendall(header + argument)
        with memoryview(page.memory) as whole, whole[:length] as part:
            self._socket.sendall(part)
            result, argument_length, buffer_length = SOCKET_HEADER.unpack(self._exactly(SOCKET_HEADER.size))
            if argument_length != len(argument) or buffer_length not in (0, length):
                found = f"{argument_length} and {buffer_length} bytes"
                raise FormatError("guest helper", "lengths", 4, found, f"{len(argument)} and {length} bytes")
            answered = bytearray(self._exactly(argument_length))
            done = 0
            while done < buffer_length:  # straight into the page: it may hold a key
                count = self._socket.recv_into(part[done:])
                if not count:
                    raise ConnectionResetError(errno.ECONNRESET, "the helper has gone", self.path)
                done += count
        if number == CSV_GUEST_RTMR_REQUEST:
            _refused(answered)
        if result:
            raise OSError(-result, os.strerror(-result), self.path)

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "the helper has gone", self.path)
            data += more
        return data


def _refused(argument: bytearray) -> None:
    """Raises FirmwareError when the argument of an RTMR request says so."""
    error = RtmrArgument.unpack(argument).error
    if error:
        try:
            status = FirmwareStatus(error)
        except ValueError:
            raise FormatError("RTMR argument", "error", 20, f"{error:#x}", "a status of the firmware") from None
        raise FirmwareError(status, "the processor refuses RTMR")
