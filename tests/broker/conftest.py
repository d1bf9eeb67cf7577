"""Fixtures of the broker's tests, and the end of what they started."""

from __future__ import annotations

from broker.services import close_shared_cluster, postgres, postgres_url, skopeo, softhsm_token

__all__ = ["postgres", "postgres_url", "skopeo", "softhsm_token"]


def pytest_sessionfinish() -> None:
    close_shared_cluster()
