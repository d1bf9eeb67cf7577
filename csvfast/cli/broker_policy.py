"""`csvfast broker policy | reference`: who gets what, and the values that policies compare with."""

from __future__ import annotations

import hashlib
import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from csvfast.cli.broker_desk import Config, Json, desk, moment, read_input, shown_moment
from csvfast.cli.common import CommandError, ExitCode, console, print_json

__all__ = ["policy", "reference"]

policy = typer.Typer(help="Policies: appraisal of guests, release of resources.", no_args_is_help=True, rich_markup_mode=None)
reference = typer.Typer(help="Reference values, with their expiry.", no_args_is_help=True, rich_markup_mode=None)


class Kind(StrEnum):
    """KIND."""

    appraisal = "appraisal"
    resource = "resource"


class Engine(StrEnum):
    """--engine."""

    rules = "rules"
    rego = "rego"


_Kind = Annotated[Kind, typer.Argument(metavar="KIND", help="appraisal or resource.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="default_cpu; default or the name of a repository.")]
_Engine = Annotated[Engine, typer.Option("--engine", help="What the text is written in.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Such as csv_measure.")]


@policy.command("set")
def set_policy(
    kind: _Kind,
    id: _Id,
    file: Annotated[str, typer.Argument(metavar="FILE", help="'-' is standard input.")],
    config: Config,
    engine: _Engine = Engine.rules,
    json: Json = False,
) -> None:
    """Check a policy and let it decide from now on."""
    from csvfast.broker.administration import LOCAL

    text = _text(file)
    with desk(config) as administration:
        version = administration.put_policy(LOCAL, kind.value, id, text, engine.value)
    if json:
        print_json({"kind": kind.value, "id": id, "version": version, "engine": engine.value})
    else:
        print(f"{kind.value} policy {id} version {version}: decides from now on")


@policy.command()
def show(
    kind: _Kind,
    id: _Id,
    config: Config,
    version: Annotated[int | None, typer.Option("--version", min=0, metavar="N", help="0: the one csvfast ships.")] = None,
) -> None:
    """A policy's text: the one that decides, or an older version."""
    from csvfast.broker.administration import LOCAL
    from csvfast.broker.policy import default_policies
    from csvfast.errors import UnknownError

    shipped = {(one_kind, name): text for one_kind, name, _engine, text in default_policies()}
    with desk(config) as administration:
        try:
            if version == 0:
                raise UnknownError(f"csvfast ships no {kind.value} policy {id!r}")
            text = administration.get_policy(LOCAL, kind.value, id, version).text
        except UnknownError:
            if version or (kind.value, id) not in shipped:
                raise
            text = shipped[kind.value, id]
    print(text, end="" if text.endswith("\n") else "\n")


@policy.command("delete")
def delete_policy(kind: _Kind, id: _Id, config: Config) -> None:
    """Back to the policy that csvfast ships, or to none."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        administration.delete_policy(LOCAL, kind.value, id)
    print(f"{kind.value} policy {id}: deleted")


@policy.command("list")
def list_policies(config: Config, json: Json = False) -> None:
    """Every version of every stored policy; what is not stored is as csvfast ships it."""
    from csvfast.broker.administration import LOCAL
    from csvfast.broker.policy import default_policies

    with desk(config) as administration:
        rows = administration.list_policies(LOCAL)
    found = [(row.kind, row.id, row.version, row.engine, hashlib.sha256(row.text.encode()).hexdigest()) for row in rows]
    found += [(kind, name, 0, engine, "shipped") for kind, name, engine, _text in default_policies()]
    if json:
        names = ("kind", "id", "version", "engine", "digest")
        print_json({"policies": [dict(zip(names, row, strict=True)) for row in sorted(found)]})
        return
    from rich.table import Table

    table = Table("kind", "id", "version", "engine", "SHA-256")
    for row in sorted(found):
        table.add_row(*(str(value)[:16] for value in row))
    console().print(table)


@policy.command("dry-run")
def dry_run(
    kind: _Kind,
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="JSON: what the policy would see.")],
    config: Config,
    id: Annotated[str | None, typer.Option("--id", metavar="ID", help="A policy of the broker.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="A policy that is not stored yet.")] = None,
    engine: _Engine = Engine.rules,
    json: Json = False,
) -> None:
    """What a policy says of a document, and the first rule that fails. Exit code 1 when it does not allow."""
    from csvfast.broker.administration import LOCAL
    from csvfast.broker.json_input import loads

    if (id is None) == (file is None):
        raise CommandError("dry-run: expected either --id or --file")
    subject = loads(document.read_bytes(), str(document), limit=4 << 20)
    if not isinstance(subject, dict):
        raise CommandError(f"{document}: expected a JSON object")
    text = None if file is None else _text(str(file))
    with desk(config) as administration:
        decision, why = administration.dry_run(LOCAL, kind.value, subject, name=id, text=text, engine=engine.value)
    if json:
        print_json(decision.to_dict())
    else:
        print(why)
    if not decision.allowed:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@reference.command("set")
def set_reference(
    name: _Name,
    values: Annotated[list[str], typer.Argument(metavar="VALUE...", help="Texts; with --parse-json JSON values.")],
    config: Config,
    expires: Annotated[str, typer.Option(metavar="WHEN", help="365d, 12h, a UTC time, never.")] = "365d",
    parse_json: Annotated[bool, typer.Option("--parse-json", help="Each VALUE is JSON.")] = False,
) -> None:
    """Set the values of a reference, in place of what it had."""
    from csvfast.broker.administration import LOCAL

    try:
        found = [json_module.loads(value) if parse_json else value for value in values]
    except ValueError:
        raise CommandError("VALUE: expected JSON, since --parse-json was given") from None
    until = moment(expires, "--expires")
    with desk(config) as administration:
        administration.put_reference(LOCAL, name, found, until)
    print(f"{name}: {len(found)} values until {shown_moment(until)}")


@reference.command("list")
def list_references(config: Config, json: Json = False) -> None:
    """All reference values."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        rows = administration.list_references(LOCAL)
    facts: list[dict[str, Any]] = [
        {"name": row.name, "values": list(row.values), "expires": shown_moment(row.expires)} for row in rows
    ]
    if json:
        print_json({"references": facts})
        return
    from rich.table import Table

    table = Table("name", "values", "expires")
    for fact in facts:
        table.add_row(fact["name"], "\n".join(map(str, fact["values"])), fact["expires"])
    console().print(table)


@reference.command("delete")
def delete_reference(name: _Name, config: Config) -> None:
    """Forget a reference: rules that need it fail from now on."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        administration.delete_reference(LOCAL, name)
    print(f"{name}: deleted")


def _text(file: str) -> str:
    try:
        return read_input(file).decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: byte {error.start} is no UTF-8") from None
