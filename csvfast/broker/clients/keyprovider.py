"""A client of key providers: ours, and any other that speaks ocicrypt's protocol.

    with KeyProviderClient("unix:/run/csvfast/keyprovider.sock") as provider:
        packet = provider.wrap(options, "default/key/images")
        options = provider.unwrap(packet)

Thread-safety: threads may share a client.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from csvfast.broker.clients.grpc_channel import Channel, ChannelTls
from csvfast.broker.grpc_messages import KEY_PROVIDER, METHODS
from csvfast.broker.kbs.jwe import open_jwe
from csvfast.broker.keyprovider.messages import read_unwrap_reply, read_wrap_reply, unwrap_request, wrap_request

if TYPE_CHECKING:
    from csvfast.broker.kbs.jwe import GuestPrivateKey
    from csvfast.crypto import Secret

__all__ = ["ChannelTls", "KeyProviderClient"]

_WRAP: Final = METHODS[f"/{KEY_PROVIDER}/WrapKey"]
_UNWRAP: Final = METHODS[f"/{KEY_PROVIDER}/UnWrapKey"]


class KeyProviderClient:
    """Wraps and unwraps private options of image layers.

    In: address    "host:port" or "unix:/path"
        token      an administrator's, or a guest's from the KBS
        guest_key  of the guest whose token it is: our provider seals what it unwraps to this key
        tls        None: none
        provider   the provider's name, as in an image's annotations
    """

    def __init__(
        self,
        address: str,
        *,
        token: Secret | str | None = None,
        guest_key: GuestPrivateKey | None = None,
        tls: ChannelTls | None = None,
        provider: str = "attestation-agent",
        timeout: float = 30.0,
    ) -> None:
        self._channel = Channel(address, token=token, tls=tls, timeout=timeout)
        self._guest_key = guest_key
        self._provider = provider

    def wrap(self, options: Secret, parameters: str = "") -> bytes:
        """The annotation packet of private options. In: parameters   a key id, or "keyid=...::packet=verdictd"; "": a new key.

        Raises as Channel.call.
        """
        request = wrap_request(self._provider, [parameters.encode()], options)
        reply = self._channel.call(_WRAP, KeyProviderKeyWrapProtocolInput=request)
        return read_wrap_reply(reply.bytes("KeyProviderKeyWrapProtocolOutput"))

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        """The private options in an annotation packet, bit for bit.

        Raises as Channel.call; AuthenticationError: sealed to another guest's key.
        """
        request = unwrap_request(self._provider, [parameters.encode()], packet)
        reply = self._channel.call(_UNWRAP, KeyProviderKeyWrapProtocolInput=request)
        options = read_unwrap_reply(reply.bytes("KeyProviderKeyWrapProtocolOutput"))
        return options if self._guest_key is None else open_jwe(self._guest_key, bytes(memoryview(options)))

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
