"""A machine with a simulated chip, and a driver that speaks to it in parameter blocks only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from csvfast.certs import ManufacturingLine
from csvfast.errors import FirmwareStatus
from csvfast.memory import EncryptedMemory
from csvfast.processor import Options, Processor
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.machine import LocalMachine

BLOCK = 0x1000
BUFFER = 0x4000  # 64 KiB of host buffers
TMR = 0x100000
RAM = 0x200000  # guests from here on


class Driver:
    """One block at BLOCK; `run` gives the status and the block's fields as they stand afterwards."""

    def __init__(
        self, command: Callable[[int, int], FirmwareStatus], read: Callable[..., bytes], write: Callable[..., Any]
    ) -> None:
        self.command, self.read, self.write = command, read, write

    def run(self, command: Command, **fields: int | bytes) -> tuple[FirmwareStatus, dict[str, Any]]:
        layout = LAYOUTS[command]
        if layout.size:
            self.write(BLOCK, layout.encode(**fields))
        status = self.command(command, BLOCK)
        if not layout.size:
            return status, {}
        return status, fields_of(command, self.read(BLOCK, layout.size))

    def done(self, command: Command, **fields: int | bytes) -> dict[str, Any]:
        status, values = self.run(command, **fields)
        assert status is FirmwareStatus.SUCCESS, status
        return values


def fields_of(command: Command, data: bytes) -> dict[str, Any]:
    return {
        field.name: data[field.offset : field.offset + field.size]
        if field.octets
        else int.from_bytes(data[field.offset : field.offset + field.size], "little")
        for field in LAYOUTS[command].fields
    }


class Setup:
    """A processor, its machine and a driver; `line` makes more chips of the same root."""

    def __init__(self, size: int = 8 << 20, line: ManufacturingLine | None = None, **options: Any) -> None:
        self.line = line or ManufacturingLine.create()
        self.memory = EncryptedMemory(size, asid_max=8)
        self.processor = Processor(self.line.make_chip(), self.memory, options=Options(**options))
        self.machine = LocalMachine(self.processor)
        self.driver = Driver(self.machine.command, self.machine.read, self.machine.write)

    def initialised(self) -> Setup:
        self.driver.done(Command.INIT, flags=1, tmr_address=TMR, tmr_length=1 << 20)
        return self

    def launched(
        self, content: bytes = b"firmware".ljust(4096, b"\x90"), *, policy: int = 1, asid: int = 1, place: int = RAM
    ) -> int:
        """A running guest whose memory is `content`; its handle."""
        driver = self.driver
        handle: int = driver.done(Command.LAUNCH_START, policy=policy)["handle"]
        driver.done(Command.ACTIVATE, handle=handle, asid=asid)
        self.machine.write(place, content)
        driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=place, length=len(content))
        driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
        driver.done(Command.LAUNCH_FINISH, handle=handle)
        return handle
