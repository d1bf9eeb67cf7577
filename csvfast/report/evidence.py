"""Evidence: a report and what travels beside it, in every encoding that is in use. Told apart by content, never by name.

    encoding   bytes                                            content
    json       csv-rs' serde form, as trustee and CoCo use it   wrapper, PEK, maybe HSK and CEK, serial number, event log
    csv-rs     4116                                             wrapper: magic 16, flags LE32, page 4096
    page       4096                                             a page, V1 or V2
    raw        2548 or 3380                                     the meaningful bytes of a page, V1 or V2 (devkit `report.cert`)
    rats-tls   7016                                             V1 page 4096, HSK || CEK 2916, LE32 length of the certificates
    librats    4100 + length                                    V1 page 4096, LE32 length, HSK || CEK

Reading recognises and measures; it does not look into certificates or fields, which are read when asked for. A parsed
Evidence is not genuine because it exists: see `csvfast.attest`.

Source: confidential-containers/guest-components attestation-agent/attester/src/csv/mod.rs; openanolis/csv-rs
src/api/guest/types.rs; inclavare-containers/rats-tls src/attesters/csv; inclavare-containers/librats src/attesters/csv.
Thread-safety: immutable objects; two threads may compute a lazy value twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CaCertificate, CsvCertificate
from csvfast.errors import ArgumentError, FormatError
from csvfast.report._input import as_bytes
from csvfast.report.build import client_report, rats_tls_page
from csvfast.report.layout import CHIP_ID_BYTES, RAW_V1_BYTES, RAW_V2_BYTES, Report, chip_id_of
from csvfast.report.request import EXTENDED_MAGIC, REPORT_PAGE

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = ["EVIDENCE_LIMIT", "HSK_CEK_BYTES", "WRAPPER_BYTES", "Encoding", "Evidence", "read_evidence"]

Encoding = Literal["json", "csv-rs", "page", "raw", "rats-tls", "librats"]

HSK_CEK_BYTES: Final = CA_BYTES + CSV_BYTES  # 2916
WRAPPER_BYTES: Final = 16 + 4 + REPORT_PAGE  # 4116
RATS_TLS_BYTES: Final = REPORT_PAGE + HSK_CEK_BYTES + 4  # 7016
LIBRATS_HEAD_BYTES: Final = REPORT_PAGE + 4
EVIDENCE_LIMIT: Final = 4 << 20  # JSON with an event log of 64 KiB has about 130 KB
_JSON_START: Final = (b"{", b"\xef\xbb\xbf{")


class Evidence:
    """One piece of evidence.

    In: report          the report
        hsk_cek         HSK || CEK, 2916 bytes, when they travel along
        pek_beside      the PEK certificate beside the report (JSON only), 2084 bytes
        serial_beside   the serial number beside the report (JSON only), 64 bytes
        event_log       the CC event log (JSON only)
        encoding        where it was read from
        magic           of the csv-rs wrapper, 16 bytes: kept, so that writing gives back what was read
    FormatError for a field of another length.
    """

    __slots__ = ("_cek", "_hsk", "_pek", "encoding", "event_log", "hsk_cek", "magic", "pek_beside", "report", "serial_beside")
    report: Final[Report]
    hsk_cek: Final[bytes | None]
    pek_beside: Final[bytes | None]
    serial_beside: Final[bytes | None]
    event_log: Final[bytes | None]
    encoding: Final[Encoding]
    magic: Final[bytes]

    def __init__(
        self,
        report: Report,
        *,
        hsk_cek: BytesLike | None = None,
        pek_beside: BytesLike | None = None,
        serial_beside: BytesLike | None = None,
        event_log: BytesLike | None = None,
        encoding: Encoding = "raw",
        magic: BytesLike | None = None,
    ) -> None:
        self.report = report
        self.hsk_cek = _optional("hsk_cek", hsk_cek, HSK_CEK_BYTES)
        self.pek_beside = _optional("pek", pek_beside, CSV_BYTES)
        self.serial_beside = _optional("serial_number", serial_beside, CHIP_ID_BYTES)
        self.event_log = None if event_log is None else as_bytes(event_log, "event_log")
        self.encoding = encoding
        self.magic = _optional("magic", magic, 16) or (bytes(16) if report.version == 1 else EXTENDED_MAGIC)
        self._hsk: CaCertificate | None = None
        self._cek: CsvCertificate | None = None
        self._pek: CsvCertificate | None = None

    @property
    def hsk(self) -> CaCertificate | None:
        """The HSK certificate, when it travels along. FormatError when it cannot be read."""
        if self._hsk is None and self.hsk_cek is not None:
            self._hsk = CaCertificate.parse(self.hsk_cek[:CA_BYTES])
        return self._hsk

    @property
    def cek(self) -> CsvCertificate | None:
        """The CEK certificate, when it travels along. FormatError when it cannot be read."""
        if self._cek is None and self.hsk_cek is not None:
            self._cek = CsvCertificate.parse(self.hsk_cek[CA_BYTES:])
        return self._cek

    @property
    def pek(self) -> CsvCertificate:
        """The PEK certificate: the one beside the report when there is one, else the report's. FormatError."""
        if self.pek_beside is None:
            return self.report.pek
        if self._pek is None:
            self._pek = CsvCertificate.parse(self.pek_beside)
        return self._pek

    @property
    def serial_number(self) -> str:
        """The chip id: the one beside the report when there is one, else the report's. FormatError."""
        if self.serial_beside is None:
            return self.report.chip_id
        return chip_id_of(self.serial_beside, "evidence JSON", None)

    def with_certificates(self, hsk_cek: BytesLike) -> Evidence:
        """The same evidence with HSK || CEK (2916 bytes) along."""
        return Evidence(
            self.report,
            hsk_cek=hsk_cek,
            pek_beside=self.pek_beside,
            serial_beside=self.serial_beside,
            event_log=self.event_log,
            encoding=self.encoding,
            magic=self.magic,
        )

    def to_json(self) -> bytes:
        """csv-rs' JSON, keys in alphabetical order as serde_json's values have them. The page is what csv-rs leaves of one."""
        from csvfast.report.evidence_json import write_json

        return write_json(self)

    def to_csv_rs(self) -> bytes:
        """The 4116 bytes of csv-rs' wrapper around the page that csv-rs leaves: pek and sn unmasked, no sealing key."""
        flags = self.flags.to_bytes(4, "little")
        return self.magic + flags + client_report(self.report.page(), self.report.version)

    def to_rats_tls(self) -> bytes:
        """7016 bytes; without HSK and CEK their place is zero and so is the length. ArgumentError for a V2 report."""
        certificates = self.hsk_cek or b""
        return self._masked_page("rats-tls") + certificates.ljust(HSK_CEK_BYTES, b"\0") + _le32(len(certificates))

    def to_librats(self) -> bytes:
        """4100 bytes and HSK || CEK. ArgumentError for a V2 report."""
        certificates = self.hsk_cek or b""
        return self._masked_page("librats") + _le32(len(certificates)) + certificates

    def to_raw(self) -> bytes:
        """The report's bytes as they came: 2548 (V1) or 3380 (V2)."""
        return self.report.emitted

    @property
    def flags(self) -> int:
        """Flags word of the csv-rs wrapper: 1 for V2."""
        return self.report.version - 1

    def _masked_page(self, encoding: str) -> bytes:
        if self.report.version != 1:
            raise ArgumentError(f"{encoding}: a report V{self.report.version}; expected V1, which is all this encoding can hold")
        return rats_tls_page(self.report)

    def __repr__(self) -> str:
        beside = [name for name in ("hsk_cek", "pek_beside", "serial_beside", "event_log") if getattr(self, name) is not None]
        return f"<Evidence {self.encoding}: {self.report!r}, beside it {', '.join(beside) or 'nothing'}>"


def read_evidence(data: BytesLike) -> Evidence:
    """Reads evidence in any encoding of the table above.

    FormatError: nothing of the kind. A JSON document names the member at fault; binary data only has its length to go by.
    """
    raw = as_bytes(data, "evidence")
    size = len(raw)
    if size in (RAW_V1_BYTES, RAW_V2_BYTES):
        return Evidence(Report.parse(raw), encoding="raw")
    if size == REPORT_PAGE:
        return Evidence(Report.parse(raw), encoding="page")
    if size == RATS_TLS_BYTES and (rats_tls := _rats_tls(raw)) is not None:
        return rats_tls
    # JSON with its 4096 numbers is longer than any of these, so lengths decide first: a masked byte may be a brace.
    if size == WRAPPER_BYTES:
        return _wrapper(raw)
    if size in (LIBRATS_HEAD_BYTES, LIBRATS_HEAD_BYTES + HSK_CEK_BYTES):
        return _librats(raw)
    if raw[:64].lstrip().startswith(_JSON_START):
        from csvfast.report.evidence_json import read_json

        return read_json(raw)
    lengths = (RAW_V1_BYTES, RAW_V2_BYTES, REPORT_PAGE, LIBRATS_HEAD_BYTES, WRAPPER_BYTES, RATS_TLS_BYTES)
    expected = f"a JSON object, or one of the binary lengths {', '.join(map(str, lengths))}"
    raise FormatError("evidence", "encoding", 0, f"{size} bytes starting with {raw[:8].hex() or 'nothing'}", expected)


def wrapped_version(magic: bytes, flags: int, structure: str, offset: int | None) -> Literal[1, 2]:
    """Report version from the wrapper's magic and flags by csv-rs' rule: an all-zero magic is V1 whatever the flags say."""
    if magic == bytes(16):
        return 1
    if magic != EXTENDED_MAGIC:
        raise FormatError(structure, "magic", offset, magic.hex(), f"zero or {EXTENDED_MAGIC.hex()}")
    if flags == 0:
        return 1
    if flags == 1:
        return 2
    place = None if offset is None else offset + 16
    raise FormatError(structure, "flags", place, f"{flags:#x}", "0 (V1) or 1 (V2)")


def _wrapper(raw: bytes) -> Evidence:
    magic, flags = raw[:16], int.from_bytes(raw[16:20], "little")
    version = wrapped_version(magic, flags, "csv-rs wrapper", 0)
    return Evidence(Report.parse(raw[20:], version), encoding="csv-rs", magic=magic)


def _rats_tls(raw: bytes) -> Evidence | None:
    # 7016 is also the length of librats with certificates: the length word of rats-tls is the last one, librats' stands at 4096,
    # where rats-tls has the version of the HSK (1). A word of 2916 there is librats'.
    if raw[REPORT_PAGE:LIBRATS_HEAD_BYTES] == _le32(HSK_CEK_BYTES):
        return None
    length = int.from_bytes(raw[-4:], "little")
    if length not in (0, HSK_CEK_BYTES):
        raise FormatError("rats-tls evidence", "certificate length", RATS_TLS_BYTES - 4, str(length), f"0 or {HSK_CEK_BYTES}")
    certificates = raw[REPORT_PAGE:-4]
    if not length and certificates.strip(b"\0"):
        raise FormatError("rats-tls evidence", "certificates", REPORT_PAGE, "bytes other than zero", "zero: their length is 0")
    return Evidence(Report.parse(raw[:REPORT_PAGE], 1), hsk_cek=certificates if length else None, encoding="rats-tls")


def _librats(raw: bytes) -> Evidence:
    length = int.from_bytes(raw[REPORT_PAGE:LIBRATS_HEAD_BYTES], "little")
    rest = len(raw) - LIBRATS_HEAD_BYTES
    if length != rest:
        raise FormatError("librats evidence", "certificate length", REPORT_PAGE, str(length), f"{rest}, the bytes that follow")
    certificates = raw[LIBRATS_HEAD_BYTES:] if length else None
    return Evidence(Report.parse(raw[:REPORT_PAGE], 1), hsk_cek=certificates, encoding="librats")


def _optional(name: str, value: BytesLike | None, size: int) -> bytes | None:
    if value is None:
        return None
    raw = as_bytes(value, name)
    if len(raw) != size:
        raise FormatError("evidence", name, None, f"{len(raw)} bytes", f"{size} bytes")
    return raw


def _le32(value: int) -> bytes:
    return value.to_bytes(4, "little")
