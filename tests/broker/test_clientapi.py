"""Verdictd's client API over gRPC, and the keyrings behind it: the original's names, fields and texts; roles; real deletion."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from broker.grpc_broker import GrpcBroker
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.administration import LOCAL
from csvfast.broker.clientapi import messages
from csvfast.broker.clientapi.openpgp import find_keys, merge_keys, read_keyring, write_keyring
from csvfast.broker.clients.clientapi import ClientApiClient
from csvfast.broker.grpc_messages import METHODS
from csvfast.broker.limits import LimitsConfig
from csvfast.broker.model import ResourcePath, for_kid
from csvfast.broker.store import Job
from csvfast.errors import DeniedError, FormatError, RequestError, UnavailableError, UnknownError

VECTORS = Path(__file__).parents[1] / "vectors" / "openpgp"
ONE, TWO = (VECTORS / "one.asc").read_bytes(), (VECTORS / "two.asc").read_bytes()
ONE_PRINT, TWO_PRINT = "9CDE6617A3AAFB887D0521E56F2F005D603E0E06", "872718FF3432BDD46044DE8CF790EED502C1D4C0"
MEASURE = bytes(range(32))
CSV_POLICY = """package policy

default allow = false

allow {
    input.measure == data.measure[_]
}
"""
CSV_DATA = json.dumps({"measure": [base64.b64encode(MEASURE).decode()]})


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GrpcBroker]:
    with GrpcBroker(tmp_path) as made:
        yield made


@pytest.fixture
def client(broker: GrpcBroker) -> Iterator[ClientApiClient]:
    with ClientApiClient(broker.serve_api(local_trust=True)) as made:
        yield made


def call(address: str, method: str, **fields: Any) -> Any:
    """A call by names as they stand on the wire, without our client."""
    found = METHODS[f"/clientapi.{method}"]
    with grpc.insecure_channel(address) as channel:
        return found.read_reply(channel.unary_unary(found.path)(found.write_request(**fields), timeout=10))


def test_names_and_numbers_are_the_originals() -> None:
    names = {path.removeprefix("/clientapi.") for path in METHODS if path.startswith("/clientapi.")}
    assert names == {
        "KeyManagerService/CreateKey", "KeyManagerService/GetKey", "KeyManagerService/DeleteKey",
        "OpaService/SetOpaPolicy", "OpaService/exportOpaPolicy", "OpaService/setOpaReference",
        "OpaService/exportOpaReference", "OpaService/TestOpa",
        "GpgService/listGpgKeys", "GpgService/importGpgKey", "GpgService/deleteGpgKey", "GpgService/exportGpgKeyring",
        "ImageService/exportImageSigstore", "ImageService/exportImagePolicy",
        "ImageService/setImageSigstore", "ImageService/setImagePolicy",
    }  # fmt: skip
    test = METHODS["/clientapi.OpaService/TestOpa"]
    written = test.write_request(
        policyname=b"a", policycontent=b"b", policylocal=True,
        referencename=b"c", referencecontent=b"d", referencelocal=True, input=b"e",
    )  # fmt: skip
    assert written == b"\x0a\x01a\x12\x01b\x18\x01\x22\x01c\x2a\x01d\x30\x01\x3a\x01e"
    assert METHODS["/clientapi.KeyManagerService/GetKey"].write_reply(status=b"OK", key=b"k") == b"\x0a\x02OK\x12\x01k"


# ---- Keys


def test_keys_come_and_go(broker: GrpcBroker, client: ClientApiClient) -> None:
    name = client.create_key()
    stored = broker.store.resource(for_kid(name))
    assert stored is not None
    assert str(stored.path) == f"default/key/{name}"
    key = client.get_key(name)
    assert key.equals(stored.content)
    assert len(key) == 32
    client.delete_key(name)
    with pytest.raises(UnknownError, match="key is not exist"):
        client.get_key(name)
    with pytest.raises(UnknownError, match="key is not exist"):
        client.delete_key(name)
    assert broker.store.resource(for_kid(name)) is None
    actions = [(record.actor, record.action, record.outcome) for record in broker.records(door="clientapi")]
    assert actions == [("local", one, "allowed") for one in ("put resource", "read resource", "delete resource")]


def test_the_originals_texts(broker: GrpcBroker) -> None:
    address = broker.serve_api(local_trust=True)
    made = call(address, "KeyManagerService/CreateKey")
    assert made.bytes("status") == b"OK"
    got = call(address, "KeyManagerService/GetKey", uuid=made.bytes("uuid"))
    assert got.bytes("status") == b"OK"
    assert len(base64.b64decode(got.bytes("key"), validate=True)) == 32
    for wrong in (b"notexist", b"", b"../../../etc/passwd", b"\xff", b"other/key/x", b"kbs:///default/key/x"):
        got = call(address, "KeyManagerService/GetKey", uuid=wrong)
        assert (got.bytes("status"), got.bytes("key")) == (b"key is not exist", b"")


def test_other_resources_are_out_of_the_key_managers_reach(broker: GrpcBroker, client: ClientApiClient) -> None:
    broker.administration.put_resource(LOCAL, ResourcePath.parse("team/key/1"), b"secret")
    for name in ("team/key/1", "kbs:///team/key/1", "../../team/key/1"):
        with pytest.raises(UnknownError):
            client.get_key(name)
        with pytest.raises(UnknownError):
            client.delete_key(name)
    assert broker.store.resource(ResourcePath.parse("team/key/1")) is not None


def test_a_store_that_cannot_be_written(broker: GrpcBroker, client: ClientApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(broker.store.resources, "put", broken)
    with pytest.raises(RequestError, match="Greate key failed"):
        client.create_key()
    with pytest.raises(UnavailableError):
        client.set_image_policy("{}")


# ---- Policies


def test_reference_values_are_in_force(broker: GrpcBroker, client: ClientApiClient) -> None:
    client.set_reference("csvData", CSV_DATA)
    row = broker.store.get_reference("csv_measure")
    assert row is not None
    assert row.values == (MEASURE.hex(),)
    assert row.expires is not None
    assert json.loads(client.export_reference("csvData")) == json.loads(CSV_DATA)
    assert broker.broker.grounds(look=True).references["csv_measure"].has(MEASURE.hex())
    client.set_reference("csvData", '{"measure":[]}')
    left = broker.broker.grounds(look=True).references["csv_measure"]  # nobody is allowed any more
    assert not left.has(MEASURE.hex())
    assert left.has_expired(broker.broker.clock())
    with pytest.raises(RequestError, match="no reference value"):
        client.export_reference("csvData")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("csvData", "{}", "measure is missing"),
        ("csvData", "[]", "expected an object"),
        ("csvData", "{", "no JSON"),
        ("csvData", '{"measure":"AA=="}', "expected an array"),
        ("csvData", '{"measure":["AA=="]}', "32 bytes"),
        ("csvData", '{"measure":["%%"]}', "32 bytes"),
        ("csvData", '{"measure":[1]}', "32 bytes"),
        ("csvData", '{"measure":[],"vm_id":["x"]}', "unknown members"),
        ("sgxData", "{}", "expected csvData"),
        ("../csvData", "{}", "expected csvData"),
    ],
)
def test_references_that_would_not_be_enforced(client: ClientApiClient, name: str, content: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        client.set_reference(name, content)


def test_policies(broker: GrpcBroker, client: ClientApiClient) -> None:
    pytest.importorskip("regopy")
    status = client.set_policy("csvPolicy.rego", CSV_POLICY)
    assert "not in force" in status
    assert client.export_policy("csvPolicy.rego") == CSV_POLICY
    assert client.set_policy("team", "package policy\nallow := true\n") == "OK"
    assert broker.broker.grounds(look=True).resource("team").policy.engine == "rego"
    assert "FormatError" not in (status := client.set_policy("team", "package policy\nallow := (\n"))
    assert status != "OK"
    assert client.export_policy("team") == "package policy\nallow := true\n"
    with pytest.raises(RequestError, match="no resource policy"):
        client.export_policy("missing")
    assert "CSV guests" in client.set_policy("sgxPolicy.rego", CSV_POLICY)
    assert client.set_policy("../x", CSV_POLICY) != "OK"


def test_opa_is_tried_out(client: ClientApiClient) -> None:
    pytest.importorskip("regopy")
    client.set_policy("csvPolicy.rego", CSV_POLICY)
    client.set_reference("csvData", CSV_DATA)
    good = json.dumps({"measure": base64.b64encode(MEASURE).decode()})
    bad = json.dumps({"measure": base64.b64encode(bytes(32)).decode()})
    for arguments in (
        {"policy": "csvPolicy.rego", "reference": "csvData"},
        {"policy_text": CSV_POLICY, "reference": "csvData"},
        {"policy": "csvPolicy.rego", "reference_text": CSV_DATA},
        {"policy_text": CSV_POLICY, "reference_text": CSV_DATA},
    ):
        assert client.test(good, **arguments)["allow"] is True
        answer = client.test(bad, **arguments)
        assert answer["allow"] is False
        assert "data.policy.allow" in answer["parseInfo"]
    assert client.test(good, policy_text="package policy\nallow := (", reference_text="{}")["allow"] is False
    for wrong, text in (
        ({"policy_text": "", "reference": "csvData"}, "parse policycontent failed"),
        ({"policy": "", "reference": "csvData"}, "parse policyname failed"),
        ({"policy": "csvPolicy.rego", "reference_text": ""}, "parse referencecontent failed"),
        ({"policy": "csvPolicy.rego"}, "parse referencename failed"),
    ):
        with pytest.raises(RequestError, match=text):
            client.test(good, **wrong)
    with pytest.raises(RequestError, match="parse input failed"):
        client.test("", policy="csvPolicy.rego", reference="csvData")


# ---- Images and keyring


def test_image_policies(broker: GrpcBroker, client: ClientApiClient) -> None:
    for export in (client.export_image_policy, client.export_image_sigstore):
        with pytest.raises(RequestError, match="there is no resource"):
            export()
    policy = '{"default":[{"type":"reject"}]}'
    client.set_image_policy(policy)
    client.set_image_sigstore("default:\n  sigstore: file:///x ü\n")
    assert client.export_image_policy() == policy
    assert client.export_image_sigstore() == "default:\n  sigstore: file:///x ü\n"
    found = broker.store.resource(messages.IMAGE_POLICY)
    assert found is not None
    assert found.content.equals(policy.encode())
    with pytest.raises(RequestError, match="empty"):
        client.set_image_policy("")
    address = broker.serve_api(local_trust=True)
    assert call(address, "ImageService/setImagePolicy", content=b"\xff").bytes("status") != b"OK"


def test_the_keyring(broker: GrpcBroker, client: ClientApiClient) -> None:
    assert client.list_gpg_keys() == ""
    with pytest.raises(RequestError, match="there is no resource"):
        client.export_gpg_keyring()
    assert "gpg: key 6F2F005D603E0E06: public key imported" in client.import_gpg_key(ONE)
    assert "Total number processed: 1" in client.import_gpg_key(TWO)
    assert "replaced" in client.import_gpg_key(ONE)
    listed = client.list_gpg_keys()
    assert ONE_PRINT in listed
    assert "uid           Zwei Schlüssel <two@example.org>" in listed
    assert {key.fingerprint for key in read_keyring(client.export_gpg_keyring())} == {ONE_PRINT, TWO_PRINT}
    for wrong in ("603E0E06", "one@example.org", "", "0" * 16):
        assert "0 keys" in client.delete_gpg_key(wrong)
    assert client.delete_gpg_key("0x6F2F005D603E0E06") == "Delete key successfully"
    assert [key.fingerprint for key in read_keyring(client.export_gpg_keyring())] == [TWO_PRINT]
    assert client.delete_gpg_key(TWO_PRINT) == "Delete key successfully"
    assert broker.store.resource(messages.GPG_KEYRING) is None
    assert client.import_gpg_key(b"no keyring").startswith("OpenPGP keyring")


# ---- Who may


def test_roles(broker: GrpcBroker) -> None:
    pytest.importorskip("regopy")
    address = broker.serve_api()
    keys, policy, audit = (broker.token(role, name=role) for role in ("keys", "policy", "audit"))
    with ClientApiClient(address, token=keys) as client:
        client.create_key()
        client.import_gpg_key(ONE)
        client.set_image_policy("{}")
        for refused in (
            lambda: client.set_policy("team", CSV_POLICY),
            lambda: client.set_reference("csvData", CSV_DATA),
            lambda: client.test("{}", policy_text=CSV_POLICY, reference_text=CSV_DATA),
        ):
            with pytest.raises(DeniedError, match="not allowed"):
                refused()
    for token in (policy, audit):
        with ClientApiClient(address, token=token) as client:
            for refused in (client.create_key, client.list_gpg_keys, lambda: client.set_image_policy("{}")):
                with pytest.raises(DeniedError, match="not allowed"):
                    refused()
    with ClientApiClient(address, token=policy) as client:
        client.set_reference("csvData", CSV_DATA)
        assert client.test("{}", policy_text=CSV_POLICY, reference_text=CSV_DATA)["allow"] is False


@pytest.mark.parametrize("token", [None, "csvt_wrong"])
def test_nobody_else(broker: GrpcBroker, token: str | None) -> None:
    with ClientApiClient(broker.serve_api(), token=token) as client, pytest.raises(DeniedError, match="not allowed"):
        client.create_key()
    guest, _key = broker.guest_token()
    with ClientApiClient(broker.serve_api(), token=guest) as client, pytest.raises(DeniedError, match="not allowed"):
        client.create_key()
    assert not broker.store.list_resources()


# ---- OpenPGP


def test_known_keyrings() -> None:
    (one,) = read_keyring(ONE)
    assert (one.fingerprint, one.key_id, one.algorithm, one.version) == (ONE_PRINT, "6F2F005D603E0E06", "eddsa", 4)
    assert one.user_ids == ("Test One <one@example.org>",)
    assert one.created == 1795748180
    (two,) = read_keyring(TWO)
    assert (two.fingerprint, two.algorithm) == (TWO_PRINT, "rsa")
    assert read_keyring(ONE + b"\n" + TWO) == [one, two]
    assert read_keyring(write_keyring([one, two])) == [one, two]
    assert merge_keys([one, two], [one]) == [one, two]
    assert find_keys([one, two], ONE_PRINT.lower()) == [one]
    assert one.lines() == f"pub   eddsa 2026-11-27\n      {ONE_PRINT}\nuid           Test One <one@example.org>\n"


def test_key_of_rfc_9580() -> None:
    """The version 6 certificate of its appendix A.3."""
    armored = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----

xioGY4d/4xsAAAAg+U2nu0jWCmHlZ3BqZYfQMxmZu52JGggkLq2EVD34laPCsQYf
GwoAAABCBYJjh3/jAwsJBwUVCg4IDAIWAAKbAwIeCSIhBssYE8GCaaX5NUt+mxyK
wwfHifBilZwj2Ul7Ce62azJJBScJAgcCAAAAAK0oIBA+LX0ifsDm185Ecds2v8lw
gyU2kCcUmKfvBXbAf6rhRYWzuQOwEn7E/aLwIwRaLsdry0+VcallHhSu4RN6HWaE
QsiPlR4zxP/TP7mhfVEe7XWPxtnMUMtf15OyA51YBM4qBmOHf+MZAAAAIIaTJINn
+eUBXbki+PSAld2nhJh/LVmFsS+60WyvXkQ1wpsGGBsKAAAALAWCY4d/4wKbDCIh
BssYE8GCaaX5NUt+mxyKwwfHifBilZwj2Ul7Ce62azJJAAAAAAQBIKbpGG2dWTX8
j+VjFM21J0hqWlEg+bdiojWnKfA5AQpWUWtnNwDEM0g12vYxoWM8Y81W+bHBw805
I8kWVkXU6vFOi+HWvv/ira7ofJu16NnoUkhclkUrk0mXubZvyl4GBg==
-----END PGP PUBLIC KEY BLOCK-----
"""
    (key,) = read_keyring(armored)
    assert key.fingerprint == "CB186C4F0609A697E4D52DFA6C722B0C1F1E27C18A56708F6525EC27BAD9ACC9"
    assert key.key_id == "CB186C4F0609A697"
    assert (key.version, key.algorithm, key.user_ids) == (6, "ed25519", ())


def packet(tag: int, body: bytes) -> bytes:
    return bytes((0xC0 | tag, 0xFF)) + struct.pack(">I", len(body)) + body


KEY = b"\x04\0\0\0\0\x16" + bytes(40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found none"),
        (b"hello", "first byte of a packet"),
        (packet(5, KEY), "secret key"),
        (packet(6, KEY) + packet(7, KEY), "secret key"),
        (packet(13, b"me"), "a public key first"),
        (packet(10, b"PGP"), "found none"),
        (packet(6, KEY) + packet(1, b"x"), "type 1"),
        (packet(6, b"\x04"), "6 or more"),
        (packet(6, b"\x03" + KEY[1:]), "version 3"),
        (packet(6, KEY)[:-1], "whole packet"),
        (b"\xc6", "whole packet"),
        (b"\xc6\xff\0", "whole packet"),
        (b"\xc6\xc0", "whole packet"),
        (b"\xc6\xe0" + KEY, "partial"),
        (b"\x9b" + KEY, "indeterminate"),
        (b"\x9a\xff\xff\xff\xff" + KEY, "whole packet"),
        (ONE.replace(b"=Jlto", b"=AAAA"), "checksum"),
        (ONE.replace(b"PUBLIC", b"PRIVATE"), "found none"),
        (bytes((2 << 20) + 1), "at most"),
    ],
)
def test_wrong_keyrings(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_keyring(data)


@given(st.binary(max_size=200))
def test_hostile_keyrings(tail: bytes) -> None:
    for data in (tail, packet(6, KEY) + tail, ONE[:200] + tail + ONE[200:]):
        try:
            keys = read_keyring(data)
        except FormatError:
            continue
        assert read_keyring(write_keyring(keys)) == keys


def test_gpg_reads_what_we_keep(tmp_path: Path) -> None:
    if shutil.which("gpg") is None:
        pytest.skip("gpg is not installed")
    keyring = tmp_path / "keyring.gpg"
    keyring.write_bytes(write_keyring(read_keyring(ONE + TWO)))
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    command = ["gpg", "--homedir", str(home), "--batch", "--no-default-keyring", f"--keyring={keyring}"]
    command += ["--list-keys", "--with-colons"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr")) == ONE_PRINT
    assert TWO_PRINT in listed


def test_who_is_locked_out_fills_no_audit_log(tmp_path: Path) -> None:
    with GrpcBroker(tmp_path, limits=LimitsConfig(failures=3)) as broker:
        with grpc.insecure_channel(broker.serve_api()) as channel:
            call = channel.unary_unary("/clientapi.KeyManagerService/CreateKey")
            for code in [grpc.StatusCode.UNAUTHENTICATED] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3:
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", metadata=(("authorization", "Basic x"),), timeout=10)
                assert caught.value.code() is code
        broker.store.committer.run(Job())
        assert len(broker.records(outcome="denied")) == 3
