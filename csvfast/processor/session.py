"""Session blobs: how a guest owner gives the firmware the transport keys and the guest's identity.

Hygon's layout, 772 bytes (openanolis/csv-rs src/session/mod.rs, src/api/launch/types.rs); AMD's stands in session_amd.py.

      0  16 nonce          16  32 wrap_tk         48  16 wrap_iv      64  32 wrap_mac        96  32 session_mac
    128  16 key_id        144 148 rnd_pub_key    292 256 ms_enc      548  32 vm_digest      580  32 pubkey_digest
    612  16 vm_id         628  16 vm_version     644  64 user_data   708  32 r (LE)         740  32 s (LE)

    z = 16 random bytes; master = Derive(z, "csv-master-secret", nonce, 32)
    kek = Derive(master, "csv-kek", "", 32)[:16]; kik = Derive(master, "csv-kik", "", 32)
    wrap_tk = SM4-CTR(kek, wrap_iv, TEK || TIK); wrap_mac = HMAC-SM3(kik, wrap_iv || wrap_tk)
    ms_enc = SM2-Encrypt(PDH, master), zero-padded
    session_mac = HMAC-SM3(TIK, policy || ms_enc || vm_digest || pubkey_digest || vm_id || vm_version || user_data)
    r, s = SM2-Sign(owner's DH key, user id of its certificate, the first 708 bytes)

Inferred: pubkey_digest is SM3 over the owner key's two 72-byte fields. The firmware here refuses another value than that or
zero, because the field goes into reports and a host could otherwise name somebody else's key. key_id and rnd_pub_key are zero,
as csv-rs leaves them, and not looked at. ms_enc is read by its point tag (04, or 02/03 compressed), not by a fixed length.

Thread-safety: functions without state; objects are immutable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from csvfast.certs.layout import CURVE_SM2, CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.crypto import SM4CTR, Secret, SM2PrivateKey, SM2PublicKey, hmac_sm3, sm3
from csvfast.errors import (
    AuthenticationError,
    CsvfastError,
    FirmwareError,
    FirmwareStatus,
    FormatError,
    LengthError,
)
from csvfast.processor.buffers import copy_of, size_of
from csvfast.processor.derivation import derive, wipe

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.report.policy import GuestPolicy

__all__ = [
    "GUEST_USER_ID",
    "SESSION_BYTES",
    "OpenedSession",
    "OwnerSession",
    "SessionBlob",
    "check_dh_certificate",
    "make_dh_certificate",
    "make_session",
    "open_session",
    "public_key_digest",
    "require_zero_reserved",
]

SESSION_BYTES: Final = 772
GUEST_USER_ID: Final = b"GUEST_USER_ID"  # csv-rs src/session/mod.rs
_SIGNED: Final = 708
_KEY: Final = 16
_MASTER: Final = 32
_MS_ENC: Final = 256
_ZERO_DIGEST: Final = bytes(32)
# Length of the encoded point by its tag (SEC 1).
_POINT_BYTES: Final = {0x02: 33, 0x03: 33, 0x04: 65, 0x06: 65, 0x07: 65}

_FIELDS: Final = (
    ("nonce", 0, 16),
    ("wrap_tk", 16, 32),
    ("wrap_iv", 48, 16),
    ("wrap_mac", 64, 32),
    ("session_mac", 96, 32),
    ("key_id", 128, 16),
    ("rnd_pub_key_data", 144, 148),
    ("ms_enc", 292, 256),
    ("vm_digest", 548, 32),
    ("pubkey_digest", 580, 32),
    ("vm_id", 612, 16),
    ("vm_version", 628, 16),
    ("user_data", 644, 64),
)


@dataclass(frozen=True, slots=True)
class SessionBlob:
    """The fields of Hygon's blob. signature: 64 bytes r||s big-endian, as everywhere in csvfast."""

    nonce: bytes
    wrap_tk: bytes
    wrap_iv: bytes
    wrap_mac: bytes
    session_mac: bytes
    key_id: bytes
    rnd_pub_key_data: bytes
    ms_enc: bytes
    vm_digest: bytes
    pubkey_digest: bytes
    vm_id: bytes
    vm_version: bytes
    user_data: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: BytesLike) -> SessionBlob:
        """From exactly 772 bytes. Raises FormatError."""
        raw = copy_of(data)
        if len(raw) != SESSION_BYTES:
            raise FormatError("session blob", "length", None, f"{len(raw)} bytes", f"{SESSION_BYTES} bytes")
        fields = {name: raw[start : start + size] for name, start, size in _FIELDS}
        return cls(**fields, signature=raw[739:707:-1] + raw[771:739:-1])

    @property
    def body(self) -> bytes:
        """The 708 bytes that are signed."""
        return b"".join(getattr(self, name) for name, _, _ in _FIELDS)

    def encode(self) -> bytes:
        """The 772 bytes. Raises LengthError for a field of another length."""
        for name, _, size in (*_FIELDS, ("signature", _SIGNED, 64)):
            if len(getattr(self, name)) != size:
                raise LengthError(f"session blob: {name} has {len(getattr(self, name))} bytes; expected {size}")
        return self.body + self.signature[31::-1] + self.signature[:31:-1]


class OwnerSession:
    """What the guest owner keeps of a session, and what travels.

    Attributes:
        certificate: the owner's DH certificate, for LAUNCH_START. blob: the session blob, for LAUNCH_START.
        tek, tik: transport keys (Secret, 16 bytes each): the owner seals launch secrets with them and checks LAUNCH_MEASURE.
        key: the owner's DH key.
    """

    __slots__ = ("blob", "certificate", "key", "tek", "tik")

    def __init__(self, certificate: CsvCertificate, blob: bytes, tek: Secret, tik: Secret, key: SM2PrivateKey) -> None:
        self.certificate = certificate
        self.blob = blob
        self.tek = tek
        self.tik = tik
        self.key = key

    def __repr__(self) -> str:
        return f"<OwnerSession, blob of {len(self.blob)} bytes>"


class OpenedSession:
    """What the firmware reads from a session."""

    __slots__ = ("tek", "tik", "user_data", "user_pubkey_digest", "vm_digest", "vm_id", "vm_version")

    def __init__(
        self,
        tek: Secret,
        tik: Secret,
        *,
        vm_id: bytes = bytes(16),
        vm_version: bytes = bytes(16),
        user_data: bytes = bytes(64),
        user_pubkey_digest: bytes = _ZERO_DIGEST,
        vm_digest: bytes | None = None,
    ) -> None:
        self.tek = tek
        self.tik = tik
        self.vm_id = vm_id
        self.vm_version = vm_version
        self.user_data = user_data
        self.user_pubkey_digest = user_pubkey_digest
        self.vm_digest = vm_digest


def public_key_digest(certificate: CsvCertificate) -> bytes:
    """SM3 over the certificate's Qx and Qy fields as they stand, 144 bytes (inferred)."""
    return sm3(certificate.encoded[20:164]).digest()


def make_dh_certificate(key: SM2PrivateKey, user_id: bytes = GUEST_USER_ID) -> CsvCertificate:
    """The guest owner's DH certificate as csv-rs makes it: usage PDH, algorithm SM2_DH, both slots empty."""
    return CsvCertificate.build(
        usage=KeyUsage.PDH, algorithm=KeyAlgorithm.SM2_DH, point=key.public_key.point, user_id=user_id
    )


def check_dh_certificate(data: BytesLike) -> CsvCertificate:
    """Reads a DH certificate as LAUNCH_START does: usage PDH, algorithm SM2_DH, a point on the SM2 curve, reserved areas zero.

    Raises FirmwareError: INVALID_LENGTH (with the length needed), INVALID_CERTIFICATE.
    """
    size = size_of(data)
    if size != CsvCertificate.BYTES:
        raise FirmwareError(
            FirmwareStatus.INVALID_LENGTH,
            f"the DH certificate has {size} bytes; expected {CsvCertificate.BYTES}",
            {"dh_length": CsvCertificate.BYTES},
        )
    try:
        certificate = CsvCertificate.parse(copy_of(data))
        for name, found, expected in (
            ("usage", certificate.usage, int(KeyUsage.PDH)),
            ("algorithm", certificate.algorithm, int(KeyAlgorithm.SM2_DH)),
            ("curve_id", certificate.curve_id, CURVE_SM2),
        ):
            if found != expected:
                raise FormatError("DH certificate", name, None, f"{found:#x}", f"{expected:#x}")
        require_zero_reserved(certificate, "DH certificate")
        certificate.public_key  # noqa: B018  (raises for a point off the curve)
    except CsvfastError as problem:
        raise FirmwareError(FirmwareStatus.INVALID_CERTIFICATE, str(problem)) from None
    return certificate


def require_zero_reserved(certificate: CsvCertificate, structure: str) -> None:
    """FormatError unless the reserved areas are zero, as the firmware demands of what it is given."""
    for name, offset, content in certificate.reserved:
        if any(content):
            at = next(index for index, byte in enumerate(content) if byte)
            raise FormatError(structure, name, offset + at, f"byte {content[at]:#04x}", "zero")


def make_session(
    pdh: CsvCertificate,
    policy: GuestPolicy,
    *,
    vm_id: bytes = bytes(16),
    vm_version: bytes = bytes(16),
    vm_digest: bytes = _ZERO_DIGEST,
    user_data: bytes = bytes(64),
    key: SM2PrivateKey | None = None,
    user_id: bytes = GUEST_USER_ID,
    tek: Secret | None = None,
    tik: Secret | None = None,
    _random: Callable[[int], bytearray] | None = None,
) -> OwnerSession:
    """The guest owner's side: new transport keys, wrapped for the platform that holds the PDH.

    Who calls this must have verified the PDH's chain first: nothing is verified here.

    Args:
        pdh: the platform's PDH certificate.
        policy: the policy the guest must be launched with.
        vm_id, vm_version: 16 bytes, user_data: 64 bytes, go into the guest's context; the first two into its reports.
        vm_digest: the only launch digest with which the guest may run, 32 bytes; zero = any.
        key: the owner's DH key; None = a new one. user_id: of its certificate.
        tek, tik: transport keys to use, 16 bytes each; None = random.
        _random: source of random bytes, for known-answer tests and the processor's own.
    Raises: LengthError, PointError.
    """
    random = _random or (lambda length: bytearray(os.urandom(length)))
    secret = Secret.random if _random is None else (lambda length: _secret(_random(length)))
    owner = key or SM2PrivateKey.generate()
    certificate = make_dh_certificate(owner, user_id)
    digest = public_key_digest(certificate)
    nonce, z, wrap_iv = bytes(random(16)), secret(16), bytes(random(16))
    tek = tek or secret(_KEY)
    tik = tik or secret(_KEY)
    if len(tek) != _KEY or len(tik) != _KEY:
        raise LengthError(f"tek and tik have {len(tek)} and {len(tik)} bytes; expected {_KEY} each")
    master = derive(z, b"csv-master-secret", nonce, _MASTER)
    kek, kik = _wrapping_keys(master)
    keys = Secret.concatenate(tek, tik)
    try:
        wrap_tk = SM4CTR(kek, wrap_iv).encrypt(keys)
        wrap_mac = hmac_sm3(kik, wrap_iv + wrap_tk).digest()
        ms_enc = pdh.public_key.encrypt(master).ljust(_MS_ENC, b"\0")
    finally:
        z.wipe()
        keys.wipe()
        wipe(master, kek, kik)
    bound = b"".join((policy.to_bytes(), ms_enc, vm_digest, digest, vm_id, vm_version, user_data))
    blob = SessionBlob(
        nonce=nonce,
        wrap_tk=wrap_tk,
        wrap_iv=wrap_iv,
        wrap_mac=wrap_mac,
        session_mac=hmac_sm3(tik, bound).digest(),
        key_id=bytes(16),
        rnd_pub_key_data=bytes(148),
        ms_enc=ms_enc,
        vm_digest=vm_digest,
        pubkey_digest=digest,
        vm_id=vm_id,
        vm_version=vm_version,
        user_data=user_data,
        signature=bytes(64),
    )
    encoded = blob.encode()
    signature = owner.sign(encoded[:_SIGNED], user_id=user_id)
    return OwnerSession(certificate, encoded[:_SIGNED] + signature[31::-1] + signature[:31:-1], tek, tik, owner)


def open_session(data: BytesLike, pdh_key: SM2PrivateKey, dh: CsvCertificate, policy: GuestPolicy) -> OpenedSession:
    """The firmware's side: everything is checked before a key is given out.

    Args:
        data: the blob. pdh_key: the platform's PDH key. dh: the owner's certificate, checked by check_dh_certificate().
        policy: of the command that brings the blob.
    Raises FirmwareError: INVALID_LENGTH; BAD_SIGNATURE; BAD_MEASUREMENT (ms_enc not for this PDH, wrap_mac, session_mac,
        pubkey_digest of another key).
    """
    size = size_of(data)
    if size != SESSION_BYTES:
        raise FirmwareError(
            FirmwareStatus.INVALID_LENGTH,
            f"the session has {size} bytes; expected {SESSION_BYTES}",
            {"session_length": SESSION_BYTES},
        )
    raw = copy_of(data)
    blob = SessionBlob.parse(raw)
    try:
        dh.public_key.verify(blob.signature, raw[:_SIGNED], user_id=dh.user_id)
    except CsvfastError:
        raise FirmwareError(FirmwareStatus.BAD_SIGNATURE, "the session is not signed by the DH key given") from None
    keys = _unwrap(blob, pdh_key)
    try:
        tek, tik = Secret(memoryview(keys)[:_KEY]), Secret(memoryview(keys)[_KEY:])
    finally:
        wipe(keys)
    bound = b"".join(
        (
            policy.to_bytes(),
            blob.ms_enc,
            blob.vm_digest,
            blob.pubkey_digest,
            blob.vm_id,
            blob.vm_version,
            blob.user_data,
        )
    )
    try:
        hmac_sm3(tik, bound).verify(blob.session_mac)
    except AuthenticationError:
        raise _mismatch("session_mac does not cover this policy and these fields") from None
    if blob.pubkey_digest not in (_ZERO_DIGEST, public_key_digest(dh)):
        raise _mismatch("pubkey_digest is not that of the DH key")
    return OpenedSession(
        tek,
        tik,
        vm_id=blob.vm_id,
        vm_version=blob.vm_version,
        user_data=blob.user_data,
        user_pubkey_digest=blob.pubkey_digest,
        vm_digest=blob.vm_digest if blob.vm_digest != _ZERO_DIGEST else None,
    )


def _unwrap(blob: SessionBlob, pdh_key: SM2PrivateKey) -> bytearray:
    try:
        master = pdh_key.decrypt_secret(_ciphertext(blob.ms_enc))
    except CsvfastError:
        raise _mismatch("ms_enc does not decrypt under this platform's PDH") from None
    kek, kik = _wrapping_keys(master)
    master.wipe()
    try:
        hmac_sm3(kik, blob.wrap_iv + blob.wrap_tk).verify(blob.wrap_mac)
        return SM4CTR(kek, blob.wrap_iv).decrypt(blob.wrap_tk, out=bytearray(2 * _KEY))
    except AuthenticationError:
        raise _mismatch("wrap_mac does not cover the wrapped keys") from None
    finally:
        wipe(kek, kik)


def _ciphertext(ms_enc: bytes) -> bytes:
    """C1||C3||C2 with an uncompressed point, out of the zero-padded field."""
    length = _POINT_BYTES.get(ms_enc[0])
    if length is None:
        raise LengthError(f"ms_enc begins with {ms_enc[0]:#04x}; expected an encoded point")
    return b"\x04" + SM2PublicKey(ms_enc[:length]).point + ms_enc[length : length + 32 + _MASTER]


def _wrapping_keys(master: BytesLike) -> tuple[bytearray, bytearray]:
    whole = derive(master, b"csv-kek", b"", 32)
    kek = whole[:_KEY]
    wipe(whole)
    return kek, derive(master, b"csv-kik", b"", 32)


def _secret(data: bytearray) -> Secret:
    try:
        return Secret(data)
    finally:
        wipe(data)


def _mismatch(message: str) -> FirmwareError:
    return FirmwareError(FirmwareStatus.BAD_MEASUREMENT, message)
