"""Sizes, rates, atomic files, the progress helper."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from csvfast._files import write_atomically
from csvfast.cli.common import CommandError, format_bytes, format_rate, parse_size, progress, report_error


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("4KiB", 4096), ("4 KiB", 4096), ("4k", 4096), ("64MiB", 64 << 20), ("1G", 1 << 30), ("7B", 7)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5MiB", "1TiB", "1 2", "0x10", "４", "4KB?"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(CommandError, match="expected a whole number"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (5 << 40, "5.0 TiB")]
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("rate", "text"), [(9.87e9, "9.87 GB/s"), (152e6, "152 MB/s"), (1234, "1.23 kB/s"), (3, "3 B/s")])
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "out", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal() -> None:
    """On a real terminal (a pseudo one) a bar with a rate appears on stderr only."""
    program = (
        "import time\n"
        "from csvfast.cli.common import progress\n"
        "with progress('measuring x.img', 1 << 30) as advance:\n"
        "    for _ in range(4):\n"
        "        advance(1 << 28); time.sleep(0.15)\n"
        "print('done')\n"
    )
    import pty

    shown = bytearray()
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover  (another process)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-P", "-c", program])
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # how Linux says that the other side of a terminal is gone
        pass
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    text = shown.decode()
    assert os.waitstatus_to_exitcode(status) == 0
    assert "measuring x.img" in text
    assert "/s" in text
    assert "done" in text


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report_error(ValueError("first\n   second"))
    report_error(FileNotFoundError(2, "No such file or directory", "disk.img"))
    report_error(MemoryError())
    assert capsys.readouterr().err == (
        "csvfast: error: first second\n"
        "csvfast: error: disk.img: No such file or directory\n"
        "csvfast: error: MemoryError\n"
    )
