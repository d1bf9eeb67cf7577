"""Policies: every version is kept, the newest counts, and the newest may say that there is none any more.

Thread-safety: all methods. Those that change something wait until it is durable: not for event loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, select

from csvfast.broker.store import schema
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.rows import PolicyRow
from csvfast.broker.store.rules import check_rules, seal_rules
from csvfast.errors import RequestError, UnknownError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from csvfast.broker.store.audit import AuditRecord
    from csvfast.broker.store.database import Database
    from csvfast.crypto import Secret

__all__ = ["Policies"]

_TABLE: Final = schema.policies
_ROWS: Final = select(
    _TABLE.c.kind, _TABLE.c.id, _TABLE.c.version, _TABLE.c.engine, _TABLE.c.text, _TABLE.c.created, _TABLE.c.deleted
)


class Policies:
    """The table of policies. In: key   seals the rules."""

    def __init__(
        self, database: Database, committer: Committer, key: Secret, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._committer = committer
        self._key = key
        self._clock = clock

    def put(self, kind: str, name: str, engine: str, text: str, record: AuditRecord) -> int:
        """Stores a new version, which counts from now on. Out: its number. RequestError: a NUL in a text."""
        if any("\0" in part for part in (kind, name, engine, text)):
            raise RequestError("policy: holds a NUL character")
        return self._append(kind, name, engine, text, False, record)

    def delete(self, kind: str, name: str, record: AuditRecord) -> None:
        """From now on there is none of that name; its versions stay in the history. UnknownError."""
        self._append(kind, name, "", "", True, record)

    def _append(self, kind: str, name: str, engine: str, text: str, deleted: bool, record: AuditRecord) -> int:
        def apply(connection: Connection) -> int:
            check_rules(connection, self._key)
            rows = _TABLE.c.kind == kind, _TABLE.c.id == name
            query = select(_TABLE.c.version, _TABLE.c.deleted).where(*rows).order_by(_TABLE.c.version.desc()).limit(1)
            newest = connection.execute(query).one_or_none()
            if deleted and (newest is None or newest.deleted):
                raise UnknownError(f"there is no {kind} policy {name!r}")
            version = 1 if newest is None else newest.version + 1
            row: dict[str, Any] = {
                "kind": kind, "id": name, "version": version, "engine": engine, "text": text, "created": self._clock(),
                "deleted": deleted,
            }  # fmt: skip
            connection.execute(insert(_TABLE), row)
            seal_rules(connection, self._key)
            return version

        return self._committer.run(Job((record,), apply=apply, administrative=True))

    def get(self, kind: str, name: str, version: int | None = None) -> PolicyRow | None:
        """A version, or the one that counts; None when there is none."""
        found = self.history(kind, name)
        if version is None:
            return found[-1] if found and not found[-1].deleted else None
        return next((row for row in found if row.version == version and not row.deleted), None)

    def history(self, kind: str, name: str) -> list[PolicyRow]:
        """Every version, oldest first, deletions among them."""
        query = _ROWS.where(_TABLE.c.kind == kind, _TABLE.c.id == name).order_by(_TABLE.c.version)
        return [PolicyRow(*row) for row in self._database.read(lambda connection: connection.execute(query).all())]

    def list(self) -> list[PolicyRow]:
        """Every version of every policy that is not deleted, in the order of kinds, names and versions."""
        rows = self._database.read(lambda connection: connection.execute(_ROWS).all())
        found: dict[tuple[str, str], list[PolicyRow]] = {}
        for row in sorted((PolicyRow(*row) for row in rows), key=lambda row: (row.kind, row.id, row.version)):
            found.setdefault((row.kind, row.id), []).append(row)
        return [row for versions in found.values() if not versions[-1].deleted for row in versions if not row.deleted]
