"""DER, the small and strict part that keys, signatures and ciphertexts need (ITU-T X.690 clauses 8 and 10).

One tag per byte, definite lengths of the shortest form, integers of the shortest form, nothing after the end. Whatever breaks a
rule is a FormatError that names the field and its offset from the start of the structure.

Thread-safety: functions are pure; a Reader belongs to one thread.
"""

from __future__ import annotations

from typing import Final

from csvfast.errors import FormatError

__all__ = ["Reader", "bit_string", "context", "integer", "null", "object_identifier", "octet_string", "sequence"]

INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OBJECT_IDENTIFIER: Final = 0x06
SEQUENCE: Final = 0x30

_NAMES: Final = {
    INTEGER: "INTEGER",
    BIT_STRING: "BIT STRING",
    OCTET_STRING: "OCTET STRING",
    NULL: "NULL",
    OBJECT_IDENTIFIER: "OBJECT IDENTIFIER",
    SEQUENCE: "SEQUENCE",
}
_LENGTH_BYTES: Final = 4  # of a long-form length: more than any structure here needs


def tag_name(tag: int) -> str:
    """The name of a tag for messages."""
    if tag & 0xE0 == 0xA0:
        return f"context tag [{tag & 0x1F}]"
    return _NAMES.get(tag, f"tag {tag:#04x}")


class Reader:
    """Reads one level of a DER structure from front to back.

    Args:
        data: the bytes; a memoryview is sliced without copying.
        structure: its name in error messages.
        start, end: where this level lies in data.
    Raises (every method): FormatError.
    """

    __slots__ = ("_data", "_end", "_position", "_structure")

    def __init__(
        self, data: bytes | bytearray | memoryview, structure: str, start: int = 0, end: int | None = None
    ) -> None:
        self._data = memoryview(data)
        self._structure = structure
        self._position = start
        self._end = len(self._data) if end is None else end

    def refuse(self, field: str, offset: int, found: str, expected: str) -> FormatError:
        """The exception for a field whose content the caller does not accept."""
        return FormatError(self._structure, field, offset, found, expected)

    @property
    def position(self) -> int:
        """Offset of the next element."""
        return self._position

    def next_tag(self) -> int | None:
        """Tag of the next element, None at the end."""
        return self._data[self._position] if self._position < self._end else None

    def _element(self, tag: int, field: str) -> tuple[int, int]:
        """Takes one element; returns where its content starts and ends."""
        offset, end = self._position, self._end
        if offset >= end:
            raise self.refuse(field, offset, "the end", tag_name(tag))
        found = self._data[offset]
        if found != tag:
            raise self.refuse(field, offset, tag_name(found), tag_name(tag))
        if end - offset < 2:
            raise self.refuse(field, offset + 1, "the end", "a length")
        length, start = self._data[offset + 1], offset + 2
        if length == 0x80:
            raise self.refuse(field, offset + 1, "an indefinite length (BER)", "a definite length (DER)")
        if length > 0x80:
            count = length & 0x7F
            if count > _LENGTH_BYTES or end - start < count:
                raise self.refuse(
                    field, offset + 1, f"a length of {count} bytes", f"at most {_LENGTH_BYTES}, all present"
                )
            length = int.from_bytes(self._data[start : start + count], "big")
            if length < 0x80 or length >> (8 * (count - 1)) == 0:
                raise self.refuse(
                    field, offset + 1, f"{length} written in {count} bytes (BER)", "the shortest form (DER)"
                )
            start += count
        if length > end - start:
            raise self.refuse(
                field, offset + 1, f"a length of {length} bytes", f"at most the {end - start} that follow"
            )
        self._position = start + length
        return start, start + length

    def sequence(self, field: str) -> Reader:
        """A reader of the SEQUENCE that follows."""
        return Reader(self._data, self._structure, *self._element(SEQUENCE, field))

    def context(self, number: int, field: str) -> Reader:
        """A reader of the constructed, context-specific element [number] that follows."""
        return Reader(self._data, self._structure, *self._element(0xA0 | number, field))

    def inside(self, start: int, end: int) -> Reader:
        """A reader of content found before, for a structure wrapped in an OCTET STRING."""
        return Reader(self._data, self._structure, start, end)

    def octet_string(self, field: str) -> tuple[memoryview, int]:
        """The content of an OCTET STRING and its offset."""
        start, end = self._element(OCTET_STRING, field)
        return self._data[start:end], start

    def bit_string(self, field: str) -> tuple[memoryview, int]:
        """The whole bytes of a BIT STRING and their offset; one with unused bits is refused."""
        start, end = self._element(BIT_STRING, field)
        if start == end or self._data[start] != 0:
            found = "no content" if start == end else f"{self._data[start]} unused bits"
            raise self.refuse(field, start, found, "whole bytes")
        return self._data[start + 1 : end], start + 1

    def object_identifier(self, field: str) -> tuple[str, int]:
        """An OBJECT IDENTIFIER in dotted form and its offset."""
        offset = self._position
        start, end = self._element(OBJECT_IDENTIFIER, field)
        content = self._data[start:end]
        if not 1 <= len(content) <= 32 or content[-1] & 0x80:
            raise self.refuse(field, start, f"{len(content)} bytes", "1 .. 32 bytes, the last below 0x80")
        numbers, value, first = [], 0, True
        for byte in content:
            if first and byte == 0x80:
                raise self.refuse(field, start, "a number with a leading zero", "the shortest form (DER)")
            value, first = value << 7 | byte & 0x7F, not byte & 0x80
            if first:
                numbers.append(value)
                value = 0
        top = min(numbers[0] // 40, 2)
        return ".".join(map(str, (top, numbers[0] - 40 * top, *numbers[1:]))), offset

    def null(self, field: str) -> None:
        """A NULL."""
        start, end = self._element(NULL, field)
        if start != end:
            raise self.refuse(field, start, f"a NULL of {end - start} bytes", "an empty one")

    def unsigned(self, field: str, width: int) -> bytes:
        """An INTEGER that is not negative and fits `width` bytes, as that many big-endian bytes."""
        start, end = self._element(INTEGER, field)
        content = self._data[start:end]
        if not content:
            raise self.refuse(field, start, "an INTEGER of no bytes", "at least 1")
        if content[0] & 0x80:
            raise self.refuse(field, start, "a negative INTEGER", "0 or more")
        if content[0] == 0 and len(content) > 1:
            if not content[1] & 0x80:
                raise self.refuse(
                    field, start, "an INTEGER with a needless leading zero (BER)", "the shortest form (DER)"
                )
            content = content[1:]
        if len(content) > width:
            raise self.refuse(field, start, f"an INTEGER of {len(content)} bytes", f"at most {width}")
        return bytes(width - len(content)) + bytes(content)

    def small(self, field: str) -> int:
        """An INTEGER of 0 .. 2**32 - 1."""
        return int.from_bytes(self.unsigned(field, 4), "big")

    def finish(self, field: str) -> None:
        """To be called after the last element: nothing may follow."""
        if self._position != self._end:
            raise self.refuse(field, self._position, f"{self._end - self._position} more bytes", "the end")


def _element(tag: int, *parts: bytes | bytearray | memoryview) -> bytes:
    length = sum(map(len, parts))
    if length < 0x80:
        head = bytes((tag, length))
    else:
        count = (length.bit_length() + 7) // 8
        head = bytes((tag, 0x80 | count)) + length.to_bytes(count, "big")
    return b"".join((head, *parts))


def sequence(*elements: bytes) -> bytes:
    """A SEQUENCE of finished elements."""
    return _element(SEQUENCE, *elements)


def context(number: int, *elements: bytes) -> bytes:
    """The constructed, context-specific element [number]."""
    return _element(0xA0 | number, *elements)


def octet_string(content: bytes | bytearray | memoryview) -> bytes:
    """An OCTET STRING."""
    return _element(OCTET_STRING, content)


def bit_string(content: bytes | bytearray | memoryview) -> bytes:
    """A BIT STRING of whole bytes."""
    return _element(BIT_STRING, b"\0", content)


def null() -> bytes:
    """A NULL."""
    return _element(NULL)


def integer(value: int | bytes | memoryview) -> bytes:
    """An INTEGER that is not negative; bytes are read big-endian."""
    number = value if isinstance(value, int) else int.from_bytes(value, "big")
    return _element(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def object_identifier(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER from its dotted form."""
    first, second, *others = map(int, dotted.split("."))
    content = bytearray()
    for number in (40 * first + second, *others):
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(number & 0x7F | 0x80)
        content += bytes(reversed(groups))
    return _element(OBJECT_IDENTIFIER, content)
