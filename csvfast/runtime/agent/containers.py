"""What runs containers, whichever way: namespaces of the agent's own, runc, crun, bwrap, the emulator.

A runner gets a specification of the runtime-spec and descriptors for standard input, output and error; what it starts is waited
for and signalled in one way. Thread-safety: any thread; start() and execute() of one container follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from csvfast.errors import ContainerError

if TYPE_CHECKING:
    from csvfast.image.tree import ContentStore
    from csvfast.image.users import ReadFile

__all__ = ["Bundle", "Program", "Runner"]


class Program(Protocol):
    """A program that runs."""

    pid: int

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code, 128 + number for a signal; None: it still runs after `seconds`."""

    def signal(self, number: int) -> None:
        """ContainerError "state": it has ended."""

    def close(self) -> None:
        """Idempotent; what was held for it goes."""


@dataclass
class Bundle:
    """One container's files.

    identifier   plain letters, digits, "-", "_", "."
    directory    its own, private: config.json is written there by runners that need one
    rootfs       its tree
    spec         the specification
    volumes      (directory, path in the container)
    """

    identifier: str
    directory: Path
    rootfs: Path
    spec: dict[str, Any]
    volumes: Sequence[tuple[str, str]] = field(default_factory=tuple)


class Runner:
    """A way to run containers. In: network   whether containers may use this machine's network

    Attributes: name. options: of image.bundle.runtime_specification, for this runner.
    """

    name = ""
    options: Mapping[str, Any] = {}

    def open(self, hostname: str, *, network: bool) -> None:
        """Before the first container: what they share. ContainerError."""

    def content(self) -> ContentStore | None:
        """Keeps the contents of an image's files; None = as they are."""
        return None

    def read(self, rootfs: Path) -> ReadFile | None:
        """Reads files of a tree that content() filled; None = they are as they are."""
        del rootfs
        return None

    def prepare(self, bundle: Bundle) -> None:
        """A container that will be started. ContainerError: it cannot be."""

    def start(self, bundle: Bundle, standard: Sequence[int]) -> Program:
        """Its first program. In: standard   three descriptors, which stay the caller's. ContainerError."""
        raise NotImplementedError

    def execute(self, bundle: Bundle, program: Program, process: Mapping[str, Any], standard: Sequence[int]) -> Program:
        """One more program. In: program   the first one. process   as in the specification. ContainerError."""
        del program, process, standard
        raise ContainerError("executor", f"{bundle.identifier}: {self.name} runs one program for each container")

    def remove(self, bundle: Bundle) -> None:
        """What start() left behind. The first program has ended."""

    def statistics(self, bundle: Bundle) -> dict[str, Any]:
        """What is known of its use of the machine; nothing where nothing counts."""
        del bundle
        return {}

    def close(self) -> None:
        """Everything ends. Idempotent."""
