"""What the `csvfast broker` commands share: opening a broker's store for its owner, and the options for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, cast

import typer

from csvfast.cli.common import CommandError

if TYPE_CHECKING:
    from csvfast.broker.administration import Administration
    from csvfast.broker.clients.administration import KbsAdministration
    from csvfast.broker.config import BrokerConfig
    from csvfast.broker.model import ResourcePath
    from csvfast.broker.store import Store
    from csvfast.crypto import Secret

__all__ = [
    "REMOTE",
    "Config",
    "Json",
    "Path_",
    "check_output",
    "desk",
    "directory_of",
    "moment",
    "open_store",
    "path_of",
    "read_input",
    "shown_moment",
    "write_secret",
]

Config = Annotated[
    str,
    typer.Option(
        "--config", "-c", metavar="DIR|URL", envvar="CSVFAST_BROKER",
        help="The broker's directory or TOML file, for its owner; or https://HOST:PORT of its KBS door, with a token.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Path_ = Annotated[str, typer.Argument(metavar="PATH", help="repository/type/tag, kbs:///..., or a key id below default/key.")]

_INPUT_LIMIT = (2 << 20) + 1


def open_store(config: BrokerConfig) -> Store:
    """The store behind a configuration, unlocked. StateError, UnavailableError, AuthenticationError (another master key)."""
    from csvfast.broker.master import open_master
    from csvfast.broker.store import Store

    return Store.open(config.store_url, open_master(config.master, base=config.base))


@dataclass
class Remote:
    """How to administer a broker elsewhere; set by the options of `csvfast broker` itself."""

    token_file: Path | None = None
    ca: Path | None = None


REMOTE: Final = Remote()


def directory_of(config: str) -> Path:
    """The directory or file of a broker on this machine. CommandError for a URL."""
    if "://" in config:
        raise CommandError(f"--config {config}: this needs the broker's directory")
    return Path(config)


@contextmanager
def desk(config: str) -> Iterator[Administration | KbsAdministration]:
    """Administration of a broker: by its owner, beside the running broker or without it, or through its KBS door."""
    if "://" in config:
        with _remote(config) as remote:
            yield remote
        return
    from csvfast.broker.administration import Administration
    from csvfast.broker.config import BrokerConfig

    store = open_store(BrokerConfig.load(config))
    try:
        yield Administration(store)
    finally:
        store.close()


def _remote(url: str) -> KbsAdministration:
    from csvfast.broker.clients.administration import KbsAdministration
    from csvfast.broker.clients.http import Tls
    from csvfast.certs.private import read_private_file
    from csvfast.crypto import Secret

    if REMOTE.token_file is None:
        raise CommandError("--config with a URL needs `csvfast broker --token-file FILE ...`, or CSVFAST_BROKER_TOKEN_FILE")
    path = REMOTE.token_file
    token = bytes(read_private_file(path.parent, path.name, 16 << 10)).strip()
    if not token:
        raise CommandError(f"{path}: empty; expected a token")
    return KbsAdministration(url, Secret(token), tls=Tls(ca=REMOTE.ca))


def path_of(text: str) -> ResourcePath:
    """A resource path as people type it."""
    from csvfast.broker.model import for_kid

    return for_kid(text)


def read_input(file: str) -> bytes:
    """At most 2 MiB of a file; "-" is standard input. OSError, CommandError when there is more."""
    if file == "-":
        data = sys.stdin.buffer.read(_INPUT_LIMIT)
    else:
        with Path(file).open("rb") as source:
            data = source.read(_INPUT_LIMIT)
    if len(data) == _INPUT_LIMIT:
        raise CommandError(f"{file}: more than {_INPUT_LIMIT - 1} bytes; expected at most that")
    return data


def check_output(output: str) -> None:
    """Where a secret is to be written, before it is asked for: a new file, or standard output ("-") that is no terminal."""
    if output != "-":
        if os.path.lexists(output):
            raise CommandError(f"{output}: exists; nothing was overwritten")
    elif sys.stdout.isatty():
        raise CommandError("the secret would appear on the terminal: expected --output FILE, or a pipe")


def write_secret(secret: Secret, output: str) -> None:
    """Writes a secret to a new file of its owner's alone, or to standard output ("-"); see `check_output`."""
    from csvfast.certs.private import write_private_file

    check_output(output)
    if output != "-":
        write_private_file(Path(output), memoryview(secret))
        return
    stream = cast("BinaryIO", sys.stdout.buffer)
    stream.write(memoryview(secret))
    stream.flush()


def moment(text: str | None, option: str) -> float | None:
    """Seconds since the epoch of "30d", "12h", "45m", "90s" from now, or of an ISO 8601 time in UTC; None for "never"."""
    if text is None or text == "never":
        return None
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if text[:-1].isdigit() and text[-1] in units:
        return (datetime.now(UTC) + timedelta(seconds=int(text[:-1]) * units[text[-1]])).timestamp()
    try:
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        expected = "30d, 12h, 45m, 90s, never, or a time like 2027-01-31T12:00:00Z"
        raise CommandError(f"{option}: {text!r}; expected {expected}") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def shown_moment(seconds: float | None) -> str:
    """A time for people."""
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
