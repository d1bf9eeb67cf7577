"""The registry client against registries that lie, stall, cut off, and lead elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
from image.scripted_server import Request, Script, ScriptedServer, answer, write_certificate

from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, ImageError, IntegrityError, RegistryError
from csvfast.image import registry as module
from csvfast.image.blobs import VerifiedReader, read_blob
from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor, digest_of
from csvfast.image.manifest import MANIFEST_LIMIT, Manifest
from csvfast.image.reference import parse_reference
from csvfast.image.registry import Credentials, RegistryClient

LAYER = "application/vnd.oci.image.layer.v1.tar"
DATA = bytes(range(256)) * 400
BLOB = Descriptor.of(DATA, LAYER)
MANIFEST = Manifest(Descriptor.of(b"{}", CONFIG_TYPE), (BLOB,)).encode()
TYPE = f"Content-Type: {MANIFEST_TYPE}"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)


def client(server: ScriptedServer, **options: Any) -> RegistryClient:
    return RegistryClient(parse_reference(f"docker://{server.address}/team/app"), **{"timeout": 5, "retries": 2, **options})


def refused(script: Script, problem: str, use: str = "blob", **options: Any) -> ScriptedServer:
    """The server, after a RegistryError or an ImageError that says this."""
    with ScriptedServer(script) as server, client(server, **options) as registry:
        asked = (lambda: read_blob(registry, BLOB, 1 << 20)) if use == "blob" else (lambda: registry.resolve("1"))
        with pytest.raises(ImageError, match=problem):
            asked()
    return server


# ---- Manifests


def test_manifests_are_hashed_here() -> None:
    digest = digest_of(MANIFEST)
    given = [TYPE]
    with ScriptedServer(lambda *_: answer(200, MANIFEST, *given)) as server, client(server) as registry:
        assert registry.resolve("1") == (Descriptor(MANIFEST_TYPE, digest, len(MANIFEST)), MANIFEST)
        assert registry.resolve(digest)[0].digest == digest
        long = f"sha512:{hashlib.sha512(MANIFEST).hexdigest()}"
        assert registry.resolve(long)[0].digest == long
        given[0] = "Content-Type: application/json; charset=utf-8"
        assert registry.resolve(None)[0].media_type == MANIFEST_TYPE
        with pytest.raises(IntegrityError, match="do not have the digest sha256:"):
            registry.resolve(digest_of(b"another"))
        given.append(f"Docker-Content-Digest: {digest_of(b'another')}")
        with pytest.raises(IntegrityError, match="do not have the digest sha256:"):
            registry.resolve("1")
        with pytest.raises(ImageError, match="neither a tag nor a digest"):
            registry.resolve("../../other")
    first = server.requests[0]
    assert (first.method, first.target) == ("GET", "/v2/team/app/manifests/1")
    assert MANIFEST_TYPE in first.headers["accept"]
    assert "docker.distribution.manifest.list" in first.headers["accept"]
    assert server.requests[3].target.endswith("/latest")
    assert server.connections == 1  # kept alive


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (answer(200, b" " * (MANIFEST_LIMIT + 1), TYPE), "more than 4194304 bytes"),
        (answer(200, b"", TYPE, "Transfer-Encoding: chunked") + (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 5, "more than 4"),
        (answer(200, b"<html>", "Content-Type: text/html"), "no JSON"),
        (answer(200, b'{"schemaVersion":1,"fsLayers":[]}', "Content-Type: application/json"), "mediaType"),
        (answer(404, b'{"errors":[{"code":"UNKNOWN","message":"gone\\u001b[31m"}]}'), r"404 UNKNOWN: gone\\x1b\[31m"),
        (answer(404, b"<html>"), "status 404$"),
        (answer(404, b'{"errors":[7]}'), "status 404$"),
        (answer(404, b'{"errors":' + b"[" * 100), "status 404$"),
        (answer(404, b"x" * 100000), "status 404$"),
        (answer(418), "status 418"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", "no HTTP answer"),
        (answer(200, b"\x1f\x8b", TYPE, "Content-Encoding: gzip"), "Content-Encoding 'gzip'"),
        (answer(401, b"", 'WWW-Authenticate: Basic realm="x"'), "status 401; no credentials are known"),
        (answer(401), "status 401"),
    ],
)
def test_refused_answers(said: bytes, problem: str) -> None:
    server = refused(lambda *_: said, problem, "manifest")
    assert len(server.requests) == 1


def test_error_attributes() -> None:
    said = answer(403, b'{"errors":[{"code":"DENIED","message":"not you","detail":{"a":1}}]}')
    with ScriptedServer(lambda *_: said) as server, client(server) as registry, pytest.raises(RegistryError) as caught:
        registry.resolve("1")
    assert (caught.value.status, caught.value.code) == (403, "DENIED")
    assert str(caught.value) == f"{server.address}/team/app: manifest 1: status 403 DENIED: not you"


# ---- Blobs


@pytest.mark.parametrize("chunked", [False, True])
def test_blob(chunked: bool) -> None:
    def script(*_: Any) -> bytes:
        if not chunked:
            return answer(200, DATA)
        return answer(200, b"", "Transfer-Encoding: chunked") + b"%x\r\n" % len(DATA) + DATA + b"\r\n0\r\n\r\n"

    with ScriptedServer(script) as server, client(server) as registry:
        for _ in range(2):
            assert read_blob(registry, BLOB, 1 << 20) == DATA
        with registry.open_blob(BLOB) as raw:
            assert raw.read(0) == b""
            assert b"".join(iter(raw.read, b"")) == DATA
        with VerifiedReader(registry.open_blob(BLOB), BLOB) as reader:
            reader.read(10)
        with registry.open_blob(BLOB, len(DATA)) as end:
            assert end.read(5) == b""
        for offset in (-1, len(DATA) + 1):
            with pytest.raises(ArgumentError, match="offset"):
                registry.open_blob(BLOB, offset)
    assert server.connections == 1
    assert "range" not in server.requests[0].headers


def test_empty_blob() -> None:
    empty = Descriptor.of(b"", LAYER)
    with ScriptedServer(lambda *_: answer(200)) as server, client(server) as registry:
        assert read_blob(registry, empty, 1) == b""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (answer(200, DATA + b"x"), f"{len(DATA) + 1} bytes; expected {len(DATA)}"),
        (answer(200, DATA[1:]), f"{len(DATA) - 1} bytes; expected {len(DATA)}"),
        (answer(200, DATA[:-1] + b"x"), "the bytes have the digest"),
        (answer(200, DATA, "Content-Encoding: gzip"), "Content-Encoding"),
        (answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}'), "status 404 BLOB_UNKNOWN"),
        (answer(206, DATA), "another range"),
    ],
)
def test_refused_blobs(said: bytes, problem: str) -> None:
    assert len(refused(lambda *_: said, problem).requests) == 1


def test_more_than_promised() -> None:
    """No length is told, and the body never ends: it is read to the promised size, and one byte further."""

    def endless(_request: Request, connection: socket.socket) -> None:
        connection.sendall(answer(200, b"", "Transfer-Encoding: chunked"))
        with suppress(OSError):
            for _ in range(10000):
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    refused(endless, f"more than {len(DATA)} bytes")


def ranged(request: Request, limit: int) -> bytes:
    """At most so many bytes of an answer that promises the rest."""
    found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "bytes=0-"))
    assert found is not None
    start = int(found[1])
    status = 206 if start else 200
    given = f"Content-Range: bytes {start}-{len(DATA) - 1}/{len(DATA)}"
    head = answer(status, b"", f"Content-Length: {len(DATA) - start}", given)
    return head + DATA[start : start + limit]


def test_goes_on_after_a_cut() -> None:
    def script(request: Request, connection: socket.socket) -> bytes | None:
        connection.sendall(ranged(request, 40000))
        return None

    with ScriptedServer(script) as server, client(server) as registry:
        assert read_blob(registry, BLOB, 1 << 20) == DATA
    assert [request.headers.get("range") for request in server.requests] == [None, "bytes=40000-", "bytes=80000-"]


def test_goes_on_without_ranges() -> None:
    """A server that sends everything each time."""
    lengths = iter([30000, 50000, len(DATA)])

    def script(_request: Request, connection: socket.socket) -> bytes | None:
        connection.sendall(answer(200, b"", f"Content-Length: {len(DATA)}") + DATA[: next(lengths)])
        return None

    with ScriptedServer(script) as server, client(server) as registry:
        assert read_blob(registry, BLOB, 1 << 20) == DATA
    assert len(server.requests) == 3


def test_cuts_end() -> None:
    """Each answer brings a byte: that is no progress."""

    def script(request: Request, connection: socket.socket) -> bytes | None:
        connection.sendall(ranged(request, 1))
        return None

    server = refused(script, rf"cut off at byte 3 of {len(DATA)}: 127.0.0.1:\d+: ")
    assert len(server.requests) == 3


@pytest.mark.parametrize("given", ["bytes 5-102399/102400", "bytes 40000-102399/102401", "bytes */102400", "", "bytes 40000-x/*"])
def test_another_range_than_asked_for(given: str) -> None:
    def script(request: Request, connection: socket.socket) -> bytes | None:
        if "range" in request.headers:
            return answer(206, DATA[40000:], f"Content-Range: {given}")
        connection.sendall(ranged(request, 40000))
        return None

    refused(script, "another range than the one from byte 40000 of 102400")


# ---- Time


def test_silence_ends() -> None:
    def silent(_request: Request, connection: socket.socket) -> None:
        connection.settimeout(5)
        with suppress(OSError):
            connection.recv(1)

    before = time.monotonic()
    refused(silent, "timed out|no answer within", retries=0, timeout=0.2)
    assert time.monotonic() - before < 2


@pytest.mark.parametrize("where", ["surplus", "in front"])
def test_trailers_without_end(where: str) -> None:
    """However fast they come: Python's HTTP client reads them for ever."""

    def endless(_request: Request, connection: socket.socket) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA) if where == "surplus" else b""
        connection.sendall(answer(200, chunk + b"0\r\n", "Transfer-Encoding: chunked"))
        until = time.monotonic() + 5
        with suppress(OSError):
            while time.monotonic() < until:
                connection.sendall(b"X: y\r\n" * 10_000)

    before = time.monotonic()
    if where == "surplus":  # the blob is whole
        with ScriptedServer(endless) as server, client(server, retries=0) as registry:
            assert read_blob(registry, BLOB, 1 << 20) == DATA
    else:
        refused(endless, "chunks or trailers without end", retries=0)
    assert time.monotonic() - before < 4


@pytest.mark.parametrize("where", ["header", "manifest", "blob"])
def test_dripping_ends(where: str) -> None:
    def dripping(_request: Request, connection: socket.socket) -> None:
        start = {
            "header": b"HTTP/1.1 200 OK\r\nX: ", "manifest": answer(200, b"", TYPE, "Content-Length: 1000"),
            "blob": answer(200, b"", f"Content-Length: {len(DATA)}"),
        }[where]  # fmt: skip
        with suppress(OSError):
            connection.sendall(start)
            for _ in range(200):
                connection.sendall(b" ")
                time.sleep(0.02)

    before = time.monotonic()
    use = "blob" if where == "blob" else "manifest"
    refused(dripping, r"bytes in 0.3 seconds|no answer within 0.3|timed out", use, retries=0, timeout=0.3)
    assert time.monotonic() - before < 2


def test_a_slow_reader_is_no_slow_registry() -> None:
    with (
        ScriptedServer(lambda *_: answer(200, DATA)) as server,
        client(server, timeout=0.2) as registry,
        VerifiedReader(registry.open_blob(BLOB), BLOB) as reader,
    ):
        found = reader.read(1000)
        time.sleep(0.4)
        assert found + b"".join(reader) == DATA


# ---- Again


def test_busy_registries_are_asked_again() -> None:
    said = [answer(503), answer(429, b"", "Retry-After: 0"), answer(200, MANIFEST, TYPE)]
    with ScriptedServer(lambda *_: said.pop(0)) as server, client(server) as registry:
        assert registry.resolve("1")[1] == MANIFEST
    assert len(server.requests) == 3


def test_asking_again_ends() -> None:
    assert len(refused(lambda *_: answer(503), "status 503", "manifest").requests) == 3
    assert len(refused(lambda *_: None, "127.0.0.1", "manifest").requests) == 3
    later = answer(429, b"", "Retry-After: 3600")
    assert len(refused(lambda *_: later, "status 429", "manifest").requests) == 1


def test_nobody_there() -> None:
    with ScriptedServer(lambda *_: None) as server:
        address = server.address
    with RegistryClient(parse_reference(f"docker://{address}/a")) as registry, pytest.raises(RegistryError) as caught:
        registry.ping()
    assert str(caught.value) == f"{address}/a: {address}: Connection refused"
    assert caught.value.status == 0


def test_a_kept_connection_that_was_closed() -> None:
    seen: list[Request] = []

    def script(request: Request, connection: socket.socket) -> bytes | None:
        seen.append(request)
        return None if len(seen) == 2 else answer(200, MANIFEST, TYPE)

    with ScriptedServer(script) as server, client(server, retries=0) as registry:
        for _ in range(2):
            assert registry.resolve("1")[1] == MANIFEST
    assert server.connections == 2


# ---- Elsewhere


def test_redirect_to_another_host_without_the_token() -> None:
    def front(request: Request, _connection: socket.socket) -> bytes:
        if "authorization" not in request.headers:
            return answer(401, b"", 'WWW-Authenticate: Basic realm="r"')
        return answer(307, b"", f"Location: http://{store.address}/signed?x=1")

    credentials = Credentials("user", Secret(b"pass"))
    with (
        ScriptedServer(lambda *_: answer(200, DATA)) as store,
        ScriptedServer(front) as server,
        client(server, credentials=credentials) as registry,
    ):
        assert read_blob(registry, BLOB, 1 << 20) == DATA
    (request,) = store.requests
    assert request.target == "/signed?x=1"
    assert "authorization" not in request.headers
    assert server.requests[-1].headers["authorization"] == "Basic dXNlcjpwYXNz"


def test_redirect_on_the_same_host_keeps_the_token() -> None:
    def script(request: Request, _connection: socket.socket) -> bytes:
        if "authorization" not in request.headers:
            return answer(401, b"", 'WWW-Authenticate: Basic realm="r"')
        return answer(200, DATA) if request.target == "/other" else answer(302, b"", "Location: /other")

    credentials = Credentials("user", Secret(b"pass"))
    with ScriptedServer(script) as server, client(server, credentials=credentials) as registry:
        assert read_blob(registry, BLOB, 1 << 20) == DATA
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("/v2/loop", "more than 5 redirects"),
        ("http://192.0.2.1/", "http to 192.0.2.1 is not allowed"),
        ("http://example.com/", "http to example.com is not allowed"),
        ("ftp://127.0.0.1/", "expected a URL of http or https"),
        ("file:///etc/passwd", "expected a URL of http or https"),
        ("http://user:password@127.0.0.1/", "expected a URL of http or https"),
        ("http://127.0.0.1:99999/", "expected a URL of http or https"),
        ("http://127.0.0.1/a b", "expected a URL of http or https"),
        ("http://[::1/", "expected a URL of http or https"),
        ("/" + "x" * 20000, "too long"),
    ],
)
def test_refused_redirects(location: str, problem: str) -> None:
    server = refused(lambda *_: answer(307, b"", f"Location: {location}"), problem)
    assert len(server.requests) <= 6


def test_never_from_https_to_http(tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server_side, client_side = tls_pair
    with ScriptedServer(lambda *_: answer(200, DATA)) as plain:

        def script(_request: Request, _connection: socket.socket) -> bytes:
            return answer(307, b"", f"Location: http://{plain.address}/")

        with tls_server(script, server_side) as server:
            registry = client(server, plain_http=False, tls=client_side)
            with registry, pytest.raises(RegistryError, match="leads from https to http"):
                read_blob(registry, BLOB, 1 << 20)
            assert server.requests
            with client(server, plain_http=False) as strange, pytest.raises(RegistryError, match="certificate: self-signed"):
                strange.ping()
    assert not plain.requests


def tls_server(script: Any, context: ssl.SSLContext) -> ScriptedServer:
    class Secured(ScriptedServer):
        def _serve(self, connection: socket.socket) -> None:
            with connection, suppress(OSError):
                super()._serve(context.wrap_socket(connection, server_side=True))

    return Secured(script)


@pytest.fixture(scope="module")
def tls_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    write_certificate(path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


def test_plain_http_is_for_this_machine() -> None:
    for host, plain, scheme in (
        ("127.0.0.1:5000", None, "http"), ("localhost", None, "http"), ("[::1]:5000", None, "http"), ("r.example", None, "https"),
        ("r.example", True, "http"), ("127.0.0.1:5000", False, "https"), ("localhost.example", None, "https"),
        ("docker.io", None, "https"),
    ):  # fmt: skip
        with RegistryClient(parse_reference(f"docker://{host}/a"), plain_http=plain, credentials=None) as registry:
            assert registry.base.scheme == scheme
    assert registry.base.host == "registry-1.docker.io"
    with pytest.raises(ArgumentError, match="in a registry"):
        RegistryClient(parse_reference("oci:a"))


# ---- Writing


class Receiver:
    """Takes uploads, and lets go of connections when it is told to."""

    def __init__(self, cuts: int = 0, keeps: float = 0.5, **answers: bytes) -> None:
        self.data = bytearray()
        self.cuts, self.keeps, self.answers = cuts, keeps, answers
        self.digest = ""

    def __call__(self, request: Request, _connection: socket.socket) -> bytes | None:
        if request.method in self.answers:
            return self.answers[request.method]
        state = (f"Range: 0-{max(len(self.data) - 1, 0)}", f"Location: /v2/team/app/blobs/uploads/1?state={len(self.data)}")
        if request.method == "HEAD":
            return answer(200, b"", f"Content-Length: {len(self.data)}") if self.digest else answer(404)
        if request.method == "POST":
            return answer(202, b"", state[1])
        if request.method == "GET":
            return answer(204, b"", *state)
        if request.method == "PATCH":
            if self.cuts:
                self.cuts -= 1
                self.data += request.body[: int(len(request.body) * self.keeps)]
                return None
            self.data += request.body
            state = (f"Range: 0-{len(self.data) - 1}", f"Location: /v2/team/app/blobs/uploads/1?state={len(self.data)}")
            return answer(202, b"", *state)
        if request.method == "PUT":
            assert f"state={len(self.data)}&digest=" in request.target
            self.digest = request.target.rpartition("digest=")[2].replace("%3A", ":")
            return answer(201)
        return answer(204)


@pytest.mark.parametrize(("cuts", "keeps"), [(0, 0), (1, 0.0), (1, 0.5), (2, 0.3), (1, 1.0)])
def test_uploads_go_on_after_a_cut(cuts: int, keeps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csvfast.image.registry_upload.PIECE_BYTES", 30000)
    receiver = Receiver(cuts, keeps)
    with ScriptedServer(receiver) as server, client(server) as registry:
        assert registry.put_blob(BLOB, [DATA[:5], DATA[5:]]) == BLOB
    assert bytes(receiver.data) == DATA
    assert receiver.digest == BLOB.digest
    assert "DELETE" not in [request.method for request in server.requests]


@pytest.mark.parametrize(
    ("receiver", "problem"),
    [
        (Receiver(99, 0.0), "no HTTP answer|127.0.0.1:|takes no bytes"),
        (Receiver(POST=answer(202)), "no Location"),
        (Receiver(POST=answer(403, b'{"errors":[{"code":"DENIED"}]}')), "status 403 DENIED"),
        (Receiver(POST=answer(202, b"", "Location: http://192.0.2.1/")), "http to 192.0.2.1 is not allowed"),
        (Receiver(PATCH=answer(400)), "status 400"),
        (Receiver(PATCH=answer(202, b"", "Range: 0-999999999")), "1000000000 bytes are there; expected"),
        (Receiver(PATCH=answer(202, b"", "Range: 7-9")), "range '7-9'; expected 0-N"),
        (Receiver(PATCH=answer(202, b"", "Range: 0-0")), "takes no bytes"),
        (Receiver(PUT=answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')), "status 400 DIGEST_INVALID"),
    ],
)
def test_refused_uploads(receiver: Receiver, problem: str) -> None:
    with ScriptedServer(receiver) as server, client(server) as registry, pytest.raises(RegistryError, match=problem):
        registry.put_blob(BLOB, [DATA])
    assert len(server.requests) < 15


def test_uploads_of_other_bytes_are_given_up() -> None:
    for chunks, problem in (([b"x"], "1 bytes; expected"), ([DATA, b"x"], "more than"), ([DATA[:-1] + b"x"], "have the digest")):
        receiver = Receiver()
        with ScriptedServer(receiver) as server, client(server) as registry, pytest.raises(ImageError, match=problem):
            registry.put_blob(BLOB, chunks)
        assert not receiver.digest
        assert server.requests[-1].method == "DELETE"


def test_a_finished_upload_whose_answer_is_lost() -> None:
    class Silent(Receiver):
        def __call__(self, request: Request, connection: socket.socket) -> bytes | None:
            said = super().__call__(request, connection)
            return None if request.method == "PUT" else said

    with ScriptedServer(Silent()) as server, client(server) as registry:
        assert registry.put_blob(BLOB, [DATA]) == BLOB
    assert server.requests[-1].method == "HEAD"


def test_a_manifest_that_is_stored_as_another() -> None:
    said = answer(201, b"", f"Docker-Content-Digest: {digest_of(b'other')}")
    with ScriptedServer(lambda *_: said) as server, client(server) as registry, pytest.raises(IntegrityError, match="stored as"):
        registry.put_manifest(MANIFEST, MANIFEST_TYPE, "1")


def test_pages_of_tags() -> None:
    def script(request: Request, _connection: socket.socket) -> bytes:
        number = int((re.search(r"last=(\d+)", request.target) or ["", "0"])[1])
        body = json.dumps({"name": "team/app", "tags": [f"t{number}"]}).encode()
        if number == last:
            return answer(200, body)
        return answer(200, body, f'Link: </v2/team/app/tags/list?last={number + 1}>; rel="next"')

    last = 2
    with ScriptedServer(script) as server, client(server) as registry:
        assert registry.tags() == ["t0", "t1", "t2"]
        last = 1000
        with pytest.raises(RegistryError, match="more than 100 pages"):
            registry.tags()


def test_what_a_guest_needs() -> None:
    """Everything that reads images works with the standard library and the core dependencies that a guest has."""
    absent = ("numpy", "typer", "rich", "starlette", "uvicorn", "grpc", "sqlalchemy", "joserfc", "rfc8785")
    program = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
from csvfast.image import blobs, copy, layout, registry
from csvfast.image.reference import parse_reference
with registry.open_source(parse_reference("docker://127.0.0.1:1/a"), retries=0) as source:
    try:
        blobs.resolve_manifest(source, "1")
    except registry.RegistryError as error:
        print(error)
from csvfast.image.manifest import Manifest
try:
    Manifest.parse(b"{{}}")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [
        "127.0.0.1:1/a: 127.0.0.1:1: Connection refused", "manifest: schemaVersion None; expected 2",
    ]  # fmt: skip
