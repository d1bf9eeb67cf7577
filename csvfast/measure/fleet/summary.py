"""The summary of a job: one HTML page that needs nothing else, no script, no font, no network.

What was measured, throughput over time, the slowest, failures, and sources that are the same. Everything on it comes from rows,
so a page can be made of any list at any time. Everything shown is escaped: names come from images, which nobody has to trust.
"""

from __future__ import annotations

import html
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from csvfast._files import write_atomically
from csvfast.measure.errors import TargetError
from csvfast.measure.fleet.rows import ERROR_KINDS, Row
from csvfast.measure.source import AnyPath

__all__ = ["summary_page", "write_summary"]

SHOWN: Final = 50
"""Lines of a list at most; what is left out is counted."""
STEPS: Final = 60
WIDTH: Final = 960
HEIGHT: Final = 200


def write_summary(rows: Iterable[Row], path: AnyPath, *, title: str = "Measurements") -> None:
    """Writes the page, whole or not at all. Raises TargetError."""
    page = summary_page(rows, title=title)
    try:
        write_atomically(Path(path), page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror or error}") from error


def summary_page(rows: Iterable[Row], *, title: str = "Measurements") -> str:
    """The page as text."""
    table = list(rows)
    done = [row for row in table if row.digest is not None]
    parts = [
        _head(table, done, title),
        _facts(table, done),
        _throughput(done),
        _failures([row for row in table if not row.ok]),
        _duplicates(done),
        _slowest(done),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>\n" + "\n".join(part for part in parts if part) + "\n</main></body></html>\n"
    )


def _head(table: Sequence[Row], done: Sequence[Row], title: str) -> str:
    failed = sum(not row.ok for row in table)
    began, ended = _span(done)
    when = f"{_when(began)} to {_when(ended)} UTC" if done else "nothing was measured"
    verdict = f"{failed} of {len(table)} failed" if failed else f"all {len(table)} measured" if table else "no sources"
    state = "bad" if failed else "good"
    return f"<header><h1>{_text(title)}</h1><p class=lead>{when}</p><p class={state}>{verdict}</p></header>"


def _facts(table: Sequence[Row], done: Sequence[Row]) -> str:
    size = sum(row.size or 0 for row in done)
    began, ended = _span(done)
    work = sum(row.seconds for row in done)
    digests = Counter(row.digest for row in done)
    figures = [
        (f"{len(done):,}", "measured"),
        (f"{len(table) - len(done):,}", "without a digest"),
        (_bytes(size), "bytes"),
        (_seconds(ended - began), "from first to last"),
        (f"{_bytes(size / (ended - began))}/s" if ended > began else "–", "on average"),
        (_seconds(work), "of work"),
        (f"{len(digests):,}", "different digests"),
        (f"{len({row.worker for row in done}):,}", "workers"),
    ]
    cards = "".join(f"<div><b>{_text(value)}</b><span>{name}</span></div>" for value, name in figures)
    kinds = Counter((row.mode, row.content) for row in table)
    by_mode = "".join(
        f"<tr><td>{mode}</td><td>{'virtual disk' if content == 'disk' else 'file'}</td><td class=n>{count:,}</td>"
        f"<td class=n>{_bytes(sum(row.size or 0 for row in done if (row.mode, row.content) == (mode, content)))}</td></tr>"
        for (mode, content), count in sorted(kinds.items())
    )
    head = "<tr><th>mode</th><th>content</th><th class=n>sources</th><th class=n>bytes</th></tr>"
    return f"<section><h2>What was measured</h2><div class=cards>{cards}</div><table>{head}{by_mode}</table></section>"


def _throughput(done: Sequence[Row]) -> str:
    """Each row's bytes are spread evenly over the seconds that its work took."""
    began, ended = _span(done)
    span = ended - began
    if span <= 0:
        return ""
    step = span / STEPS
    rates = [0.0] * STEPS
    ends = [0] * STEPS
    for row in done:
        left, right = row.started - began, row.started + row.seconds - began
        first, last = (min(max(int(at / step), 0), STEPS - 1) for at in (left, right))
        ends[last] += 1
        for place in range(first, last + 1):
            share = min(right, (place + 1) * step) - max(left, place * step)
            part = max(share, 0.0) / row.seconds if row.seconds > 0 and first != last else 1.0
            rates[place] += (row.size or 0) * min(part, 1.0) / step
    top = max(rates) or 1.0
    wide = WIDTH / STEPS
    bars = []
    for place, rate in enumerate(rates):
        tall = rate / top * HEIGHT
        said = f"{_seconds(place * step)} to {_seconds((place + 1) * step)}: {_bytes(rate)}/s, {ends[place]:,} ended"
        where = f'x="{place * wide:.1f}" y="{HEIGHT - tall:.1f}" width="{wide - 1:.1f}" height="{tall:.1f}"'
        bars.append(f"<rect {where}><title>{said}</title></rect>")
    lines = "".join(
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT * (1 - share):.0f}" y2="{HEIGHT * (1 - share):.0f}"/>'
        f'<text x="4" y="{HEIGHT * (1 - share) + 13:.0f}">{_bytes(top * share)}/s</text>'
        for share in (1.0, 0.5)
    )
    marks = "".join(
        f'<text x="{min(share * WIDTH, WIDTH - 4):.0f}" y="{HEIGHT + 18}" text-anchor="{anchor}">{_seconds(span * share)}</text>'
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 26}" role="img" aria-label="throughput over time">{"".join(bars)}'
        f"<g class=axis>{lines}{marks}</g></svg>"
    )
    return f"<section><h2>Throughput <small>{_seconds(span)}, at most {_bytes(top)}/s</small></h2>{picture}</section>"


def _failures(failed: Sequence[Row]) -> str:
    if not failed:
        return ""
    kinds = Counter(row.error or "unexpected" for row in failed)
    words = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    lines = []
    for row in failed[:SHOWN]:
        if row.error is not None:
            meaning, text = ERROR_KINDS.get(row.error, ""), row.message or ""
        else:
            meaning, text = "another digest than expected", f"is {row.digest}, expected {row.expect}"
        kind = row.error or "unexpected"
        lines.append(f"<tr><td><b title='{_text(meaning)}'>{kind}</b></td><td>{_text(row.name)}</td><td>{_text(text)}</td></tr>")
    head = "<tr><th>kind</th><th>source</th><th>what happened</th></tr>"
    table = f"<table>{head}{''.join(lines)}</table>{_more(failed)}"
    return f"<section class=failures><h2>Failures <small>{words}</small></h2>{table}</section>"


def _duplicates(done: Sequence[Row]) -> str:
    """Digests that several sources share; empty ones are all alike and say nothing."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in done:
        if row.size:
            groups[(row.mode, row.options, row.digest or "")].append(row)
    twice = [rows for rows in groups.values() if len({(row.name, row.content) for row in rows}) > 1]
    if not twice:
        return ""
    twice.sort(key=lambda rows: -(len(rows) - 1) * (rows[0].size or 0))
    spare = sum((len(rows) - 1) * (rows[0].size or 0) for rows in twice)
    lines = []
    for rows in twice[:SHOWN]:
        names = "<br>".join(_text(row.name) for row in rows[:5])
        rest = f"<br><i>and {len(rows) - 5:,} more</i>" if len(rows) > 5 else ""
        lines.append(
            f"<tr><td><code>{rows[0].digest}</code></td><td class=n>{len(rows):,}</td>"
            f"<td class=n>{_bytes(rows[0].size or 0)}</td><td>{names}{rest}</td></tr>"
        )
    head = "<tr><th>digest</th><th class=n>times</th><th class=n>each</th><th>sources</th></tr>"
    title = f"<h2>The same contents <small>{_bytes(spare)} more than once</small></h2>"
    return f"<section>{title}<table>{head}{''.join(lines)}</table>{_more(twice)}</section>"


def _slowest(done: Sequence[Row]) -> str:
    slow = sorted((row for row in done if row.seconds > 0), key=lambda row: -row.seconds)[:20]
    if not slow:
        return ""
    longest = slow[0].seconds
    lines = "".join(
        f"<tr><td>{_text(row.name)}</td><td>{row.mode}</td><td class=n>{_bytes(row.size or 0)}</td>"
        f"<td class=n>{_bytes((row.size or 0) / row.seconds)}/s</td>"
        f"<td class=bar><i style='width:{row.seconds / longest * 100:.1f}%'></i><b>{_seconds(row.seconds)}</b></td></tr>"
        for row in slow
    )
    head = "<tr><th>source</th><th>mode</th><th class=n>bytes</th><th class=n>rate</th><th>time</th></tr>"
    return f"<section><h2>The slowest</h2><table>{head}{lines}</table></section>"


def _more(found: Sequence[object]) -> str:
    return f"<p class=more>and {len(found) - SHOWN:,} more</p>" if len(found) > SHOWN else ""


def _span(done: Sequence[Row]) -> tuple[float, float]:
    timed = [row for row in done if row.started > 0]
    if not timed:
        return 0.0, 0.0
    return min(row.started for row in timed), max(row.started + row.seconds for row in timed)


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))


def _text(value: str) -> str:
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in value)
    return html.escape(shown, quote=True)


def _seconds(value: float) -> str:
    if 0 < value < 0.0995:
        return f"{value * 1000:.1f} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


_STYLE: Final = """
:root{--ink:#1d2733;--soft:#5b6b7c;--line:#dde4ea;--card:#f5f8fa;--blue:#2b6cb0;--bad:#b3261e;--good:#2c7a4b;--page:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9fb0c0;--line:#2d3a47;--card:#1b242d;--blue:#6cb0f5;
--bad:#ff8a80;--good:#7fd6a1;--page:#12181e}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 24px}h1{margin:0;font-size:28px}h2{font-size:19px;margin:36px 0 12px}
h2 small{font-weight:400;color:var(--soft);font-size:14px;margin-left:8px}.lead{margin:4px 0;color:var(--soft)}
.good,.bad{display:inline-block;margin:8px 0 0;padding:2px 12px;border-radius:12px;color:var(--page);background:var(--good)}
.bad{background:var(--bad)}.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin-bottom:16px}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.cards b{display:block;font-size:21px;font-variant-numeric:tabular-nums}.cards span{color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%;font-size:14px}th{color:var(--soft);font-weight:600;text-align:left}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}code{font:12px/1.4 ui-monospace,monospace}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px}
rect{fill:var(--blue)}.axis line{stroke:var(--soft);stroke-dasharray:3 4;opacity:.5}.axis text{fill:var(--ink);font-size:12px;
paint-order:stroke;stroke:var(--card);stroke-width:4px}
.failures b{color:var(--bad);white-space:nowrap}
.bar{width:30%;white-space:nowrap}.bar i{display:inline-block;height:10px;background:var(--blue);
border-radius:3px;max-width:70%;min-width:2px}.bar b{font-weight:400;margin-left:8px}.more{color:var(--soft)}
@media (max-width:640px){.cards{grid-template-columns:repeat(2,1fr)}}
"""
