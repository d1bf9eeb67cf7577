"""The HTTP door: an ASGI application on a socket, inside an event loop that is there already.

Without TLS it listens on loopback addresses and UNIX sockets alone, unless told otherwise. With TLS: 1.2 or newer, and a client
certificate when a CA for them is given, which is optional for the peer and identifies administrators.

Connections are counted from the moment they are accepted, TLS handshakes too: one table, whose oldest silent member makes room.
The loops' own servers do not show a connection before its handshake is over, so connections are accepted here.

Source: encode/uvicorn uvicorn/server.py. Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from uvicorn.config import Config
from uvicorn.server import ServerState

from csvfast.broker.config import Address
from csvfast.broker.kbs.metrics import Metrics
from csvfast.broker.kbs.protocol import Connection, ConnectionTable, HttpLimits, KbsProtocol
from csvfast.broker.model import Door
from csvfast.certs.private import read_private_file
from csvfast.errors import ArgumentError

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.broker.kbs.asgi import Receive, Scope, Send

__all__ = ["HttpLimits", "KbsServer", "tls_context"]

_SWEEP_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 5.0
_ACCEPT_PAUSE: Final = 0.05
_GOODBYE_ROUNDS: Final = 100
_GOODBYE_PAUSE: Final = 0.01
_BACKLOG: Final = 1024
_KEY_LIMIT: Final = 64 << 10
_log: Final = logging.getLogger(__name__)


def tls_context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's context from PEM files.

    In: key         its owner's alone
        client_ca   CAs of client certificates; None: no certificate is asked for
    StateError: the key's file is missing or open to others. OSError, ssl.SSLError.
    """
    found = read_private_file(key.parent, key.name, _KEY_LIMIT)  # OpenSSL reads it again, and asks nothing
    found[:] = bytes(len(found))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        # A resumed session would not show its certificate again.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    with suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context


class KbsServer:
    """The door. `start` and `stop`, or an asynchronous context manager.

    In: app             an ASGI application
        address         host and port (0: any free one), or a UNIX socket's path
        tls             from `tls_context`; None: no TLS
        insecure_http   without TLS away from loopback, too
        metrics         counts connections
    ArgumentError: no TLS, and not loopback.
    """

    def __init__(
        self,
        app: Any,
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
        insecure_http: bool = False,
        limits: HttpLimits | None = None,
        metrics: Metrics | None = None,
        door: str = Door.KBS,
    ) -> None:
        if tls is None and not address.is_local and not insecure_http:
            raise ArgumentError(f"{address}: without TLS; expected a loopback address, a certificate, or insecure_http")
        self._app = app
        self._requested = address
        self._tls = tls
        self.limits: Final = limits or HttpLimits()
        self.table: Final = ConnectionTable(self.limits, metrics or Metrics(), door)
        self._state = ServerState()
        self._config: Config | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens. OSError."""
        loop = asyncio.get_running_loop()
        config = Config(
            self._application, loop="none", http=KbsProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, date_header=False, interface="asgi3",
        )  # fmt: skip
        config.load()
        self._config = config
        self._listener = _listen(self._requested)
        self._accepting = loop.create_task(self._accept(self._listener))
        self._sweeper = loop.create_task(self._sweep())

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was found."""
        if self._requested.path is not None or self._listener is None:
            return self._requested
        name = self._listener.getsockname()
        return Address(name[0], name[1])

    async def stop(self, seconds: float = 5.0) -> None:
        """Takes no more connections, lets requests that are being answered finish, and closes. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        await _cancel(self._accepting)
        listener.close()
        for handshake in tuple(self._handshakes):
            handshake.cancel()
        for connection in tuple(self._state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._state.tasks:
                    await asyncio.wait(tuple(self._state.tasks))
        for task in tuple(self._state.tasks):
            task.cancel()
        for open_connection in tuple(self._state.connections):
            open_connection.transport.abort()
        await _cancel(self._sweeper)
        await asyncio.gather(*self._handshakes, *self._state.tasks, return_exceptions=True)
        for _ in range(_GOODBYE_ROUNDS):  # connections that were aborted say so in a later round
            if not self._state.connections:
                break
            await asyncio.sleep(_GOODBYE_PAUSE)
        if self._requested.path is not None:
            self._requested.path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn looks at the kind of callable it is given; whatever the application is, this is a coroutine function.
        await self._app(scope, receive, send)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.table.sweep(loop.time())

    # ---- New connections

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _address = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, or a peer that left while it waited
                _log.warning("accept: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            connection.setblocking(False)
            admission = _Admission(connection, loop.time() + self.limits.handshake_seconds)
            if not self.table.admit(admission):
                connection.close()
                continue
            task = loop.create_task(self._begin(admission, connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _begin(self, admission: _Admission, connection: socket.socket) -> None:
        assert self._config is not None
        loop = asyncio.get_running_loop()
        protocol = KbsProtocol(self._config, self._state, {}, self.table, loop, admission)
        patience = {} if self._tls is None else {
            "ssl_handshake_timeout": self.limits.handshake_seconds, "ssl_shutdown_timeout": _SHUTDOWN_SECONDS,
        }  # fmt: skip
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection, ssl=self._tls, **patience)
        except (OSError, asyncio.CancelledError) as error:  # ssl.SSLError is an OSError
            self.table.forget(admission)
            self.table.refused("handshake")
            _log.debug("handshake: %s", error)
            connection.close()


class _Admission(Connection):
    """A connection between its acceptance and the first moment of HTTP on it."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self.deadline = deadline

    def abort(self) -> None:
        # The loop's transport owns the descriptor by now; it sees the end of the connection and closes.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def _listen(address: Address) -> socket.socket:
    if address.path is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Nobody else between bind and chmod.
            before = os.umask(0o177)
            try:
                listener.bind(str(address.path))
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    else:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
