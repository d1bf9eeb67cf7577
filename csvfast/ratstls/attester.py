"""Where a guest's evidence comes from: the device of a CSV guest, or a guest of the simulated platform.

An attester asks for a report V1 with a fresh random mnonce, checks the answer as only the guest can (the MAC is keyed with the
mnonce, and covers the PEK certificate and the chip id), zeroes the sealing key that the firmware puts into it, and lays HSK and
CEK beside the report when it finds them.

Sources: openanolis/csv-rs src/api/guest/mod.rs; anolis-cloud-kernel drivers/virt/coco/csv-guest/csv-guest.c;
inclavare-containers/rats-tls src/attesters/csv/collect_evidence.c (whose mnonce is predictable, and which checks no mnonce).
Thread-safety: any thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import threading
from typing import TYPE_CHECKING, Final, Protocol

from csvfast.crypto import hmac_sm3
from csvfast.errors import AuthenticationError, VerificationError
from csvfast.processor.ioctl import CSV_GUEST_GET_REPORT, ReportArgument
from csvfast.report._input import exactly
from csvfast.report.build import rats_tls_page
from csvfast.report.evidence import Evidence
from csvfast.report.layout import CHIP_ID_BYTES, Report
from csvfast.report.request import MNONCE_BYTES, REPORT_DATA_BYTES, REPORT_PAGE, ReportRequest

if TYPE_CHECKING:
    from csvfast.certs.store import CertificateStore

__all__ = ["Attester", "DeviceAttester", "SocketAttester"]

DEVICE: Final = "/dev/csv-guest"

# Of a report V1: csvfast.report.layout.
_PEK: Final = 0x150
_SEALING_KEY: Final = _PEK + 2084 + CHIP_ID_BYTES
_MAC: Final = _SEALING_KEY + 32
_END: Final = _MAC + 32


class Attester(Protocol):
    """What makes evidence about the machine it runs in."""

    def evidence(self, report_data: bytes) -> Evidence:
        """Fresh evidence with these 64 bytes in the report, HSK and CEK beside it when they are at hand; no sealing key in it."""
        ...


class DeviceAttester:
    """Asks the firmware through the kernel's device, in a CSV guest.

    In: path          of the device
        certificates  where HSK and CEK are looked up; None = they are left out
    """

    def __init__(self, path: str | os.PathLike[str] = DEVICE, certificates: CertificateStore | None = None) -> None:
        self.path = os.fspath(path)
        self.certificates = certificates

    def evidence(self, report_data: bytes) -> Evidence:
        """See Attester.

        Raises LengthError (report_data is not 64 bytes); OSError: no such device, or it refuses; VerificationError: the answer is
        not for this request; FormatError; what the certificate store raises.
        """
        wanted = exactly("report_data", report_data, REPORT_DATA_BYTES)
        mnonce = secrets.token_bytes(MNONCE_BYTES)
        # A mapping of its own: it can be overwritten when the firmware's answer, which holds the sealing key, is done with.
        with mmap.mmap(-1, REPORT_PAGE) as page:
            page[:] = ReportRequest.build(wanted, mnonce)
            try:
                self._ask(page)
                _check_mac(page, mnonce)
                page[_SEALING_KEY:_MAC] = bytes(_MAC - _SEALING_KEY)
                report = Report.parse(page[:], 1)
            finally:
                page[:] = bytes(REPORT_PAGE)
        if report.mnonce != mnonce:
            raise VerificationError("report mnonce", "the report answers another request")
        return _evidence(report, wanted, self.certificates)

    def _ask(self, page: mmap.mmap) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            start = ctypes.c_char.from_buffer(page)
            try:
                argument = ReportArgument(ctypes.addressof(start), REPORT_PAGE)
                fcntl.ioctl(descriptor, CSV_GUEST_GET_REPORT, argument.pack())
            except OSError as problem:  # Python's names no file
                raise type(problem)(problem.errno or errno.EIO, problem.strerror or str(problem), self.path) from None
            finally:
                del start  # a mapping with exported buffers cannot be closed
        finally:
            os.close(descriptor)

    def __repr__(self) -> str:
        return f"<DeviceAttester {self.path}>"


class SocketAttester:
    """Asks as a guest of the simulated platform (`csvfast platform serve`). Its chips hang from the simulated root, never from
    Hygon's.

    In: path          of the server's socket
        handle        of the guest
        vcpu_path     of the server's socket for vCPUs, if it has one
        certificates  where HSK and CEK are looked up; None = they are left out
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        handle: int,
        *,
        vcpu_path: str | os.PathLike[str] | None = None,
        certificates: CertificateStore | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.handle = handle
        self.vcpu_path = vcpu_path
        self.certificates = certificates
        # The request goes through one page of the guest's.
        self._lock = threading.Lock()

    def evidence(self, report_data: bytes) -> Evidence:
        """See Attester.

        Raises LengthError (report_data is not 64 bytes); OSError: no server; StateError: another user's; FirmwareError: the
        guest does not run; VerificationError: the answer is not for this request; FormatError; what the certificate store raises.
        """
        from csvfast.processor.client import RemoteMachine
        from csvfast.processor.vmm import Host

        wanted = exactly("report_data", report_data, REPORT_DATA_BYTES)
        with self._lock, RemoteMachine(self.path, vcpu_path=self.vcpu_path) as machine, Host(machine) as host:
            answer = host.report(self.handle, wanted)  # MAC and mnonce are checked there
        return _evidence(Report.parse(rats_tls_page(answer), 1), wanted, self.certificates)

    def __repr__(self) -> str:
        return f"<SocketAttester {self.path}, guest {self.handle}>"


def _check_mac(page: mmap.mmap, mnonce: bytes) -> None:
    with memoryview(page) as view, view[_PEK:_MAC] as covered, view[_MAC:_END] as mac:
        try:
            hmac_sm3(mnonce, covered).verify(mac)
        except AuthenticationError:
            raise VerificationError("report MAC", "it is not over this PEK and chip id with the mnonce of the request") from None


def _evidence(report: Report, report_data: bytes, certificates: CertificateStore | None) -> Evidence:
    if report.report_data != report_data:
        raise VerificationError("report data", "the report holds other data than the request")
    pair = None if certificates is None else certificates.find(report.chip_id, pek=report.pek)
    hsk_cek = None if pair is None else pair[0].encoded + pair[1].encoded
    # As rats-tls keeps a page: PEK and chip id masked, the sealing key zeroed.
    return Evidence(report, hsk_cek=hsk_cek, encoding="rats-tls")
