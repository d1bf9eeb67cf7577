"""Snapshots: whole and verified, or refused; never a key; never half a file."""

from __future__ import annotations

import json
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast import EncryptedMemory, errors, sm3, sm3_blocks
from csvfast.memory import inspect, snapshot

KEY = bytes(range(32))
SIZE = 20 * 4096


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "snapshot"
    with EncryptedMemory(SIZE, standard="ieee", base_address=0x10000) as memory:
        memory.install(3, KEY)
        memory.write(0x11234, b"guest data", 3)
        memory.write(0x10000, b"host data", 0)
        memory.save(path)
    return path


def test_restore_into_the_same_and_into_a_new_memory(saved):
    with EncryptedMemory.from_snapshot(saved) as memory:
        assert (memory.size, memory.standard, memory.base_address) == (SIZE, "ieee", 0x10000)
        assert memory.read(0x10000, 9, 0) == b"host data"
        memory.install(9, KEY)
        assert memory.read(0x11234, 10, 9) == b"guest data"
        memory.write(0x11234, b"later data", 9)
        shape = memory.restore(saved)
        assert shape.generations == {3: 1}
        assert memory.read(0x11234, 10, 9) == b"guest data"


def test_holds_ciphertext_and_no_key(saved):
    content = saved.read_bytes()
    assert b"guest data" not in content
    assert KEY not in content
    assert KEY[:16] not in content
    assert saved.stat().st_mode & 0o777 == 0o600


def test_documented_layout(saved):
    content = saved.read_bytes()
    magic, version, zero, length = struct.unpack_from("<16sIIQ", content)
    assert (magic, version, zero) == (b"CSVFAST SNAPSHOT", 1, 0)
    text = json.loads(content[64 : 64 + length])
    assert (text["size"], text["base_address"], text["standard"]) == (SIZE, 0x10000, "ieee")
    assert len(content) == 4096 + SIZE
    digest = sm3(content[:32] + content[64:4096] + sm3_blocks(content[4096:]))
    assert content[32:64] == digest.digest()
    assert inspect(saved).size == SIZE


def test_every_damaged_byte_is_found_and_nothing_restored(saved):
    content = saved.read_bytes()
    header = struct.unpack_from("<Q", content, 24)[0] + 64
    with EncryptedMemory(SIZE, standard="ieee", base_address=0x10000) as memory:
        for place in [*range(header), 4095, 4096, 4096 + 5000, len(content) - 1]:
            damaged = bytearray(content)
            damaged[place] ^= 0x01
            saved.write_bytes(damaged)
            with pytest.raises(errors.SnapshotError):
                memory.restore(saved)
            assert not memory.raw.any()


@pytest.mark.parametrize("length", [0, 1, 63, 64, 4095, 4096, 4097, 4096 + SIZE - 1])
def test_truncated(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(errors.SnapshotError):
        EncryptedMemory.from_snapshot(saved)


def test_longer(saved):
    with saved.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(errors.SnapshotError, match=f"has {4097 + SIZE} bytes; expected {4096 + SIZE}"):
        EncryptedMemory.from_snapshot(saved)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"standard": "gb", "base_address": 0x10000}, "standard"),
        ({"standard": "ieee", "base_address": 0}, "base_address"),
        ({"standard": "ieee", "base_address": 0x10000, "tweak_model": "line"}, "tweak_model"),
    ],
)
def test_other_shape_is_refused(saved, options, word):
    with (
        EncryptedMemory(SIZE, **options) as memory,
        pytest.raises(errors.SnapshotError, match=f"taken of a memory with {word}"),
    ):
        memory.restore(saved)


def test_other_size_is_refused(saved):
    with (
        EncryptedMemory(SIZE * 2, standard="ieee", base_address=0x10000) as memory,
        pytest.raises(errors.SnapshotError, match=f"size {SIZE}"),
    ):
        memory.restore(saved)


@given(text=st.binary(max_size=200))
def test_any_header_text_is_refused_with_one_exception(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("header") / "snapshot"
    rest = -(64 + len(text)) % 4096
    path.write_bytes(struct.pack("<16sIIQ", b"CSVFAST SNAPSHOT", 1, 0, len(text)) + bytes(32) + text + bytes(rest))
    with pytest.raises(errors.SnapshotError):
        inspect(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 0), ("size", 5000), ("size", -4096), ("size", "4096"), ("size", True),
     ("base_address", 1 << 64), ("base_address", None),
     ("standard", "other"), ("standard", 1), ("tweak_model", ["xts"]), ("generations", [1]), ("generations", {"x": 1})],
)  # fmt: skip
def test_one_wrong_field(tmp_path, field, value):
    shape = {"size": 4096, "base_address": 0, "standard": "gb", "tweak_model": "xts", "generations": {}}
    text = json.dumps(shape | {field: value}).encode()
    path = tmp_path / "snapshot"
    path.write_bytes(
        struct.pack("<16sIIQ", b"CSVFAST SNAPSHOT", 1, 0, len(text))
        + bytes(32)
        + text.ljust(4096 - 64, b"\0")
        + bytes(4096)
    )
    with pytest.raises(errors.SnapshotError):
        EncryptedMemory.from_snapshot(path)


def test_huge_claims_are_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "snapshot"
    path.write_bytes(struct.pack("<16sIIQ", b"CSVFAST SNAPSHOT", 1, 0, 1 << 60) + bytes(8192))
    with pytest.raises(errors.SnapshotError, match="header claims"):
        inspect(path)


def test_failed_save_leaves_the_old_file_and_no_other(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with EncryptedMemory(4096) as memory:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            memory.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["snapshot"]


def test_save_into_a_missing_folder(tmp_path):
    with EncryptedMemory(4096) as memory, pytest.raises(FileNotFoundError):
        memory.save(tmp_path / "none" / "snapshot")


def test_many_asids_need_a_longer_header(tmp_path):
    path = tmp_path / "snapshot"
    with EncryptedMemory(4096) as memory:
        for asid in range(1, 510):
            memory.install(asid)
        memory.save(path)
        assert len(snapshot.inspect(path).generations) == 509
        assert path.stat().st_size > 8192
        memory.restore(path)
