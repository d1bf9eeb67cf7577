"""Fuzz targets of unpacking: layers, for real and beside something that must not change; image configurations; users."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path

from image.archives import config_of, directory, entry, hard_link, header, pax_records, raw, symlink, tar

from csvfast.errors import ImageError
from csvfast.image.bundle import runtime_specification
from csvfast.image.image_config import ImageConfiguration
from csvfast.image.limits import Limits
from csvfast.image.unpack import RootDirectory, unpack_layer
from csvfast.image.users import User, lookup_user
from fuzz.target import Target

__all__ = ["ConfigurationTarget", "LayerTarget", "UsersTarget"]

_LIMITS = Limits(total_bytes=1 << 20, file_bytes=1 << 20, entries=200, depth=20, header_bytes=1 << 14, ratio_floor=1 << 18)


def kind_of(error: ImageError) -> str:
    """An error's words without names and numbers."""
    return re.sub(r"\d+|'.*?'|\(.*|[^ a-z].*", "", error.problem[:80])


def with_check_sums(data: bytes) -> bytes:
    """Headers with right check sums: otherwise that is where nearly every changed archive ends."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


class LayerTarget(Target):
    """A layer, plain or gzip: unpacked on top of a small tree. Nothing beside the tree changes, and no descriptor stays open."""

    learn_max = 1 << 14

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is a tmpfs: thousands of trees are made.
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.world = Path(tempfile.mkdtemp(prefix="csvfast-fuzz-", dir=place))
        weakref.finalize(self, shutil.rmtree, self.world, ignore_errors=True)
        (self.world / "outside").mkdir()
        (self.world / "outside/file").write_bytes(b"outside")
        self.before = self.look()
        links = [symlink("out", "../outside"), symlink("up", "/../.."), symlink("in", "d")]
        self.base = tar(directory("d/"), entry("d/f", b"x"), *links)
        sparse = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "90"), ("GNU.sparse.name", "s")]
        archives = [
            tar(entry("out/file", b"attack"), entry("up/outside/file", b"attack"), entry("in/f", b"y", mode=0o4755)),
            tar(entry("d/.wh.f"), entry("out/.wh.file"), entry("up/.wh..wh..opq"), entry(".wh.d")),
            tar(hard_link("h", "d/f"), hard_link("d/h", "out/file"), entry("h", b"z"), directory("d/", 0o000)),
            tar(entry("a/" * 60 + "n" * 120, b"long", xattrs={"user.a": "b"}), format=tarfile.PAX_FORMAT),
            tar(entry("a/" * 60 + "n" * 120, b"long"), symlink("l", "t" * 150), format=tarfile.GNU_FORMAT),
            raw(*pax_records(sparse), header(size=515), b"1\n50\n3\n".ljust(512, b"\0") + b"abc"),
            raw(*pax_records([("GNU.sparse.size", "9"), ("GNU.sparse.map", "2,1,5,2")]), header(b"s", size=3), b"abc"),
            raw(header(b"d", kind=b"2", link=b"/"), header(b"d/x", size=1), b"x", header(b"p", kind=b"6"), header(b"p/x")),
            raw(header(b"../x"), end=False), raw(header(b"c", kind=b"3", device=(1, 3))),
            raw(header(b"b", uid=b"\x80\0\0\0\0\0\0\x07", mtime=b"\xff" * 12, magic=b"ustar  \0")),
        ]  # fmt: skip
        self.seeds = [*archives, *(gzip.compress(one, mtime=0) for one in archives[:4])]

    def look(self) -> tuple[Hashable, ...]:
        status = (self.world / "outside/file").lstat()
        return (
            tuple(sorted(path.name for path in self.world.iterdir() if path.name != "root")),
            (self.world / "outside/file").read_bytes(), status.st_nlink, status.st_mode, status.st_mtime_ns,
        )  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        root = self.world / "root"
        root.mkdir()
        try:
            media_type = "gzip" if data[:2] == b"\x1f\x8b" else "none"
            with RootDirectory(root, limits=_LIMITS) as opened:
                unpack_layer(io.BytesIO(self.base), opened, _LIMITS, ahead=False)
                layer = data if media_type == "gzip" else with_check_sums(data)
                result = unpack_layer(io.BytesIO(layer), opened, _LIMITS, media_type=media_type, ahead=False)
            return "unpacked", min(result.entries, 4), min(result.size >> 10, 4)
        except ImageError as error:
            return kind_of(error)
        finally:
            shutil.rmtree(root)
            assert self.look() == self.before


class ConfigurationTarget(Target):
    """Image configurations, and what a runtime is told of them."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [
            config_of([b"a"], Cmd=["/bin/sh", "-c", "x"], Env=["A=1", "PATH=/bin"], User="ann:disk", WorkingDir="/srv"),
            config_of([b"a"], Entrypoint=["/e"], Volumes={"/data": {}}, ExposedPorts={"80/tcp": {}}, Labels={"a": "b"}),
            config_of([]), b"{}", b'{"rootfs":{"type":"layers","diff_ids":[]},"config":null}',
        ]  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        try:
            config = ImageConfiguration.parse(data)
        except ImageError as error:
            return kind_of(error)
        made = runtime_specification(config, User())
        assert made["process"]["args"]
        assert all("\0" not in one for one in made["process"]["env"] + made["process"]["args"])
        return len(made["mounts"]), len(made["process"]["args"]), len(config.diff_ids)


class UsersTarget(Target):
    """A first line with a user, then a passwd file, a line of dashes, and a group file."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        files = b"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:\n---\nroot:x:0:\ndisk:x:6:root,ann\naudio:x:29:ann\n"
        self.seeds = [user + b"\n" + files for user in (b"", b"root", b"ann", b"ann:disk", b"1000:29", b"4242", b":", b"bob")]

    def handle(self, data: bytes) -> Hashable:
        name, _, rest = data.partition(b"\n")
        passwd, _, group = rest.partition(b"---\n")
        try:
            files = {"etc/passwd": passwd, "etc/group": group}
            found = lookup_user(name.decode("utf-8", "replace"), lambda path, _limit: files[path])
        except ImageError as error:
            return kind_of(error)
        assert 0 <= found.uid < 0xFFFF_FFFF
        assert 0 <= found.gid < 0xFFFF_FFFF
        assert len(set(found.groups)) == len(found.groups)
        return found.uid == 0, len(found.groups), bool(found.home)
