"""Resources: sealed versions of secrets under a path.

A put makes a new version, which is the one that is released from then on; older versions can be read by number until they are
retired. A deleted version leaves its row, so that its number is never given again, without key and content.

Thread-safety: all methods. Those that change something wait until it is durable: not for event loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, insert, select, update

from csvfast.broker.model import ResourcePath
from csvfast.broker.sealing import SealedVersion
from csvfast.broker.store import schema
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.rows import Resource, ResourceRow
from csvfast.crypto import Secret
from csvfast.errors import UnknownError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from typing_extensions import Buffer

    from csvfast.broker.store.audit import AuditRecord
    from csvfast.broker.store.database import Database
    from csvfast.broker.store.vault import Vault

__all__ = ["Resources"]

_CACHED: Final = 4096  # resources whose contents are kept unsealed, at most
_CACHED_BYTES: Final = 16 << 20

_TABLE: Final = schema.resources
_GENERATION: Final = select(schema.chain.c.generation).where(schema.chain.c.id == 1).scalar_subquery()
_COLUMNS: Final = select(
    _GENERATION.label("generation"), _TABLE.c.version, _TABLE.c.state, _TABLE.c.created, _TABLE.c.kek, _TABLE.c.wrapped_key,
    _TABLE.c.ciphertext,
)  # fmt: skip


class Resources:
    """The table of resources, and a cache of unsealed ones that lasts while the store's generation does.

    In: observe      told every generation that is seen
        generation   the generation seen last
    """

    def __init__(
        self,
        database: Database,
        committer: Committer,
        vault: Vault,
        observe: Callable[[int], None],
        generation: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._committer = committer
        self._vault = vault
        self._observe = observe
        self._generation = generation
        self._clock = clock
        self._cache: dict[tuple[ResourcePath, int | None], tuple[int, Resource]] = {}
        self._cached_bytes = 0

    # ---- Reading

    def cached(self, path: ResourcePath, version: int | None = None) -> Resource | None:
        """As `get`, if that is known without asking the database. HOT."""
        entry = self._cache.get((path, version))
        return entry[1] if entry is not None and entry[0] == self._generation() else None

    def forget(self) -> None:
        """Lets go of all unsealed contents."""
        self._cache = {}
        self._cached_bytes = 0

    def get(self, path: ResourcePath, version: int | None = None, *, retired: bool = False) -> Resource | None:
        """A version, or the newest that is active; None when there is none, or it is retired or deleted.

        In: retired   give a retired version, too, when it is asked for by number
        UnavailableError: the database cannot be read, or the row was altered.
        """
        found = self.cached(path, version)
        if found is None:
            read = self._database.read(lambda connection: self._read(connection, path, version, retired))
            if read is not None:
                generation, found = read
                self._observe(generation)
                if found.state == "active":
                    self._remember((path, version), generation, found)
        return found

    def _read(
        self, connection: Connection, path: ResourcePath, version: int | None, retired: bool
    ) -> tuple[int, Resource] | None:
        name = str(path)
        query = _COLUMNS.where(_TABLE.c.path == name)
        if version is None:
            query = query.where(_TABLE.c.state == "active").order_by(_TABLE.c.version.desc()).limit(1)
        else:
            query = query.where(_TABLE.c.version == version)
        row = connection.execute(query).one_or_none()
        if row is None or (row.state != "active" and not (retired and row.state == "retired")):
            return None
        sealed = SealedVersion(row.kek, row.wrapped_key, row.ciphertext)
        content = self._vault.unseal(connection, name, row.version, sealed)
        return row.generation, Resource(path, row.version, content, row.state, row.created)

    def _remember(self, key: tuple[ResourcePath, int | None], generation: int, resource: Resource) -> None:
        cache, size = self._cache, len(resource.content)
        if len(cache) >= _CACHED or self._cached_bytes + size > _CACHED_BYTES:
            self.forget()
            cache = self._cache
        if size <= _CACHED_BYTES // 4:
            self._cached_bytes += size  # two threads at once may miscount: a bound, not an account
            cache[key] = generation, resource

    def list(self, repository: str | None = None) -> list[ResourceRow]:
        """Every version, without contents, in the order of paths and versions."""
        query = select(_TABLE.c.path, _TABLE.c.version, _TABLE.c.state, _TABLE.c.created, _TABLE.c.changed)
        if repository is not None:
            query = query.where(_TABLE.c.path.startswith(f"{repository}/", autoescape=True))
        rows = self._database.read(lambda connection: connection.execute(query).all())
        found = [ResourceRow(ResourcePath.parse(path), *rest) for path, *rest in rows]
        # SQLite's LIKE knows no upper and lower case.
        return sorted(
            (row for row in found if repository in (None, row.path.repository)), key=lambda row: (row.path, row.version)
        )

    # ---- Writing

    def put(self, path: ResourcePath, content: Buffer, record: AuditRecord) -> int:
        """Stores a new version. Out: its number. UnavailableError, LimitedError."""
        return self._put(path, lambda _connection: content, record)

    def rotate(self, path: ResourcePath, record: AuditRecord, length: int | None = None) -> int:
        """Stores a new version of random bytes, as many as the newest active one has unless told. UnknownError."""

        def content(connection: Connection) -> Secret:
            found = self._read(connection, path, None, retired=False)
            if found is None:
                raise UnknownError(f"there is no resource {path}")
            return Secret.random(length or len(found[1].content))

        return self._put(path, content, record)

    def _put(self, path: ResourcePath, make: Callable[[Connection], Buffer], record: AuditRecord) -> int:
        name = str(ResourcePath.parse(str(path)))

        def apply(connection: Connection) -> int:
            newest = connection.scalar(select(func.max(_TABLE.c.version)).where(_TABLE.c.path == name))
            version, now = (newest or 0) + 1, self._clock()
            sealed = self._vault.seal(connection, name, version, make(connection))
            row = {
                "path": name, "version": version, "state": "active", "created": now, "changed": now, "kek": sealed.kek,
                "wrapped_key": sealed.wrapped_key, "ciphertext": sealed.content,
            }  # fmt: skip
            connection.execute(insert(_TABLE), row)
            return version

        def records(version: int) -> tuple[AuditRecord]:
            return (replace(record, resource=name, resource_version=version),)

        return self._committer.run(Job(records, apply=apply, administrative=True))

    def retire(self, path: ResourcePath, version: int, record: AuditRecord) -> None:
        """A version is not released any more, but kept. Doing it again changes nothing. UnknownError."""
        name = str(path)

        def apply(connection: Connection) -> None:
            change = update(_TABLE).where(_TABLE.c.path == name, _TABLE.c.version == version, _TABLE.c.state != "deleted")
            if connection.execute(change, {"state": "retired", "changed": self._clock()}).rowcount != 1:
                raise UnknownError(f"there is no resource {path} version {version}")

        self._committer.run(Job((replace(record, resource=name, resource_version=version),), apply=apply, administrative=True))

    def delete(self, path: ResourcePath, record: AuditRecord, version: int | None = None) -> int:
        """Destroys a version, or all: wrapped key and content are overwritten, the row stays as a tombstone.

        Out: how many. UnknownError. UnavailableError; when it says that old bytes may remain, deleting again tries again.
        """
        name = str(path)

        def apply(connection: Connection) -> int:
            query = select(_TABLE.c.version, func.length(_TABLE.c.wrapped_key), func.length(_TABLE.c.ciphertext)).where(
                _TABLE.c.path == name, _TABLE.c.state != "deleted"
            )
            if version is not None:
                query = query.where(_TABLE.c.version == version)
            rows = connection.execute(query).all()
            if not rows:
                raise UnknownError(f"there is no resource {path}" + ("" if version is None else f" version {version}"))
            for number, key_length, length in rows:
                change = update(_TABLE).where(_TABLE.c.path == name, _TABLE.c.version == number)
                # Twice: first over the bytes where they are, then out of the row.
                connection.execute(change, {"wrapped_key": bytes(key_length), "ciphertext": bytes(length)})
                gone: dict[str, Any] = {"wrapped_key": None, "ciphertext": None, "kek": None}
                connection.execute(change, {**gone, "state": "deleted", "changed": self._clock()})
            return len(rows)

        record = replace(record, resource=name, resource_version=version)
        try:
            count = self._committer.run(Job((record,), apply=apply, administrative=True))
        except UnknownError:
            self._database.erase()
            raise
        self.forget()
        self._database.erase()
        return count
