"""`vm`: a real Linux guest of QEMU on encrypted RAM. Its agent is the initrd's main program.

Measured are firmware, kernel, initrd (csvfast's own Python with the agent, and the agent's configuration as a second archive
behind it) and the kernel's command line; QEMU never starts when the digest is not the one that is expected.

The guest's network is QEMU's user network: 10.0.2.15, this machine's loopback at 10.0.2.2, nothing listens.

Thread-safety: executors have no state; a VmGuest may be used from any thread.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast._runtime import get_library
from csvfast.errors import ArgumentError, ContainerError, StateError
from csvfast.machine.initrd import boot_files
from csvfast.machine.vm import CsvVm
from csvfast.machine.vm_qemu import find_bios
from csvfast.measure.launch import launch_digest
from csvfast.processor.vmm import GuestPlan
from csvfast.runtime.executor import Executor, ExecutorName, Guest, Launch, LaunchPlan
from csvfast.runtime.options import GUEST_GATEWAY
from csvfast.runtime.protocol import PORT_NAME

if TYPE_CHECKING:
    from csvfast.measure.launch import LaunchDigest
    from csvfast.runtime.host import HostMachine

__all__ = ["APPEND", "VmExecutor", "VmGuest"]

# The kernel's tests of its own cipher code would take a third of the boot on an emulated processor; no key meets that code: the
# agent's ciphers are OpenSSL's and csvfast's.
APPEND: Final = "console=ttyS0 quiet panic=-1 cryptomgr.notests"
NETWORK: Final = ("-netdev", "user,id=net0,ipv6=off", "-device", "virtio-net-pci,netdev=net0,romfile=")
MEMORY_MIN: Final = 192 << 20
_SETTINGS: Final = frozenset({"firmware", "kernel", "initrd", "append", "accel", "qemu", "vcpus", "time_limit", "library"})
_INITRD: Final = "initrd"
_CONSOLE_LINE: Final = 400


class VmGuest(Guest):
    """A running virtual machine."""

    host_address = GUEST_GATEWAY

    def __init__(self, machine: CsvVm, launch: Launch, descriptor: int) -> None:
        self.machine = machine
        self.launch = launch
        self.descriptor = descriptor

    @property
    def pid(self) -> int:
        """Of QEMU."""
        return int(self.machine.status()["qemu"] or 0)

    @property
    def running(self) -> bool:
        """Whether QEMU runs."""
        return self.machine.running

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is gone."""
        self.machine.wait(seconds)
        return not self.machine.running

    def reason(self) -> str:
        """The last line of the guest's console, or what QEMU complained about."""
        if self.machine.timed_out:
            return "the time limit has ended the virtual machine"
        lines = [line.strip() for line in (self.machine.console() + "\n" + self.machine.errors()).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("guest: exit")]
        last = said[-1][-_CONSOLE_LINE:] if said else "its console is silent"
        return last if self.machine.running else f"the virtual machine ended with {self.machine.exit_code}: {last}"

    def stop(self, seconds: float = 5.0) -> None:
        """Ends QEMU; the guest is decommissioned."""
        self.machine.stop(seconds)

    def details(self) -> Mapping[str, Any]:
        """QEMU's process, the memory's counters."""
        status = self.machine.status()
        return {"qemu": status["qemu"], "accel": status["accel"], "asid": status.get("asid"), "memory": status["memory"]}


class VmExecutor(Executor):
    """QEMU on encrypted RAM."""

    name: ExecutorName = "vm"

    def statement(self) -> str:
        """See Executor."""
        return (
            "encrypted is all of the guest's RAM (SM4-XTS in the DRAM, but for the pages of the window), with everything in it: "
            "kernel, agent, keys, the container and its files. In the clear, as on every machine without the silicon, is QEMU's "
            "own state: vCPU registers and the window, which an administrator of this machine can read from its process"
        )

    def unavailable(self) -> str | None:
        """See Executor."""
        if shutil.which("qemu-system-x86_64") is None:
            return "qemu-system-x86_64 is not installed"
        missing = [name for name in ("vmlinuz", "busybox", "modules/virtio_net.ko") if not (boot_files() / name).exists()]
        if missing:
            return f"{boot_files()} lacks {', '.join(missing)}"
        try:
            find_bios()
            if "CSVFAST_VMRAM_LIBRARY" not in os.environ:
                get_library("vmram-preload")
        except (StateError, FileNotFoundError) as problem:
            return str(problem)
        return None

    def room(self, plan: LaunchPlan) -> int:
        """See Executor."""
        return plan.memory + (4 << 20) + (_vcpus(plan) << 12)

    def predict(self, plan: LaunchPlan) -> LaunchDigest:
        """See Executor."""
        guest = self._plan(plan)
        return launch_digest(
            guest.firmware, kernel=guest.kernel, initrd=guest.initrd, append=guest.append, vcpus=guest.vcpus,
            force_hash_table=guest.force_hash_table,
        )  # fmt: skip

    def start(self, host: HostMachine, plan: LaunchPlan) -> Guest:
        """See Executor."""
        ours, theirs = socket.socketpair()
        settings = plan.settings
        try:
            machine = CsvVm(
                platform=host.machine,
                dram=host.dram,
                plan=self._plan(plan),
                expected=plan.expected,
                window=plan.window or "1/4",
                accel=str(settings.get("accel", "auto")),
                qemu=settings.get("qemu"),
                library=settings.get("library"),
                arguments=NETWORK,
                ports={PORT_NAME: theirs},
                time_limit=_number(settings, "time_limit", 0) or None,
                output=plan.console,
            )
            try:
                machine.launch()
            except StateError as problem:
                raise ContainerError("executor", str(problem)) from problem
            except BaseException:
                machine.close()
                raise
            launched = machine.launched
            if launched is None:
                raise ContainerError("executor", "the virtual machine was not launched")
            (plan.work / _INITRD).unlink(missing_ok=True)  # QEMU has its own sealed copy
            return VmGuest(machine, Launch.of(self.name, launched.predicted, launched.handle), ours.detach())
        finally:
            ours.close()
            theirs.close()

    def _plan(self, plan: LaunchPlan) -> GuestPlan:
        settings = plan.settings
        if unknown := sorted(set(settings) - _SETTINGS):
            raise ArgumentError(f"setting {unknown[0]!r} of executor vm is unknown; expected {', '.join(sorted(_SETTINGS))}")
        if plan.memory < MEMORY_MIN:
            raise ArgumentError(f"memory is {plan.memory} bytes; a guest with the agent needs {MEMORY_MIN}")
        firmware = settings.get("firmware")
        initrd = Path(settings["initrd"]) if "initrd" in settings else _initrd(plan.configuration, plan.work / _INITRD)
        return GuestPlan(
            firmware=find_bios() if firmware is None else Path(firmware),
            kernel=Path(settings.get("kernel") or boot_files() / "vmlinuz"),
            initrd=initrd,
            append=str(settings.get("append", APPEND)),
            policy=plan.policy,
            memory_size=plan.memory,
            vcpus=_vcpus(plan),
            force_hash_table=firmware is None,
        )


def _initrd(configuration: bytes, path: Path) -> Path:
    from csvfast.runtime.guest_initrd import write_guest_initrd

    return write_guest_initrd(configuration, path)


def _vcpus(plan: LaunchPlan) -> int:
    return int(_number(plan.settings, "vcpus", 1))


def _number(settings: Mapping[str, Any], name: str, usual: float) -> float:
    try:
        return float(settings.get(name, usual))
    except (TypeError, ValueError):
        raise ArgumentError(f"setting {name} of executor vm is {str(settings[name])[:40]!r}; expected a number") from None
