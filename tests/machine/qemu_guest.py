"""A small Linux guest for QEMU: Debian's kernel, an initrd with one static program, guest memory in a file."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
QEMU = "qemu-system-x86_64"
TEXT = b"KNOWN-GUEST-TEXT"
KERNEL_TEXT = b"Linux version "  # linux_banner stands in every running kernel's memory
SIZE = 128 << 20


def boot_files() -> Path:
    """Where tools/install-test-tools.sh puts the kernel."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CSVFAST_BOOT_FILES") or cache / "csvfast" / "boot")


def userfault_reason() -> str | None:
    """Why no memory can be encrypted by the tests here; None = it can."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        return "gcc or make not installed"
    sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd")
    allowed = os.geteuid() == 0 or os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
    if not sysctl.exists() or not (allowed or sysctl.read_text().strip() == "1"):
        return "userfaultfd is forbidden to this user (vm.unprivileged_userfaultfd)"
    return None


def newc(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a cpio archive as the kernel unpacks it (its Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = [1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    header = b"070701" + b"".join(b"%08x" % value for value in fields) + path
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


def build_initrd(folder: Path) -> Path:
    """An initrd whose /init is guest_init.c."""
    program = folder / "init"
    source = Path(__file__).with_name("guest_init.c")
    subprocess.run(["gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    archive = newc("dev", stat.S_IFDIR | 0o755) + newc("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += newc("init", stat.S_IFREG | 0o755, program.read_bytes()) + newc("TRAILER!!!", 0)
    initrd = folder / "initrd"
    initrd.write_bytes(archive)
    return initrd


@functools.cache
def preload_library() -> Path:
    """Built when it is not there: the tests of the C library need not have run."""
    build = ROOT / "csrc" / "build" / "vmram-test"
    command = ["make", "--no-print-directory", "-C", str(ROOT / "csrc"), f"BUILD={build}", "library"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return build / "libcsvfast-vmram-preload.so"


def holds(path: Path, words: bytes) -> bool:
    """Does the file hold the words now? All of it is looked at but its holes, which are zeros: one scan."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        at = 0
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return False
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            if view.find(words, max(0, start - len(words)), at) >= 0:
                return True


def count(path: Path, words: bytes) -> int:
    """How often the file holds the words: one scan, as the host can make it at any moment."""
    found = 0
    with path.open("rb") as file:
        rest = b""
        while chunk := file.read(8 << 20):
            found += (rest + chunk).count(words)
            rest = chunk[-(len(words) - 1) :]
    return found


@dataclass
class Guest:
    """A running QEMU. Its console is read by a thread, so that it never blocks."""

    process: subprocess.Popen[str]
    dram: Path
    console: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    seen: dict[str, float] = field(default_factory=dict)
    reader: threading.Thread | None = None

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.console.append(line)
            if line.startswith("guest: "):
                self.seen.setdefault(line.split()[1], time.monotonic() - self.started)

    def text(self) -> str:
        return "".join(self.console)

    def wait_for(self, word: str, seconds: float = 120) -> float:
        """Seconds from the start of QEMU until the guest said `guest: <word> ...`."""
        end = time.monotonic() + seconds
        while word not in self.seen:
            assert time.monotonic() < end, f"no '{word}' within {seconds} s: {self.text()}"
            if self.process.poll() is not None and self.reader is not None:
                self.reader.join(5)
                assert word in self.seen, self.text()
            time.sleep(0.02)
        return self.seen[word]

    def leave(self) -> None:
        """A guest that stays is told to end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def finish(self, seconds: float = 120) -> int:
        code = self.process.wait(seconds)
        if self.reader is not None:
            self.reader.join(5)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # words that a dead guest did not take
                    stream.close()
        return code

    def kill_only(self) -> None:
        """As `kill -9` does: what it leaves stays."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.finish()

    def kill(self) -> None:
        self.kill_only()
        self.dram.unlink(missing_ok=True)


def start(
    dram: Path,
    initrd: Path,
    *,
    work: int = 16,
    rounds: int = 2,
    stay: bool = False,
    encrypted: bool = True,
    environment: dict[str, str] | None = None,
) -> Guest:
    """QEMU on a guest of 128 MiB whose memory is (a part of) the file `dram`, encrypted or plain."""
    settings = dict(os.environ)
    if encrypted:
        settings |= {"LD_PRELOAD": str(preload_library()), "CSVFAST_VMRAM_PATH": str(dram)} | (environment or {})
    command = [
        shutil.which(QEMU) or QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none",
        "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", f"{SIZE >> 20}M", "-no-reboot",
        "-object", f"memory-backend-file,id=ram,size={SIZE},mem-path={dram},share=on", "-machine", "q35,memory-backend=ram",
        "-kernel", str(boot_files() / "linux"), "-initrd", str(initrd),
        "-append", f"console=ttyS0 quiet panic=-1 work={work} rounds={rounds} stay={int(stay)}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=settings, text=True, errors="replace",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    guest = Guest(process, dram)
    guest.reader = threading.Thread(target=guest.read, daemon=True)
    guest.reader.start()
    return guest
