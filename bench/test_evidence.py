"""Evidence a second: parse, verify, claims. rats-tls evidence (binary) of simulated chips, one core.

Goals: uncached (every certificate and the report, the root's own signature once a process) at least 4,000 a second; with the
chip's chain cached at least 20,000 a second; a report from request to signed page below 100 microseconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from attest.simulated_evidence import Platform  # type: ignore[import-not-found]

from csvfast.attest import ChainCache, claims, verify, verify_many
from csvfast.report import read_evidence

BATCH = 256


@pytest.fixture(scope="module")
def platform() -> Any:
    return Platform()


def test_parse_and_claims(benchmark: Any, platform: Any) -> None:
    benchmark.group = "evidence: parse and claims, nothing verified"
    raw = platform.evidence().to_rats_tls()
    benchmark(lambda: claims(read_evidence(raw)))


def test_parse_json(benchmark: Any, platform: Any) -> None:
    benchmark.group = "evidence: parse and claims, nothing verified"
    raw = platform.evidence().to_json()
    benchmark(lambda: claims(read_evidence(raw)))


def test_verify_uncached(benchmark: Any, platform: Any) -> None:
    benchmark.group = "evidence: parse, verify, claims"
    raw, roots = platform.evidence().to_rats_tls(), platform.roots
    benchmark(lambda: claims(verify(raw, roots=roots)))


def test_verify_cached(benchmark: Any, platform: Any) -> None:
    benchmark.group = "evidence: parse, verify, claims"
    raw, roots, cache = platform.evidence().to_rats_tls(), platform.roots, ChainCache()
    for _ in range(3):
        verify(raw, roots=roots, cache=cache)
    benchmark(lambda: claims(verify(raw, roots=roots, cache=cache)))


@pytest.mark.parametrize("chips", [1, 32, BATCH])
def test_verify_many(benchmark: Any, platform: Any, chips: int) -> None:
    benchmark.group = f"evidence: verify_many, {BATCH} at once (time is for all of them)"
    platforms = [Platform(platform.line) for _ in range(chips)]
    batch = [platforms[index % chips].evidence().to_rats_tls() for index in range(BATCH)]
    benchmark(lambda: [claims(one) for one in verify_many(batch, roots=platform.roots)])


def test_verify_json(benchmark: Any, platform: Any) -> None:
    benchmark.group = "evidence: parse, verify, claims"
    raw, roots, cache = platform.evidence().to_json(), platform.roots, ChainCache()
    benchmark(lambda: claims(verify(raw, roots=roots, cache=cache)))


def test_build_report(benchmark: Any, platform: Any) -> None:
    benchmark.group = "report: sign and build a page"
    benchmark(platform.page_v1)
