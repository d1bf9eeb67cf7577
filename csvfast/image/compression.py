"""Decompression of layers: gzip (several members, too), zstd (extra `zstd`), none; with bounds, and the digest of what comes out.

gzip is read by the package isal where it is installed, which is twice as fast as zlib, and by zlib otherwise.
RFC 1952; RFC 8878; image-spec layer.md. A layer's `diff_id` in the image configuration is the digest computed here.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Protocol

from csvfast._extras import need
from csvfast.errors import ImageError
from csvfast.image.descriptor import clear_type, compression
from csvfast.image.limits import DEFAULT_LIMITS, Budget, Limits

__all__ = ["Readable", "UncompressedLayer", "compression_of", "decompress", "inflater", "read_ahead_pays"]

CHUNK: Final = 256 << 10  # what comes out at once: a core's second-level cache holds it until it is hashed and written
READ: Final = 64 << 10
_GZIP: Final = 31  # gzip's header and check sum, window of 32 KiB
DEPTH: Final = 16  # chunks in flight between the threads: 4 MiB


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; b"" at the end."""


def compression_of(media_type: str) -> str:
    """"none", "gzip" or "zstd" for a layer's media type, encrypted or not. Raises ImageError for what is no tar."""
    clear = clear_type(media_type)
    if ".tar" not in clear:
        raise ImageError("layer", f"media type {ascii(media_type)[:120]}; expected a tar layer, plain or with gzip or zstd")
    return compression(media_type)


def read_ahead_pays() -> bool:
    """Whether a second thread can run at the same time as the first."""
    return len(os.sched_getaffinity(0)) > 1


class UncompressedLayer:
    """The archive within a layer. Use as a context manager. One thread at a time.

    Attributes: size: bytes given out so far.
    """

    def __init__(self, chunks: Iterator[bytes], budget: Budget, *, ahead: bool) -> None:
        self._source = _ReadAhead(chunks) if ahead else chunks
        self._budget = budget
        self._digest = hashlib.sha256()
        self._ended = False
        self.size = 0

    def __enter__(self) -> UncompressedLayer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def next_chunk(self) -> bytes:
        """The next bytes; b"" at the end. Raises ImageError for damaged or truncated data, or beyond the limits."""
        for chunk in self._source:
            self._digest.update(chunk)
            self.size += len(chunk)
            self._budget.produced(len(chunk))
            return chunk
        self._ended = True
        return b""

    def finish(self) -> str:
        """Reads what is left, and gives the digest of everything: "sha256:..."."""
        while self.next_chunk():
            pass
        return self.diff_id

    @property
    def diff_id(self) -> str:
        """Digest of everything. Raises ValueError before the end."""
        if not self._ended:
            raise ValueError("the layer has not been read to its end")
        return f"sha256:{self._digest.hexdigest()}"

    def close(self) -> None:
        """Ends the thread that reads ahead. Again: no effect."""
        self._ended = True
        if isinstance(self._source, _ReadAhead):
            self._source.close()


def decompress(
    reader: Readable, media_type: str, limits: Limits | Budget = DEFAULT_LIMITS, *, ahead: bool | None = None
) -> UncompressedLayer:
    """The archive in a layer.

    In: reader       the layer's clear bytes
        media_type   of the layer (a "+encrypted" at its end is ignored), or "none", "gzip", "zstd"
        limits       ratio, ratio_floor and total_bytes count; a Budget when several layers share them
        ahead        read and decompress in another thread, at most 4 MiB ahead. Default: when there is a second CPU.
                     `reader` is then used in that thread only, until close().
    Raises ImageError for another media type; MissingExtraError for zstd without its package.
    """
    budget = Budget(limits) if isinstance(limits, Limits) else limits
    how = media_type if media_type in ("none", "gzip", "zstd") else compression_of(media_type)
    make: Callable[[Readable, Limits], Iterator[bytes]]
    if how == "gzip":
        make = _gunzip
    elif how == "zstd":
        need("zstd", "zstandard")
        make = _unzstd
    else:
        make = _copy
    return UncompressedLayer(make(reader, budget.limits), budget, ahead=read_ahead_pays() if ahead is None else ahead)


def inflater() -> Any:
    """The module that reads gzip: isal.isal_zlib, or zlib, whose interface it has."""
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


def _copy(reader: Readable, _limits: Limits) -> Iterator[bytes]:
    while chunk := reader.read(CHUNK):
        yield chunk


def _gunzip(reader: Readable, limits: Limits) -> Iterator[bytes]:
    count_in = count_out = 0
    module = inflater()
    member = module.decompressobj(wbits=_GZIP)
    begun = False  # whether any byte of the current member was seen
    pending: bytes | memoryview = b""
    read = _into_one_buffer(reader)
    while True:
        if not pending:
            pending = read()
            count_in += len(pending)
            if not pending:
                if begun:
                    raise ImageError("gzip", "the data ends within a member")
                return
        if member.eof:
            if not bytes(pending).strip(b"\0"):
                # Some writers fill up with zeros; nothing but zeros may follow.
                while rest := read():
                    if bytes(rest).strip(b"\0"):
                        raise ImageError("gzip", "something follows the zeros behind a member")
                return
            member, begun = module.decompressobj(wbits=_GZIP), False
        try:
            chunk = member.decompress(pending, CHUNK)
        except module.error as error:
            raise ImageError("gzip", f"damaged data: {error}") from None
        begun = True
        pending = member.unconsumed_tail
        if member.eof:
            pending, begun = member.unused_data, False
        count_out += len(chunk)
        _check_ratio("gzip", count_in - len(pending), count_out, limits)
        if chunk:
            yield chunk


def _into_one_buffer(reader: Readable) -> Callable[[], bytes | memoryview]:
    """Reads READ bytes at a time, without copies where the reader can fill a buffer. Each answer is valid until the next one."""
    readinto = getattr(reader, "readinto", None)
    if readinto is None:
        return lambda: reader.read(READ)
    view = memoryview(bytearray(READ))
    return lambda: view[: readinto(view)]


class _Counted:
    """A reader that counts."""

    def __init__(self, reader: Readable) -> None:
        self._reader = reader
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._reader.read(size if size > 0 else READ)
        self.count += len(data)
        return data


def _unzstd(reader: Readable, limits: Limits) -> Iterator[bytes]:
    import zstandard

    source = _Counted(reader)
    # The window decides about memory: a frame may ask for gigabytes.
    machine = zstandard.ZstdDecompressor(max_window_size=1 << (limits.zstd_window.bit_length() - 1))
    count_out = 0
    with machine.stream_reader(source, read_size=READ, read_across_frames=True, closefd=False) as stream:  # type: ignore[arg-type]
        while True:
            try:
                chunk = stream.read(CHUNK)
            except zstandard.ZstdError as error:
                raise ImageError("zstd", f"damaged data, or a window of more than {limits.zstd_window} bytes: {error}") from None
            if not chunk:
                return
            count_out += len(chunk)
            _check_ratio("zstd", source.count, count_out, limits)
            yield chunk


def _check_ratio(what: str, count_in: int, count_out: int, limits: Limits) -> None:
    if count_out > limits.ratio_floor and count_out > limits.ratio * count_in:
        raise ImageError(what, f"{count_in} bytes became {count_out}; more than {limits.ratio} times as many are refused")


class _ReadAhead:
    """Runs an iterator in another thread, a bounded number of items ahead."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._items: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(DEPTH)
        self._stop = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="csvfast-decompress", daemon=True)
        self._thread.start()

    def _run(self, source: Iterator[bytes]) -> None:
        last: BaseException | None = None
        try:
            while True:
                self._room.acquire()
                if self._stop:
                    return
                item = next(source, None)
                if item is None:
                    return
                self._items.put(item)
        except BaseException as error:  # whatever it is, the thread that reads raises it
            last = error
        finally:
            self._items.put(last)

    def __iter__(self) -> _ReadAhead:
        return self

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, bytes):
            self._room.release()
            return item
        self._ended = True
        if item is not None:
            raise item
        raise StopIteration

    def close(self) -> None:
        self._ended = self._stop = True
        self._room.release()
        self._thread.join()
