"""The policies that csvfast ships, as package data. Thread-safety: functions without state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Final

__all__ = ["default_policies", "default_text"]

_SHIPPED: Final = (("appraisal", "default_cpu"), ("resource", "default"))


def default_policies() -> Iterator[tuple[str, str, str, str]]:
    """(kind, id, engine, text) of each."""
    for kind, name in _SHIPPED:
        yield kind, name, "rules", default_text(kind, name)


@cache
def default_text(kind: str, name: str) -> str:
    """The text of one. KeyError when there is no such policy."""
    if (kind, name) not in _SHIPPED:
        raise KeyError((kind, name))
    return files("csvfast.broker.policy").joinpath("defaults", f"{kind}.{name}.toml").read_text(encoding="utf-8")
