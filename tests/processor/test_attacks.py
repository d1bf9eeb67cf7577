"""Two guests on one processor and a host that owns the DRAM: what it can do, and what comes of it.

Noise where the specification says noise, a status code where it says one, and success where the hardware has none to offer
either: memory encryption without integrity gives back old data when old ciphertext is put back (specification section 5.1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from reference.csv3_guest import GuestView, launch, platform

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.errors import FirmwareError, UnknownAsidError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import Options, Processor, make_session
from csvfast.processor.packet import KIND_SECRET, seal_packet
from csvfast.report import GuestPolicy, ReportRequest

Refused = Callable[..., FirmwareError]
MIB = 1 << 20
PAGE, LINE, BLOCK = 4096, 64, 16
ONE, TWO = 0x10000, 0x20000
SECRET = b"secret of the first guest, 4096 bytes of it....." * 86
DATA = SECRET[:PAGE]


def noise(data: bytes, truth: bytes) -> bool:
    """No 16-byte block of the truth is left, and the bytes look random."""
    blocks = {truth[place : place + BLOCK] for place in range(0, len(truth), BLOCK)}
    found = any(data[place : place + BLOCK] in blocks for place in range(0, len(data), BLOCK))
    return not found and len(Counter(data)) > 200


@pytest.fixture
def two(processor: Processor, running: Callable[..., int]) -> tuple[int, int]:
    """Guest 1 under ASID 1 with a page at ONE, guest 2 under ASID 2 with another at TWO."""
    return running(asid=1, address=ONE, data=DATA), running(asid=2, address=TWO, data=bytes(PAGE))


def test_reading_the_dram(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    assert noise(bytes(memory.raw[ONE : ONE + PAGE]), DATA)
    assert noise(memory.read(ONE, PAGE, 2), DATA)
    assert noise(memory.read(TWO, PAGE, 1), bytes(PAGE))
    assert memory.read(ONE, PAGE, 1) == DATA


def test_ciphertext_of_one_guest_for_another(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    """Copied to the other's frame, or mapped where the other looks: noise for both."""
    memory.raw[TWO : TWO + PAGE] = memory.raw[ONE : ONE + PAGE]
    assert noise(memory.read(TWO, PAGE, 2), DATA)
    assert noise(memory.read(TWO, PAGE, 1), DATA)


def test_ciphertext_moved_inside_a_guest(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    """Another frame, another line of the frame, another block of the line: each has its own tweak."""
    for source, place, size in ((ONE, ONE + PAGE, PAGE), (ONE, ONE + LINE, LINE), (ONE, ONE + BLOCK, BLOCK)):
        memory.write(ONE, DATA, 1)
        memory.raw[place : place + size] = memory.raw[source : source + size].copy()
        moved = memory.read(place, size, 1)
        assert moved != memory.read(source, size, 1)
        assert DATA[:BLOCK] not in moved


def test_swapped_pages(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    memory.write(ONE + PAGE, bytes(PAGE), 1)
    first, second = memory.raw[ONE : ONE + PAGE].copy(), memory.raw[ONE + PAGE : ONE + 2 * PAGE].copy()
    memory.raw[ONE : ONE + PAGE], memory.raw[ONE + PAGE : ONE + 2 * PAGE] = second, first
    assert noise(memory.read(ONE, PAGE, 1), DATA)
    assert noise(memory.read(ONE + PAGE, PAGE, 1), DATA)


def test_replay_in_time_works(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    """The known weakness, as on the hardware: same place, same key, old ciphertext gives the old data."""
    old = memory.raw[ONE : ONE + PAGE].copy()
    memory.write(ONE, b"balance: 0      ", 1)
    new = memory.raw[ONE : ONE + PAGE].copy()
    assert (
        sum(1 for place in range(0, PAGE, BLOCK) if (old[place : place + BLOCK] != new[place : place + BLOCK]).any())
        == 1
    )
    memory.raw[ONE : ONE + PAGE] = old
    assert memory.read(ONE, PAGE, 1) == DATA
    memory.write(ONE, DATA, 1)
    assert (memory.raw[ONE : ONE + PAGE] == old).all()  # and equal data is seen to be equal


def test_line_model_leaks_as_published(chip: ChipIdentity, running: Callable[..., int]) -> None:
    """With one tweak per line, blocks swapped inside a line are plaintext blocks swapped (CipherShadow)."""
    with (
        csvfast.EncryptedMemory(4 * MIB, asid_max=4, tweak_model="line") as memory,
        Processor(chip, memory) as processor,
    ):
        processor.init()
        handle = processor.launch_start(GuestPolicy.of())
        processor.activate(handle, 1)
        memory.write(ONE, DATA, 0)
        processor.launch_update_data(handle, ONE, PAGE)
        memory.raw[ONE : ONE + BLOCK], memory.raw[ONE + BLOCK : ONE + 2 * BLOCK] = (
            memory.raw[ONE + BLOCK : ONE + 2 * BLOCK].copy(), memory.raw[ONE : ONE + BLOCK].copy(),
        )  # fmt: skip
        assert memory.read(ONE, 2 * BLOCK, 1) == DATA[BLOCK : 2 * BLOCK] + DATA[:BLOCK]


def test_flipped_ciphertext_bit(memory: csvfast.EncryptedMemory, two: tuple[int, int]) -> None:
    """One bit changes one whole block, unpredictably, and nobody notices."""
    memory.raw[ONE + 100] ^= 1
    now = memory.read(ONE, PAGE, 1)
    assert now[:96] == DATA[:96]
    assert now[112:] == DATA[112:]
    changed = bin(int.from_bytes(now[96:112], "big") ^ int.from_bytes(DATA[96:112], "big")).count("1")
    assert changed > 20


def test_asid_of_a_running_guest(
    processor: Processor, memory: csvfast.EncryptedMemory, two: tuple[int, int], refused: Refused
) -> None:
    """Another guest is not let into the ASID, nor can a command use one guest's key for another's handle."""
    third = processor.launch_start(GuestPolicy.of())
    refused(S.ASID_OWNED, processor.activate, third, 1)
    refused(S.ACTIVE, processor.activate, two[0], 3)
    processor.activate(third, 3)
    processor.launch_measure(third)
    processor.launch_finish(third)
    processor.dbg_decrypt(third, ONE, 0x80000, PAGE)
    assert noise(memory.read(0x80000, PAGE, 0), DATA)
    refused(S.POLICY_FAILURE, processor.dbg_decrypt, two[0], ONE, 0x80000, PAGE)
    processor.copy(third, ONE, 0x90000, PAGE)
    assert noise(memory.read(0x90000, PAGE, 1), DATA)
    assert noise(memory.read(0x90000, PAGE, 3), DATA)


def test_asid_reuse_without_flush(chip: ChipIdentity, refused: Refused) -> None:
    """DEACTIVATE, then the next guest under the same ASID: refused until every core has flushed and DF_FLUSH ran."""
    with (
        csvfast.EncryptedMemory(MIB, asid_max=4) as memory,
        Processor(chip, memory, options=Options(cores=3)) as processor,
    ):
        processor.init()
        first, second = processor.launch_start(GuestPolicy.of()), processor.launch_start(GuestPolicy.of())
        processor.activate(first, 1)
        memory.write(ONE, DATA, 0)
        processor.launch_update_data(first, ONE, PAGE)
        processor.deactivate(first)
        with pytest.raises(UnknownAsidError):
            memory.read(ONE, PAGE, 1)
        refused(S.DFFLUSH_REQUIRED, processor.activate, second, 1)
        refused(S.DFFLUSH_REQUIRED, processor.activate, first, 1)
        refused(S.WBINVD_REQUIRED, processor.df_flush)
        for core in (0, 1):
            processor.wbinvd(core)
            refused(S.WBINVD_REQUIRED, processor.df_flush)
        processor.decommission(first)
        refused(S.DFFLUSH_REQUIRED, processor.activate, second, 1)
        processor.wbinvd(2)
        refused(S.DFFLUSH_REQUIRED, processor.activate, second, 1)
        processor.df_flush()
        processor.activate(second, 1)
        assert noise(memory.read(ONE, PAGE, 1), DATA)


def test_decommission_under_use(
    processor: Processor, memory: csvfast.EncryptedMemory, two: tuple[int, int], refused: Refused
) -> None:
    vek = processor.guests[two[0]].vek
    refused(S.ACTIVE, processor.decommission, two[0])
    assert memory.read(ONE, PAGE, 1) == DATA
    processor.deactivate(two[0])
    processor.decommission(two[0])
    refused(S.INVALID_GUEST, processor.guest_status, two[0])
    with pytest.raises(csvfast.errors.ClosedError):
        bytes(vek)
    assert noise(memory.read(ONE, PAGE, 2), DATA)
    processor.shutdown()
    with pytest.raises(UnknownAsidError):
        memory.read(TWO, PAGE, 2)


def test_plaintext_changed_before_it_is_measured(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]
) -> None:
    """The host may load what it likes: then the digest is another."""
    good = running(asid=1, address=ONE, data=DATA)
    bad = running(asid=2, address=TWO, data=DATA[:-1] + b"!")
    assert processor.guests[good].measure == csvfast.sm3(DATA).digest()
    assert processor.guests[bad].measure != processor.guests[good].measure


def test_reports_of_one_guest_for_another(
    processor: Processor, memory: csvfast.EncryptedMemory, two: tuple[int, int], refused: Refused
) -> None:
    """A request is read under the key of the guest whose handle the host gives: the wrong one reads noise."""
    memory.write(0x80000, ReportRequest.build(b"mine", bytes(16)), 1)
    before = memory.raw[0x80000 : 0x80000 + PAGE].copy()
    refused(S.SECURE_DATA_INVALID, processor.attestation, two[1], 0x80000, PAGE)
    assert (memory.raw[0x80000 : 0x80000 + PAGE] == before).all()
    memory.write(0x90000, ReportRequest.build(b"the host's own", bytes(16)), 0)
    refused(S.SECURE_DATA_INVALID, processor.attestation, two[0], 0x90000, PAGE)


def test_session_replayed_to_another_chip_or_guest(
    line: ManufacturingLine, processor: Processor, pdh: CsvCertificate, refused: Refused
) -> None:
    policy = GuestPolicy.of(nodbg=True)
    owner = make_session(pdh, policy, vm_digest=csvfast.sm3(DATA).digest())
    with Processor(line.make_chip(), csvfast.EncryptedMemory(MIB, asid_max=4)) as other:
        other.init()
        refused(S.BAD_MEASUREMENT, other.launch_start, policy, dh=owner.certificate.encoded, session=owner.blob)
    # A softer policy for the same session.
    refused(
        S.BAD_MEASUREMENT, processor.launch_start, GuestPolicy.of(), dh=owner.certificate.encoded, session=owner.blob
    )
    # The right chip again, but other content: it never runs.
    handle = processor.launch_start(policy, dh=owner.certificate.encoded, session=owner.blob)
    processor.activate(handle, 1)
    processor.memory.write(ONE, bytes(PAGE), 0)
    processor.launch_update_data(handle, ONE, PAGE)
    refused(S.BAD_MEASUREMENT, processor.launch_measure, handle)
    refused(S.INVALID_GUEST_STATE, processor.launch_finish, handle)


def test_every_bit_of_a_session(processor: Processor, pdh: CsvCertificate) -> None:
    policy = GuestPolicy.of()
    owner = make_session(pdh, policy)
    for place in range(0, len(owner.blob), 3):
        changed = bytearray(owner.blob)
        changed[place] ^= 1 << place % 8
        with pytest.raises(FirmwareError) as caught:
            processor.launch_start(policy, dh=owner.certificate.encoded, session=changed)
        assert caught.value.status in (S.BAD_SIGNATURE, S.BAD_MEASUREMENT)
    assert not processor.guests


def test_secret_for_another_guest(
    processor: Processor, memory: csvfast.EncryptedMemory, pdh: CsvCertificate, refused: Refused
) -> None:
    """A sealed secret opens only in the guest whose measurement its owner has seen."""
    policy = GuestPolicy.of()
    owner = make_session(pdh, policy)
    blobs = {}
    for asid, content in ((1, DATA), (2, bytes(PAGE))):
        handle = processor.launch_start(policy, dh=owner.certificate.encoded, session=owner.blob)
        processor.activate(handle, asid)
        memory.write(asid * 0x10000, content, 0)
        processor.launch_update_data(handle, asid * 0x10000, PAGE)
        blobs[asid] = handle, processor.launch_measure(handle)
    padded = seal_packet(KIND_SECRET, owner.tek, owner.tik, b"disk password...", iv=bytes(16), measure=blobs[1][1][:32])
    refused(S.INVALID_LENGTH, processor.launch_secret, blobs[1][0], padded[0], 0x80000, 17, padded[1])
    refused(S.BAD_MEASUREMENT, processor.launch_secret, blobs[2][0], padded[0], 0x80000, 16, padded[1])
    for bit in range(8 * 52):
        changed = bytearray(padded[0])
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FirmwareError) as caught:
            processor.launch_secret(blobs[1][0], changed, 0x80000, 16, padded[1])
        assert caught.value.status in (S.BAD_MEASUREMENT, S.INVALID_PARAM)
    processor.launch_secret(blobs[1][0], padded[0], 0x80000, 16, padded[1])
    assert memory.read(0x80000, 16, 1) == b"disk password..."


@pytest.fixture
def secure(chip: ChipIdentity) -> Iterator[Processor]:
    with platform(chip) as processor:
        yield processor


def test_csv3_page_mapped_elsewhere(secure: Processor, refused: Refused) -> None:
    """UPDATE_NPT cannot put another frame, or another guest's, behind a private page, nor the same frame twice."""
    first, second = launch(secure), launch(secure, asid=2, entry=1)
    one = GuestView(secure, first)
    one.write(0x5000, DATA)
    frame = secure.csv3_record(secure.guests[first]).table.entries[5].frame
    two = GuestView(secure, second, {5: frame * PAGE, 6: frame * PAGE})
    assert two.read(0x5000, PAGE) == bytes(PAGE)  # its own empty page
    secure.update_npt(first, 4, 0x5000, 0x1400000, 1)
    secure.update_npt(first, 6, 0x6000, frame * PAGE, 1)
    assert one.read(0x5000, PAGE) == DATA
    assert one.read(0x6000, PAGE) == bytes(PAGE)
    assert noise(secure.memory.read(frame * PAGE, PAGE, 2), DATA)
    refused(S.INVALID_PAGE_OWNER, secure.copy, second, frame * PAGE, 0x1400000, PAGE)
