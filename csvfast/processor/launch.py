"""LAUNCH_START to LAUNCH_FINISH: the guest's context, its encrypted and measured memory, its secrets.

Checks and codes: torvalds/linux include/linux/psp-sev.h, AMDESE/sev-tool; where only AMD publication 55766 has them they are
inferred for Hygon. A session's vm_digest is compared at LAUNCH_MEASURE; if it differs the command answers BAD_MEASUREMENT, and so
does every later launch command of that guest: it never runs (vendor documentation; code and place are inferred).

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.crypto import Secret, hmac_sm3
from csvfast.errors import ArgumentError, AuthenticationError, FirmwareStatus, FormatError
from csvfast.processor.attestation import AttestationCommands
from csvfast.processor.buffers import size_of
from csvfast.processor.core import PAGE
from csvfast.processor.debug import DebugCommands
from csvfast.processor.derivation import wipe
from csvfast.processor.guest import Guest
from csvfast.processor.lifecycle import LifecycleCommands
from csvfast.processor.packet import HEADER_BYTES, KIND_SECRET, open_packet
from csvfast.processor.session import OpenedSession, check_dh_certificate, open_session
from csvfast.processor.states import GuestState, PlatformState
from csvfast.report.policy import GuestPolicy

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["MEASURE_BYTES", "SECRET_BYTES_MAX", "LaunchCommands", "measurement_message"]

MEASURE_BYTES: Final = 48
SECRET_BYTES_MAX: Final = 16 * 1024
BLOCK: Final = 16
_KEY: Final = 16
_MEASURE_KIND: Final = b"\x04"


def measurement_message(
    api: tuple[int, int], policy: GuestPolicy, digest: bytes, mnonce: bytes, build: int | None = None
) -> bytes:
    """What the HMAC of LAUNCH_MEASURE covers: 04, API major and minor, [low byte of the build,] policy, digest, nonce.

    Which of the two forms Hygon's firmware has is not public (inferred); AMD's has the build (AMDESE/sev-tool).
    """
    version = bytes(api) if build is None else bytes((*api, build & 0xFF))
    return _MEASURE_KIND + version + policy.to_bytes() + digest + mnonce


class LaunchCommands(LifecycleCommands, AttestationCommands, DebugCommands):
    """The launch commands, with those every guest has, attestation and debugging."""

    def launch_start(
        self,
        policy: GuestPolicy | int,
        *,
        dh: BytesLike = b"",
        session: BytesLike = b"",
        handle: int = 0,
        user_id: bytes | None = None,
    ) -> int:
        """LAUNCH_START: makes a guest, which must then be activated.

        Args:
            policy: policy word.
            dh, session: the owner's DH certificate and session blob, both or neither. Without them the transport keys are
                random and nobody can inject secrets.
            handle: another guest whose memory key is to be shared; 0 = a key of its own.
            user_id: who the VMM says the guest belongs to; for the sharing of ASIDs.
        Returns: the handle.
        Refuses: INVALID_PLATFORM_STATE; INVALID_GUEST (no guest `handle`); POLICY_FAILURE (newer API than this firmware's, ES
            or CSV3 not available, keys may not be shared); INVALID_CERTIFICATE; INVALID_LENGTH; BAD_SIGNATURE; BAD_MEASUREMENT;
            RESOURCE_LIMIT.
        """
        word = policy if isinstance(policy, GuestPolicy) else GuestPolicy(policy)
        with self.lock:
            self.require_platform(PlatformState.INIT, PlatformState.WORKING)
            other = None
            if handle:
                other = self.guests.get(handle)
                if other is None:
                    self.refuse(FirmwareStatus.INVALID_GUEST, f"no guest has handle {handle}")
            self.check_policy(word)
            if other is not None and (word.noks or word != other.policy):
                self.refuse(FirmwareStatus.POLICY_FAILURE, f"the policies do not let guest {handle} share its key")
            opened = self._open_session(dh, session, word)
            try:
                guest = self.new_guest(
                    word,
                    state=GuestState.LUPDATE,
                    vek=None if other is None else Secret(other.vek),
                    tek=opened.tek,
                    tik=opened.tik,
                    vm_id=opened.vm_id,
                    vm_version=opened.vm_version,
                    user_data=opened.user_data,
                    user_pubkey_digest=opened.user_pubkey_digest,
                    vm_digest=opened.vm_digest,
                    # An owner whom the session does not name is nobody's sibling: the host could sign that session again.
                    user_id=user_id if any(opened.user_pubkey_digest) or not size_of(session) else None,
                )
            except BaseException:
                opened.tek.wipe()
                opened.tik.wipe()
                raise
            return guest.handle

    def launch_update_data(self, handle: int, address: int, length: int) -> None:
        """LAUNCH_UPDATE_DATA: plaintext the host put there is measured and encrypted in place, in one pass.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE, BAD_MEASUREMENT (vm_digest), UNSUPPORTED (a CSV3
            guest), INACTIVE, INVALID_LENGTH, INVALID_ADDRESS.
        """
        with self.lock:
            guest, asid = self._updating(handle)
            if length <= 0 or length % BLOCK:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected a positive multiple of {BLOCK}"
                )
            place = self.physical(address, length, BLOCK)
            self.memory.launch_update(place, length, asid, linear=guest.digest)
            guest.encrypted = True

    def launch_update_vmsa(self, handle: int, address: int, length: int) -> None:
        """LAUNCH_UPDATE_VMSA: one page of register state is encrypted in place, and measured if Options.vmsa_measured.

        Refuses: as LAUNCH_UPDATE_DATA; POLICY_FAILURE (policy without ES).
        """
        with self.lock:
            guest, asid = self._updating(handle)
            if not guest.policy.es:
                self.refuse(FirmwareStatus.POLICY_FAILURE, f"guest {handle} has no encrypted register state")
            if length != PAGE:
                self.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {length}; expected {PAGE}", {"length": PAGE})
            place = self.physical(address, length, PAGE)
            if self.options.vmsa_measured:
                self.memory.launch_update(place, length, asid, linear=guest.digest)
            else:
                self.memory.encrypt_in_place(place, length, asid)
            guest.encrypted = True

    def launch_measure(self, handle: int, *, buffer_length: int | None = None) -> bytes:
        """LAUNCH_MEASURE: ends the launch digest.

        Args: buffer_length: room in the host's buffer, None = enough.
        Returns: 48 bytes, HMAC-SM3(TIK; measurement_message()) and the random mnonce in it.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE, INVALID_LENGTH, BAD_MEASUREMENT (the digest is not
            the session's vm_digest: the guest never runs).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LUPDATE)
            if buffer_length is not None and buffer_length < MEASURE_BYTES:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"the buffer has {buffer_length} bytes; expected {MEASURE_BYTES}",
                    {"length": MEASURE_BYTES},
                )
            self._not_refused(guest)
            digest = guest.digest.digest()
            if guest.vm_digest is not None and digest != guest.vm_digest:
                guest.refused = True
                self._not_refused(guest)
            mnonce = bytes(self.random(16))
            build = self.profile.build if self.options.measure_blob == "api-build-policy" else None
            message = measurement_message(self.profile.api, guest.policy, digest, mnonce, build)
            if guest.tik is None:
                self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {handle} has no transport keys")
            guest.launch_measure = hmac_sm3(guest.tik, message).digest()
            guest.mnonce = mnonce
            guest.set_measure(digest)
            guest.state = GuestState.LSECRET
            return guest.launch_measure + mnonce

    def launch_secret(self, handle: int, header: BytesLike, address: int, length: int, transport: BytesLike) -> None:
        """LAUNCH_SECRET: the owner's secret is decrypted and written as the guest's memory.

        Args:
            header: 52 bytes (packet.py). address, length: where it goes. transport: the ciphertext, as long as `length`.
        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE, INACTIVE, INVALID_LENGTH, INVALID_ADDRESS,
            INVALID_PARAM (compressed, or unknown flags), BAD_MEASUREMENT (MAC).
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LSECRET)
            asid = self.active_asid(guest)
            size = size_of(transport)
            if size_of(header) != HEADER_BYTES:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"the header has {size_of(header)} bytes; expected {HEADER_BYTES}",
                    {"header_length": HEADER_BYTES},
                )
            if not 0 < length <= SECRET_BYTES_MAX or length % BLOCK or size != length:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"guest length is {length}, transport length {size}; expected the same multiple of {BLOCK} up to "
                    f"{SECRET_BYTES_MAX}",
                )
            spans = self.secret_spans(guest, address, length)
            if guest.tek is None or guest.tik is None or guest.launch_measure is None:
                self.refuse(FirmwareStatus.INVALID_GUEST_STATE, f"guest {handle} has no transport keys")
            try:
                secret = open_packet(KIND_SECRET, guest.tek, guest.tik, header, transport, measure=guest.launch_measure)
            except AuthenticationError:
                self.refuse(FirmwareStatus.BAD_MEASUREMENT, "the secret's MAC does not match this guest")
            except (ArgumentError, FormatError) as problem:
                self.refuse(FirmwareStatus.INVALID_PARAM, str(problem))
            try:
                done = 0
                with memoryview(secret) as view:
                    for place, count in spans:
                        self.memory.write(place, view[done : done + count], asid)
                        done += count
            finally:
                wipe(secret)
            guest.encrypted = True

    def launch_finish(self, handle: int) -> None:
        """LAUNCH_FINISH: the transport keys are erased and the guest may run.

        Refuses: INVALID_PLATFORM_STATE, INVALID_GUEST, INVALID_GUEST_STATE.
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_state(guest, GuestState.LSECRET)
            guest.erase_transport_keys()
            guest.state = GuestState.RUNNING

    # ---- Behind the commands

    def check_policy(self, policy: GuestPolicy) -> None:
        """POLICY_FAILURE unless this firmware can keep the policy: API version, ES, CSV3."""
        if (policy.api_major, policy.api_minor) > self.profile.api:
            self.refuse(
                FirmwareStatus.POLICY_FAILURE,
                f"the policy needs API {policy.api_major}.{policy.api_minor}; this firmware has "
                f"{self.profile.api_major}.{self.profile.api_minor}",
            )
        if (policy.es or policy.csv3) and not self.es_enabled:
            self.refuse(FirmwareStatus.POLICY_FAILURE, "the policy needs ES; INIT did not enable it")
        if policy.csv3 and not self.profile.csv3:
            self.refuse(FirmwareStatus.POLICY_FAILURE, "the policy needs CSV3; this part has none")

    def secret_spans(self, _guest: Guest, address: int, length: int) -> list[tuple[int, int]]:
        """Physical places and lengths a launch secret goes to. CSV3 overrides it: there the address is a guest's."""
        return [(self.physical(address, length, BLOCK), length)]

    def _updating(self, handle: int) -> tuple[Guest, int]:
        guest = self.guest(handle)
        self.require_state(guest, GuestState.LUPDATE)
        self._not_refused(guest)
        if guest.policy.csv3:
            self.refuse(
                FirmwareStatus.UNSUPPORTED, f"guest {handle} is a CSV3 guest: LAUNCH_ENCRYPT_DATA is its command"
            )
        return guest, self.active_asid(guest)

    def _not_refused(self, guest: Guest) -> None:
        if guest.refused:
            self.refuse(
                FirmwareStatus.BAD_MEASUREMENT,
                f"the launch digest of guest {guest.handle} is not the vm_digest of its session",
            )

    def _open_session(self, dh: BytesLike, session: BytesLike, policy: GuestPolicy) -> OpenedSession:
        if not size_of(dh) and not size_of(session):
            return OpenedSession(self.random_secret(_KEY), self.random_secret(_KEY))
        return self.open_owner_session(dh, session, policy)

    def open_owner_session(self, dh: BytesLike, session: BytesLike, policy: GuestPolicy) -> OpenedSession:
        """Reads DH certificate and session blob in the layout of Options.session_layout, for this platform's PDH.

        Refuses: INVALID_CERTIFICATE, INVALID_LENGTH, BAD_SIGNATURE, BAD_MEASUREMENT.
        """
        identity = self.identity
        if identity is None:
            self.refuse(FirmwareStatus.INVALID_PLATFORM_STATE, "the platform has not been initialised")
        certificate = check_dh_certificate(dh)
        if self.options.session_layout == "amd":
            from csvfast.processor.session_amd import open_amd_session

            return open_amd_session(session, identity.pdh_key, identity.pdh.user_id, certificate, policy)
        return open_session(session, identity.pdh_key, certificate, policy)
