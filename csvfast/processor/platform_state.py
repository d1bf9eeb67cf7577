"""The bytes in which a platform's keys are kept: the content of platform.state, and what an NV area has sealed in it.

    0 "CSVFSTAT" 8 | 8 format version 4 | 12 flags 4 (bit 0: externally owned) | 16 PEK key 32 | 48 PDH key 32 |
    80 OCA key 32 (zero when externally owned) | 112 PEK 2084 | 2196 PDH 2084 | 4280 OCA 2084 | 6364 MAC 32

The MAC is HMAC-SM3 under a key derived from the chip's root secret: a state that was damaged, cut or taken from another chip is
refused, and so is one whose keys and certificates do not belong together. The format is the project's own.

Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.certs.layout import CSV_BYTES, CsvCertificate, KeyUsage
from csvfast.crypto import SM2PrivateKey, hmac_sm3
from csvfast.errors import AuthenticationError, CsvfastError, StateError
from csvfast.processor.derivation import derive, wipe
from csvfast.processor.identity import PlatformIdentity

if TYPE_CHECKING:
    from csvfast.certs.chip import ChipIdentity

__all__ = ["STATE_BYTES", "decode_state", "encode_state"]

STATE_BYTES: Final = 6396
_MAGIC: Final = b"CSVFSTAT"
_VERSION: Final = 1
_OWNED: Final = 1
_KEYS: Final = 16
_CERTIFICATES: Final = 112
_MAC: Final = STATE_BYTES - 32


def encode_state(identity: PlatformIdentity, chip: ChipIdentity) -> bytearray:
    """The STATE_BYTES, for the caller to wipe."""
    content = bytearray(STATE_BYTES)
    content[:8] = _MAGIC
    content[8:12] = _VERSION.to_bytes(4, "little")
    content[12:16] = (_OWNED if identity.externally_owned else 0).to_bytes(4, "little")
    for index, key in enumerate((identity.pek_key, identity.pdh_key, identity.oca_key)):
        if key is not None:
            secret = key.secret()
            content[_KEYS + 32 * index : _KEYS + 32 * (index + 1)] = memoryview(secret)
            secret.wipe()
    certificates = identity.pek.encoded + identity.pdh.encoded + identity.oca.encoded
    content[_CERTIFICATES:_MAC] = certificates
    with memoryview(content) as view:
        content[_MAC:] = _mac(chip, view[:_MAC]).digest()
    return content


def decode_state(content: bytearray, chip: ChipIdentity, where: str) -> PlatformIdentity:
    """Reads it back. `where` names it in errors.

    Raises StateError: damaged, another chip's, keys and certificates that do not belong together.
    """
    if len(content) != STATE_BYTES or content[:8] != _MAGIC:
        raise StateError(f"{where}: is no platform state of {STATE_BYTES} bytes")
    version = int.from_bytes(content[8:12], "little")
    if version != _VERSION:
        raise StateError(f"{where}: format version {version}; expected {_VERSION}")
    with memoryview(content) as view:
        try:
            _mac(chip, view[:_MAC]).verify(view[_MAC:])
        except AuthenticationError:
            raise StateError(f"{where}: is damaged or belongs to another chip") from None
        flags = int.from_bytes(view[12:16], "little")
        try:
            pek, pdh, oca = (
                CsvCertificate.parse(view[start : start + CSV_BYTES]) for start in range(_CERTIFICATES, _MAC, CSV_BYTES)
            )
            keys = [
                None if index == 2 and flags & _OWNED else SM2PrivateKey(view[start : start + 32])
                for index, start in enumerate(range(_KEYS, _CERTIFICATES, 32))
            ]
            identity = _checked(keys, (pek, pdh, oca), chip, where)
        except StateError:
            raise
        except CsvfastError as problem:
            raise StateError(f"{where}: is damaged: {problem}") from None
    return identity


def _checked(
    keys: list[SM2PrivateKey | None],
    certificates: tuple[CsvCertificate, CsvCertificate, CsvCertificate],
    chip: ChipIdentity,
    where: str,
) -> PlatformIdentity:
    """Every key is its certificate's, and every certificate is signed by whom it must be."""
    (pek_key, pdh_key, oca_key), (pek, pdh, oca) = keys, certificates
    if pek_key is None or pdh_key is None:
        raise StateError(f"{where}: a key is missing")
    for name, key, certificate in (("PEK", pek_key, pek), ("PDH", pdh_key, pdh), ("OCA", oca_key, oca)):
        if key is not None and key.public_key.point != certificate.point:
            raise StateError(f"{where}: the {name} key is not that of the {name} certificate")
    for name, subject, slot, signer, usage in (
        ("PEK", pek, 0, chip.cek, KeyUsage.CEK),
        ("PEK", pek, 1, oca, KeyUsage.OCA),
        ("PDH", pdh, 0, pek, KeyUsage.PEK),
    ):
        found = subject.slots[slot]
        try:
            if found.usage != usage:
                raise StateError(f"{where}: slot {slot + 1} of the {name} is not for {usage.name}")
            signer.public_key.verify(found.signature, subject.body, user_id=signer.user_id)
        except AuthenticationError:
            raise StateError(f"{where}: the {name} is not signed by this platform's {usage.name}") from None
    return PlatformIdentity(pek_key, pek, pdh_key, pdh, oca, oca_key)


def _mac(chip: ChipIdentity, body: memoryview) -> hmac_sm3:
    key = derive(chip.root_secret, b"csvfast-platform-state", b"", 32)
    try:
        return hmac_sm3(key, body)
    finally:
        wipe(key)
