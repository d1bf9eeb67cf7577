"""OCI image layouts: a directory with an image's blobs under their digests, and an index of what is there.

    oci-layout                      {"imageLayoutVersion":"1.0.0"}
    index.json                      the index; tags are annotations org.opencontainers.image.ref.name
    blobs/sha256/<hexadecimal>      manifests, configurations, layers

Whatever is written appears by one rename, complete and on the disk, or not at all; a writer that is killed leaves no half blob
where the file system has unnamed files (O_TMPFILE). Several processes may write at once: the index has a lock (flock of the
directory). Symbolic links are followed: what a blob is, its digest decides.

Source: opencontainers/image-spec image-layout.md; containers/image oci/layout/oci_dest.go.
Thread-safety: all methods, from several threads and processes.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.errors import ImageError, IntegrityError
from csvfast.image.blobs import chunk_hash, read_blob
from csvfast.image.descriptor import Descriptor, checked_digest, is_digest, is_index, is_manifest
from csvfast.image.manifest import INDEX_LIMIT, MANIFEST_LIMIT, Index, media_type_of
from csvfast.image.new_file import new_file

if TYPE_CHECKING:
    from io import FileIO

    from typing_extensions import Buffer

__all__ = ["TAG_ANNOTATION", "OciLayout"]

TAG_ANNOTATION: Final = "org.opencontainers.image.ref.name"
UNKNOWN_TYPE: Final = "application/octet-stream"

_VERSION: Final = b'{"imageLayoutVersion":"1.0.0"}'
_SMALL: Final = 4096
_ALGORITHMS: Final = ("sha256", "sha512")


class OciLayout:
    """A layout: a BlobSource and a BlobTarget. A context manager, which has nothing to close.

    In: path     of the directory
        create   make what is missing of it; else it must be there
    ImageError: no layout, or one of another version. OSError.
    """

    def __init__(self, path: Path | str, create: bool = False) -> None:
        self.path: Final = Path(path)
        if create:
            self._create()
        document = self._small_file("oci-layout", _SMALL, "an OCI layout (oci-layout is missing)")
        version = document.get("imageLayoutVersion")
        if type(version) is not str or not version.startswith("1."):
            raise ImageError(f"{self.path}/oci-layout", f"version {ascii(version)[:40]}; expected 1.0.0")

    # ---- Reading

    def index(self) -> Index:
        """What is there, as index.json has it. ImageError, OSError."""
        return Index.parse(self._file("index.json", MANIFEST_LIMIT))

    def tags(self) -> dict[str, Descriptor]:
        """Manifests and indexes by tag. ImageError, OSError."""
        return {one.annotations[TAG_ANNOTATION]: one for one in self.index().manifests if TAG_ANNOTATION in one.annotations}

    def resolve(self, wanted: str | None = None, /) -> tuple[Descriptor, bytes]:
        """See BlobSource. A digest need not stand in index.json; its blob is enough."""
        entries = self.index().manifests
        if wanted is None:
            found = list(entries)
            if len(found) != 1:
                raise ImageError(str(self.path), f"{len(found)} images; expected one, or a tag: {_tags(entries)}")
        elif is_digest(wanted):
            found = [one for one in entries if one.digest == wanted][:1] or [self._unlisted(wanted)]
        else:
            found = [one for one in entries if one.annotations.get(TAG_ANNOTATION) == wanted]
            if not found:
                raise ImageError(str(self.path), f"no image {ascii(wanted)[:140]}; there are: {_tags(entries)}")
            if any(one.digest != found[0].digest for one in found):
                raise ImageError(str(self.path), f"several images {ascii(wanted)[:140]}; expected one of each tag")
        data = read_blob(self, found[0], MANIFEST_LIMIT)
        return found[0], data

    def open_blob(self, descriptor: Descriptor, offset: int = 0, /) -> FileIO:
        """See BlobSource. ImageError: no such blob. IntegrityError: one of another size."""
        handle = self._open(self._place(descriptor.digest), f"blob {descriptor.digest}")
        try:
            size = os.fstat(handle).st_size
            if size != descriptor.size:
                raise IntegrityError(f"blob {descriptor.digest}", f"{size} bytes in {self.path}; expected {descriptor.size}")
            if offset:
                os.lseek(handle, offset, os.SEEK_SET)
        except BaseException:
            os.close(handle)
            raise
        return open(handle, "rb", buffering=0)  # noqa: PTH123 - a descriptor

    # ---- Writing

    def has_blob(self, descriptor: Descriptor, /) -> bool:
        """See BlobTarget. The bytes are not read again: whoever reads them verifies them."""
        try:
            status = self._place(descriptor.digest).stat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size

    def put_blob(self, descriptor: Descriptor | None, chunks: Iterable[Buffer], /) -> Descriptor:
        """See BlobTarget. OSError: no room, and nothing has been written."""
        subject = "blob" if descriptor is None else f"blob {descriptor.digest}"
        algorithm = "sha256" if descriptor is None else descriptor.digest.partition(":")[0]
        directory = self.path / "blobs" / algorithm
        directory.mkdir(parents=True, exist_ok=True)
        with new_file(directory) as new:
            check, size = chunk_hash(chunks, f"{algorithm}:"), 0
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                size += len(view)
                if descriptor is not None and size > descriptor.size:
                    raise IntegrityError(subject, f"more than {descriptor.size} bytes; expected exactly these")
                check.update(view)
                new.write(view)
            digest = f"{algorithm}:{check.hexdigest()}"
            if descriptor is None:
                descriptor = Descriptor(UNKNOWN_TYPE, digest, size)
            if size != descriptor.size:
                raise IntegrityError(subject, f"{size} bytes; expected {descriptor.size}")
            if digest != descriptor.digest:
                raise IntegrityError(subject, f"the bytes have the digest {digest}")
            new.publish(self._place(digest))
        return descriptor

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None, /) -> Descriptor:
        """See BlobTarget. Without a tag, the index lists it as one without; manifests of an index that is put leave the list.

        ImageError: more than could be read again; nothing has been written to the index then.
        """
        if not is_manifest(media_type) and not is_index(media_type):
            raise ImageError("manifest", f"mediaType {ascii(media_type)[:100]}; expected a manifest's or an index's")
        if len(data) > MANIFEST_LIMIT:
            raise ImageError("manifest", f"{len(data)} bytes; expected at most {MANIFEST_LIMIT}")
        made = Descriptor.of(data, media_type)
        known = {made.digest}
        if is_index(media_type):
            known |= {one.digest for one in Index.parse(data, media_type).manifests}
        self.put_blob(made, [data])

        def stays(one: Descriptor) -> bool:
            name = one.annotations.get(TAG_ANNOTATION)
            return one.digest not in known if name is None else name != tag

        with self._locked():
            index = self.index()
            entries = [one for one in index.manifests if stays(one)]
            if tag is not None:
                made = made.replace(annotations={TAG_ANNOTATION: tag})
            if tag is not None or all(one.digest != made.digest for one in entries):
                entries.append(made)
            encoded = index.replace(manifests=tuple(entries)).encode()
            if len(entries) > INDEX_LIMIT or len(encoded) > MANIFEST_LIMIT:
                found = f"{len(entries)} images, {len(encoded)} bytes of index"
                raise ImageError(f"{self.path}/index.json", f"{found}; expected at most {INDEX_LIMIT}, {MANIFEST_LIMIT}")
            self._write("index.json", encoded)
        return made

    def remove_tag(self, tag: str) -> bool:
        """Takes a tag away; whether there was one. Blobs stay."""
        with self._locked():
            index = self.index()
            entries = tuple(one for one in index.manifests if one.annotations.get(TAG_ANNOTATION) != tag)
            if len(entries) == len(index.manifests):
                return False
            self._write("index.json", index.replace(manifests=entries).encode())
            return True

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    # ---- Files

    def blob_path(self, digest: str) -> Path:
        """Where a blob's file is, or would be. ImageError: no digest."""
        return self._place(checked_digest(digest, "blob"))

    def _place(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        return self.path / "blobs" / algorithm / name

    def _unlisted(self, digest: str) -> Descriptor:
        """A manifest or an index that another index lists."""
        handle = self._open(self._place(digest), f"image {digest}")
        try:
            size = os.fstat(handle).st_size
            data = b"" if size > MANIFEST_LIMIT else _read(handle, size)
        finally:
            os.close(handle)
        if size > MANIFEST_LIMIT:
            raise ImageError(f"image {digest}", f"{size} bytes; expected a manifest of at most {MANIFEST_LIMIT}")
        return Descriptor(media_type_of(data), digest, size)

    def _open(self, path: Path, subject: str) -> int:
        """A regular file's descriptor."""
        try:
            # O_NONBLOCK: a pipe in the file's place must not hang the program.
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise ImageError(subject, f"is not in {self.path}") from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ImageError(subject, f"is no regular file in {self.path}")
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _file(self, name: str, limit: int) -> bytes:
        handle = self._open(self.path / name, name)
        try:
            data = _read(handle, limit + 1)
        finally:
            os.close(handle)
        if len(data) > limit:
            raise ImageError(f"{self.path}/{name}", f"more than {limit} bytes")
        return data

    def _small_file(self, name: str, limit: int, expected: str) -> Mapping[str, Any]:
        from csvfast.image.manifest import parse_json

        if not (self.path / name).exists():
            raise ImageError(str(self.path), f"expected {expected}")
        return parse_json(self._file(name, limit), name, limit)

    def _create(self) -> None:
        for algorithm in _ALGORITHMS[:1]:
            (self.path / "blobs" / algorithm).mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not (self.path / "index.json").exists():
                self._write("index.json", Index(()).encode())
            # Last, because it is what makes a directory a layout.
            if not (self.path / "oci-layout").exists():
                self._write("oci-layout", _VERSION)

    def _write(self, name: str, data: bytes) -> None:
        with new_file(self.path) as new:
            new.write(memoryview(data))
            new.publish(self.path / name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # the lock's end, too


def _read(handle: int, limit: int) -> bytes:
    data = bytearray()
    while len(data) < limit and (piece := os.read(handle, limit - len(data))):
        data += piece
    return bytes(data)


def _tags(entries: Iterable[Descriptor]) -> str:
    names = [one.annotations.get(TAG_ANNOTATION, one.digest) for one in entries]
    return ", ".join(ascii(name)[1:-1] for name in names[:20])[:800] or "none"
