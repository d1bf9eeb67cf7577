"""What software in a guest asks its processor for: reports, the sealing key, run-time measurement registers.

Every answer is checked as only the guest can: the MAC is keyed with this request's mnonce and covers the PEK certificate, the
chip id and the sealing key; mnonce and report data are those of the request. The sealing key never leaves with a report.

Sources: openanolis/csv-rs src/api/guest/mod.rs, rtmr.rs; anolis-cloud-kernel drivers/virt/coco/csv-guest/csv-guest.c.
Thread-safety: any thread; requests follow one another.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, Literal, Self

from csvfast._core import Secret
from csvfast.crypto import hmac_sm3
from csvfast.errors import (
    ArgumentError,
    AuthenticationError,
    FirmwareError,
    FirmwareStatus,
    FormatError,
    VerificationError,
)
from csvfast.machine.guest.channel import ProcessorChannel
from csvfast.machine.guest.page import RequestPage
from csvfast.machine.guest.secure_call import SecureCallPages, SecureCallTransport
from csvfast.machine.guest.transport import (
    DEVICE,
    SOCKET,
    ChannelTransport,
    DeviceTransport,
    SocketTransport,
    Transport,
)
from csvfast.report._input import exactly
from csvfast.report.evidence import Evidence
from csvfast.report.layout import CHIP_ID_BYTES, Report
from csvfast.report.request import MNONCE_BYTES, REPORT_DATA_BYTES, ReportRequest, pad_report_data

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.certs.store import CertificateStore

__all__ = ["GuestDevice", "RtmrStatus"]

# Where the signer's part begins: csvfast.report.layout. PEK, chip id, key, MAC follow one another in both versions.
_SIGNER: Final[dict[Literal[1, 2], int]] = {1: 0x150, 2: 0x490}
_KEY_AT: Final = 2084 + CHIP_ID_BYTES
_KEY_BYTES: Final = 32
_MAC_BYTES: Final = 32

_RTMR: Final = Struct("<HHI")
_RTMR_FIXED: Final = 32
_RTMR_BYTES: Final = 32
_RTMR_COUNT: Final = 5
_STATUS, _START, _READ, _EXTEND = 1, 2, 3, 4
_CSV3: Final = 3  # generation, as the channel's INFO names it
RtmrStatus = tuple[int, int]


class GuestDevice:
    """The processor as a guest sees it; an Attester of csvfast.ratstls.

    In: transport     the way to it; closed with this object
        certificates  where HSK and CEK are looked up for evidence(); None = they are left out
    """

    def __init__(self, transport: Transport, certificates: CertificateStore | None = None) -> None:
        self.transport = transport
        self.certificates = certificates
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, certificates: CertificateStore | None = None) -> Self:
        """Over a device, a helper's socket or a virtio port, told apart by what it is.

        In: path  None = /dev/csv-guest when it is there, else the helper's socket, else the channel itself
        Raises OSError: nothing of the kind is there, or not for this user; over the channel also what ProcessorChannel.info()
            does, and StateError: a CSV3 guest without secure call pages.
        """
        if path is None:
            path = DEVICE if Path(DEVICE).exists() else SOCKET if Path(SOCKET).is_socket() else None
        transport: Transport
        if path is None:
            transport = _over_channel(ProcessorChannel())
        elif Path(path).is_socket():
            transport = SocketTransport(path)
        elif "vport" in Path(path).resolve().name or Path(path).parent.name == "virtio-ports":
            transport = _over_channel(ProcessorChannel(path))
        else:
            transport = DeviceTransport(path)
        return cls(transport, certificates)

    def report(self, data: BytesLike = b"", *, extended: bool = False) -> Report:
        """A report with up to 64 bytes of data in it, the sealing key zeroed.

        In: extended  ask for report V2; a guest that is none of CSV3, or older firmware, answers V1
        Raises: LengthError; FirmwareError or OSError: refused; VerificationError: the answer is not for this request;
            FormatError.
        """
        report, key = self._ask(pad_report_data(data), extended)
        key.wipe()
        return report

    def sealing_key(self) -> Secret:
        """The guest's sealing key: the same for every guest of this chip with this launch digest and owner. 32 bytes.

        Errors as report().
        """
        return self._ask(secrets.token_bytes(REPORT_DATA_BYTES), False)[1]

    def evidence(self, report_data: bytes) -> Evidence:
        """See csvfast.ratstls.Attester. Errors as report(), and what the certificate store raises."""
        report = self.report(exactly("report_data", report_data, REPORT_DATA_BYTES))
        pair = None if self.certificates is None else self.certificates.find(report.chip_id, pek=report.pek)
        hsk_cek = None if pair is None else pair[0].encoded + pair[1].encoded
        return Evidence(report, hsk_cek=hsk_cek, encoding="rats-tls")

    # ---- Run-time measurement registers: CSV3 guests on firmware that has them. Others are refused with UNSUPPORTED.

    def rtmr_status(self) -> RtmrStatus:
        """Version and state (csvfast.processor.rtmr.RtmrState). FirmwareError: refused."""
        body = self._rtmr(_STATUS, bytes(_RTMR_FIXED - _RTMR.size))
        return int.from_bytes(body[:2], "little"), body[2]

    def rtmr_start(self, version: int = 1) -> None:
        """Makes the registers work. FirmwareError: refused."""
        if not 0 <= version <= 0xFFFF:
            raise ArgumentError(f"version {version}; expected 0 to 65535")
        self._rtmr(_START, version.to_bytes(2, "little").ljust(_RTMR_FIXED - _RTMR.size, b"\0"))

    def rtmr_read(self, numbers: Iterable[int] = range(_RTMR_COUNT)) -> dict[int, bytes]:
        """The registers' values, 32 bytes each, by number. ArgumentError; FirmwareError: refused."""
        wanted = sorted(set(numbers))
        if not wanted or wanted[0] < 0 or wanted[-1] >= _RTMR_COUNT:
            raise ArgumentError(f"registers {wanted}; expected numbers from 0 to {_RTMR_COUNT - 1}")
        bitmap = sum(1 << number for number in wanted)
        fixed = bitmap.to_bytes(4, "little").ljust(_RTMR_FIXED - _RTMR.size, b"\0")
        body = self._rtmr(_READ, fixed + bytes(_RTMR_BYTES * len(wanted)))[_RTMR_FIXED - _RTMR.size :]
        return {number: body[at * _RTMR_BYTES : (at + 1) * _RTMR_BYTES] for at, number in enumerate(wanted)}

    def rtmr_extend(self, number: int, data: BytesLike) -> None:
        """Register <- SM3(register || data), 32 bytes of data. ArgumentError, LengthError; FirmwareError: refused."""
        if not 1 <= number < _RTMR_COUNT:
            raise ArgumentError(f"register {number}; expected 1 to {_RTMR_COUNT - 1}")
        content = exactly("data", data, _RTMR_BYTES)
        fixed = (bytes([number, 0]) + _RTMR_BYTES.to_bytes(2, "little")).ljust(_RTMR_FIXED - _RTMR.size, b"\0")
        self._rtmr(_EXTEND, fixed + content)

    def close(self) -> None:
        """Closes the transport. Idempotent."""
        self.transport.close()

    # ---- Behind it

    def _ask(self, data: bytes, extended: bool) -> tuple[Report, Secret]:
        mnonce = secrets.token_bytes(MNONCE_BYTES)
        with self._lock, RequestPage() as page:
            page.write(ReportRequest.build(data, mnonce, extended=extended))
            self.transport.attestation(page)
            version, key = _take_key(page, mnonce)
            report = Report.parse(page.memory[:], version)
        if report.mnonce != mnonce:
            raise VerificationError("report mnonce", "the report answers another request")
        if report.report_data != data:
            raise VerificationError("report data", "the report holds other data than the request")
        return report, key

    def _rtmr(self, subcommand: int, body: bytes) -> bytes:
        size = _RTMR.size + len(body)
        with self._lock, RequestPage() as page:
            page.write(_RTMR.pack(subcommand, size, 0) + body)
            self.transport.rtmr(page, subcommand, size)
            answer = page.memory[:size]
        answered, length, error = _RTMR.unpack_from(answer)
        if error:
            try:
                status = FirmwareStatus(error)
            except ValueError:
                raise FormatError("RTMR answer", "error", 4, f"{error:#x}", "a status of the firmware") from None
            raise FirmwareError(status, f"the processor refuses RTMR sub-command {subcommand}")
        if (answered, length) != (subcommand, size):
            raise FormatError("RTMR answer", "header", 0, f"{answered}, {length} bytes", f"{subcommand}, {size} bytes")
        return answer[_RTMR.size :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GuestDevice over {type(self.transport).__name__}>"


def _over_channel(channel: ProcessorChannel) -> Transport:
    """Which way a guest takes is the host's word; a wrong one leads to no genuine answer."""
    try:
        if channel.info()[1] == _CSV3:
            return SecureCallTransport(channel, SecureCallPages.find())
    except BaseException:
        channel.close()
        raise
    return ChannelTransport(channel)


def _take_key(page: RequestPage, mnonce: bytes) -> tuple[Literal[1, 2], Secret]:
    """Finds the report's version by its MAC, takes the sealing key out of the page and zeroes it there."""
    with memoryview(page.memory) as view:
        for version, signer in _SIGNER.items():
            start = signer + _KEY_AT
            end = start + _KEY_BYTES
            with view[signer:end] as covered, view[end : end + _MAC_BYTES] as mac:
                try:
                    hmac_sm3(mnonce, covered).verify(mac)
                except AuthenticationError:
                    continue
            with view[start:end] as place:
                key = Secret(place)
                place[:] = bytes(_KEY_BYTES)
            return version, key
    raise VerificationError("report MAC", "it is not over this PEK and chip id with the mnonce of the request")
