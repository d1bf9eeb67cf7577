"""What user space hands to the kernel's devices: numbers and structures, for people who write VMMs and guests.

    /dev/sev          platform commands of the host        IssueCommand and its payloads
    /dev/csv-guest    report and RTMR requests of a guest  ReportArgument, RtmrArgument
    /dev/kvm          a virtual machine's commands         KvmCommand, MemoryRegion

Nothing here opens a device. Structures are little-endian as on x86; each has pack() and unpack().

Sources: specification sections 3.7, 3.11, 4.2, 4.9 (torvalds/linux include/uapi/linux/psp-sev.h, arch/x86/include/uapi/asm/kvm.h;
openanolis/csv-rs src/api/guest/{ioctl,rtmr}.rs; anolis-cloud-kernel arch/x86/kvm/svm/csv.c).

Thread-safety: immutable data.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Self

from csvfast.errors import FormatError

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = [
    "CSV_GUEST_GET_REPORT",
    "CSV_GUEST_RTMR_REQUEST",
    "KVM_HC_VM_ATTESTATION",
    "KVM_MEMORY_ENCRYPT_OP",
    "KVM_MEMORY_ENCRYPT_REG_REGION",
    "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    "SEV_ISSUE_CMD",
    "BufferPair",
    "ChipIds",
    "IssueCommand",
    "KvmCommand",
    "KvmCommandId",
    "MemoryRegion",
    "OneBuffer",
    "ReportArgument",
    "RtmrArgument",
    "RtmrSubcommand",
    "SevCommandId",
    "ioctl_number",
]

_WRITE: Final = 1
_READ: Final = 2


def ioctl_number(direction: str, group: int, number: int, size: int) -> int:
    """Linux' _IOR, _IOW and _IOWR on x86. `direction` is "r", "w" or "rw" as seen by user space."""
    bits = {"w": _WRITE, "r": _READ, "rw": _READ | _WRITE}[direction]
    return bits << 30 | size << 16 | group << 8 | number


class _Structure:
    """Encoding that the NamedTuples below share."""

    _shape: ClassVar[struct.Struct]

    def pack(self: Any) -> bytes:
        """The structure's bytes. Raises struct.error for a number that does not fit."""
        return self._shape.pack(*self)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: BytesLike) -> Self:
        """Raises: FormatError for another length."""
        raw = bytes(data)
        if len(raw) != cls._shape.size:
            raise FormatError(cls.__name__, "length", None, f"{len(raw)} bytes", f"{cls._shape.size} bytes")
        return cls(*cls._shape.unpack(raw))


class SevCommandId(IntEnum):
    """`cmd` of IssueCommand. 38 is listed by Hygon's devkit header only."""

    FACTORY_RESET = 0
    PLATFORM_STATUS = 1
    PEK_GEN = 2
    PEK_CSR = 3
    PDH_GEN = 4
    PDH_CERT_EXPORT = 5
    PEK_CERT_IMPORT = 6
    GET_ID = 7
    GET_ID2 = 8
    ATTESTATION = 38
    HGSC_CERT_IMPORT = 201


class KvmCommandId(IntEnum):
    """`id` of KvmCommand: AMD's list, then Hygon's."""

    INIT = 0
    ES_INIT = 1
    LAUNCH_START = 2
    LAUNCH_UPDATE_DATA = 3
    LAUNCH_UPDATE_VMSA = 4
    LAUNCH_SECRET = 5
    LAUNCH_MEASURE = 6
    LAUNCH_FINISH = 7
    SEND_START = 8
    SEND_UPDATE_DATA = 9
    SEND_UPDATE_VMSA = 10
    SEND_FINISH = 11
    RECEIVE_START = 12
    RECEIVE_UPDATE_DATA = 13
    RECEIVE_UPDATE_VMSA = 14
    RECEIVE_FINISH = 15
    GUEST_STATUS = 16
    DBG_DECRYPT = 17
    DBG_ENCRYPT = 18
    CERT_EXPORT = 19
    GET_ATTESTATION_REPORT = 20
    SEND_CANCEL = 21
    CSV_COMMAND_BATCH = 0x18
    CSV3_INIT = 0xC0
    CSV3_LAUNCH_ENCRYPT_DATA = 0xC1
    CSV3_LAUNCH_ENCRYPT_VMCB = 0xC2
    CSV3_SEND_ENCRYPT_DATA = 0xC3
    CSV3_SEND_ENCRYPT_CONTEXT = 0xC4
    CSV3_RECEIVE_ENCRYPT_DATA = 0xC5
    CSV3_RECEIVE_ENCRYPT_CONTEXT = 0xC6
    CSV3_SET_GUEST_PRIVATE_MEMORY = 0xC8


class RtmrSubcommand(IntEnum):
    """`subcommand` of RtmrArgument."""

    STATUS = 1
    START = 2
    READ = 3
    EXTEND = 4


class _IssueCommand(NamedTuple):
    command: int
    data: int
    error: int = 0


class IssueCommand(_Structure, _IssueCommand):
    """sev_issue_cmd, 16 bytes packed: command id, address of the payload, firmware status (out)."""

    _shape = struct.Struct("<IQI")


class _OneBuffer(NamedTuple):
    address: int
    length: int


class OneBuffer(_Structure, _OneBuffer):
    """Payload of PEK_CSR and GET_ID2: where the answer goes, its length (in and out).

    A length that is too small, or 0 as a question, fails with `error` INVALID_LENGTH and what is needed in `length`. GET_ID2
    gives one chip id of 64 bytes per socket.
    """

    _shape = struct.Struct("<QI")


class _ChipIds(NamedTuple):
    first_socket: bytes
    second_socket: bytes = b""


class ChipIds(_Structure, _ChipIds):
    """Payload of GET_ID, which is older than GET_ID2 (sev_user_data_get_id): 64 bytes for each of two sockets, NUL-padded; all
    zero where there is no second one."""

    _shape = struct.Struct("<64s64s")


class _BufferPair(NamedTuple):
    first_address: int
    first_length: int
    second_address: int
    second_length: int


class BufferPair(_Structure, _BufferPair):
    """Payload of PDH_CERT_EXPORT (PDH; PEK, OCA, CEK), PEK_CERT_IMPORT (PEK; OCA), HGSC_CERT_IMPORT: packed, without the reserved
    words that the firmware's blocks have between them."""

    _shape = struct.Struct("<QIQI")


class _KvmCommand(NamedTuple):
    id: int
    data: int
    error: int = 0
    sev_fd: int = 0


class KvmCommand(_Structure, _KvmCommand):
    """kvm_sev_cmd, 24 bytes, not packed: four bytes of padding follow the id."""

    _shape = struct.Struct("<I4xQII")


class _MemoryRegion(NamedTuple):
    address: int
    size: int


class MemoryRegion(_Structure, _MemoryRegion):
    """kvm_enc_region: memory to pin for an encrypted guest."""

    _shape = struct.Struct("<QQ")


class _ReportArgument(NamedTuple):
    address: int
    length: int


class ReportArgument(_Structure, _ReportArgument):
    """Argument of CSV_GUEST_GET_REPORT, 16 bytes: the guest's request page, answered in place."""

    _shape = struct.Struct("<QI4x")


class _RtmrArgument(NamedTuple):
    address: int
    length: int
    subcommand: int
    reserved: int = 0
    error: int = 0


class RtmrArgument(_Structure, _RtmrArgument):
    """Argument of CSV_GUEST_RTMR_REQUEST, 24 bytes packed."""

    _shape = struct.Struct("<QQHHI")


SEV_ISSUE_CMD: Final = ioctl_number("rw", ord("S"), 0, 16)
CSV_GUEST_GET_REPORT: Final = ioctl_number("rw", ord("D"), 1, 16)
CSV_GUEST_RTMR_REQUEST: Final = ioctl_number("rw", ord("D"), 2, 24)
KVM_MEMORY_ENCRYPT_OP: Final = ioctl_number("rw", 0xAE, 0xBA, 8)
KVM_MEMORY_ENCRYPT_REG_REGION: Final = ioctl_number("r", 0xAE, 0xBB, 16)
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = ioctl_number("r", 0xAE, 0xBC, 16)
KVM_HC_VM_ATTESTATION: Final = 100  # hypercall: rbx = guest physical address of the page, rcx = length
