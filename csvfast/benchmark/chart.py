"""Draws benchmark results as bars, one panel per name. Needs matplotlib (the bench extra)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from csvfast._files import write_atomically
from csvfast.benchmark.machine import Machine
from csvfast.benchmark.runner import Result, rate_of

__all__ = ["ChartError", "MatplotlibMissingError", "check_chart", "draw_chart"]

SUFFIXES: Final = (".svg", ".png")
_OWN: Final = "#1f6f8b"
_PEER: Final = "#b0b7bd"


class ChartError(ValueError):
    """The file name's ending is of no picture format that is drawn here."""

    exit_code = 2


class MatplotlibMissingError(ImportError):
    """matplotlib is not installed."""


def check_chart(path: Path) -> None:
    """Raises what draw_chart would raise for this path, before the work of measuring is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise ChartError(f"chart {str(path)!r}: expected a name ending in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MatplotlibMissingError("a chart needs matplotlib: pip install 'csvfast[bench]'") from error


def draw_chart(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """Writes an SVG or PNG, by the path's suffix. Bars are bytes per second, or operations where the name says so, on a
    logarithmic axis: peers differ by a factor of a thousand."""
    check_chart(path)
    import matplotlib

    matplotlib.use("agg")  # no display
    matplotlib.rcParams["svg.hashsalt"] = "csvfast"  # equal results give equal files
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["name"] for result in results))
    panels = [[result for result in results if result["name"] == name] for name in names]
    heights = [0.9 + 0.26 * len(panel) for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, name, panel in zip(axes[:, 0], names, panels, strict=True):
        ordered = sorted(panel, key=rate_of)
        counted = any("ops_per_second" in result for result in panel)
        rates = [rate_of(result) / (1e3 if counted else 1e9) for result in ordered]
        colours = [_OWN if result["peer"] is None else _PEER for result in ordered]
        bars = axis.barh([_label(result) for result in ordered], rates, color=colours)
        axis.bar_label(bars, [f" {rate:.3g}" for rate in rates], fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.set_title(f"{name}  (thousand/s)" if counted else name, loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("GB/s (logarithmic)", fontsize=9)
    clock = machine["clock_hertz"]
    title = f"csvfast {machine['csvfast']} on {machine['cpu'] or machine['architecture']}"
    figure.suptitle(title + (f" at {clock / 1e9:.2f} GHz" if clock else ""), fontsize=11)

    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    write_atomically(path, content.getvalue())


def _label(result: Result) -> str:
    who = result["peer"] or f"csvfast {result['kernel'] or ''}"
    variant = f" ({result['variant']})" if result["variant"] else ""
    threads = f", {result['threads']} threads" if result["threads"] > 1 else ""
    return f"{who.strip()}{variant}{threads}"
