"""Where blobs come from and go to: interfaces of layouts and registries, and the reader that believes nobody.

    source = open_source(parse_reference("docker://registry.example/app:1"))     csvfast.image.registry
    descriptor, data = source.resolve("1")                                       verified
    with VerifiedReader(source.open_blob(layer), layer) as reader: ...           verified at its end

Source: opencontainers/image-spec descriptor.md (verification).
Thread-safety: readers belong to one thread at a time; sources and targets say what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Protocol, Self

from csvfast.errors import ImageError, IntegrityError
from csvfast.image.descriptor import Descriptor, is_index, is_manifest, new_hash
from csvfast.image.manifest import Index, Manifest, choose

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

__all__ = [
    "CHUNK_BYTES",
    "BlobReader",
    "BlobSource",
    "BlobTarget",
    "ChunkHash",
    "HashedChunks",
    "VerifiedReader",
    "chunk_hash",
    "read_blob",
    "resolve_manifest",
]

CHUNK_BYTES: Final = 1 << 20
"""What is read at a time where the caller does not say."""


class BlobReader(Protocol):
    """A blob's bytes, one after the other."""

    def read(self, size: int, /) -> bytes:
        """1 to `size` next bytes, b"" at the end. ImageError, OSError."""

    def readinto(self, buffer: Buffer, /) -> int:
        """The same into a writable buffer; how many."""

    def close(self) -> None:
        """May be called twice."""


class BlobSource(Protocol):
    """A place that images are read from."""

    def resolve(self, wanted: str | None, /) -> tuple[Descriptor, bytes]:
        """The manifest or the index of a tag or digest, whose bytes have the descriptor's digest.

        In: wanted   None: the only image of a layout, a registry's "latest"
        ImageError: there is none. RegistryError.
        """

    def open_blob(self, descriptor: Descriptor, offset: int = 0, /) -> BlobReader:
        """A blob's bytes from `offset` on, NOT verified: put a VerifiedReader around it. ImageError: there is none."""

    def close(self) -> None:
        """May be called twice."""


class BlobTarget(Protocol):
    """A place that images are written to."""

    def has_blob(self, descriptor: Descriptor, /) -> bool:
        """Whether a blob of that digest and size is there already."""

    def put_blob(self, descriptor: Descriptor | None, chunks: Iterable[Buffer], /) -> Descriptor:
        """Writes a blob, whole or not at all.

        In:  descriptor   what it must be; None: whatever comes (its media type is then application/octet-stream)
             chunks       its bytes; each buffer may be used again after the next one is asked for
        Out: the descriptor, or one with the SHA-256 and size of what came.
        IntegrityError: the bytes have another digest or size than the descriptor; nothing has been written then.
        """

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None, /) -> Descriptor:
        """Writes a manifest or an index, whose blobs are there already, and gives it a tag (which an older one loses)."""

    def close(self) -> None:
        """May be called twice."""


class HashedChunks:
    """Chunks of a blob whose SHA-256 is computed where they are made: put_blob need not do it again.

    In: chunks      the bytes
        hexdigest   their SHA-256, to be called when all of them have been taken
    """

    def __init__(self, chunks: Iterable[Buffer], hexdigest: Callable[[], str]) -> None:
        self._chunks = chunks
        self.hexdigest: Final = hexdigest

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._chunks)

    def update(self, _data: Buffer) -> None:
        """Nothing: see chunk_hash."""


class ChunkHash(Protocol):
    """What put_blob needs of a hash."""

    def update(self, data: Buffer, /) -> None:
        """The next chunk."""

    def hexdigest(self) -> str:
        """Of all chunks."""


def chunk_hash(chunks: Iterable[Buffer], digest: str) -> ChunkHash:
    """What put_blob hashes chunks with. In: digest   one of the algorithm that is wanted, or "sha256:"."""
    return chunks if isinstance(chunks, HashedChunks) and digest.startswith("sha256:") else new_hash(digest)


class VerifiedReader:
    """A reader that checks a blob's size and digest at its end: its last read raises instead of returning b"".

    What has been read before that is not verified: use it only where a later error can undo it.
    In: raw          from the blob's first byte; closed with this one
        descriptor   what it must be
    IntegrityError from reads: fewer or more bytes, another digest. A context manager.
    """

    def __init__(self, raw: BlobReader, descriptor: Descriptor) -> None:
        self._raw = raw
        self.descriptor: Final = descriptor
        self._hash = new_hash(descriptor.digest)
        self._left = descriptor.size
        self._done = False

    @property
    def verified(self) -> bool:
        """Whether the end has been seen, and everything was as promised."""
        return self._done

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """As BlobReader; at the end, IntegrityError unless the bytes were those of the descriptor."""
        if self._done or size == 0:
            return b""
        # One byte more than is left, so that a surplus is seen as soon as there is one.
        data = self._raw.read(min(size, self._left + 1) if size > 0 else min(CHUNK_BYTES, self._left + 1))
        self._take(data, len(data))
        return data

    def readinto(self, buffer: Buffer) -> int:
        """As read."""
        view = memoryview(buffer).cast("B")
        if self._done or not view:
            return 0
        view = view[: self._left + 1]
        count = self._raw.readinto(view)
        self._take(view[:count], count)
        return count

    def close(self) -> None:
        """Closes the raw reader, too."""
        self._raw.close()

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(CHUNK_BYTES):
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, data: Buffer, count: int) -> None:
        if count > self._left:
            problem = f"more than {self.descriptor.size} bytes; expected exactly these"
            raise IntegrityError(f"blob {self.descriptor.digest}", problem)
        if count:
            self._hash.update(data)
            self._left -= count
            return
        if self._left:
            have = self.descriptor.size - self._left
            raise IntegrityError(f"blob {self.descriptor.digest}", f"{have} bytes; expected {self.descriptor.size}")
        algorithm = self.descriptor.digest.partition(":")[0]
        found = f"{algorithm}:{self._hash.hexdigest()}"
        if found != self.descriptor.digest:
            raise IntegrityError(f"blob {self.descriptor.digest}", f"the bytes have the digest {found}")
        self._done = True


def read_blob(source: BlobSource, descriptor: Descriptor, limit: int) -> bytes:
    """A whole blob, verified. ImageError: longer than `limit` bytes. IntegrityError: other bytes than promised."""
    if descriptor.size > limit:
        raise ImageError(f"blob {descriptor.digest}", f"{descriptor.size} bytes; expected at most {limit}")
    with VerifiedReader(source.open_blob(descriptor), descriptor) as reader:
        return b"".join(reader)


def resolve_manifest(
    source: BlobSource, wanted: str | None, os: str = "linux", architecture: str | None = None, variant: str | None = None
) -> tuple[Descriptor, Manifest]:
    """One image's manifest, chosen from an index by platform where there is one; what was chosen is verified, too.

    In: wanted   tag or digest; None: as BlobSource.resolve
        os, architecture, variant   as csvfast.image.manifest.choose
    ImageError: there is none; an index in an index. RegistryError.
    """
    descriptor, data = source.resolve(wanted)
    if is_index(descriptor.media_type):
        chosen = choose(Index.parse(data, descriptor.media_type), os, architecture, variant)
        descriptor, data = source.resolve(chosen.digest)
        if not descriptor.same_blob(chosen):
            raise IntegrityError(f"image {chosen.digest}", f"{descriptor.size} bytes; expected {chosen.size}")
        descriptor = chosen
    if not is_manifest(descriptor.media_type):
        raise ImageError(f"image {descriptor.digest}", f"mediaType {descriptor.media_type}; expected an image's manifest")
    return descriptor, Manifest.parse(data, descriptor.media_type)
