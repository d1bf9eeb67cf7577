"""`csvfast broker audit | token`: what happened, and who may administer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from csvfast.cli.broker_desk import Config, Json, check_output, desk, moment, shown_moment, write_secret
from csvfast.cli.common import ExitCode, console, print_json, progress

__all__ = ["audit", "token"]

audit = typer.Typer(help="The audit log: show, verify.", no_args_is_help=True, rich_markup_mode=None)
token = typer.Typer(help="Administrators' tokens.", no_args_is_help=True, rich_markup_mode=None)


@audit.command("show")
def show_audit(
    config: Config,
    after: Annotated[int, typer.Option(min=0, metavar="N", help="Records behind this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, metavar="N", help="At most so many.")] = 100,
    correlation: Annotated[str | None, typer.Option(metavar="HEX", help="Of one request, as a peer was told.")] = None,
    outcome: Annotated[str | None, typer.Option(metavar="WORD", help="allowed, denied or failed.")] = None,
    resource: Annotated[str | None, typer.Option(metavar="PATH", help="Of one resource.")] = None,
    json: Json = False,
) -> None:
    """Show records in their order."""
    from csvfast.broker.administration import LOCAL

    given = {"correlation": correlation, "outcome": outcome, "resource": resource}
    filters = {name: value for name, value in given.items() if value is not None}
    with desk(config) as administration:
        records = [
            {"sequence": found.sequence, **found.record.to_dict()}
            for found in administration.audit_records(LOCAL, after=after, limit=limit, **filters)
        ]
    if json:
        print_json({"records": records})
        return
    for record in records:
        print(_line(record))


def _line(record: dict[str, Any]) -> str:
    """One record for people: a line, and its reason below it."""
    who = record["subject"].get("chip_id") or record["actor"]
    resource = record["resource"] + (f"@{record['resource_version']}" if record["resource_version"] else "")
    columns = (
        f"{record['sequence']:>7}",
        shown_moment(record["time"] // 1_000_000),
        f"{record['door']:<14}",
        f"{record['action']:<15}",
        f"{record['outcome']:<7}",
        record["correlation"],
        who or "-",
        resource,
    )
    line = "  ".join(columns).rstrip()
    return f"{line}\n         {record['reason']}" if record["reason"] else line


@audit.command()
def verify(config: Config, json: Json = False) -> None:
    """Recompute the chain of hashes from the first record and check the signed heads. Exit code 1 when they do not hold."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration, progress("verifying", None, unit="records", enabled=not json) as advance:
        found = administration.verify_audit(LOCAL, advance)
    if json:
        print_json({"intact": found.intact, **asdict(found)})
    elif found.intact:
        print(f"{found.count} records follow one from another, and the head is signed by this broker's key")
    else:
        print(found.problem if found.bad is None else f"record {found.bad}: {found.problem}")
    if not found.intact:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@audit.command("public-key")
def public_key(config: Config) -> None:
    """The SM2 key that signs the heads, as PEM: keep it elsewhere, to know that a log is this broker's."""
    from csvfast.crypto import dump_public_key

    with desk(config) as administration:
        key = administration.audit_public_key()
    print(dump_public_key(key).decode(), end="")


@token.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    roles: Annotated[list[str], typer.Option("--role", metavar="ROLE", help="keys, policy or audit; repeatable.")],
    config: Config,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file for the token (0600).")],
    scope: Annotated[str, typer.Option(metavar="GLOB", help="Resource paths it is good for.")] = "*",
    expires: Annotated[str, typer.Option(metavar="WHEN", help="30d, 12h, a UTC time, never.")] = "30d",
) -> None:
    """Make a token. Its text is in the file alone; the broker keeps its hash."""
    from csvfast.broker.administration import LOCAL

    until = moment(expires, "--expires")
    check_output(str(output))
    with desk(config) as administration:
        text = administration.create_token(LOCAL, name, roles, scope=scope, expires=until)
    write_secret(text, str(output))
    print(f"{name}: {', '.join(roles)} on {scope} until {shown_moment(until)}, in {output}")


@token.command()
def revoke(name: Annotated[str, typer.Argument(metavar="NAME")], config: Config) -> None:
    """A token is good for nothing from now on."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        administration.revoke_token(LOCAL, name)
    print(f"{name}: revoked")


@token.command("list")
def list_tokens(config: Config, json: Json = False) -> None:
    """Names, roles and times; no secrets."""
    from csvfast.broker.administration import LOCAL

    with desk(config) as administration:
        rows = administration.list_tokens(LOCAL)
    facts = [
        {"name": row.name, "roles": list(row.roles), "scope": row.scope, "expires": shown_moment(row.expires)} for row in rows
    ]
    if json:
        print_json({"tokens": facts})
        return
    from rich.table import Table

    table = Table("name", "roles", "scope", "expires")
    for fact in facts:
        table.add_row(str(fact["name"]), ", ".join(fact["roles"]), str(fact["scope"]), str(fact["expires"]))
    console().print(table)
