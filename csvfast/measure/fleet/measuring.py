"""What `perform` does: items measured whole, and ranges of large ones.

Trees of modes "tree" and "verity" have the same leaves wherever they are computed, so a large image may be split into ranges:
each worker returns the digests of its blocks (1/128 of the bytes), and whoever collects them in order builds the tree above.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from csvfast import _core
from csvfast.measure.errors import EmptySourceError, SourceChangedError
from csvfast.measure.fleet.lanes import measure_lanes
from csvfast.measure.fleet.providers import FileSource, Readable, error_of, open_item, recipe_identity
from csvfast.measure.fleet.rows import Identity, Item, Row
from csvfast.measure.fleet.tasks import RangeOutcome, RangeTask, Step, StoppedError, WholeTask
from csvfast.measure.image import PAGE_BYTES
from csvfast.measure.recipe import load_recipe
from csvfast.measure.source import STDIN, Access
from csvfast.measure.tree import BlockHash, TreeBuilder

__all__ = ["block_hash_of", "covered", "measure_range", "measure_whole", "tree_row"]

STEP_BYTES: Final = 512 << 10
WINDOW_BYTES: Final = 4 << 20
READ_AHEAD_BYTES: Final = 8 << 20
HOLE_BYTES: Final = 16 << 20
"""Of a hole, in one step; a multiple of every block size."""


def measure_whole(task: WholeTask, step: Step | None, worker: str) -> list[Row]:
    """One row for each item, in their order."""
    rows: list[Row | None] = [None] * len(task.items)
    linear = [place for place, item in enumerate(task.items) if item.mode == "linear"]
    lanes = measure_lanes([task.items[place] for place in linear], step, worker, task.access)
    for place, row in lanes:
        rows[linear[place]] = row
    for place, item in enumerate(task.items):
        if item.mode != "linear":
            rows[place] = _guarded(item, worker, step, task.access)
    return [row for row in rows if row is not None]


def measure_range(task: RangeTask, step: Step | None, worker: str) -> RangeOutcome:
    """The leaves of a range, or the item's row with an error."""
    started, before = time.time(), time.perf_counter()
    try:
        source = open_item(task.item, task.access)
        try:
            parts = list(_leaves(source, task.item, task.start, min(task.stop, covered(task.item, source.size)), step))
            source.check_unchanged()
            identity = source.identity
        finally:
            source.close()
    except StoppedError:
        raise
    except Exception as error:
        row = Row.failed(task.item, *error_of(error), started=started, worker=worker)
        return RangeOutcome(task.number, b"", Identity(), started, 0.0, worker, row)
    return RangeOutcome(task.number, b"".join(parts), identity, started, time.perf_counter() - before, worker)


def block_hash_of(item: Item) -> tuple[BlockHash, int]:
    """How blocks of an item of mode "tree" or "verity" become digests, and their bytes. Raises ParameterError."""
    if item.mode == "tree":
        return BlockHash(), PAGE_BYTES
    return BlockHash(bytes.fromhex(item.options.salt)), item.options.block_bytes


def covered(item: Item, size: int) -> int:
    """Bytes that the tree of an item covers: all of them (tree, the last page padded), or whole blocks (verity)."""
    return size if item.mode == "tree" else size // item.options.block_bytes * item.options.block_bytes


def tree_row(
    item: Item, builder: TreeBuilder, size: int, identity: Identity, started: float, seconds: float, worker: str
) -> Row:
    """The row of an item whose leaves are all in the builder."""
    try:
        digest = builder.finish()
    except EmptySourceError:
        _, block_bytes = block_hash_of(item)
        message = f"{item.name}: holds no whole block of {block_bytes} bytes; a tree needs at least one"
        return Row.failed(item, "empty", message, started=started, worker=worker)
    whole = covered(item, size)
    return Row(
        item.name,
        item.mode,
        item.content,
        item.options.text(),
        digest.hex(),
        whole,
        identity,
        expect=item.expect,
        uncovered=size - whole,
        started=started,
        seconds=seconds,
        worker=worker,
        location=item.row_location,
    )


def _guarded(item: Item, worker: str, step: Step | None, access: Access) -> Row:
    started = time.time()
    try:
        return _launch(item, worker, step) if item.mode == "launch" else _tree(item, worker, step, access)
    except StoppedError:
        raise
    except Exception as error:
        return Row.failed(item, *error_of(error), started=started, worker=worker)


def _tree(item: Item, worker: str, step: Step | None, access: Access) -> Row:
    started, before = time.time(), time.perf_counter()
    block_hash, block_bytes = block_hash_of(item)
    builder = TreeBuilder(block_hash, block_bytes)
    source = open_item(item, access)
    try:
        for leaves in _leaves(source, item, 0, covered(item, source.size), step):
            builder.add(leaves)
        source.check_unchanged()
        return tree_row(item, builder, source.size, source.identity, started, time.perf_counter() - before, worker)
    finally:
        source.close()


def _leaves(source: Readable, item: Item, start: int, stop: int, step: Step | None) -> Iterator[bytes]:
    block_hash, block_bytes = block_hash_of(item)
    file = source if isinstance(source, FileSource) else None
    mapped = file if file is not None and file.access == "mmap" else None
    whole = start + (stop - start) // block_bytes * block_bytes
    advised = start
    offset = start
    buffer = bytearray()
    zeros = b""
    while offset < stop:
        leaves = None
        count = 0 if file is None or offset >= whole else min(file.hole(offset), whole - offset) // block_bytes * block_bytes
        if count:
            zeros = zeros or block_hash.digests(bytes(block_bytes), block_bytes)
            count = min(count, HOLE_BYTES)
            leaves = zeros * (count // block_bytes)
        elif file is not None and offset >= advised and stop - offset > READ_AHEAD_BYTES:
            advised = offset + READ_AHEAD_BYTES
            file.will_need(advised, READ_AHEAD_BYTES)
        if leaves is None and mapped is not None and offset < whole:  # what is left is padded
            count = min(WINDOW_BYTES, whole - offset)
            leaves = _core.sm3_blocks_mapped(mapped.descriptor, offset, count, block_bytes, prefix=block_hash.salt)
            if leaves is None:  # reading says what is wrong
                mapped = None
        if leaves is None:
            count = min(max(STEP_BYTES, block_bytes), stop - offset)
            padded = -(-count // block_bytes) * block_bytes
            if len(buffer) < padded:
                buffer = bytearray(padded)
            with memoryview(buffer) as view:
                source.read_at(view[:count], offset)
                view[count:padded] = bytes(padded - count)
                leaves = block_hash.digests(view[:padded], block_bytes)
        yield leaves
        if step is not None:
            step(count)
        offset += count


def _launch(item: Item, worker: str, step: Step | None) -> Row:
    started, before = time.time(), time.perf_counter()
    recipe = load_recipe(item.location)
    if STDIN in (recipe.firmware, recipe.kernel, recipe.initrd):
        return Row.failed(item, "option", f"{item.name}: names '-'; expected files", started=started, worker=worker)
    identity = recipe_identity(item.location)
    last = 0

    def progress(done: int, _total: int | None) -> None:
        nonlocal last
        if step is not None:
            step(done - last)
        last = done

    outcome = recipe.measure(progress)
    if recipe_identity(item.location) != identity:
        raise SourceChangedError(f"{item.name}: changed while it was measured: it, or a file that it names")
    expect = item.expect or (None if recipe.expect is None else recipe.expect.hex())
    return Row(
        item.name,
        "launch",
        digest=outcome.hexdigest,
        size=sum(piece.size for piece in outcome.pieces),
        identity=identity,
        expect=expect,
        started=started,
        seconds=time.perf_counter() - before,
        worker=worker,
        location=item.row_location,
    )
