"""`csvfast memory demo`: every check holds, and the checks can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

import csvfast
from csvfast.cli import memory
from csvfast.cli.common import CommandError, ExitCode


@pytest.mark.parametrize("standard", ["gb", "ieee"])
@pytest.mark.parametrize("tweak_model", ["xts", "line"])
def test_demo_json(csvfast_command: Any, standard: str, tweak_model: str) -> None:
    done = csvfast_command("memory", "demo", "--json", "--standard", standard, "--tweak-model", tweak_model)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["checks"]
    assert all(report["checks"].values())
    assert report["stats"]["keys_installed"] == 3
    assert report["stats"]["keys_removed"] == 1
    assert bytes.fromhex(report["views"]["guest ASID 1 reads frame 0"]).startswith(b"account 0042")


def test_line_model_shows_its_leak() -> None:
    """The text repeats every two blocks and four blocks share a tweak: half of a line's ciphertext repeats."""
    assert memory.run_demo("gb", "xts")["distinct_blocks_per_frame"] == [256, 256, 256, 2]
    assert memory.run_demo("gb", "line")["distinct_blocks_per_frame"] == [128, 128, 128, 2]


def test_demo_text(csvfast_command: Any) -> None:
    done = csvfast_command("memory", "demo")
    assert done.returncode == 0
    assert "account 0042" in done.stdout
    assert "FAILS" not in done.stdout


def test_demo_never_prints_keys(csvfast_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[bytes] = []
    original = csvfast.EncryptedMemory.install

    def install(self: csvfast.EncryptedMemory, asid: int, key: Any = None) -> int:
        key = bytes((17 * asid + i) % 256 for i in range(32))
        installed.append(key)
        return original(self, asid, key)

    monkeypatch.setattr(csvfast.EncryptedMemory, "install", install)
    shown = json.dumps(memory.run_demo("gb", "xts"))
    assert installed
    assert not any(key.hex() in shown for key in installed)


def test_failed_check_is_exit_code_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A memory that does not encrypt is noticed."""
    original = csvfast.EncryptedMemory.write

    def write(self: csvfast.EncryptedMemory, address: int, data: Any, asid: int) -> None:
        original(self, address, data, 0)

    monkeypatch.setattr(csvfast.EncryptedMemory, "write", write)
    with pytest.raises(CommandError, match="the host sees no plaintext") as caught:
        memory.demo(standard=memory.StandardChoice.gb, tweak_model=memory.TweakModelChoice.xts, as_json=True)
    assert caught.value.code is ExitCode.CHECK_FAILED
    assert json.loads(capsys.readouterr().out)["checks"]["the host sees no plaintext in a guest's frame"] is False


def test_hexdump() -> None:
    assert memory.hexdump(b"abc\n" + bytes(range(0x10, 0x1D))) == (
        "000 6162630a10111213 1415161718191a1b abc.............\n010 1c  ."
    )
