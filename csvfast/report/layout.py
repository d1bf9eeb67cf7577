"""Attestation reports as the firmware emits them and as clients hand them on: V1 (masked) and V2 (extended).

A V1 report hides its fields behind a 4-byte mask, `anonce`, repeated over them. The mask is no secret (it stands in the report)
and is NOT signed: whoever changes it changes every field below at once, and the signature, made over the masked bytes, still
verifies. What binds it is a comparison: `measure` or `report_data` with what the verifier expects, or the MAC with the
mnonce it sent.

    V1 (2548 bytes of a page)                                V2 (3380 bytes of a page), nothing masked
    000  32 user_pubkey_digest   signed, masked              000..0b3  as V1                     signed
    020  16 vm_id                signed, masked              0b4   4 sig_usage   0b8 4 sig_algo  signed
    030  16 vm_version           signed, masked              0bc   4 build                       signed
    040  64 report_data          signed, masked              0c0   2 rtmr_version, 14 reserved0  signed
    080  16 mnonce               signed, masked              0d0  5 x 32 rtmr0 .. rtmr4          signed
    090  32 measure              signed, masked              170 656 reserved1                   signed
    0b0   4 policy               signed, masked              400  72 r  448 72 s
    0b4   4 sig_usage  0b8 4 sig_algo    masked              490 2084 pek                        MAC
    0bc   4 anonce                                           cb4  64 sn                          MAC
    0c0  72 r  108 72 s                                      cf4  32 reserved / sealing key      MAC
    150 2084 pek   974 64 sn     MAC, masked                 d14  32 mac
    9b4  32 reserved / sealing key   MAC
    9d4  32 mac = HMAC-SM3(mnonce, [pek .. reserved] as emitted)

Clients (csv-rs) unmask pek and sn and zero the reserved field before the report leaves the guest; rats-tls only zeroes the field.

Source: openanolis/csv-rs src/api/guest/types.rs; inclavare-containers/rats-tls src/attesters/csv; checked against real V1
reports. V2: layout certain, no real sample is public.

Thread-safety: reports are immutable; two threads may compute a lazy value twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from csvfast.certs.fields import from_field
from csvfast.certs.layout import CSV_BYTES, CsvCertificate
from csvfast.crypto import hmac_sm3
from csvfast.errors import AuthenticationError, FormatError
from csvfast.report._input import as_bytes
from csvfast.report.policy import GuestPolicy
from csvfast.report.request import REPORT_PAGE

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["RAW_V1_BYTES", "RAW_V2_BYTES", "REPORT_SIGNATURE_ALGORITHM", "REPORT_SIGNER_USAGE", "Report", "masked"]

RAW_V1_BYTES: Final = 2548
RAW_V2_BYTES: Final = 3380
REPORT_SIGNER_USAGE: Final = 0x1002  # PEK
REPORT_SIGNATURE_ALGORITHM: Final = 4  # SM2
CHIP_ID_BYTES: Final = 64

_INFO_BYTES: Final = 0xBC  # user_pubkey_digest .. sig_algo: what V1 masks of the signed part
_SIGNED_V1: Final = 0xB4
_SIGNED_V2: Final = 0x400
_R_V1: Final = 0xC0
_R_V2: Final = 0x400
_PEK_V1: Final = 0x150
_PEK_V2: Final = 0x490
_FIELD: Final = 72
_USAGE_IN_PEK: Final = 8
_PEK_WORD: Final = REPORT_SIGNER_USAGE.to_bytes(4, "little")
_NO_MASK: Final = bytes(4)
_ZERO_KEY: Final = bytes(32)
_CHIP_ID: Final = re.compile(rb"([!-~]+)\0*")


def masked(data: bytes, anonce: bytes) -> bytes:
    """`data` XOR the repeated 4-byte mask (its own inverse). The area starts where the mask starts: at a multiple of 4."""
    size = len(data)
    mask = int.from_bytes((anonce * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ mask).to_bytes(size, "little")


class Report:
    """One report. Fields are given unmasked; `emitted` holds the bytes as they came, without the page's padding.

    Only the length is checked at once (FormatError); a field that cannot be read raises FormatError when it is asked for.
    Whether any of it is genuine is for `csvfast.attest.verify` to say.
    """

    __slots__ = ("_chip_id", "_info", "_pek", "_pek_bytes", "_pek_is_masked", "_sn", "emitted", "padding", "version")
    emitted: Final[bytes]
    padding: Final[bytes]
    version: Final[Literal[1, 2]]

    def __init__(self, emitted: bytes, padding: bytes, version: Literal[1, 2]) -> None:
        self.emitted = emitted
        self.padding = padding
        self.version = version
        self._info: bytes | None = None
        self._pek: CsvCertificate | None = None
        self._pek_bytes: bytes | None = None
        self._sn: bytes | None = None
        self._chip_id: str | None = None
        self._pek_is_masked: bool | None = None

    @classmethod
    def parse(cls, data: BytesLike, version: Literal[1, 2] | None = None) -> Report:
        """From a page (4096 bytes) or the meaningful bytes alone (2548: V1, 3380: V2).

        In: version   what the wrapper around the page says; None = told by the length, or for a page by where its PEK stands
        FormatError: another length, or one that contradicts `version`.
        """
        raw = as_bytes(data, "report")
        size = len(raw)
        if size == RAW_V1_BYTES and version in (None, 1):
            return cls(raw, b"", 1)
        if size == RAW_V2_BYTES and version in (None, 2):
            return cls(raw, b"", 2)
        if size != REPORT_PAGE:
            lengths = {1: f"{RAW_V1_BYTES}", 2: f"{RAW_V2_BYTES}", None: f"{RAW_V1_BYTES}, {RAW_V2_BYTES}"}
            expected = f"{lengths[version]} or {REPORT_PAGE} bytes"
            raise FormatError("report", "length", None, f"{size} bytes", expected)
        if version is None:
            version = _page_version(raw)
        used = RAW_V1_BYTES if version == 1 else RAW_V2_BYTES
        return cls(raw[:used], raw[used:], version)

    # The signed part.

    @property
    def info(self) -> bytes:
        """Bytes 0x000 .. 0x0bb unmasked: user_pubkey_digest .. sig_algo."""
        if self._info is None:
            head = self.emitted[:_INFO_BYTES]
            self._info = masked(head, self.anonce) if self.version == 1 else head
        return self._info

    @property
    def user_pubkey_digest(self) -> bytes:
        """Digest of the session public key, 32 bytes; zero without a session."""
        return self.info[0x00:0x20]

    @property
    def vm_id(self) -> bytes:
        """16 bytes, from the session."""
        return self.info[0x20:0x30]

    @property
    def vm_version(self) -> bytes:
        """16 bytes, from the session."""
        return self.info[0x30:0x40]

    @property
    def report_data(self) -> bytes:
        """64 bytes the guest asked to have signed."""
        return self.info[0x40:0x80]

    @property
    def mnonce(self) -> bytes:
        """The request's 16-byte nonce."""
        return self.info[0x80:0x90]

    @property
    def measure(self) -> bytes:
        """The launch digest, 32 bytes."""
        return self.info[0x90:0xB0]

    @property
    def policy(self) -> GuestPolicy:
        """The guest policy."""
        return GuestPolicy(int.from_bytes(self.info[0xB0:0xB4], "little"))

    @property
    def sig_usage(self) -> int:
        """Usage of the signing key: 0x1002, PEK."""
        return int.from_bytes(self.info[0xB4:0xB8], "little")

    @property
    def sig_algo(self) -> int:
        """Algorithm of the signature: 4, SM2."""
        return int.from_bytes(self.info[0xB8:0xBC], "little")

    @property
    def anonce(self) -> bytes:
        """The mask of a V1 report, 4 bytes as they stand. V2: four zero bytes (that place holds `build`)."""
        return self.emitted[0xBC:0xC0] if self.version == 1 else bytes(4)

    @property
    def build(self) -> int | None:
        """V2: firmware build. V1: None."""
        return None if self.version == 1 else int.from_bytes(self.emitted[0xBC:0xC0], "little")

    @property
    def rtmr_version(self) -> int | None:
        """V2: version of the RTMR protocol. V1: None."""
        return None if self.version == 1 else int.from_bytes(self.emitted[0xC0:0xC2], "little")

    @property
    def rtmrs(self) -> tuple[bytes, ...]:
        """V2: the five registers of 32 bytes; number 0 equals `measure`. V1: empty."""
        return () if self.version == 1 else tuple(self.emitted[at : at + 32] for at in range(0xD0, 0x170, 32))

    @property
    def reserved0(self) -> bytes:
        """V2: 14 signed bytes behind rtmr_version. V1: empty."""
        return b"" if self.version == 1 else self.emitted[0xC2:0xD0]

    @property
    def reserved1(self) -> bytes:
        """V2: 656 signed bytes behind the registers. V1: empty."""
        return b"" if self.version == 1 else self.emitted[0x170:0x400]

    @property
    def signed_bytes(self) -> bytes:
        """What the PEK signed, as emitted: V1 180 bytes (masked), V2 1024 bytes."""
        return self.emitted[: _SIGNED_V1 if self.version == 1 else _SIGNED_V2]

    @property
    def signature(self) -> bytes:
        """r || s, 64 bytes big-endian. FormatError when the fields hold more than 32 bytes each."""
        at = _R_V1 if self.version == 1 else _R_V2
        middle, end = at + _FIELD, at + 2 * _FIELD
        r = from_field(self.emitted[at:middle], self.structure, "sig r", at)
        return r + from_field(self.emitted[middle:end], self.structure, "sig s", middle)

    # The signer's part.

    @property
    def structure(self) -> str:
        """Its name in error messages."""
        return f"report V{self.version}"

    @property
    def pek_offset(self) -> int:
        """Where the PEK certificate starts."""
        return _PEK_V1 if self.version == 1 else _PEK_V2

    @property
    def pek_is_masked(self) -> bool:
        """True when pek and sn are still masked, as the firmware emitted them; False when a client unmasked them, and for V2.

        Told by the certificate's usage word, which is that of a PEK either as it stands or behind the mask. When it is neither,
        the certificate is damaged and taken as emitted.
        """
        if self._pek_is_masked is None:
            at = self.pek_offset + _USAGE_IN_PEK
            self._pek_is_masked = (
                self.version == 1
                and self.anonce != _NO_MASK
                and self.emitted[at : at + 4] != _PEK_WORD
            )
        return self._pek_is_masked

    @property
    def pek_bytes(self) -> bytes:
        """The PEK certificate, 2084 bytes, unmasked."""
        if self._pek_bytes is None:
            self._unmask_signer()
            assert self._pek_bytes is not None
        return self._pek_bytes

    @property
    def pek(self) -> CsvCertificate:
        """The PEK certificate. FormatError when it cannot be read."""
        if self._pek is None:
            self._pek = CsvCertificate.parse(self.pek_bytes)
        return self._pek

    @property
    def serial_number(self) -> bytes:
        """The chip id's field, 64 bytes, unmasked."""
        if self._sn is None:
            self._unmask_signer()
            assert self._sn is not None
        return self._sn

    @property
    def chip_id(self) -> str:
        """The chip id. FormatError when it is empty or not printable ASCII followed by NULs."""
        if self._chip_id is None:
            self._chip_id = chip_id_of(self.serial_number, self.structure, self.pek_offset + CSV_BYTES)
        return self._chip_id

    @property
    def sealing_key(self) -> bytes:
        """The reserved field, 32 bytes: inside the guest the VM's sealing key (a secret), elsewhere zero."""
        return self.emitted[-64:-32]

    @property
    def sealing_key_is_present(self) -> bool:
        """True while the reserved field has not been zeroed."""
        return self.emitted[-64:-32] != _ZERO_KEY

    @property
    def mac(self) -> bytes:
        """The MAC, 32 bytes."""
        return self.emitted[-32:]

    @property
    def mac_bytes(self) -> bytes:
        """What the MAC is made over: pek, sn and reserved field as the firmware emitted them (masked again if need be)."""
        signer = self._signer()
        if self.version == 1 and not self.pek_is_masked:
            at = CSV_BYTES + CHIP_ID_BYTES
            return masked(signer[:at], self.anonce) + signer[at:]
        return signer

    def mac_is_valid(self, mnonce: BytesLike | None = None) -> bool:
        """Compares in constant time the MAC with HMAC-SM3(mnonce, mac_bytes); None = the report's own mnonce."""
        try:
            hmac_sm3(self.mnonce if mnonce is None else mnonce, self.mac_bytes).verify(self.mac)
        except AuthenticationError:
            return False
        return True

    def _signer(self) -> bytes:
        return self.emitted[self.pek_offset : -32]

    def _unmask_signer(self) -> None:
        plain = self._signer()[: CSV_BYTES + CHIP_ID_BYTES]
        if self.pek_is_masked:
            plain = masked(plain, self.anonce)
        self._pek_bytes, self._sn = plain[:CSV_BYTES], plain[CSV_BYTES:]

    def page(self) -> bytes:
        """The report in its 4096-byte page."""
        return (self.emitted + self.padding).ljust(REPORT_PAGE, b"\0")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Report):
            return NotImplemented
        return self.version == other.version and self.emitted == other.emitted

    def __hash__(self) -> int:
        return hash((self.version, self.emitted))

    def __repr__(self) -> str:
        # Not the bytes: inside a guest they hold the sealing key.
        return f"<Report V{self.version}, measure {self.measure.hex()}>"


def chip_id_of(field: bytes, structure: str, offset: int | None) -> str:
    """The text of a 64-byte serial number field: printable ASCII without spaces, padded with NULs; FormatError otherwise."""
    found = _CHIP_ID.fullmatch(field)
    if found is None:
        shown = field.rstrip(b"\0").hex() or "only NULs"
        raise FormatError(structure, "sn", offset, shown, "printable ASCII padded with NULs")
    return found[1].decode("ascii")


def _page_version(page: bytes) -> Literal[1, 2]:
    # A page says nothing about its version. V2: a PEK's usage word in V2's place, and bytes where a V1 page is only padding.
    # V1: a PEK's usage word in V1's place, plain or masked. V2 is asked first: in its pages V1's place is rtmr4, mostly zero,
    # and the mask's place is the build, which may well be the number of that usage.
    at = _PEK_V2 + _USAGE_IN_PEK
    behind_v1 = any(page[RAW_V1_BYTES:RAW_V2_BYTES])
    if behind_v1 and page[at : at + 4] == _PEK_WORD:
        return 2
    at = _PEK_V1 + _USAGE_IN_PEK
    usage = int.from_bytes(page[at : at + 4], "little")
    if usage == REPORT_SIGNER_USAGE or usage ^ int.from_bytes(page[0xBC:0xC0], "little") == REPORT_SIGNER_USAGE:
        return 1
    return 2 if behind_v1 else 1
