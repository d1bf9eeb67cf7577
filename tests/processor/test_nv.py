"""INIT_EX with an NV area: the platform's keys in the host's files, sealed."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.mailbox_driver import BUFFER, RAM, TMR, Setup

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import ClosedError, FirmwareError, FirmwareStatus
from csvfast.processor import PlatformState, Processor
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.nv import NV_BYTES
from csvfast.processor.state import STATE_FILE

S = FirmwareStatus
MIB = 1 << 20
NV = 0x80000
FRESH = b"\xff" * NV_BYTES
SIZE = LAYOUTS[Command.INIT_EX].size
Refused = Callable[..., FirmwareError]


@pytest.fixture
def part(chip: ChipIdentity, memory: csvfast.EncryptedMemory) -> Processor:
    """A processor without a directory, before its first INIT."""
    return Processor(chip, memory)


def start(part: Processor, area: bytes | None = None) -> bytes:
    """INIT_EX over this content of the area, or over what stands there; the PDH it found or made."""
    if area is not None:
        part.memory.write(NV, area, 0)
    part.init_ex(nv_address=NV, nv_length=NV_BYTES)
    return part.pdh_cert_export()[0]


def stored(part: Processor) -> bytes:
    return part.memory.read(NV, NV_BYTES, 0)


def take_over(part: Processor) -> None:
    key, name = SM2PrivateKey.generate(), b"HYGON-SSD-OCA"
    oca = CsvCertificate.build(
        usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=key.public_key.point, user_id=name
    ).with_signature(1, key, KeyUsage.OCA, name)
    csr = CsvCertificate.parse(part.pek_csr())
    part.pek_cert_import(csr.with_signature(2, key, KeyUsage.OCA, name).encoded, oca.encoded)


@pytest.mark.parametrize("blank", [FRESH, bytes(NV_BYTES)], ids=["0xff", "zero"])
def test_keys_stand_in_the_area_and_nowhere_else(
    chip: ChipIdentity, part: Processor, memory: csvfast.EncryptedMemory, blank: bytes
) -> None:
    beyond = b"host" * 1024
    memory.write(NV + NV_BYTES, beyond, 0)
    memory.write(NV, blank, 0)
    part.init_ex(nv_address=NV | 1 << 47, nv_length=NV_BYTES + 4096)
    assert memory.read(NV + NV_BYTES, 4096, 0) == beyond, "only the first 32 KiB are the firmware's"
    pdh, chain = part.pdh_cert_export()
    content = stored(part)
    for certificate in (pdh, chain[:2084]):
        assert certificate[16:80] not in content
    assert part.identity is not None
    secret = part.identity.pek_key.secret()
    assert bytes(secret) not in content
    part.close()
    with Processor(chip, memory) as other:
        assert start(other, content) == pdh
        assert other.pdh_cert_export() == (pdh, chain)
        assert stored(other) == content, "nothing changed, nothing is written"


def test_each_change_is_in_the_area_before_the_answer(chip: ChipIdentity, part: Processor) -> None:
    start(part, FRESH)
    seen = {stored(part)}

    def survives() -> None:
        content = stored(part)
        assert content not in seen
        seen.add(content)
        with csvfast.EncryptedMemory(MIB) as memory, Processor(chip, memory) as other:
            assert start(other, content) == part.pdh_cert_export()[0]
            assert other.platform_status().owner == part.platform_status().owner

    part.pdh_gen()
    survives()
    take_over(part)
    assert part.platform_status().owner
    survives()
    part.launch_start(csvfast.report.GuestPolicy.of())
    part.pdh_gen()  # WORKING
    survives()
    part.decommission(1)
    part.pek_gen()
    assert not part.platform_status().owner
    survives()
    last = stored(part)
    part.launch_start(csvfast.report.GuestPolicy.of())
    part.shutdown()
    assert stored(part) == last, "no other command touches it"


def test_one_state_is_never_sealed_twice_alike(part: Processor) -> None:
    start(part, FRESH)
    first = stored(part)
    part.pdh_gen()
    second = stored(part)
    assert first[:16] == second[:16]
    # Another nonce, so another key stream: the padding, the same in both, looks different everywhere.
    assert first[16:28] != second[16:28]
    assert sum(a == b for a, b in zip(first[8192:], second[8192:], strict=True)) < 24576 // 64


def test_a_flipped_bit_anywhere_is_refused(part: Processor, refused: Refused) -> None:
    pdh = start(part, FRESH)
    good = stored(part)
    part.shutdown()
    choose = random.Random(42)
    places = [*range(48), *range(6380, 6440, 3), *range(NV_BYTES - 20, NV_BYTES), *choose.sample(range(NV_BYTES), 400)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << choose.randrange(8)
        error = refused(S.SECURE_DATA_INVALID, start, part, bytes(bad))
        assert part.state is PlatformState.UNINIT
        assert stored(part) == bad, str(error)
    for cut in (0, 28, 6396, NV_BYTES - 1):  # a file that was cut: Linux leaves the rest of its buffer as it was
        for filling in (b"\0", b"\xff"):
            if cut:
                refused(S.SECURE_DATA_INVALID, start, part, good[:cut].ljust(NV_BYTES, filling))
    assert start(part, good) == pdh, "what was refused in between has spoilt nothing"


def test_a_second_try_resets_as_linux_expects(part: Processor, refused: Refused) -> None:
    pdh = start(part, FRESH)
    good = stored(part)
    part.shutdown()
    damaged = good[:100] + b"?" + good[101:]
    refused(S.SECURE_DATA_INVALID, start, part, damaged)
    other = good[:200] + b"?" + good[201:]
    refused(S.SECURE_DATA_INVALID, start, part, other)  # not the bytes that were refused before
    refused(S.SECURE_DATA_INVALID, start, part, damaged)
    new = start(part)
    assert new != pdh
    part.shutdown()
    assert start(part) == new
    part.shutdown()
    refused(S.SECURE_DATA_INVALID, start, part, damaged)  # the leave to reset it has been used up


def test_another_chips_area_is_refused(
    line: ManufacturingLine, part: Processor, memory: csvfast.EncryptedMemory, refused: Refused
) -> None:
    start(part, FRESH)
    part.shutdown()
    with Processor(line.make_chip(), memory) as other:
        refused(S.SECURE_DATA_INVALID, start, other)


def test_an_old_copy_brings_the_old_keys_back(part: Processor) -> None:
    """Inherent: the part has no counter. Documented, so that nobody relies on the contrary."""
    first = start(part, FRESH)
    copy = stored(part)
    take_over(part)
    part.shutdown()
    assert start(part, copy) == first
    assert not part.platform_status().owner


def test_where_an_area_may_be(part: Processor, memory: csvfast.EncryptedMemory, refused: Refused) -> None:
    def attempt(address: int, length: int = NV_BYTES) -> None:
        part.init_ex(nv_address=address, nv_length=length, es=True, tmr_address=2 * MIB, tmr_length=MIB)

    for length in (0, 1, 4096, NV_BYTES - 1):
        assert refused(S.INVALID_LENGTH, attempt, NV, length).needed == {"nv_length": NV_BYTES}
    for address in (NV + 1, NV + 16, 4 * MIB - NV_BYTES + 4096, 4 * MIB, 1 << 46, 1 << 63, 2 * MIB, 3 * MIB - 4096):
        refused(S.INVALID_ADDRESS, attempt, address)
    refused(S.INVALID_ADDRESS, attempt, 2 * MIB - NV_BYTES + 4096)
    refused(S.INVALID_ADDRESS, attempt, MIB, MIB + 4096)  # 32 KiB would do, but the length given reaches into the TMR
    refused(S.INVALID_ADDRESS, attempt, NV, 0xFFFFFFFF)
    assert not any(memory.read(0, 4 * MIB, 0)), "a refusal writes nothing"
    attempt(2 * MIB - NV_BYTES)
    refused(S.INVALID_PLATFORM_STATE, attempt, 2 * MIB - NV_BYTES)


def test_the_parts_own_keys_are_left_alone(chip: ChipIdentity, memory: csvfast.EncryptedMemory, tmp_path: Path) -> None:
    chip.save(tmp_path / "chip")
    with Processor.open(tmp_path / "chip", memory) as part:
        part.init()
        own = part.pdh_cert_export()[0]
        part.shutdown()
        before = (tmp_path / "chip" / STATE_FILE).read_bytes()
        assert start(part, FRESH) != own
        part.pek_gen()
        pdh = part.pdh_cert_export()[0]
        assert (tmp_path / "chip" / STATE_FILE).read_bytes() == before
        part.shutdown()
        area = stored(part)
        part.init_ex()  # without an area: as INIT
        assert part.pdh_cert_export()[0] == own
        part.pdh_gen()
        assert stored(part) == area
        own = part.pdh_cert_export()[0]
        part.shutdown()
        assert start(part) == pdh
        part.shutdown()
        part.init()
        assert part.pdh_cert_export()[0] == own


def test_a_part_without_a_directory_keeps_its_own_keys_too(part: Processor) -> None:
    part.init()
    own = part.pdh_cert_export()[0]
    part.shutdown()
    assert start(part, FRESH) != own
    part.shutdown()
    part.init()
    assert part.pdh_cert_export()[0] == own


def test_factory_reset_blanks_the_area(part: Processor) -> None:
    part.init()
    own = part.pdh_cert_export()[0]
    part.shutdown()
    first = start(part, FRESH)
    part.shutdown()
    part.factory_reset()
    assert stored(part) == FRESH
    assert start(part) != first
    part.shutdown()
    part.init()
    assert part.pdh_cert_export()[0] == own
    part.shutdown()
    part.memory.write(NV, b"the host's again", 0)
    part.factory_reset()  # after a plain INIT: the part's own keys
    assert part.memory.read(NV, 16, 0) == b"the host's again"
    part.init()
    assert part.pdh_cert_export()[0] != own


class TornMemory:
    """Memory whose next write stops half-way, as the machine's power does."""

    def __init__(self, memory: csvfast.EncryptedMemory) -> None:
        self._memory = memory
        self.limit: int | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)

    def write(self, address: int, data: bytes, asid: int) -> None:
        if self.limit is None:
            self._memory.write(address, data, asid)
            return
        self._memory.write(address, data[: self.limit], asid)
        raise ClosedError("power off")


@pytest.mark.parametrize("written", [0, 5000, NV_BYTES])
def test_power_goes_in_the_middle_of_a_command(
    chip: ChipIdentity, memory: csvfast.EncryptedMemory, refused: Refused, written: int
) -> None:
    torn = TornMemory(memory)
    part = Processor(chip, torn)  # type: ignore[arg-type]
    before = start(part, FRESH)
    file = stored(part)  # what the host has on its disk
    torn.limit = written
    with pytest.raises(ClosedError):
        part.pdh_gen()
    assert part.pdh_cert_export()[0] == before, "it takes effect only once it stands in the area"
    with csvfast.EncryptedMemory(MIB) as other_memory, Processor(chip, other_memory) as other:
        assert start(other, file) == before
        other.shutdown()
        left = stored(part)
        if written == 0:
            assert start(other, left) == before
        elif written == NV_BYTES:
            assert start(other, left) != before, "the command was done, only its answer is missing"
        else:
            refused(S.SECURE_DATA_INVALID, start, other, left)


# One process forks the children that are killed: starting Python for each would take most of the time.
CHILD = """
import os, sys
import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.processor import Processor

chip = ChipIdentity.load(sys.argv[1])

def work():
    part = Processor(chip, csvfast.EncryptedMemory(path=sys.argv[2]))
    part.init_ex(nv_address=%d, nv_length=%d)
    while True:
        os.write(1, part.pdh_cert_export()[0][:80].hex().encode() + b"\\n")
        part.pdh_gen()

for line in sys.stdin:
    child = os.fork()
    if not child:
        work()
    os.write(1, b"child %%d\\n" %% child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_killed_between_and_within_commands(line: ManufacturingLine, tmp_path: Path) -> None:
    """On a DRAM that outlives the process: the keys of the last answer, newer ones, or a clear refusal."""
    chip, choose = line.make_chip(), random.Random(3)
    chip.save(tmp_path / "chip")
    outcomes = []
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD % (NV, NV_BYTES), str(tmp_path / "chip"), str(tmp_path / "dram")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with csvfast.EncryptedMemory(MIB, path=tmp_path / "dram") as memory:
        memory.write(NV, FRESH, 0)
        for _ in range(30):
            parent.stdin.write("go\n")
            child, said, wanted = 0, [], choose.randrange(1, 5)
            while not child or len(said) < wanted:
                word = parent.stdout.readline().strip()
                assert word, "the process that forks has died"
                if word.startswith("child "):
                    child = int(word[6:])
                else:
                    said.append(word)
            time.sleep(choose.uniform(0, 0.001))
            os.kill(child, signal.SIGKILL)
            while (word := parent.stdout.readline().strip()) != "dead":
                assert word
                said.append(word)
            with Processor(chip, memory) as part:
                area = stored(part)
                try:
                    found = start(part)[:80].hex()
                except FirmwareError:  # of the write itself a part: a few microseconds of each change
                    memory.write(NV, FRESH, 0)
                    outcomes.append("torn")
                    continue
            assert area[:12] == b"CSVFNVAR\1\0\0\0", "found by chance"
            assert found not in said[:-1], "an answered change is lost"
            outcomes.append("last" if found == said[-1] else "newer")
    parent.stdin.close()
    parent.stdout.close()
    parent.wait(timeout=30)
    assert outcomes.count("torn") < 10, outcomes
    assert len(outcomes) == 30


def test_by_command_buffers_as_linux_does(line: ManufacturingLine) -> None:
    """sev-dev.c: file into the buffer, INIT_EX, once more after SECURE_DATA_INVALID, buffer into the file."""
    setup = Setup(line=line)
    driver, file = setup.driver, bytearray(b"\xff" * NV_BYTES)

    def load() -> FirmwareStatus:
        driver.write(RAM, bytes(file))
        status, _ = driver.run(
            Command.INIT_EX, length=SIZE, flags=1, tmr_address=TMR, tmr_length=MIB, nv_address=RAM, nv_length=NV_BYTES
        )
        return status

    def keep() -> None:
        file[:] = driver.read(RAM, NV_BYTES)

    def pdh() -> bytes:
        driver.done(
            Command.PDH_CERT_EXPORT, pdh_address=BUFFER, pdh_length=2084, chain_address=BUFFER + 4096, chain_length=6252
        )
        return driver.read(BUFFER, 2084)

    assert load() is S.SUCCESS
    keep()
    driver.done(Command.PDH_GEN)
    keep()
    wanted = pdh()
    driver.done(Command.SHUTDOWN)
    assert load() is S.SUCCESS
    assert pdh() == wanted
    driver.done(Command.SHUTDOWN)
    file[77] ^= 1
    assert load() is S.SECURE_DATA_INVALID
    assert load() is S.SUCCESS
    keep()
    assert pdh() != wanted
    driver.done(Command.SHUTDOWN)
    driver.done(Command.FACTORY_RESET)
    keep()
    assert file == FRESH
    status, block = driver.run(Command.INIT_EX, length=SIZE, nv_address=RAM, nv_length=NV_BYTES - 1)
    assert (status, block["nv_length"]) == (S.INVALID_LENGTH, NV_BYTES - 1), "an input field; nothing is written back"
    setup.processor.close()


def test_an_area_that_became_a_guests_is_not_written(line: ManufacturingLine) -> None:
    smr, smcr = 8 * MIB, 16 * MIB
    setup = Setup(smcr + 256 * MIB, line)
    driver, part = setup.driver, setup.processor
    part.init_ex(nv_address=smr, nv_length=NV_BYTES, es=True, tmr_address=TMR, tmr_length=MIB)
    pdh = part.pdh_cert_export()[0]
    part.set_smr(8 * MIB, [(smr, 8 * MIB)])
    part.set_smcr(smcr, 256 * MIB)
    handle = driver.done(Command.LAUNCH_START, policy=0x44)["handle"]
    driver.write(BUFFER, struct.pack("<QQ", smr, 8 * MIB))
    driver.done(Command.SET_GUEST_PRIVATE_MEMORY, handle=handle, region_count=1, regions_address=BUFFER)
    before = driver.read(smr, NV_BYTES)
    assert driver.run(Command.PDH_GEN)[0] is S.INVALID_PAGE_OWNER
    assert part.pdh_cert_export()[0] == pdh
    assert driver.read(smr, NV_BYTES) == before
    driver.done(Command.DECOMMISSION, handle=handle)
    driver.done(Command.PDH_GEN)
    part.close()
