"""A simulated virtual machine gets its key through each door, and everything that must not get one does not: no key, an audit
record, a useful reason for the operator and a bare one for the peer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker.simulated_guest import DEBUGGABLE, SimulatedGuest, SimulatedMachine
from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.broker.administration import LOCAL, Administration
from csvfast.broker.clients.kbs import KbsClient
from csvfast.broker.clients.keyprovider import KeyProviderClient
from csvfast.broker.clients.verdictd import VerdictdClient
from csvfast.broker.config import BrokerConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.service import Service
from csvfast.broker.store import AuditRecord, Store
from csvfast.certs import hygon_root
from csvfast.crypto import Secret
from csvfast.errors import AttestedTlsError, BrokerError, CsvfastError, DeniedError
from csvfast.ratstls.certificate import make_certificate
from csvfast.ratstls.claims import encode_claims, encode_evidence_buffer, report_data_of
from csvfast.ratstls.context import Identity
from csvfast.ratstls.keys import TlsKey
from csvfast.report import Evidence

KEY = b"thirty-two bytes of a disk's key"
PATH = ResourcePath("default", "key", "disk")
OPTIONS = b'{"symkey":"c2VjcmV0","cipheroptions":{}}'
DOORS = ("verdictd", "verdictd-challenge", "kbs", "keyprovider")
CONFIGURATION = """
[store]
url = "sqlite:///broker.db"
[master]
kind = "file"
path = "master.key"
[trust]
roots = ["root.cert"]
[limits]
exempt = ["127.0.0.1"]
[verdictd]
listen = "127.0.0.1:0"
freshness = "{freshness}"
[kbs]
listen = "127.0.0.1:0"
[keyprovider]
listen = "127.0.0.1:0"
local_trust = true
"""


class Running:
    """The service in a thread of its own, with one key, and a packet that the key provider wrapped with it."""

    def __init__(self, directory: Path, root: bytes, measure: bytes, freshness: str) -> None:
        directory.chmod(0o700)
        (directory / "root.cert").write_bytes(root)
        config = BrokerConfig.parse(CONFIGURATION.replace("{freshness}", freshness).encode(), directory)
        self.store = Store.open(config.store_url, FileMaster.create(directory / "master.key"), create=True)
        self.administration = Administration(self.store)
        self.administration.put_resource(LOCAL, PATH, KEY)
        self.measured(measure)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._service = Service(config, self.store)
        self._run(self._service.__aenter__())
        self.doors = self._service.addresses
        with KeyProviderClient(self.doors["keyprovider"]) as owner:
            self.packet = owner.wrap(Secret(OPTIONS), str(PATH))
        self.before = self.last()

    def measured(self, measure: bytes, expires: float | None = None) -> None:
        self.administration.put_reference(LOCAL, "csv_measure", [measure.hex()], expires)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def close(self) -> None:
        self._run(self._service.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self.store.close()

    def last(self) -> int:
        return max((entry.sequence for entry in self.store.iterate_audit()), default=0)

    def records(self) -> list[AuditRecord]:
        return [entry.record for entry in self.store.iterate_audit(after=self.before)]

    def ask(self, door: str, guest: Any, **more: Any) -> bytes:
        """What a guest does to get the key, or the private options that are wrapped with it."""
        if door.startswith("verdictd"):
            host, port = self.doors["verdictd"].rsplit(":", 1)
            with VerdictdClient((host, int(port)), guest, **more) as client:
                return bytes(client.get_kek("disk"))
        private = ec.generate_private_key(ec.SECP256R1())
        with KbsClient(f"http://{self.doors['kbs']}", guest, key=private, sleep=lambda _seconds: None) as client:
            if door == "kbs":
                return bytes(client.get_resource(PATH))
            token = client.attest()
        with KeyProviderClient(self.doors["keyprovider"], token=token, guest_key=private) as provider:
            return bytes(provider.unwrap(self.packet))


@pytest.fixture(scope="module")
def machine() -> Iterator[SimulatedMachine]:
    with SimulatedMachine() as machine:
        yield machine


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "firmware"
    path.write_bytes(bytes(range(256)) * 256)
    return path


@pytest.fixture(scope="module")
def guest(machine: SimulatedMachine, firmware: Path) -> SimulatedGuest:
    return machine.launch(firmware)


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest, door: str) -> Iterator[Running]:
    freshness = "challenge" if door == "verdictd-challenge" else "certificate"
    running = Running(tmp_path, machine.chip.root.encoded, guest.measure, freshness)
    yield running
    running.close()


def expected(door: str) -> bytes:
    return OPTIONS if door == "keyprovider" else KEY


def refused(running: Running, door: str, ask: Callable[[], object], *words: str) -> None:
    """No key, an audit record with a reason in which one of `words` stands, and nothing of it for the peer."""
    with pytest.raises((BrokerError, AttestedTlsError)) as refusal:
        ask()
    denied: list[AuditRecord] = []
    until = time.monotonic() + 10
    while not denied and time.monotonic() < until:  # a refused handshake is recorded beside it, not before it
        denied = [record for record in running.records() if record.outcome == "denied"]
    assert denied, "no record of the refusal"
    assert any(word in record.reason for record in denied for word in words), [record.reason for record in denied]
    assert not any(record.action in ("release", "unwrap") and record.outcome == "allowed" for record in running.records())
    if isinstance(refusal.value, DeniedError):
        # What the peer was told is the correlation id alone; the client made the rest of the text.
        assert any(refusal.value.correlation == record.correlation for record in denied)
    for record in denied:
        assert record.reason not in str(refusal.value)


def test_a_guest_that_proves_itself(running: Running, door: str, guest: SimulatedGuest, machine: SimulatedMachine) -> None:
    assert running.ask(door, guest) == expected(door)
    release = [record for record in running.records() if record.action in ("release", "unwrap")][-1]
    assert release.outcome == "allowed"
    assert release.door == door.removesuffix("-challenge")
    assert release.resource == str(PATH)
    assert release.subject["chip_id"] == machine.chip.chip_id
    assert release.subject["measure"] == guest.measure.hex()
    assert running.store.verify_audit().intact
    log = "".join(str(entry.record) for entry in running.store.iterate_audit())
    for secret in (KEY, OPTIONS):
        assert secret.decode() not in log
        assert secret.hex() not in log


def test_wrong_measurement(running: Running, door: str, machine: SimulatedMachine, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(65536))
    other = machine.launch(tmp_path / "other")
    refused(running, door, lambda: running.ask(door, other), "measure")


def test_debug_bit(running: Running, door: str, machine: SimulatedMachine, firmware: Path) -> None:
    refused(running, door, lambda: running.ask(door, machine.launch(firmware, DEBUGGABLE)), "nodbg")


class Replayed:
    """Whatever is asked for, the answer is the evidence of another time."""

    def __init__(self, guest: SimulatedGuest, first: bool) -> None:
        self.guest = guest
        self.honest = first  # the certificate's evidence is its own; a challenge is answered with it again
        self.kept: Evidence | None = None

    def evidence(self, report_data: bytes) -> Evidence:
        if self.honest or self.kept is None:
            self.kept = self.guest.evidence(report_data if self.honest else bytes(64))
            self.honest = False
        return self.kept


def test_stale_nonce(running: Running, door: str, guest: SimulatedGuest) -> None:
    if door == "verdictd":
        # Here the nonce is the key's own: see test_another_tls_key.
        refused(running, door, lambda: _with_foreign_evidence(running, guest), "claims", "user data", "binding")
        return

    def ask() -> bytes:
        try:
            return running.ask(door, Replayed(guest, first=door == "verdictd-challenge"))
        except (BrokerError, AttestedTlsError):
            raise
        except CsvfastError as error:  # the client notices by itself
            raise BrokerError(str(error)) from error

    if door == "verdictd-challenge":
        # Our client would notice; a hostile one says what it likes.
        refused(running, door, lambda: _stale_answer(running, guest), "fresh", "challenge", "nonce", "Attest", "tls-exporter")
    else:
        refused(running, door, ask, "report data")


def _stale_answer(running: Running, guest: SimulatedGuest) -> None:
    """Answers the challenge of one connection with what answered that of another."""
    import base64
    import json

    from csvfast.ratstls import Requirement, connect
    from csvfast.ratstls.freshness import answer_challenge

    host, port = running.doors["verdictd"].rsplit(":", 1)
    identity = Identity.create(guest)
    with connect((host, int(port)), identity, Requirement.unattested()) as first:
        first.send(b'{"command":"Challenge"}')
        challenge = json.loads(first.receive())
        answer = answer_challenge(challenge, first.peer, identity, guest)
        first.send(json.dumps(answer).encode())
        assert json.loads(first.receive())["status"] == "OK"
    with connect((host, int(port)), identity, Requirement.unattested()) as second:
        second.send(b'{"command":"Challenge"}')
        json.loads(second.receive())
        second.send(json.dumps(answer).encode())
        reply = json.loads(second.receive())
        assert reply["status"] == "Fail"
        assert second.receive() == b""  # and that was this connection's end
    assert base64.b64encode(KEY).decode() not in json.dumps(reply)
    raise BrokerError(reply["error"])


def _with_foreign_evidence(running: Running, guest: SimulatedGuest) -> bytes:
    """A certificate about our key with the evidence of another one."""
    theirs, ours = TlsKey.generate(), TlsKey.generate()
    claims = encode_claims(theirs.spki)
    evidence = guest.evidence(report_data_of(claims)).to_rats_tls()
    identity = Identity(ours, make_certificate(ours, encode_evidence_buffer(evidence, claims)))
    return running.ask("verdictd", None, identity=identity)


def test_another_tls_key(running: Running, door: str, guest: SimulatedGuest) -> None:
    if door.startswith("verdictd"):
        refused(running, door, lambda: _with_foreign_evidence(running, guest), "pubkey-hash", "binding", "key")
        return

    class Swapped:
        """Evidence about another key than the one that is sent."""

        def evidence(self, report_data: bytes) -> Evidence:
            return guest.evidence(bytes([report_data[0] ^ 1]) + report_data[1:])

    refused(running, door, lambda: running.ask(door, Swapped()), "report data")


def test_evidence_of_another_chip(running: Running, door: str, guest: SimulatedGuest) -> None:
    with SimulatedMachine() as other:

        class Borrowed:
            """Our report with the certificates of another chip."""

            def evidence(self, report_data: bytes) -> Evidence:
                return Evidence(guest.evidence(report_data).report, hsk_cek=other.chip.hsk_cek, encoding="page")

        refused(running, door, lambda: running.ask(door, Borrowed()), "HSK", "CEK", "PEK", "root")


def test_a_chip_that_is_not_on_the_list(running: Running, door: str, guest: SimulatedGuest) -> None:
    running.administration.put_reference(LOCAL, "csv_cek_fingerprint", ["11" * 32], None)
    refused(running, door, lambda: running.ask(door, guest), "cek_fingerprint")


def test_a_simulated_chip_under_hygons_root(tmp_path: Path, guest: SimulatedGuest, door: str) -> None:
    freshness = "challenge" if door == "verdictd-challenge" else "certificate"
    running = Running(tmp_path, hygon_root().encoded, guest.measure, freshness)
    try:
        refused(running, door, lambda: running.ask(door, guest), "root", "HRK", "HSK")
    finally:
        running.close()


def test_expired_reference(running: Running, door: str, guest: SimulatedGuest) -> None:
    running.measured(guest.measure, expires=1.0)
    refused(running, door, lambda: running.ask(door, guest), "csv_measure", "expired")


def test_revoked_key(running: Running, door: str, guest: SimulatedGuest) -> None:
    running.administration.delete_resource(LOCAL, PATH)
    refused(running, door, lambda: running.ask(door, guest), "no such resource")
