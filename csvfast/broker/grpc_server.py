"""A gRPC listener of the broker: who calls, may he, and is he quick about it. The doors give it their methods.

    UNIX socket (0600 in a directory of 0700), or loopback with local_trust   the owner: administrator "local"
    `authorization: Bearer` an administrator's token                          that administrator
    `authorization: Bearer` a token that our KBS issued to a guest            that guest, as it was appraised
    a client certificate that the configuration knows                         that administrator

Nobody else gets further than UNAUTHENTICATED, and that before his message is read. Away from loopback there is TLS, or no start.

A caller that opens a connection and says nothing is cut off after HANDSHAKE_SECONDS, one that begins a request and does not end
it after MESSAGE_SECONDS: every handler is registered as one that reads a stream, which on the wire is the same as one message, so
that the waiting is ours. Errors go out as gRPC statuses with a short text and a correlation id; audit and log keep the reason.

Source: grpc/grpc include/grpc/impl/channel_arg_names.h (the options); containers/ocicrypt for what clients send.
Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import resource
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self
from urllib.parse import unquote

import csvfast.broker._serving  # noqa: F401 it says what is missing

# isort: split
import grpc
import grpc.aio
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from csvfast.broker.administration import Administrator
from csvfast.broker.grpc_messages import MESSAGE_LIMIT
from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import Door
from csvfast.certs.private import check_private_directory, read_private_file
from csvfast.errors import (
    BrokerError,
    ConflictError,
    CsvfastError,
    DeniedError,
    FormatError,
    LengthError,
    LimitedError,
    RequestError,
    StateError,
    UnavailableError,
    UnknownError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from csvfast.broker.administration import Administration
    from csvfast.broker.config import GrpcConfig
    from csvfast.broker.core import Broker
    from csvfast.broker.kbs.rcar import Session

__all__ = ["HANDSHAKE_SECONDS", "MESSAGE_SECONDS", "Caller", "GrpcServer", "GuestTokens", "Handler"]

HANDSHAKE_SECONDS: Final = 10.0
MESSAGE_SECONDS: Final = 10.0

_log: Final = logging.getLogger(__name__)
_AUTHORIZATION: Final = "authorization"
_TOKEN_LIMIT: Final = 32 << 10
_CONCURRENT_CALLS: Final = 512
_CONCURRENT_STREAMS: Final = 64
_CONNECTIONS: Final = 4096
_PEM_LIMIT: Final = 1 << 20
_STOP_SECONDS: Final = 5.0
_JWT_DOTS: Final = 2
_EOF: Final[object] = vars(grpc.aio)["EOF"]  # type stubs do not know it


class GuestTokens(Protocol):
    """Reads the tokens that the KBS door issues to attested guests."""

    async def session_of_token(self, token: str, correlation: str) -> Session:
        """The guest behind a token. DeniedError: not ours, changed, expired, or withdrawn; UnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: an administrator or an attested guest, never both and never neither."""

    administrator: Administrator | None
    session: Session | None
    address: str
    correlation: str
    is_local: bool

    def require_administrator(self) -> Administrator:
        """The administrator. DeniedError for a guest."""
        if self.administrator is None:
            raise DeniedError("a guest's token where an administrator is needed", self.correlation)
        return self.administrator


Handler = Callable[[Caller, bytes], Awaitable[bytes]]
"""From a caller and an encoded request to an encoded reply."""


class GrpcServer:
    """One listener with the methods of a door.

    In: config           where to listen, and with which certificate
        door             name of the door, for records
        handlers         by path "/package.Service/Method"
        administration   knows administrators and their tokens
        broker           limits, records of refusals
        guests           reads guests' tokens; None: no guest is let in
        local_roles      what the owner may do here
    """

    def __init__(
        self,
        config: GrpcConfig,
        door: Door,
        handlers: Mapping[str, Handler],
        *,
        administration: Administration,
        broker: Broker,
        guests: GuestTokens | None = None,
        local_roles: frozenset[str] = frozenset({"keys"}),
    ) -> None:
        self.config: Final = config
        self.door: Final = door
        self._handlers = dict(handlers)
        self._administration = administration
        self._broker = broker
        self._guests = guests
        self._local = Administrator("local", local_roles, door=door)
        self._server: Any = None
        self._socket: Path | None = None
        self.address = ""
        """Where it listens, once started: "host:port" or "unix:PATH"."""

    async def start(self) -> None:
        """Binds and serves. FormatError: the configuration; StateError: socket or key not private, or in use; OSError."""
        credentials = self._credentials()
        listen = self.config.listen
        if listen.path is not None:
            _prepare_socket(listen.path)
        server = grpc.aio.server(
            handlers=_by_service({path: self._method(handler) for path, handler in self._handlers.items()}),
            options=_options(),
            maximum_concurrent_rpcs=_CONCURRENT_CALLS,
        )
        try:
            port = (
                server.add_insecure_port(str(listen)) if credentials is None else server.add_secure_port(str(listen), credentials)
            )
            if not port:
                raise RuntimeError
        except RuntimeError:
            raise StateError(f"{self.door}: cannot listen on {listen}: in use, or no address of this machine") from None
        await server.start()
        self._server = server
        self.address = str(listen if listen.path is not None else replace(listen, port=port))
        if listen.path is not None:
            listen.path.chmod(0o600)
            self._socket = listen.path
        event(_log, logging.INFO, "listening", door=self.door, address=self.address, tls=credentials is not None)

    async def stop(self) -> None:
        """Takes no more calls, lets those under way end for some seconds, closes."""
        if self._server is not None:
            await self._server.stop(_STOP_SECONDS)
            self._server = None
        if self._socket is not None:
            with suppress(FileNotFoundError):
                self._socket.unlink()
            self._socket = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _credentials(self) -> Any:
        config, listen = self.config, self.config.listen
        if config.local_trust and not listen.is_local:
            raise FormatError("broker configuration", f"{self.door}.local_trust", None, str(listen), "a loopback address")
        if (config.certificate is None) != (config.key is None):
            raise FormatError("broker configuration", f"{self.door}.key", None, "certificate or key alone", "both, or none")
        if config.certificate is None or config.key is None:
            if config.client_ca is not None:
                raise FormatError("broker configuration", f"{self.door}.client_ca", None, "no certificate", "certificate and key")
            if not listen.is_local:
                raise FormatError(
                    "broker configuration", f"{self.door}.certificate", None, f"none, listening on {listen}",
                    "certificate and key: away from loopback only with TLS",
                )  # fmt: skip
            return None
        key = read_private_file(config.key.parent, config.key.name, _PEM_LIMIT)
        try:
            chain = config.certificate.read_bytes()
            authority = None if config.client_ca is None else config.client_ca.read_bytes()
            # The binding wants bytes; they cannot be wiped and live as long as the server does.
            return grpc.ssl_server_credentials([(bytes(key), chain)], authority, require_client_auth=authority is not None)
        finally:
            key[:] = bytes(len(key))

    # ---- One call

    def _method(self, handler: Handler) -> Any:
        async def serve(_requests: object, context: Any) -> bytes:
            correlation = new_correlation()
            try:
                caller = await self._caller(context, correlation)
                return await handler(caller, await _message(context))
            except _UnauthenticatedError as error:
                code, text, wait = grpc.StatusCode.UNAUTHENTICATED, str(error), 0.0
            except Exception as error:
                code, text, wait = _status(error, correlation)
                event(
                    _log, logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.INFO, "call failed",
                    door=self.door, status=code.name, error=_reason(error), correlation=correlation,
                )  # fmt: skip
            trailing = [("correlation", correlation)]
            if wait:
                trailing.append(("retry-after", f"{wait:.3f}"))
            await context.abort(code, text, tuple(trailing))
            raise AssertionError  # abort raises

        return grpc.stream_unary_rpc_method_handler(serve)

    async def _caller(self, context: Any, correlation: str) -> Caller:
        address = _address(context.peer())
        is_local = self.config.listen.path is not None or self.config.local_trust
        try:
            token = _bearer(context.invocation_metadata())
            if token is None and is_local:
                who = replace(self._local, address=address)
                return Caller(who, None, address, correlation, is_local)
            # A local caller who shows a token wants to be taken for whom it names.
            if token is not None and token.count(".") == _JWT_DOTS:
                session = await self._guest(token, address, correlation)
                return Caller(None, session, address, correlation, is_local)
            certificate = None if token is not None else _client_certificate(context)
            who = await asyncio.to_thread(
                self._administration.authenticate, token, certificate, address=address, door=self.door
            )
            return Caller(who, None, address, correlation, is_local)
        except RequestError as error:
            self._broker.limits.check_identity(address)  # who is locked out does not fill the audit log
            self._broker.record_refusal(door=self.door, address=address, reason=str(error), correlation=correlation)
        except DeniedError as error:  # on record by Administration
            correlation = error.correlation
        raise _UnauthenticatedError(_bare("not authenticated", correlation))

    async def _guest(self, token: str, address: str, correlation: str) -> Session:
        self._broker.limits.check_request(address)
        if self._guests is None:
            raise RequestError("a guest's token, and this listener takes none")
        try:
            return await self._guests.session_of_token(token, correlation)
        except DeniedError as error:
            raise RequestError(error.reason) from None  # goes on record where this is called


class _UnauthenticatedError(BrokerError):
    """Nobody we know; the text is for the peer."""


def _by_service(handlers: Mapping[str, Any]) -> list[Any]:
    """gRPC's generic handlers, one a service, from handlers by path; other paths are UNIMPLEMENTED."""
    services: dict[str, dict[str, Any]] = {}
    for path, handler in handlers.items():
        service, _, name = path.removeprefix("/").partition("/")
        services.setdefault(service, {})[name] = handler
    return [grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()]


async def _message(context: Any) -> bytes:
    """The one message of a unary call."""
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            data = await context.read()
            if data is _EOF:
                raise RequestError("a call without a message; expected one")
            if await context.read() is not _EOF:
                raise RequestError("a call with several messages; expected one")
    except TimeoutError:
        raise RequestError(f"no whole message within {MESSAGE_SECONDS:g} s") from None
    return bytes(data)


def _bearer(metadata: Any) -> str | None:
    """The token, or None when there is no such header. RequestError: a header that is no bearer token, or several."""
    values = [value for name, value in metadata or () if name == _AUTHORIZATION]
    if not values:
        return None
    scheme, _, token = values[0].partition(" ") if isinstance(values[0], str) else ("", "", "")
    if len(values) > 1 or scheme.lower() != "bearer" or not 0 < len(token) <= _TOKEN_LIMIT or not token.isascii():
        raise RequestError("authorization: expected one 'Bearer' and a token")
    return token


def _client_certificate(context: Any) -> str | None:
    """SHA-256 of the certificate that the TLS layer has verified, hexadecimal."""
    found = context.auth_context().get("x509_pem_cert")
    if not found:
        return None
    der = load_pem_x509_certificate(found[0]).public_bytes(Encoding.DER)
    return hashlib.sha256(der).hexdigest()


def _address(peer: str) -> str:
    """gRPC's "ipv4:127.0.0.1:5000" as "127.0.0.1:5000", "ipv6:%5B::1%5D:5000" as "[::1]:5000", UNIX sockets as "unix"."""
    kind, _, rest = peer.partition(":")
    return kind if kind.startswith("unix") else unquote(rest)[:80]


def _status(error: Exception, correlation: str) -> tuple[Any, str, float]:
    """gRPC status, text for the peer, seconds until it may be tried again."""
    codes = grpc.StatusCode
    match error:
        case DeniedError():
            return codes.PERMISSION_DENIED, _bare("not allowed", error.correlation or correlation), 0.0
        case LimitedError():
            return codes.RESOURCE_EXHAUSTED, _bare(str(error), correlation), error.retry_after
        case UnavailableError():
            return codes.UNAVAILABLE, _bare("cannot be served now", correlation), 0.0
        case UnknownError():
            return codes.NOT_FOUND, _bare(str(error), correlation), 0.0
        case ConflictError():
            return codes.ALREADY_EXISTS, _bare(str(error), correlation), 0.0
        case RequestError() | FormatError() | LengthError():
            return codes.INVALID_ARGUMENT, _bare(str(error), correlation), 0.0
    return codes.INTERNAL, _bare("internal error", correlation), 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, DeniedError):
        return error.reason
    # Another's exception may repeat what it was given.
    return str(error) if isinstance(error, CsvfastError) else type(error).__name__


def _bare(text: str, correlation: str) -> str:
    return f"{text} ({correlation})"


def _options() -> list[tuple[str, Any]]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        ("grpc.so_reuseport", 0),  # or a second broker would silently take half of the connections
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.max_send_message_length", 2 * MESSAGE_LIMIT),
        ("grpc.max_metadata_size", 2 * _TOKEN_LIMIT),
        ("grpc.absolute_max_metadata_size", 2 * _TOKEN_LIMIT),
        ("grpc.max_concurrent_streams", _CONCURRENT_STREAMS),
        # No more than a fifth of the descriptors: the other doors need some, too.
        ("grpc.max_allowed_incoming_connections", max(64, min(_CONNECTIONS, files // 5))),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
    ]


def _prepare_socket(path: Path) -> None:
    """A private directory for a socket, and nothing in the socket's place. StateError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private_directory(path.parent)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise StateError(f"{path}: is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(os.fspath(path))
    if code not in (errno.ECONNREFUSED, errno.ENOENT):
        raise StateError(f"{path}: another process listens there")
    with suppress(FileNotFoundError):
        path.unlink()
