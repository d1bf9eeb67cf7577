"""The archive that Linux unpacks as its first file system: cpio in the "newc" format, the same bytes for the same content.

Entries stand in the order of their paths, every folder before what lies in it; inode numbers count from 1; owner and group are
root, times are 0. Nothing of the machine that builds the archive gets into it.

Source: torvalds/linux Documentation/driver-api/early-userspace/buffer-format.rst. Thread-safety: one builder, one thread.
"""

from __future__ import annotations

import posixpath
import stat
from typing import Final, NamedTuple

from csvfast.errors import ArgumentError

__all__ = ["CpioArchive"]

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_FILE_MAX: Final = 0xFFFFFFFF


class _Entry(NamedTuple):
    mode: int
    data: bytes
    device: tuple[int, int]


class CpioArchive:
    """Files, folders, links and device nodes by their path in the archive."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, path: str) -> bool:
        return _clean(path) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def paths(self) -> list[str]:
        """Every path, in the archive's order."""
        return sorted(self._entries, key=str.encode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file. ArgumentError: the path is taken by something else, or leads out of the archive."""
        if len(data) > _FILE_MAX:
            raise ArgumentError(f"{path}: {len(data)} bytes; expected less than 4 GiB, as the format allows")
        self._add(path, _Entry(stat.S_IFREG | mode, bytes(data), (0, 0)))

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        if not target or "\0" in target:
            raise ArgumentError(f"{path}: link to {target!r}; expected a path")
        self._add(path, _Entry(stat.S_IFLNK | 0o777, target.encode(), (0, 0)))

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder; one that is there already gets the mode."""
        name = _clean(path)
        found = self._entries.get(name)
        if found is not None and not stat.S_ISDIR(found.mode):
            raise ArgumentError(f"{path}: the archive has a file of that name; expected a folder")
        self._parents(name)
        self._entries[name] = _Entry(stat.S_IFDIR | mode, b"", (0, 0))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A node of a character device."""
        self._add(path, _Entry(stat.S_IFCHR | mode, b"", (major, minor)))

    def encode(self) -> bytes:
        """The archive, padded to a multiple of 512 bytes."""
        parts: list[bytes] = []
        for inode, name in enumerate(self.paths(), 1):
            parts.append(_encode(inode, name, self._entries[name]))
        parts.append(_encode(0, _TRAILER, _Entry(0, b"", (0, 0))))
        whole = b"".join(parts)
        return whole + bytes(-len(whole) % 512)

    def _add(self, path: str, entry: _Entry) -> None:
        name = _clean(path)
        found = self._entries.get(name)
        if found is not None and found != entry:
            raise ArgumentError(f"{path}: the archive has another entry of that name")
        self._parents(name)
        self._entries[name] = entry

    def _parents(self, name: str) -> None:
        parent = posixpath.dirname(name)
        while parent:
            found = self._entries.setdefault(parent, _Entry(stat.S_IFDIR | 0o755, b"", (0, 0)))
            if not stat.S_ISDIR(found.mode):
                raise ArgumentError(f"{name}: {parent} is no folder in the archive")
            parent = posixpath.dirname(parent)


def _clean(path: str) -> str:
    """Without the first slash. A path that could leave the archive is refused."""
    name = path.removeprefix("/")
    if not name or "\0" in name or posixpath.normpath(name) != name or name.split("/")[0] == ".." or name == _TRAILER:
        raise ArgumentError(f"{path!r} as a path in the archive; expected a plain path such as /etc/name")
    return name


def _encode(inode: int, name: str, entry: _Entry) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, time, size, device of the file system, device of the node, length of the name, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(path), 0)
    header = _MAGIC + b"".join(b"%08x" % value for value in fields) + path
    return header + bytes(-len(header) % 4) + entry.data + bytes(-len(entry.data) % 4)
