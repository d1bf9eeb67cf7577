"""RTMR: the five run-time measurement registers of a CSV3 guest.

    RTMR[0] = launch digest, fixed          RTMR[i] <- SM3(RTMR[i] || data), i = 1..4, from zero

A request is {u16 sub-command, u16 size, u32 error} and a body; the firmware answers in the same bytes. It travels in
the guest's secure call page (secure_call.py), so that the host neither reads nor changes it.

    STATUS 1   u16 version, u8 state, 21 reserved                    size 32, answers version and state
    START 2    u16 version, 22 reserved                              size 32
    READ 3     u32 bitmap, 20 reserved, 32 bytes per register        size 32 + 32 k, registers ascending
    EXTEND 4   u8 index, u8 reserved, u16 length = 32, 20 reserved, 32 bytes of data    size 64

Sources: anolis-cloud-kernel include/linux/psp-hygon.h, drivers/virt/coco/csv-guest/csv-guest.c; csv-rs
src/api/guest/rtmr.rs. Not public and therefore chosen here (inferred): the error codes; START takes INIT to WORKING
and may be repeated with the same version; EXTEND needs WORKING; what stands in a request's in/out field after a
refusal (the largest value allowed).

Thread-safety: the processor's lock.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

from csvfast.crypto import sm3
from csvfast.errors import FirmwareStatus
from csvfast.processor.buffers import copy_of
from csvfast.processor.core import GuestState, ProcessorCore

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.processor.guest import Guest

__all__ = ["RTMR_BYTES", "RTMR_COUNT", "RTMR_VERSION", "RtmrCommand", "RtmrCommands", "RtmrState", "answer"]

RTMR_VERSION: Final = 1
RTMR_COUNT: Final = 5
RTMR_BYTES: Final = 32

_HEADER: Final = Struct("<HHI")
_WORD: Final = Struct("<H")
_BITMAP: Final = Struct("<I")
_FIXED: Final = 32  # header and the 24 bytes before any data
_ALL: Final = (1 << RTMR_COUNT) - 1


class RtmrCommand(IntEnum):
    """Sub-commands."""

    STATUS = 1
    START = 2
    READ = 3
    EXTEND = 4


class RtmrState(IntEnum):
    """State of a guest's registers."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class RtmrCommands(ProcessorCore):
    """The RTMR requests of a guest."""

    def rtmr_request(self, handle: int, data: BytesLike) -> bytes:
        """Works off one request of a running CSV3 guest.

        Args:
            data: header and body; bytes behind the request's own size are returned as they are.
        Returns: the same number of bytes, with the firmware's answer and error code in them.
        Refuses: INVALID_GUEST, INVALID_GUEST_STATE; UNSUPPORTED when the guest is none of CSV3 or the firmware is
            older than build 2337; INVALID_LENGTH when not even the header is there. All else stands in the answer.
        """
        with self.lock:
            guest = self.guest(handle)
            self.require_running(guest)
            self.require_rtmr(guest)
            request = copy_of(data)
            if len(request) < _HEADER.size:
                self.refuse(
                    FirmwareStatus.INVALID_LENGTH,
                    f"RTMR request of {len(request)} bytes; expected at least {_HEADER.size}",
                    {"length": _HEADER.size},
                )
            return answer(guest, request)

    def require_running(self, guest: Guest) -> None:
        """Refuses with INVALID_GUEST_STATE unless the guest's vCPUs may run: RUNNING, or SUPDATE while it is being sent."""
        self.require_state(guest, GuestState.RUNNING, GuestState.SUPDATE)

    def require_rtmr(self, guest: Guest) -> None:
        """Refuses with UNSUPPORTED what has no registers."""
        if not guest.policy.csv3 or not self.profile.extended_report:
            self.refuse(
                FirmwareStatus.UNSUPPORTED,
                f"guest {guest.handle} has no RTMRs: they need CSV3 and build 2337, this is {self.profile.name}",
            )


def answer(guest: Guest, request: bytes) -> bytes:
    """The firmware's answer to a request of at least 8 bytes. Refusals stand in the header and change no register."""
    command, size, _ = _HEADER.unpack_from(request)
    reply = bytearray(request)
    if command == RtmrCommand.STATUS:
        status = _status(guest, reply, size)
    elif command == RtmrCommand.START:
        status = _start(guest, reply, size)
    elif command == RtmrCommand.READ:
        status = _read(guest, reply, size)
    elif command == RtmrCommand.EXTEND:
        status = _extend(guest, reply, size)
    else:
        status = FirmwareStatus.INVALID_COMMAND
    _BITMAP.pack_into(reply, 4, status)
    return bytes(reply)


def _has_size(reply: bytearray, size: int, expected: int) -> bool:
    """Compares the size field; a wrong one is replaced by the right one."""
    if size == expected and len(reply) >= expected:
        return True
    _WORD.pack_into(reply, 2, expected)
    return False


def _status(guest: Guest, reply: bytearray, size: int) -> FirmwareStatus:
    if not _has_size(reply, size, _FIXED):
        return FirmwareStatus.INVALID_LENGTH
    state = RtmrState(guest.rtmr_state)
    version = 0 if state is RtmrState.UNINIT else guest.rtmr_version
    reply[8:_FIXED] = _WORD.pack(version) + bytes([state]) + bytes(21)
    return FirmwareStatus.SUCCESS


def _start(guest: Guest, reply: bytearray, size: int) -> FirmwareStatus:
    if not _has_size(reply, size, _FIXED):
        return FirmwareStatus.INVALID_LENGTH
    (version,) = _WORD.unpack_from(reply, 8)
    if any(reply[10:_FIXED]):
        return FirmwareStatus.INVALID_PARAM
    if version != RTMR_VERSION:
        _WORD.pack_into(reply, 8, RTMR_VERSION)
        return FirmwareStatus.INVALID_PARAM
    if guest.rtmr_state == RtmrState.UNINIT:
        return FirmwareStatus.INVALID_GUEST_STATE
    guest.rtmr_version = version
    guest.rtmr_state = RtmrState.WORKING
    return FirmwareStatus.SUCCESS


def _read(guest: Guest, reply: bytearray, size: int) -> FirmwareStatus:
    if len(reply) < 12:
        _has_size(reply, size, _FIXED + RTMR_BYTES)
        return FirmwareStatus.INVALID_LENGTH
    (bitmap,) = _BITMAP.unpack_from(reply, 8)
    if bitmap == 0 or bitmap & ~_ALL:
        _BITMAP.pack_into(reply, 8, _ALL)
        return FirmwareStatus.INVALID_PARAM
    wanted = [number for number in range(RTMR_COUNT) if bitmap >> number & 1]
    if not _has_size(reply, size, _FIXED + RTMR_BYTES * len(wanted)):
        return FirmwareStatus.INVALID_LENGTH
    if any(reply[12:_FIXED]):
        return FirmwareStatus.INVALID_PARAM
    if guest.rtmr_state == RtmrState.UNINIT:
        return FirmwareStatus.INVALID_GUEST_STATE
    reply[_FIXED : _FIXED + RTMR_BYTES * len(wanted)] = b"".join(guest.rtmrs[number] for number in wanted)
    return FirmwareStatus.SUCCESS


def _extend(guest: Guest, reply: bytearray, size: int) -> FirmwareStatus:
    if not _has_size(reply, size, _FIXED + RTMR_BYTES):
        return FirmwareStatus.INVALID_LENGTH
    index = reply[8]
    (length,) = _WORD.unpack_from(reply, 10)
    if not 1 <= index < RTMR_COUNT:
        reply[8] = RTMR_COUNT - 1
        return FirmwareStatus.INVALID_PARAM
    if length != RTMR_BYTES:
        _WORD.pack_into(reply, 10, RTMR_BYTES)
        return FirmwareStatus.INVALID_LENGTH
    if reply[9] or any(reply[12:_FIXED]):
        return FirmwareStatus.INVALID_PARAM
    if guest.rtmr_state != RtmrState.WORKING:
        return FirmwareStatus.INVALID_GUEST_STATE
    guest.rtmrs[index] = sm3(guest.rtmrs[index] + reply[_FIXED : _FIXED + RTMR_BYTES]).digest()
    return FirmwareStatus.SUCCESS
