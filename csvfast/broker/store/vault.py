"""Keys and contents between the database's rows and a KeyRing.

A ring is a process's copy of the key-encryption keys. Another process may have rotated them: so writers compare it with the table
under the lock of the chain, readers when a row names a key that they have not.

Thread-safety: all methods; the ring is replaced as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, delete, insert, select, update

from csvfast.broker.sealing import KeyRing, KeyRow, SealedVersion
from csvfast.broker.store import schema
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, UnavailableError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from typing_extensions import Buffer

    from csvfast.broker.master import MasterKey

__all__ = ["Vault"]

_KEYS: Final = schema.wrapping_keys
_INTERNAL: Final = schema.internal_keys
_RESOURCES: Final = schema.resources
_KEY_ROWS: Final = select(_KEYS.c.id, _KEYS.c.master, _KEYS.c.created, _KEYS.c.wrapped)


class Vault:
    """Seals and unseals for the store. In: master, ring   what `create` or `open` made."""

    def __init__(self, master: MasterKey, ring: KeyRing) -> None:
        self._masters = {master.identity: master}
        self._ring = ring
        self._ids = frozenset(row.id for row in ring.rows)

    @classmethod
    def create(cls, connection: Connection, master: MasterKey) -> Vault:
        """For a new store: a first key-encryption key."""
        ring = KeyRing.create(master)
        connection.execute(insert(_KEYS), [row._asdict() for row in ring.rows])
        return cls(master, ring)

    @classmethod
    def open(cls, connection: Connection, master: MasterKey) -> Vault:
        """Raises AuthenticationError: another master key. StateError: no keys."""
        return cls(master, KeyRing.open(_key_rows(connection), master))

    def current(self, connection: Connection) -> KeyRing:
        """The ring as the table has it now. UnavailableError: it has been wrapped by a master key that is not ours."""
        rows = _key_rows(connection)
        ring = self._ring
        if {row.id for row in rows} != self._ids:
            masters = {row.master for row in rows}
            master = self._masters.get(masters.pop()) if len(masters) == 1 else None
            if master is None:
                raise UnavailableError("the store's keys have been wrapped by another master key: start again with that one")
            try:
                ring = KeyRing.open(rows, master)
            except AuthenticationError as error:
                raise UnavailableError(str(error)) from None
            self._ring, self._ids = ring, frozenset(row.id for row in ring.rows)
        return ring

    def seal(self, connection: Connection, path: str, version: int, content: Buffer) -> SealedVersion:
        """Seals for storing, under the lock of the chain."""
        return self.current(connection).seal(path, version, content)

    def unseal(self, connection: Connection, path: str, version: int, sealed: SealedVersion) -> Secret:
        """A content. UnavailableError: the row has been altered, or is another's."""
        if not (type(sealed.kek) is str and type(sealed.wrapped_key) is bytes and type(sealed.content) is bytes):
            raise UnavailableError(f"{path} version {version}: the row has been altered: it holds no sealed content")
        ring = self._ring if sealed.kek in self._ids else self.current(connection)
        try:
            return ring.unseal(path, version, sealed)
        except AuthenticationError as error:
            raise UnavailableError(str(error)) from None

    # ---- The broker's own keys

    def put_internal(self, connection: Connection, name: str, key: Secret) -> None:
        """Stores a key of the broker's own."""
        sealed = self.seal(connection, f"internal:{name}", 1, key)
        row = {"name": name, "kek": sealed.kek, "wrapped_key": sealed.wrapped_key, "ciphertext": sealed.content}
        connection.execute(insert(_INTERNAL), row)

    def internal(self, connection: Connection, name: str) -> Secret | None:
        """A key of the broker's own, None when there is none of that name."""
        query = select(_INTERNAL.c.kek, _INTERNAL.c.wrapped_key, _INTERNAL.c.ciphertext).where(_INTERNAL.c.name == name)
        row = connection.execute(query).one_or_none()
        return None if row is None else self.unseal(connection, f"internal:{name}", 1, SealedVersion(*row))

    # ---- Rotation

    def rotate(self, connection: Connection, master: MasterKey) -> KeyRing:
        """Wraps every data key by a new key-encryption key, that by `master`, and overwrites what was there.

        The ring takes effect with `adopt`, after the commit. UnavailableError: a row does not unseal, so nothing is changed.
        """
        # Should the commit's outcome stay unknown, rows wrapped by either can be read.
        self._masters[master.identity] = master
        ring = self.current(connection).with_new_key(master)
        try:
            for table, path, version in (
                (_RESOURCES, _RESOURCES.c.path, _RESOURCES.c.version),
                (_INTERNAL, _INTERNAL.c.name, None),
            ):
                self._rewrap(connection, ring, table, path, version)
        except AuthenticationError as error:
            raise UnavailableError(f"nothing was rotated: {error}") from None
        ring = ring.current_only()
        for row in _key_rows(connection):
            blank = update(_KEYS).where(_KEYS.c.id == row.id)
            connection.execute(blank, {"wrapped": bytes(len(row.wrapped))})
        connection.execute(delete(_KEYS))
        connection.execute(insert(_KEYS), [row._asdict() for row in ring.rows])
        return ring

    @staticmethod
    def _rewrap(connection: Connection, ring: KeyRing, table: Any, path: Any, version: Any) -> None:
        keys = [path] if version is None else [path, version]
        query = select(*keys, table.c.kek, table.c.wrapped_key).where(table.c.wrapped_key.is_not(None))
        change = update(table).where(*(column == bindparam(f"old_{column.name}") for column in keys))
        changes = []
        for row in connection.execute(query).all():
            name, number = (f"internal:{row[0]}", 1) if version is None else (row[0], row[1])
            sealed = ring.rewrap(name, number, SealedVersion(row.kek, row.wrapped_key, b""))
            names = {f"old_{column.name}": value for column, value in zip(keys, row, strict=False)}
            changes.append({**names, "kek": sealed.kek, "wrapped_key": sealed.wrapped_key})
        if changes:
            connection.execute(change, changes)

    def adopt(self, ring: KeyRing, master: MasterKey) -> None:
        """The rotation has been committed."""
        self._masters = {master.identity: master}
        self._ring, self._ids = ring, frozenset(row.id for row in ring.rows)


def _key_rows(connection: Connection) -> list[KeyRow]:
    return [KeyRow(*row) for row in connection.execute(_KEY_ROWS)]
