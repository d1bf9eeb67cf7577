"""A place for a layer's ciphertext between the two passes: a file without a name, whose space is given back while it is read."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from csvfast._files import temporary_beside
from csvfast.image.new_file import NO_UNNAMED_FILES

__all__ = ["Spool"]

_PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_STEP: Final = 4 << 20
_PAGE: Final = 4096


class Spool:
    """Bytes written once and then read once, in order. One thread at a time; a context manager.

    In: directory   of a file system that keeps the bytes, best a tmpfs. Where it has no files without a name (NFS, older
                    overlays) the file loses its name at once
    OSError.
    """

    def __init__(self, directory: Path | str) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self._file = os.open(directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in NO_UNNAMED_FILES or not Path(directory).is_dir():
                raise
            # Not memory: a layer may be larger than that.
            name = temporary_beside(Path(directory) / "layer")
            self._file = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
            name.unlink()
        self._at = 0
        self._freed = 0
        self._punches = True

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        """Takes all of it. OSError: no space."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def rewind(self) -> None:
        """Reading begins at the first byte; nothing is written after this."""
        os.lseek(self._file, 0, os.SEEK_SET)
        self._at = self._freed = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """The next bytes; 0 at the end. What is 4 MiB behind is gone from the file."""
        count = os.readv(self._file, [buffer])
        self._at += count
        if self._at - self._freed >= _STEP and self._punches:
            self._give_back()
        return count

    def read(self, size: int, /) -> bytes:
        """As readinto; b"" at the end."""
        buffer = bytearray(size)
        count = self.readinto(memoryview(buffer))
        return bytes(memoryview(buffer)[:count])

    def close(self) -> None:
        """The file is gone. Again: no effect."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _give_back(self) -> None:
        end = self._at & -_PAGE
        offset = ctypes.c_int64
        # A file system that cannot do it keeps the space until close().
        self._punches = _fallocate(self._file, _PUNCH, offset(self._freed), offset(end - self._freed)) == 0
        self._freed = end


_library = ctypes.CDLL(None)
_fallocate = getattr(_library, "fallocate64", None) or _library.fallocate  # musl has one for all
