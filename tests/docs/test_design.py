"""What docs/design.md says about the rooms: an import only ever points down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")


def rooms() -> list[str]:
    """Top first, as the page lists them."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return re.findall(r"^    csvfast/(\w+) ", text, re.MULTILINE)


def imported(path: Path) -> set[str]:
    """Rooms that a module imports anywhere, functions included; imports for types alone count, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("csvfast.")}
    return found


def test_every_room_is_listed() -> None:
    folders = {path.parent.name for path in (ROOT / "csvfast").glob("*/__init__.py")}
    assert set(rooms()) == folders | {"_core"}


@pytest.mark.parametrize("room", rooms())
def test_imports_point_down(room: str) -> None:
    order = rooms()
    above = set(order[: order.index(room)])
    for path in sorted((ROOT / "csvfast" / room).rglob("*.py")):
        assert not imported(path) & above, path


def test_verification_does_not_import_the_simulation() -> None:
    for room in ("attest", "report", "certs"):
        for path in (ROOT / "csvfast" / room).glob("*.py"):
            assert "processor" not in imported(path), path
