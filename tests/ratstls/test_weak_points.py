"""What the C stack of rats-tls and librats lets through, by observation, and this one must not. One test for each.

The observations: a null verifier chosen when none is named, or when evidence is absent; a verifier that compares pubkey-hash
alone; absent evidence that becomes a report of zeros; results that are ignored or overwritten; an error that accepts; evidence
without nonce and time; an mnonce from rand(); no policy; sizes that are not checked.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from ratstls.attested import buffer_for
from ratstls.simulated_peers import POLICY, attested, ends, guest, opened, plain, pump

import csvfast.ratstls
from csvfast.attest import AppraisalPolicy
from csvfast.errors import AttestedTlsError, FormatError, VerificationError
from csvfast.ratstls import context as context_module
from csvfast.ratstls.certificate import make_certificate
from csvfast.ratstls.claims import encode_claims, encode_evidence_buffer
from csvfast.ratstls.context import EndpointContext, Identity
from csvfast.ratstls.freshness import FreshnessChecker, answer_challenge
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import PolicyJudge, Requirement

ANYBODY = Requirement.unattested()
PLATFORM = Platform()


def refusal(identity: Identity | None, requirement: Requirement, *, of: str) -> AttestedTlsError:
    """What the named side answers the other one's identity."""
    if of == "server":
        refusing, other = ends((plain(), requirement), (identity, ANYBODY))
    else:
        assert identity is not None
        other, refusing = ends((identity, ANYBODY), (plain(), requirement))
    pump(other, refusing)
    if refusing.state == "judging":
        with pytest.raises(AttestedTlsError):
            refusing.judge()
    assert refusing.state == "closed"
    assert refusing.error is not None
    return refusing.error


SIDES = pytest.mark.parametrize("side", ["server", "client"])


@SIDES
def test_absent_evidence_and_no_verifier_named(side: str) -> None:
    """There is no default requirement, and one that accepts anybody has to be asked for by name."""
    with pytest.raises(TypeError):
        EndpointContext.server(plain())  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Requirement.attested()  # type: ignore[call-arg]
    assert refusal(plain(), attested(PLATFORM), of=side).stage == "certificate"


@SIDES
def test_evidence_that_only_names_the_right_key(side: str) -> None:
    """pubkey-hash right, report signed by nobody: no requirement but `unattested` stops there."""
    key = TlsKey.generate()
    claims = encode_claims(key.spki)
    raw = bytearray(PLATFORM.evidence(report_data=csvfast.ratstls.report_data_of(claims)).to_rats_tls())
    raw[192:240] = bytes(48)  # r of the report's signature
    identity = Identity(key, make_certificate(key, encode_evidence_buffer(bytes(raw), claims)))
    assert refusal(identity, attested(PLATFORM), of=side).stage == "verify"


@SIDES
def test_a_report_of_zeros(side: str) -> None:
    """What absent evidence becomes in the C stack: zero user data against zero."""
    key = TlsKey.generate()
    for raw in (bytes(7016), bytes(4096) + PLATFORM.hsk_cek + (2916).to_bytes(4, "little")):
        identity = Identity(key, make_certificate(key, encode_evidence_buffer(raw, encode_claims(key.spki))))
        assert refusal(identity, attested(PLATFORM), of=side).stage in ("certificate", "binding")


@SIDES
def test_absent_evidence_with_a_verifier_named(side: str) -> None:
    """No judge is asked about what is not there, and one that is asked refuses."""
    certificate = csvfast.ratstls.read_certificate(plain().certificate)
    judge = PolicyJudge(PLATFORM.roots, POLICY)
    with pytest.raises(VerificationError, match="carries none"):
        judge.verify(certificate)
    with pytest.raises(AttestedTlsError, match="no evidence"):
        Requirement.attested(judge).judge_certificate(certificate)
    with pytest.raises(AttestedTlsError, match="shown none"):
        Requirement.attested(judge).judge_certificate(None)


def test_genuine_evidence_does_verify() -> None:
    """librats' CSV verifier ends in an error for the genuine: both layouts open here, with their claims."""
    for layout in ("rats-tls", "librats"):
        server, _ = opened(*ends((plain(), attested(PLATFORM)), (guest(PLATFORM, layout=layout, custom={"a": b"1"}), ANYBODY)))
        assert server.peer.verified is not None
        assert dict(server.peer.custom_claims) == {"a": b"1"}


@SIDES
@pytest.mark.parametrize("where", ["signature", "content"])
def test_the_certificates_own_signature_counts(side: str, where: str) -> None:
    key = TlsKey.generate()
    encoded = bytearray(make_certificate(key, buffer_for(PLATFORM, key)))
    if where == "signature":
        encoded[-1] ^= 1
    else:
        at = encoded.index(b"RATS-TLS")
        encoded[at : at + 8] = b"RATS-XXX"
        at = encoded.index(b"RATS-TLS")
        encoded[at : at + 8] = b"RATS-XXX"
    assert refusal(Identity(key, bytes(encoded)), attested(PLATFORM), of=side).stage == "binding"


@SIDES
def test_the_chain_of_the_evidence_counts(side: str) -> None:
    assert refusal(guest(Platform()), attested(PLATFORM), of=side).stage == "verify"


@SIDES
@pytest.mark.parametrize("error", [FormatError("x", "y", None, "a", "b"), RuntimeError("no key"), MemoryError(), KeyError(1)])
def test_an_error_in_the_callback_refuses(side: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = guest(PLATFORM)
    for name in ("read_certificate", "check_binding"):
        original = getattr(context_module, name)

        def fails(what: Any, original: Any = original, **more: Any) -> Any:
            if identity.certificate in (what, getattr(what, "der", None)):  # of the two ends in this process
                raise error
            return original(what, **more)

        with monkeypatch.context() as patch:
            patch.setattr(context_module, name, fails)
            assert refusal(identity, attested(PLATFORM), of=side).stage == "certificate"


@SIDES
def test_an_interrupt_in_the_callback_refuses(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any, **_more: Any) -> Any:
        raise SystemExit(0)

    monkeypatch.setattr(context_module, "read_certificate", fails)
    monkeypatch.setattr("sys.unraisablehook", lambda _what: None)
    assert refusal(guest(PLATFORM), ANYBODY, of=side).stage == "handshake"


def test_old_evidence_is_told_from_new() -> None:
    """A certificate is as old as it says; a challenge shows that the guest is there now, on this connection."""
    key, now = TlsKey.generate(), datetime.now(UTC)
    old = make_certificate(key, buffer_for(PLATFORM, key), not_before=now - timedelta(3), not_after=now - timedelta(2))
    assert refusal(Identity(key, old), attested(PLATFORM), of="server").stage == "binding"
    identity = guest(PLATFORM)
    server, client = opened(*ends((plain(), attested(PLATFORM)), (identity, ANYBODY)))
    checker = FreshnessChecker(server.peer, attested(PLATFORM))
    from ratstls.simulated_peers import SimulatedAttester

    recorded = answer_challenge(checker.challenge(), client.peer, identity, SimulatedAttester(PLATFORM))
    checker.attest(recorded)
    checker.challenge()
    with pytest.raises(AttestedTlsError):
        checker.attest(recorded)


def test_no_predictable_random_numbers() -> None:
    """mnonce from rand(), there. Here nothing draws from a generator that is not the system's."""
    folder = Path(csvfast.ratstls.__file__).parent
    for path in folder.glob("*.py"):
        assert not re.search(r"^\s*(import random|from random|from numpy)", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_policy_is_not_left_to_the_application() -> None:
    """No judge without a policy, no policy without measurements, and a debuggable guest is refused by one that says so."""
    from csvfast.report import GuestPolicy

    with pytest.raises(TypeError):
        PolicyJudge(PLATFORM.roots)  # type: ignore[call-arg]
    with pytest.raises(FormatError, match="measurements"):
        AppraisalPolicy()
    debuggable = guest(PLATFORM, policy=GuestPolicy.of(es=True))
    error = refusal(debuggable, attested(PLATFORM), of="server")
    assert error.stage == "appraise"
    assert "nodbg" in str(error)


@SIDES
@pytest.mark.parametrize("size", [0, 1, 2916, 4096, 4100, 7015, 7017, 20000])
def test_sizes_of_evidence(side: str, size: int) -> None:
    key = TlsKey.generate()
    raw = PLATFORM.evidence(report_data=csvfast.ratstls.report_data_of(encode_claims(key.spki))).to_rats_tls()
    buffer = encode_evidence_buffer(raw.ljust(size, b"\0")[:size], encode_claims(key.spki))
    error = refusal(Identity(key, make_certificate(key, buffer)), attested(PLATFORM), of=side)
    assert error.stage == "certificate"
    assert "7016" in str(error)
