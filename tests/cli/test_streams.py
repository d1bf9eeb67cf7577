"""Streams, files and signals as hostile shells hand them to the command. Everything here runs the installed console script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import csvfast

SCRIPT = Path(sysconfig.get_path("scripts")) / "csvfast"
ZERO = "0" * 64


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """bash runs a line in which `csvfast` is the console script."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CSVFAST_")}
    return subprocess.run(
        ["bash", "-c", f'csvfast() {{ "{SCRIPT}" "$@"; }}; {command}'],
        cwd=folder, capture_output=True, check=False, timeout=120, env=clean | environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[bytes], code: int, words: str) -> None:
    """That exit code and exactly one line of error."""
    text = done.stderr.decode()
    assert done.returncode == code, done
    assert words in text
    assert text.startswith("csvfast: error: ")
    assert len(text.splitlines()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(bytes(range(256)) * 64)
    return tmp_path


@pytest.mark.parametrize("variable", ["CSVFAST_KERNEL", "CSVFAST_DISABLE"])
@pytest.mark.parametrize("command", ["info", "measure image data", "--version", "--help"])
def test_environment_that_cannot_be_had(folder: Path, variable: str, command: str) -> None:
    done = shell(f"csvfast {command}", folder, **{variable: "no-such-thing"})
    refused(done, 3, f"{variable}='no-such-thing'")
    assert done.stdout == b""


def test_traceback_of_a_refused_start(folder: Path) -> None:
    done = shell("csvfast info", folder, CSVFAST_KERNEL="nope", CSVFAST_TRACEBACK="1")
    assert done.returncode != 0
    assert b"Traceback" in done.stderr


def test_standard_output_full(folder: Path) -> None:
    for command in ("measure image data", "measure image data --json", "info", "measure verity data --json"):
        refused(shell(f"csvfast {command} > /dev/full", folder), 3, "standard output: No space left on device")


def test_standard_output_closed(folder: Path) -> None:
    refused(shell("csvfast measure image data >&-", folder), 3, "standard output is closed")


def test_standard_error_closed(folder: Path) -> None:
    done = shell("csvfast measure image data 2>&-", folder)
    assert (done.returncode, done.stdout.split()[1]) == (0, b"data")
    done = shell("csvfast measure image nowhere 2>&-", folder)
    assert (done.returncode, done.stdout) == (3, b"")  # the message is lost; it must not turn up among the results


def test_standard_input_closed(folder: Path) -> None:
    """The first file that is opened would get number 0 and pass for standard input."""
    refused(shell("csvfast measure image - <&-", folder), 3, "standard input is closed")
    line = "csvfast measure launch --firmware data --kernel - --force-hash-table <&-"
    refused(shell(line, folder), 3, "standard input is closed")


def test_all_closed(folder: Path) -> None:
    assert shell("csvfast measure image data <&- >&- 2>&-", folder).returncode == 3


@pytest.mark.parametrize("flag", ["", "--json"])
def test_a_reader_that_leaves_does_not_hide_a_failed_check(folder: Path, flag: str) -> None:
    done = shell(f"set -o pipefail; csvfast measure image data {flag} --expect {ZERO} | true", folder)
    refused(done, 1, "not the expected one")


def test_names_that_are_no_text(folder: Path) -> None:
    name = os.fsdecode(b"b\xffd")
    (folder / name).write_bytes(b"abc")
    done = shell("csvfast measure image $'b\\xffd'", folder)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == csvfast.sm3(b"abc").hexdigest().encode() + b"  b\xffd\n"
    assert json.loads(shell("csvfast measure image --json $'b\\xffd'", folder).stdout)["path"] == name
    done = shell("csvfast measure image $'n\\xffwhere'", folder)
    refused(done, 3, "no such file")


def test_names_with_line_breaks(folder: Path) -> None:
    (folder / "a\nb\\c").write_bytes(b"abc")
    done = shell("csvfast measure image $'a\\nb\\\\c'", folder)
    assert done.stdout == b"\\" + csvfast.sm3(b"abc").hexdigest().encode() + b"  a\\nb\\\\c\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["info", "memory demo", "memory demo --json"])
def test_poor_encodings(folder: Path, encoding: str, command: str) -> None:
    done = shell(f"csvfast {command}", folder, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("target", ["/dev/null", "/dev/stdout", "pipe"])
def test_results_into_devices(folder: Path, target: str) -> None:
    """A rename would put a plain file in the device's place."""
    os.mkfifo(folder / "pipe")
    bench = "csvfast bench --only memcpy --no-peers --seconds 0.001 --size 64KiB"
    reader = "cat pipe > got & " if target == "pipe" else ""
    done = shell(f"{reader} {bench} --json {target}; code=$?; wait; exit $code", folder)
    assert done.returncode == 0, done
    assert not Path(target).is_file() or target == "/dev/stdout"
    assert Path("/dev/null").is_char_device()
    if target == "pipe":
        assert json.loads((folder / "got").read_bytes())["results"]
    elif target == "/dev/stdout":
        assert b'"results"' in done.stdout


def test_results_on_a_full_device(folder: Path) -> None:
    bench = "csvfast bench --only memcpy --no-peers --seconds 0.001 --size 64KiB"
    refused(shell(f"{bench} --json /dev/full > table", folder), 3, "No space left on device")


def test_links_are_followed_and_long_names_fit(folder: Path) -> None:
    name = "n" * 250
    (folder / "link").symlink_to(name)
    for _ in range(2):  # the first time the link leads nowhere
        done = shell("csvfast measure verity data --hash-file link --json", folder)
        assert done.returncode == 0, done
        assert (folder / "link").is_symlink()
        assert (folder / name).is_file()
    assert {path.name for path in folder.iterdir()} == {"data", "link", name}


@pytest.mark.parametrize("offset", ["512000000000000000000000000000", str(1 << 62), "-512", "1"])
def test_impossible_hash_offsets(folder: Path, offset: str) -> None:
    done = shell(f"csvfast measure verity data --hash-file hashes --hash-offset={offset}", folder)
    assert done.returncode in (2, 3)
    assert b"Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"data"}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_signal_in_the_middle(folder: Path, kind: signal.Signals) -> None:
    """Until the tree is complete nothing has a name; the data come through a pipe that never ends."""
    with subprocess.Popen(
        [SCRIPT, "measure", "verity", "-", "--hash-file", "hashes"],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        for _ in range(40):
            process.stdin.write(os.urandom(1 << 20))
        process.stdin.flush()
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert b"Traceback" not in errors
    assert {path.name for path in folder.iterdir()} == {"data"}


def test_unreadable_device(folder: Path) -> None:
    """An input/output error, which even root gets."""
    refused(shell("csvfast measure image /proc/self/mem", folder), 3, "/proc/self/mem")


def test_measuring_starts_quickly(folder: Path) -> None:
    """Processor time of the whole command, best of five. What may be loaded late is."""

    def once() -> float:
        before = os.times()
        subprocess.run([SCRIPT, "measure", "image", "data"], cwd=folder, check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(once() for _ in range(5)) < 0.5


def test_what_a_measurement_does_not_load(folder: Path) -> None:
    code = (
        "import sys; from csvfast.cli import main; main(['measure', 'image', 'data']);"
        "print([name for name in ('numpy', 'cryptography', 'ssl', 'csvfast.benchmark', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
