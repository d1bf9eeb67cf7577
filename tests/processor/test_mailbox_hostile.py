"""Blocks with anything in them: the mailbox answers with a status, and a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.mailbox_driver import BLOCK, BUFFER, RAM, TMR, Setup

from csvfast.certs import ManufacturingLine
from csvfast.crypto import Secret
from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import LAYOUTS, Command, Direction
from csvfast.processor.core import C_BIT, GuestState

SUCCESS = FirmwareStatus.SUCCESS
LITERAL = b"VM_ATTESTATION"


@pytest.fixture(scope="module")
def victim(line: ManufacturingLine) -> Iterator[Setup]:
    made = Setup(line=line, max_guests=16)
    yield made
    made.processor.close()


_EDGES = [0, 1, 15, 16, 52, 772, 2084, 4096, BLOCK, BUFFER, RAM, TMR, (8 << 20) - 16, 8 << 20, C_BIT, RAM | C_BIT]
_EDGES += [(1 << 31) - 1, (1 << 32) - 16, (1 << 32) - 1, (1 << 64) - 4096, (1 << 64) - 1]


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_block_gets_a_status(victim: Setup, data: st.DataObject) -> None:
    """Random and pointed values for every field of every command, on a platform that keeps its state from block to block."""
    command = data.draw(st.sampled_from(list(Command)))
    layout = LAYOUTS.get(command)
    values: dict[str, int | bytes] = {}
    for field in () if layout is None else layout.fields:
        if field.direction is Direction.RESERVED:
            continue
        if field.octets:
            values[field.name] = data.draw(st.one_of(st.just(LITERAL), st.binary(max_size=field.size)))[: field.size]
        else:
            small = st.integers(0, 6)
            edges = st.sampled_from([edge for edge in _EDGES if edge < 256**field.size])
            values[field.name] = data.draw(st.one_of(small, edges, st.integers(0, 256**field.size - 1)))
    if layout is not None and layout.size:
        victim.driver.write(BLOCK, layout.encode(**values))
    status = victim.machine.command(command, BLOCK)
    assert isinstance(status, FirmwareStatus)
    assert status is not FirmwareStatus.HWERROR_PLATFORM, victim.machine.problem
    assert (status is SUCCESS) == (victim.machine.problem is None)
    assert len(victim.processor.guests) <= 16
    if data.draw(st.integers(0, 60)) == 0:
        victim.machine.command(Command.SHUTDOWN, 0)
        victim.driver.run(Command.INIT, flags=1, tmr_address=TMR, tmr_length=1 << 20)


@pytest.fixture(scope="module")
def crowded(line: ManufacturingLine) -> Iterator[Setup]:
    """Guests in every state that a launch passes, and one that is being sent: handles 1 to 4."""
    made = Setup(size=4 << 20, line=line, max_guests=6).initialised()
    driver = made.driver
    for asid in (1, 2, 3, 4):
        handle = driver.done(Command.LAUNCH_START, policy=4 if asid == 2 else 0)["handle"]
        assert handle == asid
        driver.done(Command.ACTIVATE, handle=handle, asid=asid)
        driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM + 4096 * asid, length=4096)
    for handle in (1, 3, 4):
        driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
    for handle in (1, 4):
        driver.done(Command.LAUNCH_FINISH, handle=handle)
    restore(made)
    yield made
    made.processor.close()


def restore(made: Setup) -> None:
    """Guest 1 RUNNING, 2 LUPDATE, 3 LSECRET, 4 SUPDATE with transport keys; no others."""
    processor = made.processor
    for handle in set(processor.guests) - {1, 2, 3, 4}:
        processor.deactivate(handle)
        processor.decommission(handle)
    states = (GuestState.RUNNING, GuestState.LUPDATE, GuestState.LSECRET, GuestState.SUPDATE)
    for handle, state in enumerate(states, 1):
        processor.guests[handle].state = state
    sent = processor.guests[4]
    sent.tek, sent.tik = Secret(bytes(16)), Secret(bytes(16))


_LENGTHS = [0, 15, 16, 48, 51, 52, 207, 208, 772, 2083, 2084, 4096, 6252, 8192, 1 << 20, 0xFFFFFFF0, 0xFFFFFFFF]
_PLACES = [0, 8, BLOCK, BLOCK - 4, BUFFER, BUFFER + 0x2000, RAM + 4096, RAM + 8192, (RAM + 4096) | C_BIT, TMR - 16, TMR]
_PLACES += [(4 << 20) - 16, (4 << 20) - 4096, 4 << 20, (1 << 64) - 16, 1 << 48]
_QUIET = set(Command) - {Command.SHUTDOWN, Command.DECOMMISSION, Command.DEACTIVATE, Command.INIT, Command.INIT_EX}


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_refusals_change_nothing(crowded: Setup, data: st.DataObject) -> None:
    """Neither memory, apart from required lengths in the block, nor guests; and no command touches the firmware's memory."""
    command = data.draw(st.sampled_from(sorted(_QUIET & set(LAYOUTS))))
    layout = LAYOUTS[command]
    values: dict[str, int | bytes] = {}
    for field in layout.fields:
        if field.direction is Direction.RESERVED:
            values[field.name] = data.draw(st.sampled_from([0] * 30 + [1])) if not field.octets else b""
        elif field.octets:
            values[field.name] = data.draw(st.sampled_from([LITERAL, b"", b"x" * field.size]))[: field.size]
        elif field.name == "handle":
            values[field.name] = data.draw(st.integers(0, 5))
        elif field.size == 8:
            values[field.name] = data.draw(st.sampled_from(_PLACES))
        else:
            values[field.name] = data.draw(st.sampled_from([n for n in _LENGTHS if n < 256**field.size]))
    place = data.draw(st.sampled_from([BLOCK, BUFFER, RAM + 4096, BLOCK | C_BIT]))
    written = (place & ~C_BIT) + layout.size
    crowded.machine.write(place & ~C_BIT, layout.encode(**values))
    machine, guests = crowded.machine, crowded.processor.guests
    before, states = crowded.memory.raw.copy(), {h: (g.state, g.asid, g.policy) for h, g in guests.items()}
    status = machine.command(command, place)
    after = crowded.memory.raw
    assert not (before[TMR : TMR + (1 << 20)] != after[TMR : TMR + (1 << 20)]).any()
    if status is SUCCESS:
        restore(crowded)
        return
    assert {h: (g.state, g.asid, g.policy) for h, g in guests.items()} == states
    changed = set((before != after).nonzero()[0].tolist())
    allowed: set[int] = set()
    if status is FirmwareStatus.INVALID_LENGTH:
        for field in layout.fields:
            if field.direction is Direction.IN_OUT and field.name.endswith("length"):
                start = (place & ~C_BIT) + field.offset
                allowed.update(range(start, start + field.size))
    assert changed <= allowed, (command.name, status.name, values, sorted(changed)[:8], written)


def test_half_an_answer_is_none(crowded: Setup) -> None:
    """One of two places is good, and nothing is written there."""
    driver = crowded.driver
    good, bad = BUFFER + 0x4000, TMR
    driver.write(good, bytes([0xEE]) * 8192)
    packet = {"handle": 4, "header_length": 52, "guest_address": RAM + 4096, "guest_length": 16, "transport_length": 16}
    for command, fields in (
        (Command.SEND_UPDATE_DATA, packet | {"header_address": good, "transport_address": bad}),
        (Command.SEND_UPDATE_DATA, packet | {"header_address": bad, "transport_address": good}),
        (
            Command.PDH_CERT_EXPORT,
            {"pdh_address": good, "pdh_length": 2084, "chain_address": bad, "chain_length": 6252},
        ),
        (
            Command.PDH_CERT_EXPORT,
            {"pdh_address": bad, "pdh_length": 2084, "chain_address": good, "chain_length": 6252},
        ),
    ):
        assert driver.run(command, **fields)[0] is FirmwareStatus.INVALID_ADDRESS
        assert driver.read(good, 8192) == bytes([0xEE]) * 8192, command.name
    fields = packet | {"header_address": good, "transport_address": good + 4096}
    driver.done(Command.SEND_UPDATE_DATA, **fields)


@given(command=st.integers(0, 0x400), block=st.binary(min_size=256, max_size=256), address=st.integers(0, 1 << 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_get_a_status(victim: Setup, command: int, block: bytes, address: int) -> None:
    victim.driver.write(BLOCK, block)
    for place in (BLOCK, address):
        status = victim.machine.command(command, place)
        assert status is not FirmwareStatus.HWERROR_PLATFORM, victim.machine.problem
