"""Ring buffer mode: two queues of commands in memory that the firmware works off without a mailbox access for each.

The RING_BUFFER command names four areas, a command ring and a status ring for each of two priorities. A ring has 2048 entries
of 16 bytes, 32 KiB, on a 4 KiB boundary; `low_size` and `high_size` are 1. The three mailbox registers change their meaning:

    register                   mailbox mode                        ring buffer mode
    CMDBUFF_ADDR_LO            block address, low half             head: low queue bits 10:0, high queue bits 26:16
    CMDBUFF_ADDR_HI            block address, high half            tail: low queue bits 10:0, high queue bits 26:16
    CMDRESP                    command and status                  bit 31 written by the host, bit 30 ring buffer mode,
                                                                   bit 29 clear the interrupt status

    command entry   u16 command id, u16 flags, u32 for the host's own use, u64 block address
    status entry    u16 status, 14 bytes zero

Public (torvalds-style drivers of openeuler-mirror/kernel, drivers/crypto/ccp/hygon/{csv-dev.c,csv-dev.h}, include/linux/
psp-hygon.h): the block, the entries, the register bits, 2048 entries, bit 30 of the head register when a queue paused at an
error, that the firmware answers when both queues are empty or a command failed, and that any mailbox command ends the mode.

(inferred) The high queue is looked at before each low entry. After an error the head of that queue stays at the failed entry,
where the driver reads the status; the host steps over it by writing the head register. Entries that nobody executed when the mode
ends get status EXIT_RING_BUFFER. Entry flags are not looked at. Thresholds only decide about interrupts, which a doorbell call
does not need: it returns when the queues are empty.

Thread-safety: used under the processor's lock.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Final, Self

from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor.core import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.processor.commands import ParameterBlock
    from csvfast.processor.dma import Dma
    from csvfast.processor.mailbox import Mailbox

__all__ = [
    "ENTRIES",
    "PAUSED",
    "RING_BUILD",
    "RING_BYTES",
    "MailboxRegisters",
    "RingBuffers",
    "command_entry",
    "queue_register",
]

ENTRIES: Final = 2048
ENTRY_BYTES: Final = 16
RING_BYTES: Final = ENTRIES * ENTRY_BYTES
PAUSED: Final = 1 << 30
RING_BUILD: Final = 1913  # the build from which Hygon's driver uses the rings
_INDEX: Final = ENTRIES - 1
_HIGH_SHIFT: Final = 16
_COMMAND_ENTRY: Final = struct.Struct("<HHIQ")
_STATUS_ENTRY: Final = struct.Struct("<HHIQ")


def command_entry(command_id: int, address: int, software_data: int = 0) -> bytes:
    """One 16-byte entry of a command ring."""
    return _COMMAND_ENTRY.pack(command_id, 0, software_data, address)


def queue_register(low: int, high: int) -> int:
    """A head or tail register of two indices."""
    return low & _INDEX | (high & _INDEX) << _HIGH_SHIFT


class _Queue:
    __slots__ = ("commands", "failed", "head", "statuses", "tail")

    def __init__(self, commands: int, statuses: int) -> None:
        self.commands = commands
        self.statuses = statuses
        self.head = 0
        self.tail = 0
        self.failed = False  # the entry at the head was executed and refused


class RingBuffers:
    """The two queues while the mode is on."""

    __slots__ = ("_dma", "_queues")

    def __init__(self, dma: Dma, low: tuple[int, int], high: tuple[int, int]) -> None:
        self._dma = dma
        self._queues = (_Queue(*high), _Queue(*low))  # in the order in which they are served

    @classmethod
    def from_block(cls, dma: Dma, block: ParameterBlock) -> Self:
        """The queues of a RING_BUFFER block.

        Refuses: INVALID_PARAM (a size other than 1), INVALID_ADDRESS (not 4 KiB aligned, outside memory, rings that overlap).
        """
        for name in ("low_size", "high_size"):
            if block[name] != 1:
                raise FirmwareError(FirmwareStatus.INVALID_PARAM, f"RING_BUFFER: {name} is {block[name]}; expected 1")
        names = ("low_command", "low_status", "high_command", "high_status")
        places = [dma.processor.physical(block[f"{name}_address"], RING_BYTES, PAGE) for name in names]
        ordered = sorted(places)
        if any(after - before < RING_BYTES for before, after in itertools.pairwise(ordered)):
            raise FirmwareError(FirmwareStatus.INVALID_ADDRESS, "RING_BUFFER: two of the four rings overlap")
        return cls(dma, (places[0], places[1]), (places[2], places[3]))

    @property
    def head(self) -> int:
        """The head register."""
        high, low = self._queues
        return queue_register(low.head, high.head)

    def work_off(self, tail: int, head: int | None, execute: Callable[[int, int], FirmwareStatus]) -> int:
        """Executes entries from head to tail until both queues are empty or a command fails; see the module for the rest."""
        high, low = self._queues
        high.tail, low.tail = tail >> _HIGH_SHIFT & _INDEX, tail & _INDEX
        if head is not None:
            high.head, low.head = head >> _HIGH_SHIFT & _INDEX, head & _INDEX
        high.failed = low.failed = False
        while True:
            queue = high if high.head != high.tail else low
            if queue.head == queue.tail:
                return self.head
            if self._execute(queue, execute) is not FirmwareStatus.SUCCESS:
                queue.failed = True
                return self.head | PAUSED
            queue.head = (queue.head + 1) & _INDEX

    def abandon(self) -> None:
        """The mode ends: what was queued and never executed says so. A failed entry keeps its own status."""
        for queue in self._queues:
            while queue.head != queue.tail:
                if queue.failed:
                    queue.failed = False
                else:
                    self._set_status(queue, FirmwareStatus.EXIT_RING_BUFFER)
                queue.head = (queue.head + 1) & _INDEX

    def _execute(self, queue: _Queue, execute: Callable[[int, int], FirmwareStatus]) -> FirmwareStatus:
        try:
            data = self._dma.read(queue.commands + queue.head * ENTRY_BYTES, ENTRY_BYTES)
        except FirmwareError as refusal:
            status = refusal.status  # a command of the ring gave this memory to the firmware or to a guest
        else:
            command, _flags, _software_data, address = _COMMAND_ENTRY.unpack(data)
            status = execute(command, address)
        self._set_status(queue, status)
        return status

    def _set_status(self, queue: _Queue, status: FirmwareStatus) -> None:
        place = queue.statuses + queue.head * ENTRY_BYTES
        try:
            self._dma.write(place, _STATUS_ENTRY.pack(status, 0, 0, 0))
        except FirmwareError:
            return  # as in _execute: that memory is no longer the host's


class MailboxRegisters:
    """The three 32-bit registers, for a device model: a write to CMDRESP executes a command, synchronously.

    Mailbox mode: CMDRESP bits 26:16 command id, bit 0 interrupt on completion; read back: bit 31 response, bits 15:0 status.
    Ring buffer mode: the module's table.
    (Register layout: torvalds/linux drivers/crypto/ccp/{psp-dev.h,sev-dev.h}.)

    Thread-safety: one thread at a time, as one device.
    """

    RESPONSE: Final = 1 << 31
    RING_MODE: Final = 1 << 30

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.address_low = 0
        self.address_high = 0
        self.response = 0

    def write_command(self, value: int) -> None:
        """A write to CMDRESP."""
        value &= 0xFFFFFFFF
        if value & self.RING_MODE and self._mailbox.ring is not None:
            self.address_low = self._mailbox.ring_doorbell(self.address_high, self.address_low)
            self.response = self.RESPONSE
            return
        address = self.address_low & 0xFFFFFFFF | (self.address_high & 0xFFFFFFFF) << 32
        command = value >> 16 & 0x7FF
        status = self._mailbox.command(command, address)
        self.response = self.RESPONSE | int(status)
        if self._mailbox.ring is not None:
            # The registers are head and tail now, and the queues begin at entry 0.
            self.address_low = self.address_high = 0
