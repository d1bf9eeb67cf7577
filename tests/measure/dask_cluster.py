"""A real Dask cluster on this machine: a scheduler and workers, each a process of its own that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Cluster"]

ENVIRONMENT = os.environ | {
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "3",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "PYTHONWARNINGS": "ignore",
}


class Cluster:
    """A scheduler; workers with one thread each are started and killed by the tests. Nobody is asked to end: all are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[subprocess.Popen[bytes]] = []
        self.file = folder / "scheduler.json"
        port = ("--host", "127.0.0.1", "--port", "0")
        self.scheduler = self._start("scheduler", *port, "--no-dashboard", "--no-show", "--scheduler-file", str(self.file))
        deadline = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)
        time.sleep(0.05)  # it is not written by a rename
        self.address: str = json.loads(self.file.read_text())["address"]

    def add(self, count: int = 1) -> None:
        """Begins workers."""
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--memory-limit", "0")
        for _ in range(count):
            self.workers.append(self._start("worker", self.address, *options, "--local-directory", str(self.folder)))

    def kill(self, process: subprocess.Popen[bytes] | None = None) -> int:
        """Kills a worker, by default the oldest, as nothing warns of it; its process identifier."""
        process = process or self.workers[0]
        if process in self.workers:
            self.workers.remove(process)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        return process.pid

    def processor_seconds(self) -> float:
        """Of all workers, so far."""
        ticks = 0
        for worker in self.workers:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.workers, self.scheduler]:
            self.kill(process)

    def _start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=self.folder)
