"""Every mailbox command and its parameter block, as data.

A block is packed and little-endian. The table below is all there is: decoding, encoding, the mailbox's answers and the table
in docs/mailbox.md come from it.

    in         the host fills it, the firmware reads it
    out        the firmware fills it, whatever stood there
    in/out     both; lengths of output buffers are of this kind
    reserved   must be zero, else INVALID_PARAM

Sources: specification sections 4.1 and 4.2 (torvalds/linux include/linux/psp-sev.h; anolis-cloud-kernel
include/linux/psp-hygon.h). ACTIVATE_EX, SWAP_OUT and SWAP_IN have an id but no published block.

Thread-safety: immutable data and pure functions; a ParameterBlock belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple

from csvfast.errors import FirmwareError, FirmwareStatus, LengthError

__all__ = ["LAYOUTS", "Command", "CommandLayout", "Direction", "Field", "ParameterBlock", "markdown_table"]


class Command(IntEnum):
    """Mailbox command ids of section 4.1."""

    INIT = 0x01
    SHUTDOWN = 0x02
    FACTORY_RESET = 0x03
    PLATFORM_STATUS = 0x04
    PEK_GEN = 0x05
    PEK_CSR = 0x06
    PEK_CERT_IMPORT = 0x07
    PDH_CERT_EXPORT = 0x08
    PDH_GEN = 0x09
    DF_FLUSH = 0x0A
    DOWNLOAD_FIRMWARE = 0x0B
    GET_ID = 0x0C
    INIT_EX = 0x0D
    NOP = 0x0E
    RING_BUFFER = 0x0F
    DECOMMISSION = 0x20
    ACTIVATE = 0x21
    DEACTIVATE = 0x22
    GUEST_STATUS = 0x23
    COPY = 0x24
    ACTIVATE_EX = 0x25
    LAUNCH_START = 0x30
    LAUNCH_UPDATE_DATA = 0x31
    LAUNCH_UPDATE_VMSA = 0x32
    LAUNCH_MEASURE = 0x33
    LAUNCH_SECRET = 0x34
    LAUNCH_FINISH = 0x35
    ATTESTATION = 0x36
    SEND_START = 0x40
    SEND_UPDATE_DATA = 0x41
    SEND_UPDATE_VMSA = 0x42
    SEND_FINISH = 0x43
    SEND_CANCEL = 0x44
    RECEIVE_START = 0x50
    RECEIVE_UPDATE_DATA = 0x51
    RECEIVE_UPDATE_VMSA = 0x52
    RECEIVE_FINISH = 0x53
    DBG_DECRYPT = 0x60
    DBG_ENCRYPT = 0x61
    SWAP_OUT = 0x70
    SWAP_IN = 0x71
    SET_GUEST_PRIVATE_MEMORY = 0x200
    LAUNCH_ENCRYPT_DATA = 0x201
    LAUNCH_ENCRYPT_VMCB = 0x202
    UPDATE_NPT = 0x203
    LAUNCH_FINISH_EX = 0x204
    SEND_ENCRYPT_DATA = 0x210
    SEND_ENCRYPT_CONTEXT = 0x211
    RECEIVE_ENCRYPT_DATA = 0x212
    RECEIVE_ENCRYPT_CONTEXT = 0x213
    DBG_READ_VMSA = 0x220
    DBG_READ_MEM = 0x221
    SET_SMR = 0x230
    SET_SMCR = 0x231
    HGSC_CERT_IMPORT = 0x300


class Direction(StrEnum):
    """Who writes a field."""

    IN = "in"
    OUT = "out"
    IN_OUT = "in/out"
    RESERVED = "reserved"


class Field(NamedTuple):
    """One field: an integer of 1, 2, 4 or 8 bytes, or (octets) bytes of any length."""

    name: str
    offset: int
    size: int
    direction: Direction
    octets: bool


_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


class CommandLayout:
    """Shape of one command's block.

    Attributes:
        command: its id. fields: in order, without gaps. size: bytes of the block, 0 for a command without one.
    """

    __slots__ = ("_names", "_reserved", "_struct", "_written_names", "command", "fields", "size", "written")

    def __init__(self, command: Command, fields: tuple[Field, ...]) -> None:
        self.command = command
        self.fields = fields
        codes = [f"{field.size}s" if field.octets else _CODES[field.size] for field in fields]
        self._struct = struct.Struct("<" + "".join(codes))
        self.size = self._struct.size
        self.written = tuple(field for field in fields if field.direction in (Direction.OUT, Direction.IN_OUT))
        self._names = tuple(field.name for field in fields)
        self._reserved = tuple(field for field in fields if field.direction is Direction.RESERVED)
        self._written_names = frozenset(field.name for field in self.written)

    def is_written(self, name: str) -> bool:
        """Whether the firmware writes the field of that name."""
        return name in self._written_names

    def field(self, name: str) -> Field:
        """The field of that name. Raises KeyError."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def decode(self, data: bytes) -> ParameterBlock:
        """The block in `data`, exactly `size` bytes, as the firmware reads it.

        Raises: LengthError; FirmwareError INVALID_PARAM when a reserved field is not zero.
        """
        if len(data) != self.size:
            raise LengthError(f"{self.command.name} block has {len(data)} bytes; expected {self.size}")
        values = dict(zip(self._names, self._struct.unpack(data), strict=True))
        for field in self._reserved:
            value = values.pop(field.name)
            if value.strip(b"\0") if isinstance(value, bytes) else value:
                raise FirmwareError(
                    FirmwareStatus.INVALID_PARAM,
                    f"{self.command.name}: {field.name} at offset {field.offset} is not zero",
                )
        return ParameterBlock(self, values)

    def encode(self, **values: int | bytes) -> bytes:
        """A block for the mailbox. Fields left out are zero, octets too short are padded with zeros.

        Raises: KeyError for a field the block does not have, LengthError for octets too long, struct.error for a number
            that does not fit.
        """
        names = {field.name for field in self.fields}
        for name in values:
            if name not in names:
                raise KeyError(f"{self.command.name} has no field {name!r}; it has {', '.join(sorted(names))}")
        items: list[int | bytes] = []
        for field in self.fields:
            value = values.get(field.name, b"" if field.octets else 0)
            if isinstance(value, bytes) and len(value) > field.size:
                raise LengthError(f"{self.command.name}: {field.name} has {len(value)} bytes; expected {field.size}")
            items.append(value)
        return self._struct.pack(*items)


class ParameterBlock:
    """The values of one block. `changed` collects what the firmware writes back."""

    __slots__ = ("_values", "changed", "layout")

    def __init__(self, layout: CommandLayout, values: Mapping[str, int | bytes]) -> None:
        self.layout = layout
        self._values = dict(values)
        self.changed: dict[str, int | bytes] = {}

    def __getitem__(self, name: str) -> int:
        """An integer field. Raises KeyError, TypeError for octets."""
        value = self._values[name]
        if isinstance(value, bytes):
            raise TypeError(f"{name} is no integer")
        return value

    def octets(self, name: str) -> bytes:
        """A field of bytes. Raises KeyError, TypeError for an integer."""
        value = self._values[name]
        if not isinstance(value, bytes):
            raise TypeError(f"{name} is an integer")
        return value

    def __setitem__(self, name: str, value: int | bytes) -> None:
        """What the firmware answers in a field that is out or in/out. Raises KeyError for any other field."""
        if not self.layout.is_written(name):
            raise KeyError(f"{self.layout.command.name}: {name} is not written by the firmware")
        self._values[name] = value
        self.changed[name] = value

    def answers(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of what was set so far, neighbouring fields together."""
        found: list[tuple[int, bytes]] = []
        if not self.changed:
            return found
        start, data = 0, b""
        for field in self.layout.written:
            value = self.changed.get(field.name)
            if value is None:
                continue
            part = value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
            if data and field.offset == start + len(data):
                data += part
            else:
                if data:
                    found.append((start, data))
                start, data = field.offset, part
        found.append((start, data))
        return found


# ---- The table ------------------------------------------------------------------------------------------------------

_IN, _OUT, _IO, _RESERVED = Direction.IN, Direction.OUT, Direction.IN_OUT, Direction.RESERVED
_Row = tuple[str, int, Direction]


def _layout(command: Command, *rows: _Row) -> CommandLayout:
    """Rows are (name, size, direction); offsets follow from the sizes, since blocks are packed. A name that begins with an
    asterisk is a field of bytes."""
    fields = []
    offset = 0
    for name, size, direction in rows:
        fields.append(Field(name.lstrip("*"), offset, size, direction, name.startswith("*")))
        offset += size
    return CommandLayout(command, tuple(fields))


def _gap(number: int, size: int = 4) -> _Row:
    return (f"reserved{number}" if size in _CODES else f"*reserved{number}", size, _RESERVED)


def _buffer(name: str, length: Direction = _IN) -> tuple[_Row, _Row]:
    return (f"{name}_address", 8, _IN), (f"{name}_length", 4, length)


_HANDLE: Final[_Row] = ("handle", 4, _IN)


def _packet(command: Command, header: Direction, transport: Direction) -> CommandLayout:
    """The shape that LAUNCH_SECRET, SEND_UPDATE_* and RECEIVE_UPDATE_* share."""
    return _layout(
        command,
        _HANDLE,
        _gap(1),
        *_buffer("header", header),
        _gap(2),
        *_buffer("guest"),
        _gap(3),
        *_buffer("transport", transport),
    )


def _regions(first: str, command: Command) -> CommandLayout:
    return _layout(command, (first, 4, _IN), ("region_count", 4, _IN), ("regions_address", 8, _IN))


_ALL: Final = (
    _layout(Command.INIT, ("flags", 4, _IN), _gap(1), ("tmr_address", 8, _IN), ("tmr_length", 4, _IN)),
    _layout(Command.SHUTDOWN),
    _layout(Command.FACTORY_RESET),
    _layout(
        Command.PLATFORM_STATUS,
        ("api_major", 1, _OUT),
        ("api_minor", 1, _OUT),
        ("state", 1, _OUT),
        ("owner", 1, _OUT),
        ("config", 4, _OUT),
        ("guest_count", 4, _OUT),
    ),
    _layout(Command.PEK_GEN),
    _layout(Command.PEK_CSR, ("address", 8, _IN), ("length", 4, _IO)),
    _layout(Command.PEK_CERT_IMPORT, *_buffer("pek"), _gap(1), *_buffer("oca")),
    _layout(Command.PDH_CERT_EXPORT, *_buffer("pdh", _IO), _gap(1), *_buffer("chain", _IO)),
    _layout(Command.PDH_GEN),
    _layout(Command.DF_FLUSH),
    _layout(Command.DOWNLOAD_FIRMWARE, ("address", 8, _IN), ("length", 4, _IN)),
    _layout(Command.GET_ID, ("address", 8, _IN), ("length", 4, _IO)),
    _layout(
        Command.INIT_EX,
        ("length", 4, _IN),
        ("flags", 4, _IN),
        ("tmr_address", 8, _IN),
        ("tmr_length", 4, _IN),
        _gap(1),
        ("nv_address", 8, _IN),
        ("nv_length", 4, _IN),
    ),
    _layout(Command.NOP),
    _layout(
        Command.RING_BUFFER,
        ("low_command_address", 8, _IN),
        ("low_status_address", 8, _IN),
        ("high_command_address", 8, _IN),
        ("high_status_address", 8, _IN),
        ("low_size", 1, _IN),
        ("high_size", 1, _IN),
        ("low_threshold", 2, _IN),
        ("high_threshold", 2, _IN),
        ("interrupt_on_empty", 2, _IN),
    ),
    _layout(Command.DECOMMISSION, _HANDLE),
    _layout(Command.ACTIVATE, _HANDLE, ("asid", 4, _IN)),
    _layout(Command.DEACTIVATE, _HANDLE),
    _layout(Command.GUEST_STATUS, _HANDLE, ("policy", 4, _OUT), ("asid", 4, _OUT), ("state", 1, _OUT)),
    _layout(Command.COPY, _HANDLE, ("length", 4, _IN), ("source_address", 8, _IN), ("destination_address", 8, _IN)),
    _layout(
        Command.LAUNCH_START,
        ("handle", 4, _IO),
        ("policy", 4, _IN),
        *_buffer("dh"),
        _gap(1),
        *_buffer("session"),
    ),
    _layout(Command.LAUNCH_UPDATE_DATA, _HANDLE, _gap(1), ("address", 8, _IN), ("length", 4, _IN)),
    _layout(Command.LAUNCH_UPDATE_VMSA, _HANDLE, _gap(1), ("address", 8, _IN), ("length", 4, _IN)),
    _layout(Command.LAUNCH_MEASURE, _HANDLE, _gap(1), ("address", 8, _IN), ("length", 4, _IO)),
    _packet(Command.LAUNCH_SECRET, _IN, _IN),
    _layout(Command.LAUNCH_FINISH, _HANDLE),
    _layout(Command.ATTESTATION, _HANDLE, _gap(1), ("address", 8, _IN), ("*mnonce", 16, _IN), ("length", 4, _IO)),
    _layout(
        Command.SEND_START,
        _HANDLE,
        ("policy", 4, _OUT),
        *_buffer("pdh"),
        _gap(1),
        *_buffer("platform"),
        _gap(2),
        *_buffer("vendor"),
        _gap(3),
        *_buffer("session", _IO),
    ),
    _packet(Command.SEND_UPDATE_DATA, _IO, _IO),
    _packet(Command.SEND_UPDATE_VMSA, _IO, _IO),
    _layout(Command.SEND_FINISH, _HANDLE),
    _layout(Command.SEND_CANCEL, _HANDLE),
    _layout(
        Command.RECEIVE_START,
        ("handle", 4, _IO),
        ("policy", 4, _IN),
        *_buffer("pdh"),
        _gap(1),
        *_buffer("session"),
    ),
    _packet(Command.RECEIVE_UPDATE_DATA, _IN, _IN),
    _packet(Command.RECEIVE_UPDATE_VMSA, _IN, _IN),
    _layout(Command.RECEIVE_FINISH, _HANDLE),
    *(
        _layout(
            command,
            _HANDLE,
            _gap(1),
            ("source_address", 8, _IN),
            ("destination_address", 8, _IN),
            ("length", 4, _IN),
        )
        for command in (Command.DBG_DECRYPT, Command.DBG_ENCRYPT)
    ),
    _regions("handle", Command.SET_GUEST_PRIVATE_MEMORY),
    _layout(
        Command.LAUNCH_ENCRYPT_DATA,
        _HANDLE,
        _gap(1),
        ("gpa", 8, _IN),
        ("length", 4, _IN),
        _gap(2),
        ("*data_blocks", 64, _IN),
    ),
    _layout(
        Command.LAUNCH_ENCRYPT_VMCB,
        _HANDLE,
        _gap(1),
        ("vcpu_id", 4, _IN),
        _gap(2),
        *_buffer("vmsa"),
        _gap(3),
        *_buffer("shadow_vmcb"),
        _gap(4),
        ("secure_vmcb_address", 8, _OUT),
        ("secure_vmcb_length", 4, _OUT),
    ),
    _layout(
        Command.UPDATE_NPT,
        _HANDLE,
        _gap(1),
        ("error_code", 4, _IN),
        _gap(2),
        ("gpa", 8, _IN),
        ("spa", 8, _IN),
        ("level", 8, _IN),
        ("page_attributes", 8, _IN),
        ("page_attribute_mask", 8, _IN),
        ("page_count", 4, _IO),
    ),
    _layout(Command.LAUNCH_FINISH_EX, _HANDLE, _gap(1), ("*host_data", 64, _IN), _gap(2, 184)),
    _layout(
        Command.SEND_ENCRYPT_DATA,
        _HANDLE,
        _gap(1),
        *_buffer("header", _IO),
        _gap(2),
        *_buffer("guest"),
        ("flag", 4, _IN),
        *_buffer("transport", _IO),
    ),
    _layout(
        Command.SEND_ENCRYPT_CONTEXT, _HANDLE, _gap(1), *_buffer("header", _IO), _gap(2), *_buffer("transport", _IO)
    ),
    _packet(Command.RECEIVE_ENCRYPT_DATA, _IN, _IN),
    _layout(
        Command.RECEIVE_ENCRYPT_CONTEXT,
        _HANDLE,
        _gap(1),
        *_buffer("header"),
        _gap(2),
        *_buffer("transport"),
        _gap(3),
        ("shadow_vmcb_address", 8, _IN),
        ("secure_vmcb_address", 8, _IN),
        ("vmcb_length", 4, _IN),
    ),
    _layout(Command.DBG_READ_VMSA, _HANDLE, _gap(1), ("spa", 8, _IN), ("length", 4, _IN), ("vcpu_id", 4, _IN)),
    _layout(Command.DBG_READ_MEM, _HANDLE, _gap(1), ("gpa", 8, _IN), ("spa", 8, _IN), ("length", 4, _IN)),
    _regions("entry_size", Command.SET_SMR),
    _layout(Command.SET_SMCR, ("base", 8, _IN), ("size", 8, _IN)),
    _layout(Command.HGSC_CERT_IMPORT, *_buffer("hgscsk"), _gap(1), *_buffer("hgsc")),
)

LAYOUTS: Final[Mapping[int, CommandLayout]] = {int(layout.command): layout for layout in _ALL}


def markdown_table() -> str:
    """The table of docs/mailbox.md: one line for each field of each command."""
    lines = ["| Id | Command | Block | Offset | Size | Field | |", "|---|---|---|---|---|---|---|"]
    for command in Command:
        layout = LAYOUTS.get(command)
        title = f"| {command:#05x} | {command.name} |"
        if layout is None:
            lines.append(f"{title} not published | | | | UNSUPPORTED |")
            continue
        if not layout.fields:
            lines.append(f"{title} none | | | | |")
            continue
        for index, field in enumerate(layout.fields):
            start = f"{title} {layout.size} |" if index == 0 else "| | | |"
            lines.append(f"{start} {field.offset} | {field.size} | {field.name} | {field.direction.value} |")
    return "\n".join(lines) + "\n"
