"""Where `csvfast guest` finds its machine: a simulated chip in this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from csvfast.cli.common import CommandError, ExitCode

if TYPE_CHECKING:
    from csvfast.certs.chip import ChipIdentity
    from csvfast.processor.vmm import GuestPlan, Host

__all__ = ["machine_of", "remote"]


@contextmanager
def machine_of(
    state: Path | None, socket: Path | None, vcpu: Path | None, plan: GuestPlan, profile: str
) -> Iterator[tuple[Host, ChipIdentity | None]]:
    """A host on the one that was named; with --state also its chip. The chip's guest ends with the block."""
    if (state is None) == (socket is None):
        raise CommandError("expected either --state with a chip's directory, or --socket of a server")
    if vcpu is not None and socket is None:
        raise CommandError("--vcpu-socket: given without --socket")
    if socket is not None:
        with remote(socket, vcpu) as host:
            try:
                yield host, None
            except BaseException:
                if host.unfinished is not None:
                    _stop_anew(socket, host.unfinished)
                raise
        return
    from csvfast.memory import EncryptedMemory
    from csvfast.processor import PROFILES, Options, Processor
    from csvfast.processor.machine import LocalMachine
    from csvfast.processor.vmm import Host

    if state is None or profile not in PROFILES:
        raise CommandError(f"--profile: {profile!r}; expected one of {', '.join(PROFILES)}")
    # Beside the guest: the firmware's own MiB on its boundary, save areas, buffers.
    size = plan.memory_size + Path(plan.firmware).stat().st_size + (plan.vcpus << 12) + (4 << 20)
    options = Options(vmsa_measured=plan.vmsa == "amd")
    with (
        refusals(),
        EncryptedMemory(-(-size // 4096) * 4096) as memory,
        Processor.open(state, memory, profile=PROFILES[profile], options=options) as processor,
        Host(LocalMachine(processor)) as host,
    ):
        host.initialise(es=True)
        yield host, processor.chip


@contextmanager
def remote(socket: Path, vcpu: Path | None = None) -> Iterator[Host]:
    """A host on the server behind a socket; `vcpu`: its socket for vCPUs, if it has one."""
    from csvfast.processor.client import RemoteMachine
    from csvfast.processor.vmm import Host

    with refusals(), RemoteMachine(socket, vcpu_path=vcpu) as machine, Host(machine) as host:
        yield host


def _stop_anew(socket: Path, handle: int) -> None:
    """Ctrl-C in the middle of a request has ended the connection; the guest would stay behind."""
    from csvfast.errors import CsvfastError
    from csvfast.processor.client import RemoteMachine
    from csvfast.processor.vmm import Host

    with suppress(CsvfastError, OSError), RemoteMachine(socket) as machine, Host(machine) as host:
        host.stop(handle)


@contextmanager
def refusals() -> Iterator[None]:
    """What the firmware refuses, and a report that does not hold, is a failed check (1), not a broken environment."""
    from csvfast.errors import FirmwareError, VerificationError

    try:
        yield
    except (FirmwareError, VerificationError) as refusal:
        raise CommandError(str(refusal), ExitCode.CHECK_FAILED) from refusal
