"""Containers on the emulated processor: static programs, their memory and their files' contents ciphertext.

The tree's key is made here, at random, and goes to the emulators' processes alone. Each program, with those it forks, has a
machine of its own, in a part of the guest's RAM: half of the largest that is free. They have the container's files in common,
nothing else. Thread-safety: as Runner.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import ContainerError, CsvfastError
from csvfast.runtime.agent.containers import Bundle, Program, Runner

if TYPE_CHECKING:
    from csvfast.image.tree import ContentStore
    from csvfast.image.users import ReadFile
    from csvfast.machine.emulator.child import EmulatedProcess, SharedDram
    from csvfast.machine.emulator.tree import EncryptedTree

__all__ = ["EmulatorRunner", "GuestRam"]

_PART: Final = 1 << 20  # parts are whole MiB


class GuestRam:
    """The guest's RAM in the platform's DRAM, in parts for programs.

    In: descriptor   of the DRAM; taken over
        address      of the RAM in it, bytes; system physical
        size         bytes
        key          pipe from which the guest's key is read: 32 bytes; taken over
    Thread-safety: any thread.
    """

    def __init__(self, descriptor: int, address: int, size: int, key: int) -> None:
        from csvfast.crypto import Secret

        self._descriptor, self._address = descriptor, address
        self._free = [(0, size // _PART)]  # first part, number of parts
        self._lock = threading.Lock()
        with open(key, "rb", buffering=0) as pipe:
            held = bytearray(33)
            got = 0
            while count := pipe.readinto(memoryview(held)[got:]):
                got += count
        try:
            if got != 32:
                raise ContainerError("launch", f"the memory's key has {got} bytes; expected 32")
            self._key = Secret(memoryview(held)[:32])
        finally:
            held[:] = bytes(33)

    def take(self, most: int) -> tuple[SharedDram, int]:
        """A part for one program. In: most   bytes. Out: it, and its bytes. ContainerError ("limit"): there is none."""
        from csvfast.machine.emulator.child import SharedDram

        with self._lock:
            start, length = max(self._free, key=lambda one: one[1], default=(0, 0))
            wanted = min(max(length // 2, 1), most // _PART)
            if length == 0 or wanted == 0:
                raise ContainerError("limit", "the guest's RAM is full: no MiB of it is free for another program")
            self._free.remove((start, length))
            if length > wanted:
                self._free.append((start + wanted, length - wanted))
        return SharedDram(self._descriptor, self._address + start * _PART, self._key), wanted * _PART

    def give(self, part: SharedDram, size: int) -> None:
        """Takes a part back. Another program never reads what stands there: its frames begin as zeros."""
        with self._lock:
            self._free.append(((part.address - self._address) // _PART, size // _PART))
            self._free.sort()
            joined: list[tuple[int, int]] = []
            for start, length in self._free:
                if joined and sum(joined[-1]) == start:
                    joined[-1] = (joined[-1][0], joined[-1][1] + length)
                else:
                    joined.append((start, length))
            self._free = joined

    def close(self) -> None:
        """The key is wiped. Idempotent."""
        self._key.wipe()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class EmulatorRunner(Runner):
    """See the module.

    In: work    directory below which images are unpacked
        memory  bytes for each program
        window  bytes of plaintext
        ram     that programs' memory stands in; None = memory of their own, under keys of their own
    """

    name = "emulator"
    options: Mapping[str, Any] = {"seccomp": False}

    def __init__(
        self, work: Path, memory: int = 256 << 20, window: int = 256 << 10, ram: GuestRam | None = None
    ) -> None:
        import secrets

        from csvfast.crypto import Secret
        from csvfast.machine.emulator.child import EmulatedProcess
        from csvfast.machine.emulator.tree import EncryptedTree

        self._new_process: Callable[[], EmulatedProcess] = EmulatedProcess
        self._spare: EmulatedProcess | None = EmulatedProcess()  # it takes a tenth of a second: early
        self._memory, self._window, self._ram = memory, window, ram
        self._hostname, self._network = "", False
        key = bytearray(secrets.token_bytes(32))
        self._key = Secret(key)
        key[:] = bytes(32)
        self._store = EncryptedTree(work, key=self._key)
        self._trees: dict[Path, EncryptedTree] = {}

    def open(self, hostname: str, *, network: bool) -> None:
        """See Runner."""
        self._hostname, self._network = hostname, network

    def content(self) -> ContentStore | None:
        """See Runner."""
        return self._store

    def read(self, rootfs: Path) -> ReadFile | None:
        """See Runner."""
        tree: EncryptedTree = self._tree(rootfs)

        def read(path: str, limit: int) -> bytes | None:
            try:
                return tree.read_bytes(path, limit)
            except (FileNotFoundError, NotADirectoryError):
                return None

        return read

    def prepare(self, bundle: Bundle) -> None:
        """See Runner."""
        if bundle.volumes:
            raise ContainerError("executor", "the emulator has no shared volumes")
        resources = bundle.spec.get("linux", {}).get("resources", {})
        if "pids" in resources:
            raise ContainerError("limit", "the emulator does not count processes")

    def start(self, bundle: Bundle, standard: Sequence[int]) -> Program:
        """See Runner."""
        return self._start(bundle, bundle.spec["process"], standard)

    def execute(self, bundle: Bundle, program: Program, process: Mapping[str, Any], standard: Sequence[int]) -> Program:
        """See Runner. It sees the container's files, not its processes."""
        del program
        return self._start(bundle, process, standard)

    def _start(self, bundle: Bundle, process: Mapping[str, Any], standard: Sequence[int]) -> Program:
        user = process["user"]
        limit = bundle.spec.get("linux", {}).get("resources", {}).get("memory", {}).get("limit", self._memory)
        memory = min(limit, self._memory) >> 20 << 20
        part: SharedDram | None = None
        if self._ram is not None:
            part, memory = self._ram.take(memory)
        child, self._spare = self._spare or self._new_process(), None
        arguments = list(process["args"])
        environment = dict(setting.split("=", 1) for setting in process["env"])
        try:
            child.start(
                self._find(bundle.rootfs, arguments[0], environment.get("PATH", "")),
                arguments[1:],
                root=self._tree(bundle.rootfs),
                stdin=standard[0],
                stdout=standard[1],
                stderr=standard[2],
                environment=environment,
                directory=process["cwd"],
                user=(user["uid"], user["gid"]),
                groups=user.get("additionalGids", ()),
                hostname=self._hostname,
                network=self._network,
                memory=memory,
                window=min(self._window, memory),
                dram=part,
            )
        except BaseException:
            child.close()
            if self._ram is not None and part is not None:
                self._ram.give(part, memory)
            raise
        return _Emulated(child, self._ram, part, memory)

    def close(self) -> None:
        """See Runner."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        for tree in (*self._trees.values(), self._store):
            tree.close()
        self._trees.clear()
        self._key.wipe()
        if self._ram is not None:
            self._ram.close()

    def _tree(self, rootfs: Path) -> EncryptedTree:
        from csvfast.machine.emulator.tree import EncryptedTree

        if rootfs not in self._trees:
            self._trees[rootfs] = EncryptedTree(rootfs, key=self._key)
        return self._trees[rootfs]

    def _find(self, rootfs: Path, name: str, path: str) -> str:
        if "/" in name:
            return name
        from csvfast.image.tree import RootDirectory

        root = RootDirectory(rootfs)
        try:
            for folder in path.split(":"):
                place = f"{folder.rstrip('/')}/{name}"
                if root.read_file(place, 1 << 40) is not None:
                    return place
        except CsvfastError:
            pass
        finally:
            root.close()
        raise ContainerError("state", f"{name[:80]}: No such file or directory")


class _Emulated:
    """One emulated program, and its part of the RAM."""

    def __init__(self, process: EmulatedProcess, ram: GuestRam | None, part: SharedDram | None, size: int) -> None:
        self.pid = process.pid
        self._process = process
        self._ram, self._part, self._size = ram, part, size

    def wait(self, seconds: float | None = None) -> int | None:
        """See Program. ContainerError: the machine ended it."""
        try:
            return self._process.wait(seconds)
        except ContainerError:
            raise
        except CsvfastError as problem:
            raise ContainerError("executor", str(problem)) from None

    def signal(self, number: int) -> None:
        """See Program."""
        if not self._process.signal(number):
            raise ContainerError("state", "the process has ended")

    def close(self) -> None:
        """See Program."""
        self._process.close()
        part, self._part = self._part, None
        if self._ram is not None and part is not None:
            self._ram.give(part, self._size)
