"""The server: what clients get, what they must not get, and what bad ones do to the others."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.mailbox_driver import BLOCK, BUFFER, RAM, Driver
from reference.served import SIZE, Served, alive, answer, ask, ended

from csvfast.certs import ManufacturingLine
from csvfast.errors import (
    AddressError,
    AllocationError,
    ArgumentError,
    ClosedError,
    FirmwareError,
    FirmwareStatus,
    InternalError,
    StateError,
)
from csvfast.processor import StateDirectory, protocol, server
from csvfast.processor.client import RemoteMachine
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.core import C_BIT
from csvfast.processor.npt import NestedPageFault
from csvfast.processor.protocol import HEADER, Operation, ProtocolStatus
from csvfast.processor.ring import RING_BYTES, command_entry
from csvfast.processor.server import ProcessorServer


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("lasting"))
    yield made
    made.close()


# ---- What a client gets ---------------------------------------------------------------------------------------------


def test_a_guest_lives_on_between_connections(served: Served) -> None:
    with RemoteMachine(served.path) as machine:
        assert (machine.size, machine.cores, machine.asid_max, machine.base_address) == (SIZE, 2, 8, 0)
        driver = Driver(machine.command, machine.read, machine.write)
        driver.done(Command.INIT)
        handle = driver.done(Command.LAUNCH_START, policy=1)["handle"]
        driver.done(Command.ACTIVATE, handle=handle, asid=1)
        machine.write(RAM, b"the guest's data".ljust(4096, b"."))
        driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM, length=4096)
        assert b"the guest's data" not in machine.read(0, SIZE), "the mapping shows ciphertext"
        with pytest.raises(FirmwareError, match="INVALID_GUEST_STATE") as refusal:
            machine.guest_read(handle, RAM | C_BIT, 16)
        assert refusal.value.status is FirmwareStatus.INVALID_GUEST_STATE
        driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
        driver.done(Command.LAUNCH_FINISH, handle=handle)
    with RemoteMachine(served.path) as machine:
        assert machine.guests() == [handle]
        assert machine.guest_read(handle, RAM | C_BIT, 16) == b"the guest's data"
        assert machine.guest_read(handle, RAM, 16) == machine.read(RAM, 16) != b"the guest's data"
        machine.guest_write(handle, (RAM + 5000) | C_BIT, b"written by a vCPU")
        assert machine.read(RAM + 5000, 17) != b"written by a vCPU"
        assert served.machine.guest_read(handle, (RAM + 5000) | C_BIT, 17) == b"written by a vCPU"
        driver = Driver(machine.command, machine.read, machine.write)
        driver.done(Command.DEACTIVATE, handle=handle)
        with pytest.raises(FirmwareError, match="INACTIVE"):
            machine.guest_read(handle, RAM | C_BIT, 16)
        for core in (0, None):
            status, _ = driver.run(Command.DF_FLUSH)
            assert status is FirmwareStatus.WBINVD_REQUIRED
            machine.wbinvd(core)
        driver.done(Command.DF_FLUSH)
        with pytest.raises(ArgumentError, match="core is 2"):
            machine.wbinvd(2)


def test_refusals_come_with_their_reason(served: Served) -> None:
    with RemoteMachine(served.path) as machine:
        assert machine.command(Command.PEK_GEN, 0) is FirmwareStatus.INVALID_PLATFORM_STATE
        assert machine.problem is not None
        assert "UNINIT" in machine.problem
        assert machine.command(0x7FF, 0) is FirmwareStatus.INVALID_COMMAND
        assert machine.command(Command.NOP, 0) is FirmwareStatus.SUCCESS
        assert machine.problem is None
        with pytest.raises(ArgumentError, match="COMMAND"):
            machine.command(1 << 32, 0)
        with pytest.raises(FirmwareError, match="ring buffer mode is off"):
            machine.ring_doorbell(0)
        for call in (
            lambda: machine.read(SIZE, 1),
            lambda: machine.read(-1, 1),
            lambda: machine.write(SIZE - 1, b"ab"),
        ):
            with pytest.raises(AddressError):
                call()
    with pytest.raises(ClosedError):
        machine.read(0, 1)
    with pytest.raises(ClosedError):
        machine.guests()
    machine.close()


def test_rings_through_the_socket(served: Served) -> None:
    with RemoteMachine(served.path) as machine:
        first = machine.allocate(4 * RING_BYTES)
        names = ("low_command", "low_status", "high_command", "high_status")
        places = {f"{name}_address": first + index * RING_BYTES for index, name in enumerate(names)}
        driver = Driver(machine.command, machine.read, machine.write)
        driver.done(Command.RING_BUFFER, low_size=1, high_size=1, **places)
        machine.write(first, command_entry(Command.NOP, 0) * 5)
        assert machine.ring_doorbell(5) == 5
        assert machine.ring_doorbell(5, 3) == 5


def test_frames_belong_to_somebody(served: Served) -> None:
    with RemoteMachine(served.path) as one, RemoteMachine(served.path) as two:
        driver = Driver(one.command, one.read, one.write)
        driver.done(Command.INIT)
        handle = driver.done(Command.LAUNCH_START, policy=1)["handle"]
        kept, lost = one.allocate(8192, 1 << 16), one.allocate(1)
        assert kept % (1 << 16) == 0
        assert lost not in range(kept, kept + 8192)
        with pytest.raises(ArgumentError, match="no allocation of this connection"):
            two.free(kept)
        with pytest.raises(ArgumentError, match="no allocation of this connection"):
            two.assign(kept, handle, 0)
        with pytest.raises(FirmwareError, match="INVALID_GUEST"):
            one.assign(kept, handle + 1, 0)
        one.assign(kept, handle, 0x100000)
        assert two.guest_ranges(handle) == [(0x100000, kept, 8192)]
        with pytest.raises(ArgumentError):
            one.free(kept)
        with pytest.raises(AllocationError):
            one.allocate(SIZE)
        with pytest.raises(ArgumentError):
            one.allocate(4096, 3)
        with pytest.raises(ArgumentError):
            one.allocate(0)
    deadline = time.monotonic() + 10
    while True:  # the server notices the closed connection when its thread runs
        with RemoteMachine(served.path) as three:
            place = three.allocate(4096)
            assert place != kept
            if place == lost or time.monotonic() > deadline:
                break
    assert place == lost, "free again"
    with RemoteMachine(served.path) as four:
        Driver(four.command, four.read, four.write).done(Command.DECOMMISSION, handle=handle)
        with pytest.raises(FirmwareError):
            four.guest_ranges(handle)
        assert four.allocate(8192, 1 << 16) == kept


def test_the_firmwares_frames_stay_its_own(served: Served) -> None:
    with RemoteMachine(served.path) as machine:
        tmr = machine.allocate(1 << 20, 1 << 20)
        Driver(machine.command, machine.read, machine.write).done(
            Command.INIT, flags=1, tmr_address=tmr, tmr_length=1 << 20
        )
    with RemoteMachine(served.path) as machine:
        assert machine.allocate(1 << 20, 1 << 20) != tmr
        assert machine.command(Command.SHUTDOWN, 0) is FirmwareStatus.SUCCESS
        assert machine.allocate(1 << 20, 1 << 20) == tmr


def test_a_nested_page_fault_crosses_the_socket(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(handle: int, address: int, length: int) -> bytes:
        raise NestedPageFault(0x123000, 5)

    monkeypatch.setattr(served.machine, "guest_read", fault)
    with RemoteMachine(served.path) as machine:
        with pytest.raises(NestedPageFault) as caught:
            machine.guest_read(1, 0, 1)
        assert (caught.value.gpa, caught.value.error_code) == (0x123000, 5)


def test_a_defect_ends_one_request_only(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(core: int | None = None) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(served.machine, "wbinvd", defect)
    with RemoteMachine(served.path) as machine:
        with pytest.raises(InternalError, match="a defect"):
            machine.wbinvd()
        assert machine.command(Command.NOP, 0) is FirmwareStatus.SUCCESS


def test_requests_of_many_threads(served: Served) -> None:
    """Commands run one after the other; nobody gets another's answer."""
    wrong: list[str] = []

    def work(index: int) -> None:
        with RemoteMachine(served.path) as machine:
            place = machine.allocate(4096)
            for _ in range(50):
                machine.write(place, LAYOUTS[Command.GUEST_STATUS].encode(handle=index))
                status = machine.command(Command.GUEST_STATUS if index % 2 else Command.PLATFORM_STATUS, place)
                expected = FirmwareStatus.INVALID_PLATFORM_STATE if index % 2 else FirmwareStatus.SUCCESS
                if status is not expected or (machine.problem is None) == bool(index % 2):
                    wrong.append(f"{index}: {status!r} {machine.problem}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


# ---- Who may, and where ---------------------------------------------------------------------------------------------


def test_permissions(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(served.path.stat().st_mode)
    real = os.geteuid()
    monkeypatch.setattr(server.os, "geteuid", lambda: real + 1)
    with served.raw() as stranger:
        with suppress(BrokenPipeError, ConnectionResetError):
            stranger.sendall(HEADER.pack(Operation.GUESTS, 0, 1))
        assert ended(stranger), "another user's connection is closed without a word"
    monkeypatch.undo()
    alive(served)


def test_what_stands_in_the_way(served: Served, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="another server answers there"):
        ProcessorServer(served.machine, served.shared.descriptor, served.path)
    alive(served)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(StateError, match="is no socket"):
        ProcessorServer(served.machine, served.shared.descriptor, file)
    assert file.read_text() == "precious"
    with pytest.raises(ArgumentError, match="expected at most 107"):
        ProcessorServer(served.machine, served.shared.descriptor, tmp_path / ("long" * 30))
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    with ProcessorServer(served.machine, served.shared.descriptor, stale) as second:
        assert stat.S_IMODE(stale.stat().st_mode) == 0o600
        # Somebody else's socket at our path is left alone when we go.
        stale.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(stale))
            second.close()
            assert stale.exists()


def test_the_dram_cannot_be_shrunk(served: Served) -> None:
    """Else a client could make the server die of SIGBUS."""
    with served.raw() as connection:
        connection.sendall(HEADER.pack(Operation.HELLO, 4, 7) + struct.pack("<I", 1))
        message, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 4)
        assert HEADER.unpack(message)[0] == 0
    (descriptor,) = descriptors
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 4096)
    with mmap.mmap(descriptor, SIZE) as view:
        view[RAM : RAM + 4] = b"host"
    assert served.machine.read(RAM, 4) == b"host"
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    os.close(descriptor)


# ---- Bad clients ----------------------------------------------------------------------------------------------------


def test_bad_requests_are_answered(served: Served) -> None:
    with served.raw() as connection:
        for operation, body, expected in (
            (0, b"", ProtocolStatus.UNKNOWN_OPERATION),
            (99, b"x", ProtocolStatus.UNKNOWN_OPERATION),
            (Operation.HELLO, struct.pack("<I", 2), ProtocolStatus.BAD_REQUEST),
            (Operation.COMMAND, b"", ProtocolStatus.BAD_REQUEST),
            (Operation.COMMAND, struct.pack("<IIQ", 14, 1, 0), ProtocolStatus.BAD_REQUEST),
            (Operation.GUESTS, b"x", ProtocolStatus.BAD_REQUEST),
            (Operation.GUEST_WRITE, b"short", ProtocolStatus.BAD_REQUEST),
            (Operation.GUEST_RANGES, bytes(4), FirmwareStatus.INVALID_PLATFORM_STATE),
            (Operation.ALLOCATE, struct.pack("<QQ", (1 << 64) - 1, 4096), ProtocolStatus.NO_MEMORY),
            (Operation.FREE, bytes(8), ProtocolStatus.BAD_REQUEST),
            (Operation.WBINVD, struct.pack("<I", 7), ProtocolStatus.BAD_REQUEST),
        ):
            status, text = ask(connection, operation, body)
            assert status == expected, (operation, status, text)
            assert 0 < len(text) <= 1024
        assert ask(connection, Operation.COMMAND, struct.pack("<IIQ", 14, 0, 0)) == (0, b"")


def test_a_body_too_long_ends_the_connection(served: Served) -> None:
    with served.raw() as connection:
        connection.sendall(HEADER.pack(Operation.GUEST_WRITE, protocol.BODY_MAX + 1, 7))
        status, text = answer(connection)
        assert status == ProtocolStatus.BAD_REQUEST
        assert b"body of" in text
        assert connection.recv(1) == b""
    alive(served)


def test_half_messages_and_sudden_ends(served: Served) -> None:
    whole = HEADER.pack(Operation.COMMAND, 16, 7) + struct.pack("<IIQ", 14, 0, 0)
    for length in (1, 15, 16, 17, len(whole) - 1):
        with served.raw() as connection:
            connection.sendall(whole[:length])
        with served.raw() as connection:
            connection.sendall(whole[:length])
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    with served.raw() as connection:  # half-closed in order: the answer still comes
        connection.sendall(whole)
        connection.shutdown(socket.SHUT_WR)
        assert answer(connection) == (0, b"")
        assert connection.recv(1) == b""
    alive(served)


def test_slow_clients_hold_up_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MESSAGE_SECONDS", 0.3)
    silent = [served.raw() for _ in range(5)]
    slow = served.raw()
    slow.sendall(b"\x02")  # and then nothing
    deaf = served.raw()  # asks, and never reads
    deaf.setblocking(False)
    request = HEADER.pack(Operation.GUESTS, 0, 1) * 1000
    with suppress(BlockingIOError):
        for _ in range(2000):
            deaf.send(request)
    start = time.monotonic()
    alive(served)
    assert time.monotonic() - start < 5
    assert slow.recv(1) == b"", "ended after its time"
    deadline = time.monotonic() + 10
    while len(served.server._connections) > 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(served.server._connections) == 5, "the silent ones may stay; the deaf one went"
    for connection in (*silent, slow, deaf):
        connection.close()


def test_too_many_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 3)
    kept = [served.raw() for _ in range(3)]
    for connection in kept:
        assert ask(connection, Operation.GUESTS) == (0, b"")
    with served.raw() as refused:
        assert ended(refused)
    assert ask(kept[0], Operation.GUESTS) == (0, b"")
    for connection in kept:
        connection.close()


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage(lasting: Served, data: bytes) -> None:
    with lasting.raw() as connection:
        with suppress(BrokenPipeError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while connection.recv(65536):
                pass


@given(operation=st.sampled_from(Operation), body=st.binary(max_size=64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_answered(lasting: Served, operation: Operation, body: bytes) -> None:
    with lasting.raw() as connection:
        status, _ = ask(connection, operation, body)
        assert status != ProtocolStatus.INTERNAL


def test_client_against_a_bad_server(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    for reply in (b"", b"\0" * 5, HEADER.pack(0, 0, 1), HEADER.pack(0, 1 << 31, 1), HEADER.pack(0, 32, 2) + bytes(32)):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()

            def serve(listener: socket.socket = listener, reply: bytes = reply) -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(reply)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises((StateError, OSError, ArgumentError)):
                RemoteMachine(path)
            thread.join(10)
        path.unlink()
    with pytest.raises(FileNotFoundError):
        RemoteMachine(path)


def test_a_client_in_c(served: Served, tmp_path: Path) -> None:
    """The protocol from its documentation, without csvfast's code: map the DRAM, PLATFORM_STATUS, an unknown command."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("client.c")
    subprocess.run([compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "client", source], check=True)
    done = subprocess.run([tmp_path / "client", served.path], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"memory {SIZE} bytes, 2 cores, 8 ASIDs",
        "API 1.4, build 2337, state 0",
        "command 0x7ff: status 0x11, no command has id 0x7ff",
    ]


# ---- The process ----------------------------------------------------------------------------------------------------


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "csvfast", "platform", "serve", "chip", "--socket", "socket", *arguments],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "listening on socket" in line, process.communicate()
    return process


@pytest.fixture
def chip(tmp_path: Path) -> Path:
    ManufacturingLine.create().make_chip().save(tmp_path / "chip")
    return tmp_path


def exported(machine: RemoteMachine) -> bytes:
    driver = Driver(machine.command, machine.read, machine.write)
    driver.done(
        Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
    )
    return machine.read(BUFFER, 2084)


def test_sigterm_and_kill(chip: Path) -> None:
    process = start(chip, "--memory", "dram", "--size", "4MiB")
    with RemoteMachine(chip / "socket") as machine:
        before = exported(machine)
        machine.write(BLOCK, b"seen in the file")
        assert b"seen in the file" in (chip / "dram").read_bytes()
        assert stat.S_IMODE((chip / "dram").stat().st_mode) == 0o600
        process.send_signal(signal.SIGTERM)  # while a client is connected
        assert process.wait(20) == 0
        with pytest.raises(OSError, match=r"server closed|Broken pipe|reset"):
            machine.guests()
    assert not (chip / "socket").exists()
    assert process.communicate()[1] == ""

    process = start(chip, "--memory", "dram")  # its size is the file's
    with RemoteMachine(chip / "socket") as machine:
        assert exported(machine) == before, "the platform is the same"
        second = subprocess.run(
            [sys.executable, "-P", "-m", "csvfast", "platform", "serve", "chip", "--socket", "other", "--size", "4MiB"],
            cwd=chip, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode != 0, "one process at a time"
        assert not (chip / "other").exists()
        process.kill()
        process.wait(20)
        process.communicate()
    assert (chip / "socket").exists(), "nobody could remove it"
    process = start(chip, "--size", "4MiB")
    with RemoteMachine(chip / "socket") as machine:
        assert exported(machine) == before, "kill -9 lost nothing"
        assert machine.guests() == []
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.communicate()
    with StateDirectory(chip / "chip") as state:
        assert state.load() is not None


def test_serve_refuses(chip: Path) -> None:
    def refused(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "csvfast", "platform", "serve", *arguments],
            cwd=chip, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode in (2, 3), done
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "--size is missing" in refused("chip", "--socket", "s")
    assert "no such directory" in refused("none", "--socket", "s", "--size", "4MiB")
    (chip / "file").write_text("x")
    assert "is no socket" in refused("chip", "--socket", "file", "--size", "4MiB")
    assert (chip / "file").read_text() == "x"
