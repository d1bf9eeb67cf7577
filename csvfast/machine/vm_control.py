"""The control socket of the preload library: one request per line, one answer per line (docs/encrypted-ram.md).

Thread-safety: any thread; requests go one after another.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any, Final

from csvfast.errors import StateError

__all__ = ["MemoryControl"]

ANSWER_MAX: Final = 1 << 20


class MemoryControl:
    """Speaks to the memory of one guest. Offsets are bytes from the start of its RAM.

    Raises: StateError: it answers with an error, not at all, or with something else.
    """

    def __init__(self, path: Path, *, seconds: float = 60.0) -> None:
        self.path = path
        self._seconds = seconds
        self._guard = threading.Lock()
        self._socket: socket.socket | None = None

    def ready(self) -> bool:
        """Whether the library listens by now."""
        try:
            self.stats()
        except StateError:
            return False
        return True

    def evict(self, offset: int, length: int) -> None:
        """These pages leave the window; the next touch decrypts what then stands in the DRAM."""
        self._expect_ok(f"evict {offset} {length}")

    def flush(self) -> None:
        """Everything that the guest changed is in the DRAM, encrypted."""
        self._expect_ok("flush")

    def stats(self) -> dict[str, Any]:
        """The counters of the window."""
        answer = self.ask("stats")
        try:
            found = json.loads(answer)
        except ValueError:
            raise StateError(f"memory control: {answer[:80]!r}; expected JSON") from None
        if isinstance(found, list):
            found = found[0] if found else {}
        if not isinstance(found, dict):
            raise StateError(f"memory control: {answer[:80]!r}; expected an object")
        return found

    def ask(self, request: str) -> str:
        """Sends a line and returns the answer's, without its end. A connection that others have pushed out is made anew, once."""
        with self._guard:
            if self._socket is not None:
                try:
                    answer = self._exchange(request)
                except (OSError, StateError):
                    answer = self._exchange_or_drop(request)
            else:
                answer = self._exchange_or_drop(request)
        text = answer.decode(errors="replace").rstrip("\n")
        if text.startswith("error"):
            raise StateError(f"memory control: {text.removeprefix('error').strip()}")
        return text

    def _exchange_or_drop(self, request: str) -> bytes:
        self._drop()
        try:
            return self._exchange(request)
        except OSError as problem:
            self._drop()
            raise StateError(f"memory control: {problem}") from None
        except BaseException:
            self._drop()
            raise

    def _exchange(self, request: str) -> bytes:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(self._seconds)
            self._socket.connect(os.fspath(self.path))
        self._socket.sendall(request.encode() + b"\n")
        answer = bytearray()
        while not answer.endswith(b"\n"):
            chunk = self._socket.recv(65536)
            if not chunk or len(answer) > ANSWER_MAX:
                raise StateError("memory control: the connection ended within an answer")
            answer += chunk
        return bytes(answer)

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        with self._guard:
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _expect_ok(self, request: str) -> None:
        answer = self.ask(request)
        if answer != "ok":
            raise StateError(f"memory control: {answer[:80]!r}; expected 'ok'")
