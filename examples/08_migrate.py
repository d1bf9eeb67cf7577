"""A running guest moves to another platform, stays itself there, and cannot move where its policy forbids."""

from __future__ import annotations

import csvfast
from csvfast.certs import ManufacturingLine, verify_certificate
from csvfast.errors import FirmwareError
from csvfast.processor import Processor
from csvfast.report import GuestPolicy, Report, ReportRequest

MIB = 1 << 20


def platform(line: ManufacturingLine) -> Processor:
    processor = Processor(line.make_chip(), csvfast.EncryptedMemory(8 * MIB, asid_max=16))
    processor.init()
    return processor


def launch(processor: Processor, policy: GuestPolicy, asid: int, data: bytes) -> int:
    handle = processor.launch_start(policy)
    processor.activate(handle, asid)
    processor.memory.write(asid * MIB, data, asid=0)
    processor.launch_update_data(handle, asid * MIB, len(data))
    processor.launch_measure(handle)
    processor.launch_finish(handle)
    return handle


def certificates(processor: Processor) -> tuple[bytes, bytes, bytes]:
    """PDH; PEK, OCA, CEK; HSK, HRK: what the other side needs to see."""
    pdh, chain = processor.pdh_cert_export()
    return pdh, chain, processor.chip.hsk.encoded + processor.chip.root.encoded


def report(processor: Processor, handle: int, address: int, asid: int) -> Report:
    processor.memory.write(address, ReportRequest.build(b"who are you?"), asid)
    processor.attestation(handle, address, 4096)
    return Report.parse(processor.memory.read(address, 4096, asid))


line = ManufacturingLine.create()
firmware = bytes(range(256)) * 64

with platform(line) as source, platform(line) as target, platform(ManufacturingLine.create()) as stranger:
    handle = launch(source, GuestPolicy.of(nodbg=True), 1, firmware)
    source.memory.write(MIB, b"written while it ran", asid=1)
    before = report(source, handle, MIB + 0x10000, 1)

    # The source wants to see a genuine target; the target, a genuine source.
    policy, session = source.send_start(handle, *certificates(target))
    arrived = target.receive_start(policy, b"".join(certificates(source)), session)
    target.activate(arrived, 7)
    for offset in range(0, len(firmware), 4096):
        header, packet = source.send_update_data(handle, MIB + offset, 4096)
        assert firmware[-64:] not in packet  # the hosts and the network see ciphertext
        target.receive_update_data(arrived, header, 2 * MIB + offset, 4096, packet)
    source.send_finish(handle)
    target.receive_finish(arrived)

    after = report(target, arrived, MIB, 7)
    verify_certificate(after.pek, target.chip.cek)
    after.pek.public_key.verify(after.signature, after.signed_bytes, user_id=after.pek.user_id)
    assert after.measure == before.measure == csvfast.sm3(firmware).digest()
    print("the guest reads there:", target.memory.read(2 * MIB, 20, asid=7))
    print("its measure:          ", after.measure.hex()[:32], "... as before")
    print("its chip:             ", before.chip_id, "->", after.chip_id)

    for what, guest, where in (
        ("a chip of another root", launch(source, GuestPolicy.of(), 2, firmware), stranger),
        ("a policy with NOSEND", launch(source, GuestPolicy.of(nosend=True), 3, firmware), target),
        ("a guest that has left", handle, target),
    ):
        try:
            source.send_start(guest, *certificates(where))
        except FirmwareError as refusal:
            print(f"{what + ':':<23}", refusal.status.name)
        else:
            raise SystemExit(f"{what}: nobody refused")
