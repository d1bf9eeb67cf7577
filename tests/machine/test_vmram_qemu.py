"""Debian's QEMU, unmodified, on guest memory that is ciphertext outside a window."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import qemu_guest
from machine.qemu_guest import KERNEL_TEXT, QEMU, SIZE, TEXT, Guest, boot_files, build_initrd, count, userfault_reason

from csvfast.crypto import SM4XTS

PAGE = 4096


def reason_to_skip() -> str | None:
    if shutil.which(QEMU) is None:
        return f"{QEMU} not installed (tools/install-test-tools.sh)"
    if not (boot_files() / "linux").is_file():
        return f"no kernel in {boot_files()} (tools/install-test-tools.sh)"
    return userfault_reason()


REASON = reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.skipif(not (qemu_guest.ROOT / "csrc").is_dir(), reason="the tests stand outside a source tree"),
]

Start = Callable[..., Guest]


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_initrd(tmp_path_factory.mktemp("initrd"))


# In memory where there is such a place: DRAM on a disk would measure the disk.
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="csvfast-vmram-", dir=PLACE) as folder:
        yield Path(folder)


@pytest.fixture
def start(initrd: Path, memory_folder: Path) -> Iterator[Start]:
    guests: list[Guest] = []

    def start_one(**options: object) -> Guest:
        guests.append(qemu_guest.start(memory_folder / f"dram-{len(guests)}", initrd, **options))  # type: ignore[arg-type]
        return guests[-1]

    yield start_one
    for guest in guests:
        guest.kill()


def sum_line(guest: Guest) -> str:
    return next(line for line in guest.console if line.startswith("guest: sum "))


def our_lines(guest: Guest) -> list[str]:
    return [line for line in guest.console if line.startswith("csvfast-vmram: ")]


@pytest.fixture(scope="module")
def plain_sum(initrd: Path) -> str:
    """What the guest computes without encryption; its text is found in the DRAM file by every scan after it was written."""
    with tempfile.TemporaryDirectory(prefix="csvfast-vmram-", dir=PLACE) as folder:
        guest = qemu_guest.start(Path(folder) / "dram", initrd, encrypted=False)
        try:
            guest.wait_for("text")
            assert count(guest.dram, TEXT) >= (16 << 20) // 32
            assert guest.finish() == 0
            assert count(guest.dram, TEXT) >= (16 << 20) // 32
            assert count(guest.dram, KERNEL_TEXT) > 0
            print(f"plain: {guest.seen['sum']:.1f} s")
            return sum_line(guest)
        finally:
            guest.kill()


@pytest.mark.parametrize("share", [4, 16])
def test_boot(start: Start, tmp_path: Path, plain_sum: str, share: int) -> None:
    key = secrets.token_bytes(32)
    (tmp_path / "key").write_bytes(key)
    statistics = tmp_path / "statistics.json"
    guest = start(
        environment={
            "CSVFAST_VMRAM_WINDOW": f"1/{share}",
            "CSVFAST_VMRAM_KEY_FILE": str(tmp_path / "key"),
            "CSVFAST_VMRAM_STATS": str(statistics),
        }
    )
    scans = 0
    while guest.process.poll() is None:
        if guest.dram.exists() and guest.dram.stat().st_size == SIZE:
            assert count(guest.dram, TEXT) == 0
            scans += 1
    assert guest.finish() == 0, guest.text()
    assert sum_line(guest) == plain_sum
    print(f"window 1/{share}: {guest.seen['sum']:.1f} s, {scans} scans")
    assert scans >= 5
    assert count(guest.dram, TEXT) == 0
    assert count(guest.dram, KERNEL_TEXT) == 0
    (seen,) = json.loads(statistics.read_text(encoding="utf-8"))
    assert seen["dram"] == str(guest.dram)
    assert seen["size"] == SIZE
    assert seen["resident_peak"] <= seen["window_size"] == SIZE // share
    assert seen["evictions"] > 1000
    assert seen["failure"] == 0
    assert our_lines(guest) == []

    # The key opens it: after an ordinary exit all of the memory is there, as the engine encrypts it.
    image = bytearray(guest.dram.read_bytes())
    SM4XTS(key, standard="gb", unit_size=PAGE).decrypt(image, unit=0, out=image)
    assert image.count(TEXT) >= (16 << 20) // 32
    assert KERNEL_TEXT in image


def test_killed_and_altered(start: Start, plain_sum: str) -> None:
    """kill -9 leaves ciphertext. Noise in one guest's DRAM disturbs that guest, and not the one beside it."""
    killed = start(environment={"CSVFAST_VMRAM_WINDOW": "1/16"}, rounds=100000)
    altered = start(environment={"CSVFAST_VMRAM_WINDOW": "1/64"}, rounds=100000)
    spared = start(environment={"CSVFAST_VMRAM_WINDOW": "1/16"}, rounds=2)
    killed.wait_for("text", 240)
    killed.kill_only()
    assert count(killed.dram, TEXT) == 0
    altered.wait_for("text", 240)
    with altered.dram.open("r+b") as dram:
        for number in range(0, SIZE // PAGE - 1, 2):  # neighbours swapped
            dram.seek(number * PAGE)
            both = dram.read(2 * PAGE)
            dram.seek(number * PAGE)
            dram.write(both[PAGE:] + both[:PAGE])
    end = time.monotonic() + 10  # a guest that lost its kernel says nothing any more
    while time.monotonic() < end and altered.process.poll() is None and "memory" not in altered.seen:
        assert count(altered.dram, TEXT) == 0
        time.sleep(0.2)
    altered.kill_only()
    # Panicked, found its memory wrong, or silent: but it did not go on as if nothing had happened.
    assert "sum" not in altered.seen
    spared.wait_for("sum", 240)
    assert spared.finish() == 0
    assert sum_line(spared) == plain_sum


def test_truncated(start: Start) -> None:
    guest = start(environment={"CSVFAST_VMRAM_WINDOW": "1/16"})
    wait_for_memory(guest)
    os.truncate(guest.dram, SIZE // 2)
    assert guest.finish(30) == 3
    (line,) = our_lines(guest)
    assert str(guest.dram) in line
    assert "truncated" in line


def test_deleted(start: Start) -> None:
    guest = start(environment={"CSVFAST_VMRAM_WINDOW": "1/16"})
    wait_for_memory(guest)
    guest.dram.unlink()
    end = time.monotonic() + 30
    while not our_lines(guest) and time.monotonic() < end:
        time.sleep(0.05)
    (line,) = our_lines(guest)
    assert "deleted" in line
    assert guest.process.poll() is None


def wait_for_memory(guest: Guest) -> None:
    """Until the guest has begun to use its memory."""
    end = time.monotonic() + 60
    while not (guest.dram.exists() and guest.dram.stat().st_blocks > 0):
        assert guest.process.poll() is None, guest.text()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CSVFAST_VMRAM_WINDOW": "0"}, "a window of 0 bytes holds no machine"),
        ({"CSVFAST_VMRAM_WINDOW": "1/100000"}, "holds no machine"),
        ({"CSVFAST_VMRAM_WINDOW": "-1"}, "bytes with K, M or G"),
        ({"CSVFAST_VMRAM_WINDOW": "1/0"}, "bytes with K, M or G"),
        ({"CSVFAST_VMRAM_WINDOW": "big"}, "bytes with K, M or G"),
        ({"CSVFAST_VMRAM_THREADS": "17"}, "a whole number from 1 to 16"),
        ({"CSVFAST_VMRAM_READ_AHEAD": "x"}, "a whole number from 1 to 64"),
        ({"CSVFAST_VMRAM_KEY_FILE": "/dev/null"}, "holds fewer bytes: a key is exactly 32"),
        ({"CSVFAST_VMRAM_KEY_FILE": "/dev/zero"}, "holds more bytes"),
        ({"CSVFAST_VMRAM_KEY_FILE": "/nowhere"}, "cannot be opened"),
        ({"CSVFAST_VMRAM_KEY_FD": "77"}, "no open file descriptor"),
        ({"CSVFAST_VMRAM_KEY_FD": "0", "CSVFAST_VMRAM_KEY_FILE": "/nowhere"}, "which is it?"),
        ({"CSVFAST_KERNEL": "abacus"}, "CSVFAST_KERNEL names a kernel that is unknown"),
    ],
)
def test_refused(start: Start, environment: dict[str, str], words: str) -> None:
    """One line of ours, QEMU's own about the mapping, and no machine runs."""
    guest = start(environment=environment)
    assert guest.finish(30) not in (0, None)
    (line,) = our_lines(guest)
    assert words in line
    assert "guest:" not in guest.text()


def test_no_path(initrd: Path, memory_folder: Path) -> None:
    """Whoever forgets which file to encrypt does not run unencrypted."""
    environment = {**os.environ, "LD_PRELOAD": str(qemu_guest.preload_library())}
    environment.pop("CSVFAST_VMRAM_PATH", None)
    done = subprocess.run(
        [shutil.which(QEMU) or QEMU, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("csvfast-vmram: CSVFAST_VMRAM_PATH is not set")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without privileges")
@pytest.mark.skipif(
    Path("/proc/sys/vm/unprivileged_userfaultfd").exists()
    and Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0",
    reason="this system allows userfaultfd to everybody",
)
def test_forbidden() -> None:
    with tempfile.TemporaryDirectory(prefix="csvfast-vmram-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        library = Path(shutil.copy(qemu_guest.preload_library(), folder))
        library.chmod(0o755)
        dram = folder / "dram"
        command = [shutil.which(QEMU) or QEMU, "-display", "none", "-m", "64M", "-machine", "q35,memory-backend=ram"]
        command += ["-accel", "tcg", "-object", f"memory-backend-file,id=ram,size=64M,mem-path={dram},share=on"]
        environment = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(library), "CSVFAST_VMRAM_PATH": str(dram)}
        done = subprocess.run(
            command, env=environment, user=65534, group=65534, extra_groups=[], cwd="/",
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("csvfast-vmram: ")]
        assert len(lines) == 1
        assert "userfaultfd is forbidden to this user" in lines[0]
