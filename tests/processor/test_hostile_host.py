"""A host that changes memory while a command runs, picks its siblings, closes things in the wrong order, or breaks the disk."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reference.csv3_guest import launch, platform

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import SM2PrivateKey, hmac_sm3, sm3
from csvfast.errors import AuthenticationError, FirmwareError, StateError
from csvfast.errors import FirmwareStatus as S
from csvfast.processor import Options, PlatformState, Processor, StateDirectory, make_session, packet
from csvfast.processor.session import SESSION_BYTES, SessionBlob, make_dh_certificate
from csvfast.processor.state import STATE_FILE
from csvfast.report import GuestPolicy, ReportRequest

Refused = Callable[..., FirmwareError]
MIB = 1 << 20
REUSE = GuestPolicy.of(nodbg=True, nosend=True, asid_reuse=True)


# ---- Memory that changes meanwhile


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_measured_is_what_is_encrypted(threads: int, chip: ChipIdentity) -> None:
    """Another thread of the host writes one block while LAUNCH_UPDATE_DATA runs. It may come before the block is measured (then
    it is measured), or after it was encrypted (then the guest reads noise): never in between."""
    size, address = 32 * 4096 * (8 if threads > 1 else 1), 0x10000
    with csvfast.EncryptedMemory(4 * MIB, threads=threads) as memory, Processor(chip, memory) as processor:
        processor.init()
        handle = processor.launch_start(0)
        processor.activate(handle, 1)
        good, evil = bytes(16), b"evil instruction"
        measured = {sm3(block + bytes(size - 16)).digest(): block for block in (good, evil)}
        outcomes: set[tuple[bytes, bytes]] = set()
        turn, until = 0, time.monotonic() + 60
        # A busy machine may run one of the two threads late for a while.
        while turn < 120 or (len(outcomes) < 2 and time.monotonic() < until):
            turn += 1
            memory.write(address, bytes(size), 0)
            processor.guests[handle].digest = sm3()
            begin = threading.Event()

            def write(delay: float = turn % 30 * 2e-5, begin: threading.Event = begin) -> None:
                raw, patch = memory.raw, bytearray(evil)
                begin.wait()
                start = time.perf_counter()
                while time.perf_counter() - start < delay:
                    pass
                raw[address : address + 16] = patch

            thread = threading.Thread(target=write)
            thread.start()
            begin.set()
            processor.launch_update_data(handle, address, size)
            thread.join()
            found = memory.read(address, 16, 1)
            digest = measured[processor.guests[handle].digest.digest()]
            outcomes.add((digest, found if found in (good, evil) else b"noise"))
            assert found not in (good, evil) or found == digest, "the guest has something else than was measured"
        assert len(outcomes) > 1, "the writer never came in time"


def test_a_packet_that_changes_after_its_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTR is malleable: what is decrypted must be what the MAC covered."""
    tek, tik = bytes(16), bytes(range(16))
    header, sealed = packet.seal_packet(packet.KIND_DATA, tek, tik, b"a secret of 32 bytes............", iv=bytes(16))
    shared = bytearray(sealed)

    class Changing:
        def __init__(self, mac: hmac_sm3) -> None:
            self.mac = mac

        def verify(self, expected: bytes) -> None:
            self.mac.verify(expected)
            shared[0] ^= 0xFF

    honest = packet._mac
    monkeypatch.setattr(packet, "_mac", lambda *arguments: Changing(honest(*arguments)))
    assert packet.open_packet(packet.KIND_DATA, tek, tik, header, shared) == b"a secret of 32 bytes............"
    with pytest.raises(AuthenticationError):
        packet.open_packet(packet.KIND_DATA, tek, tik, header, shared)


# ---- Siblings


@pytest.mark.parametrize(
    "softer",
    [
        GuestPolicy.of(asid_reuse=True, nosend=True),  # without NODBG
        GuestPolicy.of(asid_reuse=True, nodbg=True),  # without NOSEND
        GuestPolicy.of(asid_reuse=True, nodbg=True, nosend=True, api_major=1),
    ],
)
def test_no_sibling_under_a_softer_policy(
    softer: GuestPolicy, processor: Processor, memory: csvfast.EncryptedMemory, pdh: CsvCertificate, refused: Refused
) -> None:
    """Joining an ASID gives the joiner its key. A recorded session of the same owner for a debuggable guest must not do."""
    strict = make_session(pdh, REUSE)
    soft = make_session(pdh, softer, key=strict.key)
    victim = processor.launch_start(REUSE, dh=strict.certificate.encoded, session=strict.blob, user_id=b"u")
    spy = processor.launch_start(softer, dh=soft.certificate.encoded, session=soft.blob, user_id=b"u")
    processor.activate(victim, 1)
    memory.write(0x10000, b"victim's secret.", 0)
    processor.launch_update_data(victim, 0x10000, 16)
    key = processor.guests[spy].vek
    refused(S.ASID_OWNED, processor.activate, spy, 1)
    assert processor.guests[spy].vek is key
    assert processor.guests[spy].asid is None
    assert not key.equals(processor.guests[victim].vek)


def test_noks_keeps_everybody_out(processor: Processor, refused: Refused) -> None:
    policy = GuestPolicy.of(asid_reuse=True, noks=True)
    first, second = (processor.launch_start(policy, user_id=b"u") for _ in range(2))
    processor.activate(first, 1)
    refused(S.ASID_OWNED, processor.activate, second, 1)


def test_an_unnamed_owner_shares_with_nobody(
    processor: Processor, memory: csvfast.EncryptedMemory, pdh: CsvCertificate, refused: Refused
) -> None:
    """A session whose pubkey_digest is zero can be signed again by the host, or the host starts a guest without any session: its
    user id says nothing then."""
    owner = make_session(pdh, REUSE)
    fields = SessionBlob.parse(owner.blob)
    mac = hmac_sm3(
        owner.tik,
        REUSE.to_bytes()
        + fields.ms_enc
        + fields.vm_digest
        + bytes(32)
        + fields.vm_id
        + fields.vm_version
        + fields.user_data,
    ).digest()
    unsigned = replace(fields, pubkey_digest=bytes(32), session_mac=mac)

    def signed(key: SM2PrivateKey) -> dict[str, Any]:
        blob = replace(unsigned, signature=key.sign(unsigned.body, user_id=b"GUEST_USER_ID")).encode()
        assert len(blob) == SESSION_BYTES
        return {"dh": make_dh_certificate(key).encoded, "session": blob}

    victim = processor.launch_start(REUSE, user_id=b"u", **signed(owner.key))
    processor.activate(victim, 1)
    for start in (signed(SM2PrivateKey.generate()), {}):
        spy = processor.launch_start(REUSE, user_id=b"u", **start)
        refused(S.ASID_OWNED, processor.activate, spy, 1)


def test_a_joined_key_lives_as_long_as_somebody_has_it(
    processor: Processor, memory: csvfast.EncryptedMemory, refused: Refused
) -> None:
    first, second = (processor.launch_start(REUSE, user_id=b"u") for _ in range(2))
    processor.activate(first, 1)
    memory.write(0x10000, b"shared pages ...", 1)
    processor.activate(second, 1)
    processor.deactivate(first)
    refused(S.ASID_OWNED, processor.activate, processor.launch_start(0), 1)
    assert memory.read(0x10000, 16, 1) == b"shared pages ..."
    processor.deactivate(second)
    assert memory.asids() == []
    refused(S.DFFLUSH_REQUIRED, processor.activate, second, 1)


# ---- Reports


def test_the_answer_of_a_plain_guest_cannot_go_into_secure_memory(chip: ChipIdentity, refused: Refused) -> None:
    with platform(chip) as processor:
        owner = launch(processor)
        frame = next(iter(processor.csv3_record(processor.guests[owner]).table.entries.values())).frame
        plain = processor.launch_start(0)
        processor.activate(plain, 5)
        processor.launch_measure(plain)
        before = processor.memory.read(frame * 4096, 4096, 0)
        refused(S.INVALID_PAGE_OWNER, processor.attestation, plain, frame * 4096, 4096)
        assert processor.memory.read(frame * 4096, 4096, 0) == before


def test_a_page_is_answered_again(
    processor: Processor, memory: csvfast.EncryptedMemory, running: Callable[..., int]
) -> None:
    """The guest writes a new request over the old answer, whose rest still stands behind it."""
    handle = running()
    for turn in range(3):
        request = ReportRequest.build(b"turn %d" % turn)[: 132 if turn else 4096]
        memory.write(0x40000, request, 1)
        processor.attestation(handle, 0x40000, 4096)
        assert csvfast.report.Report.parse(memory.read(0x40000, 4096, 1), 1).report_data.startswith(b"turn %d" % turn)


# ---- Power off in the wrong order


def test_the_memory_is_closed_first(line: ManufacturingLine, tmp_path: Path) -> None:
    home = tmp_path / "chip"
    line.make_chip().save(home)
    memory = csvfast.EncryptedMemory(MIB)
    processor = Processor.open(home, memory)
    processor.init()
    handles = [processor.launch_start(0) for _ in range(3)]
    keys = [processor.guests[handle].vek for handle in handles]
    for asid, handle in enumerate(handles, 1):
        processor.activate(handle, asid)
    memory.close()
    processor.close()
    assert processor.state is PlatformState.UNINIT
    assert processor.guests == {}
    for key in keys:
        with pytest.raises(csvfast.errors.ClosedError):
            len(memoryview(key))
    StateDirectory(home).close()  # unlocked


# ---- The disk and the directory


@pytest.fixture
def home(line: ManufacturingLine, tmp_path: Path) -> Path:
    directory = tmp_path / "chip"
    line.make_chip().save(directory)
    return directory


def test_a_directory_that_cannot_be_synced_is_put_back(
    home: Path, memory: csvfast.EncryptedMemory, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """A command that was refused must not come true at the next start."""

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with Processor.open(home, memory) as processor:
        with monkeypatch.context() as patch:
            patch.setattr("csvfast.processor.state._sync_directory", fail)
            refused(S.HWERROR_PLATFORM, processor.init)
            assert not (home / STATE_FILE).exists()
            assert processor.state is PlatformState.UNINIT
        processor.init()
        before, stored = processor.pdh_cert_export(), (home / STATE_FILE).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("csvfast.processor.state._sync_directory", fail)
            for command in (processor.pek_gen, processor.pdh_gen):
                refused(S.HWERROR_PLATFORM, command)
            processor.shutdown()
            refused(S.HWERROR_PLATFORM, processor.factory_reset)
        assert (home / STATE_FILE).read_bytes() == stored
        processor.init()
        assert processor.pdh_cert_export() == before
    with Processor.open(home, memory) as processor:
        processor.init()
        assert processor.pdh_cert_export() == before


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_reset_that_cannot_overwrite_still_deletes(
    step: str, home: Path, memory: csvfast.EncryptedMemory, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """What the firmware believes afterwards is what the directory has."""

    def fail(handle: int, *rest: object) -> None:
        if not Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(5, "Input/output error")

    with Processor.open(home, memory) as processor:
        processor.init()
        before = processor.pdh_cert_export()
        processor.shutdown()
        with monkeypatch.context() as patch:
            patch.setattr(f"csvfast.processor.state.os.{step}", fail)
            refused(S.HWERROR_PLATFORM, processor.factory_reset)
        assert not list(home.glob(".platform*"))
        assert not (home / STATE_FILE).exists()
        processor.init()
        after = processor.pdh_cert_export()
        assert after != before
    with Processor.open(home, memory) as processor:
        processor.init()
        assert processor.pdh_cert_export() == after


def test_no_room_for_the_file(home: Path, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    """RLIMIT_FSIZE stands for a full disk: the kernel takes the first half of the file and then refuses."""
    with Processor.open(home, memory) as processor:
        processor.init()
        before, stored = processor.identity, (home / STATE_FILE).read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            for command in (processor.pek_gen, processor.pdh_gen):
                refused(S.HWERROR_PLATFORM, command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert processor.identity is before
        assert (home / STATE_FILE).read_bytes() == stored
        assert not list(home.glob(".platform*"))
        processor.pdh_gen()


def test_the_directory_is_opened_to_others_later(home: Path, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    with Processor.open(home, memory) as processor:
        processor.init()
        before = processor.identity
        home.chmod(0o755)
        error = refused(S.HWERROR_PLATFORM, processor.pdh_gen)
        assert "0755" in str(error)
        assert processor.identity is before
        home.chmod(0o700)
        processor.pdh_gen()


def test_the_directory_is_replaced_under_it(
    home: Path, memory: csvfast.EncryptedMemory, refused: Refused, tmp_path: Path
) -> None:
    """Two processors on one path: the one whose lock is no longer the one in the directory writes nothing."""
    with Processor.open(home, memory) as first:
        first.init()
        (home / "platform.lock").unlink()
        with Processor.open(home, csvfast.EncryptedMemory(MIB)) as second:
            second.init()
            refused(S.HWERROR_PLATFORM, first.pek_gen)
            second.pek_gen()
            stored = (home / STATE_FILE).read_bytes()
            refused(S.HWERROR_PLATFORM, first.pdh_gen)
            assert (home / STATE_FILE).read_bytes() == stored
        home.rename(tmp_path / "elsewhere")
        refused(S.HWERROR_PLATFORM, first.pdh_gen)


def test_a_forked_child(home: Path) -> None:
    """It can neither use the directory nor keep it locked, and its closing does not unlock it for the parent."""
    storage = StateDirectory(home)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # the child says what it saw, and dies only once told to
        answer = b"used"
        try:
            storage.load()
        except StateError as problem:
            answer = b"refused" if "forked child" in str(problem) else b"other"
        os.write(ready[1], answer)
        os.read(done[0], 1)
        storage.close()
        os.write(ready[1], b"closed")
        os.read(done[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 20) == b"refused"
        os.write(done[1], b"1")
        assert os.read(ready[0], 20) == b"closed"
        with pytest.raises(StateError, match="another processor"):
            StateDirectory(home)
        storage.close()
        StateDirectory(home).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


def test_the_lock_does_not_live_on_in_a_child(home: Path) -> None:
    storage = StateDirectory(home)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        storage.close()
        StateDirectory(home).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_read_only_directory(home: Path, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    if os.geteuid() == 0:
        # root writes into any directory: a file in the temporary's place that is no file has the same effect
        with Processor.open(home, memory) as processor:
            processor.init()
            before = processor.identity
            (home / ".platform-state.part").mkdir()
            refused(S.HWERROR_PLATFORM, processor.pek_gen)
            assert processor.identity is before
            (home / ".platform-state.part").rmdir()
            processor.pek_gen()
        return
    with Processor.open(home, memory) as processor:
        processor.init()
        before = processor.identity
        home.chmod(0o500)
        refused(S.HWERROR_PLATFORM, processor.pek_gen)
        home.chmod(0o700)
        assert processor.identity is before


def test_the_firmwares_memory_to_its_last_byte(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Refused
) -> None:
    """A TMR in the middle of the DRAM: the blocks before and behind it are the host's, the first and last in it are not."""
    with Processor(chip, memory) as processor:
        processor.init(es=True, tmr_address=MIB, tmr_length=MIB)
        handle = processor.launch_start(0)
        processor.activate(handle, 1)
        for address in (MIB, 2 * MIB - 16, MIB - 16 + 4):
            refused(S.INVALID_ADDRESS, processor.launch_update_data, handle, address, 16)
        refused(S.INVALID_ADDRESS, processor.launch_update_data, handle, MIB - 16, 32)
        refused(S.INVALID_ADDRESS, processor.launch_update_data, handle, 2 * MIB - 16, 32)
        processor.launch_update_data(handle, MIB - 16, 16)
        processor.launch_update_data(handle, 2 * MIB, 16)


def test_csv3_needs_the_firmwares_memory_as_csv2_does(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Refused
) -> None:
    """Also when the policy says CSV3 without saying ES."""
    with Processor(chip, memory) as processor:
        processor.init()
        for policy in (GuestPolicy.of(csv3=True), GuestPolicy.of(es=True), GuestPolicy.of(es=True, csv3=True)):
            refused(S.POLICY_FAILURE, processor.launch_start, policy)
        assert processor.guests == {}


def test_flushing_cannot_be_skipped(chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    """FACTORY_RESET and a new INIT are no way round a flush."""
    processor = Processor(chip, memory, options=Options(cores=2))
    processor.init()
    processor.activate(processor.launch_start(0), 1)
    processor.shutdown()
    processor.factory_reset()
    processor.init()
    handle = processor.launch_start(0)
    refused(S.DFFLUSH_REQUIRED, processor.activate, handle, 1)
    processor.wbinvd(0)
    refused(S.WBINVD_REQUIRED, processor.df_flush)
    processor.wbinvd(1)
    processor.df_flush()
    processor.activate(handle, 1)
