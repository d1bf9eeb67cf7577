"""The machine below a sandbox: a chip, its security processor and DRAM in shared memory, in the monitor's process.

Thread-safety: any thread; close() once nothing uses it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from csvfast.processor import Processor
from csvfast.processor.machine import LocalMachine
from csvfast.processor.server import open_shared_memory

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.certs.chip import ChipIdentity

__all__ = ["SPARE_BYTES", "HostMachine"]

SPARE_BYTES: Final = 8 << 20  # of the firmware (1 MiB on its own boundary), save areas, buffers
PAGE: Final = 4096


class HostMachine:
    """A machine with a chip.

    In: memory   bytes of DRAM for guests
        chip     state directory of a simulated chip (`csvfast chip make`); None = a new one that nobody will meet again
        dram     file that is the DRAM, made and kept; None = anonymous memory
    Attributes: processor, machine; descriptor: of the DRAM; dram: its path, for this process.
    Raises: StateError (the chip is in use), AllocationError, OSError.
    """

    def __init__(self, memory: int, *, chip: Path | None = None, dram: Path | None = None) -> None:
        self._exit = ExitStack()
        try:
            shared = open_shared_memory(-(-(memory + SPARE_BYTES) // PAGE) * PAGE, dram)
            self._exit.callback(shared.close)
            if chip is None:
                from csvfast.certs import ManufacturingLine

                self.processor = Processor(ManufacturingLine.create().make_chip(), shared.memory)
            else:
                self.processor = Processor.open(chip, shared.memory)
            self._exit.callback(self.processor.close)
            self.machine = LocalMachine(self.processor)
            self.descriptor = shared.descriptor
            self.dram = f"/proc/self/fd/{shared.descriptor}"
        except BaseException:
            self._exit.close()
            raise

    @property
    def chip(self) -> ChipIdentity:
        """The chip."""
        return self.processor.chip

    @property
    def certificates(self) -> bytes:
        """HSK and CEK of the chip, 2916 bytes: public, for guests to lay beside their reports."""
        return self.chip.hsk_cek

    def allocated_bytes(self) -> int:
        """Memory that the DRAM really takes."""
        return os.fstat(self.descriptor).st_blocks * 512

    def close(self) -> None:
        """Power off: guests are lost, keys erased. Idempotent."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
