"""The door of Verdictd's client API, through which its tool manages keys, policies, references, keyring and image policies."""

from __future__ import annotations

from csvfast.broker.clientapi.door import ClientApi

__all__ = ["ClientApi"]
