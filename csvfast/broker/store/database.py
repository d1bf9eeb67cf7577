"""Connections to the broker's database: SQLite in a file of its own, or PostgreSQL.

SQLite: write-ahead log, synchronous=FULL (a commit that has returned is on the disk), secure_delete (freed bytes are
overwritten). One connection writes, with BEGIN IMMEDIATE; others read, query_only, each transaction a snapshot that waits for no
writer. The file must be the user's own and closed to others. When file or log have been removed or replaced underneath,
everything is refused.

PostgreSQL: through psycopg; synchronous_commit at least "on", lock, statement and idle timeouts, keep-alives. Readers see one
snapshot a transaction (REPEATABLE READ, read only), the writer locks the row it changes (READ COMMITTED, SELECT FOR UPDATE).

Every failure of the database is an UnavailableError, without parameters of statements or passwords in its text.
Thread-safety: `read` and `erase` from any thread; `connect_writer` gives a connection for one thread.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event, inspect, make_url, select
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from csvfast._extras import need
from csvfast.broker.store.schema import SCHEMA_VERSION, meta, metadata
from csvfast.errors import ArgumentError, StateError, UnavailableError

__all__ = ["Database", "describe"]

T = TypeVar("T")

_BUSY_SECONDS: Final = 10.0
_LOCK_MILLISECONDS: Final = 10_000
_STATEMENT_MILLISECONDS: Final = 30_000
_ERASE_SECONDS: Final = 15.0
_READERS: Final = 8
_CREATING: Final = 0x63737666  # key of PostgreSQL's advisory lock while tables are made: "csvf"

_MESSAGE_LIMIT: Final = 200  # characters of a driver's message that are passed on


def describe(error: BaseException) -> str:
    """What a driver said, in one line: neither the statement nor its parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines() if isinstance(error, (DBAPIError, OSError, sqlite3.Error)) else []
    return f"{type(cause).__name__}: {lines[0][:_MESSAGE_LIMIT]}" if lines else type(cause).__name__


class Database:
    """A database with our tables in it.

    In: url          "sqlite:////absolute/path" or "postgresql://user@host/name" (psycopg)
        initialise   fills new tables, in the transaction that makes them; None: the tables must be there
    StateError: no tables, tables of another version, a file that others can read. UnavailableError: cannot be reached.
    ArgumentError: no URL of these two kinds.
    """

    def __init__(self, url: str, *, initialise: Callable[[Connection], None] | None = None) -> None:
        try:
            parsed = make_url(url)
        except UrlError:
            raise ArgumentError("the database's URL cannot be read; expected sqlite:///path or postgresql://...") from None
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ArgumentError(f"database {backend!r}; expected sqlite or postgresql")
        self.is_sqlite: Final = backend == "sqlite"
        self.path: Final = Path(parsed.database or "").absolute() if self.is_sqlite else None
        self.name: Final = str(self.path) if self.is_sqlite else parsed.set(query={}).render_as_string(hide_password=True)
        self.placeholder: Final = "?" if self.is_sqlite else "%s"
        self._identity: tuple[int, int] | None = None
        if self.path is not None:
            if not parsed.database or parsed.database == ":memory:":
                raise ArgumentError("an SQLite store needs a file: sqlite:////absolute/path")
            _prepare_file(self.path, create=initialise is not None)
            status = self.path.stat()
            self._identity = status.st_dev, status.st_ino
            self._writer = create_engine(
                "sqlite://", creator=lambda: self._connect_sqlite(False), poolclass=NullPool, hide_parameters=True
            )
            self._reader = create_engine(
                "sqlite://",
                creator=lambda: self._connect_sqlite(True),
                poolclass=QueuePool,
                pool_size=_READERS,
                max_overflow=_READERS,
                pool_timeout=_BUSY_SECONDS,
                hide_parameters=True,
            )
            event.listen(self._writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            event.listen(self._reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        else:
            need("postgres", "psycopg")
            parsed = parsed.set(drivername="postgresql+psycopg")
            self._writer = _postgres(parsed, poolclass=NullPool, isolation_level="READ COMMITTED")
            self._reader = _postgres(
                parsed,
                poolclass=QueuePool,
                pool_size=_READERS,
                max_overflow=_READERS,
                pool_timeout=_BUSY_SECONDS,
                isolation_level="REPEATABLE READ",
                read_only=True,
            )
        try:
            self._open(initialise)
        except BaseException:
            self.close()
            raise

    # ---- Opening

    def _open(self, initialise: Callable[[Connection], None] | None) -> None:
        try:
            with self._writer.begin() as connection:
                if not self.is_sqlite:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CREATING})")
                if not inspect(connection).has_table(meta.name):
                    if initialise is None:
                        raise StateError(f"{self.name}: holds no store; make one first")
                    metadata.create_all(connection, checkfirst=False)
                    connection.execute(meta.insert(), {"name": "schema", "value": SCHEMA_VERSION})
                    initialise(connection)
                found = connection.scalar(select(meta.c.value).where(meta.c.name == "schema"))
            if found != SCHEMA_VERSION:
                raise StateError(f"{self.name}: schema {str(found)[:20]!r}; this release reads {SCHEMA_VERSION!r}")
        except SQLAlchemyError as error:
            if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.DatabaseError):
                text = str(error.orig)
                if "not a database" in text or "malformed" in text:
                    raise StateError(f"{self.name}: {text}") from None
            raise self._unavailable(error) from None

    def _connect_sqlite(self, read_only: bool) -> sqlite3.Connection:
        assert self.path is not None
        self.check_file()
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # BEGIN is ours
            check_same_thread=False,
            cached_statements=256,
        )
        # Somebody may have written text that is none: it is for whoever reads it to say which row that is.
        connection.text_factory = _decode
        try:
            settings = ["synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY", "trusted_schema=OFF"]
            settings += ["query_only=ON"] if read_only else []
            if not read_only:
                mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if mode != "wal":
                    raise StateError(f"{self.path}: journal mode {mode!r}; this file system cannot do write-ahead logging")
            for setting in settings:
                connection.execute(f"PRAGMA {setting}").fetchall()
            if connection.execute("PRAGMA synchronous").fetchone()[0] != 2:
                raise StateError(f"{self.path}: SQLite does not write synchronously")
            self.check_file()
        except BaseException:
            connection.close()
            raise
        return connection

    # ---- Use

    def check_file(self) -> None:
        """UnavailableError when the file is no longer the one that was opened. About 2 microseconds."""
        if self.path is None:
            return
        try:
            status = os.stat(self.path)  # noqa: PTH116  # twice a commit: pathlib is slower
        except OSError as error:
            raise UnavailableError(f"{self.path}: {error.strerror}; the database has been removed") from None
        if (status.st_dev, status.st_ino) != self._identity:
            raise UnavailableError(f"{self.path}: is another file than the one that was opened")

    def log_identity(self) -> tuple[int, int] | None:
        """Which file the write-ahead log is; it stays the same while a connection is open. None without one."""
        if self.path is None:
            return None
        try:
            status = os.stat(f"{self.path}-wal")  # noqa: PTH116
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def connect_writer(self) -> Connection:
        """The connection of the one thread that writes. UnavailableError."""
        try:
            return self._writer.connect()
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._unavailable(error) from None

    def read(self, function: Callable[[Connection], T]) -> T:
        """Runs `function` in a read-only transaction; once more when a pooled connection turns out to be dead.

        UnavailableError. What `function` raises itself passes through.
        """
        for last in (False, True):
            self.check_file()
            try:
                with self._reader.connect() as connection, connection.begin():
                    return function(connection)
            except (SQLAlchemyError, sqlite3.Error) as error:
                if last or not (isinstance(error, DBAPIError) and error.connection_invalidated):
                    raise self._unavailable(error) from None
        raise AssertionError("unreachable")

    def erase(self) -> None:
        """Overwrites what has been deleted, as far as the database can.

        SQLite: the pages are already overwritten; the log that still shows them is written back and cut to nothing.
        PostgreSQL: VACUUM takes dead rows out of their pages; its own log and backups are outside our reach.
        UnavailableError when something keeps that from happening.
        """
        try:
            if self.is_sqlite:
                self._cut_log()
                return
            with self._writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                for name in ("resources", "internal_keys", "wrapping_keys"):
                    connection.exec_driver_sql(f"VACUUM {name}")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._unavailable(error) from None

    def _cut_log(self) -> None:
        connection = self._connect_sqlite(False)
        try:
            # A pending checkpoint stops writers, so it waits shortly and often rather than once and long.
            connection.execute("PRAGMA busy_timeout=100")
            deadline = time.monotonic() + _ERASE_SECONDS
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] != 0:
                if time.monotonic() > deadline:
                    raise UnavailableError("deleted, but a reader keeps old bytes in the write-ahead log: delete again")
                time.sleep(0.05)
        finally:
            connection.close()

    def close(self) -> None:
        """Closes connections that nobody uses."""
        self._reader.dispose()
        self._writer.dispose()

    def _unavailable(self, error: BaseException) -> UnavailableError:
        return UnavailableError(f"{self.name}: {describe(error)}")


def _decode(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _prepare_file(path: Path, create: bool) -> None:
    if create and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            # Before SQLite can, which would ask the umask who may read it. The log gets the mode of the file.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        status = path.stat()
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise StateError(f"{path}: is no regular file")
    if status.st_uid != os.geteuid():
        raise StateError(f"{path}: belongs to user {status.st_uid}; expected {os.geteuid()}")
    if status.st_mode & 0o077:
        raise StateError(f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets other users in; expected none of 0077")


def _postgres(url: Any, *, read_only: bool = False, **engine: Any) -> Engine:
    options = [
        f"-c lock_timeout={_LOCK_MILLISECONDS}",
        f"-c statement_timeout={_STATEMENT_MILLISECONDS}",
        f"-c idle_in_transaction_session_timeout={_STATEMENT_MILLISECONDS}",
    ]
    if read_only:
        options.append("-c default_transaction_read_only=on")
    given = url.query.get("options")
    arguments: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "application_name": "csvfast",
        "options": " ".join(([given] if isinstance(given, str) else []) + options),
    }
    result = create_engine(url, connect_args=arguments, hide_parameters=True, **engine)

    def durable(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone()[0] in ("off", "local"):
                cursor.execute("SET synchronous_commit = on")
            cursor.execute("SHOW fsync")
            fsync = cursor.fetchone()[0]
        connection.commit()
        if fsync != "on":
            connection.close()
            raise StateError("PostgreSQL runs with fsync=off: a commit would not be on disk")

    if not read_only:
        event.listen(result, "connect", durable)
    return result
