"""RTMR requests: the structures, the states, the vectors of the specification, and a model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.csv3_guest import launch, platform

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.crypto import Secret, sm3
from csvfast.errors import FirmwareError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import PROFILE_1_3_2011, Processor
from csvfast.processor.guest import Guest
from csvfast.processor.rtmr import answer
from csvfast.processor.states import GuestState
from csvfast.report import GuestPolicy

STATUS, START, READ, EXTEND = 1, 2, 3, 4


def guest() -> Guest:
    made = Guest(1, GuestPolicy(0x45), state=GuestState.RUNNING, vek=Secret(bytes(range(32))), digest=sm3())
    made.set_measure(b"\x77" * 32)
    return made


def start(version: int = 1) -> bytes:
    return struct.pack("<HHIH22x", START, 32, 0, version)


def status() -> bytes:
    return struct.pack("<HHIHB21x", STATUS, 32, 0, 0, 0)


def read(bitmap: int, room: int | None = None) -> bytes:
    registers = bin(bitmap).count("1") if room is None else room
    return struct.pack("<HHII20x", READ, 32 + 32 * registers, 0, bitmap) + bytes(32 * registers)


def extend(index: int, data: bytes, length: int = 32) -> bytes:
    return struct.pack("<HHIBBH20x32s", EXTEND, 64, 0, index, 0, length, data)


def error(reply: bytes) -> int:
    return int.from_bytes(reply[4:8], "little")


def test_vectors() -> None:
    made = guest()
    assert error(answer(made, start())) == 0
    assert error(answer(made, extend(4, sm3(b"event").digest()))) == 0
    assert made.rtmrs[4].hex() == "a1321a75cd9a5275dc94ebb4d12ff3a3ac64e7bc22511fa31a32d844711f11f0"
    assert error(answer(made, extend(4, sm3(b"event2").digest()))) == 0
    assert made.rtmrs[4].hex() == "8d0234277cdc772eeb4cf15e4f6d440f6c2db9c55b5613b3efaf67f6d093d2c0"


def test_states() -> None:
    made = guest()
    made.rtmr_state = 0
    assert answer(made, status())[8:11] == b"\0\0\0"
    for request in (start(), read(1), extend(1, bytes(32))):
        assert error(answer(made, request)) == S.INVALID_GUEST_STATE
    made.set_measure(b"\x77" * 32)
    assert answer(made, status())[8:11] == b"\1\0\1"
    assert error(answer(made, extend(1, bytes(32)))) == S.INVALID_GUEST_STATE  # the version comes first
    assert error(answer(made, read(1))) == 0
    for version in (0, 2, 0xFFFF):
        reply = answer(made, start(version))
        assert error(reply) == S.INVALID_PARAM
        assert reply[8:10] == b"\1\0"
    assert made.rtmr_state == 1
    assert error(answer(made, start())) == 0
    assert answer(made, status())[8:11] == b"\1\0\2"
    assert error(answer(made, start())) == 0
    assert error(answer(made, extend(1, bytes(32)))) == 0


def test_read() -> None:
    made = guest()
    answer(made, start())
    for index in range(1, 5):
        answer(made, extend(index, bytes([index]) * 32))
    for bitmap in range(1, 32):
        reply = answer(made, read(bitmap))
        wanted = [made.rtmrs[number] for number in range(5) if bitmap >> number & 1]
        assert error(reply) == 0
        assert reply[8:12] == struct.pack("<I", bitmap)
        assert reply[32:] == b"".join(wanted)  # by rank, not by number
    for bitmap in (0, 32, 0xFFFFFFFF, 33):
        reply = answer(made, read(bitmap, 1))
        assert error(reply) == S.INVALID_PARAM
        assert reply[8:12] == struct.pack("<I", 31)
        assert reply[32:] == bytes(32)
    reply = answer(made, read(0b11, 1))
    assert error(reply) == S.INVALID_LENGTH
    assert reply[2:4] == struct.pack("<H", 96)
    cut = read(0b11)[:-1]
    assert error(answer(made, cut)) == S.INVALID_LENGTH
    dirty = bytearray(read(1))
    dirty[12] = 1
    assert error(answer(made, bytes(dirty))) == S.INVALID_PARAM


def test_extend() -> None:
    made = guest()
    answer(made, start())
    for index in (0, 5, 255):
        reply = answer(made, extend(index, bytes(32)))
        assert error(reply) == S.INVALID_PARAM
        assert reply[8] == 4
    for length in (0, 31, 33, 0xFFFF):
        reply = answer(made, extend(1, bytes(32), length))
        assert error(reply) == S.INVALID_LENGTH
        assert reply[10:12] == struct.pack("<H", 32)
    for place in (9, 12, 31):
        dirty = bytearray(extend(1, bytes(32)))
        dirty[place] = 1
        assert error(answer(made, bytes(dirty))) == S.INVALID_PARAM
    assert made.rtmrs == [b"\x77" * 32] + [bytes(32)] * 4


@pytest.mark.parametrize("request_bytes", [start(), status(), read(1), extend(1, bytes(32))])
def test_sizes(request_bytes: bytes) -> None:
    made = guest()
    answer(made, start())
    size = int.from_bytes(request_bytes[2:4], "little")
    for wrong in (0, size - 1, size + 1, 0xFFFF):
        reply = answer(made, request_bytes[:2] + struct.pack("<H", wrong) + request_bytes[4:])
        assert error(reply) == S.INVALID_LENGTH
        assert int.from_bytes(reply[2:4], "little") == size
    for cut in range(8, size):
        assert error(answer(made, request_bytes[:cut])) == S.INVALID_LENGTH
    longer = answer(made, request_bytes + b"tail")
    assert error(longer) == 0
    assert longer[size:] == b"tail"


@given(st.binary(min_size=8, max_size=300))
def test_anything_is_answered(request_bytes: bytes) -> None:
    made = guest()
    answer(made, start())
    reply = answer(made, request_bytes)
    assert len(reply) == len(request_bytes)
    if error(reply):
        assert made.rtmrs == [b"\x77" * 32] + [bytes(32)] * 4


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(min_size=32, max_size=32)), max_size=20))
def test_against_a_model(steps: list[tuple[int, bytes]]) -> None:
    made = guest()
    answer(made, start())
    model = [b"\x77" * 32] + [bytes(32)] * 4
    for index, data in steps:
        if 1 <= index <= 4:
            model[index] = sm3(model[index] + data).digest()
        assert (error(answer(made, extend(index, data))) == 0) == (1 <= index <= 4)
    assert answer(made, read(31))[32:] == b"".join(model)


@pytest.fixture
def secure(chip: ChipIdentity) -> Iterator[Processor]:
    with platform(chip) as processor:
        yield processor


def test_command(secure: Processor, refused: Callable[..., FirmwareError]) -> None:
    handle = launch(secure, finish=False)
    refused(S.INVALID_GUEST_STATE, secure.rtmr_request, handle, status())
    secure.launch_measure(handle)
    refused(S.INVALID_GUEST_STATE, secure.rtmr_request, handle, status())
    secure.launch_finish(handle)
    refused(S.INVALID_GUEST, secure.rtmr_request, 99, status())
    assert refused(S.INVALID_LENGTH, secure.rtmr_request, handle, bytes(7)).needed == {"length": 8}
    assert error(secure.rtmr_request(handle, bytes(8))) == S.INVALID_COMMAND
    assert secure.rtmr_request(handle, bytearray(status()))[8:11] == b"\1\0\1"
    reply = secure.rtmr_request(handle, read(1))
    assert reply[32:] == secure.guests[handle].measure
    plain = secure.launch_start(GuestPolicy.of(es=True))
    secure.launch_measure(plain)
    secure.launch_finish(plain)
    refused(S.UNSUPPORTED, secure.rtmr_request, plain, status())


def test_old_firmware(chip: ChipIdentity, refused: Callable[..., FirmwareError]) -> None:
    with Processor(chip, csvfast.EncryptedMemory(1 << 20, asid_max=4), profile=PROFILE_1_3_2011) as processor:
        processor.init()
        handle = processor.launch_start(GuestPolicy.of())
        processor.launch_measure(handle)
        processor.launch_finish(handle)
        refused(S.UNSUPPORTED, processor.rtmr_request, handle, status())
