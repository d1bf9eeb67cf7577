"""TLS 1.3 with SM2 certificates and TLS_SM4_GCM_SM3 (RFC 8998)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from ratstls.attested import buffer_for
from ratstls.simulated_peers import attested, ends, guest, opened, plain, pump

from csvfast.errors import ArgumentError, AttestedTlsError, MissingExtraError
from csvfast.ratstls import context as context_module
from csvfast.ratstls.asynchronous import AttestedServer, open_connection
from csvfast.ratstls.certificate import make_certificate
from csvfast.ratstls.connection import AttestedConnection
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions, sm_is_available
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement
from csvfast.ratstls.stream import Stream

ANYBODY = Requirement.unattested()
SM = TlsOptions(suites="sm")


@pytest.fixture(scope="module")
def platform() -> Platform:
    if not sm_is_available():
        pytest.skip("the installed OpenSSL has no TLS_SM4_GCM_SM3")
    return Platform()


@pytest.mark.parametrize("layout", ["rats-tls", "librats"])
def test_two_guests(platform: Platform, layout: Any) -> None:
    sides = [(guest(platform, kind="sm2", layout=layout), attested(platform)) for _ in range(2)]
    server, client = opened(*ends(*sides, SM))
    for connection in (server, client):
        assert connection.peer.cipher == "TLS_SM4_GCM_SM3"
        assert connection.peer.tls_version == "TLSv1.3"
        assert connection.peer.certificate is not None
        assert connection.peer.certificate.key_kind == "sm2"
        assert connection.peer.verified is not None
    assert server.peer.exporter == client.peer.exporter
    client.send("国密".encode())
    server.feed(client.outgoing())
    assert server.receive() == "国密".encode()


def extensions(hello: bytes) -> tuple[bytes, dict[int, bytes]]:
    """Cipher suites and extensions of a ClientHello (RFC 8446 section 4.1.2)."""
    body = hello[5 + 4 + 2 + 32 :]
    body = body[1 + body[0] :]
    size = int.from_bytes(body[:2], "big")
    suites, body = body[2 : 2 + size], body[2 + size :]
    body = body[1 + body[0] + 2 :]
    found = {}
    while body:
        kind, size = int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")
        found[kind], body = body[4 : 4 + size], body[4 + size :]
    return suites, found


def pairs(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]


def test_what_a_client_offers(platform: Platform) -> None:
    """Numbers of RFC 8998: suite 0x00C6, signatures 0x0708, group 41."""
    client = AttestedConnection(EndpointContext.client(guest(platform, kind="sm2"), ANYBODY, SM))
    client.advance()
    suites, found = extensions(client.outgoing())
    assert set(pairs(suites)) - {0x00FF} == {0x00C6}
    assert 0x0708 in pairs(found[13][2:])
    assert 41 in pairs(found[10][2:])
    assert found[43] == b"\x02\x03\x04"


@pytest.mark.parametrize("side", ["server", "client"])
def test_keys_of_other_kinds_are_refused(platform: Platform, side: str) -> None:
    """An end with other suites has no suite in common; one that has the suite and another key is refused for the key."""
    other = EndpointContext.server if side == "server" else EndpointContext.client
    context = other(guest(platform), ANYBODY)
    context.context._used = False
    context.context.set_tls13_ciphersuites(b"TLS_SM4_GCM_SM3")
    ours = EndpointContext.client if side == "server" else EndpointContext.server
    connection = AttestedConnection(ours(guest(platform, kind="sm2"), attested(platform), SM))
    pump(AttestedConnection(context), connection)
    assert connection.error is not None
    assert connection.error.stage == "certificate"
    assert "expected an SM2 key" in str(connection.error)


def test_no_suite_in_common(platform: Platform) -> None:
    server = AttestedConnection(EndpointContext.server(guest(platform, kind="sm2"), attested(platform), SM))
    client = AttestedConnection(EndpointContext.client(guest(platform), attested(platform)))
    pump(server, client)
    assert server.error is not None
    assert server.error.stage == "handshake"
    assert client.state == "closed"


def test_sm2_keys_with_ordinary_suites(platform: Platform) -> None:
    server, client = opened(*ends((guest(platform, kind="sm2"), attested(platform)), (guest(platform), attested(platform))))
    assert server.peer.cipher != "TLS_SM4_GCM_SM3"
    assert client.peer.certificate is not None
    assert client.peer.certificate.key_kind == "sm2"


def test_evidence_about_another_key(platform: Platform) -> None:
    key = TlsKey.generate("sm2")
    liar = Identity(key, make_certificate(key, buffer_for(platform, TlsKey.generate("sm2"))))
    server, client = ends((plain("sm2"), attested(platform)), (liar, ANYBODY), SM)
    pump(server, client)
    assert server.error is not None
    assert server.error.stage == "binding"


def test_a_certificate_signed_by_another_key(platform: Platform) -> None:
    key, other = TlsKey.generate("sm2"), TlsKey.generate("sm2")
    forged = bytearray(make_certificate(key, buffer_for(platform, key)))
    stranger = make_certificate(other, buffer_for(platform, other))
    forged[-64:] = stranger[-64:]
    server, client = ends((plain("sm2"), attested(platform)), (Identity(key, bytes(forged)), ANYBODY), SM)
    pump(server, client)
    assert server.error is not None
    assert server.error.stage in ("binding", "certificate")


def test_an_identity_of_another_kind() -> None:
    with pytest.raises(ArgumentError, match="expected an SM2 key"):
        EndpointContext.server(plain(), ANYBODY, SM)


def test_without_such_an_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "_sm_available", False)
    assert not sm_is_available()
    with pytest.raises(MissingExtraError, match="pip install"):
        EndpointContext.server(plain("sm2"), ANYBODY, SM)


def test_the_probe_is_a_real_handshake(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    monkeypatch.setattr(context_module, "_SM_SUITE", b"TLS_SM4_GCM_SM4")
    assert not context_module._try_sm()


def test_over_sockets(platform: Platform) -> None:
    async def echo(stream: Stream) -> None:
        while data := await stream.receive():
            await stream.send(data)

    async def main() -> None:
        async with (
            asyncio.timeout(20),
            AttestedServer(guest(platform, kind="sm2"), attested(platform), echo, options=SM) as server,
        ):
            address = await server.serve("127.0.0.1", 0)
            stream = await open_connection(address, guest(platform, kind="sm2"), attested(platform), options=SM)
            await stream.send(bytes(50_000))
            received = 0
            while received < 50_000:
                received += len(await stream.receive())
            stream.close()
            with pytest.raises(AttestedTlsError):
                await open_connection(address, guest(platform), attested(platform))

    asyncio.run(main())
