"""Where the agent's evidence comes from: the processor's channel in a virtual machine, or the socket of a simulated platform.

HSK and CEK are public, and whoever verifies the evidence checks them against a root: the host may hand them over.
Thread-safety: any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from csvfast.errors import ContainerError, CsvfastError

if TYPE_CHECKING:
    from csvfast.ratstls.attester import Attester
    from csvfast.report.evidence import Evidence

__all__ = ["CertifiedAttester", "guest_attester", "platform_attester"]


class CertifiedAttester:
    """Evidence with HSK and CEK beside it.

    In: make   gives the attester when it is first needed
    Attributes: certificates: HSK and CEK, 2916 bytes; None = those that the attester finds itself. asked, seconds: how often it
        was asked, and how long that took.
    """

    def __init__(self, make: Callable[[], Attester], timed: Callable[[str, float], None]) -> None:
        self.certificates: bytes | None = None
        self._make = make
        self._timed = timed
        self._attester: Attester | None = None

    def prepare(self) -> None:
        """Makes the attester now: its modules are loaded, its device is open. ContainerError "attestation"."""
        try:
            self._ready()
        except (CsvfastError, OSError) as problem:
            raise ContainerError("attestation", f"no report: {problem}") from problem

    def _ready(self) -> Attester:
        if self._attester is None:
            self._attester = self._make()
        return self._attester

    def evidence(self, report_data: bytes) -> Evidence:
        """See csvfast.ratstls.Attester. ContainerError "attestation": no report."""
        import time

        begin = time.monotonic()
        try:
            found = self._ready().evidence(report_data)
            if found.hsk_cek is None and self.certificates is not None:
                found = found.with_certificates(self.certificates)
        except (CsvfastError, OSError) as problem:
            raise ContainerError("attestation", f"no report: {problem}") from problem
        self._timed("report", time.monotonic() - begin)
        return found


def guest_attester(path: str | None = None) -> Attester:
    """Of a virtual machine. In: path   of the channel's port; None = as GuestDevice.open finds one"""
    from csvfast.machine.guest import GuestDevice

    return GuestDevice.open(path)


def platform_attester(report: str, handle: int, vcpu: str | None) -> Attester:
    """Of a guest of the simulated platform. In: report, vcpu   paths of its sockets"""
    # What it will need is loaded now, that a report's time is a report's.
    import csvfast.processor.client
    import csvfast.processor.vmm  # noqa: F401
    from csvfast.ratstls.attester import SocketAttester

    return SocketAttester(os.fspath(report), handle, vcpu_path=vcpu)
