"""Images on this machine, encrypted as they came: a cache of registries' images, and the registry on loopback that agents fetch
them from.

An agent always fetches over HTTP and verifies everything itself; what the cache saves is the way to the real registry. Nothing
here is ever decrypted, and a cache that somebody has tampered with is found out by the agent.

    CACHE/HOST[:PORT]/NAME    an OCI layout for each repository; tags as the registry had them

    with mirror_image(options, "127.0.0.1", timings) as mirror:
        mirror.name      "registry.example/app:1": what the agent's policy judges
        mirror.source    "docker://127.0.0.1:43210/app@sha256:...": where the agent fetches it
        mirror.digest    of the manifest

Thread-safety: any thread; several processes may use one cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

from csvfast.errors import ArgumentError, ContainerError, ImageError, RegistryError
from csvfast.image.descriptor import is_digest, is_index
from csvfast.image.manifest import Index, Manifest, choose
from csvfast.image.reference import Reference, parse_reference

if TYPE_CHECKING:
    from csvfast.image.blobs import BlobSource
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.layout import OciLayout
    from csvfast.runtime.options import RunOptions
    from csvfast.runtime.timings import Timings

__all__ = ["Mirror", "cache_directory", "image_identity", "mirror_image"]

PULLS: Final = ("missing", "always", "never")


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where an agent finds an image.

    name     as the agent's policy judges it
    digest   of the platform's manifest, "sha256:..."
    source   where it is fetched from; None: from where its name says
    cached   whether all of it was here already
    """

    name: str
    digest: str
    source: str | None
    cached: bool


def cache_directory(options: RunOptions) -> Path:
    """Of encrypted images: the options', or csvfast/images in the user's cache."""
    if options.cache:
        return Path(options.cache)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "csvfast" / "images"


def image_identity(options: RunOptions) -> tuple[str, str]:
    """Name and digest of the image's manifest as mirror_image will have them; nothing but the manifest is fetched.

    Raises: ArgumentError, ImageError, RegistryError, OSError.
    """
    reference = parse_reference(options.image)
    source = _open(reference, options)
    try:
        descriptor, _data, _manifest = _resolve(source, reference.wanted)
    finally:
        source.close()
    return _name(reference), descriptor.digest


@contextmanager
def mirror_image(options: RunOptions, loopback: str, timings: Timings) -> Iterator[Mirror]:
    """An image of the options, where the agent can fetch it, for as long as the block runs.

    In: loopback   what the guest calls this machine's loopback
    Raises: ArgumentError (reference, pull), ImageError, RegistryError; ContainerError("image"): not cached, and pull is "never".
    """
    if options.pull not in PULLS:
        raise ArgumentError(f"pull is {options.pull[:20]!r}; expected {', '.join(PULLS)}")
    reference = parse_reference(options.image)
    name = _name(reference)
    if options.direct:
        if reference.host is None:
            raise ArgumentError(f"image {options.image}: a layout of this machine; an agent can fetch from registries only")
        with timings.step("resolve image"):
            digest = image_identity(options)[1]
        yield Mirror(name, digest, None, False)
        return
    with ExitStack() as stack:
        with timings.step("image cache"):
            layout, wanted, cached = _cached(reference, options)
            descriptor, data, manifest = _resolve(layout, wanted)
            repository = reference.name if reference.host is not None else _slug(reference)
            from csvfast.runtime.mirror import MirrorServer

            server = stack.enter_context(MirrorServer(layout, repository, descriptor, data, manifest))
        port = server.address.rpartition(":")[2]
        yield Mirror(name, descriptor.digest, f"docker://{loopback}:{port}/{repository}@{descriptor.digest}", cached)


def _cached(reference: Reference, options: RunOptions) -> tuple[OciLayout, str | None, bool]:
    """The layout that has the image, by what it is found there, and whether it was there already."""
    from csvfast.image.layout import OciLayout

    if reference.directory is not None:
        return OciLayout(reference.directory), reference.wanted, True
    place = cache_directory(options) / (reference.host or "") / reference.name
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    layout, wanted = OciLayout(place, create=True), reference.wanted or "latest"
    complete = _is_complete(layout, wanted)
    if options.pull == "never" and not complete:
        raise ContainerError("image", f"{reference} is not in {place}, and nothing may be fetched")
    if options.pull == "never" or (complete and is_digest(wanted)):
        return layout, wanted, True
    source = _open(reference, options)
    try:
        return layout, wanted, not _copy(source, layout, wanted)
    except RegistryError:
        # A registry that is away does not stop what is here; the agent verifies it, however old it is.
        if options.pull == "always" or not complete:
            raise
        return layout, wanted, True
    finally:
        source.close()


def _is_complete(layout: OciLayout, wanted: str) -> bool:
    try:
        _descriptor, _data, manifest = _resolve(layout, wanted)
    except ImageError:
        return False
    return all(layout.has_blob(blob) for blob in (manifest.config, *manifest.layers))


def _copy(source: BlobSource, layout: OciLayout, wanted: str) -> int:
    """Manifest and blobs as they are, of this machine's platform: blobs first, verified, the tag at last.

    Out: how many blobs were missing.
    """
    from csvfast.image.transform import copy_blob

    descriptor, data, manifest = _resolve(source, wanted)
    missing = [blob for blob in (manifest.config, *manifest.layers) if not layout.has_blob(blob)]
    for blob in missing:
        copy_blob(source, layout, blob)
    layout.put_manifest(data, descriptor.media_type, None if is_digest(wanted) else wanted)
    return len(missing)


def _resolve(source: BlobSource, wanted: str | None) -> tuple[Descriptor, bytes, Manifest]:
    descriptor, data = source.resolve(wanted)
    if is_index(descriptor.media_type):
        descriptor = choose(Index.parse(data, descriptor.media_type))
        descriptor, data = source.resolve(descriptor.digest)
    return descriptor, data, Manifest.parse(data, descriptor.media_type)


def _open(reference: Reference, options: RunOptions) -> BlobSource:
    if reference.directory is not None:
        from csvfast.image.layout import OciLayout

        return OciLayout(reference.directory)
    from csvfast.image.registry import RegistryClient

    plain = any(fnmatchcase(reference.host or "", pattern) for pattern in options.plain_http)
    return RegistryClient(reference, plain_http=True if plain else None)


def _name(reference: Reference) -> str:
    """Of an image in a layout: without its directory, which is another on each machine, and would be measured."""
    if reference.host is not None:
        return str(reference).removeprefix("docker://")
    return f"localhost/{_slug(reference)}" + (f":{reference.tag}" if reference.tag else "")


def _slug(reference: Reference) -> str:
    name = "" if reference.directory is None else reference.directory.resolve().name.lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:100] or "image"
