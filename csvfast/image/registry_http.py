"""HTTP for registries with the standard library: connections that are kept, redirects within bounds, peers that may be hostile.

    connection kept alive   used by one request at a time, and closed when its answer has not been read to the end
    headers, small bodies   must be there within the timeout, however slowly they drip
    blobs                   must move: less than 64 KiB in a timeout's seconds of waiting ends them
    redirects               at most five; never from https to http; the Authorization header stays with the host it is for

Source: RFC 9110, RFC 9112; opencontainers/distribution-spec spec.md.
Thread-safety: Transport from several threads; an answer belongs to one thread at a time.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from csvfast.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["Answer", "Transport", "Url", "is_loopback"]

REDIRECT_LIMIT: Final = 5
LEAST_BYTES: Final = 64 << 10
"""Of a blob, in `timeout` seconds of waiting."""
FRAMING_BYTES: Final = 1 << 20
"""On the wire for one read of a body, beyond sixteen for each of its bytes: sizes of chunks, and trailers, need not end."""
URL_LIMIT: Final = 16 << 10

_BUFFER: Final = 64 << 10
_IDLE_LIMIT: Final = 4
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class Url(NamedTuple):
    """A checked URL.

    scheme   http or https
    host     without brackets
    target   path and query
    """

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str, subject: str) -> Url:
        """RegistryError: no URL of http or https, one with a user's name in it, one with control characters."""
        try:
            if len(text) > URL_LIMIT or not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError
            parts: SplitResult = urlsplit(text)
            port = parts.port or _PORTS[parts.scheme]
            if not parts.hostname or parts.username is not None or parts.password is not None:
                raise ValueError
        except (ValueError, KeyError):
            raise RegistryError(subject, f"the registry names {ascii(text)[:80]}; expected a URL of http or https") from None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, parts.hostname, port, target)

    def join(self, location: str, subject: str) -> Url:
        """What a Location header in an answer from here means. RegistryError."""
        if len(location) > URL_LIMIT:
            raise RegistryError(subject, "the registry names a location that is too long; expected a URL")
        with suppress(ValueError):  # a bracket without its other half: parse() says what is expected
            location = urljoin(str(self), location)
        return Url.parse(location, subject)

    def with_query(self, query: str) -> Url:
        """The same with more in its query."""
        return self._replace(target=f"{self.target}{'&' if '?' in self.target else '?'}{query}")

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: whom credentials are for."""
        return self[:3]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target}"


class _Patience:
    """How long a peer may take over an answer."""

    __slots__ = ("_allowed", "_received", "_waited", "deadline", "timeout")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.deadline: float | None = None
        self._waited = 0.0
        self._received = 0
        self._allowed: float = math.inf

    def start(self) -> None:
        """From now on, everything within the timeout."""
        self.deadline = time.monotonic() + self.timeout
        self._allowed = math.inf

    def allow(self, count: int) -> None:
        """From now on, no more on the wire than that many bytes of a body need."""
        self._allowed = 16 * count + FRAMING_BYTES

    def stream(self) -> None:
        """From now on, it must only move."""
        self.deadline = None
        self._waited, self._received = 0.0, 0

    def left(self) -> float:
        if self.deadline is None:
            return self.timeout
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self.timeout:g} seconds")
        return left

    def waited(self, seconds: float, count: int) -> None:
        self._waited += seconds
        self._received += count
        self._allowed -= count
        if self._allowed < 0:
            raise ConnectionAbortedError("chunks or trailers without end")
        if self._waited > self.timeout:
            if self.deadline is None and self._received < LEAST_BYTES:
                raise TimeoutError(f"{self._received} bytes in {self.timeout:g} seconds")
            self._waited, self._received = 0.0, 0


class _Raw(io.RawIOBase):
    """What http.client reads from."""

    def __init__(self, sock: socket.socket, patience: _Patience) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=0)  # holds the socket open until it is closed itself
        self._patience = patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._sock.settimeout(self._patience.left())
        before = time.monotonic()
        count = self._file.readinto(buffer) or 0
        self._patience.waited(time.monotonic() - before, count)
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Socket:
    """What http.client takes for a socket."""

    def __init__(self, sock: socket.socket, patience: _Patience) -> None:
        self._sock = sock
        self._patience = patience

    def makefile(self, _mode: str, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self._sock, self._patience), _BUFFER)

    def sendall(self, data: Buffer) -> None:
        self._sock.settimeout(self._patience.left())
        self._sock.sendall(data)

    def close(self) -> None:
        self._sock.close()


class _Connection(http.client.HTTPConnection):
    """One connection, whose socket keeps the peer to its time."""

    def __init__(self, url: Url, tls: ssl.SSLContext | None, timeout: float) -> None:
        super().__init__(url.host, url.port)
        self.patience: Final = _Patience(timeout)
        self._tls = tls
        if url.scheme == "https":
            self.default_port = 443  # for the Host header

    def connect(self) -> None:
        sock = socket.create_connection((self.host, self.port), self.patience.left())
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock.settimeout(self.patience.left())
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock = cast(Any, _Socket(sock, self.patience))


class _Request(NamedTuple):
    method: str
    url: Url
    headers: Mapping[str, str]
    body: bytes | memoryview | None


class Answer:
    """An answer whose body is still to be read. A context manager; closing it early costs the connection.

    status    of HTTP
    url       where it came from, after redirects
    """

    def __init__(self, transport: Transport, connection: _Connection, response: http.client.HTTPResponse, url: Url) -> None:
        self._transport = transport
        self._connection = connection
        self._response = response
        self._closed = False
        self.status: Final = response.status
        self.url: Final = url

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return self._response.headers.get(name)

    def headers(self, name: str) -> list[str]:
        """All headers of that name."""
        return self._response.headers.get_all(name) or []

    @property
    def length(self) -> int | None:
        """Bytes of the body that are still to come; None: nobody knows."""
        return self._response.length

    def stream(self) -> None:
        """The body is a long one: it may take its time as long as it moves."""
        self._connection.patience.stream()

    def readinto(self, buffer: Buffer) -> int:
        """Next bytes of the body; 0 at the end. ConnectionAbortedError: it was cut off. OSError, http.client.HTTPException."""
        self._connection.patience.allow(memoryview(buffer).nbytes)
        count = self._response.readinto(cast(Any, buffer))
        if not count and self._response.length:
            # http.client says nothing about it when a body is read in pieces.
            raise ConnectionAbortedError(f"the answer was cut off, {self._response.length} bytes are missing")
        return count

    def body(self, limit: int, subject: str) -> bytes:
        """The whole body. RegistryError: more than `limit` bytes. OSError, http.client.HTTPException."""
        data, buffer = bytearray(), memoryview(bytearray(min(limit + 1, _BUFFER)))
        while len(data) <= limit and (count := self.readinto(buffer)):
            data += buffer[:count]
        if len(data) > limit:
            self.close()
            raise RegistryError(subject, f"an answer of more than {limit} bytes", status=self.status)
        return bytes(data)

    def close(self) -> None:
        """May be called twice."""
        if not self._closed:
            self._closed = True
            whole = self._response.isclosed() and not self._response.will_close
            self._response.close()
            self._transport.give_back(self._connection, self.url.origin, whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Transport:
    """Sends requests. A context manager.

    In: tls           for https; None: the system's CAs
        timeout       seconds
        may_be_plain  whether http is allowed to a host
    """

    def __init__(self, *, tls: ssl.SSLContext | None, timeout: float, may_be_plain: Callable[[str], bool]) -> None:
        self._tls = tls
        self._timeout = timeout
        self._may_be_plain = may_be_plain
        self._idle: dict[tuple[str, str, int], list[_Connection]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def send(
        self, method: str, url: Url, headers: Mapping[str, str], body: bytes | memoryview | None = None,
        *, subject: str, repeatable: bool = True, redirects: int = 0,
    ) -> Answer:  # fmt: skip
        """One request and the beginning of its answer.

        In: repeatable   may be sent again over a new connection when a kept one turns out to be closed
            redirects    how many are followed
        RegistryError: a redirect that is not followed, http where it is not allowed, what is no HTTP.
        OSError: no connection, no answer.
        """
        headers = dict(headers)
        for _ in range(redirects + 1):
            if url.scheme == "http" and not self._may_be_plain(url.host):
                raise RegistryError(subject, f"http to {url.host} is not allowed; expected https, or plain HTTP by configuration")
            answer = self._send(_Request(method, url, headers, body), subject, repeatable)
            location = answer.header("Location")
            if answer.status not in _REDIRECTS or not redirects or location is None:
                return answer
            answer.close()
            target = url.join(location, subject)
            if url.scheme == "https" and target.scheme == "http":
                raise RegistryError(subject, f"the registry leads from https to http ({target.host}); that is not followed")
            if target.origin != url.origin:
                headers.pop("Authorization", None)
            url = target
        raise RegistryError(subject, f"more than {redirects} redirects", status=answer.status)

    def close(self) -> None:
        """Closes the idle connections; those in use are closed with their answers."""
        with self._lock:
            self._closed = True
            idle = [one for some in self._idle.values() for one in some]
            self._idle.clear()
        for one in idle:
            one.close()

    def give_back(self, connection: _Connection, origin: tuple[str, str, int], whole: bool) -> None:
        """For answers: a connection that another request may use, when it is `whole`."""
        with self._lock:
            kept = self._idle.setdefault(origin, [])
            if whole and not self._closed and len(kept) < _IDLE_LIMIT:
                kept.append(connection)
                return
        with suppress(OSError):
            connection.close()

    def _send(self, request: _Request, subject: str, repeatable: bool) -> Answer:
        origin = request.url.origin
        while repeatable:
            with self._lock:
                kept = self._idle.get(origin)
                connection = kept.pop() if kept else None
            if connection is None:
                break
            with suppress(http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
                return self._exchange(connection, request, subject)
        if request.url.scheme == "https" and self._tls is None:
            self._tls = _default_tls()  # only then: reading all of the system's CAs takes a while
        tls = self._tls if request.url.scheme == "https" else None
        return self._exchange(_Connection(request.url, tls, self._timeout), request, subject)

    def _exchange(self, connection: _Connection, request: _Request, subject: str) -> Answer:
        url = request.url
        connection.patience.start()
        try:
            try:
                connection.request(request.method, url.target, request.body, {"Accept-Encoding": "identity", **request.headers})
            except (BrokenPipeError, ConnectionResetError):
                # A server that has heard enough of a body may have said why before it closed.
                if request.body is None:
                    raise
            response = connection.getresponse()
        except http.client.RemoteDisconnected:  # an OSError, too
            connection.close()
            raise
        except http.client.HTTPException as error:
            connection.close()
            raise RegistryError(subject, f"{url.host}:{url.port} gives no HTTP answer ({type(error).__name__})") from None
        except BaseException:
            connection.close()
            raise
        encoding = response.headers.get("Content-Encoding", "identity")
        answer = Answer(self, connection, response, url)
        if encoding.lower() != "identity":
            answer.close()
            raise RegistryError(subject, f"Content-Encoding {ascii(encoding)[:40]}; expected none", status=response.status)
        return answer


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _default_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
