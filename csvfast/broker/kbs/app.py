"""CoCo's Key Broker Service as an ASGI application.

    POST /kbs/v0/auth, /kbs/v0/attest                 guests: csvfast.broker.kbs.rcar
    GET  /kbs/v0/resource/<repository>/<type>/<tag>   guests: a JWE for the key of the session
    ...  /kbs/v0/..., /csvfast/v0/...                 administrators: csvfast.broker.kbs.admin, csvfast.broker.kbs.desk
    GET  /kbs/v0/jwks.json, /kbs/v0/openapi.json, /healthz, /metrics

The way of a resource does without routing: it is what a broker does all day.

Source: confidential-containers/trustee kbs/src/api_server.rs. Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import Route, Router

from csvfast.broker.kbs.admin import RESOURCE_PATH, AdminApi, Administrators
from csvfast.broker.kbs.asgi import (
    CORRELATION,
    Call,
    Endpoint,
    Handler,
    Methods,
    Operation,
    Receive,
    Reply,
    Scope,
    Send,
    kbs_answer,
    outcome_of,
    send_reply,
)
from csvfast.broker.kbs.desk import DESK, Desk, desk_answer
from csvfast.broker.kbs.errors import KbsError, Variant
from csvfast.broker.kbs.jwe import seal_jwe
from csvfast.broker.kbs.metrics import Metrics
from csvfast.broker.kbs.openapi import openapi
from csvfast.broker.kbs.rcar import PROTOCOL_VERSIONS, Rcar, Session
from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import Door, ResourcePath
from csvfast.broker.store import Job
from csvfast.errors import BrokerError, CsvfastError, RequestError

if TYPE_CHECKING:
    from csvfast.broker.core import Broker
    from csvfast.broker.kbs.ear import TokenIssuer

__all__ = ["COOKIE", "KbsApp"]

COOKIE: Final = "kbs-session-id"

_RESOURCE: Final = "/kbs/v0/resource/"
_COOKIE_START: Final = b"kbs-session-id="
_AUTH_LIMIT: Final = 16 << 10
_HEALTH_SECONDS: Final = 1.0  # an answer is good for so long: /healthz is anybody's
_HEALTH_DEADLINE: Final = 5.0
_PURGE_SECONDS: Final = 60.0
_log: Final = logging.getLogger(__name__)


class KbsApp:
    """The application.

    In: broker           attests and releases
        issuer           signs tokens
        administrators   who may administrate; None: nobody over HTTP
        metrics          where requests are counted; shared with other doors
        versions         of the protocol that are spoken
        session_seconds  a session's life
    `housekeeping` runs as a task beside the server.
    """

    def __init__(
        self,
        broker: Broker,
        issuer: TokenIssuer,
        *,
        administrators: Administrators | None = None,
        metrics: Metrics | None = None,
        versions: Sequence[str] = tuple(PROTOCOL_VERSIONS),
        session_seconds: float = 300.0,
    ) -> None:
        self.broker: Final = broker
        self.metrics: Final = metrics or Metrics()
        self.rcar: Final = Rcar(broker, issuer, versions=frozenset(versions), seconds=session_seconds)
        self._health = (0.0, True)
        self._openapi = Reply.of(openapi())
        operations = [
            self._operation("POST", "/kbs/v0/auth", self._auth, "auth", "AttestationError"),
            self._operation("POST", "/kbs/v0/attest", self._attest, "attest", "AttestationError"),
            self._operation("GET", "/kbs/v0/openapi.json", self._describe, "openapi", "HTTPFailed"),
            self._operation("GET", "/kbs/v0/jwks.json", self._jwks, "jwks", "HTTPFailed"),
            self._operation("GET", "/healthz", self._healthz, "health", "HTTPFailed"),
            self._operation("GET", "/metrics", self._show_metrics, "metrics", "HTTPFailed"),
        ]
        if administrators is not None:
            operations += AdminApi(administrators, self.metrics).operations()
            operations += Desk(administrators, self.metrics).operations()
        self._router = Router(_routes(operations), redirect_slashes=False, default=self._nowhere)

    def _operation(self, method: str, path: str, handler: Handler, action: str, variant: Variant) -> Operation:
        endpoint = Endpoint(handler, partial(kbs_answer, variant), door=Door.KBS, action=action, metrics=self.metrics)
        return Operation(method, path, endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        if scope["method"] == "GET" and scope["path"].startswith(_RESOURCE):
            await self._resource(scope, send)
        else:
            await self._router(scope, receive, send)

    async def housekeeping(self) -> None:
        """Removes expired sessions until it is cancelled."""
        while True:
            await asyncio.sleep(_PURGE_SECONDS)
            with suppress(BrokerError):
                await self.rcar.purge()

    # ---- Guests

    async def _auth(self, call: Call) -> Reply:
        challenge = await self.rcar.challenge(await call.read(_AUTH_LIMIT), call.address)
        cookie = _set_cookie(challenge.session_id, challenge.expires, secure=call.is_encrypted)
        return Reply(*Reply.of({"nonce": challenge.nonce, "extra-params": ""})[:3], (cookie,))

    async def _attest(self, call: Call) -> Reply:
        session_id = call.cookie(COOKIE)
        session = await self.rcar.attest(session_id, call.read, call.address, call.correlation)
        cookie = _set_cookie(str(session_id), session.expires, secure=call.is_encrypted)
        return Reply(*Reply.of({"token": session.token})[:3], (cookie,))

    async def _resource(self, scope: Scope, send: Send) -> None:
        """HOT."""
        start = time.perf_counter()
        correlation, outcome = new_correlation(), "allowed"
        variant: Variant = "TokenNotFound"
        try:
            raw: bytes = scope.get("raw_path") or b""
            if b"%" in raw:
                raise KbsError("InvalidRequestPath", "expected a path without percent signs")
            try:
                path = ResourcePath.parse(scope["path"][len(_RESOURCE) :])
            except RequestError as error:
                raise KbsError("InvalidRequestPath", str(error)) from None
            client = scope.get("client")
            address = client[0] if client else "local"
            call = Call(scope, _no_body, correlation)
            query = call.query if scope["query_string"] else {}
            session = self._remembered(scope["headers"])
            if session is None:
                self.broker.limits.check_request(address)
                session = await self._find(call)
            else:  # it has limits of its own, but a lock-out holds for everybody
                self.broker.limits.check_identity(address)
            variant = "PolicyDeny"
            resource = await self.broker.release(
                session.attestation, path, door=Door.KBS, address=address, correlation=correlation, query=query
            )
            body = seal_jwe(session.key, resource.content)
        except (KbsError, CsvfastError) as error:
            outcome = outcome_of(error)
            reply = kbs_answer(variant, error, correlation)
            event(_log, logging.INFO, "refused", action="resource", correlation=correlation, outcome=outcome)
            self.metrics.request(Door.KBS, "resource", outcome, time.perf_counter() - start)
            await send_reply(send, reply, correlation)
            return
        except Exception as error:
            _log.exception("internal error", extra={"fields": {"action": "resource", "correlation": correlation}})
            self.metrics.request(Door.KBS, "resource", "failed", time.perf_counter() - start)
            await send_reply(send, kbs_answer(variant, error, correlation), correlation)
            return
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(body)),
                    (b"cache-control", b"no-store"),
                    (CORRELATION, correlation.encode("ascii")),
                ],
            }
        )
        await send({"type": "http.response.body", "body": body})
        self.metrics.request(Door.KBS, "resource", outcome, time.perf_counter() - start)

    def _remembered(self, headers: list[tuple[bytes, bytes]]) -> Session | None:
        """The session of a request whose cookie is the only thing in its header, as guests send it."""
        found = None
        for name, value in headers:
            if name == b"cookie":
                if found is not None or not value.startswith(_COOKIE_START) or len(value) != len(_COOKIE_START) + 32:
                    return None
                found = value
            elif name == b"authorization":
                return None
        return None if found is None else self.rcar.cached(found[len(_COOKIE_START) :].decode("latin-1"))

    async def _find(self, call: Call) -> Session:
        cookie, token = call.cookie(COOKIE), call.bearer
        if cookie is None and token is not None:
            return await self.rcar.session_of_token(token, call.correlation)
        return await self.rcar.session(cookie, call.correlation)

    # ---- Anybody

    async def _describe(self, call: Call) -> Reply:  # noqa: ARG002
        return self._openapi

    async def _jwks(self, call: Call) -> Reply:  # noqa: ARG002
        return Reply.of(self.rcar.issuer.jwks)

    async def _show_metrics(self, call: Call) -> Reply:  # noqa: ARG002
        return Reply(200, self.metrics.render(), self.metrics.content_type)

    async def _healthz(self, call: Call) -> Reply:  # noqa: ARG002
        checked, healthy = self._health
        now = time.monotonic()
        if now - checked > _HEALTH_SECONDS:
            self._health = (now, healthy)  # who asks meanwhile gets the answer of before, and costs no transaction
            try:
                # A change of nothing is written all the same: the database can be reached, and its disk is not full.
                await asyncio.wait_for(self.broker.store.committer.commit(Job(apply=_change_nothing)), _HEALTH_DEADLINE)
                healthy = True
            except (BrokerError, TimeoutError):
                healthy = False
            self._health = (now, healthy)
        return Reply.of({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    async def _nowhere(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        correlation = new_correlation()
        path: str = scope["path"]
        variant: Variant = "PluginNotFound" if path.startswith("/kbs/v0/") else "InvalidRequestPath"
        error = KbsError(variant, "there is nothing at this path", correlation)
        self.metrics.request(Door.KBS, "nowhere", "malformed", 0.0)
        reply = desk_answer(error, correlation) if path.startswith(f"{DESK}/") else kbs_answer(variant, error, correlation)
        await send_reply(send, reply, correlation)


def _change_nothing(_connection: object) -> None: ...


def _routes(operations: Sequence[Operation]) -> list[Route]:
    tables: dict[str, dict[str, Endpoint]] = {RESOURCE_PATH: {}}
    for method, path, endpoint in operations:
        tables.setdefault(path, {})[method] = endpoint
    others = {RESOURCE_PATH: ("GET",)}
    return [Route(path, Methods(table, others.get(path, ()))) for path, table in tables.items()]


def _set_cookie(session_id: str, expires: float, *, secure: bool) -> tuple[bytes, bytes]:
    attributes = f"Expires={formatdate(expires, usegmt=True)}; Path=/kbs/v0; HttpOnly; SameSite=Strict"
    return b"set-cookie", f"{COOKIE}={session_id}; {attributes}{'; Secure' if secure else ''}".encode("ascii")


async def _no_body() -> Any:
    raise AssertionError("a resource is asked for without a body")
