"""Reports as the firmware writes them, and what a client makes of them before they leave the guest.

Source: openanolis/csv-rs src/api/guest/types.rs (layouts), inclavare-containers/rats-tls src/attesters/csv (masking order);
checked against real V1 reports. Thread-safety: functions without state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, cast

from csvfast.certs.fields import to_field
from csvfast.crypto import hmac_sm3
from csvfast.errors import ArgumentError, LengthError
from csvfast.report._input import exactly
from csvfast.report.layout import CHIP_ID_BYTES, REPORT_SIGNATURE_ALGORITHM, REPORT_SIGNER_USAGE, Report, masked
from csvfast.report.request import REPORT_PAGE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast._core import BytesLike, SM2PrivateKey
    from csvfast.certs.layout import CsvCertificate
    from csvfast.report.policy import GuestPolicy

__all__ = ["build_report_v1", "build_report_v2", "client_report", "rats_tls_page"]

_SEALING_KEY_BYTES: Final = 32


def build_report_v1(
    *,
    user_pubkey_digest: BytesLike,
    vm_id: BytesLike,
    vm_version: BytesLike,
    report_data: BytesLike,
    mnonce: BytesLike,
    measure: BytesLike,
    policy: GuestPolicy,
    anonce: BytesLike,
    pek_key: SM2PrivateKey,
    pek: CsvCertificate,
    chip_id: str,
    sealing_key: BytesLike,
) -> bytearray:
    """A V1 report in its page, as emitted: masked, signed over the masked bytes, MAC over what is emitted.

    In: user_pubkey_digest 32, vm_id 16, vm_version 16, report_data 64, mnonce 16, measure 32, sealing_key 32 bytes
        anonce    4 bytes, not all zero (ArgumentError): the mask
        pek_key   signs with the user id of `pek`
        chip_id   1 .. 64 printable ASCII characters
    Out: 4096 bytes; it holds the sealing key: wipe it when it is done with. LengthError for a field of another length.
    """
    mask = exactly("anonce", anonce, 4)
    if mask == bytes(4):
        raise ArgumentError("anonce 00000000: expected a mask other than zero")
    info = _info(user_pubkey_digest, vm_id, vm_version, report_data, mnonce, measure, policy)
    head = masked(info, mask)
    signature = pek_key.sign(head[:0xB4], user_id=pek.user_id)
    page = bytearray(REPORT_PAGE)
    page[0x000:0x0BC] = head
    page[0x0BC:0x0C0] = mask
    page[0x0C0:0x150] = to_field(signature[:32]) + to_field(signature[32:])
    page[0x150:0x9B4] = masked(pek.encoded + _serial_number(chip_id), mask)
    _finish(page, 0x150, 0x9B4, mnonce, sealing_key)
    return page


def build_report_v2(
    *,
    user_pubkey_digest: BytesLike,
    vm_id: BytesLike,
    vm_version: BytesLike,
    report_data: BytesLike,
    mnonce: BytesLike,
    measure: BytesLike,
    policy: GuestPolicy,
    build: int,
    rtmr_version: int,
    rtmrs: Sequence[BytesLike],
    pek_key: SM2PrivateKey,
    pek: CsvCertificate,
    chip_id: str,
    sealing_key: BytesLike,
) -> bytearray:
    """A V2 report in its page. Arguments as for V1; rtmrs: five of 32 bytes, of which number 0 must equal `measure`."""
    if len(rtmrs) != 5:
        raise LengthError(f"{len(rtmrs)} rtmrs: expected 5")
    registers = [exactly(f"rtmr{index}", value, 32) for index, value in enumerate(rtmrs)]
    if registers[0] != exactly("measure", measure, 32):
        raise ArgumentError("rtmr0 differs from measure: expected the launch digest in both")
    if not 0 <= build <= 0xFFFFFFFF or not 0 <= rtmr_version <= 0xFFFF:
        raise ArgumentError(f"build {build}, rtmr_version {rtmr_version}: expected words of 32 and 16 bits")
    page = bytearray(REPORT_PAGE)
    page[0x000:0x0BC] = _info(user_pubkey_digest, vm_id, vm_version, report_data, mnonce, measure, policy)
    page[0x0BC:0x0C0] = build.to_bytes(4, "little")
    page[0x0C0:0x0C2] = rtmr_version.to_bytes(2, "little")
    page[0x0D0:0x170] = b"".join(registers)
    signature = pek_key.sign(page[:0x400], user_id=pek.user_id)
    page[0x400:0x490] = to_field(signature[:32]) + to_field(signature[32:])
    page[0x490:0xCF4] = pek.encoded + _serial_number(chip_id)
    _finish(page, 0x490, 0xCF4, mnonce, sealing_key)
    return page


def client_report(page: BytesLike, version: Literal[1, 2] | None = None) -> bytes:
    """What csv-rs leaves of a page before it hands it out: pek and sn unmasked, the sealing key zeroed, the MAC as it was.

    Nothing is verified here; the guest checks MAC and mnonce first (`Report.mac_is_valid`). Out: 4096 bytes.
    """
    report = Report.parse(page, version)
    at = report.pek_offset
    signer = report.pek_bytes + report.serial_number
    body = report.emitted[:at] + signer + bytes(_SEALING_KEY_BYTES) + report.mac
    return (body + report.padding).ljust(REPORT_PAGE, b"\0")


def rats_tls_page(report: Report) -> bytes:
    """A V1 report's page as rats-tls and librats keep it: pek and sn masked, the sealing key zeroed. Out: 4096 bytes."""
    signed, signer = report.emitted[: report.pek_offset], report.mac_bytes[:-_SEALING_KEY_BYTES]
    body = signed + signer + bytes(_SEALING_KEY_BYTES) + report.mac
    return (body + report.padding).ljust(REPORT_PAGE, b"\0")


def _info(
    user_pubkey_digest: BytesLike,
    vm_id: BytesLike,
    vm_version: BytesLike,
    report_data: BytesLike,
    mnonce: BytesLike,
    measure: BytesLike,
    policy: GuestPolicy,
) -> bytes:
    return b"".join(
        (
            exactly("user_pubkey_digest", user_pubkey_digest, 32),
            exactly("vm_id", vm_id, 16),
            exactly("vm_version", vm_version, 16),
            exactly("report_data", report_data, 64),
            exactly("mnonce", mnonce, 16),
            exactly("measure", measure, 32),
            policy.to_bytes(),
            REPORT_SIGNER_USAGE.to_bytes(4, "little"),
            REPORT_SIGNATURE_ALGORITHM.to_bytes(4, "little"),
        )
    )


def _finish(page: bytearray, signer: int, reserved: int, mnonce: BytesLike, sealing_key: BytesLike) -> None:
    key = memoryview(cast("Buffer", sealing_key))
    if key.nbytes != _SEALING_KEY_BYTES:
        raise LengthError(f"sealing_key of {key.nbytes} bytes: expected {_SEALING_KEY_BYTES}")
    end = reserved + _SEALING_KEY_BYTES
    page[reserved:end] = key.cast("B")
    page[end : end + 32] = hmac_sm3(mnonce, memoryview(page)[signer:end]).digest()


def _serial_number(chip_id: str) -> bytes:
    if not 1 <= len(chip_id) <= CHIP_ID_BYTES or not all("!" <= character <= "~" for character in chip_id):
        raise ArgumentError(f"chip id {chip_id!r}: expected 1 to {CHIP_ID_BYTES} printable ASCII characters")
    return chip_id.encode("ascii").ljust(CHIP_ID_BYTES, b"\0")
