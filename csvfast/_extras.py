"""Optional packages: what is missing, and the command that brings it."""

from __future__ import annotations

from importlib.util import find_spec

from csvfast.errors import MissingExtraError

__all__ = ["need"]


def need(extra: str, *modules: str) -> None:
    """Raises MissingExtraError, naming the `pip install` to type, unless every module can be imported.

    In: extra     name of the extra in pyproject.toml, e.g. "ratstls"
        modules   top-level import names, e.g. "OpenSSL", "cbor2"
    Nothing is imported here. Thread-safe.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed: pip install 'csvfast[{extra}]'")
