"""The wire between a host and the agent beside its containers: requests, replies, events and the containers' standard streams.

    with Connection(descriptor, handler) as connection:           # the agent: handler(method, parameters) -> result
    with Connection(descriptor) as connection:                    # the host
        number = connection.request("CreateContainer", {...})["process"]
        connection.request("StartContainer", {"container": "c1"})
        for chunk in iter(connection.reader(Frame.STDOUT, number).read, b""): ...

It runs over any reliable byte stream: a virtio serial port of a virtual machine, a Unix socket. A frame is a header of 12 bytes,
little-endian, and a body of at most 1 MiB:

    u32 length of the body, u16 type, u16 0, u32 id

    1 REQUEST   id = the caller's tag    JSON {"method", "parameters"}
    2 REPLY     id = the request's tag   JSON {"result"} or {"error": {"kind", "message"}}
    3 STDIN     id = process number      bytes; none = the end
    4 STDOUT    id = process number      bytes; none = the end
    5 STDERR    id = process number      bytes; none = the end
    6 EVENT     id = 0                   JSON object
    7 WINDOW    id = process number      u16 type of the stream (3, 4, 5), u16 flags (1: nobody reads it any more), u32 bytes

Flow control: each stream may carry WINDOW bytes at first, and then as many more as its reader grants. Who sends more breaks
the connection: a slow reader never fills the other side's memory. Process numbers are given by the agent, and never twice.

Nothing secret travels here: on a confidential machine the host is the one who is not trusted.

Thread-safety: any thread may call anything; one reader and one writer per stream.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from csvfast.errors import ContainerError, CsvfastError

__all__ = ["BODY_MAX", "HEADER", "PORT_NAME", "WINDOW", "Connection", "Frame", "StreamReader", "StreamWriter", "decode_object"]

PORT_NAME: Final = "org.csvfast.agent.0"  # of the virtual machine's serial port
HEADER: Final = struct.Struct("<IHHI")
BODY_MAX: Final = 1 << 20
WINDOW: Final = 256 << 10  # bytes a stream may carry before its reader grants more
CHUNK: Final = 64 << 10  # of a stream in one frame
REQUESTS_MAX: Final = 64  # of the other side, under way at a time
STREAMS_MAX: Final = 1024  # of the other side, not yet read to their end
MESSAGE_MAX: Final = 2000  # characters of an error

_GRANT: Final = struct.Struct("<HHI")
_NOBODY_READS: Final = 1
_SMALL: Final = 4096  # bytes of waiting chunks that are put together: many tiny frames take no more memory than few large ones
_QUEUE_MAX: Final = 64 << 20  # bytes waiting for a peer that does not read
_FORGOTTEN_MAX: Final = 4096

Handler = Callable[[str, dict[str, Any]], Mapping[str, Any] | None]


class Frame(IntEnum):
    """Types of frames."""

    REQUEST = 1
    REPLY = 2
    STDIN = 3
    STDOUT = 4
    STDERR = 5
    EVENT = 6
    WINDOW = 7


_STREAMS: Final = frozenset({Frame.STDIN, Frame.STDOUT, Frame.STDERR})


def decode_object(body: bytes | bytearray, subject: str) -> dict[str, Any]:
    """A JSON object. ContainerError "protocol": it is none, names a member twice, or holds what JSON does not have."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a member stands twice")
        return found

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        value = json.loads(body, object_pairs_hook=members, parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        raise ContainerError("protocol", f"{subject}: {problem}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise ContainerError("protocol", f"{subject}: a JSON {type(value).__name__}; expected an object")
    return value


class StreamReader:
    """The receiving end of one stream."""

    def __init__(self, connection: Connection, kind: Frame, process: int) -> None:
        self.kind, self.process = kind, process
        self._connection = connection
        self._chunks: deque[memoryview] = deque()
        self._waiting = 0  # bytes in _chunks
        self._taken = 0  # read, not yet granted again
        self._ended = False

    def read(self, limit: int = CHUNK, timeout: float | None = None) -> bytes:
        """1 to `limit` bytes as soon as there are any; none at the end, also when the connection ended.

        TimeoutError: nothing came in `timeout` seconds.
        """
        connection = self._connection
        with connection.changed:
            if not connection.changed.wait_for(lambda: self._chunks or self._ended or connection.is_closed, timeout):
                raise TimeoutError(f"nothing from {self.kind.name} of process {self.process} in {timeout} s")
            if not self._chunks:
                self._forget()
                return b""
            chunk = self._chunks.popleft()
            if len(chunk) > limit:
                self._chunks.appendleft(chunk[limit:])
                chunk = chunk[:limit]
            self._waiting -= len(chunk)
            self._taken += len(chunk)
            granted = self._taken if self._taken >= WINDOW // 2 and not self._ended else 0
            self._taken -= granted
        if granted:
            connection._send(Frame.WINDOW, self.process, _GRANT.pack(self.kind, 0, granted))
        return bytes(chunk)

    def close(self) -> None:
        """Nothing more is wanted: its writer is told so. Idempotent."""
        with self._connection.changed:
            tell = not self._ended
            self._ended = True
            self._forget()
        if tell:
            self._connection._send(Frame.WINDOW, self.process, _GRANT.pack(self.kind, _NOBODY_READS, 0))

    def _forget(self) -> None:
        self._chunks.clear()
        self._waiting = 0
        self._connection._forget_reader((self.kind, self.process))


class StreamWriter:
    """The sending end of one stream."""

    def __init__(self, connection: Connection, kind: Frame, process: int) -> None:
        self.kind, self.process = kind, process
        self._connection = connection
        self._credit = WINDOW
        self._refused = False
        self._ended = False

    def write(self, data: bytes | bytearray | memoryview, timeout: float | None = None) -> None:
        """All of it; waits while the other side reads slowly.

        BrokenPipeError: nobody reads it any more, close() was called, or the connection has ended. TimeoutError.
        """
        connection = self._connection
        end = None if timeout is None else monotonic() + timeout
        view = memoryview(data).cast("B")
        while view:
            with connection.changed:
                wait = None if end is None else max(0.0, end - monotonic())
                if not connection.changed.wait_for(
                    lambda: self._credit or self._refused or self._ended or connection.is_closed, wait
                ):
                    raise TimeoutError(f"{self.kind.name} of process {self.process} was not read for {timeout} s")
                if self._refused or self._ended or connection.is_closed:
                    raise BrokenPipeError(f"nobody reads {self.kind.name} of process {self.process}")
                length = min(self._credit, CHUNK, len(view))
                self._credit -= length
            connection._send(self.kind, self.process, view[:length])
            view = view[length:]

    def close(self) -> None:
        """The stream's end. Idempotent; no error when the connection has ended."""
        with self._connection.changed:
            if self._ended:
                return
            self._ended = True
            self._connection._writers.pop((self.kind, self.process), None)
            self._connection.changed.notify_all()
        self._connection._send(self.kind, self.process, b"")


class Connection:
    """One side of the wire.

    Args:
        descriptor: of the byte stream; the connection's from now on, made non-blocking, closed with it
        handler: answers the other side's requests, each in a thread; None = the other side may not ask. A CsvfastError of its
            becomes an error reply.
        on_event: gets the other side's events, in the thread that reads: it must not wait
        name: of the threads
    """

    def __init__(
        self,
        descriptor: int,
        handler: Handler | None = None,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        name: str = "csvfast-wire",
    ) -> None:
        self.changed: Final = threading.Condition()
        self.problem: str | None = None  # why it ended, other than by close() or by the other side's orderly end
        self._descriptor = descriptor
        self._handler = handler
        self._on_event = on_event
        self._name = name
        self._closed = False
        self._readers: dict[tuple[int, int], StreamReader] = {}
        self._writers: dict[tuple[int, int], StreamWriter] = {}
        self._forgotten: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._replies: dict[int, dict[str, Any] | None] = {}
        self._tag = 0
        self._serving = 0
        self._sending = threading.Lock()
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        os.set_blocking(descriptor, False)
        self._wake_end, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # ends both loops
        self._more_end, self._more = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # something is queued
        self._threads = [
            threading.Thread(target=self._read_loop, name=f"{name}-read", daemon=True),
            threading.Thread(target=self._write_loop, name=f"{name}-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_closed(self) -> bool:
        """It has ended, from either side."""
        return self._closed

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Waits for the end. False: it has not come in `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self._closed, timeout)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Waits until every request of the other side has its reply. False: one has none after `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: not self._serving or self._closed, timeout)

    def request(self, method: str, parameters: Mapping[str, Any] | None = None, timeout: float | None = None) -> dict[str, Any]:
        """Asks the other side and waits for its result.

        ContainerError: the kind it answered with; "protocol": the connection ended, or no answer in `timeout` seconds.
        """
        body = json.dumps({"method": method, "parameters": dict(parameters or {})}, separators=(",", ":")).encode()
        if len(body) > BODY_MAX:
            raise ContainerError("limit", f"request {method} of {len(body)} bytes; at most {BODY_MAX} go")
        with self.changed:
            self._tag = tag = self._tag % 0xFFFFFFFF + 1
            self._replies[tag] = None
        try:
            self._send(Frame.REQUEST, tag, body)
            with self.changed:
                if not self.changed.wait_for(lambda: self._replies[tag] is not None or self._closed, timeout):
                    raise ContainerError("protocol", f"no answer to {method} in {timeout} s")
                reply = self._replies[tag]
        finally:
            with self.changed:
                self._replies.pop(tag, None)
        if reply is None:
            raise ContainerError("protocol", f"the connection ended during {method}{_why(self.problem)}")
        if "error" in reply:
            error = reply["error"] if isinstance(reply["error"], dict) else {}
            kind, message = error.get("kind", "protocol"), error.get("message", "no reason")
            raise ContainerError(_printable(kind, 64), _printable(message, MESSAGE_MAX))
        result = reply.get("result")
        if not isinstance(result, dict):
            raise ContainerError("protocol", f"the reply to {method} has neither result nor error")
        return result

    def send_event(self, event: Mapping[str, Any]) -> None:
        """Tells the other side; nothing happens when the connection has ended."""
        body = json.dumps(dict(event), separators=(",", ":")).encode()
        if len(body) > BODY_MAX:
            raise ContainerError("limit", f"event of {len(body)} bytes; at most {BODY_MAX} go")
        self._send(Frame.EVENT, 0, body)

    def reader(self, kind: Frame, process: int) -> StreamReader:
        """The receiving end of a process's stream: always the same object until its end was read."""
        with self.changed:
            return self._reader((kind, process))

    def writer(self, kind: Frame, process: int) -> StreamWriter:
        """The sending end of a process's stream: always the same object until it is closed."""
        if kind not in _STREAMS:
            raise ContainerError("protocol", f"{kind!r} is no stream")
        with self.changed:
            return self._writers.setdefault((kind, process), StreamWriter(self, kind, process))

    def close(self, linger: float = 1.0) -> None:
        """Ends it: what is queued still leaves within `linger` seconds. Idempotent."""
        end = monotonic() + linger
        while self._queue and not self._closed and monotonic() < end:
            threading.Event().wait(0.01)
        self._end(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)
        with self._sending:
            for name in ("_descriptor", "_wake_end", "_wake", "_more_end", "_more"):
                if (descriptor := getattr(self, name)) >= 0:
                    setattr(self, name, -1)
                    os.close(descriptor)

    # Sending: at once if the stream takes it, through the queue if it does not.

    def _send(self, kind: Frame, number: int, body: bytes | memoryview) -> None:
        with self._sending:
            if self._closed:
                return
            frame = memoryview(HEADER.pack(len(body), kind, 0, number) + bytes(body))
            if not self._queue:
                try:
                    frame = frame[os.write(self._descriptor, frame) :]
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError as problem:
                    self._end(str(problem))
                    return
            if frame:
                self._queue.append(frame)
                self._queued += len(frame)
                with suppress(BlockingIOError):
                    os.write(self._more, b"\0")
            too_much = self._queued > _QUEUE_MAX
        if too_much:
            self._end("the other side does not read")

    def _write_loop(self) -> None:
        idle = select.poll()
        idle.register(self._more_end, select.POLLIN)
        idle.register(self._wake_end, select.POLLIN)
        busy = select.poll()
        busy.register(self._descriptor, select.POLLOUT)
        busy.register(self._wake_end, select.POLLIN)
        while not self._closed:
            if not self._queue:
                idle.poll()
                with suppress(BlockingIOError):
                    os.read(self._more_end, 4096)
                continue
            busy.poll()
            with self._sending:
                while self._queue and not self._closed:
                    try:
                        count = os.write(self._descriptor, self._queue[0])
                    except (BlockingIOError, InterruptedError):
                        break
                    except OSError as problem:
                        self._end(str(problem))
                        return
                    self._queued -= count
                    if count == len(self._queue[0]):
                        self._queue.popleft()
                    else:
                        self._queue[0] = self._queue[0][count:]

    # Receiving

    def _read_loop(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._wake_end, select.POLLIN)
        problem: str | None = None
        try:
            while (header := self._exactly(poll, HEADER.size)) is not None:
                length, kind, reserved, number = HEADER.unpack(header)
                if length > BODY_MAX or reserved or not Frame.REQUEST <= kind <= Frame.WINDOW:
                    raise ContainerError("protocol", f"a frame of type {kind} and {length} bytes")
                body = self._exactly(poll, length)
                if body is None:
                    raise ContainerError("protocol", "a frame was cut off")
                self._take(Frame(kind), number, body)
        except (CsvfastError, OSError) as found:
            problem = str(found)
        finally:
            self._end(problem)

    def _exactly(self, poll: select.poll, length: int) -> bytearray | None:
        """None: the end, before the first byte or by close()."""
        buffer = bytearray(length)
        view, count = memoryview(buffer), 0
        while count < length:
            try:
                got = os.readv(self._descriptor, [view[count:]])
            except (BlockingIOError, InterruptedError):
                poll.poll()
                if self._closed:
                    return None
                continue
            if not got:
                if count:
                    raise ContainerError("protocol", "a frame was cut off")
                return None
            count += got
        return buffer

    def _take(self, kind: Frame, number: int, body: bytearray) -> None:
        if kind in _STREAMS:
            self._take_stream((kind, number), body)
        elif kind is Frame.WINDOW:
            if len(body) != _GRANT.size:
                raise ContainerError("protocol", f"WINDOW of {len(body)} bytes; expected {_GRANT.size}")
            stream, flags, granted = _GRANT.unpack(body)
            with self.changed:
                writer = self._writers.get((stream, number))
                if writer is not None:
                    writer._credit += granted
                    writer._refused |= bool(flags & _NOBODY_READS)
                    if writer._credit > BODY_MAX:
                        raise ContainerError("protocol", "more credit than was ever used")
                    self.changed.notify_all()
        elif kind is Frame.REPLY:
            reply = decode_object(body, "reply")
            with self.changed:
                if number in self._replies:  # who asked may have given up
                    self._replies[number] = reply
                    self.changed.notify_all()
        elif kind is Frame.EVENT:
            event = decode_object(body, "event")
            if self._on_event is not None:
                self._on_event(event)
        else:
            self._take_request(number, body)

    def _take_stream(self, key: tuple[int, int], body: bytearray) -> None:
        with self.changed:
            if key in self._forgotten:
                return
            reader = self._reader(key)
            if reader._ended:
                raise ContainerError("protocol", f"more of {reader.kind.name} after its end")
            if not body:
                reader._ended = True
            else:
                reader._waiting += len(body)
                if reader._waiting + reader._taken > WINDOW:
                    raise ContainerError("protocol", f"more of {reader.kind.name} than was granted")
                last = reader._chunks[-1] if reader._chunks else None
                if last is not None and len(last) + len(body) <= _SMALL:
                    reader._chunks[-1] = memoryview(bytes(last) + body)
                else:
                    reader._chunks.append(memoryview(body))
            self.changed.notify_all()

    def _reader(self, key: tuple[int, int]) -> StreamReader:
        reader = self._readers.get(key)
        if reader is None:
            if key[0] not in _STREAMS:
                raise ContainerError("protocol", f"{key[0]!r} is no stream")
            if len(self._readers) >= STREAMS_MAX:
                raise ContainerError("limit", f"more than {STREAMS_MAX} streams")
            reader = self._readers[key] = StreamReader(self, Frame(key[0]), key[1])
        return reader

    def _forget_reader(self, key: tuple[int, int]) -> None:
        if self._readers.pop(key, None) is not None:
            self._forgotten[key] = None
            if len(self._forgotten) > _FORGOTTEN_MAX:
                self._forgotten.popitem(last=False)

    def _take_request(self, tag: int, body: bytearray) -> None:
        if self._handler is None:
            raise ContainerError("protocol", "a request to a side that answers none")
        with self.changed:
            full = self._serving >= REQUESTS_MAX
            if not full:
                self._serving += 1
        if full:
            self._reply_error(tag, "limit", f"more than {REQUESTS_MAX} requests at a time")
            return
        threading.Thread(target=self._serve, args=(tag, body), name=f"{self._name}-request", daemon=True).start()

    def _serve(self, tag: int, body: bytearray) -> None:
        try:
            request = decode_object(body, "request")
            method, parameters = request.get("method"), request.get("parameters", {})
            if not isinstance(method, str) or not isinstance(parameters, dict) or len(request) > 2:
                raise ContainerError("protocol", "expected method, a text, and parameters, an object")
            assert self._handler is not None
            result = self._handler(method, parameters)
            reply = json.dumps({"result": dict(result or {})}, separators=(",", ":")).encode()
            if len(reply) > BODY_MAX:
                raise ContainerError("limit", f"the reply to {method} has {len(reply)} bytes; at most {BODY_MAX} go")
        except ContainerError as refusal:
            self._reply_error(tag, refusal.kind, refusal.problem)
        except CsvfastError as refusal:
            self._reply_error(tag, "state", f"{type(refusal).__name__}: {refusal}")
        except Exception as defect:  # one request's failure is not the connection's
            self._reply_error(tag, "state", f"{type(defect).__name__}: {defect}")
        else:
            self._send(Frame.REPLY, tag, reply)
        finally:
            with self.changed:
                self._serving -= 1
                self.changed.notify_all()

    def _reply_error(self, tag: int, kind: str, message: str) -> None:
        error = {"error": {"kind": kind, "message": message[:MESSAGE_MAX]}}
        self._send(Frame.REPLY, tag, json.dumps(error, separators=(",", ":")).encode())

    def _end(self, problem: str | None) -> None:
        with self.changed:
            if not self._closed:
                self._closed = True
                self.problem = problem
                with suppress(OSError):
                    os.write(self._wake, b"\0")
                if stat.S_ISSOCK(os.fstat(self._descriptor).st_mode):  # the other side learns of it now, not at close()
                    with suppress(OSError), socket.fromfd(self._descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as end:
                        end.shutdown(socket.SHUT_RDWR)
            self.changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _printable(text: object, limit: int) -> str:
    """What the other side says, for a person's terminal: nothing in it moves the cursor or begins a line of its own."""
    return "".join(one if one.isprintable() else "?" for one in str(text)[:limit])


def _why(problem: str | None) -> str:
    return f": {problem}" if problem else ""
