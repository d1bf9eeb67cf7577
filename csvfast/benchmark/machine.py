"""Facts about this machine that a benchmark figure is worth nothing without.

Read from /proc and /sys where they exist; a fact that cannot be read is None, never a guess.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypedDict

__all__ = ["Machine", "clock_hertz", "machine_facts"]


class Machine(TypedDict):
    """The "machine" part of a benchmark's JSON."""

    cpu: str | None  # model name
    architecture: str
    cpus: int  # that this process may use
    caches: dict[str, str]  # "L1d" -> "32K" and so on, of CPU 0
    memory_bytes: int | None
    governor: str | None
    clock_hertz: float | None  # estimated now, see clock_source
    clock_source: str | None  # "measured" or "/proc/cpuinfo"
    virtual_machine: bool | None
    system: str
    python: str
    openssl: str
    csvfast: str
    cpu_features: list[str]
    kernels: dict[str, str]  # primitive -> kernel chosen without forcing
    time: str  # UTC, ISO 8601


def machine_facts() -> Machine:
    """All facts at once; takes about 20 ms for the clock."""
    import csvfast

    facts = csvfast.info()
    hertz, source = clock_hertz()
    cpuinfo = _read("/proc/cpuinfo") or ""
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or None,
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "caches": _caches(),
        "memory_bytes": _memory_bytes(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock_hertz": hertz,
        "clock_source": source,
        "virtual_machine": " hypervisor " in f" {_field(cpuinfo, 'flags') or ''} " if cpuinfo else None,
        "system": _system(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "csvfast": csvfast.__version__,
        "cpu_features": list(facts["cpu"]["features"]),
        "kernels": {name: entry["chosen"] for name, entry in facts["kernels"].items()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# mov rax, rdi;  again: 16 x (add rax, rdi);  dec rsi;  jnz again;  ret
_ADD_CHAIN: Final = bytes.fromhex("4889f8") + bytes.fromhex("4801f8") * 16 + bytes.fromhex("48ffce75cbc3")
_ADDS_PER_TURN: Final = 16


def clock_hertz(turns: int = 1_000_000) -> tuple[float | None, str | None]:
    """Clock of the CPU under load and how it was found.

    Sixteen dependent additions take sixteen cycles on every x86-64, so the time of a known number of them is the clock;
    /proc/cpuinfo and the time stamp counter show a nominal clock only, in a virtual machine often nothing else. Where
    running the loop is not possible (another architecture, a system that forbids executable memory), the nominal one
    is given. (None, None) where nothing is known.
    """
    if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux":
        try:
            code = mmap.mmap(-1, len(_ADD_CHAIN), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            pass
        else:
            code.write(_ADD_CHAIN)
            anchor = ctypes.c_char.from_buffer(code)
            chain = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(ctypes.addressof(anchor))
            chain(1, turns // 10)  # wakes the core
            # An interrupt only ever makes a run longer: the shortest is the clock.
            seconds = min(_timed(chain, turns) for _ in range(3))
            del chain, anchor
            code.close()
            return _ADDS_PER_TURN * turns / seconds, "measured"
    nominal = _field(_read("/proc/cpuinfo") or "", "cpu MHz")
    return (float(nominal) * 1e6, "/proc/cpuinfo") if nominal else (None, None)


def _timed(chain: Callable[[int, int], int], turns: int) -> float:
    start = time.thread_time()
    chain(1, turns)
    return max(time.thread_time() - start, 1e-9)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*[:=]\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip().strip('"') if found else None


def _caches() -> dict[str, str]:
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(f"{index}/{name}") for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _memory_bytes() -> int | None:
    total = _field(_read("/proc/meminfo") or "", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _system() -> str:
    name = _field(_read("/etc/os-release") or "", "PRETTY_NAME")
    kernel = f"{platform.system()} {platform.release()}"
    return f"{name}, {kernel}" if name else kernel
