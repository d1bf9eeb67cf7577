"""Attested TLS for programs with threads: a client, and a small server with a thread for each connection.

For thousands of connections there is csvfast.ratstls.asynchronous.

Thread-safety: a stream belongs to one thread at a time; `close` of stream and server may be called from any.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from csvfast.errors import AttestedTlsError
from csvfast.ratstls.connection import RECORD_BYTES, AttestedConnection, shown_address
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast._core import BytesLike
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.peer import Peer, Requirement

__all__ = ["BlockingServer", "BlockingStream", "connect"]

_log: Final = logging.getLogger(__name__)
_DEFAULT_OPTIONS: Final = TlsOptions()
_FROM_NETWORK: Final = 65536

Address = tuple[str, int] | str | Path


class BlockingStream:
    """An open connection over a socket, to a peer that has been accepted. Made by `connect` and `BlockingServer`.

    peer      who it is
    timeout   seconds that each later call may take; None: for ever
    """

    def __init__(self, raw: socket.socket, connection: AttestedConnection, *, opening: float, timeout: float | None) -> None:
        """Handshake and judgement within `opening` seconds; AttestedTlsError, and the socket is closed."""
        self._socket: Final = raw
        self.timeout = timeout
        self._connection: Final = connection
        self._deadline: float | None = time.monotonic() + opening
        try:
            while self._connection.advance() == "handshake":
                self._flush()
                self._fill()
            self._flush()
            self.peer: Final[Peer] = self._connection.judge()
            if self._left() == 0:  # a judge cannot be interrupted, but what it says can come too late
                self._broken(TimeoutError())
        except BaseException as error:
            if isinstance(error, AttestedTlsError):
                self._connection.abort(error)
            self._last_words()
            raise

    def receive(self, maximum: int = 65536) -> bytes:
        """The next application data, 1 .. `maximum` bytes of one TLS record; b"" when the peer has said that nothing more comes.

        AttestedTlsError: the connection failed, the timeout passed, or it ended without a word.
        """
        self._start_clock()
        while True:
            data = self._connection.receive(min(maximum, RECORD_BYTES))
            if data is not None:
                return data
            self._flush()
            self._fill()

    def send(self, data: BytesLike) -> None:
        """Sends `data`; a TLS record ends where it ends. AttestedTlsError as for `receive`."""
        self._start_clock()
        self._connection.send(data)
        self._flush()

    def close(self) -> None:
        """Sends close_notify and closes. Never raises."""
        self._connection.close()
        self._last_words()

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockingStream {self._connection.address}, {self._connection.state}>"

    def _start_clock(self) -> None:
        self._deadline = None if self.timeout is None else time.monotonic() + self.timeout

    def _left(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def _set_timeout(self) -> None:
        left = self._left()
        if left == 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _fill(self) -> None:
        try:
            self._set_timeout()
            data = self._socket.recv(_FROM_NETWORK)
        except OSError as error:
            self._broken(error)
        if data:
            self._connection.feed(data)
        else:
            self._connection.feed_end()

    def _flush(self) -> None:
        data = memoryview(self._connection.outgoing())
        try:
            while data:
                self._set_timeout()
                data = data[self._socket.send(data) :]
        except OSError as error:
            self._broken(error)

    def _broken(self, error: OSError) -> NoReturn:
        if isinstance(error, TimeoutError):
            failure = AttestedTlsError("deadline", f"the peer did nothing in time ({self._connection.state})")
        else:
            failure = AttestedTlsError("closed", f"the connection broke: {error.strerror or error}")
        self._connection.abort(failure)
        raise failure from error

    def _last_words(self) -> None:
        with contextlib.suppress(OSError):  # he will notice
            self._socket.settimeout(1.0)
            self._socket.sendall(self._connection.outgoing())
        self._socket.close()


def connect(
    address: Address,
    identity: Identity | None,
    requirement: Requirement,
    *,
    timeout: float = 10.0,
    idle: float | None = 60.0,
    options: TlsOptions = _DEFAULT_OPTIONS,
    context: EndpointContext | None = None,
) -> BlockingStream:
    """Connects and judges the server. That the server accepts *us* shows with its first answer.

    In: address   host and port, or the path of a Unix socket
        identity  what we show; None: nothing
        timeout   seconds to reach the host, and again for handshake and judgement
        idle      seconds that each later call may take; None: for ever
        context   made before from the same identity, requirement and options, for callers that connect often
    OSError: nobody is there. AttestedTlsError: he is not accepted, or a deadline passed.
    """
    endpoint = context or EndpointContext.client(identity, requirement, options)
    if isinstance(address, tuple):
        raw = socket.create_connection(address, timeout)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        raw = socket.socket(socket.AF_UNIX)
        try:
            raw.settimeout(timeout)
            raw.connect(str(address))
        except BaseException:
            raw.close()
            raise
    return BlockingStream(raw, AttestedConnection(endpoint, _address(raw)), opening=timeout, timeout=idle)


class BlockingServer:
    """Serves each connection in a thread of its own, at most `connections` at once; more wait in the system's queue.

    In: address, identity, requirement   as for `connect`; port 0: one that is free
        handler      called with the stream of each accepted peer; the connection ends when it returns
        on_refusal   called with address, error and certificate (or None) of each peer that was not accepted
    OSError: the address cannot be had. The server runs until `close`, or as a context manager.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity,
        requirement: Requirement,
        handler: Callable[[BlockingStream], None],
        *,
        connections: int = 64,
        handshake_seconds: float = 10.0,
        idle_seconds: float = 60.0,
        options: TlsOptions = _DEFAULT_OPTIONS,
        on_refusal: Callable[[str, AttestedTlsError, AttestedCertificate | None], None] | None = None,
    ) -> None:
        self._context: Final = EndpointContext.server(identity, requirement, options)
        self._handler: Final = handler
        self._on_refusal: Final = on_refusal
        self._seconds: Final = (handshake_seconds, idle_seconds)
        self._room: Final = threading.BoundedSemaphore(connections)
        self._open: set[socket.socket] = set()
        self._lock: Final = threading.Lock()
        self._closing: Final = threading.Event()
        if isinstance(address, tuple):
            self._listener = socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
            name = self._listener.getsockname()
            address = (str(name[0]), int(name[1]))
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(address))
            self._listener.listen()
        self.address: Final = address
        self._threads: set[threading.Thread] = set()
        self._accepting: Final = threading.Thread(target=self._accept, name="csvfast-accept", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Stops listening, breaks off every connection, and waits for the handlers. Never raises."""
        with self._lock:
            self._closing.set()
            connections = tuple(self._open)
        for raw in (self._listener, *connections):
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it; closing would not
        self._accepting.join()
        with self._lock:
            threads = tuple(self._threads)
        for thread in threads:
            thread.join()
        self._listener.close()

    def __enter__(self) -> BlockingServer:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                raw, _ = self._listener.accept()
            except OSError:
                if not self._closing.is_set():
                    _log.exception("no connection can be accepted")
                    time.sleep(0.1)  # no file descriptors, perhaps
                continue
            while not self._room.acquire(timeout=0.1):
                if self._closing.is_set():
                    break
            with self._lock:
                if self._closing.is_set():
                    raw.close()
                    return
                self._open.add(raw)
                thread = threading.Thread(target=self._serve, args=(raw,), name="csvfast-connection", daemon=True)
                self._threads.add(thread)
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        address = _address(raw)
        connection = AttestedConnection(self._context, address)
        try:
            try:
                if raw.family != socket.AF_UNIX:
                    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                opening, idle = self._seconds
                stream = BlockingStream(raw, connection, opening=opening, timeout=idle)
            except AttestedTlsError as error:
                _log.info("refused %s: %s", address, error)
                if self._on_refusal is not None:
                    self._on_refusal(address, error, connection.certificate)
                return
            with stream:
                self._handler(stream)
        except AttestedTlsError as error:
            _log.info("connection to %s ended: %s", address, error)
        except Exception:
            _log.exception("the handler of %s failed", address)
        finally:
            with self._lock:
                self._open.discard(raw)
                self._threads.discard(threading.current_thread())
            raw.close()
            self._room.release()


def _address(raw: socket.socket) -> str:
    try:
        name = raw.getpeername()
    except OSError:
        return "gone"
    return shown_address(name)
