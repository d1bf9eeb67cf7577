"""The monitor of one sandbox: the process that owns platform, guest and wire, and answers the other commands of its user.

    `csvfast run`              is the monitor of its container itself
    `csvfast runtime create`   starts one that lives on (python -c ...: start_monitor) and ends with the container's exit code

It answers requests (csvfast.runtime.control): state, start, kill, wait, delete, timings; and create, by which a container joins
the sandbox, a pod's second one and so on.

When it is killed, the kernel kills the agent or QEMU with it, and with those the containers; what is left on disk is ciphertext
and sockets, which the next command removes.

Thread-safety: a Monitor belongs to the thread that made it; requests are served by threads of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.errors import ContainerError
from csvfast.runtime.control import ControlDoor, error_record, raise_error
from csvfast.runtime.executor import choose_executor
from csvfast.runtime.options import RunOptions, configuration_for, loopback_of, sandbox_plan_of
from csvfast.runtime.sandbox import Container, Sandbox
from csvfast.runtime.state import OCI_VERSION, ContainerDirectory, state_root
from csvfast.runtime.timings import Timings

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.runtime.executor import Executor

__all__ = ["Monitor", "start_monitor"]

LOST: Final = 137


@dataclass
class _Member:
    """A container that joined the sandbox."""

    directory: ContainerDirectory
    container: Container
    options: RunOptions
    bundle: str
    annotations: dict[str, str]
    streams: list[int]

    def close_streams(self) -> None:
        while self.streams:
            os.close(self.streams.pop())


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
        self._members: dict[str, _Member] = {}
        self._root = state_root() if root is None else root
        self._lock = threading.RLock()
        self._directory = ContainerDirectory(identifier, self._root, transient=transient)
        self._made = False
        self._exit.callback(self._put_away)
        self.identifier = identifier
        try:
            self._door = self._exit.enter_context(ControlDoor(self._directory.path, self._answer))
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

    def _ended(self, container: Container) -> None:
        member = self._members.get(container.identifier)
        if member is not None:
            member.close_streams()
        with suppress(OSError):
            self._write(container.identifier)
        sandbox = self._sandbox
        if sandbox is None or all(one.status == "stopped" for one in list(sandbox.containers.values())):
            self.finished.set()

    def _join(self, identifier: str, request: Mapping[str, Any], descriptors: list[int]) -> None:
        """One more container in the sandbox. In: descriptors   its standard streams, kept"""
        from csvfast.runtime.image_cache import mirror_image

        if len(descriptors) != 3:
            raise ContainerError("protocol", f"create with {len(descriptors)} descriptors; expected three standard streams")
        sandbox, options = self.sandbox, RunOptions.from_json(request.get("options", {}))
        directory = ContainerDirectory(identifier, self._root)
        try:
            # The agent has fetched all of it when pull() is done.
            with mirror_image(options, loopback_of(self.executor), Timings()) as mirror:
                sandbox.pull(mirror.name, mirror.source)
                container = sandbox.create(identifier, mirror.name, options.process(), stdin=options.stdin)
        except BaseException:
            directory.remove()
            raise
        streams = [descriptors.pop(0) for _ in range(3)]
        annotations = {str(name): str(value) for name, value in dict(request.get("annotations", {})).items()}
        with self._lock:
            self._members[identifier] = _Member(
                directory, container, options, str(request.get("bundle", "")), annotations, streams
            )
        container.attach(streams[0] if options.stdin else None, streams[1], streams[2])
        container.ended = self._ended
        self._write(identifier)

    def _leave(self, identifier: str, *, force: bool) -> None:
        """A container that joined is deleted."""
        container = self._find(identifier)
        if container.status != "stopped" and not force:
            raise ContainerError("state", f"container {identifier} is {container.status}; expected a stopped one, or force")
        container.remove()
        with self._lock:
            member = self._members.pop(identifier)
        member.close_streams()
        member.directory.remove()

    # ---- State

    def state(self, identifier: str | None = None) -> dict[str, Any]:
        """As the OCI runtime specification has it, and more under "csvfast". In: identifier   None = of the first container"""
        name = identifier or self.identifier
        member, sandbox = self._members.get(name), self._sandbox
        if member is None and name != self.identifier:
            raise ContainerError("state", f"there is no container {name}")
        container = None if sandbox is None else sandbox.containers.get(name)
        record: dict[str, Any] = {
            "ociVersion": OCI_VERSION,
            "id": name,
            "status": "creating" if container is None else container.status,
            "bundle": self._bundle if member is None else member.bundle,
            "annotations": self._annotations if member is None else member.annotations,
        }
        if record["status"] != "stopped":
            record["pid"] = os.getpid()
        options = self.options if member is None else member.options
        more: dict[str, Any] = {"monitor": os.getpid(), "image": options.image, "executor": self.executor.name}
        if member is not None:
            more["sandbox"] = self.identifier
        more["statement"] = self.executor.statement()
        if sandbox is not None:
            more |= sandbox.record()
        if container is not None and container.exit_code is not None:
            more["exitCode"] = container.exit_code
            if container.problem:
                more["problem"] = container.problem
        return {**record, "csvfast": more}

    def _write(self, identifier: str | None = None) -> None:
        with self._lock:
            member = self._members.get(identifier or self.identifier)
            directory = self._directory if member is None else member.directory
            directory.write(self.state(identifier))

    # ---- Requests of other commands

    def _answer(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        what, identifier = request.get("request"), str(request.get("id", self.identifier))
        if what == "state":
            return self.state(identifier)
        if what == "create":
            self._join(identifier, request, descriptors)
            return {}
        if what == "start":
            self._find(identifier).start()
            self._write(identifier)
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
                self._leave(identifier, force=bool(request.get("force")))
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
            if number != signal.SIGKILL or container.status == "stopped" or identifier in self._members:
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
            for identifier, member in list(self._members.items()):
                with suppress(OSError):
                    self._write(identifier)
                member.close_streams()
                member.directory.release()
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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
    return container.exit_code if container.exit_code is not None else LOST


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
