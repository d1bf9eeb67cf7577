"""Several brokers on one store at once: one chain, one generation, nothing lost and nothing twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from broker.stores import PATH, Program, record

from csvfast.broker.master import FileMaster
from csvfast.broker.store import Job, Store


def test_two_processes_flood_one_store(store_url: str, master_file: Path) -> None:
    Store.open(store_url, FileMaster(master_file), create=True).close()
    programs = [Program("store_writer.py", store_url, str(master_file), "flood", name) for name in "ab"]
    lines: dict[str, list[str]] = {"a": [], "b": []}

    def read(program: Program, into: list[str]) -> None:
        assert program.line() == "open"
        until = time.monotonic() + 4
        while time.monotonic() < until and (line := program.line()):
            into.append(line)

    threads = [threading.Thread(target=read, args=(one, lines[name])) for one, name in zip(programs, "ab", strict=True)]
    for thread in threads:
        thread.start()
    with Store.open(store_url, FileMaster(master_file)) as store:  # a third one, which looks on and changes things
        for number in range(20):
            store.put_policy("resource", "default", "rules", str(number), record(reason="c.policy"))
            store.look()
            assert store.snapshot().policies["resource", "default"].text == str(number)
            time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    for program, name in zip(programs, "ab", strict=True):
        lines[name] += program.kill()
    with Store.open(store_url, FileMaster(master_file)) as store:
        assert store.verify_audit().intact
        written = Counter(one.record.reason for one in store.iterate_audit())
        for name in "ab":
            acknowledged = [line.split()[1] for line in lines[name] if line.startswith("record")]
            assert len(acknowledged) > 100
            assert all(written[reason] == 1 for reason in acknowledged)
        # Versions that both of them put are all there, each once.
        versions = [int(line.split()[1]) for name in "ab" for line in lines[name] if line.startswith("resource")]
        assert len(versions) == len(set(versions))
        rows = [row.version for row in store.list_resources()]
        assert rows == list(range(1, len(rows) + 1))
        assert set(versions) <= set(rows)
        changes = Counter(one.record.reason.rpartition(".")[2] for one in store.iterate_audit())
        assert store.generation == changes["put"] + changes["reference"] + changes["policy"]
        assert store.resource(PATH) is not None


def test_two_brokers_make_one_store(store_url: str, master_file: Path) -> None:
    stores: list[Store] = []

    def make() -> None:
        stores.append(Store.open(store_url, FileMaster(master_file), create=True))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stores) == 4
    assert len({store.identity for store in stores}) == 1
    for store in stores:
        store.committer.run(Job((record(),)))
    assert stores[0].verify_audit().count == 4
    for store in stores:
        store.close()
