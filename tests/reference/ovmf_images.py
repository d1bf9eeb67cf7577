"""Makes firmware images with GUID tables of any shape, right and wrong, from the layout alone (no code of csvfast)."""

from __future__ import annotations

import struct
from uuid import UUID

FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
HASH_AREA = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
RESET_BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SECRET_AREA = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")

RESET_ADDRESS = 0x0080B004
AREA = (0x0080FC00, 0x400)


def entry(guid: UUID, data: bytes, *, length: int | None = None) -> bytes:
    """data, length, GUID; the length can be made wrong."""
    return data + struct.pack("<H", len(data) + 18 if length is None else length) + guid.bytes_le


def image(*entries: bytes, total: int | None = None, footer: UUID = FOOTER, size: int = 8192) -> bytes:
    """An image whose table holds the given entries, the last one next to the footer."""
    table = b"".join(entries)
    table += entry(footer, b"", length=len(table) + 18 if total is None else total)
    body = bytes(11 * index % 256 for index in range(size - len(table) - 32))
    return body + table + bytes(range(32))


def good(*, area: tuple[int, int] = AREA, reset: int = RESET_ADDRESS, size: int = 8192) -> bytes:
    """An image with all that the launch digest can ask for."""
    return image(
        entry(SECRET_AREA, struct.pack("<II", 0x0080F000, 0xC00)),
        entry(HASH_AREA, struct.pack("<II", *area)),
        entry(RESET_BLOCK, struct.pack("<I", reset)),
        size=size,
    )
