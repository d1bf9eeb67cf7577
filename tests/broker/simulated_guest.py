"""Virtual machines on simulated chips, for the end-to-end tests of the broker: launched, measured, able to ask for reports."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from csvfast import EncryptedMemory
from csvfast.certs import ManufacturingLine
from csvfast.certs.chip import ChipIdentity
from csvfast.processor import Processor
from csvfast.processor.machine import LocalMachine
from csvfast.processor.vmm import GuestPlan, Host
from csvfast.report import Evidence, GuestPolicy

PRODUCTION = GuestPolicy.of(nodbg=True, es=True, csv=True, api_major=1, api_minor=3)
DEBUGGABLE = GuestPolicy.of(es=True, csv=True, api_major=1, api_minor=3)


class SimulatedMachine:
    """A chip with a processor, on which guests are launched. A context manager."""

    def __init__(self, line: ManufacturingLine | None = None, *, chip: ChipIdentity | None = None) -> None:
        self.line = line or ManufacturingLine.create()
        self.chip = chip or self.line.make_chip()
        self.memory = EncryptedMemory(64 << 20)
        self.processor = Processor(self.chip, self.memory)
        self.host = Host(LocalMachine(self.processor))
        self.host.initialise(es=True)

    @property
    def roots(self) -> tuple[object, ...]:
        return (self.chip.root,)

    def launch(self, firmware: Path, policy: GuestPolicy = PRODUCTION) -> SimulatedGuest:
        launched = self.host.launch(GuestPlan(firmware=firmware, policy=policy, memory_size=4 << 20))
        self.host.finish(launched.handle)
        return SimulatedGuest(self, launched.handle, launched.predicted.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.host.__exit__(kind, error, trace)
        self.processor.close()
        self.memory.close()


class SimulatedGuest:
    """An Attester: what software in the guest can do."""

    def __init__(self, machine: SimulatedMachine, handle: int, measure: bytes) -> None:
        self.machine = machine
        self.handle = handle
        self.measure = measure

    def evidence(self, report_data: bytes) -> Evidence:
        report = self.machine.host.report(self.handle, report_data)
        return Evidence(report, hsk_cek=self.machine.chip.hsk_cek, encoding="page")
