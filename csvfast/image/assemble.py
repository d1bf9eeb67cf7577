"""From a registry's or a layout's encrypted image to a root file system: every check before anything can be seen.

For each layer, in this order: the ciphertext goes to a private spool while its digest and MAC are computed; both must be right;
then it is decrypted, decompressed within limits and unpacked below a private directory, while the digests of the layer and of its
archive are computed; both must be right. When all layers are done that directory gets its name. After any failure it is removed.
The next layer is downloaded while one is unpacked.

    image = assemble_image(source, "1.0", Path("/run/images/one"), unwrap=lambda layer: unwrap_any(layer, wrappers))

Source: the order of containers/ocicrypt's checks, made stricter: image-rs of guest-components unpacks before the MAC is known.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from csvfast.crypto import Secret
from csvfast.errors import ImageError, IntegrityError
from csvfast.image.blobs import VerifiedReader, read_blob, resolve_manifest
from csvfast.image.compression import compression_of
from csvfast.image.copy import platform_parts
from csvfast.image.descriptor import is_encrypted
from csvfast.image.image_config import ImageConfiguration, check_platform
from csvfast.image.layer_cipher import LayerCheck, open_layer
from csvfast.image.limits import DEFAULT_LIMITS, Budget, Limits
from csvfast.image.spool import Spool
from csvfast.image.tree import RootDirectory, remove_tree
from csvfast.image.unpack import LayerResult, unpack_layer

if TYPE_CHECKING:
    from csvfast.image.blobs import BlobSource
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.manifest import Manifest
    from csvfast.image.tree import ContentStore

__all__ = ["AssembledImage", "Progress", "Timings", "Unwrap", "assemble_image", "find_image"]

_BLOCK: Final = 1 << 20
_PREFIX: Final = ".csvfast-"
_SUFFIX: Final = ".unpacking"

Unwrap = Callable[["Descriptor"], Secret]
"""Gives an encrypted layer's private options; they are wiped when the image is done."""

Timings = Callable[[str, float], None]
"""(step, seconds): "manifest", "unwrap", and for each layer "download" and "unpack", which overlap; "finish"."""


class Progress(Protocol):
    """Is told how far things are; may be called from another thread. What it raises ends the work."""

    def __call__(self, step: str, done: int, total: int, /) -> None:
        """In: step   "download": bytes of all layers together. "unpack": layers."""


@dataclass(frozen=True, slots=True)
class AssembledImage:
    """What was made.

    rootfs      the root file system
    descriptor  of the manifest
    manifest    of the image
    config      its configuration
    encrypted   for each layer, whether it was encrypted
    layers      for each layer: digest of the archive, entries, bytes
    notes       what was left out, a line each (extended attributes that the file system does not have)
    """

    rootfs: Path
    descriptor: Descriptor
    manifest: Manifest
    config: ImageConfiguration
    encrypted: tuple[bool, ...]
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...]


def find_image(
    source: BlobSource, wanted: str | None, *, platform: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> tuple[Descriptor, Manifest, ImageConfiguration]:
    """Manifest and configuration of an image, checked against each other; an index is searched for the platform.

    In: platform   "linux/arm64", "linux/arm64/v8". Default: this machine's
    Raises ImageError, RegistryError.
    """
    parts = platform_parts(platform)
    descriptor, manifest = resolve_manifest(source, wanted, *parts)
    config = ImageConfiguration.parse(read_blob(source, manifest.config, limits.config_bytes), limits)
    check_platform(config, parts[1] if parts else None, parts[0] if parts else "linux")
    if len(manifest.layers) != len(config.diff_ids):
        found = f"{len(manifest.layers)} layers, and {len(config.diff_ids)} in the image configuration"
        raise ImageError(f"manifest {descriptor.digest}", f"{found}; expected as many")
    if len(manifest.layers) > limits.layers:
        raise ImageError(f"manifest {descriptor.digest}", f"{len(manifest.layers)} layers; the limit is {limits.layers}")
    total = sum(layer.size for layer in manifest.layers)
    if total > limits.total_bytes:
        raise ImageError(f"manifest {descriptor.digest}", f"layers of {total} bytes; the limit is {limits.total_bytes}")
    for layer in manifest.layers:
        compression_of(layer.media_type)
    return descriptor, manifest, config


def assemble_image(
    source: BlobSource,
    wanted: str | None,
    destination: Path,
    *,
    unwrap: Unwrap | None = None,
    approve: Callable[[Descriptor, Manifest, ImageConfiguration], None] | None = None,
    clear_layers: bool = True,
    platform: str | None = None,
    owners: bool | None = None,
    devices: bool = False,
    content: ContentStore | None = None,
    limits: Limits = DEFAULT_LIMITS,
    spool: Path | None = None,
    progress: Progress | None = None,
    timings: Timings | None = None,
) -> AssembledImage:
    """Makes an image's root file system at `destination`, whole or not at all.

    In: source         where the image is; used by one thread at a time
        wanted         tag or digest, as the source's resolve has it
        destination    a name that is not taken, in a directory that exists
        unwrap         is called for each encrypted layer before anything of any layer is read; None: encrypted layers are refused
        approve        is called before any key is asked for; what it raises ends the work
        clear_layers   False: refuse an image with a layer that is not encrypted
        platform       of the image, as `find_image` has it
        owners, devices, content   as `RootDirectory` has them
        spool          directory for ciphertext between the passes. Default: where the destination is.
                       At most two layers are there at a time, and the space of what has been read is given back.
    Raises ImageError (IntegrityError for what was changed), RegistryError, OSError, and what the callables raise. What a process
    that was killed left beside the destination is removed by the next call.
    """
    begun = time.perf_counter()
    if os.path.lexists(destination):
        raise ImageError(str(destination), "is there already; expected a new name")
    descriptor, manifest, config = find_image(source, wanted, platform=platform, limits=limits)
    encrypted = tuple(is_encrypted(layer.media_type) for layer in manifest.layers)
    for number, layer in enumerate(manifest.layers):
        if not encrypted[number] and not clear_layers:
            raise ImageError(_layer(number, manifest), f"media type {layer.media_type}; expected an encrypted layer")
        if encrypted[number] and unwrap is None:
            raise ImageError(_layer(number, manifest), "is encrypted, and no key was given")
    if approve is not None:
        approve(descriptor, manifest, config)
    clock = _Clock(timings, begun)
    clock("manifest")
    keys: list[Secret | None] = []
    try:
        for number, layer in enumerate(manifest.layers):
            keys.append(unwrap(layer) if encrypted[number] and unwrap is not None else None)
        clock("unwrap")
        with _staging(destination) as staging:
            root = RootDirectory(staging, owners=owners, devices=devices, content=content, limits=limits)
            try:
                place = destination.parent if spool is None else spool
                results = _unpack_all(source, manifest, config, keys, root, place, progress, timings)
                clock.begin()
                root.finish()
            finally:
                root.close()
            staging.rename(destination)
        clock("finish")
    finally:
        for key in keys:
            if key is not None:
                key.wipe()
    return AssembledImage(destination, descriptor, manifest, config, encrypted, results, tuple(root.notes))


def _unpack_all(
    source: BlobSource,
    manifest: Manifest,
    config: ImageConfiguration,
    keys: list[Secret | None],
    root: RootDirectory,
    spool: Path,
    progress: Progress | None,
    timings: Timings | None,
) -> tuple[LayerResult, ...]:
    budget = Budget(root.limits)
    results: list[LayerResult] = []
    count = len(manifest.layers)
    downloads = _Downloads(source, manifest, keys, spool, progress, timings)
    try:
        if count:
            downloads.start(0)
        for number, layer in enumerate(manifest.layers):
            if progress is not None:
                progress("unpack", number, count)
            spooled = downloads.wait()
            with spooled:
                if number + 1 < count:
                    downloads.start(number + 1)
                begun = time.perf_counter()
                key = keys[number]
                try:
                    results.append(_unpack(layer, config.diff_ids[number], key, spooled, root, budget))
                except ImageError as error:
                    if type(error) not in (ImageError, IntegrityError):
                        raise
                    raise type(error)(f"{_layer(number, manifest)}, {error.subject}", error.problem) from error
            if timings is not None:
                timings("unpack", time.perf_counter() - begun)
        if progress is not None:
            progress("unpack", count, count)
    finally:
        downloads.close()
    return tuple(results)


def _unpack(
    layer: Descriptor, diff_id: str, key: Secret | None, spooled: Spool, root: RootDirectory, budget: Budget
) -> LayerResult:
    """The second pass over a layer."""
    if key is None:
        return unpack_layer(spooled, root, budget, media_type=layer.media_type, diff_id=diff_id)
    with open_layer(spooled, layer, key) as reader:
        result = unpack_layer(reader, root, budget, media_type=layer.media_type, diff_id=diff_id)
        reader.drain()  # decompression may end before the data does; the layer's digest is over all of it
        if not reader.verified:
            raise IntegrityError("layer", "its digest was not reached")
    return result


class _Downloads:
    """Fetches layers into spools in another thread, one at a time."""

    def __init__(
        self, source: BlobSource, manifest: Manifest, keys: list[Secret | None], directory: Path, progress: Progress | None,
        timings: Timings | None,
    ) -> None:  # fmt: skip
        self._source, self._layers, self._keys, self._directory = source, manifest.layers, keys, directory
        self._progress, self._timings = progress, timings
        self._total = sum(layer.size for layer in manifest.layers)
        self._done = 0
        self._stop = False
        self._thread: threading.Thread | None = None
        self._result: Spool | BaseException | None = None

    def start(self, number: int) -> None:
        """Begins with a layer; the one before has been waited for."""
        self._result = None
        self._thread = threading.Thread(target=self._run, args=(number,), name="csvfast-download", daemon=True)
        self._thread.start()

    def wait(self) -> Spool:
        """The layer, checked and ready to be read; the caller closes it. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, self._result = self._result, None
        if isinstance(result, Spool):
            return result
        assert result is not None, "no download was begun"
        raise result

    def close(self) -> None:
        """Ends a download that nobody waits for."""
        self._stop = True
        if self._thread is not None:
            with suppress(BaseException):
                self.wait().close()

    def _run(self, number: int) -> None:
        begun = time.perf_counter()
        try:
            self._result = self._fetch(self._layers[number], self._keys[number])
        except BaseException as error:  # whatever it is, the thread that waits raises it
            self._result = error
        if self._timings is not None:
            self._timings("download", time.perf_counter() - begun)

    def _fetch(self, layer: Descriptor, key: Secret | None) -> Spool:
        """The first pass over a layer: size, digest and MAC of what is in the spool have been found right."""
        spool = Spool(self._directory)
        try:
            raw = self._source.open_blob(layer)
            try:
                view = memoryview(bytearray(min(_BLOCK, layer.size + 1)))
                if key is None:
                    reader = VerifiedReader(raw, layer)
                    while count := reader.readinto(view):
                        self._took(spool, view[:count])
                else:
                    with LayerCheck(layer, key) as check:
                        while count := raw.readinto(view):
                            check.update(view[:count])
                            self._took(spool, view[:count])
                        check.finish()
            finally:
                raw.close()
            spool.rewind()
        except BaseException:
            spool.close()
            raise
        return spool

    def _took(self, spool: Spool, data: memoryview) -> None:
        if self._stop:
            raise ImageError("download", "was given up")
        spool.write(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress("download", self._done, self._total)


class _Clock:
    """Seconds since the step before."""

    def __init__(self, timings: Timings | None, begun: float) -> None:
        self._timings, self._begun = timings, begun

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        if self._timings is not None:
            self._timings(step, now - self._begun)
        self._begun = now


def _layer(number: int, manifest: Manifest) -> str:
    return f"layer {number + 1} of {len(manifest.layers)}"


@contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """A new directory beside the destination that only the caller can enter; gone at the end unless it was renamed."""
    parent = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_stale(parent)
        name, lock = _new_directory(parent)
        try:
            yield destination.parent / name
        finally:
            try:
                remove_tree(parent, name)
            finally:
                os.close(lock)
    finally:
        os.close(parent)


def _new_directory(parent: int) -> tuple[str, int]:
    """Name and lock of a new directory. Another process may take it for a killed one's before it is locked: then another one."""
    while True:
        name = f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        os.mkdir(name, 0o700, dir_fd=parent)
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(name, parent)
            if os.fstat(lock).st_nlink:
                return name, lock
            os.close(lock)


def _lock(name: str, parent: int) -> int:
    """A descriptor whose lock tells other processes that somebody works here. Raises BlockingIOError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_stale(parent: int) -> None:
    """Removes what killed processes left: directories of our names that nobody holds."""
    for name in os.listdir(parent):
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        with suppress(OSError):
            lock = _lock(name, parent)
            try:
                remove_tree(parent, name)
            finally:
                os.close(lock)
