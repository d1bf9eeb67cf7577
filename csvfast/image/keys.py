"""Who wraps and unwraps a layer's private options.

    private = unwrap_any(descriptor, wrappers)             one packet that opens is enough
    packets = wrap_all(private, recipients)                one packet for each recipient

A KeyWrapper stands for one way to a key: a key provider, a broker, a key in a file.

Source: containers/ocicrypt encryption.go (preWrapKeys, decryptLayerKeyOptsData).
Thread-safety: functions without state; wrappers say what theirs is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from csvfast.errors import CsvfastError, ImageError
from csvfast.image.annotations import Packet, check_scheme, packets_of, public_options_of, subject_of
from csvfast.image.options import LayerKey, PrivateOptions

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.image.descriptor import Descriptor

__all__ = ["ATTESTATION_AGENT", "KeyWrapper", "Recipient", "unwrap_any", "unwrap_packet", "wrap_all"]

ATTESTATION_AGENT: Final = "provider.attestation-agent"
"""The scheme that CoCo's guests look for."""

PACKET_BYTES: Final = 512 << 10
"""Bytes of one wrapped key."""


class KeyWrapper(Protocol):
    """One way to a key.

    name     how errors call it
    scheme   of the packets it makes: "provider.<name>", "jwe"
    """

    @property
    def name(self) -> str:
        """How errors call it."""

    @property
    def scheme(self) -> str:
        """Of the packets it makes."""

    def opens(self, scheme: str) -> bool:
        """Whether packets of that scheme are worth a try."""

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        """A packet. In: parameters   which key; what that means is the wrapper's. CsvfastError, OSError."""

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        """Private options, bit for bit as they were wrapped. CsvfastError, OSError."""


class Recipient(NamedTuple):
    """For whom a layer's key is wrapped."""

    wrapper: KeyWrapper
    parameters: str = ""


def wrap_all(private: Secret, recipients: Sequence[Recipient], subject: str) -> tuple[Packet, ...]:
    """One packet for each recipient. In: subject   what errors are about. ImageError: none, or one of them cannot be served."""
    if not recipients:
        raise ImageError(subject, "no recipient: nobody could decrypt it")
    packets = []
    for wrapper, parameters in recipients:
        scheme = check_scheme(wrapper.scheme)
        try:
            data = wrapper.wrap(private, parameters)
        except (CsvfastError, OSError) as error:
            raise ImageError(subject, f"its key was not wrapped by {wrapper.name}: {error}") from error
        if not 0 < len(data) <= PACKET_BYTES:
            raise ImageError(subject, f"a packet of {len(data)} bytes from {wrapper.name}; expected at most {PACKET_BYTES}")
        packets.append(Packet(scheme, data))
    return tuple(packets)


def unwrap_packet(descriptor: Descriptor, packet: Packet, wrappers: Iterable[KeyWrapper]) -> tuple[Secret, KeyWrapper]:
    """Private options out of one packet, and who opened it.

    ImageError: nobody could; the reasons are in the text, and as an ExceptionGroup in __cause__.
    """
    return _first(descriptor, (packet,), wrappers)


def unwrap_any(descriptor: Descriptor, wrappers: Iterable[KeyWrapper]) -> Secret:
    """A layer's private options out of the first packet that opens. They fit the layer's suite, or the packet counts as closed.

    ImageError: none opens; the reasons are in the text, and as an ExceptionGroup in __cause__.
    """
    return _first(descriptor, packets_of(descriptor), wrappers)[0]


def _first(descriptor: Descriptor, packets: Sequence[Packet], wrappers: Iterable[KeyWrapper]) -> tuple[Secret, KeyWrapper]:
    subject = subject_of(descriptor)
    public = public_options_of(descriptor)
    wrappers = tuple(wrappers)
    failures: list[Exception] = []
    texts = []
    for number, packet in enumerate(packets, start=1):
        for wrapper in wrappers:
            if not wrapper.opens(packet.scheme):
                continue
            try:
                private = wrapper.unwrap(packet.data)
                LayerKey.combine(public, PrivateOptions.parse(private, subject), subject)
            except (CsvfastError, OSError) as error:
                failures.append(error)
                reason = error.problem if isinstance(error, ImageError) else str(error)
                texts.append(f"packet {number} ({_shown(packet.scheme)}) by {wrapper.name}: {reason}")
            else:
                return private, wrapper
    if not failures:
        schemes = ", ".join(sorted({_shown(packet.scheme) for packet in packets}))
        have = ", ".join(sorted({wrapper.name for wrapper in wrappers})) or "none"
        raise ImageError(subject, f"its key is wrapped for {schemes}; the keys at hand are of no use for that: {have}")
    raise ImageError(subject, f"its key cannot be unwrapped: {'; '.join(texts)}") from ExceptionGroup("unwrapping", failures)


def _shown(scheme: str) -> str:
    """A scheme as a stranger's manifest has it, for a message."""
    return ascii(scheme)[1:-1][:100]
