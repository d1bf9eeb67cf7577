"""EmulatedProcess: an emulated program as a child process, for callers that have threads and other work of their own.

The child is a new Python, so nothing of the caller's memory reaches it but what start() hands over: settings, the standard
streams, the root, and the keys of an encrypted tree and of a platform's memory, through a socket pair that only the two hold.
It ends when the caller does, however that ends.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from csvfast import errors
from csvfast.crypto import Secret
from csvfast.machine.emulator.tree import EncryptedTree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from csvfast.memory import EncryptedMemory

__all__ = ["EmulatedProcess", "SharedDram"]

_LENGTH: Final = struct.Struct("<I")
_MAX: Final = 4 << 20  # bytes of a message: arguments and environment
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from csvfast.machine.emulator.child import main; main(int(sys.argv[2]))"
)


@dataclass(frozen=True, slots=True)
class SharedDram:
    """A part of a platform's DRAM that is a guest's, for the memory of one program: as many bytes of it as the program gets.

    descriptor  of the DRAM's file
    address     of the part in the file, and its system physical address: a multiple of 4096
    key         the guest's, 32 bytes
    """

    descriptor: int
    address: int
    key: Secret = field(repr=False)


class EmulatedProcess:
    """One program of the emulated machine, and those it forks, in a process of its own.

        with EmulatedProcess() as process:                      # starts Python, which takes a tenth of a second: do it early
            process.start("/bin/sh", ["-c", "echo hello"], root=tree, stdin=r, stdout=w, stderr=e)
            ...
            process.signal(signal.SIGTERM)                      # to the first process of the program
            code = process.wait()                               # as a shell tells it: 128 + the signal's number
        # leaving the block kills whatever is left

    Thread-safety: wait(), signal() and kill() may be called by any thread at any time; start() once.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, cwd="/", env={"PATH": os.defpath},
            )  # fmt: skip
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._started = False
        self._code: int | None = None
        self._problem: BaseException | None = None

    @property
    def pid(self) -> int:
        """The host's number of the program's first process."""
        return self._child.pid

    def start(
        self,
        program: str,
        arguments: Sequence[str] = (),
        *,
        root: EncryptedTree | str | os.PathLike[str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        environment: Mapping[str, str] | None = None,
        directory: str = "/",
        user: tuple[int, int] | None = None,
        groups: Sequence[int] = (),
        hostname: str | None = None,
        network: bool = False,
        memory: int = 256 << 20,
        window: int = 256 << 10,
        dram: str | os.PathLike[str] | SharedDram | None = None,
        instructions: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Starts the program; comes back before its first instruction ran.

        In: stdin, stdout, stderr   descriptors, which the caller keeps and may close; None = /dev/null
            user, groups   with root's rights the child becomes that user of the host's for good; without, the program only
                           sees that user (run_program)
            dram   a file, as run_program() takes it, or a part of a platform's DRAM; None = memory of its own
            others as run_program() takes them
        Raises: ContainerError (kind "executor") when the child has gone already, RuntimeError on a second call.
        """
        if self._started:
            raise RuntimeError("the process was started already")
        self._started = True
        settings = {
            "program": program, "arguments": list(arguments), "directory": directory, "memory": memory, "window": window,
            "environment": None if environment is None else dict(environment), "user": user, "groups": list(groups),
            "hostname": hostname, "network": network, "dram": _named(dram),
            "instructions": instructions, "seconds": seconds, "tree": isinstance(root, EncryptedTree),
        }  # fmt: skip
        text = json.dumps(settings).encode("utf-8", "surrogateescape")
        if len(text) > _MAX:
            raise errors.ArgumentError(f"arguments and environment have {len(text)} bytes; allowed are {_MAX}")
        opened = []
        try:
            descriptors = []
            for descriptor, flags in ((stdin, os.O_RDONLY), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY)):
                if descriptor is None:
                    descriptor = os.open(os.devnull, flags | os.O_CLOEXEC)
                    opened.append(descriptor)
                descriptors.append(descriptor)
            if isinstance(root, EncryptedTree):
                descriptors += [root.descriptor, root.lock_descriptor]
            else:
                opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                descriptors.append(opened[-1])
            if isinstance(dram, SharedDram):
                descriptors.append(dram.descriptor)
            socket.send_fds(self._control, [_LENGTH.pack(len(text))], descriptors)
            self._control.sendall(text)
            if isinstance(root, EncryptedTree):
                self._control.sendall(root.key)
            if isinstance(dram, SharedDram):
                self._control.sendall(dram.key)
        except (BrokenPipeError, ConnectionResetError):
            self.kill()
            self._problem = errors.ContainerError("executor", "the emulator's process ended before it was started")
            self._ended.set()
            raise self._problem from None
        finally:
            for descriptor in opened:
                os.close(descriptor)
        threading.Thread(target=self._follow, name="emulated-process", daemon=True).start()

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits until the program ends. Out: its exit code, 128 + number after a signal; None when `timeout` seconds are over.

        Raises what run_program() raises, by the same classes, when the machine ended the run: ProgramError, UnsupportedCall,
        LimitError, AllocationError ...; ContainerError (kind "executor") for anything else.
        """
        if not self._ended.wait(timeout):
            return None
        if self._problem is not None:
            raise self._problem
        return self._code

    def signal(self, number: int) -> bool:
        """Sends a signal to the first process of the program. Out: False when it has ended. SIGKILL ends all its processes."""
        if self._ended.is_set() or self._child.returncode is not None:
            return False
        self._child.send_signal(number)
        return True

    def kill(self) -> None:
        """Ends the program and whatever it forked, at once; does nothing after its end."""
        with suppress(ProcessLookupError):
            self._child.kill()

    def close(self) -> None:
        """Kills what is left, waits for it and frees the descriptors."""
        self.kill()
        self._child.wait()
        if self._started:
            self._ended.wait(10)
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _follow(self) -> None:
        answer = b""
        with suppress(OSError):
            while len(answer) <= _MAX and (part := self._control.recv(65536)):
                answer += part
        status = self._child.wait()
        try:
            found = json.loads(answer) if answer else {}
            if status < 0:
                self._code = 128 - status
            elif "exit_code" in found:
                self._code = int(found["exit_code"])
            else:
                self._problem = _problem_of(found)
        except (ValueError, TypeError):
            self._problem = errors.ContainerError("executor", "the emulator's answer cannot be read")
        self._ended.set()


def _problem_of(found: Mapping[str, Any]) -> BaseException:
    import csvfast.machine.emulator as package

    text = str(found.get("error", "the emulator's process ended without an answer"))
    kind = str(found.get("kind", ""))
    if kind in ("ProgramError", "UnsupportedCall"):
        return getattr(package, kind)(text)  # type: ignore[no-any-return]
    if kind in ("LimitError", "AllocationError", "ArgumentError", "LengthError"):
        return getattr(errors, kind)(text)  # type: ignore[no-any-return]
    return errors.ContainerError("executor", text)


# ---- The child's side


def main(descriptor: int) -> None:
    """What the child runs: takes one start() and becomes the program."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    from csvfast.machine.emulator import syscalls  # noqa: F401 - while the caller still prepares, and as its user
    from csvfast.machine.emulator.identity import become
    from csvfast.machine.emulator.run import run_program

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no plaintext and no key in a file
    settings, descriptors, key, dram_key = _receive(control)
    for number in (0, 1, 2):
        os.dup2(descriptors[number], number)
        os.close(descriptors[number])
    _end_with_the_caller(control)
    own = os.getpid()
    answer: dict[str, Any]
    root: Any = None
    try:
        if settings.pop("tree"):
            root = EncryptedTree(f"/proc/self/fd/{descriptors[3]}", key=key, _lock=descriptors[4])
        else:
            root = f"/proc/self/fd/{descriptors[3]}"
        if dram_key is not None:
            # As the caller's user: another one may not be allowed to open it.
            settings["dram"] = _shared(descriptors[-1], settings["dram"]["address"], settings["memory"], dram_key)
            dram_key.wipe()
        user = settings["user"] = None if settings["user"] is None else (int(settings["user"][0]), int(settings["user"][1]))
        if user is not None:
            if isinstance(settings["dram"], str) and os.geteuid() == 0:
                _own(settings["dram"], settings["memory"], user)
            if become(user, settings["groups"]):
                settings["user"] = None
        answer = {"exit_code": run_program(root=root, **settings).exit_code}
    except OSError as problem:
        answer = {"kind": "OSError", "error": f"{settings['program']}: {problem.strerror or problem}"}
    except Exception as problem:
        answer = {"kind": type(problem).__name__, "error": str(problem)}
    if os.getpid() != own:
        os._exit(3)
    with suppress(OSError):
        control.sendall(json.dumps(answer).encode())
    os._exit(0)


def _own(dram: str, memory: int, user: tuple[int, int]) -> None:
    descriptor = os.open(dram, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, memory)
        os.fchown(descriptor, *user)
    finally:
        os.close(descriptor)


def _named(dram: str | os.PathLike[str] | SharedDram | None) -> str | dict[str, int] | None:
    """As the child is told."""
    if isinstance(dram, SharedDram):
        return {"address": dram.address}
    return None if dram is None else os.fspath(os.path.abspath(dram))  # noqa: PTH100


def _shared(descriptor: int, address: int, memory: int, key: Secret) -> EncryptedMemory:
    """The part of the platform's DRAM, at its addresses there: tweaks are the platform's."""
    from csvfast.machine.emulator.run import ASID
    from csvfast.memory import EncryptedMemory

    engine = EncryptedMemory(memory, path=f"/proc/self/fd/{descriptor}", file_offset=address, base_address=address)
    engine.install(ASID, key)
    os.close(descriptor)
    return engine


def _receive(control: socket.socket) -> tuple[dict[str, Any], list[int], Secret | None, Secret | None]:
    head, descriptors, _, _ = socket.recv_fds(control, _LENGTH.size, 8)
    if len(head) < _LENGTH.size:
        os._exit(0)  # never started
    text = _exactly(control, _LENGTH.unpack(head)[0])
    settings = json.loads(text)
    key = _key(control) if settings["tree"] else None
    return settings, descriptors, key, _key(control) if isinstance(settings["dram"], dict) else None


def _key(control: socket.socket) -> Secret:
    held = _exactly(control, 32)
    key = Secret(held)
    held[:] = bytes(32)
    return key


def _exactly(control: socket.socket, length: int) -> bytearray:
    out = bytearray(length)
    view = memoryview(out)
    while len(view):
        done = control.recv_into(view)
        if not done:
            os._exit(0)
        view = view[done:]
    return out


def _end_with_the_caller(control: socket.socket) -> None:
    def follow() -> None:
        with suppress(OSError):
            control.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
