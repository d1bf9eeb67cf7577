"""Images encrypted, decrypted, rewrapped: what changes in a manifest and what does not."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from image.crypt_images import (
    KEK,
    KID,
    LAYER,
    MARK,
    blob,
    change,
    everything_below,
    local,
    make_image,
    manifest_of,
    put,
    tar_of,
    to_local,
)

from csvfast.broker.keyprovider.messages import read_packet
from csvfast.crypto import Secret
from csvfast.errors import ImageError, IntegrityError
from csvfast.image.annotations import KEYS, PACKET_LIMIT, PUBLIC_OPTIONS, packets_of
from csvfast.image.blobs import HashedChunks
from csvfast.image.decrypt import decrypt_image
from csvfast.image.descriptor import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, Descriptor, Platform
from csvfast.image.encrypt import encrypt_image
from csvfast.image.keys import Recipient, unwrap_any
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Index
from csvfast.image.options import PrivateOptions
from csvfast.image.recipients import add_recipients, list_recipients, rewrap
from csvfast.image.suites import SM4_128_CTR_HMAC_SM3, SUITES, Suite

OTHER = Secret(bytes(range(100, 132)))
AGENT = f"{KEYS}provider.attestation-agent"


@pytest.fixture
def clear(tmp_path: Path) -> OciLayout:
    return make_image(tmp_path / "clear")


@pytest.fixture
def target(tmp_path: Path) -> OciLayout:
    return OciLayout(tmp_path / "target", create=True)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_round_trip(clear: OciLayout, target: OciLayout, tmp_path: Path, suite: Suite) -> None:
    done: list[int] = []
    made = encrypt_image(clear, target, to_local(), tag="sealed", suite=suite, progress=done.append)
    before, after = manifest_of(clear, "clear"), manifest_of(target, "sealed")
    assert target.resolve("sealed")[0].digest == made.digest
    assert sum(done) == sum(layer.size for layer in before.layers)
    assert after.config == before.config
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.media_type == f"{LAYER}+encrypted"
        assert new.size == old.size
        assert new.digest != old.digest
        assert set(new.annotations) == {PUBLIC_OPTIONS, AGENT}
        public = json.loads(base64.b64decode(new.annotations[PUBLIC_OPTIONS]))
        assert list(public) == ["cipher", "hmac", "cipheroptions"]
        assert (public["cipher"], public["cipheroptions"]) == (suite.name, {})
        private = json.loads(bytes(memoryview(unwrap_any(new, [local()]))))
        assert list(private) == ["symkey", "digest", "cipheroptions"]
        assert private["digest"] == old.digest
    sealed = everything_below(target.path)
    assert all(blob(clear, layer)[20:60] not in sealed for layer in before.layers)

    opened = OciLayout(tmp_path / "opened", create=True)
    decrypt_image(target, opened, [local()], tag="clear")
    assert opened.resolve("clear") == clear.resolve("clear")
    assert [blob(opened, one) for one in before.layers] == [blob(clear, one) for one in before.layers]


@pytest.mark.parametrize(
    ("layers", "encrypted"), [([-1], [False, False, True]), ([0, 2], [True, False, True]), ([1, -2], [False, True, False])]
)
def test_chosen_layers(tmp_path: Path, target: OciLayout, layers: list[int], encrypted: list[bool]) -> None:
    source = make_image(tmp_path / "three", layers=3)
    encrypt_image(source, target, to_local(), layers=layers, tag="x")
    manifest = manifest_of(target, "x")
    assert [layer.is_encrypted for layer in manifest.layers] == encrypted
    untouched = zip(manifest.layers, manifest_of(source, "clear").layers, encrypted, strict=True)
    assert all(now == old for now, old, sealed in untouched if not sealed)
    decrypt_image(target, target, [local()], tag="back")
    assert manifest_of(target, "back") == manifest_of(source, "clear")


@pytest.mark.parametrize("layer", [2, -3])
def test_there_is_no_such_layer(clear: OciLayout, target: OciLayout, layer: int) -> None:
    with pytest.raises(ImageError, match=f"layer {layer}: the image has 2; expected -2 to 1"):
        encrypt_image(clear, target, to_local(), layers=[layer], tag="x")


class FullLayout(OciLayout):
    """There is room for two blocks."""

    def put_blob(self, descriptor: Descriptor | None, chunks: Iterable[Any], /) -> Descriptor:
        for number, _chunk in enumerate(chunks):
            if number == 2:
                raise OSError(errno.ENOSPC, "no room")
        return super().put_blob(descriptor, [])


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_no_room(tmp_path: Path, suite: Suite) -> None:
    """No thread is left behind, not even while somebody holds the error."""
    source = make_image(tmp_path / "large", layers=1, size=2 << 20)
    encrypt_image(source, source, to_local(), tag="x", suite=suite)
    full = FullLayout(tmp_path / "full", create=True)
    before = threading.active_count()
    with pytest.raises(OSError, match="no room") as encrypting:
        encrypt_image(source, full, to_local(), wanted="clear", tag="x", suite=suite)
    with pytest.raises(OSError, match="no room") as decrypting:
        decrypt_image(source, full, [local()], wanted="x", tag="y")
    assert threading.active_count() == before
    assert encrypting.value.errno == decrypting.value.errno == errno.ENOSPC
    assert full.tags() == {}


def test_equal_layers_become_different_ones(tmp_path: Path, target: OciLayout) -> None:
    source = make_image(tmp_path / "one", layers=1)
    manifest = manifest_of(source, "clear")
    source.put_manifest(manifest.replace(layers=manifest.layers * 2).encode(), MANIFEST_TYPE, "twice")
    encrypt_image(source, target, to_local(), wanted="twice", tag="x")
    first, second = manifest_of(target, "x").layers
    assert first.digest != second.digest


def test_encrypted_layers_are_not_encrypted_again(clear: OciLayout, target: OciLayout) -> None:
    encrypt_image(clear, target, to_local(), layers=[0], tag="x")
    with pytest.raises(ImageError, match=r"layer 0.*is encrypted already"):
        encrypt_image(target, target, to_local(), wanted="x", tag="y")
    encrypt_image(target, target, to_local(), layers=[1], wanted="x", tag="y")
    assert all(layer.is_encrypted for layer in manifest_of(target, "y").layers)


def test_nobody_to_encrypt_for(clear: OciLayout, target: OciLayout) -> None:
    with pytest.raises(ImageError, match="no recipient"):
        encrypt_image(clear, target, [], tag="x")


def test_nothing_to_encrypt(clear: OciLayout, target: OciLayout) -> None:
    """A clear image is no encrypted one, whatever it is called."""
    change(clear, "clear", lambda document: document.update(layers=[]), "empty")
    for wanted, layers in (("clear", []), ("empty", None)):
        with pytest.raises(ImageError, match="none of its layers would be encrypted"):
            encrypt_image(clear, target, to_local(), wanted=wanted, layers=layers, tag="x")
    assert target.tags() == {}


def test_a_key_that_cannot_be_wrapped(clear: OciLayout, target: OciLayout) -> None:
    with pytest.raises(ImageError, match=r"not wrapped by KEK default/key/images: .*for the key default/key/other"):
        encrypt_image(clear, target, [Recipient(local(), "other")], tag="x")
    assert target.tags() == {}
    assert not [one for one in (target.path / "blobs").rglob("*") if one.is_file()]  # keys are wrapped first


def test_a_layer_that_is_not_what_the_manifest_says(clear: OciLayout, target: OciLayout) -> None:
    layer = manifest_of(clear, "clear").layers[1]
    data = blob(clear, layer)
    path = clear.blob_path(layer.digest)
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(IntegrityError, match=layer.digest):
        encrypt_image(clear, target, to_local(), tag="x")
    assert target.tags() == {}


def test_types_that_are_no_layers(clear: OciLayout, target: OciLayout) -> None:
    change(clear, "clear", lambda document: document["layers"][0].update(mediaType="application/vnd.example.thing"))
    with pytest.raises(ImageError, match="unknown; expected a layer's"):
        encrypt_image(clear, target, to_local(), wanted="changed", tag="x")


def test_docker_images_become_oci_ones(clear: OciLayout, target: OciLayout) -> None:
    docker = "application/vnd.docker"

    def edit(document: dict[str, Any]) -> None:
        document["mediaType"] = f"{docker}.distribution.manifest.v2+json"
        document["config"]["mediaType"] = f"{docker}.container.image.v1+json"
        for layer in document["layers"]:
            layer["mediaType"] = f"{docker}.image.rootfs.diff.tar.gzip"

    document = json.loads(manifest_of(clear, "clear").encode())
    edit(document)
    clear.put_manifest(json.dumps(document).encode(), document["mediaType"], "docker")
    encrypt_image(clear, target, to_local(), wanted="docker", layers=[0], tag="x")
    descriptor, _ = target.resolve("x")
    manifest = manifest_of(target, "x")
    assert (descriptor.media_type, manifest.config.media_type) == (MANIFEST_TYPE, CONFIG_TYPE)
    assert [layer.media_type for layer in manifest.layers] == [f"{LAYER}+encrypted", LAYER]


def test_annotations_of_others_stay(clear: OciLayout, target: OciLayout) -> None:
    change(clear, "clear", lambda document: document["layers"][0].update(annotations={"org.example": "kept"}))
    encrypt_image(clear, target, to_local(), wanted="changed", tag="x")
    assert manifest_of(target, "x").layers[0].annotations["org.example"] == "kept"
    decrypt_image(target, target, [local()], wanted="x", tag="y")
    assert [dict(layer.annotations) for layer in manifest_of(target, "y").layers] == [{"org.example": "kept"}, {}]


def test_content_within_descriptors(clear: OciLayout, target: OciLayout) -> None:
    """A descriptor's `data` is the clear layer (image-spec descriptor.md): it must not stay beside the ciphertext."""
    layers = manifest_of(clear, "clear").layers
    texts = [base64.b64encode(blob(clear, layer)).decode() for layer in layers]

    def edit(document: dict[str, Any]) -> None:
        for layer, text, name in zip(document["layers"], texts, ("data", "DATA"), strict=True):
            layer |= {name: text, "urls": ["https://example/clear"], "artifactType": "kept"}

    change(clear, "clear", edit)
    manifest = manifest_of(clear, "changed")
    clear.put_manifest(manifest.encode(), MANIFEST_TYPE)
    encoded = base64.b64encode(manifest.encode()).decode()
    entry = manifest.descriptor(platform=Platform("linux", "amd64"), other={"data": encoded, "artifactType": "kept"})
    clear.put_manifest(Index((entry,)).encode(), INDEX_TYPE, "all")
    encrypt_image(clear, target, to_local(), wanted="changed", layers=[-1], tag="some")
    first, second = manifest_of(target, "some").layers
    assert (first.other["data"], second.other) == (texts[0], {"artifactType": "kept"})
    encrypt_image(clear, target, to_local(), wanted="all", platform="all", tag="all")
    (made,) = index_of(target, "all").manifests
    assert (made.other, made.platform) == ({"artifactType": "kept"}, entry.platform)
    assert all(layer.other == {"artifactType": "kept"} for layer in manifest_of(target, "some").layers[1:])
    assert not any(text in blob(target, made).decode() for text in texts)
    decrypt_image(target, target, [local()], wanted="all", platform="all", tag="back")
    assert [layer.digest for layer in manifest_of(target, "some").layers[:1]] == [layers[0].digest]


def index_of(layout: OciLayout, tag: str) -> Index:
    descriptor, data = layout.resolve(tag)
    return Index.parse(data, descriptor.media_type)


def test_an_index(clear: OciLayout, target: OciLayout) -> None:
    one = manifest_of(clear, "clear")
    archive = tar_of("x", MARK)
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(archive).hexdigest()}"]}
    config = put(clear, json.dumps({"os": "linux", "architecture": "arm64", "rootfs": rootfs}).encode(), CONFIG_TYPE)
    other = one.replace(config=config, layers=(put(clear, archive, LAYER.removesuffix("+gzip")),))
    platforms = [Platform("linux", "amd64"), Platform("linux", "arm64", "v8"), Platform("unknown", "unknown")]
    entries = []
    for manifest, platform in zip((one, other, other), platforms, strict=True):
        clear.put_manifest(manifest.encode(), MANIFEST_TYPE)
        entries.append(manifest.descriptor(platform=platform))
    clear.put_manifest(Index(tuple(entries)).encode(), INDEX_TYPE, "all")

    encrypt_image(clear, target, to_local(), wanted="all", platform="linux/arm64", tag="arm")
    assert [layer.media_type for layer in manifest_of(target, "arm").layers] == [
        "application/vnd.oci.image.layer.v1.tar+encrypted"
    ]
    encrypt_image(clear, target, to_local(), wanted="all", platform="all", tag="all")
    made = index_of(target, "all")
    assert [entry.platform for entry in made.manifests] == platforms[:2]  # an attestation about clear layers helps nobody
    decrypt_image(target, target, [local()], wanted="all", platform="all", tag="back")
    assert index_of(target, "back").manifests == tuple(entries[:2])
    for wrong in ("linux", "linux/s390x", "a/b/c/d"):
        with pytest.raises(ImageError):
            encrypt_image(clear, target, to_local(), wanted="all", platform=wrong, tag="y")


# ---- Recipients


def test_recipients_are_added(clear: OciLayout, target: OciLayout) -> None:
    encrypt_image(clear, target, to_local(), tag="x")
    new = local(OTHER, "default/key/others", style="verdictd")
    with pytest.raises(ImageError, match=r"cannot be unwrapped.*for the key default/key/images"):
        decrypt_image(target, target, [new], wanted="x", tag="no")
    add_recipients(target, target, [Recipient(new)], [local()], wanted="x", tag="y")
    before, after = manifest_of(target, "x"), manifest_of(target, "y")
    for old, now in zip(before.layers, after.layers, strict=True):
        assert now.same_blob(old)
        assert now.annotations[PUBLIC_OPTIONS] == old.annotations[PUBLIC_OPTIONS]
        assert now.annotations[AGENT].startswith(f"{old.annotations[AGENT]},")
        assert [one[1:] for one in list_recipients(now)] == [("coco", KID), ("verdictd", "kbs:///default/key/others")]
    for number, key in enumerate((local(), new)):
        decrypt_image(target, target, [key], wanted="y", tag=f"opened{number}")
        assert manifest_of(target, f"opened{number}") == manifest_of(clear, "clear")


def test_more_recipients_than_anybody_reads(clear: OciLayout, target: OciLayout) -> None:
    encrypt_image(clear, target, to_local() * PACKET_LIMIT, tag="x")
    decrypt_image(target, target, [local()], wanted="x", tag="y")
    with pytest.raises(ImageError, match=f"{PACKET_LIMIT + 1} wrapped keys; expected at most {PACKET_LIMIT}"):
        add_recipients(target, target, to_local(), [local()], wanted="x", tag="z")
    assert set(target.tags()) == {"x", "y"}


def test_a_recipient_under_another_scheme(clear: OciLayout, target: OciLayout) -> None:
    encrypt_image(clear, target, [*to_local(), Recipient(local(OTHER, "other", scheme="provider.other"))], tag="x")
    layer = manifest_of(target, "x").layers[0]
    assert set(layer.annotations) == {PUBLIC_OPTIONS, AGENT, f"{KEYS}provider.other"}
    for key in (local(), local(OTHER, "other")):
        decrypt_image(target, target, [key], wanted="x", tag="y")


def test_blobs_go_along_into_another_layout(clear: OciLayout, target: OciLayout, tmp_path: Path) -> None:
    encrypt_image(clear, target, to_local(), tag="x")
    third = OciLayout(tmp_path / "third", create=True)
    add_recipients(target, third, [Recipient(local(OTHER, "other"))], [local()], layers=[-1], tag="y")
    assert [len(packets_of(layer)) for layer in manifest_of(third, "y").layers] == [1, 2]
    decrypt_image(third, third, [local()], wanted="y", tag="z")
    assert manifest_of(third, "z") == manifest_of(clear, "clear")


class Rotated:
    """A key provider whose key has versions: it opens them all and wraps with the newest, as the broker's does."""

    name = "provider"
    scheme = "provider.attestation-agent"

    def __init__(self) -> None:
        self.versions = [KEK]
        self.asked: list[str] = []

    def opens(self, scheme: str) -> bool:
        return scheme == self.scheme

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        self.asked.append(parameters)
        return local(self.versions[-1]).wrap(private, parameters)

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        for kek in reversed(self.versions[1:]):
            try:
                return local(kek).unwrap(packet)
            except ValueError:
                continue
        return local(self.versions[0]).unwrap(packet)


def test_a_rotated_key(clear: OciLayout, target: OciLayout) -> None:
    provider = Rotated()
    encrypt_image(clear, target, [Recipient(local(style="verdictd"))], tag="x")
    provider.versions.append(OTHER)
    with pytest.raises(ImageError, match="does not open"):
        unwrap_any(manifest_of(target, "x").layers[0], [local(OTHER)])
    rewrap(target, target, [local()], [Recipient(local(OTHER))], wanted="x", tag="by-hand")
    rewrap(target, target, [local()], wanted="x", tag="same")
    for tag, style in (("by-hand", "coco"), ("same", "verdictd")):
        before, after = manifest_of(target, "x"), manifest_of(target, tag)
        for old, now in zip(before.layers, after.layers, strict=True):
            assert now.same_blob(old)
            assert len(packets_of(now)) == 1
            assert now.annotations[AGENT] != old.annotations[AGENT]
            assert read_packet(packets_of(now)[0].data).style == style
            old_key, new_key = local(), local(OTHER) if tag == "by-hand" else local()
            assert bytes(memoryview(unwrap_any(now, [new_key]))) == bytes(memoryview(unwrap_any(old, [old_key])))


def test_every_packet_is_made_anew_by_whoever_opens_it(clear: OciLayout, target: OciLayout) -> None:
    provider, other = Rotated(), local(OTHER, "other", scheme="provider.other")
    encrypt_image(clear, target, [*to_local(), Recipient(other)], tag="x")
    rewrap(target, target, [provider, other], wanted="x", tag="y")
    assert provider.asked == [f"keyid={KID}::packet=coco"] * 2
    before, after = manifest_of(target, "x").layers, manifest_of(target, "y").layers
    assert [list_recipients(one) for one in after] == [list_recipients(one) for one in before]
    assert all(set(packets_of(old)).isdisjoint(packets_of(now)) for old, now in zip(before, after, strict=True))
    # One that cannot be opened is neither lost nor kept.
    with pytest.raises(ImageError, match=r"cannot be unwrapped|of no use"):
        rewrap(target, target, [provider], wanted="x", tag="z")
    assert "z" not in target.tags()


def test_images_without_encryption(clear: OciLayout, target: OciLayout) -> None:
    for call in (
        lambda: decrypt_image(clear, target, [local()], tag="x"),
        lambda: add_recipients(clear, target, to_local(), [local()], tag="x"),
        lambda: rewrap(clear, target, [local()], tag="x"),
    ):
        with pytest.raises(ImageError, match="none of its layers is encrypted"):
            call()
    encrypt_image(clear, target, to_local(), layers=[0], tag="x")
    with pytest.raises(ImageError, match=r"layer 1.*is not encrypted"):
        rewrap(target, target, [local()], layers=[1], wanted="x", tag="y")


def test_the_extension_is_named(clear: OciLayout, target: OciLayout) -> None:
    encrypt_image(clear, target, to_local(), suite=SM4_128_CTR_HMAC_SM3, tag="x")
    layer = manifest_of(target, "x").layers[0]
    private = PrivateOptions.parse(unwrap_any(layer, [local()]), "layer")
    assert len(private.key) == 48
    # To ocicrypt this is a cipher it does not know. A private key of 48 bytes is none of its either.
    change(target, "x", lambda document: _rename(document["layers"][0]))
    with pytest.raises(ImageError, match="symkey of 48 bytes; expected 32"):
        decrypt_image(target, target, [local()], wanted="changed", tag="y")


def _rename(layer: dict[str, Any]) -> None:
    public = json.loads(base64.b64decode(layer["annotations"][PUBLIC_OPTIONS])) | {"cipher": "AES_256_CTR_HMAC_SHA256"}
    layer["annotations"][PUBLIC_OPTIONS] = base64.b64encode(json.dumps(public).encode()).decode()


def test_chunks_that_bring_their_digest(target: OciLayout) -> None:
    """put_blob takes it instead of hashing again, and still compares it with what was promised."""
    data = b"a layer"
    promised = Descriptor.of(data, LAYER)

    def known() -> str:
        return promised.digest.partition(":")[2]

    assert target.put_blob(None, HashedChunks([data[:3], data[3:]], known)).same_blob(promised)
    with pytest.raises(ImageError, match="digest"):
        target.put_blob(Descriptor.of(b"other!!", LAYER), HashedChunks([data], known))
    with pytest.raises(ImageError, match="bytes"):
        target.put_blob(promised, HashedChunks([data[:3]], known))
    # Of another algorithm: computed, whatever they bring.
    longer = Descriptor(LAYER, f"sha512:{hashlib.sha512(data).hexdigest()}", len(data))
    target.put_blob(longer, HashedChunks([data], lambda: "0" * 128))


def test_manifests_that_are_none(target: OciLayout) -> None:
    target.put_manifest(b'{"schemaVersion":2}', MANIFEST_TYPE, "x")
    with pytest.raises(ImageError):
        decrypt_image(target, target, [local()], wanted="x", tag="y")
