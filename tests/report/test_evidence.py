"""Evidence in every encoding: told apart by content, written back byte for byte, refused when anything does not fit."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import ArgumentError, BufferTypeError, FormatError
from csvfast.report import EXTENDED_MAGIC, Evidence, Report, evidence_json, read_evidence
from csvfast.report.evidence import EVIDENCE_LIMIT

PLATFORM = Platform()
EVENT_LOG = b"not looked at here"


def full(version: int = 1) -> Evidence:
    emitted = PLATFORM.evidence(version)
    return Evidence(
        emitted.report,
        hsk_cek=PLATFORM.hsk_cek,
        pek_beside=PLATFORM.pek.encoded,
        serial_beside=emitted.report.serial_number,
        event_log=EVENT_LOG,
        encoding="json",
    )


def test_real_json_is_written_back_byte_for_byte(hygon_data: Path) -> None:
    raw = (hygon_data / "csv_evidence.json").read_bytes()
    evidence = read_evidence(raw)
    assert evidence.to_json() == raw
    assert evidence.encoding == "json"
    assert evidence.hsk_cek is None
    assert evidence.pek == evidence.report.pek
    assert evidence.serial_number == evidence.report.chip_id == "KPA64911240507"


@pytest.mark.parametrize("version", [1, 2])
def test_json(version: int) -> None:
    written = full(version).to_json()
    read = read_evidence(written)
    assert read.encoding == "json"
    assert read.report.version == version
    assert read.magic == (bytes(16) if version == 1 else EXTENDED_MAGIC)
    assert (read.hsk_cek, read.pek_beside, read.event_log) == (PLATFORM.hsk_cek, PLATFORM.pek.encoded, EVENT_LOG)
    assert (read.hsk, read.cek, read.pek) == (PLATFORM.line.hsk, PLATFORM.chip.cek, PLATFORM.pek)
    assert read.serial_number == PLATFORM.chip.chip_id
    assert read.to_json() == written
    assert read_evidence(b"\n  " + written).to_json() == written
    assert read_evidence(b"\xef\xbb\xbf" + written).to_json() == written


ENCODINGS: dict[str, Callable[[Evidence], bytes]] = {
    "csv-rs": Evidence.to_csv_rs,
    "raw": Evidence.to_raw,
    "page": lambda evidence: evidence.report.page(),
    "rats-tls": Evidence.to_rats_tls,
    "librats": Evidence.to_librats,
    "json": Evidence.to_json,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", [1, 2])
def test_encodings(encoding: str, version: int) -> None:
    write = ENCODINGS[encoding]
    if version == 2 and encoding in ("rats-tls", "librats"):
        with pytest.raises(ArgumentError, match="V1"):
            write(full(version))
        return
    written = write(full(version))
    read = read_evidence(written)
    assert read.encoding == encoding
    assert write(read) == written
    assert read.report.version == version
    assert read.report.pek == PLATFORM.pek
    assert read.report.chip_id == PLATFORM.chip.chip_id
    assert read.report.pek_is_masked == (version == 1 and encoding not in ("csv-rs", "json"))
    assert read.report.sealing_key_is_present == (encoding in ("raw", "page"))
    assert read.hsk_cek == (PLATFORM.hsk_cek if encoding in ("rats-tls", "librats", "json") else None)


@pytest.mark.parametrize("encoding", ["rats-tls", "librats"])
def test_without_certificates(encoding: str) -> None:
    evidence = Evidence(Report.parse(PLATFORM.page_v1()))
    written = ENCODINGS[encoding](evidence)
    assert len(written) == (7016 if encoding == "rats-tls" else 4100)
    read = read_evidence(written)
    assert (read.encoding, read.hsk_cek) == (encoding, None)


def test_every_encoding_becomes_every_other() -> None:
    for start in ("csv-rs", "rats-tls", "librats", "json"):
        evidence = read_evidence(ENCODINGS[start](full()))
        for goal in ("csv-rs", "rats-tls", "librats", "json"):
            again = read_evidence(ENCODINGS[goal](evidence))
            assert again.report.signed_bytes == evidence.report.signed_bytes
            assert (again.report.pek_bytes, again.report.mac) == (evidence.report.pek_bytes, evidence.report.mac)


def test_a_masked_brace_is_not_json() -> None:
    page = bytearray(PLATFORM.page_v1())
    page[0] = ord("{")
    assert read_evidence(bytes(page[:2548])).encoding == "raw"


def test_wrapper_words() -> None:
    page = PLATFORM.page_v2()
    assert read_evidence(EXTENDED_MAGIC + b"\x01\0\0\0" + page).report.version == 2
    assert read_evidence(EXTENDED_MAGIC + bytes(4) + page).report.version == 1
    assert read_evidence(bytes(16) + b"\x01\0\0\0" + page).report.version == 1  # csv-rs: no magic, no flags
    for head, field, offset in ((b"X" * 16 + bytes(4), "magic", 0), (EXTENDED_MAGIC + b"\x02\0\0\0", "flags", 16)):
        with pytest.raises(FormatError) as caught:
            read_evidence(head + page)
        assert (caught.value.field, caught.value.offset) == (field, offset)


def test_length_words() -> None:
    rats_tls = full().to_rats_tls()
    with pytest.raises(FormatError, match="certificate length at offset 7012"):
        read_evidence(rats_tls[:-4] + (2915).to_bytes(4, "little"))
    librats = full().to_librats()
    with pytest.raises(FormatError, match="certificates at offset 4096"):
        read_evidence(librats[:4096] + (2917).to_bytes(4, "little") + librats[4100:])
    with pytest.raises(FormatError, match="certificate length at offset 4096"):
        read_evidence(librats[:4096] + (1).to_bytes(4, "little"))


@pytest.mark.parametrize("length", [0, 1, 100, 2547, 2549, 4101, 4115, 7015, 7017, 20000])
def test_garbage(length: int) -> None:
    with pytest.raises(FormatError, match="encoding"):
        read_evidence(b"\x01" * length)


def test_fields_of_another_length() -> None:
    report = Report.parse(PLATFORM.page_v1())
    for name in ("hsk_cek", "pek_beside", "serial_beside"):
        with pytest.raises(FormatError):
            Evidence(report, **{name: b"short"})
    with pytest.raises(FormatError):
        Evidence(report, magic=bytes(15))
    copied = Evidence(report, hsk_cek=bytearray(PLATFORM.hsk_cek), serial_beside=memoryview(report.serial_number))
    assert (type(copied.hsk_cek), type(copied.serial_beside)) == (bytes, bytes)
    with pytest.raises(BufferTypeError):
        Evidence(report, event_log="text")  # type: ignore[arg-type]


# JSON, hardened.


def document() -> dict[str, Any]:
    return json.loads(full().to_json())


def change(path: str, value: Any) -> bytes:
    changed = document()
    place: Any = changed
    *parents, last = path.split(".")
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    if value is KeyError:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(changed).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attestation_report", KeyError),
        ("attestation_report", []),
        ("attestation_report.data", [0] * 4095),
        ("attestation_report.data", "text"),
        ("attestation_report.data.7", 256),
        ("attestation_report.data.7", -1),
        ("attestation_report.data.7", True),
        ("attestation_report.data.7", None),
        ("attestation_report.data.7", [1]),
        ("attestation_report.magic", [0] * 17),
        ("attestation_report.magic.0", 1),
        ("attestation_report.flags", -1),
        ("attestation_report.flags", 1 << 32),
        ("attestation_report.flags", None),
        ("attestation_report.extra", 1),
        ("cert_chain", None),
        ("cert_chain.pek", KeyError),
        ("cert_chain.extra", 1),
        ("cert_chain.hsk_cek", {}),
        ("cert_chain.hsk_cek", 5),
        ("cert_chain.hsk_cek.extra", 1),
        ("cert_chain.hsk_cek.cek", None),
        ("cert_chain.hsk_cek.hsk.body.preamble.data.kid", [0] * 15),
        ("cert_chain.hsk_cek.hsk.body.uid_size", 65536),
        ("cert_chain.hsk_cek.hsk.body.extra", 0),
        ("cert_chain.pek.body.ver", KeyError),
        ("cert_chain.pek.body.ver", "1"),
        ("cert_chain.pek.body.data.firmware.major", 256),
        ("cert_chain.pek.body.data.pubkey.key.extra", 0),
        ("cert_chain.pek.sigs", []),
        ("cert_chain.pek.sigs", {}),
        ("cert_chain.pek.sigs.0", 1),
        ("cert_chain.pek.sigs.1.signature", KeyError),
        ("cert_chain.pek.sigs.1.extra", 1),
        ("serial_number", KeyError),
        ("serial_number", [65] * 63),
        ("cc_eventlog", 7),
        ("cc_eventlog", "not base64!"),
        ("cc_eventlog", "YQ=\n="),
        ("cc_eventlog", "YR=="),  # bits beyond the last byte
        ("cc_eventlog", "YWFh=="),  # padding beyond it
        ("cc_eventlog", "YWE"),
        ("cc_eventlog", "YW_-"),
        ("attestation_report.flags", [0]),
        ("cc_eventlog", [1, 2]),
        ("cert_chain.pek.sigs", [1, 2]),
    ],
)
def test_json_refusals(path: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        read_evidence(change(path, value))
    assert caught.value.structure.startswith("evidence JSON")
    assert caught.value.offset is None


def test_json_tolerates_what_serde_does() -> None:
    assert read_evidence(change("newer_member", {"a": 1})).hsk_cek == PLATFORM.hsk_cek
    assert read_evidence(change("cert_chain.hsk_cek", None)).hsk_cek is None
    assert read_evidence(change("cert_chain.hsk_cek", KeyError)).hsk_cek is None
    assert read_evidence(change("cc_eventlog", None)).event_log is None
    assert read_evidence(change("cc_eventlog", KeyError)).event_log is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"flags":0', '"flags":0,"flags":0', "twice"),
        ('"flags":0', '"flags":0.0', "integer"),
        ('"flags":0', '"flags":0e0', "integer"),
        ('"flags":0', '"flags":NaN', "integer"),
        ('"flags":0', '"flags":-Infinity', "integer"),
        ('"flags":0', '"flags":' + "9" * 5000, "digits"),
        ('"flags":0', '"flags":', "syntax"),
        ('"flags":0', '"flags":' + "[" * 40 + "]" * 40, "levels"),
        ('"flags":0', '"flags":' + '{"a":' * 40 + "1" + "}" * 40, "levels"),
        ('"flags":0', '"flags":' + "[" * 200000, "levels"),
    ],
)
def test_json_syntax(old: str, new: str, reason: str) -> None:
    text = full().to_json().decode()
    assert text.count(old) == 1
    with pytest.raises(FormatError, match=reason):
        read_evidence(text.replace(old, new).encode())


LISTS = [
    *("0", "255", "256", "007", "00", "1 2", "1, 2", "1,2 ", " 1", "1,,2", ",1", "1,", "-0", "-1", "1.0", "1e2"),
    *("true", "null", '"1"', "[1]", "1,\n2", "\t1", "9" * 5000, "z", "", " ", ","),
    *("0," * 15 + "0", "0," * 16 + "0", "0," * 17 + "0", "0," * 16 + "05", "1" + ",0" * 16 + "7", "1" + ",0" * 16 + "z"),
    *("\\", "0,\\"),
    *("10" + ",0" * 40 + ",9", ",".join(map(str, range(256))), ",".join(map(str, range(257)))),
]
PLACES = [
    *('{"a":[%s]}', '{"a":{"b":[%s],"c":[[%s]]}}', '{"a":"x","b":"[%s]"}', '{"a":[%s],"a":[%s]}'),
    '{"a":"\\\\","b":[%s]}',
]


@pytest.mark.parametrize("content", LISTS)
@pytest.mark.parametrize("around", PLACES)
def test_both_ways_of_reading_lists_agree(content: str, around: str) -> None:
    """The quick way takes what is right, byte for byte, and nothing else."""
    text = around.replace("%s", content)

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: lists(member) for name, member in value.items()}
        return list(value) if isinstance(value, bytes) else value

    quick = evidence_json._load_quickly(text)
    try:
        slow = evidence_json._parse(text, evidence_json._unique)
    except FormatError:
        assert quick is None
    else:
        if quick is not None and "[[" not in text:  # a list in a list is nobody's member: refused by whoever reads it
            assert lists(quick) == slow


def test_the_quick_way_is_taken() -> None:
    for text in (full().to_json().decode(), json.dumps(document())):
        quick = evidence_json._load_quickly(text)
        assert type(quick["attestation_report"]["data"]) is bytes
        assert type(quick["serial_number"]) is bytes
    assert evidence_json._load_quickly(full().to_json().decode().replace('"flags"', '"fl\\u0061gs"')) is None


def test_a_string_cannot_stand_for_a_list() -> None:
    """Strings that look like the quick way's own marks, or hold lists, are strings."""
    text = full().to_json().decode()
    serial = json.dumps(list(full().report.serial_number), separators=(",", ":"))
    assert text.count(serial) == 1
    for mark in ('"\\u00000"', '"\0000"', '"\0"', '"[0]"', '"\\u0000"', '"z"'):
        with pytest.raises(FormatError):
            read_evidence(text.replace(serial, mark).encode())
    for extra in ('"x":"[1,2]",', '"x[1]":1,"x[2]":2,', '"x":"\\u00000",', '"x":"\\"[1,2]",'):
        assert read_evidence(text.replace("{", "{" + extra, 1).encode()).to_json().decode() == text
    with pytest.raises(FormatError, match="twice"):
        read_evidence(text.replace("{", '{"x[1]":1,"x[1]":2,', 1).encode())


def test_escaped_names_and_spaces_are_read() -> None:
    text = full().to_json().decode()
    read = json.loads(text)
    for other in (text.replace('"data"', '"d\\u0061ta"'), json.dumps(read), json.dumps(read, indent=1)):
        assert read_evidence(other.encode()).to_json().decode() == text


def test_json_text() -> None:
    written = full().to_json()
    with pytest.raises(FormatError, match="UTF-8"):
        read_evidence(written.replace(b'"flags"', b'"fl\xff\xfegs"'))
    with pytest.raises(FormatError, match="at most"):
        read_evidence(written + b" " * EVIDENCE_LIMIT)
    with pytest.raises(FormatError, match="syntax"):
        read_evidence(written[:-1])
    with pytest.raises(FormatError, match="syntax"):
        read_evidence(written + b"{}")


@given(st.data())
def test_random_json_changes_are_read_or_refused(data: st.DataObject) -> None:
    changed = copy.deepcopy(DOCUMENT)
    place: Any = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(st.none() | st.integers() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(0, 255)))
        break
    with contextlib.suppress(FormatError):
        read_evidence(json.dumps(changed).encode())


DOCUMENT = document()


def test_mutated_bytes_are_read_or_refused() -> None:
    generator = random.Random(2)
    seeds = [write(full()) for write in ENCODINGS.values()]
    for _ in range(2000):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 4)):
            choice = generator.randrange(3)
            at = generator.randrange(len(data))
            if choice == 0:
                data[at] = generator.randrange(256)
            elif choice == 1:
                del data[at : at + generator.choice([1, 20, 2916])]
            else:
                data[at:at] = generator.randbytes(generator.choice([1, 16]))
            if not data:
                break
        with contextlib.suppress(FormatError):
            evidence = read_evidence(data)
            for name in ("pek", "serial_number", "hsk", "cek"):
                getattr(evidence, name)
            assert len(evidence.report.signature) == 64
