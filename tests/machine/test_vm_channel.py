"""The line from a guest to the processor: every request gets one answer, whatever it is; and a real guest's report."""

from __future__ import annotations

import base64
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import qemu_guest, vm_platform

from csvfast.errors import FirmwareError, FirmwareStatus, StateError
from csvfast.machine import vm_channel
from csvfast.machine.initrd import build_initrd
from csvfast.machine.vm_channel import BAD_REQUEST, FRAME_BYTES, GuestChannel
from csvfast.machine.vm_control import MemoryControl
from csvfast.machine.vm_qemu import low_memory
from csvfast.report.layout import Report

FRAME = struct.Struct("<4sHHIIQQ")
PAGE = 4096


def attest(gpa: int) -> None:
    if gpa != 0x5000:
        raise FirmwareError(FirmwareStatus.INVALID_ADDRESS, "not there")


@pytest.fixture
def guest() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    channel = GuestChannel(ours, attest, lambda: (5, 2))
    channel.start()
    theirs.settimeout(10)
    yield theirs
    theirs.close()
    channel.stop()
    channel.stop()


def request(operation: int, gpa: int = 0, length: int = 0, *, version: int = 1, tag: int = 7, last: int = 0) -> bytes:
    return FRAME.pack(b"CSVG", version, operation, tag, length, gpa, last)


def receive(guest: socket.socket) -> tuple[int, ...]:
    data = b""
    while len(data) < FRAME_BYTES:
        data += guest.recv(FRAME_BYTES - len(data))
    magic, *fields = FRAME.unpack(data)
    assert magic == b"CSVG"
    return tuple(fields)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (request(1, 0x5000, PAGE), (1, 1, 7, 0, 0x5000, 0)),
        (request(1, 0x6000, PAGE), (1, 1, 7, int(FirmwareStatus.INVALID_ADDRESS), 0x6000, 0)),
        (request(1, 0x5001, PAGE), (1, 1, 7, BAD_REQUEST, 0x5001, 0)),
        (request(1, 0x5000, PAGE - 1), (1, 1, 7, BAD_REQUEST, 0x5000, 0)),
        (request(1, 0x5000, PAGE, version=2), (1, 1, 7, BAD_REQUEST, 0x5000, 0)),
        (request(1, 0x5000, PAGE, last=1), (1, 1, 7, BAD_REQUEST, 0x5000, 0)),
        (request(2, 0x5000, PAGE), (1, 2, 7, int(FirmwareStatus.UNSUPPORTED), 0x5000, 0)),
        (request(3), (1, 3, 7, 0, 5, 2)),
        (request(4, 0x5000, PAGE), (1, 4, 7, int(FirmwareStatus.UNSUPPORTED), 0x5000, 0)),
        (request(5, 0x5000), (1, 5, 7, BAD_REQUEST, 0x5000, 0)),
        (request(0xFFFF, 2**64 - 1, 2**32 - 1, tag=2**32 - 1), (1, 0xFFFF, 2**32 - 1, BAD_REQUEST, 2**64 - 1, 0)),
    ],
)
def test_answers(guest: socket.socket, sent: bytes, answer: tuple[int, ...]) -> None:
    guest.sendall(sent)
    assert receive(guest) == answer


def test_what_csv3_guests_have_besides() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = GuestChannel(ours, attest, lambda: (0x45, 3), attest, attest)
        for operation in (1, 2, 4):
            for gpa, length, status in (
                (0x5000, PAGE, 0),
                (0x6000, PAGE, int(FirmwareStatus.INVALID_ADDRESS)),
                (0x5010, PAGE, BAD_REQUEST),
                (0x5000, 2 * PAGE, BAD_REQUEST),
            ):
                answer = FRAME.unpack(channel.answer(request(operation, gpa, length)))
                assert answer == (b"CSVG", 1, operation, 7, status, gpa, 0)
        assert FRAME.unpack(channel.answer(request(3)))[5:] == (0x45, 3)
        channel.stop()


def test_in_pieces_and_together(guest: socket.socket) -> None:
    for byte in request(3, tag=1):
        guest.sendall(bytes([byte]))
    assert receive(guest)[2] == 1
    guest.sendall(b"".join(request(3, tag=tag) for tag in range(100)))
    assert [receive(guest)[2] for _ in range(100)] == list(range(100))


def test_finds_its_feet_again(guest: socket.socket) -> None:
    guest.sendall(b"x" * 50 + b"CSV" + request(3, tag=9))
    answers = [receive(guest)]
    while answers[-1][3] == BAD_REQUEST:
        answers.append(receive(guest))
    assert answers[-1] == (1, 3, 9, 0, 5, 2)
    assert len(answers) <= 4


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=FRAME_BYTES, max_size=FRAME_BYTES))
def test_any_frame(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = GuestChannel(ours, attest, lambda: (5, 2))
        for sent in (frame, b"CSVG\x01\0" + frame[6:]):
            assert len(channel.answer(sent)) == FRAME_BYTES
        assert channel.requests == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=8))
def test_any_stream(pieces: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    channel = GuestChannel(ours, attest, lambda: (5, 2))
    channel.start()
    with theirs:
        for piece in pieces:
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
        theirs.settimeout(10)
        count = 0
        while chunk := theirs.recv(4096):
            count += len(chunk)
    channel.stop()
    assert channel.problem is None
    assert count == channel.requests * FRAME_BYTES


def test_guest_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_channel, "ANSWER_SECONDS", 0.2)
    ours, theirs = socket.socketpair()
    channel = GuestChannel(ours, attest, lambda: (5, 2))
    with theirs:
        theirs.settimeout(1)
        channel.start()
        with pytest.raises(OSError, match=r"timed out|Broken pipe|reset"):
            theirs.sendall(request(3) * 500_000)
        channel.stop()
    assert channel.problem is not None


def test_low_memory() -> None:
    """q35's RAM below 4 GiB (QEMU hw/i386/pc_q35.c): all of it, or 2 GiB from 2.75 GiB on."""
    assert low_memory(0xB0000000 - 4096) == 0xB0000000 - 4096
    assert low_memory(0xB0000000) == 2 << 30
    assert low_memory(8 << 30) == 2 << 30


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"error no such page\n", "no such page"), (b"yes\n", "expected 'ok'"), (b"o", "ended within"), (b"", "ended within")],
)
def test_control_answers(tmp_path: Path, answer: bytes, words: str) -> None:
    path = tmp_path / "memory.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        control = MemoryControl(path)
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b"evict 4096 8192\n"
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(StateError, match=words):
            control.evict(4096, 8192)
        thread.join()
        control.close()
    with pytest.raises(StateError):
        MemoryControl(tmp_path / "nowhere").flush()


@pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)
def test_report_of_a_guest(tmp_path: Path) -> None:
    """Python in the guest asks for a report on a page of its encrypted RAM; the processor answers there, in the DRAM."""
    initrd = build_initrd(tmp_path / "initrd", run="python3 -m csvfast.machine.guest report --data 6368616c6c656e6765; exit 7")
    root = tmp_path / "run"
    root.mkdir()
    plan = vm_platform.plan(initrd.path, "", memory_size=256 << 20)
    with vm_platform.platform(288 << 20) as place, vm_platform.make(place, plan, root, window="1/16") as machine:
        machine.launch()
        assert machine.wait(110) == 7, machine.console() + machine.errors()
        status = machine.status()
        assert (status["requests"], status["refused"]) == (2, 0)  # which generation; the report
        line = max(machine.console().split(), key=len)
        report = Report.parse(base64.b64decode(line, validate=True))
        assert report.measure == machine.launched.predicted.digest
        assert report.report_data.startswith(b"challenge")
        assert report.chip_id == place.processor.chip.chip_id
        assert place.count(b"challenge") == 0
    assert list(root.iterdir()) == []
