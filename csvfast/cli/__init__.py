"""The `csvfast` command: one command, one room per subject.

    csvfast info | bench | measure ... | memory demo | machine trace|run | chip ... | cert ... | report ... | platform ...
            | guest ... | vm ... | broker ... | attest client | image ... | run IMAGE | runtime ...

Exit codes are listed in common.py. A command imports what it needs when it runs, so that --help stays fast; and of the commands
only the one that is asked for is imported, since most of a short command's time would go into the others' options.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from csvfast.cli.common import INTERRUPTED, ExitCode, exit_code_of, is_expected, report_error
from csvfast.cli.streams import standard_streams

__all__ = ["app", "main"]

app: typer.Typer
"""All commands."""

# Command: its module here, and the function; None: a room of commands, the module's `app`. In the order of --help.
_COMMANDS: Final[dict[str, tuple[str, str | None]]] = {
    "info": ("info", "info"),
    "bench": ("bench", "bench"),
    "run": ("run", "run"),
    "measure": ("measure_batch", None),
    "memory": ("memory", None),
    "machine": ("machine", None),
    "vm": ("vm", None),
    "guest": ("guest", None),
    "chip": ("chip", None),
    "cert": ("cert", None),
    "report": ("report", None),
    "platform": ("platform", None),
    "broker": ("broker", None),
    "attest": ("attest", None),
    "image": ("image", None),
    "runtime": ("runtime", None),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        import csvfast

        print(f"csvfast {csvfast.__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """HaiGuang (Hygon) CSV confidential computing in software: encrypted memory, measurement, attestation."""


@functools.cache
def _application(commands: tuple[str, ...]) -> typer.Typer:
    """The command with these of its commands."""
    made = typer.Typer(
        name="csvfast",
        help="HaiGuang (Hygon) CSV confidential computing in software: encrypted memory, measurement, attestation.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for name in commands:
        place, function = _COMMANDS[name]
        module = importlib.import_module(f"csvfast.cli.{place}")
        if function is None:
            made.add_typer(module.app, name=name)
        else:
            made.command(name)(getattr(module, function))
    return made


def __getattr__(name: str) -> Any:
    if name == "app":
        return _application(tuple(_COMMANDS))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    one = arguments[:1] and arguments[0] in _COMMANDS
    command = typer.main.get_command(_application((arguments[0],) if one else tuple(_COMMANDS)))
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
