"""Layers made to do harm: nothing outside the root is touched, nothing is used up, and the error names the entry."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import zstandard
from image.archives import describe, directory, entry, hard_link, header, pax_records, raw, symlink, tar

from csvfast.errors import ImageError
from csvfast.image import compression
from csvfast.image.compression import compression_of, decompress
from csvfast.image.limits import DEFAULT_LIMITS, Limits
from csvfast.image.unpack import RootDirectory, unpack_layer


class World:
    """A root, and beside it what must never change."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self.outside = directory / "outside"
        (self.outside / "inner").mkdir(parents=True)
        (self.outside / "secret").write_bytes(b"not the image's")
        os.utime(self.outside / "secret", (1, 1))
        self.before = describe(self.outside)

    def unpack(
        self, *layers: bytes, limits: Limits = DEFAULT_LIMITS, media_type: str = "none", **options: object
    ) -> None:
        with RootDirectory(self.root, limits=limits, **options) as root:  # type: ignore[arg-type]
            for layer in layers:
                unpack_layer(io.BytesIO(layer), root, limits, media_type=media_type)

    def refuses(self, words: str, *layers: bytes, **options: object) -> None:
        with pytest.raises(ImageError) as caught:
            self.unpack(*layers, **options)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
        self.unharmed()

    def unharmed(self) -> None:
        assert describe(self.outside) == self.before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside/secret", "a/../../outside/secret", "/../outside/secret", "..", "./..", "a/b/../../../x", "../root/x"],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_names_that_leave(world: World, name: str, kind: bytes) -> None:
    world.refuses("leaves the root", tar(entry("a/b/c"), entry(name, kind=kind, link="a/b/c")))


@pytest.mark.parametrize(
    "target", ["../outside", "/../../outside", "{outside}", "a/../../outside", "../../../../../../../../{outside}"]
)
@pytest.mark.parametrize("hop", [False, True])
def test_links_that_leave(world: World, target: str, hop: bool) -> None:
    """Links may say anything; what is written through them stays inside, as in a chroot."""
    target = target.format(outside=world.outside)
    items = [symlink("hop", target), symlink("way", "hop")] if hop else [symlink("way", target)]
    world.unpack(
        tar(
            directory("a/"),
            *items,
            entry("way/secret", b"attack"),
            entry("way/new", b"attack"),
            directory("way/", 0o777),
        )
    )
    world.unharmed()
    world.unpack(tar(*items, entry("way/.wh.secret"), entry("way/.wh..wh..opq"), entry(".wh.way")))
    world.unharmed()


def test_hard_links_that_leave(world: World) -> None:
    world.refuses("leaves the root", tar(hard_link("h", "../outside/secret")))
    world.refuses("is not there", tar(hard_link("h", str(world.outside / "secret"))))
    world.refuses("is not there", tar(symlink("way", str(world.outside)), hard_link("h", "way/secret")))
    world.refuses("is not there", tar(symlink("way", "../outside"), hard_link("h", "way/secret")))
    world.unpack(
        tar(symlink("s", str(world.outside / "secret")), hard_link("h", "s"), entry("h", b"attack", mode=0o777))
    )
    world.unharmed()
    assert (world.root / "h").read_bytes() == b"attack"


def test_hard_link_tricks(world: World) -> None:
    world.refuses("which is a directory", tar(directory("d/"), hard_link("h", "d")))
    world.refuses("which is not there", tar(hard_link("h", ".")))
    world.refuses("which is not there", tar(hard_link("h", "h")))
    world.refuses("to itself", tar(entry("f"), hard_link("f", "f")))
    world.refuses("to itself", tar(entry("g/f"), symlink("l", "g"), hard_link("l/f", "g/f")))
    world.refuses("holds its target", tar(entry("e/x/f"), hard_link("e", "e/x/f")))
    world.refuses("no name", raw(header(b"h", kind=b"1", link=b"")))


def test_a_directory_swapped_for_a_link(world: World) -> None:
    """The order that outwits programs that remember which directories they have checked."""
    outside = str(world.outside)
    layers = tar(
        directory("d/"), entry("d/first"), entry("d", b""), symlink("d", outside), entry("d/secret", b"attack")
    )
    world.unpack(
        layers,
        tar(
            directory("x/"),
            entry("x/y"),
            symlink("x", outside),
            entry("x/secret", b"attack"),
            hard_link("z", "x/secret"),
        ),
    )
    world.unharmed()
    assert (world.root / "d").is_symlink()


def test_a_race_for_directories(world: World) -> None:
    """Somebody in the tree swaps directories for links to the outside all the while: whatever fails, nothing gets out."""
    stop = threading.Event()

    def swap() -> None:
        link, place, aside = world.root / "link", world.root / "d", world.root / "aside"
        while not stop.is_set():
            for step in (
                lambda: link.symlink_to(world.outside), lambda: place.rename(aside), lambda: link.rename(place),
                lambda: place.unlink(), lambda: aside.rename(place),
            ):  # fmt: skip
                with suppress(OSError):
                    step()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        items = [entry("d/secret", b"attack"), entry("d/inner/x", b"attack"), entry("d/.wh.secret"), entry("d/.wh.inner")]
        layer = tar(directory("d/"), *items * 100)
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            with suppress(ImageError, OSError):
                world.unpack(tar(directory("d/")), layer, layer)
    finally:
        stop.set()
        thread.join()
    world.unharmed()


def test_whiteouts_that_leave(world: World) -> None:
    base = tar(symlink("l", str(world.outside)), symlink("up", "../outside"))
    world.unpack(
        base, tar(entry("l/.wh.secret"), entry("up/.wh.secret"), entry("l/.wh..wh..opq"), entry("up/.wh..wh..opq"))
    )
    world.unharmed()
    for name in (".wh.", ".wh..", ".wh...", "a/.wh."):
        world.refuses("whiteout", tar(entry(name)))
    world.refuses("below a whiteout", tar(entry(".wh.x/y")))
    world.refuses("leaves the root", tar(entry("../.wh.outside")))
    world.unpack(tar(entry("a/..wh.b"), entry("a/x.wh.y")))
    assert (world.root / "a/..wh.b").exists()


def test_special_files_on_the_way(world: World) -> None:
    world.refuses("no directory", tar(entry("p", kind=tarfile.FIFOTYPE), entry("p/x")))
    world.refuses("no directory", tar(entry("f"), directory("f/x/")))
    world.refuses("no directory", tar(entry("f"), hard_link("h", "f/x")))
    world.refuses("symbolic links", tar(symlink("a", "b"), symlink("b", "a"), entry("a/x")))
    world.refuses("symbolic links", tar(*(symlink(f"l{n}", f"l{n + 1}") for n in range(50)), entry("l0/x")))
    bomb = [symlink(f"l{n}", f"l{n + 1}/../l{n + 1}") for n in range(30)]
    world.refuses("symbolic links", tar(*bomb, directory("l30/"), entry("l0/x")))


def test_a_pipe_or_device_is_never_opened(world: World) -> None:
    world.unpack(
        tar(entry("p", kind=tarfile.FIFOTYPE), entry("p", kind=tarfile.FIFOTYPE, mode=0o600), entry("p", b"file"))
    )
    assert (world.root / "p").read_bytes() == b"file"
    with RootDirectory(world.root) as root:
        os.mkfifo(world.root / "passwd")
        assert root.read_file("passwd", 100) is None, "and it did not wait for a writer"


def test_device_nodes(world: World) -> None:
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        world.refuses("not allowed", tar(entry("dev", kind=kind, device=(1, 3))))
        world.refuses("whiteout to overlays", tar(entry("dev", kind=kind)), devices=True)
        world.refuses("Linux has", tar(entry("dev", kind=kind, device=(4096, 1))), devices=True)
    world.refuses("Linux has", raw(header(b"dev", kind=b"3", device=(1, 1 << 20))), devices=True)


def test_the_root_stays_a_directory(world: World) -> None:
    for name in ("./", "/", ".", "a/.."):
        world.refuses("the root would be", tar(entry(name, kind=tarfile.SYMTYPE, link=str(world.outside))))
        world.refuses("the root would be", tar(entry(name, kind=tarfile.FIFOTYPE)))
    world.unpack(tar(entry(".wh.root"), entry(".wh..wh..opq"), directory("/", 0o700)))
    assert world.root.stat().st_mode & 0o777 == 0o700


def test_names_that_are_none(world: World) -> None:
    world.refuses("no name", raw(header(b"")))
    world.refuses("NUL", raw(*pax_records([("path", b"a\0b")]), header()))
    world.refuses("NUL", raw(*pax_records([("linkpath", b"a\0b")]), header(kind=b"2")))
    world.refuses("target", raw(header(kind=b"2")))
    world.refuses("a part of 256 bytes", tar(entry("x" * 256)))
    world.refuses("the limit is 4095", tar(entry("x/" * 2100)))
    world.refuses("within each other", tar(entry("x/" * 200 + "f")))
    world.refuses("symbolic link", tar(symlink("l", "x" * 5000)))
    world.unpack(tar(entry("new\nline"), entry("\x1b[31mred")), raw(header(b"\xff\xfe")))
    assert os.fsencode(world.root) + b"/\xff\xfe" in [os.fsencode(path) for path in world.root.iterdir()]


def test_messages_are_one_printable_line(world: World) -> None:
    with pytest.raises(ImageError) as caught:
        world.unpack(tar(entry("../\x1b[2J\n\u202e" + "x" * 3000)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_depth_through_links(world: World) -> None:
    """Short names can lead deep: what counts is where they end."""
    items = [directory("d/" * 60), symlink("s", "d/" * 60)]
    world.refuses(
        "within each other",
        tar(*items, entry("s/" + "e/" * 60 + "f"), symlink("t", "s/" + "e/" * 60), entry("t/" + "g/" * 60 + "f")),
    )


def test_attributes_that_are_not_an_images(world: World) -> None:
    for name in ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque", "user.csvfast.size"):
        world.refuses("not an image's", tar(entry("f", xattrs={name: "y"})))
        world.refuses("not an image's", tar(directory("d/", xattrs={name: "y"})))


# Bombs


def bomb_gzip(size: int) -> bytes:
    machine = zlib.compressobj(9, wbits=31)
    piece = bytes(1 << 20)
    return b"".join(machine.compress(piece) for _turn in range(size >> 20)) + machine.flush()


@pytest.fixture(params=["zlib", "isal.isal_zlib"] if find_spec("isal") else ["zlib"])
def _inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module that may read gzip here."""
    monkeypatch.setattr(compression, "inflater", lambda: importlib.import_module(request.param))


@pytest.mark.usefixtures("_inflater")
@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("ahead", [False, True])
def test_bombs(kind: str, ahead: bool) -> None:
    data = bomb_gzip(64 << 20) if kind == "gzip" else zstandard.compress(bytes(64 << 20), 19)
    limits = Limits(ratio=100, ratio_floor=4 << 20)
    tracemalloc.start()
    try:
        with (
            pytest.raises(ImageError, match="times as many"),
            decompress(io.BytesIO(data), kind, limits, ahead=ahead) as layer,
        ):
            layer.finish()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert layer.size < 10 << 20
    small = Limits(total_bytes=8 << 20, ratio=1_000_000)
    with (
        pytest.raises(ImageError, match="after decompression"),
        decompress(io.BytesIO(data), kind, small, ahead=ahead) as layer,
    ):
        layer.finish()


def test_a_bomb_of_directories(world: World) -> None:
    """They need no entries of their own: one entry makes a hundred on its way."""
    names = (f"{number}/" + "d/" * 99 + "file" for number in range(20))
    world.refuses("more than 200 directories", tar(*(entry(name) for name in names)), limits=Limits(entries=200))
    assert sum(len(names) for _, names, _ in os.walk(world.root)) <= 200


def test_a_bomb_of_entries(world: World) -> None:
    layer = gzip.compress(tar(*(entry(f"{number}") for number in range(300))))
    world.refuses("more than 200 entries", layer, limits=Limits(entries=200), media_type="gzip")


def test_a_bomb_of_holes(world: World) -> None:
    records = [("GNU.sparse.size", str(1 << 40)), ("GNU.sparse.map", "0,1")]
    world.refuses("a file of 1099511627776", raw(*pax_records(records), header(b"s", size=1), b"x"))


def test_a_window_of_a_gigabyte() -> None:
    machine = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    ).compressobj()
    data = machine.compress(bytes(100)) + machine.flush()
    with pytest.raises(ImageError, match="window"), decompress(io.BytesIO(data), "zstd") as layer:
        layer.finish()


@pytest.mark.usefixtures("_inflater")
@pytest.mark.parametrize("ahead", [False, True])
def test_damaged_compression(ahead: bool) -> None:
    good = gzip.compress(os.urandom(200_000))
    broken = {
        "cut": good[:-1], "cut in the middle": good[: len(good) // 2], "junk behind": good + b"junk", "no gzip": b"x" * 100,
        "check sum": good[:-8] + bytes(4) + good[-4:], "length": good[:-4] + bytes(4),
        "zeros, then more": good + bytes(600) + b"x", "only the header": good[:10],
    }  # fmt: skip
    for name, data in broken.items():
        with decompress(io.BytesIO(data), "gzip", ahead=ahead) as layer:
            try:
                layer.finish()
            except ImageError:
                continue
            pytest.fail(name)
    with pytest.raises(ImageError), decompress(io.BytesIO(b"x" * 100), "zstd", ahead=ahead) as layer:
        layer.finish()


@pytest.mark.usefixtures("_inflater")
def test_members_and_padding() -> None:
    members = b"".join(gzip.compress(bytes([number]) * 1000) for number in range(200))
    for data in (members, members + bytes(10_000), members + bytes(200_000)):
        with decompress(io.BytesIO(data), "gzip", ahead=False) as layer:
            layer.finish()
        assert layer.size == 200_000
    with decompress(io.BytesIO(b""), "gzip", ahead=False) as layer:
        layer.finish()
    assert layer.size == 0


def test_media_types() -> None:
    layer = "application/vnd.oci.image.layer.v1.tar"
    assert [compression_of(layer + end) for end in ("", "+gzip", "+zstd", "+gzip+encrypted")] == [
        "none",
        "gzip",
        "zstd",
        "gzip",
    ]
    assert compression_of("application/vnd.docker.image.rootfs.diff.tar.gzip") == "gzip"
    for bad in ("", "text/plain", layer + "+xz", layer + "+gzip+gzip", "application/vnd.wasm.content.layer.v1+wasm"):
        with pytest.raises(ImageError, match="media type"):
            compression_of(bad)


def test_a_reader_that_fails_ends_the_thread() -> None:
    class FailingReader:
        def read(self, size: int) -> bytes:
            raise OSError(5, "gone")

    with pytest.raises(OSError, match="gone"), decompress(FailingReader(), "gzip", ahead=True) as layer:
        layer.next_chunk()
    with decompress(io.BytesIO(bomb_gzip(16 << 20)), "gzip", ahead=True) as layer:
        layer.next_chunk()  # closed long before its end


@pytest.mark.skipif(os.geteuid() != 0, reason="the system does not let this user mount a file system")
def test_other_file_systems_are_not_entered(world: World) -> None:
    script = f"""
mount -t tmpfs none {world.root} && mkdir {world.root}/proc && mount -t proc none {world.root}/proc && exec "$@"
"""
    program = (
        "import io, sys; from image.archives import *; from csvfast.image.unpack import *\n"
        f"with RootDirectory({str(world.root)!r}) as root: unpack_layer(io.BytesIO(tar(entry('proc/self/x'))), root)\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("the system does not let this user mount a file system")
    assert "another file system is mounted there" in done.stderr
