"""The attestation request a guest writes into a page for the firmware, which answers in the same page.

    off  size  field
      0    64  data      report_data, zero-padded on the right (csv-rs and guest-components; the devkit's Python sample pads left)
     64    16  mnonce    random; the key of the response's MAC
     80    32  hash      SM3(data || mnonce)
    112    16  magic     "ATTESTATION_EXT\\0" for an extended request, else zero (a legacy request ends at 112)
    128     4  flags     bit 0: report V2 is wanted

Source: openanolis/csv-rs src/api/guest/mod.rs; anolis-cloud-kernel drivers/virt/coco/csv-guest/csv-guest.c.
Thread-safety: immutable objects.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.crypto import sm3
from csvfast.errors import FormatError, LengthError
from csvfast.report._input import as_bytes, exactly

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["EXTENDED_MAGIC", "MNONCE_BYTES", "REPORT_DATA_BYTES", "REPORT_PAGE", "ReportRequest", "pad_report_data"]

REPORT_PAGE: Final = 4096
REPORT_DATA_BYTES: Final = 64
MNONCE_BYTES: Final = 16
EXTENDED_MAGIC: Final = b"ATTESTATION_EXT\0"
EXTENDED_FLAG: Final = 1
LEGACY_BYTES: Final = 112
EXTENDED_BYTES: Final = 132


def pad_report_data(data: BytesLike) -> bytes:
    """report_data as the field holds it: 64 bytes, zero-padded on the right. LengthError when longer."""
    raw = as_bytes(data, "report_data")
    if len(raw) > REPORT_DATA_BYTES:
        raise LengthError(f"report_data of {len(raw)} bytes: expected at most {REPORT_DATA_BYTES}")
    return raw.ljust(REPORT_DATA_BYTES, b"\0")


class ReportRequest(NamedTuple):
    """One request: data (64 bytes), mnonce (16), extended (a V2 report is wanted), hash (32, as found in the page)."""

    data: bytes
    mnonce: bytes
    extended: bool
    hash: bytes

    @classmethod
    def make(cls, data: BytesLike = b"", mnonce: BytesLike | None = None, *, extended: bool = False) -> ReportRequest:
        """A request with its hash.

        In: data    at most 64 bytes (LengthError), zero-padded on the right
            mnonce  16 bytes (LengthError); None = random
        """
        nonce = secrets.token_bytes(MNONCE_BYTES) if mnonce is None else exactly("mnonce", mnonce, MNONCE_BYTES)
        padded = pad_report_data(data)
        return cls(padded, nonce, extended, sm3(padded + nonce).digest())

    @classmethod
    def build(cls, data: BytesLike = b"", mnonce: BytesLike | None = None, *, extended: bool = False) -> bytes:
        """The page of `make(...)`: 4096 bytes, ready to be written at the start of a guest page."""
        return cls.make(data, mnonce, extended=extended).encode()

    @classmethod
    def parse(cls, page: BytesLike) -> ReportRequest:
        """From a page, or from its first 112 or 132 bytes.

        A wrong hash is no format error: `hash_is_valid` says so, because the firmware answers it with a status of its own.
        Without the magic it is a legacy request, whatever lies behind byte 112: older guests leave their page as it was.
        FormatError: another length; flag bits other than bit 0 of an extended request (inferred: they are reserved).
        """
        raw = as_bytes(page, "report request")
        if len(raw) not in (REPORT_PAGE, EXTENDED_BYTES, LEGACY_BYTES):
            expected = f"{REPORT_PAGE}, {EXTENDED_BYTES} or {LEGACY_BYTES} bytes"
            raise FormatError("report request", "length", None, f"{len(raw)} bytes", expected)
        extended = False
        if raw[112:128] == EXTENDED_MAGIC:
            flags = int.from_bytes(raw[128:132], "little")
            if flags & ~EXTENDED_FLAG:
                raise FormatError("report request", "flags", 128, f"{flags:#x}", "0 (report V1) or 1 (report V2)")
            extended = flags == EXTENDED_FLAG
        return cls(raw[:64], raw[64:80], extended, raw[80:112])

    @property
    def hash_is_valid(self) -> bool:
        """True when the hash is SM3(data || mnonce)."""
        return self.hash == sm3(self.data + self.mnonce).digest()

    def encode(self) -> bytes:
        """The 4096-byte page, zero behind the request. The hash is written as it stands, right or wrong."""
        head = self.data + self.mnonce + self.hash
        if self.extended:
            head += EXTENDED_MAGIC + EXTENDED_FLAG.to_bytes(4, "little")
        return head.ljust(REPORT_PAGE, b"\0")
