"""`csvfast bench`: JSON shape and names, filters, table, chart. Figures themselves are not judged here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import csvfast
from csvfast.benchmark import NAMES

SHORT = ("--seconds", "0.002", "--size", "128KiB")


def run(csvfast_command: Any, *arguments: object) -> dict[str, Any]:
    done = csvfast_command("bench", *SHORT, "--quick", "--json", "-", *arguments)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def test_all_names_and_their_shape(csvfast_command: Any) -> None:
    shown = run(csvfast_command)
    assert set(shown) == {"machine", "results"}
    assert list(dict.fromkeys(result["name"] for result in shown["results"])) == list(NAMES)
    for result in shown["results"]:
        assert ("bytes_per_second" in result) != ("ops_per_second" in result)
        assert result.get("bytes_per_second", 1) > 0
        assert result["threads"] == 1
        # Ours have a kernel and no peer, peers the other way round.
        assert (result["kernel"] is None) != (result["peer"] is None)
    machine = shown["machine"]
    assert machine["csvfast"] == csvfast.__version__
    assert machine["kernels"]["sm4"] == csvfast.info()["kernels"]["sm4"]["chosen"]


def test_every_available_kernel_is_measured(csvfast_command: Any) -> None:
    shown = run(csvfast_command, "--only", "sm4-xts-encrypt", "--only", "sm3", "--no-peers")
    measured: dict[str, set[str]] = {}
    for result in shown["results"]:
        measured.setdefault(result["name"], set()).add(result["kernel"])
    kernels = csvfast.info()["kernels"]
    assert measured["sm4-xts-encrypt/4096"] == set(kernels["sm4"]["available"])
    assert measured["sm3/1048576"] == set(kernels["sm3"]["available"])
    assert measured["sm3-many/4096"] == set(kernels["sm3-many"]["available"])


def test_filters(csvfast_command: Any) -> None:
    shown = run(csvfast_command, "--only", "sm4-ctr/65536", "--kernel", "portable", "--no-peers", "--threads", "1,2")
    assert [(result["kernel"], result["threads"], result["clock"]) for result in shown["results"]] == [
        ("portable", 1, "cpu"),
        ("portable", 2, "wall"),
    ]


def test_both_tweak_orders(csvfast_command: Any) -> None:
    shown = run(csvfast_command, "--only", "sm4-xts-decrypt", "--kernel", "portable", "--no-peers")
    assert [result["variant"] for result in shown["results"]] == ["gb", "ieee"]


def test_hashlib_is_a_peer(csvfast_command: Any) -> None:
    shown = run(csvfast_command, "--only", "sm3/1048576", "--kernel", "portable")
    assert "hashlib" in {result["peer"] for result in shown["results"]}


def test_table_and_files(csvfast_command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for suffix, magic in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        chart, target = tmp_path / f"chart{suffix}", tmp_path / "out.json"
        done = csvfast_command("bench", *SHORT, "--quick", "--only", "sm3/", "--json", target, "--chart", chart)
        assert done.returncode == 0, done.stderr
        assert "sm3/1048576" in done.stdout
        assert "x hashlib" in done.stdout
        assert chart.read_bytes().startswith(magic)
        assert json.loads(target.read_text())["results"]


def test_kernel_this_cpu_cannot_run_is_environment(csvfast_command: Any) -> None:
    names = csvfast.info()["kernels"]["sm4"]["compiled"]
    name = next(name for name in names if name != "portable")
    disable = {"CSVFAST_DISABLE": "avx512,gfni,vaes,aes,avx2,bmi2,pclmul"}
    done = csvfast_command("bench", "--kernel", name, environment=disable)
    assert done.returncode == 3
    assert name in done.stderr
    assert "cannot run" in done.stderr


def test_chart_without_matplotlib(csvfast_command: Any, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')\n")
    done = csvfast_command(
        "bench", *SHORT, "--quick", "--only", "memcpy", "--chart", "chart.svg", environment={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "csvfast: error: a chart needs matplotlib: pip install 'csvfast[bench]'"
    assert not (tmp_path / "chart.svg").exists()
