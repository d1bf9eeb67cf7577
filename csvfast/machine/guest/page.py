"""One page of the guest's memory for a request and its answer: locked, found by its physical address, wiped afterwards.

The physical address is what the host gets; it changes when the kernel moves the page. mlock keeps a page in memory, but only
vm.compact_unevictable_allowed = 0 (which /init of our initrds sets) keeps it in its place; who uses the address therefore
compares it afterwards (`address` reads it anew).

Sources: torvalds/linux Documentation/admin-guide/mm/pagemap.rst, Documentation/admin-guide/sysctl/vm.rst.
Thread-safety: one user at a time.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final, Self

from csvfast.errors import ClosedError, LengthError, StateError

__all__ = ["PAGE", "RequestPage"]

PAGE: Final = 4096

_LOCKED: Final = 0x2000  # MAP_LOCKED
_PRESENT: Final = 1 << 63
_FRAME: Final = (1 << 55) - 1
_NO_FORK: Final = 10  # MADV_DONTFORK
_NO_DUMP: Final = 16  # MADV_DONTDUMP


class RequestPage:
    """A page of zeros. A context manager: leaving it wipes and frees the page.

    Raises: OSError: no memory may be locked.
    """

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | _LOCKED
        self._memory = mmap.mmap(-1, PAGE, flags=flags)
        # A child would share the page until somebody writes, and then one of the two has another.
        self._memory.madvise(_NO_FORK)
        self._memory.madvise(_NO_DUMP)
        self._memory[:] = bytes(PAGE)

    @property
    def memory(self) -> mmap.mmap:
        """The 4096 bytes. ClosedError."""
        if self._memory.closed:
            raise ClosedError("the request page is closed")
        return self._memory

    def write(self, data: bytes) -> None:
        """Fills the page: data, then zeros. LengthError: more than a page."""
        if len(data) > PAGE:
            raise LengthError(f"{len(data)} bytes for a page of {PAGE}")
        self.memory[:] = data.ljust(PAGE, b"\0")

    def wipe(self) -> None:
        """Overwrites the page with zeros."""
        self.memory[:] = bytes(PAGE)

    @property
    def virtual_address(self) -> int:
        """Where the process has the page."""
        start = ctypes.c_char.from_buffer(self.memory)
        try:
            return ctypes.addressof(start)
        finally:
            del start  # a mapping with exported buffers cannot be closed

    @property
    def address(self) -> int:
        """The guest physical address at this moment.

        PermissionError: the kernel shows it to root alone; StateError: the page is not in memory; OSError: no /proc.
        """
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(descriptor, 8, self.virtual_address // PAGE * 8)
        finally:
            os.close(descriptor)
        entry = int.from_bytes(raw, "little")
        if len(raw) != 8 or not entry & _PRESENT:
            raise StateError("the request page is not in memory; expected a locked page")
        if not entry & _FRAME:
            raise PermissionError(errno.EPERM, "physical addresses are shown to root (CAP_SYS_ADMIN) alone", "/proc/self/pagemap")
        return (entry & _FRAME) * PAGE

    def close(self) -> None:
        """Wipes and frees the page. Idempotent."""
        if not self._memory.closed:
            self._memory[:] = bytes(PAGE)
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RequestPage{', closed' if self._memory.closed else ''}>"
