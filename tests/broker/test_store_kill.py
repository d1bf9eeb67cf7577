"""kill -9 in the middle of whatever the store does: what had been acknowledged is there, the chain holds, work goes on."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from broker.stores import PATH, Program, record

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store

ROUNDS = int(os.environ.get("CSVFAST_KILL_ROUNDS", "12"))


@pytest.mark.timeout(30 + 15 * ROUNDS)
def test_nothing_acknowledged_is_lost(store_url: str, master_file: Path) -> None:
    generator = random.Random(20)
    Store.open(store_url, FileMaster(master_file), create=True).close()
    records: set[str] = set()
    version, reference, checked = 0, 0, 0
    for turn in range(ROUNDS):
        program = Program("store_writer.py", store_url, str(master_file), "flood", str(turn))
        assert program.line() == "open"
        lines = [program.line()]
        until = time.monotonic() + generator.uniform(0.0, 0.3)
        while time.monotonic() < until:
            lines.append(program.line())
        lines += program.kill()
        for line in lines:
            kind, _, value = line.partition(" ")
            if kind == "record":
                records.add(value)
            elif kind == "resource":
                version = max(version, int(value))
            elif kind == "reference":
                reference = max(reference, int(value))
            else:
                raise AssertionError(line)
        with Store.open(store_url, FileMaster(master_file)) as store:
            found = store.verify_audit()
            assert found.intact, found
            assert found.count >= len(records)
            written = {one.record.reason for one in store.iterate_audit(after=checked)}
            assert {one for one in records if one.startswith(f"{turn}.")} <= written
            if version:
                resource = store.resource(PATH)
                assert resource is not None
                assert resource.version >= version
                assert bytes(resource.content) == b"content"
            if reference:
                assert store.snapshot().references["a"].values[0] >= reference
            store.committer.run(Job((record(reason="between"),)))
            checked = found.count
    assert len(records) > 10 * ROUNDS
    with Store.open(store_url, FileMaster(master_file)) as store:
        written = {one.record.reason for one in store.iterate_audit()}
        assert records <= written
        # Every change of a resource has its record, and there is no record of one that was not made.
        rows = store.list_resources()
        puts = [one.record.resource_version for one in store.iterate_audit() if one.record.reason.endswith(".put")]
        assert puts == [row.version for row in rows]
