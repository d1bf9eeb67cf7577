"""Bytes-like arguments, copied once."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from csvfast.errors import BufferTypeError, LengthError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast._core import BytesLike

__all__ = ["as_bytes", "exactly"]


def as_bytes(data: BytesLike, name: str) -> bytes:
    """The bytes of `data`; bytes themselves are not copied. BufferTypeError for what is no buffer."""
    if type(data) is bytes:
        return data
    try:
        return bytes(memoryview(cast("Buffer", data)))
    except TypeError:
        raise BufferTypeError(f"{name}: expected a bytes-like object, found {type(data).__name__}") from None


def exactly(name: str, data: BytesLike, size: int) -> bytes:
    """The bytes of `data`, which must be `size` of them: LengthError otherwise."""
    raw = as_bytes(data, name)
    if len(raw) != size:
        raise LengthError(f"{name} of {len(raw)} bytes: expected {size}")
    return raw
