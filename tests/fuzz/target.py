"""What every fuzz target is, and the simulated platform that several of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import csvfast
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.errors import CsvfastError, FirmwareError, FormatError, VerificationError
from csvfast.processor.options import Options
from csvfast.processor.processor import Processor

__all__ = ["CHIP", "LINE", "MIB", "Target", "platform"]

MIB = 1 << 20
LINE = ManufacturingLine.create()
CHIP = LINE.make_chip()


def platform(size: int) -> tuple[csvfast.EncryptedMemory, Processor]:
    """A platform in INIT with CSV2, whose firmware owns the second MiB of its memory."""
    memory = csvfast.EncryptedMemory(size, asid_max=8)
    processor = Processor(CHIP, memory, options=Options(cores=1, max_guests=8))
    processor.init(es=True, tmr_address=MIB, tmr_length=MIB)
    return memory, processor


class Target(ABC):
    """One thing to fuzz.

    `text` tells the mutator that the format is text. Inputs longer than `learn_max` never join the corpus: it would get slow.
    """

    text = False
    learn_max = 1 << 20

    def __init__(self) -> None:
        self.seeds: list[bytes] = []

    @abstractmethod
    def handle(self, data: bytes) -> Hashable:
        """Works off one input."""

    def answer(self, data: bytes) -> Hashable:
        """The input's answer. Only what csvfast promises to raise for bad input is caught."""
        try:
            return self.handle(data)
        except FormatError as error:
            return "FormatError", error.structure, error.field
        except VerificationError as error:
            return "VerificationError", error.step
        except FirmwareError as error:
            return "FirmwareError", int(error.status)
        except CsvfastError as error:
            return type(error).__name__
