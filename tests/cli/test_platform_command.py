"""`csvfast platform`: the life of a platform from the factory to an owner and back, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csvfast.certs.bundle import parse_bundle
from csvfast.certs.layout import CsvCertificate, KeyUsage
from csvfast.certs.manufacturing import ManufacturingLine

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ManufacturingLine.create().make_chip("SIM0000000042").save(tmp_path / "chip")
    return tmp_path / "chip"


def record(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def test_the_life_of_a_platform(csvfast_command: Run, home: Path, tmp_path: Path) -> None:
    run = csvfast_command
    new = record(run("platform", "status", "chip", "--json"))
    assert (new["keys"], new["owner"], new["chip_id"], new["simulated"]) == ("none", None, "SIM0000000042", True)
    assert not (home / "platform.state").exists()
    first = record(run("platform", "init", "chip", "--json"))
    assert (first["keys"], first["owner"]) == ("stored", "self")
    assert record(run("platform", "status", "chip", "--json")) == first
    assert record(run("platform", "init", "chip", "--json")) == first
    second = record(run("platform", "pdh-gen", "chip", "--json"))
    assert (second["pek_sm3"], second["oca_sm3"]) == (first["pek_sm3"], first["oca_sm3"])
    assert second["pdh_sm3"] != first["pdh_sm3"]

    # To an owner.
    assert run("platform", "pek-csr", "chip", "-o", "pek.csr").returncode == 0
    csr = CsvCertificate.parse((tmp_path / "pek.csr").read_bytes())
    assert [slot.usage for slot in csr.slots] == [KeyUsage.INVALID] * 2
    signed = record(
        run("platform", "sign-csr", "pek.csr", "--key", "owner.pem", "--oca", "oca.cert", "-o", "pek.cert", "--json")
    )
    assert (tmp_path / "owner.pem").stat().st_mode & 0o777 == 0o600
    owned = record(run("platform", "pek-import", "chip", "pek.cert", "oca.cert", "--json"))
    assert (owned["owner"], owned["oca_sm3"]) == ("external", signed["oca"])
    refused = run("platform", "pek-import", "chip", "pek.cert", "oca.cert")
    assert refused.returncode == 1
    assert refused.stderr.startswith("csvfast: error: ALREADY_OWNED (0x05)")

    # What guest owners get verifies as one chain.
    record(
        run(
            "platform",
            "pdh-export",
            "chip",
            "--pdh",
            "pdh.cert",
            "--chain",
            "chain.cert",
            "--hsk-cek",
            "hsk_cek.cert",
            "--json",
        )
    )
    assert [(tmp_path / name).stat().st_size for name in ("pdh.cert", "chain.cert", "hsk_cek.cert")] == [
        2084,
        6252,
        2916,
    ]
    verified = run("cert", "verify", "--root", "chip/root.cert", "pdh.cert", "chain.cert", "hsk_cek.cert")
    assert verified.returncode == 0, verified.stderr
    assert run("cert", "verify", "pdh.cert", "chain.cert", "hsk_cek.cert").returncode == 1
    parse_bundle((tmp_path / "chain.cert").read_bytes())

    # A usage error leaves neither a key nor a certificate behind.
    mixed = run("platform", "sign-csr", "pek.csr", "--key", "new.pem", "--oca", "new.cert", "--json")
    assert mixed.returncode == 2
    assert not list(tmp_path.glob("new.*"))

    # And back.
    assert record(run("platform", "pek-gen", "chip", "--json"))["owner"] == "self"
    assert record(run("platform", "reset", "chip", "--yes", "--json"))["keys"] == "none"
    assert run("platform", "get-id", "chip").stdout == "SIM0000000042\n"
    assert record(run("platform", "get-id", "chip", "--json")) == {"chip_id": "SIM0000000042"}


def test_an_owner_signs_for_many_platforms(csvfast_command: Run, home: Path, tmp_path: Path) -> None:
    """The same key and certificate serve again; a certificate of another key is refused."""
    run = csvfast_command
    assert run("platform", "pek-csr", "chip", "-o", "a.csr").returncode == 0
    assert run("platform", "pek-gen", "chip").returncode == 0
    assert run("platform", "pek-csr", "chip", "-o", "b.csr").returncode == 0
    owner = ("--key", "owner.pem", "--oca", "oca.cert")
    first = record(run("platform", "sign-csr", "a.csr", *owner, "-o", "a.cert", "--json"))
    second = record(run("platform", "sign-csr", "b.csr", *owner, "-o", "b.cert", "--json"))
    assert first["oca"] == second["oca"]
    stale = run("platform", "pek-import", "chip", "a.cert", "oca.cert")
    assert stale.returncode == 1
    assert "INVALID_CERTIFICATE" in stale.stderr
    assert run("platform", "pek-import", "chip", "b.cert", "oca.cert").returncode == 0
    other = run("platform", "sign-csr", "b.csr", "--key", "other.pem", "--oca", "oca.cert", "-o", "c.cert")
    assert other.returncode == 2
    assert "expected the OCA certificate of the key given" in other.stderr
    assert not (tmp_path / "c.cert").exists()
    (tmp_path / "owner.pem").chmod(0o644)
    open_key = run("platform", "sign-csr", "b.csr", *owner, "-o", "c.cert")
    assert open_key.returncode == 3
    assert "0644" in open_key.stderr


def test_pipes(csvfast_command: Run, home: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-P", "-m", "csvfast", "platform"]
    csr = subprocess.run([*start, "pek-csr", "chip"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(csr) == 2084
    sign = [*start, "sign-csr", "-", "--key", "k.pem", "--oca", "oca.cert"]
    pek = subprocess.run(sign, cwd=tmp_path, input=csr, capture_output=True, check=True).stdout
    done = subprocess.run(
        [*start, "pek-import", "chip", "-", "oca.cert"], cwd=tmp_path, input=pek, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"an external OCA" in done.stdout


def test_human_table(csvfast_command: Run, home: Path) -> None:
    shown = csvfast_command("platform", "init", "chip", "--profile", "1.3/2011").stdout
    assert "SIM0000000042 (simulated)" in shown
    assert "API 1.3, build 2011\n" in shown
    assert "the platform itself" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("status", "nowhere"), 3, "no such directory"),
        (("init", "chip", "--profile", "2.0/1"), 2, "expected one of 1.3/2011, 1.4/2337"),
        (("reset", "chip"), 2, "expected --yes"),
        (("pek-import", "chip", "short", "short"), 1, "INVALID_LENGTH (0x04): pek_length is 3; expected 2084"),
        (("pek-import", "chip", "-", "-"), 2, "standard input for one of them"),
        (("pek-import", "chip", "absent", "short"), 3, "absent: No such file or directory"),
        (("sign-csr", "short", "--key", "k", "--oca", "o"), 2, "found 3 bytes; expected 2084 bytes"),
        (("sign-csr", "chip/cek.cert", "--key", "k", "--oca", "o"), 2, "expected a PEK certificate (0x1002)"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], code: int, text: str, csvfast_command: Run, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    done = csvfast_command("platform", *arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "k").exists()


def test_a_directory_in_use(csvfast_command: Run, home: Path) -> None:
    from csvfast.processor import StateDirectory

    with StateDirectory(home):
        done = csvfast_command("platform", "init", "chip")
    assert done.returncode == 3
    assert "another processor is using this directory" in done.stderr


def test_a_damaged_state(csvfast_command: Run, home: Path) -> None:
    csvfast_command("platform", "init", "chip")
    (home / "platform.state").write_bytes(b"garbage")
    for command, code in (("status", 3), ("init", 1), ("pek-gen", 1)):
        done = csvfast_command("platform", command, "chip")
        assert done.returncode == code
        assert "platform.state: is no platform state" in done.stderr
