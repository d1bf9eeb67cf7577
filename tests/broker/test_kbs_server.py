"""The HTTP server under peers that are slow, silent, loud or no clients at all; TLS; that honest ones are served meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from broker.kbs_rig import Certificates, LoopThread

from csvfast.broker.config import Address
from csvfast.broker.kbs.asgi import Reply, read_body, send_reply
from csvfast.broker.kbs.metrics import Metrics
from csvfast.broker.kbs.server import HttpLimits, KbsServer, tls_context
from csvfast.errors import ArgumentError

QUICK = HttpLimits(
    connections=16, head_bytes=4096, headers=16, body_bytes=100_000, handshake_seconds=1, head_seconds=1, body_seconds=1,
    write_seconds=1, idle_seconds=1.5,
)  # fmt: skip


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says what it got. /early answers without reading, /large says much, /slow takes its time, /broken breaks."""
    path = scope["path"]
    if path == "/broken":
        raise ZeroDivisionError
    if path == "/slow":
        await asyncio.sleep(0.3)
    body = b"" if path == "/early" else await read_body(scope, receive, 1 << 22)
    peer = (scope.get("extensions") or {}).get("csvfast.peer")
    value = {"method": scope["method"], "path": path, "body": len(body), "peer": peer, "scheme": scope["scheme"]}
    reply = Reply(200, bytes(50 << 20), b"application/octet-stream") if path == "/large" else Reply.of(value)
    await send_reply(send, reply, "c0ffee")


class Rig:
    def __init__(self, limits: HttpLimits = QUICK, tls: ssl.SSLContext | None = None, loop: Any = None) -> None:
        self.thread = LoopThread() if loop is None else loop
        self.metrics = Metrics()
        self.server = KbsServer(echo, Address("127.0.0.1", 0), tls=tls, limits=limits, metrics=self.metrics)
        self.thread.run(self.server.start())
        self.port = self.server.address.port

    def close(self) -> None:
        self.thread.run(self.server.stop())
        assert not self.server._state.connections
        self.thread.close()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def ask(self, data: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(data)
            return everything(connection)


PATIENT = replace(QUICK, handshake_seconds=5, head_seconds=5)  # for TLS on a busy machine


def everything(connection: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def honest(rig: Rig) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
    with closing(connection):
        connection.request("GET", "/")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def gone_after(connection: socket.socket, least: float, most: float) -> bytes:
    start = time.monotonic()
    rest = everything(connection)
    took = time.monotonic() - start
    assert least <= took <= most, took
    return rest


def test_kept_alive(rig: Rig) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
    with closing(connection):
        for size in (0, 1, 70_000, 100_000, 5):
            connection.request("POST", "/x", bytes(size))
            first = connection.sock
            assert json.loads(connection.getresponse().read())["body"] == size
            assert connection.sock is first
        for _ in range(3):
            connection.request("POST", "/early", bytes(90_000))  # the body is thrown away
            assert json.loads(connection.getresponse().read())["body"] == 0
    assert rig.metrics.render().count(b"csvfast_connections_refused_total{") == 0


def test_nobody_speaks(rig: Rig) -> None:
    with rig.connect() as connection:
        assert gone_after(connection, 0.9, 4) == b""


def test_a_head_that_never_ends(rig: Rig) -> None:
    with rig.connect() as connection:
        start = time.monotonic()
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with suppress(OSError):
            while time.monotonic() - start < 8:
                connection.sendall(b"a: b\r\n")
                time.sleep(0.2)
        assert time.monotonic() - start < 5


def test_a_body_that_never_ends(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nabc")
        gone_after(connection, 0.9, 4)


def test_a_peer_that_does_not_read(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + 6
        while len(rig.server.table) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(rig.server.table) == 0


def test_idle_after_a_request(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in gone_after(connection, 1.2, 5)


def test_early_answer_then_idle(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        time.sleep(0.3)
        connection.sendall(b"0123456789")
        assert b"200 OK" in gone_after(connection, 0.5, 5)
    assert len(rig.server.table) == 0


def test_silent_connections_make_room(rig: Rig) -> None:
    silent = [rig.connect() for _ in range(60)]
    try:
        for _ in range(5):
            assert honest(rig)["path"] == "/"
        assert len(rig.server.table) <= QUICK.connections
    finally:
        for connection in silent:
            connection.close()
    assert b'reason="evicted"' in rig.metrics.render()


def test_idle_connections_make_room(rig: Rig) -> None:
    idle = []
    try:
        for _ in range(30):
            connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
            connection.request("GET", "/")
            assert connection.getresponse().read()
            idle.append(connection)
    finally:
        for connection in idle:
            connection.close()


def test_busy_connections_are_left_alone(rig: Rig) -> None:
    answers: list[bytes] = []
    busy = [threading.Thread(target=lambda: answers.append(rig.ask(b"GET /slow HTTP/1.0\r\n\r\n"))) for _ in range(16)]
    for thread in busy:
        thread.start()
    time.sleep(0.15)
    with rig.connect() as connection:
        assert gone_after(connection, 0, 0.2) == b""
    for thread in busy:
        thread.join(10)
    assert sum(b"200 OK" in answer for answer in answers) == 16


def status(answer: bytes) -> int:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert set(json.loads(body)) == {"type", "detail"}
    return int(head.split(b" ")[1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\na: " + b"b" * 5000, 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 5000 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 300_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 17 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 100001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + b"fff\r\n" + bytes(4095) + b"\r\n" + b"g\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + (b"fff\r\n" + bytes(4095) + b"\r\n") * 30, 413),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
        (b"\0\0\0\x18verdictd", 400),
        (b"CONNECT host:1 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na b: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: b\0c\r\n\r\n", 400),
        (b"G\xffT / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
    ],
    ids=lambda value: value[:20].decode("latin-1").encode("unicode_escape").decode() if isinstance(value, bytes) else "",
)  # fmt: skip
def test_refused(rig: Rig, data: bytes, expected: int) -> None:
    assert status(rig.ask(data)) == expected
    assert honest(rig)["path"] == "/"


CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 50_000, b"a: " + b"b" * 300_000], ids=["many", "long"])
def test_trailers_that_never_end(rig: Rig, trailers: bytes) -> None:
    assert status(rig.ask(CHUNKED + trailers)) == 431
    assert honest(rig)["path"] == "/"


def test_trailers_are_no_headers() -> None:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(scope, receive, 1 << 20)
        seen.extend(name for name, _value in scope["headers"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> bytes:
        async with KbsServer(app, Address("127.0.0.1", 0)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port)
            with closing(writer):
                writer.write(CHUNKED + b"cookie: kbs-session-id=0\r\nauthorization: Bearer x\r\n\r\n")
                return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)

    assert asyncio.run(ask()).startswith(b"HTTP/1.1 204")
    assert seen == [b"host", b"transfer-encoding"]


def test_many_requests_in_advance(rig: Rig) -> None:
    one = b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = rig.ask(one * 1000)
    assert answer.count(b"200 OK") <= 20
    with rig.connect() as connection:
        connection.sendall(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n" * 9 + b"GET /b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = everything(connection)
    assert answer.count(b'"/a"') == 9
    assert answer.count(b'"/b"') == 1


def test_defects_stay_inside(rig: Rig) -> None:
    answer = rig.ask(b"GET /broken HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"500" in answer.split(b"\r\n")[0]
    assert b"Zero" not in answer


def test_garbage(rig: Rig) -> None:
    choose = random.Random(5)
    pieces = [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"host: x", b"content-length: ", b"5", b"chunked", b"\0", b"\xff", b":"]
    for _ in range(150):
        data = b"".join(choose.choice(pieces) for _ in range(choose.randrange(1, 30))) + choose.randbytes(choose.randrange(3))
        with rig.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            everything(connection)
    assert honest(rig)["path"] == "/"
    time.sleep(0.1)
    assert len(rig.server.table) <= 1


def test_upgrade_is_not_spoken(rig: Rig) -> None:
    answer = rig.ask(
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade, close\r\nsec-websocket-key: x\r\n\r\n"
    )
    assert b"101" not in answer.split(b"\r\n")[0]


def test_stop_lets_requests_finish() -> None:
    rig = Rig()
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(rig.ask(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")))
    thread.start()
    with rig.connect() as silent:
        time.sleep(0.1)
        rig.close()
        assert everything(silent) == b""
    thread.join(10)
    assert b"200 OK" in answers[0]


# ---- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"), clients=True)


@pytest.fixture
def secure(certificates: Certificates) -> Iterator[Rig]:
    rig = Rig(PATIENT, tls_context(certificates.certificate, certificates.key, certificates.ca))
    yield rig
    rig.close()


def client_context(certificates: Certificates, *, identify: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    if identify:
        context.load_cert_chain(certificates.client, certificates.client_key)
    return context


def tls_ask(rig: Rig, context: ssl.SSLContext, count: int = 1) -> dict[str, Any]:
    connection = http.client.HTTPSConnection("127.0.0.1", rig.port, timeout=10, context=context)
    with closing(connection):
        for _ in range(count):
            connection.request("POST", "/", b"12345")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def test_tls(secure: Rig, certificates: Certificates) -> None:
    import hashlib

    answer = tls_ask(secure, client_context(certificates), 3)
    assert (answer["scheme"], answer["peer"], answer["body"]) == ("https", None, 5)
    for _ in range(10):
        answer = tls_ask(secure, client_context(certificates, identify=True))
        assert answer["peer"] == {"certificate_sha256": hashlib.sha256(certificates.client_der).hexdigest()}


def test_tls_client_of_another_ca(secure: Rig, certificates: Certificates, tmp_path: Path) -> None:
    others = Certificates(tmp_path)
    context = client_context(certificates)
    context.load_cert_chain(others.client, others.client_key)
    with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
        tls_ask(secure, context)


def test_tls_data_behind_the_handshake(secure: Rig, certificates: Certificates) -> None:
    # The last flight of the handshake and the request in one packet.
    for _ in range(20):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context(certificates).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with secure.connect() as connection:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))
            tls.write(b"GET /together HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            connection.sendall(outgoing.read())
            answer = b""
            while b"/together" not in answer:
                data = connection.recv(65536)
                assert data
                incoming.write(data)
                try:
                    answer += tls.read(65536)
                except ssl.SSLWantReadError:
                    continue


def test_tls_silence_and_garbage(secure: Rig, certificates: Certificates) -> None:
    silent = [secure.connect() for _ in range(40)]
    try:
        assert tls_ask(secure, client_context(certificates))["path"] == "/"
        assert len(secure.server.table) <= QUICK.connections
        gone_after(silent[-1], 0, 9)
    finally:
        for connection in silent:
            connection.close()
    for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), os.urandom(3000), b"\x16\x03\x01\xff\xff"):
        with secure.connect() as connection:
            connection.sendall(data)
            gone_after(connection, 0, 9)
    assert tls_ask(secure, client_context(certificates))["path"] == "/"


def test_tls_versions(secure: Rig, certificates: Certificates) -> None:
    context = client_context(certificates)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    assert tls_ask(secure, context)["path"] == "/"


# ---- Addresses


def test_plain_http_is_for_loopback() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(ArgumentError, match="without TLS"):
            KbsServer(echo, Address(host, 0))
        KbsServer(echo, Address(host, 0), insecure_http=True)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        KbsServer(echo, Address(host, 0))


def test_unix_socket(tmp_path: Path) -> None:
    async def check() -> bytes:
        path = tmp_path / "kbs.sock"
        async with KbsServer(echo, Address(path=path)) as server:
            assert path.stat().st_mode & 0o777 == 0o600
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /unix HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await writer.wait_closed()
            assert str(server.address) == f"unix:{path}"
        assert not path.exists()
        return answer

    assert b"/unix" in asyncio.run(check())


@pytest.mark.parametrize("encrypted", [False, True])
def test_uvloop(certificates: Certificates, encrypted: bool) -> None:
    uvloop = pytest.importorskip("uvloop")
    thread = LoopThread.__new__(LoopThread)
    thread.loop = uvloop.new_event_loop()
    thread._thread = threading.Thread(target=thread.loop.run_forever, daemon=True)
    thread._thread.start()
    tls = tls_context(certificates.certificate, certificates.key, certificates.ca) if encrypted else None
    rig = Rig(PATIENT, tls, thread)
    try:
        for _ in range(10):
            if encrypted:
                assert tls_ask(rig, client_context(certificates, identify=True), 3)["peer"] is not None
            else:
                assert honest(rig)["path"] == "/"
        silent = [rig.connect() for _ in range(30)]
        answer = tls_ask(rig, client_context(certificates)) if encrypted else honest(rig)
        assert answer["path"] == "/"
        gone_after(silent[-1], 0, 9)
        for connection in silent:
            connection.close()
    finally:
        rig.close()
