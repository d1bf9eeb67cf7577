"""Where the state of containers is kept: one private directory per container, and a lock that tells whether its monitor lives.

    ROOT/ID/state.json    the container's state as the OCI runtime specification has it, and members of our own under "csvfast"
    ROOT/ID/lock          locked for as long as its monitor lives, whatever ends that one
    ROOT/ID/control.sock  where the monitor listens (the sandbox's own container only)
    ROOT/ID/work          the executor's files: ciphertext, sockets. Removed with the monitor, or by the next command that looks

A container whose monitor is gone is "stopped", whatever its file says: nothing of it can be running.

Source: opencontainers/runtime-spec runtime.md, section "State".
Thread-safety: functions without state; a ContainerDirectory belongs to one process, any thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from csvfast._files import write_atomically
from csvfast.errors import ArgumentError, ContainerError, StateError

__all__ = [
    "CONTROL",
    "OCI_VERSION",
    "ContainerDirectory",
    "check_identifier",
    "clean",
    "identifiers",
    "read_state",
    "remove",
    "state_root",
]

OCI_VERSION: Final = "1.0.2"
CONTROL: Final = "control.sock"
WORK: Final = "work"
RUNTIME_STATE: Final = "runtime-state"  # of runc or crun
_STATE: Final = "state.json"
_LOCK: Final = "lock"
_NEW: Final = ".new-"
_ASKING_SECONDS: Final = 1.0  # for others to have looked at a lock
_NEW_SECONDS: Final = 60.0  # a directory in the making has its lock long before
_STATE_MAX: Final = 1 << 20
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # as the agent has it


def check_identifier(identifier: str) -> str:
    """A container's name as the file system and the agent take it. Raises ArgumentError."""
    if not _IDENTIFIER.fullmatch(identifier):
        raise ArgumentError(f"container {identifier[:40]!r}: expected 1 to 128 letters, digits, '_', '.', '-', the first no sign")
    return identifier


def state_root(path: str | os.PathLike[str] | None = None) -> Path:
    """The directory of all containers, made when it is missing: `path`, or $XDG_RUNTIME_DIR/csvfast/runtime, or
    /run/csvfast/runtime for root, or /tmp/csvfast-UID/runtime.

    Raises StateError unless it is this user's alone (mode 0700); OSError.
    """
    if path is not None:
        root = Path(path).absolute()
        root.parent.mkdir(parents=True, exist_ok=True)
        return _private(root)
    user = os.geteuid()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        parent = Path(base) / "csvfast"
    elif user == 0 and os.access("/run", os.W_OK):
        parent = Path("/run/csvfast")
    else:
        parent = Path(f"/tmp/csvfast-{user}")  # noqa: S108  (checked by _private)
    return _private(_private(parent) / "runtime")


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StateError(f"{path}: expected a directory of this user with mode 0700")
    return path


class ContainerDirectory:
    """The directory of one container, held by its monitor.

    In: transient   True: nobody will ask for its state once its monitor is gone; the next command that looks removes it
    Attributes: identifier, path; work: the executor's private directory, empty.
    Raises: ArgumentError (identifier), ContainerError("state"): there is a container of this name; OSError.
    """

    def __init__(self, identifier: str, root: Path, *, transient: bool = False) -> None:
        self.identifier = check_identifier(identifier)
        self.path = root / identifier
        self.work = self.path / WORK
        self._transient = transient
        clean(root)
        # Made under another name and renamed with the lock held: whoever finds it by its name finds it locked.
        new = root / f"{_NEW}{secrets.token_hex(8)}"
        new.mkdir(mode=0o700)
        self._lock = -1
        try:
            (new / WORK).mkdir(mode=0o700)
            self._lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(new, self._record({"ociVersion": OCI_VERSION, "id": identifier, "status": "creating", "bundle": ""}))
            try:
                new.rename(self.path)
            except OSError:
                if self.path.exists():
                    raise ContainerError("state", f"a container {identifier} is there already") from None
                raise
        except BaseException:
            if self._lock >= 0:
                os.close(self._lock)
            shutil.rmtree(new, ignore_errors=True)
            raise

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces state.json as a whole. A directory that was removed meanwhile stays removed."""
        with suppress(FileNotFoundError):
            _write(self.path, self._record(state))

    def _record(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {**state, "csvfast": {**state.get("csvfast", {}), "transient": self._transient}}

    def release(self) -> None:
        """The monitor is done with it: the executor's files go, the state stays for those who ask. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.work, ignore_errors=True)
            if self._transient:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """The container is gone. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / _STATE, json.dumps(record, indent=2).encode() + b"\n")


def _dead(path: Path) -> bool:
    """Whether no monitor holds a container's lock. Those who ask share it, and are no monitors to each other."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """True: nobody else removes this directory meanwhile, nor is it a new container's of the same name. False: it lives."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield True
        return
    try:
        end = time.monotonic() + _ASKING_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    yield False
                    return
                time.sleep(0.001)  # somebody asks for its state, or removes it
        try:
            same = os.path.samestat(os.fstat(lock), (path / _LOCK).lstat())
        except OSError:
            same = False
        yield same
    finally:
        os.close(lock)


def read_state(root: Path, identifier: str) -> tuple[dict[str, Any], bool]:
    """A container's state, and whether its monitor lives. Raises ContainerError("state"): no such container, or it is damaged."""
    path = root / check_identifier(identifier)
    alive = not _dead(path)
    try:
        with (path / _STATE).open("rb") as file:
            record: Any = json.loads(file.read(_STATE_MAX))
    except (FileNotFoundError, NotADirectoryError):
        raise ContainerError("state", f"there is no container {identifier}") from None
    except ValueError as problem:
        raise ContainerError("state", f"{path / _STATE}: no JSON ({problem})") from None
    if not isinstance(record, dict) or record.get("id") != identifier:
        raise ContainerError("state", f"{path / _STATE}: expected the state of container {identifier}")
    if not alive and record.get("status") != "stopped":
        record["status"] = "stopped"
        record.pop("pid", None)
    return record, alive


def remove(root: Path, identifier: str) -> None:
    """Removes what a dead monitor left. Raises ContainerError("state"): it lives."""
    path = root / check_identifier(identifier)
    with _claimed(path) as claimed:
        if claimed:
            shutil.rmtree(path, ignore_errors=True)
        elif not _dead(path):
            raise ContainerError("state", f"container {identifier} has a monitor that lives")


def identifiers(root: Path) -> Iterator[str]:
    """Names of the containers, in order."""
    for path in sorted(root.iterdir()):
        if _IDENTIFIER.fullmatch(path.name) and (path / _STATE).is_file():
            yield path.name


def clean(root: Path) -> None:
    """Removes what dead monitors left and nobody will ask for."""
    for path in list(root.iterdir()):
        with suppress(OSError):
            if path.name.startswith(_NEW):
                if time.time() - path.lstat().st_mtime > _NEW_SECONDS and _dead(path):
                    shutil.rmtree(path, ignore_errors=True)
            elif _dead(path):
                with _claimed(path) as claimed:
                    if claimed:
                        _clean_one(path)


def _clean_one(path: Path) -> None:
    if (path / WORK).exists():
        if (path / WORK / RUNTIME_STATE).exists():
            from csvfast.runtime.agent.containers_native import remove_remains

            remove_remains(path / WORK)
        shutil.rmtree(path / WORK, ignore_errors=True)
    with suppress(ValueError, AttributeError):
        if json.loads((path / _STATE).read_bytes()).get("csvfast", {}).get("transient"):
            shutil.rmtree(path, ignore_errors=True)
