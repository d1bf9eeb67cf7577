"""`csvfast measure batch | diff | verify`: options in, jobs run, rows, tables and statements out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, format_bytes, format_rate, print_json
from csvfast.cli.measure import app

if TYPE_CHECKING:
    from csvfast.measure import Executor, JobProgress, Row
    from csvfast.measure.fleet.statement import PublicKey

__all__ = ["app"]

FAILURES_SHOWN = 50


class BatchMode(StrEnum):
    """--mode of `measure batch`."""

    linear = "linear"
    tree = "tree"
    verity = "verity"
    launch = "launch"


class ContentChoice(StrEnum):
    """--content of `measure batch`."""

    file = "file"
    disk = "disk"


class ExecutorChoice(StrEnum):
    """--executor of `measure batch` and `measure verify`."""

    threads = "threads"
    processes = "processes"


class AccessChoice(StrEnum):
    """--access of `measure batch`."""

    read = "read"
    mmap = "mmap"


Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Tasks at once. Default: one per processor.")]
Where = Annotated[ExecutorChoice, typer.Option("--executor", help="Threads of this process, or processes.")]
Cluster = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="A Dask cluster instead: tcp://HOST:PORT, or a scheduler file.json.")
]
Key = Annotated[
    Path | None, typer.Option("--key", metavar="PEM", help="Public key, SM2 or P-256, that a statement must be signed with.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No lines for what was measured; failures are listed all the same.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, no progress bar.")]


@app.command("batch")
def batch_command(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCES...]", help="Files, block devices, directories, URLs.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Further sources: a path, URL or JSON object on each line.")
    ] = None,
    mode: Annotated[BatchMode, typer.Option(help="What is computed; with launch the sources are recipes.")] = BatchMode.linear,
    content: Annotated[
        ContentChoice, typer.Option(help="disk: what a virtual machine sees on the disk of a qcow2 image.")
    ] = ContentChoice.file,
    salt: Annotated[str, typer.Option(metavar="HEX", help="Of mode verity, 0 to 256 bytes.")] = "",
    block_size: Annotated[int, typer.Option(metavar="BYTES", help="Of mode verity.")] = 4096,
    pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only such files of directories, e.g. '*.img'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave these out.")] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Lines, appended to as it goes; what it holds and has not changed is kept."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the ledger holds.")] = False,
    jobs: Jobs = None,
    executor: Where = ExecutorChoice.threads,
    cluster: Cluster = None,
    retries: Annotated[int, typer.Option(min=0, help="Of tasks whose worker was lost.")] = 3,
    access: Annotated[
        AccessChoice, typer.Option(help="Of local files. mmap: without a copy; read: for file systems that cannot map.")
    ] = AccessChoice.mmap,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV at the end.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Parquet at the end.")] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a message that registers the digests as reference values.")
    ] = None,
    reference_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="One name for all reference values.")
    ] = None,
    summary: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page about the run, HTML.")] = None,
    statement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a signed in-toto statement (needs --sign-key).")
    ] = None,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", metavar="PEM", help="Private key, SM2 or P-256.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", metavar="FILE", help="Of an encrypted private key.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure many images: resumable, one row for each, failures at the end."""
    from csvfast.measure import Job, Options, Selection
    from csvfast.measure.fleet.statement import load_signing_key

    if not sources and manifest is None:
        raise CommandError("nothing to measure; expected SOURCES or --manifest FILE")
    if (statement is None) != (sign_key is None):
        raise CommandError("--statement and --sign-key: given without each other; expected both or neither")
    if reference_name is not None and references is None:
        raise CommandError("--reference-name: given without --references FILE")
    if fresh and ledger is None:
        raise CommandError("--fresh: given without --ledger FILE")
    key = None
    if sign_key is not None:  # a wrong password is found before hours of work
        password = None if password_file is None else password_file.read_bytes().rstrip(b"\r\n")
        key = load_signing_key(sign_key.read_bytes(), password)
    salt = "" if salt == "-" else salt.lower()
    selection = Selection(mode.value, content.value, Options(salt, block_size), tuple(pattern or ()), tuple(exclude or ()))
    with _executor(executor, jobs, cluster) as workers, _bar(json) as report, Job(
        sources or (),
        selection,
        manifest=manifest,
        executor=workers,
        jobs=jobs,
        ledger=ledger,
        fresh=fresh,
        retries=retries,
        access=access.value,
        progress=report,
    ) as job:  # fmt: skip
        if job.repaired:
            _note(f"{ledger}: a torn last line of {job.repaired} bytes was cut off")
        for row in job:
            _show_row(row, json=json, quiet=quiet)
        table = job.table
        if csv is not None:
            from csvfast.measure.fleet.table import write_csv

            write_csv(table, csv)
        if parquet is not None:
            from csvfast.measure.fleet.table import write_parquet

            write_parquet(table, parquet)
        if references is not None:
            from csvfast.measure.fleet.references import reference_message

            _write(references, reference_message(table, reference_name))
        if summary is not None:
            from csvfast.measure.fleet.summary import write_summary

            write_summary(table, summary)
        if statement is not None and key is not None:
            from csvfast.measure.fleet.statement import make_statement, sign_statement

            _write(statement, sign_statement(make_statement(table), key))
    _finish(job.table, job.progress)


@app.command("diff")
def diff_command(
    left: Annotated[Path, typer.Argument(metavar="A", help="A ledger, CSV table, statement, or lines of 'digest  path'.")],
    right: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    key: Key = None,
    json: Json = False,
) -> None:
    """Compare two lists of measurements; exit code 1 when they differ."""
    from csvfast.measure.fleet.compare import compare, read_list

    public = _public_key(key)
    found = compare(*(read_list(path, public, unsigned=True) for path in (left, right)))
    if json:
        print_json(
            {
                "equal": found.equal,
                "same": found.same,
                "added": [row.to_json() for row in found.added],
                "removed": [row.to_json() for row in found.removed],
                "changed": [{"left": one.to_json(), "right": other.to_json()} for one, other in found.changed],
            }
        )
    else:
        for row in found.removed:
            print(f"- {_outcome(row)}  {_shown(row.name)}")
        for row in found.added:
            print(f"+ {_outcome(row)}  {_shown(row.name)}")
        for one, other in found.changed:
            print(f"! {_outcome(one)} -> {_outcome(other)}  {_shown(one.name)}")
    if not found.equal:
        counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, {found.same} the same"
        raise CommandError(f"the lists differ: {counts}", ExitCode.CHECK_FAILED)


@app.command("verify")
def verify_command(
    list_file: Annotated[
        Path, typer.Argument(metavar="LIST", help="A ledger, CSV table, statement, or lines of 'digest  path'.")
    ],
    key: Key = None,
    jobs: Jobs = None,
    executor: Where = ExecutorChoice.threads,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure again what a list names, and compare; exit code 1 when something differs or cannot be measured."""
    from csvfast.measure import Job
    from csvfast.measure.fleet.compare import items_of, read_list

    items = items_of(read_list(list_file, _public_key(key)))
    if not items:
        raise CommandError(f"{list_file}: holds no digest; expected a list with digests", ExitCode.CHECK_FAILED)
    with _executor(executor, jobs, cluster) as workers, _bar(json) as report, Job(
        items, executor=workers, jobs=jobs, progress=report
    ) as job:  # fmt: skip
        for row in job:
            _show_row(row, json=json, quiet=quiet or row.ok)
    _finish(job.table, job.progress)


def register_image_sources() -> None:
    """Layouts and registries of container images are sources, too."""
    from csvfast.measure.fleet.providers import register_provider

    for scheme in ("oci", "docker"):
        register_provider(scheme, "csvfast.image.measured:provider")


def _public_key(path: Path | None) -> PublicKey | None:
    from csvfast.measure.fleet.statement import load_verifying_key

    return None if path is None else load_verifying_key(path.read_bytes())


@contextmanager
def _executor(choice: ExecutorChoice, jobs: int | None, cluster: str | None) -> Iterator[Executor | None]:
    """None: the job's own threads."""
    register_image_sources()
    if cluster is not None:
        from csvfast.measure.fleet.cluster import DaskExecutor

        if choice is not ExecutorChoice.threads or jobs is not None:
            raise CommandError("--cluster: given with --executor or --jobs; expected one place where the work is done")
        with DaskExecutor(cluster) as there:
            yield there
        return
    if choice is ExecutorChoice.threads:
        yield None
        return
    from csvfast.measure import ProcessExecutor

    with ProcessExecutor(jobs) as executor:
        yield executor


def _write(path: Path, data: bytes) -> None:
    from csvfast._files import write_atomically

    write_atomically(path, data)


def _show_row(row: Row, *, json: bool, quiet: bool) -> None:
    if quiet:
        return
    if json:
        sys.stdout.write(row.to_line())
    elif row.digest is not None:
        print(f"{row.digest}  {_shown(row.name)}")


def _outcome(row: Row) -> str:
    return row.digest or f"({row.error})"


def _shown(name: str) -> str:
    """A name on one line, whatever is in it."""
    return name if name.isprintable() else repr(name)[1:-1]


def _finish(rows: Sequence[Row], progress: JobProgress) -> None:
    failed = [row for row in rows if not row.ok]
    for row in failed[:FAILURES_SHOWN]:
        if row.error is not None:
            print(f"csvfast: {row.error}: {_shown(row.message or row.name)}", file=sys.stderr)
        else:
            print(f"csvfast: {_shown(row.name)}: is {row.digest}, expected {row.expect}", file=sys.stderr)
    if len(failed) > FAILURES_SHOWN:
        print(f"csvfast: and {len(failed) - FAILURES_SHOWN} more", file=sys.stderr)
    measured = f"{format_bytes(progress.measured_bytes)}, {format_rate(progress.rate)}"
    kept = f", {progress.kept} unchanged since the ledger" if progress.kept else ""
    _note(f"{progress.done} measured{kept}, {len(failed)} failed; {measured}")
    if failed:
        raise CommandError(f"{len(failed)} of {len(rows)} failed", ExitCode.CHECK_FAILED)


def _note(message: str) -> None:
    # For people only: scripts read stdout, and logs stay quiet.
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


@contextmanager
def _bar(json: bool) -> Iterator[Callable[[JobProgress], None] | None]:
    """Totals, rate, remaining time and failures on stderr, when it is a terminal."""
    if json or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from csvfast.cli.common import console

    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("finding sources", total=None)

        def report(state: JobProgress) -> None:
            text = f"{state.done + state.kept}/{state.sources + state.kept} measured, {state.failed} failed"
            bar.update(task, description=text, total=max(state.bytes, 1), completed=state.measured_bytes)

        yield report
