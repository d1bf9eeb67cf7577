"""System calls about processes, signals, identity, time and randomness."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import stat
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from unicorn import x86_const as x86

from csvfast.machine.emulator.files import AT_FDCWD
from csvfast.machine.emulator.process import Ended
from csvfast.machine.emulator.syscalls_files import LIBC, number_of
from csvfast.machine.emulator.threads import Blocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS"]

_VFORK, _VM, _THREAD, _SETTLS, _CHILD_SETTID, _PARENT_SETTID = 0x4000, 0x100, 0x10000, 0x80000, 0x1000000, 0x100000


def _exit_group(_process: Process, code: int, *_: int) -> None:
    raise Ended(code & 0xFF)


def _fork(process: Process, *_: int) -> None:
    process.todo = lambda: process.fork(0)


def _clone(process: Process, flags: int, stack: int, parent: int, child: int, tls: int, *_: int) -> int | None:
    if flags & _THREAD:
        process.todo = lambda: process.threads.begin(flags, stack, parent, child, tls)
        return None
    if flags & _VM and not flags & _VFORK:
        from csvfast.machine.emulator.process import UnsupportedCall

        raise UnsupportedCall(f"{process.name}: system call 56 (clone) for shared memory, flags {flags:#x}, is not supported")

    def fork() -> int:
        number = process.fork(stack)
        if number:
            if flags & _PARENT_SETTID:
                process.space.write(parent, struct.pack("<i", number))
            return number
        if flags & _CHILD_SETTID:
            process.space.write(child, struct.pack("<i", os.getpid()))
        if flags & _SETTLS:
            process.uc.reg_write(x86.UC_X86_REG_FS_BASE, tls)
        return 0

    process.todo = fork
    return None


def _texts(process: Process, address: int) -> list[bytes]:
    out: list[bytes] = []
    while address:
        (place,) = struct.unpack("<Q", process.space.read(address, 8))
        if not place:
            break
        out.append(process.space.text(place, 1 << 17))
        address += 8
        if len(out) > 4096:
            raise OSError(errno.E2BIG, "arguments")
    return out


def _execve(process: Process, path: int, arguments: int, environment: int, *_: int) -> int | None:
    where = process.space.text(path)
    words, settings = _texts(process, arguments), _texts(process, environment)
    if where == b"/proc/self/exe":
        where = os.fsencode(process.name)
    for _attempt in range(4):
        file = process.files.open(process.files.absolute(AT_FDCWD, where), os.O_RDONLY)
        try:
            if not os.access(f"/proc/self/fd/{file}", os.X_OK) or stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(errno.EACCES, "not executable")
            head = process.files.pread(file, 256, 0)
            if head[:4] == b"\x7fELF":
                break
            if head[:2] != b"#!":
                raise OSError(errno.ENOEXEC, "no program")
        except BaseException:
            process.files.close_host(file)
            raise
        process.files.close_host(file)
        line = head[2:].split(b"\n")[0].strip().split(None, 1)
        if not line:
            raise OSError(errno.ENOEXEC, "no interpreter")
        words = [*line, where, *words[1:]]
        where = line[0]
    else:
        raise OSError(errno.ELOOP, "interpreters")

    def replace() -> None:
        try:
            process.execute(file, os.fsdecode(process.files.absolute(AT_FDCWD, where)), words, settings)
        finally:
            process.files.close_host(file)
        process.files.executed()

    process.todo = replace
    return None


def _wait4(process: Process, number: int, address: int, options: int, usage: int, *_: int) -> int:
    state = ctypes.c_int()
    used = ctypes.create_string_buffer(144)
    several = process.threads.several
    child = process.waiting(LIBC.wait4, number_of(number), ctypes.byref(state), options & 0xF | several, used)  # 1: WNOHANG
    if several and not child and not options & 1:
        raise Blocked(deadline=time.monotonic() + 0.005, late=lambda: _wait4(process, number, address, options, usage))
    status = state.value
    if child and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
        process.frames.release(child)
    if child and address:
        process.space.write(address, struct.pack("<i", status))
    if usage:
        process.space.write(usage, used.raw)
    return child


def _usage(used: Any) -> bytes:
    words = []
    for value in (used.ru_utime, used.ru_stime):
        words += [int(value), int(value % 1 * 1e6)]
    return struct.pack("<4q", *words) + bytes(112)


def _getrusage(process: Process, who: int, address: int, *_: int) -> int:
    process.space.write(address, _usage(resource.getrusage(number_of(who))))
    return 0


def _kill(process: Process, number: int, which: int, *_: int) -> int:
    number, which = number_of(number), number_of(which)
    targets = process.frames.processes() if number in (0, -1) else {abs(number)}
    if number != os.getpid() and not targets <= process.frames.processes():
        raise OSError(errno.ESRCH, "no such process of this machine")
    for target in targets:
        os.kill(target, which)
    return 0


def _tgkill(process: Process, _group: int, number: int, which: int, *_: int) -> int:
    return _tkill(process, number, which)


def _tkill(process: Process, number: int, which: int, *_: int) -> int:
    thread, which = process.threads.find(number_of(number)), number_of(which)
    if thread is None:
        return _kill(process, number, which)
    if not 0 <= which <= 64:
        raise OSError(errno.EINVAL, "signal")
    if which and thread is not process.threads.current and process.actions.get(which, (0,))[0] > 1:
        if which not in thread.pending:
            thread.pending.append(which)
    else:
        os.kill(os.getpid(), which)
    return 0


def _sigaction(process: Process, number: int, new: int, old: int, size: int, *_: int) -> int:
    if size != 8 or not 1 <= number <= 64 or (new and number in (signal.SIGKILL, signal.SIGSTOP)):
        raise OSError(errno.EINVAL, "sigaction")
    before = process.actions.get(number, (0, 0, 0, 0))
    if new:
        process.set_action(number, struct.unpack("<4Q", process.space.read(new, 32)))
    if old:
        process.space.write(old, struct.pack("<4Q", *before))
    return 0


def _sigprocmask(process: Process, how: int, new: int, old: int, *_: int) -> int:
    before = process.mask
    if new:
        (value,) = struct.unpack("<Q", process.space.read(new, 8))
        value &= ~(1 << 8 | 1 << 18)  # SIGKILL, SIGSTOP
        process.mask = {0: before | value, 1: before & ~value, 2: value}.get(number_of(how), before)
        process.block_signals()
    if old:
        process.space.write(old, struct.pack("<Q", before))
    return 0


def _sigreturn(process: Process, *_: int) -> None:
    process.todo = process.signal_return


def _sigsuspend(process: Process, mask: int, *_: int) -> int:
    (wanted,) = struct.unpack("<Q", process.space.read(mask, 8))
    process.threads.current.suspended, process.mask = process.mask, wanted  # the handler's frame keeps the old one
    process.block_signals()
    _wait_for_signal(process)
    return -errno.EINTR


def _wait_for_signal(process: Process) -> None:
    if process.threads.several and not process.interrupted():
        raise Blocked()
    while not process.interrupted():
        process.check_deadline()
        select.select([], [], [], 0.02)


def _pause(process: Process, *_: int) -> int:
    _wait_for_signal(process)
    return -errno.EINTR


def _nanosleep(process: Process, request: int, *_: int) -> int:
    seconds, nanoseconds = struct.unpack("<qq", process.space.read(request, 16))
    if seconds < 0 or not 0 <= nanoseconds < 10**9:
        raise OSError(errno.EINVAL, "nanosleep")
    _sleep(process, seconds + nanoseconds / 1e9)
    return 0


def _sleep(process: Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    if process.threads.several:
        raise Blocked(deadline=end, late=lambda: 0)
    while (left := end - time.monotonic()) > 0:
        if process.interrupted():
            raise OSError(errno.EINTR, "sleep")
        process.check_deadline()
        time.sleep(min(left, 0.02))


def _clock_nanosleep(process: Process, clock: int, flags: int, request: int, *_: int) -> int:
    if not flags & 1:
        return _nanosleep(process, request)
    seconds, nanoseconds = struct.unpack("<qq", process.space.read(request, 16))
    _sleep(process, max(seconds + nanoseconds / 1e9 - time.clock_gettime(number_of(clock)), 0.0))
    return 0


def _clock_gettime(process: Process, clock: int, address: int, *_: int) -> int:
    process.space.write(address, struct.pack("<qq", *divmod(time.clock_gettime_ns(number_of(clock)), 10**9)))
    return 0


def _clock_getres(process: Process, _clock: int, address: int, *_: int) -> int:
    if address:
        process.space.write(address, struct.pack("<qq", 0, 1))
    return 0


def _gettimeofday(process: Process, address: int, *_: int) -> int:
    if address:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        process.space.write(address, struct.pack("<qq", seconds, nanoseconds // 1000))
    return 0


def _time(process: Process, address: int, *_: int) -> int:
    now = int(time.time())
    if address:
        process.space.write(address, struct.pack("<q", now))
    return now


def _times(process: Process, address: int, *_: int) -> int:
    if address:
        process.space.write(address, struct.pack("<4q", *(int(value * 100) for value in os.times()[:4])))
    return int(time.monotonic() * 100)


def _alarm(_process: Process, seconds: int, *_: int) -> int:
    return signal.alarm(seconds & 0x7FFFFFFF)


def _setitimer(process: Process, which: int, new: int, old: int, *_: int) -> int:
    before = signal.getitimer(number_of(which))
    if new:
        values = struct.unpack("<4q", process.space.read(new, 32))
        before = signal.setitimer(number_of(which), values[2] + values[3] / 1e6, values[0] + values[1] / 1e6)
    if old:
        words = []
        for value in (before[1], before[0]):
            words += [int(value), int(value % 1 * 1e6)]
        process.space.write(old, struct.pack("<4q", *words))
    return 0


def _getrandom(process: Process, address: int, length: int, *_: int) -> int:
    length = min(length, 1 << 16)
    process.space.write(address, os.urandom(length))
    return length


def _arch_prctl(process: Process, code: int, address: int, *_: int) -> int:
    registers = {0x1001: x86.UC_X86_REG_GS_BASE, 0x1002: x86.UC_X86_REG_FS_BASE}
    if code in registers:
        process.uc.reg_write(registers[code], address)
        return 0
    if code == 0x1003:
        process.space.write(address, struct.pack("<Q", process.uc.reg_read(x86.UC_X86_REG_FS_BASE)))
        return 0
    raise OSError(errno.EINVAL, "arch_prctl")


def _uname(process: Process, address: int, *_: int) -> int:
    found = os.uname()
    name = found.nodename if process.hostname is None else process.hostname
    fields = (found.sysname, name, found.release, found.version, "x86_64", "")
    process.space.write(address, b"".join(os.fsencode(field)[:64].ljust(65, b"\0") for field in fields))
    return 0


def _sysinfo(process: Process, address: int, *_: int) -> int:
    total = process.frames.count * 4096
    free = total - process.frames.used() * 4096
    process.space.write(address, struct.pack(
        "<q3Q6QHHIQQI4x", int(time.monotonic()), 0, 0, 0, total, free, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1))  # fmt: skip
    return 0


def _affinity(process: Process, _number: int, length: int, address: int, *_: int) -> int:
    if length < 8:
        raise OSError(errno.EINVAL, "affinity")
    process.space.write(address, struct.pack("<Q", 1))
    return 8


def _getpgid(_process: Process, number: int, *_: int) -> int:
    return os.getpgid(number_of(number))


def _setpgid(_process: Process, number: int, group: int, *_: int) -> int:
    os.setpgid(number_of(number), number_of(group))
    return 0


def _nothing(_process: Process, *_: int) -> int:
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    13: _sigaction, 14: _sigprocmask, 15: _sigreturn, 34: _pause, 35: _nanosleep, 37: _alarm, 38: _setitimer,
    39: lambda *_: os.getpid(), 56: _clone, 57: _fork, 58: _fork, 59: _execve, 61: _wait4, 62: _kill, 63: _uname,
    96: _gettimeofday, 98: _getrusage, 99: _sysinfo, 100: _times, 109: _setpgid,
    110: lambda *_: os.getppid(), 111: lambda *_: os.getpgrp(), 112: lambda *_: os.setsid(),
    121: _getpgid, 124: lambda _process, number, *_: os.getsid(number_of(number)), 130: _sigsuspend,
    157: _nothing, 158: _arch_prctl, 200: _tkill, 201: _time, 204: _affinity,
    228: _clock_gettime, 229: _clock_getres, 230: _clock_nanosleep, 231: _exit_group, 234: _tgkill,
    273: _nothing, 318: _getrandom,
}  # fmt: skip
