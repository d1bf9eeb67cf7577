"""The context the firmware keeps of one guest.

Thread-safety: guarded by the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NoReturn

from csvfast.crypto import Secret, sm3
from csvfast.errors import KeyExposureError
from csvfast.processor.states import GuestState

if TYPE_CHECKING:
    from csvfast.report.policy import GuestPolicy

__all__ = ["RTMR_COUNT", "Generation", "Guest", "GuestStatus"]

Generation = Literal["csv", "csv2", "csv3"]
RTMR_COUNT: Final = 5
_ZERO: Final = bytes(32)


class GuestStatus:
    """Answer of GUEST_STATUS: policy word, ASID (0 = not active), state."""

    __slots__ = ("asid", "policy", "state")

    def __init__(self, policy: int, asid: int, state: GuestState) -> None:
        self.policy = policy
        self.asid = asid
        self.state = state

    def __repr__(self) -> str:
        return f"GuestStatus(policy={self.policy:#x}, asid={self.asid}, state={self.state.name})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GuestStatus):
            return NotImplemented
        return (self.policy, self.asid, self.state) == (other.policy, other.asid, other.state)

    def __hash__(self) -> int:
        return hash((self.policy, self.asid, self.state))


class Guest:
    """One guest.

    Attributes:
        handle: 1 .. 2^32 - 1. policy: its GuestPolicy. state: GuestState. generation: "csv", "csv2" or "csv3", from the policy.
        asid: bound ASID or None.
        vek: memory key, 32 bytes K1, K2. tek, tik: transport keys, 16 bytes each, None once LAUNCH_FINISH erased them.
        digest: the running launch digest, an sm3. measure: the final one (what a report calls measure), None until
            LAUNCH_MEASURE.
        launch_measure: the HMAC that LAUNCH_MEASURE gave; mnonce: the nonce beside it.
        vm_id, vm_version (16 bytes), user_data (64), user_pubkey_digest (32): from the session, zero without one.
        vm_digest: launch digest that the owner's session demands, or None. refused: True once it did not match; such a guest
            never runs.
        encrypted: True once data stands in memory under its VEK.
        user_id: who the VMM says the guest belongs to (kvm_csv_init), or None; for the sharing of ASIDs.
        rtmrs: five 32-byte registers. rtmr_state: 0 uninitialised, 1 initialised, 2 working. rtmr_version.
        csv3: the CSV3 commands' own record, or None. migration: the migration commands' own record, or None.
    """

    __slots__ = (
        "asid",
        "csv3",
        "digest",
        "encrypted",
        "handle",
        "launch_measure",
        "measure",
        "migration",
        "mnonce",
        "policy",
        "refused",
        "rtmr_state",
        "rtmr_version",
        "rtmrs",
        "state",
        "tek",
        "tik",
        "user_data",
        "user_id",
        "user_pubkey_digest",
        "vek",
        "vm_digest",
        "vm_id",
        "vm_version",
    )

    def __init__(
        self,
        handle: int,
        policy: GuestPolicy,
        *,
        state: GuestState,
        vek: Secret,
        digest: sm3,
        tek: Secret | None = None,
        tik: Secret | None = None,
        vm_id: bytes = bytes(16),
        vm_version: bytes = bytes(16),
        user_data: bytes = bytes(64),
        user_pubkey_digest: bytes = _ZERO,
        vm_digest: bytes | None = None,
        user_id: bytes | None = None,
    ) -> None:
        self.handle = handle
        self.policy = policy
        self.state = state
        self.asid: int | None = None
        self.vek = vek
        self.tek = tek
        self.tik = tik
        self.digest = digest
        self.measure: bytes | None = None
        self.launch_measure: bytes | None = None
        self.mnonce: bytes | None = None
        self.vm_id = vm_id
        self.vm_version = vm_version
        self.user_data = user_data
        self.user_pubkey_digest = user_pubkey_digest
        self.vm_digest = vm_digest
        self.refused = False
        self.encrypted = False
        self.user_id = user_id
        self.rtmrs: list[bytes] = [_ZERO] * RTMR_COUNT
        self.rtmr_state = 0
        self.rtmr_version = 1
        self.csv3: object | None = None
        self.migration: object | None = None

    @property
    def generation(self) -> Generation:
        """Which protection the policy asks for."""
        if self.policy.csv3:
            return "csv3"
        return "csv2" if self.policy.es else "csv"

    def set_measure(self, measure: bytes) -> None:
        """Fixes the launch digest; RTMR 0 always equals it."""
        self.measure = measure
        self.rtmrs[0] = measure
        self.rtmr_state = 1

    def erase_transport_keys(self) -> None:
        """Wipes TEK and TIK."""
        for key in (self.tek, self.tik):
            if key is not None:
                key.wipe()
        self.tek = self.tik = None

    def erase(self) -> None:
        """Wipes every key; each guest holds its own copy of a shared VEK."""
        self.erase_transport_keys()
        self.vek.wipe()

    def __repr__(self) -> str:
        return f"<Guest {self.handle}, {self.generation}, {self.state.name}, asid={self.asid}>"

    def __reduce__(self) -> NoReturn:
        raise KeyExposureError("a Guest holds keys and cannot be pickled or copied")
