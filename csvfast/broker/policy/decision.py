"""What a policy answers: allowed or not, on which grounds, and until when.

The trust vector of an appraisal is AR4SI's: for each of eight claims a number whose tier says how far it is trusted.

    none              -1 .. 1        nothing is asserted
    affirming         2 .. 31        and -32 .. -2
    warning           32 .. 95       and -96 .. -33
    contraindicated   96 .. 127      and -128 .. -97

Source: draft-ietf-rats-ar4si section 2.3 (claims, tiers); veraison/rust-ear src/trust/claim.rs and src/appraisal.rs (the status
is the worst tier of the vector; claims that assert nothing do not lower it); confidential-containers/trustee
attestation-service/src/ear_token/broker.rs. Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

__all__ = ["NO_TRUST", "STATUSES", "TRUST_CLAIMS", "Decision", "status_of", "tier_of", "worse"]

TRUST_CLAIMS: Final = (
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
)
"""The claims of a trust vector."""

STATUSES: Final = ("none", "affirming", "warning", "contraindicated")
"""From the best to the worst, as a vector's status is found."""

NO_TRUST: Final[Mapping[str, int]] = MappingProxyType({})


def tier_of(value: int) -> int:
    """Index into STATUSES of one claim's value, -128 .. 127."""
    if -1 <= value <= 1:
        return 0
    if -32 <= value <= 31:
        return 1
    return 2 if -96 <= value <= 95 else 3


def worse(first: int, second: int) -> int:
    """Of two values for one claim the one that is trusted less."""
    return max(first, second, key=lambda value: (tier_of(value), value))


def status_of(values: Iterable[int]) -> str:
    """The status of a vector: the worst tier among its values; "none" when nothing is asserted."""
    return STATUSES[max(map(tier_of, values), default=0)]


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer of a policy.

    allowed       whether it allows
    rule          the rule that decided: the first that failed, or the block of a resource policy that allowed; "" when all held
    observed      what that rule found, as text
    expected      what it expects, as text
    trust         AR4SI trust vector of an appraisal: claim to value
    status        "none", "affirming", "warning" or "contraindicated"
    valid_until   seconds since the epoch from which on it no longer holds, because a reference value it relies on expires; None:
                  as long as policy and references stay as they are
    checked       names of the rules that were looked at, in order; skipped ones are not among them
    """

    allowed: bool
    rule: str = ""
    observed: str = ""
    expected: str = ""
    trust: Mapping[str, int] = field(default_factory=lambda: NO_TRUST, hash=False)
    status: str = "none"
    valid_until: float | None = None
    checked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {
            "allowed": self.allowed,
            "rule": self.rule,
            "observed": self.observed,
            "expected": self.expected,
            "trust": dict(self.trust),
            "status": self.status,
            "valid_until": self.valid_until,
            "checked": list(self.checked),
        }

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Decision:
        """From what `to_dict` gave. TypeError for other members."""
        values = dict(members)
        values["trust"] = MappingProxyType(dict(values.get("trust") or {}))
        values["checked"] = tuple(values.get("checked") or ())
        return cls(**values)
