"""The command as a whole: help, version, exit codes, errors on one line, interruption, start-up time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

import csvfast
from csvfast import errors
from csvfast.cli import main
from csvfast.cli.common import CommandError, ExitCode, exit_code_of


def test_version(csvfast_command: Any) -> None:
    done = csvfast_command("--version")
    assert (done.returncode, done.stdout) == (0, f"csvfast {csvfast.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["info", "--help"], ["bench", "--help"], ["measure", "--help"], ["memory", "--help"],
     ["memory", "demo", "--help"], ["measure", "image", "--help"]],
)  # fmt: skip
def test_help_goes_to_stdout(csvfast_command: Any, arguments: list[str]) -> None:
    done = csvfast_command(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: csvfast")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["info", "--nonsense"], "--nonsense"),
        (["memory", "nonsense"], "nonsense"),
        (["bench", "--only", "no-such-name"], "no-such-name"),
        (["bench", "--kernel", "no-such-kernel"], "no-such-kernel"),
        (["bench", "--threads", "two"], "two"),
        (["bench", "--threads", "0"], "'0'"),
        (["bench", "--size", "12 parsecs"], "12 parsecs"),
        (["bench", "--size", "5000"], "5000"),
        (["bench", "--seconds", "0"], "seconds"),
        (["bench", "--chart", "chart.jpeg"], "chart.jpeg"),
        (["memory", "demo", "--standard", "aes"], "aes"),
        (["memory", "demo", "--tweak-model", "none"], "none"),
    ],
)
def test_usage_errors(csvfast_command: Any, arguments: list[str], named: str) -> None:
    done = csvfast_command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("csvfast: error: ")
    assert named in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["memory"], ["measure"]])
def test_nothing_asked_shows_help(csvfast_command: Any, arguments: list[str]) -> None:
    done = csvfast_command(*arguments)
    assert done.returncode == 2
    assert "Usage: csvfast" in done.stdout + done.stderr


def test_missing_directory_is_environment(csvfast_command: Any) -> None:
    done = csvfast_command("bench", "--json", "no/such/directory/out.json")
    assert done.returncode == 3
    assert "no/such/directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_traceback_only_when_asked(csvfast_command: Any) -> None:
    arguments = ["bench", "--only", "no-such-name"]
    assert "Traceback" not in csvfast_command(*arguments).stderr
    assert "Traceback" in csvfast_command(*arguments, environment={"CSVFAST_TRACEBACK": "1"}).stderr


def test_unknown_kernel_in_the_environment() -> None:
    """The console script ends with one line and exit code 3, although the package refuses to be imported."""
    script = Path(sysconfig.get_path("scripts")) / "csvfast"
    done = subprocess.run(
        [script, "info"], env=os.environ | {"CSVFAST_KERNEL": "no-such-kernel"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("csvfast: error: CSVFAST_KERNEL='no-such-kernel'")


def test_info(csvfast_command: Any) -> None:
    done = csvfast_command("info")
    assert done.returncode == 0
    for primitive, entry in csvfast.info()["kernels"].items():
        assert primitive in done.stdout
        assert entry["chosen"] in done.stdout


def test_info_json(csvfast_command: Any) -> None:
    shown = json.loads(csvfast_command("info", "--json").stdout)
    assert shown["version"] == csvfast.__version__
    assert set(shown["kernels"]) == {"sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"}
    for entry in shown["kernels"].values():
        assert entry["chosen"] in entry["available"]
        assert set(entry["available"]) <= set(entry["compiled"])
        assert "portable" in entry["available"]
    assert shown["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_info_obeys_the_environment(csvfast_command: Any) -> None:
    shown = json.loads(csvfast_command("info", "--json", environment={"CSVFAST_KERNEL": "portable"}).stdout)
    assert {entry["chosen"] for entry in shown["kernels"].values()} == {"portable"}


def test_help_is_fast() -> None:
    """A shell user waits for --help. Processor time, best of five, so that a busy machine does not fail it."""
    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-P", "-m", "csvfast", "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(once() for _ in range(5)) < 0.4


def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and without a traceback."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "csvfast", "bench", "--only", "memcpy", "--seconds", "600", "--no-peers"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    ) as process:  # fmt: skip
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "interrupted" in shown


def test_closed_pipe_is_quiet() -> None:
    """`csvfast info --json | head -c 1` leaves no complaint."""
    line = f"'{sys.executable}' -P -m csvfast memory demo --json | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError("x", ExitCode.CHECK_FAILED), 1),
        (errors.KeyLengthError("x"), 2),
        (errors.WeakKeyError("x"), 2),
        (errors.AuthenticationError("x"), 1),
        (errors.SystemCallError(5, "x"), 3),
        (errors.AllocationError("x"), 3),
        (errors.StartupError("x"), 3),
        (errors.InternalError("x"), 3),
        (FileNotFoundError("x"), 3),
        (MemoryError(), 3),
    ],
)
def test_exit_codes_of_exceptions(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code


def test_main_returns_instead_of_exiting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().out == f"csvfast {csvfast.__version__}\n"


def test_a_command_does_not_import_the_others() -> None:
    """Their options would take longer than many a command."""
    code = (
        "import sys; from csvfast.cli import main; main(['info', '--json']); "
        "print(sorted(one for one in sys.modules if one.startswith('csvfast.cli.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['csvfast.cli.common', 'csvfast.cli.info', 'csvfast.cli.streams']"
