"""dm-verity's tree from its description, one hash at a time with hashlib: the slow reference."""

from __future__ import annotations

import hashlib


def sm3(*parts: bytes) -> bytes:
    return hashlib.new("sm3", b"".join(parts)).digest()


def merkle(
    data: bytes, block: int = 4096, hash_block: int = 4096, salt: bytes = b"", hash_type: int = 1
) -> tuple[bytes, bytes]:
    """(root, hash blocks from the top level down). The length of data is a multiple of block."""

    def digest(piece: bytes) -> bytes:
        return sm3(salt, piece) if hash_type == 1 else sm3(piece, salt)

    entries = [digest(data[at : at + block]) for at in range(0, len(data), block)]
    area = b""
    fan_out = hash_block // 32
    while len(entries) > 1:
        blocks = [
            b"".join(entries[at : at + fan_out]).ljust(hash_block, b"\0") for at in range(0, len(entries), fan_out)
        ]
        area = b"".join(blocks) + area
        entries = [digest(piece) for piece in blocks]
    return entries[0], area
