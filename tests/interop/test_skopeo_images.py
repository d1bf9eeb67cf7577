"""Images that skopeo encrypts and csvfast decrypts, and the other way round, through a key provider and by JWE."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker.grpc_broker import GrpcBroker
from broker.services import skopeo
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from image.crypt_images import LAYER, MARK, blob, everything_below, local, make_image, manifest_of
from interop.test_registries import docker_registry

from csvfast.crypto import Secret
from csvfast.errors import ImageError
from csvfast.image.annotations import KEYS, packets_of
from csvfast.image.decrypt import decrypt_image
from csvfast.image.encrypt import encrypt_image
from csvfast.image.jwe_reader import JweKey
from csvfast.image.keys import Recipient
from csvfast.image.layout import OciLayout
from csvfast.image.providers import GrpcProvider
from csvfast.image.recipients import add_recipients, rewrap
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient
from csvfast.image.suites import SM4_128_CTR_HMAC_SM3

__all__ = ["docker_registry", "skopeo"]

TIMEOUT = 120
PROVIDER = "attestation-agent"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcBroker]:
    with GrpcBroker(tmp_path_factory.mktemp("broker")) as made:
        made.put_key()
        yield made


@pytest.fixture(scope="module")
def address(broker: GrpcBroker) -> str:
    return broker.serve_keys(local_trust=True)


@pytest.fixture
def provider(address: str) -> Iterator[GrpcProvider]:
    with GrpcProvider(PROVIDER, address, "images") as made:
        yield made


class Tool:
    def __init__(self, command: list[str], directory: Path, address: str) -> None:
        configuration = directory / "ocicrypt.json"
        configuration.write_text(json.dumps({"key-providers": {PROVIDER: {"grpc": address}}}))
        self.command, self.directory = command, directory
        self.environment = {
            "OCICRYPT_KEYPROVIDER_CONFIG": str(configuration), "PATH": "/usr/bin:/bin", "HOME": str(directory),
            "TMPDIR": str(directory), "XDG_RUNTIME_DIR": str(directory),
        }  # fmt: skip

    def copy(self, source: str, target: str, *options: str) -> subprocess.CompletedProcess[str]:
        places = [name if "://" in name else f"oci:{self.directory}/{name}" for name in (source, target)]
        plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        return subprocess.run(
            [*self.command, "copy", "--insecure-policy", *plain, *options, *places],
            env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=self.directory,
        )  # fmt: skip

    def encrypt(self, *options: str, key: str = f"provider:{PROVIDER}:images") -> None:
        made = self.copy("clear:clear", "sealed:x", "--encryption-key", key, *options)
        assert made.returncode == 0, made.stderr

    def decrypt(
        self, key: str = f"provider:{PROVIDER}:csvfast", *, source: str = "sealed:x", target: str = "opened"
    ) -> subprocess.CompletedProcess[str]:
        return self.copy(source, f"{target}:x", "--decryption-key", key)


@pytest.fixture
def tool(skopeo: list[str], tmp_path: Path, address: str) -> Tool:
    return Tool(skopeo, tmp_path, address)


@pytest.fixture
def clear(tmp_path: Path) -> OciLayout:
    return make_image(tmp_path / "clear", size=1_300_000)  # layers of several blocks


def same_image(layout: OciLayout, clear: OciLayout, tag: str = "x") -> None:
    """The same blobs under the same names; tools write manifests each in their own way."""
    one, other = manifest_of(layout, tag), manifest_of(clear, "clear")
    assert (one.config, one.layers) == (other.config, other.layers)
    assert [blob(layout, layer) for layer in one.layers] == [blob(clear, layer) for layer in other.layers]


@pytest.mark.parametrize("parameters", ["images", "keyid=images::packet=verdictd"])
def test_skopeo_encrypts(tool: Tool, clear: OciLayout, provider: GrpcProvider, tmp_path: Path, parameters: str) -> None:
    tool.encrypt(key=f"provider:{PROVIDER}:{parameters}")
    opened = OciLayout(tmp_path / "ours", create=True)
    decrypt_image(OciLayout(tmp_path / "sealed"), opened, [provider], wanted="x", tag="x")
    same_image(opened, clear)


@pytest.mark.parametrize("parameters", ["images", "keyid=images::packet=verdictd"])
def test_csvfast_encrypts(tool: Tool, clear: OciLayout, provider: GrpcProvider, tmp_path: Path, parameters: str) -> None:
    sealed = OciLayout(tmp_path / "sealed", create=True)
    encrypt_image(clear, sealed, [Recipient(provider, parameters)], tag="x")
    assert MARK not in everything_below(sealed.path)
    done = tool.decrypt()
    assert done.returncode == 0, done.stderr
    same_image(OciLayout(tmp_path / "opened"), clear)


def test_a_key_from_a_file_opens_what_skopeo_made(
    tool: Tool, broker: GrpcBroker, clear: OciLayout, provider: GrpcProvider, tmp_path: Path
) -> None:
    kek = Secret(broker.put_key())  # a new version: what is wrapped from now on
    tool.encrypt("--encrypt-layer", "-1")
    sealed = OciLayout(tmp_path / "sealed")
    assert [layer.is_encrypted for layer in manifest_of(sealed, "x").layers] == [False, True]
    for name, key in (("kek", local(kek)), ("provider", provider)):
        opened = OciLayout(tmp_path / name, create=True)
        decrypt_image(sealed, opened, [key], tag="x")
        same_image(opened, clear)


def test_recipients_and_rotation(
    tool: Tool, broker: GrpcBroker, clear: OciLayout, provider: GrpcProvider, tmp_path: Path
) -> None:
    tool.encrypt()
    sealed = OciLayout(tmp_path / "sealed")
    add_recipients(sealed, sealed, [Recipient(local())], [provider], tag="two")
    broker.put_key()
    rewrap(sealed, sealed, [provider], [Recipient(provider)], wanted="x", tag="anew")
    assert [len(packets_of(manifest_of(sealed, tag).layers[0])) for tag in ("x", "two", "anew")] == [1, 2, 1]
    for tag in ("two", "anew"):
        done = tool.decrypt(source=f"sealed:{tag}", target=f"opened-{tag}")
        assert done.returncode == 0, done.stderr
        same_image(OciLayout(tmp_path / f"opened-{tag}"), clear)


@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_jwe(tool: Tool, clear: OciLayout, tmp_path: Path, kind: str) -> None:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "public.pem").write_bytes(key.public_key().public_bytes(encoding, form))
    tool.encrypt("--encryption-key", f"provider:{PROVIDER}:images", key=f"jwe:{tmp_path / 'public.pem'}")
    sealed = OciLayout(tmp_path / "sealed")
    assert {packet.scheme for packet in packets_of(manifest_of(sealed, "x").layers[0])} == {"jwe", f"provider.{PROVIDER}"}
    opened = OciLayout(tmp_path / "ours", create=True)
    decrypt_image(sealed, opened, [JweKey(key)], tag="x")
    same_image(opened, clear)


def test_the_extension_is_refused_by_others(tool: Tool, clear: OciLayout, provider: GrpcProvider, tmp_path: Path) -> None:
    sealed = OciLayout(tmp_path / "sealed", create=True)
    encrypt_image(clear, sealed, [Recipient(provider)], suite=SM4_128_CTR_HMAC_SM3, tag="x")
    assert manifest_of(sealed, "x").layers[0].media_type == f"{LAYER}+encrypted"
    done = tool.decrypt()
    assert done.returncode == 1
    assert "unsupported cipher" in done.stderr.lower() or "not supported" in done.stderr.lower(), done.stderr
    opened = OciLayout(tmp_path / "ours", create=True)
    decrypt_image(sealed, opened, [provider], tag="x")
    same_image(opened, clear)


def test_changed_ciphertext_is_refused_by_both(
    tool: Tool, clear: OciLayout, provider: GrpcProvider, tmp_path: Path
) -> None:
    tool.encrypt()
    sealed = OciLayout(tmp_path / "sealed")
    layer = manifest_of(sealed, "x").layers[1]
    assert f"{KEYS}provider.{PROVIDER}" in layer.annotations
    path = sealed.blob_path(layer.digest)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    assert tool.decrypt().returncode == 1
    with pytest.raises(ImageError, match="digest"):
        decrypt_image(sealed, OciLayout(tmp_path / "ours", create=True), [provider], tag="x")


def test_through_a_real_registry(
    tool: Tool, clear: OciLayout, provider: GrpcProvider, docker_registry: str, tmp_path: Path
) -> None:
    """Both encrypt into docker-registry, and each decrypts what the other one put there."""
    name = f"docker://{docker_registry}/team/sealed"
    with RegistryClient(parse_reference(name)) as registry:
        encrypt_image(clear, registry, [Recipient(provider)], tag="ours")
        add_recipients(registry, registry, [Recipient(local())], [provider], wanted="ours", tag="two")
        rewrap(registry, registry, [provider, local()], wanted="two", tag="anew")
        for tag in ("ours", "anew"):
            done = tool.decrypt(source=f"{name}:{tag}", target=f"opened-{tag}")
            assert done.returncode == 0, done.stderr
            same_image(OciLayout(tmp_path / f"opened-{tag}"), clear)
        done = tool.copy("clear:clear", f"{name}:theirs", "--encryption-key", f"provider:{PROVIDER}:images")
        assert done.returncode == 0, done.stderr
        for tag in ("theirs", "anew"):
            opened = OciLayout(tmp_path / f"ours-{tag}", create=True)
            decrypt_image(registry, opened, [provider], wanted=tag, tag="x")
            same_image(opened, clear)
        # From one place of the registry into another.
        with RegistryClient(parse_reference(f"docker://{docker_registry}/team/clear")) as other:
            decrypt_image(registry, other, [provider], wanted="theirs", tag="x")
    done = tool.copy(f"docker://{docker_registry}/team/clear:x", "pulled:x")
    assert done.returncode == 0, done.stderr
    same_image(OciLayout(tmp_path / "pulled"), clear)
