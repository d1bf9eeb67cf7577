"""Limits: how often one address may ask, how often one may fail, how often a guest may fetch the same key.

Three questions, each answered from a table of bounded size in constant time:

    check_request   requests of one address: a token bucket per IPv4 address or IPv6 /64
    note_failure    failures of an address or identity: so many within a window lock it out, twice as long each time
    check_release   releases of one resource to one guest, and of all resources to one guest: token buckets

A table that is full drops its least recently used entry. What does an attacker with many addresses gain by filling it? For
buckets and for addresses that have failed but are not locked out: nothing he does not have anyway, since to push one entry out he
must use as many other addresses as the table holds, and each of those has the same allowance. Lock-outs stand in a table of their
own, which only lock-outs can fill: to get rid of one he must have `table` other addresses locked out, each after `failures`
failures of its own. Nothing but time ends a lock-out: neither a success nor a reconnection does.

Lock-out keys must be ones that only their owner can use: an address, the digest of a token that was found, a certificate that
signed. Never an identity that is merely claimed, or anybody could lock anybody out.

Thread-safe; one lock, held for the few steps of one question.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from csvfast.errors import ArgumentError, LimitedError

__all__ = ["Limits", "LimitsConfig", "network_of"]

_KEY_LIMIT: Final = 128
_IPV4: Final = re.compile(r"(?:ipv4:)?([0-9]{1,3}(?:\.[0-9]{1,3}){3})(?::[0-9]{1,5})?\Z", re.ASCII)
_IPV6: Final = re.compile(
    r"(?:ipv6:)?(?:\[|%5B)?([0-9A-Fa-f:.]{2,45})"  # the address
    r"(?:%(?!5D)[^\]]{0,32})?"  # its zone
    r"(?:(?:\]|%5D)(?::[0-9]{1,5})?)?\Z",  # its port
    re.ASCII,
)
_IPV6_NETWORK_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """How much is too much. A rate of 0 switches that limit off, as does `failures` = 0.

    request_rate, request_burst      requests a second of one address, and how many at once
    failures, failure_window         so many failures within so many seconds lock an address or identity out
    lock_seconds, lock_limit         how long the first time, and at most; each lock-out that follows within `lock_limit` seconds
                                     of the last one's end lasts twice as long
    release_rate, release_burst      releases a second of one resource to one guest
    subject_rate, subject_burst      releases a second to one guest altogether
    table                            entries of each table, about 200 bytes each
    exempt                           addresses without limits on requests and failures, e.g. of a proxy before many guests
    """

    request_rate: float = 200.0
    request_burst: int = 400
    failures: int = 20
    failure_window: float = 60.0
    lock_seconds: float = 30.0
    lock_limit: float = 900.0
    release_rate: float = 20.0
    release_burst: int = 200
    subject_rate: float = 100.0
    subject_burst: int = 1000
    table: int = 65536
    exempt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("request", "release", "subject"):
            rate, burst = getattr(self, f"{name}_rate"), getattr(self, f"{name}_burst")
            if not 0 <= rate < float("inf"):
                raise ArgumentError(f"{name}_rate {rate}: expected 0 (no limit) or a number of requests a second")
            if rate and burst < 1:
                raise ArgumentError(f"{name}_burst {burst}: expected 1 or more")
        if self.failures < 0:
            raise ArgumentError(f"failures {self.failures}: expected 0 (no lock-out) or more")
        if not (0 < self.failure_window < float("inf") and 0 < self.lock_seconds <= self.lock_limit < float("inf")):
            raise ArgumentError("failure_window, lock_seconds, lock_limit: expected seconds, the last not below the second")
        if self.table < 1:
            raise ArgumentError(f"table {self.table}: expected 1 or more")


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address without its port, an IPv6 address's /64; other text as it stands, shortened.

    Understands "192.0.2.1", "192.0.2.1:443", "[2001:db8::1]:443", "fe80::1%eth0" and gRPC's "ipv4:..." and "ipv6:%5B...%5D:443".
    Long text (an identity) becomes its SHA-256, so that a table's size is bounded in bytes, too.
    """
    match = _IPV4.match(address)
    if match is not None:
        return match[1]
    match = _IPV6.match(address)
    if match is not None and match[1].count(":") >= 2:
        try:
            parsed = ipaddress.IPv6Address(match[1])
        except ValueError:
            pass
        else:
            if parsed.ipv4_mapped is not None:
                return str(parsed.ipv4_mapped)
            return f"{parsed.packed[: _IPV6_NETWORK_BITS // 8].hex()}/64"
    return address if len(address) <= _KEY_LIMIT else hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()


class _Buckets:
    """Token buckets as times: an entry is the moment at which its bucket is full again (the generic cell rate algorithm)."""

    __slots__ = ("_capacity", "_depth", "_full_at", "_interval", "refused")

    def __init__(self, rate: float, burst: int, capacity: int) -> None:
        self._interval = 1.0 / rate if rate else 0.0
        self._depth = (burst - 1) * self._interval
        self._capacity = capacity
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()
        self.refused = 0

    def __len__(self) -> int:
        return len(self._full_at)

    def wait(self, key: Hashable, now: float) -> float:
        """Seconds until a token is there, 0.0 when there is one. Takes nothing."""
        if not self._interval:
            return 0.0
        full_at = self._full_at.get(key)
        if full_at is None:
            return 0.0
        wait = full_at - now - self._depth
        # A billionth of a second is rounding, not waiting.
        return wait if wait > 1e-9 else 0.0

    def take(self, key: Hashable, now: float) -> None:
        if not self._interval:
            return
        entries = self._full_at
        full_at = entries.get(key)
        if full_at is None:
            entries[key] = now + self._interval
            if len(entries) > self._capacity:
                entries.popitem(last=False)
        else:
            entries[key] = max(full_at, now) + self._interval
            entries.move_to_end(key)


class Limits:
    """All limits of one broker.

    In: config   how much is too much
        clock    seconds, never going back
    """

    def __init__(self, config: LimitsConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config: Final = config or LimitsConfig()
        self._clock = clock
        self._lock = threading.Lock()
        table = self.config.table
        self._requests = _Buckets(self.config.request_rate, self.config.request_burst, table)
        self._releases = _Buckets(self.config.release_rate, self.config.release_burst, table)
        self._subjects = _Buckets(self.config.subject_rate, self.config.subject_burst, table)
        self._exempt = frozenset(map(network_of, self.config.exempt))
        self._failing: OrderedDict[str, tuple[int, float]] = OrderedDict()  # failures, when the window began
        self._locked: OrderedDict[str, tuple[float, float]] = OrderedDict()  # end of the lock-out, its length
        self._lockouts = self._refused_locked = 0

    def check_request(self, address: str) -> None:
        """Counts one request of `address`. LimitedError when it is locked out or has asked too often."""
        key = network_of(address)
        if key in self._exempt:
            return
        with self._lock:
            now = self._clock()
            self._check_locked(key, now)
            wait = self._requests.wait(key, now)
            if wait:
                self._requests.refused += 1
                raise LimitedError("too many requests", wait)
            self._requests.take(key, now)

    def check_identity(self, identity: str) -> None:
        """LimitedError when an identity (or address) is locked out; counts nothing."""
        key = network_of(identity)
        with self._lock:
            self._check_locked(key, self._clock())

    def note_failure(self, who: str) -> None:
        """Counts one failure of an address or an identity, and locks it out when there are too many. Raises nothing."""
        limit = self.config.failures
        key = network_of(who)
        if not limit or key in self._exempt:
            return
        with self._lock:
            now = self._clock()
            count, since = self._failing.pop(key, (0, now))
            if now - since >= self.config.failure_window:
                count, since = 0, now
            if count + 1 < limit:
                self._failing[key] = (count + 1, since)
                if len(self._failing) > self.config.table:
                    self._failing.popitem(last=False)
                return
            self._lock_out(key, now)

    def check_release(self, subject: Hashable, resource: Hashable) -> None:
        """Counts one release of `resource` to `subject`. LimitedError: too many of this resource, or altogether.

        In: subject   who has proved itself, e.g. its chip id and VM id, or the key its evidence is bound to
        """
        pair = (subject, resource)
        with self._lock:
            now = self._clock()
            wait = max(self._releases.wait(pair, now), self._subjects.wait(subject, now))
            if wait:
                self._releases.refused += 1
                raise LimitedError("too many releases", wait)
            self._releases.take(pair, now)
            self._subjects.take(subject, now)

    def stats(self) -> dict[str, int]:
        """For metrics, not in constant time: entries (addresses, failing, locked), counts (lockouts, refused_...)."""
        with self._lock:
            now = self._clock()
            return {
                "addresses": len(self._requests),
                "failing": len(self._failing),
                "locked": sum(end > now for end, _ in self._locked.values()),
                "lockouts": self._lockouts,
                "refused_requests": self._requests.refused,
                "refused_releases": self._releases.refused,
                "refused_locked": self._refused_locked,
            }

    def _check_locked(self, key: str, now: float) -> None:
        if not self._locked:
            return
        entry = self._locked.get(key)
        if entry is not None and entry[0] > now:
            self._refused_locked += 1
            raise LimitedError("too many failures", entry[0] - now)

    def _lock_out(self, key: str, now: float) -> None:
        end, length = self._locked.pop(key, (0.0, 0.0))
        again = length and now - end < self.config.lock_limit
        length = min(2 * length, self.config.lock_limit) if again else self.config.lock_seconds
        # An entry outlives its lock-out, so that the next one is longer; it goes when lock-outs of others push it out.
        self._locked[key] = (max(now + length, end), length)
        self._lockouts += 1
        if len(self._locked) > self.config.table:
            self._locked.popitem(last=False)
