"""Claims equal to trustee's; appraisal says everything that is not allowed, and nothing without a verified report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, MNONCE, REPORT_DATA, RTMRS, Platform

from csvfast.attest import AppraisalPolicy, Verified, appraise, claims, verify
from csvfast.crypto import sm3
from csvfast.errors import AppraisalError, BufferTypeError, FormatError, LengthError
from csvfast.report import Evidence, GuestPolicy, Report, client_report, masked, read_evidence

PLATFORM = Platform()
V1 = verify(PLATFORM.evidence(), roots=PLATFORM.roots)
V2 = verify(PLATFORM.evidence(2), roots=PLATFORM.roots, mnonce=MNONCE)
OTHER = "ee" * 32


def test_claims_of_the_real_evidence(real_evidence: bytes) -> None:
    assert claims(read_evidence(real_evidence)) == {
        "version": "1",
        "policy": {
            "nodbg": 1, "noks": 0, "es": 1, "nosend": 0, "domain": 0, "csv": 0, "csv3": 1, "asid_reuse": 0,
            "hsk_version": 0, "cek_version": 0, "api_major": 0, "api_minor": 0,
        },
        "user_pubkey_digest": "00" * 32,
        "vm_id": "00" * 16,
        "vm_version": "00" * 16,
        "report_data": "00" * 64,
        "mnonce": "ad998a845c45cf30944d1c285629e768",
        "measure": "ae2a2cf1f41a485fa37bf9ae92f678783c59fbc79de7b5d237743d58f5538034",
        "sig_usage": "02100000",
        "sig_algo": "04000000",
        "anonce": "26d7c75d",
        "serial_number": "KPA64911240507",
    }  # fmt: skip


def test_claims_of_v2() -> None:
    said = claims(V2)
    assert set(said) == {
        "version", "policy", "user_pubkey_digest", "vm_id", "vm_version", "report_data", "mnonce", "measure", "sig_usage",
        "sig_algo", "build", "rtmr_version", "reserved0", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "rtmr4", "reserved1",
        "serial_number",
    }  # fmt: skip
    assert (said["version"], said["build"], said["rtmr_version"]) == ("2", 2337, 1)
    assert [said[f"rtmr{index}"] for index in range(5)] == [register.hex() for register in RTMRS]
    assert (said["reserved0"], said["reserved1"]) == ("00" * 14, "00" * 656)
    assert said["report_data"] == REPORT_DATA.hex()
    assert said["vm_id"] == b"vm-identity-0001".hex()
    json.dumps(said)


def test_claims_do_not_depend_on_the_encoding() -> None:
    expected = claims(V1)
    evidence = V1.evidence
    writers = (Evidence.to_json, Evidence.to_csv_rs, Evidence.to_rats_tls, Evidence.to_librats, Evidence.to_raw)
    for written in (write(evidence) for write in writers):
        assert claims(read_evidence(written)) == expected
    assert claims(Report.parse(client_report(evidence.report.page()))) == expected


def test_a_log_that_does_not_replay_is_not_claimed() -> None:
    evidence = Evidence(V2.report, event_log=b"\0" * 40)
    assert "uefi_event_logs" not in claims(evidence)


# Appraisal.


def allowed(**members: Any) -> dict[str, Any]:
    return {"measurements": [MEASURE.hex()]} | members


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"measurements": [OTHER, MEASURE.hex()]},
        {"measurements": [MEASURE.hex().upper()]},
        {"report_versions": [1, 2]},
        {"chip_ids": ["X", PLATFORM.chip.chip_id]},
        {"cek_fingerprints": [OTHER, sm3(PLATFORM.chip.cek.encoded).hexdigest()]},
        {"vm_ids": [b"vm-identity-0001".hex()]},
        {"vm_versions": [b"version-00000001".hex()]},
        {"user_pubkey_digests": [bytes(range(100, 132)).hex()]},
        {"report_data": REPORT_DATA.rstrip(b"\0").hex()},
        {"mnonce": MNONCE.hex()},
        {"policy": {"required": ["nodbg", "es"], "forbidden": ["asid_reuse"], "exact": [0, V1.report.policy.value]}},
        {"minimum": {"api": "1.3", "policy_api": "1.3", "policy_hsk_version": 2, "policy_cek_version": 1}},
    ],
)
def test_allowed(members: dict) -> None:
    for verified in (V1, V2):
        appraisal = appraise(verified, AppraisalPolicy.from_dict(allowed(**members)))
        assert appraisal.violations == ()
        assert appraisal.allowed
        appraisal.require()
        assert {"chain", "measure"} <= set(appraisal.checked)


@pytest.mark.parametrize(
    ("members", "name", "observed", "expected"),
    [
        ({"measurements": [OTHER, "dd" * 32]}, "measure", MEASURE.hex(), OTHER + " or " + "dd" * 32),
        ({"report_versions": [2]}, "report version", "1", "2"),
        ({"chip_ids": ["KPA64911240507"]}, "chip id", PLATFORM.chip.chip_id, "KPA64911240507"),
        ({"cek_fingerprints": [OTHER]}, "CEK fingerprint", sm3(PLATFORM.chip.cek.encoded).hexdigest(), OTHER),
        ({"vm_ids": ["00" * 16]}, "vm_id", b"vm-identity-0001".hex(), "00" * 16),
        ({"vm_versions": ["00" * 16]}, "vm_version", b"version-00000001".hex(), "00" * 16),
        ({"user_pubkey_digests": [OTHER]}, "user_pubkey_digest", bytes(range(100, 132)).hex(), OTHER),
        ({"report_data": "ab"}, "report_data", REPORT_DATA.hex(), "ab" + "00" * 63),
        ({"mnonce": "00" * 16}, "mnonce", MNONCE.hex(), "00" * 16),
        ({"policy": {"required": ["nosend"]}}, "policy nosend", "clear", "set"),
        ({"policy": {"forbidden": ["es"]}}, "policy es", "set", "clear"),
        ({"policy": {"exact": [0x45]}}, "policy", f"{V1.report.policy.value:#010x}", "0x00000045"),
        ({"minimum": {"api": "1.4"}}, "firmware API", "1.3", "at least 1.4"),
        ({"minimum": {"api": "2.0"}}, "firmware API", "1.3", "at least 2.0"),
        ({"minimum": {"build": 1}}, "build", "unknown: a V1 report does not say", "at least 1"),
        ({"minimum": {"policy_api": "1.4"}}, "policy api", "1.3", "at least 1.4"),
        ({"minimum": {"policy_hsk_version": 3}}, "policy hsk_version", "2", "at least 3"),
        ({"minimum": {"policy_cek_version": 2}}, "policy cek_version", "1", "at least 2"),
        ({"rtmrs": {"rtmr3": [OTHER]}}, "rtmr3", "none: the report is V1", OTHER),
        ({"require_event_log": True}, "event log", "none that was replayed", "a log that replays to the report's registers"),
        ({"require_mac": True}, "MAC", "not verified with an expected mnonce", "a MAC keyed with the request's mnonce"),
    ],
)
def test_each_violation(members: dict, name: str, observed: str, expected: str) -> None:
    appraisal = appraise(V1, AppraisalPolicy.from_dict(allowed(**members)))
    assert [tuple(violation) for violation in appraisal.violations] == [(name, observed, expected)]
    assert not appraisal.allowed
    with pytest.raises(AppraisalError) as caught:
        appraisal.require()
    assert caught.value.violations == (f"{name}: {observed}; expected {expected}",)
    assert appraisal.to_dict()["violations"] == [{"name": name, "observed": observed, "expected": expected}]


def test_v2_only() -> None:
    members = {"minimum": {"build": 2337}, "rtmrs": {f"rtmr{i}": [OTHER, RTMRS[i].hex()] for i in range(5)}, "require_mac": True}
    assert appraise(V2, AppraisalPolicy.from_dict(allowed(**members))).allowed
    members = {"minimum": {"build": 2338}, "rtmrs": {"rtmr4": [OTHER]}}
    appraisal = appraise(V2, AppraisalPolicy.from_dict(allowed(**members)))
    assert [violation.name for violation in appraisal.violations] == ["build", "rtmr4"]


def test_all_violations_at_once() -> None:
    members = {"measurements": [OTHER], "chip_ids": ["X"], "policy": {"forbidden": ["es", "nodbg"]}, "minimum": {"api": "9.9"}}
    appraisal = appraise(V1, AppraisalPolicy.from_dict(members))
    assert len(appraisal.violations) == 5
    assert {"measure", "chip id", "policy es", "policy nodbg", "firmware API"} == {one.name for one in appraisal.violations}


def test_this_exchange() -> None:
    policy = AppraisalPolicy.from_dict({"any_measurement": True})
    assert appraise(V1, policy, report_data=REPORT_DATA.rstrip(b"\0"), mnonce=MNONCE).allowed
    names = [one.name for one in appraise(V1, policy, report_data=b"other", mnonce=bytes(16)).violations]
    assert names == ["report_data", "mnonce"]
    # What the policy says and what this exchange expects must both hold.
    both = AppraisalPolicy.from_dict({"any_measurement": True, "report_data": REPORT_DATA.hex(), "mnonce": MNONCE.hex()})
    assert appraise(V1, both, report_data=REPORT_DATA, mnonce=MNONCE).allowed
    assert len(appraise(V1, both, report_data=b"other", mnonce=bytes(16)).violations) == 2
    neither = AppraisalPolicy.from_dict({"any_measurement": True, "report_data": "ab", "mnonce": "00" * 16})
    assert len(appraise(V1, neither, report_data=REPORT_DATA, mnonce=MNONCE).violations) == 2
    with pytest.raises(LengthError):
        appraise(V1, policy, report_data=bytes(65))
    with pytest.raises(LengthError):
        appraise(V1, policy, mnonce=bytes(15))


MASKED_MEMBERS: list[dict[str, Any]] = [
    {"vm_ids": ["00" * 16]},
    {"vm_versions": ["00" * 16]},
    {"policy": {"required": ["nodbg"]}},
    {"policy": {"forbidden": ["asid_reuse"]}},
    {"policy": {"exact": [0x45]}},
    {"minimum": {"policy_api": "0.0"}},
    {"minimum": {"policy_hsk_version": 0}},
    {"minimum": {"policy_cek_version": 0}},
]


def remasked(evidence: Evidence, delta: bytes) -> Evidence:
    """What anybody can make of a V1 report: another mask, and every masked field with it. The signature stays valid."""
    page = bytearray(evidence.report.page())
    page[0xB4:0xC0] = page[0xB4:0xBC] + masked(bytes(page[0xBC:0xC0]), delta)
    page[0xB4:0xBC] = masked(bytes(page[0xB4:0xBC]), delta)
    page[0x150:0x9B4] = masked(bytes(page[0x150:0x9B4]), delta)
    page[0x9B4:0x9D4] = bytes(32)
    return Evidence(Report.parse(page, 1), hsk_cek=evidence.hsk_cek, encoding="rats-tls")


def test_a_debuggable_guest_cannot_be_dressed_up() -> None:
    """The attack: policy bit nodbg set by choosing the mask. Only a comparison with a measurement or a nonce notices."""
    debuggable = PLATFORM.evidence(policy=GuestPolicy(0x44))
    forged = verify(remasked(debuggable, b"\x01\0\0\0"), roots=PLATFORM.roots)
    assert forged.report.policy.nodbg
    any_guest = {"any_measurement": True, "policy": {"required": ["nodbg"]}}
    names = [one.name for one in appraise(forged, AppraisalPolicy.from_dict(any_guest)).violations]
    assert names == ["mask"]
    for bound, name in (
        ({"measurements": [MEASURE.hex()]}, "measure"),
        ({"any_measurement": True, "report_data": REPORT_DATA.hex()}, "report_data"),
        ({"any_measurement": True, "mnonce": MNONCE.hex()}, "mnonce"),
        ({"any_measurement": True, "user_pubkey_digests": [bytes(range(100, 132)).hex()]}, "user_pubkey_digest"),
    ):
        policy = AppraisalPolicy.from_dict(bound | {"policy": {"required": ["nodbg"]}})
        assert [one.name for one in appraise(forged, policy).violations] == [name]
        assert appraise(V1, policy).allowed


@pytest.mark.parametrize("members", MASKED_MEMBERS)
def test_fields_under_an_unbound_mask_are_not_compared(members: dict) -> None:
    policy = AppraisalPolicy.from_dict({"any_measurement": True} | members)
    assert "mask" in [one.name for one in appraise(V1, policy).violations]
    assert "mask" not in appraise(V2, policy).checked
    for expected in ({"report_data": REPORT_DATA}, {"mnonce": MNONCE}):
        assert "mask" not in appraise(V1, policy, **expected).checked  # type: ignore[arg-type]
        bound = verify(PLATFORM.evidence(), roots=PLATFORM.roots, **expected)  # type: ignore[arg-type]
        assert "mask" not in appraise(bound, policy).checked


def test_a_policy_for_chips_only_needs_no_mask() -> None:
    chip = {"any_measurement": True, "cek_fingerprints": [sm3(PLATFORM.chip.cek.encoded).hexdigest()]}
    assert appraise(V1, AppraisalPolicy.from_dict(chip)).allowed


def test_partial_is_a_violation() -> None:
    partial = verify(PLATFORM.page_v1(), roots=PLATFORM.roots, allow_partial=True)
    violations = appraise(partial, AppraisalPolicy.from_dict(allowed())).violations
    assert [(one.name, one.observed) for one in violations] == [("chain", "not verified: HSK, CEK, PEK")]
    assert appraise(partial, AppraisalPolicy.from_dict(allowed(allow_partial=True))).allowed
    members = allowed(allow_partial=True, cek_fingerprints=[OTHER])
    violations = appraise(partial, AppraisalPolicy.from_dict(members)).violations
    assert [tuple(one) for one in violations] == [("CEK fingerprint", "no CEK certificate", OTHER)]


def test_only_what_was_verified() -> None:
    policy = AppraisalPolicy.from_dict(allowed())
    for wrong in (PLATFORM.evidence(), V1.report, PLATFORM.page_v1(), None):
        with pytest.raises(BufferTypeError, match="verify"):
            appraise(wrong, policy)  # type: ignore[arg-type]
    assert isinstance(V1, Verified)


# Policy files.

TOML = f"""
measurements = ["{MEASURE.hex()}"]
chip_ids = ["{PLATFORM.chip.chip_id}"]

[policy]
required = ["nodbg"]
exact = [0x{V1.report.policy.value:x}]

[minimum]
api = "1.3"

[rtmrs]
rtmr0 = ["{MEASURE.hex()}"]
"""


def test_files(tmp_path: Path) -> None:
    toml = tmp_path / "policy.toml"
    toml.write_text(TOML)
    policy = AppraisalPolicy.load(toml)
    assert appraise(V2, policy).allowed
    document = {
        "measurements": [MEASURE.hex()],
        "chip_ids": [PLATFORM.chip.chip_id],
        "policy": {"required": ["nodbg"], "exact": [V1.report.policy.value]},
        "minimum": {"api": "1.3"},
        "rtmrs": {"rtmr0": [MEASURE.hex()]},
    }
    assert AppraisalPolicy.parse(json.dumps(document).encode()) == policy == AppraisalPolicy.from_dict(document)
    assert policy.to_dict() == {
        "measurements": [MEASURE.hex()],
        "chip_ids": [PLATFORM.chip.chip_id],
        "policy_required": ["nodbg"],
        "policy_exact": [V1.report.policy.value],
        "minimum_api": [1, 3],
        "rtmrs": {"rtmr0": [MEASURE.hex()]},
    }
    with pytest.raises(FileNotFoundError):
        AppraisalPolicy.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "measurements, any_measurement"),
        ("{}", "measurements, any_measurement"),
        ("any_measurement = false", "measurements, any_measurement"),
        (f'any_measurement = true\nmeasurements = ["{OTHER}"]', "measurements, any_measurement"),
        ("measurements = []", "measurements"),
        ('measurements = "abc"', "measurements"),
        ('measurements = ["abc"]', "measurements[0]"),
        (f'measurements = ["{OTHER}", "{OTHER[:-2]}"]', "measurements[1]"),
        ("measurements = [1]", "measurements[0]"),
        ("measurments = []", "measurments"),
        ('any_measurement = "yes"', "any_measurement"),
        ("any_measurement = 1", "any_measurement"),
        ("any_measurement = true\nreport_versions = [3]", "report_versions[0]"),
        ("any_measurement = true\nreport_versions = [true]", "report_versions[0]"),
        ('any_measurement = true\nchip_ids = [""]', "chip_ids[0]"),
        ("any_measurement = true\npolicy = 1", "policy"),
        ('any_measurement = true\n[policy]\nrequired = ["debug"]', "policy.required[0]"),
        ("any_measurement = true\n[policy]\nrequired = []", "policy.required"),
        ('any_measurement = true\n[policy]\nrequired = ["es"]\nforbidden = ["es"]', "policy"),
        ("any_measurement = true\n[policy]\nexact = [-1]", "policy.exact[0]"),
        ("any_measurement = true\n[policy]\nexact = [4294967296]", "policy.exact[0]"),
        ("any_measurement = true\n[policy]\nrequire = []", "policy.require"),
        ("any_measurement = true\n[minimum]\napi = 1.3", "minimum.api"),
        ('any_measurement = true\n[minimum]\napi = "1"', "minimum.api"),
        ('any_measurement = true\n[minimum]\napi = "1.256"', "minimum.api"),
        ("any_measurement = true\n[minimum]\nbuild = -1", "minimum.build"),
        ("any_measurement = true\n[minimum]\npolicy_hsk_version = 16", "minimum.policy_hsk_version"),
        (f'any_measurement = true\n[rtmrs]\nrtmr5 = ["{OTHER}"]', "rtmrs.rtmr5"),
        ('any_measurement = true\nreport_data = "abc"', "report_data"),
        (f'any_measurement = true\nreport_data = "{"00" * 65}"', "report_data"),
        ("any_measurement = ", "syntax"),
        ("any_measurement = true\nany_measurement = true", "syntax"),
        ('{"any_measurement": true, "any_measurement": true}', "any_measurement"),
        ('{"any_measurement": tru', "syntax"),
        ('{"a":' * 100000, "nesting"),
        ("a = " + "[" * 100000, "nesting"),
        ('{"any_measurement": true, "minimum": {"build": %s}}' % ("9" * 5000), "number"),
        ("any_measurement = true\n[minimum]\nbuild = " + "9" * 5000, "number"),
        ("any_measurement = true\n[minimum]\nbuild = 0x" + "f" * 5000, "minimum.build"),
        ('{"any_measurement": true, "minimum": {"build": NaN}}', "minimum.build"),
        ('{"any_measurement": true, "minimum": {"build": 1e9}}', "minimum.build"),
        ("any_measurement = true\n[minimum]\nbuild = 1979-05-27T07:32:00Z", "minimum.build"),
        ("any_measurement = true\n[minimum]\nbuild = true", "minimum.build"),
        ("any_measurement = 2024-01-01", "any_measurement"),
        ("any_measurement = true\nchip_ids = []", "chip_ids"),
        ("any_measurement = true\ncek_fingerprints = []", "cek_fingerprints"),
        ("any_measurement = true\n[rtmrs]\nrtmr1 = []", "rtmrs.rtmr1"),
        ("any_measurement = true\n[policy]\nexact = []", "policy.exact"),
        ("any_measurement = true\n[policy]\nexact = [true]", "policy.exact[0]"),
        ('any_measurement = true\nvm_ids = ["\uff10\uff10'  + "00" * 15 + '"]', "vm_ids[0]"),
        ("any_measurement = true\n[[policy]]\nexact = [1]", "policy"),
        ('any_measurement = true\n[minimum]\napi = "1.\u0663"', "minimum.api"),
    ],
)
def test_refused_policies(text: str, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        AppraisalPolicy.parse(text.encode())
    assert (caught.value.structure, caught.value.field) == ("appraisal policy", field)


def test_refused_policy_bytes() -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        AppraisalPolicy.parse(b"\xff")
    with pytest.raises(FormatError, match="at most"):
        AppraisalPolicy.parse(b"#" * ((4 << 20) + 1))
    with pytest.raises(FormatError):
        AppraisalPolicy()
