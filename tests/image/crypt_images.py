"""An image of two layers in a layout, keys to encrypt it with, and ways to change what was made of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from csvfast.crypto import Secret
from csvfast.image.blobs import read_blob
from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor
from csvfast.image.keys import Recipient
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.image.wrappers import LocalKek

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
LIMIT = 64 << 20
MARK = b"nobody may read this line"

KEK = Secret(bytes(range(200, 232)))
KID = "kbs:///default/key/images"


def tar_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def put(layout: OciLayout, data: bytes, media_type: str) -> Descriptor:
    descriptor = Descriptor.of(data, media_type)
    layout.put_blob(descriptor, [data])
    return descriptor


def make_image(path: Path, tag: str = "clear", layers: int = 2, *, size: int = 5000) -> OciLayout:
    """A layout with one image; each layer's file holds MARK."""
    layout = OciLayout(path, create=True)
    tars = [
        tar_of(f"etc/file{number}", MARK + hashlib.shake_128(bytes([number])).digest(size)) for number in range(layers)
    ]  # fmt: skip
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in tars]},
    }  # fmt: skip
    manifest = Manifest(
        put(layout, json.dumps(config).encode(), CONFIG_TYPE),
        tuple(put(layout, gzip.compress(one, 1, mtime=0), LAYER) for one in tars),
    )
    layout.put_manifest(manifest.encode(), MANIFEST_TYPE, tag)
    return layout


def manifest_of(layout: OciLayout, tag: str) -> Manifest:
    descriptor, data = layout.resolve(tag)
    return Manifest.parse(data, descriptor.media_type)


def blob(layout: OciLayout, descriptor: Descriptor) -> bytes:
    return read_blob(layout, descriptor, LIMIT)


def local(kek: Secret = KEK, kid: str = KID, **options: Any) -> LocalKek:
    return LocalKek(kek, kid, **options)


def to_local(**options: Any) -> list[Recipient]:
    return [Recipient(local(**options))]


def change(layout: OciLayout, tag: str, edit: Callable[[dict[str, Any]], None], new: str = "changed") -> None:
    """Another manifest, as whoever can write to a registry makes it."""
    document = json.loads(manifest_of(layout, tag).encode())
    edit(document)
    layout.put_manifest(json.dumps(document).encode(), MANIFEST_TYPE, new)


def raw_blob(layout: OciLayout, descriptor: Descriptor) -> bytes:
    with closing(layout.open_blob(descriptor)) as file:
        return bytes(file.read())


def everything_below(path: Path) -> bytes:
    return b"".join(one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file())
