"""Fuzz targets of the KBS door: keys of guests, JWE, tokens, bodies of the protocol, paths and queries."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Hashable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from csvfast.broker.json_input import DEPTH_LIMIT, INTEGER_LIMIT, loads
from csvfast.broker.kbs.asgi import parse_query
from csvfast.broker.kbs.ear import TokenIssuer
from csvfast.broker.kbs.init_data import read_init_data
from csvfast.broker.kbs.jwe import open_jwe, seal_jwe
from csvfast.broker.kbs.jwk import GuestKey, from_base64url, jwk_of
from csvfast.broker.kbs.rcar import Rcar
from csvfast.broker.kbs.report_data import report_data
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.model import ResourcePath, for_kid
from csvfast.errors import DeniedError
from csvfast.report.evidence_json import read_json
from fuzz.target import Target

__all__ = ["JsonInputTarget", "JweTarget", "JwkTarget", "RcarTarget", "ResourcePathTarget", "TokenTarget"]

NONCE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def text_of(error: Exception) -> str:
    """An error's words without numbers: a kind of answer."""
    return re.sub(r"\d+|'.*|\".*", "", str(error)[:60])


class JsonInputTarget(Target):
    """JSON from strangers: what is read has the promised form and is read the same by json."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [
            b'{"a":[1,2.5,-3,1e5,true,false,null],"b":{"c":"\\u00e9\\n"}}', b"[" * 31 + b"]" * 31, b'["\\ud83d\\ude00"]',
            b"9007199254740991", b'{"version":"0.4.0","tee":"csv","extra-params":""}', b'"\\""', b'[{"a":1},{"a":1}]',
        ]  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        value = loads(data, "input", limit=100_000)
        assert json.loads(data) == value
        self.check(value, 0)
        json.dumps(value, ensure_ascii=False).encode()
        return type(value).__name__, len(value) if isinstance(value, (dict, list)) else 0

    def check(self, value: Any, depth: int) -> None:
        assert depth <= DEPTH_LIMIT
        if type(value) is int:
            assert abs(value) < INTEGER_LIMIT
        elif isinstance(value, dict):
            for below in value.values():
                self.check(below, depth + 1)
        elif isinstance(value, list):
            for below in value:
                self.check(below, depth + 1)


class JwkTarget(Target):
    """Keys: whatever is accepted can be sealed to, and is what was sent."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        keys: list[Any] = [ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP521R1())]
        keys += [rsa.generate_private_key(65537, 2048)]
        documents = [jwk_of(key.public_key()) for key in keys]
        documents += [{**documents[0], "kid": "x"}, {**documents[2], "alg": "RSA1_5"}, {**documents[0], "d": "AA"}]
        self.seeds = [json.dumps(document).encode() for document in documents]

    def handle(self, data: bytes) -> Hashable:
        document = loads(data, "tee-pubkey", limit=10_000)
        try:
            key = GuestKey(document)
        except ValueError as error:
            return text_of(error)
        assert key.document == document
        assert not document.keys() & {"d", "p", "q"}
        again = jwk_of(key.public)
        assert all(document[name] == again[name] for name in again)
        assert b"secret" not in seal_jwe(key, b"secret content")
        return key.algorithm, key.curve


class JweTarget(Target):
    """JWE as a guest opens it: only what was sealed, and unchanged, opens."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = GuestKey(jwk_of(self.key.public_key()))
        self.seeds = [seal_jwe(public, b"content %d" % number) for number in range(8)]
        self.seeds.append(b'{"protected":"eyJhbGciOiJub25lIn0","encrypted_key":"","iv":"","ciphertext":"","tag":""}')

    def handle(self, data: bytes) -> Hashable:
        try:
            secret = open_jwe(self.key, data)
        except ValueError as error:
            return text_of(error)
        assert bytes(secret).startswith(b"content ")
        return "opened"


class TokenTarget(Target):
    """Tokens: only what a trusted key has signed is believed."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.issuer = TokenIssuer(ec.generate_private_key(ec.SECP256R1()), clock=lambda: 1_900_000_000.0)

        class Nobody:
            @staticmethod
            def token_claims() -> dict[str, Any]:
                return {"tee": "csv", "submods": {"cpu0": {"ear.status": "affirming"}}}

        self.seeds = [self.issuer.issue(Nobody()).encode() for _ in range(4)]  # type: ignore[arg-type]
        self.genuine = {seed.split(b".")[1] for seed in self.seeds}
        self.seeds += [b"eyJhbGciOiJub25lIn0.e30.", b"..", b"e30.e30.e30"]

    def handle(self, data: bytes) -> Hashable:
        try:
            claims = self.issuer.verify(data.decode("latin-1"))
        except DeniedError as error:
            return error.reason
        assert data.split(b".")[1] in self.genuine, "a changed token was believed"
        return len(claims)


class RcarTarget(Target):
    """Bodies of the protocol: auth, attest, init data. Bodies of the real size are rare; most hold evidence that is short."""

    text = True
    learn_max = 6000

    def __init__(self) -> None:
        super().__init__()
        jwk = jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key())
        attestation: dict[str, Any] = {
            "init-data": None,
            "runtime-data": {"nonce": NONCE, "tee-pubkey": jwk},
            "tee-evidence": {"primary_evidence": {"attestation_report": {"magic": [0]}}, "additional_evidence": ""},
        }
        toml = 'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"a.b" = \'\'\'x\'\'\'\n'
        bodies: list[Any] = [
            {"version": "0.4.0", "tee": "csv", "extra-params": {"supported-hash-algorithms": ["sha384"]}},
            {"version": "0.4.0", "tee": "snp", "extra-params": ""},
            attestation,
            {**attestation, "init-data": {"format": "toml", "body": toml}},
            {**attestation, "tee-evidence": {"primary_evidence": {}, "additional_evidence": '{"nvidia":{"a":1}}'}},
            {**attestation, "tee-evidence": {"primary_evidence": {}, "additional_evidence": "{}"}},
        ]
        self.seeds = [json.dumps(body).encode() for body in bodies]
        self.rcar = Rcar(_broker(), TokenIssuer(ec.generate_private_key(ec.SECP256R1())))

    def handle(self, data: bytes) -> Hashable:
        if b'"version"' in data and b"runtime" not in data:
            try:
                return len(asyncio.run(self.rcar.challenge(data, "192.0.2.1")))
            except ValueError as error:
                return text_of(error)
        try:
            key, evidence, additional, init_data = self.rcar._parse(data, NONCE)
        except ValueError as error:
            return text_of(error)
        assert len(report_data(NONCE, key.document, additional)) == 64
        assert init_data is None or len(init_data["digest"]) in (64, 96, 128)
        try:
            read_json(evidence)
        except ValueError as error:
            return text_of(error)
        return "evidence"


class ResourcePathTarget(Target):
    """Paths, key ids, queries, base64url, init data by itself: text that becomes names."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [
            b"default/key/1", b"kbs:///default/key/disk-1.a_b", b"kbs://host/a/b/c", b"key-1", b"a=b&c=%C3%A9&version=2", b"AQAB",
            b'version = "1"\nalgorithm = "sha256"\n', b"../../x", b"a/b/c/d",
        ]  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        text = data.decode("utf-8", "replace")
        answers: list[Hashable] = []
        for reader in (ResourcePath.parse, ResourcePath.from_uri, for_kid):
            try:
                path = reader(text)
            except ValueError:
                answers.append(None)
            else:
                assert ResourcePath.parse(str(path)) == path
                assert ResourcePath.from_uri(path.uri) == path
                assert not any(part.startswith(".") or "/" in part or "%" in part for part in path)
                answers.append(len(path))
        try:
            answers.append(len(parse_query(data)))
        except ValueError as error:
            answers.append(text_of(error))
        try:
            answers.append(bool(from_base64url(text, "input")))
        except ValueError:
            answers.append(None)
        try:
            answers.append(read_init_data({"format": "toml", "body": text}) is None)
        except ValueError as error:
            answers.append(text_of(error))
        return tuple(answers)


def _broker() -> Any:
    """As much of a broker as a challenge needs: limits that are off, and a store that keeps nothing."""

    class Committer:
        @staticmethod
        async def commit(job: Any) -> None: ...

    class Sessions:
        @staticmethod
        def create_job(*row: Any) -> None: ...

    class Store:
        committer = Committer()
        sessions = Sessions()

    class Broker:
        store = Store()
        limits = Limits(LimitsConfig(request_rate=0, failures=0))

        @staticmethod
        def clock() -> float:
            return 1.0

    return Broker()
