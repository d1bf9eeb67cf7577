"""`csvfast broker key | resource`: what the broker keeps, by version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.broker_desk import (
    Config,
    Json,
    Path_,
    check_output,
    desk,
    path_of,
    read_input,
    shown_moment,
    write_secret,
)
from csvfast.cli.common import CommandError, console, print_json

if TYPE_CHECKING:
    from csvfast.broker.store import ResourceRow

__all__ = ["key", "resource"]

key = typer.Typer(help="Keys: 32 random bytes, made in the broker.", no_args_is_help=True, rich_markup_mode=None)
resource = typer.Typer(help="Resources: any content of at most 2 MiB.", no_args_is_help=True, rich_markup_mode=None)

_Version = Annotated[int | None, typer.Option("--version", min=1, metavar="N", help="Default: the newest.")]
_Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="A new file, the owner's alone; '-' is a pipe.")
]


@key.command()
def create(path: Path_, config: Config, json: Json = False) -> None:
    """Make a key. It never leaves the broker but to guests that the policies allow."""
    from csvfast.broker.administration import LOCAL

    where = path_of(path)
    with desk(config) as administration:
        version = administration.create_key(LOCAL, where)
    _said(json, where.uri, version, "created")


@resource.command()
def put(
    path: Path_,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The content; '-' is standard input.")],
    config: Config,
    json: Json = False,
) -> None:
    """Store a content as the newest version."""
    from csvfast.broker.administration import LOCAL
    from csvfast.crypto import Secret

    where, content = path_of(path), read_input(file)
    if not content:
        raise CommandError(f"{file}: empty; expected 1 byte or more")
    with desk(config) as administration:
        version = administration.put_resource(LOCAL, where, Secret(content))
    _said(json, where.uri, version, "stored")


def rotate(path: Path_, config: Config, json: Json = False) -> None:
    """A new version of random bytes; the older ones stay readable by number until they are retired."""
    from csvfast.broker.administration import LOCAL

    where = path_of(path)
    with desk(config) as administration:
        version = administration.rotate_resource(LOCAL, where)
    _said(json, where.uri, version, "created")


def retire(
    path: Path_,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    config: Config,
    json: Json = False,
) -> None:
    """Release a version to nobody any more. It is kept; `delete` destroys."""
    from csvfast.broker.administration import LOCAL

    where = path_of(path)
    with desk(config) as administration:
        administration.retire_resource(LOCAL, where, version)
    _said(json, where.uri, version, "retired")


def delete(
    path: Path_,
    config: Config,
    json: Json = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy every version, for good."""
    from csvfast.broker.administration import LOCAL

    where = path_of(path)
    if not yes:
        typer.confirm(f"Destroy every version of {where}?", abort=True, err=True)
    with desk(config) as administration:
        administration.delete_resource(LOCAL, where)
    _said(json, where.uri, None, "deleted")


def export(path: Path_, output: _Output, config: Config, version: _Version = None) -> None:
    """Read a content as the owner. It is on record."""
    from csvfast.broker.administration import LOCAL

    check_output(output)
    with desk(config) as administration:
        found = administration.read_resource(LOCAL, path_of(path), version)
    write_secret(found.content, output)


def list_(config: Config, json: Json = False) -> None:
    """Paths, versions and states, without contents."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        rows = administration.list_resources(LOCAL)
    if json:
        print_json({"resources": [_facts(row) for row in rows]})
        return
    from rich.table import Table

    table = Table("resource", "version", "state", "since")
    for row in rows:
        table.add_row(str(row.path), str(row.version), row.state, shown_moment(row.created))
    console().print(table)


for _app in (key, resource):
    for _command, _name in ((rotate, "rotate"), (retire, "retire"), (delete, "delete"), (export, "export"), (list_, "list")):
        _app.command(_name)(_command)


def _facts(row: ResourceRow) -> dict[str, Any]:
    return {"path": str(row.path), "version": row.version, "state": row.state, "created": shown_moment(row.created)}


def _said(json: bool, uri: str, version: int | None, what: str) -> None:
    if json:
        print_json({"resource": uri, "version": version, "state": what})
    else:
        print(f"{uri}{'' if version is None else f' version {version}'}: {what}")
