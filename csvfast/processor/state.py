"""Where a platform's keys persist: one file in the chip's directory, replaced as a whole.

    directory (0700)    the chip's identity files (csvfast.certs.chip) and
      platform.state    PEK, PDH, OCA keys and certificates, ownership (0600); absent on a platform in factory state
      platform.lock     held with flock by the one process that uses the directory

platform_state.py has the file's layout; one that was damaged, cut or taken from another chip is refused. A change is written to a
new file, synced to the disk and renamed over the old one, and the directory is synced: a kill or a power failure at any moment
leaves the old state or the new one. If the directory cannot be synced, what was there is put back, so that a change which was
reported as failed does not come true at the next start. Keys pass through buffers that are wiped.

A directory belongs to the process that opened it: a child made by fork() is refused, and so is everybody once the directory has
been replaced, opened to others, or lost its lock file.

Thread-safety: load, save and erase may be called from any thread; the processor calls them under its lock.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from csvfast.certs.chip import ChipIdentity
from csvfast.certs.private import check_private_directory
from csvfast.errors import StateError
from csvfast.processor.derivation import wipe
from csvfast.processor.platform_state import STATE_BYTES, decode_state, encode_state

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.processor.identity import PlatformIdentity

__all__ = ["STATE_FILE", "StateDirectory"]

STATE_FILE: Final = "platform.state"
LOCK_FILE: Final = "platform.lock"
_TEMPORARY: Final = ".platform-state.part"


class StateDirectory:
    """One platform's directory, open and locked.

    Args:
        path: directory made by `csvfast chip new` or ChipIdentity.save().
    Attributes: path; chip, the ChipIdentity in it.
    Raises StateError: not there, not private, damaged, or in use by another process. OSError.

        with StateDirectory("chip") as storage:
            processor = Processor(storage.chip, memory, storage=storage)
    """

    __slots__ = ("_lock", "_mutex", "_process", "chip", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  (the process may change its directory; links stay)
        self._lock: int | None = None
        self._mutex = threading.Lock()
        self._process = os.getpid()
        check_private_directory(self.path)
        self._lock = _locked(self.path / LOCK_FILE)
        try:
            # What a kill in the middle of save() left; nobody else can be writing it now.
            (self.path / _TEMPORARY).unlink(missing_ok=True)
            self.chip = ChipIdentity.load(self.path)
        except BaseException:
            self.close()
            raise

    def load(self) -> PlatformIdentity | None:
        """The stored keys, or None in factory state. Raises StateError (damaged, foreign, not private), naming the file."""
        with self._mutex:
            self._check_open()
            file = self.path / STATE_FILE
            content = _read_private(file)
            if content is None:
                return None
            try:
                return decode_state(content, self.chip, str(file))
            finally:
                wipe(content)

    def save(self, identity: PlatformIdentity) -> None:
        """Stores the keys; after it returns they survive a power failure.

        Raises OSError, StateError. The old ones stay then; only a disk that fails again while they are put back leaves the new.
        """
        with self._mutex:
            self._check_open()
            file = self.path / STATE_FILE
            before = _read_private(file)
            content = encode_state(identity, self.chip)
            try:
                self._replace(content)
                try:
                    _sync_directory(self.path)
                except BaseException:
                    if before is None:
                        file.unlink()
                    else:
                        self._replace(before)
                    raise
            finally:
                wipe(content, before or bytearray())

    def erase(self) -> None:
        """Back to factory state: the stored keys are overwritten and deleted.

        Raises OSError, StateError. The keys stay then, unless it was the overwriting that failed: they are deleted all the same.
        Overwriting is of little use on flash or copy-on-write file systems; there the directory must stand on encrypted storage.
        """
        with self._mutex:
            self._check_open()
            file = self.path / STATE_FILE
            temporary = self.path / _TEMPORARY
            # Renamed first, so that no moment leaves a half-overwritten state behind.
            try:
                file.replace(temporary)
            except FileNotFoundError:
                return
            try:
                _sync_directory(self.path)
            except BaseException:
                temporary.replace(file)
                raise
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    _write_all(handle, bytearray(STATE_BYTES))
                    os.fsync(handle)
                finally:
                    os.close(handle)
            finally:
                temporary.unlink()
            _sync_directory(self.path)

    def close(self) -> None:
        """Lets another process have the directory. Closing twice does nothing."""
        with self._mutex:
            if self._lock is not None:
                handle, self._lock = self._lock, None
                # A forked child may still have the descriptor: closing ours alone would leave the directory locked. The child's
                # own close() must not unlock it for us.
                if self._process == os.getpid():
                    fcntl.flock(handle, fcntl.LOCK_UN)
                os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StateDirectory {self.path}{'' if self._lock is not None else ', closed'}>"

    def _check_open(self) -> None:
        if self._lock is None:
            raise StateError(f"{self.path}: the directory has been closed")
        if self._process != os.getpid():
            raise StateError(f"{self.path}: process {self._process} opened it; a forked child cannot use it")
        check_private_directory(self.path)
        try:
            there = (self.path / LOCK_FILE).lstat()
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._lock)):
            raise StateError(f"{self.path}: the directory or {LOCK_FILE} in it has been replaced since it was locked")

    def _replace(self, content: bytearray) -> None:
        """The state file by a new one, whole or not at all."""
        temporary = self.path / _TEMPORARY
        try:
            temporary.unlink(missing_ok=True)
            _write_private(temporary, content)
            temporary.replace(self.path / STATE_FILE)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StateError(f"{path.parent}: another processor is using this directory") from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _read_private(path: Path) -> bytearray | None:
    """The file's bytes (one more than a state has at most), None if there is none. StateError if others can read it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{path}: is no regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise StateError(
                f"{path}: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}; expected owner {os.geteuid()} and "
                "nobody else (0600)"
            )
        content = bytearray(STATE_BYTES + 1)
        done = 0
        with memoryview(content) as view:
            while done < len(content) and (count := file.readinto(view[done:])):
                done += count
        if done < len(content):
            shorter = content[:done]
            wipe(content)
            return shorter
        return content


def _write_private(path: Path, content: bytearray) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(handle, 0o600)  # a umask of 0777 would give less
        _write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, content: bytearray) -> None:
    with memoryview(content) as view:
        done = 0
        while done < len(view):
            done += os.write(handle, view[done:])


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
