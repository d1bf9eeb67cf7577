"""DBG_DECRYPT, DBG_ENCRYPT and COPY.

Checks: AMD publication 55766 (inferred for Hygon). COPY is needed because a ciphertext block belongs to its address: moving a
page means decrypting it at one place and encrypting it at the other.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from typing import Final

from csvfast.errors import FirmwareStatus
from csvfast.processor.core import ProcessorCore
from csvfast.processor.derivation import wipe
from csvfast.processor.guest import Guest
from csvfast.processor.states import GuestState

__all__ = ["DebugCommands"]

_BLOCK: Final = 16
_CHUNK: Final = 1 << 20


class DebugCommands(ProcessorCore):
    """DBG_DECRYPT, DBG_ENCRYPT, COPY."""

    def dbg_decrypt(self, handle: int, source: int, destination: int, length: int) -> None:
        """DBG_DECRYPT: the guest's memory at `source` is written as plaintext to `destination`.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (not RUNNING), POLICY_FAILURE (NODBG),
            INVALID_LENGTH, INVALID_ADDRESS, INACTIVE.
        """
        with self.lock:
            guest = self._debugged(handle)
            asid, source, destination = self._ranges(guest, source, destination, length)
            self._move(source, asid, destination, 0, length)

    def dbg_encrypt(self, handle: int, source: int, destination: int, length: int) -> None:
        """DBG_ENCRYPT: plaintext at `source` becomes the guest's memory at `destination`. Refuses: as DBG_DECRYPT."""
        with self.lock:
            guest = self._debugged(handle)
            asid, source, destination = self._ranges(guest, source, destination, length)
            self._move(source, 0, destination, asid, length)

    def copy(self, handle: int, source: int, destination: int, length: int) -> None:
        """COPY: the guest's memory at `source` appears at `destination` too.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (not RUNNING), INVALID_LENGTH, INVALID_ADDRESS
            (also when the ranges overlap), INACTIVE.
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.RUNNING)
            asid, source, destination = self._ranges(guest, source, destination, length)
            self._move(source, asid, destination, asid, length)

    def _debugged(self, handle: int) -> Guest:
        guest = self.guest(handle)
        self.require_state(guest, GuestState.RUNNING)
        if guest.policy.nodbg:
            self.refuse(FirmwareStatus.POLICY_FAILURE, f"the policy of guest {handle} forbids debugging")
        return guest

    def _ranges(self, guest: Guest, source: int, destination: int, length: int) -> tuple[int, int, int]:
        if length <= 0 or length % _BLOCK:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected a positive multiple of {_BLOCK}")
        source = self.physical(source, length, _BLOCK)
        destination = self.physical(destination, length, _BLOCK)
        if source < destination + length and destination < source + length:
            self.refuse(FirmwareStatus.INVALID_ADDRESS, f"{source:#x} and {destination:#x} overlap in {length} bytes")
        return self.active_asid(guest), source, destination

    def _move(self, source: int, reader: int, destination: int, writer: int, length: int) -> None:
        window = bytearray(min(length, _CHUNK))
        try:
            with memoryview(window) as view:
                for done in range(0, length, _CHUNK):
                    part = view[: min(_CHUNK, length - done)]
                    self.memory.read_into(source + done, part, reader)
                    self.memory.write(destination + done, part, writer)
        finally:
            wipe(window)
