"""The door that speaks Verdictd's JSON commands over attested TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast._lazy import lazy

if TYPE_CHECKING:
    from csvfast.broker.verdictd.door import VerdictdDoor

__all__ = ["VerdictdDoor"]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "VerdictdDoor": "door",
        },
    )  # fmt: skip
