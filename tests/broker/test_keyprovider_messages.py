"""ocicrypt's JSON, parameters, annotation packets: captured bytes, known answers, exchanged forms, hostile input."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.grpc_messages import MESSAGE_LIMIT, METHODS
from csvfast.broker.keyprovider.messages import (
    OPTIONS_LIMIT,
    AnnotationPacket,
    WrapParameters,
    choose_parameters,
    parse_parameters,
    read_packet,
    read_unwrap_reply,
    read_unwrap_request,
    read_wrap_reply,
    read_wrap_request,
    unwrap_reply,
    unwrap_request,
    wrap_options,
    wrap_reply,
    wrap_request,
)
from csvfast.broker.model import ResourcePath
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError

KEK = Secret(bytes(range(32)))
PATH = ResourcePath.parse("default/key/images")
OPTIONS = (
    b'{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","digest":"sha256:'
    + b"cf" * 32
    + b'","cipheroptions":{"nonce":"AAECAwQFBgcICQoLDA0ODw=="}}'
)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def plain(secret: Secret) -> bytes:
    return bytes(memoryview(secret))


def test_protobuf_of_one_field() -> None:
    method = METHODS["/keyprovider.KeyProviderService/WrapKey"]
    assert method.write_request(KeyProviderKeyWrapProtocolInput=b"{}") == b"\x0a\x02{}"
    assert method.write_reply(KeyProviderKeyWrapProtocolOutput=b"x" * 200) == b"\x0a\xc8\x01" + b"x" * 200
    read = method.read_request(b"\x0a\x02{}" + b"\x12\x01z")  # an unknown field 2
    assert read.bytes("KeyProviderKeyWrapProtocolInput") == b"{}"
    assert method.read_request(b"").bytes("KeyProviderKeyWrapProtocolInput") == b""


@pytest.mark.parametrize("wrong", [b"\x0a\x03{}", b"\x0a", b"\xff" * 12, b"\x0a\x02{}\x0b"])
def test_no_protobuf(wrong: bytes) -> None:
    with pytest.raises(RequestError, match="no such protobuf message"):
        METHODS["/keyprovider.KeyProviderService/WrapKey"].read_request(wrong)


def test_a_message_too_long() -> None:
    with pytest.raises(RequestError, match="expected at most"):
        METHODS["/keyprovider.KeyProviderService/WrapKey"].read_request(bytes(MESSAGE_LIMIT + 1))


def test_a_request_of_skopeo() -> None:
    """As skopeo 1.18.0 sends it."""
    request = {
        "op": "keywrap",
        "keywrapparams": {
            "ec": {
                "Parameters": {"attestation-agent": [b64(b"kbs:///default/key/1"), b64(b"second")]},
                "DecryptConfig": {"Parameters": {}},
            },
            "optsdata": b64(OPTIONS),
        },
        "keyunwrapparams": {"dc": None, "annotation": None},
    }
    read = read_wrap_request(json.dumps(request).encode())
    assert read.parameters == {"attestation-agent": (b"kbs:///default/key/1", b"second")}
    assert plain(read.options) == OPTIONS
    assert "symkey" not in repr(read)
    request["keywrapparams"]["optsdata"] = list(OPTIONS)  # type: ignore[index]
    request["keywrapparams"]["ec"]["Parameters"] = {"attestation-agent": [list(b"kbs:///default/key/1"), list(b"second")]}  # type: ignore[index]
    assert read_wrap_request(json.dumps(request).encode()).parameters == read.parameters


def test_requests_are_written_as_skopeo_writes_them() -> None:
    written = wrap_request("attestation-agent", [b"x"], Secret(b"options"))
    assert written == (
        b'{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"attestation-agent":["eA=="]},"DecryptConfig":{"Parameters":{}}},'
        b'"optsdata":"b3B0aW9ucw=="},"keyunwrapparams":{"dc":null,"annotation":null}}'
    )
    assert unwrap_request("p", [b"x"], b"packet") == (
        b'{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},'
        b'"keyunwrapparams":{"dc":{"Parameters":{"p":["eA=="]}},"annotation":"cGFja2V0"}}'
    )
    assert read_unwrap_request(unwrap_request("p", [b"x"], b"packet")) == b"packet"


def test_replies_are_arrays_of_integers() -> None:
    assert wrap_reply(b"\0\xff") == b'{"keywrapresults":{"annotation":[0,255]}}'
    assert unwrap_reply(Secret(b"\0\xff")) == b'{"keyunwrapresults":{"optsdata":[0,255]}}'


@given(st.binary(min_size=1, max_size=300))
def test_replies_are_read_in_both_forms(data: bytes) -> None:
    assert read_wrap_reply(wrap_reply(data)) == data
    assert plain(read_unwrap_reply(unwrap_reply(Secret(data)))) == data
    assert read_wrap_reply(json.dumps({"keywrapresults": {"annotation": b64(data)}}).encode()) == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "keyunwrap"}, "op; expected keywrap"),
        ({"op": None}, "op; expected"),
        ({"keywrapparams": None}, "keywrapparams"),
        ({"keywrapparams": {"ec": None, "optsdata": None}}, "optsdata: missing"),
        ({"keywrapparams": {"ec": None, "optsdata": ""}}, "optsdata is empty"),
        ({"keywrapparams": {"ec": None, "optsdata": "%%%%"}}, "no base64"),
        ({"keywrapparams": {"ec": None, "optsdata": "eA"}}, "no base64"),
        ({"keywrapparams": {"ec": None, "optsdata": [256]}}, "integers 0 to 255"),
        ({"keywrapparams": {"ec": None, "optsdata": [-1]}}, "integers 0 to 255"),
        ({"keywrapparams": {"ec": None, "optsdata": [True]}}, "integers 0 to 255"),
        ({"keywrapparams": {"ec": None, "optsdata": [1.0]}}, "integers 0 to 255"),
        ({"keywrapparams": {"ec": None, "optsdata": {}}}, "expected base64"),
        ({"keywrapparams": {"ec": None, "optsdata": [0] * (OPTIONS_LIMIT + 1)}}, "at most"),
        ({"keywrapparams": {"ec": None, "optsdata": "A" * 4 * OPTIONS_LIMIT}}, "at most"),
        ({"keywrapparams": {"ec": [], "optsdata": "eA=="}}, "ec is no object"),
        ({"keywrapparams": {"ec": {"Parameters": []}, "optsdata": "eA=="}}, "Parameters"),
        ({"keywrapparams": {"ec": {"Parameters": {"a": "eA=="}}, "optsdata": "eA=="}}, "list of at most"),
        ({"keywrapparams": {"ec": {"Parameters": {"a": [1]}}, "optsdata": "eA=="}}, "a parameter"),
        ({"keywrapparams": {"ec": {"Parameters": {str(n): [] for n in range(65)}}, "optsdata": "eA=="}}, "at most 64"),
    ],
)
def test_wrong_requests(change: dict[str, Any], message: str) -> None:
    request = {"op": "keywrap", "keywrapparams": {"ec": None, "optsdata": "eA=="}} | change
    with pytest.raises(RequestError, match=message):
        read_wrap_request(json.dumps(request).encode())


@pytest.mark.parametrize("reply", ["{}", '{"keyunwrapresults":{}}', '{"keyunwrapresults":{"optsdata":[]}}', "[]", ""])
def test_wrong_replies(reply: str) -> None:
    with pytest.raises(RequestError):
        read_unwrap_reply(reply.encode())
    with pytest.raises(RequestError):
        read_wrap_reply(reply.encode().replace(b"[]}}", b"null}}"))


def test_unknown_members_are_ignored() -> None:
    request = {"op": "keywrap", "new": 1, "keywrapparams": {"ec": None, "optsdata": "eA==", "more": {}}}
    assert plain(read_wrap_request(json.dumps(request).encode()).options) == b"x"


# ---- Parameters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", WrapParameters()),
        ("images", WrapParameters(PATH)),
        ("default/key/images", WrapParameters(PATH)),
        ("/default/key/images", WrapParameters(PATH)),
        ("kbs:///default/key/images", WrapParameters(PATH)),
        ("kbs://broker.example:8080/default/key/images", WrapParameters(PATH)),
        ("keyid=kbs:///default/key/images", WrapParameters(PATH)),
        ("keyid=images::packet=verdictd", WrapParameters(PATH, "verdictd")),
        ("packet=coco", WrapParameters(None, "coco")),
        ("keyid=images::algorithm=A256GCM::sample=false", WrapParameters(PATH)),
    ],
)
def test_parameters(text: str, expected: WrapParameters) -> None:
    assert parse_parameters(text.encode()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keyid=images::keypath=/etc/shadow", "keypath"),
        ("keypath=/etc/shadow", "keypath"),
        ("algorithm=A256CTR", "A256CTR"),
        ("sample=true", "sample"),
        ("keyid=a::keyid=b", "each key once"),
        ("keyid=a::b", "key=value"),
        ("keyid=a::", "key=value"),
        ("packet=coco-v2", "packet"),
        ("unknown=1", "unknown"),
        ("keyid=", "resource path"),
        ("../../etc/passwd", "resource path"),
        ("a/b", "resource path"),
        ("kbs:///a/b", "resource path"),
        ("kbs:///a/b/../c", "resource path"),
        ("kbs+pkcs11:///a/b/c", "resource path"),
        ("eaa_kbc::192.0.2.1:1122", "resource path"),
        ("x" * 129, "resource path"),
        ("x" * 5000, "at most 4096"),
        ("schlüssel", "ASCII"),
        ("a\0b", "resource path"),
    ],
)
def test_wrong_parameters(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_parameters(text.encode())


def test_which_provider_is_asked() -> None:
    choose = choose_parameters
    assert choose({}, "p") == WrapParameters()
    assert choose({"p": ()}, "p") == WrapParameters()
    assert choose({"p": (b"images", b"default/key/images")}, "p") == WrapParameters(PATH)
    assert choose({"other": (b"images",)}, "p") == WrapParameters(PATH)
    assert choose({"x509s": (b"\xff\0",), "p": (b"images",)}, "p") == WrapParameters(PATH)
    with pytest.raises(RequestError, match="2 different keys"):
        choose({"p": (b"images", b"others")}, "p")
    with pytest.raises(RequestError, match="none of them"):
        choose({"a": (b"images",), "b": (b"images",)}, "p")


# ---- Packets


def test_known_answer_of_a_coco_packet() -> None:
    sealed = AESGCM(bytes(range(32))).encrypt(bytes(12), OPTIONS, None)
    packet = json.dumps({"kid": PATH.uri, "wrapped_data": b64(sealed), "iv": b64(bytes(12)), "wrap_type": "A256GCM"})
    read = read_packet(packet.encode())
    assert (read.style, read.path, read.wrapped_data) == ("coco", PATH, sealed)
    assert plain(read.open(KEK)) == OPTIONS


def test_known_answer_of_a_verdictd_packet() -> None:
    sealed = AESGCM(bytes(range(32))).encrypt(bytes(12), OPTIONS, None)
    packet = {"kid": "images", "wrapped_data": list(sealed), "iv": [0] * 12, "algorithm": "AES", "key_length": 256}
    read = read_packet(json.dumps(packet).encode())
    assert (read.style, read.path) == ("verdictd", PATH)
    assert plain(read.open(KEK)) == OPTIONS
    assert read.encode() == json.dumps(packet, separators=(",", ":")).encode()


def test_members_of_the_forms() -> None:
    packet = wrap_options(PATH, KEK, Secret(OPTIONS))
    assert list(json.loads(packet.encode())) == ["kid", "wrapped_data", "iv", "wrap_type"]
    assert json.loads(packet.encode())["kid"] == "kbs:///default/key/images"
    packet = wrap_options(PATH, KEK, Secret(OPTIONS), "coco-v2")
    assert json.loads(packet.encode())["version"] == "0.1.0"
    packet = wrap_options(ResourcePath.parse("a/b/c"), KEK, Secret(OPTIONS), "verdictd")
    assert json.loads(packet.encode())["kid"] == "a/b/c"
    assert wrap_options(PATH, KEK, Secret(OPTIONS)).iv != packet.iv


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["coco", "coco-v2", "verdictd"]))
def test_every_form_comes_back_bit_for_bit(options: bytes, style: Any) -> None:
    packet = wrap_options(PATH, KEK, Secret(options), style)
    read = read_packet(packet.encode())
    assert read == packet
    assert plain(read.open(KEK)) == options


def test_the_shortest_v2_packet() -> None:
    sealed = AESGCM(bytes(range(32))).encrypt(bytes(12), b"x", None)
    packet = {"provider": "kbs", "kid": PATH.uri, "wrapped_data": b64(sealed), "iv": b64(bytes(12)), "wrap_type": "A256GCM"}
    assert plain(read_packet(json.dumps(packet).encode()).open(KEK)) == b"x"


def test_counter_mode_opens_on_demand_only() -> None:
    counter = bytes(range(16))
    encryptor = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(counter)).encryptor()
    sealed = encryptor.update(OPTIONS) + encryptor.finalize()
    packet = {"kid": PATH.uri, "wrapped_data": b64(sealed), "iv": b64(counter), "wrap_type": "A256CTR"}
    read = read_packet(json.dumps(packet).encode())
    with pytest.raises(RequestError, match="not authenticated"):
        read.open(KEK)
    assert plain(read.open(KEK, allow_unauthenticated=True)) == OPTIONS


def test_every_flipped_bit_is_noticed() -> None:
    packet = wrap_options(PATH, KEK, Secret(b"options"))
    for index in range(len(packet.wrapped_data)):
        wrapped = bytearray(packet.wrapped_data)
        wrapped[index] ^= 1 << index % 8
        with pytest.raises(AuthenticationError):
            AnnotationPacket("coco", PATH, bytes(wrapped), packet.iv).open(KEK)
    with pytest.raises(AuthenticationError):
        AnnotationPacket("coco", PATH, packet.wrapped_data, bytes(12)).open(KEK)
    with pytest.raises(AuthenticationError):
        packet.open(Secret(bytes(32)))


@pytest.mark.parametrize("length", [1, 16, 31, 33])
def test_a_key_of_another_length(length: int) -> None:
    kek = Secret(bytes(length))
    with pytest.raises(RequestError, match=f"{length} bytes; expected 32"):
        wrap_options(PATH, kek, Secret(b"x"))
    with pytest.raises(RequestError, match=f"{length} bytes; expected 32"):
        wrap_options(PATH, KEK, Secret(b"x")).open(kek)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kid": None}, "kid"), ({"kid": ["a"]}, "kid"), ({"kid": "../x"}, "resource path"),
        ({"kid": "kbs:///a/b"}, "resource path"),
        ({"wrap_type": "A128GCM"}, "wrap_type"), ({"wrap_type": None}, "wrap_type"), ({"wrap_type": ["A256GCM"]}, "wrap_type"),
        ({"iv": b64(bytes(11))}, "11 bytes; expected 12"), ({"iv": b64(bytes(16))}, "expected"), ({"iv": None}, "missing"),
        ({"wrap_type": "A256CTR"}, "12 bytes; expected 16"),
        ({"wrapped_data": b64(bytes(16))}, "16 bytes; expected 17"), ({"wrapped_data": ""}, "expected 17"),
        ({"wrapped_data": "A" * 200000}, "at most"),
        ({"version": "0.2.0"}, "version and provider"), ({"provider": "aliyun"}, "version and provider"),
        ({"algorithm": "AES", "key_length": 128}, "expected AES and 256"), ({"algorithm": "DES"}, "expected AES and 256"),
        ({"algorithm": ["AES"]}, "expected AES and 256"),
    ],
)  # fmt: skip
def test_wrong_packets(change: dict[str, Any], message: str) -> None:
    packet: dict[str, Any] = {"kid": "images", "wrapped_data": b64(bytes(20)), "iv": b64(bytes(12)), "wrap_type": "A256GCM"}
    read_packet(json.dumps(packet).encode())
    packet = {name: value for name, value in (packet | change).items() if value is not None}
    with pytest.raises(RequestError, match=message):
        read_packet(json.dumps(packet).encode())


NAMES = st.sampled_from(
    [
        "op", "keywrapparams", "keyunwrapparams", "annotation", "optsdata", "ec", "Parameters", "kid", "iv", "wrapped_data",
        "wrap_type", "algorithm", "version", "key_length", "keywrapresults", "keyunwrapresults",
    ]
)  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
        max_leaves=20,
    )
)
def test_hostile_json(value: Any) -> None:
    data = json.dumps(value).encode()
    for read in (read_packet, read_wrap_request, read_unwrap_request, read_wrap_reply, read_unwrap_reply):
        try:
            read(data)
        except RequestError as error:
            assert len(str(error)) < 600  # noqa: PT017
