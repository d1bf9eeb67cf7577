"""The GUID table at the end of an OVMF image: where the firmware wants the hash table, and where application
processors start.

The table is read backwards from its footer, whose GUID ends 32 bytes before the end of the image:

    ... data | LE16 length | GUID   data | LE16 length | GUID   LE16 length of all | footer GUID   32 bytes (reset
    vector)

An entry's length counts its data, the length itself and the GUID. GUIDs are stored with their first three groups
little-endian. Everything is checked: an entry that does not fit, bytes left over, or a GUID that stands twice is an
error.

Source: tianocore/edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm; QEMU hw/i386/pc_sysfw_ovmf.c (layout only).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from csvfast.measure.errors import (
    EmptySourceError,
    FirmwareTableError,
    HashTableAreaError,
    ResetBlockError,
    SourceKindError,
)
from csvfast.measure.source import Source

__all__ = ["GUID_NAMES", "GuidTable", "HashTableArea", "parse_guid_table"]

FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
HASH_TABLE_GUID = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
RESET_BLOCK_GUID = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SECURE_CALL_GUID = UUID("9a5d926f-2fa5-ceba-ab21-6b275d5556a5")
GUID_NAMES: Mapping[UUID, str] = {
    HASH_TABLE_GUID: "hash table area",
    RESET_BLOCK_GUID: "SEV-ES reset block",
    SECURE_CALL_GUID: "secure call pages",
    UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294"): "secret area",
    UUID("dc886566-984a-4798-a75e-5585a7bf67cc"): "SEV metadata offset",
    UUID("e47a6535-984a-4798-865e-4685a7bf8ec2"): "TDX metadata offset",
}

END_BYTES = 32  # what stands between the footer and the end of the image
ENTRY_TAIL = struct.Struct("<H16s")
TABLE_MAX_BYTES = 0xFFFF
HASH_TABLE_BYTES = 176
ADDRESS_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class HashTableArea:
    """Guest physical bytes the firmware reserves for the table of hashes."""

    base: int
    size: int


@dataclass(frozen=True, slots=True)
class GuidTable:
    """The entries of an image's table, GUID to data. Thread-safety: immutable."""

    path: str
    entries: Mapping[UUID, bytes]

    @classmethod
    def read(cls, source: Source) -> Self:
        """The table of an open image.

        Raises: FirmwareTableError, EmptySourceError, SourceKindError (a stream), SourceError.
        """
        if source.size is None:
            raise SourceKindError(f"{source.path}: is a stream; expected a firmware file, its end is read first")
        if source.size == 0:
            raise EmptySourceError(f"{source.path}: is empty; expected a firmware image")
        length = min(source.size, TABLE_MAX_BYTES + END_BYTES)
        tail = bytearray(length)
        with memoryview(tail) as view:
            source.read_at(view, source.size - length)
        try:
            return cls(source.path, parse_guid_table(bytes(tail)))
        except FirmwareTableError as error:
            raise FirmwareTableError(f"{source.path}: {error}") from error

    def hash_table_area(self) -> HashTableArea:
        """Where the kernel-hashes table goes.

        Raises: HashTableAreaError when the firmware has no such entry, or a base of 0, too little room, or an end
            above 4 GiB.
        """
        data = self.entries.get(HASH_TABLE_GUID)
        if data is None:
            raise HashTableAreaError(
                f"{self.path}: its table has no hash table area ({HASH_TABLE_GUID}); a kernel can only be measured "
                f"with a firmware that publishes one, such as the AmdSev package of OVMF"
            )
        if len(data) != 8:
            raise HashTableAreaError(
                f"{self.path}: its hash table area entry has {len(data)} bytes of data; expected 8"
            )
        base, size = struct.unpack("<II", data)
        if base == 0 or size == 0:
            raise HashTableAreaError(
                f"{self.path}: its hash table area is empty (base {base:#x}, size {size}); expected a base other "
                f"than 0 and at least {HASH_TABLE_BYTES} bytes: this build of OVMF does not support kernel hashes"
            )
        if size < HASH_TABLE_BYTES:
            raise HashTableAreaError(
                f"{self.path}: its hash table area has {size} bytes; expected at least {HASH_TABLE_BYTES}"
            )
        if base + size > ADDRESS_LIMIT:
            raise HashTableAreaError(
                f"{self.path}: its hash table area ends at {base + size:#x}; expected at most {ADDRESS_LIMIT:#x}"
            )
        return HashTableArea(base, size)

    def reset_address(self) -> int:
        """The first instruction of application processors.

        Raises: ResetBlockError when the firmware has no such entry, or a zero one.
        """
        data = self.entries.get(RESET_BLOCK_GUID)
        if data is None:
            raise ResetBlockError(
                f"{self.path}: its table has no SEV-ES reset block ({RESET_BLOCK_GUID}); "
                f"expected one for more than one vCPU"
            )
        if len(data) != 4:
            raise ResetBlockError(f"{self.path}: its SEV-ES reset block has {len(data)} bytes of data; expected 4")
        address = int.from_bytes(data, "little")
        if address == 0:
            raise ResetBlockError(
                f"{self.path}: its SEV-ES reset block holds address 0; expected the start of the other vCPUs"
            )
        return address


def parse_guid_table(tail: bytes) -> dict[UUID, bytes]:
    """Reads the table from the last bytes of an image (65,567 bytes are always enough).

    Raises: FirmwareTableError saying what was found at which distance from the end, and what was expected.
    Thread-safety: safe from any thread.
    """
    if len(tail) < END_BYTES + ENTRY_TAIL.size:
        raise FirmwareTableError(
            f"image has {len(tail)} bytes; expected at least {END_BYTES + ENTRY_TAIL.size} for a GUID table's footer"
        )
    end = len(tail) - END_BYTES - ENTRY_TAIL.size
    total, guid = ENTRY_TAIL.unpack_from(tail, end)
    if guid != FOOTER_GUID.bytes_le:
        found = UUID(bytes_le=guid)
        raise FirmwareTableError(f"no GUID table: {found} stands where the footer {FOOTER_GUID} is expected")
    if not ENTRY_TAIL.size <= total <= len(tail) - END_BYTES:
        raise FirmwareTableError(
            f"GUID table says it has {total} bytes; expected {ENTRY_TAIL.size} to {len(tail) - END_BYTES}"
        )
    start = end + ENTRY_TAIL.size - total
    entries: dict[UUID, bytes] = {}
    while end > start:
        from_end = len(tail) - end
        if end - start < ENTRY_TAIL.size:
            raise FirmwareTableError(
                f"GUID table has {end - start} bytes left over, {from_end} from the end of the image; "
                f"expected whole entries"
            )
        length, guid = ENTRY_TAIL.unpack_from(tail, end - ENTRY_TAIL.size)
        name = UUID(bytes_le=guid)
        if not ENTRY_TAIL.size <= length <= end - start:
            raise FirmwareTableError(
                f"GUID table entry {name}, {from_end} from the end of the image, says it has {length} bytes; "
                f"expected {ENTRY_TAIL.size} to {end - start}"
            )
        if name in entries or name == FOOTER_GUID:
            raise FirmwareTableError(f"GUID table holds {name} more than once, {from_end} from the end of the image")
        entries[name] = tail[end - length : end - ENTRY_TAIL.size]
        end -= length
    return entries
