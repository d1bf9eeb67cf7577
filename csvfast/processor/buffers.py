"""Bytes-like arguments as flat memory views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from csvfast.errors import BufferTypeError

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["copy_of", "size_of", "view_of"]


def view_of(data: BytesLike) -> memoryview:
    """The bytes of `data` without copying them. Raises BufferTypeError."""
    try:
        return memoryview(cast("Any", data)).cast("B")
    except (TypeError, ValueError, BufferError) as problem:
        raise BufferTypeError(
            f"expected a contiguous bytes-like object, not {type(data).__name__} ({problem})"
        ) from None


def size_of(data: BytesLike) -> int:
    """How many bytes `data` has. Raises BufferTypeError."""
    return view_of(data).nbytes


def copy_of(data: BytesLike) -> bytes:
    """The bytes of `data` as they are now; bytes themselves are not copied. Raises BufferTypeError."""
    return data if isinstance(data, bytes) else bytes(view_of(data))
