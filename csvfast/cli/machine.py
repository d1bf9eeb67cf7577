"""`csvfast machine`: programs on the modelled machine."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from csvfast.cli.common import CommandError, console, format_bytes, parse_size, print_json

__all__ = ["app"]

app = typer.Typer(help="Programs on the modelled machine.", no_args_is_help=True, rich_markup_mode=None)
_SIZES = "64KiB,128KiB,256KiB,512KiB,1MiB,2MiB,4MiB,8MiB"


class FormatChoice(Enum):
    """--format of `machine trace`."""

    auto = "auto"
    lackey = "lackey"
    din = "din"


class FillChoice(Enum):
    """--fill of `machine trace`."""

    line = "line"
    page = "page"


@app.callback()
def _machine() -> None:
    """Programs on the modelled machine."""


@app.command("trace")
def trace(
    file: Annotated[Path, typer.Argument(help="Trace of valgrind's lackey (--trace-mem=yes) or in Dinero's din format.")],
    format: Annotated[FormatChoice, typer.Option("--format", help="auto: by the first access.")] = FormatChoice.auto,
    sizes: Annotated[str, typer.Option("--sizes", help="Sizes of the last cache level, with commas between.")] = _SIZES,
    fill: Annotated[FillChoice, typer.Option("--fill", help="What a miss decrypts.")] = FillChoice.line,
    memory_cycles: Annotated[int, typer.Option("--memory-cycles", min=0, help="Modelled cycles of a miss.")] = 200,
    encryption_cycles: Annotated[
        int, typer.Option("--encryption-cycles", min=0, help="Modelled cycles that encryption adds to a miss.")
    ] = 20,
    instructions: Annotated[bool, typer.Option("--instructions", help="Instruction fetches too.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first accesses.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the results: a name ending in .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A program's memory trace through TLB and caches: encryption traffic and slow-down against cache size.

    Counts are exact for the model; cycles are the sums of parameters, no measurements.
    """
    from csvfast.machine.trace import check_picture, draw_sweep, read_trace, sweep

    wanted = [parse_size(size) for size in sizes.split(",")]
    for size in wanted:
        if size < 64 or size & (size - 1):
            raise CommandError(f"--sizes: {size} bytes; expected powers of two from 64 on")
    if plot is not None:
        check_picture(plot)
    found = read_trace(file, format=format.value, instructions=instructions, limit=limit)
    options: dict[str, Any] = {
        "fill": fill.value, "memory_cycles": memory_cycles, "encryption_cycles": encryption_cycles,
    }  # fmt: skip
    results = sweep(found, wanted, **options)
    if plot is not None:
        draw_sweep(plot, results)
    if as_json:
        print_json({
            "accesses": len(found),
            "instructions": found.instructions,
            "options": options,
            "results": [
                asdict(result) | {"slow_down": result.slow_down, "traffic_per_access": result.traffic_per_access}
                for result in results
            ],
        })  # fmt: skip
        return
    from rich.table import Table

    table = Table(title=f"{len(found):,} accesses, {found.instructions:,} instruction fetches", title_justify="left")
    for heading in ("last level", "misses", "TLB misses", "decrypted", "encrypted", "SM4 bytes/access", "slow-down"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            format_bytes(result.cache_bytes), f"{result.misses:,}", f"{result.tlb_misses:,}",
            format_bytes(result.bytes_decrypted), format_bytes(result.bytes_encrypted),
            f"{result.traffic_per_access:.3f}", f"{result.slow_down:.4f}",
        )  # fmt: skip
    out = console()
    out.print(table)
    out.print("Slow-down: modelled cycles with encryption over those without. Cycles are parameters, no measurements.",
              style="dim")  # fmt: skip


@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    program: Annotated[str, typer.Argument(help="Static x86-64 Linux program, a path below --root.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The program's arguments.")] = None,
    root: Annotated[Path, typer.Option("--root", help="Directory that the program sees as /.")] = Path("/"),
    directory: Annotated[str, typer.Option("--directory", help="Working directory below the root.")] = "/",
    memory: Annotated[str, typer.Option("--memory", help="DRAM of all processes together.")] = "256MiB",
    window: Annotated[str, typer.Option("--window", help="What each process has decrypted at once.")] = "256KiB",
    dram: Annotated[Path | None, typer.Option("--dram", help="File that is the DRAM; kept.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the program; repeatable.")] = None,
    instructions: Annotated[int | None, typer.Option("--instructions", min=1, help="Limit of instructions.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0.001, help="Limit of time.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Figures on standard error afterwards.")] = False,
) -> None:
    """A static Linux program whose memory stands encrypted in the DRAM; ends with the program's exit code.

    Needs csvfast[unicorn]. A system call that the machine has not ends the run with exit code 3 and its number.
    """
    import sys

    from csvfast.machine.emulator import run_program

    environment = {"PATH": "/usr/bin:/bin:/sbin"}
    for text in setting or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise CommandError(f"--env {text!r}: expected NAME=VALUE")
        environment[name] = value
    sys.stdout.flush()
    result = run_program(
        program, arguments or [], root=root, directory=directory, environment=environment, memory=parse_size(memory),
        window=parse_size(window), dram=dram, instructions=instructions, seconds=seconds,
    )  # fmt: skip
    if stats:
        print(f"csvfast: {result.calls} system calls, {result.fills} fills, {result.decrypted} pages decrypted, "
              f"{result.encrypted} encrypted, {result.flushes} flushes", file=sys.stderr)  # fmt: skip
    raise typer.Exit(result.exit_code)
