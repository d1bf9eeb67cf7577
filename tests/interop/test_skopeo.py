"""skopeo as the peer of our key provider: it encrypts an image and decrypts it again, and says why when it cannot."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broker.grpc_broker import KEK, GrpcBroker
from broker.services import skopeo

from csvfast.broker.administration import LOCAL
from csvfast.broker.clients.keyprovider import KeyProviderClient
from csvfast.broker.keyprovider.messages import read_packet
from csvfast.broker.model import ResourcePath
from csvfast.crypto import Secret

__all__ = ["skopeo"]

TIMEOUT = 120
ANNOTATION = "org.opencontainers.image.enc.keys.provider.attestation-agent"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GrpcBroker]:
    directory = tmp_path / "broker"
    directory.mkdir()
    with GrpcBroker(directory) as made:
        made.put_key()
        yield made


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer(name: str, content: bytes) -> tuple[bytes, str]:
    """(gzip of a tar, digest of the tar)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(file.getvalue(), mtime=0), digest_of(file.getvalue())


class Layout:
    """An OCI image layout on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def blob(self, digest: str) -> bytes:
        return (self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    def manifest(self) -> dict[str, Any]:
        index = json.loads((self.path / "index.json").read_bytes())
        return json.loads(self.blob(index["manifests"][0]["digest"]))  # type: ignore[no-any-return]

    def digests(self) -> list[str]:
        return [one["digest"] for one in self.manifest()["layers"]]

    def add(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = digest_of(data)
        file = self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def tag(self, manifest: dict[str, Any], name: str) -> None:
        """Makes it the layout's only image."""
        found = self.add(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        found["annotations"] = {"org.opencontainers.image.ref.name": name}
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [found]}))


@pytest.fixture
def image(tmp_path: Path) -> Layout:
    """Two layers, tag "clear"."""
    made = Layout(tmp_path / "clear")
    layers = [layer("etc/hello", b"hello " * 1000), layer("etc/secret", bytes(range(256)) * 300)]
    oci = "application/vnd.oci.image"
    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": made.add(json.dumps(config).encode(), f"{oci}.config.v1+json"),
        "layers": [made.add(data, f"{oci}.layer.v1.tar+gzip") for data, _ in layers],
    }
    made.tag(manifest, "clear")
    (made.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return made


class Tool:
    """skopeo with a key provider configuration."""

    def __init__(self, command: list[str], directory: Path, address: str) -> None:
        self.command = command
        self.directory = directory
        configuration = directory / "ocicrypt.json"
        grpc = address.replace("unix:", "unix://") if address.startswith("unix:/") else address
        configuration.write_text(json.dumps({"key-providers": {"attestation-agent": {"grpc": grpc}}}))
        self.environment = {
            "OCICRYPT_KEYPROVIDER_CONFIG": str(configuration), "PATH": "/usr/bin:/bin", "HOME": str(directory),
            "TMPDIR": str(directory), "XDG_RUNTIME_DIR": str(directory),
        }  # fmt: skip

    def copy(self, source: str, target: str, *options: str) -> subprocess.CompletedProcess[str]:
        places = [f"oci:{self.directory}/{name}" for name in (source, target)]
        command = [*self.command, "copy", "--insecure-policy", *options, *places]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=self.directory
        )

    def encrypt(self, parameters: str, *options: str, target: str = "sealed") -> subprocess.CompletedProcess[str]:
        return self.copy("clear:clear", f"{target}:x", "--encryption-key", f"provider:attestation-agent:{parameters}", *options)

    def decrypt(self) -> subprocess.CompletedProcess[str]:
        return self.copy("sealed:x", "opened:x", "--decryption-key", "provider:attestation-agent:csvfast")


def packets(layout: Layout) -> list[bytes]:
    return [base64.b64decode(one["annotations"][ANNOTATION]) for one in layout.manifest()["layers"]]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:run/keys.sock"])
@pytest.mark.parametrize("parameters", ["kbs:///default/key/images", "keyid=images::packet=verdictd", "images"])
def test_round_trip(
    skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path, listen: str, parameters: str
) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(listen, local_trust=not listen.startswith("unix")))
    made = tool.encrypt(parameters)
    assert made.returncode == 0, made.stderr
    sealed = Layout(tmp_path / "sealed")
    assert all(one["mediaType"].endswith("tar+gzip+encrypted") for one in sealed.manifest()["layers"])
    assert set(sealed.digests()).isdisjoint(image.digests())
    style = "verdictd" if "verdictd" in parameters else "coco"
    assert [(read_packet(packet).style, read_packet(packet).path) for packet in packets(sealed)] == [(style, KEK)] * 2
    opened = tool.decrypt()
    assert opened.returncode == 0, opened.stderr
    assert Layout(tmp_path / "opened").digests() == image.digests()
    uses = [record for record in broker.records(door="keyprovider") if record.outcome == "allowed"]
    assert len(uses) == 4  # one for each layer and direction


def test_what_was_wrapped_is_the_layers_key(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True))
    assert tool.encrypt("images").returncode == 0
    found = broker.store.resource(KEK)
    assert found is not None
    sealed = Layout(tmp_path / "sealed")
    for descriptor, packet, clear in zip(sealed.manifest()["layers"], packets(sealed), image.digests(), strict=True):
        options = json.loads(bytes(memoryview(read_packet(packet).open(found.content))))
        assert options["digest"] == clear
        public = json.loads(base64.b64decode(descriptor["annotations"]["org.opencontainers.image.enc.pubopts"]))
        assert public["cipher"] == "AES_256_CTR_HMAC_SHA256"


def test_a_new_key(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True))
    made = tool.encrypt("packet=coco")
    assert made.returncode == 0, made.stderr
    paths = {read_packet(packet).path for packet in packets(Layout(tmp_path / "sealed"))}
    assert len(paths) == 2  # one call, and so one key, for each layer
    assert tool.decrypt().returncode == 0
    assert Layout(tmp_path / "opened").digests() == image.digests()


def test_only_some_layers(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True))
    assert tool.encrypt("images", "--encrypt-layer", "-1").returncode == 0
    kinds = [one["mediaType"].endswith("+encrypted") for one in Layout(tmp_path / "sealed").manifest()["layers"]]
    assert kinds == [False, True]
    assert tool.decrypt().returncode == 0
    assert Layout(tmp_path / "opened").digests() == image.digests()


def test_one_of_several_packets_is_enough(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    address = broker.serve_keys(local_trust=True)
    tool = Tool(skopeo, tmp_path, address)
    other = ResourcePath.parse("default/key/others")
    broker.put_key(other)
    assert tool.encrypt("images").returncode == 0
    found = broker.store.resource(KEK)
    assert found is not None
    sealed = Layout(tmp_path / "sealed")
    manifest = sealed.manifest()
    with KeyProviderClient(address) as client:
        for descriptor, packet in zip(manifest["layers"], packets(sealed), strict=True):
            added = client.wrap(read_packet(packet).open(found.content), "others")
            descriptor["annotations"][ANNOTATION] += "," + base64.b64encode(added).decode()
    sealed.tag(manifest, "x")
    broker.administration.delete_resource(LOCAL, KEK)
    opened = tool.decrypt()
    assert opened.returncode == 0, opened.stderr
    assert Layout(tmp_path / "opened").digests() == image.digests()


def test_errors_reach_the_user(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True))
    for parameters, text in (
        ("missing", "there is no resource default/key/missing"),
        ("keyid=images::keypath=/etc/shadow", "keypath"),
        ("../../etc/passwd", "resource path"),
    ):
        refused = tool.encrypt(parameters, target="refused")
        assert refused.returncode == 1
        assert text in refused.stderr
    two = tool.encrypt("images", "--encryption-key", "provider:attestation-agent:others", target="refused")
    assert two.returncode == 1
    assert "2 different keys" in two.stderr
    assert tool.encrypt("images").returncode == 0
    broker.administration.put_resource(LOCAL, KEK, Secret(bytes(range(32))))
    broker.administration.retire_resource(LOCAL, KEK, 1)
    refused = tool.decrypt()
    assert refused.returncode == 1
    assert "does not open with the key" in refused.stderr
    broker.administration.delete_resource(LOCAL, KEK)
    refused = tool.decrypt()
    assert refused.returncode == 1
    assert "there is no resource" in refused.stderr
    assert not (tmp_path / "opened" / "index.json").exists()


def test_nobody_is_refused(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    assert Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True)).encrypt("images").returncode == 0
    stranger = Tool(skopeo, tmp_path, broker.serve_keys())
    for refused in (stranger.decrypt(), stranger.encrypt("images", target="refused")):
        assert refused.returncode == 1
        assert "Unauthenticated" in refused.stderr
        assert "not authenticated (" in refused.stderr


def test_provider_down(skopeo: list[str], broker: GrpcBroker, image: Layout, tmp_path: Path) -> None:
    tool = Tool(skopeo, tmp_path, broker.serve_keys(local_trust=True))
    assert tool.encrypt("images").returncode == 0
    broker.stop_servers()
    refused = tool.decrypt()
    assert refused.returncode == 1
    assert "connection refused" in refused.stderr
