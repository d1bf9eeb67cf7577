"""Containers on the emulated processor: static programs, their memory and their files' contents ciphertext.

The tree's key is made here, at random, and goes to the emulators' processes alone. Each program, with those it forks, has a
machine of its own; they have the container's files in common, nothing else. Thread-safety: as Runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csvfast.errors import ContainerError, CsvfastError
from csvfast.runtime.agent.containers import Bundle, Program, Runner

if TYPE_CHECKING:
    from csvfast.image.tree import ContentStore
    from csvfast.image.users import ReadFile
    from csvfast.machine.emulator.child import EmulatedProcess
    from csvfast.machine.emulator.tree import EncryptedTree

__all__ = ["EmulatorRunner"]


class EmulatorRunner(Runner):
    """See the module.

    In: work    directory below which images are unpacked
        memory  bytes for each program
        window  bytes of plaintext
    """

    name = "emulator"
    options: Mapping[str, Any] = {"seccomp": False}

    def __init__(self, work: Path, memory: int = 256 << 20, window: int = 256 << 10) -> None:
        import secrets

        from csvfast.crypto import Secret
        from csvfast.machine.emulator.child import EmulatedProcess
        from csvfast.machine.emulator.tree import EncryptedTree

        self._new_process: Callable[[], EmulatedProcess] = EmulatedProcess
        self._spare: EmulatedProcess | None = EmulatedProcess()  # it takes a tenth of a second: early
        self._memory, self._window = memory, window
        self._hostname = ""
        key = bytearray(secrets.token_bytes(32))
        self._key = Secret(key)
        key[:] = bytes(32)
        self._store = EncryptedTree(work, key=self._key)
        self._trees: dict[Path, EncryptedTree] = {}

    def open(self, hostname: str, *, network: bool) -> None:
        """See Runner."""
        del network  # emulated programs have none
        self._hostname = hostname

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
                memory=min(limit, self._memory) >> 20 << 20,
                window=self._window,
            )
        except BaseException:
            child.close()
            raise
        return _Emulated(child)

    def close(self) -> None:
        """See Runner."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        for tree in (*self._trees.values(), self._store):
            tree.close()
        self._trees.clear()
        self._key.wipe()

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
    """One emulated program."""

    def __init__(self, process: EmulatedProcess) -> None:
        self.pid = process.pid
        self._process = process

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
