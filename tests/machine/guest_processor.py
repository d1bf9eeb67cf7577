"""The host's side of a guest's channel, for tests: a guest of a simulated chip, whose answers are put into somebody's page."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from csvfast import EncryptedMemory
from csvfast.certs import ManufacturingLine
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import Processor
from csvfast.processor.commands import Command
from csvfast.processor.machine import C_BIT, LocalMachine
from csvfast.processor.vmm import VM_ATTESTATION, GuestPlan, Host
from csvfast.report import GuestPolicy

FRAME = struct.Struct("<4sHHIIQQ")
PAGE = 4096
POLICY = GuestPolicy.of(nodbg=True, es=True, csv=True, api_major=1, api_minor=3)


class GuestProcessor:
    """A chip and one running guest."""

    def __init__(self, firmware: Path) -> None:
        firmware.write_bytes(b"firmware".ljust(PAGE, b"\xf4"))
        self.chip = ManufacturingLine.create().make_chip()
        self.memory = EncryptedMemory(64 << 20)
        self.processor = Processor(self.chip, self.memory)
        self.host = Host(LocalMachine(self.processor))
        self.host.initialise(es=True)
        launched = self.host.launch(GuestPlan(firmware=firmware, policy=POLICY, memory_size=4 << 20))
        self.host.finish(launched.handle)
        self.handle = launched.handle
        self.digest = launched.predicted.digest

    def answer(self, page: bytes) -> bytes:
        """The page as the firmware leaves it. FirmwareError."""
        machine = self.host.machine
        place = next(found for found in machine.guest_ranges(self.handle) if found.guest_physical == 0).address | C_BIT
        machine.guest_write(self.handle, place, page)
        self.host.run(Command.ATTESTATION, handle=self.handle, address=place, mnonce=VM_ATTESTATION, length=PAGE)
        return machine.guest_read(self.handle, place, PAGE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.host.__exit__(kind, error, trace)
        self.processor.close()
        self.memory.close()


class ChannelHost:
    """Serves one connection in a thread. `read` and `write` reach the guest's page by its physical address."""

    def __init__(
        self,
        connection: socket.socket,
        answer: Callable[[bytes], bytes],
        read: Callable[[int], bytes],
        write: Callable[[int, bytes], None],
    ) -> None:
        self.connection = connection
        self.answer, self.read, self.write = answer, read, write
        self.operations: list[int] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            frame = b""
            while len(frame) < FRAME.size:
                try:
                    more = self.connection.recv(FRAME.size - len(frame))
                except OSError:
                    return
                if not more:
                    return
                frame += more
            magic, version, operation, tag, length, address, _ = FRAME.unpack(frame)
            assert (magic, version) == (b"CSVG", 1)
            self.operations.append(operation)
            status, value = 0, 0
            if operation == 1 and length == PAGE and address % PAGE == 0:
                try:
                    self.write(address, self.answer(self.read(address)))
                except FirmwareError as refusal:
                    status = int(refusal.status)
            elif operation == 2:
                status = int(FirmwareStatus.UNSUPPORTED)
            elif operation == 3:
                address, value = 0x65, 2
            else:
                status = 0x10001
            try:
                self.connection.sendall(FRAME.pack(b"CSVG", 1, operation, tag, status, address, value))
            except OSError:
                return

    def close(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.thread.join(10)


def file_access(path: Path) -> tuple[Callable[[int], bytes], Callable[[int, bytes], None]]:
    """Reads and writes pages of a guest's RAM in its file."""

    def read(address: int) -> bytes:
        with path.open("rb") as file:
            return os.pread(file.fileno(), PAGE, address)

    def write(address: int, page: bytes) -> None:
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), page, address)

    return read, write
