"""The Python of docs/attested-tls.md runs as it is written, with the names it leaves open filled in."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, Platform
from ratstls.simulated_peers import SimulatedAttester, attested, ends, guest, opened, plain

from csvfast.ratstls import BlockingServer, Identity, Requirement

PAGE = Path(__file__).parents[2] / "docs" / "attested-tls.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the tests stand outside a source tree")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    client, server, fresh = blocks()

    # A guest connects; the device is the simulated chip, the broker an echo.
    monkeypatch.setattr("csvfast.ratstls.DeviceAttester", lambda certificates: SimulatedAttester(platform))
    identity = plain()

    def echo(stream: Any) -> None:
        stream.send(stream.receive())

    with BlockingServer(("127.0.0.1", 0), identity, attested(platform), echo) as broker:
        names: dict[str, Any] = {"store": None, "server_key": identity.key.spki_sha256, "address": broker.address}
        exec(client.replace('("broker.example", 20220)', "address"), names)
    assert names["answer"] == b"request"

    # A server lets guests in, and the client of the same package talks to it.
    async def visit(address: tuple[str, int]) -> None:
        from csvfast.ratstls import open_connection

        stream = await open_connection(address, guest(platform), Requirement.unattested())
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        stream.close()

    names = {"measurement": MEASURE.hex(), "roots": platform.roots, "visit": visit}
    exec(server.replace("        ...", "        await visit((host, port))"), names)
    asyncio.run(asyncio.wait_for(names["main"](), 20))

    # Freshness.
    identity = guest(platform)
    requirement = attested(platform)
    ours, theirs = opened(*ends((plain(), requirement), (identity, Requirement.unattested())))
    names = {
        "stream": ours, "client": theirs, "requirement": requirement, "identity": identity,
        "attester": SimulatedAttester(platform),
    }  # fmt: skip
    exec(fresh, names)
    assert names["reply"] == {"status": "OK", "valid_for": 300}
    assert isinstance(identity, Identity)
