"""Chip ids, which come from reports and are therefore chosen by whoever wrote the report."""

from __future__ import annotations

import re
from typing import Final

from csvfast.errors import FormatError

__all__ = ["CHIP_ID_LIMIT", "checked_chip_id"]

CHIP_ID_LIMIT: Final = 64
"""Bytes that a report has for it."""

_ALLOWED: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z", re.ASCII)


def checked_chip_id(chip_id: str) -> str:
    """The id itself when it may become part of a file name and of a URL. Raises FormatError.

    Allowed are 1 to 64 ASCII letters, digits, "_", "-" and ".", the first a letter or digit: no separator, no NUL, nothing that
    a shell, a path or a URL reads otherwise. Real ids have 13 and 14 letters and digits.
    """
    if _ALLOWED.match(chip_id) is None:
        raise FormatError(
            "chip id", "characters", None, ascii(chip_id[:80]),
            f"1 to {CHIP_ID_LIMIT} ASCII letters, digits, '_', '-', '.', the first a letter or digit",
        )  # fmt: skip
    return chip_id
