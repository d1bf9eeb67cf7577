"""The broker's store on SQLite: durable audit records a second, look-ups, and whether either grows with what is stored.

Goals: 4,000 single-record jobs a second through `await commit` from 64 tasks; 60 microseconds of Python a record; appending and
looking up at most 10 % slower with 1,000,000 records and 10,000 resources than with none and 10.

    pytest bench/test_bench_store.py --records 1000000      (default 100,000: a few seconds to build)

The database lies in the system's temporary directory, or below $CSVFAST_BENCH_DIRECTORY: figures are those of its disk.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import AuditRecord, Job, Store
from csvfast.broker.store.audit import canonical
from csvfast.crypto import Secret, sm3

TASKS = 64
JOBS = 6400


def record() -> AuditRecord:
    """As long as the broker's: about 900 bytes."""
    return AuditRecord(
        time=time.time_ns() // 1000,
        correlation="0123456789abcdef",
        door="kbs",
        action="release",
        outcome="allowed",
        actor="guest",
        address="192.0.2.17:40000",
        subject={
            "tee": "csv", "chip_id": "HYGN" * 4, "cek": "ce" * 32, "measure": "5e" * 32, "vm_id": "00" * 16,
            "evidence": "e1" * 32, "key": "4b" * 32,
        },
        resource="default/key/one",
        resource_version=1,
        policy={
            "appraisal": "default_cpu", "appraisal_version": 3, "appraisal_digest": "a7" * 32,
            "resource": "default", "resource_version": 2, "resource_digest": "7e" * 32,
        },
    )  # fmt: skip


def path(number: int) -> ResourcePath:
    return ResourcePath("default", "key", f"key-{number}")


def make(folder: Path, records: int, resources: int) -> Store:
    folder.mkdir(mode=0o700)
    store = Store.open(f"sqlite:///{folder / 'broker.db'}", FileMaster.create(folder / "master.key"), create=True)
    batch = [record()] * 10_000
    for start in range(0, records, len(batch)):
        store.committer.run(Job(batch[: records - start]))

    async def put() -> None:
        numbers = iter(range(resources))

        async def some() -> None:
            for number in numbers:
                await asyncio.to_thread(store.put_resource, path(number), Secret.random(32), record())

        await asyncio.gather(*[some() for _ in range(16)])

    asyncio.run(put())
    return store


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("CSVFAST_BENCH_DIRECTORY"), prefix="csvfast-bench-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def stores(folder: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Store]]:
    records = int(request.config.getoption("--records"))
    made = {"small": make(folder / "small", 0, 10), "large": make(folder / "large", records, 10_000)}
    yield made
    for store in made.values():
        store.close()


async def flood(store: Store, jobs: int = JOBS) -> None:
    async def task() -> None:
        for _ in range(jobs // TASKS):
            await store.committer.commit(Job((record(),), store.generation))

    await asyncio.gather(*[task() for _ in range(TASKS)])


@pytest.mark.parametrize("size", ["small", "large"])
def test_commit(benchmark: Any, stores: dict[str, Store], size: str) -> None:
    benchmark.group = f"store: {JOBS} jobs of one record, {TASKS} tasks (time is for all of them)"
    benchmark.pedantic(lambda: asyncio.run(flood(stores[size])), rounds=5, warmup_rounds=1)
    begun, used = time.perf_counter(), time.process_time()
    asyncio.run(flood(stores[size]))
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    benchmark.extra_info |= {"jobs_per_second": round(JOBS / seconds), "cpu_us_per_record": round(used / JOBS * 1e6, 1)}


@pytest.mark.parametrize("size", ["small", "large"])
def test_append_alone(benchmark: Any, stores: dict[str, Store], size: str) -> None:
    benchmark.group = "store: one record at a time, durable"
    benchmark.pedantic(lambda: stores[size].committer.run(Job((record(),))), rounds=300, warmup_rounds=20)


def test_python_of_a_record(benchmark: Any) -> None:
    benchmark.group = "store: make, encode and hash a record"
    benchmark(lambda: sm3(bytes(32) + canonical(record())).digest())


@pytest.mark.parametrize("size", ["small", "large"])
def test_look_up(benchmark: Any, stores: dict[str, Store], size: str) -> None:
    benchmark.group = "store: a resource from the database, unsealed"
    store, numbers = stores[size], itertools.cycle(range(10 if size == "small" else 10_000))

    def look_up() -> None:
        store.resources.forget()
        assert store.resource(path(next(numbers))) is not None

    benchmark(look_up)


@pytest.mark.parametrize("size", ["small", "large"])
def test_look_up_known(benchmark: Any, stores: dict[str, Store], size: str) -> None:
    benchmark.group = "store: a resource from memory"
    store = stores[size]
    for number in range(10):
        store.resource(path(number))
    benchmark(lambda: store.cached_resource(path(7)))


def test_verify(benchmark: Any, stores: dict[str, Store]) -> None:
    benchmark.group = "store: verify the whole log (time is for all records)"
    found = benchmark.pedantic(stores["large"].verify_audit, rounds=1)
    assert found.intact
    benchmark.extra_info["records"] = found.count
