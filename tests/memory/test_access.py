"""EncryptedMemory: what guests read, what the host sees, whatever the address, ASID, model and backing."""

from __future__ import annotations

import array
import contextlib
import gc
import mmap
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import sm4
from reference.buffers import READABLE, WRITABLE, content, together

import csvfast
from csvfast import EncryptedMemory, errors
from csvfast.crypto import SM4XTS

KEY, OTHER = bytes(range(32)), bytes(range(100, 132))
SIZE = 64 * 4096


@pytest.fixture(params=["gb", "ieee"])
def standard(request):
    return request.param


@pytest.fixture
def memory():
    with EncryptedMemory(SIZE) as memory:
        memory.install(1, KEY)
        memory.install(2, OTHER)
        yield memory


class TestCiphertext:
    def test_page_is_xts_of_its_frame_number(self, sm4_kernel, standard):
        page = os.urandom(4096)
        with EncryptedMemory(SIZE, standard=standard, base_address=0x7000) as memory:
            memory.install(1, KEY)
            memory.write(0x9000, page, asid=1)
            wanted = SM4XTS(KEY, standard=standard).encrypt(page, 9)
            assert bytes(memory.raw[0x2000:0x3000]) == wanted
            assert memory.read(0x9000, 4096, asid=0) == wanted
            assert memory.read(0x9000, 4096, asid=1) == page

    def test_specification_vector(self, memory):
        memory.write(0x1000, bytes(range(256)) * 16, 1)
        assert (
            csvfast.sm3(memory.raw[4096:8192]).hexdigest()
            == "c9dae932bbd42a71e35e9d6bfbff770cfed3b0f4c4ff374481f3ffccee47c25a"
        )

    def test_line_model_shares_one_tweak_in_a_line(self, sm4_kernel):
        """Specification 5.2: identical blocks give 64 groups of 4 equal blocks, the groups distinct."""
        with EncryptedMemory(SIZE, tweak_model="line", base_address=0x40000) as memory:
            memory.install(1, KEY)
            memory.write(0x41000, b"\xab" * 4096, 1)
            blocks = memory.raw[4096:8192].reshape(64, 4, 16).copy()
            assert (blocks == blocks[:, :1]).all()
            assert len({bytes(line[0]) for line in blocks}) == 64
            keys = sm4.round_keys(KEY[:16])
            tweak = sm4.crypt_block(sm4.round_keys(KEY[16:]), (0x41040 >> 6).to_bytes(16, "little"))
            inner = sm4.crypt_block(keys, bytes(0xAB ^ t for t in tweak))
            assert bytes(blocks[1, 0]) == bytes(a ^ b for a, b in zip(inner, tweak, strict=True))
            memory.write(0x41007, b"unaligned", 1)
            assert memory.read(0x41000, 24, 1) == b"\xab" * 7 + b"unaligned" + b"\xab" * 8

    def test_same_data_same_place_same_ciphertext(self, memory):
        memory.write(0, b"a" * 4096, 1)
        first = bytes(memory.raw[:4096])
        memory.write(0, bytes(4096), 1)
        memory.write(0, b"a" * 4096, 1)
        assert bytes(memory.raw[:4096]) == first

    def test_moved_ciphertext_is_noise(self, memory):
        memory.write(0, b"a" * 4096, 1)
        memory.raw[4096:8192] = memory.raw[:4096]
        assert memory.read(4096, 4096, 1) != b"a" * 4096


class TestIsolation:
    def test_wrong_asid_reads_exactly_the_hardwares_noise(self, memory):
        page = os.urandom(4096)
        memory.write(0x5000, page, asid=1)
        noise = memory.read(0x5000, 4096, asid=2)
        assert noise == SM4XTS(OTHER).decrypt(memory.read(0x5000, 4096, asid=0), 5)
        assert noise != page

    def test_host_reads_and_writes_as_it_is(self, memory):
        memory.write(100, b"plain", asid=0)
        assert bytes(memory.raw[100:105]) == b"plain" == memory.read(100, 5, 0)

    def test_new_generation_cannot_read_the_old_ones_data(self, memory):
        memory.write(0, b"secret" * 100, 1)
        memory.remove(1)
        with pytest.raises(errors.UnknownAsidError, match="ASID 1 has no key"):
            memory.read(0, 600, 1)
        assert memory.install(1) == 2
        assert memory.read(0, 600, 1) != b"secret" * 100
        memory.remove(1)
        assert memory.install(1, KEY) == 3
        assert memory.read(0, 600, 1) == b"secret" * 100

    def test_random_keys_differ(self):
        seen = set()
        with EncryptedMemory(4096) as memory:
            for asid in range(1, 65):
                assert memory.install(asid) == 1
                memory.write(0, bytes(64), asid)
                seen.add(bytes(memory.raw[:64]))
        assert len(seen) == 64

    def test_key_table_facts(self, memory):
        assert memory.asids() == [1, 2]
        assert memory.installed(1)
        assert not memory.installed(3)
        assert [memory.generation(asid) for asid in (1, 2, 3)] == [1, 1, 0]
        memory.remove(1)
        assert memory.asids() == [2]
        assert memory.stats()["asids_active"] == 1


class TestShapesOfAccess:
    @given(data=st.data())
    def test_any_access_against_a_shadow(self, data):
        """Random writes and reads of any address and length, against plain bytes."""
        size = 3 * 4096
        base = data.draw(st.sampled_from([0, 0x1000, 1 << 40]))
        model = data.draw(st.sampled_from(["xts", "line"]))
        shadow = bytearray(size)
        with EncryptedMemory(size, base_address=base, tweak_model=model) as memory:
            memory.install(1, KEY)
            memory.write(base, bytes(size), 1)
            for _ in range(data.draw(st.integers(1, 8))):
                start = data.draw(st.integers(0, size))
                length = data.draw(st.integers(0, size - start))
                piece = random.Random(start * 31 + length).randbytes(length)
                memory.write(base + start, piece, 1)
                shadow[start : start + length] = piece
                begin = data.draw(st.integers(0, size))
                count = data.draw(st.integers(0, size - begin))
                assert memory.read(base + begin, count, 1) == shadow[begin : begin + count]
            if model == "xts":
                assert bytes(memory.raw) == SM4XTS(KEY).encrypt(shadow, base // 4096)

    def test_pages_lines_and_bytes_agree(self, sm4_kernel, memory):
        pages = os.urandom(4 * 4096)
        memory.write_pages(8, pages, 1)
        assert memory.read(8 * 4096, 4 * 4096, 1) == pages
        assert memory.read_pages(8, 4, 1) == pages
        for line in range(0, 4 * 4096, 64 * 37):
            assert memory.read_line(8 * 4096 + line, 1) == pages[line : line + 64]
        memory.write_line(9 * 4096 + 128, b"L" * 64, 1)
        assert (
            memory.read(9 * 4096 + 127, 66, 1)
            == pages[4096 + 127 : 4096 + 128] + b"L" * 64 + pages[4096 + 192 : 4096 + 193]
        )
        out = bytearray(4096)
        assert memory.read_pages(8, 1, 1, out) is out
        assert out == pages[:4096]

    def test_worker_threads_give_the_same_bytes(self):
        data = os.urandom(8 << 20)
        with EncryptedMemory(8 << 20, threads=2) as memory:
            memory.install(1, KEY)
            memory.write_pages(0, data, 1)
            assert memory.raw.tobytes() == SM4XTS(KEY).encrypt(data)
            assert memory.read_pages(0, 2048, 1) == data

    @pytest.mark.parametrize("kind", READABLE)
    def test_buffers_in(self, memory, kind):
        data = os.urandom(4096)
        memory.write(4096, READABLE[kind](data), 1)
        assert memory.read(4096, 4096, 1) == data

    @pytest.mark.parametrize("kind", WRITABLE)
    def test_buffers_out(self, memory, kind):
        data = os.urandom(4096)
        memory.write(4096, data, 1)
        out = WRITABLE[kind](bytes(4096))
        assert memory.read_into(4096, out, 1) == 4096
        assert content(out) == data

    def test_numpy_integers_are_addresses(self, memory):
        memory.write(np.int64(4096), b"abc", np.uint16(1))
        assert memory.read(np.uint64(4096), np.int32(3), np.int8(1)) == b"abc"

    def test_nothing_is_read_or_written_by_empty_access(self, memory):
        memory.write(SIZE, b"", 1)
        assert memory.read(SIZE, 0, 1) == b""


class TestLaunch:
    @pytest.mark.parametrize("threads", [1, 2])
    def test_measures_plaintext_and_encrypts(self, threads):
        image = os.urandom(300 * 4096)
        with EncryptedMemory(400 * 4096, threads=threads) as memory:
            memory.install(5, KEY)
            memory.write(4096, image, asid=0)
            linear = csvfast.sm3(b"before")
            leaves = memory.launch_update(4096, len(image), 5, linear=linear, page_digests=True)
            assert linear.digest() == csvfast.sm3(b"before" + image).digest()
            assert leaves == csvfast.sm3_blocks(image)
            assert memory.read(4096, len(image), 5) == image
            assert memory.raw[4096 : 4096 + len(image)].tobytes() == SM4XTS(KEY).encrypt(image, 1)

    def test_parts_are_optional(self, memory):
        memory.write(0, b"x" * 8192, 0)
        assert memory.launch_update(0, 4096, 1) is None
        memory.encrypt_in_place(4096, 4096, 1)
        assert memory.read(0, 8192, 1) == b"x" * 8192
        linear = csvfast.sm3()
        memory.write(16 * 3, b"y" * 32, 0)
        assert memory.launch_update(16 * 3, 32, 1, linear=linear) is None
        assert linear.digest() == csvfast.sm3(b"y" * 32).digest()


class TestLife:
    def test_raw_is_writable_and_live(self, memory):
        raw = memory.raw
        assert raw.dtype == np.uint8
        assert raw.shape == (SIZE,)
        raw[:4] = [1, 2, 3, 4]
        assert memory.read(0, 4, 0) == bytes([1, 2, 3, 4])

    def test_view_keeps_the_memory_alive(self):
        memory = EncryptedMemory(4096)
        memory.write(0, b"hello", 0)
        raw = memory.raw
        del memory
        gc.collect()
        assert bytes(raw[:5]) == b"hello"

    def test_close_is_refused_while_views_exist(self):
        memory = EncryptedMemory(4096)
        raw, view = memory.raw, memoryview(memory)
        with pytest.raises(errors.MemoryInUseError, match="2 views"):
            memory.close()
        del raw
        with pytest.raises(BufferError, match="1 views"):
            memory.close()
        view.release()
        memory.close()
        memory.close()
        assert memory.closed

    def test_closed_memory_refuses_everything(self):
        memory = EncryptedMemory(4096)
        memory.close()
        for act in (
            lambda: memory.install(1),
            lambda: memory.remove(1),
            lambda: memory.write(0, b"", 0),
            lambda: memory.read(0, 1, 0),
            lambda: memory.read_into(0, bytearray(1), 0),
            lambda: memory.write_pages(0, b"", 0),
            lambda: memory.read_pages(0, 1, 0),
            lambda: memory.write_line(0, bytes(64), 0),
            lambda: memory.read_line(0, 0),
            lambda: memory.encrypt_in_place(0, 16, 1),
            lambda: memory.launch_update(0, 16, 1),
            lambda: memory.asids(),
            lambda: memory.generation(1),
            lambda: memory.installed(1),
            lambda: memory.stats(),
            lambda: memory.sync(),
            lambda: memory.raw,
        ):
            with pytest.raises(errors.ClosedError):
                act()
        assert repr(memory) == "<EncryptedMemory closed>"

    def test_with_block_closes(self):
        with EncryptedMemory(4096) as memory:
            pass
        assert memory.closed

    def test_with_block_does_not_hide_what_went_wrong(self):
        memory = EncryptedMemory(4096)
        memory.install(1)
        raw = None
        with pytest.raises(ZeroDivisionError), memory:  # noqa: PT012 - both lines are the point
            raw = memory.raw
            _ = 1 / 0
        assert raw is not None
        assert memory.asids() == [], "the keys are gone although the view lives"

    def test_repr_holds_no_key(self, memory):
        assert repr(memory) == (
            f"<EncryptedMemory {SIZE} bytes at 0x0, standard='gb', tweak_model='xts', 2 ASIDs with a key>"
        )

    def test_uninitialised_object_is_harmless(self):
        memory = EncryptedMemory.__new__(EncryptedMemory)
        with pytest.raises(errors.ClosedError, match="never initialised"):
            memory.read(0, 1, 0)
        memory.close()

    def test_second_init_is_refused(self, memory):
        with pytest.raises(errors.ArgumentError, match="already been initialised"):
            memory.__init__(4096)

    def test_stats_count_bytes(self):
        with EncryptedMemory(SIZE) as memory:
            memory.install(1)
            memory.write(0, bytes(8192), 1)
            memory.read(0, 4096, 1)
            memory.write(0, bytes(100), 0)
            memory.write(5, b"x", 1)
            stats = memory.stats()
            assert stats["bytes_host"] == 100
            assert stats["bytes_encrypted"] >= 8192 + 16
            assert stats["bytes_decrypted"] >= 4096 + 16
            assert stats["read_modify_writes"] == 1
            assert (stats["keys_installed"], stats["keys_removed"]) == (1, 0)


class TestBacking:
    def test_callers_buffer(self):
        buffer = mmap.mmap(-1, SIZE)
        memory = EncryptedMemory(buffer=buffer)
        memory.install(1, KEY)
        memory.write(0, b"a" * 4096, 1)
        assert buffer[:4096] == SM4XTS(KEY).encrypt(b"a" * 4096)
        with pytest.raises(BufferError):
            buffer.close()
        memory.close()
        assert buffer[:4096] == SM4XTS(KEY).encrypt(b"a" * 4096)
        buffer.close()

    def test_numpy_buffer(self):
        space = np.zeros(SIZE + 64, np.uint8)
        start = -space.ctypes.data % 64
        with EncryptedMemory(SIZE, buffer=space[start : start + SIZE]) as memory:
            memory.write(0, b"abc", 0)
            assert bytes(space[start : start + 3]) == b"abc"
            if start + 8 + SIZE <= space.size:
                with pytest.raises(errors.AlignmentError, match="8 bytes past a 64-byte boundary"):
                    EncryptedMemory(SIZE, buffer=space[start + 8 : start + 8 + SIZE])

    def test_refused_buffer_is_given_back(self):
        buffer = bytearray(4096)
        with pytest.raises(errors.LengthError, match="buffer has 4096 bytes; expected 8192"):
            EncryptedMemory(8192, buffer=buffer)
        gc.collect()
        buffer.append(0)

    def test_file_keeps_the_ciphertext(self, tmp_path):
        path = tmp_path / "dram"
        with EncryptedMemory(SIZE, path=path) as memory:
            memory.install(1, KEY)
            memory.write(4096, b"page" * 1024, 1)
            memory.sync()
            assert path.read_bytes()[4096:8192] == SM4XTS(KEY).encrypt(b"page" * 1024, 1)
        assert path.stat().st_size == SIZE
        assert path.stat().st_mode & 0o777 == 0o600
        with EncryptedMemory(path=path) as again:
            assert again.size == SIZE
            again.install(7, KEY)
            assert again.read(4096, 4096, 7) == b"page" * 1024

    def test_file_offset(self, tmp_path):
        path = tmp_path / "dram"
        path.write_bytes(bytes(4 * 4096))
        with EncryptedMemory(4096, path=path, file_offset=8192) as memory:
            memory.write(0, b"here", 0)
        assert path.read_bytes() == bytes(8192) + b"here" + bytes(8192 - 4)

    def test_two_engines_on_one_file_see_each_other(self, tmp_path):
        path = tmp_path / "dram"
        with EncryptedMemory(SIZE, path=path) as guest, EncryptedMemory(path=path) as host:
            guest.install(1, KEY)
            guest.write(0, b"s" * 64, 1)
            assert host.read(0, 64, 0) == guest.read(0, 64, 0) != b"s" * 64

    def test_short_or_missing_files_are_refused_and_left_alone(self, tmp_path):
        path = tmp_path / "short"
        path.write_bytes(b"x" * 100)
        with pytest.raises(errors.LengthError, match="has 100 bytes; expected at least 4096"):
            EncryptedMemory(4096, path=path)
        assert path.read_bytes() == b"x" * 100
        with pytest.raises(FileNotFoundError):
            EncryptedMemory(path=tmp_path / "missing")
        with pytest.raises(errors.LengthError):
            EncryptedMemory(5000, path=tmp_path / "new")
        with pytest.raises(errors.ArgumentError):
            EncryptedMemory(4096, path=tmp_path / "new", standard="other")
        assert not (tmp_path / "new").exists(), "a file made in vain must not remain"
        with pytest.raises(IsADirectoryError):
            EncryptedMemory(4096, path=tmp_path)


class TestThreads:
    def test_many_threads_on_one_memory(self):
        with EncryptedMemory(64 << 12) as memory:
            for asid in range(1, 9):
                memory.install(asid)

            def work(index: int) -> None:
                generator, asid, base = random.Random(index), index + 1, index * 8 * 4096
                shadow = bytearray(8 * 4096)
                memory.write(base, shadow, asid)
                for _ in range(200):
                    start = generator.randrange(8 * 4096)
                    piece = generator.randbytes(generator.randrange(8 * 4096 - start + 1))
                    memory.write(base + start, piece, asid)
                    shadow[start : start + len(piece)] = piece
                assert memory.read(base, 8 * 4096, asid) == shadow

            together(8, work)

    def test_neighbours_in_one_block_lose_nothing(self):
        with EncryptedMemory(4096) as memory:
            memory.install(1)
            memory.write(0, bytes(4096), 1)

            def work(index: int) -> None:
                for value in range(200):
                    memory.write(index, bytes([value]), 1)
                    assert memory.read(index, 1, 1)[0] == value

            together(8, work)
            assert memory.read(0, 8, 1) == bytes([199] * 8)

    def test_close_waits_for_nobody_but_refuses(self):
        """A close() during other threads' calls either refuses or wins; nothing crashes."""
        memory = EncryptedMemory(16 << 20)
        memory.install(1)
        data = bytes(16 << 20)

        def work(index: int) -> None:
            for _ in range(10):
                try:
                    if index:
                        memory.write(0, data, 1)
                    else:
                        memory.close()
                except (errors.MemoryInUseError, errors.ClosedError):
                    pass

        together(3, work)
        memory.close()

    def test_install_and_remove_while_others_access(self):
        with EncryptedMemory(1 << 20) as memory:
            memory.install(1, KEY)
            memory.write(0, b"k" * 65536, 1)
            stop = []

            def work(index: int) -> None:
                if index == 0:
                    for _ in range(100):
                        memory.remove(1)
                        memory.install(1, KEY)
                    stop.append(True)
                    return
                while not stop:
                    with contextlib.suppress(errors.UnknownAsidError):
                        assert memory.read(0, 65536, 1) == b"k" * 65536

            together(3, work)
            assert memory.generation(1) == 101


def test_array_of_addresses_is_not_mistaken_for_bytes(key):
    with pytest.raises(errors.BufferTypeError, match="unsigned 64-bit"):
        SM4XTS(key).encrypt_lines(bytes(64), array.array("d", [0.0]))
