"""Measured digests as reference values, in the form that reference value provider services take.

    {"version": "0.1.0", "type": "sample", "payload": base64 of a JSON object, name to list of values}

Launch digests are values of one name, "csv_measure" unless told otherwise: what policies compare a report's measurement with.
Every other row has a name of its own, made of the row's: characters that names cannot have become "_".

Source: confidential-containers/trustee rvps/src/lib.rs (message), rvps/src/extractors/sample (payload).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from typing import Final

from csvfast.measure.errors import ParameterError
from csvfast.measure.fleet.rows import Row

__all__ = ["LAUNCH_NAME", "reference_message", "reference_values"]

LAUNCH_NAME: Final = "csv_measure"
NAME_MAX: Final = 128
VALUES_MAX: Final = 10_000
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


def reference_values(rows: Iterable[Row], name: str | None = None) -> dict[str, list[str]]:
    """Name to digests, without repetition. name: one for all rows. Rows with errors, or that are not as expected, have none.

    Raises: ParameterError for a name that cannot be one, names that become the same, more than 10,000 of anything.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ParameterError(f"reference name is {name!r}; expected up to 128 letters, digits, '.', '_', '-'")
    values: dict[str, dict[str, None]] = {}
    owners: dict[str, str] = {}
    for row in rows:
        if not row.ok or row.digest is None:
            continue
        chosen = name or (LAUNCH_NAME if row.mode == "launch" else _name_of(row.name))
        owner = "" if name or row.mode == "launch" else row.name
        if owners.setdefault(chosen, owner) != owner:
            raise ParameterError(f"{row.name} and {owners[chosen]} would both be {chosen!r}; give one name for all")
        values.setdefault(chosen, {})[row.digest] = None
    if len(values) > VALUES_MAX or any(len(digests) > VALUES_MAX for digests in values.values()):
        raise ParameterError(f"there are more than {VALUES_MAX} reference values; expected fewer, or several messages")
    return {chosen: list(digests) for chosen, digests in values.items()}


def reference_message(rows: Iterable[Row], name: str | None = None) -> bytes:
    """The message that registers them. Raises ParameterError (also when there is nothing to register)."""
    values = reference_values(rows, name)
    if not values:
        raise ParameterError("nothing was measured; expected a digest to register")
    payload = base64.b64encode(json.dumps(values, separators=(",", ":")).encode()).decode()
    return json.dumps({"version": "0.1.0", "type": "sample", "payload": payload}, separators=(",", ":")).encode()


def _name_of(name: str) -> str:
    made = re.sub(r"[^A-Za-z0-9._-]+", "_", name, flags=re.ASCII).lstrip(".-")
    return made[-NAME_MAX:].lstrip(".-") or "_"
