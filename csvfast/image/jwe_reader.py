"""Private options that are wrapped as JWE: read, so that images of tools without key providers can be decrypted.

ocicrypt writes the JSON serialisation with one or several recipients: content under A256GCM, its key under RSA-OAEP (with SHA-1,
as RFC 7518 has it under that name) or ECDH-ES+A256KW. `alg` and `epk` stand in the recipients' unprotected headers then.

Source: containers/ocicrypt keywrap/jwe/keywrapper_jwe.go; RFC 7516 (7.2, 5.2), RFC 7518 (4.3, 4.6), RFC 3394.
Thread-safety: functions without state, immutable objects.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, ImageError, RequestError

__all__ = ["JweKey", "JwePrivateKey", "open_jwe"]

JwePrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_LIMIT: Final = 512 << 10
_RECIPIENTS: Final = 64
_WHAT: Final = "JWE"
_ECDH_ES: Final = "ECDH-ES+A256KW"
_OAEP: Final = {
    "RSA-OAEP": padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=None),  # noqa: S303  # its definition
    "RSA-OAEP-256": padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None),
}
_CURVES: Final = {"secp256r1": ("P-256", 32), "secp384r1": ("P-384", 48), "secp521r1": ("P-521", 66)}


class JweKey:
    """A private key that opens packets of the scheme jwe. As KeyWrapper, but for wrap()."""

    scheme = "jwe"

    def __init__(self, key: JwePrivateKey, name: str = "JWE key") -> None:
        self.name: str = name
        self._key = key

    @classmethod
    def from_file(cls, path: Path, password: Secret | None = None) -> Self:
        """From a private key in PEM or DER that only its owner can read. StateError; ImageError: no key, or of another kind."""
        from csvfast.certs.private import read_private_file

        subject = f"JWE key {path}"
        data = read_private_file(path.parent, path.name, 64 << 10)
        secret = None if password is None else bytes(memoryview(password))
        load = serialization.load_pem_private_key if b"-----BEGIN" in data else serialization.load_der_private_key
        try:
            key = load(data, secret)
        except (ValueError, TypeError) as error:
            raise ImageError(subject, f"no private key: {error}") from None
        finally:
            data[:] = bytes(len(data))
        if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
            raise ImageError(subject, f"{type(key).__name__}; expected RSA or an elliptic curve")
        return cls(key, subject)

    def opens(self, scheme: str) -> bool:
        """jwe."""
        return scheme == self.scheme

    def wrap(self, private: Secret, parameters: str = "") -> bytes:  # noqa: ARG002  # it is never done
        """ImageError: this scheme is read only."""
        raise ImageError(self.name, "reads only; expected a key provider or a KEK to wrap keys with")

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:  # noqa: ARG002  # it has none
        """As KeyWrapper."""
        return open_jwe(self._key, packet)


def open_jwe(key: JwePrivateKey, data: bytes) -> Secret:
    """The content of a JWE in JSON serialisation, flattened or general.

    RequestError: no such JWE, or other algorithms. AuthenticationError: for none of its recipients' keys, or changed.
    """
    from csvfast.broker.json_input import loads

    document = loads(data, _WHAT, limit=_LIMIT)
    if type(document) is not dict:
        raise RequestError(f"{_WHAT}: no object")
    protected_text = document.get("protected", "")
    protected = loads(_bytes(protected_text, "protected"), f"{_WHAT} header", limit=_LIMIT) if protected_text else {}
    shared = [protected, document.get("unprotected") or {}]
    content = [_bytes(document.get(name), name) for name in ("iv", "ciphertext", "tag")]
    iv, ciphertext, tag = content
    if len(iv) != 12 or len(tag) != 16 or not ciphertext:
        lengths = f"iv of {len(iv)}, tag of {len(tag)}, ciphertext of {len(ciphertext)} bytes"
        raise RequestError(f"{_WHAT}: {lengths}; expected 12, 16 and some")
    associated = _text(protected_text, "protected").encode("ascii")
    if "aad" in document:
        associated += b"." + _text(document["aad"], "aad").encode("ascii")
    for header, encrypted_key in _recipients(document, shared):
        content_key = _content_key(key, header, encrypted_key)
        if content_key is None:
            continue
        try:
            return Secret(AESGCM(content_key).decrypt(iv, ciphertext + tag, associated))
        except InvalidTag:
            raise AuthenticationError(f"{_WHAT}: the tag does not match") from None
    raise AuthenticationError(f"{_WHAT}: for none of its recipients is this the key")


def _recipients(document: dict[str, Any], shared: Sequence[Any]) -> list[tuple[dict[str, Any], bytes]]:
    several = document.get("recipients", [document])
    if type(several) is not list or not 0 < len(several) <= _RECIPIENTS or not all(type(one) is dict for one in several):
        raise RequestError(f"{_WHAT}: recipients; expected a list of 1 to {_RECIPIENTS} objects")
    found = []
    for one in several:
        header: dict[str, Any] = {}
        for part in [*shared, one.get("header") or {}]:
            if type(part) is not dict or part.keys() & header.keys():
                raise RequestError(f"{_WHAT} header: no object, or a member that stands twice")
            header |= part
        if header.keys() & {"crit", "zip"}:
            raise RequestError(f"{_WHAT} header: crit or zip; expected neither")
        if header.get("enc") != "A256GCM":
            raise RequestError(f"{_WHAT} header: enc; expected A256GCM")
        found.append((header, _bytes(one.get("encrypted_key"), "encrypted_key")))
    return found


def _content_key(key: JwePrivateKey, header: dict[str, Any], encrypted_key: bytes) -> bytes | None:
    """None: for another key."""
    algorithm = header.get("alg")
    try:
        if isinstance(key, rsa.RSAPrivateKey):
            scheme = _OAEP.get(algorithm) if type(algorithm) is str else None
            content_key = None if scheme is None else key.decrypt(encrypted_key, scheme)
        elif algorithm == _ECDH_ES:
            content_key = _agreed(key, header, encrypted_key)
        else:
            content_key = None
    except (ValueError, InvalidUnwrap):
        return None
    return content_key if content_key is not None and len(content_key) == 32 else None


def _agreed(key: ec.EllipticCurvePrivateKey, header: dict[str, Any], encrypted_key: bytes) -> bytes | None:
    name, width = _CURVES.get(key.curve.name, ("", 0))
    ephemeral = header.get("epk")
    if not name or type(ephemeral) is not dict or ephemeral.get("crv") != name or ephemeral.get("kty") != "EC":
        return None
    point = [_bytes(ephemeral.get(axis), f"epk {axis}") for axis in "xy"]
    if [len(one) for one in point] != [width, width]:
        raise RequestError(f"{_WHAT} header: epk; expected coordinates of {width} bytes")
    public = ec.EllipticCurvePublicKey.from_encoded_point(key.curve, b"\x04" + b"".join(point))
    parties = [_bytes(header.get(one, ""), one) for one in ("apu", "apv")]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (_ECDH_ES.encode("ascii"), *parties))
    kek = ConcatKDFHash(hashes.SHA256(), 32, info + (256).to_bytes(4, "big")).derive(key.exchange(ec.ECDH(), public))
    return aes_key_unwrap(kek, encrypted_key)


def _text(value: Any, what: str) -> str:
    if type(value) is not str or not value.isascii():
        raise RequestError(f"{_WHAT}: {what}; expected base64url text")
    return value


def _bytes(value: Any, what: str) -> bytes:
    text = _text(value, what)
    try:
        if "=" in text or "+" in text or "/" in text:
            raise ValueError
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{_WHAT}: {what}; expected base64url text") from None
