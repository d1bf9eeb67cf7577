"""Ring buffer mode: queues, priorities, errors, the registers' double life."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.mailbox_driver import BLOCK, BUFFER, TMR, Setup

from csvfast.certs import ManufacturingLine
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import Processor, Profile
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.machine import LocalMachine
from csvfast.processor.ring import ENTRIES, PAUSED, RING_BYTES, MailboxRegisters, command_entry, queue_register

LOW, LOW_STATUS, HIGH, HIGH_STATUS = (0x300000 + index * RING_BYTES for index in range(4))
RING = {
    "low_command_address": LOW, "low_status_address": LOW_STATUS, "high_command_address": HIGH,
    "high_status_address": HIGH_STATUS, "low_size": 1, "high_size": 1, "interrupt_on_empty": 1,
}  # fmt: skip
RUNNING = 0xFFFF


@pytest.fixture(scope="module")
def shared_line() -> ManufacturingLine:
    return ManufacturingLine.create()


@pytest.fixture
def setup(shared_line: ManufacturingLine) -> Iterator[Setup]:
    made = Setup(line=shared_line).initialised()
    made.driver.done(Command.RING_BUFFER, **RING)
    yield made
    made.processor.close()


def queue(setup: Setup, ring: int, index: int, command: int, address: int) -> None:
    """What the driver does: entry in, status 0xffff."""
    setup.machine.write(ring + 16 * index, command_entry(command, address, software_data=0xABCD))
    setup.machine.write((LOW_STATUS if ring == LOW else HIGH_STATUS) + 16 * index, RUNNING.to_bytes(2, "little"))


def status(setup: Setup, ring: int, index: int) -> int:
    return int.from_bytes(setup.machine.read(ring + 16 * index, 2), "little")


def block(setup: Setup, place: int, command: Command, **fields: int | bytes) -> int:
    setup.machine.write(place, LAYOUTS[command].encode(**fields))
    return place


def test_high_before_low(setup: Setup) -> None:
    """Two ask for the same ASID: the one in the high queue gets it."""
    handles = [setup.processor.launch_start(0) for _ in range(2)]
    queue(setup, LOW, 0, Command.ACTIVATE, block(setup, BUFFER, Command.ACTIVATE, handle=handles[0], asid=1))
    queue(setup, HIGH, 0, Command.ACTIVATE, block(setup, BUFFER + 64, Command.ACTIVATE, handle=handles[1], asid=1))
    head = setup.machine.ring_doorbell(queue_register(1, 1))
    assert head == queue_register(0, 1) | PAUSED
    assert status(setup, HIGH_STATUS, 0) == FirmwareStatus.SUCCESS
    assert status(setup, LOW_STATUS, 0) == FirmwareStatus.ASID_OWNED
    assert setup.processor.guests[handles[1]].asid == 1


def test_many_entries_and_wrap(setup: Setup) -> None:
    place = block(setup, BUFFER, Command.PLATFORM_STATUS)
    for index in range(ENTRIES):
        queue(setup, LOW, index, Command.PLATFORM_STATUS, place)
    assert setup.machine.ring_doorbell(queue_register(ENTRIES - 1, 0)) == queue_register(ENTRIES - 1, 0)
    assert {status(setup, LOW_STATUS, index) for index in range(ENTRIES - 1)} == {0}
    assert status(setup, LOW_STATUS, ENTRIES - 1) == RUNNING
    assert setup.machine.ring_doorbell(queue_register(3, 0)) == queue_register(3, 0), "past the end to the beginning"
    assert status(setup, LOW_STATUS, ENTRIES - 1) == 0
    assert setup.machine.read(place, 2) == b"\x01\x04", "API 1.4"


def test_error_pauses_and_the_host_steps_over_it(setup: Setup) -> None:
    place = block(setup, BUFFER, Command.DECOMMISSION, handle=99)
    queue(setup, LOW, 0, Command.NOP, 0)
    queue(setup, LOW, 1, Command.DECOMMISSION, place)
    queue(setup, LOW, 2, Command.NOP, 0)
    head = setup.machine.ring_doorbell(queue_register(3, 0))
    assert head == queue_register(1, 0) | PAUSED
    assert [status(setup, LOW_STATUS, index) for index in range(3)] == [
        0,
        FirmwareStatus.INVALID_PLATFORM_STATE,
        RUNNING,
    ]
    assert setup.machine.ring_doorbell(queue_register(3, 0), queue_register(2, 0)) == queue_register(3, 0)
    assert status(setup, LOW_STATUS, 2) == 0


def test_a_mailbox_command_ends_the_mode(setup: Setup) -> None:
    queue(setup, LOW, 0, Command.DECOMMISSION, block(setup, BUFFER, Command.DECOMMISSION, handle=99))
    queue(setup, LOW, 1, Command.NOP, 0)
    setup.machine.ring_doorbell(queue_register(2, 0))
    setup.driver.done(Command.PLATFORM_STATUS)
    assert setup.machine.mailbox.ring is None
    assert status(setup, LOW_STATUS, 0) == FirmwareStatus.INVALID_PLATFORM_STATE, "a failed entry keeps its status"
    assert status(setup, LOW_STATUS, 1) == FirmwareStatus.EXIT_RING_BUFFER
    with pytest.raises(FirmwareError, match="ring buffer mode is off"):
        setup.machine.ring_doorbell(0)


def test_what_was_never_executed_says_so_whatever_stood_there(setup: Setup) -> None:
    """Old statuses of an earlier lap, or a head that the host moved, are no statuses of these entries."""
    for index in range(3):
        queue(setup, LOW, index, Command.DECOMMISSION, block(setup, BUFFER, Command.DECOMMISSION, handle=99))
        setup.machine.write(LOW_STATUS + 16 * index, FirmwareStatus.ACTIVE.to_bytes(2, "little"))
    assert setup.machine.ring_doorbell(queue_register(3, 0)) == PAUSED
    setup.machine.ring_doorbell(queue_register(1, 0), queue_register(1, 0))
    setup.machine.ring_doorbell(queue_register(1, 0), queue_register(1, 0))
    setup.machine.ring_doorbell(queue_register(3, 0), queue_register(3, 0))
    setup.machine.mailbox.ring_doorbell(queue_register(3, 0), queue_register(1, 0))  # entry 1 fails
    setup.driver.done(Command.NOP)
    assert [status(setup, LOW_STATUS, index) for index in range(3)] == [
        FirmwareStatus.INVALID_PLATFORM_STATE, FirmwareStatus.INVALID_PLATFORM_STATE, FirmwareStatus.EXIT_RING_BUFFER,
    ]  # fmt: skip


def test_a_ring_that_becomes_the_firmwares(shared_line: ManufacturingLine) -> None:
    """INIT through the ring, with a TMR over the rings: nothing is read or written there any more."""
    made = Setup(line=shared_line)
    made.driver.done(Command.RING_BUFFER, **RING)
    place = block(made, BUFFER, Command.INIT, flags=1, tmr_address=LOW & -(1 << 20), tmr_length=1 << 20)
    queue(made, LOW, 0, Command.INIT, place)
    queue(made, LOW, 1, Command.PEK_GEN, 0)
    first = made.processor.identity
    assert made.machine.ring_doorbell(queue_register(2, 0)) == queue_register(1, 0) | PAUSED
    assert made.processor.tmr == (LOW & -(1 << 20), 1 << 20)
    assert first is None
    before = made.machine.read(LOW, 4 * RING_BYTES)
    key = made.processor.identity
    made.driver.done(Command.NOP)
    assert made.processor.identity is key
    assert made.machine.read(LOW, 4 * RING_BYTES) == before
    made.processor.close()


def test_ring_commands_are_not_nested(setup: Setup) -> None:
    queue(setup, HIGH, 0, Command.RING_BUFFER, block(setup, BUFFER, Command.RING_BUFFER, **RING))
    assert setup.machine.ring_doorbell(queue_register(0, 1)) == PAUSED
    assert status(setup, HIGH_STATUS, 0) == FirmwareStatus.INVALID_COMMAND


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"low_size": 0}, FirmwareStatus.INVALID_PARAM),
        ({"high_size": 2}, FirmwareStatus.INVALID_PARAM),
        ({"low_command_address": LOW + 16}, FirmwareStatus.INVALID_ADDRESS),
        ({"low_command_address": (8 << 20) - RING_BYTES + 4096}, FirmwareStatus.INVALID_ADDRESS),
        ({"high_status_address": (1 << 64) - 4096}, FirmwareStatus.INVALID_ADDRESS),
        ({"high_status_address": LOW + 4096}, FirmwareStatus.INVALID_ADDRESS),
        ({"low_status_address": LOW}, FirmwareStatus.INVALID_ADDRESS),
        ({"low_status_address": TMR}, FirmwareStatus.INVALID_ADDRESS),
    ],
)
def test_refused_rings(setup: Setup, change: dict[str, int], expected: FirmwareStatus) -> None:
    assert setup.driver.run(Command.RING_BUFFER, **(RING | change))[0] is expected
    assert setup.machine.mailbox.ring is None


def test_old_firmware_has_no_rings(shared_line: ManufacturingLine) -> None:
    made = Setup(line=shared_line)
    with Processor(made.processor.chip, made.memory, profile=Profile(1, 3, 1912)) as processor:
        machine = LocalMachine(processor)
        block(made, BLOCK, Command.RING_BUFFER, **RING)
        assert machine.command(Command.RING_BUFFER, BLOCK) is FirmwareStatus.UNSUPPORTED


def test_registers(setup: Setup) -> None:
    """As the driver pokes them: the mailbox, then the rings, then the mailbox again."""
    registers = MailboxRegisters(setup.machine.mailbox)

    def command(number: int, place: int) -> int:
        registers.address_low, registers.address_high = place & 0xFFFFFFFF, place >> 32
        registers.write_command(number << 16 | 1)
        return registers.response

    assert command(Command.PLATFORM_STATUS, BLOCK) == 1 << 31
    assert command(Command.ACTIVATE_EX, BLOCK) == 1 << 31 | FirmwareStatus.UNSUPPORTED
    assert command(Command.PLATFORM_STATUS, (1 << 64) - 8) == 1 << 31 | FirmwareStatus.INVALID_ADDRESS
    assert command(Command.RING_BUFFER, block(setup, BLOCK, Command.RING_BUFFER, **RING)) == 1 << 31
    assert (registers.address_low, registers.address_high) == (0, 0)
    queue(setup, HIGH, 0, Command.NOP, 0)
    queue(setup, LOW, 0, Command.SWAP_OUT, BLOCK)
    registers.address_high = queue_register(1, 1)
    registers.write_command(7 << 29)
    assert registers.address_low == queue_register(0, 1) | PAUSED
    assert status(setup, LOW_STATUS, 0) == FirmwareStatus.UNSUPPORTED
    assert command(Command.PLATFORM_STATUS, BLOCK) == 1 << 31
    registers.write_command(7 << 29)
    assert registers.response & 0xFFFF == FirmwareStatus.INVALID_COMMAND, "outside the mode bit 30 means nothing"


@given(st.binary(min_size=16 * 8, max_size=16 * 8), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ring_gets_worked_off(setup: Setup, entries: bytes, tail: int, head: int) -> None:
    for ring in (LOW, HIGH):
        setup.machine.write(ring, entries)
    setup.driver.run(Command.RING_BUFFER, **RING)
    found = setup.machine.ring_doorbell(tail, head)
    assert found & ~(PAUSED | queue_register(ENTRIES - 1, ENTRIES - 1)) == 0
    assert found & PAUSED or found == queue_register(tail, tail >> 16)
    setup.machine.command(Command.NOP, 0)
