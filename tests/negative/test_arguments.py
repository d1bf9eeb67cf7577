"""One thing wrong at a time: a specific exception that names the value, nothing written, no key or plaintext told."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import csvfast
from csvfast import EncryptedMemory, errors
from csvfast.crypto import SM4CTR, SM4GCM, SM4XTS

KEY = bytes(range(32))
SECRET = bytes.fromhex("5ec2e75ec2e75ec2e75ec2e75ec2e75e")
SIZE = 8 * 4096


@pytest.fixture
def memory():
    with EncryptedMemory(SIZE, base_address=0x100000) as memory:
        memory.install(1, KEY)
        yield memory


def refuses(kind, words, act):
    """The exception is exactly of that class, says the words, and tells nothing secret."""
    with pytest.raises(kind, match=words) as caught:
        act()
    assert caught.type is kind
    message = str(caught.value)
    for secret in (SECRET, KEY):
        assert secret.hex() not in message
        assert repr(secret) not in message
    return caught.value


class TestTree:
    def test_everything_is_in_one_tree(self):
        for name in errors.__all__:
            kind = getattr(errors, name)
            assert issubclass(kind, errors.CsvfastError) or kind is errors.FirmwareStatus  # the codes of FirmwareError
            assert kind.__doc__

    @pytest.mark.parametrize(
        ("kind", "builtin"),
        [
            (errors.StartupError, ImportError),
            (errors.KeyLengthError, ValueError),
            (errors.WeakKeyError, ValueError),
            (errors.AddressError, ValueError),
            (errors.UnknownAsidError, LookupError),
            (errors.BufferTypeError, TypeError),
            (errors.ReadOnlyBufferError, BufferError),
            (errors.NonContiguousBufferError, BufferError),
            (errors.MemoryInUseError, BufferError),
            (errors.KeyExposureError, TypeError),
            (errors.AllocationError, MemoryError),
            (errors.SystemCallError, OSError),
        ],
    )
    def test_also_the_expected_builtin(self, kind, builtin):
        assert issubclass(kind, builtin)


class TestKeys:
    @pytest.mark.parametrize("length", [0, 1, 16, 31, 33, 64])
    def test_length(self, memory, length):
        words = f"key has {length} bytes; expected 32"
        refuses(errors.KeyLengthError, words, lambda: SM4XTS((SECRET * 4)[:length]))
        refuses(errors.KeyLengthError, words, lambda: memory.install(2, (SECRET * 4)[:length]))
        assert not memory.installed(2)
        if length != 16:
            words = f"key has {length} bytes; expected 16"
            refuses(errors.KeyLengthError, words, lambda: SM4CTR((SECRET * 4)[:length], bytes(16)))
            refuses(errors.KeyLengthError, words, lambda: SM4GCM((SECRET * 4)[:length]))

    def test_equal_halves(self, memory):
        refuses(errors.WeakKeyError, "K1 and K2", lambda: SM4XTS(SECRET * 2))
        refuses(errors.WeakKeyError, "ASID 2", lambda: memory.install(2, SECRET * 2))
        assert memory.generation(2) == 0

    @pytest.mark.parametrize("key", ["k" * 32, 32, None, [0] * 32])
    def test_type(self, key):
        for make in (SM4XTS, SM4GCM, lambda key: SM4CTR(key, bytes(16))):
            refuses(errors.BufferTypeError, "key must be a bytes-like object", lambda make=make: make(key))

    def test_strided(self):
        key = np.zeros(64, np.uint8)[::2]
        refuses(errors.NonContiguousBufferError, r"strides \(2,\)", lambda: SM4XTS(key))

    @pytest.mark.parametrize("make", [lambda: SM4XTS(KEY), lambda: SM4GCM(SECRET), lambda: SM4CTR(SECRET, bytes(16))])
    def test_objects_with_keys_stay_where_they_are(self, make):
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            refuses(errors.KeyExposureError, "cannot be pickled or copied", lambda act=act: act(make()))
        assert not hasattr(make(), "__dict__")

    def test_memory_is_not_pickled(self, memory):
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            refuses(errors.KeyExposureError, "EncryptedMemory", lambda act=act: act(memory))


class TestTransforms:
    @pytest.mark.parametrize("value", ["gcm", "GB", "", None, 0, b"gb"])
    def test_standard(self, value):
        refuses(errors.ArgumentError, "standard must be one of 'gb', 'ieee'", lambda: SM4XTS(KEY, standard=value))
        refuses(errors.ArgumentError, "standard must be one of", lambda: EncryptedMemory(4096, standard=value))

    @pytest.mark.parametrize("value", [0, 15, (16 << 20) + 1, 2**64, -1])
    def test_unit_size(self, value):
        refuses(errors.LengthError, str(value), lambda: SM4XTS(KEY, unit_size=value))

    @pytest.mark.parametrize("length", [1, 15, 4097, 4096 + 15])
    def test_last_unit_too_short(self, length):
        out = bytearray(b"\xee" * length)
        refuses(errors.LengthError, f"data has {length} bytes", lambda: SM4XTS(KEY).encrypt(bytes(length), 0, out))
        assert out == b"\xee" * length

    @pytest.mark.parametrize("unit", [-1, 2**64])
    def test_unit_range(self, unit):
        refuses(errors.AddressError, str(unit), lambda: SM4XTS(KEY).encrypt(bytes(16), unit))

    def test_unit_wraps(self):
        last = 2**64 - 1
        assert len(SM4XTS(KEY).encrypt(bytes(4096), last)) == 4096
        refuses(errors.AddressError, str(last), lambda: SM4XTS(KEY).encrypt(bytes(8192), last))

    @pytest.mark.parametrize("unit", [1.0, "1", None])
    def test_unit_type(self, unit):
        with pytest.raises(TypeError, match="unit must be an integer"):
            SM4XTS(KEY).encrypt(bytes(16), unit)

    @pytest.mark.parametrize("length", [0, 15, 17, 4096])
    def test_out_length(self, length):
        out = bytearray(length)
        words = f"out has {length} bytes; expected 16"
        refuses(errors.LengthError, words, lambda: SM4XTS(KEY).encrypt(bytes(16), 0, out))
        refuses(errors.LengthError, words, lambda: SM4CTR(SECRET, bytes(16)).encrypt(bytes(16), out))
        refuses(errors.LengthError, words, lambda: SM4GCM(SECRET).encrypt(bytes(12), bytes(16), out=out))
        assert out == bytes(length)

    @pytest.mark.parametrize("shift", [1, 15, 16, 4095])
    def test_overlap(self, shift):
        for length in (64, 8192):
            if shift >= length:
                continue
            space = bytearray(os.urandom(length + shift))
            before = bytes(space)
            low, high = memoryview(space)[:length], memoryview(space)[shift:]
            for data, out in ((low, high), (high, low)):
                for act in (
                    SM4XTS(KEY).encrypt,
                    SM4XTS(KEY).decrypt,
                    lambda data, out: SM4XTS(KEY).encrypt(data, out=out),
                    lambda data, out: SM4CTR(SECRET, bytes(16)).encrypt(data, out),
                    lambda data, out: SM4GCM(SECRET).encrypt(bytes(12), data, b"", out),
                    lambda data, out: SM4GCM(SECRET).decrypt(bytes(12), data, bytes(16), b"", out),
                ):
                    arguments = (data, 0, out) if getattr(act, "__self__", None) is not None else (data, out)
                    refuses(errors.OverlapError, "overlaps", lambda act=act, arguments=arguments: act(*arguments))
                    assert space == before

    def test_read_only_and_strided_outputs(self):
        frozen = np.zeros(64, np.uint8)
        frozen.flags.writeable = False
        strided = np.zeros(128, np.uint8)[::2]
        for act in (
            lambda out: SM4XTS(KEY).encrypt(bytes(64), 0, out),
            lambda out: SM4CTR(SECRET, bytes(16)).encrypt(bytes(64), out),
            lambda out: SM4GCM(SECRET).encrypt(bytes(12), bytes(64), out=out),
            lambda out: csvfast.sm3_blocks(bytes(128), 64, out=out),
        ):
            for out in (bytes(64), frozen, memoryview(bytearray(64)).toreadonly()):
                refuses(errors.ReadOnlyBufferError, "out must be writable", lambda act=act, out=out: act(out))
            refuses(errors.NonContiguousBufferError, "out must be C-contiguous", lambda act=act: act(strided))
            refuses(errors.BufferTypeError, "out must be a bytes-like object, not str", lambda act=act: act("x" * 64))

    @pytest.mark.parametrize("data", [np.zeros((4, 4), np.uint8).T[:, :2], np.zeros(64, np.uint8)[::-1]])
    def test_strided_inputs(self, data):
        for act in (SM4XTS(KEY).encrypt, csvfast.sm3, SM4CTR(SECRET, bytes(16)).encrypt):
            refuses(errors.NonContiguousBufferError, "data must be C-contiguous", lambda act=act: act(data))

    def test_fortran_order_is_not_contiguous(self):
        data = np.asfortranarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
        refuses(errors.NonContiguousBufferError, "C-contiguous", lambda: csvfast.sm3(data))

    def test_released_view(self):
        view = memoryview(b"abc")
        view.release()
        refuses(errors.BufferTypeError, "released", lambda: csvfast.sm3(view))

    @pytest.mark.parametrize("length", [0, 15, 17])
    def test_tweak_and_counter_lengths(self, length):
        words = f"has {length} bytes; expected 16"
        refuses(errors.LengthError, words, lambda: SM4XTS(KEY).encrypt_unit(bytes(16), bytes(length)))
        refuses(errors.LengthError, words, lambda: SM4CTR(SECRET, bytes(length)))

    def test_unit_length(self):
        for length in (0, 15, (16 << 20) + 1):
            refuses(
                errors.LengthError,
                f"has {length} bytes",
                lambda length=length: SM4XTS(KEY).encrypt_unit(bytes(length), bytes(16)),
            )

    def test_span(self):
        cipher = SM4XTS(KEY)
        refuses(errors.AlignmentError, "offset 8", lambda: cipher.encrypt_span(bytes(16), 0, 8))
        refuses(errors.LengthError, "data has 17 bytes", lambda: cipher.encrypt_span(bytes(17), 0, 0))
        refuses(errors.AddressError, "16777216", lambda: cipher.encrypt_span(bytes(16), 0, 16 << 20))
        refuses(errors.AddressError, "passes the end", lambda: cipher.encrypt_span(bytes(32), 0, (16 << 20) - 16))

    def test_lines(self):
        cipher = SM4XTS(KEY)
        places = np.array([0, 64], np.uint64)
        refuses(errors.LengthError, "data has 64 bytes; expected 128", lambda: cipher.encrypt_lines(bytes(64), places))
        refuses(
            errors.AlignmentError,
            r"0x41 \(number 1\)",
            lambda: cipher.encrypt_lines(bytes(128), np.array([0, 65], np.uint64)),
        )
        for wrong in (np.array([0, 64], np.int64), np.array([0, 64], np.uint32), np.zeros(2), b"\0" * 16):
            refuses(
                errors.BufferTypeError,
                "unsigned 64-bit",
                lambda wrong=wrong: cipher.encrypt_lines(bytes(128), wrong),
            )

    def test_gcm(self):
        cipher = SM4GCM(SECRET)
        refuses(errors.LengthError, "nonce has 0 bytes", lambda: cipher.encrypt(b"", b""))
        for size in (0, 1, 5, 11, 17, 100):
            words = f"the tag has {size} bytes"
            refuses(errors.LengthError, words, lambda size=size: cipher.encrypt(bytes(12), b"", tag_length=size))
            refuses(errors.LengthError, words, lambda size=size: cipher.decrypt(bytes(12), b"", bytes(size)))

    @pytest.mark.parametrize("threads", [0, -1, 1025, 2**64])
    def test_pool(self, threads):
        refuses(errors.ArgumentError, str(threads), lambda: csvfast.WorkerPool(threads))
        with pytest.raises(TypeError, match="pool must be a WorkerPool"):
            SM4XTS(KEY, pool=threads)


class TestMemoryShape:
    @pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, 2**64])
    def test_size(self, size):
        refuses(errors.LengthError, str(size), lambda: EncryptedMemory(size))

    def test_size_missing(self):
        refuses(errors.ArgumentError, "size is missing", EncryptedMemory)

    def test_more_than_the_machine_has(self):
        with pytest.raises(MemoryError) as caught:
            EncryptedMemory(1 << 62)
        assert isinstance(caught.value, errors.AllocationError)

    @pytest.mark.parametrize(
        ("options", "kind", "words"),
        [
            ({"base_address": 5}, errors.AlignmentError, "base_address 0x5"),
            ({"base_address": -4096}, errors.AddressError, "-4096"),
            ({"base_address": 2**64}, errors.AddressError, str(2**64)),
            ({"base_address": 2**64 - 4096}, errors.AddressError, "do not end below 2"),
            ({"base_address": 2**64 - 8192}, errors.AddressError, "do not end below 2"),
            ({"asid_max": 0}, errors.AsidError, "asid_max is 0"),
            ({"asid_max": 65536}, errors.AsidError, "asid_max is 65536"),
            ({"threads": -1}, errors.ArgumentError, "-1"),
            ({"threads": 5000}, errors.ArgumentError, "5000"),
            ({"tweak_model": "page"}, errors.ArgumentError, "tweak_model must be one of 'xts', 'line'"),
            ({"file_offset": 4096}, errors.ArgumentError, "no path"),
            ({"buffer": bytearray(100)}, errors.LengthError, "buffer has 100 bytes"),
            ({"buffer": bytes(8192)}, errors.ReadOnlyBufferError, "buffer must be writable"),
            ({"buffer": "x"}, errors.BufferTypeError, "buffer must be a bytes-like object, not str"),
            ({"buffer": bytearray(8192), "path": "x"}, errors.ArgumentError, "not on both"),
        ],
    )
    def test_options(self, options, kind, words):
        refuses(kind, words, lambda: EncryptedMemory(8192, **options))

    def test_buffer_of_wrong_type_without_size(self):
        refuses(errors.BufferTypeError, "not int", lambda: EncryptedMemory(buffer=5))


class TestAccess:
    @pytest.mark.parametrize(
        ("address", "length"),
        [
            (0, 1),
            (0xFFFFF, 1),
            (0xFFFFF, 2),
            (0x108000, 1),
            (0x107FFF, 2),
            (0x100000, SIZE + 1),
            (2**64 - 1, 1),
            (2**64 - 1, 2),
        ],
    )
    def test_out_of_range(self, memory, address, length):
        before = memory.raw.tobytes()
        words = f"{address:#x} leaves the memory; expected addresses within 0x100000 .. 0x107fff"
        out = bytearray(b"\xee" * length)
        for asid in (0, 1):
            refuses(errors.AddressError, words, lambda asid=asid: memory.write(address, bytes(length), asid))
            refuses(errors.AddressError, words, lambda asid=asid: memory.read(address, length, asid))
            refuses(errors.AddressError, words, lambda asid=asid: memory.read_into(address, out, asid))
        assert memory.raw.tobytes() == before
        assert out == b"\xee" * length

    @pytest.mark.parametrize("address", [-1, 2**64, 2**100])
    def test_no_such_number(self, memory, address):
        for act in (memory.write, memory.write_line):
            refuses(errors.AddressError, str(address), lambda act=act: act(address, bytes(64), 1))
        refuses(errors.AddressError, str(address), lambda: memory.read(address, 1, 1))
        refuses(errors.AddressError, str(address), lambda: memory.write_pages(address, bytes(4096), 1))

    @pytest.mark.parametrize("value", [1.5, "1", None, b"1"])
    def test_number_types(self, memory, value):
        with pytest.raises(TypeError, match="address must be an integer"):
            memory.read(value, 1, 1)
        with pytest.raises(TypeError, match="length must be an integer"):
            memory.read(0x100000, value, 1)
        with pytest.raises(TypeError, match="ASID must be an integer"):
            memory.read(0x100000, 1, value)

    @pytest.mark.parametrize("length", [-1, 2**63, 2**64])
    def test_length(self, memory, length):
        refuses(errors.LengthError, str(length), lambda: memory.read(0x100000, length, 1))

    def test_huge_length_allocates_nothing(self, memory):
        refuses(errors.AddressError, "leaves the memory", lambda: memory.read(0x100000, 1 << 62, 1))
        refuses(errors.AddressError, "pages", lambda: memory.read_pages(0x100, 1 << 50, 1))

    def test_asids(self, memory):
        for act in (
            lambda asid: memory.write(0x100000, b"x", asid),
            lambda asid: memory.read(0x100000, 1, asid),
            lambda asid: memory.read_into(0x100000, bytearray(1), asid),
            lambda asid: memory.write_pages(0x100, bytes(4096), asid),
            lambda asid: memory.read_pages(0x100, 1, asid),
            lambda asid: memory.write_line(0x100000, bytes(64), asid),
            lambda asid: memory.read_line(0x100000, asid),
            lambda asid: memory.encrypt_in_place(0x100000, 16, asid),
            lambda asid: memory.launch_update(0x100000, 16, asid),
            memory.remove,
        ):
            refuses(errors.UnknownAsidError, "ASID 2 has no key installed", lambda act=act: act(2))
            refuses(errors.AsidError, "ASID 510 is out of range; expected 1 .. 509", lambda act=act: act(510))
            for asid in (-1, 65536, 2**40):
                refuses(errors.AsidError, f"ASID {asid} is out of range", lambda act=act, asid=asid: act(asid))
        for act in (memory.install, memory.remove, lambda asid: memory.encrypt_in_place(0x100000, 16, asid)):
            refuses(errors.AsidError, "ASID 0 is out of range; expected 1 .. 509", lambda act=act: act(0))
        assert not memory.raw.any()

    def test_asid_in_use(self, memory):
        refuses(errors.AsidInUseError, "ASID 1 already has a key", lambda: memory.install(1))
        refuses(errors.AsidInUseError, "ASID 1 already has a key", lambda: memory.install(1, KEY))
        assert memory.generation(1) == 1

    def test_own_memory_as_buffer(self):
        memory = EncryptedMemory(SIZE, base_address=0x100000)  # never closed by hand: the exceptions hold views of it
        memory.install(1, KEY)
        raw = memory.raw
        refuses(errors.OverlapError, "inside the encrypted memory", lambda: memory.write(0x100000, raw[4096:8192], 1))
        refuses(errors.OverlapError, "inside the encrypted memory", lambda: memory.read_into(0x100000, raw[:16], 1))
        assert not raw.any()

    def test_pages_and_lines(self, memory):
        refuses(errors.LengthError, "data has 4095 bytes", lambda: memory.write_pages(0x100, bytes(4095), 1))
        refuses(errors.AddressError, "0x107 leaves", lambda: memory.write_pages(0x107, bytes(8192), 1))
        refuses(errors.AddressError, "0xff leaves", lambda: memory.read_pages(0xFF, 1, 1))
        refuses(errors.AddressError, "leaves", lambda: memory.read_pages(2**64 - 1, 1, 1))
        refuses(
            errors.LengthError, "out has 1 bytes; expected 4096", lambda: memory.read_pages(0x100, 1, 1, bytearray(1))
        )
        refuses(errors.LengthError, "a line has 63 bytes", lambda: memory.write_line(0x100000, bytes(63), 1))
        refuses(errors.AlignmentError, "0x100001", lambda: memory.write_line(0x100001, bytes(64), 1))
        refuses(errors.AlignmentError, "0x100020", lambda: memory.read_line(0x100020, 1))
        assert not memory.raw.any()

    def test_launch(self, memory):
        state = csvfast.sm3()
        refuses(errors.AlignmentError, "0x100008", lambda: memory.launch_update(0x100008, 16, 1, linear=state))
        refuses(errors.LengthError, "length is 17", lambda: memory.launch_update(0x100000, 17, 1, linear=state))
        refuses(errors.LengthError, "length is 16", lambda: memory.launch_update(0x100000, 16, 1, page_digests=True))
        refuses(errors.AlignmentError, "4096", lambda: memory.launch_update(0x100010, 4096, 1, page_digests=True))
        refuses(errors.AddressError, "leaves", lambda: memory.launch_update(0x107000, 8192, 1, linear=state))
        refuses(errors.AddressError, "leaves", lambda: memory.launch_update(0x100000, 1 << 60, 1, page_digests=True))
        with pytest.raises(TypeError, match=r"linear must be a csvfast\.sm3"):
            memory.launch_update(0x100000, 16, 1, linear=b"")
        assert state.digest() == csvfast.sm3().digest()
        assert not memory.raw.any()

    def test_outputs(self, memory):
        refuses(errors.ReadOnlyBufferError, "writable", lambda: memory.read_into(0x100000, bytes(16), 1))
        refuses(
            errors.NonContiguousBufferError,
            "contiguous",
            lambda: memory.read_into(0x100000, np.zeros(64, np.uint8)[::2], 1),
        )


class TestKernels:
    def test_unknown_names(self):
        before = csvfast.info()["kernels"]
        refuses(errors.KernelError, "no primitive is called 'aes'", lambda: csvfast.force_kernel("aes", "portable"))
        refuses(errors.KernelError, "sm4 has no kernel 'quantum'", lambda: csvfast.force_kernel("sm4", "quantum"))
        with pytest.raises(TypeError):
            csvfast.force_kernel("sm4", 1)
        assert csvfast.info()["kernels"] == before

    @pytest.mark.parametrize(
        ("variable", "value"),
        [("CSVFAST_KERNEL", "quantum"), ("CSVFAST_KERNEL", "sm4=quantum"), ("CSVFAST_KERNEL", "aes=portable")],
    )
    def test_environment_that_cannot_be_had(self, variable, value):
        done = run("import csvfast", {variable: value})
        assert done.returncode == 1
        assert "StartupError" in done.stderr
        assert value in done.stderr
        assert "kernels: sm4: " in done.stderr

    def test_kernel_of_the_environment(self):
        done = run("import csvfast; print(csvfast.info()['kernels']['sm4']['chosen'])", {"CSVFAST_KERNEL": "portable"})
        assert (done.returncode, done.stdout) == (0, "portable\n")

    def test_disabled_features(self):
        done = run(
            "import csvfast; i = csvfast.info(); print(i['kernels']['sm4']['available'], i['cpu']['features'])",
            {"CSVFAST_DISABLE": "avx512,ifma,gfni,vaes,aes,avx2,bmi2,adx,pclmul,sha"},
        )
        assert (done.returncode, done.stdout) == (0, "['portable'] []\n")


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CSVFAST_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=60, check=False
    )
