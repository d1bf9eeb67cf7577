"""Encrypted memory with one key per ASID, as a CSV machine's DRAM would hold it, and the caches of a core above it."""

from __future__ import annotations

from csvfast.memory.cache import CacheLevel, CacheModel, Tlb
from csvfast.memory.encrypted import EncryptedMemory
from csvfast.memory.snapshot import SnapshotInfo, inspect

__all__ = ["CacheLevel", "CacheModel", "EncryptedMemory", "SnapshotInfo", "Tlb", "inspect"]
