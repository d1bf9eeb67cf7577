"""What tests of encrypted layers share: descriptors, the vector, an image in memory."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from csvfast.crypto import Secret
from csvfast.image.annotations import PUBLIC_OPTIONS
from csvfast.image.layer_cipher import EncryptedLayer, LayerEncryption
from csvfast.image.suites import AES_256_CTR_HMAC_SHA256, Suite

TAR_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"

# ocicrypt's construction, checked against layers that skopeo encrypted.
KEY = bytes(range(32))
NONCE = bytes(range(16))
PLAIN = b"csvfast layer vector"
SEALED = bytes.fromhex("391d7231698805b69c4f2c5870e3d0f703877fa7")
MAC = bytes.fromhex("d1cd787ed58c028b3c7f6eb9c4c1590fdb120dc7a52a16358b66d3dc93426b90")
DIGEST = "sha256:cfc406c52d1a930e0ab50961ea07a1b60a2da88e79a525b64ae5bce23d264df8"
PUBLIC = b'{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"0c14ftWMAos8f265xMFZD9sSDcelKhY1i2bT3JNCa5A=","cipheroptions":{}}'
PRIVATE = (
    b'{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","digest":"' + DIGEST.encode() + b'",'
    b'"cipheroptions":{"nonce":"AAECAwQFBgcICQoLDA0ODw=="}}'
)


class Described(NamedTuple):
    """As much of a descriptor as the ciphers look at."""

    digest: str
    size: int
    annotations: Mapping[str, str] = {}
    media_type: str = f"{TAR_GZIP}+encrypted"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def described(data: bytes, public: bytes | None = None, **others: str) -> Any:
    annotations = dict(others)
    if public is not None:
        annotations[PUBLIC_OPTIONS] = base64.b64encode(public).decode()
    return Described(digest_of(data), len(data), annotations)


def sealed(
    data: bytes, suite: Suite = AES_256_CTR_HMAC_SHA256, *, key: bytes | None = None, nonce: bytes | None = None
) -> tuple[bytes, EncryptedLayer]:
    """(ciphertext, the rest)."""
    layer = LayerEncryption(io.BytesIO(data), suite=suite, _key=None if key is None else Secret(key), _nonce=nonce)
    return b"".join(bytes(block) for block in layer), layer.result
