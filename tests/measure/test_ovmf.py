"""The GUID table of firmware images: good ones, and each field wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import ovmf_images as ovmf

from csvfast.measure import (
    EmptySourceError,
    FirmwareTableError,
    GuidTable,
    HashTableArea,
    HashTableAreaError,
    ResetBlockError,
    SourceKindError,
    parse_guid_table,
)
from csvfast.measure.source import Source

OTHER = UUID("11111111-2222-3333-4444-555555555555")


def table_of(path: Path, content: bytes) -> GuidTable:
    path.write_bytes(content)
    with Source(path) as source:
        return GuidTable.read(source)


def test_good_image(tmp_path: Path) -> None:
    table = table_of(tmp_path / "fw", ovmf.good())
    assert table.hash_table_area() == HashTableArea(*ovmf.AREA)
    assert table.reset_address() == ovmf.RESET_ADDRESS
    assert set(table.entries) == {ovmf.HASH_AREA, ovmf.RESET_BLOCK, ovmf.SECRET_AREA}


def test_table_in_a_large_image(tmp_path: Path) -> None:
    assert table_of(tmp_path / "fw", ovmf.good(size=4 << 20)).reset_address() == ovmf.RESET_ADDRESS


def test_largest_table(tmp_path: Path) -> None:
    fill = 0xFFFF - 18 - 26 - 18
    content = ovmf.image(
        ovmf.entry(OTHER, bytes(fill)), ovmf.entry(ovmf.HASH_AREA, struct.pack("<II", *ovmf.AREA)), size=1 << 20
    )
    table = table_of(tmp_path / "fw", content)
    assert len(table.entries[OTHER]) == fill
    assert table.hash_table_area().base == ovmf.AREA[0]


def test_empty_table() -> None:
    assert parse_guid_table(ovmf.image()) == {}


def test_image_that_is_only_a_table() -> None:
    content = ovmf.image(ovmf.entry(OTHER, b"data"))
    assert parse_guid_table(content[-(32 + 18 + 22) :]) == {OTHER: b"data"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(49), "image has 49 bytes; expected at least 50"),
        (bytes(4096), f"no GUID table: {UUID(int=0)} stands where the footer"),
        (ovmf.image(footer=OTHER), f"no GUID table: {OTHER} stands"),
        (ovmf.image(total=17), "says it has 17 bytes; expected 18 to"),
        (ovmf.image(total=0), "says it has 0 bytes"),
        (ovmf.image(size=1000, total=969), "says it has 969 bytes; expected 18 to 968"),
        (ovmf.image(total=18 + 17), "17 bytes left over, 50 from the end"),
        (
            ovmf.image(ovmf.entry(OTHER, b"abcd", length=17)),
            f"entry {OTHER}, 50 from the end of the image, says it has 17 bytes",
        ),
        (ovmf.image(ovmf.entry(OTHER, b"abcd", length=23)), "says it has 23 bytes; expected 18 to 22"),
        (ovmf.image(ovmf.entry(OTHER, b"abcd", length=0)), "says it has 0 bytes; expected 18"),
        (ovmf.image(ovmf.entry(OTHER, b"abcd", length=21)), "1 bytes left over, 71 from the end"),
        (ovmf.image(ovmf.entry(OTHER, b"a"), ovmf.entry(OTHER, b"b")), f"holds {OTHER} more than once"),
        (ovmf.image(ovmf.entry(ovmf.FOOTER, b"a")), "more than once"),
    ],
)
def test_broken_table(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FirmwareTableError, match=message):
        parse_guid_table(content)
    with pytest.raises(FirmwareTableError, match="fw: "):
        table_of(tmp_path / "fw", content)


def area_entry(data: bytes) -> bytes:
    return ovmf.image(ovmf.entry(ovmf.HASH_AREA, data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ovmf.image(), f"has no hash table area \\({ovmf.HASH_AREA}\\)"),
        (area_entry(struct.pack("<II", 0, 0)), r"is empty \(base 0x0, size 0\)"),
        (area_entry(struct.pack("<II", 0, 1024)), r"is empty \(base 0x0, size 1024\)"),
        (area_entry(struct.pack("<II", 4096, 0)), r"is empty \(base 0x1000, size 0\)"),
        (area_entry(struct.pack("<II", 4096, 175)), "has 175 bytes; expected at least 176"),
        (area_entry(struct.pack("<II", 0xFFFFFFFF, 176)), "ends at 0x1000000af; expected at most 0x100000000"),
        (area_entry(b"seven.."), "has 7 bytes of data; expected 8"),
        (area_entry(b"nine....."), "has 9 bytes of data; expected 8"),
    ],
)
def test_hash_table_area_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    table = table_of(tmp_path / "fw", content)
    with pytest.raises(HashTableAreaError, match=message) as caught:
        table.hash_table_area()
    assert "fw" in str(caught.value)


def test_smallest_area(tmp_path: Path) -> None:
    content = area_entry(struct.pack("<II", (1 << 32) - 176, 176))
    assert table_of(tmp_path / "fw", content).hash_table_area().size == 176


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ovmf.image(), "has no SEV-ES reset block"),
        (ovmf.image(ovmf.entry(ovmf.RESET_BLOCK, bytes(4))), "holds address 0"),
        (ovmf.image(ovmf.entry(ovmf.RESET_BLOCK, b"abc")), "has 3 bytes of data; expected 4"),
        (ovmf.image(ovmf.entry(ovmf.RESET_BLOCK, b"abcde")), "has 5 bytes of data; expected 4"),
    ],
)
def test_reset_block_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ResetBlockError, match=message):
        table_of(tmp_path / "fw", content).reset_address()


def test_empty_image(tmp_path: Path) -> None:
    with pytest.raises(EmptySourceError, match="is empty; expected a firmware image"):
        table_of(tmp_path / "fw", b"")


def test_stream() -> None:
    import os

    reader, writer = os.pipe()
    os.close(writer)
    try:
        with Source(f"/proc/self/fd/{reader}") as source, pytest.raises(SourceKindError, match="is a stream"):
            GuidTable.read(source)
    finally:
        os.close(reader)


def check_any(content: bytes) -> None:
    """Whatever the bytes: entries that lie inside the image, or one clear error."""
    try:
        entries = parse_guid_table(content)
    except FirmwareTableError:
        return
    assert sum(len(data) + 18 for data in entries.values()) + 18 + 32 <= len(content)
    assert all(data in content for data in entries.values())


@given(st.binary(max_size=300))
@example(b"")
def test_never_crashes_on_bytes(tail: bytes) -> None:
    check_any(tail)


@given(st.binary(max_size=300), st.integers(0, 65535))
def test_never_crashes_behind_a_right_footer(body: bytes, total: int) -> None:
    check_any(body + ovmf.entry(ovmf.FOOTER, b"", length=total) + bytes(32))


@given(st.integers(0, 200), st.integers(0, 255))
def test_never_crashes_on_a_damaged_image(position: int, value: int) -> None:
    content = bytearray(ovmf.good(size=512))
    content[-1 - position] = value
    check_any(bytes(content))


@given(st.lists(st.tuples(st.uuids(), st.binary(max_size=60)), max_size=8, unique_by=lambda item: item[0]))
def test_round_trip(entries: list[tuple[UUID, bytes]]) -> None:
    content = ovmf.image(*(ovmf.entry(guid, data) for guid, data in entries))
    assert parse_guid_table(content) == dict(entries)
