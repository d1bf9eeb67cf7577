"""DBG_DECRYPT, DBG_ENCRYPT, COPY."""

from __future__ import annotations

import random
from collections.abc import Callable

import csvfast
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import Processor
from csvfast.report import GuestPolicy

S = FirmwareStatus
MIB = 1 << 20
OPEN = GuestPolicy(0)


def test_debugging(processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]) -> None:
    handle = running(OPEN)
    secret = random.Random(2).randbytes(4096)
    memory.write(0x30010, secret, 1)
    processor.dbg_decrypt(handle, 0x30010, 0x50020, 4096)
    assert memory.read(0x50020, 4096, 0) == secret
    memory.write(0x60000, b"patched by the debugger.........", 0)
    processor.dbg_encrypt(handle, 0x60000, 0x30010, 32)
    assert memory.read(0x30010, 4096, 1) == b"patched by the debugger........." + secret[32:]
    # The C-bit is no part of an address.
    processor.dbg_decrypt(handle, 0x30010 | 1 << 47, 0x70000 | 1 << 47, 32)
    assert memory.read(0x70000, 32, 0) == b"patched by the debugger........."


def test_policy_forbids(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    running: Callable[..., int],
    refused: Callable[..., FirmwareError],
) -> None:
    handle = running(GuestPolicy.of(nodbg=True))
    before = memory.read(0, 3 * MIB, 0)
    refused(S.POLICY_FAILURE, processor.dbg_decrypt, handle, 0x10000, 0x50000, 16)
    refused(S.POLICY_FAILURE, processor.dbg_encrypt, handle, 0x50000, 0x10000, 16)
    assert memory.read(0, 3 * MIB, 0) == before
    processor.copy(handle, 0x10000, 0x50000, 16)  # shows nobody anything


def test_copy(processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]) -> None:
    """Longer than one internal window, so that the windows are seen to fit together."""
    handle = running(OPEN)
    data = random.Random(3).randbytes(MIB + 4096 + 16)
    memory.write(0x20000, data, 1)
    processor.copy(handle, 0x20000, 0x180010, len(data))
    assert memory.read(0x180010, len(data), 1) == data
    assert memory.read(0x20000, len(data), 1) == data
    assert memory.read(0x180010, 4096, 0) != memory.read(0x20000, 4096, 0)


def test_bad_ranges(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    running: Callable[..., int],
    refused: Callable[..., FirmwareError],
) -> None:
    handle = running(OPEN)
    before = memory.read(0, 3 * MIB, 0)
    for command in (processor.dbg_decrypt, processor.dbg_encrypt, processor.copy):
        for length in (0, -16, 8, 17):
            refused(S.INVALID_LENGTH, command, handle, 0, 0x1000, length)
        for source, destination in (
            (8, 0x1000),
            (0, 0x1008),
            (0, 4 * MIB),
            (4 * MIB, 0),
            (3 * MIB, 0),
            (0, 3 * MIB),
            (-16, 0),
        ):
            refused(S.INVALID_ADDRESS, command, handle, source, destination, 16)
        for destination in (0x1000, 0x1010, 0xFF0):
            refused(S.INVALID_ADDRESS, command, handle, 0x1000, destination, 32)
    processor.deactivate(handle)
    for command in (processor.dbg_decrypt, processor.dbg_encrypt, processor.copy):
        refused(S.INACTIVE, command, handle, 0, 0x1000, 16)
    assert memory.read(0, 3 * MIB, 0) == before


def test_only_a_running_guest(
    processor: Processor, running: Callable[..., int], refused: Callable[..., FirmwareError]
) -> None:
    handle = running(OPEN, finish=False)
    for command in (processor.dbg_decrypt, processor.dbg_encrypt, processor.copy):
        refused(S.INVALID_GUEST_STATE, command, handle, 0, 0x1000, 16)
