"""SM2 computes what the standard says, on every kernel; what is not a signature, a point or a ciphertext is refused."""

from __future__ import annotations

import doctest
import gc
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import sm2 as model

from csvfast import _core
from csvfast.crypto import (
    DEFAULT_USER_ID,
    Secret,
    SM2PrivateKey,
    SM2PublicKey,
    ciphertext_from_der,
    ciphertext_to_der,
    hmac_sm3,
    signature_from_der,
    signature_to_der,
    sm2_verify_many,
    sm3,
    sm3_kdf,
)
from csvfast.errors import (
    AuthenticationError,
    FormatError,
    KeyLengthError,
    KeyRangeError,
    LengthError,
    OverlapError,
    PointError,
    SignatureError,
)

N = model.N
D = 0x3945208F7B2144B13F36E38AC6D39F95889393692860B51A42FB81EF4DF7C5B8


def private(d: int) -> SM2PrivateKey:
    return SM2PrivateKey(model.number(d))


@pytest.fixture(scope="module")
def sm2(vectors):
    return vectors("sm2")


def valid(key: SM2PublicKey, signature: bytes, digest: bytes) -> bool:
    try:
        key.verify_digest(signature, digest)
    except SignatureError:
        return False
    return True


class TestVectors:
    def test_signature(self, sm2, sm2_kernel):
        vector = {name: bytes.fromhex(value) for name, value in sm2["signature"].items()}
        key = SM2PrivateKey(vector["private_key"])
        public = key.public_key
        assert public.point == vector["public_key"]
        assert public.z() == public.z(vector["user_id"]) == vector["z"]
        assert public.digest(vector["message"]) == vector["digest"]
        assert key.sign_digest(vector["digest"], _nonce=vector["nonce"]) == vector["signature"]
        public.verify(vector["signature"], vector["message"])
        public.verify(vector["signature"], vector["message"], user_id=DEFAULT_USER_ID)
        public.verify_digest(vector["signature"], vector["digest"])

    def test_encryption(self, sm2, sm2_kernel):
        vector = {name: bytes.fromhex(value) for name, value in sm2["encryption"].items()}
        key = SM2PrivateKey(vector["private_key"])
        assert key.public_key.encrypt(vector["plaintext"], _nonce=vector["nonce"]) == vector["ciphertext"]
        assert key.decrypt(vector["ciphertext"]) == vector["plaintext"]
        assert key.decrypt_secret(vector["ciphertext"]).equals(vector["plaintext"])

    def test_agreement(self, sm2, sm2_kernel):
        a, b, ra, rb = (
            SM2PrivateKey(bytes.fromhex(sm2["agreement"][name]))
            for name in ("private_key_a", "private_key_b", "ephemeral_a", "ephemeral_b")
        )
        of_a = a.agree(ra, b.public_key, rb.public_key, 16, initiator=True)
        of_b = b.agree(rb, a.public_key, ra.public_key, 16, initiator=False)
        assert bytes(of_a[0]).hex() == sm2["agreement"]["key"]
        assert of_a[0] == of_b[0]
        assert of_a[1:] == of_b[1:]
        assert of_a[1] != of_a[2]
        # Every input changes the key.
        for other in (
            b.agree(rb, a.public_key, ra.public_key, 16, initiator=True),
            b.agree(rb, a.public_key, ra.public_key, 16, initiator=False, user_id=b"Bob"),
            b.agree(rb, a.public_key, ra.public_key, 16, initiator=False, peer_user_id=b"Alice"),
            b.agree(a, a.public_key, ra.public_key, 16, initiator=False),
            b.agree(rb, ra.public_key, ra.public_key, 16, initiator=False),
            b.agree(rb, a.public_key, a.public_key, 16, initiator=False),
        ):
            assert not other[0].equals(of_a[0])
            assert other[1:] != of_a[1:]

    def test_verification(self, sm2, sm2_kernel):
        for case in sm2["verification"]:
            key = SM2PublicKey(bytes.fromhex(case["public_key"]))
            signature, digest = bytes.fromhex(case["signature"]), bytes.fromhex(case["digest"])
            assert valid(key, signature, digest) == case["valid"], case["name"]
            key.prepare()
            assert key.prepared
            assert valid(key, signature, digest) == case["valid"], (case["name"], "prepared")

    @pytest.mark.parametrize("prepared", [False, True, None], ids=["plain", "prepared", "mixed"])
    def test_verification_of_many(self, sm2, sm2_many_kernel, prepared):
        cases = sm2["verification"]
        keys = [SM2PublicKey(bytes.fromhex(case["public_key"])) for case in cases]
        for key in keys if prepared else keys[::2] if prepared is None else []:
            key.prepare()
        signatures = [bytes.fromhex(case["signature"]) for case in cases]
        digests = [bytes.fromhex(case["digest"]) for case in cases]
        wanted = [case["valid"] for case in cases]
        for count in (1, 2, 7, 8, 9, 15, 16, 17, len(cases)):
            assert sm2_verify_many(keys[:count], signatures[:count], digests[:count]) == wanted[:count]
        assert sm2_verify_many(keys[::-1], signatures[::-1], digests[::-1]) == wanted[::-1]
        # Every case in every lane of a group of eight.
        for shift in range(1, 8):
            turned = [items[shift:] + items[:shift] for items in (keys, signatures, digests, wanted)]
            assert sm2_verify_many(*turned[:3]) == turned[3]

    def test_the_model_agrees_with_the_table(self, sm2):
        for case in sm2["verification"]:
            point = model.decode(bytes.fromhex(case["public_key"]))
            e, signature = int(case["digest"], 16), bytes.fromhex(case["signature"])
            assert model.verify(point, e, signature) == case["valid"], case["name"]

    def test_public_keys(self, sm2, sm2_kernel):
        for case in sm2["public_keys"]:
            encoded = bytes.fromhex(case["encoded"])
            if case["point"] is None:
                with pytest.raises(PointError):
                    SM2PublicKey(encoded)
            else:
                assert model.on_curve(model.decode(bytes.fromhex(case["point"])))
                assert SM2PublicKey(encoded).point.hex() == case["point"], case["name"]

    def test_signature_der(self, sm2):
        for case in sm2["signature_der"]:
            encoded = bytes.fromhex(case["der"])
            if case["signature"] is None:
                with pytest.raises(FormatError, match=r"^SM2 signature: .*found .*; expected ") as caught:
                    signature_from_der(encoded)
                assert caught.value.offset is not None, case["name"]
                assert 0 <= caught.value.offset <= len(encoded), case["name"]
            else:
                assert signature_from_der(encoded).hex() == case["signature"], case["name"]
                assert signature_to_der(bytes.fromhex(case["signature"])) == encoded, case["name"]


SCALARS = [
    *range(1, 41),
    *range(N - 41, N - 1),
    *(1 << i for i in range(6, 256, 11)),
    *((1 << i) - 1 for i in range(9, 257, 13)),
]


class TestAgainstTheModel:
    def test_public_keys_of_structured_scalars(self, sm2_kernel):
        point = None
        for d in range(1, 41):
            point = model.add(point, model.G)
            assert private(d).public_key.point == model.encode(point)
        for d in SCALARS[40:]:
            assert private(d % (N - 2) + 1).public_key.point == model.encode(model.multiply(d % (N - 2) + 1))

    def test_signatures_of_structured_scalars(self, sm2_kernel):
        rng = random.Random(2)
        for d in rng.sample(SCALARS, 24):
            d = d % (N - 2) + 1
            k, e = rng.choice(SCALARS) % N, rng.choice([0, 1, N, 2**256 - 1, rng.getrandbits(256)])
            key, digest = private(d), model.number(e)
            signature = key.sign_digest(digest, _nonce=model.number(k))
            assert signature == model.sign(d, e, k)
            key.public_key.verify_digest(signature, digest)
            key.public_key.prepare()
            key.public_key.verify_digest(signature, digest)

    def test_verification_equals_the_model(self, sm2_kernel):
        rng = random.Random(3)
        for _ in range(10):
            target = model.multiply(rng.choice(SCALARS))
            point, e, signature = model.forge(rng.choice(SCALARS), rng.choice(SCALARS), target)
            key = SM2PublicKey(model.encode(point))
            for prepared in (False, True):
                if prepared:
                    key.prepare()
                assert valid(key, signature, model.number(e)) == model.verify(point, e, signature)
                assert not valid(key, signature, model.number((e + 1) % N))

    @pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 1000])
    def test_encryption(self, sm2_kernel, length):
        rng = random.Random(length)
        plaintext, k = rng.randbytes(length), rng.randrange(1, N)
        key = private(D)
        ciphertext = key.public_key.encrypt(plaintext, _nonce=model.number(k))
        assert ciphertext == model.encrypt(model.multiply(D), plaintext, k)
        assert key.decrypt(ciphertext) == plaintext

    def test_z(self):
        key = private(D).public_key
        for user_id in (b"", b"1234567812345678", b"HYGON-SSD-HRK", bytes(range(256)) * 31, bytes(8191)):
            wanted = model.z(user_id, model.multiply(D))
            assert key.z(user_id) == key.z(bytearray(user_id)) == key.z(user_id) == wanted
            assert key.digest(b"text", user_id=user_id) == sm3(wanted + b"text").digest()
        with pytest.raises(LengthError, match="user_id has 8192 bytes; expected at most 8191"):
            key.z(bytes(8192))

    def test_kernels_agree_on_random_input(self):
        """Signatures made by one kernel are valid for every other, alone and among many."""
        from csvfast import force_kernel, info

        rng = random.Random(4)
        keys, signatures, digests, wanted = [], [], [], []
        for i in range(24):
            key = private(rng.randrange(1, N - 1))
            digest = rng.randbytes(32)
            force_kernel("sm2", info()["kernels"]["sm2"]["available"][i % len(info()["kernels"]["sm2"]["available"])])
            signature = bytearray(key.sign_digest(digest))
            if i % 5 == 3:
                signature[rng.randrange(64)] ^= 1 << rng.randrange(8)
            keys.append(key.public_key)
            signatures.append(bytes(signature))
            digests.append(digest)
            wanted.append(i % 5 != 3)
        try:
            for name in info()["kernels"]["sm2"]["available"]:
                force_kernel("sm2", name)
                assert list(map(valid, keys, signatures, digests)) == wanted
            for name in info()["kernels"]["sm2-many"]["available"]:
                force_kernel("sm2-many", name)
                assert sm2_verify_many(keys, signatures, digests) == wanted
        finally:
            force_kernel("sm2", None)
            force_kernel("sm2-many", None)

    def test_keys_and_tables_of_one_kernel_serve_every_other(self):
        """Keys hold no kernel: what one computed for later, another uses."""
        from csvfast import force_kernel, info

        names = info()["kernels"]["sm2"]["available"]
        many = info()["kernels"]["sm2-many"]["available"]
        digest = bytes(range(32))
        try:
            for maker in names:
                force_kernel("sm2", maker)
                key = private(D)
                public = SM2PublicKey(key.public_key.point)
                public.prepare()
                signature = key.sign_digest(digest)
                ciphertext = public.encrypt(b"secret")
                for user in names:
                    force_kernel("sm2", user)
                    assert valid(public, signature, digest)
                    assert not valid(public, signature, bytes(32))
                    assert valid(public, key.sign_digest(digest), digest)
                    assert key.decrypt(ciphertext) == b"secret"
                    for lanes in many:
                        force_kernel("sm2-many", lanes)
                        pair = [digest, bytes(32)] * 5
                        assert sm2_verify_many([public] * 10, [signature] * 10, pair) == [True, False] * 5
        finally:
            force_kernel("sm2", None)
            force_kernel("sm2-many", None)


class TestSigning:
    @given(message=st.binary(max_size=3000), user_id=st.binary(max_size=40), d=st.integers(1, N - 2))
    def test_round_trip(self, message, user_id, d):
        key = private(d)
        signature = key.sign(message, user_id=user_id)
        key.public_key.verify(signature, bytearray(message), user_id=bytearray(user_id))
        assert signature_from_der(signature_to_der(signature)) == signature
        with pytest.raises(SignatureError):
            key.public_key.verify(signature, message + b"\0", user_id=user_id)
        with pytest.raises(SignatureError):
            key.public_key.verify(signature, message, user_id=user_id + b"\0")

    def test_every_flipped_bit_is_refused(self):
        key = private(D)
        signature = key.sign(b"message")
        for bit in range(512):
            altered = bytearray(signature)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(SignatureError):
                key.public_key.verify(altered, b"message")

    def test_two_signatures_of_one_digest_differ(self):
        key, digest = private(D), bytes(32)
        made = {key.sign_digest(digest) for _ in range(50)}
        assert len(made) == 50
        assert len({signature[:32] for signature in made}) == 50
        assert all(valid(key.public_key, signature, digest) for signature in made)

    def test_nonces_outside_their_range(self):
        key = private(D)
        for nonce in (0, N, N + 1, 2**256 - 1):
            with pytest.raises(KeyRangeError, match="_nonce"):
                key.sign_digest(bytes(32), _nonce=model.number(nonce))
            with pytest.raises(KeyRangeError):
                key.public_key.encrypt(b"m", _nonce=model.number(nonce))

    def test_lengths(self):
        key = private(D)
        signature, digest = key.sign(b""), bytes(32)
        for length in (0, 63, 65, 72):
            with pytest.raises(LengthError, match=f"signature has {length} bytes; expected 64"):
                key.public_key.verify(bytes(length), b"")
            with pytest.raises(LengthError, match=f"signature has {length} bytes; expected 64"):
                key.public_key.verify_digest(bytes(length), digest)
            with pytest.raises(LengthError, match=f"signature has {length} bytes; expected 64"):
                signature_to_der(bytes(length))
        for length in (0, 31, 33):
            with pytest.raises(LengthError, match=f"digest has {length} bytes; expected 32"):
                key.public_key.verify_digest(signature, bytes(length))
            with pytest.raises(LengthError, match=f"digest has {length} bytes; expected 32"):
                key.sign_digest(bytes(length))
            with pytest.raises(LengthError, match=f"_nonce has {length} bytes; expected 32"):
                key.sign_digest(digest, _nonce=bytes(length))
        with pytest.raises(LengthError, match="user_id"):
            key.sign(b"", user_id=bytes(8192))
        with pytest.raises(LengthError, match="user_id"):
            key.public_key.verify(signature, b"", user_id=bytes(8192))


class TestKeyRange:
    @pytest.mark.parametrize("d", [0, N - 1, N, N + 1, 2**256 - 1])
    def test_refused(self, sm2_kernel, d):
        with pytest.raises(KeyRangeError):
            private(d)

    @pytest.mark.parametrize("d", [1, 2, N - 2, N - 3])
    def test_accepted(self, sm2_kernel, d):
        key = private(d)
        assert key.public_key.point == model.encode(model.multiply(d))
        assert key.secret().equals(model.number(d))
        key.public_key.verify(key.sign(b"edge"), b"edge")

    @pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
    def test_length(self, length):
        with pytest.raises(KeyLengthError, match=f"SM2 private key has {length} bytes; expected 32"):
            SM2PrivateKey(b"\1" * length)
        if length not in (33, 64):
            with pytest.raises(LengthError, match=f"an SM2 public key has {length} bytes"):
                SM2PublicKey(b"\4" * length)

    def test_generated_keys_differ(self):
        keys = {SM2PrivateKey.generate().public_key for _ in range(50)}
        assert len(keys) == 50
        assert all(model.on_curve(model.decode(key.point)) for key in keys)


class TestVerifyMany:
    def setup_method(self):
        rng = random.Random(5)
        self.private = [private(rng.randrange(1, N - 1)) for _ in range(5)]
        self.keys = [self.private[i % 5].public_key for i in range(23)]
        self.digests = [rng.randbytes(32) for _ in self.keys]
        self.signatures = [self.private[i % 5].sign_digest(self.digests[i]) for i in range(23)]

    def test_shapes(self, sm2_many_kernel):
        good = [True] * 23
        flat = b"".join(self.signatures), bytearray(b"".join(self.digests))
        assert sm2_verify_many(self.keys, self.signatures, self.digests) == good
        assert sm2_verify_many(tuple(self.keys), *flat) == good
        assert sm2_verify_many(self.keys, list(map(bytearray, self.signatures)), memoryview(flat[1])) == good
        assert sm2_verify_many([], [], []) == sm2_verify_many([], b"", b"") == []

    def test_a_bad_one_spoils_no_other(self, sm2_many_kernel):
        for bad in range(23):
            signatures = list(self.signatures)
            signatures[bad] = bytes(64)
            assert sm2_verify_many(self.keys, signatures, self.digests) == [i != bad for i in range(23)]
        digests = [bytes(32)] * 23
        assert sm2_verify_many(self.keys, self.signatures, digests) == [False] * 23

    def test_signatures_are_held_to_their_own_key(self, sm2_many_kernel):
        turned = self.keys[1:] + self.keys[:1]
        for key in self.private[:3]:
            key.public_key.prepare()
        assert not any(sm2_verify_many(turned, self.signatures, self.digests))

    def test_large(self, sm2_many_kernel):
        count = 300
        keys = [self.keys[i % 23] for i in range(count)]
        signatures = [self.signatures[i % 23] if i % 7 else self.signatures[(i + 1) % 23] for i in range(count)]
        digests = [self.digests[i % 23] for i in range(count)]
        assert sm2_verify_many(keys, signatures, digests) == [i % 7 != 0 for i in range(count)]

    def test_nothing(self):
        assert sm2_verify_many([], [], []) == sm2_verify_many((), b"", b"") == []
        with pytest.raises(LengthError, match="signatures has 1 bytes; expected 0"):
            sm2_verify_many([], b"a", b"")
        with pytest.raises(LengthError, match="there are 1 digests for 0 keys"):
            sm2_verify_many([], [], [bytes(32)])

    def test_more_than_one_piece(self, sm2_many_kernel):
        """The binding looks at the signals every 2048 signatures."""
        for key in self.keys:
            key.prepare()
        count = 2048 + 2048 + 5
        good = [self.signatures[0], self.signatures[1]]
        wrong = {0, 2047, 2048, 4095, 4096, count - 1}
        signatures = [good[(index + (index in wrong)) % 2] for index in range(count)]
        keys = [self.keys[index % 2] for index in range(count)]
        digests = [self.digests[index % 2] for index in range(count)]
        found = sm2_verify_many(keys, signatures, digests)
        assert {index for index in range(count) if not found[index]} == wrong

    def test_a_signal_ends_a_long_call(self):
        key = private(D)

        def stop(*_):
            raise KeyboardInterrupt

        count = 60_000
        arguments = [key.public_key] * count, key.sign_digest(bytes(32)) * count, bytes(32 * count)
        usual = signal.signal(signal.SIGALRM, stop)
        try:
            begin = time.thread_time()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                sm2_verify_many(*arguments)
            stopped = time.thread_time() - begin
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, usual)
        begin = time.thread_time()
        sm2_verify_many(*(part[: len(part) // 10] for part in arguments))
        assert stopped < 5 * (time.thread_time() - begin)  # all of them would take ten times as long

    def test_lists_that_change_meanwhile(self):
        keys = [SM2PublicKey(key.point) for key in self.keys[:5]]

        class Hostile(list):
            def __iter__(self):
                keys.clear()
                gc.collect()
                return super().__iter__()

        assert sm2_verify_many(keys, Hostile(self.signatures[:5]), Hostile(self.digests[:5])) == [True] * 5
        assert keys == []

    def test_refused(self):
        keys, signatures, digests = self.keys[:3], self.signatures[:3], self.digests[:3]
        with pytest.raises(LengthError, match="there are 2 signatures for 3 keys"):
            sm2_verify_many(keys, signatures[:2], digests)
        with pytest.raises(LengthError, match="there are 4 digests for 3 keys"):
            sm2_verify_many(keys, signatures, self.digests[:4])
        with pytest.raises(LengthError, match="signatures has 191 bytes; expected 192"):
            sm2_verify_many(keys, bytes(191), digests)
        with pytest.raises(LengthError, match="signature 1 has 63 bytes; expected 64"):
            sm2_verify_many(keys, [bytes(64), bytes(63), bytes(64)], digests)
        with pytest.raises(LengthError, match="digest 2 has 0 bytes; expected 32"):
            sm2_verify_many(keys, signatures, [*digests[:2], b""])
        with pytest.raises(TypeError, match="key 1 must be an SM2PublicKey, not bytes"):
            sm2_verify_many([keys[0], keys[1].point, keys[2]], signatures, digests)
        with pytest.raises(TypeError, match="digest 0 must be a bytes-like object, not str"):
            sm2_verify_many(keys, signatures, ["a" * 32] * 3)
        with pytest.raises(TypeError):
            sm2_verify_many(keys, 7, digests)


class TestEncryption:
    @given(plaintext=st.binary(min_size=1, max_size=500))
    def test_round_trip(self, plaintext):
        key = private(D)
        ciphertext = key.public_key.encrypt(plaintext)
        assert len(ciphertext) == len(plaintext) + 97
        assert key.decrypt(ciphertext) == plaintext
        assert key.decrypt_secret(bytearray(ciphertext)).equals(plaintext)
        assert ciphertext_from_der(ciphertext_to_der(ciphertext)) == ciphertext

    def test_every_flipped_bit_is_refused(self):
        key = private(D)
        ciphertext = key.public_key.encrypt(b"secret")
        for bit in range(8 * len(ciphertext)):
            altered = bytearray(ciphertext)
            altered[bit // 8] ^= 1 << bit % 8
            wanted = PointError if bit < 8 * 65 else AuthenticationError
            with pytest.raises(wanted):
                key.decrypt(altered)
            with pytest.raises(wanted):
                key.decrypt_secret(altered)

    def test_points_in_other_encodings_are_refused(self):
        """C1 is 04 || x || y here and nowhere else: another byte in front is another ciphertext."""
        key = private(D)
        ciphertext = key.public_key.encrypt(b"secret")
        for prefix in (0, 2, 3, 5, 6, 7):
            with pytest.raises(PointError):
                key.decrypt(bytes([prefix]) + ciphertext[1:])
        for point in (bytes(64), b"\xff" * 64, model.number(model.P) + ciphertext[33:65]):
            with pytest.raises(PointError):
                key.decrypt(b"\4" + point + ciphertext[65:])

    def test_another_key_another_length(self):
        ciphertext = private(D).public_key.encrypt(b"secret")
        with pytest.raises(AuthenticationError):
            private(D + 1).decrypt(ciphertext)
        with pytest.raises(AuthenticationError):
            private(D).decrypt(ciphertext[:-1])
        with pytest.raises(AuthenticationError):
            private(D).decrypt(ciphertext + b"\0")

    def test_an_authentication_error_is_no_signature_error(self):
        with pytest.raises(AuthenticationError) as caught:
            private(D + 1).decrypt(private(D).public_key.encrypt(b"secret"))
        assert not isinstance(caught.value, SignatureError)

    def test_lengths(self):
        key = private(D)
        with pytest.raises(LengthError, match="plaintext has 0 bytes"):
            key.public_key.encrypt(b"")
        for length in (0, 1, 65, 96, 97):
            with pytest.raises(LengthError, match=f"ciphertext has {length} bytes"):
                key.decrypt(b"\4" * length)
            with pytest.raises(LengthError, match=f"ciphertext has {length} bytes"):
                ciphertext_to_der(b"\4" * length)
        with pytest.raises(FormatError, match="C1"):
            ciphertext_to_der(b"\3" * 98)

    def test_two_ciphertexts_differ(self):
        public = private(D).public_key
        assert len({public.encrypt(b"same")[:65] for _ in range(20)}) == 20


class TestAgreement:
    @given(length=st.integers(1, 300), seed=st.integers(0, 2**32))
    def test_both_sides(self, length, seed):
        rng = random.Random(seed)
        a, b, ra, rb = (private(rng.randrange(1, N - 1)) for _ in range(4))
        of_a = a.agree(ra, b.public_key, rb.public_key, length, initiator=True, user_id=b"A", peer_user_id=b"B")
        of_b = b.agree(rb, a.public_key, ra.public_key, length, initiator=False, user_id=b"B", peer_user_id=b"A")
        assert len(of_a[0]) == length
        assert of_a == of_b

    def test_shared_point_at_infinity(self):
        """A peer who chooses P = -x R makes the shared point infinity whatever we hold."""
        rng = random.Random(6)
        ephemeral = model.multiply(rng.randrange(1, N))
        assert ephemeral is not None
        x = (1 << 127) | ephemeral[0] & ((1 << 127) - 1)
        peer = model.negate(model.multiply(x, ephemeral))
        with pytest.raises(PointError, match="infinity"):
            private(D).agree(
                private(7), SM2PublicKey(model.encode(peer)), SM2PublicKey(model.encode(ephemeral)), 16, initiator=True
            )

    def test_refused(self):
        a, b = private(3), private(4)
        with pytest.raises(LengthError, match="length is 0"):
            a.agree(a, b.public_key, b.public_key, 0, initiator=True)
        with pytest.raises(LengthError, match="length is 4294967296"):
            a.agree(a, b.public_key, b.public_key, 1 << 32, initiator=True)
        with pytest.raises(LengthError, match="user_id"):
            a.agree(a, b.public_key, b.public_key, 16, initiator=True, peer_user_id=bytes(8192))
        for arguments in ((None, b.public_key, b.public_key), (a, b, b.public_key), (a, b.public_key, bytes(64))):
            with pytest.raises(TypeError):
                a.agree(*arguments, 16, initiator=True)


class TestThreads:
    def test_one_key_in_many_threads(self):
        """prepare(), verify(), sign() and z() of one pair of keys at once; the table appears while others verify."""
        problems: list[BaseException] = []
        for _ in range(5):
            key = SM2PrivateKey.generate()
            good = key.sign(b"message", user_id=b"id")
            start = threading.Barrier(6)

            def work(
                number: int, key: SM2PrivateKey = key, good: bytes = good, start: threading.Barrier = start
            ) -> None:
                try:
                    start.wait()
                    for turn in range(20):
                        if turn == number:
                            key.public_key.prepare()
                        key.public_key.verify(good, b"message", user_id=b"id")
                        assert not valid(key.public_key, good, bytes(32))
                        user_id = b"%d" % (number % 2)
                        made = key.sign(b"other", user_id=user_id)
                        assert (
                            sm2_verify_many(
                                [key.public_key] * 3, [made] * 3, [key.public_key.digest(b"other", user_id=user_id)] * 3
                            )
                            == [True] * 3
                        )
                except BaseException as problem:
                    problems.append(problem)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert problems == []

    def test_the_gil_is_free_meanwhile(self):
        """With a switch interval of a minute another thread gets a turn only where the GIL is given up."""
        key = private(D)
        count = 4000
        arguments = [key.public_key] * count, key.sign_digest(bytes(32)) * count, bytes(32 * count)
        turns = 0
        ready, done = threading.Event(), threading.Event()

        def watch() -> None:
            nonlocal turns
            ready.set()
            while not done.is_set():
                time.sleep(0.001)
                turns += 1

        thread = threading.Thread(target=watch)
        usual = sys.getswitchinterval()
        thread.start()
        ready.wait()
        try:
            sys.setswitchinterval(60)
            before = turns
            assert all(sm2_verify_many(*arguments))
            after = turns
        finally:
            sys.setswitchinterval(usual)
            done.set()
            thread.join()
        assert after - before >= 3


class TestKdf:
    def test_out(self):
        wanted = model.kdf(b"secret", 100)
        out = bytearray(100)
        assert sm3_kdf(b"secret", 100) == wanted
        assert sm3_kdf(Secret(b"secret"), 100, out=out) is out
        assert out == wanted
        with pytest.raises(LengthError, match="out has 100 bytes; expected 99"):
            sm3_kdf(b"secret", 99, out=out)
        view = memoryview(out)
        with pytest.raises(OverlapError):
            sm3_kdf(view[10:20], 16, out=view[19:35])
        assert out == wanted
        assert sm3_kdf(view[10:20], 16, out=view[20:36]) is not None
        assert out[20:36] == model.kdf(wanted[10:20], 16)

    def test_secrets_are_keys(self):
        assert hmac_sm3(Secret(b"key"), b"data").digest() == hmac_sm3(b"key", b"data").digest()


def test_the_examples_of_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "sm2.md"
    if not page.is_file():
        pytest.skip("the tests stand outside a source tree")
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried >= 20
    assert failed == 0


def test_default_user_id_is_the_default():
    key = private(D)
    assert key.public_key.z() == key.public_key.z(DEFAULT_USER_ID)
    assert key.public_key.digest(b"m") == key.public_key.digest(b"m", user_id=DEFAULT_USER_ID)
    key.public_key.verify(key.sign(b"m"), b"m", user_id=DEFAULT_USER_ID)
    key.public_key.verify(key.sign(b"m", user_id=DEFAULT_USER_ID), b"m")


def test_the_binding_offers_what_the_package_does():
    assert _core.SM2PrivateKey is SM2PrivateKey
    assert _core.sm2_verify_many is sm2_verify_many
