"""CSV3 by command buffers: secure memory, launch, faults, and migration to another platform."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from reference.mailbox_driver import BUFFER, RAM, Driver, Setup

from csvfast.certs import ManufacturingLine
from csvfast.crypto import sm3
from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import Command
from csvfast.processor.npt import NestedPageFault

MIB = 1 << 20
SMR, SMR_BYTES, SMCR = 8 * MIB, 16 * MIB, 32 * MIB
GPA = 0x100000
PAGES = bytes(7 * index % 256 for index in range(4096)) + b"second page".ljust(4096, b"\x01")
SAVE_AREA = b"vmsa".ljust(4096, b"\x02")
SUCCESS = FirmwareStatus.SUCCESS


def secured(line: ManufacturingLine) -> Setup:
    setup = Setup(SMCR + 256 * MIB, line).initialised()
    driver = setup.driver
    driver.write(BUFFER, struct.pack("<QQ", SMR, SMR_BYTES))
    driver.done(Command.SET_SMR, entry_size=8 * MIB, region_count=1, regions_address=BUFFER)
    driver.done(Command.SET_SMCR, base=SMCR, size=256 * MIB)
    return setup


def launched(setup: Setup) -> int:
    driver = setup.driver
    handle: int = driver.done(Command.LAUNCH_START, policy=0x44)["handle"]
    driver.done(Command.ACTIVATE, handle=handle, asid=1)
    driver.write(BUFFER, struct.pack("<QQ", SMR, 8 * MIB))
    driver.done(Command.SET_GUEST_PRIVATE_MEMORY, handle=handle, region_count=1, regions_address=BUFFER)
    driver.write(RAM, PAGES)
    driver.write(BUFFER, struct.pack("<Q", 2 | RAM >> 12 << 12))
    blocks = struct.pack("<Q", BUFFER)
    driver.done(Command.LAUNCH_ENCRYPT_DATA, handle=handle, gpa=GPA, length=8192, data_blocks=blocks)
    driver.write(RAM, SAVE_AREA)
    driver.write(RAM + 4096, b"\xff" * 4096)
    vmcb = driver.done(
        Command.LAUNCH_ENCRYPT_VMCB, handle=handle, vmsa_address=RAM, vmsa_length=4096,
        shadow_vmcb_address=RAM + 4096, shadow_vmcb_length=4096,
    )  # fmt: skip
    assert SMR <= vmcb["secure_vmcb_address"] < SMR + 8 * MIB
    assert vmcb["secure_vmcb_length"] == 4096
    assert driver.read(vmcb["secure_vmcb_address"], 4096) != SAVE_AREA
    driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
    driver.done(Command.LAUNCH_FINISH_EX, handle=handle, host_data=b"host".ljust(64, b"\0"))
    return handle


@pytest.fixture(scope="module")
def line() -> ManufacturingLine:
    return ManufacturingLine.create()


@pytest.fixture
def setup(line: ManufacturingLine) -> Iterator[Setup]:
    made = secured(line)
    yield made
    made.processor.close()


def test_counts_are_capped_before_anything_is_read(setup: Setup) -> None:
    driver = setup.driver
    handle = driver.done(Command.LAUNCH_START, policy=0x44)["handle"]
    for count in (0, 257, 0xFFFFFFFF):
        status, _ = driver.run(
            Command.SET_GUEST_PRIVATE_MEMORY, handle=handle, region_count=count, regions_address=BUFFER
        )
        assert status is FirmwareStatus.INVALID_PARAM
    setup.machine.command(Command.SHUTDOWN, 0)
    setup.initialised()
    for count in (0, 8193, 0xFFFFFFFF):
        status, _ = driver.run(Command.SET_SMR, entry_size=8 * MIB, region_count=count, regions_address=BUFFER)
        assert status is FirmwareStatus.INVALID_PARAM
    status, _ = driver.run(Command.SET_SMR, entry_size=8 * MIB, region_count=1, regions_address=(1 << 64) - 16)
    assert status is FirmwareStatus.INVALID_ADDRESS


def test_launch_digest_and_walls(setup: Setup) -> None:
    driver = setup.driver
    handle = launched(setup)
    nonce = bytes(16)
    driver.done(Command.ATTESTATION, handle=handle, address=BUFFER, mnonce=nonce, length=208)
    items = struct.pack("<IIQI", 0x201, 0, GPA, 8192) + PAGES + struct.pack("<IIQI", 0x202, 0, 0, 4096) + SAVE_AREA
    assert driver.read(BUFFER + 16, 32) == sm3(items).digest()
    assert setup.machine.guest_read(handle, GPA, 8192) == PAGES

    before = driver.read(SMR, 8 * MIB)
    assert PAGES[:64] not in before
    export = {"pdh_length": 2084, "chain_address": BUFFER, "chain_length": 6252}
    for address in (SMR, SMR + 4096, SMR - 100, SMCR):
        assert driver.run(Command.PDH_CERT_EXPORT, pdh_address=address, **export)[0] is not SUCCESS
    assert setup.machine.command(Command.PLATFORM_STATUS, SMR) is FirmwareStatus.INVALID_PAGE_OWNER
    assert driver.read(SMR, 8 * MIB) == before

    with pytest.raises(NestedPageFault) as fault:
        setup.machine.guest_read(handle, GPA + 0x10000, 16)
    answer = driver.done(
        Command.UPDATE_NPT, handle=handle, gpa=fault.value.gpa, error_code=fault.value.error_code, level=1
    )
    assert answer["page_count"] == 1
    setup.machine.guest_write(handle, GPA + 0x10000, b"guest's")
    assert setup.machine.guest_read(handle, GPA + 0x10000, 7) == b"guest's"

    read = {"handle": handle, "gpa": GPA, "spa": BUFFER, "length": 64}
    driver.done(Command.DBG_READ_MEM, **read)
    assert driver.read(BUFFER, 64) == PAGES[:64], "the policy allows debugging"
    assert driver.run(Command.DBG_READ_MEM, **(read | {"spa": SMR}))[0] is not SUCCESS
    driver.done(Command.DBG_READ_VMSA, handle=handle, spa=BUFFER, length=4096)
    assert driver.read(BUFFER, 4096) == SAVE_AREA


def refused_anywhere(driver: Driver, command: Command, private: int, fields: dict[str, int], *names: str) -> None:
    """Each of the addresses wrong in turn. That the guest is as before shows when the command is then done once."""
    for name in names:
        for address, status in (
            (1 << 40, FirmwareStatus.INVALID_ADDRESS),
            (SMCR + 256 * MIB - 4, FirmwareStatus.INVALID_ADDRESS),
            (private, FirmwareStatus.INVALID_PAGE_OWNER),
            (SMCR - 4, FirmwareStatus.INVALID_PAGE_OWNER),
        ):
            assert driver.run(command, **(fields | {f"{name}_address": address}))[0] is status, (name, address)


def test_migration(line: ManufacturingLine, setup: Setup) -> None:
    source, target = setup, secured(line)
    away, home = source.driver, target.driver
    handle = launched(source)
    home.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
    )
    away.write(BUFFER, home.read(BUFFER, 2084))
    away.write(BUFFER + 4096, home.read(BUFFER + 4096, 6252))
    away.write(BUFFER + 0x4000, line.hsk.encoded + line.root.encoded)
    away.done(
        Command.SEND_START, handle=handle, pdh_address=BUFFER, pdh_length=2084, platform_address=BUFFER + 4096,
        platform_length=6252, vendor_address=BUFFER + 0x4000, vendor_length=1664,
        session_address=BUFFER + 0x6000, session_length=772,
    )  # fmt: skip
    away.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 0x8000, chain_length=6252
    )
    home.write(
        BUFFER, away.read(BUFFER, 2084) + away.read(BUFFER + 0x8000, 6252) + line.hsk.encoded + line.root.encoded
    )
    home.write(BUFFER + 0x6000, away.read(BUFFER + 0x6000, 772))
    new = home.done(
        Command.RECEIVE_START,
        policy=0x44,
        pdh_address=BUFFER,
        pdh_length=10000,
        session_address=BUFFER + 0x6000,
        session_length=772,
    )["handle"]
    home.done(Command.ACTIVATE, handle=new, asid=4)
    home.write(BUFFER, struct.pack("<QQ", SMR + 8 * MIB, 8 * MIB))
    home.done(Command.SET_GUEST_PRIVATE_MEMORY, handle=new, region_count=1, regions_address=BUFFER)

    # Header at BUFFER, guest block at + 4096, transport block at + 8192; transport pages from RAM on.
    packet = {
        "header_address": BUFFER, "guest_address": BUFFER + 4096, "guest_length": 16,
        "transport_address": BUFFER + 8192,
    }  # fmt: skip
    status, block = away.run(Command.SEND_ENCRYPT_DATA, handle=handle)
    assert (status, block["header_length"], block["transport_length"]) == (
        FirmwareStatus.INVALID_LENGTH,
        60,
        512 * 4096,
    )
    guest_block = struct.pack("<QQ", GPA, GPA + 4096)
    away.write(BUFFER + 4096, guest_block)
    away.write(BUFFER + 8192, struct.pack("<QQ", RAM, RAM + 0x2000))
    away.done(Command.SEND_ENCRYPT_DATA, handle=handle, flag=1, **packet)
    lengths = {"header_length": 60, "transport_length": 8192}
    for name, value in (
        ("header_length", 59),
        ("transport_length", 8191),
        ("guest_length", 4104),
        ("transport_length", 0xFFFFFFFF),
    ):
        assert away.run(Command.SEND_ENCRYPT_DATA, handle=handle, **(packet | lengths | {name: value}))[0] is (
            FirmwareStatus.INVALID_LENGTH
        )
    away.write(BUFFER + 8192, struct.pack("<QQ", RAM, SMR))
    assert (
        away.run(Command.SEND_ENCRYPT_DATA, handle=handle, **(packet | lengths))[0] is FirmwareStatus.INVALID_PAGE_OWNER
    )
    away.write(BUFFER + 8192, struct.pack("<QQ", RAM, RAM + 0x2000))
    refused_anywhere(
        away, Command.SEND_ENCRYPT_DATA, SMR, {"handle": handle} | packet | lengths, "header", "guest", "transport"
    )
    away.done(Command.SEND_ENCRYPT_DATA, handle=handle, **(packet | lengths))
    assert away.read(RAM, 4096) != PAGES[:4096]

    def carry(length: int) -> None:
        for place, size in (
            (BUFFER, 60),
            (BUFFER + 4096, 16),
            (BUFFER + 8192, 16),
            (RAM, length),
            (RAM + 0x2000, 4096),
        ):
            home.write(place, away.read(place, size))

    carry(4096)
    assert home.run(Command.RECEIVE_ENCRYPT_DATA, handle=new, **(packet | lengths | {"header_length": 52}))[0] is (
        FirmwareStatus.INVALID_LENGTH
    )
    home.done(Command.RECEIVE_ENCRYPT_DATA, handle=new, **(packet | lengths))

    context = {"header_address": BUFFER, "transport_address": BUFFER + 8192}
    status, block = away.run(Command.SEND_ENCRYPT_CONTEXT, handle=handle, **context)
    assert (status, block["header_length"]) == (FirmwareStatus.INVALID_LENGTH, 60)
    needed = block["transport_length"]
    assert 0 < needed <= 8192
    context |= {"header_length": 60, "transport_length": needed}
    refused_anywhere(away, Command.SEND_ENCRYPT_CONTEXT, SMR, {"handle": handle} | context, "header", "transport")
    away.write(BUFFER + 8192, struct.pack("<Q", SMR))
    assert away.run(Command.SEND_ENCRYPT_CONTEXT, handle=handle, **context)[0] is FirmwareStatus.INVALID_PAGE_OWNER
    away.write(BUFFER + 8192, struct.pack("<Q", RAM))
    away.done(Command.SEND_ENCRYPT_CONTEXT, handle=handle, **context)
    away.done(Command.SEND_FINISH, handle=handle)
    carry(4096)
    home.write(BUFFER + 0x3000, struct.pack("<Q", RAM + 0x8000))
    vmcbs = {"shadow_vmcb_address": BUFFER + 0x3000, "secure_vmcb_address": BUFFER + 0x3800}
    assert home.run(Command.RECEIVE_FINISH, handle=new)[0] is FirmwareStatus.INVALID_GUEST_STATE
    for length in (7, 4104, 0xFFFFFFF8):
        status, _ = home.run(Command.RECEIVE_ENCRYPT_CONTEXT, handle=new, vmcb_length=length, **context, **vmcbs)
        assert status is FirmwareStatus.INVALID_LENGTH
    arrival = {"handle": new, "vmcb_length": 8} | context | vmcbs
    refused_anywhere(
        home,
        Command.RECEIVE_ENCRYPT_CONTEXT,
        SMR + 8 * MIB,
        arrival,
        "header",
        "transport",
        "shadow_vmcb",
        "secure_vmcb",
    )
    home.done(Command.RECEIVE_ENCRYPT_CONTEXT, **arrival)
    (secure,) = struct.unpack("<Q", home.read(BUFFER + 0x3800, 8))
    assert SMR + 8 * MIB <= secure < SMR + 16 * MIB
    home.done(Command.RECEIVE_FINISH, handle=new)
    assert target.machine.guest_read(new, GPA, 8192) == PAGES
    target.processor.close()
