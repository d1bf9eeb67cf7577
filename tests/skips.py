"""pytest plugin: with CI=true a skip that nobody expected fails the run.

A test that skips when a tool is missing is right on a laptop and a hole in continuous integration. tests/expected-skips.txt
lists, a line each, the skips that are accepted there:

    tests/path.py::test_name*  |  words of the reason

Left of the bar a shell pattern for the test's id, right of it text that the reason contains; `#` begins a comment.
Loaded by `-p tests.skips` or by naming it in a conftest's pytest_plugins.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import NamedTuple

import pytest

LIST = Path(__file__).with_name("expected-skips.txt")


class Expected(NamedTuple):
    pattern: str
    reason: str

    def covers(self, node: str, reason: str) -> bool:
        return fnmatch.fnmatchcase(node, self.pattern) and self.reason in reason


def read_expected(text: str) -> list[Expected]:
    """Parses the list. Raises ValueError naming a line without a bar."""
    found = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        pattern, bar, reason = line.partition("|")
        if not bar or not pattern.strip() or not reason.strip():
            raise ValueError(f"{LIST.name}:{number}: expected 'pattern | words of the reason'")
        found.append(Expected(pattern.strip(), reason.strip()))
    return found


def is_continuous_integration() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


class SkipGuard:
    def __init__(self, expected: list[Expected]) -> None:
        self.expected = expected
        self.unexpected: list[tuple[str, str]] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure also reports "skipped", but it ran.
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        detail = report.longrepr
        reason = str(detail[2] if isinstance(detail, tuple) else detail).removeprefix("Skipped: ")
        if not any(entry.covers(report.nodeid, reason) for entry in self.expected):
            self.unexpected.append((report.nodeid, reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Under xdist the workers report to the controller, which decides.
        if self.unexpected and session.exitstatus in (0, pytest.ExitCode.OK) and not hasattr(session.config, "workerinput"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skips nobody expected (CI=true)", red=True, bold=True)
            for node, reason in self.unexpected:
                terminalreporter.line(f"{node}: {reason}", red=True)
            terminalreporter.line(f"install what they need, or list them in {LIST.parent.name}/{LIST.name}")


def pytest_configure(config: pytest.Config) -> None:
    if is_continuous_integration() and not config.pluginmanager.has_plugin("csvfast-skips"):
        text = LIST.read_text(encoding="utf-8") if LIST.exists() else ""
        config.pluginmanager.register(SkipGuard(read_expected(text)), "csvfast-skips")
