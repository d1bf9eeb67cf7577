"""umoci as the oracle of unpacking: the same tree, attribute by attribute; runc runs what we made of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from image.archives import describe, directory, entry, hard_link, symlink, tar, write_layout

from csvfast.image.assemble import assemble_image
from csvfast.image.layout import OciLayout

UMOCI = shutil.which("umoci")
pytestmark = pytest.mark.skipif(UMOCI is None, reason="umoci is not installed")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root sets owners")
NOBODY = 65534
SKIP = ("security.selinux", "user.rootlesscontainers")

BASE = [
    directory("./", 0o755, mtime=1_500_000_000.25),
    directory("etc/", mtime=1_400_000_000),
    entry("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n", mtime=1_400_000_001.5),
    entry("etc/shadow", b"root:*:1::::::\n", mode=0o600, gid=42),
    directory("usr/", mtime=1_300_000_000), directory("usr/bin/"),
    entry("usr/bin/set-user-id", b"\x7fELF", mode=0o4755), entry("usr/bin/set-group-id", b"\x7fELF", mode=0o2755, gid=43),
    symlink("bin", "usr/bin", mtime=1_234_567_890),
    symlink("usr/bin/absolute", "/etc/passwd"), symlink("dangling", "nowhere/at/all"),
    hard_link("usr/bin/set-user-id-2", "usr/bin/set-user-id"),
    directory("tmp/", 0o1777), directory("home/", uid=0), directory("home/ann/", 0o700, uid=1000, gid=1000),
    entry("home/ann/notes", b"n" * 5000, uid=1000, gid=1000, mode=0o640, xattrs={"user.comment": "a value"}),
    directory("var/"), directory("var/cache/", 0o711, mtime=1_200_000_000), entry("var/cache/a", b"a"),
    entry("var/cache/b", b"b"),
    directory("var/lib/"), directory("var/lib/keep/"), entry("var/lib/keep/x", b"x"), entry("var/lib/gone", b"gone"),
    directory("opt/", 0o755), directory("opt/tree/"), directory("opt/tree/deep/"), entry("opt/tree/deep/file", b"deep"),
    directory("read-only/", 0o555, mtime=1_111_111_111), entry("read-only/file", b"r", mode=0o444),
    entry("implicit/parent/file", b"no directory entries"),
    entry("pipe", kind=tarfile.FIFOTYPE, mode=0o620), entry("empty", b"", mode=0), entry("name with blanks and \u00e9", b"x"),
    entry("x" * 120 + "/" + "y" * 140, b"long"), entry("replaced-by-directory", b"file"), directory("replaced-by-file/"),
    entry("replaced-by-file/inner", b"i"), entry("linked-1", b"linked"), hard_link("linked-2", "linked-1"),
]  # fmt: skip
SECOND = [
    entry("etc/.wh.shadow"), entry("var/lib/.wh.gone"),
    entry("var/cache/c", b"c"), entry("var/cache/.wh..wh..opq"), entry("var/cache/d", b"d"),
    entry("opt/tree/new", b"new"), entry("opt/.wh.tree"),
    entry("bin/through-the-link", b"lands in usr/bin", mode=0o755),
    entry("read-only/second", b"s"),
    directory("replaced-by-directory/", 0o750, uid=7), entry("replaced-by-directory/inner", b"now"),
    entry("replaced-by-file", b"now a file"), entry("linked-1", b"no longer linked"),
    directory("home/ann/", 0o750, uid=1000, gid=1001, mtime=1_700_000_000), hard_link("home/ann/notes-2", "home/ann/notes"),
    symlink("usr/bin/absolute", "../../etc/passwd", uid=5, gid=6), entry(".wh.nothing-of-that-name"),
    entry("late", b"first"), entry("late", b"the last one counts"), entry("etc/.wh..wh.plnk"),
    entry("usr/bin/set-user-id", b"replaced", mode=0o6711, uid=3, gid=4),
]  # fmt: skip


def umoci(layout: Path, bundle: Path, *options: str, **keywords: Any) -> Path:
    done = subprocess.run(
        [str(UMOCI), "unpack", *options, "--image", f"{layout}:one", str(bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        **keywords,
    )
    assert done.returncode == 0, done.stderr
    return bundle / "rootfs"


def ours(layout: Path, destination: Path, **options: Any) -> Path:
    source = OciLayout(layout)
    try:
        return assemble_image(source, "one", destination, **options).rootfs
    finally:
        source.close()


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(found) == sorted(expected)
    different = [f"{name}: {found[name]} {expected[name]}" for name in found if found[name] != expected[name]]
    assert not different, "\n".join(different)


# umoci leaves the time of day on directories that no archive tells of, on what they were made in, and on what a whiteout empties.
# Ours have the archive's times, or the epoch.
UNTOLD = (".", "./implicit", "./implicit/parent", "./" + "x" * 120, "./opt/tree")


def without_untold(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:2] + value[3:] if name in UNTOLD else value for name, value in tree.items()}


@root_only
@pytest.mark.parametrize("compress", [True, False])
def test_the_same_tree_as_umoci(tmp_path: Path, compress: bool) -> None:
    security = {
        "trusted.note": "t",
        "security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    }
    device = entry("dev-null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666)
    block = entry("dev-loop", kind=tarfile.BLKTYPE, device=(7, 0), mode=0o660, gid=6)
    base = [*BASE, entry("usr/bin/capable", b"c", mode=0o755, xattrs=security), device, block]
    layout = write_layout(tmp_path / "layout", [tar(*base), tar(*SECOND)], compress=compress)
    expected = describe(umoci(layout, tmp_path / "theirs"), skip=SKIP)
    found = describe(ours(layout, tmp_path / "ours", devices=True), skip=SKIP)
    assert "security.capability" in found["./usr/bin/capable"][5]
    compare(without_untold(found), without_untold(expected))


@root_only
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_older_forms(tmp_path: Path, form: int) -> None:
    base = [(copy(info), content) for info, content in BASE if form == tarfile.GNU_FORMAT or len(info.name) < 200]
    for info, _content in base:
        info.mtime, info.pax_headers = int(info.mtime), {}
    layout = write_layout(tmp_path / "layout", [tar(*base, format=form), tar(*SECOND, format=form)])
    compare(
        without_untold(describe(ours(layout, tmp_path / "ours"), skip=SKIP)),
        without_untold(describe(umoci(layout, tmp_path / "theirs"), skip=SKIP)),
    )


@root_only
def test_times_of_directories(tmp_path: Path) -> None:
    base = [
        directory("./", mtime=1_500_000_000),
        directory("a/", mtime=1_400_000_000),
        directory("a/b/", mtime=1_300_000_000),
    ]
    second = [
        entry("a/b/file", b"x"),
        entry("a/file", b"x"),
        directory("a/c/", mtime=1_200_000_000),
        entry("a/.wh.nothing"),
    ]
    third = [entry("a/.wh.file"), directory("./", 0o711, mtime=1_100_000_000)]
    layout = write_layout(tmp_path / "layout", [tar(*base), tar(*second), tar(*third)])
    compare(describe(ours(layout, tmp_path / "ours")), describe(umoci(layout, tmp_path / "theirs")))


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody can reach, with one in it that belongs to nobody."""
    with tempfile.TemporaryDirectory(prefix="csvfast-test-") as name:
        place = Path(name)
        os.chmod(place, 0o755)
        (place / "nobody").mkdir()
        os.chown(place / "nobody", NOBODY, NOBODY)
        yield place
        subprocess.run(["rm", "-rf", str(place / "nobody")], check=True)


AS_NOBODY = f"""
import os, sys
from pathlib import Path
from csvfast.image.assemble import assemble_image
from csvfast.image.layout import OciLayout
layout, first, second = sys.argv[1:]
assemble_image(OciLayout(layout), "one", Path(first))  # as root: everything has been imported then, from wherever it is
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
assemble_image(OciLayout(layout), "one", Path(second))
"""


@root_only
def test_an_ordinary_user(open_place: Path, tmp_path: Path) -> None:
    """Both programs as nobody: everything belongs to the caller; closed and read-only directories are no obstacle."""
    closed = [directory("closed/", 0o000), entry("closed/file", b"c", mode=0o000), directory("closed/inner/", 0o500)]
    base = [*BASE, *closed]
    layout = write_layout(open_place / "layout", [tar(*base), tar(*SECOND, entry("closed/inner/second", b"2"))])
    nobody = open_place / "nobody"
    expected = describe(
        umoci(layout, nobody / "theirs", "--rootless", user=NOBODY, group=NOBODY, extra_groups=[]), skip=SKIP
    )
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, layout, tmp_path / "root", nobody / "ours"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = describe(nobody / "ours", skip=SKIP)
    assert {value[1] for value in found.values()} == {(NOBODY, NOBODY)}
    compare(without_untold(found), without_untold(expected))
