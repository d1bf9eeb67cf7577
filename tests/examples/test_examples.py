"""Every example runs as it stands, in less than five seconds, and in a directory that is not the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import csvfast

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"


def test_all_numbers_are_there() -> None:
    """None is missing, none has two examples, and the list in README.md names each."""
    names = sorted(path.name for path in EXAMPLES.glob("[0-9][0-9]_*"))
    assert [name[:2] for name in names] == [f"{number:02}" for number in range(1, len(names) + 1)]
    listed = re.findall(r"^\| `([^`]+?)/?` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == names


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_python_example(example: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    command = [sys.executable, "-P", str(example)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def run_embed(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    shutil.copytree(EXAMPLES / "06_embed", directory, ignore=shutil.ignore_patterns("embed"))
    variables = dict(os.environ) | (environment or {})
    subprocess.run(["make", "-s", "embed", *arguments], cwd=directory, check=True, env=variables)
    done = subprocess.run([str(directory / "embed")], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_embed(shown: str) -> None:
    assert "guest 1 reads the guest's secret" in shown
    assert shown.splitlines()[-1] == "done"
    # The same keys and place in Python give the same ciphertext: one engine under both.
    memory = csvfast.EncryptedMemory(1 << 20)
    memory.install(1, bytes(range(32)))
    memory.write(0x3000, b"the guest's secret", 1)
    assert bytes(memory.raw[0x3000:0x3012]).hex() in shown


def test_embed_by_pkg_config(installed: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    environment = {"PKG_CONFIG_PATH": str(installed / "lib" / "pkgconfig"), "LD_LIBRARY_PATH": str(installed / "lib")}
    check_embed(run_embed(tmp_path / "embed", environment=environment))


def test_embed_against_the_header_of_the_package(installed: Path, tmp_path: Path) -> None:
    """csvfast.get_include() gives the header that fits the library."""
    target = tmp_path / "embed"
    flags = f"-I'{csvfast.get_include()}' '{installed / 'lib' / 'libcsvfast.a'}' -pthread"
    subprocess.run(
        ["sh", "-c", f"cc -std=c11 -Wall -Wextra -Werror -o '{target}' '{EXAMPLES / '06_embed' / 'embed.c'}' {flags}"], check=True
    )
    done = subprocess.run([str(target)], capture_output=True, text=True, check=True)
    check_embed(done.stdout)
