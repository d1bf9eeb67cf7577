"""One comparison of a rule: a claim, and what must be true of it. Each is compiled to a function once, when a policy is read.

Nothing holds of a claim that is absent, null or of another type than the comparison is made for: `not_equals` neither.

Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, NoReturn

from csvfast.broker.policy.patterns import ABSENT, claim_reader, pattern_matcher, version_key
from csvfast.broker.policy.references import VALUES_LIMIT, Reference, References
from csvfast.errors import FormatError

__all__ = ["FAILED", "FOREVER", "OPERATORS", "SKIPPED", "Check", "Condition", "either", "read_condition", "refuse", "shown"]

FOREVER: Final = math.inf
"""Answer of a check: holds, whatever the time."""

FAILED: Final = -1.0
"""Answer of a check: does not hold."""

SKIPPED: Final = -2.0
"""Answer of a check: does not apply."""

Check = Callable[[Mapping[str, Any], References, float], float]
"""Of a document, references and the time: FAILED, SKIPPED, or seconds since the epoch until which it holds."""

_Test = Callable[[Any], bool]
_STRUCTURE: Final = "policy"
_TEXT_LIMIT: Final = 1024
_SHOWN_VALUES: Final = 4
_SHOWN_CHARACTERS: Final = 160


class Condition(NamedTuple):
    """A claim compared.

    claim     its path, as written
    check     the comparison
    explain   for people: what is observed and what is expected
    """

    claim: str
    check: Check
    explain: Callable[[Mapping[str, Any], References, float], tuple[str, str]]


def refuse(field: str, found: str, expected: str) -> NoReturn:
    """FormatError about a member of a policy."""
    raise FormatError(_STRUCTURE, field, None, found, expected) from None


def shown(value: object) -> str:
    """A value for people, shortened: text as it is when it can be printed, null as "absent"."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = (value if value.isprintable() and value else ascii(value)) if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # thousands of digits, thousands of levels
        return type(value).__name__
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _listed(values: tuple[Any, ...]) -> str:
    text = " or ".join(map(shown, values[:_SHOWN_VALUES]))
    more = len(values) - _SHOWN_VALUES
    return f"{text} or one of {more} more" if more > 0 else text


# ---- Operators: from the value in the policy to a test of what is found, and to words.


def _equals(value: Any, path: str) -> tuple[_Test, str]:
    wanted, kind = _scalar(value, path), type(value)
    return lambda found: type(found) is kind and found == wanted, shown(value)


def _not_equals(value: Any, path: str) -> tuple[_Test, str]:
    unwanted, kind = _scalar(value, path), type(value)
    return lambda found: type(found) is kind and found != unwanted, f"anything but {shown(value)}"


def _in(value: Any, path: str) -> tuple[_Test, str]:
    if not isinstance(value, list) or not 1 <= len(value) <= VALUES_LIMIT:
        refuse(path, shown(value), "a list of at least one value")
    values = tuple(_scalar(one, f"{path}[{index}]") for index, one in enumerate(value))
    return Reference(values).has, _listed(values)


def _min(value: Any, path: str) -> tuple[_Test, str]:
    lowest = _integer(value, path)
    return lambda found: type(found) is int and found >= lowest, f"at least {lowest}"


def _max(value: Any, path: str) -> tuple[_Test, str]:
    highest = _integer(value, path)
    return lambda found: type(found) is int and found <= highest, f"at most {highest}"


def _masked(value: Any, path: str) -> tuple[_Test, str]:
    mask, wanted = _integer(value["mask"], f"{path}.mask"), _integer(value["value"], f"{path}.value")
    if mask <= 0:
        refuse(f"{path}.mask", str(mask), "an integer above 0")
    if wanted & ~mask:
        refuse(f"{path}.value", f"{wanted:#x}", f"no bit outside the mask {mask:#x}: it could never hold")
    return lambda found: type(found) is int and found & mask == wanted, f"{wanted:#x} under the mask {mask:#x}"


def _version_min(value: Any, path: str) -> tuple[_Test, str]:
    lowest = version_key(value)
    if lowest is None:
        refuse(path, shown(value), 'text of numbers with dots between them, e.g. "1.3"')
    return lambda found: (key := version_key(found)) is not None and key >= lowest, f"at least {value}"


def _matches(value: Any, path: str) -> tuple[_Test, str]:
    pattern = _text(value, path)
    fits = pattern_matcher(pattern)
    return lambda found: type(found) is str and fits(found), f"text like {pattern}"


_VALUE_OPERATORS: Final[Mapping[str, Callable[[Any, str], tuple[_Test, str]]]] = {
    "equals": _equals,
    "not_equals": _not_equals,
    "in": _in,
    "min": _min,
    "max": _max,
    "mask": _masked,
    "version_min": _version_min,
    "matches": _matches,
}


# ---- Operators whose value is a registered reference.


def _is_listed(found: Any, reference: Reference) -> bool:
    return reference.has(found)


def _at_least(found: Any, reference: Reference) -> bool:
    # A minimum of several values is the highest of them; one that is no integer spoils the reference.
    items = reference.items
    return type(found) is int and bool(items) and all(type(one) is int and found >= one for one in items)


def _at_least_version(found: Any, reference: Reference) -> bool:
    key = version_key(found)
    lowest = [version_key(one) for one in reference.items]
    return key is not None and bool(lowest) and all(one is not None and key >= one for one in lowest)


_REFERENCE_OPERATORS: Final[Mapping[str, tuple[Callable[[Any, Reference], bool], str]]] = {
    "reference": (_is_listed, "one of"),
    "min_reference": (_at_least, "at least"),
    "version_min_reference": (_at_least_version, "at least"),
}

OPERATORS: Final = (*_VALUE_OPERATORS, *_REFERENCE_OPERATORS)


def read_condition(members: Mapping[str, Any], path: str, *, may_be_optional: bool) -> Condition:
    """The condition in a table of a policy: `claim`, one operator, for references also `optional`. FormatError.

    In: members           the table, without members that are no part of a condition
        may_be_optional   False where a condition that is skipped would make no sense
    """
    claim = _text(members.get("claim"), f"{path}.claim")
    try:
        read = claim_reader(claim)
    except ValueError as error:
        refuse(f"{path}.claim", f"{shown(claim)}: {error}", "names with dots between them")
    operators = [name for name in members if name in OPERATORS]
    if len(operators) != 1:
        refuse(path, " and ".join(operators) or "no operator", f"exactly one of {', '.join(OPERATORS)}")
    (operator,) = operators
    if ("value" in members) != (operator == "mask"):
        refuse(path, f"{operator} {'with' if 'value' in members else 'without'} value", "mask and value together")
    optional = members.get("optional", False)
    if type(optional) is not bool:
        refuse(f"{path}.optional", shown(optional), "true or false")
    if "optional" in members and not (operator in _REFERENCE_OPERATORS and may_be_optional):
        refuse(f"{path}.optional", shown(optional), "it only with a reference, and not in `any`")
    for name in members:
        if name not in ("claim", "optional", "value", operator):
            refuse(path, f"an unknown member {shown(name)}", "claim, one operator, optional")
    if operator in _REFERENCE_OPERATORS:
        name = _text(members[operator], f"{path}.{operator}")
        return _of_reference(claim, read, name, operator, optional=optional)
    value = members if operator == "mask" else members[operator]
    return _of_value(claim, read, *_VALUE_OPERATORS[operator](value, path if operator == "mask" else f"{path}.{operator}"))


def _of_value(claim: str, read: Callable[[Mapping[str, Any]], Any], holds: _Test, expected: str) -> Condition:
    def check(document: Mapping[str, Any], _references: References, _now: float) -> float:
        return FOREVER if holds(read(document)) else FAILED

    def explain(document: Mapping[str, Any], _references: References, _now: float) -> tuple[str, str]:
        return shown(read(document)), expected

    return Condition(claim, check, explain)


def _of_reference(
    claim: str, read: Callable[[Mapping[str, Any]], Any], name: str, operator: str, *, optional: bool
) -> Condition:
    holds, words = _REFERENCE_OPERATORS[operator]
    when_missing = SKIPPED if optional else FAILED

    def check(document: Mapping[str, Any], references: References, now: float) -> float:
        reference = references.find(name)
        if reference is None:
            return when_missing
        until = FOREVER if reference.expires is None else reference.expires
        return until if now < until and holds(read(document), reference) else FAILED

    def explain(document: Mapping[str, Any], references: References, now: float) -> tuple[str, str]:
        reference = references.find(name)
        expected = f"{words} reference {name}"
        if reference is None:
            expected += ", which is not registered"
        elif not reference.items:
            expected += ", which has been withdrawn"
        elif reference.has_expired(now):
            expected += f", which expired {_date(reference.expires)}"
        else:
            expected += f": {_listed(reference.items)}"
        return shown(read(document)), expected

    return Condition(claim, check, explain)


def either(conditions: tuple[Condition, ...]) -> Condition:
    """Holds as soon as one of them does, and as long as that one."""
    checks = tuple(one.check for one in conditions)

    def check(document: Mapping[str, Any], references: References, now: float) -> float:
        for one in checks:
            until = one(document, references, now)
            if until > FAILED:
                return until
        return FAILED

    def explain(document: Mapping[str, Any], references: References, now: float) -> tuple[str, str]:
        parts = [(one.claim, *one.explain(document, references, now)) for one in conditions]
        observed = ", ".join(f"{claim} {found}" for claim, found, _expected in parts)
        return observed, " or ".join(f"{claim} {expected}" for claim, _found, expected in parts)

    return Condition(" or ".join(one.claim for one in conditions), check, explain)


# ---- Values in a policy.


def _scalar(value: Any, path: str) -> Any:
    if type(value) is bool:
        return value
    if type(value) is int:
        return _integer(value, path)
    if type(value) is str and len(value) <= _TEXT_LIMIT:
        return value
    refuse(path, shown(value), f"text of at most {_TEXT_LIMIT} characters, an integer, true or false")


def _integer(value: Any, path: str) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        refuse(path, shown(value), "an integer of 64 bits")
    return value


def _text(value: Any, path: str) -> str:
    if type(value) is not str or not 1 <= len(value) <= _TEXT_LIMIT:
        refuse(path, shown(value), f"text of 1 to {_TEXT_LIMIT} characters")
    return value


def _date(moment: float | None) -> str:
    try:
        return datetime.fromtimestamp(moment or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"at {moment!r} seconds"
