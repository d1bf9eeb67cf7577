"""The content of virtual disks: what a virtual machine reads from a qcow2 image; raw images and ISOs are their own content.

Read: versions 2 and 3, zero clusters, clusters compressed with deflate or (extra "zstd") zstd, images left dirty. Refused: a
backing file or an external data file (an image must not decide which other files are read), encryption, subclusters, images
marked corrupt, other formats (VMDK, VHDX, VHD, QED, LUKS). Internal snapshots are not looked at. Everything in the image is
untrusted: every offset and length is checked, memory does not depend on what the header says beyond TABLES_MAX_BYTES, and disks
larger than DISK_MAX_BYTES, which a few bytes can claim, are refused.

Source: QEMU docs/interop/qcow2.txt (the format; https://gitlab.com/qemu-project/qemu).
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from csvfast._extras import need
from csvfast.measure.errors import FormatError
from csvfast.measure.fleet.providers import Readable
from csvfast.measure.fleet.rows import Identity

__all__ = ["DISK_MAX_BYTES", "Qcow2", "open_disk"]

DISK_MAX_BYTES: Final = 64 << 40
TABLES_MAX_BYTES: Final = 32 << 20
CACHE_BYTES: Final = 8 << 20

_MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER3: Final = struct.Struct(">QQQII")
_ENTRY: Final = struct.Struct(">Q")
_OFFSET: Final = 0x00FFFFFFFFFFFE00
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_RESERVED: Final = ~(_OFFSET | 1 << 63 | _COMPRESSED | _ZERO) & (1 << 64) - 1

_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _SUBCLUSTERS = (1 << bit for bit in range(5))
_OTHERS: Final = (
    (0, b"KDMV", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"QED\0", "QED"),
    (0, b"QFI", "qcow"),
    (0, b"LUKS\xba\xbe", "LUKS"),
)


def open_disk(base: Readable) -> Readable:
    """The disk in an image file: a Qcow2, or the file itself. Closing it closes the file. Raises FormatError, SourceError."""
    head = bytearray(min(64, base.size))
    base.read_at(memoryview(head), 0)
    if head.startswith(_MAGIC):
        return Qcow2(base)
    for offset, magic, name in _OTHERS:
        if head.startswith(magic, offset):
            raise FormatError(f"{base.path}: is a {name} image; expected qcow2 or raw: convert it, or measure it as a file")
    return base


class Qcow2:
    """The virtual disk of a qcow2 image, a Readable. Thread-safety: one thread."""

    path: str

    def __init__(self, base: Readable) -> None:
        self.path = base.path
        self._base = base
        self._inflate: Callable[[bytes], bytes] = self._deflate
        self._size, self._bits, table, entries = self._read_header()
        self._cluster = 1 << self._bits
        self._l2_entries = self._cluster // 8
        self._l1 = self._read(table, 8 * entries, "first-level table")
        self._tables: OrderedDict[int, bytes] = OrderedDict()
        self._unpacked: tuple[int, bytes] = (-1, b"")

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self._size

    @property
    def identity(self) -> Identity:
        """Of the image file."""
        return self._base.identity

    def check_unchanged(self) -> None:
        """Of the image file."""
        self._base.check_unchanged()

    def close(self) -> None:
        """Closes the image file."""
        self._base.close()

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fills the whole buffer; runs of clusters that lie one after the other in the file are read at once."""
        end = offset + len(buffer)
        if end > self._size:
            raise FormatError(f"{self.path}: byte {end} is read of a disk of {self._size} bytes")
        at = offset
        while at < end:
            entry, host = self._entry(at), -1
            stop = min(end, (at | (self._cluster - 1)) + 1)
            piece = buffer[at - offset : stop - offset]
            inside = at & (self._cluster - 1)
            if entry & _COMPRESSED:
                piece[:] = self._compressed(entry)[inside : inside + len(piece)]
            elif entry & _ZERO or not entry & _OFFSET:
                piece[:] = bytes(len(piece))
            else:
                host = (entry & _OFFSET) + inside
                while stop < end and self._entry(stop) & (_COMPRESSED | _ZERO | _OFFSET) == host + stop - at:
                    stop = min(end, stop + self._cluster)
                self._data(buffer[at - offset : stop - offset], host)
            at = stop

    def _data(self, piece: memoryview, host: int) -> None:
        """Clusters of the file. The last one may be cut off where nothing was ever written."""
        there = min(len(piece), self._base.size - host)
        if there <= 0 or len(piece) - there >= self._cluster:
            self._refuse(f"data at byte {host} of a file of {self._base.size} bytes", "clusters within the file")
        self._base.read_at(piece[:there], host)
        if there < len(piece):
            piece[there:] = bytes(len(piece) - there)

    def _entry(self, at: int) -> int:
        """The second-level entry of the cluster that holds a byte of the disk; 0: not allocated."""
        index, within = divmod(at >> self._bits, self._l2_entries)
        (first,) = _ENTRY.unpack_from(self._l1, 8 * index)
        if first & ~(_OFFSET | 1 << 63):
            self._refuse(f"first-level entry {index} is {first:#x}", "reserved bits zero")
        place = first & _OFFSET
        if place == 0:
            return 0
        table = self._tables.get(place)
        if table is None:
            if place & (self._cluster - 1):
                self._refuse(f"second-level table at byte {place}", f"a multiple of {self._cluster}")
            table = self._tables[place] = self._read(place, self._cluster, "second-level table")
            while len(self._tables) * self._cluster > CACHE_BYTES and len(self._tables) > 1:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(place)
        entry: int = _ENTRY.unpack_from(table, 8 * within)[0]
        if not entry & _COMPRESSED and (entry & _RESERVED or entry & _OFFSET & (self._cluster - 1)):
            self._refuse(f"entry of the cluster at byte {at} is {entry:#x}", f"reserved bits zero, a multiple of {self._cluster}")
        return entry

    def _compressed(self, entry: int) -> bytes:
        shift = 62 - (self._bits - 8)
        place = entry & ((1 << shift) - 1)
        if self._unpacked[0] == place:
            return self._unpacked[1]
        sectors = (entry & (_COMPRESSED - 1)) >> shift
        length = min((sectors + 1) * 512 - place % 512, self._base.size - place)
        if length <= 0:
            self._refuse(f"a compressed cluster at byte {place} of {self._base.size}", "clusters within the file")
        clear = self._inflate(self._read(place, length, "compressed cluster"))
        if len(clear) != self._cluster:
            self._refuse(f"a compressed cluster of {len(clear)} bytes", f"{self._cluster} bytes")
        self._unpacked = (place, clear)
        return clear

    def _deflate(self, data: bytes) -> bytes:
        try:
            return zlib.decompressobj(-15).decompress(data, self._cluster)
        except zlib.error as error:
            raise FormatError(f"{self.path}: qcow2: a compressed cluster cannot be read: {error}") from error

    def _zstd(self, data: bytes) -> bytes:
        import zstandard

        try:
            # The cluster's end is not marked, the sectors behind it hold other things.
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data, read_across_frames=False) as reader:
                return reader.read(self._cluster)
        except zstandard.ZstdError as error:
            raise FormatError(f"{self.path}: qcow2: a compressed cluster cannot be read: {error}") from error

    def _read(self, place: int, length: int, what: str) -> bytes:
        if place + length > self._base.size:
            self._refuse(f"{what} of {length} bytes at byte {place} of {self._base.size}", "tables within the file")
        data = bytearray(length)
        self._base.read_at(memoryview(data), place)
        return bytes(data)

    def _read_header(self) -> tuple[int, int, int, int]:
        if self._base.size < _HEADER.size:
            self._refuse(f"a file of {self._base.size} bytes", f"a header of {_HEADER.size} bytes")
        (
            _magic, version, backing, _, bits, size, crypt, l1_size, l1_offset, _, _, _, _,
        ) = _HEADER.unpack(self._read(0, _HEADER.size, "header"))  # fmt: skip
        if version not in (2, 3):
            self._refuse(f"version {version}", "version 2 or 3")
        if not 9 <= bits <= 21:
            self._refuse(f"clusters of 2^{bits} bytes", "2^9 to 2^21 bytes")
        if size > DISK_MAX_BYTES:
            self._refuse(f"a disk of {size} bytes", f"at most {DISK_MAX_BYTES} bytes")
        if crypt:
            self._refuse(f"encryption method {crypt}", "an image that is not encrypted")
        if backing:
            self._refuse("a backing file", "an image that stands alone: qemu-img convert makes one")
        if version == 3:
            self._read_features()
        covers = 1 << (2 * bits - 3)
        needed = -(-size // covers)
        if l1_size < needed or 8 * l1_size > TABLES_MAX_BYTES:
            most = TABLES_MAX_BYTES // 8
            self._refuse(f"a first-level table of {l1_size} entries", f"{needed} to {most} for a disk of {size} bytes")
        if l1_offset & ((1 << bits) - 1):
            self._refuse(f"first-level table at byte {l1_offset}", f"a multiple of {1 << bits}")
        return size, bits, l1_offset, needed

    def _read_features(self) -> None:
        raw = self._read(_HEADER.size, _HEADER3.size, "header of version 3")
        incompatible, _, _, refcount_order, header_length = _HEADER3.unpack(raw)
        if header_length < _HEADER.size + _HEADER3.size or header_length % 8 or refcount_order > 6:
            counts = f"reference counts of 2^{refcount_order} bits"
            self._refuse(f"a header of {header_length} bytes, {counts}", "104 bytes or more, up to 2^6 bits")
        for bit, what in ((_CORRUPT, "the mark of a corrupt image"), (_EXTERNAL, "an external data file"),
                          (_SUBCLUSTERS, "subclusters")):  # fmt: skip
            if incompatible & bit:
                self._refuse(what, "an image without: qemu-img convert makes one")
        if incompatible & ~(_DIRTY | _COMPRESSION):
            self._refuse(f"incompatible features {incompatible:#x}", "those that are known")
        if incompatible & _COMPRESSION:
            kind = self._read(_HEADER.size + _HEADER3.size, 1, "compression type")[0] if header_length > 104 else 0
            if kind != 1:
                self._refuse(f"compression type {kind}", "0 (deflate, without the feature's bit) or 1 (zstd)")
            need("zstd", "zstandard")
            self._inflate = self._zstd

    def _refuse(self, found: str, expected: str) -> None:
        raise FormatError(f"{self.path}: qcow2: has {found}; expected {expected}")
