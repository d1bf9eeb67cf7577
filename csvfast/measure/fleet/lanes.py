"""Linear digests of many sources in one core: each source is a stream of its own, and the streams share vector registers.

One linear SM3 is serial, and uses a fraction of what a core can do; sixteen or thirty-two of them side by side take hardly longer
than one. Small local files are opened, read and hashed without the GIL, hundreds in one call. Larger ones are mapped, window by
window, or read piece by piece into one buffer for each lane; a lane whose source ends is given to the next. Memory: ROOM_BYTES
and LANES pieces; windows are pages of the cache, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from csvfast import _core
from csvfast.measure.fleet.providers import FileSource, Readable, error_of, open_item
from csvfast.measure.fleet.rows import Identity, Item, Row
from csvfast.measure.fleet.tasks import Step
from csvfast.measure.source import Access

__all__ = ["LANES", "SMALL_BYTES", "measure_lanes"]

LANES: Final = 32
SMALL_BYTES: Final = 256 << 10
ROOM_BYTES: Final = 4 << 20
CALL_FILES: Final = 512
PIECE_BYTES: Final = 64 << 10
LONE_PIECE_BYTES: Final = 1 << 20
WINDOW_BYTES: Final = 2 << 20
READ_AHEAD_BYTES: Final = 4 << 20


def measure_lanes(items: Sequence[Item], step: Step | None, worker: str, access: Access = "mmap") -> Iterator[tuple[int, Row]]:
    """Rows of items of mode "linear", each with the item's place in the list, in the order in which they end.

    Raises only what `step` raises. Thread-safety: safe from any thread.
    """
    small = [place for place, item in enumerate(items) if _is_small(item)]
    left = sorted(set(range(len(items))).difference(small), key=lambda place: -(items[place].size or 0))
    for start in range(0, len(small), CALL_FILES):
        places = small[start : start + CALL_FILES]
        for place, row in zip(places, _small_rows([items[place] for place in places], worker), strict=True):
            if row is None:
                left.append(place)
            else:
                yield place, row
        if step is not None:
            step(sum(items[place].size or 0 for place in places))
    if left:
        yield from _Crowd(items, left, step, worker, access).rows()


_rooms = threading.local()


def _room() -> bytearray:
    room: bytearray | None = getattr(_rooms, "room", None)
    if room is None:
        room = _rooms.room = bytearray(ROOM_BYTES)
    return room


def _is_small(item: Item) -> bool:
    one = item.identity
    if one is None or one.size is None or one.mtime_ns is None:
        return False
    return one.size <= SMALL_BYTES and not item.provider and item.content == "file"


def _small_rows(items: Sequence[Item], worker: str) -> Iterable[Row | None]:
    started = time.time()
    before = time.perf_counter()
    identities = [item.identity or Identity() for item in items]
    try:
        names = [os.fsencode(item.location) for item in items]
        digests = _core.sm3_small_files(names, identities, _room(), SMALL_BYTES)
    except (TypeError, ValueError, OverflowError):  # what no path and no identity can be: the other way says what is wrong
        return [None] * len(items)
    sizes = [identity.size or 0 for identity in identities]
    took = (time.perf_counter() - before) / max(sum(sizes), 1)
    return [
        None
        if digest is None
        else Row(
            item.name,
            "linear",
            "file",
            item.options.text(),
            digest.hex(),
            size,
            identity,
            None,
            None,
            item.expect,
            0,
            started,
            size * took,
            worker,
            "" if item.location is item.name else item.row_location,
        )
        for item, identity, size, digest in zip(items, identities, sizes, digests, strict=True)
    ]


class _Lane:
    """A source under way."""

    def __init__(self, place: int, item: Item, source: Readable, *, mapped: bool) -> None:
        self.place = place
        self.item = item
        self.source = source
        self.sm3 = _core.sm3()
        self.done = 0
        self.started = time.time()
        self.seconds = 0.0
        self.mapped = source if mapped and isinstance(source, FileSource) else None
        self._buffer = bytearray()
        self._advised = 0

    def window(self, most: int) -> tuple[int, int, int]:
        """Descriptor, offset and length of the next bytes, at most so many, of a mapped lane."""
        assert self.mapped is not None
        self._advise(most)
        return (self.mapped.descriptor, self.done, min(most, self.source.size - self.done))

    def piece(self, most: int) -> memoryview:
        """The next bytes, at most so many; valid until the next call."""
        count = min(most, self.source.size - self.done)
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view = memoryview(self._buffer)[:count]
        self._advise(most)
        self.source.read_at(view, self.done)
        return view

    def _advise(self, most: int) -> None:
        if isinstance(self.source, FileSource) and self.source.size - self._advised > most and self._advised <= self.done:
            self._advised = self.done + READ_AHEAD_BYTES
            self.source.will_need(self._advised, READ_AHEAD_BYTES)

    def row(self, worker: str) -> Row:
        """Of a source that has been hashed to its end."""
        self.source.check_unchanged()
        item = self.item
        return Row(
            item.name,
            "linear",
            item.content,
            item.options.text(),
            self.sm3.hexdigest(),
            self.done,
            self.source.identity,
            expect=item.expect,
            started=self.started,
            seconds=self.seconds,
            worker=worker,
            location=item.row_location,
        )


class _Crowd:
    """Lanes that are refilled from a list."""

    def __init__(self, items: Sequence[Item], places: Iterable[int], step: Step | None, worker: str, access: Access) -> None:
        self._items = items
        self._places = iter(places)
        self._step = step
        self._worker = worker
        self._access = access
        self._live: list[_Lane] = []

    def rows(self) -> Iterator[tuple[int, Row]]:
        try:
            while True:
                yield from self._refill()
                if not self._live:
                    return
                yield from self._round()
        finally:
            for lane in self._live:
                lane.source.close()

    def _refill(self) -> Iterator[tuple[int, Row]]:
        while len(self._live) < LANES:
            place = next(self._places, None)
            if place is None:
                return
            item = self._items[place]
            started = time.time()
            try:
                source = open_item(item, self._access)
            except Exception as error:
                yield place, Row.failed(item, *error_of(error), started=started, worker=self._worker)
            else:
                self._live.append(_Lane(place, item, source, mapped=self._access == "mmap"))

    def _round(self) -> Iterator[tuple[int, Row]]:
        before = time.perf_counter()
        counts = self._hash_mapped([lane for lane in self._live if lane.mapped is not None])
        failed = self._hash_read([lane for lane in self._live if lane not in counts], counts)
        total = sum(counts.values())
        took = (time.perf_counter() - before) / max(total, 1)
        for lane, count in counts.items():
            lane.done += count
            lane.seconds += count * took
        yield from failed
        if self._step is not None:
            self._step(total)
        for lane in counts:
            if lane.done == lane.source.size:
                try:
                    row = lane.row(self._worker)
                except Exception as error:
                    row = Row.failed(lane.item, *error_of(error), started=lane.started, worker=self._worker)
                yield self._end(lane, row)

    def _hash_mapped(self, lanes: list[_Lane]) -> dict[_Lane, int]:
        """The lanes that went on, and by how many bytes. The others will be read from now on, which says what is wrong."""
        windows = [lane.window(WINDOW_BYTES) for lane in lanes]
        results = _core.sm3_update_mapped([lane.sm3 for lane in lanes], windows)
        for lane, hashed in zip(lanes, results, strict=True):
            if not hashed:
                lane.mapped = None
        return {lane: window[2] for lane, window, hashed in zip(lanes, windows, results, strict=True) if hashed}

    def _hash_read(self, lanes: list[_Lane], counts: dict[_Lane, int]) -> list[tuple[int, Row]]:
        """Adds the lanes that went on to `counts`; returns the rows of those that failed."""
        most = PIECE_BYTES if len(self._live) > 2 else LONE_PIECE_BYTES
        failed: list[tuple[int, Row]] = []
        pieces: dict[_Lane, memoryview] = {}
        for lane in lanes:
            try:
                pieces[lane] = lane.piece(most)
            except Exception as error:
                row = Row.failed(lane.item, *error_of(error), started=lane.started, worker=self._worker)
                failed.append(self._end(lane, row))
        _core.sm3_update_many([lane.sm3 for lane in pieces], pieces.values())
        for lane, piece in pieces.items():
            counts[lane] = len(piece)
            piece.release()
        return failed

    def _end(self, lane: _Lane, row: Row) -> tuple[int, Row]:
        self._live.remove(lane)
        lane.source.close()
        return lane.place, row
