"""Jobs against a loop over hashlib, on files in the page cache: many small ones, some large ones, trees.

    pytest bench/test_bench_batch.py -s

Speed-ups are of CPU time (user and system), so that a busy machine falsifies little; `job` and `loop` are seconds.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csvfast.measure import Job, Selection

SMALL_FILES = 10_000
LARGE_FILES = 32
LARGE_BYTES = 8 << 20


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    source = random.Random(1)
    for number in range(SMALL_FILES):
        (folder / f"{number:05}").write_bytes(source.randbytes(source.randint(4 << 10, 64 << 10)))
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    source = random.Random(2)
    for number in range(LARGE_FILES):
        (folder / f"{number:05}").write_bytes(source.randbytes(LARGE_BYTES))
    return folder


def loop(folder: Path) -> int:
    total = 0
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: hashlib.new("sm3")).hexdigest()
            total += file.tell()
    return total


def job(folder: Path, mode: Any = "linear", **options: Any) -> int:
    with Job([folder], Selection(mode), jobs=1, fresh="ledger" in options, **options) as measured:
        return sum(row.size or 0 for row in measured)


def compare(title: str, files: int, first: Callable[[], int], second: Callable[[], int]) -> None:
    times = []
    for work in (first, second):
        best = float("inf")
        for _ in range(3):
            before = time.process_time()
            total = work()
            best = min(best, time.process_time() - before)
        times.append(best)
    by_loop, by_job = times
    print(
        f"\n{title}: loop {by_loop:.3f} s, job {by_job:.3f} s: {by_loop / by_job:.2f} x, {total / by_job / 1e9:.2f} GB/s, "
        f"{by_job / files * 1e6:.1f} us a file"
    )


def test_small_files(small: Path, tmp_path: Path) -> None:
    compare("10,000 files of 4 to 64 KiB", SMALL_FILES, lambda: loop(small), lambda: job(small))
    compare("the same with a ledger", SMALL_FILES, lambda: loop(small), lambda: job(small, ledger=tmp_path / "ledger"))


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_large_files(large: Path, access: str) -> None:
    compare(f"32 files of 8 MiB, {access}", LARGE_FILES, lambda: loop(large), lambda: job(large, access=access))


@pytest.mark.parametrize("access", ["read", "mmap"])
@pytest.mark.parametrize("mode", ["tree", "verity"])
def test_trees(large: Path, mode: str, access: str) -> None:
    compare(f"32 files of 8 MiB, {mode}, {access}", LARGE_FILES, lambda: loop(large), lambda: job(large, mode, access=access))
