"""The wire between host and agent: requests, streams with credits, and what a hostile other side may send."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from csvfast.errors import ContainerError, ImageError
from csvfast.runtime.protocol import BODY_MAX, HEADER, WINDOW, Connection, Frame, decode_object


def handler(method: str, parameters: dict[str, Any]) -> Mapping[str, Any] | None:
    if method == "Echo":
        return parameters
    if method == "Sleep":
        time.sleep(parameters["seconds"])
        return None
    if method == "Image":
        raise ImageError("layer 1", "a wrong digest")
    if method == "Large":
        return {"text": "x" * (BODY_MAX + 1)}
    if method == "Defect":
        raise KeyError("what")
    raise ContainerError("policy", f"{method} is not allowed")


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    """Host, agent."""
    left, right = socket.socketpair()
    with Connection(left.detach(), name="host") as host, Connection(right.detach(), handler, name="agent") as agent:
        yield host, agent


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare socket, and an agent at its other end."""
    left, right = socket.socketpair()
    left.settimeout(10)
    with left, Connection(right.detach(), handler) as agent:
        yield left, agent


def test_requests(ends: tuple[Connection, Connection]) -> None:
    host, _ = ends
    assert host.request("Echo", {"a": [1, "ü", None]}, 10) == {"a": [1, "ü", None]}
    assert host.request("Sleep", {"seconds": 0}, 10) == {}
    for method, kind, text in (
        ("Other", "policy", "Other is not allowed"),
        ("Image", "state", "ImageError: layer 1: a wrong digest"),
        ("Defect", "state", "KeyError: 'what'"),
        ("Large", "limit", "the reply to Large"),
    ):
        with pytest.raises(ContainerError, match=text) as refused:
            host.request(method, {}, 10)
        assert refused.value.kind == kind
    assert host.request("Echo", {"still": "there"}, 10) == {"still": "there"}


def test_requests_do_not_wait_for_each_other(ends: tuple[Connection, Connection]) -> None:
    host, _ = ends
    slow = threading.Thread(target=host.request, args=("Sleep", {"seconds": 0.5}))
    slow.start()
    begun = time.monotonic()
    host.request("Echo", {}, 10)
    assert time.monotonic() - begun < 0.4
    slow.join(10)


def test_waiting_for_the_last_reply(ends: tuple[Connection, Connection]) -> None:
    host, agent = ends
    assert agent.wait_idle(0)
    slow = threading.Thread(target=host.request, args=("Sleep", {"seconds": 0.2}))
    slow.start()
    while agent.wait_idle(0) and slow.is_alive():
        time.sleep(0.001)
    assert not agent.wait_idle(0.01)
    assert agent.wait_idle(10)
    slow.join(10)


def test_too_many_requests(ends: tuple[Connection, Connection]) -> None:
    host, _ = ends
    kinds: list[str] = []

    def ask() -> None:
        try:
            host.request("Sleep", {"seconds": 0.5}, 10)
            kinds.append("done")
        except ContainerError as refused:
            kinds.append(refused.kind)

    threads = [threading.Thread(target=ask) for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert kinds.count("limit") >= 1
    assert kinds.count("done") >= 64


def test_no_answer(ends: tuple[Connection, Connection]) -> None:
    host, agent = ends
    with pytest.raises(ContainerError, match=r"no answer to Sleep in 0\.05 s"):
        host.request("Sleep", {"seconds": 0.2}, 0.05)
    with pytest.raises(ContainerError, match="limit: request Echo"):
        host.request("Echo", {"x": "y" * BODY_MAX})
    threading.Timer(0.1, agent.close).start()
    with pytest.raises(ContainerError, match="protocol: the connection ended during Sleep"):
        host.request("Sleep", {"seconds": 1}, 10)
    assert host.wait_closed(10)
    assert host.problem is None
    with pytest.raises(ContainerError, match="ended"):
        host.request("Echo", {}, 10)


def test_stream_with_credits(ends: tuple[Connection, Connection]) -> None:
    host, agent = ends
    data = os.urandom(3 << 20)
    writer = agent.writer(Frame.STDOUT, 7)
    done = threading.Event()

    def write() -> None:
        writer.write(data)
        writer.close()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert not done.wait(0.2), "the writer waits for its reader"
    reader = host.reader(Frame.STDOUT, 7)
    assert reader._waiting == WINDOW
    assert host.request("Echo", {"beside": 1}, 10) == {"beside": 1}
    got = bytearray()
    while chunk := reader.read(10_000, 10):
        assert len(chunk) <= 10_000
        got += chunk
    thread.join(10)
    assert got == data
    assert reader.read() == b"", "the end stays the end"


def test_reader_that_leaves(ends: tuple[Connection, Connection]) -> None:
    host, agent = ends
    writer = agent.writer(Frame.STDERR, 1)
    writer.write(b"abc")
    reader = host.reader(Frame.STDERR, 1)
    assert reader.read() == b"abc"
    with pytest.raises(TimeoutError):
        reader.read(timeout=0.05)
    reader.close()
    reader.close()
    assert reader.read() == b""
    with pytest.raises(BrokenPipeError):
        writer.write(bytes(2 * WINDOW), 10)
    writer.close()


def test_writer_that_waits_for_nobody(ends: tuple[Connection, Connection]) -> None:
    host, agent = ends
    writer = host.writer(Frame.STDIN, 1)
    assert host.writer(Frame.STDIN, 1) is writer
    with pytest.raises(TimeoutError):
        writer.write(bytes(2 * WINDOW), 0.05)
    threading.Timer(0.1, agent.close).start()
    with pytest.raises(BrokenPipeError):
        writer.write(b"x", 10)
    writer.close()
    with pytest.raises(ContainerError, match="is no stream"):
        host.writer(Frame.EVENT, 1)


def test_events() -> None:
    left, right = socket.socketpair()
    got: list[dict[str, Any]] = []
    with Connection(left.detach(), on_event=got.append) as host, Connection(right.detach(), handler) as agent:
        agent.send_event({"event": "started"})
        agent.close()
        assert host.wait_closed(10)
    assert got == [{"event": "started"}]


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(BODY_MAX + 1, 1, 0, 1),
        HEADER.pack(0, 0, 0, 1),
        HEADER.pack(0, 8, 0, 1),
        HEADER.pack(0, 1, 1, 1),
        HEADER.pack(3, 7, 0, 1) + b"abc",
        HEADER.pack(3, 6, 0, 0) + b"[1]",
        HEADER.pack(3, 2, 0, 0) + b"abc",
        HEADER.pack(10, 3, 0, 0) + b"abc",
        (HEADER.pack(CHUNK := 1 << 16, 3, 0, 1) + bytes(CHUNK)) * 5,
        HEADER.pack(0, 3, 0, 1) * 2,
        b"".join(HEADER.pack(1, 3, 0, number) + b"x" for number in range(1100)),
    ],
    ids=["length", "type 0", "type 8", "reserved", "window", "event", "reply", "cut", "no credit", "after the end", "streams"],
)
def test_hostile_frames_end_the_connection(raw: tuple[socket.socket, Connection], sent: bytes) -> None:
    peer, agent = raw
    peer.sendall(sent)
    peer.shutdown(socket.SHUT_WR)
    assert agent.wait_closed(10)
    assert agent.problem


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"method":1}', b'{"method":"Echo","parameters":[]}', b'{"method":"Echo","method":"Echo"}', b"[" * 9**5,
     b'{"method":"Echo","parameters":{"x":NaN}}', b"\xff", b'{"method":"Echo","parameters":{},"more":1}'],
)  # fmt: skip
def test_garbled_requests_are_answered(raw: tuple[socket.socket, Connection], body: bytes) -> None:
    peer, _ = raw
    peer.sendall(HEADER.pack(len(body), 1, 0, 5) + body)
    head = peer.recv(HEADER.size, socket.MSG_WAITALL)
    length, kind, _, tag = HEADER.unpack(head)
    reply = decode_object(peer.recv(length, socket.MSG_WAITALL), "reply")
    assert (kind, tag, reply["error"]["kind"]) == (2, 5, "protocol")


def test_peer_that_never_reads(raw: tuple[socket.socket, Connection]) -> None:
    peer, agent = raw
    peer.settimeout(60)
    request = b'{"method":"Echo","parameters":{"x":"' + b"y" * 1_000_000 + b'"}}'
    frame = HEADER.pack(len(request), 1, 0, 1) + request
    frames = memoryview(frame * 100)
    with pytest.raises(OSError, match=r"(Broken pipe|reset by peer)"):
        peer.sendall(frames)
    assert agent.wait_closed(10)
    assert agent.problem == "the other side does not read"


def test_tiny_frames_take_no_more_memory_than_large_ones(raw: tuple[socket.socket, Connection]) -> None:
    left, agent = raw
    left.sendall((HEADER.pack(1, Frame.STDIN, 0, 7) + b"x") * WINDOW)
    reader = agent.reader(Frame.STDIN, 7)
    with agent.changed:
        assert agent.changed.wait_for(lambda: reader._waiting == WINDOW, 30)
    assert len(reader._chunks) <= WINDOW // 2048
    got = 0
    while got < WINDOW:
        got += len(chunk := reader.read(timeout=10))
        assert set(chunk) == {ord("x")}


def test_what_the_other_side_says_is_printable() -> None:
    left, right = socket.socketpair()
    with left, Connection(right.detach()) as host:

        def answer() -> None:
            left.recv(1000)
            body = b'{"error": {"kind": "st\\u001bate", "message": "gone\\u001b[2J\\ncsvfast: all is well\\u202e"}}'
            left.sendall(HEADER.pack(len(body), Frame.REPLY, 0, 1) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ContainerError) as refused:
            host.request("Any", {}, 10)
        thread.join(10)
    assert (refused.value.kind, refused.value.problem) == ("st?ate", "gone?[2J?csvfast: all is well?")
