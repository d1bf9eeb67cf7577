"""A sandbox: one launched guest, the wire to the agent in it, and the containers that the agent runs.

    with Sandbox(plan, work=directory) as sandbox:
        sandbox.launch()                              # machine, measurement, agent
        sandbox.pull("docker://host/name:tag")        # the agent fetches, asks the broker, decrypts, unpacks: in the guest
        container = sandbox.create("c1", {"args": ["/bin/hello"]})
        container.attach(None, 1, 2)
        container.start()
        code = container.wait()

The host passes on requests and bytes. It sees no key and no layer in the clear, and the agent's policy, which is measured,
decides what of its requests is done.

Thread-safety: any thread; launch() once.
"""

from __future__ import annotations

import base64
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.errors import ContainerError
from csvfast.runtime.executor import POLICY, Executor, Guest, Launch, LaunchPlan
from csvfast.runtime.host import HostMachine
from csvfast.runtime.protocol import Connection, Frame, StreamReader
from csvfast.runtime.timings import Timings

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.report.policy import GuestPolicy

__all__ = ["Container", "Sandbox", "SandboxPlan"]

CHUNK: Final = 64 << 10
AGENT_SECONDS: Final = 180.0  # a guest on an emulated processor boots slowly
REQUEST_SECONDS: Final = 30.0
PULL_SECONDS: Final = 3600.0
FAREWELL_SECONDS: Final = 3.0
DRAIN_SECONDS: Final = 10.0  # for output that is under way when its process has ended
LOST: Final = 137  # exit code of a container whose guest was ended: as by SIGKILL


@dataclass(frozen=True, kw_only=True)
class SandboxPlan:
    """What a sandbox is made of.

    identifier     its name
    configuration  the agent's, as JSON; measured
    chip           state directory of a simulated chip; None = a new one
    dram           file that is the DRAM, kept; None = anonymous memory
    The others as in LaunchPlan.
    """

    identifier: str
    configuration: bytes
    chip: Path | None = None
    dram: Path | None = None
    memory: int = 256 << 20
    window: str = ""
    expected: bytes | None = None
    policy: GuestPolicy = POLICY
    settings: Mapping[str, Any] = field(default_factory=dict)


class Sandbox:
    """See the module.

    In: executor   what it runs on. work: private directory for the executor's files
        timings    gets the steps. console: gets the guest's console, where it has one
    Attributes: plan, executor, timings; launch_record: what was launched, None before.
    """

    def __init__(
        self,
        plan: SandboxPlan,
        executor: Executor,
        work: Path,
        *,
        timings: Timings | None = None,
        console: Callable[[bytes], object] | None = None,
    ) -> None:
        self.plan = plan
        self.executor = executor
        self.timings = Timings() if timings is None else timings
        self.launch_record: Launch | None = None
        self.containers: dict[str, Container] = {}
        self._work = work
        self._console = console
        self._host: HostMachine | None = None
        self._guest: Guest | None = None
        self._connection: Connection | None = None
        self._lock = threading.RLock()
        self._closed = False

    # ---- Launch

    def launch(self) -> Launch:
        """Launches the guest and waits for its agent. On any failure everything is gone again.

        Raises: VerificationError, FirmwareError: it is not what it should be, nothing of it ever ran. ContainerError: it ended
            before its agent answered, with what is known of the reason. StateError (the chip is in use), OSError.
        """
        plan = self.plan
        launch = LaunchPlan(
            configuration=plan.configuration, memory=plan.memory, window=plan.window, work=self._work,
            expected=plan.expected, console=self._console, policy=plan.policy, settings=plan.settings,
        )  # fmt: skip
        try:
            with self.timings.step("machine"):
                self._host = HostMachine(self.executor.room(launch), chip=plan.chip, dram=plan.dram)
            with self.timings.step("measure and launch"):
                self._guest = guest = self.executor.start(self._host, launch)
            self.launch_record = guest.launch
            descriptor, guest.descriptor = guest.descriptor, -1
            self._connection = Connection(descriptor, name="csvfast-agent-wire")
            with self.timings.step("agent starts"):
                certificates = base64.b64encode(self._host.certificates).decode()
                self.request(
                    "CreateSandbox", {"sandbox": plan.identifier, "certificates": certificates}, timeout=AGENT_SECONDS
                )
        except BaseException:
            self.close()
            raise
        return guest.launch

    def request(self, method: str, parameters: Mapping[str, Any], *, timeout: float | None = REQUEST_SECONDS) -> dict[str, Any]:
        """Asks the agent. ContainerError: what it refuses, or why it cannot be asked any more."""
        connection = self._connection
        if connection is None:
            raise ContainerError("state", "the sandbox does not run")
        try:
            return connection.request(method, parameters, timeout)
        except ContainerError as problem:
            if problem.kind == "protocol" and connection.is_closed:
                raise ContainerError("executor", f"the guest ended during {method}: {self.reason()}") from problem
            raise

    @property
    def guest(self) -> Guest:
        """The launched guest. ContainerError: there is none."""
        if self._guest is None:
            raise ContainerError("state", "the sandbox has not been launched")
        return self._guest

    @property
    def host(self) -> HostMachine:
        """The machine below. ContainerError: there is none."""
        if self._host is None:
            raise ContainerError("state", "the sandbox has not been launched")
        return self._host

    @property
    def connection(self) -> Connection:
        """The wire to the agent. ContainerError: there is none."""
        if self._connection is None:
            raise ContainerError("state", "the sandbox does not run")
        return self._connection

    @property
    def running(self) -> bool:
        """Whether its agent can be asked."""
        return self._connection is not None and not self._connection.is_closed

    def reason(self) -> str:
        """What is known about the guest's end."""
        guest = self._guest
        if guest is None:
            return "it was not started"
        guest.wait(2.0)  # its last words may be under way
        return "".join(one if one.isprintable() else " " for one in guest.reason())  # a console's words, for a terminal

    # ---- Containers

    def pull(self, image: str, source: str | None = None) -> dict[str, Any]:
        """Has the agent fetch, decrypt and unpack an image inside of the guest.

        In: image   as the agent's policy knows it. source: where it is fetched from instead, a mirror of this host's
        Out: what the agent says of it. Raises ContainerError: "policy", "attestation", "broker", "image", "limit", ...
        """
        parameters = {"image": image}
        if source is not None:
            parameters["source"] = source
        with self.timings.step("pull"):
            return self.request("PullImage", parameters, timeout=PULL_SECONDS)

    def create(self, identifier: str, image: str, process: Mapping[str, Any] | None = None, *, stdin: bool = False) -> Container:
        """Has the agent make a container of an image that was pulled.

        In: process   what replaces the image's own: args, env, ...
        """
        parameters: dict[str, Any] = {"container": identifier, "image": image, "stdin": stdin}
        if process:
            parameters["process"] = dict(process)
        with self.timings.step("create container"):
            answer = self.request("CreateContainer", parameters)
        container = Container(self, identifier, _number(answer, "CreateContainer"), stdin)
        with self._lock:
            self.containers[identifier] = container
        return container

    def fetch_timings(self) -> None:
        """Adds the agent's own steps to the timings, if it tells them."""
        with suppress(ContainerError):
            found = self.request("GetTimings", {}, timeout=FAREWELL_SECONDS)
            self.timings.guest(found.get("timings", found.get("steps", [])))

    def record(self) -> dict[str, Any]:
        """For JSON; no secrets."""
        launch = self.launch_record
        record: dict[str, Any] = {"executor": self.executor.name, "statement": self.executor.statement()}
        if launch is not None:
            record |= {
                "digest": launch.digest.hex(),
                "policy": f"{self.plan.policy.value:#010x}",
                "chip": self._host.chip.chip_id if self._host is not None else None,
                "pieces": [{"name": name, "bytes": size, "sm3": digest} for name, size, digest in launch.pieces],
            }
        if self._guest is not None:
            record |= self._guest.details()
        return record

    def close(self) -> None:
        """Ends containers, agent and guest; keys are erased, files removed. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        connection, guest, host = self._connection, self._guest, self._host
        if connection is not None:
            if not connection.is_closed:
                with suppress(ContainerError):
                    connection.request("DestroySandbox", {}, FAREWELL_SECONDS)
            if guest is not None:
                guest.stop()
            connection.close(0.0)
        elif guest is not None:
            guest.stop()
            if guest.descriptor >= 0:
                os.close(guest.descriptor)
                guest.descriptor = -1
        for container in list(self.containers.values()):
            container.lost()
        if host is not None:
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Container:
    """One container of a sandbox.

    Attributes: identifier; process: its number on the wire; status: "created", "running", "stopped"; exit_code: None before the
        end; problem: why it was lost, None otherwise; unwritten: why some of its output was, but for a reader that went away.
    """

    def __init__(self, sandbox: Sandbox, identifier: str, process: int, stdin: bool) -> None:
        self.identifier = identifier
        self.process = process
        self.status = "created"
        self.exit_code: int | None = None
        self.problem: str | None = None
        self.unwritten: str | None = None
        self.ended: Callable[[Container], object] | None = None
        self._sandbox = sandbox
        self._stdin = stdin
        self._input: int | None = None
        self._outputs: dict[Frame, Callable[[bytes], object] | int | None] = {Frame.STDOUT: None, Frame.STDERR: None}
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._wake_out, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def attach(
        self,
        stdin: int | None,
        stdout: Callable[[bytes], object] | int | None,
        stderr: Callable[[bytes], object] | int | None,
    ) -> None:
        """Where its streams go: descriptors, which stay the caller's, or functions that get the bytes; None: nowhere.

        To be called before start().
        """
        self._input = stdin
        self._outputs = {Frame.STDOUT: stdout, Frame.STDERR: stderr}

    def start(self) -> None:
        """Starts it. Raises ContainerError."""
        with self._lock:
            if self.status != "created":
                raise ContainerError("state", f"container {self.identifier} is {self.status}; expected a created one")
            self.status = "running"
        connection = self._sandbox.connection
        pumps = []
        for kind, target in self._outputs.items():
            reader = connection.reader(kind, self.process)
            pump = threading.Thread(target=self._pump, args=(reader, target), name=f"csvfast-{kind.name.lower()}", daemon=True)
            pumps.append(pump)
        try:
            with self._sandbox.timings.step("start container"):
                self._sandbox.request("StartContainer", {"container": self.identifier})
        except BaseException:
            with self._lock:
                self.status = "created"
            raise
        self._sandbox.timings.mark("container started")
        for pump in pumps:
            pump.start()
        if self._stdin:
            threading.Thread(target=self._feed, args=(connection,), name="csvfast-stdin", daemon=True).start()
        threading.Thread(target=self._wait, args=(pumps,), name="csvfast-wait", daemon=True).start()

    def signal(self, number: int) -> None:
        """Sends it a signal. Raises ContainerError."""
        if self.status == "stopped":
            raise ContainerError("state", f"container {self.identifier} has stopped")
        self._sandbox.request("SignalProcess", {"container": self.identifier, "process": self.process, "signal": number})

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code; None: it has not ended after `seconds`."""
        return self.exit_code if self._done.wait(seconds) else None

    def remove(self) -> None:
        """Has the agent forget it. Raises ContainerError."""
        self._sandbox.request("RemoveContainer", {"container": self.identifier})
        self._sandbox.containers.pop(self.identifier, None)
        self._finish(LOST, None)

    def lost(self) -> None:
        """Its guest is gone."""
        self._finish(LOST, "the sandbox was ended")

    def _wait(self, pumps: list[threading.Thread]) -> None:
        problem = None
        try:
            answer = self._sandbox.request("WaitProcess", {"container": self.identifier, "process": self.process}, timeout=None)
            code = answer.get("exit_code")
            if type(code) is not int or not 0 <= code <= 255:
                code, problem = LOST, f"the agent tells exit code {code!r}"
        except ContainerError as lost:
            code, problem = LOST, lost.problem
        end = time.monotonic() + DRAIN_SECONDS
        for pump in pumps:
            pump.join(max(0.0, end - time.monotonic()))
        self._finish(code, problem)

    def _finish(self, code: int, problem: str | None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self.exit_code, self.problem, self.status = code, problem, "stopped"
            self._sandbox.timings.mark("container ended")
            os.close(self._wake)  # whoever waits for input wakes
            self._done.set()
        if self.ended is not None:
            self.ended(self)

    def _pump(self, reader: StreamReader, target: Callable[[bytes], object] | int | None) -> None:
        while chunk := reader.read(CHUNK):
            self._sandbox.timings.mark("first output")
            try:
                if callable(target):
                    target(chunk)
                elif target is not None:
                    left = memoryview(chunk)
                    while left:
                        left = left[os.write(target, left) :]
            except (OSError, ValueError) as problem:  # nobody listens any more: the program in there is told, as by a pipe
                if not isinstance(problem, BrokenPipeError):
                    self.unwritten = str(problem)
                reader.close()
                return

    def _feed(self, connection: Connection) -> None:
        writer = connection.writer(Frame.STDIN, self.process)
        source = self._input
        try:
            if source is not None:
                poll = select.poll()
                poll.register(source, select.POLLIN)
                poll.register(self._wake_out, select.POLLIN)
                while not any(number == self._wake_out for number, _ in poll.poll()):
                    chunk = os.read(source, CHUNK)
                    if not chunk:
                        break
                    writer.write(chunk)
        except OSError:  # it reads no more, or nothing more comes
            pass
        finally:
            writer.close()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._wake_out)
            if not self._done.is_set():
                os.close(self._wake)


def _number(answer: Mapping[str, Any], method: str) -> int:
    number = answer.get("process")
    if type(number) is not int or not 0 <= number <= 0xFFFFFFFF:
        raise ContainerError("protocol", f"the reply to {method} names process {number!r}")
    return number
