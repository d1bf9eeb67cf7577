"""What a report says, in the JSON form of trustee's claims. Saying is not proving: verify first.

Source: confidential-containers/trustee deps/verifier/src/csv/mod.rs. Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csvfast.errors import FormatError
from csvfast.report.event_details import event_claims
from csvfast.report.event_log import EventLog
from csvfast.report.evidence import Evidence
from csvfast.report.layout import Report

if TYPE_CHECKING:
    from csvfast.attest.verify import Verified

__all__ = ["claims", "replayed_log"]


def claims(source: Verified | Evidence | Report) -> dict[str, Any]:
    """The claims of a report, unmasked, equal to trustee's.

    V1: version, policy, user_pubkey_digest, vm_id, vm_version, report_data, mnonce, measure, sig_usage, sig_algo, anonce,
    serial_number. V2: build, rtmr_version, reserved0, rtmr0 .. rtmr4 and reserved1 instead of anonce, and uefi_event_logs when
    an event log lies beside the report and replays to its registers.

    Bytes are lower-case hexadecimal, sig_usage, sig_algo and anonce as their little-endian bytes. FormatError when the chip id is
    no text.
    """
    if isinstance(source, Report):
        report, evidence = source, None
    elif isinstance(source, Evidence):
        report, evidence = source.report, source
    else:
        report, evidence = source.report, source.evidence
    info = report.info.hex()  # two characters a byte
    result: dict[str, Any] = {
        "version": str(report.version),
        "policy": report.policy.to_dict(),
        "user_pubkey_digest": info[0x00:0x40],
        "vm_id": info[0x40:0x60],
        "vm_version": info[0x60:0x80],
        "report_data": info[0x80:0x100],
        "mnonce": info[0x100:0x120],
        "measure": info[0x120:0x160],
        "sig_usage": info[0x168:0x170],
        "sig_algo": info[0x170:0x178],
    }
    if report.version == 1:
        result["anonce"] = report.anonce.hex()
    else:
        result["build"] = report.build
        result["rtmr_version"] = report.rtmr_version
        result["reserved0"] = report.reserved0.hex()
        for index, register in enumerate(report.rtmrs):
            result[f"rtmr{index}"] = register.hex()
        result["reserved1"] = report.reserved1.hex()
    result["serial_number"] = report.chip_id if evidence is None else evidence.serial_number
    if evidence is not None and (log := replayed_log(evidence)) is not None:
        result["uefi_event_logs"] = event_claims(log)
    return result


def replayed_log(evidence: Evidence) -> EventLog | None:
    """The event log beside a V2 report when its replay gives the report's registers 1 .. 4; None otherwise."""
    if evidence.event_log is None or evidence.report.version == 1:
        return None
    try:
        log = EventLog.parse(evidence.event_log)
        registers = log.replay()
    except FormatError:
        return None
    reported = evidence.report.rtmrs
    if any(registers.get(index, bytes(32)) != reported[index] for index in range(1, 5)):
        return None
    return log
