"""The HTTP door: an ASGI application on a socket, inside an event loop that is there already.

Without TLS it listens on loopback addresses and UNIX sockets alone, unless told otherwise. With TLS: 1.2 or newer, and a client
certificate when a CA for them is given, which is optional for the peer and identifies administrators.

Connections are counted from their first packet, TLS handshakes too: one table, whose oldest silent member makes room.

Source: encode/uvicorn uvicorn/server.py; CPython Lib/asyncio/sslproto.py (start_tls). Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from csvfast.broker.config import Address
from csvfast.broker.kbs.metrics import Metrics
from csvfast.broker.kbs.protocol import Connection, ConnectionTable, HttpLimits, KbsProtocol
from csvfast.broker.model import Door
from csvfast.errors import ArgumentError

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.broker.kbs.asgi import Receive, Scope, Send

__all__ = ["HttpLimits", "KbsServer", "tls_context"]

_SWEEP_SECONDS: Final = 0.5
_BACKLOG: Final = 1024
_log: Final = logging.getLogger(__name__)


def tls_context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's context from PEM files.

    In: client_ca   CAs of client certificates; None: no certificate is asked for
    OSError, ssl.SSLError.
    """
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
        self._server: asyncio.Server | None = None
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
        if self._requested.path is not None:
            self._server = await loop.create_unix_server(self._accept, self._requested.path, backlog=_BACKLOG)
            self._requested.path.chmod(0o600)
        else:
            host, port = self._requested.host, self._requested.port
            self._server = await loop.create_server(self._accept, host, port, backlog=_BACKLOG)
        self._sweeper = loop.create_task(self._sweep())

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was found."""
        if self._requested.path is not None or self._server is None:
            return self._requested
        name = self._server.sockets[0].getsockname()
        return Address(name[0], name[1])

    async def stop(self, seconds: float = 5.0) -> None:
        """Takes no more connections, lets requests that are being answered finish, and closes. Idempotent."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
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
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.gather(*self._handshakes, *self._state.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # connections that were aborted say so in the next round
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

    def _protocol(self) -> KbsProtocol:
        assert self._config is not None
        return KbsProtocol(self._config, self._state, {}, self.table, asyncio.get_running_loop())

    def _accept(self) -> asyncio.Protocol:
        return _Admission(self)

    def handshake(self, admission: _Admission, transport: asyncio.Transport) -> None:
        """Begins TLS on a connection that was admitted."""
        task = asyncio.get_running_loop().create_task(self._handshake(admission, transport))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, admission: _Admission, transport: asyncio.Transport) -> None:
        assert self._tls is not None
        protocol = self._protocol()
        loop = asyncio.get_running_loop()
        try:
            secured = await loop.start_tls(
                transport,
                protocol,
                self._tls,
                server_side=True,
                ssl_handshake_timeout=self.limits.handshake_seconds,
                ssl_shutdown_timeout=5.0,
            )
        except (OSError, asyncio.CancelledError) as error:  # ssl.SSLError is an OSError
            self.table.forget(admission)
            self.table.refused("handshake")
            _log.debug("handshake: %s", error)
            transport.abort()
            return
        if secured is None or secured.is_closing():
            self.table.forget(admission)
            return
        self.table.forget(admission)
        self.begin(protocol, secured)

    def plain(self, transport: asyncio.Transport) -> KbsProtocol:
        """Begins HTTP on a connection that was admitted."""
        protocol = self._protocol()
        self.begin(protocol, transport)
        return protocol

    def begin(self, protocol: KbsProtocol, transport: asyncio.Transport) -> None:
        """HTTP from here on."""
        self.table.silent(protocol)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class _Admission(asyncio.Protocol, Connection):
    """A connection from its first packet until HTTP begins on it."""

    def __init__(self, server: KbsServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self.deadline = asyncio.get_running_loop().time() + server.limits.handshake_seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        self._transport = transport
        if not self._server.table.admit(self):
            transport.abort()
            return
        if self._server._tls is None:
            self._server.table.forget(self)
            self._server.plain(transport)
        else:
            transport.pause_reading()  # nothing may be read before the TLS layer is there
            self._server.handshake(self, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._server.table.forget(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
