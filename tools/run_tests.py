"""Every check of csvfast, stage by stage, with one table at the end. `make test` runs it inside .venv.

usage: run_tests.py [--only STAGE] [--without STAGE] [--jobs N] [--build DIRECTORY] [--list]

Stages are independent; two run at a time on two CPUs. A stage's output appears when it ends: all of it when the stage failed,
its last lines otherwise. A stage whose tool is missing is skipped with the reason; with CI=true a skip that
tests/expected-skips.txt does not list is a failure ("stage:asan | reason"). Up to three Python tests of a stage that failed
beside another stage are repeated alone at the end, and named in the table: one that passes then was late on a busy machine,
which is to be mended but is no wrong result. Exit code: 0 all passed, 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import skips  # noqa: E402  (the rule for skips is pytest's and ours alike)

Command = list[str]
# Tests that mostly wait for processes and sockets; the others mostly compute.
SERVICES = ("broker", "ratstls", "machine")
CONTAINERS = ("image", "runtime")
REPEATED = 3
PYTEST = [sys.executable, "-P", "-m", "pytest", "-p", "skips", "--color=no"]


@dataclass(frozen=True)
class Stage:
    """Commands run one after another until one fails.

    needs    gives the reason for which the stage cannot run here, or None
    """

    name: str
    what: str
    commands: list[Command]
    needs: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    stage: Stage
    state: str  # "passed", "failed" or "skipped"
    seconds: float = 0.0
    detail: str = ""
    repeat: Command | None = None


def program(*names: str) -> Callable[[], str | None]:
    """Reason if one of the programs is not on the PATH."""

    def check() -> str | None:
        missing = [name for name in names if shutil.which(name) is None]
        return f"{', '.join(missing)} not installed (tools/install-test-tools.sh)" if missing else None

    return check


def clang_runtime() -> str | None:
    """Reason if clang cannot link a sanitizer: its runtime is a package of its own."""
    reason = program("clang")()
    if reason is not None:
        return reason
    source = "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d && n ? 0 : 0; }"
    command = ["clang", "-fsanitize=fuzzer,address", "-x", "c", "-", "-o", os.devnull]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    return None if done.returncode == 0 else "clang has no sanitizer runtime (tools/install-test-tools.sh)"


def make_target(target: str, needs: Callable[[], str | None]) -> Callable[[], str | None]:
    """Reason if csrc/Makefile has no such target, or what else the stage needs is missing."""

    def check() -> str | None:
        done = subprocess.run(
            ["make", "-C", "csrc", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if "No rule to make target" in done.stderr and f"'{target}'" in done.stderr:
            return f"csrc/Makefile has no target {target}"
        return needs()

    return check


def stages(build: str, jobs: int) -> list[Stage]:
    """All stages. Those that share a C build directory stand in one stage; different stages never build the same files."""
    def make(target: str, part: str, *extra: str) -> Command:
        return ["make", "--no-print-directory", "-C", "csrc", f"-j{jobs}", f"BUILD={build}{part}", *extra, target]

    python_environment = {
        "PYTHONPATH": str(ROOT / "tests"),
        "CSVFAST_ROOT": str(ROOT),
        # Speeds hypothesis up and keeps the tree clean of its database.
        "HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / "build" / "hypothesis"),
    }
    return [
        Stage("lint", "ruff, mypy --strict", [
            [sys.executable, "-m", "ruff", "check", "--exclude", "csrc", "."],
            # The generators beside the C sources are scripts for one purpose: docstrings and long tables are theirs to decide.
            [sys.executable, "-m", "ruff", "check", "--ignore", "D1,E501", "csrc"],
            [sys.executable, "-m", "mypy", "--cache-dir", "build/mypy"],
        ]),
        Stage("c", "C tests, exported symbols; gcc, warnings are errors", [
            make("all", "", "CC=gcc", "CFLAGS=-Werror"), make("check", "", "CC=gcc", "CFLAGS=-Werror"),
        ], needs=program("gcc")),
        Stage("c-clang", "the same by clang", [
            make("all", "/clang", "CC=clang", "CFLAGS=-Werror"), make("check", "/clang", "CC=clang", "CFLAGS=-Werror"),
        ], needs=program("clang")),
        Stage("ctime", "constant time: valgrind, MemorySanitizer, equal instruction traces", [
            make("ctime", "/ctime"), make("ctrace", "/ctime", f"PYTHON={sys.executable}"),
        ], needs=make_target("ctrace", program("valgrind", "objdump"))),
        Stage("asan", "C tests and fuzz inputs, AddressSanitizer, UBSan", [
            make("asan", "/sanitize"),
        ], needs=make_target("asan", program("gcc"))),
        Stage("tsan", "engine, ThreadSanitizer", [make("tsan", "/thread")], needs=make_target("tsan", program("gcc"))),
        Stage("fuzz-smoke", "libFuzzer, 10 s a target", [
            make("fuzz-smoke", "/fuzzing", "FUZZ_SECONDS=10"),
        ], needs=make_target("fuzz-smoke", clang_runtime)),
        Stage("pytest", "Python tests", [
            [*PYTEST, "-o", "cache_dir=build/pytest-pytest", "tests",
             *(f"--ignore=tests/{folder}" for folder in SERVICES + CONTAINERS)],
        ], environment=python_environment),
        Stage("services", "Python tests of attested TLS, the broker and virtual machines", [
            [*PYTEST, "-o", "cache_dir=build/pytest-services", *(f"tests/{folder}" for folder in SERVICES)],
        ], environment=python_environment),
        Stage("containers", "Python tests of images and of confidential containers", [
            [*PYTEST, "-o", "cache_dir=build/pytest-containers", *(f"tests/{folder}" for folder in CONTAINERS)],
        ], environment=python_environment),
        Stage("bench", "benchmark suites run once each, untimed", [
            [*PYTEST, "-o", "cache_dir=build/pytest-bench", "bench", "--benchmark-disable", "-q"],
        ], environment=python_environment),
    ]  # fmt: skip


PRINTING = threading.Lock()


def say(text: str) -> None:
    with PRINTING:
        print(text, flush=True)


def run_stage(stage: Stage, expected: list[skips.Expected]) -> Outcome:
    reason = stage.needs()
    if reason is not None:
        accepted = not skips.is_continuous_integration() or any(
            entry.covers(f"stage:{stage.name}", reason) for entry in expected
        )
        say(f"-- {stage.name}: skipped: {reason}")
        return Outcome(stage, "skipped" if accepted else "failed", detail=reason)
    start = time.monotonic()
    output = ""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    for command in stage.commands:
        done = subprocess.run(
            command, cwd=ROOT, env=environment | stage.environment, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output += f"$ {' '.join(command)}\n{done.stdout}"
        if done.returncode != 0:
            break
    seconds = time.monotonic() - start
    failed = done.returncode != 0
    tail = output if failed else "\n".join(output.rstrip().splitlines()[-3:])
    say(f"== {stage.name} ({stage.what}): {'FAILED' if failed else 'passed'} in {seconds:.0f} s\n{tail.rstrip()}\n")
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    repeat = [*command, "--lf", "--lfnf=none"] if done.returncode == 1 and command[: len(PYTEST)] == PYTEST else None
    return Outcome(stage, "failed" if failed else "passed", seconds, last.strip()[:60], repeat)


def run_all(chosen: Iterable[Stage], jobs: int, expected: list[skips.Expected]) -> list[Outcome]:
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda stage: run_stage(stage, expected), chosen))


def repeat_alone(outcome: Outcome) -> None:
    """Runs the few tests of a stage that failed once more, now that nothing else runs. Too many failures stand as they are."""
    assert outcome.repeat is not None
    folder = f"build/pytest-{outcome.stage.name}"
    try:
        names = sorted(json.loads((ROOT / folder / "v/cache/lastfailed").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return
    if not 1 <= len(names) <= REPEATED:
        return
    say(f"-- {outcome.stage.name}: repeated alone, since these failed beside another stage: {', '.join(names)}")
    again = run_stage(replace(outcome.stage, commands=[outcome.repeat]), [])
    outcome.seconds += again.seconds
    if again.state == "passed":
        outcome.state, outcome.detail = "passed", f"UNSTEADY, passed alone: {', '.join(names)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="STAGE")
    parser.add_argument("--without", action="append", metavar="STAGE", default=[])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="stages at a time")
    parser.add_argument("--build", default="build", help="C build directory, relative to csrc or absolute")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    every = stages(options.build, options.jobs)
    names = [stage.name for stage in every]
    for name in [*(options.only or []), *options.without]:
        if name not in names:
            parser.error(f"stage {name!r}: expected one of {', '.join(names)}")
    if options.list:
        print(*(f"{stage.name:<12} {stage.what}" for stage in every), sep="\n")
        return 0
    chosen = [s for s in every if s.name not in options.without and (not options.only or s.name in options.only)]
    # The longest first: two lanes then end at about the same time.
    order = ["services", "pytest", "containers", "asan", "ctime", "fuzz-smoke", "bench", "c"]
    chosen.sort(key=lambda stage: order.index(stage.name) if stage.name in order else len(order))
    expected = skips.read_expected(skips.LIST.read_text(encoding="utf-8")) if skips.LIST.exists() else []

    start = time.monotonic()
    outcomes = run_all(chosen, options.jobs, expected)
    for outcome in outcomes:
        if outcome.state == "failed" and outcome.repeat is not None and len(outcomes) > 1:
            repeat_alone(outcome)
    print(f"{'stage':<12} {'result':<8} {'time':>6}")
    for outcome in sorted(outcomes, key=lambda outcome: names.index(outcome.stage.name)):
        print(f"{outcome.stage.name:<12} {outcome.state:<8} {outcome.seconds:>5.0f}s  {outcome.detail}")
    failed = [outcome.stage.name for outcome in outcomes if outcome.state == "failed"]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    print(f"{len(outcomes)} stages in {time.monotonic() - start:.0f} s: {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
