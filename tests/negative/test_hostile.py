"""Callers that mean harm or had bad luck: numbers beyond all bounds, arguments in the wrong place, buffers and memories that
change state in the middle of a call, half-made objects, forks."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import csvfast
from csvfast import EncryptedMemory, errors
from csvfast.crypto import SM4CTR, SM4XTS
from csvfast.measure import (
    ParameterError,
    format_verity,
    launch_digest,
    measure_image,
    measure_images,
    verify_verity,
)

KEY = bytes(range(32))
HUGE = 10**5000  # Python refuses to write out so many digits


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


class TestNumbers:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_numbers_too_long_to_print(self, sign, tmp_path):
        with EncryptedMemory(4096) as memory:
            with pytest.raises(errors.AddressError, match="address of 16610 bits"):
                memory.read(sign * HUGE, 1, 0)
            with pytest.raises(errors.LengthError, match="length of 16610 bits"):
                memory.read(0, sign * HUGE, 0)
            with pytest.raises(errors.AsidError, match="ASID of 16610 bits"):
                memory.read(0, 1, sign * HUGE)
        with pytest.raises(errors.LengthError, match="unit_size of 16610 bits"):
            SM4XTS(KEY, unit_size=sign * HUGE)
        with pytest.raises(errors.LengthError, match="size is of 16610 bits"):
            EncryptedMemory(sign * HUGE, path=tmp_path / "dram")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("size", [2**62, 2**70, -4096, 0, 4095])
    def test_file_of_impossible_size_is_not_left_behind(self, size, tmp_path):
        with pytest.raises((errors.LengthError, OSError)):
            EncryptedMemory(size, path=tmp_path / "dram")
        assert not any(tmp_path.iterdir())

    def test_last_byte_of_the_address_space(self):
        with EncryptedMemory(4096, base_address=2**64 - 8192) as memory:
            memory.install(1, KEY)
            last = 2**64 - 4097
            memory.write(last, b"x", 1)
            assert memory.read(last, 1, 1) == b"x"
            for act in (
                lambda: memory.read(last, 2, 1),
                lambda: memory.write(2**64 - 1, bytes(2), 1),
                lambda: memory.write(last, bytes(4098), 1),
                lambda: memory.read_pages(2**52 - 2, 2**52, 1),
                lambda: memory.read_pages(2**52, 1, 1),
                lambda: memory.write_pages(2**60 - 2, bytes(4096), 1),
                lambda: memory.encrypt_in_place(2**64 - 16, 32, 1),
                lambda: memory.launch_update(2**64 - 8192, 2**62, 1),
            ):
                with pytest.raises(errors.AddressError):
                    act()
            assert memory.read(last, 1, 1) == b"x"

    def test_subclass_of_int(self):
        class Number(int):
            def __str__(self) -> str:
                raise AssertionError("nobody asked")

        assert SM4XTS(KEY).encrypt(bytes(16), Number(3)) == SM4XTS(KEY).encrypt(bytes(16), 3)
        assert SM4XTS(KEY).encrypt(bytes(16), np.uint64(3)) == SM4XTS(KEY).encrypt(bytes(16), 3)


class TestArgumentsInTheWrongPlace:
    def test_key_given_as_standard_is_not_shown(self):
        for act in (lambda: SM4XTS(KEY, standard=KEY), lambda: SM4XTS(KEY, standard="k" * 32 + "\1")):
            with pytest.raises(errors.ArgumentError) as caught:
                act()
            assert "kkk" not in str(caught.value)
            assert "\\x01" not in str(caught.value)

    def test_number_as_salt_is_not_that_many_zeros(self, tmp_path):
        (tmp_path / "data").write_bytes(bytes(8192))
        for salt in (10, "00ff", [0]):
            with pytest.raises(TypeError):
                format_verity(tmp_path / "data", salt=salt)

    def test_text_as_root_hash(self, tmp_path):
        (tmp_path / "data").write_bytes(bytes(8192))
        format_verity(tmp_path / "data", tmp_path / "hashes")
        with pytest.raises(TypeError):
            verify_verity(tmp_path / "data", tmp_path / "hashes", "0" * 32)

    @pytest.mark.parametrize("name", ["portable\0", "portable\0gfni", "\udcff", ""])
    def test_kernel_name_that_c_would_read_differently(self, name):
        before = csvfast.info()["kernels"]
        with pytest.raises(errors.KernelError):
            csvfast.force_kernel("sm4", name)
        assert csvfast.info()["kernels"] == before

    def test_path_with_a_nul(self, tmp_path):
        (tmp_path / "data").write_bytes(bytes(8192))
        for act in (
            lambda: measure_image("a\0b"),
            lambda: measure_images(["a\0b", tmp_path / "data"]),
            lambda: format_verity(tmp_path / "data", "a\0b"),
        ):
            with pytest.raises(ParameterError, match="a\\\\x00b"):
                act()

    def test_command_line_that_has_no_bytes(self, tmp_path):
        (tmp_path / "f").write_bytes(bytes(8192))
        with pytest.raises(ParameterError, match="surrogate at character 2"):
            launch_digest(tmp_path / "f", kernel=tmp_path / "f", append="ab\ud800", force_hash_table=True)


class TestBuffers:
    def test_no_export_is_left_by_a_refusal(self):
        """A bytearray can be resized only when nobody holds a buffer of it."""
        data, tweak, out = bytearray(64), bytearray(16), bytearray(63)
        cipher = SM4XTS(KEY)
        for act in (
            lambda: cipher.encrypt(data, 0, out),
            lambda: cipher.encrypt_span(data, 0, 0, out),
            lambda: cipher.encrypt_unit(data, tweak, out),
            lambda: cipher.encrypt_lines(data, np.zeros(1, np.uint64), out),
            lambda: SM4CTR(tweak, tweak).encrypt(data, out),
            lambda: csvfast.sm3_many([data, out, 5]),
            lambda: csvfast.sm3_blocks(data, 64, prefix=tweak, out=out),
            lambda: SM4XTS(data),
        ):
            with pytest.raises(errors.CsvfastError) as caught:
                act()
            for buffer in (data, tweak, out):
                buffer.append(0)  # BufferError if the exception (still alive here) or anybody else holds it
                del buffer[-1]
            del caught

    def test_failed_memory_gives_its_buffer_back(self):
        buffer = bytearray(8192)
        with pytest.raises(errors.LengthError) as caught:
            EncryptedMemory(4096, buffer=buffer)
        buffer.append(0)
        with pytest.raises(errors.CsvfastError) as again:
            EncryptedMemory(4096, buffer=memoryview(bytearray(4097))[1:])
        assert caught.traceback
        assert again.traceback

    @pytest.mark.parametrize("released", ["view", "mmap"])
    def test_memory_on_a_buffer_that_is_gone(self, released):
        if released == "view":
            buffer = memoryview(bytearray(4096))
            buffer.release()
        else:
            buffer = mmap.mmap(-1, 4096)
            buffer.close()
        with pytest.raises(errors.BufferTypeError):
            EncryptedMemory(buffer=buffer)

    def test_nothing_leaks_on_refusals(self):
        data = bytearray(64)
        cipher = SM4XTS(KEY)
        memory = EncryptedMemory(4096)
        before = [sys.getrefcount(thing) for thing in (data, cipher, memory)]
        for _ in range(1000):
            for act in (
                lambda: cipher.encrypt(data, 0, data[:1]),
                lambda: cipher.encrypt(data, -1),
                lambda: memory.write(4096, data, 0),
                lambda: memory.write(0, data, 7),
                lambda: csvfast.sm3_many([data, data, None]),
            ):
                with pytest.raises(errors.CsvfastError):
                    act()
        gc.collect()
        assert [sys.getrefcount(thing) for thing in (data, cipher, memory)] == before
        memory.close()

    def test_zero_length_everything(self):
        cipher = SM4XTS(KEY)
        assert cipher.encrypt(b"") == cipher.encrypt_span(b"", 0, 16 << 20) == b""
        assert cipher.encrypt_lines(b"", np.zeros(0, np.uint64)) == b""
        assert csvfast.sm3_blocks(b"") == csvfast.sm3_kdf(b"", 0) == b""
        assert csvfast.sm3_many([]) == []
        with EncryptedMemory(4096) as memory:
            assert memory.read(4096, 0, 0) == memory.read_pages(1, 0, 0) == b""
            memory.write(4096, b"", 0)


class TestLife:
    def test_half_made_memory(self, tmp_path):
        memory = EncryptedMemory.__new__(EncryptedMemory)
        for act in (
            lambda: memory.read(0, 1, 1),
            lambda: memory.write(0, b"x", 1),
            lambda: memory.install(1),
            lambda: memory.raw,
            memory.stats,
            memory.asids,
            memory.sync,
            lambda: memory.save(tmp_path / "snapshot"),
        ):
            with pytest.raises(errors.ClosedError, match="never initialised"):
                act()
        assert not any(tmp_path.iterdir())
        memory.close()
        assert memory.closed
        assert repr(memory) == "<EncryptedMemory closed>"

    def test_index_that_closes_the_memory(self):
        memory = EncryptedMemory(8192)

        class Address:
            def __index__(self) -> int:
                memory.close()
                return 0

        with pytest.raises(errors.ClosedError):
            memory.write(Address(), bytes(4096), 0)

    def test_finalizer_that_closes_the_memory(self):
        """The garbage collector may run in the middle of a call, where an object is made."""
        done = run(
            "import gc, csvfast\n"
            "memory = csvfast.EncryptedMemory(1 << 20)\n"
            "class Closer:\n"
            "    def __init__(self): self.me = self\n"
            "    def __del__(self): memory.close()\n"
            "out = bytearray(4096)\n"
            "gc.collect(); gc.disable(); Closer(); gc.set_threshold(1, 1, 1); gc.enable()\n"
            "try:\n"
            "    memory.read_pages(0, 1, 0, out)\n"
            "    print('read')\n"
            "except csvfast.errors.ClosedError:\n"
            "    print('closed')\n"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout in ("read\n", "closed\n")

    def test_closing_against_running_calls(self):
        """close() in one thread is refused or takes effect between the calls of the others; nothing is ever torn."""
        for _ in range(10):
            memory = EncryptedMemory(1 << 20, threads=2)
            memory.install(1, KEY)
            page, strange = bytes(1 << 16), []

            def work(memory=memory, page=page, strange=strange):
                try:
                    while True:
                        memory.write(0, page, 1)
                        memory.read_pages(0, 4, 1)
                        time.sleep(0.001)  # calls without a gap between them would keep close() away for ever, as documented
                except errors.ClosedError:
                    pass
                except BaseException as problem:
                    strange.append(problem)

            workers = [threading.Thread(target=work) for _ in range(2)]
            for worker in workers:
                worker.start()
            deadline = time.monotonic() + 30
            while not memory.closed and time.monotonic() < deadline:
                with contextlib.suppress(errors.MemoryInUseError):
                    memory.close()
                time.sleep(0.0002)
            assert memory.closed
            for worker in workers:
                worker.join(30)
            assert not strange

    def test_child_of_a_fork(self):
        """Workers do not survive a fork; calls in the child do their work alone and nothing waits for ever."""
        memory, pool = EncryptedMemory(1 << 22, threads=2), csvfast.WorkerPool(2)
        memory.install(1, KEY)
        data = os.urandom(1 << 22)
        memory.write_pages(0, data, 1)
        expected = SM4XTS(KEY, pool=pool).encrypt(data)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            good = memory.read_pages(0, 1024, 1) == data and SM4XTS(KEY, pool=pool).encrypt(data) == expected
            memory.close()
            del memory, pool
            gc.collect()
            os._exit(0 if good else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        memory.close()

    def test_keys_stay_out_of_tracebacks(self):
        done = run(
            "import csvfast\n"
            "memory = csvfast.EncryptedMemory(4096)\n"
            f"memory.install(1, bytes.fromhex('{KEY.hex()}'))\n"
            f"memory.install(1, bytes.fromhex('{'5e' * 31}'))\n"
        )
        assert done.returncode == 1
        message = done.stderr.splitlines()[-1]
        assert "key has 31 bytes; expected 32" in message
        assert "5e5e" not in message
        assert "^^^^" not in message


class TestSnapshots:
    def test_link_and_long_name(self, tmp_path):
        real = tmp_path / ("n" * 250)
        link = tmp_path / "link"
        link.symlink_to(real)
        with EncryptedMemory(8192) as memory:
            memory.save(link)
            assert link.is_symlink()
            assert real.is_file()
            memory.restore(link)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", real.name]

    def test_devices_are_not_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with EncryptedMemory(8192) as memory:
            for path in (tmp_path / "pipe", Path("/dev/null")):
                with pytest.raises(errors.SnapshotError, match="not a regular file"):
                    memory.save(path)
        assert Path("/dev/null").is_char_device()
        assert (tmp_path / "pipe").is_fifo()
