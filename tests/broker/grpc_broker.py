"""A real broker with its gRPC doors, in a thread with an event loop of its own: store, administration, listeners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.broker.administration import LOCAL, Administration, Administrator
from csvfast.broker.attestation import Attestation, Trust
from csvfast.broker.clientapi import ClientApi
from csvfast.broker.config import Address, GrpcConfig
from csvfast.broker.core import Broker
from csvfast.broker.grpc_server import GrpcServer
from csvfast.broker.kbs.ear import TokenIssuer
from csvfast.broker.kbs.jwk import jwk_of
from csvfast.broker.kbs.rcar import Rcar
from csvfast.broker.keyprovider import KeyProvider
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import Door, ResourcePath
from csvfast.broker.policy import Decision
from csvfast.broker.store import Store
from csvfast.certs import ManufacturingLine

T = TypeVar("T")
KEK = ResourcePath.parse("default/key/images")
_line: list[ManufacturingLine] = []


def _roots() -> tuple[Any, ...]:
    if not _line:
        _line.append(ManufacturingLine.create())
    return (_line[0].root,)


class GrpcBroker:
    """A broker over a new SQLite store in `directory`. A context manager.

    In: certificates   administrators by certificate, see Administration
    """

    def __init__(
        self,
        directory: Path,
        *,
        limits: LimitsConfig | None = None,
        certificates: Mapping[str, Administrator] | None = None,
    ) -> None:
        directory.chmod(0o700)
        self.directory = directory
        self.store = Store.open(f"sqlite:///{directory / 'broker.db'}", FileMaster.create(directory / "master.key"), create=True)
        self.limits = Limits(limits)
        self.broker = Broker(self.store, Trust(_roots()), self.limits)
        self.administration = Administration(self.store, limits=self.limits, certificates=certificates)
        self.issuer = TokenIssuer(ec.generate_private_key(ec.SECP256R1()))
        self.other_issuer = TokenIssuer(ec.generate_private_key(ec.SECP256R1()))
        trusted = self.other_issuer._key.raw_value.public_key()
        self.rcar = Rcar(self.broker, TokenIssuer(ec.generate_private_key(ec.SECP256R1()), trusted=[trusted]))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: list[GrpcServer] = []

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def serve_keys(self, listen: str = "127.0.0.1:0", *, options: Mapping[str, Any] | None = None, **config: Any) -> str:
        """Starts a key provider. Out: where it listens. In: options of KeyProvider, members of GrpcConfig."""

        async def start() -> GrpcServer:
            door = KeyProvider(self.broker, self.administration, **(options or {}))
            return await self._start(listen, config, Door.KEYPROVIDER, door.handlers(), frozenset({"keys"}))

        return self.run(start()).address

    def serve_api(self, listen: str = "127.0.0.1:0", **config: Any) -> str:
        """Starts the client API. Out: where it listens."""

        async def start() -> GrpcServer:
            door = ClientApi(self.broker, self.administration)
            return await self._start(listen, config, Door.CLIENTAPI, door.handlers(), frozenset({"keys", "policy"}))

        return self.run(start()).address

    async def _start(self, listen: str, config: Any, door: Door, handlers: Any, roles: frozenset[str]) -> GrpcServer:
        server = GrpcServer(
            GrpcConfig(Address.parse(listen, self.directory), **config),
            door,
            handlers,
            administration=self.administration,
            broker=self.broker,
            guests=self.rcar,
            local_roles=roles,
        )
        await server.start()
        self._servers.append(server)
        return server

    def stop_servers(self) -> None:
        for server in self._servers:
            self.run(server.stop())
        self._servers.clear()

    def token(self, *roles: str, name: str = "test", scope: str = "*") -> str:
        """An administrator's token."""
        secret = self.administration.create_token(LOCAL, name, roles, scope=scope)
        return bytes(memoryview(secret)).decode()

    def guest_token(self, status: str = "affirming", issuer: TokenIssuer | None = None) -> tuple[str, ec.EllipticCurvePrivateKey]:
        """A token about a guest, by an issuer that the broker trusts, and the guest's key."""
        key = ec.generate_private_key(ec.SECP256R1())
        runtime = {"tee-pubkey": jwk_of(key.public_key())}
        decision = Decision(status == "affirming", status=status)
        attestation = Attestation("csv", {"csv": {}}, decision, {"appraisal": "default_cpu"}, "00" * 32, "", runtime, 0, None)
        return (issuer or self.other_issuer).issue(attestation), key

    def put_key(self, path: ResourcePath = KEK) -> bytes:
        """A new key-encryption key (or a new version of it). Out: its bytes."""
        self.administration.create_key(LOCAL, path)
        found = self.store.resource(path)
        assert found is not None
        return bytes(memoryview(found.content))

    def records(self, **filters: str) -> list[Any]:
        """Audit records, oldest first."""
        self.run(asyncio.to_thread(lambda: self.store.committer.run(_nothing())))
        return [entry.record for entry in self.store.iterate_audit(**filters)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop_servers()
        finally:
            self.run(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._loop.close()
            self.store.close()


def _nothing() -> Any:
    from csvfast.broker.store import Job

    return Job()
