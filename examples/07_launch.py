"""A guest is launched on a simulated chip with its owner's session, gets a secret, and proves what it runs."""

from __future__ import annotations

import csvfast
from csvfast.attest import verify
from csvfast.certs.chain import CertificateChain, verify_chain
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import hmac_sm3
from csvfast.errors import FirmwareError, VerificationError
from csvfast.processor import Processor, make_session, pack_disk_password, seal_packet
from csvfast.processor.launch import measurement_message
from csvfast.report import GuestPolicy, ReportRequest
from csvfast.report.evidence import read_evidence

FIRMWARE = bytes(range(256)) * 256  # stands for OVMF.fd: examples/04 predicts the digest of real files
POLICY = GuestPolicy.of(nodbg=True)

chip = ManufacturingLine.create().make_chip()
print("chip:", chip.chip_id)

with csvfast.EncryptedMemory(16 << 20) as memory, Processor(chip, memory) as processor:
    processor.init()

    # The owner looks at the platform's chain, then makes a session: transport keys for this platform alone, and the only
    # launch digest with which the guest may run.
    pdh_bytes, rest = processor.pdh_cert_export()
    pek, oca, cek = (CsvCertificate.parse(rest[start : start + 2084]) for start in (0, 2084, 4168))
    pdh = CsvCertificate.parse(pdh_bytes)
    verify_chain(CertificateChain(hsk=chip.hsk, cek=cek, pek=pek, oca=oca, pdh=pdh), roots=[chip.root])
    expected = csvfast.sm3(FIRMWARE).digest()
    session = make_session(pdh, POLICY, vm_id=b"database-primary", vm_digest=expected)

    # The host loads plaintext; the firmware measures and encrypts it where it stands.
    handle = processor.launch_start(POLICY, dh=session.certificate.encoded, session=session.blob)
    processor.activate(handle, asid=1)
    memory.write(0x100000, FIRMWARE, asid=0)
    processor.launch_update_data(handle, 0x100000, len(FIRMWARE))
    print("host sees:   ", memory.read(0x100000, 16, asid=0).hex())
    print("guest sees:  ", memory.read(0x100000, 16, asid=1).hex())

    # The owner checks the measurement, which only the firmware that has TIK could make, and answers with a secret.
    blob = processor.launch_measure(handle)
    measure, mnonce = blob[:32], blob[32:]
    hmac_sm3(session.tik, measurement_message(processor.profile.api, POLICY, expected, mnonce)).verify(measure)
    table = pack_disk_password(b"correct horse battery staple")
    header, packet = seal_packet(1, session.tek, session.tik, table, iv=bytes(16), measure=measure)
    processor.launch_secret(handle, header, 0x200000, len(packet), packet)
    processor.launch_finish(handle)
    assert memory.read(0x200000, len(table), asid=1) == table

    # Inside the guest: a request in a page of its own; the firmware answers in place.
    memory.write(0x300000, ReportRequest.build(b"nonce of a verifier", bytes(16)), asid=1)
    processor.attestation(handle, 0x300000, 4096)
    evidence = read_evidence(memory.read(0x300000, 4096, asid=1)).with_certificates(chip.hsk_cek)

    verified = verify(evidence, roots=[chip.root], report_data=b"nonce of a verifier", mnonce=bytes(16))
    assert verified.report.measure == expected
    print("measure:     ", verified.report.measure.hex())
    print("vm_id:       ", verified.report.vm_id.decode())
    try:
        verify(evidence)
    except VerificationError as refusal:
        print("Hygon's root:", str(refusal)[:90], "...")

    # Another firmware under the same session: it never runs.
    second = processor.launch_start(POLICY, dh=session.certificate.encoded, session=session.blob)
    processor.activate(second, asid=2)
    memory.write(0x400000, FIRMWARE[::-1], asid=0)
    processor.launch_update_data(second, 0x400000, len(FIRMWARE))
    try:
        processor.launch_measure(second)
    except FirmwareError as refusal:
        print("altered:     ", refusal)
