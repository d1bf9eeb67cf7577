"""Encrypted memory with one key per ASID, as a CSV machine's DRAM would hold it."""

from __future__ import annotations

from csvfast.memory.encrypted import EncryptedMemory
from csvfast.memory.snapshot import SnapshotInfo, inspect

__all__ = ["EncryptedMemory", "SnapshotInfo", "inspect"]
