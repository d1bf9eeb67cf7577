"""The tamper matrix: whoever can write to a registry changes one thing, and the image is refused before its tag exists.

An attacker who changes a blob can also change what names it, up to the manifest's digest; what he has not is a key.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from image.crypt_images import (
    KEK,
    KID,
    MARK,
    blob,
    change,
    everything_below,
    local,
    make_image,
    manifest_of,
    put,
    raw_blob,
    to_local,
)

from csvfast.crypto import Secret
from csvfast.errors import CsvfastError, ImageError, IntegrityError
from csvfast.image.annotations import PUBLIC_OPTIONS, packets_of
from csvfast.image.decrypt import decrypt_image
from csvfast.image.descriptor import CONFIG_TYPE
from csvfast.image.encrypt import encrypt_image
from csvfast.image.keys import unwrap_any
from csvfast.image.layout import OciLayout
from csvfast.image.limits import Limits
from csvfast.image.wrappers import LocalKek

AGENT = "org.opencontainers.image.enc.keys.provider.attestation-agent"
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> OciLayout:
    folder = tmp_path_factory.mktemp("sealed")
    layout = OciLayout(folder / "sealed", create=True)
    encrypt_image(make_image(folder / "clear"), layout, to_local(), tag="x")
    return layout


@pytest.fixture
def target(tmp_path: Path) -> OciLayout:
    return OciLayout(tmp_path / "target", create=True)


def refused(sealed: OciLayout, target: OciLayout, problem: str, *, wanted: str = "changed", kek: Secret = KEK) -> ImageError:
    with pytest.raises(ImageError, match=problem) as caught:
        decrypt_image(sealed, target, [local(kek)], wanted=wanted, tag="y")
    assert target.tags() == {}
    return caught.value


def nothing_was_stored(target: OciLayout) -> None:
    assert not [one for one in (target.path / "blobs").rglob("*") if one.is_file()]
    assert MARK not in everything_below(target.path)


def flipped(data: bytes, at: int = -1) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def b64_flipped(text: str, at: int = 0) -> str:
    return base64.b64encode(flipped(base64.b64decode(text), at)).decode()


def public(document: dict[str, Any], layer: int, **members: Any) -> None:
    annotations = document["layers"][layer]["annotations"]
    options = json.loads(base64.b64decode(annotations[PUBLIC_OPTIONS])) | members
    annotations[PUBLIC_OPTIONS] = base64.b64encode(json.dumps(options).encode()).decode()


def flip_mac(document: dict[str, Any]) -> None:
    options = json.loads(base64.b64decode(document["layers"][1]["annotations"][PUBLIC_OPTIONS]))
    public(document, 1, hmac=b64_flipped(options["hmac"]))


def packet(document: dict[str, Any], **members: Any) -> None:
    annotations = document["layers"][1]["annotations"]
    found = json.loads(base64.b64decode(annotations[AGENT])) | members
    annotations[AGENT] = base64.b64encode(json.dumps(found).encode()).decode()


def flip_packet(member: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        found = json.loads(base64.b64decode(document["layers"][1]["annotations"][AGENT]))
        packet(document, **{member: b64_flipped(found[member])})

    return edit


def swap(document: dict[str, Any]) -> None:
    """Each layer's blob with the other one's annotations."""
    one, two = document["layers"]
    one["annotations"], two["annotations"] = two["annotations"], one["annotations"]


def swap_packets(document: dict[str, Any]) -> None:
    one, two = (layer["annotations"] for layer in document["layers"])
    one[AGENT], two[AGENT] = two[AGENT], one[AGENT]


def swap_public(document: dict[str, Any]) -> None:
    one, two = (layer["annotations"] for layer in document["layers"])
    one[PUBLIC_OPTIONS], two[PUBLIC_OPTIONS] = two[PUBLIC_OPTIONS], one[PUBLIC_OPTIONS]


def without(name: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        del document["layers"][1]["annotations"][name]

    return edit


def annotate(name: str, text: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        document["layers"][1]["annotations"][name] = text

    return edit


BEFORE_ANYTHING: dict[str, tuple[Edit, str]] = {
    "a bit of the MAC": (flip_mac, "MAC"),
    "a short nonce": (lambda doc: public(doc, 0, cipheroptions={"nonce": "AAAA"}), "nonce of 3 bytes"),
    "another suite": (lambda doc: public(doc, 1, cipher="SM4_128_CTR_HMAC_SM3"), "symkey of 32 bytes; expected 48"),
    "an unknown suite": (lambda doc: public(doc, 1, cipher="AES_256_CBC"), "cipher"),
    "no MAC": (lambda doc: public(doc, 1, hmac=None), "hmac is missing"),
    "a bit of the packet": (flip_packet("wrapped_data"), "does not open"),
    "a bit of its iv": (flip_packet("iv"), "does not open"),
    "another key's packet": (lambda doc: packet(doc, kid="kbs:///default/key/other"), "for the key default/key/other"),
    "a packet without authentication": (
        lambda doc: packet(doc, wrap_type="A256CTR", iv=base64.b64encode(bytes(16)).decode()), "not authenticated"
    ),
    "annotations of the other layer": (swap, "MAC"),
    "packets of the other layer": (swap_packets, "MAC"),
    "public options of the other layer": (swap_public, "MAC"),
    "public options missing": (without(PUBLIC_OPTIONS), "pubopts is missing"),
    "packets missing": (without(AGENT), "nobody can decrypt"),
    "public options that are no base64": (annotate(PUBLIC_OPTIONS, "%"), "no base64"),
    "a packet that is no base64": (annotate(AGENT, "AAAA,%"), "no base64"),
    "too many packets": (annotate(AGENT, ",".join(["AAAA"] * 65)), "65 packets; expected at most 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_ANYTHING)
def test_changes_of_the_manifest(sealed: OciLayout, target: OciLayout, name: str) -> None:
    edit, problem = BEFORE_ANYTHING[name]
    change(sealed, "x", edit)
    refused(sealed, target, problem)
    nothing_was_stored(target)


def test_the_public_nonce(sealed: OciLayout, target: OciLayout) -> None:
    """ocicrypt looks for it there first, and its MAC does not cover it: the layer's own digest finds it."""
    change(sealed, "x", lambda document: public(document, 0, cipheroptions={"nonce": base64.b64encode(bytes(16)).decode()}))
    error = refused(sealed, target, "another digest")
    assert isinstance(error, IntegrityError)
    nothing_was_stored(target)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_bit_of_ciphertext(sealed: OciLayout, target: OciLayout, tmp_path: Path, at: int) -> None:
    layer = manifest_of(sealed, "x").layers[1]
    # In the registry's files, so that the digest differs.
    copy = OciLayout(tmp_path / "copy", create=True)
    for one in (*manifest_of(sealed, "x").layers, manifest_of(sealed, "x").config):
        copy.put_blob(one, [blob(sealed, one)])
    _, data = sealed.resolve("x")
    copy.put_manifest(data, "application/vnd.oci.image.manifest.v1+json", "x")
    path = copy.blob_path(layer.digest)
    path.chmod(0o600)
    path.write_bytes(flipped(raw_blob(sealed, layer), at))
    assert isinstance(refused(copy, target, "digest is sha256", wanted="x"), IntegrityError)
    nothing_was_stored(target)
    # With a manifest to match it.
    other = put(sealed, flipped(blob(sealed, layer), at), layer.media_type)
    change(sealed, "x", lambda document: document["layers"][1].update(digest=other.digest))
    assert isinstance(refused(sealed, target, "MAC"), IntegrityError)
    nothing_was_stored(target)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_blob(sealed: OciLayout, target: OciLayout, cut: int) -> None:
    layer = manifest_of(sealed, "x").layers[0]
    other = put(sealed, blob(sealed, layer)[:-cut], layer.media_type)
    change(sealed, "x", lambda document: document["layers"][0].update(digest=other.digest, size=other.size))
    refused(sealed, target, "MAC")
    change(sealed, "x", lambda document: document["layers"][0].update(digest=other.digest))
    refused(sealed, target, "size|bytes")
    nothing_was_stored(target)


def test_swapped_layers(sealed: OciLayout, target: OciLayout) -> None:
    """Each with its own annotations: every layer is genuine, and not the one that the configuration has in its place."""
    change(sealed, "x", lambda document: document["layers"].reverse())
    assert isinstance(refused(sealed, target, "its archive has the digest .* the image configuration says"), IntegrityError)
    nothing_was_stored(target)


@pytest.mark.parametrize("layers", [1, 3], ids=["one left out", "one twice"])
def test_another_number_of_layers(sealed: OciLayout, target: OciLayout, layers: int) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["layers"] = (document["layers"] * 2)[:layers]

    change(sealed, "x", edit)
    refused(sealed, target, f"{layers} layers, and 2 in the image configuration")
    nothing_was_stored(target)


def test_whose_configuration_it_is(sealed: OciLayout, target: OciLayout) -> None:
    """Whoever writes a configuration, too, can put layers in another order: only the manifest's digest, or a signature, tells."""
    config = json.loads(blob(sealed, manifest_of(sealed, "x").config))
    config["rootfs"]["diff_ids"].reverse()
    other = put(sealed, json.dumps(config).encode(), CONFIG_TYPE)

    def edit(document: dict[str, Any]) -> None:
        document["layers"].reverse()
        document["config"] = other.document()

    change(sealed, "x", edit)
    decrypt_image(sealed, target, [local()], wanted="changed", tag="y")
    assert sealed.resolve("changed")[0].digest != sealed.resolve("x")[0].digest
    with pytest.raises(ImageError):
        # Whoever names the digest gets that manifest or none.
        sealed.resolve("sha256:" + "0" * 64)


def test_a_configuration_that_is_no_image_s(sealed: OciLayout, target: OciLayout) -> None:
    other = put(sealed, b"{}", "application/vnd.oci.empty.v1+json")
    change(sealed, "x", lambda document: document.update(config=other.document()))
    refused(sealed, target, "rootfs")
    nothing_was_stored(target)


def test_limits_of_what_comes_out(sealed: OciLayout, target: OciLayout) -> None:
    for limits, problem in ((Limits(total_bytes=5000), "layers of"), (Limits(ratio=1, ratio_floor=1), "layer sha256:.*gzip")):
        with pytest.raises(ImageError, match=problem):
            decrypt_image(sealed, target, [local()], wanted="x", tag="y", limits=limits)
    nothing_was_stored(target)


def test_a_manifest_that_was_changed_in_place(sealed: OciLayout, target: OciLayout, tmp_path: Path) -> None:
    copy = make_image(tmp_path / "copy")
    encrypt_image(copy, copy, to_local(), wanted="clear", tag="x")
    descriptor, data = copy.resolve("x")
    path = copy.blob_path(descriptor.digest)
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b" }")
    refused(copy, target, descriptor.digest.partition(":")[2][:12], wanted="x")
    nothing_was_stored(target)


def test_another_key(sealed: OciLayout, target: OciLayout) -> None:
    error = refused(sealed, target, "does not open with the key default/key/images", wanted="x", kek=Secret(bytes(32)))
    assert isinstance(error.__cause__, ExceptionGroup)
    nothing_was_stored(target)


def test_no_key_at_all(sealed: OciLayout, target: OciLayout) -> None:
    for wrappers in ([], [Deaf()]):
        with pytest.raises(ImageError, match=r"wrapped for provider\.attestation-agent; the keys at hand are of no use"):
            decrypt_image(sealed, target, wrappers, wanted="x", tag="y")
    nothing_was_stored(target)


class Deaf(LocalKek):
    def __init__(self) -> None:
        super().__init__(KEK, "images")

    def opens(self, scheme: str) -> bool:
        return scheme == "jwe"


def test_one_packet_that_opens_is_enough(sealed: OciLayout, target: OciLayout) -> None:
    good = manifest_of(sealed, "x").layers[1].annotations[AGENT]
    bad = b64_flipped(good, 5)
    change(sealed, "x", annotate(AGENT, f"{bad},{good}"))
    assert len(packets_of(manifest_of(sealed, "changed").layers[1])) == 2
    decrypt_image(sealed, target, [local()], wanted="changed", tag="y")
    # A packet of the same key whose content fits no suite counts as closed, too.
    foreign = base64.b64encode(local().wrap(Secret(b'{"symkey":"AAAA"}'))).decode()
    change(sealed, "x", annotate(AGENT, f"{foreign},{good}"))
    decrypt_image(sealed, target, [local()], wanted="changed", tag="z")
    change(sealed, "x", annotate(AGENT, f"{foreign},{bad}"))
    with pytest.raises(ImageError, match=r"packet 1 .*digest.*packet 2") as caught:
        decrypt_image(sealed, target, [local()], wanted="changed", tag="w")
    assert "w" not in target.tags()
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 2


class Remembering(LocalKek):
    """Keeps what it has given out."""

    given: ClassVar[list[Secret]] = []

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        self.given.append(super().unwrap(packet, parameters))
        return self.given[-1]


def test_private_options_are_wiped(sealed: OciLayout, target: OciLayout) -> None:
    """However it ends."""
    change(sealed, "x", lambda document: document["layers"].reverse())
    decrypt_image(sealed, target, [Remembering(KEK, KID)], wanted="x", tag="y")
    with pytest.raises(IntegrityError):
        decrypt_image(sealed, target, [Remembering(KEK, KID)], wanted="changed", tag="z")
    assert len(Remembering.given) == 4
    for secret in Remembering.given:
        with pytest.raises(CsvfastError, match="wiped"):
            memoryview(secret)


def test_errors_name_the_layer_and_no_secret(sealed: OciLayout, target: OciLayout) -> None:
    layer = manifest_of(sealed, "x").layers[1]
    key = json.loads(bytes(memoryview(unwrap_any(layer, [local()]))))["symkey"]
    for edit, problem in ((flip_mac, "MAC"), (flip_packet("wrapped_data"), "open")):
        change(sealed, "x", edit)
        error = refused(sealed, target, problem)
        assert layer.digest in str(error)
        assert key[:10] not in str(error)
