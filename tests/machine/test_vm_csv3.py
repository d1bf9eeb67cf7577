"""CSV3 virtual machines: RAM in secure memory, registers and reports through the secure call pages; one boot for all of that."""

from __future__ import annotations

import base64
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from machine import qemu_guest, vm_platform
from machine.vm_platform import Platform, make, plan

from csvfast.attest import verify
from csvfast.crypto import sm3
from csvfast.errors import (
    AllocationError,
    ArgumentError,
    FirmwareError,
    FirmwareStatus,
    FormatError,
    StateError,
    VerificationError,
)
from csvfast.machine.guest import (
    ChannelOperation,
    ProcessorChannel,
    RequestPage,
    SecureCallPages,
    SecureCallTransport,
    secure_call,
)
from csvfast.machine.guest.secure_call import _check_block
from csvfast.machine.initrd import build_initrd
from csvfast.machine.vm import CsvVm
from csvfast.machine.vm_csv3 import PARAMETERS, RESERVATION, SECURE_CALLS, check_policy, dram_bytes, with_secure_calls
from csvfast.machine.vm_qemu import ram_ranges
from csvfast.machine.vm_requests import GuestRequests
from csvfast.measure import launch_digest
from csvfast.measure.launch import secure_call_page
from csvfast.processor.commands import Command
from csvfast.processor.csv3 import Csv3Guest
from csvfast.processor.sealing import sealing_key
from csvfast.processor.secure_call import PAGE_GUID, boot_pages
from csvfast.processor.vmm import GuestPlan, Host, LaunchedGuest
from csvfast.processor.vmm_csv3 import set_secure_memory
from csvfast.report import Evidence, GuestPolicy, Report, ReportRequest

PAGE = 4096
MIB = 1 << 20
CSV3 = GuestPolicy(0x45)
EVENTS = [sm3(b"the first thing that runs").digest(), sm3(b"the second").digest()]
TEXT = b"words that only the guest has seen "
FIRMWARE_BYTES = 256 << 10

needs_qemu = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)

RUN = "python3 /root/work.py"
PORT = "org.csvfast.test.0"
# One Python for all of it: each start of one costs a second here.
WORK = f"""
import contextlib, io, threading
from csvfast import sm3
from csvfast.machine.guest.__main__ import main
from csvfast.machine.guest.client import GuestDevice
from csvfast.machine.guest.device import CuseDevice, DeviceRequests

def say(name, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(arguments))
    print("word:", name, code, out.getvalue().replace("\\n", " "), flush=True)

say("first", "rtmr")
for register, digest in ((3, "{EVENTS[0].hex()}"), (3, "{EVENTS[1].hex()}"), (4, "{EVENTS[0].hex()}"), (0, "{EVENTS[0].hex()}")):
    say("extended" + str(register), "extend", str(register), digest)
say("v2", "report", "--extended", "--data", "6368616c6c656e6765")
say("v1", "report", "--data", "6368616c6c656e6765")
say("sealed", "sealing-key", "--out", "/root/key")
print("word: key", sm3(open("/root/key", "rb").read()).hexdigest())
with GuestDevice.open() as device:
    ready = threading.Event()
    server = CuseDevice(DeviceRequests(device.transport), ready=ready.set)
    thread = threading.Thread(target=server.serve)
    thread.start()
    ready.wait(30)
    say("device", "--device", "/dev/csv-guest", "rtmr")
    server.close()
    thread.join(30)
text = b"words that only" + b" the guest has seen "
kept = bytearray(text * (4 << 20 >> 5))
print("word: holds", len(kept), flush=True)
with open("/dev/virtio-ports/{PORT}", "rb", buffering=0) as port:
    port.read(1)
raise SystemExit(9)
"""


def csv3_plan(initrd: Path | None, append: str = "", **changes: Any) -> GuestPlan:
    fields: dict[str, Any] = {"policy": CSV3, "secure_calls": SECURE_CALLS}
    found = plan(initrd, f"{append} {RESERVATION}".strip(), **(fields | changes))
    return found if found.kernel is not None else replace(found, append=None)


def record_of(place: Platform, launched: LaunchedGuest) -> Csv3Guest:
    return place.processor.csv3_record(place.processor.guest(launched.handle))


# ---- In the guest


@dataclass
class Story:
    """What was seen of one machine."""

    words: dict[str, str] = field(default_factory=dict)
    console: str = ""
    code: int | None = None
    status: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    seen: dict[str, Any] = field(default_factory=dict)
    chip: Any = None


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("csv3")
    initrd = build_initrd(folder / "initrd", run=RUN, files={"/root/work.py": WORK.encode()})
    root = folder / "run"
    root.mkdir()
    guest = csv3_plan(initrd.path, "", memory_size=256 * MIB)
    found = Story()
    # What the owner of the guest computes, from the files alone.
    found.digest = launch_digest(
        guest.firmware, kernel=guest.kernel, initrd=guest.initrd, append=guest.append, force_hash_table=True, csv3=True,
        secure_calls=SECURE_CALLS,
    ).hexdigest  # fmt: skip
    ours, theirs = socket.socketpair()
    with (
        ours,
        vm_platform.platform(dram_bytes(guest, FIRMWARE_BYTES)) as place,
        make(place, guest, root, window="1/8", expected=bytes.fromhex(found.digest), ports={PORT: theirs}) as machine,
    ):
        with theirs:
            machine.launch()
        launched = cast(LaunchedGuest, machine.launched)
        found.chip = place.processor.chip
        # A host that answers a fault which never was: the pair is the other way round from here on.
        with Host(place.machine) as host:
            host.run(Command.UPDATE_NPT, handle=launched.handle, error_code=4, gpa=SECURE_CALLS + 2 * PAGE, level=1)
        end = time.monotonic() + 90
        while "word: holds" not in machine.console() and machine.running and time.monotonic() < end:
            time.sleep(0.05)
        if machine.running:
            found.seen = look(place, machine, launched, folder)
            ours.sendall(b"!")
        found.code = machine.wait(60)
        found.console = machine.console() + machine.errors()
        found.status = machine.status()
        found.seen["left"] = place.count(TEXT)
    for line in found.console.splitlines():
        if line.startswith("word: "):
            name, _, rest = line.removeprefix("word: ").partition(" ")
            found.words[name] = rest.strip()
    found.seen["files"] = list(root.iterdir())
    return found


def look(place: Platform, machine: CsvVm, launched: LaunchedGuest, folder: Path) -> dict[str, Any]:
    """From outside, while the guest keeps its words in RAM."""
    seen: dict[str, Any] = {"text": place.count(TEXT), "kernel": place.count(qemu_guest.KERNEL_TEXT)}
    machine.dump(folder / "dump")  # the window is in the DRAM now
    seen["dump"] = qemu_guest.count(folder / "dump", TEXT)
    seen["text"] += place.count(TEXT)
    with_key = [place.processor.memory.read(launched.ram + at, MIB, launched.asid) for at in range(0, 256 * MIB, MIB)]
    seen["with key"] = sum(part.count(TEXT) for part in with_key)
    seen["command"] = place.machine.command(Command.PLATFORM_STATUS, launched.ram + SECURE_CALLS)
    guest = place.processor.guest(launched.handle)
    seen["key"] = sm3(bytes(sealing_key(place.processor.chip.root_secret, guest))).hexdigest()
    seen["state"] = machine.status()["state"]
    return seen


@needs_qemu
def test_guest_runs_and_its_init_reports(story: Story) -> None:
    assert story.code == 9, story.console
    assert story.status["refused"] == 0
    assert story.status["digest"] == story.digest
    assert story.seen["files"] == []


@needs_qemu
def test_registers(story: Story) -> None:
    assert story.words["first"].startswith(f"0 version 1, state 1 0 {story.digest} 1 {'00' * 32}"), story.console
    third = sm3(sm3(bytes(32) + EVENTS[0]).digest() + EVENTS[1]).hexdigest()
    fourth = sm3(bytes(32) + EVENTS[0]).hexdigest()
    expected = f"0 version 1, state 2 0 {story.digest} 1 {'00' * 32} 2 {'00' * 32} 3 {third} 4 {fourth}"
    assert story.words["device"] == expected, "through /dev/csv-guest, as programs of real guests read them"
    assert (story.words["extended3"], story.words["extended4"]) == ("0", "0")
    assert "register 0; expected 1 to 4" in story.words["extended0"]


@needs_qemu
@pytest.mark.parametrize("version", [1, 2])
def test_reports_verify_under_the_simulators_root_only(story: Story, version: int) -> None:
    report = Report.parse(base64.b64decode(story.words[f"v{version}"].removeprefix("0 "), validate=True))
    evidence = Evidence(report, hsk_cek=story.chip.hsk_cek, encoding="page")
    verify(evidence, roots=(story.chip.root,), report_data=b"challenge")
    with pytest.raises(VerificationError):
        verify(evidence)
    with pytest.raises(VerificationError):
        verify(evidence, roots=(story.chip.root,), report_data=b"another challenge")
    assert report.version == version
    assert report.measure.hex() == story.digest
    assert report.policy == CSV3
    assert report.sealing_key == bytes(32), "it stays in the guest"
    if version == 2:
        assert report.rtmrs[0].hex() == story.digest
        assert report.rtmrs[3] == sm3(sm3(bytes(32) + EVENTS[0]).digest() + EVENTS[1]).digest()
        assert report.rtmrs[4] == sm3(bytes(32) + EVENTS[0]).digest()


@needs_qemu
def test_sealing_key_is_the_guests(story: Story) -> None:
    assert story.words["key"] == story.seen["key"]


@needs_qemu
def test_ram_is_ciphertext(story: Story) -> None:
    assert int(story.words["holds"]) >= 4 * MIB
    assert story.seen["with key"] > 100_000, "the words are there, for who has the key"
    assert (story.seen["text"], story.seen["kernel"], story.seen["dump"], story.seen["left"]) == (0, 0, 0, 0)
    assert story.seen["state"] == "running"
    assert story.seen["command"] is FirmwareStatus.INVALID_PAGE_OWNER, "no command may name the guest's frames"


@needs_qemu
def test_command_line(tmp_path: Path) -> None:
    """`measure launch --csv3` predicts, `vm run --policy 0x45` runs only that; its init says nothing."""
    initrd = qemu_guest.build_initrd(tmp_path)
    append = "console=ttyS0 quiet panic=-1 work=1 rounds=1"
    kernel = qemu_guest.boot_files() / "vmlinuz"
    environment = os.environ | {
        "XDG_RUNTIME_DIR": str(tmp_path), "CSVFAST_VMRAM_LIBRARY": str(qemu_guest.preload_library()),
    }  # fmt: skip

    def csvfast(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "csvfast", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)

    files = ["--kernel", str(kernel), "--initrd", str(initrd)]
    predicted = csvfast(
        "measure", "launch", "--firmware", str(vm_platform.firmware()), *files, "--append", f"{append} {PARAMETERS}",
        "--force-hash-table", "--csv3", "--secure-calls", hex(SECURE_CALLS),
    ).stdout.strip()  # fmt: skip
    run = ["vm", "run", *files, "--memory", "128MiB", "--accel", "tcg", "--policy", "0x45", "--append", append]
    done = csvfast(*run, "--expect", predicted)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "without `guest: exit N`" in done.stderr
    assert "guest: text written" in done.stdout
    wrong = csvfast(*run, "--expect", "00" * 32)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert predicted in wrong.stderr


# ---- The launch, without QEMU


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"a kernel".ljust(2 * PAGE, b"\x90"))
    return path


def launch(place: Platform, guest: GuestPlan) -> LaunchedGuest:
    with Host(place.machine) as host:
        host.initialise()
        launched = host.launch(guest)
        host.finish(launched.handle)
    return launched


def hand_over(place: Platform, launched: LaunchedGuest, ram: list[tuple[int, int, int]]) -> None:
    out, into = os.pipe2(os.O_CLOEXEC)
    try:
        place.processor.key_memory_controller(launched.handle, into, ram)
    finally:
        os.close(out)
        os.close(into)


@pytest.mark.parametrize("size", [64 * MIB, 5 << 30])
def test_launch_costs_the_same_for_any_ram(kernel: Path, size: int) -> None:
    guest = csv3_plan(None, kernel=kernel, memory_size=size)
    with vm_platform.platform(dram_bytes(guest, FIRMWARE_BYTES)) as place:
        launched = launch(place, guest)
        ram = [(gpa, launched.ram + offset, length) for gpa, offset, length in ram_ranges(size)]
        hand_over(place, launched, ram)
        assert os.fstat(place.descriptor).st_blocks * 512 < 4 * MIB, "what nobody has written takes no memory"
        record = record_of(place, launched)
        assert len(record.table.entries) < 100
        # Every page of RAM has its frame, the high part behind the low one; nothing else has one of these.
        last = ram[-1][0] + ram[-1][2] - PAGE
        assert record.placed_frame(last // PAGE) == (launched.ram + size) // PAGE - 1
        assert record.placed_frame(last // PAGE + 1) is None
        inside = range(launched.ram // PAGE, (launched.ram + size) // PAGE)
        others = [frame for frame, _ in record.vcpus.values()]
        others += [entry.frame for gfn, entry in record.table.entries.items() if record.placed_frame(gfn) is None]
        assert not [frame for frame in others if frame in inside]
        free = record.pool.take(record.pool.free)
        assert not [first for first, count in free if first in inside or first + count - 1 in inside]


def test_digest_is_what_the_processor_measures(kernel: Path) -> None:
    base = csv3_plan(None, kernel=kernel, memory_size=64 * MIB)
    digests = set()
    for changed in (base, replace(base, append=f"x {RESERVATION}"), replace(base, cpu_signature=0x900F01)):
        with vm_platform.platform(dram_bytes(base, FIRMWARE_BYTES)) as place:
            launched = launch(place, changed)
            measured = place.processor.guest(launched.handle).measure
            assert measured == launched.predicted.digest
            assert launched.secure_calls == SECURE_CALLS + PAGE
            digests.add(measured)
    assert len(digests) == 3
    plain = launch_digest(base.firmware, kernel=kernel, append=base.append, force_hash_table=True, vmsa="amd")
    assert plain.digest not in digests


def test_two_guests_in_one_secure_memory(kernel: Path) -> None:
    guest = csv3_plan(None, kernel=kernel, memory_size=64 * MIB)
    size = dram_bytes(guest, FIRMWARE_BYTES)
    with vm_platform.platform(size + 80 * MIB) as place:
        with Host(place.machine) as host:
            host.initialise()
            set_secure_memory(host, 2 * 72 * MIB)
            set_secure_memory(host, 10 << 30)  # it is set already
        first, second = launch(place, guest), launch(place, guest)
        assert abs(first.ram - second.ram) >= 72 * MIB
        assert first.predicted.digest == second.predicted.digest
        with pytest.raises(AllocationError, match="no 75497472 free bytes in a row"):
            launch(place, guest)
        assert place.machine.guests() == [first.handle, second.handle]
        frame = first.ram + SECURE_CALLS
        page = secure_call_page(SECURE_CALLS + PAGE)
        assert place.processor.memory.read(frame, PAGE, first.asid) == page
        assert place.processor.memory.read(frame, PAGE, second.asid) != page
        with pytest.raises(FirmwareError, match="INVALID_PAGE_OWNER"):
            hand_over(place, first, [(0, second.ram, 64 * MIB)])
        with pytest.raises(FirmwareError, match="INVALID_PAGE_OWNER"):
            hand_over(place, first, [(0, first.ram + PAGE, 32 * MIB)])  # measured pages would be other pages
        with pytest.raises(FirmwareError, match="INVALID_ADDRESS"):
            hand_over(place, first, [(0, first.ram, 64 * MIB - 1)])
        with Host(place.machine) as host:
            host.stop(first.handle)
            again = launch(place, guest)
            assert again.ram == first.ram


def test_secure_memory_comes_before_other_guests(kernel: Path) -> None:
    guest = csv3_plan(None, kernel=kernel, memory_size=64 * MIB)
    with vm_platform.platform(dram_bytes(guest, FIRMWARE_BYTES) + 80 * MIB) as place:
        other = launch(place, replace(guest, policy=GuestPolicy(1), secure_calls=None))
        with pytest.raises(FirmwareError, match="INVALID_PLATFORM_STATE"):
            launch(place, guest)
        assert place.machine.guests() == [other.handle]
        with Host(place.machine) as host:
            host.stop(other.handle)
        launch(place, guest)


def test_refused_plans(kernel: Path, tmp_path: Path) -> None:
    guest = csv3_plan(None, kernel=kernel, memory_size=64 * MIB)
    with vm_platform.platform(64 * MIB) as place:
        for changes, words in (
            ({"append": "console=ttyS0"}, "expected memmap=SIZE"),
            ({"append": "memmap=8K$0xf81000"}, "expected memmap=SIZE"),
            ({"append": "memmap=1M@0xf00000"}, "expected memmap=SIZE"),
            ({"policy": GuestPolicy(0x40)}, "CSV3 without ES"),
            ({"policy": GuestPolicy(0x05)}, "does not ask for CSV3"),
        ):
            with pytest.raises(ArgumentError, match=words):
                make(place, replace(guest, **cast(dict[str, Any], changes)), tmp_path)
        with pytest.raises(AllocationError, match="268435456 free bytes"):
            launch(place, guest)
        assert place.machine.guests() == []
    for append in ("memmap=12K$0xf80000", "quiet memmap=1M$15M x", "memmap=64K#1G,1M$0xf00000", "memmap=1048576$15728640"):
        check_policy(replace(guest, append=append))
    assert with_secure_calls(replace(guest, secure_calls=None, append="quiet")).append == f"quiet {PARAMETERS}"
    assert with_secure_calls(replace(guest, policy=GuestPolicy(5), secure_calls=None)).secure_calls is None


def test_firmware_that_names_the_pages_itself(kernel: Path, tmp_path: Path) -> None:
    """As Hygon's OVMF does: nothing is added, and the pages are where it says."""
    path = tmp_path / "firmware"
    path.write_bytes(bytes(7 * PAGE) + secure_call_page(0x80F000))
    guest = csv3_plan(None, firmware=path, kernel=None, force_hash_table=False, memory_size=64 * MIB)
    assert with_secure_calls(replace(guest, secure_calls=None)).secure_calls is None
    with vm_platform.platform(dram_bytes(guest, 8 * PAGE)) as place:
        assert launch(place, replace(guest, secure_calls=None)).secure_calls == 0x80F000
        with pytest.raises(ArgumentError, match="names secure call pages at 0x80f000 itself"):
            launch(place, guest)
    assert boot_pages(path.read_bytes()) == 0x80F000


# ---- The guest's end of a secure call


class Firmware:
    """A channel whose host swaps a pair, as the firmware does: only a call at the hidden page is answered."""

    def __init__(self, memory: bytearray, answer: int, hidden: int) -> None:
        self.memory, self.answer, self.hidden = memory, answer, hidden
        self.asked: list[int] = []

    def call(self, operation: ChannelOperation, address: int, _length: int) -> int:
        assert operation is ChannelOperation.SECURE_CALL
        self.asked.append(address)
        if address == 0x5000 + self.hidden * PAGE:
            if self.answer:
                self.memory[16:20] = self.answer.to_bytes(4, "little")
                self.memory[32:36] = self.memory[32:36][::-1]
            self.hidden ^= 1
        return 0


def pages() -> tuple[SecureCallPages, bytearray]:
    memory = bytearray(PAGE)
    return SecureCallPages(cast(Any, memory), 0x5000), memory


@pytest.mark.parametrize("hidden", [0, 1])
def test_calls_find_the_hidden_page(hidden: int) -> None:
    pair, memory = pages()
    firmware = Firmware(memory, 0x6B, hidden)
    for _ in range(3):
        assert pair.call(cast(ProcessorChannel, firmware), 8, b"abcd") == b"dcba"
    first = [0x6000, 0x5000] if hidden == 0 else [0x6000]
    assert firmware.asked[: len(first)] == first
    assert len(firmware.asked) == len(first) + 2, "after the first call the guest knows which one it is"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(0, FormatError), (8, FormatError), (0x71, FormatError), *((code, FirmwareError) for code in range(0x6C, 0x71))],
)
def test_refused_calls(answer: int, problem: type[Exception]) -> None:
    pair, memory = pages()
    with pytest.raises(problem):
        pair.call(cast(ProcessorChannel, Firmware(memory, answer, 1)), 8, bytes(32))


@pytest.mark.parametrize(
    ("words", "ranges", "place"),
    [
        ("quiet", "00f00000-00ffffff : Reserved", 0xF81000),
        ("quiet", "00f00000-00f81fff : Reserved", None),  # the second page is the kernel's
        ("quiet", "00f00000-00ffffff : System RAM", None),
        ("quiet", "80f00000-bfffffff : Reserved\n  00f81000-00f82fff : reserved", 0xF81000),
        ("quiet csvfast.secure_calls=0xf90000", "00f00000-00ffffff : Reserved", 0xF90000),
        ("csvfast.secure_calls=0xF90000 quiet", "00f00000-00ffffff : Reserved", 0xF90000),
        ("csvfast.secure_calls=0xfff000", "00f00000-00ffffff : Reserved", None),
        ("csvfast.secure_calls=0xf90010", "00f00000-00ffffff : Reserved", None),
        ("csvfast.secure_calls=0xf81000", "", None),
    ],
)
def test_the_pages_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, ranges: str, place: int | None
) -> None:
    for name, text in (("COMMAND_LINE", f"{words}\n"), ("RANGES", f"00000000-00000fff : Reserved\n{ranges}\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(secure_call, name, str(tmp_path / name))
    monkeypatch.setattr(secure_call, "MEMORY", str(tmp_path / "memory"))
    with (tmp_path / "memory").open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(SECURE_CALLS)
        file.write(secure_call_page(SECURE_CALLS + PAGE) + PAGE_GUID)
    if place is None:
        with pytest.raises(StateError, match=r"secure call pages"):
            SecureCallPages.find()
        return
    found = SecureCallPages.find()
    assert found.address == place
    found.close()
    found.close()


def test_report_blocks() -> None:
    _check_block(bytes(56))
    _check_block(bytes(52) + b"\xff" * 4)  # not answered: asked again
    with pytest.raises(FirmwareError, match="SECURE_DATA_INVALID"):
        _check_block(bytes(52) + int(FirmwareStatus.SECURE_DATA_INVALID).to_bytes(4, "little"))
    with pytest.raises(FormatError, match="a status of the firmware"):
        _check_block(bytes(52) + b"\xfe" * 4)


class Reports:
    """A channel and a pair: the firmware answers by `answers`, one after the other, in the page that it is shown."""

    address = 0x5000

    def __init__(self, page: RequestPage, answers: list[bytes | int | None]) -> None:
        self.page, self.answers = page, answers
        self.flushed: list[int] = []

    def call(self, *arguments: Any) -> Any:
        if arguments[0] is ChannelOperation.FLUSH:
            self.flushed.append(arguments[1])
            return 0
        _, request, entry = arguments
        place, size = struct.unpack("<QQ", entry)
        assert (request, size) == (7, 56)
        answer = self.answers.pop(0)
        if isinstance(answer, bytes):
            self.page.memory[: len(answer)] = answer
        if answer is not None:
            error = answer if isinstance(answer, int) else 0
            ctypes.memmove(place + 52, error.to_bytes(4, "little"), 4)
        return entry


@pytest.mark.parametrize(
    ("answers", "problem", "moves"),
    [
        ([b"answer"], None, 0),
        ([None, None, b"answer"], None, 0),  # what the firmware wrote was overwritten by an old copy
        ([int(FirmwareStatus.SECURE_DATA_INVALID)], FirmwareError, 0),
        ([int(FirmwareStatus.SECURE_DATA_INVALID), b"answer"], None, 1),  # it was shown another page
        ([None] * 4, StateError, 0),
        ([1] * 4, StateError, 4),
    ],
)
def test_reports_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, answers: list[bytes | int | None], problem: type[Exception] | None, moves: int
) -> None:
    with RequestPage() as page:
        page.write(ReportRequest.build(b"data", extended=True))
        firmware = Reports(page, answers)
        looks = 0

        def address(self: RequestPage) -> int:
            nonlocal looks
            looks += self is page
            # Looked at twice a turn: moved between the two.
            return self.virtual_address + (PAGE if self is page and looks % 2 == 0 and looks <= 2 * moves else 0)

        monkeypatch.setattr(RequestPage, "address", property(address))
        transport = SecureCallTransport(cast(ProcessorChannel, firmware), cast(SecureCallPages, firmware))
        if problem is None:
            transport.attestation(page)
            assert page.memory[:6] == b"answer"
            assert not answers
        else:
            with pytest.raises(problem):
                transport.attestation(page)
        assert firmware.flushed.count(page.virtual_address) >= 2


# ---- The host's end


class Control:
    """Of a memory: what is evicted, and whether it fails."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.problem = False

    def evict(self, offset: int, length: int) -> None:
        self.log.append((offset, length))
        if self.problem:
            raise StateError("the memory is gone")


def test_what_the_host_does(kernel: Path) -> None:
    size = 3 << 30
    guest = csv3_plan(None, kernel=kernel, memory_size=size)
    with vm_platform.platform(dram_bytes(guest, FIRMWARE_BYTES)) as place, Host(place.machine) as host:
        host.initialise()
        launched = host.launch(guest)
        host.finish(launched.handle)
        control = Control()
        requests = GuestRequests(host, threading.Lock(), cast(Any, control), guest, launched)
        assert requests.info() == (0x45, 3)
        pair = launched.secure_calls or 0
        table = record_of(place, launched).table.entries
        requests.secure_call(pair + PAGE)
        assert control.log == [(pair, PAGE), (pair, PAGE)], "out of the window before, and what was read ahead after"
        assert (table[pair // PAGE].present, table[pair // PAGE + 1].present) == (False, True)
        requests.secure_call(pair + PAGE)
        assert table[pair // PAGE + 1].present, "it was not hidden"
        requests.secure_call(pair)
        assert table[pair // PAGE].present
        for gpa in (0, pair - PAGE, pair + 2 * PAGE, 1 << 40):
            with pytest.raises(FirmwareError, match="INVALID_ADDRESS"):
                requests.secure_call(gpa)
        control.log.clear()
        for gpa, offset in ((0, 0), ((2 << 30) - PAGE, (2 << 30) - PAGE), (4 << 30, 2 << 30), ((5 << 30) - PAGE, size - PAGE)):
            requests.flush(gpa)
            assert control.log.pop() == (offset, PAGE)
        for gpa in (2 << 30, (4 << 30) - PAGE, 5 << 30, 1 << 47):
            with pytest.raises(FirmwareError, match="INVALID_ADDRESS"):
                requests.flush(gpa)
        with pytest.raises(FirmwareError, match="UNSUPPORTED"):
            requests.attest(0x10000)
        assert control.log == []
        control.problem = True
        with pytest.raises(FirmwareError, match="HWERROR_PLATFORM"):
            requests.secure_call(pair)
