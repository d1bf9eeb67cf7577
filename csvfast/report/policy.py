"""The guest policy: a 32-bit word fixed at launch, enforced by the firmware and signed in every report.

    bit 0 nodbg  1 noks  2 es  3 nosend  4 domain  5 csv  6 csv3  7 asid_reuse
    bits 8..11 hsk_version  12..15 cek_version  16..23 api_major  24..31 api_minor   (minimum versions)

Source: openanolis/csv-rs src/api/guest/types.rs and src/api/launch/types.rs; openEuler kernel arch/x86/kvm/svm/csv.h.
Real chips have reported bits nobody documents (bit 30): compare whole words as opaque values. Thread-safety: immutable.
"""

from __future__ import annotations

from typing import Final

from csvfast.errors import ArgumentError, FormatError

__all__ = ["POLICY_FIELDS", "POLICY_FLAGS", "GuestPolicy"]

POLICY_FLAGS: Final = ("nodbg", "noks", "es", "nosend", "domain", "csv", "csv3", "asid_reuse")
# (name, lowest bit, width); trustee's claims list the fields in this order.
POLICY_FIELDS: Final = (
    *((name, bit, 1) for bit, name in enumerate(POLICY_FLAGS)),
    ("hsk_version", 8, 4),
    ("cek_version", 12, 4),
    ("api_major", 16, 8),
    ("api_minor", 24, 8),
)
_SHIFTS: Final = tuple((name, bit, (1 << width) - 1) for name, bit, width in POLICY_FIELDS)


class GuestPolicy:
    """One policy word, with its fields by name. Immutable, hashable, equal to another of the same word.

    In: value   0 .. 2**32 - 1; ArgumentError otherwise
    """

    __slots__ = ("value",)
    value: int

    def __init__(self, value: int) -> None:
        if not 0 <= value <= 0xFFFFFFFF:
            raise ArgumentError(f"guest policy {value!r}: expected a word of 32 bits, 0 .. 0xffffffff")
        object.__setattr__(self, "value", value)

    @classmethod
    def of(
        cls,
        *,
        nodbg: bool = False,
        noks: bool = False,
        es: bool = False,
        nosend: bool = False,
        domain: bool = False,
        csv: bool = False,
        csv3: bool = False,
        asid_reuse: bool = False,
        hsk_version: int = 0,
        cek_version: int = 0,
        api_major: int = 0,
        api_minor: int = 0,
    ) -> GuestPolicy:
        """The policy with these fields; ArgumentError for a version wider than its field."""
        flags = (nodbg, noks, es, nosend, domain, csv, csv3, asid_reuse)
        value = sum(bool(flag) << bit for bit, flag in enumerate(flags))
        versions = (hsk_version, cek_version, api_major, api_minor)
        for (name, bit, width), version in zip(POLICY_FIELDS[8:], versions, strict=True):
            if not 0 <= version < 1 << width:
                raise ArgumentError(f"guest policy {name} {version}: expected 0 .. {(1 << width) - 1}")
            value |= version << bit
        return cls(value)

    @classmethod
    def from_bytes(cls, data: bytes) -> GuestPolicy:
        """From the four little-endian bytes of a report or a command; FormatError for another length."""
        if len(data) != 4:
            raise FormatError("guest policy", "length", None, f"{len(data)} bytes", "4 bytes")
        return cls(int.from_bytes(data, "little"))

    def to_bytes(self) -> bytes:
        """The word as reports and commands hold it: 4 bytes, little-endian."""
        return self.value.to_bytes(4, "little")

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"GuestPolicy.{name} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"GuestPolicy.{name} cannot be changed")

    def __reduce__(self) -> tuple[type[GuestPolicy], tuple[int]]:
        return GuestPolicy, (self.value,)

    @property
    def nodbg(self) -> bool:
        """Debug commands are refused."""
        return bool(self.value & 1)

    @property
    def noks(self) -> bool:
        """No key sharing with other guests."""
        return bool(self.value >> 1 & 1)

    @property
    def es(self) -> bool:
        """Encrypted register state (CSV2) is required."""
        return bool(self.value >> 2 & 1)

    @property
    def nosend(self) -> bool:
        """No migration off the platform."""
        return bool(self.value >> 3 & 1)

    @property
    def domain(self) -> bool:
        """Migration only inside the owner's domain."""
        return bool(self.value >> 4 & 1)

    @property
    def csv(self) -> bool:
        """Migration only to CSV-capable platforms."""
        return bool(self.value >> 5 & 1)

    @property
    def csv3(self) -> bool:
        """CSV3 is required (older samples name the bit REUSE)."""
        return bool(self.value >> 6 & 1)

    @property
    def asid_reuse(self) -> bool:
        """Guests of the same user may share an ASID."""
        return bool(self.value >> 7 & 1)

    @property
    def hsk_version(self) -> int:
        """Minimum HSK version of a migration target."""
        return self.value >> 8 & 0xF

    @property
    def cek_version(self) -> int:
        """Minimum CEK version of a migration target."""
        return self.value >> 12 & 0xF

    @property
    def api_major(self) -> int:
        """Minimum firmware API major version."""
        return self.value >> 16 & 0xFF

    @property
    def api_minor(self) -> int:
        """Minimum firmware API minor version."""
        return self.value >> 24

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flags that are set, lowest bit first."""
        return tuple(name for bit, name in enumerate(POLICY_FLAGS) if self.value >> bit & 1)

    def to_dict(self) -> dict[str, int]:
        """Every field as an integer, named and ordered as in trustee's claims."""
        value = self.value
        return {name: value >> bit & mask for name, bit, mask in _SHIFTS}

    def __int__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return self.value == other.value if isinstance(other, GuestPolicy) else NotImplemented

    def __hash__(self) -> int:
        return hash((GuestPolicy, self.value))

    def __repr__(self) -> str:
        return f"GuestPolicy({self.value:#010x}: {' '.join(self.flags) or 'no flags'})"
