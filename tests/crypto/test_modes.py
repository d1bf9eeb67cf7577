"""SM4-CTR and SM4-GCM against `cryptography`'s OpenSSL, RFC 8998 and the plain-Python reference."""

from __future__ import annotations

import os

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from reference import sm4
from reference.buffers import READABLE, WRITABLE, content, together

from csvfast import errors, force_kernel, info
from csvfast.crypto import SM4CTR, SM4GCM

RFC_KEY = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
RFC_NONCE = bytes.fromhex("00001234567800000000ABCD")
RFC_AAD = bytes.fromhex("FEEDFACEDEADBEEFFEEDFACEDEADBEEFABADDAD2")
RFC_TEXT = b"".join(bytes([b]) * 8 for b in (0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF, 0xEE, 0xAA))
RFC_CIPHER = bytes.fromhex(
    "17F399F08C67D5EE19D0DC9969C4BB7D5FD46FD3756489069157B282BB200735D82710CA5C22F0CCFA7CBF93D496AC15A56834CBCF98C397"
    "B4024A2691233B8D"
)
RFC_TAG = bytes.fromhex("83DE3541E4C2B58177E065A9BF7B62EC")


def peer_ctr(key: bytes, counter: bytes, data: bytes) -> bytes:
    context = Cipher(algorithms.SM4(key), modes.CTR(counter)).encryptor()
    return context.update(data) + context.finalize()


class TestCtr:
    def test_specification_vector(self, sm4_kernel):
        """Appendix A.6: SM4-CTR(TEK, iv)."""
        table = bytes.fromhex(
            "42f5741edd71664d963eef4287ff173b30000000e5696873f084734992ec06879ce3da0b1b0000007365637265740000"
        )
        wanted = "d6e6e9e5eaab212d96213739fd700ae27f2ae8625752046eb7e1fc753c1d421a4126c66d8d1f3b33d77557e86d93e065"
        stream = SM4CTR(bytes(range(0x20, 0x30)), bytes(range(0x40, 0x50)))
        assert stream.encrypt(table).hex() == wanted

    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 255, 256, 4096, 65537])
    def test_equals_cryptography(self, sm4_kernel, length):
        key, counter, data = os.urandom(16), os.urandom(16), os.urandom(length)
        assert SM4CTR(key, counter).encrypt(data) == peer_ctr(key, counter, data)

    @pytest.mark.parametrize("back", [1, 2, 200])
    def test_counter_wraps(self, sm4_kernel, back):
        key, counter = bytes(16), (2**128 - back).to_bytes(16, "big")
        assert SM4CTR(key, counter).encrypt(bytes(16 * 300)) == sm4.ctr(key, counter, bytes(16 * 300))

    @given(pieces=st.lists(st.binary(max_size=200), max_size=12), key=st.binary(min_size=16, max_size=16))
    def test_pieces_equal_whole_on_every_kernel(self, pieces, key):
        wanted = peer_ctr(key, bytes(16), b"".join(pieces))
        for kernel in info()["kernels"]["sm4"]["available"]:
            force_kernel("sm4", kernel)
            try:
                stream = SM4CTR(key, bytes(16))
            finally:
                force_kernel("sm4", None)
            assert b"".join(map(stream.encrypt, pieces)) == wanted

    @pytest.mark.parametrize("kind", WRITABLE)
    def test_in_place(self, kind):
        data = os.urandom(4096)
        buffer = WRITABLE[kind](data)
        assert SM4CTR(bytes(16), bytes(16)).encrypt(buffer, buffer) is buffer
        assert content(buffer) == peer_ctr(bytes(16), bytes(16), data)
        SM4CTR(bytes(16), bytes(16)).decrypt(buffer, out=buffer)
        assert content(buffer) == data

    def test_threads_take_consecutive_pieces(self):
        """Whatever the order of the threads, each piece of key stream is handed out once."""
        stream, size = SM4CTR(bytes(16), bytes(16)), 4096
        pieces: list[bytes] = []
        together(4, lambda _: pieces.extend([stream.encrypt(bytes(size)) for _ in range(10)]))
        whole = peer_ctr(bytes(16), bytes(16), bytes(size * 40))
        assert sorted(pieces) == sorted(whole[i : i + size] for i in range(0, len(whole), size))

    def test_refused_call_uses_no_key_stream(self):
        stream = SM4CTR(bytes(16), bytes(16))
        both = bytearray(64)
        with pytest.raises(errors.OverlapError):
            stream.encrypt(memoryview(both)[:32], memoryview(both)[1:33])
        assert both == bytes(64)
        assert stream.encrypt(bytes(32)) == peer_ctr(bytes(16), bytes(16), bytes(32))


class TestGcm:
    def test_rfc_8998(self, sm4_kernel, ghash_kernel):
        cipher = SM4GCM(RFC_KEY)
        assert cipher.encrypt(RFC_NONCE, RFC_TEXT, RFC_AAD) == (RFC_CIPHER, RFC_TAG)
        assert cipher.decrypt(RFC_NONCE, RFC_CIPHER, RFC_TAG, RFC_AAD) == RFC_TEXT

    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 127, 128, 129, 4095, 70000])
    def test_equals_cryptography(self, sm4_kernel, ghash_kernel, length):
        key, nonce, data, aad = os.urandom(16), os.urandom(12), os.urandom(length), os.urandom(length % 97)
        context = Cipher(algorithms.SM4(key), modes.GCM(nonce)).encryptor()
        context.authenticate_additional_data(aad)
        wanted = context.update(data) + context.finalize()
        assert SM4GCM(key).encrypt(nonce, data, aad) == (wanted, context.tag)
        assert SM4GCM(key).decrypt(nonce, wanted, context.tag, aad) == data

    @given(
        nonce=st.binary(min_size=8, max_size=64),
        data=st.binary(max_size=300),
        aad=st.binary(max_size=100),
        key=st.binary(min_size=16, max_size=16),
    )
    def test_any_nonce_length_equals_cryptography(self, nonce, data, aad, key):
        context = Cipher(algorithms.SM4(key), modes.GCM(nonce)).encryptor()
        context.authenticate_additional_data(aad)
        wanted = context.update(data) + context.finalize()
        for ghash in info()["kernels"]["ghash"]["available"]:
            force_kernel("ghash", ghash)
            try:
                assert SM4GCM(key).encrypt(nonce, data, aad) == (wanted, context.tag)
            finally:
                force_kernel("ghash", None)

    def test_one_byte_nonce_goes_round(self):
        cipher = SM4GCM(RFC_KEY)
        encrypted, tag = cipher.encrypt(b"n", RFC_TEXT)
        assert cipher.decrypt(b"n", encrypted, tag) == RFC_TEXT

    @pytest.mark.parametrize("size", [4, 8, 12, 13, 14, 15, 16])
    def test_tag_lengths(self, size):
        cipher = SM4GCM(RFC_KEY)
        encrypted, tag = cipher.encrypt(RFC_NONCE, RFC_TEXT, RFC_AAD, tag_length=size)
        assert tag == RFC_TAG[:size]
        assert cipher.decrypt(RFC_NONCE, encrypted, tag, RFC_AAD) == RFC_TEXT

    def test_one_wrong_bit_anywhere_is_refused(self, ghash_kernel):
        cipher = SM4GCM(RFC_KEY)
        good = {"nonce": RFC_NONCE, "data": RFC_CIPHER, "tag": RFC_TAG, "aad": RFC_AAD}
        for field, value in good.items():
            for bit in range(0, 8 * len(value), 5):
                wrong = bytearray(value)
                wrong[bit // 8] ^= 1 << bit % 8
                out = bytearray(b"\xaa" * 64)
                with pytest.raises(errors.AuthenticationError) as caught:
                    cipher.decrypt(**(good | {field: bytes(wrong)}), out=out)
                assert out == bytes(64), "an output refused must be wiped"
                assert RFC_TEXT.hex() not in str(caught.value)

    def test_peer_refuses_what_we_refuse(self):
        encrypted, tag = SM4GCM(RFC_KEY).encrypt(RFC_NONCE, RFC_TEXT)
        context = Cipher(algorithms.SM4(RFC_KEY), modes.GCM(RFC_NONCE, bytes(16))).decryptor()
        context.update(encrypted)
        with pytest.raises(InvalidTag):
            context.finalize()
        with pytest.raises(errors.AuthenticationError):
            SM4GCM(RFC_KEY).decrypt(RFC_NONCE, encrypted, bytes(16))
        assert tag != bytes(16)

    @pytest.mark.parametrize("kind", WRITABLE)
    def test_in_place(self, kind):
        cipher, data = SM4GCM(RFC_KEY), os.urandom(4096)
        buffer = WRITABLE[kind](data)
        result, tag = cipher.encrypt(RFC_NONCE, buffer, b"", buffer)
        assert result is buffer
        assert (content(buffer), tag) == cipher.encrypt(RFC_NONCE, data)
        assert cipher.decrypt(RFC_NONCE, buffer, tag, out=buffer) is buffer
        assert content(buffer) == data

    @pytest.mark.parametrize("kind", READABLE)
    def test_input_buffers(self, kind):
        cipher, data = SM4GCM(RFC_KEY), os.urandom(64)
        make = READABLE[kind]
        key, nonce = READABLE[kind](RFC_KEY) if kind != "mmap" else RFC_KEY, make(data[:16])
        assert SM4GCM(key).encrypt(nonce, make(data), make(data)) == cipher.encrypt(content(nonce), data, data)

    def test_threads_share_one_object(self):
        cipher, data = SM4GCM(RFC_KEY), os.urandom(100_000)
        wanted = cipher.encrypt(RFC_NONCE, data)

        def work(_: int) -> None:
            for _ in range(10):
                assert cipher.encrypt(RFC_NONCE, data) == wanted

        together(4, work)
