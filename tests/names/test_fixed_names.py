"""The names and shapes that scripts outside rely on, used exactly as they are promised. A change here breaks somebody."""

from __future__ import annotations

import inspect
import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from reference import ovmf_images as ovmf

import csvfast
import csvfast.crypto

SCRIPT = Path(sysconfig.get_path("scripts")) / "csvfast"
BENCH_NAMES = {
    "sm4-xts-encrypt/4096", "sm4-xts-decrypt/4096", "sm4-xts-line/64", "sm4-ctr/65536", "sm3/1048576", "sm3-many/4096",
    "verity-sm3/4096", "memory-write/4096", "launch-encrypt-measure", "memcpy",
    "sm2-sign", "sm2-verify", "sm2-verify-prepared", "sm2-verify-many",
}  # fmt: skip
ABC = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"


def answer(*arguments: object, folder: Path) -> Any:
    done = subprocess.run([SCRIPT, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_sm3(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert csvfast.sm3().update(b"abc") is None
    assert csvfast.sm3(data=b"abc").hexdigest() == csvfast.sm3_file(tmp_path / "abc").hexdigest() == ABC
    assert csvfast.sm3(b"abc").name == "sm3"
    assert csvfast.sm3_many([b"abc", bytearray(b"abc")]) == [bytes.fromhex(ABC)] * 2


@pytest.mark.parametrize("standard", ["gb", "ieee"])
def test_xts(standard: str, key: bytes) -> None:
    cipher = csvfast.crypto.SM4XTS(key, standard=standard, unit_size=4096)
    data = bytes(8192)
    sealed = cipher.encrypt(data, unit=5)
    out = bytearray(8192)
    assert cipher.encrypt(data, unit=5, out=out) is out
    assert out == sealed
    assert cipher.decrypt(sealed, unit=5) == data
    assert (sealed == csvfast.crypto.SM4XTS(key).encrypt(data, 5)) == (standard == "gb")  # "gb" is the default


def test_encrypted_memory(key: bytes) -> None:
    with csvfast.EncryptedMemory(1 << 20, standard="gb") as memory:
        memory.install(1, key=None)
        memory.install(2, key)
        memory.write(0x3000, bytes(4096), 2)
        assert memory.read(address=0x3000, length=4096, asid=2) == bytes(4096)
        # The data unit number is the page frame number.
        assert memory.raw[0x3000:0x4000].tobytes() == csvfast.crypto.SM4XTS(key).encrypt(bytes(4096), unit=3)
        memory.remove(1)
    parameters = inspect.signature(csvfast.EncryptedMemory.__init__).parameters
    assert list(parameters)[:3] == ["self", "size", "standard"]
    assert parameters["standard"].kind is inspect.Parameter.KEYWORD_ONLY


def test_kernels() -> None:
    words = {"portable", "aesni", "gfni", "avx2", "avx512", "adx", "ifma"}
    kernels = csvfast.info()["kernels"]
    assert set(kernels) == {"sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"}
    for primitive, entry in kernels.items():
        for name in entry["compiled"]:
            assert any(word in name for word in words), name
        for name in entry["available"]:
            csvfast.force_kernel(primitive, name)
            assert csvfast.info()["kernels"][primitive]["chosen"] == name
        csvfast.force_kernel(primitive, None)
        assert csvfast.info()["kernels"][primitive]["chosen"] == entry["chosen"]
    compiled = kernels["sm4"]["compiled"]
    assert "portable" in compiled
    if len(compiled) > 1:
        for pair in (("aesni", "avx2"), ("gfni", "avx2"), ("gfni", "avx512")):
            assert any(all(word in name for word in pair) for name in compiled), pair


def test_measure(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "ovmf").write_bytes(ovmf.good())
    record = answer("measure", "verity", "--salt", "00ff", "--json", "image", folder=tmp_path)
    assert len(bytes.fromhex(record["root_hash"])) == 32
    digest = csvfast.sm3_file(tmp_path / "image").hexdigest()
    assert answer("measure", "image", "--json", "image", folder=tmp_path)["digest"] == digest
    digests = set()
    for vmsa in ("none", "amd"):
        record = answer(
            "measure", "launch", "--firmware", "ovmf", "--kernel", "image", "--initrd", "image",
            "--append", "console=ttyS0", "--vmsa", vmsa, "--json", folder=tmp_path,
        )  # fmt: skip
        assert len(bytes.fromhex(record["digest"])) == 32
        digests.add(record["digest"])
    assert len(digests) == 2


def test_bench(tmp_path: Path) -> None:
    document = answer("bench", "--size", "1MiB", "--seconds", "0.001", "--quick", "--json", "-", folder=tmp_path)
    assert set(document) == {"machine", "results"}
    assert isinstance(document["machine"], dict)
    assert {result["name"] for result in document["results"]} == BENCH_NAMES
    for result in document["results"]:
        assert {"name", "kernel", "threads", "peer"} <= set(result)
        (rate,) = (result[key] for key in ("bytes_per_second", "ops_per_second") if key in result)
        assert rate > 0
        assert result["threads"] >= 1
        assert result["peer"] is None or isinstance(result["peer"], str)
