"""What an image may ask of the machine that unpacks it, and the account that is kept of it."""

from __future__ import annotations

from dataclasses import dataclass

from csvfast.errors import ImageError

__all__ = ["DEFAULT_LIMITS", "Budget", "Limits", "shown"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one image. All counts are for the image as a whole unless they say "each".

    entries         archive entries, whiteouts included; and directories, as those on the way to an entry need none of their own
    total_bytes     sum of the files' logical sizes (holes of sparse files count), and of the bytes that come out of decompression
    file_bytes      logical size, each file
    ratio           bytes out of decompression for each byte in, each layer; not looked at before `ratio_floor` bytes are out
    ratio_floor     bytes
    path_bytes      length of a name, each entry
    depth           directories above a file, each entry
    name_bytes      length of a path's component, each
    link_bytes      length of a symbolic link's target, each
    header_bytes    PAX header, GNU long name or sparse map, each
    xattr_count     extended attributes, each entry
    xattr_bytes     names and values of an entry's extended attributes together, each entry
    sparse_parts    pieces of a sparse file, each
    zstd_window     bytes of window that a zstd frame may ask for, each
    config_bytes    image configuration
    layers          layers
    """

    entries: int = 2_000_000
    total_bytes: int = 64 << 30
    file_bytes: int = 32 << 30
    ratio: int = 256
    ratio_floor: int = 64 * MIB
    path_bytes: int = 4095
    depth: int = 128
    name_bytes: int = 255
    link_bytes: int = 4095
    header_bytes: int = MIB
    xattr_count: int = 128
    xattr_bytes: int = 128 << 10
    sparse_parts: int = 65_536
    zstd_window: int = 32 * MIB
    config_bytes: int = 4 * MIB
    layers: int = 512

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected a positive number")


DEFAULT_LIMITS = Limits()


class Budget:
    """What has been used of the limits, over all layers of an image. One thread at a time for `entry`, another for `produced`."""

    __slots__ = ("entries", "file_bytes", "limits", "produced_bytes")

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.entries = self.file_bytes = self.produced_bytes = 0

    def entry(self, name: bytes, size: int) -> None:
        """Counts an archive entry with `size` logical bytes. Raises ImageError over the limit."""
        limits = self.limits
        self.entries += 1
        self.file_bytes += size
        if self.entries > limits.entries:
            raise ImageError(shown(name), f"the image has more than {limits.entries} entries")
        if size > limits.file_bytes:
            raise ImageError(shown(name), f"a file of {size} bytes; the limit is {limits.file_bytes}")
        if self.file_bytes > limits.total_bytes:
            raise ImageError(shown(name), f"the image's files have more than {limits.total_bytes} bytes")

    def produced(self, count: int) -> None:
        """Counts bytes that came out of decompression. Raises ImageError over the limit."""
        self.produced_bytes += count
        # Archives add headers and padding to the files' bytes; whoever sets a limit thinks of the files.
        if self.produced_bytes > self.limits.total_bytes + self.limits.total_bytes // 8 + MIB:
            raise ImageError("layers", f"more than {self.limits.total_bytes} bytes after decompression")


def shown(name: bytes, length: int = 200) -> str:
    """A name from an archive for a message: printable, one line, at most about `length` characters."""
    text = name[: length + 1].decode("utf-8", "backslashreplace")
    text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text if len(name) <= length else f"{text[:length]}..."
