"""A process with one thread that forks the containers' programs for an agent, which has many threads and must not fork.

Agent and spawner talk over a Unix socket of whole messages:

    order    JSON {"token", "kind": "container" | "execute" | "hold" | "command", ...} in a memory file (descriptor 0), then
             standard input, output and error, and for "execute" a descriptor of the container's first process
    answer   {"token", "pid"} with a descriptor of the process, and of a pipe that ends when it has become its program; before
             that it says there why it could not
             {"token", "exit": 0..255} when it has ended; {"token", "error"} when there was no process

When the agent is gone, however that came, everything that was forked is killed, what was told by `clean` is unmounted and
removed, and the spawner ends.

Thread-safety: a Spawner may be used from any thread; fork() before the first thread is made.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from csvfast.errors import ContainerError
from csvfast.runtime.agent import namespaces
from csvfast.runtime.agent import syscalls as system

__all__ = ["MORE_AT", "SpawnedProcess", "Spawner"]

_MESSAGE_MAX: Final = 4096
_DESCRIPTORS_MAX: Final = 8
_START_SECONDS: Final = 60.0
MORE_AT: Final = 4  # where a command finds the descriptors behind its standard streams
_ERRORS_AT: Final = 3  # where a forked process has the pipe for its problems


class SpawnedProcess:
    """A process that was forked.

    Attributes: pid: here. pidfd: its descriptor, closed by close().
    """

    def __init__(self, token: int) -> None:
        self.token = token
        self.pid = 0
        self.pidfd = -1
        self._told = -1
        self._problem: str | None = None
        self._code: int | None = None
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code, 128 + number for a signal; None: it still runs after `seconds`."""
        return self._code if self._ended.wait(seconds) else None

    def signal(self, number: int) -> None:
        """Sends it a signal. ContainerError "state": it has ended."""
        with self._lock:
            if self.pidfd < 0 or self._ended.is_set():
                raise ContainerError("state", "the process has ended")
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                raise ContainerError("state", "the process has ended") from None

    def close(self) -> None:
        """Idempotent. The process goes on."""
        with self._lock:
            for name in ("pidfd", "_told"):
                if (descriptor := getattr(self, name)) >= 0:
                    setattr(self, name, -1)
                    os.close(descriptor)


class Spawner:
    """The agent's end. Made by fork(); ends with close()."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._lock = threading.Lock()
        self._token = 0
        self._processes: dict[int, SpawnedProcess] = {}
        self._reader: threading.Thread | None = None
        self.lost = threading.Event()  # the spawner is gone

    @classmethod
    def fork(cls, clean: Sequence[str] = (), remains: Callable[[], object] | None = None) -> Spawner:
        """Forks the spawner. OSError.

        In: clean     directories that are unmounted and removed when the agent is gone
            remains   called there before that: ends what is no child of the spawner's
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                ours.detach()
                # Of all that the agent has open nothing stays: the ends of its wires are to be seen.
                os.dup2(theirs.fileno(), _ERRORS_AT, inheritable=False)
                os.closerange(_ERRORS_AT + 1, 65536)
                with socket.socket(fileno=os.dup(_ERRORS_AT)) as connection:
                    os.close(_ERRORS_AT)
                    _serve(connection, clean, remains)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        return cls(ours, pid)

    def watch(self) -> None:
        """Begins to follow what happens in the spawner; the first order does so, too."""
        with self._lock:
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, name="csvfast-spawner", daemon=True)
                self._reader.start()

    def container(
        self, spec: Mapping[str, Any], rootfs: str, standard: Sequence[int], *, volumes: Sequence[tuple[str, str]] = (),
        cgroup: str | None = None,
    ) -> SpawnedProcess:  # fmt: skip
        """A container's first program; see csvfast.runtime.agent.namespaces. Raises ContainerError."""
        order = {"kind": "container", "spec": spec, "rootfs": rootfs, "volumes": list(volumes), "cgroup": cgroup}
        return self._order(order, standard)

    def execute(
        self, process: Mapping[str, Any], pidfd: int, standard: Sequence[int], *, cgroup: str | None = None
    ) -> SpawnedProcess:
        """One more program in a container. Raises ContainerError."""
        return self._order({"kind": "execute", "process": process, "cgroup": cgroup}, [*standard, pidfd])

    def hold(self, hostname: str, *, network: bool) -> SpawnedProcess:
        """A process that holds a sandbox's namespaces. Raises ContainerError."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            return self._order({"kind": "hold", "hostname": hostname, "network": network}, [null] * 3, expected=b"ready")
        finally:
            os.close(null)

    def command(self, arguments: Sequence[str], environment: Mapping[str, str], standard: Sequence[int]) -> SpawnedProcess:
        """A program of this system; it dies with the spawner. Raises ContainerError.

        In: arguments   the first is its path. standard: three descriptors, and further ones, which it finds from MORE_AT on
        """
        order = {"kind": "command", "args": list(arguments), "env": dict(environment)}
        return self._order(order, standard)

    def _order(self, order: dict[str, Any], descriptors: Sequence[int], expected: bytes = b"") -> SpawnedProcess:
        self.watch()
        with self._lock:
            self._token += 1
            process = self._processes[self._token] = SpawnedProcess(self._token)
        memory = os.memfd_create("csvfast-order", os.MFD_CLOEXEC)
        try:
            _write_all(memory, json.dumps(order | {"token": process.token}).encode())
            with self._lock:
                socket.send_fds(self._connection, [b"order"], [memory, *descriptors])
        except OSError as problem:
            raise ContainerError("state", f"the spawner is gone: {problem}") from None
        finally:
            os.close(memory)
        if not process._answered.wait(_START_SECONDS) or process._problem is not None:
            raise ContainerError("state", process._problem or "the spawner does not answer")
        told = b""
        while chunk := os.read(process._told, 65536):
            told += chunk
        if told != expected:
            process.wait(_START_SECONDS)
            process.close()
            raise ContainerError("state", told.decode(errors="replace")[:500] or "the process ended before its program began")
        return process

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self._connection, _MESSAGE_MAX, _DESCRIPTORS_MAX)
                if not data:
                    break
                answer = json.loads(data)
                process = self._processes[answer["token"]]
                if "pid" in answer:
                    process.pid = answer["pid"]
                    process.pidfd, process._told = descriptors
                elif "error" in answer:
                    process._problem = answer["error"]
                    process._code = 255
                else:
                    process._code = answer["exit"]
                process._answered.set()
                if process._code is not None:
                    process._ended.set()
                    del self._processes[process.token]
        for process in list(self._processes.values()):
            process._problem = "the spawner is gone"
            process._code = 255
            process._answered.set()
            process._ended.set()
        self.lost.set()

    def close(self) -> None:
        """Kills what was forked, and the spawner with it. Idempotent."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._reader is not None:
            self._reader.join(10)
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


# ---- In the spawner


def _serve(connection: socket.socket, clean: Sequence[str], remains: Callable[[], object] | None) -> None:
    system.set_subreaper()
    system.die_with_parent(signal.SIGTERM)
    wake_out, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    children: dict[int, int] = {}
    import select

    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(wake_out, select.POLLIN)
    while not ending:
        ready = dict(poll.poll())
        if wake_out in ready:
            with suppress(BlockingIOError):
                os.read(wake_out, 4096)
            _reap(connection, children)
        if connection.fileno() in ready:
            data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_MAX, _DESCRIPTORS_MAX)
            if not data:
                break
            try:
                _start(connection, own, descriptors, children)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
    _end(children, clean, remains)


def _start(connection: socket.socket, own: int, descriptors: Sequence[int], children: dict[int, int]) -> None:
    memory, *given = descriptors
    size = os.fstat(memory).st_size
    order = json.loads(os.pread(memory, size, 0))
    token = order["token"]
    problems_out, problems = os.pipe2(os.O_CLOEXEC)
    pidfd = -1
    try:
        if order["kind"] == "container":
            system.unshare(system.CLONE_NEWPID)
        elif order["kind"] == "execute":
            system.setns(given[3], system.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            _child(order, given, problems)
        children[pid] = token
        pidfd = os.pidfd_open(pid)
        # Sent before the child's end can be: that is told from the loop.
        socket.send_fds(connection, [json.dumps({"token": token, "pid": pid}).encode()], [pidfd, problems_out])
    except OSError as problem:
        connection.send(json.dumps({"token": token, "error": f"no process: {problem}"[:1000]}).encode())
    finally:
        if order["kind"] in ("container", "execute"):
            system.setns(own, system.CLONE_NEWPID)
        os.close(problems)
        os.close(problems_out)
        if pidfd >= 0:
            os.close(pidfd)


def _child(order: Mapping[str, Any], given: Sequence[int], problems: int) -> NoReturn:
    """Never returns to its caller."""
    code = 126
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        # Descriptors above all those that are given places first: none is overwritten before it is used.
        high = [_high(descriptor) for descriptor in (*given[:3], problems, *given[3:])]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place, inheritable=place < _ERRORS_AT or (place >= MORE_AT and order["kind"] == "command"))
        os.closerange(len(high), 65536)
        if cgroup := order.get("cgroup"):
            Path(cgroup, "cgroup.procs").write_text("0", encoding="ascii")
        kind = order["kind"]
        if kind == "container":
            namespaces.run(order["spec"], order["rootfs"], [tuple(pair) for pair in order["volumes"]])
        elif kind == "execute":
            namespaces.execute(order["process"], _ERRORS_AT + 1)
        elif kind == "hold":
            system.die_with_parent(signal.SIGKILL)
            namespaces.hold(order["hostname"], order["network"])
        else:
            system.die_with_parent(signal.SIGKILL)
            os.execve(order["args"][0], order["args"], order["env"])  # noqa: S606 no shell is wanted
    except BaseException as problem:
        code = 127 if isinstance(problem, FileNotFoundError) else 126
        with suppress(OSError):
            os.write(_ERRORS_AT, _words(problem).encode())
    finally:
        os._exit(code)


def _high(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)


def _words(problem: BaseException) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return f"{type(problem).__name__}: {problem}"


def _reap(connection: socket.socket, children: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            token = children.pop(pid, None)
            if token is not None:
                code = os.waitstatus_to_exitcode(status)
                answer = {"token": token, "exit": code if code >= 0 else 128 - code}
                with suppress(OSError):
                    connection.send(json.dumps(answer).encode())


def _end(children: Mapping[int, int], clean: Sequence[str], remains: Callable[[], object] | None) -> None:
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # What those had forked is ours by now (subreaper): a runtime that was killed leaves its container's program.
    with suppress(ChildProcessError):
        while True:
            for pid in _own_children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
    if remains is not None:
        remains()
    for folder in clean:
        unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _own_children() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.append(int(folder.name))
    return found


def unmount_below(folder: str) -> None:
    """Unmounts everything mounted at or below `folder`, the last first."""
    lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    places = [line.split(" ")[4].replace("\\040", " ") for line in lines]
    for place in reversed(places):
        if place == folder or place.startswith(f"{folder}/"):
            with suppress(OSError):
                system.umount(place, system.MNT_DETACH)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
