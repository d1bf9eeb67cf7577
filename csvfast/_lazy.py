"""Names of a package that are imported when first asked for: a guest on an emulated processor pays for every module it loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's __getattr__. In: package   its name. names: each name, and the module below the package that has it; "" = the
    name is that module's own"""

    def __getattr__(name: str) -> Any:  # noqa: N807 it becomes one
        module = names.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not module:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(f"{package}.{module}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
