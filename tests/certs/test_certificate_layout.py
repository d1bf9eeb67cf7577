"""The two certificate formats: every field where the specification puts it, and what parsing refuses."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.certs import (
    CA_BYTES,
    CSV_BYTES,
    HYGON_ROOT_FINGERPRINT,
    CaCertificate,
    CsvCertificate,
    KeyAlgorithm,
    KeyUsage,
    SignatureSlot,
    fingerprint,
    hygon_root,
    parse_bundle,
    roots,
    verify_root,
)
from csvfast.certs.chain import _verified_root
from csvfast.certs.factory import CA_FIELDS, CSV_FIELDS, ChainFactory, altered, fields_of, raw
from csvfast.certs.fields import from_field, shown, to_field
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import ArgumentError, BufferTypeError, FormatError, InternalError, LengthError, VerificationError

NUMBER = st.binary(min_size=32, max_size=32)
IDENTITY = st.binary(min_size=16, max_size=16)
USER_ID = st.binary(max_size=254)
U32 = st.integers(0, 2**32 - 1)


def test_root_is_the_published_file(hygon_data: Path) -> None:
    published = (hygon_data / "hrk.cert").read_bytes()
    assert hygon_root().encoded == published
    assert hashlib.sha256(published).hexdigest() == "296efa97580464aca0ab5eefe42199ee05862182508d1629f29cf4dc175b10cd"


def test_root_has_the_pinned_fingerprint_and_signs_itself() -> None:
    _verified_root.cache_clear()  # or another object with the same bytes may be the one that was prepared
    root = hygon_root()
    assert root is hygon_root()
    assert fingerprint(root) == HYGON_ROOT_FINGERPRINT
    assert fingerprint(root) == "f5a46663059fdb4cdd06d097ed21782142923bb3430b3b938f23d54292094e3a"
    verify_root(root)
    assert root.public_key.prepared
    assert (root.key_usage, root.curve_id, root.version, root.user_id) == (KeyUsage.HRK, 3, 1, b"HYGON-SSD-HRK")
    assert root.key_id == root.certifying_id == bytes.fromhex("3ae86a9701355cce333a589de21583d7")


def test_damaged_root_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "_S", "8e4321de8e79d346b5c9a1c6492554ab81d523f351a3567c852bbb4fe36bd751")
    hygon_root.cache_clear()
    try:
        with pytest.raises(InternalError, match="fingerprint"):
            hygon_root()
    finally:
        monkeypatch.undo()
        hygon_root.cache_clear()
    assert fingerprint(hygon_root()) == HYGON_ROOT_FINGERPRINT


def test_real_pek_reads_as_published(real_evidence: bytes) -> None:
    record = json.loads(real_evidence)
    page = bytes(record["attestation_report"]["data"])
    pek = CsvCertificate.parse(page[0x150 : 0x150 + CSV_BYTES])
    shape = record["cert_chain"]["pek"]
    key = shape["body"]["data"]["pubkey"]["key"]
    assert pek.point == bytes(key["x"][:32])[::-1] + bytes(key["y"][:32])[::-1]
    assert (pek.usage, pek.version, pek.api_major, pek.api_minor) == (KeyUsage.PEK, 1, 1, 3)
    assert pek.user_id == b"HYGON-SSD-PEK"
    assert pek.issuer_id == bytes(16)
    assert not any(content.strip(b"\0") for _, _, content in pek.reserved)
    assert [(slot.usage, slot.algorithm) for slot in pek.slots] == [(KeyUsage.CEK, 4), (KeyUsage.OCA, 4)]
    for slot, published in zip(pek.slots, shape["sigs"], strict=True):
        number = published["signature"]
        assert slot.signature == bytes(number["r"][:32])[::-1] + bytes(number["s"][:32])[::-1]
    assert pek.public_key.point == pek.point


def test_fields_stand_where_the_tables_say(factory: ChainFactory) -> None:
    # The factory's tables and the parsers were written apart from each other.
    for encoded in factory.encodings.values():
        table = fields_of(encoded)
        assert sum(size for _, size in table.values()) == len(encoded)
        stop = 0
        for offset, size in table.values():
            assert offset == stop
            stop = offset + size
    assert sum(size for _, size in CA_FIELDS.values()) == CA_BYTES
    assert sum(size for _, size in CSV_FIELDS.values()) == CSV_BYTES


@given(USER_ID, IDENTITY, IDENTITY, NUMBER, NUMBER, NUMBER, NUMBER, U32, U32)
def test_ca_certificate_round_trip(
    user_id: bytes, key_id: bytes, issuer: bytes, x: bytes, y: bytes, r: bytes, s: bytes, usage: int, version: int
) -> None:
    certificate = CaCertificate.build(
        key_usage=usage, key_id=key_id, certifying_id=issuer, point=x + y, user_id=user_id, version=version, signature=r + s
    )
    assert len(certificate.encoded) == CA_BYTES
    again = CaCertificate.parse(bytearray(certificate.encoded))
    assert again == certificate
    assert hash(again) == hash(certificate)
    assert (again.key_usage, again.version, again.key_id, again.certifying_id) == (usage, version, key_id, issuer)
    assert (again.point, again.user_id, again.signature, again.curve_id) == (x + y, user_id, r + s, 3)
    assert again.body == again.encoded[:576]
    plain = altered(
        bytes(CA_BYTES), version=version, key_id=key_id, certifying_id=issuer, key_usage=usage, curve_id=3, x=x, y=y,
        uid_len=len(user_id), uid=user_id, r=r, s=s,
    )  # fmt: skip
    assert plain == certificate.encoded


@given(USER_ID, IDENTITY, NUMBER, NUMBER, NUMBER, NUMBER, U32, st.integers(0, 255), st.integers(0, 255))
def test_csv_certificate_round_trip(
    user_id: bytes, issuer: bytes, x: bytes, y: bytes, r: bytes, s: bytes, usage: int, major: int, minor: int
) -> None:
    built = CsvCertificate.build(
        usage=usage, algorithm=KeyAlgorithm.SM2_DH, point=x + y, user_id=user_id, api=(major, minor), issuer_id=issuer
    )
    assert all(slot.is_empty for slot in built.slots)
    certificate = built.with_slot(1, SignatureSlot(KeyUsage.CEK, 4, r + s)).with_slot(2, SignatureSlot(KeyUsage.OCA, 4, s + r))
    again = CsvCertificate.parse(memoryview(certificate.encoded))
    assert again == certificate
    assert again != built
    assert (again.usage, again.algorithm, again.issuer_id) == (usage, KeyAlgorithm.SM2_DH, issuer)
    assert (again.api_major, again.api_minor, again.user_id, again.point) == (major, minor, user_id, x + y)
    assert again.slots == (SignatureSlot(KeyUsage.CEK, 4, r + s), SignatureSlot(KeyUsage.OCA, 4, s + r))
    assert again.body == again.encoded[:1044] == built.body
    plain = altered(
        bytes(CSV_BYTES), version=1, api_major=major, api_minor=minor, usage=usage, algorithm=5, curve_id=3, x=x, y=y,
        uid_len=len(user_id), uid=user_id, issuer_id=issuer, slot1_usage=0x1004, slot1_algorithm=4, slot1_r=r, slot1_s=s,
        slot2_usage=0x1001, slot2_algorithm=4, slot2_r=s, slot2_s=r,
    )  # fmt: skip
    assert plain == certificate.encoded
    assert again.with_empty_slot(2).with_empty_slot(1) == built


@given(NUMBER)
def test_number_fields(value: bytes) -> None:
    field = to_field(value)
    assert int.from_bytes(field, "little") == int.from_bytes(value, "big")
    assert from_field(field, "s", "f", 0) == value


@pytest.mark.parametrize("place", [32, 40, 71])
def test_number_field_that_spills_over(place: int) -> None:
    field = raw(to_field(bytes(32)), place, b"\x80")
    with pytest.raises(FormatError, match="0x80") as caught:
        from_field(field, "S", "F", 1000)
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("S", "F", 1000 + place)


def test_number_field_lengths() -> None:
    with pytest.raises(LengthError):
        to_field(bytes(31))
    with pytest.raises(FormatError, match="71 bytes"):
        from_field(bytes(71), "S", "F", 0)


@pytest.mark.parametrize("role", ["HRK", "HSK", "CEK", "OCA", "PEK", "PDH"])
def test_spilling_numbers_are_named(factory: ChainFactory, role: str) -> None:
    encoded = factory.encodings[role]
    kind = CaCertificate if len(encoded) == CA_BYTES else CsvCertificate
    checked = 0
    for name, (offset, size) in fields_of(encoded).items():
        if size != 72:
            continue
        is_empty = role in ("CEK", "OCA", "PDH") and name.startswith("slot2")
        for place in range(32, 72):
            data = raw(encoded, offset + place, b"\x01")
            if is_empty:
                kind.parse(data)
                continue
            with pytest.raises(FormatError) as caught:
                kind.parse(data)
            assert caught.value.offset == offset + place
            assert caught.value.field.lower().removeprefix("q").replace("slot ", "slot").replace(" ", "_") == name
            checked += 1
    assert checked >= 160


@pytest.mark.parametrize("length", [0, 1, 831, 833, 2083, 2085, 100_000])
def test_lengths(length: int) -> None:
    for kind in (CaCertificate, CsvCertificate):
        with pytest.raises(FormatError, match=f"{length} bytes"):
            kind.parse(bytes(length))


def test_an_empty_slot_does_not_cover_for_the_other(factory: ChainFactory) -> None:
    pek = CsvCertificate.parse(factory.encodings["PEK"])
    for empty, other in ((1, 2), (2, 1)):
        encoded = pek.with_empty_slot(empty).encoded
        for number in ("r", "s"):
            offset = CSV_FIELDS[f"slot{other}_{number}"][0] + 32
            with pytest.raises(FormatError, match=f"slot {other} {number}"):
                CsvCertificate.parse(raw(encoded, offset, b"\1"))
            CsvCertificate.parse(raw(encoded, CSV_FIELDS[f"slot{empty}_{number}"][0] + 32, b"\1"))


def test_user_id_length_field(factory: ChainFactory) -> None:
    for role, kind in (("HSK", CaCertificate), ("PEK", CsvCertificate)):
        assert kind.parse(altered(factory.encodings[role], uid_len=254)).user_id[13:] == bytes(241)
        for length in (255, 256, 65535):
            with pytest.raises(FormatError, match="0 to 254") as caught:
                kind.parse(altered(factory.encodings[role], uid_len=length))
            assert caught.value.offset == fields_of(factory.encodings[role])["uid_len"][0]


@pytest.mark.parametrize("value", ["text", 5, 832, None, object(), [0] * 832, (0,) * 2084, iter(bytes(832))])
def test_what_is_no_buffer(value: object) -> None:
    for read in (CaCertificate.parse, CsvCertificate.parse, parse_bundle):
        with pytest.raises(BufferTypeError, match=f"{type(value).__name__}; expected a bytes-like object"):
            read(value)  # type: ignore[operator]


def test_builders_refuse_what_does_not_fit(factory: ChainFactory) -> None:
    point = factory.keys["CEK"].public_key.point
    with pytest.raises(LengthError, match="user_id"):
        CsvCertificate.build(usage=1, algorithm=4, point=point, user_id=bytes(255))
    with pytest.raises(LengthError, match="point"):
        CsvCertificate.build(usage=1, algorithm=4, point=point[:-1], user_id=b"")
    with pytest.raises(LengthError, match="issuer_id"):
        CsvCertificate.build(usage=1, algorithm=4, point=point, user_id=b"", issuer_id=b"x")
    with pytest.raises(LengthError, match="key_id"):
        CaCertificate.build(key_usage=0, key_id=b"", certifying_id=bytes(16), point=point, user_id=b"")
    certificate = CsvCertificate.build(usage=1, algorithm=4, point=point, user_id=b"")
    for slot in (0, 3, -1):
        with pytest.raises(ArgumentError, match="slot"):
            certificate.with_empty_slot(slot)


def test_signing_uses_the_signers_user_id(factory: ChainFactory) -> None:
    key = SM2PrivateKey.generate()
    signed = CsvCertificate.parse(factory.encodings["PDH"]).with_signature(1, key, KeyUsage.PEK, b"somebody")
    assert signed.slots[0][:2] == (KeyUsage.PEK, KeyAlgorithm.SM2_SA)
    key.public_key.verify(signed.slots[0].signature, signed.body, user_id=b"somebody")
    root = hygon_root().with_signature(key, b"another")
    assert root.body == hygon_root().body
    assert root.encoded[720:] == bytes(112)
    key.public_key.verify(root.signature, root.encoded[:576], user_id=b"another")


def test_point_off_the_curve_is_found_when_the_key_is_asked_for(factory: ChainFactory) -> None:
    certificate = CsvCertificate.parse(altered(factory.encodings["CEK"], x=bytes(31) + b"\1", y=bytes(31) + b"\1"))
    for _ in range(2):
        with pytest.raises(FormatError, match="curve") as caught:
            _ = certificate.public_key
        assert caught.value.offset == 20


def test_public_key_is_one_object(factory: ChainFactory) -> None:
    certificate = CsvCertificate.parse(factory.encodings["CEK"])
    assert certificate.public_key is certificate.public_key


def test_texts_hold_no_control_characters(factory: ChainFactory) -> None:
    certificate = CsvCertificate.parse(altered(factory.encodings["CEK"], uid=b"\x1b[31m\n", uid_len=6, usage=0x1234))
    assert repr(certificate).isprintable()
    assert "0x1234" in repr(certificate)
    assert shown(b"") == "nothing"
    assert shown(b"abc") == "'abc'"
    assert shown(bytes(40)) == "00" * 32 + "... (40 bytes)"


# ---- Bundles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        ["HSK", "CEK"],
        ["PEK", "OCA", "CEK"],
        ["PDH", "PEK", "OCA", "CEK"],
        ["PDH", "PEK", "OCA", "CEK", "HSK", "HRK"],
        ["HRK", "HSK", "CEK", "PEK"],
        ["HSK", "HRK"],
        ["PDH"],
        ["HRK"],
    ],
)
def test_bundles_by_content(factory: ChainFactory, order: list[str]) -> None:
    bundle = parse_bundle(b"".join(factory.encodings[role] for role in order))
    found = bundle.certificates()
    assert {role: certificate.encoded for role, certificate in found.items()} == {
        role: factory.encodings[role] for role in order
    }
    if {"HSK", "CEK"} <= set(order):
        assert bundle.chain().cek.encoded == factory.encodings["CEK"]
    else:
        with pytest.raises(VerificationError, match="missing"):
            bundle.chain()


def test_bundle_refusals(factory: ChainFactory) -> None:
    hsk, cek = factory.encodings["HSK"], factory.encodings["CEK"]
    for data, words in (
        (b"", "0 bytes"),
        (bytes(10_001), "10001 bytes"),
        (hsk + cek + hsk, "a second one"),
        (hsk + cek[:-1], "2083 bytes that are left"),
        (hsk[:-1], "831 bytes that are left"),
        (bytes(2084), "found 0x00000000"),
        (hsk + bytes(7), "7 bytes that are left"),
    ):
        with pytest.raises(FormatError, match=words):
            parse_bundle(data)


def test_merging(factory: ChainFactory) -> None:
    first = parse_bundle(factory.encodings["HSK"] + factory.encodings["CEK"])
    both = first.merged(parse_bundle(factory.encodings["CEK"] + factory.encodings["PEK"]))
    assert list(both.certificates()) == ["HSK", "CEK", "PEK"]
    with pytest.raises(FormatError, match="two different"):
        both.merged(parse_bundle(ChainFactory().encodings["CEK"]))


# ---- Hostile bytes --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=4096))
def test_any_bytes(data: bytes) -> None:
    for read in (parse_bundle, CaCertificate.parse, CsvCertificate.parse):
        message = ""
        try:
            read(data)  # type: ignore[operator]
        except FormatError as error:
            message = str(error)
        assert message.isprintable()


def test_mutated_certificates_parse_or_are_refused(factory: ChainFactory) -> None:
    source = random.Random(20260103)
    bases = [*factory.encodings.values(), factory.encodings["HSK"] + factory.encodings["CEK"]]
    parsed = refused = 0
    for _ in range(20_000):
        data = bytearray(source.choice(bases))
        for _ in range(source.choice((1, 1, 2, 8, 64))):
            data[source.randrange(len(data))] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
        if source.random() < 0.1:
            del data[source.randrange(len(data)) :]
        try:
            for certificate in parse_bundle(data).certificates().values():
                assert bytes(certificate) in bytes(data)
                assert repr(certificate).isprintable()
            parsed += 1
        except FormatError:
            refused += 1
    assert parsed > 1000
    assert refused > 1000
