"""Policies, reference values and tokens together, and the seal that shows that csvfast wrote them.

Whoever can write to the database, but has not the master key, must not be able to allow himself a key: so every change ends with
an HMAC-SM3, under a key that is stored sealed, over all of them and the number of changes; every snapshot is checked against it.
What remains is to bring back an earlier state of the whole database, which no seal inside it can show.

Thread-safety: functions without state.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select, update

from csvfast.broker.store import schema
from csvfast.broker.store.rows import PolicyRow, ReferenceRow, Snapshot, TokenRow
from csvfast.crypto import Secret, hmac_sm3
from csvfast.errors import AuthenticationError, UnavailableError

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["initial_seal", "read_snapshot", "seal_rules"]

_CHAIN: Final = schema.chain
_POLICIES: Final = schema.policies
_newest: Final = (
    select(_POLICIES.c.kind, _POLICIES.c.id, func.max(_POLICIES.c.version).label("version"))
    .group_by(_POLICIES.c.kind, _POLICIES.c.id)
    .subquery()
)
_POLICY_ROWS: Final = select(
    _POLICIES.c.kind, _POLICIES.c.id, _POLICIES.c.version, _POLICIES.c.engine, _POLICIES.c.text, _POLICIES.c.created,
    _POLICIES.c.deleted,
).join(
    _newest,
    (_POLICIES.c.kind == _newest.c.kind) & (_POLICIES.c.id == _newest.c.id) & (_POLICIES.c.version == _newest.c.version),
)  # fmt: skip
_REFERENCES: Final = schema.reference_values
_REFERENCE_ROWS: Final = select(
    _REFERENCES.c.name, _REFERENCES.c["items"], _REFERENCES.c.expires, _REFERENCES.c.created, _REFERENCES.c.deleted
)
_TOKENS: Final = schema.tokens
_TOKEN_ROWS: Final = select(
    _TOKENS.c.digest, _TOKENS.c.name, _TOKENS.c.roles, _TOKENS.c.scope, _TOKENS.c.created, _TOKENS.c.expires
)
_HEAD: Final = select(_CHAIN.c.generation, _CHAIN.c.rules_version, _CHAIN.c.rules_seal).where(_CHAIN.c.id == 1)


def _rows(connection: Connection) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        sorted(list(row) for row in connection.execute(_POLICY_ROWS)),
        sorted((list(row) for row in connection.execute(_REFERENCE_ROWS)), key=lambda row: str(row[0])),
        sorted((list(row) for row in connection.execute(_TOKEN_ROWS)), key=lambda row: str(row[0])),
    )


def _seal(key: Secret, version: int, rows: tuple[list[Any], list[Any], list[Any]]) -> hmac_sm3:
    text = json.dumps([version, *rows], separators=(",", ":"))
    return hmac_sm3(key, b"csvfast rules 1" + text.encode())


def initial_seal(key: Secret) -> bytes:
    """Of a new store: nothing was changed, and there is nothing."""
    return _seal(key, 0, ([], [], [])).digest()


def seal_rules(connection: Connection, key: Secret) -> None:
    """The end of every change of policies, references or tokens, in its transaction, under the lock of the chain."""
    head = connection.execute(_HEAD).one()
    version = head.rules_version + 1
    seal = _seal(key, version, _rows(connection)).digest()
    connection.execute(update(_CHAIN).where(_CHAIN.c.id == 1), {"rules_version": version, "rules_seal": seal})


def check_rules(connection: Connection, key: Secret) -> tuple[int, tuple[list[Any], list[Any], list[Any]]]:
    """The generation and the rows, if the seal is good. UnavailableError: somebody else has written them."""
    head, rows = connection.execute(_HEAD).one_or_none(), _rows(connection)
    try:
        if head is None:
            raise AuthenticationError("the chain's row is missing")
        _seal(key, head.rules_version, rows).verify(head.rules_seal)
    except AuthenticationError:
        raise UnavailableError(
            "policies, reference values or tokens in the database were changed by somebody else: nothing is decided on them"
        ) from None
    return head.generation, rows


def read_snapshot(connection: Connection, key: Secret) -> Snapshot:
    """What holds, in one transaction. UnavailableError: the seal is broken."""
    generation, (policies, references, tokens) = check_rules(connection, key)
    found = [PolicyRow(*row) for row in policies]
    return Snapshot(
        generation,
        MappingProxyType({(row.kind, row.id): row for row in found if not row.deleted}),
        MappingProxyType({row[0]: reference_row(*row) for row in references}),
        MappingProxyType({row[0]: token_row(*row[1:]) for row in tokens}),
    )


def reference_row(name: str, values: str, expires: float | None, created: float, deleted: bool) -> ReferenceRow:
    """From the table's columns."""
    return ReferenceRow(name, tuple(json.loads(values)), expires, created, bool(deleted))


def token_row(name: str, roles: str, scope: str, created: float, expires: float | None) -> TokenRow:
    """From the table's columns."""
    return TokenRow(name, tuple(roles.split(",")), scope, created, expires)


