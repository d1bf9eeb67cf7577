"""From an encrypted image to a tree: the order of the checks, and after every failure nothing that could be seen."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image.archives import config_of, digest, directory, entry, tar, write_blob, write_layout, write_manifest
from image.layers import sealed

from csvfast.crypto import Secret
from csvfast.errors import ClosedError, ImageError, IntegrityError
from csvfast.image.assemble import AssembledImage, assemble_image
from csvfast.image.compression import compression_of
from csvfast.image.layout import OciLayout
from csvfast.image.limits import Limits
from csvfast.image.spool import Spool

PUBLIC = "org.opencontainers.image.enc.pubopts"
KEYS = "org.opencontainers.image.enc.keys.provider.attestation-agent"
BASE = tar(directory("etc/"), entry("etc/motd", b"welcome"), entry("gone", b"x"), entry("big", os.urandom(1_200_000)))
TOP = tar(entry("etc/motd", b"second"), entry(".wh.gone"))


class Image:
    """An encrypted image in a layout, and its keys."""

    def __init__(self, place: Path, archives: list[bytes], *, compress: bool = True, **config: Any) -> None:
        self.place = place
        self.config = config_of(archives, **config)
        self.private: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.given: list[Secret] = []
        self.layers: list[dict[str, Any]] = []
        for one in archives:
            ciphertext, made = sealed(gzip.compress(one, 1, mtime=0) if compress else one)
            name = write_blob(place, ciphertext)
            self.private[name] = bytes(made.private)
            annotations = {PUBLIC: base64.b64encode(made.public).decode(), KEYS: "cGFja2V0"}
            kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compress else "") + "+encrypted"
            self.layers.append({"mediaType": kind, "digest": name, "size": len(ciphertext), "annotations": annotations})
        self.write()

    def write(self) -> None:
        write_manifest(self.place, self.config, self.layers)

    def blob(self, number: int) -> Path:
        return self.place / "blobs" / "sha256" / self.layers[number]["digest"][7:]

    def unwrap(self, descriptor: Any) -> Secret:
        self.asked.append(descriptor.digest)
        self.given.append(Secret(self.private[descriptor.digest]))
        return self.given[-1]

    def assemble(self, destination: Path, **options: Any) -> AssembledImage:
        with OciLayout(self.place) as source:
            return assemble_image(source, "one", destination, **{"unwrap": self.unwrap, **options})


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "layout", [BASE, TOP], Cmd=["/bin/sh"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "place"
    found.mkdir()
    return found


def nothing_in(place: Path) -> bool:
    return list(place.iterdir()) == []


@pytest.mark.parametrize("compress", [True, False])
def test_encrypted_layers(tmp_path: Path, place: Path, compress: bool) -> None:
    image = Image(tmp_path / "layout", [BASE, TOP], compress=compress, Cmd=["/bin/sh"])
    steps: list[str] = []
    progress: list[tuple[str, int, int]] = []
    made = image.assemble(
        place / "root",
        timings=lambda step, seconds: steps.append(step),
        progress=lambda *told: progress.append(told),
        clear_layers=False,
    )
    assert made.rootfs == place / "root"
    assert [path.name for path in place.iterdir()] == ["root"]
    assert (made.rootfs / "etc/motd").read_bytes() == b"second"
    assert not (made.rootfs / "gone").exists()
    assert made.encrypted == (True, True)
    assert [layer.diff_id for layer in made.layers] == [digest(BASE), digest(TOP)]
    assert made.config.command == ("/bin/sh",)
    assert image.asked == [layer["digest"] for layer in image.layers]
    for secret in image.given:
        with pytest.raises(ClosedError):
            memoryview(secret)
    assert sorted(steps) == ["download", "download", "finish", "manifest", "unpack", "unpack", "unwrap"]
    assert ("unpack", 2, 2) in progress
    total = sum(layer["size"] for layer in image.layers)
    assert ("download", total, total) in progress


def test_clear_and_mixed_layers(tmp_path: Path, place: Path, image: Image) -> None:
    clear = write_layout(tmp_path / "clear", [BASE, TOP])
    with OciLayout(clear) as source:
        assert assemble_image(source, "one", place / "a").encrypted == (False, False)
        with pytest.raises(ImageError, match=r"layer 1 of 2: media type .*expected an encrypted layer"):
            assemble_image(source, None, place / "b", clear_layers=False)
    index = json.loads((clear / "index.json").read_text())["manifests"][0]["digest"][7:]
    first = json.loads((clear / "blobs/sha256" / index).read_text())["layers"][0]
    write_blob(image.place, (clear / "blobs/sha256" / first["digest"][7:]).read_bytes())
    image.layers[0] = first
    image.write()
    assert image.assemble(place / "c").encrypted == (False, True)
    assert sorted(path.name for path in place.iterdir()) == ["a", "c"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_private(image: Image, number: int, **members: Any) -> None:
    name = image.layers[number]["digest"]
    image.private[name] = json.dumps({**json.loads(image.private[name]), **members}).encode()


def change_public(image: Image, number: int, **members: Any) -> None:
    annotations = image.layers[number]["annotations"]
    options = {**json.loads(base64.b64decode(annotations[PUBLIC])), **members}
    annotations[PUBLIC] = base64.b64encode(json.dumps(options).encode()).decode()


def swap(image: Image) -> None:
    image.layers.reverse()


def swap_blobs(image: Image) -> None:
    first, second = image.blob(0), image.blob(1)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def swap_keys(image: Image) -> None:
    names = [layer["digest"] for layer in image.layers]
    image.private = {names[0]: image.private[names[1]], names[1]: image.private[names[0]]}


def rename_blob(image: Image, data: bytes) -> None:
    """Other bytes, and a descriptor that tells their digest: only the MAC is against it."""
    image.layers[1] = {**image.layers[1], "digest": write_blob(image.place, data), "size": len(data)}
    image.private[image.layers[1]["digest"]] = next(reversed(image.private.values()))


def flipped_blob(image: Image) -> None:
    data = bytearray(image.blob(1).read_bytes())
    data[20] ^= 1
    rename_blob(image, bytes(data))


def other_diff_id(image: Image) -> None:
    image.config = config_of([BASE, BASE])


def other_architecture(image: Image) -> None:
    image.config = image.config.replace(b"amd64", b"sparc").replace(b"arm64", b"sparc")


TAMPER: dict[str, Callable[[Image], object]] = {
    "first bit of the ciphertext": lambda image: flip(image.blob(0), 0),
    "last bit of the ciphertext": lambda image: flip(image.blob(1), -1),
    "ciphertext and its digest": flipped_blob,
    "truncated": lambda image: image.blob(0).write_bytes(image.blob(0).read_bytes()[:-1]),
    "truncated, and its digest": lambda image: rename_blob(image, image.blob(1).read_bytes()[:-1]),
    "longer": lambda image: image.blob(1).write_bytes(image.blob(1).read_bytes() + b"x"),
    "missing blob": lambda image: image.blob(1).unlink(),
    "mac": lambda image: change_public(image, 0, hmac=base64.b64encode(bytes(32)).decode()),
    "no mac": lambda image: change_public(image, 0, hmac=""),
    "another cipher": lambda image: change_public(image, 1, cipher="AES_128_CBC"),
    "no public options": lambda image: image.layers[1]["annotations"].pop(PUBLIC),
    "nonce": lambda image: change_private(image, 1, cipheroptions={"nonce": base64.b64encode(bytes(16)).decode()}),
    "key": lambda image: change_private(image, 0, symkey=base64.b64encode(bytes(32)).decode()),
    "short key": lambda image: change_private(image, 0, symkey=base64.b64encode(bytes(16)).decode()),
    "private digest": lambda image: change_private(image, 1, digest="sha256:" + "0" * 64),
    "layers swapped": swap,
    "blobs swapped": swap_blobs,
    "keys swapped": swap_keys,
    "diff_id": other_diff_id,
    "size": lambda image: image.layers[1].update(size=image.layers[1]["size"] + 1),
    "compression": lambda image: image.layers[1].update(mediaType="application/vnd.oci.image.layer.v1.tar+encrypted"),
    "unknown media type": lambda image: image.layers[1].update(
        mediaType="application/vnd.oci.image.layer.v1.tar+xz+encrypted"
    ),
    "said to be clear": lambda image: image.layers[1].update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip"),
    "a layer less": lambda image: image.layers.pop(),
    "a layer more": lambda image: image.layers.append(image.layers[0]),
    "another architecture": other_architecture,
}


@pytest.mark.parametrize("name", TAMPER)
def test_tampering_is_found_before_anything_is_seen(image: Image, place: Path, name: str) -> None:
    TAMPER[name](image)
    image.write()
    before = open_descriptors()
    with pytest.raises(ImageError) as caught:
        image.assemble(place / "root")
    assert nothing_in(place)
    assert "\n" not in str(caught.value)
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_manifest_bytes_are_verified(image: Image, place: Path) -> None:
    name = json.loads((image.place / "index.json").read_text())["manifests"][0]["digest"][7:]
    flip(image.place / "blobs/sha256" / name, 20)
    with pytest.raises(ImageError):
        image.assemble(place / "root")
    assert image.asked == []
    assert nothing_in(place)


def test_denied_keys(image: Image, place: Path) -> None:
    """Nothing is downloaded before every key is there."""

    class DeniedError(Exception):
        pass

    def unwrap(descriptor: Any) -> Secret:
        if image.asked:
            raise DeniedError
        return image.unwrap(descriptor)

    read: list[str] = []
    with OciLayout(image.place) as source:
        real = source.open_blob
        source.open_blob = lambda descriptor, offset=0: (read.append(descriptor.media_type), real(descriptor, offset))[
            1
        ]  # type: ignore[method-assign]
        with pytest.raises(DeniedError):
            assemble_image(source, "one", place / "root", unwrap=unwrap)
        with pytest.raises(ImageError, match=r"layer 1 of 2: is encrypted, and no key was given"):
            assemble_image(source, "one", place / "root")
    assert read
    assert not [one for one in read if "layer" in one]
    assert nothing_in(place)


def test_approval_comes_before_keys(image: Image, place: Path) -> None:
    def approve(_descriptor: Any, manifest: Any, config: Any) -> None:
        assert len(manifest.layers) == len(config.diff_ids) == 2
        raise ImageError("policy", "not this one")

    with pytest.raises(ImageError, match="not this one"):
        image.assemble(place / "root", approve=approve)
    assert image.asked == []
    assert nothing_in(place)


def test_errors_name_layer_and_entry(tmp_path: Path, place: Path) -> None:
    image = Image(tmp_path / "layout", [BASE, tar(entry("etc/../../x"))])
    with pytest.raises(ImageError, match=r"layer 2 of 2, etc/\.\./\.\./x: the name leaves the root directory"):
        image.assemble(place / "root")
    assert nothing_in(place)
    with pytest.raises(ImageError, match="more than 2 entries"):
        image.assemble(place / "root", limits=Limits(entries=2))
    with pytest.raises(ImageError, match=r"layers of .* bytes; the limit is 1000"):
        image.assemble(place / "root", limits=Limits(total_bytes=1000))
    with pytest.raises(ImageError, match="2 layers; the limit is 1"):
        image.assemble(place / "root", limits=Limits(layers=1))
    assert nothing_in(place)


def test_a_taken_name(image: Image, place: Path) -> None:
    (place / "root").mkdir()
    with pytest.raises(ImageError, match="is there already"):
        image.assemble(place / "root")
    (place / "link").symlink_to("nowhere")
    with pytest.raises(ImageError, match="is there already"):
        image.assemble(place / "link")
    assert image.asked == []


@pytest.mark.parametrize("step", ["download", "unpack"])
def test_given_up_by_the_caller(image: Image, place: Path, step: str) -> None:
    class EnoughError(Exception):
        pass

    def progress(what: str, done: int, _total: int) -> None:
        if what == step and done:
            raise EnoughError

    with pytest.raises(EnoughError):
        image.assemble(place / "root", progress=progress)
    assert nothing_in(place)


def test_an_index_of_platforms(image: Image, place: Path) -> None:
    index = json.loads((image.place / "index.json").read_text())
    machine = json.loads(image.config)["architecture"]
    ours = {**index["manifests"][0], "platform": {"os": "linux", "architecture": machine}}
    ours.pop("annotations")
    inner = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{**ours, "platform": {"os": "linux", "architecture": "s390x"}, "digest": "sha256:" + "0" * 64}, ours],
    }).encode()  # fmt: skip
    index["manifests"] = [{
        "mediaType": "application/vnd.oci.image.index.v1+json", "digest": write_blob(image.place, inner), "size": len(inner),
        "annotations": {"org.opencontainers.image.ref.name": "one"},
    }]  # fmt: skip
    (image.place / "index.json").write_text(json.dumps(index))
    assert image.assemble(place / "root").descriptor.digest == ours["digest"]
    with pytest.raises(ImageError):
        image.assemble(place / "other", platform="linux/mips")


CHILD = """
import os, sys
from pathlib import Path
from csvfast.crypto import Secret
from csvfast.image.assemble import assemble_image
from csvfast.image.layout import OciLayout
layout, place, private = sys.argv[1:]
print("begun", flush=True)
assemble_image(OciLayout(layout), "one", Path(place), unwrap=lambda layer: Secret(Path(private, layer.digest[7:]).read_bytes()))
"""


def test_killed_processes_leave_nothing_that_stays(tmp_path: Path, place: Path) -> None:
    """Whatever a killed process left beside the destination, the next run removes; the destination is whole or not there."""
    files = [entry(f"d{number}/f", os.urandom(10_000)) for number in range(200)]
    image = Image(tmp_path / "layout", [tar(*files), TOP])
    private = tmp_path / "private"
    private.mkdir()
    for name, data in image.private.items():
        (private / name[7:]).write_bytes(data)
    whole = 0
    for turn in range(5):
        command = [sys.executable, "-c", CHILD, str(image.place), str(place / f"root{turn}"), str(private)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.02 * turn)
            child.send_signal(signal.SIGKILL)
        root = place / f"root{turn}"
        if root.exists():
            whole += 1
            assert len(list(root.iterdir())) == 201
    image.assemble(place / "last")
    assert len([path for path in place.iterdir() if path.name.startswith(".")]) == 0
    assert len(list(place.iterdir())) == whole + 1


def test_a_directory_somebody_works_in_is_left_alone(image: Image, place: Path) -> None:
    seen: list[str] = []

    def progress(step: str, done: int, _total: int) -> None:
        if step == "unpack" and done == 1 and not seen:
            (staging,) = place.iterdir()
            seen.append(staging.name)
            assert staging.stat().st_mode & 0o777 == 0o700
            image.assemble(place / "inner")
            assert staging.exists()

    image.assemble(place / "root", progress=progress)
    assert sorted(path.name for path in place.iterdir()) == ["inner", "root"]


def test_the_spool_gives_its_space_back(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/shm")):
        with Spool(place) as spool:
            data = os.urandom(1 << 20)
            for _turn in range(16):
                spool.write(data)
            spool.rewind()
            buffer = memoryview(bytearray(1 << 20))
            for turn in range(16):
                assert spool.readinto(buffer) == 1 << 20
                assert buffer == data
                assert os.fstat(spool._file).st_blocks * 512 <= (16 - turn + 4) << 20
            assert os.fstat(spool._file).st_blocks * 512 <= 5 << 20
            assert spool.readinto(buffer) == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such"):
        Spool(tmp_path / "missing")


def test_a_spool_where_files_need_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays a file: in memory a large layer would be too much."""
    real = os.open

    def without(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no such files")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", without)
    with Spool(tmp_path) as spool:
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(spool._file).st_dev == tmp_path.stat().st_dev
        assert os.fstat(spool._file).st_mode & 0o777 == 0o600
        spool.write(b"ciphertext")
        spool.rewind()
        assert spool.read(20) == b"ciphertext"


MEMORY = """
import gc, os, resource, sys
from pathlib import Path
from csvfast.crypto import Secret
from csvfast.image.assemble import assemble_image
from csvfast.image.layout import OciLayout
layout, place, private, warm = sys.argv[1:]
def run(where, to):
    assemble_image(OciLayout(where), "one", Path(to), unwrap=lambda layer: Secret(Path(private, layer.digest[7:]).read_bytes()))
run(warm, place + "-warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(layout, place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_image(tmp_path: Path, place: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    small = Image(tmp_path / "small", [TOP])
    noise = os.urandom(1 << 20)
    large = Image(tmp_path / "large", [tar(*(entry(f"f{number}", noise * 8) for number in range(6)))], compress=False)
    for image in (small, large):
        for name, data in image.private.items():
            (private / name[7:]).write_bytes(data)
    command = [sys.executable, "-c", MEMORY, str(large.place), str(place / "root"), str(private), str(small.place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10, "kilobytes, for 48 MiB"


def test_media_types_decide_about_compression(image: Image) -> None:
    assert {compression_of(layer["mediaType"]) for layer in image.layers} == {"gzip"}
    assert issubclass(IntegrityError, ImageError)


TIGHT = """
import os, subprocess, sys
from pathlib import Path
from csvfast.crypto import Secret
from csvfast.image.assemble import assemble_image
from csvfast.image.layout import OciLayout
layout, place, private, size = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
assemble_image(
    OciLayout(layout), "one", Path(place, "root"), unwrap=lambda layer: Secret(Path(private, layer.digest[7:]).read_bytes())
)
print(sum(path.stat().st_size for path in Path(place, "root").iterdir()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the system does not let this user mount a file system")
def test_a_tmpfs_needs_little_more_than_the_files(tmp_path: Path, place: Path) -> None:
    """Ciphertext and files are in the same memory: what has been read of the one makes room for the other."""
    private = tmp_path / "private"
    private.mkdir()
    image = Image(tmp_path / "layout", [tar(entry(f"f{number}", os.urandom(8 << 20))) for number in range(4)], compress=False)
    for name, data in image.private.items():
        (private / name[7:]).write_bytes(data)
    command = ["unshare", "-m", sys.executable, "-c", TIGHT, str(image.place), str(place), str(private), str(39 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("the system does not let this user mount a file system")
    assert done.stdout == f"{32 << 20}\n", done.stderr
    assert nothing_in(place)
    command[-1] = str(30 << 20)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "no space left on device" in done.stderr.lower()
