"""Writes tests/vectors/ratstls: certificates of one simulated chip in both layouts, and what they say.

Made once and kept: a reader that refuses them tomorrow has broken with what was deployed. Run from the checkout:

    PYTHONPATH=tests:. python tests/ratstls/make_vectors.py
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from attest.simulated_evidence import Platform
from ratstls.attested import PlatformAttester

from csvfast.ratstls.certificate import attest_certificate, make_certificate
from csvfast.ratstls.claims import encode_claims, encode_evidence_buffer, report_data_of
from csvfast.ratstls.keys import TlsKey

DIRECTORY = Path(__file__).parents[1] / "vectors" / "ratstls"
BEGIN, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
CUSTOM = {"key_0": b"value_0\0", "key_1": b"value_1\0"}


def main() -> None:
    platform = Platform()
    attester = PlatformAttester(platform)
    validity = {"not_before": BEGIN, "not_after": END}
    files: dict[str, tuple[TlsKey, bytes]] = {}
    for kind in ("p256", "rsa3072", "sm2"):
        for layout in ("rats-tls", "librats"):
            key = TlsKey.generate(kind)
            files[f"{kind}-{layout}"] = key, attest_certificate(key, attester, custom=CUSTOM, layout=layout, **validity)  # type: ignore[arg-type]
    for hash_id in (7, 8):
        key = TlsKey.generate()
        claims = encode_claims(key.spki, hash_id=hash_id)
        raw = attester.evidence(report_data_of(claims)).to_rats_tls()
        files[f"p256-hash-{hash_id}"] = key, make_certificate(key, encode_evidence_buffer(raw, claims), **validity)
    key = TlsKey.generate()
    claims = encode_claims(key.spki)
    buffer = encode_evidence_buffer(attester.evidence(report_data_of(claims)).to_rats_tls(), claims)
    files["p256-critical"] = key, make_certificate(key, buffer, critical=True, **validity)
    key = TlsKey.generate()
    files["p256-no-evidence"] = key, make_certificate(key, None, **validity)
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / "root.cert").write_bytes(platform.line.root.encoded)
    expected = {}
    for name, (key, der) in files.items():
        (DIRECTORY / f"{name}.der").write_bytes(der)
        expected[name] = {
            "sha256": hashlib.sha256(der).hexdigest(),
            "kind": key.kind,
            "spki_sha256": hashlib.sha256(key.spki).hexdigest(),
        }
    document = {
        "chip_id": platform.chip.chip_id,
        "measure": platform.fields()["measure"].hex(),
        "custom": {name: value.hex() for name, value in CUSTOM.items()},
        "not_before": BEGIN.isoformat(),
        "not_after": END.isoformat(),
        "certificates": expected,
    }
    (DIRECTORY / "expected.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
