"""`csvfast chip`: what it makes, what it shows, what it refuses."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from csvfast.certs import CertificateChain, ChipIdentity, ManufacturingLine, fingerprint, verify_chain

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_chip_alone(csvfast_here: Run, tmp_path: Path) -> None:
    done = csvfast_here("chip", "new", tmp_path / "chip", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    chip = ChipIdentity.load(tmp_path / "chip")
    assert record["chip_id"] == chip.chip_id
    assert record["simulated"] is True
    assert record["root"]["sm3"] == fingerprint(chip.root)
    assert record["cek"]["public_key"] == chip.cek.point.hex()
    assert [path.name for path in tmp_path.iterdir()] == ["chip"]
    shown = csvfast_here("chip", "show", tmp_path / "chip")
    assert chip.chip_id in shown.stdout
    assert fingerprint(chip.root) in shown.stdout
    assert json.loads(csvfast_here("chip", "show", tmp_path / "chip", "--json").stdout) == record


def test_secrets_are_not_printed(csvfast_here: Run, tmp_path: Path) -> None:
    csvfast_here("chip", "new", tmp_path / "chip")
    chip = ChipIdentity.load(tmp_path / "chip")
    for arguments in (("show",), ("show", "--json")):
        text = csvfast_here("chip", *arguments, tmp_path / "chip").stdout
        assert bytes(chip.root_secret).hex() not in text
        assert bytes(chip.cek_key.secret()).hex() not in text


def test_chips_of_one_line(csvfast_here: Run, tmp_path: Path) -> None:
    for number in (1, 2):
        done = csvfast_here("chip", "new", tmp_path / f"c{number}", "--line", tmp_path / "fab", "--chip-id", f"SIM-{number}")
        assert done.returncode == 0, done.stderr
        assert f"SIM-{number}" in done.stdout
    line = ManufacturingLine.load(tmp_path / "fab")
    assert line.name == "fab"
    for number in (1, 2):
        chip = ChipIdentity.load(tmp_path / f"c{number}")
        verify_chain(CertificateChain(hsk=chip.hsk, cek=chip.cek), [line.root])


@pytest.mark.parametrize("chip_id", ["KPA64911240507", "../SIM", "", "SIM/x"])
def test_refused_ids_leave_nothing(csvfast_here: Run, tmp_path: Path, chip_id: str) -> None:
    done = csvfast_here("chip", "new", tmp_path / "chip", "--line", tmp_path / "fab", "--chip-id", chip_id)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("csvfast: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(csvfast_here: Run, tmp_path: Path) -> None:
    csvfast_here("chip", "new", tmp_path / "chip")
    before = {path.name: path.read_bytes() for path in (tmp_path / "chip").iterdir()}
    done = csvfast_here("chip", "new", tmp_path / "chip", "--line", tmp_path / "fab")
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "chip").iterdir()} == before
    assert not (tmp_path / "fab").exists()


def test_directories_that_are_no_chips(csvfast_here: Run, tmp_path: Path) -> None:
    done = csvfast_here("chip", "show", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no such directory" in done.stderr
    csvfast_here("chip", "new", tmp_path / "chip")
    (tmp_path / "chip" / "cek.key").chmod(0o644)
    done = csvfast_here("chip", "show", tmp_path / "chip")
    assert done.returncode == 3
    assert "lets other users in" in done.stderr
    (tmp_path / "file").write_text("")
    assert csvfast_here("chip", "new", tmp_path / "chip2", "--line", tmp_path / "file").returncode == 3
    assert not (tmp_path / "chip2").exists()


@pytest.mark.parametrize("where", ["chip", "line"])
def test_full_disk(csvfast_here: Run, tmp_path: Path, where: str) -> None:
    options = ("--line", tmp_path / "line") if where == "line" else ()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        done = csvfast_here("chip", "new", tmp_path / "chip", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 3
    assert str(tmp_path / where) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
