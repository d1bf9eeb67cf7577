"""Changing inputs: cheap, seeded, and aware that the formats are little-endian words at fixed places.

An input that draws an answer never seen before (another exception, field or result) joins the corpus, so that later inputs start
from what was learnt. Thread-safety: one mutator per thread.
"""

from __future__ import annotations

import random
from collections.abc import Hashable

__all__ = ["Mutator"]

WORDS = (
    b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\x01\x00\x00\x00", b"\x00\x10\x00\x00",
    b"\x02\x10\x00\x00", b"\x04\x10\x00\x00", b"\x03\x00\x00\x00", b"\x04\x00\x00\x00", b"\x05\x00\x00\x00",
)  # fmt: skip
TOKENS = (
    b"null", b"true", b"-1", b"256", b"1e309", b"NaN", b"[]", b"{}", b'""', b"[[[[[[[[", b'"\\ud800"', b"0.0", b",", b":",
    b"\x00", b"99999999999999999999999999",
)  # fmt: skip
CORPUS_MAX = 4000


class Mutator:
    """A corpus and a seeded stream of changes to it."""

    def __init__(self, seeds: list[bytes], seed: int, *, text: bool = False, learn_max: int = 1 << 20) -> None:
        self.corpus = list(seeds)
        self.random = random.Random(seed)
        self.text = text
        self.learn_max = learn_max
        self.seen: set[Hashable] = set()

    def next(self) -> bytes:
        """One more input."""
        rng = self.random
        source = self.corpus[int(rng.random() * len(self.corpus))]
        data = bytearray(source)
        for _ in range(1 + int(rng.random() ** 3 * 8)):
            self._change(data, rng)
        return bytes(data)

    def learn(self, data: bytes, answer: Hashable) -> bool:
        """Keeps an input whose answer is new."""
        if answer in self.seen:
            return False
        self.seen.add(answer)
        if len(self.corpus) < CORPUS_MAX and len(data) <= self.learn_max:
            self.corpus.append(data)
        return True

    def _change(self, data: bytearray, rng: random.Random) -> None:
        size = len(data)
        kind = int(rng.random() * 10)
        if size == 0 or kind == 9:
            data.extend(rng.randbytes(1 + int(rng.random() ** 4 * 64)))
            return
        place = int(rng.random() * size)
        if kind <= 2:
            data[place] ^= 1 << int(rng.random() * 8)
        elif kind == 3:
            data[place] = int(rng.random() * 256)
        elif kind <= 5:
            if self.text:
                token = TOKENS[int(rng.random() * len(TOKENS))]
                data[place : place + int(rng.random() * 6)] = token
            else:
                data[place & ~3 : (place & ~3) + 4] = WORDS[int(rng.random() * len(WORDS))]
        elif kind == 6:
            length = 1 + int(rng.random() ** 3 * 80)
            source = int(rng.random() * size)
            data[place : place + length] = data[source : source + length]
        elif kind == 7:
            other = self.corpus[int(rng.random() * len(self.corpus))]
            data[place:] = other[place:]
        elif rng.random() < 0.3:
            del data[place:]
        else:
            length = 1 + int(rng.random() ** 4 * 64)
            del data[place : place + length]
