"""docker-registry and skopeo as peers: our client with the real registry, the real client with ours."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from broker.services import skopeo
from image.scripted_server import write_certificate
from image.small_images import put_image, put_index

from csvfast.cli import main
from csvfast.errors import RegistryError
from csvfast.image.blobs import read_blob, resolve_manifest
from csvfast.image.copy import copy_image
from csvfast.image.descriptor import Descriptor, digest_of
from csvfast.image.layout import OciLayout
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient, open_source, open_target
from csvfast.image.registry_auth import find_credentials
from csvfast.image.server import EmbeddedRegistry

__all__ = ["skopeo"]

TIMEOUT = 60
BCRYPT = "$2b$04$abcdefghijklmnopqrstuugIEnm3ZbWF6xb2GcoE3L1CoGJFMKtu."  # of "swordfish", at the lowest cost
BIG = os.urandom(1 << 20) * 9  # two pieces of an upload


@contextmanager
def running(directory: Path, more: str = "", **options: Any) -> Iterator[str]:
    """A docker-registry on a port of its own: host:port. In: more   of its configuration, options   of the client that waits."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: '{directory}/data'}}}}\n"
        f"http:\n  addr: '{address}'\n{more}"
    )
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([program, "serve", directory / "config.yml"], stdout=log, stderr=log, cwd=directory)
        try:
            until = time.monotonic() + TIMEOUT
            with RegistryClient(parse_reference(f"docker://{address}/x"), retries=0, **options) as registry:
                while True:
                    try:
                        registry.ping()
                        break
                    except RegistryError as error:
                        if error.status:
                            break
                        assert server.poll() is None, (directory / "log").read_text()
                        assert time.monotonic() < until
                        time.sleep(0.05)
            yield address
        finally:
            server.terminate()
            server.wait(TIMEOUT)


@pytest.fixture(scope="module")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port."""
    with running(tmp_path_factory.mktemp("registry")) as address:
        yield address


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


def test_tls_and_a_password(tmp_path: Path) -> None:
    write_certificate(tmp_path / "tls.pem")
    (tmp_path / "htpasswd").write_text(f"user:{BCRYPT}\n")
    put_image(OciLayout(tmp_path / "local", create=True), "1", b"layer")
    configuration = (
        f"  tls: {{certificate: '{tmp_path}/tls.pem', key: '{tmp_path}/tls.pem'}}\n"
        f"auth: {{htpasswd: {{realm: test, path: '{tmp_path}/htpasswd'}}}}\n"
    )
    tls = ssl.create_default_context(cafile=str(tmp_path / "tls.pem"))
    with running(tmp_path, configuration, plain_http=False, tls=tls, credentials=None) as address:
        place = parse_reference(f"docker://{address}/app:1")
        for password, fits in (("swordfish", True), ("herring", False)):
            auth = {"auths": {address: {"auth": base64.b64encode(f"user:{password}".encode()).decode()}}}
            (tmp_path / "auth.json").write_text(json.dumps(auth))
            credentials = find_credentials(address, "app", [tmp_path / "auth.json"])
            with RegistryClient(place, plain_http=False, tls=tls, credentials=credentials) as registry:
                if fits:
                    copy_image(OciLayout(tmp_path / "local"), registry, wanted="1", tag="1")
                    assert resolve_manifest(registry, "1")[1] == resolve_manifest(OciLayout(tmp_path / "local"), "1")[1]
                    continue
                with pytest.raises(RegistryError, match="status 401 UNAUTHORIZED"):
                    registry.resolve("1")
        for options, problem in (
            ({"tls": tls, "credentials": None}, "401 UNAUTHORIZED: .*; no credentials are known"),
            ({"credentials": credentials}, "certificate: self-signed certificate"),
        ):
            with (
                RegistryClient(place, plain_http=False, **options) as stranger,  # type: ignore[arg-type]
                pytest.raises(RegistryError, match=problem),
            ):
                stranger.resolve("1")


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
