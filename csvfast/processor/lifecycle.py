"""Commands every guest has in every state: ACTIVATE, DEACTIVATE, DECOMMISSION, GUEST_STATUS.

ASIDs (openEuler kernel arch/x86/kvm/svm/csv.c): CSV guests use min .. max, CSV2 guests 1 .. min - 1 (1 .. max from build 1810
on), CSV3 guests 1 .. max.

Two guests may share an ASID if their policies are equal, say ASID_REUSE and not NOKS, and both belong to one user: the user id
the VMM gave at LAUNCH_START and the digest of the session's owner key are equal, and not both absent. The owner key counts
because the host chooses the user id: without it a host could let a guest of its own join. A guest whose session names no owner
key shares with nobody. The policies must be equal because sharing an ASID is sharing a key: a sibling without NODBG or NOSEND
would let the host read the other's memory. A key slot holds one key, so a guest that joins takes over the key of the first,
which it can only do before it has data of its own in memory (inferred).

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from typing import Final

from csvfast.crypto import Secret
from csvfast.errors import FirmwareStatus
from csvfast.processor.asid import AsidState
from csvfast.processor.core import ProcessorCore
from csvfast.processor.guest import Guest, GuestStatus
from csvfast.processor.states import GuestState

__all__ = ["LifecycleCommands"]

_NOBODY: Final = (None, bytes(32))


class LifecycleCommands(ProcessorCore):
    """ACTIVATE, DEACTIVATE, DECOMMISSION, GUEST_STATUS."""

    def activate(self, handle: int, asid: int) -> None:
        """ACTIVATE: the guest's key goes into the memory's slot `asid`.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (a guest that was sent away); INVALID_ASID;
            ASID_OWNED; ACTIVE; DFFLUSH_REQUIRED (the ASID was released and not flushed since).
        """
        with self.lock:
            guest = self.guest(handle)
            if guest.state is GuestState.SENT:
                self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {handle} has been sent away")
            low, high = self.asid_range(guest)
            if not low <= asid <= high:
                self.refuse(
                    FirmwareStatus.INVALID_ASID,
                    f"ASID {asid} is not for {guest.generation} guests; expected {low} .. {high}",
                )
            state = self.asids.state(asid)
            joins = state is AsidState.ACTIVE and guest.asid != asid
            if joins and not all(self._may_share(guest, self.guests[other]) for other in self.asids.guests(asid)):
                self.refuse(FirmwareStatus.ASID_OWNED, f"ASID {asid} belongs to another guest")
            if guest.asid is not None:
                self.refuse(FirmwareStatus.ACTIVE, f"guest {handle} has ASID {guest.asid} already")
            if state in (AsidState.DIRTY, AsidState.NEED_DF):
                self.refuse(FirmwareStatus.DFFLUSH_REQUIRED, f"ASID {asid} has not been flushed since its last guest")
            if joins:
                first = self.guests[next(iter(self.asids.guests(asid)))]
                shared = Secret(first.vek)
                guest.vek.wipe()
                guest.vek = shared
            else:
                if self.memory.installed(asid):  # somebody went round the firmware
                    self.refuse(FirmwareStatus.ASID_OWNED, f"the memory has a key for ASID {asid} already")
                self.memory.install(asid, guest.vek)
            self.asids.bind(asid, handle)
            guest.asid = asid

    def deactivate(self, handle: int) -> None:
        """DEACTIVATE: the key leaves its slot (with the slot's last guest). A guest without an ASID stays as it is.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST.
        """
        with self.lock:
            self.unbind(self.guest(handle))

    def decommission(self, handle: int) -> None:
        """DECOMMISSION: the guest's context and keys are erased. Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, ACTIVE."""
        with self.lock:
            guest = self.guest(handle)
            if guest.asid is not None:
                self.refuse(FirmwareStatus.ACTIVE, f"guest {handle} has ASID {guest.asid}: DEACTIVATE it first")
            self.drop_guest(guest)

    def guest_status(self, handle: int) -> GuestStatus:
        """GUEST_STATUS. Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST."""
        with self.lock:
            guest = self.guest(handle)
            return GuestStatus(guest.policy.value, guest.asid or 0, guest.state)

    def asid_range(self, guest: Guest) -> tuple[int, int]:
        """First and last ASID for a guest of this generation; an empty range has its last below its first."""
        first, last = 1, self.memory.asid_max
        if guest.generation == "csv":
            first = self.options.min_csv_asid
        elif guest.generation == "csv2" and not self.profile.csv2_any_asid:
            last = min(last, self.options.min_csv_asid - 1)
        return first, last

    def _may_share(self, guest: Guest, other: Guest) -> bool:
        if guest.policy != other.policy or not guest.policy.asid_reuse or guest.policy.noks:
            return False
        user = (guest.user_id, guest.user_pubkey_digest)
        if user == _NOBODY or user != (other.user_id, other.user_pubkey_digest):
            return False
        return not guest.encrypted or guest.vek.equals(other.vek)
