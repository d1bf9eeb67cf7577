"""Attested TLS for asyncio (and uvloop): a server that silence cannot fill, and a client.

    server = AttestedServer(identity, requirement, handler, limits=ConnectionLimits())
    await server.serve("127.0.0.1", 1234)          # serve_unix(path); as many addresses as one likes
    ...
    await server.close()

`handler` is called with a Stream once the peer has been judged and accepted, and the connection ends when it returns. Judges that
may wait are asked in worker threads of the server's own, the others at once: with a known chain that takes 30 microseconds.

Every connection is in one table, oldest first, and moves on:

    handshake   at most `handshakes`; when full the OLDEST is closed. Honest peers need milliseconds, silent ones keep nobody out
    judging     while a worker thread judges
    silent      accepted, but no application data yet; when there are `connections`, the oldest of these goes
    active      has spoken

    deadlines   `handshake_seconds` for the handshake and again for the judgement, `idle_seconds` for the first byte and for
                every later one that the handler waits for; TLS records that never become complete do not count

Thread-safety: one event loop, but for `renew`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from csvfast.errors import ArgumentError, AttestedTlsError
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions
from csvfast.ratstls.stream import Link, Stream

if TYPE_CHECKING:
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.peer import Judgement, Requirement

__all__ = ["AttestedServer", "ConnectionLimits", "Handler", "Refusal", "Stream", "open_connection", "raise_open_file_limit"]

_log: Final = logging.getLogger(__name__)

_BACKLOG: Final = 1024
_DEFAULT_OPTIONS: Final = TlsOptions()

Handler = Callable[[Stream], Awaitable[None]]
Refusal = Callable[[str, AttestedTlsError, "AttestedCertificate | None"], None]
"""Called with the peer's address, why he was refused, and his certificate if it got that far."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of a server; see the module.

    handshakes, connections            at once, 1 or more
    handshake_seconds, idle_seconds    more than 0
    judges                             worker threads for judges that may wait, 1 or more
    """

    handshakes: int = 256
    connections: int = 4096
    handshake_seconds: float = 10.0
    idle_seconds: float = 60.0
    judges: int = 8

    def __post_init__(self) -> None:
        for name in ("handshakes", "connections", "judges"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} {getattr(self, name)}: expected 1 or more")
        for name in ("handshake_seconds", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} {getattr(self, name)}: expected more than 0 seconds")


_DEFAULT_LIMITS: Final = ConnectionLimits()


class AttestedServer:
    """See the module.

    In: identity     key and certificate; `renew` gives it others
        requirement  of peers
        handler      called with the Stream of each peer that was accepted
        limits       of connections
        options      of TLS
        on_refusal   called, in the loop, for each connection that ended before its peer was accepted, whatever the reason:
                     error.stage says which, and silent or broken-off ones have no certificate. Must not block
        admits       asked, in the loop, whether an address may connect; otherwise that is a refusal of stage "closed", before
                     anything is read. Must not block
    Raises as EndpointContext.server does.
    """

    def __init__(
        self,
        identity: Identity,
        requirement: Requirement,
        handler: Handler,
        *,
        limits: ConnectionLimits = _DEFAULT_LIMITS,
        options: TlsOptions = _DEFAULT_OPTIONS,
        on_refusal: Refusal | None = None,
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        self.limits: Final = limits
        self._context = EndpointContext.server(identity, requirement, options)
        self._handler: Final = handler
        self._on_refusal: Final = on_refusal
        self._admits: Final = admits
        self._handshakes: OrderedDict[Link, None] = OrderedDict()
        self._queued: OrderedDict[Link, None] = OrderedDict()  # for a judge's thread
        self._judging: OrderedDict[Link, None] = OrderedDict()
        self._silent: OrderedDict[Link, None] = OrderedDict()
        self._active: OrderedDict[Link, None] = OrderedDict()
        self._closing: OrderedDict[Link, None] = OrderedDict()
        self._tables: Final = (self._handshakes, self._queued, self._judging, self._silent, self._active, self._closing)
        self._tasks: set[asyncio.Task[None]] = set()
        self._judgements: set[asyncio.Future[Judgement | AttestedTlsError]] = set()
        self._servers: list[asyncio.Server] = []
        self._executor: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop
        self._sweeping: asyncio.TimerHandle | None = None
        self._counts = {"accepted": 0, "refused": 0}

    async def serve(self, host: str, port: int) -> tuple[str, int]:
        """Listens on a TCP address; port 0: one that is free. Returns host and port. OSError."""
        self._start()
        server = await self._loop.create_server(self._link, host, port, backlog=_BACKLOG)
        self._servers.append(server)
        name = server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def serve_unix(self, path: str | Path) -> None:
        """Listens on a Unix socket; who may connect is up to its directory. OSError."""
        self._start()
        self._servers.append(await self._loop.create_unix_server(self._link, str(path), backlog=_BACKLOG))

    def renew(self, identity: Identity) -> None:
        """Connections from now on see another key and certificate. Raises as the constructor does. Thread-safe."""
        self._context = EndpointContext.server(identity, self._context.requirement, self._context.options)

    def stats(self) -> dict[str, int]:
        """Connections now: handshakes, judging, silent, active, closing; peers so far: accepted, refused."""
        counts = {
            "handshakes": len(self._handshakes),
            "judging": len(self._queued) + len(self._judging),
            "silent": len(self._silent),
            "active": len(self._active),
            "closing": len(self._closing),
        }
        return counts | self._counts

    async def close(self) -> None:
        """Stops listening, cancels the handlers, ends every connection with close_notify."""
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        for table in self._tables[:-1]:
            for link in tuple(table):
                link.fail(AttestedTlsError("closed", "the server is closing"))
        await asyncio.sleep(0)
        for link in tuple(self._closing):
            if link.transport.get_write_buffer_size():
                link.transport.abort()
        while self._closing:
            await asyncio.sleep(0.001)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for future in tuple(self._judgements):
            future.cancel()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    async def __aenter__(self) -> AttestedServer:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    # ---- Connections come, move on and go

    def _start(self) -> None:
        if self._sweeping is None:
            self._loop = asyncio.get_running_loop()
            raise_open_file_limit()
            self._sweep()

    def _link(self) -> Link:
        return Link(self._context, self)

    def _move(self, link: Link, table: OrderedDict[Link, None] | None) -> None:
        if link.table is not None:
            del link.table[link]
        link.table = table
        if table is not None:
            table[link] = None
            link.since = self._loop.time()

    def connected(self, link: Link) -> None:
        """A link has a transport."""
        if self._admits is not None and not self._admits(link.connection.address):
            link.fail(AttestedTlsError("closed", "the address is not admitted"))
            return
        limits = self.limits
        if len(self._handshakes) >= limits.handshakes:
            text = f"closed for a newer one: {limits.handshakes} handshakes at once"
            next(iter(self._handshakes)).fail(AttestedTlsError("deadline", text))
        self._move(link, self._handshakes)
        if sum(map(len, self._tables)) <= limits.connections:
            return
        text = f"closed for a newer one: {limits.connections} connections at once"
        if self._silent:
            next(iter(self._silent)).fail(AttestedTlsError("deadline", text))
        elif self._closing:
            next(iter(self._closing)).transport.abort()
        else:
            next(iter(self._handshakes)).fail(AttestedTlsError("deadline", text))

    def judge_elsewhere(self, link: Link) -> None:
        """A link's peer is to be judged by a judge that may wait."""
        self._move(link, self._queued)
        self._judge_next()

    def _judge_next(self) -> None:
        # The queue is ours and not the executor's, so that links whose time is over leave it.
        while self._queued and len(self._judgements) < self.limits.judges:
            link = next(iter(self._queued))
            since = link.since
            self._move(link, self._judging)
            link.since = since
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.limits.judges, "csvfast-judge")
            future = self._loop.run_in_executor(self._executor, _outcome, link.connection.judging())
            self._judgements.add(future)
            future.add_done_callback(partial(self._judged, link))

    def _judged(self, link: Link, done: asyncio.Future[Judgement | AttestedTlsError]) -> None:
        self._judgements.discard(done)
        if not done.cancelled():
            link.settle(_result(done))
            self._judge_next()

    def accepted(self, link: Link) -> None:
        """A link's peer may speak."""
        self._counts["accepted"] += 1
        self._move(link, self._silent)
        task = self._loop.create_task(self._handle(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, link: Link, error: AttestedTlsError) -> None:
        """A link ended before its peer was accepted."""
        self._counts["refused"] += 1
        connection = link.connection
        _log.info("refused %s: %s", connection.address, error)
        if self._on_refusal is not None:
            try:
                self._on_refusal(connection.address, error, connection.certificate)
            except Exception:
                _log.exception("the refusal of %s could not be reported", connection.address)

    def spoke(self, link: Link) -> None:
        """Application data of a link was taken."""
        if link.table is self._silent:
            self._move(link, self._active)

    def waits(self, link: Link) -> None:
        """A link's handler waits for the peer from now on."""
        table = link.table
        if table is not None:
            table.move_to_end(link)
            link.since = self._loop.time()

    def closing(self, link: Link) -> None:
        """A link's transport is about to be closed."""
        if link.table is not self._closing:
            self._move(link, self._closing)

    def lost(self, link: Link) -> None:
        """A link has no transport any more."""
        self._move(link, None)

    async def _handle(self, link: Link) -> None:
        try:
            await self._handler(Stream(link))
        except AttestedTlsError as error:
            _log.info("connection to %s ended: %s", link.connection.address, error)
        except Exception:
            _log.exception("the handler of %s failed", link.connection.address)
        finally:
            link.close()

    def _sweep(self) -> None:
        now, limits = self._loop.time(), self.limits
        for table, what in ((self._handshakes, "handshake"), (self._queued, "judgement"), (self._judging, "judgement")):
            for link in _expired(table, now - limits.handshake_seconds):
                link.fail(AttestedTlsError("deadline", f"no complete {what} within {limits.handshake_seconds:g} seconds"))
        for table in (self._silent, self._active):
            for link in _expired(table, now - limits.idle_seconds):
                if link.is_waiting:
                    link.fail(AttestedTlsError("deadline", f"the peer did nothing for {limits.idle_seconds:g} seconds"))
                else:
                    self.waits(link)  # the handler is at work
        for link in _expired(self._closing, now - limits.handshake_seconds):
            self.waits(link)
            link.transport.abort()
        interval = min(max(min(limits.handshake_seconds, limits.idle_seconds) / 8, 0.01), 1.0)
        self._sweeping = self._loop.call_later(interval, self._sweep)


def _expired(table: OrderedDict[Link, None], before: float) -> list[Link]:
    found = []
    for link in table:  # oldest first
        if link.since > before:
            break
        found.append(link)
    return found


def _outcome(judging: Callable[[], Judgement]) -> Judgement | AttestedTlsError:
    try:
        return judging()
    except AttestedTlsError as error:
        return error


def _result(done: asyncio.Future[Judgement | AttestedTlsError]) -> Judgement | AttestedTlsError:
    error = done.exception()
    return done.result() if error is None else AttestedTlsError("verify", f"the judge failed: {type(error).__name__}")


class _Client:
    """Owner of a client's one link."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.outcome: asyncio.Future[None] = loop.create_future()

    def judge_elsewhere(self, link: Link) -> None:
        future = self._loop.run_in_executor(None, _outcome, link.connection.judging())
        future.add_done_callback(lambda done: None if done.cancelled() else link.settle(_result(done)))

    def accepted(self, _link: Link) -> None:
        if not self.outcome.done():
            self.outcome.set_result(None)

    def refused(self, _link: Link, error: AttestedTlsError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def connected(self, link: Link) -> None: ...
    def spoke(self, link: Link) -> None: ...
    def waits(self, link: Link) -> None: ...
    def closing(self, link: Link) -> None: ...
    def lost(self, link: Link) -> None: ...


async def open_connection(
    address: tuple[str, int] | str | Path,
    identity: Identity | None,
    requirement: Requirement,
    *,
    timeout: float = 10.0,
    options: TlsOptions = _DEFAULT_OPTIONS,
    context: EndpointContext | None = None,
) -> Stream:
    """Connects and judges the server. That the server accepts *us* shows with its first answer.

    In: address   host and port, or the path of a Unix socket
        identity  what we show; None: nothing
        timeout   seconds for everything until the stream is open
        context   made before from the same identity, requirement and options, for callers that connect often
    OSError: nobody is there. AttestedTlsError: he is not accepted, or a deadline passed.
    """
    loop = asyncio.get_running_loop()
    endpoint = context or EndpointContext.client(identity, requirement, options)
    owner = _Client(loop)

    def make_link() -> Link:
        return Link(endpoint, owner)

    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, tuple):
                transport, link = await loop.create_connection(make_link, *address)
            else:
                transport, link = await loop.create_unix_connection(make_link, str(address))
            await owner.outcome
    except BaseException as error:
        if owner.outcome.done() and not owner.outcome.cancelled():
            owner.outcome.exception()  # looked at, so that nobody complains
        if transport is not None:
            transport.close()
        if isinstance(error, TimeoutError) and not isinstance(error, AttestedTlsError):
            raise AttestedTlsError("deadline", f"no connection within {timeout:g} seconds") from None
        raise
    return Stream(link)


def raise_open_file_limit() -> int:
    """Lets this process open as many files and sockets as the system allows it to; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return soft
    return hard
