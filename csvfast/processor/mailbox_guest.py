"""Mailbox handlers of guest commands: launch, attestation, debug, migration of CSV and CSV2 guests.

Where a command changes the guest before its answer is written, everything that can refuse is checked here first, in the
firmware's order: platform state, handle, guest state, lengths, addresses.

Thread-safety: called under the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.certs.layout import CSV_BYTES
from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import Command
from csvfast.processor.core import GuestState, PlatformState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from csvfast.processor.commands import ParameterBlock
    from csvfast.processor.dma import Dma
    from csvfast.processor.guest import Guest

__all__ = ["GUEST_HANDLERS", "VM_ATTESTATION"]

# The literal with which KVM says that the request comes from the guest's own page (specification section 3.7).
VM_ATTESTATION: Final = b"VM_ATTESTATION\0\0"
PACKET_HEADER_BYTES: Final = 52
MEASURE_BYTES: Final = 48
HOST_REPORT_BYTES: Final = 208
SECRET_MAX: Final = 16 << 10
PACKET_MAX: Final = 1 << 20  # a cap before anything is read; the commands have their own limits
CERTIFICATES_MAX: Final = 1 << 16
SESSION_BYTES: Final = {"hygon": 772, "amd": 128}


def guest_in(dma: Dma, block: ParameterBlock, *states: GuestState) -> Guest:
    """The guest of the block's handle in one of the states, refused in the firmware's order."""
    guest = dma.processor.guest(block["handle"])
    if states:
        dma.processor.require_state(guest, *states)
    return guest


# ---- Life cycle -----------------------------------------------------------------------------------------------------


def _guest_status(dma: Dma, block: ParameterBlock) -> None:
    status = dma.processor.guest_status(block["handle"])
    block["policy"] = status.policy
    block["asid"] = status.asid
    block["state"] = int(status.state)


def _launch_start(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.INIT, PlatformState.WORKING)
    if block["handle"] and block["handle"] not in dma.processor.guests:
        dma.processor.refuse(FirmwareStatus.INVALID_GUEST, f"no guest has handle {block['handle']}")
    for name, exactly in (("dh", CSV_BYTES), ("session", SESSION_BYTES[dma.processor.options.session_layout])):
        if block[f"{name}_length"]:
            dma.check_length(block, name, exactly=exactly)
    dh, session = dma.fetch(block, "dh"), dma.fetch(block, "session")
    block["handle"] = dma.processor.launch_start(block["policy"], dh=dh, session=session, handle=block["handle"])


def _launch_measure(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.LUPDATE)
    dma.require_room(block, length=MEASURE_BYTES)
    place = dma.processor.physical(block["address"], MEASURE_BYTES)
    blob = dma.processor.launch_measure(block["handle"])
    dma.write(place, blob)
    block["length"] = len(blob)


def _launch_secret(dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.LSECRET)
    dma.check_length(block, "header", exactly=PACKET_HEADER_BYTES)
    dma.check_length(block, "guest", most=SECRET_MAX)
    header = dma.fetch(block, "header")
    transport = dma.fetch(block, "transport", most=SECRET_MAX)
    dma.processor.launch_secret(block["handle"], header, block["guest_address"], block["guest_length"], transport)


# ---- Attestation ----------------------------------------------------------------------------------------------------


def _attestation(dma: Dma, block: ParameterBlock) -> None:
    """Answered in the guest's own page if `mnonce` is the literal, else the host's 208-byte form in a host buffer."""
    processor = dma.processor
    if block.octets("mnonce") == VM_ATTESTATION:
        # The command itself checks everything before it answers in place, and names the length it needs.
        processor.attestation(block["handle"], block["address"], block["length"])
        return
    guest_in(dma, block)
    dma.require_room(block, length=HOST_REPORT_BYTES)
    place = processor.physical(block["address"], HOST_REPORT_BYTES)
    report = processor.attestation_host(block["handle"], block.octets("mnonce"))
    dma.write(place, report)
    block["length"] = len(report)


# ---- Migration ------------------------------------------------------------------------------------------------------


def _send_start(dma: Dma, block: ParameterBlock) -> None:
    """A session buffer too small is refused before anything else is looked at: KVM asks for the length with all lengths 0."""
    guest_in(dma, block, GuestState.RUNNING)
    dma.require_room(block, session_length=SESSION_BYTES[dma.processor.options.session_layout])
    dma.check_length(block, "pdh", exactly=CSV_BYTES)
    for name in ("platform", "vendor"):
        dma.check_length(block, name, most=CERTIFICATES_MAX)
    place = dma.processor.physical(block["session_address"], block["session_length"])
    pdh, platform, vendor = (dma.fetch(block, name) for name in ("pdh", "platform", "vendor"))
    policy, session = dma.processor.send_start(block["handle"], pdh, platform, vendor)
    dma.write(place, session)
    block["policy"] = int(policy)
    block["session_length"] = len(session)


def _send_packet(send: Callable[[int, int, int], tuple[bytes, bytes]], dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.SUPDATE)
    length = block["guest_length"]
    dma.require_room(block, header_length=PACKET_HEADER_BYTES, transport_length=length)
    dma.check_length(block, "guest", most=PACKET_MAX)
    header_place = dma.processor.physical(block["header_address"], PACKET_HEADER_BYTES)
    transport_place = dma.processor.physical(block["transport_address"], length)
    header, transport = send(block["handle"], block["guest_address"], length)
    dma.write(header_place, header)
    dma.write(transport_place, transport)
    block["header_length"] = len(header)
    block["transport_length"] = len(transport)


def _send_update_data(dma: Dma, block: ParameterBlock) -> None:
    _send_packet(dma.processor.send_update_data, dma, block)


def _send_update_vmsa(dma: Dma, block: ParameterBlock) -> None:
    _send_packet(dma.processor.send_update_vmsa, dma, block)


def _receive_start(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.INIT, PlatformState.WORKING)
    if block["handle"] and block["handle"] not in dma.processor.guests:
        dma.processor.refuse(FirmwareStatus.INVALID_GUEST, f"no guest has handle {block['handle']}")
    # The source's PDH, or its whole chain file: the command says which lengths are right.
    dma.check_length(block, "pdh", most=CERTIFICATES_MAX)
    dma.check_length(block, "session", exactly=SESSION_BYTES[dma.processor.options.session_layout])
    pdh, session = dma.fetch(block, "pdh"), dma.fetch(block, "session")
    block["handle"] = dma.processor.receive_start(block["policy"], pdh, session, handle=block["handle"])


def _receive_packet(receive: Callable[[int, bytes, int, int, bytes], None], dma: Dma, block: ParameterBlock) -> None:
    guest_in(dma, block, GuestState.RUPDATE)
    dma.check_length(block, "header", exactly=PACKET_HEADER_BYTES)
    dma.check_length(block, "guest", most=PACKET_MAX)
    header = dma.fetch(block, "header")
    transport = dma.fetch(block, "transport", most=PACKET_MAX)
    receive(block["handle"], header, block["guest_address"], block["guest_length"], transport)


def _receive_update_data(dma: Dma, block: ParameterBlock) -> None:
    _receive_packet(dma.processor.receive_update_data, dma, block)


def _receive_update_vmsa(dma: Dma, block: ParameterBlock) -> None:
    _receive_packet(dma.processor.receive_update_vmsa, dma, block)


GUEST_HANDLERS: Final[Mapping[Command, Callable[[Dma, ParameterBlock], None]]] = {
    Command.ACTIVATE: lambda dma, block: dma.processor.activate(block["handle"], block["asid"]),
    Command.DEACTIVATE: lambda dma, block: dma.processor.deactivate(block["handle"]),
    Command.DECOMMISSION: lambda dma, block: dma.processor.decommission(block["handle"]),
    Command.GUEST_STATUS: _guest_status,
    Command.COPY: lambda dma, block: dma.processor.copy(
        block["handle"], block["source_address"], block["destination_address"], block["length"]
    ),
    Command.LAUNCH_START: _launch_start,
    Command.LAUNCH_UPDATE_DATA: lambda dma, block: dma.processor.launch_update_data(
        block["handle"], block["address"], block["length"]
    ),
    Command.LAUNCH_UPDATE_VMSA: lambda dma, block: dma.processor.launch_update_vmsa(
        block["handle"], block["address"], block["length"]
    ),
    Command.LAUNCH_MEASURE: _launch_measure,
    Command.LAUNCH_SECRET: _launch_secret,
    Command.LAUNCH_FINISH: lambda dma, block: dma.processor.launch_finish(block["handle"]),
    Command.ATTESTATION: _attestation,
    Command.DBG_DECRYPT: lambda dma, block: dma.processor.dbg_decrypt(
        block["handle"], block["source_address"], block["destination_address"], block["length"]
    ),
    Command.DBG_ENCRYPT: lambda dma, block: dma.processor.dbg_encrypt(
        block["handle"], block["source_address"], block["destination_address"], block["length"]
    ),
    Command.SEND_START: _send_start,
    Command.SEND_UPDATE_DATA: _send_update_data,
    Command.SEND_UPDATE_VMSA: _send_update_vmsa,
    Command.SEND_FINISH: lambda dma, block: dma.processor.send_finish(block["handle"]),
    Command.SEND_CANCEL: lambda dma, block: dma.processor.send_cancel(block["handle"]),
    Command.RECEIVE_START: _receive_start,
    Command.RECEIVE_UPDATE_DATA: _receive_update_data,
    Command.RECEIVE_UPDATE_VMSA: _receive_update_vmsa,
    Command.RECEIVE_FINISH: lambda dma, block: dma.processor.receive_finish(block["handle"]),
}
