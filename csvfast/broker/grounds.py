"""What decisions rest on: the policies and reference values of one generation of the store, compiled.

Thread-safety: immutable once made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.broker.policy import Policy, References, compile_policy, default_policies
from csvfast.errors import UnknownError

if TYPE_CHECKING:
    from csvfast.broker.store import Snapshot

__all__ = ["RESOURCE_POLICY", "Compiled", "Grounds"]

RESOURCE_POLICY: Final = "default"
"""The resource policy for repositories that have none of their own name."""


class Compiled(NamedTuple):
    """A policy ready to be evaluated; version 0 is the one that csvfast ships."""

    id: str
    version: int
    policy: Policy


class Grounds:
    """Policies and references of one generation.

    In: snapshot   what the store holds
        previous   grounds of an earlier generation: policies that have not changed are taken over, not compiled again
    FormatError when a stored policy cannot be compiled: nothing is decided then.
    """

    def __init__(self, snapshot: Snapshot, previous: Grounds | None = None) -> None:
        self.generation: Final = snapshot.generation
        self.references: Final = References(snapshot.references)
        before: Mapping[tuple[str, str], Compiled] = {} if previous is None else previous._policies
        self._policies: dict[tuple[str, str], Compiled] = {}
        for kind, name, engine, text in default_policies():
            known = before.get((kind, name))
            if known is None or known.version != 0:
                known = Compiled(name, 0, compile_policy(kind, engine, text))
            self._policies[kind, name] = known
        for key, row in snapshot.policies.items():
            known = before.get(key)
            if known is None or known.version != row.version:
                known = Compiled(row.id, row.version, compile_policy(row.kind, row.engine, row.text))
            self._policies[key] = known
        self.blocking: Final = any(one.policy.blocking for one in self._policies.values())

    def appraisal(self, name: str) -> Compiled:
        """The appraisal policy of that id. UnknownError."""
        return self._find("appraisal", name)

    def resource(self, repository: str) -> Compiled:
        """The resource policy that decides about a repository: the one of its name when there is one, else "default"."""
        return self._policies.get(("resource", repository)) or self._find("resource", RESOURCE_POLICY)

    def _find(self, kind: str, name: str) -> Compiled:
        try:
            return self._policies[kind, name]
        except KeyError:
            raise UnknownError(f"there is no {kind} policy {name!r}") from None
