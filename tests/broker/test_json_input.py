"""JSON from strangers: what is refused, and that everything else is what json reads."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.json_input import CONTAINER_LIMIT, DEPTH_LIMIT, INTEGER_LIMIT, loads, member, members
from csvfast.errors import RequestError

SAFE = st.integers(-INTEGER_LIMIT + 1, INTEGER_LIMIT - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
DOCUMENT = st.recursive(
    st.none() | st.booleans() | SAFE | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXT, below, max_size=4),
    max_leaves=20,
)


@given(DOCUMENT, st.booleans())
def test_reads_what_json_reads(document: object, escaped: bool) -> None:
    data = json.dumps(document, ensure_ascii=escaped).encode()
    assert loads(data, "test", limit=len(data)) == document


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = loads(data, "test", limit=1000)
    except RequestError:
        return
    assert json.loads(data) == value or value != value


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"x":[{"a":1,"\\u0061":1}]}', "twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "NaN"),
        (b"1e999", "double"),
        (b"[1.0" + b"0" * 100 + b"]", "double"),
        (b"[9007199254740992]", "2**53"),
        (b"[-9007199254740992]", "2**53"),
        (b"[" + b"9" * 100000 + b"]", "2**53"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFff":1}', "surrogate"),
        (b'[["\\udc00\\ud800"]]', "surrogate"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        (b"{} {}", "no JSON"),
        (b"", "no JSON"),
        (b"{'a':1}", "no JSON"),
        (b'"a\nb"', "no JSON"),
        (b"[1,]", "no JSON"),
        (b"[" * (DEPTH_LIMIT + 1) + b"]" * (DEPTH_LIMIT + 1), "deep"),
        (b'{"a":' * 100000, "deep"),
        (b"[" * 1000000, "deep"),
        (b"[" + b"{}," * CONTAINER_LIMIT + b"0]", "many objects"),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        loads(data, "the message", limit=1 << 21)
    assert text in str(caught.value)
    assert str(caught.value).startswith("the message: ")
    assert len(str(caught.value)) < 200


def test_brackets_in_strings_are_no_arrays() -> None:
    assert loads(b'["' + b"[{" * CONTAINER_LIMIT + b'"]', "test", limit=1 << 21) == ["[{" * CONTAINER_LIMIT]
    assert len(loads(b"[" + b"[]," * (CONTAINER_LIMIT - 1) + b"0]", "test", limit=1 << 21)) == CONTAINER_LIMIT


def test_size() -> None:
    assert loads(b"[1]", "test", limit=3) == [1]
    with pytest.raises(RequestError, match="4 bytes; expected at most 3"):
        loads(b"[12]", "test", limit=3)


def test_depth_counts_no_brackets_in_strings() -> None:
    assert loads(b'["' + b"[" * 1000 + b'\\"[["]', "test", limit=2000)
    deepest = b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT
    assert loads(deepest, "test", limit=2000)
    assert loads(b"[" + b",".join([b"[]"] * 100) + b"]", "test", limit=2000)


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"\\", b"\\\\", b'["', b"[{", b"1", b'"[', b"\\ud800", b"1e1,", b"-"])
@pytest.mark.parametrize("start", [b"", b'"', b'["'])
def test_time_is_linear(start: bytes, piece: bytes) -> None:
    data = b"[]" * 20 + start + piece * ((1 << 20) // len(piece))
    begin = time.process_time()
    with pytest.raises(RequestError):
        loads(data, "test", limit=1 << 21)
    with pytest.raises(RequestError):
        loads(data[40:] + b"[" * 40, "test", limit=1 << 21)
    assert time.process_time() - begin < 2


def test_errors_repeat_nothing() -> None:
    for data in (b'{"k":"SECRET"', b'{"SECRET":1,"SECRET":1}', b'"SECRET\xff"', b"[12345678901234567890]"):
        with pytest.raises(RequestError) as caught:
            loads(data, "test", limit=100)
        assert "SECRET" not in str(caught.value)
        assert "12345678901234567890" not in str(caught.value)


def test_numbers_that_are_allowed() -> None:
    assert loads(b"[9007199254740991,-9007199254740991,0,-0,1.5,1e300]", "test", limit=100)[:2] == [2**53 - 1, 1 - 2**53]
    value = loads(b'{"digits":"99999999999999999999999","n":5}', "test", limit=100)
    assert value == {"digits": "9" * 23, "n": 5}
    assert math.isclose(loads(b"0.1", "test", limit=3), 0.1)


def test_members() -> None:
    assert members({"a": "x"}, "test", {"a": str}, {"b": int}) == {"a": "x"}
    for value, text in [
        ([], "an array; expected an object"),
        ({}, "a is missing"),
        ({"a": 1}, "a is an integer; expected a string"),
        ({"a": None}, "a is null"),
        ({"a": "x", "b": True}, "b is a boolean; expected an integer"),
        ({"a": "x", "c": 1}, "unknown members; expected only a, b"),
    ]:
        with pytest.raises(RequestError) as caught:
            members(value, "test", {"a": str}, {"b": int})
        assert text in str(caught.value)
    with pytest.raises(RequestError, match="n is a number; expected an integer"):
        member({"n": 1.0}, "n", int, "test")
