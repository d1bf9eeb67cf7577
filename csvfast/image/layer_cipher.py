"""Layers, encrypted and decrypted as streams, in memory that does not grow with them.

    made = encrypt_layer(reader, writer)                 ciphertext to writer; digest, size and options come back

    check = LayerCheck(descriptor, private)              pass 1, e.g. while the blob is downloaded
    check.update(block) ...; check.finish()              size, digest and MAC of the whole ciphertext
    with open_layer(reader, descriptor, private) as it:  pass 2: the layer as it was compressed
        it.readinto(buffer)

Nothing is decrypted before the MAC of the whole ciphertext is known to be right; that is why there are two passes. The second
ends with the comparison of the layer's own digest, which also finds a nonce or a blob that changed after the first pass: the last
block is handed out only when that digest is right. What came before must not be made visible until then: `LayerReader.verified`.

A layer is hashed three times: its plaintext, its ciphertext, and with the key. Where the CPU has SHA instructions all three go in
one pass; elsewhere, and for SM3, each has a thread of its own when there is more than one CPU, a block behind the cipher.

Source: containers/ocicrypt blockcipher/blockcipher_aes_ctr.go, encryption.go. The order of checks is stricter than its.
Thread-safety: each object belongs to one thread at a time.
"""

from __future__ import annotations

import hmac
import io
import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

from csvfast.crypto import Secret
from csvfast.errors import IntegrityError
from csvfast.image.annotations import public_options_of, subject_of
from csvfast.image.descriptor import new_hash
from csvfast.image.options import LayerKey, PrivateOptions, PublicOptions
from csvfast.image.suites import AES_256_CTR_HMAC_SHA256, NONCE_BYTES

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from csvfast._core import BytesLike
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.suites import LayerHashes, Mac, Suite

__all__ = [
    "BLOCK_BYTES",
    "EncryptedLayer",
    "LayerCheck",
    "LayerEncryption",
    "LayerReader",
    "Reader",
    "Writer",
    "check_layer",
    "encrypt_layer",
    "open_layer",
]

BLOCK_BYTES: Final = 256 << 10
"""Bytes that are worked on at once: few enough that hashes find them in a cache. An object holds at most four such blocks."""

_THREAD_BYTES: Final = 128 << 10  # what a thread is worth waking for

_ZEROS: Final = bytes(64 << 10)

_Sink = Callable[[memoryview], Any]
_SHA256: Final = "sha256:"


class Reader(Protocol):
    """Where bytes come from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fills a part of the buffer. Out: bytes; 0 at the end."""


class Writer(Protocol):
    """Where bytes go to."""

    def write(self, data: memoryview, /) -> Any:
        """Takes all of it."""


class EncryptedLayer(NamedTuple):
    """What became of a layer.

    size, digest   of the ciphertext, "sha256:..."
    public         options in JSON, for the annotation
    private        options in JSON, to be wrapped for each recipient
    plain_digest   of the layer before encryption; `private` holds it, too
    """

    size: int
    digest: str
    public: bytes
    private: Secret
    plain_digest: str


class _Followers:
    """Hashes that run one block behind, each in a thread of its own; in the caller's where there is one CPU or little to do."""

    def __init__(self, *sinks: _Sink) -> None:
        self._sinks = sinks
        self._threads: list[ThreadPoolExecutor] = []
        self._pending: list[Future[Any]] = []

    def feed(self, data: memoryview) -> None:
        """Hands over the next bytes, which must stay as they are until wait() or the next feed() has returned."""
        self.wait()
        if len(data) < _THREAD_BYTES or _cpus() < 2:
            for sink in self._sinks:
                sink(data)
            return
        if not self._threads:
            from concurrent.futures import ThreadPoolExecutor  # slow to import, and of no use in a guest with one CPU

            self._threads = [ThreadPoolExecutor(1, "csvfast-layer") for _ in self._sinks]
        self._pending = [thread.submit(sink, data) for thread, sink in zip(self._threads, self._sinks, strict=True)]

    def wait(self) -> None:
        """Until everything that was fed has been taken."""
        pending, self._pending = self._pending, []
        for one in pending:
            one.result()

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        for thread in self._threads:
            thread.shutdown()
        self._threads = []


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill(reader: Reader, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = reader.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


def _wipe(buffer: bytearray) -> None:
    view = memoryview(buffer)
    for at in range(0, len(view), len(_ZEROS)):
        part = view[at : at + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


# ---- Encryption


class _SeparateHashes:
    """Three objects, each in a thread of its own."""

    def __init__(self, mac: Mac, clear: Any) -> None:
        self._mac, self._clear, self._sealed = mac, clear, new_hash(_SHA256)
        self._before = _Followers(clear.update)
        self._after = _Followers(mac.update, self._sealed.update)

    def before(self, clear: memoryview) -> None:
        """Plaintext, before it is encrypted. Both buffers must stay as they are until the next call of the same name."""
        self._before.feed(clear)

    def after(self, _clear: memoryview, sealed: memoryview) -> None:
        """Plaintext and what became of it."""
        self._after.feed(sealed)

    def wait(self) -> None:
        """Until everything has been hashed."""
        self._before.wait()
        self._after.wait()

    def close(self) -> None:
        """Ends the threads."""
        self._before.close()
        self._after.close()

    def mac(self) -> bytes:
        return self._mac.digest()

    def clear(self) -> str:
        return str(self._clear.hexdigest())

    def sealed(self) -> str:
        return self._sealed.hexdigest()


class _TogetherHashes:
    """One object for all three. Waking a thread for it would take as long as it would save."""

    def __init__(self, hashes: LayerHashes) -> None:
        self._hashes = hashes

    @classmethod
    def make(cls, suite: Suite, key: Secret, nonce: bytes, expected: Descriptor | None) -> _TogetherHashes | None:
        if (expected is not None and not expected.digest.startswith(_SHA256)) or (suite.slow_mac and _cpus() > 1):
            return None
        hashes = suite.hashes(key, nonce)
        return None if hashes is None else cls(hashes)

    def before(self, clear: memoryview) -> None:
        pass

    def after(self, clear: memoryview, sealed: memoryview) -> None:
        self._hashes.update(sealed, clear)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def mac(self) -> bytes:
        return self._hashes.mac()

    def clear(self) -> str:
        return self._hashes.clear_digest().hex()

    def sealed(self) -> str:
        return self._hashes.digest().hex()


class LayerEncryption:
    """Encrypts one layer under a new key and nonce. An iterator over blocks of ciphertext, and then a result.

    In: reader     the layer, as it is compressed
        suite      algorithms
        expected   what the layer must be: its size and digest are compared, and the digest goes into the private options.
                   None: whatever comes, with its SHA-256
    A block is valid until the next one is asked for. IntegrityError at the end: the layer is not `expected`. A context manager;
    whoever may stop before the end closes it, for there may be threads, and plaintext in buffers.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        suite: Suite = AES_256_CTR_HMAC_SHA256,
        expected: Descriptor | None = None,
        _key: Secret | None = None,
        _nonce: bytes | None = None,
    ) -> None:
        self._reader = reader
        self._suite = suite
        self._expected = expected
        self._key = Secret.random(suite.key_bytes) if _key is None else _key
        self._nonce = os.urandom(NONCE_BYTES) if _nonce is None else _nonce
        self._cipher = suite.cipher(self._key, self._nonce)
        self._hashes = _TogetherHashes.make(suite, self._key, self._nonce, expected) or _SeparateHashes(
            suite.mac(self._key, self._nonce), new_hash(_SHA256 if expected is None else expected.digest)
        )
        self._blocks = self._run()
        self._result: EncryptedLayer | None = None

    def __iter__(self) -> Iterator[memoryview]:
        return self._blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its threads and overwrites its plaintext. Idempotent; the result stays."""
        self._blocks.close()

    @property
    def private(self) -> Secret:
        """The private options, before anything is read: they can be wrapped first. Only with `expected`."""
        assert self._expected is not None, "the digest is not known before the end"
        return PrivateOptions(self._key, self._expected.digest, {"nonce": self._nonce}).encode()

    @property
    def result(self) -> EncryptedLayer:
        """What became of the layer, once all blocks have been taken."""
        assert self._result is not None, "the layer has not been read to its end"
        return self._result

    def _run(self) -> Generator[memoryview, None, None]:
        # Two buffers each: hashes read one while the other is written.
        clear, sealed = [bytearray(BLOCK_BYTES) for _ in range(2)], [bytearray(BLOCK_BYTES) for _ in range(2)]
        hashes = self._hashes
        size = 0
        try:
            turn = 0
            while True:
                source = memoryview(clear[turn])
                count = _fill(self._reader, source)
                if not count:
                    break
                size += count
                hashes.before(source[:count])
                target = memoryview(sealed[turn])[:count]
                self._cipher.process(source[:count], target)
                hashes.after(source[:count], target)
                yield target
                if count < BLOCK_BYTES:
                    break
                turn = 1 - turn
            hashes.wait()
            self._finish(size)
        finally:
            hashes.close()
            for buffer in clear:
                _wipe(buffer)

    def _finish(self, size: int) -> None:
        name = "sha256" if self._expected is None else self._expected.digest.partition(":")[0]
        digest = f"{name}:{self._hashes.clear()}"
        if self._expected is not None and (size, digest) != (self._expected.size, self._expected.digest):
            subject = subject_of(self._expected)
            raise IntegrityError(subject, f"{size} bytes with the digest {digest}; expected {self._expected.size} bytes")
        public = PublicOptions(self._suite, self._hashes.mac())
        private = PrivateOptions(self._key, digest, {"nonce": self._nonce})
        self._result = EncryptedLayer(size, _SHA256 + self._hashes.sealed(), public.encode(), private.encode(), digest)


def encrypt_layer(
    reader: Reader, writer: Writer, *, suite: Suite = AES_256_CTR_HMAC_SHA256, expected: Descriptor | None = None
) -> EncryptedLayer:
    """Encrypts a layer from reader to writer. As LayerEncryption."""
    with LayerEncryption(reader, suite=suite, expected=expected) as layer:
        for block in layer:
            writer.write(block)
    return layer.result


# ---- Decryption


def _layer_key(descriptor: Descriptor, private: Secret) -> LayerKey:
    subject = subject_of(descriptor)
    return LayerKey.combine(public_options_of(descriptor), PrivateOptions.parse(private, subject), subject)


class LayerCheck:
    """Size, digest and MAC of a layer's ciphertext, over bytes as they come.

    In: descriptor   of the encrypted layer
        private      its private options, unwrapped
    ImageError: the options are none, or not the suite's.
    """

    def __init__(self, descriptor: Descriptor, private: Secret) -> None:
        self._descriptor = descriptor
        self._key = _layer_key(descriptor, private)
        key, suite = self._key, self._key.suite
        together = descriptor.digest.startswith(_SHA256) and not (suite.slow_mac and _cpus() > 1)
        self._hashes = suite.hashes(key.key, key.nonce) if together else None
        self._digest = new_hash(descriptor.digest)
        self._mac = suite.mac(key.key, key.nonce)
        self._followers = _Followers(self._digest.update)
        self._size = 0

    def update(self, data: BytesLike) -> None:
        """The next bytes of ciphertext; the caller's again on return. IntegrityError: more than the layer has."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # any buffer
        self._size += len(view)
        if self._size > self._descriptor.size:
            self.close()
            raise self._error(f"more than {self._descriptor.size} bytes")
        if self._hashes is not None:
            self._hashes.update(view)
            return
        self._followers.feed(view)
        self._mac.update(view)
        self._followers.wait()

    def finish(self) -> None:
        """IntegrityError: the ciphertext is shorter, or not what was encrypted."""
        self.close()
        if self._size != self._descriptor.size:
            raise self._error(f"{self._size} bytes; expected {self._descriptor.size}")
        algorithm = self._descriptor.digest.partition(":")[0]
        hashes = self._hashes
        found = f"{algorithm}:{self._digest.hexdigest() if hashes is None else hashes.digest().hex()}"
        if found != self._descriptor.digest:
            raise self._error(f"the blob's digest is {found}")
        if not hmac.compare_digest(self._mac.digest() if hashes is None else hashes.mac(), self._key.mac):
            raise self._error(f"the MAC does not match: ciphertext, key or options were changed ({self._key.suite.name})")

    def close(self) -> None:
        """Ends what finish() has not ended. Idempotent."""
        self._followers.wait()
        self._followers.close()

    def __enter__(self) -> LayerCheck:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _error(self, problem: str) -> IntegrityError:
        return IntegrityError(subject_of(self._descriptor), problem)


def check_layer(reader: Reader, descriptor: Descriptor, private: Secret) -> None:
    """Pass 1 over a whole ciphertext. As LayerCheck."""
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    with LayerCheck(descriptor, private) as check:
        while count := _fill(reader, view):
            check.update(view[:count])
        check.finish()


class LayerReader(io.RawIOBase):
    """A layer's own bytes out of its ciphertext, which LayerCheck has passed. Made by open_layer.

    readinto() raises IntegrityError instead of handing out the last block when the layer's digest differs or the ciphertext ends
    early. The ciphertext's reader is closed with this one, if it can be.
    """

    def __init__(self, reader: Reader, descriptor: Descriptor, private: Secret) -> None:
        super().__init__()
        self._subject = subject_of(descriptor)
        self._key = key = _layer_key(descriptor, private)
        self._reader = reader
        self._left = descriptor.size
        self._cipher = key.suite.cipher(key.key, key.nonce)
        self._digest = new_hash(key.digest)
        self._follower = _Followers(self._digest.update)
        block = min(BLOCK_BYTES, max(descriptor.size, 1))
        self._sealed = memoryview(bytearray(block))
        self._clear = [bytearray(block) for _ in range(2 if descriptor.size > block else 1)]
        self._turn = 0
        self._ready = memoryview(b"")
        self._verified = False
        self._failed: IntegrityError | None = None

    @property
    def verified(self) -> bool:
        """True when the layer's digest has been found right, which is before its last block is handed out."""
        return self._verified

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """As io.RawIOBase. Repeats its IntegrityError."""
        if self.closed:
            raise ValueError("the layer has been closed")
        if self._failed is not None:
            raise self._failed
        if not self._ready and not self._verified:
            try:
                self._next()
            except IntegrityError as error:
                self._failed = error
                raise
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def drain(self) -> None:
        """Reads what is left and throws it away, so that `verified` is true afterwards, or IntegrityError has been raised."""
        scratch = bytearray(min(BLOCK_BYTES, len(self._sealed)))
        while self.readinto(scratch):
            pass

    def close(self) -> None:
        """Idempotent. The plaintext in the buffers is overwritten."""
        if not self.closed:
            try:
                self._follower.wait()
                self._follower.close()
                self._ready = memoryview(b"")
                for buffer in self._clear:
                    _wipe(buffer)
                close = getattr(self._reader, "close", None)
                if close is not None:
                    close()
            finally:
                super().close()

    def _next(self) -> None:
        wanted = min(self._left, len(self._sealed))
        sealed = self._sealed[:wanted]
        if _fill(self._reader, sealed) != wanted:
            raise IntegrityError(self._subject, "the ciphertext ends early")
        self._left -= wanted
        clear = memoryview(self._clear[self._turn])[:wanted]
        self._turn = (self._turn + 1) % len(self._clear)
        self._cipher.process(sealed, clear)
        self._follower.feed(clear)
        if not self._left:
            self._follower.wait()
            self._follower.close()
            if not hmac.compare_digest(self._digest.hexdigest(), self._key.digest.partition(":")[2]):
                raise IntegrityError(self._subject, "what was decrypted has another digest: key, nonce or blob were changed")
            self._verified = True
        self._ready = clear


def open_layer(reader: Reader, descriptor: Descriptor, private: Secret) -> LayerReader:
    """Pass 2: a reader of the layer as it was compressed. Only for ciphertext that LayerCheck has passed.

    ImageError: the options are none, or not the suite's.
    """
    return LayerReader(reader, descriptor, private)
