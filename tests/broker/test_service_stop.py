"""How a whole broker ends: told to under load, or because it cannot start; and what it says then."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from broker.broker_load import Ledger, Load, put_first
from broker.broker_process import BrokerProcess, LockedGuest, new_key
from broker.services import PostgresCluster
from broker.simulated_guest import SimulatedMachine

from csvfast.broker.master import FileMaster
from csvfast.cli import main

SOON: Final = 10.0
"""Seconds until it has ended, on a machine that is busy with its clients."""
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
SOCKETS: Final = ("keyprovider.sock", "clientapi.sock")


# ---- When it is told to


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_load(
    number: signal.Signals, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    ledger = Ledger()
    broker = BrokerProcess(tmp_path / "broker", broker_machine)
    with broker:
        broker.allow(broker_guest)
        put_first(broker, ledger)
        assert all((broker.directory / name).is_socket() for name in SOCKETS)
        with Load(broker, broker_guest, ledger):
            time.sleep(0.5)
            since = time.monotonic()
            assert broker.stop(number) == 0
            seconds = time.monotonic() - since
        assert seconds < SOON
        assert not any((broker.directory / name).exists() for name in SOCKETS)
        # The log of the database has been written back, too: the file alone is all there is.
        assert not (broker.directory / "broker.db-wal").exists()
        with broker.store() as store:
            ledger.check(store)
        broker.start()
        assert broker.stop(number) == 0
    events = broker.events()
    assert sum(one["event"] == "stopping" for one in events) == 2
    assert not [one for one in events if "exception" in one or one["level"] in ("error", "critical")]
    print(f"{number.name}: ended {seconds:.2f} s after it was told to, {ledger.acknowledged} puts and releases kept")


def test_with_connections_that_do_nothing(
    broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    """Nobody keeps it from ending: neither guests that are connected, nor strangers in the middle of something."""
    with BrokerProcess(tmp_path / "broker", broker_machine) as broker, ExitStack() as stack:
        broker.allow(broker_guest)
        stack.enter_context(broker.verdictd_guest(broker_guest)).ask("version")
        stack.enter_context(broker.kbs_guest(broker_guest)).handshake()
        for opening in (b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"):
            for name in ("verdictd", "kbs"):
                host, _, port = broker.doors[name].partition(":")
                stranger = stack.enter_context(socket.create_connection((host, int(port)), 10))
                stranger.sendall(opening)
            for name in SOCKETS:
                stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
                stranger.connect(str(broker.directory / name))
                stranger.sendall(PREFACE[: 8 * len(opening)])
        time.sleep(0.2)
        since = time.monotonic()
        assert broker.stop() == 0
        seconds = time.monotonic() - since
        print(f"ended after {seconds:.2f} s")
        assert seconds < SOON


def test_told_while_it_starts(broker_machine: SimulatedMachine, tmp_path: Path) -> None:
    """At any moment: it ends, and the next start works."""
    broker = BrokerProcess(tmp_path / "broker", broker_machine)
    for turn in range(4):
        broker.spawn()
        time.sleep(0.25 * turn)
        assert broker.stop(seconds=SOON) in (0, -signal.SIGTERM)
    with broker:
        assert broker.stop() == 0
    broker.events()


def test_without_its_database(
    postgres: PostgresCluster, postgres_url: str, broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path
) -> None:
    """PostgreSQL is down, guests ask all the same: it ends when it is told to, and says so in its log."""
    ledger = Ledger()
    with BrokerProcess(tmp_path / "broker", broker_machine, url=postgres_url) as broker:
        broker.allow(broker_guest)
        put_first(broker, ledger)
        with Load(broker, broker_guest, ledger):
            time.sleep(0.3)
            postgres.kill()
            time.sleep(0.3)
            since = time.monotonic()
            assert broker.stop() == 0
            assert time.monotonic() - since < 2 * SOON
        postgres.start()
        with broker.store() as store:
            ledger.check(store)


# ---- When it cannot start

Prepare = Callable[[Path], None]


def rewrite(name: str, old: str, new: str) -> Prepare:
    def prepare(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return prepare


def mode(name: str, bits: int) -> Prepare:
    return lambda directory: (directory / name).chmod(bits)


def content(name: str, data: bytes) -> Prepare:
    return lambda directory: (directory / name).write_bytes(data) and None


def gone(name: str) -> Prepare:
    return lambda directory: (directory / name).unlink()


def other_master(directory: Path) -> None:
    (directory / "master.key").unlink()
    FileMaster.create(directory / "master.key").close()


VERDICTD, KBS = '[verdictd]\nlisten = "127.0.0.1:0"', '[kbs]\nlisten = "127.0.0.1:0"'
CASES: Final[list[tuple[str, int, str, Prepare]]] = [
    ("no directory", 3, "No such file", shutil.rmtree),
    ("no configuration", 3, "broker.toml", gone("broker.toml")),
    ("no TOML", 2, "syntax", content("broker.toml", b"[store\n")),
    ("no UTF-8", 2, "syntax", content("broker.toml", b"# \xff\n")),
    ("unknown table", 2, "surprise", rewrite("broker.toml", "[verdictd]", "[surprise]\na = 1\n\n[verdictd]")),
    ("unknown member", 2, "kbs.colour", rewrite("broker.toml", "[kbs]", '[kbs]\ncolour = "red"')),
    ("unknown limit", 2, "limits.patience", rewrite("broker.toml", "[limits]", "[limits]\npatience = 1")),
    ("impossible limit", 2, "request_burst", rewrite("broker.toml", "[limits]", "[limits]\nrequest_burst = 0")),
    ("unknown master", 2, "master", rewrite("broker.toml", 'kind = "file"', 'kind = "memory"')),
    ("unknown administrator", 2, "administration", rewrite("broker.toml", "[kbs]", "[administration]\nking = []\n\n[kbs]")),
    ("wrong address", 2, "listen", rewrite("broker.toml", KBS, KBS.replace("127.0.0.1:0", "nowhere"))),
    ("plain HTTP to everybody", 2, "without TLS", rewrite("broker.toml", KBS, KBS.replace("127.0.0.1", "0.0.0.0"))),
    ("gRPC to everybody", 2, "keyprovider", rewrite("broker.toml", "unix:keyprovider.sock", "0.0.0.0:0")),
    ("another's address", 3, "listen", rewrite("broker.toml", VERDICTD, VERDICTD.replace("127.0.0.1", "192.0.2.1"))),
    ("another master key", 1, "master key", other_master),
    ("no master key", 3, "master.key", gone("master.key")),
    ("half a master key", 3, "master.key", content("master.key", bytes(16))),
    ("master key for all", 3, "master.key", mode("master.key", 0o644)),
    ("TLS key for all", 3, "tls.key", mode("tls.key", 0o644)),
    ("no TLS key", 3, "tls.key", gone("tls.key")),
    ("rubbish for a TLS key", 2, "key", content("tls.key", b"rubbish")),
    ("directory for all", 3, "mode 0755", lambda directory: directory.chmod(0o755)),
    ("database for all", 3, "broker.db", mode("broker.db", 0o644)),
    ("no database", 3, "broker.db", gone("broker.db")),
    ("empty database", 3, "broker.db", content("broker.db", b"")),
    ("rubbish for a database", 3, "broker.db", content("broker.db", b"rubbish" * 1000)),
    ("no root", 3, "root-0.cert", gone("root-0.cert")),
    ("rubbish for a root", 2, "trust.roots", content("root-0.cert", bytes(832))),
    ("no socket in its place", 3, "clientapi.sock", content("clientapi.sock", b"a file")),
    ("no server", 3, "127.0.0.1", rewrite("broker.toml", "sqlite:///broker.db", "postgresql://nobody:pAsswOrd@127.0.0.1:1/none")),
    ("no such database", 2, "database", rewrite("broker.toml", "sqlite:///broker.db", "mysql://nobody:pAsswOrd@127.0.0.1/none")),
]


@pytest.fixture(scope="module")
def template(broker_machine: SimulatedMachine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BrokerProcess(tmp_path_factory.mktemp("stop") / "broker", broker_machine).directory


def serve(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "csvfast", "broker", "serve", str(directory)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


def check_one_line(ended: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """Of what went wrong; before it may be lines of the log."""
    lines = ended.stderr.splitlines()
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert "pAsswOrd" not in ended.stderr
    last = lines.pop()
    assert last.startswith("csvfast: error: ")
    assert words in last
    assert all(json.loads(line)["level"] == "info" for line in lines), ended.stderr


FORKING: Final = """
import os, signal, sys
import csvfast.broker.kbs.server, csvfast.broker.service, csvfast.broker.store
from csvfast.cli import main
for directory in sys.argv[1:]:
    process = os.fork()
    if not process:
        signal.alarm(30)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{directory}.{name}", os.O_CREAT | os.O_WRONLY, 0o600), number)
        code = 99
        try:
            code = main(["broker", "serve", directory])
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Serves each directory in a fork of a process that has imported everything already: dozens in the time of one."""


def test_what_keeps_it_from_starting(template: Path, tmp_path: Path) -> None:
    directories = [tmp_path / str(number) for number in range(len(CASES))]
    for directory, (_, _, _, prepare) in zip(directories, CASES, strict=True):
        shutil.copytree(template, directory)
        prepare(directory)
    command = [sys.executable, "-c", FORKING, *map(str, directories)]
    codes = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout.split()
    problems = []
    for directory, (name, code, words, _), found in zip(directories, CASES, codes, strict=True):
        said = [directory.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
        try:
            check_one_line(subprocess.CompletedProcess([], int(found), *said), code, words)
            assert not [path.name for path in directory.glob("*.sock") if path.is_socket()]
        except (AssertionError, ValueError) as error:
            problems.append(f"{name}: {error}")
    assert not problems, "\n\n".join(problems)


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("door", ["verdictd", "kbs"])
def test_port_in_use(door: str, template: Path, tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    shutil.copytree(template, directory)
    with listening() as port:
        rewrite("broker.toml", f'[{door}]\nlisten = "127.0.0.1:0"', f'[{door}]\nlisten = "127.0.0.1:{port}"')(directory)
        check_one_line(serve(directory), 3, f"127.0.0.1:{port}")
    assert not any((directory / name).exists() for name in SOCKETS)


def test_two_in_one_directory(broker_machine: SimulatedMachine, broker_guest: LockedGuest, tmp_path: Path) -> None:
    """The second does not start, and takes nothing away from the first."""
    with BrokerProcess(tmp_path / "broker", broker_machine) as broker:
        broker.allow(broker_guest)
        text = broker.configuration.read_text()
        check_one_line(serve(broker.directory), 3, "cannot listen")  # the same ports
        for address in broker.doors.values():
            text = text.replace(address, "127.0.0.1:0") if address.startswith("127.") else text
        broker.configuration.write_text(text)
        check_one_line(serve(broker.directory), 3, "keyprovider.sock")  # the same sockets
        assert all((broker.directory / name).is_socket() for name in SOCKETS)
        with broker.administrator() as administrator, broker.verdictd_guest(broker_guest) as guest:
            administrator.put("default/key/one", key := new_key())
            assert guest.key("one") == key
        assert broker.stop() == 0


def test_init_shows_no_password(postgres_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broker", "init", str(tmp_path / "broker"), "--store", postgres_url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["store"]
    password = postgres_url.partition("://")[2].partition(":")[2].partition("@")[0]
    assert password not in shown
    assert shown.startswith("postgresql")


def test_log_after_an_unforeseen_error(template: Path) -> None:
    """Whatever happens once it serves, standard error has nothing but JSON."""
    program = """
import sys, threading, warnings
import csvfast.broker.service as service
from csvfast.cli import main

def run(config, open_store, ready):
    ready({})
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    warnings.warn("careful", UserWarning)
    import logging
    logging.getLogger("somebody.else").error("a line\\nand another")
    class Broken:
        def __del__(self):
            raise ValueError("in a finalizer")
    Broken()
    raise RuntimeError("unforeseen")

service.run = run
sys.exit(main(["broker", "serve", sys.argv[1], "--json"]))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "default", "-c", program, str(template)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    events = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 3
    assert [one["event"].split(":")[0] for one in events if one["logger"] != "py.warnings"] == [
        "a thread failed", "a line\nand another", "ignored exception", "stopped by an error",
    ]  # fmt: skip
    assert any("careful" in one["event"] for one in events)


def test_memory_is_kept_private() -> None:
    program = """
import ctypes, resource
from csvfast.broker.process import keep_memory_private
keep_memory_private()
keep_memory_private()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout
    assert shown == f"(0, 0) {0 if sys.platform == 'linux' else -1}\n"


@pytest.mark.parametrize("setting", ["platform", "library", "limit"])
def test_memory_where_the_system_offers_less(setting: str) -> None:
    program = f"""
import ctypes, resource, sys
from csvfast.broker import process
def missing(*arguments, **members):
    raise OSError("no such thing")
match {setting!r}:
    case "platform": sys.platform = "elsewhere"
    case "library": ctypes.CDLL = missing
    case "limit": resource.setrlimit = missing
process.keep_memory_private()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
