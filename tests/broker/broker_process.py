"""The whole broker as a process of its own, as `csvfast broker serve` starts it, with its guests and administrators in this one.

    with BrokerProcess(directory, machine) as broker:        # csvfast broker init, csvfast broker serve
        broker.kbs_guest(guest).get_resource("disk")
        broker.kill(); broker.start()
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
from broker.simulated_guest import SimulatedGuest, SimulatedMachine

from csvfast.broker.administration import LOCAL, Administration
from csvfast.broker.clients.http import Answer, HttpConnection
from csvfast.broker.clients.kbs import KbsClient
from csvfast.broker.config import Address, BrokerConfig
from csvfast.broker.kbs.jwk import GuestKey
from csvfast.broker.master import open_master
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import AuditRecord, Store
from csvfast.cli import main
from csvfast.errors import AttestedTlsError
from csvfast.ratstls import blocking
from csvfast.ratstls.certificate import attest_certificate
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement
from csvfast.report import Evidence

SECONDS: Final = 60.0
"""That a process gets for what takes one or two on an idle machine."""
PLENTY: Final = '[limits]\nexempt = ["127.0.0.1", "unix"]\nrelease_rate = 0\nsubject_rate = 0\n'
"""Limits for tests that ask faster than guests do."""
TCP_DOORS: Final = ("kbs", "verdictd")
REPLY_BYTES: Final = 16384


class BrokerProcess:
    """A broker in a new directory. A context manager that ends it.

    In: directory   to be made
        machine     whose chip's root is trusted
        url         of the store; None: SQLite in the directory
        limits      table of the configuration
        log         file for its standard error; None: beside the directory
        like        another broker whose store and master key this one shares
    """

    def __init__(
        self,
        directory: Path,
        machine: SimulatedMachine,
        *,
        url: str | None = None,
        limits: str = PLENTY,
        log: Path | None = None,
        like: BrokerProcess | None = None,
    ) -> None:
        self.directory: Final = directory
        self.configuration: Final = directory / "broker.toml"
        self.log: Final = log or directory.parent / f"{directory.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.doors: dict[str, str] = {}
        self.seconds_to_start = 0.0
        self.printed = b""
        self._ports: dict[str, str] = {}
        if like is not None:
            directory.mkdir(mode=0o700)
            for name in ("broker.toml", "master.key", "tls.key", "admin.token", "root-0.cert"):
                (directory / name).write_bytes((like.directory / name).read_bytes())
                (directory / name).chmod(0o600)
            for name in TCP_DOORS:
                self.change(rf'(\[{name}\]\nlisten = )"[^"]*"', r'\1"127.0.0.1:0"')
            return
        root = directory.parent / "root.cert"
        root.write_bytes(machine.chip.root.encoded)
        arguments = ["broker", "init", str(directory), "--root", str(root), "--json"]
        arguments += ["--verdictd", "127.0.0.1:0", "--kbs", "127.0.0.1:0"]
        if url is not None:
            arguments += ["--store", url]
        assert main(arguments) == 0
        self.configuration.write_text(self.configuration.read_text() + limits)

    # ---- The process

    def spawn(self, *, files: int | None = None) -> None:
        """Starts it without waiting. In: files   limit on open ones"""
        assert self.process is None
        before = time.monotonic()
        command = [sys.executable, "-m", "csvfast", "broker", "serve", str(self.directory), "--json"]
        if files is not None:
            command = ["prlimit", f"--nofile={files}", *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        self._spawned = before

    def wait_until_ready(self, seconds: float = SECONDS) -> None:
        """Reads which doors are open, and keeps their ports for later starts."""
        assert self.process is not None
        assert self.process.stdout is not None
        text = b""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
            assert readable, f"not ready after {seconds} s:\n{self.log.read_text()[-4000:]}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"ended with {self.process.wait()} before it was ready:\n{self.log.read_text()[-4000:]}"
            text += data
            try:
                self.doors = json.loads(text)["doors"]
                break
            except ValueError:
                continue
        self.printed += text
        self.seconds_to_start = time.monotonic() - self._spawned
        if not self._ports:
            self._ports = {name: self.doors[name] for name in TCP_DOORS if name in self.doors}
            for name, address in self._ports.items():
                self.change(rf'(\[{name}\]\nlisten = )"[^"]*"', rf'\1"{address}"')

    def start(self, **options: Any) -> None:
        """Starts it and waits until its doors are open."""
        self.spawn(**options)
        self.wait_until_ready()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self._end()

    def stop(self, number: int = signal.SIGTERM, seconds: float = SECONDS) -> int:
        """Ends it as an operator does. Out: its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self._end(seconds)

    def _end(self, seconds: float = SECONDS) -> int:
        process, self.process = self.process, None
        assert process is not None
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            self.printed += process.stdout.read()
            process.stdout.close()
        return code

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def __enter__(self) -> Self:
        if self.process is None:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.kill()
        if error is not None and self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines()
            error.add_note("\n".join(["The broker's log ends:", *[line[:400] for line in lines[-12:]]]))

    # ---- Its files

    def change(self, pattern: str, replacement: str) -> None:
        """Changes its configuration."""
        text, count = re.subn(pattern, replacement, self.configuration.read_text())
        assert count == 1, pattern
        self.configuration.write_text(text)

    def events(self) -> list[dict[str, Any]]:
        """Its log: nothing but JSON, one object a line."""
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Its store, opened here."""
        config = BrokerConfig.load(self.directory)
        with Store.open(config.store_url, open_master(config.master, base=config.base)) as opened:
            yield opened

    @contextmanager
    def desk(self) -> Iterator[Administration]:
        """Administration by its owner."""
        with self.store() as opened:
            yield Administration(opened)

    def allow(self, *guests: SimulatedGuest) -> None:
        """The measurements of these guests are good ones."""
        with self.desk() as desk:
            desk.put_reference(LOCAL, "csv_measure", sorted({guest.measure.hex() for guest in guests}), None)

    def records(self, after: int = 0) -> list[tuple[int, AuditRecord]]:
        with self.store() as opened:
            return [(entry.sequence, entry.record) for entry in opened.iterate_audit(after=after)]

    @property
    def token(self) -> str:
        """The first administrator's."""
        return (self.directory / "admin.token").read_text()

    # ---- Who comes to its doors

    @property
    def kbs(self) -> str:
        return f"http://{self._ports['kbs']}"

    @property
    def verdictd(self) -> tuple[str, int]:
        address = Address.parse(self._ports["verdictd"])
        return address.host, address.port

    def http(self, *, timeout: float = SECONDS) -> HttpConnection:
        return HttpConnection(self.kbs, timeout=timeout)

    def administrator(self, *, timeout: float = SECONDS) -> HttpAdministrator:
        return HttpAdministrator(self.http(timeout=timeout), self.token)

    def kbs_guest(self, guest: SimulatedGuest, *, timeout: float = SECONDS, patience: float = 0.0) -> KbsClient:
        """In: patience   seconds between the tries of a handshake"""
        return KbsClient(self.kbs, guest, timeout=timeout, sleep=lambda _seconds: time.sleep(patience))

    def verdictd_identity(self, guest: SimulatedGuest) -> VerdictdIdentity:
        spki = TlsKey.load((self.directory / "tls.key").read_bytes()).spki_sha256
        return VerdictdIdentity(guest, spki)

    def verdictd_guest(self, guest: SimulatedGuest, *, timeout: float = SECONDS) -> VerdictdGuest:
        return VerdictdGuest(self.verdictd, self.verdictd_identity(guest), timeout=timeout)


class HttpAdministrator:
    """An administrator over HTTP."""

    def __init__(self, http: HttpConnection, token: str) -> None:
        self.http = http
        self.headers = {"Authorization": f"Bearer {token}"}

    def put(self, path: str, content: bytes) -> int:
        """A new version. Out: its number, when it has been acknowledged."""
        answer = self.request("POST", f"/csvfast/v0/resource/{path}", content)
        assert answer.status == 200, answer
        version = json.loads(answer.body)["version"]
        assert isinstance(version, int)
        return version

    def delete(self, path: str) -> None:
        answer = self.request("DELETE", f"/kbs/v0/resource/{path}")
        assert answer.status == 200, answer

    def put_reference(self, name: str, values: list[Any]) -> None:
        body = json.dumps({"values": values, "expires": None}).encode()
        answer = self.request("PUT", f"/csvfast/v0/references/{name}", body)
        assert answer.status == 204, answer

    def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        return self.http.request(method, path, body, self.headers, repeatable=False)

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class VerdictdIdentity:
    """A guest's TLS key with a certificate about it; the broker is known by its key. Good for many connections."""

    def __init__(self, guest: SimulatedGuest, broker: bytes) -> None:
        self.key = TlsKey.generate("p256")
        identity = Identity(self.key, attest_certificate(self.key, guest))
        self.requirement = Requirement.pinned({broker})
        self.identity = identity
        self.context = EndpointContext.client(identity, self.requirement, TlsOptions())


class VerdictdGuest:
    """One connection of a guest that writes and reads Verdictd's JSON by itself, as eaa_kbc does."""

    def __init__(self, address: tuple[str, int], who: VerdictdIdentity, *, timeout: float = SECONDS) -> None:
        self.who: Final = who.key.spki_sha256.hex()
        """How audit records call it."""
        self.stream = blocking.connect(
            address, who.identity, who.requirement, timeout=timeout, idle=timeout, context=who.context
        )

    def ask(self, command: str, **members: Any) -> Any:
        """Out: the reply's JSON. AttestedTlsError: the broker has closed the connection instead."""
        reply = self.raw(json.dumps({"command": command, **members}).encode())
        if not reply:
            raise AttestedTlsError("closed", "closed instead of a reply")
        return json.loads(reply)

    def raw(self, request: bytes) -> bytes:
        """Out: the reply; b"" when the broker has closed the connection."""
        self.stream.send(request)
        reply = bytearray()
        while True:
            data = self.stream.receive(REPLY_BYTES)
            reply += data
            if len(data) < REPLY_BYTES:
                return bytes(reply)

    def key(self, kid: str) -> bytes:
        """Get KEK. KeyError: refused; its text is the error."""
        reply = self.ask("Get KEK", kids=[kid])
        if reply["status"] != "OK":
            assert reply["data"] == {}
            raise KeyError(reply["error"])
        return base64.b64decode(reply["data"][kid], validate=True)

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def kbs_name(client: KbsClient) -> str:
    """How audit records call a guest of the KBS door."""
    return GuestKey(client._jwk).thumbprint


def new_key() -> bytes:
    return secrets.token_bytes(32)


def resource(name: str) -> ResourcePath:
    return ResourcePath("default", "key", name)


@pytest.fixture(scope="module")
def broker_machine() -> Iterator[SimulatedMachine]:
    """A chip on which guests run. Its host serves one thread at a time; reports take 0.3 ms."""
    with SimulatedMachine() as made:
        yield made


@pytest.fixture(scope="module")
def broker_guest(broker_machine: SimulatedMachine, tmp_path_factory: pytest.TempPathFactory) -> LockedGuest:
    """A guest on it that may be used by many threads."""
    firmware = tmp_path_factory.mktemp("firmware") / "firmware"
    firmware.write_bytes(bytes(range(256)) * 16)
    return LockedGuest(broker_machine.launch(firmware))


class LockedGuest(SimulatedGuest):
    """A guest that many threads may ask for reports."""

    def __init__(self, guest: SimulatedGuest) -> None:
        super().__init__(guest.machine, guest.handle, guest.measure)
        self._lock = threading.Lock()

    def evidence(self, report_data: bytes) -> Evidence:
        with self._lock:
            return super().evidence(report_data)
