"""Fuzz targets of fleets: virtual disks, and the lists and manifests that people edit."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path

from csvfast.measure import Identity, RecipeError, Row, Selection
from csvfast.measure.errors import FormatError
from csvfast.measure.fleet.compare import compare, items_of, read_list
from csvfast.measure.fleet.discover import read_manifest
from csvfast.measure.fleet.ledger import HEADER
from csvfast.measure.fleet.qcow2 import open_disk
from csvfast.measure.fleet.table import write_csv
from fuzz.target import Target

__all__ = ["DiskTarget", "ListTarget", "ManifestTarget"]

_VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "qcow2.json").read_text(encoding="utf-8"))
_ROWS = [
    Row("a", "linear", digest="0" * 64, size=3, identity=Identity(3, 1, 2, 3, 4), started=1.5, seconds=0.25, worker="w"),
    Row("b", "verity", options="salt=00 block_bytes=512", digest="1" * 64, uncovered=3, expect="1" * 64, location="c"),
    Row("d", "tree", "disk", error="changed", message="it did"),
]


class _Bytes:
    """A Readable that gives nothing outside of itself."""

    path = "fuzz"
    identity = Identity()

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read_at(self, buffer: memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.size
        buffer[:] = self._data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


def _file(owner: object) -> Path:
    folder = tempfile.mkdtemp(prefix="csvfast-fuzz-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder, "input")


class DiskTarget(Target):
    """qcow2 images: nothing outside the file is read, and two reads of the same bytes agree."""

    learn_max = 1 << 17

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [gzip.decompress(base64.b64decode(text)) for text in _VECTORS["images"].values()]

    def handle(self, data: bytes) -> Hashable:
        try:
            disk = open_disk(_Bytes(data))
            whole, part = bytearray(min(disk.size, 1 << 17)), bytearray(min(disk.size, 5000))
            disk.read_at(memoryview(whole), 0)
            disk.read_at(memoryview(part), len(whole) - len(part))
        except FormatError as error:
            return "".join(letter for letter in str(error)[:60] if letter.isalpha())
        assert whole[len(whole) - len(part) :] == part
        return type(disk).__name__, len(whole) // 4096


class ListTarget(Target):
    """Ledgers, tables and sums: what is read equals itself, and can be measured again."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self._path = _file(self)
        write_csv(_ROWS, self._path)
        lines = json.dumps(HEADER, separators=(",", ":")) + "\n" + "".join(row.to_line() for row in _ROWS)
        self.seeds = [lines.encode(), self._path.read_bytes(), f"{'0' * 64}  a\n\\{'1' * 64}  b\\n\n".encode()]

    def handle(self, data: bytes) -> Hashable:
        self._path.write_bytes(data)
        rows = read_list(self._path)
        assert compare(rows, rows).equal
        assert all(Row.from_json(json.loads(row.to_line())).facts == row.facts for row in rows)
        return len(items_of(rows)) > 1


class ManifestTarget(Target):
    """Manifests: what is refused is refused with a line."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self._path = _file(self)
        self.seeds = [
            b'# images\na\n  b c\n{"source": "d", "name": "e", "mode": "verity", "salt": "00ff", "block_bytes": 512}\n'
            + json.dumps({"source": "f", "content": "disk", "expect": "0" * 64}).encode()
        ]

    def handle(self, data: bytes) -> Hashable:
        self._path.write_bytes(data)
        try:
            return len(read_manifest(self._path, Selection())) > 1
        except RecipeError as error:
            message = str(error)
        assert ": line " in message
        return "".join(letter for letter in message.partition("column")[2][:50] if letter.isalpha())
