"""EncryptedTree and EmulatedProcess: programs on a root whose files are ciphertext on the host, in a child process."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("unicorn")

from csvfast import errors
from csvfast.crypto import SM4XTS, Secret
from csvfast.machine.emulator import EmulatedProcess, EncryptedTree, ProgramError, UnsupportedCall, run_program
from csvfast.machine.emulator.tree import content_size, file_size

BOOT = Path(os.environ.get("CSVFAST_BOOT_FILES") or Path.home() / ".cache" / "csvfast" / "boot")
WORD = b"a sentence that only the program shall read\n"
SCRIPT = r"""
cd /tmp; yes 'a sentence that only the program shall read' | head -3000 > a; sha256sum a; wc -c a
cat a a > b; echo tail >> b; tail -c 20 b; head -c 5000 b > c; printf X | dd of=c bs=1 seek=4095 conv=notrunc 2>/dev/null
tail -c +4090 c | head -c 12 | od -c; : > b; wc -c b; (echo one; echo two) > d; (read x; cat) < d
gzip a; gunzip -c a.gz | sha256sum; sort -r d; cp a.gz e; cmp a.gz e && echo same; mv e f; ln f g; cat g | gunzip | tail -1
dd if=/dev/zero of=h bs=1 count=0 seek=10000 2>/dev/null; sha256sum h; sed -i s/one/three/ d; cat d; find . -type f | sort
printf '#!/bin/sh\necho script "$0" "$1"\n' > s; chmod +x s; ./s word; ls -l | awk '{ print $5, $9 }'; exit 5
"""


@pytest.fixture(scope="module")
def busybox() -> bytes:
    path = BOOT / "busybox"
    if not path.exists():
        pytest.skip("no static busybox: tools/install-test-tools.sh fetches one")
    return path.read_bytes()


def make_tree(place: Path, busybox: bytes) -> EncryptedTree:
    for name in ("bin", "tmp", "dev"):
        (place / name).mkdir(parents=True)
    place.chmod(0o755)
    (place / "bin" / "sh").symlink_to("busybox")
    tree = EncryptedTree(place)
    folder = os.open(place / "bin", os.O_RDONLY | os.O_DIRECTORY)
    with tree.create(folder, b"busybox", 0o755) as writer:
        for start in range(0, len(busybox), 70_001):
            writer.write(busybox[start : start + 70_001])
    os.close(folder)
    return tree


def run(process: EmulatedProcess, *words: str, **options: object) -> tuple[bytes, bytes, int | None]:
    """Output, errors and exit code of a program; options as start() takes them."""
    ends = [os.pipe() for _ in range(2)]
    process.start(words[0], words[1:], stdout=ends[0][1], stderr=ends[1][1], **options)  # type: ignore[arg-type]
    found = []
    for _, write in ends:
        os.close(write)
    for read, _ in ends:
        with os.fdopen(read, "rb") as stream:
            found.append(stream.read())
    return found[0], found[1], process.wait(60)


# ---- The files


@given(st.integers(0, 1 << 40))
def test_a_file_s_length_tells_its_content_s(size: int) -> None:
    assert content_size(file_size(size)) == size
    assert file_size(size) <= size + 16 + 2 * 4096


def test_the_form_on_the_disk(tmp_path: Path) -> None:
    key = Secret.random(32)
    plain = os.urandom(9000)
    with EncryptedTree(tmp_path, key=Secret(key)) as tree:
        tree.write_bytes("/name", plain, 0o640)
        held = (tmp_path / "name").read_bytes()
        assert (tmp_path / "name").stat().st_mode & 0o777 & ~0o640 == 0
    assert len(held) == 16 + 3 * 4096 + 9000 % 4096
    assert held[:8] == b"csvtree1"
    unit = int.from_bytes(held[8:16], "little") & ~(1 << 63)
    assert SM4XTS(key).decrypt(held[16 : 16 + 3 * 4096], unit) == plain + bytes(3 * 4096 - 9000)
    assert held[16 + 3 * 4096 :] == bytes(9000 % 4096)


def test_one_content_twice_is_two_ciphertexts(tmp_path: Path) -> None:
    with EncryptedTree(tmp_path) as tree:
        tree.write_bytes("/a", bytes(8192))
        tree.write_bytes("/b", bytes(8192))
        first, second = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
        pages = {held[16 + at : 4112 + at] for held in (first, second) for at in (0, 4096)}
        assert len(pages) == 4
        assert tree.read_bytes("/a") == bytes(8192)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 20_000), st.binary(max_size=9000)),
        st.tuples(st.just("append"), st.just(0), st.binary(max_size=5000)),
        st.tuples(st.just("truncate"), st.integers(0, 20_000), st.just(b"")),
    ),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(OPERATIONS, st.integers(0, 25_000), st.integers(0, 25_000))
def test_parts_are_read_and_written_as_in_a_plain_file(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, bytes]], start: int, length: int
) -> None:
    place = tmp_path_factory.getbasetemp() / "parts"
    place.mkdir(exist_ok=True)
    (place / "file").unlink(missing_ok=True)
    expected = bytearray()
    with EncryptedTree(place) as tree:
        descriptor = os.open(place / "file", os.O_RDWR | os.O_CREAT)
        try:
            for kind, offset, data in operations:
                if kind == "truncate":
                    tree.truncate(descriptor, offset)
                    expected[offset:] = bytes(max(offset - len(expected), 0))
                    continue
                at = len(expected) if kind == "append" else offset
                tree.pwrite(descriptor, data, None if kind == "append" else offset)
                if data:
                    expected.extend(bytes(max(at - len(expected), 0)))
                    expected[at : at + len(data)] = data
            assert tree.size(descriptor) == len(expected)
            assert tree.pread(descriptor, 1 << 20, 0) == expected
            assert tree.pread(descriptor, length, start) == expected[start : start + length]
            for at in range(0, len(expected) - 64, 64):  # no run of the content stands in the host's file
                if len(set(expected[at : at + 16])) > 8:
                    assert bytes(expected[at : at + 16]) not in (place / "file").read_bytes()
                    break
        finally:
            os.close(descriptor)


def test_what_lay_behind_a_shorter_end_never_comes_back(tmp_path: Path) -> None:
    with EncryptedTree(tmp_path) as tree:
        tree.write_bytes("/file", b"\xff" * 20_000)
        descriptor = os.open(tmp_path / "file", os.O_RDWR)
        for size in (12_289, 12_287, 8192, 4100, 1):
            tree.truncate(descriptor, size)
            assert tree.pread(descriptor, 1 << 20, 0) == b"\xff" * size
            tree.truncate(descriptor, 20_000)
            assert tree.pread(descriptor, 1 << 20, 0) == (b"\xff" * size).ljust(20_000, b"\0")
        os.close(descriptor)


def test_a_writer_takes_anything_and_a_taken_name_is_refused(tmp_path: Path) -> None:
    with EncryptedTree(tmp_path) as tree:
        data = os.urandom(3_000_001)
        with tree.create(tree.descriptor, b"big", 0o4755) as writer:
            for start in range(0, len(data), 333_333):
                assert writer.write(memoryview(data)[start : start + 333_333]) == len(data[start : start + 333_333])
            os.fchmod(writer.fileno(), 0o4711)
        with pytest.raises(ValueError, match="closed"):
            writer.write(b"x")
        writer.close()
        assert (tmp_path / "big").stat().st_mode & 0o7777 == 0o4711
        assert tree.read_bytes("/big") == data
        with pytest.raises(errors.LimitError, match="allowed are 5"):
            tree.read_bytes("/big", limit=5)
        (tmp_path / "link").symlink_to("elsewhere")
        for name in ("big", "link"):
            with pytest.raises(FileExistsError):
                tree.create(tree.descriptor, name, 0o644)
        tree.create(tree.descriptor, "empty", 0o600).close()
        assert tree.read_bytes("empty") == b""
        (tmp_path / "out").symlink_to("/etc/passwd")
        with pytest.raises(FileNotFoundError):
            tree.read_bytes("/out")
        with pytest.raises(FileNotFoundError):
            tree.read_bytes("/../../etc/passwd")
    with pytest.raises(errors.LengthError, match="expected 32"):
        EncryptedTree(tmp_path, key=Secret.random(16))


def test_threads_append_to_one_file(tmp_path: Path) -> None:
    with EncryptedTree(tmp_path) as tree:
        tree.write_bytes("/log", b"")

        def work(number: int) -> None:
            descriptor = os.open(tmp_path / "log", os.O_RDWR)
            for _ in range(50):
                tree.pwrite(descriptor, b"%d" % number * 100 + b"\n", None)
            os.close(descriptor)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = tree.read_bytes("/log").splitlines()
        assert sorted(lines) == sorted([b"%d" % number * 100 for number in range(4)] * 50)


# ---- Programs


def test_a_script_on_an_encrypted_root_is_native(busybox: bytes, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    (plain / "bin").mkdir(parents=True)
    (plain / "tmp").mkdir()
    shutil.copy(BOOT / "busybox", plain / "bin" / "busybox")
    (plain / "bin" / "sh").symlink_to("busybox")
    with make_tree(tmp_path / "tree", busybox) as tree, EmulatedProcess() as process:
        output, problems, code = run(process, "/bin/sh", "-c", SCRIPT, root=tree, seconds=60)
        held = {path: path.read_bytes() for path in (tmp_path / "tree").rglob("*") if path.is_file()}
        assert tree.read_bytes("/tmp/d") == b"three\ntwo\n"
    words = ["-c", SCRIPT.replace("/tmp", str(plain / "tmp"))]
    path = f"{plain / 'bin'}"
    for name in subprocess.run([BOOT / "busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        if not (plain / "bin" / name).exists():
            (plain / "bin" / name).symlink_to("busybox")
    real = subprocess.run(
        ["sh", *words], executable=plain / "bin" / "busybox", capture_output=True, env={"PATH": path}, check=False, timeout=60
    )
    assert (output.decode().splitlines(), code) == (real.stdout.decode().splitlines(), 5), problems
    assert real.returncode == 5
    assert len(held) > 5
    for path_held, data in held.items():
        assert WORD[:20] not in data, path_held
        assert busybox[5000:5064] not in data


def test_start_signal_and_wait(busybox: bytes, tmp_path: Path) -> None:
    with make_tree(tmp_path, busybox) as tree:
        with EmulatedProcess() as process:
            read, write = os.pipe()
            source, sink = os.pipe()
            script = "trap 'echo got; exit 3' TERM; read x; echo $x $NAME $(hostname) $(id -u); while :; do :; done"
            process.start(
                "/bin/sh", ["-c", script],
                root=tree, stdin=source, stdout=write, environment={"NAME": "value", "PATH": "/bin"}, hostname="guest",
            )  # fmt: skip
            os.close(write)
            os.close(source)
            os.write(sink, b"line\n")
            with os.fdopen(read, "rb") as stream:
                assert stream.readline() == f"line value guest {os.getuid()}\n".encode()
                assert process.wait(0) is None
                assert process.signal(signal.SIGTERM)
                assert stream.read() == b"got\n"
            assert process.wait(30) == 3
            assert not process.signal(signal.SIGTERM)
            os.close(sink)
        with EmulatedProcess() as process:
            process.start("/bin/busybox", ["sleep", "100"], root=tree)
            time.sleep(0.3)
            process.signal(signal.SIGTERM)
            assert process.wait(30) == 143
        with EmulatedProcess() as process:
            assert run(process, "/bin/sh", "-c", "echo $(id -u):$(id -g); ls -ln /bin/busybox | awk '{ print $3 }'", root=tree,
                       user=(1234, 55))[0].split()[0] == b"1234:55"  # fmt: skip
        with EmulatedProcess() as process:  # never started
            pass


KERNEL = r"""
cat /proc/self/cmdline | tr '\0' ' '; echo; grep Threads /proc/self/status; grep MemTotal /proc/meminfo; readlink /proc/self/exe
echo out > /dev/stdout; echo in | cat /dev/stdin; echo null > /dev/null; test -c /dev/null && echo device; ls /dev
grep -c r-x /proc/self/maps; cat /proc/self/fd/9 9< /tmp/plain; stat -c %s /tmp/plain; cat /proc/1/status || echo none
"""


def test_files_of_the_kernel(busybox: bytes, tmp_path: Path) -> None:
    with make_tree(tmp_path, busybox) as tree, EmulatedProcess() as process:
        tree.write_bytes("/tmp/plain", b"content\n")
        output, problems, code = run(process, "/bin/sh", "-c", KERNEL, root=tree, memory=16 << 20)
    assert code == 0, problems
    assert output.decode().splitlines() == [
        "cat /proc/self/cmdline ", "Threads:\t1", "MemTotal:          16384 kB", "/bin/sh",
        "out", "in", "device", "1", "content", "8", "none",
    ], problems  # fmt: skip


def test_what_the_machine_refuses_has_its_class(busybox: bytes, tmp_path: Path) -> None:
    with make_tree(tmp_path, busybox) as tree:
        tree.write_bytes("/text", b"no program", 0o755)
        for words, options, kind, message in (
            (("/text",), {}, ProgramError, "no ELF file"),
            (("/none",), {}, errors.ContainerError, "/none: No such file"),
            (("/bin/sh", "-c", "while :; do :; done"), {"seconds": 0.3}, errors.LimitError, "the time is over"),
            (("/bin/sh",), {"window": 5}, errors.ArgumentError, "at least 65536"),
            (("/bin/busybox", "unshare", "-m", "sh"), {}, UnsupportedCall, "is not supported"),
        ):
            with EmulatedProcess() as process, pytest.raises(kind, match=message):
                run(process, *words, root=tree, **options)
        with EmulatedProcess() as process:
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(errors.ContainerError, match="ended before"):
                process.start("/bin/sh", root=tree)
        with EmulatedProcess() as process:
            process.start("/none", root=tmp_path)
            with pytest.raises(RuntimeError, match="already"):
                process.start("/none", root=tmp_path)


def test_a_killed_caller_takes_the_program_along(busybox: bytes, tmp_path: Path) -> None:
    make_tree(tmp_path, busybox).close()
    (tmp_path / "bin" / "busybox").write_bytes(busybox)
    text = (
        "import sys, time\nfrom csvfast.machine.emulator import EmulatedProcess\np = EmulatedProcess()\n"
        f"p.start('/bin/sh', ['-c', 'sleep 300 & echo $$ $!; wait'], root={str(tmp_path)!r}, stdout=1)\ntime.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        numbers = caller.stdout.readline().split()
        assert len(numbers) == 2
        caller.kill()
        caller.wait()
    until = time.monotonic() + 20
    places = [Path("/proc") / number.decode() / "stat" for number in numbers]

    def lives(place: Path) -> bool:
        try:
            return place.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while time.monotonic() < until and any(map(lives, places)):
        time.sleep(0.05)
    assert not any(map(lives, places))


def test_a_program_in_this_process(busybox: bytes, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    with make_tree(tmp_path, busybox) as tree:
        tree.write_bytes("/data", data)
        read, write = os.pipe()
        old = os.dup(1)
        os.dup2(write, 1)
        os.close(write)
        try:
            result = run_program("/bin/busybox", ["sha256sum", "/data"], root=tree, seconds=60)
        finally:
            os.dup2(old, 1)
            os.close(old)
        with os.fdopen(read, "rb") as stream:
            assert stream.read().split()[0].decode() == hashlib.sha256(data).hexdigest()
        assert result.exit_code == 0


def test_the_page_s_example(capfd: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "emulator.md"
    if not page.exists():
        pytest.skip("the tests stand outside a source tree")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capfd.readouterr().out == "/program: no ELF file\n"
