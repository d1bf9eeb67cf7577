"""`csvfast report show | verify | appraise | request`: evidence in any known encoding, a file or '-'.

Exit codes: 0 genuine (and allowed); 1 refused; 2 input that cannot be read: no such file, garbage, an unknown encoding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, console, print_json

if TYPE_CHECKING:
    from csvfast.attest import Verified
    from csvfast.certs import CaCertificate
    from csvfast.report import Evidence

__all__ = ["app"]

app = typer.Typer(
    help="Attestation reports: read, verify (is it genuine?), appraise (do I allow it?), request. '-' is standard input.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[str, typer.Argument(metavar="FILE", help="Evidence in any known encoding; '-' is standard input.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Certs = Annotated[
    str | None,
    typer.Option("--certs", metavar="FILE|DIR", help="HSK and CEK: a file, or a directory looked through by chip id."),
]
Roots = Annotated[
    list[str] | None, typer.Option("--root", metavar="FILE", help="Trusted root certificate, repeatable. Default: Hygon's.")
]
ReportData = Annotated[
    str | None, typer.Option("--report-data", metavar="HEX|@FILE", help="Expected report data, at most 64 bytes, zero-padded.")
]
Nonce = Annotated[str | None, typer.Option("--mnonce", metavar="HEX", help="Expected mnonce, 16 bytes.")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Accept evidence without HSK and CEK: proves nothing about the chip.")
]
Tolerant = Annotated[bool, typer.Option("--tolerant", help="csv-rs's rules: the signatures decide. Default: strict.")]


@app.command()
def show(file: File, json: Json = False) -> None:
    """Show what a report says. Nothing is verified."""
    from csvfast.attest import claims

    evidence = _evidence(file)
    said = claims(evidence)
    facts = _facts(evidence)
    if json:
        print_json({"encoding": evidence.encoding, "verified": None, "claims": said, **facts})
        return
    _table("Report, NOT VERIFIED", {"encoding": evidence.encoding, **_claim_rows(said), **facts})


@app.command()
def verify(
    file: File,
    certs: Certs = None,
    root: Roots = None,
    report_data: ReportData = None,
    mnonce: Nonce = None,
    partial: Partial = False,
    tolerant: Tolerant = False,
    json: Json = False,
) -> None:
    """Is it genuine? Verify the chain from a trusted root down to the report."""
    verified = _verified(file, certs, root, report_data, mnonce, partial, tolerant, json)
    if json:
        print_json(_verified_document(verified))
    else:
        _print_verified(verified)
    _warn_if_partial(verified)


@app.command()
def appraise(
    file: File,
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help="What is allowed: TOML or JSON.")],
    certs: Certs = None,
    root: Roots = None,
    report_data: ReportData = None,
    mnonce: Nonce = None,
    partial: Partial = False,
    tolerant: Tolerant = False,
    json: Json = False,
) -> None:
    """Do I allow it? Verify first, then compare what the report says with a policy."""
    from csvfast.attest import AppraisalPolicy
    from csvfast.attest import appraise as appraise_verified

    try:
        allowed = AppraisalPolicy.load(policy)
    except OSError as error:
        raise CommandError(f"{policy}: {error.strerror or error}") from None
    verified = _verified(file, certs, root, report_data, mnonce, partial, tolerant, json)
    appraisal = appraise_verified(verified, allowed)
    if json:
        print_json({"verification": _verified_document(verified), "appraisal": appraisal.to_dict()})
    else:
        _print_verified(verified)
        rows = dict.fromkeys(appraisal.checked, "allowed")
        for violation in appraisal.violations:
            rows[violation.name] = f"NOT ALLOWED: {violation.observed}; expected {violation.expected}"
        _table(f"Appraisal: {'allowed' if appraisal.allowed else 'NOT ALLOWED'}", rows)
    _warn_if_partial(verified)
    if not appraisal.allowed:
        count = len(appraisal.violations)
        raise CommandError(f"{file}: genuine, but not allowed: {count} violation{'s' * (count > 1)}", ExitCode.CHECK_FAILED)


@app.command()
def request(
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes; '-' is standard output.")],
    data: Annotated[
        str, typer.Option("--data", metavar="HEX|@FILE", help="Report data, at most 64 bytes, zero-padded on the right.")
    ] = "",
    mnonce: Annotated[str | None, typer.Option("--mnonce", metavar="HEX", help="16 bytes. Default: random.")] = None,
    extended: Annotated[bool, typer.Option("--extended", help="Ask for a report V2 (CSV3 with firmware build 2337).")] = False,
    json: Json = False,
) -> None:
    """Make the page with which a guest asks its firmware for a report."""
    from csvfast._files import write_atomically
    from csvfast.report import ReportRequest

    made = ReportRequest.make(_report_data("--data", data), None if mnonce is None else _nonce(mnonce), extended=extended)
    if output == "-":
        if json:
            raise CommandError("--json: standard output is taken by the page; expected a file after --output")
        sys.stdout.flush()
        sys.stdout.buffer.write(made.encode())
        sys.stdout.buffer.flush()
        return
    write_atomically(Path(output), made.encode())
    facts = {"output": output, "data": made.data.hex(), "mnonce": made.mnonce.hex(), "hash": made.hash.hex()}
    if json:
        print_json({**facts, "extended": extended})
    else:
        _table("Report request", facts)


# Input.


def _read(path: str, limit: int) -> bytes:
    try:
        if path == "-" and sys.stdin is None:
            raise CommandError("standard input is closed")
        if path == "-":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise CommandError(f"{path}: more than {limit} bytes")
    return data


def _evidence(path: str) -> Evidence:
    from csvfast.errors import FormatError
    from csvfast.report import read_evidence
    from csvfast.report.evidence import EVIDENCE_LIMIT

    data = _read(path, EVIDENCE_LIMIT)
    try:
        return read_evidence(data)
    except FormatError as error:
        raise CommandError(f"{path}: {error}") from None


def _bytes_option(name: str, text: str) -> bytes:
    if text.startswith("@"):
        return _read(text[1:], 4096)
    try:
        if not text.isascii():
            raise ValueError
        return bytes.fromhex(text)
    except ValueError:
        raise CommandError(f"{name} {text!r}: expected hexadecimal digits, or @ and a file") from None


def _report_data(name: str, text: str) -> bytes:
    # verify() cuts after 64 bytes as trustee does; who types more expects more to be compared.
    data = _bytes_option(name, text)
    if len(data) > 64:
        raise CommandError(f"{name}: {len(data)} bytes; expected at most 64")
    return data


def _nonce(text: str) -> bytes:
    nonce = _bytes_option("--mnonce", text)
    if len(nonce) != 16:
        raise CommandError(f"--mnonce: {len(nonce)} bytes; expected 16")
    return nonce


def _roots(paths: list[str] | None) -> list[CaCertificate] | None:
    from csvfast.certs import CA_BYTES, CaCertificate
    from csvfast.errors import FormatError

    if not paths:
        return None
    roots = []
    for path in paths:
        try:
            roots.append(CaCertificate.parse(_read(path, CA_BYTES)))
        except FormatError as problem:
            raise CommandError(f"--root: {path}: {problem}") from None
    return roots


def _verified(
    file: str,
    certs: str | None,
    root: list[str] | None,
    report_data: str | None,
    mnonce: str | None,
    partial: bool,
    tolerant: bool,
    as_json: bool,
) -> Verified:
    from csvfast.attest import verify as verify_evidence
    from csvfast.certs import CertificateStore
    from csvfast.errors import VerificationError
    from csvfast.report.evidence import HSK_CEK_BYTES

    evidence = _evidence(file)
    expected = None if report_data is None else _report_data("--report-data", report_data)
    nonce = None if mnonce is None else _nonce(mnonce)
    roots = _roots(root)
    try:
        if certs is None:
            store = CertificateStore()  # the real tools' directories and the cache; nobody is asked over the network
        elif Path(certs).is_dir():
            store = CertificateStore([certs], False)
        else:
            store = None
            # Their length says what they are, so that a damaged one is refused like any other false certificate.
            given = _read(certs, 16384)
            evidence = evidence.with_certificates(given if len(given) == HSK_CEK_BYTES else _hsk_cek_of(given, certs))
        return verify_evidence(
            evidence,
            roots=roots,
            store=store,
            report_data=expected,
            mnonce=nonce,
            strict=not tolerant,
            allow_partial=partial,
        )
    except VerificationError as error:
        if as_json:
            print_json({"verified": False, "step": error.step, "reason": str(error)})
        raise CommandError(f"{file}: refused: {error}", ExitCode.CHECK_FAILED) from None
    except OSError as error:  # a store's file
        raise CommandError(f"{error.filename or certs}: {error.strerror or error}") from None


def _hsk_cek_of(data: bytes, path: str) -> bytes:
    from csvfast.certs import parse_bundle

    bundle = parse_bundle(data)
    if bundle.hsk is None or bundle.cek is None:
        raise CommandError(f"{path}: found {', '.join(bundle.certificates())}; expected HSK and CEK")
    return bundle.hsk.encoded + bundle.cek.encoded


# Output.


def _facts(evidence: Evidence) -> dict[str, Any]:
    report = evidence.report
    beside = {"hsk_cek": evidence.hsk_cek, "pek": evidence.pek_beside, "event log": evidence.event_log}
    return {
        "mac": report.mac.hex(),
        "pek_and_sn": "masked" if report.pek_is_masked else "plain",
        "sealing_key": "present" if report.sealing_key_is_present else "zeroed",
        "beside_the_report": [name for name, value in beside.items() if value is not None],
    }


def _claim_rows(said: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, value in said.items():
        if name == "policy":
            rows[name] = " ".join(f"{field}={number}" for field, number in value.items() if number) or "nothing set"
        elif name == "uefi_event_logs":
            rows["event log"] = f"{len(value)} events, replays to the registers"
        elif name != "reserved1" or value.strip("0"):
            rows[name] = str(value)
    return rows


def _verified_document(verified: Verified) -> dict[str, Any]:
    from csvfast.attest import claims

    return {
        "verified": True,
        "complete": verified.complete,
        "root": verified.root_fingerprint,
        "checks": list(verified.checks),
        "unchecked": [one._asdict() for one in verified.unchecked],
        "claims": claims(verified),
    }


def _print_verified(verified: Verified) -> None:
    from csvfast.attest import claims
    from csvfast.certs import HYGON_ROOT_FINGERPRINT

    root = verified.root_fingerprint
    whose = "none" if root is None else "Hygon's root" if root == HYGON_ROOT_FINGERPRINT else f"NOT Hygon's: {root}"
    rows: dict[str, Any] = {"root": whose, "verified": ", ".join(verified.checks)}
    rows |= {f"not checked: {one.name}": one.reason for one in verified.unchecked}
    _table(f"Verification: genuine{'' if verified.complete else ' ONLY FROM THE PEK ON'}", rows)
    _table("What the report says", _claim_rows(claims(verified)))


def _warn_if_partial(verified: Verified) -> None:
    if not verified.complete:
        print(
            "csvfast: WARNING: PARTIAL: no HSK and CEK certificates, so nothing shows that a chip made this report",
            file=sys.stderr,
        )


def _table(title: str, rows: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        # Text, not markup: what a report says must not format the terminal.
        table.add_row(Text(name), Text(", ".join(value) if isinstance(value, list) else str(value)))
    console().print(table)
