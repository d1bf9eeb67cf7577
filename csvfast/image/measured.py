"""Container images as sources of measurements: each blob of an image is one thing, manifest and configuration included.

    csvfast measure batch oci:images/app:1 docker://registry.example/app

A blob's etag is its digest in the image, so a ledger knows without reading that nothing has changed; what is read is checked
against that digest, and other bytes are an error. An index stands for all its images. Registered by `csvfast measure batch`;
in Python: `register_provider("oci", "csvfast.image.measured:provider")`, and "docker".

Source: opencontainers/image-spec manifest.md, image-index.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from csvfast.errors import ArgumentError, ImageError, RegistryError
from csvfast.image.blobs import BlobReader, VerifiedReader
from csvfast.image.descriptor import Descriptor, is_index, is_manifest
from csvfast.image.manifest import Index, Manifest
from csvfast.image.reference import Reference, parse_reference
from csvfast.measure.errors import FormatError, ParameterError, SourceError, SourceNotFoundError, SourceUnreadableError
from csvfast.measure.fleet.providers import CredentialsError, Found, SourceConnectionError
from csvfast.measure.fleet.rows import Identity

if TYPE_CHECKING:
    from csvfast.image.layout import OciLayout
    from csvfast.image.registry import RegistryClient

__all__ = ["BlobReadable", "ImageProvider", "provider"]

PIECE_BYTES: Final = 1 << 20


class ImageProvider:
    """See SourceProvider: blobs of images, in layouts and registries. Thread-safety: safe from any thread."""

    def expand(self, source: str) -> Iterator[Found]:
        """Manifests, configurations and layers of an image, or of all images of an index; of a layout without a tag all of it.

        Names are "SOURCE@DIGEST"; each blob comes once, in the order in which manifests name them.
        """
        try:
            reference = _parsed(source)
            place = _opened(reference)
            try:
                found = _blobs(place, reference)
            finally:
                place.close()
        except (ImageError, OSError) as error:
            raise _translated(source, error) from error
        for descriptor in found.values():
            location = str(reference.with_wanted(descriptor.digest))
            yield Found(f"{source}@{descriptor.digest}", f"{location}#{descriptor.size}", Identity(etag=descriptor.digest))

    def open(self, location: str) -> BlobReadable:
        """A blob, by a location that `expand` gave: the image's place, the digest, and the size after "#"."""
        place, _, size = location.rpartition("#")
        reference = _parsed(place)
        if reference.digest is None or not size.isdigit():
            raise ParameterError(f"{location}: names no blob; expected REFERENCE@DIGEST#SIZE")
        return BlobReadable(location, reference, Descriptor("application/octet-stream", reference.digest, int(size)))


provider: Final = ImageProvider()


class BlobReadable:
    """A blob that is open: see Readable. Read in order it is checked on the way, otherwise once more at the end.

    Thread-safety: used by one thread at a time.
    """

    def __init__(self, path: str, reference: Reference, descriptor: Descriptor) -> None:
        self.path: Final = path
        self._descriptor = descriptor
        self._reader: BlobReader | None = None
        self._offset = 0
        self._verified = False
        try:
            self._place = _opened(reference)
        except (ImageError, OSError) as error:
            raise _translated(path, error) from error

    @property
    def size(self) -> int:
        """Bytes."""
        return self._descriptor.size

    @property
    def identity(self) -> Identity:
        """The digest. No size: what has one may be split, and a part cannot be checked against a digest of the whole."""
        return Identity(etag=self._descriptor.digest)

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer. Raises SourceError, FormatError (other bytes than the digest promises)."""
        try:
            reader = self._reader_at(offset)
            done = 0
            while done < len(buffer):
                count = reader.readinto(buffer[done:])
                if not count:
                    raise ImageError(f"blob {self._descriptor.digest}", f"ended at byte {offset + done}")
                done += count
            self._offset = offset + done
            if self._offset == self.size and isinstance(reader, VerifiedReader):
                self._finish(reader)
        except (ImageError, OSError) as error:
            raise _translated(self.path, error) from error

    def check_unchanged(self) -> None:
        """Raises FormatError unless the whole blob had its digest."""
        if self._verified:
            return
        try:
            with VerifiedReader(self._place.open_blob(self._descriptor), self._descriptor) as reader:
                self._finish(reader)
        except (ImageError, OSError) as error:
            raise _translated(self.path, error) from error

    def close(self) -> None:
        """Harmless when repeated."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._place.close()

    def _reader_at(self, offset: int) -> BlobReader:
        if self._reader is None or offset != self._offset:
            if self._reader is not None:
                self._reader.close()
                self._reader = None
            raw = self._place.open_blob(self._descriptor, offset)
            self._reader = raw if offset else VerifiedReader(raw, self._descriptor)
            self._offset = offset
        return self._reader

    def _finish(self, reader: VerifiedReader) -> None:
        room = bytearray(PIECE_BYTES)
        while reader.readinto(room):
            pass
        self._verified = reader.verified


def _parsed(source: str) -> Reference:
    try:
        return parse_reference(source)
    except ArgumentError as error:
        raise ParameterError(str(error)) from error


def _opened(reference: Reference) -> OciLayout | RegistryClient:
    from csvfast.image.registry import open_source

    return open_source(reference)


def _blobs(place: OciLayout | RegistryClient, reference: Reference) -> dict[str, Descriptor]:
    from csvfast.image.layout import OciLayout

    found: dict[str, Descriptor] = {}
    if isinstance(place, OciLayout) and reference.wanted is None:
        waiting = [one.digest for one in place.index().manifests]
    else:
        waiting = [reference.wanted or "latest"]
    depth = 0
    while waiting:
        depth += 1
        if depth > 4:
            raise ImageError(str(reference), "indexes in indexes in indexes; expected an image")
        below: list[str] = []
        for wanted in waiting:
            descriptor, data = place.resolve(wanted)
            if descriptor.digest in found:
                continue
            found[descriptor.digest] = descriptor
            if is_index(descriptor.media_type):
                below += [one.digest for one in Index.parse(data, descriptor.media_type).manifests]
            elif is_manifest(descriptor.media_type):
                manifest = Manifest.parse(data, descriptor.media_type)
                for one in (manifest.config, *manifest.layers):
                    found.setdefault(one.digest, one)
        waiting = below
    return found


def _translated(source: str, error: Exception) -> SourceError | FormatError:
    if isinstance(error, RegistryError):
        if error.status in (401, 403):
            return CredentialsError(f"{source}: refused: {error}; expected credentials that are valid there")
        if error.status == 404:
            return SourceNotFoundError(f"{source}: {error}")
        return SourceConnectionError(f"{source}: {error}")
    if isinstance(error, FileNotFoundError):
        return SourceNotFoundError(f"{source}: no such layout")
    if isinstance(error, OSError):
        return SourceUnreadableError(f"{source}: cannot be read: {error.strerror or error}")
    return FormatError(f"{source}: {error}")
