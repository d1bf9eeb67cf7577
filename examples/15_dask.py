"""Images measured on a Dask cluster: the same rows as here, whoever did the work (pip install 'csvfast[dask]').

The cluster of this example consists of two workers in this process, so that it runs everywhere. Yours has an address:
DaskExecutor("tcp://scheduler:8786"); its workers see the images under the same paths.
"""

from __future__ import annotations

import logging
import random
import tempfile
from pathlib import Path

from dask.distributed import LocalCluster

from csvfast.measure import Job, Selection
from csvfast.measure.fleet.cluster import DaskExecutor
from csvfast.measure.fleet.summary import write_summary

logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its farewells

with tempfile.TemporaryDirectory() as name:
    images = Path(name) / "images"
    images.mkdir()
    source = random.Random(1)
    for number in range(8):
        (images / f"small-{number}.img").write_bytes(source.randbytes(100_000))
    with (images / "large.img").open("wb") as file:
        file.truncate(200 << 20)  # split into ranges of 64 MiB

    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    options |= {"worker_dashboard_address": None, "local_directory": name}
    with LocalCluster(**options) as cluster, DaskExecutor(cluster) as executor:
        with Job([images], Selection("tree"), executor=executor, ledger=f"{name}/images.jsonl") as job:
            for row in job:
                print(row.digest, Path(row.name).name)
        there = job.table
        print(f"{job.progress.done} measured on {executor.threads} threads of {executor.address.partition(':')[0]} workers")

    with Job([images], Selection("tree")) as job:
        list(job)
    assert [row.facts for row in there] == [row.facts for row in job.table]
    print("a local run says the same")

    write_summary(there, f"{name}/page.html", title="Example")
    print(f"a page about it: {Path(name, 'page.html').stat().st_size} bytes")
