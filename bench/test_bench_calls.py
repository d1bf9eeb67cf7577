"""What one call costs from Python: small accesses, where the binding and not the cipher decides."""

from __future__ import annotations

from typing import Any

import pytest

import csvfast
from csvfast.crypto import SM4XTS

KEY = bytes(range(32))


@pytest.fixture
def memory() -> csvfast.EncryptedMemory:
    memory = csvfast.EncryptedMemory(1 << 20)
    memory.install(1, KEY)
    return memory


@pytest.mark.parametrize("length", [1, 16, 64, 4096])
def test_write(benchmark: Any, memory: csvfast.EncryptedMemory, length: int) -> None:
    benchmark.group = f"memory.write, {length} bytes"
    data = bytes(length)
    benchmark(memory.write, 4096, data, 1)


@pytest.mark.parametrize("length", [1, 16, 64, 4096])
def test_read(benchmark: Any, memory: csvfast.EncryptedMemory, length: int) -> None:
    benchmark.group = f"memory.read, {length} bytes"
    benchmark(memory.read, 4096, length, 1)


def test_host_write(benchmark: Any, memory: csvfast.EncryptedMemory) -> None:
    """The host's write does no SM4: what is left is the call."""
    benchmark.group = "call overhead"
    benchmark(memory.write, 0, b"", 0)


def test_xts_one_page(benchmark: Any) -> None:
    benchmark.group = "SM4XTS.encrypt, one page in place"
    xts, page = SM4XTS(KEY), bytearray(4096)
    benchmark(xts.encrypt, page, 7, page)


def test_sm3_short(benchmark: Any) -> None:
    benchmark.group = "sm3 of 32 bytes"
    benchmark(lambda: csvfast.sm3(KEY).digest())
