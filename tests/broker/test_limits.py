"""Limits: known sequences under a clock of our own, a model, tables that an attacker fills, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker.limits import Limits, LimitsConfig, network_of
from csvfast.errors import ArgumentError, LimitedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def wait_of(call: Callable[[], None]) -> float:
    """Seconds to wait, 0 when the call was allowed."""
    wait = 0.0
    try:
        call()
    except LimitedError as error:
        wait = error.retry_after or -1.0  # a refusal that says "at once" is wrong
    assert wait >= 0
    return wait


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:443", "192.0.2.1"),
        ("ipv4:192.0.2.1:443", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:443", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002/64"),
        ("[2001:db8:1:2::9]:443", "20010db800010002/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:443", "20010db800010002/64"),
        ("fe80::1%eth0", "fe80000000000000/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:443", "fe80000000000000/64"),
        ("::1", "0000000000000000/64"),
        ("unix:", "unix:"),
        ("certificate:0123", "certificate:0123"),
        ("certificate:4567", "certificate:4567"),
        ("token:12", "token:12"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(address: str, network: str) -> None:
    assert network_of(address) == network


@given(st.text(max_size=400))
def test_keys_are_bounded(text: str) -> None:
    assert len(network_of(text)) <= 128


def test_burst_then_rate(clock: Clock) -> None:
    limits = Limits(LimitsConfig(request_rate=10, request_burst=3), clock)
    ask = lambda: limits.check_request("192.0.2.1:5")  # noqa: E731
    assert [wait_of(ask) for _ in range(3)] == [0, 0, 0]
    assert wait_of(ask) == pytest.approx(0.1)
    assert wait_of(ask) == pytest.approx(0.1)  # asking in vain costs nothing further
    clock.now += 0.1
    assert wait_of(ask) == 0
    assert wait_of(ask) == pytest.approx(0.1)
    limits.check_request("192.0.2.2")  # somebody else
    clock.now += 100
    assert [wait_of(ask) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
    assert limits.stats()["refused_requests"] == 4


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3)), max_size=80),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.integers(1, 5),
)
def test_buckets_are_token_buckets(steps: list[tuple[str, float]], rate: float, burst: int) -> None:
    clock = Clock()
    limits = Limits(LimitsConfig(request_rate=rate, request_burst=burst), clock)
    tokens: dict[str, tuple[float, float]] = {}
    for key, passed in steps:
        clock.now += passed
        left, last = tokens.get(key, (float(burst), clock.now))
        left = min(float(burst), left + (clock.now - last) * rate)
        wait = wait_of(lambda key=key: limits.check_request(key))  # type: ignore[misc]
        if abs(left - 1) < 1e-6:  # rounding decides
            left = left if wait else max(left - 1, 0.0)
        elif left > 1:
            assert wait == 0
            left -= 1
        else:
            assert wait == pytest.approx((1 - left) / rate, abs=1e-6)
        tokens[key] = (left, clock.now)


def test_failures_lock_out_and_twice_as_long(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=3, failure_window=60, lock_seconds=30, lock_limit=100), clock)
    ask = lambda: limits.check_request("192.0.2.1")  # noqa: E731

    def fail(times: int) -> None:
        for _ in range(times):
            limits.note_failure("192.0.2.1:77")

    fail(2)
    assert wait_of(ask) == 0
    fail(1)
    assert wait_of(ask) == pytest.approx(30)
    clock.now += 29
    assert wait_of(ask) == pytest.approx(1)
    clock.now += 1
    assert wait_of(ask) == 0
    fail(3)
    assert wait_of(ask) == pytest.approx(60)
    clock.now += 60
    fail(3)
    assert wait_of(ask) == pytest.approx(100)  # the limit
    clock.now += 100 + 100
    fail(3)
    assert wait_of(ask) == pytest.approx(30)  # forgiven
    limits.check_request("192.0.2.2")
    assert limits.stats()["lockouts"] == 4
    assert limits.stats()["locked"] == 1


def test_failures_outside_the_window_do_not_count(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=3, failure_window=60), clock)
    for _ in range(10):
        limits.note_failure("a")
        limits.note_failure("a")
        clock.now += 60
    limits.check_identity("a")
    limits.note_failure("a")
    limits.note_failure("a")
    limits.note_failure("a")
    with pytest.raises(LimitedError, match="too many failures"):
        limits.check_identity("a")


def test_failures_while_locked_out_never_shorten_it(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=1, lock_seconds=10, lock_limit=40), clock)
    last = 0.0
    for _ in range(10):
        limits.note_failure("a")
        wait = wait_of(lambda: limits.check_identity("a"))
        assert wait >= last - 1
        last = wait
        clock.now += 1
    assert last <= 40


def test_identities_and_addresses_do_not_mix(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=1), clock)
    limits.note_failure("certificate:12")
    limits.check_identity("certificate:13")
    limits.check_request("192.0.2.1")
    with pytest.raises(LimitedError):
        limits.check_identity("certificate:12")


def test_an_ipv6_network_is_one_address(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=4), clock)
    for host in range(4):
        limits.note_failure(f"[2001:db8::{host:x}]:1")
    with pytest.raises(LimitedError):
        limits.check_request("2001:db8::ffff")
    limits.check_request("2001:db8:0:1::1")


def test_a_lock_out_survives_a_flood_of_requests_and_failures(clock: Clock) -> None:
    limits = Limits(LimitsConfig(failures=3, table=50, lock_seconds=1000, lock_limit=1000), clock)
    for _ in range(3):
        limits.note_failure("attacker")
    for number in range(2000):
        limits.check_request(f"other-{number}")
        limits.note_failure(f"other-{number}")
        limits.note_failure(f"other-{number}")
        with pytest.raises(LimitedError):
            limits.check_request("attacker")
    stats = limits.stats()
    assert stats["addresses"] <= 50
    assert stats["failing"] <= 50
    # Only as many further lock-outs as the table holds push it out.
    for number in range(49):
        for _ in range(3):
            limits.note_failure(f"locked-{number}")
    with pytest.raises(LimitedError):
        limits.check_request("attacker")
    for _ in range(3):
        limits.note_failure("one-more")
    limits.check_request("attacker")
    assert limits.stats()["locked"] == 50


def test_releases_by_resource_and_by_guest(clock: Clock) -> None:
    config = LimitsConfig(release_rate=1, release_burst=2, subject_rate=1, subject_burst=3)
    limits = Limits(config, clock)
    limits.check_release("guest", "a")
    limits.check_release("guest", "a")
    with pytest.raises(LimitedError, match="too many releases") as caught:
        limits.check_release("guest", "a")
    assert caught.value.retry_after == pytest.approx(1)
    limits.check_release("guest", "b")  # the refusal above took no token of the guest's
    assert wait_of(lambda: limits.check_release("guest", "c")) == pytest.approx(1)
    limits.check_release("another guest", "a")
    clock.now += 1
    limits.check_release("guest", "c")


def test_switched_off(clock: Clock) -> None:
    off = LimitsConfig(request_rate=0, failures=0, release_rate=0, subject_rate=0)
    limits = Limits(off, clock)
    for _ in range(5000):
        limits.check_request("a")
        limits.note_failure("a")
        limits.check_release("a", "b")
    assert limits.stats()["addresses"] == 0


def test_exempt_addresses(clock: Clock) -> None:
    limits = Limits(LimitsConfig(request_burst=1, request_rate=1, failures=1, exempt=("192.0.2.7",)), clock)
    for _ in range(10):
        limits.note_failure("192.0.2.7:1")
        limits.check_request("192.0.2.7:2")


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_rate": -1}, {"request_rate": float("nan")}, {"request_burst": 0}, {"failures": -1}, {"failure_window": 0},
        {"lock_seconds": 0}, {"lock_seconds": 100, "lock_limit": 99}, {"table": 0}, {"release_rate": float("inf")},
    ],
)  # fmt: skip
def test_impossible_configurations(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        LimitsConfig(**wrong)  # type: ignore[arg-type]


def test_threads_take_no_token_twice() -> None:
    limits = Limits(LimitsConfig(request_rate=1e-6, request_burst=500))
    allowed: list[int] = []

    def ask() -> None:
        count = 0
        for _ in range(300):
            try:
                limits.check_request("192.0.2.1")
            except LimitedError:
                continue
            count += 1
        allowed.append(count)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(allowed) == 500


def test_asking_is_constant_time() -> None:
    limits = Limits(LimitsConfig(table=1000))
    for number in range(3000):
        limits.note_failure(f"x{number}")
    start = time.perf_counter()
    for number in range(3000):
        limits.check_request(f"10.0.{number >> 8}.{number & 255}")
        limits.check_release(number, "r")
    assert (time.perf_counter() - start) / 6000 < 200e-6  # some 2 us; a scan of the table would take thousands
