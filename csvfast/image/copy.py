"""Copying images between layouts and registries as they are: every byte and every digest stays.

Blobs go first, then manifests, and the tag at last: whoever looks at the target meanwhile sees the image as it was. Blobs that
the target has are not sent again, and a registry takes them over from its other repositories itself.

Source: opencontainers/image-spec manifest.md, image-index.md; opencontainers/distribution-spec spec.md.
Thread-safety: one call for a source and a target at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from csvfast.errors import ImageError, RegistryError
from csvfast.image.blobs import read_blob
from csvfast.image.descriptor import Descriptor, is_index, is_manifest
from csvfast.image.manifest import MANIFEST_LIMIT, Index, Manifest, choose
from csvfast.image.transform import ALL_PLATFORMS, Progress, copy_blob

if TYPE_CHECKING:
    from csvfast.image.blobs import BlobSource, BlobTarget

__all__ = ["ALL_PLATFORMS", "copy_image", "platform_parts"]


def copy_image(
    source: BlobSource,
    target: BlobTarget,
    *,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
    transform: Callable[[Manifest], Manifest] | None = None,
    progress: Progress | None = None,
) -> Descriptor:
    """Copies an image. Out: the descriptor of its manifest, or of its index, in the target.

    In: wanted      tag or digest in the source; None: as BlobSource.resolve
        tag         in the target; None: by digest alone
        platform    of an index: "linux/amd64", "linux/arm64/v8"; "all": the index with everything in it; None: this machine's
        transform   from each manifest to the one to be written, whose blobs are in the source or in the target already
        progress    called with the bytes that are done since it was called last
    ImageError, RegistryError, OSError; what `transform` raises. The target's tag is then what it was.
    """
    top, data = source.resolve(wanted)
    if is_index(top.media_type):
        index = Index.parse(data, top.media_type)
        if platform == ALL_PLATFORMS:
            made = tuple(_child(source, target, one, transform, progress) for one in index.manifests)
            if made != index.manifests:
                data = index.replace(manifests=made).encode()
            return target.put_manifest(data, top.media_type, tag)
        chosen = choose(index, *platform_parts(platform))
        top, data = chosen, read_blob(source, chosen, MANIFEST_LIMIT)
    return _manifest(source, target, data, top.media_type, transform, progress, tag)


def _child(
    source: BlobSource, target: BlobTarget, one: Descriptor, transform: Callable[[Manifest], Manifest] | None,
    progress: Progress | None,
) -> Descriptor:  # fmt: skip
    if not is_manifest(one.media_type):
        raise ImageError(f"index: {one.digest}", f"mediaType {one.media_type}; expected images' manifests")
    data = read_blob(source, one, MANIFEST_LIMIT)
    made = _manifest(source, target, data, one.media_type, transform, progress, None)
    return one.replace(media_type=made.media_type, digest=made.digest, size=made.size)


def _manifest(
    source: BlobSource, target: BlobTarget, data: bytes, media_type: str, transform: Callable[[Manifest], Manifest] | None,
    progress: Progress | None, tag: str | None,
) -> Descriptor:  # fmt: skip
    manifest = Manifest.parse(data, media_type)
    if transform is not None:
        manifest = transform(manifest)
    for blob in {one.digest: one for one in (*manifest.layers, manifest.config)}.values():
        if not _mounted(source, target, blob):
            copy_blob(source, target, blob, progress)
        elif progress is not None:
            progress(blob.size)
    return target.put_manifest(manifest.encode(), manifest.media_type, tag)


def _mounted(source: BlobSource, target: BlobTarget, blob: Descriptor) -> bool:
    """Whether a registry has taken a blob over from another of its repositories."""
    from csvfast.image.registry import RegistryClient

    if not (isinstance(source, RegistryClient) and isinstance(target, RegistryClient)):
        return False
    if source.base != target.base or source.name == target.name or target.has_blob(blob):
        return False
    try:
        return target.mount(blob, source.name)
    except RegistryError:  # it is copied instead, and says so itself when that is refused, too
        return False


def platform_parts(text: str | None) -> list[str]:
    """"linux/arm64/v8" as choose() takes it; None: nothing, which is this machine's. ImageError: no platform."""
    parts = [] if text is None else text.split("/")
    if text is not None and (len(parts) not in (2, 3) or not all(parts)):
        raise ImageError("platform", f"{ascii(text)[:60]}; expected OS/ARCHITECTURE[/VARIANT] or {ALL_PLATFORMS}")
    return parts
