"""Clients of the broker's protocols."""

from __future__ import annotations
