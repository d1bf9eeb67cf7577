"""Layers on a tree: what image-spec says of whiteouts, replaced entries, links and attributes; content stores."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from pathlib import Path

import pytest
from image.archives import describe, digest, directory, entry, hard_link, header, pax, raw, symlink, tar

from csvfast.errors import ImageError
from csvfast.image.limits import Budget, Limits
from csvfast.image.unpack import RootDirectory, clean_name, unpack_layer


def unpack(place: Path, *layers: bytes, **options: object) -> Path:
    place.mkdir(exist_ok=True)
    with RootDirectory(place, **options) as root:  # type: ignore[arg-type]
        for layer in layers:
            assert unpack_layer(io.BytesIO(layer), root).diff_id == digest(layer)
    return place


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "root"


def test_attributes_and_contents(place: Path) -> None:
    unpack(
        place,
        tar(
            directory("d/", 0o2750, mtime=1.5),
            entry("d/f", b"content", mode=0o4711, mtime=2.25),
            symlink("l", "d/f", mtime=3),
        ),
    )
    status = (place / "d/f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns, status.st_atime_ns) == (
        0o4711,
        2_250_000_000,
        2_250_000_000,
    )
    status = (place / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o2750, 1_500_000_000)
    assert (place / "l").lstat().st_mtime == 3
    assert (place / "l").read_bytes() == b"content"
    status = place.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o755, 0)


def test_the_mode_does_not_depend_on_the_umask(place: Path) -> None:
    before = os.umask(0o077)
    try:
        unpack(place, tar(entry("f", mode=0o666), directory("d/", 0o777), entry("i/f")))
    finally:
        os.umask(before)
    assert [stat.S_IMODE((place / name).stat().st_mode) for name in ("f", "d", "i")] == [0o666, 0o777, 0o755]


def test_whiteouts(place: Path) -> None:
    base = tar(entry("a/x", b"1"), entry("a/y", b"2"), entry("b/deep/z", b"3"), entry("c", b"4"))
    second = tar(entry("a/.wh.x"), entry(".wh.b"), entry("d/.wh.c"), entry(".wh.nothing"), entry("nowhere/.wh.x"))
    unpack(place, base, second)
    assert names(place) == ["a", "a/y", "c"]


def test_a_whiteout_is_no_file_and_makes_no_directory(place: Path) -> None:
    unpack(place, tar(entry(".wh.a"), entry("x/.wh.b"), entry("y/.wh..wh..opq"), entry(".wh..wh.plnk", b"notes")))
    assert names(place) == []


@pytest.mark.parametrize("order", [1, -1])
def test_whiteouts_spare_their_own_layer(place: Path, order: int) -> None:
    base = tar(
        entry("d/old", b"o"), entry("f", b"o"), entry("g/old", b"o"), entry("h/i/old", b"o"), entry("h/old", b"o")
    )
    items = [entry("d/new", b"n"), entry(".wh.d"), entry("f", b"n"), entry(".wh.f"), directory("g/"), entry(".wh.g"),
             entry("h/i/new", b"n"), entry("h/.wh..wh..opq")]  # fmt: skip
    unpack(place, base, tar(*items[::order]))
    assert names(place) == ["d", "d/new", "f", "g", "h", "h/i", "h/i/new"]
    assert (place / "f").read_bytes() == b"n"


def test_opaque_applies_to_lower_layers_only(place: Path) -> None:
    base = tar(entry("d/1"), directory("d/2/"), entry("d/2/3"), symlink("d/4", "/"), entry("e/5"))
    unpack(place, base, tar(entry("d/6"), entry("d/.wh..wh..opq"), entry("d/7")), tar(entry("e/8"), entry("d/.wh.6")))
    assert names(place) == ["d", "d/7", "e", "e/5", "e/8"]


def test_replaced_entries(place: Path) -> None:
    base = tar(
        directory("d/"),
        entry("d/inner"),
        entry("f", b"file"),
        symlink("l", "f"),
        directory("e/", 0o700),
        entry("e/kept"),
    )
    second = tar(
        entry("d", b"now a file"),
        directory("f/"),
        entry("f/inner"),
        entry("l", b"not through the link"),
        directory("e/", 0o750),
    )
    unpack(place, base, second)
    assert names(place) == ["d", "e", "e/kept", "f", "f/inner", "l"]
    assert (place / "l").read_bytes() == b"not through the link"
    assert stat.S_IMODE((place / "e").stat().st_mode) == 0o750


def test_the_last_of_several_counts(place: Path) -> None:
    layer = tar(
        entry("a", b"1"),
        entry("a", b"2"),
        directory("a/"),
        entry("a/b"),
        symlink("a", "c"),
        entry("./a", b"3"),
        entry("/x//y/./z"),
    )
    unpack(place, layer)
    assert names(place) == ["a", "x", "x/y", "x/y/z"]
    assert (place / "a").read_bytes() == b"3"


def test_a_replaced_name_leaves_other_hard_links(place: Path) -> None:
    unpack(
        place,
        tar(entry("a", b"old"), hard_link("b", "a"), hard_link("/c", "./b")),
        tar(entry("a", b"new"), hard_link("d", "c")),
    )
    assert [(place / name).read_bytes() for name in "abcd"] == [b"new", b"old", b"old", b"old"]
    assert (place / "b").stat().st_nlink == 3


def test_hard_links_to_links(place: Path) -> None:
    unpack(place, tar(symlink("s", "/etc/hostname"), hard_link("h", "s")))
    assert (place / "h").readlink() == Path("/etc/hostname")
    assert (place / "h").lstat().st_ino == (place / "s").lstat().st_ino


def test_through_links_within_the_tree(place: Path) -> None:
    links = [symlink("lib", "usr/lib"), symlink("usr/up", "../../../usr"), symlink("abs", "/usr/lib")]
    second = tar(entry("lib/a"), entry("abs/b"), entry("usr/up/lib/c"), hard_link("lib/d", "abs/a"))
    unpack(place, tar(directory("usr/"), directory("usr/lib/"), *links), second, tar(entry("lib/.wh.b")))
    assert names(place) == ["abs", "lib", "usr", "usr/lib", "usr/lib/a", "usr/lib/c", "usr/lib/d", "usr/up"]
    assert (place / "lib").is_symlink()


def test_a_link_replaced_meanwhile_changes_the_way(place: Path) -> None:
    unpack(
        place,
        tar(
            directory("a/"),
            directory("b/"),
            symlink("l", "a"),
            entry("l/1"),
            symlink("l", "b"),
            entry("l/2"),
            entry("l/1"),
        ),
    )
    assert names(place) == ["a", "a/1", "b", "b/1", "b/2", "l"]


def test_times_of_directories_survive_later_layers(place: Path) -> None:
    unpack(
        place,
        tar(directory("d/", mtime=5), directory("d/e/", mtime=6)),
        tar(entry("d/e/f"), entry("d/.wh.x")),
        tar(entry("d/.wh.e")),
    )
    assert (place / "d").stat().st_mtime == 5


def test_a_tree_that_was_there(place: Path) -> None:
    """Modes that keep its owner out, and times, are as before."""
    unpack(place, tar(directory("d/", 0o511, mtime=5), entry("d/f", b"1"), directory("e/", mtime=6)))
    unpack(place, tar(entry("d/g"), entry(".wh.e")))
    assert names(place) == ["d", "d/f", "d/g"]
    assert (stat.S_IMODE((place / "d").stat().st_mode), (place / "d").stat().st_mtime) == (0o511, 5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(os.geteuid() != 0, reason="the test before did it as an ordinary user")
def test_a_tree_that_was_there_as_an_ordinary_user() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Path(folder) / "root"
        place.mkdir()
        os.chown(place, 65534, 65534)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                test_a_tree_that_was_there(place)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (place / "d").stat().st_uid == 65534


def test_attributes_are_replaced(place: Path) -> None:
    unpack(
        place,
        tar(directory("d/", xattrs={"user.a": "1"}), entry("f", xattrs={"user.b": "2", "security.selinux": "no"})),
    )
    if "user.a" not in os.listxattr(place / "d"):
        pytest.skip("the file system has no extended attributes")
    assert os.getxattr(place / "f", "user.b") == b"2"
    assert "security.selinux" not in os.listxattr(place / "f")
    unpack(place, tar(directory("d/", xattrs={"user.c": "3"})))
    assert os.listxattr(place / "d") == ["user.c"]


def test_sparse_files(place: Path) -> None:
    records = {
        "GNU__sparse__major": "1",
        "GNU__sparse__minor": "0",
        "GNU__sparse__realsize": str(1 << 26),
        "GNU__sparse__name": "real",
    }
    layer = raw(*pax(**records), header(size=515), b"1\n33554432\n3\n".ljust(512, b"\0") + b"abc")
    unpack(place, layer)
    status = (place / "real").stat()
    assert status.st_size == 1 << 26
    assert status.st_blocks * 512 < 1 << 20
    assert (place / "real").read_bytes()[1 << 25 :][:4] == b"abc\0"


class Store:
    """Keeps every byte with its bits turned over."""

    def __init__(self) -> None:
        self.files: list[bytes] = []

    def create(self, parent_fd: int, name: bytes, mode: int) -> _Writer:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=parent_fd)
        self.files.append(name)
        return _Writer(descriptor)


class _Writer:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, data: bytes | memoryview) -> None:
        os.write(self.descriptor, bytes(byte ^ 0xFF for byte in data))

    def close(self) -> None:
        os.close(self.descriptor)


def test_a_content_store_keeps_contents_and_only_these(place: Path) -> None:
    store = Store()
    records = {"GNU__sparse__size": "9", "GNU__sparse__map": "2,1,5,2"}
    sparse = raw(*pax(**records), header(b"s", size=3), b"abc")
    layer = tar(
        entry("d/f", b"secret", mode=0o4755, mtime=7, uid=0), hard_link("d/h", "d/f"), symlink("l", "d/f"), entry("e")
    )
    unpack(place, layer, sparse, tar(entry("d/f", b"second")), content=store)
    assert store.files == [b"f", b"e", b"s", b"f"]
    plain = {name: bytes(byte ^ 0xFF for byte in (place / name).read_bytes()) for name in ("d/f", "d/h", "e", "s")}
    assert plain == {"d/f": b"second", "d/h": b"secret", "e": b"", "s": b"\0\0a\0\0bc\0\0"}
    status = (place / "d/h").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o4755, 7)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (b"a", b"a"),
        (b"./a/", b"a"),
        (b"/a//b", b"a/b"),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"a/./../b", b"b"),
        (b"a/..", b""),
    ],
)
def test_clean_names(name: bytes, clean: bytes) -> None:
    assert clean_name(name) == clean


def test_diff_id(place: Path) -> None:
    place.mkdir()
    root = RootDirectory(place)
    with pytest.raises(ImageError, match="digest"):
        unpack_layer(io.BytesIO(tar(entry("a"))), root, diff_id="sha256:" + "0" * 64)
    root.close()


def test_one_budget_for_several_layers(place: Path) -> None:
    place.mkdir()
    budget = Budget(Limits(entries=3))
    with RootDirectory(place) as root:
        unpack_layer(io.BytesIO(tar(entry("a"), entry("b"))), root, budget)
        with pytest.raises(ImageError, match="more than 3 entries"):
            unpack_layer(io.BytesIO(tar(entry("a"), entry("b"))), root, budget)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_directories_with_few_descriptors(place: Path) -> None:
    """More directories than descriptors are kept, met again in another order."""
    paths = [f"{a}/{b}/{c}" for a in range(8) for b in range(8) for c in range(8)]
    layer = tar(*(entry(f"{path}/1") for path in paths), *(entry(f"{path}/2") for path in reversed(paths)))
    before = open_descriptors()
    place.mkdir()
    with RootDirectory(place, limits=Limits(depth=8)) as root:
        unpack_layer(io.BytesIO(layer), root)
        assert open_descriptors() - before < 50
    assert open_descriptors() == before
    assert len(names(place)) == 8 + 64 + 512 + 1024


def test_progress_can_end_the_work(place: Path) -> None:
    class EnoughError(Exception):
        pass

    def progress(count: int) -> None:
        if count > 100_000:
            raise EnoughError

    place.mkdir()
    layer = tar(*(entry(f"f{number}", b"x" * 50_000) for number in range(50)))
    with pytest.raises(EnoughError), RootDirectory(place) as root:
        unpack_layer(io.BytesIO(layer), root, progress=progress)
    assert len(describe(place)) < 50
