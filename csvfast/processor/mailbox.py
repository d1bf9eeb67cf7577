"""The mailbox: a command id and the address of a parameter block in, a status code out.

This is the processor as a VMM, a driver or a simulator sees it: no Python objects, only numbers and bytes in memory. The block is
read from the DRAM as the host sees it (ASID 0), the addresses in it are system physical, answers and required lengths are written
back into it. Whatever a host puts there, the answer is a status code and never an exception.

Order of checks: the command is known; its block lies in memory; reserved fields are zero (inferred); platform state; handle;
guest state; lengths; addresses; then what the command itself checks (specification sections 4.5 to 4.7).

Source: specification sections 3.7, 4.1 to 4.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.errors import CsvfastError, FirmwareError, FirmwareStatus
from csvfast.processor.commands import LAYOUTS, Command, Direction, ParameterBlock
from csvfast.processor.dma import HOST, Dma
from csvfast.processor.mailbox_csv3 import CSV3_HANDLERS
from csvfast.processor.mailbox_guest import GUEST_HANDLERS
from csvfast.processor.mailbox_platform import PLATFORM_HANDLERS
from csvfast.processor.ring import RING_BUILD, RingBuffers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from csvfast.processor.processor import Processor

__all__ = ["HANDLERS", "Mailbox"]

HANDLERS: Final[Mapping[Command, Callable[[Dma, ParameterBlock], None]]] = {
    **PLATFORM_HANDLERS,
    **GUEST_HANDLERS,
    **CSV3_HANDLERS,
}


class Mailbox:
    """Drives a processor by command buffers in its memory.

        mailbox = Mailbox(processor)
        memory.write(0x1000, LAYOUTS[Command.INIT].encode(flags=1, ...), asid=0)
        status = mailbox.command(Command.INIT, 0x1000)

    Attributes:
        processor: the one behind it. ring: the ring buffers while RING_BUFFER mode is on, else None.
        problem: why the last command was refused, in words, or None. The hardware has nothing like it: it is for people.
    Thread-safety: any thread; commands run one after the other under the processor's lock.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.ring: RingBuffers | None = None
        self.problem: str | None = None
        self._dma = Dma(processor)

    def command(self, command_id: int, buffer_address: int) -> FirmwareStatus:
        """Executes one command, as writing the command register does. Ring buffer mode, if on, ends first.

        Never raises for what stands in memory or in the arguments, whatever their size.
        """
        with self.processor.lock:
            if self.ring is not None:
                ring, self.ring = self.ring, None
                ring.abandon()
            if command_id == Command.RING_BUFFER:
                return self._enter_ring_mode(buffer_address)
            return self.execute(command_id, buffer_address)

    def execute(self, command_id: int, buffer_address: int) -> FirmwareStatus:
        """Executes one command without leaving ring buffer mode: what the rings' own entries get."""
        self.problem = None
        try:
            command = Command(command_id)
        except ValueError:
            self.problem = f"no command has id {command_id:#x}"
            return FirmwareStatus.INVALID_COMMAND
        if command is Command.RING_BUFFER:
            self.problem = "RING_BUFFER is a command of the mailbox, not of a ring"
            return FirmwareStatus.INVALID_COMMAND
        with self.processor.lock:
            return self._run(command, buffer_address, HANDLERS.get(command))

    def ring_doorbell(self, tail: int, head: int | None = None) -> int:
        """What writing the control register does in ring buffer mode: the queues are worked off.

        Args: tail, head: values of the two queue registers (head None = where the firmware stands).
        Returns: the head register afterwards; see ring.py for its bits.
        Raises: FirmwareError INVALID_COMMAND when ring buffer mode is off. (The hardware would take the write for a command.)
        """
        with self.processor.lock:
            if self.ring is None:
                raise FirmwareError(FirmwareStatus.INVALID_COMMAND, "ring buffer mode is off: RING_BUFFER turns it on")
            return self.ring.work_off(tail, head, self.execute)

    def _enter_ring_mode(self, buffer_address: int) -> FirmwareStatus:
        def enter(dma: Dma, block: ParameterBlock) -> None:
            build = self.processor.profile.build
            if build < RING_BUILD:
                self.processor.refuse(
                    FirmwareStatus.UNSUPPORTED, f"build {build} has no ring buffers; they came with {RING_BUILD}"
                )
            self.ring = RingBuffers.from_block(dma, block)

        self.problem = None
        return self._run(Command.RING_BUFFER, buffer_address, enter)

    def _run(
        self, command: Command, address: int, handler: Callable[[Dma, ParameterBlock], None] | None
    ) -> FirmwareStatus:
        processor = self.processor
        layout = LAYOUTS.get(command)
        if layout is None or handler is None:
            self.problem = f"{command.name} is not published and not supported"
            return FirmwareStatus.UNSUPPORTED
        place = 0
        block: ParameterBlock | None = None
        try:
            data = b""
            if layout.size:
                place = processor.physical(address, layout.size)
                data = processor.memory.read(place, layout.size, HOST)
            block = layout.decode(data)
            handler(self._dma, block)
        except FirmwareError as refusal:
            self.problem = str(refusal)
            if block is not None and refusal.needed:
                block.changed.clear()
                _set_needed(block, refusal.needed)
                self._answer(place, block)
            return refusal.status
        except (CsvfastError, OSError, MemoryError) as failure:
            # Nothing the host did: the state directory cannot be written, the machine has no memory left.
            self.problem = f"{type(failure).__name__}: {failure}"
            return FirmwareStatus.HWERROR_PLATFORM
        self._answer(place, block)
        return FirmwareStatus.SUCCESS

    def _answer(self, place: int, block: ParameterBlock) -> None:
        # The block's place was checked when it was read and is the host's still: the commands that take memory from the host
        # (INIT, INIT_EX, SET_SMCR, SET_GUEST_PRIVATE_MEMORY) have no output, and a refused one takes none.
        for offset, data in block.answers():
            self.processor.memory.write(place + offset, data, HOST)


def _set_needed(block: ParameterBlock, needed: dict[str, int]) -> None:
    """Required lengths into the fields of the same name; a single one into the block's only length."""
    lengths = [
        field.name
        for field in block.layout.fields
        if field.direction is Direction.IN_OUT and (field.name == "length" or field.name.endswith("_length"))
    ]
    for name, size in needed.items():
        if name in lengths:
            block[name] = size
        elif len(needed) == len(lengths) == 1:
            block[lengths[0]] = size
