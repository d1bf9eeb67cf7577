"""HTTP/1.1 on one connection, with an end to everybody's patience: uvicorn's protocol, deadlines and limits of our own.

    silent    connected, or between two bytes of a request's head: `head_seconds` until the head is complete
    body      `body_seconds` until the body is complete
    working   the application answers; a peer that does not read has `write_seconds`
    idle      kept alive between requests: `idle_seconds`

The server looks at all deadlines twice a second; no timer is set for a request. When the table is full, the oldest one makes room
out of the largest group of those that are silent, sending a body, or idle: who sends a request at once is never kept out by those
who do not, whatever they do instead.

Source: encode/uvicorn uvicorn/protocols/http/httptools_impl.py. Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from csvfast.broker.kbs.errors import KbsError
from csvfast.broker.logs import event, new_correlation

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

    from csvfast.broker.kbs.metrics import Metrics

__all__ = ["ConnectionTable", "HttpLimits", "KbsProtocol"]

_PIPELINED: Final = 16
_LINGER_SECONDS: Final = 2.0
_JOINED: Final = 64 << 10
_HEAD: Final = b"HTTP/1.1 "
_CONTINUE: Final = b"HTTP/1.1 100 "
_REASONS: Final = {400: b"Bad Request", 413: b"Content Too Large", 431: b"Request Header Fields Too Large"}
_REFUSAL: Final = (
    b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-csvfast-correlation: %b\r\n"
    b"connection: close\r\n\r\n%b"
)
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How much, and how long.

    connections     open at once
    head_bytes      of a request's line and headers; an EAR token has to fit
    headers         of a request
    body_bytes      of a request
    *_seconds       see the module; handshake_seconds for TLS
    """

    connections: int = 4096
    head_bytes: int = 32 << 10
    headers: int = 64
    body_bytes: int = 2 << 20
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: float = 60.0


class Connection:
    """What the table knows of a connection. Subclasses close themselves.

    deadline   when it will be closed, by the loop's clock; infinite while the application works
    """

    deadline: float = float("inf")

    def abort(self) -> None:
        """Closes it at once, without ceremony."""
        raise NotImplementedError


class ConnectionTable:
    """All connections of a door, silent and idle ones in the order in which they became that.

    In: door   for counters
    """

    def __init__(self, limits: HttpLimits, metrics: Metrics, door: str) -> None:
        self.limits: Final = limits
        self.door: Final = door
        self._metrics = metrics
        self._silent: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._reading: dict[Connection, None] = {}
        self._busy: set[Connection] = set()
        metrics.watch_connections(door, lambda: len(self))

    def __len__(self) -> int:
        return len(self._silent) + len(self._idle) + len(self._reading) + len(self._busy)

    def admit(self, connection: Connection) -> bool:
        """A new connection, silent. False: there is no room, and nobody who could make some."""
        if len(self) >= self.limits.connections:
            victims = max(self._silent, self._reading, self._idle, key=len)
            if not victims:
                self.refused("table full")
                return False
            self.close(next(iter(victims)), "evicted")
        self._silent[connection] = None
        return True

    def succeed(self, connection: Connection, by: Connection) -> bool:
        """A silent connection goes on as another object. False: it has been closed."""
        if connection not in self._silent:
            return False
        del self._silent[connection]
        self._silent[by] = None
        return True

    def silent(self, connection: Connection) -> None:
        """It has begun a request (again), whose head is not complete."""
        if connection not in self._silent:
            self.forget(connection)
            self._silent[connection] = None

    def reading(self, connection: Connection) -> None:
        """Its request's head is complete, the body is not."""
        self.forget(connection)
        self._reading[connection] = None

    def busy(self, connection: Connection) -> None:
        """Its request is complete."""
        self._reading.pop(connection, None)
        self._busy.add(connection)

    def idle(self, connection: Connection) -> None:
        """Its request has been answered."""
        self.forget(connection)
        self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """It has gone."""
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)
        self._reading.pop(connection, None)
        self._busy.discard(connection)

    def close(self, connection: Connection, reason: str) -> None:
        """Closes a connection at once and counts it."""
        self.forget(connection)
        self.refused(reason)
        connection.abort()

    def refused(self, reason: str) -> None:
        """Counts. In: reason   a word out of the program."""
        self._metrics.refused(self.door, reason)

    def sweep(self, now: float) -> None:
        """Closes connections whose time is up."""
        for group in (self._silent, self._reading, self._busy, self._idle):
            late = [connection for connection in group if connection.deadline <= now]
            for connection in late:
                self.close(connection, "idle" if group is self._idle else "deadline")


class _Writer:
    """A transport that sends an answer's head together with its body: one system call instead of two, each of which lets other
    threads run. As much of a transport as uvicorn's cycle uses."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        head = self._head
        if head:
            self._head = b""
            if len(data) > _JOINED:
                self._transport.write(head)
                self._transport.write(data)
            else:
                self._transport.write(head + data)
        elif data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class KbsProtocol(HttpToolsProtocol, Connection):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        table: ConnectionTable,
        loop: asyncio.AbstractEventLoop,
        admission: Connection,
    ) -> None:
        """In: admission   this connection's place in the table until now."""
        super().__init__(config, server_state, app_state, loop)
        self._table = table
        self._limits = table.limits
        self._time = loop.time
        self._head_bytes = 0  # of the head that is being read; -1: no head is being read
        self._body_bytes = 0
        self._framing_bytes = 0  # since the last byte of the body: chunk sizes, trailers
        self._begun = False
        self._admission = admission
        self._refused = False
        self._extensions: dict[str, Any] | None = None
        self.deadline = loop.time() + table.limits.head_seconds

    # ---- The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins; over TLS, after its handshake."""
        if not self._table.succeed(self._admission, self):
            transport.abort()  # it had to make room while its handshake was going on
            return
        super().connection_made(transport)
        self._begun = True
        self._writer = _Writer(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        if certificate:
            self._extensions = {"csvfast.peer": {"certificate_sha256": hashlib.sha256(certificate).hexdigest()}}

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._table.forget(self)
        if self._begun:
            super().connection_lost(exc)

    def abort(self) -> None:
        """Closes at once."""
        if self._begun:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        if self._refused:
            return
        if self._head_bytes >= 0:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if max(self._head_bytes, self._framing_bytes) > self._limits.head_bytes and not self._refused:
            self.refuse(431, "head or trailers of more bytes than allowed")

    # ---- The request

    def on_message_begin(self) -> None:
        """Its first byte."""
        super().on_message_begin()
        if self._extensions is not None:
            self.scope["extensions"] = self._extensions
        if not self._is_answering():
            self._table.silent(self)
            self.deadline = self._time() + self._limits.head_seconds

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Trailers (RFC 9110, 6.5) are not looked at: what stands behind the body was checked by nobody."""
        if self._head_bytes >= 0:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its head is complete: checked, and given to the application."""
        if self._refused:
            return
        limits, headers = self._limits, self.headers
        size = len(self.url)
        for name, value in headers:
            size += len(name) + len(value)
            if name == b"content-length" and (len(value) > 18 or not value.isdigit() or int(value) > limits.body_bytes):
                self.refuse(413, "body of more bytes than allowed")
                return
        if size > limits.head_bytes or len(headers) > limits.headers:
            self.refuse(431, "head of more bytes or headers than allowed")
            return
        if len(self.pipeline) >= _PIPELINED:
            self.refuse(400, "more requests in advance than allowed")
            return
        self._head_bytes, self._body_bytes, self._framing_bytes = -1, 0, 0
        self.deadline = self._time() + limits.body_seconds
        self._table.reading(self)
        super().on_headers_complete()
        self.cycle.transport = self._writer  # type: ignore[assignment]  # its task runs later

    def on_body(self, body: bytes) -> None:
        """Some of its body."""
        if self._refused:
            return
        self._body_bytes += len(body)
        self._framing_bytes = 0
        if self._body_bytes > self._limits.body_bytes:
            self.refuse(413, "body of more bytes than allowed")
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Its end."""
        if self._refused:
            return
        self._head_bytes = self._framing_bytes = 0
        if self._is_answering():
            self._table.busy(self)
            self.deadline = float("inf")
        else:  # answered before its body was complete
            self._rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It has been answered."""
        # As uvicorn does it, without a timer for each.
        self.server_state.total_requests += 1
        self._writer.flush()  # without a body: HEAD
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._head_bytes >= 0:
            self._rest()

    def _rest(self) -> None:
        self.deadline = self._time() + self._limits.idle_seconds
        self._table.idle(self)

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def pause_writing(self) -> None:
        """The peer does not read."""
        super().pause_writing()
        self.deadline = self._time() + self._limits.write_seconds

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._head_bytes >= 0 and self._is_answering():
            self.deadline = float("inf")

    # ---- Refusals

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for what is no HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, detail: str) -> None:
        """Answers without the application, when nothing has been answered yet, and closes."""
        if self._refused:
            return
        self._refused = True
        self._table.refused(detail.replace('"', "'"))
        correlation = new_correlation()
        event(_log, logging.INFO, "refused", status=status, error=detail, correlation=correlation)
        if self._is_answering():
            # The application is at it, perhaps in the middle of its answer: it sees a peer that has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        body = KbsError("HTTPFailed", detail, correlation, status=status).body
        self.transport.write(_REFUSAL % (status, _REASONS[status], len(body), correlation.encode("ascii"), body))
        if self.transport.can_write_eof():
            # Closing now would reset the connection while the peer is still sending, and it would not see the answer.
            self.transport.write_eof()
            self.flow.resume_reading()
            self.deadline = self._time() + _LINGER_SECONDS
        else:
            self.transport.close()
