"""SM4-XTS on every kernel against the plain-Python reference, whole and in cuts."""

from __future__ import annotations

import array
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import xts
from reference.buffers import READABLE, WRITABLE, content, together

import csvfast
from csvfast.crypto import SM4XTS

STANDARDS = ("gb", "ieee")
PAGE = bytes(range(256)) * 16


@pytest.mark.parametrize("standard", STANDARDS)
def test_every_length_of_one_unit(sm4_kernel, key, standard):
    cipher = SM4XTS(key, standard=standard)
    data = os.urandom(600)
    for length in range(16, 600, 1 if length_is_cheap(sm4_kernel) else 7):
        wanted = xts.crypt(key, data[:length], 3, 4096, standard) if length % 13 == 0 else None
        encrypted = cipher.encrypt(data[:length], 3)
        assert wanted is None or encrypted == wanted, length
        assert cipher.decrypt(encrypted, 3) == data[:length]


def length_is_cheap(kernel: str) -> bool:
    return kernel != "portable"


@given(
    data=st.binary(min_size=0, max_size=900),
    unit_size=st.integers(16, 300),
    unit=st.integers(0, 2**64 - 1000),
    standard=st.sampled_from(STANDARDS),
    secret=st.binary(min_size=32, max_size=32).filter(lambda secret: secret[:16] != secret[16:]),
)
def test_any_shape_on_every_kernel(data, unit_size, unit, standard, secret):
    tail = len(data) % unit_size
    if 0 < tail < 16:
        data = data[:-tail]
    wanted = xts.crypt(secret, data, unit, unit_size, standard)
    for kernel in csvfast.info()["kernels"]["sm4"]["available"]:
        csvfast.force_kernel("sm4", kernel)
        try:
            cipher = SM4XTS(secret, standard=standard, unit_size=unit_size)
        finally:
            csvfast.force_kernel("sm4", None)
        assert cipher.encrypt(data, unit) == wanted, kernel
        assert cipher.decrypt(wanted, unit) == data, kernel


@pytest.mark.parametrize("standard", STANDARDS)
def test_kernels_agree_on_many_pages(key, standard):
    data = random.Random(7).randbytes(4096 * 67)
    results = {}
    for kernel in csvfast.info()["kernels"]["sm4"]["available"]:
        csvfast.force_kernel("sm4", kernel)
        results[kernel] = SM4XTS(key, standard=standard).encrypt(data, 12345)
    csvfast.force_kernel("sm4", None)
    assert len(set(results.values())) == 1, results.keys()
    # One page of the run by the reference, so that they cannot all be wrong together.
    some = results["portable"][4096 * 66 :]
    assert xts.crypt(key, some, 12345 + 66, 4096, standard, decrypt=True) == data[4096 * 66 :]


@pytest.mark.parametrize("unit_size", [16, 17, 31, 512, 520, 4096, 65536, 1 << 20])
def test_unit_sizes_are_units_of_their_own(sm4_kernel, key, unit_size):
    cipher = SM4XTS(key, unit_size=unit_size)
    data = random.Random(unit_size).randbytes(unit_size * 3 + (16 if unit_size > 16 else 0))
    whole = cipher.encrypt(data, 9)
    pieces = [cipher.encrypt(data[i : i + unit_size], 9 + i // unit_size) for i in range(0, len(data), unit_size)]
    assert whole == b"".join(pieces)
    assert cipher.decrypt(whole, 9) == data


@given(first=st.integers(0, 255), count=st.integers(0, 256), standard=st.sampled_from(STANDARDS))
def test_span_is_a_cut_of_the_unit(first, count, standard):
    count = min(count, 256 - first)
    cipher = SM4XTS(bytes(range(32)), standard=standard)
    whole = cipher.encrypt(PAGE, 77)
    cut = slice(16 * first, 16 * (first + count))
    assert cipher.encrypt_span(PAGE[cut], 77, 16 * first) == whole[cut]
    assert cipher.decrypt_span(whole[cut], 77, 16 * first) == PAGE[cut]


def test_lines_are_cuts_of_their_pages(sm4_kernel, key):
    cipher = SM4XTS(key)
    generator = random.Random(3)
    for count in (0, 1, 2, 15, 16, 17, 64, 200):
        addresses = [generator.randrange(1 << 48) & ~63 for _ in range(count)]
        addresses[1:3] = addresses[:2][: len(addresses[1:3])]  # repeated pages too
        data = generator.randbytes(64 * count)
        wanted = b"".join(
            cipher.encrypt_span(data[64 * i : 64 * i + 64], address >> 12, address & 4095)
            for i, address in enumerate(addresses)
        )
        for places in (np.array(addresses, np.uint64), array.array("Q", addresses)):
            assert cipher.encrypt_lines(data, places) == wanted
            assert cipher.decrypt_lines(wanted, places) == data


@pytest.mark.parametrize("kind", READABLE)
def test_input_buffers(key, kind):
    cipher = SM4XTS(key)
    assert cipher.encrypt(READABLE[kind](PAGE), 5) == cipher.encrypt(PAGE, 5)


@pytest.mark.parametrize("kind", WRITABLE)
def test_out_and_in_place(key, kind):
    cipher = SM4XTS(key)
    wanted = cipher.encrypt(PAGE, 5)
    out = WRITABLE[kind](bytes(4096))
    assert cipher.encrypt(PAGE, 5, out) is out
    assert content(out) == wanted
    assert cipher.decrypt(out, 5, out=out) is out
    assert content(out) == PAGE


def test_in_place_through_another_object(key):
    buffer = bytearray(PAGE)
    SM4XTS(key).encrypt(memoryview(buffer), 5, out=buffer)
    assert buffer == SM4XTS(key).encrypt(PAGE, 5)


@pytest.mark.parametrize("shift", [0, 1, 7, 15, 33, 63])
def test_unaligned_buffers_touch_nothing_else(sm4_kernel, key, shift):
    cipher = SM4XTS(key)
    source = bytearray(os.urandom(9000))
    out = bytearray(b"\xee" * 9000)
    cipher.encrypt(memoryview(source)[shift : shift + 8192], 5, memoryview(out)[shift + 1 : shift + 1 + 8192])
    assert out[: shift + 1] == b"\xee" * (shift + 1)
    assert out[shift + 8193 :] == b"\xee" * (9000 - shift - 8193)
    assert out[shift + 1 : shift + 8193] == cipher.encrypt(bytes(source[shift : shift + 8192]), 5)


def test_live_object_keeps_its_kernel(key):
    """Forcing a kernel changes new objects only; all give the same bytes."""
    before = SM4XTS(key)
    wanted = before.encrypt(PAGE)
    csvfast.force_kernel("sm4", "portable")
    try:
        assert before.encrypt(PAGE) == wanted == SM4XTS(key).encrypt(PAGE)
    finally:
        csvfast.force_kernel("sm4", None)


def test_threads_share_one_object(key):
    cipher = SM4XTS(key)
    data = os.urandom(1 << 20)
    wanted = cipher.encrypt(data, 1)

    def work(_: int) -> None:
        for _ in range(5):
            assert cipher.encrypt(data, 1) == wanted
            assert cipher.decrypt(wanted, 1) == data

    together(4, work)


def test_pool_gives_the_same_bytes(key):
    pool = csvfast.WorkerPool(2)
    data = os.urandom((4 << 20) + 4096 + 17)
    for unit_size in (512, 4096, 1 << 20):
        plain, pooled = SM4XTS(key, unit_size=unit_size), SM4XTS(key, unit_size=unit_size, pool=pool)
        wanted = plain.encrypt(data, 3)
        assert pooled.encrypt(data, 3) == wanted
        assert pooled.decrypt(wanted, 3) == data


def test_facts(key):
    cipher = SM4XTS(key, standard="ieee", unit_size=512)
    assert (cipher.standard, cipher.unit_size) == ("ieee", 512)
    assert repr(cipher) == "<SM4XTS standard='ieee' unit_size=512>"
    assert cipher.encrypt(b"") == b""
