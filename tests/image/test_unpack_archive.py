"""The archive reader against tarfile and GNU tar, and every field with something else in it than belongs there."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image.archives import entry, header, pax, pax_records, raw, tar

from csvfast.errors import ImageError
from csvfast.image.archive import DIRECTORY, FILE, SYMLINK, Archive, Entry
from csvfast.image.limits import Budget, Limits


def chunks(data: bytes, size: int) -> Callable[[], bytes]:
    file = io.BytesIO(data)
    return lambda: file.read(size)


def read(data: bytes, size: int = 1 << 16, limits: Limits | None = None) -> list[tuple[Entry, bytes]]:
    archive = Archive(chunks(data, size), Budget(limits or Limits()))
    found = []
    while (one := archive.next()) is not None:
        content = b""
        while piece := archive.piece():
            content += piece
        found.append((one, content))
    assert archive.next() is None
    return found


def one(data: bytes) -> Entry:
    ((found, _content),) = read(data)
    return found


def refused(data: bytes, words: str, limits: Limits | None = None) -> None:
    with pytest.raises(ImageError) as caught:
        read(data, limits=limits)
    assert words in str(caught.value)
    with pytest.raises(ImageError):
        read(data, 7, limits)
    assert "\n" not in str(caught.value)


NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=300).filter(
    lambda name: not name.endswith("/") and name.encode()
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500), st.integers(0, 0o7777), st.integers(0, 2**32 - 2)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from([1, 100, 512, 4096, 1 << 20]),
)
def test_what_tarfile_writes(items: list[tuple[str, bytes, int, int]], form: int, size: int) -> None:
    made = [entry(name, content, mode=mode, uid=uid, mtime=1_234_567_890) for name, content, mode, uid in items]
    found = read(tar(*made, format=form), size)
    assert [(e.name.decode(), content, e.mode, e.uid) for e, content in found] == items
    assert all(e.kind == FILE and e.mtime == 1_234_567_890 * 10**9 and e.size == len(content) for e, content in found)


def test_names_and_links_of_any_length() -> None:
    for length in (99, 100, 101, 155, 156, 255, 256, 257, 1000, 4000):
        name, link = "n" * length, "l/" * (length // 2)
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            found = one(tar(entry(name, kind=tarfile.SYMTYPE, link=link), format=form))
            assert (found.name, found.link, found.kind) == (name.encode(), link.encode(), SYMLINK)


def test_the_prefix_of_ustar() -> None:
    assert one(raw(header(b"b" * 100, prefix=b"a" * 155))).name == b"a" * 155 + b"/" + b"b" * 100
    assert one(raw(header(b"b", prefix=b"1234", magic=b"ustar  \0"))).name == b"b", "GNU keeps times there"
    assert one(raw(header(b"b", prefix=b"a/c", magic=b"ustar  \0"))).name == b"a/c/b", "but Go before 1.8 did not"
    assert one(raw(header(b"b", prefix=b"a", magic=bytes(8)))).name == b"b"


def test_times() -> None:
    assert one(tar(entry("x", mtime=1.25))).mtime == 1_250_000_000
    assert one(raw(*pax(mtime="-1.5", atime="0.000000001"), header())).mtime == -1_500_000_000
    assert one(raw(*pax(mtime="12.1234567899"), header())).mtime == 12_123_456_789
    assert one(raw(*pax(atime="7"), header())).atime == 7_000_000_000
    assert one(raw(header(magic=b"ustar  \0", tail=b"00000000012\0"))).atime == 10 * 10**9
    assert one(raw(header(mtime=b"\xff" * 12))).mtime == -(10**9)


def test_numbers() -> None:
    assert one(raw(header(uid=b"\x80\0\0\0\0\0\0\x07"))).uid == 7
    assert one(raw(header(uid=b"  1750 \0"))).uid == 0o1750
    assert one(raw(header(uid=b"17\0junk"))).uid == 0o17, "as Go reads it: to the first NUL"
    assert one(raw(header(uid=b""))).uid == 0
    assert one(raw(*pax(uid="4000000000", gid="5"), header(uid=1, gid=2))).uid == 4_000_000_000
    assert one(raw(*pax(uid="", path=""), header(b"kept", uid=3))).name == b"kept"


def test_old_forms() -> None:
    assert one(raw(header(b"dir/", kind=b"\0", magic=bytes(8)))).kind == DIRECTORY
    assert one(raw(header(b"file", kind=b"\0", magic=bytes(8)))).kind == FILE
    assert one(raw(header(b"file", kind=b"7"))).kind == FILE
    block = header(b"\xff" * 90)
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])
    assert one(raw(header(b"\xff" * 90, check=b"%06o\0 " % signed))).name == b"\xff" * 90


def test_records() -> None:
    found = one(
        raw(*pax(path="long/name", linkpath="target", comment="x", SCHILY__xattr="", uname="a"), header(kind=b"2"))
    )
    assert (found.name, found.link) == (b"long/name", b"target")
    found = one(raw(*pax_records([("SCHILY.xattr.user.a=b", b"v"), ("SCHILY.xattr.user.c", b"\0\n=\xff")]), header()))
    assert found.xattrs == {b"user.a": b"b=v", b"user.c": b"\0\n=\xff"}
    data = raw(*pax_records([("comment", "whole archive"), ("path", "no")], kind=b"g"), header(b"yes"))
    assert one(data).name == b"yes", "a global header changes no entry"
    assert one(raw(*pax(size="3"), header(size=0), b"abc")).size == 3


def test_links_have_no_content() -> None:
    found = read(raw(header(b"l", kind=b"1", link=b"x", size=512), header(b"f", size=1), b"y"))
    assert [(e.name, content) for e, content in found] == [(b"l", b""), (b"f", b"y")]


def test_the_end() -> None:
    assert read(b"") == []
    assert read(bytes(512)) == []
    assert read(bytes(10240)) == []
    assert len(read(raw(header(), end=False))) == 1
    refused(raw(header(), end=False) + bytes(512) + header(), "one block of zeros")
    refused(raw(header(), end=False)[:-1], "ends within a block")
    refused(raw(header(size=600), b"x" * 600, end=False)[:-200], "before the end of the entry's content")
    refused(raw(*pax(path="x"), end=False), "announces an entry")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (raw(header(check=b"0000000\0")), "check sum"),
        (raw(header(check=b"junk    ")), "check sum"),
        (raw(header(size=b"9" * 11)), "octal"),
        (raw(header(size=b"-1\0")), "octal"),
        (raw(header(size=b"1_0\0")), "octal"),
        (raw(header(size=b"0x10\0")), "octal"),
        (raw(header(size=b"\xff" * 12)), "a size of -1 bytes"),
        (raw(header(size=b"\x80" + b"\xff" * 11)), "64 bits"),
        (raw(header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7)), "a file of"),
        (raw(header(uid=b"\xff" * 8)), "owner"),
        (raw(header(gid=b"\x80\0\0\0\xff\xff\xff\xff")), "owner"),
        (raw(header(mtime=b"\x80\0\0\0\x7f" + b"\xff" * 7)), "time"),
        (raw(header(kind=b"Q")), "kind"), (raw(header(kind=b"D")), "kind"), (raw(header(kind=b"M")), "kind"),
        (raw(header(kind=b"V")), "kind"), (raw(header(kind=b"X")), "kind"), (raw(header(kind=b"\xff")), "kind"),
        (raw(header(kind=b"x", size=1 << 30)), "PAX header of"),
        (raw(header(kind=b"L", size=1 << 30)), "long name of"),
        (raw(header(kind=b"x", size=3), b"abc", header()), "without a length"),
        (raw(header(kind=b"x", size=9), b"99 a=bcd\n", header()), "not of the form"),
        (raw(header(kind=b"x", size=6), b"6 abc\n", header()), "not of the form"),
        (raw(header(kind=b"x", size=6), b"6 a=bc", header()), "not of the form"),
        (raw(header(kind=b"x", size=6), b"6 =bc\n", header()), "not of the form"),
        (raw(header(kind=b"x", size=6), b"0 a=c\n", header()), "not of the form"),
        (raw(header(kind=b"x", size=14), b"99999999999999", header()), "without a length"),
        (raw(*pax(size="-1"), header()), "decimal"), (raw(*pax(size="9" * 30), header()), "decimal"),
        (raw(*pax(size="1e3"), header()), "decimal"), (raw(*pax(uid="x"), header()), "decimal"),
        (raw(*pax(uid=str(2**32 - 1)), header()), "owner"),
        (raw(*pax(mtime="yesterday"), header()), "seconds"), (raw(*pax(mtime="1.x"), header()), "seconds"),
        (raw(*pax(mtime="9" * 19), header()), "time"), (raw(*pax(mtime="nan"), header()), "seconds"),
        (raw(*pax_records([(f"SCHILY.xattr.user.{n}", b"") for n in range(129)]), header()), "extended attributes"),
        (raw(*pax_records([("SCHILY.xattr.user.a", bytes(200_000))]), header()), "extended attributes of"),
    ],
)  # fmt: skip
def test_refused(data: bytes, words: str) -> None:
    refused(data, words)


def test_limits() -> None:
    refused(raw(header(b"a"), header(b"b"), header(b"c")), "more than 2 entries", Limits(entries=2))
    refused(raw(header(size=11), bytes(11)), "a file of 11 bytes", Limits(file_bytes=10))
    data = raw(header(b"a", size=6), bytes(6), header(b"b", size=6), bytes(6))
    refused(data, "more than 11 bytes", Limits(total_bytes=11))
    assert len(read(data, limits=Limits(total_bytes=12))) == 2


SPARSE = [b"a" * 5000, None, b"b" * 9000, None, None, b"c"]
HOLE = 1 << 16


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_of_gnu_tar(tmp_path: Path, form: str) -> None:
    for number in (1, 30):  # 30: more pieces than a header holds
        path = tmp_path / f"sparse-{number}"
        with path.open("wb") as file:
            for _turn in range(number):
                for piece in SPARSE:
                    file.seek(HOLE, os.SEEK_CUR) if piece is None else file.write(piece)
            file.truncate(file.tell() + HOLE)
    options = ["--format=gnu"] if form == "gnu" else ["--format=pax", f"--sparse-version={form}"]
    command = [
        "tar",
        "-C",
        str(tmp_path),
        "--sparse",
        "--hole-detection=raw",
        *options,
        "-cf",
        "-",
        "sparse-1",
        "sparse-30",
    ]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    found = read(data, 5000)
    assert len(found) == 2
    for e, content in found:
        path = tmp_path / os.fsdecode(e.name)
        whole = bytearray(e.size)
        assert e.sparse is not None
        at = 0
        for start, length in e.sparse:
            whole[start : start + length] = content[at : at + length]
            at += length
        assert at == len(content) < e.size
        assert whole == path.read_bytes()


def old_sparse(*pairs: tuple[int, int], size: int, stored: int, more: bytes = b"\0") -> bytes:
    table = b"".join(b"%011o\0%011o\0" % pair for pair in pairs).ljust(96, b"\0")
    return header(b"s", kind=b"S", size=stored, magic=b"ustar  \0", tail=bytes(41) + table + more + b"%011o\0" % size)


@pytest.mark.parametrize(
    ("pairs", "size", "stored"),
    [
        ([(0, 10), (5, 5)], 100, 15), ([(50, 10), (0, 10)], 100, 20), ([(0, 101)], 100, 101), ([(0, 10)], 100, 20),
        ([(99, 2)], 100, 2), ([(0, 10)], 100, 0),
    ],
)  # fmt: skip
def test_impossible_sparse_maps(pairs: list[tuple[int, int]], size: int, stored: int) -> None:
    refused(raw(old_sparse(*pairs, size=size, stored=stored), bytes(stored)), "sparse map")
    text = ",".join(f"{start},{length}" for start, length in pairs)
    records = {"GNU__sparse__size": str(size), "GNU__sparse__map": text}
    refused(raw(*pax(**records), header(size=stored), bytes(stored)), "sparse map")


def test_sparse_records() -> None:
    major = {
        "GNU__sparse__major": "1",
        "GNU__sparse__minor": "0",
        "GNU__sparse__realsize": "100",
        "GNU__sparse__name": "real",
    }
    found, content = read(
        raw(*pax(**major), header(b"GNUSparseFile.0/x", size=515), b"1\n50\n3\n".ljust(512, b"\0") + b"abc")
    )[0]
    assert (found.name, found.size, found.sparse, content) == (b"real", 100, [(50, 3)], b"abc")
    refused(raw(*pax(**major), header(size=512), b"1\n50\n".ljust(512, b"\0")), "sparse map")
    refused(raw(*pax(**major), header(size=512), b"99999999\n".ljust(512, b"\0")), "pieces")
    refused(raw(*pax(**major), header(size=0)), "sparse map")
    refused(raw(*pax(**major), header(size=512), b"-1\n".ljust(512, b"\0")), "decimal")
    refused(raw(*pax(**{**major, "GNU__sparse__major": "2"}), header(size=512), bytes(512)), "unknown form")
    refused(raw(*pax(**{**major, "GNU__sparse__realsize": ""}), header(size=512), bytes(512)), "decimal")
    refused(raw(*pax_records([("GNU.sparse.numbytes", "1")]), header()), "take turns")
    many = Limits(sparse_parts=20)
    more = old_sparse((0, 1), (2, 1), (4, 1), (6, 1), size=1000, stored=4, more=b"\1")
    table = b"".join(b"%011o\0%011o\0" % (10 + 2 * n, 1) for n in range(21)).ljust(504, b"\0") + b"\1"
    refused(raw(more, table.ljust(512, b"\0"), table.ljust(512, b"\0"), b"xxxx"), "pieces", many)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_never_escape(data: st.DataObject) -> None:
    good = bytearray(tar(entry("a" * 200, b"x" * 700, xattrs={"user.a": "b"}), entry("b", b"y")))
    for _turn in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ImageError):
        read(bytes(good), data.draw(st.sampled_from([1, 512, 1 << 16])))
