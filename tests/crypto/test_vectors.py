"""tests/vectors/*.json, which the C tests share, on every kernel through the Python interface."""

from __future__ import annotations

import pytest
from reference import xts

import csvfast
from csvfast.crypto import SM4CTR, SM4GCM, SM4XTS

PAGE = bytes(range(256)) * 16


def ramp(length: int) -> bytes:
    return bytes(i % 251 for i in range(length))


def raw(entry, *names):
    return [bytes.fromhex(entry[name]) for name in names]


class TestSm3:
    def test_digests(self, vectors, sm3_kernel):
        assert len(vectors("sm3")["digests"]) >= 3
        for entry in vectors("sm3")["digests"]:
            assert csvfast.sm3(bytes.fromhex(entry["message"])).hexdigest() == entry["digest"]

    def test_million(self, vectors, sm3_kernel):
        assert csvfast.sm3(b"a" * 1_000_000).hexdigest() == vectors("sm3")["million_a"]

    def test_ramp(self, vectors, sm3_kernel):
        assert len(vectors("sm3")["ramp"]) > 100
        for entry in vectors("sm3")["ramp"]:
            assert csvfast.sm3(ramp(entry["length"])).hexdigest() == entry["digest"], entry["length"]

    def test_ramp_in_lanes(self, vectors, sm3_many_kernel):
        entries = vectors("sm3")["ramp"]
        digests = csvfast.sm3_many(ramp(entry["length"]) for entry in entries)
        assert [digest.hex() for digest in digests] == [entry["digest"] for entry in entries]

    def test_hmac(self, vectors, sm3_kernel):
        assert len(vectors("sm3")["hmac"]) >= 1
        for entry in vectors("sm3")["hmac"]:
            key, message = raw(entry, "key", "message")
            assert csvfast.hmac_sm3(key, message).hexdigest() == entry["mac"]

    def test_kdf(self, vectors, sm3_kernel):
        assert len(vectors("sm3")["kdf"]) >= 1
        for entry in vectors("sm3")["kdf"]:
            secret, output = raw(entry, "secret", "output")
            assert csvfast.sm3_kdf(secret, len(output)) == output

    def test_blocks(self, vectors, sm3_many_kernel):
        assert len(vectors("sm3")["blocks_of_the_ramp"]) >= 1
        for entry in vectors("sm3")["blocks_of_the_ramp"]:
            size = entry["block_length"]
            found = csvfast.sm3_blocks(ramp(size * entry["count"]), size, prefix=bytes.fromhex(entry["prefix"]))
            assert found.hex() == "".join(entry["digests"])


class TestSm4:
    def test_block(self, vectors, sm4_kernel):
        """CTR over a zero block is the cipher itself."""
        once = [entry for entry in vectors("sm4")["block"] if entry["times"] == 1]
        assert once
        for entry in once:
            key, plaintext, ciphertext = raw(entry, "key", "plaintext", "ciphertext")
            assert SM4CTR(key, plaintext).encrypt(bytes(16)) == ciphertext

    def test_block_a_million_times(self, vectors):
        (entry,) = (entry for entry in vectors("sm4")["block"] if entry["times"] == 1_000_000)
        key, block, ciphertext = raw(entry, "key", "plaintext", "ciphertext")
        zero = bytes(16)
        for _ in range(entry["times"]):
            block = SM4CTR(key, block).encrypt(zero)
        assert block == ciphertext

    def test_ctr(self, vectors, sm4_kernel):
        assert vectors("sm4")["ctr"]
        for entry in vectors("sm4")["ctr"]:
            key, counter, plaintext, ciphertext = raw(entry, "key", "counter", "plaintext", "ciphertext")
            assert SM4CTR(key, counter).encrypt(plaintext) == ciphertext

    def test_gcm(self, vectors, sm4_kernel, ghash_kernel):
        assert vectors("gcm")["gcm"]
        for entry in vectors("gcm")["gcm"]:
            key, nonce, aad, plaintext, ciphertext, tag = raw(
                entry, "key", "nonce", "aad", "plaintext", "ciphertext", "tag"
            )
            assert SM4GCM(key).encrypt(nonce, plaintext, aad) == (ciphertext, tag)
            assert SM4GCM(key).decrypt(nonce, ciphertext, tag, aad) == plaintext


class TestXts:
    def test_units(self, vectors, sm4_kernel):
        assert {entry["standard"] for entry in vectors("xts")["units"]} == {"gb", "ieee"}
        for entry in vectors("xts")["units"]:
            key, tweak, plaintext, ciphertext = raw(entry, "key", "tweak", "plaintext", "ciphertext")
            cipher = SM4XTS(key, standard=entry["standard"])
            assert cipher.encrypt_unit(plaintext, tweak) == ciphertext
            assert cipher.decrypt_unit(ciphertext, tweak) == plaintext
            unit = int.from_bytes(tweak, "little")
            if unit < 1 << 64:  # reachable by number too
                assert cipher.encrypt(plaintext, unit) == ciphertext

    def test_pages(self, vectors, sm4_kernel):
        assert len(vectors("xts")["pages"]) == 6
        for entry in vectors("xts")["pages"]:
            cipher = SM4XTS(bytes.fromhex(entry["key"]), standard=entry["standard"])
            encrypted = cipher.encrypt(PAGE, entry["unit"])
            assert encrypted[:32].hex() == entry["ciphertext_head"]
            assert csvfast.sm3(encrypted).hexdigest() == entry["ciphertext_sm3"]
            assert cipher.decrypt(encrypted, entry["unit"]) == PAGE

    @pytest.mark.parametrize("standard", ["gb", "ieee"])
    def test_the_reference_itself(self, vectors, standard):
        """What the other tests compare with must know the published values too."""
        for entry in vectors("xts")["multiplication"]:
            assert xts.times_alpha(bytes.fromhex(entry["tweak"]), standard).hex() == entry[standard]
        for entry in vectors("xts")["units"]:
            if entry["standard"] == standard:
                key, tweak, plaintext, ciphertext = raw(entry, "key", "tweak", "plaintext", "ciphertext")
                assert xts.crypt_unit(key, tweak, plaintext, standard) == ciphertext
                assert xts.crypt_unit(key, tweak, ciphertext, standard, decrypt=True) == plaintext
