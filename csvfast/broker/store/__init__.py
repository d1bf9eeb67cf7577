"""What the broker keeps: resources, policies, reference values, sessions, tokens, and the audit log.

`Store` is the way in; csvfast.broker.store.store says how it is used.
"""

from __future__ import annotations

import csvfast.broker._serving  # noqa: F401 it says what is missing
from csvfast.broker.store.audit import AuditEntry, AuditRecord, AuditVerification
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.database import Database
from csvfast.broker.store.rows import PolicyRow, ReferenceRow, Resource, ResourceRow, SessionRow, Snapshot, TokenRow
from csvfast.broker.store.store import Store

__all__ = [
    "AuditEntry",
    "AuditRecord",
    "AuditVerification",
    "Committer",
    "Database",
    "Job",
    "PolicyRow",
    "ReferenceRow",
    "Resource",
    "ResourceRow",
    "SessionRow",
    "Snapshot",
    "Store",
    "TokenRow",
]
