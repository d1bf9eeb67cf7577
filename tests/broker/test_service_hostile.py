"""A whole broker among strangers: crowds that say nothing or rubbish at each door, malformed requests, and what is written of it.

Strangers come from other addresses than honest clients, for failures lock an address out.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import pytest
from broker.broker_process import BrokerProcess, LockedGuest, VerdictdGuest, new_key
from broker.simulated_guest import SimulatedMachine

from csvfast.broker.clients.clientapi import ClientApiClient
from csvfast.broker.clients.keyprovider import KeyProviderClient
from csvfast.broker.config import Address
from csvfast.broker.grpc_messages import KEY_PROVIDER, METHODS
from csvfast.broker.kbs.errors import ERROR_BASE
from csvfast.crypto import Secret
from csvfast.errors import AttestedTlsError, CsvfastError, DeniedError

DOORS: Final = ("verdictd", "kbs", "keyprovider", "clientapi")
CROWD: Final = 1000
SOON: Final = 5.0
"""Seconds within which an honest client is served; an idle broker needs a tenth of one."""
OPTIONS: Final = b'{"symkeyopts":{"note":"private options of a layer"}}'
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OPENINGS: Final = {
    "verdictd": [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x16\x03\x01\x00\x05", os.urandom(300)],
    "kbs": [
        b"",
        b"GET /kbs/v0/resource/default/key/shared HTTP/1.1\r\nHost: a\r\n",
        b"POST /kbs/v0/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{",
        os.urandom(300),
    ],
    "keyprovider": [b"", PREFACE[:10], PREFACE + b"\0\0\0\4\0\0\0\0\0", os.urandom(300)],
}
OPENINGS["clientapi"] = OPENINGS["keyprovider"]


@pytest.fixture(scope="module")
def broker(
    broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("hostile") / "broker", broker_machine) as process:
        process.allow(broker_guest)
        with process.administrator() as administrator:
            administrator.put("default/key/shared", new_key())
        yield process


class Crowd:
    """Connections of strangers to one door. Where one is closed another comes. A context manager.

    In: address   of the door
        openings  what they begin with, each of them one of these
    """

    def __init__(self, address: str, openings: list[bytes]) -> None:
        self._address = Address.parse(address)
        self._openings = openings
        self._sockets: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drip)
        self.came = 0

    def _come(self) -> None:
        number, self.came = self.came, self.came + 1
        if self._address.path is not None:
            stranger = socket.socket(socket.AF_UNIX)
            stranger.settimeout(20)
            stranger.connect(str(self._address.path))
        else:
            place = f"127.0.{1 + number % 4}.{1 + number % 50}"
            stranger = socket.create_connection((self._address.host, self._address.port), 20, (place, 0))
        with suppress(OSError):
            stranger.sendall(self._openings[number % len(self._openings)])
        self._sockets.append(stranger)

    def _drip(self) -> None:
        """A byte now and then, and newcomers in the place of those who were sent away, some hundred a second."""
        while not self._stop.wait(0.1):
            kept, self._sockets = self._sockets, []
            gone = 0
            for number, stranger in enumerate(kept):
                try:
                    stranger.setblocking(False)
                    if number % 10 == self.came % 10:
                        stranger.send(b"x")
                    alive = gone >= 50 or bool(stranger.recv(4096))
                except BlockingIOError:
                    alive = True
                except OSError:
                    alive = False
                if alive:
                    self._sockets.append(stranger)
                else:
                    stranger.close()
                    gone += 1
            for _ in range(gone):
                with suppress(OSError):
                    self._come()

    def __enter__(self) -> Self:
        for _ in range(CROWD):
            # A door may turn them away as they come.
            with suppress(OSError):
                self._come()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(60)
        for stranger in self._sockets:
            stranger.close()


def served(broker: BrokerProcess, guest: LockedGuest, door: str) -> float:
    """An honest client comes to a door for the first time. Out: seconds."""
    since = time.monotonic()
    if door == "verdictd":
        with broker.verdictd_guest(guest, timeout=SOON) as client:
            assert len(client.key("shared")) == 32
    elif door == "kbs":
        with broker.kbs_guest(guest, timeout=SOON) as kbs:
            kbs.handshake()
            assert len(kbs.get_resource("shared")) == 32
    elif door == "keyprovider":
        with KeyProviderClient(broker.doors[door], timeout=SOON) as provider:
            assert bytes(provider.unwrap(provider.wrap(Secret(OPTIONS), "shared"))) == OPTIONS
    else:
        with ClientApiClient(broker.doors[door], timeout=SOON) as api:
            assert len(api.get_key("shared")) == 32
    return time.monotonic() - since


def check_served(broker: BrokerProcess, guest: LockedGuest) -> float:
    """At each door, at the first attempt. Out: the longest that anybody waited."""
    slowest = 0.0
    for _ in range(3):
        for door in DOORS:
            slowest = max(slowest, served(broker, guest, door))
            assert slowest < SOON
        time.sleep(0.2)
    return slowest


def check_served_at_last(broker: BrokerProcess, guest: LockedGuest) -> None:
    """At each door, as guests do it: those that are sent away come again. A crowd that comes all at once turns over a small table
    before anybody in it has been looked at."""
    for door in DOORS:
        until = time.monotonic() + SOON
        while True:
            try:
                served(broker, guest, door)
                break
            except CsvfastError:
                assert time.monotonic() < until, door
                time.sleep(0.1)


@pytest.mark.parametrize("door", DOORS)
def test_crowds(door: str, broker: BrokerProcess, broker_guest: LockedGuest) -> None:
    with Crowd(broker.doors[door], OPENINGS[door]) as crowd:
        slowest = check_served(broker, broker_guest)
        assert crowd.came >= CROWD
    assert check_served(broker, broker_guest) < SOON
    print(f"{door}: {crowd.came} strangers, honest clients waited {slowest:.2f} s at most")


def test_crowds_where_descriptors_are_few(
    broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    """More strangers than the process could have files open: the doors make room before that happens.

    gRPC's listeners cannot; they are for the owner, or behind TLS with client certificates.
    """
    broker = BrokerProcess(tmp_path / "broker", broker_machine)
    broker.start(files=512)
    with broker:
        broker.allow(broker_guest)
        with broker.administrator() as administrator:
            administrator.put("default/key/shared", new_key())
        with Crowd(broker.doors["verdictd"], OPENINGS["verdictd"]), Crowd(broker.doors["kbs"], OPENINGS["kbs"]):
            check_served_at_last(broker, broker_guest)
        for bodies in (OPENINGS["kbs"][2:3], [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"]):
            with Crowd(broker.doors["kbs"], bodies):
                check_served_at_last(broker, broker_guest)
        assert broker.stop() == 0
        assert not [one for one in broker.events() if "exception" in one or "out of system resource" in one["event"]]


# ---- Malformed requests

ENDING: Final = [
    b"rubbish",
    b"[]",
    b'{"command":5}',
    b'{"command":"No Such Command"}',
    b'{"kids":["shared"]}',
    b'{"command":"Get KEK"}',
    b'{"command":"Get KEK","kids":"shared"}',
    b'{"command":"Get KEK","kids":[{}]}',
    b'{"command":"Get KEK","kids":["shared"],"kids":["shared"]}',
    b'{"command":"\xff"}',
    b'{"command":"version",}',
    b'{"command":"echo","data":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"command":"echo","data":"' + b"x" * 70_000 + b'"}',
    b'{"command":"Decrypt","blobs":[{"kid":"shared"}]}',
    b'{"command":"Get Resource"}',
]
FAILING: Final[list[tuple[dict[str, Any], bool]]] = [
    ({"command": "Get KEK", "kids": ["../../etc/passwd"]}, False),
    ({"command": "Get KEK", "kids": ["no-such-key"]}, False),
    ({"command": "Get KEK", "kids": ["shared", "no-such-key"]}, False),
    ({"command": "Get KEK", "kids": ["shared"] * 1000}, False),
    ({"command": "Get Resource Info", "name": "a/b"}, False),
    ({"command": "Get Resource", "optional": {"resource_path": "a/../b"}}, True),
    ({"command": "Get Resource", "optional": {"resource_path": "default/key/none"}}, True),
    ({"command": "Get Policy", "optional": {}}, True),
    ({"command": "Attest", "nonce": "?"}, False),
    (
        {"command": "Decrypt", "blobs": [
            {"kid": "shared", "encrypted_data": "?", "algorithm": "AES", "key_length": 256, "iv": "AAAAAAAAAAAAAAAA"}]},
        False,
    ),
    (
        {"command": "Decrypt", "blobs": [
            {"kid": "shared", "encrypted_data": "A" * 64, "algorithm": "AES", "key_length": 256, "iv": "AAAAAAAAAAAAAAAA"}]},
        False,
    ),
    (
        {"command": "Decrypt", "blobs": [
            {"kid": "shared", "encrypted_data": "A" * 64, "algorithm": "ROT13", "key_length": 256, "iv": "AAAAAAAAAAAAAAAA"}]},
        False,
    ),
]  # fmt: skip


def test_malformed_for_verdictd(broker: BrokerProcess, broker_guest: LockedGuest) -> None:
    who = broker.verdictd_identity(broker_guest)
    with VerdictdGuest(broker.verdictd, who) as patient:
        for request in ENDING:
            # The original closes the connection; others go on.
            with VerdictdGuest(broker.verdictd, who) as guest:
                try:
                    assert guest.raw(request) == b""
                except AttestedTlsError as error:
                    assert error.stage == "closed"  # noqa: PT017
            assert patient.ask("version") == {"status": "OK", "version": "v1"}
        for members, encoded in FAILING:
            reply = patient.raw(json.dumps(members).encode())
            failure = json.loads(base64.b64decode(reply, validate=True) if encoded else reply)
            assert failure["status"] == "Fail"
            assert failure["error"]
            assert ("data" in failure) == (members["command"] in ("Get KEK", "Decrypt"))
            assert not failure.get("data")
        assert len(patient.key("shared")) == 32


def raw_http(broker: BrokerProcess, request: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer to what may be no HTTP at all."""
    address = Address.parse(broker.doors["kbs"])
    with socket.create_connection((address.host, address.port), 20) as client:
        with suppress(OSError):  # it may have been closed in the middle of that
            client.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            data = client.recv(65536)
            assert data, answer
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_malformed_for_kbs(broker: BrokerProcess, broker_guest: LockedGuest) -> None:
    none = "Host: a\r\nContent-Length: 0\r\n\r\n"
    wrong = [
        (b"RUBBISH\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"POST /kbs/v0/auth HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /kbs/v0/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"A%d: a\r\n" % n for n in range(200)) + b"\r\n", 431),
        *[
            (f"{method} {path} HTTP/1.1\r\n{none}".encode(), status)
            for method, path, status in (
                ("GET", "/nowhere", 404),
                ("GET", "/kbs/v0/nowhere", 404),
                ("GET", "/kbs/v0/resource/a/b", 404),
                ("GET", "/kbs/v0/resource/a/b/c/d", 404),
                ("GET", "/kbs/v0/resource/../../../etc/passwd", 404),
                ("GET", "/kbs/v0/resource/a/b/%2e%2e", 404),
                ("GET", "/kbs/v0/resource/default/key/shared", 401),
                ("GET", "/kbs/v0/resource/default/key/shared?version=1&version=2", 401),
                ("DELETE", "/kbs/v0/resource/default/key/shared", 401),
                ("POST", "/kbs/v0/resource/default/key/shared", 401),
                ("POST", "/kbs/v0/attest", 401),
                ("PATCH", "/kbs/v0/auth", 405),
            )
        ],
        *[
            (b"POST /kbs/v0/auth HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), 401)
            for body in (
                b"", b"{", b"[]", b"\xff", b"[" * 15_000, b'{"version":5,"tee":"csv"}', b'{"version":"9.9.9","tee":"csv"}',
                b'{"version":"0.4.0","tee":"toaster"}', b'{"version":"0.4.0","version":"0.4.0","tee":"csv"}',
            )
        ],
    ]  # fmt: skip
    for request, status in wrong:
        found, error = raw_http(broker, request)
        assert found == status, (request[:100], found, error)
        assert set(error) == {"type", "detail"}, request[:100]
        assert error["type"].startswith(ERROR_BASE)
    with broker.kbs_guest(broker_guest) as client:
        # An open session survives rubbish in it, over the same connection.
        answer = client._http.request("POST", "/kbs/v0/auth", b'{"version":"0.4.0","tee":"csv","extra-params":""}')
        headers = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
        for body in (b"", b"{}", b"[]", b'{"runtime-data":{"nonce":"x","tee-pubkey":{}},"tee-evidence":{}}'):
            answer = client._http.request("POST", "/kbs/v0/attest", body, headers)
            assert answer.status == 401
            assert json.loads(answer.body)["type"].startswith(ERROR_BASE)
        client.handshake()
        assert len(client.get_resource("shared")) == 32


def status_of(channel: Any, path: str, message: bytes, *metadata: tuple[str, str]) -> Any:
    """gRPC's status of a call, OK or not."""
    call = channel.unary_unary(path).future(message, timeout=20, metadata=metadata)
    return call.code()  # waits


def test_malformed_for_grpc(broker: BrokerProcess, broker_guest: LockedGuest) -> None:
    codes = grpc.StatusCode
    rubbish = [b"\xff" * 50, b"\x0a\xff", b"\x0a\x05ab", os.urandom(200)]
    json_rubbish = [b"{", b"[]", b"null", b'{"op":"keywrap"}', b'{"op":"keyunwrap","keyunwrapparams":{"annotation":"????"}}']
    for path, method in METHODS.items():
        door = "keyprovider" if KEY_PROVIDER in path else "clientapi"
        with grpc.insecure_channel(broker.doors[door]) as channel:
            for message in rubbish:
                status = status_of(channel, path, message)
                # Where a request has no members, protobuf skips what it does not know.
                assert status in (codes.INVALID_ARGUMENT, codes.OK), (path, message, status)
                assert status is codes.INVALID_ARGUMENT or door == "clientapi"
            if door == "keyprovider":
                for document in [b"", *json_rubbish]:
                    message = method.write_request(KeyProviderKeyWrapProtocolInput=document)
                    assert status_of(channel, path, message) is codes.INVALID_ARGUMENT
            assert status_of(channel, path, b"\x0a\x01a", ("authorization", "Bearer csvt_nobody")) is codes.UNAUTHENTICATED
            assert status_of(channel, path, b"\x0a\x01a", ("authorization", "Basic a")) is codes.UNAUTHENTICATED
            assert status_of(channel, path, b"\x0a\x01a", ("authorization", "Bearer a.b.c")) is codes.UNAUTHENTICATED
            if path.endswith(("/WrapKey", "/TestOpa")):
                assert status_of(channel, path, bytes(8 << 20)) is codes.RESOURCE_EXHAUSTED
            assert status_of(channel, path + "x", b"") is codes.UNIMPLEMENTED
            if door == "keyprovider":
                # The same connection, as good as ever.
                request = METHODS[f"/{KEY_PROVIDER}/UnWrapKey"].path
                assert status_of(channel, request, b"") is codes.INVALID_ARGUMENT
    check_served(broker, broker_guest)


# ---- What is written about all that

def forms(secret: bytes) -> list[bytes]:
    """How a secret may look where it does not belong."""
    standard = base64.b64encode(secret).rstrip(b"=")
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), standard, base64.urlsafe_b64encode(secret).rstrip(b"=")]


def test_no_secret_is_written(broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path) -> None:
    """Log, output, audit, metrics and database of a run in which keys went everywhere, also where they should not."""
    broker = BrokerProcess(tmp_path / "broker", broker_machine)
    broker.change(r"\[limits\]", '[log]\nlevel = "debug"\n\n[limits]')
    tokens = [broker.token.encode()]
    secrets: list[bytes] = [(broker.directory / "master.key").read_bytes(), OPTIONS]
    with broker:
        broker.allow(broker_guest)
        with broker.administrator() as administrator:
            for number in range(5):
                secrets.append(new_key())
                administrator.put(f"default/key/k{number}", secrets[-1])
            administrator.put("default/key/k0", new := new_key())
            administrator.delete("default/key/k4")
            secrets.append(new)
            # In requests that are refused: too early, to nowhere, by nobody, too long.
            lost = [new_key() for _ in range(6)]
            secrets += lost
            administrator.request("POST", "/csvfast/v0/resource/default/key", lost[0])
            administrator.request("POST", "/csvfast/v0/resource/..", lost[0])
            administrator.request("PUT", "/csvfast/v0/policies/resource/x", lost[1].hex().encode())
            text = {"engine": "rules", "text": base64.b64encode(lost[1]).decode()}
            administrator.request("PUT", "/csvfast/v0/policies/resource/x", json.dumps(text).encode())
            administrator.http.request("POST", "/csvfast/v0/resource/default/key/x", lost[2], {"Authorization": "Bearer csvt_x"})
            administrator.request("POST", "/csvfast/v0/resource/default/key/x", lost[3] * 100_000)
        with broker.kbs_guest(broker_guest) as kbs:
            kbs.handshake()
            for number in range(4):
                kbs.get_resource(f"k{number}")
            with pytest.raises(DeniedError):
                kbs.get_resource("k4")
            assert kbs._token is not None
            tokens.append(kbs._token.encode())
            assert kbs._cookie is not None
            cookie = kbs._cookie.encode()
            metrics = kbs._http.request("GET", "/metrics").body
        with broker.verdictd_guest(broker_guest) as guest:
            for number in range(4):
                guest.key(f"k{number}")
            blob = {"kid": "k1", "encrypted_data": base64.b64encode(lost[4]).decode(), "algorithm": "AES", "key_length": 256}
            guest.ask("Decrypt", blobs=[blob | {"iv": base64.b64encode(bytes(12)).decode()}])
            guest.raw(json.dumps({"command": "echo", "data": lost[4].hex()}).encode())
        with broker.verdictd_guest(broker_guest) as guest:
            guest.raw(b'{"command":"Get KEK","' + lost[4].hex().encode() + b'":}')
        with KeyProviderClient(broker.doors["keyprovider"]) as provider:
            provider.unwrap(provider.wrap(Secret(OPTIONS), "k1"))
        with grpc.insecure_channel(broker.doors["keyprovider"]) as channel:
            path = f"/{KEY_PROVIDER}/WrapKey"
            for document in (lost[5], b'{"op":"keywrap","' + base64.b64encode(lost[5]) + b'":'):
                status_of(channel, path, METHODS[path].write_request(KeyProviderKeyWrapProtocolInput=document))
        with ClientApiClient(broker.doors["clientapi"]) as api:
            secrets.append(bytes(api.get_key(api.create_key())))
        assert broker.process is not None
        process = Path(f"/proc/{broker.process.pid}")
        arguments, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        files = b"".join(path.read_bytes() for path in broker.directory.glob("broker.db*"))
        assert broker.stop() == 0
    broker.events()
    records = json.dumps([record.to_dict() for _, record in broker.records()]).encode()
    assert b'"k4"' in records or b"default/key/k4" in records
    log = broker.log.read_bytes()
    assert b"csvfast.broker" in log
    places = {"log": log, "output": broker.printed, "audit": records, "metrics": metrics, "arguments": arguments}
    for name, text in (places | {"environment": environment, "database": files}).items():
        for secret in secrets:
            for form in forms(secret):
                assert form not in text, f"{name} holds a secret"
    for name, text in places.items():
        for token in (*tokens, cookie):
            assert token not in text, f"{name} holds a token"
    assert tokens[0] not in files


def test_no_memory_is_dumped(broker: BrokerProcess) -> None:
    assert broker.process is not None
    limits = Path(f"/proc/{broker.process.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]
