"""The policies csvfast ships: a good guest is affirmed, and one wrong thing at a time is refused by the rule made for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, MNONCE, REPORT_DATA, Platform

from csvfast.attest import verify
from csvfast.broker.model import ResourcePath
from csvfast.broker.policy import (
    Policy,
    Reference,
    References,
    appraisal_document,
    compile_policy,
    default_policies,
    resource_document,
)
from csvfast.broker.policy.defaults import default_text
from csvfast.report import Evidence, GuestPolicy

NOW = 1_800_000_000.0
PLATFORM = Platform()
POLICIES: dict[str, Policy] = {
    f"{kind}/{name}": compile_policy(kind, engine, text) for kind, name, engine, text in default_policies()
}
CPU, RESOURCE = POLICIES["appraisal/default_cpu"], POLICIES["resource/default"]
MEASURES = References({"csv_measure": Reference([MEASURE.hex()], NOW + 100)})


def document(version: int = 1, report_data: bytes | None = REPORT_DATA, **changes: Any) -> dict[str, Any]:
    evidence = PLATFORM.evidence(version, **changes)
    return appraisal_document(verify(evidence, roots=PLATFORM.roots, report_data=report_data))


def test_what_is_shipped() -> None:
    assert list(POLICIES) == ["appraisal/default_cpu", "resource/default"]
    assert all(engine == "rules" for _kind, _name, engine, _text in default_policies())
    with pytest.raises(KeyError):
        default_text("appraisal", "../../pyproject")


@pytest.mark.parametrize("version", [1, 2])
def test_a_good_guest(version: int) -> None:
    decision = CPU.evaluate(document(version), MEASURES, NOW)
    assert decision.allowed, decision
    assert decision.status == "affirming"
    assert dict(decision.trust) == {"hardware": 2, "configuration": 2, "executables": 3}
    assert decision.valid_until == NOW + 100
    assert decision.checked == (
        "tee", "bound to this exchange", "chain", "no debugging", "encrypted registers", "measurement",
    )  # fmt: skip


def test_a_good_guest_with_every_reference() -> None:
    good = document()
    references = References(
        {
            "csv_measure": Reference(["00" * 32, MEASURE.hex()], NOW + 100),
            "csv_min_api": Reference([{"single": "0.0"}]),
            "csv_cek_fingerprint": Reference([good["cek_fingerprint"]], NOW + 50),
            "csv_serial_number": Reference([PLATFORM.chip.chip_id]),
            "csv_vm_id": Reference([good["csv"]["vm_id"]]),
        }
    )
    decision = CPU.evaluate(good, references, NOW)
    assert decision.allowed
    assert decision.trust["instance-identity"] == 2
    assert decision.valid_until == NOW + 50
    assert len(decision.checked) == 10
    for name, rule in (
        ("csv_measure", "measurement"),
        ("csv_min_api", "firmware API"),
        ("csv_cek_fingerprint", "chip"),
        ("csv_serial_number", "serial number"),
        ("csv_vm_id", "vm id"),
    ):
        for wrong in (Reference(["99.9"]), Reference(references[name].values, NOW), Reference([], 0.0), Reference([None])):
            refused = CPU.evaluate(good, References({**references, name: wrong}), NOW)
            assert (refused.allowed, refused.rule, refused.status) == (False, rule, "contraindicated")


def without(reference: str) -> References:
    return References({name: one for name, one in MEASURES.items() if name != reference})


def test_one_thing_wrong_in_the_evidence() -> None:
    plain = GuestPolicy.of(nodbg=True)
    cases = {
        "no debugging": document(policy=GuestPolicy.of(es=True, csv3=True)),
        "encrypted registers": document(policy=plain),
        "measurement": document(measure=bytes(32)),
        "bound to this exchange": document(report_data=None),
    }
    for rule, guest in cases.items():
        decision = CPU.evaluate(guest, MEASURES, NOW)
        assert (decision.allowed, decision.rule, decision.status) == (False, rule, "contraindicated")
    partial = verify(
        Evidence(PLATFORM.evidence().report, encoding="page"), roots=PLATFORM.roots, allow_partial=True, report_data=REPORT_DATA
    )
    assert CPU.evaluate(appraisal_document(partial), MEASURES, NOW).rule == "chain"
    for one in (GuestPolicy.of(nodbg=True, es=True), GuestPolicy.of(nodbg=True, csv3=True)):
        assert CPU.evaluate(document(policy=one), MEASURES, NOW).allowed
    assert not CPU.evaluate(document(policy=GuestPolicy.of(nodbg=True, csv=True)), MEASURES, NOW).allowed
    for references in (without("csv_measure"), References({"csv_measure": Reference([MEASURE.hex()], NOW)})):
        assert CPU.evaluate(document(), references, NOW).rule == "measurement"


def test_v1_without_binding_is_refused_though_everything_else_is_right() -> None:
    # Whoever hands on a V1 report chooses the mask its fields are read through (csvfast.attest.verify).
    loose = verify(PLATFORM.evidence(), roots=PLATFORM.roots)
    assert {"report data", "mnonce"}.isdisjoint(loose.checks)
    assert CPU.evaluate(appraisal_document(loose), MEASURES, NOW).rule == "bound to this exchange"
    bound = verify(PLATFORM.evidence(), roots=PLATFORM.roots, mnonce=MNONCE)
    assert CPU.evaluate(appraisal_document(bound), MEASURES, NOW).allowed


GOOD = document()
WRONG: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("tee", lambda d: d.update(tee="sample")),
    ("tee", lambda d: d.pop("tee")),
    ("bound to this exchange", lambda d: d.update(bound=False)),
    ("bound to this exchange", lambda d: d.update(bound=1)),
    ("bound to this exchange", lambda d: d.pop("bound")),
    ("chain", lambda d: d.update(chain_complete=False)),
    ("chain", lambda d: d.pop("chain_complete")),
    ("no debugging", lambda d: d["policy"].update(nodbg=0)),
    ("no debugging", lambda d: d["policy"].update(nodbg=True)),
    ("no debugging", lambda d: d.pop("policy")),
    ("encrypted registers", lambda d: d["policy"].update(es=0, csv3=0)),
    ("encrypted registers", lambda d: d["policy"].update(es=2, csv3=2)),
    ("measurement", lambda d: d.update(measure="00" * 32)),
    ("measurement", lambda d: d.update(measure=MEASURE.hex().upper())),
    ("measurement", lambda d: d.update(measure=[MEASURE.hex()])),
    ("measurement", lambda d: d.pop("measure")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change"), WRONG, ids=range(len(WRONG)))
def test_one_thing_wrong_in_the_document(rule: str, change: Callable[[dict[str, Any]], object]) -> None:
    changed = copy.deepcopy(GOOD)
    assert CPU.evaluate(changed, MEASURES, NOW).allowed
    change(changed)
    decision = CPU.evaluate(changed, MEASURES, NOW)
    assert (decision.allowed, decision.rule, decision.status) == (False, rule, "contraindicated")


def test_a_real_chip(real_evidence: bytes) -> None:
    from csvfast.report import read_evidence

    # Without its HSK and CEK nothing leads to a root; everything else of it is as it should be.
    evidence = read_evidence(real_evidence)
    partial = verify(evidence, allow_partial=True, mnonce=evidence.report.mnonce)
    said = appraisal_document(partial)
    references = References({"csv_measure": Reference([said["measure"]]), "csv_min_api": Reference(["1.3"])})
    assert CPU.evaluate(said, references, NOW).rule == "chain"
    said["chain_complete"] = True
    decision = CPU.evaluate(said, references, NOW)
    assert decision.allowed, decision
    assert not CPU.evaluate(said, References({**references, "csv_min_api": Reference(["1.4"])}), NOW).allowed


# ---- Resources


def ask(status: Any = "affirming", tee: Any = "csv", plugin: str = "resource", path: Any = None) -> bool:
    said = {"tee": tee, "submods": {"cpu0": {"ear.status": status, "ear.veraison.annotated-evidence": {}}}}
    request = resource_document(path or ResourcePath("default", "key", "a"), plugin, {}, said)
    return RESOURCE.evaluate(request, References(), NOW).allowed


def test_default_resource_policy() -> None:
    assert ask()
    for status in ("none", "warning", "contraindicated", "", None, 2, "Affirming", ["affirming"]):
        assert not ask(status=status), status
    for tee in ("sample", "snp", "", None, ["csv"]):
        assert not ask(tee=tee), tee
    assert not ask(plugin="pkcs11")
    assert not ask(path=("default", "key"))
    assert not ask(path=("default", "key", "a", "b"))
    assert not RESOURCE.evaluate(resource_document(("a", "b", "c"), "resource", {}, {}), References(), NOW).allowed


def test_the_shipped_texts_say_what_they_are() -> None:
    for kind, name, _engine, text in default_policies():
        assert re.search(rf'^name = "{name}"$', text, re.MULTILINE)
        assert POLICIES[f"{kind}/{name}"].text == text
