"""An answer that a dying broker did not finish is no answer: least of all a shorter key."""

from __future__ import annotations

import socket
import threading

import pytest

from csvfast.broker.clients.http import HttpConnection
from csvfast.errors import CsvfastError, UnavailableError


def answered(data: bytes) -> HttpConnection:
    """A connection whose server answers with `data` and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as peer:
            peer.settimeout(10)
            peer.recv(65536)
            peer.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return HttpConnection(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)


def test_whole() -> None:
    with answered(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nwhol") as connection:
        assert connection.request("GET", "/").body == b"whol"


def test_the_last_answer() -> None:
    """http.client closes the socket before the body has been read."""
    for length in (4, 300_000):
        head = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % length
        with answered(head + bytes(length)) as connection:
            answer = connection.request("GET", "/")
            assert (answer.status, len(answer.body)) == (413, length)


@pytest.mark.parametrize("body", [b"", b"w", b"who"])
def test_cut_off(body: bytes) -> None:
    with (
        answered(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n" + body) as connection,
        pytest.raises(UnavailableError, match=f"cut off, {4 - len(body)} bytes are missing"),
    ):
        connection.request("GET", "/")


@pytest.mark.parametrize("body", [b"", b"4\r\nwh", b"4\r\nwhol\r\n"])
def test_cut_off_in_chunks(body: bytes) -> None:
    with (
        answered(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body) as connection,
        pytest.raises(CsvfastError, match="IncompleteRead"),
    ):
        connection.request("GET", "/")
