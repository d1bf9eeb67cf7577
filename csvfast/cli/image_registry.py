"""`csvfast image inspect | push | pull | copy | serve`: images in layouts and registries, as they are."""

from __future__ import annotations

import json as _json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, format_bytes, print_json, progress

if TYPE_CHECKING:
    from csvfast.image.layout import OciLayout
    from csvfast.image.manifest import Index
    from csvfast.image.reference import Reference
    from csvfast.image.registry import RegistryClient

__all__ = ["copy", "inspect", "pull", "push", "register", "serve"]

_TOKEN_LIMIT = 4096

_Image = Annotated[str, typer.Argument(metavar="IMAGE", help="oci:DIR[:TAG] or docker://HOST/NAME[:TAG|@DIGEST].")]
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="oci:DIR[:TAG] or docker://HOST/NAME[:TAG|@DIGEST].")]
_Target = Annotated[str, typer.Argument(metavar="TARGET", help="oci:DIR:TAG or docker://HOST/NAME:TAG.")]
_Platform = Annotated[
    str | None, typer.Option("--platform", metavar="OS/ARCH", help="Of an index, or 'all'. Default: this machine's.")
]
_PlainHttp = Annotated[
    bool, typer.Option("--plain-http", help="Registries over HTTP elsewhere than on this machine, too.")
]
_AuthFile = Annotated[
    Path | None, typer.Option("--auth-file", metavar="FILE", help="auth.json with the registry's user and password.")
]
_Ca = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="CA certificates of the registry instead of the system's.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def inspect(
    image: _Image,
    platform: _Platform = None,
    raw: Annotated[bool, typer.Option("--raw", help="The manifest's or index's bytes as they are.")] = False,
    plain_http: _PlainHttp = False,
    auth_file: _AuthFile = None,
    ca: _Ca = None,
    json: _AsJson = False,
) -> None:
    """Show what an image is made of, and which of its layers are encrypted for whom."""
    from csvfast.image.copy import ALL_PLATFORMS
    from csvfast.image.descriptor import is_index
    from csvfast.image.manifest import Index

    reference, options = _reference(image), _options(plain_http, ca)
    with _opened(reference, False, auth_file, options) as source:
        top, data = source.resolve(reference.wanted)
        if raw:
            sys.stdout.buffer.write(data)
            return
        if is_index(top.media_type) and platform == ALL_PLATFORMS:
            shown: dict[str, Any] = {"image": str(reference), "digest": top.digest, "media_type": top.media_type}
            shown["manifests"] = _platforms(Index.parse(data, top.media_type))
        else:
            shown = _describe(source, reference, platform)
    if json:
        print_json(shown)
    else:
        _show(shown)


def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="oci:DIR[:TAG].")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="docker://HOST/NAME[:TAG].")],
    platform: _Platform = None,
    plain_http: _PlainHttp = False,
    auth_file: _AuthFile = None,
    ca: _Ca = None,
    json: _AsJson = False,
) -> None:
    """Send an image from a layout on this machine to a registry."""
    one, other = _reference(source), _reference(target)
    if one.directory is None or other.host is None:
        raise CommandError("push goes from oci:DIR[:TAG] to docker://HOST/NAME[:TAG]; `csvfast image copy` goes anywhere")
    _transfer("pushing", one, other, platform, plain_http, auth_file, ca, json)


def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="docker://HOST/NAME[:TAG|@DIGEST].")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="oci:DIR[:TAG], which is made if it is missing.")],
    platform: _Platform = None,
    plain_http: _PlainHttp = False,
    auth_file: _AuthFile = None,
    ca: _Ca = None,
    json: _AsJson = False,
) -> None:
    """Fetch an image from a registry into a layout on this machine. Encrypted layers stay encrypted."""
    one, other = _reference(source), _reference(target)
    if one.host is None or other.directory is None:
        raise CommandError("pull goes from docker://HOST/NAME[:TAG] to oci:DIR[:TAG]; `csvfast image copy` goes anywhere")
    _transfer("pulling", one, other, platform, plain_http, auth_file, ca, json)


def copy(
    source: _Source,
    target: _Target,
    platform: _Platform = None,
    plain_http: _PlainHttp = False,
    auth_file: _AuthFile = None,
    ca: _Ca = None,
    json: _AsJson = False,
) -> None:
    """Copy an image as it is: every byte and every digest stays."""
    _transfer("copying", _reference(source), _reference(target), platform, plain_http, auth_file, ca, json)


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An OCI layout, which is made if it is missing.")],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 5000,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing can be pushed or deleted.")] = False,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Who asks must show this, as token or anybody's password."),
    ] = None,
    insecure_http: Annotated[
        bool, typer.Option("--insecure-http", help="Listen elsewhere than on a loopback address: everybody can listen in.")
    ] = False,
    json: _AsJson = False,
) -> None:
    """Serve an OCI layout as a registry until SIGTERM or Ctrl-C. For tests and for guests on this machine."""
    from csvfast.image.server import EmbeddedRegistry

    token = None if token_file is None else _token(token_file)
    stopped = threading.Event()
    with EmbeddedRegistry(
        directory, host, port, read_only=read_only, token=token, insecure_http=insecure_http
    ) as registry:  # fmt: skip
        before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if json:
                print_json({"address": registry.address, "url": registry.url, "directory": str(directory)})
            else:
                print(f"registry {registry.address}, images in {directory}: docker://{registry.address}/NAME:TAG")
            sys.stdout.flush()
            stopped.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def register(app: typer.Typer) -> None:
    """Adds these commands to `csvfast image`."""
    for command in (inspect, push, pull, copy, serve):
        app.command()(command)


# ---- Places


def _reference(text: str) -> Reference:
    from csvfast.image.reference import parse_reference

    return parse_reference(text)


def _options(plain_http: bool, ca: Path | None) -> dict[str, Any]:
    options: dict[str, Any] = {"plain_http": True} if plain_http else {}
    if ca is not None:
        import ssl

        options["tls"] = ssl.create_default_context(cafile=str(ca))
    return options


@contextmanager
def _opened(
    reference: Reference, create: bool, auth_file: Path | None, options: dict[str, Any]
) -> Iterator[OciLayout | RegistryClient]:
    from csvfast.image.registry import open_source, open_target
    from csvfast.image.registry_auth import find_credentials

    if auth_file is not None and reference.host is not None:
        if not auth_file.exists():
            raise CommandError(f"--auth-file: {auth_file} does not exist")
        options = {**options, "credentials": find_credentials(reference.host, reference.name, [auth_file])}
    place = (open_target if create else open_source)(reference, **options)
    try:
        yield place
    finally:
        place.close()


def _transfer(
    what: str, source: Reference, target: Reference, platform: str | None, plain_http: bool, auth_file: Path | None,
    ca: Path | None, json: bool,
) -> None:  # fmt: skip
    from csvfast.image.copy import copy_image

    if target.digest is not None:
        raise CommandError(f"{target}: a digest; expected a tag for what is written")
    tag = target.tag or ("latest" if target.host is not None else source.tag)
    options = _options(plain_http, ca)
    with (
        _opened(source, False, auth_file, options) as opened,
        _opened(target, True, auth_file, options) as written,
        progress(what, None, enabled=not json) as advance,
    ):
        made = copy_image(opened, written, wanted=source.wanted, tag=tag, platform=platform, progress=advance)
    if json:
        print_json({"image": str(target), "digest": made.digest, "size": made.size, "media_type": made.media_type})
    else:
        print(f"{target}  {made.digest}")


def _token(path: Path) -> bytes:
    from csvfast.certs.private import read_private_file

    token = bytes(read_private_file(path.parent, path.name, _TOKEN_LIMIT)).strip()
    if not token:
        raise CommandError(f"--token-file: {path} is empty")
    return token


# ---- What is shown


def _platforms(index: Index) -> list[dict[str, Any]]:
    return [
        {"digest": one.digest, "size": one.size, "media_type": one.media_type, "platform": str(one.platform or "")}
        for one in index.manifests
    ]


def _describe(source: OciLayout | RegistryClient, reference: Reference, platform: str | None) -> dict[str, Any]:
    from csvfast.image.annotations import packets_of, public_options_of
    from csvfast.image.blobs import read_blob, resolve_manifest
    from csvfast.image.copy import platform_parts
    from csvfast.image.image_config import ImageConfiguration
    from csvfast.image.manifest import MANIFEST_LIMIT

    descriptor, manifest = resolve_manifest(source, reference.wanted, *platform_parts(platform))
    config = ImageConfiguration.parse(read_blob(source, manifest.config, MANIFEST_LIMIT))
    layers = []
    for layer in manifest.layers:
        row: dict[str, Any] = {"digest": layer.digest, "size": layer.size, "media_type": layer.media_type}
        row["encrypted"] = layer.is_encrypted
        if layer.is_encrypted:
            row["cipher"] = public_options_of(layer).suite.name
            row["keys"] = [packet.scheme for packet in packets_of(layer)]
        layers.append(row)
    return {
        "image": str(reference),
        "digest": descriptor.digest,
        "media_type": descriptor.media_type,
        "platform": "/".join(part for part in (config.os, config.architecture, config.variant) if part),
        "created": config.created,
        "user": config.user,
        "command": list(config.arguments),
        "environment": list(config.environment),
        "working_directory": config.working_directory,
        "labels": dict(config.labels),
        "annotations": dict(manifest.annotations),
        "layers": layers,
    }


def _show(shown: dict[str, Any]) -> None:
    """For people; whatever the image says is escaped, as it may hold what a terminal obeys."""
    print(f"{shown['image']}  {shown['digest']}")
    if "manifests" in shown:
        for one in shown["manifests"]:
            print(f"  {_escaped(one['platform'] or '-'):16} {one['digest']}  {one['media_type']}")
        return
    for name in ("platform", "created", "user", "working_directory"):
        if shown[name]:
            print(f"{name.replace('_', ' '):18} {_escaped(shown[name])}")
    for name in ("command", "environment"):
        if shown[name]:
            print(f"{name:18} {' '.join(_json.dumps(one) for one in shown[name])}")
    for number, layer in enumerate(shown["layers"]):
        closed = f"encrypted ({layer['cipher']}) for {', '.join(map(_escaped, layer['keys']))}" if layer["encrypted"] else "clear"
        print(f"layer {number:<12} {layer['digest']}  {format_bytes(layer['size']):>10}  {closed}")


def _escaped(text: str) -> str:
    return ascii(text)[1:-1]
