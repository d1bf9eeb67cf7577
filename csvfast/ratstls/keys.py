"""Keys of attested TLS: P-256, RSA of 3072 bits and more, SM2. Each made for one process's life and one certificate.

    kind         SubjectPublicKeyInfo                          signs certificates with
    p256         91 bytes, named curve, point not compressed   ecdsa-with-SHA256
    rsa<bits>    e = 65537, 3072 .. 8192 bits                  sha256WithRSAEncryption
    sm2          91 bytes, named curve, point not compressed   SM2 with SM3, user id 1234567812345678

Sources: inclavare-containers/rats-tls src/crypto_wrappers/openssl/gen_{privkey_key,cert}.c; RFC 5480, RFC 8017; GM/T 0015;
RFC 8998.
Thread-safety: immutable objects.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
    load_pem_private_key,
)

from csvfast._core import SM2PrivateKey, SM2PublicKey
from csvfast.crypto import der, sm2
from csvfast.crypto.pem import is_pem
from csvfast.errors import ArgumentError, AuthenticationError, FormatError, KeyExposureError, PointError, SignatureError
from csvfast.report._input import as_bytes

if TYPE_CHECKING:
    from OpenSSL.SSL import Context

    from csvfast._core import BytesLike

__all__ = ["PublicKey", "TlsKey", "kind_of", "read_spki", "verify_signature"]

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | SM2PrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | SM2PublicKey

_RSA_BITS: Final = 3072
_RSA_LARGEST: Final = 8192  # a check costs ever more, and nothing needs it
_EXPONENT: Final = 65537
_POINT: Final = 65
_P256 = ec.SECP256R1()
_ECDSA = ec.ECDSA(SHA256())
_STRUCTURE: Final = "SubjectPublicKeyInfo"


def _point_head(curve: str) -> bytes:
    algorithm = der.sequence(der.object_identifier("1.2.840.10045.2.1"), der.object_identifier(curve))
    return der.sequence(algorithm, der.bit_string(bytes(_POINT)))[:-_POINT]


# Everything before the point: for a named curve there is one spelling.
_P256_HEAD: Final = _point_head("1.2.840.10045.3.1.7")
_SM2_HEAD: Final = _point_head("1.2.156.10197.1.301")
_EC_BYTES: Final = len(_P256_HEAD) + _POINT
_HEAD_BYTES: Final = len(_SM2_HEAD)


def read_spki(spki: bytes) -> PublicKey:
    """The public key of a SubjectPublicKeyInfo in DER, when it is of a kind in the module's table: FormatError otherwise.

    Accepted is the one encoding that i2d_PUBKEY writes, because the hash of it is what evidence vouches for.
    """
    if len(spki) == _EC_BYTES and spki.startswith(_P256_HEAD):
        try:
            return ec.EllipticCurvePublicKey.from_encoded_point(_P256, spki[-_POINT:])
        except ValueError:
            raise FormatError(_STRUCTURE, "point", len(_P256_HEAD), "no point of P-256", "a point, not compressed") from None
    if len(spki) == _HEAD_BYTES + _POINT and spki.startswith(_SM2_HEAD):
        try:
            return SM2PublicKey(spki[_HEAD_BYTES:])
        except PointError:
            raise FormatError(_STRUCTURE, "point", _HEAD_BYTES, "no point of SM2's curve", "a point, not compressed") from None
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        raise FormatError(_STRUCTURE, "algorithm", None, "a key nobody here can read", _EXPECTED) from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise FormatError(_STRUCTURE, "algorithm", None, _described(key), _EXPECTED)
    return _checked_rsa(key, spki)


_EXPECTED: Final = f"P-256 or SM2 (named curve, point not compressed), or RSA of at least {_RSA_BITS} bits"


def _checked_rsa(key: rsa.RSAPublicKey, spki: bytes) -> rsa.RSAPublicKey:
    if not _RSA_BITS <= key.key_size <= _RSA_LARGEST:
        raise FormatError(_STRUCTURE, "modulus", None, f"RSA of {key.key_size} bits", f"{_RSA_BITS} .. {_RSA_LARGEST} bits")
    if key.public_numbers().e != _EXPONENT:
        raise FormatError(_STRUCTURE, "exponent", None, "another exponent", str(_EXPONENT))
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != spki:
        raise FormatError(_STRUCTURE, "encoding", None, "another encoding of this RSA key", "rsaEncryption with NULL, in DER")
    return key


def _described(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name == _P256.name:
            return "P-256 in another encoding"
        return f"a key on {key.curve.name}"
    return f"a key of another kind ({type(key).__name__})"


def kind_of(key: PublicKey) -> str:
    """ "p256", "sm2" or "rsa" with the number of bits."""
    if isinstance(key, SM2PublicKey):
        return "sm2"
    return f"rsa{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else "p256"


def verify_signature(key: PublicKey, signature: bytes, message: bytes) -> bool:
    """True when `signature`, as an X.509 certificate carries it, is this key's over `message` with the algorithm of its kind."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, _ECDSA)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, padding.PKCS1v15(), SHA256())
        else:
            key.verify(sm2.signature_from_der(signature), message, user_id=sm2.DEFAULT_USER_ID)
    except (InvalidSignature, SignatureError, FormatError):
        return False
    return True


class TlsKey:
    """A private key of one of the kinds.

    In: private   cryptography's P-256 or RSA key, or csvfast's SM2PrivateKey; FormatError for a key of another kind
    Attributes: kind: "p256", "sm2", "rsa3072" or RSA of another size. spki: the SubjectPublicKeyInfo in DER.
    The key cannot be pickled or copied, and nothing prints it.
    """

    __slots__ = ("kind", "private", "spki")
    private: Final[PrivateKey]
    kind: Final[str]
    spki: Final[bytes]

    def __init__(self, private: PrivateKey) -> None:
        if isinstance(private, SM2PrivateKey):
            spki = sm2.dump_public_key(private.public_key, encoding="der")
        elif isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        else:
            raise FormatError("TLS key", "algorithm", None, type(private).__name__, _EXPECTED)
        self.private = private
        self.spki = spki
        self.kind = kind_of(read_spki(spki))

    @classmethod
    def generate(cls, kind: str = "p256") -> TlsKey:
        """A new key. ArgumentError: kind is neither "p256", "rsa3072" nor "sm2"."""
        if kind == "p256":
            return cls(ec.generate_private_key(_P256))
        if kind == "sm2":
            return cls(SM2PrivateKey.generate())
        if kind == "rsa3072":
            return cls(rsa.generate_private_key(_EXPONENT, _RSA_BITS))
        raise ArgumentError(f"kind {kind!r}: expected 'p256', 'rsa3072' or 'sm2'")

    @classmethod
    def load(cls, data: BytesLike, password: bytes | None = None) -> TlsKey:
        """From PEM or DER, PKCS#8 or the algorithm's own form, encrypted or not. Wiping `data` is the caller's affair.

        Raises FormatError; ArgumentError: the password is missing, or given for a key that needs none; AuthenticationError: it
        is wrong.
        """
        raw = as_bytes(data, "key")
        load: Any = load_pem_private_key if is_pem(raw) else load_der_private_key
        try:
            key = load(raw, password)
        except TypeError:
            needed = "a password is needed" if password is None else "it is not encrypted, but a password was given"
            raise ArgumentError(f"TLS key: {needed}") from None
        except (ValueError, UnsupportedAlgorithm):
            # Neither of them knows SM2; if it is no SM2 key either, its reader says what is wrong.
            try:
                key = sm2.load_private_key(raw, password)
            except AuthenticationError:
                raise AuthenticationError("TLS key: wrong password, or the file is damaged") from None
            except FormatError as problem:
                raise FormatError("TLS key", problem.field, problem.offset, problem.found, problem.expected) from None
        return cls(key)

    def dump(self, password: bytes | None = None) -> bytes:
        """PKCS#8 in PEM. As secret as the key unless a password (at least 1 byte, else ArgumentError) encrypts it."""
        if password is not None and not password:
            raise ArgumentError("password: expected at least 1 byte")
        if isinstance(self.private, SM2PrivateKey):
            return sm2.dump_private_key(self.private, password=password)
        encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    @property
    def spki_sha256(self) -> bytes:
        """SHA-256 of the SubjectPublicKeyInfo, 32 bytes: what a pinned peer is known by."""
        return hashlib.sha256(self.spki).digest()

    def sign(self, message: bytes) -> bytes:
        """A signature as an X.509 certificate carries it."""
        if isinstance(self.private, SM2PrivateKey):
            return sm2.signature_to_der(self.private.sign(message, user_id=sm2.DEFAULT_USER_ID))
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(message, padding.PKCS1v15(), SHA256())
        return self.private.sign(message, _ECDSA)

    def use_in(self, context: Context) -> None:
        """Makes it the private key of a TLS context that has made no connection yet. Raises OpenSSL.SSL.Error."""
        if not isinstance(self.private, SM2PrivateKey):
            context.use_privatekey(self.private)
            return
        # cryptography has no SM2 keys to hand over and pyOpenSSL's own key objects are deprecated; OpenSSL reads files itself.
        # A file in memory alone, gone with its descriptor.
        descriptor = os.memfd_create("csvfast-tls-key", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self.dump())
            context.use_privatekey_file(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def __reduce__(self) -> NoReturn:
        raise KeyExposureError("a TLS key cannot be pickled or copied")

    def __repr__(self) -> str:
        return f"<TlsKey {self.kind}, SHA-256 of its SubjectPublicKeyInfo {self.spki_sha256.hex()}>"
