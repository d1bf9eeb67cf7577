"""SEND_* and RECEIVE_*: moving a guest to another platform.

    source                                     target
    SEND_START (target's chain) -> session     RECEIVE_START (source's chain, session)
    SEND_UPDATE_DATA, _VMSA -> packets         RECEIVE_UPDATE_DATA, _VMSA
    SEND_FINISH or SEND_CANCEL                 RECEIVE_FINISH

    RUNNING -> SUPDATE -> SENT, or RUNNING     RUPDATE -> RUNNING

A packet (packet.py) is encrypted and authenticated under transport keys that only the two firmwares hold. As in AMD's
protocol packets carry neither a number nor an address: the target learns from the host where each belongs. A host that
drops, repeats, swaps or misplaces packets of one migration is not detected by the firmware; a changed bit, a packet of
another migration and a data packet in a VMSA's place are. A guest that needs more must measure itself afterwards.
CSV3's packets are numbered and bound to their addresses (csv3_migration.py).

Sources: torvalds/linux include/linux/psp-sev.h (parameters), AMD publication 55766 (checks, packets; inferred for
Hygon). Project-defined: transport.py. The trusted roots are Options.migration_roots, by default the root of the
platform's own chip.
SWAP_OUT and SWAP_IN have a number but no published parameters: UNSUPPORTED.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from csvfast.certs.layout import CSV_BYTES, CaCertificate
from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AuthenticationError, FirmwareStatus, FormatError
from csvfast.processor.buffers import copy_of, size_of
from csvfast.processor.core import PAGE
from csvfast.processor.derivation import wipe
from csvfast.processor.guest import Guest
from csvfast.processor.identity import PlatformIdentity
from csvfast.processor.launch import LaunchCommands
from csvfast.processor.packet import HEADER_BYTES, KIND_DATA, KIND_VMSA, open_packet, seal_packet
from csvfast.processor.session import SESSION_BYTES, check_dh_certificate
from csvfast.processor.states import GuestState, PlatformState
from csvfast.processor.transport import (
    CHAIN_FILE_BYTES,
    Identity,
    check_target_policy,
    make_migration_session,
    open_migration_session,
    source_chain,
    target_chain,
)
from csvfast.report.policy import GuestPolicy

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["PACKET_BYTES_MAX", "MigrationCommands"]

BLOCK: Final = 16
PACKET_BYTES_MAX: Final = 1 << 20  # a limit of this firmware, not a published one (inferred)
_AMD_SESSION_BYTES: Final = 128


class MigrationCommands(LaunchCommands):
    """The migration commands of CSV and CSV2 guests; SEND_START to SEND_CANCEL and RECEIVE_START serve CSV3 guests too."""

    # ---- Source

    def send_start(
        self,
        handle: int,
        pdh: BytesLike,
        platform_certs: BytesLike,
        vendor_certs: BytesLike,
        *,
        session_length: int | None = None,
    ) -> tuple[int, bytes]:
        """SEND_START: chooses the target and makes the transport keys.

        Args:
            pdh: the target's PDH certificate, 2084 bytes. platform_certs: its PEK || OCA || CEK, 6252 bytes, as
                PDH_CERT_EXPORT gives them. vendor_certs: HSK || HRK, 1664 bytes.
            session_length: room for the session; None = enough. With too little the answer is INVALID_LENGTH, with
                the length needed, before anything else is looked at: that is how hosts ask for it.
        Returns: the guest's policy word, and the session for RECEIVE_START.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUNNING needed), INVALID_LENGTH,
            POLICY_FAILURE (NOSEND), INVALID_CERTIFICATE (the chain is not genuine, or of another root),
            POLICY_FAILURE (DOMAIN, CSV3, HSK, CEK or API version).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.RUNNING)
            needed = _AMD_SESSION_BYTES if self.options.session_layout == "amd" else SESSION_BYTES
            if session_length is not None and session_length < needed:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"the session buffer has {session_length} bytes; expected {needed}",
                    {"session_length": needed, "policy": guest.policy.value},
                )
            identity = self._working_identity()
            if guest.policy.nosend:
                self.refuse(FirmwareStatus.POLICY_FAILURE, f"the policy of guest {handle} forbids sending it")
            chain = target_chain(pdh, platform_certs, vendor_certs, self._migration_roots())
            check_target_policy(guest.policy, chain, identity.oca)
            session = make_migration_session(guest, chain.pdh, identity, self.random, self.options.session_layout)
            guest.erase_transport_keys()
            guest.tek, guest.tik = session.tek, session.tik
            guest.migration = None
            guest.state = GuestState.SUPDATE
            return guest.policy.value, session.blob

    def send_update_data(
        self,
        handle: int,
        address: int,
        length: int,
        *,
        header_length: int | None = None,
        transport_length: int | None = None,
    ) -> tuple[bytes, bytes]:
        """SEND_UPDATE_DATA: encrypted memory of the guest becomes a packet.

        Args: address, length: multiples of 16, at most 1 MiB. header_length, transport_length: room for the answer,
            None = enough.
        Returns: header, 52 bytes, and ciphertext, `length` bytes.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (SUPDATE needed), UNSUPPORTED (CSV3),
            INACTIVE, INVALID_LENGTH (with the lengths needed), INVALID_ADDRESS.
        """
        with self.lock:
            guest, asid = self._moving(handle, GuestState.SUPDATE)
            self._check_room(length, header_length, transport_length)
            self._check_data_length(length)
            return self._sealed(KIND_DATA, guest, self.physical(address, length, BLOCK), length, asid)

    def send_update_vmsa(
        self,
        handle: int,
        address: int,
        length: int,
        *,
        header_length: int | None = None,
        transport_length: int | None = None,
    ) -> tuple[bytes, bytes]:
        """SEND_UPDATE_VMSA: one page of register state. As SEND_UPDATE_DATA; POLICY_FAILURE without ES."""
        with self.lock:
            guest, asid = self._moving(handle, GuestState.SUPDATE)
            self._check_vmsa(guest, length, header_length, transport_length)
            return self._sealed(KIND_VMSA, guest, self.physical(address, length, PAGE), length, asid)

    def send_finish(self, handle: int) -> None:
        """SEND_FINISH: the guest has left; what remains is to deactivate and decommission it.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE.
        """
        with self.lock:
            self._end_sending(handle, GuestState.SENT)

    def send_cancel(self, handle: int) -> None:
        """SEND_CANCEL: the guest stays. What was sent cannot run: its RECEIVE_FINISH is the target's decision (the
        host must see to it that the guest does not run twice; AMD's protocol leaves that to it).

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE.
        """
        with self.lock:
            self._end_sending(handle, GuestState.RUNNING)

    # ---- Target

    def receive_start(self, policy: GuestPolicy | int, pdh: BytesLike, session: BytesLike, handle: int = 0) -> int:
        """RECEIVE_START: makes a guest that arrives from another platform.

        Args:
            policy: as SEND_START gave it.
            pdh: the source's PDH certificate (2084 bytes), or its whole chain file (10000 bytes): transport.py says
                why.
            session: as SEND_START made it for this platform. handle: a guest whose memory key is to be shared; 0 =
                none.
        Returns: the handle.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST (no guest `handle`), INVALID_LENGTH, POLICY_FAILURE (API, ES,
            CSV3, NOSEND, DOMAIN without or with another owner, keys may not be shared), INVALID_CERTIFICATE,
            BAD_SIGNATURE, BAD_MEASUREMENT (session not for this platform, not for this policy), RESOURCE_LIMIT.
        """
        word = policy if isinstance(policy, GuestPolicy) else GuestPolicy(policy)
        certificates = copy_of(pdh)
        with self.lock:
            self.require_platform(PlatformState.INIT, PlatformState.WORKING)
            other = None
            if handle:
                other = self.guests.get(handle)
                if other is None:
                    self.refuse(FirmwareStatus.INVALID_GUEST, f"no guest has handle {handle}")
            if len(certificates) not in (CSV_BYTES, CHAIN_FILE_BYTES):
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"the source's certificates have {len(certificates)} bytes; expected {CSV_BYTES} or {CHAIN_FILE_BYTES}",
                    {"pdh_length": CSV_BYTES},
                )
            identity = self._working_identity()
            self.check_policy(word)
            if word.nosend:
                self.refuse(FirmwareStatus.POLICY_FAILURE, "the policy forbids that the guest is sent")
            if other is not None and (word.noks or word != other.policy):
                self.refuse(FirmwareStatus.POLICY_FAILURE, f"the policies do not let guest {handle} share its key")
            source = check_dh_certificate(certificates[:CSV_BYTES])
            chain = source_chain(certificates, self._migration_roots()) if len(certificates) > CSV_BYTES else None
            if word.domain and (chain is None or chain.oca.point != identity.oca.point):
                self.refuse(FirmwareStatus.POLICY_FAILURE, "the source does not belong to this platform's domain")
            opened, who = open_migration_session(session, source, identity, word, self.options.session_layout)
            if chain is None:
                who = Identity()
            try:
                guest = self.new_guest(
                    word,
                    state=GuestState.RUPDATE,
                    vek=None if other is None else Secret(other.vek),
                    tek=opened.tek,
                    tik=opened.tik,
                    vm_id=who.vm_id,
                    vm_version=who.vm_version,
                    user_data=opened.user_data,
                    user_pubkey_digest=who.user_pubkey_digest,
                )
            except BaseException:
                opened.tek.wipe()
                opened.tik.wipe()
                raise
            guest.set_measure(who.measure)
            return guest.handle

    def receive_update_data(
        self, handle: int, header: BytesLike, address: int, length: int, transport: BytesLike
    ) -> None:
        """RECEIVE_UPDATE_DATA: a packet becomes memory of the guest.

        Args: header: 52 bytes. address, length: multiples of 16. transport: `length` bytes.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUPDATE needed), UNSUPPORTED (CSV3),
            INACTIVE, INVALID_LENGTH, INVALID_ADDRESS, INVALID_PARAM (flags), BAD_MEASUREMENT (MAC).
        """
        with self.lock:
            guest, asid = self._moving(handle, GuestState.RUPDATE)
            self._check_data_length(length)
            self._check_packet(header, length, transport)
            self._opened(KIND_DATA, guest, header, self.physical(address, length, BLOCK), transport, asid)

    def receive_update_vmsa(
        self, handle: int, header: BytesLike, address: int, length: int, transport: BytesLike
    ) -> None:
        """RECEIVE_UPDATE_VMSA: one page of register state. As RECEIVE_UPDATE_DATA; POLICY_FAILURE without ES."""
        with self.lock:
            guest, asid = self._moving(handle, GuestState.RUPDATE)
            self._check_vmsa(guest, length, None, None)
            self._check_packet(header, length, transport)
            self._opened(KIND_VMSA, guest, header, self.physical(address, length, PAGE), transport, asid)

    def receive_finish(self, handle: int) -> None:
        """RECEIVE_FINISH: the transport keys are erased and the guest may run.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (RUPDATE needed; a CSV3 guest without its
            context).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.RUPDATE)
            self.check_arrival(guest)
            guest.erase_transport_keys()
            guest.migration = None
            guest.state = GuestState.RUNNING

    def swap_out(self, handle: int) -> NoReturn:
        """SWAP_OUT: UNSUPPORTED. Refuses with INVALID_PLATFORM_STATE and INVALID_GUEST first."""
        with self.lock:
            self.guest(handle)
            self.refuse(FirmwareStatus.UNSUPPORTED, "SWAP_OUT and SWAP_IN are not specified for CSV")

    def swap_in(self, handle: int) -> NoReturn:
        """SWAP_IN: as SWAP_OUT."""
        self.swap_out(handle)

    # ---- Behind the commands

    def check_arrival(self, guest: Guest) -> None:
        """Refuses RECEIVE_FINISH while something essential is missing. CSV3 overrides it."""

    def migration_keys(self, guest: Guest) -> tuple[Secret, Secret]:
        """TEK and TIK of a guest on its way."""
        if guest.tek is None or guest.tik is None:
            self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {guest.handle} has no transport keys")
        return guest.tek, guest.tik

    def _working_identity(self) -> PlatformIdentity:
        if self.identity is None:
            self.refuse(FirmwareStatus.INVALID_PLATFORM_STATE, "the platform has not been initialised")
        return self.identity

    def _migration_roots(self) -> tuple[CaCertificate, ...]:
        roots = self.options.migration_roots
        return (self.chip.root,) if roots is None else roots

    def _moving(self, handle: int, state: GuestState) -> tuple[Guest, int]:
        guest = self.guest(handle)
        self.require_state(guest, state)
        if guest.policy.csv3:
            self.refuse(
                FirmwareStatus.UNSUPPORTED, f"guest {handle} is a CSV3 guest: SEND_ and RECEIVE_ENCRYPT_* move it"
            )
        return guest, self.active_asid(guest)

    def _end_sending(self, handle: int, state: GuestState) -> None:
        guest = self.guest(handle)
        self.require_state(guest, GuestState.SUPDATE)
        guest.erase_transport_keys()
        guest.migration = None
        guest.state = state

    def _check_room(self, length: int, header_length: int | None, transport_length: int | None) -> None:
        if (header_length is not None and header_length < HEADER_BYTES) or (
            transport_length is not None and transport_length < length
        ):
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"header and transport buffers have {header_length} and {transport_length} bytes; "
                f"expected {HEADER_BYTES} and {length}",
                {"header_length": HEADER_BYTES, "transport_length": max(length, 0)},
            )

    def _check_data_length(self, length: int) -> None:
        if not 0 < length <= PACKET_BYTES_MAX or length % BLOCK:
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"length is {length}; expected a positive multiple of {BLOCK} up to {PACKET_BYTES_MAX}",
            )

    def _check_vmsa(self, guest: Guest, length: int, header_length: int | None, transport_length: int | None) -> None:
        if not guest.policy.es:
            self.refuse(FirmwareStatus.POLICY_FAILURE, f"guest {guest.handle} has no encrypted register state")
        self._check_room(length, header_length, transport_length)
        if length != PAGE:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected {PAGE}", {"length": PAGE})

    def _check_packet(self, header: BytesLike, length: int, transport: BytesLike) -> None:
        sizes = size_of(header), size_of(transport)
        if sizes != (HEADER_BYTES, length):
            self.refuse(
                FirmwareStatus.INVALID_LENGTH,
                f"header and transport have {sizes[0]} and {sizes[1]} bytes; expected {HEADER_BYTES} and {length}",
                {"header_length": HEADER_BYTES, "transport_length": length},
            )

    def _sealed(self, kind: int, guest: Guest, place: int, length: int, asid: int) -> tuple[bytes, bytes]:
        tek, tik = self.migration_keys(guest)
        plaintext = bytearray(length)
        try:
            self.memory.read_into(place, plaintext, asid)
            return seal_packet(kind, tek, tik, plaintext, iv=self.random(16))
        finally:
            wipe(plaintext)

    def _opened(self, kind: int, guest: Guest, header: BytesLike, place: int, transport: BytesLike, asid: int) -> None:
        tek, tik = self.migration_keys(guest)
        try:
            plaintext = open_packet(kind, tek, tik, header, transport)
        except AuthenticationError:
            self.refuse(FirmwareStatus.BAD_MEASUREMENT, "the packet's MAC does not match this migration")
        except (ArgumentError, FormatError) as problem:
            self.refuse(FirmwareStatus.INVALID_PARAM, str(problem))
        try:
            self.memory.write(place, plaintext, asid)
        finally:
            wipe(plaintext)
        guest.encrypted = True
