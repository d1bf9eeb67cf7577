"""Images of a few bytes, for tests of layouts and registries: what their layers hold does not matter there."""

from __future__ import annotations

from typing import Any

from csvfast.image.blobs import BlobTarget
from csvfast.image.descriptor import CONFIG_TYPE, Descriptor, Platform
from csvfast.image.manifest import Index, Manifest

LAYER = "application/vnd.oci.image.layer.v1.tar"


def blob(target: BlobTarget, data: bytes, kind: str) -> Descriptor:
    return target.put_blob(Descriptor.of(data, kind), [data])


def kind(layer: bytes) -> str:
    return f"{LAYER}+gzip" if layer.startswith(b"\x1f\x8b") else LAYER


def put_image(target: BlobTarget, tag: str | None, *layers: bytes, architecture: str = "amd64") -> Manifest:
    """An image with these layers, in the target under a tag."""
    config = f'{{"architecture":"{architecture}","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}}}}'.encode()
    manifest = Manifest(blob(target, config, CONFIG_TYPE), tuple(blob(target, one, kind(one)) for one in layers))
    target.put_manifest(manifest.encode(), manifest.media_type, tag)
    return manifest


def put_index(target: BlobTarget, tag: str, **more: Any) -> Index:
    """An image for two platforms."""
    entries = []
    for architecture, variant in (("amd64", None), ("arm64", "v8")):
        manifest = put_image(target, None, b"layer of " + architecture.encode(), architecture=architecture)
        entries.append(manifest.descriptor(platform=Platform("linux", architecture, variant)))
    index = Index(tuple(entries), **more)
    target.put_manifest(index.encode(), index.media_type, tag)
    return index
