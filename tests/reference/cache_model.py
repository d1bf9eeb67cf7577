"""A slow, independent model of a core's caches: dictionaries, and every level as a list per set. SM4 is the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reference import xts

LINE, PAGE = 64, 4096
MASK = (1 << 64) - 1
Tag = tuple[int, int]  # address of the line, ASID (0 = unencrypted)


@dataclass
class Ways:
    """A set is a list of slots, None where free. `order` is kept per slot for LRU and FIFO; `tree` is a list of directions."""

    sets: int
    ways: int
    policy: str
    seed: int
    slots: list[list[Any]] = field(init=False)
    order: list[list[int]] = field(init=False)
    trees: list[dict[tuple[int, int], int]] = field(init=False)
    time: int = 0

    def __post_init__(self) -> None:
        self.slots = [[None] * self.ways for _ in range(self.sets)]
        self.order = [[0] * self.ways for _ in range(self.sets)]
        self.trees = [{} for _ in range(self.sets)]
        self.state = (self.seed * 0x9E3779B97F4A7C15 & MASK) | 1

    def find(self, number: int, tag: Any) -> int | None:
        row = self.slots[number % self.sets]
        return row.index(tag) if tag in row else None

    def use(self, number: int, way: int) -> None:
        number %= self.sets
        if self.policy == "lru":
            self.time += 1
            self.order[number][way] = self.time
        elif self.policy == "tree":  # a node is the range of ways below it; its value is the half that is older
            low, high = 0, self.ways
            while high - low > 1:
                middle = (low + high) // 2
                self.trees[number][low, high] = 1 if way < middle else 0
                low, high = (low, middle) if way < middle else (middle, high)

    def victim(self, number: int) -> int:
        number %= self.sets
        row = self.slots[number]
        if None in row:
            return row.index(None)
        if self.policy == "tree":
            low, high = 0, self.ways
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.trees[number].get((low, high), 0) else (low, middle)
            return low
        if self.policy == "random":
            state = self.state
            state ^= state << 13 & MASK
            state ^= state >> 7
            state ^= state << 17 & MASK
            self.state = state
            return (state >> 32) % self.ways
        return self.order[number].index(min(self.order[number]))

    def put(self, number: int, way: int, tag: Any) -> None:
        self.slots[number % self.sets][way] = tag
        if self.policy == "fifo":
            self.time += 1
            self.order[number % self.sets][way] = self.time
        self.use(number, way)

    def drop(self, number: int, tag: Any) -> None:
        way = self.find(number, tag)
        if way is not None:
            self.slots[number % self.sets][way] = None


class SlowCache:
    """The same accesses as csvfast.memory.CacheModel at physical addresses, over a DRAM of its own.

    In: levels   (size, ways, cycles, policy), nearest first
    """

    def __init__(
        self, size: int, levels: list[tuple[int, int, int, str]], *, fill: str, fabric_lines: int, standard: str, seed: int,
        memory_cycles: int, encryption_cycles: int, write_back_cycles: int,
    ) -> None:  # fmt: skip
        self.dram = bytearray(size)
        self.keys: dict[int, bytes] = {}
        self.cycles = [level[2] for level in levels]
        self.levels = [
            Ways(size // LINE // ways, ways, policy, seed + 2 * (index + 1))
            for index, (size, ways, _, policy) in enumerate(levels)
        ]
        self.lines: dict[Tag, bytearray] = {}  # what the last level holds
        self.dirty: set[Tag] = set()
        self.fabric: list[tuple[Tag, bytes]] = []
        self.fill, self.fabric_lines, self.standard = fill, fabric_lines, standard
        self.memory_cycles, self.encryption_cycles, self.write_back_cycles = memory_cycles, encryption_cycles, write_back_cycles
        self.stats: dict[int, dict[str, int]] = {}

    def count(self, asid: int, **more: int) -> None:
        counts = self.stats.setdefault(asid, {})
        for name, number in more.items():
            counts[name] = counts.get(name, 0) + number

    # ---- DRAM

    def crypt(self, asid: int, address: int, data: bytes, decrypt: bool) -> bytes:
        if asid == 0:
            return data
        tweak = (address // PAGE).to_bytes(16, "little")
        return xts.crypt_unit(
            self.keys[asid], tweak, data, self.standard, decrypt=decrypt, skip=address % PAGE // 16
        )

    def arrive(self, tag: Tag, data: bytes) -> None:
        address, asid = tag
        if asid and asid not in self.keys:
            self.count(asid, lines_lost=1)
            return
        self.dram[address : address + LINE] = self.crypt(asid, address, data, False)
        if asid:
            self.count(asid, bytes_encrypted=LINE)

    def send(self, tag: Tag, worker: int | None) -> None:
        if tag not in self.dirty:
            return
        self.dirty.remove(tag)
        self.count(tag[1], write_backs=1)
        if worker is not None:
            self.count(worker, cycles=self.write_back_cycles)
        if self.fabric_lines == 0:
            self.arrive(tag, bytes(self.lines[tag]))
            return
        if len(self.fabric) == self.fabric_lines:
            self.arrive(*self.fabric.pop(0))
        self.fabric.append((tag, bytes(self.lines[tag])))

    def flush_fabric(self) -> None:
        while self.fabric:
            self.arrive(*self.fabric.pop(0))

    # ---- Lines

    def remove(self, tag: Tag, worker: int | None) -> None:
        for level in self.levels:
            level.drop(tag[0] // LINE, tag)
        self.send(tag, worker)
        del self.lines[tag]

    def enter(self, tag: Tag, data: bytes, worker: int) -> None:
        last, number = self.levels[-1], tag[0] // LINE
        way = last.victim(number)
        leaving = last.slots[number % last.sets][way]
        if leaving is not None:
            self.remove(leaving, worker)
        last.put(number, way, tag)
        self.lines[tag] = bytearray(data)

    def raise_to_top(self, tag: Tag, below: int) -> None:
        number = tag[0] // LINE
        for index in range(below - 1, -1, -1):
            level = self.levels[index]
            way = level.victim(number)
            leaving = level.slots[number % level.sets][way]
            if leaving is not None:
                for above in self.levels[: index + 1]:
                    above.drop(leaving[0] // LINE, leaving)
            level.put(number, way, tag)

    def line(self, tag: Tag, worker: int) -> bytearray:
        """The line's bytes in the last level. Raises KeyError when it must be decrypted and there is no key."""
        number = tag[0] // LINE
        for index, level in enumerate(self.levels):
            way = level.find(number, tag)
            if way is not None:
                level.use(number, way)
                self.count(worker, **{f"hits_{index + 1}": 1, "cycles": self.cycles[index]})
                self.raise_to_top(tag, index)
                return self.lines[tag]
        unit = PAGE if self.fill == "page" else LINE
        start = tag[0] // unit * unit
        while any(start <= waiting[0] < start + unit for waiting, _ in self.fabric):
            self.arrive(*self.fabric.pop(0))
        plain = self.crypt(tag[1], start, bytes(self.dram[start : start + unit]), True)
        others = [(address, tag[1]) for address in range(start, start + unit, LINE) if address != tag[0]]
        for other in [other for other in others if other not in self.lines]:
            self.enter(other, plain[other[0] - start : other[0] - start + LINE], worker)
        self.enter(tag, plain[tag[0] - start : tag[0] - start + LINE], worker)
        extra = self.encryption_cycles if tag[1] else 0
        self.count(worker, misses=1, cycles=self.memory_cycles + extra, encryption_cycles=extra)
        if tag[1]:
            self.count(worker, bytes_decrypted=unit)
        self.raise_to_top(tag, len(self.levels) - 1)
        return self.lines[tag]

    # ---- Accesses

    def pieces(self, address: int, length: int, context: int) -> list[tuple[Tag, int, int]]:
        found = []
        while length:
            part = min(length, LINE - address % LINE)
            found.append(((address // LINE * LINE, context), address % LINE, part))
            address, length = address + part, length - part
        return found

    def read(self, address: int, length: int, asid: int, encrypted: bool) -> bytes:
        out = b""
        for tag, at, part in self.pieces(address, length, asid if encrypted else 0):
            out += self.line(tag, asid)[at : at + part]
            self.count(asid, reads=1)
        return out

    def write(self, address: int, data: bytes, asid: int, encrypted: bool) -> None:
        for tag, at, part in self.pieces(address, len(data), asid if encrypted else 0):
            self.line(tag, asid)[at : at + part] = data[:part]
            self.dirty.add(tag)
            data = data[part:]
            self.count(asid, writes=1)

    def flush(self, address: int, length: int, asid: int, encrypted: bool) -> None:
        for tag, _, _ in self.pieces(address, length, asid if encrypted else 0):
            if tag in self.lines:
                self.remove(tag, asid)

    def write_back(self) -> None:
        for row in self.levels[-1].slots:
            for tag in list(row):
                if tag is not None:
                    self.remove(tag, None)
