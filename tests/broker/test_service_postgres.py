"""Whole brokers on PostgreSQL: it goes down under load and comes back; two brokers on one database are one broker to guests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from broker.broker_load import NAMES, Ledger, Load, put_first
from broker.broker_process import PLENTY, BrokerProcess, LockedGuest, new_key, resource
from broker.services import PostgresCluster
from broker.simulated_guest import SimulatedMachine
from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.broker.clients.http import Answer, HttpConnection
from csvfast.broker.kbs.errors import ERROR_BASE
from csvfast.broker.kbs.jwe import open_jwe
from csvfast.broker.kbs.jwk import jwk_of
from csvfast.broker.kbs.report_data import report_data
from csvfast.errors import DeniedError, UnavailableError

RECOVERY_SECONDS: Final = 10.0
KINDS: Final = ("kbs", "verdictd", "administrator")


@pytest.mark.timeout(180)
def test_restarted_under_load(
    postgres: PostgresCluster, postgres_url: str, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    ledger = Ledger()
    with BrokerProcess(tmp_path / "broker", broker_machine, url=postgres_url) as broker:
        broker.allow(broker_guest)
        put_first(broker, ledger)
        assert broker.process is not None
        process = broker.process.pid
        with Load(broker, broker_guest, ledger) as load:
            for mode, end in (("stopped", postgres.stop), ("killed", postgres.kill)):
                wait_for(load, KINDS)
                before = len(load.errors)
                end()
                down = time.monotonic()
                # What was under way may still be answered: it had been committed.
                time.sleep(0.5)
                received = ledger.acknowledged
                time.sleep(1.0)
                assert ledger.acknowledged == received, "released while no record could be written"
                kinds = {kind for when, kind, _ in load.errors[before:] if when > down}
                assert kinds == set(KINDS)
                with broker.http() as http:
                    assert http.request("GET", "/healthz").status == 503
                postgres.start()
                since = time.monotonic()
                wait_for(load, KINDS)
                print(f"PostgreSQL {mode}: served again after {time.monotonic() - since:.1f} s")
        for _, kind, error in load.errors:
            # In each protocol's own words; a broken connection is not among them.
            if kind == "kbs":
                assert isinstance(error, DeniedError), error
                assert "not available" in error.reason
            elif kind == "verdictd":
                # A handshake is judged by the policies of now: without the database by none.
                assert "temporarily unavailable" in str(error) or "closed" in str(error), error
            else:
                # csvfast's own interface, and CoCo's, which has but one status for everything.
                assert "status=503" in str(error) or ("status=401" in str(error) and "not available" in str(error)), error
        assert broker.process.pid == process
        assert broker.stop() == 0
        events = broker.events()
        assert any(one["event"] == "nothing written" and one["level"] == "error" for one in events)
        password = postgres.password
        assert not any(password in json.dumps(one) for one in events)
        with broker.store() as store:
            ledger.check(store)


def wait_for(load: Load, kinds: tuple[str, ...], seconds: float = RECOVERY_SECONDS) -> None:
    """Until requests of all kinds have been answered, from now on."""
    now = time.monotonic()
    while not all(load.answered.get(kind, 0.0) > now for kind in kinds):
        assert time.monotonic() < now + seconds, {kind: now - load.answered.get(kind, 0.0) for kind in kinds}
        assert not load.defects, load.defects
        time.sleep(0.02)


@contextmanager
def two_brokers(url: str, machine: SimulatedMachine, directory: Path) -> Iterator[tuple[BrokerProcess, BrokerProcess]]:
    first = BrokerProcess(directory / "first", machine, url=url, limits=PLENTY)
    second = BrokerProcess(directory / "second", machine, like=first)
    first.spawn()
    second.spawn()
    with first, second:
        first.wait_until_ready()
        second.wait_until_ready()
        yield first, second
        assert first.stop() == 0
        assert second.stop() == 0


class Traveller:
    """A guest of the KBS that asks another broker at each step, as behind a balancer."""

    def __init__(self, guest: LockedGuest) -> None:
        self.guest = guest
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.headers: dict[str, str] = {}
        self.token = ""
        self._nonce = ""

    def _keep_cookie(self, answer: Answer) -> None:
        self.headers = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}

    def ask_challenge(self, http: HttpConnection) -> None:
        answer = http.request("POST", "/kbs/v0/auth", b'{"version":"0.4.0","tee":"csv","extra-params":""}')
        assert answer.status == 200, answer
        self._keep_cookie(answer)
        self._nonce = json.loads(answer.body)["nonce"]

    def attest(self, http: HttpConnection) -> Answer:
        jwk = jwk_of(self.key.public_key())
        evidence = json.loads(self.guest.evidence(report_data(self._nonce, jwk)).to_json())
        body = {
            "runtime-data": {"nonce": self._nonce, "tee-pubkey": jwk},
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
        }
        answer = http.request("POST", "/kbs/v0/attest", json.dumps(body).encode(), self.headers)
        if answer.status == 200:
            self._keep_cookie(answer)
            self.token = json.loads(answer.body)["token"]
        return answer

    def get(self, http: HttpConnection, path: str, *, by_token: bool = False) -> bytes | None:
        """None: refused."""
        headers = {"Authorization": f"Bearer {self.token}"} if by_token else self.headers
        answer = http.request("GET", f"/kbs/v0/resource/{path}", headers=headers)
        if answer.status == 200:
            return bytes(open_jwe(self.key, answer.body))
        assert answer.status == 401
        assert json.loads(answer.body)["type"].startswith(ERROR_BASE)
        return None


@pytest.mark.timeout(180)
def test_two_brokers(
    postgres_url: str, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    with two_brokers(postgres_url, broker_machine, tmp_path) as (first, second):
        first.allow(broker_guest)
        with (
            first.http() as here, second.http() as there, first.administrator() as one, second.administrator() as other,
            first.verdictd_guest(broker_guest) as talking_here, second.verdictd_guest(broker_guest) as talking_there,
        ):  # fmt: skip
            content = new_key()
            one.put("default/key/shared", content)
            for start, end in ((here, there), (there, here)):
                # The challenge of one, attested at the other, and the key from the first; and by token from both.
                guest = Traveller(broker_guest)
                guest.ask_challenge(start)
                assert guest.attest(end).status == 200
                token = guest.token
                assert guest.get(start, "default/key/shared") == content
                assert guest.get(end, "default/key/shared") == content
                assert guest.get(start, "default/key/shared", by_token=True) == content
                assert guest.get(end, "default/key/shared", by_token=True) == content
                # A nonce is good for one attestation at all of them together: the second gives the same token.
                assert guest.attest(start).status == 200
                assert guest.token == token
                # A nonce of one session does not attest another.
                stranger = Traveller(broker_guest)
                stranger.ask_challenge(start)
                stranger._nonce = guest._nonce
                assert stranger.attest(end).status == 401
                assert stranger.get(end, "default/key/shared") is None
            for turn in range(20):
                changing, asked = ((one, there), (other, here))[turn % 2]
                talking = (talking_there, talking_here)[turn % 2]
                path, content = f"default/key/passing-{turn}", new_key()
                assert guest.get(asked, path) is None
                changing.put(path, content)
                assert guest.get(asked, path) == content, "put at one, asked for at the other"
                assert talking.key(f"passing-{turn}") == content
                changing.put(path, content := new_key())
                assert guest.get(asked, path) == content
                changing.delete(path)
                assert guest.get(asked, path) is None, "deleted at one, still released by the other"
                with pytest.raises(KeyError, match="not allowed"):
                    talking.key(f"passing-{turn}")
            # Withdrawn reference values count for sessions and connections that are there already, and for new ones.
            one.put_reference("csv_measure", ["00" * 32])
            assert guest.get(there, "default/key/shared") is None
            with pytest.raises(KeyError, match="not allowed"):
                talking_there.key("shared")
            newcomer = Traveller(broker_guest)
            newcomer.ask_challenge(there)
            assert newcomer.attest(there).status == 401
            other.put_reference("csv_measure", [broker_guest.measure.hex()])
            assert talking_here.key("shared") == guest.get(here, "default/key/shared")
        with first.store() as store:
            found = store.verify_audit()
            assert found.intact, found


@pytest.mark.timeout(180)
def test_one_of_two_killed(
    postgres_url: str, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    """In the middle of a transaction, whose locks keep nobody up for long; the audit log is one."""
    ledger = Ledger()
    with two_brokers(postgres_url, broker_machine, tmp_path) as (first, second):
        first.allow(broker_guest)
        put_first(first, ledger)
        with Load(first, broker_guest, ledger) as load, Load(second, broker_guest, ledger, writes=False) as other:
            longest = 0.0
            for _ in range(2):
                wait_for(load, KINDS)
                wait_for(other, KINDS[:2])
                second.kill()
                since = time.monotonic()
                wait_for(load, KINDS)
                longest = max(longest, time.monotonic() - since)
                second.start()
                wait_for(other, KINDS[:2])
        assert not load.errors, load.errors[:3]
        print(f"the other broker served on after {longest:.2f} s")
        assert len(ledger.received) > 10 * len(NAMES)
        for broker in (first, second):
            with broker.kbs_guest(broker_guest) as client:
                client.handshake()
                with pytest.raises((DeniedError, UnavailableError)):
                    client.get_resource(resource("never-put"))
        with first.store() as store:
            ledger.check(store)
