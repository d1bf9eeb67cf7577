"""The demo's chain of trust, by the `csvfast` command alone: a chip, a guest with its owner's session, its report, its verifiers.

Real boot files are used where there are any: an OVMF image of the system or of tools/install-test-tools.sh, and the kernel and
initrd of the latter or of /boot; else 4 MiB of reproducible noise stand for the firmware.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from csvfast.cli.common import format_bytes

FIRMWARE_PLACES = (
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/OVMF/OVMF.fd",
    "/usr/share/qemu/OVMF.fd",
    "/usr/share/edk2/ovmf/OVMF.fd",
    "/usr/share/edk2/x64/OVMF.fd",
)
FIRMWARE_LIMIT = 16 << 20  # of the firmware area below 4 GiB; what is larger is no OVMF image
NONCE = "6e6f6e6365"  # what the verifier wants to see in the report


class BootFiles(NamedTuple):
    """Absolute paths; kernel and initrd may be missing."""

    firmware: Path
    kernel: Path | None
    initrd: Path | None
    real: bool


def find_boot_files(work: Path) -> BootFiles:
    """Real files of this machine, or generated firmware in `work`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    fetched = Path(os.environ.get("CSVFAST_BOOT_FILES") or cache / "csvfast" / "boot")
    kernels = [fetched / "linux", *sorted(Path("/boot").glob("vmlinuz-*"), reverse=True)]
    initrds = [fetched / "initrd.gz", *sorted(Path("/boot").glob("initrd.img-*"), reverse=True)]
    firmware = first_readable([fetched / "OVMF.fd", *map(Path, FIRMWARE_PLACES)])
    if firmware is not None and firmware.stat().st_size <= FIRMWARE_LIMIT:
        return BootFiles(firmware, first_readable(kernels), first_readable(initrds), True)
    generated = work / "firmware.fd"
    generated.write_bytes(random.Random(20260102).randbytes(4 << 20))
    return BootFiles(generated, None, None, False)


def first_readable(paths: list[Path]) -> Path | None:
    return next((path.absolute() for path in paths if path.is_file() and os.access(path, os.R_OK)), None)


class Walk:
    """Runs commands in one directory, shows each as it would be typed, and keeps what was expected and what came."""

    def __init__(self, out: Console, directory: Path) -> None:
        self.out = out
        self.directory = directory
        self.checks: list[tuple[str, bool]] = []

    def run(self, *arguments: str | Path, expected: int = 0) -> tuple[dict[str, Any], str]:
        """The JSON a command gave and the last line of its errors. Another exit code than the expected one ends the walk."""
        self.out.print(f"$ csvfast {shlex.join(map(str, arguments))}", style="bold", markup=False, soft_wrap=True)
        command = [sys.executable, "-P", "-m", "csvfast", *map(str, arguments), "--json"]
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=False)
        problem = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        if done.returncode != expected:
            raise SystemExit(f"demo: exit code {done.returncode} where {expected} is expected\n{done.stderr}")
        return json.loads(done.stdout) if done.stdout else {}, problem

    def say(self, text: str) -> None:
        self.out.print(f"  {text}", markup=False, soft_wrap=True)

    def check(self, statement: str, held: bool) -> None:
        self.checks.append((statement, held))


def run_guest_demo(out: Console, work: Path) -> bool:
    """The walk in a new directory `work`; True when every check held."""
    work.mkdir(parents=True)
    files = find_boot_files(work)
    boot: list[str | Path] = ["--firmware", files.firmware]
    if files.kernel is not None:
        boot += ["--kernel", files.kernel, "--append", "console=ttyS0"]
        boot += ["--initrd", files.initrd] if files.initrd is not None else []
        boot += ["--force-hash-table"]  # distributions build OVMF without an area for the hashes of a direct boot
    size = sum(path.stat().st_size for path in files[:3] if path is not None)
    out.print(f"{'real boot files' if files.real else 'generated firmware'}, {format_bytes(size)}")
    walk = Walk(out, work)
    start = time.monotonic()

    chip, _ = walk.run("chip", "new", "chip")
    walk.say(f"{chip['chip_id']}, under a root of its own: {chip['root']['sm3'][:16]}..")
    walk.run("platform", "pdh-export", "chip", "--pdh", "pdh.cert", "--chain", "chain.cert", "--hsk-cek", "hsk_cek.cert")

    expected = walk.run("measure", "launch", *boot)[0]["digest"]
    walk.say(f"the owner predicts {expected[:32]}..")
    session = ["--policy", "5", "--vm-digest", expected, "--root", "chip/root.cert", "--out", "owner"]
    walk.run("guest", "session", "pdh.cert", "chain.cert", "hsk_cek.cert", *session)

    launch = ["guest", "launch", "--state", "chip", "--session", "owner"]
    asked = ["--report", "report.cert", "--report-data", NONCE]
    launched, _ = walk.run(*launch, *boot, *asked)
    walk.say(f"{launched['state']}, the report says {launched['digest'][:32]}..")
    walk.check("the launch has the predicted digest", launched["digest"] == expected)

    verify = ["report", "verify", "--certs", "hsk_cek.cert", "--report-data", NONCE]
    verified, _ = walk.run(*verify, "--root", "chip/root.cert", "report.cert")
    walk.say(f"genuine: {', '.join(verified['checks'])}")
    walk.check(
        "under the simulator's root the report is genuine, down from the root",
        verified["complete"] and verified["root"] == chip["root"]["sm3"] and verified["claims"]["measure"] == expected,
    )
    _, problem = walk.run(*verify, "report.cert", expected=1)
    walk.say(problem)
    walk.check("Hygon's root, the default, refuses it", "not a trusted root" in problem)

    damaged = bytearray((work / "report.cert").read_bytes())
    damaged[0x90] ^= 1
    (work / "damaged.cert").write_bytes(damaged)
    _, problem = walk.run(*verify, "--root", "chip/root.cert", "damaged.cert", expected=1)
    walk.say(problem)
    walk.check("one flipped bit in the measurement is refused", "report signature" in problem)

    policy = f'measurements = ["{expected}"]\n\n[policy]\nrequired = ["nodbg", "es"]\n'
    (work / "policy.toml").write_text(policy, encoding="utf-8")
    appraise = ["report", "appraise", "--policy", "policy.toml", "--certs", "hsk_cek.cert", "--root", "chip/root.cert"]
    appraised, _ = walk.run(*appraise, "report.cert")
    walk.check("a policy that lists this digest allows it", appraised["appraisal"]["allowed"] is True)

    changed = bytearray(files.firmware.read_bytes())
    changed[len(changed) // 2] ^= 1
    (work / "other.fd").write_bytes(changed)
    _, problem = walk.run(*launch, "--firmware", "other.fd", *boot[2:], expected=1)
    walk.say(problem)
    walk.check("firmware with one other bit does not start under this session", "BAD_MEASUREMENT" in problem)

    table = Table(title=f"Checks, {time.monotonic() - start:.1f} s", title_justify="left", show_header=False)
    for statement, held in walk.checks:
        table.add_row("[green]holds[/]" if held else "[red]FAILS[/]", statement)
    out.print(table)
    return all(held for _, held in walk.checks)
