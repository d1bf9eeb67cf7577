"""Many threads, one processor: commands take turns, and nobody gets somebody else's key, ASID or report."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.crypto import sm3
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import PlatformState, Processor
from csvfast.report import GuestPolicy, Report, ReportRequest

MIB = 1 << 20
GUESTS = 8
ROUNDS = 12


def test_launches_side_by_side(chip: ChipIdentity) -> None:
    with (
        csvfast.EncryptedMemory(GUESTS * MIB, asid_max=GUESTS, threads=2) as memory,
        Processor(chip, memory) as processor,
    ):
        processor.init()
        start = threading.Barrier(GUESTS)
        seen: set[FirmwareStatus] = set()

        def life(number: int) -> int:
            chooser = random.Random(number)
            base, asid, flushes = number * MIB, number + 1, 0
            start.wait()
            for turn in range(ROUNDS):
                data = chooser.randbytes(chooser.randrange(1, 40) * 16)
                handle = processor.launch_start(GuestPolicy.of(nodbg=True))
                while True:
                    try:
                        processor.activate(handle, asid)
                        break
                    except FirmwareError as refusal:
                        # Others deactivate between the WBINVD and the DF_FLUSH: try again, as a hypervisor does.
                        seen.add(refusal.status)
                        processor.wbinvd()
                        try:
                            processor.df_flush()
                            flushes += 1
                        except FirmwareError as early:
                            seen.add(early.status)
                memory.write(base, data, 0)
                processor.launch_update_data(handle, base, len(data))
                processor.launch_measure(handle)
                processor.launch_finish(handle)
                page = base + 0x80000
                memory.write(page, ReportRequest.build(b"%d/%d" % (number, turn)), asid)
                processor.attestation(handle, page, 4096)
                report = Report.parse(memory.read(page, 4096, asid), 1)
                assert report.measure == sm3(data).digest()
                assert report.report_data.rstrip(b"\0") == b"%d/%d" % (number, turn)
                assert memory.read(base, len(data), asid) == data
                processor.deactivate(handle)
                processor.decommission(handle)
            return flushes

        with ThreadPoolExecutor(GUESTS) as pool:
            assert sum(pool.map(life, range(GUESTS))) > 0
        assert seen <= {FirmwareStatus.DFFLUSH_REQUIRED, FirmwareStatus.WBINVD_REQUIRED}
        assert processor.state is PlatformState.INIT
        assert memory.asids() == []


def test_shutdown_under_use(chip: ChipIdentity) -> None:
    """A command either ran before SHUTDOWN or finds the platform down; no key stays behind."""
    with csvfast.EncryptedMemory(4 * MIB, asid_max=200) as memory, Processor(chip, memory) as processor:
        processor.init()
        begun = threading.Event()
        seen: list[FirmwareStatus] = []

        def launch() -> None:
            for asid in range(1, 200):
                try:
                    handle = processor.launch_start(0)
                    processor.activate(handle, asid)
                    processor.launch_update_data(handle, asid * 4096, 4096)
                except FirmwareError as refusal:
                    seen.append(refusal.status)
                    return
                begun.set()

        thread = threading.Thread(target=launch)
        thread.start()
        assert begun.wait(30)
        processor.shutdown()
        thread.join(30)
        assert not thread.is_alive()
        assert memory.asids() == []
        assert processor.guests == {}
        assert set(seen) <= {FirmwareStatus.INVALID_PLATFORM_STATE}
