"""QEMU as a process: its command line, its start, its console, its end.

QEMU never outlives who started it: the kernel kills it when the thread that waits for it is gone (PR_SET_PDEATHSIG), whatever
ended that one. The preload library is set for QEMU alone.

Thread-safety: any thread may use a QemuProcess.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Literal

from csvfast.errors import ArgumentError, StateError

__all__ = ["Accelerator", "QemuProcess", "choose_accelerator", "find_bios", "find_qemu", "kvm_works", "low_memory", "ram_ranges"]

Accelerator = Literal["tcg", "kvm", "auto"]

CONSOLE_BYTES: Final = 4 << 20  # kept for console(); the stream gets everything
STDERR_BYTES: Final = 64 << 10
_LOW_MAX: Final = 0xB0000000  # q35: from this size on, RAM below 4 GiB ends at 2 GiB (QEMU hw/i386/pc_q35.c)
_LOW_SPLIT: Final = 0x80000000
_FOUR_GIB: Final = 1 << 32

# In a process between the two: preexec_fn is not safe in a program with threads. Arguments: our process ID, the program's.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGKILL, 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("csvfast: the parent is gone")
os.environ["LD_PRELOAD"] = os.environ.pop("CSVFAST_VM_PRELOAD")
os.execv(sys.argv[2], sys.argv[2:])
"""

# One vCPU from its reset vector (0xfffffff0) to a HLT there: KVM_CREATE_VM, memory, KVM_CREATE_VCPU, KVM_RUN, KVM_EXIT_HLT.
_PROBE: Final = """
import ctypes, fcntl, mmap, os, struct, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
page = mmap.mmap(-1, 4096)
page[0xff0] = 0xf4
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(vm, 0x4020AE46, struct.pack("=IIQQQ", 0, 0, 0xfffff000, 4096, address))
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
run = mmap.mmap(vcpu, fcntl.ioctl(kvm, 0xAE04, 0))
fcntl.ioctl(vcpu, 0xAE80, 0)
sys.exit(0 if struct.unpack_from("=I", run, 8)[0] == 5 else 1)
"""


def find_qemu(path: str | os.PathLike[str] | None = None) -> str:
    """The program's path. Raises StateError when there is none."""
    wanted = "qemu-system-x86_64" if path is None else os.fspath(path)
    found = shutil.which(wanted)
    if found is None:
        raise StateError(f"{wanted} is not there or not executable; install QEMU (Debian: qemu-system-x86), or name it")
    return str(Path(found).absolute())


def find_bios() -> Path:
    """The BIOS that comes with QEMU. Raises StateError when it is not there."""
    for folder in ("/usr/share/seabios", "/usr/share/qemu", "/usr/local/share/qemu"):
        path = Path(folder) / "bios-256k.bin"
        if path.exists():
            return path
    raise StateError("bios-256k.bin is not there (Debian: package seabios); expected a firmware image")


def kvm_works(program: str, seconds: float = 10.0) -> bool:
    """Whether a vCPU really runs under KVM here, and QEMU can set one up: a device node alone says little."""
    idle = [program, "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio", "-machine", "q35"]
    idle += ["-m", "16M", "-accel", "kvm", "-cpu", "host", "-S"]
    for command, words in (([sys.executable, "-I", "-S", "-c", _PROBE], b""), (idle, b"quit\n")):
        try:
            done = subprocess.run(command, input=words, capture_output=True, timeout=seconds, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode != 0:
            return False
    return True


def choose_accelerator(wanted: str, program: str) -> Literal["tcg", "kvm"]:
    """Raises: ArgumentError (name); StateError: KVM was asked for and does not run."""
    if wanted == "tcg":
        return "tcg"
    if wanted not in ("kvm", "auto"):
        raise ArgumentError(f"accel is {wanted[:20]!r}; expected 'tcg', 'kvm' or 'auto'")
    if kvm_works(program):
        return "kvm"
    if wanted == "kvm":
        raise StateError("no vCPU runs under KVM here (/dev/kvm is missing, forbidden or does not work); expected accel 'tcg'")
    return "tcg"


def low_memory(size: int) -> int:
    """Bytes of a q35 machine's RAM below 4 GiB; the rest begins at 4 GiB."""
    return size if size < _LOW_MAX else _LOW_SPLIT


def ram_ranges(size: int) -> list[tuple[int, int, int]]:
    """Where a q35 machine has its RAM: (guest physical address, offset in the RAM, bytes)."""
    low = low_memory(size)
    return [(0, 0, low), (_FOUR_GIB, low, size - low)] if size > low else [(0, 0, low)]


class QemuProcess:
    """A running QEMU.

    Args:
        command: program, by its path, and arguments. environment: added to ours. preload: the library, for QEMU alone.
        descriptors: it inherits these. output: gets the console as it comes; None = nobody.
        seconds: after these it is killed; None = never. ended: called once it is gone, by the thread that waited.
    Attributes: timed_out.
    Raises: OSError.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        preload: str,
        descriptors: Sequence[int],
        output: Callable[[bytes], object] | None = None,
        seconds: float | None = None,
        ended: Callable[[], object] | None = None,
    ) -> None:
        self.timed_out = False
        self._output = output
        self._console = bytearray()
        self._errors = bytearray()
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: BaseException | None = None
        self._started, self._gone = threading.Event(), threading.Event()
        # The kernel looks at the thread that forked, not at the process: it must live as long as QEMU does.
        self._waiter = threading.Thread(
            target=self._run,
            args=(list(command), _environment(environment, preload), list(descriptors), seconds, ended),
            name="csvfast-qemu",
            daemon=True,
        )
        self._waiter.start()
        self._started.wait()
        if self._problem is not None:
            raise self._problem

    def _run(
        self,
        command: list[str],
        environment: dict[str, str],
        descriptors: list[int],
        seconds: float | None,
        ended: Callable[[], object] | None,
    ) -> None:
        try:
            process = self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
                env=environment,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        except BaseException as problem:
            self._problem = problem
            self._started.set()
            return
        readers = [
            threading.Thread(target=self._read, args=(stream, kept, most), daemon=True)
            for stream, kept, most in (
                (process.stdout, self._console, CONSOLE_BYTES),
                (process.stderr, self._errors, STDERR_BYTES),
            )
        ]
        for reader in readers:
            reader.start()
        self._started.set()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.timed_out = True
            process.kill()
            process.wait()
        for reader in readers:
            reader.join(5)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        try:
            if ended is not None:
                ended()
        finally:
            self._gone.set()

    def _read(self, stream: IO[bytes] | None, kept: bytearray, most: int) -> None:
        if stream is None:
            return
        while chunk := os.read(stream.fileno(), 65536):
            with self._guard:
                kept += chunk
                if len(kept) > most:
                    del kept[: len(kept) - most]
            if kept is self._console and self._output is not None:
                try:
                    self._output(chunk)
                except (OSError, ValueError):  # nobody listens any more; the guest goes on
                    self._output = None

    @property
    def pid(self) -> int:
        """Process ID."""
        return 0 if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """False once it is gone and everything around it is put away."""
        return not self._gone.is_set()

    @property
    def exit_code(self) -> int | None:
        """Of the process; negative: the signal that ended it. None while it runs."""
        return None if self._process is None else self._process.poll()

    def console(self) -> bytes:
        """The console's text, the last 4 MiB of it."""
        with self._guard:
            return bytes(self._console)

    def errors(self) -> str:
        """What QEMU and the preload library complained about."""
        with self._guard:
            return self._errors.decode(errors="replace")

    def reason(self) -> str:
        """The line of its complaints that says most: the preload library's own, or else the last one."""
        lines = [line.strip() for line in self.errors().splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("csvfast-vmram: ")]
        return (ours or lines[-1:] or ["it said nothing"])[0]

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is gone. False: it still runs."""
        return self._gone.wait(seconds)

    def stop(self, seconds: float = 10.0) -> None:
        """Ends it in order, so that all of the RAM is in the DRAM; kills it after `seconds`."""
        self._signal(signal.SIGTERM)
        if not self.wait(seconds):
            self.kill()

    def request_stop(self) -> None:
        """Asks it to end in order, and does not wait."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)
        self.wait(30)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _environment(added: Mapping[str, str], preload: str) -> dict[str, str]:
    """Ours, without what would speak to the preload library beside what is added."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CSVFAST_VMRAM_")}
    return {**kept, **added, "CSVFAST_VM_PRELOAD": preload}
