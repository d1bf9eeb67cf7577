"""A channel to the broker's gRPC doors: address, TLS, token; statuses become the exceptions of csvfast.

Thread-safety: as gRPC's channels, which threads may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import csvfast.broker._serving  # noqa: F401 it says what is missing

# isort: split
import grpc

from csvfast.broker.config import Address
from csvfast.broker.grpc_messages import MESSAGE_LIMIT
from csvfast.errors import (
    BrokerError,
    DeniedError,
    FormatError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
)

if TYPE_CHECKING:
    from csvfast.broker.grpc_messages import Fields, Method, Value
    from csvfast.crypto import Secret

__all__ = ["Channel", "ChannelTls"]


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """TLS of a channel; PEM.

    roots               whom to trust; None: what gRPC trusts by default
    certificate, key    our own, for a listener that asks for one
    server_name         expected in the server's certificate, when it is not the address's host
    """

    roots: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None


class Channel:
    """One channel. Connects when the first call is made.

    In: address   "host:port" or "unix:/path"
        token     sent with every call; without `tls` only to this machine
        tls       None: none
    FormatError: no address, or a token that would travel in the clear.
    """

    def __init__(
        self, address: str, *, token: Secret | str | None = None, tls: ChannelTls | None = None, timeout: float = 30.0
    ) -> None:
        if token is not None and tls is None and not Address.parse(address).is_local:
            raise FormatError("channel", "tls", None, f"none, with a token for {address}", "TLS away from this machine")
        options: Sequence[tuple[str, Any]] = (
            ("grpc.max_receive_message_length", 2 * MESSAGE_LIMIT),
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
            ("grpc.enable_http_proxy", 0),
            *((("grpc.ssl_target_name_override", tls.server_name),) if tls is not None and tls.server_name else ()),
        )
        if tls is None:
            self._channel: Any = grpc.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.certificate)
            self._channel = grpc.secure_channel(address, credentials, options=options)
        text = token if token is None or isinstance(token, str) else bytes(memoryview(token)).decode("ascii")
        self._metadata: Final = () if text is None else (("authorization", f"Bearer {text}"),)
        self._timeout: Final = timeout

    def call(self, method: Method, **fields: Value) -> Fields:
        """Calls a method and waits for the reply.

        DeniedError, RequestError, UnknownError, LimitedError; UnavailableError: the broker cannot be reached or cannot serve now.
        """
        invoke = self._channel.unary_unary(method.path)
        try:
            reply = invoke(method.write_request(**fields), timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _translated(error, method.path) from None
        return method.read_reply(reply)

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()


def _translated(error: Any, path: str) -> BrokerError:
    """Statuses carry what a peer may know, and the correlation id under which an operator finds the rest."""
    code, text = error.code(), f"{path}: {str(error.details() or '')[:500]}"
    trailing = {name: value for name, value in error.trailing_metadata() or () if isinstance(value, str)}
    correlation = trailing.get("correlation", "")[:32]
    codes = grpc.StatusCode
    if code in (codes.UNAUTHENTICATED, codes.PERMISSION_DENIED):
        return DeniedError(text, correlation)
    if code is codes.RESOURCE_EXHAUSTED:
        try:
            wait = float(trailing.get("retry-after", "1"))
        except ValueError:
            wait = 1.0
        return LimitedError(text, wait)
    if code in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.CANCELLED):
        return UnavailableError(text)
    if code is codes.NOT_FOUND:
        return UnknownError(text)
    if code in (codes.INVALID_ARGUMENT, codes.UNIMPLEMENTED):
        return RequestError(text)
    return BrokerError(f"{code.name}: {text}")
