"""System calls that programs in a container have no use for: what changes namespaces, mounts, modules, keys, or the machine, and
what has a long history of holes. They fail as if not permitted; everything else is the kernel's to decide.

A list of what is forbidden is weaker than one of what is allowed (runc's, from csvfast.image.seccomp), and needs no table of all
calls of all machines. Filters are made for x86-64; elsewhere there is none.

Sources: torvalds/linux arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/linux/{filter,seccomp,audit}.h; moby's
default profile.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from csvfast.runtime.agent import syscalls as system

__all__ = ["FORBIDDEN", "filter_program", "install"]

FORBIDDEN: Final = {
    "uselib": 134, "sysfs": 139, "vhangup": 153, "pivot_root": 155, "_sysctl": 156, "acct": 163, "settimeofday": 164,
    "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171,
    "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212,
    "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256,
    "unshare": 272, "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438,
    "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip
"""By name; numbers of x86-64."""

_CLONE, _CLONE3 = 56, 435
_NEW_NAMESPACES: Final = 0x7E020000
_X86_64: Final = 0xC000003E
_X32: Final = 0x40000000
_LOAD, _EQUAL, _GREATER, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38


def filter_program() -> bytes:
    """The filter: instructions of classic BPF, 8 bytes each."""

    def one(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    parts = [
        one(_LOAD, _ARCHITECTURE_AT), one(_EQUAL, _X86_64, 1, 0), one(_RETURN, _KILL),
        one(_LOAD, _NUMBER_AT), one(_GREATER, _X32, 0, 1), one(_RETURN, _ERROR | _ENOSYS),
        # The C library falls back to clone, whose flags can be seen.
        one(_EQUAL, _CLONE3, 0, 1), one(_RETURN, _ERROR | _ENOSYS),
    ]  # fmt: skip
    for number in sorted(FORBIDDEN.values()):
        parts += [one(_EQUAL, number, 0, 1), one(_RETURN, _ERROR | _EPERM)]
    parts += [
        one(_EQUAL, _CLONE, 0, 3), one(_LOAD, _FIRST_ARGUMENT_AT), one(_BITS, _NEW_NAMESPACES, 0, 1),
        one(_RETURN, _ERROR | _EPERM), one(_RETURN, _ALLOW),
    ]  # fmt: skip
    return b"".join(parts)


def install() -> None:
    """From here on the filter holds for this process and its children. Needs no_new_privs. OSError."""
    if os.uname().machine != "x86_64":
        return
    program = filter_program()
    code = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16)
    system.set_filter(ctypes.addressof(head))
