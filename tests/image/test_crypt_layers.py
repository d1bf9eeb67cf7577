"""Layers: the vector of ocicrypt's construction, an independent computation, properties of streams."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from image import layers
from image.layers import described, sealed

import csvfast
from csvfast.crypto import SM4CTR, Secret
from csvfast.errors import ImageError, IntegrityError
from csvfast.image import layer_cipher
from csvfast.image.layer_cipher import (
    BLOCK_BYTES,
    LayerCheck,
    LayerEncryption,
    LayerReader,
    check_layer,
    encrypt_layer,
    open_layer,
)
from csvfast.image.options import PrivateOptions, PublicOptions
from csvfast.image.suites import AES_256_CTR_HMAC_SHA256, SM4_128_CTR_HMAC_SM3, SUITES, Suite

BOTH = pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)


def opened(ciphertext: bytes, made: layer_cipher.EncryptedLayer) -> bytes:
    descriptor = described(ciphertext, made.public)
    check_layer(io.BytesIO(ciphertext), descriptor, made.private)
    with open_layer(io.BytesIO(ciphertext), descriptor, made.private) as reader:
        return reader.read()


# ---- Known answers


def test_the_vector() -> None:
    ciphertext, made = sealed(layers.PLAIN, key=layers.KEY, nonce=layers.NONCE)
    assert ciphertext == layers.SEALED
    assert made.public == layers.PUBLIC
    assert bytes(memoryview(made.private)) == layers.PRIVATE
    assert made.plain_digest == layers.DIGEST
    assert (made.size, made.digest) == (len(ciphertext), layers.digest_of(ciphertext))
    assert PublicOptions.parse(made.public, "layer").mac == layers.MAC


def test_the_vector_opens() -> None:
    descriptor = described(layers.SEALED, layers.PUBLIC)
    private = Secret(layers.PRIVATE)
    check_layer(io.BytesIO(layers.SEALED), descriptor, private)
    with open_layer(io.BytesIO(layers.SEALED), descriptor, private) as reader:
        assert reader.read() == layers.PLAIN
        assert reader.verified


def test_sm4_against_its_parts() -> None:
    data, key, nonce = bytes(range(256)) * 9, bytes(range(48)), bytes(range(100, 116))
    ciphertext, made = sealed(data, SM4_128_CTR_HMAC_SM3, key=key, nonce=nonce)
    assert ciphertext == SM4CTR(key[:16], nonce).encrypt(data)
    inner = csvfast.sm3(bytes(byte ^ 0x36 for byte in key[16:].ljust(64, b"\0")) + nonce + ciphertext).digest()
    outer = csvfast.sm3(bytes(byte ^ 0x5C for byte in key[16:].ljust(64, b"\0")) + inner).digest()
    assert json.loads(made.public) == {
        "cipher": "SM4_128_CTR_HMAC_SM3", "hmac": base64.b64encode(outer).decode(), "cipheroptions": {},
    }  # fmt: skip
    assert made.plain_digest == layers.digest_of(data)  # images name blobs by SHA-256, whatever encrypts them


def test_counters_carry_through_the_whole_block() -> None:
    data, nonce = bytes(70), b"\xff" * 15 + b"\xfe"
    for suite, key in ((AES_256_CTR_HMAC_SHA256, bytes(range(32))), (SM4_128_CTR_HMAC_SM3, bytes(range(48)))):
        ciphertext, _ = sealed(data, suite, key=key, nonce=nonce)
        algorithm: Any = algorithms.AES(key) if suite is AES_256_CTR_HMAC_SHA256 else algorithms.SM4(key[:16])
        blocks = nonce + b"\xff" * 16 + bytes(16) + bytes(15) + b"\x01" + bytes(15) + b"\x02"
        keystream = Cipher(algorithm, modes.ECB()).encryptor().update(blocks)
        assert ciphertext == keystream[:70]


@BOTH
def test_an_empty_layer(suite: Suite) -> None:
    ciphertext, made = sealed(b"", suite)
    assert (ciphertext, made.size) == (b"", 0)
    if suite is AES_256_CTR_HMAC_SHA256:
        key = base64.b64decode(json.loads(bytes(memoryview(made.private)))["symkey"])
        assert PublicOptions.parse(made.public, "layer").mac == hmac.digest(key, b"", "sha256")
    assert opened(ciphertext, made) == b""


# ---- Properties


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=3000), suite=st.sampled_from(list(SUITES.values())), block=st.integers(1, 700))
def test_round_trip(data: bytes, suite: Suite, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_cipher, "BLOCK_BYTES", block)
        ciphertext, made = sealed(data, suite)
        assert (len(ciphertext), made.digest) == (len(data), layers.digest_of(ciphertext))
        assert opened(ciphertext, made) == data


@BOTH
@pytest.mark.parametrize("size", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 77])
def test_sizes_around_blocks(suite: Suite, size: int) -> None:
    data = hashlib.shake_128(b"layer").digest(size)
    ciphertext, made = sealed(data, suite)
    assert ciphertext != data
    assert opened(ciphertext, made) == data


def test_every_layer_has_a_key_and_a_nonce_of_its_own() -> None:
    made = [PrivateOptions.parse(sealed(b"the same")[1].private, "layer") for _ in range(8)]
    assert len({bytes(memoryview(one.key)) for one in made}) == 8
    assert len({one.cipher_options["nonce"] for one in made}) == 8


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("together", [True, False])
@BOTH
def test_every_way_of_hashing_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, cpus: int, together: bool, suite: Suite
) -> None:
    data = hashlib.shake_128(b"layer").digest(3 * BLOCK_BYTES + 5)
    key = bytes(range(suite.key_bytes))
    expected, first = sealed(data, suite, key=key, nonce=layers.NONCE)
    monkeypatch.setattr(layer_cipher, "_cpus", lambda: cpus)
    if not together:
        monkeypatch.setattr(type(suite), "hashes", lambda _suite, _key, _nonce: None)
    ciphertext, made = sealed(data, suite, key=key, nonce=layers.NONCE)
    assert ciphertext == expected
    assert (made.digest, made.public, bytes(memoryview(made.private))) == (
        first.digest, first.public, bytes(memoryview(first.private))
    )  # fmt: skip
    assert opened(ciphertext, made) == data
    for other in (damaged(ciphertext, BLOCK_BYTES + 1), ciphertext[:-1]):
        with pytest.raises(IntegrityError, match="MAC"):
            check_layer(io.BytesIO(other), described(other, made.public), made.private)


class Dribble(io.RawIOBase):
    """Gives few bytes at a time, as a socket does."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__()
        self.data, self.step = memoryview(data), step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.step, len(self.data))
        buffer[:count] = self.data[:count]
        self.data = self.data[count:]
        return count


@pytest.mark.parametrize("step", [1, 7, 5000])
def test_readers_that_dribble(step: int) -> None:
    data = bytes(range(256)) * 40
    out = io.BytesIO()
    made = encrypt_layer(Dribble(data, step), out)
    descriptor = described(out.getvalue(), made.public)
    check_layer(Dribble(out.getvalue(), step), descriptor, made.private)
    with open_layer(Dribble(out.getvalue(), step), descriptor, made.private) as reader:
        taken = bytearray()
        small = bytearray(13)
        while count := reader.readinto(small):
            taken += small[:count]
    assert taken == data


def test_a_check_takes_pieces_of_any_size() -> None:
    data = bytes(range(256)) * 40
    ciphertext, made = sealed(data)
    for step in (1, 63, 64, 1000, len(ciphertext)):
        with LayerCheck(described(ciphertext, made.public), made.private) as check:
            for at in range(0, len(ciphertext), step):
                check.update(ciphertext[at : at + step])
            check.finish()


def test_encryption_compares_what_it_reads() -> None:
    data = b"layer" * 100
    expected = described(data)
    made = encrypt_layer(io.BytesIO(data), io.BytesIO(), expected=expected)
    assert made.plain_digest == expected.digest
    for other in (data[:-1], data + b"x", data[:-1] + b"x"):
        with pytest.raises(IntegrityError, match=expected.digest):
            encrypt_layer(io.BytesIO(other), io.BytesIO(), expected=expected)


def test_sha512_digests_are_kept() -> None:
    data = b"layer" * 100
    expected = layers.Described(f"sha512:{hashlib.sha512(data).hexdigest()}", len(data))
    out = io.BytesIO()
    made = encrypt_layer(io.BytesIO(data), out, expected=expected)  # type: ignore[arg-type]
    assert made.plain_digest == expected.digest
    assert opened(out.getvalue(), made) == data


def test_memory_is_bounded() -> None:
    import tracemalloc

    class Zeros(io.RawIOBase):
        left = 40 * BLOCK_BYTES

        def readinto(self, buffer: Any) -> int:
            count = min(len(buffer), self.left)
            self.left -= count
            return count

    class Sink:
        def write(self, data: memoryview) -> int:
            return len(data)

    encrypt_layer(Zeros(), Sink())
    tracemalloc.start()
    encrypt_layer(Zeros(), Sink())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * BLOCK_BYTES


# ---- What goes wrong


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@BOTH
@pytest.mark.parametrize("at", [0, 500, 999])
def test_one_bit_of_ciphertext(suite: Suite, at: int) -> None:
    ciphertext, made = sealed(bytes(1000), suite)
    other = damaged(ciphertext, at)
    with pytest.raises(IntegrityError, match="digest is"):
        check_layer(io.BytesIO(other), described(ciphertext, made.public), made.private)
    # Whoever writes the manifest, too, fails at the MAC.
    with pytest.raises(IntegrityError, match="MAC"):
        check_layer(io.BytesIO(other), described(other, made.public), made.private)
    # And, were the MAC ignored, at the layer's own digest, before its last block is handed out.
    with open_layer(io.BytesIO(other), described(other, made.public), made.private) as reader:
        for _ in range(2):
            with pytest.raises(IntegrityError, match="another digest"):
                reader.read()
        assert not reader.verified


@BOTH
def test_one_bit_of_the_mac(suite: Suite) -> None:
    ciphertext, made = sealed(bytes(1000), suite)
    options = json.loads(made.public)
    for at in (0, 31):
        options["hmac"] = base64.b64encode(damaged(base64.b64decode(json.loads(made.public)["hmac"]), at)).decode()
        with pytest.raises(IntegrityError, match="MAC"):
            check_layer(io.BytesIO(ciphertext), described(ciphertext, json.dumps(options).encode()), made.private)


def altered(made: layer_cipher.EncryptedLayer, **members: Any) -> Secret:
    return Secret(json.dumps(json.loads(bytes(memoryview(made.private))) | members).encode())


def test_another_nonce_or_digest() -> None:
    ciphertext, made = sealed(bytes(1000))
    descriptor = described(ciphertext, made.public)
    nonce = base64.b64encode(bytes(16)).decode()
    for private in (altered(made, cipheroptions={"nonce": nonce}), altered(made, digest="sha256:" + "0" * 64)):
        check_layer(io.BytesIO(ciphertext), descriptor, private)  # ocicrypt's MAC covers neither
        with open_layer(io.BytesIO(ciphertext), descriptor, private) as reader, pytest.raises(IntegrityError, match="digest"):
            reader.read()


def test_another_nonce_with_sm4() -> None:
    ciphertext, made = sealed(bytes(1000), SM4_128_CTR_HMAC_SM3)
    private = altered(made, cipheroptions={"nonce": base64.b64encode(bytes(16)).decode()})
    with pytest.raises(IntegrityError, match="MAC"):
        check_layer(io.BytesIO(ciphertext), described(ciphertext, made.public), private)


def test_the_public_nonce_comes_first() -> None:
    ciphertext, made = sealed(bytes(1000))
    public = json.dumps(json.loads(made.public) | {"cipheroptions": {"nonce": base64.b64encode(bytes(16)).decode()}})
    with (
        open_layer(io.BytesIO(ciphertext), described(ciphertext, public.encode()), made.private) as reader,
        pytest.raises(IntegrityError, match="digest"),
    ):
        reader.read()


@pytest.mark.parametrize("cut", [1, 400, 1000])
def test_a_truncated_layer(cut: int) -> None:
    ciphertext, made = sealed(bytes(1000))
    descriptor = described(ciphertext, made.public)
    with pytest.raises(IntegrityError, match=f"{1000 - cut} bytes; expected 1000"):
        check_layer(io.BytesIO(ciphertext[:-cut]), descriptor, made.private)
    short = io.BytesIO(ciphertext[:-cut])
    with open_layer(short, descriptor, made.private) as reader, pytest.raises(IntegrityError, match="ends early"):
        reader.read()


def test_a_layer_that_goes_on() -> None:
    ciphertext, made = sealed(bytes(1000))
    with pytest.raises(IntegrityError, match="more than 1000 bytes"):
        check_layer(io.BytesIO(ciphertext + b"x"), described(ciphertext, made.public), made.private)


def test_the_last_block_is_held_back() -> None:
    data = bytes(2 * BLOCK_BYTES + 10)
    ciphertext, made = sealed(data)
    with open_layer(io.BytesIO(damaged(ciphertext, 5)), described(ciphertext, made.public), made.private) as reader:
        assert len(reader.read(BLOCK_BYTES)) == BLOCK_BYTES
        assert len(reader.read(BLOCK_BYTES)) == BLOCK_BYTES
        with pytest.raises(IntegrityError):
            reader.read(1)


def test_a_reader_that_is_not_read_to_its_end_is_not_verified() -> None:
    data = bytes(2 * BLOCK_BYTES + 10)
    ciphertext, made = sealed(data)
    with open_layer(io.BytesIO(ciphertext), described(ciphertext, made.public), made.private) as reader:
        reader.read(BLOCK_BYTES + 5)
        assert not reader.verified
        reader.drain()
        assert reader.verified


def test_buffers_are_overwritten() -> None:
    ciphertext, made = sealed(b"plaintext" * 100)
    reader = open_layer(io.BytesIO(ciphertext), described(ciphertext, made.public), made.private)
    assert isinstance(reader, LayerReader)
    reader.read(10)
    buffers = reader._clear
    assert any(any(buffer) for buffer in buffers)
    reader.close()
    assert not any(any(buffer) for buffer in buffers)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(1)


def test_an_abandoned_encryption_ends_its_threads() -> None:
    import threading

    before = threading.active_count()
    layer = LayerEncryption(io.BytesIO(bytes(5 * BLOCK_BYTES)))
    blocks: Iterator[memoryview] = iter(layer)
    next(blocks)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# ---- Options


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"cipher": "AES_256_GCM"}, "cipher 'AES_256_GCM'; expected AES_256_CTR_HMAC_SHA256 or SM4"),
        ({"cipher": None}, "cipher None"),
        ({"cipher": ["AES_256_CTR_HMAC_SHA256"]}, "cipher"),
        ({"hmac": None}, "hmac is missing"),
        ({"hmac": ""}, "hmac of 0 bytes; expected 32"),
        ({"hmac": "AAAA"}, "hmac of 3 bytes"),
        ({"hmac": "!"}, "expected base64"),
        ({"hmac": [1, 2]}, "expected base64"),
        ({"cipheroptions": []}, "expected an object"),
        ({"cipheroptions": {"nonce": 5}}, "expected base64"),
    ],
)
def test_public_options_that_are_none(members: dict[str, Any], text: str) -> None:
    with pytest.raises(ImageError, match=text.replace("(", r"\(")):
        PublicOptions.parse(json.dumps(json.loads(layers.PUBLIC) | members).encode(), "layer")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"symkey": None}, "symkey is missing"),
        ({"symkey": ""}, "empty symkey"),
        ({"symkey": "AAA"}, "expected base64"),
        ({"digest": None}, "digest"),
        ({"digest": ""}, "digest"),
        ({"digest": "sha256:" + "0" * 63}, "digest"),
        ({"digest": "sha256:" + "A" * 64}, "digest"),
        ({"digest": "md5:" + "0" * 32}, "digest"),
        ({"cipheroptions": "x"}, "expected an object"),
    ],
)
def test_private_options_that_are_none(members: dict[str, Any], text: str) -> None:
    with pytest.raises(ImageError, match=text) as caught:
        PrivateOptions.parse(Secret(json.dumps(json.loads(layers.PRIVATE) | members).encode()), "layer")
    assert "AAECAw" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'"AAECAw"', b'{"symkey":"AAECAw","symkey":"AAECAw"}'])
def test_options_that_are_no_object(data: bytes) -> None:
    for parse in (PublicOptions.parse, lambda data, subject: PrivateOptions.parse(Secret(data or b" "), subject)):
        with pytest.raises(ImageError) as caught:
            parse(data, "layer")
        assert "AAECAw" not in str(caught.value)


def test_unknown_members_are_ignored() -> None:
    public = json.dumps(json.loads(layers.PUBLIC) | {"later": 1, "cipheroptions": None}).encode()
    private = json.dumps(json.loads(layers.PRIVATE) | {"later": {"x": []}}).encode()
    descriptor = described(layers.SEALED, public)
    check_layer(io.BytesIO(layers.SEALED), descriptor, Secret(private))


@pytest.mark.parametrize("length", [16, 31, 33, 48])
def test_a_key_of_another_length(length: int) -> None:
    private = json.loads(layers.PRIVATE) | {"symkey": base64.b64encode(bytes(length)).decode()}
    with pytest.raises(ImageError, match=f"symkey of {length} bytes; expected 32"):
        LayerCheck(described(layers.SEALED, layers.PUBLIC), Secret(json.dumps(private).encode()))


@pytest.mark.parametrize(("options", "text"), [({}, "no nonce"), ({"nonce": "AAAA"}, "nonce of 3 bytes"), (None, "no nonce")])
def test_a_nonce_that_is_none(options: Any, text: str) -> None:
    private = json.loads(layers.PRIVATE) | {"cipheroptions": options}
    with pytest.raises(ImageError, match=text):
        LayerCheck(described(layers.SEALED, layers.PUBLIC), Secret(json.dumps(private).encode()))


def test_nothing_shows_a_key() -> None:
    private = PrivateOptions.parse(Secret(layers.PRIVATE), "layer")
    assert "nonce" not in repr(private)
    assert "000102" not in repr(private)
    _, made = sealed(b"x", key=layers.KEY)
    assert "AAECAw" not in repr(made)
