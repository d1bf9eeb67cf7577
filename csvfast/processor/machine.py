"""A host machine around the security processor: its DRAM, its mailbox, its cores, and a page allocator.

Machine is what the server offers over its socket and what a program in the same process may use directly; RemoteMachine
(client.py) has the same methods.

Thread-safety: any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from csvfast.errors import FirmwareStatus, LengthError
from csvfast.processor.buffers import copy_of, size_of
from csvfast.processor.core import C_BIT, GuestState
from csvfast.processor.dma import HOST
from csvfast.processor.frames import PAGE, Frames, GuestRange
from csvfast.processor.mailbox import Mailbox

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.processor.processor import Processor

__all__ = ["TRANSFER_MAX", "LocalMachine", "Machine"]

TRANSFER_MAX: Final = 1 << 20  # bytes of one guest access
_FIRMWARE: Final = "firmware"  # holder of the frames that INIT gave to the firmware


class Machine(Protocol):
    """What drives a processor by raw command buffers. Addresses are system physical.

    asid_max: the highest ASID (CPUID 0x8000001F ECX).
    """

    asid_max: int

    @property
    def problem(self) -> str | None:
        """Why the last command was refused, in words."""

    def command(self, command_id: int, buffer_address: int) -> FirmwareStatus:
        """Rings the mailbox."""

    def read(self, address: int, length: int) -> bytes:
        """DRAM as the host sees it."""

    def write(self, address: int, data: BytesLike) -> None:
        """Writes DRAM as the host."""

    def wbinvd(self, core: int | None = None) -> None:
        """The WBINVD instruction on one core, or on each."""

    def guest_read(self, handle: int, address: int, length: int) -> bytes:
        """What a guest's vCPU reads: under the guest's key if the address has the C-bit (bit 47), else as the host does."""

    def guest_write(self, handle: int, address: int, data: BytesLike) -> None:
        """The same for writing."""

    def allocate(self, size: int, alignment: int = 4096) -> int:
        """Frames nobody else uses."""

    def free(self, address: int) -> None:
        """Gives them back."""

    def assign(self, address: int, handle: int, guest_physical: int) -> None:
        """They are a guest's from now on, until it is decommissioned."""

    def guest_ranges(self, handle: int) -> Sequence[GuestRange]:
        """The frames assigned to a guest."""

    def guests(self) -> list[int]:
        """Handles of all guests."""


class LocalMachine:
    """A machine in this process.

    Attributes: processor, memory, mailbox.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.memory = processor.memory
        self.mailbox = Mailbox(processor)
        self.asid_max = self.memory.asid_max
        self._frames = Frames(self.memory.base_address, self.memory.size)
        self._lock = processor.lock
        self._tmr: tuple[int, int] | None = None
        self._settle(set())

    @property
    def problem(self) -> str | None:
        """Why the last command was refused, in words."""
        return self.mailbox.problem

    def command(self, command_id: int, buffer_address: int) -> FirmwareStatus:
        """Rings the mailbox. Frames of guests that are gone afterwards are free. Never raises."""
        with self._lock:
            before = set(self.processor.guests)
            status = self.mailbox.command(command_id, buffer_address)
            self._settle(before)
            return status

    def ring_doorbell(self, tail: int, head: int | None = None) -> int:
        """Works off the ring buffers; see Mailbox.ring_doorbell. Raises FirmwareError when the mode is off."""
        with self._lock:
            before = set(self.processor.guests)
            head = self.mailbox.ring_doorbell(tail, head)
            self._settle(before)
            return head

    def read(self, address: int, length: int) -> bytes:
        """DRAM as the host sees it. Raises AddressError."""
        return self.memory.read(address, length, HOST)

    def write(self, address: int, data: BytesLike) -> None:
        """Writes DRAM as the host. Raises AddressError."""
        self.memory.write(address, data, HOST)

    def wbinvd(self, core: int | None = None) -> None:
        """The WBINVD instruction on one core, or on each. Raises ArgumentError for a core the machine does not have."""
        self.processor.wbinvd(core)

    def guest_read(self, handle: int, address: int, length: int) -> bytes:
        """What a guest's vCPU reads, at most 1 MiB.

        CSV and CSV2: `address` is system physical; with the C-bit (bit 47) it is read under the guest's key, without it
        as the host does (shared memory). CSV3: guest physical, through the nested page table that the firmware keeps.
        Raises: FirmwareError: a vCPU only runs in an active guest that is RUNNING or being sent; NestedPageFault; LengthError.
        """
        with self._lock:
            found = self._access(handle, address, length)
            if found is None:
                return self.processor.guest_read(handle, address, length)
            return self.memory.read(found[0], length, found[1])

    def guest_write(self, handle: int, address: int, data: BytesLike) -> None:
        """What a guest's vCPU writes; as guest_read() otherwise."""
        with self._lock:
            found = self._access(handle, address, size_of(data))
            if found is None:
                self.processor.guest_write(handle, address, copy_of(data))
            else:
                self.memory.write(found[0], data, found[1])

    def allocate(self, size: int, alignment: int = 4096, *, holder: object = None) -> int:
        """Frames nobody else uses. Raises LengthError, AlignmentError, AllocationError."""
        with self._lock:
            return self._frames.allocate(size, alignment, holder)

    def free(self, address: int, *, holder: object = None) -> None:
        """Gives them back. Raises ArgumentError."""
        with self._lock:
            self._frames.free(address, holder)

    def assign(self, address: int, handle: int, guest_physical: int, *, holder: object = None) -> None:
        """Frames become a guest's, until it is decommissioned. Raises ArgumentError; FirmwareError INVALID_GUEST."""
        with self._lock:
            self.processor.guest(handle)
            self._frames.assign(address, handle, guest_physical, holder)

    def guest_ranges(self, handle: int) -> list[GuestRange]:
        """The frames assigned to a guest. Raises FirmwareError INVALID_GUEST."""
        with self._lock:
            self.processor.guest(handle)
            return self._frames.guest_ranges(handle)

    def guests(self) -> list[int]:
        """Handles of all guests."""
        with self._lock:
            return sorted(self.processor.guests)

    def release_holder(self, holder: object) -> None:
        """A connection is gone: what it held and did not assign is free."""
        with self._lock:
            self._frames.release_holder(holder)

    def _settle(self, before: set[int]) -> None:
        """Frames of guests that are gone are free; the firmware's own (TMR) stay its own until SHUTDOWN."""
        for handle in before.difference(self.processor.guests):
            self._frames.release_guest(handle)
        if self.processor.tmr != self._tmr:
            self._tmr = self.processor.tmr
            self._frames.release_holder(_FIRMWARE)
            if self._tmr is not None:
                self._frames.reserve(self._tmr[0], -(-self._tmr[1] // PAGE) * PAGE, _FIRMWARE)

    def _access(self, handle: int, address: int, length: int) -> tuple[int, int] | None:
        """Place and ASID of a vCPU's access; None for a CSV3 guest, whose nested page table decides."""
        guest = self.processor.guest(handle)
        self.processor.require_state(guest, GuestState.RUNNING, GuestState.SUPDATE)
        asid = self.processor.active_asid(guest)
        if not 0 < length <= TRANSFER_MAX:
            raise LengthError(f"a guest access of {length} bytes; expected 1 .. {TRANSFER_MAX}")
        if guest.policy.csv3:
            return None
        # Secure memory is out of reach of every other guest, too, C-bit or not.
        return self.processor.physical(address, length), asid if address & C_BIT else HOST
