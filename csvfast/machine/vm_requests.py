"""What a guest asks its host for over the channel (vm_channel.py), and what the host does: it passes addresses on.

Thread-safety: any thread; commands to the processor go one after another.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from csvfast.errors import FirmwareError, FirmwareStatus, StateError
from csvfast.machine.vm_qemu import ram_ranges
from csvfast.processor.commands import Command
from csvfast.processor.core import C_BIT, PAGE
from csvfast.processor.mailbox_guest import VM_ATTESTATION

if TYPE_CHECKING:
    from csvfast.machine.vm_control import MemoryControl
    from csvfast.processor.vmm import GuestPlan, Host, LaunchedGuest

__all__ = ["GuestRequests"]

_READ_FAULT: Final = 4  # a read with the page not present: AMD64 APM volume 2, 15.25.6
_LEVEL_4K: Final = 1


class GuestRequests:
    """Requests of one guest.

    Args: lock: held while the host's parameter block is used. control: of the memory that the guest's RAM is.
    Raises, from each request: FirmwareError.
    """

    def __init__(
        self, host: Host, lock: threading.Lock, control: MemoryControl, plan: GuestPlan, launched: LaunchedGuest
    ) -> None:
        self._host, self._lock, self._control = host, lock, control
        self._plan, self._launched = plan, launched

    def info(self) -> tuple[int, int]:
        """Policy word and generation: 1 CSV, 2 CSV2, 3 CSV3."""
        policy = self._plan.policy
        return policy.value, 3 if policy.csv3 else 2 if policy.es else 1

    def attest(self, gpa: int) -> None:
        """ATTESTATION of the page. A CSV3 guest is refused: it has secure calls for that."""
        offset = self._offset(gpa)
        if self._plan.policy.csv3:
            raise FirmwareError(FirmwareStatus.UNSUPPORTED, "a CSV3 guest asks for reports by secure calls")
        self._evict(offset)
        place = (self._launched.ram + offset) | C_BIT
        with self._lock:
            self._host.run(
                Command.ATTESTATION, handle=self._launched.handle, address=place, mnonce=VM_ATTESTATION, length=PAGE
            )

    def flush(self, gpa: int) -> None:
        """The page is written to the DRAM and leaves the window: the next touch reads the DRAM."""
        self._evict(self._offset(gpa))

    def secure_call(self, gpa: int) -> None:
        """The guest has reached the hidden page of its secure call pair: UPDATE_NPT. The guest has both pages in the first one's
        frame, which leaves the window before and after: a copy that read-ahead brought in between would be old."""
        pair = self._launched.secure_calls
        if pair is None:
            raise FirmwareError(FirmwareStatus.UNSUPPORTED, "the guest has no secure call pages")
        if gpa not in (pair, pair + PAGE):
            raise FirmwareError(FirmwareStatus.INVALID_ADDRESS, f"{gpa:#x} is none of the secure call pages at {pair:#x}")
        offset = self._offset(pair)
        self._evict(offset)
        with self._lock:
            self._host.run(
                Command.UPDATE_NPT,
                handle=self._launched.handle,
                error_code=_READ_FAULT,
                gpa=gpa,
                level=_LEVEL_4K,
                page_count=1,
            )
        self._evict(offset)

    def _evict(self, offset: int) -> None:
        try:
            self._control.evict(offset, PAGE)
        except StateError as problem:
            raise FirmwareError(FirmwareStatus.HWERROR_PLATFORM, str(problem)) from problem

    def _offset(self, gpa: int) -> int:
        for start, offset, size in ram_ranges(self._plan.memory_size):
            if start <= gpa <= start + size - PAGE:
                return offset + gpa - start
        raise FirmwareError(FirmwareStatus.INVALID_ADDRESS, f"{gpa:#x} is not in the guest's RAM")
