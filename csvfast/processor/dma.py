"""How the firmware reaches buffers that a command names: every address and length is checked before a byte moves.

The host owns those buffers and may fill a parameter block with anything. So: lengths are capped before they are read, an address
must lie in the DRAM with its C-bit stripped and outside CSV3 private frames, and everything is read into a copy before it is
looked at, so that a host that changes memory meanwhile changes nothing.

Thread-safety: used under the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.errors import FirmwareStatus

if TYPE_CHECKING:
    from csvfast.processor.commands import ParameterBlock
    from csvfast.processor.processor import Processor

__all__ = ["HOST", "Dma"]

HOST: Final = 0  # the host's ASID: the DRAM as it is


class Dma:
    """Buffers in the host's memory."""

    __slots__ = ("memory", "processor")

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.memory = processor.memory

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes. Refuses with INVALID_ADDRESS. `length` must have been capped by the caller."""
        return self.memory.read(self.processor.physical(address, length), length, HOST)

    def write(self, address: int, data: bytes) -> None:
        """Puts `data` into host memory. Refuses with INVALID_ADDRESS, nothing is written then."""
        self.memory.write(self.processor.physical(address, len(data)), data, HOST)

    def fetch(self, block: ParameterBlock, name: str, *, exactly: int | None = None, most: int | None = None) -> bytes:
        """The input buffer that `<name>_address` and `<name>_length` describe. Length 0 is no buffer, whatever the address.

        Refuses with INVALID_LENGTH (not `exactly`, or more than `most`), then INVALID_ADDRESS.
        """
        self.check_length(block, name, exactly=exactly, most=most)
        length = block[f"{name}_length"]
        return self.read(block[f"{name}_address"], length) if length else b""

    def check_length(
        self, block: ParameterBlock, name: str, *, exactly: int | None = None, most: int | None = None
    ) -> None:
        """Refuses with INVALID_LENGTH: for commands that read several buffers, whose lengths are all checked first."""
        length = block[f"{name}_length"]
        if exactly is not None and length != exactly:
            self.processor.refuse(FirmwareStatus.INVALID_LENGTH, f"{name}: {length} bytes; expected {exactly}")
        if most is not None and length > most:
            self.processor.refuse(FirmwareStatus.INVALID_LENGTH, f"{name}: {length} bytes; expected at most {most}")

    def require_room(self, block: ParameterBlock, **needed: int) -> None:
        """The length-query convention: if any of the named length fields is smaller than needed, the firmware writes what it
        needs into all of them and answers INVALID_LENGTH."""
        if any(block[name] < size for name, size in needed.items()):
            self.processor.refuse(
                FirmwareStatus.INVALID_LENGTH,
                ", ".join(f"{name} is {block[name]}; expected at least {size}" for name, size in needed.items()),
                needed,
            )
