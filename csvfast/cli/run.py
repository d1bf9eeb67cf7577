"""`csvfast run IMAGE`: from an encrypted image to a running container, in the foreground."""

from __future__ import annotations

import json as json_module
import secrets
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from csvfast.cli.common import CommandError, ExitCode, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from csvfast.runtime.monitor import Monitor
    from csvfast.runtime.options import RunOptions
    from csvfast.runtime.sandbox import Container

__all__ = ["command_error", "run", "settings_of"]

FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
CHECKS: Final = ("policy", "attestation", "broker", "launch", "image")
"""Kinds of ContainerError that are a check which failed: exit code 1. The others are the environment's: 3."""


def run(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="oci:DIR[:TAG], docker://HOST/NAME[:TAG], HOST/NAME[:TAG].")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Default: the image's own.")
    ] = None,
    executor: Annotated[str, typer.Option(metavar="NAME", help="auto, vm, emulator, native.")] = "auto",
    broker: Annotated[
        str, typer.Option(metavar="URL", help="verdictd://HOST:PORT, kbs+http://HOST:PORT or kbs+https://HOST:PORT.")
    ] = "",
    broker_pin: Annotated[
        str, typer.Option("--broker-pin", metavar="SHA256", help="Of the broker's public key (KBS: of its certificate).")
    ] = "",
    broker_ca: Annotated[
        Path | None, typer.Option("--broker-ca", metavar="FILE", help="CA certificates of a KBS broker, PEM.")
    ] = None,
    registry_plain: Annotated[
        list[str] | None,
        typer.Option("--registry-plain-http", metavar="HOST", help="A registry without TLS, repeatable; loopback always may."),
    ] = None,
    pull: Annotated[
        str, typer.Option(metavar="WHEN", help="missing; always: no registry is an error; never: from the cache alone.")
    ] = "missing",
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Of encrypted images. Default: the user's own.")] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="The agent fetches from the registry itself; nothing is cached here.")
    ] = False,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="RAM of the guest.")] = "256MiB",
    window: Annotated[
        str, typer.Option(metavar="SHARE|SIZE", help="Plaintext at most. Default: vm 1/4, emulator 256K.")
    ] = "",
    expect: Annotated[
        str, typer.Option("--expect", metavar="HEX", help="The launch digest; another one: no launch, exit code 1.")
    ] = "",
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="A simulated chip. Default: a new one, gone afterwards.")
    ] = None,
    dram: Annotated[Path | None, typer.Option(metavar="FILE", help="That is the DRAM, kept. Default: anonymous memory.")] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The agent's policy, JSON. Default: this image and command, nothing else.")
    ] = None,
    configuration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The agent's whole configuration, JSON, as it is.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Repeatable.")] = None,
    user: Annotated[str, typer.Option("--user", "-u", metavar="USER", help="Instead of the image's.")] = "",
    workdir: Annotated[str, typer.Option("--workdir", "-w", metavar="DIR", help="Working directory.")] = "",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Of the executor; vm: kernel, firmware, accel, qemu.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Hand standard input on.")] = False,
    console: Annotated[bool, typer.Option("--console", help="Show the guest's console on standard error.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Tell afterwards how long each step took.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What is said on standard error as lines of JSON.")] = False,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the container. Default: a new one.")] = "",
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the containers' states.")] = None,
) -> None:
    """Run a container in a measured, attested guest: the image is decrypted there, its keys come from the broker.

    Standard output and error are the container's, the exit code is its, signals go to it. Which executor runs it and what that
    one does not protect is said on standard error.
    """
    from csvfast.runtime.options import RunOptions

    options = RunOptions(
        image=image,
        executor=executor,
        broker=broker,
        broker_pin=broker_pin,
        broker_ca=_path(broker_ca),
        configuration=_path(configuration),
        policy=_path(policy),
        plain_http=registry_plain or [],
        pull=pull,
        cache=_path(cache),
        direct=direct,
        chip=_path(state),
        dram=_path(dram),
        memory=parse_size(memory),
        window=window,
        expected=expect,
        settings=settings_of(setting or []),
        args=command or [],
        env=env or [],
        cwd=workdir,
        user=user,
        stdin=interactive,
    )
    raise typer.Exit(_run(options, name or f"run-{secrets.token_hex(6)}", root, console, timings, json))


def _run(options: RunOptions, name: str, root: Path | None, console: bool, show_timings: bool, as_json: bool) -> int:
    from csvfast.errors import CsvfastError
    from csvfast.runtime.monitor import Monitor
    from csvfast.runtime.state import state_root
    from csvfast.runtime.timings import Timings

    timings = Timings()

    def say(line: str) -> None:
        print(json_module.dumps({"said": line}) if as_json else f"csvfast: {line}", file=sys.stderr, flush=True)

    def show(data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.flush()

    try:
        monitor = Monitor(
            options, name, root=None if root is None else state_root(root), transient=True, timings=timings, said=say,
            console=show if console else None,
        )  # fmt: skip
        with monitor, _ended_by_signals():
            container = monitor.create()
            container.attach(0 if options.stdin else None, 1, 2)
            code = _wait(monitor, container)
            monitor.sandbox.fetch_timings()
            record = monitor.state()
        if container.problem is not None:
            say(f"the container was lost: {container.problem}")
        if container.unwritten is not None:  # a success without its output is none
            say(f"output of the container was lost: {container.unwritten}")
            code = code or ExitCode.ENVIRONMENT
    except CsvfastError as problem:
        if show_timings and not as_json:
            say(f"timings\n{timings.table()}")
        raise command_error(problem) from problem
    if as_json:
        more = {"timings": timings.record()} if show_timings else {}
        print(json_module.dumps({"container": record, **more}), file=sys.stderr, flush=True)
    elif show_timings:
        say(f"timings\n{timings.table()}")
    return code


def _wait(monitor: Monitor, container: Container) -> int:
    """Starts the container and waits; signals go to it meanwhile."""

    def forward(number: int, _frame: object) -> None:
        # In a thread: the agent's answer must not be waited for in the middle of whatever this thread does.
        threading.Thread(target=_forward, args=(monitor, container, number), daemon=True).start()

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        container.start()
        while (code := container.wait(0.5)) is None:
            if monitor.finished.is_set() and container.wait(1.0) is None:
                monitor.sandbox.close()
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward(monitor: Monitor, container: Container, number: int) -> None:
    from csvfast.errors import ContainerError

    try:
        container.signal(number)
    except ContainerError as problem:
        if problem.kind == "state":  # it ends this moment
            return
        # The agent's policy forbids it, or the agent is gone: what asks us to end still ends us, with the whole sandbox.
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            monitor.finished.set()


class _ended_by_signals:  # noqa: N801  (a context manager)
    """While the container is being made: SIGTERM and SIGHUP end us as Ctrl-C does, in order."""

    def __enter__(self) -> None:
        def interrupt(_number: int, _frame: object) -> None:
            raise KeyboardInterrupt

        self._before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}

    def __exit__(self, *_problem: object) -> None:
        for number, handler in self._before.items():
            with suppress(ValueError):
                signal.signal(number, handler)


def command_error(problem: Exception) -> CommandError:
    """What a failure of the runtime is for a command: a check that failed, or the environment."""
    from csvfast.cli.common import exit_code_of
    from csvfast.errors import ContainerError, FirmwareError, ImageError, RegistryError, VerificationError

    if isinstance(problem, ContainerError):
        code = ExitCode.CHECK_FAILED if problem.kind in CHECKS else ExitCode.ENVIRONMENT
    elif isinstance(problem, RegistryError):
        code = ExitCode.ENVIRONMENT
    elif isinstance(problem, (VerificationError, FirmwareError, ImageError)):
        code = ExitCode.CHECK_FAILED
    else:
        code = exit_code_of(problem)
    return CommandError(str(problem), code)


def settings_of(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE to a dictionary. Raises CommandError."""
    return dict(_settings(settings))


def _settings(settings: list[str]) -> Iterator[tuple[str, str]]:
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise CommandError(f"--set: {setting!r}; expected NAME=VALUE")
        yield name, value


def _path(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())
