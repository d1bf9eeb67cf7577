"""One process that owns a security processor and its DRAM; VMMs and simulators in other processes use it over a Unix socket.

The DRAM is a file or an anonymous memory file whose descriptor every client gets and maps: it holds what a host sees,
ciphertext where guests live. Keys stay here. protocol.py describes the messages.

A socket has mode 0600, and a peer of another user is turned away before it can say anything (SO_PEERCRED). Each connection
has a thread of its own: a slow, silent, garbled or half-closed one disturbs nobody else.

What a vCPU does is plaintext of guests for whoever may ask. It can have a socket of its own (`vcpu_path`): a VMM under test then
gets only the other one, and is as far from the guests' plaintext as a host is.

Thread-safety: serve() belongs to one thread; stop() may be called from any thread or signal handler.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from csvfast.errors import AllocationError, ArgumentError, CsvfastError, FirmwareError, StateError
from csvfast.memory import EncryptedMemory
from csvfast.processor import protocol
from csvfast.processor.npt import NestedPageFault
from csvfast.processor.protocol import Operation, ProtocolStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from csvfast.processor.machine import LocalMachine

    _Operation = Callable[[LocalMachine, bytes, object], bytes]

__all__ = ["ProcessorServer", "SharedMemory", "open_shared_memory"]

CONNECTIONS_MAX: Final = 64
MESSAGE_SECONDS: Final = 10.0
ACCEPT_PAUSE: Final = 0.1  # when descriptors or memory are short: trying again at once would only burn a core
_JOIN_SECONDS: Final = 5.0
_PATH_MAX: Final = 107  # sun_path, less the final NUL


class SharedMemory(NamedTuple):
    """An EncryptedMemory and the descriptor by which clients map the same bytes; the caller closes both. `lock`: a descriptor
    that holds the file's lock, None for anonymous memory."""

    memory: EncryptedMemory
    descriptor: int
    lock: int | None = None

    def close(self) -> None:
        """Closes everything."""
        self.memory.close()
        os.close(self.descriptor)
        if self.lock is not None:
            os.close(self.lock)


def open_shared_memory(size: int | None, path: Path | None = None, *, asid_max: int = 509) -> SharedMemory:
    """DRAM to share: on a file (made with `size` bytes, or an existing one), or on anonymous memory that nobody can shrink.

    A file is locked against a second server, but whoever may write to it can also truncate it, and the next access to what is
    gone ends this process with SIGBUS, as a power failure ends a machine. Anonymous memory is sealed.

    Raises: those of EncryptedMemory; ArgumentError when neither size nor path is given; StateError: another server has the file.
    """
    if path is not None:
        memory = EncryptedMemory(size, path=path, asid_max=asid_max)
        opened: list[int] = []
        try:
            # Two: a lock goes with its open file, and clients keep the one that they are given.
            opened.extend(os.open(path, os.O_RDWR | os.O_CLOEXEC) for _ in range(2))
            try:
                fcntl.flock(opened[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(f"{path}: another server has this memory") from None
            return SharedMemory(memory, *opened)
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            memory.close()
            raise
    if size is None:
        raise ArgumentError("the memory's size is missing; expected a size, or a file that exists")
    descriptor = os.memfd_create("csvfast-dram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, max(size, 0))
        # A client that truncates its mapping must not make this process die of SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return SharedMemory(EncryptedMemory(size, path=f"/proc/self/fd/{descriptor}", asid_max=asid_max), descriptor)
    except BaseException:
        os.close(descriptor)
        raise


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ProcessorServer:
    """Serves one machine until stop().

    Args:
        machine: the processor and what is around it. descriptor: of its DRAM, handed to clients; stays the caller's.
        path: of the socket. A stale one, left by a killed server, is replaced; anything else there is an error.
        vcpu_path: of a second socket, for GUEST_READ and GUEST_WRITE only, which the first one then refuses.
    Raises: ArgumentError (path too long), StateError (another server answers there, or it is no socket), OSError.
    """

    def __init__(
        self,
        machine: LocalMachine,
        descriptor: int,
        path: str | os.PathLike[str],
        *,
        vcpu_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.vcpu_path = None if vcpu_path is None else Path(vcpu_path)
        self._machine = machine
        self._descriptor = descriptor
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        self._stopping = False
        self._idle = threading.Event()
        self._idle.set()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._doors: list[_Door] = []
        try:
            if self.vcpu_path is None:
                self._doors.append(_Door(self.path, _OPERATIONS))
            else:
                self._doors.append(_Door(self.path, _HOST_OPERATIONS))
                self._doors.append(_Door(self.vcpu_path, _VCPU_OPERATIONS))
        except BaseException:
            for door in self._doors:
                door.close()
            os.close(self._wake_in)
            os.close(self._wake_out)
            raise

    def serve(self) -> None:
        """Accepts connections until stop() is called."""
        with self._guard:  # close() in another thread sees this loop, or this loop sees close()
            if self._stopping:
                return
            self._idle.clear()
        try:
            with selectors.DefaultSelector() as selector:
                for door in self._doors:
                    selector.register(door.listener, selectors.EVENT_READ, door)
                selector.register(self._wake_in, selectors.EVENT_READ)
                while not self._stopping:
                    for key, _ in selector.select():
                        if key.data is not None and not self._accept(key.data):
                            time.sleep(ACCEPT_PAUSE)
        finally:
            self._idle.set()

    def stop(self) -> None:
        """Makes serve() return. Safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_out, b"\0")

    def close(self) -> None:
        """Ends every connection and removes the sockets. The machine stays as it is."""
        self.stop()
        with self._guard:  # a serve() that comes later sees that it is too late
            idle = self._idle
        # A selector forgets descriptors that are closed under it: serve() in another thread would never wake.
        idle.wait(_JOIN_SECONDS)
        for door in self._doors:
            door.close()
        with self._guard:
            open_ones = dict(self._connections)
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in open_ones.values():
            thread.join(_JOIN_SECONDS)
        descriptors = (self._wake_in, self._wake_out)
        self._wake_in = self._wake_out = -1
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- Connections

    def _accept(self, door: _Door) -> bool:
        """Takes one connection. False: the system has no room for it now, and it waits still."""
        try:
            connection, _ = door.listener.accept()
        except OSError as problem:  # it went away again, or descriptors are short: the others matter more
            return problem.errno not in _SHORTAGES
        with self._guard:
            full = len(self._connections) >= CONNECTIONS_MAX
        if full or not _same_user(connection):
            connection.close()
            return True
        thread = threading.Thread(target=self._talk, args=(connection, door), name="csvfast-client", daemon=True)
        with self._guard:
            self._connections[connection] = thread
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # no more threads: one client less, not the end of all
            with self._guard:
                del self._connections[connection]
            connection.close()
            return False
        return True

    def _talk(self, connection: socket.socket, door: _Door) -> None:
        try:
            while not self._stopping and self._exchange(connection, door.operations):
                pass
        except (OSError, EOFError):
            pass  # a client that left, stopped in the middle, or does not read its answers
        finally:
            self._machine.release_holder(connection)
            with self._guard:
                self._connections.pop(connection, None)
            connection.close()

    def _exchange(self, connection: socket.socket, operations: Mapping[int, _Operation]) -> bool:
        """One request and its answer. False: the connection ends."""
        header, limit = _receive_header(connection)
        if not header:
            return False
        code, length, tag = protocol.HEADER.unpack(header)
        if length > protocol.BODY_MAX:
            _answer(connection, ProtocolStatus.BAD_REQUEST, tag, f"a body of {length} bytes".encode())
            return False
        body = _receive(connection, bytearray(length), limit)
        try:
            operation = operations.get(code)
            if operation is None:
                if code in _OPERATIONS:
                    raise _RefusedError(ProtocolStatus.WRONG_SOCKET, f"this socket is not for operation {code}")
                raise _RefusedError(ProtocolStatus.UNKNOWN_OPERATION, f"there is no operation {code}")
            answer = operation(self._machine, body, connection)
            status = 0
            if len(answer) > protocol.BODY_MAX:
                raise _RefusedError(ProtocolStatus.NO_MEMORY, f"an answer of {len(answer)} bytes is too long")
        except _RefusedError as refusal:
            status, answer = refusal.status, str(refusal).encode()
        except FirmwareError as refusal:
            status, answer = int(refusal.status), str(refusal).encode()
        except NestedPageFault as fault:
            status, answer = ProtocolStatus.NESTED_PAGE_FAULT, protocol.FAULT.pack(fault.gpa, fault.error_code)
        except AllocationError as refusal:
            status, answer = ProtocolStatus.NO_MEMORY, str(refusal).encode()
        except (CsvfastError, ValueError, struct.error) as refusal:
            status, answer = ProtocolStatus.BAD_REQUEST, str(refusal).encode()
        except Exception as defect:
            # One request met a defect; the guests of everybody else are still alive in here.
            status, answer = ProtocolStatus.INTERNAL, f"{type(defect).__name__}: {defect}".encode()
        if code == Operation.HELLO and status == 0:
            _answer(connection, status, tag, answer, self._descriptor)
        else:
            _answer(connection, status, tag, answer if status == 0 else answer[: protocol.TEXT_MAX])
        return True


# ---- Operations -----------------------------------------------------------------------------------------------------


def _fields(shape: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != shape.size:
        raise _RefusedError(ProtocolStatus.BAD_REQUEST, f"the body has {len(body)} bytes; expected {shape.size}")
    return shape.unpack(body)


def _zero(word: int) -> None:
    if word:
        raise _RefusedError(ProtocolStatus.BAD_REQUEST, f"a reserved word is {word:#x}; expected 0")


def _hello(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    (version,) = _fields(protocol.HELLO_REQUEST, body)
    if version != protocol.VERSION:
        raise _RefusedError(ProtocolStatus.BAD_REQUEST, f"version {version} is asked for; this is {protocol.VERSION}")
    memory = machine.memory
    cores = machine.processor.options.cores
    return protocol.HELLO_ANSWER.pack(protocol.VERSION, cores, memory.asid_max, 0, memory.base_address, memory.size)


def _command(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    command, reserved, address = _fields(protocol.COMMAND, body)
    _zero(reserved)
    with machine.processor.lock:  # the reason must be this command's, not the next one's
        status = machine.command(command, address)
        if status:
            raise _RefusedError(int(status), machine.problem or status.name)
    return b""


def _ring(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    tail, head, given = _fields(protocol.RING, body)
    return protocol.WORD.pack(machine.ring_doorbell(tail, head if given else None))


def _wbinvd(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    (core,) = _fields(protocol.WORD, body)
    machine.wbinvd(None if core == protocol.EACH_CORE else core)
    return b""


def _guest_read(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    handle, length, address = _fields(protocol.ACCESS, body)
    return machine.guest_read(handle, address, length)


def _guest_write(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    handle, reserved, address = _fields(protocol.ACCESS, body[: protocol.ACCESS.size])
    _zero(reserved)
    machine.guest_write(handle, address, memoryview(body)[protocol.ACCESS.size :])
    return b""


def _allocate(machine: LocalMachine, body: bytes, holder: object) -> bytes:
    size, alignment = _fields(protocol.ALLOCATE, body)
    return protocol.ADDRESS.pack(machine.allocate(size, alignment, holder=holder))


def _free(machine: LocalMachine, body: bytes, holder: object) -> bytes:
    (address,) = _fields(protocol.ADDRESS, body)
    machine.free(address, holder=holder)
    return b""


def _assign(machine: LocalMachine, body: bytes, holder: object) -> bytes:
    handle, reserved, address, guest_physical = _fields(protocol.ASSIGN, body)
    _zero(reserved)
    machine.assign(address, handle, guest_physical, holder=holder)
    return b""


def _guest_ranges(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    (handle,) = _fields(protocol.WORD, body)
    return b"".join(protocol.RANGE.pack(*found) for found in machine.guest_ranges(handle))


def _guests(machine: LocalMachine, body: bytes, _holder: object) -> bytes:
    if body:
        raise _RefusedError(ProtocolStatus.BAD_REQUEST, f"the body has {len(body)} bytes; expected none")
    return b"".join(protocol.WORD.pack(handle) for handle in machine.guests())


_OPERATIONS: Final[Mapping[int, _Operation]] = {
    Operation.HELLO: _hello,
    Operation.COMMAND: _command,
    Operation.RING: _ring,
    Operation.WBINVD: _wbinvd,
    Operation.GUEST_READ: _guest_read,
    Operation.GUEST_WRITE: _guest_write,
    Operation.ALLOCATE: _allocate,
    Operation.FREE: _free,
    Operation.ASSIGN: _assign,
    Operation.GUEST_RANGES: _guest_ranges,
    Operation.GUESTS: _guests,
}
_VCPU_OPERATIONS: Final[Mapping[int, _Operation]] = {
    Operation.GUEST_READ: _guest_read,
    Operation.GUEST_WRITE: _guest_write,
}
_HOST_OPERATIONS: Final[Mapping[int, _Operation]] = {
    code: operation for code, operation in _OPERATIONS.items() if code not in _VCPU_OPERATIONS
}


# ---- Socket ---------------------------------------------------------------------------------------------------------

_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Door:
    """A listening socket and what may be asked there."""

    def __init__(self, path: Path, operations: Mapping[int, _Operation]) -> None:
        self.operations = operations
        self.path = path
        self.listener = _listen(path)
        status = path.lstat()
        self._inode = (status.st_dev, status.st_ino)

    def close(self) -> None:
        """Removes the socket unless somebody else's stands there by now. Idempotent."""
        self.listener.close()
        with contextlib.suppress(FileNotFoundError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()


def _listen(path: Path) -> socket.socket:
    encoded = os.fsencode(path)
    if len(encoded) > _PATH_MAX:
        raise ArgumentError(f"socket path {path} has {len(encoded)} bytes; expected at most {_PATH_MAX}")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The mode is right from the first moment on, not after a chmod.
    mask = os.umask(0o177)
    try:
        listener.bind(encoded)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise StateError(f"{path} exists and is no socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as problem:  # a full backlog, somebody else's socket: not stale as far as we know
            raise StateError(f"{path}: cannot tell whether a server uses this socket ({problem})") from problem
    raise StateError(f"{path}: another server answers there")


def _same_user(connection: socket.socket) -> bool:
    return protocol.peer_user(connection) == os.geteuid()


def _receive_header(connection: socket.socket) -> tuple[bytes, float]:
    """The next message's header, whose first byte may take any time, and when the whole message must have arrived. b"": the peer
    closed in order. Raises: those of _receive()."""
    data = bytearray(protocol.HEADER.size)
    connection.settimeout(None)
    count = connection.recv_into(data)
    limit = time.monotonic() + MESSAGE_SECONDS
    return (_receive(connection, data, limit, count) if count else b""), limit


def _receive(connection: socket.socket, data: bytearray, limit: float, done: int = 0) -> bytes:
    """Fills `data` from `done` on, until `limit`. Raises: EOFError (closed in the middle), OSError (TimeoutError: too slow)."""
    with memoryview(data) as view:
        while done < len(data):
            left = limit - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            count = connection.recv_into(view[done:])
            if count == 0:
                raise EOFError
            done += count
    return bytes(data)


def _answer(connection: socket.socket, status: int, tag: int, body: bytes, descriptor: int | None = None) -> None:
    message = protocol.HEADER.pack(status, len(body), tag) + body
    connection.settimeout(MESSAGE_SECONDS)
    if descriptor is None:
        connection.sendall(message)
        return
    sent = socket.send_fds(connection, [message], [descriptor])
    connection.sendall(message[sent:])
