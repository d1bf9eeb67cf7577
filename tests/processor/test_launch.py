"""LAUNCH_START to LAUNCH_FINISH: digests, states, codes, secrets, and a session that demands a digest."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.crypto import hmac_sm3, sm3
from csvfast.errors import ArgumentError, ClosedError, FirmwareError, FirmwareStatus
from csvfast.processor import GuestState, Options, Processor, Profile, make_session, pack_disk_password, seal_packet
from csvfast.processor.launch import measurement_message
from csvfast.processor.packet import FLAG_NO_MEASURE, KIND_DATA, KIND_SECRET
from csvfast.report import GuestPolicy

S = FirmwareStatus
MIB = 1 << 20
OVMF = bytes(7 * index % 256 for index in range(4096))
TABLE = bytes.fromhex(
    "06d63894224fc94cb479a793d411fd21a800d82dd09720bd944caa78e7714d36ab2a3200387d331f86d1de80d75783a10f0d6f55eb351f57"
    "27aab127213ddd6f2cfa3ddf31f7ba442f3ad74b9af141e29169781d3200e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495"
    "991b7852b8553794e74dd2ab7f42b835d5b172d2045b3200c458d546bea3761e98f763fcc4cc5438e35fd7af74c501b34a3176651d971e40"
    "0000000000000000"
)
PREDICTED = bytes.fromhex("88698862d12fa228f0bf8e51d6f3d9b9aae176e27fe8350b156d6787c135547b")
NODBG = GuestPolicy.of(nodbg=True)


def started(processor: Processor, memory: csvfast.EncryptedMemory, policy: GuestPolicy = NODBG, **start: Any) -> int:
    """A guest in LUPDATE under ASID 1, with OVMF at 0x10000 and the hash table at 0x20000 not yet given to the firmware."""
    handle = processor.launch_start(policy, **start)
    processor.activate(handle, 1)
    memory.write(0x10000, OVMF, 0)
    memory.write(0x20000, TABLE, 0)
    return handle


def with_session(processor: Processor, policy: GuestPolicy = NODBG, **fields: bytes) -> tuple[Any, dict[str, bytes]]:
    pdh = CsvCertificate.parse(processor.pdh_cert_export()[0])
    session = make_session(pdh, policy, **fields)  # type: ignore[arg-type]
    return session, {"dh": session.certificate.encoded, "session": session.blob}


def test_published_launch_digest(processor: Processor, memory: csvfast.EncryptedMemory) -> None:
    handle = started(processor, memory)
    processor.launch_update_data(handle, 0x10000, len(OVMF))
    processor.launch_update_data(handle, 0x20000, len(TABLE))
    # In place: the host sees ciphertext now, the guest what the host had written.
    assert memory.read(0x10000, 4096, 0) != OVMF
    assert memory.read(0x10000, 4096, 1) == OVMF
    assert memory.read(0x20000, 176, 1) == TABLE
    processor.launch_measure(handle)
    assert processor.guests[handle].measure == PREDICTED
    assert processor.guests[handle].rtmrs[0] == PREDICTED
    assert processor.guest_status(handle).state is GuestState.LSECRET


def test_addresses_and_boundaries_do_not_enter_the_digest(
    processor: Processor, memory: csvfast.EncryptedMemory
) -> None:
    """Published attacks use it: only the sequence of bytes counts (spec 6.1)."""
    handle = started(processor, memory)
    for at in range(0, 4096, 1024):
        processor.launch_update_data(handle, 0x10000 + at, 1024)
    memory.write(0x90010, TABLE, 0)
    processor.launch_update_data(handle, 0x90010 | 1 << 47, len(TABLE))
    processor.launch_measure(handle)
    assert processor.guests[handle].measure == PREDICTED


@pytest.mark.parametrize("blob", ["api-policy", "api-build-policy"])
def test_measurement_blob(blob: Any, chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    processor = Processor(chip, memory, options=Options(measure_blob=blob))
    processor.init()
    session, start = with_session(processor)
    handle = started(processor, memory, **start)
    processor.launch_update_data(handle, 0x10000, 4096)
    answer = processor.launch_measure(handle)
    assert len(answer) == 48
    covered = (
        b"\x04\x01\x04" + (b"\x21" if "build" in blob else b"") + NODBG.to_bytes() + sm3(OVMF).digest() + answer[32:]
    )
    assert 2337 & 0xFF == 0x21
    assert answer[:32] == hmac_sm3(session.tik, covered).digest()
    build = 2337 if "build" in blob else None
    assert covered == measurement_message((1, 4), NODBG, sm3(OVMF).digest(), answer[32:], build)


def test_without_a_session_nobody_knows_the_keys(processor: Processor, memory: csvfast.EncryptedMemory) -> None:
    first, second = processor.launch_start(0), processor.launch_start(0)
    one, two = processor.guests[first], processor.guests[second]
    assert one.tek is not None
    assert one.tik is not None
    assert two.tek is not None
    assert not one.tek.equals(two.tek)
    assert not one.tek.equals(one.tik)
    assert not one.vek.equals(two.vek)
    assert (one.vm_id, one.user_pubkey_digest, one.vm_digest) == (bytes(16), bytes(32), None)


def test_states(processor: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]) -> None:
    _, start = with_session(processor)
    handle = started(processor, memory, **start)
    vmsa = (processor.launch_update_vmsa, handle, 0x10000, 4096)
    data = (processor.launch_update_data, handle, 0x10000, 4096)
    secret = (processor.launch_secret, handle, bytes(52), 0x30000, 16, bytes(16))
    measure, finish = (processor.launch_measure, handle), (processor.launch_finish, handle)
    copy, debug = (processor.copy, handle, 0, 0x1000, 16), (processor.dbg_decrypt, handle, 0, 0x1000, 16)
    report = (processor.attestation, handle, 0x40000, 4096)
    for command in (secret, finish, copy, debug, report, (processor.attestation_host, handle, bytes(16))):
        refused(S.INVALID_GUEST_STATE, *command)
    processor.launch_measure(handle)
    for command in (data, vmsa, measure, copy, debug):
        refused(S.INVALID_GUEST_STATE, *command)
    processor.launch_finish(handle)
    for command in (data, vmsa, measure, secret, finish):
        refused(S.INVALID_GUEST_STATE, *command)
    assert processor.guest_status(handle).state is GuestState.RUNNING


def test_unknown_handles(processor: Processor, refused: Callable[..., FirmwareError]) -> None:
    known = processor.launch_start(0)
    for handle in (0, known + 1, -1, 1 << 32):
        for command in (
            (processor.activate, handle, 1), (processor.deactivate, handle), (processor.decommission, handle),
            (processor.guest_status, handle), (processor.launch_update_data, handle, 0, 16),
            (processor.launch_update_vmsa, handle, 0, 4096), (processor.launch_measure, handle),
            (processor.launch_secret, handle, bytes(52), 0, 16, bytes(16)), (processor.launch_finish, handle),
            (processor.attestation, handle, 0, 4096), (processor.attestation_host, handle, bytes(16)),
            (processor.dbg_decrypt, handle, 0, 16, 16), (processor.dbg_encrypt, handle, 0, 16, 16),
            (processor.copy, handle, 0, 16, 16),
        ):  # fmt: skip
            refused(S.INVALID_GUEST, *command)
    processor.decommission(known)
    refused(S.INVALID_PLATFORM_STATE, processor.guest_status, known)
    assert processor.launch_start(0) != known  # handles are not given twice in a row


def test_bad_ranges(
    processor: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    handle = started(processor, memory)
    guest = processor.guests[handle]
    before = guest.digest.digest(), memory.read(0x10000, 8192, 0)
    update = processor.launch_update_data
    for length in (-16, 0, 1, 15, 17):
        refused(S.INVALID_LENGTH, update, handle, 0x10000, length)
    for address, length in (
        (0x10008, 16), (0x10001, 16), (-16, 16), (4 * MIB, 16), (4 * MIB - 16, 32), (3 * MIB, 16), (1 << 63, 16), (0, 1 << 62),
        ((1 << 64) - 16, 32), (1 << 46, 16),
    ):  # fmt: skip
        refused(S.INVALID_ADDRESS, update, handle, address, length)
    assert (guest.digest.digest(), memory.read(0x10000, 8192, 0)) == before
    processor.deactivate(handle)
    refused(S.INACTIVE, update, handle, 0x10000, 16)


def test_vmsa(chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]) -> None:
    page = random.Random(5).randbytes(4096)
    for measured in (False, True):
        processor = Processor(chip, memory, options=Options(vmsa_measured=measured))
        processor.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
        handle = started(processor, memory, GuestPolicy.of(es=True))
        memory.write(0x30000, page, 0)
        processor.launch_update_data(handle, 0x10000, 4096)
        for length in (0, 4095, 8192):
            assert refused(S.INVALID_LENGTH, processor.launch_update_vmsa, handle, 0x30000, length).needed == {
                "length": 4096
            }
        refused(S.INVALID_ADDRESS, processor.launch_update_vmsa, handle, 0x30010, 4096)
        processor.launch_update_vmsa(handle, 0x30000, 4096)
        assert memory.read(0x30000, 4096, 1) == page
        assert memory.read(0x30000, 4096, 0) != page
        processor.launch_measure(handle)
        assert processor.guests[handle].measure == sm3(OVMF + (page if measured else b"")).digest()
        plain = processor.launch_start(0)
        processor.activate(plain, 2)
        refused(S.POLICY_FAILURE, processor.launch_update_vmsa, plain, 0x30000, 4096)
        processor.shutdown()


def test_policies(chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]) -> None:
    processor = Processor(chip, memory, profile=Profile(1, 3, 2011))
    processor.init()
    for wrong in (
        GuestPolicy.of(es=True), GuestPolicy.of(csv3=True), GuestPolicy.of(api_major=1, api_minor=4),
        GuestPolicy.of(api_major=2), GuestPolicy.of(api_minor=0xFF, api_major=1),
    ):  # fmt: skip
        refused(S.POLICY_FAILURE, processor.launch_start, wrong)
    for right in (
        GuestPolicy(0),
        GuestPolicy.of(api_major=1, api_minor=3),
        GuestPolicy.of(api_minor=99),
        GuestPolicy(0x3FB0),
    ):
        processor.launch_start(right)
    assert processor.launch_start(1)
    with pytest.raises(ArgumentError):
        processor.launch_start(1 << 32)
    processor.shutdown()
    processor.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
    processor.launch_start(GuestPolicy.of(es=True))
    refused(S.POLICY_FAILURE, processor.launch_start, GuestPolicy.of(es=True, csv3=True))


def test_csv3_guests_have_commands_of_their_own(
    processor: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    handle = started(processor, memory, GuestPolicy.of(nodbg=True, es=True, csv3=True))
    refused(S.UNSUPPORTED, processor.launch_update_data, handle, 0x10000, 16)
    refused(S.UNSUPPORTED, processor.launch_update_vmsa, handle, 0x10000, 4096)


def test_room_runs_out(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = Processor(chip, memory, options=Options(max_guests=2))
    processor.init()
    first = processor.launch_start(0)
    processor.launch_start(0)
    refused(S.RESOURCE_LIMIT, processor.launch_start, 0)
    processor.decommission(first)
    processor.launch_start(0)


# ---- vm_digest


def test_the_right_digest_runs(processor: Processor, memory: csvfast.EncryptedMemory) -> None:
    _, start = with_session(processor, vm_digest=PREDICTED)
    handle = started(processor, memory, **start)
    processor.launch_update_data(handle, 0x10000, 4096)
    processor.launch_update_data(handle, 0x20000, 176)
    processor.launch_measure(handle)
    processor.launch_finish(handle)


def test_the_wrong_digest_never_runs(
    processor: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    _, start = with_session(processor, vm_digest=PREDICTED)
    handle = started(processor, memory, **start)
    processor.launch_update_data(handle, 0x10000, 4096)
    refused(S.BAD_MEASUREMENT, processor.launch_measure, handle)
    # Not even if the host now adds what was missing.
    refused(S.BAD_MEASUREMENT, processor.launch_update_data, handle, 0x20000, 176)
    refused(S.BAD_MEASUREMENT, processor.launch_measure, handle)
    refused(S.INVALID_GUEST_STATE, processor.launch_finish, handle)
    refused(S.INVALID_GUEST_STATE, processor.attestation, handle, 0x40000, 4096)
    assert processor.guests[handle].measure is None
    assert processor.guest_status(handle).state is GuestState.LUPDATE


# ---- Secrets


@pytest.fixture
def waiting(processor: Processor, memory: csvfast.EncryptedMemory) -> tuple[int, Any, bytes]:
    """A measured guest with a session: handle, the owner's session, the measure."""
    session, start = with_session(processor)
    handle = started(processor, memory, **start)
    processor.launch_update_data(handle, 0x10000, 4096)
    return handle, session, processor.launch_measure(handle)[:32]


def test_secret(processor: Processor, memory: csvfast.EncryptedMemory, waiting: tuple[int, Any, bytes]) -> None:
    handle, session, measure = waiting
    table = pack_disk_password(b"correct horse battery staple")
    header, ciphertext = seal_packet(KIND_SECRET, session.tek, session.tik, table, iv=bytes(range(16)), measure=measure)
    processor.launch_secret(handle, header, 0x30010, len(table), ciphertext)
    assert memory.read(0x30010, len(table), 1) == table
    assert memory.read(0x30010, len(table), 0) not in (bytes(table), ciphertext)
    # More than one, and up to 16 KiB.
    big = random.Random(1).randbytes(16 * 1024)
    header, ciphertext = seal_packet(KIND_SECRET, session.tek, session.tik, big, iv=bytes(16), flags=FLAG_NO_MEASURE)
    processor.launch_secret(handle, header, 0x40000, len(big), ciphertext)
    assert memory.read(0x40000, len(big), 1) == big
    processor.launch_finish(handle)
    guest = processor.guests[handle]
    assert guest.tek is guest.tik is None


def test_secret_refusals(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    waiting: tuple[int, Any, bytes],
    refused: Callable[..., FirmwareError],
) -> None:
    handle, session, measure = waiting
    secret = bytes(32)
    header, text = seal_packet(KIND_SECRET, session.tek, session.tik, secret, iv=bytes(16), measure=measure)
    inject = processor.launch_secret
    before = memory.read(0x30000, 4096, 0)
    assert refused(S.INVALID_LENGTH, inject, handle, header[:-1], 0x30000, 32, text).needed == {"header_length": 52}
    for length, transport in (
        (0, b""),
        (32, text[:-1]),
        (16, text),
        (33, bytes(33)),
        (16400, bytes(16400)),
        (-32, text),
    ):
        refused(S.INVALID_LENGTH, inject, handle, header, 0x30000, length, transport)
    for address in (0x30008, 4 * MIB, 4 * MIB - 16, 3 * MIB):
        refused(S.INVALID_ADDRESS, inject, handle, header, address, 32, text)
    refused(S.INVALID_PARAM, inject, handle, b"\1" + header[1:], 0x30000, 32, text)
    for at in range(8 * 4, 8 * 52, 7):
        wrong = bytearray(header)
        wrong[at // 8] ^= 1 << at % 8
        refused(S.BAD_MEASUREMENT, inject, handle, wrong, 0x30000, 32, text)
    refused(S.BAD_MEASUREMENT, inject, handle, header, 0x30000, 32, bytes(32))
    other, text2 = seal_packet(KIND_SECRET, session.tek, session.tik, secret, iv=bytes(16), measure=bytes(32))
    refused(S.BAD_MEASUREMENT, inject, handle, other, 0x30000, 32, text2)
    data, text3 = seal_packet(KIND_DATA, session.tek, session.tik, secret, iv=bytes(16))
    refused(S.BAD_MEASUREMENT, inject, handle, data, 0x30000, 32, text3)
    processor.deactivate(handle)
    refused(S.INACTIVE, inject, handle, header, 0x30000, 32, text)
    assert memory.read(0x30000, 4096, 0) == before


def test_a_secret_is_for_one_launch(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    waiting: tuple[int, Any, bytes],
    refused: Callable[..., FirmwareError],
) -> None:
    """Same session, same firmware, another launch: another mnonce, so a recorded packet is worthless."""
    _, session, measure = waiting
    header, text = seal_packet(KIND_SECRET, session.tek, session.tik, bytes(32), iv=bytes(16), measure=measure)
    again = processor.launch_start(NODBG, dh=session.certificate.encoded, session=session.blob)
    processor.activate(again, 2)
    memory.write(0x50000, OVMF, 0)
    processor.launch_update_data(again, 0x50000, 4096)
    assert processor.launch_measure(again)[:32] != measure
    refused(S.BAD_MEASUREMENT, processor.launch_secret, again, header, 0x30000, 32, text)


def test_keys_die_with_the_guest(processor: Processor, memory: csvfast.EncryptedMemory) -> None:
    handle = started(processor, memory)
    guest = processor.guests[handle]
    vek, tek, tik = guest.vek, guest.tek, guest.tik
    assert tek is not None
    assert tik is not None
    processor.deactivate(handle)
    processor.decommission(handle)
    for secret in (vek, tek, tik):
        with pytest.raises(ClosedError):
            memoryview(secret)  # type: ignore[arg-type]
    other = processor.launch_start(0)
    processor.activate(other, 2)
    vek = processor.guests[other].vek
    processor.shutdown()
    with pytest.raises(ClosedError):
        memoryview(vek)  # type: ignore[arg-type]
    assert memory.asids() == []


def test_nothing_shows_keys(processor: Processor, memory: csvfast.EncryptedMemory) -> None:
    handle = started(processor, memory)
    guest = processor.guests[handle]
    vek = bytes(memoryview(guest.vek))
    assert processor.identity is not None
    for thing in (guest, processor, processor.identity, guest.vek, processor.guest_status(handle)):
        text = f"{thing!r} {thing}"
        assert vek.hex() not in text
        assert "0x" not in text or "policy" in text
