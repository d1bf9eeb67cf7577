"""Session blobs: published vectors, the owner's and the firmware's side, every bit, and AMD's layout."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.crypto import SM4CTR, Secret, SM2PrivateKey, hmac_sm3, sm3
from csvfast.errors import FirmwareError, FirmwareStatus, FormatError, LengthError
from csvfast.processor import Options, Processor, SessionBlob, make_session
from csvfast.processor.derivation import derive, derive_amd
from csvfast.processor.launch import measurement_message
from csvfast.processor.session import GUEST_USER_ID, check_dh_certificate, open_session, public_key_digest
from csvfast.processor.session_amd import make_amd_session
from csvfast.report import GuestPolicy

S = FirmwareStatus
Z, NONCE = bytes(range(16)), bytes(range(0x10, 0x20))
TEK, TIK, IV = bytes(range(0x20, 0x30)), bytes(range(0x30, 0x40)), bytes(range(0x40, 0x50))
DIGEST = bytes.fromhex("88698862d12fa228f0bf8e51d6f3d9b9aae176e27fe8350b156d6787c135547b")
POLICY = GuestPolicy(5)
FIELDS = {"vm_id": b"vm-id 0123456789", "vm_version": b"version 01234567", "user_data": bytes(range(64))}


def test_published_derivations() -> None:
    assert derive(bytes(16), b"csv-master-secret", bytes(16), 16).hex() == "19e8d550e3a799b2917bc59146aaadae"
    assert derive_amd(bytes(16), b"sev-master-secret", bytes(16), 16).hex() == "ab4d269fcc62bedb4511d56c386ce706"


def test_published_session_keys() -> None:
    master = derive(Z, b"csv-master-secret", NONCE, 32)
    assert master.hex() == "868a6c3c2db2ef07c7dfaa77e2827f4818b818438bf476612e105eeb526562e8"
    kek, kik = derive(master, b"csv-kek", b"", 32), derive(master, b"csv-kik", b"", 32)
    assert kek.hex() == "9661c1ec1756ec311f68ce7cedd794e6c2185d6845e8b0b5b01b3628e14917ca"
    assert kik.hex() == "af06d159993e105adb635647e4f460ed3c4ea98373414396e7d4b6536b686472"
    wrapped = SM4CTR(kek[:16], IV).encrypt(TEK + TIK)
    assert wrapped.hex() == "b2057e5d0c2968223d417a1dbd670439702e1675d87fccee6c3940d65052d7e8"
    mac = hmac_sm3(kik, IV + wrapped).hexdigest()
    assert mac == "0af9b49c9ec521dedfc53b3541dc53c5ba3c5fb9f5206811f4230af373c07098"
    mac = hmac_sm3(TIK, b"\x05\0\0\0" + bytes(416)).hexdigest()
    assert mac == "2a123d2d0198d9e04528d71a16c534e6d28b498d3fb9386d3740ad335adfd732"


def test_published_measurement_macs() -> None:
    mnonce = bytes(range(0xF0, 0x100))
    plain = measurement_message((1, 3), POLICY, DIGEST, mnonce)
    assert hmac_sm3(TIK, plain).hexdigest() == "c008840e42a7985bb8e298c20eefd7b8ff4bf61b0c0def6f06485b2a0b99674f"
    with_build = measurement_message((1, 3), POLICY, DIGEST, mnonce, 0x7F0F)
    assert hmac_sm3(TIK, with_build).hexdigest() == "372d4cac669cfed2010a8c2a44573d2cf393f4a31663aa95f069aa576ffc26dc"
    amd = measurement_message(
        (0, 18), GuestPolicy(0), hashlib.sha256().digest(), bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554"), 15
    )
    mac = hmac.new(bytes.fromhex("66320db73158a35a255d051758e95ed4"), amd, hashlib.sha256).hexdigest()
    assert mac == "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


def test_the_whole_blob_of_the_published_keys(pdh: CsvCertificate, processor: Processor) -> None:
    """With the published z, nonce, keys and iv, all deterministic fields are the published ones."""
    given = [NONCE, Z, IV]
    session = make_session(
        pdh, POLICY, tek=Secret(TEK), tik=Secret(TIK), _random=lambda length: bytearray(given.pop(0)[:length])
    )
    blob = SessionBlob.parse(session.blob)
    assert blob.wrap_tk.hex() == "b2057e5d0c2968223d417a1dbd670439702e1675d87fccee6c3940d65052d7e8"
    assert blob.wrap_mac.hex() == "0af9b49c9ec521dedfc53b3541dc53c5ba3c5fb9f5206811f4230af373c07098"
    assert processor.identity is not None
    master = processor.identity.pdh_key.decrypt(blob.ms_enc[:129])
    assert master.hex() == "868a6c3c2db2ef07c7dfaa77e2827f4818b818438bf476612e105eeb526562e8"
    assert blob.ms_enc[129:] == bytes(127)


def test_layout_round_trip_and_signature(pdh: CsvCertificate) -> None:
    session = make_session(pdh, POLICY, vm_digest=DIGEST, **FIELDS)
    assert len(session.blob) == 772
    blob = SessionBlob.parse(session.blob)
    assert blob.encode() == session.blob
    assert (blob.vm_digest, blob.vm_id, blob.vm_version, blob.user_data) == (
        DIGEST, FIELDS["vm_id"], FIELDS["vm_version"], FIELDS["user_data"],
    )  # fmt: skip
    assert session.blob[612:628] == FIELDS["vm_id"]
    assert (
        blob.pubkey_digest
        == sm3(session.certificate.encoded[20:164]).digest()
        == public_key_digest(session.certificate)
    )
    # r and s stand little-endian, 32 bytes each.
    signature = session.blob[708:740][::-1] + session.blob[740:772][::-1]
    session.key.public_key.verify(signature, session.blob[:708], user_id=GUEST_USER_ID)
    for length in (0, 771, 773):
        with pytest.raises(FormatError, match="session blob"):
            SessionBlob.parse(bytes(length))
    with pytest.raises(LengthError, match="vm_id has 15 bytes"):
        make_session(pdh, POLICY, vm_id=bytes(15))


def test_launch_takes_over_the_session(processor: Processor, pdh: CsvCertificate) -> None:
    session = make_session(pdh, POLICY, vm_digest=DIGEST, **FIELDS)
    handle = processor.launch_start(POLICY, dh=session.certificate.encoded, session=session.blob)
    guest = processor.guests[handle]
    assert guest.tek is not None
    assert guest.tik is not None
    assert guest.tek.equals(session.tek)
    assert guest.tik.equals(session.tik)
    assert (guest.vm_id, guest.vm_version, guest.user_data) == (
        FIELDS["vm_id"],
        FIELDS["vm_version"],
        FIELDS["user_data"],
    )
    assert guest.vm_digest == DIGEST
    assert guest.user_pubkey_digest == public_key_digest(session.certificate)


def test_every_flipped_bit_of_a_session_is_refused(processor: Processor, pdh: CsvCertificate) -> None:
    session = make_session(pdh, POLICY, **FIELDS)
    assert processor.identity is not None
    key = processor.identity.pdh_key
    session.certificate.public_key.prepare()
    for at in range(8 * len(session.blob)):
        wrong = bytearray(session.blob)
        wrong[at // 8] ^= 1 << at % 8
        with pytest.raises(FirmwareError) as caught:
            open_session(wrong, key, session.certificate, POLICY)
        assert caught.value.status is S.BAD_SIGNATURE
    assert processor.guests == {}


def resigned(session: Any, **changes: bytes) -> bytes:
    """The blob with other fields, signed again by the owner's key: what a host with a DH key of its own can do."""
    blob = replace(SessionBlob.parse(session.blob), **changes)
    return replace(blob, signature=session.key.sign(blob.body, user_id=GUEST_USER_ID)).encode()


def test_fields_under_the_macs(
    processor: Processor, pdh: CsvCertificate, refused: Callable[..., FirmwareError]
) -> None:
    session = make_session(pdh, POLICY, **FIELDS)
    blob = SessionBlob.parse(session.blob)
    start = processor.launch_start
    dh = session.certificate.encoded
    for field in (
        "wrap_tk",
        "wrap_iv",
        "wrap_mac",
        "session_mac",
        "vm_digest",
        "pubkey_digest",
        "vm_id",
        "vm_version",
        "user_data",
    ):
        value = bytearray(getattr(blob, field))
        value[-1] ^= 1
        refused(S.BAD_MEASUREMENT, start, POLICY, dh=dh, session=resigned(session, **{field: bytes(value)}))
    for at in (0, 1, 64, 65, 96, 97, 128):  # tag, x, y, C3, C2
        value = bytearray(blob.ms_enc)
        value[at] ^= 1
        refused(S.BAD_MEASUREMENT, start, POLICY, dh=dh, session=resigned(session, ms_enc=bytes(value)))
    refused(S.BAD_MEASUREMENT, start, POLICY, dh=dh, session=resigned(session, ms_enc=bytes(256)))
    # Not looked at by the firmware, as csv-rs leaves them zero and their use is not public.
    start(POLICY, dh=dh, session=resigned(session, key_id=b"k" * 16, rnd_pub_key_data=b"r" * 148))


def test_another_policy_is_refused(
    processor: Processor, pdh: CsvCertificate, refused: Callable[..., FirmwareError]
) -> None:
    session = make_session(pdh, POLICY)
    refused(
        S.BAD_MEASUREMENT, processor.launch_start, GuestPolicy(4), dh=session.certificate.encoded, session=session.blob
    )


def test_a_host_cannot_name_somebody_elses_key(
    processor: Processor, pdh: CsvCertificate, refused: Callable[..., FirmwareError]
) -> None:
    """All MACs are right: the host made the transport keys itself and claims the owner's pubkey_digest."""
    owner = SM2PrivateKey.generate()
    claimed = public_key_digest(make_session(pdh, POLICY, key=owner).certificate)
    session = make_session(pdh, POLICY)
    blob = replace(SessionBlob.parse(session.blob), pubkey_digest=claimed)
    bound = POLICY.to_bytes() + blob.ms_enc + blob.vm_digest + claimed + blob.vm_id + blob.vm_version + blob.user_data
    forged = resigned(session, pubkey_digest=claimed, session_mac=hmac_sm3(session.tik, bound).digest())
    error = refused(S.BAD_MEASUREMENT, processor.launch_start, POLICY, dh=session.certificate.encoded, session=forged)
    assert "pubkey_digest" in str(error)
    # No claim at all is allowed.
    bound = POLICY.to_bytes() + blob.ms_enc + blob.vm_digest + bytes(32) + blob.vm_id + blob.vm_version + blob.user_data
    silent = resigned(session, pubkey_digest=bytes(32), session_mac=hmac_sm3(session.tik, bound).digest())
    handle = processor.launch_start(POLICY, dh=session.certificate.encoded, session=silent)
    assert processor.guests[handle].user_pubkey_digest == bytes(32)


def test_a_session_for_another_platform(
    chip: ChipIdentity, processor: Processor, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    with csvfast.EncryptedMemory(1 << 20) as elsewhere, Processor(chip, elsewhere) as other:
        other.init()
        session = make_session(CsvCertificate.parse(other.pdh_cert_export()[0]), GuestPolicy(1))
        refused(
            S.BAD_MEASUREMENT,
            processor.launch_start,
            GuestPolicy(1),
            dh=session.certificate.encoded,
            session=session.blob,
        )
        old = other.launch_start(GuestPolicy(1), dh=session.certificate.encoded, session=session.blob)
        assert old == 1
        # A new PDH makes every session for the old one worthless.
        other.pdh_gen()
        refused(
            S.BAD_MEASUREMENT, other.launch_start, GuestPolicy(1), dh=session.certificate.encoded, session=session.blob
        )


def test_point_of_the_master_secret_in_compressed_form(processor: Processor, pdh: CsvCertificate) -> None:
    session = make_session(pdh, POLICY)
    blob = SessionBlob.parse(session.blob)
    compressed = bytes((2 + (blob.ms_enc[64] & 1),)) + blob.ms_enc[1:33] + blob.ms_enc[65:129]
    field = compressed.ljust(256, b"\0")
    bound = (
        POLICY.to_bytes() + field + blob.vm_digest + blob.pubkey_digest + blob.vm_id + blob.vm_version + blob.user_data
    )
    again = resigned(session, ms_enc=field, session_mac=hmac_sm3(session.tik, bound).digest())
    handle = processor.launch_start(POLICY, dh=session.certificate.encoded, session=again)
    guest = processor.guests[handle]
    assert guest.tek is not None
    assert guest.tek.equals(session.tek)


@pytest.mark.parametrize("field", ["usage", "algorithm", "curve", "point", "reserved"])
def test_dh_certificate_of_another_kind(
    field: str, processor: Processor, pdh: CsvCertificate, refused: Callable[..., FirmwareError]
) -> None:
    session = make_session(pdh, POLICY)
    encoded = bytearray(session.certificate.encoded)
    start, value = {
        "usage": (8, KeyUsage.PEK), "algorithm": (12, KeyAlgorithm.SM2_SA), "curve": (16, 1), "point": (92, encoded[92] ^ 1),
        "reserved": (1043, 1),
    }[field]  # fmt: skip
    encoded[start] = value & 0xFF
    if field == "usage":
        encoded[8:12] = int(KeyUsage.PEK).to_bytes(4, "little")
    refused(S.INVALID_CERTIFICATE, processor.launch_start, POLICY, dh=encoded, session=session.blob)


def test_lengths(processor: Processor, pdh: CsvCertificate, refused: Callable[..., FirmwareError]) -> None:
    session = make_session(pdh, POLICY)
    dh = session.certificate.encoded
    start = processor.launch_start
    assert refused(S.INVALID_LENGTH, start, POLICY, dh=dh[:-1], session=session.blob).needed == {"dh_length": 2084}
    assert refused(S.INVALID_LENGTH, start, POLICY, session=session.blob).needed == {"dh_length": 2084}
    assert refused(S.INVALID_LENGTH, start, POLICY, dh=dh).needed == {"session_length": 772}
    assert refused(S.INVALID_LENGTH, start, POLICY, dh=dh, session=session.blob + b"\0").needed == {
        "session_length": 772
    }
    check_dh_certificate(dh)


def test_owner_key_of_its_own_identity(processor: Processor, pdh: CsvCertificate) -> None:
    key = SM2PrivateKey.generate()
    session = make_session(pdh, POLICY, key=key, user_id=b"ALICE")
    assert session.certificate.user_id == b"ALICE"
    handle = processor.launch_start(POLICY, dh=session.certificate.encoded, session=session.blob)
    assert processor.guests[handle].user_pubkey_digest == public_key_digest(session.certificate)


def test_secrets_show_nowhere(pdh: CsvCertificate) -> None:
    session = make_session(pdh, POLICY, tek=Secret(TEK), tik=Secret(TIK))
    for text in (repr(session), str(session), repr(session.tek)):
        assert TEK.hex() not in text
        assert repr(TEK)[2:-1] not in text
    assert TEK not in session.blob
    assert TIK not in session.blob


# ---- AMD's layout


@pytest.fixture
def amd(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> Processor:
    processor = Processor(chip, memory, options=Options(session_layout="amd"))
    processor.init()
    return processor


def test_amd_session(amd: Processor) -> None:
    pdh = CsvCertificate.parse(amd.pdh_cert_export()[0])
    policy = GuestPolicy(1)
    session = make_amd_session(pdh, policy)
    assert len(session.blob) == 128
    handle = amd.launch_start(policy, dh=session.certificate.encoded, session=session.blob)
    guest = amd.guests[handle]
    assert guest.tek is not None
    assert guest.tik is not None
    assert guest.tek.equals(session.tek)
    assert guest.tik.equals(session.tik)
    assert session.blob[96:] == hmac.new(bytes(memoryview(session.tik)), policy.to_bytes(), hashlib.sha256).digest()


def test_amd_session_refusals(amd: Processor, refused: Callable[..., FirmwareError]) -> None:
    pdh = CsvCertificate.parse(amd.pdh_cert_export()[0])
    policy = GuestPolicy(1)
    session = make_amd_session(pdh, policy)
    dh = session.certificate.encoded
    for at in range(8 * 128):
        # The initialisation vector is not under wrap_mac in AMD's layout, but TIK comes out wrong and policy_mac tells.
        wrong = bytearray(session.blob)
        wrong[at // 8] ^= 1 << at % 8
        if 8 * 48 <= at < 8 * 64 or at % 8 == 0:
            refused(S.BAD_MEASUREMENT, amd.launch_start, policy, dh=dh, session=wrong)
    refused(S.BAD_MEASUREMENT, amd.launch_start, GuestPolicy(0), dh=dh, session=session.blob)
    assert refused(S.INVALID_LENGTH, amd.launch_start, policy, dh=dh, session=bytes(772)).needed == {
        "session_length": 128
    }
    other = make_amd_session(pdh, policy)
    refused(S.BAD_MEASUREMENT, amd.launch_start, policy, dh=other.certificate.encoded, session=session.blob)
    assert amd.guests == {}
