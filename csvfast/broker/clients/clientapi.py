"""A client of Verdictd's client API, as its tool `verdict` is one: of our broker, and of Verdictd itself.

Where the original answers with a text other than OK, RequestError holds that text.
Thread-safety: threads may share a client.
"""

from __future__ import annotations

import base64
import binascii
import json
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.broker.clients.grpc_channel import Channel, ChannelTls
from csvfast.broker.grpc_messages import CLIENT_API, METHODS, Fields, Value
from csvfast.crypto import Secret
from csvfast.errors import RequestError, UnknownError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ClientApiClient"]

_OK: Final = "OK"
_KEY_MISSING: Final = "key is not exist"


class ClientApiClient:
    """Verdictd's management interface. Every method raises as Channel.call, and RequestError for a status that is not OK.

    In: address   "host:port" or "unix:/path"
        token     an administrator's
        tls       None: none
    """

    def __init__(
        self, address: str, *, token: Secret | str | None = None, tls: ChannelTls | None = None, timeout: float = 30.0
    ) -> None:
        self._channel = Channel(address, token=token, tls=tls, timeout=timeout)

    # ---- Keys

    def create_key(self) -> str:
        """Makes a key of 32 bytes. Out: its id."""
        return self._checked("KeyManagerService/CreateKey").text("uuid")

    def get_key(self, uuid: str) -> Secret:
        """A key. UnknownError."""
        return Secret(_decoded(self._checked("KeyManagerService/GetKey", uuid=uuid.encode()).bytes("key")))

    def delete_key(self, uuid: str) -> None:
        """Destroys a key. UnknownError."""
        self._checked("KeyManagerService/DeleteKey", uuid=uuid.encode())

    # ---- Policies

    def set_policy(self, name: str, content: str) -> str:
        """Stores a Rego policy. Out: the status, which is not OK for a policy that is stored without being in force."""
        return self._call("OpaService/SetOpaPolicy", name=name.encode(), content=content.encode()).text("status")

    def export_policy(self, name: str) -> str:
        """A policy's text."""
        return self._checked("OpaService/exportOpaPolicy", name=name.encode()).text("content")

    def set_reference(self, name: str, content: str) -> None:
        """Sets a reference document, JSON."""
        self._checked("OpaService/setOpaReference", name=name.encode(), content=content.encode())

    def export_reference(self, name: str) -> str:
        """A reference document, JSON."""
        return self._checked("OpaService/exportOpaReference", name=name.encode()).text("content")

    def test(
        self,
        document: str,
        *,
        policy: str | None = None,
        policy_text: str | None = None,
        reference: str | None = None,
        reference_text: str | None = None,
    ) -> Mapping[str, Any]:
        """What a policy says of an input document: {"allow": bool, "parseInfo": ...}. Policy and reference by name or as text."""
        reply = self._call(
            "OpaService/TestOpa",
            policyname=(policy or "").encode(),
            policycontent=(policy_text or "").encode(),
            policylocal=policy_text is not None,
            referencename=(reference or "").encode(),
            referencecontent=(reference_text or "").encode(),
            referencelocal=reference_text is not None,
            input=document.encode(),
        )
        status = reply.text("status")
        try:
            answer = json.loads(status)
        except ValueError:
            raise RequestError(status[:500]) from None
        if not isinstance(answer, dict) or type(answer.get("allow")) is not bool:
            raise RequestError(f"TestOpa: {status[:500]}")
        return answer

    # ---- Keyring and images

    def list_gpg_keys(self) -> str:
        """The keyring's keys, for people to read."""
        return self._call("GpgService/listGpgKeys").text("keys")

    def import_gpg_key(self, key: bytes) -> str:
        """Adds keys, armored or binary, to the keyring. Out: what became of them, for people to read."""
        return self._call("GpgService/importGpgKey", key=key).text("status")

    def delete_gpg_key(self, key_id: str) -> str:
        """Removes a key from the keyring, by fingerprint or long key id. Out: the status."""
        return self._call("GpgService/deleteGpgKey", keyid=key_id.encode()).text("status")

    def export_gpg_keyring(self) -> bytes:
        """The keyring, binary."""
        return _decoded(self._checked("GpgService/exportGpgKeyring").bytes("content"))

    def set_image_policy(self, content: str) -> None:
        """policy.json of containers-policy.json(5)."""
        self._checked("ImageService/setImagePolicy", content=content.encode())

    def export_image_policy(self) -> str:
        """As it was set."""
        return self._checked("ImageService/exportImagePolicy").text("content")

    def set_image_sigstore(self, content: str) -> None:
        """sigstore.yaml of containers-registries.d(5)."""
        self._checked("ImageService/setImageSigstore", content=content.encode())

    def export_image_sigstore(self) -> str:
        """As it was set."""
        return self._checked("ImageService/exportImageSigstore").text("content")

    # ---- Behind it

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, name: str, /, **fields: Value) -> Fields:
        return self._channel.call(METHODS[f"/{CLIENT_API}.{name}"], **fields)

    def _checked(self, name: str, /, **fields: Value) -> Fields:
        reply = self._call(name, **fields)
        status = reply.text("status")
        if status == _KEY_MISSING:
            raise UnknownError(status)
        if status != _OK:
            raise RequestError(f"{name}: {status[:500]}")
        return reply


def _decoded(data: bytes) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the reply's content is no base64") from None
