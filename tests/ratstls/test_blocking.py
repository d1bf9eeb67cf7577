"""The client and server with threads, over real sockets; and with the asyncio ones as the other end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from ratstls.simulated_peers import POLICY, attested, guest, plain

from csvfast.errors import AttestedTlsError
from csvfast.ratstls.asynchronous import AttestedServer
from csvfast.ratstls.blocking import BlockingServer, BlockingStream, connect
from csvfast.ratstls.context import EndpointContext
from csvfast.ratstls.peer import PolicyJudge, Requirement
from csvfast.ratstls.stream import Stream

ANYBODY = Requirement.unattested()


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


def echo(stream: BlockingStream) -> None:
    while data := stream.receive():
        stream.send(data)


@pytest.fixture
def server(platform: Platform) -> Iterator[BlockingServer]:
    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), echo) as server:
        yield server


def receive_exactly(stream: BlockingStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = stream.receive()
        assert piece
        data += piece
    return data


def test_echo(server: BlockingServer, platform: Platform) -> None:
    with connect(server.address, guest(platform), ANYBODY) as stream:
        for size in (1, 100, 16384):
            stream.send(bytes(size))
            assert stream.receive() == bytes(size)
        stream.send(bytearray(60_000))
        assert receive_exactly(stream, 60_000) == bytes(60_000)
        assert stream.peer.certificate is not None
        assert "open" in repr(stream)
    assert "closed" in repr(stream)
    with pytest.raises(AttestedTlsError, match="this end has closed"):
        stream.send(b"x")


def test_unix_socket(platform: Platform, tmp_path: Path) -> None:
    with (
        BlockingServer(tmp_path / "socket", guest(platform), attested(platform), echo),
        connect(tmp_path / "socket", guest(platform), attested(platform)) as stream,
    ):
        stream.send(b"hello")
        assert stream.receive() == b"hello"
        assert stream.peer.verified is not None
        assert stream.peer.address == "unix socket"


def test_many_clients_at_once(server: BlockingServer, platform: Platform) -> None:
    context = EndpointContext.client(guest(platform), ANYBODY)

    def one(number: int) -> bool:
        with connect(server.address, None, ANYBODY, context=context) as stream:
            for index in range(10):
                message = f"{number} {index}".encode()
                stream.send(message)
                if stream.receive() != message:
                    return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(64)))


def test_refusals(platform: Platform) -> None:
    refusals: list[tuple[Any, ...]] = []
    handled = []
    with BlockingServer(
        ("127.0.0.1", 0), plain(), attested(platform), handled.append, on_refusal=lambda *what: refusals.append(what)
    ) as server:
        for identity in (guest(platform, measure=bytes(32)), guest(Platform())):
            with connect(server.address, identity, ANYBODY) as stream:
                assert stream.receive() == b""
        for identity in (None, plain()):
            with connect(server.address, identity, ANYBODY) as stream, pytest.raises(AttestedTlsError, match="alert"):
                stream.receive()
    assert [error.stage for _, error, _ in refusals] == ["appraise", "verify", "handshake", "certificate"]
    assert [certificate is None for _, _, certificate in refusals] == [False, False, True, True]
    assert not handled


def test_the_client_refuses(server: BlockingServer, platform: Platform) -> None:
    with pytest.raises(AttestedTlsError) as info:
        connect(server.address, guest(platform), attested(platform))
    assert info.value.stage == "certificate"
    with pytest.raises(AttestedTlsError) as info:
        connect(server.address, guest(platform), Requirement.pinned([bytes(32)]))
    assert info.value.stage == "binding"


def test_a_server_that_says_nothing(platform: Platform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(AttestedTlsError) as info:
            connect(silent.getsockname(), guest(platform), ANYBODY, timeout=0.2)
        assert info.value.stage == "deadline"
        assert time.monotonic() - start < 2


def test_a_server_that_drips(platform: Platform) -> None:
    """The time is for the whole handshake, not for each byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            raw, _ = listener.accept()
            with raw:
                try:
                    for _ in range(200):
                        raw.sendall(b"\x16" if _ == 0 else b"\x03")
                        time.sleep(0.02)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        start = time.monotonic()
        with pytest.raises(AttestedTlsError):
            connect(listener.getsockname(), guest(platform), ANYBODY, timeout=0.3)
        assert time.monotonic() - start < 2
        thread.join()


def test_a_judgement_that_comes_too_late(platform: Platform) -> None:
    class Slow(PolicyJudge):
        def verify(self, certificate: Any) -> Any:
            time.sleep(0.4)
            return super().verify(certificate)

    requirement = Requirement.attested(Slow(platform.roots, POLICY))
    with BlockingServer(("127.0.0.1", 0), guest(platform), ANYBODY, echo) as server:
        with pytest.raises(AttestedTlsError) as info:
            connect(server.address, plain(), requirement, timeout=0.3)
        assert info.value.stage == "deadline"
        connect(server.address, plain(), requirement, timeout=5).close()


def test_idle(server: BlockingServer, platform: Platform) -> None:
    with connect(server.address, guest(platform), ANYBODY, idle=0.1) as stream:
        with pytest.raises(AttestedTlsError) as info:
            stream.receive()
        assert info.value.stage == "deadline"
        with pytest.raises(AttestedTlsError):
            stream.send(b"too late")


def test_silent_peers_are_closed(platform: Platform) -> None:
    refusals: list[AttestedTlsError] = []
    with BlockingServer(
        ("127.0.0.1", 0), plain(), attested(platform), echo, handshake_seconds=0.2, idle_seconds=0.2,
        on_refusal=lambda _address, error, _certificate: refusals.append(error),
    ) as server:  # fmt: skip
        with socket.create_connection(server.address) as raw:
            raw.settimeout(5)
            assert raw.recv(1) == b""
        with connect(server.address, guest(platform), ANYBODY) as stream:
            assert stream.receive() == b""
    assert [error.stage for error in refusals] == ["deadline"]


def test_no_more_at_once_than_allowed(platform: Platform) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def handler(stream: BlockingStream) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        stream.send(stream.receive())
        time.sleep(0.05)
        with lock:
            running -= 1

    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), handler, connections=2) as server:

        def one(_: int) -> bytes:
            with connect(server.address, guest(platform), ANYBODY) as stream:
                stream.send(b"x")
                return stream.receive()

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(one, range(6))) == [b"x"] * 6
    assert most == 2


def test_closing_ends_the_handlers(platform: Platform) -> None:
    ended = []

    def handler(stream: BlockingStream) -> None:
        try:
            stream.receive()
        except AttestedTlsError as error:
            ended.append(error.stage)
            raise

    server = BlockingServer(("127.0.0.1", 0), plain(), attested(platform), handler)
    stream = connect(server.address, guest(platform), ANYBODY)
    time.sleep(0.1)
    server.close()
    assert ended == ["closed"]
    with pytest.raises(AttestedTlsError):  # broken off: no close_notify
        stream.receive()
    stream.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server.address, guest(platform), ANYBODY)


def test_a_handler_that_fails(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    def handler(stream: BlockingStream) -> None:
        raise ValueError("a bug")

    with (
        BlockingServer(("127.0.0.1", 0), plain(), attested(platform), handler) as server,
        connect(server.address, guest(platform), ANYBODY) as stream,
    ):
        assert stream.receive() == b""
    assert any("failed" in record.getMessage() for record in caplog.records)


def test_a_blocking_client_of_an_asyncio_server(platform: Platform) -> None:
    async def handler(stream: Stream) -> None:
        while data := await stream.receive():
            await stream.send(data)

    def client(address: tuple[str, int]) -> bytes:
        with connect(address, guest(platform), attested(platform)) as stream:
            stream.send(bytes(100_000))
            return receive_exactly(stream, 100_000)

    async def main() -> None:
        async with asyncio.timeout(20), AttestedServer(guest(platform), attested(platform), handler) as server:
            address = await server.serve("127.0.0.1", 0)
            assert await asyncio.to_thread(client, address) == bytes(100_000)

    asyncio.run(main())


def test_nobody_there(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(tmp_path / "none", guest(platform), ANYBODY)
