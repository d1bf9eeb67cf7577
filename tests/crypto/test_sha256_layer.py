"""Digests and MAC of a layer in one pass, against OpenSSL's one at a time."""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfast._core import sha256_layer
from csvfast.errors import ArgumentError, BufferTypeError, KernelError, KeyExposureError, KeyLengthError, LengthError

needs_sha = pytest.mark.skipif(not sha256_layer.usable(), reason="this CPU has no SHA instructions")


def answers(layer: sha256_layer) -> tuple[bytes, bytes]:
    return layer.digest(), layer.mac()


def expected(key: bytes, sealed: bytes) -> tuple[bytes, bytes]:
    return hashlib.sha256(sealed).digest(), hmac.digest(key, sealed, "sha256")


@needs_sha
def test_known_answers() -> None:
    """FIPS 180-4's "abc", RFC 4231's first and second test case."""
    layer = sha256_layer(b"\x0b" * 20)
    layer.update(b"Hi There", b"abc-----"[:8])
    assert layer.mac().hex() == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    layer = sha256_layer(b"Jefe")
    layer.update(b"what do ya want for nothing?")
    assert layer.mac().hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    layer = sha256_layer(b"k")
    layer.update(b"abc", b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert layer.digest().hex() == layer.clear_digest().hex() == wanted


@needs_sha
@pytest.mark.parametrize("length", [*range(200), 1023, 1024, 4096, 65537])
def test_every_length(length: int) -> None:
    key, sealed, clear = os.urandom(1 + length % 64), os.urandom(length), os.urandom(length)
    alone, both = sha256_layer(key), sha256_layer(key)
    alone.update(sealed)
    both.update(sealed, clear)
    assert answers(alone) == answers(both) == expected(key, sealed)
    assert both.clear_digest() == hashlib.sha256(clear).digest()


@needs_sha
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.binary(max_size=300), max_size=12), with_clear=st.booleans())
def test_pieces(pieces: list[bytes], with_clear: bool) -> None:
    layer = sha256_layer(b"key")
    for index, piece in enumerate(pieces):
        layer.update(piece, bytes(reversed(piece)) if with_clear else None)
        whole = b"".join(pieces[: index + 1])
        assert answers(layer) == expected(b"key", whole)  # asking changes nothing
    if with_clear and pieces:
        assert layer.clear_digest() == hashlib.sha256(b"".join(bytes(reversed(one)) for one in pieces)).digest()


@needs_sha
def test_nothing_at_all() -> None:
    layer = sha256_layer(b"key")
    assert answers(layer) == expected(b"key", b"")
    assert layer.clear_digest() == hashlib.sha256(b"").digest()


@needs_sha
def test_misuse() -> None:
    for wrong in (b"", bytes(65)):
        with pytest.raises(KeyLengthError, match=f"{len(wrong)} bytes"):
            sha256_layer(wrong)
    layer = sha256_layer(b"key")
    with pytest.raises(LengthError, match="clear has 2 bytes; expected 3"):
        layer.update(b"abc", b"ab")
    layer.update(b"abc", b"def")
    with pytest.raises(ArgumentError, match="in all or in none"):
        layer.update(b"abc")
    for call in (lambda: layer.update("abc"), lambda: layer.update(b"abc", 5), lambda: sha256_layer("key")):  # type: ignore[arg-type]
        with pytest.raises(BufferTypeError):
            call()
    with pytest.raises(ArgumentError, match="already has"):
        layer.__init__(b"other")  # type: ignore[misc]
    with pytest.raises(KeyExposureError):
        layer.__reduce__()
    assert answers(layer) == expected(b"key", b"abc")
    alone = sha256_layer(b"key")
    alone.update(b"abc")
    with pytest.raises(ArgumentError, match="no plaintext"):
        alone.clear_digest()
    empty: Any = sha256_layer.__new__(sha256_layer)
    for call in (lambda: empty.update(b"x"), empty.digest):
        with pytest.raises(ArgumentError, match="no key"):
            call()


@needs_sha
def test_threads_take_turns() -> None:
    layer, block = sha256_layer(b"key"), bytes(range(256)) * 64
    threads = [threading.Thread(target=lambda: [layer.update(block) for _ in range(50)]) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert answers(layer) == expected(b"key", block * 200)


def test_without_the_instructions() -> None:
    program = (
        "from csvfast._core import sha256_layer\nfrom csvfast.errors import KernelError\n"
        "assert not sha256_layer.usable()\n"
        "try: sha256_layer(b'key')\nexcept KernelError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "CSVFAST_DISABLE": "sha"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused\n"
    assert issubclass(KernelError, ValueError)
