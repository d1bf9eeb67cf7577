"""The initial save area (VMSA) of a vCPU, as QEMU and AMD SEV-ES have it: one page that is measured after the data.

Whether Hygon's CSV2 measures these pages is not published; by all that is known it does not, so they are only made on
request.
Source: specification section 6.3; virtee/sev-snp-measure sevsnpmeasure/vmsa.py (field values only).
"""

from __future__ import annotations

import struct

from csvfast.measure.errors import ParameterError

__all__ = ["BSP_ADDRESS", "DEFAULT_CPU_SIGNATURE", "vmsa_page"]

VMSA_BYTES = 4096
BSP_ADDRESS = 0xFFFFFFF0
DEFAULT_CPU_SIGNATURE = 0x900F00  # family 0x18 (Dhyana), model 0, stepping 0

_SEGMENT = struct.Struct("<HHIQ")  # selector, attributes, limit, base

_SEGMENTS = {  # offset: (attributes, limit)
    0x000: (0x93, 0xFFFF),  # es
    0x020: (0x93, 0xFFFF),  # ss
    0x030: (0x93, 0xFFFF),  # ds
    0x040: (0x93, 0xFFFF),  # fs
    0x050: (0x93, 0xFFFF),  # gs
    0x060: (0, 0xFFFF),  # gdtr
    0x070: (0x82, 0xFFFF),  # ldtr
    0x080: (0, 0xFFFF),  # idtr
    0x090: (0x8B, 0xFFFF),  # tr
}
_CODE_SEGMENT = 0x010

_REGISTERS = {  # offset: (layout, value)
    0x0D0: ("<Q", 0x1000),  # efer: SVME
    0x148: ("<Q", 0x40),  # cr4: MCE
    0x158: ("<Q", 0x10),  # cr0: ET
    0x160: ("<Q", 0x400),  # dr7
    0x168: ("<Q", 0xFFFF0FF0),  # dr6
    0x170: ("<Q", 2),  # rflags
    0x268: ("<Q", 0x0007040600070406),  # g_pat
    0x3E8: ("<Q", 1),  # xcr0
    0x408: ("<I", 0x1F80),  # mxcsr
    0x410: ("<H", 0x037F),  # x87_fcw
}
_RIP = 0x178
_RDX = 0x310


def vmsa_page(address: int, cpu_signature: int = DEFAULT_CPU_SIGNATURE) -> bytes:
    """The 4096 bytes of a vCPU that starts at a 32-bit address.

    Args: address: first instruction, BSP_ADDRESS for the boot processor. cpu_signature: CPUID leaf 1 EAX.
    Raises: ParameterError for a number outside 32 bits.
    Thread-safety: safe from any thread.
    """
    for name, value in (("address", address), ("CPU signature", cpu_signature)):
        if not 0 <= value < 1 << 32:
            raise ParameterError(f"{name} is {value:#x}; expected 0 to 0xffffffff")
    page = bytearray(VMSA_BYTES)
    for offset, (attributes, limit) in _SEGMENTS.items():
        _SEGMENT.pack_into(page, offset, 0, attributes, limit, 0)
    _SEGMENT.pack_into(page, _CODE_SEGMENT, 0xF000, 0x9B, 0xFFFF, address & 0xFFFF0000)
    for offset, (layout, value) in _REGISTERS.items():
        struct.pack_into(layout, page, offset, value)
    struct.pack_into("<Q", page, _RIP, address & 0xFFFF)
    struct.pack_into("<Q", page, _RDX, cpu_signature)
    return bytes(page)
