"""The door that speaks Verdictd's JSON commands over attested TLS."""

from __future__ import annotations

from csvfast.broker.verdictd.door import VerdictdDoor

__all__ = ["VerdictdDoor"]
