"""Annotations of encrypted layers: public options, and wrapped keys by scheme.

    org.opencontainers.image.enc.pubopts            base64 of public options
    org.opencontainers.image.enc.keys.<scheme>      base64 of packets, joined by commas

    scheme: provider.<name> (key providers), jwe, pgp, pkcs7, pkcs11

Source: containers/ocicrypt encryption.go, keywrap/keyprovider/keyprovider.go.
Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.errors import ImageError
from csvfast.image.options import OPTIONS_LIMIT, PublicOptions

if TYPE_CHECKING:
    from csvfast.image.descriptor import Descriptor

__all__ = [
    "KEYS",
    "PACKET_LIMIT",
    "PREFIX",
    "PUBLIC_OPTIONS",
    "Packet",
    "check_scheme",
    "clear_annotations",
    "encrypted_annotations",
    "packets_of",
    "public_bytes_of",
    "public_options_of",
    "subject_of",
]

PREFIX: Final = "org.opencontainers.image.enc."
"""Of every annotation that encryption adds."""
PUBLIC_OPTIONS: Final = f"{PREFIX}pubopts"
KEYS: Final = f"{PREFIX}keys."

PACKET_LIMIT: Final = 64
"""Wrapped keys of one layer."""

_PACKET_BYTES: Final = 512 << 10
_SCHEME: Final = re.compile(r"(provider\.[A-Za-z0-9._-]{1,100}|jwe|pgp|pkcs7|pkcs11)\Z", re.ASCII)


class Packet(NamedTuple):
    """A wrapped key.

    scheme   "provider.attestation-agent", "jwe", ...
    data     for whoever unwraps it
    """

    scheme: str
    data: bytes


def subject_of(descriptor: Descriptor) -> str:
    """How errors call a layer."""
    return f"layer {descriptor.digest}"


def check_scheme(scheme: str) -> str:
    """The scheme. ImageError: none that an annotation may name."""
    if not _SCHEME.match(scheme):
        raise ImageError("key scheme", f"{ascii(scheme)[:60]}; expected provider.NAME, jwe, pgp, pkcs7 or pkcs11")
    return scheme


def public_bytes_of(descriptor: Descriptor) -> bytes:
    """Public options as they stand there. ImageError: missing, or no base64."""
    subject = subject_of(descriptor)
    text = descriptor.annotations.get(PUBLIC_OPTIONS)
    if text is None:
        raise ImageError(subject, f"the annotation {PUBLIC_OPTIONS} is missing")
    return _decoded(text, OPTIONS_LIMIT, subject, PUBLIC_OPTIONS)


def public_options_of(descriptor: Descriptor) -> PublicOptions:
    """ImageError: missing, no base64, or no public options."""
    return PublicOptions.parse(public_bytes_of(descriptor), subject_of(descriptor))


def packets_of(descriptor: Descriptor) -> tuple[Packet, ...]:
    """Every wrapped key of a layer, in the order of its annotations. ImageError: there is none, or no base64, or too many."""
    subject = subject_of(descriptor)
    found = []
    for name, text in descriptor.annotations.items():
        if not name.startswith(KEYS):
            continue
        if text.count(",") >= PACKET_LIMIT:
            raise ImageError(subject, f"{_shown(name)}: {text.count(',') + 1} packets; expected at most {PACKET_LIMIT}")
        scheme = name.removeprefix(KEYS)
        found += [Packet(scheme, _decoded(one, _PACKET_BYTES, subject, name)) for one in text.split(",")]
    if not found:
        raise ImageError(subject, f"no annotation {KEYS}...: nobody can decrypt it")
    if len(found) > PACKET_LIMIT:
        raise ImageError(subject, f"{len(found)} wrapped keys; expected at most {PACKET_LIMIT}")
    return tuple(found)


def encrypted_annotations(given: Mapping[str, str], public: bytes, packets: Iterable[Packet]) -> dict[str, str]:
    """Annotations of an encrypted layer. In: given   those it has; encryption's own are replaced.

    ImageError: no packet, or more than anybody reads.
    """
    by_scheme: dict[str, list[str]] = {}
    packets = tuple(packets)
    if len(packets) > PACKET_LIMIT:
        raise ImageError("layer", f"{len(packets)} wrapped keys; expected at most {PACKET_LIMIT}")
    for packet in packets:
        by_scheme.setdefault(check_scheme(packet.scheme), []).append(base64.b64encode(packet.data).decode("ascii"))
    if not by_scheme:
        raise ImageError("layer", "no recipient: nobody could decrypt it")
    result = clear_annotations(given)
    result[PUBLIC_OPTIONS] = base64.b64encode(public).decode("ascii")
    return result | {f"{KEYS}{scheme}": ",".join(texts) for scheme, texts in by_scheme.items()}


def clear_annotations(given: Mapping[str, str]) -> dict[str, str]:
    """Annotations without those of encryption."""
    return {name: value for name, value in given.items() if not name.startswith(PREFIX)}


def _decoded(text: str, limit: int, subject: str, name: str) -> bytes:
    if len(text) > (limit + 2) // 3 * 4:
        raise ImageError(subject, f"{_shown(name)}: {len(text)} characters; expected at most {limit} bytes in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(subject, f"{_shown(name)}: text that is no base64") from None


def _shown(name: str) -> str:
    return ascii(name)[1:-1][:100]
