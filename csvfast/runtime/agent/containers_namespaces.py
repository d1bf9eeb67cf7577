"""Containers by the kernel's own means: namespaces, pivot_root, capabilities, control groups. Needs root; what a guest uses.

Containers of a sandbox share its network, IPC and host name; processes and mounts are each one's own. Limits of memory and
processes need a control group (version 2) that can be written; without one a container with limits is refused.

Thread-safety: as Runner.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import ContainerError
from csvfast.runtime.agent.containers import Bundle, Program, Runner
from csvfast.runtime.agent.namespaces import NAMES

if TYPE_CHECKING:
    from csvfast.runtime.agent.spawner import SpawnedProcess, Spawner

__all__ = ["NamespacesRunner"]

_SHARED: Final = ("ipc", "uts", "network")


class NamespacesRunner(Runner):
    """See the module.

    In: spawner   forks for it; ends with close()
        cgroups   directory of control groups (version 2) below which containers get theirs; None = none
    """

    name = "namespaces"
    options: Mapping[str, Any] = {"seccomp": False, "cgroup": True}

    def __init__(self, spawner: Spawner, cgroups: Path | None = None) -> None:
        self._spawner = spawner
        self._cgroups = cgroups
        self._holder: SpawnedProcess | None = None
        self._network = False

    def open(self, hostname: str, *, network: bool) -> None:
        """See Runner."""
        self._network = network
        self._holder = self._spawner.hold(hostname, network=not network)

    def prepare(self, bundle: Bundle) -> None:
        """See Runner."""
        if "CAP_MKNOD" in bundle.spec["process"].get("capabilities", {}).get("bounding", ()):
            raise ContainerError("executor", "CAP_MKNOD: a container with it would open the guest's memory and the agent's wire")
        resources = bundle.spec.get("linux", {}).get("resources", {})
        settings = {
            "memory.max": resources.get("memory", {}).get("limit"),
            "pids.max": resources.get("pids", {}).get("limit"),
        }
        wanted = {name: value for name, value in settings.items() if value is not None}
        if self._cgroups is None:
            if wanted:
                raise ContainerError("limit", f"{', '.join(wanted)} cannot be set: there are no control groups (version 2) here")
            return
        group = self._group(bundle)
        try:
            group.mkdir(exist_ok=True)
            for name, value in wanted.items():
                (group / name).write_text(str(value), encoding="ascii")
        except OSError as problem:
            raise ContainerError("limit", f"control group of {bundle.identifier}: {problem}") from None

    def start(self, bundle: Bundle, standard: Sequence[int]) -> Program:
        """See Runner."""
        spec = dict(bundle.spec)
        linux = dict(spec["linux"])
        kinds = [entry["type"] for entry in linux["namespaces"]]
        shared = [self._namespace(kind) for kind in _SHARED if kind != "network" or not self._network]
        linux["namespaces"] = [{"type": kind} for kind in kinds if kind not in _SHARED] + shared
        spec |= {"linux": linux, "hostname": ""}  # the sandbox has it
        group = None if self._cgroups is None else str(self._group(bundle))
        return self._spawner.container(spec, str(bundle.rootfs), standard, volumes=bundle.volumes, cgroup=group)

    def execute(self, bundle: Bundle, program: Program, process: Mapping[str, Any], standard: Sequence[int]) -> Program:
        """See Runner."""
        group = None if self._cgroups is None else str(self._group(bundle))
        pidfd = getattr(program, "pidfd", -1)
        if pidfd < 0:
            raise ContainerError("state", f"container {bundle.identifier} does not run")
        return self._spawner.execute(process, pidfd, standard, cgroup=group)

    def remove(self, bundle: Bundle) -> None:
        """See Runner."""
        if self._cgroups is not None:
            with suppress(OSError):
                self._group(bundle).rmdir()

    def statistics(self, bundle: Bundle) -> dict[str, Any]:
        """See Runner: bytes of memory, microseconds of processor time, processes."""
        found: dict[str, Any] = {}
        if self._cgroups is not None:
            group = self._group(bundle)
            for name, file in (("memory", "memory.current"), ("processes", "pids.current")):
                with suppress(OSError, ValueError):
                    found[name] = int((group / file).read_text(encoding="ascii"))
            with suppress(OSError, ValueError):
                lines = dict(line.split(" ", 1) for line in (group / "cpu.stat").read_text(encoding="ascii").splitlines())
                found["processor_microseconds"] = int(lines["usage_usec"])
        return found

    def close(self) -> None:
        """See Runner."""
        self._spawner.close()

    def _group(self, bundle: Bundle) -> Path:
        assert self._cgroups is not None
        return self._cgroups / f"csvfast-{os.getpid()}-{bundle.identifier}"

    def _namespace(self, kind: str) -> dict[str, str]:
        if self._holder is None:
            raise ContainerError("state", "there is no sandbox")
        return {"type": kind, "path": f"/proc/{self._holder.pid}/ns/{NAMES.get(kind, kind)}"}
