"""The mailbox: real command buffers in, status codes and answers out, whatever the host puts into memory."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator

import pytest
from reference.mailbox_driver import BLOCK, BUFFER, RAM, TMR, Setup, fields_of

from csvfast.certs import CertificateChain, CsvCertificate, ManufacturingLine, verify_chain
from csvfast.certs.factory import altered
from csvfast.crypto import SM2PrivateKey, hmac_sm3, sm3
from csvfast.errors import FirmwareError, FirmwareStatus, StateError, VerificationError
from csvfast.processor import pack_disk_password
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.core import C_BIT
from csvfast.processor.launch import measurement_message
from csvfast.processor.mailbox import HANDLERS, Mailbox
from csvfast.processor.owner import OwnerKeys, check_measurement, seal_secret
from csvfast.processor.session import make_session
from csvfast.report.layout import Report
from csvfast.report.policy import GuestPolicy
from csvfast.report.request import ReportRequest

SUCCESS = FirmwareStatus.SUCCESS
LITERAL = b"VM_ATTESTATION"
FIRMWARE = bytes(7 * index % 256 for index in range(4096))


@pytest.fixture(scope="module")
def line() -> ManufacturingLine:
    return ManufacturingLine.create()


@pytest.fixture
def setup(line: ManufacturingLine) -> Iterator[Setup]:
    made = Setup(line=line).initialised()
    yield made
    made.processor.close()


# ---- Platform -------------------------------------------------------------------------------------------------------


def test_life_of_a_platform(line: ManufacturingLine) -> None:
    setup = Setup(line=line)
    driver = setup.driver
    assert driver.done(Command.PLATFORM_STATUS) == {
        "api_major": 1, "api_minor": 4, "state": 0, "owner": 0b1110, "config": 2337 << 1, "guest_count": 0,
    }  # fmt: skip
    assert driver.run(Command.PEK_GEN)[0] is FirmwareStatus.INVALID_PLATFORM_STATE
    assert driver.run(Command.INIT, flags=2)[0] is FirmwareStatus.INVALID_PARAM
    assert driver.run(Command.INIT, flags=1)[0] is FirmwareStatus.INVALID_LENGTH
    assert (
        driver.run(Command.INIT, flags=1, tmr_address=0x80000, tmr_length=1 << 20)[0] is FirmwareStatus.INVALID_ADDRESS
    )
    driver.done(Command.INIT, flags=1, tmr_address=TMR | C_BIT, tmr_length=1 << 20)
    assert driver.run(Command.INIT)[0] is FirmwareStatus.INVALID_PLATFORM_STATE
    status = driver.done(Command.PLATFORM_STATUS)
    assert (status["state"], status["config"]) == (1, 2337 << 1 | 1)
    for command in (
        Command.PEK_GEN,
        Command.PDH_GEN,
        Command.DF_FLUSH,
        Command.NOP,
        Command.SHUTDOWN,
        Command.FACTORY_RESET,
    ):
        driver.done(command)
    size = LAYOUTS[Command.INIT_EX].size
    assert driver.run(Command.INIT_EX, length=size - 1)[0] is FirmwareStatus.INVALID_LENGTH
    status = driver.run(Command.INIT_EX, length=size, nv_address=RAM, nv_length=32767)[0]
    assert status is FirmwareStatus.INVALID_LENGTH
    driver.done(Command.INIT_EX, length=size)
    assert driver.done(Command.PLATFORM_STATUS)["state"] == 1


def test_length_queries(setup: Setup) -> None:
    driver = setup.driver
    status, block = driver.run(Command.PEK_CSR)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 2084)
    status, block = driver.run(Command.PEK_CSR, address=BUFFER, length=2083)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 2084)
    assert driver.read(BUFFER, 2084) == bytes(2084)
    status, block = driver.run(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096
    )
    assert (status, block["pdh_length"], block["chain_length"]) == (FirmwareStatus.INVALID_LENGTH, 2084, 6252)
    assert driver.read(BUFFER, 2084) == bytes(2084), "one buffer fits, but nothing is written"
    status, block = driver.run(Command.GET_ID)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 64)
    assert driver.done(Command.GET_ID, address=BUFFER, length=100)["length"] == 64
    assert driver.read(BUFFER, 65).rstrip(b"\0").decode() == setup.processor.chip.chip_id


def test_exported_certificates_verify(setup: Setup, line: ManufacturingLine) -> None:
    driver = setup.driver
    block = driver.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=9999, chain_address=BUFFER + 8192, chain_length=6252
    )
    assert (block["pdh_length"], block["chain_length"]) == (2084, 6252)
    pdh = CsvCertificate.parse(driver.read(BUFFER, 2084))
    pek, oca, cek = (CsvCertificate.parse(driver.read(BUFFER + 8192 + 2084 * index, 2084)) for index in range(3))
    chain = CertificateChain(hsk=line.hsk, cek=cek, pek=pek, oca=oca, pdh=pdh)
    assert verify_chain(chain, [line.root]) == line.root


def test_ownership(setup: Setup) -> None:
    driver = setup.driver
    driver.done(Command.PEK_CSR, address=BUFFER, length=2084)
    csr = CsvCertificate.parse(driver.read(BUFFER, 2084))
    key = SM2PrivateKey.generate()
    uid = b"HYGON-SSD-OCA"
    oca = CsvCertificate.build(usage=0x1001, algorithm=4, point=key.public_key.point, user_id=uid)
    oca = oca.with_signature(1, key, 0x1001, uid)
    signed = csr.with_signature(2, key, 0x1001, uid)

    def offer(pek: bytes, authority: bytes, **lengths: int) -> FirmwareStatus:
        driver.write(BUFFER, pek)
        driver.write(BUFFER + 4096, authority)
        fields = {"pek_length": len(pek), "oca_length": len(authority)} | lengths
        return driver.run(Command.PEK_CERT_IMPORT, pek_address=BUFFER, oca_address=BUFFER + 4096, **fields)[0]

    assert offer(signed.encoded, oca.encoded, pek_length=2083) is FirmwareStatus.INVALID_LENGTH
    assert offer(signed.encoded, oca.encoded, oca_length=0xFFFFFFFF) is FirmwareStatus.INVALID_LENGTH
    assert offer(csr.encoded, oca.encoded) is FirmwareStatus.BAD_SIGNATURE
    assert offer(signed.encoded, altered(oca.encoded, usage=0x1002)) is FirmwareStatus.INVALID_CERTIFICATE
    assert driver.done(Command.PLATFORM_STATUS)["owner"] & 1 == 0
    assert offer(signed.encoded, oca.encoded) is SUCCESS
    assert driver.done(Command.PLATFORM_STATUS)["owner"] & 1 == 1
    assert offer(signed.encoded, oca.encoded) is FirmwareStatus.ALREADY_OWNED


def test_what_only_hygon_can_make(setup: Setup) -> None:
    driver = setup.driver
    assert driver.run(Command.DOWNLOAD_FIRMWARE, address=BUFFER, length=0)[0] is FirmwareStatus.INVALID_LENGTH
    assert driver.run(Command.DOWNLOAD_FIRMWARE, address=BUFFER, length=0x80001)[0] is FirmwareStatus.INVALID_LENGTH
    assert driver.run(Command.DOWNLOAD_FIRMWARE, address=BUFFER, length=0x80000)[0] is FirmwareStatus.BAD_SIGNATURE
    lengths = {"hgscsk_length": 2084, "hgsc_length": 2084}
    assert driver.run(Command.HGSC_CERT_IMPORT, hgscsk_address=BUFFER, hgsc_address=BUFFER, **lengths)[0] in (
        FirmwareStatus.UNSUPPORTED, FirmwareStatus.INVALID_CERTIFICATE,
    )  # fmt: skip
    for command in (Command.ACTIVATE_EX, Command.SWAP_OUT, Command.SWAP_IN):
        assert setup.machine.command(command, BLOCK) is FirmwareStatus.UNSUPPORTED


def test_a_failing_disk_is_the_platforms_error(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(setup.processor, "pek_gen", fail)
    assert setup.driver.run(Command.PEK_GEN)[0] is FirmwareStatus.HWERROR_PLATFORM
    assert "the disk is full" in (setup.machine.problem or "")


# ---- Launch ---------------------------------------------------------------------------------------------------------


def test_launch_and_report(setup: Setup) -> None:
    driver = setup.driver
    handle = driver.done(Command.LAUNCH_START, policy=5)["handle"]
    assert handle
    assert driver.run(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM, length=4096)[0] is FirmwareStatus.INACTIVE
    driver.done(Command.ACTIVATE, handle=handle, asid=3)
    assert driver.run(Command.ACTIVATE, handle=handle, asid=4)[0] is FirmwareStatus.ACTIVE
    driver.write(RAM, FIRMWARE)
    driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM | C_BIT, length=4096)
    assert driver.read(RAM, 4096) != FIRMWARE, "encrypted in place"
    driver.write(RAM + 4096, bytes(4096))
    driver.done(Command.LAUNCH_UPDATE_VMSA, handle=handle, address=RAM + 4096, length=4096)
    status, block = driver.run(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=47)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 48)
    assert (
        driver.run(Command.LAUNCH_MEASURE, handle=handle, address=1 << 40, length=48)[0]
        is FirmwareStatus.INVALID_ADDRESS
    )
    assert driver.done(Command.GUEST_STATUS, handle=handle)["state"] == 1, "refusals change nothing"
    assert driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=4096)["length"] == 48
    assert driver.done(Command.GUEST_STATUS, handle=handle) == {"handle": handle, "policy": 5, "asid": 3, "state": 2}
    driver.done(Command.LAUNCH_FINISH, handle=handle)

    page = RAM + 8192
    setup.machine.guest_write(handle, page | C_BIT, ReportRequest.build(b"data", bytes(range(16))))
    status, block = driver.run(Command.ATTESTATION, handle=handle, address=page, mnonce=LITERAL, length=100)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 4096)
    driver.done(Command.ATTESTATION, handle=handle, address=page, mnonce=LITERAL, length=4096)
    report = Report.parse(setup.machine.guest_read(handle, page | C_BIT, 4096))
    # The launch digest of A.9's formula without a table: SM3 of the firmware's bytes alone.
    assert report.measure == sm3(FIRMWARE).digest()
    assert (report.policy.value, report.mnonce, report.report_data[:4]) == (5, bytes(range(16)), b"data")
    assert report.mac_is_valid(bytes(range(16)))
    report.pek.public_key.verify(report.signature, report.signed_bytes, user_id=report.pek.user_id)
    # What the host finds in the page is no report.
    assert driver.read(page, 4096) != report.page()

    # A request the host wrote is not the guest's: under the guest's key it is noise, and its hash is wrong.
    driver.write(page, ReportRequest.build(b"forged", bytes(16)))
    status, _ = driver.run(Command.ATTESTATION, handle=handle, address=page, mnonce=LITERAL, length=4096)
    assert status in (FirmwareStatus.SECURE_DATA_INVALID, FirmwareStatus.INVALID_PARAM)

    nonce = bytes(range(100, 116))
    status, block = driver.run(Command.ATTESTATION, handle=handle, address=BUFFER, mnonce=nonce, length=207)
    assert (status, block["length"]) == (FirmwareStatus.INVALID_LENGTH, 208)
    assert driver.done(Command.ATTESTATION, handle=handle, address=BUFFER, mnonce=nonce, length=4096)["length"] == 208
    host = driver.read(BUFFER, 208)
    assert host[:16] == nonce
    assert host[16:48] == report.measure


def test_session_measurement_and_secret(setup: Setup) -> None:
    driver = setup.driver
    driver.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
    )
    policy = GuestPolicy(1)
    pdh = CsvCertificate.parse(driver.read(BUFFER, 2084))
    owner = make_session(pdh, policy, vm_id=b"guest".ljust(16, b"\0"), vm_digest=sm3(FIRMWARE).digest())
    dh, blob = owner.certificate.encoded, owner.blob
    driver.write(BUFFER, dh)
    driver.write(BUFFER + 4096, blob)
    fields = {"dh_address": BUFFER, "dh_length": 2084, "session_address": BUFFER + 4096, "session_length": 772}
    assert (
        driver.run(Command.LAUNCH_START, policy=1, **(fields | {"dh_length": 2083}))[0] is FirmwareStatus.INVALID_LENGTH
    )
    assert (
        driver.run(Command.LAUNCH_START, policy=1, **(fields | {"session_length": 771}))[0]
        is FirmwareStatus.INVALID_LENGTH
    )
    assert driver.run(Command.LAUNCH_START, policy=1, handle=77, **fields)[0] is FirmwareStatus.INVALID_GUEST
    assert driver.run(Command.LAUNCH_START, policy=0, **fields)[0] is FirmwareStatus.BAD_MEASUREMENT
    handle = driver.done(Command.LAUNCH_START, policy=1, **fields)["handle"]
    driver.done(Command.ACTIVATE, handle=handle, asid=1)
    driver.write(RAM, FIRMWARE)
    driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM, length=4096)
    driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
    measurement = driver.read(BUFFER, 48)
    check_measurement(owner.tik, measurement, policy, sm3(FIRMWARE).digest(), (1, 4), 2337)
    assert len(measurement_message((1, 4), policy, bytes(32), bytes(16))) == 55

    keys = OwnerKeys(dh, blob, owner.tek, owner.tik, policy)
    header, transport = seal_secret(keys, pack_disk_password(b"swordfish"), measurement)
    driver.write(BUFFER, header)
    driver.write(BUFFER + 4096, transport)
    secret = {
        "handle": handle, "header_address": BUFFER, "header_length": 52, "guest_address": RAM + 0x2000,
        "guest_length": len(transport), "transport_address": BUFFER + 4096, "transport_length": len(transport),
    }  # fmt: skip
    for name, value in (
        ("header_length", 51),
        ("guest_length", 0xFFFFFFF0),
        ("transport_length", 0xFFFFFFF0),
        ("guest_length", 16),
    ):
        assert driver.run(Command.LAUNCH_SECRET, **(secret | {name: value}))[0] is FirmwareStatus.INVALID_LENGTH
    assert (
        driver.run(Command.LAUNCH_SECRET, **(secret | {"guest_address": RAM + 8}))[0] is FirmwareStatus.INVALID_ADDRESS
    )
    longest = secret | {"guest_length": 16 << 10, "transport_length": 16 << 10}
    assert driver.run(Command.LAUNCH_SECRET, **longest)[0] is FirmwareStatus.BAD_MEASUREMENT, "16 KiB are not too long"
    driver.write(BUFFER + 4096, bytes([transport[0] ^ 1]) + transport[1:])
    assert driver.run(Command.LAUNCH_SECRET, **secret)[0] is FirmwareStatus.BAD_MEASUREMENT
    driver.write(BUFFER + 4096, transport)
    driver.done(Command.LAUNCH_SECRET, **secret)
    driver.done(Command.LAUNCH_FINISH, handle=handle)
    assert b"swordfish" in setup.machine.guest_read(handle, (RAM + 0x2000) | C_BIT, len(transport))
    assert b"swordfish" not in driver.read(0, setup.memory.size)


def test_a_wrong_vm_digest_never_runs(setup: Setup) -> None:
    driver = setup.driver
    driver.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
    )
    owner = make_session(CsvCertificate.parse(driver.read(BUFFER, 2084)), GuestPolicy(1), vm_digest=bytes([1]) * 32)
    driver.write(BUFFER, owner.certificate.encoded + owner.blob)
    handle = driver.done(
        Command.LAUNCH_START,
        policy=1,
        dh_address=BUFFER,
        dh_length=2084,
        session_address=BUFFER + 2084,
        session_length=772,
    )["handle"]
    driver.done(Command.ACTIVATE, handle=handle, asid=1)
    driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM, length=4096)
    for _ in range(2):
        status, _ = driver.run(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
        assert status is FirmwareStatus.BAD_MEASUREMENT
    assert driver.run(Command.LAUNCH_FINISH, handle=handle)[0] is FirmwareStatus.INVALID_GUEST_STATE
    with pytest.raises(FirmwareError, match="INVALID_GUEST_STATE"):
        setup.machine.guest_read(handle, RAM | C_BIT, 16)


def test_debug_and_copy(setup: Setup) -> None:
    driver = setup.driver
    closed = setup.launched(policy=1, asid=1)
    status, _ = driver.run(
        Command.DBG_DECRYPT, handle=closed, source_address=RAM, destination_address=BUFFER, length=64
    )
    assert status is FirmwareStatus.POLICY_FAILURE
    place = RAM + 0x10000
    handle = setup.launched(FIRMWARE, policy=0, asid=2, place=place)
    driver.done(Command.DBG_DECRYPT, handle=handle, source_address=place, destination_address=BUFFER, length=4096)
    assert driver.read(BUFFER, 4096) == FIRMWARE
    driver.write(BUFFER, b"debugged".ljust(16, b"."))
    driver.done(Command.DBG_ENCRYPT, handle=handle, source_address=BUFFER, destination_address=place + 32, length=16)
    driver.done(Command.COPY, handle=handle, source_address=place, destination_address=place + 0x2000, length=64)
    assert setup.machine.guest_read(handle, (place + 0x2000) | C_BIT, 64)[32:40] == b"debugged"
    assert setup.machine.guest_read(handle, place + 0x2000, 64) == driver.read(place + 0x2000, 64), (
        "without C-bit: as the host"
    )


def test_reuse_of_an_asid(setup: Setup) -> None:
    driver = setup.driver
    first = setup.launched(asid=8)
    driver.done(Command.DEACTIVATE, handle=first)
    assert driver.run(Command.ACTIVATE, handle=first, asid=8)[0] is FirmwareStatus.DFFLUSH_REQUIRED
    assert driver.run(Command.ACTIVATE, handle=first, asid=9)[0] is FirmwareStatus.INVALID_ASID
    assert driver.run(Command.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED
    setup.machine.wbinvd(0)
    driver.done(Command.DF_FLUSH)
    driver.done(Command.DECOMMISSION, handle=first)
    assert driver.done(Command.PLATFORM_STATUS)["state"] == 1
    setup.launched(asid=8)


# ---- Migration ------------------------------------------------------------------------------------------------------


def test_migration_by_buffers(line: ManufacturingLine) -> None:
    source, target = (Setup(line=line).initialised() for _ in range(2))
    handle = source.launched(FIRMWARE, policy=0)
    away, home = source.driver, target.driver

    home.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
    )
    away.write(BUFFER, home.read(BUFFER, 2084))
    away.write(BUFFER + 4096, home.read(BUFFER + 4096, 6252))
    away.write(BUFFER + 0x4000, line.hsk.encoded + line.root.encoded)
    status, block = away.run(Command.SEND_START, handle=handle)
    assert (status, block["session_length"]) == (FirmwareStatus.INVALID_LENGTH, 772)
    start = {
        "handle": handle, "pdh_address": BUFFER, "pdh_length": 2084, "platform_address": BUFFER + 4096, "platform_length": 6252,
        "vendor_address": BUFFER + 0x4000, "vendor_length": 1664, "session_address": BUFFER + 0x6000, "session_length": 772,
    }  # fmt: skip
    assert away.run(Command.SEND_START, **(start | {"platform_length": 0x10001}))[0] is FirmwareStatus.INVALID_LENGTH
    assert away.run(Command.SEND_START, **(start | {"session_address": 1 << 46}))[0] is FirmwareStatus.INVALID_ADDRESS
    block = away.done(Command.SEND_START, **start)
    assert (block["policy"], block["session_length"]) == (0, 772)

    away.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 0x8000, chain_length=6252
    )
    home.write(
        BUFFER, away.read(BUFFER, 2084) + away.read(BUFFER + 0x8000, 6252) + line.hsk.encoded + line.root.encoded
    )
    home.write(BUFFER + 0x6000, away.read(BUFFER + 0x6000, 772))
    received = {"pdh_address": BUFFER, "pdh_length": 10000, "session_address": BUFFER + 0x6000, "session_length": 772}
    assert (
        home.run(Command.RECEIVE_START, policy=0, **(received | {"session_length": 771}))[0]
        is FirmwareStatus.INVALID_LENGTH
    )
    new = home.done(Command.RECEIVE_START, policy=0, **received)["handle"]
    home.done(Command.ACTIVATE, handle=new, asid=5)

    status, block = away.run(Command.SEND_UPDATE_DATA, handle=handle, guest_address=RAM, guest_length=4096)
    assert (status, block["header_length"], block["transport_length"]) == (FirmwareStatus.INVALID_LENGTH, 52, 4096)
    packet = {
        "header_address": BUFFER, "header_length": 52, "guest_address": RAM, "guest_length": 4096,
        "transport_address": BUFFER + 4096, "transport_length": 4096,
    }  # fmt: skip
    away.done(Command.SEND_UPDATE_DATA, handle=handle, **packet)
    away.done(Command.SEND_FINISH, handle=handle)
    assert away.read(BUFFER + 4096, 4096) not in (FIRMWARE, away.read(RAM, 4096))
    home.write(BUFFER, away.read(BUFFER, 52))
    home.write(BUFFER + 4096, away.read(BUFFER + 4096, 4096))
    arrival = packet | {"guest_address": RAM + 0x8000}
    assert home.run(Command.RECEIVE_UPDATE_DATA, handle=new, **(arrival | {"transport_length": 0xFFFFFFFF}))[0] is (
        FirmwareStatus.INVALID_LENGTH
    )
    home.done(Command.RECEIVE_UPDATE_DATA, handle=new, **arrival)
    home.done(Command.RECEIVE_FINISH, handle=new)
    assert target.machine.guest_read(new, (RAM + 0x8000) | C_BIT, 4096) == FIRMWARE
    assert away.run(Command.SEND_CANCEL, handle=handle)[0] is FirmwareStatus.INVALID_GUEST_STATE


def test_the_platforms_state_comes_before_parameters(setup: Setup) -> None:
    driver = setup.driver
    driver.done(Command.LAUNCH_START)
    for command, fields in (
        (Command.INIT, {"flags": 2}),
        (Command.INIT_EX, {"length": 0}),
        (Command.INIT_EX, {"length": LAYOUTS[Command.INIT_EX].size, "nv_length": 1}),
        (Command.DOWNLOAD_FIRMWARE, {"length": 0}),
        (Command.DOWNLOAD_FIRMWARE, {"length": 16, "address": 1 << 40}),
        (Command.HGSC_CERT_IMPORT, {"hgsc_length": 0xFFFFFFFF}),
        (Command.PEK_CERT_IMPORT, {"pek_length": 1}),
        (Command.PEK_CSR, {"length": 0}),
    ):
        assert driver.run(command, **fields)[0] is FirmwareStatus.INVALID_PLATFORM_STATE, command.name


def test_answers_leave_the_fields_of_the_host(setup: Setup) -> None:
    """Only what is out or in/out is written, here around an input that the answer of another command has overwritten."""
    driver = setup.driver
    driver.write(BLOCK - 16, bytes([0xEE]) * 128)
    block = LAYOUTS[Command.PDH_CERT_EXPORT].encode(
        pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=9999
    )
    driver.write(BLOCK, block)
    assert setup.machine.command(Command.PDH_CERT_EXPORT, BLOCK) is SUCCESS
    expected = block[:24] + (6252).to_bytes(4, "little")
    assert driver.read(BLOCK - 16, 128) == bytes([0xEE]) * 16 + expected + bytes([0xEE]) * (112 - len(expected))


# ---- Hostile hosts --------------------------------------------------------------------------------------------------


def test_unknown_commands_and_places(setup: Setup) -> None:
    for command in (0, 0x10, 0x120, 0x7FF, 1 << 64, -1):
        assert setup.machine.command(command, BLOCK) is FirmwareStatus.INVALID_COMMAND
    size = setup.memory.size
    for address in (size, size - 11, (1 << 64) - 1, 1 << 64, 1 << 200, -1, -C_BIT, 1 << 48, TMR):
        assert setup.machine.command(Command.PLATFORM_STATUS, address) is FirmwareStatus.INVALID_ADDRESS, hex(address)
    assert setup.machine.command(Command.PLATFORM_STATUS, size - 12) is SUCCESS
    assert setup.machine.command(Command.PLATFORM_STATUS, (size - 12) | C_BIT) is SUCCESS
    assert setup.machine.command(Command.PEK_GEN, 1 << 200) is SUCCESS, "without a block the address does not count"


def test_buffers_that_overlap_their_block(setup: Setup) -> None:
    """The block was read before; the answer is written over it and then the length into that."""
    driver = setup.driver
    driver.write(BLOCK, LAYOUTS[Command.PEK_CSR].encode(address=BLOCK, length=2084))
    assert setup.machine.command(Command.PEK_CSR, BLOCK) is SUCCESS
    assert driver.read(BLOCK, 2084)[:8] == b"\x01\0\0\0\x01\x04\0\0"
    assert fields_of(Command.PEK_CSR, driver.read(BLOCK, 12))["length"] == 2084


def test_no_command_reaches_the_firmwares_memory(setup: Setup) -> None:
    before = setup.driver.read(TMR, 1 << 20)
    for address in (TMR, TMR + (1 << 20) - 1, TMR - 2083):
        assert setup.driver.run(Command.PEK_CSR, address=address, length=2084)[0] is not SUCCESS
    assert setup.driver.read(TMR, 1 << 20) == before


def test_every_published_command_has_a_handler() -> None:
    assert set(HANDLERS) == set(LAYOUTS) - {Command.RING_BUFFER}


def test_commands_that_take_memory_answer_nothing_into_it() -> None:
    """Answers are written without looking at their place again; these could have given it to the firmware or a guest."""
    for command in (Command.INIT, Command.INIT_EX, Command.SET_SMR, Command.SET_SMCR, Command.SET_GUEST_PRIVATE_MEMORY):
        assert not LAYOUTS[command].written, command


def test_problem_is_for_people_and_holds_no_secret(setup: Setup) -> None:
    status, _ = setup.driver.run(Command.ACTIVATE, handle=9, asid=1)
    assert status is FirmwareStatus.INVALID_PLATFORM_STATE
    assert "expected WORKING" in (setup.machine.problem or "")
    setup.driver.done(Command.NOP)
    assert setup.machine.problem is None
    with pytest.raises(TypeError):
        pickle.dumps(Mailbox(setup.processor).processor)


def test_blocks_are_read_once(setup: Setup) -> None:
    """Answers land where the block was when it was read, even if it holds its own address in itself."""
    driver = setup.driver
    handle = driver.done(Command.LAUNCH_START, policy=0)["handle"]
    block = struct.pack("<IIQII", handle, 0, RAM, 4096, 0)
    driver.write(RAM, block)
    driver.done(Command.ACTIVATE, handle=handle, asid=1)
    # The block lies in the very page that is encrypted by the command it names.
    assert setup.machine.command(Command.LAUNCH_UPDATE_DATA, RAM) is SUCCESS
    assert driver.read(RAM, 24) != block


def test_both_forms_of_the_measurement_are_known_to_the_owner() -> None:
    """With the build and without it; another build, digest, policy or nonce is refused in either."""
    tik, policy, digest, nonce = bytes(range(16)), GuestPolicy(1), bytes(32), bytes(16)
    for number in (None, 2337):
        tag = hmac_sm3(tik, measurement_message((1, 4), policy, digest, nonce, number)).digest()
        check_measurement(tik, tag + nonce, policy, digest, (1, 4), 2337)
        for other in (
            (tag + nonce, GuestPolicy(0), digest, (1, 4)),
            (tag + nonce, policy, b"\1" + digest[1:], (1, 4)),
            (tag + nonce, policy, digest, (1, 3)),
            (tag + b"\1" + nonce[1:], policy, digest, (1, 4)),
        ):
            with pytest.raises(VerificationError):
                check_measurement(tik, *other, 2337)
    with pytest.raises(VerificationError):
        check_measurement(tik, tag + nonce, policy, digest, (1, 4), 2336)
