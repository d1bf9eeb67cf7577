"""Administration beyond what CoCo's service has: csvfast's own API, for csvfast.broker.clients.administration.

    GET                 /csvfast/v0/resources                       ?repository=
    POST, DELETE        /csvfast/v0/resource/<r>/<t>/<t>            raw bytes -> {"version": n}
    POST                /csvfast/v0/rotate|create|read/<r>/<t>/<t>  {"version": n} -> ...; read: raw bytes
    POST                /csvfast/v0/retire/<r>/<t>/<t>              {"version": n}
    GET                 /csvfast/v0/policies
    GET, PUT, DELETE    /csvfast/v0/policies/<kind>/<id>            ?version=; {"engine": ..., "text": ...}
    POST                /csvfast/v0/dry-run                         {"kind", "document", "id" or "text", "engine"}
    GET                 /csvfast/v0/references
    GET, PUT, DELETE    /csvfast/v0/references/<name>               {"values": [...], "expires": seconds or null}
    GET, POST           /csvfast/v0/tokens                          {"name", "roles", "scope", "expires"} -> {"token": ...}
    DELETE              /csvfast/v0/tokens/<name>
    GET                 /csvfast/v0/audit                           ?after=&limit=&<member>=
    GET                 /csvfast/v0/audit/verification
    GET                 /csvfast/v0/audit/key

Errors are {"error": kind, "detail": text, "correlation": id} with HTTP's own codes: 400 the request is wrong, 401 nobody known,
403 not allowed, 404 no such thing, 409 a contradiction, 413 too long, 429 too many requests, 503 the store cannot be written.

Thread-safety: one event loop; what waits for the store does so in a thread.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from csvfast.broker.json_input import loads, members
from csvfast.broker.kbs.asgi import Call, Endpoint, Handler, Operation, Reply
from csvfast.broker.kbs.errors import KbsError
from csvfast.broker.model import Door
from csvfast.errors import (
    ConflictError,
    DeniedError,
    FormatError,
    LengthError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
)

if TYPE_CHECKING:
    from csvfast.broker.administration import Administrator
    from csvfast.broker.kbs.admin import Administrators
    from csvfast.broker.kbs.metrics import Metrics

__all__ = ["DESK", "Desk", "desk_answer"]

DESK: Final = "/csvfast/v0"
AUDIT_LIMIT: Final = 1000
"""Records of one answer."""

_RESOURCE: Final = "{path:path}"
_OCTETS: Final = b"application/octet-stream"
_KINDS: Final = ("appraisal", "resource")
_ENGINES: Final = ("rules", "rego")
_ERRORS: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (DeniedError, 403, "denied"),
    (LimitedError, 429, "limited"),
    (UnavailableError, 503, "unavailable"),
    (UnknownError, 404, "unknown"),
    (ConflictError, 409, "conflict"),
    (RequestError, 400, "request"),
    (FormatError, 400, "format"),
    (LengthError, 400, "request"),
)


class Desk:
    """The operations."""

    def __init__(self, administrators: Administrators, metrics: Metrics) -> None:
        self._administrators = administrators
        self._desk = administrators.administration
        self._metrics = metrics

    def operations(self) -> list[Operation]:
        """What there is."""
        return [
            self._operation("GET", "/resources", self._list_resources),
            self._operation("POST", f"/resource/{_RESOURCE}", self._put_resource),
            self._operation("DELETE", f"/resource/{_RESOURCE}", self._delete_resource),
            self._operation("POST", f"/rotate/{_RESOURCE}", self._rotate_resource),
            self._operation("POST", f"/create/{_RESOURCE}", self._create_key),
            self._operation("POST", f"/retire/{_RESOURCE}", self._retire_resource),
            self._operation("POST", f"/read/{_RESOURCE}", self._read_resource),
            self._operation("GET", "/policies", self._list_policies),
            self._operation("GET", "/policies/{kind}/{id}", self._get_policy),
            self._operation("PUT", "/policies/{kind}/{id}", self._put_policy),
            self._operation("DELETE", "/policies/{kind}/{id}", self._delete_policy),
            self._operation("POST", "/dry-run", self._dry_run),
            self._operation("GET", "/references", self._list_references),
            self._operation("GET", "/references/{name}", self._get_reference),
            self._operation("PUT", "/references/{name}", self._put_reference),
            self._operation("DELETE", "/references/{name}", self._delete_reference),
            self._operation("GET", "/tokens", self._list_tokens),
            self._operation("POST", "/tokens", self._create_token),
            self._operation("DELETE", "/tokens/{name}", self._revoke_token),
            self._operation("GET", "/audit", self._audit),
            self._operation("GET", "/audit/verification", self._verify_audit),
            self._operation("GET", "/audit/key", self._audit_key),
        ]

    def _operation(self, method: str, path: str, handler: Handler) -> Operation:
        action = f"desk-{method.lower()}-{path.split('/')[1]}"
        endpoint = Endpoint(handler, desk_answer, door=Door.ADMINISTRATION, action=action, metrics=self._metrics)
        return Operation(method, DESK + path, endpoint)

    async def _who(self, call: Call) -> Administrator:
        return await self._administrators.of(call)

    # ---- Resources

    async def _list_resources(self, call: Call) -> Reply:
        who = await self._who(call)
        rows = await asyncio.to_thread(self._desk.list_resources, who)
        return Reply.of({"resources": [{**_row(row), "path": str(row.path)} for row in rows]})

    async def _put_resource(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        return _version(await asyncio.to_thread(self._desk.put_resource, who, path, await call.read()))

    async def _delete_resource(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        await asyncio.to_thread(self._desk.delete_resource, who, path)
        return Reply(204)

    async def _rotate_resource(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        return _version(await asyncio.to_thread(self._desk.rotate_resource, who, path))

    async def _create_key(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        return _version(await asyncio.to_thread(self._desk.create_key, who, path))

    async def _retire_resource(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        document = await self._body(call, {"version": int}, {})
        await asyncio.to_thread(self._desk.retire_resource, who, path, _number("version", document["version"]))
        return Reply(204)

    async def _read_resource(self, call: Call) -> Reply:
        who, path = await self._who(call), call.resource_path()
        document = await self._body(call, {}, {"version": int})
        version = _number("version", document["version"]) if "version" in document else None
        found = await asyncio.to_thread(self._desk.read_resource, who, path, version)
        header = (b"x-csvfast-version", b"%d" % found.version)
        return Reply(200, bytes(memoryview(found.content)), _OCTETS, (header,))

    # ---- Policies

    async def _list_policies(self, call: Call) -> Reply:
        who = await self._who(call)
        return Reply.of({"policies": [_row(row) for row in await asyncio.to_thread(self._desk.list_policies, who)]})

    async def _get_policy(self, call: Call) -> Reply:
        who = await self._who(call)
        text = call.query.get("version")
        version = None if text is None else _decimal("version", text, 1, 1 << 30)
        kind, name = _choice("kind", call.path["kind"], _KINDS), call.path["id"]
        return Reply.of(_row(await asyncio.to_thread(self._desk.get_policy, who, kind, name, version)))

    async def _put_policy(self, call: Call) -> Reply:
        who = await self._who(call)
        document = await self._body(call, {"text": str}, {"engine": str})
        kind, name = _choice("kind", call.path["kind"], _KINDS), call.path["id"]
        engine: Any = _choice("engine", document.get("engine", "rules"), _ENGINES)
        put: Callable[..., int] = self._desk.put_policy
        return _version(await asyncio.to_thread(put, who, kind, name, document["text"], engine))

    async def _delete_policy(self, call: Call) -> Reply:
        who = await self._who(call)
        kind = _choice("kind", call.path["kind"], _KINDS)
        await asyncio.to_thread(self._desk.delete_policy, who, kind, call.path["id"])
        return Reply(204)

    async def _dry_run(self, call: Call) -> Reply:
        who = await self._who(call)
        optional = {"id": str, "text": str, "engine": str}
        document = await self._body(call, {"kind": str, "document": dict}, optional)
        kind = _choice("kind", document["kind"], _KINDS)
        engine = _choice("engine", document.get("engine", "rules"), _ENGINES)
        run: Callable[..., Any] = self._desk.dry_run
        decision, explanation = await asyncio.to_thread(
            run, who, kind, document["document"], name=document.get("id"), text=document.get("text"), engine=engine
        )
        return Reply.of({"decision": decision.to_dict(), "explanation": explanation})

    # ---- References

    async def _list_references(self, call: Call) -> Reply:
        who = await self._who(call)
        return Reply.of({"references": [_row(row) for row in await asyncio.to_thread(self._desk.list_references, who)]})

    async def _get_reference(self, call: Call) -> Reply:
        who = await self._who(call)
        return Reply.of(_row(await asyncio.to_thread(self._desk.get_reference, who, call.path["name"])))

    async def _put_reference(self, call: Call) -> Reply:
        who = await self._who(call)
        document = await self._body(call, {"values": list}, {"expires": None})
        expires = _time("expires", document.get("expires"))
        await asyncio.to_thread(self._desk.put_reference, who, call.path["name"], document["values"], expires)
        return Reply(204)

    async def _delete_reference(self, call: Call) -> Reply:
        who = await self._who(call)
        await asyncio.to_thread(self._desk.delete_reference, who, call.path["name"])
        return Reply(204)

    # ---- Tokens

    async def _list_tokens(self, call: Call) -> Reply:
        who = await self._who(call)
        return Reply.of({"tokens": [_row(row) for row in await asyncio.to_thread(self._desk.list_tokens, who)]})

    async def _create_token(self, call: Call) -> Reply:
        who = await self._who(call)
        document = await self._body(call, {"name": str, "roles": list}, {"scope": str, "expires": None})
        if not all(type(role) is str for role in document["roles"]):
            raise RequestError("roles: expected an array of strings")
        scope = document.get("scope", "*")
        if not 0 < len(scope) <= 512 or not (scope.isascii() and scope.isprintable()):
            raise RequestError("scope: expected a glob of 1 to 512 printable characters")
        secret = await asyncio.to_thread(
            self._desk.create_token,
            who,
            document["name"],
            document["roles"],
            scope=scope,
            expires=_time("expires", document.get("expires")),
        )
        return Reply.of({"token": bytes(memoryview(secret)).decode("ascii")}, 201)

    async def _revoke_token(self, call: Call) -> Reply:
        who = await self._who(call)
        await asyncio.to_thread(self._desk.revoke_token, who, call.path["name"])
        return Reply(204)

    # ---- Audit

    async def _audit(self, call: Call) -> Reply:
        who, query = await self._who(call), call.query
        after = _decimal("after", query.pop("after", "0"), 0, 1 << 62)
        limit = _decimal("limit", query.pop("limit", "100"), 1, AUDIT_LIMIT)
        if query.keys() & {"who", "self"}:
            raise RequestError("filter: expected a member of audit records")

        def records() -> list[dict[str, Any]]:
            found = self._desk.audit_records(who, after=after, limit=limit, **query)
            return [{"sequence": entry.sequence, **_row(entry.record)} for entry in islice(found, limit)]

        return Reply.of({"records": await asyncio.to_thread(records)})

    async def _verify_audit(self, call: Call) -> Reply:
        who = await self._who(call)
        return Reply.of(_row(await asyncio.to_thread(self._desk.verify_audit, who)))

    async def _audit_key(self, call: Call) -> Reply:
        await self._who(call)
        return Reply.of({"point": self._desk.audit_public_key().point.hex()})

    @staticmethod
    async def _body(call: Call, required: Mapping[str, type], optional: Mapping[str, type | None]) -> dict[str, Any]:
        """An object with these members; None: of any type, looked at later."""
        body = await call.read()
        value = loads(body, "body", limit=len(body)) if body else {}
        anything = {name for name, kind in optional.items() if kind is None}
        typed = {name: kind for name, kind in optional.items() if kind is not None}
        rest = {name: item for name, item in value.items() if name not in anything} if type(value) is dict else value
        members(rest, "body", required, typed)
        found: dict[str, Any] = value
        return found


def desk_answer(error: Exception, correlation: str) -> Reply:
    """An error in the form of this API."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, KbsError):
        if error.variant == "AdminAuthAccess":
            return _error(401, "unauthenticated", error.detail, correlation, ((b"www-authenticate", b"Bearer"),))
        return _error(error.status if error.status != 401 else 400, "request", error.detail, correlation)
    for kind, status, name in _ERRORS:
        if isinstance(error, kind):
            if isinstance(error, DeniedError):
                # An administrator is no guest: he may know which of his roles is missing.
                return _error(status, name, error.reason, error.correlation or correlation)
            if isinstance(error, LimitedError):
                headers = ((b"retry-after", b"%d" % max(1, math.ceil(min(error.retry_after, 86400)))),)
            return _error(status, name, str(error), correlation, headers)
    return _error(500, "internal", "internal error", correlation)


def _error(status: int, kind: str, detail: str, correlation: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Reply:
    body = Reply.of({"error": kind, "detail": detail, "correlation": correlation}, status)
    return body._replace(headers=headers)


def _row(row: Any) -> dict[str, Any]:
    return asdict(row)


def _version(number: int) -> Reply:
    return Reply.of({"version": number})


def _choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RequestError(f"{name}: expected {' or '.join(known)}")
    return value


def _number(name: str, value: int) -> int:
    if not 1 <= value < 1 << 31:
        raise RequestError(f"{name}: expected an integer from 1 on")
    return value


def _decimal(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19) or not least <= int(text) <= most:
        raise RequestError(f"{name}: expected a decimal number from {least} to {most}")
    return int(text)


def _time(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < 1 << 40:
        raise RequestError(f"{name}: expected seconds since the epoch, or null")
    return float(value)
