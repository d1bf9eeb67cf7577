"""Memory traces: reading them, running them, drawing what comes out, and the command."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csvfast import EncryptedMemory, errors
from csvfast.cli import main
from csvfast.machine import Trace, draw_sweep, read_trace, run_trace, sweep
from csvfast.machine.trace import last_level
from csvfast.memory import CacheLevel, CacheModel, Tlb

LACKEY = b"""==12== Lackey, an example Valgrind tool
==12==
I  0401ab70,3
 S 1fff000738,8
 L 1fff000ffc,8
 M 04a468c0,4
I  0401b771,7
==12== Exit code:       0
"""
KIND = np.dtype([("address", "u8"), ("length", "u4"), ("access", "u4")])


def records(trace: Trace) -> list[tuple[int, int, int]]:
    return [tuple(map(int, one)) for one in trace.accesses]


def random_trace(count: int, span: int, seed: int = 1) -> Trace:
    source = np.random.default_rng(seed)
    accesses = np.empty(count, dtype=KIND)
    accesses["address"] = 0x7FFF_F000_0000 + source.integers(0, span, count)
    accesses["length"] = source.integers(1, 17, count)
    accesses["access"] = source.integers(0, 2, count)
    return Trace(accesses, 0)


# ---- Reading


def test_lackey() -> None:
    trace = read_trace(io.BytesIO(LACKEY))
    assert records(trace) == [(0x1FFF000738, 8, 1), (0x1FFF000FFC, 8, 0), (0x4A468C0, 4, 0), (0x4A468C0, 4, 1)]
    assert trace.instructions == 2
    whole = read_trace(io.BytesIO(LACKEY.replace(b"\n", b"\r\n")), format="lackey", instructions=True)
    assert records(whole)[0] == (0x401AB70, 3, 2)
    assert len(whole) == 6


def test_din(tmp_path: Path) -> None:
    path = tmp_path / "trace.din"
    path.write_bytes(b"2 415130\n0 1000\n1 0x7ffe38 a comment\n\n 1  8")
    trace = read_trace(path)
    assert records(trace) == [(0x1000, 4, 0), (0x7FFE38, 4, 1), (8, 4, 1)]
    assert trace.instructions == 1
    assert records(read_trace(str(path), instructions=True, limit=2, din_length=8)) == [(0x415130, 8, 2), (0x1000, 8, 0)]


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"".join(b" %s %x,%d\n" % (b"LSM"[at % 3 :][:1], at * 37, at % 16 + 1) for at in range(3000))
    expected = records(read_trace(io.BytesIO(text)))
    monkeypatch.setattr("csvfast.machine.trace._CHUNK", 101)
    assert records(read_trace(io.BytesIO(text))) == expected
    assert len(expected) == 4000


@pytest.mark.parametrize(
    ("text", "options", "kind", "message"),
    [
        (b"", {}, errors.LengthError, "no accesses"),
        (b"I  401,3\n", {}, errors.LengthError, "1 instruction fetches"),
        (b"==1== only valgrind\n", {}, errors.LengthError, "no accesses"),
        (b" L 10,0\n", {}, errors.LengthError, "access 0 has 0 bytes"),
        (b" L 10,4097\n", {}, errors.LengthError, "4097 bytes"),
        (b"\x7fELF\x02\x01", {}, errors.FormatError, "expected an access as lackey or Dinero"),
        (b" L 10,8\n 0 10\n", {}, errors.FormatError, r"offset 8 \(0x8\): found ' 0 10'; expected an access in the lackey"),
        (b"0 10\n3 10\n", {}, errors.FormatError, "offset 5"),
        (b"0 10\n0 12345678123456789\n", {}, errors.FormatError, "offset 5"),
        (b"0 10\n", {"format": "lackey"}, errors.FormatError, "offset 0"),
        (b"0 10\n", {"format": "gem5"}, errors.ArgumentError, "format must be one of"),
        (b"0 10\n", {"limit": 0}, errors.ArgumentError, "limit is 0"),
        (b"0 10\n", {"din_length": 0}, errors.ArgumentError, "din_length is 0"),
        (b"x" * (9 << 20), {}, errors.FormatError, "without a line's end"),
    ],
)
def test_bad_traces(text: bytes, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_trace(io.BytesIO(text), **options)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_trace_of_valgrind(tmp_path: Path) -> None:
    path = tmp_path / "true.trace"
    subprocess.run(
        ["valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-file={path}", "/bin/true"], check=True, capture_output=True
    )
    trace = read_trace(path)
    lines = path.read_bytes().splitlines()
    assert trace.instructions == sum(line.startswith(b"I ") for line in lines) > 10_000
    assert len(trace) == sum(1 + line.startswith(b" M") for line in lines if line[:3] in (b" L ", b" S ", b" M "))
    result = run_trace(trace)
    assert 0 < result.misses < result.lines / 20
    assert result.bytes_decrypted == result.misses * 64


# ---- Running


def test_counts_are_those_of_plain_accesses() -> None:
    """Page 0 of the trace is frame 0 and so on: the same accesses at physical addresses, less the walks."""
    levels = (CacheLevel(1024, 2, 1), CacheLevel(8192, 4, 10))
    trace = random_trace(5000, 16 * 4096)
    touched = [(address >> 12, (address + length - 1) >> 12) for address, length, _ in records(trace)]
    order = list(dict.fromkeys(page for pair in touched for page in pair))
    # A TLB that holds everything: 16 or 17 walks of four entries each, that disturb the caches a little.
    result = run_trace(trace, levels=levels, tlb=Tlb(64, 64), memory_cycles=100, encryption_cycles=10)
    assert result.tlb_misses == len(order)
    assert result.walk_reads == 4 * len(order)
    with EncryptedMemory(len(order) * 4096) as memory, CacheModel(memory, levels=levels) as core:
        memory.install(1)
        lines = 0
        for address, length, access in records(trace):
            for at in range(address, address + length):
                lines += at == address or at % 64 == 0
            frame = order.index(address >> 12) << 12
            if (address + length - 1) >> 12 == address >> 12:
                place = frame | address & 4095
                core.write(place, bytes(length), 1) if access else core.read(place, length, 1)
        assert result.lines == lines
        assert abs(result.misses - core.stats(1)["misses"]) < 150
    assert result.bytes_decrypted == result.misses * 64
    assert result.encryption_cycles == result.misses * 10
    assert result.slow_down == result.cycles / (result.cycles - result.encryption_cycles) > 1


def test_sweep_and_slow_down() -> None:
    trace = random_trace(20_000, 64 << 10)
    results = sweep(trace, [4096, 16384, 1 << 20])
    misses = [result.misses for result in results]
    assert misses[0] > misses[1] > misses[2] >= 1024  # the last holds it all
    assert results[0].slow_down > results[2].slow_down > 1
    assert results[2].bytes_encrypted <= 1025 * 64
    assert results[0].traffic_per_access > results[2].traffic_per_access > 0
    assert [result.cache_bytes for result in results] == [4096, 16384, 1 << 20]
    free = run_trace(trace, encryption_cycles=0)
    assert free.slow_down == 1.0
    page = run_trace(trace, fill="page")
    assert page.misses < misses[2]
    assert page.bytes_decrypted == page.misses * 4096


def test_last_level() -> None:
    levels = (CacheLevel(4096, 8, 1), CacheLevel(65536, 8, 2), CacheLevel(1 << 20, 16, 3))
    assert last_level(levels, 1 << 18) == (*levels[:2], CacheLevel(1 << 18, 16, 3))
    assert last_level(levels, 65536) == (levels[0], CacheLevel(65536, 16, 3))
    assert last_level(levels, 128) == (CacheLevel(128, 2, 3),)


def test_addresses() -> None:
    accesses = np.array([(0xFFFF_8000_0000_0000, 8, 1), (0x7FFF_FFFF_FFF8, 8, 0), (0xFFFF_FFFF_FFFF_FFF8, 8, 0)], dtype=KIND)
    assert run_trace(Trace(accesses, 0)).tlb_misses == 3
    for bad in (0x8000_0000_0000, 0x7FFF_FFFF_FFFC, 0xFFFF_FFFF_FFFF_FFFC, 0xFFFF_7FFF_FFFF_FFFC):
        accesses["address"][1] = bad
        with pytest.raises(errors.AddressError, match=f"access 1 at {bad:#x}"):
            run_trace(Trace(accesses, 0))
    with pytest.raises(errors.LengthError, match="touches 17 pages"):
        run_trace(random_trace(1000, 17 * 4096 - 16), memory_limit=65536)


# ---- Drawing and the command


def test_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = sweep(random_trace(2000, 65536), [4096, 16384])
    draw_sweep(tmp_path / "a.svg", results)
    draw_sweep(tmp_path / "b.svg", results[::-1])
    draw_sweep(tmp_path / "c.png", results)
    assert b"slow-down" in (tmp_path / "a.svg").read_bytes() or b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(errors.ArgumentError, match=r"expected a name ending in \.svg or \.png"):
        draw_sweep(tmp_path / "a.jpg", results)
    with pytest.raises(errors.ArgumentError, match="no results"):
        draw_sweep(tmp_path / "d.svg", [])


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("csvfast._extras.find_spec", lambda name: None)
    (tmp_path / "t").write_bytes(LACKEY)
    assert main(["machine", "trace", str(tmp_path / "t"), "--plot", str(tmp_path / "t.svg")]) == 3
    assert "pip install 'csvfast[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "t.svg").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_bytes(LACKEY)
    assert main(["machine", "trace", str(path), "--sizes", "4KiB,64KiB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["accesses"], said["instructions"], len(said["results"])) == (4, 2, 2)
    assert said["results"][0]["cache_bytes"] == 4096
    assert said["results"][0]["slow_down"] > 1
    assert main(["machine", "trace", str(path), "--sizes", "64KiB", "--fill", "page"]) == 0
    assert "parameters" in capsys.readouterr().out
    for arguments, code, message in (
        ([str(path), "--sizes", "3KiB"], 2, "expected powers of two"),
        ([str(path), "--format", "din"], 2, "in the din format"),
        ([str(path), "--plot", "picture.gif"], 2, ".svg or .png"),
        ([str(tmp_path / "none")], 3, "none"),
        ([sys.executable], 2, "memory trace"),
    ):
        assert main(["machine", "trace", *arguments]) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
