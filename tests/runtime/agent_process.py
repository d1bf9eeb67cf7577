"""An agent as a child process on this machine, with the wire to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from csvfast.runtime.agent.configuration import AgentConfiguration
from csvfast.runtime.protocol import Connection, Frame


class AgentProcess:
    """Runs `python -m csvfast.runtime.agent`; its request() asks it."""

    def __init__(
        self,
        configuration: AgentConfiguration,
        work: Path,
        executor: str = "namespaces",
        *more: str,
        runtime: str | None = None,
        ordinary: bool = False,
    ) -> None:
        work.mkdir(exist_ok=True)
        (work / "agent.json").write_bytes(configuration.encode())
        ours, theirs = socket.socketpair()
        self.events: list[dict[str, Any]] = []
        self.work = work
        with theirs:
            # crun refuses version 1 and 2 of control groups side by side: its own mount namespace has one of them.
            alone = ["unshare", "-m", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh"]
            nobody = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]  # without a right, and with our files
            command = [
                *(nobody if ordinary else alone if runtime == "crun" else ()),
                sys.executable, "-m", "csvfast.runtime.agent", "--link", str(theirs.fileno()), "--configuration",
                str(work / "agent.json"), "--executor", executor, "--work", str(work), *more,
                *(("--runtime", runtime) if runtime else ()),
            ]  # fmt: skip
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, env=os.environ)
        self.connection = Connection(ours.detach(), on_event=self.events.append, name="test-host")

    def request(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        return self.connection.request(method, parameters, 60.0)

    def run(self, container: str, image: str, stdin: bytes | None = None, **parameters: Any) -> tuple[int, str, str]:
        """Create, start, wait. Out: exit code, standard output and error"""
        made = self.request("CreateContainer", container=container, image=image, stdin=stdin is not None, **parameters)
        self.request("StartContainer", container=container)
        return self.finish(made["process"], stdin)

    def finish(self, number: int, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            writer = self.connection.writer(Frame.STDIN, number)
            writer.write(stdin, 30)
            writer.close()
        streams = []
        for kind in (Frame.STDOUT, Frame.STDERR):
            reader, data = self.connection.reader(kind, number), b""
            while chunk := reader.read(timeout=60):
                data += chunk
            streams.append(data.decode())
        return self.request("WaitProcess", process=number)["exit_code"], streams[0], streams[1]

    def close(self) -> str:
        """Out: its standard error"""
        self.connection.close()
        try:
            return self.process.communicate(timeout=30)[1].decode()
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def leftovers(work: Path) -> list[str]:
    """What an agent that is gone has left: mounts, processes, files."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(work) in line]
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(work).encode() in place.read_bytes():
                found.append(place.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found + [str(path) for name in ("images", "containers") for path in (work / name).rglob("*")]


def busybox() -> Path | None:
    """A static busybox."""
    from csvfast.machine.initrd import boot_files

    for path in (boot_files() / "busybox", Path(shutil.which("busybox") or "/nowhere")):
        if path.is_file():
            return path
    return None
