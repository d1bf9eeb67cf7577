"""The ledger of a job: JSON Lines that are only ever appended to, so that a kill at any moment costs at most the rows under way.

The first line says what the file is; every other line is a row (rows.py). When a name occurs again, the last line holds. A line
is written with one call at the end of the file, so a kill leaves whole lines, or a torn last one, which the next run cuts off.
Rows reach the disk (fsync) every few seconds and at the end; a kill of the process alone loses nothing that was written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Self

from csvfast.measure.errors import RecipeError, SourceNotFoundError, SourceUnreadableError, TargetError
from csvfast.measure.fleet.rows import Identity, Item, Key, Row
from csvfast.measure.source import AnyPath

__all__ = ["HEADER", "Ledger", "read_ledger"]

HEADER: Final = {"csvfast": "measurements", "version": 1}
SYNC_SECONDS: Final = 5.0
LINE_MAX_BYTES: Final = 1 << 20
TICK_NS: Final = 50_000_000
"""A file that changed so shortly before its measurement began may have changed again within the same tick of its clock."""


class Ledger:
    """A ledger that is open for one job. Use as a context manager.

    Args: path: created when it is not there. fresh: forget what it holds.
    Attributes: rows: the rows it held when it was opened, by key, the last of each. repaired: bytes of a torn last line.
    Raises: TargetError (cannot be written; used by another job now), RecipeError (it is no ledger: nothing is changed).
    Thread-safety: one thread.
    """

    path: str
    rows: dict[Key, Row]
    repaired: int

    def __init__(self, path: AnyPath, *, fresh: bool = False) -> None:
        self.path = os.fspath(path)
        self.rows = {}
        self.repaired = 0
        self._synced = time.monotonic()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            status = os.fstat(self._fd)
            self._this = (status.st_dev, status.st_ino)
            self._begin(fresh)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows. Raises TargetError; what was written of a line is cut off by the next run."""
        self._write("".join([row.to_line() for row in rows]).encode())
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def current(self, item: Item) -> Row | None:
        """The row that still holds for an item: measured, of the same bytes as far as one can tell."""
        row = self.rows.get(item.key)
        if row is None or row.digest is None or item.identity is None or not row.identity.proves(item.identity):
            return None
        changed = max(row.identity.mtime_ns or 0, row.identity.ctime_ns or 0)
        return None if changed > row.started * 1e9 - TICK_NS else row

    def is_file(self, identity: Identity | None) -> bool:
        """Whether a source is this ledger: a list cannot hold its own digest."""
        return identity is not None and (identity.device, identity.inode) == self._this

    def sync(self) -> None:
        """What was added survives a loss of power. Raises TargetError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # a pipe or a device has nothing to sync
                raise _unwritable(self.path, error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and closes; harmless when repeated."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _begin(self, fresh: bool) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TargetError(f"{self.path}: is in use by another job; expected one job for each ledger") from error
        size = os.fstat(self._fd).st_size
        if size:
            end = 0
            for line, offset in _lines(self._fd, self.path):
                end = offset + len(line)
                if not line.endswith(b"\n"):
                    if offset == 0 and not _HEADER_LINE.startswith(line):
                        raise RecipeError(f"{self.path}: line 1: is no ledger; expected {_HEADER_LINE.decode().strip()}")
                    self.repaired = len(line)
                    end = offset
                elif offset == 0:
                    _check_header(line, self.path)
            if fresh or end != size:
                os.ftruncate(self._fd, 0 if fresh else end)
                size = 0 if fresh else end
        if size:
            for row in _rows(self._fd, self.path):
                self.rows[row.key] = row
        else:
            self._write(_HEADER_LINE)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error


_HEADER_LINE: Final = (json.dumps(HEADER, separators=(",", ":")) + "\n").encode()


def read_ledger(path: AnyPath) -> dict[Key, Row]:
    """The rows of a ledger, the last of each key; a torn last line is left out. Nothing is changed.

    Raises: SourceNotFoundError, SourceUnreadableError, RecipeError with the number of the line.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{name}: no such file") from error
    except OSError as error:
        raise SourceUnreadableError(f"{name}: cannot be read: {error.strerror or error}") from error
    try:
        return {row.key: row for row in _rows(descriptor, name)}
    finally:
        os.close(descriptor)


def _rows(descriptor: int, path: str) -> Iterator[Row]:
    seen = False
    for number, (line, _offset) in enumerate(_lines(descriptor, path), 1):
        if not line.endswith(b"\n"):
            break
        if number == 1:
            _check_header(line, path)
            seen = True
            continue
        try:
            yield Row.from_json(_parse(line))
        except RecipeError as error:
            raise RecipeError(f"{path}: line {number}: {error}") from error
    if not seen:
        raise RecipeError(f"{path}: is empty; expected a ledger")


def _check_header(line: bytes, path: str) -> None:
    try:
        header = _parse(line)
    except RecipeError:
        header = None
    if header != HEADER:
        raise RecipeError(f"{path}: line 1: is no ledger; expected {_HEADER_LINE.decode().strip()}")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip(b"\n"))
    except json.JSONDecodeError as error:
        raise RecipeError(f"column {error.colno}: is no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"is no JSON: {error}") from error


def _lines(descriptor: int, path: str) -> Iterator[tuple[bytes, int]]:
    """Lines with their line breaks, and where they begin; the last one may have no line break."""
    offset = at = 0
    rest = b""
    while True:
        try:
            piece = os.pread(descriptor, 1 << 20, at)
        except OSError as error:
            raise SourceUnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
        at += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line + b"\n", offset
            offset += len(line) + 1
        if len(rest) > LINE_MAX_BYTES:
            raise RecipeError(f"{path}: a line is longer than {LINE_MAX_BYTES} bytes; expected a ledger")
        if not piece:
            break
    if rest:
        yield rest, offset


def _unwritable(path: str, error: OSError) -> TargetError:
    return TargetError(f"{path}: cannot be written: {error.strerror or error}")

