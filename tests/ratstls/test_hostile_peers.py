"""Peers that are silent, slow, too many, or send what no TLS library does."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from hypothesis import given, settings
from hypothesis import strategies as st
from ratstls.simulated_peers import attested, ends, guest, opened, plain, pump

from csvfast.errors import AttestedTlsError
from csvfast.ratstls.asynchronous import AttestedServer, ConnectionLimits, open_connection
from csvfast.ratstls.connection import AttestedConnection
from csvfast.ratstls.context import EndpointContext
from csvfast.ratstls.peer import Requirement
from csvfast.ratstls.stream import Stream

ANYBODY = Requirement.unattested()
PLATFORM = Platform()
GUEST = guest(PLATFORM)
SERVER_CONTEXT = EndpointContext.server(plain(), attested(PLATFORM))


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


class Crowd:
    """Raw connections that are closed at the end."""

    def __init__(self) -> None:
        self.pairs: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def join(self, address: tuple[str, int], data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        pair = await asyncio.open_connection(*address)
        self.pairs.append(pair)
        if data:
            pair[1].write(data)
        return pair

    async def leave(self) -> None:
        for _, writer in self.pairs:
            writer.close()
        for _, writer in self.pairs:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(handler: Any = echo, **limits: Any) -> Any:
    """(server, address, crowd, refusals); nothing takes longer than 30 seconds."""
    refusals: list[tuple[str, AttestedTlsError, Any]] = []
    server = AttestedServer(
        plain(), attested(PLATFORM), handler, limits=ConnectionLimits(**limits), on_refusal=lambda *what: refusals.append(what)
    )
    crowd = Crowd()
    async with asyncio.timeout(30):
        address = await server.serve("127.0.0.1", 0)
        try:
            yield server, address, crowd, refusals
        finally:
            await crowd.leave()
            await server.close()


async def is_served(address: tuple[str, int]) -> None:
    stream = await open_connection(address, GUEST, ANYBODY)
    await stream.send(b"x")
    assert await stream.receive() == b"x"
    stream.close()


def hello() -> bytes:
    client = AttestedConnection(EndpointContext.client(GUEST, ANYBODY))
    client.advance()
    return client.outgoing()


# ---- Silence


@pytest.mark.parametrize("start", [b"", hello()[:5], hello()[:-1], hello()])
def test_a_handshake_that_goes_no_further(start: bytes) -> None:
    async def main() -> None:
        async with serving(handshake_seconds=0.3) as (server, address, crowd, refusals):
            reader, _ = await crowd.join(address, start)
            began = asyncio.get_running_loop().time()
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
            assert 0.2 < asyncio.get_running_loop().time() - began < 2
            assert [error.stage for _, error, _ in refusals] == ["deadline"]
            await until(lambda: sum(server.stats()[name] for name in ("handshakes", "closing")) == 0)

    asyncio.run(main())


def test_a_handshake_drop_by_drop() -> None:
    """Bytes that come now and then do not extend the time."""

    async def main() -> None:
        async with serving(handshake_seconds=0.4) as (_, address, crowd, refusals):
            _, writer = await crowd.join(address)
            for byte in hello():
                if refusals:
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)
            assert [error.stage for _, error, _ in refusals] == ["deadline"]

    asyncio.run(main())


def test_silent_connections_do_not_keep_honest_peers_out() -> None:
    async def main() -> None:
        async with serving(handshakes=8) as (server, address, crowd, refusals):
            for _ in range(30):
                await crowd.join(address)
            await until(lambda: server.stats()["refused"] >= 22)
            assert server.stats()["handshakes"] == 8
            for _ in range(5):
                await is_served(address)
            assert {error.stage for _, error, _ in refusals} == {"deadline"}
            assert "8 handshakes at once" in str(refusals[0][1])

    asyncio.run(main())


def test_honest_peers_in_a_flood() -> None:
    async def main() -> None:
        async with serving(handshakes=64) as (_server, address, crowd, _refusals):

            async def flood() -> None:
                while True:
                    await crowd.join(address, b"" if len(crowd.pairs) % 2 else hello()[:100])

            flooding = asyncio.ensure_future(flood())
            for _ in range(10):
                await is_served(address)
            flooding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flooding
            assert len(crowd.pairs) > 20

    asyncio.run(main())


def test_addresses_that_are_not_admitted() -> None:
    async def main() -> None:
        asked: list[str] = []
        refusals: list[Any] = []

        def admits(address: str) -> bool:
            asked.append(address)
            return len(asked) > 1

        server = AttestedServer(
            plain(), attested(PLATFORM), echo, on_refusal=lambda *what: refusals.append(what), admits=admits
        )
        async with asyncio.timeout(30), server:
            address = await server.serve("127.0.0.1", 0)
            with pytest.raises((AttestedTlsError, OSError)):
                await open_connection(address, GUEST, ANYBODY)
            await is_served(address)
            assert all(one.startswith("127.0.0.1:") for one in asked)
            assert [(error.stage, certificate) for _, error, certificate in refusals] == [("closed", None)]

    asyncio.run(main())


def test_the_oldest_goes_first() -> None:
    async def main() -> None:
        async with serving(handshakes=3) as (_, address, crowd, refusals):
            for _ in range(5):
                await crowd.join(address)
                await asyncio.sleep(0.01)
            await until(lambda: len(refusals) == 2)
            gone = [address for address, _, _ in refusals]
            assert gone == [f"127.0.0.1:{writer.get_extra_info('sockname')[1]}" for _, writer in crowd.pairs[:2]]

    asyncio.run(main())


def test_connections_without_a_request_make_room() -> None:
    """Accepted peers that say nothing are closed for new ones; those that have spoken stay."""

    async def main() -> None:
        async with serving(connections=6) as (server, address, _, _):
            spoken = [await open_connection(address, GUEST, ANYBODY) for _ in range(3)]
            for stream in spoken:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            silent = [await open_connection(address, GUEST, ANYBODY) for _ in range(3)]
            await until(lambda: server.stats()["silent"] == 3)
            for _ in range(4):
                await is_served(address)
            for stream in spoken:
                await stream.send(b"y")
                assert await stream.receive() == b"y"
                stream.close()
            assert await silent[0].receive() == b""  # the oldest of them
            for stream in silent:
                stream.close()

    asyncio.run(main())


def test_more_connections_than_there_may_be() -> None:
    """When all have spoken, new ones are turned away, and those that are there are not disturbed."""

    async def main() -> None:
        async with serving(connections=3) as (server, address, _, refusals):
            spoken = [await open_connection(address, GUEST, ANYBODY) for _ in range(3)]
            for stream in spoken:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            with pytest.raises(AttestedTlsError):
                await open_connection(address, GUEST, ANYBODY)
            assert server.stats()["active"] == 3
            assert "3 connections at once" in str(refusals[0][1])
            spoken.pop().close()
            await until(lambda: server.stats()["active"] + server.stats()["closing"] == 2)
            await is_served(address)
            for stream in spoken:
                stream.close()

    asyncio.run(main())


# ---- Slowness once accepted


@pytest.mark.parametrize("spoken", [False, True])
def test_nothing_for_too_long(spoken: bool) -> None:
    errors = []

    async def handler(stream: Stream) -> None:
        try:
            await echo(stream)
        except AttestedTlsError as error:
            errors.append(error)
            raise

    async def main() -> None:
        async with serving(handler, idle_seconds=0.4) as (_, address, _, refusals):
            stream = await open_connection(address, GUEST, ANYBODY)
            for _ in range(4 if spoken else 0):  # together longer than the limit
                await asyncio.sleep(0.2)
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            began = asyncio.get_running_loop().time()
            assert await stream.receive() == b""
            assert 0.2 < asyncio.get_running_loop().time() - began < 2
            stream.close()
            assert not refusals

    asyncio.run(main())
    assert [error.stage for error in errors] == ["deadline"]


def test_a_handler_at_work_is_not_idle() -> None:
    async def slow(stream: Stream) -> None:
        await stream.receive()
        await asyncio.sleep(1.0)
        await stream.send(b"done")

    async def main() -> None:
        async with serving(slow, idle_seconds=0.2) as (_, address, _, _):
            stream = await open_connection(address, GUEST, ANYBODY)
            await stream.send(b"x")
            assert await stream.receive() == b"done"
            stream.close()

    asyncio.run(main())


def test_a_record_drop_by_drop() -> None:
    """Pieces of a record that never becomes complete do not count as something said."""

    async def main() -> None:
        async with serving(idle_seconds=0.4) as (server, address, _, _):
            stream = await open_connection(address, GUEST, ANYBODY)
            stream._link.connection.send(b"x" * 1000)
            record = stream._link.connection.outgoing()
            began = asyncio.get_running_loop().time()
            for byte in record[:-1]:
                if server.stats()["silent"] == 0:
                    break
                stream._link.transport.write(bytes([byte]))
                await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - began < 2
            stream.close()

    asyncio.run(main())


def test_a_peer_that_reads_nothing() -> None:
    errors = []

    async def flood(stream: Stream) -> None:
        try:
            while True:
                await stream.send(bytes(65536))
        except AttestedTlsError as error:
            errors.append(error)
            raise

    async def main() -> None:
        async with serving(flood, idle_seconds=0.4, handshake_seconds=0.6) as (server, address, _, _):
            stream = await open_connection(address, GUEST, ANYBODY)
            stream._link.transport.pause_reading()
            await until(lambda: bool(errors))
            await until(lambda: server.stats()["closing"] == 0)  # not even its last words wait for ever
            stream._link.transport.abort()

    asyncio.run(main())
    assert [error.stage for error in errors] == ["deadline"]


def test_a_peer_that_is_gone() -> None:
    errors = []

    async def handler(stream: Stream) -> None:
        await stream.receive()
        await asyncio.sleep(0.3)
        try:
            for _ in range(3):
                await stream.send(bytes(100_000))
                await asyncio.sleep(0.05)
        except AttestedTlsError as error:
            errors.append(error)
            raise

    async def main() -> None:
        async with serving(handler) as (server, address, _, _):
            stream = await open_connection(address, GUEST, ANYBODY)
            await stream.send(b"x")
            await asyncio.sleep(0.1)
            stream._link.transport.abort()
            await until(lambda: bool(errors))
            await until(lambda: sum(server.stats()[name] for name in ("active", "closing")) == 0)

    asyncio.run(main())
    assert [error.stage for error in errors] == ["closed"]


def test_judges_that_never_end() -> None:
    """The time of a judgement is limited, and closing the server does not wait for it."""
    import threading

    from csvfast.ratstls.peer import PolicyJudge

    go = threading.Event()

    class Stuck(PolicyJudge):
        @property
        def blocking(self) -> bool:
            return True

        def verify(self, certificate: Any) -> Any:
            go.wait(20)
            return super().verify(certificate)

    refusals = []

    async def main() -> None:
        from ratstls.simulated_peers import POLICY

        server = AttestedServer(
            plain(), Requirement.attested(Stuck(PLATFORM.roots, POLICY)), echo,
            limits=ConnectionLimits(handshake_seconds=0.3, judges=1), on_refusal=lambda *what: refusals.append(what),
        )  # fmt: skip
        async with asyncio.timeout(10), server:
            address = await server.serve("127.0.0.1", 0)
            streams = [await open_connection(address, GUEST, ANYBODY) for _ in range(3)]
            await until(lambda: server.stats()["judging"] == 3)
            assert len(server._judgements) == 1
            for stream in streams:
                assert await stream.receive() == b""
                stream.close()
            assert [error.stage for _, error, _ in refusals] == ["deadline"] * 3
            assert all(certificate is not None for _, _, certificate in refusals)
            assert server.stats()["judging"] == 0  # those that waited for their turn wait no more
            go.set()
            await until(lambda: not server._judgements)
            await is_served(address)
            go.clear()
            last = await open_connection(address, GUEST, ANYBODY)
            await until(lambda: server.stats()["judging"] == 1)
            last.close()
        go.set()
        await asyncio.sleep(0.1)

    asyncio.run(main())


# ---- Bytes


def test_garbage_over_sockets() -> None:
    randomness = random.Random(11)

    async def main() -> None:
        async with serving() as (_, address, crowd, refusals):
            for size in (1, 4, 5, 6, 100, 5000, 200_000):
                reader, _ = await crowd.join(address, b"\x80" + randomness.randbytes(size))
                if size >= 5:
                    with contextlib.suppress(ConnectionResetError):
                        await reader.read()
            await until(lambda: len(refusals) >= 5)
            await is_served(address)
            assert {error.stage for _, error, _ in refusals} == {"handshake"}

    asyncio.run(main())


def flights() -> list[bytes]:
    """What an honest client sends to SERVER_CONTEXT: hello, then certificate, proof and end."""
    server, client = AttestedConnection(SERVER_CONTEXT), AttestedConnection(EndpointContext.client(GUEST, ANYBODY))
    client.advance()
    first = client.outgoing()
    server.feed(first)
    server.advance()
    client.feed(server.outgoing())
    client.advance()
    return [first, client.outgoing()]


HELLO = flights()[0]


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_hellos(data: st.DataObject) -> None:
    damaged = bytearray(HELLO)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "set"]))
        at = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        if kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 50))]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=50))
        elif damaged:
            damaged[at] = data.draw(st.integers(0, 255))
    server = AttestedConnection(SERVER_CONTEXT)
    server.feed(bytes(damaged))
    with contextlib.suppress(AttestedTlsError):
        assert server.advance() == "handshake"
    assert server.state in ("handshake", "closed")
    server.outgoing()


@settings(max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damaged_second_flights(place: float, bit: int) -> None:
    """Not one changed bit of what is authenticated may lead to a judgement."""
    server, client = AttestedConnection(SERVER_CONTEXT), AttestedConnection(CLIENT_CONTEXT)
    client.advance()
    server.feed(client.outgoing())
    server.advance()
    client.feed(server.outgoing())
    client.advance()
    flight = bytearray(client.outgoing())
    at = int(place * len(flight))
    flight[at] ^= 1 << bit
    server.feed(bytes(flight))
    with contextlib.suppress(AttestedTlsError):
        server.advance()
    if server.state == "judging":
        assert is_outside_the_records(bytes(flight), at)


def is_outside_the_records(flight: bytes, at: int) -> bool:
    """True in the legacy version of a record's header, or anywhere in a ChangeCipherSpec, which nothing authenticates."""
    start = 0
    while start < len(flight):
        size = int.from_bytes(flight[start + 3 : start + 5], "big")
        if start <= at < start + 5 + size:
            return flight[start] == 20 or at - start in (1, 2)
        start += 5 + size
    return False


CLIENT_CONTEXT = EndpointContext.client(GUEST, ANYBODY)


@settings(max_examples=100)
@given(garbage=st.binary(min_size=1, max_size=300))
def test_garbage_after_the_connection_is_open(garbage: bytes) -> None:
    server, client = AttestedConnection(SERVER_CONTEXT), AttestedConnection(CLIENT_CONTEXT)
    opened(server, client)
    server.feed(garbage)
    server.feed_end()
    with pytest.raises(AttestedTlsError):
        server.receive()
    assert server.state == "closed"


def client_with_a_chain(length: int) -> EndpointContext:
    from cryptography import x509

    context = EndpointContext.client(GUEST, ANYBODY)
    context.context._used = False
    extra = x509.load_der_x509_certificate(GUEST.certificate)
    for _ in range(length):
        context.context.add_extra_chain_cert(extra)
    return context


def test_a_long_chain_of_certificates() -> None:
    """The bytes of a handshake are limited, whatever they are."""
    server, client = AttestedConnection(SERVER_CONTEXT), AttestedConnection(client_with_a_chain(30))
    client.advance()
    server.feed(client.outgoing())
    server.advance()
    client.feed(server.outgoing())
    client.advance()
    with pytest.raises(AttestedTlsError, match="at most"):
        server.feed(client.outgoing())


def test_a_long_chain_of_certificates_over_sockets() -> None:
    async def main() -> None:
        async with serving() as (_, address, _, refusals):
            stream = await open_connection(address, None, ANYBODY, context=client_with_a_chain(30))
            with contextlib.suppress(AttestedTlsError):
                await stream.receive()
            stream.close()
            assert [error.stage for _, error, _ in refusals] == ["handshake"]
            await is_served(address)

    asyncio.run(main())


def test_a_certificate_that_is_too_large() -> None:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    from csvfast.ratstls.context import Identity
    from csvfast.ratstls.keys import TlsKey

    key, now = TlsKey.generate(), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "large")])
    builder = x509.CertificateBuilder(name, name, key.private.public_key(), 1, now - timedelta(1), now + timedelta(1))
    content = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.1.1"), bytes(33000))
    encoded = builder.add_extension(content, False).sign(key.private, SHA256()).public_bytes(Encoding.DER)
    server, client = ends((plain(), ANYBODY), (Identity(key, encoded), ANYBODY))
    pump(server, client)
    assert "at most 32768" in str(server.error)
    assert server.error is not None
    assert server.error.stage == "certificate"
