"""Debian's QEMU, unmodified, on guest memory that is ciphertext outside a window."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from machine import qemu_guest
from machine.qemu_guest import (
    KERNEL_TEXT,
    QEMU,
    SIZE,
    TEXT,
    Guest,
    boot_files,
    build_initrd,
    count,
    holds,
    userfault_reason,
)

from csvfast.crypto import SM4XTS

PAGE = 4096
# Of each window: 1,000 where CSVFAST_VM_WORK asks for long work, else 1,000 of all three together.
SCANS = 1000 if "CSVFAST_VM_WORK" in os.environ else 334


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

    def start_one(dram: Path | None = None, **options: object) -> Guest:
        dram = dram or memory_folder / f"dram-{len(guests)}"
        guests.append(qemu_guest.start(dram, initrd, **options))  # type: ignore[arg-type]
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
            for _ in range(20):
                assert holds(guest.dram, TEXT)
            assert count(guest.dram, TEXT) >= (16 << 20) // 32
            assert guest.finish() == 0
            assert count(guest.dram, TEXT) >= (16 << 20) // 32
            assert count(guest.dram, KERNEL_TEXT) > 0
            print(f"plain: {guest.seen['sum']:.1f} s")
            return sum_line(guest)
        finally:
            guest.kill()


@pytest.mark.parametrize("share", [4, 16, 64])
def test_boot(start: Start, tmp_path: Path, plain_sum: str, share: int) -> None:
    key = secrets.token_bytes(32)
    (tmp_path / "key").write_bytes(key)
    statistics = tmp_path / "statistics.json"
    guest = start(
        environment={
            "CSVFAST_VMRAM_WINDOW": f"1/{share}",
            "CSVFAST_VMRAM_KEY_FILE": str(tmp_path / "key"),
            "CSVFAST_VMRAM_STATS": str(statistics),
        },
        stay=True,
    )
    wait_for_memory(guest)
    chance = random.Random(share)
    scans = 0
    while scans < SCANS or "sum" not in guest.seen:
        assert not holds(guest.dram, TEXT)
        assert guest.process.poll() is None, guest.text()
        scans += 1
        time.sleep(chance.uniform(0, 0.002))
    guest.leave()
    assert guest.finish() == 0, guest.text()
    assert "goodbye" in guest.seen, guest.text()
    assert sum_line(guest) == plain_sum
    print(f"window 1/{share}: {guest.seen['sum']:.1f} s, {scans} scans")
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


def flip(dram: BinaryIO, start: int) -> None:
    """One bit of every 16-byte block of every other page."""
    for number in range(0, SIZE // PAGE, 2):
        dram.seek(start + number * PAGE)
        page = bytearray(dram.read(PAGE))
        page[::16] = bytes(byte ^ 1 for byte in page[::16])
        dram.seek(start + number * PAGE)
        dram.write(page)


def swap(dram: BinaryIO, start: int) -> None:
    """Neighbouring pages."""
    for number in range(0, SIZE // PAGE, 2):
        dram.seek(start + number * PAGE)
        both = dram.read(2 * PAGE)
        dram.seek(start + number * PAGE)
        dram.write(both[PAGE:] + both[:PAGE])


def replay(dram: BinaryIO, start: int) -> None:
    """All of it becomes what it was a while ago."""
    dram.seek(start)
    old = dram.read(SIZE)
    time.sleep(2)
    dram.seek(start)
    dram.write(old)


def test_altered(start: Start, memory_folder: Path) -> None:
    """Guests in one DRAM file: whose pages are altered there does not go on as if nothing were; the one between them does."""
    shared = memory_folder / "shared"
    attacks = {0: flip, 2: swap, 3: replay}
    with shared.open("wb") as file:
        file.truncate(4 * SIZE)
    guests = [
        start(
            shared, work=8, rounds=1, stay=True,
            environment={"CSVFAST_VMRAM_WINDOW": "1/32", "CSVFAST_VMRAM_OFFSET": str(number * SIZE)},
        )
        for number in range(4)
    ]  # fmt: skip
    sums = set()
    for number, attack in attacks.items():
        guest = guests[number]
        guest.wait_for("sum", 240)
        sums.add(sum_line(guest))
        with shared.open("r+b", buffering=0) as dram:
            attack(dram, number * SIZE)
        guest.leave()
        end = time.monotonic() + 2
        while guest.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        guest.kill_only()
        assert "goodbye" not in guest.seen, guest.text()  # panicked, found its memory wrong, or silent
    spared = guests[1]
    spared.wait_for("sum", 240)
    spared.leave()
    assert spared.finish() == 0, spared.text()
    assert "goodbye" in spared.seen, spared.text()
    assert sums == {sum_line(spared)}
    assert count(shared, TEXT) == 0  # kill -9 leaves ciphertext


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
