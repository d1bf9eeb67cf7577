"""`csvfast vm`: virtual machines on encrypted RAM, measured and launched by the processor, run by QEMU."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csvfast.cli.common import CommandError, ExitCode, parse_size, print_json
from csvfast.cli.vm_initrd import initrd as _initrd

if TYPE_CHECKING:
    from csvfast.memory import EncryptedMemory
    from csvfast.processor import Processor

__all__ = ["app"]

app = typer.Typer(help="Virtual machines on encrypted RAM.", no_args_is_help=True, rich_markup_mode=None)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the machine, as `vm status` lists it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SIGNAL = 128


class AcceleratorChoice(Enum):
    """--accel of `vm run`."""

    tcg = "tcg"
    kvm = "kvm"
    auto = "auto"


@app.callback()
def _vm() -> None:
    """Virtual machines on encrypted RAM."""


app.command("initrd")(_initrd)


@app.command()
def run(
    kernel: Annotated[Path, typer.Option(metavar="FILE", help="Linux kernel.")],
    initrd: Annotated[Path | None, typer.Option(metavar="FILE", help="As `vm initrd` makes it.")] = None,
    append: Annotated[str, typer.Option(metavar="TEXT", help="Kernel command line.")] = "console=ttyS0 quiet panic=-1",
    firmware: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Firmware image. Default: QEMU's BIOS, with --force-hash-table.")
    ] = None,
    force_hash_table: Annotated[
        bool, typer.Option("--force-hash-table", help="Measure the hash table although the firmware has no area for it.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="A simulated chip. Default: a new one, gone afterwards.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Guest policy; 0x45: CSV3. Default: the session's, or 1.")
    ] = None,
    session: Annotated[
        Path | None, typer.Option("--session", metavar="DIR", help="Made by `guest session`: the owner's keys.")
    ] = None,
    disk_password: Annotated[
        Path | None, typer.Option("--disk-password", metavar="FILE", help="Injected once the owner's check has passed.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option("--expect", metavar="HEX", help="The launch digest; another one: no launch, exit code 1.")
    ] = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="RAM of the guest.")] = "256MiB",
    dram: Annotated[
        Path | None, typer.Option("--dram", metavar="FILE", help="File that is the DRAM. Default: anonymous memory.")
    ] = None,
    window: Annotated[str, typer.Option("--window", metavar="SHARE|SIZE", help="Plaintext at most.")] = "1/4",
    vcpus: Annotated[int, typer.Option(min=1, max=255, help="vCPUs.")] = 1,
    accel: Annotated[AcceleratorChoice, typer.Option(help="auto: KVM where a vCPU really runs.")] = AcceleratorChoice.auto,
    qemu: Annotated[Path | None, typer.Option(metavar="FILE", help="QEMU's program.")] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", metavar="SECONDS", help="Then the machine is killed: exit code 137.")
    ] = None,
    silent_init: Annotated[
        bool, typer.Option("--silent-init", help="The guest's init reports no code: that it switched off is success.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="For the other commands.")] = None,
) -> None:
    """Measure, launch and run a guest; its console is the standard output, its exit code this command's.

    The guest's init reports its code by a line `guest: exit N`. A machine that switches itself off without one has failed (exit
    code 3), unless --silent-init says that its init never reports. Ctrl-C ends it.
    """
    from contextlib import ExitStack

    from csvfast.cli.guest_inputs import parse_bytes, parse_policy, read_secret
    from csvfast.cli.machines import refusals
    from csvfast.machine.vm import CsvVm
    from csvfast.machine.vm_csv3 import dram_bytes, with_secure_calls
    from csvfast.machine.vm_door import VmDoor
    from csvfast.machine.vm_qemu import find_bios
    from csvfast.processor import pack_disk_password
    from csvfast.processor.machine import LocalMachine
    from csvfast.processor.owner import load_owner_session
    from csvfast.processor.server import open_shared_memory
    from csvfast.processor.vmm import GuestPlan

    owner = None if session is None else load_owner_session(session)
    if disk_password is not None and owner is None:
        raise CommandError("--disk-password: only the owner can pack it; expected --session")
    word = owner.policy if policy is None and owner is not None else parse_policy("0x1" if policy is None else policy)
    expected = None if expect is None else parse_bytes("--expect", expect, 32, exactly=True)
    size = parse_size(memory)
    bios = find_bios() if firmware is None else firmware
    plan = GuestPlan(
        firmware=bios,
        kernel=kernel,
        initrd=initrd,
        append=append,
        policy=word,
        memory_size=size,
        vcpus=vcpus,
        force_hash_table=force_hash_table or firmware is None,
    )
    plan = with_secure_calls(plan)
    room = size + bios.stat().st_size + (vcpus << 12) + (4 << 20)
    if word.csv3:
        room = dram_bytes(plan, bios.stat().st_size)
    with ExitStack() as stack:
        stack.enter_context(refusals())
        made = dram is not None and not dram.exists()
        shared = open_shared_memory(-(-room // 4096) * 4096, dram)
        stack.callback(shared.close)
        if made and dram is not None:
            stack.callback(dram.unlink, missing_ok=True)
        processor = _processor(state, shared.memory)
        stack.callback(processor.close)
        secret = None
        if disk_password is not None:
            password = read_secret(disk_password)
            try:
                secret = pack_disk_password(password)
            finally:
                password[:] = bytes(len(password))
        machine = stack.enter_context(
            CsvVm(
                platform=LocalMachine(processor),
                dram=f"/proc/self/fd/{shared.descriptor}",
                plan=plan,
                expected=expected,
                owner=owner,
                secret=secret,
                window=window,
                accel=accel.value,
                qemu=qemu,
                time_limit=time_limit,
                output=_show,
                name=name,
            )
        )
        try:
            machine.launch()
        finally:
            if secret is not None:
                secret[:] = bytes(len(secret))
        door = VmDoor(machine, machine.directory) if machine.running else None
        try:
            code = machine.wait()
        finally:
            if door is not None:
                door.close()
        complaints = machine.errors().strip()
        if complaints:
            print(complaints, file=sys.stderr)
        if machine.timed_out:
            print(f"csvfast: the time limit of {time_limit} s has ended the machine", file=sys.stderr)
        elif code == 0 and machine.reported is None and not (machine.stop_requested or silent_init):
            raise CommandError(
                "the guest switched off without `guest: exit N` on its console; expected that line, or --silent-init",
                ExitCode.ENVIRONMENT,
            )
    code = ExitCode.ENVIRONMENT if code is None else code
    raise typer.Exit(_SIGNAL - code if code < 0 else code)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Default: every machine.")] = None, json: _Json = False
) -> None:
    """State, digest and memory counters of the machines that run."""
    from csvfast.machine.vm_door import ask, machines

    rows = [ask(found, "status") for found in (machines() if name is None else [name])]
    if json:
        print_json({"machines": rows})
        return
    if not rows:
        print("no machines")
    for row in rows:
        print(f"{row['name']}: {row['state']}, ASID {row['asid']}, digest {row['digest']}, {row['seconds']:.0f} s")


@app.command()
def stop(name: _Name, json: _Json = False) -> None:
    """End a machine; its guest is decommissioned, its key erased."""
    from csvfast.machine.vm_door import ask

    record = ask(name, "stop")
    print_json(record) if json else print(f"{record['name']}: stopping")


@app.command()
def dump(
    name: _Name,
    out: Annotated[Path, typer.Option("--output", "-o", "--out", metavar="FILE", help="A new file: the RAM as ciphertext.")],
    json: _Json = False,
) -> None:
    """Write a running machine's RAM as the DRAM holds it: ciphertext."""
    from csvfast.machine.vm_door import ask

    record = ask(name, f"dump {out.absolute()}")
    print_json(record) if json else print(f"{record['path']}: ciphertext from system address {record['address']:#x} on")


def _processor(state: Path | None, memory: EncryptedMemory) -> Processor:
    from csvfast.processor import Processor

    if state is not None:
        return Processor.open(state, memory)
    from csvfast.certs import ManufacturingLine

    return Processor(ManufacturingLine.create().make_chip(), memory)


def _show(data: bytes) -> None:
    """Straight to the descriptor: the console comes from a thread of its own."""
    left = memoryview(data)
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]
