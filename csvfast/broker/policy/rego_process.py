"""The worker process in which Rego is evaluated, seen from the broker: started when needed, ended when it misbehaves.

The interpreter is a large library in C++ that reads what administrators wrote; whatever goes wrong in it must not go wrong beside
the keys. The worker gets an empty environment (`opa.runtime()` would hand it to the policy), a deadline in real time, one in CPU
time and a ceiling of memory. RLIMIT_AS alone cannot be that ceiling, because the interpreter's allocator reserves 256 GiB of
address space whatever it needs, so the resident size is looked at while an answer is waited for.

Thread-safety: a worker answers one question at a time; callers wait for each other, no longer than their deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from csvfast._extras import need
from csvfast.broker.policy.rego_worker import MESSAGE_LIMIT
from csvfast.errors import CsvfastError

__all__ = ["MESSAGE_LIMIT", "RegoLimits", "RegoWorker", "WorkerError", "shared_worker"]

_PROGRAM: Final = Path(__file__).with_name("rego_worker.py")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LOOK_EVERY: Final = 0.01  # seconds between two looks at the worker's memory
_START_SECONDS: Final = 20.0  # for starting: Python, the library; a machine may be busy
_QUESTIONS: Final = 20_000  # of one process; then a new one, so that nothing it loses can add up


class WorkerError(CsvfastError):
    """No answer from the worker: why not. The policy's fault or not, nothing is allowed."""


class RegoLimits:
    """What one evaluation may take.

    seconds       of real time, waiting for the worker included
    cpu_seconds   of processor time
    memory        bytes beyond what an idle worker has
    """

    __slots__ = ("cpu_seconds", "memory", "seconds")

    def __init__(self, seconds: float = 2.0, cpu_seconds: float = 1.0, memory: int = 256 << 20) -> None:
        self.seconds: Final = seconds
        self.cpu_seconds: Final = cpu_seconds
        self.memory: Final = memory


_workers: Final[weakref.WeakSet[RegoWorker]] = weakref.WeakSet()


def _unlock() -> None:
    """In a process just forked off: whoever held a lock is not here. The process behind it is the parent's; see `_end`."""
    for worker in _workers:
        worker._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)


class RegoWorker:
    """One worker process. MissingExtraError when regopy is not installed."""

    def __init__(self, limits: RegoLimits | None = None) -> None:
        need("rego", "regopy")
        spec = find_spec("regopy")
        assert spec is not None
        assert spec.origin is not None
        self.limits: Final = limits or RegoLimits()
        self._folder: Final = str(Path(spec.origin).parents[1])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._idle = 0  # pages
        self._asked = 0
        _workers.add(self)

    @property
    def pid(self) -> int | None:
        """The process, when there is one."""
        process = self._process
        return None if process is None else process.pid

    def ask(self, module: str, helper: str | None, data: str, document: str, query: str) -> str:
        """Evaluates a query. In: module and helper in Rego, data and input as JSON. Out: the interpreter's output.

        WorkerError: an error in the policy, a limit that was reached, a worker that died. The next question gets a new worker.
        """
        request = {"module": module, "helper": helper, "data": data, "input": document, "query": query}
        message = json.dumps({**request, "cpu": self.limits.cpu_seconds}).encode()
        if len(message) > MESSAGE_LIMIT:
            raise WorkerError(f"policy, data and input together have {len(message)} bytes; at most {MESSAGE_LIMIT}")
        deadline = time.monotonic() + self.limits.seconds
        if not self._lock.acquire(timeout=self.limits.seconds):
            raise WorkerError(f"the worker was busy for {self.limits.seconds:g} seconds")
        try:
            if self._process is None or self._owner != os.getpid() or self._asked >= _QUESTIONS:
                self._end()
                self._start()
                deadline = time.monotonic() + self.limits.seconds
            self._asked += 1
            answer = self._exchange(message, deadline)
        finally:
            self._lock.release()
        if "error" in answer:
            raise WorkerError(str(answer["error"])[:500])
        return str(answer["output"])

    def close(self) -> None:
        """Ends the process. A later question starts another."""
        with self._lock:
            self._end()

    # ---- The process

    def _start(self) -> None:
        if not sys.executable:
            raise WorkerError("no Python interpreter to run the worker with: sys.executable is empty")
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), self._folder, str(self.limits.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"LANG": "C.UTF-8"},
            cwd="/",
            bufsize=0,
            start_new_session=True,  # a terminal's Ctrl-C is for the broker, which ends the worker itself
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process, self._owner, self._asked, self._idle = process, os.getpid(), 0, 0
        self._receive(process, time.monotonic() + _START_SECONDS)
        self._idle = self._pages(process)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        else:
            process.returncode = 0  # the parent's, before this process was forked off: not ours to wait for
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _exchange(self, message: bytes, deadline: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        self._send(process, len(message).to_bytes(4, "big") + message, deadline)
        return self._receive(process, deadline)

    def _send(self, process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
        assert process.stdin is not None
        descriptor, left = process.stdin.fileno(), memoryview(data)
        while left:
            self._wait(process, descriptor, select.POLLOUT, deadline)
            try:
                left = left[os.write(descriptor, left[:65536]) :]
            except BlockingIOError:
                continue
            except OSError:
                self._lost(process)

    def _receive(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(process, 4, deadline), "big")
        if size > MESSAGE_LIMIT:
            self._fail("the worker answered with too much")
        try:
            answer = json.loads(self._read(process, size, deadline))
        except ValueError:
            self._fail("the worker answered with something else than JSON")
        if not isinstance(answer, dict) or not answer.keys() & {"ready", "error", "output"}:
            self._fail("the worker answered with something else")
        return dict(answer)

    def _read(self, process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert process.stdout is not None
        descriptor, data = process.stdout.fileno(), bytearray()
        while len(data) < size:
            self._wait(process, descriptor, select.POLLIN, deadline)
            part = os.read(descriptor, size - len(data))
            if not part:
                self._lost(process)
            data += part
        return bytes(data)

    def _wait(self, process: subprocess.Popen[bytes], descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail("the evaluation took too long and was ended")
            if poll.poll(1000 * min(left, _LOOK_EVERY)):
                return
            if self._idle and (self._pages(process) - self._idle) * _PAGE > self.limits.memory:
                self._fail("the evaluation took too much memory and was ended")

    def _pages(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return int(Path(f"/proc/{process.pid}/statm").read_bytes().split()[1])
        except (OSError, IndexError):
            return 0  # it has ended: the pipe will say so

    def _lost(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()  # when it has only closed its end
        status = process.wait()
        reason = "it used up its processor time" if status == -24 else f"status {status}"  # SIGXCPU
        self._fail(f"the worker ended during the evaluation: {reason}")

    def _fail(self, reason: str) -> None:
        self._end()
        raise WorkerError(reason)


_shared: RegoWorker | None = None
_shared_lock: Final = threading.Lock()


def shared_worker() -> RegoWorker:
    """The worker of this process, made on first use and ended with it. MissingExtraError."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = RegoWorker()
            atexit.register(_shared.close)
        return _shared
