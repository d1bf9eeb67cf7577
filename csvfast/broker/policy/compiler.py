"""From a policy's text to a policy. Thread-safety: functions without state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csvfast.broker.policy.base import ENGINES, Policy
from csvfast.broker.policy.references import References
from csvfast.broker.policy.rules import RulesPolicy
from csvfast.errors import FormatError

__all__ = ["compile_policy", "dry_run"]


def compile_policy(kind: str, engine: str, text: str, *, statuses: tuple[str, ...] = ("affirming",)) -> Policy:
    """A policy, ready to be evaluated.

    In: kind       "appraisal" or "resource"
        engine     "rules": TOML; "rego": Rego, in a worker process, which needs the extra [rego]
        statuses   of an appraisal policy in Rego: the statuses of its trust vector that are allowed
    FormatError says what is wrong with it, MissingExtraError what to install.
    """
    if engine == "rules":
        return RulesPolicy(kind, text)
    if engine == "rego":
        from csvfast.broker.policy.rego import RegoPolicy  # its extra is optional

        return RegoPolicy(kind, text, statuses=statuses)
    raise FormatError("policy", "engine", None, str(engine)[:80], " or ".join(ENGINES))


def dry_run(policy: Policy, document: Mapping[str, Any], references: References, now: float) -> str:
    """What a policy says of a document and why, for people: the first rule that fails, what it found and what it expects.

    Nothing is released and nothing goes on record. In: now, seconds since the epoch.
    """
    return policy.explain(document, references, now)
