"""What every command of the security processor stands on: its state, its guests, its refusals.

A command is a method of one of the mix-in classes (platform.py, launch.py, migration.py, csv3.py). Each takes ``self.lock``,
checks in the order platform state, handle, guest state, lengths, addresses, policy, cryptography (torvalds/linux
include/linux/psp-sev.h and AMDESE/sev-tool name the codes), raises FirmwareError, and changes nothing when it refuses.

Thread-safety: every command holds the processor's one re-entrant lock, as the real part works off one mailbox.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from csvfast.crypto import Secret, SM2PrivateKey, sm3
from csvfast.errors import FirmwareError, FirmwareStatus, KeyExposureError, KeyRangeError
from csvfast.processor.asid import AsidTable
from csvfast.processor.guest import Guest
from csvfast.processor.options import Options
from csvfast.processor.profile import PROFILE_1_4_2337, Profile
from csvfast.processor.states import GuestState, PlatformState

if TYPE_CHECKING:
    from csvfast.certs.chip import ChipIdentity
    from csvfast.memory import EncryptedMemory
    from csvfast.processor.identity import PlatformIdentity
    from csvfast.processor.state import StateDirectory
    from csvfast.report.policy import GuestPolicy

__all__ = ["C_BIT", "PAGE", "GuestState", "PlatformState", "ProcessorCore"]

PAGE: Final = 4096
C_BIT: Final = 1 << 47  # CPUID 0x8000001F EBX[5:0] of every published part
VEK_BYTES: Final = 32
_HANDLE_MAX: Final = 0xFFFFFFFF


class ProcessorCore:
    """The security processor without its commands.

    Args:
        chip: whose root secret, chip id and CEK this processor has.
        memory: the DRAM whose key slots it fills; its asid_max is the number of encrypted guests of the part.
        profile: which firmware it is.
        options: behaviour the public sources leave open.
        storage: where PEK, PDH, OCA and ownership persist; None keeps them in this object only.
        _entropy: source of random bytes, for known-answer tests only; the operating system otherwise.

    Attributes: chip, memory, profile, options, storage; state (PlatformState), es_enabled, guests (by handle), asids, lock,
        identity (PEK, PDH, OCA; None until the first INIT).
    Thread-safety: all commands may be called from any thread.
    """

    def __init__(
        self,
        chip: ChipIdentity,
        memory: EncryptedMemory,
        *,
        profile: Profile = PROFILE_1_4_2337,
        options: Options | None = None,
        storage: StateDirectory | None = None,
        _entropy: Callable[[int], bytes] | None = None,
    ) -> None:
        self.chip = chip
        self.memory = memory
        self.profile = profile
        self.options = options or Options()
        self.state = PlatformState.UNINIT
        self.es_enabled = False
        self.tmr: tuple[int, int] | None = None  # the firmware's own memory: address, length
        self.nv_address: int | None = None  # of the last INIT_EX's NV area; FACTORY_RESET after SHUTDOWN erases it
        self.guests: dict[int, Guest] = {}
        self.asids = AsidTable(memory.asid_max, self.options.cores)
        self.lock = threading.RLock()
        self.storage = storage
        self.identity: PlatformIdentity | None = None
        self._entropy = _entropy
        self._last_handle = 0
        self._own_identity: PlatformIdentity | None = None  # the part's own keys while those of an NV area are in use
        self._nv_refused: bytes | None = None  # digest of the NV area that the next INIT_EX may replace

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.chip.chip_id}, profile {self.profile.name}, {self.state.name}, "
            f"{len(self.guests)} guests>"
        )

    def __reduce__(self) -> NoReturn:
        raise KeyExposureError(f"a {type(self).__name__} holds keys and cannot be pickled or copied")

    # ---- Refusals

    def refuse(self, status: FirmwareStatus, message: str, needed: dict[str, int] | None = None) -> NoReturn:
        """Ends the command with a status code; `needed` are the lengths that the firmware writes back."""
        raise FirmwareError(status, message, needed)

    def require_platform(self, *states: PlatformState) -> None:
        """Refuses with INVALID_PLATFORM_STATE unless the platform is in one of the states."""
        if self.state not in states:
            self.refuse(
                FirmwareStatus.INVALID_PLATFORM_STATE,
                f"the platform is {self.state.name}; expected {' or '.join(state.name for state in states)}",
            )

    def guest(self, handle: int) -> Guest:
        """The guest of a handle, or INVALID_GUEST. Guest commands exist in the WORKING state only (section 4.5)."""
        if self.state is not PlatformState.WORKING:
            self.require_platform(PlatformState.WORKING)
        found = self.guests.get(handle)
        if found is None:
            self.refuse(FirmwareStatus.INVALID_GUEST, f"no guest has handle {handle}")
        return found

    def require_state(self, guest: Guest, *states: GuestState) -> None:
        """Refuses with INVALID_GUEST_STATE unless the guest is in one of the states."""
        if guest.state not in states:
            self.refuse(
                FirmwareStatus.INVALID_GUEST_STATE,
                f"guest {guest.handle} is {guest.state.name}; expected {' or '.join(state.name for state in states)}",
            )

    def active_asid(self, guest: Guest) -> int:
        """The ASID the guest is bound to, or INACTIVE."""
        if guest.asid is None:
            self.refuse(FirmwareStatus.INACTIVE, f"guest {guest.handle} has no ASID: ACTIVATE it first")
        return guest.asid

    def physical(self, address: int, length: int, alignment: int = 1, *, private: bool = False) -> int:
        """A system physical address without its C-bit, or INVALID_ADDRESS.

        Args:
            address: as the host put it into a command buffer; bit 47 is the C-bit and stripped.
            length: bytes that must lie within the DRAM; not negative.
            alignment: what the address must be a multiple of.
            private: True where the command works on a CSV3 guest's own frames; otherwise such frames are refused by
                reject_private().
        """
        address = operator.index(address)
        place = address & ~C_BIT
        if address < 0 or place % alignment:
            self.refuse(FirmwareStatus.INVALID_ADDRESS, f"address {address:#x} is not a multiple of {alignment}")
        first = self.memory.base_address
        if place < first or length < 0 or place - first > self.memory.size - length:
            self.refuse(
                FirmwareStatus.INVALID_ADDRESS,
                f"{length} bytes at {address:#x} leave the memory {first:#x} .. {first + self.memory.size - 1:#x}",
            )
        if self.tmr is not None and place < sum(self.tmr) and self.tmr[0] < place + length:
            self.refuse(
                FirmwareStatus.INVALID_ADDRESS, f"{length} bytes at {address:#x} reach into the firmware's memory"
            )
        if not private:
            self.reject_private(place, length)
        return place

    def reject_private(self, address: int, length: int) -> None:
        """Refuses ranges the host may not name in a command. CSV3 overrides it; without CSV3 there are none."""

    # ---- Randomness and keys

    def random(self, length: int) -> bytearray:
        """Random bytes of the operating system (or of the test's source), in a buffer that can be wiped."""
        if self._entropy is None:
            return bytearray(os.urandom(length))
        data = bytearray(self._entropy(length))
        if len(data) != length:
            raise ValueError(f"the entropy source gave {len(data)} bytes; expected {length}")
        return data

    def random_secret(self, length: int) -> Secret:
        """Random bytes that wipe themselves."""
        if self._entropy is None:
            return Secret.random(length)
        data = self.random(length)
        try:
            return Secret(data)
        finally:
            data[:] = bytes(length)

    def random_key(self) -> SM2PrivateKey:
        """A new SM2 key."""
        if self._entropy is None:
            return SM2PrivateKey.generate()
        while True:
            data = self.random(32)
            try:
                return SM2PrivateKey(data)
            except KeyRangeError:
                continue
            finally:
                data[:] = bytes(32)

    def random_vek(self) -> Secret:
        """A memory key K1, K2 with K1 different from K2, as XTS needs."""
        while True:
            key = self.random_secret(VEK_BYTES)
            if not key.part(0, 16).equals(key.part(16, 32)):
                return key

    # ---- Guests

    def new_guest(self, policy: GuestPolicy, *, state: GuestState, vek: Secret | None = None, **fields: Any) -> Guest:
        """Makes a guest with a new handle; the platform is WORKING afterwards.

        Args:
            state: LUPDATE or RUPDATE.
            vek: memory key, owned by the guest from now on (a copy where it is shared); None = a new random one.
            fields: other attributes of Guest.
        Refuses with RESOURCE_LIMIT when the firmware has no room.
        """
        if len(self.guests) >= self.options.max_guests:
            self.refuse(FirmwareStatus.RESOURCE_LIMIT, f"there are {len(self.guests)} guests already")
        handle = self._last_handle
        while True:
            handle = handle + 1 if handle < _HANDLE_MAX else 1
            if handle not in self.guests:
                break
        guest = Guest(handle, policy, state=state, vek=vek or self.random_vek(), digest=sm3(), **fields)
        self._last_handle = handle
        self.guests[handle] = guest
        self.state = PlatformState.WORKING
        return guest

    def drop_guest(self, guest: Guest) -> None:
        """Erases a guest's context and keys; the platform is INIT again after the last one."""
        self.forget_guest(guest)
        guest.erase()
        del self.guests[guest.handle]
        if not self.guests:
            self.state = PlatformState.INIT

    def unbind(self, guest: Guest) -> None:
        """Takes the guest's ASID away; with the last guest of the ASID its key leaves the memory's slot."""
        asid = guest.asid
        if asid is None:
            return
        guest.asid = None
        # A memory that was closed first has no keys any more.
        if self.asids.release(asid, guest.handle) and not self.memory.closed and self.memory.installed(asid):
            self.memory.remove(asid)

    def forget_guest(self, guest: Guest) -> None:
        """Called before a guest's context is erased, for what mix-ins hold on its behalf (CSV3 regions)."""
