"""Rows as tables: CSV, Parquet (extra "parquet"), a pandas DataFrame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from csvfast._extras import need
from csvfast._files import final_target, temporary_beside, write_atomically
from csvfast.measure.errors import RecipeError, TargetError
from csvfast.measure.fleet.rows import Identity, Row
from csvfast.measure.source import AnyPath

__all__ = ["COLUMNS", "read_csv", "records", "to_dataframe", "write_csv", "write_parquet"]

COLUMNS: Final = (
    "name",
    "mode",
    "content",
    "options",
    "digest",
    "size",
    "error",
    "message",
    "expect",
    "uncovered",
    "location",
    "mtime_ns",
    "etag",
    "started",
    "seconds",
)
_NUMBERS: Final = ("size", "uncovered", "mtime_ns")
_TIMES: Final = ("started", "seconds")


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A dictionary of COLUMNS for each row; what is not there is None. started: seconds since the epoch."""
    return [{name: _value(row, name) for name in COLUMNS} for row in rows]


def write_csv(rows: Iterable[Row], path: AnyPath) -> None:
    """A table with a line of names, UTF-8, RFC 4180; names that are no text keep their bytes. Whole or not at all.

    Raises: TargetError.
    """
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    for record in records(rows):
        writer.writerow({name: "" if value is None else value for name, value in record.items()})
    try:
        write_atomically(Path(path), out.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_csv(text: str, name: str) -> list[Row]:
    """The rows of such a table. Raises RecipeError with the number of the line."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in ("name", "mode", "digest") if column not in (reader.fieldnames or ())]
    if missing:
        raise RecipeError(f"{name}: line 1: has no columns {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    rows = []
    try:
        for record in reader:
            data: dict[str, Any] = {key: value for key, value in record.items() if key in COLUMNS and value}
            for key in (*_NUMBERS, *_TIMES):
                if key in data:
                    data[key] = int(data[key]) if key in _NUMBERS else float(data[key])
            identity = Identity(data.get("size"), data.pop("mtime_ns", None), etag=data.pop("etag", None))
            rows.append(Row.from_json(data | {"identity": identity.to_json()}))
    except (csv.Error, ValueError) as error:
        raise RecipeError(f"{name}: line {reader.line_num}: {error}") from error
    return rows


def write_parquet(rows: Iterable[Row], path: AnyPath) -> None:
    """The same columns; bytes of names that are no text are written as \\xNN. Whole or not at all.

    Raises: TargetError, MissingExtraError.
    """
    need("parquet", "pyarrow")
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    columns: dict[str, Any] = {name: [] for name in COLUMNS}
    for record in records(rows):
        for name, value in record.items():
            columns[name].append(_text(value) if isinstance(value, str) else value)
    kinds = {name: pa.int64() for name in _NUMBERS} | {name: pa.float64() for name in _TIMES}
    table = pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()})
    target = final_target(Path(path))
    temporary = temporary_beside(target)
    try:
        pq.write_table(table, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TargetError(f"{path}: cannot be written: {error.strerror or error}") from error


def to_dataframe(rows: Iterable[Row]) -> Any:
    """A pandas DataFrame of COLUMNS, with `started` as a time in UTC; names as in Parquet. Raises MissingExtraError."""
    need("parquet", "pandas")
    import pandas as pd  # type: ignore[import-untyped]

    texts = [
        {name: _text(value) if isinstance(value, str) else value for name, value in record.items()} for record in records(rows)
    ]
    frame = pd.DataFrame(texts, columns=list(COLUMNS))
    frame["started"] = pd.to_datetime(frame["started"], unit="s", utc=True)
    for name in _NUMBERS:
        frame[name] = frame[name].astype("Int64")
    return frame


def _value(row: Row, name: str) -> Any:
    if name in ("mtime_ns", "etag"):
        return getattr(row.identity, name)
    value = getattr(row, name)
    return None if value == "" else value


def _text(value: str) -> str:
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
