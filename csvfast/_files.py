"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that afterwards either all of `content` is there or what was there before.

    In: content   str is written as UTF-8
    Raises OSError; the temporary file beside `path` is removed then. Thread-safe: the last of several writers wins.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes 0600; give what open() would have given
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
