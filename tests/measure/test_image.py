"""Linear digests and page trees against hashlib."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.merkle import merkle, sm3

from csvfast.measure import (
    EmptySourceError,
    ParameterError,
    SourceChangedError,
    SourceNotFoundError,
    measure_image,
    measure_images,
)
from csvfast.measure.image import Mode
from csvfast.measure.source import Access
from csvfast.measure.tree import STEP_BYTES, TASK_BYTES, BlockHash, TreeBuilder

PAGE = 4096


def write(path: Path, size: int) -> bytes:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    path.write_bytes(data)
    return data


def padded_root(data: bytes) -> bytes:
    return merkle(data + bytes(-len(data) % PAGE))[0]


@pytest.mark.parametrize("size", [0, 1, 55, 64, PAGE, 1 << 20, (3 << 20) + 7])
@pytest.mark.parametrize("access", get_args(Access))
def test_linear_equals_hashlib(tmp_path: Path, size: int, access: Access) -> None:
    data = write(tmp_path / "f", size)
    record = measure_image(tmp_path / "f", access=access)
    assert record.digest == hashlib.new("sm3", data).digest()
    assert record.hexdigest == record.to_dict()["digest"]
    assert (record.size, record.mode, record.path) == (size, "linear", str(tmp_path / "f"))
    assert record.seconds > 0


@pytest.mark.parametrize(
    "size",
    [
        1,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        2 * PAGE,
        128 * PAGE,
        128 * PAGE + 1,
        129 * PAGE,
        STEP_BYTES + 5,
        TASK_BYTES + PAGE + 1,
    ],
)
@pytest.mark.parametrize("access", get_args(Access))
@pytest.mark.parametrize("threads", [1, 3])
def test_tree_equals_the_reference(tmp_path: Path, size: int, access: Access, threads: int) -> None:
    data = write(tmp_path / "f", size)
    record = measure_image(tmp_path / "f", "tree", access=access, threads=threads)
    assert record.digest == padded_root(data)
    assert record.size == size


def test_one_page_is_its_own_root(tmp_path: Path) -> None:
    data = write(tmp_path / "f", PAGE)
    assert measure_image(tmp_path / "f", "tree").digest == sm3(data)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("size", [1, 5 * PAGE + 9, (2 << 20) + 1])
def test_fifo_equals_file(tmp_path: Path, mode: Mode, size: int) -> None:
    data = write(tmp_path / "f", size)
    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=(tmp_path / "p").write_bytes, args=[data])
    writer.start()
    record = measure_image(tmp_path / "p", mode)
    writer.join()
    assert record.digest == measure_image(tmp_path / "f", mode).digest
    assert record.size == size


@given(st.binary(max_size=40_000), st.lists(st.integers(1, 9_000), max_size=8))
def test_tree_builder_does_not_care_how_leaves_arrive(data: bytes, cuts: list[int]) -> None:
    block = 512
    data = data.ljust(-(-max(len(data), 1) // block) * block, b"\0")
    block_hash = BlockHash(b"salt")
    leaves = block_hash.digests(data, block)
    assert leaves == b"".join(sm3(b"salt", data[at : at + block]) for at in range(0, len(data), block))
    builder = TreeBuilder(block_hash, block)
    position = 0
    for cut in cuts:
        step = cut // 32 * 32
        builder.add(leaves[position : position + step])
        position += step
    builder.add(leaves[position:]) if position < len(leaves) else None
    assert builder.finish() == merkle(data, block, block, b"salt")[0]


def test_empty_tree(tmp_path: Path) -> None:
    write(tmp_path / "f", 0)
    with pytest.raises(EmptySourceError, match="at least one"):
        measure_image(tmp_path / "f", "tree")


@pytest.mark.parametrize("mode", get_args(Mode))
def test_file_changed_while_it_is_measured(tmp_path: Path, mode: Mode) -> None:
    path = tmp_path / "f"
    write(path, 30 << 20)
    changed = False

    def touch(done: int, total: int | None) -> None:
        nonlocal changed
        if not changed:
            changed = True
            with path.open("ab") as file:
                file.write(b"x")

    with pytest.raises(SourceChangedError, match="changed while it was measured"):
        measure_image(path, mode, progress=touch)
    assert changed


@pytest.mark.parametrize("mode", get_args(Mode))
def test_progress_reaches_the_end(tmp_path: Path, mode: Mode) -> None:
    write(tmp_path / "f", (17 << 20) + 5)
    seen: list[tuple[int, int | None]] = []
    measure_image(tmp_path / "f", mode, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == ((17 << 20) + 5,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 1


@pytest.mark.parametrize(("field", "value"), [("mode", "square"), ("threads", 0), ("access", "carrier pigeon")])
def test_parameters_are_checked(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path / "f", 10)
    arguments: dict[str, object] = {"mode": "tree", field: value}
    with pytest.raises(ParameterError, match=f"{field} is {value!r}"):
        measure_image(tmp_path / "f", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", get_args(Mode))
def test_many_images(tmp_path: Path, mode: Mode) -> None:
    paths = [tmp_path / f"f{index}" for index in range(7)]
    for index, path in enumerate(paths):
        write(path, 300_000 * index + 1)
    seen: list[int] = []
    records = measure_images(paths, mode, threads=3, progress=lambda done, total: seen.append(done))
    assert [record.path for record in records] == [str(path) for path in paths]
    assert [record.digest for record in records] == [measure_image(path, mode).digest for path in paths]
    assert seen[-1] == sum(path.stat().st_size for path in paths)


def test_many_images_one_missing(tmp_path: Path) -> None:
    paths = [tmp_path / f"f{index}" for index in range(5)]
    for path in paths[:-1]:
        write(path, 3 << 20)
    with pytest.raises(SourceNotFoundError, match="f4"):
        measure_images(paths, threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("csvfast-")]


def test_standard_input_once() -> None:
    with pytest.raises(ParameterError, match="used once"):
        measure_images(["-", "-"])


# What the interpreter needs with everything imported is the base line: a first small measurement brings it all in.
MEMORY_PROGRAM = """
import resource, sys
from csvfast.measure import measure_image, format_verity
mode, small, large, area = sys.argv[1:]
def measure(path):
    if mode == "verity": return format_verity(path, area, salt=b"salt").root_hash
    if mode == "mmap": return measure_image(path, access="mmap").digest
    return measure_image(path, mode).digest
measure(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(measure(large).hex())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mode", ["tree", "linear", "verity", "mmap"])
def test_memory_stays_bounded(tmp_path: Path, mode: str) -> None:
    size = (2 << 30) if mode in ("tree", "verity") else (256 << 20)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    write(tmp_path / "small", PAGE)
    arguments = [mode, tmp_path / "small", tmp_path / "large", tmp_path / "area"]
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, *arguments], capture_output=True, text=True, check=True, timeout=280
    )
    digest, kilobytes = answer.stdout.split()
    assert len(digest) == 64
    assert int(kilobytes) < 64 * 1024, f"{kilobytes} KiB above the interpreter for {size} bytes"
