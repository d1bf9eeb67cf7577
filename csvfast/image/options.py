"""Options of an encrypted layer: the public ones stand in its annotations, the private ones are what gets wrapped.

    public    {"cipher":"AES_256_CTR_HMAC_SHA256","hmac":b64,"cipheroptions":{}}
    private   {"symkey":b64,"digest":"sha256:...","cipheroptions":{"nonce":b64}}

`digest` is that of the layer before encryption, as it was compressed. `cipheroptions` map names to byte strings; the nonce is
looked for in the public ones first. Members that are not known are ignored; private options are wrapped as the bytes they are.

Source: containers/ocicrypt blockcipher/blockcipher.go (LayerBlockCipherOptions, GetOpt).
Thread-safety: immutable objects. Secrets are held in csvfast.crypto.Secret; copies that JSON and base64 make on the way in and
out are Python's, and freed without being wiped.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from csvfast.crypto import Secret
from csvfast.errors import ImageError, RequestError
from csvfast.image.descriptor import is_digest
from csvfast.image.suites import NONCE_BYTES, suite_named

if TYPE_CHECKING:
    from csvfast.image.suites import Suite

__all__ = ["OPTIONS_LIMIT", "LayerKey", "PrivateOptions", "PublicOptions"]

OPTIONS_LIMIT: Final = 64 << 10
"""Bytes of public or private options; they have some 200."""

_NONCE: Final = "nonce"


@dataclass(frozen=True, slots=True)
class PublicOptions:
    """What everybody may know."""

    suite: Suite
    mac: bytes
    cipher_options: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """JSON, members in the order of ocicrypt."""
        return _json({"cipher": self.suite.name, "hmac": _b64(self.mac), "cipheroptions": _texts(self.cipher_options)})

    @classmethod
    def parse(cls, data: bytes, subject: str) -> PublicOptions:
        """ImageError: no such options, another suite, no MAC. In: subject   what the error is about."""
        what = "public options"
        document = _object(data, subject, what)
        suite = suite_named(document.get("cipher"), subject)
        mac = _bytes(document.get("hmac"), subject, f"{what}: hmac")
        if len(mac) != suite.mac_bytes:
            raise ImageError(subject, f"{what}: hmac of {len(mac)} bytes; expected {suite.mac_bytes}")
        return cls(suite, mac, _cipher_options(document, subject, what))


@dataclass(frozen=True, slots=True)
class PrivateOptions:
    """What only the layer's recipients may know.

    digest   of the layer before encryption
    """

    key: Secret = field(repr=False)
    digest: str = field(repr=False)
    cipher_options: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def encode(self) -> Secret:
        """JSON, members in the order of ocicrypt."""
        rest = _json({"digest": self.digest, "cipheroptions": _texts(self.cipher_options)})
        return Secret.concatenate(b'{"symkey":"', base64.b64encode(memoryview(self.key)), b'",', rest[1:])

    @classmethod
    def parse(cls, data: Secret, subject: str) -> PrivateOptions:
        """ImageError: no such options. No error repeats what was read. In: subject   what the error is about."""
        what = "private options"
        document = _object(bytes(memoryview(data)), subject, what)
        key = _bytes(document.get("symkey"), subject, f"{what}: symkey")
        if not key:
            raise ImageError(subject, f"{what}: an empty symkey; expected the layer's key")
        digest = document.get("digest")
        if type(digest) is not str or not is_digest(digest):
            raise ImageError(subject, f"{what}: digest; expected sha256: and 64 hexadecimal digits, or sha512:")
        return cls(Secret(key), digest, _cipher_options(document, subject, what))


@dataclass(frozen=True, slots=True)
class LayerKey:
    """Everything that a layer is decrypted and checked with."""

    suite: Suite
    mac: bytes
    key: Secret = field(repr=False)
    nonce: bytes = field(repr=False)
    digest: str = field(repr=False)

    @classmethod
    def combine(cls, public: PublicOptions, private: PrivateOptions, subject: str) -> LayerKey:
        """ImageError: a key or nonce of another length than the suite's. In: subject   what the error is about."""
        suite = public.suite
        if len(private.key) != suite.key_bytes:
            raise ImageError(subject, f"symkey of {len(private.key)} bytes; expected {suite.key_bytes} for {suite.name}")
        nonce = public.cipher_options.get(_NONCE) or private.cipher_options.get(_NONCE)
        if nonce is None:
            raise ImageError(subject, "no nonce in the public or the private options")
        if len(nonce) != NONCE_BYTES:
            raise ImageError(subject, f"nonce of {len(nonce)} bytes; expected {NONCE_BYTES}")
        return cls(suite, public.mac, private.key, nonce, private.digest)


def _object(data: bytes, subject: str, what: str) -> dict[str, Any]:
    from csvfast.broker.json_input import loads

    try:
        document = loads(data, what, limit=OPTIONS_LIMIT)
    except RequestError as error:
        raise ImageError(subject, str(error)) from None
    if type(document) is not dict:
        raise ImageError(subject, f"{what}: no object")
    return document


def _cipher_options(document: dict[str, Any], subject: str, what: str) -> dict[str, bytes]:
    value = document.get("cipheroptions")
    if value is None:  # Go writes a map that was never made as null
        return {}
    if type(value) is not dict:
        raise ImageError(subject, f"{what}: cipheroptions; expected an object")
    return {name: _bytes(one, subject, f"{what}: a cipher option") for name, one in value.items()}


def _bytes(value: Any, subject: str, what: str) -> bytes:
    if value is None:
        raise ImageError(subject, f"{what} is missing")
    try:
        if type(value) is str:
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise ImageError(subject, f"{what}: expected base64 text")


def _texts(options: Mapping[str, bytes]) -> dict[str, str]:
    return {name: _b64(value) for name, value in options.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
