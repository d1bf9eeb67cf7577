"""Guests with simulated chips, and two ends of a connection in one process, for the tests of attested TLS."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from attest.simulated_evidence import MEASURE, Platform

from csvfast.attest import AppraisalPolicy
from csvfast.errors import AttestedTlsError
from csvfast.ratstls.connection import AttestedConnection
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions
from csvfast.ratstls.peer import PolicyJudge, Requirement
from csvfast.report import Evidence

POLICY = AppraisalPolicy.from_dict({"measurements": [MEASURE.hex()], "policy": {"required": ["nodbg"]}})


class SimulatedAttester:
    """Makes evidence as a guest's kernel would hand it out; `changes` go into the report."""

    def __init__(self, platform: Platform, **changes: Any) -> None:
        self.platform = platform
        self.changes = {"sealing_key": bytes(32)} | changes

    def evidence(self, report_data: bytes) -> Evidence:
        return self.platform.evidence(**({"report_data": report_data} | self.changes))


def guest(platform: Platform, *, kind: str = "p256", layout: Any = "rats-tls", custom: Mapping[str, bytes] | None = None,
          **changes: Any) -> Identity:  # fmt: skip
    return Identity.create(SimulatedAttester(platform, **changes), kind=kind, layout=layout, custom=custom)


def plain(kind: str = "p256") -> Identity:
    return Identity.create(None, kind=kind)


def attested(platform: Platform, policy: AppraisalPolicy = POLICY, **more: Any) -> Requirement:
    return Requirement.attested(PolicyJudge(platform.roots, policy, **more))


def ends(
    server: tuple[Identity, Requirement], client: tuple[Identity | None, Requirement], options: TlsOptions | None = None
) -> tuple[AttestedConnection, AttestedConnection]:
    options = options or TlsOptions()
    return (
        AttestedConnection(EndpointContext.server(*server, options), "server's peer"),
        AttestedConnection(EndpointContext.client(*client, options), "client's peer"),
    )


def pump(*pair: AttestedConnection) -> None:
    """Carries bytes both ways until both are silent; who has failed no longer listens."""
    for _ in range(10):
        moved = False
        for near, far in (pair, pair[::-1]):
            if near.state == "handshake":
                with contextlib.suppress(AttestedTlsError):
                    near.advance()
            data = near.outgoing()
            if data and far.state != "closed":
                far.feed(data)
                moved = True
        if not moved:
            return


def opened(server: AttestedConnection, client: AttestedConnection) -> tuple[AttestedConnection, AttestedConnection]:
    pump(server, client)
    server.judge()
    client.judge()
    pump(server, client)
    return server, client
