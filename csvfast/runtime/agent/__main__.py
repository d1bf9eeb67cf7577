"""The agent as a program, started by an executor: `python -m csvfast.runtime.agent --link ... --configuration ...`.

    --link FD|PORT              the wire to the host: a descriptor, or the path of a virtual machine's serial port
    --configuration FD|FILE     the agent's configuration, measured by whoever starts it
    --executor vm|emulator|native|namespaces
    --work DIRECTORY            private; in a virtual machine: in its memory
    --report-socket PATH --vcpu-socket PATH --guest HANDLE      of a simulated platform; without them the processor's channel
    --dram FD --dram-address BYTES --memory-key FD --memory BYTES --window ...     of the emulator: the guest's RAM in the
                                platform's DRAM, and a pipe from which its key is read
    --runtime runc|crun|bwrap   for native; without it the first of them that is there

It ends with the wire, or after DestroySandbox.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from csvfast.runtime.agent.containers import Runner
    from csvfast.runtime.agent.spawner import Spawner

__all__ = ["main"]

_OPTIONS: Final = frozenset({
    "link", "configuration", "executor", "work", "report-socket", "vcpu-socket", "guest", "dram", "dram-address",
    "memory-key", "window", "memory", "runtime",
})  # fmt: skip
_NEEDED: Final = ("link", "configuration", "executor")
_LINK_SECONDS: Final = 60.0


def main(arguments: Sequence[str]) -> int:
    """Runs until the wire ends. Out: exit code; what went wrong stands in one line on standard error."""
    begin = time.monotonic()
    try:
        options = _options(arguments)
        work = Path(options.get("work", "/run/csvfast"))
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        machine = options["executor"] == "vm"
        if machine:
            _leave_initramfs()
        from csvfast.runtime.agent.spawner import Spawner

        # It removes what the agent leaves behind; in a virtual machine all of that goes with the machine.
        left = [] if machine else [f"{work}/{name}" for name in ("images", "containers", "volumes")]
        remains = (lambda: _remains(work)) if options["executor"] == "native" else None
        spawner = Spawner.fork(left, remains)
        _private_memory()
        return _serve(options, work, spawner, begin)
    except Exception as problem:  # the host reads one line
        print(f"agent: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        return 1


def _serve(options: Mapping[str, str], work: Path, spawner: Spawner, begin: float) -> int:
    from csvfast.errors import ContainerError
    from csvfast.runtime.agent.attest import CertifiedAttester, guest_attester, platform_attester
    from csvfast.runtime.agent.configuration import AgentConfiguration
    from csvfast.runtime.agent.server import Agent
    from csvfast.runtime.agent.timings import StepTimes
    from csvfast.runtime.protocol import Connection

    configuration = AgentConfiguration.parse(_read(options["configuration"]))
    times = StepTimes()
    if "report-socket" in options:
        place, vcpu, handle = options["report-socket"], options.get("vcpu-socket"), int(options["guest"])
        attester = CertifiedAttester(lambda: platform_attester(place, handle, vcpu), times.add)
    else:
        attester = CertifiedAttester(guest_attester, times.add)
    agent = Agent(configuration, _runner(options, work, spawner), attester, work, times)
    link = _link(options["link"])
    times.add("agent's start", time.monotonic() - begin)
    connection = Connection(link, agent.handle, name="csvfast-host")
    agent.attach(connection)
    signal.signal(signal.SIGTERM, lambda *_: agent.done.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spawner.watch()
        while not agent.done.wait(0.5) and not connection.is_closed:
            if spawner.lost.is_set() and not agent.closing:
                raise ContainerError("state", "the process that runs the containers is gone")
        connection.wait_idle(2.0)  # the last reply leaves
    finally:
        agent.close()
        spawner.close()
        connection.close()
    return 0


def _runner(options: Mapping[str, str], work: Path, spawner: Spawner) -> Runner:
    executor = options["executor"]
    if executor == "emulator":
        from csvfast.runtime.agent.containers_emulator import EmulatorRunner, GuestRam

        memory = int(options.get("memory", 256 << 20))
        ram = None
        if "dram" in options:
            ram = GuestRam(int(options["dram"]), int(options["dram-address"]), memory, int(options["memory-key"]))
        return EmulatorRunner(work, memory, _window(options.get("window", "256K"), memory), ram)
    if executor == "native":
        from csvfast.runtime.agent.containers_native import native_runner

        return native_runner(spawner, work, options.get("runtime"))
    from csvfast.runtime.agent.containers_namespaces import NamespacesRunner

    return NamespacesRunner(spawner, _control_groups() if executor == "vm" else None)


def _remains(work: Path) -> None:
    from csvfast.runtime.agent.containers_native import remove_remains

    remove_remains(work)


def _private_memory() -> None:
    """Keys that come into this process are not written to a core file, nor read by other processes of the same user."""
    import resource

    from csvfast.runtime.agent import syscalls as system

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    system.not_dumpable()


def _window(text: str, memory: int) -> int:
    """Bytes. In: text   a share of the memory ("1/4"), or bytes ("64M")"""
    share, slash, whole = text.partition("/")
    if slash:
        return max(64 << 10, memory * int(share) // int(whole))
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:])
    return int(text) if unit is None else int(text[:-1]) << unit


def _control_groups() -> Path | None:
    """Mounts control groups (version 2) in a guest, with what containers' limits need."""
    from csvfast.runtime.agent import syscalls as system

    place = Path("/sys/fs/cgroup")
    with suppress(OSError):
        system.mount("cgroup2", str(place), "cgroup2", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC)
        (place / "cgroup.subtree_control").write_text("+memory +pids +cpu", encoding="ascii")
        return place
    return None


def _leave_initramfs() -> None:
    """Makes a root that containers can leave: pivot_root(2) does not work on the kernel's first one."""
    from csvfast.runtime.agent import syscalls as system

    place = "/mnt"
    Path(place).mkdir(exist_ok=True)
    system.mount("/", place, None, system.MS_BIND | system.MS_REC)
    os.chdir(place)
    system.mount(".", "/", None, 8192)  # MS_MOVE
    os.chroot(".")
    os.chdir("/")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    found = {}
    names = list(arguments[::2])
    if len(arguments) % 2:
        raise ValueError(f"option {names[-1]} without a value")
    for name, value in zip(names, arguments[1::2], strict=True):
        if name[:2] != "--" or name[2:] not in _OPTIONS:
            raise ValueError(f"option {name} is unknown")
        found[name[2:]] = value
    if missing := [name for name in _NEEDED if name not in found]:
        raise ValueError(f"expected --{' and --'.join(missing)}")
    return found


def _read(place: str) -> bytes:
    if place.isdigit():
        descriptor = int(place)
        data = b""
        while chunk := os.read(descriptor, 1 << 20):
            data += chunk
        os.close(descriptor)
        return data
    return Path(place).read_bytes()


def _link(place: str) -> int:
    """The wire. A serial port is there once its driver has been told of it."""
    if place.isdigit():
        os.set_inheritable(int(place), False)
        return int(place)
    end = time.monotonic() + _LINK_SECONDS
    while True:
        try:
            return os.open(place, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
