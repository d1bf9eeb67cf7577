"""Certificates: bytes as rats-tls writes them, golden ones of both layouts, and whatever is out of form or not bound refused."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from ratstls.attested import NAME, NOW, PlatformAttester, buffer_for, evidence_extension, odd_certificate
from ratstls.test_claims import BAD_BUFFERS, BAD_CLAIMS

from csvfast.attest import verify
from csvfast.certs import CaCertificate
from csvfast.crypto import der as asn1
from csvfast.errors import (
    ArgumentError,
    AttestedTlsError,
    AuthenticationError,
    FormatError,
    KeyExposureError,
    VerificationError,
)
from csvfast.ratstls.certificate import (
    CERTIFICATE_LIMIT,
    ENDORSEMENTS_OID,
    EVIDENCE_OID,
    attest_certificate,
    check_binding,
    make_certificate,
    raw_evidence,
    read_certificate,
    read_raw_evidence,
)
from csvfast.ratstls.claims import CSV_TAG, encode_claims, encode_evidence_buffer, report_data_of
from csvfast.ratstls.keys import TlsKey, read_spki, verify_signature
from csvfast.report import Evidence, Report

VECTORS = Path(__file__).parents[1] / "vectors" / "ratstls"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())
KINDS = ("p256", "rsa3072", "sm2")


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


@pytest.fixture(scope="module")
def keys() -> dict[str, TlsKey]:
    return {kind: TlsKey.generate(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def key(keys: dict[str, TlsKey]) -> TlsKey:
    return keys["p256"]


@pytest.fixture(scope="module")
def good(platform: Platform, key: TlsKey) -> bytes:
    return buffer_for(platform, key)


def refused(data: bytes, field: str, match: str | None = None, **options: Any) -> FormatError:
    with pytest.raises(FormatError, match=match) as caught:
        read_certificate(data, **options)
    assert caught.value.field == field, caught.value
    return caught.value


def unbound(data: bytes, match: str, **options: Any) -> None:
    certificate = read_certificate(data)
    with pytest.raises(AttestedTlsError, match=match) as caught:
        check_binding(certificate, **options)
    assert caught.value.stage == "binding"


# ---- Known answers


# The TBSCertificate of CCC-Attestation/interoperable-ra-tls interoperability-tests/rats-tls-cert.pem, written by rats-tls, from
# the version to the extensions before the evidence. Key, times and key identifier stand between the pieces.
RATS_TLS_NAME = "32311d301b060355040a0c14496e636c617661726520436f6e7461696e6572733111300f06035504030c08524154532d544c53"
RATS_TLS_HEAD = "a003020102020101300a06082a8648ce3d04030230" + RATS_TLS_NAME + "301e170d"
RATS_TLS_EXTENSIONS = "30090603551d1304023000301d0603551d0e04160414{0}301f0603551d23041830168014{0}"


def test_written_as_rats_tls_writes(good: bytes, key: TlsKey) -> None:
    begin, end = datetime(2023, 2, 22, 16, 10, 22, tzinfo=UTC), datetime(2024, 2, 22, 17, 10, 22, tzinfo=UTC)
    made = make_certificate(key, good, not_before=begin, not_after=end)
    identifier = hashlib.sha1(key.spki[-65:]).hexdigest()
    head = RATS_TLS_HEAD + b"230222161022Z".hex() + "170d" + b"240222171022Z".hex() + "30" + RATS_TLS_NAME + key.spki.hex()
    extension = "06066781050504090482" + len(good).to_bytes(2, "big").hex() + good.hex()
    assert made[8 : 8 + len(head) // 2].hex() == head
    assert RATS_TLS_EXTENSIONS.format(identifier) in made.hex()
    assert made.hex().index(RATS_TLS_EXTENSIONS.format(identifier)) < made.hex().index(extension)
    tail = bytes.fromhex(extension) + bytes.fromhex("300a06082a8648ce3d040302") + b"\x03"
    assert tail in made, "the evidence is the last extension, and the signature follows"


def test_sizes(platform: Platform, key: TlsKey) -> None:
    made = attest_certificate(key, PlatformAttester(platform), custom={"key_0": b"value_0\0"})
    assert 7530 <= len(made) <= 7536  # 7533 in the description; the ECDSA signature's length varies
    assert 418 <= len(make_certificate(key, None)) <= 424


@pytest.mark.parametrize("name", EXPECTED["certificates"])
def test_golden(name: str) -> None:
    data, expected = (VECTORS / f"{name}.der").read_bytes(), EXPECTED["certificates"][name]
    assert hashlib.sha256(data).hexdigest() == expected["sha256"]
    found = read_certificate(data)
    check_binding(found, now=NOW)
    assert found.der == data
    assert (found.key_kind, found.spki_sha256.hex()) == (expected["kind"], expected["spki_sha256"])
    assert hashlib.sha256(found.spki).hexdigest() == expected["spki_sha256"]
    assert found.not_valid_before == datetime.fromisoformat(EXPECTED["not_before"])
    assert found.not_valid_after == datetime.fromisoformat(EXPECTED["not_after"])
    if name == "p256-no-evidence":
        assert (found.buffer, found.claims, found.evidence) == (None, None, None)
        assert "no evidence" in repr(found)
        return
    assert found.buffer is not None
    assert found.claims is not None
    assert found.evidence is not None
    assert found.buffer.tag == CSV_TAG
    assert found.claims.hash_id == (int(name[-1]) if "hash" in name else 1)
    layout = "librats" if name.endswith("librats") else "rats-tls"
    assert found.evidence.encoding == layout
    assert raw_evidence(found.evidence, layout) == found.buffer.raw
    if name.startswith(tuple(KINDS)) and name.endswith(("rats-tls", "librats")):
        assert {one: value.hex() for one, value in found.claims.custom.items()} == EXPECTED["custom"]
    roots = [CaCertificate.parse((VECTORS / "root.cert").read_bytes())]
    verified = verify(found.evidence, roots=roots, report_data=report_data_of(found.claims.encoded))
    assert verified.complete
    assert verified.report.measure.hex() == EXPECTED["measure"]
    assert verified.report.chip_id == EXPECTED["chip_id"]
    with pytest.raises(VerificationError):
        verify(found.evidence)  # Hygon's root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rats-tls", "librats"])
def test_made_and_read(platform: Platform, keys: dict[str, TlsKey], kind: str, layout: Any) -> None:
    key, attester = keys[kind], PlatformAttester(platform)
    before = datetime.now(UTC)
    made = attest_certificate(key, attester, custom={"a": b"1"}, layout=layout)
    found = read_certificate(bytearray(made))
    check_binding(found)
    assert (found.spki, found.spki_sha256, found.key_kind) == (key.spki, key.spki_sha256, kind)
    assert found.claims is not None
    assert found.evidence is not None
    assert attester.asked == [report_data_of(found.claims.encoded)]
    assert dict(found.claims.custom) == {"a": b"1"}
    assert found.evidence.encoding == layout
    assert found.evidence.hsk_cek == platform.hsk_cek
    assert not found.evidence.report.sealing_key_is_present
    assert abs(found.not_valid_before - before + timedelta(hours=1)) < timedelta(seconds=5)
    assert abs(found.not_valid_after - before - timedelta(days=365)) < timedelta(seconds=5)
    assert verify(found.evidence, roots=platform.roots).complete
    assert read_certificate(made) == found
    assert kind in repr(found)
    assert layout in repr(found)


def test_names_and_times(key: TlsKey) -> None:
    end = datetime(2049, 12, 31, 23, 59, 59, 999, tzinfo=UTC)
    for kind in (key, TlsKey.generate("sm2")):
        made = make_certificate(kind, None, subject=[("O", "a"), ("OU", "b"), ("CN", "ü")], not_after=end + timedelta(days=1))
        parsed = x509.load_der_x509_certificate(made)
        assert parsed.subject.rfc4514_string() == parsed.issuer.rfc4514_string() == "CN=ü,OU=b,O=a"
        assert parsed.not_valid_after_utc == datetime(2050, 1, 1, 23, 59, 59, tzinfo=UTC)
        assert b"\x18\x0f20500101235959Z" in made
        assert parsed.serial_number == 1
        assert [one.oid.dotted_string for one in parsed.extensions] == ["2.5.29.19", "2.5.29.14", "2.5.29.35"]
        check_binding(read_certificate(made))
        assert b"\x17\x0d491231235959Z" in make_certificate(kind, None, not_after=end)
        read_certificate(make_certificate(kind, None, subject=[]))
    for arguments in (
        {"subject": [("X", "a")]}, {"subject": [("CN", "a" * 65)]}, {"subject": [("C", "abc")]}, {"subject": [("CN", "")]},
        {"not_before": NOW, "not_after": NOW - timedelta(seconds=1)}, {"not_after": NOW.replace(tzinfo=None)},
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            make_certificate(key, None, **arguments)


@pytest.mark.parametrize("kind", ["p256", "rsa3072"])
def test_openssl_and_cryptography_agree(keys: dict[str, TlsKey], kind: str, platform: Platform, tmp_path: Path) -> None:
    made = attest_certificate(keys[kind], PlatformAttester(platform))
    parsed = x509.load_der_x509_certificate(made)
    parsed.verify_directly_issued_by(parsed)
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    (tmp_path / "c.pem").write_bytes(parsed.public_bytes(Encoding.PEM))
    command = [program, "verify", "-check_ss_sig", "-x509_strict", "-CAfile", tmp_path / "c.pem", tmp_path / "c.pem"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["p256", "rsa3072"])
def test_a_certificate_that_openssl_made(keys: dict[str, TlsKey], kind: str, good: bytes, tmp_path: Path) -> None:
    """Its extensions are what `openssl req` thinks right; the evidence is ours."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    key = keys[kind]
    (tmp_path / "key.pem").write_bytes(key.dump())
    # The command line has no room for real evidence.
    evidence = f"{EVIDENCE_OID}=DER:{encode_evidence_buffer(b'', b'').hex()}"
    command = [program, "req", "-new", "-x509", "-sha256", "-key", tmp_path / "key.pem", "-subj", "/O=a/CN=b", "-outform", "DER"]
    command += ["-addext", evidence]
    made = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    refused(made, "encoding", "claims buffer")
    without = subprocess.run(command[:-2], capture_output=True, timeout=60, check=True).stdout
    found = read_certificate(without)
    check_binding(found)
    assert (found.key_kind, found.spki) == (kind, key.spki)


# ---- Form


def test_no_bytes_and_too_many(key: TlsKey, good: bytes) -> None:
    made = make_certificate(key, good)
    refused(b"", "certificate")
    refused(b"\x30\x00", "tbsCertificate")
    refused(made + b"\0", "certificate", "1 more bytes")
    refused(made[:-1], "certificate")
    refused(made, "length", limit=len(made) - 1)
    assert read_certificate(made, limit=len(made)).der == made
    refused(make_certificate(key, encode_evidence_buffer(bytes(CERTIFICATE_LIMIT), b"")), "length")
    refused(bytes(1 << 20), "length")


def test_evidence_more_than_once(key: TlsKey, good: bytes) -> None:
    """cryptography does not write an extension twice: the second gets its identifier afterwards."""
    other = "2.23.133.5.4.8"
    for extensions in ([(EVIDENCE_OID, good, False), (other, good, False)], [(other, good, True), (EVIDENCE_OID, good, False)]):
        made = odd_certificate(key.private, extensions)
        twice = made.replace(asn1.object_identifier(other), asn1.object_identifier(EVIDENCE_OID))
        refused(twice, f"extension {EVIDENCE_OID}", "more than one")


def test_critical_evidence(key: TlsKey, good: bytes) -> None:
    made = make_certificate(key, good, critical=True)
    check_binding(read_certificate(made))
    assert x509.load_der_x509_certificate(made).extensions[3].critical


@pytest.mark.parametrize("critical", [False, True])
def test_other_extensions(key: TlsKey, good: bytes, critical: bool) -> None:
    evidence = evidence_extension(good)
    endorsements = encode_evidence_buffer(b"", b"")
    made = odd_certificate(key.private, [evidence, (ENDORSEMENTS_OID, endorsements, critical)])
    refused(made, f"extension {ENDORSEMENTS_OID}", "endorsements")
    refused(odd_certificate(key.private, [(ENDORSEMENTS_OID, endorsements, critical)]), f"extension {ENDORSEMENTS_OID}")
    for legacy in ("1.2.840.113741.1337.6", "1.2.840.113741.1337.22"):
        alone = odd_certificate(key.private, [(legacy, b"report", critical)])
        refused(alone, f"extension {legacy}", "before Interoperable RA-TLS")
        refused(odd_certificate(key.private, [evidence, (legacy, b"report", critical)]), f"extension {legacy}")
    unknown = odd_certificate(key.private, [evidence, ("1.2.3.4", b"what", critical)])
    if critical:
        refused(unknown, "extension 1.2.3.4", "unknown and critical")
    else:
        check_binding(read_certificate(unknown), now=NOW)


def test_extensions_every_certificate_may_have(key: TlsKey, good: bytes) -> None:
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False).public_bytes()
    extended = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]).public_bytes()
    names = x509.SubjectAlternativeName([x509.DNSName("broker")]).public_bytes()
    extensions = [("2.5.29.15", usage, True), ("2.5.29.37", extended, True), ("2.5.29.17", names, True), evidence_extension(good)]
    check_binding(read_certificate(odd_certificate(key.private, extensions)), now=NOW)


def test_extensions_without_end(key: TlsKey, good: bytes) -> None:
    """Reading what X.509 knows costs up to 2 microseconds a byte; only the evidence may be long."""
    names = ("2.5.29.17", x509.SubjectAlternativeName([x509.DNSName("")] * 15000).public_bytes(), False)
    many = [(f"1.3.{number}", b"", False) for number in range(2000)]
    for extensions in ([names], [names, evidence_extension(good)], many):
        made = odd_certificate(key.private, extensions)
        start = time.process_time()
        refused(made, "extensions" if len(made) <= CERTIFICATE_LIMIT else "length")
        assert time.process_time() - start < 0.02
    few = ("2.5.29.17", x509.SubjectAlternativeName([x509.DNSName("")] * 900).public_bytes(), False)
    check_binding(read_certificate(odd_certificate(key.private, [few, evidence_extension(good)])), now=NOW)
    # What stands between key and extensions in other certificates does not hide them.
    refused(piecewise(key, extensions=b"\x81\x02\0\0" + asn1.context(3, asn1.sequence())), "extensions")


def test_damaged_extensions(key: TlsKey, good: bytes) -> None:
    refused(odd_certificate(key.private, [("2.5.29.35", b"\xff\xff", False), evidence_extension(good)]), "content")
    refused(odd_certificate(key.private, [("2.5.29.19", b"", False)]), "content")
    refused(odd_certificate(key.private, [evidence_extension(b"")]), "encoding")


def test_no_extensions_at_all(key: TlsKey) -> None:
    found = read_certificate(odd_certificate(key.private, []))
    assert found.evidence is None
    check_binding(found, now=NOW)


KEY_FIELDS = {
    "P-384": (lambda: ec.generate_private_key(ec.SECP384R1()), "algorithm", "secp384r1"),
    "P-521": (lambda: ec.generate_private_key(ec.SECP521R1()), "algorithm", "secp521r1"),
    "secp256k1": (lambda: ec.generate_private_key(ec.SECP256K1()), "algorithm", "secp256k1"),
    "RSA-2048": (lambda: rsa.generate_private_key(65537, 2048), "modulus", "RSA of 2048 bits"),
    "DSA": (lambda: dsa.generate_private_key(1024), "algorithm", "another kind"),
}


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_other_keys(name: str, good: bytes) -> None:
    make, field, match = KEY_FIELDS[name]
    made = odd_certificate(make(), [evidence_extension(good)])
    found = refused(made, field, match)
    assert found.structure == "SubjectPublicKeyInfo"


def test_ed25519(good: bytes) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    begin, end = NOW - timedelta(hours=1), NOW + timedelta(days=1)
    made = x509.CertificateBuilder(NAME, NAME, private.public_key(), 1, begin, end).sign(private, None)
    refused(made.public_bytes(Encoding.DER), "algorithm", "another kind")


def test_other_spellings_of_a_good_key(key: TlsKey, good: bytes) -> None:
    """The same point compressed: another SubjectPublicKeyInfo, whose hash nothing vouches for."""
    assert isinstance(key.private, ec.EllipticCurvePrivateKey)
    point = key.private.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    algorithm = asn1.sequence(asn1.object_identifier("1.2.840.10045.2.1"), asn1.object_identifier("1.2.840.10045.3.1.7"))
    for spki, field in (
        (asn1.sequence(algorithm, asn1.bit_string(point)), "algorithm"),
        (key.spki[:-64] + bytes(64), "point"),
        (TlsKey.generate("sm2").spki[:-64] + bytes(64), "point"),
        (key.spki + b"\0", "algorithm"),
        (b"", "algorithm"),
    ):
        with pytest.raises(FormatError) as caught:
            read_spki(spki)
        assert caught.value.field == field


def test_other_spellings_of_an_rsa_key(keys: dict[str, TlsKey]) -> None:
    """Without the NULL, and with other identifiers for RSA keys: cryptography reads some of them."""
    reader = asn1.Reader(keys["rsa3072"].spki, "key").sequence("key")
    reader.sequence("algorithm")
    bits = asn1.bit_string(reader.bit_string("bits")[0])
    plain, pss = asn1.object_identifier("1.2.840.113549.1.1.1"), asn1.object_identifier("1.2.840.113549.1.1.10")
    assert asn1.sequence(asn1.sequence(plain, asn1.null()), bits) == keys["rsa3072"].spki
    for algorithm in ([plain], [pss], [plain, asn1.integer(1)], [pss, asn1.null()]):
        with pytest.raises(FormatError, match="SubjectPublicKeyInfo"):
            read_spki(asn1.sequence(asn1.sequence(*algorithm), bits))


def test_rsa_with_another_exponent() -> None:
    numbers = rsa.RSAPublicNumbers(3, rsa.generate_private_key(65537, 3072).public_key().public_numbers().n)
    spki = numbers.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(FormatError, match="exponent"):
        read_spki(spki)
    huge = rsa.RSAPublicNumbers(65537, (1 << 8200) + 1).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(FormatError, match="modulus"):
        read_spki(huge)


def test_other_signature_algorithms(keys: dict[str, TlsKey], good: bytes) -> None:
    for kind, algorithm in (("p256", hashes.SHA384()), ("p256", hashes.SHA512()), ("rsa3072", hashes.SHA512())):
        made = odd_certificate(keys[kind].private, [evidence_extension(good)], hash_algorithm=algorithm)
        refused(made, "signatureAlgorithm")
    private = keys["rsa3072"].private
    assert isinstance(private, rsa.RSAPrivateKey)
    builder = x509.CertificateBuilder(NAME, NAME, private.public_key(), 1, NOW, NOW)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    refused(builder.sign(private, hashes.SHA256(), rsa_padding=pss).public_bytes(Encoding.DER), "signatureAlgorithm")


def test_another_issuer(key: TlsKey, good: bytes) -> None:
    other = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "CA")])
    refused(odd_certificate(key.private, [evidence_extension(good)], issuer=other), "subject", "self-signed")


def piecewise(key: TlsKey, **changes: bytes) -> bytes:
    """A certificate from pieces, any of which may be another."""
    made = make_certificate(key, None)
    fields = asn1.Reader(made, "certificate").sequence("certificate").sequence("tbsCertificate")
    pieces: dict[str, bytes] = {}
    for name in ("version", "serial", "algorithm", "issuer", "validity", "subject", "spki", "extensions"):
        start = fields.position
        if name == "serial":
            fields.unsigned(name, 20)
        elif name in ("version", "extensions"):
            fields.context(0 if name == "version" else 3, name)
        else:
            fields.sequence(name)
        pieces[name] = made[start : fields.position]
    algorithm = changes.pop("outer", pieces["algorithm"])
    signed = asn1.sequence(*(pieces | changes).values())
    return asn1.sequence(signed, algorithm, asn1.bit_string(key.sign(signed)))


@pytest.mark.parametrize("kind", ["p256", "sm2"])
def test_fields(keys: dict[str, TlsKey], kind: str) -> None:
    key = keys[kind]
    check_binding(read_certificate(piecewise(key)))
    refused(piecewise(key, version=b""), "version", "none, which is v1")
    refused(piecewise(key, version=b"", extensions=b""), "version", "v1")
    refused(piecewise(key, version=asn1.context(0, asn1.integer(0))), "version", "v1")
    refused(piecewise(key, version=asn1.context(0, asn1.integer(1))), "version", "v2")
    refused(piecewise(key, version=asn1.context(0, asn1.integer(3))), "version", "v4")
    refused(piecewise(key, version=asn1.context(0, asn1.integer(2), asn1.null())), "version")
    refused(piecewise(key, serial=asn1.integer(0)), "serialNumber", "positive")
    refused(piecewise(key, serial=b"\x02\x01\xff"), "serialNumber", "negative")
    refused(piecewise(key, serial=b"\x02\x02\x00\x01"), "serialNumber", "leading zero")
    refused(piecewise(key, serial=asn1.integer(1 << 160)), "serialNumber")
    check_binding(read_certificate(piecewise(key, serial=asn1.integer((1 << 159) - 1))))
    other = asn1.sequence(asn1.object_identifier("1.2.840.10045.4.3.3"))
    refused(piecewise(key, algorithm=other), "signature", "the one of signatureAlgorithm")
    refused(piecewise(key, outer=other), "signature")
    refused(piecewise(key, algorithm=other, outer=other), "signatureAlgorithm")
    refused(piecewise(key, validity=asn1.sequence()), "content")
    refused(piecewise(key, validity=asn1.sequence(b"\x17\x0d231332000000Z", b"\x17\x0d490101000000Z")), "content")
    refused(piecewise(key, extensions=asn1.context(3)), "extensions")
    refused(piecewise(key, extensions=b"\xa3\x80\x30\x00\x00\x00"), "extensions")
    refused(piecewise(key, spki=asn1.sequence()), "algorithm")


def test_indefinite_length(key: TlsKey) -> None:
    made = make_certificate(key, None)
    refused(b"\x30\x80" + made[4:] + b"\0\0", "certificate", "indefinite")


def test_the_other_kinds_of_algorithm(keys: dict[str, TlsKey]) -> None:
    """A key of one kind under the algorithm of another."""
    for kind in KINDS:
        for other in KINDS:
            made = piecewise(keys[kind], spki=keys[other].spki)
            if kind == other:
                check_binding(read_certificate(made))
            else:
                refused(made, "signatureAlgorithm")


def test_bad_cbor_inside(key: TlsKey) -> None:
    for data, field in BAD_BUFFERS.values():
        if len(data) < 20000:
            refused(make_certificate(key, data), field)


def test_bad_claims_inside(platform: Platform, key: TlsKey) -> None:
    for data, field in BAD_CLAIMS.values():
        if len(data) < 20000:
            refused(make_certificate(key, buffer_for(platform, key, claims=data)), field)


@pytest.mark.parametrize("tag", [60000, 60001, 60002, 0x1A7504, 0x1A7505])
def test_evidence_of_other_kinds(platform: Platform, key: TlsKey, tag: int) -> None:
    claims = encode_claims(key.spki)
    raw = platform.evidence(report_data=report_data_of(claims)).to_rats_tls()
    refused(make_certificate(key, encode_evidence_buffer(raw, claims, tag)), "tag", "expected 1733894 .Hygon CSV")


# ---- The two layouts


@pytest.fixture(scope="module")
def layouts(platform: Platform) -> dict[str, bytes]:
    evidence = platform.evidence()
    return {"rats-tls": evidence.to_rats_tls(), "librats": evidence.to_librats()}


def test_layouts(layouts: dict[str, bytes], platform: Platform) -> None:
    for layout, raw in layouts.items():
        found = read_raw_evidence(raw)
        assert (found.encoding, found.hsk_cek) == (layout, platform.hsk_cek)


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def test_neither_layout(layouts: dict[str, bytes]) -> None:
    rats, librats = layouts["rats-tls"], layouts["librats"]
    for raw in (
        bytes(7016),
        b"\xff" * 7016,
        changed(rats, 7012, bytes(4)),
        changed(rats, 7012, (2915).to_bytes(4, "little")),
        changed(rats, 7012, (2916).to_bytes(4, "big")),
        changed(rats, 4096, b"\x02"),
        changed(rats, 4096 + 36, b"\x14"),
        changed(rats, 4096 + 38, b"\x01"),
        changed(librats, 4096, bytes(4)),
        changed(librats, 4096, (2915).to_bytes(4, "little")),
        changed(librats, 4100, b"\x02"),
        changed(librats, 4100 + 36, b"\x00"),
    ):
        with pytest.raises(FormatError, match="neither layout"):
            read_raw_evidence(raw)


def test_both_layouts(layouts: dict[str, bytes]) -> None:
    """Somebody writes an HSK's marks where the other layout wants them. In rats-tls the length word of librats is the version of
    the HSK: both cannot be. What can is the reverse marks, and they must not turn one layout into the other."""
    rats, librats = layouts["rats-tls"], layouts["librats"]
    marked = changed(changed(rats, 4100, (1).to_bytes(4, "little")), 4136, (0x13).to_bytes(4, "little"))
    assert read_raw_evidence(marked).encoding == "rats-tls"
    marked = changed(librats, 7012, (2916).to_bytes(4, "little"))
    assert read_raw_evidence(marked).encoding == "librats"
    marked = changed(changed(marked, 4096, (1).to_bytes(4, "little")), 4132, (0x13).to_bytes(4, "little"))
    assert read_raw_evidence(marked).encoding == "rats-tls"
    with pytest.raises(FormatError, match="neither layout"):
        read_raw_evidence(changed(rats, 4096, (2916).to_bytes(4, "little")))


@pytest.mark.parametrize("size", [0, 1, 4096, 4100, 7012, 7015, 7017, 8192])
def test_other_lengths(layouts: dict[str, bytes], platform: Platform, key: TlsKey, size: int) -> None:
    raw = layouts["librats"].ljust(size, b"\0")[:size]
    with pytest.raises(FormatError, match=f"length: found {size} bytes; expected 7016"):
        read_raw_evidence(raw)
    refused(make_certificate(key, encode_evidence_buffer(raw, encode_claims(key.spki))), "length")


def test_evidence_without_certificates(platform: Platform, key: TlsKey) -> None:
    bare = Evidence(Report.parse(platform.page_v1()))
    for raw in (bare.to_rats_tls(), bare.to_librats()):
        with pytest.raises(FormatError):
            read_raw_evidence(raw)
    for layout in ("rats-tls", "librats"):
        with pytest.raises(ArgumentError, match=f"no HSK and CEK of chip {platform.chip.chip_id}"):
            raw_evidence(bare, layout)  # type: ignore[arg-type]


def test_what_is_not_attested(platform: Platform, key: TlsKey) -> None:
    with pytest.raises(ArgumentError, match="layout"):
        attest_certificate(key, PlatformAttester(platform), layout="json")  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="other data"):
        attest_certificate(key, PlatformAttester(platform, report_data=bytes(64)))
    with pytest.raises(ArgumentError, match="pubkey-hash"):
        attest_certificate(key, PlatformAttester(platform), custom={"pubkey-hash": b""})
    with pytest.raises(FormatError, match="at most 32768"):
        attest_certificate(key, PlatformAttester(platform), custom={"a": bytes(30000)})

    class SecondVersion(PlatformAttester):
        def evidence(self, report_data: bytes) -> Evidence:
            return self.platform.evidence(2, report_data=report_data)

    with pytest.raises(ArgumentError, match="V2"):
        attest_certificate(key, SecondVersion(platform))


# ---- Binding


def test_validity(key: TlsKey) -> None:
    begin, end, second = NOW, NOW + timedelta(days=1), timedelta(seconds=1)
    made = make_certificate(key, None, not_before=begin, not_after=end)
    found = read_certificate(made)
    for moment in (begin, end, begin - timedelta(seconds=300), end + timedelta(seconds=300)):
        check_binding(found, now=moment)
    unbound(made, "not valid before", now=begin - timedelta(seconds=301))
    unbound(made, "not valid after", now=end + timedelta(seconds=301))
    unbound(made, "not valid before", now=begin - second, skew=0)
    unbound(made, "not valid after", now=end + second, skew=0)
    unbound(make_certificate(key, None, not_before=begin - timedelta(days=9), not_after=begin - timedelta(days=8)), "after")
    far = datetime(2999, 1, 1, tzinfo=UTC)
    unbound(make_certificate(key, None, not_before=far, not_after=far.replace(year=9999)), "before")


def test_life_without_end(key: TlsKey) -> None:
    """99991231235959Z: no certain end (RFC 5280), and no overflow."""
    end = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    check_binding(read_certificate(make_certificate(key, None, not_after=end)))
    check_binding(read_certificate(piecewise(key, validity=asn1.sequence(b"\x17\x0d500101000000Z", b"\x18\x0f99991231235959Z"))))


@pytest.mark.parametrize("hash_id", [1, 7, 8])
def test_pubkey_hash_of_another_key(platform: Platform, key: TlsKey, hash_id: int) -> None:
    """Evidence copied from somebody else's certificate."""
    buffer = buffer_for(platform, key, claims=encode_claims(key.spki, hash_id=hash_id))
    check_binding(read_certificate(make_certificate(key, buffer)))
    unbound(make_certificate(TlsKey.generate(), buffer), "pubkey-hash is the hash of another key")


def test_user_data(platform: Platform, key: TlsKey) -> None:
    claims = encode_claims(key.spki)
    right = report_data_of(claims)
    for wrong in (
        bytes(64),
        changed(right, 0, bytes([right[0] ^ 1])),
        changed(right, 31, bytes([right[31] ^ 0x80])),
        right[:32] + b"\1" + bytes(31),
        right[:63] + b"\1",
        right[:32] * 2,
        bytes(32) + right[:32],
        hashlib.sha256(claims + b"\0").digest() + bytes(32),
    ):
        unbound(make_certificate(key, buffer_for(platform, key, claims=claims, report_data=wrong)), "user data")


def test_claims_changed_after_the_report(platform: Platform, key: TlsKey) -> None:
    claims = encode_claims(key.spki, {"role": b"guest"})
    raw = platform.evidence(report_data=report_data_of(claims)).to_rats_tls()
    check_binding(read_certificate(make_certificate(key, encode_evidence_buffer(raw, claims))))
    other = encode_claims(key.spki, {"role": b"admin"})
    unbound(make_certificate(key, encode_evidence_buffer(raw, other)), "user data")


@pytest.mark.parametrize("kind", KINDS)
def test_signatures(keys: dict[str, TlsKey], kind: str, platform: Platform) -> None:
    key = keys[kind]
    made = make_certificate(key, buffer_for(platform, key))
    check_binding(read_certificate(made))
    for at in (-1, -20, -40):
        spoiled = changed(made, len(made) + at, bytes([made[at] ^ 1]))
        unbound(spoiled, "signature")
    # The last character of the subject's name, and of the issuer's to match it.
    unbound(made.replace(b"RATS-TLS", b"RATS-TLT"), "signature")
    certificate = read_certificate(made)
    for signature in (b"", b"\0", b"\x30\x00", certificate.signature + b"\0", bytes(64), b"\xff" * 384):
        assert not verify_signature(certificate.public_key, signature, certificate.signed)
    assert verify_signature(certificate.public_key, certificate.signature, certificate.signed)
    other = TlsKey.generate(kind) if kind != "rsa3072" else None
    if other is not None:
        forged = asn1.sequence(
            certificate.signed, _algorithm(made), asn1.bit_string(other.sign(certificate.signed))
        )
        unbound(forged, "signature")


def _algorithm(der: bytes) -> bytes:
    outer = asn1.Reader(der, "certificate").sequence("certificate")
    outer.sequence("tbsCertificate")
    start = outer.position
    outer.sequence("algorithm")
    return der[start : outer.position]


@given(st.data())
def test_one_bit_of_a_golden_certificate(data: st.DataObject) -> None:
    """Refused at one step or the other, whichever bit it is."""
    name = data.draw(st.sampled_from(sorted(EXPECTED["certificates"])))
    raw = bytearray((VECTORS / f"{name}.der").read_bytes())
    # Two of three where the certificate's own fields are.
    last = len(raw) - 1
    places = st.one_of(st.integers(0, 400), st.integers(last - 400, last), st.integers(0, last))
    raw[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = read_certificate(raw)
        except FormatError:
            return
        with pytest.raises(AttestedTlsError):
            check_binding(found, now=NOW)


# ---- Keys


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_files(keys: dict[str, TlsKey], kind: str) -> None:
    key = keys[kind]
    assert key.kind == kind
    plain, sealed = key.dump(), key.dump(b"password")
    assert plain.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert sealed.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    for loaded in (TlsKey.load(plain), TlsKey.load(bytearray(sealed), b"password")):
        assert (loaded.kind, loaded.spki) == (kind, key.spki)
        assert verify_signature(read_spki(key.spki), loaded.sign(b"message"), b"message")
    with pytest.raises(AuthenticationError, match="TLS key: wrong password"):
        TlsKey.load(sealed, b"another")
    with pytest.raises(ArgumentError, match="password is needed"):
        TlsKey.load(sealed)
    with pytest.raises(ArgumentError, match="not encrypted"):
        TlsKey.load(plain, b"password")
    with pytest.raises(ArgumentError, match="at least 1 byte"):
        key.dump(b"")


def test_keys_of_other_kinds() -> None:
    for private in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(FormatError):
            TlsKey(private)
    with pytest.raises(FormatError, match="TLS key"):
        TlsKey(ed25519.Ed25519PrivateKey.generate())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="kind 'p384'"):
        TlsKey.generate("p384")
    for junk in (b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(FormatError, match="TLS key"):
            TlsKey.load(junk)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_not_shown_or_copied(keys: dict[str, TlsKey], kind: str) -> None:
    key = keys[kind]
    assert re.fullmatch(rf"<TlsKey {kind}, SHA-256 of its SubjectPublicKeyInfo [0-9a-f]{{64}}>", repr(key))
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(KeyExposureError):
            copied(key)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_a_tls_context(keys: dict[str, TlsKey], kind: str) -> None:
    """Also for SM2, and without the deprecated objects of pyOpenSSL: warnings are errors here."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(x509.load_der_x509_certificate(make_certificate(keys[kind], None)))
    keys[kind].use_in(context)
    context.check_privatekey()
    other = SSL.Context(SSL.TLS_METHOD)
    other.use_certificate(x509.load_der_x509_certificate(make_certificate(TlsKey.generate("p256"), None)))
    with pytest.raises(SSL.Error):  # OpenSSL compares them at once when they are of one kind, and drops the certificate otherwise
        _use_and_check(keys[kind], other)


def _use_and_check(key: TlsKey, context: SSL.Context) -> None:
    key.use_in(context)
    context.check_privatekey()
