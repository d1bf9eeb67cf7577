"""Tokens, init data, metrics: what a unit of its own can show."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwcrypto import jwk as other_jwk
from jwcrypto import jwt as other_jwt

from csvfast.broker.attestation import Attestation
from csvfast.broker.kbs.ear import TokenIssuer, guest_key_in
from csvfast.broker.kbs.init_data import INIT_DATA_LIMIT, read_init_data
from csvfast.broker.kbs.jwk import base64url, jwk_of
from csvfast.broker.kbs.metrics import BUCKETS, Metrics
from csvfast.broker.kbs.rcar import _session_of_claims
from csvfast.broker.policy import Decision
from csvfast.errors import DeniedError, RequestError, StateError

KEY = ec.generate_private_key(ec.SECP256R1())
GUEST = jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key())


def attestation(**changes: Any) -> Attestation:
    members: dict[str, Any] = {
        "tee": "csv",
        "document": {"csv": {"measure": "aa"}},
        "decision": Decision(True, trust={"executables": 3}, status="affirming"),
        "policy": {"appraisal": "default_cpu"},
        "evidence_digest": "00",
        "key": "11",
        "runtime": {"tee-pubkey": GUEST, "nonce": "AA=="},
        "generation": 1,
        "valid_until": None,
    }
    return Attestation(**{**members, **changes})


class Clock:
    now = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now


def signed(key: Any, claims: Mapping[str, Any], **header: Any) -> str:
    private = other_jwk.JWK.from_pem(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    token = other_jwt.JWT(header={"alg": "ES256", **header}, claims=dict(claims))
    token.make_signed_token(private)
    return str(token.serialize())


def test_issue_and_verify() -> None:
    clock = Clock()
    issuer = TokenIssuer(KEY, clock=clock)
    token = issuer.issue(attestation(), "5e55")
    claims = issuer.verify(token)
    assert (claims["iat"], claims["exp"]) == (1_900_000_000, 1_900_000_300)
    assert guest_key_in(claims) == GUEST
    assert issuer.is_own(claims)
    assert issuer.verify(issuer.issue(attestation()))["jti"] != claims["jti"]
    clock.now += 299
    issuer.verify(token)
    clock.now += 1
    with pytest.raises(DeniedError) as refusal:
        issuer.verify(token)
    assert "expired" in refusal.value.reason
    clock.now -= 400
    with pytest.raises(DeniedError) as refusal:
        issuer.verify(token)
    assert "future" in refusal.value.reason


def test_certificates_in_the_header() -> None:
    import base64

    issuer = TokenIssuer(KEY, certificates=[b"\x30\x03der", b"ca"])
    token = issuer.issue(attestation())
    head = token.split(".")[0]
    header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    assert [base64.b64decode(item) for item in header["x5c"]] == [b"\x30\x03der", b"ca"]
    issuer.verify(token)


def test_tokens_that_are_not_believed() -> None:
    clock = Clock()
    issuer = TokenIssuer(KEY, clock=clock)
    stranger = ec.generate_private_key(ec.SECP256R1())
    times = {"iat": int(clock.now), "exp": int(clock.now) + 60}
    jwk = {name: value for name, value in jwk_of(stranger.public_key()).items() if name != "alg"}
    own_jwk = {name: value for name, value in jwk_of(KEY.public_key()).items() if name != "alg"}
    body, none = base64url(json.dumps(times).encode()), base64url(b'{"alg":"none"}')
    good = issuer.issue(attestation())
    tokens = [
        signed(stranger, times, jwk=jwk),  # a bare key in the header is believed by nobody
        signed(stranger, times, jwk=own_jwk),
        signed(stranger, times, kid=issuer.thumbprint),
        signed(KEY, times),  # whose?
        signed(KEY, {"iat": int(clock.now)}, kid=issuer.thumbprint),
        signed(KEY, {**times, "exp": str(times["exp"])}, kid=issuer.thumbprint),
        signed(KEY, {**times, "exp": None}, kid=issuer.thumbprint),
        signed(KEY, {**times, "nbf": times["exp"] + 600}, kid=issuer.thumbprint),
        f"{none}.{body}.",
        f"{good.split('.')[0]}.{body}.{good.split('.')[2]}",
        good[:-3],
        good + "A",
        good + "=",
        "..",
        "a.b.c",
        "A" * 300000 + "..",
        "ä.b.c",
        *(f"{base64url(json.dumps({'alg': 'ES256', 'kid': issuer.thumbprint, 'crit': crit}).encode())}.{body}.AA"
          for crit in (5, [], ["x"], None)),
    ]
    for token in tokens:
        with pytest.raises(DeniedError):
            issuer.verify(token)
    assert issuer.verify(signed(KEY, times, kid=issuer.thumbprint))["exp"] == times["exp"]
    with pytest.raises(DeniedError):
        issuer.verify(signed(KEY, {**times, "x": 1}, kid=issuer.thumbprint).replace(".", ".A", 1))


def test_another_issuer() -> None:
    clock = Clock()
    other = TokenIssuer(ec.generate_private_key(ec.SECP256R1()), clock=clock)
    other_key = ec.generate_private_key(ec.SECP256R1())
    issuer = TokenIssuer(KEY, trusted=[other_key.public_key()], clock=clock)
    with pytest.raises(DeniedError):
        issuer.verify(other.issue(attestation()))
    other = TokenIssuer(other_key, clock=clock)
    claims = issuer.verify(other.issue(attestation()))
    assert not issuer.is_own(issuer.verify(other.issue(attestation(), "5e55"))), "a session of another store is none here"
    session = _session_of_claims(claims, "token")
    assert session.attestation.allowed
    assert session.attestation.token_claims() == claims
    assert session.attestation.valid_until == claims["exp"]
    for status in ("warning", "none", "contraindicated", "anything", None):
        decision = Decision(True, status=str(status))
        claims = issuer.verify(other.issue(attestation(decision=decision)))
        assert not _session_of_claims(claims, "token").attestation.allowed
    with pytest.raises(RequestError):
        _session_of_claims(issuer.verify(other.issue(attestation(runtime={}))), "token")


@pytest.mark.parametrize(
    "claims",
    [{"tee-pubkey": GUEST}, {"customized_claims": {"runtime_data": {"tee-pubkey": GUEST}}}],
)
def test_places_of_the_guests_key(claims: Any) -> None:
    assert guest_key_in(claims) == GUEST
    for wrong in ({}, {"tee-pubkey": "x"}, {"submods": []}, {"customized_claims": {"runtime_data": 5}}):
        with pytest.raises(RequestError):
            guest_key_in(wrong)


def test_only_p256() -> None:
    with pytest.raises(StateError):
        TokenIssuer(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(StateError):
        TokenIssuer(KEY, trusted=[ec.generate_private_key(ec.SECP521R1()).public_key()])


# ---- Init data

TEXT = 'version = "0.1.0"\nalgorithm = "{}"\n[data]\n"aa.toml" = "x"\n"policy.rego" = \'\'\'\na.b.c == 1\n\'\'\'\n'


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_init_data(algorithm: str) -> None:
    text = TEXT.format(algorithm)
    found = read_init_data({"format": "toml", "body": text})
    assert found == {
        "version": "0.1.0",
        "algorithm": algorithm,
        "data": {"aa.toml": "x", "policy.rego": "a.b.c == 1\n"},
        "digest": hashlib.new(algorithm, text.encode()).hexdigest(),
    }
    assert read_init_data(None) is None


DOTS = "a." * 20000


@pytest.mark.parametrize(
    "value",
    [
        "x", [], {}, {"format": "toml"}, {"body": ""}, {"format": "json", "body": "{}"}, {"format": "toml", "body": 5},
        *({"format": "toml", "body": body} for body in (
            "", "=", 'version = "0.1.0"', 'algorithm = "sha256"', TEXT.format("md5"), 'version=1\nalgorithm="sha256"',
            'version="1"\nalgorithm="sha256"\ndata=5', 'version="1"\nalgorithm="sha256"\n[data]\nx=5',
            'version="1"\nalgorithm="sha256"\n[data.x]\ny="z"', "a" * (INIT_DATA_LIMIT + 1), "x = " + "[" * 30000,
            f"{DOTS}b = 1", f'"{DOTS}"."x".{DOTS}c = 1', f"[{DOTS}b]", 'x = """' + '"' * 30000, "'''" * 20000, "\\" * 60000,
            '"' * 60000, "a=1\na=2", '"' + '\\"' * 32000, '"\\' * 32000, "x = [''''a'''', {" + "a." * 31000 + "b = 1}]",
            '"\\"".' * 13000 + "a = 1",
        )),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_init_data_that_is_refused(value: Any) -> None:
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        read_init_data(value)
    assert time.process_time() - start < 0.5
    assert len(str(caught.value)) < 200


def test_dots_in_texts_are_no_keys() -> None:
    short = TEXT.format("sha256") + f'"b" = "{DOTS[:9000]}"\n# {DOTS[:9000]}\n"c" = \'\'\'{DOTS[:9000]}\'\'\'\n'
    found = read_init_data({"format": "toml", "body": short})
    assert found is not None
    assert found["data"]["b"] == DOTS[:9000]


# ---- Metrics


def test_metrics() -> None:
    metrics = Metrics()
    for seconds in (0.0001, 0.0005, 0.003, 99.0):
        metrics.request("kbs", "resource", "allowed", seconds)
    metrics.request("kbs", "resource", "denied", 0.003)
    metrics.refused("kbs", "evicted")
    metrics.watch_connections("kbs", lambda: 7)
    lines = metrics.render().decode().splitlines()
    assert 'csvfast_requests_total{door="kbs",action="resource",outcome="allowed"} 4' in lines
    assert 'csvfast_request_seconds_bucket{door="kbs",action="resource",le="0.0005"} 2' in lines
    assert 'csvfast_request_seconds_bucket{door="kbs",action="resource",le="0.005"} 4' in lines
    assert 'csvfast_request_seconds_bucket{door="kbs",action="resource",le="10.0"} 4' in lines
    assert 'csvfast_request_seconds_bucket{door="kbs",action="resource",le="+Inf"} 5' in lines
    assert 'csvfast_request_seconds_count{door="kbs",action="resource"} 5' in lines
    assert 'csvfast_request_seconds_sum{door="kbs",action="resource"} 99.006600' in lines
    assert 'csvfast_connections{door="kbs"} 7' in lines
    assert 'csvfast_connections_refused_total{door="kbs",reason="evicted"} 1' in lines
    assert sum("_bucket" in line for line in lines) == len(BUCKETS) + 1
