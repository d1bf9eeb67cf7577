"""OCI layouts: what is read and refused, and that writers write whole things or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image.small_images import LAYER, put_image, put_index

from csvfast.errors import ImageError, IntegrityError
from csvfast.image import layout as layout_module
from csvfast.image import new_file
from csvfast.image.blobs import read_blob, resolve_manifest
from csvfast.image.copy import copy_image
from csvfast.image.descriptor import INDEX_TYPE, MANIFEST_TYPE, Descriptor, digest_of
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    return OciLayout(tmp_path / "layout", create=True)


def leftovers(layout: OciLayout) -> list[str]:
    return [path.name for path in layout.path.rglob(".*")]


def test_files_of_a_layout(layout: OciLayout) -> None:
    manifest = put_image(layout, "1", b"layer")
    files = {str(path.relative_to(layout.path)): path.read_bytes() for path in layout.path.rglob("*") if path.is_file()}
    assert json.loads(files.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads(files.pop("index.json")) == {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            manifest.descriptor().document() | {"annotations": {"org.opencontainers.image.ref.name": "1"}},
        ],
    }
    assert len(files) == 3
    assert all(name == f"blobs/sha256/{hashlib.sha256(data).hexdigest()}" for name, data in files.items())
    assert b"layer" in files.values()
    modes = {path.stat().st_mode & 0o777 for path in layout.path.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o644 & ~mask}


def test_reading(layout: OciLayout) -> None:
    manifest = put_image(layout, "1", b"layer")
    other = put_image(layout, "2", b"other layer")
    digest = manifest.descriptor().digest
    assert resolve_manifest(layout, "1") == resolve_manifest(layout, digest)
    assert resolve_manifest(layout, "2")[1] == other
    assert read_blob(layout, manifest.layers[0], 5) == b"layer"
    with layout.open_blob(manifest.layers[0], 3) as file:
        assert file.read(9) == b"er"
    with pytest.raises(ImageError, match="2 images; expected one, or a tag: 1, 2"):
        layout.resolve(None)
    with pytest.raises(ImageError, match="no image '3'; there are: 1, 2"):
        layout.resolve("3")
    with pytest.raises(ImageError, match="is not in"):
        layout.resolve(digest_of(b"nothing"))
    with pytest.raises(ImageError, match="5 bytes; expected at most 4"):
        read_blob(layout, manifest.layers[0], 4)
    with pytest.raises(ImageError, match=r"5 bytes in .*; expected 6"):
        layout.open_blob(manifest.layers[0].replace(size=6))
    with pytest.raises(ImageError, match=r"mediaType|config"):
        layout.resolve(manifest.config.digest)


def test_tags_move(layout: OciLayout) -> None:
    first, second = put_image(layout, "1", b"a"), put_image(layout, "1", b"b")
    assert resolve_manifest(layout, None)[1] == second
    put_image(layout, "2", b"a")
    put_image(layout, None, b"a")
    assert {tag: one.digest for tag, one in layout.tags().items()} == {
        "1": second.descriptor().digest, "2": first.descriptor().digest,
    }  # fmt: skip
    assert layout.remove_tag("1")
    assert not layout.remove_tag("1")
    assert list(layout.tags()) == ["2"]
    assert resolve_manifest(layout, second.descriptor().digest)[1] == second  # its blob is still there


def test_index_of_platforms(layout: OciLayout, tmp_path: Path) -> None:
    index = put_index(layout, "multi")
    assert len(layout.index().manifests) == 1  # the images for one platform stand in it, and not beside it
    chosen, manifest = resolve_manifest(layout, None, architecture="arm64")
    assert chosen == index.manifests[1]
    assert read_blob(layout, manifest.layers[0], 99) == b"layer of arm64"
    every, single = OciLayout(tmp_path / "every", create=True), OciLayout(tmp_path / "single", create=True)
    made = copy_image(layout, every, tag="x", platform="all")
    assert made.digest == index.descriptor().digest
    assert resolve_manifest(every, "x", architecture="arm64")[1] == manifest
    assert copy_image(layout, single, tag="x", platform="linux/arm64").digest == chosen.digest
    assert copy_image(layout, single, tag="v8", platform="linux/arm64/v8").digest == chosen.digest
    with pytest.raises(ImageError, match="no image for linux/arm64/v9"):
        copy_image(layout, single, platform="linux/arm64/v9")
    with pytest.raises(ImageError, match="expected OS/ARCHITECTURE"):
        copy_image(layout, single, platform="arm64")


def test_copy_with_another_manifest(layout: OciLayout, tmp_path: Path) -> None:
    put_index(layout, "multi")
    target = OciLayout(tmp_path / "target", create=True)
    seen: list[int] = []
    made = copy_image(
        layout, target, tag="x", platform="all", progress=seen.append,
        transform=lambda manifest: manifest.replace(annotations={"a": manifest.layers[0].digest}),
    )  # fmt: skip
    assert made.digest != layout.tags()["multi"].digest
    for architecture in ("amd64", "arm64"):
        manifest = resolve_manifest(target, "x", architecture=architecture)[1]
        assert manifest.annotations == {"a": manifest.layers[0].digest}
    assert sum(seen) > 0

    def fails(manifest: Manifest) -> Manifest:
        raise ImageError("layer", "refused")

    with pytest.raises(ImageError, match="refused"):
        copy_image(layout, target, tag="y", platform="linux/amd64", transform=fails)
    assert list(target.tags()) == ["x"]


def test_no_layouts(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected an OCI layout"):
        OciLayout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    with pytest.raises(ImageError, match=r"version '2.0.0'; expected 1.0.0"):
        OciLayout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    with pytest.raises(ImageError, match=r"index.json: is not in"):
        OciLayout(tmp_path).resolve(None)
    (tmp_path / "index.json").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(ImageError, match="more than 4194304 bytes"):
        OciLayout(tmp_path).resolve(None)


def test_damaged_layouts(layout: OciLayout) -> None:
    manifest = put_image(layout, "1", b"layer")
    layer, place = manifest.layers[0], layout.blob_path(manifest.layers[0].digest)
    place.write_bytes(b"Layer")
    with pytest.raises(ImageError, match="the bytes have the digest"):
        read_blob(layout, layer, 99)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(ImageError, match="no regular file"):
        layout.open_blob(layer)
    assert not layout.has_blob(layer)
    layout.blob_path(manifest.descriptor().digest).write_bytes(manifest.encode()[:-1] + b" ")
    with pytest.raises(ImageError, match="the bytes have the digest"):
        layout.resolve("1")
    index = json.loads((layout.path / "index.json").read_bytes())
    index["manifests"].append(index["manifests"][0] | {"digest": digest_of(b"other")})
    (layout.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ImageError, match="several images '1'"):
        layout.resolve("1")


def test_nothing_wrong_is_written(layout: OciLayout) -> None:
    good = Descriptor.of(b"good", LAYER)
    for chunks, problem in (
        ([], "0 bytes"), ([b"goo"], "3 bytes; expected 4"), ([b"go", b"ods"], "more than 4"), ([b"evil"], "have the digest"),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match=problem):
            layout.put_blob(good, chunks)
        assert not layout.has_blob(good)

    def failing() -> Iterator[bytes]:
        yield b"go"
        raise OSError(errno.EIO, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        layout.put_blob(good, failing())
    with pytest.raises(ImageError, match="mediaType"):
        layout.put_manifest(b"{}", LAYER)
    assert sum(path.is_file() for path in layout.path.rglob("*")) == 2
    reused = bytearray(b"go")

    def reusing() -> Iterator[bytearray]:
        yield reused
        reused[:] = b"od"
        yield reused

    assert layout.put_blob(None, reusing()) == good.replace(media_type="application/octet-stream")
    assert layout.has_blob(good)
    assert not layout.has_blob(good.replace(size=5))


def test_an_index_that_is_full(layout: OciLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written can be read again: whoever may push tags could make the layout useless otherwise."""
    monkeypatch.setattr(layout_module, "INDEX_LIMIT", 3)
    manifest = put_image(layout, "0", b"layer")
    for tag in ("1", "2", "2"):
        layout.put_manifest(manifest.encode(), MANIFEST_TYPE, tag)
    with pytest.raises(ImageError, match=r"4 images, .* expected at most 3"):
        layout.put_manifest(manifest.encode(), MANIFEST_TYPE, "3")
    monkeypatch.setattr(layout_module, "MANIFEST_LIMIT", len(manifest.encode()) - 1)
    with pytest.raises(ImageError, match=f"{len(manifest.encode())} bytes; expected at most"):
        layout.put_manifest(manifest.encode(), MANIFEST_TYPE, "1")
    monkeypatch.undo()
    assert sorted(layout.tags()) == ["0", "1", "2"]
    assert leftovers(layout) == []


def test_sha512(layout: OciLayout) -> None:
    blob = Descriptor(LAYER, f"sha512:{hashlib.sha512(b'data').hexdigest()}", 4)
    assert layout.put_blob(blob, [b"data"]) == blob
    assert read_blob(layout, blob, 4) == b"data"
    with pytest.raises(ImageError, match="the bytes have the digest sha512:"):
        layout.put_blob(blob, [b"date"])


@pytest.mark.parametrize("unnamed", [True, False])
def test_no_room(layout: OciLayout, unnamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without files that have no name."""
    if not unnamed:
        monkeypatch.setattr(new_file, "NO_UNNAMED_FILES", frozenset(range(200)))
        real = os.open

        def refusing(path: str, flags: int, *more: int, **others: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, *more, **others)

        monkeypatch.setattr(os, "open", refusing)
    put_image(layout, "1", b"layer")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            layout.put_blob(None, [b"x" * 600, b"y" * 600])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert leftovers(layout) == []
    assert sum(path.is_file() for path in layout.path.rglob("*")) == 5
    assert resolve_manifest(layout, "1")


def test_threads(tmp_path: Path) -> None:
    """Many writers of one index lose nothing."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: put_image(OciLayout(tmp_path, create=True), f"t{n}", b"%d" % (n % 3)), range(24)))
    assert sorted(OciLayout(tmp_path).tags()) == sorted(f"t{n}" for n in range(24))


WRITER = """
import sys
from csvfast.image.layout import OciLayout
layout = OciLayout(sys.argv[1], create=True)
block = bytes(1 << 16)
def endless():
    print("writing", flush=True)
    while True:
        yield block
layout.put_blob(None, endless())
"""


def test_a_killed_writer_leaves_nothing(layout: OciLayout) -> None:
    put_image(layout, "1", b"layer")
    before = sorted(layout.path.rglob("*"))
    with subprocess.Popen([sys.executable, "-c", WRITER, layout.path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        time.sleep(0.02)
        writer.kill()
    assert sorted(layout.path.rglob("*")) == before
    assert layout.resolve(None)[0].media_type == MANIFEST_TYPE
