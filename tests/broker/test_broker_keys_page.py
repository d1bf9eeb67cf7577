"""The commands and the Python of docs/broker-keys.md run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from broker.services import SoftHsmToken

import csvfast

PAGE = Path(__file__).parents[2] / "docs" / "broker-keys.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests stand outside a source tree")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_commands_run(softhsm_token: SoftHsmToken, tmp_path: Path) -> None:
    program = "\n".join(blocks("sh"))
    assert program.count("csvfast broker ") == 5
    assert "softhsm2-util --init-token" in program
    # The fixture has made the token; a terminal would be asked for the PINs.
    program = re.sub(r"^softhsm2-util.*$", "", program, flags=re.MULTILINE)
    program = program.replace("--pkcs11-token broker", f"--pkcs11-token '{softhsm_token.label}'")
    program = program.replace("/usr/lib/softhsm/libsofthsm2.so", softhsm_token.module)
    (tmp_path / "pin").write_text(softhsm_token.pin + "\n")
    (tmp_path / "pin").chmod(0o600)
    script = f'csvfast() {{ "{sys.executable}" -m csvfast "$@"; }}\n{program}'
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'kind = "pkcs11"' in done.stdout
    assert softhsm_token.pin not in done.stdout + done.stderr


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    *lines, last = block.strip().splitlines()
    assert last.partition("#")[2].startswith(" AuthenticationError")
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    with pytest.raises(csvfast.errors.AuthenticationError):
        exec(last, names)
    assert names["secret"] == b"a guest's key"
