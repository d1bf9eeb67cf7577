"""`csvfast cert show | verify | import | fetch`: certificates of chips and platforms.

Exit codes: 0 fine; 1 refused: not genuine; 2 input that cannot be read, or usage; 3 key server or cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from csvfast.cli.common import CommandError, ExitCode, print_json

if TYPE_CHECKING:
    from csvfast.certs import CaCertificate, CertificateBundle, CsvCertificate

__all__ = ["app"]

app = typer.Typer(
    help="Certificates: HRK, HSK, CEK, PEK, OCA, PDH. '-' is standard input.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_INPUT_LIMIT: Final = 4 << 20  # evidence with an event log

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Roots = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="FILE", help="A root certificate to trust, repeated for more. Default: Hygon's alone."),
]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="The cache. Default: $XDG_CACHE_HOME/csvfast/certs.")
]


@app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="One certificate, several in a row, or evidence.")],
    json: Json = False,
) -> None:
    """Show what stands in certificates. Nothing is verified."""
    bundle = _read_bundle(file)
    records = [_describe(role, certificate) for role, certificate in bundle.certificates().items()]
    if json:
        print_json({"file": file, "certificates": records})
        return
    for index, record in enumerate(records):
        if index:
            print()
        for name, value in record.items():
            print(f"{_LABELS.get(name, name) + ':':<17}{_text(value)}")


@app.command()
def verify(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Certificates of one chain, in any files and order, or evidence.")
    ],
    root: Roots = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--tolerant", help="strict: every rule of the format. tolerant: usages and signatures, as csv-rs does."
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Verify a chain from a trusted root down to its last certificate."""
    from csvfast.certs import CertificateBundle
    from csvfast.errors import VerificationError

    with _refusals():
        roots = _read_roots(root)
        bundle = CertificateBundle()
        for file in files:
            bundle = bundle.merged(_read_bundle(file))
    roles = list(bundle.certificates())
    try:
        anchor = _verify(bundle, roots, strict)
    except VerificationError as error:
        if json:
            print_json({"verified": False, "step": error.step, "reason": str(error), "certificates": roles, "strict": strict})
        raise CommandError(f"not genuine: {error}", ExitCode.CHECK_FAILED) from None
    from csvfast.certs import HYGON_ROOT_FINGERPRINT, fingerprint

    found = fingerprint(anchor)
    is_hygon = found == HYGON_ROOT_FINGERPRINT
    if json:
        print_json(
            {
                "verified": True,
                "root": found,
                "root_is_hygon": is_hygon,
                "certificates": roles,
                "strict": strict,
            }
        )
        return
    print(f"verified: {' -> '.join(['HRK', *(role for role in roles if role != 'HRK')])}")
    print(f"root:     {found} ({'Hygon' if is_hygon else 'not Hygon: trusted because --root says so'})")


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="hsk_cek.cert of a chip, or a directory laid out as the real tools do.")
    ],
    chip_id: Annotated[
        str | None, typer.Option("--chip-id", metavar="ID", help="Whose they are. Default: what the path's name says.")
    ] = None,
    root: Roots = None,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Verify the HSK and CEK of chips and keep them in the cache, for verification without a network."""
    from csvfast.certs import CertificateStore

    if chip_id is not None and path.is_dir():
        raise CommandError("--chip-id: given with a directory; expected one file")
    store = CertificateStore(directories=(), cache=cache)
    with _refusals():
        roots = _read_roots(root)
        try:
            chips = store.import_bundle(path, chip_id, roots=roots)
        except OSError as error:
            # What cannot be read is input; a cache that cannot be written is the environment.
            is_input = error.filename is not None and path in (Path(error.filename), *Path(error.filename).parents)
            if not is_input:
                raise
            raise CommandError(f"{error.filename}: {error.strerror}") from None
    if json:
        print_json({"cache": str(store.cache), "chips": chips})
    else:
        for chip in chips:
            print(f"{chip}: kept in {store.cache}")


@app.command()
def fetch(
    chip_id: Annotated[str, typer.Argument(metavar="CHIP_ID", help="Serial number of the chip.")],
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Key server; https, or http for this machine.")
    ] = "https://cert.hygon.cn",
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="For the whole exchange.")] = 10.0,
    authority: Annotated[
        Path | None,
        typer.Option("--authority", metavar="FILE", help="TLS authorities (PEM) in place of the system's."),
    ] = None,
    root: Roots = None,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Ask the key server for the HSK and CEK of a chip, verify them and keep them in the cache."""
    import ssl

    from csvfast.certs import CertificateStore, KeyServerClient, checked_chip_id

    with _refusals():
        checked_chip_id(chip_id)
        roots = _read_roots(root)
        context = None
        if authority is not None:
            try:
                context = ssl.create_default_context(cafile=str(authority))
            except OSError as error:  # ssl.SSLError is one
                raise CommandError(f"--authority: {authority}: {error.strerror or error}") from None
        client = KeyServerClient(url, timeout, roots=roots, context=context, allow_http=True)
        hsk, cek = client.hsk_cek(chip_id)
        path = CertificateStore(directories=(), cache=cache).add(chip_id, hsk, cek)
    if json:
        print_json({"chip_id": chip_id, "url": url, "file": str(path)})
    else:
        print(f"{chip_id}: kept in {path}")


# ---- Input ----------------------------------------------------------------------------------------------------------


def _read_input(file: str) -> bytes:
    try:
        if file == "-":
            data = sys.stdin.buffer.read(_INPUT_LIMIT + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(_INPUT_LIMIT + 1)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None
    if len(data) > _INPUT_LIMIT:
        raise CommandError(f"{file}: longer than {_INPUT_LIMIT} bytes, which no certificates are")
    return data


def _read_bundle(file: str) -> CertificateBundle:
    from csvfast.certs import parse_bundle
    from csvfast.errors import FormatError

    data = _read_input(file)
    try:
        return parse_bundle(data)
    except FormatError as error:
        if len(data) < 2084:
            raise CommandError(f"{file}: {error}") from None
        reason = error
    from csvfast.report import read_evidence

    try:
        evidence = read_evidence(data)
    except FormatError as error:
        # Evidence is told apart by content as certificates are; only JSON can be meant to be nothing but evidence.
        raise CommandError(f"{file}: {error if data.lstrip()[:1] == b'{' else reason}") from None
    try:
        found = (evidence.hsk, evidence.cek, evidence.pek)
        return parse_bundle(b"".join(one.encoded for one in found if one is not None))
    except FormatError as error:
        raise CommandError(f"{file}: {error}") from None


def _read_roots(files: list[str] | None) -> list[CaCertificate] | None:
    if not files:
        return None
    roots = []
    for file in files:
        found = _read_bundle(file).hrk
        if found is None:
            raise CommandError(f"--root: {file}: holds no HRK")
        roots.append(found)
    return roots


@contextmanager
def _refusals() -> Iterator[None]:
    """VerificationError is exit code 1."""
    from csvfast.errors import VerificationError

    try:
        yield
    except VerificationError as error:
        raise CommandError(f"not genuine: {error}", ExitCode.CHECK_FAILED) from None


def _verify(bundle: CertificateBundle, roots: list[CaCertificate] | None, strict: bool) -> CaCertificate:
    """The root that everything in the bundle hangs from."""
    from csvfast.certs import fingerprint, hygon_root, verify_certificate, verify_chain, verify_root
    from csvfast.errors import VerificationError

    if set(bundle.certificates()) - {"HRK", "HSK"}:
        return verify_chain(bundle.chain(), roots, strict=strict)
    trusted = [hygon_root()] if roots is None else roots
    root = bundle.hrk
    if root is not None and root not in trusted:
        raise VerificationError("HRK", f"the root with fingerprint {fingerprint(root)} is not trusted")
    hsk = bundle.hsk
    if root is None and hsk is not None:
        root = next((one for one in trusted if one.key_id == hsk.certifying_id), None)
        if root is None:
            raise VerificationError("HSK", f"certified by key {hsk.certifying_id.hex()}, which is not a trusted root")
    if root is None:
        raise VerificationError("HRK", "there is no certificate")
    verify_root(root, strict=strict)
    if hsk is not None:
        verify_certificate(hsk, root, strict=strict, step="HSK")
    return root


# ---- Output ---------------------------------------------------------------------------------------------------------

_LABELS: Final = {
    "role": "Certificate",
    "bytes": "Bytes",
    "version": "Version",
    "api": "Firmware API",
    "key_id": "Key id",
    "certifying_id": "Certified by",
    "issuer_id": "Issuer id (sid)",
    "usage": "Usage",
    "algorithm": "Algorithm",
    "curve_id": "Curve",
    "public_key": "Public key",
    "on_curve": "On the curve",
    "user_id": "User id",
    "signatures": "Signatures",
    "reserved_not_zero": "Reserved areas",
    "sm3": "SM3",
    "sha256": "SHA-256",
}


def _describe(role: str, certificate: CaCertificate | CsvCertificate) -> dict[str, Any]:
    import hashlib

    from csvfast.certs import CaCertificate
    from csvfast.certs.layout import algorithm_name, usage_name
    from csvfast.crypto import sm3
    from csvfast.errors import FormatError

    try:
        certificate.public_key.point  # noqa: B018  asked for the check it makes
        on_curve = True
    except FormatError:
        on_curve = False
    record: dict[str, Any] = {"role": role, "bytes": len(certificate.encoded), "version": certificate.version}
    if isinstance(certificate, CaCertificate):
        record |= {"key_id": certificate.key_id.hex(), "certifying_id": certificate.certifying_id.hex()}
        signatures = [{"by": "certifying_id", "algorithm": "SM2_SA", "signature": certificate.signature.hex()}]
    else:
        record |= {
            "api": f"{certificate.api_major}.{certificate.api_minor}",
            "algorithm": algorithm_name(certificate.algorithm),
            "issuer_id": certificate.issuer_id.hex(),
        }
        signatures = [
            {"by": usage_name(slot.usage), "algorithm": algorithm_name(slot.algorithm), "signature": slot.signature.hex()}
            for slot in certificate.slots
        ]
    return record | {
        "usage": f"{certificate.usage:#06x}",
        "curve_id": certificate.curve_id,
        "user_id": certificate.user_id.decode("ascii", "backslashreplace"),
        "public_key": certificate.point.hex(),
        "on_curve": on_curve,
        "signatures": signatures,
        "reserved_not_zero": [name for name, _, content in certificate.reserved if any(content)],
        "sm3": sm3(certificate.encoded).hexdigest(),
        "sha256": hashlib.sha256(certificate.encoded).hexdigest(),
    }


def _text(value: Any) -> str:
    if not value and isinstance(value, list):
        return "zero"
    if isinstance(value, list) and isinstance(value[0], str):
        return f"not zero: {', '.join(value)}"
    if isinstance(value, list):
        return ("\n" + " " * 17).join(
            "empty" if one["by"] == "INVALID" else f"{one['signature']} by {one['by']}" for one in value
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    # A user id is whatever bytes stand there: no control character reaches the terminal.
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in str(value))
