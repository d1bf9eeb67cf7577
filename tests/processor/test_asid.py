"""ASIDs: classes, ownership, the flush cycle, sharing by one user."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.errors import FirmwareError, FirmwareStatus
from csvfast.processor import Options, Processor, Profile, make_session
from csvfast.processor.asid import AsidState, AsidTable
from csvfast.report import GuestPolicy

S = FirmwareStatus
MIB = 1 << 20
REUSE = GuestPolicy.of(asid_reuse=True)


def make(chip: ChipIdentity, memory: csvfast.EncryptedMemory, *, build: int = 2337, **options: int) -> Processor:
    processor = Processor(chip, memory, profile=Profile(1, 4, build, csv3=True), options=Options(**options))  # type: ignore[arg-type]
    processor.init(es=True, tmr_address=3 * MIB, tmr_length=MIB)
    return processor


@pytest.mark.parametrize(
    ("build", "policy", "allowed"),
    [
        (2337, GuestPolicy.of(), range(5, 17)),
        (1809, GuestPolicy.of(), range(5, 17)),
        (1809, GuestPolicy.of(es=True), range(1, 5)),
        (1810, GuestPolicy.of(es=True), range(1, 17)),
        (2337, GuestPolicy.of(es=True, csv3=True), range(1, 17)),
    ],
)
def test_classes(
    build: int,
    policy: GuestPolicy,
    allowed: range,
    chip: ChipIdentity,
    memory: csvfast.EncryptedMemory,
    refused: Callable[..., FirmwareError],
) -> None:
    processor = make(chip, memory, build=build, min_csv_asid=5)
    handle = processor.launch_start(policy)
    for asid in (-1, 0, *range(1, 19), 1 << 32):
        if asid in allowed:
            processor.activate(handle, asid)
            assert processor.guest_status(handle).asid == asid
            assert memory.asids() == [asid]
            processor.deactivate(handle)
        else:
            refused(S.INVALID_ASID, processor.activate, handle, asid)
    assert memory.asids() == []


def test_the_cycle(chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]) -> None:
    processor = make(chip, memory, cores=3)
    first, second = processor.launch_start(0), processor.launch_start(0)
    processor.activate(first, 7)
    refused(S.ASID_OWNED, processor.activate, second, 7)
    refused(S.ACTIVE, processor.activate, first, 8)
    refused(S.ACTIVE, processor.activate, first, 7)
    refused(S.ACTIVE, processor.decommission, first)
    processor.wbinvd()  # before the DEACTIVATE: does not count
    processor.deactivate(first)
    processor.deactivate(first)  # nothing to do
    assert memory.asids() == []
    refused(S.DFFLUSH_REQUIRED, processor.activate, second, 7)
    refused(S.DFFLUSH_REQUIRED, processor.activate, first, 7)
    refused(S.WBINVD_REQUIRED, processor.df_flush)
    processor.wbinvd(0)
    processor.wbinvd(2)
    refused(S.WBINVD_REQUIRED, processor.df_flush)
    processor.wbinvd(1)
    assert processor.asids.state(7) is AsidState.NEED_DF
    refused(S.DFFLUSH_REQUIRED, processor.activate, second, 7)
    processor.df_flush()
    processor.activate(second, 7)
    with pytest.raises(ValueError, match="core is 3"):
        processor.wbinvd(3)


def test_a_later_release_needs_its_own_flush(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = make(chip, memory, cores=2)
    first, second = processor.launch_start(0), processor.launch_start(0)
    processor.activate(first, 1)
    processor.activate(second, 2)
    processor.deactivate(first)
    processor.wbinvd()
    processor.deactivate(second)
    refused(S.WBINVD_REQUIRED, processor.df_flush)  # core caches may hold lines of ASID 2
    refused(S.DFFLUSH_REQUIRED, processor.activate, first, 1)
    processor.wbinvd()
    processor.df_flush()
    processor.activate(first, 2)
    processor.activate(second, 1)


def test_shutdown_leaves_asids_to_be_flushed(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = make(chip, memory)
    processor.activate(processor.launch_start(0), 1)
    processor.shutdown()
    assert memory.asids() == []
    processor.init()
    handle = processor.launch_start(0)
    refused(S.DFFLUSH_REQUIRED, processor.activate, handle, 1)
    processor.activate(handle, 2)
    processor.deactivate(handle)
    processor.wbinvd()
    processor.df_flush()
    processor.activate(handle, 1)


def test_memory_is_noise_under_the_next_guest(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    processor = make(chip, memory)
    first = processor.launch_start(0)
    processor.activate(first, 1)
    memory.write(0x1000, b"secret of guest one.............", 1)
    processor.deactivate(first)
    processor.wbinvd()
    processor.df_flush()
    second = processor.launch_start(0)
    processor.activate(second, 1)
    assert b"secret" not in memory.read(0x1000, 32, 1)
    processor.deactivate(second)
    processor.wbinvd()
    processor.df_flush()
    processor.activate(first, 1)  # the same key again: its memory is there
    assert memory.read(0x1000, 32, 1) == b"secret of guest one............."


def test_sharing_an_asid(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = make(chip, memory)
    first = processor.launch_start(REUSE, user_id=b"alice")
    processor.activate(first, 4)
    memory.write(0, bytes(64), 0)
    processor.launch_update_data(first, 0, 32)
    stranger = processor.launch_start(REUSE, user_id=b"bob")
    nobody = processor.launch_start(REUSE)
    unwilling = processor.launch_start(GuestPolicy(0), user_id=b"alice")
    other_kind = processor.launch_start(GuestPolicy.of(asid_reuse=True, es=True), user_id=b"alice")
    for handle in (stranger, nobody, unwilling, other_kind):
        refused(S.ASID_OWNED, processor.activate, handle, 4)
    second = processor.launch_start(REUSE, user_id=b"alice")
    processor.activate(second, 4)
    processor.activate(nobody, 5)
    refused(S.ASID_OWNED, processor.activate, processor.launch_start(REUSE), 5)  # two nobodies are not one user
    processor.deactivate(nobody)
    processor.launch_update_data(second, 32, 32)
    assert memory.read(0, 64, 4) == bytes(64)
    # By reference count: the key leaves with the last one.
    processor.deactivate(first)
    assert memory.asids() == [4]
    processor.decommission(first)
    assert memory.read(32, 32, 4) == bytes(32)
    processor.deactivate(second)
    assert memory.asids() == []
    third = processor.launch_start(REUSE, user_id=b"alice")
    refused(S.DFFLUSH_REQUIRED, processor.activate, third, 4)


def test_a_guest_with_data_of_its_own_cannot_join(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    """Its key would have to stand in the slot too; there is one key a slot."""
    processor = make(chip, memory)
    first = processor.launch_start(REUSE, user_id=b"alice")
    second = processor.launch_start(REUSE, user_id=b"alice")
    processor.activate(first, 1)
    processor.activate(second, 2)
    processor.launch_update_data(second, 0, 32)
    processor.deactivate(second)
    refused(S.ASID_OWNED, processor.activate, second, 1)


def test_sharing_by_the_sessions_owner(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> None:
    processor = make(chip, memory)
    pdh = CsvCertificate.parse(processor.pdh_cert_export()[0])
    session = make_session(pdh, REUSE)
    again = make_session(pdh, REUSE, key=session.key)
    handles = [processor.launch_start(REUSE, dh=one.certificate.encoded, session=one.blob) for one in (session, again)]
    for handle in handles:
        processor.activate(handle, 3)
    assert [processor.guest_status(handle).asid for handle in handles] == [3, 3]


def test_shared_key_by_handle(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = make(chip, memory)
    first = processor.launch_start(0)
    second = processor.launch_start(0, handle=first)
    processor.activate(first, 1)
    processor.activate(second, 2)
    memory.write(0x2000, b"shared pages ...", 1)
    assert memory.read(0x2000, 16, 2) == b"shared pages ..."
    processor.deactivate(first)
    processor.decommission(first)  # wipes its own copy of the key only
    processor.deactivate(second)
    processor.activate(second, 3)
    assert memory.read(0x2000, 16, 3) == b"shared pages ..."
    closed = processor.launch_start(GuestPolicy.of(noks=True))
    refused(S.POLICY_FAILURE, processor.launch_start, GuestPolicy.of(noks=True), handle=closed)
    refused(S.POLICY_FAILURE, processor.launch_start, GuestPolicy.of(nodbg=True), handle=second)
    refused(S.INVALID_GUEST, processor.launch_start, 0, handle=999)


def test_a_key_put_there_by_somebody_else(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    processor = make(chip, memory)
    memory.install(5)
    refused(S.ASID_OWNED, processor.activate, processor.launch_start(0), 5)


def test_the_table_alone() -> None:
    table = AsidTable(4, 2)
    assert table.state(1) is AsidState.FREE
    assert table.bind(1, 10)
    assert not table.bind(1, 11)
    assert table.guests(1) == {10, 11}
    assert not table.release(1, 10)
    assert table.release(1, 11)
    assert table.state(1) is AsidState.DIRTY
    assert table.cores_to_flush() == {0, 1}
    table.wbinvd(1)
    assert table.cores_to_flush() == {0}
    table.wbinvd()
    assert table.state(1) is AsidState.NEED_DF
    table.flushed()
    assert table.state(1) is AsidState.FREE


def test_a_host_cannot_join_a_guest_by_its_user_id(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    """The user id is the host's word; the session's owner key is not."""
    processor = make(chip, memory)
    session = make_session(CsvCertificate.parse(processor.pdh_cert_export()[0]), REUSE)
    owned = {"dh": session.certificate.encoded, "session": session.blob}
    victim = processor.launch_start(REUSE, user_id=b"alice", **owned)
    processor.activate(victim, 1)
    spy = processor.launch_start(REUSE, user_id=b"alice")
    refused(S.ASID_OWNED, processor.activate, spy, 1)
    sibling = processor.launch_start(REUSE, user_id=b"alice", **owned)
    processor.activate(sibling, 1)
