"""`csvfast platform init | status | pek-gen | pek-csr | sign-csr | pek-import | pdh-gen | pdh-export | get-id | reset`.

Each command powers the processor of a chip's directory on, executes what a host would, and powers it off; what persists is what
persists in the real part: PEK, PDH, OCA and the ownership. `sign-csr` is the owner's side and needs no platform.

Exit codes: 0 done; 1 the firmware refused the command; 2 usage, or a certificate that cannot be read; 3 the state directory or
a file cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from csvfast.cli.common import CommandError, ExitCode, print_json
from csvfast.cli.serve import serve

if TYPE_CHECKING:
    from csvfast.certs.layout import CsvCertificate
    from csvfast.crypto import SM2PrivateKey
    from csvfast.processor import Processor
    from csvfast.processor.identity import PlatformIdentity

__all__ = ["app"]

app = typer.Typer(
    help="The platform of a simulated chip: its keys, its owner, its status. '-' is standard input or output.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("serve")(serve)

_MEMORY: Final = 4096  # no guest runs here
_CSV_BYTES: Final = 2084
_DEFAULT_PROFILE: Final = "1.4/2337"

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="State of a simulated chip, made by `csvfast chip new`.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ProfileName = Annotated[
    str,
    typer.Option("--profile", metavar="NAME", help="Firmware: 1.3/2011 or 1.4/2337. New certificates carry its API."),
]


@app.command()
def init(directory: Directory, profile: ProfileName = _DEFAULT_PROFILE, json: Json = False) -> None:
    """INIT: make the platform's keys if it has none, and show its status."""
    with _powered(directory, profile) as processor:
        _show_status(processor, processor.owned_identity, json)


@app.command()
def status(directory: Directory, profile: ProfileName = _DEFAULT_PROFILE, json: Json = False) -> None:
    """Show what the platform is and who owns it. Changes nothing, not even in factory state."""
    with _powered(directory, profile, init=False) as processor:
        stored = processor.storage.load() if processor.storage is not None else None
        _show_status(processor, stored, json)


@app.command("pek-gen")
def pek_gen(directory: Directory, profile: ProfileName = _DEFAULT_PROFILE, json: Json = False) -> None:
    """PEK_GEN: new OCA, PEK and PDH; the platform owns itself."""
    with _powered(directory, profile) as processor:
        processor.pek_gen()
        _show_status(processor, processor.owned_identity, json)


@app.command("pdh-gen")
def pdh_gen(directory: Directory, profile: ProfileName = _DEFAULT_PROFILE, json: Json = False) -> None:
    """PDH_GEN: a new PDH. Sessions made for the old one no longer work."""
    with _powered(directory, profile) as processor:
        processor.pdh_gen()
        _show_status(processor, processor.owned_identity, json)


@app.command("pek-csr")
def pek_csr(
    directory: Directory,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where the CSR goes.")] = "-",
) -> None:
    """PEK_CSR: the PEK certificate with empty slots, for an owner to sign (`sign-csr`)."""
    with _powered(directory, _DEFAULT_PROFILE) as processor:
        _write(output, processor.pek_csr())


@app.command("sign-csr")
def sign_csr(
    csr: Annotated[str, typer.Argument(metavar="CSR", help="What `pek-csr` gave.")],
    key: Annotated[
        Path,
        typer.Option("--key", metavar="FILE", help="The owner's private key (PEM); made, private, if there is none."),
    ],
    oca: Annotated[
        Path, typer.Option("--oca", metavar="FILE", help="The owner's self-signed certificate; made if there is none.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where the signed PEK goes.")] = "-",
    json: Json = False,
) -> None:
    """The owner's side: sign a platform's PEK with an OCA key. Look at the platform's chain first: this proves nothing."""
    from csvfast.certs.layout import KeyUsage

    if json and output == "-":
        raise CommandError("--json: expected --output FILE as well; both would go to standard output")
    request = _read_certificate(csr)
    if request.usage != KeyUsage.PEK:
        raise CommandError(f"{csr}: usage {request.usage:#x}; expected a PEK certificate ({int(KeyUsage.PEK):#x})")
    owner_key = _owner_key(key)
    certificate = _owner_certificate(oca, owner_key, (request.api_major, request.api_minor))
    signed = request.with_signature(2, owner_key, KeyUsage.OCA, certificate.user_id)
    _write(output, signed.encoded)
    if json:
        print_json({"pek": _fingerprint(signed), "oca": _fingerprint(certificate), "key": str(key), "output": output})


@app.command("pek-import")
def pek_import(
    directory: Directory,
    pek: Annotated[str, typer.Argument(metavar="PEK", help="The CSR as the owner signed it.")],
    oca: Annotated[str, typer.Argument(metavar="OCA", help="The owner's certificate.")],
    json: Json = False,
) -> None:
    """PEK_CERT_IMPORT: hand the platform over to the owner."""
    if pek == oca == "-":
        raise CommandError("PEK and OCA: expected standard input for one of them at most")
    signed, owner = _read(pek), _read(oca)
    with _powered(directory, _DEFAULT_PROFILE) as processor:
        processor.pek_cert_import(signed, owner)
        _show_status(processor, processor.owned_identity, json)


@app.command("pdh-export")
def pdh_export(
    directory: Directory,
    pdh: Annotated[Path, typer.Option("--pdh", metavar="FILE", help="Where the PDH goes, 2084 bytes.")],
    chain: Annotated[
        Path | None, typer.Option("--chain", metavar="FILE", help="Where PEK, OCA and CEK go, 6252 bytes.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option("--hsk-cek", metavar="FILE", help="Where HSK and CEK go, 2916 bytes.")
    ] = None,
    json: Json = False,
) -> None:
    """PDH_CERT_EXPORT: what a guest owner needs to make a session for this platform."""
    with _powered(directory, _DEFAULT_PROFILE) as processor:
        certificate, rest = processor.pdh_cert_export()
        _write(str(pdh), certificate)
        if chain is not None:
            _write(str(chain), rest)
        if ca is not None:
            _write(str(ca), processor.chip.hsk_cek)
        if json:
            print_json(
                {
                    "pdh": str(pdh),
                    "chain": None if chain is None else str(chain),
                    "hsk_cek": None if ca is None else str(ca),
                    "pdh_sm3": _fingerprint(processor.owned_identity.pdh),
                }
            )


@app.command("get-id")
def get_id(directory: Directory, json: Json = False) -> None:
    """GET_ID: the chip id, by which its certificates are found."""
    with _powered(directory, _DEFAULT_PROFILE, init=False) as processor:
        chip_id = processor.get_id().rstrip(b"\0").decode("ascii")
    if json:
        print_json({"chip_id": chip_id})
    else:
        print(chip_id)


@app.command()
def reset(
    directory: Directory,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """FACTORY_RESET: delete PEK, PDH, OCA and ownership. The chip's own identity stays."""
    if not yes:
        if not sys.stdin.isatty():
            raise CommandError("reset: expected --yes, since nobody can be asked")
        typer.confirm(f"Delete the platform keys in {directory}?", abort=True, err=True)
    with _powered(directory, _DEFAULT_PROFILE, init=False) as processor:
        processor.factory_reset()
        _show_status(processor, None, json)


@contextmanager
def _powered(directory: Path, profile: str, *, init: bool = True) -> Iterator[Processor]:
    """The processor of a directory, initialised unless told otherwise; refusals end the command with exit code 1."""
    import csvfast
    from csvfast.errors import FirmwareError
    from csvfast.processor import PROFILES, Processor

    if profile not in PROFILES:
        raise CommandError(f"--profile: {profile!r}; expected one of {', '.join(PROFILES)}")
    try:
        with (
            csvfast.EncryptedMemory(_MEMORY) as memory,
            Processor.open(directory, memory, profile=PROFILES[profile]) as processor,
        ):
            if init:
                processor.init()
            yield processor
    except FirmwareError as refusal:
        raise CommandError(str(refusal), ExitCode.CHECK_FAILED) from None


def _show_status(processor: Processor, identity: PlatformIdentity | None, json: bool) -> None:
    answer = processor.platform_status()
    record: dict[str, Any] = {
        "chip_id": processor.chip.chip_id,
        "simulated": True,
        "api": f"{answer.api_major}.{answer.api_minor}",
        "build": answer.build,
        "csv3": processor.profile.csv3,
        "keys": "none" if identity is None else "stored",
        "owner": None if identity is None else "external" if identity.externally_owned else "self",
        "pek_sm3": None if identity is None else _fingerprint(identity.pek),
        "pdh_sm3": None if identity is None else _fingerprint(identity.pdh),
        "oca_sm3": None if identity is None else _fingerprint(identity.oca),
    }
    if json:
        print_json(record)
        return
    lines = [
        ("Chip", f"{record['chip_id']} (simulated)"),
        ("Firmware", f"API {record['api']}, build {record['build']}{', CSV3' if record['csv3'] else ''}"),
        ("Keys", "none: factory state, INIT makes them" if identity is None else "stored"),
        ("Owner", {None: "-", "self": "the platform itself", "external": "an external OCA"}[record["owner"]]),
        ("PEK", record["pek_sm3"] or "-"),
        ("PDH", record["pdh_sm3"] or "-"),
        ("OCA", record["oca_sm3"] or "-"),
    ]
    for name, value in lines:
        print(f"{name + ':':<10}{value}")


def _fingerprint(certificate: CsvCertificate) -> str:
    import csvfast

    return csvfast.sm3(certificate.encoded).hexdigest()


def _read(file: str) -> bytes:
    """At most one byte more than a certificate has: the firmware says what is wrong with the length."""
    if file == "-":
        return sys.stdin.buffer.read(_CSV_BYTES + 1)
    with Path(file).open("rb") as stream:
        return stream.read(_CSV_BYTES + 1)


def _read_certificate(file: str) -> CsvCertificate:
    from csvfast.certs.layout import CsvCertificate
    from csvfast.errors import FormatError

    try:
        return CsvCertificate.parse(_read(file))
    except FormatError as error:
        raise CommandError(f"{file}: {error}") from None


def _write(file: str, content: bytes) -> None:
    from csvfast._files import write_atomically

    if file == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write_atomically(Path(file), content)


def _owner_key(path: Path) -> SM2PrivateKey:
    """The key in a PEM file, which nobody else may read; a new one when there is no file."""
    import os

    from csvfast.certs.private import read_private_file
    from csvfast.crypto import SM2PrivateKey
    from csvfast.crypto.sm2 import dump_private_key, load_private_key

    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        content = read_private_file(path.parent, path.name, 1 << 16)
        try:
            return load_private_key(content)
        finally:
            content[:] = bytes(len(content))
    key = SM2PrivateKey.generate()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(dump_private_key(key))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return key


def _owner_certificate(path: Path, key: SM2PrivateKey, api: tuple[int, int]) -> CsvCertificate:
    from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
    from csvfast.processor.platform import OCA_USER_ID

    if path.exists():
        found = _read_certificate(str(path))
        if found.usage != KeyUsage.OCA or found.point != key.public_key.point:
            raise CommandError(f"{path}: expected the OCA certificate of the key given")
        return found
    unsigned = CsvCertificate.build(
        usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=key.public_key.point, user_id=OCA_USER_ID, api=api
    )
    certificate = unsigned.with_signature(1, key, KeyUsage.OCA, OCA_USER_ID)
    _write(str(path), certificate.encoded)
    return certificate
