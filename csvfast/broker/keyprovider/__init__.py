"""The door of ocicrypt's key provider protocol: tools that encrypt and decrypt container images wrap their layers' keys here."""

from __future__ import annotations

from csvfast.broker.keyprovider.door import KeyProvider
from csvfast.broker.keyprovider.messages import AnnotationPacket, read_packet

__all__ = ["AnnotationPacket", "KeyProvider", "read_packet"]
