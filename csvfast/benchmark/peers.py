"""Other implementations found on this machine: what they offer, and the proof that they compute the same thing.

Every offer carries `answer`, which works on a short input; cases.py compares it with csvfast before any time is taken, so
a wrong constant or a broken library is an error and not a fast figure.

Peers
    hashlib        Python's own binding of OpenSSL: SM3
    cryptography   OpenSSL bundled in its wheel: SM3, SM4-CTR (no SM4-XTS: it refuses a 32-byte SM4 key)
    tongsuopy      Tongsuo bundled in its wheel: SM3, SM4-CTR
    gmssl          pure Python: SM3, SM4-ECB (it has no CTR). Only ever a slow bar here, never in runtime code
    libgcrypt      the system's library by ctypes: SM3, SM4-CTR, SM4-XTS of IEEE 1619
    veritysetup    Debian's cryptsetup-bin, as a program: dm-verity (cases.py runs it)
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib
import importlib.metadata
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["COUNTER", "CTR_KEY", "PAGE", "XTS_KEY", "Offer", "Peer", "find_peers"]

PAGE: Final = 4096
# Public constants: a benchmark has no secrets. The halves of an XTS key must differ.
XTS_KEY: Final = bytes(range(32))
CTR_KEY: Final = bytes(range(16))
COUNTER: Final = bytes(range(16, 32))

Workspace = bytearray | memoryview
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Offer:
    """One primitive of one peer.

    name      as in cases.NAMES
    answer    digest, or ciphertext under the constants above, of a short input (whole pages for XTS; for "sm3-many" and
              "verity" names the digest of one message)
    make      takes the buffer to work on, gives the function that works through all of it once
    limit     a slow peer's largest buffer in bytes; None = any
    """

    name: str
    answer: Callable[[bytes], bytes]
    make: Callable[[Workspace], Work]
    variant: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """An implementation, its version, and what it offers."""

    name: str
    version: str
    offers: tuple[Offer, ...]


def find_peers() -> list[Peer]:
    """Every peer that can be used here. A peer that is absent is left out without a word; one that is there but does not
    load says why in an exception."""
    return list(_peers())


def _peers() -> Iterator[Peer]:
    if "sm3" in hashlib.algorithms_available:
        # usedforsecurity is what lets a FIPS-mode OpenSSL answer at all.
        yield Peer("hashlib", ssl.OPENSSL_VERSION, _hash_offers(lambda data: hashlib.new("sm3", data).digest()))
    yield from _pyca("cryptography", "cryptography.hazmat.primitives.ciphers", "cryptography.hazmat.primitives.hashes")
    yield from _pyca("tongsuopy", "tongsuopy.crypto.ciphers", "tongsuopy.crypto.hashes")
    yield from _gmssl()
    yield from _libgcrypt()


def _hash_offers(digest: Callable[[Any], bytes], limit: int | None = None) -> tuple[Offer, ...]:
    def whole(buffer: Workspace) -> Work:
        return lambda: digest(buffer)

    def pages(buffer: Workspace) -> Work:
        # One object per page, made once: what is measured is the hash and its call, not Python's slicing.
        views = [memoryview(buffer)[at : at + PAGE] for at in range(0, len(buffer), PAGE)]

        def work() -> None:
            for view in views:
                digest(view)

        return work

    return (
        Offer("sm3/1048576", digest, whole, limit=limit),
        Offer("sm3-many/4096", digest, pages, limit=limit),
    )


def _optional(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _pyca(package: str, ciphers_name: str, hashes_name: str) -> Iterator[Peer]:
    """cryptography and tongsuopy, which kept its interface."""
    ciphers, hashes = _optional(ciphers_name), _optional(hashes_name)
    if ciphers is None or hashes is None:
        return
    algorithms = importlib.import_module(f"{ciphers_name}.algorithms")
    modes = importlib.import_module(f"{ciphers_name}.modes")

    def digest(data: Any) -> bytes:
        state = hashes.Hash(hashes.SM3())
        state.update(data)
        return bytes(state.finalize())

    def encryptor() -> Any:
        return ciphers.Cipher(algorithms.SM4(CTR_KEY), modes.CTR(COUNTER)).encryptor()

    def counter_mode(buffer: Workspace) -> Work:
        # update_into asks for room of one block less one byte more than it writes.
        stream, out = encryptor(), bytearray(len(buffer) + 15)
        return lambda: stream.update_into(buffer, out)

    offers = (*_hash_offers(digest), Offer("sm4-ctr/65536", lambda data: bytes(encryptor().update(data)), counter_mode))
    yield Peer(package, importlib.metadata.version(package), offers)


def _gmssl() -> Iterator[Peer]:
    if _optional("gmssl") is None:
        return
    sm3 = importlib.import_module("gmssl.sm3")
    sm4 = importlib.import_module("gmssl.sm4")

    def digest(data: Any) -> bytes:
        return bytes.fromhex(sm3.sm3_hash(list(data)))

    def cipher() -> Any:
        state = sm4.CryptSM4(padding_mode=None)
        state.set_key(CTR_KEY, sm4.SM4_ENCRYPT)
        return state

    def counter_mode_answer(data: bytes) -> bytes:
        counter, stream = int.from_bytes(COUNTER, "big"), cipher()
        blocks = range(-(-len(data) // 16))
        key_stream = b"".join(
            bytes(stream.one_round(stream.sk, list(((counter + i) % 2**128).to_bytes(16, "big")))) for i in blocks
        )
        return bytes(a ^ b for a, b in zip(data, key_stream, strict=False))

    def every_block(buffer: Workspace) -> Work:
        stream = cipher()
        blocks = [list(buffer[at : at + 16]) for at in range(0, len(buffer), 16)]
        return lambda: [stream.one_round(stream.sk, block) for block in blocks]

    limit = 2 * PAGE  # 0.2 MB/s
    offers = (*_hash_offers(digest, limit), Offer("sm4-ctr/65536", counter_mode_answer, every_block, limit=limit))
    yield Peer("gmssl", importlib.metadata.version("gmssl"), offers)


# gcrypt.h of libgcrypt 1.9 (SM3, SM4 since then) to 1.12; part of its ABI and therefore fixed.
_GCRY_CIPHER_SM4: Final = 318
_GCRY_MODE_CTR: Final = 6
_GCRY_MODE_XTS: Final = 13
_GCRY_MD_SM3: Final = 326
_GCRYCTL_INITIALIZATION_FINISHED: Final = 38


def _libgcrypt() -> Iterator[Peer]:
    path = ctypes.util.find_library("gcrypt")
    if path is None:
        return
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return
    library.gcry_check_version.restype = ctypes.c_char_p
    library.gcry_check_version.argtypes = [ctypes.c_char_p]
    version = (library.gcry_check_version(None) or b"").decode()  # also initialises
    # gcry_control is variadic: left without argtypes on purpose.
    if not version or library.gcry_control(_GCRYCTL_INITIALIZATION_FINISHED, 0) != 0:
        return
    handle, size, block = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    library.gcry_cipher_open.argtypes = [ctypes.POINTER(handle), ctypes.c_int, ctypes.c_int, ctypes.c_uint]
    library.gcry_cipher_setkey.argtypes = [handle, ctypes.c_char_p, size]
    library.gcry_cipher_setiv.argtypes = [handle, ctypes.c_char_p, size]
    library.gcry_cipher_setctr.argtypes = [handle, ctypes.c_char_p, size]
    library.gcry_cipher_encrypt.argtypes = [handle, block, size, block, size]
    library.gcry_cipher_decrypt.argtypes = [handle, block, size, block, size]
    library.gcry_md_get_algo_dlen.argtypes = [ctypes.c_int]
    library.gcry_md_hash_buffer.argtypes = [ctypes.c_int, ctypes.c_char_p, block, size]
    library.gcry_md_hash_buffer.restype = None

    def must(code: int, call: str) -> None:
        if code != 0:
            raise RuntimeError(f"libgcrypt {version}: {call} failed with error code {code & 0xFFFF}")

    def address(data: Any) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(data))

    def open_cipher(mode: int, key: bytes) -> ctypes.c_void_p:
        opened = ctypes.c_void_p()
        must(library.gcry_cipher_open(ctypes.byref(opened), _GCRY_CIPHER_SM4, mode, 0), "gcry_cipher_open(SM4)")
        must(library.gcry_cipher_setkey(opened, key, len(key)), "gcry_cipher_setkey")
        return opened

    def digest(data: Any) -> bytes:
        out = ctypes.create_string_buffer(32)
        if isinstance(data, bytes):
            data = bytearray(data)
        library.gcry_md_hash_buffer(_GCRY_MD_SM3, out, address(data), len(data))
        return out.raw

    def xts(call_name: str) -> Callable[[Workspace], Work]:
        call = getattr(library, call_name)

        def make(buffer: Workspace) -> Work:
            opened, start, count = open_cipher(_GCRY_MODE_XTS, XTS_KEY), address(buffer), len(buffer) // PAGE
            setiv = library.gcry_cipher_setiv
            units = [(unit.to_bytes(16, "little"), start + unit * PAGE) for unit in range(count)]

            def work(_alive: Workspace = buffer) -> None:  # C knows the buffer's address only
                for tweak, place in units:
                    setiv(opened, tweak, 16)
                    call(opened, place, PAGE, None, 0)  # in place

            return work

        return make

    def answer_of(make: Callable[[Workspace], Work]) -> Callable[[bytes], bytes]:
        def answer(data: bytes) -> bytes:
            buffer = bytearray(data)
            make(buffer)()
            return bytes(buffer)

        return answer

    def counter_mode(buffer: Workspace) -> Work:
        opened = open_cipher(_GCRY_MODE_CTR, CTR_KEY)
        must(library.gcry_cipher_setctr(opened, COUNTER, 16), "gcry_cipher_setctr")
        start, length, encrypt = address(buffer), len(buffer), library.gcry_cipher_encrypt

        def work(_alive: Workspace = buffer) -> None:
            encrypt(opened, start, length, None, 0)

        return work

    if library.gcry_md_get_algo_dlen(_GCRY_MD_SM3) != 32:
        return  # built without SM3
    encrypting, decrypting = xts("gcry_cipher_encrypt"), xts("gcry_cipher_decrypt")
    offers = (
        *_hash_offers(digest),
        Offer("sm4-xts-encrypt/4096", answer_of(encrypting), encrypting, variant="ieee"),
        Offer("sm4-xts-decrypt/4096", answer_of(decrypting), decrypting, variant="ieee"),
        Offer("sm4-ctr/65536", answer_of(counter_mode), counter_mode),
    )
    yield Peer("libgcrypt", version, offers)


def veritysetup() -> tuple[str, str] | None:
    """(path, version) of veritysetup when it is installed."""
    path = shutil.which("veritysetup", path=None) or shutil.which("veritysetup", path="/usr/sbin:/sbin")
    if path is None:
        return None
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=30)
    return path, " ".join(shown.stdout.split()[1:2]) or "unknown"
