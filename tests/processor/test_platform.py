"""INIT to SHUTDOWN, PEK, PDH, OCA, ownership: states, codes, and that every chain made verifies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import csvfast
from csvfast.certs.chain import CertificateChain, verify_chain
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import ArgumentError, FirmwareError, FirmwareStatus, KeyExposureError, VerificationError
from csvfast.processor import PROFILE_1_3_2011, PROFILES, Options, PlatformState, Processor, Profile
from csvfast.report import GuestPolicy

S = FirmwareStatus
MIB = 1 << 20
CSV = CsvCertificate.BYTES


@pytest.fixture
def off(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> Processor:
    """Not initialised."""
    return Processor(chip, memory)


@pytest.fixture
def idle(off: Processor) -> Processor:
    off.init()
    return off


def chain_of(processor: Processor) -> CertificateChain:
    pdh, chain = processor.pdh_cert_export()
    pek, oca, cek = (CsvCertificate.parse(chain[start : start + CSV]) for start in range(0, 3 * CSV, CSV))
    return CertificateChain(
        hsk=processor.chip.hsk, cek=cek, pek=pek, oca=oca, pdh=CsvCertificate.parse(pdh), hrk=processor.chip.root
    )


def owner_certificate(
    key: SM2PrivateKey, *, usage: int = KeyUsage.OCA, algorithm: int = KeyAlgorithm.SM2_SA
) -> CsvCertificate:
    certificate = CsvCertificate.build(
        usage=usage, algorithm=algorithm, point=key.public_key.point, user_id=b"HYGON-SSD-OCA"
    )
    return certificate.with_signature(1, key, KeyUsage.OCA, b"HYGON-SSD-OCA")


COMMANDS: dict[str, tuple[Callable[[Processor], Any], set[PlatformState]]] = {
    "init": (lambda p: p.init(), {PlatformState.UNINIT}),
    "shutdown": (lambda p: p.shutdown(), {PlatformState.INIT, PlatformState.WORKING}),
    "factory_reset": (lambda p: p.factory_reset(), {PlatformState.UNINIT}),
    "platform_status": (lambda p: p.platform_status(), set(PlatformState)),
    "get_id": (lambda p: p.get_id(), set(PlatformState)),
    "pek_gen": (lambda p: p.pek_gen(), {PlatformState.INIT}),
    "pek_csr": (lambda p: p.pek_csr(), {PlatformState.INIT}),
    "pdh_gen": (lambda p: p.pdh_gen(), {PlatformState.INIT, PlatformState.WORKING}),
    "pdh_cert_export": (lambda p: p.pdh_cert_export(), {PlatformState.INIT, PlatformState.WORKING}),
    "df_flush": (lambda p: p.df_flush(), {PlatformState.INIT, PlatformState.WORKING}),
    "launch_start": (lambda p: p.launch_start(0), {PlatformState.INIT, PlatformState.WORKING}),
    "guest_status": (lambda p: p.guest_status(1), {PlatformState.WORKING}),
}


@pytest.mark.parametrize("state", PlatformState)
@pytest.mark.parametrize("name", COMMANDS)
def test_states(name: str, state: PlatformState, off: Processor, refused: Callable[..., FirmwareError]) -> None:
    if state is not PlatformState.UNINIT:
        off.init()
    if state is PlatformState.WORKING:
        off.launch_start(0)
    assert off.platform_status().state is state
    command, allowed = COMMANDS[name]
    if state in allowed:
        command(off)
    else:
        identity = off.identity
        refused(S.INVALID_PLATFORM_STATE, command, off)
        assert off.state is state
        assert off.identity is identity


def test_state_follows_the_guests(idle: Processor) -> None:
    first, second = idle.launch_start(0), idle.launch_start(0)
    assert idle.platform_status().state is PlatformState.WORKING
    idle.decommission(first)
    assert idle.platform_status().state is PlatformState.WORKING
    idle.decommission(second)
    assert idle.platform_status().state is PlatformState.INIT


def test_status_bytes(off: Processor) -> None:
    assert off.platform_status().encode() == bytes((1, 4, 0, 0x0E)) + (2337 << 1).to_bytes(4, "little") + bytes(4)
    off.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
    off.launch_start(0)
    assert (
        off.platform_status().encode() == bytes((1, 4, 2, 0x0E)) + (2337 << 1 | 1).to_bytes(4, "little") + b"\1\0\0\0"
    )
    off.shutdown()
    assert off.platform_status().encode() == bytes((1, 4, 0, 0x0E)) + (2337 << 1).to_bytes(4, "little") + bytes(4)


def test_status_bytes_as_the_kernel_reads_them(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    """csv-dev.c reads AMD's layout {u8, u8, u8, u32 flags, u8 build, u32 guests} over the same bytes."""
    processor = Processor(chip, memory, profile=Profile(1, 3, (1 << 31) - 2))
    processor.init()
    raw = processor.platform_status().encode()
    flags, build8 = int.from_bytes(raw[3:7], "little"), raw[7]
    assert (flags >> 9) | (build8 << 23) == (1 << 31) - 2


def test_tmr(off: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]) -> None:
    assert refused(S.INVALID_LENGTH, off.init, es=True).needed == {"tmr_length": MIB}
    refused(S.INVALID_LENGTH, off.init, es=True, tmr_address=0, tmr_length=MIB - 1)
    refused(S.INVALID_ADDRESS, off.init, es=True, tmr_address=4096, tmr_length=MIB)
    refused(S.INVALID_ADDRESS, off.init, es=True, tmr_address=4 * MIB, tmr_length=MIB)
    refused(S.INVALID_ADDRESS, off.init, es=True, tmr_address=3 * MIB, tmr_length=2 * MIB)
    refused(S.INVALID_ADDRESS, off.init, es=True, tmr_address=-MIB, tmr_length=MIB)
    assert off.identity is None
    # The C-bit is stripped from every address.
    off.init(es=True, tmr_address=3 * MIB | 1 << 47, tmr_length=MIB)
    handle = off.launch_start(GuestPolicy.of(es=True))
    off.activate(handle, 1)
    for address in (3 * MIB - 16, 3 * MIB, 4 * MIB - 32):
        refused(S.INVALID_ADDRESS, off.launch_update_data, handle, address, 32)
    off.launch_update_data(handle, 3 * MIB - 32, 32)
    off.shutdown()
    off.init()
    refused(S.POLICY_FAILURE, off.launch_start, GuestPolicy.of(es=True))


def test_identity_survives_shutdown_and_not_factory_reset(idle: Processor) -> None:
    before = idle.pdh_cert_export()
    idle.shutdown()
    idle.init()
    assert idle.pdh_cert_export() == before
    idle.shutdown()
    idle.factory_reset()
    idle.init()
    after = idle.pdh_cert_export()
    assert after[0] != before[0]
    assert after[1][: 2 * CSV] != before[1][: 2 * CSV]
    assert after[1][2 * CSV :] == before[1][2 * CSV :]  # the CEK is the chip's
    assert not idle.platform_status().owner


def test_the_chain_verifies_under_the_simulators_root_only(idle: Processor) -> None:
    chain = chain_of(idle)
    assert verify_chain(chain, [idle.chip.root]) == idle.chip.root
    with pytest.raises(VerificationError):
        verify_chain(chain)
    pdh, pek, oca = chain.pdh, chain.pek, chain.oca
    assert pdh is not None
    assert pek is not None
    assert oca is not None
    assert (pek.api_major, pek.api_minor) == (1, 4)
    assert (pdh.usage, pdh.algorithm, pdh.user_id) == (KeyUsage.PDH, KeyAlgorithm.SM2_DH, b"HYGON-SSD-PDH")
    assert [slot.usage for slot in pek.slots] == [KeyUsage.CEK, KeyUsage.OCA]
    assert [slot.usage for slot in pdh.slots] == [KeyUsage.PEK, KeyUsage.INVALID]
    assert [slot.usage for slot in oca.slots] == [KeyUsage.OCA, KeyUsage.INVALID]


def test_pek_and_pdh_generation(idle: Processor) -> None:
    first = chain_of(idle)
    idle.pdh_gen()
    second = chain_of(idle)
    assert (second.pek, second.oca) == (first.pek, first.oca)
    assert first.pdh is not None
    assert second.pdh is not None
    assert second.pdh.point != first.pdh.point
    idle.pek_gen()
    third = chain_of(idle)
    assert third.pek != second.pek
    assert third.pdh != second.pdh  # a new PEK always brings a new PDH
    verify_chain(third, [idle.chip.root])


@pytest.mark.parametrize("slot", [1, 2])
def test_ownership(slot: int, idle: Processor, refused: Callable[..., FirmwareError]) -> None:
    key = SM2PrivateKey.generate()
    oca = owner_certificate(key)
    csr = CsvCertificate.parse(idle.pek_csr())
    assert [entry.usage for entry in csr.slots] == [KeyUsage.INVALID, KeyUsage.INVALID]
    before = chain_of(idle)
    signed = csr.with_signature(slot, key, KeyUsage.OCA, oca.user_id)  # tools differ in the slot they fill
    idle.pek_cert_import(signed.encoded, oca.encoded)
    assert idle.platform_status().owner
    after = chain_of(idle)
    assert after.oca == oca
    assert after.pek is not None
    assert before.pek is not None
    assert after.pek.body == before.pek.body
    assert before.pdh is not None
    assert after.pdh is not None
    assert after.pdh.point != before.pdh.point  # a new key, not only a new signature
    verify_chain(after, [idle.chip.root])
    refused(S.ALREADY_OWNED, idle.pek_cert_import, signed.encoded, oca.encoded)
    # The owner's own key never was here; a new PEK ends the ownership.
    idle.pek_gen()
    assert not idle.platform_status().owner
    refused(S.INVALID_CERTIFICATE, idle.pek_cert_import, signed.encoded, oca.encoded)
    verify_chain(chain_of(idle), [idle.chip.root])


def test_import_refusals(idle: Processor, refused: Callable[..., FirmwareError]) -> None:
    key, other = SM2PrivateKey.generate(), SM2PrivateKey.generate()
    oca = owner_certificate(key)
    csr = CsvCertificate.parse(idle.pek_csr())
    signed = csr.with_signature(2, key, KeyUsage.OCA, oca.user_id)
    before = idle.identity
    import_ = idle.pek_cert_import
    lengths = {"pek_length": CSV, "oca_length": CSV}
    assert refused(S.INVALID_LENGTH, import_, signed.encoded[:-1], oca.encoded).needed == lengths
    assert refused(S.INVALID_LENGTH, import_, signed.encoded, b"").needed == lengths
    refused(S.INVALID_CERTIFICATE, import_, signed.encoded, owner_certificate(key, usage=KeyUsage.PEK).encoded)
    refused(
        S.INVALID_CERTIFICATE, import_, signed.encoded, owner_certificate(key, algorithm=KeyAlgorithm.SM2_DH).encoded
    )
    refused(S.INVALID_CERTIFICATE, import_, oca.encoded, oca.encoded)
    off_curve = bytearray(oca.encoded)
    off_curve[92] ^= 1
    refused(S.INVALID_CERTIFICATE, import_, signed.encoded, off_curve)
    reserved = bytearray(oca.encoded)
    reserved[1196] = 1  # not signed, so only this rule sees it
    refused(S.INVALID_CERTIFICATE, import_, signed.encoded, reserved)
    spilled = bytearray(oca.encoded)
    spilled[20 + 40] = 1
    refused(S.INVALID_CERTIFICATE, import_, signed.encoded, spilled)
    for at in (0, 5, 8, 20, 165, 1043):  # any byte of the body: then it is not this platform's PEK
        changed = bytearray(signed.encoded)
        changed[at] ^= 1
        refused(S.INVALID_CERTIFICATE, import_, changed, oca.encoded)
    refused(S.BAD_SIGNATURE, import_, csr.encoded, oca.encoded)
    refused(S.BAD_SIGNATURE, import_, csr.with_signature(2, other, KeyUsage.OCA, oca.user_id).encoded, oca.encoded)
    refused(S.BAD_SIGNATURE, import_, csr.with_signature(2, key, KeyUsage.PEK, oca.user_id).encoded, oca.encoded)
    refused(S.BAD_SIGNATURE, import_, csr.with_signature(2, key, KeyUsage.OCA, b"HYGON-SSD-PEK").encoded, oca.encoded)
    refused(S.BAD_SIGNATURE, import_, signed.encoded, oca.with_empty_slot(1).encoded)
    refused(S.BAD_SIGNATURE, import_, signed.encoded, oca.with_signature(1, other, KeyUsage.OCA, oca.user_id).encoded)
    assert idle.identity is before
    assert not idle.platform_status().owner
    import_(signed.encoded, oca.encoded)


def test_lengths_written_back(idle: Processor, refused: Callable[..., FirmwareError]) -> None:
    assert refused(S.INVALID_LENGTH, idle.pek_csr, buffer_length=CSV - 1).needed == {"length": CSV}
    assert refused(S.INVALID_LENGTH, idle.get_id, buffer_length=0).needed == {"length": 64}
    needed = {"pdh_length": CSV, "chain_length": 3 * CSV}
    assert refused(S.INVALID_LENGTH, idle.pdh_cert_export, pdh_length=0, chain_length=0).needed == needed
    assert refused(S.INVALID_LENGTH, idle.pdh_cert_export, chain_length=3 * CSV - 1).needed == needed
    assert len(idle.pek_csr(buffer_length=CSV)) == CSV
    pdh, chain = idle.pdh_cert_export(pdh_length=CSV, chain_length=3 * CSV)
    assert (len(pdh), len(chain)) == (CSV, 3 * CSV)
    assert idle.get_id() == b"SIMTEST00001".ljust(64, b"\0")


def test_firmware_and_hgsc_are_not_pretended(
    off: Processor, chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    refused(S.INVALID_LENGTH, off.download_firmware, b"")
    refused(S.INVALID_LENGTH, off.download_firmware, bytes(0x80001))
    refused(S.BAD_SIGNATURE, off.download_firmware, bytes(0x80000))
    off.init()
    refused(S.BAD_SIGNATURE, off.download_firmware, b"image")
    refused(S.UNSUPPORTED, off.hgsc_cert_import, b"a", b"b")
    refused(S.INVALID_LENGTH, off.hgsc_cert_import, b"", b"b")
    off.launch_start(0)
    refused(S.INVALID_PLATFORM_STATE, off.download_firmware, b"image")
    old = Processor(chip, memory, profile=Profile(1, 3, 1666))
    old.init()
    refused(S.INVALID_PLATFORM_STATE, old.download_firmware, b"image")


def test_profiles() -> None:
    assert list(PROFILES) == ["1.3/2011", "1.4/2337"]
    old, new = PROFILES.values()
    assert (old.csv3, old.extended_report, old.csv3_many_updates, old.csv2_any_asid) == (False, False, False, True)
    assert (new.csv3, new.extended_report, new.csv3_many_updates, new.csv2_any_asid) == (True, True, True, True)
    assert not Profile(1, 4, 2336, csv3=True).extended_report
    assert not Profile(1, 3, 2337, csv3=True).extended_report
    for wrong in ((256, 0, 0), (0, -1, 0), (0, 0, 1 << 31)):
        with pytest.raises(ArgumentError):
            Profile(*wrong)
    for name, value in (
        ("measure_blob", "x"),
        ("session_layout", ""),
        ("min_csv_asid", 0),
        ("cores", 0),
        ("max_guests", 0),
    ):
        with pytest.raises(ArgumentError, match=name):
            Options(**{name: value})


def test_a_processor_cannot_leave_its_process(idle: Processor) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(KeyExposureError):
            attempt(idle)
    handle = idle.launch_start(0)
    with pytest.raises(KeyExposureError):
        copy.copy(idle.guests[handle])


def test_known_answers_with_injected_randomness(chip: ChipIdentity) -> None:
    """Two processors fed with the same bytes make the same keys and certificates' bodies; the signatures differ."""

    def feed() -> Callable[[int], bytes]:
        state = csvfast.sm3(b"seed")

        def give(length: int) -> bytes:
            state.update(b"x")
            return csvfast.sm3_kdf(state.digest(), length)

        return give

    made = []
    for _ in range(2):
        with csvfast.EncryptedMemory(MIB) as memory, Processor(chip, memory, _entropy=feed()) as processor:
            processor.init()
            chain = chain_of(processor)
            handle = processor.launch_start(0)
            processor.activate(handle, 1)
            processor.launch_update_data(handle, 0, 4096)
            made.append((chain.pek and chain.pek.body, chain.pdh and chain.pdh.body, memory.read(0, 4096, 0),
                         processor.launch_measure(handle)))  # fmt: skip
    assert made[0] == made[1]
    with csvfast.EncryptedMemory(MIB) as memory:
        broken = Processor(chip, memory, _entropy=lambda length: bytes(length - 1))
        with pytest.raises(ValueError, match="entropy source"):
            broken.init()


def test_old_profile_says_so(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    processor = Processor(chip, memory, profile=PROFILE_1_3_2011)
    processor.init()
    status = processor.platform_status()
    assert (status.api_major, status.api_minor, status.build) == (1, 3, 2011)
    pek = chain_of(processor).pek
    assert pek is not None
    assert (pek.api_major, pek.api_minor) == (1, 3)
