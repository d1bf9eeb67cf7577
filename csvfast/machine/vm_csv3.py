"""What a CSV3 guest needs beside a CSV2 guest's: secure memory in the DRAM, and memory that its kernel keeps off.

The secure call pages are named by the firmware image, or by a page of their own (GuestPlan.secure_calls). In the second case
nobody but the kernel's command line, which is measured, tells the kernel to leave them alone.

Thread-safety: functions without state.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from csvfast.errors import ArgumentError
from csvfast.measure.source import Source
from csvfast.processor.core import PAGE
from csvfast.processor.secure_call import boot_pages
from csvfast.processor.vmm_csv3 import SMCR_BYTES, SMR_ENTRY_BYTES, private_bytes

if TYPE_CHECKING:
    from csvfast.processor.vmm import GuestPlan

__all__ = ["PARAMETERS", "RESERVATION", "SECURE_CALLS", "check_policy", "check_reservation", "dram_bytes", "with_secure_calls"]

# Between what a direct boot loads (from 1 MiB on) and where the kernel runs (16 MiB), with room on both sides: pages beside them
# that were read ahead are nobody's.
SECURE_CALLS: Final = 0xF80000
RESERVATION: Final = "memmap=1M$0xf00000"
# With it the guest finds them although firmware has used the page before (csvfast.machine.guest.secure_call).
PARAMETERS: Final = f"{RESERVATION} csvfast.secure_calls={SECURE_CALLS + PAGE:#x}"

_MEMMAP: Final = re.compile(r"(?:^|[\s,=])(0x[0-9a-fA-F]+|\d+)([KMG]?)\$(0x[0-9a-fA-F]+|\d+)([KMG]?)(?=$|[\s,])")
_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30}
_TAIL_BYTES: Final = 1 << 16
_REST_BYTES: Final = 8 << 20  # parameter blocks, TMR, buffers beside the firmware's


def check_reservation(plan: GuestPlan) -> None:
    """Raises ArgumentError unless the kernel's command line keeps it off the pages at plan.secure_calls."""
    start = plan.secure_calls
    if start is None or plan.kernel is None:
        return
    for size, size_unit, base, base_unit in _MEMMAP.findall(plan.append or ""):
        low = int(base, 0) << _UNITS[base_unit]
        if low <= start and start + 3 * PAGE <= low + (int(size, 0) << _UNITS[size_unit]):
            return
    raise ArgumentError(
        f"the kernel would use the secure call pages at {start:#x}; expected memmap=SIZE$START around them on its command line, "
        f"as {RESERVATION} for {SECURE_CALLS:#x}"
    )


def check_policy(plan: GuestPlan) -> None:
    """Raises ArgumentError for what no CSV3 guest can be; other guests pass."""
    if not plan.policy.csv3:
        if plan.secure_calls is not None:
            raise ArgumentError("secure_calls is given, but the policy does not ask for CSV3")
        return
    if not plan.policy.es:
        raise ArgumentError(f"policy {plan.policy.value:#x} asks for CSV3 without ES; expected both, as 0x45")
    check_reservation(plan)


def with_secure_calls(plan: GuestPlan) -> GuestPlan:
    """The plan of a CSV3 guest, with SECURE_CALLS and PARAMETERS when its firmware names no pages. Raises SourceError."""
    if not plan.policy.csv3 or plan.secure_calls is not None:
        return plan
    with Source(plan.firmware) as source:
        tail = bytearray(min(source.size or 0, _TAIL_BYTES))
        with memoryview(tail) as view:
            source.read_at(view, (source.size or 0) - len(tail))
    if boot_pages(bytes(tail)) is not None:
        return plan
    return replace(plan, secure_calls=SECURE_CALLS, append=f"{plan.append or ''} {PARAMETERS}".strip())


def dram_bytes(plan: GuestPlan, firmware_size: int) -> int:
    """DRAM that a platform needs for this guest alone: secure memory with its control region, and room for the launch."""
    return SMCR_BYTES + private_bytes(plan, firmware_size) + SMR_ENTRY_BYTES + firmware_size + plan.vcpus * PAGE + _REST_BYTES
