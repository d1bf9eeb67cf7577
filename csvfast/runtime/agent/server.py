"""The agent: what the host asks for, done if the policy allows it.

Thread-safety: requests come in threads of their own; each container is changed by one of them at a time.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import ContainerError, CsvfastError, ImageError
from csvfast.runtime.agent.containers import Bundle, Runner
from csvfast.runtime.agent.processes import Process
from csvfast.runtime.agent.requests import Fields
from csvfast.runtime.agent.timings import StepTimes

if TYPE_CHECKING:
    from csvfast.runtime.agent.attest import CertifiedAttester
    from csvfast.runtime.agent.configuration import AgentConfiguration
    from csvfast.runtime.agent.pull import PulledImage
    from csvfast.runtime.protocol import Connection

__all__ = ["Agent"]

_IMAGES_MAX: Final = 32
_PROCESSES_MAX: Final = 64  # of a container, further ones
_CERTIFICATES_MAX: Final = 8192
_NEEDS_NO_SANDBOX: Final = frozenset({"CreateSandbox", "GetTimings", "DestroySandbox"})


@dataclass
class _Container:
    """A container: made, running, or ended."""

    bundle: Bundle
    first: Process
    own: tuple[str, ...]  # the image's own command
    base: dict[str, Any]  # the specification's process
    image: PulledImage
    others: dict[int, Process] = field(default_factory=dict)
    started: bool = False
    removed: bool = False
    starting: threading.Lock = field(default_factory=threading.Lock)  # nothing begins in it while or after it is removed

    def check_there(self) -> None:
        """To be asked under `starting`. ContainerError "state"."""
        if self.removed:
            raise ContainerError("state", f"container {self.bundle.identifier} is removed")


class Agent:
    """See the module.

    In: configuration  of the agent, measured
        runner         what runs containers; closed with the agent
        attester       of this machine
        work           private directory, in encrypted memory where there is some
        times          of the steps before
    """

    def __init__(
        self,
        configuration: AgentConfiguration,
        runner: Runner,
        attester: CertifiedAttester,
        work: Path,
        times: StepTimes | None = None,
    ) -> None:
        self.configuration, self.runner, self.attester, self.work = configuration, runner, attester, work
        self.policy = configuration.policy
        self.times = times or StepTimes()
        self.closing = False
        self.done = threading.Event()
        self._connection: Connection | None = None
        self._lock = threading.RLock()
        self._pulling = threading.Lock()
        self._sandbox: str | None = None
        self._hostname = ""
        self._images: dict[str, PulledImage] = {}
        self._containers: dict[str, _Container] = {}
        self._processes: dict[int, Process] = {}
        self._number = 0
        self._trees = 0
        self._methods: dict[str, Callable[[Fields], Mapping[str, Any] | None]] = {
            "CreateSandbox": self._create_sandbox,
            "DestroySandbox": self._destroy_sandbox,
            "PullImage": self._pull_image,
            "CreateContainer": self._create_container,
            "StartContainer": self._start_container,
            "ExecProcess": self._exec_process,
            "SignalProcess": self._signal_process,
            "WaitProcess": self._wait_process,
            "CloseStdin": self._close_stdin,
            "RemoveContainer": self._remove_container,
            "StatsContainer": self._stats_container,
            "GetTimings": self._get_timings,
        }

    def attach(self, connection: Connection) -> None:
        """The wire on which events and streams go."""
        self._connection = connection

    def handle(self, method: str, parameters: dict[str, Any]) -> Mapping[str, Any] | None:
        """Answers one request; csvfast.runtime.agent.requests has them all. Raises ContainerError."""
        answer = self._methods.get(method)
        if answer is None:
            raise ContainerError("protocol", f"method {method[:40]!r} is unknown")
        if self._sandbox is None and method not in _NEEDS_NO_SANDBOX:
            raise ContainerError("state", "there is no sandbox")
        fields = Fields(method, parameters)
        try:
            return answer(fields)
        except ImageError as problem:
            raise ContainerError("image", str(problem)) from problem
        except OSError as problem:
            raise ContainerError("state", f"{method}: {problem}") from problem

    def close(self) -> None:
        """Every program ends, every file goes. Idempotent."""
        self.closing = True
        with self._lock:
            containers, self._containers = list(self._containers.values()), {}
        for container in containers:
            with suppress(CsvfastError, OSError):
                self._end(container)
        self.runner.close()
        shutil.rmtree(self.work / "images", ignore_errors=True)
        shutil.rmtree(self.work / "containers", ignore_errors=True)
        shutil.rmtree(self.work / "volumes", ignore_errors=True)
        self.done.set()

    # ---- Sandbox

    def _create_sandbox(self, fields: Fields) -> Mapping[str, Any]:
        identifier = fields.identifier("sandbox")
        hostname = fields.text("hostname", 63) or "".join(one if one.isalnum() else "-" for one in identifier)[:63].strip("-")
        certificates = fields.data("certificates", _CERTIFICATES_MAX)
        fields.end()
        with self._lock:
            if self._sandbox is not None:
                raise ContainerError("state", f"there is a sandbox already: {self._sandbox}")
            self._sandbox = identifier
        self._hostname = hostname
        self.attester.certificates = certificates
        try:
            with self.times.step("sandbox"):
                for name in ("images", "containers", "volumes"):
                    (self.work / name).mkdir(mode=0o700, exist_ok=True)
                self.runner.open(hostname, network=self.policy.network)
        except BaseException:
            self._sandbox = None
            raise
        return {"agent": 1, "runner": self.runner.name, "door": self.configuration.broker["door"]}

    def _destroy_sandbox(self, fields: Fields) -> None:
        fields.ignore("sandbox")
        fields.end()
        self.close()

    def _get_timings(self, fields: Fields) -> Mapping[str, Any]:
        fields.end()
        return {"steps": self.times.document()}

    # ---- Images

    def _pull_image(self, fields: Fields) -> Mapping[str, Any]:
        from csvfast.runtime.agent.pull import pull_image

        name = fields.needed_text("image", 1024)
        source = fields.text("source", 1024) or name
        fields.end()
        with self._pulling:
            if len(self._images) >= _IMAGES_MAX and name not in self._images:
                raise ContainerError("limit", f"more than {_IMAGES_MAX} images")
            with self.times.step("pull"):
                image = pull_image(
                    name, source, self._new_tree(), configuration=self.configuration, attester=self.attester, times=self.times,
                    content=self.runner.content(), owners=os.geteuid() == 0,
                )  # fmt: skip
            with self._lock:
                old = self._images.get(name)
                self._images[name] = image
                if old is not None and old.taken:
                    old = None
                elif old is not None:
                    old.taken = True  # no container begins on a tree that is being removed
        if old is not None:
            shutil.rmtree(old.rootfs, ignore_errors=True)
        return {
            "image": name, "manifest": image.manifest, "layers": len(image.encrypted), "encrypted": sum(image.encrypted),
            "notes": list(image.notes)[:20],
        }  # fmt: skip

    def _new_tree(self) -> Path:
        with self._lock:
            self._trees += 1
            return self.work / "images" / f"{self._trees}"

    def _take_tree(self, image: PulledImage) -> Path:
        """The image's tree becomes a container's: each container needs a PullImage of its own."""
        with self._lock:
            if image.taken:
                problem = f"image {image.name} has become a container, or another took its place; expected another PullImage"
                raise ContainerError("state", problem)
            image.taken = True
        return image.rootfs

    # ---- Containers

    def _create_container(self, fields: Fields) -> Mapping[str, Any]:
        identifier = fields.identifier("container")
        name = fields.needed_text("image", 1024)
        process = fields.fields("process")
        stdin, readonly = fields.flag("stdin"), fields.flag("readonly")
        memory, pids = fields.number("memory", 1 << 20, 1 << 50), fields.number("pids", 1, 1 << 22)
        volumes = [(one.identifier("name"), one.path("path") or "", one) for one in fields.many("volumes")]
        fields.end()
        for _, path, one in volumes:
            one.end()
            if path in ("", "/"):
                raise ContainerError("protocol", "CreateContainer: volumes: path: expected a directory of the container")
        image = self._images.get(name)
        if image is None:
            raise ContainerError("state", f"image {name[:200]!r} was not pulled")
        if stdin:
            self.policy.check_flag("stdin")
        for volume, path, _ in volumes:
            self.policy.check_volume(volume, path)
        with self._lock:
            if identifier in self._containers:
                raise ContainerError("state", f"container {identifier} is there already")
            if len(self._containers) >= self.policy.containers:
                raise ContainerError("policy", f"more than {self.policy.containers} containers (member containers of the policy)")
            with self.times.step("create container"):
                rootfs = self._take_tree(image)
                try:
                    spec = self._specification(image, process, memory=memory, pids=pids, read_only=readonly)
                    bundle = self._bundle(identifier, rootfs, spec, [(volume, path) for volume, path, _ in volumes])
                except BaseException:
                    image.taken = False
                    raise
            first = self._new_process(identifier, stdin=stdin)
            own = tuple(image.config.arguments)
            self._containers[identifier] = _Container(bundle, first, own, spec["process"], image)
        return {"container": identifier, "process": first.number}

    def _bundle(self, identifier: str, rootfs: Path, spec: dict[str, Any], volumes: list[tuple[str, str]]) -> Bundle:
        directory = self.work / "containers" / identifier
        directory.mkdir(mode=0o700)
        try:
            shared = []
            for volume, path in volumes:
                place = self.work / "volumes" / volume
                if not place.exists():
                    place.mkdir()
                    place.chmod(0o1777)  # containers' users differ
                shared.append((str(place), path))
            bundle = Bundle(identifier, directory, rootfs, spec, shared)
            self.runner.prepare(bundle)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return bundle

    def _specification(self, image: PulledImage, process: Fields, **options: Any) -> dict[str, Any]:
        from csvfast.image.bundle import read_in_root, runtime_specification
        from csvfast.image.users import lookup_user

        given = _ProcessFields.read(process)
        policy, config = self.policy, image.config
        policy.check_user(given.user)
        policy.check_environment(given.environment)
        if given.directory is not None:
            policy.check_directory(given.directory)
        read = self.runner.read(image.rootfs) or read_in_root(image.rootfs)
        user = lookup_user(config.user if given.user is None else given.user, read)
        spec = runtime_specification(
            config, user, command=given.command, entrypoint=given.arguments, environment=given.environment,
            working_directory=given.directory, hostname=self._hostname, memory_bytes=options["memory"], pids=options["pids"],
            read_only=options["read_only"], **self.runner.options,
        )  # fmt: skip
        policy.check_command(spec["process"]["args"], config.arguments)
        capabilities = spec["process"]["capabilities"]
        for name, names in capabilities.items():
            capabilities[name] = [one for one in names if one in policy.capabilities]
        return spec

    def _start_container(self, fields: Fields) -> Mapping[str, Any]:
        container = self._container(fields)
        fields.end()
        with container.starting:
            container.check_there()
            if container.started:
                raise ContainerError("state", f"container {container.bundle.identifier} was started already")
            container.started = True
            with self.times.step("start container"):
                pid = container.first.start(lambda standard: self.runner.start(container.bundle, standard), self._ended)
        return {"pid": pid}

    def _exec_process(self, fields: Fields) -> Mapping[str, Any]:
        container = self._container(fields)
        stdin = fields.flag("stdin")
        given = _ProcessFields.read(fields)
        if not given.arguments:
            raise ContainerError("protocol", "ExecProcess: args: expected a command")
        self.policy.check_command(given.arguments, container.own, executions=True)
        self.policy.check_environment(given.environment)
        if stdin:
            self.policy.check_flag("stdin")
        if given.directory is not None:
            self.policy.check_directory(given.directory)
        if given.user is not None:
            raise ContainerError("policy", "ExecProcess runs as the container's own user")
        first = container.first.program
        if first is None or container.first.exit_code is not None:
            raise ContainerError("state", f"container {container.bundle.identifier} does not run")
        spec = dict(container.base) | {"args": given.arguments, "env": [*container.base["env"], *given.environment]}
        if given.directory is not None:
            spec["cwd"] = given.directory
        with self._lock:
            if len(container.others) >= _PROCESSES_MAX:
                raise ContainerError("limit", f"more than {_PROCESSES_MAX} processes were executed")
            process = self._new_process(container.bundle.identifier, stdin=stdin)
            container.others[process.number] = process
        try:
            with container.starting:
                container.check_there()
                process.start(lambda standard: self.runner.execute(container.bundle, first, spec, standard), self._ended)
        except BaseException:
            with self._lock:
                container.others.pop(process.number, None)
                self._processes.pop(process.number, None)
            process.forget()
            raise
        return {"process": process.number}

    def _signal_process(self, fields: Fields) -> None:
        process = self._process(fields)
        number = fields.needed_number("signal", 1, signal.SIGRTMAX)
        fields.end()
        self.policy.check_flag("signals")
        process.signal(number)

    def _wait_process(self, fields: Fields) -> Mapping[str, Any]:
        process = self._process(fields)
        seconds = fields.seconds("seconds")
        fields.end()
        code = process.wait(seconds)
        return {"running": True} if code is None else {"exit_code": code}

    def _close_stdin(self, fields: Fields) -> None:
        process = self._process(fields)
        fields.end()
        process.close_stdin()

    def _stats_container(self, fields: Fields) -> Mapping[str, Any]:
        container = self._container(fields)
        fields.end()
        return self.runner.statistics(container.bundle)

    def _remove_container(self, fields: Fields) -> None:
        container = self._container(fields)
        fields.end()
        with self._lock:
            self._containers.pop(container.bundle.identifier, None)
        self._end(container)
        with self._lock:
            if self._images.get(container.image.name) is container.image:
                del self._images[container.image.name]

    # ---- Behind it

    def _container(self, fields: Fields) -> _Container:
        identifier = fields.identifier("container")
        container = self._containers.get(identifier)
        if container is None:
            raise ContainerError("state", f"there is no container {identifier}")
        return container

    def _process(self, fields: Fields) -> Process:
        number = fields.needed_number("process", 1, 0xFFFFFFFF)
        fields.ignore("container")
        process = self._processes.get(number)
        if process is None:
            raise ContainerError("state", f"there is no process {number}")
        return process

    def _new_process(self, container: str, *, stdin: bool) -> Process:
        if self._connection is None:
            raise ContainerError("state", "there is no wire")
        self._number += 1
        process = self._processes[self._number] = Process(self._connection, self._number, container, stdin=stdin)
        return process

    def _ended(self, process: Process) -> None:
        if self._connection is not None:
            event = {"event": "exit", "process": process.number, "container": process.container, "exit_code": process.exit_code}
            with suppress(CsvfastError):
                self._connection.send_event(event)

    def _end(self, container: _Container) -> None:
        with container.starting:
            container.removed = True
        for process in (*container.others.values(), container.first):
            process.kill()
            self._processes.pop(process.number, None)
        try:
            self.runner.remove(container.bundle)
        finally:
            shutil.rmtree(container.bundle.directory, ignore_errors=True)
            shutil.rmtree(container.bundle.rootfs, ignore_errors=True)


@dataclass(frozen=True)
class _ProcessFields:
    """What a request says about a program."""

    arguments: list[str] | None
    command: list[str] | None
    environment: list[str]
    directory: str | None
    user: str | None

    @classmethod
    def read(cls, fields: Fields) -> _ProcessFields:
        """ContainerError "protocol"."""
        found = cls(
            fields.texts("args") or None, fields.texts("command"), fields.texts("env") or [], fields.path("cwd"),
            fields.text("user", 256),
        )  # fmt: skip
        fields.end()
        if any(one.find("=") < 1 for one in found.environment):
            raise ContainerError("protocol", "env: expected NAME=value")
        return found
