"""Key derivation of session blobs: Hygon's over SM3, AMD's over HMAC-SHA-256.

Hygon (openanolis/csv-rs src/session/key.rs, src/crypto/sm.rs):
    P   = key || label || 00 || context
    T   = X9.63-SM3(P, whole digests for the length asked for)
    out = X9.63-SM3(P || T, length)
AMD (virtee/sev src/session/key.rs): SP 800-108 in counter mode, block i =
HMAC(key; LE32(i) || label || 00 || context || LE32(bits)).

Both write into buffers the caller wipes. Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast.crypto import sm3_kdf
from csvfast.processor.buffers import copy_of, view_of

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["derive", "derive_amd", "wipe"]


def wipe(*buffers: bytearray) -> None:
    """Overwrites buffers that held secrets."""
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))


def derive(key: BytesLike, label: bytes, context: BytesLike, length: int) -> bytearray:
    """Hygon's derivation: `length` bytes, for the caller to wipe."""
    whole = -(-length // 32) * 32
    secret = view_of(key)
    head = secret.nbytes
    tail = label + b"\0" + copy_of(context)
    prefix = head + len(tail)
    work = bytearray(prefix + whole)
    try:
        work[:head] = secret
        work[head:prefix] = tail
        with memoryview(work) as view:
            sm3_kdf(view[:prefix], whole, out=view[prefix:])
            return sm3_kdf(view, length, out=bytearray(length))
    finally:
        wipe(work)


def derive_amd(key: BytesLike, label: bytes, context: BytesLike, length: int) -> bytearray:
    """AMD's derivation with SHA-256: `length` bytes, for the caller to wipe."""
    import hashlib
    import hmac

    out = bytearray(-(-length // 32) * 32)
    fixed = label + b"\0" + copy_of(context) + (length * 8).to_bytes(4, "little")
    secret = bytearray(view_of(key))  # hmac takes no other read-only buffers than bytes
    try:
        for at in range(0, len(out), 32):
            message = (at // 32 + 1).to_bytes(4, "little") + fixed
            out[at : at + 32] = hmac.new(secret, message, hashlib.sha256).digest()
        return out[:length]
    finally:
        wipe(secret, out)
