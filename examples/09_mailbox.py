"""A guest launched as a driver does it: command ids, parameter blocks in memory, status codes. No objects of the processor.

`run` is all there is between this program and the simulated part: it writes a block, rings the mailbox, reads the block back.
"""

from __future__ import annotations

import hashlib

from csvfast import EncryptedMemory, sm3
from csvfast.certs import ManufacturingLine
from csvfast.errors import FirmwareStatus
from csvfast.processor import Processor
from csvfast.processor.commands import LAYOUTS, Command, ParameterBlock
from csvfast.processor.mailbox import Mailbox

BLOCK, BUFFER, TMR, GUEST = 0x1000, 0x2000, 0x100000, 0x200000

line = ManufacturingLine.create()
memory = EncryptedMemory(4 << 20)
mailbox = Mailbox(Processor(line.make_chip(), memory))


def run(command: Command, **fields: int | bytes) -> tuple[FirmwareStatus, ParameterBlock]:
    layout = LAYOUTS[command]
    memory.write(BLOCK, layout.encode(**fields), asid=0)
    status = mailbox.command(command, BLOCK)
    print(f"  {command:#05x} {command.name:<20} {status.name}")
    return status, layout.decode(memory.read(BLOCK, layout.size, asid=0))


print("platform")
run(Command.INIT, flags=1, tmr_address=TMR, tmr_length=1 << 20)
_, block = run(Command.PLATFORM_STATUS)
print(f"    API {block['api_major']}.{block['api_minor']}, build {block['config'] >> 1}, state {block['state']}")

print("launch")
_, block = run(Command.LAUNCH_START, policy=5)
handle = block["handle"]
run(Command.ACTIVATE, handle=handle, asid=1)
firmware = bytes(7 * index % 256 for index in range(8192))
memory.write(GUEST, firmware, asid=0)
run(Command.LAUNCH_UPDATE_DATA, handle=handle, address=GUEST, length=len(firmware))
assert memory.read(GUEST, len(firmware), asid=0) != firmware, "the host sees ciphertext now"
assert memory.read(GUEST, len(firmware), asid=1) == firmware, "the guest sees what was put there"

status, block = run(Command.LAUNCH_MEASURE, handle=handle)  # no buffer yet: how long must it be?
assert status is FirmwareStatus.INVALID_LENGTH
print(f"    {block['length']} bytes are needed")
run(Command.LAUNCH_MEASURE, handle=handle, address=BUFFER, length=block["length"])
run(Command.LAUNCH_FINISH, handle=handle)

print("attestation")
# The guest writes its request where it likes in its own memory: data, mnonce, SM3 of both.
page = GUEST + len(firmware)
data, mnonce = hashlib.sha512(b"a verifier's challenge").digest(), bytes(range(16))
memory.write(page, (data + mnonce + sm3(data + mnonce).digest()).ljust(4096, b"\0"), asid=1)
run(Command.ATTESTATION, handle=handle, address=page, mnonce=b"VM_ATTESTATION", length=4096)
report = memory.read(page, 4096, asid=1)
mask = report[0xBC:0xC0] * 16
measure = bytes(byte ^ mask[index % 4] for index, byte in enumerate(report[0x90:0xB0]))
print(f"    measure {measure.hex()}")
assert measure == sm3(firmware).digest()

print("the end")
run(Command.DEACTIVATE, handle=handle)
status, _ = run(Command.ACTIVATE, handle=handle, asid=1)
assert status is FirmwareStatus.DFFLUSH_REQUIRED, "caches may still hold the guest's plaintext"
run(Command.DECOMMISSION, handle=handle)
