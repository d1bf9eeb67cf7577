"""moto's server, a process of its own, and a TCP proxy before it that cuts connections and puts words into the server's mouth."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Proxy", "S3Server"]

EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message>"
    b"<Token-0>SECRETTOKEN</Token-0><RequestId>1</RequestId></Error>"
)

SIGNATURE = "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class S3Server:
    """Buckets and objects are put with plain requests: moto asks nobody for signatures until it is told to."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            else:
                break

    def put(self, path: str, data: bytes = b"") -> None:
        self._request("PUT", path, data)

    def delete(self, path: str) -> None:
        self._request("DELETE", path)

    def check_credentials(self, *, after: str) -> None:
        """From now on moto refuses keys that it did not give, after so many requests ("inf": never)."""
        self._request("POST", "moto-api/reset-auth", after.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(30)

    def _request(self, method: str, path: str, data: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, f"/{path}", data, {"Authorization": SIGNATURE, "Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        assert answer.status < 300, answer.read()
        connection.close()


class Proxy:
    """Passes bytes on to a port.

    cut_after: a connection is reset once so many bytes of answers have come through it; `cuts` more connections are cut.
    expired: every request from now on is answered in the server's place: the token has expired.
    resets: connections that were cut. passed: bytes of answers.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut_after = 0
        self.cuts = 0
        self.resets = 0
        self.passed = 0
        self.expired = False
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._begin(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in list(self._live):
            _end(one)
        for thread in self._threads:
            thread.join(10)

    def _begin(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.expired:
                self._begin(self._refuse, client)
                continue
            server = socket.create_connection(("127.0.0.1", self.target), 10)
            self._live |= {client, server}
            self._begin(self._requests, client, server)
            self._begin(self._answers, client, server)

    def _refuse(self, client: socket.socket) -> None:
        with client:
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(65536)
            body = b"" if request.startswith(b"HEAD") else EXPIRED
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                if self.expired:  # of a connection that is there already
                    break
                server.sendall(data)
        except OSError:
            pass
        _end(server)
        _end(client) if self.expired else None

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        came, cut = 0, False
        try:
            while data := server.recv(65536):
                came += len(data)
                with self._lock:
                    cut = self.cuts > 0 and came > self.cut_after
                    self.cuts -= cut
                    self.resets += cut
                    self.passed += len(data)
                if cut:
                    client.sendall(data[: len(data) // 2])
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no end
                    client.shutdown(socket.SHUT_RD)  # the other thread lets go of it
                    break
                client.sendall(data)
        except OSError:
            pass
        finally:
            self._live -= {client, server}
            _end(client) if not cut else None
            client.close()
            _end(server)
            server.close()


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
