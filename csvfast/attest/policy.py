"""Appraisal policies: what a relying party allows, as a TOML or JSON file or a dictionary.

    measurements = ["88698862d12f..."]       allowed launch digests, hexadecimal; or
    any_measurement = true                   every guest, said out loud (V1: then report_data or an mnonce must bind the mask,
                                             which no signature covers, before vm ids or policy bits can be compared)
    report_versions = [1, 2]
    chip_ids = ["KPA64911240507"]            what the evidence says: no signature covers the chip id (see `verify` about the MAC)
    cek_fingerprints = ["..."]               SM3 of a chip's CEK certificate, 2084 bytes: which chip it was, cryptographically
    vm_ids, vm_versions = ["..."]            user_pubkey_digests = ["..."]
    report_data, mnonce = "..."              hexadecimal; report_data is zero-padded on the right
    require_event_log = true                 V2 with a log that replays
    require_mac = true                       the MAC was verified, with the mnonce of the request
    allow_partial = true                     evidence whose chain does not reach a root; default false

    [policy]                                 the guest policy word
    required = ["nodbg", "es"]               forbidden = ["asid_reuse"]
    exact = [0x45]                           whole words, as opaque values

    [minimum]
    api = "1.3"                              firmware API in the PEK certificate
    build = 2337                             firmware build (V2; a V1 report does not say and is refused): the platform's TCB
    policy_api = "1.3"                       policy_hsk_version = 1       policy_cek_version = 1

    [rtmrs]
    rtmr1 = ["..."]                          allowed values of registers 0 .. 4 (V2)

Everything that is given must hold. Unknown members are refused, and so are an empty list and a policy that neither lists
measurements nor says `any_measurement = true`: a typing error must not allow more than was meant.

Thread-safety: immutable objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from csvfast.errors import FormatError
from csvfast.report.policy import POLICY_FLAGS

__all__ = ["AppraisalPolicy"]

_NAME: Final = "appraisal policy"
_POLICY_LIMIT: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class AppraisalPolicy:
    """One policy; the module lists the members of its files. None and () mean: not looked at.

    Made by `from_dict`, `parse` or `load`, which check everything; a policy put together by hand is checked for the one thing
    that matters most, that it says which measurements it allows.
    """

    measurements: tuple[bytes, ...] = ()
    any_measurement: bool = False
    report_versions: tuple[int, ...] = ()
    chip_ids: tuple[str, ...] = ()
    cek_fingerprints: tuple[bytes, ...] = ()
    vm_ids: tuple[bytes, ...] = ()
    vm_versions: tuple[bytes, ...] = ()
    user_pubkey_digests: tuple[bytes, ...] = ()
    report_data: bytes | None = None
    mnonce: bytes | None = None
    require_event_log: bool = False
    require_mac: bool = False
    allow_partial: bool = False
    policy_required: tuple[str, ...] = ()
    policy_forbidden: tuple[str, ...] = ()
    policy_exact: tuple[int, ...] = ()
    minimum_api: tuple[int, int] | None = None
    minimum_build: int | None = None
    minimum_policy_api: tuple[int, int] | None = None
    minimum_policy_hsk_version: int | None = None
    minimum_policy_cek_version: int | None = None
    rtmrs: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.measurements) == self.any_measurement:
            found = "both" if self.measurements else "neither"
            _refuse("measurements, any_measurement", found, "a list of launch digests, or any_measurement = true")
        both = set(self.policy_required) & set(self.policy_forbidden)
        if both:
            _refuse("policy", f"{', '.join(sorted(both))} required and forbidden", "each flag in one list")

    @classmethod
    def load(cls, path: str | Path) -> AppraisalPolicy:
        """From a file: JSON when it starts with a brace, TOML otherwise. OSError, FormatError."""
        with Path(path).open("rb") as file:
            return cls.parse(file.read(_POLICY_LIMIT + 1))

    @classmethod
    def parse(cls, data: bytes) -> AppraisalPolicy:
        """From the bytes of a file, UTF-8. FormatError."""
        import tomllib  # here: a guest, which parses no policy, would pay for it

        if len(data) > _POLICY_LIMIT:
            _refuse("length", f"more than {_POLICY_LIMIT} bytes", f"at most {_POLICY_LIMIT} bytes")
        try:
            text = data.decode("utf-8-sig")
            document = json.loads(text, object_pairs_hook=_unique) if text.lstrip()[:1] == "{" else tomllib.loads(text)
        except UnicodeDecodeError as error:
            _refuse("text", f"byte {data[error.start]:#04x} at {error.start}", "UTF-8")
        except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            _refuse("syntax", str(error), "TOML or a JSON object")
        except RecursionError:
            _refuse("nesting", "too deep", "three levels")
        except FormatError:
            raise
        except ValueError:  # Python's limit on the digits of a number
            _refuse("number", "thousands of digits", "an integer of at most 32 bits")
        return cls.from_dict(document)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> AppraisalPolicy:
        """From a dictionary with the module's members. FormatError names the member at fault."""
        values: dict[str, Any] = {}
        for name, value in document.items():
            if name in _TABLES:
                if not isinstance(value, Mapping):
                    _refuse(name, _shown(value), "a table")
                for inner, inner_value in value.items():
                    _take(values, _TABLES[name], inner, inner_value, f"{name}.{inner}")
            else:
                _take(values, _MEMBERS, name, value, name)
        registers = {int(name[-1]): values.pop(name) for name in list(values) if name.startswith("rtmr")}
        return cls(**values, rtmrs=registers)

    def to_dict(self) -> dict[str, Any]:
        """Every member that is set, bytes as hexadecimal, flat, in the order of the class."""
        result: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None or value is False or value in ((), {}):
                continue
            result[one.name] = _plain(value)
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {f"rtmr{name}": _plain(one) for name, one in value.items()}
    return value


def _refuse(name: str, found: str, expected: str) -> NoReturn:
    raise FormatError(_NAME, name, None, found, expected) from None


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, thousands of levels
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown_name(name: str) -> str:
    return (name if name.isascii() and name.isprintable() else ascii(name)[1:-1])[:64]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _value in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        _refuse(_shown_name(twice), "the member twice", "each member once")
    return members


_Reader = Callable[[Any, str], Any]


def _take(values: dict[str, Any], known: Mapping[str, tuple[str, _Reader]], name: str, value: Any, path: str) -> None:
    if name not in known:
        _refuse(f"{path.removesuffix(name)}{_shown_name(name)}", "an unknown member", f"one of {', '.join(known)}")
    target, read = known[name]
    values[target] = read(value, path)


def _hex(size: int) -> _Reader:
    def read(value: Any, path: str) -> bytes:
        try:
            if not isinstance(value, str) or not value.isascii():
                raise ValueError
            raw = bytes.fromhex(value)
        except ValueError:
            _refuse(path, _shown(value), f"{2 * size} hexadecimal digits")
        if len(raw) != size:
            _refuse(path, f"{len(raw)} bytes", f"{size} bytes in hexadecimal")
        return raw

    return read


def _report_data(value: Any, path: str) -> bytes:
    if isinstance(value, str) and len(value) % 2 == 0 and len(value) <= 128:
        value = value.ljust(128, "0")
    raw: bytes = _hex(64)(value, path)
    return raw


def _list(read: _Reader) -> _Reader:
    def read_all(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            _refuse(path, _shown(value), "a list of at least one value")
        return tuple(read(one, f"{path}[{index}]") for index, one in enumerate(value))

    return read_all


def _integer(lowest: int, highest: int) -> _Reader:
    def read(value: Any, path: str) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            _refuse(path, _shown(value), f"an integer {lowest} .. {highest}")
        return value

    return read


def _boolean(value: Any, path: str) -> bool:
    if type(value) is not bool:
        _refuse(path, _shown(value), "true or false")
    return value


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        _refuse(path, _shown(value), "text of 1 to 64 characters")
    return value


def _flag(value: Any, path: str) -> str:
    if value not in POLICY_FLAGS:
        _refuse(path, _shown(value), f"one of {', '.join(POLICY_FLAGS)}")
    return str(value)


def _api(value: Any, path: str) -> tuple[int, int]:
    parts = value.split(".") if isinstance(value, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 3 and int(part) <= 255 for part in parts):
        _refuse(path, _shown(value), 'text "major.minor", each 0 .. 255')
    return int(parts[0]), int(parts[1])


_MEMBERS: Final[Mapping[str, tuple[str, _Reader]]] = {
    "measurements": ("measurements", _list(_hex(32))),
    "any_measurement": ("any_measurement", _boolean),
    "report_versions": ("report_versions", _list(_integer(1, 2))),
    "chip_ids": ("chip_ids", _list(_text)),
    "cek_fingerprints": ("cek_fingerprints", _list(_hex(32))),
    "vm_ids": ("vm_ids", _list(_hex(16))),
    "vm_versions": ("vm_versions", _list(_hex(16))),
    "user_pubkey_digests": ("user_pubkey_digests", _list(_hex(32))),
    "report_data": ("report_data", _report_data),
    "mnonce": ("mnonce", _hex(16)),
    "require_event_log": ("require_event_log", _boolean),
    "require_mac": ("require_mac", _boolean),
    "allow_partial": ("allow_partial", _boolean),
}
_TABLES: Final[Mapping[str, Mapping[str, tuple[str, _Reader]]]] = {
    "policy": {
        "required": ("policy_required", _list(_flag)),
        "forbidden": ("policy_forbidden", _list(_flag)),
        "exact": ("policy_exact", _list(_integer(0, 0xFFFFFFFF))),
    },
    "minimum": {
        "api": ("minimum_api", _api),
        "build": ("minimum_build", _integer(0, 0xFFFFFFFF)),
        "policy_api": ("minimum_policy_api", _api),
        "policy_hsk_version": ("minimum_policy_hsk_version", _integer(0, 15)),
        "policy_cek_version": ("minimum_policy_cek_version", _integer(0, 15)),
    },
    "rtmrs": {f"rtmr{index}": (f"rtmr{index}", _list(_hex(32))) for index in range(5)},
}
