"""A running machine's socket, by which other commands of the same user ask for its state, its end or a dump.

One request line, one answer line of JSON, and the connection ends: "status", "stop", "dump PATH" (absolute). An answer is
{"ok": ...} or {"error": "text"}. The socket, mode 0600, is `vm.sock` in the machine's run directory.

Thread-safety: a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import CsvfastError, StateError
from csvfast.machine.vm_files import clean, run_root
from csvfast.processor.protocol import peer_user

if TYPE_CHECKING:
    from csvfast.machine.vm import CsvVm

__all__ = ["SOCKET", "VmDoor", "ask", "machines"]

SOCKET: Final = "vm.sock"
REQUEST_MAX: Final = 8192
REQUEST_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 600.0


class VmDoor:
    """Serves one machine until close(). Raises OSError."""

    def __init__(self, machine: CsvVm, folder: Path) -> None:
        self._machine = machine
        self._path = folder / SOCKET
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC)
        try:
            self._listener.bind(os.fspath(self._path))  # nobody else gets into its directory
            self._path.chmod(0o600)
            self._listener.listen(8)
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._serve, name="csvfast-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        os.write(self._wake_out, b"\0")
        self._thread.join(30)
        self._close()

    def _close(self) -> None:
        self._listener.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_in, selectors.EVENT_READ)
            while not any(key.fileobj == self._wake_in for key, _ in selector.select()):
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    with connection:
                        if peer_user(connection) == os.geteuid():
                            self._exchange(connection)

    def _exchange(self, connection: socket.socket) -> None:
        connection.settimeout(REQUEST_SECONDS)
        request = bytearray()
        while not request.endswith(b"\n"):
            chunk = connection.recv(REQUEST_MAX)
            if not chunk or len(request) > REQUEST_MAX:
                return
            request += chunk
        connection.sendall(json.dumps(self._answer(os.fsdecode(bytes(request[:-1])))).encode() + b"\n")

    def _answer(self, request: str) -> dict[str, Any]:
        word, _, rest = request.partition(" ")
        try:
            if word == "status" and not rest:
                return {"ok": self._machine.status()}
            if word == "stop" and not rest:
                self._machine.request_stop()
                return {"ok": {"name": self._machine.name}}
            if word == "dump" and rest.startswith("/"):
                self._machine.dump(rest)
                return {"ok": {"path": rest, "address": self._machine.address}}
        except (CsvfastError, OSError, ValueError) as problem:
            return {"error": str(problem)}
        return {"error": f"{word[:20]!r} is no request; expected status, stop or dump /PATH"}


def machines(root: Path | None = None) -> list[str]:
    """Names of the machines that run; what dead ones left is removed."""
    root = run_root() if root is None else root
    clean(root)
    return sorted(path.name for path in root.iterdir() if (path / SOCKET).exists())


def ask(name: str, request: str, root: Path | None = None) -> dict[str, Any]:
    """Sends a request to a running machine. Raises StateError: no such machine, it refuses, no answer."""
    root = run_root() if root is None else root
    if not name or "/" in name or name.startswith("."):
        raise StateError(f"{name[:40]!r} is no machine's name")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(os.fspath(root / name / SOCKET))
            connection.sendall(os.fsencode(request) + b"\n")
            with connection.makefile("rb") as stream:
                answer = json.loads(stream.readline())
    except (FileNotFoundError, ConnectionRefusedError):
        raise StateError(f"no machine {name} runs") from None
    except (OSError, ValueError) as problem:
        raise StateError(f"machine {name} does not answer: {problem}") from None
    if "error" in answer:
        raise StateError(f"machine {name}: {answer['error']}")
    found: dict[str, Any] = answer["ok"]
    return found
