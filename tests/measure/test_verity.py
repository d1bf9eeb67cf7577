"""dm-verity: format and verify against a reference made of hashlib, and every way to fail without leaving a trace."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference.merkle import merkle

from csvfast.measure import (
    EmptySourceError,
    ParameterError,
    SourceChangedError,
    SourceTruncatedError,
    SuperblockError,
    TargetError,
    VerityParameters,
    format_verity,
    pack_superblock,
    parse_superblock,
    read_superblock,
    verify_verity,
)

UUID = uuid.UUID("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")
SALT = bytes(range(32))


def write(path: Path, size: int) -> bytes:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    path.write_bytes(data)
    return data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("hash_type", [0, 1])
@pytest.mark.parametrize("salt", [b"", b"\x00", SALT, bytes(256)], ids=len)
@pytest.mark.parametrize(
    ("block", "hash_block", "blocks"),
    [(4096, 4096, 1), (4096, 4096, 2), (4096, 4096, 129), (512, 512, 300), (512, 4096, 1000), (65536, 512, 17)],
)
def test_area_equals_the_reference(
    tmp_path: Path, block: int, hash_block: int, blocks: int, salt: bytes, hash_type: int
) -> None:
    data = write(tmp_path / "data", block * blocks)
    record = format_verity(
        tmp_path / "data",
        tmp_path / "area",
        salt=salt,
        data_block_bytes=block,
        hash_block_bytes=hash_block,
        hash_type=hash_type,
        superblock=False,
    )
    root, area = merkle(data, block, hash_block, salt, hash_type)
    assert record.root_hash == root
    assert (tmp_path / "area").read_bytes() == area
    assert record.parameters.data_blocks == blocks
    check = verify_verity(tmp_path / "data", tmp_path / "area", root, parameters=record.parameters)
    assert check.ok
    assert check.root_hash == root


def test_root_only(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 40960)
    record = format_verity(tmp_path / "data", salt=SALT)
    assert record.root_hash == merkle(data, salt=SALT)[0]
    assert record.hash_path is None
    assert names(tmp_path) == ["data"]


def test_random_salt_and_uuid(tmp_path: Path) -> None:
    write(tmp_path / "data", 8192)
    one, other = (format_verity(tmp_path / "data") for _ in range(2))
    assert len(one.parameters.salt) == 32
    assert one.parameters.salt != other.parameters.salt
    assert one.parameters.uuid != other.parameters.uuid
    assert one.root_hash != other.root_hash


def test_partial_block_is_left_out_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 3 * 4096 + 100)
    record = format_verity(tmp_path / "data", salt=SALT)
    assert record.root_hash == merkle(data[: 3 * 4096], salt=SALT)[0]
    assert record.uncovered_bytes == 100


def test_data_blocks(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 10 * 4096)
    record = format_verity(tmp_path / "data", salt=SALT, data_blocks=4)
    assert record.root_hash == merkle(data[: 4 * 4096], salt=SALT)[0]
    assert record.uncovered_bytes == 6 * 4096
    with pytest.raises(EmptySourceError, match="holds 10 blocks of 4096 bytes; expected at least 11"):
        format_verity(tmp_path / "data", data_blocks=11)


def test_standard_input(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 300 * 4096 + 7)
    program = (
        "import sys; from csvfast.measure import format_verity;"
        "print(format_verity('-', sys.argv[1], salt=b'abc', superblock=False).root_hash.hex())"
    )
    for feed in (False, True):  # as a pipe, as a redirected file
        with (tmp_path / "data").open("rb") as file:
            answer = subprocess.run(
                [sys.executable, "-c", program, tmp_path / "area"],
                **({"stdin": file} if feed else {"input": data}),  # type: ignore[call-overload]
                capture_output=True,
                check=True,
                timeout=60,
            )
        root, area = merkle(data[: 300 * 4096], salt=b"abc")
        assert answer.stdout.decode().strip() == root.hex()
        assert (tmp_path / "area").read_bytes() == area


# ---- Superblock ------------------------------------------------------------------------------------------------------


def test_superblock_layout() -> None:
    parameters = VerityParameters(1000, SALT, 512, 8192, 0, UUID)
    block = pack_superblock(parameters)
    assert len(block) == 512
    assert block[:16] == b"verity\0\0" + struct.pack("<II", 1, 0)
    assert block[16:64] == UUID.bytes + b"sm3".ljust(32, b"\0")
    assert block[64:88] == struct.pack("<IIQH6x", 512, 8192, 1000, 32)
    assert block[88:] == SALT.ljust(424, b"\0")
    assert parse_superblock(block) == parameters


@pytest.mark.parametrize(
    ("offset", "field", "message"),
    [
        (0, b"verify\0\0", "begins with 766572696679"),
        (8, struct.pack("<I", 2), "version is 2; expected 1"),
        (12, struct.pack("<I", 2), "hash type is 2; expected 0 or 1"),
        (32, b"sha256\0", "names the hash 'sha256'; expected 'sm3'"),
        (32, b"\xff\n", r"names the hash '\\xff"),
        (64, struct.pack("<I", 0), "data block size is 0"),
        (64, struct.pack("<I", 4095), "data block size is 4095"),
        (68, struct.pack("<I", 1 << 20), "hash block size is 1048576"),
        (72, struct.pack("<Q", 0), "data blocks is 0"),
        (72, struct.pack("<Q", 1 << 63), "data blocks is 9223372036854775808"),
        (80, struct.pack("<H", 257), "salt has 257 bytes; expected at most 256"),
    ],
)
def test_superblock_field_wrong(tmp_path: Path, offset: int, field: bytes, message: str) -> None:
    block = bytearray(pack_superblock(VerityParameters(2, SALT)))
    block[offset : offset + len(field)] = field
    with pytest.raises(SuperblockError, match=message):
        parse_superblock(bytes(block))
    write(tmp_path / "data", 8192)
    (tmp_path / "area").write_bytes(block + bytes(8192))
    with pytest.raises(SuperblockError, match="area: superblock"):
        verify_verity(tmp_path / "data", tmp_path / "area", bytes(32))


@given(st.binary(min_size=512, max_size=512))
@example(bytes(512))
def test_superblock_never_crashes(data: bytes) -> None:
    for block in (data, b"verity\0\0\1\0\0\0" + data[12:32] + b"sm3".ljust(32, b"\0") + data[64:]):
        try:
            parameters = parse_superblock(block)
        except SuperblockError:
            continue
        assert pack_superblock(parameters)[:80] == block[:80]


def test_superblock_missing(tmp_path: Path) -> None:
    (tmp_path / "area").write_bytes(bytes(511))
    with pytest.raises(SuperblockError, match="no room for a superblock of 512 bytes at offset 0"):
        read_superblock(tmp_path / "area")
    with pytest.raises(SuperblockError, match="511 bytes; expected 512"):
        parse_superblock(bytes(511))


@given(st.integers(1, 1 << 40), st.integers(9, 19), st.integers(9, 19))
def test_geometry(blocks: int, data_bits: int, hash_bits: int) -> None:
    parameters = VerityParameters(blocks, b"", 1 << data_bits, 1 << hash_bits)
    offsets = parameters.level_offsets(1 << hash_bits)
    sizes = parameters.level_blocks
    assert (sizes[-1] == 1) if sizes else blocks == 1
    entries = blocks
    for size in sizes:
        assert (size - 1) * (1 << hash_bits) // 32 < entries <= size * (1 << hash_bits) // 32
        entries = size
    position = 1 << hash_bits
    for offset, size in zip(reversed(offsets), reversed(sizes), strict=True):
        assert offset == position
        position += size << hash_bits
    assert position == parameters.area_end(1 << hash_bits)


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"salt": bytes(257)}, "salt has 257 bytes; expected at most 256"),
        ({"hash_type": 2}, "hash type is 2"),
        ({"data_block_bytes": 1000}, "data block size is 1000; expected a power of two from 512 to 524288"),
        ({"data_block_bytes": 256}, "data block size is 256"),
        ({"data_block_bytes": 0}, "data block size is 0"),
        ({"hash_block_bytes": 1 << 20}, "hash block size is 1048576"),
        ({"hash_block_bytes": -512}, "hash block size is -512"),
        ({"data_blocks": 0}, "data blocks is 0"),
        ({"hash_offset": 100}, "hash offset is 100; expected a multiple of 512"),
        ({"hash_offset": -512}, "hash offset is -512"),
        ({"hash_offset": 512, "superblock": False}, "hash offset is 512; expected a multiple of 4096"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_parameter_wrong(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    write(tmp_path / "data", 8192)
    with pytest.raises(ParameterError, match=message):
        format_verity(tmp_path / "data", tmp_path / "area", **arguments)  # type: ignore[arg-type]
    assert names(tmp_path) == ["data"]


def test_no_whole_block(tmp_path: Path) -> None:
    write(tmp_path / "data", 4095)
    with pytest.raises(EmptySourceError, match="holds no whole block of 4096 bytes"):
        format_verity(tmp_path / "data", tmp_path / "area")
    assert names(tmp_path) == ["data"]


# ---- Targets ---------------------------------------------------------------------------------------------------------


def test_existing_area_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    write(tmp_path / "data", 8192)
    (tmp_path / "area").write_bytes(b"old" * 100_000)
    (tmp_path / "area").chmod(0o604)
    format_verity(tmp_path / "data", tmp_path / "area", salt=SALT)
    assert (tmp_path / "area").stat().st_size == 8192
    assert (tmp_path / "area").stat().st_mode & 0o777 == 0o604
    assert names(tmp_path) == ["area", "data"]


def test_same_file(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 300 * 4096)
    record = format_verity(tmp_path / "data", tmp_path / "data", salt=SALT, uuid=UUID, hash_offset=len(data))
    format_verity(tmp_path / "data", tmp_path / "area", salt=SALT, uuid=UUID, data_blocks=300)
    assert (tmp_path / "data").read_bytes() == data + (tmp_path / "area").read_bytes()
    assert verify_verity(tmp_path / "data", tmp_path / "data", record.root_hash, hash_offset=len(data)).ok
    # Once more over the area that is there now.
    again = format_verity(tmp_path / "data", tmp_path / "data", salt=b"", uuid=UUID, hash_offset=len(data))
    assert again.parameters.data_blocks == 300
    assert verify_verity(tmp_path / "data", tmp_path / "data", again.root_hash, hash_offset=len(data)).ok


def test_same_file_never_overwrites_data(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 10 * 4096)
    with pytest.raises(ParameterError, match="has 40960 bytes; expected no more than the hash offset 20480"):
        format_verity(tmp_path / "data", tmp_path / "data", hash_offset=5 * 4096)
    with pytest.raises(ParameterError, match="hash offset is 20480; expected 40960 or more"):
        format_verity(tmp_path / "data", tmp_path / "data", hash_offset=5 * 4096, data_blocks=10)
    with pytest.raises((ParameterError, EmptySourceError)):
        format_verity(tmp_path / "data", tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == data


@pytest.mark.parametrize("target", ["nowhere/area", "folder", "pipe"])
def test_unusable_target(tmp_path: Path, target: str) -> None:
    write(tmp_path / "data", 8192)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(TargetError, match=target.split("/")[0]):
        format_verity(tmp_path / "data", tmp_path / target)
    assert names(tmp_path) == before


def test_stream_target(tmp_path: Path) -> None:
    write(tmp_path / "data", 8192)
    with pytest.raises(ParameterError, match="hash file is '-'"):
        format_verity(tmp_path / "data", "-")


@pytest.mark.parametrize("same", [False, True])
def test_full_disk_leaves_nothing(tmp_path: Path, same: bool) -> None:
    data = write(tmp_path / "data", 4096 * 4096)  # a hash area of 33 blocks
    target = tmp_path / ("data" if same else "area")
    limit = len(data) + 40_000 if same else 40_000  # the area wants 4096 more than 32 blocks
    program = (
        "import resource, signal, sys\n"
        "from csvfast.measure import TargetError, format_verity\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: format_verity(sys.argv[1], sys.argv[2], hash_offset={len(data) if same else 0})\n"
        "except TargetError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data", target],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"{target}: the hash area cannot be written: File too large" in answer.stdout
    assert names(tmp_path) == ["data"]
    assert (tmp_path / "data").read_bytes() == data


def test_data_changed_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "data", 30 << 20)
    calls = 0

    def touch(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        with (tmp_path / "data").open("ab") as file:
            file.write(b"x")

    with pytest.raises(SourceChangedError):
        format_verity(tmp_path / "data", tmp_path / "area", progress=touch)
    assert calls
    assert names(tmp_path) == ["data"]


# ---- Verify ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def formatted(tmp_path: Path) -> bytes:
    write(tmp_path / "data", 400 * 4096)
    return format_verity(tmp_path / "data", tmp_path / "area", salt=SALT).root_hash


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("block", [0, 127, 128, 399])
def test_wrong_data(tmp_path: Path, formatted: bytes, block: int) -> None:
    flip(tmp_path / "data", block * 4096 + 77)
    check = verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    assert not check.ok
    assert check.bad_data_blocks == 1
    assert f"the first is block {block} at byte {block * 4096}" in check.problems[0]
    assert "root hash" in check.problems[1]


def test_several_wrong_blocks(tmp_path: Path, formatted: bytes) -> None:
    for block in (5, 6, 300):
        flip(tmp_path / "data", block * 4096)
    check = verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    assert check.bad_data_blocks == 3
    assert "3 of 400 data blocks" in check.problems[0]


@pytest.mark.parametrize(("offset", "where"), [(4096 + 5, 4096), (4096 + 4000, 4096), (5 * 4096 + 4095, 5 * 4096)])
def test_wrong_hash_block(tmp_path: Path, formatted: bytes, offset: int, where: int) -> None:
    # Entries of the top block, its padding, and the padding of the last block of level 0.
    flip(tmp_path / "area", offset)
    check = verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    assert check.root_hash == formatted
    assert check.problems == (f"the hash block at byte {where} of the hash area's file does not match the data",)


def test_wrong_leaf(tmp_path: Path, formatted: bytes) -> None:
    flip(tmp_path / "area", 2 * 4096 + 130 * 32)
    check = verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    assert not check.ok
    assert "the first is block 130" in check.problems[0]


def test_wrong_root(tmp_path: Path, formatted: bytes) -> None:
    check = verify_verity(tmp_path / "data", tmp_path / "area", bytes(32))
    assert check.problems == (f"the root hash is {formatted.hex()}; expected {bytes(32).hex()}",)


def test_wrong_salt_in_the_superblock(tmp_path: Path, formatted: bytes) -> None:
    flip(tmp_path / "area", 88)
    check = verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    assert not check.ok
    assert check.bad_data_blocks == 400


def test_short_files(tmp_path: Path, formatted: bytes) -> None:
    os.truncate(tmp_path / "area", 4096 * 5)
    with pytest.raises(SourceTruncatedError, match="area: has 20480 bytes; expected 24576 for the hash area"):
        verify_verity(tmp_path / "data", tmp_path / "area", formatted)
    format_verity(tmp_path / "data", tmp_path / "area", salt=SALT)
    os.truncate(tmp_path / "data", 399 * 4096)
    with pytest.raises(SourceTruncatedError, match="data: has 1634304 bytes; expected 1638400"):
        verify_verity(tmp_path / "data", tmp_path / "area", formatted)


def test_root_hash_length(tmp_path: Path, formatted: bytes) -> None:
    with pytest.raises(ParameterError, match="root hash has 31 bytes; expected 32"):
        verify_verity(tmp_path / "data", tmp_path / "area", formatted[:-1])


@given(st.integers(0, 5 * 4096 - 1), st.booleans())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, in_area: bool) -> None:
    folder = tmp_path_factory.mktemp("flip")
    write(folder / "data", 5 * 4096)
    root = format_verity(folder / "data", folder / "area", salt=SALT).root_hash
    # (the superblock's own page holds fields, such as the UUID, that no hash covers)
    target, offset = (folder / "area", 4096 + position % 4096) if in_area else (folder / "data", position)
    flip(target, offset)
    assert not verify_verity(folder / "data", folder / "area", root).ok
