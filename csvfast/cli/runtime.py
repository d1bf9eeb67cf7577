"""`csvfast runtime`: confidential containers, by the OCI runtime's commands.

    csvfast runtime create --bundle DIR ID      the bundle's annotation org.csvfast.image names the encrypted image
    csvfast runtime start|state|kill|delete ID, list
    csvfast runtime measure ...                 the launch digest in advance, for the owner's broker

Source: opencontainers/runtime-spec runtime.md; options as opencontainers/runc has them.
"""

from __future__ import annotations

import json as json_module
import os
import select
import signal as signals
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from csvfast.cli.common import CommandError, ExitCode, parse_size, print_json
from csvfast.cli.run import command_error, settings_of

__all__ = ["app"]

app = typer.Typer(help="Confidential containers, by the OCI runtime's commands.", no_args_is_help=True, rich_markup_mode=None)

_CONFIG_MAX: Final = 1 << 20
_END_SECONDS: Final = 20.0
_Identifier = Annotated[str, typer.Argument(metavar="ID", help="Of the container.")]


@dataclass
class _Options:
    root: Path | None = None
    log: Path | None = None


_OPTIONS: Final = _Options()


@app.callback()
def _runtime(
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the containers' states.")] = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Errors and the monitor's messages, lines of JSON.")] = None,
    log_format: Annotated[str, typer.Option("--log-format", metavar="FORMAT", help="json, the only one.")] = "json",
) -> None:
    """Confidential containers, by the OCI runtime's commands."""
    if log_format not in ("json", "text"):
        raise CommandError(f"--log-format: {log_format!r}; expected json")
    _OPTIONS.root, _OPTIONS.log = root, None if log is None else log.absolute()


@contextmanager
def _errors() -> Iterator[Path]:
    """Gives the directory of states; errors become the command's, and a line of the log."""
    from csvfast.errors import CsvfastError
    from csvfast.runtime.state import state_root

    try:
        yield state_root(_OPTIONS.root)
    except (CsvfastError, CommandError, OSError) as problem:
        if _OPTIONS.log is not None:
            line = {"level": "error", "msg": str(problem), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            with suppress(OSError), _OPTIONS.log.open("a", encoding="utf-8") as file:
                file.write(json_module.dumps(line) + "\n")
        raise (command_error(problem) if isinstance(problem, CsvfastError) else problem) from problem


@app.command()
def create(
    identifier: _Identifier,
    bundle: Annotated[Path, typer.Option("--bundle", "-b", metavar="DIR", help="With config.json.")] = Path(),
    pid_file: Annotated[Path | None, typer.Option("--pid-file", metavar="FILE", help="Gets the monitor's process ID.")] = None,
    console_socket: Annotated[
        str | None, typer.Option("--console-socket", metavar="PATH", help="Refused: there are no terminals.")
    ] = None,
    executor: Annotated[str | None, typer.Option(metavar="NAME", help="Instead of the annotation's.")] = None,
) -> None:
    """Make a container: guest launched and measured, image decrypted inside of it, its process not started.

    Standard input, output and error of this command become the container's.
    """
    from csvfast._files import write_atomically
    from csvfast.errors import ContainerError
    from csvfast.runtime.monitor import start_monitor

    with _errors() as root:
        options, annotations = _bundle_options(bundle)
        if console_socket is not None:
            raise ContainerError("state", "a terminal is asked for (--console-socket); containers have pipes only")
        if executor is not None:
            options["executor"] = executor
        from csvfast.runtime.options import RunOptions

        wanted, place = RunOptions.from_json(options), str(bundle.absolute())
        if (sandbox := _sandbox_of(annotations)) is not None:
            pid = _join(root, sandbox, identifier, wanted, place, annotations)
        else:
            pid = start_monitor(wanted, identifier, root=root, bundle=place, annotations=annotations, log=_OPTIONS.log)
        if pid_file is not None:
            try:
                write_atomically(pid_file, str(pid))
            except BaseException:
                _delete(root, identifier, force=True)
                raise


@app.command()
def start(identifier: _Identifier) -> None:
    """Start the process of a container that was made."""
    from csvfast.runtime.control import ask

    with _errors() as root:
        _alive(root, identifier)
        ask(root, identifier, "start")


@app.command()
def state(identifier: _Identifier) -> None:
    """The container's state as JSON."""
    from csvfast.runtime.state import read_state

    with _errors() as root:
        print_json(read_state(root, identifier)[0])


@app.command()
def kill(
    identifier: _Identifier,
    signal: Annotated[str, typer.Argument(metavar="SIGNAL", help="Name or number.")] = "SIGTERM",
    everything: Annotated[bool, typer.Option("--all", "-a", help="As without: the container's first process.")] = False,
) -> None:
    """Send a signal to a container's process."""
    from csvfast.runtime.control import ask

    del everything
    with _errors() as root:
        number = _signal(signal)
        _alive(root, identifier)
        ask(root, identifier, "kill", signal=number)


@app.command()
def delete(
    identifier: _Identifier,
    force: Annotated[bool, typer.Option("--force", "-f", help="Also a container that runs: it is killed.")] = False,
) -> None:
    """Remove a container that has stopped."""
    with _errors() as root:
        _delete(root, identifier, force=force)


@app.command("list")
def list_containers(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[str, typer.Option("--format", "-f", metavar="FORMAT", help="table or json.")] = "table",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    """The containers there are."""
    from csvfast.errors import ContainerError
    from csvfast.runtime.state import clean, identifiers, read_state

    with _errors() as root:
        clean(root)
        rows = []
        for identifier in identifiers(root):
            with suppress(ContainerError):  # removed this moment
                rows.append(read_state(root, identifier)[0])
        if json or output == "json":
            print(json_module.dumps(rows, indent=2))
            return
        if not quiet:
            print(f"{'ID':24} {'PID':>8} {'STATUS':9} {'EXECUTOR':9} IMAGE")
        for row in rows:
            more = row.get("csvfast", {})
            line = f"{row['id']:24} {row.get('pid', 0):>8} {row['status']:9} {more.get('executor', ''):9} {more.get('image', '')}"
            print(row["id"] if quiet else line)


@app.command()
def timings(identifier: _Identifier) -> None:
    """How long each step of a container's life took, as JSON."""
    from csvfast.runtime.control import ask

    with _errors() as root:
        _alive(root, identifier)
        print_json(ask(root, identifier, "timings"))


@app.command()
def measure(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="As for `csvfast run`.")] = "",
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="As for `csvfast run`.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", "-b", metavar="DIR", help="Instead of an image.")] = None,
    executor: Annotated[str, typer.Option(metavar="NAME", help="auto, vm, emulator, native.")] = "auto",
    broker: Annotated[str, typer.Option(metavar="URL", help="As for `csvfast run`.")] = "",
    broker_pin: Annotated[str, typer.Option("--broker-pin", metavar="SHA256", help="As for `csvfast run`.")] = "",
    broker_ca: Annotated[Path | None, typer.Option("--broker-ca", metavar="FILE", help="As for `csvfast run`.")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="As for `csvfast run`.")] = None,
    configuration: Annotated[Path | None, typer.Option(metavar="FILE", help="As for `csvfast run`.")] = None,
    registry_plain: Annotated[
        list[str] | None, typer.Option("--registry-plain-http", metavar="HOST", help="As for `csvfast run`.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="RAM of the guest.")] = "256MiB",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="As for `csvfast run`.")] = None,
    user: Annotated[str, typer.Option("--user", "-u", metavar="USER", help="As for `csvfast run`.")] = "",
    workdir: Annotated[str, typer.Option("--workdir", "-w", metavar="DIR", help="As for `csvfast run`.")] = "",
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Of the executor.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="As for `csvfast run`.")] = False,
    show_configuration: Annotated[bool, typer.Option("--show-configuration", help="Print what the agent is told, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The launch digest that a sandbox will have, before there is one: what the owner tells the broker. Nothing is launched."""
    import tempfile

    from csvfast.runtime.executor import choose_executor
    from csvfast.runtime.image_cache import image_identity
    from csvfast.runtime.options import RunOptions, configuration_for, launch_plan_of, loopback_of

    with _errors():
        if bundle is not None:
            options = RunOptions.from_json(_bundle_options(bundle)[0])
        else:
            options = RunOptions(
                image=image, executor=executor, broker=broker, broker_pin=broker_pin,
                broker_ca="" if broker_ca is None else str(broker_ca), policy="" if policy is None else str(policy),
                configuration="" if configuration is None else str(configuration), plain_http=registry_plain or [],
                memory=parse_size(memory), settings=settings_of(setting or []), args=command or [], env=env or [],
                cwd=workdir, user=user, stdin=interactive,
            )  # fmt: skip
        chosen = choose_executor(options.executor)
        identity = ("", "") if options.configuration and not options.image else image_identity(options)
        told = configuration_for(options, *identity, loopback_of(chosen)).encode()
        with tempfile.TemporaryDirectory() as work:
            predicted = chosen.predict(launch_plan_of(options, told, Path(work)))
        if json:
            record = {"executor": chosen.name, "digest": predicted.hexdigest, "image": identity[0], "manifest": identity[1]}
            print_json(record | ({"configuration": json_module.loads(told)} if show_configuration else {}))
            return
        print(predicted.hexdigest)
        print(f"csvfast: executor {chosen.name}: {chosen.statement()}", file=sys.stderr)
        if show_configuration:
            print(told.decode())


def _sandbox_of(annotations: dict[str, str]) -> str | None:
    """Whose sandbox a container shall join, as containerd's CRI plugin or we say it."""
    if annotations.get("io.kubernetes.cri.container-type") == "container":
        return annotations.get("io.kubernetes.cri.sandbox-id")
    return annotations.get("org.csvfast.sandbox")


def _join(root: Path, sandbox: str, identifier: str, options: Any, bundle: str, annotations: dict[str, str]) -> int:
    """The container is made by the sandbox's monitor; our standard streams go there. Out: that one's process ID."""
    from csvfast.runtime.control import ask
    from csvfast.runtime.state import check_identifier, read_state

    check_identifier(identifier)
    _alive(root, sandbox)
    ask(
        root, identifier, "create", monitor=sandbox, descriptors=[0, 1, 2], options=options.to_json(), bundle=bundle,
        annotations=annotations,
    )  # fmt: skip
    return int(read_state(root, identifier)[0]["pid"])


def _alive(root: Path, identifier: str) -> None:
    from csvfast.errors import ContainerError
    from csvfast.runtime.state import read_state

    record, alive = read_state(root, identifier)
    if not alive:
        raise ContainerError("state", f"container {identifier} is {record.get('status')}: its monitor is gone")


def _delete(root: Path, identifier: str, *, force: bool) -> None:
    from csvfast.errors import ContainerError
    from csvfast.runtime.control import ask
    from csvfast.runtime.state import read_state, remove

    try:
        record, alive = read_state(root, identifier)
    except ContainerError:  # there is none, or its state is damaged
        if not force:
            raise
        remove(root, identifier)
        return
    if alive:
        monitor = _monitor(record)
        try:
            try:
                ask(root, identifier, "delete", force=force)
            except ContainerError:
                if not force and _lives(root, identifier):
                    raise
            if not _gone(root, identifier, monitor) and force and monitor is not None:
                with suppress(ProcessLookupError):
                    signals.pidfd_send_signal(monitor, signals.SIGKILL)  # the kernel ends the rest
            if not _gone(root, identifier, monitor):
                raise ContainerError("state", f"the monitor of container {identifier} does not end")
        finally:
            if monitor is not None:
                os.close(monitor)
    remove(root, identifier)


def _monitor(record: dict[str, Any]) -> int | None:
    """A descriptor of the monitor's process; None when it will live on, since the container is not its only one."""
    more = record.get("csvfast", {})
    pid = more.get("monitor")
    if type(pid) is not int or pid < 2 or "sandbox" in more:
        return None
    with suppress(OSError):
        return os.pidfd_open(pid)
    return None


def _gone(root: Path, identifier: str, monitor: int | None) -> bool:
    """Waits until the container's lock is free, and its monitor has ended."""
    end = time.monotonic() + _END_SECONDS
    while _lives(root, identifier):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return monitor is None or bool(select.select([monitor], [], [], max(0.0, end - time.monotonic()))[0])


def _lives(root: Path, identifier: str) -> bool:
    from csvfast.errors import ContainerError
    from csvfast.runtime.state import read_state

    try:
        return read_state(root, identifier)[1]
    except ContainerError:  # its monitor has removed it
        return False


def _signal(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) < signals.NSIG:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    try:
        return int(signals.Signals[name])
    except KeyError:
        raise CommandError(f"signal {text!r}: expected a name such as SIGTERM, or a number", ExitCode.USAGE) from None


def _bundle_options(bundle: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Options from a bundle's config.json, and its annotations. Raises ContainerError, ArgumentError, OSError."""
    from csvfast.errors import ContainerError
    from csvfast.runtime.options import ANNOTATIONS

    path = bundle / "config.json"
    with path.open("rb") as file:
        data = file.read(_CONFIG_MAX + 1)
    try:
        document = json_module.loads(data)
    except ValueError as problem:
        raise ContainerError("state", f"{path}: no JSON ({problem})") from None
    if not isinstance(document, dict) or len(data) > _CONFIG_MAX:
        raise ContainerError("state", f"{path}: expected a runtime configuration of at most {_CONFIG_MAX} bytes")
    annotations, process = document.get("annotations") or {}, document.get("process") or {}
    if not isinstance(annotations, dict) or not all(isinstance(one, str) for one in annotations.values()):
        raise ContainerError("state", f"{path}: annotations: expected texts")
    if not isinstance(process, dict):
        raise ContainerError("state", f"{path}: process: expected an object")
    if process.get("terminal"):
        raise ContainerError("state", f"{path}: process.terminal: containers have pipes only")
    options: dict[str, Any] = {}
    for name, option in ANNOTATIONS.items():
        if name in annotations and option not in options:
            value: Any = annotations[name]
            options[option] = parse_size(value) if option == "memory" else value.split(",") if option == "plain_http" else value
    if "image" not in options:
        raise ContainerError("state", f"{path}: no annotation org.csvfast.image, which names the image")
    for member, option in (("args", "args"), ("env", "env")):
        found = process.get(member) or []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ContainerError("state", f"{path}: process.{member}: expected texts")
        if annotations.get("org.csvfast.process") != "image":
            options[option] = found
    options["stdin"] = annotations.get("org.csvfast.stdin") == "true"
    return options, annotations
