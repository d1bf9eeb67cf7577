"""The commands in README.md and docs/measure.md run as they are written, in the order in which they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from reference import ovmf_images as ovmf

import csvfast

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "csvfast"
RECIPE = 'firmware = "OVMF.fd"\nkernel = "vmlinuz"\ninitrd = "initrd.img"\nappend = "console=ttyS0"\nvmsa = "amd"\n'

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")


def commands(page: str) -> list[str]:
    """Lines of code blocks that call the command; benchmarks are left to their own tests."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^(?:    )?(csvfast (?:info|measure|memory)\b.*)$", text, re.MULTILINE)
    return [line.partition("#")[0].strip() for line in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("disk.img", "a.img", "b.img", "c.img", "root.img", "vmlinuz", "initrd.img")):
        (tmp_path / name).write_bytes(bytes([index]) * (16 << 12))
    (tmp_path / "OVMF.fd").write_bytes(ovmf.good())
    (tmp_path / "guest.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "yesterday.json").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("page", "least"), [("README.md", 7), ("docs/measure.md", 10)])
def test_commands_run(folder: Path, page: str, least: int) -> None:
    lines = commands(page)
    assert len(lines) >= least
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CSVFAST_")}
    variables["DIGEST"] = csvfast.sm3_file(folder / "disk.img").hexdigest()
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", f'csvfast() {{ "{SCRIPT}" "$@"; }}; {line}'],
            cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        root = re.search(r'(?:Root hash: +|"root_hash": ")([0-9a-f]{64})', done.stdout)
        if root is not None and "root.hashes" in line:
            variables["ROOT"] = root[1]
