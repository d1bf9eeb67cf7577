"""SM3 of a file, in the manner of ``hashlib.file_digest``. :mod:`csvfast.measure` has the guarded form for images."""

from __future__ import annotations

import os
from pathlib import Path

from csvfast._core import sm3

__all__ = ["sm3_file"]

_CHUNK = 1 << 20


def sm3_file(path: str | os.PathLike[str]) -> sm3:
    """Hashes a file from beginning to end with 1 MiB of memory.

    Args:
        path: a regular file, block device, FIFO or anything else that can be opened and read.

    Returns:
        the sm3 object (use ``.hexdigest()``), to which more may be added.

    Raises:
        OSError: the file cannot be opened or read.

    Thread-safety: safe from any thread; the GIL is released while reading and hashing.
    """
    state = sm3()
    chunk = bytearray(_CHUNK)
    with Path(path).open("rb", buffering=0) as stream, memoryview(chunk) as window:
        while count := stream.readinto(chunk):
            state.update(window[:count])
    return state
