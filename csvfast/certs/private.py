"""Directories with keys in them: written whole or not at all, readable by their owner alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csvfast._files import temporary_beside
from csvfast.errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["check_private_directory", "read_description", "read_private_file", "write_private_directory", "write_private_file"]


def write_private_directory(directory: Path, files: Mapping[str, Buffer]) -> None:
    """Makes a directory (0700) of files (0600). It appears with everything in it by one rename, or not at all.

    An empty directory that is already there is replaced; anything else is left alone.
    Raises StateError when there is something, OSError. Only a kill in the middle leaves a `.csvfast-*.part` beside it.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(directory)
    temporary.mkdir(mode=0o700)
    try:
        for name, content in files.items():
            _write_new(temporary / name, content)
        _sync_directory(temporary)
        try:
            temporary.rename(directory)
        except (FileExistsError, NotADirectoryError):
            raise StateError(f"{directory}: exists and is not empty; nothing was overwritten") from None
        except OSError as error:
            if directory.is_dir() and any(directory.iterdir()):  # ENOTEMPTY has no exception of its own
                raise StateError(f"{directory}: exists and is not empty; nothing was overwritten") from None
            raise error from None
        _sync_directory(directory.parent)
    except BaseException:
        for name in files:
            with suppress(OSError):
                (temporary / name).unlink()
        with suppress(OSError):
            temporary.rmdir()
        raise


def write_private_file(path: Path, content: Buffer) -> None:
    """Writes a file (0600), whole or not at all, and the directories above it (0700) where they are missing.

    Raises OSError. Thread-safe: the last of several writers wins.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o700, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        _write_new(temporary, content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def check_private_directory(directory: Path) -> None:
    """Raises StateError unless `directory` is the user's own and closed to everybody else."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        raise StateError(f"{directory}: there is no such directory") from None
    except OSError as error:
        raise StateError(f"{directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise StateError(f"{directory}: is no directory")
    _check_private(directory, status)


def read_private_file(directory: Path, name: str, limit: int) -> bytearray:
    """A regular file's bytes, at most `limit`, in a buffer that the caller can wipe.

    Raises StateError: missing, a link, too long, open to other users.
    """
    path = directory / name
    try:
        # O_NONBLOCK: a pipe in the file's place must not hang the program.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{path}: is no regular file")
        _check_private(path, status)
        if status.st_size > limit:
            raise StateError(f"{path}: {status.st_size} bytes; expected at most {limit}")
        data = bytearray(status.st_size)
        count = os.readv(handle, [data])
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    finally:
        os.close(handle)
    if count != len(data):
        raise StateError(f"{path}: changed while it was read")
    return data


def read_description(directory: Path, name: str, form: str) -> dict[str, Any]:
    """A small JSON object whose "format" must be `form`. Raises StateError."""
    path = directory / name
    try:
        record = json.loads(read_private_file(directory, name, 4096))
    except (ValueError, RecursionError):
        raise StateError(f"{path}: is no JSON") from None
    if not isinstance(record, dict) or record.get("format") != form:
        found = record.get("format") if isinstance(record, dict) else None
        raise StateError(f"{path}: format {str(found)[:40]!r}; expected {form!r}")
    return record


def _write_new(path: Path, content: Buffer) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb", buffering=0) as file:
        view = memoryview(content).cast("B")
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise StateError(f"{path}: belongs to user {status.st_uid}; expected {os.geteuid()}")
    if status.st_mode & 0o077:
        raise StateError(f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets other users in; expected none of 0077")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
