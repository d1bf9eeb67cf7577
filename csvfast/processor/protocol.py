"""The little protocol between a processor in one process and the machines that use it in others.

A Unix stream socket; little-endian; a message is a header of 16 bytes and a body:

    request    u32 operation   u32 bytes of body   u64 tag
    answer     u32 status      u32 bytes of body   u64 tag (the request's)

`status` is a firmware status (0 = SUCCESS) or, from 0x10000 on, one of this protocol's own. With any status but 0 the body is a
sentence in UTF-8 for people, at most 1024 bytes; with NESTED_PAGE_FAULT it is u64 gpa, u32 error code. Requests of one
connection are answered in order.

    1 HELLO          u32 version (1)                                u32 version, u32 cores, u32 highest ASID, u32 zero,
                                                                    u64 base address, u64 size; with it, as SCM_RIGHTS, a
                                                                    descriptor of the DRAM to mmap (MAP_SHARED)
    2 COMMAND        u32 id, u32 zero, u64 address of the block     (the status is the command's)
    3 RING           u32 tail, u32 head, u32 1 if head counts       u32 head
    4 WBINVD         u32 core, 0xffffffff = each                    -
    5 GUEST_READ     u32 handle, u32 length, u64 address            the bytes (see below)
    6 GUEST_WRITE    u32 handle, u32 zero, u64 address, bytes       -
    7 ALLOCATE       u64 size, u64 alignment                        u64 address
    8 FREE           u64 address                                    -
    9 ASSIGN         u32 handle, u32 zero, u64 address, u64 gpa     -
   10 GUEST_RANGES   u32 handle                                     u64 gpa, u64 address, u64 size for each
   11 GUESTS         -                                              u32 handle for each

The address of a guest access is system physical, with the C-bit (bit 47) where the guest's page table has it; for a CSV3 guest it
is guest physical. Operations 5 and 6 may have a socket of their own. One access moves at most 1 MiB. HELLO may come at any time,
and need not. A body above 1 MiB and 64 bytes, or a message that does not arrive within ten seconds of its first byte, ends the
connection.

Thread-safety: constants, and a function without state.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Final

__all__ = ["BODY_MAX", "EACH_CORE", "HEADER", "VERSION", "Operation", "ProtocolStatus", "peer_user"]

VERSION: Final = 1
HEADER: Final = struct.Struct("<IIQ")
BODY_MAX: Final = (1 << 20) + 64
TEXT_MAX: Final = 1024
EACH_CORE: Final = 0xFFFFFFFF

HELLO_REQUEST: Final = struct.Struct("<I")
HELLO_ANSWER: Final = struct.Struct("<IIIIQQ")
COMMAND: Final = struct.Struct("<IIQ")
RING: Final = struct.Struct("<III")
WORD: Final = struct.Struct("<I")
ACCESS: Final = struct.Struct("<IIQ")
ALLOCATE: Final = struct.Struct("<QQ")
ADDRESS: Final = struct.Struct("<Q")
FAULT: Final = struct.Struct("<QI")
ASSIGN: Final = struct.Struct("<IIQQ")
RANGE: Final = struct.Struct("<QQQ")


class Operation(IntEnum):
    """First word of a request."""

    HELLO = 1
    COMMAND = 2
    RING = 3
    WBINVD = 4
    GUEST_READ = 5
    GUEST_WRITE = 6
    ALLOCATE = 7
    FREE = 8
    ASSIGN = 9
    GUEST_RANGES = 10
    GUESTS = 11


class ProtocolStatus(IntEnum):
    """Statuses beyond those of the firmware. WRONG_SOCKET: a host's request on the vCPUs' socket, or the other way round."""

    BAD_REQUEST = 0x10001
    UNKNOWN_OPERATION = 0x10002
    NO_MEMORY = 0x10003
    INTERNAL = 0x10004
    NESTED_PAGE_FAULT = 0x10005
    WRONG_SOCKET = 0x10006


_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


def peer_user(connection: socket.socket) -> int:
    """The user who made the other end of a Unix connection. Raises OSError."""
    user: int = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
    return user
