"""SM2 certificates: the openssl program reads and verifies ours, and we read and verify its."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from attest.simulated_evidence import Platform
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from ratstls.attested import PlatformAttester, buffer_for

from csvfast.crypto import SM2PrivateKey, SM2PublicKey, dump_public_key, signature_from_der, signature_to_der
from csvfast.crypto import der as asn1
from csvfast.errors import AttestedTlsError, FormatError, SignatureError
from csvfast.ratstls.certificate import attest_certificate, check_binding, make_certificate, read_certificate
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.sm2_certificate import SM2_WITH_SM3, sign_sm2_certificate

ID = "distid:1234567812345678"


@pytest.fixture(scope="module")
def key() -> TlsKey:
    return TlsKey.generate("sm2")


def openssl(*arguments: object, data: bytes = b"", ok: bool = True) -> bytes:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    done = subprocess.run([program, *map(str, arguments)], input=data, capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) == ok, done.stderr.decode(errors="replace")
    return done.stdout


def test_shape(key: TlsKey) -> None:
    """RFC 5280's SEQUENCEs with the bytes that OpenSSL writes for SM2 with SM3, spelled out."""
    assert SM2_WITH_SM3.hex() == "300a06082a811ccf55018375"
    assert key.spki.hex().startswith("3059301306072a8648ce3d020106082a811ccf5501822d03420004")
    begin, end = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)
    made = make_certificate(key, b"evidence", not_before=begin, not_after=end)
    assert "a003020102" "020101" "300a06082a811ccf55018375" in made.hex()
    assert b"\x30\x1e\x17\x0d260102030405Z\x17\x0d270102030405Z" in made
    assert bytes.fromhex("301206066781050504090408") + b"evidence" in made
    assert bytes.fromhex("301506066781050504090101ff0408") + b"evidence" in make_certificate(key, b"evidence", critical=True)
    parsed = x509.load_der_x509_certificate(made)
    assert parsed.version is x509.Version.v3
    assert parsed.serial_number == 1
    assert parsed.signature_algorithm_oid.dotted_string == "1.2.156.10197.1.501"
    assert (parsed.not_valid_before_utc, parsed.not_valid_after_utc) == (begin, end)
    oids = [(one.oid.dotted_string, one.critical) for one in parsed.extensions]
    assert oids == [("2.5.29.19", False), ("2.5.29.14", False), ("2.5.29.35", False), ("2.23.133.5.4.9", False)]
    assert parsed.extensions[1].value.digest == parsed.extensions[2].value.key_identifier  # type: ignore[attr-defined]


def test_the_same_as_with_another_key_but_for_key_and_signature(key: TlsKey) -> None:
    """cryptography writes everything between: names, times and extensions come out alike."""
    other = TlsKey.generate("p256")
    begin, end = datetime(1950, 1, 1, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)
    ours, theirs = (make_certificate(one, b"evidence", not_before=begin, not_after=end) for one in (key, other))
    assert _middle(ours) == _middle(theirs)


def _middle(der: bytes) -> list[object]:
    parsed = x509.load_der_x509_certificate(der)
    start = der.index(b"Inclavare Containers")
    times = der[start : der.index(b"Inclavare Containers", start + 1)]
    extensions = [(one.oid, one.critical, len(one.value.public_bytes())) for one in parsed.extensions]
    return [parsed.version, parsed.serial_number, parsed.issuer.public_bytes(), times, parsed.subject.public_bytes(), extensions]


def test_openssl_verifies_ours(key: TlsKey, tmp_path: Path) -> None:
    made = attest_certificate(key, PlatformAttester(Platform()))
    text = openssl("x509", "-inform", "DER", "-noout", "-text", data=made).decode()
    assert "Signature Algorithm: SM2-with-SM3" in text
    assert re.search(r"Issuer: O = Inclavare Containers, CN = RATS-TLS", text)
    assert "2.23.133.5.4.9" in text
    found = read_certificate(made)
    assert isinstance(found.public_key, SM2PublicKey)
    (tmp_path / "public.pem").write_bytes(dump_public_key(found.public_key))
    (tmp_path / "signature").write_bytes(found.signature)
    command = ("dgst", "-sm3", "-verify", tmp_path / "public.pem", "-sigopt", ID, "-signature", tmp_path / "signature")
    assert b"Verified OK" in openssl(*command, data=found.signed)
    openssl(*command, data=found.signed + b"\0", ok=False)


def test_we_verify_openssls(key: TlsKey, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(key.dump())
    command = ("req", "-new", "-x509", "-sm3", "-key", tmp_path / "key.pem", "-subj", "/O=a/CN=b", "-outform", "DER")
    made = openssl(*command, "-sigopt", ID)
    found = read_certificate(made)
    check_binding(found)
    assert (found.key_kind, found.spki, found.evidence) == ("sm2", key.spki, None)
    other = read_certificate(openssl(*command, "-sigopt", "distid:somebody"))
    with pytest.raises(AttestedTlsError, match="signature"):
        check_binding(other)


def test_the_signature_covers_the_user_id(key: TlsKey) -> None:
    found = read_certificate(make_certificate(key, None))
    public, raw = found.public_key, signature_from_der(found.signature)
    assert isinstance(public, SM2PublicKey)
    public.verify(raw, found.signed, user_id=b"1234567812345678")
    with pytest.raises(SignatureError):
        public.verify(raw, found.signed, user_id=b"")


def test_algorithm_with_parameters(key: TlsKey) -> None:
    """NULL behind the algorithm's identifier is another algorithm identifier."""
    made = make_certificate(key, None)
    fields = asn1.Reader(made, "certificate").sequence("certificate")
    start = fields.position
    fields.sequence("tbsCertificate")
    other = asn1.sequence(asn1.object_identifier("1.2.156.10197.1.501"), asn1.null())
    signed = made[start : fields.position]
    body = signed[4:] if signed[1] == 0x82 else signed[3:]
    changed = asn1.sequence(body.replace(SM2_WITH_SM3, other))
    both = asn1.sequence(changed, other, asn1.bit_string(key.sign(changed)))
    with pytest.raises(FormatError, match="signatureAlgorithm"):
        read_certificate(both)
    with pytest.raises(FormatError, match="signature at"):
        read_certificate(asn1.sequence(signed, other, asn1.bit_string(key.sign(signed))))


def test_signature_out_of_range(key: TlsKey) -> None:
    found = read_certificate(make_certificate(key, buffer_for(Platform(), key)))
    for raw in (bytes(64), b"\xff" * 64, bytes(32) + b"\1" * 32, b"\1" * 32 + bytes(32)):
        forged = asn1.sequence(found.signed, SM2_WITH_SM3, asn1.bit_string(signature_to_der(raw)))
        with pytest.raises(AttestedTlsError, match="signature"):
            check_binding(read_certificate(forged))


def test_extensions_in_the_order_given(key: TlsKey) -> None:
    private = key.private
    assert isinstance(private, SM2PrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "名")])
    extensions = [(x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.{index}"), b"x" * index), True) for index in (300, 3)]
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    made = sign_sm2_certificate(private, name, moment, moment, extensions)
    parsed = x509.load_der_x509_certificate(made)
    assert [one.value.public_bytes() for one in parsed.extensions] == [b"x" * 300, b"x" * 3]
    assert parsed.subject == parsed.issuer == name
    assert parsed.public_bytes(Encoding.DER) == made
