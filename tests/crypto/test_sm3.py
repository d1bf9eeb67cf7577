"""SM3: vectors, agreement with OpenSSL's on every kernel, hashlib's behaviour."""

from __future__ import annotations

import copy
import hashlib
import hmac
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.buffers import READABLE, together

import csvfast
from csvfast import errors

RAMP = bytes(i % 251 for i in range(70000))


def expected(data: bytes) -> bytes:
    return hashlib.new("sm3", data).digest()


def test_standard_vectors(sm3_kernel):
    assert csvfast.sm3(b"abc").hexdigest() == "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    assert csvfast.sm3(b"abcd" * 16).hexdigest() == "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732"
    assert csvfast.sm3().hexdigest() == "1ab21d8355cfa17f8e61194831e81a8f22bec8c728fefb747ed035eb5082aa2b"


@pytest.mark.parametrize("length", [*range(200), 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 65536, 70000])
def test_lengths(length):
    assert csvfast.sm3(RAMP[:length]).digest() == expected(RAMP[:length])


def test_every_kernel_every_length_to_600(sm3_kernel):
    for length in range(600):
        assert csvfast.sm3(RAMP[:length]).digest() == expected(RAMP[:length])


@given(pieces=st.lists(st.binary(max_size=3000), max_size=8))
def test_pieces_equal_whole(pieces):
    state = csvfast.sm3()
    for piece in pieces:
        state.update(piece)
    assert state.digest() == expected(b"".join(pieces))


class TestHashlibShape:
    """What CPython's own test_hashlib asks of a hash object."""

    def test_attributes(self):
        ours, theirs = csvfast.sm3(), hashlib.new("sm3")
        for name in ("name", "digest_size", "block_size"):
            assert getattr(ours, name) == getattr(theirs, name)
            with pytest.raises(AttributeError):
                setattr(ours, name, 1)

    def test_digest_does_not_end_the_stream(self):
        state = csvfast.sm3(b"a")
        assert state.digest() == state.digest()
        assert state.hexdigest() == state.digest().hex()
        state.update(b"bc")
        assert state.digest() == expected(b"abc")

    def test_copy_is_independent(self):
        state = csvfast.sm3(RAMP[:5000])
        fork = state.copy()
        fork.update(b"x")
        assert state.digest() == expected(RAMP[:5000])
        assert fork.digest() == expected(RAMP[:5000] + b"x")

    def test_update_returns_nothing(self):
        assert csvfast.sm3().update(b"x") is None

    @pytest.mark.parametrize("value", ["text", 5, None, [1], object()])
    def test_wrong_types(self, value):
        with pytest.raises(TypeError):
            csvfast.sm3(value)
        with pytest.raises(errors.BufferTypeError):
            csvfast.sm3().update(value)

    def test_arguments(self):
        assert csvfast.sm3(data=b"abc", usedforsecurity=False).digest() == expected(b"abc")
        with pytest.raises(TypeError):
            csvfast.sm3(b"", b"")
        with pytest.raises(TypeError):
            csvfast.sm3(unknown=1)
        with pytest.raises(TypeError):
            csvfast.sm3().update()

    def test_second_init_begins_anew(self):
        state = csvfast.sm3(b"x")
        state.__init__(b"abc")
        assert state.digest() == expected(b"abc")

    def test_new_without_init_is_the_empty_hash(self):
        assert csvfast.sm3.__new__(csvfast.sm3).digest() == expected(b"")

    def test_cannot_be_subclassed_pickled_or_copied(self):
        with pytest.raises(TypeError):
            type("Mine", (csvfast.sm3,), {})
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                act(csvfast.sm3())

    def test_works_as_digestmod(self):
        assert hmac.new(b"key", b"data", csvfast.sm3).digest() == hmac.new(b"key", b"data", "sm3").digest()

    def test_works_for_file_digest(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(RAMP)
        with path.open("rb") as stream:
            assert hashlib.file_digest(stream, csvfast.sm3).digest() == expected(RAMP)

    def test_big_update(self):
        data = os.urandom(1 << 22)
        assert csvfast.sm3(data).digest() == expected(data)

    def test_repr_names_no_state(self):
        assert repr(csvfast.sm3(b"secret")).startswith("<sm3 csvfast object @ 0x")


@pytest.mark.parametrize("kind", READABLE)
def test_buffers(kind):
    data = RAMP[:4096]
    assert csvfast.sm3(READABLE[kind](data)).digest() == expected(data)


def test_threads_share_one_object():
    """Every update is done in full: the digest is that of some order of equal pieces."""
    state, piece, rounds = csvfast.sm3(), b"p" * 4096, 50
    together(8, lambda _: [state.update(piece) for _ in range(rounds)])
    assert state.digest() == expected(piece * 8 * rounds)


def test_threads_copy_and_digest_meanwhile():
    state, piece = csvfast.sm3(), b"q" * 64 * 1024

    def work(index: int) -> None:
        for _ in range(20):
            if index % 2:
                state.update(piece)
            else:
                state.copy().digest()
                state.digest()

    together(6, work)
    assert state.digest() == expected(piece * 60)


class TestMany:
    def test_empty(self, sm3_many_kernel):
        assert csvfast.sm3_many([]) == []
        assert csvfast.sm3_many([b""]) == [expected(b"")]

    def test_every_count_of_lanes(self, sm3_many_kernel):
        messages = [bytes([i]) * (i * 37 % 300) for i in range(70)]
        wanted = [expected(message) for message in messages]
        for count in range(71):
            assert csvfast.sm3_many(messages[:count]) == wanted[:count]

    def test_pages(self, sm3_many_kernel):
        generator = random.Random(1)
        pages = [generator.randbytes(4096) for _ in range(130)]
        assert csvfast.sm3_many(pages) == [expected(page) for page in pages]

    @given(messages=st.lists(st.binary(max_size=700), max_size=40))
    def test_any_mix(self, messages):
        wanted = [expected(message) for message in messages]
        for kernel in csvfast.info()["kernels"]["sm3-many"]["available"]:
            csvfast.force_kernel("sm3-many", kernel)
            try:
                assert csvfast.sm3_many(messages) == wanted
            finally:
                csvfast.force_kernel("sm3-many", None)

    def test_generator_and_mixed_buffers(self):
        buffers = [make(RAMP[:64]) for make in READABLE.values()]
        assert csvfast.sm3_many(buffer for buffer in buffers) == [expected(RAMP[:64])] * len(buffers)

    def test_names_the_message_at_fault(self):
        with pytest.raises(errors.BufferTypeError, match="message 2 must be a bytes-like object, not str"):
            csvfast.sm3_many([b"", b"a", "b"])
        with pytest.raises(errors.NonContiguousBufferError, match="message 1"):
            csvfast.sm3_many([b"", memoryview(b"abcd")[::2]])

    def test_buffers_are_given_back(self):
        buffer = bytearray(100)
        csvfast.sm3_many([buffer, buffer])
        with pytest.raises(errors.BufferTypeError):
            csvfast.sm3_many([buffer, 1])
        buffer.append(1)  # raises BufferError while an export is held


class TestBlocks:
    @pytest.mark.parametrize("salt", [0, 1, 31, 32, 63, 64, 65, 128, 256])
    @pytest.mark.parametrize("size", [1, 55, 64, 512, 4096])
    def test_equals_single_hashes(self, sm3_many_kernel, size, salt):
        data, prefix = os.urandom(size * 37), os.urandom(salt)
        wanted = b"".join(expected(prefix + data[i : i + size]) for i in range(0, len(data), size))
        assert csvfast.sm3_blocks(data, size, prefix=prefix) == wanted

    def test_pool_and_out(self):
        data = os.urandom(4096 * 300)
        wanted = b"".join(expected(data[i : i + 4096]) for i in range(0, len(data), 4096))
        out = bytearray(32 * 300)
        assert csvfast.sm3_blocks(data, pool=csvfast.WorkerPool(2), out=out) is out
        assert out == wanted

    def test_bad_arguments(self):
        with pytest.raises(errors.LengthError, match="multiple of block_length 4096"):
            csvfast.sm3_blocks(bytes(4097))
        with pytest.raises(errors.LengthError, match="block_length is 0"):
            csvfast.sm3_blocks(b"", 0)
        with pytest.raises(errors.LengthError, match="prefix has 257 bytes"):
            csvfast.sm3_blocks(bytes(4096), prefix=bytes(257))
        with pytest.raises(errors.LengthError, match="out has 31 bytes; expected 32"):
            csvfast.sm3_blocks(bytes(4096), out=bytearray(31))
        both = bytearray(4096)
        with pytest.raises(errors.OverlapError):
            csvfast.sm3_blocks(both, out=memoryview(both)[:32])
        with pytest.raises(TypeError, match="pool must be a WorkerPool"):
            csvfast.sm3_blocks(b"", pool=2)
        assert csvfast.sm3_blocks(b"") == b""


class TestHmac:
    def test_csv_rs_vector(self, sm3_kernel):
        assert (
            csvfast.hmac_sm3(bytes(16), bytes(4)).hexdigest()
            == "5f08f19a7d6d8aceb7a6955b1533173cdd342039d4f76a117fe1aaaab7b27fec"
        )

    @given(key=st.binary(max_size=200), pieces=st.lists(st.binary(max_size=2000), max_size=4))
    def test_equals_hmac_module(self, key, pieces):
        ours = csvfast.hmac_sm3(key)
        for piece in pieces:
            ours.update(piece)
        assert ours.digest() == hmac.new(key, b"".join(pieces), "sm3").digest()

    def test_shape(self):
        ours = csvfast.hmac_sm3(b"key", b"data")
        theirs = hmac.new(b"key", b"data", "sm3")
        assert (ours.name, ours.digest_size, ours.block_size) == (theirs.name, theirs.digest_size, theirs.block_size)
        assert ours.hexdigest() == theirs.hexdigest() == ours.digest().hex()
        fork = ours.copy()
        fork.update(b"more")
        assert ours.hexdigest() == theirs.hexdigest() != fork.hexdigest()

    def test_verify(self):
        mac = csvfast.hmac_sm3(b"key", b"data")
        tag = mac.digest()
        assert mac.verify(tag) is None
        for bit in range(256):
            wrong = bytearray(tag)
            wrong[bit // 8] ^= 1 << bit % 8
            with pytest.raises(errors.AuthenticationError):
                mac.verify(wrong)
        with pytest.raises(errors.LengthError, match="31 bytes; expected 32"):
            mac.verify(tag[:31])

    def test_refuses_pickling(self):
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(errors.KeyExposureError):
                act(csvfast.hmac_sm3(b"secret key"))

    def test_threads_share_one_object(self):
        mac, piece = csvfast.hmac_sm3(b"k"), b"p" * 5000
        together(4, lambda _: [mac.update(piece) for _ in range(25)])
        assert mac.digest() == hmac.new(b"k", piece * 100, "sm3").digest()


class TestKdf:
    @given(secret=st.binary(max_size=300), length=st.integers(0, 500))
    def test_definition(self, secret, length):
        blocks = (expected(secret + i.to_bytes(4, "big")) for i in range(1, length // 32 + 2))
        assert csvfast.sm3_kdf(secret, length) == b"".join(blocks)[:length]

    def test_bad_lengths(self):
        with pytest.raises(errors.LengthError, match="-1"):
            csvfast.sm3_kdf(b"", -1)
        with pytest.raises(errors.LengthError, match="137438953441"):
            csvfast.sm3_kdf(b"", 32 * (2**32 - 1) + 1)
        with pytest.raises(TypeError, match="length must be an integer, not float"):
            csvfast.sm3_kdf(b"", 1.5)


class TestFile:
    @pytest.mark.parametrize("length", [0, 1, 70000, (1 << 20) + 1])
    def test_equals_hashlib(self, tmp_path: Path, length):
        data = os.urandom(length)
        path = tmp_path / "image"
        path.write_bytes(data)
        state = csvfast.sm3_file(path)
        assert state.digest() == expected(data)
        assert csvfast.sm3_file(str(path)).hexdigest() == state.hexdigest()
        state.update(b"more")
        assert state.digest() == expected(data + b"more")

    def test_errors_are_the_systems(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            csvfast.sm3_file(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            csvfast.sm3_file(tmp_path)
