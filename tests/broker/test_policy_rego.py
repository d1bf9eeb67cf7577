"""Policies in Rego: what CoCo's and Verdictd's say, one exact answer or none, in a process that can harm nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, REPORT_DATA, Platform

from csvfast.attest import verify
from csvfast.broker.policy import (
    Decision,
    Reference,
    References,
    appraisal_document,
    compile_policy,
    dry_run,
    resource_document,
)
from csvfast.broker.policy.rego import RegoPolicy, _one_value, evaluate_verdictd
from csvfast.broker.policy.rego_process import RegoLimits, RegoWorker, WorkerError
from csvfast.errors import FormatError

NOW = 1_800_000_000.0
NONE = References()
PLATFORM = Platform()

# The shape of CoCo's own: rego.v1, defaults for every claim, reference values by a function.
APPRAISAL = """# comments may stand before it
package policy

import rego.v1

default executables := 33
default hardware := 97
default configuration := 36
default instance_identity := 0

trust_claims := {
    "executables": executables,
    "hardware": hardware,
    "configuration": configuration,
    "instance-identity": instance_identity,
}

executables := 3 if {
    input.csv
    input.csv.measure in query_reference_value("csv_measure")
}

hardware := 2 if {
    input.csv
    input.csv.version >= query_reference_value("csv_version")
}

configuration := 2 if {
    input.csv.policy.nodbg == 1
    input.csv.policy.csv3 == 1
}
"""
ALLOW = "package policy\nimport rego.v1\ndefault allow := false\nallow if "
# What inclavare-containers/verdictd src/resources/opa.rs has for SGX, said of CSV: the syntax before Rego 1.
VERDICTD = """
package policy

# By default, deny requests.
default allow = false

allow {
    measure_is_grant
}

measure_is_grant {
    count(data.measure) == 0
}
measure_is_grant {
    count(data.measure) > 0
    input.measure == data.measure[_]
}
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[RegoWorker]:
    one = RegoWorker(RegoLimits(seconds=20, cpu_seconds=20))
    yield one
    one.close()


def limited(**limits: Any) -> Iterator[RegoWorker]:
    one = RegoWorker(RegoLimits(**limits))
    yield one
    one.close()


@pytest.fixture
def own_worker() -> Iterator[RegoWorker]:
    yield from limited(seconds=20, cpu_seconds=20)


def request(path: str = "default/key/a", query: dict[str, str] | None = None, **claims: Any) -> dict[str, Any]:
    return resource_document(path.split("/"), "resource", query or {}, claims)


def allow(worker: RegoWorker, body: str, **claims: Any) -> bool:
    return RegoPolicy("resource", ALLOW + body, worker=worker).evaluate(request(**claims), NONE, NOW).allowed


# ---- Resource policies


def test_resource_policy_sees_request_and_claims(worker: RegoWorker) -> None:
    policy = RegoPolicy(
        "resource",
        ALLOW
        + '{\n data.plugin == "resource"\n data["resource-path"] == ["default", "key", "a"]\n data.query.version == "2"\n'
        + ' input.submods.cpu0["ear.status"] == "affirming"\n}',
        worker=worker,
    )
    good = {"submods": {"cpu0": {"ear.status": "affirming"}}}
    assert policy.blocking
    assert policy.evaluate(request(query={"version": "2"}, **good), NONE, NOW) == Decision(
        True, "data.policy.allow", checked=("data.policy.allow",)
    )
    for wrong in (
        request(**good),
        request("default/key/b", {"version": "2"}, **good),
        request(query={"version": "2"}, submods={"cpu0": {"ear.status": "warning"}}),
        request(query={"version": "2"}),
    ):
        decision = policy.evaluate(wrong, NONE, NOW)
        assert (decision.allowed, decision.rule, decision.observed) == (False, "data.policy.allow", "undefined")
    assert "not allowed: data.policy.allow: found undefined; expected true" in dry_run(policy, request(), NONE, NOW)
    assert dry_run(policy, request(query={"version": "2"}, **good), NONE, NOW).endswith("\nallowed")


def test_every_submodule_affirming(worker: RegoWorker) -> None:
    # The same question as trustee's kbs/sample_policies/affirming.rego.
    policy = RegoPolicy(
        "resource",
        ALLOW
        + "{\n not some_other\n count(input.submods) > 0\n}\n"
        + 'some_other if {\n some _, one in input.submods\n one["ear.status"] != "affirming"\n}',
        worker=worker,
    )

    def ask(*statuses: str) -> bool:
        submodules = {f"cpu{index}": {"ear.status": status} for index, status in enumerate(statuses)}
        return policy.evaluate(request(submods=submodules), NONE, NOW).allowed

    assert ask("affirming")
    assert ask("affirming", "affirming")
    assert not ask("affirming", "warning")
    assert not ask()


@pytest.mark.parametrize(
    "value", ['"true"', "1", "[true]", "{true}", '{"a": true}', "null", "false", json.dumps('x"], "expressions":[true')]
)
def test_only_true_is_true(worker: RegoWorker, value: str) -> None:
    policy = RegoPolicy("resource", f"package policy\nallow := {value}", worker=worker)
    assert not policy.evaluate(request(), NONE, NOW).allowed


def test_an_error_while_evaluating_is_a_refusal(worker: RegoWorker) -> None:
    text = "package policy\nallow := true if { input.a }\nallow := 1 if { input.b }"
    policy = RegoPolicy("resource", text.replace("package policy", "package policy\nimport rego.v1"), worker=worker)
    assert policy.evaluate(request(a=True), NONE, NOW).allowed
    assert not policy.evaluate(request(a=True, b=True), NONE, NOW).allowed, "two values for one rule"
    assert policy.evaluate(request(a=True), NONE, NOW).allowed, "and the worker is as good as before"


def test_a_question_knows_nothing_of_the_one_before(worker: RegoWorker) -> None:
    policy = RegoPolicy("resource", ALLOW + "input.secret", worker=worker)
    other = RegoPolicy("resource", ALLOW + "{ data.query.x; not input.secret }", worker=worker)
    for _ in range(3):
        assert policy.evaluate(request(secret=True), NONE, NOW).allowed
        assert not policy.evaluate(request(), NONE, NOW).allowed
        assert other.evaluate(request(query={"x": "1"}), NONE, NOW).allowed
        assert not other.evaluate(request(), NONE, NOW).allowed


@pytest.mark.parametrize(
    "text", ['a"b', "a\\b", "a\nb", "é", "\U0001f600", "\x01", '", "x": "', "a`b", "{x}", "\u2028", "/", "' #"]
)
def test_texts_are_compared_as_they_are(worker: RegoWorker, text: str) -> None:
    body = "{ input.text == data.query.text }"
    policy = RegoPolicy("resource", ALLOW + body, worker=worker)
    assert policy.evaluate(request(query={"text": text}, text=text), NONE, NOW).allowed
    assert not policy.evaluate(request(query={"text": text}, text=f"{text}x"), NONE, NOW).allowed
    if text.isprintable() and not set(text) & set('"\\'):
        assert allow(worker, f'input.text == "{text}"', text=text)


# ---- Appraisal policies


def document() -> dict[str, Any]:
    return appraisal_document(verify(PLATFORM.evidence(), roots=PLATFORM.roots, report_data=REPORT_DATA))


REFERENCES = References(
    {
        "csv_measure": Reference(["00" * 32, MEASURE.hex()], NOW + 60),
        "csv_version": Reference([{"single": "1"}], NOW + 90),
        "gone": Reference(["x"], NOW),
    }
)


def test_appraisal_policy(worker: RegoWorker) -> None:
    policy = RegoPolicy("appraisal", APPRAISAL, worker=worker)
    decision = policy.evaluate(document(), REFERENCES, NOW)
    assert decision.allowed, decision
    assert decision.status == "affirming"
    assert dict(decision.trust) == {"executables": 3, "hardware": 2, "configuration": 2, "instance-identity": 0}
    assert decision.valid_until == NOW + 60
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    assert "executables: 3 (affirming)" in dry_run(policy, document(), REFERENCES, NOW)


def test_appraisal_policy_without_its_references(worker: RegoWorker) -> None:
    policy = RegoPolicy("appraisal", APPRAISAL, worker=worker)
    decision = policy.evaluate(document(), NONE, NOW)
    assert (decision.allowed, decision.status) == (False, "contraindicated")
    assert decision.observed == "contraindicated: hardware 97"
    for moment, status in ((NOW + 59.9, "affirming"), (NOW + 60, "warning"), (NOW + 90, "contraindicated")):
        decision = policy.evaluate(document(), REFERENCES, moment)
        assert (decision.allowed, decision.status) == (status == "affirming", status)
    expired = 'package policy\nimport rego.v1\ntrust_claims := {"executables": 3} if "x" in query_reference_value("gone")'
    assert not RegoPolicy("appraisal", expired, worker=worker).evaluate(document(), REFERENCES, NOW).allowed
    assert RegoPolicy("appraisal", expired, worker=worker).evaluate(document(), REFERENCES, NOW - 1).allowed


def test_only_what_is_verified_and_about_this_exchange_is_asked_about(worker: RegoWorker) -> None:
    policy = RegoPolicy("appraisal", 'package policy\ntrust_claims := {"executables": 3}', worker=worker)
    assert policy.evaluate(document(), NONE, NOW).allowed
    loose = appraisal_document(verify(PLATFORM.evidence(), roots=PLATFORM.roots))
    decision = policy.evaluate(loose, NONE, NOW)
    assert (decision.allowed, decision.rule, decision.observed) == (False, "bound", "bound false")
    for change in ({"chain_complete": False}, {"chain_complete": None}, {"bound": 1}):
        assert not policy.evaluate({**document(), **change}, NONE, NOW).allowed
    assert not policy.evaluate({}, NONE, NOW).allowed


def test_statuses_that_are_allowed(worker: RegoWorker) -> None:
    moment = NOW + 60  # the measurement's reference has expired: executables 33
    lenient = RegoPolicy("appraisal", APPRAISAL, statuses=("affirming", "warning"), worker=worker)
    decision = lenient.evaluate(document(), REFERENCES, moment)
    assert (decision.allowed, decision.status) == (True, "warning")
    assert not lenient.evaluate(document(), NONE, NOW).allowed
    with pytest.raises(FormatError, match="statuses"):
        RegoPolicy("appraisal", APPRAISAL, statuses=("good",), worker=worker)


@pytest.mark.parametrize(
    "claims",
    ['{"executable": 3}', '{"executables": "3"}', '{"executables": 3.5}', '{"executables": true}', '{"executables": 128}',
     '{"executables": -129}', '{"executables": null}', "{}", "[]", "3", "true", '{"executables": 3, "x": 2}',
     '{"executables": 1e400}', '{"executables": 0}', '{"hardware": 1}'],
)  # fmt: skip
def test_vectors_that_affirm_nothing(worker: RegoWorker, claims: str) -> None:
    policy = RegoPolicy("appraisal", f"package policy\ntrust_claims := {claims}", worker=worker)
    assert not policy.evaluate(document(), REFERENCES, NOW).allowed


def test_init_data_under_trustees_names(worker: RegoWorker) -> None:
    text = (
        'package policy\nimport rego.v1\ntrust_claims := {"executables": 3} if {\n'
        ' input.init_data == "abcd"\n input.init_data_claims.data["aa.toml"] == "x"\n'
        f' input.report_data == "{REPORT_DATA.hex()}"\n}}'
    )
    policy = RegoPolicy("appraisal", text, worker=worker)
    guest = verify(PLATFORM.evidence(), roots=PLATFORM.roots, report_data=REPORT_DATA)
    said = {"digest": "abcd", "data": {"aa.toml": "x"}}
    assert policy.evaluate(appraisal_document(guest, init_data=said), NONE, NOW).allowed
    assert not policy.evaluate(appraisal_document(guest, init_data={**said, "digest": "00"}), NONE, NOW).allowed
    assert not policy.evaluate(appraisal_document(guest), NONE, NOW).allowed


# ---- What is no policy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "text"),
        ("package other\nallow := true", "package"),
        ("allow := true", "package"),
        ("# package policy\nallow := true", "package"),
        ("package policy.more\nallow := true", "package"),
        ("package policy\nallow = ", "Rego"),
        ("package policy\nimport rego.v1\nallow if {", "Rego"),
        ("package policy\nimport rego.v1\nallow if nothing_by_that_name(1)", "Rego"),
        ("package policy\nimport rego.v1\nallow if f(1)\nf(x) if g(x)\ng(x) if f(x)", "Rego"),
        ('package policy\nallow := input.x == "\\u0041"', "text"),
        ("package policy\nallow := " + "[" * 20_000 + "]" * 20_000, "Rego"),  # ends the worker
        ("package policy\n#" + "x" * (1 << 20), "length"),
    ],
    ids=range(12),
)
def test_what_is_no_policy(worker: RegoWorker, text: str, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        RegoPolicy("resource", text, worker=worker)
    assert caught.value.field == field
    assert allow(worker, "input.x", x=1), "the next one is compiled"


def test_reference_values_are_for_appraisal(worker: RegoWorker) -> None:
    with pytest.raises(FormatError, match="query_reference_value"):
        RegoPolicy("resource", ALLOW + 'query_reference_value("x")', worker=worker)


def test_answers_of_the_interpreter() -> None:
    assert _one_value('{"expressions":[true]}') is True
    for output in (
        "undefined", "", "<error>", "true", "[]", "{}", '{"expressions":[]}', '{"expressions":[true, true]}',
        '{"expressions":[true], "bindings":{"x":1}}', '[{"expressions":[true]}, {"expressions":[true]}]',
        '{"expressions":[false],"expressions":[true]}', '{"expressions":[NaN]}', '{"expressions":{"0":true}}',
    ):  # fmt: skip
        with pytest.raises(WorkerError):
            _one_value(output)


# ---- Verdictd


def test_verdictd(worker: RegoWorker) -> None:
    data = json.dumps({"measure": ["bm90IHRoaXMgb25l", "ri8+QS/=="]})
    good = {"measure": "ri8+QS/=="}
    assert evaluate_verdictd(VERDICTD, data, good, worker=worker).allowed
    assert evaluate_verdictd(VERDICTD, data, json.dumps(good), worker=worker).allowed
    for other in ({"measure": "ri8+QS/="}, {"measure": ["ri8+QS/=="]}, {}, {"Measure": "ri8+QS/=="}):
        assert not evaluate_verdictd(VERDICTD, data, other, worker=worker).allowed
    assert evaluate_verdictd(VERDICTD, '{"measure": []}', {}, worker=worker).allowed, "as the original: an empty list is anything"


@pytest.mark.parametrize(
    ("policy", "data", "given"),
    [
        (VERDICTD, "", "{}"), (VERDICTD, "[]", "{}"), (VERDICTD, "{", "{}"), (VERDICTD, "{}", "[]"), (VERDICTD, "{}", "x"),
        (VERDICTD, '{"measure": [], "measure": []}', "{}"), (VERDICTD, '{"measure": NaN}', "{}"), ("", "{}", "{}"),
        ("package other\nallow = true", "{}", "{}"), (VERDICTD, '{"measure": []}' + " " * (9 << 20), "{}"),
        (VERDICTD, '{"policy": {"allow": true}}', "{}"),  # the interpreter would take it for the policy's answer
        ("package policy\nx = 1", '{"policy": {"allow": true}}', "{}"),
        (VERDICTD, '{"measure": ["\\ud800"]}', '{"measure": "\\ud800"}'),
        (VERDICTD, '{"measure": ' + "[" * 5000, "{}"),
    ],
    ids=range(14),
)  # fmt: skip
def test_verdictd_refuses(worker: RegoWorker, policy: str, data: str, given: str) -> None:
    decision = evaluate_verdictd(policy, data, given, worker=worker)
    assert not decision.allowed
    assert len(decision.observed) <= 300


# ---- The worker

SLOW = "{ input.go; count([1 | some i in numbers.range(1, 4000); some j in numbers.range(1, 4000); i * j == 7]) > 0 }"
LARGE = "{ input.go; count([[i, j] | some i in numbers.range(1, 4000); some j in numbers.range(1, 4000)]) > 0 }"


@pytest.mark.parametrize(
    ("limits", "body", "reason"),
    [
        ({"seconds": 0.5, "cpu_seconds": 60}, SLOW, "too long"),
        ({"seconds": 60, "cpu_seconds": 0.1}, SLOW, "processor time"),
        ({"seconds": 60, "cpu_seconds": 60, "memory": 64 << 20}, LARGE, "too much memory"),
    ],
    ids=["time", "processor", "memory"],
)
def test_limits(limits: dict[str, Any], body: str, reason: str) -> None:
    one = RegoWorker(RegoLimits(**limits))
    try:
        policy = RegoPolicy("resource", ALLOW + body, worker=one)
        before = one.pid
        started = time.monotonic()
        decision = policy.evaluate(request(go=True), NONE, NOW)
        assert time.monotonic() - started < 20
        assert not decision.allowed
        assert reason in decision.observed
        assert one.pid is None
        assert before is not None
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)
        assert policy.evaluate(request(), NONE, NOW).observed == "undefined", "a new worker answers"
        assert one.pid not in (None, before)
    finally:
        one.close()


def test_a_worker_that_is_killed_is_replaced(own_worker: RegoWorker) -> None:
    policy = RegoPolicy("resource", ALLOW + "input.x", worker=own_worker)
    assert own_worker.pid is not None
    os.kill(own_worker.pid, signal.SIGKILL)
    decision = policy.evaluate(request(x=1), NONE, NOW)
    assert not decision.allowed
    assert "ended" in decision.observed
    assert policy.evaluate(request(x=1), NONE, NOW).allowed


def test_the_policy_sees_no_environment(own_worker: RegoWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSVFAST_MASTER_PASSPHRASE", "swordfish")
    # The interpreter has opa.runtime(), which hands the environment to the policy.
    named = RegoPolicy("resource", ALLOW + "opa.runtime().env.CSVFAST_MASTER_PASSPHRASE", worker=own_worker)
    assert not named.evaluate(request(), NONE, NOW).allowed
    anything = '{ some name, _ in opa.runtime().env; not name in ["LANG", "LC_CTYPE"] }'
    others = RegoPolicy("resource", ALLOW + anything, worker=own_worker)
    assert not others.evaluate(request(), NONE, NOW).allowed
    assert own_worker.pid is not None
    assert b"swordfish" not in Path(f"/proc/{own_worker.pid}/environ").read_bytes()
    command = Path(f"/proc/{own_worker.pid}/cmdline").read_bytes()
    assert b"policy\0" not in command


def test_what_the_worker_holds_open_and_may_do(own_worker: RegoWorker) -> None:
    allow(own_worker, "input.x")
    folder = Path(f"/proc/{own_worker.pid}")
    opened = sorted(str(one.readlink()).split(":")[0] for one in (folder / "fd").iterdir())
    assert opened.count("pipe") == 2
    assert set(opened) == {"pipe", "/dev/null"}
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()[1:]}
    for name in ("Max core file size", "Max file size", "Max processes"):
        assert limits[name] == ["0", "0"], name
    assert limits["Max open files"] == ["16", "16"]
    assert limits["Max cpu time"][0] != "unlimited"
    assert limits["Max address space"][0] != "unlimited"
    assert (folder / "cwd").readlink() == Path("/")


def test_a_busy_worker_is_not_waited_for_without_end() -> None:
    one = RegoWorker(RegoLimits(seconds=0.5, cpu_seconds=60))
    try:
        slow = RegoPolicy("resource", ALLOW + SLOW, worker=one)
        quick = RegoPolicy("resource", ALLOW + "input.x", worker=one)
        results: list[Decision] = []
        threads = [
            threading.Thread(target=lambda: results.append(slow.evaluate(request(go=True), NONE, NOW))) for _ in range(4)
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(results) == 4
        assert not any(one.allowed for one in results)
        assert time.monotonic() - started < 15
        assert quick.evaluate(request(x=1), NONE, NOW).allowed
    finally:
        one.close()


def test_threads_take_turns(worker: RegoWorker) -> None:
    policy = RegoPolicy("resource", ALLOW + "{ input.n == data.query.n }", worker=worker)
    wrong: list[int] = []

    def ask(index: int) -> None:
        for turn in range(30):
            matches = turn % 2 == 0
            given = str(index) if matches else "other"
            if policy.evaluate(request(query={"n": given}, n=str(index)), NONE, NOW).allowed != matches:
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests' threads may still be ending
def test_a_forked_process_starts_a_worker_of_its_own(own_worker: RegoWorker) -> None:
    policy = RegoPolicy("resource", ALLOW + "input.x", worker=own_worker)
    assert policy.evaluate(request(x=1), NONE, NOW).allowed
    mine = own_worker.pid
    with own_worker._lock:  # another thread is in the middle of something
        child = os.fork()
        if child == 0:
            good = policy.evaluate(request(x=1), NONE, NOW).allowed and own_worker.pid != mine
            own_worker.close()
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert own_worker.pid == mine
    assert policy.evaluate(request(x=1), NONE, NOW).allowed


def test_the_worker_ends_with_its_parent() -> None:
    program = (
        "from csvfast.broker.policy import References, compile_policy\n"
        "from csvfast.broker.policy.rego_process import shared_worker\n"
        f"policy = compile_policy('resource', 'rego', {ALLOW + 'input.x'!r})\n"
        "assert policy.evaluate({'claims': {'x': 1}}, References(), 0).allowed\n"
        "print(shared_worker().pid, flush=True)\n"
        "import os, sys\n"
        "os._exit(0) if sys.argv[1] == 'hard' else None\n"
    )
    for how in ("soft", "hard"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, timeout=60, check=True)
        pid = int(done.stdout)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
            assert time.monotonic() < deadline, "the worker outlives its parent"
            time.sleep(0.02)


def test_compile_policy_uses_the_shared_worker() -> None:
    policy = compile_policy("appraisal", "rego", APPRAISAL)
    assert (policy.kind, policy.engine, policy.blocking) == ("appraisal", "rego", True)
    assert policy.evaluate(document(), REFERENCES, NOW).allowed
    only_warnings = compile_policy("appraisal", "rego", APPRAISAL, statuses=("warning",))
    assert not only_warnings.evaluate(document(), REFERENCES, NOW).allowed


def test_without_regopy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from csvfast.errors import MissingExtraError

    monkeypatch.setattr("csvfast._extras.find_spec", lambda name: None if name == "regopy" else importlib.util.find_spec(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'csvfast\[rego\]'"):
        RegoWorker()
