"""kill -9 of a whole broker at random: what was acknowledged is there, what was released is on record, the next start works.

CSVFAST_LONG=1: a hundred rounds.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Final

import pytest
from broker.broker_load import Ledger, Load, check_file, put_first
from broker.broker_process import BrokerProcess, LockedGuest, kbs_name, resource
from broker.simulated_guest import SimulatedMachine

LONG: Final = os.environ.get("CSVFAST_LONG") == "1"
ROUNDS: Final = {"sqlite": 50 if LONG else 6, "postgres": 50 if LONG else 4}


@pytest.mark.timeout(1800 if LONG else 180)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_killed_at_random(
    kind: str, request: pytest.FixtureRequest, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    url = str(request.getfixturevalue("postgres_url")) if kind == "postgres" else None
    chance = random.Random()
    ledger = Ledger()
    starts = []
    broker = BrokerProcess(tmp_path / "broker", broker_machine, url=url)
    with broker:
        broker.allow(broker_guest)
        put_first(broker, ledger)
        for turn in range(ROUNDS[kind]):
            if turn % 4 == 3:
                # In the middle of a start, when nobody is there yet.
                broker.stop()
                broker.spawn()
                time.sleep(chance.uniform(0.0, 1.2))
                broker.kill()
            else:
                with Load(broker, broker_guest, ledger):
                    time.sleep(chance.uniform(0.05, 1.0))
                    broker.kill()
            with broker.store() as store:
                ledger.check(store)
            if kind == "sqlite":
                check_file(broker.directory / "broker.db")
            assert not list(broker.directory.glob("*.part"))
            broker.start()
            starts.append(broker.seconds_to_start)
            # At once, at the first attempt, at both doors.
            with broker.verdictd_guest(broker_guest) as guest:
                content = guest.key("one")
                assert content == ledger.versions["one"][-1]
                ledger.received[guest.who, "one", content] += 1
            with broker.kbs_guest(broker_guest) as client:
                client.handshake()
                content = bytes(client.get_resource(resource("two")))
                assert content == ledger.versions["two"][-1]
                ledger.received[kbs_name(client), "two", content] += 1
        assert broker.stop() == 0
    with broker.store() as store:
        everything = Ledger(ledger.puts, ledger.gone, ledger.received, ledger.cuts)
        everything.check(store)
    broker.events()
    puts, received = ledger.acknowledged
    assert puts > ROUNDS[kind]
    assert received > 10 * ROUNDS[kind]
    print(f"{kind}: {ROUNDS[kind]} rounds, {puts} puts, {received} releases, slowest start {max(starts):.1f} s")
