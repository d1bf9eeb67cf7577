"""Files that have no name until they are complete: nothing is left of one that is given up, not even after a kill.

Source: open(2), O_TMPFILE; linkat(2).
Thread-safety: a file belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from csvfast._files import temporary_beside

__all__ = ["NO_UNNAMED_FILES", "NewFile", "new_file"]

NO_UNNAMED_FILES: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS})
"""What the system says to O_TMPFILE where there is no such thing."""


class NewFile:
    """A file in the making, with mode 0644 less the umask. `publish` or `close`, and always `close`.

    In: directory   on the file system that it will stand on
    OSError.
    """

    def __init__(self, directory: Path) -> None:
        flags, mode = os.O_RDWR | os.O_CLOEXEC, 0o644
        self._name: Path | None = None
        try:
            self._handle = os.open(directory, flags | os.O_TMPFILE, mode)
        except OSError as error:
            if error.errno not in NO_UNNAMED_FILES or not directory.is_dir():
                raise
            # A file system without unnamed files: a kill leaves a .csvfast-*.part there.
            self._name = temporary_beside(directory / "blob")
            self._handle = os.open(self._name, flags | os.O_CREAT | os.O_EXCL, mode)
        self._open = True

    def write(self, view: memoryview) -> None:
        """OSError: no room."""
        while view:
            view = view[os.write(self._handle, view) :]

    def read(self, size: int, offset: int) -> bytes:
        """What has been written."""
        return os.pread(self._handle, size, offset)

    def publish(self, path: Path) -> None:
        """Gives it its name, in place of what has it, once it is on the disk. OSError."""
        os.fsync(self._handle)
        if self._name is None:
            temporary = temporary_beside(path)
            # Python follows the link only when it is told a directory, which an absolute path does not use.
            os.link(f"/proc/self/fd/{self._handle}", temporary, src_dir_fd=self._handle, follow_symlinks=True)
            self._name = temporary
        self._name.replace(path)
        self._name = None
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Without publish, nothing is left of it. May be called twice."""
        if self._open:
            self._open = False
            os.close(self._handle)
            if self._name is not None:
                with suppress(OSError):
                    self._name.unlink()


@contextmanager
def new_file(directory: Path) -> Iterator[NewFile]:
    """A NewFile that is closed at the end."""
    new = NewFile(directory)
    try:
        yield new
    finally:
        new.close()
