"""The challenge on an open connection, and reports that come back with another key."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from hypothesis import given
from hypothesis import strategies as st
from ratstls.attested import PlatformAttester
from ratstls.simulated_peers import POLICY, attested, ends, guest, opened, plain

from csvfast.errors import ArgumentError, AttestedTlsError, RequestError, VerificationError
from csvfast.ratstls.certificate import read_certificate
from csvfast.ratstls.claims import (
    CSV_TAG,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
)
from csvfast.ratstls.connection import AttestedConnection
from csvfast.ratstls.context import Identity
from csvfast.ratstls.freshness import CHALLENGE, FreshnessChecker, SeenReports, answer_challenge
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Judge, PolicyJudge, Requirement

PLATFORM = Platform()
GUEST = guest(PLATFORM)
ATTESTER = PlatformAttester(PLATFORM, sealing_key=bytes(32))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """An open connection, its checker, and a clock."""

    def __init__(self, identity: Identity = GUEST, **more: Any) -> None:
        self.clock = Clock()
        self.identity = identity
        self.requirement = attested(PLATFORM)
        self.server: AttestedConnection
        self.client: AttestedConnection
        self.server, self.client = opened(*ends((plain(), self.requirement), (identity, Requirement.unattested())))
        self.checker = FreshnessChecker(self.server.peer, self.requirement, clock=self.clock, **more)

    def answer(self, reply: dict[str, Any], attester: Any = ATTESTER, **more: Any) -> dict[str, Any]:
        reply = json.loads(json.dumps(reply))
        return json.loads(json.dumps(answer_challenge(reply, self.client.peer, self.identity, attester, **more)))


@pytest.mark.parametrize("layout", ["rats-tls", "librats"])
def test_exchange(layout: Any) -> None:
    setting = Setting()
    assert CHALLENGE == {"command": "Challenge"}
    assert not setting.checker.is_fresh
    reply = setting.checker.challenge()
    assert set(reply) == {"status", "nonce", "ttl"}
    assert reply["status"] == "OK"
    assert reply["ttl"] == 60
    assert len(base64.b64decode(reply["nonce"], validate=True)) == 32
    request = setting.answer(reply, layout=layout, custom={"role": b"db"})
    assert set(request) == {"command", "evidence"}
    assert setting.checker.attest(request) == {"status": "OK", "valid_for": 300}
    assert setting.checker.is_fresh
    peer = setting.checker.peer
    assert dict(peer.custom_claims) == {
        "nonce": base64.b64decode(reply["nonce"]),
        "tls-exporter": setting.server.peer.exporter,
        "role": b"db",
    }
    assert peer.verified is not None
    assert peer.verified is not setting.server.peer.verified
    assert peer.spki_sha256 == setting.server.peer.spki_sha256
    setting.clock.now += 299
    assert setting.checker.is_fresh
    setting.clock.now += 1
    assert not setting.checker.is_fresh


def test_the_claims_are_those_of_the_specification() -> None:
    setting = Setting()
    reply = setting.checker.challenge()
    buffer = decode_evidence_buffer(base64.b64decode(setting.answer(reply)["evidence"]))
    assert buffer.tag == CSV_TAG
    claims = decode_claims(buffer.claims)
    assert list(claims.custom) == ["nonce", "tls-exporter"]
    assert claims.pubkey_hash == setting.identity.key.spki_sha256


def test_a_nonce_is_used_once() -> None:
    setting = Setting()
    request = setting.answer(setting.checker.challenge())
    setting.checker.attest(request)
    with pytest.raises(AttestedTlsError, match="no challenge"):
        setting.checker.attest(request)
    assert not setting.checker.is_fresh


def test_a_nonce_is_used_even_by_a_wrong_answer() -> None:
    setting = Setting()
    request = setting.answer(setting.checker.challenge())
    with pytest.raises(RequestError):
        setting.checker.attest({"command": "Attest", "evidence": "AAAA"})
    with pytest.raises(AttestedTlsError, match="no challenge"):
        setting.checker.attest(request)


def test_a_nonce_expires() -> None:
    setting = Setting(ttl=5)
    request = setting.answer(setting.checker.challenge())
    setting.clock.now += 5
    with pytest.raises(AttestedTlsError) as info:
        setting.checker.attest(request)
    assert info.value.stage == "deadline"


def test_only_the_newest_nonce_counts() -> None:
    setting = Setting()
    old = setting.answer(setting.checker.challenge())
    setting.checker.challenge()
    with pytest.raises(AttestedTlsError) as info:
        setting.checker.attest(old)
    assert info.value.stage == "binding"


def test_an_answer_of_another_connection() -> None:
    """Same guest, same key, the same nonce even: the exporter differs."""
    one, other = Setting(), Setting()
    reply = one.checker.challenge()
    with pytest.raises(AttestedTlsError, match="tls-exporter"):
        one.checker.attest(other.answer(reply))
    assert not one.checker.is_fresh


def test_an_answer_about_another_key() -> None:
    setting = Setting()
    reply = setting.checker.challenge()
    request = answer_challenge(reply, setting.client.peer, guest(PLATFORM), ATTESTER)
    with pytest.raises(AttestedTlsError, match="pubkey-hash"):
        setting.checker.attest(request)


@pytest.mark.parametrize(
    ("attester", "stage"),
    [
        (PlatformAttester(PLATFORM, measure=bytes(32), sealing_key=bytes(32)), "appraise"),
        (PlatformAttester(Platform(), sealing_key=bytes(32)), "verify"),
    ],
)
def test_an_answer_that_is_judged_otherwise(attester: Any, stage: str) -> None:
    setting = Setting()
    with pytest.raises(AttestedTlsError) as info:
        setting.checker.attest(setting.answer(setting.checker.challenge(), attester))
    assert info.value.stage == stage
    assert not setting.checker.is_fresh
    assert setting.checker.peer is setting.server.peer


def test_the_certificates_evidence_is_no_answer() -> None:
    setting = Setting()
    setting.checker.challenge()
    certificate = read_certificate(GUEST.certificate)
    assert certificate.buffer is not None
    buffer = encode_evidence_buffer(certificate.buffer.raw, certificate.buffer.claims)
    with pytest.raises(AttestedTlsError, match="'nonce' is missing"):
        setting.checker.attest({"command": "Attest", "evidence": base64.b64encode(buffer).decode()})


def test_a_report_about_other_claims() -> None:
    setting = Setting()
    nonce = base64.b64decode(setting.checker.challenge()["nonce"])
    claims = encode_claims(GUEST.key.spki, {"nonce": nonce, "tls-exporter": setting.client.peer.exporter})
    evidence = PLATFORM.evidence(report_data=report_data_of(encode_claims(GUEST.key.spki)), sealing_key=bytes(32))
    buffer = encode_evidence_buffer(evidence.to_rats_tls(), claims)
    with pytest.raises(AttestedTlsError) as info:
        setting.checker.attest({"command": "Attest", "evidence": base64.b64encode(buffer).decode()})
    assert info.value.stage == "binding"


def test_an_error_ends_what_was_fresh() -> None:
    setting = Setting()
    setting.checker.attest(setting.answer(setting.checker.challenge()))
    assert setting.checker.is_fresh
    with pytest.raises(RequestError):
        setting.checker.attest({})
    assert not setting.checker.is_fresh


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"command": "Attest"},
        {"command": "Attest", "evidence": 5},
        {"command": "Attest", "evidence": "no base64!"},
        {"command": "Attest", "evidence": "QQ==" * 20000},
        {"command": "attest", "evidence": "QQ=="},
        {"command": "Attest", "evidence": "2gAadQaCQEA="},
        {"command": "Attest", "evidence": "2gAadQWCQEA="},
    ],
)
def test_requests_out_of_form(request_: dict[str, Any]) -> None:
    setting = Setting()
    setting.checker.challenge()
    with pytest.raises(RequestError):
        setting.checker.attest(request_)


def test_evidence_of_any_length() -> None:
    setting = Setting()
    setting.checker.challenge()
    with pytest.raises(RequestError, match="expected at most 32768"):
        setting.checker.attest({"command": "Attest", "evidence": "A" * 32772})


@given(evidence=st.binary(max_size=200))
def test_any_evidence(evidence: bytes) -> None:
    checker = FreshnessChecker(SETTING.server.peer, SETTING.requirement)
    checker.challenge()
    with pytest.raises((RequestError, AttestedTlsError)):
        checker.attest({"command": "Attest", "evidence": base64.b64encode(evidence).decode()})


SETTING = Setting()


@pytest.mark.parametrize(
    "reply",
    [{}, {"status": "Fail"}, {"status": "OK"}, {"status": "OK", "nonce": "AA=="}, {"status": "OK", "nonce": "*" * 9}],
)
def test_replies_that_are_no_challenge(reply: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SETTING.answer(reply)


def test_clients_look_at_what_the_attester_returns() -> None:
    class Wrong:
        def evidence(self, report_data: bytes) -> Any:
            return PLATFORM.evidence(report_data=bytes(64))

    with pytest.raises(VerificationError):
        SETTING.answer(SETTING.checker.challenge(), Wrong())
    with pytest.raises(ArgumentError, match="nonce"):
        SETTING.answer(SETTING.checker.challenge(), custom={"nonce": b"x"})


def test_who_cannot_be_challenged() -> None:
    unattested = Requirement.unattested()
    server, _ = opened(*ends((plain(), unattested), (GUEST, unattested)))
    for requirement in (unattested, attested(PLATFORM)):
        with pytest.raises(AttestedTlsError, match="not attested"):
            FreshnessChecker(server.peer, requirement)
    old = replace(SETTING.server.peer, tls_version="TLSv1.2")
    with pytest.raises(AttestedTlsError, match=r"expected TLS 1\.3"):
        FreshnessChecker(old, SETTING.requirement)
    with pytest.raises(ArgumentError):
        FreshnessChecker(SETTING.server.peer, SETTING.requirement, ttl=0)


def test_nonces_differ() -> None:
    assert len({SETTING.checker.challenge()["nonce"] for _ in range(50)}) == 50


# ---- Reports seen before


def judge_with(seen: SeenReports) -> Judge:
    return PolicyJudge(PLATFORM.roots, POLICY, seen=seen)


def test_the_same_report_with_another_key() -> None:
    seen = SeenReports()
    certificate = read_certificate(GUEST.certificate)
    judge = judge_with(seen)
    verified = judge.verify(certificate)
    judge.appraise(verified, certificate)
    judge.appraise(verified, certificate)
    assert len(seen) == 1
    stolen = replace(certificate, spki_sha256=TlsKey.generate().spki_sha256)
    with pytest.raises(AttestedTlsError) as info:
        judge.appraise(verified, stolen)
    assert info.value.stage == "verify"


def test_one_mnonce_for_two_keys_over_connections() -> None:
    requirement = Requirement.attested(judge_with(SeenReports()))
    first, second = guest(PLATFORM, mnonce=bytes(16)), guest(PLATFORM, mnonce=bytes(16))
    fresh = guest(PLATFORM, mnonce=b"\x01" * 16)
    for identity in (first, first, fresh):
        opened(*ends((plain(), requirement), (identity, Requirement.unattested())))
    with pytest.raises(AttestedTlsError, match="another key"):
        opened(*ends((plain(), requirement), (second, Requirement.unattested())))


def test_what_is_not_allowed_is_not_remembered() -> None:
    """Else anybody could have another's report refused by showing it first."""
    seen = SeenReports()
    judge = judge_with(seen)
    certificate = read_certificate(guest(PLATFORM, measure=bytes(32)).certificate)
    assert not judge.appraise(judge.verify(certificate), certificate).allowed
    assert len(seen) == 0


def test_the_memory_is_bounded() -> None:
    seen = SeenReports(3)
    judge = judge_with(seen)
    certificates = [read_certificate(guest(PLATFORM, mnonce=bytes([index]) * 16).certificate) for index in range(5)]
    for certificate in certificates:
        judge.appraise(judge.verify(certificate), certificate)
    assert len(seen) == 3
    with pytest.raises(ArgumentError):
        SeenReports(0)
