"""Mailbox handlers of CSV3's commands.

Lists of regions and page addresses stand in host memory; their counts are capped before they are read. A transport block is a
page of up to 512 addresses, one for each 4096 bytes; the VMCB blocks of RECEIVE_ENCRYPT_CONTEXT are lists of addresses, one
for each vCPU (openeuler-mirror/kernel arch/x86/kvm/svm/csv.c, struct trans_paddr_block and vmcb_paddr_block).

Where a command changes the guest before its answer is written, every place the answer goes to is checked first. It stays good:
none of these commands takes memory from the host, they only use frames that SET_GUEST_PRIVATE_MEMORY took.

Thread-safety: called under the processor's lock.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import Command
from csvfast.processor.core import PAGE
from csvfast.processor.csv3 import REGIONS_PER_COMMAND, SMR_ENTRIES_MAX
from csvfast.processor.csv3_migration import ENCRYPT_HEADER_BYTES, SET_READ_ONLY
from csvfast.processor.mailbox_guest import guest_in
from csvfast.processor.states import GuestState, PlatformState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from csvfast.processor.commands import ParameterBlock
    from csvfast.processor.dma import Dma

__all__ = ["CSV3_HANDLERS"]

BLOCK_ENTRIES: Final = 512
_REGION: Final = struct.Struct("<QQ")
_ADDRESS: Final = struct.Struct("<Q")


def _regions(dma: Dma, block: ParameterBlock, most: int) -> list[tuple[int, int]]:
    count = block["region_count"]
    if not 1 <= count <= most:
        dma.processor.refuse(FirmwareStatus.INVALID_PARAM, f"{count} regions; expected 1 to {most}")
    data = dma.read(block["regions_address"], count * _REGION.size)
    return [(base, size) for base, size in _REGION.iter_unpack(data)]


def _set_smr(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.INIT)
    dma.processor.set_smr(block["entry_size"], _regions(dma, block, SMR_ENTRIES_MAX))


def _set_guest_private_memory(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.LUPDATE, GuestState.RUPDATE)
    dma.processor.set_guest_private_memory(block["handle"], _regions(dma, block, REGIONS_PER_COMMAND))


def _launch_encrypt_data(dma: Dma, block: ParameterBlock) -> None:
    blocks = list(struct.unpack("<8Q", block.octets("data_blocks")))
    while blocks and not blocks[-1]:
        blocks.pop()
    dma.processor.launch_encrypt_data(block["handle"], block["gpa"], block["length"], blocks)


def _launch_encrypt_vmcb(dma: Dma, block: ParameterBlock) -> None:
    address, length = dma.processor.launch_encrypt_vmcb(
        block["handle"],
        block["vcpu_id"],
        block["vmsa_address"],
        block["vmsa_length"],
        block["shadow_vmcb_address"],
        block["shadow_vmcb_length"],
    )
    block["secure_vmcb_address"] = address
    block["secure_vmcb_length"] = length


def _update_npt(dma: Dma, block: ParameterBlock) -> None:
    block["page_count"] = dma.processor.update_npt(
        block["handle"],
        block["error_code"],
        block["gpa"],
        block["spa"],
        block["level"],
        block["page_attributes"],
        block["page_attribute_mask"],
        block["page_count"],
    )


# ---- Migration ------------------------------------------------------------------------------------------------------


def _addresses(dma: Dma, address: int, count: int) -> list[int]:
    return [place for (place,) in _ADDRESS.iter_unpack(dma.read(address, count * _ADDRESS.size))] if count else []


def _transport_pages(dma: Dma, block: ParameterBlock) -> list[int]:
    """The pages behind the transport block, all of them checked."""
    length = block["transport_length"]
    dma.check_length(block, "transport", most=BLOCK_ENTRIES * PAGE)
    found = _addresses(dma, block["transport_address"], -(-length // PAGE))
    return [dma.processor.physical(address, PAGE, PAGE) for address in found]


def _scatter(dma: Dma, pages: list[int], data: bytes) -> None:
    for index, start in enumerate(range(0, len(data), PAGE)):
        dma.write(pages[index], data[start : start + PAGE])


def _gather(dma: Dma, pages: list[int], length: int) -> bytes:
    return b"".join(dma.read(page, PAGE) for page in pages)[:length]


def _send_encrypt_data(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.SUPDATE)
    dma.check_length(block, "guest", most=BLOCK_ENTRIES * _ADDRESS.size)
    length, sends = block["guest_length"], block["flag"] != SET_READ_ONLY
    header_place, pages = 0, []
    if sends:
        # All lengths zero is the question what is needed at most.
        needed = length // _ADDRESS.size * PAGE or BLOCK_ENTRIES * PAGE
        dma.require_room(block, header_length=ENCRYPT_HEADER_BYTES, transport_length=needed)
        header_place = dma.processor.physical(block["header_address"], ENCRYPT_HEADER_BYTES)
        pages = _transport_pages(dma, block)
    guest_block = dma.fetch(block, "guest")
    header, marked, transport = dma.processor.send_encrypt_data(block["handle"], guest_block, block["flag"])
    dma.write(block["guest_address"], marked)
    if sends:
        dma.write(header_place, header)
        _scatter(dma, pages, transport)
        block["header_length"] = len(header)
        block["transport_length"] = len(transport)


def _send_encrypt_context(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.SUPDATE)
    room = {"header_length": block["header_length"], "transport_length": block["transport_length"]}
    header_place = 0
    if room["header_length"] >= ENCRYPT_HEADER_BYTES:
        header_place = dma.processor.physical(block["header_address"], ENCRYPT_HEADER_BYTES)
    pages = _transport_pages(dma, block)
    header, transport = dma.processor.send_encrypt_context(block["handle"], **room)
    dma.write(header_place, header)
    _scatter(dma, pages, transport)
    block["header_length"] = len(header)
    block["transport_length"] = len(transport)


def _receive_encrypt_data(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.RUPDATE)
    dma.check_length(block, "header", exactly=ENCRYPT_HEADER_BYTES)
    dma.check_length(block, "guest", most=BLOCK_ENTRIES * _ADDRESS.size)
    header, guest_block = dma.fetch(block, "header"), dma.fetch(block, "guest")
    transport = _gather(dma, _transport_pages(dma, block), block["transport_length"])
    dma.processor.receive_encrypt_data(block["handle"], header, guest_block, transport)


def _receive_encrypt_context(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.RUPDATE)
    dma.check_length(block, "header", exactly=ENCRYPT_HEADER_BYTES)
    length = block["vmcb_length"]
    if length % _ADDRESS.size or length > BLOCK_ENTRIES * _ADDRESS.size:
        dma.processor.refuse(FirmwareStatus.INVALID_LENGTH, f"VMCB blocks of {length} bytes; expected 8 for each vCPU")
    header = dma.fetch(block, "header")
    transport = _gather(dma, _transport_pages(dma, block), block["transport_length"])
    shadows = _addresses(dma, block["shadow_vmcb_address"], length // _ADDRESS.size)
    answer_place = dma.processor.physical(block["secure_vmcb_address"], length)
    secure = dma.processor.receive_encrypt_context(block["handle"], header, transport, shadows)
    dma.write(answer_place, b"".join(_ADDRESS.pack(address) for address in secure))


CSV3_HANDLERS: Final[Mapping[Command, Callable[[Dma, ParameterBlock], None]]] = {
    Command.SET_SMR: _set_smr,
    Command.SET_SMCR: lambda dma, block: dma.processor.set_smcr(block["base"], block["size"]),
    Command.SET_GUEST_PRIVATE_MEMORY: _set_guest_private_memory,
    Command.LAUNCH_ENCRYPT_DATA: _launch_encrypt_data,
    Command.LAUNCH_ENCRYPT_VMCB: _launch_encrypt_vmcb,
    Command.UPDATE_NPT: _update_npt,
    Command.LAUNCH_FINISH_EX: lambda dma, block: dma.processor.launch_finish_ex(
        block["handle"], block.octets("host_data")
    ),
    Command.SEND_ENCRYPT_DATA: _send_encrypt_data,
    Command.SEND_ENCRYPT_CONTEXT: _send_encrypt_context,
    Command.RECEIVE_ENCRYPT_DATA: _receive_encrypt_data,
    Command.RECEIVE_ENCRYPT_CONTEXT: _receive_encrypt_context,
    Command.DBG_READ_VMSA: lambda dma, block: dma.processor.dbg_read_vmsa(
        block["handle"], block["spa"], block["length"], block["vcpu_id"]
    ),
    Command.DBG_READ_MEM: lambda dma, block: dma.processor.dbg_read_mem(
        block["handle"], block["gpa"], block["spa"], block["length"]
    ),
}
