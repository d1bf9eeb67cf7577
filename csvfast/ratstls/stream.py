"""An attested connection on an asyncio transport: what the network does below, and the Stream that applications see above.

    network ──bytes──> Link ──records──> AttestedConnection ──application data──> Stream

Reading stops while the handler does not take what has come, while the peer does not read what was sent, and while he is judged.

Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from csvfast.errors import AttestedTlsError
from csvfast.ratstls.connection import AttestedConnection, octets, shown_address

if TYPE_CHECKING:
    from collections import OrderedDict

    from csvfast._core import BytesLike
    from csvfast.ratstls.context import EndpointContext
    from csvfast.ratstls.peer import Judgement, Peer

__all__ = ["Link", "Owner", "Stream"]

_UNREAD_LIMIT: Final = 256 << 10  # bytes taken from the network that the handler has not asked for
_SEND_PIECE: Final = 256 << 10  # encrypted at once; between pieces the peer has to read


class Stream:
    """An open connection to a peer that has been accepted. What a handler gets, and `open_connection` returns.

    peer   who it is
    """

    __slots__ = ("_link", "peer")

    def __init__(self, link: Link) -> None:
        self._link = link
        self.peer: Final[Peer] = link.connection.peer

    async def receive(self, maximum: int = 65536) -> bytes:
        """The next application data, 1 .. `maximum` bytes of one TLS record; b"" when the peer has said that nothing more comes.

        After that `send` still works. AttestedTlsError: the connection failed, a deadline passed, or it ended without a word.
        One task at a time.
        """
        link = self._link
        data = link.read(maximum)
        if data is None:
            link.waits()  # once: pieces of a record do not start the clock anew
            while data is None:
                await link.wait_for_data()
                data = link.read(maximum)
        return data

    async def send(self, data: BytesLike) -> None:
        """Sends `data`; a TLS record ends where it ends. Returns when the system has taken it or has room for it.

        AttestedTlsError: the connection failed or a deadline passed. One task at a time.
        """
        link, rest = self._link, octets(data)
        while len(rest) > _SEND_PIECE:
            rest = memoryview(rest)
            link.write(rest[:_SEND_PIECE])
            rest = rest[_SEND_PIECE:]
            if link.is_full:
                await link.wait_for_room()
        link.write(rest)
        if link.is_full:
            await link.wait_for_room()

    def close(self) -> None:
        """Sends close_notify and closes, when what was sent is on its way. Never raises."""
        self._link.close()

    def __repr__(self) -> str:
        return f"<Stream {self.peer.address}, {self._link.connection.state}>"


class Owner(Protocol):
    """What a link tells the server or the client that it belongs to."""

    def connected(self, link: Link) -> None:
        """It has a transport."""
        ...

    def judge_elsewhere(self, link: Link) -> None:
        """Its peer is to be judged by a judge that may wait; the outcome goes to `Link.settle`."""
        ...

    def accepted(self, link: Link) -> None:
        """Its peer may speak."""
        ...

    def refused(self, link: Link, error: AttestedTlsError) -> None:
        """It ended before its peer was accepted. Called once at most."""
        ...

    def spoke(self, link: Link) -> None:
        """Application data was taken."""
        ...

    def waits(self, link: Link) -> None:
        """The application waits for the peer from now on."""
        ...

    def closing(self, link: Link) -> None:
        """The transport is about to be closed."""
        ...

    def lost(self, link: Link) -> None:
        """The transport is gone."""
        ...


class Link(asyncio.Protocol):
    """One connection: the loop's transport below, AttestedConnection in the middle, a Stream above."""

    connection: AttestedConnection
    transport: asyncio.Transport

    def __init__(self, context: EndpointContext, owner: Owner) -> None:
        self.table: OrderedDict[Link, None] | None = None  # the server's, in which it is now
        self.since = 0.0  # loop time at which the current deadline's clock started
        self.is_full = False  # the transport's buffer; nothing is read either until the peer has read
        self.is_accepted = False
        self._context = context
        self._owner = owner
        self._is_lost = False
        self._unread = 0
        self._paused = False
        self._data: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def is_waiting(self) -> bool:
        """True when it is the peer who should act."""
        return self._data is not None or self._room is not None

    # ---- Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = transport  # type: ignore[assignment]  # of a stream socket
        self.connection = AttestedConnection(self._context, shown_address(transport.get_extra_info("peername")))
        self._owner.connected(self)
        if not self._context.is_server:
            self._advance()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. What it raised would be logged and forgotten: it raises nothing."""
        connection = self.connection
        if connection.state == "closed":
            return
        try:
            connection.feed(data)
        except AttestedTlsError as error:
            self.fail(error)
            return
        if connection.state == "handshake":
            self._advance()
            return
        self._unread += len(data)
        if self._unread > _UNREAD_LIMIT:
            self._hold()
        self._wake(self._data)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. True: half-closed, and what the application still has to say is sent."""
        connection = self.connection
        connection.feed_end()
        if connection.state == "handshake":
            self._advance()
        self._wake(self._data)
        return connection.state in ("open", "judging")

    def connection_lost(self, _error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._is_lost = True
        connection = self.connection
        if not self.is_accepted:
            self.fail(AttestedTlsError("closed", "the connection was lost before the peer was accepted"))
        connection.feed_end()
        self._wake(self._data)
        self._wake(self._room)
        self._owner.lost(self)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self.is_full = True
        self._hold()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self.is_full = False
        self._wake(self._room)
        self._release()

    # ---- Handshake and judgement

    def _advance(self) -> None:
        connection = self.connection
        try:
            if connection.advance() != "judging":
                self._flush()
                return
            if not self._context.ends_silently:
                self._flush()
            if self._context.requirement.blocking:
                self._hold()  # what the peer says meanwhile waits in the network
                self._owner.judge_elsewhere(self)
                return
            connection.judge()
        except AttestedTlsError as error:
            self.fail(error)
            return
        self.is_accepted = True
        self._owner.accepted(self)

    def settle(self, judgement: Judgement | AttestedTlsError) -> None:
        """Called in the loop with what a worker thread found out."""
        if self.connection.state != "judging":
            return  # a deadline was quicker
        try:
            self.connection.settle(judgement)
        except AttestedTlsError as error:
            self.fail(error)
            return
        self.is_accepted = True
        self._owner.accepted(self)
        self._release()

    # ---- Called by the stream and the owner

    def read(self, maximum: int) -> bytes | None:
        """As AttestedConnection.receive; when all has been taken the network may go on."""
        data = self.connection.receive(maximum)
        if data is None:
            if self._unread:
                self._unread = 0
                self._flush()  # an answer to a key update, if there was one
            self._release()
        elif data:
            self._owner.spoke(self)
        return data

    def write(self, data: bytes | memoryview) -> None:
        """Encrypts and sends, whether there is room or not."""
        if self._is_lost and self.connection.state == "open":
            raise AttestedTlsError("closed", "the connection was lost")
        self.connection.send(data)
        self.transport.write(self.connection.outgoing())

    def waits(self) -> None:
        """The peer's time runs from now on."""
        self._owner.waits(self)

    async def wait_for_data(self) -> None:
        """Until something has come, or the connection is at its end."""
        self._data = asyncio.get_running_loop().create_future()
        try:
            await self._data
        finally:
            self._data = None

    async def wait_for_room(self) -> None:
        """Until the peer has read enough. AttestedTlsError: he never will."""
        self._room = asyncio.get_running_loop().create_future()
        self._owner.waits(self)
        try:
            await self._room
        finally:
            self._room = None
        if self.connection.state != "open":
            raise self.connection.failure()
        if self._is_lost:
            raise AttestedTlsError("closed", "the connection was lost")

    def close(self) -> None:
        """See Stream."""
        self.connection.close()
        self._end()

    def fail(self, error: AttestedTlsError) -> None:
        """Closes for a reason; before the peer was accepted that is a refusal."""
        self.connection.abort(error)
        if not self.is_accepted:
            self._owner.refused(self, error)
            self.is_accepted = True  # said once
        self._end()

    def _end(self) -> None:
        if not self._is_lost:
            self._flush()
            self._owner.closing(self)
            self.transport.close()
        self._wake(self._data)
        self._wake(self._room)

    def _flush(self) -> None:
        data = self.connection.outgoing()
        if data and not self._is_lost:
            self.transport.write(data)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _hold(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def _release(self) -> None:
        if self._paused and not self.is_full and self._unread <= _UNREAD_LIMIT and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()
