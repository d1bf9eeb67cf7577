"""Where a guest's evidence comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from csvfast.report.evidence import Evidence

__all__ = ["Attester"]


class Attester(Protocol):
    """What makes evidence about this machine."""

    def evidence(self, report_data: bytes) -> Evidence:
        """Fresh evidence with these 64 bytes in the report, HSK and CEK beside it when they are at hand; no sealing key in it."""
        ...
