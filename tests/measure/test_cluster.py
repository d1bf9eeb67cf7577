"""Jobs on a real Dask cluster of several processes: the same rows as here, whatever is killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measure.dask_cluster import Cluster

import csvfast
from csvfast.cli import main
from csvfast.errors import MissingExtraError
from csvfast.measure import Item, Job, ParameterError, Row, Selection, batch
from csvfast.measure.fleet import cluster as cluster_module
from csvfast.measure.fleet import schedule
from csvfast.measure.fleet.cluster import DaskExecutor, perform_remotely
from csvfast.measure.fleet.executors import ExecutorError
from csvfast.measure.fleet.rows import Identity
from csvfast.measure.fleet.tasks import RangeTask, WholeTask
from csvfast.measure.tree import BlockHash, TreeBuilder

MIB = 1 << 20

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as one:
        one.add(2)
        yield one


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small ones, two of several ranges, and things that cannot be measured."""
    folder = tmp_path_factory.mktemp("images")
    source = random.Random(11)
    for number in range(40):
        (folder / f"{number:02}.img").write_bytes(source.randbytes(number * 331))
    (folder / "large.img").write_bytes(source.randbytes(MIB) * 5 + b"end")
    with (folder / "sparse.img").open("wb") as file:
        file.truncate(13 * MIB)
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to("circle")
    (folder / "secret").write_bytes(b"secret")
    time.sleep(0.06)
    return folder


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "RANGE_BYTES", MIB)
    monkeypatch.setattr(DaskExecutor, "range_bytes", MIB)
    monkeypatch.setattr(schedule, "TASK_FILES", 3)


def ready(cluster: Cluster, executor: DaskExecutor) -> DaskExecutor:
    deadline = time.monotonic() + 60
    while executor.threads < len(cluster.workers):
        assert time.monotonic() < deadline, (cluster.folder / "log").read_text()
        time.sleep(0.02)
    return executor


def facts(rows: list[Row]) -> list[Any]:
    return sorted(map(repr, (row.facts for row in rows)))


class KillsAt(DaskExecutor):
    """Calls a function when the n-th task is submitted."""

    def __init__(self, cluster: str, number: int, function: Any, **options: Any) -> None:
        super().__init__(cluster, **options)
        self.left, self.function = number, function

    def submit(self, task: Any, step: Any = None) -> Future[Any]:
        self.left -= 1
        if self.left == 0:
            self.function()
        return super().submit(task, step)


@pytest.mark.parametrize("mode", ["linear", "tree", "verity"])
def test_rows_are_those_of_a_local_run(
    cluster: Cluster, images: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.chdir(images.parent)  # the workers' directory is another one
    sources = [images.name, "nothing.img"]
    with DaskExecutor(cluster.address) as executor:
        ready(cluster, executor)
        with Job(sources, Selection(mode), executor=executor) as job:
            rows = list(job)
            there = job.table
        workers = {row.worker for row in rows if row.digest}
    with Job(sources, Selection(mode)) as job:
        list(job)
        here = job.table
    assert [row.facts for row in there] == [row.facts for row in here]
    assert [(row.location, row.identity) for row in there] == [(row.location, row.identity) for row in here]
    assert len(rows) == len({row.key for row in rows}) == 46
    assert not any(f"/{os.getpid()}/" in worker for worker in workers)
    assert len(workers) > 1
    if mode == "linear":
        large = next(row for row in there if row.name.endswith("large.img"))
        assert large.digest == hashlib.new("sm3", (images / "large.img").read_bytes()).hexdigest()


@pytest.mark.parametrize("mode", ["linear", "tree"])
def test_a_worker_that_is_killed_costs_nothing(cluster: Cluster, images: Path, tmp_path: Path, mode: Any) -> None:
    """Killed while tasks are under way; another one comes later."""
    def kill() -> None:
        cluster.kill()
        cluster.add()

    with KillsAt(cluster.address, 9, kill) as executor:
        ready(cluster, executor)
        with Job([images], Selection(mode), executor=executor, ledger=tmp_path / "ledger") as job:
            rows = list(job)
            table = job.table
    assert facts(rows) == facts(table) == facts(list(batch([images], mode=mode)))
    assert len(rows) == len({row.key for row in rows})
    lines = (tmp_path / "ledger").read_text().splitlines()
    assert len(lines) == 1 + len(rows)


def test_every_worker_may_be_killed(cluster: Cluster, images: Path) -> None:
    def kill() -> None:
        while cluster.workers:
            cluster.kill()
        cluster.add(2)

    with KillsAt(cluster.address, 7, kill) as executor:
        ready(cluster, executor)
        rows = list(batch([images], executor, mode="verity"))
    assert facts(rows) == facts(list(batch([images], mode="verity")))


def busy_after(cluster: Cluster, seconds: float) -> float:
    before = cluster.processor_seconds()
    time.sleep(seconds)
    return (cluster.processor_seconds() - before) / seconds


def endless(folder: Path) -> list[Path]:
    """Files that keep two workers busy for a long while."""
    for name in ("one", "two", "three"):
        with (folder / name).open("wb") as file:
            file.truncate(64 << 30)
    return [folder / name for name in ("one", "two", "three")]


def test_cancelling_ends_what_is_under_way(cluster: Cluster, tmp_path: Path) -> None:
    items = tuple(Item(str(path), str(path)) for path in endless(tmp_path))
    with DaskExecutor(cluster.address) as executor:
        ready(cluster, executor)
        futures = [executor.submit(WholeTask(number, (item,))) for number, item in enumerate(items)]
        time.sleep(0.5)
        assert not any(future.done() for future in futures)
        began = time.monotonic()
        executor.close(cancel=True)
        assert time.monotonic() - began < 8
        assert all(future.done() for future in futures)
    assert busy_after(cluster, 0.4) < 0.5
    with pytest.raises(ExecutorError, match="is closed"):
        executor.submit(WholeTask(9, items))


def test_workers_stop_when_the_job_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    endless(tmp_path)
    code = (
        "import sys; from csvfast.measure import batch; from csvfast.measure.fleet.cluster import DaskExecutor\n"
        "list(batch([sys.argv[2]], DaskExecutor(sys.argv[1])))"
    )
    job = subprocess.Popen([sys.executable, "-c", code, cluster.address, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while busy_after(cluster, 0.2) < 0.5:
            assert time.monotonic() < deadline
            assert job.poll() is None
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait(30)
    deadline = time.monotonic() + 20
    while busy_after(cluster, 0.3) > 0.3:
        assert time.monotonic() < deadline


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=f"^cluster {address}: .*expected the address of a Dask scheduler$") as caught:
        DaskExecutor(address, timeout=1)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    with pytest.raises(ExecutorError, match="no such scheduler file"):
        DaskExecutor(tmp_path / "missing.json", timeout=1)
    with pytest.raises(ExecutorError, match="nonsense"):
        DaskExecutor("nonsense://somewhere", timeout=1)
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setattr("csvfast._extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'csvfast\[dask\]'"):
        DaskExecutor(address)


def test_somebody_else_at_that_port() -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ExecutorError, match="expected the address of a Dask scheduler"):
            DaskExecutor(address, timeout=1)


def test_a_scheduler_that_goes_away_ends_the_job_and_keeps_its_rows(tmp_path: Path, images: Path) -> None:
    """Before that, it has no worker for too long."""
    with Cluster(tmp_path) as one:
        with (
            DaskExecutor(one.file, patience=1.5) as executor,
            pytest.raises(ExecutorError, match="no worker for"),
            Job([images], executor=executor) as job,
        ):
            list(job)
        one.add()
        ledger = tmp_path / "ledger"
        with KillsAt(one.address, 9, lambda: one.kill(one.scheduler), timeout=1) as executor:
            ready(one, executor)
            with (
                pytest.raises(ExecutorError, match="the scheduler is gone"),
                Job([images], executor=executor, ledger=ledger) as job,
            ):
                list(job)
    with Job([images], ledger=ledger) as job:
        rows = list(job)
    assert facts(rows) == facts(list(batch([images])))


def test_workers_refuse_another_version(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match=f"a worker has csvfast {csvfast.__version__}; expected 0.0.1"):
        perform_remotely("0.0.1", str(tmp_path), WholeTask(0, ()))


def test_another_version_on_the_workers_ends_the_job(
    cluster: Cluster, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module.csvfast, "__version__", "0.0.1")
    refused = pytest.raises(ExecutorError, match=r"a worker has csvfast .*; expected 0\.0\.1")
    with DaskExecutor(cluster.address) as executor, refused:
        list(batch([images], executor))


def test_another_file_of_the_same_name_on_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"abc" * 5000)
    status = path.stat()
    identity = Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    here = (csvfast.__version__, str(tmp_path))
    for mode in ("linear", "tree"):
        item = Item("a.img", "a.img", mode, identity=identity)  # type: ignore[arg-type]
        row = perform_remotely(*here, WholeTask(0, (item,))).rows[0]  # type: ignore[union-attr]
        assert (row.digest is not None, row.location, row.identity) == (True, "", identity)
        for other in (replace(identity, size=14999), replace(identity, mtime_ns=1)):
            row = perform_remotely(*here, WholeTask(0, (replace(item, identity=other),))).rows[0]  # type: ignore[union-attr]
            assert (row.error, row.digest) == ("changed", None)
            assert row.message is not None
            assert row.message.startswith("a.img: changed since it was found, or is another file on ")
    gone = perform_remotely(*here, RangeTask(0, Item("b.img", "b.img", "tree"), 0, 4096))
    assert gone.row is not None  # type: ignore[union-attr]
    assert gone.row.message == "b.img: no such file"  # type: ignore[union-attr]


def test_the_command(cluster: Cluster, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledgers = [tmp_path / "there", tmp_path / "here"]
    for ledger, options in zip(ledgers, (["--cluster", cluster.address], []), strict=True):
        assert main(["measure", "batch", str(images / "large.img"), "--mode", "tree", "--ledger", str(ledger), *options]) == 0
    assert main(["measure", "diff", *map(str, ledgers)]) == 0
    assert main(["measure", "verify", str(ledgers[1]), "--cluster", str(cluster.file), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["measure", "batch", str(images), "--cluster", "tcp://127.0.0.1:1x", "--jobs", "2"]) == 2
    assert main(["measure", "batch", str(images), "--cluster", str(tmp_path / "missing.json")]) not in (0, 1)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "csvfast: error: --cluster: given with --executor or --jobs; expected one place where the work is done",
        f"csvfast: error: cluster {tmp_path}/missing.json: no such scheduler file; expected the address of a Dask scheduler",
    ]


@pytest.mark.parametrize("block_bytes", [1024, 4096, 65536])
def test_a_tree_of_blocks_that_were_hashed_elsewhere(block_bytes: int) -> None:
    """Whatever comes as leaves and what as digests of whole hash blocks, the root is the same."""
    source = random.Random(block_bytes)
    block_hash = BlockHash(b"salt")
    for count in (1, 2, 3, 9):
        parts = [source.randbytes(block_bytes * source.randint(1, 5)) for _ in range(count)]
        parts.append(source.randbytes(32 * source.randint(1, 50)))  # the last range
        plain, mixed = TreeBuilder(block_hash, block_bytes), TreeBuilder(block_hash, block_bytes)
        for number, part in enumerate(parts):
            plain.add(part)
            if number < count and source.random() < 0.7:
                mixed.add_blocks(block_hash.digests(part, block_bytes), 1)
            else:
                mixed.add(part)
        assert plain.finish() == mixed.finish()
    unfinished = TreeBuilder(block_hash, block_bytes)
    unfinished.add(bytes(32))
    with pytest.raises(ParameterError, match="ends within a hash block"):
        unfinished.add_blocks(bytes(32), 1)
