"""Image layers against what any implementation of their format must do: AES-CTR and one HMAC over every byte.

    python bench/test_bench_image.py [--mib 64] [--rounds 5] [--cpu 0]

prints rates and their ratio to that limit. Limit and candidates take turns, and the best round of each counts, so that what
else the machine does falls on both. The limit runs on one core; --cpu keeps the candidates there, too.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from csvfast.crypto import Secret
from csvfast.image.annotations import PUBLIC_OPTIONS
from csvfast.image.descriptor import Descriptor
from csvfast.image.layer_cipher import BLOCK_BYTES, check_layer, encrypt_layer, open_layer
from csvfast.image.suites import SUITES, Suite

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"


class Sink:
    """Takes everything and keeps nothing."""

    def write(self, data: memoryview) -> int:
        return len(data)


def limit(data: bytes, suite: Suite) -> Callable[[], None]:
    """The suite's cipher and MAC, block by block, one after the other."""
    key, nonce = Secret.random(suite.key_bytes), os.urandom(16)
    out, view = memoryview(bytearray(BLOCK_BYTES)), memoryview(data)

    def run() -> None:
        cipher, mac = suite.cipher(key, nonce), suite.mac(key, nonce)
        for at in range(0, len(view), BLOCK_BYTES):
            block = view[at : at + BLOCK_BYTES]
            cipher.process(block, out[: len(block)])
            mac.update(out[: len(block)])
        mac.digest()

    return run


def work(data: bytes, suite: Suite) -> dict[str, Callable[[], None]]:
    """What is measured.

    encrypt    a layer to ciphertext, with all digests
    check      pass 1: digest and MAC of ciphertext
    open       pass 2: decryption, and the layer's own digest
    decrypt    both passes
    """
    file = io.BytesIO()
    made = encrypt_layer(io.BytesIO(data), file, suite=suite)
    sealed = file.getvalue()
    annotations = {PUBLIC_OPTIONS: base64.b64encode(made.public).decode()}
    descriptor = Descriptor(MEDIA_TYPE, made.digest, made.size, annotations)
    scratch = bytearray(BLOCK_BYTES)

    def check() -> None:
        check_layer(io.BytesIO(sealed), descriptor, made.private)

    def open_() -> None:
        with open_layer(io.BytesIO(sealed), descriptor, made.private) as reader:
            while reader.readinto(scratch):
                pass
            assert reader.verified

    def decrypt() -> None:
        check()
        open_()

    def encrypt() -> None:
        encrypt_layer(io.BytesIO(data), Sink(), suite=suite)

    return {"encrypt": encrypt, "check": check, "open": open_, "decrypt": decrypt}


def measured(size: int, rounds: int, suite: Suite) -> dict[str, float]:
    """Bytes per second of the limit and of everything else."""
    data = hashlib.shake_128(b"layer").digest(BLOCK_BYTES) * (size // BLOCK_BYTES)
    runs = {"limit": limit(data, suite), **work(data, suite)}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begun)
    return {name: len(data) / seconds for name, seconds in best.items()}


@pytest.mark.benchmark(group="image layers")
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_layers(suite: Suite, record_property: Any) -> None:
    """Briefly, to see that it runs. Figures come from the script, which needs the CPUs for itself."""
    rates = measured(4 * BLOCK_BYTES, 3, suite)
    for name, rate in rates.items():
        record_property(name, rate)
        # A sixth hash, a copy of every byte or work under the GIL would show even on a busy machine.
        assert rate > rates["limit"] / 20, (name, rates)


def main() -> None:
    parser = argparse.ArgumentParser(description="Image layers against AES-CTR with HMAC.")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", type=int, help="stay on this one")
    arguments = parser.parse_args()
    if arguments.cpu is not None:
        os.sched_setaffinity(0, {arguments.cpu})
    for suite in SUITES.values():
        rates = measured(arguments.mib << 20, arguments.rounds, suite)
        print(suite.name)
        for name, rate in rates.items():
            print(f"    {name:10} {rate / 1e9:6.2f} GB/s {rate / rates['limit']:6.2f}")


if __name__ == "__main__":
    main()
