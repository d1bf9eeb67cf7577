"""The security processor: a report from request to signed page, and a launch against the digest of the same bytes.

pytest bench/test_processor.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import csvfast
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.processor import Processor
from csvfast.report import GuestPolicy, ReportRequest

MIB = 1 << 20
LAUNCH_BYTES = 64 * MIB
PAGE = LAUNCH_BYTES + MIB


@pytest.fixture(scope="module")
def processor() -> Iterator[Processor]:
    chip = ManufacturingLine.create().make_chip()
    with csvfast.EncryptedMemory(LAUNCH_BYTES + 2 * MIB) as memory, Processor(chip, memory) as processor:
        processor.init()
        yield processor


@pytest.fixture
def guest(processor: Processor) -> Iterator[int]:
    handle = processor.launch_start(GuestPolicy.of(nodbg=True))
    processor.activate(handle, 1)
    yield handle
    processor.deactivate(handle)
    processor.decommission(handle)
    processor.wbinvd()
    processor.df_flush()


def test_report(benchmark: Any, processor: Processor, guest: int) -> None:
    """ATTESTATION in the guest's own page. The request is written again before each round, outside the time."""
    processor.launch_measure(guest)
    request = ReportRequest.build(b"report data")
    benchmark.group = "report, request to signed page"
    benchmark.pedantic(
        processor.attestation, (guest, PAGE, 4096), setup=lambda: processor.memory.write(PAGE, request, 1), rounds=2000
    )


def test_launch_start_with_session(benchmark: Any, processor: Processor) -> None:
    from csvfast.certs.layout import CsvCertificate
    from csvfast.processor import make_session

    policy = GuestPolicy.of(nodbg=True)
    session = make_session(CsvCertificate.parse(processor.pdh_cert_export()[0]), policy)
    benchmark.group = "LAUNCH_START with a session"

    def start() -> None:
        handle = processor.launch_start(policy, dh=session.certificate.encoded, session=session.blob)
        processor.decommission(handle)

    benchmark(start)


def test_launch(benchmark: Any, processor: Processor, guest: int) -> None:
    """LAUNCH_UPDATE_DATA of 64 MiB; extra_info holds the ratio to SM3 alone, both in the thread's CPU time."""
    memory, data = processor.memory, bytes(LAUNCH_BYTES)
    launches, digests = [], []

    def cpu(call: Callable[[], object]) -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    def both() -> None:
        memory.write(0, data, 0)
        launches.append(cpu(lambda: processor.launch_update_data(guest, 0, LAUNCH_BYTES)))
        digests.append(cpu(lambda: csvfast.sm3(data)))

    benchmark.group = "launch of 64 MiB, with the digest alone behind it"
    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    benchmark.extra_info["ratio to sm3"] = statistics.median(launches) / statistics.median(digests)
    print(f"\nlaunch of 64 MiB / sm3 of the same bytes: {benchmark.extra_info['ratio to sm3']:.3f}")
