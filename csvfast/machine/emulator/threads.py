"""Threads of a guest process, on the one core that it has: they take turns, at calls that wait and every 10 ms.

Each thread that does not run is a saved context of Unicorn's. A call that would wait raises Blocked while there are other
threads; the call is done again when what it waits for is there. With one thread everything waits in the host's calls.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from unicorn import x86_const as x86

from csvfast.machine.emulator.syscalls_files import number_of, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS", "SLICE", "Blocked", "Thread", "Threads"]

SLICE: Final = 0.01  # seconds
_POLL: Final = 0.02  # seconds between looks at signals and the deadline while nothing runs
_FIRST: Final = 0x1000000  # numbers of threads: above every process's
_REALTIME: Final = 0x100


class Blocked(BaseException):
    """A call of the running thread waits.

    descriptors   the host's, with poll()'s events: one of them ready does the call `again`
    deadline      of time.monotonic(), then `late` is called for the result; None = none
    With neither it waits until somebody sets the thread's result (futex).
    """

    def __init__(
        self, descriptors: dict[int, int] | None = None, deadline: float | None = None,
        late: Callable[[], int] | None = None, again: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.descriptors, self.deadline, self.late, self.again = descriptors or {}, deadline, late, again


class Thread:
    """One thread: `context` while it does not run, `waiting` while a call of it waits, `result` of that call when it is there."""

    __slots__ = ("alternate", "clear", "context", "mask", "number", "pending", "result", "suspended", "waiting")

    def __init__(self, number: int) -> None:
        self.number = number
        self.context: Any = None
        self.mask = self.clear = 0
        self.pending: list[int] = []
        self.waiting: Blocked | None = None
        self.result: int | None = None
        self.suspended: int | None = None  # the mask that sigsuspend replaced
        self.alternate = (0, 2, 0)  # stack of signal handlers: address, flags (2 = none), bytes


class Threads:
    """All threads of a process and who runs. One thread of the host's."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._next = _FIRST
        self.turn_over = False
        self.alone()

    def alone(self, *, new: bool = False) -> None:
        """One thread, the one that runs: after a fork, and for a `new` program, which finds nothing but the mask."""
        kept = getattr(self, "current", None)
        self.current = Thread(os.getpid())
        if kept is not None:
            self.current.mask = kept.mask
            if not new:
                self.current.alternate, self.current.clear = kept.alternate, kept.clear
        self.all = [self.current]
        self.sleepers: list[tuple[int, int, Thread]] = []  # of futex: address, bits

    @property
    def several(self) -> bool:
        """True when other threads may run while one waits."""
        return len(self.all) > 1

    def find(self, number: int) -> Thread | None:
        """The thread of that number."""
        return next((thread for thread in self.all if thread.number == number), None)

    # ---- Beginning and end

    def begin(self, flags: int, stack: int, parent: int, child: int, tls: int) -> int:
        """clone: a new thread that goes on from here with 0. Out: its number."""
        process, uc = self._process, self._process.uc
        thread = Thread(self._next)
        self._next += 1
        if flags & 0x100000:  # CLONE_PARENT_SETTID
            process.space.write(parent, struct.pack("<i", thread.number))
        if flags & 0x1000000:  # CLONE_CHILD_SETTID
            process.space.write(child, struct.pack("<i", thread.number))
        if flags & 0x200000:  # CLONE_CHILD_CLEARTID
            thread.clear = child
        thread.mask = process.mask
        own = uc.context_save()
        for register, value in ((x86.UC_X86_REG_RSP, stack), (x86.UC_X86_REG_FS_BASE, tls if flags & 0x80000 else None)):
            if value is not None:
                uc.reg_write(register, value)
        thread.context, thread.result = uc.context_save(), 0
        uc.context_restore(own)
        self.all.append(thread)
        process.wake_watcher()
        return thread.number

    def end(self) -> None:
        """exit: the running thread is over, another goes on."""
        gone = self.current
        if gone.clear:
            with suppress(OSError):
                self._process.space.write(gone.clear, bytes(4))
            self.wake(gone.clear, 1)
        self.all.remove(gone)
        self._load(self._choose(self.all))

    # ---- Taking turns

    def schedule(self) -> None:
        """Lets the thread go on whose turn it is; waits when all of them wait."""
        if not self.several and self.current.waiting is None:
            self.turn_over = False
            return
        if self.current.waiting is None and self.current.result is None and not self.turn_over:
            return
        self.turn_over = False
        index = self.all.index(self.current)
        order = self.all[index + 1 :] + self.all[: index + 1]
        chosen = self._choose(order)
        if chosen is not self.current:
            self.current.context = self._process.uc.context_save()
            self.current.mask = self._process.mask
            self._load(chosen)
        elif chosen.result is not None:
            self._process.uc.reg_write(x86.UC_X86_REG_RAX, chosen.result)
            chosen.result = None

    def _load(self, thread: Thread) -> None:
        process = self._process
        self.current = thread
        process.uc.context_restore(thread.context)
        thread.context = None
        process.mask = thread.mask
        if thread.result is not None:
            process.uc.reg_write(x86.UC_X86_REG_RAX, thread.result)
            thread.result = None
        process.pending.extend(number for number in thread.pending if number not in process.pending)
        thread.pending.clear()

    def _choose(self, order: list[Thread]) -> Thread:
        process = self._process
        while True:
            self._look(0)
            for thread in order:
                if thread.waiting is None:
                    return thread
            process.check_deadline()
            for thread in order:
                waits = [*process.pending, *thread.pending]
                mask = process.mask if thread is self.current else thread.mask
                if any(not mask >> (number - 1) & 1 for number in waits):
                    self._forget(thread)
                    thread.result = -errno.EINTR
                    return thread
            self._look(_POLL)

    def _look(self, seconds: float) -> None:
        """Ends the waiting of threads whose descriptors or times have come; waits up to `seconds` for that."""
        poller = select.poll()
        now = time.monotonic()
        waiting = [thread for thread in self.all if thread.waiting is not None]
        wanted: dict[int, int] = {}
        for thread in waiting:
            assert thread.waiting is not None
            if thread.waiting.deadline is not None:
                seconds = min(seconds, max(thread.waiting.deadline - now, 0))
            for host, events in thread.waiting.descriptors.items():
                wanted[host] = wanted.get(host, 0) | events
        for host, events in wanted.items():
            poller.register(host, events)
        ready = dict(poller.poll(seconds * 1000)) if wanted or seconds else {}
        now = time.monotonic()
        for thread in waiting:
            blocked = thread.waiting
            if blocked is None:
                continue
            call = None
            if any(ready.get(host, 0) & (events | select.POLLERR | select.POLLHUP | select.POLLNVAL)
                   for host, events in blocked.descriptors.items()):  # fmt: skip
                call = blocked.again
            elif blocked.deadline is not None and now >= blocked.deadline:
                call = blocked.late
            if call is not None:
                self._forget(thread)
                self._do(thread, call)

    def _do(self, thread: Thread, call: Callable[[], int]) -> None:
        try:
            thread.result = call()
        except Blocked as again:
            again.again = again.again or call
            thread.waiting = again
        except OSError as problem:
            thread.result = -(problem.errno or 5)

    def _forget(self, thread: Thread) -> None:
        thread.waiting = None
        self.sleepers = [entry for entry in self.sleepers if entry[2] is not thread]

    # ---- Futexes

    def sleep(self, address: int, bits: int, deadline: float | None) -> None:
        """Raises Blocked: the running thread waits for wake()."""
        self.sleepers.append((address, bits, self.current))
        raise Blocked(deadline=deadline, late=lambda: -errno.ETIMEDOUT)

    def wake(self, address: int, count: int, bits: int = 0xFFFFFFFF) -> int:
        """Lets up to `count` threads go on. Out: how many."""
        woken = [thread for place, wanted, thread in self.sleepers if place == address and wanted & bits][:count]
        for thread in woken:
            self._forget(thread)
            thread.result = 0
        return len(woken)

    def move(self, address: int, other: int, count: int) -> int:
        """Lets up to `count` sleepers wait for another address. Out: how many."""
        moved = 0
        for index, (place, bits, thread) in enumerate(self.sleepers):
            if place == address and moved < count:
                self.sleepers[index] = (other, bits, thread)
                moved += 1
        return moved


# ---- Calls


def _futex(process: Process, address: int, operation: int, value: int, extra: int, other: int, last: int) -> int:
    threads = process.threads
    what, value = operation & 0x7F, value & 0xFFFFFFFF
    (found,) = struct.unpack("<I", process.space.read(address, 4))
    if what in (0, 9):  # WAIT, WAIT_BITSET
        if found != value:
            raise OSError(errno.EAGAIN, "futex")
        deadline = None
        if extra:
            seconds, nanoseconds = struct.unpack("<qq", process.space.read(extra, 16))
            deadline = seconds + nanoseconds / 1e9
            if what == 0:
                deadline += time.monotonic()
            elif operation & _REALTIME:
                deadline += time.monotonic() - time.time()
        if deadline is None and not threads.several:
            raise OSError(errno.EDEADLK, "nobody could wake it")
        threads.sleep(address, last & 0xFFFFFFFF if what == 9 else 0xFFFFFFFF, deadline)
    if what in (1, 10):  # WAKE, WAKE_BITSET
        return threads.wake(address, value, last & 0xFFFFFFFF if what == 10 else 0xFFFFFFFF)
    if what in (3, 4):  # REQUEUE, CMP_REQUEUE
        if what == 4 and found != last & 0xFFFFFFFF:
            raise OSError(errno.EAGAIN, "futex")
        woken = threads.wake(address, value)
        return woken + threads.move(address, other, number_of(extra))
    if what == 5:  # WAKE_OP
        return _wake_operation(process, address, value, number_of(extra), other, last)
    raise OSError(errno.ENOSYS, "futex")


def _wake_operation(process: Process, address: int, count: int, count2: int, other: int, code: int) -> int:
    operand, compare = signed(code >> 12 & 0xFFF, 12), signed(code & 0xFFF, 12)
    if code >> 28 & 8:
        operand = 1 << (operand & 31)
    (old,) = struct.unpack("<I", process.space.read(other, 4))
    new = (operand, old + operand, old | operand, old & ~operand, old ^ operand)[min(code >> 28 & 7, 4)]
    process.space.write(other, struct.pack("<I", new & 0xFFFFFFFF))
    value = signed(old, 32)
    test = code >> 24 & 0xF
    met = (value == compare, value != compare, value < compare, value <= compare, value > compare, value >= compare)[min(test, 5)]
    woken = process.threads.wake(address, count)
    return woken + (process.threads.wake(other, count2) if met else 0)


def _exit(process: Process, code: int, *_: int) -> int:
    from csvfast.machine.emulator.process import Ended

    if not process.threads.several:
        raise Ended(code & 0xFF)

    def end() -> None:
        process.threads.end()

    process.todo = end
    return 0


def _yield(process: Process, *_: int) -> int:
    if process.threads.several:
        process.threads.turn_over = True
        process.todo = lambda: 0
    return 0


def _set_tid_address(process: Process, address: int, *_: int) -> int:
    process.threads.current.clear = address
    return process.threads.current.number


def _sigaltstack(process: Process, new: int, old: int, *_: int) -> int:
    thread = process.threads.current
    before = thread.alternate
    if new:
        place, flags, size = struct.unpack("<QixxxxQ", process.space.read(new, 24))
        if flags & 2:
            thread.alternate = (0, 2, 0)
        elif size < 2048:
            raise OSError(errno.ENOMEM, "sigaltstack")
        else:
            thread.alternate = (place, 0, size)
    if old:
        stack = process.uc.reg_read(x86.UC_X86_REG_RSP)
        on_it = before[2] and before[0] < stack <= before[0] + before[2]
        process.space.write(old, struct.pack("<QixxxxQ", before[0], 1 if on_it else before[1], before[2]))
    return 0


CALLS: Final[dict[int, Callable[..., Any]]] = {
    24: _yield, 60: _exit, 131: _sigaltstack, 186: lambda process, *_: process.threads.current.number, 202: _futex,
    218: _set_tid_address,
}  # fmt: skip
