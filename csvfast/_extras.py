"""Optional packages: what is missing, and the command that brings it."""

from __future__ import annotations

from importlib.util import find_spec

from csvfast.errors import MissingExtraError

__all__ = ["need"]


def need(extra: str, *modules: str) -> None:
    """Raises MissingExtraError, naming the `pip install` to type, unless every module can be imported.

    In: extra     name of the extra in pyproject.toml, e.g. "ratstls"
        modules   import names, e.g. "OpenSSL", "google.protobuf"
    Nothing is imported here. Thread-safe.
    """
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed: pip install 'csvfast[{extra}]'")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
