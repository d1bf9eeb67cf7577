"""What a sandbox can run on, behind one interface: `vm`, `emulator`, `native`. Which one it is, and what it does not protect, is
always said.

    executor = choose_executor("auto")
    print(executor.name, executor.statement())
    with HostMachine(executor.room(plan)) as host:
        guest = executor.start(host, plan)          # launched and measured; guest.descriptor is the wire to the agent in it

Thread-safety: executors have no state; a Guest may be used from any thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from csvfast.errors import ArgumentError, ContainerError
from csvfast.report.policy import GuestPolicy

if TYPE_CHECKING:
    from csvfast.measure.launch import LaunchDigest
    from csvfast.runtime.host import HostMachine

__all__ = ["EXECUTORS", "POLICY", "Executor", "Guest", "Launch", "LaunchPlan", "choose_executor", "executor_of"]

ExecutorName = Literal["vm", "emulator", "native"]
EXECUTORS: Final = ("vm", "emulator", "native")
"""All of them, what encrypts most first."""

POLICY: Final = GuestPolicy.of(nodbg=True, noks=True, es=True, nosend=True, csv=True, api_major=1, api_minor=3)
"""Of every sandbox: no debugging, no key sharing, encrypted registers, no sending away."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What is launched.

    configuration  the agent's, as JSON; it is measured
    memory         bytes of guest RAM, whole MiB
    window         of plaintext at most, a share ("1/4") or bytes ("64M"); "" = the executor's own: 1/4 for vm, 256K for emulator
    work           private directory for the executor's files, removed with the sandbox
    expected       launch digest, 32 bytes, that the owner demands; None = the one that the files predict
    console        gets the guest's console, where it has one
    policy         of the guest; another than POLICY only to show that a broker refuses it
    settings       of one executor: "kernel", "firmware", "accel", "qemu" for vm
    """

    configuration: bytes
    memory: int = 256 << 20
    window: str = ""
    work: Path = field(default_factory=Path)
    expected: bytes | None = None
    console: Callable[[bytes], object] | None = None
    policy: GuestPolicy = POLICY
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What the processor has launched.

    executor   its name
    digest     launch digest, 32 bytes: what the report will hold, and what the owner's broker knows
    handle     of the guest
    pieces     (name, bytes, SM3 in hexadecimal) of what went into the digest
    """

    executor: str
    digest: bytes
    handle: int
    pieces: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, executor: str, predicted: LaunchDigest, handle: int) -> Launch:
        """From a launch digest."""
        pieces = tuple((piece.name, piece.size, piece.sm3.hex()) for piece in predicted.pieces)
        return cls(executor, predicted.digest, handle, pieces)


class Guest(ABC):
    """A launched guest in which an agent runs.

    Attributes: launch; descriptor: the wire to its agent, which the caller takes over; host_address: by what name programs in it
        reach services on this machine's loopback.
    """

    launch: Launch
    descriptor: int
    host_address: str = "127.0.0.1"

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process that the guest is on this machine."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether it runs."""

    @abstractmethod
    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is gone. False: it still runs."""

    @abstractmethod
    def reason(self) -> str:
        """What is known about its end, in one line."""

    @abstractmethod
    def stop(self, seconds: float = 5.0) -> None:
        """Ends it, by force after `seconds`; its key is erased. Idempotent."""

    def details(self) -> Mapping[str, Any]:
        """More to tell, for JSON; no secrets."""
        return {}


class Executor(ABC):
    """A way to run a guest."""

    name: ExecutorName

    @abstractmethod
    def statement(self) -> str:
        """In plain words: what is encrypted here and what is not."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine; None = it can."""

    @abstractmethod
    def room(self, plan: LaunchPlan) -> int:
        """Bytes of DRAM that a guest of this plan needs."""

    @abstractmethod
    def predict(self, plan: LaunchPlan) -> LaunchDigest:
        """The launch digest, from the files alone: nothing is launched. `work` is used."""

    @abstractmethod
    def start(self, host: HostMachine, plan: LaunchPlan) -> Guest:
        """Launches and starts the guest.

        Raises: VerificationError, FirmwareError: it is not what it should be; it is gone, nothing of it ever ran.
            ContainerError("executor"): it did not start, with its own words. OSError.
        """


def executor_of(name: str) -> Executor:
    """The executor of this name. Raises ArgumentError."""
    if name == "vm":
        from csvfast.runtime.executor_vm import VmExecutor

        return VmExecutor()
    if name == "emulator":
        from csvfast.runtime.executor_emulator import EmulatorExecutor

        return EmulatorExecutor()
    if name == "native":
        from csvfast.runtime.executor_native import NativeExecutor

        return NativeExecutor()
    raise ArgumentError(f"executor {name[:40]!r}: expected auto, {', '.join(EXECUTORS)}")


def choose_executor(name: str = "auto") -> Executor:
    """The executor asked for; "auto" takes vm, or else emulator, never native, which encrypts nothing.

    Raises: ArgumentError; ContainerError("executor"): it, or none of them, can be used here; each one's reason.
    """
    reasons = []
    for candidate in ("vm", "emulator") if name == "auto" else (name,):
        executor = executor_of(candidate)
        reason = executor.unavailable()
        if reason is None:
            return executor
        reasons.append(f"{candidate}: {reason}")
    raise ContainerError("executor", "; ".join(reasons))
