"""Administrators' tokens. The store keeps the SHA-256 of a token; the text exists once, when it is made.

A token is "csvt_" and 256 random bits in base64url, so its digest needs no salt and no slow hash.

Thread-safety: all methods. Those that change something wait until it is durable: not for event loops.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, insert, select

from csvfast.broker.store import schema
from csvfast.broker.store.committer import Committer, Job
from csvfast.broker.store.rules import check_rules, seal_rules
from csvfast.crypto import Secret
from csvfast.errors import ConflictError, RequestError, UnknownError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from csvfast.broker.store.audit import AuditRecord
    from csvfast.broker.store.rows import Snapshot, TokenRow

__all__ = ["Tokens", "token_digest"]

_PREFIX: Final = "csvt_"
_BYTES: Final = 32
_LONGEST: Final = 128
_TABLE: Final = schema.tokens


def token_digest(token: str) -> str | None:
    """What a token is known by; None for a text that can be none."""
    if not (token.startswith(_PREFIX) and len(token) <= _LONGEST and token.isascii()):
        return None
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The table of tokens.

    In: fresh   a snapshot no older than the call
        key     seals the rules
    """

    def __init__(
        self, committer: Committer, key: Secret, fresh: Callable[[], Snapshot], clock: Callable[[], float] = time.time
    ) -> None:
        self._committer = committer
        self._key = key
        self._fresh = fresh
        self._clock = clock

    def create(self, name: str, roles: Sequence[str], scope: str, expires: float | None, record: AuditRecord) -> Secret:
        """A new token. Out: its text, in ASCII. ConflictError: the name is taken. RequestError: an impossible role or scope."""
        roles = tuple(roles)
        if not roles or any(not role.isidentifier() for role in roles) or "\0" in name + scope:
            raise RequestError("token: expected a name, at least one role, and a scope")
        text = _PREFIX + secrets.token_urlsafe(_BYTES)

        def apply(connection: Connection) -> None:
            check_rules(connection, self._key)
            if connection.scalar(select(_TABLE.c.name).where(_TABLE.c.name == name)) is not None:
                raise ConflictError(f"there is a token {name!r} already")
            row = {
                "name": name, "digest": token_digest(text), "roles": ",".join(roles), "scope": scope,
                "created": self._clock(), "expires": expires,
            }  # fmt: skip
            connection.execute(insert(_TABLE), row)
            seal_rules(connection, self._key)

        self._committer.run(Job((record,), apply=apply, administrative=True))
        return Secret(text.encode())

    def delete(self, name: str, record: AuditRecord) -> None:
        """Revokes a token: nobody is let in with it any more. UnknownError."""

        def apply(connection: Connection) -> None:
            check_rules(connection, self._key)
            if connection.execute(delete(_TABLE).where(_TABLE.c.name == name)).rowcount != 1:
                raise UnknownError(f"there is no token {name!r}")
            seal_rules(connection, self._key)

        self._committer.run(Job((record,), apply=apply, administrative=True))

    def find(self, token: str) -> TokenRow | None:
        """Whose token it is, None for nobody's and for an expired one. Looks at the database: a revocation holds at once."""
        digest = token_digest(token)
        row = None if digest is None else self._fresh().tokens.get(digest)
        return row if row is not None and (row.expires is None or self._clock() < row.expires) else None

    def list(self) -> list[TokenRow]:
        """All of them, expired ones too, in the order of their names."""
        return sorted(self._fresh().tokens.values(), key=lambda row: row.name)
