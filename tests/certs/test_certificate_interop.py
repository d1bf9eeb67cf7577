"""Certificates judged by somebody else: the OpenSSL command line, over the bytes the specification says are signed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from csvfast.certs import CaCertificate, CsvCertificate, hygon_root
from csvfast.certs.factory import ChainFactory
from csvfast.crypto.sm2 import dump_public_key, signature_to_der

ROOT = Path(__file__).parents[2]


def openssl_accepts(folder: Path, issuer: CaCertificate | CsvCertificate, user_id: bytes, body: bytes, raw: bytes) -> bool:
    (folder / "key.pem").write_bytes(dump_public_key(issuer.public_key))
    (folder / "body").write_bytes(body)
    (folder / "signature").write_bytes(signature_to_der(raw))
    identity = f"distid:{user_id.decode()}"
    done = subprocess.run(
        ["openssl", "dgst", "-sm3", "-verify", "key.pem", "-signature", "signature", "-sigopt", identity, "body"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode == 0 and "Verified OK" in done.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_openssl_verifies_every_link(tmp_path: Path, factory: ChainFactory) -> None:
    hrk, hsk = (CaCertificate.parse(factory.encodings[role]) for role in ("HRK", "HSK"))
    cek, oca, pek, pdh = (CsvCertificate.parse(factory.encodings[role]) for role in ("CEK", "OCA", "PEK", "PDH"))
    real = hygon_root()
    links = [
        (real, real, real.encoded[:576], real.signature),
        (hrk, hrk, hrk.encoded[:576], hrk.signature),
        (hsk, hrk, hsk.encoded[:576], hsk.signature),
        (cek, hsk, cek.encoded[:1044], cek.slots[0].signature),
        (oca, oca, oca.encoded[:1044], oca.slots[0].signature),
        (pek, cek, pek.encoded[:1044], pek.slots[0].signature),
        (pek, oca, pek.encoded[:1044], pek.slots[1].signature),
        (pdh, pek, pdh.encoded[:1044], pdh.slots[0].signature),
    ]
    for subject, issuer, body, signature in links:
        assert openssl_accepts(tmp_path, issuer, issuer.user_id, body, signature), subject
        assert not openssl_accepts(tmp_path, issuer, b"1234567812345678", body, signature)
        assert not openssl_accepts(tmp_path, issuer, issuer.user_id, body[:-1] + b"\1", signature)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")
def test_examples_of_the_documentation() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/certificates.md").read_text(encoding="utf-8"), re.DOTALL)
    offline = [block for block in blocks if "ManufacturingLine" in block or "ChainFactory" in block]
    assert len(offline) == 2
    assert len(blocks) == 3  # the third reads files of a real chip
    for block in offline:
        exec(block, {})
