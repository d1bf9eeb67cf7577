"""Takes the time of cases so that their ratios hold.

Every case of a group runs once per round, round after round, and a case's figure is the median of its rounds: when the
clock drifts, all cases of the group drift together. One-thread runs are timed by the thread's CPU time, because wall time
doubles when anyone shares the core; runs of several threads and of other programs by wall time.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NotRequired, TypedDict

__all__ = ["Case", "Result", "rate_of", "run_cases"]

Clock = Literal["cpu", "wall"]


class Result(TypedDict):
    """One entry of "results" in a benchmark's JSON. Exactly one of the two rates is there."""

    name: str
    kernel: str | None  # None for peers
    bytes_per_second: NotRequired[float]
    ops_per_second: NotRequired[float]
    threads: int
    peer: str | None  # None for csvfast
    variant: str | None  # what tells apart results of one name: "gb", "ieee", "linear", "tree" ...
    buffer_bytes: int  # what one thread works on
    rounds: int
    spread: float  # (fastest - slowest) / median of the rounds
    clock: Clock


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    setup       entered before the case's threads run in a round and left afterwards (forcing a kernel)
    make        called once per thread, before any timing; gives the function that does the work once
    bytes       bytes one call of that function works on
    operations  operations one call does, where operations are counted and not bytes (bytes is 0 then); else 0
    once        the function is long (another program): one call is a round
    """

    name: str
    make: Callable[[], Callable[[], object]]
    bytes: int
    kernel: str | None = None
    peer: str | None = None
    variant: str | None = None
    threads: int = 1
    clock: Clock = "cpu"
    once: bool = False
    operations: int = 0
    setup: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    @property
    def label(self) -> str:
        """ "sm3/1048576 avx2 x2" for progress displays."""
        who = self.peer or self.kernel or "csvfast"
        parts = [self.name, who, self.variant or "", f"x{self.threads}" if self.threads > 1 else ""]
        return " ".join(part for part in parts if part)


@dataclass(slots=True)
class _Prepared:
    case: Case
    work: list[Callable[[], object]]
    turns: int = 1
    rates: list[float] = field(default_factory=list)


def run_cases(
    cases: Iterable[Case], *, seconds: float, rounds: int = 5, started: Callable[[str], None] | None = None
) -> Iterator[Result]:
    """Measures cases, group after group (a group: consecutive cases of one name and thread count), and yields results.

    In: seconds   about how long each case runs in all; rounds share it
        started   told the label of each case of each round as it begins
    """
    for _, group in groupby(cases, key=lambda case: (case.name, case.threads)):
        yield from _run_group(list(group), seconds / rounds, rounds, started)


def _run_group(
    cases: Sequence[Case], round_seconds: float, rounds: int, started: Callable[[str], None] | None
) -> Iterator[Result]:
    prepared = []
    for case in cases:
        with case.setup():
            prepared.append(_Prepared(case, [case.make() for _ in range(case.threads)]))
    for item in prepared:
        with item.case.setup():
            item.turns = 1 if item.case.once else _turns_for(item, round_seconds)
    for _ in range(rounds):
        for item in prepared:
            if started is not None:
                started(item.case.label)
            with item.case.setup():
                item.rates.append(item.case.threads * item.turns * _amount(item.case) / _seconds(item, item.turns))
    for item in prepared:
        yield _result(item)


def _amount(case: Case) -> int:
    return case.operations or case.bytes


def rate_of(result: Result) -> float:
    """The result's rate, in bytes or in operations per second."""
    return result.get("bytes_per_second", 0.0) or result.get("ops_per_second", 0.0)


def _turns_for(item: _Prepared, seconds: float) -> int:
    """Calls that take about `seconds`. The first runs also touch every page and warm caches and branch predictors."""
    turns, last = 1, _seconds(item, 1)
    while True:
        last = _seconds(item, turns)
        if last >= seconds / 8 or last >= 1.0:
            return max(1, round(turns * seconds / last))
        turns *= 2


def _seconds(item: _Prepared, turns: int) -> float:
    if item.case.threads == 1:
        clock = time.thread_time if item.case.clock == "cpu" else time.perf_counter
        return _one_thread(item.work[0], turns, clock)
    return _many_threads(item.work, turns)


def _one_thread(work: Callable[[], object], turns: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(turns):
        work()
    return max(clock() - start, 1e-9)


def _many_threads(work: Sequence[Callable[[], object]], turns: int) -> float:
    """Wall time from the moment all threads may go to the end of the last."""
    barrier = threading.Barrier(len(work) + 1)
    failures: list[BaseException] = []

    def loop(once: Callable[[], object]) -> None:
        barrier.wait()
        try:
            for _ in range(turns):
                once()
        except BaseException as error:  # a thread's exception would otherwise vanish with it
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(once,)) for once in work]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = max(time.perf_counter() - start, 1e-9)
    if failures:
        raise failures[0]
    return seconds


def _result(item: _Prepared) -> Result:
    median = statistics.median(item.rates)
    result: Result = {
        "name": item.case.name,
        "kernel": item.case.kernel,
        "threads": item.case.threads,
        "peer": item.case.peer,
        "variant": item.case.variant,
        "buffer_bytes": item.case.bytes,
        "rounds": len(item.rates),
        "spread": (max(item.rates) - min(item.rates)) / median,
        "clock": "wall" if item.case.threads > 1 else item.case.clock,
    }
    if item.case.operations:
        result["ops_per_second"] = median
    else:
        result["bytes_per_second"] = median
    return result
