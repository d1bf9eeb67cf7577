"""A CSV3 guest's memory against a model: random accesses, changes of side, host writes, spurious faults, then a migration."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from reference.csv3_guest import PAGE, SHADOW, SHARED, SMR, SMR_ENTRY, GuestView, SecureCalls, launch, platform

from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.processor import Processor
from csvfast.processor.csv3_migration import MIGRATE_PAGES, SET_READ_ONLY

PAGES = 6
FIRST = 0x100
ACK = 0x6B

LINE = ManufacturingLine.create()
CHIP, OTHER = LINE.make_chip(), LINE.make_chip()

page = st.integers(0, PAGES - 1)
step = st.one_of(
    st.tuples(st.just("write"), page, st.integers(1, 255)),
    st.tuples(st.just("host"), page, st.integers(1, 255)),
    st.tuples(st.sampled_from(["read", "share", "private", "fault", "reset"]), page, st.just(0)),
)
steps = st.lists(step, max_size=40)


class Model:
    """What each page holds: private ones their own value, 0 when new; shared ones what stands in the host's frame."""

    def __init__(self) -> None:
        self.shared = [False] * PAGES
        self.private = [0] * PAGES
        self.host = [0] * PAGES

    def value(self, index: int) -> int:
        return self.host[index] if self.shared[index] else self.private[index]

    def apply(self, kind: str, index: int, value: int) -> None:
        if kind == "host" or (kind == "write" and self.shared[index]):
            self.host[index] = value
        elif kind == "write":
            self.private[index] = value
        elif kind == "share":
            # Private content is gone when a page is shared, and what was shared already stays as it is.
            self.shared[index], self.private[index] = True, 0
        elif kind == "private" and self.shared[index]:
            self.shared[index], self.private[index] = False, 0
        elif kind == "reset":
            for number in range(PAGES):
                self.apply("private", number, 0)


def run(
    processor: Processor, view: GuestView, calls: SecureCalls, model: Model, kind: str, index: int, value: int
) -> None:
    gpa = (FIRST + index) * PAGE
    if kind == "write":
        view.write(gpa, bytes([value]) * 64)
    elif kind == "host":
        processor.memory.write(SHARED + index * PAGE, bytes([value]) * 64, 0)
    elif kind == "fault":
        processor.update_npt(view.handle, 6, gpa, SHARED + index * PAGE, 1)
    elif kind in ("share", "private"):
        assert calls(2 if kind == "share" else 1, [(gpa, PAGE)])[0] == ACK
    elif kind == "reset":
        assert calls(3, [(0, 0)])[0] == ACK
    model.apply(kind, index, value)
    assert view.read(gpa, 64) == bytes([model.value(index)]) * 64


def check(processor: Processor, view: GuestView, model: Model) -> None:
    """Every page, and that no private frame is used twice or lost."""
    record = processor.csv3_record(processor.guests[view.handle])
    for index in range(PAGES):
        assert view.read((FIRST + index) * PAGE, 64) == bytes([model.value(index)]) * 64
    frames = {entry.frame for entry in record.table.entries.values() if entry.private}
    assert len(frames) == len(record.table.private_gfns())
    usable = SMR_ENTRY // PAGE - 5  # five frames stay with the firmware
    assert len(frames) + record.pool.free + len(record.vcpus) == usable
    assert all(SMR[0] <= frame * PAGE < SMR[0] + SMR_ENTRY for frame in frames)


@settings(max_examples=60)
@given(steps, steps, steps)
def test_against_a_model(
    before: list[tuple[str, int, int]], meanwhile: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    hosted = {FIRST + index: SHARED + index * PAGE for index in range(PAGES)}
    with platform(CHIP) as source, platform(OTHER) as target:
        model = Model()
        view = GuestView(source, launch(source), hosted)
        calls = SecureCalls(view)
        for one in before:
            run(source, view, calls, model, *one)
        check(source, view, model)

        pdh, chain = target.pdh_cert_export()
        vendor = target.chip.hsk.encoded + target.chip.root.encoded
        policy, session = source.send_start(view.handle, pdh, chain, vendor)
        own, own_chain = source.pdh_cert_export()
        arrived = target.receive_start(policy, own + own_chain + vendor, session)
        target.activate(arrived, 9)
        target.set_guest_private_memory(arrived, [(SMR[0], SMR_ENTRY)])
        record = source.csv3_record(source.guests[view.handle])
        # Everything once; then the guest goes on while it is on its way; then whatever is not up to date.
        for first in (True, False):
            if not first:
                for one in meanwhile:
                    run(source, view, calls, model, *one)
            gfns = [gfn for gfn in record.table.private_gfns() if gfn not in record.sent]
            if gfns:
                block = struct.pack(f"<{len(gfns)}Q", *(gfn << 12 for gfn in gfns))
                source.send_encrypt_data(view.handle, block, SET_READ_ONLY)
                target.receive_encrypt_data(arrived, *source.send_encrypt_data(view.handle, block, MIGRATE_PAGES))
        target.receive_encrypt_context(arrived, *source.send_encrypt_context(view.handle), [SHADOW])
        source.send_finish(view.handle)
        target.receive_finish(arrived)
        # Shared pages are the hosts' to copy.
        target.memory.write(SHARED, source.memory.read(SHARED, PAGES * PAGE, 0), 0)

        there = GuestView(target, arrived, hosted)
        calls.guest = there
        check(target, there, model)
        for one in after:
            run(target, there, calls, model, *one)
        check(target, there, model)
