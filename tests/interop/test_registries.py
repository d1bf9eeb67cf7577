"""docker-registry and skopeo as peers: our client with the real registry, the real client with ours."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker.services import skopeo
from image.small_images import put_image, put_index

from csvfast.cli import main
from csvfast.errors import RegistryError
from csvfast.image.blobs import read_blob, resolve_manifest
from csvfast.image.copy import copy_image
from csvfast.image.descriptor import Descriptor, digest_of
from csvfast.image.layout import OciLayout
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient, open_source, open_target
from csvfast.image.server import EmbeddedRegistry

__all__ = ["skopeo"]

TIMEOUT = 60
BIG = os.urandom(1 << 20) * 9  # two pieces of an upload


@pytest.fixture(scope="module")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    directory = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{directory}/data'}}, delete: {{enabled: true}}}}\n"
    )
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([program, "serve", directory / "config.yml"], stdout=log, stderr=log, cwd=directory)
        try:
            until = time.monotonic() + TIMEOUT
            with RegistryClient(parse_reference(f"docker://{address}/x"), retries=0) as registry:
                while True:
                    try:
                        registry.ping()
                        break
                    except RegistryError:
                        assert server.poll() is None, (directory / "log").read_text()
                        assert time.monotonic() < until
                        time.sleep(0.05)
            yield address
        finally:
            server.terminate()
            server.wait(TIMEOUT)


def test_push_and_pull(docker_registry: str, tmp_path: Path) -> None:
    local, back = OciLayout(tmp_path / "local", create=True), OciLayout(tmp_path / "back", create=True)
    manifest = put_image(local, "1", BIG, b"", b"x")
    index = put_index(local, "multi")
    with RegistryClient(parse_reference(f"docker://{docker_registry}/team/app")) as registry:
        copy_image(local, registry, wanted="1", tag="1")
        copy_image(local, registry, wanted="multi", tag="multi", platform="all")
        assert sorted(registry.tags()) == ["1", "multi"]
        assert resolve_manifest(registry, "1")[1] == manifest
        assert resolve_manifest(registry, "multi", architecture="arm64")[0] == index.manifests[1]
        assert read_blob(registry, manifest.layers[0], 1 << 30) == BIG
        with registry.open_blob(manifest.layers[0], len(BIG) - 3) as reader:
            assert reader.read(9) == BIG[-3:]
        assert registry.has_blob(manifest.layers[0])
        assert not registry.has_blob(Descriptor.of(b"missing", "a/b"))
        copy_image(registry, back, wanted="1", tag="1")
        copy_image(registry, back, wanted="multi", tag="multi", platform="all")
        with RegistryClient(parse_reference(f"docker://{docker_registry}/other")) as other:
            assert other.mount(manifest.layers[0], "team/app")
            assert not other.mount(Descriptor.of(b"missing", "a/b"), "team/app")
            copy_image(registry, other, wanted="1", tag="y")
        with pytest.raises(RegistryError, match="404 MANIFEST_UNKNOWN") as caught:
            registry.resolve("2")
        assert caught.value.status == 404
        with pytest.raises(RegistryError, match="404 BLOB_UNKNOWN"):
            registry.open_blob(Descriptor.of(b"missing", "a/b"))
        with pytest.raises(RegistryError, match="404 MANIFEST_UNKNOWN"):
            registry.resolve(digest_of(b"missing"))
    for tag in ("1", "multi"):
        assert back.resolve(tag)[1] == local.resolve(tag)[1]


def test_commands(
    docker_registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfast.image.registry._FIRST_PAUSE", 0.01)
    put_image(OciLayout(tmp_path / "local", create=True), "1", b"layer")
    place = f"docker://{docker_registry}/commands:2"
    assert main(["image", "push", f"oci:{tmp_path}/local:1", place]) == 0
    assert main(["image", "pull", place, f"oci:{tmp_path}/back"]) == 0
    assert main(["image", "copy", f"oci:{tmp_path}/back:2", f"oci:{tmp_path}/again:3"]) == 0
    capsys.readouterr()
    assert main(["image", "inspect", f"oci:{tmp_path}/again:3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["platform"] == "linux/amd64"
    assert [layer["digest"] for layer in shown["layers"]] == [digest_of(b"layer")]
    assert not shown["layers"][0]["encrypted"]
    assert main(["image", "inspect", f"docker://{docker_registry}/commands:none"]) == 2
    assert "MANIFEST_UNKNOWN" in capsys.readouterr().err
    assert main(["image", "inspect", "docker://127.0.0.1:1/commands"]) == 3
    assert main(["image", "push", place, f"oci:{tmp_path}/local:1"]) == 2


def run(command: list[str], directory: Path, *arguments: str) -> str:
    environment = {"HOME": str(directory), "PATH": "/usr/bin:/bin", "TMPDIR": str(directory), "XDG_RUNTIME_DIR": str(directory)}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_skopeo_and_our_registry(skopeo: list[str], tmp_path: Path) -> None:
    local = OciLayout(tmp_path / "local", create=True)
    put_image(local, "1", gzip.compress(b"layer"), gzip.compress(b"another"))
    with EmbeddedRegistry(tmp_path / "registry", token=b"secret") as registry:
        place = f"docker://{registry.address}/team/app:1"
        run(skopeo, tmp_path, "copy", "--insecure-policy", "--dest-tls-verify=false", "--dest-creds=x:secret",
            "--preserve-digests", f"oci:{local.path}:1", place)  # fmt: skip
        run(skopeo, tmp_path, "copy", "--insecure-policy", "--src-tls-verify=false", "--src-creds=x:secret", place,
            f"oci:{tmp_path}/back:1")  # fmt: skip
        tags = run(skopeo, tmp_path, "list-tags", "--tls-verify=false", "--creds=x:secret", place.rpartition(":")[0])
    assert json.loads(tags)["Tags"] == ["1"]
    assert OciLayout(tmp_path / "back").resolve("1")[1] == local.resolve("1")[1]


def test_skopeo_takes_what_we_pushed(skopeo: list[str], docker_registry: str, tmp_path: Path) -> None:
    """And we take what it pushed, layouts included."""
    local = OciLayout(tmp_path / "local", create=True)
    put_image(local, "1", gzip.compress(b"layer"), gzip.compress(b"another"))
    ours, theirs = f"docker://{docker_registry}/ours:1", f"docker://{docker_registry}/theirs:1"
    with open_target(parse_reference(ours)) as target:
        copy_image(local, target, wanted="1", tag="1")
    run(skopeo, tmp_path, "copy", "--insecure-policy", "--src-tls-verify=false", ours, f"oci:{tmp_path}/taken:1")
    run(skopeo, tmp_path, "copy", "--insecure-policy", "--dest-tls-verify=false", "--preserve-digests",
        f"oci:{tmp_path}/taken:1", theirs)  # fmt: skip
    with open_source(parse_reference(theirs)) as source:
        assert source.resolve("1")[1] == local.resolve("1")[1]
        copy_image(source, OciLayout(tmp_path / "taken"), wanted="1", tag="2")
    run(skopeo, tmp_path, "copy", "--insecure-policy", f"oci:{tmp_path}/taken:2", f"oci:{tmp_path}/last:1")
    assert OciLayout(tmp_path / "last").resolve(None)[1] == local.resolve("1")[1]
