"""Puts figures of a benchmark run into a document, between its performance comments.

usage: performance_table.py BENCH.json DOCUMENT.md

BENCH.json comes from `csvfast bench --json BENCH.json`. The table shows, for each name, csvfast's kernels and the fastest peer.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN = "<!-- performance:"
END = "<!-- /performance -->"


def amount(result: dict[str, Any]) -> float:
    """Bytes or operations per second."""
    return float(result["ops_per_second"] if "ops_per_second" in result else result["bytes_per_second"])


def rate(result: dict[str, Any]) -> str:
    """Bytes or operations per second in a readable unit."""
    value = amount(result)
    if "ops_per_second" in result:
        return f"{value:,.0f}/s"
    return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"


def table(document: dict[str, Any]) -> str:
    """Markdown for one run: a sentence about the machine and a table, one line for each kernel of each name."""
    machine, results = document["machine"], [r for r in document["results"] if r["threads"] == 1]
    clock = machine["clock_hertz"]
    lines = [
        f"{machine['cpu'] or machine['architecture']}"
        + (f" at {clock / 1e9:.2f} GHz" if clock else "")
        + f", one thread, {machine['system']}, Python {machine['python']}, {machine['openssl']}, csvfast {machine['csvfast']}.",
        "",
        "| | kernel | rate | c/B | fastest peer | its rate | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name]
        peers = sorted((r for r in same if r["peer"] is not None), key=lambda r: -amount(r))
        own = [result for result in same if result["peer"] is None]
        for result in own or peers[:1]:
            peer = peers[0] if peers and own else None
            variant = f" ({result['variant']})" if result["variant"] else ""
            cells = [
                f"`{name}`{variant}",
                result["kernel"] or result["peer"],
                rate(result),
                f"{clock / result['bytes_per_second']:.2f}" if clock and "bytes_per_second" in result else "",
                peer["peer"] if peer else "",
                rate(peer) if peer else "",
                f"{amount(result) / amount(peer):.1f}" if peer else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Rewrites the document in place."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    text = target.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(BEGIN)}[^\n]*\n).*?({re.escape(END)})", re.DOTALL)
    if not pattern.search(text):
        print(f"{target}: has no line {BEGIN!r} with {END!r} after it", file=sys.stderr)
        return 2
    made = table(json.loads(source.read_text(encoding="utf-8")))
    target.write_text(pattern.sub(lambda found: found[1] + made + "\n" + found[2], text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
