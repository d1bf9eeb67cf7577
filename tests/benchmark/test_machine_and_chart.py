"""Facts of the machine, and charts of results."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from csvfast.benchmark import clock_hertz, machine_facts
from csvfast.benchmark.chart import ChartError, draw_chart
from csvfast.benchmark.runner import Result


def result(name: str, kernel: str | None, peer: str | None, rate: float) -> Result:
    return {
        "name": name, "kernel": kernel, "peer": peer, "bytes_per_second": rate, "threads": 1, "variant": None,
        "buffer_bytes": 4096, "rounds": 1, "spread": 0.0, "clock": "cpu",
    }  # fmt: skip


def test_facts_are_json() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpus"] >= 1
    assert "portable" in facts["kernels"].values() or facts["cpu_features"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the clock loop is x86-64 machine code")
def test_clock_is_plausible_and_repeats() -> None:
    values = []
    for _ in range(5):
        hertz, source = clock_hertz()
        assert source == "measured"
        assert hertz is not None
        assert 0.4e9 < hertz < 8e9
        values.append(hertz)
    assert max(values) / min(values) < 1.5


def test_svg_names_everything_and_repeats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = [result("sm3/1048576", "avx2", None, 5e8), result("sm3/1048576", None, "hashlib", 4.6e8)]
    counted = result("sm2-sign", "portable", None, 5e4)
    counted["ops_per_second"] = counted.pop("bytes_per_second")
    results.append(counted)
    facts = machine_facts()
    draw_chart(tmp_path / "a.svg", results, facts)
    draw_chart(tmp_path / "b.svg", results, facts)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for shown in ("sm3/1048576", "csvfast avx2", "hashlib", "sm2-sign  (thousand/s)"):
        assert f"<!-- {shown} -->" in text  # matplotlib draws text as paths and leaves it in comments


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChartError, match=r"\.svg or \.png"):
        draw_chart(tmp_path / "a.jpeg", [], machine_facts())
    assert list(tmp_path.iterdir()) == []
