"""Objects with URLs: a real S3 server, connections that are reset in mid-file, credentials that are refused, HTTP servers."""

from __future__ import annotations

import hashlib
import http.server
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from measure.s3_server import Proxy, S3Server

from csvfast.cli import main
from csvfast.errors import MissingExtraError
from csvfast.measure import Job, ParameterError, SourceChangedError, batch
from csvfast.measure.fleet import remote, schedule
from csvfast.measure.fleet.remote import provider

MIB = 1 << 20
LARGE = random.Random(5).randbytes(MIB) * 5 + b"the end"
SMALL = {f"images/small/{number}.img": random.Random(number).randbytes(number * 777) for number in range(6)}

pytest.importorskip("s3fs")


def sm3(data: bytes) -> str:
    return hashlib.new("sm3", data).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as one:
        one.put("images")
        one.put("images/large.img", LARGE)
        for name, data in SMALL.items():
            one.put(name, data)
        yield one


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    with Proxy(server.port) as one:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.port}"),
            ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE00"),
            ("AWS_SECRET_ACCESS_KEY", "SECRETKEY"),
            ("AWS_SESSION_TOKEN", "SECRETTOKEN"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_CONFIG_FILE", str(tmp_path / "none")),
            ("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none")),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
        remote._files_of.cache_clear()
        yield one
        remote._files_of.cache_clear()


@pytest.mark.parametrize("mode", ["linear", "tree", "verity"])
def test_objects_are_measured_as_files_are(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(schedule, "RANGE_BYTES", MIB)  # so that the large one is split
    for name, data in {"images/large.img": LARGE, **SMALL}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    there = [(row.name.removeprefix("s3://"), row.digest, row.size, row.error) for row in batch(["s3://images"], mode=mode)]
    local = batch([tmp_path / "images"], mode=mode)
    here = [(row.name.removeprefix(f"{tmp_path}/"), row.digest, row.size, row.error) for row in local]
    assert sorted(there, key=repr) == sorted(here, key=repr)
    assert len(there) == 7


def test_patterns_prefixes_and_what_is_not_there(proxy: Proxy) -> None:
    found = list(provider.expand("s3://images/sm*/[12].img"))
    assert [one.name for one in found] == ["s3://images/small/1.img", "s3://images/small/2.img"]
    names = [f"s3://images/small/{number}.img" for number in range(6)]
    assert [found.name for found in provider.expand("s3://images/small/*.img")] == names
    assert [found.name for found in provider.expand("s3://images/small")] == names
    row, *more = batch(["s3://images/none.img", "s3://nothing/at/all", "s3://images/small/3.img"])
    rows = {one.name: one for one in (row, *more)}
    assert rows["s3://images/none.img"].error == rows["s3://nothing/at/all"].error == "not-found"
    assert rows["s3://images/none.img"].message == "s3://images/none.img: no such object"
    assert rows["s3://images/small/3.img"].digest == sm3(SMALL["images/small/3.img"])


@pytest.mark.parametrize("mode", ["linear", "tree"])
def test_a_reset_in_mid_file_costs_one_range(proxy: Proxy, mode: Any) -> None:
    expected = next(iter(batch(["s3://images/large.img"], mode=mode)))
    before = proxy.passed
    proxy.cut_after, proxy.cuts = 300_000, 3
    row = next(iter(batch(["s3://images/large.img"], mode=mode)))
    assert proxy.resets == 3
    assert (row.digest, row.error) == (expected.digest, None)
    if mode == "linear":
        assert row.digest == sm3(LARGE)
    assert proxy.passed - before < len(LARGE) + 3 * MIB + 100_000  # it went on, and did not begin again


def test_resets_without_an_end_are_one_row(proxy: Proxy) -> None:
    proxy.cut_after, proxy.cuts = 100_000, 1 << 30
    rows = {row.name: row for row in batch(["s3://images/large.img", "s3://images/small/3.img"])}
    assert rows["s3://images/small/3.img"].digest == sm3(SMALL["images/small/3.img"])
    large = rows["s3://images/large.img"]
    assert (large.error, large.digest) == ("connection", None)
    assert large.message is not None
    assert large.message.startswith("s3://images/large.img: the connection failed: ")
    assert proxy.resets >= remote.ATTEMPTS


def test_etags_tell_what_is_to_be_measured_again(proxy: Proxy, server: S3Server, tmp_path: Path) -> None:
    server.put("changing")
    server.put("changing/a", b"a" * 100)
    server.put("changing/b", b"b" * 100)
    ledger = tmp_path / "ledger"

    def run() -> tuple[int, int, dict[str, str | None]]:
        with Job(["s3://changing"], ledger=ledger) as job:
            list(job)
            return job.progress.done, job.progress.kept, {row.name[-1]: row.digest for row in job.table}

    assert run()[:2] == (2, 0)
    assert run()[:2] == (0, 2)
    server.put("changing/a", b"A" * 100)  # the same size
    assert run() == (1, 1, {"a": sm3(b"A" * 100), "b": sm3(b"b" * 100)})


def test_an_object_that_is_replaced_meanwhile(proxy: Proxy, server: S3Server) -> None:
    server.put("replaced")
    server.put("replaced/a", bytes(3 * MIB))
    source = provider.open("s3://replaced/a")
    buffer = bytearray(100)
    source.read_at(memoryview(buffer), 0)
    server.put("replaced/a", b"x" * (3 * MIB))
    with pytest.raises(SourceChangedError, match=r"^s3://replaced/a: changed while it was measured: was .*etag"):
        source.check_unchanged()
    source.close()
    source.close()
    again = provider.open("s3://replaced/a")
    server.put("replaced/a", b"y" * (3 * MIB))
    with pytest.raises(SourceChangedError, match="another version has taken its place"):
        again.read_at(memoryview(buffer), 2 * MIB)
    again.close()


def no_secrets(text: str) -> None:
    assert not re.search("SECRET|AKIA", text)


def test_expired_credentials_are_one_clear_row(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    """As S3 says it: HEAD has no words, and a GET says why."""
    proxy.expired = True
    row = next(iter(batch(["s3://images/large.img"])))
    assert (row.error, row.message) == (
        "credentials",
        "s3://images/large.img: refused: The provided token has expired; expected credentials that are valid there",
    )
    assert main(["measure", "batch", "s3://images/large.img"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[0] == f"csvfast: credentials: {row.message}"
    no_secrets(said)


def test_credentials_that_expire_in_mid_file(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AHEAD_BLOCKS", 1)
    source = provider.open("s3://images/large.img")
    buffer = bytearray(10)
    source.read_at(memoryview(buffer), 0)
    proxy.expired = True
    with pytest.raises(remote.CredentialsError, match="The provided token has expired"):
        source.read_at(memoryview(buffer), 4 * MIB)
    source.close()


def test_keys_that_the_server_refuses(proxy: Proxy, server: S3Server) -> None:
    server.check_credentials(after="0")
    try:
        rows = list(batch(["s3://images", "s3://images/large.img"]))
    finally:
        server.check_credentials(after="inf")
    assert [row.error for row in rows] == ["credentials", "credentials"]
    for row in rows:
        assert row.message is not None
        assert row.message.startswith(f"{row.name}: refused: ")
        no_secrets(row.message)


def test_no_credentials_at_all(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    row = next(iter(batch(["s3://images/large.img"])))
    assert row.error == "credentials"
    assert row.message == (
        "s3://images/large.img: refused: Unable to locate credentials; expected credentials that are valid there"
    )


class Handler(http.server.SimpleHTTPRequestHandler):
    """Ranges, etags, refusals."""

    protocol_version = "HTTP/1.1"
    etag: str | None = '"one"'
    ranges = True
    data = LARGE

    def do_GET(self) -> None:
        if self.path != "/large.img":
            self.send_response({"/private.img": 403, "/broken.img": 503}.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = self.data, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.ranges:
            data, status = self.data[int(asked[1]) : int(asked[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206 and asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(self.data)}")
        if self.etag is not None:
            self.send_header("ETag", self.etag)
        self.end_headers()
        if self.command == "GET":
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        one.daemon_threads = True
        thread = threading.Thread(target=one.serve_forever, args=(0.05,))
        thread.start()
        remote._files_of.cache_clear()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()
        thread.join()


def test_http(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    ledger = tmp_path / "ledger"
    names = ("large.img", "private.img", "broken.img", "missing.img")
    for kept in (0, 1):
        with Job([f"{web}/{name}" for name in names], ledger=ledger) as job:
            list(job)
        assert job.progress.kept == kept
    rows = [(row.name.removeprefix(f"{web}/"), row.digest or row.error) for row in job.table]
    assert rows == [
        ("large.img", sm3(LARGE)),
        ("private.img", "credentials"),
        ("broken.img", "connection"),
        ("missing.img", "not-found"),
    ]
    for etag in ('W/"one"', None):  # they prove nothing
        monkeypatch.setattr(Handler, "etag", etag)
        with Job([f"{web}/large.img"], ledger=ledger) as job:
            list(job)
        assert job.progress.kept == 0


def test_http_without_ranges(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "ranges", False)
    row = next(iter(batch([f"{web}/large.img"])))
    assert (row.error, row.message) == (
        "unreadable",
        f"{web}/large.img: the server gives no ranges; expected one that does",
    )


def test_an_http_connection_that_is_reset(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with Proxy(int(web.rpartition(":")[2])) as proxy:
        proxy.cut_after, proxy.cuts = 400_000, 2
        row = next(iter(batch([f"http://127.0.0.1:{proxy.port}/large.img"], mode="tree")))
        assert (proxy.resets, row.size) == (2, len(LARGE))
        assert row.digest == next(iter(batch([f"{web}/large.img"], mode="tree"))).digest


def test_what_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParameterError, match=r"^https://\.\.\.@host: has a user or a password") as caught:
        provider.open("https://user:SECRET@host/a")
    no_secrets(str(caught.value))
    row = next(iter(batch(["nonsense://a/b"])))
    assert row.error == "option"
    assert row.message is not None
    assert re.fullmatch("nonsense://a/b: nothing opens 'nonsense' URLs; expected .*http, https, .*s3", row.message)
    row = next(iter(batch(["http://127.0.0.1:1/a"])))
    assert row.error == "connection"
    monkeypatch.setattr("csvfast._extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'csvfast\[s3\]'"):
        provider.open("s3://a/b")
