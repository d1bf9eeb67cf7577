"""Attestation reports and evidence: bytes in, fields out, and back. Nothing here says whether a report is genuine.

    GuestPolicy, ReportRequest, Report      the firmware's structures
    build_report_v1, build_report_v2        what the firmware writes; client_report: what leaves the guest
    Evidence, read_evidence                 a report with what travels beside it, in any known encoding
    EventLog                                the CC event log (CCEL) and its replay

`csvfast.attest` verifies and appraises.
"""

from __future__ import annotations

from csvfast.report.build import build_report_v1, build_report_v2, client_report
from csvfast.report.event_log import Event, EventLog
from csvfast.report.evidence import Encoding, Evidence, read_evidence
from csvfast.report.layout import RAW_V1_BYTES, RAW_V2_BYTES, Report, masked
from csvfast.report.policy import GuestPolicy
from csvfast.report.request import EXTENDED_MAGIC, REPORT_PAGE, ReportRequest, pad_report_data

__all__ = [
    "EXTENDED_MAGIC",
    "RAW_V1_BYTES",
    "RAW_V2_BYTES",
    "REPORT_PAGE",
    "Encoding",
    "Event",
    "EventLog",
    "Evidence",
    "GuestPolicy",
    "Report",
    "ReportRequest",
    "build_report_v1",
    "build_report_v2",
    "client_report",
    "masked",
    "pad_report_data",
    "read_evidence",
]
