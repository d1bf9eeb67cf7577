"""Chains: genuine ones pass, every single thing wrong is refused with the step at fault."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from csvfast.certs import (
    CaCertificate,
    CertificateChain,
    CsvCertificate,
    KeyAlgorithm,
    KeyUsage,
    SignatureSlot,
    chain_checks,
    hygon_root,
    verify_certificate,
    verify_chain,
    verify_root,
)
from csvfast.certs.chain import certificate_check
from csvfast.certs.factory import CA_FIELDS, CSV_FIELDS, ChainFactory, altered, fields_of, raw
from csvfast.crypto import SM2PrivateKey, sm2_verify_many
from csvfast.errors import ArgumentError, FormatError, VerificationError

ROLES = ("HRK", "HSK", "CEK", "OCA", "PEK", "PDH")
BOTH = pytest.mark.parametrize("strict", [True, False], ids=["strict", "tolerant"])


@BOTH
def test_genuine_chain(factory: ChainFactory, strict: bool) -> None:
    chain, roots = factory.chain()
    assert verify_chain(chain, roots, strict=strict) == roots[0]
    assert verify_chain(replace(chain, hrk=None), roots, strict=strict) == roots[0]
    assert verify_chain(replace(chain, hrk=None), [hygon_root(), *roots], strict=strict) == roots[0]
    for parts in ({"pdh": None}, {"pdh": None, "oca": None}, {"oca": None}, {"pdh": None, "oca": None, "pek": None}):
        verify_chain(replace(chain, **parts), roots, strict=strict)


@BOTH
def test_simulated_chain_is_refused_under_hygons_root(factory: ChainFactory, strict: bool) -> None:
    chain, _ = factory.chain()
    with pytest.raises(VerificationError, match="not trusted"):
        verify_chain(chain, strict=strict)
    with pytest.raises(VerificationError) as caught:
        verify_chain(replace(chain, hrk=None), strict=strict)
    assert caught.value.step == "HSK"


def test_hsk_that_borrows_hygons_key_id(factory: ChainFactory) -> None:
    chain, _ = factory.chain(factory.wrong("HSK", "certifying_id", hygon_root().key_id))
    with pytest.raises(VerificationError, match="signature by the HRK is not valid") as caught:
        verify_chain(replace(chain, hrk=None))
    assert caught.value.step == "HSK"


def test_tolerant_mode_looks_for_the_root_by_signature(factory: ChainFactory) -> None:
    """Where key ids do not count, neither does the order of the roots."""
    chain, (root,) = factory.chain(factory.wrong("HSK", "certifying_id", hygon_root().key_id))
    chain = replace(chain, hrk=None)
    other = CaCertificate.parse(ChainFactory().encodings["HRK"])
    for roots in ([root], [root, hygon_root()], [hygon_root(), root], [hygon_root(), root, other]):
        assert verify_chain(chain, roots, strict=False) == root
        with pytest.raises(VerificationError):
            verify_chain(chain, roots)
    with pytest.raises(VerificationError, match="the signature by the HRK is not valid"):
        verify_chain(chain, [hygon_root()], strict=False)


@BOTH
def test_an_owner_is_certified_by_nobody_else(factory: ChainFactory, strict: bool) -> None:
    """Another OCA's valid signature makes no OCA, nor another root's a root."""
    other = ChainFactory()
    oca = CsvCertificate.parse(factory.encodings["OCA"]).with_signature(1, other.keys["OCA"], KeyUsage.OCA, b"HYGON-SSD-OCA")
    with pytest.raises(VerificationError, match="OCA: not signed by itself"):
        verify_certificate(oca, CsvCertificate.parse(other.encodings["OCA"]), strict=strict)
    root = CaCertificate.parse(factory.encodings["HRK"]).with_signature(other.keys["HRK"], b"HYGON-SSD-HRK")
    with pytest.raises(VerificationError, match="HRK: not signed by itself"):
        verify_certificate(root, CaCertificate.parse(other.encodings["HRK"]), strict=strict)


def test_steps_that_are_no_roles(factory: ChainFactory) -> None:
    chain, _ = factory.chain()
    for step in ("FOO", "INVALID", "cek"):
        with pytest.raises(ArgumentError, match="expected one of HRK, HSK"):
            verify_certificate(chain.cek, chain.hsk, step=step)


def test_root_that_borrows_hygons_key_id_does_not_shadow_it(factory: ChainFactory) -> None:
    copy = factory.wrong("HRK", "key_id", hygon_root().key_id)
    copy["HRK"] = factory.signed("HRK", altered(copy["HRK"], certifying_id=hygon_root().key_id))
    copy["HSK"] = factory.signed("HSK", altered(copy["HSK"], certifying_id=hygon_root().key_id))
    chain, roots = factory.chain(copy)
    for order in ([hygon_root(), *roots], [*roots, hygon_root()]):
        assert verify_chain(replace(chain, hrk=None), order) == roots[0]


@BOTH
@pytest.mark.parametrize("roots", [[], ()])
def test_empty_trust_is_refused(factory: ChainFactory, strict: bool, roots: list[CaCertificate]) -> None:
    chain, _ = factory.chain()
    with pytest.raises(VerificationError, match="no trusted root") as caught:
        verify_chain(chain, roots, strict=strict)
    assert caught.value.step == "HRK"


def test_gaps_are_refused(factory: ChainFactory) -> None:
    chain, roots = factory.chain()
    for parts in ({"pek": None}, {"pek": None, "oca": None}, {"pek": None, "pdh": None}):
        with pytest.raises(VerificationError, match="missing") as caught:
            verify_chain(replace(chain, **parts), roots)
        assert caught.value.step == "PEK"


def test_real_pek_passes_every_rule_but_the_missing_issuer(real_evidence: bytes) -> None:
    page = bytes(json.loads(real_evidence)["attestation_report"]["data"])
    pek = CsvCertificate.parse(page[0x150 : 0x150 + 2084])
    stranger, _ = ChainFactory().chain()
    check = certificate_check(pek, stranger.cek)  # no rule objects
    assert check.step == "PEK"
    with pytest.raises(VerificationError, match="signature by the CEK is not valid"):
        check.run()


# ---- One field wrong ------------------------------------------------------------------------------------------------

# Signed again, these may say what they like: the issuer vouches for them.
FREE = {(role, name) for role in ("CEK", "OCA", "PEK", "PDH") for name in ("api_major", "api_minor")}
# The numbers of a slot that is marked empty: unsigned, unused, unspecified.
FREE |= {(role, name) for role in ("CEK", "OCA", "PDH") for name in ("slot2_r", "slot2_s")}


def cases() -> list[tuple[str, str]]:
    return [
        (role, name) for role in ROLES for name in (CA_FIELDS if role in ("HRK", "HSK") else CSV_FIELDS)
    ]


@pytest.mark.parametrize(("role", "name"), cases(), ids=lambda value: value)
def test_one_field_wrong_and_signed_again(factory: ChainFactory, role: str, name: str) -> None:
    chain, roots = factory.chain(factory.wrong(role, name))
    if (role, name) in FREE:
        verify_chain(chain, roots)
        return
    with pytest.raises(VerificationError) as caught:
        verify_chain(chain, roots)
    # A key id is its own certificate's, but only those below can tell that it is wrong.
    assert caught.value.step == ("CEK" if (role, name) == ("HSK", "key_id") else role)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("role", "name"), cases(), ids=lambda value: value)
def test_one_field_wrong_and_not_signed_again(factory: ChainFactory, role: str, name: str) -> None:
    chain, roots = factory.chain(factory.wrong(role, name, resign=False))
    if name in ("slot2_r", "slot2_s") and (role, name) in FREE:
        verify_chain(chain, roots)
        return
    with pytest.raises(VerificationError) as caught:
        verify_chain(chain, roots)
    assert caught.value.step == role or (role, name) == ("HSK", "key_id")


@pytest.mark.parametrize(("role", "name"), cases(), ids=lambda value: value)
def test_signed_fields_count_in_tolerant_mode_too(factory: ChainFactory, role: str, name: str) -> None:
    encoded = factory.encodings[role]
    offset, _ = fields_of(encoded)[name]
    signed = offset < (576 if role in ("HRK", "HSK") else 1044)
    chain, roots = factory.chain(factory.wrong(role, name, resign=False))
    try:
        verify_chain(chain, roots, strict=False)
        step = None
    except VerificationError as error:
        step = error.step
    assert step == role if signed else step in (None, role)


@pytest.mark.parametrize("role", ROLES)
def test_every_reserved_byte_is_checked(factory: ChainFactory, role: str) -> None:
    encoded = factory.encodings[role]
    kind = CaCertificate if len(encoded) == 832 else CsvCertificate
    areas = [(offset, size) for name, (offset, size) in fields_of(encoded).items() if "reserved" in name]
    areas.append((fields_of(encoded)["uid"][0] + 13, 241))
    issuer = kind.parse(encoded)
    for offset, size in areas:
        for place in range(offset, offset + size, 1 if size < 30 else 7):
            subject = kind.parse(raw(encoded, place, b"\x01"))
            with pytest.raises(VerificationError, match=r"zero"):
                # The rules come before the signature, and the issuer's identity after: any issuer of the right usage will do.
                certificate_check(subject, subject if role in ("HRK", "OCA") else issuer_of(factory, role), step=role)
    assert issuer.usage == KeyUsage[role]


def issuer_of(factory: ChainFactory, role: str) -> CaCertificate | CsvCertificate:
    issuer = {"HSK": "HRK", "CEK": "HSK", "PEK": "CEK", "PDH": "PEK"}[role]
    encoded = factory.encodings[issuer]
    return CaCertificate.parse(encoded) if len(encoded) == 832 else CsvCertificate.parse(encoded)


@pytest.mark.parametrize(
    ("role", "name", "value", "words"),
    [
        ("CEK", "usage", int(KeyUsage.PEK), "usage PEK; expected CEK"),
        ("PEK", "usage", int(KeyUsage.PDH), "usage PDH; expected PEK"),
        ("HSK", "key_usage", int(KeyUsage.HRK), "usage HRK; expected HSK"),
        ("CEK", "algorithm", int(KeyAlgorithm.SM2_DH), "SM2_DH; expected SM2_SA"),
        ("PDH", "algorithm", int(KeyAlgorithm.SM2_SA), "SM2_SA; expected SM2_DH"),
        ("PEK", "curve_id", 2, "curve id 2; expected 3"),
        ("PEK", "issuer_id", b"\1" * 16, "sid 0101"),
        ("CEK", "version", 3, "version 3; expected 1 or 2"),
        ("CEK", "version", 0, "version 0"),
        ("HSK", "version", 2, "version 2; expected 1"),
        ("CEK", "uid", b"HYGON-SSD-PEK", "user id 'HYGON-SSD-PEK'; expected 'HYGON-SSD-CEK'"),
        ("CEK", "uid_len", 0, "user id nothing"),
        ("CEK", "slot2_usage", int(KeyUsage.OCA), "slot 2 is OCA with NONE; expected INVALID"),
        ("CEK", "slot2_algorithm", 4, "slot 2 is INVALID with SM2_SA"),
        ("PEK", "slot1_usage", int(KeyUsage.OCA), "slot 1 is OCA"),
        ("PEK", "slot1_algorithm", 5, "slot 1 is CEK with SM2_DH"),
        ("PEK", "slot2_usage", int(KeyUsage.CEK), "slot 2 is CEK with SM2_SA; expected OCA"),
        ("PEK", "slot2_usage", 0x777, "slot 2 is 0x0777"),
        ("PEK", "x", bytes(32), "curve"),
        ("PEK", "x", b"\xff" * 32, "curve"),
    ],
)
def test_messages_say_what_was_found_and_expected(
    factory: ChainFactory, role: str, name: str, value: int | bytes, words: str
) -> None:
    chain, roots = factory.chain(factory.wrong(role, name, value))
    with pytest.raises(VerificationError, match=words) as caught:
        verify_chain(chain, roots)
    assert caught.value.step == role


def test_pek_of_a_platform_without_owner(factory: ChainFactory) -> None:
    """Slot 2 empty passes alone, and not beside an OCA that should have signed it."""
    pek = CsvCertificate.parse(factory.encodings["PEK"]).with_empty_slot(2)
    chain, roots = factory.chain(factory.encodings | {"PEK": pek.encoded})
    verify_chain(replace(chain, oca=None), roots)
    for strict in (True, False):
        with pytest.raises(VerificationError) as caught:
            verify_chain(chain, roots, strict=strict)
        assert caught.value.step == "PEK"


def test_tolerant_mode_takes_either_slot(factory: ChainFactory) -> None:
    pek = CsvCertificate.parse(factory.encodings["PEK"])
    first, second = pek.slots
    swapped = pek.with_slot(1, second).with_slot(2, first)
    chain, roots = factory.chain(factory.encodings | {"PEK": swapped.encoded})
    with pytest.raises(VerificationError, match="slot 1 is OCA"):
        verify_chain(chain, roots)
    verify_chain(chain, roots, strict=False)


def test_tolerant_mode_tries_every_slot_of_the_issuer(factory: ChainFactory) -> None:
    pek = CsvCertificate.parse(factory.encodings["PEK"])
    bad = SignatureSlot(KeyUsage.CEK, KeyAlgorithm.SM2_SA, pek.slots[1].signature)
    both = pek.with_slot(2, pek.slots[0]).with_slot(1, bad)
    chain, roots = factory.chain(factory.encodings | {"PEK": both.encoded})
    verify_chain(replace(chain, oca=None), roots, strict=False)
    none = pek.with_slot(2, bad).with_slot(1, bad)
    chain, roots = factory.chain(factory.encodings | {"PEK": none.encoded})
    with pytest.raises(VerificationError, match="not valid"):
        verify_chain(replace(chain, oca=None), roots, strict=False)
    for algorithm in (KeyAlgorithm.NONE, KeyAlgorithm.ECDSA_SHA256, 6):  # a valid signature, called something else
        named = pek.with_slot(1, pek.slots[0]._replace(algorithm=algorithm))
        chain, roots = factory.chain(factory.encodings | {"PEK": named.encoded})
        with pytest.raises(VerificationError, match="no slot holds"):
            verify_chain(replace(chain, oca=None), roots, strict=False)
    empty = pek.with_empty_slot(1).with_empty_slot(2)
    chain, roots = factory.chain(factory.encodings | {"PEK": empty.encoded})
    with pytest.raises(VerificationError, match="no slot holds"):
        verify_chain(replace(chain, oca=None), roots, strict=False)


@BOTH
def test_keys_cannot_take_each_others_place(factory: ChainFactory, strict: bool) -> None:
    chain, roots = factory.chain()
    assert chain.pek is not None
    assert chain.pdh is not None
    wrong = [
        replace(chain, pek=chain.pdh),
        replace(chain, cek=chain.pek),
        replace(chain, pdh=chain.pek),
        replace(chain, oca=chain.cek),
        replace(chain, hsk=roots[0]),
    ]
    for one in wrong:
        with pytest.raises(VerificationError):
            verify_chain(one, roots, strict=strict)
    with pytest.raises(VerificationError, match="expected CEK or OCA"):
        verify_certificate(chain.pek, chain.pdh, strict=strict)
    with pytest.raises(VerificationError, match="expected HSK"):
        verify_certificate(chain.cek, roots[0], strict=strict)
    with pytest.raises(VerificationError, match="expected a CA certificate"):
        verify_certificate(chain.cek, roots[0], strict=strict, step="HSK")


@BOTH
def test_certificates_of_another_chip(factory: ChainFactory, strict: bool) -> None:
    chain, roots = factory.chain()
    other, other_roots = ChainFactory().chain()
    for name, step in (("cek", "CEK"), ("pek", "PEK"), ("pdh", "PDH"), ("oca", "PEK")):
        with pytest.raises(VerificationError) as caught:
            verify_chain(replace(chain, **{name: getattr(other, name)}), roots, strict=strict)
        assert caught.value.step == step
    with pytest.raises(VerificationError, match="not trusted"):
        verify_chain(chain, other_roots, strict=strict)


@BOTH
def test_root_must_be_one(factory: ChainFactory, strict: bool) -> None:
    chain, roots = factory.chain()
    verify_root(roots[0], strict=strict)
    with pytest.raises(VerificationError) as caught:
        verify_root(chain.hsk, strict=strict)
    assert caught.value.step == "HRK"
    # An HSK that the caller names as root is no root either, although it did sign the CEK.
    with pytest.raises(VerificationError):
        verify_chain(replace(chain, hrk=None), [chain.hsk], strict=strict)


def test_unknown_usage(factory: ChainFactory) -> None:
    subject = CsvCertificate.parse(altered(factory.encodings["CEK"], usage=0x4242))
    with pytest.raises(VerificationError, match="0x4242 is no key of the platform"):
        verify_certificate(subject, issuer_of(factory, "CEK"))


# ---- Checks handed back ---------------------------------------------------------------------------------------------


def test_checks_in_one_batch(factory: ChainFactory) -> None:
    chain, roots = factory.chain(factory.wrong("PEK", "slot1_r"))
    root, checks = chain_checks(chain, roots)
    assert root == roots[0]
    assert [(check.step, check.issuer) for check in checks] == [
        ("HSK", "the HRK"), ("CEK", "the HSK"), ("OCA", "itself"), ("PEK", "the OCA"), ("PEK", "the CEK"), ("PDH", "the PEK"),
    ]  # fmt: skip
    valid = sm2_verify_many(
        [check.key for check in checks],
        [check.signatures[0] for check in checks],
        [check.key.digest(check.message, user_id=check.user_id) for check in checks],
    )
    assert valid == [True, True, True, True, False, True]
    with pytest.raises(VerificationError, match="signature by the CEK"):
        checks[4].run()
    assert checks[4].failure().step == "PEK"


# ---- Single bits ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("role", "ranges"),
    [
        ("HSK", [(0, 576), (576, 720)]),
        ("CEK", [(0, 1044), (1052, 1196)]),
        ("PEK", [(0, 1044), (1052, 1196)]),
    ],
)
def test_every_single_bit(factory: ChainFactory, role: str, ranges: list[tuple[int, int]], strict: bool) -> None:
    """Each bit of the signed bytes and of the signature, turned over: refused by the parser, a rule or the signature."""
    encoded = factory.encodings[role]
    issuer = issuer_of(factory, role)
    issuer.public_key.prepare()
    kind = CaCertificate if len(encoded) == 832 else CsvCertificate
    bits = [bit for start, stop in ranges for bit in range(8 * start, 8 * stop)]
    keys, signatures, digests, places = [], [], [], []
    refused = 0
    for bit in [None, *bits]:
        data = bytearray(encoded)
        if bit is not None:
            data[bit // 8] ^= 1 << bit % 8
        try:
            check = certificate_check(kind.parse(data), issuer, strict=strict, step=role)
        except (FormatError, VerificationError):
            refused += 1
            continue
        for signature in check.signatures:
            keys.append(check.key)
            signatures.append(signature)
            digests.append(check.key.digest(check.message, user_id=check.user_id))
            places.append(bit)
    valid = sm2_verify_many(keys, signatures, digests)
    assert [place for place, is_valid in zip(places, valid, strict=True) if is_valid] == [None]
    assert refused + len(set(places)) == len(bits) + 1
    assert len(places) > (512 if strict else 3000)  # r and s; without the strict rules the reserved areas too
    assert refused > 640  # at least the padding of r and s


@pytest.mark.parametrize("role", ["HSK", "CEK", "PEK"])
def test_every_single_bit_by_the_signature_alone(factory: ChainFactory, role: str) -> None:
    """The same bits where no rule looks at them: the signature covers every one."""
    encoded = factory.encodings[role]
    issuer = issuer_of(factory, role)
    issuer.public_key.prepare()
    check = certificate_check((CaCertificate if role == "HSK" else CsvCertificate).parse(encoded), issuer)
    signature, body = check.signatures[0], check.message
    digests = [check.key.digest(body, user_id=check.user_id)]
    for bit in range(8 * len(body)):
        changed = bytearray(body)
        changed[bit // 8] ^= 1 << bit % 8
        digests.append(check.key.digest(changed, user_id=check.user_id))
    signatures = [signature] * len(digests)
    for bit in range(512):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        signatures.append(bytes(flipped))
        digests.append(digests[0])
    valid = sm2_verify_many([check.key] * len(digests), signatures, digests)
    assert valid.index(True) == 0
    assert sum(valid) == 1
    assert len(valid) == 1 + 8 * len(body) + 512


def test_every_bit_of_the_roots_signature(factory: ChainFactory) -> None:
    encoded = factory.encodings["HRK"]
    for bit in (*range(0, 8 * 576, 97), *range(8 * 576, 8 * 608), *range(8 * 648, 8 * 680)):
        data = raw(encoded, bit // 8, bytes([encoded[bit // 8] ^ 1 << bit % 8]))
        with pytest.raises((VerificationError, FormatError)):
            verify_root(CaCertificate.parse(data))


# ---- The factory itself ---------------------------------------------------------------------------------------------


def test_factory_refuses_what_it_cannot_do(factory: ChainFactory) -> None:
    encoded = factory.encodings["CEK"]
    with pytest.raises(ArgumentError, match="field 'nonsense'"):
        altered(encoded, nonsense=1)
    with pytest.raises(ArgumentError, match="does not fit 2 bytes"):
        altered(encoded, uid_len=65536)
    with pytest.raises(ArgumentError, match="17 bytes"):
        altered(encoded, issuer_id=bytes(17))
    with pytest.raises(ArgumentError, match="offset"):
        raw(encoded, 2084, b"x")
    with pytest.raises(ArgumentError, match="expected 832 or 2084"):
        altered(b"", version=1)


def test_factory_breaks_nothing_else(factory: ChainFactory) -> None:
    wrong = factory.wrong("PEK", "issuer_id")
    assert {role for role in ROLES if wrong[role] != factory.encodings[role]} == {"PEK"}
    pek = CsvCertificate.parse(wrong["PEK"])
    cek, oca = (CsvCertificate.parse(wrong[role]) for role in ("CEK", "OCA"))
    for slot, issuer in zip(pek.slots, (cek, oca), strict=True):
        issuer.public_key.verify(slot.signature, pek.body, user_id=issuer.user_id)


def test_another_owner(factory: ChainFactory) -> None:
    """A PEK signed by somebody else's OCA hangs together with that OCA alone."""
    owner = SM2PrivateKey.generate()
    oca = CsvCertificate.build(
        usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=owner.public_key.point, user_id=b"HYGON-SSD-OCA"
    ).with_signature(1, owner, KeyUsage.OCA, b"HYGON-SSD-OCA")
    chain, roots = factory.chain()
    assert chain.pek is not None
    with pytest.raises(VerificationError, match="signature by the OCA") as caught:
        verify_chain(replace(chain, oca=oca), roots)
    assert caught.value.step == "PEK"
    owned = chain.pek.with_signature(2, owner, KeyUsage.OCA, oca.user_id)
    verify_chain(CertificateChain(chain.hsk, chain.cek, owned, oca, chain.pdh), roots)
