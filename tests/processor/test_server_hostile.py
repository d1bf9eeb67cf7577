"""The server short of everything, its second socket, and clients whose server lies."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference import ovmf_images as ovmf
from reference.mailbox_driver import BLOCK, BUFFER, RAM, Driver
from reference.served import SIZE, Served, alive, answer, ask, ended

from csvfast.certs import ManufacturingLine
from csvfast.errors import (
    AddressError,
    ArgumentError,
    ClosedError,
    CsvfastError,
    FormatError,
    InternalError,
    StateError,
    VerificationError,
)
from csvfast.processor import client, protocol, server
from csvfast.processor.client import RemoteMachine
from csvfast.processor.commands import Command
from csvfast.processor.core import C_BIT
from csvfast.processor.protocol import HEADER, Operation, ProtocolStatus
from csvfast.processor.server import ProcessorServer, open_shared_memory
from csvfast.processor.vmm import GuestPlan, Host


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, vcpu=True)
    yield made
    made.close()


def running(machine: RemoteMachine) -> int:
    driver = Driver(machine.command, machine.read, machine.write)
    driver.done(Command.INIT)
    handle: int = driver.done(Command.LAUNCH_START, policy=1)["handle"]
    driver.done(Command.ACTIVATE, handle=handle, asid=1)
    driver.done(Command.LAUNCH_UPDATE_DATA, handle=handle, address=RAM, length=4096)
    driver.done(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=48)
    driver.done(Command.LAUNCH_FINISH, handle=handle)
    return handle


# ---- Two doors ------------------------------------------------------------------------------------------------------


def test_the_hosts_socket_shows_no_plaintext(doors: Served) -> None:
    assert doors.vcpu_path is not None
    assert doors.vcpu_path.stat().st_mode & 0o777 == 0o600
    with RemoteMachine(doors.path) as host, RemoteMachine(doors.path, vcpu_path=doors.vcpu_path) as both:
        handle = running(host)
        both.guest_write(handle, RAM | C_BIT, b"plaintext")
        assert both.guest_read(handle, RAM | C_BIT, 9) == b"plaintext"
        for call in (lambda: host.guest_read(handle, RAM | C_BIT, 9), lambda: host.guest_write(handle, RAM, b"x")):
            with pytest.raises(ArgumentError, match="this socket is not for operation"):
                call()
        assert host.guests() == [handle], "the connection goes on"
    with doors.raw(doors.vcpu_path) as vcpu:
        for operation in set(Operation) - {Operation.GUEST_READ, Operation.GUEST_WRITE}:
            assert ask(vcpu, operation, bytes(16))[0] == ProtocolStatus.WRONG_SOCKET
        assert ask(vcpu, 99)[0] == ProtocolStatus.UNKNOWN_OPERATION
        body = struct.pack("<IIQ", handle, 9, RAM | C_BIT)
        assert ask(vcpu, Operation.GUEST_READ, body) == (0, b"plaintext")
    assert doors.vcpu_path is not None
    doors.server.close()
    assert not doors.path.exists()
    assert not doors.vcpu_path.exists()


def test_one_bad_door_closes_the_other(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StateError, match="is no socket"):
        ProcessorServer(served.machine, served.shared.descriptor, tmp_path / "new", vcpu_path=tmp_path / "file")
    assert not (tmp_path / "new").exists()
    with pytest.raises(StateError, match="another server answers there"):
        ProcessorServer(served.machine, served.shared.descriptor, tmp_path / "new", vcpu_path=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_symbolic_link_is_no_socket(served: Served, tmp_path: Path) -> None:
    for target in ("socket", "nothing"):
        link = tmp_path / f"link-to-{target}"
        link.symlink_to(tmp_path / target)
        with pytest.raises(StateError, match="is no socket"):
            ProcessorServer(served.machine, served.shared.descriptor, link)
        assert link.is_symlink()
    alive(served)


# ---- Short of everything --------------------------------------------------------------------------------------------


def test_no_descriptors_left_is_no_busy_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    alive(served)
    calls = 0
    (door,) = served.server._doors
    real = door.listener

    class Short:
        def accept(self) -> None:
            nonlocal calls
            calls += 1
            raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(server, "ACCEPT_PAUSE", 0.05)
    door.listener = Short()  # type: ignore[assignment]
    with served.raw():
        time.sleep(0.5)
    door.listener = real
    assert 1 <= calls <= 15, calls
    alive(served)


def test_no_threads_left_costs_one_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(server.threading.Thread, "start", fail)
    with served.raw() as refused:
        assert ended(refused)
    monkeypatch.undo()
    assert served.server._connections == {}
    alive(served)


def test_a_close_before_serve_is_seen(served: Served, tmp_path: Path) -> None:
    other = ProcessorServer(served.machine, served.shared.descriptor, tmp_path / "other")
    other.close()
    other.serve()  # returns
    other.close()


def test_one_deadline_for_header_and_body(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MESSAGE_SECONDS", 0.6)
    with served.raw() as slow:
        slow.sendall(b"\x02")
        time.sleep(0.4)
        slow.sendall(HEADER.pack(Operation.COMMAND, 16, 7)[1:])
        start = time.monotonic()
        assert slow.recv(1) == b""
        assert time.monotonic() - start < 0.5


def test_an_answer_too_long_for_the_protocol(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.machine, "guests", lambda: [1] * (protocol.BODY_MAX // 4 + 1))
    with served.raw() as connection:
        status, text = ask(connection, Operation.GUESTS)
        assert status == ProtocolStatus.NO_MEMORY
        assert b"too long" in text
        assert ask(connection, Operation.COMMAND, struct.pack("<IIQ", 14, 0, 0)) == (0, b"")


def test_hundreds_of_connections_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 8)
    with served.raw() as first:
        assert ask(first, Operation.GUESTS) == (0, b"")
        opened = []
        for _ in range(300):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(5)
            with suppress(OSError):
                connection.connect(str(served.path))
            opened.append(connection)
        assert ask(first, Operation.GUESTS) == (0, b""), "who is in is served"
        for connection in opened:
            connection.close()
    deadline = time.monotonic() + 10
    while served.server._connections and time.monotonic() < deadline:
        time.sleep(0.02)
    alive(served)


def test_frames_of_who_died_between_assign_and_activate(served: Served) -> None:
    """The guest stays, with what was assigned to it, until somebody stops it; the rest is free."""
    with RemoteMachine(served.path) as machine:
        driver = Driver(machine.command, machine.read, machine.write)
        driver.done(Command.INIT)
        handle = driver.done(Command.LAUNCH_START, policy=1)["handle"]
        kept = machine.allocate(4096)
        machine.assign(kept, handle, 0)
        lost = machine.allocate(1 << 20)
    deadline = time.monotonic() + 10
    while served.server._connections and time.monotonic() < deadline:
        time.sleep(0.01)
    with RemoteMachine(served.path) as machine:
        assert machine.guests() == [handle]
        assert machine.guest_ranges(handle) == [(0, kept, 4096)]
        assert machine.allocate(1 << 20) == lost
        with Host(machine) as host:
            host.stop(handle)
        assert machine.guests() == []


def test_the_allocator_knows_the_firmwares_memory(served: Served) -> None:
    """INIT with a TMR that nobody allocated: a client that manages DRAM itself."""
    with RemoteMachine(served.path) as machine:
        taken = machine.allocate(4096)
        tmr = 1 << 20
        Driver(machine.command, machine.read, machine.write).done(
            Command.INIT, flags=1, tmr_address=tmr, tmr_length=(1 << 20) + 100
        )
        places = [taken, *(machine.allocate(1 << 18) for _ in range(20))]
        ends = tmr + (1 << 20) + 4096
        assert all(place + (1 << 18) <= tmr or place >= ends for place in places[1:])
        assert machine.command(Command.SHUTDOWN, 0) == 0
        assert machine.allocate(1 << 20, 1 << 20) == tmr


def test_two_servers_cannot_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "dram"
    first = open_shared_memory(1 << 20, path)
    with pytest.raises(StateError, match="another server has this memory"):
        open_shared_memory(None, path)
    kept = os.dup(first.descriptor)  # a client's, which outlives the server
    first.close()
    open_shared_memory(None, path).close()
    os.close(kept)


def test_a_truncated_file_is_a_power_failure(tmp_path: Path) -> None:
    """SIGBUS ends the process; the platform's keys are there afterwards."""
    ManufacturingLine.create().make_chip().save(tmp_path / "chip")

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "csvfast", "platform", "serve", "chip", "--socket", "socket", "--memory", "dram",
             "--size", "4MiB"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        )  # fmt: skip
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        return process

    def exported() -> bytes:
        with RemoteMachine(tmp_path / "socket") as machine:
            Driver(machine.command, machine.read, machine.write).done(
                Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=RAM, chain_length=6252
            )
            return machine.read(BUFFER, 2084)

    process = start()
    before = exported()
    with RemoteMachine(tmp_path / "socket") as machine:
        os.truncate(tmp_path / "dram", 0)
        with pytest.raises(OSError, match=r"server closed|Broken pipe|reset"):
            machine.command(Command.PLATFORM_STATUS, BLOCK)
    assert process.wait(20) == -signal.SIGBUS
    process.communicate()
    (tmp_path / "dram").unlink()
    process = start()
    assert exported() == before
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.communicate()


# ---- A server that lies ---------------------------------------------------------------------------------------------


class Liar:
    """Answers HELLO as told, then each request with the next of `replies` (status, body)."""

    def __init__(
        self, path: Path, hello: bytes, replies: list[tuple[int, bytes]], descriptors: int = 1, tag: int = 0
    ) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.hello, self.replies, self.descriptors, self.tag = hello, replies, descriptors, tag
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        memory = os.memfd_create("liar")
        os.ftruncate(memory, SIZE)
        with connection, suppress(OSError):
            connection.settimeout(10)
            for index, (status, body) in enumerate([(0, self.hello), *self.replies]):
                header = connection.recv(HEADER.size, socket.MSG_WAITALL)
                if not header:
                    break
                _, length, tag = HEADER.unpack(header)
                if length:
                    connection.recv(length, socket.MSG_WAITALL)
                message = HEADER.pack(status, len(body), tag + self.tag * index) + body
                socket.send_fds(connection, [message], [memory] * (0 if index else self.descriptors))
        os.close(memory)

    def close(self) -> None:
        self.listener.close()
        self.thread.join(15)
        assert not self.thread.is_alive()


HELLO = protocol.HELLO_ANSWER.pack(1, 1, 4, 0, 0, SIZE)


@pytest.mark.parametrize(
    ("hello", "descriptors"),
    [
        (protocol.HELLO_ANSWER.pack(2, 1, 4, 0, 0, SIZE), 1),
        (protocol.HELLO_ANSWER.pack(1, 1, 4, 0, 0, 0), 1),
        (protocol.HELLO_ANSWER.pack(1, 1, 4, 0, 0, SIZE + 1), 1),
        (protocol.HELLO_ANSWER.pack(1, 1, 4, 0, 0, (1 << 64) - 1), 1),
        (HELLO[:-1], 1),
        (HELLO, 0),
        (HELLO, 2),
    ],
)
def test_a_hello_that_cannot_be(tmp_path: Path, hello: bytes, descriptors: int) -> None:
    liar = Liar(tmp_path / "s", hello, [], descriptors)
    with pytest.raises(StateError):
        RemoteMachine(tmp_path / "s")
    liar.close()
    kept = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the directory itself, read by then
            kept.append(str(link.readlink()))
    assert not [name for name in kept if "liar" in name], "no descriptor stays open"


@pytest.mark.parametrize(
    ("call", "status", "body", "problem"),
    [
        (lambda machine: machine.command(14, 0), ProtocolStatus.INTERNAL, b"a defect", InternalError),
        (lambda machine: machine.command(14, 0), ProtocolStatus.BAD_REQUEST, b"no", ArgumentError),
        (lambda machine: machine.command(14, 0), 0xFFFFFFFF, b"\xff", CsvfastError),
        (lambda machine: machine.allocate(4096), 0, b"", FormatError),
        (lambda machine: machine.allocate(4096), 0, bytes(9), FormatError),
        (lambda machine: machine.allocate(4096), 0, struct.pack("<Q", SIZE - 4095), AddressError),
        (lambda machine: machine.guest_read(1, 0, 16), 0, bytes(15), FormatError),
        (lambda machine: machine.guest_ranges(1), 0, bytes(25), FormatError),
        (lambda machine: machine.guests(), 0, bytes(5), FormatError),
        (lambda machine: machine.ring_doorbell(0), 0, bytes(5), FormatError),
        (lambda machine: machine.guests(), ProtocolStatus.NESTED_PAGE_FAULT, bytes(5), CsvfastError),
        (lambda machine: machine.guests(), 0x20000, b"\xff\xfe", CsvfastError),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be(
    tmp_path: Path, call: Callable[[RemoteMachine], object], status: int, body: bytes, problem: type[Exception]
) -> None:
    liar = Liar(tmp_path / "s", HELLO, [(status, body)])
    with RemoteMachine(tmp_path / "s") as machine, pytest.raises(problem):
        call(machine)
    liar.close()


def test_an_answer_to_another_request(tmp_path: Path) -> None:
    liar = Liar(tmp_path / "s", HELLO, [(0, b"")], tag=1)
    with RemoteMachine(tmp_path / "s") as machine:
        with pytest.raises(FormatError, match="tag and length"):
            machine.command(14, 0)
        with pytest.raises(ClosedError):
            machine.command(14, 0)
    liar.close()


def test_a_request_has_one_deadline(tmp_path: Path) -> None:
    """A server that sends a byte now and then is too slow all the same."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                for _ in range(40):
                    connection.send(b"\0")
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            RemoteMachine(path, timeout=0.5)
        assert time.monotonic() - start < 1.4
        thread.join(10)


def test_another_users_server_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write to the directory can put a socket where the server's should be."""
    real = os.geteuid()
    monkeypatch.setattr(client, "os", SimpleNamespace(geteuid=lambda: real + 1, fspath=os.fspath))
    with pytest.raises(StateError, match=f"belongs to user {real}; expected {real + 1}"):
        RemoteMachine(served.path)


def test_reserved_words_are_zero(served: Served) -> None:
    with served.raw() as connection:
        for operation, body in (
            (Operation.COMMAND, struct.pack("<IIQ", 14, 1, 0)),
            (Operation.GUEST_WRITE, struct.pack("<IIQ", 1, 1, 0) + b"x"),
            (Operation.ASSIGN, struct.pack("<IIQQ", 1, 1, 0, 0)),
        ):
            status, text = ask(connection, operation, body)
            assert (status, text) == (ProtocolStatus.BAD_REQUEST, b"a reserved word is 0x1; expected 0")


def test_a_guests_frames_are_nobodys_in_the_same_process_either(served: Served) -> None:
    """Without connections every holder is None, as that of frames that are a guest's."""
    machine = served.machine
    driver = Driver(machine.command, machine.read, machine.write)
    driver.done(Command.INIT)
    handle = driver.done(Command.LAUNCH_START)["handle"]
    place = machine.allocate(4096)
    machine.assign(place, handle, 0)
    with pytest.raises(ArgumentError):
        machine.free(place)
    with pytest.raises(ArgumentError):
        machine.assign(place, handle, 4096)
    machine.release_holder(None)
    assert machine.guest_ranges(handle) == [(0, place, 4096)]


def test_a_report_that_answers_another_request(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program in the guest must see: a replayed page, and one whose chip id or PEK somebody changed."""
    (tmp_path / "firmware").write_bytes(ovmf.good(size=65536))
    pages: list[bytes] = []
    read = served.machine.guest_read
    with Host(served.machine) as host:
        host.initialise()
        handle = host.launch(GuestPlan(firmware=tmp_path / "firmware", memory_size=1 << 20)).handle
        host.finish(handle)

        def replayed(handle: int, address: int, length: int) -> bytes:
            pages.append(read(handle, address, length))
            return pages[0]

        monkeypatch.setattr(served.machine, "guest_read", replayed)
        assert host.report(handle, b"one").report_data[:3] == b"one"
        with pytest.raises(VerificationError, match="answers another request"):
            host.report(handle, b"two")

        def altered(handle: int, address: int, length: int) -> bytes:
            page = bytearray(read(handle, address, length))
            page[2547] ^= 1  # the MAC's last byte
            return bytes(page)

        monkeypatch.setattr(served.machine, "guest_read", altered)
        with pytest.raises(VerificationError, match="MAC"):
            host.report(handle, b"three")


def test_half_a_message_then_another_client(served: Served) -> None:
    """Interleaved clients: each connection has its own requests, tags and answers."""
    with served.raw() as one, served.raw() as two:
        whole = HEADER.pack(Operation.COMMAND, 16, 1) + struct.pack("<IIQ", 14, 0, 0)
        one.sendall(whole[:20])
        assert ask(two, Operation.COMMAND, struct.pack("<IIQ", 0x7FF, 0, 0), tag=2)[0] == 0x11
        one.sendall(whole[20:] + HEADER.pack(Operation.GUESTS, 0, 3))
        assert answer(one, 1) == (0, b"")
        assert answer(one, 3) == (0, b"")
