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


@pytest.fixture
def csvfast_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """As csvfast_command, in this process: for what a command says, where the process around it is not the point."""
    from csvfast.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("CSVFAST_")]:
                patch.delenv(name)
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            texts = list(map(str, arguments))
            capfd.readouterr()
            code = main(texts)
            return subprocess.CompletedProcess(texts, code, *capfd.readouterr())

    return run
