"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["final_target", "temporary_beside", "write_atomically"]


def final_target(path: Path) -> Path:
    """Where a path ends after its symbolic links, so that a rename replaces the file and not the link to it.

    Raises OSError for links that go in circles.
    """
    return path.resolve() if path.is_symlink() else path


def temporary_beside(path: Path) -> Path:
    """A name nobody uses, in the directory of `path`; short, because the name of `path` may be as long as names may be."""
    return path.parent / f".csvfast-{secrets.token_hex(8)}.part"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that afterwards either all of `content` is there or what was there before.

    In: path      a symbolic link is followed. What is no regular file (/dev/stdout, a pipe, a terminal) is written to as it
                  stands: a rename would put a file in the device's place.
        content   str is written as UTF-8
    Raises OSError; the temporary file beside `path` is removed then. Thread-safe: the last of several writers wins.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        with path.open("wb", buffering=0) as device:
            view = memoryview(data)
            while view:
                view = view[device.write(view) :]
        return
    path = final_target(path)
    temporary = temporary_beside(path)
    # 0666 less the umask is what open() would have given.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
