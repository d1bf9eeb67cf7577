"""The asyncio server and client over real sockets, on asyncio's loop and on uvloop."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from ratstls.simulated_peers import POLICY, attested, guest, plain

from csvfast.errors import ArgumentError, AttestedTlsError
from csvfast.ratstls.asynchronous import AttestedServer, ConnectionLimits, open_connection, raise_open_file_limit
from csvfast.ratstls.context import EndpointContext, TlsOptions
from csvfast.ratstls.peer import PolicyJudge, Requirement
from csvfast.ratstls.stream import Stream

ANYBODY = Requirement.unattested()
LOOPS = ["asyncio", "uvloop"]
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    async def limited(main: Awaitable[None]) -> None:
        async with asyncio.timeout(30):
            await main

    def run(main: Coroutine[Any, Any, None]) -> None:
        if request.param == "uvloop":
            uvloop = pytest.importorskip("uvloop")
            uvloop.run(limited(main))
        else:
            asyncio.run(limited(main))

    return run


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    pieces = b""
    while len(pieces) < size:
        piece = await stream.receive()
        assert piece
        pieces += piece
    return pieces


def test_echo(platform: Platform, run: Run) -> None:
    peers = []

    async def handler(stream: Stream) -> None:
        peers.append(stream.peer)
        await echo(stream)

    async def main() -> None:
        async with AttestedServer(guest(platform), attested(platform), handler) as server:
            address = await server.serve("127.0.0.1", 0)
            stream = await open_connection(address, guest(platform, custom={"role": b"db"}), attested(platform))
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            assert peers[0].exporter == stream.peer.exporter
            assert dict(peers[0].custom_claims) == {"role": b"db"}
            assert peers[0].verified is not None
            assert stream.peer.verified is not None
            assert peers[0].address.startswith("127.0.0.1:")
            assert server.stats()["active"] == 1
            stream.close()
            await until(lambda: server.stats()["active"] + server.stats()["closing"] == 0)
            assert server.stats() | {"accepted": 1, "refused": 0} == server.stats()

    run(main())


def test_unix_socket(platform: Platform, run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo) as server:
            await server.serve_unix(tmp_path / "socket")
            await server.serve("127.0.0.1", 0)
            stream = await open_connection(tmp_path / "socket", guest(platform), ANYBODY)
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            stream.close()

    run(main())


@pytest.mark.parametrize("size", [1, 16384, 16385, 300_000, 3 << 20])
def test_large_messages_come_through_whole(platform: Platform, run: Run, size: int) -> None:
    message = (bytes(range(256)) * (size // 256 + 1))[:size]

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            sending = asyncio.ensure_future(stream.send(memoryview(message)))
            assert await receive_exactly(stream, size) == message
            await sending
            stream.close()

    run(main())


def test_a_message_is_one_record_at_the_receiver(platform: Platform, run: Run) -> None:
    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            for size in (10, 4096, 16384, 7):
                await stream.send(bytes(size))
                assert len(await stream.receive()) == size
            stream.close()

    run(main())


def test_a_sender_waits_for_a_slow_receiver(platform: Platform, run: Run) -> None:
    """Neither the handler's memory nor the loop's grows with what the peer does not read."""
    sent = 0

    async def flood(stream: Stream) -> None:
        nonlocal sent
        while True:
            await stream.send(bytes(100_000))
            sent += 100_000

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), flood) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            await asyncio.sleep(0.5)
            before = sent
            await asyncio.sleep(0.2)
            assert sent == before
            assert sent < 16 << 20  # the buffers of two sockets, and ours
            await receive_exactly(stream, 8 << 20)
            await until(lambda: sent > before)
            stream.close()

    run(main())


def test_a_receiver_that_does_not_read_stops_the_peer(platform: Platform, run: Run) -> None:
    go = asyncio.Event()

    async def lazy(stream: Stream) -> None:
        await go.wait()
        await receive_exactly(stream, 8 << 20)
        await stream.send(b"all")

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), lazy) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            sending = asyncio.ensure_future(stream.send(bytes(8 << 20)))
            await asyncio.sleep(0.3)
            link = next(iter(server._silent))
            assert 0 < link._unread <= 600_000
            assert not sending.done()
            go.set()
            await sending
            assert await stream.receive() == b"all"
            stream.close()

    run(main())


# ---- Who is refused, and what is said about it


def test_refusals_are_reported(platform: Platform, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    refusals: list[tuple[str, AttestedTlsError, Any]] = []
    handled = []

    async def handler(stream: Stream) -> None:
        handled.append(stream)

    async def main() -> None:
        server = AttestedServer(plain(), attested(platform), handler, on_refusal=lambda *what: refusals.append(what))
        async with server:
            address = await server.serve("127.0.0.1", 0)
            stream = await open_connection(address, guest(platform, measure=bytes(32)), ANYBODY)
            assert await stream.receive() == b""  # accepted by us, refused by him
            stream.close()
            stream = await open_connection(address, guest(Platform()), ANYBODY)
            assert await stream.receive() == b""
            stream.close()
            for identity in (None, plain()):
                stream = await open_connection(address, identity, ANYBODY)
                with pytest.raises(AttestedTlsError, match="alert"):
                    await stream.receive()
                stream.close()
            await until(lambda: len(refusals) == 4)
            assert server.stats()["refused"] == 4

    run(main())
    assert [error.stage for _, error, _ in refusals] == ["appraise", "verify", "handshake", "certificate"]
    assert [certificate is not None for _, _, certificate in refusals] == [True, True, False, False]
    assert all(address.startswith("127.0.0.1:") for address, _, _ in refusals)
    assert not handled
    for record in caplog.records:
        assert record.levelno < logging.ERROR


def test_a_report_of_refusals_that_fails(platform: Platform, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def report(*_what: Any) -> None:
        raise RuntimeError("no disk")

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo, on_refusal=report) as server:
            address = await server.serve("127.0.0.1", 0)
            stream = await open_connection(address, guest(platform, measure=bytes(32)), ANYBODY)
            assert await stream.receive() == b""
            stream.close()
            stream = await open_connection(address, guest(platform), ANYBODY)
            await stream.send(b"still there")
            assert await stream.receive() == b"still there"
            stream.close()

    run(main())
    assert any("could not be reported" in record.getMessage() for record in caplog.records)


def test_a_client_refuses_its_server(platform: Platform, run: Run) -> None:
    handled = []

    async def handler(stream: Stream) -> None:
        handled.append(await stream.receive())

    async def main() -> None:
        async with AttestedServer(guest(platform, measure=bytes(32)), attested(platform), handler) as server:
            address = await server.serve("127.0.0.1", 0)
            with pytest.raises(AttestedTlsError) as info:
                await open_connection(address, guest(platform), attested(platform))
            assert info.value.stage == "appraise"
            with pytest.raises(AttestedTlsError) as info:
                await open_connection(address, guest(platform), Requirement.pinned([bytes(32)]))
            assert info.value.stage == "binding"
            await until(lambda: bool(handled) and server.stats()["closing"] == 0)

    run(main())
    assert handled == [b""]


# ---- Judges that may wait


class SlowJudge(PolicyJudge):
    def __init__(self, platform: Platform, seconds: float) -> None:
        super().__init__(platform.roots, POLICY)
        self.seconds = seconds
        self.threads: set[int] = set()

    @property
    def blocking(self) -> bool:
        return True

    def verify(self, certificate: Any) -> Any:
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return super().verify(certificate)


def test_judges_that_wait_do_so_in_threads(platform: Platform, run: Run) -> None:
    judge = SlowJudge(platform, 0.2)

    async def main() -> None:
        async with AttestedServer(plain(), Requirement.attested(judge), echo) as server:
            address = await server.serve("127.0.0.1", 0)
            start = time.monotonic()

            async def one() -> None:
                stream = await open_connection(address, guest(platform), ANYBODY)
                await stream.send(b"early")
                assert await stream.receive() == b"early"
                stream.close()

            await asyncio.gather(*(one() for _ in range(8)))
            assert time.monotonic() - start < 1.2

    run(main())
    assert len(judge.threads) > 1
    assert threading.get_ident() not in judge.threads


def test_nothing_is_read_while_a_judge_thinks(platform: Platform, run: Run) -> None:
    async def main() -> None:
        async with AttestedServer(plain(), Requirement.attested(SlowJudge(platform, 0.4)), echo) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            sending = asyncio.ensure_future(stream.send(bytes(4 << 20)))
            await until(lambda: server.stats()["judging"] == 1)
            await asyncio.sleep(0.2)
            link = next(iter(server._judging))
            assert link.connection._arrived < 300_000
            assert await receive_exactly(stream, 4 << 20) == bytes(4 << 20)
            await sending
            stream.close()

    run(main())


def test_a_judge_that_refuses_in_a_thread(platform: Platform, run: Run) -> None:
    errors = []

    async def main() -> None:
        server = AttestedServer(
            plain(), Requirement.attested(SlowJudge(Platform(), 0)), echo, on_refusal=lambda *what: errors.append(what[1])
        )
        async with server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            await stream.send(b"hello")
            assert await stream.receive() == b""
            stream.close()

    run(main())
    assert [error.stage for error in errors] == ["verify"]


def test_a_client_with_a_judge_that_waits(platform: Platform, run: Run) -> None:
    async def main() -> None:
        async with AttestedServer(guest(platform), ANYBODY, echo) as server:
            address = await server.serve("127.0.0.1", 0)
            stream = await open_connection(address, plain(), Requirement.attested(SlowJudge(platform, 0.05)))
            assert stream.peer.verified is not None
            stream.close()
            with pytest.raises(AttestedTlsError) as info:
                await open_connection(address, plain(), Requirement.attested(SlowJudge(platform, 2)), timeout=0.2)
            assert info.value.stage == "deadline"
            with pytest.raises(AttestedTlsError) as info:
                await open_connection(address, plain(), Requirement.attested(SlowJudge(Platform(), 0)))
            assert info.value.stage == "verify"

    run(main())


# ---- Ends


def test_half_close(platform: Platform, run: Run) -> None:
    async def handler(stream: Stream) -> None:
        request = b""
        while data := await stream.receive():
            request += data
        await stream.send(b"answer to " + request)

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), handler) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            await stream.send(b"all of it")
            link = stream._link
            link.connection._connection.shutdown()
            link._flush()
            assert await stream.receive() == b"answer to all of it"
            assert await stream.receive() == b""
            stream.close()

    run(main())


def test_an_end_without_close_notify(platform: Platform, run: Run) -> None:
    failures: list[AttestedTlsError] = []

    async def handler(stream: Stream) -> None:
        assert await stream.receive() == b"half a"
        try:
            await stream.receive()
        except AttestedTlsError as error:
            failures.append(error)
            raise

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), handler) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            await stream.send(b"half a")
            stream._link.transport.write_eof()
            await until(lambda: bool(failures))
            stream._link.transport.abort()

    run(main())
    assert failures[0].stage == "closed"
    assert "close_notify" in str(failures[0])


def test_a_handler_that_fails_ends_its_connection_alone(
    platform: Platform, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(stream: Stream) -> None:
        if await stream.receive() == b"bad":
            raise ValueError("a bug")
        await stream.send(b"good")

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), handler) as server:
            address = await server.serve("127.0.0.1", 0)
            for request, answer in ((b"bad", b""), (b"good", b"good")):
                stream = await open_connection(address, guest(platform), ANYBODY)
                await stream.send(request)
                assert await stream.receive() == answer
                stream.close()

    run(main())
    assert sum("failed" in record.getMessage() for record in caplog.records) == 1


def test_closing_the_server_ends_everything(platform: Platform, run: Run) -> None:
    ended = []

    async def handler(stream: Stream) -> None:
        try:
            await stream.receive()
        finally:
            ended.append(stream)

    async def main() -> None:
        server = AttestedServer(plain(), attested(platform), handler)
        address = await server.serve("127.0.0.1", 0)
        streams = [await open_connection(address, guest(platform), ANYBODY) for _ in range(5)]
        reader, writer = await asyncio.open_connection(*address)
        await until(lambda: server.stats()["silent"] == 5 and server.stats()["handshakes"] == 1)
        await server.close()
        assert len(ended) == 5
        for stream in streams:
            assert await stream.receive() == b""
            stream.close()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await open_connection(address, guest(platform), ANYBODY)

    run(main())


def test_use_after_close(platform: Platform, run: Run) -> None:
    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo) as server:
            stream = await open_connection(await server.serve("127.0.0.1", 0), guest(platform), ANYBODY)
            stream.close()
            stream.close()
            with pytest.raises(AttestedTlsError):
                await stream.send(b"x")
            with pytest.raises(AttestedTlsError):
                await stream.receive()

    run(main())


def test_a_new_identity_for_new_connections(platform: Platform, run: Run) -> None:
    first, second = plain(), plain()

    async def main() -> None:
        async with AttestedServer(first, attested(platform), echo) as server:
            address = await server.serve("127.0.0.1", 0)
            old = await open_connection(address, guest(platform), Requirement.pinned([first.key.spki_sha256]))
            server.renew(second)
            new = await open_connection(address, guest(platform), Requirement.pinned([second.key.spki_sha256]))
            for stream in (old, new):
                await stream.send(b"x")
                assert await stream.receive() == b"x"
                stream.close()

    run(main())


def test_contexts_can_be_reused(platform: Platform, run: Run) -> None:
    context = EndpointContext.client(guest(platform), ANYBODY)

    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo) as server:
            address = await server.serve("127.0.0.1", 0)
            for _ in range(5):
                stream = await open_connection(address, None, ANYBODY, context=context)
                await stream.send(b"x")
                assert await stream.receive() == b"x"
                stream.close()

    run(main())


def test_nobody_answers(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        async def main() -> None:
            with pytest.raises(AttestedTlsError) as info:
                await open_connection(silent.getsockname(), None, ANYBODY, timeout=0.2)
            assert info.value.stage == "deadline"

        run(main())


def test_a_thousand_connections(platform: Platform) -> None:
    assert raise_open_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2300:
        pytest.skip("the system does not let a process have 2300 open files")
    context = EndpointContext.client(guest(platform), ANYBODY)

    async def main() -> None:
        async with asyncio.timeout(60), AttestedServer(plain(), attested(platform), echo) as server:
            address = await server.serve("127.0.0.1", 0)
            streams = []
            for _ in range(20):
                streams += await asyncio.gather(
                    *(open_connection(address, None, ANYBODY, context=context, timeout=30) for _ in range(50))
                )
            for stream in streams:
                await stream.send(b"x")
            for stream in streams:
                assert await stream.receive() == b"x"
            assert server.stats()["active"] == 1000
            for stream in streams:
                stream.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["handshakes", "connections", "judges", "handshake_seconds", "idle_seconds"])
def test_limits_out_of_range(name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        ConnectionLimits(**{name: 0})


def test_tls_1_2_by_option(platform: Platform, run: Run) -> None:
    async def main() -> None:
        async with AttestedServer(plain(), attested(platform), echo, options=TlsOptions("1.2")) as server:
            context = EndpointContext.client(guest(platform), ANYBODY, TlsOptions("1.2"))
            context.context._used = False
            from OpenSSL import SSL

            context.context.set_max_proto_version(SSL.TLS1_2_VERSION)
            stream = await open_connection(await server.serve("127.0.0.1", 0), None, ANYBODY, context=context)
            assert stream.peer.tls_version == "TLSv1.2"
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            stream.close()

    run(main())
