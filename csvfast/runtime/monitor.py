"""The monitor of one sandbox: the process that owns platform, guest and wire, and answers the other commands of its user.

    `csvfast run`              is the monitor of its container itself
    `csvfast runtime create`   starts one that lives on (python -c ...: start_monitor) and ends with the container's exit code

It listens on control.sock in the container's state directory (mode 0700; peers of other users are turned away). One request line
of JSON, one answer line: {"request": "state" | "start" | "kill" | "wait" | "delete" | "timings", "id", ...}.

When it is killed, the kernel kills the agent or QEMU with it, and with those the containers; what is left on disk is ciphertext
and sockets, which the next command removes.

Thread-safety: a Monitor belongs to the thread that made it; requests are served by threads of their own.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from csvfast.errors import ContainerError, CsvfastError, FirmwareError, ImageError, VerificationError
from csvfast.runtime.executor import choose_executor
from csvfast.runtime.options import RunOptions, configuration_for, loopback_of, sandbox_plan_of
from csvfast.runtime.sandbox import Container, Sandbox
from csvfast.runtime.state import CONTROL, OCI_VERSION, ContainerDirectory, state_root
from csvfast.runtime.timings import Timings

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.runtime.executor import Executor

__all__ = ["Monitor", "ask", "start_monitor"]

REQUEST_MAX: Final = 1 << 20
REQUEST_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 3600.0
START_SECONDS: Final = 3900.0
_KINDS: Final = frozenset(
    {"policy", "attestation", "broker", "image", "launch", "state", "limit", "executor", "protocol"}
)


class Monitor:
    """One sandbox with its first container, and those that join it.

    In: identifier   of sandbox and container. root: directory of all states
        transient    nobody asks for the state once the monitor is gone (`run`)
        bundle, annotations   for the state. pid: what the state names; None = this process
        said         gets lines for people: which executor, what it protects
    Attributes: sandbox, timings, executor.
    """

    def __init__(
        self,
        options: RunOptions,
        identifier: str,
        *,
        root: Path | None = None,
        transient: bool = False,
        bundle: str = "",
        annotations: Mapping[str, str] | None = None,
        timings: Timings | None = None,
        said: Callable[[str], object] | None = None,
        console: Callable[[bytes], object] | None = None,
    ) -> None:
        self.options = options
        self.timings = Timings() if timings is None else timings
        self.executor: Executor = choose_executor(options.executor)
        self.finished = threading.Event()
        self.image: dict[str, Any] = {}
        self._said = said or (lambda _line: None)
        self._console = console
        self._bundle, self._annotations = bundle, dict(annotations or {})
        self._exit = ExitStack()
        self._sandbox: Sandbox | None = None
        self._lock = threading.RLock()
        self._directory = ContainerDirectory(identifier, state_root() if root is None else root, transient=transient)
        self._made = False
        self._exit.callback(self._put_away)
        self.identifier = identifier
        try:
            self._door = self._exit.enter_context(_Door(self._directory.path, self._answer))
            self._write()
        except BaseException:
            self._exit.close()
            raise

    # ---- Making the container

    def create(self) -> Container:
        """Executor, image, configuration, launch, agent, container: up to status "created".

        Raises ContainerError, VerificationError, FirmwareError, ImageError, OSError, ...: nothing of it is left then.
        """
        try:
            container = self._create()
            self._made = True
        except BaseException:
            self.close()
            raise
        return container

    def _create(self) -> Container:
        from csvfast.runtime.image_cache import mirror_image

        options = self.options
        self._said(f"executor {self.executor.name}: {self.executor.statement()}")
        if options.broker and not options.broker_pin and not options.broker_ca and not options.configuration:
            self._said(f"nothing says which broker {options.broker} is: whoever answers there may hand out keys of his own")
        loopback = loopback_of(self.executor)
        mirror = self._exit.enter_context(mirror_image(options, loopback, self.timings))
        configuration = configuration_for(options, mirror.name, mirror.digest, loopback).encode()
        plan = sandbox_plan_of(options, self.identifier, configuration)
        sandbox = Sandbox(plan, self.executor, self._directory.work, timings=self.timings, console=self._console)
        with self._lock:
            self._sandbox = self._exit.enter_context(sandbox)
        launch = sandbox.launch()
        self._said(f"launch digest {launch.digest.hex()}")
        self._write()
        self.image = sandbox.pull(mirror.name, mirror.source)
        container = sandbox.create(self.identifier, mirror.name, options.process(), stdin=options.stdin)
        container.ended = self._ended
        self._write()
        return container

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox. ContainerError: there is none yet."""
        if self._sandbox is None:
            raise ContainerError("state", "the sandbox is being made")
        return self._sandbox

    @property
    def container(self) -> Container:
        """The first container. ContainerError: there is none."""
        return self._find(self.identifier)

    def _find(self, identifier: str) -> Container:
        container = self.sandbox.containers.get(identifier)
        if container is None:
            raise ContainerError("state", f"there is no container {identifier}")
        return container

    def _ended(self, _container: Container) -> None:
        self._write()
        sandbox = self._sandbox
        if sandbox is None or all(one.status == "stopped" for one in sandbox.containers.values()):
            self.finished.set()

    # ---- State

    def state(self) -> dict[str, Any]:
        """As the OCI runtime specification has it, and more under "csvfast"."""
        sandbox = self._sandbox
        container = None if sandbox is None else sandbox.containers.get(self.identifier)
        record: dict[str, Any] = {
            "ociVersion": OCI_VERSION,
            "id": self.identifier,
            "status": "creating" if container is None else container.status,
            "bundle": self._bundle,
            "annotations": self._annotations,
        }
        if record["status"] != "stopped":
            record["pid"] = os.getpid()
        more: dict[str, Any] = {"monitor": os.getpid(), "image": self.options.image, "executor": self.executor.name}
        more["statement"] = self.executor.statement()
        if sandbox is not None:
            more |= sandbox.record()
        if container is not None and container.exit_code is not None:
            more["exitCode"] = container.exit_code
            if container.problem:
                more["problem"] = container.problem
        return {**record, "csvfast": more}

    def _write(self) -> None:
        with self._lock:
            self._directory.write(self.state())

    # ---- Requests of other commands

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        what, identifier = request.get("request"), str(request.get("id", self.identifier))
        if what == "state":
            return self.state()
        if what == "start":
            self._find(identifier).start()
            self._write()
            return {}
        if what == "kill":
            number = request.get("signal")
            if type(number) is not int or not 1 <= number < signal.NSIG:
                raise ContainerError("state", f"signal {number!r}; expected 1 to {signal.NSIG - 1}")
            self._kill(identifier, number)
            return {}
        if what == "wait":
            code = self._find(identifier).wait(request.get("seconds"))
            return {"exit_code": code}
        if what == "delete":
            if identifier == self.identifier:
                container = None if self._sandbox is None else self._sandbox.containers.get(identifier)
                if not request.get("force") and (container is None or container.status != "stopped"):
                    status = "being made" if container is None else container.status
                    raise ContainerError("state", f"container {identifier} is {status}; expected a stopped one, or force")
                self.finished.set()
            else:
                self._find(identifier).remove()
            return {}
        if what == "timings":
            if self._sandbox is not None:
                self._sandbox.fetch_timings()
            return self.timings.record()
        raise ContainerError("protocol", f"request {str(what)[:40]!r} is unknown")

    def _kill(self, identifier: str, number: int) -> None:
        container = self._find(identifier)
        if container.status == "created" and number in (signal.SIGKILL, signal.SIGTERM):
            container.lost()  # it never ran: nothing of it is left when the sandbox ends
            return
        try:
            container.signal(number)
        except ContainerError:
            if number != signal.SIGKILL or container.status == "stopped":
                raise
            self.finished.set()  # an agent that does not obey: the guest is ended, and the container with it

    # ---- The end

    def _put_away(self) -> None:
        if self._made:
            self._directory.release()
        else:  # there never was such a container
            self._directory.remove()

    def close(self) -> None:
        """Ends everything: containers, agent, guest, registry; keys erased, files removed, the state stays. Idempotent."""
        self.finished.set()
        sandbox = self._sandbox
        if sandbox is not None:
            sandbox.close()
            with suppress(OSError):
                self._write()
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Door:
    """The control socket: a thread that accepts, and one for each connection, since waiting takes long."""

    def __init__(self, folder: Path, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
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
            while not request.endswith(b"\n"):
                chunk = connection.recv(65536)
                if not chunk or len(request) > REQUEST_MAX:
                    return
                request += chunk
            connection.sendall(json.dumps(self._reply(request)).encode() + b"\n")

    def _reply(self, request: bytearray) -> dict[str, Any]:
        try:
            document = json.loads(request)
            if not isinstance(document, dict):
                raise ContainerError("protocol", "expected a JSON object")
            return {"ok": self._answer(document)}
        except Exception as problem:
            return {"error": error_record(problem)}

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


def ask(root: Path, identifier: str, request: str, *, timeout: float = ANSWER_SECONDS, **more: Any) -> dict[str, Any]:
    """Sends a request to a container's monitor. ContainerError: what it refuses; "state": there is no monitor."""
    path = root / identifier
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise ContainerError("state", f"there is no container {identifier}") from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(timeout)
            connection.connect(f"/proc/self/fd/{descriptor}/{CONTROL}")
            connection.sendall(json.dumps({"request": request, "id": identifier, **more}).encode() + b"\n")
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
        os.close(descriptor)
    if "error" in answer:
        raise_error(answer["error"])
    found: dict[str, Any] = answer["ok"]
    return found


# ---- A monitor that lives on ----------------------------------------------------------------------------------------

_LAUNCHER: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from csvfast.runtime.monitor import main
sys.exit(main(sys.argv[2:]))
"""


def start_monitor(
    options: RunOptions,
    identifier: str,
    *,
    root: Path,
    bundle: str = "",
    annotations: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> int:
    """Starts a process that makes the container, and waits until it has. Its standard streams become the container's.

    Returns: its process ID; it ends when the container has ended, with its exit code. Raises ContainerError; OSError.
    """
    setup = json.dumps(
        {
            "options": options.to_json(), "identifier": identifier, "root": str(root), "bundle": bundle,
            "annotations": dict(annotations or {}), "log": None if log is None else str(log.absolute()),
        }
    ).encode()  # fmt: skip
    setup_file = os.memfd_create("csvfast-setup", os.MFD_CLOEXEC)
    ready, tell = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(setup_file, setup)
        paths = [path for path in sys.path if path.startswith("/")]
        package = str(Path(__file__).resolve().parent.parent.parent)
        command = [sys.executable, "-I", "-c", _LAUNCHER, json.dumps(list(dict.fromkeys([*paths, package])))]
        process = subprocess.Popen(
            [*command, str(setup_file), str(tell)],
            pass_fds=[setup_file, tell],
            start_new_session=True,
            cwd="/",
        )
        os.close(tell)
        tell = -1
        with os.fdopen(ready, "rb") as stream:
            ready = -1
            line = stream.readline()
    finally:
        for descriptor in (setup_file, ready, tell):
            if descriptor >= 0:
                os.close(descriptor)
    if not line:
        code = process.wait()
        raise ContainerError("executor", f"the monitor ended with {code} before the container was made")
    answer = json.loads(line)
    if "error" in answer:
        process.wait()
        raise_error(answer["error"])
    process.returncode = 0  # it lives on; nobody here waits for it
    return process.pid


def main(arguments: Sequence[str]) -> int:
    """Of the process that start_monitor starts. In: descriptors of its setup and of the pipe that waits for "ready"."""
    setup_file, tell = map(int, arguments)
    os.lseek(setup_file, 0, os.SEEK_SET)
    with os.fdopen(setup_file, "rb") as file:
        setup = json.load(file)
    streams = [os.dup(number) for number in (0, 1, 2)]
    _away(setup["log"])
    os.set_inheritable(tell, False)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: ended.set())
    try:
        monitor = Monitor(
            RunOptions.from_json(setup["options"]), setup["identifier"], root=Path(setup["root"]), bundle=setup["bundle"],
            annotations=setup["annotations"], said=_log,
        )  # fmt: skip
    except BaseException as problem:
        os.write(tell, json.dumps({"error": error_record(problem)}).encode() + b"\n")
        return 1
    with monitor:
        try:
            container = monitor.create()
            container.attach(*streams)
            os.write(tell, b'{"ok": {}}\n')
        except BaseException as problem:
            _log(f"error: {problem}")
            with suppress(OSError):
                os.write(tell, json.dumps({"error": error_record(problem)}).encode() + b"\n")
            return 1
        os.close(tell)
        while not monitor.finished.wait(0.2):
            if ended.is_set():
                break
    for descriptor in streams:
        os.close(descriptor)
    return container.exit_code if container.exit_code is not None else 137


def _away(log: str | None) -> None:
    """Our own standard streams go to the log: 0, 1 and 2 were the container's."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    target = null if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(null, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    for descriptor in {null, target}:
        os.close(descriptor)


def _log(line: str) -> None:
    with suppress(OSError):
        print(json.dumps({"level": "error" if line.startswith("error") else "info", "msg": line}), file=sys.stderr, flush=True)
