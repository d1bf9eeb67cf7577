"""ATTESTATION: a guest's request page becomes a report in the same page; or 208 bytes for the host.

Request and reports: :mod:`csvfast.report`. The page belongs to the guest: it is read and written under the guest's ASID, as KVM
hands it to the firmware (openEuler kernel arch/x86/kvm/svm/csv.c, hypercall 100). In which guest states the command is allowed,
and the code for a wrong request hash, are inferred.

An extended request (report V2) is answered with V2 only for a CSV3 guest on a profile that has it; elsewhere the firmware knows
no extension, sees the legacy request that its first 112 bytes are, and answers V1.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.certs.fields import to_field
from csvfast.errors import FirmwareStatus, FormatError
from csvfast.processor.buffers import copy_of
from csvfast.processor.core import PAGE, ProcessorCore
from csvfast.processor.derivation import wipe
from csvfast.processor.sealing import sealing_key
from csvfast.processor.states import GuestState
from csvfast.report.build import build_report_v1, build_report_v2
from csvfast.report.layout import REPORT_SIGNATURE_ALGORITHM, REPORT_SIGNER_USAGE
from csvfast.report.request import EXTENDED_BYTES, ReportRequest

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.processor.guest import Guest

__all__ = ["HOST_REPORT_BYTES", "AttestationCommands"]

HOST_REPORT_BYTES: Final = 208
_HOST_SIGNED: Final = 52
_NONCE: Final = 16


class AttestationCommands(ProcessorCore):
    """ATTESTATION in its two forms."""

    def attestation(self, handle: int, address: int, length: int) -> None:
        """ATTESTATION from the guest: the request in its page at `address` is answered in place.

        Args: address: a page; length: a multiple of 4096, of which the first page is used.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE (LSECRET or RUNNING needed), INACTIVE,
            INVALID_LENGTH, INVALID_ADDRESS, INVALID_PARAM (request flags), SECURE_DATA_INVALID (request hash).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LSECRET, GuestState.RUNNING)
            asid = self.active_asid(guest)
            if length < PAGE or length % PAGE:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"length is {length}; expected a positive multiple of {PAGE}",
                    {"length": PAGE},
                )
            place = self.physical(address, PAGE, PAGE, private=guest.policy.csv3)
            # The request alone: the page may still hold the sealing key of an earlier answer.
            page = self.report_page(guest, self.memory.read(place, EXTENDED_BYTES, asid))
            try:
                self.memory.write(place, page, asid)
            finally:
                wipe(page)

    def attestation_host(self, handle: int, mnonce: BytesLike, *, buffer_length: int | None = None) -> bytes:
        """ATTESTATION asked for by the host (csv-rs src/api/launch/types.rs, after AMD's command).

        Args: mnonce: 16 bytes. buffer_length: room in the host's buffer, None = enough.
        Returns: 208 bytes: mnonce 16, digest 32, policy 4, sig_usage 4, sig_algo 4, reserved 4, r 72, s 72; the PEK signs the
            first 52 (AMD publication 55766; inferred for Hygon).
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE, INVALID_LENGTH, INVALID_PARAM (mnonce's length).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LSECRET, GuestState.RUNNING)
            if buffer_length is not None and buffer_length < HOST_REPORT_BYTES:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"the buffer has {buffer_length} bytes; expected {HOST_REPORT_BYTES}",
                    {"length": HOST_REPORT_BYTES},
                )
            nonce = copy_of(mnonce)
            if len(nonce) != _NONCE:
                self.refuse(FirmwareStatus.INVALID_PARAM, f"mnonce has {len(nonce)} bytes; expected {_NONCE}")
            identity = self.identity
            if guest.measure is None or identity is None:
                self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {handle} has no final launch digest")
            body = nonce + guest.measure + guest.policy.to_bytes()
            words = REPORT_SIGNER_USAGE.to_bytes(4, "little") + REPORT_SIGNATURE_ALGORITHM.to_bytes(4, "little")
            signature = identity.pek_key.sign(body[:_HOST_SIGNED], user_id=identity.pek.user_id)
            return body + words + bytes(4) + to_field(signature[:32]) + to_field(signature[32:])

    def report_page(self, guest: Guest, page: bytes) -> bytearray:
        """The page that answers a request (its page, or the first 132 bytes): 4096 bytes with the sealing key in them, for the
        caller to wipe.

        The guest's state has been checked. Refuses: INVALID_PARAM, SECURE_DATA_INVALID, INVALID_GUEST_STATE.
        """
        try:
            request = ReportRequest.parse(page)
        except FormatError as problem:
            self.refuse(FirmwareStatus.INVALID_PARAM, str(problem))
        if not request.hash_is_valid:
            self.refuse(FirmwareStatus.SECURE_DATA_INVALID, "the request's hash is not that of its data and mnonce")
        identity = self.identity
        if guest.measure is None or identity is None:
            self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {guest.handle} has no final launch digest")
        seal = sealing_key(self.chip.root_secret, guest)
        try:
            if request.extended and guest.policy.csv3 and self.profile.extended_report:
                return build_report_v2(
                    user_pubkey_digest=guest.user_pubkey_digest,
                    vm_id=guest.vm_id,
                    vm_version=guest.vm_version,
                    report_data=request.data,
                    mnonce=request.mnonce,
                    measure=guest.measure,
                    policy=guest.policy,
                    build=self.profile.build,
                    rtmr_version=guest.rtmr_version,
                    rtmrs=guest.rtmrs,
                    pek_key=identity.pek_key,
                    pek=identity.pek,
                    chip_id=self.chip.chip_id,
                    sealing_key=seal,
                )
            return build_report_v1(
                user_pubkey_digest=guest.user_pubkey_digest,
                vm_id=guest.vm_id,
                vm_version=guest.vm_version,
                report_data=request.data,
                mnonce=request.mnonce,
                measure=guest.measure,
                policy=guest.policy,
                anonce=self._anonce(),
                pek_key=identity.pek_key,
                pek=identity.pek,
                chip_id=self.chip.chip_id,
                sealing_key=seal,
            )
        finally:
            wipe(seal)

    def _anonce(self) -> bytes:
        """Four random bytes that are not all zero: a zero mask hides nothing."""
        while True:
            mask = bytes(self.random(4))
            if any(mask):
                return mask
