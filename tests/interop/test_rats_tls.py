"""Attested TLS against other implementations: rats-tls' sample programs where they are built, and OpenSSL's command everywhere.

For the first part $CSVFAST_RATS_TLS_BIN is a directory with rats-tls-client and rats-tls-server (inclavare-containers/rats-tls
0.6.4, build mode host) whose csv verifier has a simulator's root in the place of Hygon's (`hrk_pubkey` in
src/verifiers/csv/hygoncert.c), and $CSVFAST_RATS_TLS_LINE the directory of that simulator (ManufacturingLine.save).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from attest.simulated_evidence import Platform
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from ratstls.attested import buffer_for
from ratstls.simulated_peers import attested, guest, plain

from csvfast.certs import ManufacturingLine
from csvfast.errors import AttestedTlsError
from csvfast.ratstls.asynchronous import AttestedServer
from csvfast.ratstls.blocking import BlockingServer, BlockingStream, connect
from csvfast.ratstls.certificate import make_certificate
from csvfast.ratstls.context import Identity, TlsOptions
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement
from csvfast.ratstls.stream import Stream

ANYBODY = Requirement.unattested()
NOBODY_ASKED = Requirement.unattested(certificate=False)
SECONDS = 20


def answer_once(stream: BlockingStream) -> None:
    if data := stream.receive():
        stream.send(data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- rats-tls

PROGRAMS = os.environ.get("CSVFAST_RATS_TLS_BIN", "")
rats_tls = pytest.mark.skipif(not PROGRAMS, reason="rats-tls' sample programs are not built: $CSVFAST_RATS_TLS_BIN")


@pytest.fixture(scope="module")
def platform() -> Platform:
    line = os.environ.get("CSVFAST_RATS_TLS_LINE")
    return Platform(ManufacturingLine.load(line) if line else None)


def wrong_user_data(platform: Platform) -> Identity:
    key = TlsKey.generate()
    return Identity(key, make_certificate(key, buffer_for(platform, key, report_data=b"other".ljust(64, b"\0"))))


def critical(platform: Platform) -> Identity:
    key = TlsKey.generate()
    return Identity(key, make_certificate(key, buffer_for(platform, key), critical=True))


class Ended(NamedTuple):
    code: int
    output: str


def client(server: BlockingServer, *options: str) -> Ended:
    assert isinstance(server.address, tuple)
    command = [str(Path(PROGRAMS) / "rats-tls-client"), "-i", "127.0.0.1", "-p", str(server.address[1]), "-l", "debug", *options]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    return Ended(done.returncode, (done.stdout + done.stderr).decode(errors="replace"))


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    port = free_port()
    command = [str(Path(PROGRAMS) / "rats-tls-server"), "-i", "127.0.0.1", "-p", str(port), "-l", "debug", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            yield "127.0.0.1", port
        finally:
            process.kill()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens there; a connection to find out would be the one that the sample server waits for."""
    for _ in range(SECONDS * 50):
        assert process.poll() is None, "the server ended"
        listening = Path("/proc/net/tcp").read_text(encoding="ascii")
        if f"0100007F:{port:04X} 00000000:0000 0A" in listening:
            return
        time.sleep(0.02)
    raise AssertionError("the server does not listen")


@rats_tls
@pytest.mark.parametrize(
    ("make", "options", "accepted"),
    [
        (guest, ("-v", "csv"), True),
        (guest, (), True),
        (lambda platform: guest(platform, custom={"key_0": b"value_0\0"}), ("-v", "csv"), True),
        (lambda platform: guest(platform, layout="librats"), ("-v", "csv"), False),
        (wrong_user_data, ("-v", "csv"), False),
        (critical, ("-v", "csv"), False),
        (lambda _platform: plain(), ("-v", "nullverifier"), True),
        (lambda _platform: plain(), (), True),
        (lambda _platform: plain(), ("-v", "csv"), False),
    ],
    ids=["csv", "by tag", "claims", "librats layout", "user data", "critical", "null verifier", "no verifier", "no evidence"],
)
def test_what_the_c_client_thinks_of_us(platform: Platform, make: Any, options: tuple[str, ...], accepted: bool) -> None:
    with BlockingServer(("127.0.0.1", 0), make(platform), NOBODY_ASKED, answer_once) as ours:
        ended = client(ours, *options)
    assert (ended.code == 0) == accepted, ended.output


@rats_tls
def test_the_c_server_accepts_us(platform: Platform) -> None:
    with (
        server("-v", "csv", "-a", "nullattester", "-m") as address,
        connect(address, guest(platform), ANYBODY, timeout=SECONDS) as stream,
    ):
        stream.send(b"Hello and welcome to RATS-TLS!\n")
        assert stream.receive() == b"Hello and welcome to RATS-TLS!\n"


@rats_tls
def test_the_c_server_refuses_wrong_user_data(platform: Platform) -> None:
    with (
        server("-v", "csv", "-a", "nullattester", "-m") as address,
        connect(address, wrong_user_data(platform), ANYBODY, timeout=SECONDS) as stream,
        pytest.raises(AttestedTlsError, match="alert"),
    ):
        stream.receive()


@rats_tls
def test_the_c_client_without_evidence(platform: Platform) -> None:
    peers = []

    def handler(stream: BlockingStream) -> None:
        peers.append(stream.peer)
        answer_once(stream)

    with BlockingServer(("127.0.0.1", 0), plain(), ANYBODY, handler) as ours:
        assert client(ours, "-a", "nullattester", "-v", "nullverifier", "-m").code == 0
    assert peers[0].certificate is not None
    assert peers[0].certificate.evidence is None
    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), answer_once) as ours:
        assert client(ours, "-a", "nullattester", "-v", "nullverifier", "-m").code != 0


@rats_tls
def test_the_c_client_without_a_certificate(platform: Platform) -> None:
    refusals: list[AttestedTlsError] = []

    def note(_address: str, error: AttestedTlsError, _certificate: object) -> None:
        refusals.append(error)

    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), answer_once, on_refusal=note) as ours:
        assert client(ours, "-v", "nullverifier").code != 0
    assert "did not return a certificate" in str(refusals[0])


# ---- OpenSSL's command

OPENSSL = shutil.which("openssl") or ""
openssl = pytest.mark.skipif(not OPENSSL, reason="openssl is not installed")


def files(folder: Path, identity: Identity) -> list[str]:
    certificate = x509.load_der_x509_certificate(identity.certificate)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(identity.key.dump())
    return ["-cert", str(folder / "certificate.pem"), "-key", str(folder / "key.pem")]


def s_client(server: BlockingServer, *options: str) -> Ended:
    assert isinstance(server.address, tuple)
    command = [OPENSSL, "s_client", "-connect", f"127.0.0.1:{server.address[1]}", "-quiet", "-no_ign_eof", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        try:
            process.wait(SECONDS)
        finally:
            process.kill()
        assert process.stdout is not None
        assert process.stderr is not None
        return Ended(process.returncode, (process.stdout.read() + process.stderr.read()).decode(errors="replace"))


@openssl
@pytest.mark.parametrize("kind", ["p256", "rsa3072"])
@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
def test_openssl_is_our_client(platform: Platform, kind: str, version: str, tmp_path: Path) -> None:
    peers = []

    def handler(stream: BlockingStream) -> None:
        peers.append(stream.peer)
        answer_once(stream)

    with BlockingServer(("127.0.0.1", 0), guest(platform), attested(platform), handler, options=TlsOptions("1.2")) as ours:
        ended = s_client(ours, version, *files(tmp_path, guest(platform, kind=kind)))
    assert "hello" in ended.output
    assert peers[0].verified is not None
    assert peers[0].tls_version == {"-tls1_3": "TLSv1.3", "-tls1_2": "TLSv1.2"}[version]


@openssl
def test_openssl_is_refused(platform: Platform, tmp_path: Path) -> None:
    refusals: list[AttestedTlsError] = []

    def note(_address: str, error: AttestedTlsError, _certificate: object) -> None:
        refusals.append(error)

    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), answer_once, on_refusal=note) as ours:
        for identity in (wrong_user_data(platform), plain(), guest(platform, measure=bytes(32))):
            assert "hello" not in s_client(ours, *files(tmp_path, identity)).output
        assert "hello" not in s_client(ours).output
        assert "hello" not in s_client(ours, "-tls1_2", *files(tmp_path, guest(platform))).output
    assert [error.stage for error in refusals] == ["binding", "certificate", "appraise", "handshake", "handshake"]


@openssl
def test_openssl_sees_an_alert(platform: Platform, tmp_path: Path) -> None:
    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), answer_once) as ours:
        ended = s_client(ours, *files(tmp_path, wrong_user_data(platform)))
    assert "alert" in ended.output
    assert ended.code != 0


@openssl
def test_openssl_cannot_resume(platform: Platform, tmp_path: Path) -> None:
    peers = []

    def handler(stream: BlockingStream) -> None:
        peers.append(stream.peer)
        answer_once(stream)

    options = files(tmp_path, guest(platform))
    with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), handler) as ours:
        assert "hello" in s_client(ours, *options, "-sess_out", str(tmp_path / "session")).output
        if (tmp_path / "session").exists():
            assert "hello" in s_client(ours, *options, "-sess_in", str(tmp_path / "session")).output
            assert "hello" not in s_client(ours, "-sess_in", str(tmp_path / "session")).output  # without its certificate
    assert all(peer.verified is not None for peer in peers)


@openssl
@pytest.mark.parametrize("kind", ["p256", "rsa3072"])
def test_openssl_is_our_server(platform: Platform, kind: str, tmp_path: Path) -> None:
    port = free_port()
    identity = guest(platform, kind=kind)
    command = [OPENSSL, "s_server", "-accept", f"127.0.0.1:{port}", "-quiet", "-rev", *files(tmp_path, identity)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            with connect(("127.0.0.1", port), guest(platform), attested(platform)) as stream:
                assert stream.peer.spki_sha256 == identity.key.spki_sha256
                stream.send(b"abc\n")
                assert stream.receive() == b"cba\n"
            with pytest.raises(AttestedTlsError) as info:
                connect(("127.0.0.1", port), guest(platform), attested(Platform()))
            assert info.value.stage == "verify"
        finally:
            process.kill()


@openssl
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_openssl_updates_its_keys(platform: Platform, kind: str, tmp_path: Path) -> None:
    """`K` on a line of its own: new keys, and a request for ours, which must be answered though the application says nothing."""

    def updated(port: int) -> bool:
        options = files(tmp_path, guest(platform))
        command = [OPENSSL, "s_client", "-connect", f"127.0.0.1:{port}", "-msg", *options]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            try:
                for line in process.stdout:
                    if b"read R BLOCK" in line or b"Verify return code" in line:
                        process.stdin.write(b"K\n")
                        process.stdin.flush()
                    if line.startswith(b"<<<") and b"KeyUpdate" in line:
                        return True
                return False
            finally:
                timer.cancel()
                process.kill()

    if kind == "blocking":
        with BlockingServer(("127.0.0.1", 0), plain(), attested(platform), answer_once) as ours:
            assert isinstance(ours.address, tuple)
            assert updated(ours.address[1])
        return

    async def handler(stream: Stream) -> None:
        await stream.receive()

    async def main() -> None:
        async with asyncio.timeout(SECONDS), AttestedServer(plain(), attested(platform), handler) as server:
            _, port = await server.serve("127.0.0.1", 0)
            assert await asyncio.to_thread(updated, port)

    asyncio.run(main())
