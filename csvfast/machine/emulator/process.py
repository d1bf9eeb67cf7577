"""A process of the emulated machine: registers in Unicorn, memory behind the window, system calls served here.

A fork is a fork of the host: parent and child run at once, pipes, waiting and signals are the host's. What they share is the
DRAM and the key; the child's pages move to frames of its own before the parent goes on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Final

from unicorn import Uc, UcError  # type: ignore[attr-defined]
from unicorn import unicorn_const as constants
from unicorn import x86_const as x86

from csvfast import errors
from csvfast.machine.emulator.loader import load
from csvfast.machine.emulator.stopping import Stopper
from csvfast.machine.emulator.window import AddressSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from csvfast.machine.emulator.files import Files
    from csvfast.machine.emulator.frames import Frames
    from csvfast.machine.emulator.identity import Identity
    from csvfast.memory import EncryptedMemory

__all__ = ["Ended", "Process", "UnsupportedCall"]

_ARGUMENTS: Final = (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX, x86.UC_X86_REG_R10,
                     x86.UC_X86_REG_R8, x86.UC_X86_REG_R9)  # fmt: skip
_CALL: Final = (x86.UC_X86_REG_RAX, *_ARGUMENTS)
_SAVED: Final = (
    *(getattr(x86, f"UC_X86_REG_R{number}") for number in range(8, 16)), x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI,
    x86.UC_X86_REG_RBP, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX,
    x86.UC_X86_REG_RSP, x86.UC_X86_REG_RIP, x86.UC_X86_REG_EFLAGS,
)  # fmt: skip
_FRAME_BYTES: Final = 8 + 304 + 128  # return address, ucontext (asm/ucontext.h), siginfo
_ON_STACK: Final = 0x08000000
_NODEFER: Final = 0x40000000
_RESET: Final = 0x80000000
_LIBRARY: Final = {32, 33}  # the C library's own
_IMMUTABLE: Final = {signal.SIGKILL, signal.SIGSTOP}


class Ended(BaseException):
    """The process is over."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class UnsupportedCall(errors.CsvfastError):
    """The program asked for a system call that the machine has not."""

    exit_code = 3


class Process:
    """One guest process and those it forks.

    In: instructions   limit of each stretch between two forks or programs; None = none
        deadline       of time.monotonic(); None = none
        identity       None = the host's user
        hostname       None = the host's
        network        Internet sockets of the host's
    """

    def __init__(
        self, memory: EncryptedMemory, asid: int, frames: Frames, window: int, files: Files, *,
        instructions: int | None = None, deadline: float | None = None, identity: Identity | None = None,
        hostname: str | None = None, network: bool = False,
    ) -> None:  # fmt: skip
        from csvfast.machine.emulator import kernel_files, syscalls
        from csvfast.machine.emulator.identity import Identity
        from csvfast.machine.emulator.threads import SLICE, Blocked, Threads

        self.space = AddressSpace(memory, asid, frames, window, files)
        self.frames, self.files = frames, files
        files.kernel = lambda path: kernel_files.opened(self, path)
        self.identity = Identity() if identity is None else identity
        self.hostname, self.network = hostname, network
        self.instructions, self.deadline = instructions, deadline
        self.actions: dict[int, tuple[int, int, int, int]] = {}
        self.mask = 0
        self.pending: list[int] = []
        self.uc: Any = None
        self._stopper: Stopper | None = None
        self.first = True
        self.name = ""
        self.arguments: list[bytes] = []
        self.environment: list[bytes] = []
        self.todo: Callable[[], int | None] | None = None
        self.calls = 0
        self._contexts: dict[int, Any] = {}
        self.threads = Threads(self)
        self.limits: dict[int, tuple[int, int]] = {}  # what the program set
        self._slice, self._blocked = SLICE, Blocked
        self._table = syscalls.TABLE
        self._failure: BaseException | None = None
        self._running = threading.Event()
        self._wake = (-1, -1)
        self._lifeline = os.pipe2(os.O_CLOEXEC)  # the first process alone holds its writing end

    # ---- Programs

    def execute(self, file: int, name: str, arguments: Sequence[bytes], environment: Sequence[bytes]) -> None:
        """Replaces the process's program. Raises ProgramError."""
        self.space.uc = None
        self.space.clear()
        entry, stack = load(self.space, file, name, arguments, environment, self.identity)
        self.name, self.arguments, self.environment = name, list(arguments), list(environment)
        uc: Any = Uc(constants.UC_ARCH_X86, constants.UC_MODE_64)  # type: ignore[no-untyped-call]
        self.uc = uc
        self.space.attach(uc)
        self._stopper = Stopper(uc)
        uc.hook_add(constants.UC_HOOK_INSN, self._syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        for register, value in (
            (x86.UC_X86_REG_RSP, stack), (x86.UC_X86_REG_RIP, entry), (x86.UC_X86_REG_FPCW, 0x37F),
            (x86.UC_X86_REG_MXCSR, 0x1F80),
        ):  # fmt: skip
            uc.reg_write(register, value)
        self._contexts.clear()
        self.threads.alone(new=True)
        for number, (handler, *_) in list(self.actions.items()):
            if handler > 1:
                del self.actions[number]
                signal.signal(number, signal.SIG_DFL)

    def run(self) -> int:
        """Runs until the process ends. Out: the exit code of the first process; forked ones end here."""
        self._watch()
        try:
            while True:
                self._step()
        except Ended as end:
            code = end.code
        except (errors.CsvfastError, MemoryError, OSError) as problem:
            if self.first:
                raise
            print(f"csvfast: error: {problem}", file=sys.stderr, flush=True)
            code = 3
        self.frames.release(os.getpid())
        if self.first:
            return code
        if code >= 256:
            self.die(code - 256)
        os._exit(code)

    def _step(self) -> None:
        self.threads.schedule()
        self._deliver()
        stopper = self._stopper
        assert stopper is not None
        if not stopper.exact and (self.threads.several or any(handler > 1 for handler, *_ in self.actions.values())):
            stopper.install()  # from now on a signal, or a thread's turn, may stop the program and let it go on
        start = self.uc.reg_read(x86.UC_X86_REG_RIP)
        stopped = False
        self.space.touched = -1
        self._running.set()
        try:
            self.uc.emu_start(start, 0, count=self.instructions or 0)
        except UcError as problem:
            stopped = True
            if self._failure is None and self.space.failure is None:
                self._fault(problem)
        finally:
            self._running.clear()
            asked = stopper.stopped()
        failure = self._failure or self.space.failure
        if failure is not None:
            self._failure = self.space.failure = None
            raise failure
        self.check_deadline()
        self.threads.turn_over |= asked
        todo, self.todo = self.todo, None
        if todo is not None:
            result = todo()
            if result is not None:
                self.uc.reg_write(x86.UC_X86_REG_RAX, result)
        elif self.instructions and not (stopped or self.pending or asked or self.threads.current.waiting):
            raise errors.LimitError(f"{self.name}: more than {self.instructions} instructions")

    def _fault(self, problem: UcError) -> None:
        refused = self.space.touched
        number = signal.SIGSEGV if refused >= 0 else signal.SIGILL
        action = self.actions.get(number)
        if action is not None and action[0] > 1:
            self.pending.append(number)
            return
        place = self.uc.reg_read(x86.UC_X86_REG_RIP)
        what = f"address {refused:#x}" if refused >= 0 else str(problem)
        print(f"csvfast: {self.name}: {signal.strsignal(number)} at {place:#x}, {what}", file=sys.stderr, flush=True)
        raise Ended(256 + number)

    # ---- Calls

    def _syscall(self, uc: Any, _data: Any) -> None:
        number, *arguments = uc.reg_read_batch(_CALL)
        self.calls += 1
        call = self._table.get(number)
        if call is None:
            self._failure = UnsupportedCall(f"{self.name}: system call {number} is not supported")
            uc.emu_stop()
            return
        try:
            result = call(self, *arguments)
        except OSError as problem:
            result = -(problem.errno or 5)
        except self._blocked as blocked:
            if blocked.again is None:
                blocked.again = lambda: call(self, *arguments) or 0
            self.threads.current.waiting = blocked
            uc.emu_stop()
            return
        except BaseException as problem:
            self._failure = problem
            uc.emu_stop()
            return
        if result is not None:
            uc.reg_write(x86.UC_X86_REG_RAX, result)
        if self.todo is not None or self.pending:
            uc.emu_stop()

    def fork(self, stack: int) -> int:
        """A child that goes on from here. Out: its number in the parent, 0 in the child."""
        ready, tell = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the watching thread holds no lock that the child needs
            child = os.fork()
        if child:
            os.close(tell)
            os.read(ready, 1)
            os.close(ready)
            return child
        os.close(ready)
        self._follow_the_first()
        self.pending = []
        self.threads.alone()
        self._watch()
        self.space.forked()
        os.close(tell)
        if stack:
            self.uc.reg_write(x86.UC_X86_REG_RSP, stack)
        return 0

    def _follow_the_first(self) -> None:
        """In a child: the machine ends with its first process, however that ends, and every process with the machine."""
        if self.first:
            os.close(self._lifeline[1])
        self.first = False
        lifeline = self._lifeline[0]

        def follow() -> None:
            os.read(lifeline, 1)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=follow, daemon=True).start()

    def die(self, number: int) -> None:
        """Ends the host's process by a signal, as the guest's would have."""
        if number not in _IMMUTABLE:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(128 + number)

    def close(self) -> None:
        """Closes the process's files and forgets its memory; ends the processes that it forked. The first process alone."""
        for descriptor in self._lifeline:
            os.close(descriptor)
        signal.set_wakeup_fd(-1)
        for number in list(self.files.open_files):
            self.files.close(number)
        self.space.uc = None
        self.space.clear()

    # ---- Signals

    def set_action(self, number: int, action: tuple[int, int, int, int]) -> None:
        """handler, flags, restorer, mask of a signal; handler 0 = default, 1 = ignore."""
        self.actions[number] = action
        if action[0] == 0:
            signal.signal(number, signal.SIG_DFL)
        elif action[0] == 1:
            signal.signal(number, signal.SIG_IGN)
        else:
            signal.signal(number, self._caught)
            if self._stopper is not None and not self._stopper.exact:
                self.todo = lambda: 0  # leaves the core, so that _step() makes stops exact
        if self.mask:
            self.block_signals()

    def _caught(self, number: int, _frame: Any) -> None:
        if number not in self.pending:
            self.pending.append(number)

    def interrupted(self) -> bool:
        """True when a signal waits that the mask lets through."""
        return any(not self.mask >> (number - 1) & 1 for number in self.pending)

    def waiting(self, call: Callable[..., int], *arguments: Any) -> int:
        """A call of the host's C library that may wait. Out: its result. Raises OSError, EINTR only for the guest's signals.

        Python's own calls go on after a signal; only the C library's tell of it and lose nothing.
        """
        while True:
            result = call(*arguments)
            if result >= 0:
                return result
            number = ctypes.get_errno()
            if number != errno.EINTR or self.interrupted():
                raise OSError(number, os.strerror(number))
            self.check_deadline()

    def ready(self, host: int, events: int) -> None:
        """Before a call that may wait for a descriptor: lets other threads run until it does not."""
        if not self.threads.several or fcntl.fcntl(host, fcntl.F_GETFL) & os.O_NONBLOCK:
            return
        poller = select.poll()
        poller.register(host, events)
        if not poller.poll(0):
            raise self._blocked({host: events})

    def wake_watcher(self) -> None:
        """The watching thread counts turns from now on."""
        os.write(self._wake[1], b"\0")

    def check_deadline(self) -> None:
        """Raises LimitError when the time is over."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise errors.LimitError(f"{self.name}: the time is over")

    def block_signals(self) -> None:
        """Hands the mask to the host, but for the signals with handlers: those come in and wait here."""
        signal.pthread_sigmask(signal.SIG_SETMASK, {
            number for number in range(1, 65)
            if self.mask >> (number - 1) & 1 and number not in _LIBRARY and self.actions.get(number, (0,))[0] <= 1
        })  # fmt: skip

    def _deliver(self) -> None:
        for number in list(self.pending):
            if self.mask >> (number - 1) & 1:
                continue
            self.pending.remove(number)
            handler, flags, restorer, blocked = self.actions.get(number, (0, 0, 0, 0))
            if handler <= 1:
                continue
            registers = self.uc.reg_read_batch(_SAVED)
            top, alternate = registers[15] - 128, self.threads.current.alternate
            if flags & _ON_STACK and alternate[2] and not alternate[0] < registers[15] <= alternate[0] + alternate[2]:
                top = alternate[0] + alternate[2]
            frame = ((top - _FRAME_BYTES) & -16) - 8
            context = struct.pack("<5Q", 0, 0, *alternate) + struct.pack("<18Q", *registers)
            thread = self.threads.current
            mask = self.mask if thread.suspended is None else thread.suspended
            context += struct.pack("<Q", 0x33) + bytes(4 * 8 + 72) + struct.pack("<Q", mask)
            thread.suspended = None
            self.space.write(frame, struct.pack("<Q", restorer) + context + struct.pack("<iii", number, 0, 0))
            self._contexts[frame] = self.uc.context_save()
            self.mask = mask
            if not flags & _NODEFER:
                self.mask |= 1 << (number - 1)
            self.mask |= blocked
            if flags & _RESET:
                self.set_action(number, (0, 0, 0, 0))
            for register, value in (
                (x86.UC_X86_REG_RSP, frame), (x86.UC_X86_REG_RIP, handler), (x86.UC_X86_REG_RDI, number),
                (x86.UC_X86_REG_RSI, frame + 312), (x86.UC_X86_REG_RDX, frame + 8), (x86.UC_X86_REG_RAX, 0),
            ):  # fmt: skip
                self.uc.reg_write(register, value)
        thread = self.threads.current
        if thread.suspended is not None:
            self.mask, thread.suspended = thread.suspended, None

    def signal_return(self) -> int | None:
        """rt_sigreturn: back to where the signal came."""
        frame = self.uc.reg_read(x86.UC_X86_REG_RSP) - 8
        registers = struct.unpack("<18Q", self.space.read(frame + 48, 144))
        (self.mask,) = struct.unpack("<Q", self.space.read(frame + 304, 8))
        context = self._contexts.pop(frame, None)
        if context is not None:  # vector and floating-point registers
            self.uc.context_restore(context)
        for register, value in zip(_SAVED, registers, strict=True):
            self.uc.reg_write(register, value)
        return None

    def _watch(self) -> None:
        """A thread that stops the emulation when a signal or the deadline is there: Python sees neither inside of it."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for old in self._wake:
            if old >= 0:
                os.close(old)
        self._wake = (read, write)
        threading.Thread(target=self._watching, args=(read,), daemon=True).start()

    def _watching(self, read: int) -> None:
        while True:
            left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0.02)
            several = self.threads.several
            if several:
                left = self._slice
            try:
                ready = select.select([read], [], [], left)[0]
                if ready:
                    os.read(read, 64)
                if (ready or several) and self._stopper is not None:
                    self._stopper.stop()
            except (OSError, ValueError):
                return
            while self.deadline is not None and time.monotonic() >= self.deadline and self._stopper is not None:
                if self._running.is_set():  # a stop that comes before the start is lost
                    self._stopper.stop_for_good()
                time.sleep(0.005)
