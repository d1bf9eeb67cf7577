"""`csvfast vm` as a user runs it: console, exit code, the other commands of the same user, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from machine import qemu_guest
from machine.vm_platform import alive

from csvfast.machine.vm_door import REQUEST_MAX

pytestmark = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)
APPEND = "console=ttyS0 quiet panic=-1"
LONG = f"{APPEND} work=8 rounds=1000000"


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qemu_guest.build_initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CSVFAST_VMRAM_LIBRARY", str(qemu_guest.preload_library()))
    return tmp_path / "csvfast"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "csvfast", "vm", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=110, check=False)


def options(initrd: Path, append: str) -> list[str]:
    kernel = qemu_guest.boot_files() / "vmlinuz"
    return ["--kernel", str(kernel), "--initrd", str(initrd), "--append", append, "--memory", "128MiB", "--accel", "tcg"]


@contextmanager
def machine(place: Path, initrd: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """One that runs on and on, named `one`."""
    with subprocess.Popen(
        command("run", *options(initrd, LONG), "--name", "one", *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            end = time.monotonic() + 60
            while not (place / "one" / "vm.sock").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_run(place: Path, initrd: Path, tmp_path: Path) -> None:
    dram = tmp_path / "dram"
    done = run("run", *options(initrd, f"{APPEND} work=1 rounds=1"), "--dram", dram, "--silent-init")
    assert done.returncode == 0, done.stderr
    assert "guest: text written" in done.stdout
    assert not dram.exists()
    assert list(place.iterdir()) == []


def test_switched_off_without_a_word(place: Path, initrd: Path) -> None:
    """This init reports no exit code: what went on in the guest is not known, and not a success."""
    done = run("run", *options(initrd, f"{APPEND} work=1 rounds=1"))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "the guest switched off without `guest: exit N`" in done.stderr
    assert "guest: text written" in done.stdout
    assert list(place.iterdir()) == []


def test_commands(place: Path, initrd: Path, tmp_path: Path) -> None:
    with machine(place, initrd) as process:
        (row,) = json.loads(run("status", "--json").stdout)["machines"]
        assert (row["name"], row["state"]) == ("one", "running")
        assert run("status", "one").stdout.startswith("one: running, ASID ")
        dump = tmp_path / "dump"
        assert run("dump", "one", "-o", dump).returncode == 0
        assert dump.stat().st_size == 128 << 20
        assert qemu_guest.count(dump, qemu_guest.KERNEL_TEXT) == 0
        again = run("dump", "one", "-o", dump)
        assert (again.returncode, again.stderr.count("\n")) == (3, 1)
        second = run("run", *options(initrd, LONG), "--name", "one")
        assert (second.returncode, second.stderr.count("\n")) == (3, 1)
        assert "a machine of this name runs" in second.stderr
        for request in (b"stop now\n", b"dump relative\n", b"\xff\xfe\n", b"\n", b"x" * (REQUEST_MAX + 2), b""):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(20)
                peer.connect(str(place / "one" / "vm.sock"))
                peer.sendall(request)
                peer.shutdown(socket.SHUT_WR)
                try:
                    answer = peer.recv(4096)
                except ConnectionResetError:
                    answer = b""
            assert answer == b"" or b"is no request" in answer
        assert run("stop", "one").returncode == 0
        assert process.wait(30) == 0
        assert not alive(row["qemu"])
    assert list(place.iterdir()) == []
    done = run("stop", "one")
    assert (done.returncode, done.stderr) == (3, "csvfast: error: no machine one runs\n")
    assert run("status").stdout == "no machines\n"


def test_interrupted(place: Path, initrd: Path) -> None:
    with machine(place, initrd) as process:
        qemu = json.loads((place / "one" / "state.json").read_text(encoding="utf-8"))["qemu"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not alive(qemu)
    assert list(place.iterdir()) == []


def test_killed(place: Path, initrd: Path) -> None:
    with machine(place, initrd) as process:
        qemu = json.loads((place / "one" / "state.json").read_text(encoding="utf-8"))["qemu"]
        process.kill()
        process.wait(10)
        end = time.monotonic() + 20
        while alive(qemu) and time.monotonic() < end:
            time.sleep(0.02)
        assert not alive(qemu)
    assert run("status").stdout == "no machines\n"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--expect", "00" * 32), 1, "launch digest"),
        (("--window", "0"), 2, "expected at least 65536"),
        (("--time-limit", "-1"), 2, "more than 0 seconds"),
        (("--qemu", "/nowhere/qemu"), 3, "is not there or not executable"),
        (("--kernel", "/dev/null"), 2, ""),
        (("--name", "../x"), 2, "1 to 32 letters"),
        (("--disk-password", "/dev/null"), 2, "only the owner can pack it"),
        (("--policy", "0x40"), 2, "CSV3"),
        (("--time-limit", "0.9"), 137, "the time limit of 0.9 s has ended the machine"),
    ],
)
def test_refused(place: Path, initrd: Path, more: tuple[str, ...], code: int, words: str) -> None:
    done = run("run", *options(initrd, LONG), *more)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert words in done.stderr
    assert not place.exists() or list(place.iterdir()) == []


def test_run_directory_of_others(place: Path, initrd: Path) -> None:
    place.mkdir()
    os.chmod(place, 0o755)
    done = run("run", *options(initrd, LONG))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "mode 0700" in done.stderr
