"""Reference values: the RVPS message read strictly, expiry enforced, every way into policies the same."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.policy import Reference, References
from csvfast.broker.policy.references import VALUES_LIMIT, a_year_after, build_message, parse_message, stored_form
from csvfast.errors import CsvfastError, FormatError, RequestError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


def message(**changes: Any) -> bytes:
    values = {"version": "0.1.0", "type": "sample", "payload": base64.b64encode(b'{"csv_measure": ["aa"]}').decode()}
    values |= changes
    return json.dumps({name: value for name, value in values.items() if value is not ...}).encode()


def payload(text: str | bytes) -> bytes:
    return message(payload=base64.b64encode(text.encode() if isinstance(text, str) else text).decode())


def test_known_message() -> None:
    # The form of trustee rvps/src/lib.rs; the payload is the base64 of {"csv_measure":["aa","bb"],"svn":3}.
    data = (
        b'{"version":"0.1.0","type":"sample",'
        b'"payload":"eyJjc3ZfbWVhc3VyZSI6WyJhYSIsImJiIl0sInN2biI6M30="}'
    )
    expires = datetime(2027, 3, 1, 12, tzinfo=UTC).timestamp()
    found = parse_message(data, NOW)
    assert found == {"csv_measure": Reference(["aa", "bb"], expires), "svn": Reference([{"single": 3}], expires)}
    assert build_message({"csv_measure": ["aa", "bb"], "svn": 3}) == data
    assert stored_form("csv_measure", found["csv_measure"]) == {
        "version": "0.1.0",
        "name": "csv_measure",
        "value": ["aa", "bb"],
        "expiration": "2027-03-01T12:00:00Z",
    }
    assert stored_form("svn", found["svn"])["value"] == 3
    assert "expiration" not in stored_form("svn", Reference([3]))
    assert parse_message(message(version=...), NOW), "trustee's message may leave the version out"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"[]", "message"),
        (b"5", "message"),
        (message(more=1), "message"),
        (message(version="0.2.0"), "version"),
        (message(version=1), "version"),
        (message(type="swid"), "type"),
        (message(type=...), "type"),
        (message(type=["sample"]), "type"),
        (message(payload=...), "payload"),
        (message(payload={"a": 1}), "payload"),
        (message(payload="e30"), "payload"),  # no padding
        (message(payload="e30=\n"), "payload"),
        (message(payload="_-8="), "payload"),  # the URL alphabet
        (message(payload="é"), "payload"),
        (payload("{}"), "payload"),
        (payload("[1]"), "payload"),
        (payload('{"a b": [1]}'), "payload"),
        (payload('{"": [1]}'), "payload"),
        (payload(json.dumps({"a" * 129: [1]})), "payload"),
        (payload('{"a": null}'), "a"),
        (payload('{"a": []}'), "a"),
        (payload(json.dumps({"a": [1] * (VALUES_LIMIT + 1)})), "a"),
        (payload(json.dumps({f"n{index}": 1 for index in range(VALUES_LIMIT + 1)})), "payload"),
    ],
    ids=range(23),
)
def test_what_is_no_message(data: bytes, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_message(data, NOW)
    assert (caught.value.structure, caught.value.field) == ("reference value message", field)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"{} {}", b'{"type":"sample","type":"sample"}', payload("{"), payload(b"\xff"), payload('{"a":1,"a":2}'),
     payload('{"a":NaN}'), payload("[" * 40 + "]" * 40), b" " * ((2 << 20) + 1)],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(RequestError, match="reference value message"):
        parse_message(data, NOW)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_message_raises_anything_else(data: bytes) -> None:
    for text in (data, payload(data)):
        with contextlib.suppress(CsvfastError):
            parse_message(text, NOW)


SCALAR = st.text(max_size=9) | st.integers(-(2**53) + 1, 2**53 - 1) | st.booleans()
NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(values=st.dictionaries(NAME, st.lists(SCALAR, min_size=1, max_size=4) | SCALAR, min_size=1, max_size=4))
def test_messages_round_trip(values: dict[str, Any]) -> None:
    found = parse_message(build_message(values), NOW)
    assert {name: one.for_rego() for name, one in found.items()} == values
    # And by way of the store, which keeps a list of JSON values.
    kept = {name: Reference(json.loads(json.dumps(one.values)), one.expires) for name, one in found.items()}
    assert kept == found
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            assert found[name].has(item)


def test_twelve_months() -> None:
    def year_after(*when: int) -> datetime:
        return datetime.fromtimestamp(a_year_after(datetime(*when, tzinfo=UTC).timestamp()), UTC)  # type: ignore[arg-type, misc]

    assert year_after(2026, 7, 31, 1, 2, 3) == datetime(2027, 7, 31, 1, 2, 3, tzinfo=UTC)
    assert year_after(2028, 2, 29) == datetime(2029, 2, 28, tzinfo=UTC)
    assert a_year_after(NOW + 0.9) == a_year_after(NOW)


def test_expiry() -> None:
    reference = Reference(["a"], NOW)
    assert not reference.has_expired(NOW - 0.001)
    assert reference.has_expired(NOW)
    assert not Reference(["a"]).has_expired(1e300)
    assert Reference(["a"], float("nan")).has_expired(NOW), "a time that is none has passed"
    references = References({"old": Reference([1], NOW), "soon": Reference([2, 3], NOW + 5), "late": Reference([4], NOW + 9)})
    assert references.for_rego(NOW) == ({"soon": [2, 3], "late": [4]}, NOW + 5)
    assert references.for_rego(NOW + 5) == ({"late": [4]}, NOW + 9)
    assert References({"ever": Reference([1])}).for_rego(NOW) == ({"ever": [1]}, None)
    assert set(references) == {"old", "soon", "late"}, "expired is not forgotten"


def test_has_tells_types_apart() -> None:
    has: Callable[[Any], bool] = Reference(["1", 2, True, None, [3], {"a": 4}, 5.0]).has
    assert [has(value) for value in ("1", 2, True)] == [True] * 3
    assert [has(value) for value in (1, "2", 2.0, False, "True", None, [3], {"a": 4}, 5.0, 5)] == [False] * 10
    assert not Reference([1]).has(True)
    assert not Reference([{"single": 1, "more": 2}]).has(1)
    assert Reference([{"single": 1}]).has(1)
    assert not Reference([{"single": 1}, {"single": 2}]).has(1), "two of them are two objects"


def test_rows_of_a_store_are_taken() -> None:
    @dataclass(frozen=True)
    class Row:
        values: tuple[Any, ...]
        expires: float | None

    references = References({"a": Row(("x",), NOW), "b": Row(({"single": 5},), None)})
    assert references["a"] == Reference(["x"], NOW)
    assert references["b"].for_rego() == 5
    assert references.find("nothing") is None
    assert len(References()) == 0
