"""Manifests and indexes of images: read strictly, written so that what is not known is kept.

What was parsed and is not changed encodes to the very bytes it came in, and keeps its digest.

Source: opencontainers/image-spec manifest.md, image-index.md; containers/image v5 docker/distribution's advisory
GHSA-mc8v-mgrf-8f4m (a document that is a manifest and an index at once is refused).
Thread-safety: immutable objects and functions without state.
"""

from __future__ import annotations

import dataclasses
import json
import platform as _platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from csvfast.errors import ImageError, RequestError
from csvfast.image.descriptor import (
    INDEX_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    is_index,
    is_manifest,
    parse_annotations,
)

__all__ = [
    "INDEX_LIMIT",
    "LAYER_LIMIT",
    "MANIFEST_LIMIT",
    "Index",
    "Manifest",
    "choose",
    "host_architecture",
    "media_type_of",
    "parse_json",
]

MANIFEST_LIMIT: Final = 4 << 20
"""Bytes of a manifest or an index."""
LAYER_LIMIT: Final = 512
"""Layers of an image."""
INDEX_LIMIT: Final = 4096
"""Manifests of an index."""

_ARCHITECTURES: Final = {
    "x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armv7l": "arm",
    "loongarch64": "loong64", "mips64": "mips64le",
}  # fmt: skip
_OWN: Final = frozenset({"schemaVersion", "mediaType", "config", "layers", "manifests", "annotations"})


def parse_json(data: bytes, what: str, limit: int = MANIFEST_LIMIT) -> dict[str, Any]:
    """A JSON object from strangers, read strictly. ImageError.

    In: what    how errors call it
        limit   bytes allowed
    """
    from csvfast.broker.json_input import loads

    try:
        document = loads(data, what, limit=limit)
    except RequestError as error:
        subject, _, problem = str(error).partition(": ")
        raise ImageError(subject, problem) from None
    if type(document) is not dict:
        raise ImageError(what, "expected a JSON object")
    return document


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image: its configuration and its layers, the lowest first.

    media_type    OCI's or Docker's
    annotations   by name
    other         further members (artifactType, subject, ...), as they stood there
    """

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = MANIFEST_TYPE
    annotations: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    _encoded: bytes | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, data: bytes, media_type: str | None = None) -> Manifest:
        """ImageError: no manifest, another type than its descriptor says, more than 4 MiB or 512 layers.

        In: media_type   what its descriptor or the registry calls it; None: what it says itself
        """
        what = "manifest"
        document = parse_json(data, what)
        kind = _media_type(document, what, media_type, MANIFEST_TYPE)
        if not is_manifest(kind):
            raise ImageError(what, f"mediaType {ascii(kind)[:100]}; expected {MANIFEST_TYPE} or Docker's")
        if "manifests" in document or "fsLayers" in document:
            raise ImageError(what, "is another kind of document, too (manifests, fsLayers); expected config and layers alone")
        layers = document.get("layers")
        if type(layers) is not list:
            raise ImageError(what, "layers is missing; expected an array")
        if len(layers) > LAYER_LIMIT:
            raise ImageError(what, f"{len(layers)} layers; expected at most {LAYER_LIMIT}")
        return cls(
            Descriptor.parse(document.get("config"), f"{what}: config"),
            tuple(Descriptor.parse(one, f"{what}: layer {index}") for index, one in enumerate(layers)),
            kind,
            parse_annotations(document.get("annotations"), what),
            {name: value for name, value in document.items() if name not in _OWN},
            bytes(data),
        )

    def encode(self) -> bytes:
        """JSON in UTF-8: the bytes it was parsed from, or compact ones with the members in the specification's order."""
        if self._encoded is not None:
            return self._encoded
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": self.media_type, **self.other}
        document["config"] = self.config.document()
        document["layers"] = [layer.document() for layer in self.layers]
        return _encode(document, self.annotations)

    def replace(self, **members: Any) -> Manifest:
        """A copy with other members, which is encoded anew. In: members   config, layers, media_type, annotations, other."""
        return dataclasses.replace(self, **members, _encoded=None)

    def descriptor(self, **members: Any) -> Descriptor:
        """Of the encoded manifest. In: members   annotations, platform, other."""
        return Descriptor.of(self.encode(), self.media_type, **members)


@dataclass(frozen=True, slots=True)
class Index:
    """Several manifests: of one image for several platforms, or what a layout holds."""

    manifests: tuple[Descriptor, ...]
    media_type: str = INDEX_TYPE
    annotations: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    _encoded: bytes | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, data: bytes, media_type: str | None = None) -> Index:
        """ImageError: no index, another type than its descriptor says, more than 4 MiB. In: as Manifest.parse."""
        what = "index"
        document = parse_json(data, what)
        kind = _media_type(document, what, media_type, INDEX_TYPE)
        if not is_index(kind):
            raise ImageError(what, f"mediaType {ascii(kind)[:100]}; expected {INDEX_TYPE} or Docker's manifest list")
        if "layers" in document or "config" in document or "fsLayers" in document:
            raise ImageError(what, "is another kind of document, too (config, layers); expected manifests alone")
        manifests = document.get("manifests")
        if type(manifests) is not list:
            raise ImageError(what, "manifests is missing; expected an array")
        if len(manifests) > INDEX_LIMIT:
            raise ImageError(what, f"{len(manifests)} manifests; expected at most {INDEX_LIMIT}")
        return cls(
            tuple(Descriptor.parse(one, f"{what}: manifest {index}") for index, one in enumerate(manifests)),
            kind,
            parse_annotations(document.get("annotations"), what),
            {name: value for name, value in document.items() if name not in _OWN},
            bytes(data),
        )

    def encode(self) -> bytes:
        """As Manifest.encode."""
        if self._encoded is not None:
            return self._encoded
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": self.media_type, **self.other}
        document["manifests"] = [one.document() for one in self.manifests]
        return _encode(document, self.annotations)

    def replace(self, **members: Any) -> Index:
        """As Manifest.replace. In: members   manifests, media_type, annotations, other."""
        return dataclasses.replace(self, **members, _encoded=None)

    def descriptor(self, **members: Any) -> Descriptor:
        """As Manifest.descriptor."""
        return Descriptor.of(self.encode(), self.media_type, **members)


def media_type_of(data: bytes) -> str:
    """What a manifest or an index is that comes without a descriptor: what it says, else what its members make it. ImageError."""
    document = parse_json(data, "manifest")
    said = document.get("mediaType")
    if type(said) is str and (is_manifest(said) or is_index(said)):
        return said
    if said is not None or not ("manifests" in document or {"config", "layers"} <= document.keys()):
        raise ImageError("manifest", f"mediaType {ascii(said)[:100]}; expected {MANIFEST_TYPE}, {INDEX_TYPE} or Docker's")
    return INDEX_TYPE if "manifests" in document else MANIFEST_TYPE


def host_architecture() -> str:
    """This machine's, in Go's words: "amd64"."""
    machine = _platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def choose(index: Index, os: str = "linux", architecture: str | None = None, variant: str | None = None) -> Descriptor:
    """The manifest of an index for a platform; the first of several, without a variant before those with one.

    In: architecture   None: this machine's
        variant        None: any
    A manifest without a platform is taken when it is the index's only one.
    ImageError: there is none; the platforms that there are.
    """
    architecture = architecture or host_architecture()
    manifests = [one for one in index.manifests if is_manifest(one.media_type)]
    if len(manifests) == 1 and manifests[0].platform is None:
        return manifests[0]
    fitting = [
        one for one in manifests
        if one.platform is not None and (one.platform.os, one.platform.architecture) == (os, architecture)
        and variant in (None, one.platform.variant)
    ]  # fmt: skip
    if not fitting:
        wanted = "/".join(part for part in (os, architecture, variant) if part)
        there = ", ".join(sorted({str(one.platform) for one in manifests if one.platform is not None})[:20])
        raise ImageError("index", f"no image for {ascii(wanted)[1:-1][:80]}; there are: {ascii(there)[1:-1][:400] or 'none'}")
    return min(fitting, key=lambda one: bool(one.platform and one.platform.variant))


def _media_type(document: Mapping[str, Any], what: str, expected: str | None, default: str) -> str:
    """What a document is, when it and whoever handed it over agree."""
    if document.get("schemaVersion") != 2 or type(document["schemaVersion"]) is not int:
        raise ImageError(what, f"schemaVersion {ascii(document.get('schemaVersion'))[:20]}; expected 2")
    said = document.get("mediaType")
    if said is None:
        return expected or default
    if type(said) is not str or (expected is not None and said != expected):
        raise ImageError(what, f"mediaType {ascii(said)[:100]}; expected {ascii(expected)[:100] if expected else 'a text'}")
    return said


def _encode(document: dict[str, Any], annotations: Mapping[str, str]) -> bytes:
    if annotations:
        document["annotations"] = dict(annotations)
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
