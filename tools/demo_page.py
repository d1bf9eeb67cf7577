"""The demo's report: one HTML page that needs nothing else, no script, no font, no network.

Bars on a common axis of time, what the host saw at each step, the attacks and what stopped them, evidence, measurements, and
pictures of memory: one cell a page, its colour the entropy of its bytes.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

__all__ = ["Attack", "Page", "Picture", "Step", "entropies", "hexdump", "write_page"]

PAGE: Final = 4096
_COLUMNS: Final = 64
_CELL: Final = 9


@dataclass(frozen=True)
class Step:
    """One step of the container's life. begin, seconds: on the run's own clock. seen: what the host had before it."""

    title: str
    text: str
    begin: float
    seconds: float
    seen: str = ""


@dataclass(frozen=True)
class Attack:
    """What was tried, what stopped it, and its own words."""

    title: str
    tried: str
    stopped_by: str
    words: str
    outcome: Literal["refused", "noise", "SUCCEEDED"]


@dataclass(frozen=True)
class Picture:
    """Memory as one side sees it: entropy of each page in bits a byte, NaN for a page of zeros, and some bytes of it."""

    title: str
    text: str
    bits: Sequence[float]
    sample: str


@dataclass
class Page:
    """Everything that the report shows; `facts`, `measurements` and `timings` are rows of name and value."""

    title: str
    subtitle: str
    statement: str
    steps: list[Step] = field(default_factory=list)
    attacks: list[Attack] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    measurements: list[tuple[str, str]] = field(default_factory=list)
    timings: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    output: str = ""
    footer: str = ""


def entropies(data: bytes | memoryview, page: int = PAGE) -> list[float]:
    """Shannon entropy of each page in bits a byte; NaN for a page of zeros, which nobody has written."""
    view = memoryview(data)
    found = []
    for start in range(0, len(view), page):
        piece = bytes(view[start : start + page])
        if not piece.strip(b"\0"):
            found.append(math.nan)
            continue
        size = len(piece)
        found.append(-sum(count / size * math.log2(count / size) for count in Counter(piece).values()))
    return found


def hexdump(data: bytes, address: int = 0, rows: int = 8) -> str:
    """Rows of sixteen bytes as hexdump -C prints them."""
    lines = []
    for offset in range(0, min(len(data), 16 * rows), 16):
        piece = data[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"{address + offset:08x}  {piece[:8].hex(' ')}  {piece[8:].hex(' ')}  |{text}|")
    return "\n".join(lines)


def write_page(path: Path, page: Page) -> None:
    """Writes the report. Everything shown is escaped: names and output come from images, which nobody has to trust."""
    parts = [
        _timeline(page.steps),
        _output(page),
        _attacks(page.attacks),
        _pictures(page.pictures),
        _table("Evidence", page.facts),
        _table("Measurements", page.measurements),
        _table("Where the time went", page.timings),
    ]
    path.write_text(
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><title>{_text(page.title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>\n<header><h1>{_text(page.title)}</h1>"
        f"<p class=lead>{_text(page.subtitle)}</p><p class=statement>{_text(page.statement)}</p></header>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>{_text(page.footer)}</footer>\n</main></body></html>\n",
        encoding="utf-8",
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _timeline(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    first = min(step.begin for step in steps)
    whole = max(step.begin + step.seconds for step in steps) - first or 1.0
    rows = []
    for number, step in enumerate(steps, 1):
        left, width = (step.begin - first) / whole * 100, max(step.seconds / whole * 100, 0.4)
        seen = f"<details><summary>what the host saw</summary><pre>{_text(step.seen)}</pre></details>" if step.seen else ""
        rows.append(
            f"<li><div class=row><span class=number>{number}</span><div class=what><strong>{_text(step.title)}</strong>"
            f"<p>{_text(step.text)}</p>{seen}</div><div class=axis><i style='left:{left:.2f}%;width:{width:.2f}%'></i>"
            f"<b>{_seconds(step.seconds)}</b></div></div></li>"
        )
    return f"<section><h2>Timeline <small>{_seconds(whole)} in all</small></h2><ol class=steps>{''.join(rows)}</ol></section>"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _output(page: Page) -> str:
    if not page.output:
        return ""
    return f"<section><h2>What the container said</h2><pre class=output>{_text(page.output)}</pre></section>"


def _attacks(attacks: Sequence[Attack]) -> str:
    if not attacks:
        return ""
    cards = "".join(
        f"<article class='card {'bad' if attack.outcome == 'SUCCEEDED' else 'good'}'><span class=badge>{attack.outcome}</span>"
        f"<h3>{_text(attack.title)}</h3><p>{_text(attack.tried)}</p><p class=by>{_text(attack.stopped_by)}</p>"
        f"<pre>{_text(attack.words)}</pre></article>"
        for attack in attacks
    )
    return f"<section><h2>Attacks</h2><div class=cards>{cards}</div></section>"


def _pictures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    drawn = "".join(
        f"<figure><figcaption><strong>{_text(picture.title)}</strong><br>{_text(picture.text)}</figcaption>"
        f"{_heat(picture)}<pre>{_text(picture.sample)}</pre></figure>"
        for picture in pictures
    )
    scale = "".join(f"<i style='background:{_colour(bits)}'></i>" for bits in (0.5, 2, 3.5, 5, 6.5, 7.5, 7.95))
    legend = f"<p class=legend>entropy, bits a byte: 0 {scale} 8 <i style='background:var(--empty)'></i> never written</p>"
    return f"<section><h2>Memory, page by page</h2>{legend}<div class=figures>{drawn}</div></section>"


def _heat(picture: Picture) -> str:
    """Cells of one colour that stand side by side are one rectangle: thousands of pages stay a small file."""
    rows = -(-len(picture.bits) // _COLUMNS)
    drawn: list[str] = []
    for row in range(rows):
        cells = [_colour(bits) for bits in picture.bits[row * _COLUMNS : (row + 1) * _COLUMNS]]
        start = 0
        for column in range(1, len(cells) + 1):
            if column == len(cells) or cells[column] != cells[start]:
                width = (column - start) * _CELL - 1
                drawn.append(
                    f"<rect x={start * _CELL} y={row * _CELL} width={width} height={_CELL - 1} style='fill:{cells[start]}'/>"
                )
                start = column
    known = [bits for bits in picture.bits if not math.isnan(bits)]
    mean = sum(known) / len(known) if known else 0.0
    return (
        f"<svg viewBox='0 0 {_COLUMNS * _CELL} {rows * _CELL}' role=img aria-label='{_text(picture.title)}'>"
        f"{''.join(drawn)}</svg><p class=mean>{len(known)} pages written, mean entropy {mean:.3f} bits a byte</p>"
    )


def _colour(bits: float) -> str:
    """From dark (text, tables) over green to bright: only noise is bright. Sixteen steps, so that neighbours join."""
    if math.isnan(bits):
        return "var(--empty)"
    part = round(min(max(bits / 8, 0.0), 1.0) ** 3 * 15) / 15
    low, high = (38, 46, 92), (255, 196, 84)
    middle = (35, 138, 122)
    near, far, share = (low, middle, part * 2) if part < 0.5 else (middle, high, part * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(near, far, strict=True))


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<section><h2>{_text(title)}</h2><table>{lines}</table></section>" if lines else ""


_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#5b6478;--paper:#f6f7fb;--card:#fff;--line:#dfe3ee;--bar:#2a7f74;
--good:#1d7a4f;--bad:#b3261e;--empty:#e6e9f2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f2;--soft:#98a2b8;--paper:#11141c;--card:#191e2a;--line:#2a3142;--bar:#3bb3a2;
--good:#4cc38a;--bad:#ff8a80;--empty:#232938}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}h1{font-size:2rem;line-height:1.2;margin:0 0 .4rem}
h2{font-size:1.2rem;margin:2.6rem 0 .9rem}h2 small{color:var(--soft);font-weight:400}h3{margin:.2rem 0;font-size:1rem}
.lead{font-size:1.1rem;color:var(--soft);margin:0}.statement{
border-left:4px solid var(--bar);padding:.5rem 1rem;background:var(--card)}
pre{font:12.5px/1.45 ui-monospace,monospace;overflow-x:auto;margin:.4rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.steps{list-style:none;padding:0;margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px}
.steps li+li{border-top:1px solid var(--line)}.row{
display:grid;grid-template-columns:2.2rem 1fr 16rem;gap:.8rem;padding:.8rem 1rem}
.number{color:var(--soft);font-variant-numeric:tabular-nums}.what p{margin:.1rem 0;color:var(--soft);font-size:.93rem}
summary{cursor:pointer;color:var(--bar);font-size:.88rem}.axis{position:relative;min-height:2.4rem}
.axis i{position:absolute;top:.35rem;height:.7rem;background:var(--bar);border-radius:4px}
.axis b{position:absolute;top:1.2rem;right:0;font-size:.82rem;font-weight:500;color:var(--soft);font-variant-numeric:tabular-nums}
.output{background:#10131b;color:#d9f2e6;padding:1rem;border-radius:10px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--line);border-top:4px solid var(--good);border-radius:10px;padding:.9rem 1rem}
.card.bad{border-top-color:var(--bad)}
.card p{overflow-wrap:anywhere;margin:.3rem 0;font-size:.93rem;color:var(--soft)}.card .by{color:var(--ink)}
.badge{float:right;margin-left:.6rem;font-size:.78rem;font-weight:600;color:var(--good)}.bad .badge{color:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem}
figure pre{white-space:pre;font-size:11px}figcaption{font-size:.93rem;margin-bottom:.6rem}
svg{width:100%;height:auto;display:block}.mean{
margin:.4rem 0;font-size:.86rem;color:var(--soft)}
.legend{font-size:.86rem;color:var(--soft)}.legend i{
display:inline-block;width:1rem;height:.8rem;margin:0 1px;vertical-align:-1px}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line);border-radius:10px;font-size:.93rem}
th,td{text-align:left;padding:.45rem .9rem;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
th{font-weight:500;color:var(--soft);width:16rem}td{font-family:ui-monospace,monospace;font-size:.85rem}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media(max-width:48rem){.row{grid-template-columns:1.6rem 1fr}.axis{grid-column:2}}
@media print{body{background:#fff}.card,figure,.steps{break-inside:avoid}}
"""
