"""The door of ocicrypt's key provider protocol: tools that encrypt and decrypt container images wrap their layers' keys here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast._lazy import lazy

if TYPE_CHECKING:
    from csvfast.broker.keyprovider.door import KeyProvider

from csvfast.broker.keyprovider.messages import AnnotationPacket, read_packet

__all__ = ["AnnotationPacket", "KeyProvider", "read_packet"]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "KeyProvider": "door",
        },
    )  # fmt: skip
