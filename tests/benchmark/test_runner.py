"""How time is taken: rounds interleave, medians, threads start together, failures surface."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest

from csvfast.benchmark import Case, rate_of, run_cases


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_rate_of_known_work() -> None:
    case = Case("work", lambda: lambda: busy(0.002), 1000, kernel="k")
    (result,) = run_cases([case], seconds=0.2, rounds=5)
    assert result["bytes_per_second"] == pytest.approx(500_000, rel=0.2)
    assert result["rounds"] == 5
    assert result["clock"] == "cpu"


def test_operations_are_counted_instead_of_bytes() -> None:
    case = Case("work", lambda: lambda: busy(0.002), 0, kernel="k", operations=10)
    (result,) = run_cases([case], seconds=0.2, rounds=5)
    assert "bytes_per_second" not in result
    assert rate_of(result) == result["ops_per_second"] == pytest.approx(5000, rel=0.2)


def test_ratio_of_two_cases() -> None:
    cases = [Case("work", lambda s=s: lambda: busy(s), 1000, kernel=str(s)) for s in (0.001, 0.003)]
    fast, slow = run_cases(cases, seconds=0.2, rounds=5)
    assert fast["bytes_per_second"] / slow["bytes_per_second"] == pytest.approx(3, rel=0.2)


def test_processor_time_ignores_waiting() -> None:
    def work() -> None:
        busy(0.001)
        time.sleep(0.004)

    cpu = Case("work", lambda: work, 1000)
    wall = Case("work", lambda: work, 1000, clock="wall")
    by_cpu, by_wall = run_cases([cpu, wall], seconds=0.05, rounds=3)
    assert by_cpu["bytes_per_second"] > 2 * by_wall["bytes_per_second"]


def test_rounds_interleave() -> None:
    started: list[str] = []
    cases = [Case("x", lambda: lambda: busy(0.0001), 1, kernel=name) for name in ("a", "b")]
    list(run_cases(cases, seconds=0.01, rounds=3, started=started.append))
    assert started == ["x a", "x b"] * 3


def test_groups_are_separate() -> None:
    started: list[str] = []
    cases = [Case(name, lambda: lambda: busy(0.0001), 1) for name in ("a", "b")]
    list(run_cases(cases, seconds=0.01, rounds=2, started=started.append))
    assert started == ["a csvfast"] * 2 + ["b csvfast"] * 2


def test_setup_surrounds_making_and_every_round() -> None:
    events: list[str] = []

    @contextmanager
    def setup() -> Any:
        events.append("enter")
        yield
        events.append("leave")

    def make() -> Any:
        events.append("make")
        return lambda: busy(0.0001)

    list(run_cases([Case("x", make, 1, setup=setup)], seconds=0.01, rounds=2))
    assert events == ["enter", "make", "leave", "enter", "leave", "enter", "leave", "enter", "leave"]


def test_each_thread_has_its_own_work() -> None:
    made: list[int] = []
    users: dict[int, set[int]] = {}
    guard = threading.Lock()

    def make() -> Any:
        made.append(len(made))
        number = made[-1]

        def work() -> None:
            with guard:
                users.setdefault(number, set()).add(threading.get_ident())
            time.sleep(0.001)

        return work

    (result,) = run_cases([Case("x", make, 10, threads=3)], seconds=0.01, rounds=1)
    assert made == [0, 1, 2]
    assert set(users) == {0, 1, 2}
    assert result["threads"] == 3
    assert result["clock"] == "wall"


def test_threads_add_up() -> None:
    """Sleeping runs side by side: four threads do four times the work, less when others keep the CPUs busy."""
    cases = [Case("x", lambda: lambda: time.sleep(0.005), 10, threads=count, clock="wall") for count in (1, 4)]
    one, four = run_cases(cases, seconds=0.1, rounds=3)
    assert 1.5 < four["bytes_per_second"] / one["bytes_per_second"] < 5.5


@pytest.mark.parametrize("threads", [1, 2])
def test_failure_of_the_work_surfaces(threads: int) -> None:
    def work() -> None:
        raise ZeroDivisionError("in the work")

    with pytest.raises(ZeroDivisionError, match="in the work"):
        list(run_cases([Case("x", lambda: work, 1, threads=threads)], seconds=0.01))


def test_once_runs_once_per_round() -> None:
    calls: list[None] = []
    (result,) = run_cases([Case("x", lambda: lambda: calls.append(None), 1, once=True)], seconds=5, rounds=4)
    assert len(calls) == 4
    assert result["rounds"] == 4
