"""TOML rules: every operator by known answers, everything that is no rule refused, nothing allowed by mistake."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.policy import Decision, Policy, Reference, References, compile_policy, dry_run
from csvfast.broker.policy.decision import status_of, tier_of, worse
from csvfast.broker.policy.patterns import claim_reader, pattern_matcher, resource_matcher, version_key
from csvfast.errors import FormatError

NOW = 1_800_000_000.0
NONE = References()


def appraisal(rules: str) -> Policy:
    return compile_policy("appraisal", "rules", f'name = "test"\n{rules}')


def one_rule(rule: str) -> Policy:
    return appraisal(f'[[rule]]\nname = "it"\nclaim = "x"\n{rule}')


def resource(blocks: str) -> Policy:
    return compile_policy("resource", "rules", f'name = "test"\n{blocks}')


def allows(policy: Policy, document: dict[str, Any], references: References = NONE, now: float = NOW) -> bool:
    return policy.evaluate(document, references, now).allowed


# ---- Operators

OPERATORS: list[tuple[str, list[Any], list[Any]]] = [
    ("equals = 1", [1], [0, 2, True, 1.0, "1", [1], {"x": 1}]),
    ("equals = true", [True], [False, 1, "true"]),
    ('equals = "csv"', ["csv"], ["CSV", "csv ", "", 1, ["csv"]]),
    ("not_equals = 0", [1, -1], [0, False, "0", 0.0, []]),
    ('not_equals = "sample"', ["csv"], ["sample", 0, ["sample"]]),
    ("in = [1, 2]", [1, 2], [3, True, "1", [1]]),
    ('in = ["a", "b", 3, true]', ["a", "b", 3, True], ["c", 1, False, "3", ["a"], {"a": 1}]),
    ("min = 5", [5, 6, 1 << 70], [4, -5, 5.0, "5", True]),
    ("max = 5", [5, -1], [6, 5.0, "5", False]),
    ("mask = 0x45\nvalue = 0x45", [0x45, 0xFF, 0x4000_0045], [0x44, 0x05, 0, "69", True]),
    ("mask = 0x81\nvalue = 0x01", [0x01, 0x7F], [0x81, 0x80, 0]),
    ("mask = 2\nvalue = 0", [0, 1, 5], [2, 3]),
    (
        'version_min = "1.3"',
        ["1.3", "1.3.0", "1.10", "2", "1.3.0.1"],
        ["1.2", "1", "0.9", "1.2.99", 1.3, 2, "1.x", "", "1..3", "v2", "1.3\n", "-1.3"],
    ),
    ('matches = "KPA*"', ["KPA", "KPA649"], ["XKPA", "kpa1", 1, ["KPA"]]),
    ('matches = "a*b*c"', ["abc", "a-b-c", "abbc", "abcbc"], ["ab", "ac", "abcd", "xabc"]),
    ('matches = "exact"', ["exact"], ["exact ", "exac", 5]),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "good", "bad"), OPERATORS, ids=[one[0].split("\n")[0] for one in OPERATORS])
def test_operator(operator: str, good: list[Any], bad: list[Any]) -> None:
    policy = one_rule(operator)
    for value in good:
        assert allows(policy, {"x": value}), value
    for value in [*bad, None]:
        decision = policy.evaluate({"x": value}, NONE, NOW)
        assert not decision.allowed, value
        assert (decision.rule, decision.status) == ("it", "contraindicated")
        assert decision.observed.startswith("x ")
        assert decision.expected
    assert policy.evaluate({}, NONE, NOW).observed == "x absent"


def test_reference() -> None:
    policy = one_rule('reference = "good"')
    current = References({"good": Reference(["a", 5], NOW + 1)})
    assert policy.evaluate({"x": "a"}, current, NOW) == Decision(
        True, status="affirming", valid_until=NOW + 1, checked=("it",)
    )
    assert allows(policy, {"x": 5}, current)
    for value in ("b", "", True, 5.0, None, ["a"], {"a": 1}):
        assert not allows(policy, {"x": value}, current), value
    assert not allows(policy, {"x": "a"}, NONE)
    assert not allows(policy, {"x": "a"}, current, NOW + 1), "it expires at that moment, not after it"
    assert not allows(policy, {"x": "a"}, current, float("nan"))
    assert allows(policy, {"x": "a"}, References({"good": Reference(["a"])}), 1e18)
    assert not allows(policy, {"x": None}, References({"good": Reference([None])}))
    expected = policy.evaluate({"x": "a"}, current, NOW + 2).expected
    assert expected == "one of reference good, which expired 2027-01-15T08:00:01Z"
    assert policy.evaluate({"x": "b"}, current, NOW).expected == "one of reference good: a or 5"
    assert policy.evaluate({"x": "b"}, NONE, NOW).expected == "one of reference good, which is not registered"


def test_optional_is_for_references_nobody_ever_registered() -> None:
    policy = appraisal(
        '[[rule]]\nname = "tee"\nclaim = "tee"\nequals = "csv"\n'
        '[[rule]]\nname = "chip"\nclaim = "x"\nreference = "chips"\noptional = true\n'
    )
    assert policy.evaluate({"tee": "csv"}, NONE, NOW).checked == ("tee",)
    assert policy.evaluate({"tee": "csv"}, NONE, NOW).allowed
    assert not allows(policy, {"tee": "csv", "x": "a"}, References({"chips": Reference(["a"], NOW)})), "expired"
    withdrawn = References({"chips": Reference([], 0.0)})
    assert not allows(policy, {"tee": "csv", "x": "a"}, withdrawn)
    assert "withdrawn" in policy.evaluate({"tee": "csv", "x": "a"}, withdrawn, NOW).expected
    assert not allows(policy, {"tee": "csv"}, References({"chips": Reference(["a"])})), "registered, and the claim is absent"
    assert allows(policy, {"tee": "csv", "x": "a"}, References({"chips": Reference(["a"])}))


def test_minimum_by_reference() -> None:
    policy = one_rule('version_min_reference = "api"')
    for values, found, expected in (
        (["1.3"], "1.3", True),
        (["1.3"], "1.2", False),
        (["1.3", "1.5"], "1.4", False),  # of several the highest
        (["1.3", "1.5"], "1.5", True),
        (["1.3", "x"], "9.9", False),
        ([1], "9.9", False),
        ([], "9.9", False),
        ([{"single": "1.3"}], "1.3", True),
        ([{"single": "1.3"}], "1.2", False),
    ):
        assert allows(policy, {"x": found}, References({"api": Reference(values)})) is expected, (values, found)
    number = one_rule('min_reference = "build"')
    for items, build, expected in (([5], 5, True), ([5], 4, False), ([5, 7], 6, False), (["5"], 9, False), ([True], 9, False)):
        assert allows(number, {"x": build}, References({"build": Reference(items)})) is expected, (items, build)
    assert not allows(number, {"x": True}, References({"build": Reference([0])}))


def test_valid_until_is_the_earliest_expiry_of_what_was_relied_on() -> None:
    policy = appraisal(
        '[[rule]]\nname = "a"\nclaim = "a"\nreference = "late"\n'
        '[[rule]]\nname = "b"\nclaim = "b"\nreference = "early"\noptional = true\n'
        '[[rule]]\nname = "c"\nany = [{ claim = "c", reference = "soon" }, { claim = "c", equals = 1 }]\n'
    )
    values = {"late": Reference(["x"], NOW + 50), "early": Reference(["x"], NOW + 20), "soon": Reference(["x"], NOW + 5)}
    document = {"a": "x", "b": "x", "c": 1}
    assert policy.evaluate(document, References(values), NOW).valid_until == NOW + 20, "`soon` was not relied on"
    assert policy.evaluate({**document, "c": "x"}, References(values), NOW).valid_until == NOW + 5
    del values["early"]
    assert policy.evaluate(document, References(values), NOW).valid_until == NOW + 50
    assert policy.evaluate(document, References({**values, "late": Reference(["x"])}), NOW).valid_until is None


# ---- Rules together


def test_first_failing_rule_is_named_and_those_behind_it_are_not_looked_at() -> None:
    rules = "".join(f'[[rule]]\nname = "rule {n}"\nclaim = "{n}"\nequals = 1\n' for n in "abc")
    policy = appraisal(rules)
    decision = policy.evaluate({"a": 1, "b": 2, "c": 3}, NONE, NOW)
    assert decision == Decision(
        False, "rule b", "b 2", "1", status="contraindicated", checked=("rule a", "rule b")
    )
    text = dry_run(policy, {"a": 1, "b": 2, "c": 3}, NONE, NOW).splitlines()
    assert [line.split()[0] for line in text] == ["appraisal", "holds", "FAILS", "FAILS", "not"]
    assert text[-1] == "not allowed: rule b: found b 2; expected 1"
    assert dry_run(policy, dict.fromkeys("abc", 1), NONE, NOW).endswith("\nallowed, affirming")


def test_any() -> None:
    policy = appraisal('[[rule]]\nname = "or"\nany = [{ claim = "es", equals = 1 }, { claim = "csv3", equals = 1 }]')
    for es, csv3 in ((1, 0), (0, 1), (1, 1)):
        assert allows(policy, {"es": es, "csv3": csv3})
    decision = policy.evaluate({"es": 0}, NONE, NOW)
    assert (decision.observed, decision.expected) == ("es or csv3 es 0, csv3 absent", "es 1 or csv3 1")


def test_when() -> None:
    policy = appraisal(
        '[[rule]]\nname = "tee"\nclaim = "tee"\nin = ["csv", "sample"]\n'
        '[[rule]]\nname = "measure"\nwhen = { tee = "csv" }\nclaim = "measure"\nequals = "a"\n'
    )
    assert allows(policy, {"tee": "sample"})
    assert not allows(policy, {"tee": "csv"})
    assert allows(policy, {"tee": "csv", "measure": "a"})
    scoped = appraisal('[[rule]]\nname = "m"\nwhen = { tee = "csv" }\nclaim = "measure"\nequals = "a"\n')
    assert not allows(scoped, {"tee": "sample", "measure": "a"}), "no rule applies: nothing has been shown"
    for tee in (None, 5, ["csv"]):
        assert not allows(scoped, {"tee": tee, "measure": "a"}), "nobody can tell whether the rule applies"


def test_trust_and_status() -> None:
    def policy(first: int, second: int) -> Policy:
        return appraisal(
            f'[[rule]]\nname = "a"\nclaim = "a"\nequals = 1\ntrust = {{ executables = {first}, hardware = 2 }}\n'
            f'[[rule]]\nname = "b"\nclaim = "b"\nreference = "b"\noptional = true\ntrust = {{ executables = {second} }}\n'
        )

    both = References({"b": Reference([1])})
    decision = policy(3, 2).evaluate({"a": 1, "b": 1}, both, NOW)
    assert (decision.allowed, decision.status, dict(decision.trust)) == (True, "affirming", {"executables": 3, "hardware": 2})
    decision = policy(3, 33).evaluate({"a": 1, "b": 1}, both, NOW)
    assert (decision.allowed, decision.status, dict(decision.trust)) == (True, "warning", {"executables": 33, "hardware": 2})
    decision = policy(3, 33).evaluate({"a": 1}, NONE, NOW)
    assert (decision.status, dict(decision.trust)) == ("affirming", {"executables": 3, "hardware": 2}), "b was skipped"
    decision = policy(3, 97).evaluate({"a": 1, "b": 1}, both, NOW)
    assert (decision.allowed, decision.status) == (False, "contraindicated")
    decision = policy(3, 2).evaluate({"a": 0}, both, NOW)
    assert (decision.allowed, dict(decision.trust)) == (False, {"executables": 96, "hardware": 96})
    nothing = appraisal('[[rule]]\nname = "a"\nclaim = "a"\nequals = 1\ntrust = { executables = 0 }\n')
    assert nothing.evaluate({"a": 1}, NONE, NOW).status == "none"


def test_tiers() -> None:
    for value in range(-128, 128):
        size = value if value >= 0 else -value - 1  # the negative tiers begin one further from zero
        expected = 0 if -1 <= value <= 1 else 1 if size < 32 else 2 if size < 96 else 3
        assert tier_of(value) == expected, value
    assert [tier_of(value) for value in (2, 31, 32, 95, 96, -2, -32, -33, -96, -97)] == [1, 1, 2, 2, 3, 1, 1, 2, 2, 3]
    assert status_of([]) == "none"
    assert status_of([0, 1, -1]) == "none"
    assert status_of([0, 2]) == "affirming"
    assert status_of([2, 36, 3]) == "warning"
    assert status_of([33, 97, 36]) == "contraindicated", "what trustee's default policy says of every CSV guest"
    assert (worse(2, 3), worse(2, -33), worse(0, 2), worse(96, 95)) == (3, -33, 2, 96)


# ---- Resource policies

BLOCKS = """
[[allow]]
resource = "default/key/root"
[[allow.rule]]
name = "never"
claim = "resource"
equals = "never"

[[allow]]
resource = "default/key/*"
[[allow.rule]]
name = "affirmed"
claim = "status"
equals = "affirming"

[[allow]]
resource = "*/cert/*"
plugin = "other"
[[allow.rule]]
name = "tee"
claim = "tee"
equals = "csv"
"""


def test_first_block_that_fits_decides() -> None:
    policy = resource(BLOCKS)

    def ask(path: str, plugin: str = "resource", **members: Any) -> Decision:
        return policy.evaluate({"plugin": plugin, "resource": path, **members}, NONE, NOW)

    assert ask("default/key/a", status="affirming") == Decision(True, "allow default/key/*", checked=("affirmed",))
    assert not ask("default/key/a", status="warning").allowed
    root = ask("default/key/root", status="affirming")
    assert not root.allowed, "the block for all keys stands behind it"
    assert (root.rule, root.expected) == ("allow default/key/root: never", "never")
    for path in ("default/key/a/b", "default/key", "other/key/a", "default/keys/a", "", "x/cert/y"):
        refused = ask(path, status="affirming", tee="csv")
        assert (refused.allowed, refused.rule) == (False, "allow"), path
    assert ask("x/cert/y", "other", tee="csv").allowed
    assert not policy.evaluate({"plugin": "resource", "resource": None}, NONE, NOW).allowed
    assert not policy.evaluate({"resource": "default/key/a", "status": "affirming"}, NONE, NOW).allowed
    text = dry_run(policy, {"plugin": "resource", "resource": "default/key/a", "status": "none"}, NONE, NOW)
    assert "block default/key/* decides" in text
    assert text.endswith("not allowed: allow default/key/*: affirmed: found status none; expected affirming")
    assert "no block covers resource x/y/z" in dry_run(policy, {"plugin": "resource", "resource": "x/y/z"}, NONE, NOW)


def test_when_of_resource_rules() -> None:
    policy = resource(
        '[[allow]]\nresource = "*/*/*"\n'
        '[[allow.rule]]\nname = "a"\nclaim = "status"\nequals = "affirming"\n'
        '[[allow.rule]]\nname = "b"\nwhen = { resource = "prod/*/*", tee = "csv" }\nclaim = "csv.vm_id"\nequals = "1"\n'
    )
    document = {"plugin": "resource", "resource": "test/key/a", "status": "affirming", "tee": "csv"}
    assert allows(policy, document)
    assert not allows(policy, {**document, "resource": "prod/key/a"})
    assert allows(policy, {**document, "resource": "prod/key/a", "csv": {"vm_id": "1"}})


# ---- What is no policy

RULE = '[[rule]]\nname = "it"\nclaim = "x"\nequals = 1\n'
BLOCK = '[[allow]]\nresource = "a/b/c"\n[[allow.rule]]\nname = "it"\nclaim = "x"\nequals = 1\n'
REFUSED: list[tuple[str, str, str]] = [
    ("appraisal", "", "text"),
    ("appraisal", "# only a comment", "name"),
    ("appraisal", 'name = "x"', "[[rule]]"),
    ("appraisal", 'name = "x"\nrule = []', "[[rule]]"),
    ("appraisal", 'name = "x"\nrule = 5', "[[rule]]"),
    ("appraisal", 'name = "x"\nrule = [5]', "[[rule]][0]"),
    ("appraisal", RULE, "name"),
    ("appraisal", f'name = ""\n{RULE}', "name"),
    ("appraisal", f'name = "a\\nb"\n{RULE}', "name"),
    ("appraisal", f'name = "x"\nversion = 1\n{RULE}', "version"),
    ("appraisal", f'name = "x"\nrules = 1\n{RULE}', "rules"),
    ("appraisal", f'name = "x"\n{BLOCK}', "allow"),
    ("appraisal", f'name = "x"\n{RULE}{RULE}', "rule[1].name"),
    ("appraisal", f'name = "x"\n{RULE}optional = true', "rule[0] (it).optional"),
    ("appraisal", f'name = "x"\n{RULE}max = 1', "rule[0] (it)"),
    ("appraisal", f'name = "x"\n{RULE}equal = 1', "rule[0] (it)"),
    ("appraisal", f'name = "x"\n{RULE}value = 1', "rule[0] (it)"),
    ("appraisal", f'name = "x"\n{RULE}trust = {{}}', "rule[0] (it).trust"),
    ("appraisal", f'name = "x"\n{RULE}trust = {{ executable = 2 }}', "rule[0] (it).trust.executable"),
    ("appraisal", f'name = "x"\n{RULE}trust = {{ executables = 128 }}', "rule[0] (it).trust.executables"),
    ("appraisal", f'name = "x"\n{RULE}trust = {{ executables = true }}', "rule[0] (it).trust.executables"),
    ("appraisal", f'name = "x"\n{RULE}when = {{}}', "rule[0] (it).when"),
    ("appraisal", f'name = "x"\n{RULE}when = {{ resource = "*" }}', "rule[0] (it).when.resource"),
    ("appraisal", f'name = "x"\n{RULE}when = {{ tee = 1 }}', "rule[0] (it).when.tee"),
    ("appraisal", f'name = "x"\n{RULE}any = [{{ claim = "x", equals = 1 }}]', "rule[0] (it).claim"),
    ("appraisal", 'name = "x"\n[[rule]]\nclaim = "x"\nequals = 1', "rule[0].name"),
    ("appraisal", 'name = "x"\n[[rule]]\nname = "it"\nequals = 1', "rule[0] (it).claim"),
    ("appraisal", 'name = "x"\n[[rule]]\nname = "it"\nclaim = "x"', "rule[0] (it)"),
    ("appraisal", 'name = "x"\n[[rule]]\nname = "it"\nany = []', "rule[0] (it).any"),
    ("appraisal", 'name = "x"\n[[rule]]\nname = "it"\nany = [{ claim = "x" }]', "rule[0] (it).any[0]"),
    (
        "appraisal",
        'name = "x"\n[[rule]]\nname = "it"\nany = [{ claim = "x", reference = "r", optional = true }]',
        "rule[0] (it).any[0].optional",
    ),
    ("appraisal", 'name = "x"\n[[rule]]\nname = "it"\nany = [{ any = [] }]', "rule[0] (it).any[0].claim"),
    ("appraisal", "name = ", "syntax"),
    ("appraisal", 'name = "x"\nname = "y"', "syntax"),
    ("appraisal", f"x = {'[' * 5000}", "nesting"),
    ("appraisal", f"x = {'9' * 5000}", "number"),
    ("appraisal", f"{'a.' * 400_000}a = 1", "syntax"),  # tomllib would take hours
    ("appraisal", f"{'a . ' * 200_000}a = 1", "syntax"),
    ("appraisal", "'a'." * 200_000 + "a = 1", "syntax"),
    ("appraisal", '"a.b".' * 100_000 + "a = 1", "syntax"),
    ("appraisal", "a" * 1_000_000, "syntax"),
    ("appraisal", '"' * 1_000_000, "syntax"),
    ("appraisal", f'name = "x"\n{RULE}#{"x" * (1 << 20)}', "length"),
    ("appraisal", 'name = "\ud800"', "text"),
    ("appraisals", RULE, "kind"),
    ("resource", f'name = "x"\n{RULE}', "rule"),
    ("resource", 'name = "x"\n[[allow]]\nresource = "a/b/c"', "allow[0].rule"),
    ("resource", f'name = "x"\n{BLOCK}trust = {{ hardware = 2 }}', "allow[0].rule[0] (it).trust"),
    ("resource", f'name = "x"\n{BLOCK}{BLOCK}', "allow[1].resource"),
    ("resource", f'name = "x"\n{BLOCK.replace("a/b/c", "a/b")}', "allow[0].resource"),
    ("resource", f'name = "x"\n{BLOCK.replace("a/b/c", "a//c")}', "allow[0].resource"),
    ("resource", f'name = "x"\n{BLOCK.replace("a/b/c", "**")}', "allow[0].resource"),
    ("resource", f'name = "x"\n{BLOCK.replace("resource", "path")}', "allow[0].resource"),
    ("resource", f'name = "x"\n[[allow]]\ndeny = true\n{BLOCK.removeprefix("[[allow]]")}', "allow[0].deny"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "field"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_policy(kind: str, text: str, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        compile_policy(kind, "rules", text)
    assert caught.value.field == field
    assert len(str(caught.value)) < 700


VALUES: list[str] = [
    "equals = 1.5", "equals = []", "equals = {}", "equals = 2026-01-01", "equals = 0x10000000000000000", 'equals = "{long}"',
    "in = 1", "in = []", "in = [[1]]", "in = [1.5]", 'min = "1"', "min = true", "max = 1.5", "mask = 1", "mask = 0\nvalue = 0",
    "mask = 1\nvalue = 2", "mask = -1\nvalue = 1", 'mask = "1"\nvalue = 1', "version_min = 1.3", 'version_min = "1.x"',
    'version_min = ""', "matches = 1", 'matches = ""', "reference = 1", 'reference = ""', 'reference = "r"\noptional = 1',
    "min_reference = []", 'version_min_reference = ""',
]  # fmt: skip


@pytest.mark.parametrize("operator", VALUES)
def test_values_no_operator_takes(operator: str) -> None:
    with pytest.raises(FormatError):
        one_rule(operator.replace("{long}", "x" * 1025))


def test_engines() -> None:
    with pytest.raises(FormatError, match="rules or rego"):
        compile_policy("appraisal", "cedar", "x")


# ---- Paths, patterns, versions


def test_claim_paths() -> None:
    document = {"a": {"b": [{"c": 1}, 2], "0": 3}, "ear.status": 4, "x": {"ear.status": 5}, "list": [1, [2]], "text": "abc"}
    for path, expected in (
        ("a.b.0.c", 1), ("a.b.1", 2), ("a.0", 3), ('"ear.status"', 4), ('x."ear.status"', 5), ("list.1.0", 2), ("list.0", 1),
        ("a.b.2", None), ("a.b.-1", None), ("text.0", None), ("a.b.c", None), ("nothing", None), ("nothing.at.all", None),
        ("ear.status", None), ("a.b.00000000001", None), ("list.0.0", None),
    ):  # fmt: skip
        assert claim_reader(path)(document) == expected, path
    for path in ("", ".", "a.", ".a", "a..b", "a b", '"a', 'a"b"', "a.é", "a/b", ".".join("a" * 17), "a" * 257, '""'):
        with pytest.raises(ValueError, match=r"name|dot"):
            claim_reader(path)


TEXT = st.text(alphabet="ab*/.", max_size=12)


@given(pattern=TEXT, text=st.text(alphabet="ab/.", max_size=12))
def test_patterns_are_what_regular_expressions_would_be(pattern: str, text: str) -> None:
    whole = ".*".join(map(re.escape, pattern.split("*")))
    assert pattern_matcher(pattern)(text) is bool(re.fullmatch(whole, text))
    segments = "[^/]*".join(map(re.escape, pattern.split("*")))
    assert resource_matcher(pattern)(text) is bool(re.fullmatch(segments, text))


def test_a_pattern_takes_linear_time() -> None:
    assert not pattern_matcher("*a" * 500 + "b")("a" * 200_000)


@given(left=st.lists(st.integers(0, 999), min_size=1, max_size=4), right=st.lists(st.integers(0, 999), min_size=1, max_size=4))
def test_versions_compare_number_by_number(left: list[int], right: list[int]) -> None:
    first, second = version_key(".".join(map(str, left))), version_key(".".join(map(str, right)))
    assert first is not None
    assert second is not None
    padded = [left + [0] * (4 - len(left)), right + [0] * (4 - len(right))]
    assert (first < second, first == second) == (padded[0] < padded[1], padded[0] == padded[1])


# ---- Whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["x", "tee", "resource", "0", "b"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip
OPTIONAL = 'reference = "r"\noptional = true'
ALL = "".join(
    f'[[rule]]\nname = "{index}"\nclaim = "x.b"\n{operator}\n' for index, (operator, _good, _bad) in enumerate(OPERATORS)
)


@given(document=st.dictionaries(st.sampled_from(["x", "tee", "resource", "plugin"]), JSON))
def test_no_document_makes_a_policy_raise(document: dict[str, Any]) -> None:
    for policy in (appraisal(ALL), resource(BLOCKS)):
        decision = policy.evaluate(document, NONE, NOW)
        assert not decision.allowed
        assert dry_run(policy, document, NONE, NOW)


@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["equals = 0", "equals = 1", "min = 1", "max = 0", "in = [0, 1]", OPTIONAL]),
            st.sampled_from("abc"),
        ),
        min_size=1, max_size=5,
    ),
    document=st.dictionaries(st.sampled_from("abc"), st.integers(0, 1)),
    registered=st.booleans(),
)  # fmt: skip
def test_allowed_means_that_every_rule_alone_allows_or_is_skipped(
    rules: list[tuple[str, str]], document: dict[str, int], registered: bool
) -> None:
    references = References({"r": Reference([1])}) if registered else NONE
    texts = [f'[[rule]]\nname = "{index}"\nclaim = "{claim}"\n{operator}\n' for index, (operator, claim) in enumerate(rules)]
    alone = [appraisal(text).evaluate(document, references, NOW) for text in texts]
    applies = [one for one in alone if one.rule != "rule"]
    together = appraisal("".join(texts)).evaluate(document, references, NOW)
    assert together.allowed == (bool(applies) and all(one.allowed for one in applies))


def test_an_error_inside_a_policy_is_a_refusal() -> None:
    class Hostile(dict):  # type: ignore[type-arg]
        def get(self, *_arguments: object) -> Any:
            raise ZeroDivisionError("no")

    decision = one_rule("equals = 1").evaluate(Hostile(), NONE, NOW)
    assert (decision.allowed, decision.observed) == (False, "ZeroDivisionError: no")
    assert not one_rule("equals = 1").evaluate(None, NONE, NOW).allowed  # type: ignore[arg-type]


def test_observed_values_are_shortened_and_can_be_printed() -> None:
    policy = one_rule("equals = 1")
    for value in ("x" * 10_000, "\x1b[2J", list(range(10_000)), {"a": "\n"}, "", 10**5000):
        decision = policy.evaluate({"x": value}, NONE, NOW)
        assert len(decision.observed) < 200
        assert decision.observed.isprintable()


def test_decisions_survive_json() -> None:
    policy = appraisal('[[rule]]\nname = "a"\nclaim = "x"\nreference = "r"\ntrust = { hardware = 2 }\n')
    for document in ({"x": 1}, {"x": 2}):
        decision = policy.evaluate(document, References({"r": Reference([1], NOW + 5)}), NOW)
        again = Decision.from_dict(json.loads(json.dumps(decision.to_dict())))
        assert again == decision
        assert hash(again) == hash(decision)
    assert Decision.from_dict(Decision(False).to_dict()) == Decision(False)
    assert Decision(allowed=False).status == "none"
    with pytest.raises(TypeError):
        Decision.from_dict({"allowed": True, "more": 1})


def test_policies_are_identified_by_their_text() -> None:
    first, second = one_rule("equals = 1"), one_rule("equals = 2")
    assert re.fullmatch("[0-9a-f]{64}", first.digest)
    assert first.digest != second.digest
    assert first.digest == one_rule("equals = 1").digest
    assert (first.kind, first.engine, first.blocking) == ("appraisal", "rules", False)
    assert first.digest[:16] in repr(first)
