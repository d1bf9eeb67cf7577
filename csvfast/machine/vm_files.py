"""What a virtual machine stands on: boot files that nobody can change any more, and a private directory per machine.

Files are read once, into memory files sealed against every change: what is measured is what runs. The directory holds state.json
and the sockets; a lock tells whether its owner lives, so that what a killed one left is removed by the next one.

Thread-safety: functions without state; a RunDirectory belongs to one thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast._files import write_atomically
from csvfast.errors import AllocationError, ArgumentError, StateError
from csvfast.measure.source import Source

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.measure.source import AnyPath

__all__ = ["RunDirectory", "check_kernel", "check_room", "run_root", "seal_file"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_HEADER: Final = slice(0x1FE, 0x206)  # boot flag, jump, "HdrS" (Linux Documentation/arch/x86/boot.rst)


def seal_file(path: AnyPath, name: str) -> int:
    """A descriptor of a sealed copy in memory, which /proc/self/fd can name. Raises SourceError, OSError."""
    descriptor = os.memfd_create(f"csvfast-boot-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with Source(path) as source:
            for chunk in source.chunks():
                left = memoryview(chunk)
                while left:
                    left = left[os.write(descriptor, left) :]
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_kernel(descriptor: int, path: AnyPath) -> None:
    """Raises ArgumentError unless it is a Linux kernel for x86, which is all that a direct boot takes."""
    header = os.pread(descriptor, _HEADER.stop - _HEADER.start, _HEADER.start)
    if header[:2] != b"\x55\xaa" or header[4:] != b"HdrS":
        raise ArgumentError(f"{os.fspath(path)!s}: no Linux kernel for x86 (a bzImage has 55 aa at 0x1fe and HdrS at 0x202)")


def check_room(descriptor: int, address: int, size: int) -> None:
    """Raises AllocationError when the file system under the DRAM has no room for the guest's part of it."""
    status, space = os.fstat(descriptor), os.fstatvfs(descriptor)
    missing = max(0, min(size, status.st_size - address) - status.st_blocks * 512)
    free = space.f_bavail * space.f_frsize
    if space.f_blocks == 0:  # anonymous memory
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        free = missing if found is None else int(found[1]) << 10
    if missing > free:
        raise AllocationError(f"the guest's RAM of {size} bytes needs {missing} more below the DRAM, where {free} are free")


def run_root() -> Path:
    """Where machines' directories are: $XDG_RUNTIME_DIR/csvfast or /tmp/csvfast-UID. Raises StateError if it is not private."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "csvfast" if base else Path(f"/tmp/csvfast-{os.geteuid()}")  # noqa: S108  (checked below)
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StateError(f"{root}: expected a directory of this user with mode 0700")
    return root


class RunDirectory:
    """The directory of one machine, gone on close().

    Attributes: name, path.
    Raises: ArgumentError (name), StateError: a machine of this name runs.
    """

    def __init__(self, name: str | None = None, root: Path | None = None) -> None:
        root = run_root() if root is None else root
        clean(root)
        if name is not None and not _NAME.fullmatch(name):
            raise ArgumentError(f"name is {name[:40]!r}; expected 1 to 32 letters, digits, '_', '.', '-'")
        number = 0
        while True:
            number += 1
            self.name = f"vm{os.getpid()}-{number}" if name is None else name
            self.path = root / self.name
            try:
                self.path.mkdir(mode=0o700)
                break
            except FileExistsError:
                if name is not None:
                    raise StateError(f"{self.path}: a machine of this name runs") from None
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def write_state(self, state: dict[str, Any]) -> None:
        """Replaces state.json; whoever reads it sees the old one or the new one."""
        write_atomically(self.path / "state.json", json.dumps(state, indent=2).encode() + b"\n")

    def close(self) -> None:
        """Removes it. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def clean(root: Path) -> None:
    """Removes the directories whose owner is gone."""
    for path in root.iterdir():
        with suppress(OSError):
            lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
