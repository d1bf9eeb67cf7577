"""Encrypted layers to files, against what no implementation can leave out: AES-256-CTR, HMAC-SHA-256 and gunzip on one core.

    python bench/test_bench_unpack.py [--mib 200] [--files 10000] [--rounds 5] [--cpu 0] [--place /dev/shm] [--profile]

The image is made of shared libraries (large) and of Python's library (small files), so that it compresses as images do.
Limit and candidate take turns and the best round of each counts. CPU seconds are those of all threads together.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import sysconfig
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from csvfast.crypto import Secret
from csvfast.image.annotations import PUBLIC_OPTIONS
from csvfast.image.assemble import assemble_image
from csvfast.image.layer_cipher import EncryptedLayer, encrypt_layer
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import host_architecture

BLOCK = 1 << 20
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"


def large_files(size: int) -> Iterator[bytes]:
    """Shared libraries, until there are enough bytes."""
    for path in sorted(Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "").glob("*.so*")):
        if size > 0 and path.is_file():
            data = path.read_bytes()
            size -= len(data)
            yield data


def small_files(count: int) -> Iterator[bytes]:
    """Files of Python's library below 20 kB, again and again."""
    found = [
        path.read_bytes()
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if path.stat().st_size < 20_000
    ]
    for number in range(count):
        yield found[number % len(found)]


class Image:
    """One encrypted layer in a layout."""

    def __init__(self, place: Path, files: Iterator[bytes]) -> None:
        file = io.BytesIO()
        self.files = 0
        with tarfile.open(fileobj=file, mode="w") as archive:
            for data in files:
                entry = tarfile.TarInfo(f"usr/lib/{self.files // 40}/{self.files}")
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))
                self.files += 1
        self.archive = file.getvalue()
        sealed = io.BytesIO()
        self.made: EncryptedLayer = encrypt_layer(io.BytesIO(gzip.compress(self.archive, 6, mtime=0)), sealed)
        self.sealed = sealed.getvalue()
        self.layout = OciLayout(place, create=True)
        diff_id = f"sha256:{hashlib.sha256(self.archive).hexdigest()}"
        config = json.dumps({
            "architecture": host_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}, "config": {},
        }).encode()  # fmt: skip
        written = self.layout.put_blob(None, [config])
        layer = self.layout.put_blob(None, [self.sealed])
        annotations = {PUBLIC_OPTIONS: base64.b64encode(self.made.public).decode()}
        manifest = {
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": written.digest, "size": written.size},
            "layers": [{"mediaType": MEDIA_TYPE, "digest": layer.digest, "size": layer.size, "annotations": annotations}],
        }  # fmt: skip
        self.layout.put_manifest(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json", "one")

    def limit(self) -> None:
        """Cipher, MAC and decompression, block by block, one after the other; the bytes go nowhere."""
        options = json.loads(bytes(self.made.private))
        key, nonce = (base64.b64decode(one) for one in (options["symkey"], options["cipheroptions"]["nonce"]))
        mac, cipher = hmac.HMAC(key, hashes.SHA256()), Cipher(algorithms.AES(key), modes.CTR(nonce)).decryptor()
        machine, view, clear = zlib.decompressobj(31), memoryview(self.sealed), memoryview(bytearray(BLOCK))
        for at in range(0, len(view), BLOCK):
            block = view[at : at + BLOCK]
            mac.update(block)
            count = cipher.update_into(block, clear)
            machine.decompress(clear[:count])
        mac.finalize()

    def assemble(self, destination: Path, **options: Any) -> None:
        """The whole way."""
        made = assemble_image(
            self.layout, "one", destination, unwrap=lambda _layer: Secret(bytes(self.made.private)), **options
        )
        assert made.layers[0].entries == self.files


def measured(place: Path, files: Iterator[bytes], rounds: int) -> dict[str, float]:
    """Best seconds of limit and candidate, and what they worked on."""
    image = Image(place / "layout", files)
    best = dict.fromkeys(("limit", "wall", "cpu"), float("inf"))
    steps: dict[str, float] = {}

    def timings(step: str, seconds: float) -> None:
        steps[step] = min(steps.get(step, seconds), seconds)

    for number in range(rounds):
        begun = time.thread_time()
        image.limit()
        best["limit"] = min(best["limit"], time.thread_time() - begun)
        wall, cpu = time.perf_counter(), time.process_time()
        image.assemble(place / f"root{number}", timings=timings)
        best["wall"] = min(best["wall"], time.perf_counter() - wall)
        best["cpu"] = min(best["cpu"], time.process_time() - cpu)
        shutil.rmtree(place / f"root{number}")
    image.layout.close()
    return {**best, **steps, "files": image.files, "archive": len(image.archive), "layer": len(image.sealed)}


@pytest.mark.benchmark(group="unpacking")
def test_unpacking(tmp_path: Path, record_property: Any) -> None:
    """Briefly, to see that it runs. Figures come from the script, which needs the CPUs for itself."""
    found = measured(tmp_path, small_files(300), 2)
    for name, value in found.items():
        record_property(name, value)
    assert found["files"] == 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Encrypted layers to files against AES-CTR, HMAC and gunzip.")
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", type=int, help="stay on this one")
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="a tmpfs, as in a guest")
    parser.add_argument("--profile", action="store_true", help="show where the calling thread's time goes")
    arguments = parser.parse_args()
    if arguments.cpu is not None:
        os.sched_setaffinity(0, {arguments.cpu})
    for name, files in (
        ("large files", large_files(arguments.mib << 20)),
        ("small files", small_files(arguments.files)),
    ):
        with tempfile.TemporaryDirectory(dir=arguments.place, prefix="csvfast-bench-") as place:
            if arguments.profile:
                profile(Path(place), files)
                continue
            found = measured(Path(place), files, arguments.rounds)
        print(
            f"{name}: {found['files']:.0f}, {found['archive'] / BLOCK:.0f} MiB, {found['layer'] / BLOCK:.0f} MiB compressed"
        )
        print(f"    limit {found['limit']:.3f} s, whole {found['wall']:.3f} s, of all CPUs {found['cpu']:.3f} s")
        rates = f"{found['archive'] / found['wall'] / 1e6:.0f} MB/s, {found['files'] / found['wall']:.0f} files/s"
        print(f"    {found['limit'] / found['wall']:.2f} of the limit; {rates}")
        steps = ("manifest", "unwrap", "download", "unpack", "finish")
        print("    " + ", ".join(f"{step} {found[step] * 1000:.1f} ms" for step in steps))


def profile(place: Path, files: Iterator[bytes]) -> None:
    import cProfile
    import pstats

    image = Image(place / "layout", files)
    with cProfile.Profile() as profiler:
        image.assemble(place / "root")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
