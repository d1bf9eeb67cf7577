"""`csvfast chip new | show`: simulated chips and the lines that make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, print_json

if TYPE_CHECKING:
    from csvfast.certs import ChipIdentity

__all__ = ["app"]

app = typer.Typer(
    help="Simulated chips: identity, certificates and keys in a private directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the chip is to live; must not exist.")],
    line: Annotated[
        Path | None,
        typer.Option(
            "--line",
            metavar="DIR",
            help="Manufacturing line (root and HSK with their keys), made when there is none. Default: one for this chip alone, "
            "whose keys are thrown away.",
        ),
    ] = None,
    chip_id: Annotated[
        str | None, typer.Option("--chip-id", metavar="ID", help="Must begin with SIM. Default: SIM and 10 random digits.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a simulated chip."""
    from csvfast.certs import ManufacturingLine, checked_chip_id
    from csvfast.certs.chip import SIMULATED_PREFIX

    # What cannot become a chip must not leave a line behind.
    if chip_id is not None and not checked_chip_id(chip_id).startswith(SIMULATED_PREFIX):
        raise CommandError(f"--chip-id: {chip_id!r}; expected {SIMULATED_PREFIX}..., as every simulated chip has")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CommandError(f"{directory}: exists; expected a new name")
    if line is None:
        manufacturer = ManufacturingLine.create()
    elif line.exists() and any(line.iterdir()):
        manufacturer = ManufacturingLine.load(line)
    else:
        manufacturer = ManufacturingLine.create(name=line.absolute().name)
        with _naming(line):
            manufacturer.save(line)
    chip = manufacturer.make_chip(chip_id)
    with _naming(directory):
        chip.save(directory)
    _show(chip, directory, json)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `chip new` made.")], json: Json = False
) -> None:
    """Check a chip's directory and show what is public in it."""
    from csvfast.certs import ChipIdentity

    _show(ChipIdentity.load(directory), directory, json)


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Writing happens in a temporary directory beside it, if the system names a file at all: the user typed this one."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{directory}: {error.strerror or error}", ExitCode.ENVIRONMENT) from None


def _show(chip: ChipIdentity, directory: Path, json: bool) -> None:
    from csvfast.certs import fingerprint

    record: dict[str, Any] = {
        "directory": str(directory),
        "chip_id": chip.chip_id,
        "simulated": True,
        "root": {"key_id": chip.root.key_id.hex(), "sm3": fingerprint(chip.root), "file": str(directory / "root.cert")},
        "hsk": {"key_id": chip.hsk.key_id.hex()},
        "cek": {"public_key": chip.cek.point.hex(), "api": f"{chip.cek.api_major}.{chip.cek.api_minor}"},
    }
    if json:
        print_json(record)
        return
    lines = [
        ("Chip", chip.chip_id),
        ("Root (simulated)", record["root"]["sm3"]),
        ("Root certificate", record["root"]["file"]),
        ("HSK key id", record["hsk"]["key_id"]),
        ("CEK public key", record["cek"]["public_key"]),
    ]
    for name, value in lines:
        print(f"{name + ':':<19}{value}")
