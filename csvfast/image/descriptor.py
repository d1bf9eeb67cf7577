"""Descriptors: what a manifest says about a blob, and the media types that this project knows.

    clear                                                            encrypted
    application/vnd.oci.image.layer.v1.tar[+gzip|+zstd]              ...+encrypted
    application/vnd.oci.image.layer.nondistributable.v1.tar[...]     ...+encrypted
    application/vnd.wasm.content.layer.v1+wasm                       ...+encrypted

Docker's types of schema 2 are read as the OCI types that stand for the same content.

Source: opencontainers/image-spec descriptor.md, media-types.md; containers/ocicrypt spec/spec.go;
distribution/distribution docs/content/spec/manifest-v2-2.md.
Thread-safety: immutable objects and functions without state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from csvfast.errors import ImageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "CONFIG_TYPE",
    "ENCRYPTED",
    "INDEX_TYPE",
    "MANIFEST_TYPE",
    "Descriptor",
    "Platform",
    "checked_digest",
    "clear_type",
    "compression",
    "digest_of",
    "encrypted_type",
    "is_digest",
    "is_encrypted",
    "is_index",
    "is_layer",
    "is_manifest",
    "new_hash",
    "oci_type",
]

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
ENCRYPTED: Final = "+encrypted"
"""What an encrypted layer's media type ends in."""

SIZE_LIMIT: Final = 1 << 50
"""Bytes that a descriptor may promise: a petabyte, far below where integers of other languages end."""
ANNOTATION_LIMIT: Final = 1024
"""Annotations of a descriptor."""

_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
_FOREIGN: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_WASM: Final = "application/vnd.wasm.content.layer.v1+wasm"
_LAYERS: Final[Mapping[str, str]] = MappingProxyType(
    {f"{kind}{ending}": how for kind in (_TAR, _FOREIGN) for ending, how in (("", "none"), ("+gzip", "gzip"), ("+zstd", "zstd"))}
    | {_WASM: "none"}
)
"""Clear layers' types and their compression."""

_ROOTFS: Final = "application/vnd.docker.image.rootfs"
_DOCKER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "application/vnd.docker.distribution.manifest.v2+json": MANIFEST_TYPE,
        "application/vnd.docker.distribution.manifest.list.v2+json": INDEX_TYPE,
        "application/vnd.docker.container.image.v1+json": CONFIG_TYPE,
        f"{_ROOTFS}.diff.tar": _TAR,
        f"{_ROOTFS}.diff.tar.gzip": f"{_TAR}+gzip",
        f"{_ROOTFS}.diff.tar.zstd": f"{_TAR}+zstd",
        f"{_ROOTFS}.foreign.diff.tar": _FOREIGN,
        f"{_ROOTFS}.foreign.diff.tar.gzip": f"{_FOREIGN}+gzip",
    }
)

_DIGEST: Final = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z", re.ASCII)
_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}\Z", re.ASCII)


# ---- Digests


def is_digest(text: str) -> bool:
    """Whether it is "sha256:" and 64, or "sha512:" and 128, lower-case hexadecimal digits."""
    return _DIGEST.match(text) is not None


def checked_digest(text: Any, subject: str) -> str:
    """The digest. ImageError: it is none, or of another algorithm. In: subject   what the error is about."""
    if type(text) is not str or not is_digest(text):
        expected = "sha256: and 64 or sha512: and 128 lower-case hexadecimal digits"
        raise ImageError(subject, f"digest {ascii(text)[:80]}; expected {expected}")
    return text


def new_hash(digest: str) -> hashlib._Hash:
    """A hash object of the digest's algorithm. In: digest   checked before."""
    return hashlib.new(digest.partition(":")[0], usedforsecurity=True)


def digest_of(data: Buffer) -> str:
    """SHA-256 of bytes, as "sha256:...". Gives up the GIL."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# ---- Media types


def oci_type(media_type: str) -> str:
    """The OCI type for a Docker one; every other type is itself. Encrypted layers stay encrypted ones."""
    encrypted = media_type.endswith(ENCRYPTED)
    clear = media_type.removesuffix(ENCRYPTED) if encrypted else media_type
    found = _DOCKER.get(clear, clear)
    return f"{found}{ENCRYPTED}" if encrypted else found


def is_manifest(media_type: str) -> bool:
    """Whether it is that of an image's manifest, OCI's or Docker's."""
    return oci_type(media_type) == MANIFEST_TYPE


def is_index(media_type: str) -> bool:
    """Whether it is that of an index (Docker: a manifest list)."""
    return oci_type(media_type) == INDEX_TYPE


def is_layer(media_type: str) -> bool:
    """Whether it is that of a layer, clear or encrypted."""
    return oci_type(media_type).removesuffix(ENCRYPTED) in _LAYERS


def is_encrypted(media_type: str) -> bool:
    """Whether it is that of an encrypted layer."""
    return media_type.endswith(ENCRYPTED) and is_layer(media_type)


def encrypted_type(media_type: str) -> str:
    """The encrypted layer's type for a clear or encrypted layer's. ImageError: no layer's."""
    return f"{clear_type(media_type)}{ENCRYPTED}"


def clear_type(media_type: str) -> str:
    """The clear layer's type for a clear or encrypted layer's, OCI's. ImageError: no layer's."""
    clear = oci_type(media_type).removesuffix(ENCRYPTED)
    if clear not in _LAYERS:
        raise ImageError(f"media type {ascii(media_type)[:120]}", f"unknown; expected a layer's, as {_TAR}+gzip{ENCRYPTED}")
    return clear


def compression(media_type: str) -> str:
    """"none", "gzip" or "zstd": how a layer's bytes are compressed (below the encryption). ImageError: no layer's type."""
    return _LAYERS[clear_type(media_type)]


# ---- Descriptors


@dataclass(frozen=True, slots=True)
class Platform:
    """What a manifest of an index is for.

    os, architecture, variant   Go's names: "linux", "amd64", "arm64" with "v8"
    other                       further members, as they stood there
    """

    os: str
    architecture: str
    variant: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, subject: str) -> Platform:
        """ImageError. In: subject   what the error is about."""
        rest = _object(value, f"{subject}: platform")
        variant = rest.pop("variant", None)
        system, architecture = (_text(rest.pop(name, None), f"{subject}: platform", name, 64) for name in ("os", "architecture"))
        # Docker writes an empty variant where there is none.
        return cls(system, architecture, _text(variant, f"{subject}: platform", "variant", 64) if variant else None, rest)

    def document(self) -> dict[str, Any]:
        """The JSON object."""
        variant = {} if self.variant is None else {"variant": self.variant}
        return {"architecture": self.architecture, "os": self.os, **self.other, **variant}

    def __str__(self) -> str:
        """os/architecture[/variant]."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What is said about a blob.

    media_type    of its content
    digest        "sha256:..." or "sha512:..."
    size          bytes
    annotations   by name
    platform      of a manifest in an index
    other         further members (urls, artifactType, ...), as they stood there
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        subject = "descriptor"
        checked_digest(self.digest, subject)
        if not _MEDIA_TYPE.match(self.media_type):
            raise ImageError(subject, f"mediaType {ascii(self.media_type)[:80]}; expected TYPE/SUBTYPE")
        if type(self.size) is not int or not 0 <= self.size <= SIZE_LIMIT:
            raise ImageError(subject, f"size {ascii(self.size)[:40]}; expected 0 to {SIZE_LIMIT} bytes")

    @classmethod
    def parse(cls, value: Any, subject: str) -> Descriptor:
        """From a JSON value. ImageError: a member is missing, or is no such thing.

        In: subject   what the error is about, e.g. "layer 2"
        """
        rest = _object(value, subject)
        media_type, digest, size = (rest.pop(name, None) for name in ("mediaType", "digest", "size"))
        annotations, platform = rest.pop("annotations", None), rest.pop("platform", None)
        if type(size) is not int or not 0 <= size <= SIZE_LIMIT:
            raise ImageError(subject, f"size {ascii(size)[:40]}; expected 0 to {SIZE_LIMIT} bytes")
        kind = _text(media_type, subject, "mediaType", 255)
        if not _MEDIA_TYPE.match(kind):
            raise ImageError(subject, f"mediaType {ascii(kind)[:80]}; expected TYPE/SUBTYPE")
        return cls(
            kind,
            checked_digest(digest, subject),
            size,
            parse_annotations(annotations, subject),
            None if platform is None else Platform.parse(platform, subject),
            rest,
        )

    @classmethod
    def of(cls, data: Buffer, media_type: str, **members: Any) -> Descriptor:
        """Of bytes that are at hand, by SHA-256. In: members   annotations, platform, other."""
        return cls(media_type, digest_of(data), memoryview(data).nbytes, **members)

    def document(self) -> dict[str, Any]:
        """The JSON object, members in the order of the specification."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **self.other}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform is not None:
            found["platform"] = self.platform.document()
        return found

    def replace(self, **members: Any) -> Descriptor:
        """A copy with other members. In: members   media_type, digest, size, annotations, platform, other.

        With another digest, what leads to the old content is left out: `data`, which is that content, and `urls`. A layer's
        plaintext must not stay with its ciphertext.
        """
        if members.get("digest", self.digest) != self.digest and "other" not in members:
            # In whatever case: readers written in Go take DATA for data.
            members["other"] = {name: value for name, value in self.other.items() if name.lower() not in ("data", "urls")}
        return dataclasses.replace(self, **members)

    def same_blob(self, other: Descriptor) -> bool:
        """Whether both promise the same bytes."""
        return self.digest == other.digest and self.size == other.size

    @property
    def is_layer(self) -> bool:
        """See the function of this name."""
        return is_layer(self.media_type)

    @property
    def is_encrypted(self) -> bool:
        """See the function of this name."""
        return is_encrypted(self.media_type)

    @property
    def compression(self) -> str:
        """See the function of this name. ImageError."""
        return compression(self.media_type)

    def __str__(self) -> str:
        """How errors call it."""
        return self.digest


def parse_annotations(value: Any, subject: str) -> dict[str, str]:
    """Annotations from a JSON value; None has none. ImageError: no object of texts, or too many."""
    if value is None:  # Go writes a map that was never made as null
        return {}
    found = _object(value, f"{subject}: annotations")
    if len(found) > ANNOTATION_LIMIT:
        raise ImageError(subject, f"{len(found)} annotations; expected at most {ANNOTATION_LIMIT}")
    for name, text in found.items():
        if type(text) is not str:
            raise ImageError(subject, f"annotation {ascii(name)[:80]}: expected a text")
    return found


def _object(value: Any, subject: str) -> dict[str, Any]:
    """A copy."""
    if type(value) is not dict:
        raise ImageError(subject, "expected a JSON object")
    return dict(value)


def _text(value: Any, subject: str, name: str, limit: int) -> str:
    if type(value) is not str or not value or len(value) > limit:
        raise ImageError(subject, f"{name} {ascii(value)[:60]}; expected a text of at most {limit} characters")
    return value
