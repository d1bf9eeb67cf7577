"""The broker as one service: every door that the configuration opens, on one event loop, over one store.

Several of them may run on one store, on one machine or, with PostgreSQL, on many: sessions, keys, policies and the audit log are
shared, and a change made by one counts for the others with their next decision.

Thread-safety: `run` belongs to the main thread, for it takes the signals.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

import csvfast.broker._serving  # noqa: F401 it says what is missing
from csvfast.broker.administration import ROLES, Administration, Administrator
from csvfast.broker.attestation import Trust
from csvfast.broker.clientapi import ClientApi
from csvfast.broker.core import Broker
from csvfast.broker.grpc_server import GrpcServer
from csvfast.broker.kbs.admin import Administrators
from csvfast.broker.kbs.admin_tokens import AdministratorKey
from csvfast.broker.kbs.app import KbsApp
from csvfast.broker.kbs.ear import TokenIssuer
from csvfast.broker.kbs.server import HttpLimits, KbsServer, tls_context
from csvfast.broker.keyprovider import KeyProvider
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.logs import event
from csvfast.broker.model import Door
from csvfast.broker.process import keep_memory_private
from csvfast.broker.verdictd import VerdictdDoor
from csvfast.certs.private import read_private_file
from csvfast.crypto import Secret
from csvfast.errors import BrokerError, FormatError, StateError
from csvfast.ratstls.asynchronous import ConnectionLimits, raise_open_file_limit
from csvfast.ratstls.attester import DeviceAttester

if TYPE_CHECKING:
    from csvfast.broker.config import BrokerConfig, GrpcConfig, KbsConfig, VerdictdConfig
    from csvfast.broker.grpc_server import Handler
    from csvfast.broker.store import Store
    from csvfast.certs import CertificateStore

__all__ = ["Service", "run"]

_log: Final = logging.getLogger(__name__)
_LOOK_SECONDS: Final = 1.0
_CONNECTIONS: Final = 4096  # of a door
_DOORS: Final = len(Door) - 1  # all but the command line
_RESERVED_FILES: Final = 64  # for the store and the doors themselves
_PEM_LIMIT: Final = 64 << 10
_TOKEN_KEY: Final = "token"  # noqa: S105 - the name of a key, not one


class Service:
    """The doors of one configuration. An asynchronous context manager.

    In: config   what to open
        store    open; the service does not close it
    Raises when it is made: FormatError, StateError, OSError, VerificationError (no roots).
    """

    def __init__(self, config: BrokerConfig, store: Store) -> None:
        self.config: Final = config
        self.store: Final = store
        limits = Limits(_limits(config.limits))
        trust = Trust(config.trust.load_roots(config.base), _certificates(config))
        self.broker: Final = Broker(store, trust, limits)
        certificates, self._jwt_keys = _administrators(config)
        self.administration: Final = Administration(store, limits=limits, certificates=certificates)
        # Each door makes room for newcomers when it is full, and must be full before descriptors run out.
        self._connections: Final = max(64, min(_CONNECTIONS, (raise_open_file_limit() - _RESERVED_FILES) // _DOORS))
        self.addresses: Final[dict[str, str]] = {}
        """Where each door listens, once started."""
        self._stack = AsyncExitStack()
        self._opened: list[AbstractAsyncContextManager[Any]] = []
        self._kbs: KbsApp | None = None

    async def __aenter__(self) -> Service:
        try:
            await self._open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        """All doors at once, for each has patience with its clients."""
        doors, self._opened = self._opened, []
        outcomes = await asyncio.gather(*(door.__aexit__(None, None, None) for door in doors), return_exceptions=True)
        await self._stack.aclose()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _enter(self, door: AbstractAsyncContextManager[Any]) -> None:
        await door.__aenter__()
        self._opened.append(door)

    async def _open(self) -> None:
        config = self.config
        await self._beside(self._look())
        if config.kbs is not None:
            await self._open_kbs(config.kbs)
        if config.verdictd is not None:
            await self._open_verdictd(config.verdictd)
        if config.keyprovider is not None:
            provider = KeyProvider(
                self.broker,
                self.administration,
                create_keys=config.keyprovider.create_keys,
                packets=config.keyprovider.packets,
            )
            await self._open_grpc(config.keyprovider, Door.KEYPROVIDER, provider.handlers(), frozenset({"keys"}))
        if config.clientapi is not None:
            api = ClientApi(self.broker, self.administration)
            await self._open_grpc(config.clientapi, Door.CLIENTAPI, api.handlers(), frozenset({"keys", "policy"}))

    async def _open_kbs(self, config: KbsConfig) -> None:
        issuer = TokenIssuer(await asyncio.to_thread(self._token_key, config), seconds=config.token_seconds)
        self._kbs = KbsApp(
            self.broker,
            issuer,
            administrators=Administrators(self.administration, self.broker.limits, self._jwt_keys),
            versions=config.versions,
            session_seconds=config.session_seconds,
        )
        if (config.certificate is None) != (config.key is None):
            _refuse("kbs.key", "certificate or key alone", "both, or none")
        if config.certificate is None or config.key is None:
            if config.client_ca is not None:
                _refuse("kbs.client_ca", "no certificate", "certificate and key")
            tls = None
        else:
            tls = tls_context(config.certificate, config.key, config.client_ca)
        server = KbsServer(
            self._kbs,
            config.listen,
            tls=tls,
            insecure_http=config.insecure_http,
            limits=HttpLimits(connections=self._connections),
            metrics=self._kbs.metrics,
        )
        try:
            await self._enter(server)
        except OSError as error:
            raise StateError(f"{Door.KBS}: cannot listen on {config.listen}: {error.strerror or error}") from None
        await self._beside(self._kbs.housekeeping())
        self.addresses[Door.KBS] = str(server.address)

    async def _open_verdictd(self, config: VerdictdConfig) -> None:
        attester = DeviceAttester(certificates=self.broker.trust.certificates) if config.attester == "device" else None
        # Strangers have not proved anything: they take room from one another before they take it from guests.
        connections = ConnectionLimits(handshakes=min(256, self._connections // 2), connections=self._connections)
        door = await asyncio.to_thread(lambda: VerdictdDoor(self.broker, config, attester=attester, connections=connections))
        await self._enter(door)
        self.addresses[Door.VERDICTD] = door.address

    async def _open_grpc(self, config: GrpcConfig, door: Door, handlers: Mapping[str, Handler], roles: frozenset[str]) -> None:
        server = GrpcServer(
            config,
            door,
            handlers,
            administration=self.administration,
            broker=self.broker,
            guests=None if self._kbs is None else self._kbs.rcar,
            local_roles=roles,
        )
        await self._enter(server)
        self.addresses[door] = server.address

    def _token_key(self, config: KbsConfig) -> ec.EllipticCurvePrivateKey:
        """The key that signs tokens: a file's, or the one that all brokers on the store share."""
        if config.token_key is not None:
            pem: Secret | bytearray = read_private_file(config.token_key.parent, config.token_key.name, _PEM_LIMIT)
        else:
            pem = self.store.internal_key(_TOKEN_KEY, _new_token_key)
        try:
            found = load_pem_private_key(bytes(pem), None)
        except (ValueError, TypeError):
            _refuse("kbs.token_key", "no private key in PEM", "a P-256 key in PEM")
        if not isinstance(found, ec.EllipticCurvePrivateKey) or not isinstance(found.curve, ec.SECP256R1):
            _refuse("kbs.token_key", "another kind of key", "a P-256 key")
        return found

    async def _look(self) -> None:
        """Sees soon what other processes change, so that nobody's first request after it has to."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            with suppress(BrokerError):
                await asyncio.to_thread(self.store.look)

    async def _beside(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        self._stack.push_async_callback(end)


def run(config: BrokerConfig, open_store: Callable[[BrokerConfig], Store], ready: Callable[[dict[str, str]], None]) -> None:
    """Serves until SIGTERM or SIGINT, then closes the store.

    In: open_store   gives the store of the configuration, once this process keeps its memory to itself
        ready        called with the doors' addresses
    Raises what opening raises, before `ready`.
    """
    keep_memory_private()
    store = open_store(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        async with Service(config, store) as service:
            for door, address in service.addresses.items():
                event(_log, logging.INFO, "door open", door=door, address=address)
            ready(dict(service.addresses))
            await stopped.wait()
            event(_log, logging.INFO, "stopping")

    try:
        _run(serve)
    finally:
        store.close()


def _run(main: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await main()

    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):  # elsewhere than on Linux asyncio's own loop does
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(whole())


def _new_token_key() -> Secret:
    key = ec.generate_private_key(ec.SECP256R1())
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _limits(table: Mapping[str, Any]) -> LimitsConfig:
    known = {one.name: str(one.type) for one in fields(LimitsConfig)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            _refuse(f"limits.{ascii(name)[1:-1][:64]}", "an unknown member", f"one of {', '.join(known)}")
        if known[name].startswith("tuple"):
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                _refuse(f"limits.{name}", ascii(value)[:60], "a list of addresses")
            values[name] = tuple(value)
        elif type(value) is int or (known[name] == "float" and type(value) is float):
            values[name] = value
        else:
            _refuse(f"limits.{name}", ascii(value)[:60], "a number")
    return LimitsConfig(**values)


def _certificates(config: BrokerConfig) -> CertificateStore | None:
    from csvfast.certs import CertificateStore
    from csvfast.certs.store import default_directories

    trust = config.trust
    if not (trust.certificates or trust.default_directories or trust.key_server):
        return None
    client = None
    if trust.key_server:
        from csvfast.certs.key_server import KeyServerClient

        client = KeyServerClient()
    places = tuple(config.base / path for path in trust.certificates)
    return CertificateStore(places + (default_directories() if trust.default_directories else ()), client=client)


def _administrators(config: BrokerConfig) -> tuple[dict[str, Administrator], list[AdministratorKey]]:
    certificates: dict[str, Administrator] = {}
    keys: list[AdministratorKey] = []
    for name, tables in config.administration.items():
        if name not in ("certificate", "jwt_key") or not isinstance(tables, list):
            _refuse(f"administration.{ascii(name)[1:-1][:64]}", "an unknown member", "certificate, jwt_key: lists of tables")
        for index, table in enumerate(tables):
            place = f"administration.{name}[{index}]"
            if not isinstance(table, dict):
                _refuse(place, type(table).__name__, "a table")
            if name == "certificate":
                fingerprint = _text(table, place, "sha256").lower()
                if len(fingerprint) != 64 or not set(fingerprint) <= set("0123456789abcdef"):
                    _refuse(f"{place}.sha256", ascii(fingerprint)[:80], "64 hexadecimal digits")
                _only(table, place, ("sha256", "name", "roles", "scope"))
                who = _text(table, place, "name")
                certificates[fingerprint] = Administrator(who, _roles(table, place), _text(table, place, "scope", "*"))
            else:
                _only(table, place, ("file", "name", "roles", "scope", "role_names", "issuer", "audience"))
                names = table.get("role_names")
                keys.append(
                    AdministratorKey(
                        _text(table, place, "name"),
                        (config.base / _text(table, place, "file")).read_bytes(),
                        _roles(table, place),
                        _text(table, place, "scope", "*"),
                        None if names is None else {one: frozenset(roles) for one, roles in names.items()},
                        table.get("issuer"),
                        table.get("audience"),
                    )
                )
    return certificates, keys


def _only(table: Mapping[str, Any], place: str, known: tuple[str, ...]) -> None:
    for name in table:
        if name not in known:
            _refuse(f"{place}.{ascii(name)[1:-1][:64]}", "an unknown member", f"one of {', '.join(known)}")


def _text(table: Mapping[str, Any], place: str, name: str, default: str | None = None) -> str:
    value = table.get(name, default)
    if not isinstance(value, str) or not value:
        _refuse(f"{place}.{name}", ascii(value)[:60], "text")
    return value


def _roles(table: Mapping[str, Any], place: str) -> frozenset[str]:
    roles = table.get("roles")
    if not isinstance(roles, list) or not roles or not set(map(str, roles)) <= ROLES:
        _refuse(f"{place}.roles", ascii(roles)[:60], f"a list of {', '.join(sorted(ROLES))}")
    return frozenset(roles)


def _refuse(member: str, found: str, expected: str) -> NoReturn:
    raise FormatError("broker configuration", member, None, found, expected)
