"""What the store hands out: rows of its tables as immutable objects.

Times are seconds since the epoch. Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from csvfast.broker.model import ResourcePath
from csvfast.crypto import Secret

__all__ = ["PolicyRow", "ReferenceRow", "Resource", "ResourceRow", "SessionRow", "Snapshot", "TokenRow"]


@dataclass(frozen=True, slots=True)
class Resource:
    """A version of a resource with its content; state "active" or "retired"."""

    path: ResourcePath
    version: int
    content: Secret = field(repr=False)
    state: str
    created: float


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """A version of a resource without its content; state "active", "retired" or "deleted"."""

    path: ResourcePath
    version: int
    state: str
    created: float
    changed: float


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A version of a policy. kind "appraisal" or "resource", engine "rules" or "rego"; deleted: from here on there is none."""

    kind: str
    id: str
    version: int
    engine: str
    text: str = field(repr=False)
    created: float
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """Values of a reference; expires None: never. One that was deleted has no values and has expired."""

    name: str
    values: tuple[Any, ...]
    expires: float | None
    created: float
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class TokenRow:
    """An administrator's token; scope is a glob over resource paths, expires None: never."""

    name: str
    roles: tuple[str, ...]
    scope: str
    created: float
    expires: float | None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A challenge of the KBS protocol; attested and record are None until it was met."""

    id: str
    nonce: str
    tee: str
    created: float
    expires: float
    attested: float | None
    record: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What decisions rest on, as of one generation.

    policies     (kind, id) -> the newest version, without those deleted
    references   name -> values, with those deleted
    tokens       SHA-256 of a token, hexadecimal -> whose it is
    """

    generation: int
    policies: Mapping[tuple[str, str], PolicyRow]
    references: Mapping[str, ReferenceRow]
    tokens: Mapping[str, TokenRow] = field(repr=False)
