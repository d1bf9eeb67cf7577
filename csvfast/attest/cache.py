"""Chains that have been verified before: most evidence of a day comes from few chips.

Certificates of the platform do not expire and are not revoked by any list the firmware knows, so an entry stays true as
long as its roots are trusted; the roots are part of the key. Thread-safety: a lock around every access.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from csvfast.errors import ArgumentError

if TYPE_CHECKING:
    from csvfast.certs.chain import CertificateChain
    from csvfast.certs.layout import CaCertificate

__all__ = ["ChainCache", "KnownChain"]


class KnownChain:
    """One chain, the root it hangs from, and how often it was met again. Compared by identity."""

    __slots__ = ("chain", "root", "uses")

    def __init__(self, chain: CertificateChain, root: CaCertificate) -> None:
        self.chain: Final = chain
        self.root: Final = root
        self.uses = 0

    def count_use(self) -> None:
        """To be called for every use after the first: from the second on the PEK verifies with a table."""
        self.uses += 1
        if self.uses >= 2 and self.chain.pek is not None and not self.chain.pek.public_key.prepared:
            self.chain.pek.public_key.prepare()


class ChainCache:
    """Verified chains, the least recently used dropped when there are more than `capacity`.

    In: capacity   1 or more (ArgumentError). An entry holds three certificates and, from its second use on, the table of its PEK.
    A key is (strict, roots, HSK || CEK, PEK): evidence with any other byte in its certificates is verified from the root again.
    """

    def __init__(self, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ArgumentError(f"chain cache capacity {capacity}: expected 1 or more")
        self.capacity: Final = capacity
        self._entries: OrderedDict[Hashable, KnownChain] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def find(self, key: Hashable) -> KnownChain | None:
        """The chain stored under `key`. From the second time on its PEK verifies with a table."""
        with self._lock:
            known = self._entries.get(key)
            if known is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
        known.count_use()  # outside the lock: a count lost between two threads only delays the table
        return known

    def add(self, key: Hashable, known: KnownChain) -> None:
        """Remembers a chain whose signatures have been verified."""
        with self._lock:
            self._entries[key] = known
            self._entries.move_to_end(key)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()

    def stats(self) -> dict[str, int]:
        """entries, capacity, hits, misses."""
        with self._lock:
            return {"entries": len(self._entries), "capacity": self.capacity, "hits": self._hits, "misses": self._misses}

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)
