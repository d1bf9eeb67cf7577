"""Stores for tests: on SQLite and PostgreSQL, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest

from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import AuditRecord, Store

PATH: Final = ResourcePath("default", "key", "one")
SUBJECT: Final = {"tee": "csv", "chip_id": "HYGN0001", "measure": "5e" * 32, "evidence": "e1" * 32, "key": "4b" * 32}


def record(**members: Any) -> AuditRecord:
    """A record of a release, as the broker writes it, with some members changed."""
    given: dict[str, Any] = {
        "time": time.time_ns() // 1000,
        "correlation": os.urandom(8).hex(),
        "door": "kbs",
        "action": "release",
        "outcome": "allowed",
        "actor": "guest",
        "address": "192.0.2.1:40000",
        "subject": SUBJECT,
        "resource": str(PATH),
        "resource_version": 1,
        "policy": {"appraisal": "default_cpu", "appraisal_version": 3, "appraisal_digest": "a7" * 32},
    }
    return AuditRecord(**(given | members))


@pytest.fixture
def master_file(tmp_path: Path) -> Path:
    """A new master key."""
    path = tmp_path / "keys" / "master.key"
    path.parent.mkdir(mode=0o700)
    FileMaster.create(path).close()
    return path


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Where an SQLite store may be made."""
    return f"sqlite:///{tmp_path / 'store' / 'broker.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Where a store may be made: each test runs once for each kind of database."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(store_url: str, master_file: Path) -> Iterator[Store]:
    """A new store."""
    with Store.open(store_url, FileMaster(master_file), create=True) as opened:
        yield opened


class Program:
    """A program of these tests in a process of its own, spoken to by lines.

    In: name        file in this folder
        arguments   of the program
    """

    def __init__(self, name: str, *arguments: str) -> None:
        folder = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment.pop("PYTHONSAFEPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / name), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout

    def ask(self, line: str) -> str:
        """Writes a line, reads one."""
        self.stdin.write(line + "\n")
        self.stdin.flush()
        return self.line()

    def line(self) -> str:
        """The next line, "" at the end."""
        return self.stdout.readline().rstrip("\n")

    def kill(self) -> list[str]:
        """kill -9. Out: lines that had been written and not read yet, whole ones only."""
        self.process.kill()
        rest = self.stdout.read()
        self.close()
        return rest.split("\n")[:-1]

    def close(self) -> int:
        """Ends its input and waits for it."""
        self.stdin.close()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.stdout.close()
