"""`csvfast image encrypt | decrypt | recipients | rewrap | new-key`."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from image.crypt_images import MARK, blob, change, everything_below, make_image, manifest_of
from image.test_crypt_keys import PROVIDER, jwe_for

from csvfast.cli import main
from csvfast.image.annotations import KEYS, Packet, encrypted_annotations, public_bytes_of
from csvfast.image.descriptor import MANIFEST_TYPE
from csvfast.image.layout import OciLayout

# Making the tree of all commands takes longer than most of these.
_command = functools.cache(typer.main.get_command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an image, and a key."""
    monkeypatch.setattr(typer.main, "get_command", _command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OCICRYPT_KEYPROVIDER_CONFIG", raising=False)
    make_image(tmp_path / "clear", layers=2)
    assert main(["image", "new-key", "images.key"]) == 0
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["image", *arguments]) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(run(capsys, "encrypt", "oci:clear:clear", "oci:sealed:1", "--to", "kek:images.key", "--json"))
    sealed, clear = OciLayout(folder / "sealed"), OciLayout(folder / "clear")
    assert made["digest"] == sealed.resolve("1")[0].digest
    assert made["media_type"] == MANIFEST_TYPE
    assert MARK not in everything_below(folder / "sealed")
    shown = run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", "-k", "kek:images.key")
    assert shown == f"oci:opened:1  {clear.resolve('clear')[0].digest}\n"
    opened = OciLayout(folder / "opened")
    assert [blob(opened, one) for one in manifest_of(opened, "1").layers] == [
        blob(clear, one) for one in manifest_of(clear, "clear").layers
    ]


def test_layers_and_suites(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    national = ["--layer", "-1", "--suite", "SM4_128_CTR_HMAC_SM3"]
    run(capsys, "encrypt", "oci:clear", "oci:sealed:1", "-t", "kek:images.key", *national)
    listed = json.loads(run(capsys, "recipients", "oci:sealed:1", "--json"))
    assert [row["encrypted"] for row in listed["layers"]] == [False, True]
    assert listed["layers"][1]["cipher"] == "SM4_128_CTR_HMAC_SM3"
    assert listed["layers"][1]["keys"] == [
        {"scheme": "provider.attestation-agent", "form": "coco", "key": "kbs:///default/key/images"}
    ]
    text = run(capsys, "recipients", "oci:sealed:1")
    assert "not encrypted" in text
    assert "kbs:///default/key/images" in text


def test_recipients_and_rewrap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "new-key", "second.key")
    run(capsys, "encrypt", "oci:clear", "oci:sealed:1", "-t", "kek:images.key")
    layers = [layer.digest for layer in manifest_of(OciLayout(folder / "sealed"), "1").layers]
    run(capsys, "recipients", "oci:sealed:1", "oci:sealed:2", "--add", "kek:second.key:team/kek/2", "-k", "kek:images.key")
    run(capsys, "rewrap", "oci:sealed:2", "-k", "kek:second.key:team/kek/2", "-t", "kek:second.key:team/kek/2")
    assert [layer.digest for layer in manifest_of(OciLayout(folder / "sealed"), "2").layers] == layers
    assert "kbs:///team/kek/2" in run(capsys, "recipients", "oci:sealed:2")
    shown = run(capsys, "decrypt", "oci:sealed:2", "oci:opened:1", "-k", "kek:images.key", code=1)
    assert "for the key team/kek/2" in shown
    assert not (folder / "opened" / "index.json").exists() or OciLayout(folder / "opened").tags() == {}
    run(capsys, "decrypt", "oci:sealed:2", "oci:opened:1", "-k", "kek:second.key:team/kek/2")
    run(capsys, "rewrap", "oci:sealed:1", "oci:sealed:3", "-k", "kek:images.key", "--layer", "0")
    run(capsys, "decrypt", "oci:sealed:3", "oci:opened:2", "-k", "kek:images.key")


def test_providers(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "provider.py").write_text(PROVIDER)
    config = {"key-providers": {"cmd": {"cmd": {"path": sys.executable, "args": [str(folder / "provider.py")]}}}}
    (folder / "providers.json").write_text(json.dumps(config))
    key = "provider:cmd:parameters::of=mine"
    run(capsys, "encrypt", "oci:clear", "oci:sealed:1", "-t", key, "--provider-config", "providers.json")
    assert "provider.cmd  (does not say for which key)" in run(capsys, "recipients", "oci:sealed:1")
    assert "expected OCICRYPT" in run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", "-k", key, code=2)
    monkeypatch.setenv("OCICRYPT_KEYPROVIDER_CONFIG", str(folder / "providers.json"))
    run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", "-k", key)
    assert "no provider 'other'" in run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", "-k", "provider:other", code=2)
    grpc = ["-k", "provider:other", "--provider", f"other=unix://{folder}/nobody.sock"]
    assert "of no use" in run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", *grpc, code=2)


def test_jwe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = rsa.generate_private_key(65537, 2048)
    run(capsys, "encrypt", "oci:clear", "oci:sealed:1", "-t", "kek:images.key", "--layer", "0")
    # As another tool would have added it: the packet of the vector fits no layer of this image.
    layout = OciLayout(folder / "sealed")
    manifest = manifest_of(layout, "1")
    first = manifest.layers[0]
    annotations = encrypted_annotations({}, public_bytes_of(first), [Packet("jwe", jwe_for(key))])
    layers = (first.replace(annotations=annotations), *manifest.layers[1:])
    layout.put_manifest(manifest.replace(layers=layers).encode(), MANIFEST_TYPE, "2")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for name, data in (
        ("private.pem", key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"pass word"))),
        ("password", b"pass word\n"),
    ):
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    decrypt = ["decrypt", "oci:sealed:2", "oci:opened:1", "-k", "jwe:private.pem"]
    assert "no private key" in run(capsys, *decrypt, code=2)
    assert "the MAC does not match" in run(capsys, *decrypt, "--password-file", "password", code=1)
    assert "read only" in run(capsys, "encrypt", "oci:clear", "oci:x:1", "-t", "jwe:private.pem", code=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["encrypt", "oci:clear", "oci:x:1"], "--to"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "images.key"], "expected provider:NAME"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "kek:"], "expected provider:NAME"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "kek:missing.key"], "missing.key"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "kek:images.key:../x"], "resource path"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "kek:images.key", "--suite", "DES"], "expected AES_256_CTR"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "kek:images.key", "-l", "2"], "the image has 2"),
        (["encrypt", "oci:missing", "oci:x:1", "-t", "kek:images.key"], "missing"),
        (["encrypt", "oci:clear", "oci:x@sha256:" + "0" * 64, "-t", "kek:images.key"], "expected a tag"),
        (["encrypt", "oci:clear", "oci:x:1", "-t", "provider:a", "--provider", "a"], "expected NAME=ADDRESS"),
        (["decrypt", "oci:clear", "oci:x:1", "-k", "kek:images.key"], "none of its layers is encrypted"),
        (["recipients", "oci:clear", "oci:x:1"], "--add"),
        (["new-key", "images.key"], "nothing was overwritten"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(["image", *arguments]) in (2, 3)
    assert text in capsys.readouterr().err


def test_a_new_key_is_the_owners_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (folder / "images.key").stat().st_mode & 0o777 == 0o600
    assert (folder / "images.key").stat().st_size == 32
    (folder / "link").symlink_to("nowhere")
    run(capsys, "new-key", "link", code=2)
    assert not os.path.lexists("nowhere")


def test_changed_images_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "encrypt", "oci:clear", "oci:sealed:1", "-t", "kek:images.key")
    sealed = OciLayout(folder / "sealed")
    path = sealed.blob_path(manifest_of(sealed, "1").layers[1].digest)
    data: Any = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    assert "the blob's digest is" in run(capsys, "decrypt", "oci:sealed:1", "oci:opened:1", "-k", "kek:images.key", code=1)
    run(capsys, "new-key", "other.key")
    refused = ["decrypt", "oci:sealed:1", "oci:opened:1", "-k", "kek:other.key:images"]
    assert "does not open with the key default/key/images" in run(capsys, *refused, code=1)


def test_schemes_give_terminals_no_orders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "encrypt", "oci:clear:clear", "oci:sealed:1", "--to", "kek:images.key")

    def edit(document: dict[str, Any]) -> None:
        document["layers"][0]["annotations"][f"{KEYS}provider.\x1b[2J\n\u202e"] = "AAAA"

    change(OciLayout(folder / "sealed"), "1", edit)
    shown = run(capsys, "recipients", "oci:sealed:changed")
    assert r"provider.\x1b[2J\n\u202e  (does not say" in shown
    assert all(line.isprintable() for line in shown.splitlines())
