"""What encrypting, decrypting and rewrapping an image have in common: find its manifests, change their layers, write the rest.

Blobs go first, then manifests, and the tag at last: whoever looks at the target meanwhile sees the image as it was. What is
written is always OCI's: Docker's media types become OCI's.

Source: opencontainers/image-spec manifest.md, image-index.md.
Thread-safety: functions without state; one call for a source and a target at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

from csvfast.errors import ImageError
from csvfast.image.blobs import HashedChunks, VerifiedReader, read_blob
from csvfast.image.descriptor import INDEX_TYPE, MANIFEST_TYPE, Descriptor, is_index, is_manifest, oci_type
from csvfast.image.manifest import MANIFEST_LIMIT, Index, Manifest, choose

if TYPE_CHECKING:
    from csvfast.image.blobs import BlobSource, BlobTarget

__all__ = ["ALL_PLATFORMS", "Change", "Progress", "copy_blob", "counted", "find_manifest", "selected_layers", "transform_image"]

ALL_PLATFORMS: Final = "all"

_Block = TypeVar("_Block", bytes, memoryview)

Progress = Callable[[int], object]
"""Called with the bytes that are done since it was called last."""

Change = Callable[[Manifest], Sequence[Descriptor]]
"""From a manifest to its new layers, whose blobs are in the target then."""


def transform_image(
    source: BlobSource,
    target: BlobTarget,
    change: Change,
    *,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
) -> Descriptor:
    """Writes an image with other layers. Out: the descriptor of its manifest, or of the index.

    In: wanted     tag or digest in the source
        tag        in the target
        platform   of an index: "linux/amd64", "all" (the index stays one), None: this machine's
    ImageError, RegistryError, OSError, and what `change` raises.
    """
    top, data = source.resolve(wanted)
    if is_index(top.media_type) and platform == ALL_PLATFORMS:
        index = Index.parse(data, top.media_type)
        manifests = []
        for one in index.manifests:
            # Attestations and signatures are manifests, too; what is no image is of no use beside changed ones.
            if not is_manifest(one.media_type) or (one.platform is not None and one.platform.os == "unknown"):
                continue
            manifest = Manifest.parse(read_blob(source, one, MANIFEST_LIMIT), one.media_type)
            made = _transformed(source, target, change, manifest, None)
            manifests.append(one.replace(media_type=made.media_type, digest=made.digest, size=made.size))
        if not manifests:
            raise ImageError("index", "no image in it")
        return target.put_manifest(index.replace(manifests=tuple(manifests), media_type=INDEX_TYPE).encode(), INDEX_TYPE, tag)
    return _transformed(source, target, change, _chosen(source, top, data, platform), tag)


def find_manifest(source: BlobSource, wanted: str | None = None, platform: str | None = None) -> Manifest:
    """The manifest of one image. In: platform   of an index: "linux/amd64"; None: this machine's. ImageError, RegistryError."""
    return _chosen(source, *source.resolve(wanted), platform)


def _chosen(source: BlobSource, top: Descriptor, data: bytes, platform: str | None) -> Manifest:
    kind = top.media_type
    if is_index(kind):
        parts = [] if platform is None else platform.split("/")
        if platform is not None and len(parts) not in (2, 3):
            raise ImageError("platform", f"{ascii(platform)[:60]}; expected OS/ARCHITECTURE[/VARIANT] or {ALL_PLATFORMS}")
        chosen = choose(Index.parse(data, kind), *parts)
        kind, data = chosen.media_type, read_blob(source, chosen, MANIFEST_LIMIT)
    return Manifest.parse(data, kind)


def _transformed(source: BlobSource, target: BlobTarget, change: Change, manifest: Manifest, tag: str | None) -> Descriptor:
    layers = tuple(change(manifest))
    copy_blob(source, target, manifest.config)
    config = manifest.config.replace(media_type=oci_type(manifest.config.media_type))
    made = manifest.replace(media_type=MANIFEST_TYPE, config=config, layers=layers)
    return target.put_manifest(made.encode(), MANIFEST_TYPE, tag)


def selected_layers(manifest: Manifest, wanted: Sequence[int] | None) -> frozenset[int]:
    """Indexes of layers, from 0. In: wanted   -1 is the last one; None: all. ImageError: there is no such layer."""
    count = len(manifest.layers)
    if wanted is None:
        return frozenset(range(count))
    for one in wanted:
        if not -count <= one < count:
            raise ImageError(f"layer {one}", f"the image has {count}; expected {-count} to {count - 1}")
    return frozenset(one % count for one in wanted)


def copy_blob(source: BlobSource, target: BlobTarget, descriptor: Descriptor, progress: Progress | None = None) -> Descriptor:
    """Copies a blob, verified, unless it is there. Out: its descriptor, with OCI's media type."""
    if target.has_blob(descriptor):
        if progress is not None:
            progress(descriptor.size)
    else:
        with closing(VerifiedReader(source.open_blob(descriptor), descriptor)) as reader:
            blocks = counted(reader, progress)
            # What the reader has not found right it does not end.
            target.put_blob(descriptor, HashedChunks(blocks, lambda: descriptor.digest.partition(":")[2]))
    return descriptor.replace(media_type=oci_type(descriptor.media_type))


def counted(blocks: Iterable[_Block], progress: Progress | None) -> Iterator[_Block]:
    """The blocks, while progress is told."""
    for block in blocks:
        yield block
        if progress is not None:
            progress(len(block))
