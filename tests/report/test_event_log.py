"""CC event log: the published log's registers (A.7), details as trustee reads them, every length refused when it is wrong."""

from __future__ import annotations

import base64
import contextlib
import random
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.published_event_log import DETAILED, EVENTS, REGISTERS, TYPE_NAMES, build_log

from csvfast.crypto import sm3
from csvfast.errors import FormatError
from csvfast.report import EventLog
from csvfast.report.event_details import event_claims
from csvfast.report.event_log import ALGORITHM_SM3

PUBLISHED = build_log([(register, 0x0D, digest, b"event") for register, digest in EVENTS])
DIGEST = bytes(range(32))


def test_registers_of_the_published_log() -> None:
    assert len(EVENTS) == 82
    assert EventLog.parse(PUBLISHED).replay() == REGISTERS


def test_rtmr_vector() -> None:
    first, second = sm3(b"event").digest(), sm3(b"event2").digest()
    assert first.hex() == "62b239a8493a1d81f3ccfc229e320ed4494dfb374d0cf91729befe62ae2765ef"
    one = EventLog.parse(build_log([(3, 5, first, b"")])).replay()[3]
    assert one.hex() == "a1321a75cd9a5275dc94ebb4d12ff3a3ac64e7bc22511fa31a32d844711f11f0"
    two = EventLog.parse(build_log([(3, 5, first, b""), (3, 5, second, b"")])).replay()[3]
    assert two.hex() == "8d0234277cdc772eeb4cf15e4f6d440f6c2db9c55b5613b3efaf67f6d093d2c0"


def test_log_of_the_real_evidence() -> None:
    raw = base64.b64decode(
        "AAAAAAMAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACAAAADAAwABIAIAAA//////////8="
    )
    log = EventLog.parse(raw)
    assert (log.events, log.algorithms, log.replay()) == ((), {0x0C: 48, 0x12: 32}, {})


@given(st.lists(st.tuples(st.integers(1, 4), st.binary(min_size=32, max_size=32)), max_size=20))
def test_replay_against_a_plain_one(events: list[tuple[int, bytes]]) -> None:
    expected: dict[int, bytes] = {}
    for register, digest in events:
        expected[register] = sm3(expected.get(register, bytes(32)) + digest).digest()
    assert EventLog.parse(build_log([(register, 1, digest, b"x") for register, digest in events])).replay() == expected


def test_no_action_is_not_replayed() -> None:
    assert EventLog.parse(build_log([(1, 3, DIGEST, b"StartupLocality")])).replay() == {}


@pytest.mark.parametrize("end", [b"\xff" * 8, bytes(8), b"", bytes(8) + b"anything", b"\xff" * 64])
def test_ends(end: bytes) -> None:
    assert len(EventLog.parse(build_log([(1, 4, DIGEST, b"abc")], end)).events) == 1


@pytest.mark.parametrize(("kind", "digest", "data", "details", "matches"), DETAILED)
def test_details_are_trustees(kind: int, digest: bytes, data: bytes, details: dict, matches: bool) -> None:
    (claim,) = event_claims(EventLog.parse(build_log([(2, kind, digest, data)])))
    assert claim == {
        "details": details,
        "digest_matches_event": matches,
        "digests": [{"alg": "SM3", "digest": digest.hex()}],
        "event": base64.b64encode(data).decode(),
        "index": 2,
        "type_name": TYPE_NAMES[kind],
    }


@pytest.mark.parametrize(
    ("kind", "data", "details"),
    [
        (6, bytes.fromhex("ec223b8f0d0000004c696e757820696e6974726400"), {"string": "Linux initrd"}),
        (0x8000000B, bytes.fromhex("095464785461626c65000100000000000000"), {"string": "TdxTable"}),
        (0x0D, ".linux\0".encode("utf-16-le"), {"string": "linux"}),
        (0x0A, b"ACPI DATA\0", {"string": "ACPI DATA"}),
        (0x80000003, bytes(32), {}),
        (0x80000003, bytes(24) + (20).to_bytes(8, "little") + bytes.fromhex("0101060000040000"), {}),
        (0x80000001, bytes(16) + b"\xff" * 16, {}),
        (0x80000001, b"short", {}),
        (0x12345, b"anything", {}),
        (5, b"\xff\xfe", {}),
    ],
)
def test_other_details(kind: int, data: bytes, details: dict) -> None:
    (claim,) = event_claims(EventLog.parse(build_log([(1, kind, DIGEST, data)])))
    assert claim["details"] == details


HEADER = build_log([], b"")
EVENT = build_log([(1, 4, DIGEST, b"abc")], b"")


@pytest.mark.parametrize(
    ("log", "field", "offset"),
    [
        (b"", "header event", 0),
        (HEADER[:31], "header event", 0),
        (HEADER[:4] + b"\x04" + HEADER[5:], "header event type", 4),
        (HEADER[:28] + struct.pack("<I", 38) + HEADER[32:], "header event data", 32),
        (HEADER[:28] + struct.pack("<I", 0xFFFFFFFF) + HEADER[32:], "header event data", 32),
        (HEADER[:28] + struct.pack("<I", 28) + HEADER[32:], "header event size", 28),
        (HEADER[:56] + struct.pack("<I", 3) + HEADER[60:], "algorithm count", 56),
        (HEADER[:56] + struct.pack("<I", 0xFFFFFFFF) + HEADER[60:], "algorithm count", 56),
        (HEADER[:62] + b"\x20\0" + HEADER[64:], "algorithm", 60),
        (HEADER[:60] + HEADER[64:68] * 2 + HEADER[68:], "algorithm", 64),
        (HEADER[:68] + b"\x01", "vendor bytes", 68),
        (HEADER + bytes(7), "event", len(HEADER)),
        (HEADER + b"\x01" * 11, "event", len(HEADER)),
        (EVENT[:77] + struct.pack("<I", 0) + EVENT[81:], "digest count", 77),
        (EVENT[:77] + struct.pack("<I", 3) + EVENT[81:], "digest count", 77),
        (EVENT[:81] + b"\x0b\0" + EVENT[83:], "digest algorithm", 81),
        (EVENT[:81] + b"\x0c\0" + EVENT[83:], "digest", 83),
        (EVENT[:82], "digest algorithm", 81),
        (EVENT[:114], "digest", 83),
        (EVENT[:116], "event data size", 115),
        (EVENT[:-1], "event data", 119),
        (EVENT[:115] + struct.pack("<I", 0xFFFFFFFF) + EVENT[119:], "event data", 119),
        (bytes((2 << 20) + 1), "length", None),
    ],
)  # fmt: skip
def test_refusals(log: bytes, field: str, offset: int | None) -> None:
    with pytest.raises(FormatError) as caught:
        EventLog.parse(log)
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_offsets_used_above() -> None:
    assert (len(HEADER), len(EVENT)) == (69, 122)


def test_hostile_device_paths_take_no_time() -> None:
    nodes = bytes.fromhex("7f7f0400") * 200_000
    data = bytes(24) + (len(nodes) + 4).to_bytes(8, "little") + nodes + bytes(4)
    start = time.thread_time()
    (claim,) = event_claims(EventLog.parse(build_log([(1, 0x80000003, DIGEST, data)])))
    assert len(claim["details"]["device_paths"]) == 200_000
    assert time.thread_time() - start < 5  # a copy of what is left for each node would take minutes


def test_an_event_without_sm3_is_not_passed_over() -> None:
    event = struct.pack("<III", 1, 4, 1) + b"\x0c\0" + bytes(48) + struct.pack("<I", 0)
    log = EventLog.parse(HEADER + event)
    assert log.events[0].digest(ALGORITHM_SM3) is None
    with pytest.raises(FormatError, match="SM3"):
        log.replay()


def test_mutated_logs_are_read_or_refused() -> None:
    generator = random.Random(1)
    for _ in range(3000):
        log = bytearray(PUBLISHED[: generator.randrange(200, 1200)])
        for _ in range(generator.randrange(1, 6)):
            log[generator.randrange(len(log))] = generator.randrange(256)
        with contextlib.suppress(FormatError):
            event_claims(EventLog.parse(log))
