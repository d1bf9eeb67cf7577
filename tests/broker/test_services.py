"""The services that other tests stand on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from broker.services import PostgresCluster


def test_postgres_database_survives_stop_and_kill(postgres: PostgresCluster, postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE numbers (number integer)"))
        for number, mode in enumerate(("fast", "immediate", "kill")):
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(f"INSERT INTO numbers VALUES ({number})"))
            postgres.restart(mode)
            engine.dispose()
            with engine.connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT count(*) FROM numbers")) == number + 1
    finally:
        engine.dispose()


def test_postgres_kill_leaves_no_process(postgres: PostgresCluster, postgres_url: str) -> None:
    process = postgres._process
    assert process is not None
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        backend = connection.info.backend_pid
        postgres.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{backend}").exists() and time.monotonic() < deadline:
            # Without an init that reaps it, a killed child of a killed parent stays as a zombie.
            if Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.01)
        else:
            assert not Path(f"/proc/{backend}").exists()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not postgres.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres_url.replace("+psycopg", ""), connect_timeout=5)


def test_postgres_runs_again_for_the_next_test(postgres: PostgresCluster) -> None:
    assert postgres.running
    assert postgres.execute("SELECT 1") == [(1,)]


def test_postgres_wants_its_password(postgres: PostgresCluster, postgres_url: str) -> None:
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"host=127.0.0.1 port={postgres.port} user={postgres.user} password=wrong dbname=postgres")


def test_postgres_close_removes_its_directory() -> None:
    cluster = PostgresCluster({"fsync": "off"})
    assert cluster.execute("SHOW fsync") == [("off",)]
    cluster.close()
    assert not cluster.directory.exists()
    assert not cluster.running
    assert os.getpgrp()  # nothing of ours was killed with it
