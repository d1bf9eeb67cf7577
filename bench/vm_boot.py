"""Boot and work of a Linux guest under QEMU (TCG), on plain and on encrypted RAM, in turns: the slow-down by window.

    python bench/vm_boot.py [--memory MIB] [--rounds N] [--windows 1/1,1/8,1/64]

Each round boots the guest plain and with each window; the ratios are of the medians. After the boot the guest hashes, packs and
sorts some MB, which fits a window of 1/8 of 512 MiB. Needs QEMU, and the guest files that tools/install-test-tools.sh fetches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from csvfast import get_library
from csvfast.machine.initrd import boot_files, build_initrd
from csvfast.machine.vm_qemu import find_qemu

WORK = """
seq 1 200000 | sha256sum >/dev/null
seq 1 200000 | sort -r | gzip -c | gunzip -c | sha256sum >/dev/null
exit 0
"""


def run_guest(initrd: Path, memory: int, window: str | None, folder: Path) -> tuple[float, float]:
    """Seconds to the first program of the guest, and from there to its end."""
    dram = folder / "dram"
    environment = dict(os.environ)
    if window is not None:
        environment |= {
            "LD_PRELOAD": str(get_library("vmram-preload")), "CSVFAST_VMRAM_PATH": str(dram), "CSVFAST_VMRAM_WINDOW": window,
        }  # fmt: skip
    command = [
        find_qemu(None), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none",
        "-accel", "tcg", "-cpu", "max", "-m", f"{memory}M", "-no-reboot",
        "-object", f"memory-backend-file,id=ram,size={memory}M,mem-path={dram},share=on", "-machine", "q35,memory-backend=ram",
        "-kernel", str(boot_files() / "vmlinuz"), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip
    start = time.perf_counter()
    booted = 0.0
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line.startswith("guest: begins"):
                booted = time.perf_counter()
        if process.wait(60) or "guest: exit 0" not in text:
            raise SystemExit(f"the guest failed:\n{text}")
    finally:
        process.kill()
        process.wait()
        dram.unlink(missing_ok=True)
    return booted - start, time.perf_counter() - booted


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", default="1/1,1/8,1/64")
    options = parser.parse_args()
    ways: list[str | None] = [None, *options.windows.split(",")]
    times: dict[str | None, list[tuple[float, float]]] = {way: [] for way in ways}
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        folder = Path(name)
        initrd = build_initrd(folder / "initrd", python=False, run=f"echo guest: begins\n{WORK}").path
        for number in range(options.rounds):
            for way in ways:
                if sys.stderr.isatty():
                    print(f"\rround {number + 1} of {options.rounds}: {way or 'plain'}   ", end="", file=sys.stderr)
                times[way].append(run_guest(initrd, options.memory, way, folder))
    print(f"\n{'window':<8} {'boot s':>8} {'ratio':>6} {'work s':>8} {'ratio':>6}")
    plain = [statistics.median(column) for column in zip(*times[None], strict=True)]
    for way in ways:
        found = [statistics.median(column) for column in zip(*times[way], strict=True)]
        print(
            f"{way or 'plain':<8} {found[0]:>8.2f} {found[0] / plain[0]:>6.2f} {found[1]:>8.2f} {found[1] / plain[1]:>6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
