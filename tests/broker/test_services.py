"""The services that other tests stand on."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from broker.services import PostgresCluster, SoftHsmToken


def test_postgres_database_survives_stop_and_kill(postgres: PostgresCluster, postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE numbers (number integer)"))
        for number, mode in enumerate(("fast", "immediate", "kill")):
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(f"INSERT INTO numbers VALUES ({number})"))
            postgres.restart(mode)
            engine.dispose()
            with engine.connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT count(*) FROM numbers")) == number + 1
    finally:
        engine.dispose()


def test_postgres_kill_leaves_no_process(postgres: PostgresCluster, postgres_url: str) -> None:
    process = postgres._process
    assert process is not None
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        backend = connection.info.backend_pid
        postgres.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{backend}").exists() and time.monotonic() < deadline:
            # Without an init that reaps it, a killed child of a killed parent stays as a zombie.
            if Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.01)
        else:
            assert not Path(f"/proc/{backend}").exists()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not postgres.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres_url.replace("+psycopg", ""), connect_timeout=5)


def test_postgres_runs_again_for_the_next_test(postgres: PostgresCluster) -> None:
    assert postgres.running
    assert postgres.execute("SELECT 1") == [(1,)]


def test_postgres_wants_its_password(postgres: PostgresCluster, postgres_url: str) -> None:
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"host=127.0.0.1 port={postgres.port} user={postgres.user} password=wrong dbname=postgres")


def test_postgres_close_removes_its_directory() -> None:
    cluster = PostgresCluster({"fsync": "off"})
    assert cluster.execute("SHOW fsync") == [("off",)]
    cluster.close()
    assert not cluster.directory.exists()
    assert not cluster.running
    assert os.getpgrp()  # nothing of ours was killed with it


def test_softhsm_tokens_are_apart(softhsm_token: SoftHsmToken) -> None:
    import pkcs11

    library = pkcs11.lib(softhsm_token.module)
    library.reinitialize()  # sees tokens that were made since
    token = library.get_token(token_label=softhsm_token.label)
    with token.open(user_pin=softhsm_token.pin) as session:
        assert list(session.get_objects()) == []
    configuration = Path(os.environ["SOFTHSM2_CONF"])
    assert configuration.parent.name.startswith("csvfast-softhsm-")


def test_skopeo_knows_key_providers(skopeo: list[str], tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    layer = blob(tar.getvalue())
    image = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **blob(json.dumps(image).encode())},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **layer}],
    }
    entry = {"mediaType": manifest["mediaType"], **blob(json.dumps(manifest).encode())}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    # A provider that answers something: skopeo must ask it, which old versions do not.
    provider = tmp_path / "provider"
    provider.write_text(
        f"#!{sys.executable}\nimport json, sys\nrequest = json.load(sys.stdin)\nassert request['op'] == 'keywrap'\n"
        "json.dump({'keywrapresults': {'annotation': list(b'packet')}}, sys.stdout)\n"
    )
    provider.chmod(0o755)
    providers = {"key-providers": {"test": {"cmd": {"path": str(provider), "args": []}}}}
    (tmp_path / "ocicrypt.json").write_text(json.dumps(providers))
    images = (f"oci:{layout}:latest", f"oci:{tmp_path}/out:x")
    ended = subprocess.run(
        [*skopeo, "--insecure-policy", "copy", "--encryption-key", "provider:test:key", *images],
        env={**os.environ, "OCICRYPT_KEYPROVIDER_CONFIG": str(tmp_path / "ocicrypt.json")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    out = json.loads((tmp_path / "out" / "index.json").read_text())["manifests"][0]["digest"].partition(":")[2]
    annotations = json.loads((tmp_path / "out" / "blobs" / "sha256" / out).read_text())["layers"][0]["annotations"]
    assert base64.b64decode(annotations["org.opencontainers.image.enc.keys.provider.test"]) == b"packet"
