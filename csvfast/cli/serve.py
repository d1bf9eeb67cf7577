"""`csvfast platform serve`: a processor that VMMs and simulators in other processes use through a socket."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from csvfast.cli.common import CommandError, parse_size, print_json

__all__ = ["serve"]


def serve(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="State of a simulated chip, made by `csvfast chip new`.")
    ],
    socket: Annotated[Path, typer.Option("--socket", metavar="PATH", help="Unix socket to listen on.")],
    vcpu_socket: Annotated[
        Path | None,
        typer.Option("--vcpu-socket", metavar="PATH", help="Another one for what vCPUs do; the first refuses it then."),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option("--memory", metavar="FILE", help="File that is the DRAM. Default: anonymous memory."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Of the DRAM, such as 256MiB, for a new one.")
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="Firmware: 1.3/2011 or 1.4/2337.")
    ] = "1.4/2337",
    cores: Annotated[int, typer.Option("--cores", min=1, help="Cores that must WBINVD before DF_FLUSH.")] = 1,
    asids: Annotated[int, typer.Option("--asids", min=1, max=65535, help="Highest ASID.")] = 509,
    measure_vmsa: Annotated[
        bool, typer.Option("--measure-vmsa", help="Save areas extend the launch digest, as on AMD parts.")
    ] = False,
    init: Annotated[
        bool, typer.Option("--init/--no-init", help="Execute INIT with ES at the start, as a host's driver does.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON document when the server is ready.")] = False,
) -> None:
    """Serve a simulated processor on a Unix socket until SIGTERM or Ctrl-C. docs/processor-socket.md has the protocol."""
    from csvfast.processor import PROFILES, Options, Processor
    from csvfast.processor.machine import LocalMachine
    from csvfast.processor.server import ProcessorServer, open_shared_memory
    from csvfast.processor.vmm import Host

    if profile not in PROFILES:
        raise CommandError(f"--profile: {profile!r}; expected one of {', '.join(PROFILES)}")
    if size is None and (memory is None or not memory.exists()):
        raise CommandError("--size is missing; expected the DRAM's size, since there is no file yet")
    # Until the server can be stopped in order, these signals end the process as they always do.
    shared = open_shared_memory(None if size is None else parse_size(size), memory, asid_max=asids)
    try:
        options = Options(cores=cores, vmsa_measured=measure_vmsa)
        with Processor.open(directory, shared.memory, profile=PROFILES[profile], options=options) as processor:
            machine = LocalMachine(processor)
            if init:
                with Host(machine) as host:
                    host.initialise(es=True)
            with ProcessorServer(machine, shared.descriptor, socket, vcpu_path=vcpu_socket) as server:

                def stop(_signal: int, _frame: FrameType | None) -> None:
                    server.stop()

                before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
                try:
                    _announce(processor.chip.chip_id, socket, shared.memory.size, memory, profile, json)
                    server.serve()
                finally:
                    for number, handler in before.items():
                        signal.signal(number, handler)
    finally:
        shared.close()


def _announce(chip_id: str, socket: Path, size: int, memory: Path | None, profile: str, json: bool) -> None:
    """Says that clients may connect from now on."""
    if json:
        print_json(
            {
                "chip_id": chip_id,
                "profile": profile,
                "socket": str(socket),
                "memory": None if memory is None else str(memory),
                "bytes": size,
            }
        )
    else:
        print(f"simulated chip {chip_id}, firmware {profile}, {size} bytes of DRAM, listening on {socket}")
    sys.stdout.flush()
