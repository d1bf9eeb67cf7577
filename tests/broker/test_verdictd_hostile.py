"""Verdictd's door among strangers: the silent, the slow, the noisy, the greedy; honest guests are served meanwhile."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from attest.simulated_evidence import Platform
from broker.verdictd_rig import KEY, Rig, ask, ended, new_guest

from csvfast.broker.model import ResourcePath
from csvfast.errors import AttestedTlsError
from csvfast.ratstls.asynchronous import ConnectionLimits, raise_open_file_limit
from csvfast.ratstls.stream import Stream


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


@pytest.fixture
def rig(tmp_path: Path, platform: Platform) -> Iterator[Rig]:
    with Rig(tmp_path, platform) as made:
        yield made


async def served(rig: Rig) -> float:
    """An honest guest comes, gets its key and goes. Out: seconds."""
    before = time.perf_counter()
    async with rig.client() as client:
        assert (await client.get_kek("disk")).equals(KEY)
    return time.perf_counter() - before


# ---- Without a certificate


def test_a_thousand_silent_connections(rig: Rig) -> None:
    async def work() -> None:
        if raise_open_file_limit() < 4096:
            pytest.skip("the system does not allow 2,000 open sockets")
        host, port = rig.address  # type: ignore[misc]
        silent = [await asyncio.open_connection(host, port) for _ in range(1000)]
        times = [await served(rig) for _ in range(20)]
        assert max(times) < 2
        assert rig.door.stats()["handshakes"] <= 256
        assert rig.door.stats()["accepted"] == 20
        for _reader, writer in silent:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in silent), return_exceptions=True)

    rig.run(work)
    assert len(rig.records(outcome="allowed")) == 20
    assert not rig.records(outcome="denied")


def test_noise_instead_of_tls(rig: Rig) -> None:
    rng = random.Random(1)

    async def noise() -> None:
        host, port = rig.address  # type: ignore[misc]
        reader, writer = await asyncio.open_connection(host, port)
        try:
            for _ in range(10):
                writer.write(rng.choice([b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n", b""]) + rng.randbytes(200))
                await writer.drain()
            await asyncio.wait_for(reader.read(), 10)
        except OSError:
            pass
        finally:
            writer.close()

    async def work() -> None:
        await asyncio.gather(*(noise() for _ in range(100)), *(served(rig) for _ in range(5)))
        assert rig.door.stats()["handshakes"] == 0

    rig.run(work)


# ---- Attested, and not honest


def test_attested_and_silent(tmp_path: Path, platform: Platform) -> None:
    limits = ConnectionLimits(connections=50, idle_seconds=30)
    with Rig(tmp_path, platform, connections=limits) as rig:

        async def work() -> None:
            identity = new_guest(platform)
            silent = [await rig.connect(identity) for _ in range(120)]
            for _ in range(5):
                await served(rig)
            assert rig.door.stats()["silent"] <= 50
            gone = 0
            for stream in silent[:60]:
                with suppress(AttestedTlsError):
                    assert await asyncio.wait_for(stream.receive(), 5) == b""
                gone += 1
            assert gone == 60  # the oldest made room
            for stream in silent:
                stream.close()

        rig.run(work)


def test_a_request_that_never_ends(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, request_seconds=1.0) as rig:

        async def drip(stream: Stream, data: bytes) -> float:
            """One byte now and then; the connection must not live from it."""
            before = time.perf_counter()
            try:
                for byte in data:
                    await stream.send(bytes([byte]))
                    await asyncio.sleep(0.1)
                    if time.perf_counter() - before > 10:
                        break
                await stream.receive()
            except AttestedTlsError:
                pass
            stream.close()
            return time.perf_counter() - before

        async def work() -> None:
            identity = new_guest(platform)
            begun = b'{"command":"version"}{"a":"'
            slow = (b'{"command":"' + b"x" * 200, b" " * 200, b"{" * 200, begun + b"\\" * 200)
            drips = [drip(await rig.connect(identity), data) for data in slow]
            times = await asyncio.gather(*drips, served(rig))
            assert max(times[:-1]) < 8
            assert times[-1] < 2
            assert rig.door.stats()["malformed"] == 4
            # Who waits between requests is not slow.
            with closing(await rig.connect(identity)) as stream:
                for _ in range(2):
                    assert await ask(stream, {"command": "version"})
                    await asyncio.sleep(1.2)
                assert await ask(stream, {"command": "version"})

        rig.run(work)


@pytest.mark.parametrize(
    "data",
    [b'{"command":"echo","data":"' + b"x" * 100_000 + b'"}', b"{" * 100_000, b'{"a":"' + b"\\\\" * 50_000],
    ids=["text", "brackets", "backslashes"],
)
def test_requests_longer_than_allowed(rig: Rig, data: bytes) -> None:
    async def work() -> None:
        stream = await rig.connect()
        try:
            await stream.send(data)
            assert await ended(stream)
        except AttestedTlsError:
            pass  # it was closed while we were still sending
        stream.close()
        await served(rig)
        assert rig.door.stats()["malformed"] == 1

    rig.run(work)


def test_the_longest_request_allowed(rig: Rig) -> None:
    frame = len(json.dumps({"command": "echo", "data": ""}))

    async def work() -> None:
        with closing(await rig.connect()) as stream:
            text = "x" * (65536 - frame)
            await stream.send(json.dumps({"command": "echo", "data": text}).encode())
            found = b""
            while data := await stream.receive():
                found += data
            assert found == text.encode()

    rig.run(work)


def test_garbage_after_the_handshake(rig: Rig) -> None:
    rng = random.Random(2)

    async def garbage() -> None:
        stream = await rig.connect(identity)
        try:
            await stream.send(rng.randbytes(1 + rng.randrange(5000)))
            await stream.receive()
        except AttestedTlsError:
            pass
        stream.close()

    async def work() -> None:
        await asyncio.gather(*(garbage() for _ in range(50)), *(served(rig) for _ in range(5)))

    identity = new_guest(rig.platform)
    rig.run(work)
    assert len(rig.records()) == 5


def test_ten_thousand_requests_in_one_write(rig: Rig) -> None:
    """Answered one by one, while others have their turn."""
    before: list[int] = []

    async def work() -> None:
        with closing(await rig.connect()) as stream:
            sending = asyncio.create_task(stream.send(b'{"command":"version"}' * 10_000))
            asking = asyncio.create_task(served(rig))
            size, expected = 0, 10_000 * len(b'{"status":"OK","version":"v1"}')
            while size < expected:
                size += len(await stream.receive())
                if asking.done():
                    before.append(size)
            await sending
            assert size == expected
            await asking
            assert before, "the other one had to wait to the end"

    rig.run(work)


def test_a_peer_that_does_not_read_stops_itself(rig: Rig) -> None:
    rig.put("default/blob/big", os.urandom(1 << 20))
    request = {"command": "Get Resource", "optional": {"resource_path": "default/blob/big"}}

    async def work() -> None:
        identity = new_guest(rig.platform)
        greedy = []
        for _ in range(4):
            stream = await rig.connect(identity)
            # Its window closes: nothing is taken from the socket any more.
            stream._link._hold()
            await stream.send(json.dumps(request).encode() * 20)
            greedy.append(stream)
        for _ in range(5):
            assert await served(rig) < 5
        buffered = sum(link.transport.get_write_buffer_size() for link in rig.door._server._active)
        assert buffered < 16 << 20  # not 4 * 20 MiB
        for stream in greedy:
            stream._link._release()
            stream.close()

    rig.run(work)


def test_one_that_vanishes_in_the_middle_of_everything(rig: Rig) -> None:
    async def vanish(after: bytes) -> None:
        stream = await rig.connect(identity)
        await stream.send(after)
        stream._link.transport.abort()

    async def work() -> None:
        request = b'{"command":"Get KEK","kids":["disk"]}'
        for after in (b"{", request, request * 50, request + b'{"command":'):
            await vanish(after)
        await served(rig)
        for _ in range(100):
            if rig.door.stats()["active"] + rig.door.stats()["silent"] == 0:
                break
            await asyncio.sleep(0.02)
        assert rig.door.stats()["active"] + rig.door.stats()["silent"] == 0

    identity = new_guest(rig.platform)
    rig.run(work)


def test_guessing_locks_the_guesser_out(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, limits={"failures": 5, "failure_window": 60.0, "lock_seconds": 60.0}) as rig:

        async def work() -> None:
            with closing(await rig.connect()) as stream:
                texts = []
                for index in range(8):
                    reply = await ask(stream, {"command": "Get KEK", "kids": [f"guess-{index}"]})
                    texts.append(json.loads(reply)["error"].partition(" (")[0])
                assert texts == ["not allowed"] * 5 + ["too many requests"] * 3
                reply = await ask(stream, {"command": "Get KEK", "kids": ["disk"]})
                assert json.loads(reply)["data"] == {}

        rig.run(work)
        assert len(rig.records(outcome="denied")) == 5


def test_who_is_locked_out_fills_no_audit_log(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, limits={"failures": 5, "lock_seconds": 60.0}) as rig:

        async def work() -> None:
            host, port = rig.address  # type: ignore[misc]
            for _ in range(50):
                reader, writer = await asyncio.open_connection(host, port)
                with suppress(OSError):
                    writer.write(b"GET / HTTP/1.1\r\n\r\n")
                    await reader.read()
                writer.close()
            with pytest.raises((AttestedTlsError, OSError)):
                await rig.connect()

        rig.run(work)
        assert len(rig.records()) == 5


def test_blobs_that_do_not_open_cost_one_record_each_version(rig: Rig) -> None:
    """A list of garbage under one key: the key is asked for once, its older versions once each."""
    for _ in range(3):
        rig.put("default/key/disk", os.urandom(32))
    blobs = [
        {
            "kid": "disk",
            "encrypted_data": base64.b64encode(os.urandom(40)).decode(),
            "algorithm": "AES",
            "key_length": 256,
            "iv": base64.b64encode(bytes(12)).decode(),
        }
        for _ in range(64)
    ]

    async def work() -> None:
        with closing(await rig.connect()) as stream:
            reply = json.loads(await ask(stream, {"command": "Decrypt", "blobs": blobs}))
            assert reply["status"] == "Fail"
            assert reply["error"].count("does not open") == 64

    rig.run(work)
    assert [record.resource_version for record in rig.records(action="unwrap")] == [4, 3, 2, 1]
    assert rig.store.resource(ResourcePath.parse("default/key/disk"), 1) is not None
