"""The security processor with all its commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from csvfast.errors import FirmwareStatus, StateError
from csvfast.processor.core import PAGE
from csvfast.processor.csv3_migration import Csv3MigrationCommands
from csvfast.processor.secure_call import GPA_BITS
from csvfast.processor.state import StateDirectory
from csvfast.processor.states import GuestState, PlatformState

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.memory import EncryptedMemory
    from csvfast.processor.guest import Guest

__all__ = ["Processor"]


class Processor(Csv3MigrationCommands):
    """The security processor of one chip, in front of one memory.

    The arguments are those of ProcessorCore: chip, memory, profile, options, storage. Every command is a method; a refusal is a
    FirmwareError with the code the real firmware would answer, and changes nothing.

        line = ManufacturingLine.create()
        with EncryptedMemory(64 << 20) as memory, Processor(line.make_chip(), memory) as processor:
            processor.init()
            handle = processor.launch_start(GuestPolicy.of(nodbg=True))
            processor.activate(handle, 1)
            memory.write(0x100000, firmware, asid=0)
            processor.launch_update_data(handle, 0x100000, len(firmware))
            processor.launch_measure(handle)
            processor.launch_finish(handle)

    Thread-safety: any thread may call any command; they run one after another, as through the real mailbox.
    """

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        memory: EncryptedMemory,
        *,
        _entropy: Callable[[int], bytes] | None = None,
        **options: Any,
    ) -> Self:
        """A processor on a chip's directory, which it locks until close(). `options` are those of the constructor besides.

        Raises: StateError, OSError.
        """
        storage = StateDirectory(directory)
        try:
            return cls(storage.chip, memory, storage=storage, _entropy=_entropy, **options)
        except BaseException:
            storage.close()
            raise

    def key_memory_controller(self, handle: int, pipe: int, ram: Sequence[tuple[int, int, int]] = ()) -> None:
        """Writes a running guest's memory key (K1, K2) into a pipe whose other end the memory controller reads: the one in
        another process that decrypts on behalf of the guest's vCPUs. Nobody else may hold that end.

        Args: ram: of a CSV3 guest: (guest address, system address, bytes) where that controller has the guest's RAM. It maps a
            page at the guest's first touch and gives it zeros, without a nested page fault and UPDATE_NPT.
        Raises: FirmwareError: no such guest, not active, not RUNNING; `ram` is not in whole pages, not the guest's private
            memory, or in use for other pages; OSError; StateError: the pipe did not take it whole.
        """
        with self.lock:
            guest = self.guest(handle)
            self.active_asid(guest)
            self.require_state(guest, GuestState.RUNNING)
            if guest.policy.csv3:
                self._place_ram(guest, ram)
            with memoryview(guest.vek) as key:
                if os.write(pipe, key) != key.nbytes:
                    raise StateError("the memory controller's pipe has no room for a key")

    def _place_ram(self, guest: Guest, ram: Sequence[tuple[int, int, int]]) -> None:
        record = self.csv3_record(guest)
        placed: list[tuple[int, int, int]] = []
        for gpa, address, length in ram:
            if length <= 0 or gpa < 0 or (gpa | address | length) % PAGE or gpa + length > 1 << GPA_BITS:
                self.refuse(FirmwareStatus.INVALID_ADDRESS, f"{length:#x} bytes of RAM at {gpa:#x}: expected whole pages")
            if not record.pool.owns(address // PAGE, length // PAGE):
                self.refuse(
                    FirmwareStatus.INVALID_PAGE_OWNER, f"{length:#x} bytes at {address:#x} are not the guest's private memory"
                )
            placed.append((gpa // PAGE, address // PAGE, length // PAGE))
        used = [(entry.frame, gfn) for gfn, entry in record.table.entries.items() if entry.private and entry.present]
        used += [(frame, -1) for frame, _ in record.vcpus.values()]
        for first, start, count in placed:
            for frame, gfn in used:
                is_here = start <= frame < start + count or first <= gfn < first + count
                if is_here and frame - start != gfn - first:
                    self.refuse(FirmwareStatus.INVALID_PAGE_OWNER, f"frame {frame:#x} in the RAM is another page's")
        for _, start, count in placed:
            record.pool.withdraw(start, count)
        record.placed = tuple(placed)

    def close(self) -> None:
        """Power off: guests are lost, keys leave the memory, the state directory is unlocked. Closing twice does nothing."""
        with self.lock:
            try:
                if self.state is not PlatformState.UNINIT:
                    self.shutdown()
            finally:
                if self.storage is not None:
                    self.storage.close()
                    self.identity = None  # its keys wipe themselves; the directory has them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
