"""Verdictd's messages: where they end, what they ask for, what replies look like byte by byte."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.clients.verdictd_steps import Ask, Replies
from csvfast.broker.verdictd.protocol import (
    BLOB_BYTES,
    NAMED_RESOURCES,
    Attest,
    Blob,
    Challenge,
    Decrypt,
    Echo,
    GetKek,
    GetResource,
    GetResourceInfo,
    JsonFrames,
    Version,
    base64_reply,
    base64_size,
    check_blob,
    data_failure,
    ends_unseen,
    failure,
    json_reply,
    open_blob,
    read_request,
    resource_path,
)
from csvfast.crypto import Secret
from csvfast.errors import AttestedTlsError, AuthenticationError, RequestError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)
BLANKS = st.text(" \t\r\n", max_size=4).map(str.encode)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def drain(frames: JsonFrames) -> list[bytes]:
    found = []
    while (message := frames.take()) is not None:
        found.append(message)
    return found


# ---- Where messages end


@given(st.lists(st.tuples(OBJECTS, BLANKS, st.booleans()), max_size=5), st.lists(st.integers(0, 10**6), max_size=12))
def test_messages_however_they_are_cut(messages: list[tuple[Any, bytes, bool]], places: list[int]) -> None:
    encoded = [json.dumps(document, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for document, _, escaped in messages]
    stream = b"".join(text + blanks for text, (_, blanks, _) in zip(encoded, messages, strict=True))
    frames = JsonFrames(1 << 20)
    found = []
    for piece in cut(stream, places):
        frames.feed(piece)
        found += drain(frames)
    assert found == encoded
    assert frames.is_empty


@pytest.mark.parametrize(
    "text",
    [
        rb'{"a":"}"}', rb'{"a":"\"}"}', rb'{"a":"\\"}', rb'{"a":"\\\"}{"}', rb'{"\u0022":"\u007d"}', b'{"a":[{},[[]]]}', b"{}",
        '{"a":"\N{GRINNING FACE}"}'.encode(),
    ],
)  # fmt: skip
def test_brackets_and_quotes_in_strings(text: bytes) -> None:
    for pieces in ([text], [bytes([one]) for one in text]):
        frames = JsonFrames()
        for piece in pieces[:-1]:
            frames.feed(piece)
            assert frames.take() is None
            assert not frames.is_empty
        frames.feed(pieces[-1])
        assert frames.take() == text
        assert frames.take() is None


@pytest.mark.parametrize("start", [b"[", b"x", b'"', b"1", b"\0", b"\xef\xbb\xbf{", b"null", b"}"])
def test_what_begins_otherwise_is_refused_at_once(start: bytes) -> None:
    frames = JsonFrames()
    frames.feed(b" \n" + start)
    with pytest.raises(RequestError, match="JSON object"):
        frames.take()


def test_longer_than_allowed() -> None:
    frames = JsonFrames(16)
    frames.feed(b'{"a":"12345678"}')
    assert frames.take() == b'{"a":"12345678"}'
    frames.feed(b'{"a":"123456789"}')
    with pytest.raises(RequestError, match="16 bytes"):
        frames.take()
    frames = JsonFrames(16)
    frames.feed(b'{"a":"1234567890')
    assert frames.take() is None
    frames.feed(b"1")
    with pytest.raises(RequestError, match="16 bytes"):
        frames.take()


def test_blanks_take_no_room() -> None:
    frames = JsonFrames(16)
    for _ in range(100):
        frames.feed(b" \r\n\t" * 100)
        assert frames.take() is None
        assert frames.is_empty
    frames.feed(b"{}")
    assert frames.take() == b"{}"


@pytest.mark.parametrize(
    "message",
    [
        b'{"a":"' + b"x" * 200_000 + b'"}',
        b'{"a":"' + b"\\\\" * 100_000 + b'"}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["text", "backslashes", "brackets"],
)
def test_byte_by_byte_is_not_quadratic(message: bytes) -> None:
    frames = JsonFrames(1 << 20)
    before = time.process_time()
    for index in range(len(message) - 1):
        frames.feed(message[index : index + 1])
        assert frames.take() is None
    frames.feed(message[-1:])
    assert frames.take() == message
    assert time.process_time() - before < 5  # a second or less; by re-reading it would be minutes


def test_many_messages_in_one_read_are_not_quadratic() -> None:
    frames = JsonFrames(64)
    frames.feed(b'{"command":"version"}\n' * 100_000)
    before = time.process_time()
    assert len(drain(frames)) == 100_000
    assert time.process_time() - before < 5


# ---- Requests


def encoded(**document: Any) -> bytes:
    return json.dumps(document).encode()


BLOB = {"kid": "k", "encrypted_data": "AAAA", "algorithm": "AES", "key_length": 256, "iv": "AAAA"}

ACCEPTED: list[tuple[bytes, Any]] = [
    (b'{"command":"version"}', Version()),
    # As rats-tls' sample client sends it.
    (
        b'{ "command": "echo", "data": "Hello and welcome to RATS-TLS!\\n" }',
        Echo("Hello and welcome to RATS-TLS!\n"),
    ),
    (b'{"command":"Get KEK","kids":["1","default/key/2"]}', GetKek(("1", "default/key/2"))),
    (b'{"command":"Get KEK","kids":[]}', GetKek(())),
    (encoded(command="Decrypt", blobs=[BLOB]), Decrypt((Blob("k", "AAAA", "AES", 256, "AAAA"),))),
    (encoded(command="Get Policy", optional={}), GetResource("verdictd/image/policy")),
    (encoded(command="Get Policy", optional=None), GetResource("verdictd/image/policy")),
    (encoded(command="Get Policy"), GetResource("verdictd/image/policy")),
    (encoded(command="Get Sigstore Config", optional={}), GetResource("verdictd/image/sigstore")),
    (encoded(command="Get GPG Keyring", optional={"x": "y"}), GetResource("verdictd/image/gpg-keyring")),
    (encoded(command="Get Cosign Key", optional={}), GetResource("verdictd/image/cosign-key")),
    (encoded(command="Get Credential", optional={}), GetResource("verdictd/image/credential")),
    (encoded(command="Get Resource", optional={"resource_path": "a/b/c"}), GetResource("a/b/c")),
    (encoded(command="Get Resource Info", name="Cosign Key"), GetResourceInfo("verdictd/image/cosign-key")),
    (encoded(command="Get Resource Info", name="a/b/c"), GetResourceInfo("a/b/c")),
    (b'{"command":"Challenge"}', Challenge()),
    (b'{"command":"Attest","evidence":"AAAA"}', Attest({"command": "Attest", "evidence": "AAAA"})),
    (b'{"command":"version","more":[1,{"of":"it"}]}', Version()),
]


@pytest.mark.parametrize(("data", "request_"), ACCEPTED)
def test_requests(data: bytes, request_: Any) -> None:
    found = read_request(data)
    assert found == request_
    assert type(found) is type(request_)


@pytest.mark.parametrize(
    "data",
    [
        b"{}", b'{"command":null}', b'{"command":"Version"}', b'{"command":"get kek","kids":[]}', b'{"command":"Get"}',
        b'{"command":""}',
        b'{"command":"version","command":"version"}', b"{'command':'version'}", b'{"command":"version"', b'{"command":"version"]',
        b'{"command":"echo"}', b'{"command":"echo","data":1}', b'{"command":"Get KEK"}', b'{"command":"Get KEK","kids":"k"}',
        b'{"command":"Get KEK","kids":["k",1]}', b'{"command":"Get KEK","kids":null}', b'{"command":"Decrypt","blobs":{}}',
        b'{"command":"Decrypt","blobs":[[]]}', encoded(command="Decrypt", blobs=[{**BLOB, "key_length": "256"}]),
        encoded(command="Decrypt", blobs=[{**BLOB, "key_length": True}]),
        encoded(command="Decrypt", blobs=[{**BLOB, "iv": None}]),
        encoded(command="Decrypt", blobs=[{name: value for name, value in BLOB.items() if name != "kid"}]),
        b'{"command":"Get Policy","optional":[]}', b'{"command":"Get Resource"}', b'{"command":"Get Resource","optional":{}}',
        b'{"command":"Get Resource","optional":{"resource_path":["a","b","c"]}}', b'{"command":"Get Resource Info"}',
        b'{"command":"Get Resource Info","name":{}}', b'["command","version"]', b'{"command":"version","x":"\xff"}',
        b'{"command":"version","x":' + b"[" * 40 + b"]" * 40 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_request(data: bytes) -> None:
    with pytest.raises(RequestError):
        read_request(data)


def test_errors_do_not_repeat_what_came() -> None:
    for data in (b'{"command":"s3cret"}', b'{"command":"Get KEK","kids":[{"s3cret":1}]}', b'{"command":"echo","s3cret":1}'):
        with pytest.raises(RequestError) as refusal:
            read_request(data)
        assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("text", ["a/b/c", "/a/b/c", "kbs:///a/b/c", "kbs://host:1/a/b/c"])
def test_paths(text: str) -> None:
    assert str(resource_path(text)) == "a/b/c"


@pytest.mark.parametrize(
    "text", ["", "a", "a/b", "a/b/c/d", "../../etc", "a/../c", "//a/b/c", "kbs:///a/b", "a/b/c?x", "a/b/c\n"]
)
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(RequestError):
        resource_path(text)


# ---- Blobs

KEK = Secret(bytes(range(32)))
NONCE = bytes(range(12))


def blob(**changes: Any) -> Blob:
    sealed = AESGCM(bytes(range(32))).encrypt(NONCE, b"layer key", None)
    given = {"kid": "disk", "encrypted_data": sealed, "algorithm": "AES", "key_length": 256, "iv": NONCE} | changes
    texts = {name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in given.items()}
    return Blob(**texts)


def test_a_blob_known_beforehand() -> None:
    # NIST's GCM test case 14 of McGrew and Viega: zero key, zero nonce, sixteen zero bytes.
    text = base64.b64encode(bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18" "d0d1c8a799996bf0265b98b5d48ab919")).decode()
    opened = check_blob(Blob("k", text, "AES", 256, base64.b64encode(bytes(12)).decode()))
    assert open_blob(opened, Secret(bytes(32))) == bytes(16)


@pytest.mark.parametrize("algorithm", ["AES", "A256GCM"])
@pytest.mark.parametrize(("kid", "path"), [("disk", "default/key/disk"), ("a/b/c", "a/b/c"), ("kbs:///a/b/c", "a/b/c")])
def test_both_spellings_and_all_kid_forms(algorithm: str, kid: str, path: str) -> None:
    opened = check_blob(blob(algorithm=algorithm, kid=kid))
    assert str(opened.path) == path
    assert open_blob(opened, KEK) == b"layer key"


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "A256CTR"}, {"algorithm": "aes"}, {"key_length": 128}, {"iv": bytes(16)}, {"iv": b""}, {"iv": "x"},
        {"encrypted_data": bytes(16)}, {"encrypted_data": "%%%%"}, {"encrypted_data": bytes(BLOB_BYTES + 3)},
        {"kid": "../../etc/passwd"}, {"kid": ""}, {"kid": "a/b"}, {"encrypted_data": "\N{GRINNING FACE}" * 32},
    ],
)  # fmt: skip
def test_blobs_that_are_refused(changes: Any) -> None:
    with pytest.raises(RequestError):
        check_blob(blob(**changes))


def test_a_blob_of_another_key_or_altered() -> None:
    with pytest.raises(AuthenticationError):
        open_blob(check_blob(blob()), Secret(bytes(32)))
    sealed = bytearray(base64.b64decode(blob().encrypted_data))
    for index in (0, len(sealed) - 1):
        sealed[index] ^= 1
        with pytest.raises(AuthenticationError):
            open_blob(check_blob(blob(encrypted_data=bytes(sealed))), KEK)
        sealed[index] ^= 1
    with pytest.raises(AuthenticationError):
        open_blob(check_blob(blob(iv=bytes(12))), KEK)
    with pytest.raises(RequestError, match="16"):
        open_blob(check_blob(blob()), Secret(bytes(16)))


# ---- Replies


def test_replies_byte_by_byte() -> None:
    assert json_reply({"status": "OK", "version": "v1"}) == b'{"status":"OK","version":"v1"}'
    assert json_reply({"status": "OK", "data": {"k": "AAA="}}) == b'{"status":"OK","data":{"k":"AAA="}}'
    assert json_reply(data_failure("text")) == b'{"status":"Fail","data":{},"error":"text"}'
    assert json_reply(failure("text")) == b'{"status":"Fail","error":"text"}'
    assert base64_reply(Secret(b"\xff\xfe")) == b"//4="


@given(st.integers(0, 100_000))
def test_announced_sizes(length: int) -> None:
    assert base64_size(length) == len(base64.b64encode(bytes(length)))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_json_replies_never_end_where_a_read_does(times: int) -> None:
    room = times * 16384 - len(json_reply(failure("")))
    for change in (-1, 0, 1):
        reply = json_reply(failure("x" * (room + change)))
        assert len(reply) == times * 16384 + change + (change == 0)
        assert json.loads(reply)["error"] == "x" * (room + change)
    assert len(json_reply(failure("x" * room), pad=False)) == times * 16384


def test_base64_is_never_padded() -> None:
    reply = base64_reply(bytes(12288))
    assert len(reply) == 16384
    assert ends_unseen(reply)
    assert not ends_unseen(b"")
    assert not ends_unseen(reply[:-1])
    assert base64.b64decode(reply, validate=True) == bytes(12288)


def test_named_resources() -> None:
    assert {name: str(path) for name, path in NAMED_RESOURCES.items()} == {
        "Policy": "verdictd/image/policy",
        "Sigstore Config": "verdictd/image/sigstore",
        "GPG Keyring": "verdictd/image/gpg-keyring",
        "Cosign Key": "verdictd/image/cosign-key",
        "Credential": "verdictd/image/credential",
    }


# ---- The client's reading


def test_a_json_reply_in_pieces() -> None:
    replies = Replies(Ask(b""))
    assert replies.feed(b'{"status":') is None
    assert replies.feed(b'"OK"} ') == b'{"status":"OK"}'
    with pytest.raises(RequestError, match="more than one"):
        Replies(Ask(b"")).feed(b"{}{}")
    with pytest.raises(RequestError):
        Replies(Ask(b"")).feed(b"{} x")
    with pytest.raises(AttestedTlsError, match="closed"):
        Replies(Ask(b"")).feed(b"")


def test_a_base64_reply_of_the_announced_size() -> None:
    text = base64.b64encode(bytes(30000))
    replies = Replies(Ask(b"", len(text)))
    assert replies.feed(b" ") is None  # padding of the reply before
    assert replies.feed(text[:16384]) is None
    assert replies.feed(text[16384:16390]) is None  # a record that ends early is no end when the size is known
    assert replies.feed(text[16390:]) == text
    assert Replies(Ask(b"", 4)).feed(b"AAAABBBB") == b"AAAABBBB"  # for the caller to refuse
    with pytest.raises(AttestedTlsError, match="closed"):
        Replies(Ask(b"", 8)).feed(b"")


def test_a_failure_in_place_of_a_resource() -> None:
    text = base64_reply(json_reply(failure("not allowed (c0ffee)")))
    assert Replies(Ask(b"", 100_000)).feed(text) == text
    assert Replies(Ask(b"", 100_000)).feed(text[:-4]) is None


def test_an_echo_ends_with_the_connection() -> None:
    replies = Replies(Ask(b"", -1))
    assert replies.feed(b" any") is None
    assert replies.feed(b"thing") is None
    assert replies.feed(b"") == b" anything"
