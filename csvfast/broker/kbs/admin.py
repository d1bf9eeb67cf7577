"""Administration as CoCo's `kbs-client` asks for it, and who may ask.

    POST, DELETE  /kbs/v0/resource/<r>/<t>/<t>    raw bytes
    GET, POST     /kbs/v0/resource-policy         {"policy": base64url}
    POST          /kbs/v0/attestation-policy      {"type": "rego", "policy_id": "default_cpu", "policy": base64url}
    GET           /kbs/v0/reference-value/<name>
    POST          /kbs/v0/reference-value         RVPS message

An administrator comes with a token of this broker ("csvt_..."), with a JWT of a configured key, or with a client certificate.

Source: confidential-containers/trustee kbs/src/api_server.rs, tools/kbs-client/src/lib.rs. Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from csvfast.broker.json_input import loads, members
from csvfast.broker.kbs.admin_tokens import AdministratorKey, AdministratorTokens
from csvfast.broker.kbs.asgi import Call, Endpoint, Handler, Operation, Reply, kbs_answer
from csvfast.broker.kbs.errors import KbsError
from csvfast.broker.kbs.jwk import base64url, from_base64url
from csvfast.broker.model import Door
from csvfast.broker.policy.references import Reference, parse_message
from csvfast.errors import DeniedError, RequestError

if TYPE_CHECKING:
    from csvfast.broker.administration import Administration, Administrator
    from csvfast.broker.kbs.errors import Variant
    from csvfast.broker.kbs.metrics import Metrics
    from csvfast.broker.limits import Limits

__all__ = ["RESOURCE_PATH", "AdminApi", "Administrators"]

RESOURCE_PATH: Final = "/kbs/v0/resource/{path:path}"
POLICY_LIMIT: Final = 2 << 20
_DEFAULT_POLICY: Final = "default"


class Administrators:
    """Finds out who asks.

    In: administration   knows tokens and certificates, and does what is asked
        limits           of the broker
        keys             whose JWTs are believed
    """

    def __init__(self, administration: Administration, limits: Limits, keys: Sequence[AdministratorKey] = ()) -> None:
        self.administration: Final = administration
        self._limits = limits
        self._tokens = AdministratorTokens(keys)

    async def of(self, call: Call) -> Administrator:
        """The administrator. KbsError AdminAuthAccess, LimitedError."""
        try:
            token = call.bearer
        except RequestError as error:
            raise KbsError("AdminAuthAccess", str(error), call.correlation) from None
        if token is not None and token.count(".") == 2:
            self._limits.check_request(call.address)
            found = self._tokens.find(token, call.address, Door.KBS)
            if found is not None:
                return found
        # A browser shows its owner's certificate whichever page makes it ask; pages have an origin, tools have none.
        certificate = call.certificate if call.header(b"origin") is None else None
        try:
            return await asyncio.to_thread(
                self.administration.authenticate, token, certificate, address=call.address, door=Door.KBS
            )
        except DeniedError as error:
            raise KbsError("AdminAuthAccess", "not allowed", error.correlation or call.correlation) from None


class AdminApi:
    """CoCo's administrative operations."""

    def __init__(self, administrators: Administrators, metrics: Metrics) -> None:
        self._administrators = administrators
        self._administration = administrators.administration
        self._metrics = metrics

    def operations(self) -> list[Operation]:
        """What there is."""
        return [
            self._operation("POST", RESOURCE_PATH, self._put_resource, "put-resource", "PluginInternalError"),
            self._operation("DELETE", RESOURCE_PATH, self._delete_resource, "delete-resource", "PluginInternalError"),
            self._operation("GET", "/kbs/v0/resource-policy", self._get_policy, "get-policy", "PolicyEngineError"),
            self._operation("POST", "/kbs/v0/resource-policy", self._put_policy, "put-policy", "ParsePolicyError"),
            self._operation("POST", "/kbs/v0/attestation-policy", self._put_appraisal, "put-policy", "ParsePolicyError"),
            self._operation("GET", "/kbs/v0/reference-value/{name}", self._get_reference, "get-reference", "RvpsError"),
            self._operation("POST", "/kbs/v0/reference-value", self._put_references, "put-reference", "RvpsError"),
        ]

    def _operation(self, method: str, path: str, handler: Handler, action: str, variant: Variant) -> Operation:
        answer = partial(kbs_answer, variant)
        return Operation(method, path, Endpoint(handler, answer, door=Door.KBS, action=action, metrics=self._metrics))

    async def _put_resource(self, call: Call) -> Reply:
        who, path = await self._administrators.of(call), call.resource_path()
        await asyncio.to_thread(self._administration.put_resource, who, path, await call.read())
        return Reply(200)

    async def _delete_resource(self, call: Call) -> Reply:
        who, path = await self._administrators.of(call), call.resource_path()
        await asyncio.to_thread(self._administration.delete_resource, who, path)
        return Reply(200)

    async def _get_policy(self, call: Call) -> Reply:
        who = await self._administrators.of(call)
        found = await asyncio.to_thread(self._administration.get_policy, who, "resource", _DEFAULT_POLICY)
        return Reply.of({"policy": base64url(found.text.encode())})

    async def _put_policy(self, call: Call) -> Reply:
        who = await self._administrators.of(call)
        what = "resource policy"
        document = members(loads(await call.read(), what, limit=POLICY_LIMIT), what, {"policy": str})
        await self._store_policy(who, "resource", _DEFAULT_POLICY, document["policy"])
        return Reply(200)

    async def _put_appraisal(self, call: Call) -> Reply:
        who = await self._administrators.of(call)
        what = "attestation policy"
        needed = {"policy_id": str, "policy": str}
        document = members(loads(await call.read(), what, limit=POLICY_LIMIT), what, needed, {"type": str})
        if document.get("type", "rego") != "rego":
            raise RequestError(f"{what}: another type; expected rego")
        await self._store_policy(who, "appraisal", document["policy_id"], document["policy"])
        return Reply(200)

    async def _store_policy(self, who: Administrator, kind: Any, name: str, encoded: str) -> None:
        try:
            text = from_base64url(encoded.rstrip("="), "policy").decode()
        except UnicodeDecodeError:
            raise RequestError("policy: no UTF-8") from None
        await asyncio.to_thread(self._administration.put_policy, who, kind, name, text, "rego")

    async def _get_reference(self, call: Call) -> Reply:
        who = await self._administrators.of(call)
        found = await asyncio.to_thread(self._administration.get_reference, who, call.path["name"])
        reference = Reference(found.values)
        return Reply.of(reference.items[0] if reference.single else list(reference.items))

    async def _put_references(self, call: Call) -> Reply:
        who = await self._administrators.of(call)
        references = parse_message(await call.read(), time.time())

        def store() -> None:
            for name, reference in references.items():
                self._administration.put_reference(who, name, reference.values, reference.expires)

        await asyncio.to_thread(store)
        return Reply(200)
