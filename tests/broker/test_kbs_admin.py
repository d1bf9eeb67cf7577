"""Administration over HTTP: CoCo's operations, csvfast's own, who may do what, and how administrators prove who they are."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from broker.kbs_rig import PATH, Certificates, KbsRig
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwcrypto import jwk as other_jwk
from jwcrypto import jwt as other_jwt

from csvfast.broker.administration import LOCAL, Administration, Administrator
from csvfast.broker.clients.administration import KbsAdministration, Tls
from csvfast.broker.clients.http import HttpConnection
from csvfast.broker.kbs.admin_tokens import AdministratorKey, AdministratorTokens
from csvfast.broker.model import ResourcePath
from csvfast.broker.policy import default_policies
from csvfast.broker.policy.references import build_message
from csvfast.certs import ManufacturingLine
from csvfast.crypto import Secret
from csvfast.errors import (
    ArgumentError,
    AttestedTlsError,
    ConflictError,
    DeniedError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
)

ROOTS = (ManufacturingLine.create().root,)
REGO = "package policy\nimport rego.v1\ndefault allow := false\nallow if input.tee == \"csv\"\n"
RULES = 'name = "tenant"\n[[allow]]\nresource = "*/*/*"\n[[allow.rule]]\nname = "tee"\nclaim = "tee"\nequals = "csv"\n'


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[KbsRig]:
    with KbsRig(tmp_path, ROOTS) as rig:
        yield rig


def coded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


class Desk:
    """httpx with a token."""

    def __init__(self, rig: KbsRig, token: str | None) -> None:
        self.url = rig.url
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {**self.headers, **more.pop("headers", {})}
        with httpx.Client(timeout=20) as client:
            return client.request(method, self.url + path, headers=headers, **more)


def variant(answer: httpx.Response) -> tuple[int, str]:
    document = answer.json()
    assert answer.headers["x-csvfast-correlation"] in document["detail"] or "AdminAuth" in document["type"]
    return answer.status_code, document["type"].rpartition("/")[2]


# ---- CoCo's


def test_resources(rig: KbsRig) -> None:
    desk = Desk(rig, rig.token("keys"))
    for content in (b"first", b"\0\xff second"):
        answer = desk("POST", f"/kbs/v0/resource/{PATH}", content=content)
        assert (answer.status_code, answer.content) == (200, b"")
    found = rig.store.resource(PATH)
    assert found is not None
    assert (bytes(found.content), found.version) == (b"\0\xff second", 2)
    assert desk("DELETE", f"/kbs/v0/resource/{PATH}").status_code == 200
    assert rig.store.resource(PATH) is None
    assert variant(desk("DELETE", f"/kbs/v0/resource/{PATH}")) == (401, "PluginInternalError")
    assert variant(desk("POST", f"/kbs/v0/resource/{PATH}", content=b"")) == (401, "PluginInternalError")
    assert variant(desk("POST", "/kbs/v0/resource/a/b", content=b"x")) == (404, "InvalidRequestPath")
    assert variant(desk("POST", f"/kbs/v0/resource/{PATH}", content=bytes((2 << 20) + 1))) == (413, "HTTPFailed")
    assert desk("POST", f"/kbs/v0/resource/{PATH}", content=bytes(2 << 20)).status_code == 200
    actions = [(record.action, record.outcome, record.actor) for record in rig.records(door="kbs")]
    assert actions[:3] == [("put resource", "allowed", "admin")] * 2 + [("delete resource", "allowed", "admin")]


def test_policies(rig: KbsRig) -> None:
    pytest.importorskip("regopy")
    desk = Desk(rig, rig.token("policy"))
    assert variant(desk("GET", "/kbs/v0/resource-policy")) == (401, "PolicyEngineError")
    assert desk("POST", "/kbs/v0/resource-policy", json={"policy": coded(REGO)}).status_code == 200
    assert desk("GET", "/kbs/v0/resource-policy").json() == {"policy": coded(REGO)}
    body = {"type": "rego", "policy_id": "default_cpu", "policy": coded("package policy\nimport rego.v1\ntrust_claims := {}\n")}
    assert desk("POST", "/kbs/v0/attestation-policy", json=body).status_code == 200
    stored = rig.store.get_policy("appraisal", "default_cpu")
    assert stored is not None
    assert stored.engine == "rego"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("resource-policy", {"policy": "???"}, "SerdeError"),
        ("resource-policy", {"policy": 5}, "SerdeError"),
        ("resource-policy", {"policy": coded(REGO), "more": 1}, "SerdeError"),
        ("resource-policy", {}, "SerdeError"),
        ("resource-policy", {"policy": base64.urlsafe_b64encode(b"\xff\xfe").decode().rstrip("=")}, "SerdeError"),
        ("resource-policy", {"policy": coded("no rego")}, "ParsePolicyError"),
        ("attestation-policy", {"policy": coded(REGO)}, "SerdeError"),
        ("attestation-policy", {"policy": coded(REGO), "policy_id": "../x"}, "SerdeError"),
        ("attestation-policy", {"policy": coded(REGO), "policy_id": "x", "type": "opa"}, "SerdeError"),
        ("reference-value", {"version": "0.1.0", "type": "sample", "payload": "!"}, "RvpsError"),
        ("reference-value", {"version": "0.2.0", "type": "sample", "payload": "e30="}, "RvpsError"),
        ("reference-value", {"version": "0.1.0", "type": "corim", "payload": "e30="}, "RvpsError"),
    ],
)  # fmt: skip
def test_refused_bodies(rig: KbsRig, path: str, body: Any, expected: str) -> None:
    assert variant(Desk(rig, rig.token("policy"))("POST", f"/kbs/v0/{path}", json=body)) == (401, expected)


def test_references(rig: KbsRig) -> None:
    desk = Desk(rig, rig.token("policy"))
    message = build_message({"csv_measure": ["aa", "bb"], "csv_min_api": "1.3"})
    assert desk("POST", "/kbs/v0/reference-value", content=message).status_code == 200
    assert desk("GET", "/kbs/v0/reference-value/csv_measure").json() == ["aa", "bb"]
    assert desk("GET", "/kbs/v0/reference-value/csv_min_api").json() == "1.3"
    assert variant(desk("GET", "/kbs/v0/reference-value/none")) == (401, "RvpsError")
    row = rig.store.get_reference("csv_measure")
    assert row is not None
    assert row.expires is not None
    assert 364 * 86400 < row.expires - time.time() < 367 * 86400


def test_roles(rig: KbsRig) -> None:
    keys, policy = Desk(rig, rig.token("keys", name="k")), Desk(rig, rig.token("policy", name="p"))
    assert variant(policy("POST", f"/kbs/v0/resource/{PATH}", content=b"x")) == (401, "PluginInternalError")
    assert variant(keys("GET", "/kbs/v0/resource-policy")) == (401, "PolicyEngineError")
    assert keys("GET", "/csvfast/v0/policies").status_code == 403
    assert policy("GET", "/csvfast/v0/resources").status_code == 403
    assert keys("GET", "/csvfast/v0/audit").status_code == 403
    scoped = Desk(rig, rig.token("keys", name="s", scope="tenant/*"))
    assert scoped("POST", "/kbs/v0/resource/tenant/key/a", content=b"x").status_code == 200
    assert variant(scoped("POST", f"/kbs/v0/resource/{PATH}", content=b"x")) == (401, "PluginInternalError")
    assert [row["path"] for row in scoped("GET", "/csvfast/v0/resources").json()["resources"]] == ["tenant/key/a"]
    assert any("has not the role" in record.reason for record in rig.records(outcome="denied"))


@pytest.mark.parametrize("header", [None, "Basic YTpi", "Bearer", "Bearer csvt_" + "A" * 43, "Bearer a.b.c", "bearer\tx", "x"])
def test_nobody(rig: KbsRig, header: str | None) -> None:
    desk = Desk(rig, None)
    headers = {} if header is None else {"Authorization": header}
    answer = desk("POST", f"/kbs/v0/resource/{PATH}", content=b"x", headers=headers)
    assert variant(answer) == (401, "AdminAuthAccess")
    answer = desk("GET", "/csvfast/v0/tokens", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert rig.store.resource(PATH) is None


def test_revoked_and_expired_tokens(rig: KbsRig) -> None:
    token = rig.token("keys")
    desk = Desk(rig, token)
    assert desk("GET", "/csvfast/v0/resources").status_code == 200
    rig.administration.revoke_token(LOCAL, "admin")
    assert desk("GET", "/csvfast/v0/resources").status_code == 401
    secret = rig.administration.create_token(LOCAL, "short", ["keys"], expires=rig.clock() + 100)
    desk = Desk(rig, bytes(secret).decode())
    assert desk("GET", "/csvfast/v0/resources").status_code == 200
    rig.skew = 101
    assert desk("GET", "/csvfast/v0/resources").status_code == 401


def test_guessing_is_locked_out(tmp_path: Path) -> None:
    with KbsRig(tmp_path, ROOTS, failures=3) as rig:
        token = rig.token()
        for _ in range(4):
            Desk(rig, "csvt_" + "A" * 43)("GET", "/csvfast/v0/tokens")
        answer = Desk(rig, token)("GET", "/csvfast/v0/tokens")
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        with KbsAdministration(rig.url, Secret(token.encode())) as desk, pytest.raises(LimitedError):
            desk.list_tokens(LOCAL)


def test_a_body_is_not_read_from_nobody(rig: KbsRig) -> None:
    # 401 before 413: the length is never looked at by the application, nor the body taken.
    answer = Desk(rig, None)("POST", f"/kbs/v0/resource/{PATH}", content=bytes(1 << 20))
    assert answer.status_code == 401


# ---- Who it is: JWT, certificates


def pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def signed(key: Any, algorithm: str, **claims: Any) -> str:
    private = other_jwk.JWK.from_pem(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    now = int(time.time())
    base = {"iat": now, "exp": now + 600}
    token = other_jwt.JWT(header={"alg": algorithm}, claims={name: v for name, v in {**base, **claims}.items() if v is not None})
    token.make_signed_token(private)
    return str(token.serialize())


ED25519, P256 = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
ALL = frozenset(("keys", "policy", "audit"))
NAMES = {"admin": ALL, "auditor": frozenset(("audit",))}
KEYS = (
    AdministratorKey("office", pem(ED25519), ALL, role_names=NAMES, issuer="us", audience="broker"),
    AdministratorKey("robot", pem(P256), frozenset(("keys",)), scope="robot/*"),
)


def test_json_web_tokens(tmp_path: Path) -> None:
    with KbsRig(tmp_path, ROOTS, keys=KEYS) as rig:
        office = {"role": "admin", "iss": "us", "aud": ["x", "broker"], "sub": "ann"}
        desk = Desk(rig, signed(ED25519, "EdDSA", **office))
        assert desk("POST", f"/kbs/v0/resource/{PATH}", content=b"x").status_code == 200
        assert rig.records(action="put resource")[-1].actor == "office:ann"
        desk = Desk(rig, signed(P256, "ES256"))
        assert desk("POST", "/kbs/v0/resource/robot/key/a", content=b"x").status_code == 200
        assert desk("POST", f"/kbs/v0/resource/{PATH}", content=b"x").status_code == 401
        assert desk("GET", "/csvfast/v0/audit").status_code == 403
        for change in ({"iss": "them"}, {"aud": "other"}, {"aud": None}, {"role": "king"}, {"role": None}, {"role": ["admin"]}):
            desk = Desk(rig, signed(ED25519, "EdDSA", **{**office, **change}))
            assert desk("GET", "/csvfast/v0/resources").status_code == 401, change
        desk = Desk(rig, signed(ED25519, "EdDSA", **{**office, "role": "auditor"}))
        assert desk("GET", "/csvfast/v0/audit").status_code == 200
        assert desk("GET", "/csvfast/v0/resources").status_code == 403


def test_json_web_tokens_that_are_not_believed() -> None:
    now = time.time()
    tokens = AdministratorTokens(KEYS, clock=lambda: now)

    def found(token: str) -> Administrator | None:
        return tokens.find(token, "192.0.2.1", "kbs")

    assert found(signed(P256, "ES256")) == Administrator("robot", frozenset(("keys",)), "robot/*", "192.0.2.1", "kbs")
    times = [
        {"exp": int(now) - 1}, {"exp": None}, {"iat": None}, {"iat": int(now) + 3600, "exp": int(now) + 7200},
        {"exp": int(now) + 90000}, {"nbf": int(now) + 3600}, {"exp": "never"}, {"exp": True}, {"exp": 1e400},
    ]  # fmt: skip
    for change in times:
        assert found(signed(P256, "ES256", **change)) is None, change
    stranger = ec.generate_private_key(ec.SECP256R1())
    assert found(signed(stranger, "ES256")) is None
    good = signed(P256, "ES256")
    head, body, signature = good.split(".")
    none = coded('{"alg":"none"}')
    for token in (f"{none}.{body}.", f"{none}.{body}.{signature}", f"{head}.{body}.", f"{head}.{body}", good + ".", ".."):
        assert found(token) is None
    assert found(good[:-2] + "xx") is None
    # A public key is no secret: as one for HMAC it must not do.
    shared = other_jwk.JWK(kty="oct", k=base64.urlsafe_b64encode(pem(P256)).decode().rstrip("="))
    token = other_jwt.JWT(header={"alg": "HS256"}, claims={"iat": int(now), "exp": int(now) + 60})
    token.make_signed_token(shared)
    assert found(token.serialize()) is None
    critical = coded('{"alg":"ES256","crit":["x"],"x":1}')
    assert found(f"{critical}.{body}.{signature}") is None


@pytest.mark.parametrize("text", [b"", b"no key", pem(ec.generate_private_key(ec.SECP384R1()))])
def test_keys_that_cannot_be_used(text: bytes) -> None:
    with pytest.raises(ArgumentError):
        AdministratorTokens([AdministratorKey("x", text, ALL)])
    with pytest.raises(ArgumentError):
        AdministratorKey("x", pem(P256), frozenset(("king",)))


def test_client_certificates(tmp_path: Path) -> None:
    files = Certificates(tmp_path, clients=True)
    who = {hashlib.sha256(files.client_der).hexdigest(): Administrator("machine", frozenset(("keys",)))}
    with KbsRig(tmp_path, ROOTS, tls=files, certificates=who) as rig:
        with KbsAdministration(rig.url, tls=Tls(files.ca, None, files.client, files.client_key)) as desk:
            assert desk.put_resource(LOCAL, PATH, b"x") == 1
        with KbsAdministration(rig.url, tls=Tls(files.ca)) as desk, pytest.raises(DeniedError):
            desk.put_resource(LOCAL, PATH, b"x")
        # An unknown token is not made good by a certificate.
        wrong = Secret(b"csvt_" + b"A" * 43)
        mine = Tls(files.ca, None, files.client, files.client_key)
        with KbsAdministration(rig.url, wrong, tls=mine) as desk, pytest.raises(DeniedError):
            desk.put_resource(LOCAL, PATH, b"x")
        # A page in the administrator's browser.
        with HttpConnection(rig.url, tls=mine) as browser:
            for headers, status in (({}, 200), ({"Origin": "https://elsewhere.example"}, 401), ({"Origin": "null"}, 401)):
                assert browser.request("POST", f"/kbs/v0/resource/{PATH}", b"x", headers).status == status
        pin = hashlib.sha256(files.der).hexdigest()
        with KbsAdministration(rig.url, tls=Tls(pin=pin, certificate=files.client, key=files.client_key)) as desk:
            assert desk.list_resources(LOCAL)[0].path == PATH
        for tls in (Tls(pin="0" * 64), Tls()):
            token = Secret(rig.token(name=f"t{tls.pin}").encode())
            with KbsAdministration(rig.url, token, tls=tls) as desk, pytest.raises(AttestedTlsError):
                desk.list_resources(LOCAL)
        with KbsAdministration(rig.url, tls=Tls(files.ca)) as desk, pytest.raises(DeniedError):
            desk.list_tokens(LOCAL)


# ---- csvfast's own, through its client


@pytest.fixture
def desk(rig: KbsRig) -> Iterator[KbsAdministration]:
    with KbsAdministration(rig.url, Secret(rig.token().encode())) as desk:
        yield desk


def test_the_client_has_every_call() -> None:
    import inspect

    here = {name: member for name, member in inspect.getmembers(KbsAdministration, inspect.isfunction) if name[0] != "_"}
    local = {name: member for name, member in inspect.getmembers(Administration, inspect.isfunction) if name[0] != "_"}
    for name in here.keys() - {"close"}:
        assert list(inspect.signature(here[name]).parameters) == list(inspect.signature(local[name]).parameters), name
    assert local.keys() - here.keys() <= {"authenticate", "rotate_master"}  # both need the store itself


def test_desk_resources(desk: KbsAdministration, rig: KbsRig) -> None:
    assert desk.put_resource(LOCAL, PATH, Secret(b"first")) == 1
    assert desk.rotate_resource(LOCAL, PATH) == 2
    other = ResourcePath("a", "b", "c")
    assert desk.create_key(LOCAL, other) == 1
    found = desk.read_resource(LOCAL, PATH, 1)
    assert (bytes(found.content), found.version, found.path) == (b"first", 1, PATH)
    assert len(desk.read_resource(LOCAL, PATH).content) == 5
    assert len(desk.read_resource(LOCAL, other).content) == 32
    desk.retire_resource(LOCAL, PATH, 1)
    assert {(str(row.path), row.version, row.state) for row in desk.list_resources(LOCAL)} == {
        ("default/key/disk", 1, "retired"), ("default/key/disk", 2, "active"), ("a/b/c", 1, "active"),
    }  # fmt: skip
    assert desk.list_resources(LOCAL) == rig.administration.list_resources(LOCAL)
    desk.delete_resource(LOCAL, PATH)
    with pytest.raises(UnknownError, match="default/key/disk"):
        desk.delete_resource(LOCAL, PATH)
    with pytest.raises(UnknownError):
        desk.read_resource(LOCAL, PATH)
    with pytest.raises(RequestError):
        desk.put_resource(LOCAL, PATH, b"")
    with pytest.raises(RequestError):
        desk.retire_resource(LOCAL, PATH, 0)


def test_desk_policies(desk: KbsAdministration, rig: KbsRig) -> None:
    assert desk.put_policy(LOCAL, "resource", "tenant", RULES) == 1
    assert desk.put_policy(LOCAL, "resource", "tenant", RULES + "\n") == 2
    assert desk.get_policy(LOCAL, "resource", "tenant", 1).text == RULES
    assert desk.get_policy(LOCAL, "resource", "tenant") == rig.administration.get_policy(LOCAL, "resource", "tenant")
    assert desk.list_policies(LOCAL) == rig.administration.list_policies(LOCAL)
    desk.delete_policy(LOCAL, "resource", "tenant")
    with pytest.raises(UnknownError):
        desk.get_policy(LOCAL, "resource", "tenant")
    with pytest.raises(RequestError):
        desk.put_policy(LOCAL, "resource", "tenant", "nonsense =")
    with pytest.raises(RequestError):
        desk.put_policy(LOCAL, "neither", "tenant", RULES)  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        desk.put_policy(LOCAL, "resource", "../x", RULES)
    text = next(text for kind, name, _engine, text in default_policies() if kind == "resource")
    document = {"tee": "csv", "status": "warning", "resource": "a/b/c", "plugin": "resource"}
    for more in ({"text": text}, {"name": "default"}):
        decision, explanation = desk.dry_run(LOCAL, "resource", document, **more)  # type: ignore[arg-type]
        assert not decision.allowed
        assert "affirm" in explanation
        assert desk.dry_run(LOCAL, "resource", {**document, "status": "affirming"}, **more)[0].allowed  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        desk.dry_run(LOCAL, "resource", document)


def test_desk_references(desk: KbsAdministration, rig: KbsRig) -> None:
    desk.put_reference(LOCAL, "csv_measure", ["aa", {"b": 1}], 2e9)
    desk.put_reference(LOCAL, "other", [1.5], None)
    assert desk.get_reference(LOCAL, "csv_measure").values == ("aa", {"b": 1})
    assert desk.list_references(LOCAL) == rig.administration.list_references(LOCAL)
    desk.delete_reference(LOCAL, "other")
    with pytest.raises(UnknownError):
        desk.delete_reference(LOCAL, "none")
    for values, expires in (([], None), (["a"], -1.0)):
        with pytest.raises(RequestError):
            desk.put_reference(LOCAL, "x", values, expires)


def test_desk_tokens(desk: KbsAdministration, rig: KbsRig) -> None:
    secret = desk.create_token(LOCAL, "second", ["keys"], scope="a/*", expires=rig.clock() + 60)
    with KbsAdministration(rig.url, secret) as second:
        second.put_resource(LOCAL, ResourcePath("a", "b", "c"), b"x")
        with pytest.raises(DeniedError) as refusal:
            second.create_token(LOCAL, "third", ["audit"])
        assert "audit" in refusal.value.reason
        assert refusal.value.correlation
    assert [row.name for row in desk.list_tokens(LOCAL)] == ["admin", "second"]
    with pytest.raises(ConflictError):
        desk.create_token(LOCAL, "second", ["keys"])
    desk.revoke_token(LOCAL, "second")
    with pytest.raises(UnknownError):
        desk.revoke_token(LOCAL, "second")
    with pytest.raises(RequestError):
        desk.create_token(LOCAL, "x", ["king"])


def test_desk_audit(desk: KbsAdministration, rig: KbsRig) -> None:
    for number in range(5):
        desk.put_resource(LOCAL, PATH, b"%d" % number)
    local = list(rig.store.iterate_audit())
    assert list(desk.audit_records(LOCAL)) == local
    assert list(desk.audit_records(LOCAL, limit=2)) == local[:2]
    assert list(desk.audit_records(LOCAL, after=3, limit=None)) == local[3:]
    found = list(desk.audit_records(LOCAL, action="put resource", actor="admin"))
    assert len(found) == 5
    with pytest.raises(RequestError):
        list(desk.audit_records(LOCAL, nonsense="x"))
    assert desk.verify_audit(LOCAL).intact
    assert desk.audit_public_key().point == rig.store.audit_public_key.point
    assert "csvt_" not in json.dumps([str(entry) for entry in local])


def test_client_says_when_nobody_is_there(rig: KbsRig) -> None:
    with KbsAdministration("http://127.0.0.1:1", Secret(b"x")) as desk, pytest.raises(UnavailableError):
        desk.list_tokens(LOCAL)
    for url in ("ftp://x", "http://192.0.2.1:80", "https://", "https://x/path", "https://a:b@x", "http://localhost:99999"):
        with pytest.raises(ArgumentError):
            KbsAdministration(url, Secret(b"x"))
