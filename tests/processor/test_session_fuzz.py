"""Hostile bytes where a guest owner's should be: a status of the firmware or a FormatError, never anything else.

CSVFAST_FUZZ_INPUTS sets how many inputs each campaign takes; the default is a short run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AuthenticationError, FirmwareError, FormatError, LengthError, StateError
from csvfast.processor import Processor, SessionBlob, StateDirectory, make_session, seal_packet
from csvfast.processor.packet import KIND_SECRET, open_packet
from csvfast.processor.session import check_dh_certificate, open_session
from csvfast.processor.state import STATE_FILE
from csvfast.report import GuestPolicy

INPUTS = int(os.environ.get("CSVFAST_FUZZ_INPUTS", "2000"))
POLICY = GuestPolicy(1)


def mutations(seeds: list[bytes], seed: int, count: int = INPUTS) -> Iterator[bytes]:
    """Bits flipped, bytes set to extremes, pieces swapped, copied, cut and added; now and then nothing but noise."""
    chooser = random.Random(seed)
    for _ in range(count):
        data = bytearray(chooser.choice(seeds))
        for _ in range(chooser.choice((1, 1, 2, 8))):
            kind, at = chooser.randrange(7), chooser.randrange(len(data)) if data else 0
            if kind == 0 and data:
                data[at] ^= 1 << chooser.randrange(8)
            elif kind == 1:
                data[at : at + 4] = chooser.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\0\0\0\x80"))
            elif kind == 2:
                piece = data[at : at + chooser.randrange(80)]
                to = chooser.randrange(len(data)) if data else 0
                data[to : to + len(piece)] = piece
            elif kind == 3:
                del data[at:]
            elif kind == 4:
                data += chooser.randbytes(chooser.randrange(64))
            elif kind == 5:
                data[at : at + 32] = chooser.randbytes(32)
            else:
                data = bytearray(chooser.randbytes(chooser.choice((0, 1, 52, 128, 772, 2084))))
        yield bytes(data)


@pytest.fixture
def platform(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> Iterator[Processor]:
    with Processor(chip, memory) as processor:
        processor.init()
        yield processor


def test_sessions(platform: Processor) -> None:
    session = make_session(CsvCertificate.parse(platform.pdh_cert_export()[0]), POLICY, vm_id=bytes(range(16)))
    dh = session.certificate
    dh.public_key.prepare()
    identity = platform.identity
    assert identity is not None
    parsed = 0
    for data in mutations([session.blob], 1):
        try:
            blob = SessionBlob.parse(data)
        except FormatError:
            assert len(data) != 772
            continue
        assert blob.encode() == data
        parsed += 1
        if data != session.blob:
            with pytest.raises(FirmwareError):
                open_session(data, identity.pdh_key, dh, POLICY)
    assert parsed > INPUTS // 10


def test_signed_garbage_behind_a_good_signature(platform: Processor) -> None:
    """A hostile owner or host signs whatever it likes: the rest of the blob is then parsed and unwrapped."""
    session = make_session(CsvCertificate.parse(platform.pdh_cert_export()[0]), POLICY)
    identity = platform.identity
    assert identity is not None
    session.certificate.public_key.prepare()
    for body in mutations([session.blob[:708]], 2, INPUTS // 4):
        data = body[:708].ljust(708, b"\0")
        if data[16:128] == session.blob[16:128] and data[292:] == session.blob[292:708]:
            continue  # nonce, key_id and rnd_pub_key are not looked at
        signature = session.key.sign(data, user_id=session.certificate.user_id)
        with pytest.raises(FirmwareError):
            open_session(data + signature[31::-1] + signature[:31:-1], identity.pdh_key, session.certificate, POLICY)


def test_dh_certificates(platform: Processor) -> None:
    good = make_session(CsvCertificate.parse(platform.pdh_cert_export()[0]), POLICY).certificate.encoded
    accepted = 0
    for data in mutations([good], 3):
        try:
            certificate = check_dh_certificate(data)
        except FirmwareError:
            continue
        accepted += 1
        assert certificate.encoded == data
    assert accepted  # fields that the firmware does not look at may say anything


def test_packets() -> None:
    tek, tik, measure = bytes(16), bytes(range(16)), bytes(32)
    header, ciphertext = seal_packet(KIND_SECRET, tek, tik, bytes(64), iv=bytes(16), measure=measure)
    for data in mutations([header + ciphertext], 4):
        if data == header + ciphertext:
            continue
        with pytest.raises((AuthenticationError, ArgumentError)):
            open_packet(KIND_SECRET, tek, tik, data[:52], data[52:], measure=measure)


def test_whole_launch_starts(platform: Processor) -> None:
    """Through the command itself, both blobs at once; a refusal leaves no guest behind."""
    session = make_session(CsvCertificate.parse(platform.pdh_cert_export()[0]), POLICY)
    dhs = mutations([session.certificate.encoded], 5, INPUTS // 4)
    blobs = mutations([session.blob], 6, INPUTS // 4)
    for dh, blob in zip(dhs, blobs, strict=True):
        if not dh and not blob:
            continue
        try:
            platform.launch_start(POLICY, dh=dh, session=blob)
        except FirmwareError:
            assert not platform.guests
        else:
            assert blob == session.blob
            platform.decommission(next(iter(platform.guests)))


def test_state_files(line: ManufacturingLine, tmp_path: Path, memory: csvfast.EncryptedMemory) -> None:
    home = tmp_path / "chip"
    line.make_chip().save(home)
    with Processor.open(home, memory) as processor:
        processor.init()
    good = (home / STATE_FILE).read_bytes()
    with StateDirectory(home) as storage:
        for data in mutations([good], 7, INPUTS // 4):
            (home / STATE_FILE).write_bytes(data)
            if data != good:
                with pytest.raises(StateError):
                    storage.load()


@pytest.mark.parametrize(("tek", "tik"), [(15, 16), (16, 17), (15, 17), (17, 15)])
def test_transport_keys_of_wrong_size_are_refused(tek: int, tik: int, platform: Processor) -> None:
    pdh = CsvCertificate.parse(platform.pdh_cert_export()[0])
    with pytest.raises(LengthError, match="expected 16 each"):
        make_session(pdh, POLICY, tek=Secret(bytes(tek)), tik=Secret(bytes(tik)))
