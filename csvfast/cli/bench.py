"""`csvfast bench`: csvfast's kernels and the peers on this machine, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csvfast.cli.common import CommandError, ExitCode, console, format_bytes, format_rate, parse_size, progress

if TYPE_CHECKING:
    from rich.console import Console

    from csvfast.benchmark import Machine, Plan, Result

__all__ = ["bench", "print_table"]

Quick = Annotated[bool, typer.Option("--quick", help="Short runs: a tenth of the time, three rounds.")]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="Only this name, or those that begin so; repeat for more.")
]
Kernel = Annotated[list[str] | None, typer.Option("--kernel", metavar="NAME", help="Only this kernel; repeat for more.")]
Threads = Annotated[str, typer.Option("--threads", metavar="N[,N...]", help="Thread counts to measure.")]
Size = Annotated[
    list[str] | None, typer.Option("--size", metavar="SIZE", help="Buffer of each thread; repeat for more. Default 64MiB.")
]
Seconds = Annotated[
    float | None, typer.Option("--seconds", min=0.001, max=600, help="Time for each figure. Default 1, with --quick 0.1.")
]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Compare with the other implementations found.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is standard output (no table then).")
]
ChartFile = Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="Draw a chart: .svg or .png.")]


def bench(
    quick: Quick = False,
    only: Only = None,
    kernel: Kernel = None,
    threads: Threads = "1",
    size: Size = None,
    seconds: Seconds = None,
    peers: Peers = True,
    json_path: JsonFile = None,
    chart: ChartFile = None,
) -> None:
    """Measure every primitive on every kernel against the peers on this machine."""
    for path in (chart, json_path):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise CommandError(f"{path}: the directory {str(path.absolute().parent)!r} does not exist", ExitCode.ENVIRONMENT)
    if chart is not None:
        from csvfast.benchmark.chart import check_chart

        check_chart(chart)
    plans = _plans(only, kernel, threads, size or ["64MiB"], peers)

    from csvfast.benchmark import machine_facts

    to_stdout = json_path is not None and str(json_path) == "-"
    machine = machine_facts()
    results = _measure(plans, seconds or (0.1 if quick else 1.0), 3 if quick else 7, quiet=to_stdout)
    document = {"machine": machine, "results": results}

    import json

    from csvfast._files import write_atomically

    text = json.dumps(document, indent=2) + "\n"
    if to_stdout:
        sys.stdout.write(text)
    else:
        print_table(console(), machine, results)
        if json_path is not None:
            write_atomically(json_path, text)
    if chart is not None:
        from csvfast.benchmark.chart import draw_chart

        draw_chart(chart, results, machine)


def _plans(only: list[str] | None, kernels: list[str] | None, threads: str, sizes: list[str], peers: bool) -> list[Plan]:
    """One plan for each buffer size. Every option is checked before anything runs."""
    import csvfast
    from csvfast.benchmark import NAMES, Plan

    names = tuple(name for name in NAMES if only is None or any(name == want or name.startswith(want) for want in only))
    unknown = [want for want in only or () if not any(name.startswith(want) for name in NAMES)]
    if unknown:
        raise CommandError(f"--only {unknown[0]!r}: expected one of {', '.join(NAMES)}, or how some of them begin")
    entries = csvfast.info()["kernels"].values()
    known = {name for entry in entries for name in entry["compiled"]}
    usable = {name for entry in entries for name in entry["available"]}
    for name in kernels or ():
        if name not in known:
            raise CommandError(f"--kernel {name!r}: expected one of {', '.join(sorted(known))}")
        if name not in usable:
            raise CommandError(f"--kernel {name!r}: this CPU cannot run it", ExitCode.ENVIRONMENT)
    try:
        counts = tuple(int(text) for text in threads.split(","))
    except ValueError:
        counts = ()
    if not counts or not all(1 <= count <= 1024 for count in counts):
        raise CommandError(f"--threads {threads!r}: expected numbers from 1 to 1024 with commas between")
    plans = []
    for text in sizes:
        count = parse_size(text)
        if count < 4096 or count % 4096 or count > 16 << 30:
            raise CommandError(f"--size {text!r}: expected a multiple of 4096 bytes from 4KiB to 16GiB")
        plans.append(Plan(count, names, tuple(kernels) if kernels else None, counts, peers))
    return plans


def _measure(plans: list[Plan], seconds: float, rounds: int, *, quiet: bool) -> list[Result]:
    from csvfast.benchmark import make_cases, run_cases

    # Cases are made twice, here to count them: making one costs a known-answer check, not a measurement.
    cases = [case for plan in plans for case in make_cases(plan)]
    if not cases:
        raise CommandError("nothing to measure: none of the primitives asked for has the kernel asked for")
    with progress("benchmark", len(cases) * rounds, unit="runs", enabled=not quiet) as advance:
        return list(run_cases(cases, seconds=seconds, rounds=rounds, started=lambda _label: advance(1)))


def print_table(out: Console, machine: Machine, results: list[Result]) -> None:
    """The machine's facts and one table: rate, cycles per byte, the ratio to the best peer of the same name, and the ratio to
    hashlib's single SM3 stream, the yardstick that every Python has."""
    from rich.table import Table

    from csvfast.benchmark import rate_of

    clock = machine["clock_hertz"]
    kernels = ", ".join(f"{primitive} {name}" for primitive, name in machine["kernels"].items())
    out.print(f"[bold]{machine['cpu'] or machine['architecture']}[/], {machine['cpus']} CPUs, "
              + (f"clock {clock / 1e9:.2f} GHz ({machine['clock_source']}), " if clock else "")
              + f"governor {machine['governor'] or 'not readable'}")  # fmt: skip
    out.print(f"{machine['system']}; Python {machine['python']}; {machine['openssl']}")
    out.print(f"kernels without forcing: {kernels}")
    caption = (
        "c/B: cycles per byte of a thread at that clock. x peer: ratio to the fastest peer of the same name and thread count. "
        "x hashlib: ratio to hashlib's single SM3 stream. Median of rounds, of CPU time for one thread, of wall time (w) "
        "otherwise; ~ marks rounds more than 10 % apart."
    )
    table = Table(caption=caption, caption_justify="left")
    for heading in ("name", "kernel or peer", "buffer", "rate", "c/B", "x peer", "x hashlib"):
        table.add_column(heading, justify="left" if heading in ("name", "kernel or peer") else "right", no_wrap=True)
    best = _best_peers(results)
    yardstick = best_of(results, "sm3/1048576", "hashlib")
    previous = ""
    for result in results:
        rate, counted = rate_of(result), "ops_per_second" in result
        if previous and result["name"] != previous:
            table.add_section()
        shown, previous = result["name"] if result["name"] != previous else "", result["name"]
        variant = f" ({result['variant']})" if result["variant"] else ""
        peer_rate = best.get((result["name"], result["threads"]))
        ratio = f"{rate / peer_rate:.2f}" if peer_rate and result["peer"] is None else ""
        cycles = f"{clock * result['threads'] / rate:.3g}" if clock and rate and not counted else ""
        style = "" if result["peer"] is None else "dim"
        threads = f" x{result['threads']}" if result["threads"] > 1 else ""
        shown_rate = f"{rate:,.0f}/s" if counted else format_rate(rate)
        speed = ("~" if result["spread"] > 0.1 else "") + shown_rate + (" w" if result["clock"] == "wall" else "")
        table.add_row(shown, (result["peer"] or result["kernel"] or "csvfast") + variant + threads,
                      "" if counted else format_bytes(result["buffer_bytes"]), speed, cycles, ratio,
                      f"{rate / yardstick:.2f}" if yardstick and not counted else "", style=style)  # fmt: skip
    out.print(table)


def best_of(results: list[Result], name: str, peer: str) -> float | None:
    """Bytes per second of one peer on one thread; None when it was not measured."""
    rates = [r.get("bytes_per_second", 0.0) for r in results if (r["name"], r["peer"], r["threads"]) == (name, peer, 1)]
    return max(rates, default=None)


def _best_peers(results: list[Result]) -> dict[tuple[str, int], float]:
    from csvfast.benchmark import rate_of

    best: dict[tuple[str, int], float] = {}
    for result in results:
        if result["peer"] is not None and result["peer"] != "libc":
            key = (result["name"], result["threads"])
            best[key] = max(best.get(key, 0.0), rate_of(result))
    return best
