"""Firmware profiles: which API version and build a processor claims to be, and what follows from them.

The thresholds are those that Hygon's kernel drivers test for (openeuler-mirror/kernel drivers/crypto/ccp/hygon/csv-dev.c and
arch/x86/kvm/svm/csv.c). Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from csvfast.errors import ArgumentError

__all__ = ["PROFILES", "PROFILE_1_3_2011", "PROFILE_1_4_2337", "Profile"]

_BUILD_BITS: Final = 31  # width of the build number in PLATFORM_STATUS
_DOWNLOAD_BUILD: Final = 1667
_ANY_ASID_BUILD: Final = 1810
_MANY_UPDATES_BUILD: Final = 2200
_EXTENDED_BUILD: Final = 2337


@dataclass(frozen=True, slots=True)
class Profile:
    """One firmware.

    Args:
        api_major, api_minor: API version, 0 .. 255 each.
        build: build number, 31 bits.
        csv3: whether the part has CSV3.
    Raises: ArgumentError.
    """

    api_major: int
    api_minor: int
    build: int
    csv3: bool = False

    def __post_init__(self) -> None:
        for name, value, bits in (
            ("api_major", self.api_major, 8),
            ("api_minor", self.api_minor, 8),
            ("build", self.build, _BUILD_BITS),
        ):
            if not 0 <= value < 1 << bits:
                raise ArgumentError(f"profile: {name} is {value}; expected 0 .. {(1 << bits) - 1}")

    @property
    def name(self) -> str:
        """As in "1.4/2337"."""
        return f"{self.api_major}.{self.api_minor}/{self.build}"

    @property
    def api(self) -> tuple[int, int]:
        """(major, minor), which compare as versions do."""
        return self.api_major, self.api_minor

    @property
    def runtime_download(self) -> bool:
        """DOWNLOAD_FIRMWARE works while the platform is initialised."""
        return self.build >= _DOWNLOAD_BUILD

    @property
    def csv2_any_asid(self) -> bool:
        """CSV2 guests may use any ASID, not only those below the first CSV one."""
        return self.build >= _ANY_ASID_BUILD

    @property
    def csv3_many_updates(self) -> bool:
        """Several LAUNCH_ENCRYPT_DATA for one guest, and secret injection into CSV3 guests."""
        return self.csv3 and self.build >= _MANY_UPDATES_BUILD

    @property
    def extended_report(self) -> bool:
        """Report V2 and RTMR: CSV3 with API 1.4 and build 2337 or later."""
        return self.csv3 and self.api >= (1, 4) and self.build >= _EXTENDED_BUILD


PROFILE_1_3_2011: Final = Profile(1, 3, 2011)
PROFILE_1_4_2337: Final = Profile(1, 4, 2337, csv3=True)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {profile.name: profile for profile in (PROFILE_1_3_2011, PROFILE_1_4_2337)}
)
