"""Measuring on a Dask cluster: two workers against one, and what a task costs beyond its work.

    python bench/cluster.py [--gib 4] [--tasks 500] [--rounds 3]

A scheduler and workers with one thread each run on this machine, so two workers need two cores that do nothing else: the load of
the machine is shown beside the figures. The image is in the page cache. Speed-ups are the medians of rounds that alternate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from measure.dask_cluster import Cluster

from csvfast.measure import Item, Job, Selection
from csvfast.measure.fleet.cluster import DaskExecutor
from csvfast.measure.fleet.executors import ThreadExecutor
from csvfast.measure.fleet.tasks import WholeTask


def ready(executor: DaskExecutor, workers: int) -> None:
    while executor.threads < workers:
        time.sleep(0.05)


def seconds(image: Path, executor: DaskExecutor | ThreadExecutor, mode: str) -> float:
    began = time.perf_counter()
    with Job([image], Selection(mode), executor=executor) as job:  # type: ignore[arg-type]
        assert all(row.ok for row in job)
    return time.perf_counter() - began


def overhead(executor: DaskExecutor | ThreadExecutor, item: Item, tasks: int) -> float:
    """Milliseconds a task, with as many under way as a job has."""
    for wanted in (20, tasks):
        began = time.perf_counter()
        flying = deque()
        for number in range(wanted):
            flying.append(executor.submit(WholeTask(number, (item,))))
            if len(flying) >= executor.slots + 2:
                flying.popleft().result()
        for future in flying:
            future.result()
    return (time.perf_counter() - began) / tasks * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        image = folder / "large.img"
        with image.open("wb") as file:
            piece = os.urandom(64 << 20)
            for _ in range(options.gib << 4):
                file.write(piece)
        (folder / "tiny.img").write_bytes(b"x")
        item = Item(str(folder / "tiny.img"), str(folder / "tiny.img"))
        executors: dict[int, DaskExecutor] = {}
        for count in (1, 2):
            place = folder / str(count)
            place.mkdir()
            cluster = stack.enter_context(Cluster(place))
            cluster.add(count)
            executors[count] = stack.enter_context(DaskExecutor(cluster.address))
            ready(executors[count], count)
        local = stack.enter_context(ThreadExecutor(2))
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        for mode in ("tree", "verity"):
            ones, twos, here = [], [], []
            for _ in range(options.rounds):
                ones.append(seconds(image, executors[1], mode))
                twos.append(seconds(image, executors[2], mode))
                here.append(seconds(image, local, mode))
            ratio = statistics.median(one / two for one, two in zip(ones, twos, strict=True))
            rate = options.gib / min(twos)
            bare = options.gib / min(here)
            print(f"{mode}: two workers {ratio:.2f} x one ({rate:.2f} GiB/s); two threads here {bare:.2f} GiB/s")
        cost = min(overhead(executors[2], item, options.tasks) for _ in range(options.rounds))
        bare = min(overhead(local, item, options.tasks) for _ in range(options.rounds))
        print(f"a task: {cost:.2f} ms on the cluster, {bare:.3f} ms on threads, so {cost - bare:.2f} ms of scheduling")
        print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
