"""What every command shares: exit codes, JSON, error messages, consoles and progress.

Nothing heavy is imported at the top: `csvfast --help` must answer at once, so rich, NumPy and the engine are imported
where a command first needs them.

Exit codes
    0   done, and every check passed
    1   a check failed: a digest other than --expect, a hash area that does not verify, evidence or certificates that are not
        genuine or not allowed, a command the firmware refuses, a broker or a registry that denies
    2   usage: an unknown option, bad hex, a value outside its documented set, content that is not what is expected there, a name
        the broker does not know or knows already;
        for cert and report also an input file that is missing or cannot be read
    3   environment: an unreadable, vanished or changed file, a missing extra, no such kernel on this CPU, no memory, a state
        directory in use, no server behind a socket, a registry that cannot be reached
    130 interrupted (Ctrl-C)

Thread-safety: everything here belongs to the main thread.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "INTERRUPTED",
    "CommandError",
    "ExitCode",
    "console",
    "exit_code_of",
    "format_bytes",
    "format_rate",
    "parse_size",
    "print_json",
    "progress",
]


class ExitCode(IntEnum):
    """What a command's process ends with; see the module's table."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3


INTERRUPTED: Final = 130  # 128 + SIGINT, what a shell reports for a program that Ctrl-C ended


class CommandError(Exception):
    """Ends a command with one line on stderr and the given exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code


def exit_code_of(error: BaseException) -> ExitCode:
    """Exit code for an exception of csvfast or of Python: what the operating system refuses is environment, what the caller
    typed is usage."""
    if isinstance(error, CommandError):
        return error.code
    declared = getattr(error, "exit_code", None)
    if isinstance(declared, int) and declared in tuple(ExitCode):
        return ExitCode(declared)
    from csvfast import errors

    if isinstance(error, errors.DeniedError):
        return ExitCode.CHECK_FAILED
    if isinstance(error, errors.AttestedTlsError):
        return ExitCode.CHECK_FAILED if error.stage in ("certificate", "binding", "verify", "appraise") else ExitCode.ENVIRONMENT
    if isinstance(error, errors.RegistryError):
        if error.status in (401, 403):
            return ExitCode.CHECK_FAILED
        return ExitCode.ENVIRONMENT if error.status in (0, 408, 429) or error.status >= 500 else ExitCode.USAGE
    if isinstance(error, (errors.UnknownError, errors.ConflictError)):
        return ExitCode.USAGE
    if isinstance(error, (OSError, ImportError, MemoryError, EOFError)):
        return ExitCode.ENVIRONMENT

    if isinstance(error, getattr(errors, "AuthenticationError", ())):
        return ExitCode.CHECK_FAILED
    if isinstance(error, (ValueError, TypeError, KeyError, IndexError, OverflowError)):
        return ExitCode.USAGE
    return ExitCode.ENVIRONMENT


def is_expected(error: BaseException) -> bool:
    """True for errors that tell the user something; anything else is a defect of csvfast and keeps its traceback."""
    from csvfast import errors

    return hasattr(error, "exit_code") or isinstance(
        error, (CommandError, errors.CsvfastError, OSError, ImportError, MemoryError)
    )


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr. Colour only on a terminal (rich also obeys NO_COLOR)."""
    from rich.console import Console

    # A pipe has no width; 120 columns keep tables whole in logs.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)


def print_json(data: Mapping[str, Any]) -> None:
    """Writes one JSON document to stdout, keys in the order given."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name that is no text, or a terminal without UTF-8
        text = json.dumps(data, indent=2)
    sys.stdout.write(text + "\n")


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB". Binary units, for sizes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_rate(bytes_per_second: float) -> str:
    """"9.87 GB/s". Decimal units, for rates."""
    for factor, unit in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if bytes_per_second >= factor:
            return f"{bytes_per_second / factor:.3g} {unit}"
    return f"{bytes_per_second:.3g} B/s"


def parse_size(text: str) -> int:
    """"64MiB", "4 KiB", "4096" -> bytes. Raises CommandError (usage) for anything else."""
    units = {"": 1, "B": 1, "K": 1024, "KIB": 1024, "M": 1024**2, "MIB": 1024**2, "G": 1024**3, "GIB": 1024**3}
    stripped = text.strip()
    digits = stripped.rstrip("BKMGIbkmgi ")
    unit = stripped[len(digits) :].strip().upper()
    if not (digits.isascii() and digits.isdigit()) or unit not in units:
        raise CommandError(f"size {text!r}: expected a whole number of bytes, KiB, MiB or GiB, such as 64MiB")
    return int(digits) * units[unit]


@contextmanager
def progress(
    description: str, total: int | None, *, unit: str = "bytes", enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and remaining time, or silence when stderr is no terminal.

        with progress("measuring disk.img", size, enabled=not as_json) as advance:
            advance(len(block))

    In: total    how far it goes, in `unit`; None = not known (a pulsing bar without remaining time)
        unit     "bytes" shows bytes and bytes per second; any other word shows a plain count
        enabled  False for --json
    The function given to the block adds to what is done; it is cheap when the bar is off.
    """
    if not (enabled and sys.stderr.isatty()):
        yield _nothing
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn | str] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    columns.append(TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(amount: int) -> None:
            bar.update(task, advance=amount)

        yield advance


def _nothing(_amount: int) -> None:
    return


def report_error(error: BaseException, stream: TextIO | None = None) -> None:
    """One line on stderr. Multi-line messages are joined: a script reads one line per error."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None and error.strerror in message:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    stream = stream or sys.stderr
    if stream is not None:  # None: closed, and print() would take standard output instead
        with suppress(OSError):  # nobody is left to be told
            print(f"csvfast: error: {message}", file=stream)
