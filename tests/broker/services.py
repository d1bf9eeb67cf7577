"""Programs that broker tests use beside Python: a PostgreSQL server, a SoftHSM2 token, skopeo.

Each fixture skips with a reason when its program is missing (tools/install-test-tools.sh installs them); CI=true lists no such
skip as expected. tests/broker/conftest.py makes the fixtures known to the tests of that folder; others import the fixture and
those it names by `from broker.services import ...`.
"""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import pytest

DEADLINE: Final = 60.0
"""Seconds that a program gets to come up or to end; a loaded machine with two cores needs a few."""


# -- PostgreSQL ------------------------------------------------------------------------------------------------------


def postgres_programs() -> Path | None:
    """The directory with initdb and postgres: $CSVFAST_POSTGRES, the newest of Debian's, or the one on PATH."""
    given = os.environ.get("CSVFAST_POSTGRES")
    if given:
        return Path(given)
    debian = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb") if (path.parent / "postgres").exists()]
    if debian:
        return max(debian, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def unprivileged() -> dict[str, Any]:
    """Arguments for subprocess: PostgreSQL refuses to run as root, so root runs it as postgres or, without that user, nobody."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise LookupError("root needs a user postgres or nobody to run PostgreSQL as")


class PostgresCluster:
    """A PostgreSQL server of our own: a new cluster in a temporary directory, on 127.0.0.1, with a random password.

    Its port stays the same over stop, kill and restart, so that a client can find it again. Not thread-safe, except that any one
    thread may stop or start it while others use its databases.

    In: settings   lines of postgresql.conf, e.g. {"fsync": "off"}
    Raises: LookupError (no programs), RuntimeError with the server's log when it does not come up.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        programs = postgres_programs()
        if programs is None:
            raise LookupError("PostgreSQL's server (initdb, postgres) is not installed")
        self.programs: Final = programs
        self.user: Final = "csvfast"
        self.password: Final = secrets.token_hex(16)
        self.port = 0
        self._settings: Final = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._options: Final = unprivileged()
        self.directory: Final = Path(tempfile.mkdtemp(prefix="csvfast-postgres-"))
        self.data: Final = self.directory / "data"
        self.log: Final = self.directory / "log"
        try:
            if "user" in self._options:
                os.chown(self.directory, self._options["user"], self._options["group"])
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise

    def _initialise(self) -> None:
        password = self.directory / "password"
        password.write_text(self.password + "\n", encoding="ascii")
        if "user" in self._options:
            os.chown(password, self._options["user"], self._options["group"])
        password.chmod(0o600)
        command = [str(self.programs / "initdb"), "--no-sync", "--locale=C.UTF-8", "--encoding=UTF8", "--auth=scram-sha-256"]
        command += ["-U", self.user, f"--pwfile={password}", "-D", str(self.data)]
        ended = subprocess.run(command, cwd="/", capture_output=True, timeout=DEADLINE, check=False, **self._options)
        password.unlink()
        if ended.returncode:
            raise RuntimeError(f"initdb: {ended.stderr.decode(errors='replace')}")
        settings = {
            "listen_addresses": "'127.0.0.1'",
            "unix_socket_directories": "''",
            "shared_buffers": "'32MB'",
            "max_connections": "100",
        } | self._settings
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())

    @property
    def running(self) -> bool:
        """Whether the server's first process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it takes connections; does nothing when it runs."""
        if self.running:
            return
        deadline = time.monotonic() + DEADLINE
        while True:
            port = self.port or _free_port()
            command = [str(self.programs / "postgres"), "-D", str(self.data), "-p", str(port)]
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    **self._options,
                )
            while self._process.poll() is None and time.monotonic() < deadline:
                if self._answers(port):
                    self.port = port
                    return
                time.sleep(0.02)
            # The port was taken meanwhile, or processes of a killed server still hold its shared memory.
            if time.monotonic() >= deadline:
                self.kill()
                raise RuntimeError(f"PostgreSQL did not come up:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)

    def _answers(self, port: int) -> bool:
        import psycopg

        try:
            psycopg.connect(self._conninfo("postgres", port), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _conninfo(self, database: str, port: int | None = None) -> str:
        return f"host=127.0.0.1 port={port or self.port} user={self.user} password={self.password} dbname={database}"

    def stop(self, mode: str = "fast") -> None:
        """Shuts the server down as pg_ctl would: "smart" waits for clients, "fast" rolls back, "immediate" crashes on purpose."""
        if self._process is None:
            return
        self._process.send_signal({"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        try:
            self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._process = None

    def kill(self) -> None:
        """kill -9 of the server and all its processes, in the middle of whatever they do."""
        if self._process is None:
            return
        first = self._process.pid
        children = _children(first)
        for process in (first, *children):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait(DEADLINE)
        self._process = None

    def restart(self, mode: str = "fast") -> None:
        """stop(mode), or kill for mode "kill"; then start."""
        if mode == "kill":
            self.kill()
        else:
            self.stop(mode)
        self.start()

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Runs one statement on a connection of its own; the rows, if it has any."""
        import psycopg

        with psycopg.connect(self._conninfo(database), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://{self.user}:{quote(self.password)}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """A new empty database; its name."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Removes a database and whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def close(self) -> None:
        """Ends the server and removes its directory."""
        with suppress(subprocess.TimeoutExpired):
            self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(parent: int) -> list[int]:
    """Processes whose parent is `parent`. PostgreSQL's leave their parent's process group, so a group cannot be killed."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # The command's name, in brackets, may hold blanks and brackets.
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found


_shared: list[PostgresCluster] = []


def shared_cluster() -> PostgresCluster:
    """The cluster that a process's tests share, started when first asked for and whenever a test has left it stopped.

    A fixture imported by several modules is several fixtures to pytest; a cluster takes seconds to make.
    """
    if not _shared:
        _shared.append(PostgresCluster())
        atexit.register(close_shared_cluster)
    _shared[0].start()
    return _shared[0]


def close_shared_cluster() -> None:
    """Ends the shared cluster, if there is one."""
    while _shared:
        _shared.pop().close()


@pytest.fixture
def postgres() -> PostgresCluster:
    """A running server that the test may stop, kill and start; the next test finds it running."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    return shared_cluster()


@pytest.fixture
def postgres_url(postgres: PostgresCluster) -> Iterator[str]:
    """SQLAlchemy's URL of a new empty database on `postgres`."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.start()
    postgres.drop_database(name)


# -- SoftHSM2 --------------------------------------------------------------------------------------------------------


def softhsm_module() -> Path | None:
    """SoftHSM2's PKCS#11 library: $CSVFAST_SOFTHSM, or where distributions keep it."""
    given = os.environ.get("CSVFAST_SOFTHSM")
    if given:
        return Path(given)
    folders = ("/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib64/pkcs11", "/usr/lib/pkcs11")
    return next((path for folder in folders if (path := Path(folder, "libsofthsm2.so")).exists()), None)


@functools.cache
def softhsm_configuration() -> Path:
    """Directory of this process's tokens, removed when it ends. Programs it starts find it as it does, by SOFTHSM2_CONF."""
    directory = Path(tempfile.mkdtemp(prefix="csvfast-softhsm-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / "tokens").mkdir()
    configuration = directory / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {directory / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(configuration)
    return directory


class SoftHsmToken(NamedTuple):
    """An initialized token: `module` is the library's path, `pin` its user's, `officer_pin` its security officer's."""

    module: str
    label: str
    pin: str
    officer_pin: str

    def util(self, *arguments: str) -> None:
        """Runs softhsm2-util in a process of its own."""
        ended = subprocess.run(["softhsm2-util", *arguments], capture_output=True, timeout=DEADLINE, check=False, text=True)
        if ended.returncode:
            raise RuntimeError(f"softhsm2-util {arguments[0]}: {ended.stderr}{ended.stdout}")

    def initialize(self, pin: str = "") -> None:
        """A new, empty token of this label."""
        pins = ("--pin", pin or self.pin, "--so-pin", self.officer_pin)
        self.util("--init-token", "--free", "--label", self.label, *pins)

    def delete(self) -> None:
        """Removes the token and the keys in it, as if it were pulled out."""
        self.util("--delete-token", "--token", self.label)


@pytest.fixture
def softhsm_token() -> Iterator[SoftHsmToken]:
    """A new token of its own label in SoftHSM2."""
    module = softhsm_module()
    if module is None or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM2 (libsofthsm2.so, softhsm2-util) is not installed")
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    softhsm_configuration()
    token = SoftHsmToken(str(module), f"test {secrets.token_hex(4)}", secrets.token_hex(6), secrets.token_hex(6))
    token.initialize()
    yield token
    with suppress(RuntimeError):
        token.delete()


# -- skopeo ----------------------------------------------------------------------------------------------------------

SKOPEO_VERSION: Final = (1, 18)
"""The first whose Debian build knows key providers."""


@functools.cache
def skopeo_command() -> tuple[str, ...] | None:
    """How to start a skopeo with key providers, or None: the one on PATH when it is new enough, else the extracted packages in
    $CSVFAST_SKOPEO or ~/.cache/csvfast/skopeo, run through the loader that came with them.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    tree = Path(os.environ.get("CSVFAST_SKOPEO") or cache / "csvfast" / "skopeo")
    loader = next(iter(sorted(tree.glob("usr/lib/*/ld-linux-*.so.*"))), None)
    commands: list[tuple[str, ...]] = [("skopeo",)] if shutil.which("skopeo") else []
    if loader is not None:
        commands.append((str(loader), "--library-path", str(loader.parent), str(tree / "usr" / "bin" / "skopeo")))
    for command in commands:
        with suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=DEADLINE, check=True).stdout
            found = re.search(r"version (\d+)\.(\d+)", shown)
            if found and (int(found[1]), int(found[2])) >= SKOPEO_VERSION:
                return command
    return None


@pytest.fixture(scope="session")
def skopeo() -> list[str]:
    """The beginning of skopeo's command line; it has no policy file, so it wants --insecure-policy."""
    command = skopeo_command()
    if command is None:
        pytest.skip("skopeo 1.18 or later is not installed")
    return list(command)
