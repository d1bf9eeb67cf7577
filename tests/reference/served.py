"""A server in this process for tests, and a client that says whatever it is told to."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from csvfast.certs import ManufacturingLine
from csvfast.errors import FirmwareStatus
from csvfast.processor import Options, Processor
from csvfast.processor.client import RemoteMachine
from csvfast.processor.commands import Command
from csvfast.processor.machine import LocalMachine
from csvfast.processor.protocol import HEADER
from csvfast.processor.server import ProcessorServer, open_shared_memory

SIZE = 16 << 20


class Served:
    def __init__(self, directory: Path, *, vcpu: bool = False) -> None:
        self.path = directory / "socket"
        self.shared = open_shared_memory(SIZE, asid_max=8)
        self.processor = Processor(ManufacturingLine.create().make_chip(), self.shared.memory, options=Options(cores=2))
        self.machine = LocalMachine(self.processor)
        self.vcpu_path = directory / "vcpu" if vcpu else None
        self.server = ProcessorServer(self.machine, self.shared.descriptor, self.path, vcpu_path=self.vcpu_path)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()

    def close(self) -> None:
        self.server.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.processor.close()
        self.shared.close()

    def raw(self, path: Path | None = None) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(str(path or self.path))
        return connection


def ask(connection: socket.socket, operation: int, body: bytes = b"", tag: int = 7) -> tuple[int, bytes]:
    connection.sendall(HEADER.pack(operation, len(body), tag) + body)
    return answer(connection, tag)


def answer(connection: socket.socket, tag: int = 7) -> tuple[int, bytes]:
    status, length, answered = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
    assert answered == tag
    return status, connection.recv(length, socket.MSG_WAITALL) if length else b""


def ended(connection: socket.socket) -> bool:
    """The server closed it without an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def alive(served: Served) -> None:
    """Somebody else is still served."""
    with RemoteMachine(served.path) as machine:
        assert machine.command(Command.NOP, 0) is FirmwareStatus.SUCCESS
