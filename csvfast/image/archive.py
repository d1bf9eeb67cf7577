"""tar archives as image layers hold them, read once from front to back: POSIX ustar and PAX, GNU, and the old V7 form.

The reader trusts nothing: every number is checked before use, headers have a size, and what is not understood is refused.
What is accepted, and what wins when two places disagree, follows Go's archive/tar, because that is what the tools read with
that made and checked the images (go.dev, src/archive/tar/reader.go). GNU tar manual, "Basic Tar Format", "Sparse Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final
from zlib import adler32

from csvfast.errors import ImageError
from csvfast.image.limits import DEFAULT_LIMITS, Budget, Limits, shown

__all__ = ["BLOCK", "CHARACTER", "DIRECTORY", "FIFO", "FILE", "HARD_LINK", "SYMLINK", "Archive", "Entry"]

FILE: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"

_KINDS: Final = frozenset((FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO))
_PLAIN_FILES: Final = frozenset((b"0", b"\0", b"7"))  # '7' is "contiguous": a file like any other since no system knows it
_HEADER: Final = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")
_SIZE: Final = _HEADER.size
_ZEROS: Final = bytes(_SIZE)
_SECOND: Final = 1_000_000_000
_LATEST: Final = 1 << 36  # seconds; no file system keeps more
_ID_LIMIT: Final = 0xFFFF_FFFF  # (uid_t) -1 means "leave as it is" to chown
_SPARSE_ENTRY: Final = struct.Struct("12s12s")
_NO_XATTRS: Final[dict[bytes, bytes]] = {}
assert _SIZE == 512


class Entry:
    """One entry of an archive.

    name    bytes as the archive has them, not cleaned
    kind    FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO
    mode    low 12 bits: permissions, set-user-ID, set-group-ID, sticky
    size    logical bytes of a file; 0 for everything else
    mtime   nanoseconds since the epoch; atime likewise, None when the archive does not tell
    link    target of a link
    device  (major, minor)
    xattrs  full name ("user.x") -> value
    sparse  of a sparse file: ascending (offset, length) of what is stored; None otherwise
    """

    __slots__ = ("atime", "device", "gid", "kind", "link", "mode", "mtime", "name", "size", "sparse", "uid", "xattrs")

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    atime: int | None
    link: bytes
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]
    sparse: list[tuple[int, int]] | None

    def __repr__(self) -> str:
        return f"Entry({shown(self.name)!r}, kind={self.kind.decode('latin-1')}, size={self.size})"


class Archive:
    """Reads an archive. One thread at a time.

    In: next_chunk   gives the archive's next bytes, any number of them; b"" at its end
        budget       account that entries are charged to
    """

    def __init__(self, next_chunk: Callable[[], bytes], budget: Budget | None = None, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self._next_chunk = next_chunk
        self._budget = budget if budget is not None else Budget(limits)
        self._limits = self._budget.limits
        self._chunk = b""
        self._view = memoryview(b"")
        self._at = 0  # position in the chunk
        self._left = 0  # stored bytes of the current entry not yet read
        self._padding = 0  # bytes between them and the next header
        self._count = 0
        self._done = False

    def next(self) -> Entry | None:
        """The next entry, or None at the archive's end. What was not read of the entry before is passed over.

        Raises ImageError, whose subject is the entry's name or number, for whatever is not a proper archive within the limits.
        """
        if self._done:
            return None
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        long_name: bytes | None = None
        long_link: bytes | None = None
        records: dict[bytes, bytes] | None = None
        holes: list[int] | None = None
        while True:
            if self._at + _SIZE > len(self._chunk) and not self._fill(_SIZE):
                if long_name is not None or long_link is not None or records is not None:
                    raise ImageError(self._here, "the archive ends between a header that announces an entry and the entry")
                self._done = True  # archives without an end mark are read by every tool
                return None
            fields = _HEADER.unpack_from(self._chunk, self._at)
            if not fields[0][0] and self._end_mark():
                self._done = True
                return None
            self._count += 1
            self._check_sum(fields[6])
            block, self._at = self._at, self._at + _SIZE
            kind = fields[7]
            if kind in b"xgLK":
                data = self._extension(kind, self._number(fields[4], "size"))
                if kind == b"x":
                    records, holes = self._records(data)
                elif kind == b"L":
                    long_name = _text(data)
                elif kind == b"K":
                    long_link = _text(data)
                continue  # global headers ('g') are passed over, as container tools do: they hold a comment
            return self._entry(fields, self._chunk, block, long_name, long_link, records, holes)

    def piece(self, most: int = 1 << 62) -> memoryview:
        """Stored bytes of the current entry, as many as are at hand, at most `most`; empty at their end.

        Raises ImageError when the archive ends too early.
        """
        left = self._left
        if not left:
            return self._view[:0]
        at = self._at
        if at >= len(self._chunk):
            if not self._fill(1):
                raise ImageError(self._here, f"the archive ends {left} bytes before the end of the entry's content")
            at = 0
        piece = self._view[at : at + min(left, most)]
        count = len(piece)
        self._at = at + count
        self._left = left - count
        return piece

    # Bytes

    @property
    def _here(self) -> str:
        return f"entry {self._count}"

    def _fill(self, need: int) -> bool:
        """Makes `need` bytes available in the chunk. False: the archive ended before the first of them."""
        have = self._chunk[self._at :]
        parts, count = [have], len(have)
        while count < need:
            chunk = self._next_chunk()
            if not chunk:
                if count:
                    raise ImageError(self._here, f"the archive ends within a block: {count} bytes of {need}")
                return False
            parts.append(chunk)
            count += len(chunk)
        self._chunk = parts[1] if not have and len(parts) == 2 else b"".join(parts)
        self._view, self._at = memoryview(self._chunk), 0
        return True

    def _skip(self, count: int) -> None:
        while count:
            step = min(count, len(self._chunk) - self._at)
            self._at += step
            count -= step
            if count and not self._fill(1):
                raise ImageError(self._here, f"the archive ends {count} bytes before the end of the entry's content")

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._chunk) and not self._fill(count):
            raise ImageError(self._here, f"the archive ends {count} bytes too early")
        data = self._chunk[self._at : self._at + count]
        self._at += count
        return data

    # Headers

    def _end_mark(self) -> bool:
        """True on the block of zeros that ends an archive. A second one follows, or the end of the data."""
        if self._chunk[self._at : self._at + _SIZE] != _ZEROS:
            return False
        self._at += _SIZE
        if (self._at + _SIZE <= len(self._chunk) or self._fill(_SIZE)) and self._take(_SIZE) != _ZEROS:
            raise ImageError(self._here, "one block of zeros, and then something else; two of them end an archive")
        return True

    def _check_sum(self, field: bytes) -> None:
        """The header's check sum: the sum of its bytes, its own eight counted as blanks."""
        at, view = self._at, self._view
        # The low half of Adler-32 is one more than the sum of up to 256 bytes: a sum at C's speed.
        total = (adler32(view[at : at + 256]) & 0xFFFF) + (adler32(view[at + 256 : at + 512]) & 0xFFFF) - 2
        total += 8 * 32 - sum(field)
        told = self._number(field, "check sum")
        if told == total:
            return
        block = self._chunk[at : at + _SIZE]  # some old programs summed signed bytes
        if told != total - 256 * sum(one > 127 for one in block[:148] + block[156:]):
            raise ImageError(self._here, f"no header of a tar archive: the check sum is {total}, the header says {told}")

    def _number(self, field: bytes, what: str) -> int:
        """A number: octal digits, or binary when the first bit is set. Raises ImageError."""
        text = field.strip(b" \0")
        if text.isdigit():
            try:
                return int(text, 8)
            except ValueError:
                pass
        elif not text:
            return 0
        elif field[0] & 0x80:
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & ((1 << bits) - 1)
            if value >> (bits - 1):
                value -= 1 << bits
            if -(1 << 63) <= value < 1 << 63:
                return value
            raise ImageError(self._here, f"{what}: a number of more than 64 bits")
        else:
            text = text.partition(b"\0")[0].strip(b" ")
            if text.isdigit() and not text.strip(b"01234567"):
                return int(text, 8)
        raise ImageError(self._here, f"{what}: {field!r}; expected octal digits")

    def _extension(self, kind: bytes, size: int) -> bytes:
        """Content of a header that describes the next entry."""
        if not 0 <= size <= self._limits.header_bytes:
            what = "long name" if kind in b"LK" else "PAX header"
            raise ImageError(self._here, f"a {what} of {size} bytes; the limit is {self._limits.header_bytes}")
        data = self._take(size)
        self._skip(-size % _SIZE)
        return data

    def _records(self, data: bytes) -> tuple[dict[bytes, bytes], list[int] | None]:
        """Records "length key=value\\n" of a PAX header; with the pairs of a sparse map of version 0.0."""
        records: dict[bytes, bytes] = {}
        holes: list[int] | None = None
        at = 0
        while at < len(data):
            blank = data.find(b" ", at, at + 12)
            digits = data[at:blank] if blank > 0 else b""
            if not digits.isdigit():
                raise ImageError(self._here, f"PAX header: a record at byte {at} without a length")
            end = at + int(digits)
            key, equals, value = data[blank + 1 : end - 1].partition(b"=")
            if end > len(data) or end <= blank + 1 or data[end - 1 : end] != b"\n" or not equals or not key:
                raise ImageError(self._here, f"PAX header: the record at byte {at} is not of the form 'length key=value'")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                holes = [] if holes is None else holes
                if (len(holes) % 2 == 0) != (key == b"GNU.sparse.offset"):
                    raise ImageError(self._here, "PAX header: offsets and lengths of a sparse file do not take turns")
                holes.append(self._decimal(value, "sparse map"))
            else:
                records[key] = value
            at = end
        return records, holes

    def _decimal(self, text: bytes, what: str) -> int:
        if text.isdigit() and len(text) <= 19:
            return int(text)
        raise ImageError(self._here, f"{what}: {text[:40]!r}; expected decimal digits")

    def _time(self, text: bytes, what: str) -> int:
        """Decimal seconds with a fraction, in nanoseconds."""
        whole, _dot, fraction = text.partition(b".")
        digits = whole.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > 19 or (fraction and not fraction.isdigit()):
            raise ImageError(self._here, f"{what}: {text[:40]!r}; expected seconds")
        nanoseconds = int(digits) * _SECOND + int((fraction[:9] or b"0").ljust(9, b"0"))
        return -nanoseconds if whole[:1] == b"-" else nanoseconds

    def _entry(
        self,
        fields: tuple[bytes, ...],
        chunk: bytes,
        block: int,
        long_name: bytes | None,
        long_link: bytes | None,
        records: dict[bytes, bytes] | None,
        holes: list[int] | None,
    ) -> Entry:
        number = self._number
        raw_kind = fields[7]
        name, link = fields[0].partition(b"\0")[0], fields[8].partition(b"\0")[0]
        atime = None
        if fields[9] == b"ustar\0":
            if fields[15][0]:
                name = fields[15].partition(b"\0")[0] + b"/" + name
        elif fields[9] == b"ustar " and fields[15][0]:
            try:  # GNU keeps times where others keep the name's beginning
                atime = number(fields[15][:12], "atime") * _SECOND
                number(fields[15][12:24], "ctime")
            except ImageError:  # Go before 1.8 wrote the name's beginning there, too
                atime, prefix = None, fields[15].partition(b"\0")[0]
                if not prefix.isascii():
                    raise
                name = prefix + b"/" + name
        entry = Entry()
        entry.mode = number(fields[1], "mode") & 0o7777
        uid, gid = number(fields[2], "uid"), number(fields[3], "gid")
        size, mtime = number(fields[4], "size"), number(fields[5], "mtime") * _SECOND
        entry.name = name if long_name is None else long_name
        entry.link = link if long_link is None else long_link
        entry.xattrs = _NO_XATTRS
        entry.sparse = None
        if records is not None:
            uid = self._decimal(records[b"uid"], "uid") if records.get(b"uid") else uid
            gid = self._decimal(records[b"gid"], "gid") if records.get(b"gid") else gid
            size = self._decimal(records[b"size"], "size") if records.get(b"size") else size
            mtime = self._time(records[b"mtime"], "mtime") if records.get(b"mtime") else mtime
            atime = self._time(records[b"atime"], "atime") if records.get(b"atime") else atime
            entry.name = records.get(b"path") or entry.name
            entry.link = records.get(b"linkpath") or entry.link
            entry.xattrs = self._xattrs(records)
        if not 0 <= uid < _ID_LIMIT or not 0 <= gid < _ID_LIMIT:
            raise ImageError(shown(entry.name), f"owner {uid}:{gid}; expected numbers below {_ID_LIMIT}")
        if not -_LATEST < mtime // _SECOND < _LATEST or not -_LATEST < (atime or 0) // _SECOND < _LATEST:
            raise ImageError(shown(entry.name), "a time that no file system can hold")
        entry.uid, entry.gid, entry.mtime, entry.atime = uid, gid, mtime, atime

        kind = FILE if raw_kind in _PLAIN_FILES or raw_kind == b"S" else raw_kind
        if raw_kind == b"\0" and entry.name.endswith(b"/"):
            kind = DIRECTORY  # how it was said before there was a kind for it
        if kind not in _KINDS:
            raise ImageError(shown(entry.name), f"kind {raw_kind!r}; expected a file, directory, link, device or fifo")
        entry.kind = kind
        entry.device = (0, 0)
        if kind in (CHARACTER, BLOCK):
            entry.device = number(fields[13], "device"), number(fields[14], "device")
        if kind != FILE:
            entry.size = 0  # whatever the header says, no content follows
        else:
            if size < 0:
                raise ImageError(shown(entry.name), f"a size of {size} bytes")
            self._left, self._padding, entry.size = size, -size % _SIZE, size
            if raw_kind == b"S":
                self._old_sparse(entry, chunk, block)
            elif records is not None:
                self._pax_sparse(entry, records, holes)
        self._budget.entry(entry.name, entry.size)
        return entry

    def _xattrs(self, records: dict[bytes, bytes]) -> dict[bytes, bytes]:
        found = {key[13:]: value for key, value in records.items() if key.startswith(b"SCHILY.xattr.")}
        if len(found) > self._limits.xattr_count:
            raise ImageError(self._here, f"{len(found)} extended attributes; the limit is {self._limits.xattr_count}")
        total = sum(len(key) + len(value) for key, value in found.items())
        if total > self._limits.xattr_bytes:
            raise ImageError(self._here, f"extended attributes of {total} bytes; the limit is {self._limits.xattr_bytes}")
        return found

    # Sparse files

    def _old_sparse(self, entry: Entry, chunk: bytes, block: int) -> None:
        """GNU's first form: pairs in the header and in blocks behind it, which the size does not count."""
        table = chunk[block + 386 : block + 482]
        more = chunk[block + 482]
        size = self._number(chunk[block + 483 : block + 495], "sparse file's size")
        numbers: list[int] = []
        while True:
            for start, length in _SPARSE_ENTRY.iter_unpack(table):
                if not start[0] and not length[0]:
                    break
                numbers += self._number(start, "sparse map"), self._number(length, "sparse map")
            if not more:
                break
            if len(numbers) > 2 * self._limits.sparse_parts:
                raise ImageError(shown(entry.name), f"a sparse file in more than {self._limits.sparse_parts} pieces")
            extension = self._take(_SIZE)
            table, more = extension[:504], extension[504]
        self._set_sparse(entry, numbers, size)

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes], holes: list[int] | None) -> None:
        """Forms 0.0, 0.1 and 1.0 of GNU tar, which are told by PAX records."""
        version = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
        told = records.get(b"GNU.sparse.map")
        if version == (None, None) and holes is None and told is None:
            return
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        size = self._decimal(records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size") or b"", "sparse file's size")
        if version == (b"1", b"0"):
            numbers = self._sparse_numbers(entry)
        elif version in ((None, None), (b"0", b"0"), (b"0", b"1")):
            if told is not None:
                holes = [self._decimal(one, "sparse map") for one in told.split(b",")] if told else []
            numbers = holes or []
        else:
            raise ImageError(shown(entry.name), f"a sparse file of an unknown form {version}")
        self._set_sparse(entry, numbers, size)

    def _sparse_numbers(self, entry: Entry) -> list[int]:
        """The map of form 1.0: lines of decimal numbers before the content, the first their count, filled up to whole blocks."""
        text, lines, wanted = b"", 0, 1
        while lines < wanted:
            if self._left < _SIZE or len(text) > self._limits.header_bytes:
                raise ImageError(shown(entry.name), "sparse map: it does not end")
            block = self._take(_SIZE)
            self._left -= _SIZE
            text += block
            lines += block.count(b"\n")
            if wanted == 1 and lines:
                wanted = 1 + 2 * self._decimal(text.partition(b"\n")[0], "sparse map")
                if wanted > 1 + 2 * self._limits.sparse_parts:
                    raise ImageError(shown(entry.name), f"a sparse file in more than {self._limits.sparse_parts} pieces")
        return [self._decimal(one, "sparse map") for one in text.split(b"\n")[1:wanted]]

    def _set_sparse(self, entry: Entry, numbers: list[int], size: int) -> None:
        if size < 0:
            raise ImageError(shown(entry.name), f"a size of {size} bytes")
        if len(numbers) % 2 or len(numbers) > 2 * self._limits.sparse_parts:
            most = self._limits.sparse_parts
            raise ImageError(shown(entry.name), f"sparse map: {len(numbers)} numbers; expected pairs, at most {most} of them")
        parts, end, stored = [], 0, 0
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            if start < end or length < 0 or start + length > size:
                raise ImageError(shown(entry.name), "sparse map: pieces overlap, go backwards or leave the file")
            end = start + length
            stored += length
            if length:
                parts.append((start, length))
        if stored != self._left:
            raise ImageError(shown(entry.name), f"sparse map: it tells of {stored} bytes, the archive holds {self._left}")
        entry.size, entry.sparse = size, parts


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]
