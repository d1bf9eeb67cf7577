"""From HTTP to a call and back: bodies within their limits, correlation ids, errors, counters. Routing is Starlette's.

Thread-safety: one event loop.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from csvfast.broker.kbs.errors import KbsError, Variant, answer_to
from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import ResourcePath
from csvfast.errors import CsvfastError, DeniedError, LimitedError, RequestError, UnavailableError

if TYPE_CHECKING:
    from csvfast.broker.kbs.metrics import Metrics

__all__ = [
    "BODY_LIMIT",
    "CORRELATION",
    "Call",
    "Endpoint",
    "Handler",
    "Methods",
    "Operation",
    "Receive",
    "Reply",
    "Scope",
    "Send",
    "kbs_answer",
    "outcome_of",
    "send_reply",
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[["Call"], Awaitable["Reply"]]

BODY_LIMIT: Final = 2 << 20
"""Bytes of a request's body."""

CORRELATION: Final = b"x-csvfast-correlation"
"""Header of every answer: names the request in the broker's log and audit."""

_QUERY_ITEMS: Final = 16
_QUERY_LIMIT: Final = 4096
_log: Final = logging.getLogger(__name__)


class Reply(NamedTuple):
    """An answer."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Reply:
        """JSON."""
        return cls(status, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


class Call:
    """A request.

    Attributes:
        correlation   16 hexadecimal digits
        path          parameters of the route
    """

    __slots__ = ("_headers", "_receive", "_scope", "correlation", "path")

    def __init__(self, scope: Scope, receive: Receive, correlation: str) -> None:
        self._scope = scope
        self._receive = receive
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.correlation: Final = correlation
        self.path: Final[Mapping[str, str]] = scope.get("path_params") or {}

    async def read(self, limit: int = BODY_LIMIT) -> bytes:
        """The body, once; after it is known who asks, where that matters. KbsError 413: more than `limit` bytes."""
        return await read_body(self._scope, self._receive, limit)

    @property
    def address(self) -> str:
        """The peer's address, without its port; "local" on a UNIX socket."""
        client = self._scope.get("client")
        return str(client[0]) if client else "local"

    @property
    def is_encrypted(self) -> bool:
        """Whether it came over TLS."""
        return self._scope.get("scheme") == "https"

    @property
    def certificate(self) -> str | None:
        """SHA-256 of the client certificate that the TLS layer has checked, hexadecimal."""
        peer = (self._scope.get("extensions") or {}).get("csvfast.peer")
        return None if peer is None else str(peer["certificate_sha256"])

    def header(self, name: bytes) -> str | None:
        """The header of that name (lower case). RequestError when it stands twice: each reader would take another one."""
        found = [value for key, value in self._headers if key == name]
        if len(found) > 1:
            raise RequestError(f"{name.decode()}: the header stands twice; expected it once")
        return found[0].decode("latin-1") if found else None

    @property
    def bearer(self) -> str | None:
        """The token of `Authorization: Bearer`; None without that header. RequestError for another scheme."""
        text = self.header(b"authorization")
        if text is None:
            return None
        scheme, _space, token = text.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise RequestError("authorization: another scheme; expected Bearer and a token")
        return token.strip()

    def cookie(self, name: str) -> str | None:
        """The cookie of that name. RequestError when there are two with different values."""
        found = {
            value.strip().strip('"')
            for key, line in self._headers
            if key == b"cookie"
            for part in line.decode("latin-1").split(";")
            for label, equals, value in [part.partition("=")]
            if equals and label.strip() == name
        }
        if len(found) > 1:
            raise RequestError(f"cookie {name}: two values; expected one")
        return found.pop() if found else None

    def resource_path(self) -> ResourcePath:
        """The route's parameter "path" as a resource's. KbsError InvalidRequestPath."""
        if b"%" in (self._scope.get("raw_path") or b""):
            raise KbsError("InvalidRequestPath", "expected a path without percent signs")
        try:
            return ResourcePath.parse(self.path["path"])
        except RequestError as error:
            raise KbsError("InvalidRequestPath", str(error)) from None

    @property
    def query(self) -> dict[str, str]:
        """Parameters of the query, each once. RequestError."""
        return parse_query(self._scope["query_string"])


def parse_query(raw: bytes) -> dict[str, str]:
    """name=value&..., percent-decoded UTF-8. RequestError: a name twice, too many, no UTF-8, or control characters."""
    result: dict[str, str] = {}
    if not raw:
        return result
    parts = raw.split(b"&", _QUERY_ITEMS)
    if len(raw) > _QUERY_LIMIT or len(parts) > _QUERY_ITEMS:
        raise RequestError(f"query: expected at most {_QUERY_ITEMS} parameters and {_QUERY_LIMIT} bytes")
    for part in parts:
        name, _equals, value = (piece.replace(b"+", b" ") for piece in part.partition(b"="))
        try:
            decoded = unquote_to_bytes(name).decode(), unquote_to_bytes(value).decode()
        except UnicodeDecodeError:
            raise RequestError("query: no UTF-8") from None
        if not decoded[0] or decoded[0] in result or not all(map(str.isprintable, decoded)):
            raise RequestError("query: expected every parameter once, with a name, in printable characters")
        result[decoded[0]] = decoded[1]
    return result


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. KbsError 413: more than `limit` bytes."""
    too_much = KbsError("HTTPFailed", f"body of more than {limit} bytes", status=413)
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
            raise too_much
    message = await receive()
    first: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False) and len(first) <= limit:
        return first
    whole = bytearray(first)
    while message["type"] == "http.request" and message.get("more_body", False):
        if len(whole) > limit:
            raise too_much
        message = await receive()
        whole += message.get("body", b"")
    if message["type"] != "http.request":
        raise ConnectionResetError("the peer left before its body was complete")
    if len(whole) > limit:
        raise too_much
    return bytes(whole)


async def send_reply(send: Send, reply: Reply, correlation: str) -> None:
    """Sends an answer whole."""
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", b"%d" % len(reply.body)),
        (b"cache-control", b"no-store"),
        (CORRELATION, correlation.encode("ascii")),
        *reply.headers,
    ]
    if not reply.body:
        del headers[0]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def kbs_answer(variant: Variant, error: Exception, correlation: str) -> Reply:
    """An error as CoCo's clients understand it. In: variant   of refusals in this place."""
    if not isinstance(error, (KbsError, CsvfastError)):
        error = KbsError("PluginInternalError", "internal error", correlation)
    known = answer_to(error, variant, correlation)
    return Reply(known.status, known.body, headers=known.headers)


def outcome_of(error: BaseException) -> str:
    """The error as a label of a counter."""
    if isinstance(error, DeniedError):
        return "denied"
    if isinstance(error, LimitedError):
        return "limited"
    if isinstance(error, UnavailableError):
        return "unavailable"
    return "malformed" if isinstance(error, (KbsError, ValueError, CsvfastError)) else "failed"


class Endpoint:
    """An ASGI application for one route.

    In: handler   answers a call, or raises KbsError or an error of csvfast
        answer    makes an answer of an error
        action    for counters
    """

    def __init__(
        self,
        handler: Handler,
        answer: Callable[[Exception, str], Reply],
        *,
        door: str,
        action: str,
        metrics: Metrics,
    ) -> None:
        self._handler = handler
        self.answer: Final = answer
        self._door = door
        self._action = action
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        start = time.perf_counter()
        correlation, outcome = new_correlation(), "allowed"
        try:
            reply = await self._handler(Call(scope, receive, correlation))
        except ConnectionResetError:
            return
        except (KbsError, CsvfastError) as error:
            outcome = outcome_of(error)
            if isinstance(error, (KbsError, DeniedError)):
                correlation = error.correlation or correlation  # the one that is on record
            reply = self.answer(error, correlation)
            fields = {"action": self._action, "correlation": correlation, "outcome": outcome, "error": _reason(error)}
            event(_log, logging.INFO, "refused", **fields)
        except Exception as error:
            # A defect of ours: the peer learns nothing, the log everything but arguments.
            outcome = "failed"
            reply = self.answer(error, correlation)
            _log.exception("internal error", extra={"fields": {"action": self._action, "correlation": correlation}})
        self._metrics.request(self._door, self._action, outcome, time.perf_counter() - start)
        await send_reply(send, reply, correlation)


class Operation(NamedTuple):
    """A method of a path, which may have parameters: "/kbs/v0/reference-value/{name}"."""

    method: str
    path: str
    endpoint: Endpoint


class Methods:
    """An ASGI application for one path: one endpoint a method, and 405 for the others.

    In: others   methods of the path that somebody else serves; named in the 405's header
    """

    def __init__(self, endpoints: Mapping[str, Endpoint], others: tuple[str, ...] = ()) -> None:
        self._answer = next((endpoint.answer for endpoint in endpoints.values()), None)
        self._endpoints = dict(endpoints)
        self._allow = (b"allow", ", ".join(sorted({*endpoints, *others})).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        error = KbsError("HTTPFailed", "this path has other methods", status=405)
        reply = (self._answer or partial(kbs_answer, error.variant))(error, correlation := new_correlation())
        await send_reply(send, reply._replace(headers=(self._allow,)), correlation)


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, DeniedError) else str(error)
