"""Cases work on what they say, restore the kernel choice, and refuse wrong answers; peers agree with csvfast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import csvfast
from csvfast.benchmark import NAMES, Plan, cases, make_cases, peers, sm2
from csvfast.errors import SignatureError

SMALL = Plan(buffer_bytes=64 << 10)


def chosen() -> dict[str, str]:
    return {name: entry["chosen"] for name, entry in csvfast.info()["kernels"].items()}


def test_every_case_runs_and_restores_the_kernels() -> None:
    before = chosen()
    seen = set()
    for case in make_cases(SMALL):
        with case.setup():
            case.make()()
        assert chosen() == before
        seen.add(case.name)
    assert seen == set(NAMES)


def test_cases_force_the_kernel_they_name() -> None:
    for case in make_cases(Plan(64 << 10, names=("sm4-xts-encrypt/4096", "sm3/1048576", "sm3-many/4096"), peers=False)):
        primitive = {"sm4": "sm4", "sm3/": "sm3", "sm3-": "sm3-many"}[case.name[:4] if case.name[2] == "3" else "sm4"]
        with case.setup():
            assert chosen()[primitive] == case.kernel


def test_encryption_case_works_on_its_whole_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[bytearray] = []
    original = cases._filled

    def filled(length: int) -> bytearray:
        buffers.append(original(length))
        return buffers[-1]

    monkeypatch.setattr(cases, "_filled", filled)
    case = next(make_cases(Plan(64 << 10, names=("sm4-xts-encrypt/4096",), peers=False)))
    work = case.make()
    (buffer,) = buffers
    before = bytes(buffer)
    work()
    assert len(buffer) == case.bytes == 64 << 10
    expected = csvfast.SM4XTS(peers.XTS_KEY, standard="gb").encrypt(before)
    assert bytes(buffer) == expected


def test_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves one bit wrong is never measured."""
    original = cases._xts_answer

    def answer(kernel: str, *arguments: Any) -> bytes:
        right = original(kernel, *arguments)
        return right if kernel == "portable" else right[:-1] + bytes([right[-1] ^ 1])

    if cases.kernels_of("sm4") == ["portable"]:
        pytest.skip("this CPU cannot run any other kernel than portable")
    monkeypatch.setattr(cases, "_xts_answer", answer)
    with pytest.raises(cases.WrongAnswerError, match="nothing measured"):
        list(make_cases(replace(SMALL, names=("sm4-xts-encrypt/4096",))))


def test_wrong_peer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_data: bytes) -> bytes:
        return bytes(32)

    offer = peers.Offer("sm3/1048576", broken, lambda buffer: lambda: None)
    monkeypatch.setattr(cases, "find_peers", lambda: [peers.Peer("broken", "1", (offer,))])
    with pytest.raises(cases.WrongAnswerError, match="broken 1"):
        list(make_cases(replace(SMALL, names=("sm3/1048576",))))


def test_peer_without_a_wrong_answer_is_measured() -> None:
    found = {case.peer for case in make_cases(replace(SMALL, names=("sm3/1048576", "sm4-ctr/65536")))}
    assert {"hashlib", "cryptography", "gmssl"} <= found


def test_libgcrypt_agrees() -> None:
    """The constants of the ctypes binding, by known answers (IEEE 1619 XTS, CTR, SM3)."""
    found = [peer for peer in peers.find_peers() if peer.name == "libgcrypt"]
    if not found:
        pytest.skip("libgcrypt is not installed")
    offers = {offer.name: offer for offer in found[0].offers}
    assert offers["sm3/1048576"].answer(b"abc").hex() == "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    page = bytes(range(256)) * 32
    expected = csvfast.SM4XTS(peers.XTS_KEY, standard="ieee").encrypt(page)
    assert offers["sm4-xts-encrypt/4096"].answer(page) == expected
    assert offers["sm4-xts-decrypt/4096"].answer(expected) == page


def test_threads_multiply_cases() -> None:
    plan = Plan(64 << 10, names=("memcpy",), threads=(1, 2, 3))
    assert [case.threads for case in make_cases(plan)] == [1, 2, 3]


def sm2_plan(*names: str, **options: Any) -> Plan:
    return replace(SMALL, names=names or sm2.NAMES, **options)


def test_sm2_cases_have_every_kernel_and_count_operations() -> None:
    measured: dict[str, set[str | None]] = {}
    for case in make_cases(sm2_plan(peers=False)):
        primitive = "sm2-many" if case.name == "sm2-verify-many" else "sm2"
        with case.setup():
            assert chosen()[primitive] == case.kernel
            if case.kernel == "portable":
                assert chosen()["sm2"] == "portable"
        assert case.operations == (sm2.MANY if case.name == "sm2-verify-many" else 1)
        assert case.bytes == 0
        measured.setdefault(case.name, set()).add(case.kernel)
    kernels = csvfast.info()["kernels"]
    assert measured == {
        name: set(kernels["sm2-many" if name == "sm2-verify-many" else "sm2"]["available"]) for name in sm2.NAMES
    }


def test_sm2_peers_agree_and_stand_beside_every_name() -> None:
    found = {peer.name for peer in sm2.find_sm2_peers()}
    assert "gmssl" in found
    for name in sm2.NAMES:
        assert {case.peer for case in make_cases(sm2_plan(name)) if case.peer} == found


@pytest.mark.parametrize("broken", ["accepts everything", "accepts nothing", "signs wrongly"])
def test_wrong_sm2_peer_is_refused(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    (right,) = (peer for peer in sm2.find_sm2_peers() if peer.name == "gmssl")
    wrong = {
        "accepts everything": replace(right, verifier=lambda: lambda der: True),
        "accepts nothing": replace(right, verifier=lambda: lambda der: False),
        "signs wrongly": replace(right, signer=lambda: lambda: bytes.fromhex("3006020101020101")),
    }[broken]
    monkeypatch.setattr(sm2, "find_sm2_peers", lambda: iter([wrong]))
    with pytest.raises((cases.WrongAnswerError, SignatureError)):
        list(make_cases(sm2_plan("sm2-verify")))


def test_a_refused_signature_stops_the_batch_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm2, "sm2_verify_many", lambda *arguments: [True, False])
    work = next(make_cases(sm2_plan("sm2-verify-many", peers=False))).make()
    with pytest.raises(RuntimeError, match="a good signature was refused"):
        work()
