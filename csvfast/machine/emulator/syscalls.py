"""The system calls of x86-64 Linux that the machine has (numbers: arch/x86/entry/syscalls/syscall_64.tbl)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.machine.emulator import (
    events,
    identity,
    sockets,
    syscalls_files,
    syscalls_memory,
    syscalls_names,
    syscalls_other,
    syscalls_process,
    threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TABLE"]

TABLE: Final[dict[int, Callable[..., int | None]]] = {
    **syscalls_files.CALLS,
    **syscalls_names.CALLS,
    **syscalls_memory.CALLS,
    **syscalls_process.CALLS,
    **identity.CALLS,
    **threads.CALLS,
    **events.CALLS,
    **sockets.CALLS,
    **syscalls_other.CALLS,
}
