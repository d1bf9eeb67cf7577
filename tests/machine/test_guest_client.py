"""The guest's client without a virtual machine: the channel's bytes, hostile hosts, answers to other requests, devices."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine.guest_processor import FRAME, PAGE, ChannelHost, GuestProcessor

from csvfast import sm3
from csvfast.attest import verify
from csvfast.errors import (
    ArgumentError,
    ClosedError,
    FirmwareError,
    FirmwareStatus,
    FormatError,
    LengthError,
    StateError,
    VerificationError,
)
from csvfast.machine.guest import (
    ChannelOperation,
    ChannelTransport,
    GuestDevice,
    ProcessorChannel,
    RequestPage,
    SocketTransport,
)
from csvfast.machine.guest.__main__ import main
from csvfast.machine.guest.device import CuseDevice, DeviceRequests, SocketDevice
from csvfast.processor import rtmr
from csvfast.processor.ioctl import CSV_GUEST_GET_REPORT, CSV_GUEST_RTMR_REQUEST, ReportArgument, RtmrArgument
from csvfast.report import Report, ReportRequest


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestProcessor]:
    with GuestProcessor(tmp_path_factory.mktemp("chip") / "firmware") as found:
        yield found


@pytest.fixture(autouse=True)
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are found by their virtual address: the test's host lives in the same process, and need not be root."""
    monkeypatch.setattr(RequestPage, "address", property(lambda self: self.virtual_address))


def read(address: int) -> bytes:
    return ctypes.string_at(address, PAGE)


def write(address: int, page: bytes) -> None:
    ctypes.memmove(address, page, PAGE)


@pytest.fixture
def device(processor: GuestProcessor) -> Iterator[GuestDevice]:
    ours, theirs = socket.socketpair()
    host = ChannelHost(theirs, processor.answer, read, write)
    with GuestDevice(ChannelTransport(ProcessorChannel.over(ours.detach(), timeout=10))) as found:
        yield found
    host.close()


# ---- The channel


def exchange(answers: list[bytes], operation: ChannelOperation = ChannelOperation.ATTESTATION) -> tuple[Any, bytes]:
    """What the channel makes of a host's answers, and the request that the host saw. TAG in an answer stands for its tag."""
    ours, theirs = socket.socketpair()
    seen: list[bytes] = []

    def serve() -> None:
        request = theirs.recv(64)
        seen.append(request)
        theirs.sendall(b"".join(answers).replace(b"TAG!", request[8:12]))
        theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    with ProcessorChannel.over(ours.detach(), timeout=10) as channel, theirs:
        thread.start()
        try:
            if operation is ChannelOperation.INFO:
                return channel.info(), seen[0]
            return channel.call(operation, 0x12345000, PAGE), seen[0]
        finally:
            thread.join(10)


def frame(**changes: Any) -> bytes:
    fields = {"magic": b"CSVG", "version": 1, "operation": 1, "tag": b"TAG!", "status": 0, "address": 0x12345000, "value": 7}
    fields |= changes
    return struct.pack("<4sHH4sIQQ", *fields.values())


def test_messages_byte_for_byte() -> None:
    value, request = exchange([frame()])
    assert value == 7
    assert request[:8] == b"CSVG\x01\x00\x01\x00"
    assert request[12:] == bytes.fromhex("00100000 0050341200000000 0000000000000000")
    assert exchange([frame(operation=3, address=0x65, value=2)], ChannelOperation.INFO)[0] == (0x65, 2)


def test_answers_of_earlier_requests_are_passed_over() -> None:
    other = frame(tag=b"\0\0\0\0", value=1, status=3)
    value, request = exchange([other, other, frame()])
    assert value == 7 or request[8:12] == bytes(4)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([frame(magic=b"CSVH")], FormatError),
        ([frame(version=2)], FormatError),
        ([frame(operation=2)], FormatError),
        ([frame(address=0x12346000)], FormatError),
        ([frame(status=0x10001)], FormatError),
        ([frame(status=0x7777)], FormatError),
        ([frame(status=0x15)], FirmwareError),
        ([frame()[:31]], ConnectionError),
        ([], ConnectionError),
    ],
)
def test_hostile_hosts(answers: list[bytes], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        exchange(answers)
    if error is FirmwareError:
        assert cast("FirmwareError", caught.value).status is FirmwareStatus.UNSUPPORTED


@given(st.binary(min_size=32, max_size=96))
def test_any_answer_is_an_error_or_a_value(answer: bytes) -> None:
    with pytest.raises((FormatError, FirmwareError, ConnectionError)):
        exchange([answer.replace(b"CSVG", b"CSVg")])


def test_channel_times_out_and_closes() -> None:
    ours, theirs = socket.socketpair()
    channel = ProcessorChannel.over(ours.detach(), timeout=0.05)
    with pytest.raises(TimeoutError):
        channel.info()
    channel.close()
    channel.close()
    with pytest.raises(ClosedError):
        channel.info()
    theirs.close()
    with pytest.raises(FileNotFoundError):
        ProcessorChannel("/dev/no-such-port")


def test_threads_take_turns(device: GuestDevice) -> None:
    results: list[bool] = []

    def ask(number: int) -> None:
        data = bytes([number]) * 64
        results.extend(device.report(data).report_data == data for _ in range(10))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 40


# ---- The page


def test_page_is_locked_and_wiped() -> None:
    page = RequestPage()
    page.write(b"abc")
    assert page.memory[:5] == b"abc\0\0"
    place = page.virtual_address
    assert place % PAGE == 0
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    flags = text[text.index(f"{place:x}-") :]
    flags = next(line for line in flags.splitlines() if line.startswith("VmFlags:"))
    assert {"lo", "dc", "dd"} <= set(flags.split()), "locked, not for children, not in core dumps"
    with pytest.raises(LengthError):
        page.write(bytes(PAGE + 1))
    page.wipe()
    assert page.memory[:] == bytes(PAGE)
    page.close()
    page.close()
    with pytest.raises(ClosedError):
        page.write(b"")


def test_physical_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with RequestPage() as page:
        if os.geteuid():
            with pytest.raises(PermissionError):
                _ = page.address
        else:
            first = page.address
            assert first > 0
            assert first % PAGE == 0
            assert page.address == first


@pytest.mark.parametrize(
    ("looks", "arrives"),
    # Each request looks before and after it (False: at another page, which the kernel uses otherwise).
    [([True, False], True), ([False, True, True, True], True), ([False, True] * 4, False), ([False, False], False)],
)
@pytest.mark.parametrize("other", ["a request", "zeros"])
def test_page_that_moves(
    device: GuestDevice, monkeypatch: pytest.MonkeyPatch, looks: list[bool], arrives: bool, other: str
) -> None:
    told = iter(looks)
    with RequestPage() as decoy:
        if other == "a request":
            decoy.write(ReportRequest.build(b"another's"))
        place = decoy.virtual_address
        monkeypatch.setattr(RequestPage, "address", property(lambda self: self.virtual_address if next(told) else place))
        if arrives:
            assert device.report(b"mine").report_data[:4] == b"mine"
        else:
            with pytest.raises((StateError, VerificationError, FirmwareError)):
                device.report()


# ---- Reports and keys


def test_report_verifies_under_the_simulators_root(device: GuestDevice, processor: GuestProcessor) -> None:
    evidence = device.evidence(b"\x5a" * 64)
    assert evidence.report.report_data == b"\x5a" * 64
    assert evidence.report.measure == processor.digest
    assert evidence.report.sealing_key == bytes(32)
    with_chain = type(evidence)(evidence.report, hsk_cek=processor.chip.hsk_cek, encoding="rats-tls")
    verify(with_chain, roots=(processor.chip.root,))
    with pytest.raises(VerificationError):
        verify(with_chain)
    assert device.report(b"short").report_data == b"short".ljust(64, b"\0")
    assert device.report(extended=True).version == 1, "no CSV3"
    for wrong in (bytes(63), bytes(65)):
        with pytest.raises(LengthError):
            device.evidence(wrong)
    with pytest.raises(LengthError):
        device.report(bytes(65))


def test_sealing_key(device: GuestDevice, processor: GuestProcessor) -> None:
    first, second = device.sealing_key(), device.sealing_key()
    expected = Report.parse(processor.answer(ReportRequest.build())).sealing_key
    assert bytes(first) == bytes(second) == expected
    assert expected.hex() not in repr(first)


class Altered:
    """A transport that changes the answer."""

    def __init__(self, processor: GuestProcessor, change: str) -> None:
        self.processor, self.change = processor, change
        self.page: RequestPage | None = None
        self.replay: bytes | None = None

    def attestation(self, page: RequestPage) -> None:
        self.page = page
        request = page.memory[:]
        if self.change == "none":
            return
        if self.change == "other request":
            request = ReportRequest.build(request[:64])
        elif self.change == "other data":
            request = ReportRequest.build(secrets.token_bytes(64), request[64:80])
        answer = bytearray(self.processor.answer(request))
        if self.change.isdigit():
            answer[int(self.change)] ^= 1
        elif self.change == "mask":
            # The mask is not signed; moved together with what it covers, only the MAC's area stays.
            answer[0xBC] ^= 1
        elif self.change == "noise":
            answer[:] = secrets.token_bytes(PAGE)
        write(page.virtual_address, bytes(answer))

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        guest = cast("Any", SimpleNamespace(rtmr_version=1, rtmr_state=1, rtmrs=[bytes(32)] * 5))
        answer = bytearray(rtmr.answer(guest, page.memory[:length]))
        answer[0 if self.change == "command" else 2] ^= 1
        page.write(bytes(answer))

    def close(self) -> None: ...


# PEK, chip id, sealing key, MAC; the mnonce and the data under the mask.
@pytest.mark.parametrize(
    "change",
    ["none", "other request", "other data", "noise", "mask", str(0x150), str(0x980), str(0x9B4), str(0x9D4), "128", "64"],
)
def test_answers_that_are_not_for_the_request(processor: GuestProcessor, change: str) -> None:
    transport = Altered(processor, change)
    for ask in (lambda: GuestDevice(transport).report(b"data"), GuestDevice(transport).sealing_key):
        with pytest.raises(VerificationError):
            ask()
        assert transport.page is not None
        with pytest.raises(ClosedError):
            _ = transport.page.memory


# ---- Registers


class Registers:
    """A transport to the registers of a CSV3 guest."""

    def __init__(self) -> None:
        self.guest = SimpleNamespace(rtmr_version=1, rtmr_state=1, rtmrs=[b"\x11" * 32, *[bytes(32)] * 4])

    def attestation(self, page: RequestPage) -> None:
        raise FirmwareError(FirmwareStatus.INVALID_GUEST_STATE, "no")

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        assert page.memory[0] == subcommand
        page.write(rtmr.answer(cast("Any", self.guest), page.memory[:length]))

    def close(self) -> None: ...


def test_registers() -> None:
    device = GuestDevice(Registers())
    assert device.rtmr_status() == (1, rtmr.RtmrState.INIT)
    with pytest.raises(FirmwareError) as refusal:
        device.rtmr_extend(1, bytes(32))
    assert refusal.value.status is FirmwareStatus.INVALID_GUEST_STATE
    with pytest.raises(FirmwareError):
        device.rtmr_start(9)
    device.rtmr_start()
    device.rtmr_extend(2, b"\x22" * 32)
    assert device.rtmr_status() == (1, rtmr.RtmrState.WORKING)
    assert device.rtmr_read([2, 0]) == {0: b"\x11" * 32, 2: sm3(bytes(32) + b"\x22" * 32).digest()}
    assert len(device.rtmr_read()) == 5
    for wrong in ([], [5], [-1]):
        with pytest.raises(ArgumentError):
            device.rtmr_read(wrong)
    for number, data in ((0, 32), (5, 32), (1, 31)):
        with pytest.raises(ArgumentError):
            device.rtmr_extend(number, bytes(data))
    with pytest.raises(ArgumentError):
        device.rtmr_start(1 << 16)


@pytest.mark.parametrize("change", ["command", "size"])
def test_register_answers_that_are_none(processor: GuestProcessor, change: str) -> None:
    with pytest.raises(FormatError):
        GuestDevice(Altered(processor, change)).rtmr_status()


def test_channel_refuses_registers(device: GuestDevice) -> None:
    with pytest.raises(FirmwareError) as refusal:
        device.rtmr_status()
    assert refusal.value.status is FirmwareStatus.UNSUPPORTED


# ---- The device in user space, message by message; tests of the real one stand in test_guest_boot.py


def cuse(transport: Any) -> CuseDevice:
    made = CuseDevice.__new__(CuseDevice)  # without the kernel's end
    made.requests, made.name = DeviceRequests(transport), "csv-guest"
    made._descriptor = made._stop = made._stopped = -1
    return made


def message(opcode: int, body: bytes) -> bytes:
    return struct.pack("<IIQQIIII", 40 + len(body), opcode, 99, 0, 0, 0, 0, 0) + body


def ioctl(command: int, data: bytes, size_out: int = 0, flags: int = 0) -> bytes:
    return message(39, struct.pack("<QIIQII", 0, flags, command, 0x7000, len(data), size_out) + data)


def body_of(answer: Any, error: int = 0) -> bytes:
    length, found, unique = struct.unpack_from("<IiQ", answer)
    assert (length, found, unique) == (len(answer), -error, 99)
    return bytes(answer[16:])


def test_device_is_announced() -> None:
    body = body_of(cuse(Registers()).respond(message(4096, struct.pack("<IIII", 7, 36, 0, 1))))
    assert struct.unpack_from("<IIIIIIII", body) == (7, 31, 0, 1, 4096, 4096, 0, 0)
    assert body[72:] == b"DEVNAME=csv-guest\0"
    with pytest.raises(FormatError):
        cuse(Registers()).respond(message(4096, struct.pack("<IIII", 7, 8, 0, 1)))


def test_device_asks_for_argument_then_buffer(device: GuestDevice, processor: GuestProcessor) -> None:
    found = cuse(device.transport)
    body = body_of(found.respond(ioctl(CSV_GUEST_GET_REPORT, b"")))
    assert struct.unpack("<iIIIQQ", body) == (0, 4, 1, 0, 0x7000, 16)
    argument = ReportArgument(0x9000, 4096).pack()
    body = body_of(found.respond(ioctl(CSV_GUEST_GET_REPORT, argument)))
    assert struct.unpack("<iIII8Q", body) == (0, 4, 2, 2, 0x7000, 16, 0x9000, 4096, 0x7000, 16, 0x9000, 4096)
    mnonce = secrets.token_bytes(16)
    body = body_of(found.respond(ioctl(CSV_GUEST_GET_REPORT, argument + ReportRequest.build(b"x", mnonce), 4112)))
    assert struct.unpack_from("<iIII", body) == (0, 0, 0, 0)
    assert body[16:32] == argument
    report = Report.parse(body[32:])
    assert report.mac_is_valid(mnonce)
    assert report.measure == processor.digest


@pytest.mark.parametrize("length", [0, 111, 4097, 0xFFFFFFFF])
def test_device_refuses_lengths(length: int) -> None:
    body_of(cuse(Registers()).respond(ioctl(CSV_GUEST_GET_REPORT, ReportArgument(0x9000, length).pack())), errno.EINVAL)


def test_device_passes_refusals_on(device: GuestDevice) -> None:
    found = cuse(Registers())
    argument = ReportArgument(0x9000, 4096).pack()
    body = body_of(found.respond(ioctl(CSV_GUEST_GET_REPORT, argument + bytes(4096), 4112)))
    assert struct.unpack_from("<iIII", body) == (-errno.EIO, 0, 0, 0)
    argument = RtmrArgument(0x9000, 32, 1).pack()
    request = struct.pack("<HHI", 1, 32, 0) + bytes(24)
    body = body_of(cuse(device.transport).respond(ioctl(CSV_GUEST_RTMR_REQUEST, argument + request, 24 + 32)))
    assert struct.unpack_from("<iIII", body)[0] == -errno.EIO
    assert RtmrArgument.unpack(body[16:40]).error == FirmwareStatus.UNSUPPORTED
    body_of(found.respond(ioctl(0xC0104403, b"")), errno.ENOTTY)
    body_of(found.respond(ioctl(CSV_GUEST_GET_REPORT, b"", flags=1)), errno.ENOTTY)
    body_of(found.respond(message(15, bytes(40))), errno.ENOSYS)
    assert body_of(found.respond(message(14, bytes(8)))) == bytes(16)
    assert body_of(found.respond(message(18, bytes(24)))) == b""
    assert found.respond(message(36, bytes(8))) is None
    for torn in (b"", message(14, bytes(8))[:-1], message(14, b"")[:39]):
        with pytest.raises(FormatError):
            found.respond(torn)


@pytest.fixture
def helper(device: GuestDevice, tmp_path: Path) -> Iterator[Path]:
    server = SocketDevice(DeviceRequests(device.transport), tmp_path / "helper")
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield tmp_path / "helper"
    server.close()
    thread.join(20)
    assert not thread.is_alive()
    assert not (tmp_path / "helper").exists()


def test_helper_answers_as_the_device(helper: Path, processor: GuestProcessor) -> None:
    assert helper.stat().st_mode & 0o777 == 0o600
    with GuestDevice.open(helper) as over:
        assert isinstance(over.transport, SocketTransport)
        assert over.report(b"1").measure == processor.digest
        assert bytes(over.sealing_key()) == bytes(over.sealing_key())
        with pytest.raises(FirmwareError) as refusal:
            over.rtmr_status()
        assert refusal.value.status is FirmwareStatus.UNSUPPORTED
    with pytest.raises(FileNotFoundError):
        GuestDevice.open("/run/no-such-helper")


def test_helper_survives_its_callers(helper: Path, processor: GuestProcessor) -> None:
    number = CSV_GUEST_GET_REPORT - (1 << 32)
    for rubbish in (b"", b"x", struct.pack("<iII", 5, 16, 4096), struct.pack("<iII", number, 16, 1 << 31),
                    struct.pack("<iII", number, 16, 16) + bytes(32)):  # fmt: skip
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.settimeout(20)
            caller.connect(str(helper))
            caller.sendall(rubbish)
            caller.shutdown(socket.SHUT_WR)
            while caller.recv(4096):
                pass
    with GuestDevice.open(helper) as over:
        assert over.report().measure == processor.digest


# ---- The command


def test_command(helper: Path, tmp_path: Path, processor: GuestProcessor, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", str(helper)]
    assert main([*options, "report", "--data", "0102", "--out", str(tmp_path / "report")]) == 0
    report = Report.parse((tmp_path / "report").read_bytes())
    assert (report.report_data[:2], report.sealing_key) == (b"\1\2", bytes(32))
    key = tmp_path / "key"
    assert main([*options, "sealing-key", "--out", str(key)]) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert main([*options, "sealing-key", "--out", str(key)]) == 3, "a file that is there is left alone"
    assert main([*options, "report", "--data", "xyz"]) == 2
    assert main([*options, "report", "--data", "00" * 65]) == 2
    assert main([*options, "rtmr"]) == 1
    assert main(["--device", "/dev/no-such-device", "report"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("csvfast guest: error: ") for line in err.splitlines())
    assert key.read_bytes().hex() not in err


def test_frame_is_the_hosts() -> None:
    """Guest and host agree: the product's two ends, tested against each other."""
    vm_channel = pytest.importorskip("csvfast.machine.vm_channel")
    assert vm_channel.REQUEST.format == FRAME.format
    ours, theirs = socket.socketpair()
    asked: list[int] = []

    def attest(address: int) -> None:
        asked.append(address)
        if address == 0x2000:
            raise FirmwareError(FirmwareStatus.INVALID_ADDRESS, "no")

    host = vm_channel.GuestChannel(theirs, attest, lambda: (0x65, 2))
    host.start()
    with ProcessorChannel.over(ours.detach(), timeout=10) as channel:
        assert channel.call(ChannelOperation.ATTESTATION, 0x1000, PAGE) == 0
        with pytest.raises(FirmwareError, match="INVALID_ADDRESS"):
            channel.call(ChannelOperation.ATTESTATION, 0x2000, PAGE)
        with pytest.raises(FormatError, match="malformed"):
            channel.call(ChannelOperation.ATTESTATION, 0x1001, PAGE)
        with pytest.raises(FirmwareError, match="UNSUPPORTED"):
            channel.call(ChannelOperation.SECURE_CALL, 0x1000, PAGE)
        assert channel.info() == (0x65, 2)
    host.stop()
    assert asked == [0x1000, 0x2000]
