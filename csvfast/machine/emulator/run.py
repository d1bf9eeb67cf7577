"""One program on the emulated machine, from a file to its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from csvfast import errors
from csvfast.machine.emulator.files import Files
from csvfast.machine.emulator.frames import Frames
from csvfast.machine.emulator.identity import Identity
from csvfast.machine.emulator.process import Process
from csvfast.machine.emulator.tree import EncryptedTree
from csvfast.memory import EncryptedMemory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ASID", "RunResult", "run_program"]

ASID: Final = 1


@dataclass(frozen=True, slots=True)
class RunResult:
    """What the first process did; its children counted for themselves.

    exit_code   as a shell tells it: 128 + the signal's number after a signal
    decrypted, encrypted, fills, flushes   pages in, pages out, TLB fills and TLB flushes
    """

    exit_code: int
    calls: int
    fills: int
    decrypted: int
    encrypted: int
    flushes: int


def run_program(
    program: str,
    arguments: Sequence[str] = (),
    *,
    root: str | os.PathLike[str] | EncryptedTree = "/",
    environment: Mapping[str, str] | None = None,
    directory: str = "/",
    user: tuple[int, int] | None = None,
    groups: Sequence[int] = (),
    hostname: str | None = None,
    network: bool = False,
    memory: int = 256 << 20,
    window: int = 256 << 10,
    dram: str | os.PathLike[str] | EncryptedMemory | None = None,
    instructions: int | None = None,
    seconds: float | None = None,
) -> RunResult:
    """Runs a static x86-64 Linux program whose memory stands encrypted in the DRAM: under a random key nobody learns, or
    under the caller's where `dram` is memory of his.

    Standard input, output and error are this process's. The program can fork; forked processes are forks of this one.

    In: program    path below `root`
        arguments  without the program's name
        root       directory that the program sees as "/"; it reaches nothing outside, by no link. With an EncryptedTree
                   what it reads and writes below it is ciphertext on the host
        environment  None = PATH alone
        directory  working directory, below root
        user       user and group that the program sees; it changes no right, and files of the host's user show as user 0's;
                   None = the host's own
        groups     with `user`: its other groups
        hostname   None = the host's
        network    True = the program has Internet sockets, the host's own; without, Unix sockets below the root alone
        memory     bytes of DRAM for all processes together, a multiple of 4096
        window     bytes that one process has decrypted at once, a multiple of 4096, at least 65536
        dram       file that is the DRAM, made with `memory` bytes, kept afterwards; or memory of the caller's, `memory` bytes
                   with a key for ASID 1, which he closes; None = memory of its own
        instructions  limit of each program and each stretch between forks; slows the run; None = none
        seconds    limit of the wall clock; None = none

    Raises: ProgramError (not a static x86-64 ELF program), LimitError (instructions, seconds), AllocationError (the DRAM is
    full), UnsupportedCall (names the system call), ArgumentError, OSError. Main thread only: it sets signal handlers and
    puts them back.
    """
    with contextlib.ExitStack() as stack:
        if memory <= 0 or memory % 4096:
            raise errors.LengthError(f"memory is {memory}; expected a positive multiple of 4096")
        if isinstance(dram, EncryptedMemory):
            engine = dram
        else:
            if dram is None:
                descriptor = os.memfd_create("csvfast-dram", os.MFD_CLOEXEC)
                stack.callback(os.close, descriptor)
                os.ftruncate(descriptor, memory)
                path = Path(f"/proc/self/fd/{descriptor}")
            else:
                path = Path(dram)
            engine = stack.enter_context(EncryptedMemory(memory, path=path))
            engine.install(ASID)
        frames = Frames(memory // 4096)
        stack.callback(frames.close)
        files = Files(root if isinstance(root, EncryptedTree) else os.fspath(root))
        stack.callback(os.close, files.root)
        for number in (0, 1, 2):  # numbers of the guest's own: closing them closes nothing of the host's
            with contextlib.suppress(OSError):
                files.open_files[number] = os.dup(number)
        files.change(os.fsencode(directory))
        deadline = None if seconds is None else time.monotonic() + seconds
        before = {number: signal.getsignal(number) for number in range(1, 32) if number not in (9, 19)}
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = Process(
            engine, ASID, frames, window, files, instructions=instructions, deadline=deadline,
            identity=Identity(user, groups), hostname=hostname, network=network,
        )  # fmt: skip
        try:
            file = files.open(files.absolute(-100, os.fsencode(program)), os.O_RDONLY)
            try:
                settings = {"PATH": "/usr/bin:/bin:/sbin"} if environment is None else environment
                process.execute(
                    file, program, [os.fsencode(program), *map(os.fsencode, arguments)],
                    [os.fsencode(f"{name}={value}") for name, value in settings.items()],
                )  # fmt: skip
            finally:
                files.close_host(file)
            code = process.run()
        finally:
            if process.first:
                for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                    signal.setitimer(timer, 0)  # the program's
                process.close()
                for number, handler in before.items():
                    if handler is not None:
                        signal.signal(number, handler)
        space = process.space
        return RunResult(
            code if code < 256 else code - 128, process.calls, space.fills, space.decrypted, space.encrypted, space.flushes
        )
