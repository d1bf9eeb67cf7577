"""A platform for virtual machines: a chip, its processor, and DRAM in shared memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from machine import qemu_guest

from csvfast.certs import ManufacturingLine
from csvfast.machine.vm import CsvVm
from csvfast.processor import Processor
from csvfast.processor.machine import LocalMachine
from csvfast.processor.server import open_shared_memory
from csvfast.processor.vmm import GuestPlan
from csvfast.report.policy import GuestPolicy

MEMORY = 128 << 20
POLICY = GuestPolicy.of(nodbg=True)


@functools.cache
def firmware() -> Path:
    """QEMU's own BIOS: it boots fastest, and has no area for the hash table."""
    places = ("/usr/share/seabios", "/usr/share/qemu")
    return next(path for place in places if (path := Path(place) / "bios-256k.bin").exists())


class Platform(NamedTuple):
    """What CsvVm stands on."""

    processor: Processor
    machine: LocalMachine
    dram: str
    descriptor: int

    def count(self, words: bytes) -> int:
        """How often the DRAM holds the words: one scan of all of it."""
        return qemu_guest.count(Path(self.dram), words)


@contextmanager
def platform(size: int = MEMORY + (32 << 20)) -> Iterator[Platform]:
    shared = open_shared_memory(size)
    processor = Processor(ManufacturingLine.create().make_chip(), shared.memory)
    try:
        yield Platform(processor, LocalMachine(processor), f"/proc/self/fd/{shared.descriptor}", shared.descriptor)
    finally:
        processor.close()
        shared.close()


def plan(initrd: Path | None, append: str = "work=8 rounds=2", **changes: Any) -> GuestPlan:
    fields: dict[str, Any] = {
        "firmware": firmware(),
        "kernel": qemu_guest.boot_files() / "vmlinuz",
        "initrd": initrd,
        "append": f"console=ttyS0 quiet panic=-1 {append}",
        "policy": POLICY,
        "memory_size": MEMORY,
        "force_hash_table": True,
    }
    return GuestPlan(**(fields | changes))


def make(place: Platform, guest: GuestPlan, root: Path, **options: Any) -> CsvVm:
    settings = {"library": qemu_guest.preload_library(), "time_limit": 120.0, "root": root}
    return CsvVm(platform=place.machine, dram=place.dram, plan=guest, **(settings | options))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
