"""The key-server client against a local HTTPS server that behaves and misbehaves."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from csvfast.certs import CaCertificate, CertificateStore, KeyServerClient, KeyServerError, ManufacturingLine
from csvfast.certs.factory import altered
from csvfast.errors import ArgumentError, CsvfastError, FormatError, VerificationError

SHORT = 0.6  # seconds of patience in the tests of slow servers


@pytest.fixture(scope="module")
def line() -> ManufacturingLine:
    return ManufacturingLine.create()


def make_certificate(
    name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key if issuer is None else issuer[1], hashes.SHA256()), key


class Server(ThreadingHTTPServer):
    """Answers by chip id: GOOD..., and one name for each way to misbehave."""

    daemon_threads = True
    line: ManufacturingLine
    requests: Counter[str]
    stop: threading.Event

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        chip = parse_qs(url.query).get("snumber", [""])[0]
        self.server.requests[chip or url.path] += 1
        line = self.server.line
        good = line.hsk.encoded + line.make_chip("SIM1").cek.encoded
        if chip.startswith("GOOD"):
            time.sleep(0.15)  # so that many waiters meet
            self.answer(good)
        elif chip == "SHORT":
            self.answer(good[:-1])
        elif chip == "LONG":
            self.answer(good + b"\0")
        elif chip == "ENDLESS":
            self.answer(bytes(50_000_000))
        elif chip == "LIES":
            self.answer(good[:100], declared=2916)
        elif chip == "EMPTY":
            self.answer(b"")
        elif chip == "GARBAGE":
            self.answer(bytes(2916))
        elif chip == "TURNED":
            self.answer(good[832:] + good[:832])
        elif chip == "STRANGER":
            other = ManufacturingLine.create()
            self.answer(other.hsk.encoded + other.make_chip("SIM1").cek.encoded)
        elif chip == "FORGED":
            self.answer(line.hsk.encoded + altered(good[832:], issuer_id=bytes(16)))
        elif chip == "MOVED":
            self.send_response(302)
            self.send_header("Location", f"/hsk_cek?snumber=GOOD{time.time_ns()}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif chip == "NOTHTTP":
            self.wfile.write(b"220 smtp.example ready\r\n")
        elif chip == "HANG":
            self.server.stop.wait(10)
        elif chip == "DRIP":
            self.send_response(200)
            self.send_header("Content-Length", "2916")
            self.end_headers()
            self.drip(good)
        elif chip == "DRIPHEADERS":
            self.drip(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000)
        elif url.path == "/hrk" or url.path == "/sub/hrk":
            self.answer(line.root.encoded)
        elif url.path == "/stranger/hrk":
            self.answer(ManufacturingLine.create().root.encoded)
        elif url.path == "/garbage/hrk":
            self.answer(altered(line.root.encoded, uid_len=300))
        else:
            self.send_error(404)

    def answer(self, content: bytes, declared: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if declared is None else declared))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def drip(self, content: bytes) -> None:
        for byte in content:
            if self.server.stop.wait(0.05):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PEM of an authority, and of a server certificate with its key."""
    folder = tmp_path_factory.mktemp("tls")
    root = make_certificate("csvfast test authority", None)
    certificate, key = make_certificate("localhost", root)
    (folder / "authority.pem").write_bytes(root[0].public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "authority.pem", folder / "server.pem"


@pytest.fixture
def server(line: ManufacturingLine, authority: tuple[Path, Path]) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority[1])
    server = Server(("127.0.0.1", 0), Handler)
    server.line, server.requests, server.stop = line, Counter(), threading.Event()
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def context(authority: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority[0]))


@pytest.fixture
def client(server: Server, context: ssl.SSLContext, line: ManufacturingLine) -> KeyServerClient:
    return KeyServerClient(f"https://localhost:{server.server_port}", 60, roots=[line.root], context=context)


def test_certificates_arrive_verified(client: KeyServerClient, line: ManufacturingLine, server: Server) -> None:
    hsk, cek = client.hsk_cek("GOOD1")
    assert hsk == line.hsk
    assert cek.issuer_id == hsk.key_id
    assert client.hrk() == line.root
    assert server.requests == {"GOOD1": 1, "/hrk": 1}


@pytest.mark.parametrize(
    ("chip_id", "words"),
    [
        ("UNKNOWN", "answered 404"),
        ("SHORT", "2915 bytes; expected 2916"),
        ("LONG", "more than 2916 bytes"),
        ("ENDLESS", "more than 2916 bytes"),
        ("LIES", "100 bytes"),
        ("EMPTY", "0 bytes"),
        ("GARBAGE", "answered no certificates"),
        ("MOVED", "answered 302 .redirects are not followed."),
        ("NOTHTTP", "220 smtp"),
    ],
)
def test_wrong_answers(client: KeyServerClient, server: Server, chip_id: str, words: str) -> None:
    with pytest.raises(KeyServerError, match=words) as caught:
        client.hsk_cek(chip_id)
    assert str(caught.value).isprintable()
    assert f"snumber={chip_id}" in str(caught.value)
    assert sum(server.requests.values()) == 1


@pytest.mark.parametrize(("chip_id", "step"), [("STRANGER", "HSK"), ("FORGED", "CEK")])
def test_certificates_that_are_not_genuine(client: KeyServerClient, tmp_path: Path, chip_id: str, step: str) -> None:
    store = CertificateStore([], cache=tmp_path / "cache", client=client)
    with pytest.raises(VerificationError) as caught:
        store.find(chip_id)
    assert caught.value.step == step
    assert list(tmp_path.iterdir()) == []


def test_certificates_in_the_other_order(client: KeyServerClient, line: ManufacturingLine) -> None:
    assert client.hsk_cek("TURNED")[0] == line.hsk  # recognised by content


def test_simulated_certificates_are_refused_by_default(server: Server, context: ssl.SSLContext) -> None:
    client = KeyServerClient(f"https://localhost:{server.server_port}", 5, context=context)
    with pytest.raises(VerificationError, match="not a trusted root"):
        client.hsk_cek("GOOD1")
    with pytest.raises(VerificationError, match="not trusted"):
        client.hrk()


def test_roots(server: Server, context: ssl.SSLContext, line: ManufacturingLine) -> None:
    base = f"https://localhost:{server.server_port}"
    assert KeyServerClient(f"{base}/sub/", 5, roots=[line.root], context=context).hrk() == line.root
    with pytest.raises(VerificationError, match="not trusted"):
        KeyServerClient(f"{base}/stranger", 5, roots=[line.root], context=context).hrk()
    with pytest.raises(KeyServerError, match="no certificate"):
        KeyServerClient(f"{base}/garbage", 5, roots=[line.root], context=context).hrk()


@pytest.mark.parametrize("chip_id", ["HANG", "DRIP", "DRIPHEADERS"])
def test_slow_servers_meet_a_deadline(
    server: Server, context: ssl.SSLContext, line: ManufacturingLine, chip_id: str
) -> None:
    client = KeyServerClient(f"https://localhost:{server.server_port}", SHORT, roots=[line.root], context=context)
    start = time.monotonic()
    with pytest.raises(KeyServerError, match=r"no answer within 0\.6 seconds"):
        client.hsk_cek(chip_id)
    assert time.monotonic() - start < 5


def test_server_that_never_shakes_hands(context: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = KeyServerClient(f"https://127.0.0.1:{silent.getsockname()[1]}", SHORT, context=context)
        start = time.monotonic()
        with pytest.raises(KeyServerError, match="no answer within"):
            client.hsk_cek("GOOD")
        assert time.monotonic() - start < 5


def test_unreachable_server(context: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(KeyServerError, match="refused"):
        KeyServerClient(f"https://127.0.0.1:{port}", 5, context=context).hsk_cek("GOOD")


def test_tls_of_an_unknown_authority(server: Server) -> None:
    with pytest.raises(KeyServerError, match="TLS certificate is not trusted"):
        KeyServerClient(f"https://localhost:{server.server_port}", 5).hsk_cek("GOOD")
    assert not server.requests


def test_tls_of_another_name(server: Server, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.server_port))
    ])  # fmt: skip
    with pytest.raises(KeyServerError, match=r"TLS certificate is not trusted.*cert\.hygon\.example"):
        KeyServerClient("https://cert.hygon.example", 5, context=context).hsk_cek("GOOD")
    assert not server.requests


@pytest.mark.parametrize("chip_id", ["", "../x", "a&b=c", "a\r\nHost: b", "é", "a" * 65])
def test_hostile_chip_ids_never_reach_the_network(client: KeyServerClient, server: Server, chip_id: str) -> None:
    with pytest.raises(FormatError, match="chip id"):
        client.hsk_cek(chip_id)
    assert not server.requests


def test_fifty_threads_make_one_request(client: KeyServerClient, server: Server, tmp_path: Path) -> None:
    store = CertificateStore([], cache=tmp_path, client=client)
    gate = threading.Barrier(50)
    found: list[object] = []

    def ask() -> None:
        gate.wait()
        found.append(store.find("GOOD7"))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 50
    assert len(set(found)) == 1
    assert server.requests == {"GOOD7": 1}
    assert store.find("GOOD7") == found[0]  # from the cache
    assert server.requests == {"GOOD7": 1}


def test_waiters_share_a_failure_and_the_next_one_asks_again(client: KeyServerClient, server: Server) -> None:
    gate = threading.Barrier(8)
    errors: list[BaseException] = []

    def ask() -> None:
        gate.wait()
        try:
            client.hsk_cek("UNKNOWN")
        except KeyServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8
    before = server.requests["UNKNOWN"]
    with pytest.raises(KeyServerError):
        client.hsk_cek("UNKNOWN")
    assert server.requests["UNKNOWN"] == before + 1


@pytest.mark.parametrize(
    "url",
    [
        "http://cert.hygon.cn", "http://localhost", "ftp://cert.hygon.cn", "cert.hygon.cn", "", "https://", "https://a b",
        "https://user@host", "https://host?x=1", "https://host#x", "https://host:port", "https://[::1", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ArgumentError, match="key server URL"):
        KeyServerClient(url)


@pytest.mark.parametrize("url", ["https://user:hunter2@host", "https://:hunter2@host:99999", "http://user:hunter2@[::1"])
def test_passwords_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ArgumentError, match="key server URL with a user name") as caught:
        KeyServerClient(url)
    assert "hunter2" not in str(caught.value)


def test_ipv6(line: ManufacturingLine) -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")

    class Server6(Server):
        address_family = socket.AF_INET6

    server = Server6(("::1", 0), Handler)
    server.line, server.requests, server.stop = line, Counter(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        client = KeyServerClient(f"http://[::1]:{server.server_port}", roots=[line.root], allow_http=True)
        assert client.hrk() == line.root
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x1b[31mEVIL\x07\r\n\r\n", "EVIL"),
        (b"HTTP/1.1 2\x1b0 OK\r\n\r\n", "2"),
        (b"HTTP/1.1 200 OK\r\nX:" + b"a" * 70000 + b"\r\n\r\n", "header line"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "100 headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\x1b\r\n", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\naaaaa", "negative"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", "0 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx", "1 bytes"),
    ],
    ids=range(8),
)
def test_answers_that_are_attacks(line: ManufacturingLine, answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                with contextlib.suppress(OSError):
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        client = KeyServerClient(f"http://127.0.0.1:{listener.getsockname()[1]}", 30, allow_http=True)
        with pytest.raises(KeyServerError, match=words) as caught:
            client.hsk_cek("SIM1")
        thread.join()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "xn--", "."])
def test_names_that_cannot_be_resolved(host: str, context: ssl.SSLContext) -> None:
    with pytest.raises(KeyServerError, match="hsk_cek"):
        KeyServerClient(f"https://{host}", context=context).hsk_cek("SIM1")


def test_addresses_share_one_deadline(context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: int, **options: int) -> object:
        if host == "many.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{number}", port)) for number in range(9)]
        return real(host, port, *arguments, **options)

    def never(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address[0].startswith("192.0.2.")
        tried.append(timeout)
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", never)
    with pytest.raises(KeyServerError, match=f"no answer within {SHORT} seconds"):
        KeyServerClient("https://many.example", SHORT, context=context).hsk_cek("SIM1")
    assert sum(tried) < SHORT + 0.1


def test_the_second_address_is_tried(
    line: ManufacturingLine, server: Server, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = socket.create_connection, []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        if len(tried) == 1:
            raise ConnectionRefusedError
        return real(("127.0.0.1", server.server_port), timeout)

    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{number}", 1)) for number in (1, 2, 3)]
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: addresses if host == "localhost" else resolve(host, *rest, **more)
    )
    assert KeyServerClient("https://localhost", roots=[line.root], context=context).hrk() == line.root
    assert tried == ["192.0.2.1", "192.0.2.2"]


def test_plain_http_only_for_this_machine_and_when_told() -> None:
    assert KeyServerClient("http://localhost:1", allow_http=True).base_url == "http://localhost:1"
    with pytest.raises(ArgumentError):
        KeyServerClient("http://cert.hygon.cn", allow_http=True)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_timeouts(timeout: float) -> None:
    with pytest.raises(ArgumentError, match="timeout"):
        KeyServerClient(timeout=timeout)


def test_plain_http(line: ManufacturingLine) -> None:
    server = Server(("127.0.0.1", 0), Handler)
    server.line, server.requests, server.stop = line, Counter(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        client = KeyServerClient(f"http://127.0.0.1:{server.server_port}", 5, roots=[line.root], allow_http=True)
        assert client.hsk_cek("GOOD")[0] == line.hsk
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_nobody_is_asked_unless_a_client_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert CertificateStore([tmp_path], cache=tmp_path).find("KPA64911240507") is None


def test_errors_are_of_both_families() -> None:
    assert issubclass(KeyServerError, OSError)
    assert issubclass(KeyServerError, CsvfastError)


def test_late_comers_find_what_others_fetched(client: KeyServerClient, server: Server, tmp_path: Path) -> None:
    """Who looked into the cache just before it was filled asks the cache again, not the server."""
    store = CertificateStore([], cache=tmp_path, client=client)
    found = store.find("GOOD8")
    assert store._fetch("GOOD8", client) == found
    assert server.requests == {"GOOD8": 1}


def test_a_root_that_does_not_sign_itself(server: Server, context: ssl.SSLContext, line: ManufacturingLine) -> None:
    broken = CaCertificate.parse(altered(line.root.encoded, r=bytes(31) + b"\1"))
    server.line = ManufacturingLine.create()
    server.line.root = broken
    with pytest.raises(VerificationError, match="HRK: the signature by itself is not valid"):
        KeyServerClient(f"https://localhost:{server.server_port}", roots=[broken], context=context).hrk()
