"""A broker with Verdictd's door, and guests on simulated chips that come to it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from attest.simulated_evidence import MEASURE, Platform
from ratstls.simulated_peers import SimulatedAttester, guest

from csvfast.broker.administration import LOCAL, Administration
from csvfast.broker.attestation import Trust
from csvfast.broker.clients.verdictd import AsyncVerdictdClient, VerdictdClient
from csvfast.broker.config import Address, VerdictdConfig
from csvfast.broker.core import Broker
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import AuditRecord, Job, Store
from csvfast.broker.verdictd import VerdictdDoor
from csvfast.ratstls.asynchronous import open_connection
from csvfast.ratstls.context import Identity, TlsOptions
from csvfast.ratstls.peer import Requirement
from csvfast.ratstls.stream import Stream

T = TypeVar("T")

NO_LIMITS: dict[str, Any] = {"request_rate": 0.0, "release_rate": 0.0, "subject_rate": 0.0, "failures": 0}
KEY = b"the key of a disk, 32 bytes long"
SECONDS = 60  # for a whole test: far more than any needs


class Rig:
    """A store with one key and one reference value, a broker, and what its door is made with.

    In: limits   that are not off
        config   of the door, beside where it listens
        door     further arguments of VerdictdDoor
    """

    def __init__(
        self, directory: Path, platform: Platform, *, limits: dict[str, Any] | None = None, config: dict[str, Any] | None = None,
        **door: Any,
    ) -> None:  # fmt: skip
        self.platform = platform
        master = FileMaster.create(directory / "master.key")
        self.store = Store.open(f"sqlite:///{directory}/broker.db", master, create=True)
        self.limits = Limits(LimitsConfig(**(NO_LIMITS | (limits or {}))))
        self.broker = Broker(self.store, Trust(tuple(platform.roots)), self.limits)
        self.administration = Administration(self.store)
        self.put("default/key/disk", KEY)
        self.administration.put_reference(LOCAL, "csv_measure", [MEASURE.hex()], None)
        self.config = VerdictdConfig(**({"listen": Address("127.0.0.1", 0)} | (config or {})))
        self.door_arguments = door
        self.door: VerdictdDoor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.store.close()

    def put(self, path: str, content: bytes) -> int:
        return self.administration.put_resource(LOCAL, ResourcePath.parse(path), content)

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Runs `work` while the door is open."""

        async def whole() -> T:
            async with VerdictdDoor(self.broker, self.config, **self.door_arguments) as self.door:
                async with asyncio.timeout(SECONDS):
                    return await work()

        return asyncio.run(whole())

    def converse(self, work: Callable[[AsyncVerdictdClient], Awaitable[T]], **client: Any) -> T:
        """The same, with a client that has connected."""

        async def whole() -> T:
            async with self.client(**client) as connected:
                return await work(connected)

        return self.run(whole)

    # ---- For work

    @property
    def address(self) -> tuple[str, int] | Path:
        listen = Address.parse(self.door.address)
        return listen.path or (listen.host, listen.port)

    @property
    def pinned(self) -> Requirement:
        return Requirement.pinned({self.door.identity.key.spki_sha256})

    def attester(self, **changes: Any) -> SimulatedAttester:
        return SimulatedAttester(self.platform, **({"mnonce": os.urandom(16)} | changes))

    def client(self, **arguments: Any) -> AsyncVerdictdClient:
        given = {"attester": self.attester(), "requirement": self.pinned} | arguments
        return AsyncVerdictdClient(self.address, given.pop("attester"), given.pop("requirement"), **given)

    def blocking_client(self, **arguments: Any) -> VerdictdClient:
        given = {"attester": self.attester(), "requirement": self.pinned} | arguments
        return VerdictdClient(self.address, given.pop("attester"), given.pop("requirement"), **given)

    async def connect(self, identity: Identity | None = None, options: TlsOptions | None = None) -> Stream:
        """A guest's connection without a client's manners."""
        return await open_connection(
            self.address, identity or new_guest(self.platform), self.pinned, options=options or TlsOptions()
        )

    # ---- Afterwards

    def records(self, **members: Any) -> list[AuditRecord]:
        """Records of the door, with these members; those that nobody waits for, too."""
        self.store.committer.run(Job())
        found = [entry.record for entry in self.store.iterate_audit() if entry.record.door == "verdictd"]
        return [one for one in found if all(getattr(one, name) == value for name, value in members.items())]


def new_guest(platform: Platform, **changes: Any) -> Identity:
    """A guest's key and certificate; its report has a nonce of its own, as real ones have."""
    return guest(platform, **({"mnonce": os.urandom(16)} | changes))


async def ask(stream: Stream, request: bytes | dict[str, Any]) -> bytes:
    """One request, one reply of one record."""
    await stream.send(request if isinstance(request, bytes) else json.dumps(request).encode())
    return await stream.receive()


async def ended(stream: Stream) -> bool:
    """True when the other end has closed the connection, having said so."""
    found = await stream.receive()
    stream.close()
    return found == b""
