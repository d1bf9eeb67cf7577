"""Packets between a guest owner or another platform and the firmware: a 52-byte header and SM4-CTR ciphertext.

    header   0 flags 4 | 4 iv 16 | 20 mac 32
    mac      HMAC-SM3(TIK; kind || flags || iv || LE32(guest length) || LE32(transport length) || ciphertext [|| measure])
    payload  SM4-CTR(TEK, iv)

Kind 1 is LAUNCH_SECRET and ends with the 32 bytes LAUNCH_MEASURE gave (AMDESE/sev-tool src/commands.cpp); kinds 2 and 3 are
SEND/RECEIVE_UPDATE_DATA and _VMSA (AMD publication 55766; inferred for Hygon's firmware). Flag bit 0 says the payload is
compressed. Flag bit 1 marks a secret packed before the launch, whose measure nobody knows yet: 32 zero bytes stand in for it
(inferred; the flag's real effect is not public, so such packets are not interoperable until it is).

The secret table is what OVMF hands to the guest's system: GUID, LE32 total length, then entries GUID, LE32 length, data.

Thread-safety: functions without state.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

from csvfast.crypto import SM4CTR, hmac_sm3
from csvfast.errors import ArgumentError, FormatError, LengthError
from csvfast.processor.buffers import copy_of, size_of, view_of

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = [
    "DISK_PASSWORD_GUID",
    "FLAG_COMPRESSED",
    "FLAG_NO_MEASURE",
    "HEADER_BYTES",
    "KIND_DATA",
    "KIND_SECRET",
    "KIND_VMSA",
    "SECRET_TABLE_GUID",
    "PacketHeader",
    "open_packet",
    "pack_disk_password",
    "pack_secret_table",
    "seal_packet",
]

HEADER_BYTES: Final = 52
KIND_SECRET: Final = 1
KIND_DATA: Final = 2
KIND_VMSA: Final = 3
FLAG_COMPRESSED: Final = 1
FLAG_NO_MEASURE: Final = 2
SECRET_TABLE_GUID: Final = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b")
DISK_PASSWORD_GUID: Final = UUID("736869e5-84f0-4973-92ec-06879ce3da0b")

_HEADER: Final = struct.Struct("<I16s32s")
_LENGTHS: Final = struct.Struct("<II")
_ENTRY_HEAD: Final = 20


class PacketHeader(NamedTuple):
    """The 52 bytes before a payload."""

    flags: int
    iv: bytes
    mac: bytes

    @classmethod
    def parse(cls, data: BytesLike) -> PacketHeader:
        """From exactly 52 bytes. Raises FormatError."""
        raw = copy_of(data)
        if len(raw) != HEADER_BYTES:
            raise FormatError("packet header", "length", None, f"{len(raw)} bytes", f"{HEADER_BYTES} bytes")
        return cls(*_HEADER.unpack(raw))

    def encode(self) -> bytes:
        """The 52 bytes."""
        return _HEADER.pack(self.flags, self.iv, self.mac)


def _mac(
    kind: int, tik: BytesLike, flags: int, iv: bytes, guest_length: int, ciphertext: BytesLike, measure: BytesLike
) -> hmac_sm3:
    view = view_of(ciphertext)
    mac = hmac_sm3(tik, bytes((kind,)) + flags.to_bytes(4, "little") + iv + _LENGTHS.pack(guest_length, view.nbytes))
    mac.update(view)
    if kind == KIND_SECRET:
        if flags & FLAG_NO_MEASURE:
            measure = bytes(32)
        size = size_of(measure)
        if size != 32:
            raise LengthError(f"measure has {size} bytes; expected the 32 of LAUNCH_MEASURE")
        mac.update(measure)
    return mac


def seal_packet(
    kind: int,
    tek: BytesLike,
    tik: BytesLike,
    plaintext: BytesLike,
    *,
    iv: BytesLike,
    flags: int = 0,
    measure: BytesLike = b"",
) -> tuple[bytes, bytes]:
    """Encrypts and authenticates a payload.

    Args:
        kind: KIND_SECRET, KIND_DATA or KIND_VMSA.
        tek, tik: 16 bytes each.
        iv: 16 bytes, never used twice under one TEK.
        flags: FLAG_NO_MEASURE or 0. Compression is not offered.
        measure: for KIND_SECRET without FLAG_NO_MEASURE, the first 32 bytes of LAUNCH_MEASURE's answer.
    Returns: header (52 bytes) and ciphertext.
    Raises: ArgumentError, LengthError.
    """
    if kind not in (KIND_SECRET, KIND_DATA, KIND_VMSA):
        raise ArgumentError(f"kind is {kind}; expected 1, 2 or 3")
    if flags & ~FLAG_NO_MEASURE:
        raise ArgumentError(f"flags are {flags:#x}; expected 0 or {FLAG_NO_MEASURE}")
    vector = copy_of(iv)
    ciphertext = SM4CTR(tek, vector).encrypt(plaintext)
    mac = _mac(kind, tik, flags, vector, len(ciphertext), ciphertext, measure)
    return PacketHeader(flags, vector, mac.digest()).encode(), ciphertext


def open_packet(
    kind: int,
    tek: BytesLike,
    tik: BytesLike,
    header: BytesLike,
    ciphertext: BytesLike,
    *,
    measure: BytesLike = b"",
) -> bytearray:
    """Checks the MAC, then decrypts what it covers: a copy, since the host may write to the buffer meanwhile.

    Returns: the plaintext, for the caller to wipe.
    Raises: FormatError (header), AuthenticationError (nothing has been decrypted then), ArgumentError for a compressed packet.
    """
    parsed = PacketHeader.parse(header)
    if parsed.flags & ~FLAG_NO_MEASURE:
        raise ArgumentError(f"packet flags are {parsed.flags:#x}; expected 0 or {FLAG_NO_MEASURE}")
    content = copy_of(ciphertext)
    _mac(kind, tik, parsed.flags, parsed.iv, len(content), content, measure).verify(parsed.mac)
    return SM4CTR(tek, parsed.iv).decrypt(content, out=bytearray(len(content)))


def pack_secret_table(entries: Sequence[tuple[UUID, BytesLike]]) -> bytearray:
    """The table of LAUNCH_SECRET, padded with zeros to a multiple of 16; its length field says the padded length.

    Args: entries: GUID and data of each.
    Returns: a buffer that holds the secrets, for the caller to wipe.
    """
    size = _ENTRY_HEAD + sum(_ENTRY_HEAD + size_of(data) for _, data in entries)
    size += -size % 16
    table = bytearray(size)
    table[0:16] = SECRET_TABLE_GUID.bytes_le
    table[16:20] = size.to_bytes(4, "little")
    at = _ENTRY_HEAD
    for guid, data in entries:
        view = view_of(data)
        end = at + _ENTRY_HEAD + view.nbytes
        table[at : at + 16] = guid.bytes_le
        table[at + 16 : at + 20] = (end - at).to_bytes(4, "little")
        table[at + 20 : end] = view
        at = end
    return table


def pack_disk_password(password: BytesLike) -> bytearray:
    """The table with one disk password, NUL-terminated, as the vendor's pack-secret.py makes it."""
    data = bytearray(size_of(password) + 1)
    data[:-1] = view_of(password)
    try:
        return pack_secret_table([(DISK_PASSWORD_GUID, data)])
    finally:
        data[:] = bytes(len(data))
