"""A simulated chip with its processor and memory, and small steps that many tests take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import Processor
from csvfast.report import GuestPolicy

MIB = 1 << 20
MEMORY_BYTES = 4 * MIB
TMR = 3 * MIB


@pytest.fixture(scope="session")
def line() -> ManufacturingLine:
    return ManufacturingLine.create(name="tests")


@pytest.fixture(scope="session")
def chip(line: ManufacturingLine) -> ChipIdentity:
    return line.make_chip("SIMTEST00001")


@pytest.fixture
def memory() -> Iterator[csvfast.EncryptedMemory]:
    memory = csvfast.EncryptedMemory(MEMORY_BYTES, asid_max=16)
    yield memory
    memory.close()


@pytest.fixture
def processor(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> Iterator[Processor]:
    """Initialised with ES; the firmware's own memory is the last MiB."""
    with Processor(chip, memory) as processor:
        processor.init(es=True, tmr_address=TMR, tmr_length=MIB)
        yield processor


@pytest.fixture
def refused() -> Callable[..., FirmwareError]:
    """Calls a command that must be refused with the status given, and returns the error."""

    def check(status: FirmwareStatus, command: Callable[..., Any], *arguments: Any, **named: Any) -> FirmwareError:
        with pytest.raises(FirmwareError) as caught:
            command(*arguments, **named)
        assert caught.value.status is status, caught.value
        return caught.value

    return check


@pytest.fixture
def running(processor: Processor, memory: csvfast.EncryptedMemory) -> Callable[..., int]:
    """Launches a guest of one page (or more) and returns its handle."""

    def launch(
        policy: GuestPolicy | None = None,
        *,
        asid: int = 1,
        address: int = 0x10000,
        data: bytes = bytes(range(256)) * 16,
        finish: bool = True,
        **start: Any,
    ) -> int:
        handle = processor.launch_start(policy or GuestPolicy.of(nodbg=True), **start)
        processor.activate(handle, asid)
        memory.write(address, data, 0)
        processor.launch_update_data(handle, address, len(data))
        if finish:
            processor.launch_measure(handle)
            processor.launch_finish(handle)
        return handle

    return launch


@pytest.fixture
def pdh(processor: Processor) -> CsvCertificate:
    """The platform's PDH as a guest owner gets it."""
    return CsvCertificate.parse(processor.pdh_cert_export()[0])
