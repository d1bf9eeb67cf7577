"""Decrypting images into images: every layer's ciphertext is checked before the first one is decrypted.

    decrypt_image(source, target, [LocalKek.from_file(Path("images.key"))], tag="clear")

For running an image, csvfast.image.assemble goes straight from ciphertext to files.

Three passes, each over all layers before the next one begins: unwrap the key and download, while size, digest and MAC of the
ciphertext are computed; decrypt and decompress, while the digests of the layer and of its archive are computed, and nothing is
kept; decrypt and store. So whatever is stored has been found right, and stands where the image configuration has it. The manifest
and its tag come last. Memory does not grow with the layers; decrypting twice costs less than keeping plaintext on a disk would.

What the configuration says is what whoever wrote the manifest says: that it is the image's own, only its digest tells, or a
signature.

Source: containers/ocicrypt encryption.go; its order is laxer.
Thread-safety: one call for a source and a target at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from csvfast.errors import ImageError, IntegrityError
from csvfast.image.annotations import clear_annotations, subject_of
from csvfast.image.blobs import HashedChunks, read_blob
from csvfast.image.compression import decompress
from csvfast.image.descriptor import clear_type
from csvfast.image.image_config import ImageConfiguration
from csvfast.image.keys import unwrap_any
from csvfast.image.layer_cipher import BLOCK_BYTES, LayerCheck, open_layer
from csvfast.image.limits import DEFAULT_LIMITS, Budget, Limits
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

    def open(self, layer: Descriptor) -> LayerReader:
        """The layer from its beginning; the file stays open when the reader is closed."""
        self.file.seek(0)
        return open_layer(_Kept(self.file.readinto), layer, self.private)


class _Kept:
    """A file without its close()."""

    def __init__(self, readinto: Callable[[memoryview], int]) -> None:
        self.readinto = readinto


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
    limits: Limits = DEFAULT_LIMITS,
) -> Descriptor:
    """Decrypts an image. Out: the descriptor of its clear manifest or index.

    In: wrappers   keys to try; one packet of each layer must open
        spool      directory for files without a name, which hold ciphertext only; None: where temporary files go
        limits     of the layers together, and of what comes out when they are decompressed
        others     as encrypt_image
    ImageError: no layer is encrypted, a key cannot be unwrapped, a configuration that is no image's; IntegrityError: something
    was changed, a layer is not the one that the image configuration has in its place. Nothing is stored unless every encrypted
    layer was found right, and nothing has a tag in the target unless everything is there. MissingExtraError: zstd without its
    package.
    """
    wrappers = tuple(wrappers)

    def change(manifest: Manifest) -> list[Descriptor]:
        if not any(layer.is_encrypted for layer in manifest.layers):
            raise ImageError("image", "none of its layers is encrypted")
        diff_ids = _diff_ids(source, manifest, limits)
        with ExitStack() as stack:
            checked: dict[int, _Checked] = {}
            for number, layer in enumerate(manifest.layers):
                if layer.is_encrypted:
                    private = unwrap_any(layer, wrappers)
                    stack.callback(private.wipe)
                    file = stack.enter_context(tempfile.TemporaryFile(dir=spool))
                    _download(source, layer, private, file)
                    checked[number] = _Checked(file, private)
            budget = Budget(limits)
            for number, one in checked.items():
                _check_archive(manifest.layers[number], one, diff_ids[number], budget)
            return [
                _decrypted(target, layer, checked[number], progress)
                if number in checked
                else copy_blob(source, target, layer, progress)
                for number, layer in enumerate(manifest.layers)
            ]

    return transform_image(source, target, change, wanted=wanted, tag=tag, platform=platform)


def _diff_ids(source: BlobSource, manifest: Manifest, limits: Limits) -> tuple[str, ...]:
    """Digests of the layers' archives."""
    count, total = len(manifest.layers), sum(layer.size for layer in manifest.layers)
    if total > limits.total_bytes:
        raise ImageError("image", f"layers of {total} bytes; the limit is {limits.total_bytes}")
    found = ImageConfiguration.parse(read_blob(source, manifest.config, limits.config_bytes), limits).diff_ids
    if len(found) != count:
        raise ImageError("image", f"{count} layers, and {len(found)} in the image configuration; expected as many")
    return found


def _download(source: BlobSource, layer: Descriptor, private: Secret, file: Any) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with closing(source.open_blob(layer)) as reader, LayerCheck(layer, private) as check:
        while count := reader.readinto(buffer):
            check.update(buffer[:count])
            file.write(buffer[:count])
        check.finish()


def _check_archive(layer: Descriptor, checked: _Checked, diff_id: str, budget: Budget) -> None:
    """Decrypts a layer and keeps nothing."""
    with checked.open(layer) as reader:
        try:
            with decompress(reader, layer.compression, budget) as archive:
                found = archive.finish()
        except ImageError as error:
            reader.drain()  # if the layer itself is another one, that is what was wrong
            if error.subject == subject_of(layer):
                raise
            raise ImageError(f"{subject_of(layer)}, {error.subject}", error.problem) from error
        reader.drain()  # decompression may end before the data does; the layer's digest is over all of it
    if found != diff_id:
        raise IntegrityError(subject_of(layer), f"its archive has the digest {found}; the image configuration says {diff_id}")


def _decrypted(target: BlobTarget, layer: Descriptor, checked: _Checked, progress: Progress | None) -> Descriptor:
    options = PrivateOptions.parse(checked.private, subject_of(layer))
    clear = layer.replace(
        media_type=clear_type(layer.media_type), digest=options.digest, annotations=clear_annotations(layer.annotations)
    )
    if target.has_blob(clear):
        if progress is not None:
            progress(clear.size)
        return clear
    with checked.open(layer) as reader:
        blocks = counted(_blocks(reader), progress)
        target.put_blob(clear, HashedChunks(blocks, lambda: clear.digest.partition(":")[2] if reader.verified else ""))
    return clear


def _blocks(reader: LayerReader) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := reader.readinto(buffer):
        yield buffer[:count]
