"""SM2 both ways with implementations nobody here wrote: gmssl and gmalg (the openssl program: tests/interop)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from csvfast.crypto import DEFAULT_USER_ID, SM2PrivateKey
from csvfast.errors import SignatureError


def fixed(rng: random.Random, bits: int) -> int:
    return rng.getrandbits(bits)


class Gmssl:
    """gmssl 3.2.2 with its traps closed: it strips every leading '0' and '4' of a public key that begins with 04, and its
    default order is C1 || C2 || C3. Its ciphertexts lack the leading 04. It checks neither C3 nor ranges."""

    def __init__(self, key: SM2PrivateKey) -> None:
        sm2: Any = pytest.importorskip("gmssl.sm2", reason="gmssl is not installed")
        self.state = sm2.CryptSM2(bytes(key.secret()).hex(), "", mode=1)
        self.state.public_key = key.public_key.point.hex()

    def sign_digest(self, digest: bytes, nonce: bytes) -> bytes:
        return bytes.fromhex(self.state.sign(digest, nonce.hex()))

    def sign(self, message: bytes) -> bytes:
        return bytes.fromhex(self.state.sign_with_sm3(message))

    def verify(self, signature: bytes, message: bytes) -> bool:
        return bool(self.state.verify_with_sm3(signature.hex(), message))

    def encrypt(self, plaintext: bytes) -> bytes:
        return b"\x04" + bytes(self.state.encrypt(plaintext))

    def decrypt(self, ciphertext: bytes) -> bytes:
        assert ciphertext[0] == 4
        return bytes(self.state.decrypt(ciphertext[1:]))


class TestGmssl:
    @pytest.mark.parametrize("seed", range(4))
    def test_signatures(self, seed):
        rng = random.Random(seed)
        key = SM2PrivateKey(rng.randbytes(32))
        theirs, message = Gmssl(key), rng.randbytes(seed * 50)
        key.public_key.verify(theirs.sign(message), message)
        signature = key.sign(message)
        assert theirs.verify(signature, message)
        assert not theirs.verify(signature[:-1] + bytes([signature[-1] ^ 1]), message)
        with pytest.raises(SignatureError):
            key.public_key.verify(theirs.sign(message), message + b"\0")
        digest, nonce = rng.randbytes(32), rng.randbytes(32)
        assert key.sign_digest(digest, _nonce=nonce) == theirs.sign_digest(digest, nonce)

    @pytest.mark.parametrize("length", [1, 32, 33, 200])
    def test_encryption(self, length):
        rng = random.Random(length)
        key = SM2PrivateKey(rng.randbytes(32))
        theirs, plaintext = Gmssl(key), rng.randbytes(length)
        assert key.decrypt(theirs.encrypt(plaintext)) == plaintext
        assert theirs.decrypt(key.public_key.encrypt(plaintext)) == plaintext

    def test_a_key_that_begins_with_04(self):
        """The trap: such a key is one in 256, and gmssl by itself verifies nothing with it."""
        rng = random.Random(9)
        while (key := SM2PrivateKey(rng.randbytes(32))).public_key.point[0] != 4:
            pass
        assert Gmssl(key).verify(key.sign(b"message"), b"message")


def gmalg_sm2(key: SM2PrivateKey, user_id: bytes, rng: random.Random) -> Any:
    gmalg: Any = pytest.importorskip("gmalg", reason="gmalg is not installed")
    return gmalg.SM2(bytes(key.secret()), user_id, b"\x04" + key.public_key.point, rnd_fn=lambda bits: fixed(rng, bits))


class TestGmalg:
    @pytest.mark.parametrize("user_id", [DEFAULT_USER_ID, b"HYGON-SSD-CEK", b"\0" * 100])
    def test_signatures(self, user_id):
        rng = random.Random(len(user_id))
        key = SM2PrivateKey(rng.randbytes(32))
        theirs, message = gmalg_sm2(key, user_id, rng), rng.randbytes(100)
        key.public_key.verify(b"".join(theirs.sign(message)), message, user_id=user_id)
        signature = key.sign(message, user_id=user_id)
        assert theirs.verify(message, signature[:32], signature[32:])
        assert not theirs.verify(message, signature[32:], signature[:32])
        with pytest.raises(SignatureError):
            key.public_key.verify(b"".join(theirs.sign(message)), message, user_id=user_id + b"\0")

    @pytest.mark.parametrize("length", [1, 32, 33, 200])
    def test_encryption(self, length):
        rng = random.Random(length)
        key = SM2PrivateKey(rng.randbytes(32))
        theirs, plaintext = gmalg_sm2(key, b"", rng), rng.randbytes(length)
        assert key.decrypt(theirs.encrypt(plaintext)) == plaintext
        assert theirs.decrypt(key.public_key.encrypt(plaintext)) == plaintext

    @pytest.mark.parametrize("initiator", [True, False])
    @pytest.mark.parametrize("length", [16, 48, 100])
    def test_agreement(self, initiator, length):
        import gmalg

        rng = random.Random(length)
        ours, theirs_key = SM2PrivateKey(rng.randbytes(32)), SM2PrivateKey(rng.randbytes(32))
        ephemeral = SM2PrivateKey(rng.randbytes(32))
        theirs = gmalg_sm2(theirs_key, b"Bob", rng)
        point, t = theirs.begin_key_exchange()
        from csvfast.crypto import SM2PublicKey

        key, _, _ = ours.agree(
            ephemeral,
            theirs_key.public_key,
            SM2PublicKey(point),
            length,
            initiator=initiator,
            user_id=b"Alice",
            peer_user_id=b"Bob",
        )
        mode = gmalg.KEYXCHG_MODE.RESPONDER if initiator else gmalg.KEYXCHG_MODE.INITIATOR
        wanted = theirs.end_key_exchange(
            length, t, b"\x04" + ephemeral.public_key.point, b"Alice", b"\x04" + ours.public_key.point, mode
        )
        assert key.equals(wanted)
