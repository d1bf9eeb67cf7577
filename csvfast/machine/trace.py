"""Memory traces through the cache model: how much a program's accesses make the memory engine encrypt, and what that costs.

    trace = read_trace("program.trace")                    # valgrind --tool=lackey --trace-mem=yes, or Dinero's din format
    results = sweep(trace, [256 << 10, 1 << 20, 4 << 20])  # sizes of the last cache level
    draw_sweep("sweep.svg", results)

The trace's program becomes a guest: its pages get frames in the order of their first use, page tables with the C-bit set lie in
the guest's own encrypted memory, and every access goes through TLB, walks and caches. What is counted is exact for the model;
what is modelled, and that cycles are parameters, is told in docs/cache-model.md.

Sources: Valgrind's manual, chapter "Lackey: an example tool", and lackey/lk_main.c (trace_load and its siblings print
"I  %08lx,%lu", " L ...", " S ...", " M ..."); Dinero IV's manual page (M. Hill, J. Edler), input format "d": label 0 read,
1 write, 2 instruction fetch, then a hexadecimal address.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from csvfast._extras import need
from csvfast._files import write_atomically
from csvfast.errors import AddressError, ArgumentError, FormatError, LengthError
from csvfast.memory import CacheLevel, CacheModel, EncryptedMemory, Tlb
from csvfast.memory.cache import DEFAULT_LEVELS, DEFAULT_TLB

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Trace", "TraceResult", "draw_sweep", "last_level", "read_trace", "run_trace", "sweep"]

TraceFormat = Literal["auto", "lackey", "din"]
MEMORY_LIMIT: Final = 16 << 30  # of the modelled guest; only what the trace touches becomes real memory
LENGTH_MAX: Final = 4096
_PAGE: Final = 4096
_LINE: Final = 64
_CHUNK: Final = 4 << 20
_READ, _WRITE, _EXECUTE = 0, 1, 2
_ASID: Final = 1
_C_BIT: Final = 1 << 47
_RIGHTS: Final = 7  # present, writable, user

_LACKEY: Final = re.compile(rb"^(I | [LSM]) ([0-9a-fA-F]{1,16}),([0-9]{1,4})\r?$", re.MULTILINE)
_DIN: Final = re.compile(rb"^[ \t]*([012])[ \t]+(?:0[xX])?([0-9a-fA-F]{1,16})(?:[ \t][^\n]*)?\r?$", re.MULTILINE)
_PASSED_OVER: Final = re.compile(rb"^(?:==[0-9]+==[^\n]*|--[0-9]+--[^\n]*|[ \t]*)\r?$", re.MULTILINE)  # valgrind's own lines
_ACCESSES: Final = {
    b"I ": (_EXECUTE,), b" L": (_READ,), b" S": (_WRITE,), b" M": (_READ, _WRITE),
    b"0": (_READ,), b"1": (_WRITE,), b"2": (_EXECUTE,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trace:
    """A memory trace.

    accesses       structured array: address (u8), length (u4, bytes), access (u4: 0 read, 1 write, 2 instruction fetch)
    instructions   instruction fetches read, also when they were left out of `accesses`
    """

    accesses: NDArray[Any]
    instructions: int

    def __len__(self) -> int:
        return len(self.accesses)


@dataclass(frozen=True, slots=True)
class TraceResult:
    """What one run counted.

    cache_bytes           size of the last cache level
    accesses              accesses of the trace; lines: cache lines they touched
    misses                lines that came from DRAM, walks included
    tlb_misses, walk_reads    page-table walks, and entries they read
    bytes_decrypted       through SM4 on the way in
    bytes_encrypted       on the way out, with what was dirty at the end
    cycles                modelled; encryption_cycles: of them, what encryption added
    seconds               real time the model took
    """

    cache_bytes: int
    accesses: int
    lines: int
    misses: int
    tlb_misses: int
    walk_reads: int
    bytes_decrypted: int
    bytes_encrypted: int
    cycles: int
    encryption_cycles: int
    seconds: float

    @property
    def slow_down(self) -> float:
        """Modelled time against the same machine without encryption: 1.0 = none."""
        plain = self.cycles - self.encryption_cycles
        return self.cycles / plain if plain else 1.0

    @property
    def traffic_per_access(self) -> float:
        """Bytes through SM4 per access of the trace."""
        return (self.bytes_decrypted + self.bytes_encrypted) / self.accesses if self.accesses else 0.0


# ---- Reading


def read_trace(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    format: TraceFormat = "auto",
    instructions: bool = False,
    limit: int | None = None,
    din_length: int = 4,
) -> Trace:
    """Reads a trace.

    Args:
        source: a file's name, or a binary stream.
        format: "lackey", "din", or "auto": by the first line that is an access.
        instructions: keep instruction fetches. The modelled caches hold code and data alike: the first level is unified then.
        limit: stop after so many accesses.
        din_length: bytes of each access of a din trace, which does not say.
    Raises: FormatError (the line, by its byte offset), ArgumentError, LengthError (no access at all, or one of 0 or over 4096
        bytes), OSError.
    """
    if format not in ("auto", "lackey", "din"):
        raise ArgumentError(f"format must be one of 'auto', 'lackey', 'din'; got {format!r}")
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit is {limit}; expected at least 1")
    if not 1 <= din_length <= LENGTH_MAX:
        raise ArgumentError(f"din_length is {din_length}; expected 1 .. {LENGTH_MAX}")
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as stream:
            return _read(stream, format, instructions, limit, din_length)
    return _read(source, format, instructions, limit, din_length)


def _read(stream: BinaryIO, kind: str, instructions: bool, limit: int | None, din_length: int) -> Trace:
    import numpy as np

    addresses: list[NDArray[Any]] = []
    lengths: list[NDArray[Any]] = []
    accesses: list[NDArray[Any]] = []
    fetched = total = 0
    for offset, chunk in _whole_lines(stream):
        if kind == "auto":
            kind = _recognise(chunk, offset)
        if kind == "auto":  # nothing but valgrind's greeting so far
            continue
        pattern = _LACKEY if kind == "lackey" else _DIN
        found = pattern.findall(chunk)
        if len(found) != chunk.count(b"\n"):
            _check_lines(chunk, offset, pattern, kind)
        labels = [entry[0] for entry in found]
        fetched += sum(label in (b"I ", b"2") for label in labels)
        steps = [() if not instructions and label in (b"I ", b"2") else _ACCESSES[label] for label in labels]
        times = [len(step) for step in steps]
        place = np.array([int(entry[1], 16) for entry in found], dtype=np.uint64)
        size = (
            np.array([int(entry[2]) for entry in found], dtype=np.uint32)
            if kind == "lackey"
            else np.full(len(found), din_length, dtype=np.uint32)
        )
        addresses.append(np.repeat(place, times))
        lengths.append(np.repeat(size, times))
        accesses.append(np.array([one for step in steps for one in step], dtype=np.uint32))
        total += len(accesses[-1])
        if limit is not None and total >= limit:
            total = limit
            break
    record = np.dtype([("address", "u8"), ("length", "u4"), ("access", "u4")])
    result = np.empty(total, dtype=record)
    for name, parts in (("address", addresses), ("length", lengths), ("access", accesses)):
        if parts:
            result[name] = np.concatenate(parts)[:total]
    if total == 0:
        raise LengthError(f"the trace holds no accesses ({fetched} instruction fetches); expected at least one")
    wrong = np.flatnonzero((result["length"] == 0) | (result["length"] > LENGTH_MAX))
    if len(wrong):
        raise LengthError(f"access {wrong[0]} has {result['length'][wrong[0]]} bytes; expected 1 .. {LENGTH_MAX}")
    return Trace(result, fetched)


def _whole_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Chunks that end with a line, and the offset of each."""
    rest, offset = b"", 0
    while piece := stream.read(_CHUNK):
        text = rest + piece
        end = text.rfind(b"\n") + 1
        if end:
            yield offset, text[:end]
            offset += end
        rest = text[end:]
        if len(rest) > _CHUNK:
            raise FormatError("memory trace", "line", offset, f"{len(rest)} bytes without a line's end", "short lines of text")
    if rest:
        yield offset, rest + b"\n"


def _recognise(chunk: bytes, offset: int) -> str:
    for line in chunk.split(b"\n"):
        if _PASSED_OVER.fullmatch(line):
            offset += len(line) + 1
            continue
        if _LACKEY.fullmatch(line):
            return "lackey"
        if _DIN.fullmatch(line):
            return "din"
        raise FormatError("memory trace", "line", offset, _shown(line), "an access as lackey or Dinero (din) writes it")
    return "auto"


def _check_lines(chunk: bytes, offset: int, pattern: re.Pattern[bytes], kind: str) -> None:
    """Some lines are no accesses: those of valgrind's own and empty ones may be."""
    for line in chunk.split(b"\n"):
        if not pattern.fullmatch(line) and not (_PASSED_OVER.fullmatch(line)):
            raise FormatError("memory trace", "line", offset, _shown(line), f"an access in the {kind} format")
        offset += len(line) + 1


def _shown(line: bytes) -> str:
    return repr(line[:40].decode("ascii", "backslashreplace")) + ("" if len(line) <= 40 else " and more")


# ---- Running


def last_level(levels: Sequence[CacheLevel], size: int) -> tuple[CacheLevel, ...]:
    """The same hierarchy with a last level of `size` bytes. Levels that are not smaller than it are left out: an inclusive cache
    gains nothing from them. A cache of less than one set has as many ways as lines."""
    last = levels[-1]
    ways = max(1, min(last.ways, size // _LINE))
    return (*(level for level in levels[:-1] if level.size < size), replace(last, size=size, ways=ways))


class _Guest:
    """The trace's program as guest 1: frames for its pages, and page tables that lead to them."""

    def __init__(self, trace: Trace, memory_limit: int) -> None:
        import numpy as np

        address = trace.accesses["address"]
        last = address + (trace.accesses["length"] - np.uint32(1)).astype(np.uint64)
        top = address >> np.uint64(47)
        wrong = np.flatnonzero(((top != 0) & (top != (1 << 17) - 1)) | (last < address) | (last >> np.uint64(47) != top))
        if len(wrong):
            raise AddressError(
                f"access {wrong[0]} at {int(address[wrong[0]]):#x} is no canonical address of 48 bits; expected one below "
                "0x800000000000 or from 0xffff800000000000 on"
            )
        pages, first = np.unique(np.concatenate([address, last]) >> np.uint64(12), return_index=True)
        first %= len(address)
        frames = np.empty(len(pages), dtype=np.uint64)
        frames[np.argsort(first, kind="stable")] = np.arange(len(pages), dtype=np.uint64)
        pages &= np.uint64((1 << 36) - 1)
        # Tables from the bottom level up; number n of all levels stands at frame len(pages) + n.
        levels = [np.unique(pages >> np.uint64(9 * level)) for level in (1, 2, 3, 4)]
        starts = np.cumsum([len(pages), *map(len, levels)])
        self.size = int(starts[-1]) * _PAGE
        if self.size > memory_limit:
            raise LengthError(
                f"the trace touches {len(pages)} pages, {self.size >> 20} MiB with their tables; expected at most "
                f"{memory_limit >> 20} MiB"
            )
        tables = np.zeros((int(starts[-1] - starts[0]), 512), dtype=np.uint64)
        below, entries = pages, frames << np.uint64(12) | np.uint64(_C_BIT | _RIGHTS)
        for level, start in zip(levels, starts[:-1] - starts[0], strict=True):
            rows = start + np.searchsorted(level, below >> np.uint64(9))
            tables[rows, (below & np.uint64(511)).astype(np.intp)] = entries
            below = level
            places = np.arange(len(level), dtype=np.uint64) + np.uint64(starts[0] + start)
            entries = places << np.uint64(12) | np.uint64(_RIGHTS)
        self.memory = EncryptedMemory(self.size)
        self.memory.install(_ASID)
        self.memory.write(int(starts[0]) * _PAGE, tables, _ASID)
        self.root = self.size - _PAGE

    def run(self, trace: Trace, levels: Sequence[CacheLevel], tlb: Tlb | None, options: dict[str, Any]) -> TraceResult:
        with CacheModel(self.memory, levels=levels, tlb=tlb, **options) as core:
            core.set_tables(_ASID, guest_root=self.root)
            start = time.perf_counter()
            core.run(trace.accesses, _ASID, virtual=True)
            seconds = time.perf_counter() - start
            cycles = core.stats(_ASID)
            core.write_back()
            core.flush_fabric()
            stats = core.stats(_ASID)
        return TraceResult(
            cache_bytes=levels[-1].size,
            accesses=len(trace),
            lines=stats["reads"] + stats["writes"],
            misses=stats["misses"],
            tlb_misses=stats["tlb_misses"],
            walk_reads=stats["walk_reads"],
            bytes_decrypted=stats["bytes_decrypted"],
            bytes_encrypted=stats["bytes_encrypted"],
            cycles=cycles["cycles"],
            encryption_cycles=cycles["encryption_cycles"],
            seconds=seconds,
        )


def run_trace(
    trace: Trace,
    *,
    levels: Sequence[CacheLevel] = DEFAULT_LEVELS,
    tlb: Tlb | None = DEFAULT_TLB,
    memory_limit: int = MEMORY_LIMIT,
    **options: Any,
) -> TraceResult:
    """Runs a trace through one hierarchy; `options` are those of CacheModel (fill, fabric_lines, cycles, seed).

    Raises: AddressError (an address that is not canonical), LengthError (more pages than `memory_limit` bytes), ArgumentError.
    """
    guest = _Guest(trace, memory_limit)
    with guest.memory:
        return guest.run(trace, levels, tlb, options)


def sweep(
    trace: Trace,
    sizes: Sequence[int],
    *,
    levels: Sequence[CacheLevel] = DEFAULT_LEVELS,
    tlb: Tlb | None = DEFAULT_TLB,
    memory_limit: int = MEMORY_LIMIT,
    **options: Any,
) -> list[TraceResult]:
    """Runs a trace once for each size of the last level, see last_level(). Raises: as run_trace()."""
    guest = _Guest(trace, memory_limit)
    with guest.memory:
        return [guest.run(trace, last_level(levels, size), tlb, options) for size in sizes]


# ---- Drawing


def draw_sweep(path: str | os.PathLike[str], results: Sequence[TraceResult]) -> None:
    """Writes encryption traffic and slow-down against cache size as SVG or PNG, by the name's ending.

    Raises: ArgumentError (another ending, no results), MissingExtraError (matplotlib), OSError.
    """
    path = Path(path)
    check_picture(path)
    if not results:
        raise ArgumentError("there are no results to draw; expected at least one")
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "csvfast"  # equal results give equal files
    from matplotlib.figure import Figure  # not pyplot: no display is wanted, and no figure kept

    ordered = sorted(results, key=lambda result: result.cache_bytes)
    sizes = [result.cache_bytes / 1024 for result in ordered]
    figure = Figure(figsize=(8, 6), layout="constrained")
    traffic, slow = figure.subplots(2, 1, sharex=True)
    for label, values in (
        ("decrypted", [result.bytes_decrypted / result.accesses for result in ordered]),
        ("encrypted", [result.bytes_encrypted / result.accesses for result in ordered]),
    ):
        traffic.plot(sizes, values, marker="o", label=label)
    traffic.set_ylabel("bytes through SM4 per access")
    traffic.set_ylim(bottom=0)
    traffic.legend()
    slow.plot(sizes, [result.slow_down for result in ordered], marker="o", color="#a33")
    slow.set_ylabel("modelled slow-down")
    slow.set_xlabel("last cache level, KiB")
    slow.set_xscale("log", base=2)
    for axis in (traffic, slow):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())


def check_picture(path: Path) -> None:
    """Raises what draw_sweep would raise for this path, before the work is done."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise ArgumentError(f"picture {str(path)!r}: expected a name ending in .svg or .png")
    need("bench", "matplotlib")
