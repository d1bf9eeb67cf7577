"""Runs fuzz targets.

usage: python -m fuzz.campaign [--inputs N] [--seed N] [--jobs N] [--seconds N] [--list] TARGET...

Exit code 0: every input was answered. 1: a finding; its input is written to --findings (default: the current folder) as
fuzz-TARGET-SEED-NUMBER.bin, to be run again with --replay FILE.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz.mutate import Mutator
from fuzz.targets import TARGETS, Target

HANG_SECONDS = 10.0
BATCH = 2000


class HangError(Exception):
    """An input took longer than HANG_SECONDS of CPU time (wall time would blame a busy machine)."""


@dataclass
class Finding:
    """An input that was not answered as it should be."""

    target: str
    seed: int
    number: int
    data: bytes
    trace: str


@contextmanager
def watchdog() -> Iterator[None]:
    """Raises HangError in the main thread when one batch hangs."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"no answer within {HANG_SECONDS} s")

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(
    name: str, inputs: int, seed: int, *, seconds: float = float("inf"), progress: bool = False
) -> tuple[int, int, Finding | None]:
    """Returns how many inputs were tried, how many kinds of answer they drew, and the first finding or None."""
    target: Target = TARGETS[name]()
    mutator = Mutator(target.seeds, seed, text=target.text, learn_max=target.learn_max)
    for data in target.seeds:
        mutator.learn(data, target.answer(data))
    start = time.monotonic()
    done = 0
    with watchdog():
        while done < inputs and time.monotonic() - start < seconds:
            data = b""
            try:
                for _ in range(min(BATCH, inputs - done)):
                    data = mutator.next()
                    if done % 64 == 0:
                        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
                    mutator.learn(data, target.answer(data))
                    done += 1
            except Exception:  # whatever escaped is the finding
                return done, len(mutator.seen), Finding(name, seed, done, data, traceback.format_exc())
            if progress and done % (BATCH * 100) == 0:
                rate = done / (time.monotonic() - start)
                print(f"{name} seed {seed}: {done:,} of {inputs:,}, {rate:,.0f}/s, {len(mutator.seen)} answers", flush=True)
    return done, len(mutator.seen), None


def _job(arguments: tuple[str, int, int, float]) -> tuple[str, int, int, float, Finding | None]:
    name, inputs, seed, seconds = arguments
    start = time.monotonic()
    done, answers, finding = run(name, inputs, seed, seconds=seconds, progress=sys.stdout.isatty())
    return name, done, answers, time.monotonic() - start, finding


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes; each target's inputs are split over them")
    parser.add_argument("--findings", type=Path, default=Path())
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    names = options.targets or sorted(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"target {name!r}: expected one of {', '.join(sorted(TARGETS))}")
    if options.list:
        print(*sorted(TARGETS), sep="\n")
        return 0
    if options.replay:
        print(TARGETS[names[0]]().answer(options.replay.read_bytes()))
        return 0
    share = -(-options.inputs // options.jobs)
    work = [(name, share, options.seed + job, options.seconds) for name in names for job in range(options.jobs)]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for name, done, answers, seconds, finding in pool.imap_unordered(_job, work):
            outcome = "FINDING" if finding else "none found"
            print(f"{name}: {done:,} inputs, {answers} kinds of answer, {seconds:.0f} s, {outcome}", flush=True)
            if finding is not None:
                failed = 1
                place = options.findings / f"fuzz-{finding.target}-{finding.seed}-{finding.number}.bin"
                place.write_bytes(finding.data)
                print(f"{place}\n{finding.trace}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
