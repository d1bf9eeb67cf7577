"""`csvfast image encrypt | decrypt | recipients | rewrap | new-key`: layers' encryption and who can undo it.

Keys and recipients are written like this:

    provider:NAME[:PARAMETERS]   a key provider of $OCICRYPT_KEYPROVIDER_CONFIG, --provider-config or --provider
    kek:FILE[:KEYID]             a key-encryption key of 32 bytes; its id is the file's name without its end, unless given
    jwe:FILE                     a private key, to decrypt with
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from csvfast.cli.common import CommandError, ExitCode, format_bytes, print_json, progress

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.keys import KeyWrapper, Recipient
    from csvfast.image.manifest import Manifest

__all__ = ["decrypt", "encrypt", "new_key", "recipients", "register", "rewrap"]

_KEYS = "provider:NAME[:PARAMETERS] or kek:FILE[:KEYID]"

_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="oci:DIR[:TAG] or docker://HOST/NAME[:TAG|@DIGEST].")]
_Target = Annotated[str, typer.Argument(metavar="TARGET", help="oci:DIR:TAG or docker://HOST/NAME:TAG.")]
_To = Annotated[list[str], typer.Option("--to", "-t", metavar="KEY", help=f"For whom: {_KEYS}. May be repeated.")]
_Key = Annotated[
    list[str], typer.Option("--key", "-k", metavar="KEY", help=f"To decrypt with: {_KEYS}, jwe:FILE. May be repeated.")
]
_Layer = Annotated[
    list[int] | None,
    typer.Option("--layer", "-l", metavar="N", help="Only this one, from 0; -1 is the last. May be repeated."),
]
_Platform = Annotated[
    str | None,
    typer.Option("--platform", metavar="OS/ARCH", help="Of an index, or 'all'. Default: this machine's."),
]
_ProviderConfig = Annotated[
    Path | None,
    typer.Option("--provider-config", metavar="FILE", help="Key providers. Default: $OCICRYPT_KEYPROVIDER_CONFIG."),
]
_Provider = Annotated[
    list[str] | None,
    typer.Option("--provider", metavar="NAME=ADDRESS", help="A key provider at HOST:PORT or unix:///PATH. May be repeated."),
]
_Password = Annotated[
    Path | None, typer.Option("--password-file", metavar="FILE", help="Password of encrypted private keys (jwe:).")
]
_PlainHttp = Annotated[
    bool, typer.Option("--plain-http", help="Registries over HTTP elsewhere than on this machine, too.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def encrypt(
    source: _Source,
    target: _Target,
    to: _To,
    layer: _Layer = None,
    suite: Annotated[
        str,
        typer.Option("--suite", metavar="NAME", help="SM4_128_CTR_HMAC_SM3: national algorithms, which only csvfast reads."),
    ] = "AES_256_CTR_HMAC_SHA256",
    platform: _Platform = None,
    provider_config: _ProviderConfig = None,
    provider: _Provider = None,
    plain_http: _PlainHttp = False,
    json: _Json = False,
) -> None:
    """Encrypt an image's layers. Its configuration (environment, command, labels) stays readable for everybody."""
    from csvfast.image.encrypt import encrypt_image
    from csvfast.image.suites import SUITES

    if suite not in SUITES:
        raise CommandError(f"--suite: {suite!r}; expected {' or '.join(SUITES)}")
    with _work(source, target, plain_http) as work, _Keys(provider_config, provider) as keys:
        with work.bar("encrypting", json) as advance:
            made = encrypt_image(
                work.source, work.target, [keys.recipient(one) for one in to], layers=layer, wanted=work.wanted,
                tag=work.tag, platform=platform, suite=SUITES[suite], progress=advance,
            )  # fmt: skip
        _report(work, made, json)


def decrypt(
    source: _Source,
    target: _Target,
    key: _Key,
    platform: _Platform = None,
    provider_config: _ProviderConfig = None,
    provider: _Provider = None,
    password_file: _Password = None,
    plain_http: _PlainHttp = False,
    json: _Json = False,
) -> None:
    """Decrypt an image into an image. (`csvfast run` needs no such copy.)"""
    from csvfast.image.decrypt import decrypt_image

    with _work(source, target, plain_http) as work, _Keys(provider_config, provider, password_file) as keys:
        with work.bar("decrypting", json) as advance:
            made = decrypt_image(
                work.source, work.target, [keys.wrapper(one) for one in key], wanted=work.wanted, tag=work.tag,
                platform=platform, progress=advance,
            )  # fmt: skip
        _report(work, made, json)


def recipients(
    source: _Source,
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="With --add: where to. Default: SOURCE.")] = None,
    add: Annotated[list[str] | None, typer.Option("--add", metavar="KEY", help=f"{_KEYS}. May be repeated.")] = None,
    key: Annotated[list[str] | None, typer.Option("--key", "-k", metavar="KEY", help="With --add: to unwrap with.")] = None,
    layer: _Layer = None,
    platform: _Platform = None,
    provider_config: _ProviderConfig = None,
    provider: _Provider = None,
    password_file: _Password = None,
    plain_http: _PlainHttp = False,
    json: _Json = False,
) -> None:
    """Show for whom an image is encrypted, or add recipients; the layers stay as they are."""
    from csvfast.image.recipients import add_recipients

    if not add:
        if target is not None or key:
            raise CommandError("TARGET and --key are for --add, which is missing")
        _list(source, platform, plain_http, json)
        return
    with _work(source, target or source, plain_http) as work, _Keys(provider_config, provider, password_file) as keys:
        made = add_recipients(
            work.source, work.target, [keys.recipient(one) for one in add], [keys.wrapper(one) for one in key or ()],
            layers=layer, wanted=work.wanted, tag=work.tag, platform=platform,
        )  # fmt: skip
        _report(work, made, json)


def rewrap(
    source: _Source,
    key: _Key,
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="Default: SOURCE.")] = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", "-t", metavar="KEY", help="For these and nobody else. Default: as it is.")
    ] = None,
    layer: _Layer = None,
    platform: _Platform = None,
    provider_config: _ProviderConfig = None,
    provider: _Provider = None,
    password_file: _Password = None,
    plain_http: _PlainHttp = False,
    json: _Json = False,
) -> None:
    """Wrap the layers' keys anew, e.g. after a key-encryption key was rotated; the layers stay as they are."""
    from csvfast.image.recipients import rewrap as rewrap_image

    with _work(source, target or source, plain_http) as work, _Keys(provider_config, provider, password_file) as keys:
        made = rewrap_image(
            work.source, work.target, [keys.wrapper(one) for one in key],
            [keys.recipient(one) for one in to] if to else None,
            layers=layer, wanted=work.wanted, tag=work.tag, platform=platform,
        )  # fmt: skip
        _report(work, made, json)


def new_key(file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, the owner's alone.")]) -> None:
    """Make a key-encryption key: 32 random bytes."""
    from csvfast.certs.private import write_private_file
    from csvfast.crypto import Secret

    if file.is_symlink() or file.exists():
        raise CommandError(f"{file}: exists; nothing was overwritten")
    write_private_file(file, Secret.random(32))


def register(app: typer.Typer) -> None:
    """Adds these commands to `csvfast image`."""
    app.command("encrypt")(encrypt)
    app.command("decrypt")(decrypt)
    app.command("recipients")(recipients)
    app.command("rewrap")(rewrap)
    app.command("new-key")(new_key)


# ---- Keys


class _Keys:
    """Keys as they are written on the command line. Closes what it has opened."""

    def __init__(self, config: Path | None, providers: list[str] | None, password_file: Path | None = None) -> None:
        self._config = config
        self._providers: dict[str, dict[str, Any]] = {}
        for one in providers or ():
            name, equals, address = one.partition("=")
            if not equals or not name or not address:
                raise CommandError(f"--provider: {one!r}; expected NAME=ADDRESS")
            self._providers[name] = {"grpc": address}
        self._password_file = password_file
        self._opened = ExitStack()

    def __enter__(self) -> _Keys:
        return self

    def __exit__(self, *_error: object) -> None:
        self._opened.close()

    def recipient(self, text: str) -> Recipient:
        """CommandError for what cannot wrap keys."""
        from csvfast.image.keys import Recipient

        if text.startswith("jwe:"):
            raise CommandError(f"{text!r}: JWE is read only; expected {_KEYS}")
        return Recipient(self.wrapper(text))

    def wrapper(self, text: str) -> KeyWrapper:
        """CommandError, ImageError, StateError."""
        from csvfast.image.jwe_reader import JweKey
        from csvfast.image.providers import make_provider, read_configuration
        from csvfast.image.wrappers import LocalKek

        kind, _, rest = text.partition(":")
        name, _, parameters = rest.partition(":")
        if not name or kind not in ("provider", "kek", "jwe"):
            raise CommandError(f"key {text!r}; expected {_KEYS}, or jwe:FILE to decrypt with")
        if kind == "kek":
            return self._opened.enter_context(LocalKek.from_file(Path(name), parameters or None))
        if kind == "jwe":
            return JweKey.from_file(Path(rest), self._password())
        attributes = self._providers.get(name) or read_configuration(self._config).get(name)
        if attributes is None:
            raise CommandError(f"key {text!r}: no provider {name!r} is configured")
        return self._opened.enter_context(make_provider(name, attributes, parameters))

    def _password(self) -> Secret | None:
        if self._password_file is None:
            return None
        from csvfast.certs.private import read_private_file
        from csvfast.crypto import Secret

        data = read_private_file(self._password_file.parent, self._password_file.name, 4096)
        text = bytes(data).removesuffix(b"\n")
        if not text:
            raise CommandError(f"{self._password_file}: empty; expected a password")
        return Secret(text)


# ---- Images


class _Work(NamedTuple):
    source: Any
    target: Any
    wanted: str | None
    tag: str | None
    place: str

    @contextmanager
    def bar(self, what: str, as_json: bool) -> Iterator[Any]:
        """Progress over the bytes of all layers, whose number is not known before the manifest is."""
        with progress(what, None, enabled=not as_json) as advance:
            yield advance


@contextmanager
def _work(source: str, target: str, plain_http: bool) -> Iterator[_Work]:
    from csvfast.errors import ImageError
    from csvfast.image.reference import parse_reference
    from csvfast.image.registry import open_source, open_target

    one, other = parse_reference(source), parse_reference(target)
    if other.digest is not None:
        raise CommandError(f"{target}: a digest; expected a tag, as what is written has another digest")
    options = {"plain_http": True} if plain_http else {}
    with ExitStack() as stack:
        opened = open_source(one, **options)
        stack.callback(opened.close)
        written = open_target(other, **options)
        stack.callback(written.close)
        tag = other.tag or ("latest" if other.host is not None else None)
        try:
            yield _Work(opened, written, one.wanted, tag, str(other))
        except ImageError as error:
            if isinstance(error.__cause__, ExceptionGroup):  # nobody unwraps its key: refused, and not mistyped
                raise CommandError(str(error), ExitCode.CHECK_FAILED) from error
            raise


def _report(work: _Work, made: Descriptor, as_json: bool) -> None:
    if as_json:
        print_json({"image": work.place, "digest": made.digest, "size": made.size, "media_type": made.media_type})
    else:
        print(f"{work.place}  {made.digest}")


def _list(source: str, platform: str | None, plain_http: bool, as_json: bool) -> None:
    from csvfast.image.reference import parse_reference
    from csvfast.image.registry import open_source
    from csvfast.image.transform import find_manifest

    reference = parse_reference(source)
    with closing(open_source(reference, **({"plain_http": True} if plain_http else {}))) as opened:
        manifest = find_manifest(opened, reference.wanted, platform)
    rows = [_row(manifest, number) for number in range(len(manifest.layers))]
    if as_json:
        print_json({"image": source, "layers": rows})
        return
    for row in rows:
        if not row["encrypted"]:
            print(f"layer {row['layer']}  {row['digest']}  {format_bytes(row['size'])}  not encrypted")
            continue
        print(f"layer {row['layer']}  {row['digest']}  {format_bytes(row['size'])}  {row['cipher']}")
        for one in row["keys"]:
            scheme, key = (ascii(one[name])[1:-1] for name in ("scheme", "key"))  # whoever wrote the manifest wrote these
            print(f"    {scheme}  {key or '(does not say for which key)'}  {one['form']}".rstrip())


def _row(manifest: Manifest, number: int) -> dict[str, Any]:
    from csvfast.image.annotations import public_options_of
    from csvfast.image.recipients import list_recipients

    layer = manifest.layers[number]
    row: dict[str, Any] = {"layer": number, "digest": layer.digest, "size": layer.size, "encrypted": layer.is_encrypted}
    if layer.is_encrypted:
        row["cipher"] = public_options_of(layer).suite.name
        row["keys"] = [one._asdict() for one in list_recipients(layer)]
    return row
