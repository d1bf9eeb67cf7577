"""Verdictd's door under load: a server process on one core, this load generator on another. Prints JSON.

    plain       mutual TLS handshakes a second of the same server stack: a self-signed client, nothing judged, closed at once
    attested    new connections a second, each with evidence judged, one Get KEK, its record durable, then closed
    ratio       attested / plain: what attestation, policy and audit cost beside TLS
    releases    Get KEK a second on connections that are open

For each: a second of time (with both processes busy) and a second of each process's processor time; latencies in microseconds at
half that load, measured from when a request was due, so that waiting in a queue counts.

    python bench/verdictd_load.py --seconds 3 --directory /var/tmp

The generator speaks TLS with Python's ssl module and epoll, which cost less than the server, and checks every reply.
Goals: releases >= 1,500 a second; ratio as near to 1 as it gets.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import select
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

KEY = b"the key of a disk, 32 bytes long"
REQUEST = b'{"command":"Get KEK","kids":["disk"]}'
REPLY = b'{"status":"OK","data":{"disk":"%b"}}' % base64.b64encode(KEY)
GUESTS = 16


# ---- The server's process


def serve(directory: Path, url: str, core: int | None, profile: Path | None) -> None:
    from attest.simulated_evidence import MEASURE, Platform  # type: ignore[import-not-found]
    from ratstls.simulated_peers import guest, plain  # type: ignore[import-not-found]

    from csvfast.broker.administration import LOCAL, Administration
    from csvfast.broker.attestation import Trust
    from csvfast.broker.config import Address, VerdictdConfig
    from csvfast.broker.core import Broker
    from csvfast.broker.limits import Limits, LimitsConfig
    from csvfast.broker.master import FileMaster
    from csvfast.broker.model import ResourcePath
    from csvfast.broker.service import _run
    from csvfast.broker.store import Store
    from csvfast.broker.verdictd import VerdictdDoor
    from csvfast.ratstls.asynchronous import AttestedServer
    from csvfast.ratstls.peer import Requirement
    from csvfast.ratstls.stream import Stream

    pin(core)
    platform = Platform()
    for index in range(GUESTS):
        write_identity(directory / f"guest-{index}.pem", guest(platform, mnonce=os.urandom(16)))
    write_identity(directory / "plain.pem", plain())
    limits = Limits(LimitsConfig(request_rate=0, release_rate=0, subject_rate=0, failures=0))

    async def nothing(_stream: Stream) -> None: ...

    async def main() -> None:
        with Store.open(url, FileMaster.create(directory / "master.key"), create=True) as store:
            administration = Administration(store)
            administration.put_resource(LOCAL, ResourcePath.parse("default/key/disk"), KEY)
            administration.put_reference(LOCAL, "csv_measure", [MEASURE.hex()], None)
            broker = Broker(store, Trust(tuple(platform.roots)), limits)
            async with (
                VerdictdDoor(broker, VerdictdConfig(listen=Address("127.0.0.1", 0))) as door,
                AttestedServer(plain(), Requirement.unattested(), nothing) as other,
            ):
                _host, port = await other.serve("127.0.0.1", 0)
                answer({"door": int(door.address.rpartition(":")[2]), "plain": port})
                reader = asyncio.StreamReader()
                protocol = asyncio.StreamReaderProtocol(reader)
                await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
                while question := await reader.readline():
                    if question == b"records\n":
                        answer({"records": store.verify_audit().count})
                    else:
                        answer({"cpu": time.process_time()})

    if profile is None:
        _run(main)
        return
    import cProfile

    profiler = cProfile.Profile()
    try:
        profiler.runcall(_run, main)
    finally:
        profiler.dump_stats(profile)


def write_identity(path: Path, identity: Any) -> None:
    certificate = ssl.DER_cert_to_PEM_cert(identity.certificate).encode()
    path.touch(0o600)
    path.write_bytes(identity.key.dump() + certificate)


def answer(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


class Server:
    """The server as the generator sees it."""

    def __init__(self, directory: Path, url: str, core: int | None, profile: Path | None) -> None:
        command = [sys.executable, __file__, "--serve", str(directory), "--store", url]
        command += [] if core is None else ["--core", str(core)]
        command += [] if profile is None else ["--profile", str(profile)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ports = self._read()

    def ask(self, what: str) -> Any:
        """ "cpu": processor time so far. "records": verified ones in the audit log."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()[what]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server has ended")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


# ---- The generator


@dataclass
class Slot:
    """One connection at a time."""

    context: ssl.SSLContext
    connection: ssl.SSLSocket | None = None
    step: Callable[[Slot], bool] | None = None  # what to go on with; True: a round is complete
    due: float = 0.0


@dataclass
class Outcome:
    rounds: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)


class Load:
    """Rounds against one port. In: request   b"": a round is a handshake; keep   rounds on one connection"""

    def __init__(
        self, port: int, contexts: list[ssl.SSLContext], slots: int, *, request: bytes = b"", keep: bool = False
    ) -> None:
        self.port, self.request, self.keep = port, request, keep
        self.slots = [Slot(contexts[index % len(contexts)]) for index in range(slots)]
        self.poll = select.epoll()
        self.by_number: dict[int, Slot] = {}

    def run(self, seconds: float, rate: float | None = None) -> Outcome:
        """As fast as it goes, or `rate` rounds a second. The first tenth is not counted."""
        outcome = Outcome()
        idle = deque(self.slots)
        waiting: deque[float] = deque()
        begin = time.perf_counter()
        counted, end, due = begin + seconds / 10, begin + seconds, begin
        busy: set[int] = set()
        first = 0.0
        while True:
            now = time.perf_counter()
            if now < end:
                if rate is None:
                    waiting.extend([now] * (len(idle) - len(waiting)))
                else:
                    while due <= now:
                        waiting.append(due)
                        due += 1 / rate
                while waiting and idle:
                    slot = idle.popleft()
                    slot.due = waiting.popleft()
                    busy.add(id(slot))
                    self.start(slot)
            elif not busy:
                break
            elif now > end + 10:
                raise SystemExit("rounds do not end")
            wait = 0.001 if rate is None else min(max(due - now, 0.0), 0.05)
            for number, _events in self.poll.poll(wait if now < end else 0.05):
                slot = self.by_number[number]
                if self.go_on(slot):
                    now = time.perf_counter()
                    busy.discard(id(slot))
                    idle.append(slot)
                    if counted <= now <= end:
                        first = first or now
                        outcome.rounds += 1
                        outcome.latencies.append(now - slot.due)
                        outcome.seconds = now - first
        return outcome

    def close(self) -> None:
        for slot in self.slots:
            self.drop(slot)
        self.poll.close()

    def start(self, slot: Slot) -> None:
        if slot.connection is None:
            raw = socket.socket()
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.connect_ex(("127.0.0.1", self.port))
            slot.connection = slot.context.wrap_socket(raw, do_handshake_on_connect=False)
            self.by_number[slot.connection.fileno()] = slot
            self.poll.register(slot.connection, select.EPOLLOUT)
            slot.step = self.handshake
        else:
            self.ask(slot)

    def go_on(self, slot: Slot) -> bool:
        assert slot.step is not None
        assert slot.connection is not None
        try:
            return slot.step(slot)
        except ssl.SSLWantReadError:
            self.poll.modify(slot.connection, select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self.poll.modify(slot.connection, select.EPOLLOUT)
        return False

    def handshake(self, slot: Slot) -> bool:
        assert slot.connection is not None
        slot.connection.do_handshake()
        self.poll.modify(slot.connection, select.EPOLLIN)
        if self.request:
            self.ask(slot)
            return False
        slot.step = self.ended
        return self.ended(slot)

    def ask(self, slot: Slot) -> None:
        assert slot.connection is not None
        slot.connection.send(self.request)
        slot.step = self.replied

    def replied(self, slot: Slot) -> bool:
        assert slot.connection is not None
        reply = slot.connection.recv(16384)
        if reply != REPLY:
            raise SystemExit(f"another reply than expected: {reply[:200]!r}")
        if not self.keep:
            self.drop(slot)
        return True

    def ended(self, slot: Slot) -> bool:
        assert slot.connection is not None
        if slot.connection.recv(1) != b"":
            raise SystemExit("a reply where none was expected")
        self.drop(slot)
        return True

    def drop(self, slot: Slot) -> None:
        if slot.connection is not None:
            self.poll.unregister(slot.connection)
            del self.by_number[slot.connection.fileno()]
            slot.connection.close()
            slot.connection = None


def measure(server: Server, load: Load, seconds: float) -> dict[str, Any]:
    load.run(seconds / 3)
    before, own = server.ask("cpu"), time.process_time()
    full = load.run(seconds)
    own, cpu = time.process_time() - own, server.ask("cpu") - before
    half = load.run(seconds, full.rounds / full.seconds / 2)
    load.close()
    ordered = sorted(half.latencies)
    return {
        "per_second": round(full.rounds / full.seconds),
        # The first tenth is served, too, but not counted.
        "per_server_cpu_second": round(full.rounds / (cpu * 0.9)),
        "per_client_cpu_second": round(full.rounds / (own * 0.9)),
        "at_half_load": {
            "per_second": round(half.rounds / half.seconds),
            "p50_us": round(ordered[len(ordered) // 2] * 1e6),
            "p99_us": round(ordered[len(ordered) * 99 // 100] * 1e6),
        },
    }


def identity(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # measured is the server
    context.load_cert_chain(path)
    return context


def fsync_microseconds(directory: Path) -> int:
    path = directory / "fsync"
    times = []
    with path.open("wb", buffering=0) as file:
        for _ in range(50):
            before = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - before)
    path.unlink()
    return round(statistics.median(times) * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=32, help="at once")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where the store is made")
    parser.add_argument("--store", help="URL of a store to be made, instead of SQLite there")
    parser.add_argument("--only", choices=["plain", "attested", "releases"])
    parser.add_argument("--profile", type=Path, help="of the server, for pstats; slows it down")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.store, arguments.core, arguments.profile)
        return
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    pin(cores[-1] if apart else None)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as text:
        directory = Path(text)
        url = arguments.store or f"sqlite:///{directory}/broker.db"
        server = Server(directory, url, cores[0] if apart else None, arguments.profile)
        try:
            result: dict[str, Any] = {
                "cores": "one each" if apart else "one for both",
                "load_average": round(os.getloadavg()[0], 1),  # of others, before anything was started
                "store": url.partition(":")[0],
                "fdatasync_us": fsync_microseconds(directory),
            }
            plain = [identity(directory / "plain.pem")]
            guests = [identity(directory / f"guest-{index}.pem") for index in range(GUESTS)]
            count, ports = arguments.connections, server.ports
            loads = {
                "plain": lambda: Load(ports["plain"], plain, count),
                "attested": lambda: Load(ports["door"], guests, count, request=REQUEST),
                "releases": lambda: Load(ports["door"], guests, count, request=REQUEST, keep=True),
            }
            for name, make in loads.items():
                if arguments.only in (None, name):
                    result[name] = measure(server, make(), arguments.seconds)
            if arguments.only is None:
                for kind in ("per_second", "per_server_cpu_second"):
                    result.setdefault("ratio", {})[kind] = round(result["attested"][kind] / result["plain"][kind], 2)
            result["records"] = server.ask("records")
        finally:
            server.close()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
