"""No room on the disk: nothing is acknowledged, nothing lost; when there is room again, work goes on in the same process."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker.stores import PATH, Program, record
from sqlalchemy import Connection

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store
from csvfast.errors import UnavailableError


@pytest.fixture
def program(sqlite_url: str, master_file: Path) -> Iterator[Program]:
    Store.open(sqlite_url, FileMaster(master_file), create=True).close()
    opened = Program("store_writer.py", sqlite_url, str(master_file), "obey")
    assert opened.line() == "open"
    yield opened
    opened.close()


def refilled(program: Program, make_room: Callable[[], None], url: str, master: Path) -> None:
    """Fills, makes room, fills again; then everything acknowledged is there, and nothing else."""
    acknowledged = []
    for turn in range(3):
        for number in range(100_000):
            reason = f"{turn}.{number}"
            answer = program.ask(f"record {reason}")
            if not answer.startswith("ok"):
                break
            acknowledged.append(reason)
        assert answer.startswith("UnavailableError"), answer
        assert program.ask("records 3000").startswith("UnavailableError")
        assert program.ask("put x").startswith("UnavailableError")
        assert program.ask("read seed") == "ok 1"
        make_room()
        assert program.ask(f"record {turn}.again") == "ok"
        acknowledged.append(f"{turn}.again")
        assert program.ask("verify") == "ok True"
    assert program.ask("put x") == "ok 1"
    assert program.close() == 0
    with Store.open(url, FileMaster(master)) as store:
        assert store.verify_audit().intact
        assert [one.record.reason for one in store.iterate_audit() if one.record.reason != "put"] == acknowledged


def test_file_size_limit(program: Program, sqlite_url: str, master_file: Path, tmp_path: Path) -> None:
    """The log grows until a limit of the process: SQLITE_IOERR, short writes."""
    assert program.ask("put seed") == "ok 1"
    process, (_, hard) = program.process.pid, resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
    limit = 0

    def lower() -> None:
        nonlocal limit
        sizes = [file.stat().st_size for file in (tmp_path / "store").iterdir()]
        limit = max(sizes) + 300_001
        resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, hard))

    lower()
    refilled(program, lower, sqlite_url, master_file)


def test_database_full(sqlite_url: str, master_file: Path) -> None:
    """SQLITE_FULL in the middle of a transaction with savepoints, which SQLite may roll back by itself."""
    with Store.open(sqlite_url, FileMaster(master_file), create=True) as store:
        store.put_resource(PATH, b"one", record())

        def pages(count: int) -> None:
            def limit(connection: Connection) -> None:
                used = connection.exec_driver_sql("PRAGMA page_count").scalar() or 0
                connection.exec_driver_sql(f"PRAGMA max_page_count = {used + count}")

            store.committer.run(Job(apply=limit))

        pages(20)
        written = 1
        for _ in range(1000):
            try:
                store.put_resource(PATH, b"x" * 10_000, record())
            except UnavailableError as error:
                assert "full" in str(error)  # noqa: PT017  # how often it goes well is part of what is looked at
                break
            written += 1
        assert 1 < written < 1000
        # The next batch has a new connection, without the limit.
        assert store.put_resource(PATH, b"y", record()) == written + 1
        pages(3)
        futures = [store.committer.submit(Job([record()] * 50, apply=lambda _connection: None)) for _ in range(10)]
        outcomes = [type(future.exception(30)) for future in futures]
        assert UnavailableError in outcomes
        kept = 50 * outcomes.count(type(None))
        found = store.verify_audit()
        assert found.intact
        assert found.count == written + 1 + kept


def test_a_full_file_system(tmp_path: Path, master_file: Path) -> None:
    """ENOSPC for log, database and shared memory, on a file system of 2 MiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("the system does not let this user mount a file system")
    program = None
    try:
        url = f"sqlite:///{place / 'broker.db'}"
        Store.open(url, FileMaster(master_file), create=True).close()
        ballast = [place / f"ballast{number}" for number in range(3)]
        for file in ballast:
            file.write_bytes(bytes(300_000))
        program = Program("store_writer.py", url, str(master_file), "obey")
        assert program.line() == "open"
        assert program.ask("put seed") == "ok 1"
        refilled(program, lambda: ballast.pop().unlink(), url, master_file)
    finally:
        if program is not None:
            program.process.kill()
            program.process.wait()
        subprocess.run(["umount", "-l", str(place)], check=True)
