"""INIT_EX's NV area: 32 KiB of the host's memory in which the firmware keeps its persistent state, for the host to store.

Linux (torvalds/linux drivers/crypto/ccp/sev-dev.c, init_ex_path, NV_LENGTH) reads a file into the buffer before INIT_EX and
writes the buffer back to the file after INIT_EX, PEK_GEN, PEK_CERT_IMPORT, PDH_GEN and FACTORY_RESET. What the firmware puts
into it is not public; this layout is the project's:

    0 "CSVFNVAR" 8 | 8 version 4 (1) | 12 length of the state 4 (6396) | 16 nonce 12 | 28 ciphertext 32724 | 32752 tag 16

SM4-GCM under a key derived from the chip's root secret, with bytes 0..27 authenticated; the plaintext is the state
(platform_state.py), then zeros. So every bit of the 32 KiB counts, and the host learns only that something was written. A new
random nonce is drawn for each write. An area of all 0xff or all zero is a first start.

The host can put back an old copy: the part has no counter to notice it by. Then old keys and an old owner are back, and what
PEK_GEN and PDH_GEN ended is not over. A write that a kill cuts short leaves an area that INIT_EX refuses; what survives is the
host's last copy.

Thread-safety: used under the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.crypto import SM4GCM
from csvfast.errors import AuthenticationError, StateError
from csvfast.processor.derivation import derive, wipe
from csvfast.processor.platform_state import STATE_BYTES, decode_state, encode_state

if TYPE_CHECKING:
    from csvfast.certs.chip import ChipIdentity
    from csvfast.processor.identity import PlatformIdentity

__all__ = ["BLANK", "NONCE_BYTES", "NV_BYTES", "is_blank", "seal_state", "unseal_state"]

NV_BYTES: Final = 32 << 10
NONCE_BYTES: Final = 12
BLANK: Final = b"\xff" * NV_BYTES
_HEADER: Final = b"CSVFNVAR" + (1).to_bytes(4, "little") + STATE_BYTES.to_bytes(4, "little")
_TEXT: Final = len(_HEADER) + NONCE_BYTES
_TAG: Final = NV_BYTES - 16


def is_blank(area: bytes) -> bool:
    """Whether nothing has been kept in these NV_BYTES yet."""
    return area in (BLANK, bytes(NV_BYTES))


def seal_state(identity: PlatformIdentity, chip: ChipIdentity, nonce: bytearray) -> bytes:
    """The NV_BYTES that keep this state. `nonce`: NONCE_BYTES random bytes, never used before."""
    state = encode_state(identity, chip)
    plain = bytearray(_TAG - _TEXT)
    head = _HEADER + nonce
    try:
        plain[:STATE_BYTES] = state
        text, tag = _cipher(chip).encrypt(nonce, plain, head)
    finally:
        wipe(state, plain)
    return head + text + tag


def unseal_state(area: bytes, chip: ChipIdentity) -> PlatformIdentity:
    """The state in these NV_BYTES. Raises StateError: damaged, or another chip's."""
    if area[: len(_HEADER)] != _HEADER:
        raise StateError("the NV area does not begin as one of this firmware does")
    nonce, text, tag = area[len(_HEADER) : _TEXT], area[_TEXT:_TAG], area[_TAG:]
    plain = bytearray(len(text))
    state = bytearray()
    try:
        _cipher(chip).decrypt(nonce, text, tag, area[:_TEXT], out=plain)
        state = plain[:STATE_BYTES]
        return decode_state(state, chip, "the NV area")
    except AuthenticationError:
        raise StateError("the NV area is damaged or belongs to another chip") from None
    finally:
        wipe(plain, state)


def _cipher(chip: ChipIdentity) -> SM4GCM:
    key = derive(chip.root_secret, b"csvfast-nv-area", b"", 16)
    try:
        return SM4GCM(key)
    finally:
        wipe(key)
