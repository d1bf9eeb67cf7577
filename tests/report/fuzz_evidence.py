"""Random inputs for the parsers of reports, evidence and event logs: read, or refused with an exception of csvfast.

    python tests/report/fuzz_evidence.py TARGET [--inputs 10000000] [--seed 1]

Inputs are mutations of valid ones (bits, bytes, words at the edges of their range, cut and repeated pieces; for text also
tokens), so that they get past the first checks. One line says how many were read, how many refused, and the time of the slowest;
an exception of another kind stops the campaign and prints the input's hexadecimal. The tests run a few thousand of each.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attest.simulated_evidence import MEASURE, MNONCE, Platform
from report.published_event_log import DETAILED, build_log

from csvfast.attest import AppraisalPolicy, ChainCache, claims, verify
from csvfast.errors import CsvfastError
from csvfast.report import EventLog, Evidence, Report, ReportRequest, read_evidence
from csvfast.report.event_details import event_claims

PLATFORM = Platform()
CACHE = ChainCache()
EDGES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
TOKENS = [b"null", b"true", b"-1", b"256", b"1e9", b"0.5", b"NaN", b"{}", b"[]", b'""', b'"a"', b"[[[[", b"9" * 30, b","]


def read_report(data: bytes) -> None:
    report = Report.parse(data)
    _ = (report.info, report.policy.to_dict(), report.pek_is_masked, report.mac_is_valid(), report.rtmrs, report.page())
    _ = (report.signature, report.pek.slots, report.chip_id)


def read_any_evidence(data: bytes) -> None:
    evidence = read_evidence(data)
    _ = (evidence.to_raw(), evidence.to_csv_rs(), evidence.hsk, evidence.cek, evidence.pek, claims(evidence))


def read_log(data: bytes) -> None:
    log = EventLog.parse(data)
    event_claims(log)
    log.replay()


def verify_evidence(data: bytes) -> None:
    verify(data, roots=PLATFORM.roots, mnonce=MNONCE, cache=CACHE, allow_partial=True)


POLICY = b"""measurements = ["%s"]
report_versions = [1, 2]
[policy]
required = ["nodbg"]
exact = [0x45]
[minimum]
api = "1.3"
build = 2337
""" % MEASURE.hex().encode()

_EMITTED = PLATFORM.evidence()
_BINARY = [_EMITTED.to_rats_tls(), _EMITTED.to_librats(), _EMITTED.to_csv_rs(), _EMITTED.to_raw(), _EMITTED.report.page()]
_BINARY += [PLATFORM.page_v2(), PLATFORM.evidence(2).to_csv_rs(), PLATFORM.page_v2()[:3380]]
_LOG = build_log([(1 + index % 4, kind, digest, data) for index, (kind, digest, data, _details, _same) in enumerate(DETAILED)])

TARGETS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "request": (ReportRequest.parse, [ReportRequest.build(b"data"), ReportRequest.build(b"data", extended=True)]),
    "report": (read_report, [PLATFORM.page_v1(), PLATFORM.page_v1()[:2548], PLATFORM.page_v2(), PLATFORM.page_v2()[:3380]]),
    "evidence": (read_any_evidence, _BINARY),
    "evidence-json": (read_any_evidence, [_EMITTED.to_json(), Evidence(_EMITTED.report, event_log=_LOG).to_json()]),
    "event-log": (read_log, [_LOG]),
    "policy": (AppraisalPolicy.parse, [POLICY, b'{"any_measurement": true, "rtmrs": {"rtmr1": ["%s"]}}' % (b"00" * 32)]),
    "verify": (verify_evidence, _BINARY),
}


def mutated(seed: bytes, generator: random.Random, text: bool) -> bytes:
    data = bytearray(seed)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
        at = generator.randrange(len(data) + 1) if data else 0
        kind = generator.randrange(8 if text else 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = generator.randrange(256)
        elif kind == 2:
            word = generator.choice(EDGES).to_bytes(4, "little")[: generator.choice((1, 2, 4))]
            data[at : at + len(word)] = word
        elif kind == 3:
            del data[at : at + generator.choice((1, 4, 64, 2084, 2916))]
        elif kind == 4:
            start = generator.randrange(len(data) + 1)
            data[at:at] = data[start : start + generator.choice((1, 4, 64, 832))]
        elif kind == 5:
            data[at : at + 4] = generator.randbytes(4)
        else:
            data[at : at + generator.randrange(4)] = generator.choice(TOKENS)
    return bytes(data)


def campaign(target: str, inputs: int, seed: int) -> tuple[int, int, float]:
    """(read, refused, seconds of the slowest). Anything but an exception of csvfast is raised, with the input in a note."""
    function, seeds = TARGETS[target]
    generator = random.Random(f"{target} {seed}")
    text = target in ("evidence-json", "policy")
    read = refused = 0
    slowest = 0.0
    for _ in range(inputs):
        data = mutated(generator.choice(seeds), generator, text)
        start = time.thread_time()
        try:
            function(data)
            read += 1
        except CsvfastError:
            refused += 1
        except BaseException as error:
            error.add_note(f"target {target}, input {data.hex()}")
            raise
        slowest = max(slowest, time.thread_time() - start)
    return read, refused, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    read, refused, slowest = campaign(arguments.target, arguments.inputs, arguments.seed)
    print(f"{arguments.target}: {read} read, {refused} refused, slowest {slowest * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
