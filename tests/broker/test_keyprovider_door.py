"""The key provider over gRPC: who may, what comes back, what is on record, and who does not get far."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from broker.grpc_broker import KEK, GrpcBroker
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from csvfast.broker import grpc_server
from csvfast.broker.administration import LOCAL, Administrator
from csvfast.broker.clients.keyprovider import ChannelTls, KeyProviderClient
from csvfast.broker.kbs.ear import TokenIssuer
from csvfast.broker.keyprovider.messages import read_packet, wrap_options
from csvfast.broker.limits import LimitsConfig
from csvfast.broker.model import ResourcePath
from csvfast.crypto import Secret
from csvfast.errors import (
    AuthenticationError,
    DeniedError,
    FormatError,
    LimitedError,
    RequestError,
    StateError,
    UnavailableError,
    UnknownError,
)

OPTIONS = b'{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","digest":"sha256:00","cipheroptions":{"nonce":"AA=="}}\xff\0'


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GrpcBroker]:
    with GrpcBroker(tmp_path) as made:
        yield made


def wrapped(broker: GrpcBroker, kek: bytes, path: ResourcePath = KEK) -> bytes:
    return wrap_options(path, Secret(kek), Secret(OPTIONS)).encode()


def plain(secret: Secret) -> bytes:
    return bytes(memoryview(secret))


# ---- The owner


def test_the_owner_wraps_and_unwraps_over_a_unix_socket(broker: GrpcBroker) -> None:
    kek = broker.put_key()
    address = broker.serve_keys("unix:run/keys.sock")
    path = Path(address.removeprefix("unix:"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with KeyProviderClient(address) as client:
        packet = client.wrap(Secret(OPTIONS), "images")
        read = json.loads(packet)
        assert read["kid"] == "kbs:///default/key/images"
        assert read["wrap_type"] == "A256GCM"
        assert plain(read_packet(packet).open(Secret(kek))) == OPTIONS
        assert plain(client.unwrap(packet)) == OPTIONS
        read = json.loads(client.wrap(Secret(OPTIONS), "keyid=images::packet=verdictd"))
        assert (read["kid"], read["algorithm"], read["key_length"]) == ("images", "AES", 256)
        sealed = AESGCM(kek).decrypt(bytes(read["iv"]), bytes(read["wrapped_data"]), None)
        assert sealed == OPTIONS
    uses = [record for record in broker.records(door="keyprovider") if record.outcome == "allowed"]
    assert [(record.actor, record.action, record.resource) for record in uses] == [("local", "read resource", str(KEK))] * 3
    broker.stop_servers()
    assert not path.exists()


def test_a_new_key_is_made_when_none_is_named(broker: GrpcBroker) -> None:
    address = broker.serve_keys(local_trust=True)
    with KeyProviderClient(address) as client:
        packets = [client.wrap(Secret(OPTIONS)) for _ in range(2)]
        paths = [read_packet(packet).path for packet in packets]
        assert paths[0] != paths[1]
        for packet, path in zip(packets, paths, strict=True):
            assert path[:2] == ("default", "key")
            found = broker.store.resource(path)
            assert found is not None
            assert len(found.content) == 32
            assert plain(client.unwrap(packet)) == OPTIONS


def test_keys_are_made_where_the_configuration_says_or_not_at_all(broker: GrpcBroker) -> None:
    here = broker.serve_keys(local_trust=True, options={"prefix": ("team", "kek"), "packets": "verdictd"})
    with KeyProviderClient(here) as client:
        assert json.loads(client.wrap(Secret(OPTIONS)))["kid"].startswith("team/kek/")
    nowhere = broker.serve_keys(local_trust=True, options={"create_keys": False})
    with KeyProviderClient(nowhere) as client, pytest.raises(RequestError, match="no key id"):
        client.wrap(Secret(OPTIONS))
    assert len(broker.store.list_resources()) == 1


def test_packets_of_every_form_open(broker: GrpcBroker) -> None:
    kek = broker.put_key()
    with KeyProviderClient(broker.serve_keys(local_trust=True)) as client:
        for style in ("coco", "coco-v2", "verdictd"):
            packet = wrap_options(KEK, Secret(kek), Secret(OPTIONS), style)  # type: ignore[arg-type]
            assert plain(client.unwrap(packet.encode(), "eaa_kbc::192.0.2.1:1122")) == OPTIONS


def test_a_key_that_is_not_there(broker: GrpcBroker) -> None:
    with KeyProviderClient(broker.serve_keys(local_trust=True)) as client:
        with pytest.raises(UnknownError, match="there is no resource default/key/missing"):
            client.wrap(Secret(OPTIONS), "missing")
        with pytest.raises(UnknownError, match="there is no resource"):
            client.unwrap(wrapped(broker, bytes(32)))
        broker.administration.put_resource(LOCAL, KEK, b"too short")
        with pytest.raises(RequestError, match="9 bytes; expected 32"):
            client.wrap(Secret(OPTIONS), "images")


def test_a_packet_of_another_key(broker: GrpcBroker) -> None:
    broker.put_key()
    with KeyProviderClient(broker.serve_keys(local_trust=True)) as client:
        with pytest.raises(RequestError, match="does not open with the key default/key/images"):
            client.unwrap(wrapped(broker, bytes(32)))
        with pytest.raises(RequestError, match="no JSON"):
            client.unwrap(b"{")


def test_packets_outlive_a_rotation_until_their_version_is_retired(broker: GrpcBroker) -> None:
    old = wrapped(broker, broker.put_key())
    second = wrapped(broker, broker.put_key())
    new = wrapped(broker, broker.put_key())
    with KeyProviderClient(broker.serve_keys(local_trust=True)) as client:
        assert [plain(client.unwrap(packet)) for packet in (old, second, new)] == [OPTIONS] * 3
        assert [record.resource_version for record in broker.records(action="read resource")] == [3, 2, 1, 3, 2, 3]
        broker.administration.retire_resource(LOCAL, KEK, 2)
        assert plain(client.unwrap(old)) == OPTIONS
        with pytest.raises(RequestError, match="does not open"):
            client.unwrap(second)


def test_a_guest_opens_packets_older_than_a_retired_version(broker: GrpcBroker) -> None:
    old = wrapped(broker, broker.put_key())
    second = wrapped(broker, broker.put_key())
    broker.put_key()
    broker.administration.retire_resource(LOCAL, KEK, 2)
    token, key = broker.guest_token()
    with KeyProviderClient(broker.serve_keys(), token=token, guest_key=key) as client:
        assert plain(client.unwrap(old)) == OPTIONS
        with pytest.raises(RequestError, match="does not open"):
            client.unwrap(second)


def test_counter_mode_is_refused(broker: GrpcBroker) -> None:
    broker.put_key()
    counter = "AAAAAAAAAAAAAAAAAAAAAA=="
    packet = json.dumps({"kid": KEK.uri, "wrapped_data": "AAAA", "iv": counter, "wrap_type": "A256CTR"}).encode()
    with KeyProviderClient(broker.serve_keys(local_trust=True)) as client, pytest.raises(RequestError, match="not authenticated"):
        client.unwrap(packet)
    assert not broker.records(action="read resource")
    address = broker.serve_keys(local_trust=True, options={"allow_unauthenticated": True})
    with KeyProviderClient(address) as client:
        assert len(client.unwrap(packet)) == 3


# ---- Administrators


def test_an_administrators_token(broker: GrpcBroker) -> None:
    broker.put_key()
    address = broker.serve_keys()
    with KeyProviderClient(address, token=broker.token("keys")) as client:
        assert plain(client.unwrap(client.wrap(Secret(OPTIONS), "images"))) == OPTIONS
    assert {record.actor for record in broker.records(action="read resource")} == {"test"}


@pytest.mark.parametrize("token", [None, "csvt_" + "A" * 43, "", "a.b.c", "x y", "csvt_\u00fc"])
def test_nobody_else(broker: GrpcBroker, token: str | None) -> None:
    broker.put_key()
    address = broker.serve_keys()
    metadata = () if token is None else (("authorization", f"Bearer {token}".encode("utf-8", "ignore").decode("latin-1")),)
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/keyprovider.KeyProviderService/WrapKey")
        if token is not None and not token.isascii():
            return  # gRPC's own client does not send it
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x0a\x02{}", metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    text = caught.value.details()
    correlation = dict(caught.value.trailing_metadata())["correlation"]
    denied = [record for record in broker.records(outcome="denied") if record.correlation in text]
    assert len(denied) == 1
    assert text == f"not authenticated ({denied[0].correlation})"
    assert len(correlation) == 16


def test_two_tokens_or_another_scheme(broker: GrpcBroker) -> None:
    token = broker.token("keys")
    with grpc.insecure_channel(broker.serve_keys()) as channel:
        call = channel.unary_unary("/keyprovider.KeyProviderService/WrapKey")
        for metadata in (
            (("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")),
            (("authorization", f"Basic {token}"),),
            (("authorization", token),),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", metadata=metadata, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_roles_and_scopes_hold(broker: GrpcBroker) -> None:
    broker.put_key()
    address = broker.serve_keys()
    for token in (broker.token("policy", name="a"), broker.token("keys", name="b", scope="other/*")):
        with KeyProviderClient(address, token=token) as client:
            with pytest.raises(DeniedError) as caught:
                client.wrap(Secret(OPTIONS), "images")
            assert "not allowed (" in caught.value.reason
            with pytest.raises(DeniedError):
                client.wrap(Secret(OPTIONS))
    assert len(broker.store.list_resources()) == 1


def test_failures_lock_an_address_out(tmp_path: Path) -> None:
    with GrpcBroker(tmp_path, limits=LimitsConfig(failures=3, lock_seconds=60)) as broker:
        address = broker.serve_keys()
        with KeyProviderClient(address, token="csvt_wrong") as client:
            for _ in range(3):
                with pytest.raises(DeniedError):
                    client.wrap(Secret(OPTIONS), "images")
            with pytest.raises(LimitedError) as caught:
                client.wrap(Secret(OPTIONS), "images")
            assert 50 < caught.value.retry_after <= 60


def test_a_token_is_not_sent_in_the_clear() -> None:
    with pytest.raises(FormatError, match="TLS away from this machine"):
        KeyProviderClient("192.0.2.1:50000", token="csvt_x")


# ---- Guests


def test_a_guest_unwraps_what_the_resource_policy_allows(broker: GrpcBroker) -> None:
    packet = wrapped(broker, broker.put_key())
    address = broker.serve_keys()
    token, key = broker.guest_token()
    with KeyProviderClient(address, token=token, guest_key=key) as client:
        assert plain(client.unwrap(packet)) == OPTIONS
    record = broker.records(action="unwrap")[-1]
    assert (record.outcome, record.door, record.actor, record.resource) == ("allowed", "keyprovider", "guest", str(KEK))


def test_a_guests_token_alone_opens_nothing(broker: GrpcBroker) -> None:
    packet = wrapped(broker, broker.put_key())
    token, _key = broker.guest_token()
    with KeyProviderClient(broker.serve_keys(), token=token) as thief:
        stolen = plain(thief.unwrap(packet))
    assert b"symkey" not in stolen
    assert json.loads(stolen).keys() == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
    with (
        KeyProviderClient(broker.serve_keys(), token=token, guest_key=ec.generate_private_key(ec.SECP256R1())) as thief,
        pytest.raises(AuthenticationError),
    ):
        thief.unwrap(packet)


def test_a_guest_that_is_not_affirmed(broker: GrpcBroker) -> None:
    packet = wrapped(broker, broker.put_key())
    token, key = broker.guest_token("contraindicated")
    with KeyProviderClient(broker.serve_keys(), token=token, guest_key=key) as client, pytest.raises(DeniedError) as caught:
        client.unwrap(packet)
    denied = broker.records(action="unwrap")
    assert [record.outcome for record in denied] == ["denied"]
    assert denied[0].correlation in caught.value.reason
    assert denied[0].reason not in caught.value.reason


def test_a_guest_does_not_wrap_and_learns_nothing_of_what_is_missing(broker: GrpcBroker) -> None:
    broker.put_key()
    token, key = broker.guest_token()
    with KeyProviderClient(broker.serve_keys(), token=token, guest_key=key) as client:
        with pytest.raises(DeniedError):
            client.wrap(Secret(OPTIONS), "images")
        with pytest.raises(DeniedError) as caught:
            client.unwrap(wrapped(broker, bytes(32), ResourcePath.parse("default/key/missing")))
        assert "missing" not in caught.value.reason


def test_tokens_of_strangers(broker: GrpcBroker) -> None:
    packet = wrapped(broker, broker.put_key())
    address = broker.serve_keys()
    stranger = TokenIssuer(ec.generate_private_key(ec.SECP256R1()))
    expired = TokenIssuer(broker.other_issuer._key.raw_value, clock=lambda: time.time() - 3600)
    good, _key = broker.guest_token()
    header, payload, signature = good.split(".")
    changed = f"{header}.{payload[:-2]}{'AA' if payload[-2:] != 'AA' else 'BB'}.{signature}"
    for token in (broker.guest_token(issuer=stranger)[0], broker.guest_token(issuer=expired)[0], changed):
        with KeyProviderClient(address, token=token) as client, pytest.raises(DeniedError, match="not allowed"):
            client.unwrap(packet)
    assert not broker.records(action="unwrap")
    assert len(broker.records(outcome="denied")) == 3


# ---- Listeners


def make_certificate(name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """(certificate, key) for localhost, self-signed or by an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def pem(certificate: Any) -> bytes:
    return bytes(certificate.public_bytes(Encoding.PEM))


def key_pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_tls_and_administrators_by_certificate(tmp_path: Path) -> None:
    authority = make_certificate("authority")
    server, alice, mallory = (make_certificate(name, authority) for name in ("localhost", "alice", "mallory"))
    stranger = make_certificate("alice")
    fingerprint = hashlib.sha256(alice[0].public_bytes(Encoding.DER)).hexdigest()
    certificates = {fingerprint: Administrator("alice", frozenset({"keys"}))}
    with GrpcBroker(tmp_path, certificates=certificates) as broker:
        broker.put_key()
        files = {
            "certificate": private(tmp_path / "server.pem", pem(server[0])),
            "key": private(tmp_path / "server.key", key_pem(server[1])),
            "client_ca": private(tmp_path / "ca.pem", pem(authority[0])),
        }
        address = broker.serve_keys(**files).replace("127.0.0.1", "localhost")

        def client(who: tuple[Any, Any] | None, roots: Any = authority) -> KeyProviderClient:
            own = {} if who is None else {"certificate": pem(who[0]), "key": key_pem(who[1])}
            return KeyProviderClient(address, tls=ChannelTls(roots=pem(roots[0]), **own), timeout=5)

        with client(alice) as known:
            assert plain(known.unwrap(known.wrap(Secret(OPTIONS), "images"))) == OPTIONS
        assert broker.records(action="read resource")[-1].actor == "alice"
        with client(mallory) as unknown, pytest.raises(DeniedError):
            unknown.wrap(Secret(OPTIONS), "images")
        for who, roots in ((None, authority), (stranger, authority), (alice, stranger)):
            with client(who, roots) as refused, pytest.raises(UnavailableError):
                refused.wrap(Secret(OPTIONS), "images")


def test_tls_with_a_token(tmp_path: Path) -> None:
    server = make_certificate("localhost")
    with GrpcBroker(tmp_path) as broker:
        broker.put_key()
        files = {
            "certificate": private(tmp_path / "server.pem", pem(server[0])),
            "key": private(tmp_path / "server.key", key_pem(server[1])),
        }
        address = broker.serve_keys("0.0.0.0:0", **files).replace("0.0.0.0", "localhost")
        with KeyProviderClient(address, token=broker.token("keys"), tls=ChannelTls(roots=pem(server[0]))) as client:
            client.wrap(Secret(OPTIONS), "images")
        with KeyProviderClient(address, tls=ChannelTls(roots=pem(server[0]))) as client, pytest.raises(DeniedError):
            client.wrap(Secret(OPTIONS), "images")


@pytest.mark.parametrize(
    ("listen", "config", "message"),
    [
        ("0.0.0.0:0", {}, "only with TLS"),
        ("192.0.2.1:0", {}, "only with TLS"),
        ("0.0.0.0:0", {"local_trust": True}, "loopback"),
        ("127.0.0.1:0", {"certificate": Path("x")}, "both, or none"),
        ("127.0.0.1:0", {"client_ca": Path("x")}, "certificate and key"),
    ],
)
def test_what_does_not_start(broker: GrpcBroker, listen: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        broker.serve_keys(listen, **config)


def test_sockets_and_keys_that_others_can_reach(broker: GrpcBroker, tmp_path: Path) -> None:
    open_directory = tmp_path / "open"
    open_directory.mkdir(mode=0o755)
    with pytest.raises(StateError, match="lets other users in"):
        broker.serve_keys("unix:open/keys.sock")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="no socket"):
        broker.serve_keys("unix:file")
    key = tmp_path / "server.key"
    key.write_bytes(b"")
    key.chmod(0o644)
    with pytest.raises(StateError, match="lets other users in"):
        broker.serve_keys(certificate=key, key=key)


def test_one_listener_at_a_place(broker: GrpcBroker) -> None:
    address = broker.serve_keys("unix:keys.sock")
    with pytest.raises(StateError, match="another process listens"):
        broker.serve_keys("unix:keys.sock")
    port = broker.serve_keys()
    with pytest.raises(StateError, match="in use"):
        broker.serve_keys(port)
    # A socket that a killed broker has left behind is in nobody's way.
    broker.stop_servers()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(address.removeprefix("unix:"))
    assert os.path.lexists(address.removeprefix("unix:"))
    broker.put_key()
    with KeyProviderClient(broker.serve_keys("unix:keys.sock")) as client:
        client.wrap(Secret(OPTIONS), "images")


# ---- Callers who are slow, loud or silent


def test_unknown_methods_and_wrong_messages(broker: GrpcBroker) -> None:
    with grpc.insecure_channel(broker.serve_keys(local_trust=True)) as channel:
        for path, message, code in (
            ("/keyprovider.KeyProviderService/wrapKey", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/keyprovider.Other/WrapKey", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/keyprovider.KeyProviderService/WrapKey", b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            ("/keyprovider.KeyProviderService/WrapKey", b"", grpc.StatusCode.INVALID_ARGUMENT),
            ("/keyprovider.KeyProviderService/UnWrapKey", b"\x0a\x02[]", grpc.StatusCode.INVALID_ARGUMENT),
            ("/keyprovider.KeyProviderService/WrapKey", bytes(5 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(message, timeout=10)
            assert caught.value.code() is code, path
        several = channel.stream_unary("/keyprovider.KeyProviderService/WrapKey")
        for messages in ([], [b"", b""]):
            with pytest.raises(grpc.RpcError) as caught:
                several(iter(messages), timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_requests_that_never_end_are_cut_off(broker: GrpcBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MESSAGE_SECONDS", 0.3)
    release: list[bool] = []

    def silence() -> Iterator[bytes]:
        while not release:
            time.sleep(0.05)
        yield b""

    with grpc.insecure_channel(broker.serve_keys(local_trust=True)) as channel:
        several = channel.stream_unary("/keyprovider.KeyProviderService/WrapKey")
        start = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            several(silence(), timeout=10)
        release.append(True)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no whole message" in caught.value.details()
    assert time.monotonic() - start < 5


def test_silent_connections_do_not_starve_honest_ones(broker: GrpcBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "HANDSHAKE_SECONDS", 1.0)
    broker.put_key()
    address = broker.serve_keys(local_trust=True)
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(200)]
        for one in silent[:50]:
            one.sendall(b"PRI * HTTP/2.0\r\n")  # half a preface
        for one in silent[50:100]:
            one.sendall(os.urandom(200))
        with KeyProviderClient(address, timeout=5) as client:
            start = time.monotonic()
            assert plain(client.unwrap(client.wrap(Secret(OPTIONS), "images"))) == OPTIONS
            assert time.monotonic() - start < 4
        for one in silent:
            one.settimeout(10)
            while one.recv(4096):  # what the server says, and then the end
                pass


def test_nothing_is_released_when_it_cannot_be_recorded(broker: GrpcBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    packet = wrapped(broker, broker.put_key())
    token, key = broker.guest_token()
    owner = broker.serve_keys(local_trust=True)

    def broken(*_: object, **__: object) -> None:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(broker.store.committer, "submit", broken)
    monkeypatch.setattr(broker.store.committer, "commit", broken)
    for client in (KeyProviderClient(owner), KeyProviderClient(owner, token=token, guest_key=key)):
        with client, pytest.raises(UnavailableError) as caught:
            client.unwrap(packet)
        assert "disk" not in str(caught.value)
