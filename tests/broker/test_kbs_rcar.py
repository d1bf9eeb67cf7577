"""Request, challenge, attestation, response, resource: over real sockets, with guests of simulated chips."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from broker.kbs_rig import CONTENT, PATH, KbsRig
from broker.simulated_guest import SimulatedGuest, SimulatedMachine
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwcrypto import jwe as other_jwe
from jwcrypto import jwk as other_jwk
from jwcrypto import jwt as other_jwt

from csvfast.broker.administration import LOCAL
from csvfast.broker.clients.kbs import KbsClient, new_guest_key
from csvfast.broker.kbs.asgi import Call
from csvfast.broker.kbs.jwk import jwk_of
from csvfast.broker.kbs.rcar import Rcar
from csvfast.broker.kbs.report_data import report_data
from csvfast.broker.model import ResourcePath
from csvfast.errors import DeniedError, LimitedError, UnavailableError
from csvfast.report import Evidence

ERRORS = "https://github.com/confidential-containers/kbs/errors/"


@pytest.fixture(scope="module")
def machine() -> Iterator[SimulatedMachine]:
    with SimulatedMachine() as machine:
        yield machine


@pytest.fixture(scope="module")
def guest(machine: SimulatedMachine, tmp_path_factory: pytest.TempPathFactory) -> SimulatedGuest:
    firmware = tmp_path_factory.mktemp("guest") / "firmware"
    firmware.write_bytes(bytes(range(256)) * 256)
    return machine.launch(firmware)


@pytest.fixture
def rig(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> Iterator[KbsRig]:
    with KbsRig(tmp_path, machine.roots) as rig:
        rig.register(guest)
        yield rig


class Wire:
    """A guest that does every step by hand."""

    def __init__(self, rig: KbsRig, guest: SimulatedGuest, key: Any = None) -> None:
        self.rig, self.guest = rig, guest
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.jwk: dict[str, Any] = jwk_of(self.key.public_key())
        self.cookie = self.nonce = ""

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.rig.port, timeout=20)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        more = {"Cookie": f"kbs-session-id={self.cookie}"} if self.cookie else {}
        try:
            connection.request(method, path, raw, {**more, **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            fields = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        return response.status, json.loads(text) if text else None, fields

    def auth(self, **change: Any) -> tuple[int, Any, dict[str, str]]:
        request = {"version": "0.4.0", "tee": "csv", "extra-params": {"supported-hash-algorithms": ["sha384"]}, **change}
        answer = self.send("POST", "/kbs/v0/auth", request)
        if answer[0] == 200:
            self.nonce = answer[1]["nonce"]
            found = re.fullmatch(r"kbs-session-id=([0-9a-f]{32}); Expires=[^;]+ GMT; .*", answer[2]["set-cookie"])
            assert found
            self.cookie = found[1]
        return answer

    def evidence(self, additional: str = "", nonce: str | None = None, jwk: Any = None) -> Evidence:
        return self.guest.evidence(report_data(nonce or self.nonce, jwk or self.jwk, additional))

    def attestation(self, evidence: Evidence | None = None, additional: str = "") -> dict[str, Any]:
        return {
            "init-data": None,
            "runtime-data": {"nonce": self.nonce, "tee-pubkey": self.jwk},
            "tee-evidence": {
                "primary_evidence": json.loads((evidence or self.evidence(additional)).to_json()),
                "additional_evidence": additional,
            },
        }

    def attest(self, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.send("POST", "/kbs/v0/attest", self.attestation() if body is None else body, headers)

    def resource(self, path: object = PATH, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.send("GET", f"/kbs/v0/resource/{path}", headers=headers)


def refused(answer: tuple[int, Any, dict[str, str]], variant: str, status: int = 401) -> str:
    assert answer[0] == status
    assert set(answer[1]) == {"type", "detail"}
    assert answer[1]["type"] == ERRORS + variant
    correlation = answer[2]["x-csvfast-correlation"]
    assert correlation in answer[1]["detail"]
    assert answer[2]["content-type"] == "application/json"
    return str(answer[1]["detail"])


def test_every_step(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    status, challenge, headers = wire.auth()
    assert (status, set(challenge), challenge["extra-params"]) == (200, {"nonce", "extra-params"}, "")
    assert len(base64.b64decode(challenge["nonce"], validate=True)) == 32
    assert "HttpOnly" in headers["set-cookie"]
    assert "Secure" not in headers["set-cookie"]
    status, response, headers = wire.attest()
    assert (status, list(response)) == (200, ["token"])
    assert f"kbs-session-id={wire.cookie};" in headers["set-cookie"]
    status, document, headers = wire.resource()
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    token = other_jwe.JWE()
    token.deserialize(json.dumps(document))
    pem = wire.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    token.decrypt(other_jwk.JWK.from_pem(pem))
    assert token.payload == CONTENT
    actions = [(record.action, record.outcome, record.door) for record in rig.records(actor="guest")]
    assert actions == [("attest", "allowed", "kbs"), ("release", "allowed", "kbs")]
    assert rig.records(action="release")[0].correlation == headers["x-csvfast-correlation"]
    # The database knows no session id, no nonce that could be used again, and no content.
    everything = b"".join(path.read_bytes() for path in Path(rig.store._database.name.removeprefix("sqlite:///")).parent.glob("broker.db*"))
    assert wire.cookie.encode() not in everything
    assert hashlib.sha256(wire.cookie.encode()).hexdigest().encode() in everything
    assert CONTENT not in everything


@pytest.mark.parametrize("kind", ["P-256", "P-521", "RSA"])
def test_client(rig: KbsRig, guest: SimulatedGuest, kind: Any) -> None:
    with KbsClient(rig.url, guest, key=new_guest_key(kind)) as client:
        token = client.attest()
        assert client.attest() == token
        assert bytes(client.get_resource("kbs:///default/key/disk")) == CONTENT
        assert bytes(client.get_resource("disk", version=1)) == CONTENT
        rig.administration.put_resource(LOCAL, PATH, b"second")
        assert bytes(client.get_resource(PATH)) == b"second"
        assert bytes(client.get_resource(PATH, version=1)) == CONTENT
    assert len(rig.records(action="attest")) == 1


def test_token(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    token = wire.attest()[1]["token"]
    _status, keys, _headers = wire.send("GET", "/kbs/v0/jwks.json")
    checked = other_jwt.JWT(jwt=token, key=other_jwk.JWK(**keys["keys"][0]), algs=["ES256"])
    header, claims = json.loads(checked.header), json.loads(checked.claims)
    assert header["alg"] == "ES256"
    assert {name: header["jwk"][name] for name in ("x", "y")} == {name: keys["keys"][0][name] for name in ("x", "y")}
    assert claims["iss"] == "CoCo-Attestation-Service"
    assert claims["eat_profile"] == "tag:github.com,2024:confidential-containers/Trustee"
    assert claims["exp"] - claims["iat"] == 300
    cpu = claims["submods"]["cpu0"]
    assert cpu["ear.status"] == "affirming"
    assert cpu["ear.appraisal-policy-id"] == "default_cpu"
    assert cpu["ear.trustworthiness-vector"]["executables"] == 3
    evidence = cpu["ear.veraison.annotated-evidence"]
    assert evidence["runtime_data_claims"]["tee-pubkey"] == wire.jwk
    assert evidence["csv"]["measure"] == guest.measure.hex()
    # The token instead of the cookie; the JWE is for the key in it.
    session, wire.cookie = wire.cookie, ""
    assert wire.resource()[0] == 401
    status, _document, _headers = wire.resource(Authorization=f"Bearer {token}")
    assert status == 200
    for changed in (token[:-4] + "AAAA", token + "A", "", "a.b.c", token.replace(".", "..", 1)):
        refused(wire.resource(Authorization=f"Bearer {changed}x"), "TokenNotFound")
    rig.skew = 301
    refused(wire.resource(Authorization=f"Bearer {token}"), "TokenNotFound")
    wire.cookie = session
    refused(wire.resource(), "TokenNotFound")


def test_withdrawn_references_count_for_tokens_and_sessions(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    token = wire.attest()[1]["token"]
    assert wire.resource()[0] == 200
    rig.administration.delete_reference(LOCAL, "csv_measure")
    assert refused(wire.resource(), "PolicyDeny").startswith("not allowed (")
    wire.cookie = ""
    refused(wire.resource(Authorization=f"Bearer {token}"), "PolicyDeny")
    assert "measure" in rig.records(action="release", outcome="denied")[-1].reason


def test_nonce_is_used_once(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    first = wire.attest()[1]["token"]
    again = Wire(rig, guest)
    again.cookie, again.nonce = wire.cookie, wire.nonce
    assert again.attest()[1]["token"] == first  # whatever came the second time
    assert again.attest(b"no JSON at all")[1]["token"] == first
    assert len(rig.records(action="attest")) == 1
    replay = Wire(rig, guest)
    replay.auth()
    body = wire.attestation()
    refused(replay.attest(body), "SerdeError")  # the old nonce
    body["runtime-data"]["nonce"] = replay.nonce
    refused(replay.attest(body), "AttestationError")  # the new one, with old evidence
    assert "report data" in rig.records(action="attest", outcome="denied")[-1].reason


def test_many_attestations_at_once_are_one(rig: KbsRig, guest: SimulatedGuest) -> None:
    wires = [Wire(rig, guest) for _ in range(6)]
    wires[0].auth()
    bodies = []
    for wire in wires:
        wire.cookie, wire.nonce = wires[0].cookie, wires[0].nonce
        bodies.append(wire.attestation())
    tokens: list[str] = []

    def attest(wire: Wire, body: Any) -> None:
        answer = wire.attest(body)
        tokens.append(answer[1]["token"])

    threads = [threading.Thread(target=attest, args=pair) for pair in zip(wires, bodies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(tokens) == 6
    assert len(set(tokens)) == 1


def test_sessions_expire(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    body = wire.attestation()
    rig.skew = 301
    refused(wire.attest(body), "AttestationError")
    rig.skew = 0
    assert wire.attest(body)[0] == 200
    rig.skew = 301
    refused(wire.resource(), "TokenNotFound")
    rig.thread.run(rig.app.rcar.purge())
    rig.skew = 0
    refused(wire.resource(), "TokenNotFound")


def test_brokers_on_one_store_share_sessions(
    rig: KbsRig, tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest
) -> None:
    with KbsRig(tmp_path, machine.roots) as second:
        wire = Wire(rig, guest)
        wire.auth()
        wire.rig = second
        token = wire.attest()[1]["token"]
        wire.rig = rig
        assert wire.resource()[0] == 200
        assert wire.attest(b"{}")[1]["token"] == token


def test_brokers_on_postgresql(
    postgres_url: str, tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest
) -> None:
    with KbsRig(tmp_path, machine.roots, url=postgres_url) as first, KbsRig(tmp_path, machine.roots, url=postgres_url) as second:
        first.register(guest)
        wire = Wire(first, guest)
        wire.auth()
        wire.rig = second
        assert wire.attest()[0] == 200
        wire.rig = first
        assert wire.resource()[0] == 200
        second.administration.delete_reference(LOCAL, "csv_measure")
        refused(wire.resource(), "PolicyDeny")
        assert first.store.verify_audit().intact


def test_who_can_write_the_database_cannot_make_a_session(rig: KbsRig, guest: SimulatedGuest) -> None:
    from sqlalchemy import update

    from csvfast.broker.store import schema

    wire = Wire(rig, guest)
    wire.auth()
    assert wire.attest()[0] == 200
    other = Wire(rig, guest)
    other.auth()
    name = hashlib.sha256(wire.cookie.encode()).hexdigest()
    record = rig.store.sessions.get(name).record  # type: ignore[union-attr]
    target = hashlib.sha256(other.cookie.encode()).hexdigest()
    from csvfast.broker.store import Job

    rows = update(schema.sessions).where(schema.sessions.c.id == target).values(record=record, attested=1.0)
    rig.store.committer.run(Job(apply=lambda connection: connection.execute(rows)))
    refused(other.resource(), "TokenNotFound")


def test_who_can_write_the_database_cannot_change_a_session(rig: KbsRig, guest: SimulatedGuest) -> None:
    from sqlalchemy import update

    from csvfast.broker.store import Job, schema

    def change(**values: Any) -> None:
        rows = update(schema.sessions).values(**values)
        rig.store.committer.run(Job(apply=lambda connection: connection.execute(rows)))

    wire = Wire(rig, guest)
    wire.auth()
    change(tee="other")  # rules for CSV guests alone would be skipped
    refused(wire.attest(), "AttestationError")
    change(tee="csv")
    assert wire.attest()[0] == 200
    change(expires=rig.clock() + 10_000)
    rig.app.rcar._attested.clear()
    assert wire.resource()[0] == 200
    rig.skew += 301
    refused(wire.resource(), "TokenNotFound")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": "0.3.0"}, "protocol version"),
        ({"version": "0.4"}, "protocol version"),
        ({"version": 4}, "version is an integer"),
        ({"tee": "snp"}, "not verified here"),
        ({"tee": "sample"}, "not verified here"),
        ({"tee": None}, "tee is null"),
        ({"extra-params": 5}, "extra-params"),
    ],
)
def test_refused_requests(rig: KbsRig, guest: SimulatedGuest, change: dict[str, Any], text: str) -> None:
    assert text in refused(Wire(rig, guest).auth(**change), "SerdeError")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"version":"0.4.0","version":"0.4.0","tee":"csv"}', b"\xff", b"0"])
def test_no_request_at_all(rig: KbsRig, guest: SimulatedGuest, body: bytes) -> None:
    refused(Wire(rig, guest).send("POST", "/kbs/v0/auth", body), "SerdeError")


def test_extra_params_may_be_text_or_missing(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    assert wire.auth(**{"extra-params": ""})[0] == 200
    assert wire.send("POST", "/kbs/v0/auth", {"version": "0.4.0", "tee": "csv", "later": [1]})[0] == 200


def changed(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        place = body[part] if part else body
        if value is ...:
            del place[name]
        else:
            place[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "variant", "text"),
    [
        (changed("", "runtime-data", ...), "SerdeError", "runtime-data is missing"),
        (changed("", "runtime-data", []), "SerdeError", "runtime-data is an array"),
        (changed("", "tee-evidence", "x"), "SerdeError", "tee-evidence is a string"),
        (changed("runtime-data", "nonce", ...), "SerdeError", "nonce is missing"),
        (changed("runtime-data", "nonce", "AAAA"), "SerdeError", "another nonce"),
        (changed("runtime-data", "tee-pubkey", {"kty": "EC"}), "SerdeError", "alg is missing"),
        (changed("tee-evidence", "primary_evidence", ...), "SerdeError", "primary_evidence is missing"),
        (changed("tee-evidence", "primary_evidence", "x"), "SerdeError", "is a string"),
        (changed("tee-evidence", "primary_evidence", {}), "SerdeError", "attestation_report"),
        (changed("tee-evidence", "additional_evidence", None), "SerdeError", "is null"),
        (changed("tee-evidence", "additional_evidence", '{"nvidia":{}}'), "SerdeError", "devices"),
        (changed("tee-evidence", "additional_evidence", "nonsense"), "SerdeError", "additional_evidence"),
        (changed("tee-evidence", "additional_evidence", "{}"), "AttestationError", "not allowed"),
        (changed("", "init-data", {"format": "json", "body": "{}"}), "SerdeError", "format"),
        (changed("", "init-data", {"format": "toml", "body": "= ="}), "SerdeError", "no TOML"),
        (changed("", "init-data", {"format": "toml", "body": 'version="0.1.0"'}), "SerdeError", "algorithm is missing"),
    ],
)  # fmt: skip
def test_refused_attestations(
    rig: KbsRig, guest: SimulatedGuest, change: Callable[[dict[str, Any]], None], variant: str, text: str
) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    body = wire.attestation()
    change(body)
    assert text in refused(wire.attest(body), variant)
    refused(wire.resource(), "TokenNotFound")
    assert wire.attest()[0] == 200  # the challenge has not been met yet


def test_the_key_is_bound_as_it_was_sent(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    body = wire.attestation()
    other = jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key())
    for key in (other, {**wire.jwk, "kid": "x"}):
        body["runtime-data"]["tee-pubkey"] = key
        refused(wire.attest(body), "AttestationError")
    wire.jwk = {**wire.jwk, "kid": "x", "more": [1.5, {"ü": None}]}
    assert wire.attest()[0] == 200


def test_additional_evidence_that_names_no_device(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    assert wire.attest(wire.attestation(additional="{}"))[0] == 200


def test_init_data_is_passed_on(rig: KbsRig, guest: SimulatedGuest) -> None:
    text = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"aa.toml\" = '''\n[x.y]\na = 1\n'''\n"
    with KbsClient(rig.url, guest, init_data=text) as client:
        claims = json.loads(base64.urlsafe_b64decode(client.attest().split(".")[1] + "=="))
    evidence = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert evidence["init_data"] == hashlib.sha256(text.encode()).hexdigest()
    assert evidence["init_data_claims"]["data"] == {"aa.toml": "[x.y]\na = 1\n"}


@pytest.mark.parametrize("cookie", ["", "0" * 32, "zz", "0" * 31, "Ä" * 32, "0" * 64])
def test_unknown_sessions(rig: KbsRig, guest: SimulatedGuest, cookie: str) -> None:
    wire = Wire(rig, guest)
    headers = {"Cookie": f"kbs-session-id={cookie}"}
    refused(wire.send("GET", f"/kbs/v0/resource/{PATH}", headers=headers), "TokenNotFound")
    refused(wire.send("POST", "/kbs/v0/attest", b"{}", headers), "AttestationError")


def test_other_cookies_beside_the_session(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    assert wire.attest()[0] == 200
    session, wire.cookie = wire.cookie, ""
    assert wire.resource(Cookie=f"a=b; kbs-session-id={session}; c=d")[0] == 200
    assert wire.resource(Cookie=f'kbs-session-id="{session}"')[0] == 200
    assert wire.resource(Cookie=f"kbs-session-id={session}; kbs-session-id={'0' * 32}")[0] == 401


@pytest.mark.parametrize(
    ("path", "variant", "status"),
    [
        ("a", "InvalidRequestPath", 404),
        ("a/b", "InvalidRequestPath", 404),
        ("a/b/c/d", "InvalidRequestPath", 404),
        ("a//c", "InvalidRequestPath", 404),
        ("../../etc", "InvalidRequestPath", 404),
        ("a/b/.c", "InvalidRequestPath", 404),
        ("default/key%2Fdisk", "InvalidRequestPath", 404),
        ("default/key/dis%6B", "InvalidRequestPath", 404),
        ("a/b/" + "c" * 129, "InvalidRequestPath", 404),
        ("default/key/none", "PolicyDeny", 401),
        ("default/key/disk?version=2", "PolicyDeny", 401),
        ("default/key/disk?version=x", "SerdeError", 401),
        ("default/key/disk?a=1&a=2", "SerdeError", 401),
    ],
)  # fmt: skip
def test_paths(rig: KbsRig, guest: SimulatedGuest, path: str, variant: str, status: int) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    assert wire.attest()[0] == 200
    refused(wire.resource(path), variant, status)


def test_nowhere(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    refused(wire.send("GET", "/kbs/v0/pkcs11/a/b"), "PluginNotFound", 404)
    refused(wire.send("GET", "/elsewhere"), "InvalidRequestPath", 404)
    for method, path in (("GET", "/kbs/v0/auth"), ("PUT", f"/kbs/v0/resource/{PATH}"), ("POST", "/metrics")):
        answer = wire.send(method, path)
        refused(answer, "HTTPFailed", 405)
    assert answer[2]["allow"] == "GET"


def test_wrong_guest(rig: KbsRig, machine: SimulatedMachine, guest: SimulatedGuest, tmp_path: Path) -> None:
    (tmp_path / "firmware").write_bytes(bytes(65536))
    other = machine.launch(tmp_path / "firmware")
    pauses: list[float] = []
    with KbsClient(rig.url, other, sleep=pauses.append) as client, pytest.raises(DeniedError) as refusal:
        client.get_resource(PATH)
    assert refusal.value.reason.startswith("AttestationError: not allowed (")
    assert pauses == [1.0] * 4
    assert len(rig.records(action="attest", outcome="denied")) == 5


def test_client_attests_again_after_its_session_is_lost(rig: KbsRig, guest: SimulatedGuest) -> None:
    with KbsClient(rig.url, guest) as client:
        assert bytes(client.get_resource(PATH)) == CONTENT
        rig.skew = 301
        assert bytes(client.get_resource(PATH)) == CONTENT
        with pytest.raises(DeniedError):
            client.get_resource(ResourcePath("default", "key", "none"))
    assert len(rig.records(action="attest", outcome="allowed")) == 1 + 1 + 2


def test_garbage_for_a_challenge_locks_out(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> None:
    with KbsRig(tmp_path, machine.roots, failures=3, failure_window=60, lock_seconds=60) as rig:
        rig.register(guest)
        wire = Wire(rig, guest)
        wire.auth()
        for _ in range(3):
            refused(wire.attest({"runtime-data": {}}), "SerdeError")
        assert "too many" in refused(wire.attest(), "AttestationError")


def test_guessing_locks_an_attested_guest_out(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> None:
    with KbsRig(tmp_path, machine.roots, failures=3, failure_window=60, lock_seconds=60) as rig:
        rig.register(guest)
        wire = Wire(rig, guest)
        wire.auth()
        assert wire.attest()[0] == 200
        for number in range(3):
            assert "not allowed" in refused(wire.resource(f"default/key/guess-{number}"), "PolicyDeny")
        assert "too many" in refused(wire.resource("default/key/guess-4"), "TokenNotFound")
        assert "too many" in refused(wire.resource(), "TokenNotFound")
        assert len(rig.records(action="release")) == 3


def test_one_address_does_not_hold_all_challenges(rig: KbsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csvfast.broker.kbs.rcar._OPEN_LIMIT", 40)
    rcar = Rcar(rig.broker, rig.issuer)
    body = json.dumps({"version": "0.4.0", "tee": "csv", "extra-params": ""}).encode()

    def granted(address: str, tries: int) -> int:
        count = 0
        for _ in range(tries):
            with suppress(LimitedError):
                rig.thread.run(rcar.challenge(body, address))
                count += 1
        return count

    assert granted("192.0.2.1", 60) == 20
    assert granted("192.0.2.2", 5) == 2, "a 20th of all is left to everybody"
    assert granted("192.0.2.3", 5) == 2
    assert sum(granted(f"198.51.100.{number}", 2) for number in range(20)) == 16, "and all of them are no more than allowed"
    rig.skew += 301
    assert granted("192.0.2.1", 60) == 20
    assert len(rcar._held) == 1


def test_limits(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> None:
    with KbsRig(tmp_path, machine.roots, request_rate=1, request_burst=2, release_rate=0.01, release_burst=2) as rig:
        rig.register(guest)
        wire = Wire(rig, guest)
        wire.auth()
        assert wire.attest()[0] == 200
        answer = wire.auth()
        refused(answer, "AttestationError")
        assert int(answer[2]["retry-after"]) >= 1
        assert [wire.resource()[0] for _ in range(3)] == [200, 200, 401]


def test_nothing_is_released_when_nothing_can_be_recorded(
    rig: KbsRig, guest: SimulatedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(rig, guest)
    wire.auth()
    assert wire.attest()[0] == 200

    async def full(job: Any) -> Any:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(rig.store.committer, "commit", full)
    detail = refused(wire.resource(), "PolicyDeny")
    assert detail.startswith("not available (")
    assert wire.send("GET", "/healthz")[:2] == (503, {"status": "unavailable"})
    refused(Wire(rig, guest).auth(), "AttestationError")
    monkeypatch.undo()
    assert wire.resource()[0] == 200


def test_many_questions_about_health_are_one_transaction(rig: KbsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, count = rig.store.committer.commit, 0

    async def counted(job: Any) -> Any:
        nonlocal count
        count += 1
        return await commit(job)

    monkeypatch.setattr(rig.store.committer, "commit", counted)

    async def ask() -> list[int]:
        call = Call({"headers": []}, None, "0" * 16)  # type: ignore[arg-type]
        return [reply.status for reply in await asyncio.gather(*(rig.app._healthz(call) for _ in range(50)))]

    assert rig.thread.run(ask()) == [200] * 50
    assert count == 1


def test_health_and_metrics(rig: KbsRig, guest: SimulatedGuest) -> None:
    wire = Wire(rig, guest)
    assert wire.send("GET", "/healthz")[:2] == (200, {"status": "ok"})
    wire.auth()
    wire.attest()
    wire.resource()
    wire.resource("default/key/none")
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=20)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    assert response.getheader("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    assert 'csvfast_requests_total{door="kbs",action="resource",outcome="allowed"} 1' in page
    assert 'csvfast_requests_total{door="kbs",action="resource",outcome="denied"} 1' in page
    assert 'csvfast_request_seconds_count{door="kbs",action="attest"} 1' in page
    assert re.search(r'csvfast_connections\{door="kbs"\} \d', page)
    for secret in (wire.cookie, "default/key", wire.nonce, guest.measure.hex()):
        assert secret not in page
    for line in page.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .*|[a-z_]+(\{([a-z]+="[^"\\]*",?)+\})? [0-9.e+-]+', line), line
