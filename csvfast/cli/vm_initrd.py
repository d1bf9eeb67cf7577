"""`csvfast vm initrd`: an initrd with busybox, Python and csvfast, the same bytes from the same inputs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from csvfast.cli.common import CommandError, format_bytes, print_json

__all__ = ["initrd"]


class CompressChoice(Enum):
    """--compress of `vm initrd`."""

    none = "none"
    gzip = "gzip"


def initrd(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The initrd; a file of that name is replaced.")],
    run: Annotated[
        str | None, typer.Option("--run", metavar="TEXT", help="Shell commands for the guest. Default: a shell on the console.")
    ] = None,
    script: Annotated[Path | None, typer.Option("--script", metavar="FILE", help="The same from a file.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="PLACE=FILE", help="One more file, and its absolute path in the guest. Repeatable."),
    ] = None,
    package: Annotated[
        list[str] | None, typer.Option("--package", metavar="NAME", help="One more Python package. Repeatable.")
    ] = None,
    python: Annotated[bool, typer.Option("--python/--no-python", help="Python with csvfast.")] = True,
    module: Annotated[
        list[str] | None, typer.Option("--module", metavar="NAME", help="One more kernel module. Repeatable.")
    ] = None,
    modules: Annotated[
        Path | None, typer.Option("--modules", metavar="DIR", help="Where the kernel's modules are. Default: the boot files'.")
    ] = None,
    no_modules: Annotated[bool, typer.Option("--no-modules", help="None: the kernel has what it needs.")] = False,
    busybox: Annotated[
        Path | None, typer.Option("--busybox", metavar="FILE", help="A static one. Default: the boot files', or the system's.")
    ] = None,
    compress: Annotated[CompressChoice, typer.Option("--compress", help="none starts fastest.")] = CompressChoice.none,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Builds an initrd; prints its SHA-256, as the hash table of the launch will hold it.

    It is measured, not encrypted: no keys or passwords in it.
    """
    from csvfast.machine.initrd import GUEST_MODULES, build_initrd

    if run is not None and script is not None:
        raise CommandError("--run and --script: expected one of the two")
    if no_modules and (module or modules is not None):
        raise CommandError("--no-modules with --module or --modules: expected one or the other")
    files = {}
    for item in file or []:
        place, equals, source = item.partition("=")
        if not equals or not place.startswith("/") or not source:
            raise CommandError(f"--file {item}: expected PLACE=FILE with an absolute place")
        files[place] = Path(source).read_bytes()
    built = build_initrd(
        out,
        modules=() if no_modules else (*GUEST_MODULES, *(module or [])),
        module_folder=modules,
        busybox=busybox,
        python=python,
        packages=("csvfast", *(package or [])),
        files=files,
        run=run if script is None else script.read_text(encoding="utf-8").removesuffix("\n"),
        compress=compress.value,
    )
    if as_json:
        print_json({"path": str(built.path), "size": built.size, "sha256": built.sha256.hex()})
        return
    print(f"{built.sha256.hex()}  {built.path} ({format_bytes(built.size)})")
