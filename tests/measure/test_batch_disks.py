"""The content of virtual disks: images made by qemu-img, refusals, and images with anything wrong in them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from csvfast.measure import FormatError, Item, SourceError, batch
from csvfast.measure.fleet.providers import open_item
from csvfast.measure.fleet.qcow2 import DISK_MAX_BYTES, Qcow2

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "qcow2.json").read_text())
IMAGES = {name: gzip.decompress(base64.b64decode(text)) for name, text in VECTORS["images"].items()}


def read(path: Path) -> bytes:
    source = open_item(Item("disk", str(path), content="disk"))
    try:
        data = bytearray(source.size)
        source.read_at(memoryview(data), 0)
        source.check_unchanged()
        return bytes(data)
    finally:
        source.close()


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("mode", ["linear", "tree"])
def test_what_a_machine_reads(tmp_path: Path, name: str, mode: Any) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(IMAGES[name])
    disk = read(path)
    assert len(disk) == VECTORS["disk_bytes"]
    assert hashlib.new("sm3", disk).hexdigest() == VECTORS["disk_sm3"]
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk)
    (wanted,) = [row.digest for row in batch([raw], mode=mode)]
    assert [row.digest for row in batch([raw, path], mode=mode, content="disk")] == [wanted, wanted]
    (row,) = batch([path], mode=mode)
    assert (row.size, row.digest == wanted) == (len(IMAGES[name]), False)


@pytest.mark.parametrize("name", IMAGES)
def test_any_part_of_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(IMAGES[name])
    whole = read(path)
    source = random.Random(2)
    disk = open_item(Item("disk", str(path), content="disk"))
    for _ in range(200):
        start = source.randrange(len(whole) + 1)
        data = bytearray(source.randrange(len(whole) - start + 1))
        disk.read_at(memoryview(data), start)
        assert data == whole[start : start + len(data)]
    with pytest.raises(FormatError, match="is read of a disk of"):
        disk.read_at(memoryview(bytearray(2)), len(whole) - 1)
    disk.close()


def changed(offset: int, form: str, *values: int, base: str = "version 3") -> bytes:
    data = bytearray(IMAGES[base])
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


REFUSED = {
    "a backing file": changed(8, ">QI", 0x200, 4),
    "version 4": changed(4, ">I", 4),
    r"clusters of 2\^8 bytes": changed(20, ">I", 8),
    r"clusters of 2\^22 bytes": changed(20, ">I", 22),
    "a disk of 18446744073709551615 bytes": changed(24, ">Q", (1 << 64) - 1),
    f"a disk of {DISK_MAX_BYTES + 1} bytes": changed(24, ">Q", DISK_MAX_BYTES + 1),
    "encryption method 2": changed(32, ">I", 2),
    "a first-level table of 0 entries": changed(36, ">I", 0),
    "a first-level table of 4294967295 entries": changed(36, ">I", (1 << 32) - 1),
    "first-level table at byte 1": changed(40, ">Q", 1),
    "first-level table of 8 bytes at byte 1099511627776": changed(40, ">Q", 1 << 40),
    "the mark of a corrupt image": changed(72, ">Q", 2),
    "an external data file": changed(72, ">Q", 4),
    "subclusters": changed(72, ">Q", 16),
    "incompatible features 0x20": changed(72, ">Q", 32),
    "compression type 0": changed(72, ">Q", 8),
    "a header of 96 bytes": changed(100, ">I", 96),
    "header of 72 bytes": IMAGES["version 3"][:40] or b"",
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(REFUSED[message])
    with pytest.raises(FormatError, match=message):
        read(path)
    (row,) = batch([path], content="disk")
    assert row.error == "format"


def test_other_formats_are_not_taken_for_raw(tmp_path: Path) -> None:
    for magic in (b"KDMV\1", b"vhdxfile", b"conectix", b"QED\0", b"LUKS\xba\xbe", b"QFI\0"):
        (tmp_path / "image").write_bytes(magic.ljust(600, b"\0"))
        (row,) = batch([tmp_path / "image"], content="disk")
        assert (row.error, "convert it" in str(row.message)) == ("format", True)
        (row,) = batch([tmp_path / "image"])
        assert row.ok
    (tmp_path / "image").write_bytes(b"")
    (row,) = batch([tmp_path / "image"], content="disk")
    assert (row.ok, row.size) == (True, 0)


@pytest.mark.parametrize("name", IMAGES)
def test_anything_wrong_ends_with_a_message(tmp_path: Path, name: str) -> None:
    """Bytes changed anywhere, tables most of all, and files cut off: an error that says so, or a disk; soon, and nothing else."""
    path = tmp_path / "image"
    source = random.Random(name)
    good = IMAGES[name]
    until = time.monotonic() + 1.0
    seen = {"disk": 0, "error": 0}
    for _ in range(400):
        data = bytearray(good)
        for _ in range(source.choice((1, 1, 2, 8))):
            at = source.randrange(112) if source.random() < 0.3 else source.randrange(len(data)) & ~source.choice((0, 7))
            data[at] = source.choice((0, 1, 0x40, 0x7F, 0x80, 0xFF, source.randrange(256)))
        if source.random() < 0.1:
            del data[source.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            disk = open_item(Item("disk", str(path), content="disk"))
        except (FormatError, SourceError):
            seen["error"] += 1
            continue
        try:
            if isinstance(disk, Qcow2):
                buffer = bytearray(min(disk.size, 1 << 20))
                disk.read_at(memoryview(buffer), 0)
            seen["disk"] += 1
        except (FormatError, SourceError):
            seen["error"] += 1
        finally:
            disk.close()
        if time.monotonic() > until:
            break
    assert min(seen.values()) > 3, seen
