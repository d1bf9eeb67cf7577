"""Commands of the platform: INIT to SHUTDOWN, the keys PEK, PDH and OCA, ownership, flushing.

States, checks and codes: section 5 of AMD publication 55766 as AMDESE/sev-tool and Hygon's csv-dev.c use it. What is only
AMD's is inferred for Hygon.

Thread-safety: each command holds the processor's lock.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage, SignatureSlot
from csvfast.crypto import sm3
from csvfast.errors import CsvfastError, FirmwareError, FirmwareStatus, FormatError, StateError
from csvfast.processor.buffers import copy_of, size_of
from csvfast.processor.core import PAGE, ProcessorCore
from csvfast.processor.identity import PlatformIdentity
from csvfast.processor.nv import BLANK, NONCE_BYTES, NV_BYTES, is_blank, seal_state, unseal_state
from csvfast.processor.session import require_zero_reserved
from csvfast.processor.states import PlatformState

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.crypto import SM2PrivateKey

__all__ = ["CHIP_ID_BYTES", "TMR_BYTES", "PlatformCommands", "PlatformStatus"]

TMR_BYTES: Final = 1 << 20
CHIP_ID_BYTES: Final = 64
FIRMWARE_BYTES_MAX: Final = 0x80000
OCA_USER_ID: Final = b"HYGON-SSD-OCA"
PEK_USER_ID: Final = b"HYGON-SSD-PEK"
PDH_USER_ID: Final = b"HYGON-SSD-PDH"

_HOST: Final = 0  # the host's ASID
_INIT = PlatformState.INIT
_WORKING = PlatformState.WORKING


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """Answer of PLATFORM_STATUS (csv-rs src/api/platform/types.rs, csv-dev.c)."""

    api_major: int
    api_minor: int
    state: PlatformState
    owner: bool
    chip_secure: bool
    fw_enc: bool
    fw_sign: bool
    config_es: bool
    build: int
    guest_count: int

    def encode(self) -> bytes:
        """The 12 bytes: major, minor, state, flags, u32 {config_es:1, build:31}, u32 guest count."""
        flags = self.owner | self.chip_secure << 1 | self.fw_enc << 2 | self.fw_sign << 3
        return (
            bytes((self.api_major, self.api_minor, self.state, flags))
            + (self.config_es | self.build << 1).to_bytes(4, "little")
            + self.guest_count.to_bytes(4, "little")
        )


class PlatformCommands(ProcessorCore):
    """The platform commands."""

    # ---- INIT to SHUTDOWN

    def init(self, *, es: bool = False, tmr_address: int = 0, tmr_length: int = 0) -> None:
        """INIT: makes or loads the platform's keys.

        Args:
            es: flags bit 0, encrypted register state: CSV2 and CSV3 guests become possible.
            tmr_address, tmr_length: the firmware's own memory, needed with `es`: at least 1 MiB on a 1 MiB boundary; no
                command reaches into it afterwards.
        Refuses: INVALID_PLATFORM_STATE, INVALID_LENGTH, INVALID_ADDRESS, HWERROR_PLATFORM (the state directory fails).
        """
        with self.lock:
            self.require_platform(PlatformState.UNINIT)
            region = self._tmr_region(tmr_length, tmr_address) if es else None
            identity = self.identity or self._stored_identity()
            if identity is None:
                identity = self._self_owned_identity()
                self._store(identity)
            self.nv_address = None
            self._begin(identity, es, region)

    def init_ex(
        self, *, nv_address: int = 0, nv_length: int = 0, es: bool = False, tmr_address: int = 0, tmr_length: int = 0
    ) -> None:
        """INIT_EX: INIT with the keys in an NV area, memory that the host keeps for the firmware (nv.py).

        The keys of the area are used instead of the part's own, whether those stand in a state directory or in this object; they
        are back with the next INIT. Each command that changes keys rewrites the area before it answers.

        Args:
            nv_address, nv_length: the area, at least 32 KiB on a page boundary, of which the first 32 KiB are used; blank (all
                0xff, all zero) at the first start. Both 0: there is none, as INIT.
            es, tmr_address, tmr_length: as INIT's.
        Refuses: as INIT; INVALID_LENGTH, INVALID_ADDRESS (outside the memory, within the TMR); SECURE_DATA_INVALID for an area
            that is damaged or another chip's. The next INIT_EX with the very same bytes makes new keys over it: Linux' sev-dev.c
            tries once more after that status and expects a reset state.
        """
        if nv_address == 0 and nv_length == 0:
            return self.init(es=es, tmr_address=tmr_address, tmr_length=tmr_length)
        with self.lock:
            self.require_platform(PlatformState.UNINIT)
            if nv_length < NV_BYTES:
                message = f"the NV area has {nv_length} bytes; expected at least {NV_BYTES}"
                self.refuse(FirmwareStatus.INVALID_LENGTH, message, {"nv_length": NV_BYTES})
            region = self._tmr_region(tmr_length, tmr_address) if es else None
            place = self.physical(nv_address, nv_length, PAGE)
            if region is not None and place < sum(region) and region[0] < place + nv_length:
                self.refuse(FirmwareStatus.INVALID_ADDRESS, f"the NV area at {place:#x} reaches into the TMR")
            identity = self._identity_in(self.memory.read(place, NV_BYTES, _HOST))
            if identity is None:
                identity = self._self_owned_identity()
                self._write_nv(place, identity)
            self._nv_refused = None
            self.nv_address = place
            self._own_identity = self.identity
            self._begin(identity, es, region)
            return None

    def shutdown(self) -> None:
        """SHUTDOWN: every guest is lost, its key gone from memory. Their ASIDs stay to be flushed.

        Refuses: INVALID_PLATFORM_STATE.
        """
        with self.lock:
            self.require_platform(_INIT, _WORKING)
            for guest in list(self.guests.values()):
                self.unbind(guest)
                self.drop_guest(guest)
            self.state = PlatformState.UNINIT
            self.es_enabled = False
            self.tmr = None
            if self.nv_address is not None:  # INIT finds the part's own keys again, INIT_EX reads the area anew
                self.identity, self._own_identity = self._own_identity, None

    def factory_reset(self) -> None:
        """FACTORY_RESET: PEK, PDH, OCA and ownership are deleted; the next INIT makes new ones, self-owned.

        After an INIT_EX it is the NV area that is blanked, and the part's own keys stay (Linux sends SHUTDOWN, then this, and
        stores the area).

        Refuses: INVALID_PLATFORM_STATE (only UNINIT), HWERROR_PLATFORM.
        """
        with self.lock:
            self.require_platform(PlatformState.UNINIT)
            if self.nv_address is not None:
                self.memory.write(self.physical(self.nv_address, NV_BYTES), BLANK, _HOST)
                return
            if self.storage is not None:
                try:
                    self.storage.erase()
                except (OSError, StateError) as problem:
                    self.identity = None  # the next INIT takes what the directory has, the old keys or none
                    self.refuse(FirmwareStatus.HWERROR_PLATFORM, f"the stored state cannot be deleted: {problem}")
            self.identity = None

    def platform_status(self) -> PlatformStatus:
        """PLATFORM_STATUS, allowed in every state."""
        with self.lock:
            return PlatformStatus(
                api_major=self.profile.api_major,
                api_minor=self.profile.api_minor,
                state=self.state,
                owner=self.state is not PlatformState.UNINIT and self.owned_identity.externally_owned,
                chip_secure=True,
                fw_enc=True,
                fw_sign=True,
                config_es=self.es_enabled,
                build=self.profile.build,
                guest_count=len(self.guests),
            )

    def download_firmware(self, image: BytesLike) -> None:
        """DOWNLOAD_FIRMWARE: checks state and length, then refuses with BAD_SIGNATURE.

        Only Hygon signs firmware and neither format nor key is public, so no image can be genuine here. The profile says which
        firmware the processor is.
        """
        with self.lock:
            if not self.profile.runtime_download:
                self.require_platform(PlatformState.UNINIT)
            else:
                self.require_platform(PlatformState.UNINIT, _INIT)
            size = size_of(image)
            if not 0 < size <= FIRMWARE_BYTES_MAX:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH, f"the image has {size} bytes; expected 1 .. {FIRMWARE_BYTES_MAX}"
                )
            self.refuse(FirmwareStatus.BAD_SIGNATURE, "the image is not signed for this part")

    def get_id(self, *, buffer_length: int | None = None) -> bytes:
        """GET_ID: the chip id, ASCII, NUL-padded to 64 bytes. Allowed in every state. Refuses: INVALID_LENGTH."""
        self._room("length", buffer_length, CHIP_ID_BYTES)
        return self.chip.chip_id.encode("ascii").ljust(CHIP_ID_BYTES, b"\0")

    # ---- Keys and ownership

    @property
    def owned_identity(self) -> PlatformIdentity:
        """The platform's keys; the platform must be initialised."""
        if self.identity is None:
            self.refuse(FirmwareStatus.INVALID_PLATFORM_STATE, "the platform has not been initialised")
        return self.identity

    def pek_gen(self) -> None:
        """PEK_GEN: a new OCA, PEK and PDH; the platform owns itself again. Refuses: INVALID_PLATFORM_STATE, HWERROR_PLATFORM."""
        with self.lock:
            self.require_platform(_INIT)
            identity = self._self_owned_identity()
            self._store(identity)
            self.identity = identity

    def pek_csr(self, *, buffer_length: int | None = None) -> bytes:
        """PEK_CSR: the PEK certificate with empty slots, 2084 bytes, for the owner to sign. Refuses: INVALID_LENGTH."""
        with self.lock:
            self.require_platform(_INIT)
            self._room("length", buffer_length, CsvCertificate.BYTES)
            return self.owned_identity.pek.with_empty_slot(1).with_empty_slot(2).encoded

    def pek_cert_import(self, pek: BytesLike, oca: BytesLike) -> None:
        """PEK_CERT_IMPORT: the platform belongs to the OCA that signed its PEK; a new PDH follows.

        Args: pek: what PEK_CSR gave, signed by the owner in either slot. oca: the owner's self-signed certificate.
        Refuses: INVALID_PLATFORM_STATE; ALREADY_OWNED; INVALID_LENGTH; INVALID_CERTIFICATE (unreadable, wrong usage, a PEK
            that is not this platform's); BAD_SIGNATURE; HWERROR_PLATFORM.
        """
        with self.lock:
            self.require_platform(_INIT)
            identity = self.owned_identity
            if identity.externally_owned:
                self.refuse(FirmwareStatus.ALREADY_OWNED, "the platform has an owner; PEK_GEN ends that")
            for name, data in (("pek_length", pek), ("oca_length", oca)):
                size = size_of(data)
                if size != CsvCertificate.BYTES:
                    needed = {"pek_length": CsvCertificate.BYTES, "oca_length": CsvCertificate.BYTES}
                    message = f"{name} is {size}; expected {CsvCertificate.BYTES}"
                    self.refuse(FirmwareStatus.INVALID_LENGTH, message, needed)
            try:
                owner, signed = CsvCertificate.parse(copy_of(oca)), CsvCertificate.parse(copy_of(pek))
                _require_usage(owner, KeyUsage.OCA)
                require_zero_reserved(owner, "OCA certificate")
                owner.public_key  # noqa: B018  (raises for a point off the curve)
                if signed.body != identity.pek.body:
                    raise FormatError("PEK certificate", "body", 0, "another certificate", "this platform's own")
            except CsvfastError as problem:
                self.refuse(FirmwareStatus.INVALID_CERTIFICATE, str(problem))
            self._signature_by(owner, owner, "the OCA certificate")
            owner_signature = self._signature_by(owner, signed, "the PEK certificate")
            certificate = identity.pek.with_slot(2, SignatureSlot(KeyUsage.OCA, KeyAlgorithm.SM2_SA, owner_signature))
            pdh_key = self.random_key()
            pdh = self._pdh_certificate(pdh_key, identity.pek_key)
            owned = PlatformIdentity(identity.pek_key, certificate, pdh_key, pdh, owner, None)
            self._store(owned)
            self.identity = owned

    def pdh_gen(self) -> None:
        """PDH_GEN: a new PDH, signed by the PEK. Refuses: INVALID_PLATFORM_STATE, HWERROR_PLATFORM."""
        with self.lock:
            self.require_platform(_INIT, _WORKING)
            old = self.owned_identity
            key = self.random_key()
            pdh = self._pdh_certificate(key, old.pek_key)
            identity = PlatformIdentity(old.pek_key, old.pek, key, pdh, old.oca, old.oca_key)
            self._store(identity)
            self.identity = identity

    def pdh_cert_export(self, *, pdh_length: int | None = None, chain_length: int | None = None) -> tuple[bytes, bytes]:
        """PDH_CERT_EXPORT: the PDH (2084 bytes) and PEK || OCA || CEK (6252).

        Args: room in the host's two buffers, None = enough. Refuses: INVALID_PLATFORM_STATE, INVALID_LENGTH with both lengths.
        """
        with self.lock:
            self.require_platform(_INIT, _WORKING)
            needed = {"pdh_length": CsvCertificate.BYTES, "chain_length": 3 * CsvCertificate.BYTES}
            for name, room in (("pdh_length", pdh_length), ("chain_length", chain_length)):
                if room is not None and room < needed[name]:
                    self.refuse(FirmwareStatus.INVALID_LENGTH, f"{name} is {room}; expected {needed[name]}", needed)
            identity = self.owned_identity
            return identity.pdh.encoded, identity.pek.encoded + identity.oca.encoded + self.chip.cek.encoded

    def hgsc_cert_import(self, hgscsk: BytesLike, hgsc: BytesLike) -> None:
        """HGSC_CERT_IMPORT: refused with UNSUPPORTED, since the format of Hygon's general secure certificates is not public."""
        with self.lock:
            self.require_platform(_INIT)
            if not size_of(hgscsk) or not size_of(hgsc):
                self.refuse(FirmwareStatus.INVALID_LENGTH, "an HGSC certificate is empty")
            self.refuse(FirmwareStatus.UNSUPPORTED, "general secure certificates are not supported")

    # ---- Flushing

    def wbinvd(self, core: int | None = None) -> None:
        """A core's WBINVD instruction (None = on every core); no command of the firmware.

        Raises: ValueError for a core the machine does not have.
        """
        with self.lock:
            if core is not None and not 0 <= core < self.options.cores:
                raise ValueError(f"core is {core}; expected 0 .. {self.options.cores - 1}")
            self.asids.wbinvd(core)

    def df_flush(self) -> None:
        """DF_FLUSH: released ASIDs become free. Refuses: INVALID_PLATFORM_STATE, WBINVD_REQUIRED."""
        with self.lock:
            self.require_platform(_INIT, _WORKING)
            waiting = self.asids.cores_to_flush()
            if waiting:
                cores = ", ".join(map(str, sorted(waiting)[:8]))
                self.refuse(FirmwareStatus.WBINVD_REQUIRED, f"no WBINVD since a DEACTIVATE on cores {cores}")
            self.asids.flushed()

    # ---- Behind the commands

    def _tmr_region(self, length: int, address: int) -> tuple[int, int]:
        if length < TMR_BYTES:
            message = f"the TMR has {length} bytes; expected at least {TMR_BYTES}"
            self.refuse(FirmwareStatus.INVALID_LENGTH, message, {"tmr_length": TMR_BYTES})
        return self.physical(address, length, TMR_BYTES), length

    def _begin(self, identity: PlatformIdentity, es: bool, region: tuple[int, int] | None) -> None:
        self.identity = identity
        self.es_enabled = es
        self.tmr = region
        self.state = _INIT

    def _identity_in(self, area: bytes) -> PlatformIdentity | None:
        """The keys in an NV area; None for a blank one, and for one that was refused before: it may be replaced."""
        if is_blank(area):
            return None
        try:
            return unseal_state(area, self.chip)
        except StateError as problem:
            # By its digest, so that the retry resets what was refused and not an area that came in between.
            digest = sm3(area).digest()
            if self._nv_refused == digest:
                return None
            self._nv_refused = digest
            self.refuse(FirmwareStatus.SECURE_DATA_INVALID, f"{problem}; INIT_EX again makes new keys over it")

    def _write_nv(self, address: int, identity: PlatformIdentity) -> None:
        # Checked again: since INIT_EX the host may have given the area to a guest.
        place = self.physical(address, NV_BYTES)
        self.memory.write(place, seal_state(identity, self.chip, self.random(NONCE_BYTES)), _HOST)

    def _room(self, name: str, room: int | None, needed: int) -> None:
        if room is not None and room < needed:
            self.refuse(FirmwareStatus.INVALID_LENGTH, f"{name} is {room}; expected at least {needed}", {name: needed})

    def _signature_by(self, owner: CsvCertificate, subject: CsvCertificate, what: str) -> bytes:
        """The first valid signature of the OCA over a certificate, in whichever slot its tool put it; BAD_SIGNATURE."""
        for slot in subject.slots:
            if slot.usage == KeyUsage.OCA and slot.algorithm == KeyAlgorithm.SM2_SA:
                with suppress(CsvfastError):
                    owner.public_key.verify(slot.signature, subject.body, user_id=owner.user_id)
                    return slot.signature
        raise FirmwareError(FirmwareStatus.BAD_SIGNATURE, f"{what} is not signed by the OCA")

    def _certificate(
        self, usage: KeyUsage, algorithm: KeyAlgorithm, key: SM2PrivateKey, user_id: bytes
    ) -> CsvCertificate:
        return CsvCertificate.build(
            usage=usage, algorithm=algorithm, point=key.public_key.point, user_id=user_id, api=self.profile.api
        )

    def _pdh_certificate(self, key: SM2PrivateKey, pek_key: SM2PrivateKey) -> CsvCertificate:
        unsigned = self._certificate(KeyUsage.PDH, KeyAlgorithm.SM2_DH, key, PDH_USER_ID)
        return unsigned.with_signature(1, pek_key, KeyUsage.PEK, PEK_USER_ID)

    def _self_owned_identity(self) -> PlatformIdentity:
        oca_key, pek_key, pdh_key = self.random_key(), self.random_key(), self.random_key()
        oca = self._certificate(KeyUsage.OCA, KeyAlgorithm.SM2_SA, oca_key, OCA_USER_ID)
        oca = oca.with_signature(1, oca_key, KeyUsage.OCA, OCA_USER_ID)
        pek = self._certificate(KeyUsage.PEK, KeyAlgorithm.SM2_SA, pek_key, PEK_USER_ID)
        pek = pek.with_signature(1, self.chip.cek_key, KeyUsage.CEK, self.chip.cek.user_id)
        pek = pek.with_signature(2, oca_key, KeyUsage.OCA, OCA_USER_ID)
        return PlatformIdentity(pek_key, pek, pdh_key, self._pdh_certificate(pdh_key, pek_key), oca, oca_key)

    def _stored_identity(self) -> PlatformIdentity | None:
        if self.storage is None:
            return None
        try:
            return self.storage.load()
        except (OSError, StateError) as problem:
            self.refuse(FirmwareStatus.HWERROR_PLATFORM, f"the stored state cannot be used: {problem}")

    def _store(self, identity: PlatformIdentity) -> None:
        """Before the change takes effect in this object: a crash leaves the old state or the new one."""
        if self.state is not PlatformState.UNINIT and self.nv_address is not None:
            self._write_nv(self.nv_address, identity)
            return
        if self.storage is None:
            return
        try:
            self.storage.save(identity)
        except (OSError, StateError) as problem:
            self.refuse(FirmwareStatus.HWERROR_PLATFORM, f"the state cannot be stored: {problem}")


def _require_usage(certificate: CsvCertificate, usage: KeyUsage) -> None:
    if certificate.usage != usage or certificate.algorithm != KeyAlgorithm.SM2_SA:
        raise FormatError(
            f"{usage.name} certificate",
            "usage and algorithm",
            8,
            f"{certificate.usage:#x} and {certificate.algorithm}",
            f"{int(usage):#x} and {int(KeyAlgorithm.SM2_SA)}",
        )
