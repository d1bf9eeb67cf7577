"""The Python and the configuration of docs/broker-verdictd.md are right as they stand there."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import Platform
from broker.verdictd_rig import KEY, Rig
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import csvfast
from csvfast.broker.config import VerdictdConfig, _read

PAGE = Path(__file__).parents[2] / "docs" / "broker-verdictd.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests stand outside a source tree")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    nonce = os.urandom(12)
    names: dict[str, Any] = {
        "csvfast": csvfast,
        "pytest": pytest,
        "encrypted": base64.b64encode(AESGCM(KEY).encrypt(nonce, b"layer", None)).decode(),
        "iv": base64.b64encode(nonce).decode(),
    }
    (block,) = blocks("python")
    raising = r"\1with pytest.raises(csvfast.errors.DeniedError): \2"
    block = re.sub(r"^( +)(\S.*?) +# DeniedError\b.*$", raising, block, flags=re.MULTILINE)
    assert "pytest.raises" in block
    with Rig(tmp_path, platform) as rig:
        rig.put("tenant-a/disk/one", b"one")
        rig.put("verdictd/image/policy", b"{}")
        monkeypatch.setattr("csvfast.ratstls.DeviceAttester", rig.attester)

        async def work() -> None:
            names["spki_sha256"] = rig.door.identity.key.spki_sha256
            await asyncio.to_thread(exec, block.replace('("broker", 1234)', repr(rig.address)), names)

        rig.run(work)
        done = [(record.action, record.resource) for record in rig.records(outcome="allowed")]
        assert ("unwrap", "default/key/disk") in done
        assert ("release", "verdictd/image/policy") in done


def test_configuration_is_one(tmp_path: Path) -> None:
    import tomllib

    (block,) = blocks("toml")
    found = _read(VerdictdConfig, "verdictd", tomllib.loads(textwrap.dedent(block))["verdictd"], tmp_path)
    assert found == VerdictdConfig(key=tmp_path / "tls.key", tls12=True, attester="device")
