"""Virtual machines where the system does not cooperate: no userfaultfd, a disk that is full or becomes full, a DRAM file that is
cut. One line that says so, the right exit code, and nothing left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from machine import qemu_guest
from machine.vm_platform import alive

pytestmark = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)
# A seccomp filter: userfaultfd(2) and the ioctl of /dev/userfaultfd are not permitted. Inherited by whatever is started.
WITHOUT_USERFAULTFD = """
import ctypes, os, struct, sys
EPERM = 0x50001
rules = [
    (0x20, 0, 0, 0),            # the call's number
    (0x15, 4, 0, 323),          # userfaultfd
    (0x15, 0, 2, 16),           # ioctl
    (0x20, 0, 0, 24),           # its request
    (0x15, 1, 0, 0xAA00),       # USERFAULTFD_IOC_NEW
    (0x06, 0, 0, 0x7FFF0000),   # allowed
    (0x06, 0, 0, EPERM),
]
program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *rule) for rule in rules))
header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(rules), ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qemu_guest.build_initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CSVFAST_VMRAM_LIBRARY", str(qemu_guest.preload_library()))
    return tmp_path / "csvfast"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m,mode=0700", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("the system does not let this user mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def command(initrd: Path, *more: str) -> list[str]:
    kernel = qemu_guest.boot_files() / "vmlinuz"
    append = "console=ttyS0 quiet panic=-1 work=8 rounds=1000000"
    return [
        sys.executable, "-m", "csvfast", "vm", "run", "--kernel", str(kernel), "--initrd", str(initrd), "--append", append,
        "--memory", "128MiB", "--accel", "tcg", "--name", "one", "--time-limit", "100", *more,
    ]  # fmt: skip


def test_no_userfaultfd(place: Path, initrd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_USERFAULTFD, *command(initrd)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
    assert "userfaultfd is forbidden" in done.stderr
    assert list(place.iterdir()) == []


def test_too_little_room(place: Path, initrd: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(64 << 20))
    done = subprocess.run(
        command(initrd, "--dram", str(small_disk / "dram")), capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
    assert "are free" in done.stderr
    assert str(small_disk / "dram") in done.stderr
    assert not place.exists() or list(place.iterdir()) == []
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@contextmanager
def running(place: Path, command: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command's process and QEMU's."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 60
            while not (place / "one" / "vm.sock").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.02)
            yield process, json.loads((place / "one" / "state.json").read_text(encoding="utf-8"))["qemu"]
        finally:
            process.kill()


def test_cut_while_it_runs(place: Path, initrd: Path, small_disk: Path) -> None:
    dram = small_disk / "dram"
    with running(place, command(initrd, "--dram", str(dram), "--window", "1/16")) as (process, qemu):
        with dram.open("r+b") as file:
            file.truncate(1 << 20)
        _, errors = process.communicate(timeout=90)
        assert process.returncode not in (0, 1)
    lines = [line for line in errors.splitlines() if line.startswith("csvfast-vmram: ")]
    assert len(lines) == 1
    assert "truncated" in lines[0]
    assert not alive(qemu)
    assert list(place.iterdir()) == []


def test_disk_becomes_full(place: Path, initrd: Path, small_disk: Path) -> None:
    """The DRAM has its room from the beginning: whoever takes the rest of the disk does no harm."""
    line = command(initrd, "--dram", str(small_disk / "dram"), "--window", "1/16")
    with running(place, [word.replace("rounds=1000000", "rounds=2") for word in line]) as (process, _):
        filler = bytes(1 << 20)
        with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(filler):
                pass
        assert shutil.disk_usage(small_disk).free < 4096
        output, errors = process.communicate(timeout=90)
    assert "No space" not in errors
    assert "guest: goodbye" in output
