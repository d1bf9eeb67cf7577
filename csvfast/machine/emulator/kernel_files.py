"""Files that a kernel makes: the few of /proc that static programs read, and open descriptors by name (/dev/fd, /dev/stdout)."""

from __future__ import annotations

import os
import posixpath
import re
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["link", "opened"]

_DESCRIPTOR: Final = re.compile(rb"/(?:dev/fd|proc/self/fd)/([0-9]{1,4})")
_STREAMS: Final = {b"/dev/stdin": 0, b"/dev/stdout": 1, b"/dev/stderr": 2}
_MOUNTS: Final = b"root / rootfs rw 0 0\nproc /proc proc rw 0 0\n"


def opened(process: Process, path: bytes) -> int | None:
    """A new descriptor of the host's for a path that the kernel serves; None for all others. Raises OSError."""
    path = _plain(path)
    number = _number(path)
    if number is not None:
        return process.files.duplicate_host(process.files.host(number))
    make = _FILES.get(path)
    if make is None:
        return None
    memory = os.memfd_create("csvfast-kernel", os.MFD_CLOEXEC)
    try:
        data = memoryview(make(process))
        while len(data):
            data = data[os.write(memory, data) :]
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(memory)


def link(process: Process, path: bytes) -> bytes | None:
    """What a symbolic link of the kernel's says; None for all others. Raises OSError."""
    path = _plain(path)
    if path == b"/proc/self/exe":
        return b"/" + os.fsencode(process.name).lstrip(b"/")
    if path == b"/proc/self/cwd":
        return process.files.cwd
    if path == b"/proc/self/root":
        return b"/"
    if path == b"/proc/self":
        return b"%d" % os.getpid()
    number = _number(path)
    if number is None:
        return None
    place = os.readlink(b"/proc/self/fd/%d" % process.files.host(number))  # noqa: PTH115 - bytes
    top = os.readlink(b"/proc/self/fd/%d" % process.files.root).rstrip(b"/")  # noqa: PTH115 - bytes
    return place[len(top) :] or b"/" if (place + b"/").startswith(top + b"/") else place


def _plain(path: bytes) -> bytes:
    path = posixpath.normpath(path)
    own = b"/proc/%d" % os.getpid()
    for name in (own, b"/proc/thread-self"):
        if path == name or path.startswith(name + b"/"):
            return b"/proc/self" + path[len(name) :]
    return path


def _number(path: bytes) -> int | None:
    found = _DESCRIPTOR.fullmatch(path)
    return int(found[1]) if found else _STREAMS.get(path)


def _command_line(process: Process) -> bytes:
    return b"".join(word + b"\0" for word in process.arguments)


def _name(process: Process) -> bytes:
    return os.fsencode(process.name).rpartition(b"/")[2][:15]


def _pages(process: Process) -> tuple[int, int]:
    areas = process.space.areas
    return sum(area.end - area.start for area in areas) >> 12, len(process.space.pages)


def _status(process: Process) -> bytes:
    size, resident = _pages(process)
    lines = [
        b"Name:\t" + _name(process), b"State:\tR (running)", b"Tgid:\t%d" % os.getpid(), b"Pid:\t%d" % os.getpid(),
        b"PPid:\t%d" % os.getppid(), b"TracerPid:\t0",
        b"Uid:\t%d\t%d\t%d\t%d" % (*process.identity.users, process.identity.users[1]),
        b"Gid:\t%d\t%d\t%d\t%d" % (*process.identity.members, process.identity.members[1]),
        b"VmSize:\t%8d kB" % (size << 2), b"VmRSS:\t%8d kB" % (resident << 2), b"Threads:\t1",
    ]  # fmt: skip
    return b"\n".join(lines) + b"\n"


def _stat(process: Process) -> bytes:
    size, resident = _pages(process)
    head = b"%d (%s) R %d %d %d 0 -1 0 0 0 0 0 " % (os.getpid(), _name(process), os.getppid(), os.getpgrp(), os.getsid(0))
    times = os.times()
    used = b"%d %d 0 0 20 0 1 0 0 " % (times.user * 100, times.system * 100)
    return head + used + b"%d %d " % (size << 12, resident) + b"18446744073709551615" + b" 0" * 27 + b"\n"


def _maps(process: Process) -> bytes:
    out = []
    for area in process.space.areas:
        rights = bytes(letter if area.rights & bit else 45 for bit, letter in ((1, 114), (2, 119), (4, 120)))
        out.append(b"%x-%x %sp %08x 00:00 0\n" % (area.start, area.end, rights, area.offset if area.file >= 0 else 0))
    return b"".join(out)


def _memory(process: Process) -> bytes:
    total = process.frames.count << 2
    free = total - (process.frames.used() << 2)
    names = dict.fromkeys((b"MemTotal", b"MemFree", b"MemAvailable", b"Buffers", b"Cached", b"SwapTotal", b"SwapFree"), 0)
    names.update({b"MemTotal": total, b"MemFree": free, b"MemAvailable": free})
    return b"".join(b"%-16s%8d kB\n" % (name + b":", value) for name, value in names.items())


def _processor(_process: Process) -> bytes:
    return (
        b"processor\t: 0\nvendor_id\t: csvfast\nmodel name\t: emulated x86-64\ncpu MHz\t\t: 1000.000\ncpu cores\t: 1\n"
        b"flags\t\t: fpu tsc cx8 cmov mmx fxsr sse sse2 syscall nx lm\n\n"
    )


def _uptime(_process: Process) -> bytes:
    return b"%.2f 0.00\n" % time.monotonic()


def _text(text: bytes) -> Callable[[Process], bytes]:
    return lambda _process: text


def _host_name(process: Process) -> bytes:
    return os.fsencode(os.uname().nodename if process.hostname is None else process.hostname) + b"\n"


_FILES: Final[dict[bytes, Callable[[Process], bytes]]] = {
    b"/proc/self/cmdline": _command_line, b"/proc/self/comm": lambda process: _name(process) + b"\n",
    b"/proc/self/status": _status, b"/proc/self/stat": _stat, b"/proc/self/maps": _maps,
    b"/proc/self/statm": lambda process: b"%d %d 0 0 0 0 0\n" % _pages(process),
    b"/proc/self/mounts": _text(_MOUNTS), b"/proc/self/cgroup": _text(b"0::/\n"),
    b"/proc/self/mountinfo": _text(b"1 0 0:1 / / rw - rootfs root rw\n2 1 0:2 / /proc rw - proc proc rw\n"),
    b"/proc/self/environ": lambda process: b"".join(word + b"\0" for word in process.environment),
    b"/proc/self/oom_score_adj": _text(b"0\n"),
    b"/proc/mounts": _text(_MOUNTS), b"/proc/meminfo": _memory, b"/proc/cpuinfo": _processor, b"/proc/uptime": _uptime,
    b"/proc/loadavg": _text(b"0.00 0.00 0.00 1/1 1\n"),
    b"/proc/stat": _text(b"cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n"),
    b"/proc/version": _text(b"Linux version 6.1 (csvfast emulator)\n"),
    b"/proc/filesystems": _text(b"nodev\tproc\nnodev\ttmpfs\n"),
    b"/proc/sys/kernel/hostname": _host_name, b"/proc/sys/kernel/pid_max": _text(b"4194304\n"),
    b"/proc/sys/kernel/osrelease": lambda _process: os.fsencode(os.uname().release) + b"\n",
    b"/proc/sys/kernel/ngroups_max": _text(b"65536\n"), b"/proc/sys/vm/overcommit_memory": _text(b"1\n"),
    b"/proc/sys/net/core/somaxconn": _text(b"4096\n"),
    b"/sys/devices/system/cpu/online": _text(b"0\n"), b"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size": _text(b"0\n"),
}  # fmt: skip
