"""What policies see: of real and simulated reports, of tokens of any shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, MNONCE, POLICY, REPORT_DATA, Platform
from hypothesis import given
from hypothesis import strategies as st

from csvfast.attest import Verified, claims, verify
from csvfast.broker.model import ResourcePath
from csvfast.broker.policy import appraisal_document, resource_document
from csvfast.certs.roots import fingerprint
from csvfast.crypto import sm3
from csvfast.errors import BufferTypeError
from csvfast.report import Evidence

PLATFORM = Platform()
PATH = ResourcePath("default", "key", "a")


def verified(version: int = 1, **options: Any) -> Verified:
    return verify(PLATFORM.evidence(version), roots=PLATFORM.roots, **options)


@pytest.mark.parametrize("version", [1, 2])
def test_every_member(version: int) -> None:
    one = verified(version, report_data=REPORT_DATA, mnonce=MNONCE)
    init_data = {"digest": "ab", "algorithm": "sha256", "data": {"aa.toml": "x"}}
    document = appraisal_document(one, tee="csv", custom={"nonce": "00ff"}, init_data=init_data)
    assert document == {
        "tee": "csv",
        "bound": True,
        "chain_complete": True,
        "report_version": version,
        "measure": MEASURE.hex(),
        "report_data": REPORT_DATA.hex(),
        "policy": POLICY.to_dict(),
        "policy_word": POLICY.value,
        "firmware_api": f"{PLATFORM.pek.api_major}.{PLATFORM.pek.api_minor}",
        "build": None if version == 1 else 2337,
        "cek_fingerprint": sm3(PLATFORM.chip.cek.encoded).hexdigest(),
        "root_fingerprint": fingerprint(PLATFORM.line.root),
        "mac": True,
        "event_log": False,
        "checks": list(one.checks),
        "csv": claims(one),
        "custom": {"nonce": "00ff"},
        "init_data": init_data,
        "init_data_digest": "ab",
    }
    assert json.loads(json.dumps(document)) == document, "JSON values only"


@pytest.mark.parametrize("version", [1, 2])
def test_bound_needs_report_data_or_mnonce(version: int) -> None:
    assert appraisal_document(verified(version))["bound"] is False
    assert appraisal_document(verified(version, report_data=REPORT_DATA))["bound"] is True
    assert appraisal_document(verified(version, mnonce=MNONCE))["bound"] is True


def test_partial_evidence() -> None:
    without = Evidence(PLATFORM.evidence().report, encoding="page")
    document = appraisal_document(verify(without, roots=PLATFORM.roots, allow_partial=True, report_data=REPORT_DATA))
    assert document["chain_complete"] is False
    assert document["cek_fingerprint"] is None
    assert document["root_fingerprint"] is None
    assert document["init_data"] is None
    assert document["custom"] == {}


def test_only_what_was_verified_is_appraised() -> None:
    for other in (PLATFORM.evidence(), PLATFORM.evidence().report, {}, None):
        with pytest.raises(BufferTypeError, match="what verify"):
            appraisal_document(other)  # type: ignore[arg-type]


def token(**changes: Any) -> dict[str, Any]:
    cpu = {
        "ear.status": "affirming",
        "ear.trustworthiness-vector": {"executables": 3},
        "ear.appraisal-policy-id": "default_cpu",
        "ear.veraison.annotated-evidence": {
            "csv": {"measure": "aa"}, "report_data": "bb", "runtime_data_claims": {"nonce": "c"}, "init_data_claims": {},
        },
    }  # fmt: skip
    return {"tee": "csv", "submods": {"cpu0": cpu}} | changes


def test_resource_document() -> None:
    said = token()
    assert resource_document(PATH, "resource", {"version": "2"}, said) == {
        "plugin": "resource",
        "resource": "default/key/a",
        "resource_path": ["default", "key", "a"],
        "query": {"version": "2"},
        "tee": "csv",
        "status": "affirming",
        "trust": {"executables": 3},
        "appraisal_policy": "default_cpu",
        "csv": {"measure": "aa"},
        "claims": said,
    }


def test_the_tee_of_a_token_that_does_not_say() -> None:
    said = token()
    del said["tee"]
    assert resource_document(PATH, "resource", {}, said)["tee"] == "csv"
    evidence = said["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    evidence["sample"] = {}
    assert resource_document(PATH, "resource", {}, said)["tee"] is None, "two: nobody knows"
    del evidence["csv"]
    assert resource_document(PATH, "resource", {}, said)["tee"] == "sample"


def test_a_tee_of_another_name_replaces_no_member() -> None:
    for name in ("claims", "status", "plugin", "resource", "tee"):
        document = resource_document(PATH, "resource", {}, token(tee=name))
        assert document["status"] == "affirming"
        assert document["plugin"] == "resource"
        assert document["tee"] == name


def test_status_of_several_submodules() -> None:
    def status(*statuses: Any) -> Any:
        submodules = {f"{name}0": {"ear.status": one} for name, one in zip(("cpu", "gpu", "nic"), statuses, strict=False)}
        return resource_document(PATH, "resource", {}, {"submods": submodules})["status"]

    assert status("affirming", "affirming", "affirming") == "affirming"
    assert status("affirming", "none") == "none"
    assert status("affirming", "warning", "none") == "warning"
    assert status("contraindicated", "warning") == "contraindicated"
    assert status("affirming", "better") is None
    assert status("affirming", None) is None
    assert status("affirming", ["affirming"]) is None
    assert status() is None
    only_a_device = {"submods": {"gpu0": {"ear.status": "affirming"}}}
    assert resource_document(PATH, "resource", {}, only_a_device)["status"] is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["cpu0", "ear.status", "ear.veraison.annotated-evidence", "csv", "gpu0"]), inner, max_size=3
    ),
    max_leaves=10,
)  # fmt: skip


@given(said=st.dictionaries(st.sampled_from(["tee", "submods", "x"]), JSON))
def test_whatever_a_token_says_there_is_a_document(said: dict[str, Any]) -> None:
    document = resource_document(PATH, "resource", {}, said)
    assert document["resource"] == "default/key/a"
    if document["status"] == "affirming":
        assert all(one["ear.status"] == "affirming" for one in said["submods"].values())
