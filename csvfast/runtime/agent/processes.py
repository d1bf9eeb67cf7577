"""Programs of containers and their standard streams: pipes here, frames on the wire.

Thread-safety: any thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from csvfast.errors import ContainerError
from csvfast.runtime.protocol import Connection, Frame, StreamReader, StreamWriter

if TYPE_CHECKING:
    from csvfast.runtime.agent.containers import Program

__all__ = ["Process"]

_CHUNK: Final = 64 << 10
_DRAIN_SECONDS: Final = 10.0  # for output when the program has ended: whoever else holds the pipe is not waited for


class Process:
    """A program, and its streams on the wire.

    Attributes: number: on the wire. container: whose it is. exit_code: None before the end. problem: why it was ended, if it was
        not by itself.
    """

    def __init__(self, connection: Connection, number: int, container: str, *, stdin: bool) -> None:
        self.number, self.container = number, container
        self.exit_code: int | None = None
        self.problem: str | None = None
        self._connection = connection
        self._stdin = stdin
        self._program: Program | None = None
        self._input: StreamReader | None = connection.reader(Frame.STDIN, number) if stdin else None
        self._ended = threading.Event()

    def start(self, begin: Callable[[Sequence[int]], Program], ended: Callable[[Process], None]) -> int:
        """Starts the program with pipes, by `begin`. Out: its process ID. Raises what `begin` raises."""
        if self._program is not None:
            raise ContainerError("state", f"process {self.number} was started already")
        ours: list[int] = []
        theirs: list[int] = []
        try:
            if self._stdin:
                theirs_in, input_ = os.pipe2(os.O_CLOEXEC)
                ours.append(input_)
            else:
                theirs_in = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            theirs.append(theirs_in)
            for _ in range(2):
                out, their = os.pipe2(os.O_CLOEXEC)
                ours.append(out)
                theirs.append(their)
            self._program = begin(theirs)
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        pumps = []
        for kind, descriptor in zip((Frame.STDOUT, Frame.STDERR), ours[-2:], strict=True):
            writer = self._connection.writer(kind, self.number)
            pumps.append(threading.Thread(target=_pump_out, args=(descriptor, writer), daemon=True))
        if self._input is not None:
            threading.Thread(target=_pump_in, args=(self._input, ours[0]), daemon=True).start()
        for pump in pumps:
            pump.start()
        threading.Thread(target=self._follow, args=(self._program, pumps, ended), daemon=True).start()
        return self._program.pid

    @property
    def program(self) -> Program | None:
        """What runs; None before start()."""
        return self._program

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code; None: it still runs after `seconds`. ContainerError: it was ended by something else than itself."""
        if not self._ended.wait(seconds):
            return None
        if self.problem is not None:
            raise ContainerError("executor", self.problem)
        return self.exit_code

    def signal(self, number: int) -> None:
        """ContainerError "state": it does not run."""
        if self._program is None or self._ended.is_set():
            raise ContainerError("state", f"process {self.number} does not run")
        self._program.signal(number)

    def close_stdin(self) -> None:
        """No more input."""
        if self._input is not None:
            self._input.close()

    def kill(self) -> None:
        """Kills it if it runs, and waits."""
        if self._program is not None:
            with suppress(ContainerError):
                self._program.signal(9)
            self._ended.wait(_DRAIN_SECONDS)
        self.forget()

    def forget(self) -> None:
        """What is held for it goes."""
        if self._input is not None:
            self._input.close()
        if self._program is not None:
            self._program.close()

    def _follow(self, program: Program, pumps: Sequence[threading.Thread], ended: Callable[[Process], None]) -> None:
        try:
            self.exit_code = program.wait()
        except ContainerError as problem:
            self.problem, self.exit_code = problem.problem, 255
        for pump in pumps:
            pump.join(_DRAIN_SECONDS)
        if self._input is not None:
            self._input.close()
        self._ended.set()
        ended(self)


def _pump_out(descriptor: int, writer: StreamWriter) -> None:
    try:
        while chunk := os.read(descriptor, _CHUNK):
            writer.write(chunk)
    except OSError:  # nobody listens: the program learns it by SIGPIPE
        pass
    finally:
        os.close(descriptor)
        writer.close()


def _pump_in(reader: StreamReader, descriptor: int) -> None:
    try:
        while chunk := reader.read(_CHUNK):
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]
    except OSError:  # the program reads no more
        reader.close()
    finally:
        os.close(descriptor)
