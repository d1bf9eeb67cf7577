"""The C library, built and installed once for the tests that embed it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix below which it is installed, built from this checkout."""
    base = tmp_path_factory.mktemp("embed")
    variables = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    subprocess.run(
        ["make", "-C", str(CSRC), f"BUILD={base / 'build'}", f"PREFIX={base / 'prefix'}", "-j2", "install"],
        check=True, capture_output=True, env=variables,
    )  # fmt: skip
    return base / "prefix"
