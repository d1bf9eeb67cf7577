"""A broker's store in a process of its own, for tests that kill it, starve it or let two of them race.

    store_writer.py URL MASTER_FILE flood NAME       writes records and resources as fast as it can, prints what is durable
    store_writer.py URL MASTER_FILE obey             does what each line says, prints "ok ..." or the error's class
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

from broker.stores import PATH, record

from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import Job, Store
from csvfast.errors import CsvfastError, StaleGenerationError


def say(line: str) -> None:
    """One write a line: a kill leaves whole lines."""
    os.write(1, f"{line}\n".encode())


async def flood(store: Store, name: str) -> None:
    numbers = itertools.count()

    async def releases() -> None:
        while True:
            reason = f"{name}.{next(numbers)}"
            try:
                await store.committer.commit(Job((record(reason=reason),), store.generation))
            except StaleGenerationError:
                continue
            say(f"record {reason}")

    async def resources() -> None:
        while True:
            version = await asyncio.to_thread(store.put_resource, PATH, b"content", record(reason=f"{name}.put"))
            say(f"resource {version}")
            if version % 3 == 0:
                await asyncio.to_thread(store.put_reference, "a", [version], None, record(reason=f"{name}.reference"))
                say(f"reference {version}")
            await asyncio.sleep(0.005)

    await asyncio.gather(resources(), *[releases() for _ in range(16)])


def obey(store: Store) -> None:
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        try:
            if word == "record":
                store.committer.run(Job((record(reason=argument),)))
                say("ok")
            elif word == "records":  # so many in one job, of which nothing is kept when they do not fit
                store.committer.run(Job([record(reason="many")] * int(argument)))
                say("ok")
            elif word == "put":
                path = ResourcePath("default", "key", argument)
                say(f"ok {store.put_resource(path, os.urandom(20_000), record(reason='put'))}")
            elif word == "read":
                found = store.resource(ResourcePath("default", "key", argument))
                say(f"ok {None if found is None else found.version}")
            elif word == "verify":
                say(f"ok {store.verify_audit().intact}")
        except CsvfastError as error:
            say(f"{type(error).__name__} {error}")


def main() -> None:
    url, master, what, *rest = sys.argv[1:]
    with Store.open(url, FileMaster(Path(master))) as store:
        say("open")
        if what == "flood":
            asyncio.run(flood(store, *rest))
        else:
            obey(store)


if __name__ == "__main__":
    main()
