"""SM2 keys, signatures and ciphertexts in the encodings of the rest of the world: DER and PEM, as OpenSSL reads and writes them.

    private keys   PKCS#8 (RFC 5958), also encrypted (PBES2), and SEC1 (RFC 5915)
    public keys    SubjectPublicKeyInfo (RFC 5480)
    signatures     SEQUENCE { r INTEGER, s INTEGER } (GB/T 35276-2017, RFC 3279 2.2.3)
    ciphertexts    SEQUENCE { x INTEGER, y INTEGER, C3 OCTET STRING, C2 OCTET STRING } (GB/T 35276-2017)

The curve is 1.2.156.10197.1.301. The algorithm of a key is id-ecPublicKey with the curve as its parameter, or the curve's own
identifier. Readers are strict: BER lengths, padded or negative integers and trailing bytes are FormatErrors. A private key whose
file carries a public key must match it.

Thread-safety: functions are pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from csvfast._core import SM2PrivateKey, SM2PublicKey
from csvfast.crypto import der, pbes2
from csvfast.crypto.pem import is_pem, read_pem, write_pem
from csvfast.errors import ArgumentError, AuthenticationError, BufferTypeError, FormatError, LengthError, PointError

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = [
    "DEFAULT_USER_ID",
    "ciphertext_from_der",
    "ciphertext_to_der",
    "dump_private_key",
    "dump_public_key",
    "load_private_key",
    "load_public_key",
    "signature_from_der",
    "signature_to_der",
]

# GB/T 35276-2017 and GM/T 0009: what is signed with when nothing was agreed.
DEFAULT_USER_ID: Final = b"1234567812345678"

_CURVE: Final = "1.2.156.10197.1.301"
_EC_PUBLIC_KEY: Final = "1.2.840.10045.2.1"
_PRIVATE: Final = "SM2 private key"
_PUBLIC: Final = "SM2 public key"
_SIGNATURE: Final = "SM2 signature"
_CIPHERTEXT: Final = "SM2 ciphertext"
_BYTES: Final = 32
_LARGEST_KEY: Final = 1 << 16  # bytes of a DER file; a key takes about 140


def _copied(data: BytesLike, name: str) -> bytes:
    """A buffer's bytes. bytes() alone would also take a number, as so many zeros."""
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]  # NumPy's arrays are buffers whatever its stubs say
    except TypeError:
        raise BufferTypeError(f"{name} must be a bytes-like object, not {type(data).__name__}") from None


def _check_password(password: bytes | None) -> None:
    if not (password is None or isinstance(password, (bytes, bytearray, memoryview))):
        raise BufferTypeError(f"password must be bytes, not {type(password).__name__}")


# ---- Private keys ----------------------------------------------------------------------------------------------------


def load_private_key(data: BytesLike, password: bytes | None = None) -> SM2PrivateKey:
    """Reads a private key from PEM or DER, PKCS#8 (plain or encrypted) or SEC1, whichever it is.

    Args:
        data: the whole file. Wiping it is the caller's affair; what is decrypted from it is wiped here.
        password: of an encrypted file, else None.
    Raises: FormatError; ArgumentError (password missing, or given for a file that is not encrypted); AuthenticationError (wrong
        password); KeyRangeError (the number is no private key); MissingExtraError (a cipher that cryptography lacks);
        BufferTypeError.
    """
    _check_password(password)
    raw = _copied(data, "data")
    if is_pem(raw):
        labels = ("PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "EC PRIVATE KEY", "SM2 PRIVATE KEY")
        _, raw = read_pem(raw, _PRIVATE, labels, skipped=("EC PARAMETERS", "SM2 PARAMETERS"))
    if not _is_encrypted(raw):
        if password is not None:
            raise ArgumentError("a password was given, but the private key is not encrypted")
        return _private_key(raw)
    if password is None:
        raise ArgumentError("the private key is encrypted: a password is needed")
    plain = pbes2.decrypt(raw, password, _PRIVATE)
    try:
        return _private_key(plain)
    except FormatError as problem:
        # One wrong password in 256 leaves something that looks like padding, but hardly ever a well-formed SEQUENCE.
        if problem.field in ("file", "PrivateKeyInfo"):
            raise AuthenticationError(f"{_PRIVATE}: wrong password, or the file is damaged") from None
        raise
    finally:
        plain[:] = bytes(len(plain))


def _is_encrypted(data: bytes) -> bool:
    """EncryptedPrivateKeyInfo begins with a SEQUENCE, the other two with a version."""
    outer = _outer(data, _PRIVATE)
    return outer.sequence("PrivateKeyInfo").next_tag() == der.SEQUENCE


def _outer(data: bytes | bytearray, structure: str) -> der.Reader:
    if len(data) > _LARGEST_KEY:
        raise FormatError(structure, "file", None, f"{len(data)} bytes", f"at most {_LARGEST_KEY}")
    if not data or data[0] != der.SEQUENCE:
        found = der.tag_name(data[0]) if data else "nothing"
        raise FormatError(structure, "file", 0, found, "DER (a SEQUENCE) or PEM (-----BEGIN ...)")
    return der.Reader(data, structure)


def _private_key(data: bytes | bytearray) -> SM2PrivateKey:
    outer = _outer(data, _PRIVATE)
    reader = outer.sequence("PrivateKeyInfo")
    outer.finish("PrivateKeyInfo")
    offset = reader.position
    version = reader.small("version")
    if reader.next_tag() == der.OCTET_STRING:
        if version != 1:
            raise reader.refuse("version", offset, str(version), "1 (SEC1)")
        return _sec1_key(reader, wrapped=False)
    if version not in (0, 1):
        raise reader.refuse("version", offset, str(version), "0 or 1 (PKCS#8)")
    _algorithm(reader, "privateKeyAlgorithm")
    content, start = reader.octet_string("privateKey")
    inner = reader.inside(start, start + len(content))
    key_reader = inner.sequence("ECPrivateKey")
    inner.finish("ECPrivateKey")
    offset = key_reader.position
    if (inner_version := key_reader.small("ECPrivateKey version")) != 1:
        raise reader.refuse("ECPrivateKey version", offset, str(inner_version), "1")
    key = _sec1_key(key_reader, wrapped=True)
    if reader.next_tag() == 0xA0:
        reader.context(0, "attributes")
    if version == 1 and reader.next_tag() == 0x81:
        raise reader.refuse("publicKey", reader.position, "a second public key", "the one inside ECPrivateKey")
    reader.finish("PrivateKeyInfo")
    return key


def _sec1_key(reader: der.Reader, *, wrapped: bool) -> SM2PrivateKey:
    """The rest of an ECPrivateKey after its version. `wrapped`: PKCS#8 has named the curve already."""
    secret, offset = reader.octet_string("privateKey")
    if len(secret) != _BYTES:
        raise reader.refuse("privateKey", offset, f"{len(secret)} bytes", str(_BYTES))
    if reader.next_tag() == 0xA0:
        parameters = reader.context(0, "parameters")
        _curve(parameters, "parameters")
        parameters.finish("parameters")
    elif not wrapped:
        raise reader.refuse("parameters", reader.position, "no curve", f"[0] {_CURVE} (SM2)")
    key = SM2PrivateKey(secret)
    if reader.next_tag() == 0xA1:
        holder = reader.context(1, "publicKey")
        encoded, offset = holder.bit_string("publicKey")
        holder.finish("publicKey")
        if _point(reader, encoded, offset) != key.public_key:
            raise reader.refuse("publicKey", offset, "another key's point", "the point that belongs to privateKey")
    reader.finish("ECPrivateKey")
    return key


def _algorithm(reader: der.Reader, field: str) -> None:
    algorithm = reader.sequence(field)
    oid, offset = algorithm.object_identifier(field)
    if oid == _EC_PUBLIC_KEY:
        _curve(algorithm, f"{field} parameters")
    elif oid == _CURVE:
        if algorithm.next_tag() == der.NULL:
            algorithm.null(f"{field} parameters")
        elif algorithm.next_tag() is not None:
            _curve(algorithm, f"{field} parameters")
    else:
        raise reader.refuse(field, offset, oid, f"{_EC_PUBLIC_KEY} (id-ecPublicKey) or {_CURVE} (SM2)")
    algorithm.finish(field)


def _curve(reader: der.Reader, field: str) -> None:
    if reader.next_tag() == der.SEQUENCE:
        raise reader.refuse(field, reader.position, "a curve given by its numbers", f"the named curve {_CURVE} (SM2)")
    oid, offset = reader.object_identifier(field)
    if oid != _CURVE:
        raise reader.refuse(field, offset, oid, f"{_CURVE} (SM2)")


def _point(reader: der.Reader, encoded: memoryview, offset: int) -> SM2PublicKey:
    if len(encoded) not in (33, 65):
        raise reader.refuse("publicKey", offset, f"{len(encoded)} bytes", "65 (04 || x || y) or 33 (02 or 03 || x)")
    try:
        return SM2PublicKey(encoded)
    except PointError:
        raise reader.refuse("publicKey", offset, "no point of the SM2 curve", "a point") from None


def _algorithm_identifier() -> bytes:
    return der.sequence(der.object_identifier(_EC_PUBLIC_KEY), der.object_identifier(_CURVE))


def _sec1_template(*parameters: bytes) -> bytes:
    public = der.context(1, der.bit_string(b"\x04" + bytes(64)))
    return der.sequence(der.integer(1), der.octet_string(bytes(_BYTES)), *parameters, public)


# A key has one length, so both forms are constants with two gaps: nothing secret passes through immutable pieces.
_SEC1: Final = _sec1_template(der.context(0, der.object_identifier(_CURVE)))
_PKCS8: Final = der.sequence(der.integer(0), _algorithm_identifier(), der.octet_string(_sec1_template()))


def _fill(template: bytes, key: SM2PrivateKey) -> bytearray:
    filled = bytearray(template)
    start = template.index(der.octet_string(bytes(_BYTES))) + 2
    secret = key.secret()
    memoryview(filled)[start : start + _BYTES] = memoryview(secret)
    secret.wipe()
    filled[-64:] = key.public_key.point
    return filled


def dump_private_key(
    key: SM2PrivateKey,
    *,
    encoding: Literal["pem", "der"] = "pem",
    format: Literal["pkcs8", "sec1"] = "pkcs8",
    password: bytes | None = None,
) -> bytes:
    """Writes a private key. The result is as secret as the key unless it is encrypted.

    Args:
        encoding: "pem" or "der".
        format: "pkcs8", or "sec1", which cannot be encrypted.
        password: encrypts (PBES2: PBKDF2 with HMAC-SHA-256 and 600,000 iterations, AES-256-CBC); at least 1 byte.
    Raises: ArgumentError.
    """
    if encoding not in ("pem", "der") or format not in ("pkcs8", "sec1"):
        raise ArgumentError(
            f"encoding must be 'pem' or 'der' and format 'pkcs8' or 'sec1'; got {encoding!r} and {format!r}"
        )
    _check_password(password)
    if password is not None and (format != "pkcs8" or not password):
        raise ArgumentError("a password needs format 'pkcs8' and at least 1 byte")
    plain = _fill(_PKCS8 if format == "pkcs8" else _SEC1, key)
    try:
        if password is not None:
            sealed = pbes2.encrypt(plain, password)
            return write_pem("ENCRYPTED PRIVATE KEY", sealed) if encoding == "pem" else sealed
        label = "PRIVATE KEY" if format == "pkcs8" else "EC PRIVATE KEY"
        return write_pem(label, plain) if encoding == "pem" else bytes(plain)
    finally:
        plain[:] = bytes(len(plain))


# ---- Public keys -----------------------------------------------------------------------------------------------------


def load_public_key(data: BytesLike) -> SM2PublicKey:
    """Reads a public key from a SubjectPublicKeyInfo in PEM or DER. Raises: FormatError."""
    raw = _copied(data, "data")
    if is_pem(raw):
        _, raw = read_pem(raw, _PUBLIC, ("PUBLIC KEY",))
    outer = _outer(raw, _PUBLIC)
    reader = outer.sequence("SubjectPublicKeyInfo")
    outer.finish("SubjectPublicKeyInfo")
    _algorithm(reader, "algorithm")
    encoded, offset = reader.bit_string("publicKey")
    reader.finish("SubjectPublicKeyInfo")
    return _point(reader, encoded, offset)


def dump_public_key(key: SM2PublicKey, *, encoding: Literal["pem", "der"] = "pem") -> bytes:
    """Writes a public key as a SubjectPublicKeyInfo, the point not compressed. Raises: ArgumentError."""
    if encoding not in ("pem", "der"):
        raise ArgumentError(f"encoding must be 'pem' or 'der'; got {encoding!r}")
    encoded = der.sequence(_algorithm_identifier(), der.bit_string(b"\x04" + key.point))
    return write_pem("PUBLIC KEY", encoded) if encoding == "pem" else encoded


# ---- Signatures and ciphertexts --------------------------------------------------------------------------------------


def signature_to_der(signature: BytesLike) -> bytes:
    """r || s (64 bytes) as DER. Raises: LengthError."""
    raw = _copied(signature, "signature")
    if len(raw) != 2 * _BYTES:
        raise LengthError(f"signature has {len(raw)} bytes; expected {2 * _BYTES}")
    return der.sequence(der.integer(raw[:_BYTES]), der.integer(raw[_BYTES:]))


def signature_from_der(data: BytesLike) -> bytes:
    """r || s (64 bytes) from DER. Whether the numbers are in range is for verification to say. Raises: FormatError."""
    outer = der.Reader(_copied(data, "data"), _SIGNATURE)
    reader = outer.sequence("signature")
    outer.finish("signature")
    r, s = reader.unsigned("r", _BYTES), reader.unsigned("s", _BYTES)
    reader.finish("signature")
    return r + s


def ciphertext_to_der(ciphertext: BytesLike) -> bytes:
    """04 || x || y || C3 || C2 as DER. Raises: LengthError, FormatError (it does not begin with 04)."""
    raw = _copied(ciphertext, "ciphertext")
    if len(raw) < 98:
        raise LengthError(f"ciphertext has {len(raw)} bytes; expected at least 98")
    if raw[0] != 4:
        raise FormatError(_CIPHERTEXT, "C1", 0, f"{raw[0]:#04x}", "0x04 (a point that is not compressed)")
    return der.sequence(
        der.integer(raw[1:33]), der.integer(raw[33:65]), der.octet_string(raw[65:97]), der.octet_string(raw[97:])
    )


def ciphertext_from_der(data: BytesLike) -> bytes:
    """04 || x || y || C3 || C2 from DER. Whether x, y is a point is for decryption to say. Raises: FormatError."""
    outer = der.Reader(_copied(data, "data"), _CIPHERTEXT)
    reader = outer.sequence("ciphertext")
    outer.finish("ciphertext")
    x, y = reader.unsigned("x", _BYTES), reader.unsigned("y", _BYTES)
    (c3, offset), (c2, c2_offset) = reader.octet_string("C3"), reader.octet_string("C2")
    reader.finish("ciphertext")
    if len(c3) != _BYTES:
        raise reader.refuse("C3", offset, f"{len(c3)} bytes", str(_BYTES))
    if not c2:
        raise reader.refuse("C2", c2_offset, "no bytes", "at least 1")
    return b"".join((b"\x04", x, y, c3, c2))
