"""Messages that docs/operations.md explains are the code's; tests that docs/security-model.md names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOLE = "\0"  # what an f-string fills in

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")


def texts() -> str:
    """Every text of the package's code, with holes, one in a line."""
    found = []
    for path in (ROOT / "csvfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def messages() -> list[str]:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page[page.index("## Trouble-shooting") :]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def test_messages_are_the_codes() -> None:
    said = texts()
    known = messages()
    assert len(known) >= 40
    for message in known:
        pieces = [piece.strip(" :();") for piece in re.split(r"\.\.\.|; expected", message)]
        pieces = [piece for piece in pieces if len(piece) > 3 and piece not in ("expected", "pip install")]
        assert pieces, message
        for piece in pieces:
            # A kind or step that stands before the reason is put there when the error is shown.
            tail = re.sub(r"^(?:executor|broker|image|policy|launch digest|report data|vm): ?", "", piece)
            tail = re.sub(r"^(?:vm): ", "", tail)
            assert tail in said, (message, tail)


def test_named_tests_exist() -> None:
    page = (ROOT / "docs" / "security-model.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(?:tests/)?([a-z0-9]+/test_\w+\.py)", page))
    assert len(files) >= 30
    for file in files:
        assert (ROOT / "tests" / file).is_file(), file
    for line in page.splitlines():
        beside = [ROOT / "tests" / file for file in re.findall(r"`(?:tests/)?([a-z0-9]+/test_\w+\.py)", line)]
        for name in re.findall(r"\b(test_\w+)\b(?!\.py)", line):
            assert any(f"def {name}(" in file.read_text(encoding="utf-8") for file in beside), name
