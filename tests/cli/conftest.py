"""Runs the installed command in a process of its own: exit codes and streams are what users see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def csvfast_command(tmp_path: Path) -> Run:
    """run("measure", "image", path, environment={...}, input=...) -> completed process."""

    def run(
        *arguments: object, environment: dict[str, str] | None = None, input: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("CSVFAST_")}
        return subprocess.run(
            [sys.executable, "-P", "-m", "csvfast", *map(str, arguments)],
            input=input, capture_output=True, text=True, check=False, timeout=timeout, cwd=tmp_path,
            env=variables | (environment or {}),
        )  # fmt: skip

    return run
