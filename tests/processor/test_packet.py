"""Packets and the secret table: published vectors, round trips, every bit that must not change."""

from __future__ import annotations

import random

import pytest

from csvfast.crypto import SM4CTR, hmac_sm3
from csvfast.errors import ArgumentError, AuthenticationError, FormatError, LengthError
from csvfast.processor.packet import (
    DISK_PASSWORD_GUID,
    FLAG_COMPRESSED,
    FLAG_NO_MEASURE,
    KIND_DATA,
    KIND_SECRET,
    KIND_VMSA,
    PacketHeader,
    open_packet,
    pack_disk_password,
    pack_secret_table,
    seal_packet,
)

TEK, TIK, IV = bytes(range(0x20, 0x30)), bytes(range(0x30, 0x40)), bytes(range(0x40, 0x50))
MEASURE = bytes.fromhex("88698862d12fa228f0bf8e51d6f3d9b9aae176e27fe8350b156d6787c135547b")
TABLE = bytes.fromhex(
    "42f5741edd71664d963eef4287ff173b30000000e5696873f084734992ec06879ce3da0b1b0000007365637265740000"
)
CIPHERTEXT = bytes.fromhex(
    "d6e6e9e5eaab212d96213739fd700ae27f2ae8625752046eb7e1fc753c1d421a4126c66d8d1f3b33d77557e86d93e065"
)
MAC = bytes.fromhex("945a356959aaef6fc49ba664c7c1c5fde50047b3ab14365ad4e06d538e578e68")


def test_published_secret() -> None:
    table = pack_disk_password(b"secret")
    assert table == TABLE
    header, ciphertext = seal_packet(KIND_SECRET, TEK, TIK, table, iv=IV, measure=MEASURE)
    assert ciphertext == CIPHERTEXT
    assert header == bytes(4) + IV + MAC
    assert open_packet(KIND_SECRET, TEK, TIK, header, ciphertext, measure=MEASURE) == TABLE


@pytest.mark.parametrize("kind", [KIND_DATA, KIND_VMSA])
def test_mac_of_migration_packets_by_hand(kind: int) -> None:
    plaintext = random.Random(kind).randbytes(96)
    header, ciphertext = seal_packet(kind, TEK, TIK, plaintext, iv=IV)
    assert ciphertext == SM4CTR(TEK, IV).encrypt(plaintext)
    covered = bytes((kind,)) + bytes(4) + IV + (96).to_bytes(4, "little") * 2 + ciphertext
    assert header[20:] == hmac_sm3(TIK, covered).digest()
    assert open_packet(kind, TEK, TIK, header, ciphertext) == plaintext


def test_secret_packed_before_the_launch_is_bound_to_no_measure() -> None:
    header, ciphertext = seal_packet(KIND_SECRET, TEK, TIK, TABLE, iv=IV, flags=FLAG_NO_MEASURE)
    assert header[:4] == b"\x02\0\0\0"
    for measure in (MEASURE, bytes(32), b""):
        assert open_packet(KIND_SECRET, TEK, TIK, header, ciphertext, measure=measure) == TABLE
    bound, ciphertext = seal_packet(KIND_SECRET, TEK, TIK, TABLE, iv=IV, measure=bytes(32))
    # The flag is under the MAC: nobody can add it to a packet that was bound to a measure.
    with pytest.raises(AuthenticationError):
        open_packet(KIND_SECRET, TEK, TIK, b"\x02" + bound[1:], ciphertext, measure=bytes(32))


@pytest.mark.parametrize("kind", [KIND_SECRET, KIND_DATA, KIND_VMSA])
def test_every_flipped_bit_is_refused(kind: int) -> None:
    measure = MEASURE if kind == KIND_SECRET else b""
    header, ciphertext = seal_packet(kind, TEK, TIK, TABLE, iv=IV, measure=measure)
    for at in range(8 * len(header)):
        wrong = bytearray(header)
        wrong[at // 8] ^= 1 << at % 8
        # A flag that is not known is refused as such, everything else by the MAC.
        with pytest.raises((AuthenticationError, ArgumentError)):
            open_packet(kind, TEK, TIK, wrong, ciphertext, measure=measure)
    for at in range(8 * len(ciphertext)):
        altered = bytearray(ciphertext)
        altered[at // 8] ^= 1 << at % 8
        with pytest.raises(AuthenticationError):
            open_packet(kind, TEK, TIK, header, altered, measure=measure)


def test_kinds_and_lengths_are_bound() -> None:
    header, ciphertext = seal_packet(KIND_DATA, TEK, TIK, TABLE, iv=IV)
    for kind, data in ((KIND_VMSA, ciphertext), (KIND_DATA, ciphertext[:-16]), (KIND_DATA, ciphertext + bytes(16))):
        with pytest.raises(AuthenticationError):
            open_packet(kind, TEK, TIK, header, data)
    with pytest.raises(AuthenticationError):
        open_packet(KIND_SECRET, TEK, TIK, header, ciphertext, measure=MEASURE)
    with pytest.raises(AuthenticationError):
        open_packet(KIND_DATA, TEK, bytes(16), header, ciphertext)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kind is 4"):
        seal_packet(4, TEK, TIK, TABLE, iv=IV)
    with pytest.raises(ArgumentError, match="flags are 0x1"):
        seal_packet(KIND_DATA, TEK, TIK, TABLE, iv=IV, flags=FLAG_COMPRESSED)
    with pytest.raises(LengthError, match="32 of LAUNCH_MEASURE"):
        seal_packet(KIND_SECRET, TEK, TIK, TABLE, iv=IV)
    with pytest.raises(FormatError, match="found 51 bytes; expected 52"):
        PacketHeader.parse(bytes(51))
    with pytest.raises(ArgumentError, match="flags are 0x80000000"):
        open_packet(KIND_DATA, TEK, TIK, b"\0\0\0\x80" + bytes(48), TABLE)


def test_table_of_several_entries() -> None:
    table = pack_secret_table([(DISK_PASSWORD_GUID, b"one\0"), (DISK_PASSWORD_GUID, b"")])
    assert len(table) % 16 == 0
    assert int.from_bytes(table[16:20], "little") == len(table) == 64
    assert table[20:36] == DISK_PASSWORD_GUID.bytes_le
    assert int.from_bytes(table[36:40], "little") == 24
    assert table[40:44] == b"one\0"
    assert int.from_bytes(table[60:64], "little") == 20
