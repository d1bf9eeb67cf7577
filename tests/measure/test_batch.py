"""Jobs: digests against OpenSSL and the single-image functions, errors as rows, resuming, kills, executors."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import csvfast
from csvfast import _core
from csvfast.measure import (
    Item,
    Job,
    Options,
    ParameterError,
    ProcessExecutor,
    RecipeError,
    Row,
    Selection,
    TargetError,
    ThreadExecutor,
    batch,
    format_verity,
    launch_digest,
    measure_image,
)
from csvfast.measure.fleet import lanes, schedule, tasks
from csvfast.measure.fleet.executors import WorkerLostError
from csvfast.measure.fleet.ledger import Ledger, read_ledger
from csvfast.measure.fleet.providers import identity_of
from csvfast.measure.fleet.rows import Identity

MIXED = (0, 1, 63, 64, 65, 4095, 4096, 4097, 65536, 262144, 262145, 300_001, 1_000_000)


def make_files(folder: Path, sizes: tuple[int, ...] = MIXED, *, seed: int = 1) -> dict[str, bytes]:
    source = random.Random(seed)
    folder.mkdir(exist_ok=True)
    contents = {}
    for number, size in enumerate(sizes):
        path = folder / f"{number:04}.img"
        contents[str(path)] = source.randbytes(size)
        path.write_bytes(contents[str(path)])
        os.utime(path, (1_700_000_000, 1_700_000_000))
    time.sleep(0.06)  # so that their last change is not within the clock's tick before the measurement
    return contents


def sm3(data: bytes) -> str:
    return hashlib.new("sm3", data).hexdigest()


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_linear_digests_are_those_of_openssl(tmp_path: Path, access: str) -> None:
    contents = make_files(tmp_path / "images")
    with Job([tmp_path / "images"], access=access) as job:
        rows = list(job)
    assert {row.name: row.digest for row in rows} == {name: sm3(data) for name, data in contents.items()}
    assert {row.name: row.size for row in rows} == {name: len(data) for name, data in contents.items()}
    assert [row.name for row in job.table] == sorted(contents)
    assert job.progress.done == len(contents)
    assert job.progress.measured_bytes == sum(map(len, contents.values()))


@pytest.mark.parametrize("kernel", _core.kernels("sm3-many", available=True))
def test_lanes_of_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(lanes, "SMALL_BYTES", 100)
    monkeypatch.setattr(lanes, "PIECE_BYTES", 1000)
    contents = make_files(tmp_path / "images", tuple(range(0, 9000, 170)))
    csvfast.force_kernel("sm3-many", kernel)
    try:
        rows = list(batch([tmp_path / "images"], jobs=1))
    finally:
        csvfast.force_kernel("sm3-many", None)
    assert {row.name: row.digest for row in rows} == {name: sm3(data) for name, data in contents.items()}


def test_update_many_is_update_for_each() -> None:
    source = random.Random(3)
    streams = [_core.sm3() for _ in range(40)]
    wanted = [hashlib.new("sm3") for _ in streams]
    for _ in range(20):
        count = source.choice((0, 1, 5, 17, 33, 40))
        chosen = source.sample(range(40), count)
        pieces = [source.randbytes(source.choice((0, 1, 63, 64, 65, 500, 4096))) for _ in chosen]
        _core.sm3_update_many([streams[index] for index in chosen], pieces)
        for index, piece in zip(chosen, pieces, strict=True):
            wanted[index].update(piece)
    assert [stream.digest() for stream in streams] == [stream.digest() for stream in wanted]
    with pytest.raises(csvfast.errors.ArgumentError, match="more than once"):
        _core.sm3_update_many([streams[0], streams[0]], [b"", b""])
    with pytest.raises(csvfast.errors.ArgumentError, match="1 buffers for 2"):
        _core.sm3_update_many(streams[:2], [b""])
    with pytest.raises(TypeError, match="stream 0 must be an sm3"):
        _core.sm3_update_many([hashlib.sha256()], [b""])  # type: ignore[list-item]
    with pytest.raises(csvfast.errors.BufferTypeError, match="buffer 1"):
        _core.sm3_update_many(streams[:2], [b"", "text"])  # type: ignore[list-item]
    assert [stream.digest() for stream in streams] == [stream.digest() for stream in wanted]


def test_small_files_leaves_everything_else_alone(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"abc")
    (tmp_path / "large").write_bytes(bytes(200))
    os.mkfifo(tmp_path / "pipe")
    names = [os.fsencode(tmp_path / name) for name in ("good", "large", "pipe", "missing", "")]
    names = [*names, b"/proc/self/status", b"/dev/zero", names[0]]
    status = (tmp_path / "good").stat()
    good = Identity(3, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    found = [good] * len(names)
    found[1] = identity_of(200, (tmp_path / "large").stat())
    digest = hashlib.new("sm3", b"abc").digest()
    assert _core.sm3_small_files(names, found, bytearray(200), 199) == [digest, None, None, None, None, None, None, digest]
    for member in ("size", "mtime_ns", "ctime_ns", "inode"):
        for change in (-1, 1):
            other = replace(good, **{member: getattr(good, member) + change})
            assert _core.sm3_small_files(names[:1], [other], bytearray(200), 199) == [None], member
    with pytest.raises(csvfast.errors.LengthError, match="more than the limit"):
        _core.sm3_small_files(names, found, bytearray(199), 199)
    with pytest.raises(csvfast.errors.ArgumentError, match="1 identities for 2"):
        _core.sm3_small_files(names[:2], found[:1], bytearray(200), 199)
    with pytest.raises(TypeError, match="without NUL"):
        _core.sm3_small_files([b"a\0b"], found[:1], bytearray(199), 100)
    with pytest.raises(OverflowError):
        _core.sm3_small_files(names[:1], [replace(good, size=-1)], bytearray(200), 199)


@pytest.mark.parametrize("range_bytes", [1 << 20, 64 << 20])
def test_trees_are_those_of_single_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int) -> None:
    for module in (tasks, schedule):
        monkeypatch.setattr(module, "RANGE_BYTES", range_bytes)
    contents = make_files(tmp_path / "images", (1, 4096, 5000, 1 << 20, (1 << 20) + 1, (3 << 20) + 4097))
    wanted = {name: measure_image(name, "tree").hexdigest for name in contents}
    for access in ("read", "mmap"):
        with Job([tmp_path / "images"], Selection("tree"), access=access) as job:  # type: ignore[arg-type]
            assert {row.name: row.digest for row in job} == wanted
    salt = bytes(range(20))
    rows = {row.name: row for row in batch([tmp_path / "images"], mode="verity", salt=salt, block_bytes=1024)}
    for name, data in contents.items():
        if len(data) < 1024:
            assert rows[name].error == "empty"
            continue
        record = format_verity(name, salt=salt, data_block_bytes=1024, hash_block_bytes=1024)
        assert (rows[name].digest, rows[name].uncovered) == (record.root_hash.hex(), record.uncovered_bytes)
    assert all(row.ok for row in batch([tmp_path / "images" / "0000.img"], mode="tree"))
    (tmp_path / "empty").touch()
    assert [row.error for row in batch([tmp_path / "empty"], mode="tree")] == ["empty"]


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_trees_of_sparse_files(tmp_path: Path, access: Any) -> None:
    for number, (parts, size) in enumerate(
        (((), 40 << 20), ((0,), 40 << 20), ((17 << 20,), (40 << 20) + 5), ((1 << 20, (33 << 20) + 777), (34 << 20) + 12345))
    ):
        with (tmp_path / str(number)).open("wb") as file:
            file.truncate(size)
            for part in parts:
                file.seek(part)
                file.write(random.Random(part).randbytes(5000))
        data = (tmp_path / str(number)).read_bytes()
        (tmp_path / "full").write_bytes(data)
        for selection in (Selection("tree"), Selection("verity", options=Options("0102", 65536))):
            names = [tmp_path / str(number), tmp_path / "full"]
            with Job(names, selection, access=access) as job:
                digests = {row.digest for row in job}
            assert len(digests) == 1
            if selection.mode == "tree":
                assert digests == {measure_image(tmp_path / "full", "tree").hexdigest}


def test_recipes(tmp_path: Path) -> None:
    (tmp_path / "firmware").write_bytes(b"\1" * 8192)
    (tmp_path / "good.toml").write_text('firmware = "firmware"\n')
    (tmp_path / "other.toml").write_text(f'firmware = "firmware"\nexpect = "{"0" * 64}"\n')
    (tmp_path / "bad.toml").write_text('firmware = "firmware"\nkernal = "x"\n')
    (tmp_path / "missing.toml").write_text('firmware = "nothing"\n')
    with Job([tmp_path], Selection("launch", patterns=("*.toml",)), ledger=tmp_path / "ledger") as job:
        list(job)
    rows = {Path(row.name).stem: row for row in job.table}
    assert rows["good"].digest == launch_digest(tmp_path / "firmware").hexdigest
    assert rows["good"].ok
    assert (rows["other"].ok, rows["other"].digest) == (False, rows["good"].digest)
    assert (rows["bad"].error, rows["missing"].error) == ("format", "not-found")
    time.sleep(0.06)
    for kept in (0, 2):
        with Job([tmp_path], Selection("launch", patterns=("*.toml",)), ledger=tmp_path / "ledger") as job:
            list(job)
        assert job.progress.kept in (kept, 2)
    (tmp_path / "firmware").write_bytes(b"\2" * 8192)
    with Job([tmp_path / "good.toml"], Selection("launch"), ledger=tmp_path / "ledger") as job:
        assert [row.digest for row in job] == [launch_digest(tmp_path / "firmware").hexdigest]


def test_bad_sources_are_rows(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "dead").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "socket"))
        rows = {Path(row.name).name: row for row in batch([tmp_path])}
    assert {name: row.error for name, row in rows.items()} == {
        "good": None,
        "pipe": "kind",
        "circle": "loop",
        "self": "loop",
        "dead": "not-found",
        "socket": "kind",
    }
    assert all(name in (row.message or "") for name, row in rows.items() if row.error)
    others = ["/dev/zero", "-", "/nowhere", "nul\0", "gopher://host/x", "/proc/self/status"]
    assert [row.error for row in batch(others)] == ["kind", "kind", "not-found", "option", "option", "changed"]


def test_a_file_that_changes_or_goes_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = make_files(tmp_path / "images", (600_000, 600_000, 600_000, 600_000))
    names = list(contents)
    update = _core.sm3_update_many

    def interfere(*arguments: Any) -> None:
        update(*arguments)
        Path(names[0]).unlink(missing_ok=True)
        os.truncate(names[1], 100)
        with Path(names[2]).open("ab") as file:
            file.write(b"x")

    monkeypatch.setattr(lanes._core, "sm3_update_many", interfere)
    with Job(names, jobs=1, access="read") as job:
        rows = {row.name: row for row in job}
    assert [rows[name].error for name in names] == ["not-found", "truncated", "changed", None]


@pytest.mark.parametrize("mode", ["linear", "tree"])
def test_a_mapped_file_that_is_truncated_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    contents = make_files(tmp_path / "images", (600_000, 600_000, 600_000))
    names = list(contents)
    calls = {"linear": "sm3_update_mapped", "tree": "sm3_blocks_mapped"}
    hashed = getattr(_core, calls[mode])
    results = []

    def interfere(*arguments: Any, **options: Any) -> Any:
        if mode == "linear" or len(results) == 1:  # when it is open
            os.truncate(names[1], 100)
        results.append(hashed(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(_core, calls[mode], interfere)
    with Job(names, Selection(mode), jobs=1) as job:
        rows = {row.name: row for row in job}
    assert [rows[name].error for name in names] == [None, "truncated", None]
    assert [rows[name].digest for name in names[::2]] == [measure_image(name, mode).hexdigest for name in names[::2]]
    assert (results == [[True, False, True]]) if mode == "linear" else (None in results)


def test_mapped_files(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(100_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("r+b") as file:
        number = file.fileno()
        parts = [(0, 100_000), (1, 4096), (4095, 65), (8192, 0), (99_999, 1)]
        streams = [_core.sm3(b"before") for _ in parts]
        done = _core.sm3_update_mapped(streams, [(number, *part) for part in parts])
        assert done == [True, True, True, False, True]  # nothing is not mapped, either
        wanted = [sm3(b"before" + data[start : start + length]) for start, length in parts]
        assert [stream.hexdigest() for stream in streams] == wanted
        for offset, count, salt in ((0, 24, b""), (4096, 3, bytes(65)), (1, 2, b"s")):
            part = data[offset : offset + 4096 * count]
            assert _core.sm3_blocks_mapped(number, offset, 4096 * count, prefix=salt) == _core.sm3_blocks(part, prefix=salt)
        assert _core.sm3_blocks_mapped(number, 0, 0) == b""
        file.truncate(4096)
        later = [(number, 4096 * at, 4096) for at in (1, 2, 3, 4, 5, 0)]
        assert _core.sm3_update_mapped([*streams, _core.sm3()], later) == [False] * 5 + [True]
        assert [stream.hexdigest() for stream in streams] == wanted
        assert _core.sm3_blocks_mapped(number, 0, 8192) is None
    assert _core.sm3_update_mapped(streams[:1], [(-1, 0, 5)]) == [False]
    assert _core.sm3_blocks_mapped(-1, 0, 4096) is None
    assert _core.sm3_update_mapped([], []) == []
    with pytest.raises(csvfast.errors.ArgumentError, match="more than once"):
        _core.sm3_update_mapped([streams[0], streams[0]], [(0, 0, 1), (0, 0, 1)])
    with pytest.raises(csvfast.errors.ArgumentError, match="1 windows for 2"):
        _core.sm3_update_mapped(streams[:2], [(0, 0, 1)])
    with pytest.raises(OverflowError):
        _core.sm3_update_mapped(streams[:1], [(0, -1, 1)])
    with pytest.raises(csvfast.errors.LengthError, match="multiple of block_length"):
        _core.sm3_blocks_mapped(0, 0, 4095)


@pytest.mark.parametrize("kernel", csvfast.info()["kernels"]["sm3-many"]["available"])
@pytest.mark.parametrize("mode", ["linear", "tree"])
def test_every_kernel(tmp_path: Path, kernel: str, mode: Any) -> None:
    contents = make_files(tmp_path / "images", tuple(range(3000, 330_000, 9001)))
    wanted = {name: measure_image(name, mode).hexdigest for name in contents}
    csvfast.force_kernel("sm3-many", kernel)
    try:
        for access in ("read", "mmap"):
            with Job([tmp_path / "images"], Selection(mode), access=access, jobs=1) as job:  # type: ignore[arg-type]
                assert {row.name: row.digest for row in job} == wanted
    finally:
        csvfast.force_kernel("sm3-many", None)


_FAULTS = """
import ctypes, mmap, os, signal, sys, tempfile
from csvfast import _core
file = tempfile.TemporaryFile()
file.truncate(8192)
mapping = mmap.mmap(file.fileno(), 8192)
assert _core.sm3_update_mapped([_core.sm3()], [(file.fileno(), 0, 8192)]) == [True]
os.ftruncate(file.fileno(), 0)
assert _core.sm3_blocks_mapped(file.fileno(), 0, 8192) is None
if sys.argv[1] == "taken":
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
    file.truncate(8192)
    assert _core.sm3_update_mapped([_core.sm3()], [(file.fileno(), 0, 8192)]) == [False]
elif sys.argv[1] == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
    print("went on")
else:
    mapping[0]
    print("went on")
"""


@pytest.mark.parametrize("way", ["fault", "handler", "sent", "taken"])
def test_faults_of_others_are_not_swallowed(way: str) -> None:
    options = ["-X", "faulthandler"] if way == "handler" else []
    done = subprocess.run([sys.executable, *options, "-c", _FAULTS, way], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if way == "taken" else -signal.SIGBUS), done.stderr
    assert done.stdout == ""
    assert ("Fatal Python error: Bus error" in done.stderr) == (way == "handler")


def test_large_image_that_changed_since_it_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tasks, schedule):
        monkeypatch.setattr(module, "RANGE_BYTES", 1 << 20)
    path = tmp_path / "image"
    path.write_bytes(bytes(3 << 20))

    class Changing(ThreadExecutor):
        def submit(self, task: Any, step: Any = None) -> Future[Any]:
            os.utime(path)
            return super().submit(task, step)

    with Changing(1) as executor:
        (row,) = batch([path], executor, mode="tree")
    assert (row.error, "changed" in str(row.message)) == ("changed", True)


def test_resuming_measures_only_what_changed(tmp_path: Path) -> None:
    contents = make_files(tmp_path / "images")
    ledger = tmp_path / "ledger.jsonl"

    def run() -> Job:
        with Job([tmp_path / "images"], ledger=ledger) as job:
            list(job)
        return job

    first = run()
    assert (first.progress.kept, first.progress.done) == (0, len(contents))
    second = run()
    assert (second.progress.kept, second.progress.done) == (len(contents), 0)
    assert [row.facts for row in second.table] == [row.facts for row in first.table]
    name = sorted(contents)[5]
    Path(name).write_bytes(bytes(4095))
    os.utime(name, (1_700_000_000, 1_700_000_000))  # the same size and mtime: the ctime tells
    Path(sorted(contents)[6]).unlink()
    third = run()
    assert (third.progress.kept, third.progress.done) == (len(contents) - 2, 1)
    assert {row.name: row.digest for row in third.table}[name] == sm3(bytes(4095))
    assert len(third.table) == len(contents) - 1
    with Job([tmp_path / "images"], ledger=ledger, fresh=True) as job:
        list(job)
    assert job.progress.kept == 0
    with Job([tmp_path / "images"], Selection("tree"), ledger=ledger) as job:
        list(job)
    assert job.progress.kept == 0


def test_a_file_that_changed_just_before_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for kept in (0, 0):
        path.write_bytes(b"abc")
        with Job([path], ledger=tmp_path / "ledger") as job:
            list(job)
        with Job([path], ledger=tmp_path / "ledger") as job:
            list(job)
        assert job.progress.kept == kept


def test_ledgers(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    rows = [Row(f"name {number}\n", "linear", digest=f"{number:064x}", size=number) for number in range(100)]
    with Ledger(path) as ledger:
        ledger.add(rows)
        ledger.add([Row("name 1\n", "linear", error="kind", message="no")])
        with pytest.raises(TargetError, match="in use by another job"):
            Ledger(path)
    whole = path.read_bytes()
    for cut in (1, 20, 100, 3000):
        path.write_bytes(whole[:-cut])
        left = list(read_ledger(path).values())
        with Ledger(path) as ledger:
            assert ledger.repaired == len(whole[:-cut].rsplit(b"\n", 1)[1])
            assert list(ledger.rows.values()) == left
        assert path.read_bytes() == whole[:-cut].rsplit(b"\n", 1)[0] + b"\n"
    for text, message in (
        (b"something else\n", "line 1: is no ledger"),
        (b"something", "line 1: is no ledger"),
        (whole.replace(b'"name 50', b'"nam'), None),
        (whole + b"{}\n", "line 103: a row needs a name"),
        (whole + b'{"name": 1}\n', "line 103: a row's name is 1"),
        (whole + b'{"name":\n', "line 103: column 9"),
        (whole + b'{"name": "a", "mode": "linear", "error": "kind", "started": NaN}\n', "line 103: a row's started is nan"),
        (whole + b'{"name": "a", "mode": "linear", "error": "kind", "size": -1}\n', "line 103: a row's size is -1"),
    ):
        path.write_bytes(text)
        if message is None:
            continue
        with pytest.raises(RecipeError, match=message):
            Ledger(path)
        assert path.read_bytes() == text
    path.write_bytes(whole[:20])
    with Ledger(path) as ledger:  # a kill in the first line
        assert ledger.rows == {}
    assert path.read_bytes() == whole.split(b"\n")[0] + b"\n"
    with pytest.raises(TargetError, match="cannot be written"):
        Ledger(tmp_path / "no" / "ledger")
    if Path("/dev/full").exists():
        with pytest.raises(TargetError, match="No space"):
            Ledger("/dev/full")


def test_rows_survive_json() -> None:
    plain = Row("a", "linear", digest="0" * 64, size=1, started=1.5, seconds=0.25, worker="w")
    others = [
        replace(plain, name="\udcff\n", mode="verity", options=Options("00ff", 512).text(), uncovered=3, location="b"),
        replace(plain, size=0, expect="1" * 64, content="disk"),
        Row("c", "tree", error="changed", message="why"),
        replace(plain, identity=replace(plain.identity, size=1, mtime_ns=2, ctime_ns=3, inode=4, device=5)),
    ]
    for row in (plain, *others):
        assert json.loads(row.to_line()) == json.loads(json.dumps(row.to_json()))
        assert Row.from_json(json.loads(row.to_line())) == row
    assert Options.parse(others[0].options) == Options("00ff", 512)


KILLED = """
import sys
from csvfast.measure import Job
from csvfast.measure.fleet import schedule, lanes
schedule.TASK_FILES = 3
with Job([sys.argv[1]], ledger=sys.argv[2], jobs=2) as job:
    sys.stdout.write("go\\n"); sys.stdout.flush()
    for row in job:
        pass
"""


def test_killed_at_any_moment_the_next_run_gives_the_same_table(tmp_path: Path) -> None:
    """A hundred kills by forked processes, each after a random time; what they leave is what an uninterrupted run has."""
    make_files(tmp_path / "images", tuple(range(0, 40_000, 400)))
    with Job([tmp_path / "images"]) as job:
        list(job)
    wanted = [row.facts for row in job.table]
    ledger = tmp_path / "ledger"
    source = random.Random(5)
    cut_short = 0
    for run in range(100):
        if run % 5 == 0:
            ledger.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            try:
                schedule.TASK_FILES = 3  # type: ignore[misc]
                with Job([tmp_path / "images"], ledger=ledger, jobs=2) as inner:
                    for _ in inner:
                        time.sleep(0.0001)
            finally:
                os._exit(0)
        time.sleep(source.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        cut_short += os.WIFSIGNALED(status)
        if run % 5 == 4:
            with Job([tmp_path / "images"], ledger=ledger) as job:
                list(job)
            assert [row.facts for row in job.table] == wanted, run
            kept = [row.facts for row in sorted(read_ledger(ledger).values(), key=lambda row: row.name)]
            assert kept == wanted, run
    assert cut_short > 50


def test_a_whole_process_killed(tmp_path: Path) -> None:
    make_files(tmp_path / "images", (300_000,) * 40)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "images"), str(tmp_path / "ledger")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    process.kill()
    process.wait()
    process.stdout.close()
    with Job([tmp_path / "images"], ledger=tmp_path / "ledger") as job:
        list(job)
    with Job([tmp_path / "images"]) as other:
        list(other)
    assert [row.facts for row in job.table] == [row.facts for row in other.table]


def test_processes_give_what_threads_give_and_survive_a_kill(tmp_path: Path) -> None:
    make_files(tmp_path / "images", (300_000, 5000, 0, 70_000) * 5)
    (tmp_path / "images" / "gone").symlink_to("nowhere")
    wanted = [row.facts for row in batch([tmp_path / "images"])]
    with ProcessExecutor(2) as executor:
        with Job([tmp_path / "images"], executor=executor) as job:
            list(job)
        assert [row.facts for row in job.table] == sorted(wanted, key=lambda facts: str(facts[0]))
        assert len(executor._processes) == 2
        for process in executor._processes:
            process.kill()
        with Job([tmp_path / "images"], executor=executor) as job:
            list(job)
        assert [row.facts for row in job.table] == sorted(wanted, key=lambda facts: str(facts[0]))


def test_processes_are_killed_in_the_middle(tmp_path: Path) -> None:
    """Of large results, again and again, by somebody else; and by the executor itself, which must not wait for them."""
    path = tmp_path / "image"
    path.write_bytes(bytes(10))
    os.truncate(path, 1 << 30)
    executor = ProcessExecutor(2)
    with Job([path], Selection("tree"), executor=executor, retries=1000) as job:
        rows = iter(job)
        ended = threading.Event()

        def kill() -> None:
            while not ended.wait(0.15):
                for process in list(executor._processes)[:1]:
                    process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        time.sleep(0.5)
        threading.Timer(1.0, ended.set).start()
        (row,) = rows
        killer.join()
    assert row.digest == measure_image(path, "tree").hexdigest
    futures = [executor.submit(tasks.RangeTask(number, Item("x", str(path), "tree"), 0, 1 << 30)) for number in range(5)]
    time.sleep(0.1)
    before = time.monotonic()
    executor.close(cancel=True)
    assert time.monotonic() - before < 5
    assert all(future.done() for future in futures)


class Losing(ThreadExecutor):
    """Loses the worker of each task a few times."""

    def __init__(self, times: int) -> None:
        super().__init__(2)
        self.left: dict[int, int] = {}
        self.times = times

    def submit(self, task: Any, step: Any = None) -> Future[Any]:
        left = self.left.setdefault(task.number, self.times)
        if left == 0:
            return super().submit(task, step)
        self.left[task.number] -= 1
        future: Future[Any] = Future()
        future.set_exception(WorkerLostError("gone"))
        return future


def test_lost_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tasks, schedule):
        monkeypatch.setattr(module, "RANGE_BYTES", 1 << 20)
    make_files(tmp_path / "images", (3 << 20, 5000, 300_000))
    for mode in ("linear", "tree"):
        wanted = sorted(row.facts for row in batch([tmp_path / "images"], mode=mode))  # type: ignore[arg-type]
        with Losing(3) as executor:
            assert sorted(row.facts for row in batch([tmp_path / "images"], executor, mode=mode)) == wanted  # type: ignore[arg-type]
        with Losing(4) as executor:
            rows = list(batch([tmp_path / "images"], executor, mode=mode))  # type: ignore[arg-type]
        assert [row.error for row in rows] == ["lost"] * 3


class Breaking(ThreadExecutor):
    def submit(self, task: Any, step: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(ZeroDivisionError("a defect"))
        return future


def test_a_defect_is_a_row(tmp_path: Path) -> None:
    make_files(tmp_path / "images", (10,))
    with Breaking(1) as executor:
        (row,) = batch([tmp_path / "images"], executor)
    assert (row.error, "ZeroDivisionError: a defect" in str(row.message)) == ("internal", True)


def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    make_files(tmp_path / "images", (300_000,) * 10)
    rows: Iterator[Row] = batch([tmp_path / "images"], jobs=1)
    next(rows)
    rows.close()  # type: ignore[attr-defined]


def test_parameters(tmp_path: Path) -> None:
    for arguments, message in (
        ({"mode": "square"}, "mode is 'square'"),
        ({"content": "x"}, "content is 'x'"),
        ({"options": Options("00")}, "expected mode 'verity'"),
        ({"mode": "verity", "options": Options("0")}, "salt is '0'"),
        ({"mode": "verity", "options": Options("00" * 257)}, "salt has 257"),
        ({"mode": "verity", "options": Options("", 1000)}, "power of two"),
        ({"mode": "launch", "content": "disk"}, "expected content 'file'"),
    ):
        with pytest.raises(ParameterError, match=message):
            Selection(**arguments)  # type: ignore[arg-type]
    for jobs in (0, 1025):
        with pytest.raises(ParameterError, match="jobs is"):
            Job([tmp_path], jobs=jobs)
    with pytest.raises(ParameterError, match="access is"):
        Job([tmp_path], access="x")


def test_names_and_expectations(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    good, bad = sm3(b"abc"), "0" * 64
    items = [Item("one", str(tmp_path / "file"), expect=good), Item("two", str(tmp_path / "file"), expect=bad)]
    with Job(items, ledger=tmp_path / "ledger") as job:
        list(job)
    assert [(row.name, row.ok, row.location) for row in job.table] == [
        ("one", True, str(tmp_path / "file")),
        ("two", False, str(tmp_path / "file")),
    ]
    assert job.progress.failed == 1
