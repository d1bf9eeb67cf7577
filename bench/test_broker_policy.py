"""What a decision costs: the policies that csvfast ships, a guest they allow, one core. Goal: 30 microseconds each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from attest.simulated_evidence import MEASURE, REPORT_DATA, Platform  # type: ignore[import-not-found]

from csvfast.attest import verify
from csvfast.broker.policy import (
    Reference,
    References,
    appraisal_document,
    compile_policy,
    default_policies,
    resource_document,
)

NOW = 1_800_000_000.0
MEASURES = [MEASURE.hex(), *(f"{index:064x}" for index in range(1000))]
REFERENCES = References({"csv_measure": Reference(MEASURES, NOW + 60), "csv_min_api": Reference(["0.0"])})
CLAIMS = {"tee": "csv", "submods": {"cpu0": {"ear.status": "affirming", "ear.veraison.annotated-evidence": {"csv": {}}}}}


@pytest.fixture(scope="module")
def verified() -> Any:
    platform = Platform()
    return verify(platform.evidence(), roots=platform.roots, report_data=REPORT_DATA)


@pytest.fixture(scope="module")
def policies() -> dict[str, Any]:
    return {kind: compile_policy(kind, engine, text) for kind, _name, engine, text in default_policies()}


def test_appraisal(benchmark: Any, policies: dict[str, Any], verified: Any) -> None:
    benchmark.group = "policy: appraisal"
    document = appraisal_document(verified)
    assert benchmark(policies["appraisal"].evaluate, document, REFERENCES, NOW).allowed


def test_appraisal_document(benchmark: Any, verified: Any) -> None:
    benchmark.group = "policy: appraisal"
    benchmark(appraisal_document, verified)


def test_resource(benchmark: Any, policies: dict[str, Any]) -> None:
    benchmark.group = "policy: resource"
    document = resource_document(("default", "key", "a"), "resource", {}, CLAIMS)
    assert benchmark(policies["resource"].evaluate, document, REFERENCES, NOW).allowed


def test_resource_document(benchmark: Any) -> None:
    benchmark.group = "policy: resource"
    benchmark(resource_document, ("default", "key", "a"), "resource", {}, CLAIMS)


def test_resource_in_rego(benchmark: Any) -> None:
    benchmark.group = "policy: resource, Rego"
    text = 'package policy\nimport rego.v1\nallow if {\n input.tee == "csv"\n input.submods.cpu0["ear.status"] == "affirming"\n}'
    policy = compile_policy("resource", "rego", text)
    document = resource_document(("default", "key", "a"), "resource", {}, CLAIMS)
    assert benchmark(policy.evaluate, document, REFERENCES, NOW).allowed
