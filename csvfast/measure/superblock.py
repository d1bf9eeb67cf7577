"""dm-verity's superblock and the geometry of a hash area.

Superblock, 512 bytes, little-endian, at the hash offset:

    off size                          off  size
      0   8 "verity\\0\\0"              64     4 data block size
      8   4 version = 1                68     4 hash block size
     12   4 hash type (0 or 1)         72     8 number of data blocks
     16  16 UUID                       80     2 salt length
     32  32 algorithm, NUL padded      88   256 salt, zero padded (6 bytes before it and 168 after it are padding)

The hash blocks begin at the next hash block boundary, highest level first.

Source: cryptsetup lib/verity/verity.c and verity_hash.c (layout only).
"""

from __future__ import annotations

import struct
import uuid as uuids
from dataclasses import dataclass
from typing import Self

from csvfast.measure.errors import FormatError, ParameterError, SuperblockError
from csvfast.measure.tree import DIGEST_BYTES, SALT_MAX_BYTES, check_block_bytes

__all__ = ["SUPERBLOCK_BYTES", "VerityParameters", "pack_superblock", "parse_superblock"]

SUPERBLOCK_BYTES = 512
MAGIC = b"verity\0\0"
VERSION = 1
ALGORITHM = b"sm3"
SECTOR_BYTES = 512
DATA_BYTES_MAX = 1 << 63  # beyond this an offset no longer fits what the kernel and the file system count with

NIL_UUID = uuids.UUID(int=0)

_LAYOUT = struct.Struct("<8sII16s32sIIQH6s256s168s")


@dataclass(frozen=True, slots=True)
class VerityParameters:
    """Everything that decides a hash area besides the data and the place of the area.

    Args: salt: 0 to 256 bytes. data_block_bytes, hash_block_bytes: powers of two, 512 to 524288. hash_type: 1, or 0
        for Chromium OS (salt after the block). uuid: goes into the superblock only.
    Raises: ParameterError.
    Thread-safety: immutable.
    """

    data_blocks: int
    salt: bytes
    data_block_bytes: int = 4096
    hash_block_bytes: int = 4096
    hash_type: int = 1
    uuid: uuids.UUID = NIL_UUID

    def __post_init__(self) -> None:
        check_block_bytes("data block size", self.data_block_bytes)
        check_block_bytes("hash block size", self.hash_block_bytes)
        if self.data_blocks < 1 or self.data_blocks * self.data_block_bytes > DATA_BYTES_MAX:
            raise ParameterError(
                f"data blocks is {self.data_blocks}; expected 1 to {DATA_BYTES_MAX // self.data_block_bytes} "
                f"blocks of {self.data_block_bytes} bytes"
            )
        if len(self.salt) > SALT_MAX_BYTES:
            raise ParameterError(f"salt has {len(self.salt)} bytes; expected at most {SALT_MAX_BYTES}")
        if self.hash_type not in (0, 1):
            raise ParameterError(f"hash type is {self.hash_type}; expected 0 or 1")

    @property
    def data_bytes(self) -> int:
        """Bytes of the data device that the tree covers."""
        return self.data_blocks * self.data_block_bytes

    @property
    def level_blocks(self) -> list[int]:
        """Hash blocks per level, level 0 (over the data) first. Empty for a single data block."""
        fan_out = self.hash_block_bytes // DIGEST_BYTES
        levels = []
        entries = self.data_blocks
        while entries > 1:
            entries = -(-entries // fan_out)
            levels.append(entries)
        return levels

    def area_offset(self, hash_offset: int, superblock: bool) -> int:
        """Byte where the first hash block stands.

        Raises: ParameterError for an offset veritysetup would refuse.
        """
        step = SECTOR_BYTES if superblock else self.hash_block_bytes
        if hash_offset < 0 or hash_offset % step:
            raise ParameterError(f"hash offset is {hash_offset}; expected a multiple of {step}")
        if hash_offset > DATA_BYTES_MAX // 2:
            raise ParameterError(f"hash offset is {hash_offset:#x}; expected at most {DATA_BYTES_MAX // 2:#x}")
        start = hash_offset + (SUPERBLOCK_BYTES if superblock else 0)
        return -(-start // self.hash_block_bytes) * self.hash_block_bytes

    def level_offsets(self, area_offset: int) -> list[int]:
        """Byte where each level's first hash block stands, level 0 first."""
        offsets = []
        position = area_offset
        for blocks in reversed(self.level_blocks):
            offsets.append(position)
            position += blocks * self.hash_block_bytes
        return offsets[::-1]

    def area_end(self, area_offset: int) -> int:
        """Byte after the last hash block."""
        return area_offset + sum(self.level_blocks) * self.hash_block_bytes

    def replace_blocks(self, data_blocks: int) -> Self:
        """The same with another number of data blocks."""
        return type(self)(
            data_blocks, self.salt, self.data_block_bytes, self.hash_block_bytes, self.hash_type, self.uuid
        )


def pack_superblock(parameters: VerityParameters) -> bytes:
    """The 512 bytes of a superblock. Thread-safety: safe from any thread."""
    return _LAYOUT.pack(
        MAGIC,
        VERSION,
        parameters.hash_type,
        parameters.uuid.bytes,
        ALGORITHM,
        parameters.data_block_bytes,
        parameters.hash_block_bytes,
        parameters.data_blocks,
        len(parameters.salt),
        b"",
        parameters.salt,
        b"",
    )


def parse_superblock(data: bytes) -> VerityParameters:
    """Reads a superblock, checking every field that is used.

    Raises: SuperblockError naming the field, what it holds and what was expected.
    Thread-safety: safe from any thread.
    """
    if len(data) != SUPERBLOCK_BYTES:
        raise SuperblockError(f"superblock has {len(data)} bytes; expected {SUPERBLOCK_BYTES}")
    magic, version, hash_type, uuid, algorithm, data_size, hash_size, blocks, salt_length, _, salt, _ = _LAYOUT.unpack(
        data
    )
    if magic != MAGIC:
        raise SuperblockError(f"superblock begins with {magic.hex()}; expected {MAGIC.hex()}")
    if version != VERSION:
        raise SuperblockError(f"superblock version is {version}; expected {VERSION}")
    if algorithm.rstrip(b"\0") != ALGORITHM:
        name = algorithm.rstrip(b"\0").decode("latin-1")
        raise SuperblockError(f"superblock names the hash {name!a}; expected 'sm3'")
    if salt_length > SALT_MAX_BYTES:
        raise SuperblockError(f"superblock says the salt has {salt_length} bytes; expected at most {SALT_MAX_BYTES}")
    try:
        return VerityParameters(blocks, salt[:salt_length], data_size, hash_size, hash_type, uuids.UUID(bytes=uuid))
    except FormatError as error:
        raise SuperblockError(f"superblock: {error}") from error
