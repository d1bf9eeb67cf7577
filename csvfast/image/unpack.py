"""Layers become a tree: image-spec layer.md, and the same tree that umoci makes of them.

What is refused: names that leave the root, anything below what is no directory, hard links to what is not there, device nodes
unless they are allowed, attributes that change how an overlay or a store of ours reads the tree, everything beyond the limits.
Source for what the specification leaves open: github.com/opencontainers/umoci, oci/layer/tar_extract.go.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from csvfast.errors import ImageError, IntegrityError
from csvfast.image.archive import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, HARD_LINK, SYMLINK, Archive, Entry
from csvfast.image.compression import Readable, UncompressedLayer, decompress
from csvfast.image.limits import DEFAULT_LIMITS, Budget, Limits, shown
from csvfast.image.tree import ContentStore, ContentWriter, Metadata, Node, RootDirectory

__all__ = ["ContentStore", "ContentWriter", "LayerResult", "RootDirectory", "clean_name", "unpack_layer"]

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ZEROS: Final = bytes(1 << 20)
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
# Attributes that belong to the machine and not to the image; umoci leaves them out, too.
_SKIPPED_XATTRS: Final = frozenset(
    (b"security.selinux", b"security.ima", b"security.evm", b"system.nfs4_acl", b"system.cifs_acl", b"user.rootlesscontainers")
)
_REFUSED_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.", b"user.csvfast.", b"trusted.csvfast.")


class LayerResult(NamedTuple):
    """diff_id: digest of the archive. entries: in it. size: its bytes."""

    diff_id: str
    entries: int
    size: int


def clean_name(name: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """An entry's name relative to the root, without empty parts, "." and ".."; b"" for the root.

    A slash at the beginning means the root of the tree. Raises ImageError for a name that climbs out of it, and for what is no
    name: empty, too long, with a NUL.
    """
    if not name or b"\0" in name:
        raise ImageError(shown(name) or "entry", "no name, or a NUL in it")
    if len(name) > limits.path_bytes:
        raise ImageError(shown(name), f"a name of {len(name)} bytes; the limit is {limits.path_bytes}")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not parts:
                raise ImageError(shown(name), "the name leaves the root directory")
            parts.pop()
        else:
            if len(part) > limits.name_bytes:
                raise ImageError(shown(name), f"a part of {len(part)} bytes; the limit is {limits.name_bytes}")
            parts.append(part)
    if len(parts) > limits.depth:
        raise ImageError(shown(name), f"more than {limits.depth} directories within each other")
    return b"/".join(parts)


def unpack_layer(
    reader: Readable | UncompressedLayer,
    root: RootDirectory,
    limits: Limits | Budget = DEFAULT_LIMITS,
    *,
    media_type: str = "none",
    diff_id: str | None = None,
    progress: Callable[[int], None] | None = None,
    ahead: bool | None = None,
) -> LayerResult:
    """Applies a layer to a tree.

    In: reader       the layer's clear bytes
        root         holds what the layers below have made. Modes and times of directories are set by its finish().
        limits       a Budget when several layers share them
        media_type   of the layer, or "none", "gzip", "zstd"
        diff_id      what the archive's digest has to be
        progress     is called now and then with the archive's bytes so far; what it raises ends the work
        ahead        as `decompress` has it
    Raises ImageError, naming the entry; the tree is then incomplete and has to be removed by the caller.
    """
    budget = Budget(limits) if isinstance(limits, Limits) else limits
    layer = reader if isinstance(reader, UncompressedLayer) else decompress(reader, media_type, budget, ahead=ahead)
    with layer:
        root.begin_layer()
        work = _Layer(layer, root, budget, progress)
        work.run()
        found = layer.finish()
    if diff_id is not None and found != diff_id:
        raise IntegrityError("layer", f"the archive's digest is {found}, the image configuration says {diff_id}")
    return LayerResult(found, work.count, layer.size)


class _Layer:
    """One layer on its way into the tree."""

    def __init__(
        self, layer: UncompressedLayer, root: RootDirectory, budget: Budget, progress: Callable[[int], None] | None
    ) -> None:
        self.layer, self.root, self.limits, self.progress = layer, root, budget.limits, progress
        self.count = 0
        self._archive = Archive(layer.next_chunk if progress is None else self._next_chunk, budget)
        self._made = os.geteuid(), os.getegid()  # owner of what is new
        self._make: dict[bytes, Callable[[Entry, Node, bytes], None]] = {
            FILE: self._file, HARD_LINK: self._hard_link, SYMLINK: self._symlink, DIRECTORY: self._directory,
            CHARACTER: self._special, BLOCK: self._special, FIFO: self._special,
        }  # fmt: skip

    def _next_chunk(self) -> bytes:
        chunk = self.layer.next_chunk()
        if self.progress is not None:
            self.progress(self.layer.size)
        return chunk

    def run(self) -> None:
        archive = self._archive
        while (entry := archive.next()) is not None:
            self.count += 1
            try:
                self._apply(entry)
            except OSError as error:
                raise ImageError(shown(entry.name), _reason(error)) from error
            except ValueError as error:
                if isinstance(error, ImageError):
                    raise
                raise ImageError(shown(entry.name), str(error)) from error

    def _apply(self, entry: Entry) -> None:
        root = self.root
        path = clean_name(entry.name, self.limits)
        if not path:
            self._root(entry)
            return
        head, _slash, name = path.rpartition(b"/")
        if b".wh." in path and self._whiteout(entry, head, name):
            return
        parent = root.directory(head, create=True)
        assert parent is not None
        self._make[entry.kind](entry, parent, name)
        root.mark(parent, name)

    def _root(self, entry: Entry) -> None:
        if entry.kind != DIRECTORY:
            raise ImageError(shown(entry.name), "the root would be something else than a directory")
        node = self.root.node
        node.metadata = _directory_metadata(entry)
        self._replace_xattrs(self.root.descriptor(node), entry)

    def _whiteout(self, entry: Entry, head: bytes, name: bytes) -> bool:
        """Works off a whiteout; False when the entry is none."""
        if any(part.startswith(_WHITEOUT) for part in head.split(b"/")):
            raise ImageError(shown(entry.name), "lies below a whiteout")
        if not name.startswith(_WHITEOUT):
            return False
        hidden = name[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise ImageError(shown(entry.name), "a whiteout of nothing")
        if hidden.startswith(_WHITEOUT) and name != _OPAQUE:
            return True  # aufs keeps notes of its own under such names
        parent = self.root.directory(head, create=False)
        if parent is None:
            return True
        if name == _OPAQUE:
            self.root.hide_lower(parent)
        else:
            self.root.hide(parent, hidden)
        return True

    # Kinds of entries

    def _file(self, entry: Entry, parent: Node, name: bytes) -> None:
        above = self.root.descriptor(parent)
        store = self.root.content
        if store is not None:
            self._stored_file(store, entry, parent, name)
            return
        try:
            descriptor = os.open(name, _CREATE, 0o600, dir_fd=above)
        except FileExistsError:
            self.root.remove(parent, name)
            descriptor = os.open(name, _CREATE, 0o600, dir_fd=self.root.descriptor(parent))
        try:
            if entry.sparse is None:
                piece = self._archive.piece
                while data := piece():
                    done = os.write(descriptor, data)
                    while done < len(data):
                        done += os.write(descriptor, data[done:])
            else:
                self._write_sparse(descriptor, entry)
            self._metadata(descriptor, entry)
        finally:
            os.close(descriptor)

    def _write_sparse(self, descriptor: int, entry: Entry) -> None:
        for start, length in entry.sparse or ():
            end = start + length
            while start < end:
                # A piece of the archive may reach over several pieces of the file.
                start += self._write_at(descriptor, start, end - start)
        os.ftruncate(descriptor, entry.size)

    def _write_at(self, descriptor: int, start: int, length: int) -> int:
        data = self._archive.piece(length)
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], start + done)
        return done

    def _stored_file(self, store: ContentStore, entry: Entry, parent: Node, name: bytes) -> None:
        above = self.root.descriptor(parent)
        try:
            writer = store.create(above, name, 0o600)
        except FileExistsError:
            self.root.remove(parent, name)
            above = self.root.descriptor(parent)
            writer = store.create(above, name, 0o600)
        try:
            at = 0
            for start, length in [(0, entry.size)] if entry.sparse is None else [*entry.sparse, (entry.size, 0)]:
                while at < start:
                    zeros = min(start - at, len(_ZEROS))
                    writer.write(memoryview(_ZEROS)[:zeros])
                    at += zeros
                while at < start + length:
                    data = self._archive.piece(start + length - at)
                    writer.write(data)
                    at += len(data)
        finally:
            writer.close()
        descriptor = os.open(name, _HANDLE, dir_fd=above)
        try:
            self._metadata(descriptor, entry)
        finally:
            os.close(descriptor)

    def _directory(self, entry: Entry, parent: Node, name: bytes) -> None:
        root = self.root
        path = parent.path
        child = parent.children.get(name)
        if child is None:
            above = root.descriptor(parent)
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                    child = root.directory(path + b"/" + name if path else name, create=False)
                else:
                    root.remove(parent, name)
        if child is None:
            child = root.make_directory(parent, name, _directory_metadata(entry))
            if entry.xattrs:
                self._set_xattrs(root.descriptor(child), entry)
        else:
            child.metadata = _directory_metadata(entry)
            self._replace_xattrs(root.descriptor(child), entry)

    def _symlink(self, entry: Entry, parent: Node, name: bytes) -> None:
        target = entry.link
        if not target or b"\0" in target or len(target) > self.limits.link_bytes:
            what = f"to a target of {len(target)} bytes, or with a NUL in it; expected 1 to {self.limits.link_bytes} bytes"
            raise ImageError(shown(entry.name), f"a symbolic link {what}")
        above = self.root.descriptor(parent)
        try:
            os.symlink(target, name, dir_fd=above)
        except FileExistsError:
            self.root.remove(parent, name)
            above = self.root.descriptor(parent)
            os.symlink(target, name, dir_fd=above)
        if self.root.owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=above, follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(f"/proc/self/fd/{above}/".encode() + name, entry)
        os.utime(name, ns=_times(entry), dir_fd=above, follow_symlinks=False)

    def _hard_link(self, entry: Entry, parent: Node, name: bytes) -> None:
        root, shown_target = self.root, shown(entry.link)
        head, _slash, last = clean_name(entry.link, self.limits).rpartition(b"/")
        source = root.directory(head, create=False) if last else None
        try:
            if source is None:
                raise FileNotFoundError
            status = os.stat(last, dir_fd=root.descriptor(source), follow_symlinks=False)
        except FileNotFoundError:
            raise ImageError(shown(entry.name), f"a hard link to {shown_target!r}, which is not there") from None
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(shown(entry.name), f"a hard link to {shown_target!r}, which is a directory")
        if source is parent and last == name:
            raise ImageError(shown(entry.name), "a hard link to itself")
        for attempt in range(2):
            try:
                from_fd, to_fd = root.descriptor(source), root.descriptor(parent)
                os.link(last, name, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)
                return
            except FileExistsError:
                if attempt:
                    raise
                if self._holds(parent, name, source):
                    what = f"a hard link in the place of the directory that holds its target {shown_target!r}"
                    raise ImageError(shown(entry.name), what) from None
                root.remove(parent, name)

    @staticmethod
    def _holds(parent: Node, name: bytes, node: Node | None) -> bool:
        """Whether `name` in `parent` is the directory `node`, or one above it."""
        while node is not None:
            if node.parent is parent and node.name == name:
                return True
            node = node.parent
        return False

    def _special(self, entry: Entry, parent: Node, name: bytes) -> None:
        kind = {FIFO: stat.S_IFIFO, CHARACTER: stat.S_IFCHR, BLOCK: stat.S_IFBLK}[entry.kind]
        device = 0
        if entry.kind != FIFO:
            major, minor = entry.device
            if not self.root.devices:
                raise ImageError(shown(entry.name), f"a device node ({major}:{minor}); they are not allowed")
            if not 0 <= major < 1 << 12 or not 0 <= minor < 1 << 20:
                raise ImageError(shown(entry.name), f"device {major}:{minor}; Linux has 12 bits and 20")
            if (major, minor) == (0, 0):
                raise ImageError(shown(entry.name), "device 0:0, which means a whiteout to overlays")
            device = os.makedev(major, minor)
        above = self.root.descriptor(parent)
        try:
            os.mknod(name, kind | 0o600, device, dir_fd=above)
        except FileExistsError:
            self.root.remove(parent, name)
            above = self.root.descriptor(parent)
            os.mknod(name, kind | 0o600, device, dir_fd=above)
        # Opening a device does things; a descriptor that is only a place does not.
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            self._metadata(f"/proc/self/fd/{descriptor}".encode(), entry)
        finally:
            os.close(descriptor)

    # Attributes

    def _metadata(self, file: int | bytes, entry: Entry) -> None:
        """Owner, then mode (a new owner takes set-user-ID away), then attributes (and capabilities), then times."""
        if self.root.owners and (entry.uid, entry.gid) != self._made:
            os.chown(file, entry.uid, entry.gid)
        os.chmod(file, entry.mode)
        if entry.xattrs:
            self._set_xattrs(file, entry)
        os.utime(file, ns=_times(entry))

    def _set_xattrs(self, file: int | bytes, entry: Entry) -> None:
        follow = isinstance(file, int) or entry.kind != SYMLINK
        for name, value in entry.xattrs.items():
            if name in _SKIPPED_XATTRS:
                continue
            if name.startswith(_REFUSED_XATTRS) or b"\0" in name:
                raise ImageError(shown(entry.name), f"the extended attribute {shown(name)}, which is not an image's to set")
            try:
                os.setxattr(file, name, value, follow_symlinks=follow)
            except OSError as error:
                unknown = error.errno == errno.ENOTSUP
                if not unknown and (self.root.owners or error.errno not in (errno.EPERM, errno.EACCES)):
                    raise ImageError(shown(entry.name), f"extended attribute {shown(name)}: {_reason(error)}") from error
                why = "the file system has none" if unknown else "only root may set them"
                self.root.note(f"extended attributes {shown(name.partition(b'.')[0])}.* were left out: {why}")

    def _replace_xattrs(self, descriptor: int, entry: Entry) -> None:
        """A directory that was there: its attributes become the entry's."""
        with suppress(OSError):
            for text in os.listxattr(descriptor):
                if os.fsencode(text) not in _SKIPPED_XATTRS:
                    with suppress(OSError):
                        os.removexattr(descriptor, text)
        self._set_xattrs(descriptor, entry)


def _times(entry: Entry) -> tuple[int, int]:
    return (entry.mtime if entry.atime is None else entry.atime), entry.mtime


def _directory_metadata(entry: Entry) -> Metadata:
    return Metadata(entry.mode, entry.uid, entry.gid, *_times(entry))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
