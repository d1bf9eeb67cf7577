"""What a process with keys in its memory does first: nothing of that is written to disk when it crashes, or shown to others.

    RLIMIT_CORE 0       no core files
    PR_SET_DUMPABLE 0   no core dumps through a pipe either, which do not ask for the limit (systemd-coredump); other processes
                        of the same user can neither attach a debugger nor read /proc/<pid>/mem

Root, and whoever can write to swap or suspend the machine, is not kept out.
Source: Linux man-pages core(5), PR_SET_DUMPABLE(2const).
"""

from __future__ import annotations

import ctypes
import logging
import sys
from contextlib import suppress
from typing import Final

from csvfast.broker.logs import event

__all__ = ["keep_memory_private"]

_PR_SET_DUMPABLE: Final = 4
_log: Final = logging.getLogger(__name__)


def keep_memory_private() -> None:
    """Does what the system offers of this; elsewhere than on Linux that is less. Idempotent, thread-safe, raises nothing."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):
        return
    try:
        library = ctypes.CDLL(None, use_errno=True)
        # prctl takes unsigned longs, and variable arguments have no types of their own.
        refused = library.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0),) * 4)
    except (OSError, AttributeError):
        refused = -1
    if refused:
        event(_log, logging.DEBUG, "the system keeps the process dumpable")
