"""`csvfast guest`: an owner's session, launches in the process and on a server, secrets, reports."""

from __future__ import annotations

import base64
import json
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import ovmf_images as ovmf

from csvfast.certs import ManufacturingLine, parse_bundle
from csvfast.cli import main
from csvfast.crypto import sm3
from csvfast.errors import FirmwareStatus
from csvfast.processor import Processor
from csvfast.processor.core import C_BIT
from csvfast.processor.machine import LocalMachine
from csvfast.processor.server import ProcessorServer, open_shared_memory
from csvfast.processor.vmm import Host
from csvfast.report.evidence import read_evidence

FIRMWARE = ovmf.good(size=65536)
DIGEST = sm3(FIRMWARE).hexdigest()
SECRET_AREA = 0x80F000  # of ovmf.good()
Command = Callable[..., tuple[int, str, str]]
OWNER = ["--session", "none", "--disk-password", "password", "--measurement", "00" * 48, "--expect", "00" * 32]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    line = ManufacturingLine.create()
    line.make_chip("SIMGUEST").save("chip")
    Path("firmware").write_bytes(FIRMWARE)
    Path("kernel").write_bytes(b"kernel image bytes")
    Path("password").write_bytes(b"swordfish")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """command("guest", "launch", ...) -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def done(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def export_pdh() -> Path:
    """PDH, PEK, OCA, CEK, HSK of the chip in ./chip, as `platform pdh-export` would; `root.cert` beside."""
    from csvfast.memory import EncryptedMemory

    with EncryptedMemory(4096) as memory, Processor.open("chip", memory) as processor:
        processor.init()
        pdh, chain = processor.pdh_cert_export()
        Path("platform.certs").write_bytes(pdh + chain + processor.chip.hsk.encoded)
    return Path("platform.certs")


@pytest.fixture
def socket(folder: Path) -> Iterator[Path]:
    shared = open_shared_memory(64 << 20, asid_max=4)
    with Processor.open("chip", shared.memory) as processor:
        machine = LocalMachine(processor)
        with Host(machine) as host:
            host.initialise()
        with ProcessorServer(machine, shared.descriptor, "socket") as server:
            thread = threading.Thread(target=server.serve)
            thread.start()
            yield folder / "socket"
            server.close()
            thread.join(10)
    shared.close()


# ---- In the process -------------------------------------------------------------------------------------------------


def test_launch_agrees_with_measure(folder: Path, command: Command) -> None:
    options = ["--firmware", "firmware", "--kernel", "kernel", "--append", "console=ttyS0"]
    code, measured, _ = command("measure", "launch", *options)
    assert code == 0
    record = done(
        command, "guest", "launch", "--state", "chip", *options, "--report", "report.json", "--report-format", "json"
    )
    assert record["digest"] == record["predicted_digest"] == measured.strip()
    assert record["secret_area"] == hex(SECRET_AREA)
    evidence = read_evidence(Path("report.json").read_bytes())
    assert evidence.report.measure.hex() == record["digest"]
    assert evidence.report.sealing_key == bytes(32), "the sealing key stays in the guest"
    code, out, _ = command("report", "verify", "report.json", "--root", "chip/root.cert")
    assert code == 0, out
    assert command("report", "verify", "report.json")[0] == 1, "not Hygon's"


@pytest.mark.parametrize(("policy", "vcpus", "vmsa"), [("0x1", 1, "none"), ("5", 3, "none"), ("5", 2, "amd")])
def test_generations_and_save_areas(folder: Path, command: Command, policy: str, vcpus: int, vmsa: str) -> None:
    more = ["--vcpus", vcpus, "--vmsa", vmsa]
    record = done(command, "guest", "launch", "--state", "chip", "--firmware", "firmware", "--policy", policy, *more)
    assert record["digest"] == record["predicted_digest"]
    assert (record["digest"] == DIGEST) == (vmsa == "none")


def test_people_get_lines(folder: Path, command: Command) -> None:
    code, out, err = command("guest", "launch", "--state", "chip", "--firmware", "firmware")
    assert code == 0, err
    assert f"digest:           {DIGEST}" in out
    assert "state:            RUNNING" in out
    assert err == ""


def test_report_data_and_raw_form(folder: Path, command: Command) -> None:
    Path("challenge").write_bytes(bytes(range(64)))
    done(
        command,
        "guest",
        "launch",
        "--state",
        "chip",
        "--firmware",
        "firmware",
        "--report",
        "raw",
        "--report-data",
        "@challenge",
    )
    raw = Path("raw").read_bytes()
    assert len(raw) == 2548
    assert read_evidence(raw).report.report_data == bytes(range(64))


# ---- The owner ------------------------------------------------------------------------------------------------------


def test_session_secret_and_launch(folder: Path, command: Command) -> None:
    certificates = export_pdh()
    digest = ["--vm-digest", DIGEST, "--vm-id", "0102", "--policy", "5"]
    record = done(command, "guest", "session", certificates, "--root", "chip/root.cert", "--out", "session", *digest)
    assert record["verified"] is True
    assert stat.S_IMODE(Path("session").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in Path("session").iterdir())
    dh = base64.b64decode(Path("session/dh-cert.b64").read_text(), validate=False)
    assert parse_bundle(dh).pdh is not None
    assert len(base64.b64decode(Path("session/session.b64").read_text())) == 772

    launch = ["guest", "launch", "--state", "chip", "--session", "session"]
    record = done(command, *launch, "--firmware", "firmware", "--disk-password", "password", "--report", "report")
    assert record["secret"] == "injected"
    assert record["policy"] == "0x00000005", "the session's"
    report = read_evidence(Path("report").read_bytes()).report
    assert report.vm_id == b"\x01\x02".ljust(16, b"\0")
    assert report.user_pubkey_digest == sm3(dh[20:164]).digest()

    # As QEMU gets them: two files.
    files = ["--session", "session/session.b64", "--dh", "session/dh-cert.b64"]
    done(command, "guest", "launch", "--state", "chip", "--firmware", "firmware", "--policy", "5", *files)
    code, _, err = command("guest", "launch", "--state", "chip", "--firmware", "firmware", "--policy", "1", *files)
    assert code == 1
    assert "BAD_MEASUREMENT" in err, "another policy than the session's"

    # Another firmware: the VM does not start.
    Path("other").write_bytes(FIRMWARE[:-1] + b"\xff")
    code, out, err = command(*launch, "--firmware", "other", "--disk-password", "password")
    assert code == 1
    assert "vm_digest" in err
    assert out == ""


def test_a_session_only_for_a_genuine_platform(folder: Path, command: Command) -> None:
    certificates = export_pdh()
    code, _, err = command("guest", "session", certificates, "--output", "session")
    assert code == 1
    assert "not shown to be genuine" in err, "Hygon's root is the default"
    data = certificates.read_bytes()
    certificates.write_bytes(data[:2084])
    assert command("guest", "session", certificates, "--root", "chip/root.cert", "--out", "session")[0] == 1
    certificates.write_bytes(data[2084:])
    assert command("guest", "session", certificates, "--root", "chip/root.cert", "--out", "session")[0] == 2
    certificates.write_bytes(data[:-5])
    code, _, err = command("guest", "session", certificates, "--root", "chip/root.cert", "-o", "session")
    assert (code, err.count("\n")) == (2, 1)
    assert str(certificates) in err, "which of the files it is"
    certificates.write_bytes(data)
    Path("bad.root").write_bytes(bytes(831))
    code, _, err = command("guest", "session", certificates, "--root", "bad.root", "-o", "session")
    assert (code, "--root: bad.root: " in err) == (2, True)
    code, _, err = command("guest", "session", certificates.with_name("absent"), "-o", "session")
    assert (code, "absent: No such file" in err) == (3, True)
    assert not Path("session").exists()
    certificates.write_bytes(data[:2084])
    assert done(command, "guest", "session", certificates, "--unverified", "--out", "session")["verified"] is False
    assert command("guest", "session", certificates, "--unverified", "--out", "session")[0] == 3, "never overwritten"


# ---- On a server ----------------------------------------------------------------------------------------------------


def test_a_guest_on_a_server(socket: Path, command: Command) -> None:
    server = ["--socket", "socket"]
    assert done(command, "guest", "status", *server) == {"guests": []}
    first = done(command, "guest", "launch", *server, "--firmware", "firmware", "--memory", "12MiB")
    second = done(command, "guest", "launch", *server, "--firmware", "firmware", "--memory", "12MiB", "--policy", "5")
    assert first["digest"] == second["digest"] == DIGEST
    rows = done(command, "guest", "status", *server)["guests"]
    assert [(row["handle"], row["asid"], row["state"]) for row in rows] == [
        (first["handle"], 1, "RUNNING"), (second["handle"], 2, "RUNNING"),
    ]  # fmt: skip
    assert "guest 1: RUNNING, policy 0x00000001, ASID 1" in command("guest", "status", *server)[1]
    record = done(command, "guest", "report", 2, *server, "-o", "report", "--report-data", "abcd")
    assert record["digest"] == DIGEST
    report = read_evidence(Path("report").read_bytes()).report
    assert (report.report_data[:2], report.policy.value) == (b"\xab\xcd", 5)
    for handle in (1, 2):
        assert done(command, "guest", "stop", handle, *server)["state"] == "gone"
    code, _, err = command("guest", "stop", 1, *server)
    assert code == 1
    assert "INVALID_PLATFORM_STATE" in err, "the last guest is gone"
    # Frames and ASIDs come back: more launches than there is room for at once.
    for _ in range(6):
        record = done(command, "guest", "launch", *server, "--firmware", "firmware", "--memory", "40MiB")
        done(command, "guest", "stop", record["handle"], *server)


def test_a_secret_after_the_owner_saw_the_measurement(socket: Path, command: Command, folder: Path) -> None:
    server = ["--socket", "socket"]
    from csvfast.processor.client import RemoteMachine
    from csvfast.processor.commands import Command as Id

    with RemoteMachine(socket) as machine, Host(machine) as host:
        place = machine.allocate(16384)
        host.run(Id.PDH_CERT_EXPORT, pdh_address=place, pdh_length=2084, chain_address=place + 2084, chain_length=6252)
        Path("platform.certs").write_bytes(machine.read(place, 8336) + Path("chip/hsk.cert").read_bytes())
    done(command, "guest", "session", "platform.certs", "--root", "chip/root.cert", "--out", "session")
    held = done(command, "guest", "launch", *server, "--firmware", "firmware", "--session", "session", "--hold")
    assert held["state"] == "LSECRET"
    assert "digest" not in held, "no report before the end"
    owner = ["--session", "session", "--disk-password", "password", "--measurement", held["measurement"]]
    place_options = ["--handle", held["handle"], "--address", held["secret_area"]]
    code, _, err = command("guest", "secret", *owner, "--expect", "00" * 32, *server, *place_options)
    assert code == 1
    assert "launch measurement" in err
    code, _, err = command("guest", "secret", *owner, "--expect", DIGEST, "--api", "1.3/2011", *server, *place_options)
    assert code == 1, "another firmware's"
    sent = done(command, "guest", "secret", *owner, "--expect", DIGEST, *server, *place_options)
    assert sent["state"] == "RUNNING"
    with RemoteMachine(socket) as machine:
        (ram,) = [found for found in machine.guest_ranges(held["handle"]) if found.guest_physical == 0]
        table = machine.guest_read(held["handle"], (ram.address + SECRET_AREA) | C_BIT, sent["bytes"])
        assert b"swordfish\0" in table
        assert b"swordfish" not in machine.read(0, machine.size)
    packed = done(command, "guest", "secret", *owner, "--expect", DIGEST, "-o", "packed")
    assert packed["bytes"] == sent["bytes"]
    assert len(base64.b64decode(Path("packed/secret-header.b64").read_text())) == 52
    assert len(base64.b64decode(Path("packed/secret.b64").read_text())) == packed["bytes"]


def test_a_failed_launch_leaves_nothing(socket: Path, command: Command) -> None:
    server = ["--socket", "socket"]
    Path("odd").write_bytes(bytes(4097))
    code, _, err = command("guest", "launch", *server, "--firmware", "odd")
    assert code == 1
    assert FirmwareStatus.INVALID_LENGTH.name in err
    code, _, err = command(
        "guest", "launch", *server, "--firmware", "firmware", "--kernel", "kernel", "--memory", "1MiB"
    )
    assert code == 2
    assert "outside the guest's RAM" in err
    code, _, err = command("guest", "launch", *server, "--firmware", "firmware", "--memory", "1GiB")
    assert code == 3
    assert "no 1073741824 free bytes" in err
    assert done(command, "guest", "status", *server) == {"guests": []}


@pytest.mark.parametrize("digest", ["", "00" * 32, "@empty"])
def test_a_digest_that_allows_everything_is_none(folder: Path, command: Command, digest: str) -> None:
    """--vm-digest "$D" with an empty variable must not make a session for any guest."""
    Path("empty").write_bytes(b"")
    options = ["--root", "chip/root.cert", "--out", "session", "--vm-digest", digest]
    code, out, err = command("guest", "session", export_pdh(), *options)
    assert (code, out) == (2, "")
    assert "--vm-digest" in err
    assert not Path("session").exists()


def test_an_empty_policy_is_not_the_default(folder: Path, command: Command) -> None:
    code, _, err = command("guest", "launch", "--state", "chip", "--firmware", "firmware", "--policy", "")
    assert code == 2
    assert "is no number" in err


def test_a_report_to_standard_output_is_all_there_is(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    launch = ["guest", "launch", "--state", "chip", "--firmware", "firmware", "--report", "-"]
    assert main(launch) == 0
    assert read_evidence(capsysbinary.readouterr().out).report.measure.hex() == DIGEST
    assert main([*launch, "--json"]) == 2
    assert b"both want standard output" in capsysbinary.readouterr().err


def test_another_digest_than_predicted(socket: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The firmware's file changes between prediction and launch: no report is left, and no guest."""
    real = Host._load

    def changed(self: Host, *arguments: Any) -> Any:
        Path("firmware").write_bytes(FIRMWARE[:-100] + b"\xff" + FIRMWARE[-99:])
        return real(self, *arguments)

    monkeypatch.setattr(Host, "_load", changed)
    code, out, err = command("guest", "launch", "--socket", "socket", "--firmware", "firmware", "--report", "report")
    assert (code, out) == (1, "")
    assert "another launch digest" in err
    assert not Path("report").exists()
    assert done(command, "guest", "status", "--socket", "socket") == {"guests": []}


@pytest.mark.parametrize("moment", ["LAUNCH_UPDATE_DATA", "ATTESTATION"])
def test_ctrl_c_in_a_request_leaves_no_guest(
    socket: Path, command: Command, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The answer never came, so the connection cannot be used any more; the guest goes through a new one."""
    from csvfast.processor.client import RemoteMachine
    from csvfast.processor.commands import Command as Id

    real = RemoteMachine.command

    def interrupted(self: RemoteMachine, command_id: int, address: int) -> FirmwareStatus:
        if command_id == Id[moment] and moment not in seen:
            seen.append(moment)
            assert self.guests() != []
            self._host.close()
            raise KeyboardInterrupt
        return real(self, command_id, address)

    seen: list[str] = []
    monkeypatch.setattr(RemoteMachine, "command", interrupted)
    code, out, err = command("guest", "launch", "--socket", "socket", "--firmware", "firmware")
    assert (code, out, err) == (130, "", "csvfast: interrupted\n")
    assert seen
    assert done(command, "guest", "status", "--socket", "socket") == {"guests": []}


def test_a_failure_is_not_hidden_by_the_next(socket: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Host, handle: int) -> None:
        raise OSError("the first failure")

    monkeypatch.setattr(Host, "finish", fail)
    monkeypatch.setattr(Host, "stop", lambda self, handle: self.machine.close() or self.machine.guests())
    code, _, err = command("guest", "launch", "--socket", "socket", "--firmware", "firmware")
    assert code == 3
    assert "the first failure" in err


def test_two_sockets(folder: Path, command: Command) -> None:
    shared = open_shared_memory(32 << 20, asid_max=4)
    with Processor.open("chip", shared.memory) as processor:
        machine = LocalMachine(processor)
        with Host(machine) as host:
            host.initialise()
        with ProcessorServer(machine, shared.descriptor, "host", vcpu_path="vcpu") as server:
            thread = threading.Thread(target=server.serve)
            thread.start()
            launch = ["guest", "launch", "--socket", "host", "--firmware", "firmware"]
            code, _, err = command(*launch)
            assert code == 2
            assert "this socket is not for operation" in err, "the report is the guest's own doing"
            assert done(command, "guest", "status", "--socket", "host") == {"guests": []}
            record = done(command, *launch, "--vcpu-socket", "vcpu")
            assert record["digest"] == DIGEST
            report = ["guest", "report", record["handle"], "--socket", "host", "--out", "report"]
            assert command(*report)[0] == 2
            assert done(command, *report, "--vcpu-socket", "vcpu")["digest"] == DIGEST
            server.close()
            thread.join(10)
    shared.close()


# ---- Misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["launch", "--firmware", "firmware"], 2, "either --state"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--socket", "s"], 2, "either --state"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--policy", "0x45"], 2, "CSV3"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--policy", "five"], 2, "is no number"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--policy", "0x100000000"], 2, "32 bits"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--dh", "firmware"], 2, "without --session"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--session", "firmware"], 2, "needs --dh"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--disk-password", "password"], 2, "only the owner"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--hold"], 2, "--hold"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--profile", "2.0"], 2, "expected one of"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--report-data", "abc"], 2, "hexadecimal"),
        (["launch", "--firmware", "firmware", "--state", "chip", "--report-data", "00" * 65], 2, "65 bytes"),
        (["launch", "--firmware", "firmware", "--state", "none"], 3, "no such directory"),
        (["launch", "--firmware", "none", "--state", "chip"], 3, "none"),
        (["status", "--socket", "none"], 3, "none: No such file"),
        (
            ["secret", "--session", "s", "--disk-password", "p", "--measurement", "00", "--expect", "00"],
            2,
            "either --socket",
        ),
        (["launch", "--firmware", "firmware", "--state", "chip", "--vcpu-socket", "v"], 2, "without --socket"),
        (["secret", *OWNER, "--socket", "s"], 2, "--handle and --address"),
        (["secret", *OWNER, "--socket", "s", "--handle", "1", "--address", "x"], 2, "is no number"),
        (["secret", *OWNER, "--out", "o", "--api", "1.4"], 2, "--api"),
        (["secret", *OWNER, "--out", "o", "--api", "1.400/2337"], 2, "--api"),
        (["secret", *OWNER, "--out", "o", "--api", "1.4/-1"], 2, "--api"),
        (["secret", *OWNER, "--out", "o"], 3, "no such directory"),
    ],
)
def test_misuse(folder: Path, command: Command, arguments: list[str], code: int, words: str) -> None:
    found, out, err = command("guest", *arguments)
    assert (found, out) == (code, ""), err
    assert words in err
    assert err.count("\n") == 1
    assert "swordfish" not in err
