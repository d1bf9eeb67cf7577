"""SEND_* and RECEIVE_* between two platforms: the way through, every refusal, and what a host in the middle can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.factory import altered
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.certs.roots import hygon_root
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import FirmwareError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import Processor
from csvfast.processor.options import Options
from csvfast.processor.profile import Profile
from csvfast.processor.session import SessionBlob, make_session
from csvfast.processor.states import GuestState
from csvfast.report import GuestPolicy, Report, ReportRequest

Refused = Callable[..., FirmwareError]
MIB = 1 << 20
DATA = bytes(range(256)) * 64
FROM, TO, REPORT = 0x10000, 0x40000, 0x80000


class Certificates(NamedTuple):
    pdh: bytes
    platform: bytes
    vendor: bytes

    @property
    def chain_file(self) -> bytes:
        return self.pdh + self.platform + self.vendor


def certificates(processor: Processor) -> Certificates:
    pdh, platform = processor.pdh_cert_export()
    return Certificates(pdh, platform, processor.chip.hsk.encoded + processor.chip.root.encoded)


def platform(chip: ChipIdentity, **named: Any) -> Processor:
    processor = Processor(chip, csvfast.EncryptedMemory(4 * MIB, asid_max=16), **named)
    processor.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
    return processor


@pytest.fixture
def target(line: ManufacturingLine) -> Iterator[Processor]:
    with platform(line.make_chip("SIMTEST00002")) as processor:
        yield processor


def report_of(processor: Processor, handle: int, asid: int) -> Report:
    request = ReportRequest.build(b"nonce of the verifier", bytes(16))
    processor.memory.write(REPORT, request, asid)
    processor.attestation(handle, REPORT, 4096)
    return Report.parse(processor.memory.read(REPORT, 4096, asid))


def move(source: Processor, handle: int, target: Processor, *, pages: int = 4, whole_chain: bool = True) -> int:
    """Moves `pages` pages of a guest and leaves it running on the target under ASID 5."""
    own, other = certificates(source), certificates(target)
    policy, session = source.send_start(handle, *other)
    arrived = target.receive_start(policy, own.chain_file if whole_chain else own.pdh, session)
    target.activate(arrived, 5)
    for page in range(pages):
        header, transport = source.send_update_data(handle, FROM + 4096 * page, 4096)
        assert len(header) == 52
        target.receive_update_data(arrived, header, TO + 4096 * page, 4096, transport)
    source.send_finish(handle)
    target.receive_finish(arrived)
    return arrived


def test_a_guest_moves_and_is_still_itself(
    processor: Processor, target: Processor, running: Callable[..., int], pdh: CsvCertificate
) -> None:
    policy = GuestPolicy.of(nodbg=True, es=True)
    owner = make_session(pdh, policy, vm_id=b"vm id of sixteen", vm_version=b"version 1.......", user_data=b"u" * 64)
    handle = running(policy, data=DATA, dh=owner.certificate.encoded, session=owner.blob)
    before = report_of(processor, handle, 1)
    arrived = move(processor, handle, target)
    assert processor.guest_status(handle).state is GuestState.SENT
    assert target.guest_status(arrived).state is GuestState.RUNNING
    assert target.guest_status(arrived).policy == policy.value
    assert target.memory.read(TO, len(DATA), 5) == DATA
    assert target.memory.read(TO, 4096, 0) != DATA[:4096]
    after = report_of(target, arrived, 5)
    assert before.measure == after.measure == csvfast.sm3(DATA).digest()
    for field in ("user_pubkey_digest", "vm_id", "vm_version", "policy"):
        assert getattr(after, field) == getattr(before, field)
    assert before.vm_id == b"vm id of sixteen"
    assert any(before.user_pubkey_digest)
    assert (before.chip_id, after.chip_id) == ("SIMTEST00001", "SIMTEST00002")
    assert before.sealing_key != after.sealing_key  # a sealing key belongs to a chip
    assert target.guests[arrived].user_data == b"u" * 64
    assert target.guests[arrived].tek is None
    assert not target.guests[arrived].vek.equals(processor.guests[handle].vek)
    # What has been sent away is gone for good.
    with pytest.raises(FirmwareError, match="INVALID_GUEST_STATE"):
        processor.send_start(handle, *certificates(target))
    processor.deactivate(handle)
    with pytest.raises(FirmwareError, match="INVALID_GUEST_STATE"):
        processor.activate(handle, 2)
    processor.decommission(handle)


def test_a_guest_moves_twice(processor: Processor, target: Processor, running: Callable[..., int]) -> None:
    handle = running(data=DATA)
    arrived = move(processor, handle, target)
    target.copy(arrived, TO, FROM, len(DATA))
    processor.deactivate(handle)
    processor.decommission(handle)
    back = move(target, arrived, processor)
    assert processor.memory.read(TO, len(DATA), 5) == DATA
    assert report_of(processor, back, 5).measure == csvfast.sm3(DATA).digest()


def test_vmsa(processor: Processor, target: Processor, running: Callable[..., int], refused: Refused) -> None:
    handle = running(GuestPolicy.of(es=True), data=DATA)
    policy, session = processor.send_start(handle, *certificates(target))
    arrived = target.receive_start(policy, certificates(processor).chain_file, session)
    target.activate(arrived, 5)
    data_packet = processor.send_update_data(handle, FROM, 4096)
    vmsa_packet = processor.send_update_vmsa(handle, FROM + 4096, 4096)
    # The kind of a packet is under its MAC.
    refused(S.BAD_MEASUREMENT, target.receive_update_vmsa, arrived, data_packet[0], TO, 4096, data_packet[1])
    refused(S.BAD_MEASUREMENT, target.receive_update_data, arrived, vmsa_packet[0], TO, 4096, vmsa_packet[1])
    target.receive_update_vmsa(arrived, vmsa_packet[0], TO, 4096, vmsa_packet[1])
    assert target.memory.read(TO, 4096, 5) == DATA[4096:8192]
    assert refused(S.INVALID_LENGTH, processor.send_update_vmsa, handle, FROM, 2048).needed == {"length": 4096}
    refused(S.INVALID_ADDRESS, processor.send_update_vmsa, handle, FROM + 16, 4096)
    refused(S.INVALID_LENGTH, target.receive_update_vmsa, arrived, vmsa_packet[0], TO, 2048, vmsa_packet[1][:2048])
    plain = running(GuestPolicy.of(), asid=2, address=0x60000)
    processor.send_start(plain, *certificates(target))
    refused(S.POLICY_FAILURE, processor.send_update_vmsa, plain, 0x60000, 4096)


def test_states(processor: Processor, target: Processor, running: Callable[..., int], refused: Refused) -> None:
    own, other = certificates(processor), certificates(target)
    refused(S.INVALID_PLATFORM_STATE, processor.send_start, 1, *other)
    handle = running(finish=False)
    refused(S.INVALID_GUEST, processor.send_start, 77, *other)
    refused(S.INVALID_GUEST_STATE, processor.send_start, handle, *other)
    processor.launch_measure(handle)
    refused(S.INVALID_GUEST_STATE, processor.send_start, handle, *other)
    processor.launch_finish(handle)
    for command in (processor.send_finish, processor.send_cancel, processor.receive_finish):
        refused(S.INVALID_GUEST_STATE, command, handle)
    refused(S.INVALID_GUEST_STATE, processor.send_update_data, handle, FROM, 4096)
    refused(S.INVALID_GUEST_STATE, processor.receive_update_data, handle, bytes(52), FROM, 16, bytes(16))
    policy, session = processor.send_start(handle, *other)
    refused(S.INVALID_GUEST_STATE, processor.send_start, handle, *other)
    refused(S.INVALID_GUEST_STATE, processor.dbg_decrypt, handle, FROM, TO, 4096)
    processor.send_cancel(handle)
    assert processor.guest_status(handle).state is GuestState.RUNNING
    assert processor.guests[handle].tek is None
    assert report_of(processor, handle, 1).measure == csvfast.sm3(bytes(range(256)) * 16).digest()
    arrived = target.receive_start(policy, own.chain_file, session)
    refused(S.INACTIVE, target.receive_update_data, arrived, bytes(52), TO, 16, bytes(16))
    refused(S.INVALID_GUEST_STATE, target.launch_finish, arrived)
    refused(S.INVALID_GUEST_STATE, target.attestation, arrived, REPORT, 4096)
    target.activate(arrived, 5)
    refused(S.INVALID_GUEST_STATE, target.send_update_data, arrived, TO, 4096)
    target.receive_finish(arrived)
    refused(S.INVALID_GUEST_STATE, target.receive_finish, arrived)
    refused(S.UNSUPPORTED, target.swap_out, arrived)
    refused(S.UNSUPPORTED, target.swap_in, arrived)
    refused(S.INVALID_GUEST, target.swap_out, 99)


def test_sending_needs_the_key_in_place(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running()
    processor.send_start(handle, *certificates(target))
    processor.deactivate(handle)
    refused(S.INACTIVE, processor.send_update_data, handle, FROM, 4096)


def test_lengths(processor: Processor, target: Processor, running: Callable[..., int], refused: Refused) -> None:
    own, other = certificates(processor), certificates(target)
    handle = running()
    error = refused(S.INVALID_LENGTH, processor.send_start, handle, b"", b"", b"", session_length=0)
    assert error.needed == {"session_length": 772, "policy": 1}
    for index, name in enumerate(("pdh", "platform", "vendor")):
        parts = list(other)
        parts[index] = parts[index][:-1]
        error = refused(S.INVALID_LENGTH, processor.send_start, handle, *parts)
        assert error.needed == {f"{name}_length": len(other[index])}
    policy, session = processor.send_start(handle, *other, session_length=772)
    for length in (0, -16, 8, 4097, (1 << 20) + 16):
        refused(S.INVALID_LENGTH, processor.send_update_data, handle, FROM, length)
    needed = {"header_length": 52, "transport_length": 4096}
    for room in ({"header_length": 51}, {"transport_length": 4095}, {"header_length": 0, "transport_length": 0}):
        assert refused(S.INVALID_LENGTH, processor.send_update_data, handle, FROM, 4096, **room).needed == needed
    refused(S.INVALID_ADDRESS, processor.send_update_data, handle, FROM + 8, 4096)
    refused(S.INVALID_ADDRESS, processor.send_update_data, handle, 4 * MIB, 4096)
    refused(S.INVALID_ADDRESS, processor.send_update_data, handle, 3 * MIB, 4096)  # the firmware's own memory
    for cut in (own.pdh[:-1], own.chain_file[:-1], b""):
        assert refused(S.INVALID_LENGTH, target.receive_start, policy, cut, session).needed == {"pdh_length": 2084}
    refused(S.INVALID_LENGTH, target.receive_start, policy, own.chain_file, session[:-1])
    arrived = target.receive_start(policy, own.chain_file, session)
    target.activate(arrived, 5)
    header, transport = processor.send_update_data(handle, FROM, 4096)
    refused(S.INVALID_LENGTH, target.receive_update_data, arrived, header[:-1], TO, 4096, transport)
    refused(S.INVALID_LENGTH, target.receive_update_data, arrived, header, TO, 4096, transport[:-16])
    refused(S.INVALID_LENGTH, target.receive_update_data, arrived, header, TO, 0, b"")
    refused(S.INVALID_ADDRESS, target.receive_update_data, arrived, header, TO + 8, 4096, transport)
    compressed = b"\x01" + header[1:]
    refused(S.INVALID_PARAM, target.receive_update_data, arrived, compressed, TO, 4096, transport)
    target.receive_update_data(arrived, header, TO, 4096, transport)


def test_policy_forbids_sending(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running(GuestPolicy.of(nosend=True))
    refused(S.POLICY_FAILURE, processor.send_start, handle, *certificates(target))
    assert processor.guest_status(handle).state is GuestState.RUNNING


@pytest.mark.parametrize(
    "policy",
    [
        GuestPolicy.of(hsk_version=2), GuestPolicy.of(cek_version=3), GuestPolicy.of(api_major=1, api_minor=4),
        GuestPolicy.of(domain=True), GuestPolicy.of(domain=True, csv=True),
    ],
    ids=lambda policy: hex(policy.value),
)  # fmt: skip
def test_target_is_not_what_the_policy_asks_for(
    policy: GuestPolicy, line: ManufacturingLine, processor: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running(policy)
    with platform(line.make_chip(), profile=Profile(1, 3, 2300, csv3=True)) as old:
        refused(S.POLICY_FAILURE, processor.send_start, handle, *certificates(old))


@pytest.mark.parametrize(
    "policy",
    [
        GuestPolicy.of(hsk_version=1), GuestPolicy.of(cek_version=2), GuestPolicy.of(api_major=1, api_minor=4),
        GuestPolicy.of(csv=True),
    ],
    ids=lambda policy: hex(policy.value),
)  # fmt: skip
def test_target_is_what_the_policy_asks_for(
    policy: GuestPolicy, processor: Processor, target: Processor, running: Callable[..., int]
) -> None:
    move(processor, running(policy, data=DATA), target)


def test_receiver_checks_the_policy_itself(
    line: ManufacturingLine, processor: Processor, running: Callable[..., int], refused: Refused
) -> None:
    """A source that looked away does not make the target run what it cannot protect."""
    own = certificates(processor)
    handle = running(GuestPolicy.of(es=True))
    with Processor(line.make_chip(), csvfast.EncryptedMemory(MIB, asid_max=4)) as bare:
        bare.init()  # without ES
        policy, session = processor.send_start(handle, *certificates(bare))
        refused(S.POLICY_FAILURE, bare.receive_start, policy, own.chain_file, session)
    for word in (GuestPolicy.of(api_major=1, api_minor=5), GuestPolicy.of(nosend=True), GuestPolicy.of(domain=True)):
        with platform(line.make_chip()) as other:
            pdh = CsvCertificate.parse(certificates(other).pdh)
            key = processor.identity.pdh_key  # type: ignore[union-attr]
            forged = make_session(pdh, word, key=key, user_id=b"HYGON-SSD-PDH")
            refused(S.POLICY_FAILURE, other.receive_start, word, own.chain_file, forged.blob)


def take_over(processor: Processor, key: SM2PrivateKey, oca: CsvCertificate) -> None:
    """An owner makes the platform his."""
    csr = CsvCertificate.parse(processor.pek_csr())
    signed = csr.with_signature(2, key, KeyUsage.OCA, oca.user_id)
    processor.pek_cert_import(signed.encoded, oca.encoded)


def test_domain(line: ManufacturingLine, running: Callable[..., int], processor: Processor, refused: Refused) -> None:
    key = SM2PrivateKey.generate()
    oca = CsvCertificate.build(
        usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=key.public_key.point, user_id=b"HYGON-SSD-OCA"
    )
    oca = oca.with_signature(1, key, KeyUsage.OCA, oca.user_id)
    with platform(line.make_chip()) as inside, platform(line.make_chip()) as outside:
        take_over(processor, key, oca)
        take_over(inside, key, oca)
        handle = running(GuestPolicy.of(domain=True), data=DATA)
        refused(S.POLICY_FAILURE, processor.send_start, handle, *certificates(outside))
        arrived = move(processor, handle, inside)
        assert inside.memory.read(TO, 4096, 5) == DATA[:4096]
        refused(S.POLICY_FAILURE, inside.send_start, arrived, *certificates(outside))
        # Without its chain nobody knows to which domain the source belongs.
        again = running(GuestPolicy.of(domain=True), asid=2, address=0x60000)
        policy, session = processor.send_start(again, *certificates(inside))
        refused(S.POLICY_FAILURE, inside.receive_start, policy, certificates(processor).pdh, session)


def test_target_must_hang_from_the_root(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running()
    with platform(ManufacturingLine.create(name="elsewhere").make_chip()) as foreign:
        refused(S.INVALID_CERTIFICATE, processor.send_start, handle, *certificates(foreign))
        mixed = certificates(foreign)._replace(vendor=certificates(target).vendor)
        refused(S.INVALID_CERTIFICATE, processor.send_start, handle, *mixed)
    refused(
        S.INVALID_CERTIFICATE,
        processor.send_start,
        handle,
        *certificates(target)._replace(pdh=certificates(processor).pdh),
    )
    # The attacker's own DH key under the target's certificates.
    key = SM2PrivateKey.generate()
    fake = CsvCertificate.build(
        usage=KeyUsage.PDH, algorithm=KeyAlgorithm.SM2_DH, point=key.public_key.point, user_id=b"HYGON-SSD-PDH"
    ).with_signature(1, key, KeyUsage.PEK, b"HYGON-SSD-PEK")
    refused(S.INVALID_CERTIFICATE, processor.send_start, handle, *certificates(target)._replace(pdh=fake.encoded))
    assert processor.guest_status(handle).state is GuestState.RUNNING


def test_roots_are_configurable(line: ManufacturingLine, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    elsewhere = ManufacturingLine.create(name="elsewhere")
    with platform(elsewhere.make_chip()) as foreign, platform(line.make_chip()) as native:
        for roots, home, away in (
            ((elsewhere.root, line.root), True, True), ((elsewhere.root,), False, True), ((hygon_root(),), False, False),
            ((), False, False),
        ):  # fmt: skip
            with platform(line.make_chip(), options=Options(migration_roots=roots)) as source:
                handle = source.launch_start(GuestPolicy.of())
                source.activate(handle, 1)
                source.launch_measure(handle)
                source.launch_finish(handle)
                for other, allowed in ((native, home), (foreign, away)):
                    if allowed:
                        source.send_start(handle, *certificates(other))
                        source.send_cancel(handle)
                    else:
                        refused(S.INVALID_CERTIFICATE, source.send_start, handle, *certificates(other))


@pytest.mark.parametrize("field", ["usage", "algorithm", "curve_id", "x", "uid", "slot1_r", "version", "reserved2"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_wrong_fields_in_the_targets_certificates(
    place: int, field: str, processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running()
    other = certificates(target)
    encoded = [other.pdh, *(other.platform[start : start + 2084] for start in range(0, 6252, 2084))]
    values: dict[str, int | bytes] = {"x": b"\x01", "uid": b"somebody else", "slot1_r": b"\x05", "reserved2": b"\x01"}
    encoded[place] = altered(encoded[place], **{field: values.get(field, 9)})
    refused(S.INVALID_CERTIFICATE, processor.send_start, handle, encoded[0], b"".join(encoded[1:]), other.vendor)


def test_every_byte_of_the_session_counts(processor: Processor, target: Processor, running: Callable[..., int]) -> None:
    handle = running()
    own = certificates(processor)
    policy, session = processor.send_start(handle, *certificates(target))
    for place in range(len(session)):
        changed = bytearray(session)
        changed[place] ^= 1 << place % 8
        with pytest.raises(FirmwareError) as caught:
            target.receive_start(policy, own.chain_file, changed)
        assert caught.value.status in (S.BAD_SIGNATURE, S.BAD_MEASUREMENT)
        assert not target.guests
    for wrong in (policy ^ 1, policy | 1 << 7):
        with pytest.raises(FirmwareError, match="BAD_MEASUREMENT"):
            target.receive_start(wrong, own.chain_file, session)
    assert target.receive_start(policy, own.chain_file, session)


def test_session_of_another_chip_or_time(
    line: ManufacturingLine, processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running()
    own = certificates(processor)
    policy, session = processor.send_start(handle, *certificates(target))
    with platform(line.make_chip()) as third:
        refused(S.BAD_MEASUREMENT, third.receive_start, policy, own.chain_file, session)
        # Somebody else's certificate in front of the same session.
        refused(S.BAD_SIGNATURE, target.receive_start, policy, certificates(third).chain_file, session)
    target.pdh_gen()
    refused(S.BAD_MEASUREMENT, target.receive_start, policy, own.chain_file, session)


def test_every_bit_of_a_packet_counts(processor: Processor, target: Processor, running: Callable[..., int]) -> None:
    handle = running()
    policy, session = processor.send_start(handle, *certificates(target))
    arrived = target.receive_start(policy, certificates(processor).chain_file, session)
    target.activate(arrived, 5)
    header, transport = processor.send_update_data(handle, FROM, 32)
    before = target.memory.read(TO, 64, 0)
    whole = header + transport
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FirmwareError) as caught:
            target.receive_update_data(arrived, changed[:52], TO, 32, changed[52:])
        assert caught.value.status is (S.BAD_MEASUREMENT if bit >= 32 or bit == 1 else S.INVALID_PARAM)
    assert target.memory.read(TO, 64, 0) == before
    target.receive_update_data(arrived, header, TO, 32, transport)
    assert target.memory.read(TO, 32, 5) == (bytes(range(256)) * 16)[:32]


def test_what_the_protocol_does_not_notice(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    """AMD's packets carry no number and no address. Swapped, repeated, misplaced, dropped: accepted, as documented."""
    handle = running(data=DATA)
    policy, session = processor.send_start(handle, *certificates(target))
    own = certificates(processor).chain_file
    arrived = target.receive_start(policy, own, session)
    target.activate(arrived, 5)
    packets = [processor.send_update_data(handle, FROM + 4096 * page, 4096) for page in range(3)]
    assert len({header[4:20] for header, _ in packets}) == 3  # every packet its own IV
    for page, (header, transport) in ((1, packets[0]), (0, packets[1]), (3, packets[1])):
        target.receive_update_data(arrived, header, TO + 4096 * page, 4096, transport)
    assert target.memory.read(TO, 8192, 5) == DATA[4096:8192] + DATA[:4096]
    # A packet of another migration of the same guest is noticed, also on the same target.
    processor.send_cancel(handle)
    processor.send_start(handle, *certificates(target))
    later = processor.send_update_data(handle, FROM, 4096)
    refused(S.BAD_MEASUREMENT, target.receive_update_data, arrived, later[0], TO, 4096, later[1])
    target.receive_finish(arrived)
    # And the session may be used again: a second guest from the same packets. Nothing in it says that it is old.
    twin = target.receive_start(policy, own, session)
    target.activate(twin, 6)
    target.receive_update_data(twin, packets[2][0], 0x60000, 4096, packets[2][1])
    target.receive_finish(twin)


def test_without_a_chain_nobody_vouches(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    """A host cannot invent a guest with a measurement of its choice, by playing the source with a key of its own."""
    handle = running(data=DATA)
    arrived = move(processor, handle, target, whole_chain=False)
    assert target.memory.read(TO, len(DATA), 5) == DATA
    report = report_of(target, arrived, 5)
    assert not any(report.measure + report.vm_id + report.vm_version + report.user_pubkey_digest)
    # The attacker's key, with the wanted digest in the session.
    key = SM2PrivateKey.generate()
    policy = GuestPolicy.of()
    forged = make_session(
        CsvCertificate.parse(certificates(target).pdh), policy, key=key, user_id=b"HYGON-SSD-PDH",
        vm_digest=csvfast.sm3(DATA).digest(), vm_id=b"vm id of sixteen",
    )  # fmt: skip
    record = (b"CSVFAST-MIGRATE1" + bytes(range(32))).ljust(148, b"\0")
    blob = replace(SessionBlob.parse(forged.blob), rnd_pub_key_data=record)
    blob = replace(blob, signature=key.sign(blob.body, user_id=b"HYGON-SSD-PDH"))
    fake = target.receive_start(policy, forged.certificate.encoded, blob.encode())
    target.activate(fake, 6)
    target.receive_finish(fake)
    report = report_of(target, fake, 6)
    assert not any(report.measure + report.vm_id + report.vm_version + report.user_pubkey_digest)
    # With a genuine chain behind his certificate it is refused: the chain does not lead to his key.
    stolen = forged.certificate.encoded + certificates(processor).chain_file[2084:]
    refused(S.INVALID_CERTIFICATE, target.receive_start, policy, stolen, blob.encode())
    # And a genuine launch session of an owner carries no identity of a running guest.
    owner = make_session(CsvCertificate.parse(certificates(target).pdh), policy, vm_digest=csvfast.sm3(DATA).digest())
    guest = target.receive_start(policy, owner.certificate.encoded, owner.blob)
    assert target.guests[guest].measure == bytes(32)


def test_shared_memory_key(
    processor: Processor, target: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running(GuestPolicy.of(), data=DATA)
    own = certificates(processor).chain_file
    first = move(processor, handle, target)
    other = running(GuestPolicy.of(), asid=2, address=0x60000)
    policy, session = processor.send_start(other, *certificates(target))
    refused(S.INVALID_GUEST, target.receive_start, policy, own, session, 99)
    second = target.receive_start(policy, own, session, first)
    assert target.guests[second].vek.equals(target.guests[first].vek)
    different = running(GuestPolicy.of(nodbg=True), asid=4, address=0x50000)
    policy, session = processor.send_start(different, *certificates(target))
    refused(S.POLICY_FAILURE, target.receive_start, policy, own, session, first)
    private = running(GuestPolicy.of(noks=True), asid=3, address=0x70000)
    policy, session = processor.send_start(private, *certificates(target))
    refused(S.POLICY_FAILURE, target.receive_start, policy, own, session, first)


def test_amd_sessions(line: ManufacturingLine, refused: Refused) -> None:
    options = Options(session_layout="amd")
    with platform(line.make_chip(), options=options) as source, platform(line.make_chip(), options=options) as target:
        handle = source.launch_start(GuestPolicy.of())
        source.activate(handle, 1)
        source.memory.write(FROM, DATA, 0)
        source.launch_update_data(handle, FROM, len(DATA))
        source.launch_measure(handle)
        source.launch_finish(handle)
        error = refused(S.INVALID_LENGTH, source.send_start, handle, *certificates(target), session_length=127)
        assert error.needed["session_length"] == 128
        arrived = move(source, handle, target)
        assert target.memory.read(TO, len(DATA), 5) == DATA
        assert not any(report_of(target, arrived, 5).measure)  # the layout has no room for an identity


def test_too_many_guests(
    line: ManufacturingLine, processor: Processor, running: Callable[..., int], refused: Refused
) -> None:
    handle = running()
    with platform(line.make_chip(), options=Options(max_guests=1)) as full:
        full.launch_start(GuestPolicy.of())
        policy, session = processor.send_start(handle, *certificates(full))
        refused(S.RESOURCE_LIMIT, full.receive_start, policy, certificates(processor).chain_file, session)


def test_secrets_stay_inside(processor: Processor, target: Processor, running: Callable[..., int]) -> None:
    handle = running(data=DATA)
    _, session = processor.send_start(handle, *certificates(target))
    guest = processor.guests[handle]
    assert guest.tek is not None
    assert guest.tik is not None
    header, transport = processor.send_update_data(handle, FROM, 4096)
    for secret in (guest.tek, guest.tik, guest.vek):
        assert bytes(secret) not in session + header + transport
    assert DATA[:16] not in transport
    tek, tik = guest.tek, guest.tik
    processor.send_finish(handle)
    for key in (tek, tik):
        with pytest.raises(csvfast.errors.ClosedError):
            bytes(key)
