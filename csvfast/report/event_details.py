"""What the events of a CC event log say, in the JSON form of trustee's `uefi_event_logs` claim.

Descriptive only: nothing is decided by it. Data that cannot be read gives empty details here, where trustee refuses the whole
log; the `data` member of EV_PLATFORM_CONFIG_FLAGS is left out. Source: confidential-containers/trustee deps/eventlog/src/ccel;
UEFI 2.10 section 10 (device paths); TCG PC Client Platform Firmware Profile. Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import TYPE_CHECKING, Any, Final

from csvfast.crypto import sm3
from csvfast.report.event_log import ALGORITHM_SM3

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.report.event_log import Event, EventLog

__all__ = ["EVENT_TYPES", "event_claims"]

EVENT_TYPES: Final = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x02: "EV_UNUSED",
    0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000000: "EV_EFI_EVENT_BASE",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}
_ALGORITHM_NAMES: Final = {0x04: "SHA-1", 0x0B: "SHA-256", 0x0C: "SHA-384", 0x0D: "SHA-512", ALGORITHM_SM3: "SM3"}
_HASHES: Final = {0x0B: hashlib.sha256, 0x0C: hashlib.sha384, 0x0D: hashlib.sha512}


def event_claims(log: EventLog) -> list[dict[str, Any]]:
    """One object per event: details, digest_matches_event, digests, event (base64 of the data), index, type_name."""
    return [
        {
            "details": _details(event),
            "digest_matches_event": all(_digest_of(number, event.data) == digest for number, digest in event.digests),
            "digests": [
                {"alg": _ALGORITHM_NAMES.get(number, f"{number:#06x}"), "digest": digest.hex()}
                for number, digest in event.digests
            ],
            "event": base64.b64encode(event.data).decode("ascii"),
            "index": event.register,
            "type_name": EVENT_TYPES.get(event.type, f"{event.type:#010x}"),
        }
        for event in log.events
    ]


def _digest_of(algorithm: int, data: bytes) -> bytes | None:
    if algorithm == ALGORITHM_SM3:
        return sm3(data).digest()
    make = _HASHES.get(algorithm)
    return None if make is None else make(data).digest()


def _details(event: Event) -> dict[str, Any]:
    reader = _READERS.get(event.type)
    if reader is None:
        return {}
    try:
        return reader(event.data)
    except (ValueError, struct.error, IndexError):  # UnicodeDecodeError is a ValueError
        return {}


def _text(data: bytes) -> dict[str, Any]:
    return {"string": data.decode("utf-8")}


def _ipl(data: bytes) -> dict[str, Any]:
    if len(data) < 2:
        return {}
    if data[:2] == b".\0":  # Google Cloud: a dot and text, all UTF-16
        return {"string": data[2:-2].decode("utf-16-le", "replace")}
    head = data.partition(b"\0")[0]
    try:
        return {"string": head.decode("utf-8")}
    except UnicodeDecodeError:
        return {"string": data.hex()}


def _tag(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack_from("<I", data, 4)
    return {"string": _slice(data, 8, size).decode("utf-8").replace("\0", "")}


def _blob(data: bytes) -> dict[str, Any]:
    return {"string": _slice(data, 1, data[0] - 1).decode("utf-8")}


def _platform_flags(data: bytes) -> dict[str, Any]:
    text = data.decode("utf-8").replace("\x10", " ")
    return {"string": "".join(c for c in text if not (c < " " or "\x7f" <= c <= "\x9f"))}


def _variable(data: bytes) -> dict[str, Any]:
    guid = _slice(data, 0, 16).hex()
    name_length, data_length = struct.unpack_from("<QQ", data, 16)
    name = _slice(data, 32, 2 * name_length).decode("utf-16-le")
    value = _slice(data, 32 + 2 * name_length, data_length)
    return {
        "unicode_name": name,
        "unicode_name_length": name_length,
        "variable_data": base64.b64encode(value).decode("ascii"),
        "variable_data_length": data_length,
        "variable_name": "-".join((guid[:8], guid[8:12], guid[12:16], guid[16:20], guid[20:])),
    }


def _image(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", data, 24)
    if length == 0:
        return {}
    nodes = _slice(data, 32, length - 4)  # without the end node
    paths = []
    at = 0
    while at < len(nodes):
        kind, subtype, size = struct.unpack_from("<BBH", nodes, at)
        if size < 4:
            raise ValueError("a device path node shorter than its header")
        paths.append(_device(kind, subtype, _slice(nodes, at + 4, size - 4)))
        at += size
    return {"device_paths": paths}


def _device(kind: int, subtype: int, data: bytes) -> str:
    if (kind, subtype) == (1, 1) and len(data) >= 2:
        return f"Pci({data[0]},{data[1]})"
    if (kind, subtype) == (2, 1) and len(data) >= 8:
        hid, uid = struct.unpack_from("<II", data)
        vendor = "".join(chr((hid >> shift & 0x1F) + 0x40) for shift in (10, 5, 0))
        return f"ACPI({vendor}{hid >> 16:04X},{uid})"
    if (kind, subtype) == (4, 1) and len(data) >= 38:
        partition, start, size = struct.unpack_from("<IQQ", data)
        place = f",{start:#x},{size:#x}" if partition else ""
        if data[36] == 1:
            return f"HD({partition},MBR,{int.from_bytes(data[20:24], 'little'):#010x}{place})"
        if data[36] == 2:
            return f"HD({partition},GPT,{_guid(data[20:36])}{place})"
    if (kind, subtype) == (4, 3) and len(data) >= 16:
        return f"VenMedia({_guid(data[:16])},{data[16:].hex()})"
    if (kind, subtype) == (4, 4) and data and len(data) % 2 == 0:
        return f"File({data[:-2].decode('utf-16-le', 'replace')})"
    return f"Path({kind},{subtype},{data.hex()})"


def _guid(data: bytes) -> str:
    one, two, three = struct.unpack_from("<IHH", data)
    return f"{one:08X}-{two:04X}-{three:04X}-{data[8:10].hex()}-{data[10:16].hex()}".upper()


def _slice(data: bytes, start: int, size: int) -> bytes:
    if size < 0 or len(data) - start < size:
        raise ValueError("a length beyond the event's data")
    return data[start : start + size]


_READERS: Final[dict[int, Callable[[bytes], dict[str, Any]]]] = {
    0x01: _text,
    0x05: _text,
    0x06: _tag,
    0x0A: _platform_flags,
    0x0C: _text,
    0x0D: _ipl,
    0x12: _text,
    0x80000001: _variable,
    0x80000002: _variable,
    0x80000003: _image,
    0x80000007: _text,
    0x8000000A: _blob,
    0x8000000B: _blob,
    0x8000000C: _variable,
    0x800000E0: _variable,
}
