"""AMD's session blob, 128 bytes, for software that speaks AMD's SEV protocol (Options.session_layout = "amd").

     0  16 nonce    16  32 wrap_tk    48  16 wrap_iv    64  32 wrap_mac    96  32 policy_mac

    master = KDF(z, "sev-master-secret", nonce, 16); kek = KDF(master, "sev-kek", "", 16); kik = KDF(master, "sev-kik", "", 16)
    wrap_tk = AES-128-CTR(kek, wrap_iv, TEK || TIK); wrap_mac = HMAC-SHA-256(kik, wrap_tk)
    policy_mac = HMAC-SHA-256(TIK, policy)

Sources: virtee/sev src/session/{mod,key}.rs, AMDESE/sev-tool. AMD's z is the shared x coordinate of ECDH on P-384, for which a
CSV part has no key: here z is the GB/T 32918.3 agreement of the owner's and the platform's DH keys, each serving as its own
ephemeral key as well, with the user ids of their certificates (project-defined; only this project speaks it).

Only the session is AMD's then: measurement and packets stay those of launch.py and packet.py, over SM3 and SM4.

Thread-safety: functions without state.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Final

from csvfast.crypto import Secret, SM2PrivateKey
from csvfast.errors import CsvfastError, FirmwareError, FirmwareStatus
from csvfast.processor.buffers import copy_of, view_of
from csvfast.processor.derivation import derive_amd, wipe
from csvfast.processor.session import GUEST_USER_ID, OpenedSession, OwnerSession, make_dh_certificate, public_key_digest

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.certs.layout import CsvCertificate
    from csvfast.report.policy import GuestPolicy

__all__ = ["AMD_SESSION_BYTES", "make_amd_session", "open_amd_session"]

AMD_SESSION_BYTES: Final = 128
_KEY: Final = 16


def make_amd_session(
    pdh: CsvCertificate, policy: GuestPolicy, *, key: SM2PrivateKey | None = None, user_id: bytes = GUEST_USER_ID
) -> OwnerSession:
    """The guest owner's side. Arguments as make_session() of session.py; the layout has no room for vm_id and the rest."""
    owner = key or SM2PrivateKey.generate()
    tek, tik = Secret.random(_KEY), Secret.random(_KEY)
    nonce, wrap_iv = os.urandom(16), os.urandom(16)
    z, _, _ = owner.agree(
        owner, pdh.public_key, pdh.public_key, _KEY, initiator=True, user_id=user_id, peer_user_id=pdh.user_id
    )
    kek, kik = _wrapping_keys(z, nonce)
    keys = Secret.concatenate(tek, tik)
    try:
        wrap_tk = bytes(_aes_ctr(kek, wrap_iv, keys))
        wrap_mac = _hmac(kik, wrap_tk)
    finally:
        keys.wipe()
        wipe(kek, kik)
    blob = nonce + wrap_tk + wrap_iv + wrap_mac + _hmac(tik, policy.to_bytes())
    return OwnerSession(make_dh_certificate(owner, user_id), blob, tek, tik, owner)


def open_amd_session(
    data: BytesLike, pdh_key: SM2PrivateKey, pdh_user_id: bytes, dh: CsvCertificate, policy: GuestPolicy
) -> OpenedSession:
    """The firmware's side. Raises FirmwareError: INVALID_LENGTH, BAD_MEASUREMENT."""
    raw = copy_of(data)
    if len(raw) != AMD_SESSION_BYTES:
        raise FirmwareError(
            FirmwareStatus.INVALID_LENGTH,
            f"the session has {len(raw)} bytes; expected {AMD_SESSION_BYTES}",
            {"session_length": AMD_SESSION_BYTES},
        )
    nonce, wrap_tk, wrap_iv, wrap_mac, policy_mac = raw[:16], raw[16:48], raw[48:64], raw[64:96], raw[96:]
    try:
        z, _, _ = pdh_key.agree(
            pdh_key, dh.public_key, dh.public_key, _KEY, initiator=False, user_id=pdh_user_id, peer_user_id=dh.user_id
        )
    except CsvfastError:
        raise _mismatch("the DH key agrees on nothing with this platform's PDH") from None
    kek, kik = _wrapping_keys(z, nonce)
    keys = bytearray()
    try:
        if not hmac.compare_digest(_hmac(kik, wrap_tk), wrap_mac):
            raise _mismatch("wrap_mac does not cover the wrapped keys")
        keys = _aes_ctr(kek, wrap_iv, wrap_tk)
        tek, tik = Secret(memoryview(keys)[:_KEY]), Secret(memoryview(keys)[_KEY:])
    finally:
        wipe(kek, kik, keys)
    if not hmac.compare_digest(_hmac(tik, policy.to_bytes()), policy_mac):
        raise _mismatch("policy_mac does not cover this policy")
    return OpenedSession(tek, tik, user_pubkey_digest=public_key_digest(dh))


def _wrapping_keys(z: Secret, nonce: bytes) -> tuple[bytearray, bytearray]:
    master = derive_amd(z, b"sev-master-secret", nonce, _KEY)
    z.wipe()
    try:
        return derive_amd(master, b"sev-kek", b"", _KEY), derive_amd(master, b"sev-kik", b"", _KEY)
    finally:
        wipe(master)


def _hmac(key: BytesLike, data: bytes) -> bytes:
    secret = bytearray(view_of(key))
    try:
        return hmac.new(secret, data, hashlib.sha256).digest()
    finally:
        wipe(secret)


def _aes_ctr(key: bytearray, iv: bytes, data: BytesLike) -> bytearray:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    content = view_of(data)
    out = bytearray(content.nbytes + 15)
    count = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update_into(content, out)
    try:
        return out[:count]
    finally:
        wipe(out)


def _mismatch(message: str) -> FirmwareError:
    return FirmwareError(FirmwareStatus.BAD_MEASUREMENT, message)
