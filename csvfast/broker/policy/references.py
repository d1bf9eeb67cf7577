"""Reference values: what administrators say measurements, chips and versions should be, and until when that holds.

A reference is a name and a list of JSON values, any of which is right. The list [{"single": value}] is one value that was
registered by itself: the same for rules, but policies in Rego see the value and not a list. A reference expires, a year after it
was registered unless told otherwise; from then on it is worth nothing, but it is not forgotten: a rule that must hold "when
registered" fails on an expired reference.

The message that registers references is that of CoCo's reference value provider service (RVPS):

    {"version": "0.1.0", "type": "sample", "payload": base64 of a JSON object, name to value or list of values}

Source: confidential-containers/trustee rvps/src/lib.rs (message), rvps/src/extractors/sample (payload),
rvps/src/reference_value.rs (the stored form and its 12 months). The reference service hands out values whether they have expired
or not; here they fail.
Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, Protocol

from csvfast.broker.json_input import loads
from csvfast.errors import FormatError

__all__ = [
    "MESSAGE_LIMIT",
    "VALUES_LIMIT",
    "Reference",
    "ReferenceLike",
    "References",
    "a_year_after",
    "build_message",
    "parse_message",
    "stored_form",
]

MESSAGE_LIMIT: Final = 2 << 20
"""Bytes of a message."""

VALUES_LIMIT: Final = 10_000
"""Values of one reference, and references of one message."""

_VERSION: Final = "0.1.0"
_STRUCTURE: Final = "reference value message"
_SINGLE: Final = "single"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z", re.ASCII)
_MEMBERS: Final = ("version", "type", "payload")


class ReferenceLike(Protocol):
    """What References takes: rows of a store, or Reference objects."""

    @property
    def values(self) -> Sequence[Any]: ...  # noqa: D102

    @property
    def expires(self) -> float | None: ...  # noqa: D102


class Reference:
    """The values of one name.

    values    JSON values as they are stored, in the order in which they were registered
    expires   seconds since the epoch from which on they are worth nothing; None: never
    single    True for one value that was registered by itself
    items     the values that are right: `values`, without the wrapping of a single one
    """

    __slots__ = ("_others", "_texts", "expires", "items", "single", "values")
    values: Final[tuple[Any, ...]]
    expires: Final[float | None]
    single: Final[bool]
    items: Final[tuple[Any, ...]]

    def __init__(self, values: Sequence[Any], expires: float | None = None) -> None:
        self.values = tuple(values)
        self.expires = None if expires is None else float(expires)
        first = self.values[0] if len(self.values) == 1 else None
        self.single = isinstance(first, Mapping) and first.keys() == {_SINGLE}
        self.items = (first[_SINGLE],) if isinstance(first, Mapping) and self.single else self.values
        self._texts: Final = frozenset(value for value in self.items if type(value) is str)
        self._others: Final = frozenset((type(value), value) for value in self.items if type(value) in (int, bool))

    @classmethod
    def of(cls, value: Any, expires: float | None = None) -> Reference:
        """For what a message or an administrator gives: a list of values, or a value by itself."""
        return cls(value if isinstance(value, list) else ({_SINGLE: value},), expires)

    def has(self, value: Any) -> bool:
        """Whether a text, an integer or a boolean is among these; true is not 1. Nothing else ever is, null least of all."""
        if type(value) is str:
            return value in self._texts
        return type(value) in (int, bool) and (type(value), value) in self._others

    def has_expired(self, now: float) -> bool:
        """Whether it is worth nothing at `now`, seconds since the epoch."""
        return self.expires is not None and not now < self.expires

    def for_rego(self) -> Any:
        """What query_reference_value answers."""
        return self.items[0] if self.single else list(self.items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference):
            return NotImplemented
        return (self.values, self.expires) == (other.values, other.expires)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Reference({list(self.values)!r}, {self.expires!r})"


class References(Mapping[str, Reference]):
    """All references of one moment, by name. Expired ones are among them; whoever relies on one asks `has_expired`."""

    __slots__ = ("_references", "find")
    find: Final[Callable[[str], Reference | None]]
    """As `get`, without its detours: policies look up several references a decision."""

    def __init__(self, references: Mapping[str, ReferenceLike] | None = None) -> None:
        self._references: Final = {
            name: one if isinstance(one, Reference) else Reference(one.values, one.expires)
            for name, one in (references or {}).items()
        }
        self.find = self._references.get

    def __getitem__(self, name: str) -> Reference:
        return self._references[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)

    def for_rego(self, now: float) -> tuple[dict[str, Any], float | None]:
        """The references that have not expired, and when the first of them will."""
        current = {name: one for name, one in self._references.items() if not one.has_expired(now)}
        until = min((one.expires for one in current.values() if one.expires is not None), default=None)
        return {name: one.for_rego() for name, one in current.items()}, until


def parse_message(data: bytes, now: float) -> dict[str, Reference]:
    """The references of an RVPS message, each expiring a year after `now`.

    RequestError: not JSON, or JSON that can be read in two ways. FormatError: no such message, or a payload of another type than
    "sample", which is the one whose content is not signed by anybody but the administrator who sends it.
    """
    message = loads(data, _STRUCTURE, limit=MESSAGE_LIMIT)
    if not isinstance(message, dict):
        _refuse("message", type(message).__name__, "an object")
    for name in message:
        if name not in _MEMBERS:
            _refuse("message", "an unknown member", f"the members {', '.join(_MEMBERS)}")
    if message.get("version", _VERSION) != _VERSION:
        _refuse("version", _shown(message["version"]), _VERSION)
    if message.get("type") != "sample":
        _refuse("type", _shown(message.get("type")), "sample")
    encoded = message.get("payload")
    if not isinstance(encoded, str):
        _refuse("payload", type(encoded).__name__, "base64 text")
    try:
        payload = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        _refuse("payload", "other characters or padding", "base64 (RFC 4648 section 4)")
    values = loads(payload, f"{_STRUCTURE}: payload", limit=MESSAGE_LIMIT)
    if not isinstance(values, dict) or not 1 <= len(values) <= VALUES_LIMIT:
        _refuse("payload", type(values).__name__, f"an object of 1 to {VALUES_LIMIT} names")
    expires = a_year_after(now)
    return {name: _reference(name, value, expires) for name, value in values.items()}


def build_message(values: Mapping[str, Any]) -> bytes:
    """The RVPS message that registers these: name to value, or to a list of values."""
    payload = base64.b64encode(json.dumps(values, separators=(",", ":"), allow_nan=False).encode()).decode()
    return json.dumps({"version": _VERSION, "type": "sample", "payload": payload}, separators=(",", ":")).encode()


def stored_form(name: str, reference: ReferenceLike) -> dict[str, Any]:
    """A reference as trustee stores it: version, name, expiration, value. Without expiration when it never expires."""
    taken = References({name: reference})[name]
    result = {"version": _VERSION, "name": name, "value": taken.for_rego()}
    if taken.expires is not None:
        result["expiration"] = datetime.fromtimestamp(taken.expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return result


def a_year_after(now: float) -> float:
    """The same day and time 12 months later (28 February after the 29th), UTC, whole seconds; both since the epoch."""
    moment = datetime.fromtimestamp(int(now), UTC)
    try:
        later = moment.replace(year=moment.year + 1)
    except ValueError:
        later = moment.replace(year=moment.year + 1, day=28)
    return later.timestamp()


def _reference(name: str, value: Any, expires: float) -> Reference:
    if not _NAME.match(name):
        _refuse("payload", "a name of other characters", "names of up to 128 letters, digits, '.', '_', '-'")
    if value is None:
        _refuse(name, "null", "a value or a list of values")
    if isinstance(value, list) and not 1 <= len(value) <= VALUES_LIMIT:
        _refuse(name, f"{len(value)} values", f"1 to {VALUES_LIMIT}")
    return Reference.of(value, expires)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(field: str, found: str, expected: str) -> NoReturn:
    raise FormatError(_STRUCTURE, field, None, found, expected) from None
