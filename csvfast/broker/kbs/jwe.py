"""Resources encrypted to a guest: flattened JWE, built by hand.

    {"protected":..., "encrypted_key":..., "iv":..., "ciphertext":..., "tag":...}      all base64url

The guest's Rust client parses the protected header and writes it again to get the associated data, so the header's bytes must be
the ones it writes: compact, `alg`, `enc`, then the others in alphabetical order. The libraries at hand write others or move `epk`
out of the protected header.

    EC    Z = ECDH(ephemeral, guest); kek = ConcatKDF-SHA256(Z); encrypted_key = AES-KW(kek, cek)
    RSA   encrypted_key = RSA-OAEP(SHA-256, MGF1-SHA-256) of cek
    both  AES-256-GCM(cek), 96-bit random iv, associated data = ASCII of `protected`

Source: RFC 7516, RFC 7518 (4.3, 4.6, 5.3), RFC 3394; virtee/kbs-types src/lib.rs (ProtectedHeader::generate_aad);
confidential-containers/trustee kbs/src/jwe.rs. Thread-safety: functions without state.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from csvfast.broker.json_input import loads, member, members
from csvfast.broker.kbs.jwk import ECDH_ES, RSA_OAEP, GuestKey, from_base64url, jwk_of
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError

__all__ = ["JWE_LIMIT", "GuestPrivateKey", "open_jwe", "seal_jwe"]

GuestPrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

JWE_LIMIT: Final = 8 << 20
"""Bytes of a JWE that `open_jwe` looks at: a resource of 2 MiB has about 2.8 MB."""

_WHAT: Final = "JWE"
_ENC: Final = "A256GCM"
_ECDH: Final = ec.ECDH()
_OAEP: Final = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
_CURVES: Final = {"P-256": (ec.SECP256R1(), 32), "P-521": (ec.SECP521R1(), 66)}
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")
# RFC 7518, 4.6.2: the algorithm with its length, empty PartyUInfo and PartyVInfo, the key's 256 bits. Nothing varies in it.
_OTHER_INFO: Final = (
    len(ECDH_ES).to_bytes(4, "big") + ECDH_ES.encode("ascii") + bytes(4) + bytes(4) + (256).to_bytes(4, "big")
)
_ROUND_1: Final = (1).to_bytes(4, "big")
_RSA_HEADER: Final = b'{"alg":"RSA-OAEP-256","enc":"A256GCM"}'


def seal_jwe(key: GuestKey, plaintext: bytes | Secret) -> bytes:
    """The JSON of a JWE that only the holder of the private key opens.

    In: plaintext   one byte or more
    """
    # Key encryption keys and content keys of one message: local to this call, and worthless once it was sent.
    random = os.urandom(44)  # one call: each lets other threads run
    content_key, iv = random[:32], random[32:]
    public = key.public
    if isinstance(public, rsa.RSAPublicKey):
        header, encrypted_key = _RSA_HEADER, public.encrypt(content_key, _OAEP)
    else:
        curve, width = _CURVES[key.curve]
        ephemeral = ec.generate_private_key(curve)
        kek = _derive(ephemeral.exchange(_ECDH, public))
        encrypted_key = aes_key_wrap(kek, content_key)
        point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        header = b'{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{"crv":"%b","kty":"EC","x":"%b","y":"%b"}}' % (
            key.curve.encode("ascii"),
            _encode(point[1 : 1 + width]),
            _encode(point[1 + width :]),
        )
    protected = _encode(header)
    sealed = AESGCM(content_key).encrypt(iv, memoryview(plaintext), protected)
    return b'{"protected":"%b","encrypted_key":"%b","iv":"%b","ciphertext":"%b","tag":"%b"}' % (
        protected,
        _encode(encrypted_key),
        _encode(iv),
        _encode(sealed[:-16]),
        _encode(sealed[-16:]),
    )


def open_jwe(key: GuestPrivateKey, data: bytes, *, limit: int = JWE_LIMIT) -> Secret:
    """The plaintext of a JWE made by `seal_jwe` or by CoCo's KBS.

    RequestError: no JWE of this protocol. AuthenticationError: it was changed, or is for another key.
    """
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    document = members(loads(data, _WHAT, limit=limit), _WHAT, dict.fromkeys(names, str), {"aad": type(None)})
    protected, encrypted_key, iv, ciphertext, tag = (from_base64url(document[name], f"{_WHAT} {name}") for name in names)
    if len(iv) != 12 or len(tag) != 16:
        raise RequestError(f"{_WHAT}: iv of {len(iv)} and tag of {len(tag)} bytes; expected 12 and 16")
    if not ciphertext:
        raise RequestError(f"{_WHAT}: empty ciphertext; expected at least one byte")
    header = loads(protected, "JWE header", limit=4096)
    if isinstance(key, rsa.RSAPrivateKey):
        content_key = _open_rsa(key, header, encrypted_key)
    else:
        content_key = _open_ec(key, header, encrypted_key)
    try:
        plaintext = AESGCM(content_key).decrypt(iv, ciphertext + tag, document["protected"].encode("ascii"))
    except InvalidTag:
        raise AuthenticationError(f"{_WHAT}: the tag does not match") from None
    return Secret(plaintext)


def _open_rsa(key: rsa.RSAPrivateKey, header: Any, encrypted_key: bytes) -> bytes:
    _check_header(header, RSA_OAEP, {})
    try:
        content_key = key.decrypt(encrypted_key, _OAEP)
    except ValueError:
        content_key = b""
    if len(content_key) != 32:
        raise AuthenticationError(f"{_WHAT}: the encrypted key does not open with this key")
    return content_key


def _open_ec(key: ec.EllipticCurvePrivateKey, header: Any, encrypted_key: bytes) -> bytes:
    _check_header(header, ECDH_ES, {"epk": dict})
    ephemeral = GuestKey({**members(header["epk"], "epk", dict.fromkeys(("kty", "crv", "x", "y"), str)), "alg": ECDH_ES})
    if ephemeral.curve != jwk_of(key.public_key())["crv"]:
        raise RequestError(f"{_WHAT}: epk on {ephemeral.curve}; expected the curve of the guest's key")
    if len(encrypted_key) != 40:
        raise RequestError(f"{_WHAT}: encrypted_key of {len(encrypted_key)} bytes; expected 40")
    assert isinstance(ephemeral.public, ec.EllipticCurvePublicKey)
    try:
        return aes_key_unwrap(_derive(key.exchange(_ECDH, ephemeral.public)), encrypted_key)
    except InvalidUnwrap:
        raise AuthenticationError(f"{_WHAT}: the encrypted key does not open with this key") from None


def _check_header(header: Any, algorithm: str, others: dict[str, type]) -> None:
    members(header, "JWE header", {"alg": str, "enc": str, **others})
    for name, expected in (("alg", algorithm), ("enc", _ENC)):
        if member(header, name, str, "JWE header") != expected:
            raise RequestError(f"JWE header: another {name}; expected {expected}")


def _derive(agreed: bytes) -> bytes:
    # ConcatKDF (NIST SP 800-56A, 5.8.1): 256 bits are one round of SHA-256.
    return sha256(_ROUND_1 + agreed + _OTHER_INFO).digest()


def _encode(data: bytes) -> bytes:
    return b2a_base64(data, newline=False).translate(_URL_SAFE).rstrip(b"=")
