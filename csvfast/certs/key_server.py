"""Client of Hygon's key server, used only by who makes one.

    GET https://cert.hygon.cn/hsk_cek?snumber=<chip id>   HSK||CEK, 2916 bytes    (trustee, rats-tls, librats, devkit)
    GET https://cert.hygon.cn/hrk                         HRK, 832 bytes          (devkit, rats-tls)

What arrives is hostile until it is verified: the answer must have exactly the expected length, redirects are refused, one
deadline holds for the whole exchange, and the certificates must hang from a root the caller trusts. A CEK does not carry the
chip id: that the server sent the certificate of the chip that was asked for shows only when the CEK verifies that chip's PEK.

TLS is verified with the system's certification authorities. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from csvfast.certs.bundle import parse_bundle
from csvfast.certs.chain import CertificateChain, verify_chain, verify_root
from csvfast.certs.chip_id import checked_chip_id
from csvfast.certs.flight import SingleFlight
from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CaCertificate, CsvCertificate
from csvfast.certs.roots import fingerprint, hygon_root
from csvfast.errors import ArgumentError, CsvfastError, FormatError, VerificationError

__all__ = ["DEFAULT_URL", "KeyServerClient", "KeyServerError"]

DEFAULT_URL: Final = "https://cert.hygon.cn"

_LOCAL: Final = ("localhost", "127.0.0.1", "::1")


class KeyServerError(CsvfastError, OSError):
    """The key server could not be asked or gave no certificates: unreachable, too slow, not trusted, or another answer."""


class KeyServerClient:
    """Asks a key server. Thread-safe: threads that ask for the same chip at the same time share one request.

    In: base_url    https; http only with allow_http=True and for this machine itself
        timeout     seconds for a whole exchange with all addresses of the host (resolving its name is the system's and can take
                    longer, but then nobody is asked any more)
        roots       what the answers must hang from; None = Hygon's root
        context     TLS settings; None = the system's authorities
    Raises ArgumentError.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        timeout: float = 10.0,
        *,
        roots: Sequence[CaCertificate] | None = None,
        context: ssl.SSLContext | None = None,
        allow_http: bool = False,
    ) -> None:
        shown = f"key server URL {base_url!r}" if "@" not in base_url else "key server URL with a user name"  # or a password
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError as error:
            raise ArgumentError(f"{shown}: {error}") from None
        host = parts.hostname
        if not host or parts.query or parts.fragment or parts.username is not None or not _is_plain(base_url):
            raise ArgumentError(f"{shown}: expected https://HOST[:PORT][/PATH]")
        if parts.scheme != "https" and not (parts.scheme == "http" and allow_http and host in _LOCAL):
            raise ArgumentError(f"{shown}: expected https (http only for this machine, and when allowed)")
        if not (math.isfinite(timeout) and timeout > 0):
            raise ArgumentError(f"timeout: {timeout}; expected seconds, more than 0")
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self._host, self._port = host, port
        self._path = parts.path.rstrip("/")
        self._roots = None if roots is None else tuple(roots)
        self._context = (context or ssl.create_default_context()) if parts.scheme == "https" else None
        self._pairs: SingleFlight[tuple[CaCertificate, CsvCertificate]] = SingleFlight()
        self._root_flight: SingleFlight[CaCertificate] = SingleFlight()

    def hsk_cek(self, chip_id: str) -> tuple[CaCertificate, CsvCertificate]:
        """HSK and CEK of a chip, verified up to a trusted root.

        Raises KeyServerError; FormatError for a chip id that cannot be one; VerificationError for certificates that are not
        genuine.
        """
        checked_chip_id(chip_id)
        path = f"/hsk_cek?snumber={chip_id}"
        return self._pairs.run(path, lambda: self._fetch_pair(path))

    def hrk(self) -> CaCertificate:
        """The root as the server has it; it must be one of the trusted roots. Raises as hsk_cek does."""
        return self._root_flight.run("/hrk", lambda: self._fetch_root("/hrk"))

    def _fetch_pair(self, path: str) -> tuple[CaCertificate, CsvCertificate]:
        data = self._get(path, CA_BYTES + CSV_BYTES)
        try:
            bundle = parse_bundle(data)
        except FormatError as error:
            raise KeyServerError(f"{self.base_url}{path}: the key server answered no certificates: {error}") from None
        if bundle.hsk is None or bundle.cek is None:
            found = " and ".join(bundle.certificates())
            raise KeyServerError(f"{self.base_url}{path}: the key server answered {found}; expected HSK and CEK")
        verify_chain(CertificateChain(hsk=bundle.hsk, cek=bundle.cek), self._roots)
        return bundle.hsk, bundle.cek

    def _fetch_root(self, path: str) -> CaCertificate:
        data = self._get(path, CA_BYTES)
        try:
            root = CaCertificate.parse(data)
        except FormatError as error:
            raise KeyServerError(f"{self.base_url}{path}: the key server answered no certificate: {error}") from None
        if root not in (self._roots if self._roots is not None else (hygon_root(),)):
            raise VerificationError("HRK", f"the key server's root {fingerprint(root)} is not trusted")
        verify_root(root)
        return root

    def _get(self, path: str, length: int) -> bytes:
        url = f"{self.base_url}{path}"
        connection = _Connection(self._host, self._port, self._context, self.timeout)
        alarm = threading.Timer(self.timeout, connection.abort)
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("GET", self._path + path, headers={"Accept": "application/octet-stream", "Connection": "close"})
            with connection.getresponse() as answer:
                if answer.status != 200:
                    moved = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
                    raise KeyServerError(f"{url}: the key server answered {answer.status}{moved}; expected 200")
                data = answer.read(length + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: a name that cannot be one in the DNS, a negative length in the answer.
            if isinstance(error, KeyServerError):
                raise
            raise KeyServerError(f"{url}: {self._reason(error, connection)}") from None
        finally:
            alarm.cancel()
            connection.close()
        if connection.is_aborted:
            raise KeyServerError(f"{url}: no answer within {self.timeout:g} seconds")
        if len(data) != length:
            found = f"more than {length}" if len(data) > length else str(len(data))
            raise KeyServerError(f"{url}: the key server answered {found} bytes; expected {length}")
        return data

    def _reason(self, error: Exception, connection: _Connection) -> str:
        if connection.is_aborted or isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} seconds"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the server's TLS certificate is not trusted: {error.verify_message}"
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # Some of it is what the other side sent: no control character reaches a terminal.
        return " ".join(str(text).split())[:200].encode("unicode_escape").decode()


class _Connection(http.client.HTTPConnection):
    """A connection that another thread can break off at any moment, also during the TLS handshake."""

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext | None, timeout: float) -> None:
        super().__init__(host, port or (80 if context is None else 443), timeout=timeout)
        self._tls = context
        self._deadline = time.monotonic() + timeout
        self._breaking = threading.Lock()
        self.is_aborted = False

    def connect(self) -> None:
        plain = self._reached()
        try:
            self._keep(plain)
            if self._tls is not None:
                tls = self._tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
                self._keep(tls)
                tls.do_handshake()
        except BaseException:
            self.close()
            plain.close()
            raise

    def _reached(self) -> socket.socket:
        """The first of the host's addresses that answers; all of them together have the time of the exchange."""
        problem = OSError("the host has no address")
        for *_, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            try:
                return socket.create_connection((str(address[0]), int(address[1])), remaining)
            except OSError as error:
                problem = error
        raise problem

    def _keep(self, connected: socket.socket) -> None:
        with self._breaking:
            self.sock = connected
            if self.is_aborted:
                raise TimeoutError

    def abort(self) -> None:
        with self._breaking:
            self.is_aborted = True
            if self.sock is not None:
                with suppress(OSError):
                    # The socket's own method: an SSL socket's would first talk to the other side.
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


def _is_plain(url: str) -> bool:
    return all(0x21 <= ord(character) < 0x7F for character in url)
