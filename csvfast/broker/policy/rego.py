"""Policies in Rego, for operators who bring those of CoCo or Verdictd.

A policy is one module of package `policy`. A resource policy is asked `data.policy.allow`, with the token's claims as `input`
and `data.plugin`, `data["resource-path"]`, `data.query`; the one answer that allows is exactly `true`. An appraisal policy is
asked `data.policy.trust_claims`, a map from AR4SI claim to integer, with trustee's claims under the name of the tee as `input`
and the function `query_reference_value(id)`, which is undefined for references that are not registered or have expired. The
status of that vector decides. Policies that were written for trustee take for granted that the evidence has been verified down
to the root and is about this exchange: a document that says otherwise is refused before they are asked.

Everything else is a refusal: an undefined rule, an error, several answers, a limit of the worker that was reached.

The interpreter compares texts by their spelling in JSON, so that "\\u0041" is not "A" to it; a module that spells characters
that way is refused. For the same reason `count`, `startswith` and patterns see a quotation mark, a backslash or a control
character inside a text as its escape, of two characters or more.

Source: confidential-containers/trustee attestation-service/src/ear_token/ear_default_policy_cpu.rego and broker.rs,
kbs/sample_policies; inclavare-containers/verdictd src/policy_engine/opa. Interpreter: microsoft/rego-cpp by its binding regopy.
Thread-safety: immutable objects; evaluations take turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn

from csvfast.broker.policy.base import Policy, checked_text, refused
from csvfast.broker.policy.conditions import shown
from csvfast.broker.policy.decision import STATUSES, TRUST_CLAIMS, Decision, status_of
from csvfast.broker.policy.references import References
from csvfast.broker.policy.rego_process import MESSAGE_LIMIT, RegoWorker, WorkerError, shared_worker
from csvfast.errors import FormatError

__all__ = ["RegoPolicy", "evaluate_verdictd"]

_HELPER: Final = """package policy

query_reference_value(id) := data.reference[id]
"""
_PACKAGE: Final = re.compile(r"(?:[ \t\r]*(?:#[^\n]*)?\n)*[ \t]*package[ \t]+policy[ \t\r]*(?:#[^\n]*)?(?:\n|\Z)")
_SPELT_OTHERWISE: Final = re.compile(r"\\[u/]")
_QUERIES: Final = {"appraisal": "data.policy.trust_claims", "resource": "data.policy.allow"}
_ANY_ANSWER: Final = "count(data.policy) >= 0"  # makes the interpreter compile every rule, and print none
_ONE_ANSWER: Final = "one answer"


class RegoPolicy(Policy):
    """A policy in Rego.

    In: kind       "appraisal" or "resource"
        text       one module of package policy, at most a MiB
        statuses   of an appraisal policy: the statuses that are allowed
        worker     where it is evaluated; default: the process's own
    FormatError when the interpreter does not take it, MissingExtraError without regopy.
    """

    blocking = True

    def __init__(
        self, kind: str, text: str, *, statuses: tuple[str, ...] = ("affirming",), worker: RegoWorker | None = None
    ) -> None:
        super().__init__(kind, "rego", checked_text(kind, text))
        if not set(statuses) <= set(STATUSES):
            raise FormatError("policy", "statuses", None, ", ".join(map(str, statuses)), ", ".join(STATUSES))
        self.statuses: Final = frozenset(statuses)
        self._worker: Final = worker or shared_worker()
        _check_module(self._worker, text, _HELPER if kind == "appraisal" else None)

    def _evaluate(self, document: Mapping[str, Any], references: References, now: float) -> Decision:
        if self.kind == "appraisal":
            return self._appraise(document, references, now)
        data = {
            "plugin": document.get("plugin"),
            "resource-path": document.get("resource_path"),
            "query": document.get("query"),
        }
        query = _QUERIES["resource"]
        try:
            value = _one_value(self._worker.ask(self.text, None, _json(data), _json(document.get("claims")), query))
        except WorkerError as error:
            return refused(query, str(error), "true")
        if value is not True:
            return refused(query, _shown(value), "true")
        return Decision(True, query, checked=(query,))

    def _appraise(self, document: Mapping[str, Any], references: References, now: float) -> Decision:
        query, expected = _QUERIES["appraisal"], f"a trust vector that is {' or '.join(sorted(self.statuses))}"
        for claim in ("bound", "chain_complete"):
            if document.get(claim) is not True:
                return refused(claim, f"{claim} {shown(document.get(claim))}", "true, before a policy in Rego is asked")
        values, until = references.for_rego(now)
        # trustee's names for what the guest says of its init data: the digest, and the content.
        given = {
            **document,
            "init_data": document.get("init_data_digest"),
            "init_data_claims": document.get("init_data"),
        }
        try:
            value = _one_value(self._worker.ask(self.text, _HELPER, _json({"reference": values}), _json(given), query))
        except WorkerError as error:
            return refused(query, str(error), expected)
        if not isinstance(value, dict) or not value:
            return refused(query, _shown(value), expected)
        for claim, number in value.items():
            if claim not in TRUST_CLAIMS or type(number) is not int or not -128 <= number <= 127:
                return refused(query, f"{_shown(claim)}: {_shown(number)}", "AR4SI claims, each an integer -128 .. 127")
        status = status_of(value.values())
        trust = MappingProxyType(value)
        if status not in self.statuses:
            worst = ", ".join(f"{claim} {number}" for claim, number in value.items() if status_of((number,)) == status)
            return Decision(False, query, f"{status}: {worst}", expected, trust, status, None, (query,))
        # Which references the policy has looked at nobody knows; it holds as long as all of them.
        return Decision(True, query, status, expected, trust, status, until, (query,))

    def explain(self, document: Mapping[str, Any], references: References, now: float) -> str:
        """What it says of a document: Rego does not tell why."""
        decision = self.evaluate(document, references, now)
        lines = [f"{self.kind} policy in Rego, digest {self.digest}"]
        lines += [f"  {claim}: {number} ({status_of((number,))})" for claim, number in decision.trust.items()]
        if decision.allowed:
            lines.append(f"allowed, {decision.status}" if self.kind == "appraisal" else "allowed")
        else:
            lines.append(f"not allowed: {decision.rule}: found {decision.observed}; expected {decision.expected}")
        return "\n".join(lines)


def evaluate_verdictd(
    policy_text: str, data_json: str, document: Mapping[str, Any] | str, *, worker: RegoWorker | None = None
) -> Decision:
    """What a policy of Verdictd says: `data.policy.allow` must be exactly true.

    In: policy_text   Rego, package policy, of either syntax
        data_json     the reference document, a JSON object that becomes the root of `data`, e.g. {"measure": [base64]}
        document      the input, e.g. {"measure": base64 of the launch digest}, or its JSON
    Never raises for what stands in them: what cannot be evaluated is not allowed. MissingExtraError without regopy.
    """
    query = _QUERIES["resource"]
    worker = worker or shared_worker()
    try:
        _check_spelling(checked_text("resource", policy_text))
        data = _object(data_json, "data")
        if "policy" in data:
            # The interpreter would take rules of the policy from there.
            raise FormatError("Verdictd data", "policy", None, "a member of the policy's own name", "none")
        given = _object(document, "input") if isinstance(document, str) else dict(document)
        value = _one_value(worker.ask(policy_text, None, _json(data), _json(given), query))
    except (WorkerError, ValueError, TypeError, RecursionError) as error:
        return refused(query, str(error)[:300], "true")
    if value is not True:
        return refused(query, _shown(value), "true")
    return Decision(True, query, checked=(query,))


def _check_spelling(text: str) -> None:
    if not _PACKAGE.match(text):
        raise FormatError("policy", "package", None, "another beginning", "package policy, before anything but comments")
    if (found := _SPELT_OTHERWISE.search(text)) is not None:
        line = text.count("\n", 0, found.start()) + 1
        raise FormatError("policy", "text", None, f"{found[0]} in line {line}", "the character itself: texts compare by spelling")


def _check_module(worker: RegoWorker, text: str, helper: str | None) -> None:
    """Compiles it, by asking for the whole package with nothing to go on."""
    _check_spelling(text)
    try:
        worker.ask(text, helper, _json({"reference": {}}), _json({}), _ANY_ANSWER)
    except WorkerError as error:
        raise FormatError("policy", "Rego", None, str(error), "a module that the interpreter compiles") from None


def _one_value(output: str) -> Any:
    """The value of the one expression of the one result. WorkerError when there are none or more."""
    if output == "undefined":
        raise WorkerError("undefined")
    try:
        result = json.loads(output, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise WorkerError(f"an answer that is no JSON: {error}"[:200]) from None
    if not isinstance(result, dict) or result.keys() != {"expressions"}:
        raise WorkerError(f"several results; expected {_ONE_ANSWER}")
    values = result["expressions"]
    if not isinstance(values, list) or len(values) != 1:
        raise WorkerError(f"several expressions; expected {_ONE_ANSWER}")
    return values[0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _object(text: str, what: str) -> dict[str, Any]:
    if len(text) > MESSAGE_LIMIT:
        raise FormatError(f"Verdictd {what}", "length", None, f"{len(text)} characters", f"at most {MESSAGE_LIMIT}")
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise FormatError(f"Verdictd {what}", "root", None, type(value).__name__, "a JSON object")
    return value


def _json(value: Any) -> str:
    # Characters as themselves, as policies have them.
    return json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
