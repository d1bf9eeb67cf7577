"""CacheModel: what one CPU core keeps of an encrypted memory in plaintext, and how that can leak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from csvfast import _core
from csvfast.memory.encrypted import EncryptedMemory

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DEFAULT_LEVELS", "DEFAULT_TLB", "CacheLevel", "CacheModel", "Tlb"]

Replacement = Literal["lru", "fifo", "tree", "random"]


@dataclass(frozen=True, slots=True)
class CacheLevel:
    """One level of cache.

    size          bytes; size / (64 * ways) must be a power of two
    ways          1 .. 64; with replacement "tree" a power of two
    cycles        modelled cycles of an access that this level serves: a parameter, not a measurement
    replacement   "lru", "fifo", "tree" (a binary tree of bits, as real caches approximate LRU), "random" (from the model's seed)
    """

    size: int
    ways: int
    cycles: int = 0
    replacement: Replacement = "lru"


@dataclass(frozen=True, slots=True)
class Tlb:
    """The TLB: entries / ways must be a power of two; replacement as in CacheLevel."""

    entries: int
    ways: int
    replacement: Replacement = "lru"


# Sizes and ways of the first Zen generation, on which Hygon's Dhyana is built (AMD, Software Optimization Guide for Family 17h
# Processors, publication 55723); the cycles are round figures to be replaced by the user's own.
DEFAULT_LEVELS = (CacheLevel(32 << 10, 8, 4), CacheLevel(512 << 10, 8, 12), CacheLevel(8 << 20, 16, 40))
DEFAULT_TLB = Tlb(1536, 12)


class CacheModel(_core.Cache):
    """The TLB and the caches of one CPU core over an EncryptedMemory.

    Lines hold plaintext under the tag of physical address, ASID and C-bit. Hits touch no SM4; misses decrypt a line or page,
    evictions encrypt. Nothing keeps contexts coherent, and the tag names the ASID, not its key: without WBINVD and DF_FLUSH
    before an ASID gets its next guest, that guest reads what the last one left.

        with EncryptedMemory(1 << 20) as memory, CacheModel(memory) as core:
            memory.install(1)
            core.write(0x1000, b"secret", asid=1)
            memory.remove(1)                       # neither core.write_back() nor core.flush_fabric()
            memory.install(1)                      # the next guest, with another key
            core.read(0x1000, 6, asid=1)           # b"secret": the leak

    Args:
        memory: the DRAM. It cannot be closed before the model.
        levels: one to three levels, nearest first. Each contains what is in those before it.
        tlb: None = every virtual access walks the tables.
        fill: what a miss decrypts, "line" or "page"; of a page the other lines go to the last level.
        fabric_lines: write-backs that wait in plaintext between the caches and the memory's engine, 0 .. 64.
        c_bit: position of the C-bit in page-table entries, 32 .. 51.
        memory_cycles, encryption_cycles, write_back_cycles: modelled cycles of an access that DRAM serves, what encryption adds
            to it, what a write-back costs the core.
        seed: of random replacement.

    Raises: ArgumentError, LengthError, ClosedError, AllocationError.

    Thread-safety: one thread at a time; a call while another thread is inside one is refused. Several models may stand on one
    memory: they are different machines' caches, not coherent cores.
    """

    def __init__(
        self,
        memory: EncryptedMemory,
        *,
        levels: Sequence[CacheLevel] = DEFAULT_LEVELS,
        tlb: Tlb | None = DEFAULT_TLB,
        fill: Literal["line", "page"] = "line",
        fabric_lines: int = 16,
        c_bit: int = 47,
        memory_cycles: int = 200,
        encryption_cycles: int = 20,
        write_back_cycles: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            memory,
            levels=[(level.size, level.ways, level.replacement, level.cycles) for level in levels],
            tlb=None if tlb is None else (tlb.entries, tlb.ways, tlb.replacement),
            fill=fill,
            fabric_lines=fabric_lines,
            c_bit=c_bit,
            memory_cycles=memory_cycles,
            encryption_cycles=encryption_cycles,
            write_back_cycles=write_back_cycles,
            seed=seed,
        )
        self._levels = tuple(levels)

    @property
    def levels(self) -> tuple[CacheLevel, ...]:
        """The levels, nearest first."""
        return self._levels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<CacheModel closed>"
        sizes = ", ".join(f"{level.size} bytes {level.ways}-way {level.replacement}" for level in self._levels)
        return f"<CacheModel of {sizes}>"
