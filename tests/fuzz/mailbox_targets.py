"""Command buffers as fuzz inputs.

An input is a script: {u16 command, u16 place, u16 length, block} repeated. Every block is written to host memory, its command
run. The handle 1 of a block stands for the oldest live guest, so that mutated scripts keep meaning something. Command 0xFFFF
is the WBINVD of the CPU.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable

import csvfast
from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.mailbox import Mailbox
from csvfast.processor.processor import Processor
from csvfast.report.request import ReportRequest
from fuzz.target import MIB, Target, platform

__all__ = ["MailboxCsv3Target", "MailboxTarget"]

BLOCKS = 3 * MIB       # blocks, then what they point at
AT = BLOCKS + 0x8000
DATA = 2 * MIB
STEPS_MAX = 24
HANDLE = (1).to_bytes(4, "little")
FRESH_EVERY = 400      # scripts until the platform is made anew


FLUSH = struct.pack("<HHH", 0xFFFF, 0, 0)
REQUEST = ReportRequest.build(b"data", bytes(16))


def step(command: Command, **values: int | bytes) -> bytes:
    """One step of a script."""
    block = LAYOUTS[command].encode(**values) if LAYOUTS[command].size else b""
    return struct.pack("<HHH", command, 0, len(block)) + block


class MailboxTarget(Target):
    """Commands of the platform and of CSV and CSV2 guests."""

    memory: csvfast.EncryptedMemory
    processor: Processor

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.reset()
        start = [step(Command.LAUNCH_START, policy=0), step(Command.ACTIVATE, handle=1, asid=1)]
        launch = [
            step(Command.LAUNCH_UPDATE_DATA, handle=1, address=DATA, length=4096),
            step(Command.LAUNCH_MEASURE, handle=1, address=AT, length=48),
            step(Command.LAUNCH_FINISH, handle=1),
        ]
        run = [
            step(Command.ATTESTATION, handle=1, address=DATA, mnonce=b"VM_ATTESTATION", length=4096),
            step(Command.ATTESTATION, handle=1, address=AT, mnonce=bytes(16), length=208),
            step(Command.DBG_DECRYPT, handle=1, source_address=DATA, destination_address=AT, length=64),
            step(Command.DBG_ENCRYPT, handle=1, source_address=AT, destination_address=DATA, length=64),
            step(Command.COPY, handle=1, length=4096, source_address=DATA, destination_address=DATA + 4096),
        ]
        end = [step(Command.DEACTIVATE, handle=1), FLUSH, step(Command.DF_FLUSH), step(Command.DECOMMISSION, handle=1)]
        other = [
            step(Command.PDH_CERT_EXPORT, pdh_address=AT, pdh_length=2084, chain_address=AT + 4096, chain_length=6252),
            step(Command.PEK_CSR, address=AT, length=2084), step(Command.PLATFORM_STATUS), step(Command.PDH_GEN),
            step(Command.GET_ID, address=AT, length=64),
        ]  # fmt: skip
        self.seeds = [
            b"".join(steps)
            for steps in (start + launch + run + end, start + launch, start + launch + run, start + end)
        ]
        self.seeds += other
        self.seeds += [b"".join([*start, *launch, one]) for one in run]
        self.seeds += [struct.pack("<HHH", id_, 0, layout.size) + bytes(layout.size) for id_, layout in LAYOUTS.items()]

    def reset(self) -> None:
        """A fresh platform."""
        if self.runs:
            self.memory.close()
        self.memory, self.processor = platform(4 * MIB)
        self.mailbox = Mailbox(self.processor)

    def handle(self, data: bytes) -> Hashable:
        self.runs += 1
        if self.runs % FRESH_EVERY == 0 or not self.processor.state:
            self.reset()
        self.memory.write(DATA, REQUEST, 0)
        answer: tuple[int, int] | None = None
        offset = steps = 0
        while offset + 6 <= len(data) and steps < STEPS_MAX:
            command, place, length = struct.unpack_from("<HHH", data, offset)
            block = data[offset + 6 : offset + 6 + length]
            offset += 6 + length
            steps += 1
            if command == 0xFFFF:
                self.processor.wbinvd()
                continue
            if block[:4] == HANDLE and self.processor.guests:
                block = next(iter(self.processor.guests)).to_bytes(4, "little") + block[4:]
            address = BLOCKS + (place & 0xFFF) if place < 0xF000 else (1 << 64) - (place & 0xFFF)
            if place < 0xF000 and block:
                self.memory.write(address, block[:0x4000], 0)
            status = self.mailbox.command(command, address)
            assert isinstance(status, FirmwareStatus)
            assert status is not FirmwareStatus.HWERROR_PLATFORM, self.mailbox.problem
            answer = (command if command in LAYOUTS else 0, int(status))
        return answer


class MailboxCsv3Target(MailboxTarget):
    """Commands of CSV3 guests, on a platform whose secure memory is set up."""

    SMR = 8 * MIB
    SMCR = 32 * MIB
    GPA = 0x100000
    REGIONS = 4 * MIB      # descriptors prepared for the commands to point at
    ENTRIES = REGIONS + 0x1000
    SOURCE = REGIONS + 0x2000

    def __init__(self) -> None:
        super().__init__()
        blocks = struct.pack("<Q", self.ENTRIES)
        start = [
            step(Command.LAUNCH_START, policy=0x40),
            step(Command.ACTIVATE, handle=1, asid=1),
            step(Command.SET_GUEST_PRIVATE_MEMORY, handle=1, region_count=1, regions_address=self.REGIONS),
        ]
        launch = [
            step(Command.LAUNCH_ENCRYPT_DATA, handle=1, gpa=self.GPA, length=8192, data_blocks=blocks),
            step(
                Command.LAUNCH_ENCRYPT_VMCB, handle=1, vmsa_address=self.SOURCE, vmsa_length=4096,
                shadow_vmcb_address=AT, shadow_vmcb_length=4096,
            ),
            step(Command.LAUNCH_MEASURE, handle=1, address=AT, length=48),
            step(Command.LAUNCH_FINISH_EX, handle=1, host_data=b"host"),
        ]  # fmt: skip
        run = [
            step(Command.UPDATE_NPT, handle=1, error_code=4, gpa=self.GPA + 0x4000, spa=0, level=1, page_count=1),
            step(
                Command.UPDATE_NPT, handle=1, error_code=6, gpa=self.GPA + 0x8000, spa=AT, level=1, page_attributes=2,
                page_count=1,
            ),
            step(Command.DBG_READ_MEM, handle=1, gpa=self.GPA, spa=AT, length=4096),
            step(Command.DBG_READ_VMSA, handle=1, spa=AT, length=4096),
            step(
                Command.SEND_ENCRYPT_CONTEXT, handle=1, header_address=AT, header_length=256, transport_address=AT,
                transport_length=8192,
            ),
        ]  # fmt: skip
        end = [step(Command.DEACTIVATE, handle=1), FLUSH, step(Command.DF_FLUSH), step(Command.DECOMMISSION, handle=1)]
        scripts = (start + launch + run + end, start + launch, start + launch[:1], start + end)
        self.seeds = [b"".join(script) for script in scripts]
        self.seeds += [b"".join([*start, *launch, one]) for one in run]
        self.seeds += [
            b"".join(start) + struct.pack("<HHHI", id_, 0, layout.size, 1) + bytes(max(layout.size - 4, 0))
            for id_, layout in LAYOUTS.items()
            if id_ >= 0x200
        ]

    def reset(self) -> None:
        if self.runs:
            self.memory.close()
        self.memory, self.processor = platform((32 + 256) * MIB)
        self.mailbox = Mailbox(self.processor)
        self.processor.set_smr(8 * MIB, [(self.SMR, 16 * MIB)])
        self.processor.set_smcr(self.SMCR, 256 * MIB)
        self.memory.write(self.REGIONS, struct.pack("<QQ", self.SMR, 8 * MIB), 0)
        self.memory.write(self.ENTRIES, struct.pack("<Q", 2 | self.SOURCE), 0)
        self.memory.write(self.SOURCE, b"source".ljust(8192, b"\1"), 0)
