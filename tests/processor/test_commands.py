"""Parameter blocks against the specification's offsets, typed here once more by hand, and against the documentation."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import FirmwareError, FirmwareStatus, LengthError
from csvfast.processor.commands import LAYOUTS, Command, Direction, markdown_table

# Command: (offset, size) of each field that is not reserved, in order, as section 4.2 has them; the block ends after the last.
SPECIFIED: dict[Command, list[tuple[int, int]]] = {
    Command.INIT: [(0, 4), (8, 8), (16, 4)],
    Command.INIT_EX: [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4)],
    Command.PLATFORM_STATUS: [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 4)],
    Command.PEK_CSR: [(0, 8), (8, 4)],
    Command.GET_ID: [(0, 8), (8, 4)],
    Command.DOWNLOAD_FIRMWARE: [(0, 8), (8, 4)],
    Command.PEK_CERT_IMPORT: [(0, 8), (8, 4), (16, 8), (24, 4)],
    Command.PDH_CERT_EXPORT: [(0, 8), (8, 4), (16, 8), (24, 4)],
    Command.DECOMMISSION: [(0, 4)],
    Command.DEACTIVATE: [(0, 4)],
    Command.LAUNCH_FINISH: [(0, 4)],
    Command.SEND_FINISH: [(0, 4)],
    Command.SEND_CANCEL: [(0, 4)],
    Command.RECEIVE_FINISH: [(0, 4)],
    Command.ACTIVATE: [(0, 4), (4, 4)],
    Command.GUEST_STATUS: [(0, 4), (4, 4), (8, 4), (12, 1)],
    Command.COPY: [(0, 4), (4, 4), (8, 8), (16, 8)],
    Command.LAUNCH_START: [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4)],
    Command.LAUNCH_UPDATE_DATA: [(0, 4), (8, 8), (16, 4)],
    Command.LAUNCH_UPDATE_VMSA: [(0, 4), (8, 8), (16, 4)],
    Command.LAUNCH_MEASURE: [(0, 4), (8, 8), (16, 4)],
    Command.LAUNCH_SECRET: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.ATTESTATION: [(0, 4), (8, 8), (16, 16), (32, 4)],
    Command.SEND_START: [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4), (56, 8), (64, 4)],
    Command.SEND_UPDATE_DATA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.SEND_UPDATE_VMSA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.RECEIVE_START: [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4)],
    Command.RECEIVE_UPDATE_DATA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.RECEIVE_UPDATE_VMSA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.DBG_DECRYPT: [(0, 4), (8, 8), (16, 8), (24, 4)],
    Command.DBG_ENCRYPT: [(0, 4), (8, 8), (16, 8), (24, 4)],
    Command.HGSC_CERT_IMPORT: [(0, 8), (8, 4), (16, 8), (24, 4)],
    Command.RING_BUFFER: [(0, 8), (8, 8), (16, 8), (24, 8), (32, 1), (33, 1), (34, 2), (36, 2), (38, 2)],
    Command.SET_GUEST_PRIVATE_MEMORY: [(0, 4), (4, 4), (8, 8)],
    Command.LAUNCH_ENCRYPT_DATA: [(0, 4), (8, 8), (16, 4), (24, 64)],
    Command.LAUNCH_ENCRYPT_VMCB: [(0, 4), (8, 4), (16, 8), (24, 4), (32, 8), (40, 4), (48, 8), (56, 4)],
    Command.UPDATE_NPT: [(0, 4), (8, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4)],
    Command.LAUNCH_FINISH_EX: [(0, 4), (8, 64)],
    Command.SEND_ENCRYPT_DATA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 4)],
    Command.SEND_ENCRYPT_CONTEXT: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4)],
    Command.RECEIVE_ENCRYPT_DATA: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)],
    Command.RECEIVE_ENCRYPT_CONTEXT: [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 8), (56, 4)],
    Command.DBG_READ_VMSA: [(0, 4), (8, 8), (16, 4), (20, 4)],
    Command.DBG_READ_MEM: [(0, 4), (8, 8), (16, 8), (24, 4)],
    Command.SET_SMR: [(0, 4), (4, 4), (8, 8)],
    Command.SET_SMCR: [(0, 8), (8, 8)],
}
WITHOUT_BLOCK = {
    Command.SHUTDOWN,
    Command.FACTORY_RESET,
    Command.PEK_GEN,
    Command.PDH_GEN,
    Command.DF_FLUSH,
    Command.NOP,
}
UNPUBLISHED = {Command.ACTIVATE_EX, Command.SWAP_OUT, Command.SWAP_IN}
# What firmware and upstream headers disagree about nowhere: who writes a length.
WRITTEN_BACK = {
    Command.PEK_CSR: {"length"},
    Command.GET_ID: {"length"},
    Command.PDH_CERT_EXPORT: {"pdh_length", "chain_length"},
    Command.GUEST_STATUS: {"policy", "asid", "state"},
    Command.LAUNCH_START: {"handle"},
    Command.LAUNCH_MEASURE: {"length"},
    Command.ATTESTATION: {"length"},
    Command.SEND_START: {"policy", "session_length"},
    Command.SEND_UPDATE_DATA: {"header_length", "transport_length"},
    Command.SEND_UPDATE_VMSA: {"header_length", "transport_length"},
    Command.RECEIVE_START: {"handle"},
    Command.LAUNCH_ENCRYPT_VMCB: {"secure_vmcb_address", "secure_vmcb_length"},
    Command.UPDATE_NPT: {"page_count"},
    Command.SEND_ENCRYPT_DATA: {"header_length", "transport_length"},
    Command.SEND_ENCRYPT_CONTEXT: {"header_length", "transport_length"},
}


def test_every_id_is_accounted_for() -> None:
    assert set(SPECIFIED) | WITHOUT_BLOCK | UNPUBLISHED == set(Command)
    assert set(LAYOUTS) == set(Command) - UNPUBLISHED


@pytest.mark.parametrize("command", sorted(SPECIFIED), ids=lambda command: command.name)
def test_offsets(command: Command) -> None:
    layout = LAYOUTS[command]
    found = [(field.offset, field.size) for field in layout.fields if field.direction is not Direction.RESERVED]
    assert found == SPECIFIED[command]
    end = 256 if command is Command.LAUNCH_FINISH_EX else sum(SPECIFIED[command][-1])
    assert layout.size == end
    # Packed: each field begins where the one before it ends.
    places = [(field.offset, field.size) for field in layout.fields]
    assert [offset for offset, _ in places] == [0, *(offset + size for offset, size in places)][:-1]


@pytest.mark.parametrize("command", [c for c in Command if c in LAYOUTS], ids=lambda command: command.name)
def test_who_writes(command: Command) -> None:
    written = {field.name for field in LAYOUTS[command].written}
    if command is Command.PLATFORM_STATUS:
        assert len(written) == 6
    else:
        assert written == WRITTEN_BACK.get(command, set())


@given(st.data())
def test_encode_then_decode(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from([c for c in LAYOUTS if LAYOUTS[c].size]))
    layout = LAYOUTS[command]
    values: dict[str, int | bytes] = {}
    for field in layout.fields:
        if field.direction is not Direction.RESERVED:
            octets = st.binary(min_size=field.size, max_size=field.size)
            values[field.name] = data.draw(octets if field.octets else st.integers(0, 256**field.size - 1))
    encoded = layout.encode(**values)
    block = layout.decode(encoded)
    for field in layout.fields:
        if field.direction is Direction.RESERVED:
            assert not any(encoded[field.offset : field.offset + field.size])
        elif field.octets:
            assert block.octets(field.name) == values[field.name] == encoded[field.offset : field.offset + field.size]
        else:
            assert block[field.name] == values[field.name]
            assert int.from_bytes(encoded[field.offset : field.offset + field.size], "little") == values[field.name]


@pytest.mark.parametrize("command", sorted(SPECIFIED), ids=lambda command: command.name)
def test_every_reserved_byte_must_be_zero(command: Command) -> None:
    layout = LAYOUTS[command]
    for field in layout.fields:
        for offset in range(field.offset, field.offset + field.size):
            block = bytearray(layout.size)
            block[offset] = 0x80
            if field.direction is not Direction.RESERVED:
                layout.decode(bytes(block))
                continue
            with pytest.raises(FirmwareError, match=f"{field.name} at offset {field.offset}") as refusal:
                layout.decode(bytes(block))
            assert refusal.value.status is FirmwareStatus.INVALID_PARAM


def test_misuse_is_named() -> None:
    layout = LAYOUTS[Command.ATTESTATION]
    with pytest.raises(LengthError, match="35 bytes; expected 36"):
        layout.decode(bytes(35))
    with pytest.raises(KeyError, match="no field 'adress'"):
        layout.encode(adress=1)
    with pytest.raises(LengthError, match="17 bytes; expected 16"):
        layout.encode(mnonce=bytes(17))
    with pytest.raises(struct.error):
        layout.encode(handle=1 << 32)
    block = layout.decode(bytes(36))
    with pytest.raises(KeyError, match="not written by the firmware"):
        block["handle"] = 1
    with pytest.raises(TypeError):
        block["mnonce"]
    with pytest.raises(TypeError):
        block.octets("handle")
    block["length"] = 4096
    assert block.answers() == [(32, b"\x00\x10\0\0")]


def test_the_documentation_has_this_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "mailbox.md"
    if not page.parent.is_dir():
        pytest.skip("the tests stand outside a source tree")
    assert markdown_table() in page.read_text(encoding="utf-8")
