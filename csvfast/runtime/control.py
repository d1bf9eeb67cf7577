"""A monitor's control socket, and how other commands ask there.

One request line of JSON, one answer line, and the connection ends: {"request": ..., "id": ...} and {"ok": {...}} or {"error":
{"kind", "message"}}. Descriptors may come with a request: a container's standard streams.

Thread-safety: a thread that accepts, and one for each connection, since waiting takes long; ask() from any.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from csvfast.errors import ContainerError, CsvfastError, FirmwareError, ImageError, VerificationError
from csvfast.runtime.state import CONTROL, check_identifier, read_state

__all__ = ["ControlDoor", "ask", "error_record", "raise_error"]

REQUEST_MAX: Final = 1 << 20
REQUEST_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 3600.0
DESCRIPTORS_MAX: Final = 3
_KINDS: Final = frozenset(
    {"policy", "attestation", "broker", "image", "launch", "state", "limit", "executor", "protocol"}
)

Answer = Callable[[Mapping[str, Any], list[int]], dict[str, Any]]
"""Gets a request and its descriptors; it takes those out of the list that it keeps."""


class ControlDoor:
    """The socket in a container's directory, until close(). In: answer   gives a request's result, or raises. OSError."""

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC)
        self._closed = False
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # A path of any length, by its directory's descriptor; nobody else gets into that.
            self._listener.bind(f"/proc/self/fd/{descriptor}/{CONTROL}")
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            os.close(self._wake_in)
            os.close(self._wake_out)
            raise
        finally:
            os.close(descriptor)
        self._thread = threading.Thread(target=self._serve, name="csvfast-control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_in, selectors.EVENT_READ)
            while not any(key.fileobj == self._wake_in for key, _ in selector.select()):
                with suppress(OSError, RuntimeError):
                    connection, _ = self._listener.accept()
                    threading.Thread(target=self._exchange, args=(connection,), name="csvfast-request", daemon=True).start()

    def _exchange(self, connection: socket.socket) -> None:
        from csvfast.processor.protocol import peer_user

        with connection, suppress(OSError):
            if peer_user(connection) != os.geteuid():
                return
            connection.settimeout(REQUEST_SECONDS)
            request = bytearray()
            descriptors: list[int] = []
            try:
                while not request.endswith(b"\n"):
                    chunk, more, _, _ = socket.recv_fds(connection, 65536, DESCRIPTORS_MAX)
                    descriptors += more
                    if not chunk or len(request) > REQUEST_MAX or len(descriptors) > DESCRIPTORS_MAX:
                        return
                    request += chunk
                given, descriptors = descriptors, []
                connection.sendall(json.dumps(self._reply(request, given)).encode() + b"\n")
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _reply(self, request: bytearray, descriptors: list[int]) -> dict[str, Any]:
        """What the answer takes of the descriptors it takes out of the list; the others are closed here."""
        try:
            document = json.loads(request)
            if not isinstance(document, dict):
                raise ContainerError("protocol", "expected a JSON object")
            return {"ok": self._answer(document, descriptors)}
        except Exception as problem:
            return {"error": error_record(problem)}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        """No more requests. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.write(self._wake_out, b"\0")
        if self._thread is not threading.current_thread():
            self._thread.join(10)
        self._listener.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.close()


def error_record(problem: BaseException) -> dict[str, str]:
    """An error for another process."""
    if isinstance(problem, ContainerError):
        return {"kind": problem.kind, "message": problem.problem}
    kind = "state"
    if isinstance(problem, ImageError):
        kind = "image"
    elif isinstance(problem, (VerificationError, FirmwareError)):
        kind = "launch"
    text = str(problem) if isinstance(problem, (CsvfastError, OSError)) else f"{type(problem).__name__}: {problem}"
    return {"kind": kind, "message": text}


def raise_error(record: object) -> NoReturn:
    """Raises ContainerError for what error_record made."""
    error = record if isinstance(record, dict) else {}
    kind = error.get("kind")
    raise ContainerError(kind if kind in _KINDS else "protocol", str(error.get("message", "no reason")))


def ask(
    root: Path,
    identifier: str,
    request: str,
    *,
    timeout: float = ANSWER_SECONDS,
    descriptors: Sequence[int] = (),
    monitor: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Sends a request to a container's monitor.

    In: monitor   of whose container it is; None = the container's own, or its sandbox's
    ContainerError: what it refuses; "state": there is no such container, or no monitor any more.
    """
    place = monitor
    if place is None:
        place = read_state(root, identifier)[0].get("csvfast", {}).get("sandbox") or identifier
    try:
        folder = os.open(root / check_identifier(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise ContainerError("state", f"there is no container {place}") from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(timeout)
            connection.connect(f"/proc/self/fd/{folder}/{CONTROL}")
            data = json.dumps({"request": request, "id": identifier, **more}).encode() + b"\n"
            sent = socket.send_fds(connection, [data], list(descriptors)) if descriptors else 0
            if sent < len(data):  # not even nothing: the answer may be there, and the connection closed
                connection.sendall(data[sent:])
            with connection.makefile("rb") as stream:
                line = stream.readline()
        if not line:
            raise ConnectionRefusedError
        answer = json.loads(line)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ContainerError("state", f"container {identifier} has no monitor any more") from None
    except (OSError, ValueError) as problem:
        raise ContainerError("protocol", f"the monitor of container {identifier} does not answer: {problem}") from None
    finally:
        os.close(folder)
    if "error" in answer:
        raise_error(answer["error"])
    found: dict[str, Any] = answer["ok"]
    return found
