"""Encryption of private key files: PBES2 of PKCS#5 (RFC 8018) inside EncryptedPrivateKeyInfo (RFC 5958).

Written: PBKDF2 with HMAC-SHA-256, AES-256-CBC, which is what OpenSSL writes and reads. Read: also HMAC-SHA-1, -384, -512 and
HMAC-SM3, AES-128, AES-192 and SM4, each in CBC (GmSSL's files are HMAC-SM3 with SM4). The older schemes (PBES1, scrypt) are
refused.

Thread-safety: functions are pure.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from csvfast.crypto import der
from csvfast.errors import AuthenticationError, MissingExtraError

__all__ = ["decrypt", "encrypt"]

_PBES2: Final = "1.2.840.113549.1.5.13"
_PBKDF2: Final = "1.2.840.113549.1.5.12"
_HMAC_SHA256: Final = "1.2.840.113549.2.9"
_AES256_CBC: Final = "2.16.840.1.101.3.4.1.42"
_HASHES: Final = {
    "1.2.840.113549.2.7": "SHA1",
    _HMAC_SHA256: "SHA256",
    "1.2.840.113549.2.10": "SHA384",
    "1.2.840.113549.2.11": "SHA512",
    "1.2.156.10197.1.401.2": "SM3",
}
_CIPHERS: Final = {
    "2.16.840.1.101.3.4.1.2": ("AES", 16),
    "2.16.840.1.101.3.4.1.22": ("AES", 24),
    _AES256_CBC: ("AES", 32),
    "1.2.156.10197.1.104.2": ("SM4", 16),
}
ITERATIONS: Final = 600_000
MOST_ITERATIONS: Final = 2_000_000  # a second, three with the slowest hash; beyond that a file is an attack or a mistake
_BLOCK: Final = 16


class _Parameters(NamedTuple):
    hash_name: str
    salt: bytes
    iterations: int
    cipher: str
    key_length: int
    iv: bytes


def _read_parameters(reader: der.Reader) -> _Parameters:
    algorithm = reader.sequence("encryptionAlgorithm")
    oid, offset = algorithm.object_identifier("encryptionAlgorithm")
    if oid != _PBES2:
        raise reader.refuse("encryptionAlgorithm", offset, oid, f"{_PBES2} (PBES2)")
    scheme = algorithm.sequence("PBES2-params")
    algorithm.finish("encryptionAlgorithm")

    derivation = scheme.sequence("keyDerivationFunc")
    oid, offset = derivation.object_identifier("keyDerivationFunc")
    if oid != _PBKDF2:
        raise reader.refuse("keyDerivationFunc", offset, oid, f"{_PBKDF2} (PBKDF2)")
    numbers = derivation.sequence("PBKDF2-params")
    derivation.finish("keyDerivationFunc")
    salt, offset = numbers.octet_string("salt")
    if not 1 <= len(salt) <= 1024:
        raise reader.refuse("salt", offset, f"{len(salt)} bytes", "1 .. 1024")
    offset = numbers.position
    iterations = numbers.small("iterationCount")
    if not 1 <= iterations <= MOST_ITERATIONS:
        raise reader.refuse("iterationCount", offset, str(iterations), f"1 .. {MOST_ITERATIONS}")
    key_offset = numbers.position
    key_length = numbers.small("keyLength") if numbers.next_tag() == der.INTEGER else None
    hash_name = "SHA1"
    if numbers.next_tag() is not None:
        prf = numbers.sequence("prf")
        oid, offset = prf.object_identifier("prf")
        if oid not in _HASHES:
            raise reader.refuse("prf", offset, oid, "one of " + ", ".join(_HASHES))
        hash_name = _HASHES[oid]
        if prf.next_tag() is not None:
            prf.null("prf")
        prf.finish("prf")
    numbers.finish("PBKDF2-params")

    encryption = scheme.sequence("encryptionScheme")
    oid, offset = encryption.object_identifier("encryptionScheme")
    if oid not in _CIPHERS:
        raise reader.refuse("encryptionScheme", offset, oid, "one of " + ", ".join(_CIPHERS))
    cipher, length = _CIPHERS[oid]
    if key_length not in (None, length):
        raise reader.refuse("keyLength", key_offset, str(key_length), f"{length}, as the cipher needs")
    iv, offset = encryption.octet_string("iv")
    if len(iv) != _BLOCK:
        raise reader.refuse("iv", offset, f"{len(iv)} bytes", str(_BLOCK))
    encryption.finish("encryptionScheme")
    scheme.finish("PBES2-params")
    return _Parameters(hash_name, bytes(salt), iterations, cipher, length, bytes(iv))


def _cipher(parameters: _Parameters, password: bytes) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    try:
        digest = getattr(hashes, parameters.hash_name)()
        key = PBKDF2HMAC(digest, parameters.key_length, parameters.salt, parameters.iterations).derive(password)
        cipher = Cipher(getattr(algorithms, parameters.cipher)(key), modes.CBC(parameters.iv))
        cipher.decryptor()
    except (AttributeError, UnsupportedAlgorithm):
        raise MissingExtraError(
            f"this key file needs {parameters.cipher}-CBC with HMAC-{parameters.hash_name}, which the installed cryptography "
            "package does not offer; pip install --upgrade cryptography"
        ) from None
    return cipher


def decrypt(data: bytes, password: bytes, structure: str) -> bytearray:
    """The PrivateKeyInfo inside an EncryptedPrivateKeyInfo, for the caller to wipe.

    Raises: FormatError; AuthenticationError (wrong password or damaged file: the format cannot tell); MissingExtraError.
    """
    outer = der.Reader(data, structure)
    reader = outer.sequence("EncryptedPrivateKeyInfo")
    outer.finish("EncryptedPrivateKeyInfo")
    parameters = _read_parameters(reader)
    content, offset = reader.octet_string("encryptedData")
    reader.finish("encryptedData")
    if not content or len(content) % _BLOCK:
        raise reader.refuse("encryptedData", offset, f"{len(content)} bytes", f"a positive multiple of {_BLOCK}")
    plain = bytearray(len(content) + _BLOCK - 1)  # update_into asks for the room of a block more
    _cipher(parameters, password).decryptor().update_into(content, plain)
    padding = plain[len(content) - 1]
    if not 1 <= padding <= _BLOCK or plain[len(content) - padding : len(content)] != bytes((padding,)) * padding:
        plain[:] = bytes(len(plain))
        raise AuthenticationError(f"{structure}: wrong password, or the file is damaged")
    keep = len(content) - padding
    plain[keep:] = bytes(len(plain) - keep)
    # A bytearray only ever shrinks in place or moves; a copy of our own leaves nothing behind.
    result = plain[:keep]
    plain[:] = bytes(len(plain))
    return result


def encrypt(plain: bytearray, password: bytes) -> bytes:
    """An EncryptedPrivateKeyInfo. The padded copy is wiped; wiping `plain` is the caller's affair."""
    parameters = _Parameters("SHA256", os.urandom(16), ITERATIONS, "AES", 32, os.urandom(_BLOCK))
    padding = _BLOCK - len(plain) % _BLOCK
    padded = bytearray(len(plain) + padding)
    padded[: len(plain)] = plain
    padded[len(plain) :] = bytes((padding,)) * padding
    sealed = _cipher(parameters, password).encryptor().update(padded)
    padded[:] = bytes(len(padded))
    derivation = der.sequence(
        der.octet_string(parameters.salt),
        der.integer(parameters.iterations),
        der.sequence(der.object_identifier(_HMAC_SHA256), der.null()),
    )
    scheme = der.sequence(
        der.sequence(der.object_identifier(_PBKDF2), derivation),
        der.sequence(der.object_identifier(_AES256_CBC), der.octet_string(parameters.iv)),
    )
    return der.sequence(der.sequence(der.object_identifier(_PBES2), scheme), der.octet_string(sealed))
