"""Two ends in one process: what opens, what does not, and that nothing moves before it is open."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, Platform
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from ratstls.attested import buffer_for
from ratstls.simulated_peers import POLICY, attested, ends, guest, opened, plain, pump

from csvfast.attest import Appraisal, Violation
from csvfast.errors import ArgumentError, AttestedTlsError, LengthError, VerificationError
from csvfast.ratstls.certificate import make_certificate, read_certificate
from csvfast.ratstls.claims import encode_claims
from csvfast.ratstls.connection import HANDSHAKE_LIMIT, RECORD_BYTES, AttestedConnection
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Judgement, PolicyJudge, Requirement

ANYBODY = Requirement.unattested()


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


def refused(server: AttestedConnection, client: AttestedConnection) -> AttestedTlsError:
    """Carries the handshake on until the server has refused, and returns why; the client must not have got a byte through."""
    pump(server, client)
    if server.state == "judging":
        with pytest.raises(AttestedTlsError):
            server.judge()
    assert server.state == "closed"
    assert server.error is not None
    with pytest.raises(AttestedTlsError):
        _ = server.peer
    with pytest.raises(AttestedTlsError):
        server.receive()
    with pytest.raises(AttestedTlsError):
        server.send(b"key")
    return server.error


# ---- What opens


@pytest.mark.parametrize("kind", ["p256", "rsa3072"])
@pytest.mark.parametrize("layout", ["rats-tls", "librats"])
def test_two_guests(platform: Platform, kind: str, layout: str) -> None:
    server_identity = guest(platform, kind=kind, layout=layout)
    client_identity = guest(platform, kind=kind, layout=layout, custom={"role": b"database\0"})
    server, client = opened(*ends((server_identity, attested(platform)), (client_identity, attested(platform))))
    assert server.peer.certificate is not None
    assert server.peer.certificate.der == client_identity.certificate
    assert server.peer.spki_sha256 == client_identity.key.spki_sha256
    assert client.peer.spki_sha256 == server_identity.key.spki_sha256
    assert server.peer.verified is not None
    assert server.peer.verified.report.measure == MEASURE
    assert server.peer.verified.complete
    assert server.peer.appraisal is not None
    assert server.peer.appraisal.allowed
    assert dict(server.peer.custom_claims) == {"role": b"database\0"}
    assert dict(client.peer.custom_claims) == {}
    assert server.peer.exporter == client.peer.exporter
    assert len(server.peer.exporter) == 32
    assert server.peer.tls_version == "TLSv1.3"
    assert server.peer.cipher.startswith("TLS_")
    assert server.peer.address == "server's peer"
    for near, far in ((server, client), (client, server)):
        near.send(b"through")
        far.feed(near.outgoing())
        assert far.receive() == b"through"
        assert far.receive() is None


def test_each_connection_has_its_own_exporter(platform: Platform) -> None:
    identity = guest(platform)
    values = {
        opened(*ends((identity, attested(platform)), (identity, attested(platform))))[0].peer.exporter for _ in range(3)
    }
    assert len(values) == 3


def test_pinned() -> None:
    identity, other = plain(), plain()
    pinned = Requirement.pinned([b"\0" * 32, identity.key.spki_sha256])
    server, client = opened(*ends((identity, ANYBODY), (plain(), pinned)))
    assert client.peer.verified is None
    assert client.peer.appraisal is None
    assert client.peer.spki_sha256 == identity.key.spki_sha256
    server, client = ends((other, ANYBODY), (plain(), pinned))
    pump(server, client)
    assert client.error is not None
    assert client.error.stage == "binding"
    assert other.key.spki_sha256.hex() in str(client.error)


def test_a_pin_is_no_excuse_for_evidence_that_does_not_hold(platform: Platform) -> None:
    key = TlsKey.generate()
    wrong = Identity(key, make_certificate(key, buffer_for(platform, TlsKey.generate())))
    error = refused(*ends((plain(), Requirement.pinned([key.spki_sha256])), (wrong, ANYBODY)))
    assert error.stage == "binding"


def test_unattested_is_said_out_loud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "csvfast.ratstls"):
        server, _ = opened(*ends((plain(), ANYBODY), (plain(), ANYBODY)))
    assert [record.getMessage() for record in caplog.records] == [
        "peers of this TLS server are not attested: anybody is accepted",
        "peers of this TLS client are not attested: anybody is accepted",
    ]
    assert server.peer.certificate is not None
    assert server.peer.verified is None


def test_no_certificate_asked_for() -> None:
    server, client = opened(*ends((plain(), Requirement.unattested(certificate=False)), (None, ANYBODY)))
    assert server.peer.certificate is None
    assert server.peer.spki_sha256 == b""
    assert dict(server.peer.custom_claims) == {}
    assert client.peer.certificate is not None


def test_tls_1_2_by_option_alone(platform: Platform) -> None:
    def client_of_1_2() -> SSL.Connection:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        guest(platform).key.use_in(context)
        return SSL.Connection(context, None)

    raw = client_of_1_2()
    raw.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        raw.do_handshake()
    hello = raw.bio_read(65536)
    strict = AttestedConnection(EndpointContext.server(plain(), attested(platform)))
    strict.feed(hello)
    with pytest.raises(AttestedTlsError, match="protocol"):
        strict.advance()
    lenient = AttestedConnection(EndpointContext.server(plain(), attested(platform), TlsOptions("1.2")))
    lenient.feed(hello)
    assert lenient.advance() == "handshake"
    assert lenient.outgoing()[:3] == b"\x16\x03\x03"


def test_whole_connection_in_tls_1_2(platform: Platform) -> None:
    client_context = EndpointContext.client(guest(platform), attested(platform), TlsOptions("1.2"))
    client_context.context._used = False  # OpenSSL's own switch, which the product has no use for
    client_context.context.set_max_proto_version(SSL.TLS1_2_VERSION)
    server = AttestedConnection(EndpointContext.server(guest(platform), attested(platform), TlsOptions("1.2")))
    client = AttestedConnection(client_context)
    opened(server, client)
    assert server.peer.tls_version == "TLSv1.2"
    assert server.peer.cipher.startswith("ECDHE-ECDSA-")
    assert server.peer.exporter == client.peer.exporter
    with pytest.raises(SSL.Error):  # our own ends do not even ask
        client._connection.renegotiate()


# ---- Nothing moves before


def receive(connection: AttestedConnection) -> None:
    connection.receive()


def send(connection: AttestedConnection) -> None:
    connection.send(b"x")


def peer(connection: AttestedConnection) -> None:
    _ = connection.peer


def test_no_data_before_the_connection_is_open(platform: Platform) -> None:
    server, client = ends((guest(platform), attested(platform)), (guest(platform), attested(platform)))
    for connection in (server, client):
        for attempt in (receive, send, AttestedConnection.judge, AttestedConnection.judging, peer):
            with pytest.raises(AttestedTlsError):
                attempt(connection)
    pump(server, client)
    assert (server.state, client.state) == ("judging", "judging")
    for connection in (server, client):
        for attempt in (receive, send, peer):
            with pytest.raises(AttestedTlsError):
                attempt(connection)
        assert connection.outgoing() == b""
    client.judge()
    client.send(b"early")  # the client has accepted the server; the server has not judged yet
    server.feed(client.outgoing())
    assert server.state == "judging"
    with pytest.raises(AttestedTlsError, match="judging"):
        server.receive()
    server.judge()
    assert server.receive() == b"early"


def test_open_at_the_client_is_not_accepted_by_the_server(platform: Platform) -> None:
    server, client = ends((guest(platform), attested(platform)), (guest(platform, measure=bytes(32)), attested(platform)))
    pump(server, client)
    client.judge()
    assert client.state == "open"
    client.send(b"give me the key")
    server.feed(client.outgoing())
    with pytest.raises(AttestedTlsError) as info:
        server.judge()
    assert info.value.stage == "appraise"
    assert "measure" in str(info.value)
    client.feed(server.outgoing())
    assert client.receive() == b""


# ---- Who is refused


def test_no_certificate(platform: Platform) -> None:
    error = refused(*ends((plain(), attested(platform)), (None, ANYBODY)))
    assert error.stage == "handshake"
    assert "did not return a certificate" in str(error)


def test_no_evidence(platform: Platform) -> None:
    server, client = ends((plain(), attested(platform)), (plain(), ANYBODY))
    error = refused(server, client)
    assert error.stage == "certificate"
    assert "no evidence" in str(error)
    client.judge()
    client.feed(server.outgoing())
    with pytest.raises(AttestedTlsError, match="alert"):
        client.receive()


def wrong_user_data(platform: Platform, key: TlsKey) -> bytes:
    return buffer_for(platform, key, report_data=b"something else".ljust(64, b"\0"))


def tail_of_user_data(platform: Platform, key: TlsKey) -> bytes:
    from csvfast.ratstls.claims import report_data_of

    return buffer_for(platform, key, report_data=report_data_of(encode_claims(key.spki))[:63] + b"\x01")


def no_user_data(platform: Platform, key: TlsKey) -> bytes:
    return buffer_for(platform, key, report_data=bytes(64))


def other_key(platform: Platform, key: TlsKey) -> bytes:
    return buffer_for(platform, TlsKey.generate())


def other_keys_claims(platform: Platform, key: TlsKey) -> bytes:
    return buffer_for(platform, key, claims=encode_claims(TlsKey.generate().spki))


@pytest.mark.parametrize("content", [wrong_user_data, tail_of_user_data, no_user_data, other_key, other_keys_claims])
@pytest.mark.parametrize("side", ["server", "client"])
def test_evidence_about_something_else(platform: Platform, content: Any, side: str) -> None:
    key = TlsKey.generate()
    liar = Identity(key, make_certificate(key, content(platform, key)))
    if side == "server":
        connection, other = ends((plain(), attested(platform)), (liar, ANYBODY))
    else:
        other, connection = ends((liar, ANYBODY), (guest(platform), attested(platform)))
    pump(other, connection)
    assert connection.state == "closed"
    assert connection.error is not None
    assert connection.error.stage == "binding"
    assert connection.certificate is None


def test_another_root(platform: Platform) -> None:
    error = refused(*ends((plain(), attested(Platform())), (guest(platform), ANYBODY)))
    assert error.stage == "verify"
    assert "HSK" in str(error)


def test_debugging_allowed_in_the_guest(platform: Platform) -> None:
    from csvfast.report import GuestPolicy

    error = refused(*ends((plain(), attested(platform)), (guest(platform, policy=GuestPolicy.of(es=True)), ANYBODY)))
    assert error.stage == "appraise"
    assert "nodbg" in str(error)


@pytest.mark.parametrize(("days", "accepted"), [((-2, -1), False), ((1, 2), False), ((-1, 1), True)])
def test_validity(platform: Platform, days: tuple[int, int], accepted: bool) -> None:
    key, now = TlsKey.generate(), datetime.now(UTC)
    begin, end = (now + timedelta(days=day) for day in days)
    identity = Identity(key, make_certificate(key, buffer_for(platform, key), not_before=begin, not_after=end))
    server, client = ends((plain(), attested(platform)), (identity, ANYBODY))
    if accepted:
        opened(server, client)
    else:
        assert refused(server, client).stage == "binding"


def test_clock_skew_is_configurable(platform: Platform) -> None:
    key, now = TlsKey.generate(), datetime.now(UTC)
    certificate = make_certificate(
        key, buffer_for(platform, key), not_before=now - timedelta(hours=2), not_after=now - timedelta(seconds=60)
    )
    sides = (plain(), attested(platform)), (Identity(key, certificate), ANYBODY)
    opened(*ends(*sides))
    assert refused(*ends(*sides, TlsOptions(skew=10))).stage == "binding"


def test_a_critical_evidence_extension_is_accepted(platform: Platform) -> None:
    key = TlsKey.generate()
    identity = Identity(key, make_certificate(key, buffer_for(platform, key), critical=True))
    opened(*ends((plain(), attested(platform)), (identity, ANYBODY)))


def test_nobody_signs_for_another(platform: Platform) -> None:
    authority, key = ec.generate_private_key(ec.SECP256R1()), TlsKey.generate()
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    leaf = x509.CertificateBuilder(name, name, key.private.public_key(), 1, now - timedelta(1), now + timedelta(1))
    encoded = leaf.sign(authority, SHA256()).public_bytes(Encoding.DER)
    error = refused(*ends((plain(), ANYBODY), (Identity(key, encoded), ANYBODY)))
    assert error.stage in ("binding", "certificate")


# ---- Judges that misbehave


class Misbehaving(PolicyJudge):
    def __init__(self, platform: Platform, verified: Any = None, appraisal: Any = None) -> None:
        super().__init__(platform.roots, POLICY)
        self.answers = verified, appraisal
        self.calls: list[str] = []

    def verify(self, certificate: Any) -> Any:
        self.calls.append("verify")
        answer = self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return super().verify(certificate) if answer is None else answer

    def appraise(self, verified: Any, certificate: Any) -> Any:
        self.calls.append("appraise")
        answer = self.answers[1]
        if isinstance(answer, Exception):
            raise answer
        return super().appraise(verified, certificate) if answer is None else answer


@pytest.mark.parametrize(
    ("verified", "appraisal", "stage", "calls"),
    [
        (RuntimeError("bug"), None, "verify", ["verify"]),
        (VerificationError("PEK", "no"), None, "verify", ["verify"]),
        (True, None, "verify", ["verify"]),
        (None, RuntimeError("bug"), "appraise", ["verify", "appraise"]),
        (None, True, "appraise", ["verify", "appraise"]),
        (None, Appraisal((Violation("x", "a", "b"),), ("x",)), "appraise", ["verify", "appraise"]),
    ],
)
def test_a_judge_that_misbehaves_accepts_nobody(
    platform: Platform, verified: Any, appraisal: Any, stage: str, calls: list[str]
) -> None:
    judge = Misbehaving(platform, verified, appraisal)
    error = refused(*ends((plain(), Requirement.attested(judge)), (guest(platform), ANYBODY)))
    assert error.stage == stage
    assert judge.calls == calls


def test_verify_comes_before_appraise_and_each_once(platform: Platform) -> None:
    judge = Misbehaving(platform)
    opened(*ends((plain(), Requirement.attested(judge)), (guest(platform), ANYBODY)))
    assert judge.calls == ["verify", "appraise"]


@pytest.mark.parametrize("judgement", [None, True, Judgement(None, None), (None, None)])
def test_settling_without_a_judgement(platform: Platform, judgement: Any) -> None:
    server, client = ends((plain(), attested(platform)), (guest(platform), ANYBODY))
    pump(server, client)
    with pytest.raises(AttestedTlsError) as info:
        server.settle(judgement)
    assert info.value.stage == "appraise"
    assert server.state == "closed"


def test_a_policy_judge_compares_the_claims_itself(platform: Platform) -> None:
    """Whoever asks it, and whatever has been checked before."""
    judge = PolicyJudge(platform.roots, POLICY)
    certificate, other = (read_certificate(guest(platform).certificate) for _ in range(2))
    judge.verify(certificate)
    with pytest.raises(VerificationError, match="report data"):
        judge.verify(replace(certificate, buffer=other.buffer))


def test_settling_with_a_refusal_in_it(platform: Platform) -> None:
    server, client = ends((plain(), attested(platform)), (guest(platform), ANYBODY))
    pump(server, client)
    verified, _ = server.judging()()
    with pytest.raises(AttestedTlsError):
        server.settle(Judgement(verified, Appraisal((Violation("x", "a", "b"),), ("x",))))
    assert server.state == "closed"


def test_a_judgement_that_comes_too_late(platform: Platform) -> None:
    server, client = ends((plain(), attested(platform)), (guest(platform), ANYBODY))
    pump(server, client)
    judgement = server.judging()()
    server.abort(AttestedTlsError("deadline", "too slow"))
    with pytest.raises(AttestedTlsError, match="too slow"):
        server.settle(judgement)
    assert server.state == "closed"


# ---- Sessions are not resumed


def test_resumption_is_impossible(platform: Platform) -> None:
    """A client that does offer a session is made to show its certificate again, and is judged again."""
    judge = Misbehaving(platform)
    context = EndpointContext.server(plain(), Requirement.attested(judge))
    identity, raw_context = guest(platform), SSL.Context(SSL.TLS_CLIENT_METHOD)
    raw_context.use_certificate(x509.load_der_x509_certificate(identity.certificate))
    identity.key.use_in(raw_context)

    def visit(session: SSL.Session | None) -> tuple[SSL.Session, bytes]:
        server, raw = AttestedConnection(context), SSL.Connection(raw_context, None)
        raw.set_connect_state()
        if session is not None:
            raw.set_session(session)
        hello = b""
        for _ in range(3):
            with contextlib.suppress(SSL.WantReadError):
                raw.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                data = raw.bio_read(65536)
                hello = hello or data
                server.feed(data)
            server.advance()
            if data := server.outgoing():
                raw.bio_write(data)
        assert server.judge().certificate is not None
        server.send(b"so that the client reads tickets")
        raw.bio_write(server.outgoing())
        assert raw.recv(100)
        found = raw.get_session()
        assert found is not None
        raw.shutdown()  # else OpenSSL forgets the session with the connection
        return found, hello

    session, first = visit(None)
    _, second = visit(session)
    assert len(second) > len(first) + 50  # the pre-shared key that is offered
    assert judge.calls == ["verify", "appraise"] * 2


def test_a_certificate_for_another_purpose(platform: Platform) -> None:
    """OpenSSL's own findings count, beyond those that every certificate of this kind has."""
    key, now = TlsKey.generate(), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "RATS-TLS")])
    builder = x509.CertificateBuilder(name, name, key.private.public_key(), 1, now - timedelta(1), now + timedelta(1))
    usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
    encoded = builder.add_extension(usage, False).sign(key.private, SHA256()).public_bytes(Encoding.DER)
    identity = Identity(key, encoded)
    opened(*ends((identity, ANYBODY), (plain(), ANYBODY)))
    error = refused(*ends((plain(), ANYBODY), (identity, ANYBODY)))
    assert error.stage == "certificate"
    assert "verification error 26" in str(error)


# ---- Hostile bytes


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"A" * 200, b"\xff" * 5])
def test_garbage_instead_of_a_handshake(platform: Platform, data: bytes) -> None:
    server = AttestedConnection(EndpointContext.server(plain(), attested(platform)))
    server.feed(data)
    with pytest.raises(AttestedTlsError) as info:
        server.advance()
    assert info.value.stage == "handshake"
    assert server.state == "closed"
    with pytest.raises(AttestedTlsError):
        server.feed(b"more")


def test_too_many_bytes_before_the_end_of_the_handshake(platform: Platform) -> None:
    server, client = ends((plain(), attested(platform)), (guest(platform), ANYBODY))
    pump(server, client)
    assert server.state == "judging"
    client.judge()
    client.send(bytes(HANDSHAKE_LIMIT - 2 * RECORD_BYTES))
    server.feed(client.outgoing())
    client.send(bytes(2 * RECORD_BYTES))
    with pytest.raises(AttestedTlsError, match="at most"):
        server.feed(client.outgoing())
    assert server.state == "closed"


def test_end_of_input(platform: Platform) -> None:
    server, client = opened(*ends((plain(), attested(platform)), (guest(platform), ANYBODY)))
    client.send(b"last words")
    server.feed(client.outgoing())
    server.feed_end()
    assert server.receive() == b"last words"
    with pytest.raises(AttestedTlsError, match="without close_notify"):
        server.receive()
    assert server.state == "closed"


def test_end_of_input_during_the_handshake(platform: Platform) -> None:
    server = AttestedConnection(EndpointContext.server(plain(), attested(platform)))
    server.feed_end()
    with pytest.raises(AttestedTlsError) as info:
        server.advance()
    assert info.value.stage == "closed"


def test_half_close(platform: Platform) -> None:
    server, client = opened(*ends((plain(), attested(platform)), (guest(platform), ANYBODY)))
    client.send(b"request")
    server.feed(client.outgoing())
    client._connection.shutdown()  # close_notify, while answers are still read
    server.feed(client.outgoing())
    server.feed_end()
    assert [server.receive(), server.receive(), server.receive()] == [b"request", b"", b""]
    server.send(b"answer")
    client.feed(server.outgoing())
    assert client.receive() == b"answer"


def test_closing(platform: Platform) -> None:
    server, client = opened(*ends((plain(), attested(platform)), (guest(platform), ANYBODY)))
    server.close()
    server.close()
    assert server.state == "closed"
    assert server.error is None
    with pytest.raises(AttestedTlsError, match="this end has closed"):
        server.send(b"x")
    client.feed(server.outgoing())
    assert client.receive() == b""


@given(data=st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    server, client = opened(*ends((plain(), Requirement.unattested(certificate=False)), (None, ANYBODY)))
    client.send(b"a message of some length")
    record = bytearray(client.outgoing())
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    server.feed(bytes(record))
    server.feed_end()
    with pytest.raises(AttestedTlsError):
        server.receive()
    assert server.state == "closed"


@given(cuts=st.lists(st.integers(1, 4000), min_size=1, max_size=20))
def test_any_division_of_the_bytes_is_the_same(cuts: list[int]) -> None:
    """Handshake and data, fed in pieces as the network may cut them."""
    platform = PLATFORM
    server, client = ends((IDENTITIES[0], attested(platform)), (IDENTITIES[1], attested(platform)))
    for _ in range(6):
        for near, far in ((client, server), (server, client)):
            if near.state == "handshake":
                near.advance()
            rest, index = near.outgoing(), 0
            while rest:
                cut = cuts[index % len(cuts)]
                far.feed(rest[:cut])
                if far.state == "handshake":
                    far.advance()
                rest, index = rest[cut:], index + 1
    server.judge()
    client.judge()
    client.send(bytes(range(256)) * 300)
    received, index, rest = b"", 0, client.outgoing()
    while rest:
        cut = cuts[index % len(cuts)]
        server.feed(rest[:cut])
        while (piece := server.receive(1000)) is not None:
            assert 1 <= len(piece) <= 1000
            received += piece
        rest, index = rest[cut:], index + 1
    assert received == bytes(range(256)) * 300


PLATFORM = Platform()
IDENTITIES = (guest(PLATFORM), guest(PLATFORM))


def records(data: bytes) -> list[int]:
    sizes = []
    while data:
        size = int.from_bytes(data[3:5], "big")
        sizes.append(size)
        data = data[5 + size :]
    return sizes


def test_records_end_where_messages_end(platform: Platform) -> None:
    server, _client = opened(*ends((plain(), attested(platform)), (guest(platform), ANYBODY)))
    overhead = 17  # content type and tag of TLS 1.3
    for size, expected in ((1, [1]), (16384, [16384]), (16385, [16384, 1]), (40000, [16384, 16384, 7232])):
        server.send(bytes(size))
        assert records(server.outgoing()) == [one + overhead for one in expected]
    server.send(b"")
    assert server.outgoing() == b""


# ---- Arguments


def test_requirements_are_said_clearly(platform: Platform) -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        Requirement.pinned([])
    with pytest.raises(LengthError, match="expected 32"):
        Requirement.pinned([b"short"])
    with pytest.raises(VerificationError, match="no trusted root"):
        PolicyJudge([], POLICY)
    with pytest.raises(ArgumentError, match="one of them"):
        Requirement(attested(platform).judge, frozenset((bytes(32),)), True)
    with pytest.raises(ArgumentError, match="no certificate is asked for"):
        Requirement(None, frozenset((bytes(32),)), False)
    with pytest.raises(ArgumentError, match="always sees"):
        EndpointContext.client(None, Requirement.unattested(certificate=False))
    with pytest.raises(TypeError):
        Requirement()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "arguments", [{"minimum_version": "1.1"}, {"suites": "export"}, {"suites": "sm", "minimum_version": "1.2"}, {"skew": -1}]
)
def test_options_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        TlsOptions(**arguments)


def test_an_identity_of_two_keys() -> None:
    with pytest.raises(ArgumentError, match="do not fit"):
        EndpointContext.server(Identity(TlsKey.generate(), plain().certificate), ANYBODY)
    with pytest.raises(ArgumentError, match="do not fit"):
        EndpointContext.server(Identity(TlsKey.generate(), b"no certificate"), ANYBODY)


def test_claims_without_an_attester() -> None:
    with pytest.raises(ArgumentError, match="vouch"):
        Identity.create(None, custom={"a": b"b"})


def test_receive_nothing(platform: Platform) -> None:
    server, _ = opened(*ends((plain(), attested(platform)), (guest(platform), ANYBODY)))
    with pytest.raises(ArgumentError):
        server.receive(0)


def test_nothing_prints_a_key(platform: Platform) -> None:
    identity = guest(platform)
    number = identity.key.private.private_numbers().private_value
    for text in (repr(identity), repr(identity.key)):
        assert f"{number:x}" not in text
        assert str(number) not in text


@pytest.mark.parametrize("outcome", ["open", "binding", "appraise"])
def test_connections_go_when_nobody_holds_them(platform: Platform, outcome: str) -> None:
    """Thousands of refused peers must not wait for the garbage collector, with 40 kB of OpenSSL's memory each."""
    key = TlsKey.generate()
    identity = {
        "open": guest(platform),
        "binding": Identity(key, make_certificate(key, wrong_user_data(platform, key))),
        "appraise": guest(platform, measure=bytes(32)),
    }[outcome]
    server, client = ends((plain(), attested(platform)), (identity, ANYBODY))
    gc.collect()
    gc.disable()
    try:
        pump(server, client)
        with contextlib.suppress(AttestedTlsError):
            server.judge()
        assert (server.state == "open") == (outcome == "open")
        reference = weakref.ref(server._connection)
        del server
        assert reference() is None
    finally:
        gc.enable()
