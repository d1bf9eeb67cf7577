"""Choices where the public sources leave the firmware's behaviour open, and the host machine's shape.

Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from csvfast.errors import ArgumentError

if TYPE_CHECKING:
    from csvfast.certs.layout import CaCertificate

__all__ = ["MeasureBlob", "Options", "SessionLayout"]

MeasureBlob = Literal["api-policy", "api-build-policy"]
SessionLayout = Literal["hygon", "amd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a processor behaves beyond its profile.

    Args:
        measure_blob: what the HMAC of LAUNCH_MEASURE covers. "api-policy": 04, API major, API minor, policy, digest, nonce;
            "api-build-policy": the low byte of the build number behind the API version, as AMD's firmware has it. Which one
            real parts use is not public (inferred).
        session_layout: "hygon" (772 bytes) or "amd" (128 bytes, with AMD's key derivation).
        vmsa_measured: True if LAUNCH_UPDATE_VMSA extends the launch digest, as on AMD parts; Hygon's most likely do not
            (inferred).
        min_csv_asid: first ASID of plain CSV guests (CPUID 0x8000001F EDX). Those below it belong to CSV2 guests. 1 = all
            ASIDs are CSV's.
        cores: how many cores must WBINVD before DF_FLUSH.
        max_guests: contexts the firmware has room for; the next one is RESOURCE_LIMIT.
        migration_roots: root certificates under which the target of SEND_START must hang; None = the chip's own root.
    Raises: ArgumentError.
    """

    measure_blob: MeasureBlob = "api-policy"
    session_layout: SessionLayout = "hygon"
    vmsa_measured: bool = False
    min_csv_asid: int = 1
    cores: int = 1
    max_guests: int = 4096
    migration_roots: tuple[CaCertificate, ...] | None = None

    def __post_init__(self) -> None:
        if self.measure_blob not in get_args(MeasureBlob):
            raise ArgumentError(f"measure_blob is {self.measure_blob!r}; expected one of {get_args(MeasureBlob)}")
        if self.session_layout not in get_args(SessionLayout):
            raise ArgumentError(f"session_layout is {self.session_layout!r}; expected one of {get_args(SessionLayout)}")
        for name, value in (
            ("min_csv_asid", self.min_csv_asid),
            ("cores", self.cores),
            ("max_guests", self.max_guests),
        ):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; expected at least 1")
