"""One run for many askers, failures included."""

from __future__ import annotations

import threading
import time

import pytest

from csvfast.certs.flight import SingleFlight


def test_many_askers_one_run() -> None:
    flight: SingleFlight[int] = SingleFlight()
    runs: list[int] = []
    release = threading.Event()
    answers: list[int] = []

    def work() -> int:
        runs.append(1)
        assert release.wait(30)
        return 42

    asking: list[int] = []

    def ask() -> None:
        asking.append(1)
        answers.append(flight.run("a", work))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not (runs and len(asking) == 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert flight.run("b", lambda: 7) == 7  # another name does not wait
    time.sleep(0.5)
    release.set()
    for thread in threads:
        thread.join()
    assert answers == [42] * 20
    assert len(runs) == 1
    assert flight.run("a", lambda: 43) == 43  # nothing is kept


def test_failures_are_raised_and_forgotten() -> None:
    flight: SingleFlight[int] = SingleFlight()

    def fail() -> int:
        raise LookupError("nobody")

    with pytest.raises(LookupError, match="nobody"):
        flight.run("a", fail)
    assert flight.run("a", lambda: 1) == 1


def test_an_interruption_is_one_threads_own() -> None:
    """Ctrl-C ends the thread that does the work; who waited for it does the work itself."""
    flight: SingleFlight[int] = SingleFlight()
    started, release = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def interrupted() -> int:
        started.set()
        release.wait(10)
        raise KeyboardInterrupt

    def first() -> None:
        try:
            flight.run("x", interrupted)
        except KeyboardInterrupt as stop:
            outcomes.append(type(stop))

    def second() -> None:
        outcomes.append(flight.run("x", lambda: 7))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    time.sleep(0.05)  # so that the second one waits
    release.set()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, outcomes)) == ["7", "<class 'KeyboardInterrupt'>"]
