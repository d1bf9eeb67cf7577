"""Containers by a program of this machine: runc, crun, or bwrap.

runc and crun get the specification as it is, in config.json. bwrap gets what it has options for: namespaces, the root file
system, environment, user and capabilities; no limits, no further programs, and signals only for the whole container.

Sources: opencontainers/runc and containers/crun (run, exec, kill, delete); containers/bubblewrap bwrap(1).
Thread-safety: as Runner.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import ContainerError
from csvfast.runtime.agent.containers import Bundle, Program, Runner
from csvfast.runtime.agent.spawner import MORE_AT
from csvfast.runtime.state import RUNTIME_STATE

if TYPE_CHECKING:
    from csvfast.runtime.agent.spawner import Spawner

__all__ = ["BubblewrapRunner", "RuntimeRunner", "native_runner", "remove_remains"]

_SECONDS: Final = 20.0
_RUNTIMES: Final = ("runc", "crun")
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def native_runner(spawner: Spawner, work: Path, wanted: str | None = None) -> Runner:
    """runc, or else crun, or else bwrap; or the one wanted. ContainerError "executor": it is not there."""
    for name in ("runc", "crun", "bwrap"):
        if wanted is not None and name != wanted:
            continue
        program = shutil.which(name, path=_ENVIRONMENT["PATH"])
        if program and name == "bwrap":
            return BubblewrapRunner(spawner, Path(program))
        if program and not os.geteuid():  # for other users they would need more than is given here
            return RuntimeRunner(spawner, Path(program), work)
    raise ContainerError("executor", f"{wanted or 'neither runc nor crun (for root) nor bwrap'}: not installed")


def remove_remains(work: Path) -> None:
    """Containers whose agent was killed: their processes, control groups and state. Nothing happens where there are none.

    In: work   of that agent
    """
    for folder in (work / RUNTIME_STATE).glob("*/*/"):
        program = shutil.which(folder.parent.name, path=_ENVIRONMENT["PATH"])
        if folder.parent.name not in _RUNTIMES or program is None:
            continue
        command = [program, "--root", str(folder.parent), "delete", "--force", folder.name]
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, env=_ENVIRONMENT, timeout=_SECONDS, check=False)
    shutil.rmtree(work / RUNTIME_STATE, ignore_errors=True)


class RuntimeRunner(Runner):
    """runc or crun. In: program   its path. work   directory for its state"""

    def __init__(self, spawner: Spawner, program: Path, work: Path) -> None:
        self.name = program.name
        self._spawner = spawner
        self._program = program
        self._state = work / RUNTIME_STATE / program.name
        self._network = False
        self._files = 0
        self._there: set[str] = set()
        self.options = {"rootless": bool(os.geteuid())}

    def open(self, hostname: str, *, network: bool) -> None:
        """See Runner."""
        del hostname
        self._network = network
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)

    def prepare(self, bundle: Bundle) -> None:
        """See Runner."""
        spec = dict(bundle.spec)
        if self._network:
            linux = dict(spec["linux"])
            linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"]
            spec["linux"] = linux
        mounts = [
            {"destination": target, "type": "bind", "source": source, "options": ["rbind", "nosuid", "nodev"]}
            for source, target in bundle.volumes
        ]
        spec |= {"root": spec["root"] | {"path": str(bundle.rootfs)}, "mounts": [*spec["mounts"], *mounts]}
        (bundle.directory / "config.json").write_text(json.dumps(spec), encoding="utf-8")

    def start(self, bundle: Bundle, standard: Sequence[int]) -> Program:
        """See Runner."""
        self._there.add(self._id(bundle))
        begun = bundle.directory / "pid"
        program = self._command(
            "run", "--pid-file", str(begun), "--bundle", str(bundle.directory), self._id(bundle), standard=standard
        )
        end = time.monotonic() + _SECONDS  # until then nothing can be executed in it, and no signal sent
        while not begun.exists() and program.wait(0.005) is None and time.monotonic() < end:
            pass
        return _RuntimeProgram(self, bundle, program)

    def execute(self, bundle: Bundle, program: Program, process: Mapping[str, Any], standard: Sequence[int]) -> Program:
        """See Runner. A signal ends the runtime's own process, and the kernel the program's."""
        del program
        self._files += 1
        file = bundle.directory / f"process-{self._files}.json"
        file.write_text(json.dumps(dict(process)), encoding="utf-8")
        return self._command("exec", "--process", str(file), self._id(bundle), standard=standard)

    def remove(self, bundle: Bundle) -> None:
        """See Runner."""
        if self._id(bundle) in self._there:
            self._there.discard(self._id(bundle))
            self._now("delete", "--force", self._id(bundle))

    def close(self) -> None:
        """See Runner."""
        for identifier in list(self._there):
            with suppress(ContainerError):
                self._now("delete", "--force", identifier)
        self._there.clear()
        self._spawner.close()

    def kill(self, bundle: Bundle, number: int) -> None:
        """A signal for the container's first program."""
        self._now("kill", self._id(bundle), str(number))

    def _id(self, bundle: Bundle) -> str:
        return f"csvfast-{os.getpid()}-{bundle.identifier}"

    def _command(self, *arguments: str, standard: Sequence[int]) -> Program:
        return self._spawner.command([str(self._program), "--root", str(self._state), *arguments], _ENVIRONMENT, standard)

    def _now(self, *arguments: str) -> None:
        command = [str(self._program), "--root", str(self._state), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, env=_ENVIRONMENT, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise ContainerError("executor", f"{self.name} {arguments[0]}: {problem}") from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
            raise ContainerError("state", f"{self.name} {arguments[0]}: {lines[-1][:300]}")


class _RuntimeProgram:
    """The first program of a container that a runtime runs: signals go through the runtime."""

    def __init__(self, runner: RuntimeRunner, bundle: Bundle, program: Program) -> None:
        self.pid = program.pid
        self._runner, self._bundle, self._program = runner, bundle, program

    def wait(self, seconds: float | None = None) -> int | None:
        """See Program."""
        return self._program.wait(seconds)

    def signal(self, number: int) -> None:
        """See Program."""
        if self._program.wait(0) is not None:
            raise ContainerError("state", "the process has ended")
        self._runner.kill(self._bundle, number)

    def close(self) -> None:
        """See Program."""
        self._program.close()


class BubblewrapRunner(Runner):
    """bwrap. In: program   its path"""

    name = "bwrap"

    def __init__(self, spawner: Spawner, program: Path) -> None:
        self._spawner = spawner
        self._program = program
        self._network = False
        self.options = {"rootless": bool(os.geteuid()), "seccomp": False}

    def open(self, hostname: str, *, network: bool) -> None:
        """See Runner."""
        del hostname
        self._network = network

    def prepare(self, bundle: Bundle) -> None:
        """See Runner."""
        resources = bundle.spec.get("linux", {}).get("resources", {})
        if "memory" in resources or "pids" in resources:
            raise ContainerError("limit", "bwrap sets no limits")

    def start(self, bundle: Bundle, standard: Sequence[int]) -> Program:
        """See Runner."""
        process = bundle.spec["process"]
        # By a file: everybody on this machine can read arguments, and the environment is among them.
        options = os.memfd_create("csvfast-bwrap", os.MFD_CLOEXEC)
        try:
            with open(options, "wb", closefd=False) as file:
                file.write(b"".join(os.fsencode(one) + b"\0" for one in self._arguments(bundle)))
            os.lseek(options, 0, os.SEEK_SET)
            command = [str(self._program), "--args", str(MORE_AT), "--", *process["args"]]
            return self._spawner.command(command, _ENVIRONMENT, [*standard, options])
        finally:
            os.close(options)

    def close(self) -> None:
        """See Runner."""
        self._spawner.close()

    def _arguments(self, bundle: Bundle) -> list[str]:
        spec = bundle.spec
        process = spec["process"]
        user = process["user"]
        found = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
        found += ["--share-net"] if self._network else []
        found += ["--hostname", spec["hostname"]] if spec.get("hostname") else []
        found += ["--ro-bind" if spec["root"].get("readonly") else "--bind", str(bundle.rootfs), "/"]
        found += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm"]  # noqa: S108 the container's
        for entry in spec["mounts"]:
            if entry["type"] == "tmpfs" and not entry["destination"].startswith("/dev"):
                found += ["--tmpfs", entry["destination"]]
        for source, target in bundle.volumes:
            found += ["--bind", source, target]
        if not os.geteuid():
            found += ["--cap-drop", "ALL"]
            for name in process["capabilities"].get("effective", ()):
                found += ["--cap-add", name]
        if (user["uid"], user["gid"]) != (0, 0) or os.geteuid():
            found += ["--unshare-user", "--uid", str(user["uid"]), "--gid", str(user["gid"])]
        for setting in process["env"]:
            name, _, value = setting.partition("=")
            found += ["--setenv", name, value]
        return [*found, "--chdir", process["cwd"]]
