"""JSON from strangers: one document, read strictly or not at all.

Refused: more bytes than allowed, anything but UTF-8, a byte order mark, a member that stands twice, more than 32 levels, more
than 65,536 objects and arrays, numbers beyond what a double holds exactly, NaN and infinities, halves of surrogate pairs, text
after the document. No error repeats what was read, so none can repeat a secret.

Source: RFC 8259; RFC 7493 (I-JSON: unique members, numbers within 2**53, no lone surrogates).
Thread-safety: functions without state.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Final, NoReturn

from csvfast.errors import RequestError

__all__ = ["CONTAINER_LIMIT", "DEPTH_LIMIT", "INTEGER_LIMIT", "loads", "member", "members"]

DEPTH_LIMIT: Final = 32
"""Levels of objects and arrays in each other."""

CONTAINER_LIMIT: Final = 1 << 16
"""Objects and arrays of one document: each costs Python a hundred times its two characters, and nobody needs so many."""

INTEGER_LIMIT: Final = 1 << 53
"""Integers lie between minus this and this, exclusively: JCS and JavaScript know no others."""

# A string runs to its quote or to the end, so that the scan is linear whatever comes: no match is ever given up.
_TOKENS: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)
_LONG_NUMBER: Final = re.compile(r"[0-9]{16}")
_SURROGATE: Final = re.compile(r"\\u[dD][89abABcdefCDEF]")
_NAMES: Final = {dict: "an object", list: "an array", str: "a string", int: "an integer", float: "a number", bool: "a boolean"}
_NAMES[NoneType] = "null"


def loads(data: bytes, what: str, *, limit: int) -> Any:
    """The value of one JSON document.

    In: data    the document, UTF-8
        what    how errors call it, e.g. "attestation request"
        limit   bytes allowed
    RequestError says what was wrong, where, and what was expected.
    """
    if len(data) > limit:
        raise RequestError(f"{what}: {len(data)} bytes; expected at most {limit}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what}: byte {error.start} is not UTF-8; expected JSON in UTF-8") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT:
        _check_shape(text, what)
    long_number = _LONG_NUMBER.search(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise RequestError(f"{what}: a member stands twice in one object; expected each once")
        return result

    def integer(digits: str) -> int:
        # The length first: Python takes quadratic time for thousands of digits.
        if len(digits) > 17 or not -INTEGER_LIMIT < (value := int(digits)) < INTEGER_LIMIT:
            raise RequestError(f"{what}: an integer of {len(digits)} characters; expected one within 2**53")
        return value

    def number(digits: str) -> float:
        if len(digits) > 64 or not math.isfinite(value := float(digits)):
            raise RequestError(f"{what}: a number of {len(digits)} characters; expected one that a double can hold")
        return value

    def constant(_name: str) -> NoReturn:
        raise RequestError(f"{what}: NaN or an infinity; expected a number")

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=number,
            parse_constant=constant,
            # Evidence holds ten thousand small numbers; only documents with long ones pay for a call each.
            parse_int=integer if long_number else None,
        )
    except json.JSONDecodeError as error:
        raise RequestError(f"{what}: no JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise RequestError(f"{what}: nested too deep; expected at most {DEPTH_LIMIT} levels") from None
    if _SURROGATE.search(text):
        _check_text(value, what)
    return value


def member(document: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    """A member that must be there and of that JSON type (dict, list, str, int, float, bool). RequestError."""
    if name not in document:
        raise RequestError(f"{what}: {name} is missing; expected {_NAMES[kind]}")
    value = document[name]
    if type(value) is not kind:
        raise RequestError(f"{what}: {name} is {_NAMES[type(value)]}; expected {_NAMES[kind]}")
    return value


def members(value: Any, what: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> dict[str, Any]:
    """An object with these members and no others; absent optional ones are left out. RequestError."""
    if type(value) is not dict:
        raise RequestError(f"{what}: {_NAMES[type(value)]}; expected an object")
    for name, kind in required.items():
        member(value, name, kind, what)
    for name, kind in (optional or {}).items():
        if name in value:
            member(value, name, kind, what)
    known = required.keys() | (optional or {}).keys()
    if value.keys() - known:
        raise RequestError(f"{what}: unknown members; expected only {', '.join(sorted(known))}")
    return value


def _check_shape(text: str, what: str) -> None:
    depth = count = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        if first == '"':
            continue
        if first in "[{":
            depth += 1
            count += 1
        else:
            depth -= 1
        if depth > DEPTH_LIMIT:
            raise RequestError(f"{what}: nested too deep at character {match.start()}; expected at most {DEPTH_LIMIT} levels")
        if count > CONTAINER_LIMIT:
            raise RequestError(f"{what}: too many objects and arrays; expected at most {CONTAINER_LIMIT}")


def _check_text(value: Any, what: str) -> None:
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{what}: half of a surrogate pair in a string; expected Unicode text") from None
    elif type(value) is dict:
        for name, below in value.items():
            _check_text(name, what)
            _check_text(below, what)
    elif type(value) is list:
        for below in value:
            _check_text(below, what)
