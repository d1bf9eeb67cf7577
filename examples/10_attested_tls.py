"""A guest proves over TLS what it runs before the server says a word; another guest, and a thief of evidence, get no answer."""

from __future__ import annotations

import secrets

import csvfast
from csvfast.attest import AppraisalPolicy
from csvfast.certs import ManufacturingLine
from csvfast.errors import AttestedTlsError
from csvfast.processor import Processor
from csvfast.ratstls import (
    BlockingServer,
    BlockingStream,
    Identity,
    PolicyJudge,
    Requirement,
    TlsKey,
    connect,
    encode_evidence_buffer,
    make_certificate,
    read_certificate,
)
from csvfast.report import Evidence, GuestPolicy, ReportRequest, read_evidence

FIRMWARE = bytes(range(256)) * 256  # stands for OVMF.fd: examples/04 predicts the digest of real files
PAGE = 0x300000

chip = ManufacturingLine.create().make_chip()


class Guest:
    """A guest of the simulated chip. A real one uses csvfast.ratstls.DeviceAttester, which asks /dev/csv-guest."""

    def __init__(self, processor: Processor, memory: csvfast.EncryptedMemory, asid: int, firmware: bytes) -> None:
        self.processor, self.memory, self.asid = processor, memory, asid
        self.page = PAGE * asid
        self.handle = processor.launch_start(GuestPolicy.of(nodbg=True))
        processor.activate(self.handle, asid=asid)
        memory.write(self.page + 0x10000, firmware, asid=0)
        processor.launch_update_data(self.handle, self.page + 0x10000, len(firmware))
        processor.launch_measure(self.handle)
        processor.launch_finish(self.handle)

    def evidence(self, report_data: bytes) -> Evidence:
        """What the chip says about this guest, and about these 64 bytes of its."""
        self.memory.write(self.page, ReportRequest.build(report_data, secrets.token_bytes(16)), asid=self.asid)
        self.processor.attestation(self.handle, self.page, 4096)
        return read_evidence(self.memory.read(self.page, 4096, asid=self.asid)).with_certificates(chip.hsk_cek)


def serve(stream: BlockingStream) -> None:
    """Called only for peers that have been verified and appraised."""
    assert stream.peer.verified is not None
    print("server:   guest", stream.peer.verified.report.measure.hex()[:16], "role", stream.peer.custom_claims["role"].decode())
    stream.send(b"the key for " + stream.receive())


def refused(_address: str, error: AttestedTlsError, _certificate: object) -> None:
    """Called for the others. They are told nothing but that the connection is over."""
    print("server:   refused,", str(error)[:90])


with csvfast.EncryptedMemory(16 << 20) as memory, Processor(chip, memory) as processor:
    processor.init()
    guest = Guest(processor, memory, 1, FIRMWARE)
    stranger = Guest(processor, memory, 2, FIRMWARE[::-1])

    # A key made in the guest, a report about it, a certificate around both. The claims are under the report's signature, too.
    identity = Identity.create(guest, custom={"role": b"database"})
    print(f"guest:    {len(identity.certificate)} bytes of certificate, evidence inside")

    # The server trusts this line's root, and allows one measurement. The guest knows the server by its key.
    policy = AppraisalPolicy.from_dict(
        {"measurements": [csvfast.sm3(FIRMWARE).hexdigest()], "policy": {"required": ["nodbg"]}}
    )
    judge = PolicyJudge([chip.root], policy)
    server_identity = Identity.create(None)
    the_server = Requirement.pinned([server_identity.key.spki_sha256])

    with BlockingServer(("127.0.0.1", 0), server_identity, Requirement.attested(judge), serve, on_refusal=refused) as server:
        with connect(server.address, identity, the_server) as stream:
            stream.send(b"/dev/sda2")
            print("guest:   ", stream.receive().decode(), "over", stream.peer.cipher)

        # Genuine evidence, of a guest that is not allowed.
        with connect(server.address, Identity.create(stranger, custom={"role": b"database"}), the_server) as stream:
            print("stranger:", stream.receive() or "no answer")

        # The allowed guest's evidence in a certificate about another key: it is about the guest's, and no other.
        shown = read_certificate(identity.certificate)
        assert shown.buffer is not None
        key = TlsKey.generate()
        thief = Identity(key, make_certificate(key, encode_evidence_buffer(shown.buffer.raw, shown.buffer.claims)))
        with connect(server.address, thief, the_server) as stream:
            try:
                stream.receive()
            except AttestedTlsError as error:
                print("thief:   ", error)
