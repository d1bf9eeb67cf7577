"""JWK and JWE: what jwcrypto opens, what the reference client would re-serialise, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from jwcrypto import jwe as other_jwe
from jwcrypto import jwk as other_jwk

from csvfast.broker.kbs import jwe
from csvfast.broker.kbs.jwe import open_jwe, seal_jwe
from csvfast.broker.kbs.jwk import GuestKey, base64url, from_base64url, jwk_of
from csvfast.broker.kbs.report_data import canonical_digest, report_data
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError

KINDS = ("P-256", "P-521", "RSA")


def private(kind: str, number: int = 0) -> Any:
    return _private(kind, number)


@cache
def _private(kind: str, number: int) -> Any:
    if kind == "RSA":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1() if kind == "P-256" else ec.SECP521R1())


def public(kind: str, number: int = 0) -> dict[str, str]:
    return jwk_of(private(kind, number).public_key())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 5000])
def test_jwcrypto_opens_it(kind: str, size: int) -> None:
    content = bytes(range(256)) * 20
    sealed = seal_jwe(GuestKey(public(kind)), Secret(content[:size]))
    pem = private(kind).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    token = other_jwe.JWE()
    token.deserialize(sealed.decode())
    token.decrypt(other_jwk.JWK.from_pem(pem))
    assert token.payload == content[:size]
    assert bytes(open_jwe(private(kind), sealed)) == content[:size]


@pytest.mark.parametrize("kind", KINDS)
def test_opens_what_jwcrypto_seals(kind: str) -> None:
    key = public(kind)
    token = other_jwe.JWE(b"content", json.dumps({"alg": key["alg"], "enc": "A256GCM"}))
    token.add_recipient(other_jwk.JWK(**{name: value for name, value in key.items() if name != "alg"}))
    document = json.loads(token.serialize())
    if kind == "RSA":
        assert bytes(open_jwe(private(kind), json.dumps(document).encode())) == b"content"
    else:  # epk outside of the protected header: not this protocol's
        with pytest.raises(RequestError):
            open_jwe(private(kind), json.dumps(document).encode())


def reserialised(header: bytes) -> bytes:
    """The header as kbs-types writes it: a struct of alg and enc, then a map with sorted keys, compact."""
    members = json.loads(header)
    ordered = {"alg": members.pop("alg"), "enc": members.pop("enc")}
    for name in sorted(members):
        ordered[name] = members[name]
    for value in ordered.values():
        if isinstance(value, dict):
            assert list(value) == sorted(value)
    return json.dumps(ordered, separators=(",", ":")).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_header_survives_the_clients_reserialisation(kind: str) -> None:
    for _ in range(20):
        document = json.loads(seal_jwe(GuestKey(public(kind)), b"x"))
        assert list(document) == ["protected", "encrypted_key", "iv", "ciphertext", "tag"]
        header = from_base64url(document["protected"], "protected")
        assert reserialised(header) == header
        members = json.loads(header)
        assert members["enc"] == "A256GCM"
        if kind == "RSA":
            assert members == {"alg": "RSA-OAEP-256", "enc": "A256GCM"}
        else:
            assert list(members["epk"]) == ["crv", "kty", "x", "y"]
            assert len(from_base64url(members["epk"]["x"], "x")) == {"P-256": 32, "P-521": 66}[kind]
            assert len(from_base64url(document["encrypted_key"], "key")) == 40


def test_derivation_is_concat_kdf() -> None:
    info = b"\0\0\0\x0eECDH-ES+A256KW" + bytes(8) + b"\0\0\x01\0"
    for width in (32, 66):
        agreed = bytes(range(width))
        assert jwe._derive(agreed) == ConcatKDFHash(hashes.SHA256(), 32, info).derive(agreed)


def test_nothing_is_used_twice() -> None:
    key = GuestKey(public("P-256"))
    documents = [json.loads(seal_jwe(key, b"same")) for _ in range(50)]
    for name in ("protected", "encrypted_key", "iv", "ciphertext", "tag"):
        assert len({document[name] for document in documents}) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_changed_or_foreign_is_refused(kind: str) -> None:
    sealed = seal_jwe(GuestKey(public(kind)), b"content")
    with pytest.raises(AuthenticationError):
        open_jwe(private(kind, 1), sealed)
    document = json.loads(sealed)
    for name in ("encrypted_key", "iv", "ciphertext", "tag"):
        raw = bytearray(from_base64url(document[name], name))
        raw[-1] ^= 1
        with pytest.raises(AuthenticationError):
            open_jwe(private(kind), json.dumps({**document, name: base64url(bytes(raw))}).encode())
    spaced = json.dumps(json.loads(from_base64url(document["protected"], "x"))).encode()
    with pytest.raises(AuthenticationError):
        open_jwe(private(kind), json.dumps({**document, "protected": base64url(spaced)}).encode())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("tag"), "tag is missing"),
        (lambda d: d.update(iv=base64url(bytes(11))), "12 and 16"),
        (lambda d: d.update(tag=base64url(bytes(12))), "12 and 16"),
        (lambda d: d.update(ciphertext=""), "empty"),
        (lambda d: d.update(more="x"), "unknown members"),
        (lambda d: d.update(header={}), "unknown members"),
        (lambda d: d.update(iv=1), "iv is an integer"),
        (lambda d: d.update(encrypted_key=base64url(bytes(41))), "41 bytes"),
        (lambda d: set_header(d, alg="ECDH-ES"), "another alg"),
        (lambda d: set_header(d, alg="none"), "another alg"),
        (lambda d: set_header(d, alg="dir"), "another alg"),
        (lambda d: set_header(d, enc="A128GCM"), "another enc"),
        (lambda d: set_header(d, zip="DEF"), "unknown members"),
        (lambda d: set_header(d, apu="AA"), "unknown members"),
        (lambda d: set_header(d, epk={"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}), "x of 1 bytes"),
        (lambda d: set_header(d, epk={k: v for k, v in public("P-521").items() if k != "alg"}), "epk on P-521"),
        (lambda d: set_header(d, epk=public("P-256")), "unknown members"),
    ],
)  # fmt: skip
def test_no_jwe_of_this_protocol(change: Callable[[dict[str, Any]], object], text: str) -> None:
    document = json.loads(seal_jwe(GuestKey(public("P-256")), b"content"))
    change(document)
    with pytest.raises(RequestError, match=text):
        open_jwe(private("P-256"), json.dumps(document).encode())


def set_header(document: dict[str, Any], **members: Any) -> None:
    header = {**json.loads(from_base64url(document["protected"], "protected")), **members}
    document["protected"] = base64url(json.dumps(header, separators=(",", ":")).encode())


def test_jwk_is_read_back() -> None:
    for kind in KINDS:
        key = GuestKey({**public(kind), "kid": "mine", "x-more": [1, {"a": None}]})
        assert key.document["x-more"] == [1, {"a": None}]
        assert key.public.public_numbers() == private(kind).public_key().public_numbers()
        assert key.thumbprint == GuestKey(public(kind)).thumbprint
    # RFC 7638, 3.1 (its key is of another use; only the thumbprint is compared)
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3okn"
        "jhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQv"
        "RL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    rfc = GuestKey({"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RSA-OAEP-256"})
    assert base64url(bytes.fromhex(rfc.thumbprint)) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def without(kind: str, name: str) -> dict[str, Any]:
    return {key: value for key, value in public(kind).items() if key != name}


def flipped(text: str) -> str:
    raw = bytearray(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    raw[-1] ^= 1
    return base64url(bytes(raw))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (list, "expected an object"),
        (lambda: without("P-256", "kty"), "kty is missing"),
        (lambda: {**public("P-256"), "kty": "oct"}, "kty 'oct'"),
        (lambda: {**public("P-256"), "kty": ["EC"]}, "kty is an array"),
        (lambda: without("P-256", "alg"), "alg is missing"),
        (lambda: {**public("P-256"), "alg": "ECDH-ES"}, "expected ECDH-ES\\+A256KW"),
        (lambda: {**public("P-256"), "alg": "RSA-OAEP-256"}, "expected ECDH-ES\\+A256KW"),
        (lambda: {**public("RSA"), "alg": "RSA1_5"}, "RSA1_5"),
        (lambda: {**public("RSA"), "alg": "RSA-OAEP"}, "expected RSA-OAEP-256"),
        (lambda: without("P-256", "crv"), "crv is missing"),
        (lambda: {**public("P-256"), "crv": "P-384"}, "crv 'P-384'"),
        (lambda: {**public("P-256"), "crv": "P-521"}, "32 bytes; expected 66"),
        (lambda: {**public("P-521"), "crv": "P-256"}, "66 bytes; expected 32"),
        (lambda: without("P-256", "y"), "y is missing"),
        (lambda: {**public("P-256"), "x": 5}, "x is an integer"),
        (lambda: {**public("P-256"), "x": None}, "x is null"),
        (lambda: {**public("P-256"), "x": public("P-256")["x"] + "="}, "no base64url"),
        (lambda: {**public("P-256"), "x": "+" + public("P-256")["x"][1:]}, "no base64url"),
        (lambda: {**public("P-256"), "x": public("P-256")["x"][:-1]}, "x"),
        (lambda: {**public("P-256"), "x": base64url(bytes(33))}, "33 bytes"),
        (lambda: {**public("P-256"), "y": flipped(public("P-256")["y"])}, "no point of P-256"),
        (lambda: {**public("P-521"), "y": flipped(public("P-521")["y"])}, "no point of P-521"),
        (lambda: {**public("P-256"), "x": base64url(bytes(32)), "y": base64url(bytes(32))}, "no point"),
        (lambda: {**public("P-256"), "x": base64url(b"\xff" * 32)}, "no point"),
        (lambda: {**public("P-256"), "d": "AA"}, "private member d"),
        (lambda: {**public("RSA"), "p": "AA"}, "private member p"),
        (lambda: {**public("P-256"), "use": "sig"}, "use is not enc"),
        (lambda: {**public("P-256"), "x-more": [1.5] * 3000}, "expected at most 8192"),
        (lambda: {**public("RSA"), "n": base64url((1 << 1023 | 1).to_bytes(128, "big"))}, "n of 1024 bits"),
        (lambda: {**public("RSA"), "n": base64url((1 << 2046 | 1).to_bytes(256, "big"))}, "n of 2047 bits"),
        (lambda: {**public("RSA"), "n": base64url((1 << 2047).to_bytes(256, "big"))}, "odd"),
        (lambda: {**public("RSA"), "n": base64url(b"\0" + b"\xff" * 256)}, "shortest form"),
        (lambda: {**public("RSA"), "n": base64url(b"\xff" * 1025)}, "at most 1024"),
        (lambda: {**public("RSA"), "n": ""}, "empty"),
        (lambda: {**public("RSA"), "e": "AQ"}, "e is not an odd"),
        (lambda: {**public("RSA"), "e": base64url(b"\x02")}, "e is not an odd"),
        (lambda: {**public("RSA"), "e": base64url(b"\x01\0\0\0\x01")}, "e is not an odd"),
    ],
)  # fmt: skip
def test_refused_jwk(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        GuestKey(make())


@given(st.binary(max_size=70))
def test_base64url(data: bytes) -> None:
    text = base64url(data)
    assert text == base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert from_base64url(text, "test") == data


@pytest.mark.parametrize("text", ["A", "AB", "AAB", "A A", "AA\n", "AA==", "A=A", "ä", "AA+A", "AA/A", "\0", "AAAAA"])
def test_base64url_refuses(text: str) -> None:
    with pytest.raises(RequestError):
        from_base64url(text, "test")


def test_digest_vector() -> None:
    expected = "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c4597480a186427c813ca941da78870c3"
    assert canonical_digest({"c": {"d": "e"}, "b": 1, "a": "test"}).hex() == expected


def test_report_data() -> None:
    key = {"kty": "EC", "x": "ü", "more": [1.0, True, None]}
    text = '{"additional-evidence":"","nonce":"bm9uY2U=","tee-pubkey":{"kty":"EC","more":[1,true,null],"x":"ü"}}'
    assert report_data("bm9uY2U=", key) == hashlib.sha384(text.encode()).digest() + bytes(16)
    assert report_data("bm9uY2U=", key, "{}") != report_data("bm9uY2U=", key)
    assert report_data("bm9uY2U=", {**key, "kid": "1"}) != report_data("bm9uY2U=", key)
    for bad in ({"n": 2**53}, {"n": float("inf")}, {"n": "\ud800"}):
        with pytest.raises(RequestError):
            report_data("", bad)
