"""Random command sequences, right and wrong, against a table of the state machines kept apart from the product.

The table below is written from the specification (4.5 to 4.8), not from csvfast's code: for each command it names every rule
the arguments break at this moment. A command must succeed exactly when it breaks none, and otherwise answer with the code of
one of the rules it broke, leaving everything as it was. The same machine drives the Python commands and the mailbox's raw
buffers. Between the commands an attacker who owns the DRAM swaps, flips and replays ciphertext, and guests move to other
platforms, some of which their policies forbid.
"""

from __future__ import annotations

import random
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import csvfast
from csvfast.certs.manufacturing import ChipIdentity, ManufacturingLine
from csvfast.errors import CsvfastError, FirmwareError, FirmwareStatus
from csvfast.processor.mailbox import Mailbox
from csvfast.processor.options import Options
from csvfast.processor.processor import Processor
from csvfast.processor.profile import PROFILE_1_4_2337

S = FirmwareStatus
LINE = ManufacturingLine.create()
CHIP = LINE.make_chip()
OTHER_CHIP = LINE.make_chip()  # same root: a platform guests may move to
FOREIGN_CHIP = ManufacturingLine.create().make_chip()  # another root: no platform to trust
MIB = 1 << 20
MEMORY = 4 * MIB
TMR = 1 * MIB
DATA = 2 * MIB  # guests' pages
BUFFERS = 3 * MIB  # command buffers and what they point at
ASID_MAX = 5
CORES = 2
MIN_CSV_ASID = 3
BAD_HANDLE = 0xDEAD0001


class Platform(IntEnum):
    UNINIT = 0
    INIT = 1
    WORKING = 2


class State(IntEnum):
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    SENT = 6


NODBG, ES, NOSEND, DOMAIN = 1, 4, 8, 16


@dataclass
class GuestModel:
    handle: int
    policy: int
    number: int
    state: State = State.LUPDATE
    asid: int | None = None
    pages: dict[int, bytes] = field(default_factory=dict)
    measured: bytes = b""


class Broken(Exception):
    """A command was refused with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(S(status).name)
        self.status = S(status)


class PythonDriver:
    """The commands as methods."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(self.processor, name)(*arguments, **named)
        except FirmwareError as error:
            raise Broken(error.status) from None


class MailboxDriver:
    """The same commands as buffers packed here by hand, from the table of 4.2."""

    IDS: ClassVar = {
        "shutdown": 0x02, "factory_reset": 0x03, "platform_status": 0x04, "pek_gen": 0x05, "pdh_gen": 0x09, "df_flush": 0x0A,
        "decommission": 0x20, "deactivate": 0x22, "launch_finish": 0x35, "send_finish": 0x43, "send_cancel": 0x44,
    }  # fmt: skip

    def __init__(self, processor: Processor, memory: csvfast.EncryptedMemory) -> None:
        self.mailbox = Mailbox(processor)
        self.memory = memory

    def send(self, command: int, block: bytes) -> bytes:
        self.memory.write(BUFFERS, block + bytes(64), 0)
        status = int(self.mailbox.command(command, BUFFERS if block else 0))
        if status:
            raise Broken(status)
        return bytes(self.memory.read(BUFFERS, len(block), 0))

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        special = getattr(self, name, None)
        if special is not None:
            return special(*arguments, **named)
        block = struct.pack("<I", arguments[0]) if arguments else bytes(12) if name == "platform_status" else b""
        return self.send(self.IDS[name], block)

    def init(self, *, es: bool, tmr_address: int, tmr_length: int) -> None:
        self.send(0x01, struct.pack("<IIQI", int(es), 0, tmr_address, tmr_length))

    def pek_csr(self) -> bytes:
        self.send(0x06, struct.pack("<QI", BUFFERS + 0x1000, 2084))
        return bytes(self.memory.read(BUFFERS + 0x1000, 2084, 0))

    def pdh_cert_export(self) -> tuple[bytes, bytes]:
        self.send(0x08, struct.pack("<QIIQI", BUFFERS + 0x1000, 2084, 0, BUFFERS + 0x2000, 6252))
        return bytes(self.memory.read(BUFFERS + 0x1000, 2084, 0)), bytes(self.memory.read(BUFFERS + 0x2000, 6252, 0))

    def launch_start(self, policy: int, *, handle: int = 0) -> int:
        answer = self.send(0x30, struct.pack("<IIQIIQI", handle, policy, 0, 0, 0, 0, 0))
        return int.from_bytes(answer[:4], "little")

    def activate(self, handle: int, asid: int) -> None:
        self.send(0x21, struct.pack("<II", handle, asid))

    def guest_status(self, handle: int) -> tuple[int, int, int]:
        policy, asid, state = struct.unpack("<IIB", self.send(0x23, struct.pack("<IIIB", handle, 0, 0, 0))[4:13])
        return policy, asid, state

    def _update(self, command: int, handle: int, address: int, length: int) -> None:
        self.send(command, struct.pack("<IIQI", handle, 0, address, length))

    def launch_update_data(self, handle: int, address: int, length: int) -> None:
        self._update(0x31, handle, address, length)

    def launch_update_vmsa(self, handle: int, address: int, length: int) -> None:
        self._update(0x32, handle, address, length)

    def launch_measure(self, handle: int) -> bytes:
        self.send(0x33, struct.pack("<IIQI", handle, 0, BUFFERS + 0x1000, 48))
        return bytes(self.memory.read(BUFFERS + 0x1000, 48, 0))

    def send_start(self, handle: int, pdh: bytes, platform: bytes, vendor: bytes) -> tuple[int, bytes]:
        at = BUFFERS + 0x1000
        self.memory.write(at, pdh, 0)
        self.memory.write(at + 0x1000, platform, 0)
        self.memory.write(at + 0x3000, vendor, 0)
        head = struct.pack(
            "<IIQIIQIIQI", handle, 0, at, len(pdh), 0, at + 0x1000, len(platform), 0, at + 0x3000, len(vendor)
        )
        answer = self.send(0x40, head + struct.pack("<IQI", 0, at + 0x4000, 772))
        return int.from_bytes(answer[4:8], "little"), bytes(self.memory.read(at + 0x4000, 772, 0))

    def send_update_data(self, handle: int, address: int, length: int) -> tuple[bytes, bytes]:
        at = BUFFERS + 0x1000
        self.send(0x41, struct.pack("<IIQIIQIIQI", handle, 0, at, 52, 0, address, length, 0, at + 0x1000, length))
        return bytes(self.memory.read(at, 52, 0)), bytes(self.memory.read(at + 0x1000, length, 0))

    def attestation_host(self, handle: int, mnonce: bytes) -> bytes:
        self.send(0x36, struct.pack("<IIQ16sI", handle, 0, BUFFERS + 0x1000, mnonce, 208))
        return bytes(self.memory.read(BUFFERS + 0x1000, 208, 0))

    def copy(self, handle: int, source: int, destination: int, length: int) -> None:
        self.send(0x24, struct.pack("<IIQQ", handle, length, source, destination))

    def dbg_decrypt(self, handle: int, source: int, destination: int, length: int) -> None:
        self.send(0x60, struct.pack("<IIQQI", handle, 0, source, destination, length))

    def dbg_encrypt(self, handle: int, source: int, destination: int, length: int) -> None:
        self.send(0x61, struct.pack("<IIQQI", handle, 0, source, destination, length))


class Machine(RuleBasedStateMachine):
    """One platform, several guests, an attacker who may call anything at any time."""

    make_driver: Callable[[Processor, csvfast.EncryptedMemory], Any]

    @initialize()
    def start(self) -> None:
        self.memory = csvfast.EncryptedMemory(MEMORY, asid_max=ASID_MAX)
        options = Options(cores=CORES, min_csv_asid=MIN_CSV_ASID)
        self.processor = Processor(CHIP, self.memory, profile=PROFILE_1_4_2337, options=options)
        self.driver = type(self).make_driver(self.processor, self.memory)
        self.platform = Platform.UNINIT
        self.es = False
        self.guests: dict[int, GuestModel] = {}
        self.used_handles: set[int] = set()
        self.dirty: dict[int, set[int]] = {}  # ASID -> cores whose caches may still hold its lines
        self.needs_flush: set[int] = set()  # ASIDs that DF_FLUSH has not given back yet
        self.next_page = 0
        # number of the page -> its ciphertext at some moment, and whose plaintext it was
        self.recorded: dict[int, tuple[bytes, dict[int, bytes]]] = {}

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    # ---- The judge

    def expect(self, broken: set[S], name: str, *arguments: Any, either: set[S] = frozenset(), **named: Any) -> Any:  # type: ignore[assignment]
        """Calls; None is returned for a refusal the table demands. `either`: refusals that the specification leaves open."""
        before = self.snapshot()
        try:
            answer = self.driver.call(name, *arguments, **named)
        except Broken as refusal:
            status = refusal.status
        else:
            assert not broken, f"{name}{reprlib.repr(arguments)} succeeded although {sorted(broken)} should refuse it"
            return True if answer is None or answer == b"" else answer
        assert status in broken | either, (
            f"{name}{reprlib.repr(arguments)}: {status.name}, rules broken: {broken or 'none'}"
        )
        assert self.snapshot() == before, f"{name}{reprlib.repr(arguments)} was refused and changed something"
        return None

    def snapshot(self) -> object:
        """All that a refused command must leave alone, as far as it can be seen from outside."""
        guests = [
            (guest.handle, int(guest.state), guest.asid, guest.digest.digest(), guest.measure)
            for guest in self.processor.guests.values()
        ]
        return int(self.processor.state), guests, self.memory.asids(), self.memory.read(DATA, 16 * 4096, 0)

    def platform_rule(self, *allowed: Platform) -> set[S]:
        return set() if self.platform in allowed else {S.INVALID_PLATFORM_STATE}

    def guest_rules(self, handle: int, *states: State) -> set[S]:
        broken = self.platform_rule(Platform.WORKING)
        guest = self.guests.get(handle)
        if guest is None:
            return broken | {S.INVALID_GUEST}
        if states and guest.state not in states:
            broken |= {S.INVALID_GUEST_STATE}
        return broken

    def active_rule(self, handle: int) -> set[S]:
        guest = self.guests.get(handle)
        return {S.INACTIVE} if guest is not None and guest.asid is None else set()

    def some_handle(self, choice: int) -> int:
        handles = [*sorted(self.guests), BAD_HANDLE, *sorted(self.used_handles - set(self.guests))[:1]]
        return handles[choice % len(handles)]

    # ---- Platform

    @rule(es=st.booleans())
    def init(self, es: bool) -> None:
        broken = self.platform_rule(Platform.UNINIT)
        if self.expect(broken, "init", es=es, tmr_address=TMR if es else 0, tmr_length=MIB if es else 0):
            self.platform, self.es = Platform.INIT, es

    @precondition(lambda self: self.platform is Platform.UNINIT)
    @rule(address=st.sampled_from([TMR + 4096, 0x7FFF_FFFF_F000]), length=st.sampled_from([4096, MIB]))
    def init_with_bad_tmr(self, address: int, length: int) -> None:
        broken = {S.INVALID_ADDRESS, S.INVALID_LENGTH, S.INVALID_CONFIG, S.INVALID_PARAM}
        self.expect(broken, "init", es=True, tmr_address=address, tmr_length=length)

    @rule()
    def shutdown(self) -> None:
        if self.expect(self.platform_rule(Platform.INIT, Platform.WORKING), "shutdown"):
            for guest in self.guests.values():
                self.release(guest)
            self.guests.clear()
            self.platform = Platform.UNINIT

    @rule()
    def factory_reset(self) -> None:
        self.expect(self.platform_rule(Platform.UNINIT), "factory_reset")

    @rule()
    def platform_status(self) -> None:
        answer = self.expect(set(), "platform_status")
        if isinstance(answer, bytes):
            api, minor, state, _owner, word, count = struct.unpack("<BBBBII", answer)
            assert (api, minor, word >> 1, word & 1) == (
                1,
                4,
                2337,
                int(self.es and self.platform is not Platform.UNINIT),
            )
        else:
            state, count = int(answer.state), answer.guest_count
        assert (state, count) == (int(self.platform), len(self.guests))

    @rule(which=st.sampled_from(["pek_gen", "pdh_gen", "pek_csr", "pdh_cert_export", "platform_status"]))
    def certificates(self, which: str) -> None:
        allowed = {
            "pek_gen": (Platform.INIT,),
            "pek_csr": (Platform.INIT,),
            "pdh_gen": (Platform.INIT, Platform.WORKING),
            "pdh_cert_export": (Platform.INIT, Platform.WORKING),
            "platform_status": tuple(Platform),
        }[which]
        self.expect(self.platform_rule(*allowed), which)

    # ---- Caches

    @rule(core=st.integers(0, CORES - 1))
    def wbinvd(self, core: int) -> None:
        self.processor.wbinvd(core)
        for cores in self.dirty.values():
            cores.discard(core)

    @rule()
    def df_flush(self) -> None:
        broken = self.platform_rule(Platform.INIT, Platform.WORKING)
        if any(self.dirty.values()):
            broken |= {S.WBINVD_REQUIRED}
        if self.expect(broken, "df_flush"):
            self.needs_flush.clear()
            self.dirty.clear()

    # ---- Guests

    @precondition(lambda self: len(self.guests) < 4)
    @rule(
        policy=st.sampled_from(
            [0, NODBG, NODBG | ES, ES, NOSEND, DOMAIN, NODBG | 2 << 16, 1 << 16 | 4 << 24, 1 << 16 | 5 << 24]
        ),
        wrong_handle=st.sampled_from([0, 0, 0, BAD_HANDLE]),
    )
    def launch_start(self, policy: int, wrong_handle: int) -> None:
        broken = self.platform_rule(Platform.INIT, Platform.WORKING)
        major, minor = policy >> 16 & 255, policy >> 24
        if (major, minor) > (1, 4):
            broken |= {S.POLICY_FAILURE}
        if policy & ES and not self.es:
            broken |= {S.POLICY_FAILURE}
        if wrong_handle:
            broken |= {S.INVALID_GUEST}
        handle = self.expect(broken, "launch_start", policy, handle=wrong_handle)
        if handle is not None:
            assert 0 < handle < 1 << 32
            assert handle not in self.guests
            self.guests[handle] = GuestModel(handle, policy, len(self.used_handles))
            self.used_handles.add(handle)
            self.platform = Platform.WORKING

    @rule(choice=st.integers(0, 9), asid=st.integers(0, ASID_MAX + 1))
    def activate(self, choice: int, asid: int) -> None:
        handle = self.some_handle(choice)
        broken = self.guest_rules(handle)
        if not 1 <= asid <= ASID_MAX:
            broken |= {S.INVALID_ASID}
        if any(guest.asid == asid for guest in self.guests.values()):
            broken |= {S.ASID_OWNED}
        if asid in self.needs_flush:
            broken |= {S.DFFLUSH_REQUIRED}
        guest = self.guests.get(handle)
        if guest is not None and guest.asid is not None:
            broken |= {S.ACTIVE}
        if guest is not None and guest.state is State.SENT:  # only DEACTIVATE and DECOMMISSION are left
            broken |= {S.INVALID_GUEST_STATE}
        either: set[S] = set()
        if guest is not None and 1 <= asid <= ASID_MAX:
            csv2 = bool(guest.policy & ES)
            # Since build 1810 CSV2 guests may use every ASID; plain CSV guests only those from the minimum on.
            if not csv2 and asid < MIN_CSV_ASID:
                broken |= {S.INVALID_ASID}
        if self.expect(broken, "activate", handle, asid, either=either):
            assert guest is not None
            guest.asid = asid

    def release(self, guest: GuestModel) -> None:
        if guest.asid is not None:
            self.dirty[guest.asid] = set(range(CORES))
            self.needs_flush.add(guest.asid)
            guest.asid = None

    @rule(choice=st.integers(0, 9))
    def deactivate(self, choice: int) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        idle = {S.INACTIVE} if guest is not None and guest.asid is None else set()
        if self.expect(self.guest_rules(handle), "deactivate", handle, either=idle):
            assert guest is not None
            self.release(guest)

    @rule(choice=st.integers(0, 9))
    def decommission(self, choice: int) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        broken = self.guest_rules(handle)
        if guest is not None and guest.asid is not None:
            broken |= {S.ACTIVE}
        if self.expect(broken, "decommission", handle):
            del self.guests[handle]
            if not self.guests:
                self.platform = Platform.INIT

    @rule(choice=st.integers(0, 9))
    def guest_status(self, choice: int) -> None:
        handle = self.some_handle(choice)
        answer = self.expect(self.guest_rules(handle), "guest_status", handle)
        if answer is not None:
            guest = self.guests[handle]
            seen = (
                answer
                if isinstance(answer, tuple) and len(answer) == 3
                else (
                    answer.policy if isinstance(answer.policy, int) else answer.policy.value,
                    answer.asid or 0,
                    int(answer.state),
                )
            )
            assert (int(seen[0]), int(seen[1]), int(seen[2])) == (guest.policy, guest.asid or 0, int(guest.state))

    @rule(
        choice=st.integers(0, 9),
        offset=st.sampled_from([0, 0, 0, 0, 8, 16]),
        length=st.sampled_from([4096, 4096, 64, 16, 40, 0]),
    )
    def launch_update_data(self, choice: int, offset: int, length: int) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        length = min(length, 4096 - offset)
        broken = self.guest_rules(handle, State.LUPDATE) | self.active_rule(handle)
        if offset % 16:
            broken |= {S.INVALID_ADDRESS}
        if length % 16 or not length:
            broken |= {S.INVALID_LENGTH}
        number = self.next_page % 16
        address = DATA + number * 4096
        plain = (b"%08d" % self.next_page).ljust(16, b".") * 256
        if not broken:
            for other in self.guests.values():
                other.pages.pop(number, None)
            self.memory.write(address, plain, 0)
        if self.expect(broken, "launch_update_data", handle, address + offset, length):
            assert guest is not None
            guest.measured += plain[offset : offset + length]
            if length == 4096:
                guest.pages[number] = plain
            self.next_page += 1

    @rule(choice=st.integers(0, 9), length=st.sampled_from([4096, 4096, 4096, 2048]))
    def launch_update_vmsa(self, choice: int, length: int) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        broken = self.guest_rules(handle, State.LUPDATE) | self.active_rule(handle)
        if length != 4096:
            broken |= {S.INVALID_LENGTH}
        if guest is not None and not guest.policy & ES:
            # The specification names the condition, not the code.
            broken |= {S.POLICY_FAILURE, S.INVALID_GUEST_STATE, S.UNSUPPORTED, S.INVALID_COMMAND}
        number = self.next_page % 16
        if not broken:
            for other in self.guests.values():
                other.pages.pop(number, None)
            self.memory.write(DATA + number * 4096, bytes(4096), 0)
        if self.expect(broken, "launch_update_vmsa", handle, DATA + number * 4096, length):
            self.next_page += 1

    @rule(choice=st.integers(0, 9))
    def launch_measure(self, choice: int) -> None:
        handle = self.some_handle(choice)
        blob = self.expect(
            self.guest_rules(handle, State.LUPDATE), "launch_measure", handle, either=self.active_rule(handle)
        )
        if blob is not None:
            guest = self.guests[handle]
            assert len(blob) == 48
            assert self.processor.guests[handle].measure == csvfast.sm3(guest.measured).digest()
            guest.state = State.LSECRET

    @rule(choice=st.integers(0, 9))
    def launch_finish(self, choice: int) -> None:
        handle = self.some_handle(choice)
        if self.expect(self.guest_rules(handle, State.LSECRET), "launch_finish", handle):
            self.guests[handle].state = State.RUNNING

    @rule(choice=st.integers(0, 9))
    def attestation(self, choice: int) -> None:
        handle = self.some_handle(choice)
        either = self.active_rule(handle)
        broken = self.guest_rules(handle, State.LSECRET, State.RUNNING)
        report = self.expect(broken, "attestation_host", handle, bytes(16), either=either)
        if report is not None:
            guest = self.guests[handle]
            assert len(report) == 208
            assert report[16:48] == csvfast.sm3(guest.measured).digest()
            assert report[48:52] == guest.policy.to_bytes(4, "little")

    @rule(choice=st.integers(0, 9), page=st.integers(0, 15), length=st.sampled_from([4096, 16, 24]))
    def debug(self, choice: int, page: int, length: int) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        broken = self.guest_rules(handle, State.RUNNING) | self.active_rule(handle)
        if length % 16:
            broken |= {S.INVALID_LENGTH}
        if guest is not None and guest.policy & NODBG:
            broken |= {S.POLICY_FAILURE}
        target = BUFFERS + 0x4000
        if self.expect(broken, "dbg_decrypt", handle, DATA + page * 4096, target, length) and guest is not None:
            if page in guest.pages:
                assert self.memory.read(target, length, 0) == guest.pages[page][:length]
            self.memory.write(target, b"x" * 64, 0)
            guest.pages.pop(page, None)
            for other in self.guests.values():
                other.pages.pop(page, None)
            self.expect(set(), "dbg_encrypt", handle, target, DATA + page * 4096, 64)
            assert guest.asid is not None
            assert self.memory.read(DATA + page * 4096, 64, guest.asid) == b"x" * 64

    @rule(choice=st.integers(0, 9), source=st.integers(0, 15), destination=st.integers(0, 15))
    def copy(self, choice: int, source: int, destination: int) -> None:
        handle = self.some_handle(choice)
        broken = self.guest_rules(handle, State.RUNNING) | self.active_rule(handle)
        if source == destination:
            broken |= {S.INVALID_ADDRESS, S.INVALID_PARAM, S.INVALID_LENGTH}
        if self.expect(broken, "copy", handle, DATA + source * 4096, DATA + destination * 4096, 4096):
            guest = self.guests[handle]
            for other in self.guests.values():
                other.pages.pop(destination, None)
            if source in guest.pages:
                guest.pages[destination] = guest.pages[source]

    # ---- The attacker, who owns the DRAM

    @rule(page=st.integers(0, 15))
    def record(self, page: int) -> None:
        content = {handle: guest.pages[page] for handle, guest in self.guests.items() if page in guest.pages}
        self.recorded[page] = bytes(self.memory.read(DATA + page * 4096, 4096, 0)), content

    @rule(page=st.integers(0, 15), line=st.integers(0, 63))
    def replay(self, page: int, line: int) -> None:
        """Old ciphertext of the same key in the same place is old plaintext again: no freshness, as on the hardware."""
        if page not in self.recorded:
            return
        ciphertext, content = self.recorded[page]
        if line % 2:
            self.memory.write(DATA + page * 4096, ciphertext, 0)
            for handle, guest in self.guests.items():
                guest.pages.pop(page, None)
                if handle in content:
                    guest.pages[page] = content[handle]
        else:
            self.memory.write(DATA + page * 4096 + line * 64, ciphertext[line * 64 : line * 64 + 64], 0)
            for handle, guest in self.guests.items():
                if page in guest.pages and guest.pages[page] != content.get(handle):
                    del guest.pages[page]

    @rule(first=st.integers(0, 15), second=st.integers(0, 15))
    def swap(self, first: int, second: int) -> None:
        if first == second:
            return
        one, two = (bytes(self.memory.read(DATA + page * 4096, 4096, 0)) for page in (first, second))
        self.memory.write(DATA + first * 4096, two, 0)
        self.memory.write(DATA + second * 4096, one, 0)
        for guest in self.guests.values():
            lost = {guest.pages.pop(page, None) for page in (first, second)} - {None}
            if guest.asid is not None and one != two:
                for page in (first, second):
                    assert self.memory.read(DATA + page * 4096, 4096, guest.asid) not in lost

    @rule(page=st.integers(0, 15), bit=st.integers(0, 8 * 4096 - 1))
    def flip(self, page: int, bit: int) -> None:
        address = DATA + page * 4096 + bit // 8
        self.memory.write(address, bytes([self.memory.read(address, 1, 0)[0] ^ 1 << bit % 8]), 0)
        for guest in self.guests.values():
            plain = guest.pages.pop(page, None)
            if plain is not None and guest.asid is not None:
                block = bit // 128 * 16
                seen = self.memory.read(DATA + page * 4096, 4096, guest.asid)
                assert seen[block : block + 16] != plain[block : block + 16]
                assert seen[:block] + seen[block + 16 :] == plain[:block] + plain[block + 16 :]

    # ---- Moving to another platform

    @rule(choice=st.integers(0, 9), chip=st.sampled_from([OTHER_CHIP, OTHER_CHIP, FOREIGN_CHIP]), finish=st.booleans())
    def migrate(self, choice: int, chip: ChipIdentity, finish: bool) -> None:
        handle = self.some_handle(choice)
        guest = self.guests.get(handle)
        if guest is not None and guest.asid is None:
            return  # whether SEND_START itself needs the key in place is left open; the data commands after it do
        broken = self.guest_rules(handle, State.RUNNING)
        if guest is not None and guest.policy & NOSEND:
            broken |= {S.POLICY_FAILURE}
        if guest is not None and guest.policy & DOMAIN:  # the target owns itself: it is in nobody's domain but its own
            broken |= {S.POLICY_FAILURE, S.INVALID_CERTIFICATE}
        if chip is FOREIGN_CHIP:
            broken |= {S.INVALID_CERTIFICATE}
        with csvfast.EncryptedMemory(MEMORY, asid_max=ASID_MAX) as memory:
            target = Processor(chip, memory, profile=PROFILE_1_4_2337)
            target.init(es=True, tmr_address=TMR, tmr_length=MIB)
            pdh, platform = target.pdh_cert_export()
            vendor = chip.hsk.encoded + chip.root.encoded
            answer = self.expect(broken, "send_start", handle, pdh, platform, vendor)
            if answer is None:
                return
            assert guest is not None
            guest.state = State.SUPDATE
            policy, session = answer
            source_pdh, source_platform = self.processor.pdh_cert_export()
            arrived = target.receive_start(
                policy, source_pdh + source_platform + CHIP.hsk.encoded + CHIP.root.encoded, session
            )
            target.activate(arrived, ASID_MAX)
            pages = sorted(guest.pages.items())
            for number, plain in pages:
                address = DATA + number * 4096
                header, transport = self.expect(set(), "send_update_data", handle, address, 4096)
                assert plain[:16] not in transport
                wrong = bytes(header[:20]) + bytes([header[20] ^ 1]) + bytes(header[21:])
                with pytest.raises(FirmwareError, match="BAD_MEASUREMENT"):
                    target.receive_update_data(arrived, wrong, address, 4096, transport)
                target.receive_update_data(arrived, header, address, 4096, transport)
            # A guest that travels does not run, is not debugged, copied, measured or attested.
            for name, arguments in (
                ("dbg_decrypt", (handle, DATA, BUFFERS, 16)), ("copy", (handle, DATA, DATA + 4096, 16)),
                ("launch_finish", (handle,)), ("attestation_host", (handle, bytes(16))),
            ):  # fmt: skip
                self.expect({S.INVALID_GUEST_STATE, S.POLICY_FAILURE}, name, *arguments)
            self.expect(set(), "send_finish" if finish else "send_cancel", handle)
            guest.state = State.SENT if finish else State.RUNNING
            target.receive_finish(arrived)
            for number, plain in pages:
                assert memory.read(DATA + number * 4096, 4096, ASID_MAX) == plain
                assert memory.read(DATA + number * 4096, 16, 0) != plain[:16]
            assert target.guests[arrived].measure == csvfast.sm3(guest.measured).digest()

    # ---- The way forward: random calls alone seldom get a guest to its end

    @precondition(lambda self: self.platform is Platform.UNINIT)
    @rule()
    def wake_up(self) -> None:
        self.init(es=True)

    @precondition(lambda self: self.platform is not Platform.UNINIT and len(self.guests) < 3)
    @rule(policy=st.sampled_from([0, NODBG, NODBG | ES, ES]))
    def another_guest(self, policy: int) -> None:
        self.launch_start(policy if self.es else policy & ~ES, 0)

    @precondition(lambda self: bool(self.guests))
    @rule(choice=st.integers(0, 3), leave=st.booleans(), asid=st.integers(1, ASID_MAX))
    def advance(self, choice: int, leave: bool, asid: int) -> None:
        handles = sorted(self.guests)
        number = choice % len(handles)
        guest = self.guests[handles[number]]
        if guest.asid is None and ((leave and guest.state is State.RUNNING) or guest.state is State.SENT):
            self.decommission(number)
        elif guest.asid is None:
            self.activate(number, asid)
        elif guest.state is State.LUPDATE:
            self.launch_update_data(number, 0, 4096)
            self.launch_measure(number)
        elif guest.state is State.LSECRET:
            self.launch_finish(number)
        else:
            self.deactivate(number)

    @rule()
    def flush_all(self) -> None:
        for core in range(CORES):
            self.wbinvd(core)
        self.df_flush()

    # ---- What must always hold

    @invariant()
    def keys_are_where_they_should_be(self) -> None:
        if hasattr(self, "memory"):
            active = sorted(guest.asid for guest in self.guests.values() if guest.asid is not None)
            assert sorted(self.memory.asids()) == active

    @invariant()
    def guests_read_their_own_pages_and_nobody_else_does(self) -> None:
        if not hasattr(self, "memory"):
            return
        for guest in self.guests.values():
            for number, plain in guest.pages.items():
                address = DATA + number * 4096
                assert self.memory.read(address, 64, 0) != plain[:64]
                for asid in self.memory.asids():
                    assert (self.memory.read(address, 64, asid) == plain[:64]) == (asid == guest.asid)


class PythonMachine(Machine):
    make_driver = staticmethod(lambda processor, _memory: PythonDriver(processor))


class MailboxMachine(Machine):
    make_driver = staticmethod(MailboxDriver)


LENGTH = settings(stateful_step_count=60)
PythonMachine.TestCase.settings = LENGTH
MailboxMachine.TestCase.settings = LENGTH


class TestPythonCommands(PythonMachine.TestCase):  # type: ignore[misc, name-defined]
    """Every command as a method."""


class TestMailbox(MailboxMachine.TestCase):  # type: ignore[misc, name-defined]
    """Every command as a buffer."""


def walk(machine: Machine, seed: int, steps: int) -> None:
    """The same rules in a long random sequence: hypothesis finds short ones and makes them shorter, this one goes deep."""
    rng = random.Random(seed)
    policies = [0, NODBG, NODBG | ES, ES, NOSEND, DOMAIN, NODBG | 2 << 16, NODBG | 1 << 16 | 5 << 24]
    moves: list[tuple[int, Callable[[], object]]] = [
        (1, machine.shutdown),
        (1, machine.factory_reset),
        (2, machine.platform_status),
        (3, machine.df_flush),
        (2, machine.flush_all),
        (1, lambda: machine.init(rng.random() < 0.8)),
        (3, lambda: machine.certificates(rng.choice(["pek_gen", "pdh_gen", "pek_csr", "pdh_cert_export"]))),
        (3, lambda: machine.wbinvd(rng.randrange(CORES))),
        (
            4,
            lambda: (
                len(machine.guests) < 4
                and machine.launch_start(rng.choice(policies), rng.choice([0, 0, 0, BAD_HANDLE]))
            ),
        ),
        (8, lambda: machine.activate(rng.randrange(10), rng.randrange(ASID_MAX + 2))),
        (5, lambda: machine.deactivate(rng.randrange(10))),
        (3, lambda: machine.decommission(rng.randrange(10))),
        (3, lambda: machine.guest_status(rng.randrange(10))),
        (
            8,
            lambda: machine.launch_update_data(
                rng.randrange(10), rng.choice([0, 0, 0, 8]), rng.choice([4096, 4096, 64, 40])
            ),
        ),
        (4, lambda: machine.launch_update_vmsa(rng.randrange(10), rng.choice([4096, 4096, 2048]))),
        (5, lambda: machine.launch_measure(rng.randrange(10))),
        (5, lambda: machine.launch_finish(rng.randrange(10))),
        (4, lambda: machine.attestation(rng.randrange(10))),
        (5, lambda: machine.debug(rng.randrange(10), rng.randrange(16), rng.choice([4096, 16, 24]))),
        (5, lambda: machine.copy(rng.randrange(10), rng.randrange(16), rng.randrange(16))),
        (3, lambda: machine.record(rng.randrange(16))),
        (3, lambda: machine.replay(rng.randrange(16), rng.randrange(64))),
        (2, lambda: machine.swap(rng.randrange(16), rng.randrange(16))),
        (2, lambda: machine.flip(rng.randrange(16), rng.randrange(8 * 4096))),
        (4, lambda: machine.migrate(rng.randrange(10), rng.choice([OTHER_CHIP, FOREIGN_CHIP]), rng.random() < 0.5)),
        (
            20,
            lambda: machine.guests and machine.advance(rng.randrange(4), rng.random() < 0.3, rng.randint(1, ASID_MAX)),
        ),
        (6, lambda: machine.platform is Platform.UNINIT and machine.wake_up()),
    ]
    weights = [weight for weight, _move in moves]
    machine.start()
    try:
        for _ in range(steps):
            rng.choices(moves, weights)[0][1]()
            machine.keys_are_where_they_should_be()
            machine.guests_read_their_own_pages_and_nobody_else_does()
        assert len(machine.used_handles) > steps // 200, "the walk hardly made any guests"
    finally:
        machine.teardown()


@pytest.mark.parametrize("machine", [PythonMachine, MailboxMachine])
@pytest.mark.parametrize("seed", range(6))
def test_long_walk(machine: type[Machine], seed: int) -> None:
    walk(machine(), seed, 10_000)


def forget_flush(processor: Processor) -> None:
    honest = processor.deactivate

    def deactivate(handle: int) -> None:
        honest(handle)
        for core in range(CORES):
            processor.wbinvd(core)
        processor.df_flush()

    processor.deactivate = deactivate  # type: ignore[method-assign]


def forget_measuring(processor: Processor) -> None:
    honest = processor.launch_update_data

    def launch_update_data(handle: int, address: int, length: int) -> None:
        guest = processor.guests.get(handle)
        digest = guest.digest.copy() if guest else None
        honest(handle, address, length)
        if guest is not None and digest is not None:
            guest.digest = digest

    processor.launch_update_data = launch_update_data  # type: ignore[method-assign]


def forget_key(processor: Processor) -> None:
    honest = processor.deactivate

    def deactivate(handle: int) -> None:
        guest = processor.guests.get(handle)
        asid = guest.asid if guest else None
        honest(handle)
        if asid:
            processor.memory.install(asid)

    processor.deactivate = deactivate  # type: ignore[method-assign]


def forget_state(processor: Processor) -> None:
    honest = processor.launch_finish

    def launch_finish(handle: int) -> None:
        guest = processor.guests.get(handle)
        if guest is not None and guest.measure is None:
            return
        honest(handle)

    processor.launch_finish = launch_finish  # type: ignore[method-assign]


@pytest.mark.parametrize("defect", [forget_flush, forget_measuring, forget_key, forget_state])
def test_the_table_notices_a_wrong_processor(defect: Callable[[Processor], None]) -> None:
    """A processor that forgets a rule must be caught, or the machines above prove nothing."""

    class Wrong(PythonMachine):
        @initialize()
        def start(self) -> None:
            super().start()
            defect(self.processor)

    with pytest.raises((AssertionError, CsvfastError)):
        walk(Wrong(), 1, 3000)
