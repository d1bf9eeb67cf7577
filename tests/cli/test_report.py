"""`csvfast report`: the fixed call of outsiders, exit codes 0, 1 and 2, JSON, standard input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attest.simulated_evidence import MEASURE, MNONCE, REPORT_DATA, Platform

from csvfast.cli import main
from csvfast.report import ReportRequest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


@pytest.fixture
def files(platform: Platform, tmp_path: Path) -> Path:
    """A directory as a verifier has it: hsk_cek.cert, report.cert (raw, masked), root.cert, evidence.json."""
    (tmp_path / "hsk_cek.cert").write_bytes(platform.hsk_cek)
    (tmp_path / "report.cert").write_bytes(platform.page_v1()[:2548])
    (tmp_path / "root.cert").write_bytes(platform.line.root.encoded)
    (tmp_path / "evidence.json").write_bytes(platform.evidence().to_json())
    return tmp_path


@pytest.fixture
def process(csvfast_command: Run, tmp_path: Path) -> Run:
    """csvfast report ..., a process of its own, in the directory, with a home that holds no certificates."""

    def call(*arguments: object, **keywords: object) -> subprocess.CompletedProcess[str]:
        return csvfast_command("report", *arguments, environment={"HOME": str(tmp_path / "home")}, **keywords)

    return call


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same in this process, which is many times faster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = main(["report", *map(str, arguments)])
        output = capsys.readouterr()
        return subprocess.CompletedProcess([], code, output.out, output.err)

    return call


def test_the_fixed_call(process: Run, files: Path) -> None:
    done = process("verify", "--root", "root.cert", "--certs", "hsk_cek.cert", "report.cert")
    assert done.returncode == 0, done.stderr
    assert "genuine" in done.stdout
    assert MEASURE.hex() in done.stdout
    assert "NOT Hygon's" in done.stdout.replace("\n", " ")
    done = process("verify", "--certs", "hsk_cek.cert", "report.cert")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "report.cert: refused: HSK" in done.stderr


def test_verify_json(run: Run, files: Path, platform: Platform) -> None:
    options = ("--root", "root.cert", "--certs", "hsk_cek.cert", "--mnonce", MNONCE.hex(), "--json")
    done = run("verify", *options, "--report-data", REPORT_DATA.rstrip(b"\0").hex(), "report.cert")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["verified"], document["complete"]) == (True, True)
    assert document["checks"][-3:] == ["report data", "mnonce", "MAC"]
    assert [one["name"] for one in document["unchecked"]] == ["chip id"]
    assert document["claims"]["serial_number"] == platform.chip.chip_id
    done = run("verify", *options, "--report-data", "00", "report.cert")
    assert done.returncode == 1
    assert json.loads(done.stdout)["step"] == "report data"


def test_every_place_for_certificates(run: Run, files: Path, platform: Platform) -> None:
    assert run("verify", "--root", "root.cert", "evidence.json").returncode == 0
    (files / "empty").touch()
    done = run("verify", "--root", "empty", "evidence.json")
    assert (done.returncode, "--root: empty: CA certificate" in done.stderr) == (2, True)
    chain = platform.pek.encoded + platform.chip.cek.encoded + platform.line.hsk.encoded + platform.line.root.encoded
    (files / "chain").write_bytes(chain)
    assert run("verify", "--root", "root.cert", "--certs", "chain", "report.cert").returncode == 0
    directory = files / "certs" / platform.chip.chip_id
    directory.mkdir(parents=True)
    done = run("verify", "--root", "root.cert", "--certs", "certs", "report.cert")
    assert (done.returncode, "chain incomplete" in done.stderr) == (1, True)
    (directory / "hsk_cek.cert").write_bytes(platform.hsk_cek)
    assert run("verify", "--root", "root.cert", "--certs", "certs", "report.cert").returncode == 0


def test_flipped_bits(run: Run, files: Path, platform: Platform) -> None:
    places = {"report.cert": (0, 0xC5, 0x158, 0x980, 0x9F0), "hsk_cek.cert": (0, 36, 300, 600, 832, 1200, 2000)}
    for name, offsets in places.items():
        whole = (files / name).read_bytes()
        for offset in offsets:
            flipped = bytearray(whole)
            flipped[offset] ^= 4
            (files / name).write_bytes(flipped)
            done = run("verify", "--root", "root.cert", "--certs", "hsk_cek.cert", "report.cert")
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), (name, offset, done.stderr)
        (files / name).write_bytes(whole)


def test_unreadable_input(run: Run, files: Path) -> None:
    (files / "garbage").write_bytes(b"garbage")
    (files / "empty").write_bytes(b"")
    with (files / "sparse").open("wb") as sparse:
        sparse.truncate(10 << 30)
    for arguments in (
        ("verify", "garbage"),
        ("verify", "empty"),
        ("verify", "missing"),
        ("verify", "."),
        ("show", "garbage"),
        ("show", "missing"),
        ("verify", "--certs", "missing", "report.cert"),
        ("verify", "--certs", "garbage", "report.cert"),
        ("verify", "--certs", "root.cert", "report.cert"),
        ("verify", "--root", "missing", "report.cert"),
        ("verify", "--root", "garbage", "report.cert"),
        ("verify", "--mnonce", "00", "report.cert"),
        ("verify", "--mnonce", "zz", "report.cert"),
        ("verify", "--report-data", "@missing", "report.cert"),
        ("appraise", "--policy", "missing", "report.cert"),
        ("appraise", "--policy", "garbage", "report.cert"),
        ("verify", "--report-data", "00" * 65, "report.cert"),
        ("verify", "--report-data", "@report.cert", "report.cert"),
        ("verify", "/dev/zero"),
        ("verify", "sparse"),
        ("verify", "--certs", "sparse", "report.cert"),
        ("verify", "--certs", "x" * 300, "report.cert"),
        ("verify", "--root", "sparse", "report.cert"),
        ("appraise", "--policy", "sparse", "report.cert"),
        ("appraise", "--policy", ".", "report.cert"),
        ("request", "-o", "page", "--data", "00" * 65),
        ("request", "-o", "-", "--json"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (arguments, done.stderr)


def test_names_in_evidence_do_not_reach_the_terminal(run: Run, files: Path) -> None:
    for name in ("\x1b]0;owned\x07", "\u202egnp", "\ud800"):
        (files / "hostile.json").write_text(json.dumps({name: 1})[:-1] + "," + json.dumps({name: 2})[1:])
        (files / "hostile.toml").write_text('{"any_measurement": true, ' + json.dumps({name: 1})[1:])
        for arguments in (("verify", "hostile.json"), ("appraise", "--policy", "hostile.toml", "report.cert")):
            done = run(*arguments)
            assert done.returncode == 2
            assert ascii(name)[1:-1] in done.stderr
            assert done.stderr.rstrip("\n").isprintable()


def test_a_closed_or_full_standard_output_is_no_success(files: Path) -> None:
    options = "--root root.cert --certs hsk_cek.cert"
    for command in (f"verify {options} report.cert", f"verify --json {options} report.cert", "show report.cert", "request -o -"):
        for place in ("&-", "/dev/full"):
            line = f'"{sys.executable}" -P -m csvfast report {command} >{place}'
            done = subprocess.run(["sh", "-c", line], cwd=files, capture_output=True, check=False)
            assert (done.returncode, done.stderr.count(b"\n")) == (3, 1), (line, done.stderr)


def test_partial(run: Run, files: Path) -> None:
    done = run("verify", "--root", "root.cert", "report.cert")
    assert done.returncode == 1
    done = run("verify", "--root", "root.cert", "--partial", "report.cert")
    assert done.returncode == 0
    assert "WARNING: PARTIAL" in done.stderr
    assert "ONLY FROM THE PEK ON" in done.stdout


def test_show_and_standard_input(run: Run, process: Run, files: Path, platform: Platform) -> None:
    done = run("show", "report.cert")
    assert done.returncode == 0
    assert "NOT VERIFIED" in done.stdout
    document = json.loads(process("show", "--json", "-", input=(files / "evidence.json").read_text()).stdout)
    assert document["encoding"] == "json"
    assert document["verified"] is None
    assert document["claims"]["measure"] == MEASURE.hex()
    assert document["beside_the_report"] == ["hsk_cek", "pek"]
    assert process("verify", "--root", "root.cert", "-", input=(files / "evidence.json").read_text()).returncode == 0


def test_appraise(run: Run, files: Path) -> None:
    (files / "policy.toml").write_text(f'measurements = ["{MEASURE.hex()}"]\n[policy]\nrequired = ["nodbg"]\n')
    options = ("--root", "root.cert", "--certs", "hsk_cek.cert")
    done = run("appraise", "--policy", "policy.toml", *options, "report.cert")
    assert done.returncode == 0, done.stderr
    assert "Verification: genuine" in done.stdout
    assert "Appraisal: allowed" in done.stdout
    (files / "policy.toml").write_text(f'measurements = ["{"ee" * 32}"]\n[policy]\nforbidden = ["nodbg"]\n')
    done = run("appraise", "--policy", "policy.toml", *options, "report.cert")
    assert done.returncode == 1
    assert "Appraisal: NOT ALLOWED" in done.stdout
    assert "genuine, but not allowed: 2 violations" in done.stderr
    document = json.loads(run("appraise", "--json", "--policy", "policy.toml", *options, "report.cert").stdout)
    assert document["verification"]["verified"]
    assert [one["name"] for one in document["appraisal"]["violations"]] == ["measure", "policy nodbg"]
    # What is not genuine is not appraised at all.
    done = run("appraise", "--policy", "policy.toml", "report.cert")
    assert (done.returncode, done.stdout) == (1, "")


def test_request(run: Run, files: Path) -> None:
    done = run("request", "--data", "00ff", "--mnonce", MNONCE.hex(), "--extended", "-o", "page", "--json")
    assert done.returncode == 0, done.stderr
    page = (files / "page").read_bytes()
    assert page == ReportRequest.build(b"\0\xff", MNONCE, extended=True)
    assert json.loads(done.stdout)["mnonce"] == MNONCE.hex()
    (files / "data").write_bytes(REPORT_DATA)
    command = [sys.executable, "-P", "-m", "csvfast", "report", "request", "--data", "@data", "-o", "-"]
    written = subprocess.run(command, capture_output=True, check=True, cwd=files).stdout
    assert ReportRequest.parse(written).data == REPORT_DATA
    assert ReportRequest.parse(written).hash_is_valid


def test_commands_of_the_documentation(run: Run, files: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "reports.md"
    if not page.exists():
        pytest.skip("the tests stand outside a source tree")
    (files / "policy.toml").write_text(f'measurements = ["{MEASURE.hex()}"]\n')
    lines = re.findall(r"^    csvfast report (.*?)(?: +#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        done = run(*line.split())
        assert done.returncode == 0, (line, done.stderr)


def test_real_evidence(run: Run, hygon_data: Path) -> None:
    evidence = hygon_data / "csv_evidence.json"
    done = run("verify", evidence)
    assert (done.returncode, "chain incomplete" in done.stderr) == (1, True)
    document = json.loads(run("verify", "--partial", "--root", hygon_data / "hrk.cert", "--json", evidence).stdout)
    assert (document["verified"], document["complete"], document["root"]) == (True, False, None)
    assert document["claims"]["serial_number"] == "KPA64911240507"
