"""72-byte integer fields of certificates and reports, and the readable form of bytes in error texts.

Public keys and signatures stand in Hygon's structures as little-endian integers of 72 bytes, of which the curve's 32 bytes
are significant and the other 40 zero (csv-rs src/crypto/key/ecc.rs, src/crypto/sig/ecdsa.rs; checked on real certificates).
Everywhere else in csvfast the same numbers are 32 bytes big-endian: this module is the one place that turns them round.
"""

from __future__ import annotations

from typing import Final

from csvfast.errors import FormatError, LengthError

__all__ = ["FIELD_BYTES", "from_field", "shown", "to_field"]

FIELD_BYTES: Final = 72
_VALUE_BYTES: Final = 32
_PADDING: Final = bytes(FIELD_BYTES - _VALUE_BYTES)


def to_field(value: bytes) -> bytes:
    """A 32-byte big-endian number as the 72-byte little-endian field. Raises LengthError for another length."""
    if len(value) != _VALUE_BYTES:
        raise LengthError(f"field value: {len(value)} bytes; expected {_VALUE_BYTES}, big-endian")
    return bytes(value[::-1]) + _PADDING


def from_field(data: bytes, structure: str, field: str, offset: int) -> bytes:
    """The 32 bytes, big-endian, of a 72-byte field.

    In: data        the field's 72 bytes
        structure, field, offset    named in the error
    Raises FormatError for another length, and when bytes 32 to 71 are not zero: who ignored them would read another number
    than the one that stands there. Thread-safe.
    """
    if len(data) != FIELD_BYTES:
        raise FormatError(structure, field, offset, f"{len(data)} bytes", f"{FIELD_BYTES} bytes")
    if data[_VALUE_BYTES:] != _PADDING:
        place = next(index for index in range(_VALUE_BYTES, FIELD_BYTES) if data[index])
        raise FormatError(structure, field, offset + place, f"byte {data[place]:#04x}", "zero in bytes 32 to 71 of the field")
    return bytes(data[_VALUE_BYTES - 1 :: -1])


def shown(data: bytes, limit: int = 32) -> str:
    """Bytes for an error text: quoted when printable ASCII, otherwise hexadecimal, cut after `limit` bytes."""
    cut = bytes(data[:limit])
    tail = "" if len(data) <= limit else f"... ({len(data)} bytes)"
    if cut and all(0x20 <= byte < 0x7F for byte in cut):
        return f"{cut.decode('ascii')!r}{tail}"
    return (cut.hex() or "nothing") + tail
