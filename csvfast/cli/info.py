"""`csvfast info`: what this build can do on this CPU."""

from __future__ import annotations

from typing import Annotated

import typer

from csvfast.cli.common import console, print_json

__all__ = ["info"]


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """CPU, its features, kernels available and chosen, versions."""
    import csvfast
    from csvfast.benchmark.machine import machine_facts

    machine = machine_facts()
    primitives = csvfast.info()["kernels"]
    if as_json:
        print_json({"version": csvfast.__version__, "machine": machine, "kernels": primitives})
        return

    from rich.table import Table

    out = console()
    facts = Table.grid(padding=(0, 2))
    clock = machine["clock_hertz"]
    memory = machine["memory_bytes"]
    rows = {
        "csvfast": csvfast.__version__,
        "CPU": f"{machine['cpu'] or 'unknown'} ({machine['architecture']}, {machine['cpus']} usable)",
        "clock": f"{clock / 1e9:.2f} GHz ({machine['clock_source']})" if clock else "unknown",
        "caches": ", ".join(f"{name} {size}" for name, size in machine["caches"].items()) or "unknown",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "governor": machine["governor"] or "not readable",
        "features": " ".join(machine["cpu_features"]) or "none that a kernel uses",
        "system": machine["system"],
        "Python": machine["python"],
        "OpenSSL": machine["openssl"],
    }
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/]", value)
    out.print(facts)

    table = Table(title="Kernels", title_justify="left")
    for heading in ("primitive", "in use", "this CPU can run", "it cannot run"):
        table.add_column(heading)
    for primitive, entry in primitives.items():
        missing = [name for name in entry["compiled"] if name not in entry["available"]]
        cells = (primitive, f"[green]{entry['chosen']}[/]", " ".join(entry["available"]), " ".join(missing) or "-")
        table.add_row(*cells)
    out.print(table)
