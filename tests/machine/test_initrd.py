"""The initrd builder: the archive's bytes, what goes in, the same bytes from the same inputs, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import marshal
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import ArgumentError, FormatError
from csvfast.machine.initrd import InitrdBuilder, boot_files, build_initrd
from csvfast.machine.initrd_cpio import CpioArchive
from csvfast.machine.initrd_elf import is_elf, libraries, stripped
from csvfast.machine.initrd_modules import load_order
from csvfast.machine.initrd_python import compiled, library_files, package_files

ROOT = Path(__file__).parents[2]
BUSYBOX = boot_files() / "busybox"

with_busybox = pytest.mark.skipif(not BUSYBOX.is_file(), reason="no guest files: run tools/install-test-tools.sh")


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes, dict[str, int]]]:
    """An independent reader, from the kernel's description of the format."""
    names = [
        "inode", "mode", "uid", "gid", "links", "time", "size", "major", "minor", "node_major", "node_minor",
        "name_size", "check",
    ]  # fmt: skip
    found: dict[str, tuple[int, bytes, dict[str, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = {name: int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n, name in enumerate(names)}
        start = at + 110
        raw = archive[start : start + fields["name_size"]]
        assert raw[-1] == 0
        body = start + fields["name_size"]
        body += -body % 4
        data = archive[body : body + fields["size"]]
        at = body + fields["size"]
        at += -at % 4
        if raw[:-1] == b"TRAILER!!!":
            assert not any(archive[at:])
            return found
        assert raw[:-1].decode() not in found
        found[raw[:-1].decode()] = (fields["mode"], data, fields)


def test_known_archive() -> None:
    """Compared byte for byte with `cpio -o -H newc` of the same content, but for inode numbers and times."""
    archive = CpioArchive()
    archive.file("/a/file", b"abc", 0o644)
    head = b"070701" + b"%08x" * 13
    folder = head % (1, 0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0) + b"a\0"
    file = head % (2, 0o100644, 0, 0, 1, 0, 3, 0, 0, 0, 0, 7, 0) + b"a/file\0" + b"\0\0\0" + b"abc\0"
    trailer = head % (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0) + b"TRAILER!!!\0" + b"\0\0\0"
    assert archive.encode() == (folder + file + trailer).ljust(512, b"\0")


NAMES = st.lists(st.text("abc.-é", min_size=1, max_size=4).filter(lambda s: s not in (".", "..")), min_size=1, max_size=3)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=8), st.randoms())
def test_order_of_adding_does_not_matter(items: list[tuple[list[str], bytes]], random: object) -> None:
    content = {"/" + "/".join(parts): data for parts, data in items}
    names = [name for name in content if not any(other.startswith(name + "/") for other in content)]
    first, second = CpioArchive(), CpioArchive()
    for name in names:
        first.file(name, content[name])
    random.shuffle(names)  # type: ignore[attr-defined]
    for name in names:
        second.file(name, content[name])
    assert first.encode() == second.encode()
    entries = unpacked(first.encode())
    assert {name: data for name, (mode, data, _) in entries.items() if stat.S_ISREG(mode)} == {
        name[1:]: content[name] for name in names
    }
    seen: set[str] = set()
    for number, (name, (_, _, fields)) in enumerate(entries.items(), 1):
        assert (fields["inode"], fields["time"], fields["uid"], fields["gid"]) == (number, 0, 0, 0)
        assert "/" not in name or name.rpartition("/")[0] in seen, "folders come before what lies in them"
        seen.add(name)


@pytest.mark.parametrize("path", ["", "/", "../a", "/../a", "a/../b", "a//b", "./a", "a/", "a\0b", "TRAILER!!!"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(ArgumentError):
        CpioArchive().file(path, b"")


def test_one_name_one_entry() -> None:
    archive = CpioArchive()
    archive.file("/a", b"1")
    archive.file("/a", b"1")
    for attempt in (lambda: archive.file("/a", b"2"), lambda: archive.folder("/a"), lambda: archive.link("/a", "b"),
                    lambda: archive.file("/a/b", b"")):  # fmt: skip
        with pytest.raises(ArgumentError):
            attempt()
    assert len(archive) == 1


# ---- Programs


def test_stripped_program_still_runs(tmp_path: Path) -> None:
    source = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    whole = source.read_bytes()
    small = stripped(whole)
    assert len(small) < len(whole)
    program = tmp_path / "python"
    program.write_bytes(small)
    program.chmod(0o755)
    environment = {"LD_LIBRARY_PATH": os.fspath(source.parent.parent / "lib"), "PYTHONHOME": sys.base_prefix}
    done = subprocess.run([program, "-I", "-c", "print(6 * 7)"], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "42\n", done.stderr
    assert stripped(small) == small


def test_libraries_are_those_of_the_loader() -> None:
    loader, needed = libraries(Path(sys.executable).resolve())
    assert loader is not None
    assert Path(loader).is_file()
    assert "libc.so.6" in needed
    assert all(path.is_file() for path in needed.values())


@pytest.mark.parametrize("change", ["empty", "text", "class", "machine", "table", "segment"])
def test_what_is_no_program(tmp_path: Path, change: str) -> None:
    data = bytearray(Path(sys.executable).resolve().read_bytes())
    if change == "empty":
        data = bytearray()
    elif change == "text":
        data = bytearray(b"#!/bin/sh\n" * 20)
    elif change == "class":
        data[4] = 1
    elif change == "machine":
        data[18] = 183
    elif change == "table":
        data[32:40] = (len(data) - 8).to_bytes(8, "little")
    else:
        data = data[: len(data) // 4]
    with pytest.raises(FormatError):
        stripped(bytes(data), "it")
    path = tmp_path / "it"
    path.write_bytes(data)
    with pytest.raises((FormatError, ArgumentError)):
        libraries(path)


def test_library_that_is_missing(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    (tmp_path / "lost.c").write_text("int lost(void) { return 1; }\n")
    (tmp_path / "main.c").write_text("int lost(void); int main(void) { return lost(); }\n")
    subprocess.run(["gcc", "-shared", "-o", "liblost.so", "lost.c"], cwd=tmp_path, check=True)
    subprocess.run(["gcc", "-o", "main", "main.c", "-L.", "-llost"], cwd=tmp_path, check=True)
    (tmp_path / "liblost.so").unlink()
    with pytest.raises(ArgumentError, match=r"liblost\.so"):
        libraries(tmp_path / "main")


# ---- Kernel modules


def module(folder: Path, name: str, *needs: str, packed: str = "") -> None:
    data = b"\x7fELF" + bytes(60) + b"\0name=" + name.encode() + b"\0depends=" + ",".join(needs).encode() + b"\0"
    if packed == ".xz":
        data = lzma.compress(data)
    elif packed == ".gz":
        data = gzip.compress(data)
    path = folder / f"{name}.ko{packed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    module(tmp_path / "x", "top-one", "middle", "base")
    module(tmp_path / "y", "middle", "base", packed=".xz")
    module(tmp_path, "base", packed=".gz")
    module(tmp_path, "other")
    order = load_order(tmp_path, ["top_one"])
    assert list(order) == ["base", "middle", "top_one"]
    assert all(is_elf(data) for data in order.values())
    assert list(load_order(tmp_path, ["other", "top-one"])) == ["other", "base", "middle", "top_one"]


def test_modules_that_cannot_be_loaded(tmp_path: Path) -> None:
    module(tmp_path, "a", "b")
    with pytest.raises(ArgumentError, match="which a needs"):
        load_order(tmp_path, ["a"])
    module(tmp_path, "b", "a")
    with pytest.raises(FormatError, match="circle"):
        load_order(tmp_path, ["a"])
    (tmp_path / "c.ko").write_bytes(b"text")
    (tmp_path / "d.ko.xz").write_bytes(b"text")
    (tmp_path / "e.ko.gz").write_bytes(b"text")
    for name in "cde":
        with pytest.raises(FormatError):
            load_order(tmp_path, [name])


# ---- Python


def test_compiled_code_is_a_function_of_source_and_name() -> None:
    source = b"x = {'a', 'b', 'c'} and 'word' in ('word', 'b')\ny = x in {'p', 'q', 'r', 's'}\n"
    code = compiled(source, "/usr/lib/x.py")
    assert code[:4] == __import__("importlib.util").util.MAGIC_NUMBER
    assert code[4:8] == b"\1\0\0\0", "an unchecked hash"
    assert marshal.loads(code[16:]).co_filename == "/usr/lib/x.py"
    words = ["-c", f"import sys; from csvfast.machine.initrd_python import compiled; "
             f"sys.stdout.buffer.write(compiled({source!r}, '/usr/lib/x.py'))"]  # fmt: skip
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        assert subprocess.run([sys.executable, *words], env=environment, capture_output=True, check=True).stdout == code
    with pytest.raises(FormatError):
        compiled(b"def", "x.py")


def test_what_goes_in_and_what_does_not() -> None:
    library = [place for place, _ in library_files()]
    assert {"os.py", "json/__init__.py", "encodings/utf_8.py"} <= set(library)
    assert not any(place.startswith(("test/", "site-packages/", "tkinter/")) or "__pycache__" in place for place in library)
    assert not any("_ssl" in place for place in library)
    package = [place for place, _ in package_files("csvfast")]
    assert "csvfast/machine/guest/client.py" in package
    assert any(place.startswith("csvfast/_core.") and place.endswith(".so") for place in package)
    assert not any(place.startswith(("csvfast/broker/", "csvfast/cli/")) for place in package)
    assert [place for place, _ in package_files("csvfast.errors")] == ["csvfast/errors.py"]


@pytest.mark.parametrize("name", ["no_such_package_here", "sys", "csvfast.none", "..", ""])
def test_packages_that_are_not_there(name: str) -> None:
    with pytest.raises(ArgumentError):
        list(package_files(name))


# ---- The whole


@with_busybox
def test_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    """Another hash seed, other times, another umask, another folder, another order of arguments: the same bytes."""
    script = (
        "import os, sys; os.umask(int(sys.argv[2], 8)); from csvfast.machine.initrd import build_initrd\n"
        "print(build_initrd(sys.argv[1], run='true', files={'/x/b': b'1', '/x/a': b'2'}).sha256.hex())\n"
    )
    (tmp_path / "other").mkdir()
    digests = []
    for seed, umask, name in (("1", "022", "one"), ("2", "077", "other/two")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC+{seed}"}
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / name, umask], env=environment, capture_output=True, text=True, check=True
        )
        digests.append(done.stdout.strip())
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digests[-1]
    assert digests[0] == digests[1]
    data = (tmp_path / "one").read_bytes()
    for trace in (os.fspath(ROOT), os.fspath(tmp_path), os.fspath(Path.home() / "csvfast")):
        assert trace.encode() not in b"".join(
            content for name, (_, content, _) in unpacked(data).items()
            if not name.endswith((".so", ".ko")) and ".so." not in name and "sysconfigdata" not in name and "/bin/" not in name
        ), "no path of this machine"  # fmt: skip


@with_busybox
def test_content_of_a_small_one(tmp_path: Path) -> None:
    initrd = build_initrd(
        tmp_path / "initrd", busybox=BUSYBOX, modules=(), python=False, run="echo hello",
        files={"/srv/run.sh": b"#!/bin/sh\n", "/srv/data": b"d"},
    )  # fmt: skip
    data = initrd.path.read_bytes()
    assert (initrd.size, initrd.sha256) == (len(data), hashlib.sha256(data).digest())
    entries = unpacked(data)
    assert entries["etc/csvfast/run"][1] == b"echo hello\n"
    assert entries["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox", entries["bin/sh"][2])
    assert entries["srv/run.sh"][0] == stat.S_IFREG | 0o755
    assert entries["srv/data"][0] == stat.S_IFREG | 0o644
    console = entries["dev/console"]
    assert (console[0], console[2]["node_major"], console[2]["node_minor"]) == (stat.S_IFCHR | 0o600, 5, 1)
    assert not any("python" in name for name in entries)
    packed = tmp_path / "packed"
    again = build_initrd(packed, busybox=BUSYBOX, modules=(), python=False, run="echo hello",
                         files={"/srv/data": b"d", "/srv/run.sh": b"#!/bin/sh\n"}, compress="gzip")  # fmt: skip
    assert gzip.decompress(packed.read_bytes()) == data
    assert packed.read_bytes()[4:8] == bytes(4), "no time in gzip's header"
    assert again.sha256 == hashlib.sha256(packed.read_bytes()).digest()


def test_init_is_shell(tmp_path: Path) -> None:
    from csvfast.machine.initrd import INIT

    path = tmp_path / "init"
    path.write_text(INIT)
    subprocess.run(["sh", "-n", path], check=True)


@with_busybox
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('console=ttyS0 csvfast.run="echo a b" quiet', "echo a b"),
        ("csvfast.run=true", "true"),
        ("console=ttyS0 csvfast.run=ls panic=1", "ls"),
        ('csvfast.run="x; y=1"', "x; y=1"),
        ("console=ttyS0 quiet", ""),
    ],
)
def test_command_line(tmp_path: Path, line: str, expected: str) -> None:
    """The very line of /init, with a file in the place of /proc/cmdline."""
    from csvfast.machine.initrd import INIT

    (tmp_path / "cmdline").write_text(line + "\n")
    wanted = next(text for text in INIT.splitlines() if text.startswith("command="))
    script = wanted.replace("/proc/cmdline", str(tmp_path / "cmdline")).replace("$(sed", "$(busybox sed")
    script += '\nprintf %s "$command"'
    (tmp_path / "busybox").write_bytes(BUSYBOX.read_bytes())
    (tmp_path / "busybox").chmod(0o755)
    shell = [tmp_path / "busybox", "sh", "-c", script]
    done = subprocess.run(shell, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == expected


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_initrd(tmp_path / "x", busybox=tmp_path / "none")
    (tmp_path / "text").write_text("no program")
    with pytest.raises(FormatError):
        build_initrd(tmp_path / "x", busybox=tmp_path / "text")
    with pytest.raises(ArgumentError, match="static"):
        build_initrd(tmp_path / "x", busybox=Path(sys.executable).resolve())
    builder = InitrdBuilder()
    with pytest.raises(ArgumentError, match="/init"):
        builder.encode()
    builder.init()
    with pytest.raises(ArgumentError, match="compress"):
        builder.encode("lzma")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        builder.write(tmp_path / "no" / "folder")
    assert not (tmp_path / "x").exists()
