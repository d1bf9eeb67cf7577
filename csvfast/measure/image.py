"""The digest of an image: one linear SM3, or the root of its page tree.

linear  SM3 of all bytes in order: what `sm3sum`, hashlib and the launch measurement compute. One stream, so one core.
tree    root of a Merkle tree over 4096-byte pages: SM3 of each page, the last one zero padded; 128 digests to an
        upper page. Same layout as dm-verity with SM3 and an empty salt; every page is its own message, so vectors and
        threads apply. The zero padding is not told apart from zeros in the image: a record's `size` belongs to its
        digest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from csvfast import _core
from csvfast.measure.errors import ParameterError
from csvfast.measure.source import Access, AnyPath, Progress, Source
from csvfast.measure.tree import BlockHash, TreeBuilder, hash_tree

__all__ = ["PAGE_BYTES", "Measurement", "Mode", "linear_digest", "measure_image"]

PAGE_BYTES = 4096
Mode = Literal["linear", "tree"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured image. `seconds` is wall-clock time; `size` is in bytes."""

    path: str
    mode: Mode
    digest: bytes
    size: int
    seconds: float

    @property
    def hexdigest(self) -> str:
        """The digest as 64 hexadecimal digits."""
        return self.digest.hex()

    @property
    def bytes_per_second(self) -> float:
        """Rate of the measurement."""
        return self.size / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: path, mode, digest (hex), bytes, seconds, bytes_per_second."""
        return {
            "path": self.path,
            "mode": self.mode,
            "digest": self.hexdigest,
            "bytes": self.size,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(self.bytes_per_second),
        }


def measure_image(
    path: AnyPath,
    mode: Mode = "linear",
    *,
    access: Access = "read",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measures a file, block device, pipe, or standard input ("-"), in bounded memory.

    Args: mode: "linear" or "tree". access: "read", or "mmap" for files that nobody truncates meanwhile. threads:
        workers of mode "tree", None = one per processor. progress: called with (bytes done, bytes in all or None).
    Raises: SourceError (not found, unreadable, a directory, changed or truncated meanwhile), EmptySourceError (mode
        "tree" of nothing), ParameterError.
    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    if mode not in ("linear", "tree"):
        raise ParameterError(f"mode is {mode!r}; expected 'linear' or 'tree'")
    start = time.perf_counter()
    with Source(path, access=access) as source:
        if mode == "linear":
            digest, size = linear_digest(source, progress)
        else:
            block_hash = BlockHash()
            builder = TreeBuilder(block_hash, PAGE_BYTES)
            digest, _, size = hash_tree(
                source, builder, block_hash, PAGE_BYTES, pad=True, threads=threads, progress=progress
            )
        source.check_unchanged()
        return Measurement(source.path, mode, digest, size, time.perf_counter() - start)


def linear_digest(source: Source, progress: Progress | None = None) -> tuple[bytes, int]:
    """SM3 of all bytes of a source. Returns (digest, bytes). The caller checks that the source is unchanged."""
    sm3 = _core.sm3()
    done = 0
    for chunk in source.chunks():
        sm3.update(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, source.size)
    return sm3.digest(), done
