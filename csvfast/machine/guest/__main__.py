"""`python3 -m csvfast.machine.guest`: a report, the sealing key, or /dev/csv-guest for other programs, in a guest's shell.

Exit codes: 0 done; 1 the processor refuses, or its answer is not genuine; 2 usage; 3 no processor here.
"""

from __future__ import annotations

import argparse
import base64
import os
import signal
import sys
from pathlib import Path

from csvfast.errors import ArgumentError, CsvfastError, FirmwareError, VerificationError
from csvfast.machine.guest.channel import find_port
from csvfast.machine.guest.client import GuestDevice
from csvfast.machine.guest.device import CUSE, CuseDevice, DeviceRequests, SocketDevice
from csvfast.machine.guest.transport import DEVICE, SOCKET
from csvfast.report.build import client_report

WORKING = 2  # csvfast.processor.rtmr.RtmrState


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m csvfast.machine.guest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="device, helper's socket or virtio port; default: what is there")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="a report, as base64 of its page on the standard output")
    report.add_argument("--data", default="", metavar="HEX", help="up to 64 bytes to have in the report")
    report.add_argument("--extended", action="store_true", help="report V2, which CSV3 guests get")
    report.add_argument("--out", type=Path, help="write the page's 4096 bytes here instead")
    sealing = commands.add_parser("sealing-key", help="the sealing key, into a new file of mode 0600")
    sealing.add_argument("--out", type=Path, required=True)
    commands.add_parser("rtmr", help="the run-time measurement registers (CSV3)")
    extend = commands.add_parser("extend", help="extend a register, which is started when it has to be")
    extend.add_argument("register", type=int, help="1 to 4")
    extend.add_argument("digest", metavar="HEX", help="32 bytes")
    serve = commands.add_parser("serve", help=f"be {DEVICE} for other programs")
    serve.add_argument("--socket", type=Path, help=f"a socket instead of the device; default without CUSE: {SOCKET}")
    return parser


def _run(options: argparse.Namespace) -> None:
    # Who is the device does not ask the device.
    path = find_port() if options.command == "serve" and options.device is None else options.device
    with GuestDevice.open(path) as device:
        if options.command == "report":
            data = _bytes("--data", options.data)
            page = client_report(device.report(data, extended=options.extended).emitted.ljust(4096, b"\0"))
            if options.out is None:
                print(base64.b64encode(page).decode())
            else:
                options.out.write_bytes(page)
        elif options.command == "sealing-key":
            descriptor = os.open(options.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(descriptor, device.sealing_key())
            except BaseException:
                options.out.unlink()
                raise
            finally:
                os.close(descriptor)
        elif options.command == "rtmr":
            version, state = device.rtmr_status()
            print(f"version {version}, state {state}")
            for number, value in device.rtmr_read().items():
                print(f"{number} {value.hex()}")
        elif options.command == "extend":
            digest = _bytes("HEX", options.digest)
            if device.rtmr_status()[1] != WORKING:
                device.rtmr_start()
            device.rtmr_extend(options.register, digest)
        else:
            _serve(device, options.socket)


def _bytes(name: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ArgumentError(f"{name}: expected hexadecimal digits") from None


def _serve(device: GuestDevice, path: Path | None) -> None:
    requests = DeviceRequests(device.transport)
    if path is None and Path(CUSE).exists():
        server: CuseDevice | SocketDevice = CuseDevice(requests, ready=lambda: print(f"serving {DEVICE}", flush=True))
    else:
        place = path or Path(SOCKET)
        server = SocketDevice(requests, place, ready=lambda: print(f"serving {place}", flush=True))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.close())
    server.serve()


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; see the module for exit codes."""
    try:
        _run(_parser().parse_args(arguments))
    except (ArgumentError, FirmwareError, VerificationError, CsvfastError, OSError) as problem:
        print(f"csvfast guest: error: {problem}", file=sys.stderr)
        if isinstance(problem, (FirmwareError, VerificationError)):
            return 1
        return 3 if isinstance(problem, OSError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
