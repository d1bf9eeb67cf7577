"""`csvfast cert`: exit codes, tables and JSON; 0 fine, 1 refused, 2 unreadable, 3 key server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from csvfast.certs import HYGON_ROOT_FINGERPRINT, CertificateStore, fingerprint, hygon_root, parse_bundle
from csvfast.certs.factory import ChainFactory

Run = Callable[..., subprocess.CompletedProcess[str]]
ALL = ("PDH", "PEK", "OCA", "CEK", "HSK", "HRK")


@pytest.fixture(scope="module")
def factory() -> ChainFactory:
    return ChainFactory()


@pytest.fixture
def key_server(factory: ChainFactory) -> Iterator[str]:
    """A key server on this machine that knows one chip, SIM1; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path != "/hsk_cek?snumber=SIM1":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(factory.encodings["HSK"] + factory.encodings["CEK"])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path, factory: ChainFactory) -> Path:
    """A file for each certificate, named after its role."""
    for role, encoded in factory.encodings.items():
        (tmp_path / role).write_bytes(encoded)
    (tmp_path / "hsk_cek.cert").write_bytes(factory.encodings["HSK"] + factory.encodings["CEK"])
    (tmp_path / "full").write_bytes(b"".join(factory.encodings[role] for role in ALL))
    return tmp_path


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("csvfast: error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


# ---- show -----------------------------------------------------------------------------------------------------------


def test_show(csvfast_here: Run, folder: Path, factory: ChainFactory) -> None:
    done = csvfast_here("cert", "show", folder / "full")
    assert (done.returncode, done.stderr) == (0, "")
    for role in ALL:
        assert f"Certificate:     {role}\n" in done.stdout
    record = json.loads(csvfast_here("cert", "show", folder / "full", "--json").stdout)
    shown = {one["role"]: one for one in record["certificates"]}
    assert list(shown) == ["HRK", "HSK", "CEK", "OCA", "PEK", "PDH"]
    bundle = parse_bundle(b"".join(factory.encodings.values())).certificates()
    for role, one in shown.items():
        assert one["public_key"] == bundle[role].point.hex()
        assert one["user_id"] == f"HYGON-SSD-{role}"
        assert one["on_curve"] is True
    assert [signature["by"] for signature in shown["PEK"]["signatures"]] == ["CEK", "OCA"]
    assert shown["CEK"]["signatures"][1]["by"] == "INVALID"
    assert shown["PDH"]["algorithm"] == "SM2_DH"


def test_show_hygons_root_from_standard_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "csvfast", "cert", "show", "-", "--json"],
        input=hygon_root().encoded, capture_output=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(done.stdout)["certificates"][0]["sm3"] == HYGON_ROOT_FINGERPRINT


def test_show_evidence(csvfast_here: Run, hygon_data: Path) -> None:
    record = json.loads(csvfast_here("cert", "show", hygon_data / "csv_evidence.json", "--json").stdout)
    (pek,) = record["certificates"]
    assert (pek["role"], pek["api"], pek["usage"]) == ("PEK", "1.3", "0x1002")


def test_show_does_not_judge(csvfast_here: Run, folder: Path, factory: ChainFactory) -> None:
    (folder / "odd").write_bytes(factory.wrong("CEK", "x", resign=False)["CEK"])
    done = csvfast_here("cert", "show", folder / "odd")
    assert done.returncode == 0
    assert "On the curve:    no" in done.stdout
    assert "Reserved areas:  zero" in done.stdout
    (folder / "odd").write_bytes(factory.wrong("CEK", "reserved2")["CEK"])
    assert "Reserved areas:  not zero: reserved2" in csvfast_here("cert", "show", folder / "odd").stdout


def test_terminal_is_safe(csvfast_here: Run, folder: Path, factory: ChainFactory) -> None:
    (folder / "odd").write_bytes(factory.wrong("CEK", "uid", b"\x1b[31m\r\n\x07", resign=False)["CEK"])
    done = csvfast_here("cert", "show", folder / "odd")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


@pytest.mark.parametrize("content", [b"", b"x", b"{}", b"\xff" * 832, bytes(2084), bytes(7016), b"[" * 5000, bytes(5 << 20)])
def test_unreadable_input(csvfast_here: Run, folder: Path, content: bytes) -> None:
    (folder / "bad").write_bytes(content)
    one_line(csvfast_here("cert", "verify", folder / "HRK", folder / "bad"), 2)
    if content == b"x":
        for command in (("show",), ("verify",), ("import", "--chip-id", "SIM1")):
            one_line(csvfast_here("cert", *command, folder / "bad"), 2)


def test_missing_files(csvfast_here: Run, folder: Path) -> None:
    missing = folder / "missing"
    for command in (("show",), ("verify",), ("import",), ("verify", folder / "full", "--root")):
        one_line(csvfast_here("cert", *command, missing), 2, str(missing), "No such file")
    one_line(csvfast_here("cert", "show", folder), 2, "directory")


# ---- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files", [("full",), ("hsk_cek.cert",), ("PEK", "hsk_cek.cert"), ("PDH", "OCA", "CEK", "HSK", "PEK"), ("HSK",), ("HRK",)]
)
def test_verify(csvfast_here: Run, folder: Path, factory: ChainFactory, files: tuple[str, ...]) -> None:
    paths = [folder / name for name in files]
    done = csvfast_here("cert", "verify", "--root", folder / "HRK", *paths)
    assert done.returncode == 0, done.stderr
    assert "not Hygon" in done.stdout
    root = parse_bundle(factory.encodings["HRK"]).hrk
    assert root is not None
    assert fingerprint(root) in done.stdout
    record = json.loads(csvfast_here("cert", "verify", "--root", folder / "HRK", *paths, "--json").stdout)
    assert record["verified"] is True
    assert record["root_is_hygon"] is False
    done = csvfast_here("cert", "verify", *paths, "--json")
    one_line(done, 1, "not genuine", "not")
    assert json.loads(done.stdout)["verified"] is False


def test_verify_hygons_root(csvfast_here: Run, folder: Path) -> None:
    (folder / "hrk.cert").write_bytes(hygon_root().encoded)
    done = csvfast_here("cert", "verify", folder / "hrk.cert")
    assert done.returncode == 0
    assert "(Hygon)" in done.stdout
    one_line(csvfast_here("cert", "verify", folder / "hrk.cert", "--root", folder / "HRK"), 1, "not trusted")


def test_verify_several_roots(csvfast_here: Run, folder: Path) -> None:
    (folder / "hrk.cert").write_bytes(hygon_root().encoded)
    roots = ("--root", folder / "hrk.cert", "--root", folder / "HRK")
    assert csvfast_here("cert", "verify", folder / "hsk_cek.cert", *roots).returncode == 0
    one_line(csvfast_here("cert", "verify", folder / "full", "--root", folder / "CEK"), 2, "holds no HRK")


@pytest.mark.parametrize("role", ["HSK", "CEK", "OCA", "PEK", "PDH"])
def test_verify_names_the_step(csvfast_here: Run, folder: Path, factory: ChainFactory, role: str) -> None:
    wrong = factory.wrong(role, "reserved2")
    (folder / "wrong").write_bytes(b"".join(wrong[name] for name in ALL))
    done = csvfast_here("cert", "verify", folder / "wrong", "--root", folder / "HRK", "--json")
    one_line(done, 1, f"not genuine: {role}: reserved2")
    record = json.loads(done.stdout)
    assert (record["verified"], record["step"]) == (False, role)
    # csv-rs does not look at reserved bytes; the signature was made over them.
    assert csvfast_here("cert", "verify", folder / "wrong", "--root", folder / "HRK", "--tolerant").returncode == 0


def test_verify_needs_the_links_between(csvfast_here: Run, folder: Path) -> None:
    root = ("--root", folder / "HRK")
    one_line(csvfast_here("cert", "verify", folder / "PEK", *root), 1, "HSK: the certificate is missing")
    one_line(csvfast_here("cert", "verify", folder / "HSK", folder / "PEK", *root), 1, "CEK: the certificate is missing")
    one_line(csvfast_here("cert", "verify", folder / "hsk_cek.cert", folder / "PDH", *root), 1, "PEK: the certificate")


def test_verify_two_chips_at_once(csvfast_here: Run, folder: Path) -> None:
    (folder / "other").write_bytes(ChainFactory().encodings["CEK"])
    one_line(csvfast_here("cert", "verify", folder / "full", folder / "other"), 2, "two different")


# ---- import and fetch -----------------------------------------------------------------------------------------------


def test_import(csvfast_here: Run, folder: Path, factory: ChainFactory) -> None:
    cache = folder / "xdg" / "csvfast" / "certs"
    home = {"XDG_CACHE_HOME": str(folder / "xdg")}
    one_line(csvfast_here("cert", "import", folder / "hsk_cek.cert", "--chip-id", "SIM1", environment=home), 1, "HSK")
    assert not cache.exists()
    root = ("--root", folder / "HRK")
    done = csvfast_here("cert", "import", folder / "hsk_cek.cert", "--chip-id", "SIM1", *root, environment=home)
    assert done.returncode == 0, done.stderr
    found = CertificateStore([], cache=cache).find("SIM1")
    assert found is not None
    assert found[1].encoded == factory.encodings["CEK"]
    again = csvfast_here("cert", "import", cache, *root, "--cache", folder / "second", "--json")
    assert json.loads(again.stdout) == {"cache": str(folder / "second"), "chips": ["SIM1"]}
    for path, chip_id, words in ((folder / "hsk_cek.cert", "../x", "chip id"), (cache, "SIM1", "--chip-id")):
        one_line(csvfast_here("cert", "import", path, "--chip-id", chip_id, *root, environment=home), 2, words)


def test_fetch_refusals(csvfast_here: Run, folder: Path) -> None:
    """What is wrong before anybody is asked, and nobody at home."""
    one_line(csvfast_here("cert", "fetch", "../x"), 2, "chip id")
    one_line(csvfast_here("cert", "fetch", "KPA1", "--url", "http://cert.hygon.cn"), 2, "https")
    one_line(csvfast_here("cert", "fetch", "KPA1", "--timeout", "0"), 2, "timeout")
    one_line(csvfast_here("cert", "fetch", "KPA1", "--authority", folder / "missing"), 2, "--authority")
    one_line(csvfast_here("cert", "fetch", "KPA1", "--authority", folder / "HRK"), 2, "--authority")
    one_line(csvfast_here("cert", "fetch", "KPA1", "--url", "https://127.0.0.1:1", "--cache", folder / "c"), 3, "refused")
    assert not (folder / "c").exists()


def test_fetch(csvfast_here: Run, folder: Path, factory: ChainFactory, key_server: str) -> None:
    arguments = ("--url", key_server, "--cache", folder / "c")
    one_line(csvfast_here("cert", "fetch", "SIM1", *arguments), 1, "not genuine: HSK")
    assert not (folder / "c").exists()
    done = csvfast_here("cert", "fetch", "SIM1", *arguments, "--root", folder / "HRK", "--json")
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["file"])
    assert path.read_bytes() == factory.encodings["HSK"] + factory.encodings["CEK"]
    one_line(csvfast_here("cert", "fetch", "OTHER", *arguments, "--root", folder / "HRK"), 3, "404")
