"""RemoteMachine: the other end of server.py, for programs in Python. It has the methods of machine.Machine.

The server is believed no more than its user: one that another user runs is refused before anything is sent, and whatever it
answers ends in one of the exceptions named here.

    with RemoteMachine("/run/csvfast/processor.sock") as machine:
        block = machine.allocate(4096)
        machine.write(block, LAYOUTS[Command.PLATFORM_STATUS].encode())
        status = machine.command(Command.PLATFORM_STATUS, block)

Thread-safety: any thread; requests of one RemoteMachine go one after the other.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from csvfast.errors import (
    AddressError,
    AllocationError,
    ArgumentError,
    ClosedError,
    FirmwareError,
    FirmwareStatus,
    FormatError,
    InternalError,
    StateError,
)
from csvfast.processor import protocol
from csvfast.processor.buffers import view_of
from csvfast.processor.frames import GuestRange
from csvfast.processor.npt import NestedPageFault
from csvfast.processor.protocol import Operation, ProtocolStatus

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast._core import BytesLike

__all__ = ["RemoteMachine"]

_STATUSES: Final = frozenset(FirmwareStatus)


class RemoteMachine:
    """A machine that another process serves.

    Args: path: of the server's socket. vcpu_path: of its socket for vCPUs, if it has one; guest_read() and guest_write() need it
        then. timeout: seconds one request may take.
    Attributes: cores, asid_max, base_address, size: of the machine. problem: why the last command was refused, or None.
    Raises: OSError (no server, no permission, too slow); StateError: the peer speaks another protocol, or is another user's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vcpu_path: str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.problem: str | None = None
        self._memory: mmap.mmap | None = None
        self._host = _Channel(path, timeout)
        self._vcpu = self._host
        try:
            if vcpu_path is not None:
                self._vcpu = _Channel(vcpu_path, timeout)
            self._hello()
        except BaseException:
            self.close()
            raise

    def _hello(self) -> None:
        descriptors: list[int] = []
        try:
            request = protocol.HELLO_REQUEST.pack(protocol.VERSION)
            status, body = self._host.exchange(Operation.HELLO, request, descriptors)
            if status or len(body) != protocol.HELLO_ANSWER.size or len(descriptors) != 1:
                raise StateError(f"the server does not speak version {protocol.VERSION} of the protocol")
            version, self.cores, self.asid_max, _, self.base_address, self.size = protocol.HELLO_ANSWER.unpack(body)
            if version != protocol.VERSION:
                raise StateError(f"the server speaks version {version} of the protocol; expected {protocol.VERSION}")
            if not self.size:
                raise StateError("the server's DRAM is empty")
            try:
                self._memory = mmap.mmap(descriptors[0], self.size)
            except (ValueError, OverflowError) as problem:
                raise StateError(f"the server's DRAM is smaller than it says ({problem})") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        """Ends the connection; what was allocated and not assigned to a guest is free. Idempotent."""
        self._host.close()
        self._vcpu.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- The machine

    def command(self, command_id: int, buffer_address: int) -> FirmwareStatus:
        """Rings the mailbox. Raises ArgumentError for numbers that no register holds, OSError, InternalError."""
        status, body = self._request(Operation.COMMAND, protocol.COMMAND, command_id, 0, buffer_address)
        if status not in _STATUSES:
            self._done((status, body))
        self.problem = body.decode("utf-8", "replace") if status else None
        return FirmwareStatus(status)

    def ring_doorbell(self, tail: int, head: int | None = None) -> int:
        """Works off the ring buffers; see Mailbox.ring_doorbell."""
        return self._number(self._request(Operation.RING, protocol.RING, tail, head or 0, int(head is not None)), 4)

    def read(self, address: int, length: int) -> bytes:
        """DRAM as the host sees it. Raises AddressError."""
        start = self._offset(address, length)
        return self._mapped()[start : start + length]

    def write(self, address: int, data: BytesLike) -> None:
        """Writes DRAM as the host. Raises AddressError."""
        view = view_of(data)
        start = self._offset(address, view.nbytes)
        self._mapped()[start : start + view.nbytes] = view

    def wbinvd(self, core: int | None = None) -> None:
        """The WBINVD instruction on one core, or on each."""
        self._done(self._request(Operation.WBINVD, protocol.WORD, protocol.EACH_CORE if core is None else core))

    def guest_read(self, handle: int, address: int, length: int) -> bytes:
        """What a guest's vCPU reads; see LocalMachine.guest_read."""
        body = self._done(self._request(Operation.GUEST_READ, protocol.ACCESS, handle, length, address))
        if len(body) != length:
            raise FormatError("server's answer", "body", 16, f"{len(body)} bytes", f"{length} bytes")
        return body

    def guest_write(self, handle: int, address: int, data: BytesLike) -> None:
        """What a guest's vCPU writes."""
        self._done(self._request(Operation.GUEST_WRITE, protocol.ACCESS, handle, 0, address, data=data))

    def allocate(self, size: int, alignment: int = 4096) -> int:
        """Frames nobody else uses, until this connection ends or they are freed or assigned."""
        place = self._number(self._request(Operation.ALLOCATE, protocol.ALLOCATE, size, alignment), 8)
        self._offset(place, size)
        return place

    def free(self, address: int) -> None:
        """Gives them back."""
        self._done(self._request(Operation.FREE, protocol.ADDRESS, address))

    def assign(self, address: int, handle: int, guest_physical: int) -> None:
        """They are a guest's from now on, until it is decommissioned."""
        self._done(self._request(Operation.ASSIGN, protocol.ASSIGN, handle, 0, address, guest_physical))

    def guest_ranges(self, handle: int) -> list[GuestRange]:
        """The frames assigned to a guest."""
        answer = self._request(Operation.GUEST_RANGES, protocol.WORD, handle)
        return [GuestRange(*found) for found in self._rows(answer, protocol.RANGE)]

    def guests(self) -> list[int]:
        """Handles of all guests."""
        return [handle for (handle,) in self._rows(self._host.exchange(Operation.GUESTS, b""), protocol.WORD)]

    # ---- Behind it

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            raise ClosedError("the connection has been closed")
        return self._memory

    def _offset(self, address: int, length: int) -> int:
        start: int = address - self.base_address
        if start < 0 or length < 0 or start > self.size - length:
            raise AddressError(f"{length} bytes at {address:#x} leave the memory of {self.size} bytes")
        return start

    def _request(
        self, operation: Operation, shape: struct.Struct, *values: int, data: BytesLike = b""
    ) -> tuple[int, bytes]:
        try:
            body = shape.pack(*values)
        except struct.error as problem:
            raise ArgumentError(f"{operation.name}: {problem}") from None
        channel = self._vcpu if operation in (Operation.GUEST_READ, Operation.GUEST_WRITE) else self._host
        return channel.exchange(operation, body + view_of(data))

    def _number(self, answer: tuple[int, bytes], size: int) -> int:
        body = self._done(answer)
        if len(body) != size:
            raise FormatError("server's answer", "body", 16, f"{len(body)} bytes", f"{size} bytes")
        return int.from_bytes(body, "little")

    def _rows(self, answer: tuple[int, bytes], shape: struct.Struct) -> list[tuple[int, ...]]:
        body = self._done(answer)
        if len(body) % shape.size:
            raise FormatError("server's answer", "body", 16, f"{len(body)} bytes", f"a multiple of {shape.size}")
        return list(shape.iter_unpack(body))

    @staticmethod
    def _done(answer: tuple[int, bytes]) -> bytes:
        status, body = answer
        if not status:
            return body
        if status == ProtocolStatus.NESTED_PAGE_FAULT and len(body) == protocol.FAULT.size:
            raise NestedPageFault(*protocol.FAULT.unpack(body))
        message = body.decode("utf-8", "replace")
        if status in _STATUSES:
            name = FirmwareStatus(status)
            prefix = f"{name.name} ({name:#04x}): "
            raise FirmwareError(name, message.removeprefix(prefix))
        if status == ProtocolStatus.NO_MEMORY:
            raise AllocationError(message)
        if status == ProtocolStatus.INTERNAL:
            raise InternalError(message)
        raise ArgumentError(message)


class _Channel:
    """One connection: a request and its answer at a time."""

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        self._lock = threading.Lock()
        self._tags = itertools.count(1)
        self._timeout = timeout
        self._socket: socket.socket | None = None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(timeout)
            try:
                connection.connect(os.fspath(path))
            except OSError as problem:  # Python's names no file
                reason = problem.strerror or str(problem)
                raise type(problem)(problem.errno or errno.EIO, reason, os.fspath(path)) from None
            # In a directory that others may write to, anybody can put a socket where the server's should be.
            user = protocol.peer_user(connection)
            if user != os.geteuid():
                raise StateError(f"{os.fspath(path)}: the server belongs to user {user}; expected {os.geteuid()}")
        except BaseException:
            connection.close()
            raise
        self._socket = connection

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def exchange(self, operation: Operation, body: bytes, descriptors: list[int] | None = None) -> tuple[int, bytes]:
        """Status and body of the answer; descriptors that come with it are appended, for the caller to close."""
        with self._lock:
            connection = self._socket
            if connection is None:
                raise ClosedError("the connection has been closed")
            tag = next(self._tags)
            limit = time.monotonic() + self._timeout
            try:
                connection.settimeout(self._timeout)
                connection.sendall(protocol.HEADER.pack(operation, len(body), tag) + body)
                header = _receive(connection, protocol.HEADER.size, limit, descriptors)
                status, length, answered = protocol.HEADER.unpack(header)
                if answered != tag or length > protocol.BODY_MAX:
                    raise FormatError(
                        "server's answer", "tag and length", 4, f"{answered} and {length}", f"{tag} and a length"
                    )
                return status, _receive(connection, length, limit)
            except BaseException:
                # Half an answer may be on its way: nothing that is read after it can be trusted.
                connection.close()
                self._socket = None
                raise


def _receive(connection: socket.socket, length: int, limit: float, descriptors: list[int] | None = None) -> bytes:
    data = bytearray()
    while len(data) < length:
        left = limit - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server is too slow")
        connection.settimeout(left)
        if descriptors is not None and not data:
            chunk, found, _, _ = socket.recv_fds(connection, length, 4, socket.MSG_CMSG_CLOEXEC)
            descriptors.extend(found)
        else:
            chunk = connection.recv(length - len(data))
        if not chunk:
            raise ConnectionResetError("the server closed the connection")
        data += chunk
    return bytes(data)
