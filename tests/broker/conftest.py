"""Fixtures of the broker's tests, and the end of what they started."""

from __future__ import annotations

from broker.broker_process import broker_guest, broker_machine
from broker.services import close_shared_cluster, postgres, postgres_url, skopeo, softhsm_token
from broker.stores import master_file, sqlite_url, store, store_url

__all__ = [
    "broker_guest", "broker_machine", "master_file", "postgres", "postgres_url", "skopeo", "softhsm_token", "sqlite_url", "store",
    "store_url",
]  # fmt: skip


def pytest_sessionfinish() -> None:
    close_shared_cluster()
