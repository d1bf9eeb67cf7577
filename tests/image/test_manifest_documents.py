"""Descriptors, manifests, indexes and references: known answers, what is refused and why, and that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import ArgumentError, ImageError, IntegrityError
from csvfast.image import descriptor as types
from csvfast.image.blobs import VerifiedReader
from csvfast.image.descriptor import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, Descriptor, Platform
from csvfast.image.manifest import LAYER_LIMIT, MANIFEST_LIMIT, Index, Manifest, choose, media_type_of
from csvfast.image.reference import Reference, parse_reference

TAR = "application/vnd.oci.image.layer.v1.tar"
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
WASM = "application/vnd.wasm.content.layer.v1+wasm"
DOCKER = "application/vnd.docker.image.rootfs"
EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

# The example of opencontainers/image-spec manifest.md.
SPECIFICATION = b"""{
  "schemaVersion": 2,
  "mediaType": "application/vnd.oci.image.manifest.v1+json",
  "config": {
    "mediaType": "application/vnd.oci.image.config.v1+json",
    "digest": "sha256:b5b2b2c507a0944348e0303114d8d93aaaa081732b86451d9bce1f432a537bc7",
    "size": 7023
  },
  "layers": [
    {
      "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
      "digest": "sha256:9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0",
      "size": 32654
    },
    {
      "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
      "digest": "sha256:3c3a4604a545cdc127456d94e421cd355bca5b528f4a9c1905b15da2eb4a4c6b",
      "size": 16724
    }
  ],
  "subject": {
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "digest": "sha256:5b0bcabd1ed22e9fb1310cf6c2dec7cdef19f0ad69efa1f392e94a4333501270",
    "size": 7682
  },
  "annotations": {"com.example.key1": "value1", "com.example.key2": "value2"}
}"""


def one(kind: str = TAR, **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": EMPTY, "size": 0, **more}


def document(**more: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": one(CONFIG_TYPE), "layers": [one()], **more}


@pytest.mark.parametrize(
    ("clear", "compression"),
    [(kind + end, how) for kind in (TAR, FOREIGN) for end, how in (("", "none"), ("+gzip", "gzip"), ("+zstd", "zstd"))]
    + [(WASM, "none")],
)
def test_layer_types(clear: str, compression: str) -> None:
    sealed = f"{clear}+encrypted"
    assert types.is_layer(clear)
    assert types.is_layer(sealed)
    assert types.is_encrypted(sealed)
    assert not types.is_encrypted(clear)
    assert types.encrypted_type(clear) == types.encrypted_type(sealed) == sealed
    assert types.clear_type(clear) == types.clear_type(sealed) == clear
    assert types.compression(clear) == types.compression(sealed) == compression


@pytest.mark.parametrize(
    ("docker", "oci"),
    [
        (f"{DOCKER}.diff.tar.gzip", f"{TAR}+gzip"),
        (f"{DOCKER}.diff.tar.gzip+encrypted", f"{TAR}+gzip+encrypted"),
        (f"{DOCKER}.foreign.diff.tar.gzip", f"{FOREIGN}+gzip"),
        ("application/vnd.docker.distribution.manifest.v2+json", MANIFEST_TYPE),
        ("application/vnd.docker.distribution.manifest.list.v2+json", INDEX_TYPE),
        ("application/vnd.docker.container.image.v1+json", CONFIG_TYPE),
        ("application/x-other", "application/x-other"),
    ],
)
def test_docker_types(docker: str, oci: str) -> None:
    assert types.oci_type(docker) == oci


@pytest.mark.parametrize("kind", [f"{TAR}+lz4", CONFIG_TYPE, "+encrypted", f"{TAR}+gzip+encrypted+encrypted"])
def test_unknown_layer_types(kind: str) -> None:
    assert not types.is_layer(kind)
    assert not types.is_encrypted(kind)
    with pytest.raises(ImageError, match="unknown; expected a layer's"):
        types.clear_type(kind)


def test_example_of_the_specification() -> None:
    manifest = Manifest.parse(SPECIFICATION, MANIFEST_TYPE)
    assert manifest.config.size == 7023
    assert [layer.size for layer in manifest.layers] == [32654, 16724]
    assert manifest.annotations == {"com.example.key1": "value1", "com.example.key2": "value2"}
    assert manifest.other["subject"]["size"] == 7682
    assert manifest.encode() == SPECIFICATION
    changed = manifest.replace(layers=manifest.layers[:1])
    expected = json.loads(SPECIFICATION)
    del expected["layers"][1]
    assert json.loads(changed.encode()) == expected
    assert changed.descriptor().digest != manifest.descriptor().digest


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schemaVersion": 1}, "schemaVersion 1; expected 2"),
        ({"schemaVersion": True}, "schemaVersion True; expected 2"),
        ({"schemaVersion": None}, "schemaVersion None; expected 2"),
        ({"mediaType": INDEX_TYPE}, "mediaType"),
        ({"mediaType": 7}, "mediaType 7"),
        ({"manifests": []}, "another kind of document"),
        ({"layers": None}, "layers is missing"),
        ({"layers": [one()] * (LAYER_LIMIT + 1)}, "513 layers; expected at most 512"),
        ({"layers": [one(), 7]}, "layer 1: expected a JSON object"),
        ({"layers": [one(size=-1)]}, "layer 0: size -1"),
        ({"layers": [one(size=1.0)]}, "size 1.0"),
        ({"layers": [one(size=True)]}, "size True"),
        ({"layers": [one(size=1 << 51)]}, "size"),
        ({"layers": [one(digest=EMPTY.upper())]}, "digest"),
        ({"layers": [one(digest=EMPTY + "\n")]}, "digest"),
        ({"layers": [one(digest="sha256:../../etc/passwd")]}, "digest"),
        ({"layers": [one(digest="md5:" + "0" * 32)]}, "expected sha256"),
        ({"layers": [one(digest=None)]}, "digest None"),
        ({"layers": [one(mediaType="tar")]}, "mediaType 'tar'"),
        ({"layers": [one(mediaType="a/b\r\nX: y")]}, "mediaType"),
        ({"layers": [one(annotations={"a": 1})]}, "annotation 'a'"),
        ({"layers": [one(annotations=[])]}, "annotations"),
        ({"layers": [one(annotations={str(n): "" for n in range(1025)})]}, "1025 annotations"),
        ({"layers": [one(platform={"os": "linux"})]}, "architecture None"),
        ({"config": None}, "config: expected a JSON object"),
        ({"annotations": {"a": None}}, "annotation 'a'"),
    ],
)  # fmt: skip
def test_refused_manifests(change: dict[str, Any], problem: str) -> None:
    Manifest.parse(json.dumps(document()).encode())
    with pytest.raises(ImageError, match=problem):
        Manifest.parse(json.dumps(document(**change)).encode())


def test_refused_bytes() -> None:
    for data, problem in (
        (b"", "no JSON"), (b"[]", "expected a JSON object"), (b'{"a":1,"a":2}', "twice"), (b"\xff", "UTF-8"), (b"[" * 99, "deep"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=problem):
            Manifest.parse(data)
    with pytest.raises(ImageError, match=f"expected at most {MANIFEST_LIMIT}"):
        Manifest.parse(json.dumps(document()).encode() + b" " * MANIFEST_LIMIT)


def test_a_type_that_the_descriptor_denies() -> None:
    data = json.dumps(document()).encode()
    with pytest.raises(ImageError, match=r"expected .*docker"):
        Manifest.parse(data, "application/vnd.docker.distribution.manifest.v2+json")
    with pytest.raises(ImageError, match="mediaType"):
        Index.parse(data)
    with pytest.raises(ImageError, match="another kind of document"):
        Index.parse(json.dumps({"schemaVersion": 2, "manifests": [], "layers": []}).encode())


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (document(), MANIFEST_TYPE),
        ({"schemaVersion": 2, "config": {}, "layers": []}, MANIFEST_TYPE),
        ({"schemaVersion": 2, "manifests": []}, INDEX_TYPE),
        ({"config": {}, "os": "linux"}, None),
        ({"mediaType": CONFIG_TYPE}, None),
    ],
)
def test_type_without_descriptor(found: dict[str, Any], kind: str | None) -> None:
    if kind is not None:
        assert media_type_of(json.dumps(found).encode()) == kind
        return
    with pytest.raises(ImageError, match="mediaType"):
        media_type_of(json.dumps(found).encode())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abc", max_size=3), below, max_size=3),
    max_leaves=5,
)
TEXTS = st.dictionaries(st.text("abcdef.", min_size=1, max_size=5), TEXT, max_size=3)
OTHER = st.dictionaries(st.sampled_from(["urls", "artifactType", "data", "x"]), JSON, max_size=3)
DESCRIPTORS = st.builds(
    Descriptor,
    st.sampled_from([TAR, f"{TAR}+gzip+encrypted", CONFIG_TYPE]),
    st.binary(max_size=3).map(types.digest_of),
    st.integers(0, 1 << 50),
    TEXTS,
    st.none() | st.builds(Platform, st.just("linux"), st.sampled_from(["amd64", "arm64"]), st.none() | st.just("v8")),
    OTHER,
)


@given(st.builds(Manifest, DESCRIPTORS, st.lists(DESCRIPTORS, max_size=3).map(tuple), st.just(MANIFEST_TYPE), TEXTS, OTHER))
def test_nothing_is_lost(manifest: Manifest) -> None:
    data = manifest.encode()
    again = Manifest.parse(data)
    assert again == manifest
    assert again.encode() == again.replace().encode() == data


# ---- Platforms


def index_of(*platforms: tuple[str, ...] | None) -> Index:
    return Index(
        tuple(
            Descriptor(MANIFEST_TYPE, types.digest_of(bytes([at])), at, platform=None if one is None else Platform(*one))
            for at, one in enumerate(platforms)
        )
    )


@pytest.mark.parametrize(
    ("platforms", "wanted", "found"),
    [
        ([("linux", "amd64"), ("linux", "arm64", "v8")], ("linux", "arm64"), 1),
        ([("windows", "amd64"), ("linux", "amd64")], ("linux", "amd64"), 1),
        ([("linux", "arm", "v6"), ("linux", "arm", "v7"), ("linux", "arm")], ("linux", "arm"), 2),
        ([("linux", "arm", "v6"), ("linux", "arm", "v7")], ("linux", "arm", "v7"), 1),
        ([("linux", "arm", "v6"), ("linux", "arm", "v7")], ("linux", "arm"), 0),
        ([None], ("linux", "riscv64"), 0),
        ([None, ("linux", "amd64")], ("linux", "amd64"), 1),
    ],
)
def test_choice(platforms: list[Any], wanted: tuple[str, ...], found: int) -> None:
    index = index_of(*platforms)
    assert choose(index, *wanted) is index.manifests[found]


def test_no_choice() -> None:
    with pytest.raises(ImageError, match=r"no image for linux/s390x; there are: linux/amd64, linux/arm64/v8$"):
        choose(index_of(("linux", "amd64"), ("linux", "arm64", "v8"), None), architecture="s390x")
    with pytest.raises(ImageError, match="there are: none"):
        choose(index_of())


# ---- References


@pytest.mark.parametrize(
    ("text", "expected", "wanted"),
    [
        ("oci:a/b", Reference(Path("a/b")), None),
        ("oci:/a/b:tag", Reference(Path("/a/b"), tag="tag"), "tag"),
        ("oci:a:team/app:1", Reference(Path("a"), tag="team/app:1"), "team/app:1"),
        (f"oci:a@{EMPTY}", Reference(Path("a"), digest=EMPTY), EMPTY),
        ("oci:a@b", Reference(Path("a@b")), None),
        ("docker://127.0.0.1:5000/app", Reference(None, "127.0.0.1:5000", "app"), "latest"),
        ("docker://[::1]:5000/app:x", Reference(None, "[::1]:5000", "app", "x"), "x"),
        ("docker://r.example/a/b_c/d-e:1.0", Reference(None, "r.example", "a/b_c/d-e", "1.0"), "1.0"),
        (f"docker://r.example/a:1@{EMPTY}", Reference(None, "r.example", "a", "1", EMPTY), EMPTY),
        ("docker://busybox", Reference(None, "docker.io", "library/busybox"), "latest"),
        ("docker://busybox:musl", Reference(None, "docker.io", "library/busybox", "musl"), "musl"),
        ("docker://team/app", Reference(None, "docker.io", "team/app"), "latest"),
        ("localhost/app:x", Reference(None, "localhost", "app", "x"), "x"),
        ("r.example:5000/app", Reference(None, "r.example:5000", "app"), "latest"),
    ],
)
def test_references(text: str, expected: Reference, wanted: str | None) -> None:
    found = parse_reference(text)
    assert found == expected
    assert found.wanted == wanted
    assert parse_reference(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", "busybox", "team/app", "oci:", "oci::tag", "oci:a:", "oci:a:-x", "docker://", "docker:///app", "docker://r.example/",
        "a.b/C", "docker://r.example/a//b", "docker://r.example/a/../b", "docker://r.example/a:", "docker://r.example/a@sha256:1",
        "docker://r.example:0/a", "docker://r.example:65536/a", "docker://r.example:99999999/a", "docker://user@r.example/a",
        "docker://r.example/a?b", "docker://r.example/a b", "docker://r.example/a\r\nX: y", "docker://r.example\r\n/a",
        "docker://r.example/" + "a" * 256, "docker://r.example/a:" + "x" * 129, "http://r.example/a", "oci:a\0b", "x" * 5000,
        "docker://-r.example/a", "docker://r_.example/a", f"docker://r.example/a@{EMPTY}:x",
    ],
)  # fmt: skip
def test_no_references(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_reference(text)


@given(st.text(max_size=40) | st.text("docker:/ai.@1-_[]", max_size=40).map(lambda text: f"docker://{text}"))
def test_references_come_back(text: str) -> None:
    try:
        found = parse_reference(text)
    except ArgumentError:
        return
    assert parse_reference(str(found)) == found


# ---- Verified readers


class Pieces:
    """A reader that hands out as much as it likes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes, self.closed = data, sizes, 0

    def read(self, size: int, /) -> bytes:
        size = min(size, self.sizes.pop() if self.sizes else size)
        data, self.data = self.data[:size], self.data[size:]
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.closed += 1


def read_all(reader: VerifiedReader, into: bool, size: int) -> bytes:
    found, buffer = bytearray(), bytearray(size)
    while count := reader.readinto(buffer) if into else len(data := reader.read(size)):
        found += buffer[:count] if into else data
    return bytes(found)


@given(st.binary(max_size=40), st.lists(st.integers(1, 9), max_size=9), st.booleans(), st.integers(1, 50), st.booleans())
def test_verified_reader(data: bytes, sizes: list[int], into: bool, size: int, long: bool) -> None:
    algorithm = "sha512" if long else "sha256"
    check = types.new_hash(f"{algorithm}:")
    check.update(data)
    promised = Descriptor(TAR, f"{algorithm}:{check.hexdigest()}", len(data))
    raw = Pieces(data, list(sizes))
    with VerifiedReader(raw, promised) as reader:
        assert not reader.verified
        assert read_all(reader, into, size) == data
        assert reader.verified
        assert reader.read(1) == b""
    assert raw.closed == 1
    wrongs = [(data + b"x", "more than")]
    if data:
        wrongs.append((data[:-1], f"{len(data) - 1} bytes; expected {len(data)}"))
        wrongs.append((bytes([data[0] ^ 1]) + data[1:], "have the digest"))
    for wrong, problem in wrongs:
        with pytest.raises(IntegrityError, match=problem):
            read_all(VerifiedReader(Pieces(wrong, list(sizes)), promised), into, size)
