"""Policies as TOML rules: small enough to be read in full before they are trusted.

An appraisal policy lists rules, all of which must hold:

    name = "our guests"

    [[rule]]
    name = "no debugging"                    each rule has a name of its own, which refusals quote
    claim = "policy.nodbg"                   path into the document (csvfast.broker.policy.documents)
    equals = 1                               exactly one operator
    trust = { configuration = 2 }            AR4SI values set when the rule holds

    [[rule]]
    name = "encrypted registers"
    any = [{ claim = "policy.es", equals = 1 }, { claim = "policy.csv3", equals = 1 }]

    [[rule]]
    name = "measurement"
    when = { tee = "csv" }                   skipped for others
    claim = "measure"
    reference = "csv_measure"                a value of that reference, which has not expired
    optional = true                          skipped when no such reference is registered

A resource policy lists blocks. The first block whose `plugin` and `resource` fit the request decides, and no other is looked at:
all its rules must hold. A request that no block fits is not allowed.

    [[allow]]
    resource = "default/key/*"               `*` stands for any characters but a slash
    plugin = "resource"                      the default

    [[allow.rule]]
    name = "affirmed"
    claim = "status"
    equals = "affirming"

A policy whose rules are all skipped allows nothing. Unknown members are refused, and so are a policy or a block without rules: a
typing error must not allow more than was meant.

Thread-safety: immutable objects.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from csvfast.broker.policy.base import Policy, checked_text, refused
from csvfast.broker.policy.conditions import (
    FAILED,
    FOREVER,
    SKIPPED,
    Check,
    Condition,
    either,
    read_condition,
    refuse,
    shown,
)
from csvfast.broker.policy.decision import NO_TRUST, TRUST_CLAIMS, Decision, status_of, worse
from csvfast.broker.policy.patterns import pattern_matcher, resource_matcher
from csvfast.broker.policy.references import References

__all__ = ["RulesPolicy"]

RULES_LIMIT: Final = 1000
"""Rules of a policy or block, blocks of a policy, conditions of an `any`."""

CONTRAINDICATED: Final = 96
"""What a rule that fails makes of the claims it would have vouched for."""

# tomllib takes quadratic time for a key of very many parts. This looks at each name and each quotation mark once or 33 times.
_LONG_KEY: Final = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){33}"""
)


class _Rule(NamedTuple):
    name: str
    check: Check  # of the condition, behind `when`
    condition: Condition
    trust: Mapping[str, int]


class _Block(NamedTuple):
    plugin: str
    resource: str
    matches: Any
    rules: _Rules


class _Rules:
    """Rules all of which must hold."""

    __slots__ = ("_all", "_checks", "rules")

    def __init__(self, rules: Sequence[_Rule]) -> None:
        self.rules: Final = tuple(rules)
        self._checks: Final = tuple(rule.check for rule in rules)
        self._all: Final = self._grounds(self.rules)

    @staticmethod
    def _grounds(rules: Sequence[_Rule]) -> tuple[tuple[str, ...], Mapping[str, int]]:
        """Names and trust vector when exactly these hold."""
        trust: dict[str, int] = {}
        for rule in rules:
            for claim, value in rule.trust.items():
                trust[claim] = worse(trust[claim], value) if claim in trust else value
        return tuple(rule.name for rule in rules), MappingProxyType(trust)

    def decide(
        self, document: Mapping[str, Any], references: References, now: float
    ) -> tuple[int, float, tuple[str, ...], Mapping[str, int]]:
        """Index of the first rule that fails, -1 when all hold, -2 when none applies; until when; names; trust vector."""
        until, index, skipped = FOREVER, 0, None
        for check in self._checks:
            answer = check(document, references, now)
            if answer < until:
                if answer == SKIPPED:
                    skipped = [index] if skipped is None else [*skipped, index]
                elif answer == FAILED:
                    names = [rule.name for place, rule in enumerate(self.rules[: index + 1]) if place not in (skipped or ())]
                    return index, until, tuple(names), NO_TRUST
                else:
                    until = answer
            index += 1
        if skipped is None:
            return -1, until, *self._all
        if len(skipped) == index:
            return -2, until, (), NO_TRUST
        return -1, until, *self._grounds([rule for place, rule in enumerate(self.rules) if place not in skipped])

    def explain(self, document: Mapping[str, Any], references: References, now: float) -> list[str]:
        """One line for each rule."""
        lines = []
        for rule in self.rules:
            answer = rule.check(document, references, now)
            observed, expected = rule.condition.explain(document, references, now)
            if answer == SKIPPED:
                lines.append(f"  skipped  {rule.name}")
            elif answer == FAILED:
                lines.append(f"  FAILS    {rule.name}: {rule.condition.claim}: found {observed}; expected {expected}")
            else:
                lines.append(f"  holds    {rule.name}: {rule.condition.claim}: {observed}")
        return lines


class RulesPolicy(Policy):
    """A policy of TOML rules.

    In: kind   "appraisal" or "resource"
        text   TOML, at most a MiB
    FormatError names the member at fault, what was found and what is expected.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, "rules", checked_text(kind, text))
        document = _parse(text)
        self.name: Final = _short_text(document.pop("name", None), "name")
        self.version: Final = _short_text(document.pop("version", "-"), "version")
        self._rules: _Rules | None = None
        self._blocks: tuple[_Block, ...] = ()
        self._sets_trust = False
        entry = "rule" if kind == "appraisal" else "allow"
        for name in document:
            if name != entry:
                refuse(shown(name), f"an unknown member of a policy of kind {kind}", f"name, version, [[{entry}]]")
        tables = _tables(document.get(entry), f"[[{entry}]]")
        if kind == "appraisal":
            self._rules = _Rules(_read_rules(tables, "rule", resource=False))
            self._sets_trust = any(rule.trust for rule in self._rules.rules)
        else:
            self._blocks = tuple(_read_block(table, f"allow[{index}]") for index, table in enumerate(tables))
            _require_reachable(self._blocks)

    def _evaluate(self, document: Mapping[str, Any], references: References, now: float) -> Decision:
        if self._rules is not None:
            return self._appraise(self._rules, document, references, now)
        block = self._block(document)
        if block is None:
            return refused("allow", _request(document), "a resource that some block covers")
        failed, until, names, _trust = block.rules.decide(document, references, now)
        if failed == -1:
            valid_until = None if until == FOREVER else until
            return Decision(True, f"allow {block.resource}", valid_until=valid_until, checked=names)
        if failed == -2:
            return refused(f"allow {block.resource}", "no rule that applies", "at least one")
        rule = block.rules.rules[failed]
        observed, expected = rule.condition.explain(document, references, now)
        where = f"{rule.condition.claim} {observed}"
        return refused(f"allow {block.resource}: {rule.name}", where, expected, checked=names)

    def _appraise(self, rules: _Rules, document: Mapping[str, Any], references: References, now: float) -> Decision:
        failed, until, names, trust = rules.decide(document, references, now)
        if failed == -1:
            # Rules that hold are what such a policy vouches by; a vector says more only when the policy has one.
            status = status_of(trust.values()) if self._sets_trust else "affirming"
            valid_until = None if until == FOREVER else until
            if status == "contraindicated":
                return refused("trust", "a vector that is contraindicated", "a better one", trust=trust, checked=names)
            return Decision(True, "", "", "", trust, status, valid_until, names)
        if failed == -2:
            return refused("rule", "none that applies to this guest", "at least one")
        rule = rules.rules[failed]
        observed, expected = rule.condition.explain(document, references, now)
        worst = MappingProxyType(dict.fromkeys(rule.trust, CONTRAINDICATED))
        return refused(rule.name, f"{rule.condition.claim} {observed}", expected, trust=worst, checked=names)

    def _block(self, document: Mapping[str, Any]) -> _Block | None:
        plugin, resource = document.get("plugin"), document.get("resource")
        if isinstance(resource, str):
            for block in self._blocks:
                if block.plugin == plugin and block.matches(resource):
                    return block
        return None

    def explain(self, document: Mapping[str, Any], references: References, now: float) -> str:
        """What it says of a document and why: a line for each rule, and the decision."""
        rules, about = self._rules, ""
        if rules is None:
            block = self._block(document)
            about = f"no block covers {_request(document)}" if block is None else f"block {block.resource} decides"
            rules = None if block is None else block.rules
        decision = self.evaluate(document, references, now)
        lines = [f"{self.kind} policy {self.name}, version {self.version}, digest {self.digest}"]
        lines += [f"  {about}"] if about else []
        lines += rules.explain(document, references, now) if rules is not None else []
        if decision.allowed:
            lines.append(f"allowed, {decision.status}" if self.kind == "appraisal" else "allowed")
        else:
            lines.append(f"not allowed: {decision.rule}: found {decision.observed}; expected {decision.expected}")
        return "\n".join(lines)


def _request(document: Mapping[str, Any]) -> str:
    return f"{shown(document.get('plugin'))} {shown(document.get('resource'))}"


# ---- Reading.


def _parse(text: str) -> dict[str, Any]:
    if _LONG_KEY.search(text):
        refuse("syntax", "dozens of names with dots between them", "keys of a few names")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        refuse("syntax", str(error)[:200], "TOML")
    except RecursionError:
        refuse("nesting", "too deep", "tables in tables, three levels")
    except ValueError:  # Python's limit on the digits of a number
        refuse("number", "thousands of digits", "an integer of 64 bits")


def _tables(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= RULES_LIMIT:
        found = f"{len(value)} entries" if isinstance(value, list) else shown(value)
        refuse(path, found, f"1 to {RULES_LIMIT} tables")
    for index, one in enumerate(value):
        if not isinstance(one, dict):
            refuse(f"{path}[{index}]", shown(one), "a table")
    return value


def _read_rules(tables: list[Any], path: str, *, resource: bool) -> list[_Rule]:
    rules: list[_Rule] = []
    names: set[str] = set()
    for index, table in enumerate(tables):
        rule = _read_rule(dict(table), f"{path}[{index}]", resource=resource)
        if rule.name in names:
            refuse(f"{path}[{index}].name", f"{shown(rule.name)} twice", "each name once")
        names.add(rule.name)
        rules.append(rule)
    return rules


def _read_rule(members: dict[str, Any], path: str, *, resource: bool) -> _Rule:
    name = _short_text(members.pop("name", None), f"{path}.name")
    path = f"{path} ({shown(name)})"
    scope = _read_when(members.pop("when", None), f"{path}.when", resource=resource)
    trust: Mapping[str, int] = NO_TRUST
    if "trust" in members:
        if resource:
            refuse(f"{path}.trust", "it in a resource policy", "trust in appraisal policies only")
        trust = _read_trust(members.pop("trust"), f"{path}.trust")
    if "any" in members:
        alternatives = _tables(members.pop("any"), f"{path}.any")
        for unknown in members:
            refuse(f"{path}.{shown(unknown)}", "it beside `any`", "claims and operators inside `any`")
        inner = [
            read_condition(one, f"{path}.any[{index}]", may_be_optional=False) for index, one in enumerate(alternatives)
        ]
        condition = either(tuple(inner))
    else:
        condition = read_condition(members, path, may_be_optional=True)
    return _Rule(name, condition.check if scope is None else _scoped(scope, condition.check), condition, trust)


def _read_when(value: Any, path: str, *, resource: bool) -> tuple[tuple[str, Any], ...] | None:
    """Members of the document and what each must fit for a rule to apply."""
    if value is None:
        return None
    known = ("tee", "resource") if resource else ("tee",)
    if not isinstance(value, dict) or not value:
        refuse(path, shown(value), f"a table with {' or '.join(known)}")
    for name in value:
        if name not in known:
            refuse(f"{path}.{shown(name)}", "an unknown member", f"{' or '.join(known)}")
    scope: list[tuple[str, Any]] = []
    for name in value:
        pattern = _short_text(value[name], f"{path}.{name}")
        scope.append((name, resource_matcher(pattern) if name == "resource" else pattern_matcher(pattern)))
    return tuple(scope)


def _scoped(scope: tuple[tuple[str, Any], ...], inner: Check) -> Check:
    def check(document: Mapping[str, Any], references: References, now: float) -> float:
        for name, fits in scope:
            found = document.get(name)
            if not isinstance(found, str):
                return FAILED  # nobody can tell whether the rule applies
            if not fits(found):
                return SKIPPED
        return inner(document, references, now)

    return check


def _read_trust(value: Any, path: str) -> Mapping[str, int]:
    if not isinstance(value, dict) or not value:
        refuse(path, shown(value), f"a table of {', '.join(TRUST_CLAIMS)}")
    for name, number in value.items():
        if name not in TRUST_CLAIMS:
            refuse(f"{path}.{shown(name)}", "an unknown claim", f"one of {', '.join(TRUST_CLAIMS)}")
        if type(number) is not int or not -128 <= number <= 127:
            refuse(f"{path}.{name}", shown(number), "an integer -128 .. 127")
    return MappingProxyType(dict(value))


def _read_block(table: Mapping[str, Any], path: str) -> _Block:
    members = dict(table)
    resource = _short_text(members.pop("resource", None), f"{path}.resource")
    plugin = _short_text(members.pop("plugin", "resource"), f"{path}.plugin")
    rules = _read_rules(_tables(members.pop("rule", None), f"{path}.rule"), f"{path}.rule", resource=True)
    for unknown in members:
        refuse(f"{path}.{shown(unknown)}", "an unknown member", "resource, plugin, [[allow.rule]]")
    if plugin == "resource" and (resource.count("/") != 2 or not all(resource.split("/"))):
        refuse(f"{path}.resource", shown(resource), "repository/type/tag, with * where anything may stand")
    return _Block(plugin, resource, resource_matcher(resource), _Rules(rules))


def _require_reachable(blocks: tuple[_Block, ...]) -> None:
    """A block behind one for the same resources would look as if it decided something."""
    seen: set[tuple[str, str]] = set()
    for index, block in enumerate(blocks):
        if (block.plugin, block.resource) in seen:
            refuse(f"allow[{index}].resource", f"{block.resource} a second time", "one block for it: the first that fits decides")
        seen.add((block.plugin, block.resource))


def _short_text(value: Any, path: str) -> str:
    if type(value) is not str or not 1 <= len(value) <= 256 or not value.isprintable():
        refuse(path, shown(value), "text of 1 to 256 characters that can be printed")
    return value
