"""Key wrappers over key-encryption keys (KEKs): from a file, from a broker after attestation, or that stay with the broker.

    LocalKek(kek, "default/key/images")     a KEK at hand
    KbsKeks(client)                         KEKs as resources of CoCo's KBS
    VerdictdKeks(client)                    KEKs through Verdictd's command Get KEK
    VerdictdDecrypt(client)                 packets opened by Verdictd's command Decrypt: KEKs stay where they are

A client is one of csvfast.broker.clients, ready for use; it stays the caller's. KEKs from brokers are kept until close(), so that
an image's layers cost one request and not one each.

They read packets of every form that csvfast.broker.keyprovider.messages knows, under any provider's name, as CoCo's guests do.
A256CTR packets do not open: they are not authenticated.

Thread-safety: as the client; LocalKek: threads may share it.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, ImageError, RequestError
from csvfast.image.keys import ATTESTATION_AGENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from csvfast.broker.keyprovider.messages import PacketStyle
    from csvfast.broker.model import ResourcePath
    from csvfast.broker.verdictd.protocol import Blob

__all__ = ["KbsKeks", "LocalKek", "VerdictdDecrypt", "VerdictdKeks", "parameters_of"]

_KEK_BYTES: Final = 32


class _KbsClient(Protocol):
    def get_resource(self, path: ResourcePath, /) -> Secret: ...


class _KekClient(Protocol):
    def get_kek(self, kid: str, /) -> Secret: ...


class _DecryptClient(Protocol):
    def decrypt(self, blobs: Sequence[Blob], /) -> list[Secret]: ...


class _Keks:
    """What the wrappers that see KEKs have in common. In: scheme, style   of the packets they make."""

    name = "KEK"

    def __init__(self, *, scheme: str = ATTESTATION_AGENT, style: PacketStyle = "coco") -> None:
        self.scheme: str = scheme
        self._style = style
        self._kept: dict[ResourcePath, Secret] = {}

    def opens(self, scheme: str) -> bool:
        """Those of key providers."""
        return scheme.startswith("provider.")

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        """As KeyWrapper. In: parameters   a key id, "keyid=...", "packet=coco|verdictd", as key providers take them."""
        from csvfast.broker.keyprovider.messages import parse_parameters, wrap_options

        asked = parse_parameters(parameters.encode())
        path = asked.path if asked.path is not None else self._default()
        return wrap_options(path, self._kek(path), private, asked.style or self._style).encode()

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:  # noqa: ARG002  # the packet says which key
        """As KeyWrapper."""
        from csvfast.broker.keyprovider.messages import read_packet

        found = read_packet(packet)
        was_kept = found.path in self._kept
        try:
            return found.open(self._kek(found.path))
        except AuthenticationError:
            if not was_kept:
                raise
        self._forget(found.path)  # rotated meanwhile
        return found.open(self._kek(found.path))

    def close(self) -> None:
        """Overwrites the KEKs that are kept. Idempotent."""
        for path in list(self._kept):
            self._forget(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _forget(self, path: ResourcePath) -> None:
        self._kept.pop(path).wipe()

    def _kek(self, path: ResourcePath) -> Secret:
        kept = self._kept.get(path)
        if kept is None:
            kept = self._kept[path] = self._fetch(path)
        return kept

    def _fetch(self, path: ResourcePath) -> Secret:
        raise NotImplementedError

    def _default(self) -> ResourcePath:
        raise ImageError(self.name, "no key id; expected one, such as kbs:///default/key/images")


class LocalKek(_Keks):
    """A key-encryption key at hand.

    In: kek   32 bytes
        kid   its name in packets: a plain name, repository/type/tag, or kbs:///repository/type/tag
    ImageError, RequestError: another length, no such name.
    """

    name = "KEK"

    def __init__(self, kek: Secret, kid: str, *, scheme: str = ATTESTATION_AGENT, style: PacketStyle = "coco") -> None:
        from csvfast.broker.model import for_kid

        super().__init__(scheme=scheme, style=style)
        self._path = for_kid(kid)
        self.name = f"KEK {self._path}"
        if len(kek) != _KEK_BYTES:
            raise ImageError(self.name, f"{len(kek)} bytes; expected {_KEK_BYTES}")
        self._own = Secret(kek)

    @classmethod
    def from_file(
        cls, path: Path, kid: str | None = None, *, scheme: str = ATTESTATION_AGENT, style: PacketStyle = "coco"
    ) -> Self:
        """From a file of 32 bytes that only its owner can read. In: kid   the file's name without its end, unless given.

        StateError: no such file, or open to others; ImageError, RequestError.
        """
        from csvfast.certs.private import read_private_file

        data = read_private_file(path.parent, path.name, 4096)
        try:
            if len(data) != _KEK_BYTES:
                raise ImageError(f"KEK {path}", f"{len(data)} bytes; expected {_KEK_BYTES}")
            return cls(Secret(data), path.stem if kid is None else kid, scheme=scheme, style=style)
        finally:
            data[:] = bytes(len(data))

    def close(self) -> None:
        """Overwrites the KEK."""
        self._own.wipe()

    def _kek(self, path: ResourcePath) -> Secret:
        if path != self._path:
            raise RequestError(f"for the key {path}")
        return self._own

    def _default(self) -> ResourcePath:
        return self._path


class KbsKeks(_Keks):
    """KEKs that are resources of a KBS. In: client   of csvfast.broker.clients.kbs."""

    name = "KBS"

    def __init__(self, client: _KbsClient, *, scheme: str = ATTESTATION_AGENT, style: PacketStyle = "coco") -> None:
        super().__init__(scheme=scheme, style=style)
        self._client = client

    def _fetch(self, path: ResourcePath) -> Secret:
        return self._client.get_resource(path)


class VerdictdKeks(_Keks):
    """KEKs by Verdictd's command Get KEK. In: client   of csvfast.broker.clients.verdictd."""

    name = "Verdictd (Get KEK)"

    def __init__(self, client: _KekClient, *, scheme: str = ATTESTATION_AGENT, style: PacketStyle = "verdictd") -> None:
        super().__init__(scheme=scheme, style=style)
        self._client = client

    def _fetch(self, path: ResourcePath) -> Secret:
        return self._client.get_kek(_kid(path))


class VerdictdDecrypt:
    """Packets opened by Verdictd's command Decrypt. In: client   of csvfast.broker.clients.verdictd."""

    name = "Verdictd (Decrypt)"
    scheme = ATTESTATION_AGENT

    def __init__(self, client: _DecryptClient) -> None:
        self._client = client

    def opens(self, scheme: str) -> bool:
        """Those of key providers."""
        return scheme.startswith("provider.")

    def wrap(self, private: Secret, parameters: str = "") -> bytes:  # noqa: ARG002  # it is never done
        """ImageError: that command does not encrypt."""
        raise ImageError(self.name, "decrypts only; expected a key provider, or Get KEK, to wrap keys with")

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:  # noqa: ARG002  # the packet says which key
        """As KeyWrapper."""
        from csvfast.broker.keyprovider.messages import read_packet
        from csvfast.broker.verdictd.protocol import Blob

        found = read_packet(packet)
        if found.wrap_type != "A256GCM":
            raise RequestError(f"annotation packet: wrap_type {found.wrap_type} is not authenticated; expected A256GCM")
        return self._client.decrypt([Blob(_kid(found.path), _b64(found.wrapped_data), "AES", 256, _b64(found.iv))])[0]


def _kid(path: ResourcePath) -> str:
    from csvfast.broker.model import VERDICTD_KEYS

    return path.tag if (path.repository, path.type) == VERDICTD_KEYS else str(path)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def parameters_of(packet: bytes) -> str:
    """What a key provider is told to make a packet for the same key in the same form. RequestError: no packet of a known form."""
    from csvfast.broker.keyprovider.messages import read_packet

    found = read_packet(packet)
    return f"keyid={found.path.uri}::packet={'verdictd' if found.style == 'verdictd' else 'coco'}"
