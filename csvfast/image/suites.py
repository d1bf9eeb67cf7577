"""Cipher suites of image layers: which algorithms encrypt a layer and which authenticate it.

    AES_256_CTR_HMAC_SHA256   ocicrypt's. One key of 32 bytes for both algorithms; the MAC covers the ciphertext alone:
                              C = AES-256-CTR(key, nonce, layer), mac = HMAC-SHA-256(key, C)
    SM4_128_CTR_HMAC_SM3      csvfast's own, for deployments on national algorithms alone. NO OTHER TOOL READS IT. A key of 48
                              bytes, 16 for SM4 and 32 for HMAC-SM3, and a MAC that covers the nonce, too:
                              C = SM4-CTR(key[:16], nonce, layer), mac = HMAC-SM3(key[16:], nonce || C)

In both, the nonce of 16 bytes is the first counter block, which counts up as one big-endian number of 128 bits.

Source: containers/ocicrypt blockcipher/blockcipher_aes_ctr.go; NIST SP 800-38A (CTR), RFC 2104 (HMAC); GB/T 32907-2016 (SM4),
GB/T 32905-2016 (SM3).
Thread-safety: a suite is immutable; a cipher or a MAC belongs to one thread at a time. Both give up the GIL for long inputs.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from csvfast.errors import ImageError

if TYPE_CHECKING:
    from csvfast._core import sha256_layer
    from csvfast.crypto import Secret

__all__ = ["AES_256_CTR_HMAC_SHA256", "SM4_128_CTR_HMAC_SM3", "SUITES", "Cipher", "LayerHashes", "Mac", "Suite", "suite_named"]

NONCE_BYTES: Final = 16


class Cipher(Protocol):
    """A keystream. Encryption and decryption are the same."""

    def process(self, data: memoryview, out: memoryview) -> None:
        """The next bytes. In: out   as long as data, another buffer."""


class Mac(Protocol):
    """A message authentication code in the making."""

    def update(self, data: memoryview, /) -> None:
        """The next bytes of ciphertext."""

    def digest(self) -> bytes:
        """The MAC."""


class LayerHashes(Protocol):
    """A suite's MAC and SHA-256 of the ciphertext, and on demand SHA-256 of the plaintext."""

    def update(self, sealed: memoryview, clear: memoryview | None = None, /) -> None:
        """The next bytes; plaintext in every call or in none."""

    def digest(self) -> bytes:
        """SHA-256 of the ciphertext."""

    def mac(self) -> bytes:
        """The MAC."""

    def clear_digest(self) -> bytes:
        """SHA-256 of the plaintext."""


class Suite(Protocol):
    """One suite.

    name        as public options have it
    key_bytes   of `symkey`
    mac_bytes   of `hmac`
    slow_mac    the MAC takes so much longer than everything else that it is worth a thread
    """

    name: str
    key_bytes: int
    mac_bytes: int
    slow_mac: bool

    def cipher(self, key: Secret, nonce: bytes) -> Cipher:
        """In: key   of key_bytes, nonce   of 16 bytes."""

    def mac(self, key: Secret, nonce: bytes) -> Mac:
        """As cipher."""

    def hashes(self, key: Secret, nonce: bytes) -> LayerHashes | None:
        """MAC and digests together, which takes less than one after the other; None: not on this CPU."""


class _AesCipher:
    __slots__ = ("_context",)

    def __init__(self, key: Secret, nonce: bytes) -> None:
        from cryptography.hazmat.primitives import ciphers

        algorithm = ciphers.algorithms.AES(memoryview(key))
        self._context = ciphers.Cipher(algorithm, ciphers.modes.CTR(nonce)).encryptor()

    def process(self, data: memoryview, out: memoryview) -> None:
        self._context.update_into(data, out)


class _Sm4Cipher:
    __slots__ = ("_context",)

    def __init__(self, key: Secret, nonce: bytes) -> None:
        from csvfast.crypto import SM4CTR

        self._context = SM4CTR(key, nonce)

    def process(self, data: memoryview, out: memoryview) -> None:
        self._context.encrypt(data, out=out)


class _Sm3Hashes:
    """HMAC-SM3, and both SHA-256 digests in one pass."""

    __slots__ = ("_digests", "_mac")

    def __init__(self, mac: Mac, digests: sha256_layer) -> None:
        self._mac, self._digests = mac, digests

    def update(self, sealed: memoryview, clear: memoryview | None = None, /) -> None:
        self._mac.update(sealed)
        self._digests.update(sealed, clear)

    def digest(self) -> bytes:
        return self._digests.digest()

    def mac(self) -> bytes:
        return self._mac.digest()

    def clear_digest(self) -> bytes:
        return self._digests.clear_digest()


class _AesSuite:
    name: str = "AES_256_CTR_HMAC_SHA256"
    key_bytes: int = 32
    mac_bytes: int = 32
    slow_mac: bool = False

    def cipher(self, key: Secret, nonce: bytes) -> Cipher:
        return _AesCipher(key, nonce)

    def mac(self, key: Secret, _nonce: bytes) -> Mac:
        # The standard library's is OpenSSL's, as is cryptography's; it takes no memoryview.
        copy = bytearray(memoryview(key))
        try:
            return hmac.new(copy, digestmod="sha256")
        finally:
            copy[:] = bytes(len(copy))

    def hashes(self, key: Secret, _nonce: bytes) -> LayerHashes | None:
        from csvfast._core import sha256_layer

        return sha256_layer(key) if sha256_layer.usable() else None


class _Sm4Suite:
    name: str = "SM4_128_CTR_HMAC_SM3"
    key_bytes: int = 48
    mac_bytes: int = 32
    slow_mac: bool = True

    def cipher(self, key: Secret, nonce: bytes) -> Cipher:
        return _Sm4Cipher(key.part(0, 16), nonce)

    def mac(self, key: Secret, nonce: bytes) -> Mac:
        from csvfast.crypto import hmac_sm3

        return hmac_sm3(key.part(16, 48), nonce)

    def hashes(self, key: Secret, nonce: bytes) -> LayerHashes | None:
        from csvfast._core import sha256_layer

        return _Sm3Hashes(self.mac(key, nonce), sha256_layer(b"unused")) if sha256_layer.usable() else None


AES_256_CTR_HMAC_SHA256: Final[Suite] = _AesSuite()
SM4_128_CTR_HMAC_SM3: Final[Suite] = _Sm4Suite()

SUITES: Final[Mapping[str, Suite]] = MappingProxyType(
    {suite.name: suite for suite in (AES_256_CTR_HMAC_SHA256, SM4_128_CTR_HMAC_SM3)}
)
"""By name."""


def suite_named(name: Any, subject: str) -> Suite:
    """ImageError: there is no such suite. In: subject   what the error is about."""
    suite = SUITES.get(name) if type(name) is str else None
    if suite is None:
        raise ImageError(subject, f"cipher {ascii(name)[:60]}; expected {' or '.join(SUITES)}")
    return suite
