"""Executors whose agent is a process of this machine, with a small guest of the simulated processor that speaks for it.

The guest's firmware is a launch blob: canonical JSON of what the agent is, and its configuration. Its digest is in every report
that the agent gets, so that a broker knows which code and configuration ask. What a report of this kind proves ends there: the
processor measured the blob, and the monitor, a program of the host's, started the agent that it describes.

The agent never outlives the monitor: the kernel kills it with the thread that started it (PR_SET_PDEATHSIG), whatever ends that
one, and the end of its wire tells it, too.

Thread-safety: executors have no state; a ProcessGuest may be used from any thread.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from csvfast.crypto import sm3, sm3_many
from csvfast.errors import VerificationError
from csvfast.measure.launch import launch_digest
from csvfast.processor.vmm import GuestPlan, Host
from csvfast.runtime.executor import Executor, Guest, Launch, LaunchPlan

if TYPE_CHECKING:
    from csvfast.measure.launch import LaunchDigest
    from csvfast.runtime.host import HostMachine

__all__ = ["AgentProcess", "ProcessExecutor", "ProcessGuest", "code_digest", "launch_blob"]

PAGE: Final = 4096
GUEST_BYTES: Final = 1 << 20  # RAM of a guest that only holds the page of its requests
ERRORS_BYTES: Final = 64 << 10
_BLOB: Final = "launch-blob"

# Arguments: our process ID, JSON of sys.path, the agent's own. The agent is imported by this very process: nothing is executed
# between the death signal's setting and the agent.
_LAUNCHER: Final = """
import ctypes, json, os, runpy, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGKILL, 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("csvfast: the monitor is gone")
libc.prctl(15, b"csvfast-agent", 0, 0, 0)
sys.path[:] = json.loads(sys.argv[2])
sys.argv[:] = ["csvfast-agent", *sys.argv[3:]]
runpy.run_module("csvfast.runtime.agent", run_name="__main__", alter_sys=True)
"""


@functools.cache
def code_digest() -> bytes:
    """SM3 over csvfast's own code: of each file of the package its path, NUL, and its SM3, in the order of the paths."""
    package = Path(__file__).resolve().parent.parent
    files = sorted(
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", ".so") and "__pycache__" not in path.parts
    )
    digests = sm3_many([(package / name).read_bytes() for name in files])
    whole = sm3()
    for name, digest in zip(files, digests, strict=True):
        whole.update(name.encode() + b"\0" + digest)
    return whole.digest()


def launch_blob(executor: str, configuration: bytes) -> bytes:
    """What the processor measures: JSON without needless spaces, members in order, filled up with line feeds to whole pages."""
    blob = json.dumps(
        {
            "format": "csvfast-sandbox-1",
            "executor": executor,
            "python": ".".join(map(str, sys.version_info[:3])),
            "code_sm3": code_digest().hex(),
            "configuration": configuration.decode(),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    return blob + b"\n" * (-len(blob) % PAGE)


class AgentProcess:
    """The agent as a process of ours.

    In: arguments    the agent's own. descriptors: it inherits these. environment: all of it
        ended        called once it is gone, by the thread that waited
    Raises: OSError.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        descriptors: Sequence[int],
        environment: Mapping[str, str],
        ended: Callable[[], object] | None = None,
    ) -> None:
        self._errors = bytearray()
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: BaseException | None = None
        self._started, self._gone = threading.Event(), threading.Event()
        command = [sys.executable, "-I", "-c", _LAUNCHER, str(os.getpid()), json.dumps(_paths()), *arguments]
        # The kernel looks at the thread that forked, not at the process: it must live as long as the agent does.
        threading.Thread(
            target=self._run, args=(command, list(descriptors), dict(environment), ended), name="csvfast-agent", daemon=True
        ).start()
        self._started.wait()
        if self._problem is not None:
            raise self._problem

    def _run(
        self, command: list[str], descriptors: list[int], environment: dict[str, str], ended: Callable[[], object] | None
    ) -> None:
        try:
            process = self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
        except BaseException as problem:
            self._problem = problem
            self._started.set()
            return
        self._started.set()
        reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        reader.start()
        process.wait()
        reader.join(1)  # a child of its may have the other end still
        try:
            if ended is not None:
                ended()
        finally:
            self._gone.set()

    def _read(self, stream: IO[bytes] | None) -> None:
        if stream is None:
            return
        with stream:
            while chunk := os.read(stream.fileno(), 65536):
                with self._guard:
                    self._errors += chunk
                    del self._errors[:-ERRORS_BYTES]

    @property
    def pid(self) -> int:
        """Process ID."""
        return 0 if self._process is None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """False once it is gone and what was around it is put away."""
        return not self._gone.is_set()

    def errors(self) -> str:
        """The last of what it wrote to standard error."""
        with self._guard:
            return self._errors.decode(errors="replace")

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is gone. False: it still runs."""
        return self._gone.wait(seconds)

    def signal(self, number: int) -> None:
        """Sends a signal; nothing happens when it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, seconds: float) -> None:
        """Ends it, by force after `seconds`. Idempotent."""
        self.signal(signal.SIGTERM)
        if not self.wait(seconds):
            self.signal(signal.SIGKILL)
            self.wait(30)


class ProcessGuest(Guest):
    """An agent's process and the guest that speaks for it."""

    def __init__(self, host: HostMachine, launch: Launch, processor: Host, stack: ExitStack) -> None:
        self.launch = launch
        self.descriptor = -1
        self.process: AgentProcess | None = None
        self._host, self._processor, self._stack = host, processor, stack
        self._guard = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the agent."""
        return 0 if self.process is None else self.process.pid

    @property
    def running(self) -> bool:
        """Whether the agent runs."""
        return self.process is not None and self.process.running

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is gone."""
        return self.process is None or self.process.wait(seconds)

    def reason(self) -> str:
        """Its last line on standard error, or how it ended."""
        if self.process is None:
            return "the agent was not started"
        lines = [line.strip() for line in self.process.errors().splitlines() if line.strip()]
        code = self.process.exit_code
        if code is not None and code < 0:
            return f"the agent was killed by signal {-code}"
        if lines:
            return lines[-1][:500]
        return "the agent runs" if code is None else f"the agent ended with {code}"

    def stop(self, seconds: float = 5.0) -> None:
        """Ends it; the guest is decommissioned."""
        if self.process is not None:
            self.process.stop(seconds)
        self.close()

    def close(self) -> None:
        """What stands around the agent goes: sockets, the guest, its key. Idempotent."""
        with self._guard:
            self._stack.close()

    def details(self) -> Mapping[str, Any]:
        """Its process."""
        return {"agent": self.pid}


class ProcessExecutor(Executor):
    """What `emulator` and `native` have in common."""

    def guest_bytes(self, plan: LaunchPlan) -> int:
        """RAM of the guest."""
        raise NotImplementedError

    def room(self, plan: LaunchPlan) -> int:
        """See Executor."""
        return self.guest_bytes(plan) + len(launch_blob(self.name, plan.configuration))

    def predict(self, plan: LaunchPlan) -> LaunchDigest:
        """See Executor."""
        path = plan.work / _BLOB
        path.write_bytes(launch_blob(self.name, plan.configuration))
        return launch_digest(path)

    def start(self, host: HostMachine, plan: LaunchPlan) -> Guest:
        """See Executor."""
        predicted = self.predict(plan)
        if plan.expected is not None and predicted.digest != plan.expected:
            raise VerificationError(
                "launch digest", f"this sandbox has {predicted.hexdigest}; expected {plan.expected.hex()}"
            )
        with ExitStack() as failed:
            stack = failed.enter_context(ExitStack())
            processor = stack.enter_context(Host(host.machine))
            processor.initialise(es=True)
            launched = processor.launch(
                GuestPlan(firmware=plan.work / _BLOB, policy=plan.policy, memory_size=self.guest_bytes(plan))
            )
            stack.callback(processor.abandon, launched.handle)
            measured = host.processor.guest(launched.handle).measure
            if measured != predicted.digest or launched.predicted.digest != predicted.digest:
                raise VerificationError(
                    "launch digest", f"the firmware measured {(measured or b'').hex()}; expected {predicted.hexdigest}"
                )
            processor.finish(launched.handle)
            guest = ProcessGuest(host, Launch.of(self.name, predicted, launched.handle), processor, stack)
            self._start_agent(host, plan, guest, stack)
            failed.pop_all()
        return guest

    def _start_agent(self, host: HostMachine, plan: LaunchPlan, guest: ProcessGuest, stack: ExitStack) -> None:
        folder = os.open(plan.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        stack.callback(self.remove_remains, plan.work)
        report, vcpu = self._serve_reports(host, folder, stack)
        configuration = _sealed(plan.configuration)
        ours, theirs = socket.socketpair()
        inherited = [folder, configuration, theirs.fileno()]
        ours_alone: list[int] = []
        try:
            arguments = [
                "--link", str(theirs.fileno()), "--configuration", str(configuration), "--executor", self.name,
                "--work", str(plan.work), "--report-socket", report, "--vcpu-socket", vcpu,
                "--guest", str(guest.launch.handle),
            ]  # fmt: skip
            arguments += self.more_arguments(host, plan, guest.launch.handle, ours_alone)
            inherited += ours_alone
            guest.process = AgentProcess(
                arguments, descriptors=inherited, environment=_environment(plan.work), ended=guest.close
            )
            guest.descriptor = ours.detach()
        finally:
            ours.close()
            theirs.close()
            os.close(configuration)
            for descriptor in ours_alone:
                os.close(descriptor)

    def remove_remains(self, _work: Path) -> None:
        """Ends what an agent that is gone has left, if anything can be."""

    def more_arguments(self, _host: HostMachine, _plan: LaunchPlan, _handle: int, _descriptors: list[int]) -> list[str]:
        """More arguments of the agent. Descriptors that it is to inherit go into the list, and are closed here afterwards."""
        return []

    def _serve_reports(self, host: HostMachine, folder: int, stack: ExitStack) -> tuple[str, str]:
        """The processor's sockets, by paths that hold in both processes: the agent inherits the directory."""
        from csvfast.processor.server import ProcessorServer

        report, vcpu = (f"/proc/self/fd/{folder}/{name}.sock" for name in ("report", "vcpu"))
        server = stack.enter_context(ProcessorServer(host.machine, host.descriptor, report, vcpu_path=vcpu))
        threading.Thread(target=server.serve, name="csvfast-processor", daemon=True).start()
        return report, vcpu


def _sealed(data: bytes) -> int:
    """A memory file that nobody can change any more: what was measured is what the agent reads."""
    import fcntl

    descriptor = os.memfd_create("csvfast-configuration", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, data)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _paths() -> list[str]:
    """Where the agent finds the modules that we found; nothing relative, which would be another place for it."""
    package = str(Path(__file__).resolve().parent.parent.parent)
    found = [*(path for path in sys.path if path.startswith("/")), package]
    return list(dict.fromkeys(found))


def _environment(work: Path) -> dict[str, str]:
    kept = ("PATH", "CSVFAST_KERNEL", "CSVFAST_DISABLE", "XDG_RUNTIME_DIR")
    settings = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "TMPDIR": str(work)}
    return settings | {name: os.environ[name] for name in kept if name in os.environ}
