"""`csvfast image unpack`: an image, encrypted or not, becomes a bundle that runc and crun run, or only its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, format_bytes, parse_size, print_json, progress
from csvfast.cli.image_encryption import _Keys
from csvfast.cli.image_registry import _opened, _options

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.image.assemble import AssembledImage
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.limits import Limits

__all__ = ["register", "unpack"]


def unpack(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="oci:DIR[:TAG] or docker://HOST/NAME[:TAG|@DIGEST].")],
    destination: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new directory: rootfs and config.json will be in it.")
    ],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            "-k",
            metavar="KEY",
            help="provider:NAME[:PARAMETERS], kek:FILE[:KEYID] or jwe:FILE. May be repeated.",
        ),
    ] = None,
    rootfs_only: Annotated[
        bool, typer.Option("--rootfs-only", help="DIR is the root file system itself, without config.json.")
    ] = False,
    rootless: Annotated[
        bool | None,
        typer.Option(
            "--rootless/--owners",
            help="All files belong to the caller, or to whom the image says. Default: whether root asks.",
        ),
    ] = None,
    devices: Annotated[
        bool, typer.Option("--devices", help="Make device nodes. Otherwise an image with one is refused.")
    ] = False,
    encrypted_only: Annotated[
        bool, typer.Option("--encrypted-only", help="Refuse an image with a clear layer.")
    ] = False,
    command: Annotated[
        list[str] | None,
        typer.Option("--command", metavar="TEXT", help="In the place of the image's command. May be repeated."),
    ] = None,
    size_limit: Annotated[
        str | None, typer.Option("--size-limit", metavar="SIZE", help="Of all files together. Default: 64GiB.")
    ] = None,
    entry_limit: Annotated[
        int | None, typer.Option("--entry-limit", metavar="N", min=1, help="Entries. Default: 2,000,000.")
    ] = None,
    platform: Annotated[
        str | None, typer.Option("--platform", metavar="OS/ARCH", help="Of an index. Default: this machine's.")
    ] = None,
    provider_config: Annotated[
        Path | None,
        typer.Option("--provider-config", metavar="FILE", help="Key providers. Default: $OCICRYPT_KEYPROVIDER_CONFIG."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", metavar="NAME=ADDRESS", help="A key provider at HOST:PORT or unix:///PATH. May be repeated."
        ),
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", metavar="FILE", help="Password of encrypted private keys (jwe:).")
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Registries over HTTP elsewhere than on this machine, too.")
    ] = False,
    auth_file: Annotated[
        Path | None,
        typer.Option("--auth-file", metavar="FILE", help="auth.json with the registry's user and password."),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", metavar="FILE", help="CA certificates instead of the system's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Unpack an image: every layer is checked, decrypted and checked again before anything appears.

    What is unpacked lies in the clear on this machine's disk: for tests and for guests, not for an untrusted host.
    """
    from csvfast.image.keys import unwrap_any
    from csvfast.image.reference import parse_reference

    if rootfs_only and command:
        raise CommandError("--command: there is no config.json with --rootfs-only")
    if os.path.lexists(destination):
        raise CommandError(f"{destination}: exists; nothing was overwritten")
    owners = None if rootless is None else not rootless
    reference = parse_reference(source)
    denied = False
    with (
        _Keys(provider_config, provider, password_file) as keys,
        _opened(reference, False, auth_file, _options(plain_http, ca)) as opened,
        progress("unpacking", None, enabled=not json) as advance,
    ):
        wrappers = [keys.wrapper(one) for one in key or ()]

        def unwrap(layer: Descriptor) -> Secret:
            nonlocal denied
            denied = True
            private = unwrap_any(layer, wrappers)
            denied = False
            return private

        before = 0

        def show(step: str, done: int, _total: int) -> None:
            nonlocal before
            if step == "download":
                advance(done - before)
                before = done

        options: dict[str, Any] = {
            "unwrap": unwrap if wrappers else None, "clear_layers": not encrypted_only, "platform": platform, "owners": owners,
            "devices": devices, "limits": _limits(size_limit, entry_limit), "progress": show,
        }  # fmt: skip
        try:
            made = _make(opened, reference.wanted, destination, rootfs_only, rootless, command, options)
        except Exception as error:
            if denied:  # nobody unwraps its key: refused, and not mistyped
                raise CommandError(str(error), ExitCode.CHECK_FAILED) from error
            raise
    _report(made, destination, json)


def register(app: typer.Typer) -> None:
    """Adds the command to `csvfast image`."""
    app.command("unpack")(unpack)


def _limits(size: str | None, entries: int | None) -> Limits:
    from csvfast.image.limits import DEFAULT_LIMITS, Limits

    total = DEFAULT_LIMITS.total_bytes if size is None else parse_size(size)
    if total < 1:
        raise CommandError(f"--size-limit: {size!r}; expected at least one byte")
    return Limits(
        total_bytes=total,
        file_bytes=min(total, DEFAULT_LIMITS.file_bytes),
        entries=DEFAULT_LIMITS.entries if entries is None else entries,
    )


def _make(
    source: Any, wanted: str | None, destination: Path, rootfs_only: bool, rootless: bool | None, command: list[str] | None,
    options: dict[str, Any],
) -> AssembledImage:  # fmt: skip
    from csvfast.image.assemble import assemble_image
    from csvfast.image.bundle import write_bundle
    from csvfast.image.tree import remove_tree

    if rootfs_only:
        return assemble_image(source, wanted, destination, **options)
    destination.mkdir(mode=0o700)
    try:
        made = assemble_image(source, wanted, destination / "rootfs", **options)
        write_bundle(
            made.config,
            made.rootfs,
            destination,
            command=command,
            rootless=os.geteuid() != 0 if rootless is None else rootless,
        )
    except BaseException:
        parent = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(parent, destination.name)
        finally:
            os.close(parent)
        raise
    return made


def _report(made: AssembledImage, destination: Path, as_json: bool) -> None:
    entries, size = sum(layer.entries for layer in made.layers), sum(layer.size for layer in made.layers)
    if as_json:
        print_json({
            "directory": str(destination), "digest": made.descriptor.digest, "entries": entries, "size": size,
            "notes": list(made.notes),
            "layers": [
                {"diff_id": layer.diff_id, "entries": layer.entries, "size": layer.size, "encrypted": encrypted}
                for layer, encrypted in zip(made.layers, made.encrypted, strict=True)
            ],
        })  # fmt: skip
        return
    closed = sum(made.encrypted)
    print(f"{destination}  {made.descriptor.digest}")
    print(f"{len(made.layers)} layers ({closed} encrypted), {entries} entries, {format_bytes(size)}")
    for note in made.notes:
        print(f"note: {note}")
