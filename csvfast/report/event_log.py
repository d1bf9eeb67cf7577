"""The CC event log (CCEL) of a guest's firmware and boot loader, and its replay into register values.

    first event   LE32 register, LE32 type = 3 (EV_NO_ACTION), 20 zero bytes, LE32 size, data: 24 bytes, LE32 count of algorithms,
                  {LE16 id, LE16 digest size} each, size byte and vendor bytes          TCG 1.2 layout
    other events  LE32 register, LE32 type, LE32 count of digests, {LE16 algorithm, digest} each, LE32 size, data   TCG 2 layout
    end           8 bytes 0xff, 8 zero bytes, or the end of the data

The register index is the CC measurement register's, 1 .. 4, and the number of the RTMR. A register starts as 32 zero bytes; each
event that is not EV_NO_ACTION extends it: SM3(register || SM3 digest of the event).

What an event says in its data is a claim of whoever wrote the log: only its digest is bound to the register. For most types the
digest is that of the data (`digest_matches_event`).

Source: TCG PC Client Platform Firmware Profile 1.06 (10.2, 10.4.5); confidential-containers/trustee deps/eventlog. Thread-safety:
immutable objects.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.crypto import sm3
from csvfast.errors import FormatError
from csvfast.report._input import as_bytes

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["ALGORITHM_SM3", "EV_NO_ACTION", "Event", "EventLog"]

ALGORITHM_SM3: Final = 0x0012
EV_NO_ACTION: Final = 3
EVENT_LOG_LIMIT: Final = 2 << 20  # firmware reserves 64 KiB

_NAME: Final = "event log"
# TCG algorithm ids with a fixed digest size; others are taken at the header's word.
_DIGEST_SIZES: Final = {0x04: 20, 0x0B: 32, 0x0C: 48, 0x0D: 64, ALGORITHM_SM3: 32}
_WORDS_2: Final = Struct("<II")
_WORDS_3: Final = Struct("<III")
_WORD: Final = Struct("<I")
_HALVES: Final = Struct("<HH")
_HALF: Final = Struct("<H")
_HEADER_BYTES: Final = 32
_SPEC_ID_BYTES: Final = 24
_ENDS: Final = (bytes(8), b"\xff" * 8)


class Event(NamedTuple):
    """One event: index of the register it extends, type, digests by TCG algorithm id, data, and where it starts in the log."""

    register: int
    type: int
    digests: tuple[tuple[int, bytes], ...]
    data: bytes
    offset: int

    def digest(self, algorithm: int = ALGORITHM_SM3) -> bytes | None:
        """The digest by this algorithm, or None."""
        return next((digest for number, digest in self.digests if number == algorithm), None)


class EventLog(NamedTuple):
    """A parsed log: the events behind the header, and the digest sizes the header names by algorithm id."""

    events: tuple[Event, ...]
    algorithms: dict[int, int]

    @classmethod
    def parse(cls, data: BytesLike) -> EventLog:
        """Reads a log; FormatError names the field and its offset. Nothing behind the end mark is looked at."""
        raw = as_bytes(data, _NAME)
        if len(raw) > EVENT_LOG_LIMIT:
            raise FormatError(_NAME, "length", None, f"{len(raw)} bytes", f"at most {EVENT_LOG_LIMIT} bytes")
        algorithms, at = _header(raw)
        events = []
        while at < len(raw):
            _need(raw, at, 8, "event")
            if raw[at : at + 8] in _ENDS:
                break
            event, at = _event(raw, at, algorithms)
            events.append(event)
        return cls(tuple(events), algorithms)

    def replay(self) -> dict[int, bytes]:
        """Register values by index, of the registers that events extend. FormatError for an event without an SM3 digest."""
        registers: dict[int, bytes] = {}
        for event in self.events:
            if event.type == EV_NO_ACTION:
                continue
            digest = event.digest()
            if digest is None:
                found = ", ".join(f"{number:#06x}" for number, _digest in event.digests) or "none"
                raise FormatError(_NAME, "digest algorithms", event.offset, found, f"{ALGORITHM_SM3:#06x} (SM3)")
            registers[event.register] = sm3(registers.get(event.register, bytes(32)) + digest).digest()
        return registers


def _need(raw: bytes, at: int, size: int, field: str) -> None:
    if len(raw) - at < size:
        raise FormatError(_NAME, field, at, f"{len(raw) - at} bytes", f"{size} bytes")


def _header(raw: bytes) -> tuple[dict[int, int], int]:
    _need(raw, 0, _HEADER_BYTES, "header event")
    _index, kind = _WORDS_2.unpack_from(raw, 0)
    if kind != EV_NO_ACTION:
        raise FormatError(_NAME, "header event type", 4, f"{kind:#x}", f"{EV_NO_ACTION} (EV_NO_ACTION)")
    (size,) = _WORD.unpack_from(raw, 28)
    _need(raw, _HEADER_BYTES, size, "header event data")
    end = _HEADER_BYTES + size
    at = _HEADER_BYTES + _SPEC_ID_BYTES
    if end - at < 5:
        raise FormatError(_NAME, "header event size", 28, str(size), f"at least {_SPEC_ID_BYTES + 5}")
    (count,) = _WORD.unpack_from(raw, at)
    at += 4
    if count > (end - at - 1) // _HALVES.size:
        raise FormatError(_NAME, "algorithm count", at - 4, str(count), f"at most {(end - at - 1) // _HALVES.size}")
    algorithms: dict[int, int] = {}
    for _ in range(count):
        number, length = _HALVES.unpack_from(raw, at)
        if length == 0 or length != _DIGEST_SIZES.get(number, length) or number in algorithms:
            expected = "each algorithm once, with the size of its digest"
            raise FormatError(_NAME, "algorithm", at, f"{number:#06x} with {length} bytes", expected)
        algorithms[number] = length
        at += _HALVES.size
    if at + 1 + raw[at] != end:
        raise FormatError(_NAME, "vendor bytes", at, str(raw[at]), f"{end - at - 1}, up to the end of the event")
    return algorithms, end


def _event(raw: bytes, start: int, algorithms: dict[int, int]) -> tuple[Event, int]:
    _need(raw, start, _WORDS_3.size, "event")
    index, kind, count = _WORDS_3.unpack_from(raw, start)
    at = start + _WORDS_3.size
    if not 1 <= count <= len(algorithms):
        raise FormatError(_NAME, "digest count", at - 4, str(count), f"1 .. {len(algorithms)}")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        _need(raw, at, _HALF.size, "digest algorithm")
        (number,) = _HALF.unpack_from(raw, at)
        if number not in algorithms or number in digests:
            known = ", ".join(f"{one:#06x}" for one in algorithms)
            raise FormatError(_NAME, "digest algorithm", at, f"{number:#06x}", f"one of {known}, once")
        at += _HALF.size
        _need(raw, at, algorithms[number], "digest")
        digests[number] = raw[at : at + algorithms[number]]
        at += algorithms[number]
    _need(raw, at, _WORD.size, "event data size")
    (size,) = _WORD.unpack_from(raw, at)
    at += _WORD.size
    _need(raw, at, size, "event data")
    return Event(index, kind, tuple(digests.items()), raw[at : at + size], start), at + size
