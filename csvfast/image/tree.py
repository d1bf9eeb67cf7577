"""A directory tree that strangers' names are looked up in: nothing outside it is ever reached.

Each directory on the way is opened by itself, relative to the one before, with O_NOFOLLOW; symbolic links are read and followed
here, with the tree's root as "/" and as the parent of itself. That is what openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS |
RESOLVE_NO_XDEV) does, and it holds against names that change meanwhile; as it needs no particular kernel it is the only way here.
Directories once met are remembered as a tree of nodes, so that a file costs no walk.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from csvfast.errors import ImageError
from csvfast.image.limits import DEFAULT_LIMITS, Limits, shown

__all__ = ["ContentStore", "ContentWriter", "Metadata", "Node", "RootDirectory", "remove_tree"]

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINK_LIMIT: Final = 40  # as the kernel has it
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ContentWriter(Protocol):
    """Takes a new file's bytes, from its beginning on."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Takes all of `data`."""

    def close(self) -> None:
        """The file is complete; afterwards its owner, mode and times are set."""


class ContentStore(Protocol):
    """Keeps the contents of regular files in a form of its own (as ciphertext, say), in files of the real tree."""

    def create(self, parent_fd: int, name: bytes, mode: int) -> ContentWriter:
        """A new file `name` in the directory `parent_fd`. Raises FileExistsError when the name is taken; never follows a link."""


class Metadata(NamedTuple):
    """What a directory gets at the end, when nothing changes within it any more. Times in nanoseconds."""

    mode: int
    uid: int
    gid: int
    atime: int
    mtime: int


IMPLICIT: Final = Metadata(0o755, 0, 0, 0, 0)


class Node:
    """A directory of the tree."""

    __slots__ = ("children", "depth", "fd", "layer", "metadata", "name", "parent", "upper")

    depth: int

    def __init__(self, name: bytes, parent: Node | None, metadata: Metadata) -> None:
        self.name, self.parent, self.metadata = name, parent, metadata
        self.children: dict[bytes, Node] = {}
        self.depth = 0 if parent is None else parent.depth + 1
        self.fd = -1
        self.layer = -1  # the layer that `upper` is of
        self.upper: set[bytes] = set()  # names in here that this layer made, or made something below

    @property
    def path(self) -> bytes:
        """From the root, without a slash before it; b"" for the root."""
        parts: list[bytes] = []
        node = self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))


class RootDirectory:
    """The root of a tree that layers are unpacked into. Use as a context manager; one thread at a time.

    In: path      an existing directory. An empty one begins as 0755, owned by root, with times at the epoch, as umoci does it.
        owners    set owners as the archives say; False ("rootless"): everything belongs to the caller.
                  Default: whether the caller is root.
        devices   make device nodes; otherwise an archive with one is refused
        content   where contents of files go. Default: plain files.

    While it is open directories are 0700; modes, owners and times of directories are set by finish(), which the end of a `with`
    block without an exception calls. Raises OSError, and ImageError for names that cannot be.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        owners: bool | None = None,
        devices: bool = False,
        content: ContentStore | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.owners = os.geteuid() == 0 if owners is None else owners
        self.devices, self.content, self.limits = devices, content, limits
        self.layer = -1  # counts layers; -1 before the first
        self._made = 0  # directories: an entry may make a hundred on its way
        self.notes: list[str] = []  # what could not be done and was left out, at most 100 lines
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            self.fresh = not os.listdir(descriptor)  # noqa: PTH208 -- of a descriptor
        except BaseException:
            os.close(descriptor)
            raise
        self._device = status.st_dev
        self.node = Node(b"", None, IMPLICIT if self.fresh else _metadata(status))
        self.node.fd = descriptor
        # Enough for two paths of the greatest depth, so that two directories can be held open at the same time.
        self._capacity = 2 * limits.depth + 16
        self._open: OrderedDict[Node, None] = OrderedDict()  # without the root, which stays open
        self._last: tuple[bytes, Node] | None = None
        self._root = os.geteuid() == 0

    def __enter__(self) -> RootDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Closes all descriptors. Again: no effect."""
        for node in self._open:
            os.close(node.fd)
            node.fd = -1
        self._open.clear()
        self._last = None
        if self.node.fd >= 0:
            os.close(self.node.fd)
            self.node.fd = -1

    def note(self, text: str) -> None:
        """Keeps a line about something left out."""
        if len(self.notes) < 100 and text not in self.notes:
            self.notes.append(text)

    def begin_layer(self) -> None:
        """From here on, what is made belongs to the next layer."""
        self.layer += 1

    # Looking up

    def descriptor(self, node: Node) -> int:
        """A descriptor of the directory, owned by this object. It stays open at least until two others have been asked for."""
        if node.fd >= 0:
            if node.parent is not None:
                self._open.move_to_end(node)
            return node.fd
        chain = [node]
        while (above := chain[-1].parent) is not None and above.fd < 0:
            chain.append(above)
        for one in reversed(chain):
            assert one.parent is not None, "the root directory is closed"
            self._keep(one, os.open(one.name, _OPEN_DIRECTORY, dir_fd=one.parent.fd))
        return node.fd

    def directory(self, path: bytes, *, create: bool) -> Node | None:
        """The directory that a path means, its symbolic links followed within the tree.

        In: path     relative to the root; "." and ".." and empty parts are taken as the kernel takes them, ".." of the root as it
            create   make missing directories; otherwise None is the answer for a missing one
        Raises ImageError when something on the way is no directory, for links in circles, and beyond the limit of depth.
        """
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        node, links = self.node, 0
        pending = path.split(b"/")[::-1]
        while pending:
            name = pending.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                node = node.parent or node
                continue
            child = node.children.get(name)
            if child is None:
                found = self._enter(node, name)
                if isinstance(found, bytes):
                    links += 1
                    if links > _LINK_LIMIT:
                        raise ImageError(shown(path), f"more than {_LINK_LIMIT} symbolic links on the way")
                    if found[:1] == b"/":
                        node = self.node
                    pending += found.split(b"/")[::-1]
                    continue
                if found is None:
                    if not create:
                        return None
                    found = self.make_directory(node, name, IMPLICIT)
                child = found
            node = child
        self._last = path, node
        return node

    def _enter(self, parent: Node, name: bytes) -> Node | bytes | None:
        """What is there: a directory, a symbolic link's target, or nothing."""
        above = self.descriptor(parent)
        try:
            descriptor = os.open(name, _OPEN_DIRECTORY, dir_fd=above)
        except FileNotFoundError:
            return None
        except OSError:
            try:
                return os.readlink(name, dir_fd=above)
            except OSError:
                pass
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                raise
            raise ImageError(shown(_join(parent, name)), "is no directory, and something was to be below it") from None
        status = os.fstat(descriptor)
        if status.st_dev != self._device:
            os.close(descriptor)
            raise ImageError(shown(_join(parent, name)), "another file system is mounted there")
        if not self._root and status.st_mode & 0o700 != 0o700:
            # A directory of an earlier run that its owner may not write to; finish() sets the mode again.
            with suppress(PermissionError):
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode) | 0o700)
        node = self._node(parent, name, _metadata(status), descriptor)
        self._keep(node, descriptor)
        return node

    def _node(self, parent: Node, name: bytes, metadata: Metadata, descriptor: int = -1) -> Node:
        node = Node(name, parent, metadata)
        if node.depth > self.limits.depth:
            if descriptor >= 0:
                os.close(descriptor)
            raise ImageError(shown(_join(parent, name)), f"more than {self.limits.depth} directories within each other")
        parent.children[name] = node
        return node

    def _keep(self, node: Node, descriptor: int) -> None:
        node.fd = descriptor
        self._open[node] = None
        if len(self._open) > self._capacity:
            oldest, _nothing = self._open.popitem(last=False)
            os.close(oldest.fd)
            oldest.fd = -1

    # Changing

    def make_directory(self, parent: Node, name: bytes, metadata: Metadata) -> Node:
        """A new directory. Raises FileExistsError; ImageError: there have been too many."""
        self._made += 1
        if self._made > self.limits.entries:
            raise ImageError(shown(_join(parent, name)), f"the image has more than {self.limits.entries} directories")
        node = self._node(parent, name, metadata)
        try:
            os.mkdir(name, 0o700, dir_fd=self.descriptor(parent))
        except BaseException:
            del parent.children[name]
            raise
        self.mark(parent, name)
        return node

    def mark(self, parent: Node, name: bytes) -> None:
        """Remembers that the current layer made `name`, so that its own whiteouts do not remove it."""
        layer = self.layer
        if self.fresh and layer <= 0:
            return  # there is nothing below the first layer
        node: Node | None = parent
        while node is not None:
            if node.layer != layer:
                node.layer, node.upper = layer, {name}
            elif name in node.upper:
                return
            else:
                node.upper.add(name)
            name, node = node.name, node.parent

    def remove(self, parent: Node, name: bytes) -> None:
        """Removes whatever has the name, with everything below it. Nothing there: no effect."""
        above = self.descriptor(parent)
        child = parent.children.get(name)
        if child is None:
            try:
                status = os.stat(name, dir_fd=above, follow_symlinks=False)
            except FileNotFoundError:
                return
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=above)
                if stat.S_ISLNK(status.st_mode):
                    self._last = None  # a path through it means something else now
                return
        else:
            self._forget(child)
            del parent.children[name]
        self._last = None
        remove_tree(above, name)

    def hide_lower(self, node: Node) -> None:
        """Removes what lower layers have below a directory, and keeps what this layer made."""
        if self.fresh and self.layer <= 0:
            return
        pending = [node]
        while pending:
            one = pending.pop()
            kept = one.upper if one.layer == self.layer else ()
            for text in os.listdir(self.descriptor(one)):  # noqa: PTH208 -- of a descriptor
                name = os.fsencode(text)
                if name not in kept:
                    self.remove(one, name)
                elif name in one.children:
                    pending.append(one.children[name])

    def hide(self, parent: Node, name: bytes) -> None:
        """A whiteout: removes `name` of lower layers; what this layer made of it stays."""
        if self.fresh and self.layer <= 0:
            return
        if parent.layer != self.layer or name not in parent.upper:
            self.remove(parent, name)
        elif name in parent.children:
            self.hide_lower(parent.children[name])

    def _forget(self, node: Node) -> None:
        pending = [node]
        while pending:
            one = pending.pop()
            pending += one.children.values()
            if one.fd >= 0:
                del self._open[one]
                os.close(one.fd)
                one.fd = -1

    def finish(self) -> None:
        """Sets modes, owners and times of the directories, inner ones first. Raises OSError."""
        order: list[Node] = []
        pending = [self.node]
        while pending:
            one = pending.pop()
            order.append(one)
            pending += one.children.values()
        for node in reversed(order):
            metadata = node.metadata
            descriptor = self.descriptor(node)
            if self.owners:
                os.fchown(descriptor, metadata.uid, metadata.gid)
            os.fchmod(descriptor, metadata.mode)
            os.utime(descriptor, ns=(metadata.atime, metadata.mtime))
            if node.parent is not None:
                del self._open[node]
                os.close(node.fd)
                node.fd = -1
        self.node.children.clear()
        self._last = None

    # Reading

    def read_file(self, path: str, limit: int) -> bytes | None:
        """A regular file's bytes, links followed within the tree; None: not there, or no regular file.

        For contents as they are on disk: with a ContentStore these are not the file's own. Raises ImageError over `limit` bytes.
        """
        pending, links = os.fsencode(path), 0
        while True:
            head, _slash, name = pending.rpartition(b"/")
            if name in (b"", b".", b".."):
                return None
            parent = self.directory(head, create=False)
            if parent is None:
                return None
            above = self.descriptor(parent)
            try:
                target = os.readlink(name, dir_fd=above)
            except OSError:
                break
            links += 1
            if links > _LINK_LIMIT:
                raise ImageError(path, f"more than {_LINK_LIMIT} symbolic links on the way")
            pending = target if target[:1] == b"/" else _join(parent, target)
        try:
            descriptor = os.open(name, _READ, dir_fd=above)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            data = bytearray()
            while piece := os.read(descriptor, min(1 << 16, limit + 1 - len(data))):
                data += piece
        finally:
            os.close(descriptor)
        if len(data) > limit:
            raise ImageError(path, f"more than {limit} bytes")
        return bytes(data)


def remove_tree(parent_fd: int, name: bytes | str) -> None:
    """Removes a file or a directory with everything below it; links are not followed, other file systems not entered.

    Modes that keep the owner out are changed first. Nothing there: no effect. Raises OSError.
    """
    stack: list[tuple[int, bytes | str, list[str]]] = []
    device = os.fstat(parent_fd).st_dev

    def enter(above: int, one: bytes | str) -> None:
        try:
            descriptor = os.open(one, _OPEN_DIRECTORY, dir_fd=above)
        except PermissionError:
            handle = os.open(one, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
            try:
                os.chmod(f"/proc/self/fd/{handle}", 0o700)
            finally:
                os.close(handle)
            descriptor = os.open(one, _OPEN_DIRECTORY, dir_fd=above)
        try:
            status = os.fstat(descriptor)
            if status.st_dev != device:
                raise OSError(18, "another file system is mounted there", os.fsdecode(one))
            if status.st_mode & 0o700 != 0o700:
                os.fchmod(descriptor, 0o700)
            stack.append((descriptor, one, os.listdir(descriptor)))  # noqa: PTH208 -- of a descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def leaf(above: int, one: bytes | str) -> bool:
        """Removes what is no directory; False for a directory."""
        try:
            status = os.stat(one, dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return False
            os.unlink(one, dir_fd=above)
        except FileNotFoundError:
            pass
        return True

    try:
        if leaf(parent_fd, name):
            return
        enter(parent_fd, name)
        while stack:
            descriptor, one, children = stack[-1]
            if children:
                child = children.pop()
                if not leaf(descriptor, child):
                    enter(descriptor, child)
                continue
            os.close(descriptor)
            stack.pop()
            os.rmdir(one, dir_fd=stack[-1][0] if stack else parent_fd)
    finally:
        for descriptor, _one, _children in stack:
            os.close(descriptor)


def _metadata(status: os.stat_result) -> Metadata:
    return Metadata(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_atime_ns, status.st_mtime_ns)


def _join(parent: Node, name: bytes) -> bytes:
    path = parent.path
    return path + b"/" + name if path else name
