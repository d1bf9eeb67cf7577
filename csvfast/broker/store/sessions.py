"""Sessions of the KBS protocol: a challenge, and once the attestation that met it. Shared by all brokers on one database.

Thread-safety: all methods. `create`, `attest` and `purge_expired` wait until it is durable; event loops take the job and commit
it themselves: `await store.committer.commit(store.sessions.create_job(...))`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, insert, select, update

from csvfast.broker.store import schema
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.rows import SessionRow
from csvfast.errors import ConflictError, UnknownError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from csvfast.broker.store.audit import AuditRecord
    from csvfast.broker.store.database import Database

__all__ = ["Sessions"]

_PURGED: Final = 10_000  # rows a transaction
_TABLE: Final = schema.sessions
_ROWS: Final = select(
    _TABLE.c.id, _TABLE.c.nonce, _TABLE.c.tee, _TABLE.c.created, _TABLE.c.expires, _TABLE.c.attested, _TABLE.c.record
)


class Sessions:
    """The table of sessions."""

    def __init__(self, database: Database, committer: Committer, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._committer = committer
        self._clock = clock

    def create_job(self, name: str, nonce: str, tee: str, expires: float) -> Job[None]:
        """Stores a challenge. In: name   unguessable; expires   seconds since the epoch. ConflictError: the name is taken."""
        row = {"id": name, "nonce": nonce, "tee": tee, "created": self._clock(), "expires": expires}

        def apply(connection: Connection) -> None:
            connection.execute(insert(_TABLE), row)

        return Job(apply=apply, expendable=True)

    def create(self, name: str, nonce: str, tee: str, expires: float) -> None:
        """See create_job."""
        self._committer.run(self.create_job(name, nonce, tee, expires))

    def get(self, name: str) -> SessionRow | None:
        """A session that has not expired."""
        query = _ROWS.where(_TABLE.c.id == name, _TABLE.c.expires > self._clock())
        row = self._database.read(lambda connection: connection.execute(query).one_or_none())
        return None if row is None else SessionRow(*row)

    def attest_job(
        self, name: str, record: str, records: Sequence[AuditRecord] = (), generation: int | None = None
    ) -> Job[None]:
        """Stores what came of a challenge; of several attempts, through whichever broker, one succeeds.

        In: record       text to be read back, e.g. Attestation.to_json
            records      of the audit log, written with it
            generation   on which it rests
        UnknownError: there is no such session, or it has expired. ConflictError: the challenge has been met before.
        """

        def apply(connection: Connection) -> None:
            now = self._clock()
            open_one = _TABLE.c.id == name, _TABLE.c.expires > now
            change = update(_TABLE).where(*open_one, _TABLE.c.attested.is_(None))
            if connection.execute(change, {"attested": now, "record": record}).rowcount == 1:
                return
            if connection.scalar(select(_TABLE.c.id).where(*open_one)) is None:
                raise UnknownError("there is no such session, or it has expired")
            raise ConflictError("this session's challenge has been met before")

        return Job(records, generation, apply)

    def attest(self, name: str, record: str) -> None:
        """See attest_job."""
        self._committer.run(self.attest_job(name, record))

    def purge_expired(self) -> int:
        """Removes expired sessions. Out: how many."""
        count = 0
        while True:
            removed = self._committer.run(Job(apply=self._purge))
            count += removed
            if removed < _PURGED:
                return count

    def _purge(self, connection: Connection) -> int:
        some = select(_TABLE.c.id).where(_TABLE.c.expires <= self._clock()).limit(_PURGED)
        return connection.execute(delete(_TABLE).where(_TABLE.c.id.in_(some))).rowcount
