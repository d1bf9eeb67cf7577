"""What the preload library is told: where in the DRAM the memory lies, what stands there already, requests over its socket."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import qemu_guest
from machine.qemu_guest import preload_library, userfault_reason

from csvfast.crypto import SM4XTS
from csvfast.machine.vm_control import MemoryControl

PAGE = 4096
MIB = 1 << 20
REASON = userfault_reason()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.skipif(not (qemu_guest.ROOT / "csrc").is_dir(), reason="the tests stand outside a source tree"),
]


class Program:
    """vmram_program.c under the preload library."""

    def __init__(self, binary: Path, dram: Path, mebibytes: int, environment: dict[str, str]) -> None:
        settings = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(preload_library()), "CSVFAST_VMRAM_PATH": str(dram)}
        self.process = subprocess.Popen(
            [binary, dram, str(mebibytes)], env=settings | environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.is_mapped = self.process.stdout.readline() == "mapped\n"

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return self.process.stdout.readline().rstrip("\n")

    def finish(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


Start = Callable[..., Program]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("program") / "vmram_program"
    source = Path(__file__).with_name("vmram_program.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="csvfast-control-") as name:
        yield Path(name)


@pytest.fixture
def start(binary: Path, folder: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def start(mebibytes: int = 2, *, length: int = 4 * MIB, content: bytes = b"", at: int = 0, **environment: str) -> Program:
        dram = folder / "dram"
        if not dram.exists():
            with dram.open("wb") as file:
                file.truncate(length)
                file.seek(at)
                file.write(content)
        named = {f"CSVFAST_VMRAM_{name}": value for name, value in environment.items()}
        programs.append(Program(binary, dram, mebibytes, named))
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.communicate()


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(10)
    until = time.monotonic() + 10
    while True:
        try:
            peer.connect(str(path))
        except BlockingIOError:  # more connections wait than the socket keeps
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return peer


def answer(peer: socket.socket, request: bytes) -> bytes:
    """The answer to one line."""
    peer.sendall(request + b"\n")
    return line_of(peer)


def line_of(peer: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = peer.recv(1)
        assert more, f"closed after {line!r}"
        line += more
    return line[:-1]


def test_offset_and_written(start: Start, folder: Path) -> None:
    """The memory is the middle of the DRAM, under the tweaks of its address there; what the processor encrypted is read."""
    key = secrets.token_bytes(32)
    (folder / "key").write_bytes(key)
    cipher = SM4XTS(key, standard="gb", unit_size=PAGE)
    launched = b"measured page".ljust(PAGE, b"\0") + b"and the next".ljust(PAGE, b"\0")
    at = MIB + 4 * PAGE
    program = start(
        content=cipher.encrypt(launched, unit=at // PAGE), at=at,
        OFFSET="0x100000", WRITTEN="16384+4096,0x5000+0x1000", KEY_FILE=str(folder / "key"), WINDOW="64K",
    )  # fmt: skip
    assert program.is_mapped
    assert program.ask(f"t {4 * PAGE}") == "measured page"
    assert program.ask(f"t {5 * PAGE}") == "and the next"
    assert program.ask(f"r {6 * PAGE}") == "0 1"
    assert program.ask(f"w {7 * PAGE} 65") == "ok"
    assert program.ask("q") == ""
    assert program.finish() == (0, "")
    dram = (folder / "dram").read_bytes()
    assert cipher.decrypt(dram[MIB + 7 * PAGE :][:PAGE], unit=MIB // PAGE + 7) == b"A" * PAGE
    assert dram[:MIB] == bytes(MIB)
    assert dram[3 * MIB :] == bytes(MIB)


def test_requests(start: Start, folder: Path) -> None:
    """A page of the guest's is altered in the DRAM, as a processor does, while the guest has it."""
    key = secrets.token_bytes(32)
    (folder / "key").write_bytes(key)
    cipher = SM4XTS(key, standard="gb", unit_size=PAGE)
    control = folder / "control"
    program = start(KEY_FILE=str(folder / "key"), CONTROL=str(control), OFFSET=str(MIB))
    about = control.stat()
    assert stat.S_ISSOCK(about.st_mode)
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert program.ask("w 8192 66") == "ok"
    with connect(control) as peer, connect(control) as other, (folder / "dram").open("r+b") as dram:
        place = MIB + 2 * PAGE
        dram.seek(place)
        assert dram.read(PAGE) == bytes(PAGE)  # in the window only
        assert answer(peer, b"evict 0x2000 4096") == b"ok"
        dram.seek(place)
        assert cipher.decrypt(dram.read(PAGE), unit=place // PAGE) == b"B" * PAGE
        dram.seek(place)
        dram.write(cipher.encrypt(b"C" * PAGE, unit=place // PAGE))
        dram.flush()
        assert program.ask("r 8192") == "67 1"
        assert program.ask("w 0 68") == "ok"
        assert answer(other, b"flush") == b"ok"
        dram.seek(MIB)
        assert cipher.decrypt(dram.read(PAGE), unit=MIB // PAGE) == b"D" * PAGE
        counters = json.loads(answer(peer, b"stats"))
        assert counters["size"] == 2 * MIB
        assert counters["evictions"] >= 1
        assert counters["failure"] == 0
        assert counters["dram"] == str(folder / "dram")
        image = folder / "image"
        assert answer(other, b"snapshot " + bytes(image)) == b"ok"
        assert image.read_bytes()[:8] == b"CSVFVMR1"
        assert stat.S_IMODE(image.stat().st_mode) == 0o600
        # Several requests in one packet, one request in several.
        peer.sendall(b"flush\nstats\nev")
        assert line_of(peer) == b"ok"
        assert line_of(peer).startswith(b"{")
        assert answer(peer, b"ict 0 0") == b"ok"
    program.ask("q")
    assert program.finish() == (0, "")
    assert not control.exists()


@pytest.mark.parametrize(
    "request_line",
    [
        b"", b"evict", b"evict 1", b"evict 1 4096", b"evict 0 1", b"evict 0x200000 4096", b"evict -4096 4096",
        b"evict 0 4096 0", b"evict  0 4096", b"evict 0 99999999999999999999999", b"evict 0xfffffffffffff000 8192",
        b"EVICT 0 0", b"flush ", b"flush\r", b"snapshot", b"snapshot image", b"snapshot /nowhere/image",
        b"snapshot /dev/null", b"snapshot /tmp", b"stats\0", b"\xff\xfe",
    ],
)  # fmt: skip
def test_bad_requests(start: Start, folder: Path, request_line: bytes) -> None:
    program = start(CONTROL=str(folder / "control"))
    with connect(folder / "control") as peer:
        assert answer(peer, request_line).startswith(b"error ")
        assert answer(peer, b"snapshot " + bytes(folder / "dram")) == b"error that is the DRAM file"
        assert answer(peer, b"flush") == b"ok"
    assert program.ask("w 0 1") == "ok"


def test_hostile_peers(start: Start, folder: Path) -> None:
    """Slow, silent, deaf, endless and many: the guest runs on, and an honest peer is answered."""
    control = folder / "control"
    program = start(CONTROL=str(control))
    peers = [connect(control) for _ in range(30)]
    peers[-1].sendall(b"evi")
    endless, deaf = connect(control), connect(control)
    try:
        endless.sendall(b"x" * 10000)
        assert line_of(endless).startswith(b"error ")
        assert endless.recv(1) == b""
    except ConnectionError:  # closed with bytes unread
        pass
    deaf.setblocking(False)
    sent = 0
    try:
        while sent < 64 * MIB:
            sent += deaf.send(b"stats\n" * 1000)
            time.sleep(0.0001)
    except (BlockingIOError, ConnectionError):
        pass
    for _ in range(3):
        with connect(control) as honest:
            assert answer(honest, b"evict 0 4096") == b"ok"
    assert program.ask("w 4096 9") == "ok"
    assert program.ask("r 4096") == "9 1"
    for peer in (*peers, endless, deaf):
        peer.close()
    program.ask("q")
    assert program.finish() == (0, "")


def test_left_behind(start: Start, folder: Path) -> None:
    """The socket of a killed program is taken over; one that is in use, or is no socket, is not."""
    control = folder / "control"
    first = start(CONTROL=str(control))
    second = start(CONTROL=str(control))
    assert not second.is_mapped
    assert "cannot be listened at: Address already in use" in second.finish()[1]
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    assert control.exists()
    third = start(CONTROL=str(control))
    assert third.is_mapped
    with connect(control) as peer:
        assert answer(peer, b"flush") == b"ok"
    third.ask("q")
    third.finish()
    control.write_text("a file")
    fourth = start(CONTROL=str(control))
    assert not fourth.is_mapped
    fourth.finish()
    assert control.read_text() == "a file"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OFFSET": "5"}, "a multiple of 4096"),
        ({"OFFSET": "-4096"}, "a multiple of 4096"),
        ({"OFFSET": "0x"}, "a multiple of 4096"),
        ({"OFFSET": "4096K"}, "a multiple of 4096"),
        ({"OFFSET": "0xfffffffffffff000"}, "a multiple of 4096"),
        ({"OFFSET": "99999999999999999999"}, "a multiple of 4096"),
        ({"OFFSET": "0x201000"}, "memory of 2097152 bytes at byte 2101248 does not fit"),
        ({"OFFSET": "0x7ffffffffffff000"}, "does not fit"),
        ({"WRITTEN": "0"}, "wrong at part 1"),
        ({"WRITTEN": "0+4096,"}, "wrong at part 2"),
        ({"WRITTEN": "0+4096;8192+4096"}, "wrong at part 1"),
        ({"WRITTEN": "0+4096,8192+100"}, "wrong at part 2"),
        ({"WRITTEN": "0+4096, 8192+4096"}, "wrong at part 2"),
        ({"WRITTEN": "0+0x201000"}, "reaches beyond the 2097152 bytes"),
        ({"WRITTEN": "0x200000+0x1000"}, "reaches beyond"),
        ({"CONTROL": "control"}, "an absolute path"),
        ({"CONTROL": "/" + 120 * "x"}, "at most 107 bytes"),
        ({"CONTROL": "/nowhere/control"}, "No such file or directory"),
    ],
)
def test_refused(start: Start, environment: dict[str, str], words: str) -> None:
    program = start(**environment)
    assert not program.is_mapped
    code, errors = program.finish()
    assert code == 1
    lines = [line for line in errors.splitlines() if line.startswith("csvfast-vmram: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_pushed_out(start: Start, folder: Path) -> None:
    """Whom nine others have pushed out comes back by himself."""
    control = folder / "control"
    program = start(CONTROL=str(control))
    client = MemoryControl(control)
    client.flush()
    with contextlib.ExitStack() as others:
        for _ in range(9):
            peer = others.enter_context(connect(control))
            assert answer(peer, b"flush") == b"ok"
        client.evict(0, 4096)
        assert client.stats()["failure"] == 0
    client.close()
    program.ask("q")
    assert program.finish() == (0, "")
