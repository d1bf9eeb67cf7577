"""HTTP to a broker with the standard library: TLS by a CA or a pinned certificate, deadlines, bounded answers.

Thread-safety: a connection belongs to one thread at a time.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from csvfast.errors import ArgumentError, AttestedTlsError, RequestError, UnavailableError

__all__ = ["Answer", "HttpConnection", "Tls"]

ANSWER_LIMIT: Final = 8 << 20
"""Bytes of an answer."""

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}\Z")
_CHUNK: Final = 64 << 10


class Tls(NamedTuple):
    """How the broker proves who it is, and the client who he is.

    ca            file of CA certificates; None: those of the system
    pin           SHA-256 of the broker's certificate (DER), hexadecimal: this one and no other, no CA and no name needed
    certificate   the client's certificate and, in the same file or in `key`, its private key
    """

    ca: Path | None = None
    pin: str | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """OSError, ssl.SSLError."""
        context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.pin is not None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


class Answer(NamedTuple):
    """A whole answer; names of headers in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class HttpConnection:
    """Requests to one broker, over one connection while that lasts. A context manager.

    In: url        http://host[:port] or https://host[:port]
        tls        for https
        insecure   plain HTTP to other machines, too
        timeout    seconds for one request and its answer
    ArgumentError: no such URL, or plain HTTP to another machine.
    """

    def __init__(self, url: str, *, tls: Tls | None = None, insecure: bool = False, timeout: float = 60.0) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.username or parts.query:
            raise ArgumentError(f"{ascii(url)[:80]}: expected http://host[:port] or https://host[:port]")
        if parts.path.strip("/"):
            raise ArgumentError(f"{ascii(url)[:80]}: expected a URL without a path")
        self.host: Final = parts.hostname
        self.port: Final = port or (443 if parts.scheme == "https" else 80)
        self._tls = tls or Tls()
        self._context = self._tls.context() if parts.scheme == "https" else None
        if self._context is None and not insecure and not _is_loopback(self.host):
            raise ArgumentError(f"{ascii(url)[:80]}: without TLS to another machine; expected https")
        if self._tls.pin is not None and not _FINGERPRINT.match(self._tls.pin):
            raise ArgumentError("pin: expected 64 lower-case hexadecimal digits")
        self.timeout: Final = timeout
        self._connection: http.client.HTTPConnection | None = None

    def request(
        self, method: str, path: str, body: bytes | memoryview | None = None, headers: Mapping[str, str] | None = None,
        *, repeatable: bool = True, limit: int = ANSWER_LIMIT, timeout: float | None = None,
    ) -> Answer:  # fmt: skip
        """Sends a request and reads the answer.

        In: repeatable   when a connection that was kept alive turns out to be closed, try again over a new one
            limit        bytes of the answer
            timeout      seconds; the connection's unless told
        UnavailableError: no connection, no answer in time. AttestedTlsError: another certificate. RequestError: no HTTP.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        kept = self._connection is not None and repeatable
        if not repeatable:
            self.close()
        try:
            return self._once(method, path, body, headers or {}, limit, deadline)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            if not kept:
                raise self._unavailable(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from None
        try:
            return self._once(method, path, body, headers or {}, limit, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.close()

    def __enter__(self) -> HttpConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _once(
        self, method: str, path: str, body: bytes | memoryview | None, headers: Mapping[str, str], limit: int, deadline: float
    ) -> Answer:
        connection = self._connection or self._connect(deadline)
        sock: socket.socket = connection.sock
        sock.settimeout(_left(deadline))
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        chunks, size = [], 0
        while size <= limit:
            if response.isclosed():  # all of it is here, and the socket, too, is closed when the server has asked for that
                break
            sock.settimeout(_left(deadline))
            chunk = response.read(_CHUNK)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        else:
            self.close()
            raise RequestError(f"answer of more than {limit} bytes")
        if response.length:
            # http.client says nothing about it when a body is read in pieces, and the beginning of a key is no key.
            raise ConnectionAbortedError(f"the answer was cut off, {response.length} bytes are missing")
        found = {name.lower(): value for name, value in response.getheaders()}
        if response.will_close:
            self.close()
        return Answer(response.status, b"".join(chunks), found)

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_left(deadline))
        connection.connect()
        if self._context is not None:
            plain = connection.sock
            try:
                secured = self._context.wrap_socket(plain, server_hostname=self.host)
            except BaseException:
                plain.close()
                raise
            connection.sock = secured
            der = secured.getpeercert(binary_form=True) or b""
            if self._tls.pin is not None and not hmac.compare_digest(hashlib.sha256(der).hexdigest(), self._tls.pin):
                connection.close()
                raise AttestedTlsError("certificate", f"{self.host}:{self.port} shows another certificate than the pinned one")
        self._connection = connection
        return connection

    def _failed(self, error: OSError | http.client.HTTPException) -> Exception:
        self.close()
        if isinstance(error, (AttestedTlsError, UnavailableError)):
            return error
        if isinstance(error, ssl.SSLCertVerificationError):
            return AttestedTlsError("certificate", f"{self.host}:{self.port}: {error.verify_message}")
        if isinstance(error, http.client.HTTPException):
            return RequestError(f"{self.host}:{self.port}: no HTTP answer ({type(error).__name__})")
        return self._unavailable(error)

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"{self.host}:{self.port}: {str(error) or type(error).__name__}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
