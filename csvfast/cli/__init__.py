"""The `csvfast` command: one command, one room per subject.

    csvfast info | bench | measure ... | memory demo | machine trace|run | chip ... | cert ... | report ... | platform ...
            | guest ... | vm ... | broker ... | attest client | image ... | run IMAGE | runtime ...

Exit codes are listed in common.py. A command imports what it needs when it runs, so that --help stays fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from csvfast.cli import attest as _attest
from csvfast.cli import bench as _bench
from csvfast.cli import broker as _broker
from csvfast.cli import cert as _cert
from csvfast.cli import chip as _chip
from csvfast.cli import guest as _guest
from csvfast.cli import image as _image
from csvfast.cli import info as _info
from csvfast.cli import machine as _machine
from csvfast.cli import measure_batch as _measure
from csvfast.cli import memory as _memory
from csvfast.cli import platform as _platform
from csvfast.cli import report as _report
from csvfast.cli import run as _run_command
from csvfast.cli import runtime as _runtime
from csvfast.cli import vm as _vm
from csvfast.cli.common import INTERRUPTED, ExitCode, exit_code_of, is_expected, report_error
from csvfast.cli.streams import standard_streams

__all__ = ["app", "main"]

app = typer.Typer(
    name="csvfast",
    help="HaiGuang (Hygon) CSV confidential computing in software: encrypted memory, measurement, attestation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import csvfast

        print(f"csvfast {csvfast.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """HaiGuang (Hygon) CSV confidential computing in software: encrypted memory, measurement, attestation."""


app.command("info")(_info.info)
app.command("bench")(_bench.bench)
app.command("run")(_run_command.run)
app.add_typer(_measure.app, name="measure")
app.add_typer(_memory.app, name="memory")
app.add_typer(_machine.app, name="machine")
app.add_typer(_vm.app, name="vm")
app.add_typer(_guest.app, name="guest")
app.add_typer(_chip.app, name="chip")
app.add_typer(_cert.app, name="cert")
app.add_typer(_report.app, name="report")
app.add_typer(_platform.app, name="platform")
app.add_typer(_broker.app, name="broker")
app.add_typer(_attest.app, name="attest")
app.add_typer(_image.app, name="image")
app.add_typer(_runtime.app, name="runtime")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (the console script hands it to sys.exit).

    In: arguments   without the program's name; None = sys.argv
    CSVFAST_TRACEBACK=1 in the environment shows the traceback of an error as well as its line.
    """
    try:
        with standard_streams():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("csvfast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # standard output is closed, or its disk is full
        report_error(error)
        return ExitCode.ENVIRONMENT


def _run(arguments: list[str]) -> int:
    # The command is invoked by hand, not through its own main(): that one turns Ctrl-C into exit code 1, which here means
    # that a check failed.
    command = typer.main.get_command(app)
    try:
        with command.make_context("csvfast", arguments) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # typer's usage errors bring their own rendering; newer releases carry a private copy of click, so they are
        # known by what they can do and not by a class that could be imported.
        show = getattr(error, "format_message", None)
        if show is not None:
            return _usage(error, str(show()))
        if os.environ.get("CSVFAST_TRACEBACK") == "1" or not is_expected(error):
            traceback.print_exc()
        report_error(error)
        return exit_code_of(error)
    return ExitCode.OK


def _usage(error: Exception, message: str) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return ExitCode.USAGE
    context = getattr(error, "ctx", None)
    if context is not None:
        print(context.get_usage(), file=sys.stderr)
        print(f"Try '{context.command_path} --help' for help.", file=sys.stderr)
    print(f"csvfast: error: {' '.join(message.split())}", file=sys.stderr)
    return ExitCode.USAGE
