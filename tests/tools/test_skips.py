"""The guard against silent skips can fail a run, and does so only with CI=true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import skips

TESTS = Path(__file__).resolve().parent.parent
SUITE = """
import pytest

def test_passes(): pass

def test_skips(): pytest.skip("no such tool here")

@pytest.mark.xfail(strict=True, reason="known")
def test_expected_failure(): assert False
"""


def run(tmp_path: Path, *, ci: str, expected: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_it.py").write_text(SUITE)
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "skips.py").write_text((TESTS / "skips.py").read_text())
    (plugin / "expected-skips.txt").write_text(expected)
    environment = dict(os.environ) | {"CI": ci, "PYTHONPATH": str(plugin)}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


def test_skip_passes_without_ci(tmp_path: Path) -> None:
    assert run(tmp_path, ci="").returncode == 0


def test_skip_fails_with_ci(tmp_path: Path) -> None:
    done = run(tmp_path, ci="true")
    assert done.returncode == 1
    assert "test_skips: no such tool here" in done.stdout
    assert "test_expected_failure:" not in done.stdout


def test_listed_skip_passes_with_ci(tmp_path: Path) -> None:
    assert run(tmp_path, ci="true", expected="*::test_skips | no such tool  # why\n").returncode == 0


@pytest.mark.parametrize("line", ["*::test_other | no such tool", "*::test_skips | another reason"])
def test_list_is_exact(tmp_path: Path, line: str) -> None:
    assert run(tmp_path, ci="true", expected=line).returncode == 1


@pytest.mark.parametrize("line", ["tests/*", "| reason", "tests/* |"])
def test_list_without_a_reason_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"expected-skips\.txt:1"):
        skips.read_expected(line)


def test_the_list_of_this_project_reads() -> None:
    assert skips.read_expected(skips.LIST.read_text(encoding="utf-8"))
