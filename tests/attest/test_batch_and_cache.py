"""verify_many gives what verify gives, one by one; the cache knows only what was verified."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import pytest
from attest.simulated_evidence import Platform

from csvfast.attest import ChainCache, Verified, verify, verify_many
from csvfast.crypto import sm2_verify_many
from csvfast.errors import ArgumentError, CsvfastError, VerificationError
from csvfast.report import Evidence, Report

verify_module = sys.modules["csvfast.attest.verify"]
LINE = Platform().line
PLATFORMS = [Platform(LINE) for _ in range(3)]
ROOTS = [LINE.root]


def outcome(result: Verified | CsvfastError) -> tuple[str, object]:
    if isinstance(result, Verified):
        return "genuine", (result.checks, result.unchecked, result.evidence.report, result.root_fingerprint)
    return type(result).__name__, getattr(result, "step", None)


def one_by_one(item: bytes, **keywords: object) -> Verified | CsvfastError:
    try:
        return verify(item, roots=ROOTS, **keywords)  # type: ignore[arg-type]
    except CsvfastError as error:
        return error


def mixed_batch(count: int, seed: int) -> list[bytes]:
    generator = random.Random(seed)
    seeds = [write(platform.evidence()) for platform in PLATFORMS for write in (Evidence.to_rats_tls, Evidence.to_librats)]
    seeds += [platform.page_v1() for platform in PLATFORMS] + [Platform().evidence().to_rats_tls(), b"garbage"]
    batch = []
    for _ in range(count):
        item = bytearray(generator.choice(seeds))
        if generator.random() < 0.4:
            item[generator.randrange(len(item))] ^= 1 << generator.randrange(8)
        batch.append(bytes(item))
    return batch


@pytest.mark.parametrize("strict", [True, False])
def test_same_as_one_by_one(strict: bool) -> None:
    batch = mixed_batch(200, 3)
    expected = [outcome(one_by_one(item, strict=strict)) for item in batch]
    assert len({kind for kind, _rest in expected}) == 3
    assert [outcome(result) for result in verify_many(batch, roots=ROOTS, strict=strict)] == expected
    cache = ChainCache()
    for _ in range(3):
        assert [outcome(result) for result in verify_many(batch, roots=ROOTS, strict=strict, cache=cache)] == expected


def test_a_chain_that_fails_fails_all_its_reports() -> None:
    platform = PLATFORMS[0]
    certificates = bytearray(platform.hsk_cek)
    certificates[832 + 1052] ^= 1  # the HSK's signature of the CEK
    wrong = Evidence(platform.evidence().report, hsk_cek=bytes(certificates))
    cache = ChainCache()
    results = verify_many([wrong, platform.evidence(), wrong, wrong], roots=ROOTS, cache=cache)
    assert [isinstance(result, Verified) for result in results] == [False, True, False, False]
    assert {result.step for result in results if isinstance(result, VerificationError)} == {"CEK"}
    assert len(cache) == 1
    # Neither the batch before nor a failed verification made the chain known.
    for _ in range(2):
        with pytest.raises(VerificationError):
            verify(wrong, roots=ROOTS, cache=cache)
    assert len(cache) == 1


def test_a_wrong_report_does_not_make_its_chain_known() -> None:
    page = bytearray(PLATFORMS[0].page_v1())
    page[0] ^= 1
    cache = ChainCache()
    wrong = Evidence(Report.parse(page), hsk_cek=PLATFORMS[0].hsk_cek)
    assert outcome(verify_many([wrong], roots=ROOTS, cache=cache)[0]) == ("VerificationError", "report signature")
    assert len(cache) == 0


def test_a_chain_whose_first_report_is_unreadable_is_still_verified() -> None:
    platform = PLATFORMS[0]
    certificates = bytearray(platform.hsk_cek)
    certificates[832 + 1052] ^= 1
    page = bytearray(platform.page_v1())
    page[0xC0 + 50] = 1  # a number of more than 32 bytes: refused before any signature is looked at
    unreadable = Evidence(Report.parse(page), hsk_cek=bytes(certificates))
    readable = Evidence(platform.evidence().report, hsk_cek=bytes(certificates))
    results = verify_many([unreadable, readable, readable], roots=ROOTS)
    steps = [result.step for result in results if isinstance(result, VerificationError)]
    assert steps == ["report signature", "CEK", "CEK"]


def test_a_batch_checks_each_chain_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counting(keys: Any, signatures: Any, digests: Any) -> list[bool]:
        counts.append(len(keys))
        return sm2_verify_many(keys, signatures, digests)

    monkeypatch.setattr(verify_module, "sm2_verify_many", counting)
    evidence = [platform.evidence() for platform in PLATFORMS for _ in range(5)]
    assert all(isinstance(one, Verified) for one in verify_many(evidence, roots=ROOTS))
    assert counts == [3 * 3 + 15]  # HSK, CEK and PEK of three chips, and fifteen reports


def test_batches_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that failed in one piece is not taken as known in the next."""
    monkeypatch.setattr(verify_module, "_CHUNK", 4)
    certificates = bytearray(PLATFORMS[0].hsk_cek)
    certificates[832 + 1052] ^= 1
    wrong = Evidence(PLATFORMS[0].evidence().report, hsk_cek=bytes(certificates))
    results = verify_many([wrong, PLATFORMS[0].evidence()] * 10, roots=ROOTS, cache=ChainCache())
    assert [isinstance(one, Verified) for one in results] == [False, True] * 10


def test_empty_batches_and_roots() -> None:
    assert verify_many([], roots=ROOTS) == []
    assert [outcome(result)[0] for result in verify_many([b"x"], roots=ROOTS)] == ["FormatError"]
    with pytest.raises(VerificationError):
        verify_many([], roots=[])


def test_partial_batch() -> None:
    results = verify_many([PLATFORMS[0].page_v1()], roots=ROOTS, allow_partial=True)
    assert isinstance(results[0], Verified)
    assert not results[0].complete


def test_cache_is_bounded_and_counts() -> None:
    cache = ChainCache(2)
    for platform in PLATFORMS:
        verify(platform.evidence(), roots=ROOTS, cache=cache)
    assert cache.stats() == {"entries": 2, "capacity": 2, "hits": 0, "misses": 3}
    verify(PLATFORMS[2].evidence(), roots=ROOTS, cache=cache)
    verify(PLATFORMS[0].evidence(), roots=ROOTS, cache=cache)  # the oldest went
    assert cache.stats() == {"entries": 2, "capacity": 2, "hits": 1, "misses": 4}
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ArgumentError):
        ChainCache(0)


def test_the_least_recently_used_goes() -> None:
    cache = ChainCache(2)
    for index in (0, 1, 0, 2, 0):
        verify(PLATFORMS[index].evidence(), roots=ROOTS, cache=cache)
    assert (cache.stats()["hits"], cache.stats()["misses"]) == (2, 3)


def test_roots_and_rules_are_part_of_the_key() -> None:
    cache = ChainCache()
    evidence = PLATFORMS[0].evidence()
    verify(evidence, roots=ROOTS, cache=cache)
    with pytest.raises(VerificationError):
        verify(evidence, cache=cache)
    with pytest.raises(VerificationError):
        verify(evidence, roots=[Platform().line.root], cache=cache)
    verify(evidence, roots=ROOTS, strict=False, cache=cache)
    assert len(cache) == 2


def test_known_keys_get_tables() -> None:
    cache = ChainCache()
    for _ in range(4):
        verified = verify(PLATFORMS[0].evidence(), roots=ROOTS, cache=cache)
    assert verified.chain is not None
    assert verified.chain.pek is not None
    assert verified.chain.pek.public_key.prepared


def test_threads_share_a_cache() -> None:
    cache = ChainCache(2)
    failures: list[BaseException] = []

    def work(platform: Platform) -> None:
        try:
            for _ in range(40):
                assert verify(platform.evidence().to_rats_tls(), roots=ROOTS, cache=cache).complete
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(platform,)) for platform in PLATFORMS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(cache) <= 2
