"""Where the bytes of items come from: files, virtual disks, and whatever other rooms or packages can open by a URL.

A provider is named by text, "module:attribute", so that a task can be carried to another process or machine and opened there. Who
adds one calls `register_provider("oci", "package.module:provider")`, at home, once; workers find it by the text.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol

from csvfast import _core
from csvfast.errors import MissingExtraError
from csvfast.measure.errors import (
    EmptySourceError,
    FormatError,
    ParameterError,
    SourceChangedError,
    SourceError,
    SourceKindError,
    SourceNotFoundError,
    SourceTruncatedError,
)
from csvfast.measure.fleet.rows import Identity, Item
from csvfast.measure.recipe import load_recipe
from csvfast.measure.source import Access, AnyPath, Source

__all__ = [
    "CredentialsError",
    "FileSource",
    "Found",
    "Readable",
    "SourceConnectionError",
    "SourceProvider",
    "error_of",
    "identity_of",
    "open_item",
    "provider_for",
    "recipe_identity",
    "register_provider",
]


class CredentialsError(SourceError, PermissionError):
    """A server refuses the credentials, or there are none, or they have expired. The message shows none of them."""


class SourceConnectionError(SourceError, ConnectionError):
    """A server does not answer, or stopped in the middle each time it was tried."""


class Readable(Protocol):
    """An open source of known size, read by position. Used by one thread at a time."""

    path: str

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def identity(self) -> Identity:
        """As it was when it was opened."""

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fills the whole buffer from a byte offset. Raises SourceError."""

    def check_unchanged(self) -> None:
        """Raises SourceChangedError, SourceNotFoundError when it is not what it was when it was opened."""

    def close(self) -> None:
        """Harmless when repeated."""


@dataclass(frozen=True, slots=True)
class Found:
    """One thing a provider found below a source. location: what its `open` takes."""

    name: str
    location: str
    identity: Identity | None = None


class SourceProvider(Protocol):
    """Opens the URLs of one or more schemes. Its object stands in a module, where workers import it."""

    def expand(self, source: str) -> Iterable[Found]:
        """The things to measure below a URL, in a fixed order. Raises SourceError."""

    def open(self, location: str) -> Readable:
        """Opens one. Raises SourceError (CredentialsError, SourceConnectionError), MissingExtraError."""


_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII)
_REMOTE: Final = "csvfast.measure.fleet.remote:provider"
_providers: dict[str, str] = {}


def register_provider(scheme: str, reference: str) -> None:
    """From now on sources that begin with "scheme:" belong to the provider "module:attribute". The last one holds."""
    if not _SCHEME.fullmatch(f"{scheme}:") or ":" not in reference:
        raise ParameterError(f"provider of {scheme!r} is {reference!r}; expected a scheme and 'module:attribute'")
    _providers[scheme] = reference


def provider_for(source: str) -> str:
    """The provider of a source, "" for paths. What nobody registered, fsspec opens when it knows the scheme.

    Raises: ParameterError for "scheme://" of any other scheme.
    """
    scheme = _SCHEME.match(source)
    if scheme is None:
        return ""
    if scheme[1] in _providers:
        return _providers[scheme[1]]
    if source.startswith(f"{scheme[1]}://"):
        from csvfast.measure.fleet.remote import knows

        if knows(scheme[1]):
            return _REMOTE
        known = ", ".join(sorted({*_providers, "s3", "http", "https"}))
        raise ParameterError(f"{source}: nothing opens {scheme[1]!r} URLs; expected a path or one of the schemes: {known}")
    return ""


@cache
def load_provider(reference: str) -> SourceProvider:
    """The object that a reference names. Raises ParameterError."""
    module, _, attribute = reference.partition(":")
    try:
        provider: SourceProvider = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise ParameterError(f"provider {reference!r} cannot be loaded: {error}") from error
    return provider


def open_item(item: Item, access: Access = "read") -> Readable:
    """Opens what an item names, in the content that it asks for. Raises SourceError, FormatError, MissingExtraError."""
    base: Readable = FileSource(item.location, access) if not item.provider else load_provider(item.provider).open(item.location)
    if item.content == "file":
        return base
    from csvfast.measure.fleet.qcow2 import open_disk

    try:
        return open_disk(base)
    except BaseException:
        base.close()
        raise


class FileSource(Source):
    """A regular file or block device as a Readable."""

    size: int

    def __init__(self, path: AnyPath, access: Access = "read") -> None:
        super().__init__(path, access=access, streams=False)

    @property
    def descriptor(self) -> int:
        """Of the open file, for the calls of `_core` that map it."""
        return self._fd

    def hole(self, offset: int) -> int:
        """How many bytes from an offset on are zeros for which a sparse file has no room on the disk; 0: none, or nobody says."""
        if self.status.st_blocks * 512 >= self.size:
            return 0
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) - offset
        except OSError as error:
            return self.size - offset if error.errno == errno.ENXIO else 0

    @property
    def identity(self) -> Identity:
        """As it was when it was opened; a block device has no times that mean anything."""
        return identity_of(self.status.st_size or self.size, self.status)


class _Status(Protocol):
    @property
    def st_mode(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_dev(self) -> int: ...


def identity_of(size: int, status: _Status) -> Identity:
    """Of a regular file; of a block device only the size, which proves nothing."""
    if status.st_mode & 0o170000 != 0o100000:
        return Identity(size)
    return Identity(size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def recipe_identity(path: AnyPath) -> Identity:
    """Of a launch recipe: of its file and of every file that it names. Raises RecipeError, SourceError."""
    recipe = load_recipe(path)
    parts = [path, *(part for part in (recipe.firmware, recipe.kernel, recipe.initrd) if part is not None)]
    text, size, mtime, ctime = "", 0, 0, 0
    for part in parts:
        with FileSource(part) as source:
            one = source.identity
        if one.mtime_ns is None:
            return Identity(size)
        text += f"{one.size} {one.mtime_ns} {one.ctime_ns} {one.inode}\n"
        size += source.size
        mtime, ctime = max(mtime, one.mtime_ns), max(ctime, one.ctime_ns or 0)
    return Identity(size, mtime, ctime, etag=f"files:{_core.sm3(text.encode()).hexdigest()}")


_KINDS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (CredentialsError, "credentials"),
    (SourceConnectionError, "connection"),
    (SourceNotFoundError, "not-found"),
    (SourceTruncatedError, "truncated"),
    (SourceChangedError, "changed"),
    (SourceKindError, "kind"),
    (EmptySourceError, "empty"),
    (ParameterError, "option"),
    (FormatError, "format"),
    (SourceError, "unreadable"),
    (MissingExtraError, "extra"),
)


def error_of(error: BaseException) -> tuple[str, str]:
    """The kind and the message of a row for something that went wrong."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ELOOP:
        return "loop", str(error)
    for kind, name in _KINDS:
        if isinstance(error, kind):
            return name, str(error)
    return "internal", f"{type(error).__name__}: {error}"
