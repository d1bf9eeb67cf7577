"""Keys and Secrets show nothing, leave by no side door, and are gone when wiped."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import sys
import threading
import traceback

import numpy as np
import pytest

from csvfast.crypto import Secret, SM2PrivateKey, SM2PublicKey, load_private_key, sm2_verify_many
from csvfast.errors import (
    AddressError,
    ArgumentError,
    ClosedError,
    CsvfastError,
    KeyExposureError,
    KeyRangeError,
    LengthError,
    NonContiguousBufferError,
)

D = bytes.fromhex("3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8")


def shown(secret: bytes, text: str) -> bool:
    """Whether any four bytes of the secret stand in the text, as hex, as escapes or as a number."""
    lower = text.lower()
    pieces = [secret[i : i + 4] for i in range(len(secret) - 3)]
    return (
        any(piece.hex() in lower or repr(piece)[2:-1] in text for piece in pieces)
        or str(int.from_bytes(secret, "big")) in text
    )


def test_the_search_itself_finds_secrets():
    assert shown(D, D.hex().upper())
    assert shown(D, repr(D))
    assert shown(D, f"d = {int.from_bytes(D, 'big')}")
    assert not shown(D, "<Secret of 32 bytes>")


@pytest.mark.parametrize("make", [Secret, SM2PrivateKey])
def test_nothing_is_shown(make):
    thing = make(D)
    for text in (repr(thing), str(thing), f"{thing}", f"{thing!r}", "%s" % thing, ascii(thing), repr([thing])):  # noqa: UP031
        assert not shown(D, text)
    with pytest.raises(TypeError) as caught:
        format(thing, ">40")
    assert not shown(D, str(caught.value))


@pytest.mark.parametrize("make", [Secret, SM2PrivateKey])
def test_no_copies(make):
    thing = make(D)
    for act in (pickle.dumps, copy.copy, copy.deepcopy, lambda it: pickle.dumps(it, 0), lambda it: it.__reduce_ex__(4)):
        with pytest.raises(KeyExposureError, match="cannot be pickled or copied"):
            act(thing)
    assert not hasattr(thing, "__dict__")


def test_public_keys_are_for_everyone():
    key = SM2PrivateKey(D).public_key
    for again in (pickle.loads(pickle.dumps(key)), copy.copy(key), copy.deepcopy(key)):
        assert again == key
        assert hash(again) == hash(key)
    assert key != SM2PrivateKey.generate().public_key
    assert (key == key.point) is False
    assert {key: 1}[SM2PublicKey(key.point)] == 1
    assert key.point[:8].hex() in repr(key)
    assert SM2PrivateKey(D).public_key == key
    with pytest.raises(AttributeError):
        key.point = bytes(64)


def test_the_public_key_is_one_object():
    key = SM2PrivateKey(D)
    assert key.public_key is key.public_key


def test_error_texts_and_tracebacks_show_nothing():
    secret = Secret(D)
    key = SM2PrivateKey(D)
    acts = [
        lambda: SM2PrivateKey(D + b"\1"),
        lambda: SM2PrivateKey(D[:31]),
        lambda: SM2PublicKey(D),
        lambda: SM2PublicKey(D + D),
        lambda: key.sign_digest(D[:31]),
        lambda: key.sign_digest(bytes(32), _nonce=D + b"\1"),
        lambda: key.decrypt(D * 5),
        lambda: secret.part(0, 33),
        lambda: key.public_key.verify(D + D, b""),
        lambda: load_private_key(D),
        lambda: load_private_key(b"\x30\x20" + D),
        lambda: load_private_key(b"-----BEGIN PRIVATE KEY-----\n" + D.hex().encode() + b"-----END PRIVATE KEY-----"),
        lambda: load_private_key(
            bytes.fromhex("303102010104") + b"\x20" + D + b"\xa0\x0a\x06\x08" + b"\x2a" * 8 + b"\0\0"
        ),
    ]
    for act in acts:
        with pytest.raises(CsvfastError) as caught:
            act()
        text = "".join(traceback.format_exception(caught.value, chain=True))
        # Source lines of this file and the arguments' names are all a traceback has.
        assert not shown(D, text)
        assert not shown(D.hex().encode(), str(caught.value))


class TestSecret:
    def test_is_a_buffer(self):
        secret = Secret(bytearray(D))
        assert len(secret) == 32
        assert bytes(secret) == D
        view = memoryview(secret)
        assert view.readonly
        assert view.nbytes == 32
        with pytest.raises(TypeError):
            view[0] = 1
        assert SM2PrivateKey(secret).public_key == SM2PrivateKey(D).public_key

    def test_is_its_own_copy(self):
        source = bytearray(D)
        secret = Secret(source)
        source[:] = bytes(32)
        assert secret.equals(D)

    def test_comparison(self):
        secret = Secret(D)
        assert secret.equals(Secret(D))
        assert secret == Secret(D)
        assert secret == D
        assert D == secret  # noqa: SIM300 - the other order asks bytes first
        assert secret != Secret(D[:31])
        assert not secret.equals(D[:31])
        assert not secret.equals(D + b"\0")
        assert not secret.equals(bytes(32))
        assert not secret.equals(b"")
        assert secret != "text"
        assert (secret == 5) is False
        for bit in range(256):
            other = bytearray(D)
            other[bit // 8] ^= 1 << bit % 8
            assert not secret.equals(other)
        with pytest.raises(TypeError):
            secret.equals("text")
        with pytest.raises(TypeError, match="unhashable"):
            hash(secret)

    def test_wipe(self):
        secret = Secret(D)
        view = memoryview(secret)
        secret.wipe()
        assert bytes(view) == bytes(32)
        secret.wipe()
        for act in (
            lambda: bytes(secret),
            lambda: memoryview(secret),
            lambda: secret.equals(D),
            lambda: secret == D,
            lambda: secret.part(0, 1),
            lambda: SM2PrivateKey(secret),
            lambda: Secret(secret),
            lambda: Secret.concatenate(b"a", secret),
        ):
            with pytest.raises(ClosedError, match="wiped"):
                act()
        assert repr(secret) == "<Secret, wiped>"
        assert len(secret) == 32

    def test_parts(self):
        secret = Secret(D)
        assert secret.part(0, 16).equals(D[:16])
        assert secret.part(16, 32).equals(D[16:])
        assert Secret.concatenate(secret.part(0, 1), D[1:31], bytearray(D[31:])).equals(D)
        for start, stop in ((0, 33), (5, 5), (6, 5), (32, 33)):
            with pytest.raises(AddressError):
                secret.part(start, stop)
        with pytest.raises(LengthError):
            secret.part(-1, 5)
        part = secret.part(0, 16)
        secret.wipe()
        assert part.equals(D[:16])

    def test_random(self):
        assert len({bytes(Secret.random(32)) for _ in range(20)}) == 20
        for length in (1, 255, 256, 257, 1000):
            drawn = bytes(Secret.random(length))
            assert len(drawn) == length
            if length > 100:
                assert any(drawn[-50:])
        for length in (0, -1):
            with pytest.raises(LengthError):
                Secret.random(length)

    def test_refused(self):
        with pytest.raises(LengthError, match="at least 1 byte"):
            Secret(b"")
        with pytest.raises(LengthError):
            Secret.concatenate()
        with pytest.raises(TypeError):
            Secret("text")
        with pytest.raises(TypeError):
            Secret(32)
        with pytest.raises(NonContiguousBufferError):
            Secret(memoryview(D)[::2])
        with pytest.raises(TypeError):
            type("Mine", (Secret,), {})
        secret = Secret(D)
        with pytest.raises(ArgumentError, match="already"):
            secret.__init__(bytes(32))
        assert secret.equals(D)


def test_keys_cannot_be_changed_or_half_made():
    key = SM2PrivateKey(D)
    with pytest.raises(ArgumentError, match="already"):
        key.__init__(b"\1" * 32)
    assert key.secret().equals(D)
    for kind in (SM2PrivateKey, SM2PublicKey):
        with pytest.raises(TypeError):
            type("Mine", (kind,), {})
    empty = SM2PrivateKey.__new__(SM2PrivateKey)
    for act in (
        lambda: empty.public_key,
        lambda: empty.secret(),
        lambda: empty.sign(b""),
        lambda: empty.sign_digest(bytes(32)),
        lambda: empty.decrypt(bytes(100)),
        lambda: empty.agree(key, key.public_key, key.public_key, 16, initiator=True),
        lambda: key.agree(empty, key.public_key, key.public_key, 16, initiator=True),
    ):
        with pytest.raises(ClosedError):
            act()
    assert repr(empty) == "<SM2PrivateKey of None>"
    assert repr(Secret.__new__(Secret)) == "<Secret, wiped>"
    Secret.__new__(Secret).wipe()
    with pytest.raises(ClosedError):
        bytes(Secret.__new__(Secret))
    with pytest.raises(TypeError):
        SM2PublicKey.__new__(SM2PublicKey)


def test_two_threads_cannot_make_one_key_twice():
    """The second key would be written over the first while somebody signs with it."""
    for _ in range(100):
        key = SM2PrivateKey.__new__(SM2PrivateKey)
        start = threading.Barrier(2)
        outcomes = []

        def make(secret, key=key, start=start, outcomes=outcomes):
            start.wait()
            try:
                key.__init__(secret)
                outcomes.append(secret)
            except ArgumentError:
                pass

        threads = [threading.Thread(target=make, args=(bytes([number]) * 32,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (secret,) = outcomes
        assert key.secret().equals(secret)
        assert key.public_key == SM2PrivateKey(secret).public_key


def test_a_secret_wiped_while_others_use_it():
    """Whoever comes too late is refused or reads zeros, which are no key."""
    wanted = SM2PrivateKey(D).public_key
    for _ in range(50):
        secret = Secret(D)
        start = threading.Barrier(4)
        problems = []

        def use(secret=secret, start=start, problems=problems):
            start.wait()
            for _ in range(5):
                try:
                    assert SM2PrivateKey(secret).public_key == wanted
                except (ClosedError, KeyRangeError):
                    continue
                except BaseException as problem:
                    problems.append(problem)

        def wipe(secret=secret, start=start):
            start.wait()
            secret.wipe()

        threads = [threading.Thread(target=use) for _ in range(3)] + [threading.Thread(target=wipe)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []


def test_a_view_keeps_the_secret_alive():
    view = memoryview(Secret(D))
    gc.collect()
    assert bytes(view) == D
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_nothing_holds_a_buffer_after_a_refusal():
    """A bytearray with a view on it cannot grow: a buffer that was not given back on an error path shows here."""
    key = SM2PrivateKey(D)
    public = key.public_key
    odd, signature, digest = bytearray(100), bytearray(64), bytearray(32)
    strided = memoryview(bytes(100))[::2]
    calls = [
        lambda: public.verify(signature, odd),
        lambda: public.verify(odd, odd),
        lambda: public.verify(signature, strided),
        lambda: public.verify(signature, odd, user_id=strided),
        lambda: public.verify(signature, odd, user_id=bytearray(9000)),
        lambda: public.verify_digest(signature, odd),
        lambda: public.encrypt(odd, _nonce=digest),
        lambda: public.encrypt(odd, _nonce=odd),
        lambda: public.encrypt(bytearray()),
        lambda: key.decrypt(odd),
        lambda: key.decrypt(signature),
        lambda: key.decrypt_secret(odd),
        lambda: key.sign(odd, user_id=strided),
        lambda: key.sign_digest(odd),
        lambda: key.sign_digest(digest, _nonce=digest),
        lambda: SM2PublicKey(odd),
        lambda: SM2PublicKey(signature),
        lambda: SM2PrivateKey(odd),
        lambda: SM2PrivateKey(digest),
        lambda: sm2_verify_many([public] * 2, [signature] * 2, [digest, odd]),
        lambda: sm2_verify_many([public, odd], [signature] * 2, [digest] * 2),
        lambda: sm2_verify_many([public], signature, strided),
        lambda: Secret(strided),
        lambda: Secret(bytearray()),
        lambda: Secret(D).equals(strided),
        lambda: Secret.concatenate(odd, strided),
        lambda: Secret.concatenate(odd, 1),
        lambda: key.agree(key, public, public, 16, initiator=True, user_id=strided),
    ]
    for number, call in enumerate(calls):
        before = [sys.getrefcount(one) for one in (odd, signature, digest, strided, public, key)]
        for _ in range(3):
            with pytest.raises((CsvfastError, TypeError)):
                call()
        for one in (odd, signature, digest):
            one.append(1)
            one.pop()
        del one
        assert [sys.getrefcount(one) for one in (odd, signature, digest, strided, public, key)] == before, number


def test_wiped_memory():
    """The bytes are zero where they lay, not only behind a flag."""
    secret = Secret(D)
    address = int(np.frombuffer(secret, np.uint8).__array_interface__["data"][0])
    assert ctypes.string_at(address, 32) == D
    secret.wipe()
    assert ctypes.string_at(address, 32) == bytes(32)
