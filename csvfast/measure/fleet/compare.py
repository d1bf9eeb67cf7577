"""Lists of measurements: reading them in any form, comparing two, measuring again what one says.

A list is a ledger, a CSV table, a signed statement, or lines of "digest  path" as sm3sum and `csvfast measure image` write them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csvfast.measure.errors import ParameterError, RecipeError, SourceNotFoundError, SourceUnreadableError
from csvfast.measure.fleet.ledger import read_ledger
from csvfast.measure.fleet.providers import provider_for
from csvfast.measure.fleet.rows import Item, Key, Options, Row, is_digest
from csvfast.measure.fleet.statement import PublicKey, open_statement
from csvfast.measure.fleet.table import read_csv
from csvfast.measure.source import AnyPath

__all__ = ["Comparison", "compare", "items_of", "read_list"]

LIST_MAX_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two lists. changed: (left, right) of rows with other digests or errors; each sorted by name."""

    added: tuple[Row, ...]
    removed: tuple[Row, ...]
    changed: tuple[tuple[Row, Row], ...]
    same: int

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not (self.added or self.removed or self.changed)


def compare(left: Iterable[Row], right: Iterable[Row]) -> Comparison:
    """Compares by name, mode, content and options. Errors are equal when they are of the same kind."""
    lefts: dict[Key, Row] = {row.key: row for row in left}
    rights: dict[Key, Row] = {row.key: row for row in right}
    changed = []
    for key, row in lefts.items():
        other = rights.get(key)
        if other is not None and (row.digest, row.error) != (other.digest, other.error):
            changed.append((row, other))
    both = sum(key in rights for key in lefts)
    return Comparison(
        tuple(sorted((row for key, row in rights.items() if key not in lefts), key=lambda row: row.key)),
        tuple(sorted((row for key, row in lefts.items() if key not in rights), key=lambda row: row.key)),
        tuple(sorted(changed, key=lambda pair: pair[0].key)),
        both - len(changed),
    )


def read_list(path: AnyPath, key: PublicKey | None = None, *, unsigned: bool = False) -> list[Row]:
    """The rows of a list in any of its forms. key: that a statement must be signed with. unsigned: other forms are taken although
    there is a key.

    Raises: SourceError, RecipeError, SignatureError; ParameterError for a statement without a key, and a key without a statement.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(LIST_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{name}: no such file") from error
    except OSError as error:
        raise SourceUnreadableError(f"{name}: cannot be read: {error.strerror or error}") from error
    if len(data) > LIST_MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {LIST_MAX_BYTES} bytes; expected a list of measurements")
    first = data.split(b"\n", 1)[0]
    if b'"payloadType"' in first or b'"payloadType"' in data[:4096]:
        if key is None:
            raise ParameterError(f"{name}: is a signed statement; expected the public key that it must be signed with")
        return open_statement(data, key, name)
    if key is not None and not unsigned:
        raise ParameterError(f"{name}: is not signed; expected a signed statement, because a key was given")
    if first.startswith(b"{\"csvfast\""):
        return list(read_ledger(path).values())
    try:
        text = data.decode("utf-8", "surrogateescape")
    except UnicodeDecodeError as error:  # pragma: no cover
        raise RecipeError(f"{name}: is no text") from error
    return read_csv(text, name) if text.startswith("name,") else _read_sums(text, name)


def items_of(rows: Iterable[Row]) -> list[Item]:
    """What to measure again, each expecting the digest of its row. Rows without one are left out."""
    return [
        Item(
            row.name,
            row.location or row.name,
            row.mode,
            row.content,
            Options.parse(row.options),
            provider_for(row.location or row.name),
            expect=row.digest,
        )
        for row in rows
        if row.digest is not None
    ]


def _read_sums(text: str, name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        escaped = line.startswith("\\")
        digest, gap, path = line[escaped : escaped + 64], line[escaped + 64 : escaped + 66], line[escaped + 66 :]
        if not is_digest(digest) or gap not in ("  ", " *") or not path:
            raise RecipeError(
                f"{name}: line {number}, column 1: is no line of digest, two spaces and path; expected that, or a ledger, a CSV "
                f"table or a statement"
            )
        if escaped:
            path = path.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r").replace("\0", "\\")
        rows.append(Row(path, "linear", digest=digest))
    if not rows:
        raise RecipeError(f"{name}: is empty; expected a list of measurements")
    return rows
