"""Verdictd's client API, in terms of Administration: whatever a caller does here he could do through the broker's own interface.

    KeyManagerService   keys default/key/<uuid>                                             role "keys"
    GpgService          verdictd/image/gpg-keyring, see csvfast.broker.clientapi.openpgp     role "keys"
    ImageService        verdictd/image/policy, verdictd/image/sigstore                       role "keys"
    OpaService          policies with the engine Rego, by id; csvData: the reference         role "policy"
                        "csv_measure", by which guests are appraised

The original's Rego policy csvPolicy.rego decides about every connection; here the appraisal policy does. Such a policy is
stored, exported and tried out (TestOpa), and the reply to SetOpaPolicy says that it is not in force, instead of OK. Its usual
content, that the measurement is one of csvData's, is what the appraisal policy demands anyway. A policy whose id is "default" or
the name of a repository is a resource policy like any other and counts from the moment of its OK.

Replies carry the original's texts in `status`; who may not, or comes too often, gets a gRPC status instead.

Source: inclavare-containers/verdictd proto/clientapi.proto, src/client_api; cmd/verdict (what its tool prints).
Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

from csvfast.broker.clientapi import messages, openpgp
from csvfast.broker.grpc_messages import CLIENT_API, METHODS, Fields, Method, Value
from csvfast.broker.model import VERDICTD_KEYS, Door, ResourcePath
from csvfast.broker.policy.references import a_year_after
from csvfast.errors import (
    BrokerError,
    DeniedError,
    FormatError,
    LimitedError,
    MissingExtraError,
    RequestError,
    UnknownError,
)

if TYPE_CHECKING:
    from csvfast.broker.administration import Administration, Administrator
    from csvfast.broker.core import Broker
    from csvfast.broker.grpc_server import Caller, Handler

__all__ = ["ClientApi"]

Reply = dict[str, Value]
_Call = Callable[["Administrator", Fields], Awaitable[Reply]]

_RULES_ROLE: Final = "policy"


class ClientApi:
    """The methods of the four services.

    In: broker           its clock, and records of refusals
        administration   does everything
    """

    def __init__(self, broker: Broker, administration: Administration) -> None:
        self._broker = broker
        self._administration = administration
        self._keyring = asyncio.Lock()  # reading, changing and writing it belong together

    def handlers(self) -> Mapping[str, Handler]:
        """For GrpcServer."""
        calls: dict[str, _Call] = {
            "KeyManagerService/CreateKey": self._create_key,
            "KeyManagerService/GetKey": self._get_key,
            "KeyManagerService/DeleteKey": self._delete_key,
            "OpaService/SetOpaPolicy": self._set_opa_policy,
            "OpaService/exportOpaPolicy": self._export_opa_policy,
            "OpaService/setOpaReference": self._set_opa_reference,
            "OpaService/exportOpaReference": self._export_opa_reference,
            "OpaService/TestOpa": self._test_opa,
            "GpgService/listGpgKeys": self._list_gpg_keys,
            "GpgService/importGpgKey": self._import_gpg_key,
            "GpgService/deleteGpgKey": self._delete_gpg_key,
            "GpgService/exportGpgKeyring": self._export_gpg_keyring,
            "ImageService/exportImageSigstore": self._exporting(messages.IMAGE_SIGSTORE),
            "ImageService/setImageSigstore": self._setting(messages.IMAGE_SIGSTORE),
            "ImageService/exportImagePolicy": self._exporting(messages.IMAGE_POLICY),
            "ImageService/setImagePolicy": self._setting(messages.IMAGE_POLICY),
        }
        methods = (METHODS[f"/{CLIENT_API}.{name}"] for name in calls)
        return {method.path: self._handler(method, call) for method, call in zip(methods, calls.values(), strict=True)}

    def _handler(self, method: Method, call: _Call) -> Handler:
        has_status = "status" in method.reply.DESCRIPTOR.fields_by_name

        async def serve(caller: Caller, data: bytes) -> bytes:
            who = caller.require_administrator()
            request = method.read_request(data)
            try:
                reply = await call(who, request)
            except (RequestError, FormatError, UnknownError, MissingExtraError) as error:
                if not has_status:
                    raise
                reply = {"status": str(error).encode()}
            return method.write_reply(**reply)

        return serve

    # ---- KeyManagerService

    async def _create_key(self, who: Administrator, _request: Fields) -> Reply:
        name = str(uuid.uuid4())
        try:
            await asyncio.to_thread(self._administration.create_key, who, _key_path(name))
        except (DeniedError, LimitedError):
            raise
        except BrokerError:
            return {"status": messages.CREATE_FAILED}
        return {"status": messages.OK, "uuid": name.encode()}

    async def _get_key(self, who: Administrator, request: Fields) -> Reply:
        try:
            found = await asyncio.to_thread(self._administration.read_resource, who, _key_path(request.text("uuid")))
        except (RequestError, UnknownError):
            return {"status": messages.KEY_MISSING}
        return {"status": messages.OK, "key": base64.b64encode(memoryview(found.content))}

    async def _delete_key(self, who: Administrator, request: Fields) -> Reply:
        try:
            await asyncio.to_thread(self._administration.delete_resource, who, _key_path(request.text("uuid")))
        except (RequestError, UnknownError):
            return {"status": messages.KEY_MISSING}
        return {"status": messages.OK}

    # ---- OpaService

    async def _set_opa_policy(self, who: Administrator, request: Fields) -> Reply:
        name, content = _checked_name(request.text("name")), request.text("content")
        version = await asyncio.to_thread(self._administration.put_policy, who, "resource", name, content, "rego")
        if name == messages.CSV_POLICY:
            text = (
                f"stored as version {version}, not in force: the appraisal policy decides about guests, "
                f"among others by the measurements of {messages.CSV_DATA}"
            )
            return {"status": text.encode()}
        return {"status": messages.OK}

    async def _export_opa_policy(self, who: Administrator, request: Fields) -> Reply:
        return {"status": messages.OK, "content": (await self._policy(who, request.text("name"))).encode()}

    async def _set_opa_reference(self, who: Administrator, request: Fields) -> Reply:
        _check_data_name(request.text("name"))
        values = messages.read_csv_data(request.bytes("content"))
        if values:
            expires = a_year_after(self._broker.clock())
            await asyncio.to_thread(
                self._administration.put_reference, who, messages.MEASURE_REFERENCE, values, expires
            )
        else:
            await asyncio.to_thread(self._administration.delete_reference, who, messages.MEASURE_REFERENCE)
        return {"status": messages.OK}

    async def _export_opa_reference(self, who: Administrator, request: Fields) -> Reply:
        return {"status": messages.OK, "content": await self._reference(who, request.text("name"))}

    async def _test_opa(self, who: Administrator, request: Fields) -> Reply:
        """Policy and reference each come with the request ("local") or by name."""
        from csvfast.broker.policy.rego import evaluate_verdictd  # needs an extra of its own

        if _RULES_ROLE not in who.roles:
            self._broker.record_refusal(door=Door.CLIENTAPI, address=who.address, reason=f"{who.name}: TestOpa: no role 'policy'")
            raise DeniedError(f"{who.name}: TestOpa: has not the role 'policy'")
        for local, ending in ((True, "content"), (False, "name")):
            for what in ("policy", "reference"):
                if request.flag(f"{what}local") is local and not request.bytes(f"{what}{ending}"):
                    return {"status": f"parse {what}{ending} failed".encode()}
        if not request.bytes("input"):
            return {"status": b"parse input failed"}
        if request.flag("policylocal"):
            policy = request.text("policycontent")
        else:
            policy = await self._policy(who, request.text("policyname"))
        if request.flag("referencelocal"):
            data = request.text("referencecontent")
        else:
            data = (await self._reference(who, request.text("referencename"))).decode()
        decision = await asyncio.to_thread(evaluate_verdictd, policy, data, request.text("input"))
        found = "" if decision.allowed else f"{decision.rule}: found {decision.observed}; expected {decision.expected}"
        return {"status": json.dumps({"allow": decision.allowed, "parseInfo": found}).encode()}

    async def _policy(self, who: Administrator, name: str) -> str:
        row = await asyncio.to_thread(self._administration.get_policy, who, "resource", _checked_name(name))
        return row.text

    async def _reference(self, who: Administrator, name: str) -> bytes:
        _check_data_name(name)
        row = await asyncio.to_thread(self._administration.get_reference, who, messages.MEASURE_REFERENCE)
        return messages.write_csv_data(row.values)

    # ---- GpgService

    async def _list_gpg_keys(self, who: Administrator, _request: Fields) -> Reply:
        return {"keys": "\n".join(key.lines() for key in await self._keys(who)).encode()}

    async def _import_gpg_key(self, who: Administrator, request: Fields) -> Reply:
        new = openpgp.read_keyring(request.bytes("key"))
        async with self._keyring:
            old = await self._keys(who)
            keyring = openpgp.write_keyring(openpgp.merge_keys(old, new))
            await asyncio.to_thread(self._administration.put_resource, who, messages.GPG_KEYRING, keyring)
        known = {key.fingerprint for key in old}
        lines = [f"gpg: key {key.key_id}: public key imported" for key in new if key.fingerprint not in known]
        lines += [f"gpg: key {key.key_id}: replaced" for key in new if key.fingerprint in known]
        return {"status": "\n".join([*lines, f"gpg: Total number processed: {len(new)}", ""]).encode()}

    async def _delete_gpg_key(self, who: Administrator, request: Fields) -> Reply:
        async with self._keyring:
            keys = await self._keys(who)
            found = openpgp.find_keys(keys, request.text("keyid"))
            if len(found) != 1:
                raise UnknownError(f"{len(found)} keys of that id; expected a fingerprint or long key id of one in the keyring")
            left = [key for key in keys if key != found[0]]
            if left:
                keyring = openpgp.write_keyring(left)
                await asyncio.to_thread(self._administration.put_resource, who, messages.GPG_KEYRING, keyring)
            else:
                await asyncio.to_thread(self._administration.delete_resource, who, messages.GPG_KEYRING)
        return {"status": messages.GPG_DELETED}

    async def _export_gpg_keyring(self, who: Administrator, _request: Fields) -> Reply:
        found = await asyncio.to_thread(self._administration.read_resource, who, messages.GPG_KEYRING)
        return {"status": messages.OK, "content": base64.b64encode(memoryview(found.content))}

    async def _keys(self, who: Administrator) -> list[openpgp.PublicKey]:
        try:
            found = await asyncio.to_thread(self._administration.read_resource, who, messages.GPG_KEYRING)
        except UnknownError:
            return []
        return openpgp.read_keyring(bytes(memoryview(found.content)))

    # ---- ImageService

    def _exporting(self, path: ResourcePath) -> _Call:
        async def export(who: Administrator, _request: Fields) -> Reply:
            found = await asyncio.to_thread(self._administration.read_resource, who, path)
            return {"status": messages.OK, "content": bytes(memoryview(found.content))}

        return export

    def _setting(self, path: ResourcePath) -> _Call:
        async def put(who: Administrator, request: Fields) -> Reply:
            content = request.text("content").encode()  # the originals are text, and so are their readers
            if not content:
                raise RequestError("content is empty; expected the whole file")
            await asyncio.to_thread(self._administration.put_resource, who, path, content)
            return {"status": messages.OK}

        return put


def _key_path(name: str) -> ResourcePath:
    """default/key/<name>, and nothing else: the key manager has no say over other resources."""
    return ResourcePath.parse("/".join((*VERDICTD_KEYS, name)))


def _checked_name(name: str) -> str:
    if name in messages.UNSUPPORTED_NAMES:
        raise RequestError(f"{name}: this broker attests CSV guests; expected {messages.CSV_POLICY} or a resource policy's id")
    return name


def _check_data_name(name: str) -> None:
    if name != messages.CSV_DATA:
        raise RequestError(f"reference {ascii(name)[:60]}: expected {messages.CSV_DATA}")
