"""Evidence as JSON, exactly as csv-rs' serde derives write and read it: byte arrays are lists of integers.

Reading is strict where a second reading of the same document could differ: duplicate members, numbers that are no integers, NaN,
byte lists of another length, members a structure does not have (the outermost object may hold others, as newer attesters do).
Nesting and size are bounded. Source: confidential-containers/trustee deps/verifier/src/csv/mod.rs and the evidence file published
there; openanolis/csv-rs src/certs. Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from csvfast.certs.layout import CSV_BYTES
from csvfast.errors import FormatError
from csvfast.report.build import client_report
from csvfast.report.evidence import EVIDENCE_LIMIT, Evidence, wrapped_version
from csvfast.report.layout import CHIP_ID_BYTES, Report
from csvfast.report.request import REPORT_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["read_json", "write_json"]

_NAME: Final = "evidence JSON"
_DEPTH_LIMIT: Final = 32
_BRACKETS: Final = re.compile(r"[\[\]{}]")
_KINDS: Final[dict[type, str]] = {
    dict: "an object",
    list: "a list",
    bytes: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    type(None): "null",
}
_ZEROS: Final = ",0" * 16
_BYTES: Final = {str(value): bytes([value]) for value in range(256)} | {"\\": bytes(16)}

# Certificates as lists of leaves in the order of their bytes: (path, size in bytes, kind). "int": a number, little-endian;
# "bytes": a list of integers. csv-rs' structures are these bytes in this order.
_SIGNATURE = (("signature.r", 72, "bytes"), ("signature.s", 72, "bytes"))
_CA: Final = (
    ("body.preamble.ver", 4, "int"),
    ("body.preamble.data.kid", 16, "bytes"),
    ("body.preamble.data.sid", 16, "bytes"),
    ("body.preamble.data.usage", 4, "int"),
    ("body.preamble.data.reserved", 24, "bytes"),
    ("body.pubkey.g", 4, "int"),
    ("body.pubkey.x", 72, "bytes"),
    ("body.pubkey.y", 72, "bytes"),
    ("body.uid_size", 2, "int"),
    ("body.user_id", 254, "bytes"),
    ("body.reserved", 108, "bytes"),
    *_SIGNATURE,
    ("_reserved", 112, "bytes"),
)
_SLOT: Final = (("usage", 4, "int"), ("algo", 4, "int"), *_SIGNATURE, ("_reserved", 368, "bytes"))
_CSV_BODY: Final = (
    ("body.ver", 4, "int"),
    ("body.data.firmware.major", 1, "int"),
    ("body.data.firmware.minor", 1, "int"),
    ("body.data.reserved1", 2, "int"),
    ("body.data.pubkey.usage", 4, "int"),
    ("body.data.pubkey.algo", 4, "int"),
    ("body.data.pubkey.key.g", 4, "int"),
    ("body.data.pubkey.key.x", 72, "bytes"),
    ("body.data.pubkey.key.y", 72, "bytes"),
    ("body.data.uid_size", 2, "int"),
    ("body.data.user_id", 254, "bytes"),
    ("body.data.sid", 16, "bytes"),
    ("body.data.reserved2", 608, "bytes"),
)
_WRAPPER: Final = (("magic", 16, "bytes"), ("flags", 4, "int"), ("data", REPORT_PAGE, "bytes"))
_Leaves = tuple[tuple[str, int, str], ...]


class _Shape(NamedTuple):
    """A structure's leaves with, from the outermost in, its objects: (path, path of the parent, name, members allowed)."""

    leaves: tuple[tuple[str, str, int, str], ...]  # (path of the object, name, size, kind)
    objects: tuple[tuple[str, str, str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, leaves: _Leaves, *others: str) -> _Shape:
        """`others`: members of the outermost object that are read elsewhere."""
        members: dict[str, list[str]] = {"": list(others)}
        for path, _size, _kind_of_leaf in leaves:
            parts = path.split(".")
            for depth, part in enumerate(parts):
                names = members.setdefault(".".join(parts[:depth]), [])
                if part not in names:
                    names.append(part)
        split = ((path.rpartition("."), size, kind) for path, size, kind in leaves)
        objects = ((path, *path.rpartition(".")[::2], tuple(names)) for path, names in members.items())
        return cls(
            tuple((parent, name, size, kind) for (parent, _dot, name), size, kind in split),
            tuple(sorted(objects, key=lambda entry: entry[0].count(".") if entry[0] else -1)),
        )


_CA_SHAPE: Final = _Shape.of(_CA)
_SLOT_SHAPE: Final = _Shape.of(_SLOT)
_CSV_SHAPE: Final = _Shape.of(_CSV_BODY, "sigs")
_WRAPPER_SHAPE: Final = _Shape.of(_WRAPPER)


def read_json(raw: bytes) -> Evidence:
    """Evidence from a JSON document (UTF-8, a byte order mark is allowed). FormatError names the member at fault."""
    document = _load(raw)
    wrapper = _object(document, "attestation_report", "")
    chain = _object(document, "cert_chain", "")
    serial = _leaf(document, "serial_number", CHIP_ID_BYTES, "bytes", "")
    page = _packed(wrapper, _WRAPPER_SHAPE, "attestation_report")
    magic, flags, data = page[:16], int.from_bytes(page[16:20], "little"), page[20:]
    version = wrapped_version(magic, flags, f"{_NAME} attestation_report", None)
    hsk_cek = None
    if chain.get("hsk_cek") is not None:
        both = _object(chain, "hsk_cek", "cert_chain")
        _only(both, ("hsk", "cek"), "cert_chain.hsk_cek")
        hsk = _packed(_object(both, "hsk", "cert_chain.hsk_cek"), _CA_SHAPE, "cert_chain.hsk_cek.hsk")
        hsk_cek = hsk + _csv(_object(both, "cek", "cert_chain.hsk_cek"), "cert_chain.hsk_cek.cek")
    _only(chain, ("hsk_cek", "pek"), "cert_chain")
    pek = _csv(_object(chain, "pek", "cert_chain"), "cert_chain.pek")
    return Evidence(
        Report.parse(data, version),
        hsk_cek=hsk_cek,
        pek_beside=pek,
        serial_beside=serial,
        event_log=_event_log(document),
        encoding="json",
        magic=magic,
    )


def write_json(evidence: Evidence) -> bytes:
    """The JSON document of `evidence`: compact, members in alphabetical order, UTF-8."""
    report = evidence.report
    chain: dict[str, Any] = {"pek": _csv_document(evidence.pek_beside or report.pek_bytes)}
    if evidence.hsk_cek is not None:
        hsk, cek = evidence.hsk_cek[:-CSV_BYTES], evidence.hsk_cek[-CSV_BYTES:]
        chain["hsk_cek"] = {"hsk": _unpacked(hsk, _CA), "cek": _csv_document(cek)}
    page = client_report(report.page(), report.version)
    log = evidence.event_log
    document = {
        "attestation_report": {"magic": list(evidence.magic), "flags": evidence.flags, "data": list(page)},
        "cert_chain": chain,
        "serial_number": list(evidence.serial_beside or report.serial_number),
        "cc_eventlog": None if log is None else base64.b64encode(log).decode("ascii"),
    }
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode("ascii")


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > EVIDENCE_LIMIT:
        raise FormatError(_NAME, "length", None, f"{len(raw)} bytes", f"at most {EVIDENCE_LIMIT} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(_NAME, "text", error.start, f"byte {raw[error.start]:#04x}", "UTF-8") from None
    document = _load_quickly(text)
    if document is None:
        document = _parse(text, _unique)
    if not isinstance(document, dict):
        raise FormatError(_NAME, "document", None, _kind(document), "an object")
    return document


def _parse(text: str, take_members: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    _check_depth(text)
    try:
        return json.loads(text, object_pairs_hook=take_members, parse_float=_no_integer, parse_constant=_no_integer)
    except json.JSONDecodeError as error:
        raise FormatError(_NAME, "syntax", error.pos, error.msg, "a JSON document") from None
    except FormatError:
        raise
    except ValueError:  # Python's limit on the digits of a number
        raise FormatError(_NAME, "number", None, "thousands of digits", "an integer of at most 32 bits") from None


def _load_quickly(text: str) -> Any:
    """The document, its lists of bytes as `bytes`; None when `_parse` has to look at it.

    json spends its time on the ten thousand numbers. Here each list of plain numbers 0 .. 255 is taken out before, and a
    string that starts with a NUL stands in its place: no other string can, in a document without backslashes. A list inside a
    string is no list: there the mark's quote ends the string, and no JSON goes on with a backslash. Only what is right takes this
    way: whatever is wrong is read again by `_parse`, which knows where.
    """
    if "\\" in text:
        return None
    lists: list[bytes] = []
    first, *parts = text.split("[")
    compact = [first]
    for part in parts:
        content, bracket, rest = part.partition("]")
        # Runs of zeros are most of a certificate; a backslash, which the text has none of, stands for sixteen. One that cuts a
        # number short leaves a token that is no key.
        tokens = content.replace(", ", ",").replace(_ZEROS, ",\\").split(",") if bracket else [""]
        try:
            lists.append(b"".join(map(_BYTES.__getitem__, tokens)))
        except KeyError:
            compact.append(f"[{part}")
        else:
            compact.append(f'"\\u0000{len(lists) - 1}"{rest}')

    def take_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = _unique(pairs)
        for name, value in pairs:
            if type(value) is str and value.startswith("\0"):
                members[name] = lists[int(value[1:])]
        return members

    try:
        return _parse("".join(compact), take_members)
    except FormatError:
        return None


def _check_depth(text: str) -> None:
    # Before the parser's recursion: brackets in strings count too, and no string of this document has any.
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "{[" else -1
        if depth > _DEPTH_LIMIT:
            raise FormatError(_NAME, "nesting", None, f"more than {_DEPTH_LIMIT} levels", f"at most {_DEPTH_LIMIT}")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _value in pairs:
            if name in seen:
                raise FormatError(_NAME, _shown_name(name), None, "the member twice", "each member once")
            seen.add(name)
    return members


def _no_integer(text: str) -> NoReturn:
    raise FormatError(_NAME, "number", None, text[:32], "an integer")


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _shown_name(name: str) -> str:
    # It may come from anybody and must not steer a terminal.
    return (name if name.isascii() and name.isprintable() else ascii(name)[1:-1])[:64]


def _path(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _member(parent: dict[str, Any], name: str, path: str) -> Any:
    if name not in parent:
        raise FormatError(_NAME, _path(path, name), None, "nothing", "the member")
    return parent[name]


def _object(parent: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    value = _member(parent, name, path)
    if not isinstance(value, dict):
        raise FormatError(_NAME, _path(path, name), None, _kind(value), "an object")
    return value


def _only(members: dict[str, Any], names: Sequence[str], path: str) -> None:
    for name in members:
        if name not in names:
            raise FormatError(_NAME, _path(path, _shown_name(name)), None, "an unknown member", f"only {', '.join(names)}")


def _leaf(parent: dict[str, Any], name: str, size: int, kind: str, path: str) -> bytes:
    value = _member(parent, name, path)
    if kind == "int":
        if type(value) is not int or not 0 <= value < 1 << 8 * size:
            found = str(value)[:32] if type(value) is int else _kind(value)
            raise FormatError(_NAME, _path(path, name), None, found, f"an integer of {8 * size} bits")
        return value.to_bytes(size, "little")
    if type(value) not in (list, bytes) or len(value) != size:
        found = f"{len(value)} values" if type(value) in (list, bytes) else _kind(value)
        raise FormatError(_NAME, _path(path, name), None, found, f"a list of {size} bytes")
    if type(value) is bytes:
        return value
    if set(map(type, value)) == {int}:  # a boolean would be an integer to bytes()
        with contextlib.suppress(ValueError):
            return bytes(value)
    index, wrong = next((i, v) for i, v in enumerate(value) if type(v) is not int or not 0 <= v <= 255)
    found = str(wrong)[:32] if type(wrong) is int else _kind(wrong)
    raise FormatError(_NAME, f"{_path(path, name)}[{index}]", None, found, "an integer 0 .. 255")


def _packed(members: dict[str, Any], shape: _Shape, path: str) -> bytes:
    objects: dict[str, dict[str, Any]] = {}
    for place, parent, name, allowed in shape.objects:
        full = f"{path}.{place}" if place else path
        objects[place] = _object(objects[parent], name, _path(path, parent) if parent else path) if place else members
        _only(objects[place], allowed, full)
    return b"".join(
        _leaf(objects[parent], name, size, kind, f"{path}.{parent}" if parent else path)
        for parent, name, size, kind in shape.leaves
    )


def _csv(members: dict[str, Any], path: str) -> bytes:
    body = _packed(members, _CSV_SHAPE, path)
    slots = _member(members, "sigs", path)
    if type(slots) is not list or len(slots) != 2:
        found = f"{len(slots)} values" if type(slots) is list else _kind(slots)
        raise FormatError(_NAME, f"{path}.sigs", None, found, "a list of 2 signatures")
    for index, slot in enumerate(slots):
        if not isinstance(slot, dict):
            raise FormatError(_NAME, f"{path}.sigs[{index}]", None, _kind(slot), "an object")
        body += _packed(slot, _SLOT_SHAPE, f"{path}.sigs[{index}]")
    return body


def _event_log(document: dict[str, Any]) -> bytes | None:
    value = document.get("cc_eventlog")
    if value is None:
        return None
    if not isinstance(value, str):
        raise FormatError(_NAME, "cc_eventlog", None, _kind(value), "base64 text or null")
    try:
        log = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(_NAME, "cc_eventlog", None, str(error), "base64 text") from None
    if base64.b64encode(log).decode("ascii") != value:  # bits or padding beyond the last byte: other decoders refuse them
        raise FormatError(_NAME, "cc_eventlog", None, "base64 text that encodes its last byte otherwise", "canonical base64 text")
    return log


def _unpacked(data: bytes, leaves: _Leaves) -> dict[str, Any]:
    document: dict[str, Any] = {}
    at = 0
    for leaf, size, kind in leaves:
        *parents, name = leaf.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        field = data[at : at + size]
        place[name] = int.from_bytes(field, "little") if kind == "int" else list(field)
        at += size
    return document


def _csv_document(data: bytes) -> dict[str, Any]:
    body, slot = 1044, 520
    document = _unpacked(data[:body], _CSV_BODY)
    document["sigs"] = [_unpacked(data[at : at + slot], _SLOT) for at in (body, body + slot)]
    return document
