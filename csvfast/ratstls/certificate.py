"""Certificates with evidence inside: made, read, and held against the key that they are shown with.

    version, serial          v3, 1
    issuer = subject         O=Inclavare Containers, CN=RATS-TLS
    validity                 one hour ago .. in 365 days
    key, signature           see csvfast.ratstls.keys; signed by the key itself
    basicConstraints         CA:FALSE
    subjectKeyIdentifier     SHA-1 of the public key's bits
    authorityKeyIdentifier   the same
    2.23.133.5.4.9           the evidence buffer (csvfast.ratstls.claims); not critical, because OpenSSL knows no such extension

CSV's raw evidence has two layouts with the same tag and the same 7016 bytes: a report V1 in its page, then either HSK || CEK and
their length as LE32 (rats-tls), or the length and then the certificates (librats). Exactly one of them must hold.

Three steps, none of which stands for another:

    read_certificate    is it in form? Nothing is believed yet
    check_binding       is this evidence about this key, and the certificate of this time? Whose evidence it is stays open
    csvfast.attest      is the evidence genuine, and is it what is allowed?

Sources: inclavare-containers/rats-tls src/core/rtls_core_generate_certificate.c, src/crypto_wrappers/openssl/gen_cert.c,
src/tls_wrappers/api/tls_wrapper_verify_certificate_extension.c, src/{attesters,verifiers}/csv; inclavare-containers/librats
crypto_wrappers/openssl, attesters/csv; CCC-Attestation/interoperable-ra-tls docs; RFC 5280.
Thread-safety: functions without state, immutable objects.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from csvfast._core import SM2PrivateKey
from csvfast.certs.layout import KeyUsage
from csvfast.crypto import der as asn1
from csvfast.errors import ArgumentError, AttestedTlsError, FormatError, VerificationError
from csvfast.ratstls.claims import (
    CSV_TAG,
    TAGS,
    Claims,
    EvidenceBuffer,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
    spki_hash,
)
from csvfast.ratstls.keys import PublicKey, TlsKey, kind_of, read_spki, verify_signature
from csvfast.ratstls.sm2_certificate import SM2_WITH_SM3, sign_sm2_certificate
from csvfast.report._input import as_bytes
from csvfast.report.evidence import HSK_CEK_BYTES, Evidence
from csvfast.report.layout import Report
from csvfast.report.request import REPORT_PAGE

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.ratstls.attester import Attester

__all__ = [
    "CERTIFICATE_LIMIT",
    "CSV_EVIDENCE_BYTES",
    "ENDORSEMENTS_OID",
    "EVIDENCE_OID",
    "SKEW",
    "AttestedCertificate",
    "Layout",
    "attest_certificate",
    "check_binding",
    "check_validity",
    "make_certificate",
    "raw_evidence",
    "read_certificate",
    "read_raw_evidence",
]

Layout = Literal["rats-tls", "librats"]

EVIDENCE_OID: Final = "2.23.133.5.4.9"
ENDORSEMENTS_OID: Final = "2.23.133.5.4.2"
CERTIFICATE_LIMIT: Final = 32768  # bytes; one with CSV evidence has about 7,500
CSV_EVIDENCE_BYTES: Final = REPORT_PAGE + HSK_CEK_BYTES + 4  # 7016
SKEW: Final = 300.0  # seconds that two clocks may differ

_STRUCTURE: Final = "certificate"
_EVIDENCE: Final = "CSV evidence"
_LEGACY_OIDS: Final = "1.2.840.113741.1337."
_SUBJECT: Final = (("O", "Inclavare Containers"), ("CN", "RATS-TLS"))
_NAMES: Final = {
    "C": NameOID.COUNTRY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}
_ECDSA_WITH_SHA256: Final = asn1.sequence(asn1.object_identifier("1.2.840.10045.4.3.2"))
_RSA_WITH_SHA256: Final = asn1.sequence(asn1.object_identifier("1.2.840.113549.1.1.11"), asn1.null())
# Those that mean nothing to the evidence. Of others, a critical one says: refuse me unless you know me.
_OTHER_EXTENSIONS: Final = 2048  # bytes of all but the evidence; reading them can cost a stranger's reader 2 microseconds each
_HARMLESS: Final = frozenset(
    (
        "2.5.29.14",  # subjectKeyIdentifier
        "2.5.29.15",  # keyUsage
        "2.5.29.17",  # subjectAltName
        "2.5.29.19",  # basicConstraints
        "2.5.29.35",  # authorityKeyIdentifier
        "2.5.29.37",  # extendedKeyUsage
    )
)
_CERTIFICATES_LENGTH: Final = HSK_CEK_BYTES.to_bytes(4, "little")
_HSK_VERSION: Final = (1).to_bytes(4, "little")
_HSK_USAGE: Final = int(KeyUsage.HSK).to_bytes(4, "little")
_NO_CLAIMS: Final[Mapping[str, bytes]] = {}


@dataclass(frozen=True, slots=True, repr=False)
class AttestedCertificate:
    """What read_certificate() found. Nothing of it is genuine because it is here.

    Attributes:
        der: the certificate. spki: its SubjectPublicKeyInfo in DER; spki_sha256: SHA-256 of that, 32 bytes.
        key_kind: "p256", "sm2" or "rsa" with the number of bits.
        not_valid_before, not_valid_after: UTC, with time zone.
        buffer, claims, evidence: of the evidence extension; all three None in a certificate without one. `evidence.encoding` is
            the layout in which it came.
    Two are equal when their bytes are.
    """

    der: bytes
    spki: bytes = field(compare=False)
    spki_sha256: bytes = field(compare=False)
    key_kind: str = field(compare=False)
    not_valid_before: datetime = field(compare=False)
    not_valid_after: datetime = field(compare=False)
    buffer: EvidenceBuffer | None = field(compare=False)
    claims: Claims | None = field(compare=False)
    evidence: Evidence | None = field(compare=False)
    public_key: PublicKey = field(compare=False)
    signed: bytes = field(compare=False)
    signature: bytes = field(compare=False)

    def __repr__(self) -> str:
        inside = "no evidence" if self.evidence is None else f"{self.evidence.encoding} evidence"
        return f"<AttestedCertificate {self.key_kind}, {self.spki_sha256.hex()}, {inside}>"


def read_certificate(der: BytesLike, *, limit: int = CERTIFICATE_LIMIT) -> AttestedCertificate:
    """Reads a certificate of an attested TLS peer, with or without evidence.

    In: limit   bytes it may have
    FormatError: whatever is not in form. Among others: a key or signature algorithm outside csvfast.ratstls.keys, issuer and
    subject differ, two evidence extensions, evidence of another kind than CSV, neither or both of the layouts hold,
    endorsements, evidence in the extensions from before Interoperable RA-TLS, unknown critical extensions. Whether the evidence
    extension is critical does not matter.
    """
    raw = as_bytes(der, _STRUCTURE)
    if len(raw) > limit:
        raise FormatError(_STRUCTURE, "length", None, f"{len(raw)} bytes", f"at most {limit}")
    outer = asn1.Reader(raw, _STRUCTURE)
    certificate = outer.sequence(_STRUCTURE)
    outer.finish(_STRUCTURE)
    start = certificate.position
    fields = certificate.sequence("tbsCertificate")
    end = certificate.position
    signed = raw[start:end]
    algorithm = _sequence(raw, certificate, "signatureAlgorithm")
    signature, _ = certificate.bit_string("signature")
    certificate.finish("signature")
    spki = _read_fields(raw, fields, algorithm)
    public_key = read_spki(spki)
    kind = kind_of(public_key)
    expected = _ALGORITHMS[kind[:3]]
    if algorithm != expected[0]:
        raise FormatError(_STRUCTURE, "signatureAlgorithm", end, f"another algorithm beside a key {kind}", expected[1])
    try:
        parsed = x509.load_der_x509_certificate(raw)
        extensions = parsed.extensions
        not_before, not_after = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    except x509.DuplicateExtension as problem:
        oid = problem.oid.dotted_string
        raise FormatError(_STRUCTURE, f"extension {oid}", None, "more than one", "one") from None
    except Exception:  # ValueError and a dozen classes without a common base but this
        raise FormatError(_STRUCTURE, "content", None, "what no reader of X.509 accepts", "RFC 5280") from None
    buffer = _evidence_buffer(extensions)
    claims = evidence = None
    if buffer is not None:
        claims, evidence = decode_claims(buffer.claims), read_raw_evidence(buffer.raw)
    digest = hashlib.sha256(spki).digest()
    return AttestedCertificate(
        raw, spki, digest, kind, not_before, not_after, buffer, claims, evidence, public_key, signed, bytes(signature)
    )


_ALGORITHMS: Final = {
    "p25": (_ECDSA_WITH_SHA256, "ecdsa-with-SHA256"),
    "rsa": (_RSA_WITH_SHA256, "sha256WithRSAEncryption"),
    "sm2": (SM2_WITH_SM3, "SM2 with SM3 (1.2.156.10197.1.501, no parameters)"),
}


def _sequence(raw: bytes, reader: asn1.Reader, name: str) -> bytes:
    start = reader.position
    reader.sequence(name)
    return raw[start : reader.position]


def _read_fields(raw: bytes, fields: asn1.Reader, algorithm: bytes) -> bytes:
    """The fields of a TBSCertificate that a self-signed one must have; returns its SubjectPublicKeyInfo."""
    offset = fields.position
    if fields.next_tag() != 0xA0:
        raise FormatError(_STRUCTURE, "version", offset, "none, which is v1", "v3")
    version = fields.context(0, "version")
    number = version.small("version")
    version.finish("version")
    if number != 2:
        raise FormatError(_STRUCTURE, "version", offset, f"v{number + 1}", "v3")
    offset = fields.position
    if not any(fields.unsigned("serialNumber", 20)):
        raise FormatError(_STRUCTURE, "serialNumber", offset, "0", "a positive number")
    offset = fields.position
    if _sequence(raw, fields, "signature") != algorithm:
        raise FormatError(_STRUCTURE, "signature", offset, "an algorithm", "the one of signatureAlgorithm")
    issuer = _sequence(raw, fields, "issuer")
    fields.sequence("validity")
    offset = fields.position
    if _sequence(raw, fields, "subject") != issuer:
        raise FormatError(_STRUCTURE, "subject", offset, "another name than the issuer's", "the same: it is self-signed")
    spki = _sequence(raw, fields, "subjectPublicKeyInfo")
    _check_extensions(fields)
    return spki


def _check_extensions(fields: asn1.Reader) -> None:
    """How long they are, before anybody looks into them."""
    if fields.next_tag() is None:
        return
    extensions = fields.context(3, "extensions").sequence("extensions")
    others = 0
    while extensions.next_tag() is not None:
        start = extensions.position
        oid, _ = extensions.sequence("extension").object_identifier("extension")
        if oid != EVIDENCE_OID:
            others += extensions.position - start
        if others > _OTHER_EXTENSIONS:
            expected = f"at most {_OTHER_EXTENSIONS} beside the evidence"
            raise FormatError(_STRUCTURE, "extensions", start, f"{others} bytes and perhaps more", expected)


def _evidence_buffer(extensions: x509.Extensions) -> EvidenceBuffer | None:
    buffer = None
    for extension in extensions:
        oid = extension.oid.dotted_string
        if oid == EVIDENCE_OID:
            buffer = decode_evidence_buffer(extension.value.public_bytes())
        elif oid == ENDORSEMENTS_OID:
            raise FormatError(_STRUCTURE, f"extension {oid}", None, "endorsements", "none: CSV evidence has none")
        elif oid.startswith(_LEGACY_OIDS):
            found = "evidence as it was carried before Interoperable RA-TLS"
            raise FormatError(_STRUCTURE, f"extension {oid}", None, found, f"evidence in {EVIDENCE_OID}")
        elif extension.critical and oid not in _HARMLESS:
            raise FormatError(_STRUCTURE, f"extension {oid}", None, "unknown and critical", "one that is known")
    if buffer is not None and buffer.tag != CSV_TAG:
        raise FormatError("evidence buffer", "tag", 0, f"{buffer.tag} ({TAGS[buffer.tag]})", f"{CSV_TAG} (Hygon CSV)")
    return buffer


def read_raw_evidence(raw: bytes) -> Evidence:
    """CSV's raw evidence in the layout that holds: `encoding` says which. FormatError: not exactly one of the two does."""
    if len(raw) != CSV_EVIDENCE_BYTES:
        expected = f"{CSV_EVIDENCE_BYTES}: a report's page, HSK and CEK, the length of both"
        raise FormatError(_EVIDENCE, "length", None, f"{len(raw)} bytes", expected)
    rats_tls = raw[-4:] == _CERTIFICATES_LENGTH and _is_hsk(raw, REPORT_PAGE)
    librats = raw[REPORT_PAGE : REPORT_PAGE + 4] == _CERTIFICATES_LENGTH and _is_hsk(raw, REPORT_PAGE + 4)
    if rats_tls == librats:  # both cannot be, since they want other words at 4096; nothing is left to that
        found = "both layouts" if rats_tls else "neither layout"
        expected = f"length {HSK_CEK_BYTES} and an HSK, either as rats-tls or as librats has them"
        raise FormatError(_EVIDENCE, "certificates", REPORT_PAGE, found, expected)
    report = Report.parse(raw[:REPORT_PAGE], 1)
    if rats_tls:
        return Evidence(report, hsk_cek=raw[REPORT_PAGE:-4], encoding="rats-tls")
    return Evidence(report, hsk_cek=raw[REPORT_PAGE + 4 :], encoding="librats")


def _is_hsk(raw: bytes, at: int) -> bool:
    return raw[at : at + 4] == _HSK_VERSION and raw[at + 36 : at + 40] == _HSK_USAGE


def check_binding(certificate: AttestedCertificate, *, now: datetime | None = None, skew: float = SKEW) -> None:
    """Is this evidence about this certificate's key, and is the certificate whole and of this time?

    In order, the cheap ones first: validity, pubkey-hash against the key, the report's user data against the claims,
    self-signature. Without evidence only validity and self-signature can be checked. Whether the report is genuine is for
    csvfast.attest to say.

    In: now    with time zone; None = now
        skew   seconds by which the peer's clock may be off
    AttestedTlsError (stage "binding"): the first check that fails.
    """
    check_validity(certificate, now=now, skew=skew)
    claims, evidence = certificate.claims, certificate.evidence
    if claims is not None or evidence is not None:
        if claims is None or evidence is None:
            raise _refusal("evidence without claims, or claims without evidence; expected both")
        if not hmac.compare_digest(claims.pubkey_hash, spki_hash(certificate.spki, claims.hash_id)):
            raise _refusal("pubkey-hash is the hash of another key; expected that of the certificate's")
        if not hmac.compare_digest(evidence.report.report_data, report_data_of(claims.encoded)):
            raise _refusal("the report's user data is not SHA-256 of the claims followed by 32 zero bytes")
    if not verify_signature(certificate.public_key, certificate.signature, certificate.signed):
        raise _refusal("the certificate's signature is not that of its own key")


def check_validity(certificate: AttestedCertificate, *, now: datetime | None = None, skew: float = SKEW) -> None:
    """The one part of `check_binding` whose answer changes with time."""
    moment, margin = now or datetime.now(UTC), timedelta(seconds=skew)
    if moment + margin < certificate.not_valid_before:
        raise _refusal(f"not valid before {certificate.not_valid_before:%Y-%m-%d %H:%M:%S} UTC; it is {moment:%Y-%m-%d %H:%M:%S}")
    if moment - margin > certificate.not_valid_after:
        raise _refusal(f"not valid after {certificate.not_valid_after:%Y-%m-%d %H:%M:%S} UTC; it is {moment:%Y-%m-%d %H:%M:%S}")


def _refusal(message: str) -> AttestedTlsError:
    return AttestedTlsError("binding", message)


def make_certificate(
    key: TlsKey,
    evidence: BytesLike | None,
    *,
    subject: Sequence[tuple[str, str]] = _SUBJECT,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    critical: bool = False,
) -> bytes:
    """A self-signed certificate in DER, as the module describes it.

    In: evidence               an evidence buffer; None = a certificate without evidence
        subject                C, O, OU and CN with their values, in the order in which they are written
        not_before, not_after  with time zone; None = an hour ago, 365 days from now. Fractions of a second are dropped
        critical               marks the evidence critical, which OpenSSL's peers refuse; for tests of peers
    ArgumentError: a name, or times in the wrong order.
    """
    now = datetime.now(UTC)
    begin, end = _whole(not_before or now - timedelta(hours=1)), _whole(not_after or now + timedelta(days=365))
    if end < begin:
        raise ArgumentError(f"not_after {end}: expected not before not_before {begin}")
    name = _name(subject)
    identifier = _key_identifier(key)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), False),
        (identifier, False),
        (x509.AuthorityKeyIdentifier(identifier.digest, None, None), False),
    ]
    if evidence is not None:
        content = as_bytes(evidence, "evidence")
        extensions.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(EVIDENCE_OID), content), critical))
    private = key.private
    if isinstance(private, SM2PrivateKey):
        return sign_sm2_certificate(private, name, begin, end, extensions)
    builder = x509.CertificateBuilder(name, name, private.public_key(), 1, begin, end)
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return builder.sign(private, SHA256()).public_bytes(Encoding.DER)


def _whole(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ArgumentError(f"time {moment}: expected one with a time zone")
    return moment.astimezone(UTC).replace(microsecond=0)


def _name(subject: Sequence[tuple[str, str]]) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(_NAMES[kind], value) for kind, value in subject])
    except (KeyError, ValueError) as problem:
        raise ArgumentError(f"subject: {problem}; expected {', '.join(_NAMES)} with text as X.509 allows it") from None


def _key_identifier(key: TlsKey) -> x509.SubjectKeyIdentifier:
    # RFC 5280 section 4.2.1.2 (1): SHA-1 over the bits of the key; an identifier, nothing rests on it.
    reader = asn1.Reader(key.spki, "SubjectPublicKeyInfo").sequence("SubjectPublicKeyInfo")
    reader.sequence("algorithm")
    bits, _ = reader.bit_string("subjectPublicKey")
    return x509.SubjectKeyIdentifier(hashlib.sha1(bits, usedforsecurity=False).digest())


def raw_evidence(evidence: Evidence, layout: Layout = "rats-tls") -> bytes:
    """CSV's raw evidence, 7016 bytes. ArgumentError: a report V2, no HSK and CEK beside it, another layout."""
    if layout not in ("rats-tls", "librats"):
        raise ArgumentError(f"layout {layout!r}: expected 'rats-tls' or 'librats'")
    if evidence.hsk_cek is None:
        found = f"no HSK and CEK of chip {evidence.serial_number} beside the report"
        raise ArgumentError(f"{layout} evidence: {found}; expected them, because peers look nowhere else")
    return evidence.to_rats_tls() if layout == "rats-tls" else evidence.to_librats()


def attest_certificate(
    key: TlsKey,
    attester: Attester,
    *,
    custom: Mapping[str, BytesLike] = _NO_CLAIMS,
    layout: Layout = "rats-tls",
    subject: Sequence[tuple[str, str]] = _SUBJECT,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> bytes:
    """A certificate in DER with fresh evidence about `key`.

    In: attester   asked once for evidence
        custom     claims beside pubkey-hash
        layout     "rats-tls" for peers that link rats-tls (Verdictd), "librats" for those that link that; nobody negotiates
    Raises ArgumentError; VerificationError: the evidence is not about what was asked for; FormatError: more than peers accept;
    what the attester raises.
    """
    claims = encode_claims(key.spki, custom)
    report_data = report_data_of(claims)
    evidence = attester.evidence(report_data)
    if evidence.report.report_data != report_data:
        raise VerificationError("report data", "the attester's report is about other data")
    buffer = encode_evidence_buffer(raw_evidence(evidence, layout), claims)
    certificate = make_certificate(key, buffer, subject=subject, not_before=not_before, not_after=not_after)
    return read_certificate(certificate).der
