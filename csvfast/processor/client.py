"""RemoteMachine: the other end of server.py, for programs in Python. It has the methods of machine.Machine.

    with RemoteMachine("/run/csvfast/processor.sock") as machine:
        block = machine.allocate(4096)
        machine.write(block, LAYOUTS[Command.PLATFORM_STATUS].encode())
        status = machine.command(Command.PLATFORM_STATUS, block)

Thread-safety: any thread; requests of one RemoteMachine go one after the other.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import struct
import threading
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

    Args: path: of the server's socket. timeout: seconds one request may take.
    Attributes: cores, asid_max, base_address, size: of the machine. problem: why the last command was refused, or None.
    Raises: OSError (no server, no permission, too slow); StateError when the peer speaks another protocol.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        self.problem: str | None = None
        self._lock = threading.Lock()
        self._tags = itertools.count(1)
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._memory: mmap.mmap | None = None
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(os.fspath(path))
            self._hello()
        except BaseException:
            self.close()
            raise

    def _hello(self) -> None:
        descriptors: list[int] = []
        status, body = self._exchange(Operation.HELLO, protocol.HELLO_REQUEST.pack(protocol.VERSION), descriptors)
        try:
            if status or len(body) != protocol.HELLO_ANSWER.size or len(descriptors) != 1:
                raise StateError(f"the server does not speak version {protocol.VERSION} of the protocol")
            _, self.cores, self.asid_max, _, self.base_address, self.size = protocol.HELLO_ANSWER.unpack(body)
            try:
                self._memory = mmap.mmap(descriptors[0], self.size)
            except ValueError as problem:
                raise StateError(f"the server's DRAM is smaller than it says ({problem})") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        """Ends the connection; what was allocated and not assigned to a guest is free. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
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
        self.problem = body.decode("utf-8", "replace") if status else None
        return FirmwareStatus(status)

    def ring_doorbell(self, tail: int, head: int | None = None) -> int:
        """Works off the ring buffers; see Mailbox.ring_doorbell."""
        body = self._done(self._request(Operation.RING, protocol.RING, tail, head or 0, int(head is not None)))
        return int.from_bytes(body, "little")

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
        return self._done(self._request(Operation.GUEST_READ, protocol.ACCESS, handle, length, address))

    def guest_write(self, handle: int, address: int, data: BytesLike) -> None:
        """What a guest's vCPU writes."""
        self._done(self._request(Operation.GUEST_WRITE, protocol.ACCESS, handle, 0, address, data=data))

    def allocate(self, size: int, alignment: int = 4096) -> int:
        """Frames nobody else uses, until this connection ends or they are freed or assigned."""
        body = self._done(self._request(Operation.ALLOCATE, protocol.ALLOCATE, size, alignment))
        return int.from_bytes(body, "little")

    def free(self, address: int) -> None:
        """Gives them back."""
        self._done(self._request(Operation.FREE, protocol.ADDRESS, address))

    def assign(self, address: int, handle: int, guest_physical: int) -> None:
        """They are a guest's from now on, until it is decommissioned."""
        self._done(self._request(Operation.ASSIGN, protocol.ASSIGN, handle, 0, address, guest_physical))

    def guest_ranges(self, handle: int) -> list[GuestRange]:
        """The frames assigned to a guest."""
        body = self._done(self._request(Operation.GUEST_RANGES, protocol.WORD, handle))
        return [GuestRange(*found) for found in protocol.RANGE.iter_unpack(body)]

    def guests(self) -> list[int]:
        """Handles of all guests."""
        body = self._done(self._exchange(Operation.GUESTS, b""))
        return [handle for (handle,) in protocol.WORD.iter_unpack(body)]

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
        return self._exchange(operation, body + view_of(data))

    def _exchange(self, operation: Operation, body: bytes, descriptors: list[int] | None = None) -> tuple[int, bytes]:
        with self._lock:
            connection = self._socket
            if connection is None:
                raise ClosedError("the connection has been closed")
            tag = next(self._tags)
            try:
                connection.sendall(protocol.HEADER.pack(operation, len(body), tag) + body)
                header = _receive(connection, protocol.HEADER.size, descriptors)
                status, length, answered = protocol.HEADER.unpack(header)
                if answered != tag or length > protocol.BODY_MAX:
                    raise FormatError(
                        "server's answer", "tag and length", 4, f"{answered} and {length}", f"{tag} and a length"
                    )
                return status, _receive(connection, length)
            except BaseException:
                # Half an answer may be on its way: nothing that is read after it can be trusted.
                connection.close()
                self._socket = None
                raise

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


def _receive(connection: socket.socket, length: int, descriptors: list[int] | None = None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if descriptors is not None and not data:
            chunk, found, _, _ = socket.recv_fds(connection, length, 4)
            descriptors.extend(found)
        else:
            chunk = connection.recv(length - len(data))
        if not chunk:
            raise ConnectionResetError("the server closed the connection")
        data += chunk
    return bytes(data)
