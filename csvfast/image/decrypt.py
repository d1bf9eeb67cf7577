"""Decrypting images into images: every layer's ciphertext is checked before the first one is decrypted.

    decrypt_image(source, target, [LocalKek.from_file(Path("images.key"))], tag="clear")

For running an image, csvfast.image.assemble goes straight from ciphertext to files.

Order, for all layers: unwrap the key; download, while size, digest and MAC are computed. Then, layer by layer: decrypt, compare
the layer's own digest, store it. The manifest and its tag come last.

Source: containers/ocicrypt encryption.go; its order is laxer.
Thread-safety: one call for a source and a target at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from csvfast.errors import ImageError
from csvfast.image.annotations import clear_annotations, subject_of
from csvfast.image.blobs import HashedChunks
from csvfast.image.descriptor import clear_type
from csvfast.image.keys import unwrap_any
from csvfast.image.layer_cipher import BLOCK_BYTES, LayerCheck, open_layer
from csvfast.image.options import PrivateOptions
from csvfast.image.transform import copy_blob, counted, transform_image

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.image.blobs import BlobSource, BlobTarget
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.keys import KeyWrapper
    from csvfast.image.layer_cipher import LayerReader
    from csvfast.image.manifest import Manifest
    from csvfast.image.transform import Progress

__all__ = ["decrypt_image"]


class _Checked(NamedTuple):
    """Ciphertext that LayerCheck has passed, on this machine."""

    file: Any
    private: Secret


def decrypt_image(
    source: BlobSource,
    target: BlobTarget,
    wrappers: Iterable[KeyWrapper],
    *,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
    spool: Path | None = None,
    progress: Progress | None = None,
) -> Descriptor:
    """Decrypts an image. Out: the descriptor of its clear manifest or index.

    In: wrappers   keys to try; one packet of each layer must open
        spool      directory for files without a name, which hold ciphertext only; None: where temporary files go
        others     as encrypt_image
    ImageError: no layer is encrypted, a key cannot be unwrapped; IntegrityError: something was changed. Nothing has a tag in the
    target unless everything is there; what was stored before a layer's own digest turned out wrong are clear layers of this image
    that were right, without a name.
    """
    wrappers = tuple(wrappers)

    def change(manifest: Manifest) -> list[Descriptor]:
        if not any(layer.is_encrypted for layer in manifest.layers):
            raise ImageError("image", "none of its layers is encrypted")
        with ExitStack() as stack:
            checked: dict[int, _Checked] = {}
            for number, layer in enumerate(manifest.layers):
                if layer.is_encrypted:
                    private = unwrap_any(layer, wrappers)
                    file = stack.enter_context(tempfile.TemporaryFile(dir=spool))
                    _download(source, layer, private, file)
                    checked[number] = _Checked(file, private)
            return [
                _decrypted(target, layer, checked[number], progress)
                if number in checked
                else copy_blob(source, target, layer, progress)
                for number, layer in enumerate(manifest.layers)
            ]

    return transform_image(source, target, change, wanted=wanted, tag=tag, platform=platform)


def _download(source: BlobSource, layer: Descriptor, private: Secret, file: Any) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with closing(source.open_blob(layer)) as reader, LayerCheck(layer, private) as check:
        while count := reader.readinto(buffer):
            check.update(buffer[:count])
            file.write(buffer[:count])
        check.finish()
    file.seek(0)


def _decrypted(target: BlobTarget, layer: Descriptor, checked: _Checked, progress: Progress | None) -> Descriptor:
    options = PrivateOptions.parse(checked.private, subject_of(layer))
    clear = layer.replace(
        media_type=clear_type(layer.media_type), digest=options.digest, annotations=clear_annotations(layer.annotations)
    )
    if target.has_blob(clear):
        if progress is not None:
            progress(clear.size)
        return clear
    with open_layer(checked.file, layer, checked.private) as reader:
        blocks = counted(_blocks(reader), progress)
        target.put_blob(clear, HashedChunks(blocks, lambda: clear.digest.partition(":")[2] if reader.verified else ""))
    return clear


def _blocks(reader: LayerReader) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := reader.readinto(buffer):
        yield buffer[:count]
