"""Stopping an emulated core from another thread where its registers are true: at the begin of a block of instructions.

uc_emu_stop() called by another thread also takes effect right behind a memory access in the middle of an instruction (Unicorn
2.1.4, qemu/tcg/tcg-op.c, check_exit_request); the program counter then stands on that instruction although what it stored is
stored. Going on from there does it a second time: a counter counts twice, a lock that was just taken is found taken. Called by
the core's own thread, by a hook at the begin of a block, it stops before the block.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from unicorn import UcError  # type: ignore[attr-defined]
from unicorn import unicorn_const as constants
from unicorn.unicorn_py3.unicorn import uclib  # type: ignore[import-untyped, unused-ignore]

from csvfast import _core

__all__ = ["Stopper"]

_STOP: Final = int(ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0)


class Stopper:
    """Stops one Unicorn instance. The hook costs a nanosecond for each block, so it is there only where it is wanted."""

    def __init__(self, uc: Any) -> None:
        self.uc = uc
        self.exact = False
        self._asked = False
        self._flag = _core.BlockStop(_STOP)

    def install(self) -> None:
        """Makes stops exact. The core must not run. Raises UcError."""
        if self.exact:
            return
        hook = ctypes.c_size_t()
        status = uclib.uc_hook_add(
            self.uc._uch, ctypes.byref(hook), constants.UC_HOOK_BLOCK, ctypes.c_void_p(self._flag.callback),
            ctypes.c_void_p(self._flag.data), ctypes.c_uint64(1), ctypes.c_uint64(0),
        )  # fmt: skip
        if status != constants.UC_ERR_OK:
            raise UcError(status)  # type: ignore[no-untyped-call]
        self.uc.ctl_flush_tb()  # blocks translated before have no hook
        self.exact = True

    def stop(self) -> None:
        """Any thread: stops the core at its next block, or as soon as it runs."""
        self._asked = True
        self._flag.set()

    def stop_for_good(self) -> None:
        """Any thread: stops the core somewhere; it must not go on."""
        self._flag.set()
        self.uc.emu_stop()

    def stopped(self) -> bool:
        """The core's thread, after a stop: forgets what was asked for. Out: True when something was."""
        asked, self._asked = self._asked, False
        self._flag.clear()
        return asked
