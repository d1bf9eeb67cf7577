"""Agreement with implementations nobody here wrote: libgcrypt, the openssl program, gmssl and gmalg."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import subprocess

import pytest

import csvfast
from csvfast.crypto import SM4CTR, SM4XTS

SM4, MODE_CTR, MODE_XTS = 318, 6, 13  # gcrypt.h
KEY = bytes(range(32))


class Gcrypt:
    """Just enough of libgcrypt by ctypes."""

    def __init__(self, name: str) -> None:
        library = ctypes.CDLL(name)
        library.gcry_check_version.restype = ctypes.c_char_p
        if not library.gcry_check_version(None):
            raise OSError("libgcrypt did not initialise")
        library.gcry_control(38, 0)  # GCRYCTL_INITIALIZATION_FINISHED
        self.library = library

    def crypt(self, mode: int, key: bytes, iv: bytes, data: bytes, *, decrypt: bool = False) -> bytes:
        handle = ctypes.c_void_p()
        out = ctypes.create_string_buffer(len(data))
        library = self.library
        try:
            for step, error in (
                ("open", library.gcry_cipher_open(ctypes.byref(handle), SM4, mode, 0)),
                ("key", library.gcry_cipher_setkey(handle, key, ctypes.c_size_t(len(key)))),
                (
                    "iv",
                    (library.gcry_cipher_setctr if mode == MODE_CTR else library.gcry_cipher_setiv)(
                        handle, iv, ctypes.c_size_t(len(iv))
                    ),
                ),
                (
                    "crypt",
                    (library.gcry_cipher_decrypt if decrypt else library.gcry_cipher_encrypt)(
                        handle, out, ctypes.c_size_t(len(data)), data, ctypes.c_size_t(len(data))
                    ),
                ),
            ):
                if error:
                    raise OSError(f"libgcrypt: {step} failed with {error}")
        finally:
            library.gcry_cipher_close(handle)
        return out.raw


@pytest.fixture(scope="module")
def gcrypt() -> Gcrypt:
    name = ctypes.util.find_library("gcrypt")
    if name is None:
        pytest.skip("libgcrypt is not installed")
    return Gcrypt(name)


@pytest.mark.parametrize("length", [16, 17, 31, 32, 33, 100, 511, 4096, 4099, 65536])
def test_xts_ieee_equals_libgcrypt(gcrypt, sm4_kernel, length):
    for unit in (0, 1, 0x123456789ABCDEF):
        data, key = os.urandom(length), os.urandom(32)
        wanted = gcrypt.crypt(MODE_XTS, key, unit.to_bytes(16, "little"), data)
        cipher = SM4XTS(key, standard="ieee", unit_size=65536)
        assert cipher.encrypt(data, unit) == wanted
        assert cipher.decrypt(wanted, unit) == data


def test_whole_pages_equal_libgcrypt(gcrypt, sm4_kernel):
    data = os.urandom(4096 * 33)
    wanted = b"".join(
        gcrypt.crypt(MODE_XTS, KEY, (7 + i).to_bytes(16, "little"), data[4096 * i : 4096 * i + 4096]) for i in range(33)
    )
    assert SM4XTS(KEY, standard="ieee").encrypt(data, 7) == wanted


def test_ctr_equals_libgcrypt(gcrypt, sm4_kernel):
    data, counter = os.urandom(100_001), b"\xff" * 15 + b"\xf0"
    assert SM4CTR(KEY[:16], counter).encrypt(data) == gcrypt.crypt(MODE_CTR, KEY[:16], counter, data)


def openssl(*arguments: str, data: bytes) -> bytes:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    return subprocess.run([program, *arguments], input=data, capture_output=True, check=True, timeout=60).stdout


def test_openssl_program_sm3(sm3_kernel):
    data = os.urandom(123_457)
    assert openssl("dgst", "-sm3", "-binary", data=data) == csvfast.sm3(data).digest()


def test_openssl_program_ctr(sm4_kernel):
    data, counter = os.urandom(70_003), os.urandom(16)
    wanted = openssl("enc", "-sm4-ctr", "-K", KEY[:16].hex(), "-iv", counter.hex(), data=data)
    assert SM4CTR(KEY[:16], counter).encrypt(data) == wanted


def test_gmssl():
    """PyPI's gmssl: SM3, and SM4 one block at a time (ECB is all it has that we can compare with)."""
    from gmssl import sm3, sm4

    data = os.urandom(1000)
    assert sm3.sm3_hash(list(data)) == csvfast.sm3(data).hexdigest()
    cipher = sm4.CryptSM4()
    cipher.set_key(KEY[:16], sm4.SM4_ENCRYPT)
    blocks = [os.urandom(16) for _ in range(20)]
    for block in blocks:
        # CTR over a zero block is the cipher itself.
        assert SM4CTR(KEY[:16], block).encrypt(bytes(16)) == cipher.crypt_ecb(block)[:16]


def test_gmalg():
    """gmalg: SM3 and SM4 in pure Python by other people."""
    import gmalg

    data = os.urandom(500)
    state = gmalg.SM3()
    state.update(data)
    assert state.value() == csvfast.sm3(data).digest()
    block = os.urandom(16)
    assert SM4CTR(KEY[:16], block).encrypt(bytes(16)) == gmalg.SM4(KEY[:16]).encrypt(block)
