"""Real firmware, kernel and initrd: what `measure launch` predicts, a simulated launch gives and its report carries."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from csvfast.crypto import sm3

Run = Callable[..., subprocess.CompletedProcess[str]]
APPEND = "console=ttyS0 root=/dev/vda"


@pytest.fixture(scope="module")
def boot() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("CSVFAST_BOOT_FILES") or cache / "csvfast" / "boot")
    missing = [name for name in ("OVMF.fd", "linux", "initrd.gz") if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{folder} has no {', '.join(missing)}: tools/install-test-tools.sh fetches Debian's")
    return folder


def expected_digest(boot: Path) -> bytes:
    """SM3(OVMF || hash table), from the specification's layout alone."""
    table = b""
    for guid, data in (
        ("97d02dd8-bd20-4c94-aa78-e7714d36ab2a", APPEND.encode() + b"\0"),
        ("44baf731-3a2f-4bd7-9af1-41e29169781d", (boot / "initrd.gz").read_bytes()),
        ("4de79437-abd2-427f-b835-d5b172d2045b", (boot / "linux").read_bytes()),
    ):
        table += UUID(guid).bytes_le + struct.pack("<H", 50) + hashlib.sha256(data).digest()
    table = UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le + struct.pack("<H", 168) + table
    return sm3((boot / "OVMF.fd").read_bytes() + table.ljust(176, b"\0")).digest()


def test_launch_of_real_boot_files(boot: Path, csvfast_command: Run, tmp_path: Path) -> None:
    assert csvfast_command("chip", "new", "chip").returncode == 0
    # Debian builds OVMF without an area for the hash table; the order of the bytes is the same.
    files = ["--firmware", boot / "OVMF.fd", "--kernel", boot / "linux", "--initrd", boot / "initrd.gz"]
    files += ["--append", APPEND, "--force-hash-table"]
    measured = csvfast_command("measure", "launch", *files)
    launched = csvfast_command(
        "guest",
        "launch",
        "--state",
        "chip",
        *files,
        "--policy",
        "5",
        "--report",
        "report.cert",
        "--report-data",
        "c0ffee",
        "--json",
    )
    assert launched.returncode == 0, launched.stderr
    record = json.loads(launched.stdout)
    assert record["digest"] == record["predicted_digest"] == measured.stdout.strip() == expected_digest(boot).hex()
    assert record["state"] == "RUNNING"

    chip = tmp_path / "chip"
    (tmp_path / "hsk_cek.cert").write_bytes((chip / "hsk.cert").read_bytes() + (chip / "cek.cert").read_bytes())
    verify = ["report", "verify", "--certs", "hsk_cek.cert", "--report-data", "c0ffee", "--json", "report.cert"]
    genuine = csvfast_command(*verify, "--root", "chip/root.cert")
    assert genuine.returncode == 0, genuine.stderr
    assert record["digest"] in genuine.stdout
    refused = csvfast_command(*verify)
    assert refused.returncode == 1, "the simulator's chips are not Hygon's"
    assert "not a trusted root" in refused.stderr
