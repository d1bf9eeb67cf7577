"""WrapKey and UnWrapKey: layer keys of encrypted images under key-encryption keys that never leave the broker.

An administrator with the role "keys" wraps: a key-encryption key is a resource, default/key/<name> or any other of 32 bytes. He
may unwrap, too; an attested guest may unwrap what the resource policy allows it. Every use of a key is on record, by
Administration.read_resource or Broker.release, before what it opens leaves the process.

A token is no secret that only its guest has: guests show theirs to others. So what is unwrapped for a guest is sent as a JWE to
the key in its token, as the KBS sends resources, and `optsdata` holds the JWE; KeyProviderClient opens it. Administrators get the
private options as they are, which is what tools like skopeo understand.

When a key has been rotated, packets of its older versions open as long as these are not retired: the packet does not say which
version made it, so they are tried, newest first, each on record.

Source: see csvfast.broker.keyprovider.messages.
Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal

from csvfast.broker.grpc_messages import KEY_PROVIDER, METHODS
from csvfast.broker.kbs.jwe import seal_jwe
from csvfast.broker.keyprovider.messages import (
    choose_parameters,
    read_packet,
    read_unwrap_request,
    read_wrap_request,
    unwrap_reply,
    wrap_options,
    wrap_reply,
)
from csvfast.broker.logs import event
from csvfast.broker.model import VERDICTD_KEYS, Door, ResourcePath
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, DeniedError, RequestError, UnknownError

if TYPE_CHECKING:
    from csvfast.broker.administration import Administration
    from csvfast.broker.core import Broker
    from csvfast.broker.grpc_server import Caller, Handler
    from csvfast.broker.keyprovider.messages import AnnotationPacket
    from csvfast.broker.store import Resource

__all__ = ["DEFAULT_PROVIDER", "KeyProvider"]

DEFAULT_PROVIDER: Final = "attestation-agent"
"""The provider's name for which CoCo's guests ask."""

_log: Final = logging.getLogger(__name__)
_WRAP: Final = METHODS[f"/{KEY_PROVIDER}/WrapKey"]
_UNWRAP: Final = METHODS[f"/{KEY_PROVIDER}/UnWrapKey"]
_VERSIONS: Final = 8  # of a key that are tried


class KeyProvider:
    """The methods of the key provider service.

    In: broker, administration   where keys are
        provider                 our name in clients' configurations
        prefix                   repository and type of keys made here
        create_keys              WrapKey without a key id makes a new key; otherwise it is refused
        packets                  form of packets when the request asks for none
        allow_unauthenticated    open A256CTR packets, see AnnotationPacket.open
    """

    def __init__(
        self,
        broker: Broker,
        administration: Administration,
        *,
        provider: str = DEFAULT_PROVIDER,
        prefix: tuple[str, str] = VERDICTD_KEYS,
        create_keys: bool = True,
        packets: Literal["coco", "verdictd"] = "coco",
        allow_unauthenticated: bool = False,
    ) -> None:
        self._broker = broker
        self._administration = administration
        self._provider = provider
        self._prefix = prefix
        self._create_keys = create_keys
        self._packets: Literal["coco", "verdictd"] = packets
        self._allow_unauthenticated = allow_unauthenticated

    def handlers(self) -> Mapping[str, Handler]:
        """For GrpcServer."""
        return {_WRAP.path: self.wrap, _UNWRAP.path: self.unwrap}

    async def wrap(self, caller: Caller, data: bytes) -> bytes:
        """WrapKey, from encoded message to encoded message."""
        who = caller.require_administrator()
        request = read_wrap_request(_WRAP.read_request(data).bytes("KeyProviderKeyWrapProtocolInput"))
        parameters = choose_parameters(request.parameters, self._provider)
        path = parameters.path
        if path is None:
            if not self._create_keys:
                raise RequestError("no key id; expected one: this provider makes no keys by itself")
            path = ResourcePath.parse("/".join((*self._prefix, str(uuid.uuid4()))))
            await asyncio.to_thread(self._administration.create_key, who, path)
        key = await asyncio.to_thread(self._administration.read_resource, who, path)
        packet = wrap_options(path, key.content, request.options, parameters.style or self._packets)
        return _WRAP.write_reply(KeyProviderKeyWrapProtocolOutput=wrap_reply(packet.encode()))

    async def unwrap(self, caller: Caller, data: bytes) -> bytes:
        """UnWrapKey, from encoded message to encoded message."""
        request = _UNWRAP.read_request(data).bytes("KeyProviderKeyWrapProtocolInput")
        packet = read_packet(read_unwrap_request(request))
        if packet.wrap_type == "A256CTR" and not self._allow_unauthenticated:
            raise RequestError("annotation packet: wrap_type A256CTR is not authenticated; expected A256GCM")
        key = await self._key(caller, packet, None)
        newest = key.version
        for version in range(newest, max(0, newest - _VERSIONS), -1):
            if version != newest:
                try:
                    key = await self._key(caller, packet, version)
                except (UnknownError, DeniedError):  # retired; a guest is not told, and was allowed the newest
                    continue
            try:
                options = packet.open(key.content, allow_unauthenticated=self._allow_unauthenticated)
            except AuthenticationError:
                continue
            if caller.session is not None:
                options = Secret(seal_jwe(caller.session.key, options))
            return _UNWRAP.write_reply(KeyProviderKeyWrapProtocolOutput=unwrap_reply(options))
        if not caller.is_local:
            self._broker.limits.note_failure(caller.address)
        event(
            _log, logging.WARNING, "packet does not open", door=Door.KEYPROVIDER, resource=packet.path,
            address=caller.address, correlation=caller.correlation,
        )  # fmt: skip
        raise RequestError(f"annotation packet: does not open with the key {packet.path}")

    async def _key(self, caller: Caller, packet: AnnotationPacket, version: int | None) -> Resource:
        """The key-encryption key, its use on record."""
        if caller.administrator is not None:
            return await asyncio.to_thread(self._administration.read_resource, caller.administrator, packet.path, version)
        if caller.session is None:
            raise DeniedError("neither administrator nor guest", caller.correlation)
        return await self._broker.release(
            caller.session.attestation,
            packet.path,
            door=Door.KEYPROVIDER,
            address=caller.address,
            correlation=caller.correlation,
            query={} if version is None else {"version": str(version)},
            action="unwrap",
        )
