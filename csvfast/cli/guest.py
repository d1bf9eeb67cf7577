"""`csvfast guest session | launch | status | report | secret | stop`: a guest owner's and a VMM's side, on simulated chips."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, parse_size, print_json, progress
from csvfast.cli.guest_inputs import (
    parse_api,
    parse_bytes,
    parse_number,
    parse_policy,
    read_bundle,
    read_roots,
    read_secret,
    session_files,
)
from csvfast.cli.machines import machine_of, remote

if TYPE_CHECKING:
    from csvfast.certs.chip import ChipIdentity
    from csvfast.processor.owner import OwnerKeys
    from csvfast.processor.vmm import GuestPlan, Host, LaunchedGuest
    from csvfast.report.layout import Report

__all__ = ["app"]

app = typer.Typer(
    help="Launch guests on a simulated processor: sessions, launch, secrets, reports.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class ReportForm(StrEnum):
    """--report-format."""

    raw = "raw"
    json = "json"
    page = "page"


class VmsaChoice(StrEnum):
    """--vmsa of `guest launch`."""

    none = "none"
    amd = "amd"


_Handle = Annotated[int, typer.Argument(metavar="HANDLE", min=1, max=0xFFFFFFFF, help="The guest's handle.")]
_Socket = Annotated[Path, typer.Option("--socket", metavar="PATH", help="Of `csvfast platform serve`.")]
_Vcpu = Annotated[
    Path | None, typer.Option("--vcpu-socket", metavar="PATH", help="The server's socket for vCPUs, if it has one.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, no progress bar.")]
_ReportData = Annotated[
    str | None,
    typer.Option("--report-data", metavar="HEX|@FILE", help="Up to 64 bytes that the report carries. Default: none."),
]
_ReportFormat = Annotated[
    ReportForm,
    typer.Option("--report-format", help="raw: report.cert of the devkit. json: evidence as trustee takes it."),
]


@app.command()
def session(
    certificates: Annotated[
        list[Path],
        typer.Argument(metavar="CERTS...", help="The platform's PDH and its chain up to the HSK, in any files."),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", "--out", metavar="DIR", help="New directory for session and keys.")
    ],
    policy: Annotated[str, typer.Option(metavar="NUMBER", help="Guest policy; 5 is CSV2 without debugging.")] = "0x1",
    vm_id: Annotated[str, typer.Option("--vm-id", metavar="HEX", help="Up to 16 bytes.")] = "",
    vm_version: Annotated[str, typer.Option("--vm-version", metavar="HEX", help="Up to 16 bytes.")] = "",
    vm_digest: Annotated[
        str | None,
        typer.Option("--vm-digest", metavar="HEX", help="The only launch digest with which the guest may run."),
    ] = None,
    user_data: Annotated[str, typer.Option("--user-data", metavar="HEX|@FILE", help="Up to 64 bytes.")] = "",
    root: Annotated[
        list[Path] | None, typer.Option("--root", metavar="FILE", help="Trusted root; repeatable. Default: Hygon's.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Do not verify the PDH's chain: keys for whoever made the PDH.")
    ] = False,
    json: _Json = False,
) -> None:
    """Guest owner: make transport keys and a session for one platform (dh-cert-file and session-file of QEMU)."""
    from csvfast.certs import verify_chain
    from csvfast.errors import VerificationError
    from csvfast.processor.owner import save_owner_session
    from csvfast.processor.session import make_session

    word = parse_policy(policy)
    identity, version = parse_bytes("--vm-id", vm_id, 16), parse_bytes("--vm-version", vm_version, 16)
    digest, data = bytes(32), parse_bytes("--user-data", user_data, 64)
    if vm_digest is not None:
        digest = parse_bytes("--vm-digest", vm_digest, 32, exactly=True)
        if not any(digest):
            raise CommandError("--vm-digest: 32 zero bytes would allow every guest; expected a launch digest")
    found = read_bundle(certificates)
    if found.pdh is None:
        raise CommandError("no PDH is among the certificates; expected what PDH_CERT_EXPORT gave", ExitCode.USAGE)
    if not unverified:
        roots = None if root is None else read_roots(root)
        try:
            if found.pek is None:
                raise VerificationError("PEK", "the certificate is missing")
            verify_chain(found.chain(), roots)
        except VerificationError as refusal:
            raise CommandError(f"the PDH is not shown to be genuine: {refusal}", ExitCode.CHECK_FAILED) from None
    made = make_session(found.pdh, word, vm_id=identity, vm_version=version, vm_digest=digest, user_data=data)
    save_owner_session(out, made, word)
    if json:
        print_json({"directory": str(out), "policy": f"{word.value:#010x}", "verified": not unverified})
    else:
        print(f"{out}: dh-cert.b64, session.b64 for the VMM; tek.bin, tik.bin, owner.key stay with the owner")


@app.command()
def launch(
    firmware: Annotated[Path, typer.Option(metavar="FILE", help="OVMF image.")],
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="A simulated chip; the guest ends with the command.")
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="A server; the guest lives on there.")
    ] = None,
    vcpu_socket: _Vcpu = None,
    kernel: Annotated[str | None, typer.Option(metavar="FILE", help="Kernel of a direct boot.")] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Initial RAM disk.")] = None,
    append: Annotated[str | None, typer.Option(metavar="TEXT", help="Kernel command line.")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Guest policy. Default: the session's, or 1.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option("--session", metavar="FILE|DIR", help="Session blob in base64, or `guest session`'s DIR."),
    ] = None,
    dh: Annotated[
        Path | None, typer.Option("--dh", metavar="FILE", help="The owner's DH certificate in base64.")
    ] = None,
    disk_password: Annotated[
        Path | None,
        typer.Option("--disk-password", metavar="FILE", help="Injected as the owner would; needs the session's DIR."),
    ] = None,
    secret_address: Annotated[
        str | None, typer.Option("--secret-address", metavar="NUMBER", help="Default: the firmware's secret area.")
    ] = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="RAM of the guest.")] = "16MiB",
    vcpus: Annotated[int, typer.Option(min=1, max=4096, help="vCPUs, for a policy with ES.")] = 1,
    vmsa: Annotated[VmsaChoice, typer.Option(help="amd: the processor measures save areas too.")] = VmsaChoice.none,
    force_hash_table: Annotated[
        bool, typer.Option("--force-hash-table", help="Add the hash table although the firmware has no area for it.")
    ] = False,
    hold: Annotated[
        bool, typer.Option("--hold", help="Stop before LAUNCH_FINISH, for `guest secret` (with --socket).")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write the guest's report; '-': to stdout, and nothing else."),
    ] = None,
    report_data: _ReportData = None,
    report_format: _ReportFormat = ReportForm.raw,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="With --state: 1.3/2011 or 1.4/2337.")
    ] = "1.4/2337",
    json: _Json = False,
) -> None:
    """Launch a guest by the firmware's own commands; its digest is the one `csvfast measure launch` predicts."""
    from csvfast.processor.vmm import GuestPlan

    keys, dh_bytes, session_bytes = session_files(session, dh)
    word = keys.policy if policy is None and keys is not None else parse_policy("0x1" if policy is None else policy)
    if word.csv3:
        raise CommandError("--policy: bit 6 asks for CSV3; this command launches CSV and CSV2 guests; CSV3: `csvfast vm run`")
    if disk_password is not None and keys is None:
        raise CommandError(
            "--disk-password: only the owner can pack it; expected --session with the session's directory"
        )
    if str(report) == "-" and json:
        raise CommandError("--report: '-' and --json both want standard output")
    if hold and (socket is None or report is not None or disk_password is not None):
        raise CommandError("--hold: expected --socket, and neither --report nor --disk-password")
    data = parse_bytes("--report-data", report_data or "", 64)
    plan = GuestPlan(
        firmware=firmware,
        kernel=kernel,
        initrd=initrd,
        append=append,
        policy=word,
        dh=dh_bytes,
        session=session_bytes,
        memory_size=parse_size(memory),
        vmsa=vmsa.value,
        vcpus=vcpus,
        force_hash_table=force_hash_table,
    )
    with machine_of(state, socket, vcpu_socket, plan, profile) as (host, chip):
        launched = _launch(host, plan, json)
        try:
            record: dict[str, Any] = {
                "handle": launched.handle,
                "asid": launched.asid,
                "policy": f"{word.value:#010x}",
                "predicted_digest": launched.predicted.hexdigest,
                "measurement": launched.measurement.hex(),
            }
            if launched.secret_area is not None:
                record["secret_area"] = f"{launched.secret_area[0]:#x}"
            if disk_password is not None and keys is not None:
                _inject_password(host, launched, keys, disk_password, secret_address)
                record["secret"] = "injected"  # noqa: S105
            if not hold:
                host.finish(launched.handle)
                found = host.report(launched.handle, data)
                record["digest"] = found.measure.hex()
                if found.measure != launched.predicted.digest:
                    raise CommandError(
                        "the report carries another launch digest than the predicted one", ExitCode.CHECK_FAILED
                    )
                if report is not None:
                    _write_report(report, found, report_format, chip)
            record["state"] = host.status(launched.handle)[2].name
            record["warnings"] = list(launched.predicted.warnings)
        except BaseException:
            host.abandon(launched.handle)
            raise
    if str(report) != "-":
        _show(record, json)


@app.command()
def status(
    socket: _Socket,
    handle: Annotated[int | None, typer.Argument(metavar="HANDLE", help="Default: every guest.")] = None,
    json: _Json = False,
) -> None:
    """Policy, ASID and state of guests on a server."""
    with remote(socket) as host:
        handles = host.machine.guests() if handle is None else [handle]
        rows = []
        for number in handles:
            word, asid, state = host.status(number)
            rows.append({"handle": number, "policy": f"{word.value:#010x}", "asid": asid or None, "state": state.name})
    if json:
        print_json({"guests": rows})
        return
    if not rows:
        print("no guests")
    for row in rows:
        asid_text = "not active" if row["asid"] is None else f"ASID {row['asid']}"
        print(f"guest {row['handle']}: {row['state']}, policy {row['policy']}, {asid_text}")


@app.command("report")
def report_command(
    handle: _Handle,
    socket: _Socket,
    out: Annotated[
        Path,
        typer.Option("--output", "-o", "--out", metavar="FILE", help="Where the report goes; '-' is standard output."),
    ],
    report_data: _ReportData = None,
    report_format: _ReportFormat = ReportForm.raw,
    extended: Annotated[bool, typer.Option("--extended", help="Ask for report V2 (CSV3 guests).")] = False,
    vcpu_socket: _Vcpu = None,
    json: _Json = False,
) -> None:
    """Have a running guest ask for its attestation report."""
    data = parse_bytes("--report-data", report_data or "", 64)
    with remote(socket, vcpu_socket) as host:
        found = host.report(handle, data, extended=extended)
    _write_report(out, found, report_format, None)
    if str(out) != "-":
        _show({"handle": handle, "digest": found.measure.hex(), "chip_id": found.chip_id, "report": str(out)}, json)


@app.command()
def secret(
    session: Annotated[Path, typer.Option("--session", metavar="DIR", help="Made by `guest session`.")],
    disk_password: Annotated[Path, typer.Option("--disk-password", metavar="FILE", help="The secret, byte for byte.")],
    measurement: Annotated[
        str, typer.Option("--measurement", metavar="HEX|@FILE", help="The 48 bytes of LAUNCH_MEASURE.")
    ],
    expect: Annotated[str, typer.Option("--expect", metavar="HEX", help="The launch digest the owner wants to see.")],
    api: Annotated[
        str, typer.Option("--api", metavar="MAJOR.MINOR/BUILD", help="Firmware of the platform.")
    ] = "1.4/2337",
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="Inject it there, then LAUNCH_FINISH.")
    ] = None,
    handle: Annotated[int | None, typer.Option("--handle", min=1, help="The guest held there.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="NUMBER", help="Guest physical, from `guest launch --hold`.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--out", metavar="DIR", help="Write secret-header.b64 and secret.b64 for QEMU instead."
        ),
    ] = None,
    json: _Json = False,
) -> None:
    """Guest owner: check a launch measurement, and only then pack a secret for that guest."""
    import base64

    from csvfast.certs.private import write_private_directory
    from csvfast.processor.owner import load_owner_session
    from csvfast.processor.vmm import Secret

    if (out is None) == (socket is None):
        raise CommandError("expected either --socket with --handle and --address, or --output")
    if socket is not None and (handle is None or address is None):
        raise CommandError("--socket: expected --handle and --address as well")
    place, version = None if address is None else parse_number("--address", address), parse_api(api)
    keys = load_owner_session(session)
    blob = parse_bytes("--measurement", measurement, 48, exactly=True)
    digest = parse_bytes("--expect", expect, 32, exactly=True)
    header, transport = _pack_password(keys, disk_password, blob, digest, version)
    if out is not None:
        write_private_directory(
            out,
            {
                "secret-header.b64": base64.b64encode(header) + b"\n",
                "secret.b64": base64.b64encode(transport) + b"\n",
            },
        )
        _show({"directory": str(out), "bytes": len(transport)}, json)
        return
    if socket is None or handle is None or place is None:  # checked above, before the secret was read
        raise CommandError("--socket: expected --handle and --address as well")
    with remote(socket) as host:
        host.inject(handle, Secret(header, transport), place)
        host.finish(handle)
        state = host.status(handle)[2].name
    _show({"handle": handle, "bytes": len(transport), "state": state}, json)


@app.command()
def stop(handle: _Handle, socket: _Socket, json: _Json = False) -> None:
    """Deactivate and decommission a guest on a server: its keys are erased."""
    with remote(socket) as host:
        host.stop(handle)
    _show({"handle": handle, "state": "gone"}, json)


def _launch(host: Host, plan: GuestPlan, json: bool) -> LaunchedGuest:
    from csvfast.measure.source import total_size

    paths = [path for path in (plan.firmware, plan.kernel, plan.initrd) if path is not None]
    with progress("launching", total_size(paths), enabled=not json) as advance:
        last = 0

        def step(done: int, _total: int | None) -> None:
            nonlocal last
            advance(done - last)
            last = done

        return host.launch(plan, progress=step)


def _pack_password(
    keys: OwnerKeys, path: Path, blob: bytes, digest: bytes, api: tuple[int, int, int]
) -> tuple[bytes, bytes]:
    from csvfast.errors import VerificationError
    from csvfast.processor import pack_disk_password
    from csvfast.processor.owner import check_measurement, seal_secret

    major, minor, build = api
    try:
        check_measurement(keys.tik, blob, keys.policy, digest, (major, minor), build)
    except VerificationError as refusal:
        raise CommandError(str(refusal), ExitCode.CHECK_FAILED) from None
    password = read_secret(path)
    try:
        table = pack_disk_password(password)
        try:
            return seal_secret(keys, table, blob)
        finally:
            table[:] = bytes(len(table))
    finally:
        password[:] = bytes(len(password))


def _inject_password(
    host: Host, launched: LaunchedGuest, keys: OwnerKeys, path: Path, secret_address: str | None
) -> None:
    from csvfast.processor.commands import Command
    from csvfast.processor.vmm import Secret

    if secret_address is not None:
        address = parse_number("--secret-address", secret_address)
    elif launched.secret_area is not None:
        address = launched.secret_area[0]
    else:
        raise CommandError("the firmware has no secret area; expected --secret-address")
    status = host.run(Command.PLATFORM_STATUS)
    api = (status["api_major"], status["api_minor"], status["config"] >> 1)
    header, transport = _pack_password(keys, path, launched.measurement, launched.predicted.digest, api)
    host.inject(launched.handle, Secret(header, transport), address)


def _write_report(path: Path, report: Report, form: ReportForm, chip: ChipIdentity | None) -> None:
    from csvfast._files import write_atomically
    from csvfast.report.build import client_report
    from csvfast.report.evidence import Evidence
    from csvfast.report.layout import Report as ParsedReport

    # The sealing key must not leave the guest: what csv-rs' client leaves of the page is written, nothing else.
    page = client_report(report.page(), report.version)
    evidence = Evidence(ParsedReport.parse(page, report.version), hsk_cek=None if chip is None else chip.hsk_cek)
    encoders = {ReportForm.raw: evidence.to_raw, ReportForm.json: evidence.to_json}
    data = encoders[form]() if form in encoders else page
    if str(path) == "-":
        sys.stdout.buffer.write(data)
    else:
        write_atomically(path, data)


def _show(record: dict[str, Any], json: bool) -> None:
    if json:
        print_json(record)
        return
    for warning in record.pop("warnings", []):
        print(f"csvfast: warning: {warning}", file=sys.stderr)
    width = max(len(name) for name in record) + 1
    for name, value in record.items():
        print(f"{name.replace('_', ' ') + ':':<{width}} {value}")
