"""ATTESTATION: the page that comes back, under whose root it verifies, V1 and V2, the host's form, and wrong requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import csvfast
from csvfast.attest import verify
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.fields import from_field
from csvfast.certs.layout import CsvCertificate
from csvfast.crypto import hmac_sm3, sm3
from csvfast.errors import FirmwareError, FirmwareStatus, VerificationError
from csvfast.processor import PROFILE_1_3_2011, GuestState, Processor, Profile, make_session
from csvfast.processor.session import public_key_digest
from csvfast.report import GuestPolicy, Report, ReportRequest
from csvfast.report.evidence import read_evidence

S = FirmwareStatus
MIB = 1 << 20
PAGE_AT = 0x40000
DATA = bytes(range(256)) * 16
NODBG = GuestPolicy.of(nodbg=True)


def ask(processor: Processor, memory: csvfast.EncryptedMemory, handle: int, asid: int = 1, **request: Any) -> bytes:
    memory.write(PAGE_AT, ReportRequest.build(**request), asid)
    processor.attestation(handle, PAGE_AT, 4096)
    return bytes(memory.read(PAGE_AT, 4096, asid))


def test_report_v1(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int], pdh: CsvCertificate
) -> None:
    session = make_session(pdh, NODBG, vm_id=b"v" * 16, vm_version=b"w" * 16)
    handle = running(NODBG, dh=session.certificate.encoded, session=session.blob)
    page = ask(processor, memory, handle, data=b"report data", mnonce=bytes(range(16)))
    report = Report.parse(page, 1)
    assert report.report_data == b"report data".ljust(64, b"\0")
    assert report.mnonce == bytes(range(16))
    assert report.measure == sm3(DATA).digest()
    assert report.policy == NODBG
    assert (report.vm_id, report.vm_version) == (b"v" * 16, b"w" * 16)
    assert report.user_pubkey_digest == public_key_digest(session.certificate)
    assert report.chip_id == processor.chip.chip_id
    assert (report.sig_usage, report.sig_algo) == (0x1002, 4)
    identity = processor.identity
    assert identity is not None
    assert report.pek == identity.pek
    # By hand, from the emitted bytes: signature over the masked 180, MAC over what follows, PEK and sn masked, zero behind.
    mask = page[0xBC:0xC0]
    assert any(mask)
    signature = page[0xC0:0xE0][::-1] + page[0x108:0x128][::-1]
    identity.pek.public_key.verify(signature, page[:0xB4], user_id=identity.pek.user_id)
    assert page[0x9D4:0x9F4] == hmac_sm3(bytes(range(16)), page[0x150:0x9D4]).digest()
    assert bytes(byte ^ mask[index % 4] for index, byte in enumerate(page[0x150:0x974])) == identity.pek.encoded
    assert not any(page[0x9F4:])
    # The host sees none of it.
    assert memory.read(PAGE_AT, 4096, 0) != page


def test_sealing_key(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int], pdh: CsvCertificate
) -> None:
    """Same for every report of one identity, another for another measure, policy, owner or vm_id."""

    def key(handle: int, asid: int) -> bytes:
        return ask(processor, memory, handle, asid)[0x9B4:0x9D4]

    first = running()
    seal = key(first, 1)
    assert key(first, 1) == seal
    by_hand = b"csvfast-seal" + sm3(DATA).digest() + NODBG.to_bytes() + bytes(32) + bytes(16)
    assert seal == hmac_sm3(processor.chip.root_secret, by_hand).digest()
    again = running(asid=2, address=0x20000)
    assert key(again, 2) == seal
    session = make_session(pdh, NODBG, vm_id=b"v" * 16)
    owned = {"dh": session.certificate.encoded, "session": session.blob}
    others = [
        running(asid=3, address=0x30000, data=bytes(4096)),
        running(GuestPolicy(3), asid=4, address=0x50000),
        running(asid=5, address=0x60000, **owned),
    ]
    keys = {key(handle, asid) for asid, handle in enumerate(others, 3)}
    assert len(keys | {seal}) == 4


def test_every_report_has_a_mask_of_its_own(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    """A source of randomness that gives zeros first: the mask must still not be zero."""
    given = 0

    def entropy(length: int) -> bytes:
        nonlocal given
        if length != 4:
            return csvfast.sm3_kdf(b"%d" % given, length) if (given := given + 1) else b""
        given += 1
        return bytes(4) if given % 3 else b"\0\0\1\0"

    with Processor(chip, memory, _entropy=entropy) as processor:
        processor.init()
        handle = processor.launch_start(0)
        processor.activate(handle, 1)
        processor.launch_measure(handle)
        for _ in range(8):
            assert ask(processor, memory, handle)[0xBC:0xC0] == b"\0\0\1\0"


def test_report_during_secret_state(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]
) -> None:
    handle = running(finish=False)
    processor.launch_measure(handle)
    assert processor.guest_status(handle).state is GuestState.LSECRET
    assert Report.parse(ask(processor, memory, handle)).measure == sm3(DATA).digest()


def test_wrong_requests(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    running: Callable[..., int],
    refused: Callable[..., FirmwareError],
) -> None:
    handle = running()
    page = ReportRequest.build(b"data", bytes(16))
    for at in range(112):
        wrong = bytearray(page)
        wrong[at] ^= 0x10
        memory.write(PAGE_AT, wrong, 1)
        refused(S.SECURE_DATA_INVALID, processor.attestation, handle, PAGE_AT, 4096)
        assert memory.read(PAGE_AT, 4096, 1) == wrong
    memory.write(PAGE_AT, page, 0)  # written by the host: noise to the guest
    refused(S.SECURE_DATA_INVALID, processor.attestation, handle, PAGE_AT, 4096)
    extended = bytearray(ReportRequest.build(extended=True))
    extended[129] = 1
    memory.write(PAGE_AT, extended, 1)
    refused(S.INVALID_PARAM, processor.attestation, handle, PAGE_AT, 4096)
    memory.write(PAGE_AT, page, 1)
    for length in (0, -4096, 4095, 4097):
        assert refused(S.INVALID_LENGTH, processor.attestation, handle, PAGE_AT, length).needed == {"length": 4096}
    for address in (PAGE_AT + 16, 4 * MIB, 3 * MIB, -4096):
        refused(S.INVALID_ADDRESS, processor.attestation, handle, address, 4096)
    processor.deactivate(handle)
    refused(S.INACTIVE, processor.attestation, handle, PAGE_AT, 4096)


def test_two_guests_cannot_use_each_others_pages(
    processor: Processor,
    memory: csvfast.EncryptedMemory,
    running: Callable[..., int],
    refused: Callable[..., FirmwareError],
) -> None:
    first, second = running(), running(asid=2, address=0x20000)
    memory.write(PAGE_AT, ReportRequest.build(b"of the first"), 1)
    refused(S.SECURE_DATA_INVALID, processor.attestation, second, PAGE_AT, 4096)
    processor.attestation(first, PAGE_AT, 4096)


@pytest.mark.parametrize(
    ("profile", "policy", "version"),
    [
        (None, GuestPolicy.of(nodbg=True, es=True, csv3=True), 2),
        (None, GuestPolicy.of(nodbg=True, es=True), 1),
        (PROFILE_1_3_2011, GuestPolicy.of(nodbg=True, es=True), 1),
        (Profile(1, 4, 2336, csv3=True), GuestPolicy.of(nodbg=True, es=True, csv3=True), 1),
        (Profile(1, 3, 2337, csv3=True), GuestPolicy.of(nodbg=True, es=True, csv3=True), 1),
    ],
)
def test_extended_request(
    profile: Any, policy: GuestPolicy, version: int, chip: ChipIdentity, memory: csvfast.EncryptedMemory
) -> None:
    """Firmware without the extension sees the legacy request that the first 112 bytes are."""
    processor = Processor(chip, memory, **({"profile": profile} if profile else {}))
    processor.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
    handle = processor.launch_start(policy)
    processor.activate(handle, 1)
    processor.launch_measure(handle)
    guest = processor.guests[handle]
    guest.rtmrs[3] = b"3" * 32
    page = ask(processor, memory, handle, data=b"x", mnonce=bytes(16), extended=True)
    # The caller knows which to expect; by content a masked V1 is not mistaken for a V2.
    report = Report.parse(page)
    assert report.version == version
    assert report.measure == guest.measure == sm3().digest()
    assert report.policy == policy
    if version == 2:
        assert report.build == 2337
        assert report.rtmrs == (guest.measure, bytes(32), bytes(32), b"3" * 32, bytes(32))
        identity = processor.identity
        assert identity is not None
        signature = from_field(page[0x400:0x448], "r", "r", 0) + from_field(page[0x448:0x490], "s", "s", 0)
        identity.pek.public_key.verify(signature, page[:0x400], user_id=b"HYGON-SSD-PEK")
        assert page[0xD14:0xD34] == hmac_sm3(bytes(16), page[0x490:0xD14]).digest()
        assert not any(page[0xD34:])
    legacy = Report.parse(ask(processor, memory, handle, data=b"x"))
    assert legacy.version == 1


def test_host_form(processor: Processor, running: Callable[..., int], refused: Callable[..., FirmwareError]) -> None:
    handle = running()
    processor.deactivate(handle)  # needs no page of the guest
    answer = processor.attestation_host(handle, b"n" * 16)
    assert len(answer) == 208
    body = b"n" * 16 + sm3(DATA).digest() + NODBG.to_bytes()
    assert answer[:64] == body + b"\x02\x10\0\0" + b"\4\0\0\0" + bytes(4)
    signature = answer[64:96][::-1] + answer[136:168][::-1]
    assert not any(answer[96:136] + answer[168:])
    assert processor.identity is not None
    processor.identity.pek.public_key.verify(signature, body, user_id=b"HYGON-SSD-PEK")
    refused(S.INVALID_PARAM, processor.attestation_host, handle, b"n" * 15)
    assert refused(S.INVALID_LENGTH, processor.attestation_host, handle, b"n" * 16, buffer_length=207).needed == {
        "length": 208
    }


def test_a_report_verifies_under_the_simulators_root_only(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]
) -> None:
    page = ask(processor, memory, running(), data=b"nonce", mnonce=bytes(16))
    chip = processor.chip
    evidence = read_evidence(page).with_certificates(chip.hsk_cek)
    verified = verify(evidence, roots=[chip.root], report_data=b"nonce", mnonce=bytes(16))
    assert verified.complete
    with pytest.raises(VerificationError):
        verify(evidence, report_data=b"nonce", mnonce=bytes(16))
    with pytest.raises(VerificationError):
        verify(evidence, roots=[chip.root], report_data=b"another nonce")
