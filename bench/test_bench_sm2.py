"""SM2 by operation: what preparing a key costs and gains, from which batch size on lanes pay, encryption, agreement.

pytest bench/test_bench_sm2.py --benchmark-columns=median,ops
"""

from __future__ import annotations

from typing import Any

import pytest

import csvfast
from csvfast.crypto import SM2PrivateKey, SM2PublicKey, load_private_key, sm2_verify_many
from csvfast.crypto.sm2 import dump_private_key

KEY = SM2PrivateKey(bytes(range(1, 33)))
PEER = SM2PrivateKey(bytes(range(2, 34)))
DIGEST = bytes(range(32))
KERNELS = csvfast.info()["kernels"]["sm2"]["available"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> None:
    csvfast.force_kernel("sm2", request.param)


each_kernel = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("length", [32, 1044, 65536])
@each_kernel
def test_sign_message(benchmark: Any, length: int) -> None:
    benchmark.group = f"sign a message of {length} bytes"
    benchmark(KEY.sign, bytes(length))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("length", [32, 1044, 65536])
@each_kernel
def test_verify_message(benchmark: Any, length: int, prepared: bool) -> None:
    benchmark.group = f"verify a message of {length} bytes"
    key = SM2PublicKey(KEY.public_key.point)
    if prepared:
        key.prepare()
    benchmark(key.verify, KEY.sign(bytes(length)), bytes(length))


@each_kernel
def test_prepare(benchmark: Any) -> None:
    benchmark.group = "prepare a key"
    benchmark(lambda: SM2PublicKey(KEY.public_key.point).prepare())


@pytest.mark.parametrize("encoding", ["x || y", "compressed"])
@each_kernel
def test_public_key(benchmark: Any, encoding: str) -> None:
    benchmark.group = "read a public key"
    point = KEY.public_key.point
    benchmark(SM2PublicKey, point if encoding == "x || y" else bytes((2 + point[63] % 2,)) + point[:32])


@each_kernel
def test_private_key(benchmark: Any) -> None:
    benchmark.group = "read a private key"
    benchmark(SM2PrivateKey, bytes(range(1, 33)))


def test_private_key_file(benchmark: Any) -> None:
    benchmark.group = "read a private key"
    benchmark(load_private_key, dump_private_key(KEY))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64, 1024])
@pytest.mark.parametrize("many", csvfast.info()["kernels"]["sm2-many"]["available"])
def test_verify_many(benchmark: Any, many: str, count: int) -> None:
    benchmark.group = f"verify {count} signatures"
    csvfast.force_kernel("sm2-many", many)
    arguments = [KEY.public_key] * count, KEY.sign_digest(DIGEST) * count, DIGEST * count
    assert benchmark(sm2_verify_many, *arguments) == [True] * count


@each_kernel
def test_encrypt(benchmark: Any) -> None:
    benchmark.group = "encrypt 32 bytes"
    benchmark(KEY.public_key.encrypt, DIGEST)


@each_kernel
def test_decrypt(benchmark: Any) -> None:
    benchmark.group = "decrypt 32 bytes"
    ciphertext = KEY.public_key.encrypt(DIGEST)
    assert benchmark(KEY.decrypt, ciphertext) == DIGEST


@each_kernel
def test_agree(benchmark: Any) -> None:
    benchmark.group = "agree on 16 bytes"
    benchmark(lambda: KEY.agree(KEY, PEER.public_key, PEER.public_key, 16, initiator=True))
