"""Small languages inside rules: the path of a claim, patterns with `*`, versions with dots.

Thread-safety: functions without state; what they return has none either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["ABSENT", "claim_reader", "pattern_matcher", "resource_matcher", "version_key"]

Reader = Callable[[Mapping[str, Any]], Any]
Matcher = Callable[[str], bool]

ABSENT: Final = None
"""What a reader finds where there is nothing. JSON's null means the same: nothing is known."""

_SEGMENT: Final = re.compile(r'"([^"]{1,256})"|([A-Za-z0-9_-]{1,256})')
_DEPTH: Final = 16
_VERSION_PART: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


def claim_reader(path: str) -> Reader:
    """A function from a document to the claim at `path`: names and list indexes with dots between them; a name that itself has
    dots stands in quotes, as in submods.cpu0."ear.status". ValueError says what is wrong with the path.
    """
    segments = _segments(path)
    if len(segments) == 1:
        (first,) = segments

        def one(document: Mapping[str, Any]) -> Any:
            return document.get(first)

        return one
    if len(segments) == 2 and not segments[1].isdigit():
        first, second = segments

        def two(document: Mapping[str, Any]) -> Any:
            inner = document.get(first)
            return inner.get(second) if isinstance(inner, dict) else _inside(inner, second)

        return two

    def walk(document: Mapping[str, Any]) -> Any:
        value: Any = document
        for segment in segments:
            value = _inside(value, segment)
        return value

    return walk


def _inside(value: Any, segment: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(segment)
    if isinstance(value, (list, tuple)) and segment.isascii() and segment.isdigit() and len(segment) <= 9:
        index = int(segment)
        return value[index] if index < len(value) else ABSENT
    return ABSENT


def _segments(path: str) -> tuple[str, ...]:
    segments: list[str] = []
    place = 0
    while True:
        found = _SEGMENT.match(path, place)
        if found is None:
            raise ValueError(f"no name at character {place + 1}")
        segments.append(found[1] or found[2])
        place = found.end()
        if place == len(path):
            break
        if path[place] != ".":
            raise ValueError(f"character {place + 1} is no dot; names with other characters stand in quotes")
        place += 1
    if len(segments) > _DEPTH:
        raise ValueError(f"{len(segments)} names; at most {_DEPTH}")
    return tuple(segments)


def pattern_matcher(pattern: str) -> Matcher:
    """Whether a whole text fits: `*` stands for any characters, also none; everything else for itself. Time is linear in the
    text: each piece between two stars is taken where it first occurs, which is enough, because stars are the only freedom.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return lambda text: text == pattern
    *middle, last = rest
    pieces = tuple(piece for piece in middle if piece)
    shortest = len(first) + sum(map(len, pieces)) + len(last)

    def matches(text: str) -> bool:
        if len(text) < shortest or not text.startswith(first) or not text.endswith(last):
            return False
        place, end = len(first), len(text) - len(last)
        for piece in pieces:
            found = text.find(piece, place, end)
            if found < 0:
                return False
            place = found + len(piece)
        return True

    return matches


def resource_matcher(pattern: str) -> Matcher:
    """The same segment by segment: `*` does not go beyond a slash, so that default/*/* has three segments and no more."""
    parts = pattern.split("/")
    if all(part == "*" for part in parts):
        slashes = len(parts) - 1
        return lambda text: text.count("/") == slashes
    if "*" not in pattern:
        return lambda text: text == pattern
    matchers = tuple(map(pattern_matcher, parts))
    count = len(matchers)

    def matches(text: str) -> bool:
        segments = text.split("/")
        return len(segments) == count and all(match(one) for match, one in zip(matchers, segments, strict=True))

    return matches


def version_key(text: Any) -> tuple[int, ...] | None:
    """Numbers with dots between them as something that compares, "1.10" above "1.9", "1.3" and "1.3.0" alike; None when it is no
    such text.
    """
    if type(text) is not str or len(text) > 64:
        return None
    parts = text.split(".")
    if not all(map(_VERSION_PART.fullmatch, parts)):
        return None
    numbers = [int(part) for part in parts]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
