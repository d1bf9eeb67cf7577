"""Reading what is measured: every kind of file, and every way in which it can fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from csvfast.measure import (
    ParameterError,
    SourceChangedError,
    SourceKindError,
    SourceNotFoundError,
    SourceTruncatedError,
    SourceUnreadableError,
)
from csvfast.measure.source import CHUNK_BYTES, Access, Source

SIZES = [0, 1, 4095, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES + 12345]


def ramp(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def read_all(source: Source, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    pieces = [bytes(chunk) for chunk in source.chunks(chunk_bytes)]
    assert all(len(piece) == chunk_bytes for piece in pieces[:-1])
    assert all(pieces), "an empty piece"
    return b"".join(pieces)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("access", ["read", "mmap"])
def test_chunks_give_the_file(tmp_path: Path, size: int, access: Access) -> None:
    (tmp_path / "f").write_bytes(ramp(size))
    with Source(tmp_path / "f", access=access) as source:
        assert source.size == size
        assert read_all(source) == ramp(size)
        source.check_unchanged()


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_odd_chunk_size(tmp_path: Path, access: Access) -> None:
    (tmp_path / "f").write_bytes(ramp(100_000))
    with Source(tmp_path / "f", access=access) as source:
        assert read_all(source, 1000) == ramp(100_000)


@pytest.mark.parametrize("size", [0, 1, 70_000, 3 * CHUNK_BYTES + 5])
def test_fifo(tmp_path: Path, size: int) -> None:
    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=(tmp_path / "p").write_bytes, args=[ramp(size)])
    writer.start()
    with Source(tmp_path / "p") as source:
        assert source.size is None
        assert read_all(source) == ramp(size)
        source.check_unchanged()
    writer.join()


def test_read_at(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(ramp(10_000))
    buffer = bytearray(100)
    with Source(tmp_path / "f") as source:
        source.read_at(memoryview(buffer), 9_000)
        assert bytes(buffer) == ramp(10_000)[9_000:9_100]
        with pytest.raises(SourceTruncatedError, match="ends at byte 10000"):
            source.read_at(memoryview(buffer), 9_950)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file") as caught:
        Source(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceKindError, match="is a directory"):
        Source(tmp_path)


def test_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(SourceKindError, match="socket"):
            Source(tmp_path / "s")


def test_permission() -> None:
    program = (
        "import os, sys\n"
        "from csvfast.measure import SourceUnreadableError\n"
        "from csvfast.measure.source import Source\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"  # root may read everything
        "try: Source(sys.argv[1])\n"
        "except SourceUnreadableError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # (pytest's own folders are closed to other users)
        path = Path(folder, "f")
        path.write_bytes(b"x")
        path.chmod(0)
        Path(folder).chmod(0o755)
        answer = subprocess.run(
            [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=60
        )
    assert answer.stdout == f"{path}: cannot be read: Permission denied\n"


def test_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SourceUnreadableError, match="cannot be read"):
        Source(tmp_path / "a")


def test_access_is_checked(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(ParameterError, match="access is 'magic'"):
        Source(tmp_path / "f", access="magic")  # type: ignore[arg-type]


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_truncated_meanwhile(tmp_path: Path, access: Access) -> None:
    size = 40 * CHUNK_BYTES
    with (tmp_path / "f").open("wb") as file:
        file.truncate(size)
    with Source(tmp_path / "f", access=access) as source:
        chunks = source.chunks()
        next(chunks)
        os.truncate(tmp_path / "f", 20 * CHUNK_BYTES)
        with pytest.raises(SourceTruncatedError, match="shrank"):
            for _ in chunks:
                pass


def changed_after_reading(path: Path, change: object) -> str:
    assert callable(change)
    with Source(path) as source:
        read_all(source)
        time.sleep(0.02)  # more than a tick of the file system's clock
        change()
        with pytest.raises(SourceChangedError) as caught:
            source.check_unchanged()
    return str(caught.value)


def test_grown(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(ramp(5000))

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    assert "size was 5000, is 5004" in changed_after_reading(path, grow)


def test_rewritten_with_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(ramp(5000))

    def rewrite() -> None:
        with path.open("r+b") as file:
            file.write(b"other")

    assert "mtime_ns was" in changed_after_reading(path, rewrite)


def test_rewritten_with_its_time_put_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(ramp(5000))
    status = path.stat()

    def rewrite() -> None:
        with path.open("r+b") as file:
            file.write(b"other")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert "ctime_ns was" in changed_after_reading(path, rewrite)


def test_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(ramp(5000))
    (tmp_path / "other").write_bytes(ramp(5000))
    assert "replaced by another file" in changed_after_reading(path, lambda: (tmp_path / "other").replace(path))


def test_vanished(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(ramp(5000))
    with Source(path) as source:
        read_all(source)
        path.unlink()
        with pytest.raises(SourceNotFoundError, match="vanished"):
            source.check_unchanged()


def test_a_file_that_lies_about_its_size() -> None:
    with Source("/proc/self/status") as source:
        assert source.size == 0
        read_all(source)
        with pytest.raises(SourceChangedError, match="holds more than the 0 bytes"):
            source.check_unchanged()


def test_input_output_error() -> None:
    # A process has nothing mapped at address 0: reading there fails as a bad sector does.
    with Source("/proc/self/mem") as source:
        with pytest.raises(SourceUnreadableError, match="/proc/self/mem: cannot be read: Input/output error"):
            source.read_at(memoryview(bytearray(10)), 0)
        with pytest.raises(SourceUnreadableError, match="Input/output error"):
            source.check_unchanged()


def test_leaving_early_ends_the_reader(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(50 * CHUNK_BYTES)
    before = threading.active_count()
    with Source(tmp_path / "f") as source:
        chunks = source.chunks()
        next(chunks)
        assert threading.active_count() == before + 1
        chunks.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before


def test_leaving_a_silent_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    keep = os.open(tmp_path / "p", os.O_RDWR)  # a writer that never writes more
    os.write(keep, ramp(4096))
    try:
        with Source(tmp_path / "p") as source:
            chunks = source.chunks(4096)
            assert bytes(next(chunks)) == ramp(4096)
            start = time.monotonic()
            chunks.close()  # type: ignore[attr-defined]
            assert time.monotonic() - start < 5
    finally:
        os.close(keep)
