"""System calls for namespaces, mounts and privileges that Python does not have, straight to the C library.

Each raises OSError with the kernel's reason, naming what was asked for. Source: Linux man-pages section 2; torvalds/linux
include/uapi/linux/{sched,mount,prctl,capability}.h. Thread-safety: they act on the calling thread (namespaces) or process.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Final

__all__ = [
    "CLONE_NEWCGROUP", "CLONE_NEWIPC", "CLONE_NEWNET", "CLONE_NEWNS", "CLONE_NEWPID", "CLONE_NEWUTS", "MNT_DETACH", "MS_BIND",
    "MS_NODEV", "MS_NOEXEC", "MS_NOSUID", "MS_PRIVATE", "MS_RDONLY", "MS_REC", "MS_REMOUNT", "die_with_parent", "drop_bounding",
    "mount", "move_tree", "no_new_privileges", "not_dumpable", "open_tree",
    "pivot_root", "raise_ambient", "set_capabilities", "set_filter", "set_keep",
    "set_subreaper", "setns", "umount", "unshare",
]  # fmt: skip

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

# The numbers of x86-64 and arm64 are the same from 424 on; pivot_root and capset are older.
_SYS_PIVOT_ROOT, _SYS_CAPSET = (155, 126) if os.uname().machine == "x86_64" else (41, 91)
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
_AT_FDCWD: Final = -100
_PDEATHSIG, _KEEPCAPS, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 8, 24, 36, 38, 47

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    result = _libc.mount(_text(source), _text(target), _text(kind), ctypes.c_ulong(flags), _text(data))
    _check(result, f"mount {kind or source or ''} on {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(_text(target), flags), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _check(_libc.syscall(ctypes.c_long(_SYS_PIVOT_ROOT), _text(new), _text(old)), f"pivot_root to {new}")


def open_tree(path: str) -> int:
    """A detached copy of the mount at `path`, as a descriptor."""
    flags = ctypes.c_uint(1 | 0x80000 | 0x8000)  # OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_RECURSIVE
    return _check(_libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), _AT_FDCWD, _text(path), flags), f"open_tree {path}")


def move_tree(descriptor: int, target: str) -> None:
    """Mounts what open_tree() gave."""
    flags = ctypes.c_uint(4)  # MOVE_MOUNT_F_EMPTY_PATH
    number = ctypes.c_long(_SYS_MOVE_MOUNT)
    _check(_libc.syscall(number, descriptor, b"", _AT_FDCWD, _text(target), flags), f"mount on {target}")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(descriptor: int, flags: int) -> None:
    """setns(2), with a descriptor of a namespace or of a process."""
    _check(_libc.setns(descriptor, flags), f"setns {flags:#x}")


def _prctl(option: int, first: int = 0, second: int = 0, what: str = "prctl") -> None:
    arguments = [ctypes.c_ulong(value) for value in (first, second, 0, 0)]
    _check(_libc.prctl(option, *arguments), what)


def die_with_parent(signal: int) -> None:
    """This process gets the signal when the thread that made it ends. A change of user or group forgets it."""
    _prctl(_PDEATHSIG, signal, what="parent death signal")


def set_subreaper() -> None:
    """Orphans below this process become its children."""
    _prctl(_SUBREAPER, 1, what="child subreaper")


def no_new_privileges() -> None:
    """From here on no program gains privileges by being executed."""
    _prctl(_NO_NEW_PRIVS, 1, what="no_new_privs")


def not_dumpable() -> None:
    """Nobody without CAP_SYS_PTRACE looks into this process, until it executes a program."""
    _prctl(4, 0, what="dumpable")


def set_filter(address: int) -> None:
    """A filter of system calls. In: address   of a struct sock_fprog"""
    _prctl(22, 2, address, "seccomp filter")


def set_keep() -> None:
    """A change of user keeps the permitted capabilities."""
    _prctl(_KEEPCAPS, 1, what="keep capabilities")


def drop_bounding(number: int) -> None:
    """Nothing below this process will ever have this capability."""
    _prctl(_CAPBSET_DROP, number, what=f"drop capability {number}")


def raise_ambient(number: int) -> None:
    """Programs of other users than root keep it."""
    _prctl(_CAP_AMBIENT, 2, number, f"ambient capability {number}")


def set_capabilities(effective: Iterable[int], permitted: Iterable[int], inheritable: Iterable[int]) -> None:
    """capset(2). In: numbers"""
    masks = [sum(1 << number for number in set(numbers)) for numbers in (effective, permitted, inheritable)]
    words = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in masks]
    header = struct.pack("<Ii", 0x20080522, 0)
    _check(_libc.syscall(ctypes.c_long(_SYS_CAPSET), header, struct.pack("<6I", *words)), "set capabilities")
