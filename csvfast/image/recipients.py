"""Who can decrypt an image: recipients shown, added, replaced. Layers' blobs stay as they are, only the manifest changes.

    add_recipients(source, target, [Recipient(provider, "default/key/others")], keys, tag="1")
    rewrap(source, target, keys, tag="1")                   a KEK has a new version: every packet anew, for the same key
    rewrap(source, target, keys, recipients, tag="1")       exactly these recipients instead of those there are

A recipient that is taken away keeps what it once had: whoever has unwrapped a layer's key can decrypt that layer for ever, and
old manifests still hold the old packets. Taking access away means encrypting anew, and deleting the old manifests.

Source: containers/ocicrypt encryption.go (layers that are encrypted already).
Thread-safety: one call for a source and a target at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from csvfast.errors import ImageError, RequestError
from csvfast.image.annotations import encrypted_annotations, packets_of, public_bytes_of, subject_of
from csvfast.image.keys import Recipient, unwrap_any, unwrap_packet, wrap_all
from csvfast.image.transform import copy_blob, selected_layers, transform_image
from csvfast.image.wrappers import parameters_of

if TYPE_CHECKING:
    from csvfast.image.annotations import Packet
    from csvfast.image.blobs import BlobSource, BlobTarget
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.keys import KeyWrapper
    from csvfast.image.manifest import Manifest
    from csvfast.image.transform import Progress

__all__ = ["ListedKey", "add_recipients", "list_recipients", "rewrap"]


class ListedKey(NamedTuple):
    """A wrapped key, as far as anybody can read it.

    scheme     "provider.attestation-agent", "jwe", ...
    form       "coco", "coco-v2", "verdictd"; "" for others
    key        the key-encryption key's URI; "" when the packet does not say
    """

    scheme: str
    form: str
    key: str


def list_recipients(layer: Descriptor) -> tuple[ListedKey, ...]:
    """For whom a layer's key is wrapped, as its packets say; nothing of it is authenticated. ImageError."""
    from csvfast.broker.keyprovider.messages import read_packet

    found = []
    for packet in packets_of(layer):
        try:
            read = read_packet(packet.data)
        except RequestError:
            found.append(ListedKey(packet.scheme, "", ""))
        else:
            found.append(ListedKey(packet.scheme, read.style, read.path.uri))
    return tuple(found)


def add_recipients(
    source: BlobSource,
    target: BlobTarget,
    recipients: Sequence[Recipient],
    wrappers: Iterable[KeyWrapper],
    *,
    layers: Sequence[int] | None = None,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
    progress: Progress | None = None,
) -> Descriptor:
    """Wraps the layers' keys for further recipients. Out: the descriptor of the new manifest or index.

    In: wrappers   keys to unwrap with
        layers     which of the encrypted ones; None: all of them
        others     as encrypt_image
    ImageError: no layer is encrypted, a chosen one is not, a key cannot be unwrapped or wrapped.
    """
    wrappers = tuple(wrappers)

    def packets(layer: Descriptor) -> list[Packet]:
        return [*packets_of(layer), *wrap_all(unwrap_any(layer, wrappers), recipients, subject_of(layer))]

    change = _changing(source, target, layers, packets, progress)
    return transform_image(source, target, change, wanted=wanted, tag=tag, platform=platform)


def rewrap(
    source: BlobSource,
    target: BlobTarget,
    wrappers: Iterable[KeyWrapper],
    recipients: Sequence[Recipient] | None = None,
    *,
    layers: Sequence[int] | None = None,
    wanted: str | None = None,
    tag: str | None = None,
    platform: str | None = None,
    progress: Progress | None = None,
) -> Descriptor:
    """Wraps the layers' keys anew, e.g. since a key-encryption key was rotated. As add_recipients.

    In: recipients   who can decrypt it then, and nobody else; None: each packet for the key it names, by whoever opened it
    ImageError, too, without recipients: one of the packets cannot be opened.
    """
    wrappers = tuple(wrappers)

    def packets(layer: Descriptor) -> list[Packet]:
        if recipients is not None:
            return list(wrap_all(unwrap_any(layer, wrappers), recipients, subject_of(layer)))
        return [_again(layer, packet, wrappers) for packet in packets_of(layer)]

    change = _changing(source, target, layers, packets, progress)
    return transform_image(source, target, change, wanted=wanted, tag=tag, platform=platform)


def _again(layer: Descriptor, packet: Packet, wrappers: Iterable[KeyWrapper]) -> Packet:
    private, wrapper = unwrap_packet(layer, packet, wrappers)
    try:
        parameters = parameters_of(packet.data)
    except RequestError:  # another provider's own form: it gets what it was set up with
        parameters = ""
    made = wrap_all(private, [Recipient(wrapper, parameters)], subject_of(layer))[0]
    return made._replace(scheme=packet.scheme)


def _changing(
    source: BlobSource,
    target: BlobTarget,
    layers: Sequence[int] | None,
    packets: Callable[[Descriptor], list[Packet]],
    progress: Progress | None,
) -> Callable[[Manifest], list[Descriptor]]:
    def change(manifest: Manifest) -> list[Descriptor]:
        encrypted = {number for number, layer in enumerate(manifest.layers) if layer.is_encrypted}
        chosen = encrypted if layers is None else selected_layers(manifest, layers)
        if not chosen:
            raise ImageError("image", "none of its layers is encrypted")
        for number in sorted(chosen - encrypted):
            raise ImageError(f"layer {number}, {manifest.layers[number].digest}", "is not encrypted")
        made = list(manifest.layers)
        for number in sorted(chosen):  # keys first: what fails, fails before anything is copied
            layer = manifest.layers[number]
            public = public_bytes_of(layer)
            made[number] = layer.replace(annotations=encrypted_annotations(layer.annotations, public, packets(layer)))
        return [copy_blob(source, target, layer, progress) for layer in made]

    return change
