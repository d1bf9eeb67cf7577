"""SM2 cases: signing and verifying of digests, csvfast's kernels beside OpenSSL, tongsuopy and gmssl.

One operation is one signature made or verified over e (32 bytes), with the key parsed beforehand: what `openssl speed` counts.
Peers know neither tables of multiples nor batches, so their plain verification stands beside all of csvfast's. Before a peer is
measured its signature must be valid here, ours valid there, and an altered one refused there.

Peers
    openssl      the system's libcrypto (3.0 or later) by ctypes
    tongsuopy    Tongsuo bundled in its wheel
    gmssl        pure Python: a slow bar
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from csvfast.benchmark.runner import Case
from csvfast.crypto import (
    SM2PrivateKey,
    SM2PublicKey,
    dump_private_key,
    signature_from_der,
    signature_to_der,
    sm2_verify_many,
)

__all__ = ["NAMES", "SM2Peer", "agrees", "find_sm2_peers", "peer_cases", "sm2_cases"]

NAMES: Final = ("sm2-sign", "sm2-verify", "sm2-verify-prepared", "sm2-verify-many")
# A benchmark has no secrets.
KEY_BYTES: Final = bytes(range(1, 33))
# tongsuopy signs messages only, under the identity of the standard; what one more block of SM3 costs does not show.
MESSAGE: Final = bytes(range(32, 64))
DIGEST: Final = SM2PrivateKey(KEY_BYTES).public_key.digest(MESSAGE)
MANY: Final = 256
MANY_KEYS: Final = 32

Work = Callable[[], object]
Setup = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class SM2Peer:
    """One implementation, holding the key KEY_BYTES. Signatures are in DER, as all of them want it.

    signer     called once per thread; gives what makes a signature of DIGEST
    verifier   called once per thread; gives what says whether a signature of DIGEST is valid
    """

    name: str
    version: str
    signer: Callable[[], Callable[[], bytes]]
    verifier: Callable[[], Callable[[bytes], bool]]


def sm2_cases(name: str, kernels: list[str], force: Callable[[str], Setup]) -> Iterator[Case]:
    """csvfast's cases of one of NAMES. `kernels` are those of sm2, for "sm2-verify-many" of sm2-many; `force` chooses one."""
    for kernel in kernels:
        match name:
            case "sm2-sign":
                yield _case(name, _signing, kernel, force)
            case "sm2-verify":
                yield _case(name, lambda: _verifying(prepared=False), kernel, force)
            case "sm2-verify-prepared":
                yield _case(name, lambda: _verifying(prepared=True), kernel, force)
            case "sm2-verify-many":
                yield _case(name, lambda: _verifying_many(prepared=False), kernel, force, MANY)
                yield _case(name, lambda: _verifying_many(prepared=True), kernel, force, MANY, "prepared")


def _case(
    name: str,
    make: Callable[[], Work],
    kernel: str,
    force: Callable[[str], Setup],
    count: int = 1,
    variant: str | None = None,
) -> Case:
    return Case(name, make, 0, kernel, variant=variant, operations=count, setup=force(kernel))


def _signing() -> Work:
    key = SM2PrivateKey(KEY_BYTES)
    return lambda: key.sign_digest(DIGEST)


def _verifying(*, prepared: bool) -> Work:
    key = SM2PrivateKey(KEY_BYTES)
    public, signature = SM2PublicKey(key.public_key.point), key.sign_digest(DIGEST)
    if prepared:
        public.prepare()
    return lambda: public.verify_digest(signature, DIGEST)


def _verifying_many(*, prepared: bool) -> Work:
    private = [SM2PrivateKey(KEY_BYTES[:-1] + bytes((number,))) for number in range(MANY_KEYS)]
    if prepared:
        for key in private:
            key.public_key.prepare()
    keys = [private[number % MANY_KEYS].public_key for number in range(MANY)]
    digests = b"".join(DIGEST[:-2] + number.to_bytes(2, "big") for number in range(MANY))
    signatures = b"".join(
        private[number % MANY_KEYS].sign_digest(digests[32 * number : 32 * number + 32]) for number in range(MANY)
    )

    def work() -> None:
        if not all(sm2_verify_many(keys, signatures, digests)):
            raise RuntimeError("a good signature was refused")

    return work


def peer_cases(name: str, peer: SM2Peer) -> Iterator[Case]:
    """The peer's work of that name."""
    if name == "sm2-sign":
        yield Case(name, peer.signer, 0, peer=peer.name, operations=1)
        return
    signature = signature_to_der(SM2PrivateKey(KEY_BYTES).sign_digest(DIGEST))

    def make() -> Work:
        verify = peer.verifier()
        return lambda: verify(signature)

    yield Case(name, make, 0, peer=peer.name, operations=1)


def agrees(peer: SM2Peer) -> bool:
    """Whether the peer and csvfast accept each other's signatures and the peer refuses an altered one."""
    key = SM2PrivateKey(KEY_BYTES)
    own = key.sign_digest(DIGEST)
    altered = own[:40] + bytes((own[40] ^ 1,)) + own[41:]
    key.public_key.verify_digest(signature_from_der(peer.signer()()), DIGEST)
    verify = peer.verifier()
    return verify(signature_to_der(own)) and not verify(signature_to_der(altered))


def find_sm2_peers() -> Iterator[SM2Peer]:
    """Every peer that can be used here."""
    yield from _openssl()
    yield from _tongsuopy()
    yield from _gmssl()


def _openssl() -> Iterator[SM2Peer]:
    path = ctypes.util.find_library("crypto")
    if path is None:
        return
    try:
        library = ctypes.CDLL(path)
        number = library.OpenSSL_version_num
        text = library.OpenSSL_version
    except (OSError, AttributeError):
        return
    number.restype, text.restype = ctypes.c_ulong, ctypes.c_char_p
    if number() < 0x30000000:
        return
    version = (text(0) or b"").decode()
    handle, size, data = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    library.d2i_AutoPrivateKey.argtypes = [handle, ctypes.POINTER(data), ctypes.c_long]
    library.d2i_AutoPrivateKey.restype = handle
    library.EVP_PKEY_CTX_new.argtypes = [handle, handle]
    library.EVP_PKEY_CTX_new.restype = handle
    for call in (library.EVP_PKEY_sign_init, library.EVP_PKEY_verify_init):
        call.argtypes = [handle]
    library.EVP_PKEY_sign.argtypes = [handle, data, ctypes.POINTER(size), data, size]
    library.EVP_PKEY_verify.argtypes = [handle, data, size, data, size]

    encoded = dump_private_key(SM2PrivateKey(KEY_BYTES), encoding="der")
    key = library.d2i_AutoPrivateKey(None, ctypes.byref(data(encoded)), len(encoded))
    if not key:
        return  # built without SM2

    def context(start: Any) -> Any:
        # The key and its contexts live as long as the process: there are a few a run.
        opened = library.EVP_PKEY_CTX_new(key, None)
        if not opened or start(opened) != 1:
            raise RuntimeError(f"{version}: no SM2 context")
        return opened

    def signer() -> Callable[[], bytes]:
        opened, buffer, length = context(library.EVP_PKEY_sign_init), ctypes.create_string_buffer(128), size(0)

        def sign() -> bytes:
            length.value = 128
            if library.EVP_PKEY_sign(opened, buffer, ctypes.byref(length), DIGEST, 32) != 1:
                raise RuntimeError(f"{version}: EVP_PKEY_sign failed")
            return buffer.raw[: length.value]

        return sign

    def verifier() -> Callable[[bytes], bool]:
        opened = context(library.EVP_PKEY_verify_init)
        return lambda der: bool(library.EVP_PKEY_verify(opened, der, len(der), DIGEST, 32) == 1)

    yield SM2Peer("openssl", version, signer, verifier)


def _optional(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _tongsuopy() -> Iterator[SM2Peer]:
    ec, serialization = _optional("tongsuopy.crypto.asymciphers.ec"), _optional("tongsuopy.crypto.serialization")
    if ec is None or serialization is None:
        return
    hashes = importlib.import_module("tongsuopy.crypto.hashes")
    refused = importlib.import_module("tongsuopy.crypto.exceptions").InvalidSignature
    key = serialization.load_der_private_key(dump_private_key(SM2PrivateKey(KEY_BYTES), encoding="der"), password=None)
    public, algorithm = key.public_key(), ec.ECDSA(hashes.SM3())

    def verify(der: bytes) -> bool:
        try:
            public.verify(der, MESSAGE, algorithm)
        except refused:
            return False
        return True

    version = importlib.metadata.version("tongsuopy")
    yield SM2Peer("tongsuopy", version, lambda: lambda: bytes(key.sign(MESSAGE, algorithm)), lambda: verify)


def _gmssl() -> Iterator[SM2Peer]:
    sm2 = _optional("gmssl.sm2")
    if sm2 is None:
        return
    own = SM2PrivateKey(KEY_BYTES)
    state = sm2.CryptSM2(KEY_BYTES.hex(), "", mode=1)
    # Its constructor strips every leading 0 and 4 of a key that begins with 04.
    state.public_key = own.public_key.point.hex()
    nonce = bytes(range(3, 35)).hex()

    yield SM2Peer(
        "gmssl",
        importlib.metadata.version("gmssl"),
        lambda: lambda: signature_to_der(bytes.fromhex(state.sign(DIGEST, nonce))),
        lambda: lambda der: bool(state.verify(signature_from_der(der).hex(), DIGEST)),
    )
