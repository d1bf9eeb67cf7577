"""`csvfast guest session | launch | status | report | secret | stop`: a guest owner's and a VMM's side, on simulated chips."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, parse_size, print_json, progress
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
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New directory for session and keys.")],
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
    from csvfast.certs import CaCertificate, CertificateBundle, parse_bundle, verify_chain
    from csvfast.errors import VerificationError
    from csvfast.processor.owner import save_owner_session
    from csvfast.processor.session import make_session

    word = _policy(policy)
    identity, version = _bytes("--vm-id", vm_id, 16), _bytes("--vm-version", vm_version, 16)
    digest, data = bytes(32), _bytes("--user-data", user_data, 64)
    if vm_digest is not None:
        digest = _bytes("--vm-digest", vm_digest, 32, exactly=True)
        if not any(digest):
            raise CommandError("--vm-digest: 32 zero bytes would allow every guest; expected a launch digest")
    found = CertificateBundle()
    for path in certificates:
        found = found.merged(parse_bundle(_read(path)))
    if found.pdh is None:
        raise CommandError("no PDH is among the certificates; expected what PDH_CERT_EXPORT gave", ExitCode.USAGE)
    if not unverified:
        roots = None if root is None else [CaCertificate.parse(_read(path)) for path in root]
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

    keys, dh_bytes, session_bytes = _session_files(session, dh)
    word = keys.policy if policy is None and keys is not None else _policy("0x1" if policy is None else policy)
    if word.csv3:
        raise CommandError("--policy: bit 6 asks for CSV3; this command launches CSV and CSV2 guests")
    if disk_password is not None and keys is None:
        raise CommandError(
            "--disk-password: only the owner can pack it; expected --session with the session's directory"
        )
    if str(report) == "-" and json:
        raise CommandError("--report: '-' and --json both want standard output")
    if hold and (socket is None or report is not None or disk_password is not None):
        raise CommandError("--hold: expected --socket, and neither --report nor --disk-password")
    data = _bytes("--report-data", report_data or "", 64)
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
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the report goes; '-' is standard output.")],
    report_data: _ReportData = None,
    report_format: _ReportFormat = ReportForm.raw,
    extended: Annotated[bool, typer.Option("--extended", help="Ask for report V2 (CSV3 guests).")] = False,
    vcpu_socket: _Vcpu = None,
    json: _Json = False,
) -> None:
    """Have a running guest ask for its attestation report."""
    data = _bytes("--report-data", report_data or "", 64)
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
        typer.Option("--out", metavar="DIR", help="Write secret-header.b64 and secret.b64 for QEMU instead."),
    ] = None,
    json: _Json = False,
) -> None:
    """Guest owner: check a launch measurement, and only then pack a secret for that guest."""
    import base64

    from csvfast.certs.private import write_private_directory
    from csvfast.processor.owner import load_owner_session
    from csvfast.processor.vmm import Secret

    if (out is None) == (socket is None):
        raise CommandError("expected either --socket with --handle and --address, or --out")
    if socket is not None and (handle is None or address is None):
        raise CommandError("--socket: expected --handle and --address as well")
    place, version = None if address is None else _number("--address", address), _api(api)
    keys = load_owner_session(session)
    blob = _bytes("--measurement", measurement, 48, exactly=True)
    digest = _bytes("--expect", expect, 32, exactly=True)
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


# ---- Files and options ----------------------------------------------------------------------------------------------


def _session_files(session: Path | None, dh: Path | None) -> tuple[OwnerKeys | None, bytes, bytes]:
    from csvfast.processor.owner import load_owner_session, read_base64

    if session is None:
        if dh is not None:
            raise CommandError("--dh: given without --session; expected both or neither")
        return None, b"", b""
    if session.is_dir():
        keys = load_owner_session(session)
        return keys, keys.dh if dh is None else read_base64(dh), keys.session
    if dh is None:
        raise CommandError("--session: a file needs --dh with the owner's certificate")
    return None, read_base64(dh), read_base64(session)


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
    password = _read_secret(path)
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
        address = _number("--secret-address", secret_address)
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


def _read(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(1 << 20)
    with path.open("rb") as file:
        return file.read(1 << 20)


def _read_secret(path: Path) -> bytearray:
    """A file's bytes in a buffer that can be wiped; 16 KiB is more than any secret may have."""
    data = bytearray(16385)
    done = 0
    source = sys.stdin.fileno() if str(path) == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with memoryview(data) as view:
            while done < len(data) and (count := os.readv(source, [view[done:]])):
                done += count
    finally:
        if str(path) != "-":
            os.close(source)
    del data[done:]
    return data


def _bytes(option: str, text: str, size: int, *, exactly: bool = False) -> bytes:
    """Hexadecimal digits or the bytes of @FILE, zero-padded on the right to `size` unless they must have it."""
    if text.startswith("@"):
        data = _read(Path(text[1:]))
    else:
        try:
            data = bytes.fromhex(text)
        except ValueError:
            raise CommandError(f"{option}: {text[:80]!r} is not an even number of hexadecimal digits") from None
    if len(data) > size or (exactly and len(data) != size):
        raise CommandError(f"{option}: {len(data)} bytes; expected {'' if exactly else 'at most '}{size}")
    return data.ljust(size, b"\0")


def _number(option: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise CommandError(f"{option}: {text!r} is no number; expected one such as 0x80d000") from None


def _policy(text: str) -> Any:
    from csvfast.report.policy import GuestPolicy

    return GuestPolicy(_number("--policy", text))


def _api(text: str) -> tuple[int, int, int]:
    try:
        version, build = text.split("/")
        major, minor, number = *map(int, version.split(".")), int(build)
        if not (0 <= major <= 255 and 0 <= minor <= 255 and 0 <= number < 1 << 31):
            raise ValueError
        return major, minor, number
    except ValueError:
        raise CommandError(f"--api: {text!r}; expected such as 1.4/2337") from None


def _show(record: dict[str, Any], json: bool) -> None:
    if json:
        print_json(record)
        return
    for warning in record.pop("warnings", []):
        print(f"csvfast: warning: {warning}", file=sys.stderr)
    width = max(len(name) for name in record) + 1
    for name, value in record.items():
        print(f"{name.replace('_', ' ') + ':':<{width}} {value}")
