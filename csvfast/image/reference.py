"""Names of images: in an OCI layout on this machine, or in a registry.

    oci:DIRECTORY[:TAG]  oci:DIRECTORY@DIGEST
    docker://HOST[:PORT]/NAME[:TAG][@DIGEST]   docker://NAME (Docker Hub's)
    HOST[:PORT]/NAME[:TAG][@DIGEST]            when the first part has a dot or a port, or is localhost

Without tag and digest, a registry's image is "latest", and a layout's its only one.

Source: containers/image docs/containers-transports.5.md; distribution/reference reference.go (grammar, Docker Hub's short names).
Thread-safety: immutable objects and functions without state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csvfast.errors import ArgumentError
from csvfast.image.descriptor import is_digest

__all__ = ["Reference", "is_repository", "is_tag", "parse_reference"]

DOCKER_HUB: Final = "docker.io"

_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z", re.ASCII)
_WORDS: Final = r"[A-Za-z0-9]+(?:(?:--|[-._:@+])[A-Za-z0-9]+)*+"
_LAYOUT_TAG: Final = re.compile(rf"{_WORDS}(?:/{_WORDS})*\Z", re.ASCII)
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*+"
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z", re.ASCII)
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?\Z", re.ASCII)
_NAME_LIMIT: Final = 255
_FORMS: Final = "oci:DIRECTORY[:TAG], docker://HOST[:PORT]/NAME[:TAG|@DIGEST] or HOST/NAME:TAG"


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image is. Exactly one of `directory` and `host` is set.

    directory   of a layout
    host        of a registry, with its port: "registry.example:5000"
    name        of the repository in the registry: "library/busybox"
    tag         None: not said
    digest      of the manifest; goes before the tag
    """

    directory: Path | None = None
    host: str | None = None
    name: str = ""
    tag: str | None = None
    digest: str | None = None

    @property
    def wanted(self) -> str | None:
        """Digest or tag, whichever decides; "latest" in a registry when neither is said."""
        return self.digest or self.tag or (None if self.host is None else "latest")

    def with_wanted(self, wanted: str) -> Reference:
        """The same place, another tag or digest. ArgumentError: neither."""
        if is_digest(wanted):
            return Reference(self.directory, self.host, self.name, None, wanted)
        return Reference(self.directory, self.host, self.name, _checked_tag(wanted, wanted, layout=self.host is None))

    def __str__(self) -> str:
        """As parse_reference takes it."""
        place = f"oci:{self.directory}" if self.host is None else f"docker://{self.host}/{self.name}"
        return place + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def is_tag(text: str) -> bool:
    """Whether an image may be tagged so."""
    return _TAG.match(text) is not None


def is_repository(text: str) -> bool:
    """Whether a repository may be called so: "library/busybox"."""
    return len(text) <= _NAME_LIMIT and _NAME.match(text) is not None


def parse_reference(text: str) -> Reference:
    """ArgumentError: no such name; what was wrong, and the forms there are."""
    if len(text) > 4096 or "\0" in text:
        raise ArgumentError(f"image {ascii(text)[:80]}: too long, or a NUL in it")
    if text.startswith("oci:"):
        return _layout(text)
    if text.startswith("docker://"):
        rest = text.removeprefix("docker://")
        first, slash, _ = rest.partition("/")
        if not (slash and _is_host(first)):
            # Docker Hub's short names: busybox is library/busybox there.
            rest = f"{DOCKER_HUB}/{rest}" if slash else f"{DOCKER_HUB}/library/{rest}"
        return _registry(text, rest)
    first, slash, _ = text.partition("/")
    if slash and _is_host(first):
        return _registry(text, text)
    raise ArgumentError(f"image {ascii(text)[:80]}: expected {_FORMS}")


def _layout(text: str) -> Reference:
    place, at, digest = text.removeprefix("oci:").partition("@")
    if at and not is_digest(digest):  # an @ in the directory's name
        place, at, digest = text.removeprefix("oci:"), "", ""
    directory, colon, tag = place.partition(":")
    if not directory:
        raise ArgumentError(f"image {ascii(text)[:80]}: no directory; expected oci:DIRECTORY[:TAG]")
    return Reference(Path(directory), tag=_checked_tag(tag, text, layout=True) if colon else None, digest=digest if at else None)


def _registry(text: str, rest: str) -> Reference:
    host, _, path = rest.partition("/")
    if not _HOST.match(host) or len(host) > _NAME_LIMIT or not _port_fits(host):
        raise ArgumentError(f"image {ascii(text)[:80]}: no such host; expected {_FORMS}")
    path, at, digest = path.partition("@")
    if at and not is_digest(digest):
        raise ArgumentError(f"image {ascii(text)[:160]}: no digest after @; expected sha256: and 64 hexadecimal digits")
    name, colon, tag = path.partition(":")
    if host == DOCKER_HUB and name and "/" not in name:
        name = f"library/{name}"
    if not is_repository(name):
        raise ArgumentError(f"image {ascii(text)[:80]}: no such name; expected lower-case letters, digits, . _ - between them")
    return Reference(None, host, name, _checked_tag(tag, text) if colon else None, digest if at else None)


def _is_host(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost"


def _port_fits(host: str) -> bool:
    tail = host.rpartition("]")[2] if host.startswith("[") else host
    _, colon, port = tail.partition(":")
    return not colon or 0 < int(port) < 65536


def _checked_tag(tag: str, text: str, *, layout: bool = False) -> str:
    # A layout's tags may be whole names: "team/app:1" (image-spec annotations.md).
    if not (is_tag(tag) or (layout and len(tag) <= _NAME_LIMIT and _LAYOUT_TAG.match(tag))):
        raise ArgumentError(f"image {ascii(text)[:80]}: no such tag; expected letters, digits, and . _ - after the first")
    return tag
