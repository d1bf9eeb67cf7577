"""Public keys of guests, as JSON Web Keys: read strictly, because a secret will be encrypted to them.

    {"kty":"EC","crv":"P-256"|"P-521","alg":"ECDH-ES+A256KW","x":...,"y":...}
    {"kty":"RSA","alg":"RSA-OAEP-256","n":...,"e":...}

Refused: other algorithms (RSA1_5 among them), private members, coordinates that are not exactly as wide as the curve, points that
are not on it, RSA moduli below 2048 bits, base64url that encodes its last bits otherwise. Unknown members are kept: evidence is
bound to the key as it was sent. They cost time and room wherever the key goes, so the whole has a limit.

Source: RFC 7517, RFC 7518 (6.2.1, 6.3.1), RFC 7638; virtee/kbs-types src/lib.rs (TeePubKey).
Thread-safety: immutable objects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from csvfast.broker.json_input import member
from csvfast.errors import RequestError

__all__ = ["ECDH_ES", "RSA_OAEP", "GuestKey", "base64url", "from_base64url", "jwk_of"]

ECDH_ES: Final = "ECDH-ES+A256KW"
RSA_OAEP: Final = "RSA-OAEP-256"
RSA_BITS: Final = (2048, 8192)
JWK_LIMIT: Final = 8 << 10
"""Characters of a whole JWK."""

_WHAT: Final = "tee-pubkey"
_CURVES: Final[Mapping[str, tuple[type[ec.EllipticCurve], int]]] = {"P-256": (ec.SECP256R1, 32), "P-521": (ec.SECP521R1, 66)}
_PRIVATE: Final = ("d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv")
_EXPONENT_BITS: Final = 32


def base64url(data: bytes) -> str:
    """Base64 with '-' and '_', without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def from_base64url(text: str, what: str) -> bytes:
    """Bytes of base64url text. RequestError for padding, other characters, or bits beyond the last byte."""
    if not text.isascii() or "+" in text or "/" in text or "=" in text:
        raise RequestError(f"{what}: no base64url; expected letters, digits, '-' and '_' without padding")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{what}: no base64url; expected letters, digits, '-' and '_' without padding") from None
    if base64url(data) != text:
        raise RequestError(f"{what}: base64url whose last character has bits beyond the last byte; expected zeros there")
    return data


class GuestKey:
    """A guest's public key.

    Attributes:
        document     the JWK as it was sent, unknown members included
        algorithm    ECDH_ES or RSA_OAEP
        curve        "P-256", "P-521", or "" for RSA
        public       the key of `cryptography`
        thumbprint   SHA-256 of the required members (RFC 7638), hexadecimal: names the key in records
    """

    __slots__ = ("algorithm", "curve", "document", "public", "thumbprint")
    document: Final[Mapping[str, Any]]
    algorithm: Final[str]
    curve: Final[str]
    public: Final[ec.EllipticCurvePublicKey | rsa.RSAPublicKey]
    thumbprint: Final[str]

    def __init__(self, document: Mapping[str, Any]) -> None:
        """In: document, a JWK that json_input has read. RequestError."""
        if type(document) is not dict:
            raise RequestError(f"{_WHAT}: {type(document).__name__}; expected an object")
        if (size := len(json.dumps(document, separators=(",", ":")))) > JWK_LIMIT:
            raise RequestError(f"{_WHAT}: {size} characters; expected at most {JWK_LIMIT}")
        for name in _PRIVATE:
            if name in document:
                raise RequestError(f"{_WHAT}: holds the private member {name}; expected a public key")
        if document.get("use", "enc") != "enc":
            raise RequestError(f"{_WHAT}: use is not enc")
        kind = member(document, "kty", str, _WHAT)
        public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
        required: tuple[str, ...]
        if kind == "EC":
            algorithm, required = ECDH_ES, ("crv", "kty", "x", "y")
            self._agree(document, algorithm)
            public, curve = _point(document)
        elif kind == "RSA":
            algorithm, required = RSA_OAEP, ("e", "kty", "n")
            self._agree(document, algorithm)
            public, curve = _modulus(document), ""
        else:
            raise RequestError(f"{_WHAT}: kty {_shown(kind)}; expected EC or RSA")
        self.algorithm, self.curve, self.public = algorithm, curve, public
        self.document = document
        canonical = json.dumps({name: document[name] for name in required}, separators=(",", ":"), sort_keys=True)
        self.thumbprint = hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @staticmethod
    def _agree(document: Mapping[str, Any], expected: str) -> None:
        algorithm = member(document, "alg", str, _WHAT)
        if algorithm != expected:
            raise RequestError(f"{_WHAT}: alg {_shown(algorithm)}; expected {expected}")

    def __repr__(self) -> str:
        return f"<GuestKey {self.algorithm} {self.curve or 'RSA'} {self.thumbprint[:16]}>"


def jwk_of(public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> dict[str, str]:
    """The JWK of a public key, as guests send it. RequestError for a curve that the protocol does not have."""
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        return {"kty": "RSA", "alg": RSA_OAEP, "n": _unsigned(numbers.n), "e": _unsigned(numbers.e)}
    for name, (curve, width) in _CURVES.items():
        if isinstance(public.curve, curve):
            point = public.public_numbers()
            x, y = (base64url(value.to_bytes(width, "big")) for value in (point.x, point.y))
            return {"kty": "EC", "crv": name, "alg": ECDH_ES, "x": x, "y": y}
    raise RequestError(f"{_WHAT}: curve {public.curve.name}; expected {' or '.join(_CURVES)}")


def _point(document: Mapping[str, Any]) -> tuple[ec.EllipticCurvePublicKey, str]:
    name = member(document, "crv", str, _WHAT)
    if name not in _CURVES:
        raise RequestError(f"{_WHAT}: crv {_shown(name)}; expected {' or '.join(_CURVES)}")
    curve, width = _CURVES[name]
    coordinates = []
    for axis in ("x", "y"):
        value = from_base64url(member(document, axis, str, _WHAT), f"{_WHAT} {axis}")
        if len(value) != width:
            raise RequestError(f"{_WHAT}: {axis} of {len(value)} bytes; expected {width}, leading zeros included")
        coordinates.append(int.from_bytes(value, "big"))
    try:
        return ec.EllipticCurvePublicNumbers(coordinates[0], coordinates[1], curve()).public_key(), name
    except (ValueError, UnsupportedAlgorithm):
        raise RequestError(f"{_WHAT}: x and y are no point of {name}") from None


def _modulus(document: Mapping[str, Any]) -> rsa.RSAPublicKey:
    numbers = []
    for name in ("n", "e"):
        value = from_base64url(member(document, name, str, _WHAT), f"{_WHAT} {name}")
        if not value or not value[0]:
            raise RequestError(f"{_WHAT}: {name} is empty or starts with a zero byte; expected the shortest form")
        if len(value) * 8 > RSA_BITS[1]:
            raise RequestError(f"{_WHAT}: {name} of {len(value)} bytes; expected at most {RSA_BITS[1] // 8}")
        numbers.append(int.from_bytes(value, "big"))
    n, e = numbers
    if n.bit_length() < RSA_BITS[0] or n % 2 == 0:
        raise RequestError(f"{_WHAT}: n of {n.bit_length()} bits; expected an odd number of {RSA_BITS[0]} to {RSA_BITS[1]} bits")
    if e < 3 or e % 2 == 0 or e.bit_length() > _EXPONENT_BITS:
        raise RequestError(f"{_WHAT}: e is not an odd number of 2 to {_EXPONENT_BITS} bits")
    try:
        return rsa.RSAPublicNumbers(e, n).public_key()
    except ValueError:
        raise RequestError(f"{_WHAT}: n and e are no RSA key") from None


def _unsigned(value: int) -> str:
    return base64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _shown(text: str) -> str:
    return ascii(text)[:40]
