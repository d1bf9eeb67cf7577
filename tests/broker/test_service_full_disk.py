"""A whole broker whose disk is full: every door refuses in its own protocol's words, no key leaves, and room is all it needs."""

from __future__ import annotations

import base64
import json
import resource as limits
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, Self

import pytest
from broker.broker_load import Ledger, put_first
from broker.broker_process import BrokerProcess, LockedGuest, VerdictdGuest, kbs_name, new_key
from broker.simulated_guest import SimulatedMachine

from csvfast.broker.clients.clientapi import ClientApiClient
from csvfast.broker.clients.kbs import KbsClient
from csvfast.broker.clients.keyprovider import KeyProviderClient
from csvfast.broker.kbs.errors import ERROR_BASE
from csvfast.broker.kbs.jwe import open_jwe
from csvfast.crypto import Secret
from csvfast.errors import RequestError, UnavailableError

DISK_BYTES: Final = 4 << 20
TRIES: Final = 4000
"""Requests until the log of the database has used up what it had reserved."""
OPTIONS: Final = b'{"symkeyopts":{}}'


class Room(Protocol):
    """Where the broker's files are."""

    directory: Path

    def fill(self, broker: BrokerProcess) -> None:
        """Nothing more can be written."""

    def free(self, broker: BrokerProcess) -> None:
        """It can again."""


class Disk:
    """A file system in memory, filled by another file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self, broker: BrokerProcess) -> None:
        with self._ballast.open("wb", buffering=0) as file, suppress(OSError):
            for block in (65536, 4096):
                with suppress(OSError):
                    while True:
                        file.write(bytes(block))

    def free(self, broker: BrokerProcess) -> None:
        self._ballast.unlink()


class FileSize:
    """No file of the process may become longer than the longest is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, broker: BrokerProcess) -> None:
        longest = max(path.stat().st_size for path in broker.directory.iterdir())
        self._limit(broker, longest)

    def free(self, broker: BrokerProcess) -> None:
        self._limit(broker, limits.RLIM_INFINITY)

    @staticmethod
    def _limit(broker: BrokerProcess, length: int) -> None:
        assert broker.process is not None
        limits.prlimit(broker.process.pid, limits.RLIMIT_FSIZE, (length, limits.RLIM_INFINITY))


@pytest.fixture(params=["disk", "file size"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    """Where this user may mount nothing, a limit on files stands in for the disk."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(place)]
    if request.param == "disk" and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        yield Disk(place)
        subprocess.run(["umount", "-l", str(place)], check=True)
    else:
        yield FileSize(place)


class Refusals:
    """Asks at every door, notes what is released, and every byte of every refusal."""

    def __init__(self, broker: BrokerProcess, guest: LockedGuest, ledger: Ledger) -> None:
        self.broker, self.guest, self.ledger = broker, guest, ledger
        self.said: list[bytes] = []
        self.kbs: KbsClient = broker.kbs_guest(guest)
        self.kbs.handshake()
        self.http = broker.http()
        self.verdictd: VerdictdGuest = broker.verdictd_guest(guest)
        self.provider = KeyProviderClient(broker.doors["keyprovider"])
        self.packet = self.provider.wrap(Secret(OPTIONS), "images")
        self.api = ClientApiClient(broker.doors["clientapi"])
        self.uuid = self.api.create_key()
        self.key = bytes(self.api.get_key(self.uuid))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for one in (self.kbs, self.http, self.verdictd, self.provider, self.api):
            one.close()

    # Each is True when it was served.

    def kbs_resource(self) -> bool:
        answer = self.http.request("GET", "/kbs/v0/resource/default/key/one", headers=self.kbs._headers())
        if answer.status == 200:
            self.ledger.received[kbs_name(self.kbs), "one", bytes(open_jwe(self.kbs._key, answer.body))] += 1
            return True
        self.said.append(answer.body)
        assert answer.status == 401
        error = json.loads(answer.body)
        assert set(error) == {"type", "detail"}
        assert error["type"].startswith(ERROR_BASE)
        assert error["detail"] == f"not available ({answer.headers['x-csvfast-correlation']})"
        return False

    def kbs_handshake(self) -> bool:
        answer = self.http.request("POST", "/kbs/v0/auth", b'{"version":"0.4.0","tee":"csv","extra-params":""}')
        self.said.append(answer.body)
        if answer.status == 200:
            return True
        assert answer.status == 401
        assert json.loads(answer.body)["type"] == f"{ERROR_BASE}AttestationError"
        assert "set-cookie" not in answer.headers
        return False

    def administration(self) -> bool:
        content = new_key()
        self.ledger.puts["three"].append((content, False))
        answer = self.http.request(
            "POST", "/csvfast/v0/resource/default/key/three", content, {"Authorization": f"Bearer {self.broker.token}"}
        )
        self.said.append(answer.body)
        if answer.status == 200:
            self.ledger.puts["three"][-1] = (content, True)
            return True
        assert answer.status == 503
        assert json.loads(answer.body)["error"] == "unavailable"
        return False

    def health(self) -> bool:
        return self.http.request("GET", "/healthz").status == 200

    def verdictd_key(self) -> bool:
        reply = self.verdictd.ask("Get KEK", kids=["two"])
        if reply["status"] == "OK":
            self.ledger.received[self.verdictd.who, "two", base64.b64decode(reply["data"]["two"])] += 1
            return True
        self.said.append(json.dumps(reply).encode())
        assert set(reply) == {"status", "data", "error"}
        assert (reply["status"], reply["data"]) == ("Fail", {})
        assert reply["error"].startswith("temporarily unavailable (")
        return False

    def verdictd_resource(self) -> bool:
        reply = base64.b64decode(
            self.verdictd.raw(b'{"command":"Get Resource","optional":{"resource_path":"default/key/one"}}'), validate=True
        )
        if len(reply) == 32:
            self.ledger.received[self.verdictd.who, "one", reply] += 1
            return True
        self.said.append(reply)
        error = json.loads(reply)
        assert error["status"] == "Fail"
        assert error["error"].startswith("temporarily unavailable (")
        return False

    def verdictd_anew(self) -> bool:
        """Whoever connects now is no better off."""
        with self.broker.verdictd_guest(self.guest) as other:
            self.verdictd, kept = other, self.verdictd
            try:
                return self.verdictd_key()
            finally:
                self.verdictd = kept

    def key_provider(self) -> bool:
        return self._grpc(lambda: bytes(self.provider.unwrap(self.packet)) == OPTIONS)

    def client_api(self) -> bool:
        return self._grpc(lambda: bytes(self.api.get_key(self.uuid)) == self.key)

    def client_api_create(self) -> bool:
        try:
            return bool(self.api.create_key())
        except RequestError as error:
            assert str(error).endswith("Greate key failed")  # noqa: PT017  # the original's spelling
            return False

    def _grpc(self, call: Callable[[], bool]) -> bool:
        try:
            assert call()
        except UnavailableError as error:
            self.said.append(str(error).encode())
            return False
        return True

    def all(self) -> list[Callable[[], bool]]:
        return [
            self.kbs_resource, self.kbs_handshake, self.administration, self.health, self.verdictd_key, self.verdictd_resource,
            self.verdictd_anew, self.key_provider, self.client_api, self.client_api_create,
        ]  # fmt: skip


def refused_at_last(ask: Callable[[], bool]) -> bool:
    until = time.monotonic() + 3  # an answer about health is good for a second
    count = 0
    while count < TRIES or time.monotonic() < until:
        count += 1
        if not ask():
            return True
    return False


@pytest.mark.timeout(180)
def test_no_room(room: Room, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path) -> None:
    ledger = Ledger()
    with BrokerProcess(room.directory / "broker", broker_machine, log=tmp_path / "log") as broker:
        broker.allow(broker_guest)
        put_first(broker, ledger)
        with broker.administrator() as administrator:
            administrator.put("default/key/images", new_key())
            # The database becomes longer than the log of the service, whose file has the same limit.
            administrator.put("default/file/large", bytes(1 << 20))
        slowest = 0.0
        with Refusals(broker, broker_guest, ledger) as refusals:
            for _ in range(2):
                lines = len(broker.events())
                room.fill(broker)
                for ask in refusals.all():
                    # What fits into pages that the database has already is written and served, as it should be.
                    assert refused_at_last(ask), f"{ask.__name__} was served {TRIES} times without any room"
                assert broker.is_running
                complaints = [one for one in broker.events()[lines:] if one["level"] == "error"]
                assert complaints
                assert any("broker.db" in str(one.get("error")) for one in complaints), "which file it is"
                assert any("full" in str(one.get("error")) or "I/O" in str(one.get("error")) for one in complaints)
                room.free(broker)
                since = time.monotonic()
                for ask in refusals.all():
                    while not ask():
                        assert time.monotonic() < since + 10, f"{ask.__name__} is not served again"
                        time.sleep(0.05)
                slowest = max(slowest, time.monotonic() - since)
            secrets = {*ledger.secrets(), refusals.key}
            for said in refusals.said:
                for secret in secrets:
                    assert secret not in said
                    assert base64.b64encode(secret) not in said
        assert broker.stop() == 0
        with broker.store() as store:
            ledger.check(store)
        print(f"{room}: served again {slowest:.2f} s after there was room")


def test_started_without_room(broker_machine: SimulatedMachine, tmp_path: Path) -> None:
    """One line, and no harm done."""
    broker = BrokerProcess(tmp_path / "broker", broker_machine)
    before = (broker.directory / "broker.db").read_bytes()
    ended = subprocess.run(
        ["prlimit", "--fsize=4096", "--", sys.executable, "-m", "csvfast", "broker", "serve", str(broker.directory)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 3
    lines = ended.stderr.splitlines()
    assert [line for line in lines if not line.startswith("{")] == lines[-1:]
    assert lines[-1].startswith("csvfast: error: ")
    assert (broker.directory / "broker.db").read_bytes() == before
    with broker:
        assert broker.stop() == 0
