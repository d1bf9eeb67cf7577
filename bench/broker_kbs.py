"""Rate of the KBS door: a resource for an attested session, against an empty route with two ECDH on the same server.

usage: python bench/broker_kbs.py [--seconds N] [--connections N] [--url DATABASE] [--profile]

The server runs in this process, clients in another, over loopback without TLS. Sessions are attested by a guest of a simulated
chip; the store is SQLite on --directory, so what is measured includes a durable audit record for each release. CPU times are
the server's, of its event loop and of the thread that commits.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from broker.kbs_rig import PATH, KbsRig
from broker.simulated_guest import SimulatedMachine
from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.broker.clients.kbs import KbsClient
from csvfast.broker.kbs.asgi import Reply, send_reply

OWN, PEER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()).public_key()


class Compare:
    """The application, and routes beside it to compare with."""

    def __init__(self) -> None:
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/empty":
            await send_reply(send, Reply(200, b"{}"), "0" * 16)
        elif path == "/ecdh":  # a fresh key and an agreement, as a JWE needs them
            ec.generate_private_key(ec.SECP256R1()).exchange(ec.ECDH(), PEER)
            await send_reply(send, Reply(200, b"{}"), "0" * 16)
        elif path == "/ecdh2":
            OWN.exchange(ec.ECDH(), PEER)
            OWN.exchange(ec.ECDH(), PEER)
            await send_reply(send, Reply(200, b"{}"), "0" * 16)
        else:
            await self.app(scope, receive, send)


class Client(asyncio.Protocol):
    """Asks again as soon as it has been answered."""

    def __init__(self, request: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request, self.until, self.done = request, until, done
        self.answers = 0
        self.rest = b""
        self.sent = 0.0
        self.times: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        head, found, body = self.rest.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        assert head.startswith(b"HTTP/1.1 200"), self.rest
        self.rest = b""
        self.answers += 1
        now = time.perf_counter()
        self.times.append(now - self.sent)
        if now >= self.until:
            self.transport.close()
        else:
            self.ask()

    def connection_lost(self, _error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def load(port: int, path: str, cookies: list[str], connections: int, seconds: float, queue: Any) -> None:
    import uvloop

    async def run() -> None:
        loop = asyncio.get_running_loop()
        until, clients = time.perf_counter() + seconds, []
        for number in range(connections):
            cookie = f"Cookie: kbs-session-id={cookies[number % len(cookies)]}\r\n" if cookies else ""
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\n{cookie}\r\n".encode()
            client = Client(request, until, loop.create_future())
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
            clients.append(client)
        await asyncio.gather(*(client.done for client in clients))
        times = sorted(seconds for client in clients for seconds in client.times)
        queue.put((len(times), times[len(times) // 2], times[len(times) * 99 // 100]))

    uvloop.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--url")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--switch", type=float, help="sys.setswitchinterval")
    arguments = parser.parse_args()
    if arguments.uvloop:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    if arguments.switch:
        sys.setswitchinterval(arguments.switch)
    compare = Compare()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name, SimulatedMachine() as machine:
        firmware = Path(name) / "firmware"
        firmware.write_bytes(bytes(65536))
        guest = machine.launch(firmware)
        with KbsRig(Path(name), machine.roots, app=compare, url=arguments.url) as rig:
            compare.app = rig.app
            rig.register(guest)
            cookies = []
            start = time.perf_counter()
            for _ in range(arguments.sessions):
                with KbsClient(rig.url, guest) as client:
                    client.attest()
                    cookies.append(str(client._cookie))
            print(f"attestation  {(time.perf_counter() - start) / arguments.sessions * 1e3:8.1f} ms each, one after another")
            rates = {}
            routes = {"empty": "/empty", "ecdh": "/ecdh", "two ecdh": "/ecdh2", "resource": f"/kbs/v0/resource/{PATH}"}
            for label, path in routes.items():
                queue: Any = multiprocessing.get_context("spawn").Queue()
                process = multiprocessing.get_context("spawn").Process(
                    target=load, args=(rig.port, path, cookies, arguments.connections, arguments.seconds, queue)
                )
                if arguments.profile and label == "resource":
                    rig.thread.loop.call_soon_threadsafe(start_profile)
                before = cpu_seconds(rig)
                process.start()
                count, median, high = queue.get(timeout=60)
                loop_us, commit_us = ((now - then) / count * 1e6 for now, then in zip(cpu_seconds(rig), before, strict=True))
                process.join()
                if arguments.profile and label == "resource":
                    rig.thread.loop.call_soon_threadsafe(stop_profile)
                rates[label] = count / arguments.seconds
                print(
                    f"{label:12} {rates[label]:8,.0f} /s   CPU {loop_us:4.0f} us loop {commit_us:4.0f} us committer"
                    f"   median {median * 1e3:6.2f} ms   99 % {high * 1e3:6.2f} ms"
                )
            for label in ("ecdh", "two ecdh"):
                print(f"resource : {label:9} {rates['resource'] / rates[label]:5.2f}")


def cpu_seconds(rig: KbsRig) -> tuple[float, float]:
    threads = rig.thread._thread, rig.store.committer._thread
    loop, committer = (time.clock_gettime(time.pthread_getcpuclockid(int(thread.ident or 0))) for thread in threads)
    return loop, committer


PROFILE: list[Any] = []


def start_profile() -> None:
    import cProfile

    PROFILE.append(cProfile.Profile())
    PROFILE[0].enable()


def stop_profile() -> None:
    import pstats

    PROFILE[0].disable()
    pstats.Stats(PROFILE[0]).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
