"""`csvfast attest client`: what a guest does to get its keys."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csvfast.cli.broker_desk import check_output, write_secret
from csvfast.cli.common import CommandError

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.ratstls.attester import Attester

__all__ = ["app"]

app = typer.Typer(help="Attestation from the guest's side.", no_args_is_help=True, rich_markup_mode=None)


class Freshness(StrEnum):
    """--freshness."""

    certificate = "certificate"
    challenge = "challenge"


@app.callback()
def _root() -> None:
    """Attestation from the guest's side."""


@app.command()
def client(
    broker: Annotated[
        str,
        typer.Argument(metavar="BROKER", help="verdictd://HOST:PORT, https://HOST:PORT, or http://HOST:PORT on loopback."),
    ],
    path: Annotated[str, typer.Argument(metavar="PATH", help="repository/type/tag, kbs:///..., or a key id.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="A new file, the owner's alone; '-' is a pipe.")],
    device: Annotated[Path | None, typer.Option(metavar="FILE", help="The guest's device. Default: /dev/csv-guest.")] = None,
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Instead: of `csvfast platform serve`, for a simulated guest.")
    ] = None,
    vcpu_socket: Annotated[Path | None, typer.Option("--vcpu-socket", metavar="PATH", help="Its socket for vCPUs.")] = None,
    handle: Annotated[int | None, typer.Option(min=1, help="The simulated guest's handle.")] = None,
    certificates: Annotated[
        Path | None, typer.Option("--certs", metavar="DIR", help="Where HSK and CEK of this chip are, to send them along.")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", metavar="SHA256", help="verdictd: of the broker's public key (SPKI); repeatable.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="https: CA certificates instead of the system's.")] = None,
    freshness: Annotated[Freshness, typer.Option(help="verdictd: answer a challenge first.")] = Freshness.certificate,
) -> None:
    """Prove what this guest is and get a resource."""
    check_output(output)
    attester = _attester(device, socket, vcpu_socket, handle, certificates)
    scheme, _, rest = broker.partition(":")
    if scheme == "verdictd":
        if ca is not None:
            raise CommandError("--ca: verdictd's door is known by --pin")
        content = _from_verdictd(rest.removeprefix("//"), path, attester, pin or [], freshness)
    elif scheme in ("http", "https"):
        if pin:
            raise CommandError("--pin: for verdictd; an https broker is known by its certificate (--ca)")
        content = _from_kbs(broker, path, attester, ca)
    else:
        raise CommandError(f"broker {broker!r}: expected verdictd://HOST:PORT, https://... or http://...")
    write_secret(content, output)


def _attester(
    device: Path | None, socket: Path | None, vcpu: Path | None, handle: int | None, certificates: Path | None
) -> Attester:
    from csvfast.certs import CertificateStore
    from csvfast.ratstls.attester import DeviceAttester, SocketAttester

    store = None if certificates is None else CertificateStore([certificates], cache=False)
    if socket is None:
        if handle is not None or vcpu is not None:
            raise CommandError("--handle, --vcpu-socket: go with --socket")
        return DeviceAttester(device or Path("/dev/csv-guest"), certificates=store)
    if device is not None or handle is None:
        raise CommandError("--socket: expected --handle with it, and no --device")
    return SocketAttester(socket, handle, vcpu_path=vcpu, certificates=store)


def _from_verdictd(place: str, path: str, attester: Attester, pins: list[str], freshness: Freshness) -> Secret:
    from csvfast.broker.clients.verdictd import VerdictdClient
    from csvfast.broker.config import Address
    from csvfast.ratstls import Requirement

    address = Address.parse(place)
    try:
        keys = {bytes.fromhex(pin) for pin in pins}
    except ValueError:
        raise CommandError("--pin: expected 64 hexadecimal digits") from None
    requirement = Requirement.pinned(keys) if keys else Requirement.unattested()
    with VerdictdClient((address.host, address.port), attester, requirement) as client:
        if freshness is Freshness.challenge:
            client.challenge()
        return client.get_kek(path) if "/" not in path else client.get_resource(path)


def _from_kbs(url: str, path: str, attester: Attester, ca: Path | None) -> Secret:
    from csvfast.broker.clients.kbs import KbsClient, Tls

    with KbsClient(url, attester, tls=Tls(ca=ca)) as client:
        return client.get_resource(path)
