"""`csvfast broker`: a key broker. init, serve, and the rooms for keys, policies, audit and tokens."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from csvfast.cli.broker_audit import audit, token
from csvfast.cli.broker_desk import REMOTE, Config, Json, directory_of, open_store
from csvfast.cli.broker_policy import policy, reference
from csvfast.cli.broker_resources import key, resource
from csvfast.cli.common import CommandError, exit_code_of, print_json

__all__ = ["app"]

app = typer.Typer(
    help="The key broker: keys only to guests that prove themselves.", no_args_is_help=True, rich_markup_mode=None
)
master = typer.Typer(help="The master key, which wraps all others.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(key, name="key")
app.add_typer(resource, name="resource")
app.add_typer(policy, name="policy")
app.add_typer(reference, name="reference")
app.add_typer(audit, name="audit")
app.add_typer(token, name="token")
app.add_typer(master, name="master")


class Master(StrEnum):
    """--master."""

    file = "file"
    passphrase = "passphrase"  # noqa: S105 - the word, not one
    pkcs11 = "pkcs11"


_Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The broker's directory, made by `csvfast broker init`.")]
_MasterKind = Annotated[Master, typer.Option("--master", help="Where the master key is.")]
_SecretFile = Annotated[
    Path | None, typer.Option("--secret-file", metavar="FILE", help="Passphrase, or PIN of the token, in a private file.")
]
_SecretVariable = Annotated[
    str | None, typer.Option("--secret-variable", metavar="NAME", help="The same in an environment variable.")
]
_Module = Annotated[str | None, typer.Option("--pkcs11-module", metavar="FILE", help="The token's library.")]
_Token = Annotated[str | None, typer.Option("--pkcs11-token", metavar="LABEL")]
_Key = Annotated[str, typer.Option("--pkcs11-key", metavar="LABEL")]


@app.callback()
def _root(
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", metavar="FILE", envvar="CSVFAST_BROKER_TOKEN_FILE",
            help="An administrator's token, for a broker that --config names by URL.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="CSVFAST_BROKER_CA", help="CA certificates for https instead of the system's."),
    ] = None,
) -> None:  # fmt: skip
    """The key broker: keys only to guests that prove themselves."""
    REMOTE.token_file, REMOTE.ca = token_file, ca


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="To be made; private to its owner.")],
    root: Annotated[
        list[Path] | None,
        typer.Option("--root", metavar="FILE", help="Trusted root certificate, repeatable. Default: Hygon's alone."),
    ] = None,
    store: Annotated[str, typer.Option(metavar="URL", help="sqlite:///FILE or postgresql://...")] = "sqlite:///broker.db",
    master: _MasterKind = Master.file,
    secret_file: _SecretFile = None,
    secret_variable: _SecretVariable = None,
    pkcs11_module: _Module = None,
    pkcs11_token: _Token = None,
    pkcs11_key: _Key = "csvfast-broker",
    verdictd: Annotated[str, typer.Option(metavar="ADDRESS", help="Of Verdictd's door.")] = "127.0.0.1:1234",
    kbs: Annotated[str, typer.Option(metavar="ADDRESS", help="Of the KBS door.")] = "127.0.0.1:8080",
    json: Json = False,
) -> None:
    """Make a broker: configuration, master key, TLS key, an empty store, a first token for its administration."""
    from csvfast.broker.administration import LOCAL, ROLES, Administration
    from csvfast.broker.config import Address, BrokerConfig
    from csvfast.broker.master import create_master
    from csvfast.broker.store import Store
    from csvfast.certs import CaCertificate
    from csvfast.certs.private import write_private_directory, write_private_file
    from csvfast.ratstls.keys import TlsKey

    for address in (verdictd, kbs):
        Address.parse(address)
    roots = {f"root-{index}.cert": CaCertificate.parse(path.read_bytes()).encoded for index, path in enumerate(root or [])}
    table = _master_table(master, secret_file, secret_variable, pkcs11_module, pkcs11_token, pkcs11_key)
    text = _configuration(store, table, list(roots) or ["hygon"], verdictd, kbs)
    BrokerConfig.parse(text.encode(), directory.absolute())
    tls_key = TlsKey.generate("p256")
    write_private_directory(directory, {"broker.toml": text.encode(), "tls.key": tls_key.dump(), **roots})
    try:
        config = BrokerConfig.load(directory)
        opened = Store.open(config.store_url, create_master(config.master, base=config.base), create=True)
        try:
            secret = Administration(opened).create_token(LOCAL, "admin", sorted(ROLES))
            write_private_file(directory / "admin.token", memoryview(secret))
        finally:
            opened.close()
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(directory)
        raise
    if json:
        print_json(
            {
                "directory": str(directory),
                "store": _without_password(config.store_url),
                "verdictd": verdictd,
                "kbs": kbs,
                "pin": tls_key.spki_sha256.hex(),
            }
        )
    else:
        print(f"broker in {directory}: csvfast broker serve {directory}")
        print(f"guests that ask through Verdictd's door pin {tls_key.spki_sha256.hex()}")
        print(f"administrator's token in {directory / 'admin.token'}")


@app.command()
def serve(directory: _Directory, json: Json = False) -> None:
    """Serve until SIGTERM or Ctrl-C. Log: JSON lines on standard error."""
    from csvfast.broker.config import BrokerConfig
    from csvfast.broker.logs import set_up

    config = BrokerConfig.load(directory)
    set_up(config.log_level)
    from csvfast.broker.service import run

    serving = False

    def ready(doors: dict[str, Any]) -> None:
        nonlocal serving
        serving = True
        if json:
            print_json({"doors": doors})
        else:
            for name, address in doors.items():
                print(f"{name}: {address}")
        sys.stdout.flush()

    try:
        run(config, open_store, ready)
    except Exception as error:
        if not serving:
            raise
        # From here on standard error is the log's.
        logging.getLogger(__name__).critical("stopped by an error", exc_info=error)
        raise typer.Exit(exit_code_of(error)) from None


@master.command()
def rotate(
    config: Config,
    master: _MasterKind = Master.file,
    secret_file: _SecretFile = None,
    secret_variable: _SecretVariable = None,
    pkcs11_module: _Module = None,
    pkcs11_token: _Token = None,
    pkcs11_key: _Key = "csvfast-broker",
    new_name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="File of the new master key or its record, beside broker.toml.")
    ] = "master-2",
) -> None:
    """Wrap everything under a new master key. Stop the broker first, then put the table that is printed into broker.toml."""
    from csvfast.broker.administration import LOCAL, Administration
    from csvfast.broker.config import BrokerConfig
    from csvfast.broker.master import create_master

    loaded = BrokerConfig.load(directory_of(config))
    table = _master_table(master, secret_file, secret_variable, pkcs11_module, pkcs11_token, pkcs11_key, new_name)
    store = open_store(loaded)
    try:
        Administration(store).rotate_master(LOCAL, create_master(table, base=loaded.base))
    finally:
        store.close()
    print("everything is wrapped by the new master key; in broker.toml from now on:\n")
    print(_table("master", table), end="")


def _master_table(
    kind: Master,
    secret_file: Path | None,
    secret_variable: str | None,
    module: str | None,
    token_label: str | None,
    key_label: str,
    name: str = "master",
) -> dict[str, Any]:
    if kind is Master.file:
        if secret_file or secret_variable:
            raise CommandError("--secret-file, --secret-variable: a master key in a file has none")
        return {"kind": "file", "path": f"{name}.key"}
    if (secret_file is None) == (secret_variable is None):
        raise CommandError(f"--master {kind.value}: expected either --secret-file or --secret-variable")
    source = {"file": str(secret_file.absolute())} if secret_file else {"environment": secret_variable}
    if kind is Master.passphrase:
        return {"kind": "passphrase", "record": f"{name}.json", "passphrase": source}
    if module is None or token_label is None:
        raise CommandError("--master pkcs11: expected --pkcs11-module and --pkcs11-token")
    return {"kind": "pkcs11", "module": module, "token": token_label, "key": key_label, "pin": source}


def _configuration(store: str, table: dict[str, Any], roots: list[str], verdictd: str, kbs: str) -> str:
    import json

    return (
        "# A broker's configuration; docs/broker.md explains every member.\n\n"
        + _table("store", {"url": store})
        + _table("master", table)
        + "# Guests are believed when their chain ends here.\n"
        + _table("trust", {"roots": roots})
        + _table("verdictd", {"listen": verdictd, "key": "tls.key"})
        + _table("kbs", {"listen": kbs})
        + "# Whoever can open these sockets acts as the owner.\n"
        + _table("keyprovider", {"listen": "unix:keyprovider.sock", "local_trust": True})
        + _table("clientapi", {"listen": "unix:clientapi.sock", "local_trust": True})
        + "# [administration]\n# certificate = [{ sha256 = "
        + json.dumps("...")
        + ', name = "alice", roles = ["policy"] }]\n'
    )


def _without_password(url: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def _table(name: str, members: dict[str, Any]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in members.items()) + "\n"


def _toml(value: Any) -> str:
    """TOML's basic strings are JSON's, as far as these values go."""
    import json

    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)
