"""Encrypting images: ciphertext of layers, their keys wrapped for recipients, a new manifest.

    encrypt_image(source, target, [Recipient(provider, "kbs:///default/key/images")], tag="sealed")

The configuration of an image is not encrypted: its environment, command, labels and history, and the digests of the clear layers
in `diff_ids`, are for everybody to read.

Source: containers/ocicrypt encryption.go; containers/image copy/encryption.go.
Thread-safety: one call for a source and a target at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from csvfast.errors import ImageError, IntegrityError
from csvfast.image.annotations import encrypted_annotations, subject_of
from csvfast.image.blobs import HashedChunks
from csvfast.image.descriptor import encrypted_type
from csvfast.image.keys import wrap_all
from csvfast.image.layer_cipher import LayerEncryption
from csvfast.image.suites import AES_256_CTR_HMAC_SHA256
from csvfast.image.transform import copy_blob, counted, selected_layers, transform_image

if TYPE_CHECKING:
    from csvfast.image.blobs import BlobSource, BlobTarget
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.keys import Recipient
    from csvfast.image.manifest import Manifest
    from csvfast.image.suites import Suite
    from csvfast.image.transform import Progress

__all__ = ["encrypt_image"]


def encrypt_image(
    source: BlobSource,
    target: BlobTarget,
    recipients: Sequence[Recipient],
    *,
    layers: Sequence[int] | None = None,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
    suite: Suite = AES_256_CTR_HMAC_SHA256,
    progress: Progress | None = None,
) -> Descriptor:
    """Encrypts an image. Out: the descriptor of its new manifest or index.

    In: recipients   whose keys open every encrypted layer
        layers       which of them, from 0; -1 is the last one; None: all. The others are copied as they are
        wanted       tag or digest in the source
        tag          in the target
        platform     of an index, see transform_image
        suite        AES_256_CTR_HMAC_SHA256, which other tools read, or SM4_128_CTR_HMAC_SM3, which they do not
    ImageError: no recipient, no layer, a layer that is encrypted already or is none; IntegrityError: a blob is not what the
    manifest says.
    Nothing has a tag in the target unless everything is there.
    """
    if not recipients:
        raise ImageError("image", "no recipient: nobody could decrypt it")

    def change(manifest: Manifest) -> list[Descriptor]:
        chosen = selected_layers(manifest, layers)
        if not chosen:
            raise ImageError("image", "none of its layers would be encrypted")
        for number in sorted(chosen):
            layer = manifest.layers[number]
            if layer.is_encrypted:
                raise ImageError(f"layer {number}, {layer.digest}", "is encrypted already; recipients can be added to it")
            encrypted_type(layer.media_type)
        return [
            _encrypted(source, target, layer, recipients, suite, progress)
            if number in chosen
            else copy_blob(source, target, layer, progress)
            for number, layer in enumerate(manifest.layers)
        ]

    return transform_image(source, target, change, wanted=wanted, tag=tag, platform=platform)


def _encrypted(
    source: BlobSource,
    target: BlobTarget,
    layer: Descriptor,
    recipients: Sequence[Recipient],
    suite: Suite,
    progress: Progress | None,
) -> Descriptor:
    with (
        closing(source.open_blob(layer)) as reader,
        LayerEncryption(reader, suite=suite, expected=layer) as encryption,
    ):
        packets = wrap_all(encryption.private, recipients, subject_of(layer))  # first: it fails sooner than the rest
        blocks = HashedChunks(counted(encryption, progress), lambda: encryption.result.digest.partition(":")[2])
        stored = target.put_blob(None, blocks)
    made = encryption.result
    if (stored.size, stored.digest) != (made.size, made.digest):
        raise IntegrityError(subject_of(layer), f"{stored.size} bytes, {stored.digest}, were stored; expected {made.size}")
    return layer.replace(
        media_type=encrypted_type(layer.media_type),
        digest=stored.digest,
        annotations=encrypted_annotations(layer.annotations, made.public, packets),
    )
