"""Numbers and structures of the kernel's devices, against values worked out by hand or by the C compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from csvfast.errors import FormatError
from csvfast.processor import ioctl

SOURCE = r"""
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
struct __attribute__((packed)) issue { uint32_t cmd; uint64_t data; uint32_t error; };
struct __attribute__((packed)) pair { uint64_t a; uint32_t n; uint64_t b; uint32_t m; };
struct __attribute__((packed)) one { uint64_t a; uint32_t n; };
struct kvm_cmd { uint32_t id; uint64_t data; uint32_t error; uint32_t fd; };
struct region { uint64_t a, n; };
struct report { uint64_t a; uint32_t n; };
struct __attribute__((packed)) rtmr { uint64_t a, n; uint16_t sub, zero; uint32_t error; };
int main(void) {
    printf("%zu %zu %zu %zu %zu %zu %zu %zu\n", sizeof(struct issue), sizeof(struct one), sizeof(struct pair),
           sizeof(struct kvm_cmd), offsetof(struct kvm_cmd, data), sizeof(struct region), sizeof(struct report),
           sizeof(struct rtmr));
    printf("%lu %lu %lu %lu %lu %lu\n", (unsigned long)_IOWR('S', 0, struct issue), (unsigned long)_IOWR('D', 1, struct report),
           (unsigned long)_IOWR('D', 2, struct rtmr), (unsigned long)_IOWR(0xAE, 0xBA, unsigned long),
           (unsigned long)_IOR(0xAE, 0xBB, struct region), (unsigned long)_IOR(0xAE, 0xBC, struct region));
    return 0;
}
"""


def test_numbers() -> None:
    # The two that strace shows everywhere.
    assert ioctl.SEV_ISSUE_CMD == 0xC0105300
    assert ioctl.KVM_MEMORY_ENCRYPT_OP == 0xC008AEBA
    assert ioctl.CSV_GUEST_GET_REPORT == 0xC0104401
    assert ioctl.CSV_GUEST_RTMR_REQUEST == 0xC0184402
    assert ioctl.KvmCommandId.SEND_CANCEL == 21
    assert ioctl.SevCommandId.HGSC_CERT_IMPORT == 201


def test_as_the_compiler_has_them(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "sizes.c").write_text(SOURCE, encoding="utf-8")
    subprocess.run([compiler, "-o", tmp_path / "sizes", tmp_path / "sizes.c"], check=True)
    sizes, numbers = subprocess.run(
        [tmp_path / "sizes"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert [int(word) for word in sizes.split()] == [
        len(ioctl.IssueCommand(1, 2, 3).pack()),
        len(ioctl.OneBuffer(1, 2).pack()),
        len(ioctl.BufferPair(1, 2, 3, 4).pack()),
        len(ioctl.KvmCommand(1, 2, 3, 4).pack()),
        ioctl.KvmCommand(0, 0xAB).pack().index(0xAB),
        len(ioctl.MemoryRegion(1, 2).pack()),
        len(ioctl.ReportArgument(1, 2).pack()),
        len(ioctl.RtmrArgument(1, 2, 3).pack()),
    ]
    assert [int(word) for word in numbers.split()] == [
        ioctl.SEV_ISSUE_CMD,
        ioctl.CSV_GUEST_GET_REPORT,
        ioctl.CSV_GUEST_RTMR_REQUEST,
        ioctl.KVM_MEMORY_ENCRYPT_OP,
        ioctl.KVM_MEMORY_ENCRYPT_REG_REGION,
        ioctl.KVM_MEMORY_ENCRYPT_UNREG_REGION,
    ]


def test_round_trip_and_length() -> None:
    request = ioctl.RtmrArgument(0x1000, 38, ioctl.RtmrSubcommand.EXTEND)
    assert ioctl.RtmrArgument.unpack(request.pack()) == request
    assert request.pack()[16:20] == b"\x04\0\0\0"
    command = ioctl.IssueCommand(ioctl.SevCommandId.PDH_CERT_EXPORT, 0x7FFF_0000_1000)
    assert command.pack() == b"\x05\0\0\0" + (0x7FFF_0000_1000).to_bytes(8, "little") + bytes(4)
    assert ioctl.IssueCommand.unpack(command.pack()) == command
    with pytest.raises(FormatError, match=r"IssueCommand: .*15 bytes; expected 16 bytes"):
        ioctl.IssueCommand.unpack(command.pack()[:15])


def test_chip_ids_of_two_sockets() -> None:
    ids = ioctl.ChipIds(b"SIM1")
    assert ids.pack() == b"SIM1".ljust(128, b"\0")
    assert ioctl.ChipIds.unpack(bytes(64) + b"B" * 64).second_socket == b"B" * 64
    with pytest.raises(FormatError, match="127 bytes"):
        ioctl.ChipIds.unpack(bytes(127))
