"""Reference values: what measurements and versions are good, and until when.

A reference that is deleted keeps its name, without values and expired: a rule that asks for it fails, as it should after a
withdrawal; a rule that would skip a reference nobody ever registered does not skip this one.

Thread-safety: all methods. Those that change something wait until it is durable: not for event loops.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, insert, select

from csvfast.broker.store import schema
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.rows import ReferenceRow
from csvfast.broker.store.rules import check_rules, reference_row, seal_rules
from csvfast.errors import RequestError, UnknownError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from csvfast.broker.store.audit import AuditRecord
    from csvfast.broker.store.database import Database
    from csvfast.crypto import Secret

__all__ = ["References"]

_TEXT_LIMIT: Final = 4 << 20
_TABLE: Final = schema.reference_values
_ROWS: Final = select(_TABLE.c.name, _TABLE.c["items"], _TABLE.c.expires, _TABLE.c.created, _TABLE.c.deleted)


class References:
    """The table of reference values. In: key   seals the rules."""

    def __init__(
        self, database: Database, committer: Committer, key: Secret, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._committer = committer
        self._key = key
        self._clock = clock

    def put(self, name: str, values: Sequence[Any], expires: float | None, record: AuditRecord) -> None:
        """Sets the values of a reference, JSON values all. In: expires   seconds since the epoch; None: never. RequestError."""
        try:
            text = json.dumps(list(values), separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise RequestError(f"reference {ascii(name)[:40]}: its values are not JSON") from None
        if len(text) > _TEXT_LIMIT or "\0" in name:
            raise RequestError(f"reference {ascii(name)[:40]}: {len(text)} characters of values; expected at most {_TEXT_LIMIT}")
        self._set(name, text, None if expires is None else float(expires), False, record)

    def delete(self, name: str, record: AuditRecord) -> None:
        """Withdraws a reference: rules that ask for it fail. UnknownError."""
        self._set(name, "[]", 0.0, True, record)

    def _set(self, name: str, text: str, expires: float | None, deleted: bool, record: AuditRecord) -> None:
        def apply(connection: Connection) -> None:
            check_rules(connection, self._key)
            if deleted and not connection.scalar(select(_TABLE.c.name).where(_TABLE.c.name == name, ~_TABLE.c.deleted)):
                raise UnknownError(f"there is no reference value {name!r}")
            connection.execute(delete(_TABLE).where(_TABLE.c.name == name))
            row = {"name": name, "items": text, "expires": expires, "created": self._clock(), "deleted": deleted}
            connection.execute(insert(_TABLE), row)
            seal_rules(connection, self._key)

        self._committer.run(Job((record,), apply=apply, administrative=True))

    def get(self, name: str) -> ReferenceRow | None:
        """One of them, expired or not."""
        query = _ROWS.where(_TABLE.c.name == name, ~_TABLE.c.deleted)
        row = self._database.read(lambda connection: connection.execute(query).one_or_none())
        return None if row is None else reference_row(*row)

    def list(self) -> list[ReferenceRow]:
        """All of them, expired ones too, in the order of their names."""
        query = _ROWS.where(~_TABLE.c.deleted)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        return sorted((reference_row(*row) for row in rows), key=lambda row: row.name)
