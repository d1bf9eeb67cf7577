"""The registry in this process: the distribution API as its specification has it, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from image.small_images import LAYER, put_image, put_index

from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, ImageError, RegistryError
from csvfast.image import layout as layout_module
from csvfast.image import server_uploads
from csvfast.image.blobs import read_blob, resolve_manifest
from csvfast.image.copy import copy_image
from csvfast.image.descriptor import MANIFEST_TYPE, Descriptor, digest_of
from csvfast.image.layout import OciLayout
from csvfast.image.reference import parse_reference
from csvfast.image.registry import Credentials, RegistryClient
from csvfast.image.server import EmbeddedRegistry

DATA = bytes(range(256)) * 5000
BLOB = Descriptor.of(DATA, LAYER)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[EmbeddedRegistry]:
    with EmbeddedRegistry(tmp_path / "registry") as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRegistry]:
    """One for all tests that change nothing."""
    with EmbeddedRegistry(tmp_path_factory.mktemp("shared")) as started:
        started.layout.put_blob(BLOB, [DATA])
        yield started


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def code(self) -> str:
        (error,) = json.loads(self.body)["errors"]
        assert set(error) == {"code", "message", "detail"}
        return str(error["code"])


def ask(registry: EmbeddedRegistry, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def client(registry: EmbeddedRegistry, name: str = "team/app", **options: Any) -> RegistryClient:
    return RegistryClient(parse_reference(f"docker://{registry.address}/{name}"), **{"timeout": 10, "retries": 0, **options})


def files(registry: EmbeddedRegistry) -> list[str]:
    return sorted(str(path.relative_to(registry.layout.path)) for path in registry.layout.path.rglob("*") if path.is_file())


# ---- With our client


def test_a_registry_that_is_full(registry: EmbeddedRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "INDEX_LIMIT", 2)
    manifest = put_image(registry.layout, "team/app:1", DATA)
    with client(registry) as there:
        there.put_manifest(manifest.encode(), MANIFEST_TYPE, "2")
        with pytest.raises(RegistryError, match="status 403 DENIED: 3 images"):
            there.put_manifest(manifest.encode(), MANIFEST_TYPE, "3")
        assert there.tags() == ["1", "2"]


def test_images_come_back(registry: EmbeddedRegistry, tmp_path: Path) -> None:
    local, back = OciLayout(tmp_path / "local", create=True), OciLayout(tmp_path / "back", create=True)
    put_image(local, "1", DATA, b"")
    index = put_index(local, "multi")
    with client(registry) as remote:
        copy_image(local, remote, wanted="1", tag="1")
        made = copy_image(local, remote, wanted="multi", tag="all", platform="all")
        assert made.digest == index.descriptor().digest
        assert remote.tags() == ["1", "all"]
        assert resolve_manifest(remote, "all", architecture="arm64")[0] == index.manifests[1]
        copy_image(remote, back, wanted="1", tag="1")
        copy_image(remote, back, wanted="all", tag="multi", platform="all")
        with client(registry, "other") as other:
            copy_image(remote, other, wanted="1", tag="x")
    for tag in ("1", "multi"):
        assert back.resolve(tag)[1] == local.resolve(tag)[1]
    assert read_blob(back, BLOB, 1 << 30) == DATA
    # It is a layout all the while.
    assert set(registry.layout.tags()) == {"team/app:1", "team/app:all", "other:x"}
    assert json.loads(ask(registry, "GET", "/v2/_catalog").body) == {"repositories": ["other", "team/app"]}


def test_a_layout_of_other_tools(tmp_path: Path) -> None:
    """Its tags have no names: they are offered as `image`, and nothing is written."""
    manifest = put_image(OciLayout(tmp_path, create=True), "1", DATA)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with EmbeddedRegistry(tmp_path, read_only=True) as registry, client(registry, "image") as remote:
        assert resolve_manifest(remote, "1")[1] == manifest
        assert read_blob(remote, BLOB, 1 << 30) == DATA
        with remote.open_blob(BLOB, 5) as reader:
            assert reader.read(5) == DATA[5:10]
        with pytest.raises(RegistryError, match="405 UNSUPPORTED: this registry is read-only"):
            remote.put_blob(BLOB, [DATA])
        with pytest.raises(RegistryError, match="read-only"):
            remote.put_manifest(manifest.encode(), MANIFEST_TYPE, "2")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(ImageError, match="expected an OCI layout"):
        EmbeddedRegistry(tmp_path / "missing", read_only=True)


def test_token(tmp_path: Path) -> None:
    with EmbeddedRegistry(tmp_path, token=Secret(b"the token")) as registry:
        with client(registry) as remote, pytest.raises(RegistryError, match=r"401 UNAUTHORIZED.*no credentials") as caught:
            remote.ping()
        assert caught.value.status == 401
        for password, fits in ((b"the token", True), (b"the tokem", False), (b"the toke", False)):
            with client(registry, credentials=Credentials("anybody", Secret(password))) as remote:
                if fits:
                    remote.ping()
                    put_image(remote, "1", b"layer")
                    continue
                with pytest.raises(RegistryError, match="401 UNAUTHORIZED"):
                    remote.ping()
        assert ask(registry, "GET", "/v2/", Authorization="Bearer the token").status == 200
        for wrong in ("Bearer x", "Basic !", "Basic " + base64.b64encode(b"the token").decode(), "the token", "Bearer"):
            assert ask(registry, "GET", "/v2/", Authorization=wrong).code == "UNAUTHORIZED"
        assert ask(registry, "PUT", "/v2/a/manifests/1", b"x").code == "UNAUTHORIZED"


def test_many_at_once(registry: EmbeddedRegistry) -> None:
    failures: list[Exception] = []

    def push(number: int) -> None:
        try:
            with client(registry, f"team/app{number % 3}") as remote:
                put_image(remote, f"t{number}", DATA, b"%d" % number)
                assert read_blob(remote, BLOB, 1 << 30) == DATA
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert len(registry.layout.tags()) == 9


# ---- The specification


def test_version(shared: EmbeddedRegistry) -> None:
    for method in ("GET", "HEAD"):
        reply = ask(shared, method, "/v2/")
        assert (reply.status, reply.headers["Docker-Distribution-API-Version"]) == (200, "registry/2.0")


def test_upload_in_one_and_in_pieces(registry: EmbeddedRegistry) -> None:
    digest = digest_of(b"hello world")
    reply = ask(registry, "POST", "/v2/a/b/blobs/uploads/")
    assert reply.status == 202
    place = reply.headers["Location"]
    assert place == f"/v2/a/b/blobs/uploads/{reply.headers['Docker-Upload-UUID']}"
    reply = ask(registry, "PATCH", place, b"hello", Content_Range="0-4")
    assert (reply.status, reply.headers["Range"]) == (202, "0-4")
    reply = ask(registry, "PATCH", place, b"hello", Content_Range="0-4")
    assert (reply.status, reply.headers["Range"], reply.headers["Location"]) == (416, "0-4", place)
    assert ask(registry, "GET", place).headers["Range"] == "0-4"
    assert files(registry) == ["index.json", "oci-layout"]  # nobody sees half a blob
    reply = ask(registry, "PUT", f"{place}?digest={digest}", b" world")
    assert (reply.status, reply.headers["Location"]) == (201, f"/v2/a/b/blobs/{digest}")
    assert ask(registry, "GET", place).code == "BLOB_UPLOAD_UNKNOWN"
    reply = ask(registry, "GET", f"/v2/a/b/blobs/{digest}")
    assert (reply.status, reply.body, reply.headers["Docker-Content-Digest"]) == (200, b"hello world", digest)
    long = f"sha512:{hashlib.sha512(b'more').hexdigest()}"
    assert ask(registry, "POST", f"/v2/a/b/blobs/uploads/?digest={long}", b"more").status == 201
    reply = ask(registry, "HEAD", f"/v2/other/blobs/{long}")
    assert (reply.status, reply.headers["Content-Length"], reply.body) == (200, "4", b"")
    assert ask(registry, "POST", f"/v2/c/blobs/uploads/?mount={digest}&from=a/b").status == 201
    assert ask(registry, "POST", f"/v2/c/blobs/uploads/?mount={digest_of(b'')}&from=a/b").status == 202


def test_cancelled_upload(registry: EmbeddedRegistry) -> None:
    place = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    assert ask(registry, "PATCH", place, DATA).status == 202
    assert ask(registry, "DELETE", place).status == 204
    assert ask(registry, "DELETE", place).code == "BLOB_UPLOAD_UNKNOWN"
    assert files(registry) == ["index.json", "oci-layout"]


@pytest.mark.parametrize(
    ("asked", "status", "body", "given"),
    [
        ("bytes=0-", 206, DATA, f"bytes 0-{len(DATA) - 1}/{len(DATA)}"),
        ("bytes=7-9", 206, DATA[7:10], f"bytes 7-9/{len(DATA)}"),
        (f"bytes={len(DATA) - 1}-", 206, DATA[-1:], f"bytes {len(DATA) - 1}-{len(DATA) - 1}/{len(DATA)}"),
        ("bytes=5-99999999", 206, DATA[5:], f"bytes 5-{len(DATA) - 1}/{len(DATA)}"),
        (f"bytes={len(DATA)}-", 416, None, f"bytes */{len(DATA)}"),
        ("bytes=9-7", 416, None, f"bytes */{len(DATA)}"),
        ("bytes=1-2,5-6", 200, DATA, None),
        ("bytes=-5", 200, DATA, None),
        ("lines=1-", 200, DATA, None),
    ],
)
def test_ranges(shared: EmbeddedRegistry, asked: str, status: int, body: bytes | None, given: str | None) -> None:
    reply = ask(shared, "GET", f"/v2/a/blobs/{BLOB.digest}", Range=asked)
    assert (reply.status, reply.headers["Content-Range"]) == (status, given)
    assert body is None or reply.body == body


def test_manifests(registry: EmbeddedRegistry) -> None:
    with client(registry) as remote:
        manifest = put_image(remote, "1", b"layer")
    descriptor = manifest.descriptor()
    for wanted in ("1", descriptor.digest):
        for method in ("GET", "HEAD"):
            reply = ask(registry, method, f"/v2/team/app/manifests/{wanted}")
            assert (reply.status, reply.headers["Content-Type"]) == (200, MANIFEST_TYPE)
            assert (reply.headers["Docker-Content-Digest"], reply.headers["Content-Length"]) == (
                descriptor.digest, str(descriptor.size),
            )  # fmt: skip
            assert reply.body == (manifest.encode() if method == "GET" else b"")
    assert ask(registry, "GET", "/v2/other/manifests/1").code == "MANIFEST_UNKNOWN"
    assert ask(registry, "GET", f"/v2/team/app/manifests/{manifest.layers[0].digest}").code == "MANIFEST_UNKNOWN"
    assert ask(registry, "DELETE", "/v2/team/app/manifests/1").status == 202
    assert ask(registry, "DELETE", "/v2/team/app/manifests/1").code == "MANIFEST_UNKNOWN"
    assert ask(registry, "GET", "/v2/team/app/tags/list").code == "NAME_UNKNOWN"


def test_refused_manifests(registry: EmbeddedRegistry) -> None:
    with client(registry) as remote:
        data = put_image(remote, "1", b"layer").encode()
    missing = json.loads(data)
    missing["layers"][0]["digest"] = digest_of(b"missing")
    other_size = json.loads(data)
    other_size["layers"][0]["size"] += 1
    for body, kind, wanted, code in (
        (b"{}", MANIFEST_TYPE, "2", "MANIFEST_INVALID"),
        (data, "text/plain", "2", "MANIFEST_INVALID"),
        (data, "application/vnd.oci.image.index.v1+json", "2", "MANIFEST_INVALID"),
        (data, MANIFEST_TYPE, digest_of(b"another"), "DIGEST_INVALID"),
        (data, MANIFEST_TYPE, ".bad", "MANIFEST_INVALID"),
        (json.dumps(missing).encode(), MANIFEST_TYPE, "2", "MANIFEST_BLOB_UNKNOWN"),
        (json.dumps(other_size).encode(), MANIFEST_TYPE, "2", "MANIFEST_BLOB_UNKNOWN"),
        (data + b" " * (4 << 20), MANIFEST_TYPE, "2", "SIZE_INVALID"),
    ):
        reply = ask(registry, "PUT", f"/v2/team/app/manifests/{wanted}", body, Content_Type=kind)
        assert (reply.status // 100, reply.code) == (4, code)
    assert list(registry.layout.tags()) == ["team/app:1"]


def test_tags_in_pages(registry: EmbeddedRegistry) -> None:
    for tag in ("b", "a", "c"):
        put_image(registry.layout, f"app:{tag}", b"layer")
    reply = ask(registry, "GET", "/v2/app/tags/list?n=2")
    assert json.loads(reply.body) == {"name": "app", "tags": ["a", "b"]}
    assert reply.headers["Link"] == '</v2/app/tags/list?n=2&last=b>; rel="next"'
    reply = ask(registry, "GET", "/v2/app/tags/list?n=2&last=b")
    assert (json.loads(reply.body)["tags"], reply.headers["Link"]) == (["c"], None)


# ---- What is refused


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "UNSUPPORTED"),
        ("GET", "/v2/a", 404, "UNSUPPORTED"),
        ("GET", "/v2/A/manifests/1", 400, "NAME_INVALID"),
        ("GET", "/v2/a/../../etc/manifests/1", 400, "NAME_INVALID"),
        ("GET", "/v2/a%2F..%2Fb/manifests/1", 400, "NAME_INVALID"),
        ("GET", "/v2/" + "a" * 300 + "/manifests/1", 400, "NAME_INVALID"),
        ("GET", "/v2/a/manifests/" + "x" * 200, 400, "MANIFEST_INVALID"),
        ("GET", "/v2/a/blobs/sha256:..%2F..%2Findex.json", 404, "UNSUPPORTED"),
        ("GET", "/v2/a/blobs/..", 400, "DIGEST_INVALID"),
        ("GET", "/v2/a/blobs/index.json", 400, "DIGEST_INVALID"),
        ("GET", f"/v2/a/blobs/{digest_of(b'missing')}", 404, "BLOB_UNKNOWN"),
        ("GET", f"/v2/a/blobs/sha512:{'0' * 128}", 404, "BLOB_UNKNOWN"),
        ("DELETE", f"/v2/a/blobs/{BLOB.digest}", 405, "UNSUPPORTED"),
        ("PATCH", "/v2/a/manifests/1", 405, "UNSUPPORTED"),
        ("PUT", "/v2/a/blobs/uploads/nobody?digest=x", 400, "DIGEST_INVALID"),
        ("PUT", f"/v2/a/blobs/uploads/nobody?digest={BLOB.digest}", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PATCH", "/v2/a/blobs/uploads/nobody", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("GET", "/v2/a/tags/other", 404, "UNSUPPORTED"),
    ],
)
def test_refused(shared: EmbeddedRegistry, method: str, path: str, status: int, code: str) -> None:
    reply = ask(shared, method, path, b"" if method in ("PUT", "PATCH") else None)
    assert (reply.status, reply.code) == (status, code)


def test_wrong_digest_leaves_nothing(registry: EmbeddedRegistry) -> None:
    place = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    assert ask(registry, "PUT", f"{place}?digest={BLOB.digest}", b"x" + DATA[1:]).code == "DIGEST_INVALID"
    assert ask(registry, "GET", place).code == "BLOB_UPLOAD_UNKNOWN"
    assert files(registry) == ["index.json", "oci-layout"]


def test_too_many_uploads(registry: EmbeddedRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_uploads, "UPLOAD_LIMIT", 2)
    first = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    ask(registry, "POST", "/v2/a/blobs/uploads/")
    assert ask(registry, "POST", "/v2/a/blobs/uploads/").code == "TOOMANYREQUESTS"
    monkeypatch.setattr(server_uploads, "IDLE_SECONDS", 0.0)
    assert ask(registry, "POST", "/v2/a/blobs/uploads/").status == 202  # idle ones made room
    assert ask(registry, "GET", first).code == "BLOB_UPLOAD_UNKNOWN"


def test_uploads_at_once_that_fail_take_no_place(registry: EmbeddedRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_uploads, "UPLOAD_LIMIT", 1)
    for digest in ("x", BLOB.digest):
        assert ask(registry, "POST", f"/v2/a/blobs/uploads/?digest={digest}", b"x").code == "DIGEST_INVALID"
    with socket.create_connection((registry.host, registry.port)) as connection:
        target = f"/v2/a/blobs/uploads/?digest={BLOB.digest}"
        connection.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:1000])
    until = time.monotonic() + 10
    while (status := ask(registry, "POST", "/v2/a/blobs/uploads/").status) != 202 and time.monotonic() < until:
        time.sleep(0.02)
    assert status == 202


def test_a_client_that_leaves(registry: EmbeddedRegistry) -> None:
    """What arrived stays, and the client goes on from there."""
    place = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    with socket.create_connection((registry.host, registry.port)) as connection:
        head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n".encode()
        connection.sendall(head + DATA[:1000])
    until = time.monotonic() + 10
    while (at := ask(registry, "GET", place).headers["Range"]) != "0-999":
        assert time.monotonic() < until, at
        time.sleep(0.01)
    assert ask(registry, "PUT", f"{place}?digest={BLOB.digest}", DATA[1000:]).status == 201


def test_no_room(registry: EmbeddedRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    place = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    monkeypatch.setattr(server_uploads.NewFile, "write", full)
    reply = ask(registry, "PATCH", place, DATA)
    assert (reply.status, reply.code) == (507, "UNKNOWN")
    assert ask(registry, "GET", place).code == "BLOB_UPLOAD_UNKNOWN"


def test_a_damaged_layout(registry: EmbeddedRegistry, caplog: pytest.LogCaptureFixture) -> None:
    (registry.layout.path / "index.json").write_text("{")
    reply = ask(registry, "GET", "/v2/a/tags/list")
    assert (reply.status, reply.code) == (500, "UNKNOWN")
    assert "the layout is damaged" in caplog.text


def test_start_and_stop(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(ArgumentError, match="expected a loopback address"):
            EmbeddedRegistry(tmp_path, host)
    registry = EmbeddedRegistry(tmp_path)
    registry.start()
    with pytest.raises(ArgumentError, match="running already"):
        registry.start()
    with pytest.raises(OSError, match="in use"), EmbeddedRegistry(tmp_path, port=registry.port):
        pass
    idle = socket.create_connection((registry.host, registry.port))  # nobody who waits keeps it from ending
    place = ask(registry, "POST", "/v2/a/blobs/uploads/").headers["Location"]
    ask(registry, "PATCH", place, DATA)
    before = time.monotonic()
    registry.stop()
    registry.stop()
    assert time.monotonic() - before < 4
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        ask(registry, "GET", "/v2/")
    assert files(registry) == ["index.json", "oci-layout"]
    with suppress(OSError), EmbeddedRegistry(tmp_path, "::1") as six, client(six) as remote:  # a machine may have no IPv6
        assert six.address.startswith("[::1]:")
        remote.ping()


def test_killed_while_it_is_sent_something(tmp_path: Path) -> None:
    """kill -9 leaves no half blob, and the next one serves what was complete. SIGTERM ends it in order."""
    command = [sys.executable, "-m", "csvfast", "image", "serve", str(tmp_path / "layout"), "--port", "0", "--json"]
    for last in (False, True):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            shown = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")
            with RegistryClient(parse_reference(f"docker://{shown['address']}/app"), timeout=10) as remote:
                if last:
                    assert read_blob(remote, BLOB, 1 << 30) == DATA
                    server.terminate()
                else:
                    remote.put_blob(BLOB, [DATA])
                    host, _, port = shown["address"].partition(":")
                    connection = http.client.HTTPConnection(host, int(port), timeout=10)
                    connection.request("POST", "/v2/app/blobs/uploads/", b"")
                    place = connection.getresponse().headers["Location"]
                    connection.putrequest("PATCH", place)
                    connection.putheader("Content-Length", str(8 << 20))
                    connection.endheaders(bytes(4 << 20))
                    server.kill()
                    connection.close()
        assert server.returncode == (0 if last else -signal.SIGKILL)
    there = [path.relative_to(tmp_path / "layout") for path in (tmp_path / "layout").rglob("*") if path.is_file()]
    assert sorted(map(str, there)) == [f"blobs/sha256/{BLOB.digest[7:]}", "index.json", "oci-layout"]
