"""Scripts behind the two commands: syntax, stages, the guards of make-venv.sh, the demo on small images."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted([*ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script: Path) -> None:
    shell = "bash" if script.read_text().startswith("#!/usr/bin/env bash") else "sh"
    subprocess.run([shell, "-n", str(script)], check=True)


def test_ci_runs_the_tests() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in text
    assert "make test" in text
    assert "export CI=true" in text


def run_tests(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/run_tests.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_stages_are_listed() -> None:
    done = run_tests("--list")
    assert done.returncode == 0
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"lint", "c", "c-clang", "ctime", "asan", "tsan", "fuzz-smoke", "pytest", "bench"} <= names


def test_unknown_stage_is_refused() -> None:
    done = run_tests("--only", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def make_venv(tmp_path: Path, path: str) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    return subprocess.run(
        [shell, str(ROOT / "tools" / "make-venv.sh"), str(tmp_path / "venv")],
        env={"PATH": path, "PYTHON": "python3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_venv_without_python_says_what_to_install(tmp_path: Path) -> None:
    done = make_venv(tmp_path, str(tmp_path))
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr
    assert "apt-get install" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_venv_without_compiler_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    done = make_venv(tmp_path, str(tmp_path))
    assert done.returncode == 1
    assert "apt-get install gcc" in done.stderr


@pytest.mark.slow
def test_demo_on_small_images() -> None:
    command = [sys.executable, "-P", str(ROOT / "tools" / "demo.py"), "--engine", "--megabytes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check held" in done.stdout
    assert "found: block 1023" in done.stdout
    assert "Hygon's root, the default, refuses it" in done.stdout


@pytest.mark.slow
def test_demo_of_a_container(tmp_path: Path) -> None:
    """The whole story and all attacks on the emulator; the page shows them, and nothing but the page is left."""
    pytest.importorskip("unicorn")
    report = tmp_path / "report.html"
    command = [sys.executable, "-P", str(ROOT / "tools" / "demo.py"), "--executor", "emulator", "--report", str(report)]
    with tempfile.TemporaryDirectory(prefix="csvfast-") as temporary:  # a socket's path is short
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "TMPDIR": temporary}
        )
        left = list(Path(temporary).iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    assert left == []
    assert "every check held, every attack failed" in done.stdout
    page = report.read_text(encoding="utf-8")
    assert page.count("<article") == 7
    assert "SUCCEEDED" not in page
    assert "opens with 31-07-44" not in page  # the letter's secret: only its hexdump is shown


def test_demo_guest_without_real_boot_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine has no OVMF the demo makes firmware of its own, and all of its checks hold."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import demo_guest
    from rich.console import Console

    monkeypatch.setenv("CSVFAST_BOOT_FILES", str(tmp_path / "nowhere"))
    monkeypatch.setattr(demo_guest, "FIRMWARE_PLACES", ())
    with (tmp_path / "shown").open("w", encoding="utf-8") as shown:
        assert demo_guest.run_guest_demo(Console(file=shown, width=120), tmp_path / "work")
    text = (tmp_path / "shown").read_text(encoding="utf-8")
    assert "generated firmware, 4 MiB" in text
    assert text.count("holds") == 6
    assert "FAILS" not in text


def runner(tmp_path: Path) -> Any:
    """tools/run_tests.py as a module whose project is an empty folder."""
    specification = importlib.util.spec_from_file_location("run_tests_script", ROOT / "tools" / "run_tests.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "run_tests_script", module)
        specification.loader.exec_module(module)
    module.ROOT = tmp_path
    return module


@pytest.mark.parametrize(("late", "wrong", "expected"), [(1, 0, "passed"), (3, 0, "passed"), (4, 0, "failed"), (1, 1, "failed")])
def test_only_what_passes_alone_was_late(
    tmp_path: Path, late: int, wrong: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = runner(tmp_path)
    lines = [
        "import pathlib, pytest",
        f"@pytest.mark.parametrize('number', range({late}))",
        "def test_late(number):",
        "    mark = pathlib.Path(__file__).with_name(f'mark{number}')",
        "    before = mark.exists()",
        "    mark.touch()",
        "    assert before",
        *(["def test_wrong():", "    assert False"] if wrong else []),
    ]
    (tmp_path / "test_it.py").write_text("\n".join(lines))
    command = [*module.PYTEST, "-o", "cache_dir=build/pytest-it", "-c", os.devnull, "--rootdir", str(tmp_path), "test_it.py"]
    stage = module.Stage("it", "some tests", [command], environment={"PYTHONPATH": str(ROOT / "tests")})
    outcome = module.run_stage(stage, [])
    assert outcome.state == "failed"
    module.repeat_alone(outcome)
    assert outcome.state == expected, capsys.readouterr().out
    assert ("UNSTEADY" in outcome.detail) == (expected == "passed")
