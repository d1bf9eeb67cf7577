"""Without an optional package: one sentence with the command that brings it."""

from __future__ import annotations

import pytest

from csvfast._extras import need
from csvfast.errors import MissingExtraError


def test_what_is_there_is_not_asked_for() -> None:
    need("broker", "json", "xml.dom")


@pytest.mark.parametrize("name", ["csvfast_nothing", "csvfast_nothing.inside", "json.nothing"])
def test_what_is_missing_is_named_with_its_command(name: str) -> None:
    with pytest.raises(MissingExtraError) as refusal:
        need("broker", "json", name)
    assert str(refusal.value) == f"{name} not installed: pip install 'csvfast[broker]'"
