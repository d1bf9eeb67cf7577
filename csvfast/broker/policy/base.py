"""What every policy is, whatever the engine behind it. Thread-safety: policies are immutable."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Literal

from csvfast.broker.policy.decision import Decision
from csvfast.broker.policy.references import References
from csvfast.errors import FormatError

__all__ = ["ENGINES", "KINDS", "POLICY_LIMIT", "Policy", "checked_text"]

KINDS: Final = ("appraisal", "resource")
ENGINES: Final = ("rules", "rego")
POLICY_LIMIT: Final = 1 << 20
"""Bytes of a policy's text."""


class Policy(ABC):
    """A policy, compiled.

    kind       "appraisal": judges guests; "resource": judges requests for resources
    engine     "rules" or "rego"
    text       as it was written
    digest     SHA-256 of the text, hexadecimal: goes on record with every decision
    blocking   True when evaluating may wait for another process
    """

    kind: Final[str]
    engine: Final[str]
    text: Final[str]
    digest: Final[str]
    blocking: bool = False

    def __init__(self, kind: str, engine: Literal["rules", "rego"], text: str) -> None:
        self.kind = kind
        self.engine = engine
        self.text = text
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    @abstractmethod
    def _evaluate(self, document: Mapping[str, Any], references: References, now: float) -> Decision: ...

    @abstractmethod
    def explain(self, document: Mapping[str, Any], references: References, now: float) -> str:
        """What it says of a document and why, for people: several lines of text."""

    def evaluate(self, document: Mapping[str, Any], references: References, now: float) -> Decision:
        """Its decision about a document.

        In: document     made by appraisal_document or resource_document
            references   of the same moment
            now          seconds since the epoch
        Never raises for what stands in the document: what cannot be evaluated is not allowed.
        """
        try:
            return self._evaluate(document, references, now)
        except Exception as error:  # fail closed, whatever it was
            return refused("", f"{type(error).__name__}: {error}"[:200], "a document that can be evaluated")

    def __repr__(self) -> str:
        return f"<{self.kind} policy in {self.engine}, {self.digest[:16]}>"


def refused(rule: str, observed: str, expected: str, **members: Any) -> Decision:
    """A decision that does not allow."""
    return Decision(False, rule, observed, expected, status="contraindicated", **members)


def checked_text(kind: str, text: str) -> str:
    """The text, when kind and length are what they may be. FormatError."""
    if kind not in KINDS:
        raise FormatError("policy", "kind", None, str(kind)[:80], " or ".join(KINDS))
    if not isinstance(text, str):
        raise FormatError("policy", "text", None, type(text).__name__, "text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise FormatError("policy", "text", None, "half of a surrogate pair", "text that UTF-8 can hold") from None
    if size > POLICY_LIMIT:
        raise FormatError("policy", "length", None, f"{size} bytes", f"at most {POLICY_LIMIT} bytes")
    if not text.strip():
        raise FormatError("policy", "text", None, "nothing", "a policy: one without rules would decide nothing")
    return text
