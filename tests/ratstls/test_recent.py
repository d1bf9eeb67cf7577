"""Certificates of peers that were accepted: read once, looked at each time."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from broker.simulated_guest import SimulatedMachine

from csvfast.attest import AppraisalPolicy
from csvfast.errors import AttestedTlsError
from csvfast.ratstls import context as context_module
from csvfast.ratstls.certificate import attest_certificate, make_certificate
from csvfast.ratstls.connection import AttestedConnection
from csvfast.ratstls.context import EndpointContext, Identity
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import PolicyJudge, Requirement
from csvfast.ratstls.recent import Recent


def test_the_least_recently_used_goes() -> None:
    recent: Recent[int] = Recent(2)
    recent.keep(b"a", 1)
    recent.keep(b"b", 2)
    assert recent.find(b"a") == 1
    recent.keep(b"c", 3)
    assert (recent.find(b"a"), recent.find(b"b"), recent.find(b"c"), len(recent)) == (1, None, 3, 2)
    recent.keep(b"a", 4)
    assert recent.find(b"a") == 4


def meet(server: EndpointContext, client: EndpointContext) -> AttestedConnection:
    """A handshake in memory; the server's end once it is open. AttestedTlsError: it refuses."""
    ends = AttestedConnection(server, "client"), AttestedConnection(client, "server")
    for _ in range(6):
        for own, other in (ends[::-1], ends):
            if own.advance() == "judging":
                own.judge()
            if data := own.outgoing():
                other.feed(data)
    assert ends[0].advance() == "open"
    return ends[0]


@pytest.fixture
def ends(tmp_path: Any) -> Any:
    with SimulatedMachine() as machine:
        (tmp_path / "firmware").write_bytes(bytes(65536))
        guest = machine.launch(tmp_path / "firmware")
        judge = PolicyJudge(machine.roots, AppraisalPolicy(measurements=(guest.measure,)))
        key = TlsKey.generate()
        identity = Identity(key, make_certificate(key, None))
        server = EndpointContext.server(identity, Requirement.attested(judge), context_module.TlsOptions())
        yield guest, server


def client_of(guest: Any, **more: Any) -> EndpointContext:
    key = TlsKey.generate()
    identity = Identity(key, attest_certificate(key, guest, **more))
    return EndpointContext.client(identity, Requirement.unattested(), context_module.TlsOptions())


def test_read_once_and_judged_each_time(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, server = ends
    client = client_of(guest)
    first = meet(server, client).peer
    assert len(server.known) == 1
    calls: list[object] = []
    whole = PolicyJudge.verify
    monkeypatch.setattr(PolicyJudge, "verify", lambda judge, shown: (calls.append(shown), whole(judge, shown))[1])
    monkeypatch.setattr(context_module, "read_certificate", lambda _encoded: 1 / 0)
    again = meet(server, client).peer
    assert again.certificate is first.certificate
    assert len(calls) == 1
    with pytest.raises(AttestedTlsError, match="ZeroDivisionError"):
        meet(server, client_of(guest))


def test_validity_is_looked_at_each_time(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, server = ends
    client = client_of(guest)
    meet(server, client)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=800)

    monkeypatch.setattr("csvfast.ratstls.certificate.datetime", Later)
    with pytest.raises(AttestedTlsError, match="not valid after"):
        meet(server, client)


def test_refused_peers_are_not_kept(ends: Any, tmp_path: Any) -> None:
    _guest, server = ends
    with SimulatedMachine() as other:
        (tmp_path / "another").write_bytes(bytes(65536))
        stranger = other.launch(tmp_path / "another")
        with pytest.raises(AttestedTlsError):
            meet(server, client_of(stranger))
    assert len(server.known) == 0
