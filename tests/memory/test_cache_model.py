"""The cache model against a slow reference, the leaks that flushes prevent, and the binding's arguments."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.cache_model import SlowCache

from csvfast import EncryptedMemory, errors
from csvfast.memory import CacheLevel, CacheModel, Tlb

LINE, PAGE, SIZE = 64, 4096, 4 * 4096
SECRET = b"the first guest's secret, 48 bytes of it in all."
SMALL = (CacheLevel(4 * LINE, 2, 1), CacheLevel(16 * LINE, 4, 10))
KEYS = {asid: bytes(range(asid, asid + 32)) for asid in range(1, 10)}
NAMES = (
    "reads", "writes", "hits_1", "hits_2", "hits_3", "misses", "write_backs", "lines_lost", "bytes_decrypted", "bytes_encrypted",
    "cycles", "encryption_cycles",
)  # fmt: skip

# ---- Against the reference


@st.composite
def shapes(draw: st.DrawFn) -> list[CacheLevel]:
    """One to three small levels, larger or smaller than the one before, each with a policy of its own."""
    levels = []
    for number in range(draw(st.integers(1, 3))):
        policy = draw(st.sampled_from(["lru", "fifo", "tree", "random"]))
        ways = draw(st.sampled_from([1, 2, 4, 8] if policy == "tree" else [1, 2, 3, 4, 5, 8]))
        sets = draw(st.sampled_from([1, 2, 4]))
        levels.append(CacheLevel(sets * ways * LINE, ways, 3**number, policy))
    return levels


ADDRESSES = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 12).map(lambda line: line * LINE))
ASIDS = st.integers(0, 2)
OPERATIONS = st.one_of(
    st.tuples(st.just("read"), ADDRESSES, st.integers(0, 200), ASIDS, st.booleans()),
    st.tuples(st.just("write"), ADDRESSES, st.integers(0, 200), ASIDS, st.booleans(), st.integers(0, 255)),
    st.tuples(st.just("flush"), ADDRESSES, st.integers(0, 300), ASIDS, st.booleans()),
    st.tuples(st.just("write_back")),
    st.tuples(st.just("flush_fabric")),
    st.tuples(st.just("key"), st.integers(1, 2), st.integers(1, 9)),
    st.tuples(st.just("no key"), st.integers(1, 2)),
)


def same(core: CacheModel, slow: SlowCache, memory: EncryptedMemory) -> None:
    assert memory.raw.tobytes() == bytes(slow.dram)
    for asid in range(3):
        expected = slow.stats.get(asid, {})
        assert {name: core.stats(asid)[name] for name in NAMES} == {name: expected.get(name, 0) for name in NAMES}
        tags = [tag for tag in slow.lines if tag[1] == asid]
        assert core.contents(asid) == {
            "lines": len(tags),
            "dirty": sum(tag in slow.dirty for tag in tags),
            "waiting": sum(tag[1] == asid for tag, _ in slow.fabric),
        }


@settings(max_examples=200)
@given(
    levels=shapes(),
    operations=st.lists(OPERATIONS, max_size=40),
    fill=st.sampled_from(["line", "line", "page"]),
    fabric_lines=st.integers(0, 4),
    standard=st.sampled_from(["gb", "ieee"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_against_the_reference(
    levels: list[CacheLevel], operations: list[Any], fill: Any, fabric_lines: int, standard: Any, seed: int
) -> None:
    """Data, DRAM, counts and what is cached are the same after every operation, whatever contexts and keys do."""
    cost = {"memory_cycles": 100, "encryption_cycles": 7, "write_back_cycles": 5}
    shape = [(level.size, level.ways, level.cycles, level.replacement) for level in levels]
    slow = SlowCache(SIZE, shape, fill=fill, fabric_lines=fabric_lines, standard=standard, seed=seed, **cost)
    with (
        EncryptedMemory(SIZE, standard=standard, asid_max=9) as memory,
        CacheModel(memory, levels=levels, fill=fill, fabric_lines=fabric_lines, seed=seed, **cost) as core,
    ):
        memory.install(1, KEYS[1])
        slow.keys[1] = KEYS[1]
        for name, *arguments in operations:
            match name:
                case "key" | "no key":
                    asid = arguments[0]
                    if memory.installed(asid):
                        memory.remove(asid)
                        del slow.keys[asid]
                    if name == "key":
                        memory.install(asid, KEYS[arguments[1]])
                        slow.keys[asid] = KEYS[arguments[1]]
                case "write_back" | "flush_fabric":
                    getattr(core, name)()
                    getattr(slow, name)()
                case _:
                    address, length, asid, encrypted, *value = arguments
                    length = min(length, SIZE - address)
                    encrypted = encrypted and asid != 0
                    what = bytes(value * length) if name == "write" else length
                    try:
                        expected = getattr(slow, name)(address, what, asid, encrypted)
                    except KeyError:
                        with pytest.raises(errors.UnknownAsidError):
                            getattr(core, name)(address, what, asid, encrypted=encrypted)
                    else:
                        assert getattr(core, name)(address, what, asid, encrypted=encrypted) == expected
            same(core, slow, memory)
        core.write_back()
        core.flush_fabric()
        slow.write_back()
        slow.flush_fabric()
        same(core, slow, memory)


# ---- The rule before an ASID is used again: WBINVD, DF_FLUSH, and a TLB flush


def next_guest_reads(*, write_back: bool, flush_fabric: bool) -> bytes:
    with EncryptedMemory(SIZE) as memory, CacheModel(memory) as core:
        memory.install(1, KEYS[1])
        core.write(0x1000, SECRET, asid=1)
        if write_back:
            core.write_back()
        if flush_fabric:
            core.flush_fabric()
        memory.remove(1)
        memory.install(1, KEYS[2])
        return core.read(0x1000, len(SECRET), asid=1)


def test_asid_reuse_with_the_flushes() -> None:
    assert next_guest_reads(write_back=True, flush_fabric=True)[:16] != SECRET[:16]


@pytest.mark.parametrize(("write_back", "flush_fabric"), [(False, True), (True, False), (False, False)])
def test_asid_reuse_without_a_flush_leaks(write_back: bool, flush_fabric: bool) -> None:
    assert next_guest_reads(write_back=write_back, flush_fabric=flush_fabric) == SECRET


def test_another_asid_never_hits() -> None:
    """What the rule need not prevent: under another ASID the line is another line, flushed or not."""
    with EncryptedMemory(SIZE) as memory, CacheModel(memory) as core:
        memory.install(1, KEYS[1])
        memory.install(2, KEYS[2])
        core.write(0x1000, SECRET, asid=1)
        assert SECRET[:16] not in core.read(0x1000, len(SECRET), asid=2)
        core.flush(0x1000, len(SECRET), asid=2)
        core.write_back()
        assert SECRET[:16] not in core.read(0x1000, len(SECRET), asid=2)
        assert SECRET[:16] not in core.read(0x1000, len(SECRET), asid=0)


def test_stale_line_of_the_host() -> None:
    with EncryptedMemory(SIZE) as memory, CacheModel(memory) as core:
        memory.install(1, KEYS[1])
        assert core.read(0, 16, asid=0) == bytes(16)
        core.write(0, SECRET, asid=1)
        core.flush(0, len(SECRET), asid=1)
        core.flush_fabric()
        assert core.read(0, 16, asid=0) == bytes(16)  # its own line: CLFLUSH of the guest's does not reach it
        core.flush(0, 16, asid=0)
        assert core.read(0, 16, asid=0) == memory.read(0, 16, asid=0) != bytes(16)


def test_shared_memory_is_one_context() -> None:
    with EncryptedMemory(SIZE) as memory, CacheModel(memory) as core:
        core.write(0, b"for the host", asid=1, encrypted=False)
        assert core.read(0, 12, asid=0) == b"for the host"
        assert memory.read(0, 12, asid=0) == bytes(12)  # beside the core: a device that does not snoop
        core.write_back()
        core.flush_fabric()
        assert memory.read(0, 12, asid=0) == b"for the host"


# ---- Translation


def tables(memory: EncryptedMemory, asid: int, root: int, pages: dict[int, int]) -> None:
    """Tables at root .. root + 3 pages for virtual pages below 2 MiB; entries as given."""
    for level, place in enumerate(range(root, root + 3 * PAGE, PAGE)):
        memory.write(place, bytes(PAGE), asid)
        memory.write(place, (root + (level + 1) * PAGE | 7).to_bytes(8, "little"), asid)
    memory.write(root + 3 * PAGE, bytes(PAGE), asid)
    for page, entry in pages.items():
        memory.write(root + 3 * PAGE + page * 8, entry.to_bytes(8, "little"), asid)


C_BIT, NO_EXECUTE = 1 << 47, 1 << 63


def test_virtual_access_and_faults() -> None:
    with EncryptedMemory(16 * PAGE) as memory, CacheModel(memory, levels=SMALL, tlb=Tlb(8, 2)) as core:
        memory.install(1)
        tables(memory, 1, 0x8000, {1: 0x3000 | C_BIT | 7, 2: 0x5000 | 5 | NO_EXECUTE, 3: 1 << 40 | 7})
        core.set_tables(1, guest_root=0x8000)
        core.write_virtual(0x1800, SECRET, 1, user=True)
        assert core.read_virtual(0x1800, len(SECRET), 1) == SECRET
        assert core.translate(0x1800, 1) == {"address": 0x3800, "encrypted": 1, "writable": 1, "executable": 1, "user": 1}
        assert core.translate(0x2004, 1) == {"address": 0x5004, "encrypted": 0, "writable": 0, "executable": 0, "user": 1}
        core.write_back()
        core.flush_fabric()
        assert memory.read(0x3800, len(SECRET), asid=1) == SECRET
        refusal = "0x2000 of ASID 1: 0x2000 refused by the guest tables at level 1"
        with pytest.raises(errors.PageFaultError, match=refusal) as caught:
            core.write_virtual(0x1FFC, bytes(8), 1)
        assert (caught.value.address, caught.value.stage, caught.value.level) == (0x2000, "guest", 1)
        assert core.read_virtual(0x1FFC, 4, 1) == bytes(4)
        with pytest.raises(errors.PageFaultError):
            core.translate(0x2000, 1, execute=True)
        with pytest.raises(errors.PageFaultError, match="no such address"):
            core.translate(1 << 47, 1)
        with pytest.raises(errors.AddressError, match="leads outside"):
            core.read_virtual(0x3000, 1, 1)
        nested = 0xC000
        tables(memory, 0, nested, {page: page * PAGE | 7 for page in range(16) if page != 3})
        core.set_tables(1, guest_root=0x8000, nested_root=nested)
        assert core.translate(0x1000, 1)["address"] == 0x3000  # nobody flushed
        core.invalidate_page(0x1000, 1)
        with pytest.raises(errors.PageFaultError) as caught:
            core.translate(0x1000, 1)
        assert (caught.value.address, caught.value.stage) == (0x3000, "nested")


@pytest.mark.parametrize("flushed", [True, False])
def test_tlb_flush_at_asid_reuse(flushed: bool) -> None:
    with EncryptedMemory(16 * PAGE) as memory, CacheModel(memory) as core:
        memory.install(1)
        tables(memory, 1, 0x8000, {1: 0x3000 | C_BIT | 7})
        core.set_tables(1, guest_root=0x8000)
        assert core.translate(0x1000, 1)["address"] == 0x3000
        core.write_back()
        core.flush_fabric()
        memory.remove(1)
        memory.install(1)
        tables(memory, 1, 0xC000, {1: 0x4000 | C_BIT | 7})
        core.set_tables(1, guest_root=0xC000)
        if flushed:
            core.flush_tlb(1)
        assert core.translate(0x1000, 1)["address"] == (0x4000 if flushed else 0x3000)


# ---- Traces


def test_run() -> None:
    import numpy as np

    kind = np.dtype([("address", "u8"), ("length", "u4"), ("access", "u4")])
    accesses = np.array([(0, 8, 0), (60, 8, 1), (0, 8, 0), (128, 1, 1)], dtype=kind)
    with EncryptedMemory(SIZE) as memory, CacheModel(memory, levels=SMALL) as core:
        memory.install(1)
        assert core.run(accesses, 1) == 4
        stats = core.stats(1)
        assert (stats["reads"], stats["writes"], stats["misses"], stats["hits_1"]) == (2, 3, 3, 2)
        assert core.contents(1)["dirty"] == 3
        assert core.run(b"", 1) == 0
        accesses["length"][2] = 0
        with pytest.raises(errors.LengthError, match="access 2 of the trace has a length of 0"):
            core.run(accesses, 1)
        accesses["access"][1] = 9
        with pytest.raises(errors.ArgumentError, match="access 1 of the trace: kind 9"):
            core.run(accesses, 1)
        accesses["address"][0] = SIZE
        with pytest.raises(errors.AddressError, match="access 0"):
            core.run(accesses, 1)
        with pytest.raises(errors.LengthError, match="17 bytes"):
            core.run(bytes(17), 1)
        with pytest.raises(errors.AsidError, match="encrypted=False"):
            core.run(accesses, 0, encrypted=True)
        with pytest.raises(errors.BufferTypeError):
            core.run("trace", 1)  # type: ignore[arg-type]


def test_one_thread_at_a_time() -> None:
    import numpy as np

    accesses = np.zeros(20_000_000, dtype=np.dtype([("address", "u8"), ("length", "u4"), ("access", "u4")]))
    accesses["length"] = 8
    with EncryptedMemory(SIZE) as memory, CacheModel(memory, levels=SMALL) as core:
        memory.install(1)
        thread = threading.Thread(target=core.run, args=(accesses, 1))
        thread.start()
        refused = 0
        while thread.is_alive():
            try:
                core.read(0, 1, asid=1)
            except errors.MemoryInUseError:
                refused += 1
        thread.join()
        assert refused
        assert core.stats(1)["reads"] >= len(accesses)


# ---- Arguments and life


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"levels": []}, errors.ArgumentError, "0 cache levels; expected 1 .. 3"),
        ({"levels": SMALL * 2}, errors.ArgumentError, "4 cache levels"),
        ({"levels": [CacheLevel(3 * LINE, 1)]}, errors.LengthError, "192 bytes in 1 ways; expected 64 times a power of two"),
        ({"levels": [CacheLevel(0, 1)]}, errors.LengthError, "0 bytes"),
        ({"levels": [CacheLevel(64, 65)]}, errors.ArgumentError, "65 ways; expected 1 .. 64"),
        ({"levels": [CacheLevel(192, 3, 0, "tree")]}, errors.ArgumentError, "tree replacement needs a power of two"),
        ({"levels": [CacheLevel(192, 3, 0, "best")]}, errors.ArgumentError, "replacement must be one of"),  # type: ignore[arg-type]
        ({"levels": [CacheLevel(64, 1, -1)]}, errors.ArgumentError, "cycles"),
        ({"tlb": Tlb(12, 2)}, errors.LengthError, "12 entries"),
        ({"fill": "block"}, errors.ArgumentError, "fill must be one of"),
        ({"fabric_lines": 65}, errors.ArgumentError, "expected 0 .. 64"),
        ({"c_bit": 52}, errors.ArgumentError, "expected 32 .. 51"),
        ({"seed": -1}, errors.ArgumentError, "seed"),
    ],
)
def test_bad_shapes(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with EncryptedMemory(SIZE) as memory:
        with pytest.raises(kind, match=message):
            CacheModel(memory, **options)
        gc.collect()


def test_bad_accesses() -> None:
    with EncryptedMemory(SIZE, asid_max=5) as memory, CacheModel(memory) as core:
        for address, length, asid, encrypted, kind in (
            (SIZE, 1, 0, None, errors.AddressError),
            (0, SIZE + 1, 0, None, errors.AddressError),
            (-1, 1, 0, None, errors.AddressError),
            (0, 1, 6, None, errors.AsidError),
            (0, 1, 1, None, errors.UnknownAsidError),
            (0, 1, 0, True, errors.AsidError),
        ):
            with pytest.raises(kind):
                core.read(address, length, asid, encrypted=encrypted)
            with pytest.raises(kind):
                core.write(address, bytes(max(length, 0)), asid, encrypted=encrypted)
        with pytest.raises(errors.OverlapError):
            core.write(0, memory.raw[:8], asid=0)
        with pytest.raises(errors.AlignmentError):
            core.set_tables(1, guest_root=8)
        with pytest.raises(errors.AsidError):
            core.stats(6)


def test_life() -> None:
    memory = EncryptedMemory(SIZE)
    core = CacheModel(memory, levels=SMALL)
    assert "4-way lru" in repr(core)
    assert core.levels == SMALL
    with pytest.raises(errors.MemoryInUseError, match="1 cache models stand on it"):
        memory.close()
    with pytest.raises(errors.KeyExposureError):
        pickle.dumps(core)
    with pytest.raises(errors.KeyExposureError):
        copy.copy(core)
    with pytest.raises(errors.ArgumentError, match="already been initialised"):
        core.__init__(memory)  # type: ignore[misc]
    core.close()
    core.close()
    assert core.closed
    assert repr(core) == "<CacheModel closed>"
    with pytest.raises(errors.ClosedError):
        core.read(0, 1, asid=0)
    second = CacheModel(memory)
    del second
    gc.collect()
    memory.close()
    with pytest.raises(errors.ClosedError):
        CacheModel(memory)
    with pytest.raises(TypeError, match="EncryptedMemory"):
        CacheModel(b"memory")  # type: ignore[arg-type]
