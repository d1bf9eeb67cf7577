"""The broker's load generators, as `make test` runs them: briefly, to see that they run and that every reply is right.

Figures come from the scripts themselves (docs/performance.md): they need both CPUs for themselves.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments], capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.benchmark(group="broker")
def test_verdictd_load(tmp_path: Path) -> None:
    figures = json.loads(run("verdictd_load.py", "--seconds", "1", "--connections", "8", "--directory", str(tmp_path)))
    for name in ("plain", "attested", "releases"):
        assert figures[name]["per_second"] > 0
    # Each attested connection and each release has its record.
    assert figures["records"] > 0


@pytest.mark.benchmark(group="broker")
def test_kbs_load(tmp_path: Path) -> None:
    shown = run("broker_kbs.py", "--seconds", "1", "--connections", "8", "--directory", str(tmp_path))
    assert re.search(r"^resource +[\d,]+ /s", shown, re.MULTILINE)
    assert "resource : two ecdh" in shown
