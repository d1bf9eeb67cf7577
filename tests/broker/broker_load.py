"""Load on a broker from several threads, and what must be true of its store afterwards, whatever has happened to it.

Each thread has one request under way at most, and notes what has been acknowledged before it sends the next. So of every guest
there are as many records of releases as it has received keys, or one more for each time it was cut off.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from broker.broker_process import BrokerProcess, VerdictdGuest, VerdictdIdentity, kbs_name, new_key, resource
from broker.simulated_guest import SimulatedGuest

from csvfast.broker.store import Store
from csvfast.errors import CsvfastError

NAMES: Final = ("one", "two", "three")
"""Keys that guests ask for, all the time; the administrator puts new versions."""
_GUESTS: Final = 3
_CONNECTION_REQUESTS: Final = 20  # then a guest of Verdictd's connects anew, one of the KBS attests anew
_REST_SECONDS: Final = 0.05


@dataclass
class Ledger:
    """What has been acknowledged since the store was made.

    puts       of each key: contents in the order in which they were sent, and whether they were acknowledged
    gone       keys put and deleted again; whether the deletion was acknowledged
    received   (who, key, content): how often
    cuts       of each guest: how often its request was not answered
    """

    puts: dict[str, list[tuple[bytes, bool]]] = field(default_factory=lambda: {name: [] for name in NAMES})
    gone: dict[str, bool] = field(default_factory=dict)
    received: Counter[tuple[str, str, bytes]] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    versions: dict[str, list[bytes]] = field(default_factory=lambda: {name: [] for name in NAMES})
    released: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    @property
    def acknowledged(self) -> tuple[int, int]:
        """Keys put, keys received."""
        return sum(done for puts in self.puts.values() for _, done in puts), sum(self.received.values())

    def secrets(self) -> set[bytes]:
        """All contents there ever were."""
        return {content for puts in self.puts.values() for content, _ in puts}

    def check(self, store: Store) -> None:
        """Looks at the store of a broker that does not run, or has nothing to do."""
        found = store.verify_audit()
        assert found.intact, found
        self._check_resources(store)
        self._check_records(store)

    def _check_resources(self, store: Store) -> None:
        rows = defaultdict(list)
        for row in store.list_resources():
            rows[str(row.path)].append(row)
        for name in NAMES:
            known = self.versions[name]
            numbers = [row.version for row in rows[str(resource(name))]]
            assert numbers == list(range(1, len(numbers) + 1)), "versions follow one another"
            assert len(numbers) >= len(known)
            for number in numbers[len(known) :]:
                stored = store.resource(resource(name), number)
                assert stored is not None
                known.append(bytes(stored.content))
            # Everything acknowledged is there, in order; besides that only what was under way, and nothing else.
            sent = iter([content for content, _ in self.puts[name]])
            for content in known:
                assert content in sent, f"{name}: a content that was not sent, or in another order"
            assert {content for content, done in self.puts[name] if done} <= set(known)
            newest = store.resource(resource(name))
            assert newest is None or bytes(newest.content) == known[-1]
        for name, done in self.gone.items():
            if done:
                assert store.resource(resource(name)) is None
                assert all(row.state == "deleted" for row in rows[str(resource(name))])

    def _check_records(self, store: Store) -> None:
        put = Counter[str]()
        for entry in store.iterate_audit(after=self.checked):
            record = entry.record
            self.checked = entry.sequence
            name = record.resource.rpartition("/")[2]
            if record.outcome != "allowed" or name not in NAMES:
                continue
            if record.action == "put resource":
                put[name] += 1
                self._put_records[name] += 1
                assert record.resource_version == self._put_records[name]
            elif record.action == "release":
                assert record.resource_version is not None
                assert 1 <= record.resource_version <= len(self.versions[name])
                self.released[record.subject["key"], name, record.resource_version] += 1
        # Each version has its record, each record its version: there is no half of a change.
        assert {name: self._put_records[name] for name in NAMES} == {name: len(self.versions[name]) for name in NAMES}
        # Every key that a guest holds is on record, and beyond that only what was under way.
        total: Counter[str] = Counter()
        for (who, name, content), count in self.received.items():
            number = self.versions[name].index(content) + 1
            assert self.released[who, name, number] >= count, f"{who} has {name} version {number} without a record"
            total[who] += count
        on_record: Counter[str] = Counter()
        for (who, _, _), count in self.released.items():
            on_record[who] += count
        for who, count in on_record.items():
            assert count <= total[who] + self.cuts[who], f"{who}: {count} records of {total[who]} releases"

    _put_records: Counter[str] = field(default_factory=Counter)


class Load:
    """Guests at the KBS and Verdictd doors and an administrator, each in a thread, until `stop`. A context manager.

    In: seconds   that a request may take
        writes    an administrator puts and deletes keys meanwhile
        pause     of a guest between two requests
    """

    def __init__(
        self, broker: BrokerProcess, guest: SimulatedGuest, ledger: Ledger, *, seconds: float = 30.0, writes: bool = True,
        pause: float = 0.0,
    ) -> None:  # fmt: skip
        self._broker, self._guest, self.ledger = broker, guest, ledger
        self._seconds, self._pause = seconds, pause
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.errors: list[tuple[float, str, Exception]] = []
        """When a request failed, whose (kbs, verdictd, administrator), and how."""
        self.answered: dict[str, float] = {}
        """When a request of each kind was answered last."""
        self.defects: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(self._kbs,)) for _ in range(_GUESTS)]
        self._threads += [threading.Thread(target=self._run, args=(self._verdictd,)) for _ in range(_GUESTS)]
        if writes:
            self._threads.append(threading.Thread(target=self._run, args=(self._administrator,)))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new requests; waits for those under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._seconds + 30)
            assert not thread.is_alive(), "a client hangs"
        if self.defects:
            raise self.defects[0]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        except BaseException:
            if error is None:
                raise

    def _run(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            self.defects.append(error)
            self._stop.set()

    def _failed(self, kind: str, who: str, error: Exception) -> None:
        with self._lock:
            self.errors.append((time.monotonic(), kind, error))
            if who:
                self.ledger.cuts[who] += 1
        self._stop.wait(_REST_SECONDS)

    def _received(self, kind: str, who: str, name: str, content: bytes) -> None:
        with self._lock:
            self.ledger.received[who, name, content] += 1
        self.answered[kind] = time.monotonic()
        if self._pause:
            self._stop.wait(self._pause)

    def _kbs(self) -> None:
        chance = random.Random()
        while not self._stop.is_set():
            with self._broker.kbs_guest(self._guest, timeout=self._seconds) as client:
                who = kbs_name(client)
                try:
                    client.handshake()
                    for _ in range(_CONNECTION_REQUESTS):
                        if self._stop.is_set():
                            return
                        name = chance.choice(NAMES)
                        self._received("kbs", who, name, bytes(client.get_resource(resource(name))))
                except CsvfastError as error:
                    self._failed("kbs", who, error)

    def _verdictd(self) -> None:
        chance = random.Random()
        identity: VerdictdIdentity = self._broker.verdictd_identity(self._guest)
        who = identity.key.spki_sha256.hex()
        while not self._stop.is_set():
            try:
                with VerdictdGuest(self._broker.verdictd, identity, timeout=self._seconds) as client:
                    for _ in range(_CONNECTION_REQUESTS):
                        if self._stop.is_set():
                            return
                        name = chance.choice(NAMES)
                        self._received("verdictd", who, name, client.key(name))
            except (CsvfastError, OSError, KeyError, ValueError) as error:
                # ValueError: the reply was cut off.
                self._failed("verdictd", who, error)

    def _administrator(self) -> None:
        count = 0
        ledger = self.ledger
        while not self._stop.is_set():
            count += 1
            name, content = NAMES[count % len(NAMES)], new_key()
            try:
                with self._broker.administrator(timeout=self._seconds) as administrator:
                    if count % 4 == 0:
                        name = f"gone-{content.hex()[:16]}"
                        ledger.gone[name] = False
                        administrator.put(str(resource(name)), content)
                        administrator.delete(str(resource(name)))
                        ledger.gone[name] = True
                    else:
                        with self._lock:
                            ledger.puts[name].append((content, False))
                        administrator.put(str(resource(name)), content)
                        ledger.puts[name][-1] = (content, True)
            except (CsvfastError, AssertionError) as error:  # an answer other than 200
                self._failed("administrator", "", error)
            else:
                self.answered["administrator"] = time.monotonic()
                self._stop.wait(0.01)


def put_first(broker: BrokerProcess, ledger: Ledger) -> None:
    """Every key has a first version."""
    with broker.administrator() as administrator:
        for name in NAMES:
            content = new_key()
            ledger.puts[name].append((content, False))
            administrator.put(str(resource(name)), content)
            ledger.puts[name][-1] = (content, True)


def check_file(path: Path) -> None:
    """SQLite finds nothing wrong with its file."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
