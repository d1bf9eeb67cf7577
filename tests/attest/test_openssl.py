"""A report's signature according to the OpenSSL command: over the masked bytes, with the PEK's user id, and not otherwise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from attest.simulated_evidence import Platform

from csvfast.crypto.sm2 import dump_public_key, signature_to_der
from csvfast.report import Report, read_evidence

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")


def openssl_accepts(report: Report, message: bytes, folder: Path, user_id: str = "HYGON-SSD-PEK") -> bool:
    (folder / "pek.pem").write_bytes(dump_public_key(report.pek.public_key))
    (folder / "signature").write_bytes(signature_to_der(report.signature))
    (folder / "message").write_bytes(message)
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "pek.pem", "-rawin", "-digest", "sm3",
         "-pkeyopt", f"distid:{user_id}", "-in", "message", "-sigfile", "signature"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "erif" in done.stdout, done.stderr  # "Signature Verified Successfully" or "Signature Verification Failure"
    return done.returncode == 0


def check(report: Report, folder: Path) -> None:
    assert openssl_accepts(report, report.signed_bytes, folder)
    assert not openssl_accepts(report, report.signed_bytes, folder, "1234567812345678")
    assert not openssl_accepts(report, report.signed_bytes[:-1] + bytes([report.signed_bytes[-1] ^ 1]), folder)
    if report.version == 1:
        assert not openssl_accepts(report, report.info[:0xB4], folder)


def test_real_report(real_evidence: bytes, tmp_path: Path) -> None:
    check(read_evidence(real_evidence).report, tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_simulated_report(version: int, tmp_path: Path) -> None:
    check(Platform().evidence(version).report, tmp_path)
