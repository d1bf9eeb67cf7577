"""What is fuzzed: seeds to start from, and a call that answers an input with something hashable or lets an exception escape.

An answer is a short description of what came out: the value's kind, or the exception's class and field. csvfast's own exceptions
for bad input are answers; anything else that escapes is a finding.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Hashable

import csvfast
from csvfast.attest import AppraisalPolicy, ChainCache, appraise, claims, verify
from csvfast.certs.bundle import parse_bundle
from csvfast.certs.layout import CA_BYTES, CaCertificate, CsvCertificate, KeyUsage
from csvfast.crypto import sm2
from csvfast.errors import CsvfastError, FormatError
from csvfast.processor.processor import Processor
from csvfast.processor.session import SessionBlob, make_session, open_session
from csvfast.report import evidence_json
from csvfast.report.build import build_report_v1, build_report_v2, client_report
from csvfast.report.event_details import EVENT_TYPES, event_claims
from csvfast.report.event_log import EventLog
from csvfast.report.evidence import Evidence, read_evidence
from csvfast.report.layout import Report
from csvfast.report.policy import GuestPolicy
from csvfast.report.request import ReportRequest
from fuzz.archive_targets import ConfigurationTarget, LayerTarget, UsersTarget
from fuzz.fleet_targets import DiskTarget, ListTarget
from fuzz.fleet_targets import ManifestTarget as FleetManifestTarget
from fuzz.kbs_targets import (
    JsonInputTarget,
    JweTarget,
    JwkTarget,
    RcarTarget,
    ResourcePathTarget,
    TokenTarget,
)
from fuzz.keyprovider_targets import KeyProviderTarget, KeyringTarget, PacketTarget, ParametersTarget
from fuzz.mailbox_targets import MailboxCsv3Target, MailboxTarget
from fuzz.policy_targets import ReferenceMessageTarget, RulesTarget
from fuzz.ratstls_targets import RatsTlsCertificateTarget, RatsTlsClaimsTarget, RatsTlsEvidenceTarget
from fuzz.registry_targets import ManifestTarget, NamesTarget, RegistryTarget
from fuzz.target import CHIP, LINE, MIB, Target, platform
from fuzz.verdictd_targets import VerdictdReplyTarget, VerdictdRequestTarget

__all__ = ["TARGETS", "Target"]


_line, _chip = LINE, CHIP


def _platform() -> tuple[csvfast.EncryptedMemory, Processor]:
    return platform(4 * MIB)


class CertificateTarget(Target):
    """CA and CSV certificates, alone and in files that hold several."""

    def __init__(self) -> None:
        super().__init__()
        _memory, processor = _platform()
        pdh, chain = processor.pdh_cert_export()
        hsk_cek = _chip.hsk_cek
        self.seeds = [
            _line.root.encoded, _line.hsk.encoded, _chip.cek.encoded, pdh, chain[:2084], chain[2084:4168], hsk_cek,
            bytes(pdh) + bytes(chain) + _line.hsk.encoded + _line.root.encoded,
        ]  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        if len(data) == CA_BYTES:
            ca = CaCertificate.parse(data)
            assert ca.encoded == data
            ca.public_key  # noqa: B018
            return "CA", ca.usage, len(ca.user_id)
        if len(data) == 2084:
            csv = CsvCertificate.parse(data)
            assert csv.encoded == data
            slots = tuple((slot.usage, slot.is_empty) for slot in csv.slots)
            csv.public_key  # noqa: B018
            return "CSV", csv.usage, slots
        return tuple(parse_bundle(data).certificates())


def _pages() -> list[bytes]:
    memory, processor = _platform()
    handle = processor.launch_start(GuestPolicy(0x05))
    processor.activate(handle, 1)
    processor.launch_measure(handle)
    guest = processor.guests[handle]
    assert processor.identity is not None
    assert guest.measure is not None
    pek_key, pek = processor.identity.pek_key, processor.identity.pek
    shared = {
        "user_pubkey_digest": guest.user_pubkey_digest, "vm_id": guest.vm_id, "vm_version": guest.vm_version,
        "report_data": bytes(range(64)), "mnonce": bytes(range(16)), "measure": guest.measure, "policy": guest.policy,
        "pek_key": pek_key, "pek": pek, "chip_id": _chip.chip_id, "sealing_key": bytes(range(32)),
    }  # fmt: skip
    first = bytes(build_report_v1(**shared, anonce=b"\x26\xd7\xc7\x5d"))  # type: ignore[arg-type]
    second = bytes(build_report_v2(**shared, build=2337, rtmr_version=1, rtmrs=[guest.measure, *[bytes(32)] * 4]))  # type: ignore[arg-type]
    memory.close()
    return [first, second, bytes(client_report(first)), bytes(client_report(second))]


class RequestTarget(Target):
    """Request pages, whole and cut to what is meant."""

    def __init__(self) -> None:
        super().__init__()
        pages = [ReportRequest.build(b"data"), ReportRequest.build(b"x", extended=True)]
        self.seeds = [pages[0][:112], pages[1][:132], *pages]

    def handle(self, data: bytes) -> Hashable:
        request = ReportRequest.parse(data)
        written = request.encode()
        assert ReportRequest.parse(written) == request
        assert written[:112] == data[:112]
        return request.extended, request.hash_is_valid


class ReportTarget(Target):
    """Report pages."""

    def __init__(self) -> None:
        super().__init__()
        pages = _pages()
        self.seeds = [*pages, pages[0][:0x9F4], pages[1][:0xD34]]

    def handle(self, data: bytes) -> Hashable:
        report = Report.parse(data)
        assert report.page()[: len(data)] == data
        assert report.policy.to_bytes() == report.info[0xB0:0xB4]
        if report.pek.usage == KeyUsage.PEK:
            client = client_report(data, report.version)
            assert client_report(client, report.version) == client
        claims(report)
        assert len(report.signature) == 64
        return report.version, report.pek_is_masked, report.sealing_key_is_present, report.mac_is_valid(), report.pek.usage


class EvidenceTarget(Target):
    """Evidence in every binary encoding, read and verified."""

    def __init__(self) -> None:
        super().__init__()
        for page in _pages():
            evidence = read_evidence(page).with_certificates(_chip.hsk_cek)
            self.seeds.append(page)
            for write in (Evidence.to_csv_rs, Evidence.to_rats_tls, Evidence.to_librats):
                try:
                    self.seeds.append(write(evidence))
                except CsvfastError:
                    continue  # this encoding cannot carry this report
        self.tried = 0

    def handle(self, data: bytes) -> Hashable:
        evidence = read_evidence(data)
        assert read_evidence(evidence.to_csv_rs()).report.signed_bytes == evidence.report.signed_bytes
        self.tried += 1
        if self.tried % 16:  # signatures cost more than everything else together
            return evidence.encoding, evidence.report.version, evidence.hsk is None, evidence.pek.usage
        verified = verify(evidence, roots=[_line.root])
        return evidence.encoding, verified.complete


class VerifyTarget(Target):
    """Evidence verified with its certificates known and the request's nonce: what verifies says what was signed."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ChainCache()
        self.policy = AppraisalPolicy(any_measurement=True, policy_required=("es",))
        self.genuine = set()
        for page in _pages():
            evidence = read_evidence(page).with_certificates(_chip.hsk_cek)
            self.genuine.add((evidence.report.version, evidence.report.info, evidence.report.rtmrs))
            self.seeds += [evidence.report.page(), evidence.report.emitted, evidence.to_csv_rs()]
            if evidence.report.version == 1:
                self.seeds += [evidence.to_rats_tls(), evidence.to_librats()] * 2

    def handle(self, data: bytes) -> Hashable:
        evidence = read_evidence(data)
        if evidence.hsk_cek is None:
            evidence = evidence.with_certificates(_chip.hsk_cek)
        verified = verify(evidence, roots=[_line.root], mnonce=bytes(range(16)), cache=self.cache)
        report = verified.report
        assert (report.version, report.info, report.rtmrs) in self.genuine, "a changed report was verified"
        assert appraise(verified, self.policy).allowed
        return evidence.encoding, verified.checks, len(verified.unchecked)


class PolicyTarget(Target):
    """Appraisal policies in TOML and JSON: whatever is read says which measurements it allows."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        digest = "ab" * 32
        document = {
            "measurements": [digest], "report_versions": [1, 2], "chip_ids": ["SIM1"], "report_data": "00ff", "require_mac": True,
            "policy": {"required": ["nodbg"], "forbidden": ["csv"], "exact": [69]}, "minimum": {"api": "1.3", "build": 2337},
            "rtmrs": {"rtmr1": [digest]},
        }  # fmt: skip
        toml = f'measurements = ["{digest}"]\nvm_ids = ["{digest[:32]}"]\n'
        toml += '[policy]\nexact = [0x45]\n[minimum]\nbuild = 2337\napi = "1.3"\n'
        self.seeds = [json.dumps(document).encode(), toml.encode(), b"any_measurement = true\n", b'{"any_measurement": true}']
        self.seeds += [f'any_measurement = true\nrtmrs.rtmr{index} = ["{digest}"]\n'.encode() for index in range(5)]

    def handle(self, data: bytes) -> Hashable:
        try:
            policy = AppraisalPolicy.parse(data)
        except FormatError as error:
            return error.expected  # not the field: unknown members have any name
        assert policy.any_measurement != bool(policy.measurements)
        return tuple(policy.to_dict())


class EvidenceJsonTarget(Target):
    """Evidence as csv-rs and trustee write it. Arrays of the real size are one seed; most seeds are short, to be quick."""

    text = True
    learn_max = 4000

    def __init__(self) -> None:
        super().__init__()
        self.tried = 0
        page = _pages()[2]
        evidence = read_evidence(page).with_certificates(_chip.hsk_cek)
        whole = evidence.to_json()
        document = json.loads(whole)

        def shortened(value: object) -> object:
            if isinstance(value, dict):
                return {name: shortened(member) for name, member in value.items()}
            return value[:2] if isinstance(value, list) and len(value) > 16 else value

        short = shortened(document)
        assert isinstance(short, dict)
        self.seeds = [json.dumps(short, separators=(",", ":")).encode() for _ in range(40)]
        for name in document:
            self.seeds.append(json.dumps({key: short[key] for key in document if key != name}).encode())
        self.seeds += [whole, b"{}", b"[]", b'{"attestation_report":{"magic":[],"flags":0,"data":[]}}']

    def handle(self, data: bytes) -> Hashable:
        self.tried += 1
        if self.tried % 8 == 0:
            self.compare(data.decode("utf-8", "replace"))
        evidence = read_evidence(data)
        return evidence.encoding, evidence.report.version, evidence.event_log is None

    @staticmethod
    def compare(text: str) -> None:
        """What the quick way reads, json reads too, and finds the same numbers. A list in a list is a mark: nobody reads it."""

        def same(quick: object, slow: object) -> bool:
            if isinstance(quick, dict) and isinstance(slow, dict):
                return quick.keys() == slow.keys() and all(same(value, slow[name]) for name, value in quick.items())
            if isinstance(quick, list) and isinstance(slow, list):
                return len(quick) == len(slow) and all(map(same, quick, slow))
            if isinstance(slow, list):
                return list(quick) == slow if isinstance(quick, bytes) else isinstance(quick, str) and quick[0] == "\0"
            return quick == slow

        quick = evidence_json._load_quickly(text)
        assert quick is None or same(quick, evidence_json._parse(text, evidence_json._unique))


class EventLogTarget(Target):
    """CC event logs."""

    def __init__(self) -> None:
        super().__init__()
        header = struct.pack("<II20s", 0, 3, bytes(20))
        body = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 2) + struct.pack("<HHHH", 0x0C, 48, 0x12, 32) + b"\0"
        first = header + struct.pack("<I", len(body)) + body
        event = struct.pack("<IIIH", 1, 0x80000008, 1, 0x12) + bytes(range(32)) + struct.pack("<I", 4) + b"data"
        both = struct.pack("<IIIH", 2, 4, 2, 0x0C) + bytes(48) + struct.pack("<H", 0x12) + bytes(32) + struct.pack("<I", 0)
        self.seeds = [first, first + event, first + event + both + event, first + event + b"\xff" * 64, first + both + bytes(64)]
        node = bytes.fromhex("01010600031f" "02010c00d041030a00000000")
        image = struct.pack("<QQQQ", 1 << 20, 4096, 0, len(node) + 4) + node + bytes.fromhex("7fff0400")
        variable = bytes(range(16)) + struct.pack("<QQ", 4, 3) + "Boot".encode("utf-16-le") + b"\x01\x02\x03"
        payloads = [image, variable, b"\x05text", b".\0a\0b\0\0\0", struct.pack("<II", 1, 4) + b"tag\0", b"kernel_cmdline\0"]
        for kind in EVENT_TYPES:
            for data in payloads:
                head = struct.pack("<IIIH", 1, kind, 1, 0x12) + bytes(32)
                self.seeds.append(first + head + struct.pack("<I", len(data)) + data)

    def handle(self, data: bytes) -> Hashable:
        log = EventLog.parse(data)
        assert len(event_claims(log)) == len(log.events)
        return len(log.events), tuple(sorted(log.replay()))


class SessionTarget(Target):
    """Session blobs as the firmware opens them."""

    def __init__(self) -> None:
        super().__init__()
        _memory, self.processor = _platform()
        assert self.processor.identity is not None
        self.policy = GuestPolicy(5)
        pdh, _chain = self.processor.pdh_cert_export()
        self.owner = make_session(CsvCertificate.parse(pdh), self.policy)
        self.seeds = [bytes(self.owner.blob)] * 3 + [bytes(772)]
        self.tried = 0

    def handle(self, data: bytes) -> Hashable:
        blob = SessionBlob.parse(data)
        assert blob.encode() == data
        self.tried += 1
        if self.tried % 8:
            return "parsed"
        assert self.processor.identity is not None
        open_session(data, self.processor.identity.pdh_key, self.owner.certificate, self.policy)
        assert data == self.owner.blob, "a changed session was opened"
        return "opened"


class KeyTarget(Target):
    """SM2 keys, signatures and ciphertexts in DER and PEM."""

    def __init__(self) -> None:
        super().__init__()
        key = csvfast.crypto.SM2PrivateKey.generate()
        public = key.public_key
        encrypted = sm2.ciphertext_to_der(public.encrypt(b"0123456789abcdef"))
        self.seeds = [
            sm2.dump_private_key(key, encoding="der"), sm2.dump_private_key(key, encoding="der", format="sec1"),
            sm2.dump_private_key(key), sm2.dump_public_key(public, encoding="der"), sm2.dump_public_key(public),
            sm2.signature_to_der(key.sign(b"x")), encrypted,
            sm2.dump_private_key(key, encoding="der", password=b"secret"),
        ]  # fmt: skip
        self.readers = itertools.cycle(
            [sm2.load_private_key, sm2.load_public_key, sm2.signature_from_der, sm2.ciphertext_from_der]
        )

    def handle(self, data: bytes) -> Hashable:
        reader = next(self.readers)
        reader(data)
        return reader.__name__


TARGETS: dict[str, type[Target]] = {
    "certificate": CertificateTarget,
    "policy": PolicyTarget,
    "request": RequestTarget,
    "report": ReportTarget,
    "verify": VerifyTarget,
    "evidence": EvidenceTarget,
    "evidence-json": EvidenceJsonTarget,
    "event-log": EventLogTarget,
    "fleet-disk": DiskTarget,
    "fleet-list": ListTarget,
    "fleet-manifest": FleetManifestTarget,
    "session": SessionTarget,
    "key": KeyTarget,
    "mailbox": MailboxTarget,
    "mailbox-csv3": MailboxCsv3Target,
    "ratstls-certificate": RatsTlsCertificateTarget,
    "ratstls-claims": RatsTlsClaimsTarget,
    "ratstls-evidence": RatsTlsEvidenceTarget,
    "broker-policy": RulesTarget,
    "reference-message": ReferenceMessageTarget,
    "keyprovider-request": KeyProviderTarget,
    "keyprovider-packet": PacketTarget,
    "keyprovider-parameters": ParametersTarget,
    "openpgp-keyring": KeyringTarget,
    "json-input": JsonInputTarget,
    "kbs-jwk": JwkTarget,
    "kbs-jwe": JweTarget,
    "kbs-token": TokenTarget,
    "kbs-body": RcarTarget,
    "kbs-path": ResourcePathTarget,
    "verdictd-request": VerdictdRequestTarget,
    "verdictd-reply": VerdictdReplyTarget,
    "image-layer": LayerTarget,
    "image-configuration": ConfigurationTarget,
    "image-users": UsersTarget,
    "image-manifest": ManifestTarget,
    "image-names": NamesTarget,
    "image-registry": RegistryTarget,
}
