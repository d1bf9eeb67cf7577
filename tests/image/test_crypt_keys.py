"""Key wrappers: KEKs from files and brokers, providers over gRPC and as commands, JWE."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from broker.grpc_broker import GrpcBroker
from broker.simulated_guest import SimulatedMachine
from broker.test_end_to_end import Running
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image.layers import PRIVATE, PUBLIC, Described, described
from jwcrypto import jwe, jwk

from csvfast.broker.clients.kbs import KbsClient
from csvfast.broker.clients.verdictd import VerdictdClient
from csvfast.broker.keyprovider.messages import AnnotationPacket, read_packet, wrap_options
from csvfast.broker.model import ResourcePath
from csvfast.broker.verdictd.protocol import Blob
from csvfast.crypto import Secret
from csvfast.errors import (
    AuthenticationError,
    CsvfastError,
    DeniedError,
    ImageError,
    RequestError,
    StateError,
    UnavailableError,
)
from csvfast.image.annotations import KEYS, PUBLIC_OPTIONS, Packet, check_scheme, encrypted_annotations, packets_of
from csvfast.image.jwe_reader import JweKey, open_jwe
from csvfast.image.keys import Recipient, unwrap_any, wrap_all
from csvfast.image.options import PrivateOptions, PublicOptions
from csvfast.image.providers import CommandProvider, GrpcProvider, make_provider, read_configuration
from csvfast.image.wrappers import KbsKeks, LocalKek, VerdictdDecrypt, VerdictdKeks, parameters_of

KEK = bytes(range(40, 72))
PATH = ResourcePath.parse("default/key/images")
OPTIONS = Secret(PRIVATE)


def plain(secret: Secret) -> bytes:
    return bytes(memoryview(secret))


def layer(*packets: Packet) -> Any:
    """A descriptor whose key is wrapped like this."""
    return Described("sha256:" + "a" * 64, 20, encrypted_annotations({}, PUBLIC, packets))


# ---- KEKs


@pytest.mark.parametrize("style", ["coco", "coco-v2", "verdictd"])
@pytest.mark.parametrize("path", ["default/key/images", "team/kek/one"])
def test_a_local_key(style: Any, path: str) -> None:
    key = LocalKek(Secret(KEK), path, style=style)
    packet = key.wrap(OPTIONS)
    read = read_packet(packet)
    assert (read.style, str(read.path)) == (style, path)
    assert plain(read.open(Secret(KEK))) == PRIVATE
    assert plain(key.unwrap(packet)) == PRIVATE
    assert key.wrap(OPTIONS) != packet
    assert [key.opens(one) for one in ("provider.attestation-agent", "provider.x", "jwe", "pgp")] == [True, True, False, False]


def test_parameters_choose_name_and_form() -> None:
    key = LocalKek(Secret(KEK), "images")
    for parameters, style in (("", "coco"), ("images", "coco"), ("keyid=kbs:///default/key/images::packet=verdictd", "verdictd")):
        packet = key.wrap(OPTIONS, parameters)
        assert read_packet(packet).style == style
        assert read_packet(key.wrap(OPTIONS, parameters_of(packet))).style == style
    for parameters in ("other", "keyid=images::keypath=/etc/shadow", "../x"):
        with pytest.raises(RequestError):
            key.wrap(OPTIONS, parameters)


def test_a_key_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "images.key"
    path.write_bytes(KEK)
    path.chmod(0o600)
    assert plain(LocalKek.from_file(path).unwrap(LocalKek(Secret(KEK), "images").wrap(OPTIONS))) == PRIVATE
    assert LocalKek.from_file(path, "team/kek/one").name == "KEK team/kek/one"
    path.chmod(0o644)
    with pytest.raises(StateError, match="0644"):
        LocalKek.from_file(path)
    path.chmod(0o600)
    for content in (b"", KEK[:-1], KEK + b"\n"):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=f"{len(content)} bytes; expected 32"):
            LocalKek.from_file(path)
    with pytest.raises(StateError):
        LocalKek.from_file(tmp_path / "missing")
    with pytest.raises(ImageError, match="16 bytes"):
        LocalKek(Secret(bytes(16)), "x")


def test_a_closed_key_is_gone() -> None:
    with LocalKek(Secret(KEK), "images") as key:
        packet = key.wrap(OPTIONS)
    with pytest.raises(CsvfastError):
        key.unwrap(packet)


def test_unauthenticated_packets_stay_closed() -> None:
    packet = AnnotationPacket("coco", PATH, PRIVATE, bytes(16), "A256CTR").encode()
    keys = FakeBroker()
    for wrapper in (LocalKek(Secret(KEK), "images"), KbsKeks(keys), VerdictdKeks(keys), VerdictdDecrypt(keys)):
        with pytest.raises(RequestError, match="not authenticated"):
            wrapper.unwrap(packet)
    assert "decrypt" not in keys.asked


class FakeBroker:
    """Clients of both brokers: what they ask for, and one key."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.kek = KEK

    def get_resource(self, path: ResourcePath) -> Secret:
        self.asked.append(path)
        return Secret(self.kek)

    def get_kek(self, kid: str) -> Secret:
        self.asked.append(kid)
        return Secret(self.kek)

    def decrypt(self, blobs: Sequence[Blob]) -> list[Secret]:
        self.asked += ["decrypt", *blobs]
        return [Secret(PRIVATE)]


def test_what_brokers_are_asked() -> None:
    broker = FakeBroker()
    ours, theirs = (wrap_options(path, Secret(KEK), OPTIONS) for path in (PATH, ResourcePath.parse("a/b/c")))
    kbs, keks = KbsKeks(broker), VerdictdKeks(broker)
    for packet in (ours, theirs, ours, theirs):
        for wrapper in (kbs, keks):
            assert plain(wrapper.unwrap(packet.encode())) == PRIVATE
    assert broker.asked == [PATH, "images", ("a", "b", "c"), "a/b/c"]  # each key once
    broker.asked.clear()
    VerdictdDecrypt(broker).unwrap(ours.encode())
    _, blob = broker.asked
    assert blob == Blob("images", base64.b64encode(ours.wrapped_data).decode(), "AES", 256, base64.b64encode(ours.iv).decode())
    assert read_packet(keks.wrap(OPTIONS, "x")).style == "verdictd"
    assert read_packet(kbs.wrap(OPTIONS, "x")).style == "coco"
    with pytest.raises(ImageError, match="no key id"):
        kbs.wrap(OPTIONS)
    with pytest.raises(ImageError, match="decrypts only"):
        VerdictdDecrypt(broker).wrap(OPTIONS)


def test_a_key_that_is_rotated_meanwhile_is_asked_for_again() -> None:
    broker = FakeBroker()
    with KbsKeks(broker) as wrapper:
        packet = wrap_options(PATH, Secret(KEK), OPTIONS).encode()
        wrapper.unwrap(packet)
        broker.kek = bytes(32)
        newer = wrap_options(PATH, Secret(broker.kek), OPTIONS).encode()
        assert plain(wrapper.unwrap(newer)) == PRIVATE
        assert broker.asked == [PATH, PATH]
        with pytest.raises(AuthenticationError):
            wrapper.unwrap(packet)
        assert broker.asked == [PATH] * 3
        kept = list(wrapper._kept.values())
    assert all("wiped" in repr(one) for one in kept)


def test_real_brokers_after_attestation(tmp_path: Path) -> None:
    firmware = tmp_path / "firmware"
    firmware.write_bytes(bytes(range(256)) * 256)
    directory = tmp_path / "broker"
    directory.mkdir()
    with SimulatedMachine() as machine:
        guest = machine.launch(firmware)
        running = Running(directory, machine.chip.root.encoded, guest.measure, "certificate")
        try:
            doors = running.doors
            with GrpcProvider("attestation-agent", doors["keyprovider"]) as owner:
                packets = wrap_all(OPTIONS, [Recipient(owner, "keyid=disk::packet=verdictd"), Recipient(owner, "disk")], "layer")
            wrapped = layer(*packets)
            host, port = doors["verdictd"].rsplit(":", 1)
            with VerdictdClient((host, int(port)), guest) as verdictd:
                assert plain(unwrap_any(wrapped, [VerdictdDecrypt(verdictd)])) == PRIVATE
                with VerdictdKeks(verdictd) as keks:
                    assert [plain(keks.unwrap(packet.data)) for packet in packets] == [PRIVATE] * 2
            with KbsClient(f"http://{doors['kbs']}", guest) as client, KbsKeks(client) as resources:
                assert plain(unwrap_any(wrapped, [resources])) == PRIVATE
            # A guest that was launched with something else gets nothing, and the reason comes along.
            firmware.write_bytes(bytes(65536))
            other = machine.launch(firmware)
            with (
                KbsClient(f"http://{doors['kbs']}", other, sleep=lambda _seconds: None) as client,
                pytest.raises(ImageError, match=r"packet 1 .*packet 2 .*by KBS") as caught,
            ):
                unwrap_any(wrapped, [KbsKeks(client)])
            assert isinstance(caught.value.__cause__, ExceptionGroup)
            assert all(isinstance(one, DeniedError) for one in caught.value.__cause__.exceptions)
        finally:
            running.close()


# ---- Providers


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GrpcBroker]:
    directory = tmp_path / "broker"
    directory.mkdir()
    with GrpcBroker(directory) as made:
        made.put_key()
        yield made


def test_a_provider_over_grpc(broker: GrpcBroker) -> None:
    address = broker.serve_keys("unix:run/keys.sock")
    for written in (address, address.replace("unix:", "unix://")):
        with GrpcProvider("attestation-agent", written, "images") as provider:
            packet = provider.wrap(OPTIONS)
            assert str(read_packet(packet).path) == "default/key/images"
            assert read_packet(provider.wrap(OPTIONS, "packet=verdictd::keyid=images")).style == "verdictd"
            assert plain(provider.unwrap(packet)) == PRIVATE
            assert provider.opens("provider.attestation-agent")
            assert not provider.opens("provider.other")
    broker.stop_servers()
    with GrpcProvider("attestation-agent", address, timeout=5) as provider, pytest.raises(UnavailableError):
        provider.unwrap(packet)


PROVIDER = """
import base64, json, sys
request = json.load(sys.stdin)
if request["op"] == "keywrap":
    wrap = request["keywrapparams"]
    said = base64.b64decode(wrap["ec"]["Parameters"]["cmd"][0]).decode()
    packet = json.dumps([said, wrap["optsdata"]]).encode()
    print(json.dumps({"keywrapresults": {"annotation": base64.b64encode(packet).decode()}}))
else:
    packet = json.loads(base64.b64decode(request["keyunwrapparams"]["annotation"]))
    print(json.dumps({"keyunwrapresults": {"optsdata": list(base64.b64decode(packet[1]))}}))
"""


def command(tmp_path: Path, text: str, **options: Any) -> CommandProvider:
    path = tmp_path / "provider.py"
    path.write_text(text)
    return CommandProvider("cmd", sys.executable, [str(path)], "its parameters", **options)


def test_a_provider_that_is_a_command(tmp_path: Path) -> None:
    provider = command(tmp_path, PROVIDER)
    packet = provider.wrap(OPTIONS)
    assert json.loads(packet)[0] == "its parameters"
    assert plain(provider.unwrap(packet)) == PRIVATE


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import sys; sys.exit('there is no key')", "status 1: there is no key"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "status -9"),
        ("print('{}')", "keyunwrapresults is missing"),
        ("print('nothing')", "no JSON"),
        ("print()\nprint('x' * (5 << 20))", "more than 4194304 bytes"),
        ("import sys; sys.stderr.write('x' * (1 << 20)); sys.exit(3)", "status 3: x"),
        (r"import sys; sys.exit('\x1b[31mred\x9b')", r"status 1: \[31mred$"),
        ("import time; time.sleep(60)", "did not answer within 1 seconds"),
        ("import os, time; os.close(1); time.sleep(60)", "did not answer within 1 seconds"),
        ("import os, time; os.fork() or time.sleep(60)", "did not answer within 1 seconds"),  # a child holds the output
        ("import os, time; os.fork() or [os.setsid(), time.sleep(3)]", "did not answer within 1 seconds"),
    ],
)
def test_commands_that_fail(tmp_path: Path, text: str, problem: str) -> None:
    timeout = 1.0 if "sleep" in text else 30.0
    begun = time.monotonic()
    with pytest.raises(CsvfastError, match=problem):
        command(tmp_path, text, timeout=timeout).unwrap(b"x" * 100_000)
    assert time.monotonic() - begun < 20 + timeout


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    provider = CommandProvider("cmd", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        provider.unwrap(b"x")
    with pytest.raises(ImageError, match=r"packet 1 .*by provider cmd: .*missing"):
        unwrap_any(layer(Packet("provider.cmd", b"x")), [provider])


def test_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ocicrypt.json"
    path.write_text(
        json.dumps({"key-providers": {"a": {"grpc": "unix:///run/x.sock"}, "b": {"cmd": {"path": "/bin/b", "args": ["c"]}}}})
    )
    monkeypatch.setenv("OCICRYPT_KEYPROVIDER_CONFIG", str(path))
    found = read_configuration()
    assert found == read_configuration(path)
    with make_provider("a", found["a"]) as provider:
        assert isinstance(provider, GrpcProvider)
    made = make_provider("b", found["b"], "parameters")
    assert isinstance(made, CommandProvider)
    assert made._command == ["/bin/b", "c"]
    assert made.scheme == "provider.b"
    monkeypatch.delenv("OCICRYPT_KEYPROVIDER_CONFIG")
    with pytest.raises(ImageError, match="expected OCICRYPT_KEYPROVIDER_CONFIG"):
        read_configuration()
    with pytest.raises(FileNotFoundError):
        read_configuration(tmp_path / "missing")
    for text in ("[]", "{", '{"key-providers": []}', '{"key-providers": {"a": "x"}}'):
        path.write_text(text)
        with pytest.raises(ImageError):
            read_configuration(path)
    for attributes in ({}, {"ttrpc": "x"}, {"grpc": 5}, {"cmd": {"path": ""}}, {"cmd": {"path": "/x", "args": "y"}},
                       {"grpc": "h:1", "grpc-tls": {}}):  # fmt: skip
        with pytest.raises(ImageError, match="key provider 'a'"):
            make_provider("a", attributes)
    with pytest.raises(ImageError, match="expected provider"):
        make_provider("a,b", {"cmd": {"path": "/x"}})


# ---- JWE


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def jwe_for(*keys: Any, algorithm: str | None = None) -> bytes:
    """As go-jose's NewMultiEncrypter writes it: alg in each recipient's header."""
    made = jwe.JWE(PRIVATE, json.dumps({"enc": "A256GCM"}))
    for key in keys:
        alg = algorithm or ("RSA-OAEP" if isinstance(key, rsa.RSAPrivateKey) else "ECDH-ES+A256KW")
        made.add_recipient(jwk.JWK.from_pyca(key.public_key()), json.dumps({"alg": alg}))
    return made.serialize().encode()  # type: ignore[no-any-return]


def test_jwe_of_one_and_of_several(rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey) -> None:
    assert "recipients" not in json.loads(jwe_for(rsa_key))
    assert "recipients" in json.loads(jwe_for(rsa_key, ec_key))
    for key in (rsa_key, ec_key):
        assert plain(open_jwe(key, jwe_for(key))) == PRIVATE
        assert plain(open_jwe(key, jwe_for(rsa_key, ec_key))) == PRIVATE
    assert plain(open_jwe(rsa_key, jwe_for(rsa_key, algorithm="RSA-OAEP-256"))) == PRIVATE
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        other = ec.generate_private_key(curve)
        assert plain(open_jwe(other, jwe_for(other))) == PRIVATE
        with pytest.raises(AuthenticationError, match="for none of its recipients"):
            open_jwe(other, jwe_for(ec_key))


def test_jwe_with_all_in_the_protected_header(rsa_key: rsa.RSAPrivateKey) -> None:
    made = jwe.JWE(PRIVATE, json.dumps({"alg": "RSA-OAEP", "enc": "A256GCM"}), recipient=jwk.JWK.from_pyca(rsa_key.public_key()))
    assert plain(open_jwe(rsa_key, made.serialize().encode())) == PRIVATE


def test_a_layer_for_jwe(rsa_key: rsa.RSAPrivateKey) -> None:
    wrapped = layer(Packet("jwe", jwe_for(rsa_key)))
    assert f"{KEYS}jwe" in wrapped.annotations
    assert plain(unwrap_any(wrapped, [LocalKek(Secret(KEK), "images"), JweKey(rsa_key)])) == PRIVATE
    with pytest.raises(ImageError, match="reads only"):
        JweKey(rsa_key).wrap(OPTIONS)


@pytest.mark.parametrize("name", ["protected", "encrypted_key", "iv", "ciphertext", "tag"])
def test_a_changed_jwe(rsa_key: rsa.RSAPrivateKey, name: str) -> None:
    document = json.loads(jwe_for(rsa_key))
    data = bytearray(base64.urlsafe_b64decode(document[name] + "=="))
    if name == "protected":
        data += b" "
    else:
        data[5] ^= 1
    document[name] = base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    with pytest.raises(AuthenticationError):
        open_jwe(rsa_key, json.dumps(document).encode())
    for wrong in (None, 5, "%", "AA=="):
        with pytest.raises(RequestError):
            open_jwe(rsa_key, json.dumps(document | {name: wrong}).encode())


@pytest.mark.parametrize(
    "members",
    [
        {"recipients": []},
        {"recipients": [{}] * 65},
        {"recipients": ["x"]},
        {"header": {"alg": "RSA-OAEP", "crit": ["x"]}},
        {"header": {"alg": "RSA-OAEP", "zip": "DEF"}},
        {"header": {"alg": "RSA-OAEP", "enc": "A128GCM"}},
        {"protected": ""},
        {"ciphertext": ""},
    ],
)
def test_no_such_jwe(rsa_key: rsa.RSAPrivateKey, members: dict[str, Any]) -> None:
    with pytest.raises((RequestError, AuthenticationError)):
        open_jwe(rsa_key, json.dumps(json.loads(jwe_for(rsa_key)) | members).encode())


@pytest.mark.parametrize("algorithm", ["RSA1_5", "dir", None, ["RSA-OAEP"]])
def test_other_algorithms(rsa_key: rsa.RSAPrivateKey, algorithm: Any) -> None:
    document = json.loads(jwe_for(rsa_key)) | {"header": {"alg": algorithm}}
    with pytest.raises(AuthenticationError, match="none of its recipients"):
        open_jwe(rsa_key, json.dumps(document).encode())


def test_jwe_keys_in_files(tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey) -> None:
    path = tmp_path / "private.pem"
    pem, der = serialization.Encoding.PEM, serialization.Encoding.DER
    pkcs8, clear = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    for key, encoding, protection, password in (
        (rsa_key, pem, clear, None),
        (ec_key, der, clear, None),
        (ec_key, pem, serialization.BestAvailableEncryption(b"pass"), Secret(b"pass")),
    ):
        path.write_bytes(key.private_bytes(encoding, pkcs8, protection))
        path.chmod(0o600)
        assert plain(JweKey.from_file(path, password).unwrap(jwe_for(key))) == PRIVATE
    with pytest.raises(ImageError, match="no private key"):
        JweKey.from_file(path)
    path.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, clear))
    with pytest.raises(ImageError, match="expected RSA or an elliptic curve"):
        JweKey.from_file(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ImageError, match="no private key"):
        JweKey.from_file(path)
    path.chmod(stat.S_IRUSR | stat.S_IRGRP)
    with pytest.raises(StateError):
        JweKey.from_file(path)
    assert os.access(path, os.R_OK)


# ---- Annotations


def test_annotations_of_packets() -> None:
    packets = [Packet("provider.a", b"1"), Packet("jwe", b"2"), Packet("provider.a", b"3")]
    made = encrypted_annotations({"org.example": "x", f"{KEYS}pgp": "old"}, PUBLIC, packets)
    assert made["org.example"] == "x"
    assert made[f"{KEYS}provider.a"] == "MQ==,Mw=="
    assert f"{KEYS}pgp" not in made
    assert packets_of(described(b"").__class__("sha256:" + "0" * 64, 0, made)) == (packets[0], packets[2], packets[1])
    with pytest.raises(ImageError, match="no recipient"):
        encrypted_annotations({}, PUBLIC, [])
    for scheme in ("", "provider.", "provider.a b", "provider.a\n", "other", "JWE"):
        with pytest.raises(ImageError, match="expected provider"):
            check_scheme(scheme)


# ---- Whatever a registry or a provider says


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["AAAA", "sha256:" + "0" * 64, "A256GCM"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["cipher", "hmac", "symkey", "digest", "cipheroptions", "nonce", "protected", "recipients", "header",
                         "iv", "tag", "ciphertext", "encrypted_key", "alg", "enc", "epk", "unprotected", "aad"]),
        inner, max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_JSON)
def test_strange_documents_are_refused_in_order(
    rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey, value: Any
) -> None:
    data = json.dumps(value).encode()
    for read in (
        lambda: PublicOptions.parse(data, "layer"),
        lambda: PrivateOptions.parse(Secret(data), "layer"),
        lambda: open_jwe(rsa_key, data),
        lambda: open_jwe(ec_key, data),
        lambda: LocalKek(Secret(KEK), "images").unwrap(data),
    ):
        with contextlib.suppress(CsvfastError):
            read()


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=12), text=st.text(max_size=40) | st.binary(max_size=30).map(base64.b64encode).map(bytes.decode))
def test_strange_annotations_are_refused_in_order(name: str, text: str) -> None:
    for annotation in (f"{KEYS}{name}", f"{KEYS}provider.{name}"):
        strange: Any = Described("sha256:" + "a" * 64, 20, {annotation: text, PUBLIC_OPTIONS: base64.b64encode(PUBLIC).decode()})
        with contextlib.suppress(CsvfastError):
            unwrap_any(strange, [LocalKek(Secret(KEK), "images")])


def test_nothing_unprintable_of_a_manifest_in_errors() -> None:
    """Terminals and logs take orders from control characters."""
    public = {PUBLIC_OPTIONS: base64.b64encode(PUBLIC).decode()}
    for name, text in (("provider.\x1b[2J\n\u202e", "AAAA"), ("provider.\x1b[2J\n", "!"), ("\x1b[2J", "AAAA")):
        strange: Any = Described("sha256:" + "a" * 64, 20, {f"{KEYS}{name}": text, **public})
        with pytest.raises(ImageError) as caught:
            unwrap_any(strange, [LocalKek(Secret(KEK), "images")])
        assert str(caught.value).isprintable()
        assert "x1b" in str(caught.value)
